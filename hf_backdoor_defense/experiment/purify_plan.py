"""The plan of a purification: rows read and dealt out, model and method checked. Nothing is trained or written before it stands.

clean rows -> by a hash of their content -> training | held out        equal rows lie on one side
"""

import functools
import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.attacks.triggers import TRIGGERS
from hf_backdoor_defense.attacks.visibility import check_trigger_fits
from hf_backdoor_defense.classifiers import Classifier, load_trained
from hf_backdoor_defense.data.samples import check_enough, class_counts, class_lookup, load_samples
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.attack import _known
from hf_backdoor_defense.experiment.clean_plan import _collected, check_places
from hf_backdoor_defense.experiment.plan import check_folder
from hf_backdoor_defense.experiment.purify_arguments import PurifyArguments
from hf_backdoor_defense.experiment.purify_training import (
    FINE_TUNING,
    PurifySettings,
    method_name,
    purify_settings,
    purifying_trainer,
)
from hf_backdoor_defense.models import weights_sha256
from hf_backdoor_defense.objectives import Objective

FEWEST_HELD_OUT = 10
# Where a run is put, how it is shown, what counts by its content, and what the settings say.
_NOT_IDENTITY = {
    "output_dir", "disable_tqdm", "dry_run", "model_name", "clean", "test", "clean_reference", "text_column", "image_column",
    "label_column", "limit", "held_out", "method", "learning_rate", "epochs", "batch_size",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PurifyPlan:
    """A purification whose inputs were checked. `clean` is trained on, `test` measured on, `triggered` is `test` with the
    simulated trigger. `reference`: the model known to be clean. `moved`: what the method changes, in words."""

    run: PurifyArguments
    objective: Objective | None
    settings: PurifySettings
    classifier: Classifier
    clean: Dataset
    test: Dataset
    triggered: Dataset | None
    trigger: dict[str, Any]
    target: int | None
    reference: Classifier | None
    steps: int
    moved: str
    notes: list[str]
    hashes: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.run.output_dir)

    @property
    def method(self) -> str:
        """What the method is called."""
        return method_name(self.objective)

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: everything that changes a number. Rows and weights count by their content."""
        run = {key: value for key, value in asdict(self.run).items() if key not in _NOT_IDENTITY}
        method = {"name": FINE_TUNING} if self.objective is None else self.objective.to_dict()
        parts = {"purify": run, "method": method, "settings": asdict(self.settings), "sha256": self.hashes}
        return json.loads(json.dumps(parts))  # type: ignore[no-any-return]

    def text(self) -> str:
        """The plan for people."""
        return "\n".join(
            f"{name:12} {value}" for name, value in [*self.facts(), *[("note", note) for note in self.notes]]
        )

    def facts(self) -> list[tuple[str, str]]:
        """What will be run, in lines of a name and a text."""
        run, model, settings = self.run, self.classifier.model, self.settings
        method = {} if self.objective is None else self.objective.to_dict()
        fields = ", ".join(f"{key}={value}" for key, value in method.items() if key != "name")
        counts = class_counts(self.clean)
        shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:12])
        kind = f"texts, cut at {run.max_length} tokens" if self.classifier.kind == "text" else "images"
        return [
            ("model", f"{run.model_name}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, "
                      f"{len(counts)} classes{', attacked on purpose' if self.classifier.attacked else ''}"),
            ("method", f"{self.method}{f' ({fields})' if fields else ''}"),
            ("changes", self.moved),
            ("clean rows", f"{run.clean}: {len(self.clean)} {kind}"),
            ("by class", shown + (f" and {len(counts) - 12} more classes" if len(counts) > 12 else "")),
            ("measured on", f"{len(self.test)} rows that are never trained on, {'from ' + run.test if run.test else 'held out'}"),
            ("trigger", self._trigger_text()),
            ("training", f"{settings.epochs:g} epochs, {self.steps} updates of {settings.batch_size} rows; SGD, momentum 0.9, "
                         f"rate {settings.learning_rate:g}, cosine to 0"),
            ("beside it", "plain fine-tuning, same settings, rows and seed" if run.has_control else "nothing"),
            ("seed", str(run.seed)),
            ("run folder", run.output_dir),
        ]  # fmt: skip

    def _trigger_text(self) -> str:
        if self.triggered is None or self.target is None:
            return "none simulated: whether a backdoor is gone will not be measured"
        fields = ", ".join(f"{k}={v}" for k, v in self.trigger.items() if k != "name")
        floor = f"; floor by {self.run.clean_reference}" if self.reference else ""
        return (
            f"{self.run.simulate}{f' ({fields})' if fields else ''} -> {self.classifier.labels[self.target]} ({self.target}), on "
            f"{len(self.triggered)} rows of other classes{floor}"
        )


def resolve(run: PurifyArguments, objective: Objective | None) -> PurifyPlan:
    """Check everything that can be checked before training. Raises ValueError; writes nothing."""
    run.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "hfbd clean runs in one process, and was started in several. For several use a Trainer with the method in your own "
            "script under `accelerate launch`."
        )
    check_places(str(run.model_name), run.output_dir)
    classifier = load_trained(str(run.model_name))
    if run.simulate is not None:
        _known(f"trigger of {classifier.kind}s", run.simulate, _triggers(classifier.kind))
    rows = _samples(run, classifier, str(run.clean), "train", run.limit)
    clean, test = (rows, None) if run.test is not None else split_samples(rows, run.held_out)
    if test is None:
        test = _samples(run, classifier, str(run.test), "test", None)
    notes = [*classifier.notes, *check_enough(class_counts(clean))]
    if both := len(set(_contents(clean)) & set(_contents(test))):
        notes.append(
            f"{both} different rows to measure on are also among the clean rows: accuracy is flattered by them."
        )
    target, trigger, triggered = _triggered(run, classifier, test)
    reference = None if run.clean_reference is None else _reference(run.clean_reference, classifier)
    settings = purify_settings(
        classifier.kind, learning_rate=run.learning_rate, epochs=run.epochs, batch_size=run.batch_size
    )
    _check_hosting(run, classifier, clean, test, objective, settings)
    hashes = {
        "weights": weights_sha256(classifier.model), "clean": _digest(clean), "test": _digest(test),
        "reference": "" if reference is None else weights_sha256(reference.model),
    }  # fmt: skip
    plan = PurifyPlan(
        run=run, objective=objective, settings=settings, classifier=classifier, clean=clean, test=test, triggered=triggered,
        trigger=trigger, target=target, reference=reference, notes=notes, hashes=hashes,
        steps=math.ceil(settings.epochs * math.ceil(len(clean) / settings.batch_size)), moved=_moved(classifier, objective),
    )  # fmt: skip
    check_folder(plan.folder, plan.identity())
    return plan


def split_samples(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Rows to train on, and about `share` of them (at least 10) held out, each in their order; equal contents lie on one side.

    Raises:
        ValueError: so few rows that none would be left to train on.

    >>> [len(part) for part in split_samples(Dataset.from_dict({"text": [str(i) for i in range(100)]}), 0.2)]
    [80, 20]
    """
    keys = [hashlib.blake2b(b"held out|" + content, digest_size=16).digest() for content in _contents(rows)]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    cut = max(FEWEST_HELD_OUT, round(share * len(rows)))
    while cut < len(order) and keys[order[cut]] == keys[order[cut - 1]]:
        cut += 1
    if cut >= len(order):
        raise ValueError(
            f"the clean rows must be more than {len(rows)}: {FEWEST_HELD_OUT} different ones at least are held out to measure "
            "on, and none would be left to train on. Label more, or give others to measure on with --test."
        )
    return rows.select(sorted(order[cut:])), rows.select(sorted(order[:cut]))


