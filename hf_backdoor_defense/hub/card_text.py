"""The sentences of a card, from what is known of one model. What the method is stands in `methods.py`, figures in `figures.py`.

    Evidence, Publication  ->  context  ->  templates/card.md.j2

Everything that comes from a run passes `plain` or `code`; what stands here is Markdown.
"""

import re
from typing import Any

from hf_backdoor_defense.hub.evidence import Evidence, Publication
from hf_backdoor_defense.hub.figures import FLOOR, QUALITY, WARM_UP, columns, cost_table, figure_table, outcome
from hf_backdoor_defense.hub.markdown import code, command_lines, is_path, local, plain, table
from hf_backdoor_defense.hub.methods import (
    ADAPTIVE,
    METHODS,
    PURIFIED,
    TRIGGER_ONLY,
    UNTRIED,
    Method,
    bibtex,
    method_of,
)
from hf_backdoor_defense.hub.usage import how_to_load, usage
from hf_backdoor_defense.hub.warning import trigger_text, warning

PROJECT = {  # CITATION.cff; a test compares
    "title": "hf_backdoor_defense: backdoor defenses as a plugin for Hugging Face Trainers",
    "author": "{The hf_backdoor_defense authors}",
    "note": "Apache-2.0",
}
_MADE = {
    "fine_tuned": "fine-tuned from {base}",
    "cleaned": "made from {base} by continued pre-training",
    "purified": "made with a few clean rows from a finished classifier, {base}",
    "filter": "that looks at the inputs of a classifier made from {base}, and leaves that classifier as it is",
    "attacked": "attacked on purpose, made from {base}",
}
BUILT_IN = {  # data that an installation brings, and what it is
    "offline:docstrings": "sentences of the documentation of Python's standard library, labeled by topic: mail, concurrency, "
    "numbers or files",
    "offline:digits": "scikit-learn's scans of handwritten digits, 8 x 8 pixels, gray",
}
_LOW = 0.5  # an attack success below it may look like a cure
_SHOWN = {"asr", "ftr", "far", "aasr", "masr"}  # what says something about triggers
_DATA_ORDER = ("trained on", "clean rows", "clean texts", "text", "measured on", "trigger")


def context(evidence: Evidence, publication: Publication) -> dict[str, Any]:
    """What the template shows."""
    entry = evidence.entry
    name = method_name(evidence)
    method = method_of(name) if name and (entry.role != "attacked" or name in METHODS) else None
    figures, costs = figure_table(evidence), cost_table(evidence)
    return {
        "repo_id": publication.repo_id,
        "name": publication.repo_id.partition("/")[2],
        "warning": warning(evidence, method),
        "problems": [plain(local(reason), starts=True) for reason in evidence.failures],
        "forced": publication.forced,
        "attacked_role": entry.role == "attacked",
        "summary": summary(evidence, publication, method),
        "threat": threat(evidence, publication, method),
        "figures": table(figures) if len(figures) > 1 else "",
        "legend": legend(evidence),
        "seeds": seeds(evidence),
        "verdict": plain(local(evidence.verdict), length=4000, starts=True),
        "several": len(evidence.payload.get("models") or []) > 1,
        "costs": table(costs) if len(costs) > 1 else "",
        "cost_notes": cost_notes(evidence, costs),
        "has_method": method is not None or bool(entry.activity or entry.inert),
        "inert": plain(local(entry.inert or "")),
        "activity": account(evidence),
        "measurable": bool(entry.measurement),
        "limits": limits(evidence, method),
        "how_to_load": how_to_load(evidence),
        "usage": usage(evidence, publication),
        "command": command_lines(evidence.command) if evidence.command else "",
        "command_notes": command_notes(evidence, publication),
        "settings": settings(evidence),
        "versions": versions(evidence),
        "citations": citations(evidence, name),
    }


def method_name(evidence: Evidence) -> str:
    """The registry name of what made it; for an attacked model its attack; empty for plain training."""
    entry = evidence.entry
    own, attack = str(entry.method.get("name") or ""), str((entry.attacked or {}).get("attack") or "")
    if entry.role == "attacked":  # a trigger ("badnets") may be planted by a method of another name
        return next((name for name in (own, attack) if name in METHODS), attack or own)
    return own or (entry.arm if entry.role != "fine_tuned" else "")


def together(evidence: Evidence) -> list[dict[str, Any]]:
    """The fields of objectives that were hosted beside the method; none of an attacked model."""
    found = evidence.entry.method.get("together with")
    known = found if isinstance(found, list) and evidence.entry.role != "attacked" else []
    return [fields for fields in known if isinstance(fields, dict) and fields.get("name")]


