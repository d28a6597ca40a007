"""The contract of what looks at inputs: a filter scores texts, is calibrated on clean ones, and flags.

| member | what it is |
|---|---|
| `score(texts)` | [n] float64, one per text in the order given; the only thing a filter must bring |
| `tail` | which extremes are suspicious: "upper", "lower" or "both" |
| `calibrate(texts, target_frr)` | thresholds from clean, unlabeled texts (split conformal, `functional/thresholds.py`) |
| `flag(texts)`, `flags(scores)` | [n] bool, by the calibration |
| `passes` | forwards of the victim's size per text, before the victim's own; for comparisons of cost |
| `save(folder)`, `from_pretrained(folder)` | JSON and safetensors, no pickle |

A filter never drops an input: whoever asked gets one answer per text. It knows no labels of the inputs, no trigger, no target.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hf_backdoor_defense.fetching import fetched
from hf_backdoor_defense.functional.thresholds import Calibration, Tail, clopper_pearson, conformal_threshold

FILTER_FILE = "filter.json"


class Uncalibrated(ValueError):
    """A filter was asked to flag before it was calibrated."""


class Filter(ABC):
    """Base of every filter.

    >>> class Length(Filter):
    ...     name = "length"
    ...     tail = "upper"
    ...     def score(self, texts):
    ...         return np.array([float(len(text)) for text in texts])
    >>> by_length = Length()
    >>> by_length.calibrate(["a" * i for i in range(1, 100)], target_frr=0.01).upper
    99.0
    >>> by_length.flag(["short", "b" * 200])
    array([False,  True])
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str | None] = None
    tail: ClassVar[Tail] = "both"
    edits: ClassVar[bool] = False  # whether it hands on a changed text rather than a flag (ONION)
    calibration: Calibration | None = None
    calibrated_on: frozenset[int] = frozenset()  # hashes of the calibration texts: they measure nothing afterwards

    @abstractmethod
    def score(self, texts: Sequence[str]) -> np.ndarray:
        """[n] float64. An empty text and a text of one word have a score as every other."""

    @property
    def passes(self) -> float:
        """Forwards of the victim's size that one text costs, without the victim's own."""
        return 1.0

    def calibrate(self, texts: Sequence[str], target_frr: float = 0.01, *, tail: Tail | None = None) -> Calibration:
        """Set the thresholds from clean texts that the filter was not trained on; their labels are not needed.

        Raises:
            ValueError: too few texts for the rate.
        """
        self.calibration = conformal_threshold(self.score(texts), target_frr, tail=tail or self.tail)
        self.calibrated_on = frozenset(map(text_hash, texts))
        return self.calibration

    def flags(self, scores: Any) -> np.ndarray:
        """[n] bool for scores that were computed before. Raises Uncalibrated."""
        if self.calibration is None:
            raise Uncalibrated(
                f"{self.name} has no threshold yet: nothing can be flagged. Call calibrate(clean_texts) with held-out texts."
            )
        return self.calibration.flags(scores)

    def flag(self, texts: Sequence[str]) -> np.ndarray:
        """[n] bool, one per text."""
        return self.flags(self.score(texts))

    def measure_frr(self, texts: Sequence[str]) -> dict[str, float]:
        """The false rejection rate on further clean texts, with a Clopper-Pearson interval: value, n, low, high.

        Raises:
            ValueError: texts that it was calibrated on, whose rate is known beforehand.
        """
        known = sum(text_hash(text) in self.calibrated_on for text in texts)
        if known:
            raise ValueError(
                f"{known} of {len(texts)} texts are among those that {self.name} was calibrated on: their rate was chosen and "
                "measures nothing. Give texts that were kept apart."
            )
        flagged = self.flag(texts)
        low, high = clopper_pearson(int(flagged.sum()), len(flagged))
        return {"value": float(flagged.mean()), "n": len(flagged), "low": low, "high": high}

    def to_dict(self) -> dict[str, Any]:
        """Name, calibration and what a subclass adds: JSON values, for `save`."""
        calibration = None if self.calibration is None else self.calibration.to_dict()
        return {
            "version": 1,
            "name": self.name,
            "calibration": calibration,
            "calibrated_on": sorted(self.calibrated_on),
        }

    def save(self, folder: str | Path) -> None:
        """Write `filter.json`, whole or not at all; a subclass adds its tensors beside it, before calling this."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{FILTER_FILE}.partial"
        partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        os.replace(partial, folder / FILTER_FILE)


def text_hash(text: str, salt: str = "") -> int:
    """A signed 64-bit hash of a text: to know it again without keeping it, and, with a salt, to draw texts in any order alike.

    >>> text_hash("a fine film") == text_hash("a fine film"), text_hash("a fine film") == text_hash("a fine film", "1|")
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(f"{salt}{text}".encode(), digest_size=8).digest(), "big", signed=True)


def read_filter(
    folder: str | Path, name: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[dict[str, Any], Calibration | None]:
    """What `save` wrote, for a subclass's `from_pretrained`.

    Args:
        folder: a folder, or ORG/NAME on the Hub, where `revision` is a branch, tag or commit.

    Raises:
        ValueError: no such file, another filter's, or a newer version's.
    """
    path = fetched(folder, [FILTER_FILE], revision=revision, token=token) / FILTER_FILE
    if not path.is_file():
        raise ValueError(f"`{folder}` has no {FILTER_FILE}: no filter was saved there. Check the path.")
    record = json.loads(path.read_text())
    if record.get("version") != 1:
        raise ValueError(f"`{path}` has version {record.get('version')!r}, this package reads 1. Upgrade the package.")
    if record.get("name") != name:
        raise ValueError(f"`{folder}` holds the filter {record.get('name')!r}, not {name!r}. Load it by its own class.")
    calibration = record.get("calibration")
    return record, None if calibration is None else Calibration.from_dict(calibration)
