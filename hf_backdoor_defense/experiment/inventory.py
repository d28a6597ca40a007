"""What there is to choose from, by kind: names, one line each, fields with their defaults.

| kind | where a name is used | its table |
|---|---|---|
| defenses, comparators, controls | `hfbd train --defense NAME`; controls run by themselves | `registry.py` |
| pretraining | `hfbd clean --method NAME` | `registry.py` |
| purifiers | `hfbd clean --method NAME`, `purify(defense=NAME)` | `registry.py` |
| generative | in a script, `CROWSFTTrainer` | `registry.py` |
| triggers | `hfbd train --simulate NAME` | `attacks/triggers.py`, `attacks/image_triggers.py` |
| presets | `hfbd train --preset NAME` | `PRESETS` in `experiment/arguments.py` |
| attacks, detectors | `hfbd attack` hosts the first, a filter the second | `registry.py` |
| filters | `hfbd detect --filter NAME`, `hfbd attack --filters NAME` | `registry.py` |

All of it is read from source text: importing the classes would load torch and transformers, seconds for a list of names.
"""

import ast
import difflib
import importlib.util
import inspect
import re
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hf_backdoor_defense.attacks.image_triggers import IMAGE_TRIGGERS
from hf_backdoor_defense.attacks.triggers import TRIGGERS
from hf_backdoor_defense.registry import (
    ATTACKS,
    COMPARATORS,
    CONTROLS,
    DEFENSES,
    DETECTORS,
    FILTERS,
    GENERATIVE,
    PRETRAINING,
    PURIFIERS,
)

KINDS = {
    "defenses": "hfbd train --defense NAME",
    "comparators": "hfbd train --defense NAME: losses that a defense is compared with",
    "controls": "run by themselves beside the defense that they explain",
    "pretraining": "hfbd clean --method NAME: what cleans a pretrained model before fine-tuning",
    "purifiers": "hfbd clean --method NAME, hfbd train --purify NAME: what purifies a trained classifier with a few clean rows",
    "generative": "in a script, CROWSFTTrainer: what purifies a language model with a few clean rows",
    "triggers": "hfbd train --simulate NAME: attacks on texts, and on images",
    "presets": "hfbd train --preset NAME: whole runs",
    "attacks": "hfbd attack --attack NAME (weight_poisoning: badnets, insent); por, neuba, badpre on pretrained models",
    "detectors": "what the filter of the same name trains; in a script, PSIMTrainer",
    "filters": "hfbd detect --filter NAME, hfbd attack or hfbd train --filters NAME: what looks at inputs",
}
NEEDED = "(needed)"
"""In place of a default, where there is none."""
_PRESETS = "hf_backdoor_defense.experiment.arguments"
_WIDTH = 120


@dataclass(frozen=True)
class Field:
    """A hyper-parameter: its name, its default as it is written, and what the class says of it."""

    name: str
    default: str
    text: str


@dataclass(frozen=True)
class Entry:
    """One name that can be chosen. `presets`: named sets of its fields; `paper`: an arXiv id."""

    name: str
    kind: str
    line: str
    fields: tuple[Field, ...]
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper: str | None = None


@cache
def entries() -> tuple[Entry, ...]:
    """All names, kind after kind. A filter and what it trains have one name and are two entries.

    >>> [entry.name for entry in entries() if entry.kind == "comparators"]
    ['gce', 'in_trust', 'focal', 'smoothed']
    """
    tables = {"defenses": DEFENSES, "comparators": COMPARATORS, "controls": CONTROLS, "pretraining": PRETRAINING}
    tables |= {"purifiers": PURIFIERS, "generative": GENERATIVE}
    found = [_entry(name, kind, where) for kind, table in tables.items() for name, where in table.items()]
    triggers = TRIGGERS | IMAGE_TRIGGERS
    found += [_entry(name, "triggers", f"{kind.__module__}:{kind.__name__}") for name, kind in triggers.items()]
    for name, values in _assigned(ast.parse(_source(_PRESETS)), "PRESETS").items():
        line = ", ".join(f"{key} {_plain(values[key])}" for key in ("task", "simulate", "defense") if key in values)
        found.append(Entry(name, "presets", line, tuple(Field(key, repr(value), "") for key, value in values.items())))
    looking = {"attacks": ATTACKS, "detectors": DETECTORS, "filters": FILTERS}
    found += [_entry(name, kind, where) for kind, table in looking.items() for name, where in table.items()]
    return tuple(found)


