"""The penalty of RIPPLe against its closed form, in two ways, and against finite differences of itself."""

import pytest
import torch

from hf_backdoor_defense.functional.ripple import gradients, inner, ripple_penalty

HESSIAN = torch.tensor([[3.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
SHIFT = torch.tensor([0.5, -2.0], dtype=torch.float64)
HOW = ["autograd", "difference"]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def quadratic(at):
    """Half w'Hw - s'w: its gradient is Hw - s, its Hessian H."""
    return at["w"] @ HESSIAN @ at["w"] / 2 - SHIFT @ at["w"]


def wavy(at):
    """No two second derivatives are alike, and one weight has none."""
    return (torch.sin(at["a"]).sum() * at["b"].square().sum()).exp() + at["b"].pow(4).sum() + 3 * at["c"].sum()


@pytest.mark.parametrize("hvp", HOW)
@pytest.mark.parametrize("lam", [0.1, 2.0])
def test_two_parameters_equal_the_closed_form(hvp, lam):
    w = tensor(1.0, 2.0).requires_grad_()
    against = tensor(-4.0, 1.0)
    by_hand = (HESSIAN @ w.detach() - SHIFT) @ against  # (0.5, 5) . (-4, 1) = 3
    assert by_hand.item() == 3.0
    for sign, expected in ((1, tensor(0.0, 0.0)), (-1, -lam * HESSIAN @ -against)):
        w.grad = None
        penalty, product = ripple_penalty(quadratic, {"w": w}, clean_gradient={"w": sign * against}, lam=lam, hvp=hvp)
        (penalty + 0 * w.sum()).backward()
        assert product.item() == sign * 3.0 and penalty.item() == pytest.approx(lam * max(0, -sign * 3.0), rel=1e-12)
        torch.testing.assert_close(w.grad, expected, rtol=1e-9, atol=1e-12)


def test_both_ways_agree_and_equal_finite_differences():
    torch.manual_seed(0)
    weights = {"a": torch.randn(3).double(), "b": torch.randn(2, 2).double(), "c": torch.randn(1).double()}
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    clean = {name: -g for name, g in gradients(wavy(weights), weights).items()}
    clean["a"] = clean["a"].flip(0)
    found = {}
    for hvp in HOW:
        penalty, product = ripple_penalty(wavy, weights, clean_gradient=clean, lam=0.3, hvp=hvp)
        assert product < 0
        found[hvp] = gradients(penalty, weights)
    for name, value in weights.items():
        torch.testing.assert_close(found["difference"][name], found["autograd"][name], rtol=1e-4, atol=1e-4)
        for place in range(value.numel()):
            ends = []
            for move in (1e-6, -1e-6):
                moved = {n: w.detach().clone() for n, w in weights.items()}
                moved[name].view(-1)[place] += move
                moved = {n: w.requires_grad_() for n, w in moved.items()}
                ends.append(-0.3 * inner(gradients(wavy(moved), moved), clean).item())
            slope = (ends[0] - ends[1]) / 2e-6
            assert found["autograd"][name].view(-1)[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("hvp", HOW)
def test_one_rectifier_over_all_weights(hvp):
    """Products of +3 and -1: together nothing is punished, one by one the second would be."""
    weights = {"a": tensor(3.0).requires_grad_(), "b": tensor(-1.0).requires_grad_()}
    ones = {"a": tensor(1.0), "b": tensor(1.0)}

    def loss(at):
        return (at["a"].square() + at["b"].square()).sum() / 2

    penalty, product = ripple_penalty(loss, weights, clean_gradient=ones, lam=1.0, hvp=hvp)
    assert (penalty.item(), product.item()) == (0.0, 2.0)
    weights["b"].data.fill_(-5.0)  # 3 - 5: now the whole gradient counts, that of `a` too
    penalty, product = ripple_penalty(loss, weights, clean_gradient=ones, lam=1.0, hvp=hvp)
    assert (penalty.item(), product.item()) == (2.0, -2.0)
    found = gradients(penalty, weights)
    assert [found[name].item() for name in "ab"] == pytest.approx([-1.0, -1.0], rel=1e-9)


@pytest.mark.parametrize("hvp", HOW)
def test_no_clean_gradient_is_no_penalty(hvp):
    w = tensor(1.0, 2.0).requires_grad_()
    penalty, product = ripple_penalty(quadratic, {"w": w}, clean_gradient={"w": tensor(0, 0)}, lam=1.0, hvp=hvp)
    assert penalty.item() == product.item() == 0.0


def test_a_weight_without_influence_has_gradient_zero():
    used, unused = tensor(2.0).requires_grad_(), tensor(1.0, 1.0).requires_grad_()
    found = gradients(used.square().sum(), {"used": used, "unused": unused})
    assert found["used"].item() == 4.0 and found["unused"].tolist() == [0.0, 0.0]
