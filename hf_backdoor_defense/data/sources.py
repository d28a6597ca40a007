"""Where data comes from: one `load` for a local file, a folder, a Hub id or `offline:docstrings`. What was loaded: `summary.py`.

| task | splits |
|---|---|
| `"offline:docstrings"` | as built: see `data.docstrings` |
| `"reviews.jsonl"` (.json, .jsonl, .csv, .parquet) | cut by seed, stratified: 80 % train, 10 % validation, 10 % test |
| `"folder"` with train.*, validation.* (valid.*, dev.*), test.* | its files; what is missing is cut from train |
| `"owner/name"`, `"name"`, `"name:config"` | those of the Hub dataset; what is missing is cut as above |

Such a cut, by seed, takes 10 % of the training rows for validation and 20 % for test. Every row keeps `row_id`, its
position in the source (train, validation, test one after the other), whatever `limit` and `seed` are. Choices about
rows come from a hash of (seed, row_id) and from no random generator. No code from the Hub is run. `read_file`, `read_hub`
and `require_column` also serve `plain_text.py`, which wants texts and no labels.
"""

import difflib
import glob
import os
import re
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_backdoor_defense.data import docstrings
from hf_backdoor_defense.data.splits import SPLIT_NAMES, Part, check_labels, check_options, hand_out, refuse

