"""Names of methods, for the command line, the cards and the test matrix. Nothing else may look here."""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names are read where torch is not wanted: `hfbd list`
    from hf_backdoor_defense.filters import Filter
    from hf_backdoor_defense.objectives import Objective

DEFENSES = {
    "dece": "hf_backdoor_defense.defenses.dece:DeCE",
    "trajectory": "hf_backdoor_defense.defenses.trajectory:TrajectoryFilter",
}
# Losses that a defense is compared with, at the same rate, steps and data.
COMPARATORS = {
    "gce": "hf_backdoor_defense.defenses.robust_losses:GCE",
    "in_trust": "hf_backdoor_defense.defenses.robust_losses:InTrust",
    "focal": "hf_backdoor_defense.defenses.robust_losses:Focal",
    "smoothed": "hf_backdoor_defense.defenses.robust_losses:Smoothed",
}
# What runs by itself beside a defense, to tell what else could explain its effect.
CONTROLS = {
    "matched_decay": "hf_backdoor_defense.defenses.matched_decay:MatchedDecay",
    "penalty_only": "hf_backdoor_defense.defenses.recipe:PenaltyOnly",
}
# What cleans a pretrained model before it is fine-tuned: `hfbd clean`.
PRETRAINING = {
    "recipe": "hf_backdoor_defense.defenses.recipe:RECIPE",
}
# What purifies a trained classifier with a few clean rows: `hfbd clean`, `purify`.
PURIFIERS = {
    "d3": "hf_backdoor_defense.defenses.d3:D3",
    "ulrl": "hf_backdoor_defense.defenses.ulrl:ULRL",
    "ft_sam": "hf_backdoor_defense.defenses.ft_sam:FTSAM",
    "fine_pruning": "hf_backdoor_defense.defenses.fine_pruning:FinePruning",
}
# What purifies a language model with a few clean rows: in a script, beside trl (`CROWSFTTrainer`).
GENERATIVE = {
    "crow": "hf_backdoor_defense.defenses.crow:CROW",
}
# What trains a module that looks at inputs, and leaves the victim alone: no arm of `hfbd train`.
DETECTORS = {
    "psim": "hf_backdoor_defense.defenses.psim:PSIM",
}
# How a checkpoint is poisoned: `hfbd attack`.
ATTACKS = {
    "weight_poisoning": "hf_backdoor_defense.attacks.weight_poisoning:WeightPoisoning",
    "ripples": "hf_backdoor_defense.attacks.weight_poisoning:RIPPLES",
    "lwp": "hf_backdoor_defense.attacks.weight_poisoning:LWP",
    "por": "hf_backdoor_defense.attacks.pretrained:PORAttack",
    "neuba": "hf_backdoor_defense.attacks.pretrained:NeuBAAttack",
    "badpre": "hf_backdoor_defense.attacks.pretrained:BadPreAttack",
}
# What looks at inputs: `hfbd detect`. No objectives, and resolved by `filter_class`.
FILTERS = {
    "confidence": "hf_backdoor_defense.input_filters.confidence:ConfidenceFilter",
    "psim": "hf_backdoor_defense.input_filters.psim:PSIMFilter",
    "strip": "hf_backdoor_defense.input_filters.strip:STRIP",
    "onion": "hf_backdoor_defense.input_filters.onion:ONION",
    "rap": "hf_backdoor_defense.input_filters.rap:RAP",
}


def objective_class(name: str) -> "type[Objective]":
    """The class behind a name. Raises ValueError with the known names and the nearest one.

    >>> objective_class("dece").__name__
    'DeCE'
    """
    tables = (DEFENSES, COMPARATORS, CONTROLS, PRETRAINING, PURIFIERS, GENERATIVE, DETECTORS, ATTACKS)
    return _resolve(name, {key: where for table in tables for key, where in table.items()}, "defense")


def filter_class(name: str) -> "type[Filter]":
    """The filter behind a name. Raises ValueError with the known names and the nearest one.

    >>> filter_class("psmi")
    Traceback (most recent call last):
    ...
    ValueError: There is no filter `psmi`: did you mean `psim`? Known: confidence, psim, strip, onion, rap.
    """
    return _resolve(name, FILTERS, "filter")


def _resolve(name: str, table: dict[str, str], kind: str) -> Any:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ValueError(f"There is no {kind} `{name}`: {hint}Known: {', '.join(table)}.")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