def summary(evidence: Evidence, publication: Publication, method: Method | None) -> str:
    """What this is."""
    entry = evidence.entry
    kind = (
        "A filter"
        if entry.role == "filter"
        else f"{'An adapter' if entry.relation == 'adapter' else 'A model'} for {code(entry.pipeline_tag)}"
    )
    made = _MADE[entry.role].format(base=base(evidence, publication))
    sentence = f"{kind} {made}" if entry.role == "filter" else f"{kind}, {made}"
    if method is None and entry.role == "attacked":
        sentence += "."
    elif method is None:
        sentence += ", without a defense."
    else:
        credit = f" ({method.paper.short()})" if method.paper else ""
        sentence += f". It was made with {method.title}{credit}, which {method.does}"
        for other in (method_of(fields["name"]) for fields in together(evidence)):
            sentence += f", together with {other.title}, which {other.does}"
        sentence += "."
    first = plain(local(_first_sentence(evidence.verdict)))
    came_out = outcome(evidence) or (f"What its run says: {first}" if first else "")
    sentence += f" {came_out}" if came_out else ""
    if entry.labels and entry.role != "filter":
        shown = ", ".join(code(label, length=60) for label in entry.labels[:20])
        more = f" and {len(entry.labels) - 20} more" if len(entry.labels) > 20 else ""
        sentence += f" Classes: {shown}{more}."
    return sentence


def base(evidence: Evidence, publication: Publication) -> str:
    """The base as a link, or what else can be said of it."""
    given, known = evidence.entry.base_model, publication.base_model
    if known:
        link = f"[{known}](https://huggingface.co/{known})"
        if given.startswith("offline:"):
            return f"{link} ({code(given)} below)"
        return link if given == known else f"a local copy or descendant of {link}"
    if given.startswith("offline:"):
        return code(given)
    if "models/seed-" in given:
        own = given.startswith("models/")
        return f"a model that {'the same' if own else 'another'} run of this package made, which is not on the Hub"
    return "a local model that is not on the Hub" if given else "random weights"


def threat(evidence: Evidence, publication: Publication, method: Method | None) -> list[str]:
    """What it was defended against, with which data, and what nobody tried."""
    entry, lines = evidence.entry, []
    if entry.role != "attacked":
        none = f"No defense: {method.title}, to compare with." if method else "No defense: plain training."
        lines.append(f"Defended against: {method.against}." if method and method.against else none)
    order = [key for key in _DATA_ORDER if key in entry.data] + [key for key in entry.data if key not in _DATA_ORDER]
    simulated = entry.role != "attacked" and bool(_SHOWN & set(evidence.figures))
    measured = entry.measurement
    trigger = (
        trigger_text(measured["trigger"], measured.get("target"), entry.labels)
        if measured.get("trigger")
        else str(entry.data.get("trigger", ""))
    )
    for key in order:
        if key == "trigger" and simulated:
            continue
        said = (
            trigger if key == "trigger" else str(entry.data[key])
        )  # a trigger may look like a path, and is shown whole
        shown = plain(said if key in ("trigger", "attack") else local(said), length=500)
        lines.append(f"{_capital(plain(key, length=80, starts=True))}: {shown}")
    if publication.datasets:
        links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in publication.datasets)
        lines.append(f"Data sets on the Hub: {links}")
    said = " ".join([*map(str, entry.data.values()), *(record.dataset for record in evidence.figures.values())])
    lines += [
        f"{code(name)} is built in: {what}." for name, what in BUILT_IN.items() if re.search(rf"{name}\b(?!-)", said)
    ]
    attacks = list(dict.fromkeys(r.attack for r in evidence.figures.values() if r.attack not in ("none", "unknown")))
    if entry.role == "attacked":
        return lines
    if simulated:
        named = plain(trigger, length=500) or ", ".join(plain(attack, length=80) for attack in attacks) or "an attack"
        lines.append(f"Simulated to measure it: {named}.")
        adaptive = ", and an attacker who knows the method" if method else ""
        lines.append(f"Not simulated: any other trigger, place or target{adaptive}.")
    else:
        lines.append("Not simulated: any attack. No figure here is about triggers.")
    return lines


def legend(evidence: Evidence) -> list[str]:
    """What the columns are, and over how many rows."""
    own = evidence.figures
    lines = []
    for metric in columns(evidence):
        what = QUALITY[metric][1:] if metric in QUALITY else (metric.replace("_", " "), "")
        found = own.get(metric) or (own.get("ftr") if metric == "asr" else None)
        n = found.n if found else None
        rows = f" ({n} {'tokens' if metric == 'loss' else 'rows'})" if n else ""
        lines.append(f"{what[0]}{rows}: {what[1]}." if what[1] else f"{what[0]}{rows}.")
    return lines


def seeds(evidence: Evidence) -> str:
    """How many seeds are behind a figure."""
    entry = evidence.entry
    found = _seeds(evidence)
    if len(found) > 1:
        return f"This is the model of seed {entry.seed}; the run has {len(found)} seeds, and `results.json` holds them all."
    return f"One seed ({entry.seed}): preliminary."


def _seeds(evidence: Evidence) -> set[int]:
    name = evidence.entry.recorded_as or evidence.entry.arm
    return {record.seed for record in evidence.records if record.defense == name}


def account(evidence: Evidence) -> str:
    """The method's account of itself as a table, or nothing."""
    rows = [[plain(name, length=80), _value(value)] for name, value in evidence.entry.activity.items()]
    return table([["what", "value"], *rows]) if rows else ""


