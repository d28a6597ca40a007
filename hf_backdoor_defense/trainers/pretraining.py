"""Pre-training that goes on: a language model, tokenized plain text, and whatever objective is hosted.

| model | rows | labels |
|---|---|---|
| masked | `input_ids` | 15 % of the tokens, drawn anew for every batch |
| masked | `input_ids`, `labels` | as they are (`data.plain_text.mask_once`) |
| causal | `input_ids` | every next token |
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
)

from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.trainers.heads import loss_kind
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.progress import Progress


def language_collator(model: PreTrainedModel, tokenizer: Any, rows: Any, *, probability: float = 0.15) -> Any:
    """What makes batches of tokenized text for this model: masks drawn anew for every batch, next tokens for a causal model, or
    the labels that the rows bring (masks that were drawn once).

    Args:
        rows: the training set, whose columns are looked at.
        probability: share of the tokens that are masked.

    Raises:
        ValueError: a masked language model and a tokenizer without a mask token; a tokenizer without padding.
    """
    if tokenizer.pad_token is None:
        raise ValueError(
            "The tokenizer has no padding token: texts of unequal length cannot be batched. Set one "
            "(tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer with the model."
        )
    if "labels" in (getattr(rows, "column_names", None) or ()):
        return DataCollatorForTokenClassification(tokenizer)
    masked = loss_kind(model) == "ForMaskedLM"
    if masked and tokenizer.mask_token is None:
        raise ValueError(
            "The tokenizer has no mask token, and the model predicts masked tokens: nothing could be masked. Use the tokenizer "
            "that the model was pre-trained with."
        )
    return DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=probability if masked else None)


def pretraining_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Any,
    *,
    output_dir: str,
    objective: Objective | None = None,
    title: str | None = None,
    seed: int = 0,
    callbacks: Sequence[Any] = (),
    trainer_class: type[DefendedTrainer] = DefendedTrainer,
    collator: Any = None,
    **options: Any,
) -> DefendedTrainer:
    """A Trainer for further pre-training: AdamW without decay, a linear schedule, clipping at 1, batches of 32 of like length.

    Args:
        rows: `input_ids` and `row_id`; with `labels`, masks were drawn once (`data.plain_text.mask_once`).
        title: of the progress bar; None shows none.
        options: further TrainingArguments, over the defaults.

    Raises:
        ValueError: see `language_collator`.
    """
    cpu = not torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "logging_steps": 0.05,
        "report_to": "none",
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": title is None,
    }
    args = TrainingArguments(output_dir=output_dir, seed=seed, **{**defaults, **options})
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=rows,
        data_collator=language_collator(model, tokenizer, rows) if collator is None else collator,
        processing_class=tokenizer,
        defense=objective,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress(title or ""))
    return trainer
