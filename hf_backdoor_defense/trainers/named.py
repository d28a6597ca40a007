"""Drop-ins: one method with its defaults, under the Trainer's own interface."""

from typing import Any

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.psim import PSIM
from hf_backdoor_defense.trainers.hosts import DefendedSeq2SeqTrainer, DefendedTrainer


class DeCETrainer(DefendedTrainer):
    """`transformers.Trainer` with the DeCE loss; `defense=DeCE(...)` sets its fields.

    The whole change in a script:

    >>> from hf_backdoor_defense import DeCETrainer as Trainer
    """

    def __init__(self, *args: Any, defense: DeCE | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=DeCE() if defense is None else defense, **kwargs)


class DeCESeq2SeqTrainer(DefendedSeq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with the DeCE loss; `defense=DeCE(...)` sets its fields.

    The whole change in a script:

    >>> from hf_backdoor_defense import DeCESeq2SeqTrainer as Seq2SeqTrainer
    """

    def __init__(self, *args: Any, defense: DeCE | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=DeCE() if defense is None else defense, **kwargs)


class PSIMTrainer(DefendedTrainer):
    """Trains a PSIM module on an untrusted base: the model is the base as downloaded, `train_dataset` clean rows of the task,
    `aux_datasets={"held_out": rows}` further clean rows for the stop rule. `PSIMFilter.fit` does it from texts.

    >>> from hf_backdoor_defense import PSIMTrainer
    """

    def __init__(self, *args: Any, defense: PSIM | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=PSIM() if defense is None else defense, **kwargs)
