"""What a filter before a classifier does to the numbers, in numpy: flagged rows are rejected, never dropped.

With n clean test rows and m triggered rows whose true class is not the target:

| figure | definition |
|---|---|
| CA (strict) | (accepted and right) / n: a rejected clean row is a loss |
| coverage | accepted / n |
| selective CA | (accepted and right) / accepted |
| ASR | (accepted and predicted as the target) / m |
| R-Acc | (accepted and predicted as the true class) / m |
| FRR | flagged clean rows / n |
| FAR | passed triggered rows / m |
| AUROC | chance that a triggered row scores on the suspicious side of a clean one; of a two-sided filter, that it scores higher |

The AUROC of a two-sided filter is as good at 0 as at 1: on which side a trigger lies is not known before. A filter that edits
texts instead (ONION) rejects nothing: FRR is the share of clean rows it edits, FAR that of triggered rows it leaves as they are.
One rule decides for clean and for triggered rows; it is applied before this module sees the rows.
"""

import numpy as np
from numpy.typing import ArrayLike

from hf_backdoor_defense.evaluation.metrics import (
    Estimate,
    accuracy,
    attack_success_rate,
    auroc,
    recovered_accuracy,
    wilson,
)

REJECTED = -1  # the prediction of a row that never reached the classifier


def filtered_scores(
    clean_predicted: ArrayLike,
    clean_labels: ArrayLike,
    clean_flagged: ArrayLike,
    triggered_predicted: ArrayLike,
    triggered_labels: ArrayLike,
    triggered_flagged: ArrayLike,
    *,
    target: int,
    clean_scores: ArrayLike | None = None,
    triggered_scores: ArrayLike | None = None,
    tail: str = "both",
    rejects: bool = True,
) -> dict[str, Estimate]:
    """The module's table, shares with Wilson's interval. `selective_ca` is left out where nothing was accepted, `auroc`
    where no scores are given; AUROC has no interval.

    Args:
        clean_predicted, clean_labels, clean_flagged: [n] class ids of the classifier, true class ids, True where rejected.
        triggered_predicted, triggered_labels, triggered_flagged: the same for triggered rows; those of the target
            class are left out, so m may be below their number.
        target: the attacker's class.
        clean_scores, triggered_scores: what the filter judged by, both or neither.
        tail: which of them are suspicious, "upper", "lower" or "both", as the filter said before it saw triggered data.
        rejects: False for a filter that edits texts: a flagged row is an edited one, its prediction is that of the edited
            text, and it counts as accepted.

    Raises:
        ValueError: unequal lengths, no rows, flags that are not True or False, one kind of scores without the other.

    Example:
        >>> scores = filtered_scores([1, 0, 1], [1, 0, 0], [False, True, False], [1, 1], [0, 0], [True, False], target=1)
        >>> {name: round(estimate.value, 2) for name, estimate in scores.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'ca': 0.33, 'coverage': 0.67, 'selective_ca': 0.5, 'asr': 0.5, 'r_acc': 0.0, 'frr': 0.33, 'far': 0.5}
    """
    if (clean_scores is None) != (triggered_scores is None):
        raise ValueError(
            "`clean_scores` and `triggered_scores` must be given together, got one: AUROC compares the two. Pass both or "
            "neither."
        )
    if tail not in ("upper", "lower", "both"):
        raise ValueError(
            f"`tail` must be upper, lower or both, got {tail!r}: nothing else is suspicious. Pass the filter's."
        )
    labels = np.asarray(triggered_labels)
    clean_flags = _flags("clean_flagged", clean_flagged, len(np.asarray(clean_labels)))
    triggered_flags = _flags("triggered_flagged", triggered_flagged, len(labels))
    clean, triggered = np.asarray(clean_predicted), np.asarray(triggered_predicted)
    n = accepted = len(clean_flags)
    if rejects:
        clean = np.where(clean_flags, REJECTED, clean)
        triggered = np.where(triggered_flags, REJECTED, triggered)
        accepted = int((~clean_flags).sum())
    attacked = labels != target
    asr = attack_success_rate(triggered, labels, target=target)
    scores = {"ca": accuracy(clean, clean_labels), "coverage": wilson(accepted, n)}
    if accepted:
        scores["selective_ca"] = wilson(int((clean == np.asarray(clean_labels)).sum()), accepted)
    scores["asr"] = asr
    scores["r_acc"] = recovered_accuracy(triggered, labels, target=target)
    scores["frr"] = wilson(int(clean_flags.sum()), n)
    scores["far"] = wilson(int((~triggered_flags)[attacked].sum()), asr.n)
    if clean_scores is not None and triggered_scores is not None:
        s0, s1 = np.asarray(clean_scores), np.asarray(triggered_scores)[attacked]
        if tail == "lower":
            s0, s1 = -s0, -s1
        value = auroc(np.concatenate([s1, s0]), [True] * len(s1) + [False] * len(s0))
        scores["auroc"] = Estimate(value, len(s0) + len(s1), None, None)
    return scores


def _flags(name: str, values: ArrayLike, n: int) -> np.ndarray:
    flags = np.asarray(values)
    if flags.shape != (n,) or flags.dtype != bool:
        raise ValueError(
            f"`{name}` must be one True or False per row, got shape {flags.shape} and dtype {flags.dtype} for {n} rows: a "
            "row is accepted or rejected. Pass what `Filter.flag` returns."
        )
    return flags
