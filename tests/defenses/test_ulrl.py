"""ULRL against a loop of its own, written from the formulas: both phases, what is reset, and no trace of the first phase."""

import inspect
import logging
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.ulrl import ULRL
from hf_backdoor_defense.functional.row_scores import DegenerateScoreError
from tests.trainers.image_toys import Watched, fake, host, image_list, resnet, vit
from tests.trainers.toys import PadCollator, bert, bert_mlm, classification_rows, same, weights

ROWS = 20


def by_hand(model, batches, *, rate, epochs, decay=5e-4, momentum=0.9, clip=20.0, stop=0.2):
    """Phase 1: ascent with clipping, accuracy counted before each update. Scores of the head's rows and accuracies."""
    before = model.classifier.weight.detach().clone()
    parameters, accuracies = list(model.parameters()), []
    velocity = [torch.zeros_like(p) for p in parameters]
    model.train()
    for epoch in range(epochs):
        right = 0
        for inputs in batches[epoch]:
            logits = model(pixel_values=inputs["pixel_values"]).logits
            right += (logits.argmax(-1) == inputs["labels"]).sum().item()
            ce = (logits.logsumexp(-1) - logits.gather(-1, inputs["labels"][:, None]).squeeze(-1)).mean()
            gradients = torch.autograd.grad(ce, parameters)
            norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
                    velocity[i] = momentum * velocity[i] + decay * p - g * min(1.0, clip / norm)
                    p.sub_(rate * velocity[i])
        accuracies.append(right / ROWS)
        if accuracies[-1] <= stop:
            break
    return (model.classifier.weight.detach() - before).abs().sum(-1), accuracies


@pytest.mark.parametrize("clip", [20.0, 0.05])
def test_both_phases_equal_a_loop_of_its_own(tmp_path, clip):
    rows = Watched(image_list(ROWS))
    objective = ULRL(
        unlearn_batch_size=8, unlearn_lr=0.005, unlearn_epochs=3, unlearn_clip=clip, z_threshold=0.1, alpha=0.7
    )
    trainer = host(tmp_path, objective, rows=rows, max_steps=3, lr=0.01, seed=3)
    trainer.train()
    activity, evidence = objective.activity(), objective.evidence()
    epochs = int(activity["ulrl_unlearn_epochs"])
    seen = rows.batches(8)
    ascent, relearn = [seen[3 * i : 3 * i + 3] for i in range(epochs)], seen[3 * epochs : 3 * epochs + 3]
    scores, accuracies = by_hand(vit(), ascent, rate=0.005, epochs=epochs, clip=clip)
    assert evidence["unlearn"]["accuracy"] == pytest.approx(accuracies)
    assert evidence["layers"][0]["scores"] == pytest.approx(scores.tolist(), rel=1e-4)
    ranked = sorted(scores.tolist())
    median = ranked[2]
    mad = sorted(abs(s - median) for s in scores.tolist())[2]
    flagged = [c for c, s in enumerate(scores.tolist()) if s > median and (s - median) / (1.4826 * mad) > 0.1][:2]
    assert flagged and evidence["suspected_classes"] == flagged
    model, generator = vit(), torch.Generator().manual_seed(3)
    old = model.classifier.weight.detach()[flagged].clone()
    with torch.no_grad():
        for c in flagged:
            model.classifier.weight[c] = (torch.rand(16, generator=generator) * 2 - 1) * math.sqrt(2 / 16)
            model.classifier.bias[c] = 0
    velocity = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for inputs in relearn:
        logits = model.train()(pixel_values=inputs["pixel_values"]).logits
        loss = (logits.logsumexp(-1) - logits.gather(-1, inputs["labels"][:, None]).squeeze(-1)).mean()
        for v, c in zip(old, flagged, strict=True):
            w = model.classifier.weight[c]
            loss = loss + 0.7 * (w * v).sum() / (w.norm() * v.norm())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + g
                p.sub_(0.01 * velocity[name])
    assert same(weights(trainer), weights(model), atol=1e-6)


