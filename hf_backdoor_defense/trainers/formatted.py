"""What a formatter asks of the SFT host: which of trl's options it rules out, and the rows as the formatter renders them.

    rows of text  ->  formatter.encode  ->  input_ids, labels  ->  trl (nothing left to render or to cut)

trl renders no data set with `input_ids`, but it still cuts at `max_length` and drops rows without a label: neither finds
anything, since `encode` refused rows that are longer and answers that are empty. Packing joins whole rows.
"""

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset
from transformers import AutoConfig

from hf_backdoor_defense.adapters import virtual_tokens
from hf_backdoor_defense.data.formatting import Formatter
from hf_backdoor_defense.trainers.columns import with_row_ids

_WHERE = (
    "revision",
    "token",
    "subfolder",
    "cache_dir",
    "local_files_only",
)  # of what loads a model, what finds its files

logger = logging.getLogger(__name__)


def formatter_reasons(given: Mapping[str, Any], formatter: Formatter | None) -> list[str]:
    """Why these arguments of an SFT trainer do not go with its formatter, or with none (sentences; empty when they do).

    >>> formatter = Formatter(kind="plain", end="</s>")
    >>> for reason in formatter_reasons({"train_dataset": Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})}, formatter):
    ...     print(reason)
    `formatter` was given without `processing_class`: rows are rendered before a model is loaded. Pass the tokenizer that \
the formatter was made with.
    """
    if formatter is None:
        return (
            [] if given.get("formatting_func") else pair_reasons(given.get("train_dataset"), given.get("eval_dataset"))
        )
    if not isinstance(formatter, Formatter):
        return [f"`formatter` must be a Formatter, got {formatter!r}. For example Formatter.plain(tokenizer)."]
    args, reasons = given.get("args"), []
    if given.get("processing_class") is None:
        reasons.append(
            "`formatter` was given without `processing_class`: rows are rendered before a model is loaded. Pass the tokenizer "
            "that the formatter was made with."
        )
    reasons += dict.fromkeys(
        filter(None, map(stream_reason, _each(given.get("train_dataset"), given.get("eval_dataset"))))
    )
    other_end = getattr(args, "eos_token", None) not in (None, formatter.end)
    ruled_out = {
        "formatting_func": given.get("formatting_func") is not None,
        "assistant_only_loss=True": getattr(args, "assistant_only_loss", False),
        "completion_only_loss=False": getattr(args, "completion_only_loss", None) is False,
        "chat_template_path": getattr(args, "chat_template_path", None) is not None,
        f"eos_token={getattr(args, 'eos_token', None)!r}": other_end,
    }
    if asked := [option for option, is_asked in ruled_out.items() if is_asked]:
        reasons.append(
            f"`formatter` was given with {' and '.join(asked)}: the formatter renders, ends and labels the rows, so that trl's "
            "options would be ignored. Leave them out, or leave the formatter out."
        )
    if getattr(args, "packing", False) and getattr(args, "packing_strategy", "bfd") == "wrapped":
        reasons.append(
            "`formatter` was given with packing_strategy='wrapped', which cuts answers off their prompts. Set "
            "packing_strategy='bfd': it keeps rows whole."
        )
    return reasons


def stream_reason(rows: Any) -> str | None:
    """Why a formatter cannot render these rows; None where it can, or where there are none.

    >>> stream_reason(Dataset.from_dict({"prompt": ["a"]})) is None is stream_reason(None)
    True
    """
    if rows is None or isinstance(rows, Dataset):
        return None
    return (
        f"`formatter` was given with rows of {type(rows).__name__}: a stream cannot be looked through for rows that do not fit. "
        "Use a datasets.Dataset, or let trl render the stream (formatter=None)."
    )


