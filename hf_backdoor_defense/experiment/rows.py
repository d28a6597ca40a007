"""Files of texts, read row by row, and the answers to them, appended so that a stopped run goes on where it stopped.

| file | a row |
|---|---|
| `.jsonl` | one JSON object per line; lines of white space are no rows |
| `.csv` | one record under a header line; quoted fields may hold line breaks |

Nothing here holds a whole file in memory.
"""

import csv
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

FORMATS = (".jsonl", ".csv")
Row = dict[str, Any]


@dataclass(frozen=True)
class Checked:
    """A file that was read to its end without a complaint."""

    rows: int
    sha256: str


def read_rows(path: str | Path, text_column: str = "text") -> Iterator[Row]:
    """The rows of a file, in order; each has a string in `text_column`, possibly an empty one.

    Raises:
        ValueError: no such file or format, a line that cannot be read, a row without a string there; names the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "in.csv")
    ...     _ = path.write_text("id,text\\n7,good\\n8,\\n")
    ...     list(read_rows(path))
    [{'id': '7', 'text': 'good'}, {'id': '8', 'text': ''}]
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"`{path}` must end in .jsonl or .csv: no other format is read. Save one row per line as JSON."
        )
    if not path.is_file():
        raise ValueError(f"There is no file `{path}`, seen from {str(Path.cwd())!r}. Correct the path.")
    numbered = _csv(path) if path.suffix.lower() == ".csv" else _jsonl(path)
    try:
        for line, row in numbered:
            _check(row, text_column, f"`{path}`, line {line}")
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` must be UTF-8, got other bytes ({error}). Save it as UTF-8.") from error


def check_rows(path: str | Path, text_column: str = "text", *, taken: Iterable[str] = ()) -> Checked:
    """Read a file to its end, so that nothing in it can stop a run later.

    Args:
        taken: names that will be written beside each row's own, which therefore must not be among these.

    Raises:
        ValueError: as `read_rows`, no rows, or a row with a taken name.
    """
    count, reserved = 0, frozenset(taken)
    for count, row in enumerate(read_rows(path, text_column), 1):
        if both := reserved & set(row):
            raise ValueError(
                f"`{path}`, row {count} has the column {', '.join(sorted(both))}, which is written beside the row's own columns: "
                "one of the two would be lost. Rename it in the input."
            )
    if not count:
        raise ValueError(f"`{path}` holds no rows: there is nothing to score. Check that it is the right file.")
    with open(path, "rb") as file:
        return Checked(count, hashlib.file_digest(file, "sha256").hexdigest())


def blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows, the last one shorter.

    >>> [len(block) for block in blocks(({} for _ in range(5)), 2)]
    [2, 2, 1]
    """
    rows = iter(rows)
    while block := list(islice(rows, size)):
        yield block


def whole_lines(path: str | Path) -> int:
    """How many answers a file holds; a last line that was cut off is removed from it. 0 where there is no file.

    Raises:
        ValueError: a line that is not the answer to the row of its place.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    count = end = 0
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                index = json.loads(line)["index"]
            except (ValueError, KeyError, TypeError):
                index = None
            if index != count:
                raise ValueError(
                    f"`{path}`, line {count + 1} is not the answer to row {count}: the file was changed. Delete it, and the "
                    "same command writes it anew."
                )
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def append_lines(path: str | Path, rows: Iterable[Row]) -> None:
    """Append JSON lines, and return when the disk has them."""
    payload = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with open(path, "ab") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"`{path}`, line {number} must be a JSON object, got {line.strip()[:40]!r}: {error}. Repair the line."
                ) from error


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the reader's own limit is 128 KiB, and a text may be longer
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames or []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`{path}` names a column twice ({', '.join(twice)}): one would be lost. Rename it.")
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"`{path}`, line {reader.line_num} must have {len(names)} fields as the header has, got another number: "
                        "which text is meant is unclear. Quote texts that hold commas or line breaks."
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"`{path}`, line {reader.line_num} is no CSV: {error}. Repair the line.") from error


def _check(row: Any, text_column: str, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}. Write {{{text_column!r}: …}}.")
    if text_column not in row:
        near = difflib.get_close_matches(text_column, row, n=1, cutoff=0.5)
        hint = f"perhaps --text_column {near[0]}" if near else "set --text_column"
        raise ValueError(f"{where} has no column {text_column!r} (it has {', '.join(row) or 'none'}): {hint}.")
    if not isinstance(row[text_column], str):
        raise ValueError(
            f"{where} must have a string as {text_column!r}, got {row[text_column]!r:.40}: only texts are scored. An empty "
            "text is written as an empty string."
        )
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair ({error}): no text does. Remove it.") from error