@pytest.mark.parametrize("make", [vit, resnet])
def test_the_first_phase_leaves_no_trace_but_the_reset_rows(tmp_path, make):
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("classifier") and parameter.ndim == 1:
                parameter.fill_(0.5)  # a new head's bias is 0, as a reset one
    objective = ULRL(unlearn_epochs=2, stop_accuracy=0.0, z_threshold=0.1, unlearn_lr=0.01)
    trainer = host(tmp_path, objective, model=model, rows=image_list(ROWS))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weights(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    objective.prepare(trainer, checkpoint=None)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2] and not any(m.training for m in model.modules())
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    flagged = objective.evidence()["suspected_classes"]
    kept = [c for c in range(5) if c not in flagged]
    assert flagged
    for name, value in weights(model).items():
        if name.startswith("classifier"):
            assert torch.equal(value[kept], before[name][kept])
            bound = math.sqrt(2 / value.shape[1]) if value.ndim == 2 else 0.0
            assert value[flagged].abs().max().item() <= bound and not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("labels, auto", [(2, "hidden"), (3, "hidden"), (4, "rows")])
def test_few_classes_have_no_rows_to_compare(tmp_path, labels, auto):
    model, rows = vit(labels), image_list(ROWS, labels)
    reasons = [r for r in host(tmp_path, ULRL(units="rows"), model=model, rows=rows).reasons() if "units='rows'" in r]
    assert len(reasons) == (labels < 4)
    trainer = host(tmp_path, ULRL(), model=model, rows=rows, max_steps=1)
    trainer.train()
    assert trainer.objectives[0].evidence()["units"] == auto


def test_no_suspect_is_no_failure(tmp_path):
    objective = ULRL(z_threshold=1e6)
    host(tmp_path, objective, rows=image_list(ROWS), max_steps=1).train()
    assert (
        objective.inert() is None
        and objective.evidence()["suspected_classes"] == []
        and objective.penalties(None) == {}
    )


# -- what ends the first phase ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("largest, fixed, stop", [(4, 0.2, 0.22), (4, 0.5, 0.5), (15, 0.2, 0.825), (11, 0.6, 0.605)])
def test_the_ascent_ends_after_the_first_epoch_below_its_bound(tmp_path, largest, fixed, stop):
    rows = image_list(ROWS)
    for i, row in enumerate(rows):
        row["label"] = 0 if i < largest else 1 + i % 4
    objective = ULRL(unlearn_epochs=5, unlearn_batch_size=7, unlearn_lr=0.003, stop_accuracy=fixed)
    trainer = host(tmp_path, objective, rows=rows)
    objective.prepare(trainer, checkpoint=None)
    unlearn = objective.evidence()["unlearn"]
    accuracies = unlearn["accuracy"]
    assert unlearn["stop"] == pytest.approx(stop)
    assert unlearn["epochs"] == len(accuracies) == objective.activity()["ulrl_unlearn_epochs"]
    assert all(accuracy > stop for accuracy in accuracies[:-1])
    assert accuracies[-1] <= stop if len(accuracies) < 5 else len(accuracies) == 5
    assert objective.evidence()["reliable"] == (accuracies[-1] <= stop)


def test_an_ascent_that_diverges_changes_nothing(tmp_path):
    trainer = host(tmp_path, ULRL(unlearn_lr=1e30), rows=image_list(ROWS))
    with pytest.raises(FloatingPointError, match=r"diverged.*Lower `unlearn_lr` \(now 1e\+30\)"):
        trainer.train()
    assert same(weights(trainer), weights(vit())) and trainer.state.global_step == 0
    assert not any(tmp_path.rglob("*.safetensors"))


