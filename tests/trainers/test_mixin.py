"""The host: what it hands to objectives, and how it divides."""

import dataclasses
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.matched_decay import MatchedDecay
from hf_backdoor_defense.trainers.hosts import DefendedTrainer, defended
from tests.trainers.toys import (
    Halved,
    PadCollator,
    Recorder,
    WeightPull,
    arguments,
    bert,
    classification_rows,
    gpt2,
    language_rows,
    same,
    weights,
)


def make(tmp_path, model, rows, defense=None, cls=DefendedTrainer, extra=0, **args):
    kwargs = {} if cls is Trainer else {"defense": defense}
    return cls(model, args=arguments(tmp_path, **args), train_dataset=rows, data_collator=PadCollator(extra), **kwargs)


CASES = {
    "classification": (lambda: bert(), lambda: classification_rows(24)),
    "causal": (lambda: gpt2(), lambda: language_rows(16)),
}
LOSSES = {"undefended": lambda: None, "dece": lambda: DeCE(alpha_base=0.7), "penalty": lambda: WeightPull()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_two_by_four_accumulation_equals_one_batch_of_eight(tmp_path, case, loss):
    model, rows = CASES[case]
    whole = make(tmp_path, model(), rows(), LOSSES[loss]())
    parts = make(
        tmp_path,
        model(),
        rows(),
        LOSSES[loss](),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    whole.train(), parts.train()
    assert whole.state.global_step == parts.state.global_step >= 2
    assert same(weights(whole), weights(parts), atol=2e-6)
    assert not same(weights(whole), weights(model()), atol=1e-4)  # it did learn something


@pytest.mark.parametrize("case", CASES)
def test_undefended_equals_a_manual_sgd_step_on_the_mean_loss(tmp_path, case):
    model, rows = CASES[case]
    trainer = make(tmp_path, model(), rows(), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    recorder = Recorder()
    hosted = make(
        tmp_path, model(), rows(), recorder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1
    )
    trainer.train(), hosted.train()
    # Oracle: one batch of the same eight rows, torch's own mean cross-entropy, plain SGD.
    ids = [i for step in recorder.steps for i in step.row_ids.tolist()]
    by_id = {row["row_id"]: row for row in rows()}
    batch = PadCollator()([{k: v for k, v in by_id[i].items() if k != "row_id"} for i in ids])
    oracle = model()
    labels = batch.pop("labels")
    logits = oracle(**batch).logits
    if case == "causal":
        logits, labels = logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1)
    F.cross_entropy(logits, labels).backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter -= 1e-2 * parameter.grad
    assert same(weights(trainer), weights(oracle), atol=1e-6)
    assert same(weights(hosted), weights(trainer))  # recording changes nothing


def test_without_accumulation_it_equals_the_stock_trainer(tmp_path):
    rows = classification_rows(24).remove_columns("row_id")
    stock = make(tmp_path, bert(), rows, cls=Trainer)
    ours = make(tmp_path, bert(), rows)
    flat = make(tmp_path, bert(), rows, DeCE(alpha_base=1.0, label_smoothing=0.0))
    stock.train(), ours.train(), flat.train()
    assert same(weights(stock), weights(ours), atol=1e-7)
    assert same(weights(stock), weights(flat), atol=1e-6)


def test_padding_changes_nothing(tmp_path):
    for model, rows in CASES.values():
        plain = make(tmp_path, model(), rows(), DeCE(alpha_base=0.7))
        padded = make(tmp_path, model(), rows(), DeCE(alpha_base=0.7), extra=5)
        plain.train(), padded.train()
        assert same(weights(plain), weights(padded), atol=2e-6)


def test_observe_gets_row_ids_and_detached_losses_in_training_only(tmp_path):
    recorder = Recorder()
    rows = classification_rows(24)
    trainer = make(tmp_path, bert(), rows, recorder, num_train_epochs=2)
    trainer.train()
    trainer.evaluate(rows)
    assert len(recorder.values) == 6
    seen = torch.cat([step.row_ids for step in recorder.steps]).tolist()
    assert sorted(seen) == sorted(2 * list(rows["row_id"]))
    assert not any(values.requires_grad for values in recorder.values)
    assert all(step.training and len(step.labels) == 8 for step in recorder.steps)
    assert [step.epoch for step in recorder.steps] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


def test_batch_index_maps_positions_to_rows(tmp_path):
    recorder = Recorder()
    make(tmp_path, gpt2(), language_rows(8), recorder, per_device_train_batch_size=4).train()
    for step, values in zip(recorder.steps, recorder.values, strict=True):
        counts = torch.bincount(step.batch_index, minlength=4)
        assert len(values) == int(counts.sum())
        assert counts.tolist() == [int((row != -100).sum()) for row in step.labels]


def test_is_poisoned_reaches_neither_model_nor_objective(tmp_path):
    recorder = Recorder()
    rows = classification_rows(8).add_column("is_poisoned", [True] * 8).add_column("text", ["words"] * 8)
    make(tmp_path, bert(), rows, recorder).train()
    assert set(recorder.steps[0].inputs) == {"input_ids", "attention_mask"}


def test_a_defense_cannot_see_which_rows_were_poisoned(tmp_path):
    rows = classification_rows(8).add_column("is_poisoned", [True] * 8).add_column("original_label", [0] * 8)
    recorder = Recorder()
    # Every column is kept for the model here, positionally given; the bookkeeping of an attack is not.
    trainer = DefendedTrainer(
        bert(),
        arguments(tmp_path, remove_unused_columns=False),
        PadCollator(),
        rows,
        defense=recorder,
        aux_datasets={"rows": rows},
    )
    trainer.train()
    for seen in (trainer.train_dataset, trainer.aux_datasets["rows"]):
        assert set(seen.column_names) == {"input_ids", "attention_mask", "label", "row_id"}
    assert sorted(recorder.steps[0].row_ids.tolist()) == list(range(1000, 1008))


def test_rows_without_ids_get_their_position(tmp_path):
    recorder = Recorder()
    make(tmp_path, bert(), classification_rows(8).remove_columns("row_id"), recorder).train()
    assert sorted(recorder.steps[0].row_ids.tolist()) == list(range(8))


def test_evaluation_reports_plain_cross_entropy_and_leaves_no_trace(tmp_path):
    rows = classification_rows(24)
    dece = DeCE(alpha_base=0.5)
    trainer = make(tmp_path, bert(), rows, [dece, WeightPull(strength=100.0)])
    loss = trainer.evaluate(rows)["eval_loss"]
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = F.cross_entropy(trainer.model.eval()(**batch).logits, labels).item()
    assert loss == pytest.approx(expected, abs=1e-5)
    assert dece.activity() == {}


def test_two_objectives_may_be_hosted_together(tmp_path):
    rows = classification_rows(8)
    trainer = make(
        tmp_path, bert(), rows, [Halved(), WeightPull(strength=0.5)], logging_strategy="steps", logging_steps=1
    )
    before = weights(trainer)
    trainer.train()
    oracle = bert()
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    labels = batch.pop("labels")
    F.cross_entropy(oracle(**batch).logits, labels).div(2).backward()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter -= 1e-2 * (parameter.grad + 0.5 * parameter)
    assert same(weights(trainer), weights(oracle), atol=1e-6)
    expected = 0.25 * sum(v.square().sum().item() for n, v in before.items() if v.is_floating_point())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["weight_pull/norm"] == pytest.approx(expected, rel=1e-4)


class _Stride(torch.autograd.Function):
    seen: list = []

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        _Stride.seen.append((grad.stride(), grad.numel()))
        return grad


def test_the_host_divides_last_so_that_a_fused_loss_sees_a_uniform_gradient(tmp_path):
    class Watches(Halved):
        def loss(self, step):
            return _Stride.apply(super().loss(step))

    _Stride.seen.clear()
    make(tmp_path, gpt2(), language_rows(16), [Watches(), WeightPull()], gradient_accumulation_steps=2).train()
    assert _Stride.seen and all(stride == (0,) and count > 1 for stride, count in _Stride.seen)


def test_two_losses_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="halved and dece both replace the loss"):
        make(tmp_path, bert(), classification_rows(8), [Halved(), DeCE()])


def test_an_object_is_hosted_once(tmp_path):
    objective = DeCE(alpha_base=0.9)
    make(tmp_path, bert(), classification_rows(8), objective)
    with pytest.raises(ValueError, match="hosted by another Trainer"):
        make(tmp_path, bert(), classification_rows(8), objective)
    make(tmp_path, bert(), classification_rows(8), dataclasses.replace(objective))


def test_all_ignored_batch_gives_a_finite_zero(tmp_path):
    rows = [dict(row, labels=[-100] * len(row["labels"])) for row in language_rows(8)]
    for defense in (None, DeCE()):
        trainer = make(tmp_path, gpt2(), Dataset.from_list(rows), defense)
        before = weights(trainer)
        assert trainer.train().training_loss == 0.0
        assert same(before, weights(trainer))


def test_nan_stops_the_run_with_step_and_rows(tmp_path):
    model = bert()
    trainer = make(tmp_path, model, classification_rows(24), Recorder())
    with torch.no_grad():
        model.classifier.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 0, rows \[10\d\d"):
        trainer.train()


def test_all_reasons_are_raised_together_before_the_first_step(tmp_path):
    model = bert()
    model.config.problem_type = "multi_label_classification"
    trainer = make(tmp_path, model, classification_rows(8), DeCE(label_smoothing=0.9))
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert "multi_label_classification" in str(error.value) and "label_smoothing" in str(error.value)
    assert trainer.state.global_step == 0 and not (tmp_path / "model.safetensors").exists()


def test_a_regression_head_is_refused_and_two_labels_are_not(tmp_path):
    with pytest.raises(ValueError, match="num_labels=1"):
        make(tmp_path, bert(labels=1), classification_rows(8, labels=1)).train()
    make(tmp_path, bert(labels=2), classification_rows(8, labels=2)).train()


def test_label_smoothing_and_compute_loss_func_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make(tmp_path, bert(), classification_rows(8), DeCE(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func"):
        DefendedTrainer(bert(), args=arguments(tmp_path), defense=DeCE(), compute_loss_func=lambda *a, **k: None)


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, bert(), classification_rows(8))
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="nn.DataParallel"):
        trainer.train()


def test_model_init_and_search_are_refused_where_an_objective_prepares(tmp_path):
    args = {"args": arguments(tmp_path), "train_dataset": classification_rows(8), "data_collator": PadCollator()}
    with pytest.raises(ValueError, match="model_init"):
        DefendedTrainer(model_init=lambda: bert(), defense=Recorder(), **args).train()
    with pytest.raises(ValueError, match="one model once"):
        DefendedTrainer(bert(), defense=Recorder(), **args).hyperparameter_search()
    DefendedTrainer(model_init=lambda: bert(), defense=DeCE(), **args).train()


def test_a_second_training_starts_with_a_fresh_optimizer(tmp_path):
    rows = classification_rows(24)
    trainer = make(tmp_path, bert(), rows, optim="adamw_torch")
    trainer.train()
    middle = weights(trainer)
    trainer.train()
    fresh = make(tmp_path, bert(), rows, optim="adamw_torch")
    fresh.model.load_state_dict(middle)
    fresh.train()
    assert same(weights(trainer), weights(fresh), atol=1e-7)


def test_a_second_training_logs_its_own_terms_only(tmp_path):
    class Constant(WeightPull):
        def penalties(self, step):
            return {"constant": torch.tensor(self.strength)}

    objective = Constant(strength=1.0)
    logged = {"logging_strategy": "steps", "logging_steps": 2}
    trainer = make(
        tmp_path, bert(), classification_rows(24), objective, **logged
    )  # three steps: the last is not logged
    trainer.train()
    objective.strength = 3.0
    trainer.train()
    assert [entry["weight_pull/constant"] for entry in trainer.state.log_history if "loss" in entry] == [3.0]


def test_missing_labels_are_named(tmp_path):
    trainer = make(tmp_path, bert(), classification_rows(8).remove_columns("label"))
    with pytest.raises(ValueError, match="no `labels`"):
        trainer.train()


def test_defended_takes_trainers_with_the_stock_loss_only(tmp_path):
    class Mine(Trainer):
        pass

    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainer = make(tmp_path, bert(), classification_rows(24), cls=defended(Mine))
    plain = make(tmp_path, bert(), classification_rows(24))
    trainer.train(), plain.train()
    assert isinstance(trainer, Mine) and same(weights(trainer), weights(plain))
    for bad, message in [(Own, "compute_loss of its own"), (DefendedTrainer, "already"), (dict, "subclass")]:
        with pytest.raises(TypeError, match=message):
            defended(bad)


def test_matched_decay_scales_each_epochs_step_and_nothing_compounds(tmp_path):
    rows = classification_rows(8)
    control = make(tmp_path, bert(), rows, MatchedDecay(pull=[0.5, 0.25]), num_train_epochs=2)
    control.train()
    oracle = bert()
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in rows])
    labels = batch.pop("labels")
    for rate in (0.5e-2, 0.25e-2):
        oracle.zero_grad()
        F.cross_entropy(oracle(**batch).logits, labels).backward()
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter -= rate * parameter.grad
    assert same(weights(control), weights(oracle), atol=1e-6)
    assert control.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def test_named_terms_reach_tensorboard(tmp_path, monkeypatch):
    """Through transformers' own callback, with a writer that only remembers: the package itself need not be installed."""
    from transformers.integrations import TensorBoardCallback, integration_utils

    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars.setdefault(tag, []).append((step, value))

        def add_text(self, *args):
            pass

        flush = close = add_text

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    writer = Writer()
    trainer = DefendedTrainer(
        bert(),
        args=arguments(tmp_path, logging_strategy="steps", logging_steps=1),
        train_dataset=classification_rows(24),
        data_collator=PadCollator(),
        defense=[DeCE(alpha_base=0.9), WeightPull()],
        callbacks=[TensorBoardCallback(tb_writer=writer)],
    )
    trainer.train()
    assert [value for _, value in writer.scalars["train/dece/alpha"]] == pytest.approx([0.9] * 3)
    assert len(writer.scalars["train/weight_pull/norm"]) == len(writer.scalars["train/dece/target_pull"]) == 3
