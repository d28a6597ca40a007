r"""DeCE of hidden states, through the output projection, without ever holding the logits of a batch.

Formula, with the L of `dece.py` and g = dL/dz per row (`dece_rows.py`):

    z = scale (h W^T + b),  softcap c: c tanh(z / c)        dL/dh = scale g W    dL/dW = scale g^T h    dL/db = scale sum g

| symbol | variable | shape |
|---|---|---|
| h | `hidden` | [..., d]; rows whose label is -100 leave before the product |
| W, b | `weight`, `bias` | [V, d], [V] |
| z | one buffer, over chunks of rows | [rows in `chunk_bytes`, V] |

Rows of the batch are taken a chunk at a time with the whole vocabulary, because smoothed DeCE needs two dependent sums
over the vocabulary before its gradient: in a resident chunk they cost no further product. The forward already forms the
gradients, as if each value had the upstream gradient 1: three products. The backward multiplies them where the upstream
gradient is one number (`values.sum() / n` gives it the stride 0, so that this is seen without asking the GPU). Otherwise
dL/dh is scaled row by row, and the chunks are computed once more for dL/dW and dL/db: two further products.

Precision: products in the dtype of the weights (or of autocast), softmax, sums and dL/dW in float32 (float64 for float64).
`log_alpha=0, label_smoothing=0` is cross-entropy.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_backdoor_defense.functional.chunks import RowFunction, add_product, chunk_budget, chunk_rows, compiles
from hf_backdoor_defense.functional.cross_entropy import valid_targets, working_dtype
from hf_backdoor_defense.functional.dece import check_fields, refuse_second_derivative


def linear_dece_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    log_alpha: float,
    label_smoothing: float,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Unreduced DeCE of the positions that carry a label; `dece_loss` of the projected states without their logits.

    Args:
        hidden: [..., d], aligned with the labels (`shift_labels` for causal models).
        weight: [V, d]. Without `requires_grad` its gradient is neither computed nor stored.
        labels: [...], integers, -100 where there is nothing to learn.
        log_alpha, label_smoothing: as in `dece_loss`.
        bias, scale, softcap: of the projection, as in `Projection`.
        chunk_bytes: what the buffer of scores may take, in the dtype of the product; one row at least, however small the
            budget. None: by device. On a CPU three or four blocks of 512 KiB (or one row) come on top.

    Returns:
        [n_valid], float32 (float64 for float64 states). Empty, with a graph, where all labels are ignored.

    Reduce it by `values.sum() / n`: any other weighting costs two more products in the backward. Prefer `dece_loss`
    where logits exist anyway or the vocabulary is small.

    >>> hidden, weight = torch.eye(3).requires_grad_(), (4 * torch.eye(5, 3)).requires_grad_()
    >>> labels = torch.tensor([0, 3, -100])
    >>> loss = linear_dece_loss(hidden, weight, labels, log_alpha=math.log(0.8), label_smoothing=0.05)
    >>> loss.detach()
    tensor([0.2697, 1.6701])
    >>> (loss.sum() / 2).backward()
    >>> hidden.grad[2], weight.grad.shape
    (tensor([0., 0., 0.]), torch.Size([5, 3]))
    """
    return linear_dece_loss_and_stats(
        hidden,
        weight,
        labels,
        log_alpha=log_alpha,
        label_smoothing=label_smoothing,
        bias=bias,
        scale=scale,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
    )[0]


