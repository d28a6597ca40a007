"""A classifier that somebody else trained, of texts or of images, ready to be purified: whole, in float32, with its processor.

| checkpoint | becomes |
|---|---|
| `…ForSequenceClassification`, `…ForImageClassification` | as it is |
| a LoRA adapter (`adapter_config.json`) | its base with the update added to it: W + (alpha / r)·B·A, and its head |
| float16, bfloat16 weights | float32, said aloud: small steps are rounded away in them |
| other adapters, quantized weights, no trained head, regression, several labels per row, no safetensors | refused |
"""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_backdoor_defense.adapters import room
from hf_backdoor_defense.models import (
    _guarded,
    attack_on,
    load_classifier,
    load_finished_classifier,
    resolve,
    warn_if_backdoored,
)
from hf_backdoor_defense.pretrained import float32_reasons, head_is_fresh
from hf_backdoor_defense.targets import HEADS

logger = logging.getLogger(__name__)

Kind = Literal["text", "image"]
KINDS: dict[str, Kind] = {"ForSequenceClassification": "text", "ForImageClassification": "image"}
_MERGED = "LORA"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_KEPT = ("input_ids", "attention_mask", "token_type_ids", "image", "pixel_values", "label", "labels", "row_id")


@dataclass(kw_only=True)
class Classifier:
    """A trained classifier, what turns rows into its inputs, and what its classes are called. `notes`: what was changed in
    loading, in sentences. `attacked`: what the file beside weights that this project attacked says, or None.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> classifier_of(BertForSequenceClassification(config)).labels
    ['LABEL_0', 'LABEL_1']
    """

    model: PreTrainedModel
    processor: Any
    kind: Kind
    labels: list[str]
    notes: tuple[str, ...] = ()
    attacked: dict[str, Any] | None = None

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """From rows (of `rows`) to a batch. Raises ValueError where there is nothing that could pad texts or read images."""
        if self.processor is None:
            raise ValueError(
                f"a classifier of {self.kind}s needs its {'tokenizer' if self.kind == 'text' else 'image processor'} to make "
                "batches, got none. Pass processor=…, or collate=… for rows that are ready."
            )
        if self.kind == "image":
            from hf_backdoor_defense.vision import ImageCollator

            return ImageCollator(self.processor, self.model.config)
        if self.processor.pad_token is None:
            raise ValueError(
                "the tokenizer has no padding token: texts of unequal length cannot be batched. Set one "
                "(tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer with the model."
            )
        return DataCollatorWithPadding(self.processor)

    def rows(self, dataset: Dataset, *, max_length: int = 128) -> Dataset:
        """Texts tokenized, images and rows that are tokenized already as they are; columns that no model reads are dropped.

        Raises:
            ValueError: neither texts, images nor inputs; more tokens asked for than the model has places.
        """
        names = dataset.column_names
        if self.kind == "text" and "input_ids" not in names:
            if "text" not in names:
                raise ValueError(
                    f"the rows must have a column `text` (or `input_ids`), got {names}: there is nothing to read. Rename it."
                )
            positions = room(self.model)
            if positions is not None and max_length > positions:
                raise ValueError(f"`max_length` is {max_length}, the model reads at most {positions} tokens. Lower it.")
            if self.processor is None:
                raise ValueError(
                    "texts need a tokenizer, got none. Pass processor=tokenizer, or rows with `input_ids`."
                )
            return dataset.map(
                lambda batch: self.processor(batch["text"], truncation=True, max_length=max_length),
                batched=True,
                remove_columns=[name for name in names if name not in _KEPT],
                keep_in_memory=True,
                load_from_cache_file=False,
            )
        if self.kind == "image" and not {"image", "pixel_values"} & set(names):
            raise ValueError(
                f"the rows must have a column `image` (or `pixel_values`), got {names}: there is nothing to look at. Rename it."
            )
        return dataset.select_columns([name for name in names if name in _KEPT])


