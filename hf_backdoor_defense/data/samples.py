"""Clean samples beside a trained classifier: labeled with the model's own classes, which a small set need not show all.

| source | rows |
|---|---|
| `"clean.jsonl"` (.json, .jsonl, .csv, .parquet) | texts, all of them |
| `"clean.npz"` (`image`, `label`), a folder of class folders | images, all of them |
| `"owner/name"`, `"name:config"` | one split of that Hub dataset, `train` unless another is asked for |
| `"offline:docstrings"`, `"offline:digits"` | one split of what is built in, for demonstrations |

Labels are ids of the model's classes or their names; of a source that names its own classes, the names count. Every row has
`row_id`, its position in the source.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import ClassLabel, Dataset, Features, Value

from hf_backdoor_defense.data.sources import OFFLINE, load, read_file, read_hub, require_column
from hf_backdoor_defense.data.splits import refuse

FEWEST_ROWS = 10
FEWEST_PER_CLASS = 2
FEW_PER_CLASS = 20


def load_samples(
    source: str,
    *,
    kind: Literal["text", "image"],
    labels: list[str],
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
    limit: int | None = None,
    split: str = "train",
) -> Dataset:
    """The labeled rows of a source, with columns `text` or `image`, `label` (of the model's classes) and `row_id`.

    Args:
        labels: what the model calls its classes, by id.
        limit: keep at most this many rows, evenly over the classes, chosen by a hash of their position.
        split: which one, of a source that has several; a file or folder of rows has none.

    Raises:
        ValueError: nothing that can be read there, a missing column, an empty text, a label the model does not know (by name).

    >>> import json, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "clean.jsonl")
    ...     _ = path.write_text("\\n".join(json.dumps({"text": f"review {i}", "label": "good"}) for i in range(12)))
    ...     load_samples(str(path), kind="text", labels=["bad", "good"])["label"][:3]
    [1, 1, 1]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 or None, got {limit}: nothing would be read. Leave it out.")
    read, column = (_texts, text_column) if kind == "text" else (_images, image_column)
    found = read(source, column, label_column, split)
    require_column(found, source, column, option=f"{kind}_column")
    require_column(found, source, label_column, option="label_column")
    if not len(found):
        raise ValueError(f"{source} must hold rows, got none: there is nothing to learn from. Add rows.")
    ids = class_ids(found, label_column, labels, source)
    row_ids = list(range(len(found)))
    features = Features(label=ClassLabel(names=labels), row_id=Value("int64"))
    rows = found.select_columns([column]).rename_columns({} if column == kind else {column: kind})
    if kind == "text":
        texts = rows.with_format(None)["text"][:]
        where = f"texts (column {column!r} of {source})"
        refuse(where, texts, lambda v: v is not None and not isinstance(v, str), "be strings", "Set `text_column`")
        refuse(where, texts, lambda v: v is None or not v.strip(), "not be empty or white space", "Drop these rows")
    rows = rows.add_column("label", ids, feature=features["label"])
    rows = rows.add_column("row_id", row_ids, feature=features["row_id"])
    return rows if limit is None else rows.select(_spread(ids, limit))


def class_counts(rows: Dataset) -> dict[str, int]:
    """Rows of each class by its name, classes without rows included.

    >>> rows = Dataset.from_dict({"label": [1, 1]}, features=Features(label=ClassLabel(names=["bad", "good"])))
    >>> class_counts(rows)
    {'bad': 0, 'good': 2}
    """
    found = Counter(rows["label"])
    return {name: found[i] for i, name in enumerate(rows.features["label"].names)}


def check_enough(counts: dict[str, int]) -> list[str]:
    """What a reader should know about so few rows, in sentences; nothing where there are 20 of each class.

    Args:
        counts: rows by the name of the class, as `class_counts` makes them.

    Raises:
        ValueError: fewer than 10 rows, or fewer than 2 for each class on average.

    >>> check_enough({"bad": 25, "good": 0})
    ['no clean rows of the class good: training moves the model away from it, and its accuracy will fall.']
    """
    total = sum(counts.values())
    least = max(FEWEST_ROWS, FEWEST_PER_CLASS * len(counts))
    if total < least:
        raise ValueError(
            f"The clean rows must be at least {least} ({FEWEST_ROWS}, and {FEWEST_PER_CLASS} for each of {len(counts)} classes "
            f"on average), got {total}: a model learns so few by heart at once, and what it forgets then is chance. Label more; "
            f"{FEW_PER_CLASS} of each class are a start."
        )
    notes = []
    if absent := [name for name, count in counts.items() if count == 0]:
        one = len(absent) == 1
        notes.append(
            f"no clean rows of the class{'' if one else 'es'} {_shown(absent)}: training moves the model away from "
            f"{'it' if one else 'them'}, and {'its' if one else 'their'} accuracy will fall."
        )
    if few := [f"{name} ({count})" for name, count in counts.items() if 0 < count < FEW_PER_CLASS]:
        notes.append(
            f"fewer than {FEW_PER_CLASS} clean rows of {_shown(few)}: what a method finds there may be chance."
        )
    return notes


