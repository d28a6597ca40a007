"""Norms against numpy, gradients against finite differences, the soft threshold against sorting and against quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from hf_backdoor_defense.functional.weights import (
    frobenius_norms,
    gaussian_norm_ratio,
    norm_ratio_curve,
    predicted_norm_ratio,
)

SHAPES = [(3, 4), (1, 1), (7,), (2, 3, 5), (4, 1)]


def drawn(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
def test_norms_are_roots_of_sums_of_squares(dtype, rel):
    weights = drawn(dtype)
    expected = [np.sqrt(np.sum(w.double().numpy() ** 2)) for w in weights]
    norms = frobenius_norms(weights)
    assert norms.tolist() == pytest.approx(expected, rel=rel)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("coef", [1.0, 0.3])
def test_the_gradient_is_the_weight_over_its_norm(coef):
    weights = [w.requires_grad_() for w in drawn(torch.float64)]
    (coef * frobenius_norms(weights).sum()).backward()
    for w in weights:
        assert torch.allclose(w.grad, coef * w.detach() / w.detach().norm(), atol=1e-12)
    assert torch.autograd.gradcheck(lambda *ws: frobenius_norms(ws), tuple(weights))


def test_at_zero_it_is_zero_and_no_nan():
    zero, other = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    frobenius_norms([zero, other]).sum().backward()
    assert torch.equal(zero.grad, torch.zeros(2, 3)) and torch.allclose(other.grad, torch.full((2, 2), 0.5))


def test_half_precision_keeps_its_type_in_the_gradient():
    w = torch.randn(4, 4).bfloat16().requires_grad_()
    frobenius_norms([w]).sum().backward()
    assert w.grad.dtype == torch.bfloat16


def test_no_weights_are_refused():
    with pytest.raises(ValueError, match="got an empty list"):
        frobenius_norms([])
    assert frobenius_norms([torch.ones(1)]).tolist() == [1.0]


@pytest.mark.parametrize("dose", [0.0, 0.1, 0.6, 1.25, 3.0])
def test_gaussian_ratio_is_the_integral(dose):
    square, _ = integrate.quad(lambda x: (x - dose) ** 2 * math.exp(-x * x / 2) / math.sqrt(2 * math.pi), dose, 40)
    assert gaussian_norm_ratio(dose) == pytest.approx(math.sqrt(2 * square), abs=1e-9)


def test_gaussian_weights_follow_it():
    w = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)) * 0.05
    for dose in (0.3, 0.625, 1.25):
        assert predicted_norm_ratio(w, dose * 0.05) == pytest.approx(gaussian_norm_ratio(dose), abs=5e-3)


@pytest.mark.parametrize("weight", [*drawn(), torch.tensor([[1.0, -1.0, 1.0]]), torch.full((2, 2), -0.25)])
def test_prediction_and_curve_are_those_of_a_loop(weight):
    entries = [abs(x) for x in weight.double().flatten().tolist()]
    step, norm = 0.125, math.sqrt(sum(x * x for x in entries))
    expected = [math.sqrt(sum(max(x - step * k, 0.0) ** 2 for x in entries)) / norm for k in range(40)]
    assert norm_ratio_curve(weight, step=step, count=40).tolist() == pytest.approx(expected, abs=1e-6)
    for k in (0, 1, 7, 39):
        assert predicted_norm_ratio(weight, step * k) == pytest.approx(expected[k], abs=1e-9)


def test_the_curve_of_nothing():
    assert predicted_norm_ratio(torch.zeros(3), 0.1) == 0.0
    assert norm_ratio_curve(torch.zeros(3), step=0.1, count=2).tolist() == [1.0, 1.0]
    assert norm_ratio_curve(torch.ones(3), step=0.0, count=2).tolist() == [1.0, 1.0]
