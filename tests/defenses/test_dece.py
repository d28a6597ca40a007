"""DeCE as an objective: schedule, host, records, refusals."""

import math

import pytest
import torch

from hf_backdoor_defense.defenses import dece as module
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.functional.dece import dece_loss_reference, target_pull
from hf_backdoor_defense.objectives import Objective, Projection, Step
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.named import DeCETrainer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, gpt2, language_rows, same, weights


def host(folder, defense, model=None, rows=None, cls=DefendedTrainer, **args):
    return cls(
        bert() if model is None else model,
        args=arguments(folder, **args),
        train_dataset=classification_rows(24) if rows is None else rows,
        data_collator=PadCollator(),
        defense=defense,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_alpha_is_base_to_the_epoch_over_a_real_run(tmp_path, accumulation):
    trainer = host(
        tmp_path,
        DeCE(alpha_base=0.9),
        num_train_epochs=3,
        logging_strategy="steps",
        logging_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    per_epoch = len(logged(trainer, "dece/alpha")) // 3
    expected = [0.9] * per_epoch + [0.81] * per_epoch + [0.729] * per_epoch
    assert logged(trainer, "dece/alpha") == pytest.approx(expected)


def test_warmup_delays_and_fractional_moves_every_step(tmp_path):
    delayed = host(tmp_path, DeCE(alpha_base=0.9, warmup_epochs=1), num_train_epochs=3, logging_strategy="epoch")
    delayed.train()
    assert logged(delayed, "dece/alpha") == pytest.approx([1.0, 0.9, 0.81])
    moving = host(tmp_path, DeCE(alpha_base=0.9, schedule="fractional"), logging_strategy="steps", logging_steps=1)
    moving.train()
    assert logged(moving, "dece/alpha") == pytest.approx([0.9 ** (1 + i / 3) for i in range(3)])


def test_one_step_equals_a_numpy_free_oracle_in_probability_space(tmp_path):
    rows, alpha, eps = classification_rows(8), 0.7, 0.05
    trainer = host(tmp_path, DeCE(alpha_base=alpha, label_smoothing=eps), rows=rows)
    trainer.train()
    oracle = bert()
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    labels = batch.pop("labels")
    p = oracle(**batch).logits.softmax(-1)
    y = torch.full_like(p, eps / 2).scatter(1, labels[:, None], 1 - eps)
    (-(y * (alpha * p + (1 - alpha) * y).log()).sum(-1)).mean().backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter -= 1e-2 * parameter.grad
    assert same(weights(trainer), weights(oracle), atol=1e-6)


def test_chunks_change_nothing(tmp_path):
    whole = host(tmp_path, DeCE(alpha_base=0.7), gpt2(), language_rows(16))
    tiny = host(tmp_path, DeCE(alpha_base=0.7, chunk_bytes=1000), gpt2(), language_rows(16))
    whole.train(), tiny.train()
    assert same(weights(whole), weights(tiny), atol=1e-6)


def test_activity_and_pull_are_what_the_run_did(tmp_path):
    trainer = host(tmp_path, DeCE(alpha_base=0.8), num_train_epochs=2, logging_strategy="steps", logging_steps=1)
    trainer.train()
    dece = trainer.objectives[0]
    pulls = logged(trainer, "dece/target_pull")
    assert dece.pull_per_epoch() == pytest.approx([sum(pulls[:3]) / 3, sum(pulls[3:]) / 3])
    activity = dece.activity()
    assert activity["tokens"] == 48 and activity["target_pull"] == pytest.approx(sum(pulls) / 6)
    assert (activity["alpha_first"], activity["alpha_last"]) == pytest.approx((0.8, 0.64))
    assert dece.inert() is None
    # From the shares of cross-entropy's pull at p = 1/3: at the first step the head has not learned anything.
    r = 0.8 / 3 / (0.8 / 3 + 0.2 * 0.95)
    assert pulls[0] == pytest.approx(r, abs=0.02)


def test_alpha_base_one_is_inert_and_a_new_run_forgets(tmp_path):
    flat = host(tmp_path, DeCE(alpha_base=1.0))
    flat.train()
    assert "changes nothing" in flat.objectives[0].inert()
    assert "no labeled position" in DeCE().inert()
    trainer = host(tmp_path, DeCE(alpha_base=0.9))
    trainer.train()
    trainer.train()
    assert trainer.objectives[0].activity()["tokens"] == 24


def test_the_drop_in_is_the_defended_trainer_with_dece(tmp_path):
    named = host(tmp_path, None, cls=DeCETrainer)
    plain = host(tmp_path, DeCE())
    named.train(), plain.train()
    assert named.objectives == [DeCE()] and same(weights(named), weights(plain))
    assert host(tmp_path, DeCE(alpha_base=0.9), cls=DeCETrainer).objectives[0].alpha_base == 0.9


def test_presets_and_refusals():
    assert DeCE.preset("code") == DeCE()
    assert (DeCE.preset("llm").alpha_base, DeCE.preset("target-only").label_smoothing) == (0.8, 0.0)
    assert DeCE.preset("plm-2023", alpha_base=0.98) == DeCE(alpha_base=0.98, label_smoothing=0.01)
    for bad in (
        {"alpha_base": 0.0},
        {"alpha_base": math.nan},
        {"label_smoothing": 1.0},
        {"schedule": "step"},
        {"warmup_epochs": -1},
        {"chunk_bytes": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DeCE(**bad)
    with pytest.raises(ValueError, match="no preset `lm`"):
        DeCE.preset("lm")
    with pytest.raises(ValueError, match="did you mean `alpha_base`"):
        DeCE.from_dict({"alpha_bas": 0.9})


def test_a_schedule_that_ends_by_ignoring_everything_is_warned_of(tmp_path, caplog):
    host(tmp_path, DeCE(alpha_base=0.8), num_train_epochs=4).reasons()  # tau >= 1 from epoch 4 on at base 0.8
    assert "less than half of their pull" in caplog.text
    caplog.clear()
    host(tmp_path, DeCE(alpha_base=0.8), num_train_epochs=3).reasons()
    assert not caplog.text


def test_smoothing_beyond_the_classes_is_refused_on_the_host(tmp_path):
    with pytest.raises(ValueError, match="below 0.667 for 3 classes"):
        host(tmp_path, DeCE(label_smoothing=0.7)).train()
    host(tmp_path, DeCE(label_smoothing=0.6)).train()


def test_a_stream_is_told_what_its_schedule_does(tmp_path, caplog):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(classification_rows(64).remove_columns("row_id"))

    trainer = host(
        tmp_path, DeCE(alpha_base=0.9), rows=Stream(), max_steps=4, logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert "one epoch (alpha_base=0.9, warmup_epochs=0 throughout)" in caplog.text
    assert logged(trainer, "dece/alpha") == pytest.approx([0.9] * 4)
    assert trainer.objectives[0].rows() == {}  # rows of a stream have no ids


@pytest.mark.parametrize(
    "length, warns", [({"max_steps": 30}, True), ({"max_steps": 3}, False), ({"num_train_epochs": 9}, True)]
)
def test_a_schedule_that_goes_too_far_is_told_however_the_length_is_given(tmp_path, caplog, length, warns):
    # 24 rows in batches of 8: three steps an epoch. At base 0.8 the threshold passes 1 in the fourth epoch.
    host(tmp_path, DeCE(alpha_base=0.8), rows=classification_rows(24), **length).reasons()
    assert ("even certain labels" in caplog.text) == warns


def step(labels, row_ids=None, epoch=0.0, **scores):
    return Step(
        model=torch.nn.Identity(),
        inputs={},
        labels=labels,
        row_ids=row_ids,
        epoch=epoch,
        global_step=0,
        training=True,
        **scores,
    )


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(30, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 30, (3, 5), generator=generator)
    labels[0, :3] = labels[2] = -100
    return hidden, Projection(weight=weight, bias=bias, scale=0.5, softcap=5.0), labels


@pytest.mark.parametrize("objective", [DeCE(alpha_base=0.8), DeCE.preset("target-only"), Objective()])
def test_hidden_states_and_logits_give_the_same_loss_and_notes(objective):
    hidden, project, labels = problem()
    given = {"logits": project(hidden)}, {"hidden": hidden, "project": project}
    results = []
    for scores in given:
        now = step(labels, **scores)
        values = objective.loss(now)
        gradients = torch.autograd.grad(values.sum() / 7, (hidden, project.weight))
        results.append((values.detach(), *gradients, now.top1, now.metrics))
    torch.testing.assert_close(results[1][:3], results[0][:3], rtol=1e-11, atol=1e-14)
    assert torch.equal(results[0][3], (project(hidden).argmax(-1) == labels)[labels != -100])
    assert torch.equal(results[1][3], results[0][3])
    assert results[1][4].keys() == results[0][4].keys()


def test_the_loss_of_hidden_states_is_the_formula():
    hidden, project, labels = problem()
    found = DeCE(alpha_base=0.8).loss(step(labels, hidden=hidden, project=project))
    expected = dece_loss_reference(project(hidden), labels, log_alpha=math.log(0.8), label_smoothing=0.05)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_classifier_has_no_token_accuracy():
    now = step(torch.tensor([0, 1]), logits=torch.zeros(2, 3))
    DeCE().loss(now), Objective().loss(now)
    assert now.top1 is None


def test_a_budget_below_one_row_works_and_is_said_once(caplog):
    hidden, project, labels = problem()
    ours = DeCE(alpha_base=0.8, chunk_bytes=100)  # a row of 30 double-precision scores takes 240 bytes
    found = [ours.loss(step(labels, hidden=hidden, project=project)) for _ in range(2)]
    expected = DeCE(alpha_base=0.8).loss(step(labels, hidden=hidden, project=project))
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-14)
    assert caplog.text.count("chunk_bytes=100 is below the 240 bytes that one row of 30 scores takes") == 1
    caplog.clear()
    DeCE(chunk_bytes=240).loss(step(labels, logits=project(hidden)))
    assert not caplog.text


def mean_pulls(project, batches, log_alpha):
    """Row by row and position by position."""
    kept = {}
    for hidden, labels, ids in batches:
        logps = project(hidden).log_softmax(-1)
        for row, row_id in enumerate(ids.tolist()):
            for place, label in enumerate(labels[row].tolist()):
                if label != -100:
                    pull = target_pull(logps[row, place, label], log_alpha=log_alpha, label_smoothing=0.05)
                    kept.setdefault(row_id, []).append(pull.item())
    return {row_id: sum(values) / len(values) for row_id, values in kept.items()}


@pytest.mark.parametrize("merge_at", [1, 2, 256])
def test_rows_keep_their_mean_pull_of_the_last_epoch(monkeypatch, merge_at):
    monkeypatch.setattr(module, "MERGE_AT", merge_at)
    hidden, project, labels = problem()
    ids = torch.tensor([70, 5, 9])  # row 9 has no labeled position
    ours = DeCE(alpha_base=0.8)
    for epoch in (0.0, 0.5):
        ours.loss(step(labels, ids, epoch, hidden=hidden, project=project))
    again = step(labels, torch.tensor([5, 2, 3]), 1.0, hidden=hidden.flip(0), project=project)
    third = step(labels, torch.tensor([2, 5, 8]), 1.5, hidden=2 * hidden, project=project)
    ours.loss(again), ours.loss(third)
    expected = mean_pulls(
        project, [(s.hidden, labels, s.row_ids) for s in (again, third)], 2 * math.log(0.8)
    )  # of the second epoch alone
    row_ids, values = ours.rows()["pull"]
    assert row_ids.dtype == torch.int64 and (values.diff() >= 0).all()
    assert dict(zip(row_ids.tolist(), values.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
    assert set(expected) == {2, 5}


def test_rows_survive_a_checkpoint_inside_an_epoch():
    hidden, project, labels = problem()
    steps = [
        step(labels, torch.tensor([1 + i, 10 + i, 20 + i]), 0.1 * i, hidden=hidden + i, project=project)
        for i in range(4)
    ]
    whole, first, second = DeCE(), DeCE(), DeCE()
    for now in steps:
        whole.loss(now)
    for now in steps[:2]:
        first.loss(now)
    second.load_state_dict(first.state_dict())
    for now in steps[2:]:
        second.loss(now)
    for found, expected in zip(second.rows()["pull"], whole.rows()["pull"], strict=True):
        assert torch.equal(found, expected)
    assert DeCE().rows() == {}
    empty = DeCE()
    empty.load_state_dict(DeCE().state_dict())
    assert empty.rows() == {}


def test_rows_of_a_real_run_are_the_training_rows(tmp_path):
    rows = language_rows(13)
    trainer = host(tmp_path, DeCE(alpha_base=0.8), gpt2(), rows, num_train_epochs=2)
    trainer.train()
    row_ids, values = trainer.objectives[0].rows()["pull"]
    learned = {r["row_id"] for r in rows if any(label != -100 for label in r["labels"][1:])}
    assert set(row_ids.tolist()) == learned
    assert ((values > 0) & (values < 1)).all()
    trainer.train()
    assert len(trainer.objectives[0].rows()["pull"][0]) == len(learned)
