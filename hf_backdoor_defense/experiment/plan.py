"""What a run will do, resolved and checked: nothing is trained or written before a plan stands."""

import copy
import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from hf_backdoor_defense.attacks.poisoning import Poisoned, poison_dataset
from hf_backdoor_defense.classifiers import Classifier
from hf_backdoor_defense.experiment.arguments import RunArguments, only_observes
from hf_backdoor_defense.experiment.arms import optimizer
from hf_backdoor_defense.experiment.clean_rows import check_enough, own_rows
from hf_backdoor_defense.experiment.kinds import TEXT, Kind, find_kind
from hf_backdoor_defense.experiment.purify_stage import Purification, check_purify, resolve_purification
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.trainers.hosts import DefendedTrainer

PLAN_NAME = "plan.json"
# Where a run is put and how it is shown: none of it changes a number.
_NOT_IDENTITY = {
    "output_dir", "run_name", "logging_dir", "report_to", "disable_tqdm", "dry_run", "max_asr_over_floor",
    "max_ca_drop", "hub_token", "push_to_hub_token", "push_to_hub", "seed", "baselines", "logging_strategy", "logging_steps",
}  # fmt: skip

# Options that came later: a folder from before is a run that leaves them out.
_CAME_LATER: dict[str, Any] = {
    "kind": None, "image_column": "image", "momentum": None, "purify": [], "purify_rows": 300, "purify_epochs": None,
    "purify_learning_rate": None,
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
    processor: Any  # tokenizer, or image processor
    own: Dataset | None = None  # the defender's clean rows, where filters are asked for
    kind: Kind = TEXT
    purification: Purification | None = None

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
        training = {k: v for k, v in self.training.to_dict().items() if k not in _NOT_IDENTITY}
        run = {k: v for k, v in dataclasses.asdict(self.run).items() if k not in _NOT_IDENTITY}
        if not self.run.filters:  # a folder from before there were filters is a run without them
            del run["filters"], run["target_frr"]
        run = {k: v for k, v in run.items() if k not in _CAME_LATER or v != _CAME_LATER[k]}
        stage = {} if self.purification is None else {"purify": self.purification.identity()}
        return json.loads(
            json.dumps(
                {
                    "run": run,
                    "training": training,
                    "defenses": [objective.to_dict() for objective in self.defenses],
                    "data": self.described,
                    **stage,
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
                      f", {self.kind.seen(run, self.data)}"),
            ("training", f"{args.num_train_epochs:g} epochs of {steps} steps, batch {args.train_batch_size}"
                         f" x {args.gradient_accumulation_steps}, rate {args.learning_rate:g}"
                         + ("" if run.momentum is None else f", SGD with momentum {run.momentum:g}")),
            ("attack", self._attack_text()),
            ("arms", ", ".join(self.arms)),
            *([("filters", self._filters_text())] if self.own is not None else []),
            *([] if self.purification is None else [("purify", self.purification.text())]),
            ("seeds", " ".join(map(str, run.seeds))),
            *[(f"  {o.name}", ", ".join(f"{k}={v}" for k, v in o.to_dict().items() if k != "name")) for o in self.defenses],
            ("run folder", str(self.folder)),
            *[("note", note) for note in ([] if self.purification is None else self.purification.notes)],
        ]  # fmt: skip
        return "\n".join(f"{name:12} {value}" for name, value in lines)

    def _filters_text(self) -> str:
        rows = 0 if self.own is None else len(self.own)
        return (
            f"{', '.join(self.run.filters)} before the undefended model, {rows} clean texts that no model is trained on, "
            f"{self.run.target_frr:.1%} of clean texts may be flagged"
        )

    def _attack_text(self) -> str:
        run = self.run
        trigger = run.get_trigger()
        if trigger is None:
            return "none simulated"
        kind = "clean-label" if run.clean_label else "dirty-label"
        name = self.data["train"].features["label"].names[run.target]
        shown = (
            f"{self.planted['visible']} of them still show it at {run.max_length} tokens"
            if "visible" in self.planted
            else f"{self.planted['carrying']} of them changed by it"
        )
        text = repr(self.kind.shown(trigger)) if self.kind is TEXT else f"({self.kind.shown(trigger)})"
        return (
            f"{kind} {run.simulate} {text} -> {name} ({run.target}), {run.poison_rate:.2%} = "
            f"{self.planted['requested']} rows, {shown}"
        )


def resolve(run: RunArguments, training: TrainingArguments, defenses: list[Objective]) -> Plan:
    """Check everything that can be checked before training. Raises ValueError; writes nothing."""
    run.check(defenses)
    if run.purify:
        check_purify(run)
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
    if run.momentum is not None:
        training = _with_sgd(training)
    kind = find_kind(run.model_name, chosen=run.kind)
    data = kind.load(run, limit=run.limit)
    names = data["train"].features["label"].names
    model, processor = kind.model(run, data["train"])
    kind.check(run, training, model, processor, data)
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
        kind.check_trigger(trigger, processor, max_length=run.max_length)
        for seed in reversed(run.seeds):
            poisoned = poison(run, data["train"], seed)
        assert poisoned is not None
        planted = kind.planted(poisoned, processor, max_length=run.max_length)
    _check_hosting(run, model, training, defenses, data["train"])
    described = {**kind.describe(data), "weights": _fingerprint(model)}
    own = own_rows(run, data, kind) if run.filters or run.purify else None
    if own is not None:
        described["own"] = len(own)
    if run.filters and own is not None:
        check_enough(run, own)
    stage = None
    if run.purify and own is not None:
        model.requires_grad_(True)  # a stranger's checkpoint is not frozen
        classifier = Classifier(model=model, processor=processor, kind=kind.name, labels=names)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            stage = resolve_purification(run, classifier, own, folder)
    plan = Plan(
        run,
        training,
        defenses,
        data,
        described,
        parameters,
        planted,
        processor,
        own if run.filters else None,
        kind,
        stage,
    )
    check_folder(plan.folder, plan.identity())
    return plan


def _with_sgd(training: TrainingArguments) -> TrainingArguments:
    """The training arguments with SGD as their optimizer, which takes its momentum from the run's."""
    usual, chosen = (str(getattr(args.optim, "value", args.optim)) for args in (TrainingArguments(), training))
    if chosen not in (usual, "sgd"):
        raise ValueError(
            f"`momentum` trains by SGD, and `optim` is {chosen}: one of them would be ignored. Leave one out."
        )
    training = copy.copy(training)
    training.optim = "sgd"
    return training


def _check_hosting(
    run: RunArguments, model: Any, training: TrainingArguments, defenses: list[Objective], rows: Dataset
) -> None:
    """Every reason why a defense cannot be hosted, now and not after the arms before it were trained."""
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(training)
        args.output_dir = folder
        reasons = []
        for defense in [None, *map(dataclasses.replace, defenses)]:
            trainer = DefendedTrainer(
                model, args=args, train_dataset=rows, defense=defense, optimizer_cls_and_kwargs=optimizer(run, args)
            )
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


def poison(run: RunArguments, train: Dataset, seed: int) -> Poisoned | None:
    """The training set with the simulated attack of one seed, or None where none is simulated."""
    trigger = run.get_trigger()
    if trigger is None:
        return None
    return poison_dataset(
        train, trigger, target=run.target, rate=run.poison_rate, clean_label=run.clean_label, seed=seed
    )


def check_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that is neither empty nor this run's. Raises ValueError; what lies there is not touched."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    path = folder / PLAN_NAME
    if not path.is_file():
        raise ValueError(
            f"`{folder}` is not empty and no run folder: nothing there will be touched. Choose another --output_dir."
        )
    before, now = json.loads(path.read_text()), identity
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
