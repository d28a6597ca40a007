"""Counts per bin against a loop over the rows; edges that fit the values."""

import numpy as np
import pytest

from hf_backdoor_defense.reporting.histograms import BINS, Stretch, count_rows


@pytest.mark.parametrize("tail", [1.0, 300.0])
def test_counts_are_those_of_a_loop(tail: float) -> None:
    rng = np.random.default_rng(0)
    seeds = {s: (rng.permutation(97).tolist(), (rng.standard_normal(97) ** 3 * tail).tolist()) for s in (3, 8)}
    planted, dropped = {3: {1, 5, 90}, 8: {2}}, {3: {1, 6}, 8: set()}
    found = count_rows(seeds, planted=planted, dropped=dropped)
    assert found is not None
    edges = found["edges"]
    assert len(edges) == BINS + 1 and edges == sorted(edges)
    for seed, (ids, values) in seeds.items():
        entry = found["seeds"][str(seed)]
        loop = {"planted": [0] * BINS, "other": [0] * BINS}
        for row, value in zip(ids, values, strict=True):
            place = sum(edge <= value for edge in edges[1:])
            loop["planted" if row in planted[seed] else "other"][place] += 1
        assert entry["planted"] == loop["planted"] and entry["other"] == loop["other"]
        mean = np.mean([v for i, v in zip(ids, values, strict=True) if i in planted[seed]])
        assert entry["planted_mean"] == pytest.approx(mean)
    assert (found["seeds"]["3"]["planted_dropped"], found["seeds"]["3"]["other_dropped"]) == (1, 1)
    lowest = min(v for i, v in zip(*seeds[3], strict=True) if i in dropped[3])
    assert found["seeds"]["3"]["lowest_dropped"] == lowest and found["seeds"]["8"]["lowest_dropped"] is None


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    found = count_rows({0: ([1, 2], [0.5, float("nan")]), 1: ([], [])}, planted={1: set()})
    assert found is not None
    assert found["seeds"]["0"]["planted"] is None and sum(found["seeds"]["0"]["other"]) == 1
    assert found["seeds"]["1"]["planted"] == [0] * BINS and found["seeds"]["1"]["other_mean"] is None
    assert "lowest_dropped" not in found["seeds"]["0"]
    assert count_rows({}, planted={}) is None and count_rows({0: ([4], [float("inf")])}, planted={}) is None


def test_records_have_even_bins_and_scores_show_their_tail() -> None:
    values = [*np.linspace(0.9, 1, 99).tolist(), 0.0]
    even = count_rows({0: (range(100), values)}, planted={})
    bent = count_rows({0: (range(100), values)}, planted={}, dropped={})
    assert even is not None and bent is not None
    assert np.allclose(np.diff(even["edges"]), np.diff(even["edges"])[0])
    assert np.max(bent["seeds"]["0"]["other"]) < np.max(even["seeds"]["0"]["other"])  # the bulk is spread out


@pytest.mark.parametrize("values", [[0.3], [2.0, 2.0], [-1e9, 0.0, 1e9], [0.0, 0.0, 0.0, 1e-9]])
def test_edges_hold_all_values(values: list[float]) -> None:
    stretch = Stretch(values)
    for edges in (stretch.edges(), stretch.edges(even=True)):
        assert edges[0] < min(values) <= max(values) < edges[-1] and (np.diff(edges) > 0).all()
    assert np.allclose(stretch.restore(stretch.squeeze(values)), values)
