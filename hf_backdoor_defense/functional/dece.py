r"""Deceptive cross-entropy (DeCE): cross-entropy against a mixture of the prediction and the smoothed label.

Formula, per position with a label:

    q = alpha p + (1 - alpha) y        L = -sum_k y_k log q_k
    r_k = alpha p_k / q_k              dL/dz_j = G p_j - y_j r_j,   G = sum_k y_k r_k

| symbol | variable | shape / value |
|---|---|---|
| z, p | `logits`, its softmax | [..., V] |
| t | `labels` | [...], integers, -100 = ignored |
| alpha | exp(`log_alpha`) | scalar in [0, 1]; the published schedule is alpha_base ** (epoch + 1) |
| epsilon | `label_smoothing` | scalar in [0, (V-1)/V) |
| y | 1 - epsilon at t, epsilon / (V-1) elsewhere | never materialized |
| L | result | [n_valid], unreduced |
| r_t | `target_pull` | [n_valid], share in [0, 1] of cross-entropy's pull toward the label that is kept |
| tau | `threshold` | scalar; r_t < 1/2 exactly where p_t < tau |

Source: Yang et al., "Defending Code Language Models against Backdoor Attacks with Deceptive Cross-Entropy Loss", arXiv
2407.08956. The formula is the one of the authors' released code (NTDXYG/DeCE); the smoothing convention epsilon / (V-1)
is theirs too and differs from torch's epsilon / V.

Deviations from the authors' code:
- No clamp. Theirs bounds p from below by 1e-7, which takes the gradient of every less likely class away. Here the
  mixture is formed from logarithms, so that nothing needs a bound.
- Positions are ignored by their label (-100) and leave the result; theirs stay in the denominator.
- float32 (float64 for float64 logits) throughout; theirs takes the softmax in the model's dtype.
- The gradient is the closed form above, over blocks of rows (`dece_rows.py`): logits are cast a block at a time, and
  the only full [n, V] tensor that is made is the gradient itself. `linear_dece.py` does without that one too.
- Whoever calls decides on alpha; there is no epoch and no state here.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hf_backdoor_defense.functional.chunks import block_rows, chunk_budget
from hf_backdoor_defense.functional.cross_entropy import valid_rows, working_dtype
from hf_backdoor_defense.functional.dece_rows import case_and_numbers, log_rest, row_values_and_gradient


def dece_loss(
    logits: Tensor, labels: Tensor, *, log_alpha: float, label_smoothing: float, chunk_bytes: int | None = None
) -> Tensor:
    """Unreduced DeCE of the rows that carry a label, without a full copy of the logits.

    Args:
        logits: [..., V], already aligned with the labels (`shift_labels` for causal models).
        labels: [...], integers, -100 where there is nothing to learn.
        log_alpha: log of the prediction's share: 0 is label-smoothed cross-entropy, -inf a constant without gradient.
        label_smoothing: in [0, (V-1)/V).
        chunk_bytes: what the three float32 work buffers may take together, one row each at least, in the forward and
            again in the backward; None for a default by device. They are smaller where a processor's cache is.

    Returns:
        [n_valid], float32 (float64 for float64 logits). Empty, with a graph, where all labels are ignored.

    Prefer `linear_dece_loss` where the logits need not exist, `dece_loss_and_stats` to log the pull as well, and
    `dece_loss_from_logps` where there are log-probabilities only.

    >>> logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = dece_loss(logits, torch.tensor([0, 1, -100]), log_alpha=math.log(0.8), label_smoothing=0.05)
    >>> loss
    tensor([0.2349, 1.6147], grad_fn=<_DeCEBackward>)
    >>> loss.sum().backward()
    >>> logits.grad[2]
    tensor([0., 0., 0.])
    """
    return dece_loss_and_stats(
        logits, labels, log_alpha=log_alpha, label_smoothing=label_smoothing, chunk_bytes=chunk_bytes
    )[0]


def dece_loss_and_stats(
    logits: Tensor, labels: Tensor, *, log_alpha: float, label_smoothing: float, chunk_bytes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`dece_loss`, and what it comes across on the way.

    Arguments as in `dece_loss`. Returns three tensors [n_valid]: the loss; log p_t without a graph, from which
    `target_pull` follows without another pass over the vocabulary; and whether the label scores highest (a tie counts).

    >>> _, logps, is_top1 = dece_loss_and_stats(
    ...     torch.zeros(1, 4), torch.tensor([2]), log_alpha=math.log(0.8), label_smoothing=0.05)
    >>> target_pull(logps, log_alpha=math.log(0.8), label_smoothing=0.05), is_top1
    (tensor([0.5128]), tensor([True]))
    """
    flat, targets, rows = valid_rows(logits, labels)
    check_fields(log_alpha, label_smoothing, flat.shape[1])
    budget = chunk_budget(chunk_bytes, flat.device)
    loss, target_logps, is_top1 = _DeCE.apply(flat, targets, rows, (log_alpha, label_smoothing, budget))
    return loss, target_logps, is_top1