def test_scores_that_are_equal_are_refused_through_the_host(tmp_path):
    """Three classes of five have no rows and the same weights: they move alike, and the median deviation is 0."""
    model, rows = vit(), [{**row, "label": i % 2} for i, row in enumerate(image_list(ROWS))]
    with torch.no_grad():
        model.classifier.weight[2:] = model.classifier.weight[2]
    before = weights(model)
    trainer = host(tmp_path, ULRL(), model=model, rows=rows)
    with pytest.raises(DegenerateScoreError, match="units='hidden', D3 or plain fine-tuning") as caught:
        trainer.train()
    shown = caught.value.scores
    assert len(shown) == 5 and len(set(shown[2:].tolist())) == 1 and f"{shown[4]:.4g}" in str(caught.value)
    assert same(weights(trainer), before)


# -- which layer ------------------------------------------------------------------------------------------------------
def test_a_head_without_a_bias(tmp_path):
    model = vit()
    model.classifier = torch.nn.Linear(16, 5, bias=False)
    old = model.classifier.weight.detach().clone()
    objective = ULRL(z_threshold=0.1, unlearn_epochs=2)
    trainer = host(tmp_path, objective, model=model, rows=image_list(ROWS), max_steps=1)
    objective.prepare(trainer, checkpoint=None)
    flagged = objective.evidence()["suspected_classes"]
    new = model.classifier.weight.detach()
    assert flagged and bool((new[flagged] != old[flagged]).all())
    assert new[flagged].abs().max().item() <= math.sqrt(2 / 16)
    assert all(torch.equal(new[c], old[c]) for c in range(5) if c not in flagged)


def test_a_head_by_its_dotted_name(tmp_path):
    found = []
    for name in (None, "classifier", "classifier.1"):
        objective = ULRL(head=name, unlearn_epochs=1)
        objective.prepare(host(tmp_path, objective, model=resnet(), rows=image_list(ROWS)), checkpoint=None)
        found.append(objective.evidence())
    assert found[0] == found[1] == found[2] and found[0]["layers"][0]["name"] == "classifier.1"


def test_hidden_units_are_the_pooler_with_the_mean_cosine_and_at_most_a_share(tmp_path):
    objective = ULRL(z_threshold=0.1, hidden_share=0.25, alpha=0.4, unlearn_epochs=2, max_rows=1, rank="index")
    model = bert()
    old = model.bert.pooler.dense.weight.detach().clone()
    before = weights(model)
    trainer = host(tmp_path, objective, model=model, rows=classification_rows(), collator=PadCollator())
    objective.prepare(trainer, checkpoint=None)
    evidence, (layer,) = objective.evidence(), objective.evidence()["layers"]
    scores = np.array(layer["scores"])
    median = np.sort(scores)[7]
    mad = np.sort(np.abs(scores - median))[7]
    assert layer["median"] == pytest.approx(median) and layer["mad"] == pytest.approx(mad)
    beyond = [u for u in scores.argsort()[::-1].tolist() if (scores[u] - median) / (1.4826 * mad) > 0.1]
    assert len(beyond) > 4 and layer["flagged"] == sorted(beyond[:4])
    assert (evidence["units"], layer["name"], evidence["suspected_classes"]) == ("hidden", "bert.pooler.dense", [])
    now = model.bert.pooler.dense.weight.detach()
    others = [u for u in range(16) if u not in layer["flagged"]]
    assert torch.equal(now[others], old[others])
    unchanged = [name for name in before if not name.startswith("bert.pooler")]
    assert all(torch.equal(weights(model)[name], before[name]) for name in unchanged)
    a, b = now[layer["flagged"]].double().numpy(), old[layer["flagged"]].double().numpy()
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert objective.penalties(step_of(model))["cosine"].item() == pytest.approx(0.4 * cosines.mean(), abs=1e-6)


# -- the cosine -------------------------------------------------------------------------------------------------------
def step_of(model):
    return SimpleNamespace(model=model, log=lambda name, value, latest=False: None)


