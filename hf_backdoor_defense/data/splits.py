"""What every source shares, texts or images: checked labels, cuts and limits by hash, and the splits that are handed out.

Each class c of a part with n_c of n rows gets a quota of about total * n_c / n rows; in each class those with the smallest
hash of (purpose, seed, row_id) are drawn. No random generator takes part, and the order of the rows does not matter.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Part:
    """Checked rows of one split: `columns` are its contents by name, `labels` are classes 0..C-1.

    >>> Part({"text": ["a", "b", "c"]}, labels=[0, 1, 0], row_ids=[7, 8, 9]).pick({2, 0})
    Part(columns={'text': ['a', 'c']}, labels=[0, 0], row_ids=[7, 9])
    """

    columns: dict[str, list[Any]]
    labels: list[int]
    row_ids: list[int]

    def pick(self, indices: Iterable[int]) -> "Part":
        """These rows, in the order of the source."""
        kept = sorted(indices)
        return Part(
            columns={name: [values[i] for i in kept] for name, values in self.columns.items()},
            labels=[self.labels[i] for i in kept],
            row_ids=[self.row_ids[i] for i in kept],
        )


def refuse(what: str, values: list[Any], is_wrong: Callable[[Any], object], rule: str, remedy: str) -> None:
    """A ValueError that names the first rows of `values` for which `is_wrong` holds.

    >>> refuse("texts", ["a", ""], lambda text: not text, "not be empty", "Drop these rows")
    Traceback (most recent call last):
    ...
    ValueError: texts must not be empty, got 1 of 2 rows where that is not so, counted from 0: '' in row 1. Every row takes part in training or in a figure. Drop these rows.
    """  # noqa: E501
    if bad := [i for i, value in enumerate(values) if is_wrong(value)]:
        first = ", ".join(f"{values[i]!r:.40} in row {i}" for i in bad[:5])
        raise ValueError(
            f"{what} must {rule}, got {len(bad)} of {len(values)} rows where that is not so, counted from 0: {first}. "
            f"Every row takes part in training or in a figure. {remedy}."
        )


def check_options(limit: int | None, num_labels: int | None) -> None:
    """Refuse a `limit` below 1 and `num_labels` below 2. None is always fine."""
    for option, value, least in (("limit", limit, 1), ("num_labels", num_labels, 2)):
        if value is not None and value < least:
            raise ValueError(
                f"`{option}` must be at least {least} or None, got {value}: fewer is no task. Leave it out."
            )


def check_labels(labels: list[Any], where: str, column: str, num_labels: int | None = None) -> list[int]:
    """The labels as integers, or an error that names the first rows whose label is missing or no class.

    >>> check_labels([0, 1.0], "a.csv", "label")
    [0, 1]
    """
    top = math.inf if num_labels is None else num_labels
    number = f"labels (column {column!r} of {where})"
    # in this order: a later rule relies on the earlier ones
    refuse(number, labels, lambda v: v is None or v != v, "be there in every row", "Label these rows or drop them")
    refuse(number, labels, lambda v: not isinstance(v, int | float) or v % 1, "be integers", "Map the names to 0..C-1")
    refuse(number, labels, lambda v: v < 0, "be 0 or more", "-1 often marks hidden labels: drop these rows")
    refuse(number, labels, lambda v: v >= top, f"be below num_labels={top}", "Raise it, or renumber to 0..C-1")
    return [int(v) for v in labels]


def check_classes(parts: Mapping[str, Part]) -> int:
    """The number of classes, after checks that the training split shows each of them."""
    counts = Counter(parts["train"].labels)
    if len(counts) < 2:
        raise ValueError(
            f"the training rows must have at least two classes, got only label {next(iter(counts))}: a model would "
            "learn a constant. Add rows of another class, or check `label_column`."
        )
    if absent := [label for label in range(max(counts)) if label not in counts][:10]:
        raise ValueError(
            f"every class in 0..{max(counts)} must have a training row, got none for {absent}: a model could not "
            "learn it. Renumber the labels to 0..C-1 or add rows."
        )
    for split, part in parts.items():
        if unknown := sorted(set(part.labels) - set(counts))[:10]:
            raise ValueError(
                f"the labels of {split} must occur in train, got {unknown} beside {sorted(counts)[:20]}: no model "
                "could predict them. Use splits of the same task."
            )
    return max(counts) + 1


def quotas(counts: Mapping[int, int], total: int, *, low: int, spare: int) -> dict[int, int]:
    """Rows per class, in proportion, that sum to `total` where low <= rows <= count - spare allows it.

    >>> quotas({0: 60, 1: 40}, 11, low=0, spare=0)
    {0: 7, 1: 4}
    """
    whole = sum(counts.values())
    found = {label: min(max(total * n // whole, low), n - spare) for label, n in counts.items()}
    while over := sum(found.values()) - total:
        step = -1 if over > 0 else 1
        free = [label for label, n in counts.items() if low <= found[label] + step <= n - spare]
        if not free:
            break
        _, negated = max((step * (total * counts[label] - found[label] * whole), -label) for label in free)
        found[-negated] += step
    return found


def draw(part: Part, total: int, purpose: str, seed: int, *, low: int = 0, spare: int = 0) -> list[int]:
    """Positions of a stratified draw of `total` rows: in each class those with the smallest hash."""
    left = quotas(Counter(part.labels), total, low=low, spare=spare)
    digests = [hashlib.blake2b(f"{purpose}|{seed}|{i}".encode(), digest_size=16).digest() for i in part.row_ids]
    drawn = []
    for index in sorted(range(len(digests)), key=digests.__getitem__):
        if left[part.labels[index]] > 0:
            left[part.labels[index]] -= 1
            drawn.append(index)
    return drawn


def _cut(parts: dict[str, Part], shares: Mapping[str, float], seed: int) -> dict[str, Part]:
    train, n = parts["train"], len(parts["train"].labels)
    for split, share in shares.items():
        drawn = set(draw(train, max(1, round(share * n)), split, seed, spare=1))
        if not drawn:
            raise ValueError(
                f"the training rows must suffice to cut a {split} split, got {n}: one row per class has to stay in "
                f"train. Add rows, or give a folder with a {split} file."
            )
        parts = {**parts, split: train.pick(drawn)}
        train = train.pick(set(range(len(train.labels))) - drawn)
    return {**parts, "train": train}


def _limit(parts: dict[str, Part], limit: int, seed: int) -> dict[str, Part]:
    share = min(1.0, limit / len(parts["train"].labels))
    limited = {}
    for split, part in parts.items():
        total = limit if split == "train" else max(50, round(share * len(part.labels)))
        limited[split] = part.pick(draw(part, min(total, len(part.labels)), "limit", seed, low=int(split == "train")))
    return limited


def hand_out(
    parts: dict[str, Part],
    features: Mapping[str, Any],
    *,
    source: str,
    names: set[tuple[str, ...]],
    shares: Mapping[str, float],
    limit: int | None,
    seed: int,
    cut_seed: int | None = None,
    num_labels: int | None,
) -> DatasetDict:
    """Check the classes, cut what is missing, limit, and build the splits train, validation, test.

    Args:
        features: the feature of each column that every part has, in order; `label` and `row_id` follow, then the others.
        source: what an error calls the data.
        names: the lists of class names that the splits bring along: none or one.
        shares: the shares of train that are cut for splits that are missing.
        seed: decides `limit`, and the cut as well where `cut_seed` is None.

    Raises:
        ValueError: see `check_classes`; a limit below the number of classes; two lists of names; too few rows to cut.
    """
    classes = check_classes(parts)
    if limit is not None and limit < classes:
        raise ValueError(f"`limit` must be at least the number of classes, {classes}, got {limit}: raise or drop it.")
    if len(names) > 1:
        raise ValueError(
            f"the splits of {source!r} must name their classes alike, got {sorted(names)}: the same number would mean "
            "different classes. Encode all splits with one list of names."
        )
    classes = num_labels or max([classes, *map(len, names)])
    named = next((list(n) for n in names if len(n) == classes), None) or [str(i) for i in range(classes)]
    parts = _cut(parts, shares, seed if cut_seed is None else cut_seed)
    if limit is not None:
        parts = _limit(parts, limit, seed)
    full = Features({**features, "label": ClassLabel(names=named), "row_id": Value("int64")})
    loaded = DatasetDict()
    for split in SPLIT_NAMES:
        part = parts[split]
        rest = {name: values for name, values in part.columns.items() if name not in features}
        columns = {name: part.columns[name] for name in features}
        loaded[split] = Dataset.from_dict({**columns, "label": part.labels, "row_id": part.row_ids}, features=full)
        for name, values in rest.items():
            loaded[split] = loaded[split].add_column(name, values)
    return loaded
