"""Figures of a purification: how far each weight was moved, and which units stand out. As `figures.py` makes them: SVG.

| function | shows |
|---|---|
| `distances` | d_l / r_l of each weight: 0 is where it was, 2 its opposite on the sphere |
| `unit_scores` | modified z-scores beside their threshold: a bar per class, or all hidden units by rank |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_backdoor_defense.reporting.figures import WIDTH, Picture, _svg
from hf_backdoor_defense.reporting.style import BLUE, GRAY, VERMILION, blank, halo, plain

MOST_BARS = 40
_LETTER = 0.068  # inches of a letter at eight points


def distances(layers: Sequence[Mapping[str, Any]]) -> Picture | None:
    """A bar for each weight; of more than 40 those that moved most. None without any.

    >>> distances([{"name": "classifier.weight", "ratio": 0.5}]).alt
    'Distance of each weight from where it was: classifier.weight 0.50.'
    """
    if not layers:
        return None
    kept = sorted(range(len(layers)), key=lambda i: -layers[i]["ratio"])[:MOST_BARS]
    chosen = [layers[i] for i in sorted(kept)]
    names = [_cut(layer["name"].removesuffix(".weight")) for layer in chosen]
    values = [layer["ratio"] for layer in chosen]
    top = max(0.1, *values) * 1.12
    axes, figure = _bars(names, values, [BLUE] * len(values), low=0.0, high=top)
    axes.set_xlabel("distance ÷ radius (0: where it was, 2: its opposite)", fontsize=9)
    left = f", the {MOST_BARS} of {len(layers)} that moved most" if len(layers) > len(chosen) else ""
    words = "; ".join(f"{layer['name']} {layer['ratio']:.2f}" for layer in chosen)
    title = f"Distance of each weight from where it was{left}"
    return Picture(title=title, alt=f"{title}: {words}.", svg=_svg(figure))


def unit_scores(
    layer: Mapping[str, Any], *, threshold: float, labels: Sequence[str] | None, words: str = "modified z-score"
) -> Picture:
    """How far each unit stands out from the median, flagged ones in red.

    Args:
        layer: `name`, `z` [K] and `flagged`. labels: of the K classes; None where the units are hidden ones.

    >>> unit_scores({"name": "classifier", "z": [0.1, 9.0], "flagged": [1]}, threshold=3.5, labels=["bad", "good"]).alt
    'Units of classifier: modified z-score, threshold 3.5; flagged: good 9.0.'
    """
    z, flagged = np.asarray(layer["z"], dtype=float), set(layer["flagged"])
    names = [f"unit {i}" for i in range(len(z))] if labels is None else list(labels)
    found = "; ".join(f"{names[i]} {z[i]:.1f}" for i in sorted(flagged, key=lambda i: -z[i])[:12])
    title = f"Units of {layer['name']}"
    alt = f"{title}: {words}, threshold {threshold:g}; flagged: {found or 'none'}."
    low, high = min(0.0, float(z.min())) * 1.08, max(threshold, float(z.max())) * 1.14
    if labels is not None and len(z) <= MOST_BARS:
        colors = [VERMILION if i in flagged else BLUE for i in range(len(z))]
        axes, figure = _bars(
            [_cut(name, 22) for name in names], z.tolist(), colors, low=low, high=high, digits=1, top=0.3
        )
        axes.axvline(threshold, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2)
        at, spot, ha = (threshold, 1.0), ("data", "axes fraction"), "center"
        axes.set_xlabel(words, fontsize=9)
    else:
        figure = blank(WIDTH, 2.9, dpi=100)
        axes = figure.add_axes((0.62 / WIDTH, 0.5 / 2.9, 1 - 0.75 / WIDTH, 1 - 0.75 / 2.9))
        plain(axes, "y")
        order = np.argsort(-z)
        marked = np.isin(order, list(flagged))
        for chosen, color, size in ((~marked, BLUE, 2.5), (marked, VERMILION, 5)):
            axes.plot(np.flatnonzero(chosen) + 1, z[order][chosen], "o", color=color, markersize=size, clip_on=False)
        axes.axhline(threshold, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set(xlim=(0, len(z) + 1), ylim=(low, high))
        axes.set_xlabel("units, the one that stands out most first", fontsize=9)
        axes.set_ylabel(words, fontsize=9)
        at, spot, ha = (1.0, threshold), ("axes fraction", "data"), "right"
    axes.annotate(
        f"threshold {threshold:g}", at, (0, 3), xycoords=spot, textcoords="offset points", ha=ha, fontsize=9, color=GRAY,
        path_effects=halo(),
    )  # fmt: skip
    return Picture(title=title, alt=alt, svg=_svg(figure))


def _bars(
    names: Sequence[str], values: Sequence[float], colors: Sequence[str], *, low: float, high: float, digits: int = 2,
    top: float = 0.1,
) -> tuple[Any, Any]:  # fmt: skip
    """Horizontal bars with their values at the ends."""
    step = 0.3 if len(names) <= 12 else 0.19
    size = 9 if len(names) <= 12 else 8
    height = 0.5 + top + step * len(names)
    figure = blank(WIDTH, height, dpi=100)
    left = min(0.2 + _LETTER * max(map(len, names)), 0.6 * WIDTH)
    axes = figure.add_axes((left / WIDTH, 0.5 / height, 1 - (left + 0.35) / WIDTH, step * len(names) / height))
    plain(axes, "x")
    for y, (value, color) in enumerate(zip(values, colors, strict=True)):
        axes.barh(y, value, height=0.7, color=color, alpha=0.8, linewidth=0)
        axes.annotate(
            f"{value:.{digits}f}", (max(value, 0.0), y), (4, 0), textcoords="offset points", va="center", fontsize=size - 0.5,
            path_effects=halo(),
        )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)))
    axes.set_yticklabels(names, fontsize=size)
    axes.tick_params(axis="y", length=0)
    return axes, figure


def _cut(name: str, length: int = 34) -> str:
    """The end of a long name, which is what differs."""
    return name if len(name) <= length else "…" + name[-(length - 1) :]
