"""The undefended model as a stranger's checkpoint: purified with clean rows that it never saw, beside plain fine-tuning.

As with filters (`behind.py`) the weights are untrusted and the rows are one's own; here the model is changed. Who gets which
rows, and what was checked before: `purify_stage.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.classifiers import load_trained
from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor
from hf_backdoor_defense.evaluation.metrics import defense_effectiveness_rate
from hf_backdoor_defense.experiment.attack_models import silent
from hf_backdoor_defense.experiment.purify import save_purified, suspected
from hf_backdoor_defense.experiment.purify_training import (
    FINE_TUNING,
    build_purifier,
    purifying_trainer,
    run_training,
)
from hf_backdoor_defense.functional.row_scores import DegenerateScoreError
from hf_backdoor_defense.reporting.results import Record, write_json

NOTABLE = 0.03  # as in summary.py: beyond this a difference is called one
Purified = dict[int, dict[str, dict[str, Any]]]  # seed -> method -> result.json


def purify_undefended(plan: Any, seed: int, *, name: str, base: Path, folder: Path, title: str) -> dict[str, Any]:
    """One method on the saved undefended model of one seed, or what an earlier call measured.

    Returns:
        `usable`; if False the `reason`; else what the training was and what the method found, the classes it suspects by name,
        and `ca`, `asr`, `r_acc`.
    """
    done = folder / "result.json"
    if done.is_file():
        print(f"{title}: finished before, kept")
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    print(title, flush=True)
    run, stage = plan.run, plan.purification
    judged = plan.data[run.eval_split]
    triggered = trigger_dataset(judged, run.get_trigger(), target=run.target, seed=seed)
    with silent():
        classifier = load_trained(str(base))
    objective = build_purifier(name)

    def made(rows: Dataset) -> Dataset:
        return classifier.rows(rows, max_length=run.max_length)

    clean = stage.rows(seed)
    trainer = purifying_trainer(
        classifier, made(clean), objective, settings=stage.settings, seed=seed, folder=folder, checkpoints=False,
        title=None if plan.training.disable_tqdm else name,
    )  # fmt: skip
    result: dict[str, Any] = {"usable": True, "seed": seed, "rows": len(clean)}
    try:
        result |= run_training(trainer, folder)
    except (DegenerateScoreError, FloatingPointError) as error:  # what was found, or how it diverged, is no bad input
        result |= {"usable": False, "reason": str(error)}
        write_json(done, result)
        return result
    scores = evaluate_backdoor(
        classifier.model,
        made(judged),
        made(triggered),
        target=run.target,
        collate=classifier.collator(),
        progress=not plan.training.disable_tqdm,
    )
    result |= {metric: None if value is None else asdict(value) for metric, value in vars(scores).items()}
    result["suspected_classes"] = suspected(result["evidence"], classifier.labels)
    if run.save_models:
        save_purified(
            classifier.model, classifier.processor, objective, plan.folder / "models" / f"seed-{seed}" / name,
            attacked=classifier.attacked, method=name,
        )  # fmt: skip
    write_json(done, result)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def purify_records(
    purified: Purified, undefended: Mapping[int, dict[str, Any]], common: dict[str, Any]
) -> list[Record]:
    """A record per figure; a method that failed has none.

    Args:
        undefended: that arm's result by seed. common: the fields that all records of a run share.
    """
    records = []
    for seed, methods in purified.items():
        base = undefended[seed]
        for name, result in methods.items():
            if not result["usable"]:
                continue
            of_method: dict[str, Any] = {"seed": seed, "defense": name, **common}
            records += [Record(metric=metric, **result[metric], **of_method) for metric in ("ca", "asr", "r_acc")]
            rate = defense_effectiveness_rate(
                ca_before=base["ca"]["value"], ca_after=result["ca"]["value"],
                asr_before=base["asr"]["value"], asr_after=result["asr"]["value"],
            )  # fmt: skip
            records.append(Record(metric="der", value=rate, **of_method))
            if result["seconds"] is not None:
                records.append(Record(metric="seconds", value=result["seconds"], **of_method))
    return records


def purify_failures(purified: Purified) -> list[str]:
    """Why a method cannot have worked: a run with it is not passed."""
    reasons = {
        (name, seed): result.get("inert") if result["usable"] else result["reason"]
        for seed, methods in purified.items()
        for name, result in methods.items()
    }
    return [
        f"{'INERT' if purified[seed][name]['usable'] else 'FAILED'}: {name}, seed {seed}: {reason}"
        for (name, seed), reason in reasons.items()
        if reason
    ]


def purify_verdict(purified: Purified, *, attacked: float, floor: float) -> str:
    """What purifying did beside plain fine-tuning; empty where nothing could be used.

    Args:
        attacked, floor: ASR of the undefended model and of the clean reference, means over seeds.
    """
    found: dict[str, dict[str, float]] = {}
    for name in next(iter(purified.values()), {}):
        usable = [methods[name] for methods in purified.values() if methods[name]["usable"]]
        if usable:
            found[name] = {m: float(np.mean([r[m]["value"] for r in usable])) for m in ("asr", "ca", "r_acc")}
    if not found:
        return ""
    rows = next(iter(purified.values()))[next(iter(found))]["rows"]
    parts = [f"{name} ASR {m['asr']:.2f}, CA {m['ca']:.2f}, R-Acc {m['r_acc']:.2f}" for name, m in found.items()]
    said = (
        f"Taken as a stranger's checkpoint and purified with {rows} clean rows of one's own, the undefended model "
        f"(ASR {attacked:.2f}) becomes: {'; '.join(parts)}."
    )
    control = found.get(FINE_TUNING)
    if control is None or len(found) == 1:
        return said
    if control["asr"] <= floor + NOTABLE:
        return f"{said} Plain fine-tuning removed the backdoor as well, so this run shows no merit of the methods beyond it."
    same = [n for n, m in found.items() if n != FINE_TUNING and m["asr"] > control["asr"] - NOTABLE]
    return said + (f" {', '.join(same)} did no more than plain fine-tuning." if same else "")


def purified_brief(purified: Purified) -> dict[str, dict[str, dict[str, Any]]]:
    """For `results.json`."""
    return {str(seed): dict(methods) for seed, methods in purified.items()}
