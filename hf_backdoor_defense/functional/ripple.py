r"""RIPPLe's penalty on poison that a clean training step would undo, and two ways to its gradient.

    R = lambda * max(0, -<g_P, g_F>)                         one rectifier over all weights together
    dR/dtheta = -lambda * 1[<g_P, g_F> < 0] * H_P g_F          g_F is held constant

| symbol | what it is | shape |
|---|---|---|
| theta | the weights, by name | any |
| L_P, g_P, H_P | loss on triggered rows, its gradient and Hessian at theta | as theta |
| g_F | gradient of the loss on clean rows | as theta |

A clean step theta - eta g_F changes L_P by -eta <g_P, g_F> to first order: a negative product means that it undoes the poison.

"autograd" differentiates the product itself (exact; the graph of the gradient is kept in memory). "difference" takes the gradient
twice more, with v = g_F / ||g_F||:

    H_P g_F ~ ||g_F|| / (2 eps) * (g_P(theta + eps v) - g_P(theta - eps v))

Source: Kurita et al., *Weight Poisoning Attacks on Pre-trained Models*, ACL 2020. The authors' code also divides the product by
batch size x reference batches; here lambda does not depend on the batch.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Hvp = Literal["autograd", "difference"]
EPSILON = 1e-3  # in float32 smaller steps drown in rounding, larger ones see the third derivative


def gradients(loss: Tensor, weights: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    """The gradient of a scalar by each weight; zeros where it does not depend on one.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradients(w.square().sum(), {"w": w})
    {'w': tensor([2., 4.])}
    """
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, allow_unused=True)
    pairs = zip(weights.items(), found, strict=True)
    return {name: torch.zeros_like(weight) if g is None else g for (name, weight), g in pairs}


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """<a, b> over all weights: a scalar."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def ripple_penalty(
    poison_loss: Callable[[Mapping[str, Tensor]], Tensor],
    weights: Mapping[str, Tensor],
    *,
    clean_gradient: Mapping[str, Tensor],
    lam: float,
    hvp: Hvp = "autograd",
) -> tuple[Tensor, Tensor]:
    """R, whose backward adds its gradient to `weights`, and <g_P, g_F>.

    Args:
        poison_loss: L_P at any weights of these names and shapes: a scalar. Called once, and twice more by "difference" where
            the product is negative; it must draw the same dropout each time for the difference to mean anything.
        weights: leaves that require gradients. clean_gradient: g_F, without a graph.

    Returns:
        R (a scalar, with a graph where it is not 0), the product (a scalar without).

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> quadratic = lambda at: at["w"].square().sum() / 2  # its Hessian is the identity
    >>> penalty, product = ripple_penalty(quadratic, {"w": w}, clean_gradient={"w": torch.tensor([1.0, -3.0])}, lam=0.1)
    >>> penalty.backward()
    >>> round(penalty.item(), 3), product.item(), w.grad
    (0.5, -5.0, tensor([-0.1000,  0.3000]))
    """
    poison = gradients(poison_loss(weights), weights, create_graph=hvp == "autograd")
    product = inner(poison, clean_gradient)
    if product >= 0:  # also where g_F is zero and there is no direction to look in
        return torch.zeros_like(product), product.detach()
    if hvp == "autograd":
        return -lam * product, product.detach()
    norm = inner(clean_gradient, clean_gradient).sqrt()
    ahead, behind = (
        _gradient_at(poison_loss, weights, clean_gradient, step) for step in (EPSILON / norm, -EPSILON / norm)
    )
    # A term of value 0 whose gradient is the difference quotient: what is logged is R itself.
    carrier = [
        ((w - w.detach()) * (ahead[name] - behind[name])).sum() * (-lam * norm / (2 * EPSILON))
        for name, w in weights.items()
    ]
    return -lam * product + torch.stack(carrier).sum(), product


def _gradient_at(
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    step: Tensor,
) -> dict[str, Tensor]:
    moved = {name: (w.detach() + step * direction[name]).requires_grad_() for name, w in weights.items()}
    return gradients(loss(moved), moved)