def flagged_by_hand(old, flagged, alpha):
    """A ULRL that has found these rows."""
    objective = ULRL(alpha=alpha)
    zeros = torch.zeros(5)
    objective.load_state_dict({
        "old": old[flagged], "scores": zeros, "z": zeros, "cosine": torch.zeros(()), "flagged": flagged, "accuracies": [],
        "unlearned": 1, "stop": 0.2, "layer": "classifier", "units": "rows",
    })  # fmt: skip
    return objective


def test_the_gradient_of_the_cosine_by_finite_differences():
    model, old = vit().double(), vit(seed=1).classifier.weight.detach().double()
    objective, weight = flagged_by_hand(old, [1, 3], 0.7), model.classifier.weight
    objective.penalties(step_of(model))["cosine"].backward()
    found, width = weight.grad.clone(), 1e-5
    numeric = torch.zeros_like(found)
    with torch.no_grad():
        for row in range(5):
            for column in range(16):
                value = weight[row, column].item()
                ends = []
                for moved in (value + width, value - width):
                    weight[row, column] = moved
                    ends.append(objective.penalties(step_of(model))["cosine"].item())
                weight[row, column] = value
                numeric[row, column] = (ends[0] - ends[1]) / (2 * width)
    assert torch.allclose(found, numeric, atol=1e-8) and bool(found[[1, 3]].all())
    assert not found[[0, 2, 4]].any() and model.classifier.bias.grad is None
    assert (found * weight.detach()).sum(-1).abs().max() < 1e-12  # the norm does not change


def test_alpha_alone_drives_the_rows_to_their_opposite():
    model, old = vit(), vit().classifier.weight.detach().clone()
    with torch.no_grad():
        model.classifier.weight.copy_(vit(seed=1).classifier.weight)
    objective, weight = flagged_by_hand(old, [0, 2], 0.7), model.classifier.weight
    start = weight.detach().clone()
    for _ in range(200):
        weight.grad = None
        objective.penalties(step_of(model))["cosine"].backward()
        with torch.no_grad():
            weight.sub_(0.2 * weight.grad)
    cosines = torch.nn.functional.cosine_similarity(weight.detach()[[0, 2]], old[[0, 2]])
    assert (cosines < -0.999).all() and objective.activity()["ulrl_cosine_mean"] < -0.999
    assert torch.equal(weight.detach()[[1, 3, 4]], start[[1, 3, 4]])
    assert flagged_by_hand(old, [0, 2], 0.0).penalties(step_of(model)) == {}


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    settings = {
        "num_train_epochs": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 2,
        "lr": 0.01,
    }
    fields = {"z_threshold": 0.1, "unlearn_epochs": 3, "stop_accuracy": 0.0, "unlearn_lr": 0.005}
    whole, half = ULRL(**fields), ULRL(**fields)
    through = host(tmp_path / "a", whole, rows=image_list(24), **settings)
    through.train()
    rows = Watched(image_list(24))
    again = host(tmp_path / "b", half, rows=rows, model=vit(seed=5), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(through), weights(again))
    assert half.evidence() == whole.evidence() and half.activity() == pytest.approx(whole.activity())
    assert whole.evidence()["suspected_classes"] and len(rows.asked) <= 48  # two epochs of the host, none of an ascent


# -- refusals ---------------------------------------------------------------------------------------------------------
def partly_frozen():
    model = vit()
    model.vit.embeddings.requires_grad_(False)
    return model


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))


def tied():
    model = bert(labels=50)
    model.classifier.weight = model.bert.embeddings.word_embeddings.weight
    return model


def quantized():
    model = vit()
    model.config.quantization_config = {"load_in_8bit": True}
    return model


@pytest.mark.parametrize(
    "make, fields, message",
    [(bert_mlm, {"head": "cls.predictions.transform.dense"}, "is no sequence or image classifier"),
     (lora, {}, r"merge first"), (partly_frozen, {}, r"frozen \(vit.embeddings"), (tied, {}, "tied to the input embeddings"),
     (lambda: vit().bfloat16(), {}, "bfloat16"), (quantized, {}, "quantized"),
     (vit, {"head": "scores"}, r"no Linear head was found at head='scores' \(Linear modules here: .*classifier\)")],
)  # fmt: skip
def test_what_cannot_be_unlearned_is_refused(make, fields, message):
    (reason,) = ULRL(**fields).check(fake(make()))
    assert re.search(message, reason), reason


