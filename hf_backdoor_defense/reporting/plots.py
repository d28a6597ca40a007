"""Figures of a run or a benchmark as PNG: labels stand at what they name, colors can be told apart by everyone.

| function | shows |
|---|---|
| `plot_ca_asr` | CA and ASR of each arm with their intervals, beside the floor |
| `plot_curves` | CA and ASR while training |
| `plot_scores` | how suspicious the training rows look, and which are dropped |
| `plot_dose` | CA and AASR against RECIPE's dose, beside the floor |

Figures are drawn on objects of their own: no global state of matplotlib is read or left behind but its style defaults.
Files are written whole or not at all, and are the same bytes for the same numbers.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.reporting.histograms import Stretch
from hf_backdoor_defense.reporting.results import Record, write_bytes
from hf_backdoor_defense.reporting.style import BLUE, GRAY, VERMILION, arm_styles, blank, halo, plain, short, spread
from hf_backdoor_defense.reporting.tables import Row, seeds_note, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
Points = Sequence[Mapping[str, float]]


def _save(figure: "Figure", path: str | Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())


def plot_ca_asr(records: Iterable[Record], path: str | Path) -> Path:
    """CA and ASR of each arm, one row per arm in the order of the table, with the floor of ASR as a dashed line.

    Args:
        records: of one comparison, as for `render_terminal`. path: of the PNG.

    Returns:
        The path.

    Raises:
        ValueError: as `summarize`; no record of `ca`, `asr` or `ftr`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = Record("run", "sst2", "minilm", "badnets", "undefended", "", 0, "asr", 0.98, 400, 0.95, 0.99)
        ...     plot_ca_asr([record], f"{folder}/arms.png").name
        'arms.png'
    """
    shown = ("ca", "asr", "ftr")
    rows = [row for row in summarize(records) if set(shown) & set(row.estimates)]
    if not rows:
        raise ValueError("`records` must hold `ca`, `asr` or `ftr`, got none: nothing else is drawn. Evaluate first.")
    names = max(len(row.arm) for row in rows)
    width, height = 8.0, 0.95 + 0.62 * len(rows)
    figure = blank(width, height, dpi=DPI)
    left = (0.4 + 0.085 * names) / width
    axes = figure.add_axes((left, 0.6 / height, 0.89 - left, 1 - 0.95 / height))
    plain(axes, "x")
    floors = [row.estimates["ftr"].value for row in rows if row.defense == "clean_reference" and "ftr" in row.estimates]
    if len(floors) == 1:
        axes.axvline(floors[0], color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            f"floor: FTR of the clean reference {floors[0]:.2f}",
            (floors[0], 1.0),
            (0 if floors[0] < 0.75 else 4, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if floors[0] < 0.5 else "right",
            fontsize=8.5,
            color=GRAY,
        )
    for y, row in enumerate(rows):
        if y % 2 == 0:
            axes.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", zorder=0, linewidth=0)
        _draw_arm(axes, y, row)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), xticks=np.linspace(0, 1, 6))
    axes.set_yticklabels([row.arm for row in rows], fontsize=10)
    axes.tick_params(axis="y", length=0, pad=10)
    axes.spines["left"].set_visible(False)
    note = seeds_note(rows, shown)
    axes.set_xlabel(f"share {note}" if "interval" in note else f"share with 95 % interval {note}", fontsize=9)
    return _save(figure, path)


def _draw_arm(axes: "Axes", y: int, row: Row) -> None:
    marks = {"ca": ("CA", BLUE, "o"), "asr": ("ASR", VERMILION, "s"), "ftr": ("FTR", GRAY, "D")}
    found = [metric for metric in marks if metric in row.estimates]
    for metric, at in zip(found, np.linspace(-0.17, 0.17, len(found)) if len(found) > 1 else [0.0], strict=True):
        name, color, marker = marks[metric]
        e = row.estimates[metric]
        low, high = (e.value if bound is None else min(max(bound, 0.0), 1.0) for bound in (e.low, e.high))
        axes.plot([low, high], [y + at] * 2, color=color, linewidth=2, solid_capstyle="butt", clip_on=False)
        axes.plot(e.value, y + at, marker, color=color, markersize=6.5, clip_on=False, zorder=3)
        axes.annotate(
            f"{name} {e.value:.2f}",
            (max(high, e.value), y + at),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
            path_effects=halo(),
        )


def _seeds(
    arm: str, curves: Points | Mapping[Any, Points], metrics: Sequence[str]
) -> list[dict[float, Mapping[str, float]]]:
    """Per seed, the points by epoch in order."""
    runs = list(curves.values()) if isinstance(curves, Mapping) else [curves]
    for run in runs:
        broken = [p for p in run if not math.isfinite(p["epoch"]) or not all(0 <= p[m] <= 1 for m in metrics)]
        if not run or broken:
            raise ValueError(
                f"The curve of `{arm}` must be points with an epoch and shares `{'` and `'.join(metrics)}` in 0..1, got "
                f"{broken[0] if broken else 'no points'}: it could not be drawn. Pass what the evaluation returned."
            )
    return [{p["epoch"]: p for p in sorted(run, key=lambda p: p["epoch"])} for run in runs]


def plot_curves(
    curves: Mapping[str, Points | Mapping[Any, Points]],
    path: str | Path,
    *,
    floor: float | None = None,
    metrics: Sequence[str] = ("ca", "asr"),
) -> Path:
    """CA and ASR over the epochs, one line per arm, named at its end.

    Args:
        curves: {arm: [{"epoch": 0.5, "ca": 0.7, "asr": 0.9}, ...]}, or {arm: {seed: [...]}}: then a thin line per seed
            and a thick one for the mean at the epochs that all seeds have.
        path: of the PNG. floor: FTR of the clean reference, drawn dashed beside the ASR.
        metrics: `ca`, `asr` or both: a panel for each.

    Returns:
        The path.

    Raises:
        ValueError: no arms, an arm without points, shares outside 0..1, seeds without a common epoch, other metrics.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     curve = [{"epoch": 1, "ca": 0.7, "asr": 0.9}, {"epoch": 2, "ca": 0.8, "asr": 1.0}]
        ...     plot_curves({"undefended": curve}, f"{folder}/curves.png", floor=0.2).name
        'curves.png'
    """
    from matplotlib.ticker import MaxNLocator

    if not curves:
        raise ValueError("`curves` must hold an arm, got none: there is nothing to draw. Evaluate while training.")
    titles = {"ca": "CA, clean accuracy", "asr": "ASR, attack success rate"}
    if not metrics or not set(metrics) <= set(titles):
        raise ValueError(f"`metrics` must be among `ca` and `asr`, got {list(metrics)}: each is a panel. Fix it.")
    arms = {arm: _seeds(arm, given, metrics) for arm, given in curves.items()}
    styles = arm_styles(arms)
    panel, room = 2.9 if len(metrics) > 1 else 4.3, 0.3 + 0.074 * (5 + max(map(len, arms)))
    width, height = 0.15 + len(metrics) * (panel + room + 0.35), max(3.6, 1.0 + 0.2 * (len(arms) + 1))
    figure = blank(width, height, dpi=DPI)
    last = max(max(run) for runs in arms.values() for run in runs)
    start = min(min(run) for runs in arms.values() for run in runs)
    whole = all(epoch == int(epoch) for runs in arms.values() for run in runs for epoch in run)
    start, span = (start, last - start) if last > start else (start - 0.5, 1.0)
    for column, metric in enumerate(metrics):
        left = 0.5 + column * (panel + room + 0.35)
        axes = figure.add_axes((left / width, 0.55 / height, panel / width, 1 - 0.95 / height))
        plain(axes, "y")
        ends: list[tuple[str, float, float, str]] = []  # label, x, y, color
        for arm, runs in arms.items():
            color, style = styles[arm]
            common = [epoch for epoch in runs[0] if all(epoch in run for run in runs)]
            if not common:
                raise ValueError(f"The seeds of `{arm}` must share an epoch, got none: the mean needs it. Align them.")
            for run in runs if len(runs) > 1 else []:
                axes.plot(list(run), [p[metric] for p in run.values()], color=color, linewidth=0.8, alpha=0.45)
            mean = [sum(run[epoch][metric] for run in runs) / len(runs) for epoch in common]
            marker = "o" if len(common) <= 12 else None
            axes.plot(common, mean, marker=marker, ls=style, color=color, linewidth=2.2, markersize=4.5, clip_on=False)
            ends.append((f"{arm} {mean[-1]:.2f}", common[-1], mean[-1], color))
        if floor is not None and metric == "asr":
            axes.axhline(floor, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2)
            ends.append((f"floor {floor:.2f}", last, floor, GRAY))
        axes.set(xlim=(start, start + span), ylim=(0, 1), yticks=np.linspace(0, 1, 6))
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_title(titles[metric], fontsize=10, loc="left")
        places = spread([y for _, _, y, _ in ends], 0.17 / (height - 0.95))
        for (label, x, y, color), place in zip(ends, places, strict=True):
            at = start + span * 1.06
            axes.plot([x, at], [y, place], color=color, linewidth=0.7, alpha=0.7, clip_on=False)
            axes.text(at + span * 0.01, place, label, color=color, fontsize=9, va="center")
    return _save(figure, path)


def plot_scores(
    scores: ArrayLike, planted: Sequence[bool] | None, path: str | Path, *, dropped: Sequence[bool]
) -> Path:
    """How many rows have which suspicion score; counts and long tails are drawn on logarithmic-like axes.

    Args:
        scores: [rows] finite; higher is more suspicious.
        planted: [rows] whether the simulated attack put the row there; None where that is not known.
        path: of the PNG.
        dropped: [rows] whether the defense drops the row. The lowest score of such a row is marked; a cap per class
            may keep rows above it.

    Returns:
        The path.

    Raises:
        ValueError: no rows, scores that are not finite, unequal lengths.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_scores([0.1, 0.2, 5.0], [False, False, True], f"{folder}/s.png", dropped=[False, False, True]).name
        's.png'
    """
    values, gone = np.asarray(scores, dtype=np.float64), np.asarray(dropped)
    poisoned = np.zeros(values.shape, dtype=bool) if planted is None else np.asarray(planted)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"`scores` must be finite, one per row, got shape {values.shape}: they are binned. Drop NaN rows."
        )
    for name, flags in (("planted", poisoned), ("dropped", gone)):
        if flags.shape != values.shape or flags.dtype != bool:
            raise ValueError(
                f"`{name}` must be {values.size} times True or False, got shape {flags.shape} of {flags.dtype}: "
                "there is one flag per score. Make it with `[i in chosen for i in row_ids]`."
            )
    figure = blank(8.0, 4.2, dpi=DPI)
    axes = figure.add_axes((0.085, 0.13, 0.88, 0.68))
    plain(axes, "y")
    edges = _stretch(axes, values).tolist()
    groups = [("other rows" if planted is not None else "rows", ~poisoned, BLUE)]
    groups += [("planted rows", poisoned, VERMILION)] if planted is not None else []
    for line, (name, chosen, color) in enumerate(groups):
        axes.hist(values[chosen], bins=edges, histtype="stepfilled", color=color, alpha=0.35)
        axes.hist(values[chosen], bins=edges, histtype="step", color=color, linewidth=1.3)
        text = f"■ {chosen.sum()} {name}, {(chosen & gone).sum()} dropped"
        figure.text(0.085, 0.89 + 0.05 * (len(groups) - 1 - line), text, color=color, fontsize=9.5)
    if gone.any():
        threshold = float(values[gone].min())
        kept = int((~gone & (values > threshold)).sum())
        axes.axvline(threshold, color="black", linestyle=(0, (4, 3)), linewidth=1.2)
        x = (axes.transData.transform((threshold, 1.0)) - axes.bbox.min)[0] / axes.bbox.width
        text = f"lowest dropped: {threshold:.3g}" + (f" ({kept} kept above it)" if kept else "")
        axes.text(x, 1.02, text, transform=axes.transAxes, ha="right" if x > 0.5 else "left", fontsize=9)
    axes.set(yscale="log", ylim=(0.6, None))
    axes.yaxis.set_major_formatter("{x:.0f}")
    stretched = " (the axis is compressed in the tails)" if axes.get_xscale() == "function" else ""
    axes.set_xlabel("suspicion score" + stretched, fontsize=9)
    axes.set_ylabel("rows per bin (log)", fontsize=9)
    return _save(figure, path)


def _stretch(axes: "Axes", values: np.ndarray) -> np.ndarray:
    """Sets a scale on which the bulk and a long tail are both seen, and returns the edges of the bins, even on it."""
    stretch = Stretch(values)
    edges = stretch.edges()
    axes.set_xlim(edges[0], edges[-1])
    if not stretch.is_long:
        return edges
    axes.set_xscale("function", functions=(stretch.squeeze, stretch.restore))
    axes.set_xlim(edges[0], edges[-1])
    start, end = (float(stretch.squeeze(x)) for x in (stretch.low, stretch.high))
    ticks = stretch.restore(np.linspace(start, end, 9))
    axes.set_xticks(short(ticks))
    axes.xaxis.set_major_formatter("{x:.6g}")
    return edges


def plot_dose(
    curve: Mapping[float, Mapping[str, Estimate]],
    path: str | Path,
    *,
    floor: Mapping[str, Estimate],
    controls: Mapping[str, tuple[float, Mapping[str, Estimate]]] | None = None,
    note: str = "",
) -> Path:
    """CA and AASR against the dose of a purification, with intervals; AASR of the clean model as a dashed line.

    Args:
        curve: {dose: {"ca": …, "aasr": …}}; dose 0 is the poisoned model. path: of the PNG.
        floor: the clean model's "ca" and "aasr", drawn across.
        controls: {name: (dose, {"ca": …, "aasr": …})}, hollow marks: what was trained as long without the penalty.
        note: stands below, for the number of seeds.

    Returns:
        The path.

    Raises:
        ValueError: no doses, a dose below 0, a point without `ca` or `aasr`.

    Example:
        >>> import tempfile
        >>> def share(value):
        ...     return Estimate(value, 3, value - 0.02, value + 0.02)
        >>> points = {0.0: {"ca": share(0.85), "aasr": share(0.98)}, 1.25: {"ca": share(0.84), "aasr": share(0.3)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_dose(points, f"{folder}/dose.png", floor={"ca": share(0.86), "aasr": share(0.2)}).name
        'dose.png'
    """
    controls = controls or {}
    points = [*curve.items(), *controls.values()]
    if not curve or any(
        not (math.isfinite(x) and x >= 0 and {"ca", "aasr"} <= set(y)) for x, y in [*points, (0.0, floor)]
    ):
        raise ValueError(
            "`curve`, `floor` and `controls` must give `ca` and `aasr` at doses >= 0, got doses "
            f"{[x for x, _ in points]}: both are drawn at each dose. Measure each arm."
        )
    width, height = 8.0, 4.4
    right = 0.5 + 0.074 * max(map(len, ["clean CA 0.00", *(f"{name}: AASR 0.00" for name in controls)]))
    figure = blank(width, height, dpi=DPI)
    axes = figure.add_axes((0.55 / width, 0.6 / height, 1 - (0.55 + right) / width, 1 - 0.95 / height))
    plain(axes, "y")
    last = max(x for x, _ in points) or 1.0
    ends: list[tuple[str, float, float, str]] = []  # label, x, y, color
    for metric, name, color, marker in (("ca", "CA", BLUE, "o"), ("aasr", "AASR", VERMILION, "s")):
        doses = sorted(curve)
        line = [curve[dose][metric].value for dose in doses]
        axes.plot(doses, line, marker, ls="-", color=color, lw=2.2, ms=5.5, clip_on=False)
        for dose, of_dose in points:
            e = of_dose[metric]
            low, high = (e.value if bound is None else min(max(bound, 0.0), 1.0) for bound in (e.low, e.high))
            axes.plot([dose, dose], [low, high], color=color, linewidth=1.2, clip_on=False)
        ends.append((f"{name} {line[-1]:.2f}", doses[-1], line[-1], color))
        for control, (dose, of_control) in controls.items():
            value = of_control[metric].value
            axes.plot(dose, value, marker, color=color, mfc="white", mew=1.5, ms=6.5, clip_on=False, zorder=3)
            ends.append((f"{control}: {name} {value:.2f}", dose, value, color))
        value = floor[metric].value
        shade = GRAY if metric == "aasr" else color
        axes.axhline(value, color=shade, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        ends.append((f"{'floor' if metric == 'aasr' else 'clean CA'} {value:.2f}", last, value, shade))
    axes.set(xlim=(0, last), ylim=(0, 1), yticks=np.linspace(0, 1, 6))
    axes.set_xlabel("dose: sum of learning rates ÷ standard deviation of the weights", fontsize=9)
    axes.set_title(f"share, mean and 95 % interval{f' ({note})' if note else ''}", fontsize=10, loc="left")
    places = spread([y for _, _, y, _ in ends], 0.19 / (height - 0.95))
    for (label, x, y, color), place in zip(ends, places, strict=True):
        axes.plot([x, last * 1.05], [y, place], color=color, linewidth=0.7, alpha=0.7, clip_on=False)
        axes.text(last * 1.06, place, label, color=color, fontsize=9, va="center")
    return _save(figure, path)
