"""D3 against a loop of its own, written from the formulas: loss, trajectory, spheres, selection, refusals, resume."""

import copy
import dataclasses
import inspect
import json
import logging
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTForImageClassification,
)

from hf_backdoor_defense.defenses.d3 import D3, select_weights
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.trainers.state import load_objective
from tests.trainers.image_toys import LABELS, Watched, fake, host, image_list, image_rows, resnet, vit
from tests.trainers.toys import arguments, bert, same, weights


def d3(**fields):
    """The authors' settings, whatever the defaults are."""
    return D3.preset("official_code", **fields)


# -- the loss ---------------------------------------------------------------------------------------------------------
def batch(rows=7, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def step_of(logits, labels):
    return Step(
        model=None, inputs={}, labels=labels, row_ids=None, epoch=0.0, global_step=0, training=True, logits=logits
    )


def rows_by_numpy(logits, labels):
    z = logits.double().numpy()
    z = z - z.max(-1, keepdims=True)
    return np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), labels.numpy()]


@pytest.mark.parametrize("eps", [0.1, 1.0, 50.0])
@pytest.mark.parametrize(
    "lam, rescale, factor",
    [(0.5, True, 0.5), (1.0, True, 1.0), (5.0, True, 5 / 6), (5.0, False, 5.0), (0.5, False, 0.5)],
)
def test_the_loss_is_the_formula(lam, rescale, factor, eps):
    logits, labels = batch()
    ce = rows_by_numpy(logits, labels)
    means = {}
    for hinge, expected in (("sample", np.maximum(ce - eps, 0).mean()), ("batch", max(ce.mean() - eps, 0.0))):
        values = d3(lam=lam, rescale=rescale, eps=eps, hinge=hinge).loss(step_of(logits, labels))
        assert values.shape == (7,)
        means[hinge] = values.mean().item()
        assert means[hinge] == pytest.approx(factor * expected, rel=1e-5, abs=1e-7)
    assert means["sample"] >= means["batch"] - 1e-7


@pytest.mark.parametrize("eps", [0.1, 50.0])
def test_the_gradient_of_the_hinge_on_the_mean(eps):
    logits, labels = batch()
    logits.requires_grad_()
    d3(lam=1.0, eps=eps, hinge="batch").loss(step_of(logits, labels)).mean().backward()
    found, logits.grad = logits.grad, None
    torch.relu(torch.nn.functional.cross_entropy(logits, labels) - eps).backward()
    assert torch.allclose(found, logits.grad, atol=1e-7) and bool(found.any()) == (eps < 1)


def test_positions_without_a_label_do_not_count():
    logits, labels = batch()
    labels[[0, 3]] = -100
    assert d3().loss(step_of(logits, labels)).shape == (5,)


# -- the trajectory, by a loop of its own -----------------------------------------------------------------------------
def by_hand(model, batches, *, names, lr, momentum=0.9, lam=0.5, eps=0.1, hinge="sample", rescale=True, warm_up="random",
            seed=0, rates=None):  # fmt: skip
    """Section 3 of the method, with the distance in the graph. Returns distance by radius, weight by weight and step by step."""
    divisor = 1 + lam if rescale and lam > 1 else 1
    parameters = dict(model.named_parameters())
    start = {name: parameters[name].detach().clone() for name in names}
    with torch.no_grad():
        for i, name in enumerate(names):
            generator, weight = torch.Generator().manual_seed(seed + i), parameters[name]
            if warm_up == "random":
                drawn = torch.empty(weight.shape).uniform_(-0.5, 0.5, generator=generator)
                weight.copy_(drawn / drawn.square().sum().sqrt() * start[name].square().sum().sqrt())
            elif warm_up == "noise":
                drawn = torch.empty(weight.shape).normal_(generator=generator)
                weight.copy_(start[name] + start[name].numpy().std(ddof=1).item() * drawn)
            elif warm_up == "far":
                weight.copy_(-start[name])
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    ratios = []
    model.train()
    for index, inputs in enumerate(batches):
        logits = model(pixel_values=inputs["pixel_values"]).logits
        ce = logits.logsumexp(-1) - logits.gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)
        hinged = (ce - eps).relu().mean() if hinge == "sample" else (ce.mean() - eps).relu()
        distance = sum((parameters[name] - start[name]).norm() for name in names)
        loss = (lam * hinged - distance) / divisor
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        rate = lr if rates is None else rates[index]
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    velocity[name] = momentum * velocity[name] + gradient
                    parameter.sub_(rate * velocity[name])
            for name in names:
                parameters[name].mul_(start[name].norm() / parameters[name].norm())
            ratios.append([((parameters[n] - start[n]).norm() / start[n].norm()).item() for n in names])
    return ratios


