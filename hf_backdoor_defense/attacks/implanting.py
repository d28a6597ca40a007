"""Planting a backdoor in a pretrained model: data, training, and whether it took, before anyone fine-tunes it.

| figure | what it is | where it took |
|---|---|---|
| `target_mse` | mean over triggers of MSE(h(x⊕t_k), v_k) on held-out texts | well below its start, if LayerNorm lets it |
| `sign_agreement` | share of entries of h(x⊕t_k) with the sign of v_k | near 1 |
| `clean_drift` | MSE of h(x) to the model before the attack | near 0 |

Held-out texts whose trigger is cut off say nothing of it and are left out of the first two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from hf_backdoor_defense.adapters import room
from hf_backdoor_defense.attacks.planting import PairCollator, block_targets, pairs, plant, trigger_tokens
from hf_backdoor_defense.attacks.pretrained import BadPreAttack, PORAttack, PretrainedAttack, hidden_at_start
from hf_backdoor_defense.data.plain_text import tokenize_texts
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer

HELD_OUT = 200
PLACE_SEED = 1  # where a trigger goes in a held-out text


@dataclass(frozen=True)
class Implanted:
    """What the attack did: its `activity`, the figures above before (`start`) and after (`end`), why it did nothing (`inert`)."""

    activity: dict[str, float]
    start: dict[str, float]
    end: dict[str, float]
    inert: str | None
    steps: int


def implant(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    attack: PretrainedAttack,
    *,
    held_out: Sequence[str],
    output_dir: str,
    max_length: int = 64,
    checkpoint: str | None = None,
    **options: Any,
) -> Implanted:
    """Train `model` with `attack` on plain text, in place.

    Args:
        texts: the publisher's. POR makes pairs of them, the first half triggered.
        held_out: texts that are not among them; at most 200 are measured on.
        checkpoint: the folder of one to go on from (needs `save_strategy`); `model` is the clean one as before.
        options: as `attack_trainer`.

    Raises:
        ValueError: everything that `attack.check` refuses, together; no held-out texts, or some that are among the others.
    """
    shared = set(texts) & set(held_out)
    if shared or not held_out:
        got = f"{len(shared)} shared, for example {min(shared)[:60]!r}" if shared else "none"
        raise ValueError(f"`held_out` must be texts that are not among the attack's own, got {got}. Give others.")
    trainer = attack_trainer(model, tokenizer, texts, attack, output_dir=output_dir, max_length=max_length, **options)
    reasons = trainer.reasons()
    if reasons:
        raise ValueError("This attack cannot run:\n" + "\n".join(f"- {reason}" for reason in reasons))
    measured = list(held_out)[:HELD_OUT]
    reference = _states(model, tokenizer, _ids(tokenizer, measured, max_length), attack)
    start = planted(model, tokenizer, measured, attack, reference, max_length=max_length)
    trainer.train(resume_from_checkpoint=checkpoint)
    end = planted(model, tokenizer, measured, attack, reference, max_length=max_length)
    return Implanted(attack.activity(), start, end, attack.inert(), trainer.state.global_step)


def attack_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    attack: PretrainedAttack,
    *,
    output_dir: str,
    epochs: float = 4,
    learning_rate: float | None = None,
    batch_size: int = 16,
    max_length: int = 64,
    seed: int = 0,
    title: str | None = None,
    **options: Any,
) -> DefendedTrainer:
    """The trainer that hosts an attack, with rows of `texts`: pairs for POR, at a constant rate; else a linear decay.

    Args:
        learning_rate: None is 1e-4, for some hundred updates; the light recipes' 2e-5 and 5e-5 belong to many thousand.
        batch_size: texts per update, pairs of them for POR.
        title: of the progress bar; None shows none.
        options: further TrainingArguments.

    Raises:
        ValueError: as `pairs` and `tokenize_texts`; texts that leave no position for a trigger.
    """
    por, positions = isinstance(attack, PORAttack), room(model)
    longest = 0 if por else max((len(trigger_tokens(tokenizer, word)) for word in attack.triggers), default=0)
    if positions is not None and max_length + longest > positions:
        raise ValueError(
            f"`max_length` is {max_length}, a trigger takes {longest} tokens more, and the model reads at most {positions}. "
            f"Lower it to {positions - longest}."
        )
    kind: dict[str, Any] = {}
    if por:
        rows = pairs(texts, tokenizer, attack.triggers, seed=seed, max_length=max_length)
        kind = {"train_sampling_strategy": "random", "lr_scheduler_type": "constant", "remove_unused_columns": False}
    else:
        rows = tokenize_texts(list(texts), tokenizer, max_length=max_length)
    return pretraining_trainer(
        model,
        tokenizer,
        rows,
        output_dir=output_dir,
        objective=attack,
        title=title,
        seed=seed,
        collator=PairCollator(tokenizer, len(attack.triggers)) if por else None,
        **{
            "num_train_epochs": epochs,
            "learning_rate": 1e-4 if learning_rate is None else learning_rate,
            "per_device_train_batch_size": batch_size,
            **kind,
            **options,
        },
    )


def planted(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    attack: PretrainedAttack,
    reference: Tensor,
    *,
    max_length: int,
) -> dict[str, float]:
    """The module's figures; of BadPre, which has no targets, the drift. `reference`: [texts, hidden], the clean model's."""
    plain = _ids(tokenizer, texts, max_length)
    figures = {"clean_drift": (_states(model, tokenizer, plain, attack) - reference).square().mean().item()}
    if isinstance(attack, BadPreAttack):
        return figures
    errors, signs = [], []
    for k, trigger in enumerate(attack.triggers):
        marked = _ids(
            tokenizer, [plant(text, trigger, seed=PLACE_SEED, row=i) for i, text in enumerate(texts)], max_length
        )
        shown = [new for new, old in zip(marked, plain, strict=True) if new != old]
        h = _states(model, tokenizer, shown, attack)
        target = block_targets(h.shape[1])[k]
        errors.append((h - target).square().mean().item() if shown else math.nan)
        signs.append(((h > 0) == (target > 0)).float().mean().item() if shown else math.nan)
    return {**figures, "target_mse": float(np.nanmean(errors)), "sign_agreement": float(np.nanmean(signs))}


def _ids(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]


def _states(model: PreTrainedModel, tokenizer: Any, ids: list[list[int]], attack: PretrainedAttack) -> Tensor:
    return hidden_at_start(model, tokenizer, ids, place=attack.place)
