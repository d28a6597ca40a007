"""Which page belongs to a run folder: `hfbd report` makes the report of every verb again, from its results alone.

| verb | page |
|---|---|
| `train` | `html.py`, of one run or of several |
| `purify` | `purified.py` |
| `clean`, `detect`, `attack`, `implant`, and what is not known here | `plain.py` |
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_backdoor_defense.reporting.html import checked_output, write_report
from hf_backdoor_defense.reporting.plain import verb_of, write_plain
from hf_backdoor_defense.reporting.purified import write_purified
from hf_backdoor_defense.reporting.results import read_records
from hf_backdoor_defense.reporting.sealed import RESULTS, seal_report


def make_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """The report of a run of any verb, or of several runs of `hfbd train`, written whole or not at all.

    Returns:
        `output`.

    Raises:
        ValueError: a folder that is no finished run, runs that cannot be compared, an output that is no page.
        OSError: the file cannot be written.

    Example:
        >>> make_report(["nowhere"], "report.html")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: `nowhere` must be the folder of a run, but does not exist: ...
    """
    other = {str(folder): verb for folder in folders if (verb := _verb(Path(folder))) != "train"}
    if not other:
        return write_report(folders, output)
    if len(folders) > 1:
        folder, verb = next(iter(other.items()))
        raise ValueError(
            f"`{folder}` was left by `{verb}`: only runs of hfbd train are compared on one page, as they measure the same. "
            "Name it alone, or leave it out."
        )
    ((name, verb),) = other.items()
    output, path = checked_output(output), Path(name) / RESULTS
    try:
        if verb != "purify":
            return write_plain(name, output)
        payload = json.loads(path.read_bytes())
        page = write_purified(payload, read_records(path), output, name=Path(name).resolve().name)
        return seal_report(name, page)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: `{error}` is missing or not what `{verb}` writes there: the file was edited. Restore it, or run again."
        ) from error


def _verb(folder: Path) -> str:
    """Of results that cannot be read: train, whose reader says why not."""
    try:
        payload: Any = json.loads((folder / RESULTS).read_bytes())
    except (OSError, ValueError):
        return "train"
    return verb_of(payload) if isinstance(payload, dict) and payload.get("schema") == 1 else "train"
