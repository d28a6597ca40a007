"""ULRL against a loop of its own, written from the formulas: both phases, what is reset, and no trace of the first phase."""

import math
import random

import numpy as np
import pytest
import torch

from hf_backdoor_defense.defenses.ulrl import ULRL
from tests.trainers.image_toys import Watched, host, image_list, resnet, vit
from tests.trainers.toys import same, weights

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
