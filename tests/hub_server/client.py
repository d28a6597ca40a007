"""The client of a test, pointed at a `HubServer`."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, hf_api

from tests.hub_server.server import HubServer


def use(hub: HubServer, monkeypatch: pytest.MonkeyPatch, *, cache: Any, token: str | None = None) -> HfApi:
    """Let huggingface_hub in this process speak to `hub`, and to it alone, until the test ends.

    Its address is read once at import, so its constants are replaced, and the clients that its module-level functions and
    transformers keep. Waits between attempts and progress bars are left out, Xet is off, downloads are cached in `cache`.
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    if "transformers.utils.hub" in sys.modules:
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    # By the module: its name in the package is that of the class inside.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True)
    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", hurried)
    monkeypatch.setenv("HF_TOKEN", hub.token if token is None else token)
    return HfApi(endpoint=hub.url, token=hub.token if token is None else token)
