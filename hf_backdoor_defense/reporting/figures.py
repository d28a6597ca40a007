"""Figures of the report as SVG: narrow enough to be read on a phone, the same bytes for the same numbers.

| function | shows |
|---|---|
| `bars` | one share of each arm with its interval, beside the floor |
| `lines` | a value over the epochs: an arm's seeds thin, their mean thick, the arm's name at its end |
| `counts` | how many training rows have which value, planted and other rows apart |

The PNG files of a run folder are `plots.py`. Every figure comes as a `Picture`, with words for those who do not see it.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_backdoor_defense.reporting.runs import Histogram
from hf_backdoor_defense.reporting.style import BLUE, GRAY, VERMILION, arm_styles, blank, plain, short, spread
from hf_backdoor_defense.reporting.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.2  # inches: nine-point text is still read on a phone
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a number may stand on a dashed line
Series = Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]  # arm -> seed -> (epoch, value)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing, what stands above it, and what it shows in words."""

    title: str
    alt: str
    svg: bytes
    note: str = ""


def _svg(figure: "Figure") -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hfbd", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return b"\n".join(line.strip() for line in buffer.getvalue().splitlines())  # indentation is a tenth of it


def bars(
    rows: Sequence[Row],
    metric: str,
    *,
    title: str,
    arms: Sequence[str],
    floor: float | None = None,
    line: tuple[str, float] | None = None,
) -> Picture | None:
    """A bar per arm that has the metric, with its interval; None where no arm has it.

    Args:
        rows: what `tables.summarize` made. metric: a share.
        arms: all arms of the run, so that an arm has the same color in every figure.
        floor: the FTR of the clean reference, drawn dashed and as the bar of the arm `clean_reference`.
        line: the name and value of what else to mark.

    Example:
        >>> from hf_backdoor_defense.evaluation.metrics import Estimate
        >>> row = Row("dece", "dece", {"ca": Estimate(0.8, 100, 0.7, 0.9)}, {"ca": 3})
        >>> bars([row], "ca", title="CA", arms=["dece"]).alt
        'CA: dece 0.80 [0.70, 0.90].'
    """
    found = [
        (row, row.estimates[name])
        for row in rows
        for name in (metric, *(("ftr",) if floor is not None else ()))
        if name in row.estimates
    ]
    if not found:
        return None
    top = 0.12 if floor is None and line is None else 0.3
    height = 0.32 + top + 0.36 * len(found)
    figure = blank(WIDTH, height, dpi=100)
    left = 0.2 + 0.078 * max(len(row.arm) for row, _ in found)
    axes = figure.add_axes((left / WIDTH, 0.32 / height, 1 - (left + 0.62) / WIDTH, 0.36 * len(found) / height))
    plain(axes, "x")
    words = []
    styles = arm_styles(dict.fromkeys([*arms, *(row.defense for row, _ in found)]))
    for y, (row, estimate) in enumerate(found):
        low, high = (
            estimate.value if bound is None else min(max(bound, 0.0), 1.0) for bound in (estimate.low, estimate.high)
        )
        color = styles[row.defense][0]
        axes.barh(y, estimate.value, height=0.62, color=color, alpha=0.75, linewidth=0)
        axes.plot([low, high], [y, y], color="black", linewidth=1.4, solid_capstyle="butt", clip_on=False)
        for bound in (low, high):
            axes.plot([bound] * 2, [y - 0.13, y + 0.13], color="black", linewidth=1.4, clip_on=False)
        at = (max(high, estimate.value), y)
        text = f"{estimate.value:.2f}"
        axes.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=9.5, bbox=_BEHIND)
        interval = "" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]"
        words.append(f"{row.arm} {text}{interval}")
    marks = [("floor", floor, (0, (4, 3)))] if floor is not None else []
    marks += [(line[0], line[1], (0, (1, 2)))] if line is not None else []
    for name, value, style in marks:
        axes.axvline(value, color=GRAY, linestyle=style, linewidth=1.2)
        axes.annotate(
            f"{name} {value:.2f}",
            (value, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if value < 0.5 else "right",
            fontsize=9,
            color=GRAY,
        )
        words.append(f"{name} {value:.2f}")
    axes.set(xlim=(0, 1), ylim=(len(found) - 0.5, -0.5), yticks=range(len(found)), xticks=np.linspace(0, 1, 6))
    axes.set_yticklabels([row.arm for row, _ in found], fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    return Picture(title=title, alt=f"{title}: {'; '.join(words)}.", svg=_svg(figure))


def lines(
    series: Series, *, title: str, arms: Sequence[str], share: bool = False, floor: float | None = None
) -> Picture | None:
    """A value over the epochs; None without a point.

    Args:
        series: by arm and seed. arms: all arms of the run, as for `bars`.
        share: whether the axis is 0..1. floor: a dashed line at this value.

    Example:
        >>> lines({"dece": {0: [(1.0, 0.9), (2.0, 0.7)]}}, title="loss", arms=["dece"]).alt
        'loss over the epochs: dece from 0.9 to 0.7.'
    """
    runs = {arm: [sorted(points) for points in seeds.values() if points] for arm, seeds in series.items()}
    runs = {arm: found for arm, found in runs.items() if found}
    if not runs:
        return None
    styles = arm_styles(arms)
    xs = [x for found in runs.values() for points in found for x, _ in points]
    ys = [y for found in runs.values() for points in found for _, y in points] + ([] if floor is None else [floor])
    start, end = min(xs), max(xs)
    start, span = (start, end - start) if end > start else (start - 0.5, 1.0)
    pad = 0.06 * (max(ys) - min(ys)) or 0.05 * abs(max(ys)) or 0.5
    low, high = (0.0, 1.0) if share else (min(ys) - pad, max(ys) + pad)
    ends: list[tuple[str, float, float, str]] = []  # label, x, y, color
    drawn: list[tuple[Any, Any, str, Any, float]] = []  # x, y, color, style, width
    words = []
    for arm, found in runs.items():
        color, style = styles[arm]
        grid = [x for x, _ in found[0] if all(points[0][0] <= x <= points[-1][0] for points in found)] or [
            found[0][0][0]
        ]
        # Seeds may have logged at other places (a refit has fewer steps): between two points a line is a line.
        mean = np.mean([np.interp(grid, *np.transpose(points)) for points in found], axis=0)
        drawn += [(*np.transpose(points), color, style, 0.8) for points in found if len(found) > 1]
        drawn.append((grid, mean, color, style, 2.0))
        ends.append((f"{arm} {_number(mean[-1], share)}", grid[-1], float(mean[-1]), color))
        words.append(f"{arm} from {_number(mean[0], share)} to {_number(mean[-1], share)}")
    if floor is not None:
        ends.append((f"floor {floor:.2f}", start + span, floor, GRAY))
        words.append(f"floor {floor:.2f}")
    height = max(2.5, 0.75 + 0.19 * len(ends))
    figure = blank(WIDTH, height, dpi=100)
    ticks = _nice(low, high, 5)
    names = [f"{tick:.3g}" for tick in ticks]
    left, right = 0.22 + 0.075 * max(map(len, names)), 0.32 + 0.073 * max(len(label) for label, *_ in ends)
    axes = figure.add_axes((left / WIDTH, 0.5 / height, 1 - (left + right) / WIDTH, 1 - 0.62 / height))
    plain(axes, "y")
    for x, y, color, style, width in drawn:
        thin = width < 1
        marker = "o" if not thin and len(x) <= 12 else None
        axes.plot(x, y, marker=marker, ls=style, color=color, lw=width, ms=4, alpha=0.4 if thin else 1.0, clip_on=False)
    if floor is not None:
        axes.axhline(floor, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set(xlim=(start, start + span), ylim=(low, high))
    axes.set_yticks(ticks, names)
    axes.set_xlabel("epoch", fontsize=9)
    places = spread([(y - low) / (high - low) for _, _, y, _ in ends], 0.175 / (height - 0.62))
    for (label, x, y, color), place in zip(ends, places, strict=True):
        at, to = start + span * 1.05, low + place * (high - low)
        axes.plot([x, at], [y, to], color=color, linewidth=0.7, alpha=0.7, clip_on=False)
        axes.text(at + span * 0.01, to, label, color=color, fontsize=9, va="center")
    return Picture(title=title, alt=f"{title} over the epochs: {'; '.join(words)}.", svg=_svg(figure))


def _number(value: float, share: bool) -> str:
    return f"{value:.2f}" if share else f"{value:.3g}"


def counts(
    histogram: Histogram,
    *,
    title: str,
    axis: str,
    groups: tuple[str, str] = ("other rows", "planted rows"),
    gone: str = "dropped",
    bounds: Sequence[float] | None = None,
) -> Picture:
    """Rows per bin on a logarithmic axis, all seeds together; dashed lines where rows begin to be dropped.

    Args:
        histogram: of one arm. axis: what the value is.
        groups, gone: what its `other` and `planted` rows are, and what became of those that are counted as dropped.
        bounds: where the dashed lines are, in place of the lowest value that was dropped.

    Example:
        >>> seeds = {0: {"planted": [0, 2], "other": [5, 0], "planted_mean": 0.9, "other_mean": 0.1}}
        >>> counts(Histogram(arm="dece", name="pull", edges=[0, 0.5, 1], seeds=seeds), title="Pull", axis="pull").alt
        'Pull: 5 other rows, mean 0.1; 2 planted rows, mean 0.9.'
    """
    entries = list(histogram.seeds.values())
    known = all(entry["planted"] is not None for entry in entries)
    parts = [("other", groups[0] if known else "rows", BLUE)] + ([("planted", groups[1], VERMILION)] * known)
    edges = np.asarray(histogram.edges)
    places = np.arange(len(edges))  # every bin is as wide as any other, whatever the scale
    height = 2.9
    figure = blank(WIDTH, height, dpi=100)
    axes = figure.add_axes((0.66 / WIDTH, 0.5 / height, 1 - 0.8 / WIDTH, 1 - (0.74 + 0.2 * len(parts)) / height))
    plain(axes, "y")
    words = []
    for line, (group, name, color) in enumerate(parts):
        total = np.sum([entry[group] for entry in entries], axis=0)
        axes.stairs(np.maximum(total, 0.5), places, baseline=0.5, fill=True, color=color, alpha=0.3)
        axes.stairs(np.maximum(total, 0.5), places, baseline=0.5, color=color, linewidth=1.3)
        text = f"{int(total.sum())} {name}"
        means = [(e[f"{group}_mean"], sum(e[group])) for e in entries if e.get(f"{group}_mean") is not None]
        if total.sum() and means:
            text += f", mean {np.average([mean for mean, _ in means], weights=[n for _, n in means]):.3g}"
        left = [e[f"{group}_dropped"] for e in entries if e.get(f"{group}_dropped") is not None]
        text += f", {sum(left)} {gone}" if left else ""
        words.append(text)
        y = 1 - (0.17 + 0.2 * (len(parts) - 1 - line)) / height
        figure.text(0.66 / WIDTH, y, f"■ {text}", color=color, fontsize=9.5)
    lowest = [e["lowest_dropped"] for e in entries if e.get("lowest_dropped") is not None] if bounds is None else []
    for x in np.interp([*lowest, *(bounds or ())], edges, places):
        axes.axvline(x, color="black", linestyle=(0, (4, 3)), linewidth=1)
    if lowest:
        words.append("lowest dropped " + ", ".join(f"{x:.3g}" for x in lowest))
        x = float(np.interp(min(lowest), edges, places)) / places[-1]
        axes.text(x, 1.02, "lowest dropped", transform=axes.transAxes, ha="right" if x > 0.5 else "left", fontsize=9)
    is_even = np.allclose(np.diff(edges), edges[1] - edges[0])
    ticks = _nice(edges[0], edges[-1], 6) if is_even else short(edges[2:-1:8].tolist())
    axes.set_xticks(np.interp(ticks, edges, places), [f"{tick:.6g}" for tick in ticks])
    axes.set(yscale="log", ylim=(0.5, None), xlim=(0, places[-1]))
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(axis + ("" if is_even else " (the axis is compressed in the tails)"), fontsize=9)
    axes.set_ylabel("rows per bin (log)", fontsize=9)
    return Picture(title=title, alt=f"{title}: {'; '.join(words)}.", svg=_svg(figure))


def _nice(low: float, high: float, count: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [
        float(tick)
        for tick in MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high
    ]
