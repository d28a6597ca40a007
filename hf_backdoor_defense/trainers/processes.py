"""One process or many: whether they are as many as were asked for, train together and mean the same training.

| what goes wrong silently | how it is told |
|---|---|
| `torchrun` without `ACCELERATE_USE_CPU=true` on a machine without GPUs: every process trains alone | `WORLD_SIZE` > processes |
| `accelerate launch --cpu --num_processes 2`: one process | the launcher's variables without `WORLD_SIZE` |
| `ddp_backend="gloo"` alone: rows are dealt out, gradients are never summed | several processes of no distributed type |
| FSDP or DeepSpeed on CPUs: plain DDP | the distributed type is another |
| other seeds, rows or methods on one process | `agreement`, one exchange before the first step |
| the sampler repeats rows until the last batch divides | `repeated` |
| `group_by_length` draws its order from each process's own random state, which dropout moves apart | `one_order` |
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch.utils.data import Sampler

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX
from hf_backdoor_defense.objectives import overrides

logger = logging.getLogger(__name__)

_WAYS = (
    "On GPUs: `accelerate launch --num_processes N script.py`. On CPUs: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N "
    "script.py`, or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N script.py`."
)


def process_reasons(trainer: Any) -> list[str]:
    """Why these processes are not the ones that were asked for; empty when they are. Talks to no other process."""
    here = int(trainer.accelerator.num_processes)
    asked = int(os.environ.get("WORLD_SIZE") or 1)
    group = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if here > 1 and trainer.accelerator.distributed_type == DistributedType.NO:
        return [
            f"{here} processes share the rows, but accelerate wraps no model for them (ddp_backend={trainer.args.ddp_backend!r} "
            f"without a device that it serves): gradients would never be summed. Leave `ddp_backend` out. {_WAYS}"
        ]
    if max(asked, group) > here:
        return [
            f"{max(asked, group)} processes were started and this training has {here}: each would train alone and write to the "
            f"same folder. {_WAYS}"
        ]
    is_alone = (
        here == 1 and "WORLD_SIZE" not in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    )
    if is_alone and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        return [
            "accelerate was asked for several processes and started one, as it does for --cpu with --num_processes. Set "
            f"--num_processes 1. {_WAYS}"
        ]
    return _ignored_engine(trainer) if here > 1 else []


def _ignored_engine(trainer: Any) -> list[str]:
    """FSDP and DeepSpeed where accelerate passes over them: on CPUs it trains by DDP instead, without a word."""
    engines = {DistributedType.FSDP: ("fsdp", "FSDP"), DistributedType.DEEPSPEED: ("deepspeed", "DeepSpeed")}
    for kind, (option, name) in engines.items():
        is_asked = getattr(trainer.args, option, None) or os.environ.get(f"ACCELERATE_USE_{option.upper()}") == "true"
        if is_asked and trainer.accelerator.distributed_type != kind:
            return [
                f"{name} was asked for, and accelerate set up {trainer.accelerator.distributed_type.value}: it leaves {name} out "
                f"where it finds no device for it. Start it where there are GPUs, or leave `{option}` out and train by DDP."
            ]
    return []


def require_one_process(what: str, instead: str) -> None:
    """Refuse several processes before anything is read or written. Raises ValueError.

    >>> require_one_process("purify()", "Start it once.")
    """
    asked = int(os.environ.get("WORLD_SIZE") or 1)
    if asked > 1:
        raise ValueError(
            f"{what} runs in one process, and {asked} were started (WORLD_SIZE): each would do all of it and write to the same "
            f"folder. {instead}"
        )


def agreed(trainer: Any, reasons: list[str], *, checkpoint: str | None = None) -> list[str]:
    """The reasons of all processes, and where they differ in what must be the same; equal on every process.

    One exchange of a few hundred bytes, none with a single process. `checkpoint`: where this process would go on.
    """
    if trainer.accelerator.distributed_type == DistributedType.NO or trainer.accelerator.num_processes == 1:
        return reasons
    rows = trainer.train_dataset
    mine = {
        "seed": trainer.args.seed,
        "data_seed": trainer.args.data_seed,
        "rows": len(rows) if hasattr(rows, "__len__") else "a stream",
        "content of the rows": _rows_digest(rows),
        "weights": _weights_digest(trainer),
        "checkpoint": None if checkpoint is None else Path(checkpoint).name,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "max_steps": trainer.args.max_steps,
        "num_train_epochs": trainer.args.num_train_epochs,
        "learning_rate": trainer.args.learning_rate,
        "defense": json.dumps([objective.to_dict() for objective in trainer.objectives], sort_keys=True),
    }
    everyone = gather_object([(reasons, mine)])
    found = list(dict.fromkeys(reason for theirs, _ in everyone for reason in theirs))
    for name in mine:
        values = [facts[name] for _, facts in everyone]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{value} on process {rank}" for rank, value in enumerate(values))
            found.append(
                f"`{name}` must be the same on every process, got {shown}: they would train different models and average them. "
                "Build data, arguments and defense from the same values everywhere; rows are dealt out by the Trainer."
            )
    return found


def _rows_digest(rows: Any) -> str:
    """Of the row ids and of the plain values of three rows, in their order; empty where there are none to look at."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or not len(rows):
        return ""
    digest = hashlib.blake2b(digest_size=8)
    if "row_id" in (getattr(rows, "column_names", None) or []):
        digest.update(str(list(rows["row_id"])).encode())
    for place in (0, len(rows) // 2, len(rows) - 1):
        row = rows[place]
        for name, value in row.items() if isinstance(row, Mapping) else ():
            if isinstance(value, str | int | float | list):
                digest.update(f"{name}={value}".encode())
    return digest.hexdigest()


def _weights_digest(trainer: Any) -> str:
    """Of the sums of all weights, where a method looks at them before DDP makes them those of the first process; else empty."""
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # which give out the weights in their own way
    if trainer.accelerator.distributed_type in kinds or not any(overrides(o, "prepare") for o in trainer.objectives):
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in trainer.model.named_parameters():
        digest.update(f"{name} {weight.detach().double().sum().item()}".encode())
    return digest.hexdigest()


def one_order(trainer: Any, loader: Any) -> Any:
    """The loader of training batches, in an order that is the same on every process.

    A sampler without a generator of its own (transformers 5.23: `group_by_length`) draws from the state that dropout and masks
    draw from too. After the first epoch processes would deal out rows from different orders: some twice, some never. Here seed
    and epoch alone decide the order, on a resumed run as well. A single process keeps the Trainer's order.
    """
    found = loader
    while getattr(found, "batch_sampler", None) is not None:
        found = found.batch_sampler
    sampler = getattr(found, "sampler", None)
    has_none = getattr(sampler, "generator", loader) is None and not hasattr(sampler, "set_epoch")
    if trainer.accelerator.num_processes > 1 and has_none:
        found.sampler = _ByEpoch(sampler, trainer)
    return loader


class _ByEpoch(Sampler):
    """Another sampler, seeded anew in every epoch. The epoch is the Trainer's own: accelerate tells none after a resume."""

    def __init__(self, sampler: Any, trainer: Any) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __iter__(self) -> Any:
        args = self.trainer.args
        seed = args.seed if args.data_seed is None else args.data_seed
        epoch = int((self.trainer.state.epoch or 0.0) + 1e-6)
        self.sampler.generator = torch.Generator().manual_seed(seed + epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


@dataclass(frozen=True)
class LastBatch:
    """The last batch of an epoch over all processes: how many of its rows are new (0: all), and rows of one process's batch."""

    new: int = 0
    size: int = 0


def last_batch(trainer: Any, loader: Any) -> LastBatch:
    """Of the loader of training batches, before it is iterated: a resumed epoch's is another, and does not know its length."""
    accelerator: Any = trainer.accelerator
    total: Any = getattr(loader, "total_batch_size", None)
    rows: Any = getattr(loader, "dataset", None)
    args = trainer.args
    is_filled = getattr(accelerator, "even_batches", True) and not args.dataloader_drop_last
    is_dealt_otherwise = args.train_sampling_strategy == "batch_rebalance"  # uneven batches, no row twice
    if (
        accelerator.num_processes == 1
        or not total
        or not is_filled
        or is_dealt_otherwise
        or not hasattr(rows, "__len__")
    ):
        return LastBatch()
    return LastBatch(len(rows) % total, total // accelerator.num_processes)


def repeated(trainer: Any, last: LastBatch) -> int:
    """How many rows at the end of this process's batch were only repeated to make the epoch's last global batch whole.

    Ask right after the batch was fetched. 0 in every other batch, with one process, and for a stream without a length.
    """
    if not last.new or not trainer.accelerator.gradient_state.end_of_dataloader:
        return 0
    first = trainer.accelerator.process_index * last.size
    return last.size - min(max(last.new - first, 0), last.size)


class StepRows:
    """How many rows of an optimizer step have a label: all micro-batches, all processes. Counted where somebody asks.

    >>> batches = [{"labels": torch.tensor([[-100, 4], [-100, -100]])}, {"labels": torch.tensor([[5, 6]])}]
    >>> StepRows(None, batches).here()
    tensor(2)
    """

    def __init__(self, trainer: Any, batches: Sequence[Any]) -> None:
        self._trainer = trainer
        self._labels = [
            b["labels"] for b in batches if isinstance(b, Mapping) and isinstance(b.get("labels"), torch.Tensor)
        ]
        self._found: torch.Tensor | None = None

    def here(self) -> torch.Tensor:
        """On this process."""
        return sum(
            ((labels.reshape(len(labels), -1) != IGNORE_INDEX).any(-1).sum() for labels in self._labels),
            torch.zeros((), dtype=torch.long),
        )  # type: ignore[return-value]

    def per_process(self, like: torch.Tensor, *, accumulation: int) -> torch.Tensor:
        """A scalar that divides a sum over the rows of a micro-batch, where processes are averaged. Call it on all of them.

        `like`: [rows] values of the micro-batch; outside of a training they alone, times `accumulation`, are what there is.
        """
        if not self._labels:
            return like.new_full((), max(len(like), 1) * accumulation)
        if self._found is None:
            accelerator: Any = self._trainer.accelerator
            rows = accelerator.gather(self.here().to(like.device).reshape(1)).sum().clamp(min=1)
            self._found = rows / accelerator.num_processes
        return self._found.to(like)


def without_repeated(trainer: Any, batch: Any, last: LastBatch) -> Any:
    """The batch that was just fetched, with the labels of repeated rows taken out."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    count = repeated(trainer, last)
    if not count or not isinstance(labels, torch.Tensor) or not labels.ndim:
        return batch
    if len(labels) != last.size:  # rows were joined or cut up: packing without padding, a collator of one's own
        logger.warning(
            "The last batch of an epoch holds %d labeled sequences where %d rows were dealt out: which of them the sampler only "
            "repeated cannot be told, and they are learned twice. Choose rows that divide by the batch over all processes.",
            len(labels), last.size,
        )  # fmt: skip
    else:
        batch["labels"] = labels.clone()
        batch["labels"][-count:] = IGNORE_INDEX
    return batch
