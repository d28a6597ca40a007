"""Accounting of filters, against a table counted by hand and a loop over rows."""

import numpy as np
import pytest

from hf_backdoor_defense.evaluation.filtering import filtered_scores
from hf_backdoor_defense.functional.thresholds import Calibration

# Eight rows. The threshold is -0.5, strictly: a score of exactly -0.5 passes, whether the row is clean or triggered.
#         predicted, label, score
CLEAN = [(1, 1, -0.9), (0, 0, -0.5), (1, 0, -0.6), (0, 0, -0.1)]
TRIGGERED = [(1, 0, -0.5), (1, 0, -0.2), (0, 0, -0.7), (1, 1, -0.8)]  # the last is of the target class: not counted
RULE = Calibration(tail="upper", upper=-0.5)


def test_the_hand_table():
    clean, triggered = np.array(CLEAN).T, np.array(TRIGGERED).T
    scores = filtered_scores(
        *(clean[0], clean[1], RULE.flags(clean[2])),
        *(triggered[0], triggered[1], RULE.flags(triggered[2])),
        target=1,
        clean_scores=clean[2],
        triggered_scores=triggered[2],
        tail="upper",
    )
    values = {name: (estimate.value, estimate.n) for name, estimate in scores.items()}
    assert values["ca"] == (2 / 4, 4)  # accepted: three; right among them: two
    assert values["coverage"] == (3 / 4, 4)
    assert values["selective_ca"] == (2 / 3, 3)
    assert values["asr"] == (1 / 3, 3)  # the row at the threshold passes, as the clean one does
    assert values["r_acc"] == (1 / 3, 3)
    assert values["frr"] == (1 / 4, 4)
    assert values["far"] == (2 / 3, 3)
    # Pairs of (triggered, clean) with the triggered one higher; a tie is half: -0.5: 2.5, -0.2: 3, -0.7: 1, of 4 each.
    assert values["auroc"][0] == pytest.approx(6.5 / 12)
    assert scores["auroc"].low is None and scores["ca"].low < 0.5 < scores["ca"].high


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop_over_rows(seed):
    rng = np.random.default_rng(seed)
    n, m, target = 37, 23, 2
    predicted, labels, flagged = rng.integers(0, 3, n), rng.integers(0, 3, n), rng.random(n) < 0.3
    p, true, f = rng.integers(0, 3, m), rng.integers(0, 2, m), rng.random(m) < 0.5
    scores = filtered_scores(predicted, labels, flagged, p, true, f, target=target)
    right = sum(1 for i in range(n) if not flagged[i] and predicted[i] == labels[i])
    accepted = sum(1 for i in range(n) if not flagged[i])
    assert scores["ca"].value == right / n and scores["selective_ca"].value == right / accepted
    assert scores["asr"].value == sum(1 for i in range(m) if not f[i] and p[i] == target) / m
    assert scores["frr"].value == pytest.approx(1 - scores["coverage"].value)
    assert scores["far"].value >= scores["asr"].value + scores["r_acc"].value - 1e-12
    assert "auroc" not in scores


def test_a_lower_tail_counts_low_scores_as_suspicious():
    rows = ([0, 0], [0, 0], [False, False], [1, 1], [0, 0], [False, False])
    scores = {"clean_scores": [0.9, 0.8], "triggered_scores": [0.1, 0.2], "target": 1}
    assert [filtered_scores(*rows, **scores, tail=t)["auroc"].value for t in ("lower", "upper", "both")] == [1, 0, 0]


def test_nothing_flagged_is_no_filter_and_everything_flagged_accepts_nobody():
    rows = ([0, 1], [0, 0]), ([1, 1], [0, 0])
    none = filtered_scores(*rows[0], [False] * 2, *rows[1], [False] * 2, target=1)
    assert none["ca"].value == none["selective_ca"].value == 0.5 and none["asr"].value == none["coverage"].value == 1
    everything = filtered_scores(*rows[0], [True] * 2, *rows[1], [True] * 2, target=1)
    assert "selective_ca" not in everything and everything["asr"].value == everything["ca"].value == 0


def test_edited_rows_are_accepted():
    scores = filtered_scores([0, 1], [0, 0], [True, False], [0, 1], [0, 0], [True, False], target=1, rejects=False)
    assert {name: scores[name].value for name in ("ca", "coverage", "asr", "frr", "far")} == {
        "ca": 0.5, "coverage": 1, "asr": 0.5, "frr": 0.5, "far": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean_flagged": [0, 1]}, "True or False per row"),
        ({"triggered_flagged": [True]}, "for 2 rows"),
        ({"clean_scores": [0.1, 0.2]}, "must be given together"),
        ({"tail": "left"}, "upper, lower or both"),
        ({"triggered_labels": [1, 1]}, "other than target"),
    ],
)
def test_bad_input(change, message):
    rows = {"clean_predicted": [0, 1], "clean_labels": [0, 1], "clean_flagged": [False, True]}
    rows |= {"triggered_predicted": [1, 1], "triggered_labels": [0, 0], "triggered_flagged": [False, True]}
    with pytest.raises(ValueError, match=message):
        filtered_scores(**{**rows, **change}, target=1)