def linear_dece_loss_and_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    log_alpha: float,
    label_smoothing: float,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_dece_loss`, log p_t and whether the label scores highest: three of [n_valid], the last two without a graph.

    >>> values, logps, is_top1 = linear_dece_loss_and_stats(
    ...     torch.eye(2), torch.eye(4, 2), torch.tensor([0, 3]), log_alpha=0.0, label_smoothing=0.0)
    >>> is_top1
    tensor([ True, False])
    """
    _check_shapes(hidden, weight, labels, bias, scale, softcap)
    check_fields(log_alpha, label_smoothing, weight.shape[0])
    targets, rows = valid_targets(labels, weight.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])
    plan = _Plan(
        log_alpha=log_alpha,
        label_smoothing=label_smoothing,
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        chunk_bytes=chunk_budget(chunk_bytes, hidden.device),
        dtype=_product_dtype(hidden, weight),
        stash=torch.is_grad_enabled(),
    )
    selected = flat if rows is None else flat.index_select(0, rows)
    values, logps, is_top1 = _LinearDeCE.apply(selected, weight, bias, targets, plan)
    return values, logps, is_top1


def _check_shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> None:
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"`hidden` and `weight` must be floating point, got {hidden.dtype} and {weight.dtype}: the product is taken "
            "here. A quantized projection has no such weights: compute the logits with the model and use dece_loss."
        )
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"`weight` must be [V, d] for hidden states [..., d], got {list(weight.shape)} and {list(hidden.shape)}: "
            "scores are hidden @ weight.T. Pass the weight of the output projection."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`bias` must be [V], got {list(bias.shape)} for {weight.shape[0]} rows of `weight`: each class has one. "
            "Pass the bias of the same projection."
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"`labels` must have the shape of `hidden` without its last dimension, got hidden {list(hidden.shape)} and "
            f"labels {list(labels.shape)}: each position has one. Align them before the loss."
        )
    if not math.isfinite(scale) or (softcap is not None and not 0 < softcap < math.inf):
        raise ValueError(
            f"`scale` must be finite and `softcap` None or positive, got {scale} and {softcap}: scores would be constant "
            "or undefined. Take both from the model's configuration."
        )


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the three products: what autocast says, else the one that hidden states and weights share."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"`hidden` and `weight` must share a dtype, got {hidden.dtype} and {weight.dtype}: outside of autocast a "
            "product has no other. Cast one of them."
        )
    return hidden.dtype


@dataclass(frozen=True)
class _Plan:
    log_alpha: float
    label_smoothing: float
    scale: float
    softcap: float | None
    chunk_bytes: int
    dtype: torch.dtype  # of the products
    stash: bool  # whether a backward may come


class _LinearDeCE(torch.autograd.Function):
    """Gradients for an upstream gradient of 1 are formed by the forward and never written to by the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [plan.stash and need for need in ctx.needs_input_grad[:3]]
        run = _Run(hidden, weight, bias, targets, plan, wanted)
        run.chunks()
        ctx.plan, ctx.wanted = plan, wanted
        ctx.save_for_backward(hidden, weight, bias, targets, run.grad_hidden, run.grad_weight, run.grad_bias)
        ctx.mark_non_differentiable(run.logps, run.is_top1)
        return run.values, run.logps, run.is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_dece_loss", "dece_loss_reference on projected states")
        hidden, weight, bias, targets, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad.numel() <= 1 or grad.stride() == (0,):
            factor = grad[:1].sum() if grad.numel() == 0 else grad[0]
        else:
            factor = None
            if grad_weight is not None or grad_bias is not None:
                again = _Run(hidden, weight, bias, targets, ctx.plan, [False, *ctx.wanted[1:]])
                again.chunks(grad)
                grad_weight, grad_bias = again.grad_weight, again.grad_bias
        by_row = grad.unsqueeze(1) if factor is None else factor
        return (
            _times(grad_hidden, by_row, hidden.dtype),
            _times(grad_weight, factor, weight.dtype),
            _times(grad_bias, factor, weight.dtype if bias is None else bias.dtype),
            None,
            None,
        )


def _times(stash: Tensor | None, factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The stashed gradient times the upstream one, in a new tensor: a second backward must find the stash as it was.

    The product is taken in single precision: 1/n in half precision would be off by the same share for every weight.
    """
    if stash is None or factor is None:
        return None if stash is None else stash.to(dtype)
    wide = stash.to(factor.dtype) if stash.dtype.itemsize < factor.dtype.itemsize else stash
    return torch.mul(wide, factor, out=stash.new_empty(stash.shape, dtype=dtype))


class _Run:
    """One walk over the chunks: buffers, results and the gradients that are wanted of (hidden, weight, bias)."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan, wanted: list[bool]
    ) -> None:
        self.plan, self.targets, self.wanted = plan, targets, wanted
        self.count, self.classes = len(targets), weight.shape[0]
        self.work = working_dtype(hidden)
        # Casts that autocast would make. Detached and under no graph: forward and backward run without one.
        self.hidden, self.weight = hidden.to(plan.dtype), weight.to(plan.dtype)
        self.bias = None if bias is None else bias.to(plan.dtype)
        self.values, self.logps = (hidden.new_empty(self.count, dtype=self.work) for _ in range(2))
        self.is_top1 = hidden.new_empty(self.count, dtype=torch.bool)
        self.grad_hidden = torch.empty_like(self.hidden) if wanted[0] else None
        # Zeros cost nothing before they are touched on a CPU; on a GPU the first chunk overwrites instead of adding.
        make = torch.empty if self.count and hidden.is_cuda else torch.zeros
        self.grad_weight = make(weight.shape, dtype=self.work, device=weight.device) if wanted[1] else None
        self.grad_bias = hidden.new_zeros(self.classes, dtype=self.work) if wanted[2] else None

    def chunks(self, grad: Tensor | None = None) -> None:
        """Fill the results; with `grad` [n] the gradients are those for this upstream gradient."""
        plan, device = self.plan, self.hidden.device
        most = plan.chunk_bytes // (self.classes * plan.dtype.itemsize)
        size = chunk_rows(self.count, most, padded=compiles(self.hidden))
        buffer = self.hidden.new_empty((size, self.classes))
        rows = RowFunction(
            buffer, plan.log_alpha, plan.label_smoothing, softcap=plan.softcap, gradient=any(self.wanted)
        )
        with torch.autocast(device.type, enabled=False):
            for start in range(0, self.count, max(size, 1)):
                part = slice(start, min(start + size, self.count))
                scores = buffer[: part.stop - start]
                self._product(part, scores)
                self.values[part], self.logps[part], self.is_top1[part] = rows(self.targets[part])
                if grad is not None:
                    scores.mul_(grad[part].unsqueeze(1))
                self._collect(part, scores)

    def _product(self, part: slice, scores: Tensor) -> None:
        hidden, scale = self.hidden[part], self.plan.scale
        if self.bias is None:
            torch.addmm(scores, hidden, self.weight.t(), beta=0, alpha=scale, out=scores)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), beta=scale, alpha=scale, out=scores)

    def _collect(self, part: slice, change: Tensor) -> None:
        """Add a chunk's gradient of the scores [m, V] to the gradients."""
        scale = self.plan.scale
        if self.grad_hidden is not None:
            into = self.grad_hidden[part]
            torch.addmm(into, change, self.weight, beta=0, alpha=scale, out=into)
        if self.grad_weight is not None:
            add_product(self.grad_weight, change, self.hidden[part], scale=scale, first=part.start == 0)
        if self.grad_bias is not None:
            self.grad_bias.add_(change.sum(0, dtype=self.work), alpha=scale)
