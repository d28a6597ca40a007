"""Which rows an attacker draws and what chance decides about each: from a hash of (seed, row_id), never from the row's place.

With n rows, rate r of the whole set and eligible rows E: m = round-half-up(r * n) rows of E are drawn, those with the smallest
hash. So two rates give nested sets, and neither the order of the rows nor sharding matters.
"""

import hashlib
import operator
from collections.abc import Collection, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
from datasets import Dataset


def row_hash(purpose: str, seed: int, row_id: int | str) -> bytes:
    """16 bytes that say everything random about one row, for one purpose.

    >>> row_hash("draw", 0, 7) == row_hash("draw", 0, 7) != row_hash("insert", 0, 7)
    True
    """
    return hashlib.blake2b(f"{purpose}|{operator.index(seed)}|{row_id}".encode(), digest_size=16).digest()


def row_generator(seed: int, row_id: int | str) -> np.random.Generator:
    """Where the trigger goes in one row: the same in a training and in an evaluation set of this seed.

    >>> row_generator(0, 7).permutation(3).tolist() == row_generator(0, 7).permutation(3).tolist()
    True
    """
    return np.random.default_rng(int.from_bytes(row_hash("insert", seed, row_id), "little"))


def rows_of_rate(rate: float, n: int) -> int:
    """Rate times n, rounded half up.

    Raises:
        ValueError: a rate outside (0, 1), or one that selects no row.

    >>> rows_of_rate(0.145, 100), rows_of_rate(0.01, 1600)
    (15, 16)
    """
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must be in (0, 1), got {rate}: it is a share of the whole set. Pass e.g. rate=0.1.")
    # In decimal: 0.145 * 100 is 14.499... in binary and would lose a row.
    rows = int((Decimal(repr(float(rate))) * n).quantize(Decimal(1), ROUND_HALF_UP))
    if rows == 0:
        raise ValueError(
            f"`rate` must select at least one row, got {rate} of {n} rows: nothing would be poisoned. Pass rate >= 1/{n}."
        )
    return rows


def draw(eligible: Iterable[int], ids: Sequence[int | str], *, rows: int, seed: int) -> list[int]:
    """This many of the eligible rows' indices, ascending: those whose ids have the smallest hash.

    >>> draw([0, 2, 3], ["a", "b", "c", "d"], rows=2, seed=0)
    [0, 2]
    """
    return sorted(sorted(eligible, key=lambda index: row_hash("draw", seed, ids[index]))[:rows])


def replace_columns(dataset: Dataset, columns: dict[str, list]) -> Dataset:
    """`dataset` with these columns replaced, their place and feature kept; every other column untouched.

    >>> replace_columns(Dataset.from_dict({"a": [1], "b": [2]}), {"a": [3]})[0]
    {'a': 3, 'b': 2}
    """
    order, features = dataset.column_names, dataset.features
    for name, values in columns.items():
        dataset = dataset.remove_columns(name).add_column(name, values, feature=features[name])
    return dataset.select_columns(order)


def require_dataset(dataset: Any) -> None:
    """Refuse anything but one split."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` must be a datasets.Dataset, got {type(dataset).__name__}: rows are drawn from one finite set. "
            "Pick a split, e.g. dataset['train']."
        )


def require_unique(ids: Collection[int | str]) -> None:
    """Refuse ids that two rows share."""
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"`row_id` must be unique, got {len(set(ids))} values for {len(ids)} rows: equal ids would share "
            "their random position. Number the rows anew."
        )


def require_clean(dataset: Dataset, *, truth: str) -> None:
    """Refuse a set that says of itself that it is poisoned; `truth` is what would be counted wrong."""
    flags = dataset.with_format(None)["is_poisoned"] if "is_poisoned" in dataset.column_names else []
    if any(flags):
        raise ValueError(
            f"`dataset` must be clean, got {sum(flags)} rows with is_poisoned: counts and {truth} would be wrong. "
            "Start from the clean dataset."
        )
