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
- The gradient is the closed form above, over chunks of rows: logits are cast a chunk at a time, and the only full
  [n, V] tensor that is made is the gradient itself.
- Whoever calls decides on alpha; there is no epoch and no state here.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_backdoor_defense.functional.cross_entropy import valid_rows, working_dtype


def dece_loss(
    logits: Tensor, labels: Tensor, *, log_alpha: float, label_smoothing: float, chunk_bytes: int = 2**28
) -> Tensor:
    """Unreduced DeCE of the rows that carry a label, without a full copy of the logits.

    Args:
        logits: [..., V], already aligned with the labels (`shift_labels` for causal models).
        labels: [...], integers, -100 where there is nothing to learn.
        log_alpha: log of the prediction's share: 0 is label-smoothed cross-entropy, -inf a constant without gradient.
        label_smoothing: in [0, (V-1)/V).
        chunk_bytes: what the two float32 work buffers may take together, in the forward and again in the backward.

    Returns:
        [n_valid], float32 (float64 for float64 logits). Empty, with a graph, where all labels are ignored.

    Prefer `dece_loss_and_target_logps` to log the pull as well, and `dece_loss_from_logps` where there are no logits.

    >>> logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = dece_loss(logits, torch.tensor([0, 1, -100]), log_alpha=math.log(0.8), label_smoothing=0.05)
    >>> loss
    tensor([0.2349, 1.6147], grad_fn=<_DeCEBackward>)
    >>> loss.sum().backward()
    >>> logits.grad[2]
    tensor([0., 0., 0.])
    """
    return dece_loss_and_target_logps(
        logits, labels, log_alpha=log_alpha, label_smoothing=label_smoothing, chunk_bytes=chunk_bytes
    )[0]


def dece_loss_and_target_logps(
    logits: Tensor, labels: Tensor, *, log_alpha: float, label_smoothing: float, chunk_bytes: int = 2**28
) -> tuple[Tensor, Tensor]:
    """`dece_loss`, and the labels' log-probabilities that it comes across on the way.

    Arguments as in `dece_loss`. Returns two tensors [n_valid]: the loss, and log p_t without a graph, from which
    `target_pull` follows without another pass over the vocabulary.

    >>> _, logps = dece_loss_and_target_logps(
    ...     torch.zeros(1, 4), torch.tensor([2]), log_alpha=math.log(0.8), label_smoothing=0.05)
    >>> target_pull(logps, log_alpha=math.log(0.8), label_smoothing=0.05)
    tensor([0.5128])
    """
    flat, targets, rows = valid_rows(logits, labels)
    _check(log_alpha, label_smoothing, flat.shape[1])
    if chunk_bytes < 1:
        raise ValueError(f"`chunk_bytes` must be positive, got {chunk_bytes}: chunks hold one row at least. Set 2**28.")
    loss, target_logps = _DeCE.apply(flat, targets, rows, (log_alpha, label_smoothing, chunk_bytes))
    return loss, target_logps


def dece_loss_reference(logits: Tensor, labels: Tensor, *, log_alpha: float, label_smoothing: float) -> Tensor:
    """`dece_loss` written directly, with autograd's gradient and about five full copies of the logits: for tests.

    Arguments and result as in `dece_loss`, without `chunk_bytes`. It can be differentiated twice.

    >>> dece_loss_reference(torch.zeros(1, 4), torch.tensor([2]), log_alpha=math.log(0.5), label_smoothing=0.0)
    tensor([0.4700])
    """
    flat, targets, rows = valid_rows(logits, labels)
    _check(log_alpha, label_smoothing, flat.shape[1])
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
    _check(log_alpha, 0.0)
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
    _check(log_alpha, label_smoothing)
    logps = target_logps.to(working_dtype(target_logps))
    if log_alpha == 0:
        return torch.ones_like(logps)
    return (logps + (log_alpha - _log_rest(log_alpha) - math.log1p(-label_smoothing))).sigmoid()


def threshold(*, log_alpha: float, label_smoothing: float) -> float:
    """tau = (1 - alpha)(1 - epsilon) / alpha: a label less likely than this keeps less than half of its pull.

    From tau >= 1 on nearly everything is ignored, clean or not. `log_alpha = -inf` gives inf.

    >>> round(threshold(log_alpha=math.log(0.985), label_smoothing=0.05), 4)
    0.0145
    """
    _check(log_alpha, label_smoothing)
    # Not from alpha, which underflows late in a long run. Beyond -700 the quotient itself leaves the floats.
    return math.expm1(-log_alpha) * (1 - label_smoothing) if log_alpha > -700 else math.inf


def _check(log_alpha: float, label_smoothing: float, classes: int | None = None) -> None:
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


def _log_rest(log_alpha: float) -> float:
    """log(1 - alpha) for alpha < 1, accurate at both ends."""
    return math.log(-math.expm1(log_alpha))


def _log_mixture(logps: Tensor, log_alpha: float, log_label: float) -> Tensor:
    """log(alpha p + (1 - alpha) y), elementwise, for y > 0."""
    if log_alpha == 0:
        return logps
    return torch.logaddexp(logps + log_alpha, logps.new_full((), log_label + _log_rest(log_alpha)))


