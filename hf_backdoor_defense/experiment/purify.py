"""Purify a trained classifier with a few clean rows: one call, the model that was given stays as it is.

    clean rows + untrusted model  ->  method, hosted as plain fine-tuning is  ->  purified model + report

No part of it takes triggered data: a defense that sees the trigger proves nothing. `hfbd clean --method` does the same from
files, trains the control beside it and, where a trigger is simulated, measures all of them.
"""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from hf_backdoor_defense.classifiers import Classifier, classifier_of, load_trained
from hf_backdoor_defense.data.samples import check_enough, class_ids
from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor, true_labels
from hf_backdoor_defense.experiment.plan import PLAN_NAME, check_folder
from hf_backdoor_defense.experiment.purify_training import (
    build_purifier,
    method_name,
    purify_settings,
    purifying_trainer,
    run_training,
)
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.reporting.results import environment, write_json
from hf_backdoor_defense.trainers.columns import with_row_ids
from hf_backdoor_defense.trainers.processes import require_one_process
from hf_backdoor_defense.trainers.state import save_objectives

REPORT_NAME = "purification.json"


@dataclass
class PurifyResult:
    """The purified `model`, and a `report` of JSON values: method, settings, rows, hashes before and after, what the method did
    (`activity`), why it did nothing (`inert`) and what it found (`evidence`), loss curve, clean accuracy, seconds, versions."""

    model: Any
    report: dict[str, Any]
    processor: Any = field(default=None, repr=False)
    objective: Objective | None = field(default=None, repr=False)
    attacked: dict[str, Any] | None = field(default=None, repr=False)

    def save(self, folder: str | Path) -> Path:
        """Model, processor, method and report. Weights that were attacked on purpose stay marked.

        Raises:
            ValueError: the folder is not empty: nothing there is touched.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"`{folder}` exists and is not empty: nothing there will be touched. Choose another folder."
            )
        save_purified(
            self.model, self.processor, self.objective, folder, attacked=self.attacked, method=self.report["method"]
        )
        write_json(folder / REPORT_NAME, self.report)
        return folder


def purify(
    model: Any,
    clean_dataset: Dataset,
    *,
    defense: str | Objective | None = "d3",
    processor: Any = None,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    validation: Dataset | None = None,
    learning_rate: float | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    output_dir: str | Path | None = None,
    show_progress: bool = True,
) -> PurifyResult:
    """Purify a copy of a trained classifier. Prefer `hfbd clean --method` for the control and the report beside it.

    Args:
        model: a sequence or image classifier (LoRA is merged in the copy), or a folder or Hub id of one.
        clean_dataset: rows that you trust, with `text` or `image`, or ready for the model, and `label`.
        defense: "d3", "ulrl", "ft_sam", "fine_pruning", "fine_tuning" (the control), an Objective; None is the control.
        processor: tokenizer or image processor; comes with a model that is given by name.
        collate: in place of the processor's collator, for rows that are ready for the model.
        validation: clean rows that are never trained or chosen on, for the accuracy before and after.
        learning_rate, epochs, batch_size: None takes the recommended ones for texts or images (`purify_settings`).
        max_length: tokens per text.
        seed: order of rows, dropout, what the method draws.
        output_dir: where checkpoints are kept meanwhile, so that the same call goes on after a stop; None keeps none.

    Raises:
        ValueError: what cannot be purified, all reasons of the method together; another training's output_dir; several
            processes.
        FloatingPointError: training or unlearning diverged; names what to lower.

    >>> from transformers import BertConfig, BertForSequenceClassification, default_data_collator
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> rows = Dataset.from_dict({"input_ids": [[1, i % 9] for i in range(10)], "label": [0, 1] * 5})
    >>> model = BertForSequenceClassification(config)
    >>> result = purify(model, rows, defense=None, collate=default_data_collator, epochs=1, show_progress=False)
    >>> result.report["method"], result.report["rows"], result.report["class_counts"]
    ('fine_tuning', 10, {'LABEL_0': 5, 'LABEL_1': 5})
    """
    require_one_process(
        "purify()",
        "Call it in a script that is started once; for many GPUs use DefendedTrainer(defense=D3()) or ULRL() instead.",
    )
    objective = build_purifier(defense) if isinstance(defense, str) else defense
    objective = None if objective is None else dataclasses.replace(objective)
    classifier = load_trained(str(model)) if isinstance(model, str | Path) else classifier_of(model, processor)
    if processor is not None:
        classifier.processor = processor
    settings = purify_settings(classifier.kind, learning_rate=learning_rate, epochs=epochs, batch_size=batch_size)
    collate = classifier.collator() if collate is None else collate
    rows = with_row_ids(classifier.rows(_named(clean_dataset, classifier), max_length=max_length))
    counts = _label_counts(rows, classifier)
    notes = [*classifier.notes, *check_enough(counts)]
    kept = None if validation is None else classifier.rows(_named(validation, classifier), max_length=max_length)
    before_sha = weights_sha256(classifier.model)
    identity = {
        "method": objective.to_dict() if objective else {"name": method_name(None)}, "settings": asdict(settings), "seed": seed,
        "sha256": before_sha, "rows": _digest(rows),
    }  # fmt: skip
    if output_dir is not None:
        check_folder(Path(output_dir), json.loads(json.dumps(identity)))
    accuracy = {} if kept is None else {"before": _accuracy(classifier, kept, collate, show_progress)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if output_dir is None else output_dir)
        trainer = purifying_trainer(
            classifier, rows, objective, settings=settings, seed=seed, folder=folder, collate=collate,
            title=method_name(objective) if show_progress else None, checkpoints=output_dir is not None,
        )  # fmt: skip
        if reasons := trainer.reasons():
            raise ValueError("This model cannot be purified:\n" + "\n".join(f"- {reason}" for reason in reasons))
        if output_dir is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PLAN_NAME, identity)
        training = run_training(trainer, folder)
    if kept is not None:
        accuracy["after"] = _accuracy(classifier, kept, collate, show_progress)
    report = {
        "method": method_name(objective),
        "kind": classifier.kind,
        "settings": asdict(settings),
        "seed": seed,
        "rows": len(rows),
        "class_counts": counts,
        "notes": notes,
        "sha256": {"before": before_sha, "after": weights_sha256(classifier.model)},
        "clean_accuracy": accuracy,
        "suspected_classes": suspected(training["evidence"], classifier.labels),
        **training,
        "environment": environment(),
    }
    return PurifyResult(classifier.model, report, classifier.processor, objective, classifier.attacked)


def suspected(evidence: dict[str, Any], labels: list[str]) -> list[str]:
    """The classes that a method takes for the attacker's target, by name.

    >>> suspected({"suspected_classes": [1]}, ["bad", "good"])
    ['good']
    """
    return [labels[i] for i in evidence.get("suspected_classes", [])]


def save_purified(
    model: Any,
    processor: Any,
    objective: Objective | None,
    folder: Path,
    *,
    attacked: dict[str, Any] | None,
    method: str,
) -> None:
    """A purified model as others load it, with `defense.json`; marked where its input was attacked on purpose."""
    model.save_pretrained(str(folder))
    if processor is not None:
        processor.save_pretrained(str(folder))
    save_objectives([] if objective is None else [objective], folder)
    if attacked is not None:
        mark_backdoored(folder, {**attacked, "cleaned": {"method": method}})


def _accuracy(classifier: Classifier, rows: Dataset, collate: Any, progress: bool) -> dict[str, Any]:
    return asdict(evaluate_backdoor(classifier.model, rows, collate=collate, progress=progress).ca)  # type: ignore[arg-type]


def _named(rows: Dataset, classifier: Classifier) -> Dataset:
    """Rows whose named classes are the model's of the same names, whatever their order."""
    column = next((name for name in ("label", "labels") if name in rows.column_names), None)
    feature = None if column is None else rows.features[column]
    if column is None or not isinstance(feature, ClassLabel) or feature.names == classifier.labels:
        return rows
    ids = class_ids(rows, column, classifier.labels, "the clean rows")
    return rows.remove_columns(column).add_column(column, ids)


def _label_counts(rows: Dataset, classifier: Classifier) -> dict[str, int]:
    """Rows by class. Raises ValueError for no label column, and for labels the model has no score for."""
    if not {"label", "labels"} & set(rows.column_names):
        raise ValueError(f"the clean rows must have a column `label`, got {rows.column_names}. Rename it.")
    found = Counter(true_labels(rows).tolist())
    if unknown := sorted(str(label) for label in found if label not in range(len(classifier.labels))):
        raise ValueError(
            f"the labels of the clean rows must be in 0..{len(classifier.labels) - 1}, got {', '.join(unknown[:8])}: the model "
            f"knows {', '.join(classifier.labels[:12])}. Drop these rows, or map the labels to the model's."
        )
    return {name: found[i] for i, name in enumerate(classifier.labels)}


def _digest(rows: Dataset) -> str:
    import hashlib

    digest = hashlib.sha256()
    for row in rows.with_format(None):
        for name in sorted(row):
            value = row[name].tobytes() if hasattr(row[name], "tobytes") else repr(row[name]).encode()
            digest.update(name.encode() + b"|" + value + b"|")
    return digest.hexdigest()
