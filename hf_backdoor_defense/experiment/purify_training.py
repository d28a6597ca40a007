"""One purifying training, the same host for every method and for the control.

    SGD, momentum 0.9, no weight decay, no clipping, rate · (1 + cos(π·t/T))/2 after every update, float32

What a method does beyond plain fine-tuning is then the method's: the optimizer, the rate, the updates and the rows are equal.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from hf_backdoor_defense.classifiers import Classifier
from hf_backdoor_defense.experiment.arms import _usable_checkpoint, history
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.registry import PURIFIERS, _resolve
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.progress import Progress

FINE_TUNING = "fine_tuning"
METHODS = (*PURIFIERS, FINE_TUNING)
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class PurifySettings:
    """What every arm shares: peak rate, passes over the clean rows, rows per update."""

    learning_rate: float
    epochs: float
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be finite and above 0, got {value}: nothing would be learned.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}: an update needs a row. Use 32.")


# benchmarks/results/purify_search.jsonl holds what was tried.
DEFAULTS = {
    "image": PurifySettings(learning_rate=1e-2, epochs=120.0, batch_size=64),
    "text": PurifySettings(learning_rate=5e-3, epochs=8.0, batch_size=32),
}


def purify_settings(kind: str, **overrides: float | int | None) -> PurifySettings:
    """The recommended settings for "text" or "image", some overridden; None leaves one as it is.

    >>> purify_settings("text", epochs=2, batch_size=None)
    PurifySettings(learning_rate=0.005, epochs=2, batch_size=32)
    """
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(DEFAULTS[kind], **given)


def build_purifier(name: str, fields: Mapping[str, Any] | None = None) -> Objective | None:
    """The objective behind a method's name; None for plain fine-tuning. Raises ValueError for an unknown name or field.

    >>> build_purifier("fine_tuning") is None
    True
    >>> build_purifier("url")
    Traceback (most recent call last):
    ...
    ValueError: There is no purifier `url`: did you mean `ulrl`? Known: d3, ulrl, ft_sam, fine_pruning, fine_tuning.
    """
    fields = dict(fields or {})
    if name == FINE_TUNING:
        if given := [key for key in fields if key != "name"]:
            raise ValueError(f"{FINE_TUNING} has no fields, got {', '.join(given)}: it is the control. Leave them out.")
        return None
    if name not in PURIFIERS:
        _resolve(name, dict.fromkeys(METHODS, ":"), "purifier")
    objective: Objective = _resolve(name, PURIFIERS, "purifier").from_dict(fields)
    return objective


def method_name(objective: Objective | None) -> str:
    """What a method is called in tables."""
    return FINE_TUNING if objective is None else objective.name


def purifying_trainer(
    classifier: Classifier,
    rows: Dataset,
    objective: Objective | None,
    *,
    settings: PurifySettings,
    seed: int,
    folder: str | Path,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    title: str | None = None,
    checkpoints: bool = True,
) -> DefendedTrainer:
    """The Trainer of a purification: one checkpoint at the end of each epoch, from where a stopped training goes on exactly.

    Args:
        rows: what `Classifier.rows` made. title: of the progress bar; None shows none.
    """
    set_seed(seed)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_strategy="epoch" if checkpoints else "no",
        save_total_limit=1,
        logging_steps=0.05,  # of all updates
        report_to="none",
        train_sampling_strategy="group_by_length" if "input_ids" in rows.column_names else "random",  # little padding
        remove_unused_columns=False,  # the collator takes what it needs: an image is no column that a model reads
        seed=seed,
        disable_tqdm=title is None,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = DefendedTrainer(
        classifier.model,
        args=args,
        train_dataset=rows,
        data_collator=classifier.collator() if collate is None else collate,
        defense=objective,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": settings.learning_rate, "momentum": MOMENTUM}),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None and title is not None:
        trainer.add_callback(Progress(title))
    return trainer


def run_training(trainer: DefendedTrainer, folder: str | Path) -> dict[str, Any]:
    """Train, from the last checkpoint in `folder` where there is one.

    Returns:
        steps, seconds (None for a continued training: the time of its last part is not one), history, and what the method says.
    """
    checkpoint = _usable_checkpoint(Path(folder))
    if checkpoint is not None:
        print(f"continued from {Path(checkpoint).name}", flush=True)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    trainer.model.eval()
    objective = trainer.objectives[0] if trainer.objectives else None
    return {
        "steps": trainer.state.global_step,
        "seconds": None if checkpoint else seconds,
        "history": history(trainer.state.log_history),
        "config": {} if objective is None else objective.to_dict(),
        "activity": {} if objective is None else objective.activity(),
        "inert": None if objective is None else objective.inert(),
        "evidence": {} if objective is None else objective.evidence(),
    }
