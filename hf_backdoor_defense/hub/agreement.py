"""Whether a figure that was measured again is the one on record.

| rows | the two agree when |
|---|---|
| the same | they are equal; a row in 200 may differ where another machine rounds two equal scores differently |
| others | 0 lies in Newcombe's interval of the difference of two shares |

    d = p1 - p2        p1: on record, of n1 rows; p2: measured again, of n2 rows; each in its Wilson interval [l, u]
    low  = d - sqrt((p1 - l1)^2 + (u2 - p2)^2)
    high = d + sqrt((u1 - p1)^2 + (p2 - l2)^2)

Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10: for independent samples, at 95 %. Of 200 rows an interval is some
6 points wide to either side: agreement is a weak statement where rows are few, and says so with both counts.

An interval on record is a function of value and n, and is not believed: Wilson's, or Clopper's and Pearson's of a filter's rate.
"""

import math
from dataclasses import dataclass
from typing import Any

from hf_backdoor_defense.evaluation.metrics import Estimate, wilson
from hf_backdoor_defense.functional.thresholds import clopper_pearson
from hf_backdoor_defense.reporting.results import Record

BETTER = {"ca": 1, "asr": -1, "ftr": -1, "r_acc": 1, "frr": -1}
"""Metrics that are measured again -> which direction is better."""
COUNTED = (*BETTER, "far", "coverage", "selective_ca")
"""Metrics that are shares of counted rows in whatever a run writes."""
ROUNDING = 0.005
AGREES, IS_BETTER, IS_WORSE, DIFFERS = "agrees", "better", "worse", "differs"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One figure on record and measured again. `low`, `high`: of the difference, record minus measurement; None on the same
    rows. `outcome`: agrees; better or worse than on record; differs, on the same rows, which no measurement explains."""

    metric: str
    recorded: Estimate
    measured: Estimate
    low: float | None
    high: float | None
    outcome: str

    @property
    def holds(self) -> bool:
        """Whether the figure on record may be relied on."""
        return self.outcome in (AGREES, IS_BETTER)

    def text(self) -> str:
        """For people."""
        one, other = self.recorded, self.measured
        said = f"{self.metric} {one.value:.4f} of {one.n} on record, {other.value:.4f} of {other.n} measured"
        return said + ("" if self.outcome == AGREES else f": {self.outcome}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "metric": self.metric, "recorded": vars(self.recorded), "measured": vars(self.measured), "low": self.low,
            "high": self.high, "outcome": self.outcome,
        }  # fmt: skip


def difference(one: Estimate, other: Estimate) -> tuple[float, float]:
    """Newcombe's interval of `one` - `other`, from their Wilson intervals. Raises ValueError: an estimate without one.

    >>> low, high = difference(wilson(56, 70), wilson(48, 80))
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)
    """
    if one.low is None or one.high is None or other.low is None or other.high is None:
        raise ValueError("the difference needs estimates with intervals, got one without. Take those of `wilson`.")
    d = one.value - other.value
    low = d - math.hypot(one.value - one.low, other.high - other.value)
    return low, d + math.hypot(one.high - one.value, other.value - other.low)


def compare(record: Record, measured: Estimate, *, same_rows: bool) -> Agreement:
    """A record beside what was measured again.

    Args:
        record: of a metric in `BETTER`. measured: a share with its Wilson interval.
        same_rows: whether both are of the same rows, one by one.

    Raises:
        ValueError: a record that no count of rows gives.

    >>> of = dict(benchmark="b", dataset="d", model="m", attack="none", defense="d3", setting="", seed=0)
    >>> compare(Record.from_estimate(wilson(180, 200), metric="ca", **of), wilson(150, 200), same_rows=False).outcome
    'worse'
    """
    direction = BETTER[record.metric]
    counted = _counted(record)
    if same_rows:
        apart = abs(round(counted.value * counted.n) - round(measured.value * measured.n))
        few = measured.n == counted.n and apart <= max(1, ROUNDING * counted.n)
        outcome, low, high = AGREES if few else DIFFERS, None, None
    else:
        low, high = difference(counted, measured)
        outcome = (
            AGREES if low <= 0 <= high else IS_WORSE if direction * (counted.value - measured.value) > 0 else IS_BETTER
        )
    return Agreement(
        metric=record.metric, recorded=counted, measured=measured, low=low, high=high, outcome=outcome
    )  # fmt: skip


def check_interval(record: Record) -> None:
    """That the interval on record is the one that its value and n give; metrics that count no rows are passed over.

    Raises:
        ValueError: it is another, or a share that no count of rows gives.

    >>> of = dict(benchmark="b", dataset="d", model="m", attack="none", defense="d3", setting="", seed=0, metric="ca")
    >>> check_interval(Record.from_estimate(wilson(9, 10), **of))
    >>> check_interval(Record(value=0.9, n=10, low=0.89, high=0.91, **of))
    Traceback (most recent call last):
    ...
    ValueError: `ca` of d3 on record has the interval [0.89, 0.91], and 0.9 of 10 rows gives [0.5958, 0.9821]: no run writes that.
    """
    if record.metric not in COUNTED or record.low is None or record.high is None:
        return
    counted = _counted(record)
    known = [(counted.low, counted.high)]
    if record.metric == "frr":
        known.append(clopper_pearson(round(counted.value * counted.n), counted.n))
    if not any(
        math.isclose(record.low, low, abs_tol=1e-9) and math.isclose(record.high, high, abs_tol=1e-9)
        for low, high in known
        if low is not None and high is not None
    ):
        low, high = known[-1]
        raise ValueError(
            f"`{record.metric}` of {record.defense} on record has the interval [{record.low:.4g}, {record.high:.4g}], and "
            f"{record.value:.4g} of {record.n} rows gives [{low:.4g}, {high:.4g}]: no run writes that."
        )


def _counted(record: Record) -> Estimate:
    if record.n is None or abs(record.value * record.n - round(record.value * record.n)) > 1e-6 * max(1, record.n):
        raise ValueError(
            f"`{record.metric}` on record must be a share of counted rows, got {record.value!r} of {record.n}: no run "
            "writes that."
        )
    return wilson(round(record.value * record.n), record.n)
