"""Which columns of a data set reach the model, and which only the objectives."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX

ROW_ID = "row_id"
IS_POISONED = "is_poisoned"
BOOKKEEPING = (IS_POISONED, "original_label")  # what a simulated attack leaves beside the rows, for reports only


class ColumnCollator:
    """Wraps a collator: carries `row_id` around it, drops what the model does not read.

    `keep`: the columns the inner collator may see; None keeps all but `is_poisoned`, which goes nowhere: no defense
    may know it. `causal`: the first label of a sequence is never predicted; it is set to -100, so that whoever counts
    labels counts what the loss sums over (the Trainer counts it for models that do not name their loss, as GPT-2).

    >>> collate = ColumnCollator(lambda rows: {"n": len(rows), "columns": sorted(rows[0])}, keep={"input_ids"})
    >>> collate([{"input_ids": [1], "text": "a", "row_id": 7, "is_poisoned": True}])
    {'n': 1, 'columns': ['input_ids'], 'row_id': tensor([7])}
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], dict[str, Any]],
        keep: Collection[str] | None,
        *,
        causal: bool = False,
    ) -> None:
        self.inner = inner
        self.causal = causal
        self.keep = None if keep is None else frozenset(keep)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not isinstance(rows[0], dict):
            return self.inner(rows)
        hidden = (ROW_ID, *BOOKKEEPING)
        seen = [{k: v for k, v in r.items() if k not in hidden and (not self.keep or k in self.keep)} for r in rows]
        batch = self.inner(seen)
        if self.causal and isinstance(batch.get("labels"), torch.Tensor) and batch["labels"].ndim == 2:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][:, 0] = IGNORE_INDEX
        if all(ROW_ID in row for row in rows):
            batch[ROW_ID] = torch.tensor([_number(row[ROW_ID]) for row in rows])
        return batch


def _number(row_id: Any) -> int:
    try:
        return int(row_id)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{ROW_ID}` must be a whole number, got {row_id!r}: it travels in a tensor. Number the rows, and keep your names in "
            "another column."
        ) from None


def model_columns(model: nn.Module, label_names: Collection[str]) -> set[str]:
    """The columns a model's forward reads, and its labels under the names that collators know."""
    # The class's: an instance may carry a wrapper that takes anything.
    return {*inspect.signature(type(model).forward).parameters, *label_names, "label", "label_ids", "labels"}


def with_row_ids(dataset: Any) -> Any:
    """The data set as objectives may see it: a `row_id` per row (its position where it has none), no bookkeeping columns.

    Only a datasets.Dataset is changed; other kinds are returned as they are.
    """
    if not isinstance(dataset, Dataset):
        return dataset
    dataset = dataset.remove_columns([name for name in BOOKKEEPING if name in dataset.column_names])
    return dataset if ROW_ID in dataset.column_names else dataset.add_column(ROW_ID, list(range(len(dataset))))
