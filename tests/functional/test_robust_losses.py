"""GCE, in-trust and focal loss, against loops in probability space, limits, and finite differences."""

import math

import numpy as np
import pytest
import torch

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX, cross_entropy
from hf_backdoor_defense.functional.robust_losses import (
    distrust,
    focal_loss,
    focal_pull,
    gce_loss,
    gce_pull,
    in_trust_loss,
)

LOSSES = {
    "gce": gce_loss,
    "gce_1": lambda logits, labels: gce_loss(logits, labels, q=1.0),
    "focal": focal_loss,
    "focal_half": lambda logits, labels: focal_loss(logits, labels, gamma=0.5),
    "focal_1": lambda logits, labels: focal_loss(logits, labels, gamma=1.0),
    "in_trust": in_trust_loss,
    "in_trust_label": lambda logits, labels: in_trust_loss(logits, labels, delta=0.0),
    "in_trust_prediction": lambda logits, labels: in_trust_loss(logits, labels, delta=1.0),
}


def make(shape=(3, 5), classes=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORE_INDEX
    return logits, labels


def loop(logits, labels, value):
    """`value(p, t)` for one labeled position after the other."""
    values = []
    for row, t in zip(logits.numpy().reshape(-1, logits.shape[-1]), labels.numpy().ravel(), strict=True):
        if t != -100:
            p = np.exp(row - row.max())
            values.append(value(p / p.sum(), t))
    return torch.tensor(values, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 1.0])
def test_gce_is_the_loop(q):
    logits, labels = make()
    close(gce_loss(logits, labels, q=q), loop(logits, labels, lambda p, t: (1 - p[t] ** q) / q))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_loop(gamma):
    logits, labels = make()
    close(
        focal_loss(logits, labels, gamma=gamma),
        loop(logits, labels, lambda p, t: -((1 - p[t]) ** gamma) * np.log(p[t])),
    )


@pytest.mark.parametrize(("delta", "floor"), [(0.5, 1e-4), (0.25, 1e-2), (0.0, 1e-4), (1.0, 1e-4)])
def test_in_trust_is_the_loop_with_its_clamped_label(delta, floor):
    logits, labels = make()

    def value(p, t):
        hard = np.zeros(len(p))
        hard[t] = 1.0
        mixed = delta * p + (1 - delta) * np.clip(hard, floor, 1.0)
        return -0.3 * np.log(p[t]) - 0.6 * sum(p[k] * np.log(mixed[k]) for k in range(len(p)))

    ours = in_trust_loss(logits, labels, alpha=0.3, beta=0.6, delta=delta, label_floor=floor)
    close(ours, loop(logits, labels, value))


def test_the_ends_are_the_losses_between_which_they_lie():
    logits, labels = make()
    plain = cross_entropy(logits, labels)
    close(gce_loss(logits, labels, q=0.0), plain)
    torch.testing.assert_close(gce_loss(logits, labels, q=1e-9), plain, rtol=1e-7, atol=0)
    close(gce_loss(logits, labels, q=1.0), loop(logits, labels, lambda p, t: 1 - p[t]))
    close(focal_loss(logits, labels, gamma=0.0), plain)
    close(in_trust_loss(logits, labels, alpha=1.0, beta=0.0), plain)
    # delta = 1 drops the label: what is left is the prediction's entropy.
    close(distrust(logits, labels, delta=1.0), loop(logits, labels, lambda p, t: -(p * np.log(p)).sum()))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name):
    logits, labels = make(shape=(4,), classes=5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, labels), (logits,))


@pytest.mark.parametrize("hyper", [0.0, 0.5, 1.0, 2.0])
def test_the_pull_is_the_gradient_over_cross_entropys(hyper):
    logits, labels = make(shape=(40,))
    logits.requires_grad_()
    plain = cross_entropy(logits, labels)
    (base,) = torch.autograd.grad(plain.sum(), logits, retain_graph=True)
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    cases = [(lambda: focal_loss(logits, labels, gamma=hyper), focal_pull(-plain.detach(), gamma=hyper))]
    if hyper <= 1:
        cases.append((lambda: gce_loss(logits, labels, q=hyper), gce_pull(-plain.detach(), q=hyper)))
    for loss, pull in cases:
        (grad,) = torch.autograd.grad(loss().sum(), logits)
        close(grad[rows], pull.unsqueeze(1) * base[rows])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_finite_at_extreme_logits(name, dtype):
    # One class per column; the label is certain, hopeless, tied with another, and one of all alike.
    logits = torch.tensor(
        [[200.0, -200.0, -200.0], [-200.0, 200.0, -200.0], [200.0, 200.0, -200.0], [0.0, 0.0, 0.0]], dtype=dtype
    ).requires_grad_()
    values = LOSSES[name](logits, torch.zeros(4, dtype=torch.long))
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(logits.grad).all()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        logits.grad.float().sum(-1), torch.zeros(4), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_lifted_before_anything_else(name):
    logits, labels = make(dtype=torch.bfloat16, classes=33)
    torch.testing.assert_close(LOSSES[name](logits, labels), LOSSES[name](logits.float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_rows_leave_no_trace(name):
    logits, labels = make(dtype=torch.float32)
    spoiled = logits.clone()
    spoiled[labels == IGNORE_INDEX] = math.nan
    spoiled.requires_grad_()
    values = LOSSES[name](spoiled, labels)
    kept = labels != IGNORE_INDEX
    torch.testing.assert_close(values, LOSSES[name](logits[kept], labels[kept]), rtol=0, atol=0)
    values.sum().backward()
    assert torch.isfinite(spoiled.grad).all() and not spoiled.grad[~kept].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 3)])
def test_nothing_to_learn_is_an_empty_result_with_a_graph(name, shape):
    logits = torch.zeros(*shape, 4, requires_grad=True)
    values = LOSSES[name](logits, torch.full(shape, IGNORE_INDEX))
    assert values.shape == (0,)
    values.sum().backward()
    assert not logits.grad.any()


def test_a_surprising_label_pulls_less_in_gce_and_more_in_focal_loss():
    logps = torch.tensor([0.001, 0.05, 0.5, 0.99], dtype=torch.float64).log()
    assert (gce_pull(logps).diff() > 0).all()
    assert (focal_pull(logps)[0] > 0.99) and (focal_pull(logps)[1:].diff() < 0).all()


@pytest.mark.parametrize(
    ("loss", "bad"),
    [
        (gce_loss, {"q": -0.1}),
        (gce_loss, {"q": 1.5}),
        (gce_loss, {"q": math.nan}),
        (focal_loss, {"gamma": -1.0}),
        (focal_loss, {"gamma": math.nan}),
        (in_trust_loss, {"alpha": -1.0}),
        (in_trust_loss, {"beta": math.inf}),
        (in_trust_loss, {"delta": 1.1}),
        (in_trust_loss, {"label_floor": 0.0}),
    ],
)
def test_values_out_of_range_are_named(loss, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
        loss(*make(), **bad)
