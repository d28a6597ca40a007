"""The purifying stage of a run, before anything is trained: which methods, whose clean rows, whether both can be done.

| rows | are for |
|---|---|
| of the task, that no model of the run is trained on nor any figure about (`clean_rows.py`) | all methods and the control |
| of the reported split, clean and triggered | the figures (`purified.py`) |

Every method gets the rows, updates, rate and seed of plain fine-tuning (`purify_training.py`): what the control removes is no
method's merit.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset

from hf_backdoor_defense.classifiers import Classifier
from hf_backdoor_defense.data.samples import check_enough, class_counts
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.purify_training import (
    FINE_TUNING,
    PurifySettings,
    build_purifier,
    purify_settings,
    purifying_trainer,
)


@dataclass(frozen=True, kw_only=True)
class Purification:
    """What the stage of a run was resolved to: the methods (plain fine-tuning first), how they are trained, the clean rows there
    are, and what a reader should know about so few."""

    methods: list[str]
    settings: PurifySettings
    count: int
    own: Dataset = field(repr=False)
    notes: list[str]

    def rows(self, seed: int) -> Dataset:
        """The clean rows of one seed: `count` of them by a hash of seed and row id, whatever their order."""
        ids = self.own["row_id"]
        keys = [hashlib.blake2b(f"purify|{seed}|{i}".encode(), digest_size=8).digest() for i in ids]
        return self.own.select(sorted(sorted(range(len(ids)), key=keys.__getitem__)[: self.count]))

    def identity(self) -> dict[str, Any]:
        """Everything that changes a number, beside the run's options."""
        built = {name: build_purifier(name) for name in self.methods}
        return {
            "settings": asdict(self.settings),
            "methods": {name: {} if objective is None else objective.to_dict() for name, objective in built.items()},
        }

    def text(self) -> str:
        """For the plan."""
        s = self.settings
        return (
            f"{', '.join(self.methods)} of the undefended model, {self.count} clean rows that no model is trained on, "
            f"{s.epochs:g} epochs, batch {s.batch_size}, SGD with momentum 0.9, rate {s.learning_rate:g}"
        )


def check_purify(run: RunArguments) -> None:
    """Raise ValueError for methods or settings that can be seen to be wrong without data."""
    for name in run.purify:
        build_purifier(name)
    if len(set(run.purify)) < len(run.purify):
        raise ValueError(f"The same method is given twice in `purify` ({', '.join(run.purify)}). Name each once.")
    if run.purify_rows < 1:
        raise ValueError(f"`purify_rows` must be at least 1, got {run.purify_rows}: it counts clean rows. Use 300.")
    _settings(run, "text")


def resolve_purification(run: RunArguments, classifier: Classifier, own: Dataset, folder: str) -> Purification:
    """Check that the methods can be hosted, and that there are rows for them.

    Args:
        classifier: the model of the run, before it is trained. own: clean rows that no model of the run sees.
        folder: for the Trainers that are only built.

    Raises:
        ValueError: too few rows, or every reason why a method cannot be hosted.
    """
    stage = Purification(
        methods=[FINE_TUNING, *(name for name in run.purify if name != FINE_TUNING)],
        settings=_settings(run, classifier.kind),
        count=min(run.purify_rows, len(own)),
        own=own,
        notes=[],
    )
    try:
        for seed in run.seeds:
            stage.notes.extend(n for n in check_enough(class_counts(stage.rows(seed))) if n not in stage.notes)
    except ValueError as error:
        raise ValueError(
            f"`purify`: {error} Here they are what --limit leaves out and the validation rows: {len(own)} that no model of the "
            "run is trained on. Lower --limit, raise --purify_rows, or leave --purify out."
        ) from error
    rows = classifier.rows(stage.rows(run.seeds[0]), max_length=run.max_length)
    reasons: list[str] = []
    for name in stage.methods:
        trainer = purifying_trainer(
            classifier, rows, build_purifier(name), settings=stage.settings, seed=0, folder=folder, checkpoints=False
        )
        reasons += [reason for reason in trainer.reasons() if reason not in reasons]
    if reasons:
        raise ValueError("The undefended model could not be purified:\n" + "\n".join(f"- {r}" for r in reasons))
    return stage


def _settings(run: RunArguments, kind: str) -> PurifySettings:
    return purify_settings(kind, learning_rate=run.purify_learning_rate, epochs=run.purify_epochs)
