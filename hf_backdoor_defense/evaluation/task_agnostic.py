r"""How well triggers planted in a pretrained model work on a classifier fine-tuned from it, in numpy. Shares are in 0..1.

    ASR(t, c)  = share of the rows with label != c that are predicted as c once t is inserted
    ASR(t)     = max_c ASR(t, c)          AASR = mean_t ASR(t)          MASR = max_t ASR(t)

| symbol | variable | shape |
|---|---|---|
| t, c | trigger, class | T, k of them |
| ASR(t, c) | `per_trigger_class` | [T, k] |
| ASR(t) | `per_trigger` | [T] |
| argmax_c | `target_class` | [T] |

The attacker of a pretrained model does not know the task, so which class a trigger leads to is found here. AASR and MASR are
named in RECIPE's repository (thunlp/RECIPE), which does not aggregate; the aggregation is that of das-sunanda/DiSec.

**A maximum over classes is above zero for every model**: a clean one reaches about its worse error per class. The same table
of the clean model on the same rows is the floor, and a claim is made on the difference, for which `bootstrap` gives an
interval. Maxima are biased upward in small test sets, for model and floor alike: use 500 rows or more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hf_backdoor_defense.evaluation.metrics import Estimate


@dataclass(frozen=True, eq=False)
class TaskAgnosticASR:
    """ASR of each trigger toward each class, and what follows from it. Example: see `task_agnostic_asr`.

    Args:
        triggers: their names, in the order of the rows.
        per_trigger_class: [T, k]; NaN where every row has that class, as there is no row to lead to it.
    """

    triggers: tuple[str, ...]
    per_trigger_class: np.ndarray

    @property
    def per_trigger(self) -> np.ndarray:
        """[T] the class that the trigger reaches best decides."""
        return np.nanmax(self.per_trigger_class, axis=-1)

    @property
    def target_class(self) -> np.ndarray:
        """[T] that class; the first of several equal ones."""
        return np.nanargmax(self.per_trigger_class, axis=-1)

    @property
    def aasr(self) -> float:
        """Mean over triggers."""
        return float(self.per_trigger.mean())

    @property
    def masr(self) -> float:
        """Maximum over triggers."""
        return float(self.per_trigger.max())


def task_agnostic_asr(
    labels: ArrayLike, triggered_predictions: Mapping[str, ArrayLike], n_classes: int
) -> TaskAgnosticASR:
    """The table of ASR by trigger and class.

    Args:
        labels: [n] true class ids.
        triggered_predictions: for each trigger, [n] class ids predicted on the *same* rows with it inserted. A negative one
            (an abstention) is no class's success.
        n_classes: k >= 2; classes that no label has count too.

    Raises:
        ValueError: no rows, no triggers, lengths that differ, fewer than two classes, values outside the classes.

    >>> table = task_agnostic_asr([0, 0, 1, 1], {"cf": [1, 1, 1, 1], "mn": [0, 1, 0, 1]}, 2)
    >>> table.per_trigger_class.tolist(), table.target_class.tolist()
    ([[0.0, 1.0], [0.5, 0.5]], [1, 0])
    >>> table.aasr, table.masr
    (0.75, 1.0)
    """
    true = _class_ids("labels", labels, n_classes, lowest=0)
    hits, others = _hits(true, triggered_predictions, n_classes)
    ones = np.ones((1, true.size))
    return TaskAgnosticASR(tuple(triggered_predictions), _rates(ones, hits, others)[0])


def bootstrap(
    labels: ArrayLike,
    model_predictions: Mapping[str, ArrayLike],
    floor_predictions: Mapping[str, ArrayLike],
    n_classes: int,
    *,
    seed: int = 0,
    n_boot: int = 1000,
) -> dict[str, Estimate]:
    """AASR and MASR of a model, of its floor, and their differences, with 95 % percentile intervals.

    Rows are drawn with replacement, the same ones for model and floor and for all triggers, and the maxima are taken anew in each
    draw. Since a maximum rises with noise, an interval may lie somewhat above its value; in the difference this cancels in part.

    Args:
        labels, n_classes: as `task_agnostic_asr`.
        model_predictions: of the model that is judged, by trigger.
        floor_predictions: of the clean model on the same rows with the same triggers.

    Returns:
        `aasr`, `masr`, `aasr_floor`, `masr_floor`, `aasr_over_floor`, `masr_over_floor`; n is the number of rows.

    Raises:
        ValueError: as `task_agnostic_asr`; also when the triggers differ, or for n_boot < 1.

    >>> figures = bootstrap([0, 1] * 50, {"cf": [1] * 100}, {"cf": [0, 1] * 50}, 2)
    >>> figures["aasr_over_floor"]
    Estimate(value=1.0, n=100, low=1.0, high=1.0)
    """
    if n_boot < 1:
        raise ValueError(
            f"`n_boot` must be at least 1, got {n_boot}: an interval is read from that many draws. Pass 1000."
        )
    if set(model_predictions) != set(floor_predictions):
        raise ValueError(
            f"`model_predictions` and `floor_predictions` must hold the same triggers, got {sorted(model_predictions)} and "
            f"{sorted(floor_predictions)}: the floor is that of these triggers. Predict the same texts with both models."
        )
    true = _class_ids("labels", labels, n_classes, lowest=0)
    n = true.size
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)  # how often each row was drawn
    weights = np.concatenate([np.ones((1, n)), draws])  # [1 + n_boot, n]: the sample itself first
    figures = {}
    for suffix, predictions in (("", model_predictions), ("_floor", floor_predictions)):
        best = np.nanmax(_rates(weights, *_hits(true, predictions, n_classes)), axis=-1)  # [1 + n_boot, T]
        figures[f"aasr{suffix}"], figures[f"masr{suffix}"] = best.mean(-1), best.max(-1)
    for name in ("aasr", "masr"):
        figures[f"{name}_over_floor"] = figures[name] - figures[f"{name}_floor"]
    return {name: _estimate(values, n) for name, values in figures.items()}


def _estimate(values: np.ndarray, n: int) -> Estimate:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Estimate(float(values[0]), n, float(low), float(high))


def _hits(true: np.ndarray, predictions: Mapping[str, ArrayLike], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """[n, T, k] whether a trigger led a row to a class it does not have, and [n, k] whether it does not have it."""
    if not predictions:
        raise ValueError(
            "`triggered_predictions` must hold a trigger, got none: there is nothing to average. Give one."
        )
    columns = []
    for trigger, values in predictions.items():
        predicted = _class_ids(f"predictions for {trigger!r}", values, n_classes, lowest=None)
        if predicted.shape != true.shape:
            raise ValueError(
                f"predictions for {trigger!r} must be one per label, got {predicted.size} for {true.size}: a trigger is "
                "inserted into every row, whatever its class. Predict all rows."
            )
        columns.append(predicted)
    classes = np.arange(n_classes)
    others = true[:, None] != classes
    return (np.stack(columns, axis=1)[:, :, None] == classes) & others[:, None], others


def _rates(weights: np.ndarray, hits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[draws, T, k] from weights [draws, n]: all counts in one matrix product; NaN where a class has no other rows."""
    n, n_triggers, n_classes = hits.shape
    counts = (weights @ hits.reshape(n, -1).astype(np.float64)).reshape(-1, n_triggers, n_classes)
    totals = (weights @ others.astype(np.float64))[:, None]  # [draws, 1, k]
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def _class_ids(name: str, values: ArrayLike, n_classes: int, *, lowest: int | None) -> np.ndarray:
    if n_classes < 2:
        raise ValueError(
            f"`n_classes` must be at least 2, got {n_classes}: with one class no row can be led to another. Count the task's."
        )
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be a non-empty vector of class ids, got shape {array.shape} and dtype {array.dtype}: there is one "
            "per row. For logits pass `logits.argmax(-1)`."
        )
    bad = array[(array >= n_classes) | (array < lowest if lowest is not None else False)]
    if bad.size:
        raise ValueError(
            f"`{name}` must be in 0..{n_classes - 1}, got {bad[0]}: the task has {n_classes} classes. Drop hidden rows, or "
            "pass the right `n_classes`."
        )
    return array.astype(np.int64)
