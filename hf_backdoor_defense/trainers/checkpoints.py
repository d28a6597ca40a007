"""Which checkpoint a run can go on with: the newest that was written to its end, by enough processes.

A process that is killed while it saves, or a disk that fills, leaves a checkpoint that is cut short. The Trainer would take it
for the newest one and fail, or go on with what is there. What is looked at, of the files that the Trainer, peft, tokenizers and
this package write (a user's own may lie beside them):

| file | whole when |
|---|---|
| `*.safetensors` | as long as its header says |
| `*.pt`, `*.pth`, `*.bin`: zip archives (optimizer, schedule, random state) | the archive's table, at its end, can be read |
| `*.json` | JSON |

`trainer_state.json` comes last. Where it is there, and neither optimizer nor random state is, `save_only_model` was set.
"""

import fnmatch
import json
import logging
import struct
import zipfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NEEDED = ("trainer_state.json", "defense.json", "defense.safetensors")
_INDEXES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
_WRITTEN = (
    *NEEDED, *_INDEXES, "model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors",
    "adapter_model-*-of-*.safetensors", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "pytorch_model_fsdp.bin", "training_args.bin", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_OF_A_RUN = ("optimizer.pt", "optimizer.bin", "optimizer_0", "scheduler.pt")  # not there under save_only_model


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, newest first."""
    found = [
        path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def damage(checkpoint: str | Path) -> list[str]:
    """What is missing in a checkpoint or was cut short; empty where it was written to its end.

    >>> damage("nowhere")
    ['trainer_state.json (missing)', 'defense.json (missing)', 'defense.safetensors (missing)']
    """
    folder = Path(checkpoint)
    found = [f"{name} (missing)" for name in (*NEEDED, *_random_states(folder)) if not (folder / name).is_file()]
    for path in sorted(folder.glob("*")):
        if any(fnmatch.fnmatchcase(path.name, name) for name in _WRITTEN) and path.is_file() and not _is_whole(path):
            found.append(f"{path.name} (cut short)")
    for index in (folder / name for name in _INDEXES):
        if index.is_file() and f"{index.name} (cut short)" not in found:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            found += [f"{name} (missing)" for name in shards if not (folder / name).is_file()]
    return found


def obstacle(checkpoint: str | Path, *, world_size: int = 1) -> str | None:
    """Why no run of so many processes can go on with a checkpoint: a sentence whose subject is the checkpoint; None if one can.

    >>> obstacle("nowhere").partition(":")[0]
    'was not written to its end (trainer_state.json (missing), defense.json (missing), defense.safetensors (missing))'
    """
    folder = Path(checkpoint)
    if wrong := damage(folder):
        return f"was not written to its end ({', '.join(wrong)}): a run would go on with a part. Delete it."
    names = _random_states(folder)
    if not names:
        return (
            "holds the model only (save_only_model: no optimizer, no random state): nothing can go on from it exactly. Train "
            "with save_only_model=False for checkpoints to resume, or load its model and start a new run."
        )
    if 1 < len(names) < world_size:
        return (
            f"was saved by {len(names)} processes, and {world_size} go on with it: the random states of the others are missing. "
            f"Start at most {len(names)}."
        )
    return None


def newest(folder: str | Path, *, world_size: int = 1) -> Path | None:
    """The newest checkpoint of an output folder that so many processes can go on with; those passed over are logged, and none
    is removed."""
    for path in checkpoints(folder):
        why = obstacle(path, world_size=world_size)
        if why is None:
            return path
        logger.warning("%s %s It is passed over for the one before it.", path, why)
    return None


def _random_states(folder: Path) -> list[str]:
    """The files of random states that belong to a checkpoint, there or not; none where only the model was to be saved."""
    ranks = [rank for path in folder.glob("rng_state_*.pth") if (rank := path.stem.rpartition("_")[2]).isdecimal()]
    if ranks:  # several processes saved it, each its own
        return [f"rng_state_{rank}.pth" for rank in range(max(2, 1 + max(map(int, ranks))))]
    is_of_a_run = any((folder / name).exists() for name in ("rng_state.pth", *_OF_A_RUN))
    return ["rng_state.pth"] if is_of_a_run else []


def _is_whole(path: Path) -> bool:
    reader: Any = {
        ".safetensors": _safetensors, ".json": _json, ".pt": zipfile.is_zipfile, ".pth": zipfile.is_zipfile,
        ".bin": zipfile.is_zipfile,
    }.get(path.suffix)  # fmt: skip
    return True if reader is None else bool(reader(path))


def _safetensors(path: Path) -> bool:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def _json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
