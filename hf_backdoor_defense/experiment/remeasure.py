"""The figures of a finished model, measured again on the same rows, from what `results.json` says about them.

`ModelEntry.measurement` holds the keyword arguments of `remeasure` as JSON. Two readers find the rows, as the verbs do:

| `reader` | reads | for |
|---|---|---|
| `splits` | `split` of the source (cut by hash where there is none), `limit` as in training; `eval_rows` | train, attack, eval |
| `samples` | rows labeled with the model's classes, at most `limit`; of them the part `held_out` | hfbd clean --method d3, … |

Equal rows and equal weights give equal figures: not close ones. `rows_sha256` says whether the rows are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_backdoor_defense.attacks.image_triggers import IMAGE_TRIGGERS, ImageTrigger, get_image_trigger
from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.attacks.triggers import Trigger, get_trigger
from hf_backdoor_defense.classifiers import Classifier, load_trained
from hf_backdoor_defense.data.samples import load_samples
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.attack_plan import _few
from hf_backdoor_defense.experiment.kinds import KINDS
from hf_backdoor_defense.experiment.purify_plan import _digest, split_samples

READERS = ("splits", "samples")


@dataclass(frozen=True, kw_only=True)
class Remeasured:
    """What was measured. `rows_sha256` of the rows it was measured on; `same_rows`: whether they are those of the record, None
    where the record does not say which they were."""

    scores: BackdoorScores
    rows_sha256: str
    same_rows: bool | None


def remeasure(
    model_folder: str | Path | Classifier,
    *,
    kind: str,
    task: str,
    reader: str = "splits",
    split: str = "test",
    limit: int | None = None,
    held_out: float | None = None,
    eval_rows: int | None = None,
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
    max_length: int = 128,
    trigger: Mapping[str, Any] | None = None,
    target: int | None = None,
    seed: int = 0,
    rows_sha256: str | None = None,
    otherwise: Mapping[str, int | None] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Remeasured:
    """Clean accuracy, and with a trigger attack success and recovered accuracy, of a saved classifier.

    Args:
        model_folder: a whole classifier of `load_trained`, or where it is.
        kind: "text" or "image". task: where the rows are: a file, a folder, a Hub id, offline:….
        reader: one of `READERS`. split: which split, of a source that has several.
        limit: as the run's `--limit`. held_out: (samples) the share of the rows that was kept apart, None: all of them.
        eval_rows: (splits) as `hfbd attack --eval_rows`.
        trigger: `Trigger.to_dict()` or `ImageTrigger.to_dict()`, None: only clean accuracy. target: the attacker's class.
        seed: of where the trigger is inserted.
        rows_sha256: of the rows of the record (`rows_sha256`).
        otherwise: `limit` and `eval_rows` to read by where the rows are not those of `rows_sha256`; None: the same.

    Raises:
        ValueError: an unknown reader, kind or trigger; rows that cannot be read; a target that is no class; no classifier.

    Example:
        >>> remeasure("nowhere", kind="sound", task="offline:docstrings")
        Traceback (most recent call last):
        ...
        ValueError: `kind` must be text or image, got 'sound': no other rows are measured on.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be {' or '.join(KINDS)}, got {kind!r}: no other rows are measured on.")
    if reader not in READERS:
        raise ValueError(f"`reader` must be {' or '.join(READERS)}, got {reader!r}: rows are read in no other way.")
    classifier = model_folder if isinstance(model_folder, Classifier) else load_trained(str(model_folder))
    if classifier.kind != kind:
        raise ValueError(f"`kind` is {kind}, and the model is a classifier of {classifier.kind}s. Leave the model's.")
    run = RunArguments(
        task=task, max_length=max_length, text_column=text_column, image_column=image_column, label_column=label_column
    )  # fmt: skip
    reading: dict[str, Any] = {"reader": reader, "split": split, "held_out": held_out}
    rows = _rows(run, classifier, limit=limit, eval_rows=eval_rows, **reading)
    if otherwise is not None and _digest(rows) != rows_sha256:
        rows = _rows(run, classifier, limit=otherwise.get("limit"), eval_rows=otherwise.get("eval_rows"), **reading)
    triggered = _triggered(classifier, rows, trigger, target=target, seed=seed, max_length=max_length)
    classifier.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    scores = evaluate_backdoor(
        classifier.model,
        classifier.rows(rows, max_length=max_length),
        None if triggered is None else classifier.rows(triggered, max_length=max_length),
        target=target,
        collate=classifier.collator(),
        batch_size=batch_size,
        progress=progress,
    )
    found = _digest(rows)
    return Remeasured(scores=scores, rows_sha256=found, same_rows=None if rows_sha256 is None else found == rows_sha256)


def rows_digest(rows: Dataset) -> str:
    """SHA-256 of contents and labels in their order: what a record says of the rows it was measured on.

    >>> one, other = (Dataset.from_dict({"text": ["a"], "label": [label]}) for label in (0, 1))
    >>> rows_digest(one) == rows_digest(other)
    False
    """
    return _digest(rows)


def _rows(
    run: RunArguments,
    classifier: Classifier,
    *,
    reader: str,
    split: str,
    limit: int | None,
    held_out: float | None,
    eval_rows: int | None,
) -> Dataset:
    if reader == "splits":
        return _of_splits(run, classifier, split=split, limit=limit, eval_rows=eval_rows)
    rows = load_samples(
        str(run.task), kind=classifier.kind, labels=classifier.labels, text_column=run.text_column,
        image_column=run.image_column, label_column=run.label_column, limit=limit, split=split,
    )  # fmt: skip
    return rows if held_out is None else split_samples(rows, held_out)[1]


def _of_splits(
    run: RunArguments, classifier: Classifier, *, split: str, limit: int | None, eval_rows: int | None
) -> Dataset:
    data = KINDS[classifier.kind].load(run, limit=limit)
    if split not in data:
        raise ValueError(f"`split` must be one of {', '.join(data)}, got {split!r}: no source has another.")
    rows = data[split]
    classes = rows.features["label"].num_classes
    if classes != len(classifier.labels):
        raise ValueError(
            f"`{run.task}` must have the model's {len(classifier.labels)} classes, got {classes}: it is another task. Name the "
            "source that the model was made for."
        )
    return _few(rows, eval_rows, "eval_rows")


def _triggered(
    classifier: Classifier,
    rows: Dataset,
    trigger: Mapping[str, Any] | None,
    *,
    target: int | None,
    seed: int,
    max_length: int,
) -> Dataset | None:
    if trigger is None:
        return None
    if type(target) is not int or not 0 <= target < len(classifier.labels):
        raise ValueError(
            f"`target` must be a class of the model, 0..{len(classifier.labels) - 1}, got {target!r}: attack success counts "
            "what is predicted as it."
        )
    fields = {str(key): value for key, value in trigger.items()}
    name = str(fields.pop("name", ""))
    found: Trigger | ImageTrigger = (get_image_trigger if name in IMAGE_TRIGGERS else get_trigger)(name, **fields)
    KINDS[classifier.kind].check_trigger(found, classifier.processor, max_length=max_length)
    return trigger_dataset(rows, found, target=target, seed=seed)
