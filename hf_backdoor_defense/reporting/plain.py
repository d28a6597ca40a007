"""`report.html` of the verbs that measure little themselves: what `hfbd clean --method recipe`, `detect` and `attack` wrote.

results.json  ->  page  ->  templates/plain.html.j2  ->  report.html

| part | from |
|---|---|
| verdict, what did not pass, notes | the results' own |
| tables, one per `setting`, and a bar per arm | the records |
| what was done | the models' activity; the training's figures before and after |
| models | the entries of `models` |

What the results of a verb (or of an earlier version) do not hold is left out.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_backdoor_defense.reporting.entries import ModelEntry
from hf_backdoor_defense.reporting.figures import Picture, bars, lines
from hf_backdoor_defense.reporting.html import REPORT_NAME, _environment
from hf_backdoor_defense.reporting.results import Record, read_records, write_bytes
from hf_backdoor_defense.reporting.sealed import seal_report
from hf_backdoor_defense.reporting.sections import Table, described, environment_in_words
from hf_backdoor_defense.reporting.tables import Row, cells, seeds_note, summarize

SHOWN = (
    "ca selective_ca coverage asr ftr r_acc frr far auroc aasr aasr_floor masr masr_floor control_asr loss norm_ratio dose "
    "passes seconds peak_bytes"
).split()
TERMS = {
    "ca": ("CA", "Clean accuracy: share of right predictions on untouched rows that were not trained on."),
    "selective_ca": ("CA of accepted", "The same share among the rows that a filter lets pass."),
    "coverage": ("Coverage", "Share of all rows that a filter lets pass; without a filter it is 1."),
    "asr": ("ASR", "Attack success rate: share of triggered rows, of another class, that go to the target."),
    "ftr": ("FTR", "The same share for a model that was never attacked: the floor of ASR."),
    "r_acc": ("R-Acc", "Share of the same triggered rows that are predicted as their true class."),
    "frr": ("FRR", "Share of clean rows that a filter flags."),
    "far": ("FAR", "Share of triggered rows that a filter lets pass."),
    "auroc": ("AUROC", "Chance that a triggered row looks more suspicious than a clean one; 0.5 tells nothing."),
    "aasr": ("AASR", "Attack success of each trigger at the class that it reaches most often, mean over the triggers."),
    "masr": ("MASR", "The same, of the trigger that reaches most."),
    "aasr_floor": ("Floor", "What the same triggers reach in a model that was fine-tuned from the clean checkpoint."),
    "control_asr": ("Control ASR", "The same for words that are no triggers."),
    "loss": ("Loss", "Cross-entropy of masked tokens in held-out text, in nats. It says nothing about triggers."),
    "norm_ratio": ("Norm ratio", "How large the norms of the treated matrices are, relative to what they were."),
    "dose": ("Dose", "Sum of rate and penalty over the updates: how hard the norms were pressed."),
    "passes": ("Passes", "Forward passes of a model for each text."),
}
ARMS = {
    "undefended": (
        "undefended",
        "The attacked model, with nothing done against it; behind a filter it is named by the filter.",
    ),
    "clean_reference": (
        "clean_reference",
        "The same model without the attack: what it gives to the target is the floor.",
    ),
}
LONGEST = 30  # characters of an arm's name that leave room for its bar
_BARS = {"ca": "CA, clean accuracy", "asr": "ASR, attack success rate"}
# What a key of the facts or of a filter is called; a plan's dose and norm ratio are what is to be expected of it.
_NAMED = {
    "first": "First matrices", "has_pooler": "Has a pooler", "dose": "Expected dose", "norm_ratio": "Expected norm ratio",
    "name": "Filter", "rows": "Texts", "n": "Calibrated on", "ties": "Ties at a threshold", "rank": "Rank of the threshold",
    "lower": "Flagged below", "upper": "Flagged above", "target_frr": "FRR that was asked for",
    "frr_low": "FRR to be expected, from", "frr_high": "FRR to be expected, to",
}  # fmt: skip
_WHAT = {"attack": "attack", "implant": "attack", "detect": "detection", "clean": "cleaning"}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the report shows. Parts that a run does not have are empty; `attacked` says which of its models are."""

    name: str
    what: str
    title: str
    verdict: str
    attacked: str
    failures: list[str]
    notes: list[str]
    results: list[tuple[str, Table]]
    bars: list[Picture]
    losses: list[Picture]
    activity: list[tuple[str, Table]]
    models: list[tuple[str, list[tuple[str, str]]]]
    facts: list[tuple[str, str]]
    command: str
    plan: str
    terms: list[tuple[str, str]]


