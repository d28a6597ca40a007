"""`report.html`: everything a run has to say, in one file that opens without network and without scripts.

    RUN/results.json (+ suspects.jsonl)  ->  read_run  ->  section  ->  templates/report.html.j2  ->  RUN/report.html

Texts of suspects come from data nobody trusts. They are escaped; characters that would hide or turn text around (control
characters, zero width, direction marks) are written as ⟨U+200B⟩; and the page forbids itself to load or run anything.
The same results give the same bytes.
"""

import base64
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_backdoor_defense.reporting.results import write_bytes
from hf_backdoor_defense.reporting.runs import Run, read_run
from hf_backdoor_defense.reporting.sealed import seal_report
from hf_backdoor_defense.reporting.sections import comparison, section

REPORT_NAME = "report.html"
CUT = 200  # characters of a suspect's text


def visible(text: str) -> str:
    r"""The text with characters that cannot be seen written out; line breaks and tabs stay.

    Example:
        >>> visible("a\u200bb\u202ec")
        'a⟨U+200B⟩b⟨U+202E⟩c'
    """
    hidden = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return "".join(f"⟨U+{ord(c):04X}⟩" if c not in "\n\t" and unicodedata.category(c) in hidden else c for c in text)


def cut(text: str, length: int = CUT) -> str:
    """At most `length` characters; what is left out is marked.

    Example:
        >>> cut("abcdef", 4), cut("abcd", 4)
        ('abc…', 'abcd')
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data_uri(svg: bytes) -> Markup:
    return Markup("data:image/svg+xml;base64," + base64.b64encode(svg).decode())


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_backdoor_defense.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = cut
    environment.filters["data_uri"] = _data_uri
    return environment


def render(runs: Sequence[Run]) -> bytes:
    """The page of one run, or of several with a common table on top.

    Raises:
        ValueError: no run.

    Example:
        >>> from hf_backdoor_defense.reporting.results import Record
        >>> record = Record("run", "sst2", "minilm", "none", "dece", "", 0, "ca", 0.8)
        >>> run = Run(name="a", verdict="dece CA 0.800.", failures=[], plan={}, planted={}, trigger="", gates={},
        ...           command=[], records=[record], arms={}, between={}, histograms=[], suspects=[])
        >>> render([run]).startswith(b'<!DOCTYPE html>\\n<html lang="en">')
        True
    """
    if not runs:
        raise ValueError("`runs` must hold at least one run, got none: there is nothing to report. Name a run folder.")
    page = _environment().get_template("report.html.j2")
    text = page.render(sections=[section(run) for run in runs], comparison=comparison(list(runs)), cut_at=CUT)
    return (text.strip() + "\n").encode()


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Reads the runs, and writes their report whole or not at all.

    Args:
        folders: of finished runs. output: the file; its folder exists.

    Returns:
        `output`.

    Raises:
        ValueError: a folder that is no finished run, the same one twice, an output that is no .html file or has no folder.
        OSError: the file cannot be written.

    Example:
        >>> write_report(["nowhere"], "report.html")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: `nowhere` must be the folder of a run, but does not exist: ...
    """
    places = [Path(folder).resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"`{folder}` is given twice: a comparison shows each run once. Leave one out.")
    runs = [read_run(folder) for folder in folders]
    page = write_bytes(checked_output(output), render(runs))
    return seal_report(folders[0], page) if len(runs) == 1 else page


def checked_output(output: str | Path) -> Path:
    """Where a report may be written. Raises ValueError for what is no .html file, or lies in no folder.

    Example:
        >>> checked_output("report.html").name
        'report.html'
    """
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"`output` must end in .html, got {output}: the report is a page. Rename it.")
    if not output.parent.is_dir():
        raise ValueError(f"`{output}` lies in a folder that does not exist. Make `{output.parent}`, or choose another.")
    if output.is_dir():
        raise ValueError(
            f"`{output}` is a folder: the report is a file. Name a file, for example {output / REPORT_NAME}."
        )
    return output