OFFLINE = "offline:docstrings"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_OTHER_DATA = {".arrow", ".feather", ".gz", ".npz", ".pickle", ".pkl", ".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".zip"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_WAYS_OUT = f"Use a local .jsonl, .csv or .parquet file, a folder of them, or {OFFLINE!r}, which need no network."


def read_file(path: Path, text_column: str, label_column: str | None = None) -> Dataset:
    """The rows of a .json, .jsonl, .csv or .parquet file, in memory and unchecked; in a .csv every text stays a text.

    Raises ValueError, with the reader's reason, for another format, a file that cannot be read and one without rows.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "codes.csv")
    ...     _ = path.write_text("text\\n007\\nNA\\n")
    ...     read_file(path, "text")[:]
    {'text': ['007', 'NA']}
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"`task` must name a file that ends in one of {', '.join(FORMATS)}, got {str(path)!r}: no other format "
            "is read. Save the data as JSON lines, one object with text and label per line."
        )
    options: dict[str, Any] = {}
    if kind == "csv":  # a text such as "NA" or "007" is a text; only an empty label is a missing one
        missing = {} if label_column is None else {label_column: [""]}
        options = {"converters": {text_column: str}, "keep_default_na": False, "na_values": missing}
    try:
        if kind == "json":  # its reader takes other bytes for text, and fails when a row is read
            with path.open(encoding="utf-8") as file:
                deque(file, maxlen=0)
        with tempfile.TemporaryDirectory() as cache:  # nothing stays behind, and a changed file is never served stale
            return datasets.load_dataset(
                kind, data_files=glob.escape(str(path)), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    except Exception as error:  # the reader's exceptions have no common base
        raise ValueError(
            f"{str(path)!r} must be a readable {kind} file with at least one row, got {error.__cause__ or error!r}: "
            "there is nothing to train on. Open the file and repair it."
        ) from error


def _read_folder(folder: Path, text_column: str, label_column: str) -> dict[str, Dataset]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = {}
    for split, names in SPLIT_NAMES.items():
        paths = [p for p in files if p.name.split(".")[0] in names and p.suffix.lower() in {*FORMATS, *_OTHER_DATA}]
        readable = [path for path in paths if path.suffix.lower() in FORMATS]
        if len(readable) > 1 or (split == "train" and not paths):
            raise ValueError(
                f"folder {str(folder)!r} must hold one {split} file ({'|'.join(names)}).(json|jsonl|csv|parquet), got "
                f"{[path.name for path in readable or files][:20]}: which rows are meant is unclear. Keep or add one."
            )
        if paths:
            found[split] = read_file((readable or paths)[0], text_column, label_column)
    return found


def read_hub(
    task: str, *, option: str = "task", offline: str = OFFLINE, ways_out: str = _WAYS_OUT
) -> dict[str, Dataset]:
    """The splits train, validation, test of a Hub dataset "name[:config]", as far as it has them; train always.

    `option` is what the caller's user wrote the name into, `offline` the name of what is built in, `ways_out` advice for who
    has no network. Raises ValueError for what cannot be a Hub id, a misspelled "offline:docstrings" or path most of all, a
    Hub that cannot be reached, and formats other than parquet and JSON.

    >>> read_hub("docstring", option="source")
    Traceback (most recent call last):
    ...
    ValueError: `source` must be spelled 'offline:docstrings', got 'docstring': no other is built in. Write 'offline:docstrings'.
    """
    if task.startswith("offline:") or (
        "/" not in task
        and difflib.get_close_matches(task.casefold(), [offline, offline.partition(":")[2]], cutoff=0.75)
    ):
        raise ValueError(
            f"`{option}` must be spelled {offline!r}, got {task!r}: no other is built in. Write {offline!r}."
        )
    other = Path(task).suffix.lower() in {*FORMATS, *_OTHER_DATA}
    if not _HUB_ID.fullmatch(task) or other or task.startswith("."):
        raise ValueError(
            f"`{option}` must be a file or folder that exists, a Hub id (owner/name, name or name:config) or {offline!r}, "
            f"got {task!r}: there is no such path, seen from {str(Path.cwd())!r}. Correct the path."
        )
    name, _, config = task.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        kind = builder.name
        if kind in ("parquet", "json", "cache"):  # "cache": what `datasets` prepared earlier, when offline
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except Exception as error:  # network, offline mode, access, unknown id, scripts: no common base
        raise ValueError(
            f"`{option}` {task!r} must be a local path that exists, {offline!r}, or a Hub dataset that can be reached, got "
            f"{type(error).__name__}: {str(error)[:300]}. Check the spelling and the connection. {ways_out}"
        ) from error
    if kind not in ("parquet", "json", "cache"):
        raise ValueError(
            f"Hub dataset {task!r} must be stored as parquet or JSON, got {kind!r}: no other is read. {ways_out}"
        )
    found = {split: next((splits[n] for n in names if n in splits), None) for split, names in SPLIT_NAMES.items()}
    if found["train"] is None:
        raise ValueError(f"Hub dataset {task!r} must have a train split, got {sorted(splits)}: {ways_out}")
    return {split: dataset for split, dataset in found.items() if dataset is not None}


def _read(task: str, text_column: str, label_column: str) -> tuple[dict[str, Dataset], dict[str, float]]:
    """The source's splits, and the shares of train that are cut for the others where they are missing."""
    path = Path(os.path.expanduser(task))
    if task == OFFLINE:
        features = Features(
            text=Value("string"), label=ClassLabel(names=list(docstrings.TOPICS)), module=Value("string")
        )
        rows = {split: [row._asdict() for row in rows] for split, rows in docstrings.build().items()}
        return {split: Dataset.from_list(of_split, features=features) for split, of_split in rows.items()}, {}
    if task and path.is_file():
        return {"train": read_file(path, text_column, label_column)}, {"test": 0.1, "validation": 0.1}
    if task and path.is_dir():
        found = _read_folder(path, text_column, label_column)
    else:
        found = read_hub(task)
    return found, {split: share for split, share in (("test", 0.2), ("validation", 0.1)) if split not in found}


def require_column(dataset: Dataset, where: str, column: str, *, option: str = "text_column") -> None:
    """An error that names the columns, and the nearest one, where `column` is none of them.

    >>> require_column(Dataset.from_dict({"Text": ["a"]}), "a.csv", "text")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: `text_column` must be a column of a.csv, got 'text', but the columns are ['Text']: ... perhaps to 'Text'.
    """
    if column not in dataset.column_names:
        near = difflib.get_close_matches(column, dataset.column_names, n=3, cutoff=0.5)
        raise ValueError(
            f"`{option}` must be a column of {where}, got {column!r}, but the columns are {dataset.column_names}: "
            f"without it there is nothing to learn. Set `{option}`" + (f", perhaps to {near[0]!r}." if near else ".")
        )


def _check(
    dataset: Dataset, where: str, text_column: str, label_column: str, num_labels: int | None, first_id: int
) -> Part:
    """The rows of one split, or an error that names the first rows that cannot be used."""
    require_column(dataset, where, text_column)
    require_column(dataset, where, label_column, option="label_column")
    optional = ["module"] if "module" in dataset.column_names else []
    rows = dataset.with_format(None).select_columns(list(dict.fromkeys([text_column, label_column, *optional])))[:]
    if not len(dataset):
        raise ValueError(f"{where} must hold rows, got none: there is nothing to learn or to measure. Add rows.")
    labels = check_labels(rows[label_column], where, label_column, num_labels)
    string, texts = f"texts (column {text_column!r} of {where})", rows[text_column]
    refuse(string, texts, lambda v: v is not None and not isinstance(v, str), "be strings", "Set `text_column`")
    refuse(string, texts, lambda v: v is None or not v.strip(), "not be empty or white space", "Drop these rows")
    columns = {"text": texts, **{name: rows[name] for name in optional}}
    return Part(columns, labels, list(range(first_id, first_id + len(dataset))))


def load(
    task: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    limit: int | None = None,
    seed: int = 0,
    num_labels: int | None = None,
) -> DatasetDict:
    """Load a text classification task and refuse data that no honest result can come from.

    Args:
        task: "offline:docstrings", a file, a folder or a Hub id; see the module's table. A path that exists wins.
        text_column: the source's column of texts.
        label_column: the source's column of classes 0..C-1: integers, integral floats or a ClassLabel.
        limit: keep this many training rows, stratified by class, and the same share of validation and test, but of
            those at least 50 rows or what exists.
        seed: decides cuts and `limit`, and nothing else.
        num_labels: number of classes, if known; default: the largest label + 1.

    Returns:
        Splits train, validation, test with columns text (str), label (ClassLabel), row_id (int64, unique over all
        splits) and, where the source has it, module. Texts that train and test share are counted by `describe`.

    Raises:
        ValueError: unknown task, missing path or column, unreadable data, a Hub that cannot be reached, rows without
            text, labels that are not 0..C-1, a class without training rows, less than two classes.

    Example:
        >>> import json, pathlib, tempfile
        >>> rows = [{"text": f"review {i}", "label": i % 2} for i in range(100)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "reviews.jsonl")
        ...     _ = path.write_text("\\n".join(map(json.dumps, rows)))
        ...     load(str(path), limit=40)["train"].num_rows, load(str(path)).num_rows
        (40, {'train': 80, 'validation': 10, 'test': 10})
    """
    check_options(limit, num_labels)
    found, shares = _read(task, text_column, label_column)
    parts: dict[str, Part] = {}
    first_id = 0
    for split, dataset in found.items():
        where = task if len(found) == 1 else f"{task} ({split})"
        parts[split] = _check(dataset, where, text_column, label_column, num_labels, first_id)
        first_id += len(dataset)
    names = {tuple(f.names) for d in found.values() if isinstance(f := d.features[label_column], ClassLabel)}
    return hand_out(
        parts,
        {"text": Value("string")},
        source=task,
        names=names,
        shares=shares,
        limit=limit,
        seed=seed,
        num_labels=num_labels,
    )
