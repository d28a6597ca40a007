"""What a run is asked to do, and whether that makes sense: checked before anything is trained or written."""

from dataclasses import dataclass, field
from typing import Any

import torch

from hf_backdoor_defense.attacks.image_triggers import IMAGE_TRIGGERS, ImageTrigger, get_image_trigger
from hf_backdoor_defense.attacks.triggers import TRIGGERS, Trigger, get_trigger
from hf_backdoor_defense.functional.thresholds import rows_needed
from hf_backdoor_defense.objectives import Objective, overrides
from hf_backdoor_defense.registry import CONTROLS, PURIFIERS, filter_class, objective_class


def _option(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class RunArguments:
    """What to train on, what to attack it with, what to defend it by. TrainingArguments say how to train."""

    task: str | None = _option(
        None,
        "texts: Hub id, a JSON/JSONL/CSV/Parquet file, a folder with train/validation/test files, or offline:docstrings; images: "
        "Hub id, an .npz, a folder of class folders, or offline:digits",
    )
    model_name: str = _option(
        "offline:minilm",
        "Hub id or folder of a model of texts or images, offline:minilm (the embedded encoder), or offline:digits-vit (images: "
        "a tiny ViT, from scratch)",
    )
    kind: str | None = _option(None, "text or image, where the model does not say which it classifies")
    text_column: str = _option("text", "column with the text")
    image_column: str = _option("image", "column with the image")
    label_column: str = _option("label", "column with the label, integers 0..C-1")
    limit: int | None = _option(None, "train on at most this many rows (stratified)")
    max_length: int = _option(128, "tokens per text")
    num_layers: int | None = _option(None, "keep only the first layers of the encoder")
    frozen_layers: int = _option(-1, "-1: train everything; 0: freeze embeddings; k: and the first k layers")
    momentum: float | None = _option(None, "train every arm by SGD with this momentum, in place of AdamW")
    simulate: str | None = _option(
        None,
        f"poison the training set on purpose: {', '.join(TRIGGERS)} (texts); {', '.join(IMAGE_TRIGGERS)} (images)",
    )
    trigger: str | None = _option(None, "trigger text: words separated by commas (badnets) or a sentence (insent)")
    poison_rate: float = _option(0.01, "poisoned share of the whole training set")
    target: int = _option(0, "the class the attacker wants")
    clean_label: bool = _option(False, "poison rows of the target class and keep their labels")
    seeds: list[int] = _option([0], "one run per seed: head, order of rows, which rows are poisoned")
    eval_split: str = _option(
        "test", "split that is reported: test; validation for searches, which must not see test rows"
    )
    baselines: bool = _option(True, "report majority and TF-IDF + logistic regression beside the model")
    save_models: bool = _option(False, "keep the models of a simulated attack (marked as backdoored)")
    filters: list[str] = _option(
        [], "filters before the undefended model, as if a stranger had trained it: confidence, psim, strip, rap"
    )
    target_frr: float = _option(0.01, "share of clean texts that a filter may flag")
    purify: list[str] = _option(
        [],
        f"purify the undefended model, as if a stranger had trained it: {', '.join(PURIFIERS)}; plain fine-tuning beside them",
    )
    purify_rows: int = _option(300, "clean rows to purify with, that no model is trained on")
    purify_epochs: float | None = _option(None, "passes over them; the recommended number where not given")
    purify_learning_rate: float | None = _option(None, "peak rate of SGD; the recommended one where not given")
    max_asr_over_floor: float | None = _option(
        None, "gate: exit 1 when a defense leaves more attack success above the floor"
    )
    max_ca_drop: float | None = _option(None, "gate: exit 1 when a defense costs more clean accuracy")
    dry_run: bool = _option(False, "print the resolved plan and stop")

    def __post_init__(self) -> None:
        if isinstance(self.seeds, int):
            self.seeds = [self.seeds]
        if isinstance(self.filters, str):
            self.filters = [self.filters]
        if isinstance(self.purify, str):
            self.purify = [self.purify]

    def get_trigger(self) -> Trigger | ImageTrigger | None:
        """The simulated trigger, or None. Raises ValueError for an unknown name or an empty text."""
        if self.simulate is None:
            return None
        if self.simulate in IMAGE_TRIGGERS:
            if self.trigger is not None:
                raise ValueError(
                    f"`trigger` is the text of a trigger, and {self.simulate} changes pixels. Leave --trigger out."
                )
            return get_image_trigger(self.simulate)
        if self.trigger is None:
            return get_trigger(self.simulate)
        if self.simulate == "badnets":
            return get_trigger("badnets", words=tuple(word.strip() for word in self.trigger.split(",")))
        return get_trigger(self.simulate, sentence=self.trigger)

    def check(self, defenses: list[Objective]) -> None:
        """Raise ValueError for what can be seen to be wrong without the data."""
        if not self.task:
            raise ValueError(
                "No task was given: there is nothing to train on. Set --task to a Hub id, a file, a folder or "
                "offline:docstrings, or take --preset offline."
            )
        if self.max_length < 4:
            raise ValueError(f"`max_length` must be at least 4 tokens, got {self.max_length}: special tokens take two.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be different numbers, at least one, got {self.seeds}.")
        if self.eval_split not in ("test", "validation"):
            raise ValueError(
                f"`eval_split` must be test or validation, got {self.eval_split!r}: train rows are learned."
            )
        self.check_kind()
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(
                f"`momentum` must be in [0, 1), got {self.momentum}: it is the share of the last step that is kept. Use 0.9."
            )
        trigger = self.get_trigger()
        if trigger is not None and not 0 < self.poison_rate < 1:
            raise ValueError(
                f"`poison_rate` must be in (0, 1), got {self.poison_rate}: it is a share of the whole training set. "
                "For 1 % set 0.01."
            )
        if trigger is None and self.max_asr_over_floor is not None:
            raise ValueError(
                "`max_asr_over_floor` needs a simulated attack: without one there is no attack success to measure. "
                "Add --simulate badnets, or remove the gate."
            )
        if trigger is None and (self.trigger is not None or self.clean_label):
            raise ValueError("`trigger` and `clean_label` belong to a simulated attack. Add --simulate badnets.")
        for name, value in (("max_asr_over_floor", self.max_asr_over_floor), ("max_ca_drop", self.max_ca_drop)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a share in 0..1, got {value}. For 3 points set 0.03.")
        self._check_filters()
        if self.purify and self.simulate is None:
            raise ValueError(
                "`purify` is measured on a model with a simulated backdoor: without one there is nothing to remove. Add "
                "--simulate, or purify a model that you have with hfbd clean --method."
            )
        names = [objective.name for objective in defenses]
        if len(set(names)) < len(names):
            raise ValueError(f"The same defense is given twice ({', '.join(names)}): one run has one arm for each.")
        if set(names) & set(CONTROLS):
            raise ValueError(
                f"{', '.join(set(names) & set(CONTROLS))} is a control and runs by itself where it belongs. Remove it."
            )
        if set(names) & set(PURIFIERS):
            name = next(name for name in names if name in PURIFIERS)
            raise ValueError(
                f"`{name}` purifies a model that is trained already, with clean rows. Use --purify {name} for the undefended one "
                f"of this run, or hfbd clean --method {name}."
            )
        if (self.max_asr_over_floor is not None or self.max_ca_drop is not None) and not defenses:
            raise ValueError("A gate judges a defense, and none is given. Add --defense, for example trajectory.")

    def check_kind(self) -> None:
        """Raise ValueError for a kind that there is not."""
        if self.kind not in (None, "text", "image"):
            raise ValueError(f"`kind` must be text or image, got {self.kind!r}. Leave it out: the model says it.")

    def _check_filters(self) -> None:
        for name in self.filters:
            filter_class(name)
            if filter_class(name).edits:
                raise ValueError(
                    f"`{name}` reads a language model, and hfbd train has none. Use hfbd attack --filters {name}, or hfbd detect."
                )
        if len(set(self.filters)) < len(self.filters):
            raise ValueError(f"The same filter is given twice ({', '.join(self.filters)}). Name each once.")
        if self.filters and self.simulate is None:
            raise ValueError(
                "`filters` are measured before a model with a simulated backdoor: without one there is nothing to catch. Add "
                "--simulate badnets, or look at texts with hfbd detect."
            )
        if self.filters:
            rows_needed(self.target_frr)  # says what a rate may be


def build_defenses(specs: list[dict[str, Any]]) -> list[Objective]:
    """Objectives from `{"name": …, fields…}`. Raises ValueError for an unknown name, field or value.

    >>> build_defenses([{"name": "dece", "alpha_base": 0.9}])[0].alpha_base
    0.9
    """
    for spec in specs:
        if "name" not in spec:
            raise ValueError(f"A defense needs a `name`, got {spec}. For example: defense: {{name: dece}}.")
    return [objective_class(spec["name"]).from_dict(spec) for spec in specs]


def only_observes(objective: Objective) -> bool:
    """Whether a method only ranks rows while it is hosted, so that it can ride along with the undefended arm."""
    return overrides(objective, "ranking") and not any(overrides(objective, method) for method in ("loss", "penalties"))


def defaults() -> dict[str, Any]:
    """Training arguments that differ from the library's: one resumable checkpoint per epoch, twenty points in the log,
    nothing sent anywhere."""
    return {
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_strategy": "steps",
        "logging_steps": 0.05,  # of all steps
        "report_to": "none",
        "output_dir": "runs/train",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


# Training arguments are keys of a preset as well; flags and a configuration file override them.
PRESETS: dict[str, dict[str, Any]] = {
    "offline": {
        "task": "offline:docstrings",
        "model_name": "offline:minilm",
        "defense": ["dece", "trajectory"],
        "simulate": "badnets",
        "poison_rate": 0.04,
        "target": 0,
        "filters": ["confidence", "psim"],
        "purify": ["ulrl"],
        "purify_rows": 200,
        "purify_epochs": 2,
        "limit": 1000,
        "max_length": 32,
        "frozen_layers": 4,
        "output_dir": "runs/offline",
        "num_train_epochs": 2,
        "learning_rate": 3e-4,
        "warmup_steps": 0.06,
        "per_device_train_batch_size": 32,
        "train_sampling_strategy": "group_by_length",
    },
    # The attacker trains by SGD: what it plants so survives plain fine-tuning, which is what makes it a test.
    "digits": {
        "task": "offline:digits",
        "model_name": "offline:digits-vit",
        "simulate": "patch",
        "poison_rate": 0.1,
        "target": 0,
        "limit": 900,  # what is left of 1,197 and the validation rows are the defender's
        "purify": ["d3", "ulrl"],
        "momentum": 0.9,
        "output_dir": "runs/digits",
        "num_train_epochs": 140,
        "save_strategy": "no",  # an arm takes less than a minute
        "learning_rate": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 64,
    },
}