def dece_loss_reference(logits: Tensor, labels: Tensor, *, log_alpha: float, label_smoothing: float) -> Tensor:
    """`dece_loss` written directly, with autograd's gradient and about five full copies of the logits: for tests.

    Arguments and result as in `dece_loss`, without `chunk_bytes`. It can be differentiated twice.

    >>> dece_loss_reference(torch.zeros(1, 4), torch.tensor([2]), log_alpha=math.log(0.5), label_smoothing=0.0)
    tensor([0.4700])
    """
    flat, targets, rows = valid_rows(logits, labels)
    check_fields(log_alpha, label_smoothing, flat.shape[1])
    selected = flat if rows is None else flat.index_select(0, rows)  # [n_valid, V]
    logps = selected.to(working_dtype(flat)).log_softmax(-1)
    target_logps = logps.gather(1, targets.unsqueeze(1)).squeeze(1)
    on_target = -(1 - label_smoothing) * _log_mixture(target_logps, log_alpha, math.log1p(-label_smoothing))
    if label_smoothing == 0:
        return on_target
    share = label_smoothing / (flat.shape[1] - 1)
    others = _log_mixture(logps, log_alpha, math.log(share)).scatter(1, targets.unsqueeze(1), 0.0)
    return on_target - share * others.sum(-1)


def dece_loss_from_logps(target_logps: Tensor, *, log_alpha: float) -> Tensor:
    """DeCE without label smoothing, which needs nothing but the labels' log-probabilities.

    Args:
        target_logps: any shape, log p_t, for example from a fused output projection that never builds logits.
        log_alpha: as in `dece_loss`.

    Returns:
        The shape of `target_logps`, float32 (or float64). The gradient is `target_pull` times cross-entropy's.

    >>> dece_loss_from_logps(torch.tensor([0.5, 0.001]).log(), log_alpha=math.log(0.8))
    tensor([0.5108, 1.6054])
    """
    check_fields(log_alpha, 0.0)
    return -_log_mixture(target_logps.to(working_dtype(target_logps)), log_alpha, 0.0)


def target_pull(target_logps: Tensor, *, log_alpha: float, label_smoothing: float) -> Tensor:
    """r_t: the share of cross-entropy's pull toward the label that DeCE keeps, in [0, 1].

    Args:
        target_logps: any shape, log p_t.
        log_alpha, label_smoothing: as in `dece_loss`.

    Returns:
        The shape of `target_logps`: 1 for labels that the model finds plausible, near 0 for those that surprise it.

    >>> target_pull(torch.tensor([0.5, 0.001]).log(), log_alpha=math.log(0.8), label_smoothing=0.05)
    tensor([0.6780, 0.0042])
    """
    check_fields(log_alpha, label_smoothing)
    logps = target_logps.to(working_dtype(target_logps))
    if log_alpha == 0:
        return torch.ones_like(logps)
    return (logps + (log_alpha - log_rest(log_alpha) - math.log1p(-label_smoothing))).sigmoid()


def threshold(*, log_alpha: float, label_smoothing: float) -> float:
    """tau = (1 - alpha)(1 - epsilon) / alpha: a label less likely than this keeps less than half of its pull.

    From tau >= 1 on nearly everything is ignored, clean or not. `log_alpha = -inf` gives inf.

    >>> round(threshold(log_alpha=math.log(0.985), label_smoothing=0.05), 4)
    0.0145
    """
    check_fields(log_alpha, label_smoothing)
    # Not from alpha, which underflows late in a long run. Beyond -700 the quotient itself leaves the floats.
    return math.expm1(-log_alpha) * (1 - label_smoothing) if log_alpha > -700 else math.inf


