"""`hfbd clean`, run: warm-up where it is needed, cleaning, what is left. The same call continues a stopped run.

| step | leaves |
|---|---|
| warm-up | `warm_up/`: a pretrained model with a trained head |
| training | `checkpoints/`: the last epoch's; removed at the end |
| saving | `model/`: trunk, head, pooler, tokenizer, `defense.json`, `training.json`; there whole or not at all |
| account | `results.json`, `table.txt`, `report.html` |
"""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_backdoor_defense.defenses.recipe import LITTLE
from hf_backdoor_defense.experiment.arms import _usable_checkpoint, history
from hf_backdoor_defense.experiment.attack_models import TRAINING_NAME, silent
from hf_backdoor_defense.experiment.clean_plan import CleanPlan, trainer_of, training_rows
from hf_backdoor_defense.experiment.command import verb_command
from hf_backdoor_defense.experiment.entries import clean_entry
from hf_backdoor_defense.experiment.plan import PLAN_NAME
from hf_backdoor_defense.experiment.steps import kept_folder
from hf_backdoor_defense.experiment.summary import Outcome
from hf_backdoor_defense.models import BACKDOOR_FILE, mark_backdoored, weights_sha256
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from hf_backdoor_defense.reporting.plain import write_plain
from hf_backdoor_defense.reporting.results import Record, environment, read_records, write_bytes, write_json
from hf_backdoor_defense.reporting.sealed import write_results
from hf_backdoor_defense.reporting.tables import render_terminal
from hf_backdoor_defense.trainers.state import save_objectives
from hf_backdoor_defense.warm_up import RECORD_NAME, held_out_loss, warmed_up

RESULTS_NAME = "results.json"


def execute(plan: CleanPlan) -> Outcome:
    """Do what is not done yet, then write results and table. A finished run is only read."""
    results = plan.folder / RESULTS_NAME
    if results.is_file():
        print("finished before: nothing was changed", flush=True)
        return finished(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN_NAME, plan.identity())
    if plan.attacked is not None:  # what a stopped run leaves is marked too
        _mark(plan.folder, plan.attacked)
    for rest in plan.folder.glob(".model.*"):
        shutil.rmtree(rest)
    folder = kept_folder(plan.folder / "model", lambda partial: _clean(plan, partial))
    shutil.rmtree(plan.folder / "checkpoints", ignore_errors=True)
    return _account(plan, json.loads((folder / TRAINING_NAME).read_text()))


def finished(folder: Path) -> Outcome:
    """What a finished run found."""
    payload = json.loads((folder / RESULTS_NAME).read_text())
    table = (folder / "table.txt").read_text().partition("\n\n")[0]
    return Outcome(read_records(folder / RESULTS_NAME), table, payload["verdict"], payload["failures"])