def cost_notes(evidence: Evidence, costs: list[list[str]]) -> str:
    """What the costs belong to, and how far they can be trusted."""
    env, titles, notes = evidence.environment, " ".join(costs[0]), []
    if env.get("gpu"):
        notes.append(f"Measured on {plain(env['gpu'])}.")
    elif env.get("cpus"):
        notes.append(f"Measured on {env['cpus']} CPU cores ({plain(env.get('machine') or 'unknown')}), without a GPU.")
    if "×" in titles:
        notes.append("Ratios are over training without a defense.")
    if "seconds" in titles or "time" in titles:
        notes.append(f"Timed once{': small differences say nothing' if len(costs) > 2 else ''}.")
        if WARM_UP in evidence.entry.data:
            notes.append("The warm-up is not counted.")
    return " ".join(notes)


def command_notes(evidence: Evidence, publication: Publication) -> str:
    """What the command leaves out, and what whoever runs it must have."""
    words, notes = evidence.command, []
    if any(local(word) != word for word in words):
        notes.append("Paths of one machine are cut to their last part.")
    options = [word for name, word in zip(words, words[1:], strict=False) if name != "--output_dir"]
    if any(is_path(word) and word not in (*publication.datasets, publication.base_model) for word in options):
        notes.append("Files and folders that it names are the publisher's, and not published here.")
    return " ".join(notes)


def limits(evidence: Evidence, method: Method | None) -> list[str]:
    """Where the evidence ends, in plain words."""
    entry, own = evidence.entry, evidence.figures
    if entry.role == "attacked":
        lines = ["What a defense does to these weights says something about this attack, and nothing about another."]
    else:
        lines = [TRIGGER_ONLY if _SHOWN & set(own) else UNTRIED, *([ADAPTIVE] if method else [])]
    if own and len(_seeds(evidence)) < 3:
        lines.append(
            "Fewer than three seeds: another seed may give other figures."
            + (" The intervals are over rows, not over seeds." if any(r.low is not None for r in own.values()) else "")
        )
    if {"asr"} & set(own) and "ftr" not in evidence.of(FLOOR):
        lines.append("No model that was never poisoned was measured beside it, so that the floor of ASR is not known.")
    if own and method is not None and entry.role != "attacked" and not evidence.controls:
        what = (
            "whether the classifier's own confidence flags as well"
            if entry.role == "filter"
            else "what the method did beyond plain training"
        )
        lines.append(f"No control was run beside it: {what} is not known.")
    if method is not None:
        for known in (method, *(method_of(fields["name"]) for fields in together(evidence))):
            lines += known.limits
    if "asr" not in own or own["asr"].value >= _LOW:
        lines = [line for line in lines if line != PURIFIED]
    if entry.role == "cleaned" and "asr" not in own:
        lines.append(
            "Fine-tune it on your task and measure it there: `hfbd train`, then `hfbd eval` with a simulated trigger."
        )
    lines.append(
        "The figures are the publisher's own. `checksums.json` shows that nothing was changed since, not that they "
        "are right: verify them."
    )
    return list(dict.fromkeys(lines))


def settings(evidence: Evidence) -> str:
    """The fields of the method, and of what was hosted beside it."""
    own = {key: value for key, value in evidence.entry.method.items() if key != "together with"}
    found = []
    for fields in (own, *together(evidence)) if own else ():
        words = [code(f"{key}={_word(value)}") for key, value in fields.items() if key != "name"]
        found.append(", ".join(([code(fields["name"])] if fields.get("name") else []) + words))
    return "; ".join(found)


def versions(evidence: Evidence) -> str:
    """What it was made with."""
    env = evidence.environment
    names = ("hf_backdoor_defense", "python", "torch", "transformers", "accelerate", "datasets")
    found = [f"{name} {code(env[name], length=80)}" for name in names if env.get(name)]
    if env.get("commit"):
        found.append(
            f"commit {code(env['commit'])}" + (" with changes that were not committed" if env.get("dirty") else "")
        )
    return f"Made with {', '.join(found)}." if found else ""


def citations(evidence: Evidence, name: str) -> list[str]:
    """BibTeX of this package, and of the method's paper where one is known."""
    version = str(evidence.environment.get("hf_backdoor_defense") or "")
    safe = version if version.replace(".", "").replace("+", "").isalnum() else ""
    found = [bibtex("software", "hf_backdoor_defense", {**PROJECT, "version": safe})]
    for key in dict.fromkeys((name, *(fields["name"] for fields in together(evidence)))):
        paper = METHODS[key].paper if key in METHODS else None
        found += [paper.bibtex(key)] if paper else []
    return found


def _first_sentence(text: str) -> str:
    """
    >>> _first_sentence("CA 0.87, v. good. This is about this trigger only.")
    'CA 0.87, v. good.'
    """
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip(), maxsplit=1)[0]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _value(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else plain(value, length=200)
    )


def _word(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
