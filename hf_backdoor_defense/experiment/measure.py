"""Measure a finished model, with a clean reference beside it where one is given."""

from pathlib import Path
from typing import Any

import torch

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.kinds import find_kind
from hf_backdoor_defense.reporting.results import Record, environment, write_json
from hf_backdoor_defense.reporting.tables import render_terminal


def measure(
    *,
    model: str | None,
    task: str | None,
    kind: str | None = None,
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
    limit: int | None = None,
    max_length: int = 128,
    batch_size: int = 64,
    simulate: str | None = None,
    trigger: str | None = None,
    target: int = 0,
    seed: int = 0,
    clean_reference: str | None = None,
    max_asr_over_floor: float | None = None,
    max_ca_drop: float | None = None,
    output: str | None = None,
) -> tuple[str, list[str]]:
    """The table and the gates that failed.

    Raises:
        ValueError: no model or task, a gate without the reference it compares with, a head of another size than the
            task, a target that does not exist, a trigger that does not fit.
    """
    if not model or not task:
        raise ValueError("hfbd eval needs --model (a finished classifier) and --task (labeled texts or images).")
    if (max_asr_over_floor is not None or max_ca_drop is not None) and clean_reference is None:
        raise ValueError("The gates compare with a model known to be clean: give it as --clean_reference.")
    if max_asr_over_floor is not None and simulate is None:
        raise ValueError("`max_asr_over_floor` needs a trigger: add --simulate badnets.")
    run = RunArguments(
        task=task, model_name=model, kind=kind, simulate=simulate, trigger=trigger, max_length=max_length,
        text_column=text_column, image_column=image_column, label_column=label_column,
    )  # fmt: skip
    chosen = run.get_trigger()
    run.check_kind()
    found = find_kind(model, chosen=kind)
    data = found.load(run, limit=limit)
    classes = data["train"].features["label"].num_classes
    if chosen is not None and not 0 <= target < classes:
        raise ValueError(f"`target` must be one of the classes 0..{classes - 1}, got {target}.")
    test = data["test"]
    triggered = None if chosen is None else trigger_dataset(test, chosen, target=target, seed=seed)
    scores: dict[str, BackdoorScores] = {}
    names = {"model": model} if clean_reference is None else {"clean_reference": clean_reference, "model": model}
    for name, place in names.items():
        network, processor = found.finished(place, num_labels=classes)
        if chosen is not None:
            found.check_trigger(chosen, processor, max_length=max_length)
        network.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        scores[name] = evaluate_backdoor(
            network,
            found.rows(processor, test, max_length=max_length),
            None if triggered is None else found.rows(processor, triggered, max_length=max_length),
            target=target,
            collate=found.collator(processor, network.config),
            batch_size=batch_size,
            progress=True,
        )
    records = _records(scores, task, model, simulate, seed)
    if output is not None:
        write_json(Path(output), {"schema": 1, "records": records})
    return render_terminal(records), _failures(scores, max_asr_over_floor, max_ca_drop)


def _records(scores: dict[str, BackdoorScores], task: str, model: str, simulate: str | None, seed: int) -> list[Record]:
    common: dict[str, Any] = {
        "benchmark": "eval",
        "dataset": task,
        "model": model,
        "attack": simulate or "none",
        "setting": "",
        "seed": seed,
        "env": environment(),
    }
    records = []
    for name, of_model in scores.items():
        asr = "ftr" if name == "clean_reference" else "asr"
        for metric, estimate in (("ca", of_model.ca), (asr, of_model.asr), ("r_acc", of_model.r_acc)):
            if estimate is not None:
                records.append(Record.from_estimate(estimate, defense=name, metric=metric, **common))
    return records


def _failures(scores: dict[str, BackdoorScores], max_over: float | None, max_drop: float | None) -> list[str]:
    reference, own = scores.get("clean_reference"), scores["model"]
    failures: list[str] = []
    if reference is None:
        return failures
    if max_over is not None and own.asr is not None and reference.asr is not None:
        over = own.asr.value - reference.asr.value
        if over > max_over:
            failures.append(f"GATE: ASR {over:+.3f} above the floor, allowed is {max_over:g}")
    if max_drop is not None and own.ca is not None and reference.ca is not None:
        drop = reference.ca.value - own.ca.value
        if drop > max_drop:
            failures.append(f"GATE: {drop:.3f} less clean accuracy than the reference, allowed is {max_drop:g}")
    return failures
