"""Names of methods, for the command line, the cards and the test matrix. Nothing else may look here."""

import difflib
import importlib

from hf_backdoor_defense.objectives import Objective

DEFENSES = {
    "dece": "hf_backdoor_defense.defenses.dece:DeCE",
    "trajectory": "hf_backdoor_defense.defenses.trajectory:TrajectoryFilter",
}
CONTROLS = {
    "matched_decay": "hf_backdoor_defense.defenses.matched_decay:MatchedDecay",
}


def objective_class(name: str) -> type[Objective]:
    """The class behind a name. Raises ValueError with the known names and the nearest one.

    >>> objective_class("dece").__name__
    'DeCE'
    """
    table = {**DEFENSES, **CONTROLS}
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise ValueError(f"There is no defense `{name}`: {hint}Known: {', '.join(table)}.")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
