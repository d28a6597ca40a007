"""Weights that are pushed away from where they were, and held on spheres around the origin.

    d_l = ‖W_l − W0_l‖_F        ∂d_l/∂W_l = (W_l − W0_l) / d_l   (0 at W_l = W0_l)
    W_l <- W_l · r_l / ‖W_l‖_F

On the sphere of radius r_l = ‖W0_l‖, d_l / r_l lies in [0, 2]: about sqrt(2) at a random point, 2 at −W0_l.

Tensor by tensor: the only temporary is as large as one weight. Weights that are sharded over one mesh (DTensors) cost one
all-reduce together, of L squares.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_backdoor_defense.functional.weights import shards


@torch.no_grad()
def norms(weights: Sequence[Tensor]) -> Tensor:
    """[L] Frobenius norms, float32 (float64 for float64 weights), without a graph.

    >>> norms([torch.tensor([[3.0, 4.0]])])
    tensor([5.])
    """
    local, group = _shards(weights)
    return _reduce([_square(w) for w in local], group)


@torch.no_grad()
def distances(weights: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """[L] ‖W − W0‖_F, without a graph.

    Args:
        weights, references: L tensors each, alike in shape and, if they are DTensors, in layout. References may be of lower
            precision.

    >>> distances([torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 1.0]])])
    tensor([3.])
    """
    local, group = _shards(weights)
    return _reduce([_square(w - w0.to(w.dtype)) for w, w0 in zip(local, _plain(references), strict=True)], group)


@torch.no_grad()
def pull_away_(weights: Sequence[Tensor], references: Sequence[Tensor], scale: float) -> Tensor:
    """Add −scale·(W − W0)/‖W − W0‖ to each weight's `.grad`, in place: descent then moves W away from W0. 0 at W = W0.

    A `.grad` that is None becomes this gradient.

    Returns:
        [L] the distances.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> pull_away_([weight], [torch.zeros(2)], scale=0.5), weight.grad
    (tensor([5.]), tensor([-0.3000, -0.4000]))
    """
    found = distances(weights, references)
    factors = torch.where(found > 0, -scale / found, 0.0)
    for weight, reference, factor in zip(weights, references, factors, strict=True):
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        inside, grad, w0 = _plain([weight, weight.grad, reference])
        grad.addcmul_(inside - w0.to(inside.dtype), factor.to(grad.dtype))
    return found


@torch.no_grad()
def project_(weights: Sequence[Tensor], radii: Tensor) -> None:
    """Scale every weight to its radius, in place. A weight of zeros has no direction and stays.

    Args:
        radii: [L], on the weights' device.

    >>> weight = torch.tensor([3.0, 4.0])
    >>> project_([weight], torch.tensor([1.0]))
    >>> weight
    tensor([0.6000, 0.8000])
    """
    found = norms(weights)
    factors = torch.where(found > 0, radii.to(found) / found, 1.0)
    for weight, factor in zip(_plain(weights), factors, strict=True):
        weight.mul_(factor.to(weight.dtype))


def _square(values: Tensor) -> Tensor:
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(values, dtype=kind).square()


def _reduce(squares: list[Tensor], group: Any) -> Tensor:
    total = torch.stack(squares)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.sqrt()


def _shards(weights: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
    if not weights:
        raise ValueError("There are no weights to measure, got an empty list. Name at least one matrix.")
    return shards(weights) if any(hasattr(w, "device_mesh") for w in weights) else (list(weights), None)


def _plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to_local() if hasattr(t, "device_mesh") else t for t in tensors]  # type: ignore[operator]
