"""Data of a run: `load` gives every row a stable `row_id`; `describe` and `baselines` say what was loaded.

Names are loaded on first use, so that importing the package stays cheap.
"""

import importlib
from typing import Any

_NAMES = {
    "load": "sources",
    "load_images": "images",
    "describe": "summary",
    "describe_images": "images",
    "baselines": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_NAMES)
