"""From arms to evidence: records, gates, one honest sentence, and the files of a run folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_backdoor_defense.evaluation.metrics import (
    Estimate,
    auroc,
    defense_effectiveness_rate,
    mean_over_seeds,
    precision_at,
    wilson,
)
from hf_backdoor_defense.experiment.behind import (
    Behind,
    brief,
    filter_failures,
    filter_histograms,
    filter_records,
    filter_table,
    filter_verdict,
)
from hf_backdoor_defense.experiment.command import command
from hf_backdoor_defense.experiment.entries import last_account, train_entries
from hf_backdoor_defense.experiment.purified import (
    Purified,
    purified_brief,
    purify_failures,
    purify_records,
    purify_verdict,
)
from hf_backdoor_defense.reporting.histograms import count_rows
from hf_backdoor_defense.reporting.html import REPORT_NAME, write_report
from hf_backdoor_defense.reporting.plots import plot_ca_asr, plot_curves, plot_scores
from hf_backdoor_defense.reporting.results import Record, environment, write_bytes
from hf_backdoor_defense.reporting.sealed import seal_more, write_results
from hf_backdoor_defense.reporting.tables import render_terminal

Results = dict[int, dict[str, dict[str, Any]]]  # seed -> arm -> result.json
Between = dict[str, list[dict[str, Any]]]  # method -> its trainings between the undefended one and its own

# Beyond this a difference is called one; within it the sentence says "unchanged". A share.
NOTABLE = 0.03


@dataclass(frozen=True)
class Outcome:
    """`exit_code`: 0 ran and gates met, 1 a gate failed or a defense was inert; `failures`: why."""

    records: list[Record]
    table: str
    verdict: str
    failures: list[str]

    @property
    def exit_code(self) -> int:
        return 1 if self.failures else 0


def records_of(
    plan: Any,
    results: Results,
    between: dict[int, Between],
    planted: dict[int, set[int]],
    baselines: dict[str, tuple[int, int]],
    behind: Behind | None = None,
    purified: Purified | None = None,
) -> list[Record]:
    """Every measured value of a run, one record each."""
    run = plan.run
    layers = "" if run.num_layers is None else f", {run.num_layers} layers"
    common: dict[str, Any] = {
        "benchmark": "run",
        "dataset": str(run.task),
        "model": f"{run.model_name}{layers}",
        "attack": "none" if run.simulate is None else run.simulate,
        "setting": ""
        if run.simulate is None
        else f"rate={run.poison_rate:g}{', clean-label' if run.clean_label else ''}",
        "env": environment(),
    }
    records = []

    def add(seed: int, defense: str, metric: str, value: float | None, estimate: dict[str, Any] | None = None) -> None:
        parts = {"value": value} if estimate is None else estimate
        if parts["value"] is not None:
            records.append(Record(seed=seed, defense=defense, metric=metric, **common, **parts))

    for seed, arms in results.items():
        for name, (correct, n) in baselines.items():
            estimate = wilson(correct, n)
            add(seed, name, "ca", None, vars(estimate))
        base = arms.get("undefended")
        for arm, result in arms.items():
            add(seed, arm, "ca", None, result["ca"])
            if result["asr"] is not None:
                add(seed, arm, "ftr" if arm == "clean_reference" else "asr", None, result["asr"])
                add(seed, arm, "r_acc", None, result["r_acc"])
            seconds, reference = _seconds(arm, arms, between[seed]), _seconds("undefended", arms, between[seed])
            add(seed, arm, "seconds", seconds)
            peaks = [training["peak_bytes"] for training in (result, *between[seed].get(arm, []))]
            peak = max(peaks) if all(peaks) else None
            add(seed, arm, "peak_bytes", peak)
            if seconds is not None and reference:
                add(seed, arm, "time_ratio", seconds / reference)
            if base is not None and peak and base["peak_bytes"]:
                add(seed, arm, "memory_ratio", peak / base["peak_bytes"])
            if base is not None and base["asr"] is not None and arm not in ("undefended", "clean_reference"):
                rate = defense_effectiveness_rate(
                    ca_before=base["ca"]["value"],
                    ca_after=result["ca"]["value"],
                    asr_before=base["asr"]["value"],
                    asr_after=result["asr"]["value"],
                )
                add(seed, arm, "der", rate)
        for arm, ranking in rankings(arms, between[seed]).items():
            if seed not in planted:
                continue
            hits = [row_id in planted[seed] for row_id in ranking["row_ids"]]
            add(seed, arm, "precision", precision_at(hits, sum(hits)))
            add(seed, arm, "recall", len(planted[seed] & set(ranking["dropped"])) / len(planted[seed]))
            add(seed, arm, "auroc", auroc(ranking["scores"], hits))
    if purified:
        records += purify_records(purified, {seed: arms["undefended"] for seed, arms in results.items()}, common)
    return records + filter_records(behind or {}, common)


def summarize_run(
    plan: Any,
    results: Results,
    between: dict[int, Between],
    records: list[Record],
    behind: Behind | None = None,
    purified: Purified | None = None,
) -> Outcome:
    """Table, gates and verdict."""
    failures = filter_failures(behind or {}) + purify_failures(purified or {})
    run = plan.run
    for objective in plan.defenses:
        for seed, arms in results.items():
            reason = last_account(objective.name, arms, between[seed]).get("inert")
            if reason:
                failures.append(f"INERT: {objective.name}, seed {seed}: {reason}")
        over, drop = over_floor(results, objective.name), ca_drop(results, objective.name)
        if run.max_asr_over_floor is not None and over is not None and over > run.max_asr_over_floor:
            failures.append(
                f"GATE: {objective.name} leaves ASR {over:+.3f} above the floor, allowed is {run.max_asr_over_floor:g}"
            )
        if run.max_ca_drop is not None and drop is not None and drop > run.max_ca_drop:
            failures.append(
                f"GATE: {objective.name} costs {drop:.3f} of clean accuracy, allowed is {run.max_ca_drop:g}"
            )
    if run.max_asr_over_floor is not None and not attack_took(results):
        failures.append("GATE: the attack did not take, so nothing was tested: raise --poison_rate or train longer")
    planted = plan.planted["requested"] if plan.planted else None
    majority = max((r.value for r in records if r.defense == "majority"), default=None)
    table = render_terminal(_of_arms(plan, records), planted=planted)
    said = verdict(plan, results, majority)
    if behind:
        table = "\n\n".join(filter(None, [table, filter_table(records, run.filters)]))
        said = " ".join(filter(None, [said, filter_verdict(behind) if attack_took(results) else ""]))
    if purified and attack_took(results):
        attacked, floor = _mean(results, "undefended", "asr"), _mean(results, "clean_reference", "asr")
        said = " ".join(filter(None, [said, purify_verdict(purified, attacked=attacked, floor=floor)]))
    return Outcome(records, table, said, failures)


def _of_arms(plan: Any, records: list[Record]) -> list[Record]:
    """Without the filters, whose figures have columns of their own."""
    return [record for record in records if record.defense not in plan.run.filters]


def attack_took(results: Results) -> bool:
    """Whether, for every seed, the undefended model's ASR lies clearly above the clean floor: their intervals do not meet."""
    return all(a["undefended"]["asr"]["low"] > a["clean_reference"]["asr"]["high"] for a in results.values())


