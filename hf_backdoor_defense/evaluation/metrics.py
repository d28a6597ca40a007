"""Numbers about a model that may carry a backdoor, in numpy. Shares are in 0..1, never percent.

| word | meaning | here |
|---|---|---|
| CA | accuracy on the clean test set | `accuracy` |
| ASR | share of triggered *non-target* samples predicted as the target | `attack_success_rate` |
| R-Acc | share of the *same* samples predicted as their true label; ASR + R-Acc <= 1 | `recovered_accuracy` |
| FTR | ASR of the clean reference model: the floor of ASR | `false_trigger_rate` |
| DER | [max(0, ASR_before - ASR_after) - max(0, CA_before - CA_after) + 1] / 2 | `defense_effectiveness_rate` |

ASR, R-Acc and DER follow the definitions of BackdoorBench (written anew; its helper takes accuracy from triggered
predictions, ours never does). ASR 0 with R-Acc 0.4 means that the attacker was stopped but the model was not healed; a
collapsed model may have ASR 0 or 1. Always read CA, ASR, FTR and R-Acc together.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval.

    Args:
        value: the point estimate.
        n: samples (for shares) or seeds (for means) behind it.
        low, high: bounds of the confidence interval; None when n is too small for one.

    Example: see `wilson`.
    """

    value: float
    n: int
    low: float | None
    high: float | None


def _vector(name: str, values: ArrayLike, do: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must be a non-empty vector of numbers, got shape {array.shape} and dtype {array.dtype}: "
            f"there is one value per sample. {do}"
        )
    return array


def _classes(name: str, values: ArrayLike) -> np.ndarray:
    array = _vector(name, values, "For logits pass `logits.argmax(-1)`.")
    broken = array[~np.isfinite(array) | (array != np.floor(array))]
    if broken.size:
        raise ValueError(f"`{name}` must be class ids, got {broken[0]}: a score is not a class. Pass the argmax.")
    return array.astype(np.int64)


def _same_length(first: str, one: np.ndarray, second: str, other: np.ndarray) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"`{first}` and `{second}` must have one value per sample, got {one.size} and {other.size}: they are "
            "compared row by row. Take both from the same rows."
        )


def _pairs(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = _classes("predictions", predictions), _classes("labels", labels)
    _same_length("predictions", predicted, "labels", true)
    if true.min() < 0:
        raise ValueError(
            f"`labels` must be >= 0, got {true.min()}: a negative label marks a hidden row. Drop such rows."
        )
    return predicted, true


def _non_target(predictions: ArrayLike, labels: ArrayLike, target: int) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = _pairs(predictions, labels)
    target = operator.index(target)
    if target < 0:
        raise ValueError(f"`target` must be a class id >= 0, got {target}: no label has it. Pass the attacker's class.")
    keep = true != target
    if not keep.any():
        raise ValueError(
            f"`labels` must hold a class other than target {target}, got only that one: a sample of the target class "
            "cannot be attacked. Pass the triggered non-target samples."
        )
    return predicted[keep], true[keep]


def _level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}: it is a share. Pass confidence=0.95.")
    return (1 + confidence) / 2


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Share successes / n with Wilson's score interval (1927, JASA 22), which is sound near 0 and 1, unlike p ± z·s.

    Args:
        successes: 0..n. n: number of independent samples, >= 1. confidence: in (0, 1).

    Raises:
        ValueError: n < 1, successes outside 0..n, confidence outside (0, 1).

    Example:
        >>> e = wilson(0, 100)
        >>> e.value, e.low, round(e.high, 4)
        (0.0, 0.0, 0.037)
    """
    successes, n = operator.index(successes), operator.index(n)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"`successes` must be in 0..n, `n` >= 1, got {successes} of {n}: a share of n. Count samples.")
    z = NormalDist().inv_cdf(_level(confidence))
    p, shrink = successes / n, 1 + z * z / n
    center = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-18.
    return Estimate(p, n, 0.0 if successes == 0 else center - half, 1.0 if successes == n else center + half)


def mean_over_seeds(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of one figure over seeds with Student's t interval (n - 1 degrees of freedom); not clipped to 0..1.

    Args:
        values: [n_seeds] one finite number per seed. One seed gives no interval (low and high are None).

    Raises:
        ValueError: empty, not a vector, not finite, confidence outside (0, 1).

    Example:
        >>> e = mean_over_seeds([0.90, 0.92, 0.94])
        >>> round(e.value, 4), e.n, round(e.low, 4), round(e.high, 4)
        (0.92, 3, 0.8703, 0.9697)
    """
    level = _level(confidence)
    array = _vector("values", values, "Pass one figure per seed.").astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"`values` must be finite, got {array.tolist()}: one failed seed spoils the mean. Rerun it.")
    n, mean = array.size, float(array.mean())
    if n == 1:
        return Estimate(mean, 1, None, None)
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes a second to import

    half = float(stdtrit(n - 1, level) * array.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, n, mean - half, mean + half)


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> Estimate:
    """Share of right predictions, with a Wilson interval; on the clean test set this is CA.

    Args:
        predictions, labels: [n] class ids. A negative prediction (an abstention) is never right.

    Raises:
        ValueError: empty input, unequal lengths, negative labels, values that are not class ids.

    Example:
        >>> accuracy([0, 1, 1, 0], [0, 1, 0, 0]).value
        0.75
    """
    predicted, true = _pairs(predictions, labels)
    return wilson(int((predicted == true).sum()), true.size)


