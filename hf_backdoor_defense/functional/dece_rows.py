r"""What DeCE does with one row of scores: value, log-probability of the label, gradient, in one place for both paths.

    p = softmax(z)                    k = alpha / ((1 - alpha) s),   c = alpha / (1 - alpha) = s k
    r_j = k p_j / (1 + k p_j) = 1 - v_j,   v_j = 1 / (1 + k p_j)          for j other than the label t
    L   = -(1 - eps) log q_t - eps log((1 - alpha) s) + s sum_j log v_j   the sums run over j != t
    G   = (1 - eps) r_t + c sum_j p_j v_j
    dL/dz_j = p_j (G - c v_j),        dL/dz_t = (1 - eps) r_t (p_t - 1) + (G - (1 - eps) r_t) p_t

| symbol | variable | shape / value |
|---|---|---|
| z | `scores` | [n, V], fp32 or float64; spoiled, and the gradient afterwards |
| t | `targets` | [n] |
| alpha, eps, s | exp(`log_alpha`), `label_smoothing`, `share` = eps / (V - 1) | scalars |
| k, c | `odds`, `reach` | scalars |

Three cases: no smoothing (nothing but the label counts), smoothing without mixture (r_j = 1), smoothing with it. Every
probability enters as a ratio that can neither overflow nor cancel: p_t - 1 is expm1(log p_t), G - c v_j is exact where
k p_j is small. log v_j rounds at 1 and is weighted by s, which bounds its error by eps times one rounding.

`dece.py` calls this on blocks of logits, `linear_dece.py` on blocks of a product. On a CPU the operations write into
three buffers that stay in the cache; on a GPU the same function without buffers is compiled into one kernel.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Which of the three forms holds; all else about alpha and eps is in `Numbers`."""

    smoothed: bool  # eps > 0
    mixed: bool  # alpha < 1, as far as the classes besides the label can tell
    target_mixed: bool  # alpha < 1


class Numbers(NamedTuple):
    """The scalars of the formula: floats, or 0-dimensional tensors for a compiled function, which they must not specialize."""

    log_alpha: Any
    log_label: Any  # log((1 - alpha)(1 - eps)): of the label
    log_share: Any  # log((1 - alpha) s): of every other class
    on: Any  # 1 - eps
    eps: Any
    share: Any
    odds: Any
    reach: Any


def log_rest(log_alpha: float) -> float:
    """log(1 - alpha) for alpha < 1, accurate at both ends.

    >>> log_rest(math.log(0.5)) == math.log(0.5)
    True
    """
    return math.log(-math.expm1(log_alpha))


def case_and_numbers(
    log_alpha: float, label_smoothing: float, *, classes: int, dtype: torch.dtype
) -> tuple[Case, Numbers]:
    """Everything about alpha and eps that a row needs.

    Where log k leaves the floats of `dtype`, 1 - alpha is below their resolution or eps is next to nothing: the classes
    besides the label are then treated as with alpha = 1.

    >>> case_and_numbers(0.0, 0.1, classes=11, dtype=torch.float32)[1].share
    0.01
    """
    share = label_smoothing / (classes - 1)
    rest = log_rest(log_alpha) if log_alpha < 0 else -math.inf
    mixed = bool(log_alpha < 0 and share > 0)
    log_share = rest + math.log(share) if mixed else 0.0
    if mixed and log_alpha - log_share > (600 if dtype == torch.float64 else 80):
        mixed = False
    odds = math.exp(log_alpha - log_share) if mixed else 0.0
    numbers = Numbers(
        log_alpha=log_alpha,
        log_label=rest + math.log1p(-label_smoothing),
        log_share=log_share,
        on=1 - label_smoothing,
        eps=label_smoothing,
        share=share,
        odds=odds,
        reach=share * odds,
    )
    return Case(smoothed=label_smoothing > 0, mixed=mixed, target_mixed=log_alpha < 0), numbers


