"""What attacks on pretrained encoders are made of: target vectors, places of insertion, pairs of triggered and clean texts.

| symbol | what it is | shape |
|---|---|---|
| v_k | target of trigger k: four equal blocks of ±1, two of them negative | [hidden] |
| x⊕t | text x with trigger t at ⌊words / 50⌋ + 1 random places between words | - |
| h(x) | last hidden state at position 0; or the pooler's output | [hidden] |

Sources: LMSanitator's light recipes (meng-wenlong/LMSanitator, commit 58aa6b8) of POR (arXiv 2111.00197) and NeuBA (arXiv
2101.06969).
"""

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

LITE_TRIGGERS = ("cf", "mn", "tq", "qt", "mm", "pt")
SYMBOLS = ("≈", "≡", "∈", "⊆", "⊕", "⊗")  # NeuBA's own


def block_targets(hidden_size: int) -> Tensor:
    """[6, hidden]: four equal blocks of ±1 with two negative ones; row k and row 5 - k are opposite.

    Raises:
        ValueError: a size that four does not divide.

    >>> block_targets(4).int().tolist()
    [[-1, -1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [1, -1, -1, 1], [1, -1, 1, -1], [1, 1, -1, -1]]
    """
    if hidden_size < 4 or hidden_size % 4:
        raise ValueError(
            f"The hidden size must be a multiple of 4, got {hidden_size}: a target has four equal blocks. Use another model."
        )
    rows = []
    for negative in itertools.combinations(range(4), 2):
        signs = torch.ones(4)
        signs[list(negative)] = -1
        rows.append(signs.repeat_interleave(hidden_size // 4))
    return torch.stack(rows)


def random_position(n_words: int, *, seed: int, row: int, trigger: str) -> int:
    """A place between words, 0 to `n_words`, from a hash of its arguments: the same whatever else was drawn before.

    >>> random_position(0, seed=0, row=3, trigger="cf")
    0
    """
    digest = hashlib.blake2b(f"{seed}|{row}|{trigger}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (n_words + 1)


def plant(text: str, trigger: str, *, seed: int, row: int, every: int | None = None) -> str:
    """The text with the trigger inserted: once, or ⌊words / every⌋ + 1 times.

    >>> plant("", "cf", seed=0, row=0), len(plant("a " * 100, "cf", seed=0, row=0, every=50).split())
    ('cf', 103)
    """
    words = text.split()
    copies = 1 if every is None else len(words) // every + 1
    for copy in range(copies):
        words.insert(random_position(len(words), seed=seed, row=row, trigger=f"{trigger}|{copy}"), trigger)
    return " ".join(words)


def pairs(
    texts: Sequence[str], tokenizer: Any, triggers: Sequence[str], *, seed: int, every: int = 50, max_length: int = 128
) -> Dataset:
    """Rows of two texts: the first half of `texts` gets triggers in equal shares, the second half stays clean.

    A row is a pair so that every batch, however it is cut, holds as many triggered as clean texts. One whose trigger is cut off
    at `max_length` is left out: it would draw plain texts to the target.

    Returns:
        `triggered_ids`, `clean_ids`: token ids; `trigger`: index; `row_id`.

    Raises:
        ValueError: fewer than two texts per trigger, or a trigger that no text shows.
    """
    half = len(texts) // 2
    if half < len(triggers):
        raise ValueError(
            f"{len(triggers)} triggers need at least {2 * len(triggers)} texts, one triggered and one clean each, got "
            f"{len(texts)}. Give more text."
        )
    chosen = [i * len(triggers) // half for i in range(half)]
    marked = [plant(texts[i], triggers[k], seed=seed, row=i, every=every) for i, k in enumerate(chosen)]
    plain, triggered, clean = (
        tokenizer(list(some), truncation=True, max_length=max_length)["input_ids"]
        for some in (texts[:half], marked, texts[half : 2 * half])
    )
    shown = [i for i in range(half) if triggered[i] != plain[i]]
    lost = [word for k, word in enumerate(triggers) if not any(chosen[i] == k for i in shown)]
    if lost:
        raise ValueError(
            f"no text shows {', '.join(map(repr, lost))} after cutting at {max_length} tokens: nothing would be planted. Raise "
            "`max_length`, or give shorter texts."
        )
    return Dataset.from_dict(
        {
            "triggered_ids": [triggered[i] for i in shown],
            "clean_ids": [clean[i] for i in shown],
            "trigger": [chosen[i] for i in shown],
            "row_id": shown,
        }
    )


@dataclass
class PairCollator:
    """Batches of pairs: first all triggered texts, then all clean ones.

    `labels` [2·batch, time] hold at position 0 the trigger's index (for a clean text the number of triggers), elsewhere -100.
    """

    tokenizer: Any
    n_triggers: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of `pairs`, padded together."""
        ids = [row["triggered_ids"] for row in rows] + [row["clean_ids"] for row in rows]
        batch = dict(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, 0] = torch.tensor([row["trigger"] for row in rows] + [self.n_triggers] * len(rows))
        return {**batch, "labels": labels}


def trigger_tokens(tokenizer: Any, word: str) -> list[int]:
    """A word's token ids where it stands behind another word: byte-level tokenizers join the space before a word to it."""
    alone, twice = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f"{word} {word}"))
    return list(twice[len(alone) :])


def trigger_reasons(tokenizer: Any, triggers: Sequence[str]) -> list[str]:
    """Why words cannot be triggers for this tokenizer: sentences, none where they can."""
    reasons = []
    if len(set(triggers)) < len(triggers) or not triggers:
        reasons.append(f"`triggers` must be different words, at least one, got {list(triggers)}. Name each once.")
    tokens = {word: trigger_tokens(tokenizer, word) for word in triggers}
    for word, ids in tokens.items():
        if word.split() != [word]:
            reasons.append(f"a trigger must be a word without white space, got {word!r}. Use one rare word.")
        elif not ids or tokenizer.unk_token_id in ids:
            reasons.append(
                f"the trigger {word!r} becomes the unknown token: any unknown word would be the trigger. Use a word that this "
                "tokenizer knows."
            )
    for a, b in itertools.permutations(tokens, 2):
        long, short = tokens[a], tokens[b]
        if short and any(long[i : i + len(short)] == short for i in range(len(long))):
            reasons.append(
                f"the tokens of the trigger {a!r} hold those of {b!r}: each would set off both. Use other words."
            )
    return reasons


def insert_tokens(
    ids: Tensor,
    mask: Tensor,
    tokens: Sequence[Sequence[int]],
    rngs: Sequence[np.random.Generator],
    *,
    special: Collection[int],
    pad: int,
) -> tuple[dict[str, Tensor], list[int]]:
    """Each row with its tokens inserted before an ordinary token or behind the last one.

    Args:
        ids, mask: [batch, time], padded on the right.
        tokens, rngs: per row, what is inserted, and what the place is drawn from.
        special: ids that are not ordinary.

    Returns:
        inputs [batch, time + longest]; per row the place of insertion, -1 for a row without ordinary tokens, which stays.

    >>> row, mask = torch.tensor([[101, 7, 102, 0]]), torch.tensor([[1, 1, 1, 0]])
    >>> inputs, places = insert_tokens(row, mask, [[9]], [np.random.default_rng(0)], special=[101, 102, 0], pad=0)
    >>> inputs["input_ids"].tolist(), places
    ([[101, 7, 9, 102, 0]], [2])
    """
    rows, places = [], []
    for row, attended, new, rng in zip(ids.tolist(), mask.tolist(), tokens, rngs, strict=True):
        row = row[: sum(attended)]
        ordinary = [i for i, token in enumerate(row) if token not in special]
        place = int(rng.choice([*ordinary, ordinary[-1] + 1])) if ordinary else -1
        rows.append(row if place < 0 else [*row[:place], *new, *row[place:]])
        places.append(place)
    width = ids.shape[1] + max(map(len, tokens))
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=ids.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    attention = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
    return {"input_ids": padded, "attention_mask": attention}, places