HEAD = ["classifier.weight"]


@pytest.mark.parametrize(
    "lr, fields",
    [
        (0.05, {}),
        (0.05, {"lam": 5.0, "warm_up": "noise"}),
        (0.005, {"lam": 10.0, "hinge": "batch", "rescale": False, "warm_up": "noise"}),
        (0.05, {"eps": 2.0, "warm_up": "noise", "targets": "all-linear"}),
        (0.05, {"lam": 1.0, "warm_up": "far", "targets": ["classifier"]}),
    ],
    ids=str,
)
def test_five_updates_equal_a_loop_of_its_own(tmp_path, lr, fields):
    rows, objective = Watched(image_list(16)), d3(**fields)
    trainer = host(tmp_path, objective, rows=rows, lr=lr, max_steps=5, per_device_train_batch_size=6, seed=3)
    trainer.train()
    batches = rows.batches(6)[:5]
    assert [len(b["labels"]) for b in batches] == [6, 6, 4, 6, 6]
    model = vit()
    names = HEAD
    if fields.get("targets") == "all-linear":
        names = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        assert len(names) == 7
    options = {key: value for key, value in fields.items() if key != "targets"}
    ratios = by_hand(model, batches, names=names, lr=lr, seed=3, **options)
    assert same(weights(trainer), weights(model), atol=1e-6)
    assert not same(weights(model), weights(vit()), atol=1e-3)
    activity = objective.activity()
    assert activity["d3_updates"] == 5
    assert activity["d3_distance_mean"] == pytest.approx(np.mean(ratios[-1]), abs=1e-5)
    assert activity["d3_distance_max"] == pytest.approx(max(ratios[-1]), abs=1e-5)
    layers = objective.evidence()["layers"]
    assert [layer["name"] for layer in layers] == names
    for layer, ratio in zip(layers, ratios[-1], strict=True):
        start = vit().state_dict()[layer["name"]].norm().item()
        assert layer["radius"] == pytest.approx(start, rel=1e-6)
        assert layer["ratio"] == pytest.approx(ratio, abs=1e-5)
        assert layer["distance"] == pytest.approx(ratio * start, abs=1e-5)
    json.dumps(objective.evidence())


