"""Agreement of shares: against Newcombe's published examples, a numpy loop, and what must be symmetric."""

import math

import numpy as np
import pytest

from hf_backdoor_defense.evaluation.metrics import Estimate, wilson
from hf_backdoor_defense.hub.agreement import AGREES, DIFFERS, IS_BETTER, IS_WORSE, check_interval, compare, difference
from hf_backdoor_defense.reporting.results import Record

OF = {"benchmark": "b", "dataset": "d", "model": "m", "attack": "none", "defense": "d3", "setting": "", "seed": 0}


def record(metric, count, n):
    return Record.from_estimate(wilson(count, n), metric=metric, **OF)


# Newcombe 1998, table II, method 10: two shares, and the interval of their difference to four places.
@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_the_interval_is_newcombes(one, other, low, high):
    found = difference(wilson(*one), wilson(*other))
    assert [round(bound, 4) for bound in found] == [low, high]
    back = difference(wilson(*other), wilson(*one))
    assert [-bound for bound in back[::-1]] == pytest.approx(found, abs=1e-12)


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = []
    for p, q, n, m in ((0.9, 0.9, 200, 90), (0.02, 0.05, 150, 150), (0.5, 0.7, 60, 80)):
        for one, other in zip(rng.binomial(n, p, 400), rng.binomial(m, q, 400), strict=True):
            low, high = difference(wilson(int(one), n), wilson(int(other), m))
            held.append(low <= p - q <= high)
    assert 0.93 <= np.mean(held) <= 0.98


@pytest.mark.parametrize(("metric", "worse"), [("ca", -1), ("r_acc", -1), ("asr", 1), ("ftr", 1), ("frr", 1)])
def test_worse_is_a_failure_and_better_is_none(metric, worse):
    base, far = 100, 40
    outcomes = {
        sign: compare(record(metric, base, 200), wilson(base + sign * far, 200), same_rows=False) for sign in (-1, 0, 1)
    }
    assert outcomes[0].outcome == AGREES and outcomes[0].holds
    assert outcomes[worse].outcome == IS_WORSE and not outcomes[worse].holds
    assert outcomes[-worse].outcome == IS_BETTER and outcomes[-worse].holds
    assert IS_WORSE in outcomes[worse].text()


def test_on_the_same_rows_only_rounding_may_differ():
    def outcome(count, n=400):
        return compare(record("asr", 20, 400), wilson(count, n), same_rows=True).outcome

    assert [outcome(count) for count in (20, 22, 18)] == [AGREES] * 3
    assert [outcome(count) for count in (23, 17, 0)] == [DIFFERS] * 3  # better, too, is no measurement of these rows
    assert outcome(40, 800) == DIFFERS
    # Of few rows it is one.
    assert compare(record("ca", 5, 10), wilson(6, 10), same_rows=True).outcome == AGREES
    assert compare(record("ca", 5, 10), wilson(7, 10), same_rows=True).outcome == DIFFERS


@pytest.mark.parametrize("wrong", [{"n": None}, {"n": 7, "value": 0.5}, {"n": 200, "value": 1 / 3}])
def test_a_record_that_no_count_gives_is_refused(wrong):
    fields = {"value": 0.5, "n": 200, **wrong}
    with pytest.raises(ValueError, match="share of counted rows"):
        compare(Record(metric="ca", **fields, **OF), wilson(1, 2), same_rows=False)


def test_an_estimate_without_an_interval_has_no_difference():
    with pytest.raises(ValueError, match="with intervals"):
        difference(Estimate(0.5, 1, None, None), wilson(1, 2))
    assert math.isfinite(sum(difference(wilson(0, 1), wilson(1, 1))))


@pytest.mark.parametrize("metric", ["ca", "asr", "ftr", "r_acc", "frr", "far", "coverage", "selective_ca"])
@pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (0, 200), (37, 125), (200, 200)])
def test_an_interval_on_record_is_wilsons(metric, count, n):
    p, z = count / n, 1.959963984540054
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    low, high = max(low, 0.0) if count else 0.0, min(high, 1.0) if count < n else 1.0
    check_interval(Record(metric=metric, value=p, n=n, low=low, high=high, **OF))
    for wrong in ((low, high - 1e-4), (low + 1e-4, high)):
        with pytest.raises(ValueError, match="no run writes that"):
            check_interval(Record(metric=metric, value=p, n=n, low=wrong[0], high=wrong[1], **OF))


def test_a_rate_of_a_filter_may_have_clopper_and_pearsons():
    # 3 of 125: the tails of the binomial distribution beyond the bounds have 2.5 % each.
    low, high = 0.004976989749053449, 0.06853631611067006
    for bound, counts in ((low, range(3, 126)), (high, range(4))):
        assert sum(math.comb(125, k) * bound**k * (1 - bound) ** (125 - k) for k in counts) == pytest.approx(0.025)
    check_interval(Record(metric="frr", value=3 / 125, n=125, low=low, high=high, **OF))
    with pytest.raises(ValueError, match="no run writes that"):
        check_interval(Record(metric="ca", value=3 / 125, n=125, low=low, high=high, **OF))


def test_an_interval_without_rows_is_refused_and_other_metrics_are_passed_over():
    with pytest.raises(ValueError, match="share of counted rows"):
        check_interval(Record(metric="ca", value=0.5, low=0.4, high=0.6, **OF))
    for passed in ({"metric": "aasr", "low": 0.4, "high": 0.6}, {"metric": "ca"}):
        check_interval(Record(value=0.5, **passed, **OF))
