"""DeCE as an objective: schedule, host, records, refusals."""

import math

import pytest
import torch

from hf_backdoor_defense.defenses.dece import DeCE
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