@dataclasses.dataclass(kw_only=True, eq=False)
class InTheGraph(Objective):
    """The distance as a penalty that autograd differentiates, at the same start."""

    name = "in_the_graph"

    def prepare(self, trainer, *, checkpoint):
        self.weight = trainer.model.classifier.weight
        self.start = self.weight.detach().clone()
        drawn = torch.rand(self.weight.shape, generator=torch.Generator().manual_seed(trainer.args.seed)) - 0.5
        with torch.no_grad():
            self.weight.copy_(drawn * (self.start.norm() / drawn.norm()))

    def loss(self, step):
        return 0.5 * (super().loss(step) - 0.1).relu()

    def penalties(self, step):
        return {"distance": -(self.weight - self.start).norm()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.weight.mul_(self.start.norm() / self.weight.norm())


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_injecting_equals_autograd_for_any_accumulation(tmp_path, accumulation):
    ends = []
    for objective in (d3(), InTheGraph()):
        trainer = host(
            tmp_path / objective.name, objective, num_train_epochs=2, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
        )  # fmt: skip
        trainer.train()
        ends.append(weights(trainer))
    assert same(*ends, atol=1e-6) and not same(ends[0], weights(vit()), atol=1e-3)


def test_clipping_does_not_reach_the_distance(tmp_path):
    """With the hinge out of reach the gradient is the distance's alone, of norm 1: a clip at 1e-3 must not touch it."""
    ends = []
    for clip in (0.0, 1e-3):
        trainer = host(tmp_path / str(clip), d3(eps=100.0), max_grad_norm=clip)
        trainer.train()
        ends.append(weights(trainer))
    assert same(*ends)


# -- spheres ----------------------------------------------------------------------------------------------------------
class Norms(Objective):
    """Ratio of the norms to the old ones, in float64, after every update."""

    name = "norms"

    def __init__(self, names):
        super().__init__()
        self.names, self.seen = names, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        old = vit().state_dict()
        self.radii = {name: old[name].double().norm() for name in self.names}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = dict(model.named_parameters())
        self.seen += [abs((now[name].double().norm() / r).item() - 1) for name, r in self.radii.items()]


def test_after_every_update_the_weights_are_on_their_spheres(tmp_path):
    names = list(select_weights(vit(), "all-linear"))
    norms = Norms(names)
    host(tmp_path, [d3(targets="all-linear", warm_up="noise"), norms], num_train_epochs=2).train()
    assert len(norms.seen) == 6 * len(names) and max(norms.seen) <= 1e-6


def test_the_projection_touches_nothing_else(tmp_path):
    objective = d3()
    trainer = host(tmp_path, objective, max_steps=1)
    trainer.train()
    before = weights(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)
    objective.on_optimizer_step(None, None, None, model=trainer.model)
    for name, value in weights(trainer).items():
        if name == "classifier.weight":
            assert torch.allclose(value, before[name], atol=1e-6)
        else:
            assert torch.equal(value, 1.5 * before[name])


def test_a_shrunken_weight_comes_back_onto_the_sphere_too(tmp_path):
    objective = d3()
    trainer = host(tmp_path, objective, max_steps=1)
    trainer.train()
    with torch.no_grad():
        trainer.model.classifier.weight.mul_(1e-3)
    objective.on_optimizer_step(None, None, None, model=trainer.model)
    assert trainer.model.classifier.weight.norm().item() == pytest.approx(
        vit().classifier.weight.norm().item(), rel=1e-6
    )


def test_without_the_hinge_the_weights_reach_their_opposite(tmp_path):
    objective = d3(lam=0.0)
    trainer = host(tmp_path, objective, max_steps=60, lr=0.1)
    trainer.train()
    start = vit().state_dict()
    assert objective.activity()["d3_distance_max"] / 2 >= 0.999
    assert torch.allclose(trainer.model.classifier.weight, -start["classifier.weight"], atol=0.1)
    others = [name for name in start if name != "classifier.weight"]
    assert all(torch.equal(weights(trainer)[name], start[name]) for name in others)


@pytest.mark.parametrize("warm_up, ratio", [("far", 2.0), ("random", None), ("noise", None)])
def test_where_the_warm_up_starts(tmp_path, warm_up, ratio):
    starts = []
    for seed in (0, 0, 1):
        objective = d3(warm_up=warm_up)
        trainer = host(tmp_path, objective, seed=seed)
        before = torch.get_rng_state()
        objective.prepare(trainer, checkpoint=None)
        assert torch.equal(torch.get_rng_state(), before)
        now, old = trainer.model.classifier.weight.detach(), vit().classifier.weight.detach()
        starts.append(now.clone())
        if warm_up != "noise":
            assert now.norm().item() == pytest.approx(old.norm().item(), rel=1e-6)
        if ratio:
            assert ((now - old).norm() / old.norm()).item() == pytest.approx(ratio, rel=1e-6)
        untouched = {n: v for n, v in weights(trainer).items() if n != "classifier.weight"}
        assert same(untouched, {n: v for n, v in vit().state_dict().items() if n != "classifier.weight"})
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2]) == (warm_up == "far")  # the seed of the run decides


