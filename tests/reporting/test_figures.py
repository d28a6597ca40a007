"""Figures of the report: the drawn numbers, legibility measured on the rendered boxes, the same bytes."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.reporting import figures
from hf_backdoor_defense.reporting.figures import WIDTH, bars, counts, lines
from hf_backdoor_defense.reporting.histograms import count_rows
from hf_backdoor_defense.reporting.runs import Histogram
from hf_backdoor_defense.reporting.tables import Row
from tests.reporting.test_plots import assert_legible

ARMS = ["clean_reference", "undefended", "matched_decay", "dece", "trajectory"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    found: list[Figure] = []
    save = figures._svg
    monkeypatch.setattr(figures, "_svg", lambda figure: (found.append(figure), save(figure))[1])
    return found


def rows(values: dict[str, float]) -> list[Row]:
    found = []
    for arm, value in values.items():
        metric = "ftr" if arm == "clean_reference" else "asr"
        estimate = Estimate(value, 3, value - 0.1, value + 0.1)  # a t-interval may leave 0..1
        found.append(Row(arm, arm, {metric: estimate}, {metric: 3}))
    return found


@pytest.mark.parametrize("levels", [[0.0] * 5, [1.0] * 5, [0.03, 0.98, 0.96, 0.5, 0.1], [0.97, 0.2, 0.4, 0.6, 0.8]])
def test_bars_are_as_long_as_their_values(drawn: list[Figure], levels: list[float]) -> None:
    picture = bars(rows(dict(zip(ARMS, levels, strict=True))), "asr", title="ASR", arms=ARMS, floor=levels[0])
    assert picture is not None and f"undefended {levels[1]:.2f} [" in picture.alt
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(levels)
    assert [t.get_text() for t in axes.get_yticklabels()] == ARMS
    assert all(0 <= min(line.get_xdata()) and max(line.get_xdata()) <= 1 for line in axes.lines)
    assert [t.get_text() for t in axes.texts] == [*(f"{v:.2f}" for v in levels), f"floor {levels[0]:.2f}"]
    assert_legible(drawn[0])


def test_an_arm_has_one_color_in_every_figure(drawn: list[Figure]) -> None:
    bars(rows(dict.fromkeys(ARMS[1:], 0.5)), "asr", title="ASR", arms=ARMS)
    lines({arm: {0: [(1, 0.2), (2, 0.3)]} for arm in ARMS[3:]}, title="CA", arms=ARMS, share=True)
    colors = [np.round(bar.get_facecolor()[:3], 3).tolist() for bar in drawn[0].axes[0].patches]
    from matplotlib.colors import to_rgb

    thick = [np.round(to_rgb(line.get_color()), 3).tolist() for line in drawn[1].axes[0].lines if line.get_lw() == 2]
    assert thick == colors[2:]


def test_lines_are_the_mean_of_the_seeds_and_cope_with_other_steps(drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    grids = [np.linspace(0.2, 3, 14), np.linspace(0.25, 3, 12), np.linspace(0.2, 3, 14)]
    seeds = {s: [(float(x), float(y)) for x, y in zip(g, rng.random(len(g)), strict=True)] for s, g in enumerate(grids)}
    picture = lines({"dece": seeds}, title="loss", arms=ARMS)
    assert picture is not None
    thick = next(line for line in drawn[0].axes[0].lines if line.get_lw() == 2)
    xs = [x for x, _ in seeds[0] if x >= 0.25]
    assert list(thick.get_xdata()) == xs

    def at(points: list[tuple[float, float]], x: float) -> float:
        before = max(p for p in points if p[0] <= x)
        after = min(p for p in points if p[0] >= x)
        share = 0.0 if before == after else (x - before[0]) / (after[0] - before[0])
        return before[1] + share * (after[1] - before[1])

    assert thick.get_ydata() == pytest.approx([np.mean([at(points, x) for points in seeds.values()]) for x in xs])
    assert sum(line.get_lw() == 0.8 for line in drawn[0].axes[0].lines) == 3
    assert f"to {np.mean([points[-1][1] for points in seeds.values()]):.3g}" in picture.alt


@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e7])
@pytest.mark.parametrize("points", [1, 2, 20])
def test_lines_stay_legible_at_every_scale(drawn: list[Figure], scale: float, points: int) -> None:
    series = {arm: {0: [(i + 1.0, scale * (1 + i * 0.1)) for i in range(points)]} for arm in ARMS}
    assert lines(series, title="term", arms=ARMS) is not None
    assert_legible(drawn[0])
    assert drawn[0].get_size_inches()[0] == WIDTH


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_shares_have_a_floor_and_labels_that_do_not_overlap(drawn: list[Figure], level: float) -> None:
    arms = [*ARMS, *(f"another_defense_{i}" for i in range(8))]
    series = {arm: {s: [(1.0, level), (2.0, level)] for s in range(3)} for arm in arms}
    picture = lines(series, title="ASR", arms=arms, share=True, floor=level)
    assert picture is not None and f"floor {level:.2f}" in picture.alt
    assert drawn[0].axes[0].get_ylim() == (0, 1)
    assert_legible(drawn[0])


def test_nothing_to_draw_is_no_picture() -> None:
    assert lines({}, title="loss", arms=[]) is None and lines({"dece": {0: []}}, title="loss", arms=["dece"]) is None
    assert bars(rows({"dece": 0.5}), "r_acc", title="R-Acc", arms=["dece"]) is None


def histogram(planted: bool, tail: float = 1.0) -> Histogram:
    rng = np.random.default_rng(1)
    seeds = {s: (list(range(300)), (tail * rng.standard_normal(300) ** 3).tolist()) for s in (0, 1)}
    counted = count_rows(seeds, planted={s: set(range(9)) for s in seeds} if planted else {}, dropped={0: {3, 4}})
    assert counted is not None
    of_seeds = {int(seed): entry for seed, entry in counted["seeds"].items()}
    return Histogram(arm="trajectory", name="scores", edges=counted["edges"], seeds=of_seeds)


@pytest.mark.parametrize("tail", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("planted", [True, False])
def test_counts_add_up_over_the_seeds(drawn: list[Figure], planted: bool, tail: float) -> None:
    given = histogram(planted, tail)
    picture = counts(given, title="Scores", axis="suspicion score")
    steps = [patch.get_data().values for patch in drawn[0].axes[0].patches if not patch.get_fill()]
    totals = [np.sum([np.asarray(e["other"]) for e in given.seeds.values()], axis=0)]
    totals += [np.sum([np.asarray(e["planted"]) for e in given.seeds.values()], axis=0)] if planted else []
    for step, total in zip(steps, totals, strict=True):
        assert np.where(step == 0.5, 0, step).tolist() == total.tolist()
    assert ("18 planted rows" in picture.alt and "582 other rows" in picture.alt) == planted
    assert ("600 rows, " in picture.alt) == (not planted)
    assert_legible(drawn[0])


def test_counts_of_a_filter_say_what_was_flagged_and_draw_both_thresholds(drawn: list[Figure]) -> None:
    given = histogram(True)
    picture = counts(
        given,
        title="Scores",
        axis="score",
        groups=("clean rows", "triggered rows"),
        gone="flagged",
        bounds=[-1.0, 2.0],
    )
    assert "582 clean rows" in picture.alt and "18 triggered rows" in picture.alt and "lowest" not in picture.alt
    assert "2 flagged" in picture.alt and "dropped" not in picture.alt
    # The place of a threshold between the edges of its bin, by hand.
    dashed = [float(line.get_xdata()[0]) for line in drawn[0].axes[0].lines]
    for place, bound in zip(dashed, [-1.0, 2.0], strict=True):
        low = int(place)
        between = (bound - given.edges[low]) / (given.edges[low + 1] - given.edges[low])
        assert place - low == pytest.approx(between)
    assert_legible(drawn[0])


def test_the_same_numbers_are_the_same_bytes_and_leave_no_setting_behind() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    first, again = (counts(histogram(True), title="Scores", axis="score").svg for _ in range(2))
    assert first == again and dict(matplotlib.rcParams) == before
