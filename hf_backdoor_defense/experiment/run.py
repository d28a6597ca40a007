"""A run: every arm for every seed, one results file, one verdict. The same call continues a stopped run."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.experiment.arguments import only_observes
from hf_backdoor_defense.experiment.arms import SeedData, train_arm
from hf_backdoor_defense.experiment.behind import Behind, stand_before
from hf_backdoor_defense.experiment.kinds import TEXT
from hf_backdoor_defense.experiment.plan import PLAN_NAME, Plan, poison
from hf_backdoor_defense.experiment.purified import Purified, purify_undefended
from hf_backdoor_defense.experiment.summary import Outcome, rankings, records_of, summarize_run, write_outcome
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.registry import objective_class
from hf_backdoor_defense.reporting.results import write_json

CURVE_ROWS = 100


def execute(plan: Plan) -> Outcome:
    """Run every arm of every seed that is not finished, then write results, suspects and plots."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN_NAME, plan.identity())
    results: dict[int, dict[str, dict[str, Any]]] = {}
    between: dict[int, dict[str, list[dict[str, Any]]]] = {}
    suspects: list[dict[str, Any]] = []
    planted: dict[int, set[int]] = {}
    behind: Behind = {}
    purified: Purified = {}
    for seed in plan.run.seeds:
        data = seed_data(plan, seed)
        if data.poisoned is not None:
            rows = data.poisoned.dataset
            flags = np.asarray(rows["is_poisoned"])
            planted[seed] = set(np.asarray(rows["row_id"])[flags].tolist())
        results[seed], between[seed], found = _run_seed(plan, data)
        suspects += found
        if plan.run.filters:
            behind[seed] = _filters(plan, seed)
        if plan.purification is not None:
            purified[seed] = _purify(plan, seed, plan.purification.methods)
        if not plan.run.save_models:
            shutil.rmtree(_base(plan, seed), ignore_errors=True)
    records = records_of(plan, results, between, planted, _baselines(plan), behind, purified)
    outcome = summarize_run(plan, results, between, records, behind, purified)
    write_outcome(plan, outcome, results, between, suspects, planted, behind, purified)
    return outcome


