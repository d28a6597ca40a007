"""`report.html` of a purification: the verdict, before and after beside plain fine-tuning, what was moved, what stood out.

results.json of `hfbd clean --method d3|ulrl|…`  ->  page  ->  templates/purified.html.j2  ->  report.html
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_backdoor_defense.reporting.figures import Picture, bars, lines
from hf_backdoor_defense.reporting.html import _environment
from hf_backdoor_defense.reporting.purify_figures import distances, unit_scores
from hf_backdoor_defense.reporting.results import Record, write_bytes
from hf_backdoor_defense.reporting.sections import Table
from hf_backdoor_defense.reporting.tables import cells, seeds_note, summarize

COLUMNS = ("ca", "asr", "ftr", "r_acc", "der", "seconds")
_BARS = {"ca": "CA, clean accuracy", "asr": "ASR, attack success rate", "r_acc": "R-Acc, recovered accuracy"}
MOST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the report of a purification shows. Parts that a method does not have are empty."""

    name: str
    title: str
    verdict: str
    failures: list[str]
    attacked: bool
    measured: bool
    notes: list[str]
    facts: list[tuple[str, str]]
    results: Table
    bars: list[Picture]
    moved: list[Picture]
    found: list[Picture]
    found_note: str
    losses: list[Picture]
    evidence: list[tuple[str, Table]]
    command: str
    plan: str


def page(payload: Mapping[str, Any], records: Sequence[Record], *, name: str) -> Page:
    """From what `results.json` holds to what is shown."""
    method, arms = payload["method"], payload["arms"]
    own = arms[method]
    evidence = own["evidence"]
    rows = summarize(records)
    shown = [row.defense for row in rows]
    floors = [row.estimates["ftr"].value for row in rows if "ftr" in row.estimates]
    floor = floors[0] if floors else None
    columns = [metric for metric in COLUMNS if any(metric in row.estimates for row in rows)]
    head, *body = cells(rows, columns)
    pictures = [
        bars(rows, metric, title=title, arms=shown, floor=floor if metric == "asr" else None)
        for metric, title in _BARS.items()
    ]
    moved = distances([layer for layer in evidence.get("layers", []) if "ratio" in layer])
    scored = [layer for layer in evidence.get("layers", []) if "z" in layer]
    labels = payload["labels"] if evidence.get("units") == "rows" else None
    history = {arm: {0: _losses(found)} for arm, found in arms.items() if "history" in found}
    loss = lines(history, title="training loss", arms=shown)
    return Page(
        name=name,
        title=f"{payload['model']}: {method}",
        verdict=payload["verdict"],
        failures=list(payload["failures"]),
        attacked=payload["attacked"] is not None,
        measured=own["scores"]["asr"] is not None,
        notes=list(payload["notes"]),
        facts=list(payload["facts"].items()),
        results=Table(head=head, rows=body, note=seeds_note(rows, columns)),
        bars=[picture for picture in pictures if picture is not None],
        moved=[] if moved is None else [moved],
        found=[unit_scores(layer, threshold=evidence["threshold"], labels=labels) for layer in scored],
        found_note=_found_note(own, evidence) if scored else "",
        losses=[] if loss is None else [loss],
        evidence=_tables(own, evidence, labels),
        command=shlex.join(payload["command"]),
        plan=json.dumps(payload["plan"], indent=2, ensure_ascii=False),
    )


def write_purified(payload: Mapping[str, Any], records: Sequence[Record], path: Path, *, name: str) -> Path:
    """Render the page, and write it whole or not at all."""
    template = _environment().get_template("purified.html.j2")
    return write_bytes(path, (template.render(p=page(payload, records, name=name)).strip() + "\n").encode())


def _losses(found: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(entry["epoch"], entry["loss"]) for entry in found["history"]]


def _found_note(own: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    names = own["suspected_classes"]
    accuracy = evidence.get("unlearn", {}).get("accuracy", [])
    how = (
        f" After {len(accuracy)} epochs of unlearning the accuracy on the clean rows was {accuracy[-1]:.2f}."
        if accuracy
        else ""
    )
    if names:
        return f"Suspected target class{'es' * (len(names) > 1)}: {', '.join(names)}.{how}"
    flagged = sum(len(layer["flagged"]) for layer in evidence["layers"])
    several = "s" * (flagged > 1)
    return (f"{flagged} hidden unit{several} stood out." if flagged else "Nothing stood out: no suspect.") + how


def _tables(
    own: Mapping[str, Any], evidence: Mapping[str, Any], labels: Sequence[str] | None
) -> list[tuple[str, Table]]:
    """The evidence in numbers, the strongest first."""
    tables = []
    activity = [[name.replace("_", " "), f"{value:.4g}"] for name, value in own["activity"].items()]
    if activity:
        tables.append(("What the method did", Table(head=["quantity", "value"], rows=activity)))
    layers = sorted((x for x in evidence.get("layers", []) if "ratio" in x), key=lambda x: -x["ratio"])
    if layers:
        rows = [
            [x["name"], f"{x['radius']:.4g}", f"{x['distance']:.4g}", f"{x['ratio']:.3f}"] for x in layers[:MOST_ROWS]
        ]
        tables.append(("Weights, the one that moved most first",
                       Table(head=["weight", "radius", "distance", "ratio"], rows=rows, note=_rest(layers))))  # fmt: skip
    for layer in (x for x in evidence.get("layers", []) if "z" in x):
        order = sorted(range(len(layer["z"])), key=lambda i: -layer["z"][i])
        rows = [
            [labels[i] if labels else f"unit {i}", f"{layer['scores'][i]:.4g}", f"{layer['z'][i]:.2f}",
             "yes" if i in layer["flagged"] else "no"]
            for i in order[:MOST_ROWS]
        ]  # fmt: skip
        what = "Classes" if labels else "Hidden units"
        title = f"{what} of {layer['name']}, the one that stands out most first"
        tables.append(
            (title, Table(head=["class" if labels else "unit", "change", "z", "flagged"], rows=rows, note=_rest(order)))
        )
    return tables


def _rest(found: Sequence[Any]) -> str:
    return f"{len(found) - MOST_ROWS} more are in results.json." if len(found) > MOST_ROWS else ""