def pair_reasons(*datasets: Any) -> list[str]:
    """Why trl cannot render data sets, one alone or several by name: prompts without answers. None where that is not known.

    >>> print(pair_reasons(Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}))[0][:68])
    the data set has prompts and no completions (columns prompt, answer)
    """
    lone = [c for c in map(_columns, _each(*datasets)) if "prompt" in c and not {"completion", "input_ids"} & set(c)]
    return [
        f"the data set has prompts and no completions (columns {columns}): there is no answer to learn. Name the "
        "column of answers `completion`, or give `formatter=Formatter.plain(tokenizer, completion=...)`."
        for columns in dict.fromkeys(map(", ".join, lone))
    ]


def is_tokenized(rows: Any) -> bool:
    """Whether rows for an evaluation are no text: tokenized ones, names of data sets, none, or what does not name its columns.

    >>> is_tokenized("validation"), is_tokenized(Dataset.from_dict({"prompt": ["a"]}))
    (True, False)
    """
    columns = _columns(rows)
    return not columns or "input_ids" in columns


def encoded(datasets: Any, formatter: Formatter, tokenizer: Any, *, max_length: int | None) -> Any:
    """One data set, or several by name, as the formatter renders them, with `row_id`.

    Raises:
        ValueError: rows that the formatter cannot render, or that are longer than `max_length`; by `row_id`.
    """
    if isinstance(datasets, Mapping):
        return {name: encoded(rows, formatter, tokenizer, max_length=max_length) for name, rows in datasets.items()}
    return formatter.encode(with_row_ids(datasets), tokenizer, max_length=max_length)


def row_limit(model: Any, args: Any, peft_config: Any = None) -> int | None:
    """How long a row may be: the shorter of `max_length` and the model's context, None where neither says.

    Args:
        model: a model, or the name of one.
        peft_config: of the adapter that it is about to get: virtual tokens take positions, as those of an adapter it has do.

    >>> row_limit(None, None)
    1024
    """
    context = _context(model, args)
    if context is not None:
        context -= virtual_tokens(model) or int(getattr(peft_config, "num_virtual_tokens", None) or 0)
    limits = [getattr(args, "max_length", 1024), context]  # of no arguments trl makes its own, with 1024
    return min((limit for limit in limits if limit is not None), default=None)


def tell_of_cuts(given: Any, prepared: Any, *, max_length: int | None) -> None:
    """Log how many rows trl cut or dropped where it renders them itself: it does so without a word."""
    if max_length is None or not (isinstance(given, Dataset) and isinstance(prepared, Dataset)) or not len(given):
        return
    if "input_ids" in given.column_names:
        return
    dropped = len(given) - len(prepared)
    column = prepared.select_columns("input_ids").with_format(
        "arrow"
    )  # lengths alone: lists of Python would take minutes
    lengths = (pc.list_value_length(batch["input_ids"]) for batch in column.iter(batch_size=1000))
    full = sum(pc.sum(pc.equal(length, max_length)).as_py() or 0 for length in lengths)
    if dropped or full:
        logger.warning(
            "max_length=%d: of %d rows %d were dropped, for want of room for an answer, and %d fill it, whose answers may "
            "be cut: a model does not learn to end those. Raise max_length, or give a formatter, which names such rows.",
            max_length,
            len(given),
            dropped,
            full,
        )


def _each(*datasets: Any) -> list[Any]:
    """The data sets, and those that are given by name one by one."""
    return [one for rows in datasets for one in (rows.values() if isinstance(rows, Mapping) else [rows])]


def _columns(rows: Any) -> list[str]:
    """The names of the columns, none where they are not known."""
    columns = getattr(rows, "column_names", None)
    if columns is None and isinstance(rows, IterableDataset):  # one that was made from a generator does not know them
        columns = list(next(iter(rows), {}))
    return list(columns or [])


def _context(model: Any, args: Any) -> int | None:
    """How many positions a model has, of a name as of a model; None where it does not say."""
    config = getattr(model, "config", None)
    if isinstance(model, str):
        loading = getattr(args, "model_init_kwargs", None) or {}
        where = {name: loading[name] for name in _WHERE if name in loading}
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **where)
    found = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
