"""Norms of weight matrices, and what shrinks them.

    Σ_l ‖W_l‖_F          ∂/∂W_l = W_l / ‖W_l‖_F   (0 at W_l = 0)
    ‖(|W| - S)₊‖ / ‖W‖   what a soft threshold at S leaves of the norm
    r(d) = sqrt(2·[(1 + d²)·Q(d) - d·φ(d)])   the same for Gaussian weights, d = S / std(W)

Adam turns the gradient of a norm into steps of about the learning rate for every entry: the penalty alone is a soft threshold at
the sum of the learning rates, whatever its coefficient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def frobenius_norms(weights: Sequence[Tensor]) -> Tensor:
    """Frobenius norms, unsquared, with gradients W/‖W‖ (0 at 0).

    Args:
        weights: L tensors of any shape; DTensors that are sharded over one mesh cost one all-reduce together.

    Returns:
        [L], float32 (float64 for float64 weights).

    Raises:
        ValueError: no weights.

    >>> frobenius_norms([torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2)])
    tensor([5., 0.])
    """
    if not weights:
        raise ValueError("There are no weights to take the norm of, got an empty list. Name at least one matrix.")
    group, local = None, list(weights)
    if any(hasattr(w, "device_mesh") for w in weights):
        local, group = shards(weights)
    return _Norms.apply(group, *local)  # type: ignore[no-any-return]


class _Norms(torch.autograd.Function):
    """One reduction over all shards in forward, one product per matrix in backward."""

    @staticmethod
    def forward(ctx: Any, group: Any, *weights: Tensor) -> Tensor:  # type: ignore[override]
        kind = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        norms = torch.stack([torch.linalg.vector_norm(w, dtype=kind) for w in weights])
        if group is not None:
            squares = norms.square()
            torch.distributed.all_reduce(squares, group=group)
            norms = squares.sqrt()
        ctx.save_for_backward(norms, *weights)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        norms, *weights = ctx.saved_tensors
        factors = torch.where(norms > 0, upstream / norms, 0.0)
        grads = [w * f.to(w.dtype) for w, f in zip(weights, factors, strict=True)]
        return (None, *grads)


def shards(weights: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
    """The shards of DTensors and the group they are spread over. Every one must be cut along one mesh dimension."""
    meshes = {w.device_mesh for w in weights if hasattr(w, "device_mesh")}
    if len(meshes) != 1 or not all(hasattr(w, "device_mesh") for w in weights):
        raise ValueError(
            "The weights must all be sharded over one mesh, or none of them: their norms are reduced together. Apply "
            "fully_shard to the whole model."
        )
    (mesh,) = meshes
    sharded = [dim for dim in range(mesh.ndim) if any(w.placements[dim].is_shard() for w in weights)]
    if len(sharded) > 1 or any(not w.placements[dim].is_shard() for dim in sharded for w in weights):
        raise ValueError(
            "Weights must be cut along the same, single dimension of the mesh. Use FSDP2 without tensor parallelism."
        )
    local = [w.to_local() for w in weights]
    return local, mesh.get_group(sharded[0]) if sharded else None


def gaussian_norm_ratio(dose: float) -> float:
    """r(d): what is left of the norm of Gaussian weights after a soft threshold at d standard deviations.

    >>> [round(gaussian_norm_ratio(d), 2) for d in (0.0, 0.625, 1.25)]
    [1.0, 0.57, 0.29]
    """
    tail = 0.5 * math.erfc(dose / math.sqrt(2))
    density = math.exp(-dose * dose / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(max(2 * ((1 + dose * dose) * tail - dose * density), 0.0))


def predicted_norm_ratio(weight: Tensor, sum_lr: float) -> float:
    """‖(|W| - S)₊‖ / ‖W‖: what signed shrinkage by S in all leaves of the norm, exactly. 0 for a weight of zeros.

    >>> predicted_norm_ratio(torch.tensor([3.0, -4.0]), 0.0), predicted_norm_ratio(torch.tensor([3.0, -4.0]), 5.0)
    (1.0, 0.0)
    """
    size = weight.detach().double().abs()
    norm = torch.linalg.vector_norm(size)
    return float(torch.linalg.vector_norm((size - sum_lr).clamp(min=0)) / norm) if norm > 0 else 0.0


def norm_ratio_curve(weight: Tensor, *, step: float, count: int) -> Tensor:
    """`predicted_norm_ratio` at sums of rates 0, step, …, (count - 1)·step, in one pass over the weight.

    Returns:
        [count], float64, on the CPU. Ones for a step of 0 (a constant weight has no scale to measure doses on).

    >>> norm_ratio_curve(torch.tensor([3.0, -4.0]), step=2.5, count=3)
    tensor([1.0000, 0.3162, 0.0000], dtype=torch.float64)
    """
    size = weight.detach().cpu().double().abs().flatten()
    if step <= 0 or not bool(size.any()):
        return torch.ones(count, dtype=torch.float64)
    bins = (size / step).clamp(max=count - 1).long()
    # Entries at or above each sum S: how many, their sum, the sum of their squares. Σ(|w| - S)² follows.
    n, first, second = (
        torch.bincount(bins, weights=size**power, minlength=count).flip(0).cumsum(0).flip(0) for power in range(3)
    )
    sums = step * torch.arange(count, dtype=torch.float64)
    left = second - 2 * sums * first + sums.square() * n
    return (left.clamp(min=0) / second[0]).sqrt()
