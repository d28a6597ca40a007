"""A run: every arm for every seed, one results file, one verdict. The same call continues a stopped run."""

import copy
import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from hf_backdoor_defense.attacks.poisoning import (
    Poisoned,
    check_trigger_fits,
    count_visible,
    poison_dataset,
    trigger_dataset,
)
from hf_backdoor_defense.data.sources import baselines, describe, load
from hf_backdoor_defense.experiment.arguments import RunArguments, only_observes
from hf_backdoor_defense.experiment.arms import SeedData, train_arm
from hf_backdoor_defense.experiment.summary import Outcome, rankings, records_of, summarize_run, write_outcome
from hf_backdoor_defense.models import load_classifier
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.registry import objective_class
from hf_backdoor_defense.reporting.results import write_json
from hf_backdoor_defense.trainers.hosts import DefendedTrainer

PLAN_NAME = "plan.json"
CURVE_ROWS = 100
# Where a run is put and how it is shown: none of it changes a number.
_NOT_IDENTITY = {
    "output_dir", "run_name", "logging_dir", "report_to", "disable_tqdm", "dry_run", "max_asr_over_floor",
    "max_ca_drop", "hub_token", "push_to_hub", "seed", "baselines",
}  # fmt: skip


@dataclass
class Plan:
    """A run whose inputs were checked: data loaded, model loadable, trigger fitting, nothing written yet."""

    run: RunArguments
    training: TrainingArguments
    defenses: list[Objective]
    data: DatasetDict
    described: dict[str, Any]
    parameters: tuple[int, int]  # trainable, all
    planted: dict[str, int]  # of the first seed: requested, carrying, visible after truncation
    tokenizer: Any

    @property
    def folder(self) -> Path:
        return Path(str(self.training.output_dir))

    @property
    def arms(self) -> list[str]:
        """In the order of running. The undefended arm also carries the methods that only record."""
        names = [objective.name for objective in self.defenses]
        simulated = self.run.simulate is not None
        arms = ["clean_reference"] if simulated else []
        if simulated or self.run.max_ca_drop is not None or any(map(only_observes, self.defenses)) or not names:
            arms.append("undefended")
        for name in names:
            arms += [name, "matched_decay"] if name == "dece" and simulated else [name]
        return arms

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: everything that changes a number."""
        training = {k: v for k, v in self.training.to_dict().items() if k not in _NOT_IDENTITY and "token" not in k}
        run = {k: v for k, v in dataclasses.asdict(self.run).items() if k not in _NOT_IDENTITY}
        return json.loads(
            json.dumps(
                {
                    "run": run,
                    "training": training,
                    "defenses": [objective.to_dict() for objective in self.defenses],
                    "data": self.described,
                },
                default=str,
            )
        )

    def text(self) -> str:
        """The plan for people."""
        run, args, rows = self.run, self.training, self.described["rows"]
        steps = -(-rows["train"] // (args.train_batch_size * args.gradient_accumulation_steps))
        trainable, total = self.parameters
        lines = [
            ("task", f"{run.task}: {rows['train']} train, {rows['validation']} validation, {rows['test']} test rows"),
            ("classes", ", ".join(self.data["train"].features["label"].names)),
            ("model", f"{run.model_name}: {trainable / 1e6:.1f} of {total / 1e6:.1f} M parameters trained"
                      f", texts cut at {run.max_length} tokens"),
            ("training", f"{args.num_train_epochs:g} epochs of {steps} steps, batch {args.train_batch_size}"
                         f" x {args.gradient_accumulation_steps}, rate {args.learning_rate:g}"),
            ("attack", self._attack_text()),
            ("arms", ", ".join(self.arms)),
            ("seeds", " ".join(map(str, run.seeds))),
            *[(f"  {o.name}", ", ".join(f"{k}={v}" for k, v in o.to_dict().items() if k != "name")) for o in self.defenses],
            ("run folder", str(self.folder)),
        ]  # fmt: skip
        return "\n".join(f"{name:12} {value}" for name, value in lines)

    def _attack_text(self) -> str:
        run = self.run
        trigger = run.get_trigger()
        if trigger is None:
            return "none simulated"
        kind = "clean-label" if run.clean_label else "dirty-label"
        name = self.data["train"].features["label"].names[run.target]
        return (
            f"{kind} {run.simulate} {trigger.text!r} -> {name} ({run.target}), {run.poison_rate:.2%} = "
            f"{self.planted['requested']} rows, {self.planted['visible']} of them still show it at {run.max_length} tokens"
        )


def resolve(run: RunArguments, training: TrainingArguments, defenses: list[Objective]) -> Plan:
    """Check everything that can be checked before training. Raises ValueError; writes nothing."""
    run.check(defenses)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "hfbd train runs its arms in one process, and was started in several. For several processes use the trainer "
            "classes in your own script under `accelerate launch`."
        )
    if training.push_to_hub:
        raise ValueError(
            "`push_to_hub` is set: a run trains models on poisoned data on purpose and publishes none. Remove it, and push "
            "the model you want from the run folder's `models`."
        )
    if str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no" or training.load_best_model_at_end:
        raise ValueError(
            "`eval_strategy` and `load_best_model_at_end` have nothing to choose by: a run measures every epoch and the end "
            "by itself, and picks no checkpoint. Remove them."
        )
    if training.seed != TrainingArguments().seed:
        raise ValueError(f"`seed` is {training.seed}, but a run takes its seeds from `seeds`: --seeds {training.seed}.")
    if training.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` is {training.label_smoothing_factor}: the arms must not differ in their loss, and DeCE "
            "smooths by its own field. Set it to 0 and use --defense.label_smoothing."
        )
    data = load(str(run.task), text_column=run.text_column, label_column=run.label_column, limit=run.limit)
    names = data["train"].features["label"].names
    model, tokenizer = load_classifier(
        run.model_name,
        num_labels=len(names),
        label_names=names,
        num_layers=run.num_layers,
        frozen_layers=run.frozen_layers,
    )
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of `{run.model_name}` has no padding token: texts of unequal length cannot be batched. Set one "
            "(tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer with the model."
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and run.max_length > longest:
        raise ValueError(f"`max_length` is {run.max_length}, the model reads at most {longest} tokens. Lower it.")
    parameters = (
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    )
    planted = {}
    trigger = run.get_trigger()
    if trigger is not None:
        if not 0 <= run.target < len(names):
            raise ValueError(
                f"`target` must be one of the classes 0..{len(names) - 1} ({', '.join(names)}), got {run.target}."
            )
        check_trigger_fits(trigger, tokenizer, run.max_length)
        for seed in reversed(run.seeds):
            poisoned = _poison(run, data["train"], seed)
        planted = _planted(poisoned, tokenizer, run.max_length)
    _check_hosting(model, training, defenses, data["train"])
    described = {**describe(data), "weights": _fingerprint(model)}
    plan = Plan(run, training, defenses, data, described, parameters, planted, tokenizer)
    _check_folder(plan)
    return plan


def _check_hosting(model: Any, training: TrainingArguments, defenses: list[Objective], rows: Dataset) -> None:
    """Every reason why a defense cannot be hosted, now and not after the arms before it were trained."""
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(training)
        args.output_dir = folder
        reasons = []
        for defense in [None, *map(dataclasses.replace, defenses)]:
            trainer = DefendedTrainer(model, args=args, train_dataset=rows, defense=defense)
            reasons += [reason for reason in trainer.reasons() if reason not in reasons]
    if reasons:
        raise ValueError("This run cannot be trained:\n" + "\n".join(f"- {reason}" for reason in reasons))


def _fingerprint(model: Any) -> str:
    """SHA-256 over all weights: a run folder belongs to them, not to a path."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def execute(plan: Plan) -> Outcome:
    """Run every arm of every seed that is not finished, then write results, suspects and plots."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN_NAME, plan.identity())
    results: dict[int, dict[str, dict[str, Any]]] = {}
    between: dict[int, dict[str, list[dict[str, Any]]]] = {}
    suspects: list[dict[str, Any]] = []
    planted: dict[int, set[int]] = {}
    for seed in plan.run.seeds:
        data = seed_data(plan, seed)
        if data.poisoned is not None:
            rows = data.poisoned.dataset
            flags = np.asarray(rows["is_poisoned"])
            planted[seed] = set(np.asarray(rows["row_id"])[flags].tolist())
        results[seed], between[seed], found = _run_seed(plan, data)
        suspects += found
    records = records_of(plan, results, between, planted, _baselines(plan))
    outcome = summarize_run(plan, results, between, records)
    write_outcome(plan, outcome, results, between, suspects, planted)
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
    total = len(plan.arms) * len(run.seeds)
    for number, arm in enumerate(plan.arms, start=1 + len(plan.arms) * run.seeds.index(data.seed)):
        keep = run.save_models if run.simulate else arm in by_name or not by_name
        options: dict[str, Any] = {
            "arm": arm,
            "title": f"[{number}/{total}] {arm}, seed {data.seed}",
            "folder": plan.folder / "arms" / f"seed-{data.seed}" / arm,
            "keep_model": plan.folder / "models" / f"seed-{data.seed}" / arm if keep else None,
        }
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
                "text": data.texts[row_id],
                **{name: values[rank - 1] for name, values in ranking["columns"].items()},
            }
        )
    return rows


def seed_data(plan: Plan, seed: int) -> SeedData:
    """Everything one seed trains and measures on: poisoned by that seed, tokenized."""
    run, trigger = plan.run, plan.run.get_trigger()

    def tokenized(rows: Dataset) -> Dataset:
        keep = [name for name in ("label", "row_id") if name in rows.column_names]
        return rows.map(
            lambda batch: plan.tokenizer(batch["text"], truncation=True, max_length=run.max_length),
            batched=True,
            remove_columns=[name for name in rows.column_names if name not in keep],
            keep_in_memory=True,
            load_from_cache_file=False,
        )

    train, validation, judged = (plan.data[split] for split in ("train", "validation", run.eval_split))
    poisoned = _poison(run, train, seed)
    rows = train if poisoned is None else poisoned.dataset
    few = validation.shuffle(seed=0, keep_in_memory=True).select(range(min(CURVE_ROWS, len(validation))))
    triggered = curve_triggered = None
    if trigger is not None:
        options: dict[str, Any] = {"target": run.target, "seed": seed}
        triggered = tokenized(trigger_dataset(judged, trigger, **options))
        curve_triggered = tokenized(trigger_dataset(few, trigger, **options))
    return SeedData(
        seed=seed,
        label_names=train.features["label"].names,
        clean=tokenized(train),
        train=tokenized(rows),
        test=tokenized(judged),
        triggered=triggered,
        curve=tokenized(few),
        curve_triggered=curve_triggered,
        poisoned=poisoned,
        texts=dict(zip(rows["row_id"], rows["text"], strict=True)),
    )


def _poison(run: RunArguments, train: Dataset, seed: int) -> Poisoned | None:
    trigger = run.get_trigger()
    if trigger is None:
        return None
    return poison_dataset(
        train, trigger, target=run.target, rate=run.poison_rate, clean_label=run.clean_label, seed=seed
    )


def _planted(poisoned: Poisoned | None, tokenizer: Any, max_length: int) -> dict[str, int]:
    assert poisoned is not None
    rows = poisoned.dataset
    texts = [text for text, planted in zip(rows["text"], rows["is_poisoned"], strict=True) if planted]
    visible = count_visible(texts, poisoned.trigger, tokenizer, max_length)
    if visible == 0:
        raise ValueError(
            f"None of the {poisoned.requested} poisoned rows still shows the trigger after cutting at {max_length} tokens: "
            "there would be no attack. Raise --max_length."
        )
    return {"requested": poisoned.requested, "carrying": poisoned.carrying, "visible": visible}


def _baselines(plan: Plan) -> dict[str, tuple[int, int]]:
    if not plan.run.baselines:
        return {}
    judged = DatasetDict({**plan.data, "test": plan.data[plan.run.eval_split]})
    return baselines(judged, seed=0)


def _check_folder(plan: Plan) -> None:
    folder = plan.folder
    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / PLAN_NAME
    if not path.is_file():
        raise ValueError(
            f"`{folder}` is not empty and no run folder: nothing there will be touched. Choose another --output_dir."
        )
    before, now = json.loads(path.read_text()), plan.identity()
    changed = [
        f"{part}.{key}" if isinstance(now[part], dict) else part
        for part in now
        for key in (now[part] if isinstance(now[part], dict) else [None])
        if (before.get(part) or {} if isinstance(now[part], dict) else before).get(key or part)
        != (now[part][key] if isinstance(now[part], dict) else now[part])
    ]
    if changed:
        raise ValueError(
            f"`{folder}` holds a run with other settings ({', '.join(changed)} differ): mixing the two would spoil both. "
            "Choose another --output_dir, or repeat the first settings to continue that run."
        )
