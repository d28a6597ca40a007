"""Losses that DeCE is compared with: generalized cross-entropy, in-trust and focal loss.

Formulas, per position with a label; CE = -log p_t:

    GCE       (1 - p_t^q) / q
    in-trust  a CE - b sum_k p_k log(d p_k + (1 - d) y_k)
    focal     (1 - p_t)^g CE

| symbol | variable | shape / value |
|---|---|---|
| p, t | softmax of `logits`, `labels` | [..., classes]; [...], integers, -100 = ignored |
| log p_t | `target_logps` | [n_valid] |
| q | `q` | scalar in [0, 1]; 0 is the limit, cross-entropy; 1 is 1 - p_t |
| a, b, d | `alpha`, `beta`, `delta` | scalars |
| y | 1 at t, `label_floor` elsewhere | never materialized; a hard zero would make the logarithm infinite as d p_k vanishes |
| g | `gamma` | scalar, at least 0; 0 is cross-entropy |
| result | | [n_valid], unreduced, float32 (float64 for float64 logits) |

GCE and focal loss need nothing but log p_t, so their gradients are cross-entropy's times a factor r, the pull:

    r = p_t^q  (GCE)        r = (1 - p_t)^g - g p_t (1 - p_t)^(g-1) log p_t  (focal)

Sources: GCE, arXiv 1805.07836; focal loss, arXiv 1708.02002; in-trust, "Named Entity Recognition via Noise Aware Training
Mechanism with Data Filter", Findings of ACL 2021. GCE and in-trust in the form, and with the constants, of DeCE's authors
(NTDXYG/DeCE, commit f34241a). Deviation from that code: no clamp of p at 1e-7, which takes the gradient of every less
likely class away; everything starts from log-probabilities instead and stays finite.
"""

import math

import torch
from torch import Tensor

from hf_backdoor_defense.functional.cross_entropy import cross_entropy, valid_rows, working_dtype


def gce_loss(logits: Tensor, labels: Tensor, *, q: float = 0.5) -> Tensor:
    """[n_valid] generalized cross-entropy: between cross-entropy (`q` = 0) and the mean absolute error (`q` = 1).

    Args:
        logits: [..., classes], already aligned with the labels.
        labels: [...], integers, -100 where there is nothing to learn.
        q: in [0, 1].

    A label that surprises the model keeps p_t^q of its pull from the first step on. Prefer `dece_loss` where clean
    labels surprise as well at first: its mixture with the label is annealed.

    >>> gce_loss(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2]))
    tensor([1.])
    """
    return gce_loss_from_logps(-cross_entropy(logits, labels), q=q)


def gce_loss_from_logps(target_logps: Tensor, *, q: float = 0.5) -> Tensor:
    """`gce_loss` from the labels' log-probabilities, any shape.

    >>> gce_loss_from_logps(torch.tensor([0.25, 0.01]).log())
    tensor([1.0000, 1.8000])
    """
    _check_share("q", q, "an exponent between cross-entropy and the absolute error")
    return -target_logps if q == 0 else -torch.expm1(q * target_logps) / q


def gce_pull(target_logps: Tensor, *, q: float = 0.5) -> Tensor:
    """r = p_t^q: the share of cross-entropy's pull toward the label that GCE keeps.

    >>> gce_pull(torch.tensor([0.25, 1.0]).log())
    tensor([0.5000, 1.0000])
    """
    _check_share("q", q, "an exponent between cross-entropy and the absolute error")
    return (q * target_logps).exp()