@pytest.mark.parametrize(
    "make, fields", [(vit, {}), (lambda: bert(labels=50), {}), (bert, {"units": "hidden"}), (resnet, {"head": "classifier.1"})]
)  # fmt: skip
def test_its_neighbor_is_not(make, fields):
    assert ULRL(**fields).check(fake(make())) == []


@pytest.mark.parametrize(
    "accelerator, changes, message",
    [({}, {"load_best_model_at_end": True}, "the least changed one"),
     ({"fsdp_plugin": SimpleNamespace(cpu_ram_efficient_loading=True)}, {}, "fsdp_cpu_ram_efficient_loading")],
)  # fmt: skip
def test_a_training_that_undoes_it_is_refused(accelerator, changes, message):
    (reason,) = ULRL().check(fake(vit(), accelerator, **changes))
    assert message in reason and ULRL().check(fake(vit(), {"fsdp_plugin": None})) == []


@pytest.mark.parametrize("rows, refused", [(None, True), ([], True), (iter(()), True), (image_list(8), False)])
def test_the_clean_set_has_a_length(rows, refused):
    trainer = fake(vit())
    trainer.train_dataset = rows
    assert [r for r in ULRL().check(trainer) if "Use a Dataset" in r] == ULRL().check(trainer)
    assert bool(ULRL().check(trainer)) == refused


@pytest.mark.parametrize(
    "targets, refused", [("head", True), ("all-linear", True), ("*attention*", False), ("no such", False)]
)
def test_d3_beside_it_must_leave_its_rows_alone(targets, refused):
    trainer = fake(vit())
    trainer.objectives = [D3(targets=targets), ULRL()]
    reasons = ULRL().check(trainer)
    assert len(reasons) == refused and all("classifier.weight" in reason for reason in reasons)


@pytest.mark.parametrize("count, said", [(99, True), (100, False)])
def test_few_clean_rows_are_warned_of(caplog, count, said):
    trainer = fake(vit())
    trainer.train_dataset = image_list(count)
    with caplog.at_level(logging.WARNING):
        assert ULRL().check(trainer) == []
    assert ("fewer than 20 per class" in caplog.text) == said


@pytest.mark.parametrize(
    "fields",
    [{"unlearn_lr": 0.0}, {"unlearn_lr": math.nan}, {"unlearn_clip": 0.0}, {"unlearn_epochs": -1}, {"unlearn_batch_size": 0},
     {"unlearn_momentum": 1.0}, {"unlearn_weight_decay": -0.1}, {"stop_accuracy": 1.0}, {"max_rows": 0}, {"alpha": -0.1},
     {"z_threshold": math.inf}, {"hidden_share": 0.6}, {"hidden_share": 0.0}, {"alpha": math.nan}],
    ids=str,
)  # fmt: skip
def test_fields_that_are_refused(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}`"):
        ULRL(**fields)


def test_no_signature_takes_triggered_or_test_data():
    words = ("trigger", "poison", "test", "attack", "target", "backdoor")
    for function in (ULRL.__init__, ULRL.prepare, ULRL.check, ULRL.penalties):
        assert not [p for p in inspect.signature(function).parameters if any(word in p for word in words)]


def test_the_truth_about_the_rows_changes_nothing(tmp_path):
    found = []
    for truth in (True, False):
        objective = ULRL(unlearn_epochs=1)
        rows = [{**row, "is_poisoned": truth} for row in image_list(ROWS)]
        objective.prepare(host(tmp_path, objective, rows=rows), checkpoint=None)
        found.append(objective.evidence())
    assert found[0] == found[1]
