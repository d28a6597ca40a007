"""Texts or images: what a run does differently for the two, under one set of names.

| | `TEXT` | `IMAGE` |
|---|---|---|
| rows | `data.load`: `text`, `label` | `data.load_images`: `image`, `label` |
| a model reads | tokens, cut at `max_length` | pixels, through its image processor |
| beside the model | majority; TF-IDF + logistic regression | majority; logistic regression on pixels, where that is cheap |
| of a planted row is told | whether it still shows the trigger after cutting | whether the trigger changed its pixels |

The model says which of the two it is (`find_kind`); `--kind` says it where a checkpoint could be both.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from transformers import AutoConfig, DataCollatorWithPadding, PreTrainedModel, TrainingArguments
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGE_MODELS,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as TEXT_MODELS,
)

from hf_backdoor_defense.attacks.poisoning import Poisoned
from hf_backdoor_defense.attacks.triggers import TRIGGERS
from hf_backdoor_defense.attacks.visibility import check_trigger_fits, count_visible
from hf_backdoor_defense.data.images import OFFLINE_IMAGES, describe_images, load_images
from hf_backdoor_defense.data.pixels import pixels
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.data.summary import baselines, describe, pixel_baselines
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.models import (
    OFFLINE_MODEL,
    _guarded,
    freeze,
    keep_layers,
    load_classifier,
    load_finished_classifier,
    resolve,
)

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
OFFLINE_VIT = "offline:digits-vit"  # vision.OFFLINE_VIT: the module is loaded where there are images
_READ = ("image", "label", "row_id")


class Kind(ABC):
    """What a run asks of its data and its models. There are two: `TEXT` and `IMAGE`."""

    name: str
    noun: str  # what the rows are, in sentences

    @abstractmethod
    def load(self, run: RunArguments, *, limit: int | None = None) -> DatasetDict:
        """The task's splits. Raises ValueError for data that no honest result can come from."""

    @abstractmethod
    def describe(self, data: DatasetDict) -> dict[str, Any]:
        """Counts and a fingerprint."""

    @abstractmethod
    def baselines(self, data: DatasetDict) -> dict[str, tuple[int, int]]:
        """(correct, n) on the test split, of what needs no network."""

    @abstractmethod
    def contents(self, rows: Dataset) -> list[str]:
        """One string per row: equal strings are one sample."""

    @abstractmethod
    def model(self, run: RunArguments, rows: Dataset, *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
        """A model to train on `rows` (for its classes), and its processor. Raises ValueError where there is none."""

    @abstractmethod
    def finished(self, name: str, *, num_labels: int) -> tuple[PreTrainedModel, Any]:
        """A model whose head is trained, and its processor. Raises ValueError, also for an untrained head."""

    @abstractmethod
    def rows(self, processor: Any, rows: Dataset, *, max_length: int) -> Dataset:
        """Rows as the collator takes them, with `label` and `row_id`."""

    @abstractmethod
    def collator(self, processor: Any, config: Any) -> Collate:
        """From rows to a batch."""

    @abstractmethod
    def check(
        self, run: RunArguments, training: TrainingArguments, model: PreTrainedModel, processor: Any, data: DatasetDict
    ) -> None:
        """Raise ValueError where model and rows do not fit each other."""

    @abstractmethod
    def check_trigger(self, trigger: Any, processor: Any, *, max_length: int) -> None:
        """Raise ValueError for a trigger that the model could not see."""

    @abstractmethod
    def planted(self, poisoned: Poisoned, processor: Any, *, max_length: int) -> dict[str, int]:
        """How many rows were drawn, carry the trigger, and still show it. Raises ValueError where there is no attack left."""

    @abstractmethod
    def shown(self, trigger: Any) -> str:
        """A trigger in a few words."""

    @abstractmethod
    def seen(self, run: RunArguments, data: DatasetDict) -> str:
        """What the model sees of a row, for the plan."""


class _Texts(Kind):
    name, noun = "text", "texts"

    def load(self, run: RunArguments, *, limit: int | None = None) -> DatasetDict:
        if run.task == OFFLINE_IMAGES or str(run.task).lower().endswith(".npz"):
            raise ValueError(
                f"`{run.task}` holds images, and `{run.model_name}` reads texts. Take a model of images: --model_name "
                f"{OFFLINE_VIT}, or a folder or Hub id of one."
            )
        return load(str(run.task), text_column=run.text_column, label_column=run.label_column, limit=limit)

    def describe(self, data: DatasetDict) -> dict[str, Any]:
        return describe(data)

    def baselines(self, data: DatasetDict) -> dict[str, tuple[int, int]]:
        return baselines(data, seed=0)

    def contents(self, rows: Dataset) -> list[str]:
        return list(rows.with_format(None)["text"])

    def model(self, run: RunArguments, rows: Dataset, *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
        names = rows.features["label"].names
        return load_classifier(
            run.model_name,
            num_labels=len(names),
            label_names=names,
            seed=seed,
            num_layers=run.num_layers,
            frozen_layers=run.frozen_layers,
        )

    def finished(self, name: str, *, num_labels: int) -> tuple[PreTrainedModel, Any]:
        return load_finished_classifier(name, num_labels=num_labels)

    def rows(self, processor: Any, rows: Dataset, *, max_length: int) -> Dataset:
        return rows.map(
            lambda batch: processor(batch["text"], truncation=True, max_length=max_length),
            batched=True,
            remove_columns=[name for name in rows.column_names if name not in ("label", "row_id")],
            keep_in_memory=True,
            load_from_cache_file=False,
        )

    def collator(self, processor: Any, config: Any) -> Collate:
        return DataCollatorWithPadding(processor)

    def check(
        self, run: RunArguments, training: TrainingArguments, model: PreTrainedModel, processor: Any, data: DatasetDict
    ) -> None:
        if processor.pad_token is None:
            raise ValueError(
                f"The tokenizer of `{run.model_name}` has no padding token: texts of unequal length cannot be batched. Set one "
                "(tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer with the model."
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and run.max_length > longest:
            raise ValueError(f"`max_length` is {run.max_length}, the model reads at most {longest} tokens. Lower it.")

    def check_trigger(self, trigger: Any, processor: Any, *, max_length: int) -> None:
        if trigger.name not in TRIGGERS:
            raise ValueError(_other_trigger(trigger.name, "texts", TRIGGERS))
        check_trigger_fits(trigger, processor, max_length)

    def planted(self, poisoned: Poisoned, processor: Any, *, max_length: int) -> dict[str, int]:
        rows = poisoned.dataset
        texts = [text for text, planted in zip(rows["text"], rows["is_poisoned"], strict=True) if planted]
        visible = count_visible(texts, poisoned.trigger, processor, max_length)  # type: ignore[arg-type]
        if visible == 0:
            raise ValueError(
                f"None of the {poisoned.requested} poisoned rows still shows the trigger after cutting at {max_length} tokens: "
                "there would be no attack. Raise --max_length."
            )
        return {"requested": poisoned.requested, "carrying": poisoned.carrying, "visible": visible}

    def shown(self, trigger: Any) -> str:
        return str(trigger.text)

    def seen(self, run: RunArguments, data: DatasetDict) -> str:
        return f"texts cut at {run.max_length} tokens"


class _Images(Kind):
    name, noun = "image", "images"

    def load(self, run: RunArguments, *, limit: int | None = None) -> DatasetDict:
        return load_images(str(run.task), image_column=run.image_column, label_column=run.label_column, limit=limit)

    def describe(self, data: DatasetDict) -> dict[str, Any]:
        return describe_images(data)

    def baselines(self, data: DatasetDict) -> dict[str, tuple[int, int]]:
        return pixel_baselines(data, seed=0)

    def contents(self, rows: Dataset) -> list[str]:
        cells = rows.with_format(None).cast_column("image", ImageFeature(decode=False))["image"]
        arrays = (pixels(cell) for cell in cells)
        return [hashlib.sha256(f"{a.shape}".encode() + a.tobytes()).hexdigest() for a in arrays]

    def model(self, run: RunArguments, rows: Dataset, *, seed: int = 0) -> tuple[PreTrainedModel, Any]:
        from hf_backdoor_defense.vision import load_image_classifier, new_digits_vit

        names, image = rows.features["label"].names, rows[0]["image"]
        model: PreTrainedModel
        if run.model_name == OFFLINE_VIT:  # it is made for the task: nothing of it is trained
            channels = 1 if image.mode == "L" else 3
            model, processor = new_digits_vit(
                len(names), image_size=image.size[0], channels=channels, seed=seed, label_names=names
            )
        else:
            model, processor = load_image_classifier(
                run.model_name, num_labels=len(names), label_names=names, seed=seed
            )
        if run.num_layers is not None:
            keep_layers(model, run.num_layers)
        freeze(model, run.frozen_layers)
        return model, processor

    def finished(self, name: str, *, num_labels: int) -> tuple[PreTrainedModel, Any]:
        from hf_backdoor_defense.vision import load_image_classifier

        architectures = _config(name).architectures or [] if name != OFFLINE_VIT else ["nothing, untrained"]
        if not any("ForImageClassification" in architecture for architecture in architectures):
            raise ValueError(
                f"`{name}` has no classification head ({', '.join(architectures or ['unknown'])}): its answers would be random. "
                "Give a fine-tuned classifier, or train one: hfbd train."
            )
        return load_image_classifier(name, num_labels=num_labels)

    def rows(self, processor: Any, rows: Dataset, *, max_length: int) -> Dataset:
        return rows.select_columns([name for name in rows.column_names if name in _READ])

    def collator(self, processor: Any, config: Any) -> Collate:
        from hf_backdoor_defense.vision import ImageCollator

        return ImageCollator(processor, config)

    def check(
        self, run: RunArguments, training: TrainingArguments, model: PreTrainedModel, processor: Any, data: DatasetDict
    ) -> None:
        if run.filters:
            raise ValueError(
                f"`filters` ({', '.join(run.filters)}) look at texts, and `{run.model_name}` sees images. Leave --filters out; "
                "--purify works on images."
            )
        if training.train_sampling_strategy == "group_by_length":
            raise ValueError("`train_sampling_strategy` is group_by_length, and images have no length. Leave it out.")
        collate = self.collator(processor, model.config)
        for rows in data.values():
            different = {(row["image"].mode, row["image"].size): row for row in rows}
            for row in different.values():
                collate([row])  # another size, other channels

    def check_trigger(self, trigger: Any, processor: Any, *, max_length: int) -> None:
        from hf_backdoor_defense.attacks.image_triggers import IMAGE_TRIGGERS

        if trigger.name not in IMAGE_TRIGGERS:
            raise ValueError(_other_trigger(trigger.name, "images", IMAGE_TRIGGERS))

    def planted(self, poisoned: Poisoned, processor: Any, *, max_length: int) -> dict[str, int]:
        if poisoned.carrying == 0:
            raise ValueError(
                f"The trigger changes none of the {poisoned.requested} poisoned images: there would be no attack. Take another."
            )
        return {"requested": poisoned.requested, "carrying": poisoned.carrying}

    def shown(self, trigger: Any) -> str:
        return ", ".join(f"{k} {v}" for k, v in trigger.to_dict().items() if k != "name" and v is not None)

    def seen(self, run: RunArguments, data: DatasetDict) -> str:
        image = data["train"][0]["image"]
        return f"{'gray' if image.mode == 'L' else 'color'} images of {image.size[0]} x {image.size[1]} pixels"


TEXT, IMAGE = _Texts(), _Images()
KINDS: dict[str, Kind] = {"text": TEXT, "image": IMAGE}


def find_kind(model_name: str, *, chosen: str | None = None) -> Kind:
    """Texts or images, as a checkpoint's configuration says.

    Args:
        chosen: "text" or "image", where the user says so.

    Raises:
        ValueError: no such checkpoint; one that could be either.

    >>> find_kind("offline:minilm").name, find_kind("offline:digits-vit").name
    ('text', 'image')
    """
    if chosen is not None:
        return KINDS[chosen]
    if model_name in (OFFLINE_MODEL, OFFLINE_VIT):
        return IMAGE if model_name == OFFLINE_VIT else TEXT
    config = _config(model_name)
    for architecture in config.architectures or []:
        for end, kind in (("ForImageClassification", IMAGE), ("ForSequenceClassification", TEXT)):
            if end in architecture:
                return kind
    sees, reads = config.model_type in IMAGE_MODELS, config.model_type in TEXT_MODELS
    if sees and reads:
        raise ValueError(
            f"`{model_name}` is a {config.model_type} model, which can classify texts and images: say which with --kind text or "
            "--kind image."
        )
    return IMAGE if sees else TEXT


def _config(name: str) -> Any:
    return _guarded(name, lambda: AutoConfig.from_pretrained(resolve(name), trust_remote_code=False))


def _other_trigger(name: str, noun: str, known: Any) -> str:
    return f"`simulate` {name!r} is no trigger of {noun}: the model could not see it. Triggers of {noun}: {', '.join(known)}."


__all__ = ["IMAGE", "KINDS", "TEXT", "Kind", "find_kind"]
