"""From a `Run` to what its report shows: tables of text and pictures, in the order of the page."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hf_backdoor_defense.reporting.figures import Picture, Series, bars, counts, lines
from hf_backdoor_defense.reporting.purify_figures import distances, unit_scores
from hf_backdoor_defense.reporting.runs import Run
from hf_backdoor_defense.reporting.tables import BASELINES, Row, cells, seeds_note, summarize

RESULTS = ("ca", "asr", "ftr", "r_acc", "der", "precision", "recall", "time_ratio", "peak_bytes")
BEHIND = ("ca", "selective_ca", "coverage", "asr", "frr", "far", "auroc", "passes", "seconds")
COST = ("seconds", "time_ratio", "peak_bytes", "memory_ratio")
MAX_TERMS = 12
_AXES = {"pull": "r_t, share of the pull that the row kept"}
_TRAINING = {
    "num_train_epochs": "epochs", "learning_rate": "learning rate", "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation", "lr_scheduler_type": "schedule", "warmup_steps": "warm-up",
    "weight_decay": "weight decay", "max_grad_norm": "clipping", "optim": "optimizer",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows and columns; the first column names the row."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One run of a report. Parts that a run does not have are empty; `title` is what was attacked with what."""

    name: str
    title: str
    is_attacked: bool
    verdict: str
    failures: list[str]
    passed: str
    has_gates: bool
    facts: list[tuple[str, str]]
    results: Table
    bars: list[Picture]
    curves: list[Picture]
    terms: list[Picture]
    terms_note: str
    pulls: list[Picture]
    scores: list[Picture]
    suspects: list[dict[str, Any]]
    behind: Table
    behind_notes: list[str]
    behind_scores: list[Picture]
    purified: list[Picture]
    purified_notes: list[str]
    cost: Table
    activity: Table
    command: str
    plan: str = field(repr=False)


def section(run: Run) -> Section:
    """Everything that is shown of a run.

    Example: see `html.render`.
    """
    filters = run.filter_names
    rows = summarize([record for record in run.records if record.defense not in filters])
    first = run.records[0]
    attacked = first.attack != "none"
    floors = [row.estimates["ftr"].value for row in rows if "ftr" in row.estimates]
    floor = floors[0] if len(floors) == 1 else None
    terms, terms_note = _terms(run)
    return Section(
        name=run.name,
        title=f"{first.dataset}: " + (f"{first.attack}, {first.setting}" if attacked else "no simulated attack"),
        is_attacked=attacked,
        verdict=run.verdict,
        failures=run.failures,
        passed=_passed(run),
        has_gates=bool(run.gates),
        facts=_facts(run),
        results=_table(rows, RESULTS),
        bars=_bars(rows, [*_arms(run), *run.purifiers], floor),
        curves=_curves(run, floor),
        terms=terms,
        terms_note=terms_note,
        pulls=[
            counts(h, title=f"{h.arm}: {h.name} per row", axis=_AXES.get(h.name, h.name))
            for h in run.histograms
            if h.name not in ("scores", "filter_scores")
        ],
        scores=[
            counts(h, title=f"{h.arm}: suspicion of each training row", axis="suspicion score")
            for h in run.histograms
            if h.name == "scores"
        ],
        suspects=run.suspects,
        behind=_behind(run),
        behind_notes=_behind_notes(run),
        behind_scores=[
            counts(
                h,
                title=f"{h.arm}: score of each reported row",
                axis="score",
                groups=("clean rows", "triggered rows"),
                gone="flagged",
                bounds=[
                    bound for of_seed in run.filters.values() if h.arm in of_seed for bound in of_seed[h.arm].bounds
                ],
            )
            for h in run.histograms
            if h.name == "filter_scores"
        ],
        purified=_purified(run),
        purified_notes=_purified_notes(run),
        cost=_table([row for row in rows if set(COST) & set(row.estimates)], COST),
        activity=_activity(run),
        command=shlex.join(run.command),
        plan=json.dumps(run.plan, indent=2, ensure_ascii=False) if run.plan else "",
    )