def test_weights_of_equal_shape_start_in_different_directions(tmp_path):
    objective = d3(warm_up="noise", targets="all-linear")
    trainer = host(tmp_path, objective)
    objective.prepare(trainer, checkpoint=None)
    old, new = vit().state_dict(), weights(trainer)
    moved = [
        (new[n] - old[n]) / old[n].std()
        for n in select_weights(trainer.model, "all-linear")
        if old[n].shape == (16, 16)
    ]
    assert len(moved) >= 4
    assert all(not torch.allclose(a, b, atol=0.1) for i, a in enumerate(moved) for b in moved[:i])


def test_near_with_a_low_loss_changes_nothing_and_says_so(tmp_path, caplog):
    objective = d3(warm_up="near", eps=100.0)
    trainer = host(tmp_path, objective)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert same(weights(trainer), weights(vit()))
    assert "warm_up='near'" in caplog.text and "did not move" in caplog.text
    assert "where they were" in objective.inert()
    assert objective.activity()["d3_distance_max"] == 0 and objective.activity()["d3_hinge_active"] == 0
    acting = d3(eps=100.0)
    host(tmp_path, acting).train()
    assert acting.inert() is None
    assert d3().inert()  # it never ran


ROWS = [[(7, 1), (2, 2)], [(5, 3), (1, 4)], [(6, 5)], [(3, 6), (4, 7)]]  # (rows, seed) of batches that a process sees


def active_by_numpy(parts, eps):
    values = np.concatenate([rows_by_numpy(*batch(n, seed=seed)) for part in parts for n, seed in part])
    return (values > eps).mean()


def see(objective, part):
    for n, seed in part:
        objective.loss(step_of(*batch(n, seed=seed)))


def test_the_share_of_active_rows_weighs_short_batches_by_their_rows():
    objective = d3(eps=1.0)
    see(objective, ROWS[0] + ROWS[1])
    assert objective.activity()["d3_hinge_active"] == active_by_numpy(ROWS[:2], 1.0)


def test_after_a_resume_with_two_processes_every_row_is_counted_once(monkeypatch):
    """Two objects play the processes: each call is made by both, first to hear what both have to tell."""
    module, model, run = "hf_backdoor_defense.defenses.d3", vit(), SimpleNamespace(global_step=0)

    def on_both(ranks, call):
        told = []
        monkeypatch.setattr(f"{module}.everywhere", lambda mine: told.append(mine) or [mine])
        for objective in copy.deepcopy(ranks):
            call(objective)
        monkeypatch.setattr(f"{module}.everywhere", lambda mine: told)
        return [call(objective) for objective in ranks]

    def train(ranks, parts, checkpoint):
        for rank, (objective, part) in enumerate(zip(ranks, parts, strict=True)):
            monkeypatch.setattr(f"{module}.is_first_process", lambda rank=rank: rank == 0)
            objective.prepare(fake(vit()), checkpoint=checkpoint)
            objective.on_train_begin(None, run, None, model=model)
            see(objective, part)

    before, after = [d3(eps=1.0), d3(eps=1.0)], [d3(eps=1.0), d3(eps=1.0)]
    train(before, ROWS[:2], None)
    saved, _ = on_both(before, lambda objective: objective.state_dict())
    for objective in after:
        objective.load_state_dict(saved)
        assert objective.activity()["d3_hinge_active"] == active_by_numpy(ROWS[:2], 1.0)
    train(after, ROWS[2:], "checkpoint-1")
    on_both(after, lambda objective: objective.on_train_end(None, run, None, model=model))
    expected = active_by_numpy(ROWS, 1.0)
    assert 0 < expected < 1 and [o.activity()["d3_hinge_active"] for o in after] == [expected] * 2
    monkeypatch.delattr(f"{module}.everywhere")  # a finished one talks to nobody
    assert after[0].state_dict()["active"] == after[1].state_dict()["active"]


