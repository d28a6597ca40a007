"""Small image classifiers and rows, and a host as purifiers want it: SGD with momentum, no decay, no clipping."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import arguments

LABELS = 5


def vit(labels: int = LABELS, seed: int = 0, layers: int = 1, dropout: float = 0.0) -> ViTForImageClassification:
    """8 x 8 pixels of one channel, in four patches."""
    set_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.2,
        num_labels=labels,
    )  # fmt: skip
    return ViTForImageClassification(config)


def resnet(labels: int = LABELS, seed: int = 0) -> ResNetForImageClassification:
    """Convolutions with batch normalization; the Linear of its head is `classifier.1`."""
    set_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=labels
    )
    return ResNetForImageClassification(config)


def image_list(count: int = 24, labels: int = LABELS, seed: int = 0) -> list[dict[str, Any]]:
    """A picture per class under noise. Labels are in no order and of no equal number."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(labels, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    rows = []
    for i in range(count):
        label = i if i < labels else int(torch.randint(labels, (1,), generator=generator))
        pixels = pictures[label] + 0.5 * torch.randn(1, 8, 8, generator=generator)
        rows.append({"pixel_values": pixels.tolist(), "label": label, "row_id": 1000 + i})
    return rows


def image_rows(count: int = 24, labels: int = LABELS, seed: int = 0) -> Dataset:
    return Dataset.from_list(image_list(count, labels, seed))


def stack(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The collator: `pixel_values` [batch, 1, 8, 8], and `labels` [batch] where the rows have any."""
    batch = {"pixel_values": torch.tensor([row["pixel_values"] for row in rows])}
    key = next((name for name in ("label", "labels") if name in rows[0]), None)
    return batch if key is None else {**batch, "labels": torch.tensor([row[key] for row in rows])}


class Watched(list):
    """Rows that note which of them were asked for, in order: the batches a host saw, whoever drew them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.asked: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)

    def batches(self, size: int, start: int = 0) -> list[dict[str, Tensor]]:
        """What was asked for from the `start`-th question on, in batches; every pass over the rows ends with a short one."""
        asked, batches = self.asked[start:], []
        for first in range(0, len(asked), len(self)):
            epoch = asked[first : first + len(self)]
            batches += [
                stack([super(Watched, self).__getitem__(i) for i in epoch[at : at + size]])
                for at in range(0, len(epoch), size)
            ]
        return batches


def host(
    folder: Path,
    defense: Any,
    *,
    model: Any = None,
    rows: Any = None,
    lr: float = 0.05,
    momentum: float = 0.9,
    collator: Any = stack,
    aux: dict[str, Any] | None = None,
    **changes: Any,
) -> DefendedTrainer:
    return DefendedTrainer(
        vit() if model is None else model,
        args=arguments(folder, learning_rate=lr, **changes),
        train_dataset=image_rows() if rows is None else rows,
        data_collator=collator,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": lr, "momentum": momentum}),
        aux_datasets=aux,
        defense=defense,
    )


def fake(model: Any, accelerator: Any = None, **changes: Any) -> SimpleNamespace:
    """What `check` reads of a Trainer, where the real one cannot be had on a CPU."""
    args = {
        "weight_decay": 0.0, "load_best_model_at_end": False, "gradient_accumulation_steps": 1, "world_size": 1, "seed": 0,
        "optim": "sgd", "max_grad_norm": 0.0, "fp16": False, "bf16": False, **changes,
    }  # fmt: skip
    state = SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin": None, **(accelerator or {})})
    return SimpleNamespace(
        model=model, args=SimpleNamespace(**args), accelerator=SimpleNamespace(state=state), train_dataset=image_rows(),
        optimizer_cls_and_kwargs=None, objectives=[], aux_datasets={}, optimizer=None, is_fsdp_enabled=False,
    )  # fmt: skip