def comparison(runs: list[Run]) -> list[tuple[str, Table]]:
    """The results of several runs in the same columns, one table for each run."""
    rows = [summarize([r for r in run.records if r.defense not in run.filter_names]) for run in runs]
    columns = [metric for metric in RESULTS if any(metric in row.estimates for found in rows for row in found)]
    return [
        (run.name, Table(head=(table := cells(found, columns))[0], rows=table[1:], note=seeds_note(found, columns)))
        for run, found in zip(runs, rows, strict=True)
    ]


def _table(rows: list[Row], metrics: tuple[str, ...]) -> Table:
    columns = [metric for metric in metrics if any(metric in row.estimates for row in rows)]
    head, *body = cells(rows, columns)
    return Table(head=head, rows=body, note=seeds_note(rows, columns) if rows else "")


def _behind(run: Run) -> Table:
    """The filters beside the model that they stand before."""
    found = [r for r in run.records if r.defense in run.filter_names]
    plain = [r for r in run.records if r.defense == "undefended" and r.metric in ("ca", "asr")]
    return _table(summarize([*plain, *found]), BEHIND) if found else Table(head=[], rows=[])


def _behind_notes(run: Run) -> list[str]:
    """Per filter and seed: what it was made from, or why it could not be used."""
    notes = []
    for seed, filters in sorted(run.filters.items()):
        for name, of_filter in filters.items():
            if of_filter.reason:
                notes.append(f"{name}, seed {seed}: not used. {of_filter.reason}")
                continue
            # A filter that learns nothing has no activity, and its half is left.
            learned = f"learned from {of_filter.rows.get('fit', 0):.0f} clean texts, " if of_filter.activity else ""
            said = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in of_filter.activity.items())
            notes.append(
                f"{name}, seed {seed}: {learned}calibrated on {of_filter.rows.get('calibrate', 0):.0f}"
                f"{' others' if learned else ' clean texts'}{f' ({said})' if said else ''}."
            )
    return notes


def _purified(run: Run) -> list[Picture]:
    """What each method moved or flagged, of the first seed."""
    seed = min(run.purified, default=0)
    data = run.plan.get("data")
    names = data.get("label_names") if isinstance(data, dict) else None
    pictures = []
    for method, found in run.purified.get(seed, {}).items():
        moved = distances([layer for layer in found.layers if "ratio" in layer])
        pictures += [] if moved is None else [replace(moved, title=f"{method}: {moved.title}")]
        for layer in (layer for layer in found.layers if "z" in layer):
            labels = names if isinstance(names, list) and len(names) == len(layer["z"]) else None
            picture = unit_scores(layer, threshold=found.threshold, labels=labels)
            pictures.append(replace(picture, title=f"{method}: {picture.title}"))
    return pictures


def _purified_notes(run: Run) -> list[str]:
    """Per method and seed: what stood out, or why nothing came of it."""
    notes = []
    for seed, methods in sorted(run.purified.items()):
        for name, found in methods.items():
            flagged = sum(len(layer.get("flagged", [])) for layer in found.layers)
            moved = [layer["ratio"] for layer in found.layers if "ratio" in layer]
            said = (
                f"INERT. {found.reason}" if found.reason
                else f"suspected target classes: {', '.join(found.suspected)}" if found.suspected
                else f"{flagged} hidden units stood out" if flagged
                else "nothing stood out" if any("z" in layer for layer in found.layers)
                else f"{len(moved)} weight{'s' * (len(moved) > 1)} moved, by up to {max(moved):.2f} of the radius" if moved
                else ""
            )  # fmt: skip
            notes += [f"{name}, seed {seed}: {said}."] if said else []
    return notes