def verb_of(payload: Mapping[str, Any]) -> str:
    """Which verb wrote these results; those of an earlier version are told by their keys.

    Example:
        >>> verb_of({"verb": "detect"}), verb_of({"filter": {}}), verb_of({"arms": {"0": {}}})
        ('detect', 'detect', 'train')
    """
    if payload.get("verb"):
        return str(payload["verb"])
    for key, verb in (("filter", "detect"), ("steps", "attack"), ("fine_tuned", "implant"), ("training", "clean")):
        if key in payload:
            return verb
    return "purify" if "method" in payload else "train"


def page(payload: Mapping[str, Any], records: Sequence[Record], *, name: str) -> Page:
    """From what `results.json` holds to what is shown.

    Example:
        >>> record = Record("detect", "in.jsonl", "minilm", "unknown", "psim", "", 0, "frr", 0.01)
        >>> shown = page({"verb": "detect", "verdict": "1 of 9 texts is flagged."}, [record], name="run")
        >>> shown.title, shown.results[0][1].rows, [title for title, _ in shown.terms]
        ('psim before minilm', [['psim', '0.01']], ['FRR'])
    """
    verb, entries = verb_of(payload), [ModelEntry.from_dict(entry) for entry in payload.get("models") or []]
    failures, notes = list(payload.get("failures") or []), list(payload.get("notes") or [])
    shown = [metric for metric in SHOWN if any(record.metric == metric for record in records)]
    return Page(
        name=name,
        what=_WHAT.get(verb, verb),
        title=_title(verb, payload, records),
        verdict=str(payload.get("verdict") or ""),
        attacked=_attacked(verb, payload, entries),
        failures=failures,
        notes=[note for note in notes if note not in failures],
        results=[*_results(records), *_victims(payload)],
        bars=_bars(records),
        losses=_losses(payload),
        activity=[*_before_and_after(payload), *_activity(payload, entries)],
        models=[(f"{entry.arm}, seed {entry.seed}", _model(entry)) for entry in entries],
        facts=_facts(payload, records),
        command=shlex.join(payload.get("command") or []),
        plan=json.dumps(payload["plan"], indent=2, ensure_ascii=False) if payload.get("plan") else "",
        terms=[
            *(about for arm, about in ARMS.items() if any(record.defense == arm for record in records)),
            *(TERMS[metric] for metric in shown if metric in TERMS),
        ],
    )


def write_plain(folder: str | Path, output: str | Path | None = None) -> Path:
    """Render the page of the results in `folder`, and write it whole or not at all; without `output` into the folder.

    Raises:
        ValueError: results that no run writes. OSError: none can be read, or the page cannot be written.
    """
    folder = Path(folder)
    path = folder / "results.json"
    payload = json.loads(path.read_bytes())
    records = read_records(path) if payload.get("records") else []  # where a filter could not be used there are none
    template = _environment().get_template("plain.html.j2")
    text = template.render(p=page(payload, records, name=folder.resolve().name))
    return seal_report(folder, write_bytes(Path(output or folder / REPORT_NAME), (text.strip() + "\n").encode()))


def _title(verb: str, payload: Mapping[str, Any], records: Sequence[Record]) -> str:
    model = str(payload.get("model") or (records[0].model if records else "a model"))
    done = records[-1].defense if records else ""
    attack = records[0].attack if records else "an attack"
    if verb in ("attack", "implant"):
        return f"{attack} on {model}"
    return f"{done or 'a filter'} before {model}" if verb == "detect" else f"{model}: {done or verb}"


def _attacked(verb: str, payload: Mapping[str, Any], entries: Sequence[ModelEntry]) -> str:
    if verb in ("attack", "implant"):
        return (
            "A backdoor was planted to measure what it does and what finds it: the models of this run are not for use."
        )
    if payload.get("attacked") or any(entry.attacked for entry in entries):
        return (
            "The model that was given carries a backdoor that was planted on purpose. What came of it stays marked and is not "
            "for use."
        )
    return ""


def _by_setting(records: Sequence[Record]) -> list[tuple[str, list[Row]]]:
    """Rows of each setting, in the order of measuring: within one, arms have short names."""
    settings = dict.fromkeys(record.setting for record in records)
    return [(s, summarize([record for record in records if record.setting == s])) for s in settings]


def _results(records: Sequence[Record]) -> list[tuple[str, Table]]:
    tables = []
    for setting, rows in _by_setting(records):
        columns = [metric for metric in SHOWN if any(metric in row.estimates for row in rows)]
        head, *body = cells(rows, columns)
        title = setting[:1].upper() + setting[1:] if setting else "Measured"
        tables.append((title, Table(head=head, rows=body, note=seeds_note(rows, columns))))
    return tables


