"""AASR and MASR: a table made by hand, loops over rows and over draws, closed forms, refusals."""

import math
import time

import numpy as np
import pytest

from hf_backdoor_defense.evaluation.task_agnostic import bootstrap, task_agnostic_asr


def loop(labels, predictions, k):
    """The definition, row by row; the mean and the maximum by hand."""
    table = []
    for predicted in predictions.values():
        line = []
        for c in range(k):
            others = [int(p == c) for p, y in zip(predicted, labels, strict=True) if y != c]
            line.append(sum(others) / len(others) if others else math.nan)
        table.append(line)
    best = [max(value for value in line if not math.isnan(value)) for line in table]
    return table, sum(best) / len(best), max(best)


def random_rows(seed, n=37, k=3, triggers=("cf", "mn")):
    rng = np.random.default_rng(seed)
    return rng.integers(0, k, n), {name: rng.integers(-1, k, n) for name in triggers}


def test_the_hand_table():
    labels = [0, 0, 1, 1, 2, 2]
    predictions = {"cf": [1, 1, 1, 0, 1, 2], "mn": [0, 1, 2, 0, 0, 0], "tq": [2, 2, 2, 2, 2, 2]}
    table = task_agnostic_asr(labels, predictions, 3)
    assert table.per_trigger_class.tolist() == [[1 / 4, 3 / 4, 0], [3 / 4, 1 / 4, 1 / 4], [0, 0, 1]]
    assert table.triggers == ("cf", "mn", "tq") and table.target_class.tolist() == [1, 0, 2]
    assert table.per_trigger.tolist() == [3 / 4, 3 / 4, 1]
    assert table.aasr == pytest.approx(2.5 / 3) and table.masr == 1


@pytest.mark.parametrize(("n", "k"), [(1, 2), (2, 5), (37, 3), (200, 2)])
def test_against_a_loop_over_rows(n, k):
    labels, predictions = random_rows(n, n, k, ("cf", "mn", "≈"))
    table, aasr, masr = loop(labels, predictions, k)
    found = task_agnostic_asr(labels, predictions, k)
    np.testing.assert_array_equal(found.per_trigger_class, table)
    assert found.aasr == pytest.approx(aasr, abs=1e-15) and found.masr == masr


def test_a_constant_predictor_reaches_one_class_fully_and_no_other():
    labels, _ = random_rows(0)
    table = task_agnostic_asr(labels, {"cf": np.full(labels.size, 2)}, 3)
    assert table.per_trigger_class.tolist() == [[0, 0, 1]] and table.aasr == table.masr == 1


def test_a_class_without_other_rows_is_nan_and_never_decides():
    table = task_agnostic_asr([1, 1, 1], {"cf": [1, 1, 1], "mn": [0, 1, 1]}, 3)
    assert np.isnan(table.per_trigger_class[:, 1]).all() and (table.per_trigger_class[0, [0, 2]] == 0).all()
    assert table.per_trigger.tolist() == [0, 1 / 3] and table.target_class.tolist() == [0, 0]
    assert table.aasr == pytest.approx(1 / 6)


def test_a_class_that_no_label_has_can_still_be_reached():
    assert task_agnostic_asr([0, 1], {"cf": [2, 2]}, 3).target_class.tolist() == [2]


def test_abstentions_are_no_success():
    table = task_agnostic_asr([0, 1, 0], {"cf": [-1, -1, -1]}, 2)
    assert table.per_trigger_class.tolist() == [[0, 0]]


def test_the_order_of_rows_does_not_matter():
    labels, predictions = random_rows(3)
    order = np.random.default_rng(9).permutation(labels.size)
    shuffled = task_agnostic_asr(labels[order], {name: p[order] for name, p in predictions.items()}, 3)
    np.testing.assert_array_equal(
        shuffled.per_trigger_class, task_agnostic_asr(labels, predictions, 3).per_trigger_class
    )