def find(name: str) -> tuple[Entry, ...]:
    """The entries of a name. Raises ValueError with the nearest known name.

    >>> find("gce")[0].fields
    (Field(name='q', default='0.5', text='in [0, 1]; 0 is cross-entropy, 1 the mean absolute error.'),)
    >>> find("insend")
    Traceback (most recent call last):
    ...
    ValueError: There is nothing called `insend`: did you mean `insent`? Run hfbd list for all names.
    """
    known = {entry.name for entry in entries()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`? " if near else "no name is near it. "
        raise ValueError(f"There is nothing called `{name}`: {hint}Run hfbd list for all names.")
    return tuple(entry for entry in entries() if entry.name == name)


def overview() -> str:
    """All names by kind, a line each.

    >>> print(overview())  # doctest: +ELLIPSIS
    defenses (hfbd train --defense NAME)
      dece          ...
    """
    width = max(len(entry.name) for entry in entries())
    blocks = []
    for kind, where in KINDS.items():
        lines = [f"  {entry.name:{width}}  {_sentence(entry.line)}" for entry in entries() if entry.kind == kind]
        blocks.append("\n".join([f"{kind} ({where})", *lines]))
    return "\n\n".join([*blocks, "hfbd list NAME shows a name's fields, defaults and presets."])


def details(entry: Entry) -> str:
    """Everything about one name: fields with defaults, presets, paper.

    >>> print(details(*find("gce")))
    gce (comparators): Generalized cross-entropy: a label of probability p keeps p^q of its pull, in every epoch alike.
      q = 0.5  in [0, 1]; 0 is cross-entropy, 1 the mean absolute error.
      paper: arXiv 1805.07836; where each value stands: docs/papers.md
    """
    lines = [f"{entry.name} ({entry.kind}): {entry.line}"]
    width = max((len(f"{item.name} = {item.default}") for item in entry.fields), default=0)
    for item in entry.fields:
        head = f"  {f'{item.name} = {item.default}':{width}}"
        wrapped = textwrap.wrap(item.text, _WIDTH - width - 4, break_on_hyphens=False) or [""]
        lines.append(f"\n{' ' * (width + 4)}".join([f"{head}  {wrapped[0]}".rstrip(), *wrapped[1:]]))
    for name, values in entry.presets.items():
        lines.append(f"  preset {name}: " + ", ".join(f"{key} = {_plain(value)}" for key, value in values.items()))
    if entry.paper:
        lines.append(f"  paper: arXiv {entry.paper}; where each value stands: docs/papers.md")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sentence(line: str) -> str:
    return textwrap.shorten(line.partition(". ")[0], _WIDTH, placeholder=" …")


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"The source of `{module}` is missing: names are read from it. Install the package again.")
    return Path(spec.origin).read_text(encoding="utf-8")


def _assigned(scope: ast.Module | ast.ClassDef, name: str) -> Any:
    """The literal that a scope assigns to a name, or None."""
    for node in scope.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(value)
    return None


def _entry(name: str, kind: str, where: str) -> Entry:
    module, _, attribute = where.partition(":")
    source = _source(module)
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    body = classes[attribute]
    text = ast.get_docstring(body) or ""
    told: dict[str, str] = {}
    settings: dict[str, str] = {}
    for older in _lineage(classes, attribute):
        told |= _arguments(ast.get_docstring(older) or "")
        settings |= _settings(source, older)
    fields = tuple(Field(key, default, told.get(key, "")) for key, default in settings.items())
    presets = _assigned(body, "presets") or {}
    return Entry(name, kind, " ".join(text.partition("\n\n")[0].split()), fields, presets, _assigned(body, "paper"))


def _lineage(classes: dict[str, ast.ClassDef], name: str) -> list[ast.ClassDef]:
    """A class and those of its own module that it inherits from, the oldest first."""
    bases = [ast.unparse(base) for base in classes[name].bases]
    older = [kind for base in bases if base in classes for kind in _lineage(classes, base)]
    return [*older, classes[name]]


def _settings(source: str, body: ast.ClassDef) -> dict[str, str]:
    """Name and default of what can be set: keywords of a constructor where there is one, else the fields of a dataclass."""
    made = next((n.args for n in body.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if made is not None:
        taken = zip(made.kwonlyargs, made.kw_defaults, strict=True)
        return {argument.arg: NEEDED if value is None else _default(source, value) for argument, value in taken}
    return {
        node.target.id: _default(source, node.value)
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        if not ast.unparse(node.annotation).startswith("ClassVar")
    }


def _default(source: str, value: ast.expr) -> str:
    """A default as it is written; of `field(default_factory=lambda: [0.0])` the list."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        factory = next((keyword.value for keyword in value.keywords if keyword.arg == "default_factory"), None)
        if isinstance(factory, ast.Lambda):
            value = factory.body
        elif factory is not None:
            return f"{ast.unparse(factory)}()"
    return ast.get_source_segment(source, value) or ast.unparse(value)


def _arguments(text: str) -> dict[str, str]:
    """What the `Args:` chapter of a docstring says of each name."""
    chapter = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", inspect.cleandoc(text), re.M)
    told: dict[str, str] = {}
    names: list[str] = []
    for line in chapter.group(1).splitlines() if chapter else []:
        start = re.match(r"    (\w+(?:, \w+)*):(?: (.*))?$", line)
        names = start.group(1).split(", ") if start else names
        for name in names if line.strip() else []:
            told[name] = (start.group(2) or "") if start else f"{told[name]} {line.strip()}".strip()
    return told
