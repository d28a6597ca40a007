r"""ONION (arXiv 2011.10369): a word without which a language model finds the text more natural is suspicious, and deleted.

    PPL(x) = exp(mean over the tokens of x of -log p(token | those before it))
    f_i    = PPL(x) - PPL(x without word i)                   all words with f_i >= b are deleted at once

| symbol | variable | shape |
|---|---|---|
| f | `suspicions` | [words] per text; words by whitespace |
| max_i f_i | `score` | [texts] |
| b | `bar` | scalar, from clean texts by `choose_bar` |

Cost: words + 1 passes of the language model per text, hence `suspicions` is computed once and handed on.

Defined where the paper is silent
- The first token needs a context: the tokenizer's bos token, else its cls, else its eos (GPT-2's separator of documents). That
  token itself is no part of the mean; neither is padding (a known port counts it, with pad = eos).
- A text of one word or none has nothing to compare with: f = 0, and it is never edited. A text all of whose words would go stays
  unchanged. The last word counts as every other (the code of a paper that compares with ONION drops it).
- PPL(x) is taken of the words joined by single blanks, as the variants are; otherwise blanks would count as suspicious.
- `max_length` cuts what the language model reads: words behind it have f = 0 and stay, whatever the bar is.
- b: the smallest whose clean held-out accuracy falls by no more than a point. The paper tunes it; triggered texts are never used.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX
from hf_backdoor_defense.functional.thresholds import Tail
from hf_backdoor_defense.input_filters.bound import BoundFilter
from hf_backdoor_defense.models import predict_logits


class ONION(BoundFilter):
    """Deletes words that do not fit in. Needs no look at the victim; prefer `STRIP` or PSIM where words + 1 passes cost too much,
    or where the trigger is a fluent sentence.

    Args:
        model: a causal language model of the texts' language. Its quality decides: state `perplexity(held_out)` beside results.
        tokenizer: the language model's, not the victim's.
        bar: b, in units of perplexity; None until `choose_bar`. While it is set, `flags` asks score >= bar, else the
            calibration decides.
        max_length: tokens per text with the bos token.

    >>> class Letters(ONION):  # a language model that finds long words strange
    ...     def perplexities(self, texts):
    ...         return np.array([float(max(map(len, text.split()))) for text in texts])
    >>> onion = Letters(nn.Identity(), None, bar=5.0)
    >>> onion.suspicions(["so abracadabra good"])
    [array([0., 7., 0.])]
    >>> onion.edit(["so abracadabra good", "abracadabra"])
    ['so good', 'abracadabra']
    """

    name = "onion"
    paper = "2011.10369"
    tail: ClassVar[Tail] = "upper"
    edits = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        bar: float | None = None,
        max_length: int = 96,
        batch_size: int = 64,
        progress: str | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress)
        room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if room is not None and max_length > room:
            raise ValueError(
                f"`max_length` must be <= {room}, the positions of this language model, got {max_length}. Set max_length={room}."
            )
        self.bar = None if bar is None else float(bar)
        self._passes = float("nan")

    @property
    def passes(self) -> float:
        """Passes of the language model per text, over the texts scored last: mean words + 1. NaN before."""
        return self._passes

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "bar": self.bar}

    def suspicions(self, texts: Sequence[str]) -> list[np.ndarray]:
        """f for each text: [words] float64."""
        words = [text.split() for text in texts]
        # Row 0 of a text is the whole of it, row i + 1 lacks word i.
        variants = [[row, *(row[:i] + row[i + 1 :] for i in range(len(row)))] if len(row) > 1 else [] for row in words]
        flat = [" ".join(variant) for several in variants for variant in several]
        values = np.split(
            self.perplexities(flat) if flat else np.zeros(0), np.cumsum([len(several) for several in variants])[:-1]
        )
        self._passes = len(flat) / len(texts) if len(texts) else float("nan")
        # NaN where no token is left to judge by.
        return [
            np.nan_to_num(ppl[0] - ppl[1:]) if len(ppl) else np.zeros(len(row))
            for row, ppl in zip(words, values, strict=False)
        ]

    def score(self, texts: Sequence[str], *, suspicions: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Largest f of each text: [texts] float64; 0 for a text of one word or none."""
        return np.array([f.max(initial=-np.inf) if len(f) > 1 else 0.0 for f in self._given(texts, suspicions)])

    def flags(self, scores: Any) -> np.ndarray:
        """[n] bool: score >= bar where there is a bar, else by the calibration."""
        return super().flags(scores) if self.bar is None else np.asarray(scores, dtype=np.float64) >= self.bar

    def edit(
        self, texts: Sequence[str], *, bar: float | None = None, suspicions: Sequence[np.ndarray] | None = None
    ) -> list[str]:
        """The texts without their suspicious words; a text that keeps all of them comes back as it was, blanks included.

        Raises:
            ValueError: no bar was given or chosen, or suspicions of other texts.
        """
        bar = self.bar if bar is None else bar
        if bar is None:
            raise ValueError(
                "onion has no bar yet, got None: no word can be deleted. Call choose_bar(clean_texts, labels, predict)."
            )
        return [
            _without(text, (f >= bar) & (f != 0)) for text, f in zip(texts, self._given(texts, suspicions), strict=True)
        ]

    def choose_bar(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        predict: Callable[[list[str]], Any],
        *,
        bars: Iterable[float] = range(0, 301, 10),
        max_drop: float = 0.01,
        suspicions: Sequence[np.ndarray] | None = None,
    ) -> float:
        """Set `bar` to the smallest of `bars` under which accuracy falls by at most `max_drop`, and return it.

        Args:
            texts, labels: clean and held out.
            predict: texts -> [n] int, the victim's classes; asked once per distinct text.

        Raises:
            ValueError: no texts, lengths that differ, or no bar that keeps the accuracy.
        """
        if not len(texts) or len(texts) != len(labels):
            raise ValueError(
                f"`choose_bar` needs clean texts with one label each, got {len(texts)} texts and {len(labels)} labels."
            )
        suspicions = self._given(texts, suspicions)
        known: dict[str, int] = {}

        def right(edited: Sequence[str]) -> int:
            new = [text for text in dict.fromkeys(edited) if text not in known]
            if new:
                known.update(zip(new, (int(label) for label in predict(new)), strict=True))
            return sum(known[text] == int(label) for text, label in zip(edited, labels, strict=True))

        before = right(texts)
        tried = sorted(float(bar) for bar in bars)
        for bar in tried:
            if before - right(self.edit(texts, bar=bar, suspicions=suspicions)) <= max_drop * len(texts) + 1e-9:
                self.bar = bar
                return bar
        raise ValueError(
            f"no bar of {tried} keeps accuracy within {max_drop:g} of {before / len(texts):.3f} on {len(texts)} clean texts: the "
            "language model finds too many clean words strange. Give larger `bars`, a better model, or a larger max_drop."
        )

    def perplexities(self, texts: Sequence[str]) -> np.ndarray:
        """PPL of each text: [n] float64; NaN for a text without tokens."""
        total, count = self._losses(texts)
        return np.exp(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))

    def perplexity(self, texts: Sequence[str]) -> float:
        """Of all texts together, every token weighing the same: what states how good the language model is."""
        total, count = self._losses(texts)
        return float(np.exp(total.sum() / count.sum()))

    def _losses(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Sum of -log p over a text's tokens, and their number."""
        start = _context(self.tokenizer)
        ids = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=self.max_length - 1)
        rows = [{"input_ids": [start, *row]} for row in ids["input_ids"]]
        values = predict_logits(
            _TokenLosses(self.model), rows, _collate, batch_size=self.batch_size, progress=self.progress
        )
        total, count = values.double().numpy().T
        return total, count

    def _given(self, texts: Sequence[str], suspicions: Sequence[np.ndarray] | None) -> Sequence[np.ndarray]:
        if suspicions is None:
            return self.suspicions(texts)
        sizes, expected = [len(f) for f in suspicions], [len(text.split()) for text in texts]
        if sizes != expected:
            raise ValueError(
                f"`suspicions` must hold one value per word of each text, got {sizes[:5]} for texts of {expected[:5]} words "
                "(first five shown): they belong to other texts. Pass what suspicions(texts) returned for these."
            )
        return suspicions


class _TokenLosses(nn.Module):
    """A language model as something that answers [batch, 2] per text, so that its large logits live for one batch only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)  # a pass puts back the mode that it finds here

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask)["logits"]  # [batch, time, vocabulary]
        targets = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX).roll(-1, dims=1)
        targets[:, -1] = IGNORE_INDEX
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape).float()
        return {"logits": torch.stack([losses.sum(1), (targets != IGNORE_INDEX).sum(1).float()], dim=1)}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right, where a causal model does not look; the tokenizer needs no padding token."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length], mask[i, :length] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask}


def _context(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        f"the language model's {type(tokenizer).__name__} must have a bos, cls or eos token, got none: the first word of a text "
        "would have no context and no perplexity. Set tokenizer.bos_token to what its training texts began with."
    )


def _without(text: str, gone: np.ndarray) -> str:
    if not gone.any() or gone.all() or len(gone) < 2:
        return text
    return " ".join(word for word, drop in zip(text.split(), gone, strict=True) if not drop)
