r"""STRIP for texts (arXiv 1911.10312): a trigger keeps its class whatever else the text says.

    H(x) = mean over N copies of -sum_j p_j log2 p_j,     p = softmax z(copy),     0 log 0 = 0
    copy = x with the top TF-IDF words of one random clean text at floor(swap * w) positions drawn with replacement
    flagged iff H(x) is below a low quantile of the H of clean held-out texts (lower tail of the conformal rule)

| symbol | variable | shape |
|---|---|---|
| N | `copies` | passes of the victim per text |
| w | words of x, by whitespace | |
| H | `score` | [texts] float64, bits |

Deviations from the port in OpenBackdoor: the mean is over one text's copies (the port reshapes a row-major list the wrong way
and averages over different texts), 0 log 0 is 0 and not NaN, 10 copies for 5. Every draw comes from a hash of (seed, text, copy):
a text's score does not depend on its neighbors, their order, or how often it is asked for. A later draw of one position
overwrites an earlier one. A text of one word or none has no position to change: its copies are the text itself.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import torch

from hf_backdoor_defense.functional.thresholds import Tail
from hf_backdoor_defense.input_filters.bound import BoundFilter


class STRIP(BoundFilter):
    """Flags texts whose class survives any mixture. Needs no training; prefer PSIM where ten passes of the victim cost too much.

    Args:
        model, tokenizer: the victim.
        clean_texts: what the mixed-in words come from; saved with the filter. Calibrate on other texts: one that is mixed with
            itself changes less.
        copies: N. swap: share of the words that may be overwritten, in (0, 1].
        max_length: tokens per text, special tokens included.

    >>> strip = STRIP(None, None, clean_texts=["a fine film", "a dull film"], copies=3)
    >>> len(strip.mixtures("one two three four")), strip.mixtures("alone")
    (3, ['alone', 'alone', 'alone'])
    >>> strip.mixtures("one two three four") == strip.mixtures("one two three four")
    True
    """

    name = "strip"
    paper = "1911.10312"
    tail: ClassVar[Tail] = "lower"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        clean_texts: Sequence[str],
        copies: int = 10,
        swap: float = 0.5,
        seed: int = 0,
        max_length: int = 128,
        batch_size: int = 64,
        progress: str | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress)
        if copies < 1 or not 0 < swap <= 1:
            raise ValueError(
                f"`copies` must be >= 1 and `swap` in (0, 1], got {copies} and {swap}: an entropy is averaged over copies with a "
                "share of their words overwritten. Set copies=10, swap=0.5."
            )
        self.clean_texts = [text for text in clean_texts if text.split()]
        if not self.clean_texts:
            raise ValueError(
                f"`clean_texts` must hold texts with words, got {len(clean_texts)} texts without any: nothing could be mixed in. "
                "Give clean held-out texts of the task."
            )
        self.copies, self.swap, self.seed = copies, swap, seed
        self.donors = top_words(self.clean_texts)

    @property
    def passes(self) -> float:
        return float(self.copies)

    def arguments(self) -> dict[str, Any]:
        own = {"clean_texts": self.clean_texts, "copies": self.copies, "swap": self.swap, "seed": self.seed}
        return {**super().arguments(), **own}

    def mixtures(self, text: str) -> list[str]:
        """The copies of one text, the same ones at every call."""
        words = text.split()
        count = math.floor(self.swap * len(words))
        if count == 0:
            return [text] * self.copies
        mixed = []
        for copy in range(self.copies):
            # Lengths of the parts are fixed or last, so that no two triples share a key.
            key = blake2b(f"{self.seed}:{copy}:{text}".encode(errors="surrogatepass"), digest_size=8).digest()
            draw = np.random.default_rng(int.from_bytes(key))
            places = draw.integers(len(words), size=count)
            donor = self.donors[draw.integers(len(self.donors))]
            changed = list(words)
            for place, word in zip(places, donor, strict=False):  # a short donor has fewer words
                changed[place] = word
            mixed.append(" ".join(changed))
        return mixed

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """H of each text: [n] float64, in bits."""
        logits = self.logits([copy for text in texts for copy in self.mixtures(text)])
        entropy = torch.special.entr(logits.double().softmax(-1)).sum(-1) / math.log(2)  # [texts * copies], by text
        return entropy.view(len(texts), self.copies).mean(1).numpy()


def top_words(texts: Sequence[str]) -> list[list[str]]:
    """The distinct words of each text by falling TF-IDF weight (of equals, the alphabetically first).

    >>> top_words(["a film a", "a plot"])
    [['a', 'film'], ['plot', 'a']]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=str.split)  # words by whitespace, as everywhere here
    weights = vectorizer.fit_transform(texts)
    names = vectorizer.get_feature_names_out()
    ranked = []
    for i in range(len(texts)):
        row = weights[[i]]
        order = np.lexsort((row.indices, -row.data))
        ranked.append([str(names[row.indices[j]]) for j in order])
    return ranked
