"""Metrics against oracles of another derivation: counting by loops, root finding, pair counting, closed forms."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import brentq

from hf_backdoor_defense.evaluation.metrics import (
    Estimate,
    accuracy,
    attack_success_rate,
    auroc,
    defense_effectiveness_rate,
    false_trigger_rate,
    mean_over_seeds,
    precision_at,
    recall_at,
    recovered_accuracy,
    wilson,
)


def draw(seed: int, n: int = 50, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, n), rng.integers(0, classes, n)


@pytest.mark.parametrize("seed", range(5))
def test_shares_equal_counting_by_hand(seed: int) -> None:
    predictions, labels = draw(seed)
    pairs = list(zip(predictions.tolist(), labels.tolist(), strict=True))
    attacked = [(p, y) for p, y in pairs if y != 2]
    assert accuracy(predictions, labels).value == sum(p == y for p, y in pairs) / 50
    asr = attack_success_rate(predictions, labels, target=2)
    assert (asr.value, asr.n) == (sum(p == 2 for p, _ in attacked) / len(attacked), len(attacked))
    recovered = recovered_accuracy(predictions, labels, target=2)
    assert (recovered.value, recovered.n) == (sum(p == y for p, y in attacked) / len(attacked), len(attacked))
    assert asr.value + recovered.value <= 1
    assert false_trigger_rate(predictions, labels, target=2) == asr


def test_target_samples_are_ignored() -> None:
    predictions, labels = draw(0)
    keep = labels != 1
    for metric in (attack_success_rate, recovered_accuracy, false_trigger_rate):
        whole = metric(predictions, labels, target=1)
        assert whole == metric(predictions[keep], labels[keep], target=1)
        changed = np.where(keep, predictions, 0)
        assert whole == metric(changed, labels, target=1)


def test_collapsed_models() -> None:
    labels = np.arange(12) % 3
    assert attack_success_rate(np.ones(12), labels, target=1).value == 1
    assert recovered_accuracy(np.ones(12), labels, target=1).value == 0
    assert attack_success_rate(np.zeros(12), labels, target=1).value == 0
    assert accuracy(np.zeros(12), labels).value == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, np.uint8), lambda v: np.array(v, float)])
def test_container_and_dtype_do_not_matter(kind) -> None:
    assert accuracy(kind([0, 1, 1]), kind([0, 1, 0])) == wilson(2, 3)
    assert accuracy(np.array([True, False]), [1, 1]) == wilson(1, 2)


def test_abstentions_are_never_right() -> None:
    assert accuracy([-1, 1], [0, 1]).value == 0.5
    assert attack_success_rate([-1, 1], [0, 0], target=1).value == 0.5


@pytest.mark.parametrize(("successes", "n"), [(1, 10), (5, 10), (9, 10), (37, 1000), (0, 7), (7, 7), (1, 1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_bounds_are_where_the_score_test_turns(successes: int, n: int, confidence: float) -> None:
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n

    def gap(q: float) -> float:
        return (p - q) ** 2 - z**2 * q * (1 - q) / n

    estimate = wilson(successes, n, confidence)
    # The gap is negative around p, zero at p = 0 and p = 1, and positive at the far ends.
    low = brentq(gap, 0, min(p, 1 - 1e-9), xtol=1e-14) if successes else 0.0
    high = brentq(gap, max(p, 1e-9), 1, xtol=1e-14) if successes < n else 1.0
    assert (estimate.value, estimate.n) == (p, n)
    assert estimate.low == pytest.approx(low, abs=1e-10)
    assert estimate.high == pytest.approx(high, abs=1e-10)
    assert 0 <= estimate.low <= p <= estimate.high <= 1


def test_wilson_covers_the_truth_about_as_often_as_it_says() -> None:
    n, p = 40, 0.1
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(w for k, w in enumerate(weights) if wilson(k, n).low <= p <= wilson(k, n).high)
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("values", [[0.2, 0.9], [0.90, 0.92, 0.97]])
def test_mean_over_seeds_against_closed_quantiles(values: list[float], confidence: float) -> None:
    # Student's t has closed quantiles for one and two degrees of freedom.
    p = 0.5 + confidence / 2
    t = math.tan(math.pi * (p - 0.5)) if len(values) == 2 else (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    estimate = mean_over_seeds(values, confidence)
    assert estimate.value == pytest.approx(mean)
    assert (estimate.low, estimate.high) == pytest.approx((mean - t * spread, mean + t * spread))
    assert estimate.n == len(values)


def test_mean_over_seeds_at_the_edges() -> None:
    assert mean_over_seeds([0.7]) == Estimate(0.7, 1, None, None)
    assert mean_over_seeds([0.5, 0.5, 0.5]) == Estimate(0.5, 3, 0.5, 0.5)
    assert mean_over_seeds([0.0, 1.0]).high > 1  # not clipped: the values need not be shares


def test_der_examples_and_range() -> None:
    def der(ca_before: float, ca_after: float, asr_before: float, asr_after: float) -> float:
        return defense_effectiveness_rate(
            ca_before=ca_before, ca_after=ca_after, asr_before=asr_before, asr_after=asr_after
        )

    assert der(0.95, 0.93, 1.0, 0.02) == pytest.approx(0.98)
    assert der(0.9, 0.9, 0.8, 0.8) == 0.5
    assert der(0.9, 0.6, 0.8, 0.5) == pytest.approx(0.5)  # the trap: "both fell by 0.3" looks like "nothing happened"
    assert der(0.5, 0.9, 0.8, 0.1) == der(0.5, 0.5, 0.8, 0.1)  # a gain in CA changes nothing
    assert der(0.9, 0.9, 0.1, 0.8) == 0.5  # nor does a rise of ASR
    assert (der(0, 0, 1, 0), der(1, 0, 0, 0)) == (1.0, 0.0)
    for values in np.random.default_rng(0).random((100, 4)):
        assert 0 <= der(*values) <= 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_auroc_equals_pair_counting(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, 37) / 7 - 3
    positives = rng.random(37) < 0.3
    positives[:2] = True, False
    wins = [(p > q) + 0.5 * (p == q) for p, q in itertools.product(scores[positives], scores[~positives])]
    assert auroc(scores, positives) == pytest.approx(np.mean(wins))
    assert auroc(-scores, positives) == pytest.approx(1 - np.mean(wins))
    assert auroc(scores**3, positives.astype(int)) == pytest.approx(np.mean(wins))


def test_auroc_at_the_edges() -> None:
    assert auroc([1, 2, 3], [False, True, True]) == 1.0
    assert auroc([3, 2, 1], [False, True, True]) == 0.0
    assert auroc([1, 1, 1], [False, True, True]) == 0.5
    assert auroc([-np.inf, np.inf], [False, True]) == 1.0


def test_precision_and_recall_by_counting() -> None:
    ranked = [True, True, False, True, False, False]
    for k in range(1, 7):
        hits = sum(ranked[:k])
        assert precision_at(ranked, k) == pytest.approx(hits / k)
        assert recall_at(ranked, k) == pytest.approx(hits / 3)
    assert precision_at([0, 0], 2) == 0.0


def der_with(**change: float) -> float:
    return defense_effectiveness_rate(**{"ca_before": 0.9, "ca_after": 0.9, "asr_before": 1, "asr_after": 0, **change})


@pytest.mark.parametrize(
    ("bad", "good", "message"),
    [
        (lambda: accuracy([], []), lambda: accuracy([0], [0]), r"`predictions` must be a non-empty vector.*\(0,\)"),
        (lambda: accuracy([0], []), lambda: accuracy([0], [1]), "`labels` must be a non-empty vector"),
        (lambda: accuracy([0, 1], [0]), lambda: accuracy([0, 1], [0, 1]), "one value per sample, got 2 and 1"),
        (lambda: accuracy([[0.1, 0.9]], [1]), lambda: accuracy([1], [1]), r"shape \(1, 2\).*logits.argmax\(-1\)"),
        (lambda: accuracy(["a"], ["a"]), lambda: accuracy([1], [1]), "dtype <U1"),
        (lambda: accuracy([0.9], [1]), lambda: accuracy([1.0], [1]), "class ids, got 0.9.*Pass the argmax"),
        (lambda: accuracy([np.nan], [1]), lambda: accuracy([0], [1]), "class ids, got nan"),
        (lambda: accuracy([np.inf], [1]), lambda: accuracy([0], [1]), "class ids, got inf"),
        (lambda: accuracy([1], [-100]), lambda: accuracy([1], [0]), "`labels` must be >= 0, got -100.*Drop"),
        (
            lambda: attack_success_rate([1, 0], [1, 1], target=1),
            lambda: attack_success_rate([1, 0], [1, 0], target=1),
            "a class other than target 1, got only that one.*non-target samples",
        ),
        (
            lambda: recovered_accuracy([1], [1], target=1),
            lambda: recovered_accuracy([1], [1], target=0),
            "a class other than target 1",
        ),
        (
            lambda: attack_success_rate([1], [1], target=-1),
            lambda: attack_success_rate([1], [1], target=0),
            "`target` must be a class id >= 0, got -1",
        ),
        (lambda: wilson(0, 0), lambda: wilson(0, 1), "got 0 of 0"),
        (lambda: wilson(3, 2), lambda: wilson(2, 2), "got 3 of 2.*Count samples"),
        (lambda: wilson(-1, 2), lambda: wilson(0, 2), "got -1 of 2"),
        (lambda: wilson(1, 2, 95), lambda: wilson(1, 2, 0.95), r"`confidence` must be in \(0, 1\), got 95.*0.95"),
        (lambda: mean_over_seeds([1], 1.0), lambda: mean_over_seeds([1], 0.9), r"`confidence` must be in \(0, 1\)"),
        (lambda: mean_over_seeds([]), lambda: mean_over_seeds([1]), "`values` must be a non-empty vector"),
        (lambda: mean_over_seeds([1, np.nan]), lambda: mean_over_seeds([1, 2]), "must be finite.*Rerun it"),
        (lambda: der_with(ca_after=93.0), lambda: der_with(ca_after=0.93), "`ca_after` must be in 0..1, got 93.0"),
        (
            lambda: der_with(asr_before=np.nan),
            lambda: der_with(asr_before=1.0),
            "`asr_before` must be in 0..1, got nan",
        ),
        (lambda: precision_at([True], 2), lambda: precision_at([True], 1), "`k` must be in 1..1, got 2"),
        (lambda: recall_at([True], 0), lambda: recall_at([True], 1), "`k` must be in 1..1, got 0"),
        (lambda: recall_at([False], 1), lambda: precision_at([False], 1), "must hold a positive, got none"),
        (lambda: precision_at([2, 0], 1), lambda: precision_at([1, 0], 1), r"True or False.*got \[0, 2\]"),
        (lambda: precision_at([], 1), lambda: precision_at([1], 1), "`ranked_is_positive` must be a non-empty vector"),
        (lambda: auroc([1, 2], [1]), lambda: auroc([1, 2], [1, 0]), "`scores` and `positives`.*got 2 and 1"),
        (lambda: auroc([1, np.nan], [1, 0]), lambda: auroc([1, np.inf], [1, 0]), "must not be NaN, got 1 of them"),
        (lambda: auroc([1, 2], [1, 1]), lambda: auroc([1, 2], [0, 1]), "both kinds, got 2 positive and 0 negative"),
        (lambda: auroc([1, 2], [0, 0]), lambda: auroc([1, 2], [1, 0]), "got 0 positive and 2 negative"),
    ],
)
def test_refused_inputs_and_their_neighbors(bad, good, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()
    good()
