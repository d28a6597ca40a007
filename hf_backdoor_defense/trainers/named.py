"""Drop-ins: one method with its defaults, under the Trainer's own interface."""

from typing import Any

from hf_backdoor_defense.defenses.crow import CROW
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.psim import PSIM
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.defenses.ulrl import ULRL
from hf_backdoor_defense.trainers.heads import loss_kind
from hf_backdoor_defense.trainers.hosts import DefendedSeq2SeqTrainer, DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator


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


class D3Trainer(DefendedTrainer):
    """Purifies a trained classifier with D3: the model is the untrusted one, `train_dataset` the clean rows. SGD with momentum,
    `weight_decay=0` and `max_grad_norm=0`; `purify` sets them.

    >>> from hf_backdoor_defense import D3Trainer
    """

    def __init__(self, *args: Any, defense: D3 | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=D3() if defense is None else defense, **kwargs)


class ULRLTrainer(DefendedTrainer):
    """Purifies a trained classifier with ULRL: the model is the untrusted one, `train_dataset` the clean rows. SGD with
    momentum, `weight_decay=0` and `max_grad_norm=0`; `purify` sets them.

    >>> from hf_backdoor_defense import ULRLTrainer
    """

    def __init__(self, *args: Any, defense: ULRL | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=ULRL() if defense is None else defense, **kwargs)


class CROWTrainer(DefendedTrainer):
    """Purifies a language model with CROW: the model, or its LoRA adapter, is the untrusted one, `train_dataset` the clean rows.

    >>> from hf_backdoor_defense import CROWTrainer
    """

    def __init__(self, *args: Any, defense: CROW | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=CROW() if defense is None else defense, **kwargs)


class PSIMTrainer(DefendedTrainer):
    """Trains a PSIM module on an untrusted base: the model is the base as downloaded, `train_dataset` clean rows of the task,
    `aux_datasets={"held_out": rows}` further clean rows for the stop rule. `PSIMFilter.fit` does it from texts.

    >>> from hf_backdoor_defense import PSIMTrainer
    """

    def __init__(self, *args: Any, defense: PSIM | None = None, **kwargs: Any) -> None:
        super().__init__(*args, defense=PSIM() if defense is None else defense, **kwargs)


class RecipeTrainer(DefendedTrainer):
    """Pre-trains on with RECIPE; `defense=RECIPE(...)` sets its fields. The model comes from `load_pretrained_whole`, the rows
    are tokenized plain text (`data.plain_text`), AdamW has no weight decay.

    Without a `data_collator` a language model gets the one for its kind: masks drawn anew for every batch, or next tokens.
    `hfbd clean` does it from a file.

    >>> from hf_backdoor_defense import RecipeTrainer
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *rest: Any,
        defense: RECIPE | None = None,
        **kwargs: Any,
    ) -> None:
        if (
            data_collator is None
            and processing_class is not None
            and loss_kind(model) in ("ForMaskedLM", "ForCausalLM")
        ):
            data_collator = language_collator(model, processing_class, train_dataset)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, *rest,
            defense=RECIPE() if defense is None else defense, **kwargs,
        )  # fmt: skip
