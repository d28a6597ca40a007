"""Counts per bin of what was recorded per training row: small enough for `results.json`, enough to draw.

    bins: even on x, or, with a long tail, even on t(x) = arcsinh((x - median) / w), w the third quartile of |x - median|

All seeds of an arm share their edges, so that their counts can be added.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 52
LONG = 12  # a tail is long when it reaches this many quartile distances from the median


class Stretch:
    """A scale on which the bulk and a long tail are both seen.

    Args:
        values: [n] finite, at least one.

    Example:
        >>> stretch = Stretch([0.0, 1.0, 2.0, 3.0, 500.0])
        >>> stretch.is_long, bool(np.isclose(stretch.restore(stretch.squeeze(7.0)), 7.0))
        (True, True)
    """

    def __init__(self, values: ArrayLike) -> None:
        array = np.asarray(values, dtype=np.float64)
        self.middle = float(np.median(array))
        distance = np.abs(array - self.middle)
        self.width = float(np.percentile(distance, 75)) or float(distance.max()) or 1.0
        self.low, self.high = float(array.min()), float(array.max())
        self.is_long = float(distance.max()) > LONG * self.width

    def squeeze(self, x: Any) -> Any:
        """t(x)."""
        return np.arcsinh((np.asarray(x) - self.middle) / self.width)

    def restore(self, t: Any) -> Any:
        """The inverse of `squeeze`."""
        return self.middle + self.width * np.sinh(np.asarray(t))

    def edges(self, *, even: bool = False) -> np.ndarray:
        """[BINS + 1] edges, a little beyond the values on both sides; `even`: on x itself, whatever the tail."""
        stretched = self.is_long and not even
        start, end = (float(self.squeeze(x)) if stretched else x for x in (self.low, self.high))
        pad = 0.04 * (end - start) or 0.5
        places = np.linspace(start - pad, end + pad, BINS + 1)
        return self.restore(places) if stretched else places


def count_rows(
    seeds: Mapping[int, tuple[Sequence[int], Sequence[float]]],
    *,
    planted: Mapping[int, Collection[int]],
    dropped: Mapping[int, Collection[int]] | None = None,
) -> dict[str, Any] | None:
    """A histogram over the training rows of one arm.

    Args:
        seeds: by seed, row ids [n] and one value per row [n]. Values that are not finite are left out.
        planted: by seed, the rows that the simulated attack changed; a seed that is absent does not know them.
        dropped: by seed, the rows that the method left out of its refit; None for a record that drops nothing. What drops
            rows is a score and may have a long tail; bins of a record are even.

    Returns:
        `edges`, and by seed (as text, for JSON) the counts `planted` (None where not known) and `other` with the means
        `planted_mean` and `other_mean` (None without rows); with `dropped`, also how many `planted_dropped` and
        `other_dropped` there are and `lowest_dropped`, the lowest value of one. None where there is no value.

    Example:
        >>> found = count_rows({0: ([7, 8, 9], [0.1, 0.2, 0.9])}, planted={0: {9}})
        >>> sum(found["seeds"]["0"]["other"]), found["seeds"]["0"]["planted"][-3:]
        (2, [0, 1, 0])
    """
    arrays = {
        seed: (np.asarray(ids)[keep], array[keep])
        for seed, (ids, values) in seeds.items()
        for array in [np.asarray(values, dtype=np.float64)]
        for keep in [np.isfinite(array)]
    }
    everything = np.concatenate([values for _, values in arrays.values()]) if arrays else np.zeros(0)
    if not everything.size:
        return None
    edges = Stretch(everything).edges(even=dropped is None)
    by_seed = {}
    for seed, (ids, values) in arrays.items():
        is_planted = np.isin(ids, list(planted.get(seed, ())))
        entry: dict[str, Any] = {
            "planted": np.histogram(values[is_planted], edges)[0].tolist() if seed in planted else None,
            "other": np.histogram(values[~is_planted], edges)[0].tolist(),
            "planted_mean": float(values[is_planted].mean()) if is_planted.any() else None,
            "other_mean": float(values[~is_planted].mean()) if (~is_planted).any() else None,
        }
        if dropped is not None:
            gone = np.isin(ids, list(dropped.get(seed, ())))
            entry["planted_dropped"] = int((is_planted & gone).sum()) if seed in planted else None
            entry["other_dropped"] = int((~is_planted & gone).sum())
            entry["lowest_dropped"] = float(values[gone].min()) if gone.any() else None
        by_seed[str(seed)] = entry
    return {"edges": edges.tolist(), "seeds": by_seed}