def _run_seed(
    plan: Plan, data: SeedData
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Results by arm, the trainings in between by method, and the suspects."""
    run = plan.run
    observers = [objective for objective in plan.defenses if only_observes(objective)]
    by_name = {objective.name: objective for objective in plan.defenses}
    results: dict[str, dict[str, Any]] = {}
    recorded: dict[str, Objective] = {}
    between: dict[str, list[dict[str, Any]]] = {}
    suspects: list[dict[str, Any]] = []
    total, before = _steps(plan, data.seed)
    for number, arm in enumerate(plan.arms, start=1 + before):
        keep = run.save_models if run.simulate else arm in by_name or not by_name
        options: dict[str, Any] = {
            "arm": arm,
            "title": f"[{number}/{total}] {arm}, seed {data.seed}",
            "folder": plan.folder / "arms" / f"seed-{data.seed}" / arm,
            "keep_model": plan.folder / "models" / f"seed-{data.seed}" / arm if keep else None,
        }
        if arm == "undefended" and (run.filters or plan.purification is not None):
            options["keep_model"] = _base(plan, data.seed)
        if arm == "clean_reference":
            options["clean"] = True
        elif arm == "undefended":
            options["objectives"] = [dataclasses.replace(objective) for objective in observers]
        elif arm == "matched_decay":
            pull = results["dece"]["objectives"]["dece"]["pull_per_epoch"]
            options["objectives"] = [objective_class(arm)(pull=pull)]  # type: ignore[call-arg]
        elif arm in recorded:
            options["without"], between[arm] = _filtered(plan, data, recorded[arm], options)
        else:
            options["objectives"] = [dataclasses.replace(by_name[arm])]
        results[arm], objectives = train_arm(run, plan.training, data, **options)
        if arm == "undefended":
            recorded = {objective.name: objective for objective in objectives if objective.ranking() is not None}
        elif arm in recorded:
            suspects += _suspects(rankings(results, between)[arm], data)
    return results, between, suspects


def _steps(plan: Plan, seed: int) -> tuple[int, int]:
    """How many arms, filters and purifications there are in all, and how many of them come before a seed's."""
    methods = [] if plan.purification is None else plan.purification.methods
    of_seed = len(plan.arms) + len(plan.run.filters) + len(methods)
    return of_seed * len(plan.run.seeds), of_seed * plan.run.seeds.index(seed)


def _base(plan: Plan, seed: int) -> Path:
    """Where the undefended model is for filters and purifiers: with the other models where they are kept, else for a while."""
    kept = plan.folder / "models" / f"seed-{seed}" / "undefended"
    return kept if plan.run.save_models else plan.folder / "arms" / f"seed-{seed}" / "undefended" / "model"


def _filters(plan: Plan, seed: int) -> dict[str, dict[str, Any]]:
    """Every filter before the undefended model of one seed."""
    base, (total, before) = _base(plan, seed), _steps(plan, seed)
    return {
        name: stand_before(
            plan,
            seed,
            name=name,
            base=base,
            folder=plan.folder / "arms" / f"seed-{seed}" / "undefended" / name,
            title=f"[{number}/{total}] {name} before undefended, seed {seed}",
        )
        for number, name in enumerate(plan.run.filters, start=1 + before + len(plan.arms))
    }


def _purify(plan: Plan, seed: int, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Plain fine-tuning and every purifier on the undefended model of one seed."""
    base, (total, before) = _base(plan, seed), _steps(plan, seed)
    return {
        name: purify_undefended(
            plan,
            seed,
            name=name,
            base=base,
            folder=plan.folder / "arms" / f"seed-{seed}" / "undefended" / "purified" / name,
            title=f"[{number}/{total}] {name} on undefended, seed {seed}",
        )
        for number, name in enumerate(methods, start=1 + before + len(plan.arms) + len(plan.run.filters))
    }


def _filtered(
    plan: Plan, data: SeedData, method: Objective, options: dict[str, Any]
) -> tuple[frozenset[int], list[dict[str, Any]]]:
    """Which rows the final refit leaves out, after the trainings in between that the method asks for."""
    between: list[dict[str, Any]] = []
    while (follow := method.refit()) is not None:
        ranking = method.ranking()
        assert ranking is not None
        number = len(between) + 1
        result, (method,) = train_arm(
            plan.run,
            plan.training,
            data,
            arm=f"{options['arm']}, ranking again",
            title=f"{options['title']}: ranking again, round {number}",
            folder=options["folder"] / f"round-{number}",
            objectives=[follow],
            without=ranking.dropped,
            aux={"rows": data.train},
            evaluate=False,
        )
        between.append(result)
    ranking = method.ranking()
    assert ranking is not None
    return ranking.dropped, between


def _suspects(ranking: dict[str, Any], data: SeedData) -> list[dict[str, Any]]:
    """The rows a user should look at: all that the refit leaves out, and as many again. Says nothing about planted rows."""
    dropped = set(ranking["dropped"])
    labels = dict(zip(data.train["row_id"], data.train["label"], strict=True))
    count = max(2 * len(dropped), 50)
    rows = []
    for rank, (row_id, score) in enumerate(zip(ranking["row_ids"], ranking["scores"], strict=True), start=1):
        if rank > count and row_id not in dropped:
            continue
        rows.append(
            {
                "seed": data.seed,
                "rank": rank,
                "row_id": row_id,
                "score": score,
                "dropped": row_id in dropped,
                "label": data.label_names[labels[row_id]],
                **({"text": data.texts[row_id]} if row_id in data.texts else {}),
                **{name: values[rank - 1] for name, values in ranking["columns"].items()},
            }
        )
    return rows


def seed_data(plan: Plan, seed: int) -> SeedData:
    """Everything one seed trains and measures on: poisoned by that seed, texts tokenized."""
    run, trigger = plan.run, plan.run.get_trigger()

    def made(rows: Dataset) -> Dataset:
        return plan.kind.rows(plan.processor, rows, max_length=run.max_length)

    train, validation, judged = (plan.data[split] for split in ("train", "validation", run.eval_split))
    poisoned = poison(run, train, seed)
    rows = train if poisoned is None else poisoned.dataset
    few = validation.shuffle(seed=0, keep_in_memory=True).select(range(min(CURVE_ROWS, len(validation))))
    triggered = curve_triggered = None
    if trigger is not None:
        options: dict[str, Any] = {"target": run.target, "seed": seed}
        triggered = made(trigger_dataset(judged, trigger, **options))
        curve_triggered = made(trigger_dataset(few, trigger, **options))
    return SeedData(
        seed=seed,
        label_names=train.features["label"].names,
        clean=made(train),
        train=made(rows),
        test=made(judged),
        triggered=triggered,
        curve=made(few),
        curve_triggered=curve_triggered,
        poisoned=poisoned,
        texts=dict(zip(rows["row_id"], rows["text"], strict=True)) if plan.kind is TEXT else {},
        kind=plan.kind,
    )


def _baselines(plan: Plan) -> dict[str, tuple[int, int]]:
    if not plan.run.baselines:
        return {}
    judged = DatasetDict({**plan.data, "test": plan.data[plan.run.eval_split]})
    return plan.kind.baselines(judged)
