"""Hosts: Trainer classes that run objectives. Names are loaded on first use."""

import importlib
from typing import Any

_NAMES = {
    "DefenseMixin": "mixin",
    "DefendedTrainer": "hosts",
    "DefendedSeq2SeqTrainer": "hosts",
    "DefendedSFTTrainer": "sft",
    "defended": "hosts",
    "DeCETrainer": "named",
    "DeCESeq2SeqTrainer": "named",
    "DeCESFTTrainer": "sft",
    "load_objective": "state",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_NAMES)