def load_trained(name: str) -> Classifier:
    """A trained classifier from a folder or the Hub, with a LoRA adapter merged, in float32.

    Raises:
        ValueError: no such checkpoint, no safetensors, an adapter of another kind, quantized weights, no trained head,
            regression or several labels per row.
    """
    path = resolve(name)
    found = _guarded(name, lambda: find_adapter_config_file(path))
    if found is not None:
        return _merged(name, path, json.loads(Path(found).read_text()))
    config = _guarded(name, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    _refuse_quantized(name, config)
    kind = _kind(name, config)
    if kind == "image":
        from hf_backdoor_defense.vision import load_image_classifier

        _one_class_per_row(name, config)
        model, processor = load_image_classifier(name, num_labels=config.num_labels)
    else:
        model, processor = load_finished_classifier(name, num_labels=config.num_labels)
    if head_is_fresh(model):
        raise ValueError(
            f"`{name}` calls itself a classifier, but its files hold no weights of a head: its answers would be random. Give a "
            "fine-tuned classifier, or train one: hfbd train."
        )
    return _in_float32(
        Classifier(model=model, processor=processor, kind=kind, labels=_labels(model), attacked=attack_on(path))
    )


def classifier_of(model: Any, processor: Any = None) -> Classifier:
    """A copy of a model that is loaded already: merged, in float32. The model itself stays as it is.

    Raises:
        ValueError: no classifier, an adapter that cannot be merged, quantized weights.

    >>> classifier_of(object())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: `model` must be a trained classifier of texts or images, got object: ...
    """
    config: Any = getattr(model, "config", None)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = next((kind for end, kind in KINDS.items() if type(core).__name__.endswith(end)), None)
    if kind is None:
        raise ValueError(
            f"`model` must be a trained classifier of texts or images, got {type(core).__name__}: purifying needs class scores. "
            f"Use a class that ends in {' or '.join(KINDS)}."
        )
    _refuse_quantized(type(core).__name__, config)
    _one_class_per_row(type(core).__name__, core.config)
    copied = copy.deepcopy(model)
    notes: tuple[str, ...] = ()
    if core is not model:
        kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
        _refuse_other_adapters(type(core).__name__, kinds)
        notes = ("the LoRA adapter was merged into its base",)
        if coarse := sorted({str(p.dtype).removeprefix("torch.") for p in copied.parameters() if p.dtype.itemsize < 4}):
            notes = (
                *notes,
                f"the weights were {' and '.join(coarse)} and are float32 now: small steps are rounded away in them",
            )
        copied = _unwrap(copied.float())  # merged in float32, as from a folder
    place = str(getattr(config, "_name_or_path", "") or "")
    return _in_float32(
        Classifier(
            model=copied, processor=processor, kind=kind, labels=_labels(copied), notes=notes,
            attacked=attack_on(place) if place else None,
        )
    )  # fmt: skip


def _merged(name: str, path: str, adapter: dict[str, Any]) -> Classifier:
    """The base of a LoRA adapter with the adapter in its weights."""
    from peft import PeftModel
    from safetensors import safe_open

    _refuse_other_adapters(name, {str(adapter.get("peft_type"))})
    weights = cached_file(path, _ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if weights is None:
        raise ValueError(
            f"`{name}` has no {_ADAPTER_WEIGHTS}: other formats can run code while loading and are not read here. Convert it "
            "with a tool you trust, in a sandbox."
        )
    base_name = str(adapter.get("base_model_name_or_path") or "")
    base_path = resolve(base_name)
    if not base_name or _guarded(base_name, lambda: find_adapter_config_file(base_path)) is not None:
        raise ValueError(
            f"`{name}` is an adapter for {base_name or 'an unnamed base'!r}, which is no whole model. Merge the inner one first: "
            "merge_and_unload().save_pretrained(new_folder), and name that in adapter_config.json."
        )
    config = _guarded(base_name, lambda: AutoConfig.from_pretrained(base_path, trust_remote_code=False))
    _refuse_quantized(base_name, config)
    with safe_open(weights, framework="pt") as tensors:
        heads = [key for key in tensors.keys() if "lora_" not in key and {*key.split(".")} & {*HEADS}]
        classes = next((tensors.get_slice(key).get_shape()[0] for key in reversed(heads)), None)
    has_head = any(end in architecture for end in KINDS for architecture in config.architectures or [])
    if classes is None and not has_head:
        raise ValueError(
            f"`{name}` holds no head and its base `{base_name}` has none: the answers would be random. Give an adapter that was "
            "trained as a classifier (task_type SEQ_CLS saves its head)."
        )
    kind: Kind = "image" if getattr(config, "image_size", None) is not None else "text"
    count = int(classes or config.num_labels)
    tokens = path if _has_tokenizer(path) else base_path
    if kind == "image":
        from hf_backdoor_defense.vision import load_image_classifier

        _one_class_per_row(base_name, config)
        model, processor = load_image_classifier(base_name, num_labels=count)
    else:
        names = [config.id2label[i] for i in range(count)] if len(config.id2label) == count else None
        model, processor = load_classifier(base_name, num_labels=count, label_names=names)
        processor = _guarded(name, lambda: AutoTokenizer.from_pretrained(tokens, trust_remote_code=False))
    model = _unwrap(_guarded(name, lambda: PeftModel.from_pretrained(model.float(), path)))
    warn_if_backdoored(path)
    note = f"the LoRA adapter was merged into its base ({base_name})"
    logger.warning("%s: %s", name, note)
    attacked = attack_on(path) or attack_on(base_path)
    return Classifier(
        model=model, processor=processor, kind=kind, labels=_labels(model), notes=(note,), attacked=attacked
    )


def _unwrap(model: Any) -> Any:
    """A LoRA model as the plain model that it computes, all of it trainable."""
    merged = model.merge_and_unload()
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(merged):
            delattr(merged, attribute)
    return merged.requires_grad_(True)


def _has_tokenizer(path: str) -> bool:
    return cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None


def _in_float32(classifier: Classifier) -> Classifier:
    """Half precision becomes float32, with a note; quantized weights stay refused."""
    reasons = float32_reasons(classifier.model)
    if not reasons:
        return classifier
    if any("quantized" in reason for reason in reasons):
        raise ValueError(f"The model cannot be purified: {reasons[0]}")
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in classifier.model.parameters() if p.dtype.itemsize < 4})
    note = f"the weights were {' and '.join(kinds)} and are float32 now: small steps are rounded away in them"
    logger.warning("%s", note)
    classifier.model.float()
    classifier.model.config.dtype = "float32"
    classifier.notes = (*classifier.notes, note)
    return classifier