def test_the_log_carries_the_distance(tmp_path):
    trainer = host(tmp_path, d3(eps=0.0), logging_strategy="steps", logging_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all("d3/hinge_active" in entry for entry in logs)
    assert logs[-1]["d3/hinge_active"] == 1.0  # no cross-entropy is 0
    assert 0 < logs[-1]["d3/distance"] <= 2


def test_evaluation_reports_plain_cross_entropy(tmp_path):
    trainer = host(tmp_path, d3(lam=5.0, eps=100.0))
    rows = image_rows(8)
    inputs = torch.tensor(rows["pixel_values"])
    expected = torch.nn.functional.cross_entropy(vit().eval()(inputs).logits, torch.tensor(rows["label"]))
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_autocast_keeps_float32_weights_on_the_sphere(tmp_path):
    objective = d3()
    trainer = host(tmp_path, objective, bf16=True, max_steps=2)
    trainer.train()
    weight = trainer.model.classifier.weight
    assert weight.dtype == torch.float32 and objective.inert() is None
    assert weight.norm().item() == pytest.approx(vit().classifier.weight.norm().item(), rel=1e-6)


# -- selection --------------------------------------------------------------------------------------------------------
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 40, "num_labels": 3}  # fmt: skip


def distilbert():
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=3)
    return DistilBertForSequenceClassification(config)


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SMALL))


def gpt2_classifier():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def llama_classifier():
    return LlamaForSequenceClassification(LlamaConfig(**SMALL, tie_word_embeddings=True, pad_token_id=0))


HEADS = {
    vit: ["classifier.weight"],
    resnet: ["classifier.1.weight"],
    bert: ["classifier.weight"],
    distilbert: ["classifier.weight"],
    roberta: ["classifier.dense.weight", "classifier.out_proj.weight"],
    gpt2_classifier: ["score.weight"],
    llama_classifier: ["score.weight"],
}
# Weight matrices by their sizes [out, in]; the embeddings of words, positions and patches are not among them.
BLOCK = [(16, 16)] * 4 + [(24, 16), (16, 24)]
LINEAR = {
    vit: [*BLOCK, (LABELS, 16)],
    bert: [*[(16, 16)] * 8, *[(32, 16), (16, 32)] * 2, (16, 16), (3, 16)],  # two layers, pooler, head
    distilbert: [*BLOCK, (16, 16), (3, 16)],
    roberta: [*BLOCK, (16, 16), (3, 16)],
    gpt2_classifier: [(16, 48), (16, 16), (16, 64), (64, 16), (3, 16)],  # Conv1D holds [in, out]
    llama_classifier: [*BLOCK, (24, 16), (3, 16)],
}


@pytest.mark.parametrize("make", HEADS)
def test_the_head(make):
    model = make()
    selected = select_weights(model, "head")
    assert list(selected) == HEADS[make]
    parameters = dict(model.named_parameters())
    assert all(weight is parameters[name] for name, weight in selected.items())


@pytest.mark.parametrize("make", LINEAR)
def test_all_linear(make):
    selected = select_weights(make(), "all-linear")
    assert sorted(tuple(w.shape) for w in selected.values()) == sorted(LINEAR[make])
    assert all(name.endswith(".weight") and "embed" not in name and "norm" not in name for name in selected)


