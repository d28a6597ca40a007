"""Records, tables and the sentence at the end of `hfbd attack`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_backdoor_defense.evaluation.filtering import filtered_scores
from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.experiment.attack_plan import AttackPlan
from hf_backdoor_defense.experiment.command import verb_command
from hf_backdoor_defense.experiment.entries import attack_entries
from hf_backdoor_defense.experiment.steps import Result
from hf_backdoor_defense.reporting.plain import write_plain
from hf_backdoor_defense.reporting.results import Record, environment, write_bytes
from hf_backdoor_defense.reporting.sealed import write_results
from hf_backdoor_defense.reporting.tables import render_terminal

COLUMNS = ("ca", "selective_ca", "coverage", "asr", "ftr", "frr", "far", "auroc", "passes")
RELEASE, CONTROL = "release", "clean base"
Results = dict[int, dict[tuple[str, ...], Result]]


@dataclass(frozen=True)
class AttackOutcome:
    """`notes`: filters that could not be used, and why. `exit_code`: 0 ran, 1 a filter could not be used."""

    records: list[Record]
    table: str
    verdict: str
    notes: list[str]

    @property
    def exit_code(self) -> int:
        return 1 if self.notes else 0


def summarize_attack(plan: AttackPlan, results: Results) -> AttackOutcome:
    """Records of every step; writes `results.json`, `table.txt` and `report.html`."""
    records: list[Record] = []
    notes: list[str] = []
    for seed, of_seed in results.items():
        records += records_of(plan, seed, of_seed)
        for (kind, *_, name), (about, _) in of_seed.items():
            if about.get("usable") is False:
                notes.append(f"{name}: not usable on the {kind} base, seed {seed}: {about['reason']}")
    table = tables(plan, records)
    outcome = AttackOutcome(records, table, verdict(plan, records), notes)
    write_results(
        plan.folder,
        {
            "schema": 1,
            "verb": "attack",
            "plan": plan.identity(),
            "verdict": outcome.verdict,
            "notes": notes,
            "failures": notes,  # under the name that a report reads
            "command": verb_command("attack", plan.run, chosen="attack"),
            "trigger": plan.run.get_trigger(measured=True).text,
            "models": attack_entries(plan, results, release=RELEASE),
            "records": records,
            "steps": {
                str(seed): {"/".join(key): about for key, (about, _) in of_seed.items()}
                for seed, of_seed in results.items()
            },
        },
    )
    write_bytes(plan.folder / "table.txt", "\n".join([table, "", outcome.verdict, *notes, ""]).encode())
    write_plain(plan.folder)
    return outcome


def records_of(plan: AttackPlan, seed: int, results: dict[tuple[str, ...], Result]) -> list[Record]:
    """Every measured value of one seed.

    | setting | rows |
    |---|---|
    | `release` | both bases before the victim |
    | a strategy | the victim alone ("undefended", "clean_reference") and behind each filter |
    | `clean base` | filters of the base on the clean one: FRR, FAR and AUROC must be those of chance |
    """
    run = plan.run
    common: dict[str, Any] = {
        "benchmark": "attack",
        "dataset": str(run.task),
        "model": run.model_name + ("" if run.num_layers is None else f", {run.num_layers} layers"),
        "attack": run.attack,
        "seed": seed,
        "env": environment(),
    }
    records: list[Record] = []

    def add(defense: str, setting: str, estimates: dict[str, Estimate]) -> None:
        for metric, estimate in estimates.items():
            records.append(Record.from_estimate(estimate, defense=defense, setting=setting, metric=metric, **common))

    for key, (about, arrays) in results.items():
        kind, arm = key[:2]
        setting = RELEASE if arm == "base" else arm
        if len(key) == 2:
            scores = _scores(plan, arrays, None, {})
            if kind == "clean":
                add("clean_reference", setting, {"ca": scores["ca"], "ftr": scores["asr"]})
            else:
                add("undefended", setting, {name: scores[name] for name in ("ca", "asr", "r_acc", "coverage")})
        elif about["usable"]:
            name = key[2]
            passes = {"passes": Estimate(about["passes"], 1, None, None)}
            if kind == "clean":
                scores = _scores(plan, results[kind, arm][1], arrays, about)
                add(name, CONTROL, {metric: scores[metric] for metric in ("frr", "far", "auroc")})
                continue
            for strategy in run.strategies if arm == "base" else [arm]:
                add(name, strategy, {**_scores(plan, results[kind, strategy][1], arrays, about), **passes})
    return records


def _scores(
    plan: AttackPlan, victim: dict[str, np.ndarray], arrays: dict[str, np.ndarray] | None, about: dict[str, Any]
) -> dict[str, Estimate]:
    """A victim's figures, behind a filter where one is given: on the rows that the filter saw."""
    edits = about.get("edits", False)
    given: list[np.ndarray] = []
    for part, rows in (("test", plan.test), ("triggered", plan.triggered)):
        labels = np.asarray(rows["label"])
        if arrays is None:
            given += [victim[part], labels, np.zeros(len(labels), dtype=bool)]
            continue
        index = arrays[f"{part}_index"]
        predicted = arrays[f"{part}_predicted"] if edits else victim[part][index]
        given += [predicted, labels[index], arrays[f"{part}_flagged"]]
    scores: dict[str, Any] = {}
    if arrays is not None:
        scores = {"clean_scores": arrays["test"], "triggered_scores": arrays["triggered"], "tail": about["tail"]}
    return filtered_scores(*given, target=plan.run.target, rejects=not edits, **scores)