def row_values_and_gradient(
    scores: Tensor,
    targets: Tensor,
    case: Case,
    numbers: Numbers,
    *,
    softcap: float | None = None,
    gradient: bool = True,
    buffers: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row and its gradient for an upstream gradient of 1.

    Args:
        scores: [n, V], float32 or float64; with buffers they are spoiled.
        targets: [n], int64.
        softcap: c; the scores become c tanh(z / c) first, and the gradient is the one with respect to z.
        gradient: whether it is wanted.
        buffers: two (three with a soft-cap) of [n, V] to work in, or None for a function that writes nowhere.

    Returns:
        values [n], log p_t [n], whether the label scores highest [n], gradient [n, V] (in the place of the scores where
        there are buffers; anything without `gradient`).

    >>> case, numbers = case_and_numbers(0.0, 0.0, classes=3, dtype=torch.float32)
    >>> values, logps, is_top1, grad = row_values_and_gradient(torch.zeros(1, 3), torch.tensor([1]), case, numbers)
    >>> grad
    tensor([[ 0.3333, -0.6667,  0.3333]])
    """
    here, first, second, third = _places(scores, buffers)
    target = targets.unsqueeze(1)
    columns = torch.arange(scores.shape[1], device=scores.device) if buffers is None else None

    def put(into: Tensor, value: Any) -> Tensor:
        """A value at each row's label: in place, or as a comparison, which a compiler can fuse where a scatter it cannot."""
        return into.scatter_(1, target, value) if columns is None else torch.where(columns == target, value, into)

    slope = None
    if softcap is not None:
        bent = torch.tanh(torch.mul(scores, 1 / softcap, out=here), out=here)
        slope = torch.sub(1.0, torch.square(bent, out=third), out=third)
        scores = torch.mul(bent, softcap, out=here)

    top = scores.amax(-1, keepdim=True)
    at_target = scores.gather(1, target)
    below = torch.sub(scores, top, out=here)
    p = torch.exp(below, out=first)
    total = p.sum(-1, keepdim=True)
    # Not z_t - lse: next to a large `top`, a confident row's log p_t would drown in lse's rounding.
    logps = at_target - top - total.log()  # [n, 1]
    log_q, on_gain = logps, numbers.on * torch.ones_like(logps)
    if case.target_mixed:
        log_q = torch.logaddexp(logps + numbers.log_alpha, torch.zeros_like(logps) + numbers.log_label)
        on_gain = numbers.on * (logps + (numbers.log_alpha - numbers.log_label)).sigmoid()
    values, off_gain, change = -numbers.on * log_q, torch.zeros_like(logps), p

    if case.mixed:
        p = torch.mul(p, 1 / total, out=first)
        v = torch.reciprocal(_axpy(torch.ones_like(logps[:1]), p, numbers.odds, second), out=second)
        v = put(v, 1.0)
        logs = torch.log(v, out=here)
        values = values - numbers.eps * numbers.log_share + numbers.share * logs.sum(-1, keepdim=True)
        v = put(v, 0.0)
        off_gain = numbers.reach * _row_dot(p, v, here)
        if gradient:
            change = torch.mul(p, _axpy(on_gain + off_gain, v, -numbers.reach, second), out=here)
    elif case.smoothed:
        # log q = log p outside of the label: r = 1, and the sum of log p needs the scores only.
        others = scores.shape[1] - 1
        below = put(below, 0.0)
        values = values + numbers.share * (others * total.log() - below.sum(-1, keepdim=True))
        off_gain = numbers.eps * torch.ones_like(logps)
        if gradient:
            change = torch.mul(p, (on_gain + off_gain) / total, out=first)
            change = torch.sub(change, numbers.share, out=here)
    elif gradient:
        change = torch.mul(p, on_gain / total, out=here)
    if gradient:
        change = put(change, on_gain * logps.expm1() + off_gain * logps.exp())
        if slope is not None:
            change = torch.mul(change, slope, out=here)
    return values.squeeze(1), logps.squeeze(1), (at_target == top).squeeze(1), change


def _places(scores: Tensor, buffers: Sequence[Tensor] | None) -> tuple[Tensor | None, ...]:
    """Where results go: onto the scores and into up to three buffers, or into new tensors."""
    if buffers is None:
        return None, None, None, None
    return scores, buffers[0], buffers[1], buffers[2] if len(buffers) > 2 else None


def _axpy(a: Tensor, x: Tensor, factor: Any, out: Tensor | None) -> Tensor:
    """a + factor x, in one pass over memory where the factor is a number."""
    return a + factor * x if out is None else torch.add(a, x, alpha=factor, out=out)


def _row_dot(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """[n, 1]: the product of each pair of rows."""
    return torch.mul(a, b, out=out).sum(-1, keepdim=True)
