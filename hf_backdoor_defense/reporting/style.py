"""What all figures share: colors that everyone can tell apart, quiet axes, labels that do not overlap."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors without the yellow, which is too pale for text.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#B0588E", "#C98A00", "#3A9BD0"
GRAY, FAINT = "#555555", "#dddddd"
_FIXED = {"clean_reference": "#111111", "undefended": VERMILION}


def arm_styles(arms: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Color and line style of each arm: the same for the controls everywhere, and for the others by their order.

    Example:
        >>> arm_styles(["undefended", "dece"])
        {'dece': ('#0072B2', '-'), 'undefended': ('#D55E00', '-')}
    """
    arms = list(arms)
    free = [arm for arm in arms if arm not in _FIXED]
    palette = (BLUE, GREEN, PURPLE, ORANGE, SKY)
    styles = {arm: (palette[i % 5], ("-", (0, (5, 2)), (0, (1, 1.5)))[i // 5 % 3]) for i, arm in enumerate(free)}
    return styles | {arm: (color, "-") for arm, color in _FIXED.items() if arm in arms}


def blank(width: float, height: float, *, dpi: int) -> "Figure":
    """An empty white figure, in inches, that no global state of matplotlib knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: "Axes", grid: Literal["x", "y"]) -> None:
    """Two spines, a faint grid across the values, nothing else."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(colors=GRAY, labelcolor="black", labelsize=9)
    axes.grid(axis=grid, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def halo() -> list[Any]:
    """A white rim around text that may stand on a line."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places for labels near where they are wanted, in the same order and `gap` apart, within low..high.

    Args:
        wanted: where each label would like to stand. gap: least distance. low, high: room; where it is too small for
            all, the labels stand evenly in it.

    Example:
        >>> spread([0.5, 0.1, 0.5], 0.2)
        [0.4, 0.1, 0.6]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    # Labels that touch form a block around the mean of what they want (pool adjacent violators on wanted - rank·gap).
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        mean, size = wanted[i] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    shifts = [mean for mean, size in blocks for _ in range(size)]
    top = high - (len(wanted) - 1) * gap
    placed = dict(zip(order, (min(max(s, low), top) + r * gap for r, s in enumerate(shifts)), strict=True))
    return [round(placed[i], 9) for i in range(len(wanted))]


def short(ticks: Sequence[float]) -> list[float]:
    """Ascending ticks with as few digits as tell each from its neighbors.

    Example:
        >>> short([0.98765, 1.23456, 512.3])
        [1.0, 1.2, 500.0]
    """
    gaps = np.minimum(np.diff(ticks, prepend=-np.inf), np.diff(ticks, append=np.inf))
    digits = [-math.floor(math.log10(gap)) if gap > 0 else 6 for gap in gaps]
    return [round(float(tick), d) + 0.0 for tick, d in zip(ticks, digits, strict=True)]
