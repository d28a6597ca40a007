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

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch.utils.data import Sampler

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX

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
    is_alone = here == 1 and "WORLD_SIZE" not in os.environ
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


def agreed(trainer: Any, reasons: list[str]) -> list[str]:
    """The reasons of all processes, and where they differ in what must be the same; equal on every process.

    One exchange of a few hundred bytes, none with a single process.
    """
    if trainer.accelerator.distributed_type == DistributedType.NO or trainer.accelerator.num_processes == 1:
        return reasons
    rows = trainer.train_dataset
    mine = {
        "seed": trainer.args.seed,
        "data_seed": trainer.args.data_seed,
        "rows": len(rows) if hasattr(rows, "__len__") else "a stream",
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


def repeated(trainer: Any, batch_size: int) -> int:
    """How many rows at the end of this process's batch were only repeated to make the epoch's last global batch whole.

    Ask right after the batch was fetched. 0 in every other batch, with one process, and for a stream without a length.
    """
    state, here = trainer.accelerator.gradient_state, trainer.accelerator.num_processes
    if here == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return 0
    first = trainer.accelerator.process_index * batch_size
    return batch_size - min(max(state.remainder - first, 0), batch_size)


def without_repeated(trainer: Any, batch: Any) -> Any:
    """The batch that was just fetched, with the labels of repeated rows taken out."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or not labels.ndim:
        return batch
    count = repeated(trainer, len(labels))
    if count:
        batch["labels"] = labels.clone()
        batch["labels"][-count:] = IGNORE_INDEX
    return batch
