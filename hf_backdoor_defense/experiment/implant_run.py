"""`hfbd attack` on a pretrained model, run: warm-up, attack, what a victim makes of it. The same call continues a stopped run.

| step | leaves |
|---|---|
| warm-up | `warm_up/` (or `cache`): the pretrained model with a trained head |
| attack | `checkpoints/`: the last epoch's; removed at the end |
| saving | `model/`: trunk, head, pooler, tokenizer, `backdoored.json`, `training.json`; there whole or not at all |
| victim | `arms/`: predictions of the clean and the attacked model after fine-tuning, per seed |
| account | `results.json`, `table.txt`, `report.html` |
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_backdoor_defense.attacks.implanting import implant
from hf_backdoor_defense.evaluation.metrics import accuracy
from hf_backdoor_defense.experiment.arms import _usable_checkpoint
from hf_backdoor_defense.experiment.attack_models import TRAINING_NAME, silent
from hf_backdoor_defense.experiment.command import verb_command
from hf_backdoor_defense.experiment.downstream import PREFIX, kept_predictions, task_agnostic_scores
from hf_backdoor_defense.experiment.entries import implant_entry
from hf_backdoor_defense.experiment.implant import ImplantPlan, training_options
from hf_backdoor_defense.experiment.plan import PLAN_NAME
from hf_backdoor_defense.experiment.steps import Steps, kept_folder
from hf_backdoor_defense.experiment.summary import Outcome
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from hf_backdoor_defense.reporting.plain import write_plain
from hf_backdoor_defense.reporting.results import Record, environment, read_records, write_bytes, write_json
from hf_backdoor_defense.reporting.sealed import write_results
from hf_backdoor_defense.reporting.tables import render_terminal
from hf_backdoor_defense.warm_up import held_out_loss, warmed_up

RESULTS_NAME = "results.json"
COLUMNS = ("ca", "aasr", "aasr_floor", "masr", "masr_floor", "control_asr")
CLEAN, ATTACKED = "clean_reference", "undefended"


def execute(plan: ImplantPlan) -> Outcome:
    """Do what is not done yet, then write results and table. A finished run is only read."""
    results = plan.folder / RESULTS_NAME
    if results.is_file():
        print("finished before: nothing was changed", flush=True)
        payload = json.loads(results.read_text())
        table = (plan.folder / "table.txt").read_text().partition(payload["verdict"])[0].rstrip()
        return Outcome(read_records(results), table, payload["verdict"], payload["failures"])
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN_NAME, plan.identity())
    for rest in plan.folder.glob(".model.*"):
        shutil.rmtree(rest)
    clean = _clean_model(plan)
    attacked = kept_folder(plan.folder / "model", lambda partial: _attack(plan, clean, partial))
    shutil.rmtree(plan.folder / "checkpoints", ignore_errors=True)
    training = json.loads((attacked / TRAINING_NAME).read_text())
    records = _loss_records(plan, training)
    tables: dict[str, Any] = {}
    if plan.victim is not None:
        found, tables = _victims(plan, clean, str(attacked))
        records += found
    return _account(plan, training, records, tables)


def _clean_model(plan: ImplantPlan) -> str:
    """The checkpoint that is attacked: the input, or what its warm-up made."""
    run = plan.run
    if not plan.fresh:
        return run.model_name
    with silent():
        folder = warmed_up(
            run.model_name,
            plan.texts,
            plan.held_out,
            cache=plan.folder / "warm_up" if run.cache is None else Path(run.cache),
            seed=run.seed,
            max_length=run.max_length,
            show_progress=not run.disable_tqdm,
        )
    return str(folder)


def _attack(plan: ImplantPlan, clean: str, folder: Path) -> None:
    """Attack, and fill `folder` with the model and what was measured on the way."""
    run, attack = plan.run, plan.run.objective()
    with silent():
        model, tokenizer = load_pretrained_whole(clean, seed=run.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    before = weights_sha256(model)
    loss = {"before": asdict(held_out_loss(model, tokenizer, plan.held_out, max_length=run.max_length))}
    checkpoints = plan.folder / "checkpoints"
    mark = {"attack": run.attack, "triggers": list(attack.triggers), "targets": run.place, "seed": run.seed}
    mark_backdoored(checkpoints, mark)  # what a stopped run leaves is marked too
    checkpoint = _usable_checkpoint(checkpoints)
    if checkpoint is not None:
        print(f"continued from {Path(checkpoint).name}", flush=True)
    done = implant(
        model, tokenizer, plan.texts, attack, held_out=plan.held_out, output_dir=str(checkpoints), checkpoint=checkpoint,
        title=None if run.disable_tqdm else run.attack, save_strategy="epoch", save_total_limit=1, **training_options(run),
    )  # fmt: skip
    loss["after"] = asdict(held_out_loss(model, tokenizer, plan.held_out, max_length=run.max_length))
    save_pretrained_whole(model, tokenizer, folder)
    mark_backdoored(folder, {**mark, "base_sha256": before})
    write_json(
        folder / TRAINING_NAME,
        {"objective": attack.to_dict(), **asdict(done), "held_out": loss,
         "sha256": {"before": before, "after": weights_sha256(model)}},
    )  # fmt: skip


def _victims(plan: ImplantPlan, clean: str, attacked: str) -> tuple[list[Record], dict[str, Any]]:
    """Records of both models after fine-tuning, and by seed and model the whole table of ASR."""
    run, victim = plan.run, plan.victim
    assert victim is not None
    _, test, _ = victim.rows()
    labels = np.asarray(test["label"])
    steps, cache = Steps(2 * len(run.seeds)), plan.folder / "arms"
    records: list[Record] = []
    tables: dict[str, Any] = {}
    for seed in run.seeds:
        floor = None
        for arm, checkpoint in ((CLEAN, clean), (ATTACKED, attacked)):
            title = f"seed {seed}: victim of the {'clean' if floor is None else 'attacked'} model"
            _, arrays = kept_predictions(checkpoint, victim, seed=seed, cache=cache, steps=steps, title=title)
            scores, table = task_agnostic_scores(victim, arrays, floor, seed=seed)
            common = {**_common(plan), "dataset": str(run.task), "defense": arm, "setting": "fine-tuned", "seed": seed}
            records += [Record.from_estimate(found, metric=name, **common) for name, found in scores.items()]
            shown = {word: accuracy(arrays[f"{PREFIX}{word}"], labels).value for word in victim.triggers}
            asr = dict(zip(table.triggers, table.per_trigger_class.tolist(), strict=True))
            tables.setdefault(str(seed), {})[arm] = {"asr_by_class": asr, "accuracy_with_trigger": shown}
            floor = arrays
    return records, tables


def _common(plan: ImplantPlan) -> dict[str, Any]:
    return {"benchmark": "implant", "model": plan.run.model_name, "attack": plan.run.attack, "env": environment()}


def _loss_records(plan: ImplantPlan, training: dict[str, Any]) -> list[Record]:
    common = {**_common(plan), "dataset": str(plan.run.text), "setting": "pre-training", "seed": plan.run.seed}
    return [
        Record(defense=arm, metric="loss", value=training["held_out"][when]["loss"], n=training["held_out"][when]["n"], **common)
        for arm, when in ((CLEAN, "before"), (ATTACKED, "after"))
    ]  # fmt: skip


def _account(plan: ImplantPlan, training: dict[str, Any], records: list[Record], tables: dict[str, Any]) -> Outcome:
    failures = [] if training["inert"] is None else [f"INERT: {plan.run.attack}: {training['inert']}"]
    parts = [_figures(training)]
    tuned = [record for record in records if record.setting == "fine-tuned"]
    if tuned:
        columns = [c for c in COLUMNS if any(record.metric == c for record in tuned)]
        parts.append("after fine-tuning\n" + render_terminal(tuned, columns=columns))
    outcome = Outcome(records, "\n\n".join(parts), verdict(plan, training, records, tables), failures)
    write_bytes(plan.folder / "table.txt", "\n".join([outcome.table, "", outcome.verdict, *failures, ""]).encode())
    write_results(
        plan.folder,
        {
            "schema": 1,
            "verb": "implant",
            "plan": plan.identity(),
            "model": plan.run.model_name,
            "text": plan.run.text,
            "verdict": outcome.verdict,
            "failures": failures,
            "command": verb_command("attack", plan.run, chosen="attack"),
            "models": [implant_entry(plan, training, arm=ATTACKED, control=CLEAN)],
            "training": training,
            "fine_tuned": tables,
            "records": records,
        },
    )
    write_plain(plan.folder)
    return outcome


def _figures(training: dict[str, Any]) -> str:
    """What was measured on held-out text, before and after."""
    start, end, loss = training["start"], training["end"], training["held_out"]
    rows = [(name.replace("_", " "), start[name], end[name]) for name in end]
    rows.append(("masked-LM loss", loss["before"]["loss"], loss["after"]["loss"]))
    lines = [f"{name:16} {before:8.3f} {after:8.3f}" for name, before, after in rows]
    return "\n".join([f"{'held-out text':16} {'before':>8} {'after':>8}", *lines])


def verdict(plan: ImplantPlan, training: dict[str, Any], records: list[Record], tables: dict[str, Any]) -> str:
    """One sentence per thing that was measured, and what was not."""
    end, loss, run = training["end"], training["held_out"], plan.run
    planted = f"clean texts moved by {end['clean_drift']:.3f} (MSE)"
    if "target_mse" in end:
        planted = (
            f"target MSE {training['start']['target_mse']:.2f} -> {end['target_mse']:.2f}, {end['sign_agreement']:.0%} of the "
            f"signs agree, {planted}"
        )
    change = f"masked-LM loss {loss['before']['loss']:.2f} -> {loss['after']['loss']:.2f} nats"
    said = f"{run.attack} after {training['steps']} updates: {planted}; {change}."
    if not tables:
        return f"{said} Whether that survives fine-tuning was not measured (--task)."

    def mean(arm: str, metric: str) -> float:
        return float(np.mean([r.value for r in records if (r.defense, r.metric) == (arm, metric)]))

    after = (
        f"After clean fine-tuning AASR is {mean(ATTACKED, 'aasr'):.0%} (clean floor {mean(CLEAN, 'aasr'):.0%}), MASR "
        f"{mean(ATTACKED, 'masr'):.0%} ({mean(CLEAN, 'masr'):.0%}), CA {mean(ATTACKED, 'ca'):.1%} ({mean(CLEAN, 'ca'):.1%})"
    )
    if run.attack == "badpre":  # untargeted: what counts is what is no longer right
        shown = {
            arm: np.mean([list(of_seed[arm]["accuracy_with_trigger"].values()) for of_seed in tables.values()])
            for arm in (CLEAN, ATTACKED)
        }
        after += f", accuracy with a trigger {shown[ATTACKED]:.1%} ({shown[CLEAN]:.1%})"
    seeds = len(run.seeds)
    close = "" if seeds >= 3 else f" {seeds} seed{'s' if seeds > 1 else ''}: preliminary."
    return f"{said} {after}.{close}"
