r"""Scores of a classifier's confidence, and thresholds with a stated false rejection rate.

    score      s = log max softmax(z) = -log1p(sum_{j != top} exp(z_j - z_top))          <= 0, float64
    upper      flag iff s > s_(r),              r = ceil((n + 1)(1 - alpha))
    lower      flag iff s < s_(n + 1 - r)
    both       the two of them with alpha / 2 each

| symbol | variable | shape |
|---|---|---|
| z | `logits` | [rows, classes] |
| s_(1) <= ... <= s_(n) | scores of clean held-out rows, ascending | [n] |
| alpha | `target_frr` | share of clean inputs that may be flagged |

Split conformal prediction: when a new clean row is exchangeable with the n calibration rows, it is flagged with
probability at most alpha, whatever the model. Given one calibration set and scores without ties, the false rejection rate
itself follows Beta(m, n + 1 - m), where m of the n + 1 gaps between the sorted scores lie outside; its central 95 % is
`Calibration.frr_low` to `frr_high`. Comparisons are strict, so ties at a threshold are never flagged.

Source of the score and the rank: arXiv 2402.12168 with its 0.7 replaced (its authors' code has no calibration).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Tail = Literal["upper", "lower", "both"]
TAILS = ("upper", "lower", "both")


def log_confidence(logits: Tensor) -> Tensor:
    """Logarithm of the largest probability, still strictly ordered where the probability itself rounds to 1.

    Args:
        logits: [..., k] of any float type, k >= 2.

    Returns:
        [...] float64, in [-ln k, 0].

    >>> log_confidence(torch.tensor([[0.0, 0.0], [0.0, 40.0]])).exp()
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    gaps = logits.double()
    top = gaps.argmax(-1, keepdim=True)
    gaps = gaps - gaps.gather(-1, top)
    others = gaps.exp().scatter(-1, top, 0.0).sum(-1)
    return -torch.log1p(others)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which scores are flagged: those strictly above `upper` or strictly below `lower` (None: that side is not used).

    `target_frr`: the rate asked for, None for a threshold that was given and not calibrated. `n`: calibration rows.
    `rank`: r of the upper tail (of the lower one it is n + 1 - r). `ties`: calibration scores equal to a threshold.
    `frr_low`, `frr_high`: 95 % interval of the false rejection rate that this calibration has.

    >>> Calibration(tail="upper", upper=-0.5).flags([-0.6, -0.5, -0.4])
    array([False, False,  True])
    """

    tail: Tail
    upper: float | None = None
    lower: float | None = None
    target_frr: float | None = None
    n: int = 0
    rank: int = 0
    ties: int = 0
    frr_low: float | None = None
    frr_high: float | None = None

    def flags(self, scores: ArrayLike) -> np.ndarray:
        """[n] bool: which scores lie outside."""
        values = np.asarray(scores, dtype=np.float64)
        flagged = np.zeros(values.shape, dtype=bool)
        if self.upper is not None:
            flagged |= values > self.upper
        if self.lower is not None:
            flagged |= values < self.lower
        return flagged

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises TypeError for unknown keys."""
        return cls(**values)


def rows_needed(target_frr: float, *, tail: Tail = "both") -> int:
    """The fewest calibration rows with which a rate can be promised at all.

    >>> rows_needed(0.01, tail="upper"), rows_needed(0.01)
    (99, 199)
    """
    _check(target_frr, tail)
    # The rounding of 2 / 0.01 must not cost a row.
    return math.ceil(round((2 if tail == "both" else 1) / target_frr, 9)) - 1


def conformal_threshold(scores: ArrayLike, target_frr: float, *, tail: Tail = "both") -> Calibration:
    """Thresholds that flag a new clean row with probability at most `target_frr`.

    Args:
        scores: [n] of clean rows that the scorer was not trained on; their order does not matter.
        target_frr: in (0, 1). tail: which extremes are suspicious; "both" gives each half of the rate.

    Raises:
        ValueError: too few rows for the rate (says how many are needed), scores that are not finite numbers.

    >>> conformal_threshold(range(99), 0.01, tail="upper").upper
    98.0
    """
    _check(target_frr, tail)
    values = np.sort(np.asarray(scores, dtype=np.float64).reshape(-1))
    n, needed = len(values), rows_needed(target_frr, tail=tail)
    if not np.isfinite(values).all():
        raise ValueError(
            f"calibration scores must be finite, got {int((~np.isfinite(values)).sum())} of {n} that are not: they have no "
            "rank. The model is broken or overflows in half precision: load it in float32."
        )
    if n < needed:
        raise ValueError(
            f"calibration needs at least {needed} clean rows for a false rejection rate of {target_frr:g} "
            f"({'two tails' if tail == 'both' else 'one tail'}), got {n}: with fewer no threshold can promise it. "
            f"Give more clean texts, or ask for a rate of {(2 if tail == 'both' else 1) / (n + 1):.3g} or more."
        )
    share = target_frr / 2 if tail == "both" else target_frr
    rank = math.ceil(round((n + 1) * (1 - share), 9))
    upper = float(values[rank - 1]) if tail != "lower" else None
    lower = float(values[n - rank]) if tail != "upper" else None
    outside = (n + 1 - rank) * (2 if tail == "both" else 1)  # of the n + 1 gaps between sorted scores
    from scipy.stats import beta

    low, high = beta.ppf([0.025, 0.975], outside, n + 1 - outside)
    return Calibration(
        tail=tail,
        upper=upper,
        lower=lower,
        target_frr=float(target_frr),
        n=n,
        rank=rank,
        ties=int(sum((values == threshold).sum() for threshold in {upper, lower} - {None})),
        frr_low=float(low),
        frr_high=float(high),
    )


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share: never covers less than `confidence`, unlike Wilson's.

    Args:
        successes: 0..n. n: independent rows, >= 1.

    >>> [round(bound, 4) for bound in clopper_pearson(0, 100)]
    [0.0, 0.0362]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"`successes` must be in 0..n with n >= 1, got {successes} of {n}: it is a share. Count rows.")
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def _check(target_frr: float, tail: str) -> None:
    if not 0 < target_frr < 1:
        raise ValueError(
            f"`target_frr` must be in (0, 1), got {target_frr}: it is a share of the clean inputs. For 1 % pass 0.01."
        )
    if tail not in TAILS:
        raise ValueError(f"`tail` must be one of {', '.join(TAILS)}, got {tail!r}: nothing else is defined.")
