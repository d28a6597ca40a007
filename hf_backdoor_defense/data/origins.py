"""Where a model in memory came from: its folder, for as long as its weights are the folder's.

    unchanged(model, folder)  <=>  the first rows of every stored tensor that the model has too are the model's, at least one

What a file beside the weights says (the formatter of a training) is about those weights. A model that was trained further, or
into which an adapter was merged, still bears the name of its base's folder; nothing else on it says what happened.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_backdoor_defense.fetching import fetched, is_repository

ROWS = 8  # of each tensor: what changes a matrix without changing these is no training and no adapter

logger = logging.getLogger(__name__)


def origin(model: Any, names: Sequence[str]) -> Path | None:
    """The folder that a model was loaded from, with those of the files `names` that are there; None where it is not known, cannot
    be read, or holds other weights by now.

    A repository of the Hub is asked at the commit that was loaded, and only where there is one: a model that came from a folder
    has none, even if that folder was moved since and its name looks like a repository's.
    """
    place = str(getattr(model, "name_or_path", None) or "")
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    folder = Path(place)
    if not place:
        return None
    if commit is not None and is_repository(place):
        try:
            folder = fetched(place, names, revision=commit)  # the folder in the cache, where the weights lie
        except ValueError as error:
            logger.info("What stands beside the weights of %s is not known: %s", place, error)
            return None
    return folder if folder.is_dir() and unchanged(model, folder) else None


def unchanged(model: Any, folder: Path) -> bool:
    """Whether a model's weights are those of the folder's safetensors, in the model's precision.

    Tensors of another shape or kind (quantized, sharded, not loaded) are passed over.
    """
    here, compared = model.state_dict(), 0
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (no mapping)
                    own = here.get(name)
                    if type(own) is not torch.Tensor or own.is_meta or not own.ndim:
                        continue
                    slices = stored.get_slice(name)
                    if list(own.shape) != list(slices.get_shape()):
                        continue
                    if not torch.equal(own[:ROWS].cpu(), slices[:ROWS].to(own.dtype)):
                        return False
                    compared += 1
    except (OSError, SafetensorError):
        return False
    return compared > 0
