"""Outliers of a median, against sorted lists."""

import math

import pytest
import torch

from hf_backdoor_defense.functional.row_scores import DegenerateScoreError, flag_rows, mad_z_scores, row_change


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def by_hand(scores):
    median = lower_median(scores)
    deviation = lower_median([abs(s - median) for s in scores])
    return [abs(s - median) / (1.4826 * deviation) for s in scores]


@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (7, 5)])
def test_a_row_changes_by_the_sum_of_its_entries(shape):
    generator = torch.Generator().manual_seed(0)
    pre, post = (torch.randn(shape, generator=generator) for _ in range(2))
    expected = [
        sum(abs(a - b) for a, b in zip(p, q, strict=True)) for p, q in zip(post.tolist(), pre.tolist(), strict=True)
    ]
    found = row_change(torch.nn.Parameter(post), pre)
    assert found.shape == shape[:1] and not found.requires_grad
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_example_of_the_method():
    assert mad_z_scores(torch.tensor([1.0, 1.1, 1.2, 9.0])).tolist() == pytest.approx(
        [0.674, 0, 0.674, 53.28], abs=5e-3
    )


@pytest.mark.parametrize("count", [3, 4, 5, 6, 10, 43])
def test_z_scores_with_the_lower_median(count):
    scores = torch.rand(count, generator=torch.Generator().manual_seed(count)) * 5
    found = mad_z_scores(scores)
    assert found.shape == (count,) and found.tolist() == pytest.approx(by_hand(scores.tolist()), rel=1e-5)
    assert (found >= 0).all()


def test_the_median_of_four_is_the_second_and_no_mean():
    # With the mean of the middle two, 2.5, the first two would be as far away as the last two.
    assert mad_z_scores(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == pytest.approx(
        [1 / 1.4826, 0, 1 / 1.4826, 2 / 1.4826], rel=1e-6
    )


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 9.0], [0.5, 0.25, 0.25, 0.25, 3.0], [0.7]])
def test_no_deviation_is_refused_with_the_scores(scores):
    with pytest.raises(DegenerateScoreError) as caught:
        mad_z_scores(torch.tensor(scores))
    assert isinstance(caught.value, ValueError)
    assert caught.value.scores.tolist() == pytest.approx(scores)
    assert all(f"{score:.4g}" in str(caught.value) for score in scores)


def test_a_small_deviation_is_one():
    assert all(math.isfinite(z) for z in mad_z_scores(torch.tensor([1.0, 1.0 + 1e-6, 1.0 + 2e-6, 9.0])).tolist())


def flags(scores, z, **options):
    settings = {"threshold": 3.5, "cap": 2, "rank": "index", **options}
    return flag_rows(torch.tensor(scores), torch.tensor(z), **settings)


def test_the_threshold_is_strict():
    scores = [1.0, 1.1, 1.2, 9.0]
    assert flags(scores, [0.0, 0.0, 0.0, 3.5]) == []
    assert flags(scores, [0.0, 0.0, 0.0, 3.6]) == [3]


def test_rows_that_moved_less_than_the_median_are_no_suspects():
    scores = torch.tensor([-9.0, 1.0, 1.1, 1.2, 9.0])
    z = mad_z_scores(scores)
    assert z[0] > 3.5 and z[4] > 3.5
    assert flag_rows(scores, z, threshold=3.5, cap=5) == [4]


@pytest.mark.parametrize(
    "cap, rank, expected",
    [(1, "index", [1]), (2, "index", [1, 3]), (3, "index", [1, 3, 5]), (9, "index", [1, 3, 5]),
     (1, "score", [5]), (2, "score", [3, 5]), (3, "score", [1, 3, 5])],
)  # fmt: skip
def test_the_cap_keeps_the_first_or_the_furthest(cap, rank, expected):
    scores, z = [1.0, 7.0, 1.1, 8.0, 1.2, 9.0, 0.9], [0.0, 40.0, 0.0, 50.0, 0.0, 60.0, 0.0]
    assert flags(scores, z, cap=cap, rank=rank) == expected