def _bars(records: Sequence[Record]) -> list[Picture]:
    arms = list(dict.fromkeys(record.defense for record in records))
    found = [
        bars(rows, metric, title=f"{title}{f' ({setting})' if setting else ''}", arms=arms)
        for setting, rows in _by_setting(records)
        if max(len(row.arm) for row in rows) <= LONGEST
        for metric, title in _BARS.items()
    ]
    return [picture for picture in found if picture is not None]


def _victims(payload: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Of an implanted attack: each trigger in each victim."""
    rows = []
    for seed, arms in (payload.get("fine_tuned") or {}).items():
        for arm, found in arms.items():
            for word, shares in found["asr_by_class"].items():
                right = found["accuracy_with_trigger"].get(word)
                rows.append([word, arm, seed, f"{max(shares):.2f}", "–" if right is None else f"{right:.2f}"])
    head = ["trigger", "victim of", "seed", "to one class at most", "right with it"]
    return [("After fine-tuning, trigger by trigger", Table(head=head, rows=rows))] if rows else []


def _losses(payload: Mapping[str, Any]) -> list[Picture]:
    training = payload.get("training") or {}
    history = training.get("history") or []
    values: dict[str, set[float]] = {}
    for point in history:
        for key, value in point.items():
            values.setdefault(key, set()).add(value)
    names = [key for key, found in values.items() if key not in ("epoch", "step") and len(found) > 1]
    arm = str((training.get("method") or {}).get("config", {}).get("name") or "training")
    pictures = [
        lines({arm: {0: [(p["epoch"], p[key]) for p in history if key in p]}}, title=key, arms=[arm]) for key in names
    ]
    return [picture for picture in pictures if picture is not None]


def _before_and_after(payload: Mapping[str, Any]) -> list[tuple[str, Table]]:
    training = payload.get("training") or {}
    start, end, held_out = (training.get(key) or {} for key in ("start", "end", "held_out"))
    rows = [[key.replace("_", " "), f"{start[key]:.4g}", f"{end[key]:.4g}"] for key in end if key in start]
    for key in ("loss", "accuracy"):
        if held_out and all(key in held_out[when] for when in ("before", "after")):
            values = [f"{held_out[when][key]:.4g}" for when in ("before", "after")]
            rows.append([f"masked-LM {key}", *values])
    return [("Held-out text", Table(head=["figure", "before", "after"], rows=rows))] if rows else []


def _activity(payload: Mapping[str, Any], entries: Sequence[ModelEntry]) -> list[tuple[str, Table]]:
    found = {f"{entry.arm}, seed {entry.seed}": entry.activity for entry in entries}
    if not entries:
        found = {"the method": ((payload.get("training") or {}).get("method") or {}).get("activity") or {}}
    return [
        (f"What {title} did",
         Table(head=["figure", "value"], rows=[[k.replace("_", " "), f"{v:.4g}"] for k, v in activity.items()]))
        for title, activity in found.items()
        if activity
    ]  # fmt: skip


def _model(entry: ModelEntry) -> list[tuple[str, str]]:
    method = ", ".join(f"{key}={described(value)}" for key, value in entry.method.items() if key != "name")
    about = [
        ("Folder", entry.path),
        ("Made from", entry.base_model),
        ("Method", f"{entry.method.get('name', '')}{f' ({method})' if method else ''}" if entry.method else ""),
        ("Inert", entry.inert or ""),
        ("Attacked", ", ".join(f"{key} {described(value)}" for key, value in (entry.attacked or {}).items())),
        *((key[:1].upper() + key[1:], value) for key, value in entry.data.items()),
        ("Weights of its base" if entry.role == "filter" else "Weights", f"SHA-256 {entry.weights_sha256}"),
    ]
    return [(name, text) for name, text in about if text]


def _facts(payload: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the results say of the run beside its figures: the flat values, in words."""
    parts: dict[str, Any] = {key: payload.get(key) for key in ("model", "text", "trigger")}
    parts["seeds"] = sorted({record.seed for record in records})
    for key in ("facts", "filter"):
        parts |= payload.get(key) or {}
    parts |= (payload.get("filter") or {}).get("calibration") or {}
    parts["gates"] = {key: value for key, value in (payload.get("gates") or {}).items() if value is not None}
    flat = {key: value for key, value in parts.items() if not isinstance(value, dict) and value not in (None, "", [])}
    facts = [
        (_NAMED.get(key, key[:1].upper() + key[1:].replace("_", " ")), described(value)) for key, value in flat.items()
    ]
    facts += [(f"Gate {key}", described(value)) for key, value in parts["gates"].items()]
    return [*facts, ("Environment", environment_in_words(records[0].env))] if records else facts