def verdict(plan: Any, results: Results, majority: float | None = None) -> str:
    """One sentence that claims no more than was measured. `majority`: the accuracy of always guessing one class."""
    names = [objective.name for objective in plan.defenses]
    seeds = len(results)
    close = "" if seeds >= 3 else f" {seeds} seed{'s' if seeds > 1 else ''}: preliminary."
    if plan.run.simulate is None:
        parts = [f"{name} CA {_mean(results, name, 'ca'):.3f}" for name in names or ["undefended"]]
        return f"{'; '.join(parts)}. No attack was simulated, so nothing is known about attack success.{close}"
    floor, attacked = _mean(results, "clean_reference", "asr"), _mean(results, "undefended", "asr")
    if (
        majority is not None
        and min(_mean(results, a, "ca") for a in ("clean_reference", "undefended")) < majority + NOTABLE
    ):
        return (
            f"The model did not learn the task (CA {_mean(results, 'undefended', 'ca'):.2f}, always guessing one class "
            f"{majority:.2f}), so this run says nothing about any attack or defense.{close}"
        )
    if not attack_took(results):
        return (
            f"The attack did not take (undefended ASR {attacked:.2f}, clean floor {floor:.2f}), so this run says nothing "
            f"about any defense.{close}"
        )
    parts = []
    for name in names:
        over, drop = over_floor(results, name), ca_drop(results, name)
        assert over is not None and drop is not None
        asr = floor + over
        if over <= NOTABLE:
            what = "brought it back to the floor"
        elif asr <= attacked - NOTABLE:
            what = "lowered it without reaching the floor"
        else:
            what = "did not lower it"
        if majority is not None and _mean(results, name, "ca") < majority + NOTABLE:
            what = "destroyed the model"
        cost = f"costs {drop:.3f} CA" if drop > 0 else "costs no CA"
        parts.append(f"{name} {what} (ASR {asr:.2f}) and {cost}")
    unrun = "no defense was trained" if plan.run.purify else "no defense was run"
    return (
        f"Undefended, {attacked:.0%} of triggered {plan.kind.noun} go to the target (clean floor {floor:.0%}); "
        f"{'; '.join(parts) or unrun}. This is about this trigger only.{close}"
    )