def attack_success_rate(predictions: ArrayLike, labels: ArrayLike, *, target: int) -> Estimate:
    """ASR: share of triggered samples, whose true class is not `target`, that are predicted as `target`.

    Args:
        predictions: [n] class ids on triggered samples.
        labels: [n] *true* class ids; rows of the target class are left out.
        target: the attacker's class.

    Raises:
        ValueError: as `accuracy`; also when every sample is of the target class.

    Example:
        >>> asr = attack_success_rate([1, 1, 0, 1], [0, 0, 0, 1], target=1)
        >>> round(asr.value, 4), asr.n
        (0.6667, 3)
    """
    predicted, true = _non_target(predictions, labels, target)
    return wilson(int((predicted == operator.index(target)).sum()), true.size)


def recovered_accuracy(predictions: ArrayLike, labels: ArrayLike, *, target: int) -> Estimate:
    """R-Acc: share of the samples `attack_success_rate` counts that are predicted as their true class.

    Args and errors: as `attack_success_rate`.

    Example:
        >>> round(recovered_accuracy([1, 1, 0, 1], [0, 0, 0, 1], target=1).value, 4)
        0.3333
    """
    predicted, true = _non_target(predictions, labels, target)
    return wilson(int((predicted == true).sum()), true.size)


def false_trigger_rate(predictions: ArrayLike, labels: ArrayLike, *, target: int) -> Estimate:
    """FTR: `attack_success_rate` of the *clean reference* model on the same triggered samples, the floor of any ASR.

    Args and errors: as `attack_success_rate`; the predictions come from a model that was never poisoned.

    Example:
        >>> false_trigger_rate([0, 0, 0, 1], [0, 0, 0, 0], target=1).value
        0.25
    """
    return attack_success_rate(predictions, labels, target=target)


def defense_effectiveness_rate(*, ca_before: float, ca_after: float, asr_before: float, asr_after: float) -> float:
    """DER in 0..1; 0.5 is "no effect". It hides which half moved and ignores gains in CA: print CA and ASR beside it.

    Args:
        ca_before, asr_before: of the undefended model of the same seed. ca_after, asr_after: of the defended one.

    Raises:
        ValueError: a value outside 0..1 (percent, for instance) or NaN.

    Example:
        >>> round(defense_effectiveness_rate(ca_before=0.95, ca_after=0.93, asr_before=1.0, asr_after=0.02), 4)
        0.98
    """
    given = {"ca_before": ca_before, "ca_after": ca_after, "asr_before": asr_before, "asr_after": asr_after}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in 0..1, got {value}: it is a share. Divide percent by 100.")
    return (max(0.0, asr_before - asr_after) - max(0.0, ca_before - ca_after) + 1) / 2


def _flags(name: str, values: ArrayLike) -> np.ndarray:
    array = _vector(name, values, "Pass one True or False per sample.")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"`{name}` must be True or False (1 or 0) per sample, got {np.unique(array)[:5].tolist()}: it says which "
            "samples are positive. Compare with the wanted class first."
        )
    return array.astype(bool)


def _top(ranked_is_positive: Sequence[bool], k: int) -> tuple[np.ndarray, int]:
    flags, k = _flags("ranked_is_positive", ranked_is_positive), operator.index(k)
    if not 1 <= k <= flags.size:
        raise ValueError(
            f"`k` must be in 1..{flags.size}, got {k}: it counts ranks from the top. Pass a smaller k >= 1."
        )
    return flags, k


def precision_at(ranked_is_positive: Sequence[bool], k: int) -> float:
    """Share of positives among the first k of a ranking, most suspect first.

    Args:
        ranked_is_positive: [n] whether each sample, in ranking order, is positive (poisoned). k: 1..n.

    Raises:
        ValueError: empty ranking, k outside 1..n, values other than True and False.

    Example:
        >>> precision_at([True, False, True, False], 2)
        0.5
    """
    flags, k = _top(ranked_is_positive, k)
    return float(flags[:k].mean())


def recall_at(ranked_is_positive: Sequence[bool], k: int) -> float:
    """Share of all positives that stand among the first k of a ranking.

    Args and errors: as `precision_at`; also a ValueError when there is no positive.

    Example:
        >>> recall_at([True, False, True, False], 3)
        1.0
    """
    flags, k = _top(ranked_is_positive, k)
    if not flags.any():
        raise ValueError(
            "`ranked_is_positive` must hold a positive, got none: recall is a share of them. Poison first."
        )
    return float(flags[:k].sum() / flags.sum())


def auroc(scores: ArrayLike, positives: ArrayLike) -> float:
    """Chance that a random positive scores above a random negative; ties count one half (Mann-Whitney U / (P·N)).

    Args:
        scores: [n] higher means "more likely positive"; infinities are fine. positives: [n] True or False.

    Raises:
        ValueError: empty input, unequal lengths, NaN scores, only positives or only negatives.

    Example:
        >>> auroc([0.9, 0.4, 0.4, 0.1], [True, True, False, False])
        0.875
    """
    values = _vector("scores", scores, "Pass one score per sample.").astype(np.float64)
    flags = _flags("positives", positives)
    _same_length("scores", values, "positives", flags)
    if np.isnan(values).any():
        raise ValueError(f"`scores` must not be NaN, got {np.isnan(values).sum()} of them: NaN has no rank. Fix them.")
    n_positive = int(flags.sum())
    n_negative = flags.size - n_positive
    if n_positive == 0 or n_negative == 0:
        raise ValueError(
            f"`positives` must hold both kinds, got {n_positive} positive and {n_negative} negative: there is no pair "
            "to compare. Score clean and poisoned samples together."
        )
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # [n] from 1; tied scores share their mean rank
    return float((ranks[flags].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