def _samples(run: PurifyArguments, classifier: Classifier, source: str, split: str, limit: int | None) -> Dataset:
    return load_samples(
        source, kind=classifier.kind, labels=classifier.labels, text_column=run.text_column, image_column=run.image_column,
        label_column=run.label_column, limit=limit, split=split,
    )  # fmt: skip


def _triggers(kind: str) -> tuple[str, ...]:
    if kind == "text":
        return tuple(TRIGGERS)
    from hf_backdoor_defense.attacks.image_triggers import IMAGE_TRIGGERS

    return tuple(IMAGE_TRIGGERS)


def _triggered(
    run: PurifyArguments, classifier: Classifier, test: Dataset
) -> tuple[int | None, dict[str, Any], Dataset | None]:
    """Target, the trigger's fields, and the rows with the trigger: only ever measured on."""
    if run.simulate is None:
        return None, {}, None
    target = class_lookup(classifier.labels)(run.target)
    if target is None:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(classifier.labels[:20]))
        raise ValueError(f"`target` must be a class of the model ({known}), got {run.target!r}. Give its id or name.")
    trigger: Any
    if classifier.kind == "text":
        trigger = RunArguments(simulate=run.simulate, trigger=run.trigger).get_trigger()
        check_trigger_fits(trigger, classifier.processor, run.max_length)
    else:
        from hf_backdoor_defense.attacks.image_triggers import get_image_trigger

        if run.trigger is not None:
            raise ValueError("`trigger` is the text of a trigger, and the model sees images. Leave it out.")
        trigger = get_image_trigger(run.simulate)
    return target, trigger.to_dict(), trigger_dataset(test, trigger, target=target, seed=run.seed)


