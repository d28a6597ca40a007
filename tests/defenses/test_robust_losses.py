"""The comparators as objectives: what the host does with them, what they record, what they refuse."""

import math

import pytest
import torch
from datasets import Dataset

from hf_backdoor_defense.defenses.robust_losses import GCE, Focal, InTrust, Smoothed
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, gpt2, language_rows, same, weights


def host(folder, defense, model=None, rows=None, **args):
    return DefendedTrainer(
        bert() if model is None else model,
        args=arguments(folder, **args),
        train_dataset=classification_rows(24) if rows is None else rows,
        data_collator=PadCollator(),
        defense=defense,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def one_hot(p, labels):
    return torch.zeros_like(p).scatter(1, labels[:, None], 1.0)


# Means over the batch, written in probability space.
DIRECT = {
    "gce": (GCE(q=0.6), lambda p, y: (1 - (p * y).sum(-1) ** 0.6).div(0.6).mean()),
    "in_trust": (
        InTrust(),
        lambda p, y: (
            -0.2 * (y * p.log()).sum(-1) - 0.8 * (p * (0.5 * p + 0.5 * y.clamp(1e-4, 1)).log()).sum(-1)
        ).mean(),
    ),
    "focal": (Focal(), lambda p, y: -((y * (1 - p) ** 2 * p.log()).sum(-1)).mean()),
    "smoothed": (Smoothed(label_smoothing=0.2), lambda p, y: -((0.8 * y + 0.2 / p.shape[1]) * p.log()).sum(-1).mean()),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_few_hosted_steps_equal_a_loop_by_hand(tmp_path, name):
    objective, direct = DIRECT[name]
    rows = classification_rows(8)
    trainer = host(tmp_path, type(objective).from_dict(objective.to_dict()), rows=rows, num_train_epochs=3)
    trainer.train()
    oracle = bert()
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    labels = batch.pop("labels")
    for _ in range(3):
        oracle.zero_grad()
        p = oracle(**batch).logits.softmax(-1)
        direct(p, one_hot(p, labels)).backward()
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter -= 1e-2 * parameter.grad
    assert same(weights(trainer), weights(oracle), atol=1e-6)


@pytest.mark.parametrize(
    "neutral", [GCE(q=0.0), InTrust(alpha=1.0, beta=0.0), Focal(gamma=0.0), Smoothed(label_smoothing=0.0)]
)
def test_neutral_values_train_as_no_defense_does_and_say_so(tmp_path, neutral):
    objective = type(neutral).from_dict(neutral.to_dict())
    trainer, plain = host(tmp_path, objective), host(tmp_path, None)
    trainer.train(), plain.train()
    assert same(weights(trainer), weights(plain), atol=1e-7)
    assert "cross-entropy" in objective.inert()


@pytest.mark.parametrize("kind", [GCE, InTrust, Focal, Smoothed])
def test_activity_is_the_mean_of_what_was_logged(tmp_path, kind):
    objective = kind()
    trainer = host(tmp_path, objective, num_train_epochs=2, logging_strategy="steps", logging_steps=1)
    trainer.train()
    activity = objective.activity()
    assert activity.pop("positions") == 48
    assert objective.inert() is None and len(activity) == 2
    for name, value in activity.items():
        per_step = logged(trainer, f"{objective.name}/{name}")
        assert len(per_step) == 6 and value == pytest.approx(sum(per_step) / 6, abs=1e-5)


def test_the_first_step_of_a_new_head_pulls_as_its_chance_level_says(tmp_path):
    # p = 1/3 before anything is learned.
    expected = {
        GCE: ("target_pull", (1 / 3) ** 0.5),
        Focal: ("target_pull", (2 / 3) ** 2 + 2 / 3 * (2 / 3) * math.log(3)),
        InTrust: ("first_term", 0.2 * math.log(3)),
        Smoothed: ("smoothing_mass", 0.1 * 2 / 3),
    }
    for kind, (name, value) in expected.items():
        trainer = host(tmp_path, kind(), max_steps=1, logging_strategy="steps", logging_steps=1)
        trainer.train()
        assert trainer.objectives[0].activity()[name] == pytest.approx(value, abs=0.03)


def test_smoothing_tells_where_it_pushes_a_label_down(tmp_path):
    model = bert()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))  # certain of class 0, right in a third of the rows
    objective = Smoothed()
    rows = classification_rows(24)
    host(tmp_path, objective, model=model, rows=rows, learning_rate=0.0).train()
    assert objective.activity()["pushed_down"] == pytest.approx(sum(label == 0 for label in rows["label"]) / 24)


@pytest.mark.parametrize("kind", [GCE, InTrust, Focal, Smoothed])
def test_a_language_model_counts_its_labeled_tokens(tmp_path, kind):
    rows = language_rows(8)
    objective = kind()
    host(tmp_path, objective, model=gpt2(), rows=rows).train()
    # The first token of a row has nothing before it that could predict it.
    assert objective.activity()["positions"] == sum(sum(t != -100 for t in row[1:]) for row in rows["labels"])


@pytest.mark.parametrize("kind", [GCE, InTrust, Focal, Smoothed])
def test_token_accuracy_is_noted_where_positions_are_tokens(kind):
    # Scores of 3 classes at 4 positions: right, ignored, wrong, right.
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]]], requires_grad=True)
    labels = torch.tensor([[0, -100, 0, 2]])

    def step(logits, labels):
        return Step(
            model=None, inputs={}, labels=labels, row_ids=None, epoch=0.0, global_step=0, training=True, logits=logits
        )

    tokens, rows = step(logits, labels), step(logits[0], labels[0])
    assert kind().loss(tokens).requires_grad and tokens.top1.tolist() == [True, False, True]
    kind().loss(rows)
    assert rows.top1 is None


def test_without_a_label_nothing_happens_and_it_is_said(tmp_path):
    rows = Dataset.from_list([dict(row, labels=[-100] * len(row["labels"])) for row in language_rows(8)])
    for objective in (GCE(), InTrust(), Focal(), Smoothed()):
        trainer = host(tmp_path, objective, model=gpt2(), rows=rows)
        before = weights(trainer)
        assert trainer.train().training_loss == 0.0
        assert same(before, weights(trainer))
        assert "no labeled position" in objective.inert()


def test_a_new_run_forgets_and_a_resumed_one_goes_on(tmp_path):
    objective = GCE()
    trainer = host(tmp_path / "twice", objective)
    trainer.train(), trainer.train()
    assert objective.activity()["positions"] == 24
    whole = host(tmp_path / "whole", GCE(), num_train_epochs=2)
    whole.train()
    host(tmp_path / "parts", GCE(), num_train_epochs=2, max_steps=3, save_strategy="epoch").train()
    rest = host(tmp_path / "parts", GCE(), num_train_epochs=2)
    rest.train(resume_from_checkpoint=True)
    assert rest.objectives[0].activity() == pytest.approx(whole.objectives[0].activity(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (GCE, {"q": -0.1}),
        (GCE, {"q": math.nan}),
        (InTrust, {"alpha": -1.0}),
        (InTrust, {"beta": math.inf}),
        (InTrust, {"delta": 1.5}),
        (InTrust, {"label_floor": 0.0}),
        (Focal, {"gamma": -1.0}),
        (Focal, {"gamma": math.inf}),
        (Smoothed, {"label_smoothing": 1.0}),
        (Smoothed, {"label_smoothing": -0.1}),
    ],
)
def test_fields_out_of_range_are_refused_where_they_are_written(kind, bad):
    with pytest.raises(ValueError, match=rf"{kind.name}: `{next(iter(bad))}` must be"):
        kind(**bad)
