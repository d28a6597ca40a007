"""Figures: the drawn numbers, legibility measured on the rendered boxes, files, refusals."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.optimize import minimize

from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.reporting import plots
from hf_backdoor_defense.reporting.plots import plot_ca_asr, plot_curves, plot_dose, plot_scores, spread
from hf_backdoor_defense.reporting.results import Record

ARMS = ("clean_reference", "undefended", "matched_decay", "fine_tuning", "dece", "trajectory")


def comparison(seeds: int = 1) -> list[Record]:
    rng = np.random.default_rng(0)
    cell = dict(benchmark="b", dataset="d", model="m", attack="badnets", setting="")
    return [
        Record(**cell, defense=arm, seed=seed, metric=metric, value=value, n=9, low=value - 0.03, high=value + 0.03)
        for arm in ARMS
        for seed in range(seeds)
        for metric in ("ca", "ftr" if arm == "clean_reference" else "asr")
        for value in [float(rng.random())]
    ]


def curve(level: float, epochs: int = 6, jitter: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(jitter)
    shares = np.clip(level + 0.02 * rng.standard_normal((epochs, 2)), 0, 1)
    return [{"epoch": (i + 1) / 2, "ca": float(ca), "asr": float(asr)} for i, (ca, asr) in enumerate(shares)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def boxes(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Where each written label is, in pixels: left, bottom, right, top."""
    texts = [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [
                tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]  # others are not drawn
    renderer = figure.canvas.get_renderer()
    found = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()]
    return {f"{i}: {text}": (box.x0, box.y0, box.x1, box.y1) for i, (text, box) in enumerate(found)}


def assert_legible(figure: Figure) -> None:
    width, height = figure.bbox.width, figure.bbox.height
    found = list(boxes(figure).items())
    for name, (left, bottom, right, top) in found:
        assert left >= 0 and bottom >= 0 and right <= width and top <= height, f"{name} leaves the figure"
    for i, (one, a) in enumerate(found):
        for other, b in found[i + 1 :]:
            overlap_x, overlap_y = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert overlap_x <= 1 or overlap_y <= 2, f"{one} and {other} overlap by {overlap_x:.0f} × {overlap_y:.0f}"


def assert_picture(path: Path, figure: Figure) -> None:
    pixels = matplotlib.image.imread(path)
    width, height = figure.get_size_inches()
    assert pixels.shape[:2] == pytest.approx((height * 150, width * 150), abs=1)
    assert 0.005 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.6  # neither blank nor flooded
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border[..., :3] == 1).all()  # nothing is cut off


@pytest.mark.parametrize("seeds", [1, 3])
def test_arms_are_drawn_where_the_records_say(tmp_path: Path, drawn: list[Figure], seeds: int) -> None:
    records = comparison(seeds)
    path = plot_ca_asr(records, tmp_path / "new" / "arms.png")
    assert path == tmp_path / "new" / "arms.png"
    (figure,) = drawn
    assert_picture(path, figure)
    assert_legible(figure)
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == list(ARMS)
    expected = {}
    for r in records:
        expected.setdefault((ARMS.index(r.defense), {"ca": "o", "asr": "s", "ftr": "D"}[r.metric]), []).append(r.value)
    marked = {
        (round(line.get_ydata()[0]), line.get_marker()): line.get_xdata()[0]
        for line in axes.lines
        if line.get_marker() in ("o", "s", "D")
    }
    assert marked == pytest.approx({key: np.mean(values) for key, values in expected.items()})
    floor = next(t.get_text() for t in axes.texts if t.get_text().startswith("floor"))
    assert floor.endswith(f"{np.mean(expected[0, 'D']):.2f}")
    assert ("preliminary: 1 seed" in axes.get_xlabel()) == (seeds == 1)
    for line in axes.lines:
        assert 0 <= min(line.get_xdata()) and max(line.get_xdata()) <= 1  # t-intervals beyond 0..1 are cut at the axis


def test_there_is_no_floor_without_a_clean_reference(tmp_path: Path, drawn: list[Figure]) -> None:
    records = [r for r in comparison() if r.defense != "clean_reference"]
    plot_ca_asr(records, tmp_path / "arms.png")
    assert not any("floor" in t.get_text() for t in drawn[0].axes[0].texts)
    plot_ca_asr([r for r in records if r.metric == "asr"][:1], tmp_path / "one.png")
    assert_legible(drawn[1])