def class_lookup(labels: list[str]) -> Callable[[Any], int | None]:
    """From an id or a name to an id, or None; a name counts before a number that is written out, case only where it must.

    >>> [class_lookup(["bad", "good"])(label) for label in ("good", "GOOD", 1, "1", 2, "fine")]
    [1, 1, 1, 1, None, None]
    """
    exact = {name: i for i, name in enumerate(labels)}
    folded = {name.casefold(): i for i, name in enumerate(labels)}
    folded = folded if len(folded) == len(labels) else {}

    def find(value: Any) -> int | None:
        if isinstance(value, str):
            text = value.strip()
            known = exact.get(text, folded.get(text.casefold()))
            if known is not None or not text.isdecimal():
                return known
            value = int(text)
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
            return None
        return int(value) if 0 <= value < len(labels) else None

    return find


def _texts(source: str, text_column: str, label_column: str, split: str) -> Dataset:
    path = Path(os.path.expanduser(source))
    if source == OFFLINE:
        return load(source)[split]
    if source and path.is_dir():
        raise ValueError(
            f"the samples must be one file, got the folder {source!r}: which of its files is meant is unclear. Name one."
        )
    if source and path.is_file():
        return read_file(path, text_column, label_column)
    return _split(read_hub(source, option="clean"), split, source)


def _images(source: str, image_column: str, label_column: str, split: str) -> Dataset:
    from hf_backdoor_defense.data.images import OFFLINE_IMAGES, load_images, read_images

    if source == OFFLINE_IMAGES:
        rows = load_images(source)[split]
    else:
        found = read_images(source, image_column=image_column, label_column=label_column, option="clean")
        is_heap = len(found) == 1 and Path(os.path.expanduser(source)).exists()
        rows = _split(found, "train" if is_heap else split, source)
    names = {"image": image_column, "label": label_column}
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def _split(found: Mapping[str, Dataset], split: str, source: str) -> Dataset:
    if split not in found:
        raise ValueError(f"{source!r} must have a {split} split, got {', '.join(found)}. Name another source.")
    return found[split]


def class_ids(rows: Dataset, column: str, labels: list[str], where: str) -> list[int]:
    """Ids of the model's classes. Raises ValueError for a label that is none."""
    values: list[Any] = rows.with_format(None)[column][:]
    what = f"labels (column {column!r} of {where})"
    refuse(what, values, lambda v: v is None or v != v, "be there in every row", "Label these rows or drop them")
    feature = rows.features[column]
    lookup = class_lookup(labels)
    # Names count, unless they are positions, or the model knows its classes by number alone and none of these names.
    if isinstance(feature, ClassLabel) and not _are_numbers(feature.names):
        if not _are_numbers(labels) or all(lookup(name) is not None for name in feature.names):
            values = [feature.names[v] if v >= 0 else v for v in values]
    found = [lookup(value) for value in values]
    if unknown := list(dict.fromkeys(str(v) for v, i in zip(values, found, strict=True) if i is None)):
        count = sum(i is None for i in found)
        raise ValueError(
            f"{what} must be classes of the model ({_shown([f'{i} {name}' for i, name in enumerate(labels)])}), got {count} rows "
            f"with {_shown(unknown)}: the model has no score for them. Drop these rows, or write the model's ids or names."
        )
    return [i for i in found if i is not None]


def _are_numbers(names: list[str]) -> bool:
    """Whether names say no more than an id does: "0", "LABEL_0"."""
    return all(name.upper().removeprefix("LABEL_") == str(i) for i, name in enumerate(names))


def _spread(ids: list[int], limit: int) -> list[int]:
    """Positions of at most `limit` rows: from each class in turn the one whose position has the smallest hash."""
    place = {i: hashlib.blake2b(f"sample|{i}".encode(), digest_size=8).digest() for i in range(len(ids))}
    seen: Counter[int] = Counter()
    turn = {}
    for i in sorted(place, key=place.__getitem__):
        turn[i] = seen[ids[i]]
        seen[ids[i]] += 1
    return sorted(sorted(place, key=lambda i: (turn[i], place[i]))[:limit])


def _shown(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