def focal_loss(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """[n_valid] focal loss: cross-entropy that lets go of what is learned already.

    Args:
        logits, labels: as in `gce_loss`.
        gamma: at least 0.

    It does the opposite of `gce_loss`: a surprising label keeps its pull and a certain one loses it. As a comparator it
    is the negative control; for poisoned labels prefer any other loss here.

    >>> focal_loss(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([2]))
    tensor([0.7798])
    """
    return focal_loss_from_logps(-cross_entropy(logits, labels), gamma=gamma)


def focal_loss_from_logps(target_logps: Tensor, *, gamma: float = 2.0) -> Tensor:
    """`focal_loss` from the labels' log-probabilities, any shape.

    >>> focal_loss_from_logps(torch.tensor([0.25, 0.99]).log())
    tensor([7.7979e-01, 1.0050e-06])
    """
    _check_gamma(gamma)
    return -target_logps if gamma == 0 else -(_rest(target_logps) ** gamma) * target_logps


def focal_pull(target_logps: Tensor, *, gamma: float = 2.0) -> Tensor:
    """r of focal loss: near 1 for surprising labels (above 1 for those a little less so), 0 for certain ones.

    >>> focal_pull(torch.tensor([0.001, 0.25, 0.75]).log())
    tensor([1.0118, 1.0824, 0.1704])
    """
    _check_gamma(gamma)
    if gamma == 0:
        return torch.ones_like(target_logps)
    rest = _rest(target_logps)
    return rest**gamma - gamma * target_logps.exp() * rest ** (gamma - 1) * target_logps


def in_trust_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.8,
    delta: float = 0.5,
    label_floor: float = 1e-4,
) -> Tensor:
    """[n_valid] in-trust loss: cross-entropy plus a term that trusts the prediction as much as the label.

    Args:
        logits, labels: as in `gce_loss`.
        alpha: weight of cross-entropy, at least 0.
        beta: weight of the second term, at least 0.
        delta: share of the prediction inside the second term's logarithm, in [0, 1].
        label_floor: what the label gives to each other class, in (0, 1).

    The second term weighs by the prediction where DeCE weighs by the label, and it does not change over the epochs.

    >>> in_trust_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.8081])
    """
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"`{name}` must be finite and at least 0, got {weight}: it weighs a loss. Set 0.2 and 0.8."
            )
    return alpha * cross_entropy(logits, labels) + beta * distrust(logits, labels, delta=delta, label_floor=label_floor)


def distrust(logits: Tensor, labels: Tensor, *, delta: float = 0.5, label_floor: float = 1e-4) -> Tensor:
    """[n_valid] the second term of `in_trust_loss`: -sum_k p_k log(d p_k + (1 - d) y_k), never negative.

    Arguments as in `in_trust_loss`. Near 0 where the model is certain of the label, and bounded where it is certain of
    another class: there it is about -log d.

    >>> distrust(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]))
    tensor([0.0012, 0.6932])
    """
    _check_share("delta", delta, "the prediction's share of a mixture")
    if not 0 < label_floor < 1:
        raise ValueError(
            f"`label_floor` must be in (0, 1), got {label_floor}: without it the logarithm of a class that is neither "
            "predicted nor labeled is infinite. Set 1e-4."
        )
    flat, targets, rows = valid_rows(logits, labels)
    flat = flat if rows is None else flat.index_select(0, rows)
    logps = flat.to(working_dtype(flat)).log_softmax(-1)  # [n_valid, classes]
    if delta == 1:
        mixture = logps
    else:
        log_y = torch.full_like(logps, math.log(label_floor)).scatter(1, targets.unsqueeze(1), 0.0)
        mixture = log_y + math.log1p(-delta)
        if delta > 0:
            mixture = torch.logaddexp(logps + math.log(delta), mixture)
    return -(logps.exp() * mixture).sum(-1)


def _rest(target_logps: Tensor) -> Tensor:
    """1 - p_t, never quite 0: there a power below 1 has an infinite slope, and infinity times log 1 is not a number."""
    return (-torch.expm1(target_logps)).clamp_min(torch.finfo(target_logps.dtype).tiny)


def _check_share(name: str, value: float, what: str) -> None:
    if not 0 <= value <= 1:  # written so that nan is refused too
        raise ValueError(f"`{name}` must be in [0, 1], got {value}: it is {what}. Set 0.5.")


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(
            f"`gamma` must be finite and at least 0, got {gamma}: below 0 a certain label would pull without bound. Set 2.0."
        )
