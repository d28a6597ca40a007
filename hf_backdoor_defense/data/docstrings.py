"""The task `offline:docstrings`: which part of Python's standard library is a sentence about?

Real English that every installation has: sentences from the docstrings of the standard library's sources, which are
parsed and never imported or executed. A sentence's label is the topic of the module it stands in; its words decide
nothing. All sentences of a module are in one split, so a model is tested on modules that it has never read.

| label | topic | modules |
|---|---|---|
| 0 | mail | mail messages, mailboxes, mail protocols |
| 1 | concurrency | threads, processes, event loops, queues |
| 2 | numbers | arithmetic, statistics, random numbers |
| 3 | files | files, paths, archives, compression |

The sentences differ a little from one version of Python to the next; `data.describe` has a fingerprint for reports.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOPICS: dict[str, tuple[str, ...]] = {
    "mail": tuple("email mailbox smtplib imaplib poplib".split()),
    "concurrency": tuple("asyncio multiprocessing threading concurrent queue sched selectors contextvars".split()),
    "numbers": tuple("_pydecimal statistics random fractions numbers heapq bisect colorsys".split()),
    "files": tuple(
        "_pyio tarfile shutil pathlib zipfile os tempfile gzip bz2 lzma fileinput glob ntpath posixpath genericpath "
        "filecmp fnmatch stat _compression".split()
    ),
}
SPLITS: dict[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
MIN_ROWS = 200  # per topic; with fewer, a split of modules is a matter of luck

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_LIST_OR_TABLE = re.compile(r"^\s*[-*+|=]{2,}", re.MULTILINE)


class Row(NamedTuple):
    """One sentence: `text`, `label` (position of the topic in `TOPICS`), `module` (dotted name, its provenance)."""

    text: str
    label: int
    module: str


def sentences(docstring: str) -> list[str]:
    """The sentences of a docstring's prose that have 7 to 24 words.

    Args:
        docstring: the text; paragraphs with code, lists or tables are left out.

    Returns:
        Sentences in order, white space collapsed, that start with a letter and are at least 80 % letters and spaces.

    Example:
        >>> sentences("Too short. This one has just enough words for us.\\n\\n>>> print('code of seven words or more')")
        ['This one has just enough words for us.']
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph or "::" in paragraph or _LIST_OR_TABLE.search(paragraph):
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            plain = sum(character.isalpha() or character == " " for character in sentence)
            if 7 <= len(sentence.split()) <= 24 and sentence[0].isalpha() and plain >= 0.8 * len(sentence):
                found.append(sentence)
    return found


def _sources(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of each source file of a module or package, without its tests; none where it is missing."""
    files = [root / f"{name}.py", *(root / name).rglob("*.py")]
    named = {}
    for path in files:
        parts = path.relative_to(root).with_suffix("").parts
        if path.is_file() and not {"test", "tests"} & set(parts):
            named[".".join(part for part in parts if part != "__init__")] = path
    yield from sorted(named.items())


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not the user's business
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _collect(root: Path) -> list[Row]:
    """Every sentence once over all topics, whatever its case: the first topic and module that has it keeps it."""
    rows, seen = [], set()
    for label, names in enumerate(TOPICS.values()):
        for name in names:
            for module, path in _sources(root, name):
                for text in (text for docstring in _docstrings(path) for text in sentences(docstring)):
                    if text.casefold() not in seen:
                        seen.add(text.casefold())
                        rows.append(Row(text, label, module))
    return rows


def _assign(counts: dict[str, int]) -> dict[str, str]:
    """Module to split for one topic: biggest module first, each to the split that misses most of its quota."""
    total = sum(counts.values())
    missing = {split: share * total for split, share in SPLITS.items()}
    assigned = {}
    for module in sorted(counts, key=lambda module: (-counts[module], module)):
        assigned[module] = max(missing, key=lambda split: missing[split])
        missing[assigned[module]] -= counts[module]
    return assigned


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(row.text.encode(), digest_size=16).digest()


def build(root: Path | None = None) -> dict[str, list[Row]]:
    """Make the task from the sources of a standard library. Deterministic: the same sources give the same rows.

    Args:
        root: folder of the library; default: that of the running Python.

    Returns:
        Split to rows. In every split each topic has the same number of rows, drawn and ordered by a hash of the text;
        a module is in one split only, and no text occurs twice.

    Raises:
        ValueError: the sources are missing or give fewer than `MIN_ROWS` rows for a topic.

    Example:
        >>> splits = build()
        >>> [len(splits[name]) >= 100 for name in ("train", "validation", "test")]
        [True, True, True]
        >>> {row.module for row in splits["train"]} & {row.module for row in splits["test"]}
        set()
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    pools: dict[str, list[list[Row]]] = {split: [[] for _ in TOPICS] for split in SPLITS}
    rows = _collect(root)
    for label in range(len(TOPICS)):
        of_topic = [row for row in rows if row.label == label]
        counts: dict[str, int] = {}
        for row in of_topic:
            counts[row.module] = counts.get(row.module, 0) + 1
        assigned = _assign(counts)
        for row in sorted(of_topic, key=_digest):
            pools[assigned[row.module]][label].append(row)
    sizes = {split: min(map(len, topics)) for split, topics in pools.items()}
    if sum(sizes.values()) < MIN_ROWS or not all(sizes.values()):
        found = {topic: sum(row.label == label for row in rows) for label, topic in enumerate(TOPICS)}
        raise ValueError(
            f"offline:docstrings must find at least {MIN_ROWS} sentences per topic, in several modules, in the "
            f"standard library's sources, got {found} in {root}: this Python seems to come without its .py files "
            "(zipped or stripped). Use a local file with the columns text and label, or a Python with its sources."
        )
    return {
        split: sorted((row for topic in topics for row in topic[: sizes[split]]), key=_digest)
        for split, topics in pools.items()
    }
