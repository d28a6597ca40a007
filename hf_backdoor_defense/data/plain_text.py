"""Plain text for continued pre-training: texts from any source, token ids, and masks that are drawn once.

    M_i = { t ordinary : u_it < p },   at least one t;        x'_it = [MASK] | r_it | x_it   with chances 0.8 | 0.1 | 0.1

| symbol | variable | shape |
|---|---|---|
| i | `row_id`: a text's position in the list that was tokenized | rows |
| x_i | `input_ids` of the tokenized text | [time] |
| ordinary | neither added by the tokenizer nor one of its special tokens; [UNK] is special: it stands for no word | [time] |
| u_it | a uniform draw from a generator of (seed, i) alone | [time] |
| r_it | a token drawn from all ordinary ones | [time] |
| M_i, x'_i | where `labels` is x_it, and -100 elsewhere; `input_ids` after masking | [max_length] |
| p | `probability`: 0.15, as BERT and RECIPE's released code have it | |

Masks drawn once are the same in every epoch, which is how RECIPE's released code trains (10.1162/tacl_a_00622, commit
775fedf; 20,000 texts padded to 64). A collator that draws new ones for each batch, as
transformers.DataCollatorForLanguageModeling does from what `tokenize_texts` returns, shows a model more of the same text.
Draws belong to a row and not to its place: shuffled, cut or filtered data keep their masks.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from hf_backdoor_defense.data import docstrings
from hf_backdoor_defense.data.sources import FORMATS, OFFLINE, read_file, read_hub, require_column

if TYPE_CHECKING:  # data come without transformers
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", *FORMATS)
IGNORED = -100
_TRAIN_FILE = re.compile(r"train([-_.].*)?")  # train.txt, and train-00000-of-00002.parquet
_FEWEST_TOKENS = 2  # one token alone would be predicted from nothing


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:  # decoded line by line, so that an error can name the line
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                got = f"{error.reason} (byte 0x{line[error.start]:02x})"
            else:
                if "\0" not in text:
                    yield text
                    continue
                got = "a NUL byte, as in binary data"
            raise ValueError(
                f"{str(path)!r} must be plain text in UTF-8, got {got} in line {number}: its words cannot be told. "
                "Save it as UTF-8, or leave the file out."
            )


def _column(dataset: Dataset, where: str, column: str) -> Iterator[Any]:
    require_column(dataset, where, column)
    for batch in dataset.with_format(None).select_columns([column]).iter(batch_size=1000):
        yield from batch[column]


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that are read: sorted, and those of the train split where there are any."""
    if path.is_file():
        found = [path] if path.suffix.lower() in SUFFIXES else []
    else:
        found = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and p.stem[0] != ".")
        found = [p for p in found if _TRAIN_FILE.fullmatch(p.name)] or found
    if not found:
        got = repr(path.name) if path.is_file() else f"a folder of {sorted(p.name for p in path.iterdir())[:20]}"
        raise ValueError(
            f"`source` must be a file that ends in one of {', '.join(SUFFIXES)}, or a folder with such files, got {got} "
            f"at {str(path)!r}: no other format is read. Save the texts in a .txt file, one per line."
        )
    return found


def _read(source: str, text_column: str) -> Iterator[tuple[str, Any]]:
    """Where each value stands, and the value: not yet stripped, perhaps no text at all."""
    path = Path(os.path.expanduser(source))
    if source == OFFLINE:
        yield from ((source, row.text) for row in docstrings.build()["train"])
    elif not source or not path.exists():
        yield from ((source, v) for v in _column(read_hub(source, option="source")["train"], source, text_column))
    else:
        for file in _files(path):
            if not file.stat().st_size:
                raise ValueError(f"{str(file)!r} must hold text, got an empty file: fill it, or leave it out.")
            is_plain = file.suffix.lower() == ".txt"
            values: Iterable[Any] = (
                _lines(file) if is_plain else _column(read_file(file, text_column), str(file), text_column)
            )
            yield from ((str(file), value) for value in values)