def over_floor(results: Results, arm: str) -> float | None:
    """Mean over seeds of ASR minus the clean reference's false-trigger rate; None without an attack."""
    if any(arms[arm]["asr"] is None or "clean_reference" not in arms for arms in results.values()):
        return None
    return float(np.mean([a[arm]["asr"]["value"] - a["clean_reference"]["asr"]["value"] for a in results.values()]))


def ca_drop(results: Results, arm: str) -> float | None:
    """Mean over seeds of the undefended model's CA minus the arm's; None where undefended was not run."""
    if any("undefended" not in arms for arms in results.values()):
        return None
    return float(np.mean([a["undefended"]["ca"]["value"] - a[arm]["ca"]["value"] for a in results.values()]))


def write_outcome(
    plan: Any,
    outcome: Outcome,
    results: Results,
    between: dict[int, Between],
    suspects: list[dict[str, Any]],
    planted: dict[int, set[int]],
    behind: Behind | None = None,
    purified: Purified | None = None,
) -> None:
    """`results.json`, `suspects.jsonl`, `table.txt`, the plots and `report.html`, each whole or not at all."""
    folder, run = plan.folder, plan.run
    trigger = run.get_trigger()
    write_results(
        folder,
        {
            "schema": 1,
            "verb": "train",
            "plan": plan.identity(),
            "verdict": outcome.verdict,
            "failures": outcome.failures,
            "gates": {"max_asr_over_floor": run.max_asr_over_floor, "max_ca_drop": run.max_ca_drop},
            "command": command(run, plan.training, plan.defenses),
            "planted": plan.planted,
            "trigger": None if trigger is None else plan.kind.shown(trigger),
            "models": train_entries(plan, results, between),
            "records": outcome.records,
            "between": {
                str(seed): {arm: [_brief(r) for r in trainings] for arm, trainings in of_seed.items()}
                for seed, of_seed in between.items()
            },
            "arms": {
                str(seed): {arm: _brief(result) for arm, result in arms.items()} for seed, arms in results.items()
            },
            "histograms": histograms(results, between, planted) + filter_histograms(behind or {}),
            **({"filters": brief(behind)} if behind else {}),
            **({"purified": purified_brief(purified)} if purified else {}),
        },
    )
    write_bytes(folder / "table.txt", f"{outcome.table}\n\n{outcome.verdict}\n".encode())
    if suspects:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in suspects)
        write_bytes(folder / "suspects.jsonl", lines.encode())
    if run.simulate is not None:
        plots = _write_plots(folder, _of_arms(plan, outcome.records), results, between, planted)
        seal_more(folder, [plot.name for plot in plots])
    write_report([folder], folder / REPORT_NAME)


