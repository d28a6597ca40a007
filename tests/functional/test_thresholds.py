"""Confidence against exact arithmetic, thresholds against counting over all orders."""

import math
from decimal import Decimal, getcontext
from itertools import permutations

import numpy as np
import pytest
import torch

from hf_backdoor_defense.functional.thresholds import (
    Calibration,
    clopper_pearson,
    conformal_threshold,
    log_confidence,
    rows_needed,
)

getcontext().prec = 400


@pytest.mark.parametrize("k", [2, 3, 7])
def test_log_confidence_equals_400_digit_arithmetic(k):
    for margin in (0.0, 1e-6, 0.5, 3.0, 20.0, 37.0, 90.0, 300.0, 700.0):
        logits = torch.zeros(k, dtype=torch.float64)
        logits[0] = margin
        exact = -(1 + (k - 1) * (-Decimal(margin)).exp()).ln()
        assert log_confidence(logits).item() == pytest.approx(float(exact), rel=1e-12)


def test_it_orders_what_a_float32_softmax_cannot():
    margins = torch.tensor([17.5, 18.0, 40.0, 100.0, 103.0])
    logits = torch.stack([margins, torch.zeros(5)], -1)
    assert (logits.softmax(-1).amax(-1) == 1).sum() >= 4
    scores = log_confidence(logits)
    assert (scores.diff() > 0).all() and (scores < 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_logits_know_nothing_and_shapes_stay(dtype):
    scores = log_confidence(torch.full((2, 3, 5), 7.0, dtype=dtype))
    assert scores.shape == (2, 3) and scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.full((2, 3), -math.log(5), dtype=torch.float64))
    assert log_confidence(torch.zeros(0, 4)).shape == (0,)


def test_ties_at_the_top_count_once():
    assert log_confidence(torch.tensor([1.0, 1.0, -1e9])).item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize(("alpha", "tail"), [(0.25, "upper"), (0.25, "lower"), (0.5, "both"), (0.34, "upper")])
def test_over_all_orders_a_new_clean_row_is_flagged_at_most_at_the_rate(alpha, tail):
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]  # n + 1 exchangeable scores without ties
    flagged = [conformal_threshold(order[:-1], alpha, tail=tail).flags(order[-1:])[0] for order in permutations(values)]
    rate, slack = np.mean(flagged), (2 if tail == "both" else 1) / len(values)
    assert alpha - slack < rate <= alpha + 1e-12


@pytest.mark.parametrize(("tail", "few", "enough"), [("upper", 98, 99), ("lower", 98, 99), ("both", 198, 199)])
def test_too_few_rows_are_refused_and_the_next_number_is_enough(tail, few, enough):
    assert rows_needed(0.01, tail=tail) == enough
    with pytest.raises(ValueError, match=f"at least {enough}.*got {few}"):
        conformal_threshold(np.arange(few), 0.01, tail=tail)
    rule = conformal_threshold(np.arange(enough), 0.01, tail=tail)
    assert rule.upper in (None, enough - 1) and rule.lower in (None, 0)
    assert not rule.flags(np.arange(enough)).any()


def test_the_sheet_s_rank():
    rule = conformal_threshold(np.arange(1, 873), 0.01, tail="upper")
    assert (rule.rank, rule.upper, rule.n) == (865, 865.0, 872)


def test_ties_are_never_flagged_and_counted_and_order_does_not_matter():
    scores = np.r_[np.zeros(150), np.arange(1, 50), np.full(60, 50.0)]
    rule = conformal_threshold(scores, 0.01)
    assert (rule.lower, rule.upper, rule.ties) == (0.0, 50.0, 210)
    assert rule.flags([0.0, 50.0]).tolist() == [False, False] and rule.flags([-1e-9, 50.0001]).all()
    assert conformal_threshold(np.random.default_rng(0).permutation(scores), 0.01) == rule


@pytest.mark.parametrize("tail", ["upper", "lower", "both"])
def test_the_interval_of_the_rate_covers_what_many_calibrations_really_have(tail):
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(2000):
        rule = conformal_threshold(rng.uniform(size=250), 0.02, tail=tail)  # of uniform scores the rate is a length
        rates.append((0 if rule.upper is None else 1 - rule.upper) + (0 if rule.lower is None else rule.lower))
    assert np.mean((np.array(rates) >= rule.frr_low) & (np.array(rates) <= rule.frr_high)) == pytest.approx(
        0.95, abs=0.015
    )
    assert np.mean(rates) <= 0.02 + 3 * np.std(rates) / math.sqrt(2000)


def test_scores_without_rank_and_rates_that_are_no_share_are_refused():
    with pytest.raises(ValueError, match="finite, got 1 of 200"):
        conformal_threshold([*range(199), float("nan")], 0.01)
    for rate in (0, 1, -0.1, 5):
        with pytest.raises(ValueError, match="target_frr"):
            conformal_threshold(range(500), rate)
    with pytest.raises(ValueError, match="tail"):
        conformal_threshold(range(500), 0.1, tail="left")


def test_calibration_round_trip_and_no_side():
    rule = conformal_threshold(range(500), 0.02)
    assert Calibration.from_dict(rule.to_dict()) == rule
    assert not Calibration(tail="upper").flags([-1e9, 1e9]).any()


def test_clopper_pearson_solves_the_binomial_tails():
    def at_least(k, n, p):
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))

    for k, n in ((1, 10), (3, 40), (9, 10)):
        low, high = clopper_pearson(k, n)
        assert at_least(k, n, low) == pytest.approx(0.025) and 1 - at_least(k + 1, n, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 5)[0] == 0.0 and clopper_pearson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="got 6 of 5"):
        clopper_pearson(6, 5)
