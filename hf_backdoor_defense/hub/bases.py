"""What a model was made from, as the Hub knows it.

| a run says | on the Hub it is | its card is read from |
|---|---|---|
| `offline:minilm` | `sentence-transformers/all-MiniLM-L6-v2` | the installed package |
| `owner/name` | itself | the Hub |
| a folder (`./name`, `/name`, …) | what its card or `publication.json` names, or nothing | the folder's `README.md` |
| another `offline:…`, or nothing | nothing | nowhere |
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from hf_backdoor_defense.hub.evidence import PUBLICATION

OFFLINE = "offline:"
ON_HUB = {"offline:minilm": "sentence-transformers/all-MiniLM-L6-v2"}


def is_hub_id(name: Any) -> bool:
    """Whether the Hub could have a repository of that name; nobody is asked whether it has.

    Example:
        >>> [is_hub_id(name) for name in ("owner/name", "bert-base-uncased", "./name", "a/b/c", "offline:minilm", "")]
        [True, True, False, False, False, False]
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def base_on_hub(base_model: str) -> str | None:
    """The Hub id of a base, or None where it has none.

    Args:
        base_model: as a run names it.

    Example:
        >>> base_on_hub("offline:minilm"), base_on_hub("offline:digits-vit"), base_on_hub("owner/name"), base_on_hub("")
        ('sentence-transformers/all-MiniLM-L6-v2', None, 'owner/name', None)
    """
    if base_model in ON_HUB:
        return ON_HUB[base_model]
    if is_hub_id(base_model):
        return base_model
    return _named_by(Path(base_model).expanduser()) if is_folder(base_model) else None


def is_folder(base: str) -> bool:
    """Whether a base is a folder that is there. A run says `./name` of a relative one: `owner/name` is the Hub's everywhere."""
    return bool(base) and not base.startswith(OFFLINE) and not is_hub_id(base) and Path(base).expanduser().is_dir()


def _named_by(folder: Path) -> str | None:
    """What a folder says that it is, or that it was made from."""
    try:
        found = json.loads((folder / PUBLICATION).read_bytes())["repo_id"]
    except (OSError, ValueError, KeyError, TypeError):
        found = card_metadata(str(folder)).get("base_model")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) and is_hub_id(found) else None


def card_metadata(base: str, *, api: HfApi | None = None) -> dict[str, Any]:
    """The metadata of a base's card, {} where there is no card, no metadata in it, or no way to it.

    Args:
        base: as a run names it.
        api: for a base on the Hub; None takes the environment's server and token.

    Example:
        >>> card_metadata("")
        {}
    """
    path = _readme(base, api)
    if path is None:
        return {}
    try:
        return dict(metadata_load(path) or {})
    except (OSError, ValueError, YAMLError):  # a broken card says as much as none
        return {}


def _readme(base: str, api: HfApi | None) -> Path | None:
    if base in ON_HUB:
        from hf_backdoor_defense.models import resolve  # loads torch

        try:
            return _file(Path(resolve(base)))
        except ValueError:  # the package is not installed
            return None
    if is_folder(base):
        return _file(Path(base).expanduser())
    if not is_hub_id(base):
        return None
    try:
        return Path((api or HfApi()).hf_hub_download(base, "README.md"))
    except (OSError, ValueError):  # the client's errors of network, rights and absence are kinds of OSError
        return None


def _file(folder: Path) -> Path | None:
    path = folder / "README.md"
    return path if path.is_file() else None
