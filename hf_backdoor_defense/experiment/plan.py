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

from hf_backdoor_defense.attacks.poisoning import Poisoned, check_trigger_fits, count_visible, poison_dataset
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.data.summary import describe
from hf_backdoor_defense.experiment.arguments import RunArguments, only_observes
from hf_backdoor_defense.experiment.clean_rows import check_enough, own_rows
from hf_backdoor_defense.models import load_classifier
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.trainers.hosts import DefendedTrainer

PLAN_NAME = "plan.json"
# Where a run is put and how it is shown: none of it changes a number.
_NOT_IDENTITY = {
    "output_dir", "run_name", "logging_dir", "report_to", "disable_tqdm", "dry_run", "max_asr_over_floor",
    "max_ca_drop", "hub_token", "push_to_hub_token", "push_to_hub", "seed", "baselines", "logging_strategy", "logging_steps",
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
    own: Dataset | None = None  # the defender's clean rows, where filters are asked for

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
            *([("filters", self._filters_text())] if self.own is not None else []),
            ("seeds", " ".join(map(str, run.seeds))),
            *[(f"  {o.name}", ", ".join(f"{k}={v}" for k, v in o.to_dict().items() if k != "name")) for o in self.defenses],
            ("run folder", str(self.folder)),
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
            poisoned = poison(run, data["train"], seed)
        planted = _planted(poisoned, tokenizer, run.max_length)
    _check_hosting(model, training, defenses, data["train"])
    described = {**describe(data), "weights": _fingerprint(model)}
    own = None
    if run.filters:
        own = own_rows(run, data)
        check_enough(run, own)
        described["own"] = len(own)
    plan = Plan(run, training, defenses, data, described, parameters, planted, tokenizer, own)
    check_folder(plan.folder, plan.identity())
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


def poison(run: RunArguments, train: Dataset, seed: int) -> Poisoned | None:
    """The training set with the simulated attack of one seed, or None where none is simulated."""
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