def _clean(plan: CleanPlan, folder: Path) -> None:
    """Train, and fill `folder` with the cleaned model and what was measured on the way."""
    run = plan.run
    source, warm_up = _source(plan)
    with silent():  # said when the plan was made
        model, tokenizer = load_pretrained_whole(source, seed=run.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    measured: dict[str, Any] = {"warm_up": warm_up, "sha256": {"before": weights_sha256(model)}}
    before = held_out_loss(model, tokenizer, plan.held_out, max_length=run.max_length)
    print(f"held-out loss before: {before.loss:.3f} nats", flush=True)
    checkpoints = plan.folder / "checkpoints"
    checkpoint = _usable_checkpoint(checkpoints)
    if checkpoint is not None:
        print(f"continued from {Path(checkpoint).name}", flush=True)
    rows, method = training_rows(run, tokenizer, plan.texts), replace(plan.method)
    trainer = trainer_of(
        run, method, model, tokenizer, rows, folder=str(checkpoints),
        title=None if run.disable_tqdm else run.method, learning_rate=plan.facts.learning_rate,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    after = held_out_loss(model, tokenizer, plan.held_out, max_length=run.max_length)
    measured["sha256"]["after"] = weights_sha256(model)
    save_pretrained_whole(model, tokenizer, folder)
    save_objectives([method], folder)
    activity = method.activity()
    if plan.attacked is not None:
        kept = {key: activity[key] for key in ("dose", "norm_ratio")}
        _mark(folder, plan.attacked, cleaned={"method": run.method, **kept})
    write_json(
        folder / TRAINING_NAME,
        {
            "rows": len(rows),
            "steps": trainer.state.global_step,
            "learning_rate": plan.facts.learning_rate,
            "seconds": None if checkpoint else seconds,  # of a continued run the time of its last part is not one
            "method": {"config": method.to_dict(), "activity": activity, "inert": method.inert()},
            "held_out": {"before": asdict(before), "after": asdict(after)},
            "history": history(trainer.state.log_history),
            **measured,
        },
    )


def _source(plan: CleanPlan) -> tuple[str, dict[str, Any] | None]:
    """The checkpoint that is cleaned: the input, or what its warm-up made; and the losses of that."""
    run = plan.run
    if not plan.fresh:
        return str(run.model_name), None
    with silent():
        folder = warmed_up(
            str(run.model_name),
            plan.texts,
            plan.held_out,
            cache=plan.folder / "warm_up",
            seed=run.seed,
            max_length=run.max_length,
            show_progress=not run.disable_tqdm,
        )
    return str(folder), json.loads((folder / RECORD_NAME).read_text())["losses"]


def _mark(folder: Path, attacked: dict[str, Any], *, cleaned: dict[str, Any] | None = None) -> None:
    """Weights that were attacked on purpose stay marked: whether cleaning them helped was not measured here."""
    if cleaned is None and (folder / BACKDOOR_FILE).is_file():
        return
    mark_backdoored(folder, {**attacked, **({} if cleaned is None else {"cleaned": cleaned})})


def _account(plan: CleanPlan, training: dict[str, Any]) -> Outcome:
    records = _records(plan, training)
    table = render_terminal(records, columns=("loss", "norm_ratio", "dose"))
    outcome = Outcome(records, table, verdict(plan, training), failures(plan, training))
    write_bytes(plan.folder / "table.txt", "\n".join([table, "", outcome.verdict, *outcome.failures, ""]).encode())
    write_results(
        plan.folder,
        {
            "schema": 1,
            "verb": "clean",
            "plan": plan.identity(),
            "model": plan.run.model_name,
            "text": plan.run.text,
            "facts": asdict(plan.facts),
            "verdict": outcome.verdict,
            "failures": outcome.failures,
            "command": verb_command("clean", plan.run, plan.method, chosen="method"),
            "models": [clean_entry(plan, training)],
            "attacked": plan.attacked,
            "training": training,
            "records": records,
        },
    )
    write_plain(plan.folder)
    return outcome


def _records(plan: CleanPlan, training: dict[str, Any]) -> list[Record]:
    common: dict[str, Any] = {
        "benchmark": "clean",
        "dataset": str(plan.run.text),
        "model": str(plan.run.model_name),
        "attack": str((plan.attacked or {}).get("attack", "attacked")) if plan.attacked else "none",
        "defense": plan.run.method,
        "seed": plan.run.seed,
        "env": environment(),
    }
    records = [
        Record(setting=setting, metric="loss", value=found["loss"], n=found["n"], **common)
        for setting, found in training["held_out"].items()
    ]
    if training["seconds"] is not None:
        records.append(Record(setting="after", metric="seconds", value=training["seconds"], **common))
    activity = training["method"]["activity"]
    return records + [
        Record(setting="after", metric=metric, value=activity[metric], **common) for metric in ("norm_ratio", "dose")
    ]


def failures(plan: CleanPlan, training: dict[str, Any]) -> list[str]:
    """Why the method cannot have worked; nothing for the control, which has nothing to do."""
    if not plan.method.coef:
        return []
    activity, inert = training["method"]["activity"], training["method"]["inert"]
    if inert is None and activity["dose"] >= LITTLE:
        return []
    rate = training["learning_rate"] * plan.method.dose / activity["dose"] if activity["dose"] else 0.0
    way = f" --learning_rate {rate:.2g} would give {plan.method.dose:g} over these updates."
    if activity["dose"] >= LITTLE or not rate:
        way = " Give it more updates: more text, or more --epochs."
    reason = inert or f"the dose was {activity['dose']:.2f}, and below {LITTLE:g} it is expected to do next to nothing"
    return [f"INERT: {plan.run.method}: {reason}.{way}"]


def verdict(plan: CleanPlan, training: dict[str, Any]) -> str:
    """What was measured, and what was not."""
    activity, loss = training["method"]["activity"], training["held_out"]
    norms = f"the norms of {activity['n_targets']:.0f} matrices are {activity['norm_ratio']:.2f} of what they were"
    did = (
        f"After a dose of {activity['dose']:.2f} {norms} (the penalty alone would leave {activity['predicted_norm_ratio']:.2f})"
        if plan.method.coef
        else f"After plain continued pre-training, the control, {norms}"
    )
    return (
        f"{did}; held-out loss {loss['before']['loss']:.2f} -> {loss['after']['loss']:.2f} nats over {loss['after']['n']} "
        "tokens. That says nothing about triggers: fine-tune the model on your task and measure it there (hfbd train, then hfbd "
        "eval with --simulate)."
    )