def tables(plan: AttackPlan, records: list[Record]) -> str:
    """One table per setting, in the order of running."""
    parts = []
    for setting in (RELEASE, *plan.run.strategies, CONTROL):
        of_setting = [record for record in records if record.setting == setting]
        if of_setting:
            columns = [m for m in COLUMNS if any(record.metric == m for record in of_setting)]
            parts.append(f"{setting}\n{render_terminal(of_setting, columns=columns)}")
    return "\n\n".join(parts)


def verdict(plan: AttackPlan, records: list[Record]) -> str:
    """One sentence that claims no more than was measured."""

    def mean(defense: str, setting: str, metric: str) -> float | None:
        values = [r.value for r in records if (r.defense, r.setting, r.metric) == (defense, setting, metric)]
        return float(np.mean(values)) if values else None

    took = attack_took(records)
    released, floor = mean("undefended", RELEASE, "asr"), mean("clean_reference", RELEASE, "ftr")
    seeds = len(plan.run.seeds)
    close = "" if seeds >= 3 else f" {seeds} seed{'s' if seeds > 1 else ''}: preliminary."
    if not took:
        return (
            f"The attack did not take (ASR at release {released:.2f}, clean floor {floor:.2f}), so this run says nothing about "
            f"any filter.{close}"
        )
    after = [
        f"{s} {mean('undefended', s, 'asr'):.0%} (floor {mean('clean_reference', s, 'ftr'):.0%})"
        for s in plan.run.strategies
    ]
    parts = []
    for name in plan.run.filters:
        found = {s: mean(name, s, "asr") for s in plan.run.strategies}
        left = [f"{s} {value:.0%}" for s, value in found.items() if value is not None]
        if left:
            rates = [mean(name, s, "frr") or 0.0 for s, value in found.items() if value is not None]
            verb = "edits" if name == "onion" else "flags"
            parts.append(f"{name} leaves {', '.join(left)} and {verb} {max(rates):.1%} of clean texts")
    filters = "; ".join(parts) or "no filter was asked"
    return (
        f"As released, the base gives {released:.0%} of triggered texts to the target; after clean fine-tuning "
        f"{', '.join(after)}. {filters[0].upper()}{filters[1:]}. This is about this trigger only.{close}"
    )


def attack_took(records: list[Record]) -> bool:
    """Whether, for every seed, the released base's ASR lies clearly above the clean base's: their intervals do not meet."""
    asr = {r.seed: r.low for r in records if (r.defense, r.setting, r.metric) == ("undefended", RELEASE, "asr")}
    ftr = {r.seed: r.high for r in records if (r.defense, r.setting, r.metric) == ("clean_reference", RELEASE, "ftr")}
    return all((asr[seed] or 0.0) > (ftr[seed] or 0.0) for seed in asr)
