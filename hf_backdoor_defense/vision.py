"""Image classifiers: loading checkpoints (safetensors only, no remote code), a small ViT for digits, and a collator.

`ImageCollator` does what the checkpoint's image processor does. A ViT's processor is one function per channel and pixel value
once no image is resized, so the collator asks it once for all 256 values and then looks them up: equal bit for bit, and
several times as fast. Processors without torchvision (PIL) are used everywhere, so that every machine sees the same pixels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_backdoor_defense.models import _guarded, warn_if_backdoored

OFFLINE_VIT = "offline:digits-vit"
_HEAD = "ForImageClassification"


def _named(num_labels: int, label_names: list[str] | None) -> dict[str, Any]:
    if num_labels < 2:
        raise ValueError(f"`num_labels` must be at least 2, got {num_labels}: one class leaves nothing to predict.")
    names = label_names or [str(i) for i in range(num_labels)]
    if len(names) != num_labels:
        raise ValueError(
            f"`label_names` must hold {num_labels} names, got {len(names)}: one for each class. Complete it."
        )
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def load_image_classifier(
    name: str, *, num_labels: int, label_names: list[str] | None = None, seed: int = 0
) -> tuple[PreTrainedModel, Any]:
    """An image classifier and its image processor. A new head is drawn from `seed`, the same on every machine.

    Args:
        name: Hub id, folder, or "offline:digits-vit" (`new_digits_vit`, untrained).

    Raises:
        ValueError: no such checkpoint, no network, no safetensors, no image processor, a regression or multi-label head,
            another number of labels than a finished head has, a model for something other than images.

    Example:
        >>> model, processor = load_image_classifier("offline:digits-vit", num_labels=10)
        >>> model.config.num_labels, processor.size["height"]
        (10, 8)
    """
    if name == OFFLINE_VIT:
        return new_digits_vit(num_labels, seed=seed, label_names=label_names)
    if name.startswith("offline:"):
        raise ValueError(f"There is no embedded image model `{name}`. There is one: {OFFLINE_VIT}.")

    def guarded(load: Callable[..., Any], **options: Any) -> Any:
        return _guarded(name, lambda: load(name, trust_remote_code=False, **options), embedded=OFFLINE_VIT)

    config = guarded(AutoConfig.from_pretrained)
    kind = getattr(config, "problem_type", None)
    has_head = any(_HEAD in architecture for architecture in config.architectures or [])
    if kind not in (None, "single_label_classification") or (has_head and config.num_labels == 1):
        raise ValueError(
            f"`{name}` has a head for {kind or 'regression (one label)'}: defenses need one class per row. Use a "
            "checkpoint with num_labels >= 2 and problem_type 'single_label_classification', or a plain encoder."
        )
    if has_head and config.num_labels != num_labels:
        raise ValueError(
            f"`{name}` has a head for {config.num_labels} classes, the task has {num_labels}: the head would have to be "
            "thrown away. Use the encoder it was made from, or map the labels to the head's."
        )
    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"`{name}` is a {config.model_type} model, which classifies no images. Use an image encoder or classifier, such as a "
            f"ViT, or {OFFLINE_VIT}."
        )
    named = {} if has_head else _named(num_labels, label_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = guarded(AutoModelForImageClassification.from_pretrained, use_safetensors=True, **named)
    processor = guarded(AutoImageProcessor.from_pretrained, backend="pil")
    warn_if_backdoored(name)
    return model, processor


def new_digits_vit(
    num_labels: int = 10,
    *,
    image_size: int = 8,
    channels: int = 1,
    seed: int = 0,
    label_names: list[str] | None = None,
) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    """A small untrained vision transformer (about 0.1 million weights) and its processor, for digits and other small images.

    Three layers, hidden size 64, four heads, no dropout. Patches are 2 x 2 pixels at 8 x 8 and 4 x 4 at 32 x 32. The processor
    does not resize: other sizes are refused, for a trigger of two pixels would not survive. Set `processor.do_resize = True`
    to allow them.

    Args:
        channels: 1 for gray, 3 for RGB.
        seed: draws the weights; the global random state is left as it was.

    Raises:
        ValueError: an image size that cannot be cut into at least 2 x 2 patches, other channels, less than two labels.

    Example:
        >>> model, processor = new_digits_vit()
        >>> model(**processor(PIL.Image.new("L", (8, 8)), return_tensors="pt")).logits.shape
        torch.Size([1, 10])
    """
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 (gray) or 3 (RGB), got {channels}: no other images are read.")
    start = max(2, image_size // 8)
    patch = next((size for size in range(start, image_size // 2 + 1) if image_size % size == 0), None)
    if patch is None:
        raise ValueError(
            f"`image_size` must be a multiple of a patch of at least {start} pixels, and hold 2 x 2 of them, got {image_size}. "
            "Resize the images, e.g. to 8, 16 or 32 pixels."
        )
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=image_size,
        patch_size=patch,
        num_channels=channels,
        **_named(num_labels, label_names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    half = [0.5] * channels
    processor = ViTImageProcessorPil(
        do_resize=False, size={"height": image_size, "width": image_size}, image_mean=half, image_std=half
    )
    return model.eval(), processor


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return None if size is None else (int(size[0]), int(size[1]))


class ImageCollator:
    """From rows with `image` (PIL, or uint8 [H, W] or [H, W, C]) and `label` or `labels`, if any, to a batch for the model.

    Gray images are repeated for a model that takes RGB. With a Trainer, set `remove_unused_columns=False`: a model's forward
    knows no `image`.

    Raises:
        ValueError: at construction, a processor made for other sizes or channels than the model; on use, images that are
            missing, RGB where the model takes gray, or of another size where the processor does not resize.

    Example:
        >>> model, processor = new_digits_vit()
        >>> collate = ImageCollator(processor, model.config)
        >>> batch = collate([{"image": PIL.Image.new("L", (8, 8), color=255), "label": 3}])
        >>> batch["pixel_values"].shape, batch["pixel_values"].max().item(), batch["labels"]
        (torch.Size([1, 1, 8, 8]), 1.0, tensor([3]))
    """

    def __init__(self, processor: Any, model_config: Any) -> None:
        self.processor = processor
        self.channels = int(getattr(model_config, "num_channels", 3))
        self.size = _pair(getattr(model_config, "image_size", None))
        self.crops = bool(getattr(processor, "do_center_crop", False))
        self.resizes = bool(getattr(processor, "do_resize", False))
        made = getattr(processor, "size", None) or {}
        made_for = (made["height"], made["width"]) if "height" in made and "width" in made else None
        if self.resizes and not self.crops and self.size and made_for and made_for != self.size:
            raise ValueError(
                f"the image processor makes images of {made_for} pixels, the model takes {self.size}: they belong to different "
                "models. Load the processor from the model's folder."
            )
        mean = getattr(processor, "image_mean", None)
        if getattr(processor, "do_normalize", False) and isinstance(mean, list | tuple) and len(mean) != self.channels:
            raise ValueError(
                f"the image processor has means for {len(mean)} channels, the model takes {self.channels}: they belong to "
                "different models. Load the processor from the model's folder, or give it one mean and deviation per channel."
            )
        self._table = self._values() if type(processor).__name__.startswith("ViTImageProcessor") else None

    def _values(self) -> np.ndarray:
        """What the processor makes of each pixel value, float32 [C, 256]."""
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(self.channels, axis=2)
        return self._processed([ramp], do_resize=False).numpy().reshape(self.channels, 256)

    def _processed(self, images: list[np.ndarray], **options: Any) -> Tensor:
        return self.processor(images=images, input_data_format="channels_last", return_tensors="pt", **options)[
            "pixel_values"
        ].float()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [self._array(row, position) for position, row in enumerate(rows)]
        sizes = {image.shape[:2] for image in images}
        if self._table is not None and len(sizes) == 1 and (self.size is None or sizes == {self.size}):
            stacked = np.stack(images)  # [B, H, W, C]
            channels = [table[stacked[..., c]] for c, table in enumerate(self._table)]
            batch = {"pixel_values": torch.from_numpy(np.stack(channels, axis=1))}
        else:
            batch = {"pixel_values": self._processed(images)}
        for name in ("label", "labels"):
            if all(row.get(name) is not None for row in rows):
                batch["labels"] = torch.tensor([int(row[name]) for row in rows])
        return batch

    def _array(self, row: dict[str, Any], position: int) -> np.ndarray:
        """uint8 [H, W, C] with the model's channels."""
        image = row.get("image")
        if isinstance(image, PIL.Image.Image) and image.mode in ("L", "RGB"):
            image = np.asarray(image)
        got = f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', []))}"
        got = f"PIL mode {image.mode!r}" if isinstance(image, PIL.Image.Image) else got
        array = image[..., None] if isinstance(image, np.ndarray) and image.ndim == 2 else image
        if (
            not isinstance(array, np.ndarray)
            or array.dtype != np.uint8
            or array.ndim != 3
            or array.shape[2] not in (1, 3)
        ):
            raise ValueError(
                f"`image` must be a gray or RGB image (PIL, or uint8 [H, W] or [H, W, C]) in every row, got {got} in row "
                f"{position} of the batch. Load images with data.load_images, or convert them: image.convert('RGB')."
            )
        if array.shape[2] > self.channels:
            raise ValueError(
                f"the model takes gray images, got RGB in row {position} of the batch: which gray to make of three colors is "
                "yours to say. Convert the images, e.g. image.convert('L'), or use a model with three channels."
            )
        if not (self.resizes or self.crops) and self.size is not None and array.shape[:2] != self.size:
            raise ValueError(
                f"images must be {self.size[0]} x {self.size[1]} pixels, got {array.shape[0]} x {array.shape[1]} in row "
                f"{position} of the batch: the model takes one size and its processor does not resize. Resize the images, or set "
                "processor.do_resize = True."
            )
        return array.repeat(self.channels, axis=2) if array.shape[2] < self.channels else array
