"""From the arms of a purification to evidence: records, one honest sentence, and the files of its folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_backdoor_defense.evaluation.metrics import Estimate, defense_effectiveness_rate
from hf_backdoor_defense.experiment.command import verb_command
from hf_backdoor_defense.experiment.entries import purify_entry
from hf_backdoor_defense.experiment.purify_plan import PurifyPlan
from hf_backdoor_defense.experiment.purify_training import FINE_TUNING
from hf_backdoor_defense.experiment.summary import NOTABLE, Outcome
from hf_backdoor_defense.reporting.html import REPORT_NAME
from hf_backdoor_defense.reporting.purified import write_purified
from hf_backdoor_defense.reporting.results import Record, environment, read_records, write_bytes
from hf_backdoor_defense.reporting.sealed import seal_report, with_local_places, write_results
from hf_backdoor_defense.reporting.tables import render_terminal

COSTLY = 0.05  # a share of clean accuracy
Arms = dict[str, dict[str, Any]]  # arm -> what its training and measuring left
RESULTS_NAME, TABLE_NAME = "results.json", "table.txt"


def account(plan: PurifyPlan, arms: Arms) -> Outcome:
    """Write `table.txt`, `report.html`, the checksums and `results.json`; last, the report is sealed."""
    records = _records(plan, arms)
    columns = [c for c in ("ca", "asr", "ftr", "r_acc", "der", "seconds") if any(r.metric == c for r in records)]
    table = render_terminal(records, columns=columns) + "\nundefended: the model as it was given"
    outcome = Outcome(records, table, verdict(plan, arms), failures(plan, arms))
    content = {
        "schema": 1,
        "verb": "purify",
        "plan": plan.identity(),
        "model": plan.run.model_name,
        "clean": plan.run.clean,
        "method": plan.method,
        "kind": plan.classifier.kind,
        "labels": plan.classifier.labels,
        "facts": dict(plan.facts()),
        "command": command(plan),
        "notes": plan.notes,
        "verdict": outcome.verdict,
        "failures": outcome.failures,
        "attacked": plan.classifier.attacked,
        "models": [purify_entry(plan, arms)],
        "arms": arms,
        "records": records,
    }
    payload = with_local_places(content)
    records = payload["records"]
    write_bytes(plan.folder / TABLE_NAME, "\n".join([table, "", outcome.verdict, *outcome.failures, ""]).encode())
    plain = json.loads(json.dumps({**payload, "records": [asdict(record) for record in records]}))
    page = write_purified(plain, records, plan.folder / REPORT_NAME, name=plan.folder.resolve().name)
    write_results(plan.folder, payload)
    seal_report(plan.folder, page)
    return outcome


def finished(folder: Path) -> Outcome:
    """What a finished run found."""
    payload = json.loads((folder / RESULTS_NAME).read_text())
    table = (folder / TABLE_NAME).read_text().partition("\n\n")[0]
    return Outcome(read_records(folder / RESULTS_NAME), table, payload["verdict"], payload["failures"])


def command(plan: PurifyPlan) -> list[str]:
    """Words for `shlex.join` that repeat the run: what differs from the defaults, and nothing else."""
    return verb_command("clean", plan.run, plan.objective, chosen="method")


def failures(plan: PurifyPlan, arms: Arms) -> list[str]:
    """Why the method cannot have worked."""
    inert = arms[plan.method]["inert"]
    return [] if inert is None else [f"INERT: {plan.method}: {inert}."]


def verdict(plan: PurifyPlan, arms: Arms) -> str:
    """What was measured, beside the control, and what was not."""
    own, control = arms[plan.method], arms.get(FINE_TUNING) if plan.run.has_control else None
    before = arms["undefended"]["scores"]

    def moved(metric: str) -> str:
        text = f"{before[metric]['value']:.3f} -> {own['scores'][metric]['value']:.3f}"
        return text if control is None else f"{text} (plain fine-tuning {control['scores'][metric]['value']:.3f})"

    words = [f"{plan.method}: clean accuracy {moved('ca')} on {before['ca']['n']} rows that were not trained on."]
    if before["asr"] is None:
        words.append(
            "Whether a backdoor is gone was not measured: no trigger was simulated, and no figure here can show its absence."
        )
    else:
        floor = arms.get("clean_reference")
        words.append(
            f"Attack success of the simulated {plan.run.simulate} {moved('asr')}"
            + (f", floor {floor['scores']['asr']['value']:.3f}" if floor else "")
            + f"; recovered accuracy {moved('r_acc')}."
        )
        words += _judged(before, own, control)
    fell = before["ca"]["value"] - own["scores"]["ca"]["value"]
    if fell > COSTLY:
        words.append(f"That is {100 * fell:.0f} points of clean accuracy: too high a price for most uses.")
    if plan.method == "ulrl":
        words += _found(own, None if plan.target is None else plan.classifier.labels[plan.target])
    return " ".join(words)


def _judged(before: dict[str, Any], own: dict[str, Any], control: dict[str, Any] | None) -> list[str]:
    """Sentences on what the figures mean, where they mean something."""
    words = []
    fell = before["asr"]["value"] - own["scores"]["asr"]["value"]
    if before["asr"]["value"] < 0.5:
        words.append("The trigger hardly worked on the model that was given: there was little to remove.")
    elif fell < NOTABLE:
        words.append("The attack was not removed.")
    elif control is not None and own["scores"]["asr"]["value"] > control["scores"]["asr"]["value"] - NOTABLE:
        words.append("Plain fine-tuning did as much: the fall is not the method's.")
    if fell >= NOTABLE and own["scores"]["asr"]["value"] > 0.5:
        words.append("Most triggered rows still go to the target: the attack was not removed.")
    elif fell >= NOTABLE and own["scores"]["r_acc"]["value"] < own["scores"]["ca"]["value"] - 0.2:
        words.append(
            "Triggered rows are not recognized again as what they are: the attacker was stopped, the model not healed."
        )
    return words


def _found(own: dict[str, Any], target: str | None) -> list[str]:
    """What was suspected, whether that can be relied on, and whether it is right where that is known."""
    evidence, names = own["evidence"], own["suspected_classes"]
    flagged = sum(len(layer["flagged"]) for layer in evidence["layers"])
    words = ["No suspect was found: nothing was reset, and what followed was plain fine-tuning."]
    if names:
        words = [f"Suspected target class{'es' * (len(names) > 1)}: {', '.join(names)}."]
        if target is not None and target in names:
            words.append(f"The simulated target, {target}, is among them.")
        elif target is not None:
            words.append(f"The simulated target is {target}: that was not found.")
    elif flagged:
        words = [f"{flagged} hidden unit{'s' * (flagged > 1)} stood out, to be relearned."]
    if not evidence["reliable"]:
        words.append("Unlearning stopped short, so that these scores are unreliable.")
    return words


def _records(plan: PurifyPlan, arms: Arms) -> list[Record]:
    common: dict[str, Any] = {
        "benchmark": "clean",
        "dataset": str(plan.run.clean if plan.run.test is None else plan.run.test),
        "model": str(plan.run.model_name),
        "attack": plan.run.simulate or "none",
        "setting": "",
        "seed": plan.run.seed,
        "env": environment(),
    }
    before = arms["undefended"]["scores"]
    records = []
    for arm, found in arms.items():
        scores = found["scores"]
        for metric in ("ca", "asr", "r_acc"):
            if scores[metric] is not None:
                name = "ftr" if arm == "clean_reference" and metric == "asr" else metric
                records.append(Record.from_estimate(Estimate(**scores[metric]), defense=arm, metric=name, **common))
        if "sha256" not in found:  # nothing was trained
            continue
        if scores["asr"] is not None:
            rate = defense_effectiveness_rate(
                **{
                    f"{m}_{when}": s[m]["value"]
                    for m in ("ca", "asr")
                    for when, s in (("before", before), ("after", scores))
                }
            )
            records.append(Record(defense=arm, metric="der", value=rate, **common))
        if found["seconds"] is not None:
            records.append(Record(defense=arm, metric="seconds", value=found["seconds"], **common))
    return records
