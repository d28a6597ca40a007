"""Inconsistency of layers against a numpy loop and a closed-form gradient; the step along the gradient's sign."""

import math

import numpy as np
import pytest
import torch

from hf_backdoor_defense.functional.consistency import fgsm_sign, layer_inconsistency


def drawn(layers, shape=(3, 5, 7), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(layers + 1)]


def by_loop(states, mask, first, last):
    """C of every row, position by position: pairs first .. last - 1."""
    found = []
    for b in range(len(states[0])):
        layers = []
        for low in range(first, last):
            total, count = 0.0, 0
            for t in range(states[0].shape[1]):
                if mask[b, t]:
                    x, y = (states[i][b, t].double().numpy() for i in (low, low + 1))
                    total += 1 - float(np.dot(x, y)) / math.sqrt(float(np.dot(x, x)) * float(np.dot(y, y)))
                    count += 1
            layers.append(total / max(count, 1))
        found.append(sum(layers) / len(layers))
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("layers", [3, 4, 7])
def test_it_is_the_mean_over_pairs_and_tokens(layers, dtype, tolerance):
    states = drawn(layers, dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    found = layer_inconsistency(states, mask)
    assert found.shape == (3,) and found.dtype == dtype
    assert found.tolist() == pytest.approx(by_loop(states, mask, 1, layers - 1), abs=tolerance)
    whole = layer_inconsistency(states, mask, include_last=True)
    assert whole.tolist() == pytest.approx(by_loop(states, mask, 1, layers), abs=tolerance)


def test_three_layers_are_one_pair_and_the_last_adds_exactly_one():
    states, everywhere = drawn(3, shape=(2, 1, 4)), torch.ones(2, 1)
    first, second = by_loop(states, everywhere, 1, 2), by_loop(states, everywhere, 2, 3)
    assert layer_inconsistency(states).tolist() == pytest.approx(first)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert layer_inconsistency(states, include_last=True).tolist() == pytest.approx(mean)
    # The embeddings' output and, unless asked for, the last state are not looked at.
    others = [torch.full_like(states[0], math.nan), *states[1:3], torch.full_like(states[3], math.nan)]
    assert layer_inconsistency(others).tolist() == pytest.approx(first)


def test_equal_layers_agree_opposite_ones_do_not_and_length_does_not_count():
    (state,) = drawn(0)
    assert layer_inconsistency([state] * 5).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert layer_inconsistency([state, state, -state, state, state]).tolist() == pytest.approx([2.0] * 3)
    states = drawn(4)
    scaled = [factor * s for factor, s in zip((1, 1e-3, 50, 7, 1), states, strict=True)]
    assert layer_inconsistency(scaled).tolist() == pytest.approx(layer_inconsistency(states).tolist())


def test_a_row_counts_for_itself_and_padding_for_nothing():
    states = drawn(4, shape=(2, 5, 3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = layer_inconsistency([s[:1, :3] for s in states])
    assert layer_inconsistency(states, mask)[0].item() == pytest.approx(alone.item())
    assert layer_inconsistency(states, torch.zeros(2, 5)).tolist() == [0.0, 0.0]  # a row without a token


def test_half_precision_is_summed_in_float32():
    states = [s.half() for s in drawn(3)]
    found = layer_inconsistency(states)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(by_loop(states, torch.ones(3, 5), 1, 2), abs=1e-6)


@pytest.mark.parametrize("norm", [1.0, 1e-4, 1e3])
def test_its_gradient_is_the_closed_form(norm):
    states = drawn(3, shape=(1, 1, 6))
    a = (norm * states[1]).requires_grad_()
    layer_inconsistency([states[0], a, states[2], states[3]]).sum().backward()
    x, y = a.detach()[0, 0].numpy(), states[2][0, 0].numpy()
    u, v = x / np.linalg.norm(x), y / np.linalg.norm(y)
    expected = -(v - np.dot(u, v) * u) / np.linalg.norm(x)
    assert a.grad is not None
    assert a.grad[0, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("count, last", [(3, False), (2, True), (1, True)])
def test_too_few_layers_are_refused(count, last):
    with pytest.raises(ValueError, match="leave .* to compare"):
        layer_inconsistency(drawn(count - 1), include_last=last)


def test_the_step_is_epsilon_where_there_is_a_gradient_and_a_token():
    embeddings, weight = drawn(1, shape=(2, 4, 3), seed=3)
    weight[0, 1, 2] = 0.0
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    embeddings.requires_grad_()
    step = fgsm_sign((weight * embeddings).sum((1, 2)), embeddings, epsilon=0.1, mask=mask)
    expected = 0.1 * np.sign(weight.numpy()) * mask.numpy()[..., None]
    assert np.array_equal(step.numpy(), expected) and not step.requires_grad
    assert embeddings.grad is None


def test_the_gradient_survives_float16():
    embeddings = torch.full((1, 1, 4), 0.5, dtype=torch.float16, requires_grad=True)
    tiny = (embeddings * 1e-4).mean(-1) * 1e-4  # each coordinate's gradient is 2.5e-9, below the smallest float16
    assert torch.equal(torch.autograd.grad(tiny.sum(), embeddings, retain_graph=True)[0], torch.zeros(1, 1, 4).half())
    assert torch.equal(fgsm_sign(tiny, embeddings, epsilon=1.0), torch.ones(1, 1, 4).half())


def test_a_gradient_that_overflowed_has_no_sign():
    embeddings = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]], requires_grad=True)
    weight = torch.tensor([math.nan, math.inf, -math.inf, -1.0])
    step = fgsm_sign((embeddings * weight).sum(), embeddings, epsilon=0.5)
    assert step.tolist() == [[[0.0, 0.5, -0.5, -0.5]]]
    masked = fgsm_sign((embeddings * weight).sum(), embeddings, epsilon=0.5, mask=torch.zeros(1, 1))
    assert masked.abs().max() == 0


def test_no_other_gradient_is_touched_and_the_graph_stays():
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.full((3,), 5.0)
    embeddings = weight * torch.ones(1, 2, 3)  # not a leaf: a trainable embedding's output
    loss = embeddings.pow(2).sum()
    fgsm_sign(loss, embeddings, epsilon=0.1)
    assert weight.grad.tolist() == [5.0] * 3
    loss.backward()
    assert weight.grad.tolist() == [9.0] * 3
