"""Drop-ins: one method with its defaults, under the Trainer's own interface."""

from typing import Any

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.trainers.hosts import DefendedTrainer


class DeCETrainer(DefendedTrainer):
    """`transformers.Trainer` with the DeCE loss; `defense=DeCE(...)` sets its fields.

    The whole change in a script:

    >>> from hf_backdoor_defense import DeCETrainer as Trainer
    """

    def __init__(self, *args: Any, defense: DeCE | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=DeCE() if defense is None else defense, **kwargs)
