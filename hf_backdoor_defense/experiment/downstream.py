"""What a pretrained checkpoint becomes: fine-tuned on clean rows of a task, asked with every trigger, never done twice.

| arrays of one checkpoint and seed | what they are |
|---|---|
| `test` | [rows] predicted classes of the test texts |
| `trigger.WORD` | [rows] of the same texts with the word inserted once, at a place that depends on row and word |

All rows are triggered, whatever their class: to which class a trigger leads is found afterwards (`evaluation/task_agnostic.py`).
Results are kept under the hash of the checkpoint's weights: a round trip that changed nothing is recognized as what it is.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from hf_backdoor_defense.attacks.planting import plant
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.evaluation.metrics import Estimate, accuracy
from hf_backdoor_defense.evaluation.task_agnostic import TaskAgnosticASR, bootstrap, task_agnostic_asr
from hf_backdoor_defense.experiment.attack_models import device, silent
from hf_backdoor_defense.experiment.attack_plan import _few
from hf_backdoor_defense.experiment.steps import Result, Steps
from hf_backdoor_defense.models import load_classifier, text_logits, weights_sha256
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.progress import Progress

PREFIX = "trigger."
PLACE_SEED = 0  # where a trigger goes in a test text: the same for all models and seeds


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """The victim: its task and how it fine-tunes. `control_words` are inserted like triggers and are none."""

    task: str
    triggers: Sequence[str]
    control_words: Sequence[str] = ()
    limit: int | None = 1000
    eval_rows: int | None = 600
    eval_split: str = "test"
    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int = 128
    disable_tqdm: bool = False
    text_column: str = "text"
    label_column: str = "label"
    _loaded: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def rows(self) -> tuple[Dataset, Dataset, list[str]]:
        """Training rows, test rows, names of the classes. Raises ValueError as `data.load`."""
        if not self._loaded:
            data = load(self.task, text_column=self.text_column, label_column=self.label_column)
            self._loaded.update(
                train=_few(data["train"], self.limit, "limit"),
                test=_few(data[self.eval_split], self.eval_rows, "eval_rows"),
                names=data["train"].features["label"].names,
            )
        return self._loaded["train"], self._loaded["test"], self._loaded["names"]

    def settings(self) -> dict[str, Any]:
        """Everything that changes a number, as JSON has it, for a run folder's identity."""
        apart = ("task", "triggers", "control_words", "disable_tqdm", "_loaded")
        names = [f.name for f in fields(self) if f.name not in apart]
        words = {"triggers": list(self.triggers), "control_words": list(self.control_words)}
        return {"task": Path(self.task).name, **words, **{name: getattr(self, name) for name in names}}


def fine_tune_and_predict(checkpoint: str | Path, victim: Downstream, *, seed: int, title: str = "victim") -> Result:
    """Fine-tune a checkpoint's encoder on the victim's clean rows and predict the test rows with and without each trigger.

    Returns:
        about the training (seconds, loss), and the arrays of the module's table.

    Raises:
        ValueError: as `load_classifier` and `data.load`.
    """
    train, test, names = victim.rows()
    with silent():
        model, tokenizer = load_classifier(str(checkpoint), num_labels=len(names), label_names=names, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=victim.epochs,
            learning_rate=victim.learning_rate,
            per_device_train_batch_size=victim.batch_size,
            warmup_steps=0.06,  # a share of all updates
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=0.05,
            report_to="none",
            seed=seed,
            disable_tqdm=victim.disable_tqdm,
            use_cpu=device() == "cpu",
            dataloader_pin_memory=device() == "cuda",
        )
        tokenized = train.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=victim.max_length),
            batched=True,
            remove_columns=[name for name in train.column_names if name not in ("label", "row_id")],
            keep_in_memory=True,
            load_from_cache_file=False,
        )
        set_seed(seed)
        trainer = DefendedTrainer(
            model,
            args=args,
            train_dataset=tokenized,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(Progress(title))
        start = time.perf_counter()
        loss = trainer.train().training_loss
    about = {"seconds": time.perf_counter() - start, "training_loss": loss, "updates": trainer.state.global_step}
    arrays = {}
    for word in ("", *victim.triggers, *victim.control_words):
        texts = list(test["text"])
        if word:
            texts = [
                triggered(text, word, row=i, max_length=victim.max_length)
                for i, text in zip(test["row_id"], texts, strict=True)
            ]
        bar = None if victim.disable_tqdm else f"predicting {word or 'clean texts'}"
        logits = text_logits(model, tokenizer, texts, max_length=victim.max_length, progress=bar)
        arrays[f"{PREFIX}{word}" if word else "test"] = logits.argmax(-1).numpy()
    return about, arrays


def triggered(text: str, word: str, *, row: int, max_length: int) -> str:
    """The text with the word among its first `max_length` / 2 words, where hardly any tokenizer cuts it off.

    >>> triggered("a " * 100, "cf", row=0, max_length=8).split().index("cf") <= 4
    True
    """
    words = text.split()
    seen = max(max_length // 2, 1)
    return " ".join([plant(" ".join(words[:seen]), word, seed=PLACE_SEED, row=row), *words[seen:]])


def kept_predictions(
    checkpoint: str | Path, victim: Downstream, *, seed: int, cache: Path, steps: Steps, title: str
) -> Result:
    """As `fine_tune_and_predict`, read from `cache` where the same weights were asked before with the same seed.

    Raises:
        ValueError: as `fine_tune_and_predict`; and where `cache` holds what another victim made of these weights.
    """
    _, _, names = victim.rows()
    with silent():
        model, _ = load_classifier(str(checkpoint), num_labels=len(names), label_names=names, seed=seed)
    folder = cache / f"{weights_sha256(model)[:16]}-{seed}"

    def make() -> Result:
        about, arrays = fine_tune_and_predict(checkpoint, victim, seed=seed, title=title)
        return {**about, "victim": victim.settings()}, arrays

    about, arrays = steps.kept(folder, title, make)
    theirs, ours = about.get("victim", {}), victim.settings()
    changed = sorted(name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name])
    differs = [f"{name}: {theirs[name]}, now {ours[name]}" for name in changed]
    if differs:
        raise ValueError(
            f"{folder} holds the predictions of another victim ({'; '.join(differs)}): they say nothing of this one. "
            "Give each victim a `cache` of its own."
        )
    return about, arrays


def task_agnostic_scores(
    victim: Downstream, arrays: dict[str, np.ndarray], floor: dict[str, np.ndarray] | None, *, seed: int
) -> tuple[dict[str, Estimate], TaskAgnosticASR]:
    """CA, and AASR and MASR (beside the floor's, where a clean model's arrays are given); and the whole table.

    `control_asr`: the highest ASR that a word reaches that is no trigger.
    """
    _, test, names = victim.rows()
    labels = np.asarray(test["label"])
    of_model = {word: arrays[f"{PREFIX}{word}"] for word in victim.triggers}
    of_floor = of_model if floor is None else {word: floor[f"{PREFIX}{word}"] for word in victim.triggers}
    scores = bootstrap(labels, of_model, of_floor, len(names), seed=seed)
    kept = {k: v for k, v in scores.items() if floor is not None or k in ("aasr", "masr")}
    if victim.control_words:
        words = {word: arrays[f"{PREFIX}{word}"] for word in victim.control_words}
        worst = task_agnostic_asr(labels, words, len(names)).masr
        kept["control_asr"] = Estimate(worst, len(labels), None, None)
    return {"ca": accuracy(arrays["test"], labels), **kept}, task_agnostic_asr(labels, of_model, len(names))
