"""Which checkpoint a run can go on with: the newest that was written to its end.

A process that is killed while it saves, or a disk that fills, leaves a checkpoint that is cut short. The Trainer would take it
for the newest one and fail, or go on with what is there. What is looked at:

| file | whole when |
|---|---|
| `*.safetensors` | as long as its header says |
| `*.pt`, `*.pth`, `*.bin`: zip archives (optimizer, schedule, random state) | the archive's table, at its end, can be read |
| `trainer_state.json`, `defense.json` | JSON |
"""

import json
import logging
import struct
import zipfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NEEDED = ("trainer_state.json", "defense.json", "defense.safetensors")


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, newest first."""
    found = [
        path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def damage(checkpoint: str | Path, *, world_size: int = 1) -> list[str]:
    """What is missing in a checkpoint or was cut short; empty where it is whole.

    Args:
        world_size: processes that go on with it. Those that saved it may have been one, or more than these.

    >>> damage("nowhere")
    ['trainer_state.json (missing)', 'defense.json (missing)', 'defense.safetensors (missing)', 'rng_state.pth (missing)']
    """
    folder = Path(checkpoint)
    names = ["rng_state.pth"]
    if (folder / "rng_state_0.pth").is_file():  # several processes saved it, each its own
        names = [f"rng_state_{rank}.pth" for rank in range(max(2, world_size))]
    found = [f"{name} (missing)" for name in (*NEEDED, *names) if not (folder / name).is_file()]
    for path in sorted(folder.glob("*")):
        if path.is_file() and not _is_whole(path):
            found.append(f"{path.name} (cut short)")
    for index in folder.glob("*.safetensors.index.json"):
        if f"{index.name} (cut short)" not in found:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            found += [f"{name} (missing)" for name in shards if not (folder / name).is_file()]
    return found


def newest(folder: str | Path, *, world_size: int = 1) -> Path | None:
    """The newest checkpoint of an output folder that is whole; those passed over are logged, and none is removed."""
    for path in checkpoints(folder):
        wrong = damage(path, world_size=world_size)
        if not wrong:
            return path
        logger.warning(
            "%s was not written to its end (%s): it is passed over, and the one before it is used. Delete it.",
            path,
            ", ".join(wrong),
        )
    return None


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