def test_convolutions_count_and_the_normalizations_between_them_do_not():
    model = resnet()
    convolutions = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert set(select_weights(model, "all-linear")) == convolutions | {"classifier.1.weight"}


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("classifier", ["classifier.weight"]),
        (["classifier", "bert.pooler.dense"], ["bert.pooler.dense.weight", "classifier.weight"]),
        ("*intermediate*", [f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in range(2)]),
        ("bert.encoder.layer.1.output", ["bert.encoder.layer.1.output.dense.weight"]),
        (["*.layer.0.attention.self.*"], [f"bert.encoder.layer.0.attention.self.{k}.weight" for k in ("query", "key", "value")]),
    ],
)  # fmt: skip
def test_names_and_patterns(targets, expected):
    assert list(select_weights(bert(), targets)) == expected  # in the model's order, once each


@pytest.mark.parametrize("targets", ["clasifier", [], ["bert.encoder.layer.9"], "bert.embeddings"])
def test_an_empty_selection_lists_what_there_is(targets):
    with pytest.raises(ValueError, match=r"no weight matches.*bert\.encoder\.layer\.0\.attention"):
        select_weights(bert(), targets)


def test_the_tied_output_of_a_language_model_is_left_out():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    assert sorted(tuple(w.shape) for w in select_weights(model, "all-linear").values()) == sorted([*BLOCK, (24, 16)])
    with pytest.raises(ValueError, match="no weight matches"):
        select_weights(model, "head")
    untied = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    assert "lm_head.weight" in select_weights(untied, "all-linear")


def lora(rank=2, saved=("classifier",)):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=["query"], modules_to_save=list(saved))
    return get_peft_model(bert(), config)


def test_of_a_head_that_peft_trains_the_copy_is_taken(tmp_path):
    model = lora()
    name = "base_model.model.classifier.modules_to_save.default.weight"
    assert list(select_weights(model, "head")) == [name]
    assert d3().check(fake(model)) == []
    frozen = model.base_model.model.classifier.original_module.weight.detach().clone()
    from tests.trainers.toys import PadCollator, classification_rows

    objective = d3()
    host(tmp_path, objective, model=model, rows=classification_rows(), collator=PadCollator()).train()
    assert objective.inert() is None and [layer["name"] for layer in objective.evidence()["layers"]] == [name]
    assert torch.equal(model.base_model.model.classifier.original_module.weight, frozen)


# -- refusals ---------------------------------------------------------------------------------------------------------
def frozen_head():
    model = vit()
    model.classifier.requires_grad_(False)
    return model


def quantized():
    model = vit()
    model.config.quantization_config = {"load_in_8bit": True}
    return model


REFUSED = {
    "no tensor": (lambda: (vit(), {"targets": ["score"]}), "no weight matches.*attention"),
    "frozen": (lambda: (frozen_head(), {}), r"frozen \(classifier.weight\)"),
    "quantized": (lambda: (quantized(), {}), "quantized"),
    "bf16": (lambda: (vit().bfloat16(), {}), "dtype=float32"),
    "half": (lambda: (vit().half(), {}), "dtype=float32"),
    "random everywhere": (lambda: (vit(), {"targets": "all-linear"}), "warm_up='noise'"),
    "adapter": (lambda: (lora(saved=()), {"targets": "*query*"}), "merge first"),
    "adapter below": (lambda: (lora(), {"targets": "all-linear", "warm_up": "noise"}), "merge"),
    "tied": (
        lambda: (LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)), {"targets": "lm_head"}),
        "tied to",
    ),
}
ACCEPTED = {
    "a tensor": (vit, {"targets": ["classifier"]}),
    "frozen elsewhere": (lambda: vit().requires_grad_(False).train(), {}),
    "float64": (lambda: vit().double(), {}),
    "noise everywhere": (vit, {"targets": "all-linear", "warm_up": "noise"}),
    "random by name": (vit, {"targets": ["*attention*"]}),
    "adapter with a head": (lora, {}),
    "tied elsewhere": (llama_classifier, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_moved_is_refused(case):
    model, fields = REFUSED[case][0]()
    reasons = d3(**fields).check(fake(model))
    assert len([reason for reason in reasons if re.search(REFUSED[case][1], reason)]) == 1, reasons


@pytest.mark.parametrize("case", ACCEPTED)
def test_its_neighbor_is_not(case):
    make, fields = ACCEPTED[case]
    model = make()
    for weight in select_weights(model, d3(**fields).targets).values():
        weight.requires_grad_(True)
    assert d3(**fields).check(fake(model)) == []


@pytest.mark.parametrize(
    "accelerator, changes, fields, message",
    [
        ({}, {"weight_decay": 0.01}, {}, r"weight_decay is 0.01.*Set weight_decay=0"),
        ({}, {"load_best_model_at_end": True}, {}, "load_best_model_at_end.*least moved"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=1)}, {}, {}, "DeepSpeed.*Use DDP or FSDP2"),
        ({"fsdp_plugin": SimpleNamespace(cpu_ram_efficient_loading=True)}, {}, {}, "fsdp_cpu_ram_efficient_loading"),
        ({}, {"gradient_accumulation_steps": 2}, {"hinge": "batch"}, "not additive; use hinge='sample'"),
        ({}, {"world_size": 2}, {"hinge": "batch"}, "not additive; use hinge='sample'"),
    ],
)
def test_a_training_that_holds_it_back_is_refused(accelerator, changes, fields, message):
    (reason,) = d3(**fields).check(fake(vit(), accelerator, **changes))
    assert re.search(message, reason), reason
    assert d3(**fields).check(fake(vit())) == []