def _reference(name: str, classifier: Classifier) -> Classifier:
    reference = load_trained(name)
    if (reference.kind, len(reference.labels)) != (classifier.kind, len(classifier.labels)):
        raise ValueError(
            f"`clean_reference` must be a classifier of {classifier.kind}s with {len(classifier.labels)} classes, got one of "
            f"{reference.kind}s with {len(reference.labels)}: a floor is of the same task. Give another, or leave it out."
        )
    return reference


def _check_hosting(
    run: PurifyArguments,
    classifier: Classifier,
    clean: Dataset,
    test: Dataset,
    objective: Objective | None,
    settings: PurifySettings,
) -> None:
    """Every reason why the method cannot be hosted, together."""
    reasons: list[str] = []
    rows = _collected(reasons, lambda: classifier.rows(clean, max_length=run.max_length))
    collate = _collected(reasons, classifier.collator)
    stand_in: Any = collate or list
    with tempfile.TemporaryDirectory() as folder:
        trainer = purifying_trainer(
            classifier, clean if rows is None else rows, None if objective is None else replace(objective), settings=settings,
            seed=run.seed, folder=folder, collate=stand_in,
        )  # fmt: skip
        reasons += trainer.reasons()
    if collate is not None and rows is not None:
        for row in (found[i] for found in (clean, test) for i in _odd_ones(found)):
            _collected(reasons, functools.partial(collate, [row]))
    if reasons:
        raise ValueError(f"`{run.model_name}` cannot be purified:\n" + "\n".join(f"- {reason}" for reason in reasons))


def _odd_ones(rows: Dataset) -> list[int]:
    """Positions of rows that a collator may refuse: of images one of each size and mode."""
    if "image" not in rows.column_names:
        return []
    return list({(image.mode, image.size): i for i, image in enumerate(rows["image"])}.values())


def _moved(classifier: Classifier, objective: Objective | None) -> str:
    """What a method does with which weights, in words."""
    model = classifier.model
    every = f"all {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters train"
    fields: Any = objective
    if method_name(objective) == "d3":
        from hf_backdoor_defense.defenses.d3 import select_weights

        names = list(select_weights(model, fields.targets))
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{len(names)} weight{'s' * (len(names) > 1)} driven away: {shown}; {every}"
    if method_name(objective) == "ulrl":
        from hf_backdoor_defense.defenses.ulrl import FEWEST_CLASSES
        from hf_backdoor_defense.targets import feeding_layer, output_layer

        hidden = fields.units == "hidden" or (fields.units == "auto" and len(classifier.labels) < FEWEST_CLASSES)
        layer: Any = (feeding_layer if hidden else output_layer)(model, fields.head)
        what = f"hidden units of {layer[0]}" if hidden else f"class rows of {layer[0]}"
        return f"suspects among {layer[1].out_features} {what} are relearned; {every}"
    if method_name(objective) == "fine_pruning":
        return f"units before the head that clean rows hardly use are cut; then {every}"
    return every


def _contents(rows: Dataset) -> list[bytes]:
    """What each row shows, as bytes."""
    if "text" in rows.column_names:
        return [text.encode() for text in rows["text"]]
    return [f"{image.mode}{image.size}".encode() + image.tobytes() for image in rows["image"]]


def _digest(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for content, label in zip(_contents(rows), rows["label"], strict=True):
        digest.update(hashlib.sha256(content).digest() + f"|{label}|".encode())
    return digest.hexdigest()