def test_bootstrap_is_a_loop_over_draws_with_the_same_rows_for_both_models():
    labels, model = random_rows(1)
    _, floor = random_rows(2)
    floor = dict(reversed(floor.items()))  # their order does not matter
    found = bootstrap(labels, model, floor, 3, seed=5, n_boot=60)
    figures = {name: [] for name in found}
    for counts in np.random.default_rng(5).multinomial(labels.size, [1 / labels.size] * labels.size, size=60):
        drawn = np.repeat(np.arange(labels.size), counts)
        pair = [loop(labels[drawn], {t: p[drawn] for t, p in each.items()}, 3)[1:] for each in (model, floor)]
        for i, name in enumerate(("aasr", "masr")):
            figures[name].append(pair[0][i])
            figures[f"{name}_floor"].append(pair[1][i])
            figures[f"{name}_over_floor"].append(pair[0][i] - pair[1][i])
    table, base = task_agnostic_asr(labels, model, 3), task_agnostic_asr(labels, floor, 3)
    expected = {"aasr": table.aasr, "masr": table.masr, "aasr_floor": base.aasr, "masr_floor": base.masr}
    expected |= {"aasr_over_floor": table.aasr - base.aasr, "masr_over_floor": table.masr - base.masr}
    assert set(found) == set(expected)
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(expected[name], abs=1e-12) and estimate.n == labels.size
        bounds = np.percentile(figures[name], [2.5, 97.5])
        assert [estimate.low, estimate.high] == pytest.approx(list(bounds), abs=1e-12)


def test_the_interval_is_the_binomial_one_where_there_is_nothing_to_maximize():
    # Class 1 rows always stay, class 0 rows move with probability 0.3: the maximum is always that of class 1.
    labels = np.repeat([0, 1], [400, 200])
    predicted = np.where(np.arange(600) < 120, 1, labels)
    estimate = bootstrap(labels, {"cf": predicted}, {"cf": labels}, 2, n_boot=4000)["aasr_over_floor"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert estimate.value == pytest.approx(0.3)
    # The error of a 2.5 % quantile from 4,000 draws, three standard errors: 3 * sqrt(q(1-q)/4000)/density.
    assert [estimate.low, estimate.high] == pytest.approx([0.3 - half, 0.3 + half], abs=0.004)


def test_a_model_is_exactly_at_its_own_floor():
    labels, predictions = random_rows(4)
    figures = bootstrap(labels, predictions, predictions, 3, n_boot=50)
    for name in ("aasr_over_floor", "masr_over_floor"):
        assert (figures[name].value, figures[name].low, figures[name].high) == (0, 0, 0)


def test_draws_with_one_class_alone_do_not_spoil_the_interval():
    figures = bootstrap([0, 1, 1], {"cf": [1, 0, 1]}, {"cf": [0, 1, 1]}, 2, n_boot=200)
    assert all(math.isfinite(bound) for e in figures.values() for bound in (e.low, e.value, e.high))


def test_six_triggers_on_six_hundred_rows_take_less_than_two_seconds():
    labels, predictions = random_rows(0, 600, 2, tuple("abcdef"))
    start = time.process_time()
    bootstrap(labels, predictions, predictions, 2)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("labels", "predictions", "k", "message"),
    [
        ([0, 1], {}, 2, "must hold a trigger"),
        ([0, 1], {"cf": [0]}, 2, "'cf' must be one per label, got 1 for 2"),
        ([0, 2], {"cf": [0, 1]}, 2, "`labels` must be in 0..1, got 2"),
        ([0, -100], {"cf": [0, 1]}, 2, "got -100"),
        ([0, 1], {"cf": [0, 2]}, 2, "'cf'` must be in 0..1, got 2"),
        ([0, 0], {"cf": [0, 0]}, 1, "`n_classes` must be at least 2"),
        ([], {"cf": []}, 2, "non-empty"),
        ([0, 1], {"cf": [0.1, 0.9]}, 2, "argmax"),
        ([0, 1], {"cf": [[0, 1], [1, 0]]}, 2, "argmax"),
    ],
)
def test_refusals(labels, predictions, k, message):
    with pytest.raises(ValueError, match="(?s).*") as caught:
        task_agnostic_asr(labels, predictions, k)
    assert message in str(caught.value)
    with pytest.raises(ValueError):
        bootstrap(labels, predictions, predictions, k)


def test_bootstrap_refuses_other_triggers_and_no_draws():
    with pytest.raises(ValueError, match="same triggers"):
        bootstrap([0, 1], {"cf": [0, 1]}, {"mn": [0, 1]}, 2)
    with pytest.raises(ValueError, match="n_boot"):
        bootstrap([0, 1], {"cf": [0, 1]}, {"cf": [0, 1]}, 2, n_boot=0)