@pytest.mark.parametrize("decay, refused", [(0.01, True), (0.0, False)])
def test_the_decay_of_a_given_optimizer_counts(decay, refused):
    trainer = fake(vit())
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1, weight_decay=decay)
    assert [reason for reason in d3().check(trainer) if "weight_decay is 0.01" in reason] == d3().check(trainer)
    assert bool(d3().check(trainer)) == refused


def test_additive_hinges_take_accumulation_and_processes():
    assert d3().check(fake(vit(), gradient_accumulation_steps=4, world_size=2)) == []
    plugin = {"fsdp_plugin": SimpleNamespace(cpu_ram_efficient_loading=False)}
    assert d3().check(fake(vit(), plugin)) == []


def test_all_reasons_come_together_and_before_anything_is_changed(tmp_path):
    trainer = host(tmp_path, d3(targets="all-linear", hinge="batch"), weight_decay=0.1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError) as caught:
        trainer.train()
    assert all(f"d3: {word}" in str(caught.value) for word in ("weight_decay", "warm_up='random'", "hinge='batch'"))
    assert trainer.state.global_step == 0 and same(weights(trainer), weights(vit()))
    assert not any(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "fields, changes, words",
    [({"warm_up": "near"}, {}, "warm_up='near'"), ({}, {"optim": "adamw_torch"}, "loses its meaning"),
     ({}, {"max_grad_norm": 1.0}, "clips the hinge")],
)  # fmt: skip
def test_what_is_unusual_is_said(caplog, fields, changes, words):
    with caplog.at_level(logging.WARNING):
        assert d3().check(fake(vit())) == []
        assert not caplog.text
        assert d3(**fields).check(fake(vit(), **changes)) == []
    assert words in caplog.text


def test_what_is_moved_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        d3().prepare(host(tmp_path, None), checkpoint=None)
    assert "classifier.weight" in caplog.text


