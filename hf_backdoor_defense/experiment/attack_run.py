"""`hfbd attack`, run: for every seed the bases, the victims, the filters before them. The same call continues a stopped run.

Two records of attack success: of the base as released, and of each victim after clean fine-tuning. `clean_reference` is the same
strategy on the clean base; what it gives to the target (FTR) is the floor.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hf_backdoor_defense.experiment.attack_filters import BASE_LEVEL, filter_step
from hf_backdoor_defense.experiment.attack_models import (
    TRAINING_NAME,
    base_folder,
    load_base,
    load_victim,
    text_length,
    victim_folder,
)
from hf_backdoor_defense.experiment.attack_plan import AttackPlan
from hf_backdoor_defense.experiment.attack_summary import AttackOutcome, summarize_attack
from hf_backdoor_defense.experiment.plan import PLAN_NAME
from hf_backdoor_defense.experiment.steps import Result, Steps
from hf_backdoor_defense.models import text_logits
from hf_backdoor_defense.reporting.results import write_json

KINDS = ("poisoned", "clean")
Results = dict[
    tuple[str, ...], Result
]  # ("poisoned", "lora"), ("poisoned", "lora", "strip"), ("clean", "base", "psim"), …


def execute(plan: AttackPlan) -> AttackOutcome:
    """Do every step that is not done yet, then write results and table."""
    places = {plan.shared: plan.clean_identity(), plan.folder: plan.identity()}  # one, where they are the same
    for folder, identity in places.items():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN_NAME, identity)
    steps = Steps(len(plan.run.seeds) * _count(plan))
    results = {seed: _run_seed(plan, seed, steps) for seed in plan.run.seeds}
    outcome = summarize_attack(plan, results)
    if not plan.run.save_models:
        shutil.rmtree(plan.folder / "models", ignore_errors=True)
    return outcome


def _count(plan: AttackPlan) -> int:
    strategies, filters = len(plan.run.strategies), plan.run.filters
    return len(KINDS) * (1 + strategies) + sum(len(KINDS) if name in BASE_LEVEL else strategies for name in filters)


def _run_seed(plan: AttackPlan, seed: int, steps: Steps) -> Results:
    results: Results = {}
    arms = plan.folder / "arms" / f"seed-{seed}"
    for kind in KINDS:
        results[kind, "base"] = steps.kept(
            arms / f"{kind}_base", f"seed {seed}: {kind} base", partial(_measure_base, plan, seed, kind)
        )
        for strategy in plan.run.strategies:
            results[kind, strategy] = steps.kept(
                arms / f"{kind}_{strategy}",
                f"seed {seed}: {strategy} on the {kind} base",
                partial(_measure_victim, plan, seed, kind, strategy),
            )
        for name in plan.run.filters:
            # What looks at the base alone is also asked on the clean base: there it must flag no more than it may.
            behind = ["base"] if name in BASE_LEVEL else plan.run.strategies if kind == "poisoned" else []
            for arm in behind:
                place = f"onion-{plan.described['language_model'][:16]}" if name == "onion" else name
                results[kind, arm, name] = steps.kept(
                    arms / f"{kind}_{arm}" / place,
                    f"seed {seed}: {name} before the {kind} base{'' if arm == 'base' else f', {arm}'}",
                    partial(filter_step, plan, seed, kind, arm, name),
                )
    return results


def _measure_base(plan: AttackPlan, seed: int, kind: str) -> Result:
    folder = base_folder(plan, seed, kind)
    return _measure(plan, *load_base(plan, folder), folder)


def _measure_victim(plan: AttackPlan, seed: int, kind: str, strategy: str) -> Result:
    folder = victim_folder(plan, seed, kind, strategy)
    return _measure(plan, *load_victim(plan, seed, kind, strategy), folder)


def _measure(plan: AttackPlan, model: Any, tokenizer: Any, folder: Path) -> Result:
    """Predictions and logits for test and triggered rows."""
    length = text_length(plan, model)
    arrays: dict[str, np.ndarray] = {}
    for name, rows in (("test", plan.test), ("triggered", plan.triggered)):
        bar = None if plan.run.disable_tqdm else f"predicting {name}"
        logits = text_logits(model, tokenizer, list(rows["text"]), max_length=length, progress=bar)
        arrays[name] = logits.argmax(-1).numpy()
        arrays[f"{name}_logits"] = logits.numpy()
    return json.loads((folder / TRAINING_NAME).read_text()), arrays