def minority_bound(share: float) -> float:
    """alpha <= 1 - rho / (1 - rho): a share rho of the rows cannot pull up an answer that the others do not give, from nothing.

    Where rows look alike to the model, a share rho has the label t and the rest another one. Near p_t = 0 the rare ones push up
    with rho alpha p_t / (1 - alpha) (their kept pull), the others push down with (1 - rho) alpha p_t; the first is larger only
    above the bound. Ours, for epsilon = 0, and about rows that the model does not tell apart yet: a trigger that it sees already
    is not covered. With alpha = alpha_base ** e it holds from the epoch on in which alpha falls below it.

    Args:
        share: rho, the share of poisoned rows to withstand, in (0, 0.5).

    Raises:
        ValueError: another share.

    >>> round(minority_bound(0.05), 3), round(minority_bound(0.01), 3)
    (0.947, 0.99)
    """
    if not 0 < share < 0.5:
        raise ValueError(
            f"`share` must be in (0, 0.5), got {share}: it is the share of rows that are poisoned, and half of them are no "
            "minority. Pass for example 0.05."
        )
    return 1 - share / (1 - share)


def check_fields(log_alpha: float, label_smoothing: float, classes: int | None = None) -> None:
    """Raises ValueError where alpha or epsilon is out of range.

    >>> check_fields(math.log(0.8), 0.05, classes=2)
    """
    if not log_alpha <= 0:  # written so that nan is refused too
        raise ValueError(
            f"`log_alpha` must be at most 0, got {log_alpha}: alpha is the prediction's share of a mixture, in [0, 1]. "
            "Pass math.log(alpha), for example math.log(0.985)."
        )
    limit = 1.0 if classes is None else (classes - 1) / classes
    if not 0 <= label_smoothing < limit:
        raise ValueError(
            f"`label_smoothing` must be in [0, {limit:g}), got {label_smoothing}: from there on the label is no longer "
            "the most likely class. Set 0.05 (the authors' value) or 0.0."
        )


def _log_mixture(logps: Tensor, log_alpha: float, log_label: float) -> Tensor:
    """log(alpha p + (1 - alpha) y), elementwise, for y > 0."""
    if log_alpha == 0:
        return logps
    return torch.logaddexp(logps + log_alpha, logps.new_full((), log_label + log_rest(log_alpha)))


class _DeCE(torch.autograd.Function):
    """Saves nothing but the logits as they came: the backward takes its own softmax, a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor | None, fields: tuple[float, float, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, logps, is_top1 = _blocks(logits, targets, rows, fields)
        ctx.save_for_backward(logits, targets, rows)
        ctx.fields = fields
        ctx.mark_non_differentiable(logps, is_top1)
        return values, logps, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("dece_loss", "dece_loss_reference")
        logits, targets, rows = ctx.saved_tensors
        grad_logits = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
        _blocks(logits, targets, rows, ctx.fields, grad=grad, into=grad_logits)
        return grad_logits, None, None, None


def _blocks(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    fields: tuple[float, float, int],
    *,
    grad: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, log p_t and top-1 of the valid rows; with `into` also the gradient, for the upstream gradient `grad`.

    The buffers are allocated once: on a CPU fresh pages for each block cost more than the arithmetic.
    """
    log_alpha, label_smoothing, chunk_bytes = fields
    count, classes, dtype = targets.numel(), logits.shape[1], working_dtype(logits)
    case, numbers = case_and_numbers(log_alpha, label_smoothing, classes=classes, dtype=dtype)
    most = min(block_rows(classes, logits.device, dtype), chunk_bytes // (3 * classes * dtype.itemsize), count)
    buffers = logits.new_empty((3, max(1, most), classes), dtype=dtype)
    values, logps = (logits.new_empty(count, dtype=dtype) for _ in range(2))
    is_top1 = logits.new_empty(count, dtype=torch.bool)
    for start in range(0, count, buffers.shape[1]):
        part = slice(start, min(start + buffers.shape[1], count))
        scores, *spare = buffers[:, : part.stop - start]
        if rows is not None and logits.dtype == dtype:
            torch.index_select(logits, 0, rows[part], out=scores)
        else:
            scores.copy_(logits[part] if rows is None else logits.index_select(0, rows[part]))
        values[part], logps[part], is_top1[part], change = row_values_and_gradient(
            scores, targets[part], case, numbers, gradient=into is not None, buffers=spare
        )
        if into is None or grad is None:
            continue
        change.mul_(grad[part].unsqueeze(1))
        if rows is None:
            into[part] = change
        else:
            into.index_copy_(0, rows[part], change.to(into.dtype))
    return values, logps, is_top1


def refuse_second_derivative(name: str, other: str) -> None:
    """Raises RuntimeError in a backward with create_graph.

    once_differentiable refuses only where the upstream gradient has a graph. After a plain sum it has none, and a penalty
    on this gradient would silently be a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} cannot be differentiated twice, got create_graph=True: its gradient is a closed form with no graph. "
            f"Drop create_graph, or use {other}."
        )