def _kind(name: str, config: Any) -> Kind:
    architectures = config.architectures or []
    for end, kind in KINDS.items():
        if any(end in architecture for architecture in architectures):
            return kind
    raise ValueError(
        f"`{name}` has no classification head ({', '.join(architectures or ['unknown'])}): its answers would be random. Give a "
        "fine-tuned classifier of texts or images, or train one: hfbd train."
    )


def _one_class_per_row(name: str, config: Any) -> None:
    kind = getattr(config, "problem_type", None)
    if kind not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"`{name}` has a head for {kind or 'regression (one label)'}: purifying needs one class per row. Use a checkpoint "
            "with num_labels >= 2 and problem_type 'single_label_classification'."
        )


def _refuse_quantized(name: str, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"`{name}` holds quantized weights (quantization_config in config.json): they have no small steps, so nothing can be "
            "trained on. Use the checkpoint that it was quantized from."
        )


def _refuse_other_adapters(name: str, kinds: set[str]) -> None:
    if kinds != {_MERGED}:
        raise ValueError(
            f"`{name}` carries an adapter of kind {', '.join(sorted(kinds))}: only LoRA can be merged into the "
            "weights, which are what is purified. Purify its base and train the adapter anew, or use a LoRA."
        )


def _labels(model: Any) -> list[str]:
    return [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