@pytest.mark.parametrize("value", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_extreme_shares_stay_legible(tmp_path: Path, drawn: list[Figure], value: float) -> None:
    cell = dict(benchmark="b", dataset="d", model="m", attack="a", setting="", seed=0, value=value)
    arms = [("clean_reference", "ftr"), ("clean_reference", "ca"), ("a_defense_with_a_very_long_name", "asr")]
    path = plot_ca_asr([Record(defense=d, metric=m, **cell) for d, m in arms], tmp_path / "arms.png")
    assert_legible(drawn[0])
    assert_picture(path, drawn[0])


@pytest.mark.parametrize("levels", [[0.5] * 6, [1.0] * 6, [0.0] * 6, [0.1, 0.2, 0.5, 0.8, 0.9, 1.0]])
def test_curve_labels_never_overlap(tmp_path: Path, drawn: list[Figure], levels: list[float]) -> None:
    curves = {arm: curve(level, jitter=i) for i, (arm, level) in enumerate(zip(ARMS, levels, strict=True))}
    path = plot_curves(curves, tmp_path / "curves.png", floor=levels[0])
    assert_legible(drawn[0])
    assert_picture(path, drawn[0])
    for axes, metric in zip(drawn[0].axes, ("ca", "asr"), strict=True):
        assert axes.get_ylim() == (0, 1)
        labels = {f"{arm} {points[-1][metric]:.2f}" for arm, points in curves.items()}
        assert {t.get_text() for t in axes.texts} == labels | ({f"floor {levels[0]:.2f}"} if metric == "asr" else set())


def test_many_arms_and_a_single_point_stay_legible(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curves({f"defense_number_{i}": curve(0.5) for i in range(24)}, tmp_path / "many.png", floor=0.5)
    plot_curves({"undefended": curve(0.9, epochs=1)}, tmp_path / "point.png")
    for figure in drawn:
        assert_legible(figure)


def test_seeds_are_thin_and_their_mean_is_thick(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = {seed: curve(0.7, jitter=seed)[::-1] for seed in range(3)}  # the order of the points does not matter
    runs[2] = runs[2][1:]  # the last epoch is missing in one seed
    plot_curves({"dece": runs, "undefended": curve(0.9)}, tmp_path / "curves.png")
    for axes, metric in zip(drawn[0].axes, ("ca", "asr"), strict=True):
        lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
        thin = [line for line in lines if line.get_linewidth() < 1]
        mean = [line for line in lines if line.get_linewidth() > 2 and len(line.get_xdata()) == 5]
        assert (len(thin), len(mean)) == (3, 1)
        by_epoch = [[p[metric] for run in runs.values() for p in run if p["epoch"] == e] for e in mean[0].get_xdata()]
        assert list(mean[0].get_xdata()) == [0.5, 1.0, 1.5, 2.0, 2.5]
        assert mean[0].get_ydata() == pytest.approx(np.mean(by_epoch, axis=1))


def test_curves_refuse_what_cannot_be_drawn(tmp_path: Path) -> None:
    good = curve(0.5)
    for bad, message in [
        ({}, "must hold an arm"),
        ({"dece": []}, "no points"),
        ({"dece": {0: good, 1: []}}, "no points"),
        ({"dece": [*good, {"epoch": 9, "ca": 78.0, "asr": 0.1}]}, "`dece`.*78"),
        ({"dece": [{"epoch": float("nan"), "ca": 0.5, "asr": 0.1}]}, "epoch"),
        ({"dece": [{"epoch": 1, "ca": 0.5, "asr": float("nan")}]}, "in 0..1"),
        ({"dece": {0: good[:2], 1: good[2:]}}, "share an epoch"),
    ]:
        with pytest.raises(ValueError, match=message):
            plot_curves(bad, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
    assert plot_curves({"dece": {0: good[:3], 1: good[2:]}}, tmp_path / "curves.png").exists()


def test_one_metric_makes_one_panel_with_whole_epochs(tmp_path: Path, drawn: list[Figure]) -> None:
    arms = {
        name: [{"epoch": epoch, "asr": level} for epoch in (1, 2, 3, 4)]
        for name, level in (("dece", 0.1), ("undefended", 0.9))
    }
    path = plot_curves(arms, tmp_path / "curves.png", metrics=("asr",))
    (axes,) = drawn[-1].axes
    assert axes.get_title("left").startswith("ASR") and list(axes.get_xticks()) == [1, 2, 3, 4]
    assert_legible(drawn[-1])
    assert_picture(path, drawn[-1])
    with pytest.raises(ValueError, match="points with an epoch and shares `asr` in 0..1"):
        plot_curves({"dece": [{"epoch": 1, "asr": 1.5}]}, path, metrics=("asr",))
    for wrong in ((), ("asr", "auroc")):
        with pytest.raises(ValueError, match="must be among `ca` and `asr`"):
            plot_curves(arms, path, metrics=wrong)


@pytest.mark.parametrize("seed", range(20))
def test_labels_move_as_little_as_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted, gap = rng.random(6), float(rng.uniform(0.02, 0.19))
    placed = np.array(spread(wanted.tolist(), gap))
    order = np.argsort(wanted)
    constraints = [{"type": "ineq", "fun": lambda x, a=a, b=b: x[b] - x[a] - gap} for a, b in zip(order, order[1:])]  # noqa: B905
    start = np.empty(6)
    start[order] = np.linspace(0, 1, 6)
    best = minimize(
        lambda x: ((x - wanted) ** 2).sum(),
        start,
        constraints=constraints,
        bounds=[(0, 1)] * 6,
        options={"ftol": 1e-12},
    )
    assert placed == pytest.approx(best.x, abs=1e-4)
    assert np.diff(placed[order]).min() >= gap - 1e-8


def test_labels_with_room_stay_and_without_room_share_it() -> None:
    assert spread([0.9, 0.1, 0.5], 0.2) == [0.9, 0.1, 0.5]
    assert spread([0.5] * 5, 0.9) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert spread([], 0.1) == [] and spread([0.3], 0.1) == [0.3]


def scores(tail: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(50, 1, 970), 50 + tail * rng.random(30)])
    planted = np.arange(1000) >= 970
    return values, planted, values >= np.sort(values)[-50]


@pytest.mark.parametrize("tail", [5.0, 1000.0, 1e6])
def test_the_bulk_and_the_tail_of_the_scores_are_both_seen(tmp_path: Path, drawn: list[Figure], tail: float) -> None:
    values, planted, dropped = scores(tail)
    path = plot_scores(values, planted.tolist(), tmp_path / "scores.png", dropped=dropped.tolist())
    (figure,) = drawn
    assert_picture(path, figure)
    assert_legible(figure)
    (axes,) = figure.axes

    def place(x: float) -> float:
        return (axes.transData.transform((x, 1.0))[0] - axes.bbox.x0) / axes.bbox.width

    assert 0 <= place(values.min()) and place(values.max()) <= 1
    low, high = np.percentile(values, [5, 95])
    assert place(high) - place(low) > 0.1
    assert all(0 <= place(tick) <= 1 for tick in axes.get_xticks()[1:-1])
    threshold = next(line.get_xdata()[0] for line in axes.lines)
    assert threshold == values[dropped].min()
    texts = " | ".join(t.get_text() for t in figure.texts)
    assert f"970 other rows, {(dropped & ~planted).sum()} dropped" in texts
    assert f"30 planted rows, {(dropped & planted).sum()} dropped" in texts


def test_every_row_is_in_a_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    counted: list[float] = []
    hist = Axes.hist

    def counting(self: Axes, *args: object, **kwargs: object) -> object:
        result = hist(self, *args, **kwargs)
        counted.append(float(np.sum(result[0])))
        return result

    monkeypatch.setattr(Axes, "hist", counting)
    for tail in (5.0, 1e6):
        values, planted, dropped = scores(tail)
        plot_scores(values, planted.tolist(), tmp_path / "s.png", dropped=dropped.tolist())
    assert sorted(set(counted)) == [30, 970]


def test_scores_without_knowledge_without_drops_and_with_a_cap(tmp_path: Path, drawn: list[Figure]) -> None:
    values, _, dropped = scores(1000.0)
    plot_scores(values, None, tmp_path / "a.png", dropped=dropped.tolist())
    plot_scores(values, None, tmp_path / "b.png", dropped=[False] * 1000)
    capped = dropped.copy()
    capped[values.argmax()] = False
    plot_scores(values, None, tmp_path / "c.png", dropped=capped.tolist())
    plot_scores([2.0, 2.0], [True, False], tmp_path / "d.png", dropped=[True, True])
    texts = [" | ".join(t.get_text() for t in [*f.texts, *f.axes[0].texts]) for f in drawn]
    assert "planted" not in texts[0] and "kept above" not in texts[0]
    assert "1000 rows, 0 dropped" in texts[1] and "dropped from" not in texts[1]
    assert "(1 kept above it)" in texts[2]
    for figure in drawn:
        assert_legible(figure)


def test_scores_refuse_what_cannot_be_drawn(tmp_path: Path) -> None:
    path, no = tmp_path / "s.png", [False, False]
    for bad in ([], [[0.1, 0.2]], [0.1, float("nan")], [0.1, float("inf")]):
        with pytest.raises(ValueError, match="`scores`"):
            plot_scores(bad, None, path, dropped=no)
    with pytest.raises(ValueError, match="`dropped`"):
        plot_scores([0.1, 0.2], None, path, dropped=[False])
    with pytest.raises(ValueError, match="`dropped`"):
        plot_scores([0.1, 0.2], None, path, dropped=[0, 1])  # row ids, not flags
    with pytest.raises(ValueError, match="`planted`"):
        plot_scores([0.1, 0.2], [True], path, dropped=no)
    assert not list(tmp_path.iterdir())
    assert plot_scores([0.1, 0.2], no, path, dropped=no).exists()


def test_the_same_numbers_give_the_same_bytes_and_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    one, other = (plot_ca_asr(comparison(), tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == other
    with pytest.raises(ValueError, match="nothing else is drawn"):
        plot_ca_asr([Record("b", "d", "m", "a", "dece", "", 0, "seconds", 3.0)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_matplotlib_is_loaded_when_used_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from hf_backdoor_defense.reporting import plots; assert 'matplotlib' not in sys.modules;"
        "plots.plot_scores([1.0, 2.0], None, sys.argv[1], dropped=[False, True]);"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    root = Path(plots.__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.png")], check=True, cwd=root)


def share(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, 3, value - half, value + half)


def at(ca: float, aasr: float) -> dict[str, Estimate]:
    return {"ca": share(ca), "aasr": share(aasr)}


@pytest.mark.parametrize("last", [0.3, 1.25, 4.0])
def test_doses_are_drawn_where_they_were_measured(tmp_path: Path, drawn: list[Figure], last: float) -> None:
    curve = {last: at(0.8, 0.25), 0.0: at(0.85, 0.99), last / 3: at(0.86, 0.7)}  # in any order
    controls = {"pre-training alone": (last / 2, at(0.85, 0.9))}
    path = plot_dose(curve, tmp_path / "dose.png", floor=at(0.87, 0.2), controls=controls, note="3 seeds")
    (figure,) = drawn
    assert_picture(path, figure)
    assert_legible(figure)
    (axes,) = figure.axes
    lines = {line.get_marker(): line for line in axes.lines if line.get_marker() in "os" and len(line.get_xdata()) == 3}
    for marker, metric in (("o", "ca"), ("s", "aasr")):
        assert lines[marker].get_xdata() == pytest.approx(sorted(curve))
        assert lines[marker].get_ydata() == pytest.approx([curve[x][metric].value for x in sorted(curve)])
    dashed = sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--")
    assert dashed == pytest.approx([0.2, 0.87])
    labels = [t.get_text() for t in axes.texts]
    assert {"CA 0.80", "AASR 0.25", "floor 0.20", "clean CA 0.87", "pre-training alone: AASR 0.90"} <= set(labels)
    for line in axes.lines:  # intervals beyond 0..1 are cut at the axis
        assert 0 <= min(line.get_ydata()) and max(line.get_ydata()) <= 1


def test_a_single_dose_and_equal_figures_stay_legible(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_dose({0.0: at(0.5, 0.5)}, tmp_path / "a.png", floor=at(0.5, 0.5))
    plot_dose(
        {0.0: at(0.0, 1.0), 1.0: at(1.0, 1.0)}, tmp_path / "b.png", floor=at(1, 1), controls={"c": (1.0, at(1, 1))}
    )
    for figure in drawn:
        assert_legible(figure)


def test_doses_refuse_what_cannot_be_drawn(tmp_path: Path) -> None:
    good = at(0.8, 0.2)
    for curve, floor in [({}, good), ({-1.0: good}, good), ({1.0: {"ca": share(0.8)}}, good), ({1.0: good}, {})]:
        with pytest.raises(ValueError, match="doses"):
            plot_dose(curve, tmp_path / "dose.png", floor=floor)
    assert not list(tmp_path.iterdir())
