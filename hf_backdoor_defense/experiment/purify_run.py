"""A purification, run: the method, the control, what each does with clean and with triggered rows. The same call continues it.

| step | leaves |
|---|---|
| the method | `checkpoints/METHOD`: the last epoch's, while it runs; `model/`: with processor, `defense.json`, `training.json` |
| plain fine-tuning, the control | `arms/fine_tuning/result.json` |
| the model as it was given, a clean reference | `arms/ARM/result.json` |
| account | `results.json`, `table.txt`, `report.html` |

The method comes first: where it cannot be done (an unlearning that diverges, scores that say nothing) nothing is left behind.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_backdoor_defense.classifiers import Classifier
from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor
from hf_backdoor_defense.experiment.attack_models import TRAINING_NAME
from hf_backdoor_defense.experiment.plan import PLAN_NAME
from hf_backdoor_defense.experiment.purify import save_purified, suspected
from hf_backdoor_defense.experiment.purify_account import account, finished
from hf_backdoor_defense.experiment.purify_plan import PurifyPlan
from hf_backdoor_defense.experiment.purify_training import FINE_TUNING, purifying_trainer, run_training
from hf_backdoor_defense.experiment.steps import kept_folder
from hf_backdoor_defense.experiment.summary import Outcome
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.reporting.results import write_json

RESULTS_NAME, RESULT_NAME = "results.json", "result.json"


def execute(plan: PurifyPlan) -> Outcome:
    """Do what is not done yet, then write results, table and report. A finished run is only read.

    Raises:
        ValueError, FloatingPointError: the method cannot go through with it; a folder that was new is gone again.
    """
    if (plan.folder / RESULTS_NAME).is_file():
        print("finished before: nothing was changed", flush=True)
        return finished(plan.folder)
    is_new = not plan.folder.exists() or not any(plan.folder.iterdir())
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN_NAME, plan.identity())
    if plan.classifier.attacked is not None:  # what a stopped run leaves is marked too
        mark_backdoored(plan.folder, plan.classifier.attacked)
    for rest in plan.folder.glob(".model.*"):
        shutil.rmtree(rest)
    try:
        folder = kept_folder(plan.folder / "model", lambda partial: _purify(plan, partial))
    except (ValueError, FloatingPointError):
        if is_new:
            shutil.rmtree(plan.folder)
        raise
    arms = {plan.method: json.loads((folder / TRAINING_NAME).read_text())}
    if plan.run.has_control:
        arms[FINE_TUNING] = _kept(plan, FINE_TUNING, lambda: _train(plan, None)[0])
    arms["undefended"] = _kept(plan, "undefended", lambda: _given(plan, plan.classifier))
    reference = plan.reference
    if reference is not None:
        arms["clean_reference"] = _kept(plan, "clean_reference", lambda: _given(plan, reference))
    shutil.rmtree(plan.folder / "checkpoints", ignore_errors=True)
    return account(plan, arms)


def _purify(plan: PurifyPlan, folder: Path) -> None:
    """Train the method, and fill `folder` with the purified model and what was measured."""
    objective = None if plan.objective is None else replace(plan.objective)
    training, classifier = _train(plan, objective)
    save_purified(
        classifier.model, classifier.processor, objective, folder, attacked=plan.classifier.attacked, method=plan.method
    )
    write_json(folder / TRAINING_NAME, training)


def _train(plan: PurifyPlan, objective: Objective | None) -> tuple[dict[str, Any], Classifier]:
    """One training on a copy of the model, and its scores."""
    run, name = plan.run, FINE_TUNING if objective is None else objective.name
    _say(name)
    classifier = replace(plan.classifier, model=copy.deepcopy(plan.classifier.model))
    folder = plan.folder / "checkpoints" / name
    trainer = purifying_trainer(
        classifier, classifier.rows(plan.clean, max_length=run.max_length), objective, settings=plan.settings, seed=run.seed,
        folder=folder, title=None if run.disable_tqdm else name,
    )  # fmt: skip
    training = run_training(trainer, folder)
    return {
        "rows": len(plan.clean),
        **training,
        "suspected_classes": suspected(training["evidence"], classifier.labels),
        "sha256": {"before": plan.hashes["weights"], "after": weights_sha256(classifier.model)},
        "scores": _scores(plan, classifier),
    }, classifier


def _given(plan: PurifyPlan, classifier: Classifier) -> dict[str, Any]:
    """What a model does as it is."""
    classifier.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return {"scores": _scores(plan, classifier)}


def _scores(plan: PurifyPlan, classifier: Classifier) -> dict[str, Any]:
    """Accuracy on rows that were held out; with a simulated trigger, attack success and recovered accuracy."""
    run = plan.run
    scores = evaluate_backdoor(
        classifier.model,
        classifier.rows(plan.test, max_length=run.max_length),
        None if plan.triggered is None else classifier.rows(plan.triggered, max_length=run.max_length),
        target=plan.target,
        collate=classifier.collator(),
        progress=not run.disable_tqdm,
    )
    return {name: None if value is None else asdict(value) for name, value in vars(scores).items()}


def _kept(plan: PurifyPlan, arm: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """An arm's result: read where it is there, else made and written."""
    path = plan.folder / "arms" / arm / RESULT_NAME
    if path.is_file():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    path.parent.mkdir(parents=True, exist_ok=True)
    if arm != FINE_TUNING:
        _say(f"measure {arm}")
    result = make()
    write_json(path, result)
    return result


def _say(what: str) -> None:
    print(f"- {what}", flush=True)
