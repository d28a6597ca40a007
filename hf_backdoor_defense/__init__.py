"""Defenses against backdoors in data and weights, as a plugin for Hugging Face Trainers.

>>> from hf_backdoor_defense import DeCETrainer as Trainer

Importing this package loads neither torch nor transformers: public names are imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Objective": "objectives",
    "Step": "objectives",
    "Ranking": "objectives",
    "Projection": "objectives",
    "DefendedTrainer": "trainers.hosts",
    "DefendedSeq2SeqTrainer": "trainers.hosts",
    "DefendedSFTTrainer": "trainers.sft",
    "defended": "trainers.hosts",
    "DeCETrainer": "trainers.named",
    "DeCESeq2SeqTrainer": "trainers.named",
    "DeCESFTTrainer": "trainers.sft",
    "PSIMTrainer": "trainers.named",
    "RecipeTrainer": "trainers.named",
    "load_objective": "trainers.state",
    "load_defenses": "hub.load",
    "publish": "hub.publish",
    "verify": "hub.verify",
    "PSIM": "defenses.psim",
    "Filter": "filters",
    "PSIMFilter": "input_filters.psim",
    "PsimNotUsable": "input_filters.psim",
    "ConfidenceFilter": "input_filters.confidence",
    "apply_strategy": "adapters",
    "RECIPE": "defenses.recipe",
    "D3": "defenses.d3",
    "D3Trainer": "trainers.named",
    "ULRL": "defenses.ulrl",
    "ULRLTrainer": "trainers.named",
    "FTSAM": "defenses.ft_sam",
    "CROW": "defenses.crow",
    "CROWTrainer": "trainers.named",
    "CROWSFTTrainer": "trainers.sft",
    "purify": "experiment.purify",
    "PurifyResult": "experiment.purify",
    "load_pretrained_whole": "pretrained",
    "save_pretrained_whole": "pretrained",
    "warm_up_mlm_head": "warm_up",
    "DeCE": "defenses.dece",
    "TrajectoryFilter": "defenses.trajectory",
    "BadNets": "attacks.triggers",
    "InSent": "attacks.triggers",
    "poison_dataset": "attacks.poisoning",
    "trigger_dataset": "attacks.poisoning",
    "BackdoorEvalCallback": "evaluation.callback",
    "evaluate_backdoor": "evaluation.evaluator",
    "GenerationEvalCallback": "evaluation.callback",
    "evaluate_generation": "evaluation.generation",
    "load": "data.sources",
}
__all__ = ["__version__", *_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
