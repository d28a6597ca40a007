"""Names of methods, for the command line, the cards and the test matrix. Nothing else may look here."""

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names are read where torch is not wanted: `hfbd list`
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
}


def objective_class(name: str) -> "type[Objective]":
    """The class behind a name. Raises ValueError with the known names and the nearest one.

    >>> objective_class("dece").__name__
    'DeCE'
    """
    table = {**DEFENSES, **COMPARATORS, **CONTROLS}
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ValueError(f"There is no defense `{name}`: {hint}Known: {', '.join(table)}.")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