def _chunks(
    logits: Tensor, rows: Tensor | None, count: int, chunk_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk: which of the valid rows, their logits in a float32 buffer to spoil, and a second buffer.

    The buffers are allocated once: on a CPU fresh pages for each chunk cost more than the arithmetic.
    """
    classes, dtype = logits.shape[1], working_dtype(logits)
    size = max(1, min(count, chunk_bytes // (2 * classes * dtype.itemsize)))
    buffers = logits.new_empty((2, size, classes), dtype=dtype)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        work, spare = buffers[:, : part.stop - start]
        if rows is not None and logits.dtype == dtype:
            torch.index_select(logits, 0, rows[part], out=work)
        else:
            work.copy_(logits[part] if rows is None else logits.index_select(0, rows[part]))
        yield part, work, spare


class _DeCE(torch.autograd.Function):
    """Saves the logits as they came and three values per row: lse, log p_t, and G's part from outside of the target."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor | None, fields: tuple[float, float, int]
    ) -> tuple[Tensor, Tensor]:
        log_alpha, label_smoothing, chunk_bytes = fields
        count, others = targets.numel(), logits.shape[1] - 1
        share = label_smoothing / others
        lse, target_logps, off_loss, off_gain = (logits.new_zeros(count, dtype=working_dtype(logits)) for _ in range(4))
        for part, work, spare in _chunks(logits, rows, count, chunk_bytes):
            target = targets[part].unsqueeze(1)
            top = work.amax(-1, keepdim=True)
            log_sum = torch.exp(work.sub_(top), out=spare).sum(-1, keepdim=True).log_()
            lse[part] = (top + log_sum).squeeze(1)
            # Not z_t - lse: next to a large `top`, a confident row's log p_t would drown in lse's rounding.
            target_logps[part] = (work.gather(1, target) - log_sum).squeeze(1)
            if label_smoothing == 0:
                continue
            if log_alpha == 0:
                work.scatter_(1, target, 0.0)
                off_loss[part] = share * (others * log_sum.squeeze(1) - work.sum(-1))
                off_gain[part] = label_smoothing
                continue
            # x = log(alpha p / ((1 - alpha) y)); then log q = log((1 - alpha) y) + softplus(x) and r = sigmoid(x).
            log_label = _log_rest(log_alpha) + math.log(share)
            work.add_(log_alpha - log_label - log_sum).scatter_(1, target, -math.inf)
            torch.logaddexp(work, work.new_zeros(()), out=work)  # F.softplus rounds its argument off beyond 20
            off_loss[part] = -label_smoothing * log_label - share * work.sum(-1)
            off_gain[part] = -share * work.neg_().expm1_().sum(-1)  # sigmoid(x) = -expm1(-softplus(x))
        log_q_t = _log_mixture(target_logps, log_alpha, math.log1p(-label_smoothing))
        loss = off_loss - (1 - label_smoothing) * log_q_t
        ctx.save_for_backward(logits, targets, rows, lse, target_logps, off_gain)
        ctx.fields = fields
        ctx.mark_non_differentiable(target_logps)
        return loss, target_logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable refuses only where the upstream gradient has a graph. After a plain sum it has none, and a
        # penalty on this gradient would silently be a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dece_loss cannot be differentiated twice, got create_graph=True: its gradient is a closed form with "
                "no graph. Drop create_graph, or use dece_loss_reference."
            )
        logits, targets, rows, lse, target_logps, off_gain = ctx.saved_tensors
        log_alpha, label_smoothing, chunk_bytes = ctx.fields
        share = label_smoothing / (logits.shape[1] - 1)
        pull = target_pull(target_logps, log_alpha=log_alpha, label_smoothing=label_smoothing)
        on_gain = (1 - label_smoothing) * pull
        # G p_t - y_t r_t without its cancellation as p_t approaches 1.
        grad_target = grad * (on_gain * target_logps.expm1() + off_gain * target_logps.exp())
        grad_prediction = grad * (on_gain + off_gain)
        grad_logits = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
        for part, work, spare in _chunks(logits, rows, targets.numel(), chunk_bytes):
            work.sub_(lse[part].unsqueeze(1))  # log p
            if log_alpha == 0:
                spare.fill_(1.0)  # r_k outside of the target
            elif label_smoothing > 0:
                log_label = _log_rest(log_alpha) + math.log(share)
                torch.add(work, log_alpha - log_label, out=spare).sigmoid_()
            work.exp_().mul_(grad_prediction[part].unsqueeze(1))
            if label_smoothing > 0:
                work.addcmul_(spare, grad[part].unsqueeze(1), value=-share)
            work.scatter_(1, targets[part].unsqueeze(1), grad_target[part].unsqueeze(1))
            if rows is None:
                grad_logits[part] = work
            else:
                grad_logits.index_copy_(0, rows[part], work.to(logits.dtype))
        return grad_logits, None, None, None
