"""Distances, their gradient and spheres against numpy, and against finite differences in float64."""

import math

import numpy as np
import pytest
import torch

from hf_backdoor_defense.functional.spheres import distances, norms, project_, pull_away_

SHAPES = [(3, 7), (1, 1), (4, 2, 3, 3), (5,)]


def drawn(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def by_numpy(weights, references):
    pairs = zip(weights, references, strict=True)
    return [math.sqrt(((a.double().numpy() - b.double().numpy()) ** 2).sum()) for a, b in pairs]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_norms_and_distances(dtype, tolerance):
    weights, references = drawn(0, dtype), drawn(1, dtype)
    found = distances(weights, references)
    assert found.shape == (len(SHAPES),) and found.dtype == dtype
    assert found.tolist() == pytest.approx(by_numpy(weights, references), rel=tolerance)
    origin = [torch.zeros_like(w) for w in weights]
    assert norms(weights).tolist() == pytest.approx(by_numpy(weights, origin), rel=tolerance)


def test_references_of_lower_precision():
    weights, coarse = drawn(0), [w.bfloat16() for w in drawn(1)]
    assert distances(weights, coarse).tolist() == pytest.approx(by_numpy(weights, coarse), rel=1e-6)


def test_there_is_no_graph():
    weights = [torch.nn.Parameter(w) for w in drawn(0)]
    assert not distances(weights, drawn(1)).requires_grad and not norms(weights).requires_grad
    assert not pull_away_(weights, drawn(1), 1.0).requires_grad
    assert all(w.grad.grad_fn is None for w in weights)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_pull_is_the_slope_of_the_distance(scale):
    """Central differences of −scale · Σ d, entry by entry."""
    weights = [torch.nn.Parameter(w) for w in drawn(0, torch.float64)]
    references, h = drawn(1, torch.float64), 1e-6
    returned = pull_away_(weights, references, scale)
    assert torch.equal(returned, distances(weights, references))
    for l, weight in enumerate(weights):  # noqa: E741
        flat, slope = weight.detach().clone().reshape(-1), []
        for i in range(len(flat)):
            up, down = flat.clone(), flat.clone()
            up[i] += h
            down[i] -= h
            values = [distances([v.reshape(weight.shape)], [references[l]]).item() for v in (up, down)]
            slope.append(-scale * (values[0] - values[1]) / (2 * h))
        assert np.allclose(weight.grad.reshape(-1).numpy(), slope, atol=1e-8)
        assert weight.grad.norm().item() == pytest.approx(scale, rel=1e-12)  # whatever the layer's size


def test_the_pull_is_added_to_what_is_there_and_only_there():
    weights = [torch.nn.Parameter(w) for w in drawn(0)]
    fresh = [torch.nn.Parameter(w) for w in drawn(0)]
    pull_away_(fresh, drawn(1), 0.5)
    old = drawn(2)
    for weight, gradient in zip(weights, old, strict=True):
        weight.grad = gradient.clone()
    held = [weight.grad for weight in weights]
    pull_away_(weights, drawn(1), 0.5)
    for weight, before, gradient, alone, start in zip(weights, old, held, fresh, drawn(0), strict=True):
        assert weight.grad is gradient
        assert torch.allclose(gradient - before, alone.grad, atol=1e-6)
        assert torch.equal(weight.detach(), start)


def test_at_the_start_the_pull_is_exactly_zero():
    start = drawn(0)
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    assert torch.equal(pull_away_(weights, start, 1.0), torch.zeros(len(SHAPES)))
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)
    with torch.no_grad():
        weights[1].add_(1e-30)  # one of them left it by hardly anything: lost in float32, never NaN
    pull_away_(weights, start, 1.0)
    assert all(torch.isfinite(w.grad).all() for w in weights)


def test_projection_gives_the_radius_and_keeps_the_direction():
    weights, radii = drawn(0), torch.tensor([0.5, 3.0, 1e-3, 1.0])
    before = [w.clone() for w in weights]
    project_(weights, radii)
    origin = [torch.zeros_like(w) for w in weights]
    assert by_numpy(weights, origin) == pytest.approx(radii.tolist(), rel=1e-6)
    for w, b in zip(weights, before, strict=True):
        cosine = torch.nn.functional.cosine_similarity(w.double().reshape(1, -1), b.double().reshape(1, -1)).item()
        assert cosine == pytest.approx(1, abs=1e-12)


def test_projection_onto_the_own_sphere_changes_no_bit():
    weights = drawn(0)
    radii = torch.stack([torch.linalg.vector_norm(w) for w in weights])
    for _ in range(3):
        project_(weights, radii)
    assert all(torch.equal(a, b) for a, b in zip(weights, drawn(0), strict=True))


def test_a_weight_of_zeros_has_no_direction():
    weights = [torch.zeros(2, 3), torch.ones(1, 4)]
    project_(weights, torch.tensor([1.0, 1.0]))
    assert torch.equal(weights[0], torch.zeros(2, 3)) and torch.equal(weights[1], torch.full((1, 4), 0.5))


def test_on_its_sphere_a_weight_is_at_most_twice_the_radius_away():
    start, weights = drawn(0), [-w for w in drawn(0)]
    radii = norms(start)
    assert torch.allclose(distances(weights, start), 2 * radii)
    wide = torch.randn(60, 80, generator=torch.Generator().manual_seed(3))
    other = torch.rand(60, 80, generator=torch.Generator().manual_seed(4)) - 0.5
    project_([other], norms([wide]))
    assert (distances([other], [wide]) / norms([wide])).item() == pytest.approx(math.sqrt(2), abs=0.05)


def test_nothing_to_measure_is_refused():
    for refused in (lambda: norms([]), lambda: distances([], []), lambda: project_([], torch.zeros(0))):
        with pytest.raises(ValueError, match="no weights to measure"):
            refused()
    with pytest.raises(ValueError):  # lists of different length are a mistake, not a shorter list
        distances(drawn(0), drawn(1)[:2])
