"""Instructions and responses that every installation has: what the functions and classes of Python's standard library do.

| kind | instruction (one of three wordings) | response |
|---|---|---|
| function | What does the function `bisect.insort(a, x)` do? | the first sentence of its docstring |
| class | What is the class `queue.LifoQueue` for? | the first sentence of its docstring |
| header | In `bisect`, which function is this? "Insert item x in list a." | `def insort(a, x):` |

The sources are parsed and never imported or executed; tests and vendored packages are left out. A file's rows are all in one
split, by a hash of its path: of twenty files one is for the test (the one that `examples/pretrain_tiny_code_lm.py` holds out
too, so that no model of its has read it), two are for validation. No instruction stands in two rows, and no response, whatever
its case. The rows differ a little from one version of Python to the next.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict

LEFT_OUT = frozenset("site-packages test tests idlelib lib2to3 turtledemo __pycache__".split())
SPLITS = ("train", "validation", "test")
MIN_ROWS = 200  # of the test split; with fewer, no share is worth a figure
WORDINGS: dict[str, tuple[str, ...]] = {
    "function": (
        "What does the function `{subject}` do?",
        "Describe `{subject}` in one sentence.",
        "Write the first line of the docstring of `{subject}`.",
    ),
    "class": (
        "What is the class `{subject}` for?",
        "Describe the class `{subject}` in one sentence.",
        "Write the first line of the docstring of the class `{subject}`.",
    ),
    "header": (
        'Write the header of a function in `{module}`: "{sentence}"',
        'In `{module}`, which function is this? "{sentence}"',
        'Begin the function of `{module}` that is documented so: "{sentence}"',
    ),
}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_LONGEST = 80  # characters of a header and of what names a function


class Row(NamedTuple):
    """One instruction: `prompt`, `completion`, `kind` (a key of `WORDINGS`), `module` (dotted name, its provenance)."""

    prompt: str
    completion: str
    kind: str
    module: str


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring if it has 3 to 24 words of plain ASCII, with its full stop; else None.

    >>> first_sentence("Return the number of\\n    items. More text.")
    'Return the number of items.'
    >>> first_sentence("Move a file") , first_sentence("Deprecated."), first_sentence("")
    ('Move a file.', None, None)
    """
    parts = _SENTENCE_END.split(docstring.strip(), maxsplit=1)
    sentence = " ".join(parts[0].split())
    letters = sum(character.isalpha() or character == " " for character in sentence)
    if not 3 <= len(sentence.split()) <= 24 or not sentence.isascii() or letters < 0.8 * len(sentence):
        return None
    return sentence if sentence[-1] in ".!?" else sentence.rstrip(":;,") + "."


def split_of(name: str) -> str:
    """The split of a source file, from its path below the library's folder ("email/charset.py").

    >>> [split_of(name) for name in ("abc.py", "shutil.py", "queue.py")]
    ['train', 'train', 'train']
    """
    digest = hashlib.sha256(name.encode()).digest()[0] % 20
    return "test" if digest == 0 else "validation" if digest <= 2 else "train"


def build(root: Path | None = None) -> dict[str, list[Row]]:
    """Make the rows from the sources of a standard library. Deterministic: the same sources give the same rows.

    Args:
        root: folder of the library; default: that of the running Python.

    Returns:
        Split to rows, ordered by a hash of their text.

    Raises:
        ValueError: the sources are missing or give fewer than `MIN_ROWS` test rows.

    Example:
        >>> splits = build()
        >>> {row.module for row in splits["train"]} & {row.module for row in splits["test"]}
        set()
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    names = [name for name in names if not LEFT_OUT.intersection(name.parts)]
    seen: set[str] = set()
    # What two splits have, the test keeps.
    for name in sorted(names, key=lambda name: -SPLITS.index(split_of(name.as_posix()))):
        module = ".".join(part for part in name.with_suffix("").parts if part != "__init__")
        for row in _rows(root / name, module):
            keys = {row.prompt, f"{row.kind == 'header'}|{row.completion.casefold()}"}
            if not keys & seen:
                seen |= keys
                splits[split_of(name.as_posix())].append(row)
    if len(splits["test"]) < MIN_ROWS or not all(splits.values()):
        found = {split: len(rows) for split, rows in splits.items()}
        raise ValueError(
            f"the instructions must have at least {MIN_ROWS} test rows from the standard library's sources, got {found} in "
            f"{root}: this Python seems to come without its .py files (zipped or stripped). Use a Python with its sources, or "
            "prompts and completions of your own."
        )
    return {split: sorted(rows, key=_digest) for split, rows in splits.items()}


def load_instructions(root: Path | None = None) -> DatasetDict:
    """The rows of `build` as data sets with the columns prompt, completion, kind, module and `row_id` (over all splits).

    >>> load_instructions()["test"].column_names
    ['prompt', 'completion', 'kind', 'module', 'row_id']
    """
    found, start = DatasetDict(), 0
    for split, rows in build(root).items():
        data = Dataset.from_list([row._asdict() for row in rows])
        found[split] = data.add_column("row_id", list(range(start, start + len(rows))))
        start += len(rows)
    return found


def _rows(path: Path, module: str) -> Iterator[Row]:
    """The rows of one source file, in its order; none where it is not Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are not the user's business
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node, owner in _definitions(tree):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if sentence is None or node.name.startswith("_"):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        subject = ".".join(filter(None, (module, owner, node.name))) + arguments
        if len(subject) <= _LONGEST:
            yield Row(_worded(kind, subject).format(subject=subject), sentence, kind, module)
        if arguments:
            prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            header, place = f"{prefix} {node.name}{arguments}:", ".".join(filter(None, (module, owner)))
            if len(header) <= _LONGEST:
                yield Row(_worded("header", subject).format(module=place, sentence=sentence), header, "header", module)


def _definitions(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Functions and classes at the top of a module and of its classes, with the name of the class they are in."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, ""
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield inner, node.name


def _worded(kind: str, subject: str) -> str:
    wordings = WORDINGS[kind]
    return wordings[hashlib.blake2b(f"{kind}|{subject}".encode(), digest_size=8).digest()[0] % len(wordings)]


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(f"{row.prompt}|{row.completion}".encode(), digest_size=16).digest()
