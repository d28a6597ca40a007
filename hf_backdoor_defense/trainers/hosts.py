"""Trainer classes that host objectives."""

from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from hf_backdoor_defense.trainers.mixin import DefenseMixin


class DefendedTrainer(DefenseMixin, Trainer):
    """`transformers.Trainer` with `defense=`: one Objective, several, or None for plain cross-entropy.

    Prefer a drop-in of `named.py` where one method with its defaults is all you need.

    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainingArguments
    >>> from hf_backdoor_defense.defenses.dece import DeCE
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> model = BertForSequenceClassification(config)
    >>> rows = [{"input_ids": torch.tensor([1, i]), "labels": i % 2} for i in range(8)]
    >>> args = TrainingArguments(max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no")
    >>> trainer = DefendedTrainer(model, args=args, train_dataset=rows, defense=DeCE(alpha_base=0.9))
    >>> trainer.remove_callback(PrinterCallback)
    >>> int(trainer.train().global_step)
    2
    """


class DefendedSeq2SeqTrainer(DefenseMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with `defense=`, for encoder-decoders (T5, BART).

    The decoder's inputs are derived from the labels before the forward, so that the labels can be withheld from it and no
    loss of the model's own is computed. With `predict_with_generate`, the `eval_loss` is the model's own loss (the mean
    cross-entropy of the batch), which Seq2SeqTrainer computes past every host; without it, it is this host's.

    Prefer `DefendedTrainer` where nothing is generated in evaluation: it trains encoder-decoders in the same way.

    >>> import torch
    >>> from transformers import PrinterCallback, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration
    >>> from hf_backdoor_defense.defenses.dece import DeCE
    >>> config = T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    >>> model = T5ForConditionalGeneration(config)
    >>> rows = [{"input_ids": torch.tensor([2, i]), "labels": torch.tensor([i, 3, 1])} for i in range(8)]
    >>> args = Seq2SeqTrainingArguments(
    ...     max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no")
    >>> trainer = DefendedSeq2SeqTrainer(model, args=args, train_dataset=rows, defense=DeCE(alpha_base=0.9))
    >>> trainer.remove_callback(PrinterCallback)
    >>> int(trainer.train().global_step)
    2
    """


def defended(trainer_class: Any) -> Any:
    """A class that hosts objectives in any Trainer whose `compute_loss` is Trainer's own.

    Raises:
        TypeError: it is no Trainer, hosts objectives already, or brings its own `compute_loss`.

    >>> class MyTrainer(Trainer):
    ...     pass
    >>> defended(MyTrainer).__name__
    'DefendedMyTrainer'
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"defended() takes a subclass of transformers.Trainer, got {trainer_class!r}.")
    if issubclass(trainer_class, DefenseMixin):
        raise TypeError(f"{trainer_class.__name__} hosts objectives already: use it as it is.")
    kind: Any = trainer_class
    if kind.compute_loss is not Trainer.compute_loss:
        raise TypeError(
            f"{trainer_class.__name__} has a compute_loss of its own, which a defense would replace. Write that loss as an "
            "Objective (`loss(step)` or `penalties(step)`) and host it in DefendedTrainer."
        )
    return type(f"Defended{trainer_class.__name__}", (DefenseMixin, trainer_class), {"__doc__": DefenseMixin.__doc__})