def _write_plots(
    folder: Path, records: list[Record], results: Results, between: dict[int, Between], planted: dict[int, set[int]]
) -> list[Path]:
    plots = [plot_ca_asr(records, folder / "ca_asr.png")]
    floor = _mean(results, "clean_reference", "asr")
    arms_of = next(iter(results.values()))
    curves = {arm: {seed: arms[arm]["curve"] for seed, arms in results.items()} for arm in arms_of}
    plots.append(plot_curves(curves, folder / "curves.png", floor=floor))
    for seed, arms in results.items():
        for arm, ranking in rankings(arms, between[seed]).items():
            dropped = set(ranking["dropped"])
            plot = plot_scores(
                ranking["scores"],
                [row_id in planted[seed] for row_id in ranking["row_ids"]],
                folder / (f"{arm}_scores.png" if len(results) == 1 else f"{arm}_scores_seed-{seed}.png"),
                dropped=[row_id in dropped for row_id in ranking["row_ids"]],
            )
            plots.append(plot)
    return plots


def histograms(results: Results, between: dict[int, Between], planted: dict[int, set[int]]) -> list[dict[str, Any]]:
    """What was recorded per training row, as counts: each arm's own records by name, and the `scores` of a filter."""
    seeds = list(results)
    found = []
    for arm in results[seeds[0]]:
        # A result of an earlier version has no records.
        records = {seed: _records_of_rows(results[seed][arm]) for seed in seeds}
        for name in records[seeds[0]]:
            of_seed = {seed: (r[name]["row_ids"], r[name]["values"]) for seed, r in records.items() if name in r}
            found.append((arm, name, count_rows(of_seed, planted=planted)))
    ranked = {seed: rankings(results[seed], between[seed]) for seed in seeds}
    for arm in ranked[seeds[0]]:
        of_arm = {seed: of_seed[arm] for seed, of_seed in ranked.items() if arm in of_seed}
        scores = {seed: (ranking["row_ids"], ranking["scores"]) for seed, ranking in of_arm.items()}
        dropped = {seed: ranking["dropped"] for seed, ranking in of_arm.items()}
        found.append((arm, "scores", count_rows(scores, planted=planted, dropped=dropped)))
    return [{"arm": arm, "name": name, **counts} for arm, name, counts in found if counts is not None]


def _records_of_rows(result: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """By name, of all methods that were hosted."""
    accounts = result["objectives"].values()
    return {name: record for account in accounts for name, record in account.get("rows", {}).items()}


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    """An arm's result without what is known of every row, which stays in the arm's folder."""
    objectives = {
        name: {key: value for key, value in account.items() if key not in ("ranking", "rows")}
        for name, account in result["objectives"].items()
    }
    return {**result, "objectives": objectives}


def rankings(arms: dict[str, dict[str, Any]], between: Between) -> dict[str, dict[str, Any]]:
    """The last ranking of each method that ranks rows: the second one where it made two."""
    found: dict[str, dict[str, Any]] = {}
    for result in (arms.get("undefended", {}), *(result for trainings in between.values() for result in trainings)):
        for name, account in result.get("objectives", {}).items():
            if account["ranking"] is not None:
                found[name] = account["ranking"]
    return found


def _seconds(arm: str, arms: dict[str, dict[str, Any]], between: Between) -> float | None:
    """Training time. What a recording method took is its own: it is taken off the undefended run it rode along with, and
    the method's time is all its trainings and its recording. None where a training was continued after a stop."""
    trainings = [arms[arm], *between.get(arm, [])] if arm in arms else []
    if not trainings or any(training["seconds"] is None for training in trainings):
        return None
    total = sum(training["seconds"] for training in trainings)
    first = arms.get("undefended", {})
    recording = {name: o["activity"].get("seconds", 0.0) for name, o in first.get("objectives", {}).items()}
    if arm == "undefended":
        return total - sum(recording.values())
    if arm in recording:
        plain = _seconds("undefended", arms, between)
        return None if plain is None else plain + recording[arm] + total
    return total


def _mean(results: Results, arm: str, metric: str) -> float:
    estimate: Estimate = mean_over_seeds([arms[arm][metric]["value"] for arms in results.values()])
    return estimate.value