@pytest.mark.parametrize(
    "fields, field",
    [({"lam": -0.5}, "lam"), ({"lam": math.inf}, "lam"), ({"lam": math.nan}, "lam"), ({"eps": -0.1}, "eps"),
     ({"eps": math.nan}, "eps"), ({"targets": ""}, "targets"), ({"targets": []}, "targets")],
)  # fmt: skip
def test_fields_that_are_refused(fields, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        D3(**fields)
    assert D3(lam=0.0, eps=0.0).field_reasons() == []


@pytest.mark.parametrize("field, value", [("hinge", "mean"), ("warm_up", "middle"), ("norm", 1)])
def test_values_that_are_not_offered(field, value):
    with pytest.raises(ValueError, match=field):
        D3.from_dict({field: value})


def test_presets():
    code = D3.preset("official_code").to_dict()
    assert code == {
        "name": "d3",
        "lam": 0.5,
        "eps": 0.1,
        "hinge": "sample",
        "rescale": True,
        "warm_up": "random",
        "targets": "head",
    }
    with pytest.raises(ValueError, match="warm_up"):
        D3.preset("paper")
    paper = D3.preset("paper", warm_up="noise")
    assert (paper.lam, paper.eps, paper.hinge, paper.rescale, paper.warm_up) == (10.0, 0.1, "batch", False, "noise")
    with pytest.raises(ValueError, match="no preset"):
        D3.preset("far")


# -- resume, state, leaks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{}, {"targets": "all-linear", "warm_up": "noise"}], ids=["head", "all-linear"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, fields):
    settings = {"num_train_epochs": 2, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 2}
    whole, half = d3(**fields), d3(**fields)
    through = host(tmp_path / "a", whole, **settings)
    through.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    start = vit().state_dict()
    saved = load_file(checkpoint / "defense.safetensors")
    names = list(select_weights(vit(), whole.targets))
    assert {key.removeprefix("d3.W0.") for key in saved} == set(names)
    assert all(torch.equal(saved[f"d3.W0.{name}"], start[name]) for name in names)
    again = host(tmp_path / "b", half, model=vit(seed=5), **settings)  # the checkpoint's weights count, not these
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(through), weights(again))
    assert half.activity() == pytest.approx(whole.activity()) and half.activity()["d3_updates"] == 6
    end = load_objective(D3, tmp_path / "b" / "checkpoint-6").state_dict()
    assert all(torch.equal(end[f"W0.{name}"], start[name]) for name in names)


def test_the_old_weights_are_in_checkpoints_and_not_beside_the_result(tmp_path):
    trainer = host(tmp_path, d3(), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    kept = [
        set(load_file(tmp_path / where / "defense.safetensors")) for where in ("checkpoint-1", "checkpoint-2", "final")
    ]
    assert kept == [{"d3.W0.classifier.weight"}, {"d3.W0.classifier.weight"}, set()]
    again = load_objective(D3, tmp_path / "final")
    assert again.evidence() == trainer.objectives[0].evidence() and len(again.evidence()["layers"]) == 1


def test_the_last_step_is_the_result(tmp_path):
    """No choice among checkpoints: what is saved are the weights of the last update."""
    trainer = host(tmp_path, d3())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert same(weights(ViTForImageClassification.from_pretrained(tmp_path / "final")), weights(trainer))


def test_no_signature_takes_triggered_or_test_data():
    words = ("trigger", "poison", "test", "attack", "target_class", "backdoor")
    for function in (D3.__init__, D3.prepare, D3.check, D3.loss, D3.penalties, select_weights):
        assert not [p for p in inspect.signature(function).parameters if any(word in p for word in words)]


def test_the_truth_about_the_rows_changes_nothing(tmp_path):
    ends = []
    for truth in (True, False, None):
        rows = image_rows() if truth is None else image_rows().add_column("is_poisoned", [truth] * 24)
        trainer = host(tmp_path / str(truth), d3(), rows=rows)
        trainer.train()
        ends.append(weights(trainer))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_the_trainer_of_its_name(tmp_path):
    from hf_backdoor_defense import D3Trainer
    from tests.trainers.image_toys import stack

    trainer = D3Trainer(vit(), args=arguments(tmp_path, max_steps=1), train_dataset=image_rows(), data_collator=stack)
    assert trainer.objectives == [D3()]
    named = D3Trainer(
        vit(),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=image_rows(),
        data_collator=stack,
        defense=d3(eps=0.3),
    )
    named.train()
    assert named.objectives[0].eps == 0.3 and named.objectives[0].inert() is None