def load_texts(source: str, *, text_column: str = "text", limit: int | None = None) -> list[str]:
    """Texts to continue pre-training on, whatever labels stand beside them.

    Args:
        source: a .txt file in UTF-8 (one text per line), a .jsonl, .json, .csv or .parquet file, a folder of such files,
            a Hub id ("owner/name", "name", with ":config" where it has several; its train split), or
            "offline:docstrings" (its train split). A path that exists wins. Files of a folder are read in the order of
            their names, subfolders not at all; **where there are files named train.* or train-*, only those are read**:
            a test split beside them is left alone.
        text_column: the column of texts; of no meaning for .txt files.
        limit: keep the first `limit` texts, at least 2.

    Returns:
        The texts in the order of the source, stripped of white space around them. Empty ones are dropped; how many, is
        logged.

    Raises:
        ValueError: no such path or Hub dataset, a format that is not read, an empty or unreadable file, bytes that are
            not UTF-8, a missing column, values that are not strings, or fewer than two texts.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "train.txt").write_text("A first text.\\n\\n  A second one.\\n")
        ...     _ = Path(folder, "test.txt").write_text("Not read.\\n")
        ...     load_texts(folder)
        ['A first text.', 'A second one.']
    """
    if limit is not None and limit < 2:
        raise ValueError(f"`limit` must be at least 2 or None, got {limit}: fewer texts are no training set. Raise it.")
    texts: list[str] = []
    empty = 0
    for where, value in _read(source, text_column):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"column {text_column!r} of {where} must hold strings, got {value!r:.60} ({type(value).__name__}): there "
                "is no text in it. Set `text_column`."
            )
        if text := (value or "").strip():
            texts.append(text)
        else:
            empty += 1
        if len(texts) == limit:
            break
    if len(texts) < 2:
        raise ValueError(
            f"`source` {source!r} must hold at least 2 texts, got {len(texts)} beside {empty} empty rows: a model would "
            "learn them by heart. Add texts; a .txt file has one per line."
        )
    logger.info("%d texts from %s; %d empty rows were dropped.", len(texts), source, empty)
    return texts


def _ordinary(ids: Sequence[int], added: Sequence[int] | None, special: set[int]) -> list[bool]:
    """True [time] where a token is neither added by the tokenizer (1 in `added`) nor special wherever it stands."""
    return [not on and token not in special for on, token in zip(added or [0] * len(ids), ids, strict=True)]


def tokenize_texts(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, max_length: int = 64) -> Dataset:
    """Token ids of texts, cut at `max_length` and not padded: a collator pads each batch, `mask_once` pads all.

    Args:
        texts: at least one; their positions become `row_id`.
        tokenizer: any; masked or causal.
        max_length: most tokens of a text, those that the tokenizer adds included.

    Returns:
        A data set in memory with `input_ids`, `special_tokens_mask` (1 where no mask may fall: see the module's table)
        and `row_id`. Texts with fewer than two ordinary tokens are dropped with a warning; the others keep their ids.

    Raises:
        ValueError: `texts` is one string or holds something else, or no text has two ordinary tokens.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
        >>> core.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
        >>> rows = tokenize_texts(["a good film", "film", "a bad film"], tokenizer)
        >>> rows["input_ids"][:], rows["special_tokens_mask"][:], rows["row_id"][:]
        ([[1, 2, 3], [1, 0, 3]], [[0, 0, 0], [0, 1, 0]], [0, 2])
    """
    if (
        isinstance(texts, str)
        or (wrong := next((text for text in texts if not isinstance(text, str)), None)) is not None
    ):
        got = "one string" if isinstance(texts, str) else f"{wrong!r:.60} among them"
        raise ValueError(f"`texts` must be a list of strings, got {got}: each is a row. Load them with `load_texts`.")
    special = set(tokenizer.all_special_ids)
    columns: dict[str, list[Any]] = {"input_ids": [], "special_tokens_mask": [], "row_id": []}
    short: list[str] = []
    for first in range(0, len(texts), 1000):
        some = list(texts[first : first + 1000])
        rows = tokenizer(some, truncation=True, max_length=max_length, return_special_tokens_mask=True)
        # a tokenizer of one's own may not say what it added
        added = rows.get("special_tokens_mask", [None] * len(some))
        for i, ids in enumerate(rows["input_ids"]):
            ordinary = _ordinary(ids, added[i], special)
            if sum(ordinary) < _FEWEST_TOKENS:
                short.append(some[i])
                continue
            columns["input_ids"].append(ids)
            columns["special_tokens_mask"].append([int(not yes) for yes in ordinary])
            columns["row_id"].append(first + i)
    if not columns["row_id"]:
        raise ValueError(
            f"`texts` must hold a text with {_FEWEST_TOKENS} ordinary tokens, got {len(texts)} texts with fewer"
            + (f", the first of them {short[0]!r:.60}" if short else "")
            + f": a masked token needs another to be told from. Check the texts, that the tokenizer knows their language, and "
            f"`max_length`={max_length}, which counts special tokens too."
        )
    if short:
        logger.warning(
            "%d of %d texts have fewer than %d ordinary tokens and are dropped, the first of them %.60r.",
            len(short), len(texts), _FEWEST_TOKENS, short[0],
        )  # fmt: skip
    return Dataset.from_dict(columns)


