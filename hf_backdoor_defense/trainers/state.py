"""`defense.json` and `defense.safetensors`: what was trained with, beside every checkpoint and final model."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_backdoor_defense.fetching import fetched
from hf_backdoor_defense.objectives import Objective

CONFIG_NAME = "defense.json"
TENSORS_NAME = "defense.safetensors"
_O = TypeVar("_O", bound=Objective)


def save_objectives(objectives: Iterable[Objective], folder: str | Path, *, write: bool = True) -> None:
    """Write fields and state of all objectives. Call on every process (a state may be gathered); one has `write`.

    Each file appears whole or not at all.
    """
    entries, tensors = [], {}
    for objective in objectives:
        state = objective.state_dict()
        arrays = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in state.items() if key not in arrays}
        tensors.update({f"{objective.name}.{key}": value.detach().cpu().contiguous() for key, value in arrays.items()})
        entries.append({"config": objective.to_dict(), "state": plain})
    if not write:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{TENSORS_NAME}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / TENSORS_NAME)
    partial = folder / f".{CONFIG_NAME}.partial"
    partial.write_text(json.dumps({"version": 1, "objectives": entries}, indent=2) + "\n")
    os.replace(partial, folder / CONFIG_NAME)


def load_states(objectives: Sequence[Objective], folder: str | Path) -> None:
    """Give each objective the state a checkpoint holds for it.

    Raises:
        ValueError: the checkpoint was written with other methods or other fields.
    """
    entries, tensors = _read(folder)
    saved = [entry["config"] for entry in entries]
    given = [json.loads(json.dumps(objective.to_dict())) for objective in objectives]
    if saved != given:
        raise ValueError(
            f"The checkpoint `{folder}` was trained with {saved or 'no defense'}, this run has {given or 'no defense'}: "
            "resuming would mix the two. Use the same defense, or start in another folder."
        )
    for objective, entry in zip(objectives, entries, strict=True):
        objective.load_state_dict({**entry["state"], **_tensors_of(objective.name, tensors)})


def load_objective(
    kind: type[_O], folder: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> _O:
    """The objective of class `kind` that a model was trained with, with its fields and its state.

    Args:
        folder: a folder, or ORG/NAME on the Hub, where `revision` is a branch, tag or commit.

    Raises:
        ValueError: the folder holds no such objective, or was written by a newer version.
    """
    entries, tensors = _read(fetched(folder, [CONFIG_NAME, TENSORS_NAME], revision=revision, token=token))
    for entry in entries:
        if entry["config"]["name"] == kind.name:
            objective = kind.from_dict(entry["config"])
            objective.load_state_dict({**entry["state"], **_tensors_of(kind.name, tensors)})
            return objective
    found = ", ".join(entry["config"]["name"] for entry in entries) or "none"
    raise ValueError(f"`{folder}` was not trained with {kind.name} (found: {found}).")


def require_safetensors(checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose weights could only be read by unpickling. Raises ValueError."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"`{checkpoint}` is not a folder: there is no checkpoint to resume. Check the path.")
    weights = [path for path in folder.glob("*.safetensors") if path.name != TENSORS_NAME]
    if not weights:
        found = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
        raise ValueError(
            f"`{checkpoint}` has no safetensors weights (found: {found}): other formats can run code while loading and "
            "are not read here. Convert it with a tool you trust, in a sandbox, and save it with save_pretrained()."
        )


def load_renamed(model: Any, checkpoint: str | Path) -> None:
    """Load a checkpoint in which weights have other names than in the model; do nothing where all names are the model's.

    `save_pretrained` gives some models (ViT) the names that their published checkpoints have. `from_pretrained` takes that
    back, but the Trainer of transformers 5.23 does not when it resumes: it would leave these weights as it found them.
    """
    if not isinstance(model, PreTrainedModel):
        return
    known = set(model.state_dict())
    for path in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(path, "pt") as saved:
            if not known.issuperset(saved.keys()):
                model.load_state_dict(type(model).from_pretrained(checkpoint, config=model.config).state_dict())
                return


def _read(folder: str | Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"`{folder}` has no {CONFIG_NAME}: it was not written by a defended trainer. Check the path.")
    record = json.loads(path.read_text())
    if record.get("version") != 1:
        raise ValueError(f"`{path}` has version {record.get('version')!r}, this package reads 1. Upgrade the package.")
    return record["objectives"], load_file(Path(folder) / TENSORS_NAME)


def _tensors_of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