def _passed(run: Run) -> str:
    names = {
        "max_asr_over_floor": "attack success at most {:g} above the floor",
        "max_ca_drop": "clean accuracy at most {:g} lower",
    }
    if run.gates is None:
        return "No gate failed, and no defense was inert."
    gates = [names[name].format(value) for name, value in run.gates.items() if name in names]
    said = f"Gates met: {'; '.join(gates)}." if gates else "No gate was set."
    return f"{said} No defense was inert."


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was run, as far as the folder says it."""
    first = run.records[0]
    options, training, data = (
        part if isinstance(part := run.plan.get(key), dict) else {} for key in ("run", "training", "data")
    )
    rows = found if isinstance(found := data.get("rows"), dict) else {}
    facts = [("Task", f"{first.dataset}{': ' if rows else ''}{', '.join(f'{n} {split}' for split, n in rows.items())}")]
    names = data.get("label_names")
    if isinstance(names, list):
        facts.append(
            ("Classes", ", ".join(map(str, names[:12])) + (f" and {len(names) - 12} more" if names[12:] else ""))
        )
    if options.get("eval_split"):
        facts.append(("Reported on", f"the {options['eval_split']} rows"))
    frozen = options.get("frozen_layers")
    trained = {-1: ", all layers trained", 0: ", embeddings frozen"}.get(
        frozen if isinstance(frozen, int) else -2,
        "" if frozen is None else f", embeddings and first {frozen} layers frozen",
    )
    is_text = "shared_images" not in data
    length = f", texts cut at {options['max_length']} tokens" if is_text and "max_length" in options else ""
    facts.append(("Model", f"{first.model}{trained}{length}"))
    facts.append(("Attack", _attack(run, options, names)))
    facts.append(("Seeds", ", ".join(map(str, sorted({record.seed for record in run.records})))))
    used = [f"{word} {described(training[key])}" for key, word in _TRAINING.items() if training.get(key) is not None]
    used += [f"momentum {described(options['momentum'])}"] if options.get("momentum") is not None else []
    used += [kind for kind in ("bf16", "fp16") if training.get(kind) is True]
    facts += [("Training", ", ".join(used))] if used else []
    defenses = run.plan.get("defenses")
    for spec in defenses if isinstance(defenses, list) else []:
        if isinstance(spec, dict):
            fields = ", ".join(f"{key}={described(value)}" for key, value in spec.items() if key != "name")
            facts.append((f"Defense {spec.get('name', '')}", fields or "no settings"))
    return [*facts, ("Environment", environment_in_words(first.env))]


def _attack(run: Run, options: dict[str, Any], names: Any) -> str:
    first = run.records[0]
    if first.attack == "none":
        return "none simulated: nothing is known about attack success"
    target = options.get("target")
    named = isinstance(names, list) and isinstance(target, int) and 0 <= target < len(names)
    rate = options.get("poison_rate")
    words = [
        first.attack,
        "clean-label" if options.get("clean_label") else "",
        f"trigger “{run.trigger}”" if run.trigger else "",
        f"{100 * rate:.3g} % of the training rows poisoned" if isinstance(rate, (int, float)) else first.setting,
        f"target {names[target]} ({target})" if named else "" if target is None else f"target class {target}",
    ]
    planted = {
        "requested": "{} rows planted", "carrying": "{} of them carry the trigger", "visible": "{} still show it after cutting",
    }  # fmt: skip
    words += [text.format(run.planted[key]) for key, text in planted.items() if key in run.planted]
    return ", ".join(filter(None, words))


def environment_in_words(env: dict[str, Any]) -> str:
    """Versions, commit and machine of a record, in one line.

    Example:
        >>> environment_in_words({"torch": "2.13.0", "machine": "x86_64", "cpus": 2})
        'torch 2.13.0, x86_64, 2 cores, no GPU'
    """
    if not env:
        return "not recorded"
    versions = [
        k for k in ("hf_backdoor_defense", "torch", "transformers", "accelerate", "datasets", "python") if env.get(k)
    ]
    words = [f"{name} {env[name]}" for name in versions]
    if env.get("commit"):
        words.append(f"commit {str(env['commit'])[:12]}{' with local changes' if env.get('dirty') else ''}")
    words.append(str(env.get("gpu") or f"{env.get('machine')}, {env.get('cpus')} cores, no GPU"))
    return ", ".join(words)


def described(value: Any) -> str:
    """A value of a plan in few characters.

    Example:
        >>> described(0.1 + 0.2), described(["cf", "mn"]), described(None)
        ('0.3', 'cf, mn', 'none')
    """
    if isinstance(value, list | tuple):
        return ", ".join(map(described, value))
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _bars(rows: list[Row], arms: list[str], floor: float | None) -> list[Picture]:
    trained = [row for row in rows if row.defense not in BASELINES]
    majority = next((row.estimates["ca"].value for row in rows if row.defense == "majority"), None)
    found = [
        bars(
            trained,
            "ca",
            title="CA, accuracy on clean rows",
            arms=arms,
            line=None if majority is None else ("majority", majority),
        ),
        bars(trained, "asr", title="ASR, triggered rows that go to the target", arms=arms, floor=floor),
        bars(trained, "r_acc", title="R-Acc, triggered rows classified rightly", arms=arms),
    ]
    return [picture for picture in found if picture is not None]


def _series(run: Run, pick: Callable[[Any], list[dict[str, float]]], name: str) -> Series:
    series: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for seed, arms in run.arms.items():
        for arm, result in arms.items():
            points = [(point["epoch"], point[name]) for point in pick(result) if name in point]
            series.setdefault(arm, {})[seed] = points
    return series


def _arms(run: Run) -> list[str]:
    return list(dict.fromkeys(arm for arms in run.arms.values() for arm in arms))


def _curves(run: Run, floor: float | None) -> list[Picture]:
    titles = {"ca": "CA, clean rows", "asr": "ASR, triggered rows", "r_acc": "R-Acc, triggered rows"}
    found = [
        lines(
            _series(run, lambda arm: arm.curve, name),
            title=title,
            arms=_arms(run),
            share=True,
            floor=floor if name == "asr" else None,
        )
        for name, title in titles.items()
    ]
    return [picture for picture in found if picture is not None]


def _terms(run: Run) -> tuple[list[Picture], str]:
    """Loss, gradient norm and named terms over the training, and which terms are not drawn."""
    points = [point for arms in run.arms.values() for arm in arms.values() for point in arm.history]
    found: dict[str, set[float]] = {}
    for point in points:
        for name, value in point.items():
            if name not in ("epoch", "step"):
                found.setdefault(name, set()).add(value)
    order = {"loss": 0, "learning_rate": 3, "grad_norm": 2}
    names = sorted(found, key=lambda name: (order.get(name, 1), name))
    constant = [name for name in names if len(found[name]) == 1 and name != "loss"]
    moving = [name for name in names if name not in constant]
    pictures = [
        lines(_series(run, lambda a: a.history, name), title=name, arms=_arms(run)) for name in moving[:MAX_TERMS]
    ]
    notes = [f"{name} was {next(iter(found[name])):.4g} throughout" for name in constant]
    notes += [f"not drawn: {', '.join(moving[MAX_TERMS:])}"] if moving[MAX_TERMS:] else []
    return [picture for picture in pictures if picture is not None], f"{'; '.join(notes)}." if notes else ""


def _activity(run: Run) -> Table:
    seeds = sorted(run.arms)
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for seed in seeds:
        for arm, result in {**run.arms[seed], **run.between.get(seed, {})}.items():
            for method, account in result.objectives.items():
                for name, value in (account.get("activity") or {}).items():
                    found.setdefault((arm, method, name.replace("_", " ")), {})[seed] = f"{value:.4g}"
                if account.get("inert"):
                    found.setdefault((arm, method, "INERT"), {})[seed] = str(account["inert"])
    rows = [[*key, *(values.get(seed, "–") for seed in seeds)] for key, values in found.items()]
    return Table(head=["training", "method", "figure", *(f"seed {seed}" for seed in seeds)], rows=rows)