def _check(
    dataset: Dataset, tokenizer: "PreTrainedTokenizerBase", seed: int, max_length: int, probability: float
) -> None:
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        kind = "mask" if tokenizer.mask_token_id is None else "padding"
        raise ValueError(
            f"`tokenizer` must have a {kind} token, got a {type(tokenizer).__name__} without one: nothing can be hidden "
            "from the model, or rows padded. Use the tokenizer of a masked language model; a causal model needs no masks, "
            "and trains on what `tokenize_texts` returns."
        )
    if not 0 < probability <= 1:
        raise ValueError(f"`probability` must be in (0, 1], got {probability}: it is a share of tokens. Set 0.15.")
    if seed < 0:
        raise ValueError(f"`seed` must be 0 or more, got {seed}: generators take no other. Set `seed=0`.")
    if missing := sorted({"input_ids", "row_id"} - set(dataset.column_names)):
        raise ValueError(
            f"`dataset` must have the columns input_ids and row_id, got {dataset.column_names} without {missing}: masks are "
            "drawn by row_id. Make it with `tokenize_texts`."
        )
    if (longest := max(map(len, dataset["input_ids"]), default=0)) > max_length:
        raise ValueError(
            f"`max_length` must hold every row, got {max_length} for a row of {longest} tokens: a cut here would take the "
            "end token off. Use the `max_length` of `tokenize_texts`."
        )


def mask_once(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    max_length: int = 64,
    probability: float = 0.15,
) -> Dataset:
    """Rows for masked-language modeling whose masks are drawn here, once, for all epochs.

    Args:
        dataset: from `tokenize_texts`; `input_ids` and `row_id` are needed, `special_tokens_mask` is heeded.
        tokenizer: the one that made the ids, with a mask token.
        seed: 0 or more. A row's masks depend on it, on `row_id` and on the row's own ids, and on nothing else.
        max_length: rows are padded on the right to this many tokens.
        probability: chance of an ordinary token to be predicted; a row that would have none gets one.

    Returns:
        A data set in memory with `input_ids`, `attention_mask`, `labels` (each [max_length]) and `row_id`. Of the
        predicted tokens about 80 % show the mask token, 10 % a random ordinary token and 10 % themselves.

    Raises:
        ValueError: no mask token, a row that is longer than `max_length` or has no ordinary token, a missing column, or
            values out of range.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, "a": 3, "good": 4, "film": 5}
        >>> core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        >>> core.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
        >>> rows = mask_once(tokenize_texts(["a good film"], tokenizer), tokenizer, seed=1, max_length=5, probability=1)
        >>> rows[0]["labels"], rows[0]["attention_mask"]
        ([3, 4, 5, -100, -100], [1, 1, 1, 0, 0])
    """
    dataset = dataset.with_format(None)  # tensors are no keys of a set
    _check(dataset, tokenizer, seed, max_length, probability)
    special = set(tokenizer.all_special_ids)
    # A replacement is a word: a padding or end token in the middle of a text is nothing to learn from.
    words = np.setdiff1d(np.arange(len(tokenizer)), sorted(special))
    rows, row_ids, shape = dataset["input_ids"][:], dataset["row_id"][:], (len(dataset), max_length)
    given = "special_tokens_mask" in dataset.column_names
    added = dataset["special_tokens_mask"][:] if given else [None] * len(dataset)
    columns = {
        "input_ids": np.full(shape, tokenizer.pad_token_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, IGNORED, dtype=np.int64),
        "row_id": np.asarray(row_ids, dtype=np.int64),
    }
    for i, (row, row_id) in enumerate(zip(rows, row_ids, strict=True)):
        ids = np.asarray(row, dtype=np.int64)
        ordinary = np.asarray(_ordinary(row, added[i], special), dtype=bool)
        if not ordinary.any():
            raise ValueError(
                f"every row of `dataset` must have an ordinary token, got none in the row with row_id {row_id}: "
                "there is nothing to predict. Make it with `tokenize_texts`, which drops such texts."
            )
        rng = np.random.default_rng([seed, row_id])
        draws, fates = rng.random(len(ids)), rng.random(len(ids))
        replacements = words[rng.integers(len(words), size=len(ids))]
        draws[~ordinary] = np.inf
        # The smallest draw stands in where all are above p: given that, each ordinary token is as likely as another.
        masked = draws < max(probability, np.nextafter(draws.min(), 1))
        shown = np.where(fates < 0.8, tokenizer.mask_token_id, np.where(fates < 0.9, replacements, ids))
        columns["input_ids"][i, : len(ids)] = np.where(masked, shown, ids)
        columns["attention_mask"][i, : len(ids)] = 1
        columns["labels"][i, : len(ids)][masked] = ids[masked]
    return Dataset.from_dict(columns)
