r"""Text from data nobody trusts, as Markdown that shows it and does nothing else.

    labels, triggers, names of files and data sets  ->  plain, code, row  ->  card

It stays on its line and in its cell, and adds no heading, row, link, mention, formula or HTML; what cannot be seen is written
out. A GitHub table splits its rows at every `|` without a backslash, code spans included, so cells hold escaped text and no code.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from hf_backdoor_defense.reporting.html import cut, visible

_SPECIAL = re.compile(
    r"[`*\[\]<|~&@{}]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?i:(?<=\bwww))\."
)  # a _ inside a word is only itself
_PATH = re.compile(r"(?<![\w/:.~])(?:(?:/[^\s/]+|~)(?:/[^\s/]+)+/?|[A-Za-z]:\\[^\s]+)")
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".npz")
_START = re.compile(r"^(\d*)([#+\-=>.)])")  # what begins a block where a line begins


def plain(text: object, *, length: int = 1000, starts: bool = False) -> str:
    r"""Text on one line that Markdown shows as it is.

    Args:
        text: anything; its `str` is shown. length: more characters than that are cut off, with a mark.
        starts: it begins a line, an item of a list or a quote, where some characters begin a heading or a list.

    Example:
        >>> print(plain("a|b\n# c <script> fine_tuning"))
        a\|b # c \<script> fine_tuning
        >>> print(plain("1. _x_ https://example.org", starts=True))
        1\. \_x\_ https\://example.org
    """
    line = visible(cut(" ".join(str(text).split()), length))
    line = line.replace("\\", "\0")
    line = _SPECIAL.sub(lambda found: "\\" + found[0], line)
    if starts:
        line = _START.sub(r"\1\\\2", line)
    return line.replace("\0", "&#92;").replace("$", "&#36;")


def code(text: object, *, length: int = 200) -> str:
    """A code span of text on one line; not for tables.

    Example:
        >>> print(code("lam=5"), code("a`b"))
        `lam=5` `` a`b ``
    """
    line = visible(cut(" ".join(str(text).split()), length)) or " "
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (max(map(len, re.findall("`+", line))) + 1)
    return f"{fence} {line} {fence}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table. The first row is the head; cells are Markdown already.

    Example:
        >>> print(table([["arm", "CA"], ["d3", "0.870"]]))
        | arm | CA |
        |---|---|
        | d3 | 0.870 |
    """
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def command_lines(words: Iterable[str]) -> str:
    r"""Words of a command as a shell takes them, one option per line, for a fenced block.

    Absolute paths are cut to their last part: they belong to one machine. Line breaks inside a word are written as spaces.

    Example:
        >>> print(command_lines(["hfbd", "clean", "--method", "d3", "--clean", "/data/me/my rows.csv", "--seed", "1"]))
        hfbd clean \
          --method d3 \
          --clean 'my rows.csv' \
          --seed 1
    """
    lines: list[list[str]] = [[]]
    for word in words:
        said = local(visible(" ".join(word.split())))
        if said.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(said))
    return " \\\n  ".join(" ".join(line) for line in lines)


def local(text: str) -> str:
    """Text without the folders of one machine: of absolute paths the last part, and everything else as it is.

    Example:
        >>> local("/data/me/rows.csv: 300 texts"), local("owner/name"), local("of ~/rows"), local(r"C:\\rows\\a.csv")
        ('rows.csv: 300 texts', 'owner/name', 'of rows', 'a.csv')
    """
    return _PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], text)


def is_path(text: str) -> bool:
    """Whether text may be a file or a folder; whoever knows that it is a Hub id asks before.

    Example:
        >>> [is_path(text) for text in ("rows.csv", "runs/model", "imdb", "offline:digits", "rows of the user", "0.05")]
        [True, True, False, False, False, False]
    """
    return "/" in text or "\\" in text or text.startswith(("~", "./")) or PurePath(text).suffix.lower() in _FILES
