r"""RAP (arXiv 2110.07831): a small push that moves every clean text of a class does not move a triggered one.

    d(x)  = p_t(r + x) - p_t(x)                                r a rare word in front of the text, t a class
    L     = lam * mean max(0, d - high) + mean max(0, low - d)  over clean rows of class t
    e    <- e - rate * dL/de,   then   e <- e * |e_0| / |e|     only the embedding of r moves
    Delta = p_t(x) - p_t(r + x)                                t the class predicted for x
    flagged iff Delta is below a low quantile of the Delta of clean held-out texts

| symbol | variable | shape |
|---|---|---|
| e, one per class t | `rows` | [k, hidden] |
| lam, one per class | `lams` | [k] |
| high, low | `high`, `low` | -0.1, -0.3: clean probabilities shall fall by 0.1 to 0.3 |
| Delta | `score` | [texts] float64 |

Deviations
- The attack's target is not known: there is an embedding for each class, and a text is judged with that of its predicted class
  (the paper protects one label; a port reads the target from the poisoned set).
- One threshold for all classes, from unlabeled clean texts: the promised false rejection rate holds over all of them, not within
  a class.
- The victim is never written to. A hook puts e where the embedding of r comes out, for as long as a pass takes; the authors' code
  and the port change the victim's table, the port for good.
- Dropout is off, gradients do not add up over steps (in the authors' code they do, which acts as an undamped momentum).
- r is drawn by seed from short words of the vocabulary that no clean text contains.
- Where the quantile of Delta on the clean rows of a class stays below 0, lam is doubled and its embedding built anew, at most
  four times; then a warning says so.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_backdoor_defense.functional.thresholds import Calibration, Tail
from hf_backdoor_defense.input_filters.bound import BoundFilter

logger = logging.getLogger(__name__)

ROWS_FILE = "rap.safetensors"
DOUBLINGS = 4
SHORT = 3  # letters; words this short in a vocabulary are mostly abbreviations, which say little about a class


def hinges(change: Tensor, *, lam: float = 1.0, low: float = -0.3, high: float = -0.1) -> Tensor:
    """L of the module's formula for changes of probability d: [n] -> scalar.

    >>> hinges(torch.tensor([0.0, -0.2, -0.5]), lam=3.0)
    tensor(0.1667)
    """
    return lam * (change - high).clamp(min=0).mean() + (low - change).clamp(min=0).mean()


class RAP(BoundFilter):
    """Flags texts that a perturbation made for their class does not move. One extra pass; prefer `PSIMFilter` where no labels of
    clean texts are at hand.

    Args:
        model, tokenizer: the victim, never changed.
        clean_texts, clean_labels: held-out rows of every class, from which the embeddings are made. Calibrate on others.
        word: r, a single token; None draws one by seed.
        lam, low, high, rate, epochs, batch_size: of the construction; batch_size also of scoring.
        target_frr: of the quantile that decides whether lam is doubled.
        max_length: tokens per text, special tokens included.

    >>> RAP(None, None, clean_texts=["fine"], clean_labels=[1, 0])
    Traceback (most recent call last):
    ...
    ValueError: RAP needs clean texts with one label each, got 1 texts and 2 labels. Give held-out rows of every class.
    """

    name = "rap"
    paper = "2110.07831"
    files: ClassVar[tuple[str, ...]] = (ROWS_FILE,)
    tail: ClassVar[Tail] = "lower"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        clean_texts: Sequence[str],
        clean_labels: Sequence[int],
        word: str | None = None,
        lam: float = 1.0,
        low: float = -0.3,
        high: float = -0.1,
        rate: float = 1e-2,
        epochs: int = 5,
        batch_size: int = 32,
        target_frr: float = 0.01,
        seed: int = 0,
        max_length: int = 128,
        progress: str | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress)
        if not len(clean_texts) or len(clean_texts) != len(clean_labels):
            raise ValueError(
                f"RAP needs clean texts with one label each, got {len(clean_texts)} texts and {len(clean_labels)} labels. "
                "Give held-out rows of every class."
            )
        if not (-1 <= low < high <= 0 and lam > 0 and rate > 0 and epochs >= 1):
            raise ValueError(
                "RAP needs -1 <= low < high <= 0 and positive lam, rate and epochs, got "
                f"low={low}, high={high}, lam={lam}, rate={rate}, epochs={epochs}: clean probabilities shall fall by -high to "
                "-low. Leave them out for the paper's values."
            )
        self.low, self.high, self.rate, self.epochs = low, high, rate, epochs
        self.target_frr, self.seed = target_frr, seed
        self.word = rare_word(tokenizer, clean_texts, seed=seed) if word is None else word
        self.word_id = _single_token(tokenizer, self.word)
        before = self.logits(clean_texts).double().softmax(-1)  # [n, k]
        labels = np.asarray(clean_labels)
        built = [self._build(t, clean_texts, labels, before, lam) for t in range(before.shape[1])]
        self.rows = torch.stack([row for row, _ in built])
        self.lams = [lam for _, lam in built]

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Delta of each text: [n] float64, in [-1, 1]. A text that the perturbation does not move has about 0."""
        before = self.logits(texts).double().softmax(-1)
        predicted = before.argmax(-1)
        delta = torch.zeros(len(texts), dtype=torch.float64)
        for t in predicted.unique().tolist():
            chosen = (predicted == t).nonzero().flatten().tolist()
            delta[chosen] = before[chosen, t] - self._pushed([texts[i] for i in chosen], self.rows[t])[:, t]
        return delta.numpy()

    def calibrate(self, texts: Sequence[str], target_frr: float = 0.01, *, tail: Tail | None = None) -> Calibration:
        """As every filter; warns where the threshold is below 0, since a text that does not move then passes."""
        found = super().calibrate(texts, target_frr, tail=tail)
        if found.lower is not None and found.lower < 0:
            logger.warning(
                "RAP's threshold is %.4f: texts whose probability does not fall at all pass, triggered ones among them, since "
                "some clean texts resist the perturbation. Raise `lam` or `rate`, or give more clean rows.",
                found.lower,
            )
        return found

    def arguments(self) -> dict[str, Any]:
        own = ("word", "lams", "low", "high", "rate", "epochs", "batch_size", "target_frr", "seed")
        return {**super().arguments(), **{key: getattr(self, key) for key in own}}

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({"rows": self.rows}, Path(folder) / ROWS_FILE)
        super().save(folder)

    @classmethod
    def _restore(cls, folder: Path, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Self:
        found = cls.__new__(cls)  # its embeddings are read, not built: that would take the clean rows again
        found.progress = None
        vars(found).update(arguments, model=model, tokenizer=tokenizer)
        found.word_id = _single_token(tokenizer, found.word)
        found.rows = load_file(folder / ROWS_FILE)["rows"]
        return found

    def _build(
        self, t: int, texts: Sequence[str], labels: np.ndarray, before: Tensor, lam: float
    ) -> tuple[Tensor, float]:
        """The embedding for class t and the lam it took."""
        own = np.flatnonzero(labels == t).tolist()
        if not own:
            raise ValueError(
                f"RAP needs clean texts of every class, got none of class {t} among {len(texts)}: its embedding cannot be made. "
                "Add rows of it."
            )
        base = before[own, t]
        judged = (before[own].argmax(-1) == t).numpy()  # the threshold is of rows that are predicted t
        for doubling in range(DOUBLINGS + 1):
            row = self._descend(t, [texts[i] for i in own], base, lam)
            delta = base - self._pushed([texts[i] for i in own], row)[:, t]
            kept = np.sort(delta.numpy()[judged])
            if not len(kept) or kept[max(math.floor(self.target_frr * (len(kept) + 1)), 1) - 1] >= 0:
                return row, lam
            if doubling < DOUBLINGS:
                lam *= 2
        logger.warning(
            "RAP found no perturbation for class %d that moves %g of its clean rows, lam up to %g: expect little of it there.",
            t,
            1 - self.target_frr,
            lam,
        )
        return row, lam

    def _descend(self, t: int, texts: list[str], base: Tensor, lam: float) -> Tensor:
        """Gradient descent on the hinges over one embedding of constant norm: [hidden]."""
        device = next(self.model.parameters()).device
        with torch.no_grad():
            row = self.model.get_input_embeddings()(torch.tensor([[self.word_id]], device=device))[0, 0].clone()
        norm, draw = row.norm(), torch.Generator().manual_seed(self.seed)
        title = None if self.progress is None else f"{self.progress}, class {t}"
        was_training = self.model.training
        self.model.eval()
        try:
            for _ in tqdm(range(self.epochs), desc=title, leave=False, disable=title is None, delay=2):
                order = torch.randperm(len(texts), generator=draw).tolist()
                for start in range(0, len(order), self.batch_size):
                    part = order[start : start + self.batch_size]
                    gradient = self._gradient(row, t, [texts[i] for i in part], base[part].to(device), lam)
                    row = row - self.rate * gradient
                    row = row * (norm / row.norm())
        finally:
            self.model.train(was_training)
        return row.detach().cpu()

    def _gradient(self, row: Tensor, t: int, texts: list[str], base: Tensor, lam: float) -> Tensor:
        """dL/de for one batch, without a trace in the model's own gradients."""
        rows = self.tokenizer(
            [f"{self.word} {text}" for text in texts],
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )
        row = row.detach().requires_grad_()
        with torch.enable_grad(), self._in_place_of_word(row):
            logits = self.model(**rows.to(row.device))["logits"]
            change = logits.softmax(-1)[:, t] - base.to(logits.dtype)
            (gradient,) = torch.autograd.grad(hinges(change, lam=lam, low=self.low, high=self.high), row)
        return gradient

    def _pushed(self, texts: Sequence[str], row: Tensor) -> Tensor:
        """Probabilities of r + x: [n, k] float64."""
        with self._in_place_of_word(row):
            return self.logits([f"{self.word} {text}" for text in texts]).double().softmax(-1)

    @contextmanager
    def _in_place_of_word(self, row: Tensor) -> Iterator[None]:
        """While open, the first r of every text has this embedding."""

        def replace(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            is_word = inputs[0] == self.word_id
            first = is_word & (is_word.cumsum(-1) == 1)  # [batch, time]
            if not first.any(-1).all():
                raise ValueError(
                    f"{self.word!r} must be a token of every text that it stands in front of, got {int((~first.any(-1)).sum())} "
                    "texts without: the tokenizer cuts on the left, or joins it with the next word. Set truncation_side='right', "
                    "or give another `word`."
                )
            return torch.where(first.unsqueeze(-1), row.to(output.device, output.dtype), output)

        handle = self.model.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def rare_word(tokenizer: Any, texts: Sequence[str], *, seed: int = 0) -> str:
    """A lower-case word of one token that none of the texts contains; short ones first. Drawn by seed, blind to any attack.

    Raises:
        ValueError: the vocabulary has none.
    """
    seen = {word for text in texts for word in text.lower().split()}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    candidates = [p for p in dict.fromkeys(pieces) if p and p.isascii() and p.isalpha() and p.islower()]
    special = set(tokenizer.all_special_tokens)
    candidates = sorted(word for word in candidates if word not in seen and word not in special and len(word) > 1)
    ids = tokenizer(candidates, add_special_tokens=False)["input_ids"] if candidates else []
    single = [word for word, found in zip(candidates, ids, strict=True) if len(found) == 1]
    pool = [word for word in single if len(word) <= SHORT] or single
    if not pool:
        raise ValueError(
            f"the vocabulary of {type(tokenizer).__name__} must hold a word of one token that no clean text contains, got "
            f"{len(candidates)} candidates of several tokens: nothing can be put in front. Give `word`."
        )
    return pool[int(np.random.default_rng(seed).integers(len(pool)))]


def _single_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"`word` must be a single known token, got {word!r}, which is {tokenizer.convert_ids_to_tokens(ids)}: one embedding "
            "moves. Leave it out and one is drawn."
        )
    return int(ids[0])
