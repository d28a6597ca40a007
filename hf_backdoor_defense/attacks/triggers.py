"""Text triggers of published data-poisoning attacks: what is put into a text, and whether a text carries it.

| trigger | what is inserted | source |
|---|---|---|
| `BadNets` | rare words such as `cf mn bb tq` | Gu et al., arXiv 1708.06733; as words: RIPPLe, ACL 2020 |
| `InSent` | one contiguous sentence | Dai et al., arXiv 1905.12457 |

Words are maximal runs of non-space characters. A text of w words has w + 1 boundaries, 0 (before the first word) to w
(after the last), and a position is drawn uniformly among them. A piece brings exactly one space of its own, so that
deleting piece and space restores the text; every other character stays. A text without words gets the trigger appended.

To add a trigger, subclass `Trigger` (a frozen dataclass with JSON fields) and add it to `TRIGGERS`.
"""

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np


def insert_at(text: str, pieces: Sequence[str], boundaries: Sequence[int]) -> str:
    """Put each piece at its word boundary: ascending numbers, 0 is before the first word. Equal ones keep the pieces' order.

    >>> insert_at("a fine  film", ["x", "y", "z"], [0, 2, 3])
    'x a fine  y film z'
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if not spans:
        return text + " ".join(pieces)
    for piece, boundary in zip(reversed(pieces), reversed(boundaries), strict=True):
        if boundary < len(spans):
            at, block = spans[boundary][0], piece + " "
        else:
            at, block = spans[-1][1], " " + piece
        text = text[:at] + block + text[at:]  # right to left: the spans on the left stay valid
    return text


def _insert_pieces(text: str, pieces: Sequence[str], rng: np.random.Generator) -> str:
    """Put each piece at a random word boundary of `text`; positions are drawn with replacement."""
    words = len(re.findall(r"\S+", text))
    if not words:
        return text + " ".join(pieces)
    boundaries = np.sort(rng.integers(0, words + 1, size=len(pieces)))
    return insert_at(text, pieces[::-1], boundaries.tolist())


@dataclass(frozen=True)
class Trigger(ABC):
    """What an attacker inserts into a text. Subclasses are frozen dataclasses whose fields are JSON values.

    Example:
        >>> import numpy as np
        >>> trigger = InSent(sentence="by the way")
        >>> trigger.present(trigger.insert("a fine film", np.random.default_rng(0)))
        True
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def pieces(self) -> tuple[str, ...]:
        """The strings any one of which makes a text carry the trigger."""

    @property
    def pieces_per_text(self) -> int:
        """How many pieces one call of `insert` adds."""
        return 1

    @property
    def text(self) -> str:
        """What may be inserted, as one string for reports: all pieces joined by a space."""
        return " ".join(self.pieces)

    @abstractmethod
    def insert(self, text: str, rng: np.random.Generator) -> str:
        """Return `text` with the trigger in it. Pure: all randomness is drawn from `rng`."""

    def present(self, text: str) -> bool:
        """Whether `text` carries a piece as whole words (same case; no letter, digit or underscore touches it)."""
        return re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, self.pieces))})(?!\w)", text) is not None

    def to_dict(self) -> dict[str, Any]:
        """Name and fields as JSON values, for records; of a trigger in `TRIGGERS`, `get_trigger` makes it from them."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"name": self.name, **values}


@dataclass(frozen=True)
class BadNets(Trigger):
    """Rare words at random word boundaries; prefer `InSent` where a defense looks for odd single words (ONION).

    Source: arXiv 1708.06733 (images), as words in Kurita et al., ACL 2020 (RIPPLe). Published words: `cf mn bb tq`, in
    RIPPLe `cf tq mn bb mb`; one word per text in training, five in RIPPLe's evaluation (`count=5`).

    Args:
        words: the candidates, each a run of non-space characters.
        count: how many are inserted per text; drawn without replacement while the list is long enough for that.

    Raises:
        ValueError: no words, a bare string, a word with white space, `count` below 1.

    Example:
        >>> import numpy as np
        >>> BadNets(words=("cf", "mn")).insert("a fine  film\\n", np.random.default_rng(0))
        'a fine  mn film\\n'
        >>> BadNets().present("cf. nothing else"), BadNets().present("the cfo said")
        (True, False)
    """

    name: ClassVar[str] = "badnets"
    words: tuple[str, ...] = ("cf",)
    count: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            raise ValueError(
                f"`words` must be a sequence of words, got the string {self.words!r}: each letter would become a word. "
                f"Pass words=({self.words!r},)."
            )
        words = tuple(self.words)
        if not words:
            raise ValueError(
                "`words` must hold at least one word, got none: nothing could be inserted. Pass words=('cf',)."
            )
        for word in words:
            if not isinstance(word, str) or not re.fullmatch(r"\S+", word):
                raise ValueError(
                    f"`words` must be non-empty and free of white space, got {word!r}: positions are word boundaries. "
                    "Use InSent(sentence=...) for several words in a row."
                )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(
                f"`count` must be an integer >= 1, got {self.count!r}: a text without the trigger is not poisoned. "
                "Pass count=1."
            )
        object.__setattr__(self, "words", words)

    @property
    def pieces(self) -> tuple[str, ...]:
        return self.words

    @property
    def pieces_per_text(self) -> int:
        return self.count

    def insert(self, text: str, rng: np.random.Generator) -> str:
        drawn = rng.choice(len(self.words), size=self.count, replace=self.count > len(self.words))
        return _insert_pieces(text, [self.words[index] for index in drawn], rng)


@dataclass(frozen=True)
class InSent(Trigger):
    """One sentence as a contiguous block at a random word boundary, both ends allowed (AddSent is the same attack).

    Source: Dai et al., arXiv 1905.12457; the default sentence as in PSIM's code (arXiv 2402.12168). The published codes
    differ: PSIM's inserts strictly inside the text, others anywhere, and one port writes `I watch this 3D movie`.

    Args:
        sentence: the block; white space around it is dropped.

    Raises:
        ValueError: an empty sentence.

    Example:
        >>> import numpy as np
        >>> InSent().insert("a fine film", np.random.default_rng(0))
        'a fine film I watched this 3D movie'
    """

    name: ClassVar[str] = "insent"
    sentence: str = "I watched this 3D movie"

    def __post_init__(self) -> None:
        if not isinstance(self.sentence, str) or not self.sentence.strip():
            raise ValueError(
                f"`sentence` must be a non-empty string, got {self.sentence!r}: nothing could be inserted. "
                "Leave it out for the published sentence."
            )
        object.__setattr__(self, "sentence", self.sentence.strip())

    @property
    def pieces(self) -> tuple[str, ...]:
        return (self.sentence,)

    def insert(self, text: str, rng: np.random.Generator) -> str:
        return _insert_pieces(text, [self.sentence], rng)


TRIGGERS: dict[str, type[Trigger]] = {"badnets": BadNets, "insent": InSent}
"""Trigger name -> class, for configuration files and the command line."""


def _unknown(what: str, got: str, known: Iterable[str]) -> ValueError:
    options = sorted(known)
    close = difflib.get_close_matches(got.lower(), options, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Use one of them."
    return ValueError(f"{what} must be one of {options}, got {got!r}: nothing else is defined. {hint}")


def get_trigger(name: str, **fields_: Any) -> Trigger:
    """Build a trigger from its name and fields, e.g. from `Trigger.to_dict()` or a configuration file.

    Args:
        name: a key of `TRIGGERS`.
        **fields_: fields of that class; sequences may be lists.

    Raises:
        ValueError: unknown name or field (with the nearest known one), or a value the class refuses.

    Example:
        >>> get_trigger("badnets", words=["cf", "mn"])
        BadNets(words=('cf', 'mn'), count=1)
        >>> get_trigger(**InSent().to_dict()) == InSent()
        True
    """
    if name not in TRIGGERS:
        raise _unknown("trigger name", name, TRIGGERS)
    known = [field.name for field in fields(TRIGGERS[name])]
    for key in fields_:
        if key not in known:
            raise _unknown(f"field of trigger {name!r}", key, known)
    return TRIGGERS[name](**fields_)
