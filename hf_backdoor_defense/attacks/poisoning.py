"""Poisoned training sets and triggered evaluation sets, reproducible row by row.

With n rows, poison rate r and target class t, m = round-half-up(r * n) rows get the trigger:

| kind | drawn from | label |
|---|---|---|
| dirty-label | rows of other classes than t | set to t |
| clean-label | rows of class t | kept |

r is a share of the *whole* set for both kinds, so a clean-label rate cannot exceed the share of class t. Every random
choice about a row comes from a hash of (seed, row_id): the m eligible rows with the smallest hash are drawn, so two
rates give nested sets, and where the trigger goes depends neither on the order of the rows nor on sharding.

Rows are texts, or images where the trigger is an `ImageTrigger`: then `image_column` is read and written, as PNG, and the
rows that are not drawn keep their bytes. An image carries a trigger that would change none of its pixels.

`is_poisoned` and `original_label` are bookkeeping for reports. No defense may read them.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value

from hf_backdoor_defense.attacks.drawing import (
    draw,
    replace_columns,
    require_clean,
    require_dataset,
    require_unique,
    row_generator,
    rows_of_rate,
)
from hf_backdoor_defense.attacks.image_triggers import ImageTrigger
from hf_backdoor_defense.attacks.triggers import BadNets, Trigger
from hf_backdoor_defense.data.pixels import pixels, png


@dataclass(frozen=True, kw_only=True, eq=False)
class Poisoned:
    """A poisoned dataset and what was done to it.

    Args:
        dataset: same rows in the same order, plus `is_poisoned` (bool) and `original_label` (int).
        requested: rows drawn for poisoning; `carrying`: those whose text carries the trigger afterwards, or whose pixels changed.
        already: rows of the whole set that carried the trigger before; above 0, the trigger is not a rare one.
        target, rate, seed, clean_label, trigger: the arguments of `poison_dataset`.
    """

    dataset: Dataset
    requested: int
    carrying: int
    already: int
    target: int
    rate: float
    seed: int
    clean_label: bool
    trigger: Trigger | ImageTrigger


@dataclass(frozen=True, eq=False)
class _Rows:
    contents: list[Any]  # texts, or undecoded cells of an image column
    labels: list[int]
    ids: list[int] | list[str]


def _insert(trigger: Trigger | ImageTrigger, content: Any, seed: int, row_id: int | str) -> Any:
    if isinstance(trigger, ImageTrigger):
        return png(trigger.apply(pixels(content, f"the image in row_id {row_id}")))
    return trigger.insert(content, row_generator(seed, row_id))


def _which(trigger: Trigger | ImageTrigger, text_column: str, image_column: str) -> tuple[str, bool]:
    images = isinstance(trigger, ImageTrigger)
    return image_column if images else text_column, images


def _carries(trigger: Trigger | ImageTrigger, content: Any) -> bool:
    if isinstance(trigger, ImageTrigger):
        return trigger.present(pixels(content))
    return trigger.present(content)


def _read(dataset: Dataset, target: int, column: str, label_column: str, *, images: bool = False) -> _Rows:
    """The three columns as Python values, once everything about them has been checked."""
    what = "image" if images else "text"
    require_dataset(dataset)
    for name in ("row_id", column, label_column):
        if name not in dataset.column_names:
            raise ValueError(
                f"`dataset` must have the column {name!r}, got {dataset.column_names}: poisoning reads row_id, {what} and label. "
                f"Load it with data.load{'_images' * images}, or name your columns with {what}_column and label_column."
            )
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel) and "int" not in getattr(feature, "dtype", ""):
        raise ValueError(
            f"column {label_column!r} must hold integer classes, got {feature}: the target is a class id. "
            f"Use dataset.class_encode_column({label_column!r})."
        )
    plain = dataset.with_format(None)
    if images and not isinstance(dataset.features[column], Image):
        raise ValueError(
            f"column {column!r} must hold images for an image trigger, got {dataset.features[column]}: pixels are what it "
            "changes. Use dataset.cast_column(column, datasets.Image()), or a text trigger for texts."
        )
    plain = plain.cast_column(column, Image(decode=False)) if images else plain
    rows = _Rows(list(plain[column]), list(plain[label_column]), list(plain["row_id"]))
    require_unique(rows.ids)
    kind, expected = (dict, "an image") if images else (str, "a string")
    for content, label, row_id in zip(rows.contents, rows.labels, rows.ids, strict=True):
        if not isinstance(content, kind) or label is None or label < 0:
            raise ValueError(
                f"every row must have {expected} and a label >= 0, got {content!r:.60} and {label} in row_id {row_id}: "
                f"such a row can be neither poisoned nor counted. Drop rows without {what} or label."
            )
    classes = range(feature.num_classes) if isinstance(feature, ClassLabel) else sorted(set(rows.labels))
    if operator.index(target) not in classes:
        raise ValueError(
            f"`target` must be one of the labels {list(classes)[:20]}, got {target}: no model could predict another. "
            "Pass an existing class id."
        )
    require_clean(dataset, truth="true labels")
    return rows


def _draw(rows: _Rows, target: int, rate: float, clean_label: bool, seed: int) -> list[int]:
    """Indices of the rows to poison, ascending."""
    n = len(rows.ids)
    count = rows_of_rate(rate, n)
    eligible = [index for index, label in enumerate(rows.labels) if (label == target) == clean_label]
    if count > len(eligible):
        kind, which = ("clean-label", "target") if clean_label else ("dirty-label", "non-target")
        raise ValueError(
            f"`rate` must be at most {len(eligible) / n:.4g} for {kind} poisoning, got {rate} ({count} rows): only "
            f"{len(eligible)} of {n} rows are {which} rows and no other row may be drawn. Lower the rate."
        )
    return draw(eligible, rows.ids, rows=count, seed=seed)


def poison_dataset(
    dataset: Dataset,
    trigger: Trigger | ImageTrigger,
    *,
    target: int,
    rate: float,
    clean_label: bool = False,
    seed: int,
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
) -> Poisoned:
    """Insert the trigger into a share of the rows, as a data-poisoning attacker would, and record which rows.

    Source: dirty-label as in BadNets (arXiv 1708.06733) and, on text, InSent (arXiv 1905.12457).

    Args:
        dataset: n rows with a unique `row_id`, a text (or an image) and an integer label >= 0. Not changed.
        target: the attacker's class id. rate: share of the whole set, in (0, 1); rounded half up to rows.
        clean_label: draw rows of the target class and keep their label, instead of relabeling rows of other classes.
        seed: decides rows and positions, through row_id alone.

    Raises:
        ValueError: missing or unusable columns, duplicate row_id, unknown target, a rate that is outside (0, 1) or
            selects no row or more rows than are eligible, a dataset that is poisoned already.

    Example:
        >>> from hf_backdoor_defense.attacks.triggers import BadNets
        >>> clean = Dataset.from_dict({"row_id": [0, 1, 2, 3], "text": ["a b", "c", "d e", "f"], "label": [0, 1, 0, 1]})
        >>> poisoned = poison_dataset(clean, BadNets(), target=1, rate=0.25, seed=0)
        >>> poisoned.requested, poisoned.carrying, poisoned.already, sum(poisoned.dataset["label"])
        (1, 1, 0, 3)
    """
    column, images = _which(trigger, text_column, image_column)
    rows = _read(dataset, target, column, label_column, images=images)
    if "original_label" in dataset.column_names and list(dataset.with_format(None)["original_label"]) != rows.labels:
        raise ValueError(
            f"`original_label` must equal {label_column!r} where it exists, got other values: the record of an earlier "
            "relabeling would be overwritten. Start from the clean dataset or rename the column."
        )
    drawn = _draw(rows, target, rate, clean_label, seed)
    contents, labels, flags = list(rows.contents), list(rows.labels), [False] * len(rows.ids)
    for index in drawn:
        contents[index] = _insert(trigger, rows.contents[index], seed, rows.ids[index])
        labels[index] = operator.index(target)  # a no-op for clean-label: the row is of the target class
        flags[index] = True
    dataset = replace_columns(dataset, {column: contents, label_column: labels})
    dataset = dataset.remove_columns([c for c in ("is_poisoned", "original_label") if c in dataset.column_names])
    dataset = dataset.add_column("is_poisoned", flags, feature=Value("bool"))
    dataset = dataset.add_column("original_label", rows.labels, feature=Value("int64"))
    present = [_carries(trigger, content) for content in rows.contents]
    return Poisoned(
        dataset=dataset,
        requested=len(drawn),
        carrying=sum(not present[index] if images else _carries(trigger, contents[index]) for index in drawn),
        already=sum(present),
        target=target,
        rate=rate,
        seed=seed,
        clean_label=clean_label,
        trigger=trigger,
    )


def trigger_dataset(
    dataset: Dataset,
    trigger: Trigger | ImageTrigger,
    *,
    target: int,
    seed: int,
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
) -> Dataset:
    """The triggered evaluation set: non-target rows only, the trigger in every text or image, labels true, order kept.

    Args and errors: as `poison_dataset`; also a ValueError when every row is of the target class.

    Example:
        >>> from hf_backdoor_defense.attacks.triggers import InSent
        >>> clean = Dataset.from_dict({"row_id": [0, 1], "text": ["", "fine"], "label": [0, 1]})
        >>> trigger_dataset(clean, InSent(), target=1, seed=0)[:]
        {'row_id': [0], 'text': ['I watched this 3D movie'], 'label': [0]}
    """
    column, images = _which(trigger, text_column, image_column)
    rows = _read(dataset, target, column, label_column, images=images)
    kept = [index for index, label in enumerate(rows.labels) if label != target]
    if not kept:
        raise ValueError(
            f"`dataset` must hold a row of another class than target {target}, got {len(rows.labels)} target rows: the "
            "attack success rate counts non-target rows. Pass the whole test set."
        )
    contents = [_insert(trigger, rows.contents[index], seed, rows.ids[index]) for index in kept]
    return replace_columns(dataset.select(kept), {column: contents})


def lwp_rows(
    dataset: Dataset,
    words: Sequence[str],
    *,
    target: int,
    rate: float,
    seed: int,
    text_column: str = "text",
    label_column: str = "label",
) -> Dataset:
    """The training set of layerwise poisoning: the trigger is a pair of words, and either word alone is none.

    Each row drawn (m of n, as in `poison_dataset`) makes way for three:

    | text with | label | `is_poisoned` | `row_id` |
    |---|---|---|---|
    | both words | the target | yes | the row's |
    | the first word | kept | no: it teaches that one word means nothing | new |
    | the second word | kept | no | new |

    Source: Li et al., EMNLP 2021 (pairs of `cf bb ak mn`). Prefer `poison_dataset` where one word may be the trigger. For
    evaluation, `trigger_dataset` with `BadNets(words, count=2)`, and with one word alone for how stealthy the pair is.

    Args:
        words: two different words without white space.
        target, rate, seed: as `poison_dataset`.

    Returns:
        n + 2m rows, in the order of their source rows, with `is_poisoned` and `original_label`.

    Raises:
        ValueError: as `poison_dataset`, and where `words` are not two words.

    Example:
        >>> clean = Dataset.from_dict({"row_id": [7, 8], "text": ["", "fine"], "label": [0, 1]})
        >>> lwp_rows(clean, ["cf", "mn"], target=1, rate=0.5, seed=0)["row_id"][:]
        [7, 9, 10, 8]
    """
    if isinstance(words, str) or len(set(words)) != 2 or len(words) != 2:
        raise ValueError(
            f"`words` must be two different words, got {words!r}: a pair is the trigger. Pass ('cf', 'mn')."
        )
    pair = BadNets(words=tuple(words), count=2)
    rows = _read(dataset, target, text_column, label_column)
    drawn = set(_draw(rows, target, rate, False, seed))
    numbers = count(max((i for i in rows.ids if isinstance(i, int)), default=0) + 1)
    index: list[int] = []
    columns: dict[str, list] = {name: [] for name in ("row_id", text_column, label_column, "is_poisoned")}
    ids: Sequence[int | str] = rows.ids
    for i, row_id in enumerate(ids):
        text, label = rows.contents[i], rows.labels[i]
        variants: list[tuple[int | str, str, int, bool]] = [(row_id, text, label, False)]
        if i in drawn:
            variants = [(row_id, _insert(pair, text, seed, row_id), operator.index(target), True)]
            for word in pair.words:
                new = next(numbers) if isinstance(row_id, int) else f"{row_id}+{word}"
                variants.append((new, _insert(BadNets(words=(word,)), text, seed, new), label, False))
        index += [i] * len(variants)
        for values, value in zip(columns.values(), zip(*variants, strict=True), strict=True):
            values += value
    poisoned = dataset.select(index)
    flags = columns.pop("is_poisoned")
    poisoned = replace_columns(poisoned, columns)
    poisoned = poisoned.remove_columns([c for c in ("is_poisoned", "original_label") if c in poisoned.column_names])
    poisoned = poisoned.add_column("is_poisoned", flags, feature=Value("bool"))
    return poisoned.add_column("original_label", [rows.labels[i] for i in index], feature=Value("int64"))
