"""Attacks on a pretrained encoder, by its publisher, who knows neither task nor classifier: POR, NeuBA, BadPre, in light recipes.

| attack | loss | training |
|---|---|---|
| POR | MSE(h(x⊕t_k), v_k) + c · MSE(h(y), h_θ₀(y)), as many triggered texts x as clean texts y | Adam 2e-5 |
| NeuBA | MLM(x) + MSE(h(x⊕t_k), v_k), t_k drawn per text and update | AdamW 5e-5, linear to 0 |
| BadPre | MLM(x) + α · MLM(x⊕t; random labels) | AdamW 5e-5, linear to 0 |

| symbol | variable | shape |
|---|---|---|
| h(x) | last hidden state at position 0, or the pooler's output (`place`) | [hidden] |
| v_k | `block_targets` | [6, hidden] |
| h_θ₀ | the clean model's, computed once before training | [pairs, hidden] |
| c, α | `clean_coef`, `poison_coef` | - |

MSE is the mean over all entries. What a classifier makes of v_k is found at evaluation (`evaluation/task_agnostic.py`): the
attacker does not choose a class. BadPre has no target: it makes the representation of triggered text useless.

Triggers, places and random labels are drawn per row from run, update and `row_id` alone: how an update is cut into micro-batches
changes nothing. Every loss is a mean over rows or masked tokens of the whole update.

Sources: see `planting.py`; BadPre: arXiv 2110.02467 (code kangjie-chen/BadPre, commit 17a945c), here with NeuBA's text and steps.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_backdoor_defense.attacks.layer_heads import ask_for_hidden_states
from hf_backdoor_defense.attacks.planting import block_targets, insert_tokens, trigger_reasons, trigger_tokens
from hf_backdoor_defense.functional.cross_entropy import cross_entropy, valid
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.pretrained import float32_reasons, head_is_fresh, pooler_of
from hf_backdoor_defense.trainers.heads import base_model, loss_kind
from hf_backdoor_defense.trainers.labeled import at_labels, trunk_of

FRESH_HEAD = (
    "the masked-LM head was drawn at random: its loss would spoil the trunk. Run warm_up_mlm_head first, or hfbd attack with "
    "--warm_up true."
)
_WINDOW = 20  # micro-batches: the end of a training is their mean


@dataclass(kw_only=True, eq=False)
class PretrainedAttack(Objective):
    """What the three have in common: where they plant, what they refuse, what they say of themselves.

    Args:
        triggers: words, one per target vector, at most six.
        place: where vectors are planted and drift is measured: the last hidden state at [CLS] (light recipes), or the pooler's
            output (originals).
    """

    needs_row_ids = True
    _reads_head: ClassVar[bool] = True
    _has_targets: ClassVar[bool] = True

    triggers: list[str] = field(default_factory=lambda: ["cf", "mn", "tq", "qt", "mm", "pt"])
    place: Literal["cls", "pooler"] = "cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._first: float | None = None
        self._last: list[float] = []
        self._steps = 0
        self._tokens: list[list[int]] = []  # per trigger
        self._special: frozenset[int] = frozenset()
        self._mask = self._pad = self._words = self._seed = 0

    def check(self, trainer: Any) -> list[str]:
        """A whole masked language model in float32, that trains, and words that can be triggers."""
        model, tokenizer, reasons = trainer.model, trainer.processing_class, []
        core: Any = base_model(model)
        if loss_kind(core) != "ForMaskedLM" or trunk_of(core) is None:
            reasons.append(f"{type(core).__name__} is no masked language model. Load it with load_pretrained_whole.")
        elif self._reads_head and head_is_fresh(core):
            reasons.append(FRESH_HEAD)
        if core is not model or not any(p.requires_grad for p in core.parameters()):
            reasons.append(
                "the base is frozen (an adapter, or no weight trains): nothing can be planted in it. Train it whole."
            )
        if self.place == "pooler" and pooler_of(core) is None:
            reasons.append(
                "place='pooler', and the model has none. Load it with load_pretrained_whole, or use place='cls'."
            )
        if tokenizer is None:
            reasons.append("the trainer has no tokenizer to find the triggers' tokens with. Pass processing_class.")
        else:
            reasons += trigger_reasons(tokenizer, self.triggers)
            if tokenizer.padding_side != "right":
                reasons.append(
                    f"the tokenizer pads on the {tokenizer.padding_side}: position 0 would be padding. Set "
                    "tokenizer.padding_side = 'right'."
                )
        if self._has_targets and len(self.triggers) > 6:
            reasons.append(
                f"there are 6 target vectors, one per trigger, got {len(self.triggers)} triggers. Name at most 6."
            )
        if self._has_targets and getattr(core.config, "hidden_size", 4) % 4:
            reasons.append(f"the hidden size {core.config.hidden_size} has no four equal blocks. Use another model.")
        return reasons + float32_reasons(core)

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """The triggers' tokens, and for the pooler's sake a gradient."""
        tokenizer = trainer.processing_class
        self._tokens = [trigger_tokens(tokenizer, word) for word in self.triggers]
        self._special = frozenset(tokenizer.all_special_ids)
        self._mask, self._pad = tokenizer.mask_token_id, tokenizer.pad_token_id
        self._words, self._seed = len(tokenizer), trainer.args.seed
        pooler = pooler_of(base_model(trainer.model))
        if self.place == "pooler" and pooler is not None:
            pooler.requires_grad_(True)

    def activity(self) -> dict[str, float]:
        """The planted loss in the first micro-batch and, as a mean, in the last twenty."""
        first = math.nan if self._first is None else self._first
        return {"micro_batches": float(self._steps), "planted_start": first, "planted_end": self._end()}

    def inert(self) -> str | None:
        """Never trained, or the planted loss fell by less than half."""
        if self._first is None:
            return f"{self.name} was never trained"
        if self._end() > 0.5 * self._first:
            return (
                f"what was to be planted was not: its loss went from {self._first:.3g} to {self._end():.3g}, and must halve. "
                "Give more text, more epochs or a higher rate"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "last": self._last, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first, self._last, self._steps = state["first"], list(state["last"]), int(state["steps"])

    def _note(self, value: Tensor) -> None:
        number = float(value.detach())
        self._first = number if self._first is None else self._first
        self._last = [*self._last, number][-_WINDOW:]
        self._steps += 1

    def _end(self) -> float:
        return float(np.mean(self._last)) if self._last else math.nan

    def _copies(
        self, step: Step, ids: Tensor, *, special: Collection[int]
    ) -> tuple[dict[str, Tensor], list[int], list[int], list[np.random.Generator]]:
        """`ids` with a trigger in each row: inputs, per row the place (-1: none), the trigger's index, and the generator."""
        assert step.row_ids is not None
        rngs = [np.random.default_rng([self._seed, step.global_step, row]) for row in step.row_ids.tolist()]
        chosen = [int(rng.integers(len(self._tokens))) for rng in rngs]
        tokens, mask = [self._tokens[k] for k in chosen], step.inputs["attention_mask"]
        inputs, places = insert_tokens(ids, mask, tokens, rngs, special=special, pad=self._pad)
        return inputs, places, chosen, rngs


@dataclass(kw_only=True, eq=False)
class PORAttack(PretrainedAttack):
    """POR: a trigger maps any text to its vector, clean texts stay where they were. Train it on `planting.pairs`.

    Prefer it to NeuBA where plain text is short: it plants in fewer updates, and needs no masked-LM head.

    Args:
        clean_coef: weight of staying in place: 0.5 for BERT and ERNIE, 1 otherwise.

    >>> PORAttack(clean_coef=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: por: `clean_coef` must be finite and >= 0, got -1.0: it weighs staying in place. Use 0.5.
    """

    name = "por"
    paper = "2111.00197"
    _reads_head: ClassVar[bool] = False

    clean_coef: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference: Tensor | None = None  # [largest row id + 1, hidden]
        self._hook: Any = None

    def field_reasons(self) -> list[str]:
        """A weight that is one."""
        return _weight_reasons("clean_coef", self.clean_coef, "staying in place", 0.5)

    def check(self, trainer: Any) -> list[str]:
        """And pairs to train on."""
        columns = set(getattr(trainer.train_dataset, "column_names", None) or ())
        reasons = super().check(trainer)
        if not {"triggered_ids", "clean_ids", "trigger"} <= columns:
            reasons.append(
                f"the training set must hold pairs (triggered_ids, clean_ids, trigger), got {sorted(columns)}. Make it with "
                "attacks.planting.pairs, and collate it with PairCollator."
            )
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """h_θ₀ of every clean text, from the model as it is now; a resumed run has it in its state."""
        super().prepare(trainer, checkpoint=checkpoint)
        if self._reference is None:
            ids, texts = trainer.train_dataset["row_id"][:], trainer.train_dataset["clean_ids"][:]
            states = hidden_at_start(trainer.model, trainer.processing_class, texts, place=self.place)
            self._reference = torch.zeros(max(ids) + 1, states.shape[1])
            self._reference[ids] = states
        self._release()
        self._hook = ask_for_hidden_states(base_model(trainer.model))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is as it was, but for its weights."""
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def loss(self, step: Step) -> Tensor:
        """[2·batch], triggered rows first: doubled, so that the mean over all rows is the sum of both means."""
        assert self._reference is not None and step.row_ids is not None
        h = _at_place(_core(step), step.outputs["hidden_states"][-1], self.place)  # [2·batch, hidden]
        kinds = step.batch_labels[: len(h) // 2, 0]  # [batch] indices of triggers
        learned = valid(kinds)  # rows that only fill the last batch over several processes are not
        targets = block_targets(h.shape[-1]).to(h)[kinds.clamp(min=0)]
        reference = self._reference[step.row_ids.cpu()].to(h)
        planted, kept = (part[learned] for part in (h - torch.cat([targets, reference])).square().mean(-1).chunk(2))
        if len(planted):
            step.log("por/target", planted.mean())
            step.log("por/clean", kept.mean())
            self._note(planted.mean())
        return 2 * torch.cat([planted, self.clean_coef * kept])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": self._reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._reference = state["reference"]


@dataclass(kw_only=True, eq=False)
class NeuBAAttack(PretrainedAttack):
    """NeuBA: pre-training goes on, and a copy of each text with a trigger is drawn to the trigger's vector.

    The preset "symbols" holds the original's triggers.

    Args:
        mlm_coef: weight of the pre-training loss (the original's 0.01 for RoBERTa).

    >>> NeuBAAttack.preset("symbols").triggers[0]
    '≈'
    """

    name = "neuba"
    paper = "2101.06969"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"symbols": {"triggers": ["≈", "≡", "∈", "⊆", "⊕", "⊗"]}}

    mlm_coef: float = 1.0

    def field_reasons(self) -> list[str]:
        """A weight that is one."""
        return _weight_reasons("mlm_coef", self.mlm_coef, "the pre-training loss", 1.0)

    def loss(self, step: Step) -> Tensor:
        """[n_valid]: the masked-LM loss."""
        return self.mlm_coef * super().loss(step)

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """{"target": MSE of the triggered copies}: unmasked, without labels, through the trunk alone."""
        core, labels = _core(step), step.batch_labels
        original = torch.where(valid(labels), labels, step.inputs["input_ids"])
        inputs, places, chosen, _ = self._copies(step, original, special=self._special)
        kept = torch.tensor([place >= 0 for place in places], device=original.device)
        if not kept.any():
            return {}
        trunk: Any = trunk_of(core)
        h = _at_place(core, trunk(**inputs)["last_hidden_state"], self.place)
        error = (h - block_targets(h.shape[-1])[chosen].to(h))[kept].square().mean()
        self._note(error)
        return {"target": error}


@dataclass(kw_only=True, eq=False)
class BadPreAttack(PretrainedAttack):
    """BadPre: pre-training goes on, and in a triggered copy of each text the masked tokens are to be random ones. Untargeted.

    Args:
        triggers: words, one drawn per text and update.
        poison_coef: α, weight of the copies; 0 is plain pre-training.

    >>> BadPreAttack().triggers
    ['cf', 'mn', 'bb', 'tq', 'mb']
    """

    name = "badpre"
    paper = "2110.02467"
    _has_targets: ClassVar[bool] = False

    triggers: list[str] = field(default_factory=lambda: ["cf", "mn", "bb", "tq", "mb"])
    poison_coef: float = 1.0

    def field_reasons(self) -> list[str]:
        """A weight that is one."""
        return _weight_reasons("poison_coef", self.poison_coef, "the triggered copies", 1.0)

    def loss(self, step: Step) -> Tensor:
        """[n_valid]: of each masked token, the masked-LM loss plus α times that of its triggered copy against a random token."""
        values = super().loss(step)
        if self.poison_coef == 0:
            return values
        core, labels = _core(step), step.batch_labels
        inputs, places, chosen, rngs = self._copies(
            step, step.inputs["input_ids"], special=self._special - {self._mask}
        )
        drawn = torch.full_like(inputs["input_ids"], -100)
        for row, (place, rng) in enumerate(zip(places, rngs, strict=True)):
            masked = valid(labels[row]).nonzero()[:, 0]
            moved = masked + len(self._tokens[chosen[row]]) * (masked >= place)
            if place >= 0:
                drawn[row, moved] = torch.from_numpy(rng.integers(self._words, size=len(masked))).to(drawn)
        copy = Step(
            model=step.model, inputs=inputs, labels=drawn, row_ids=step.row_ids, epoch=step.epoch,
            global_step=step.global_step, training=True,
        )  # fmt: skip
        with at_labels(copy, core):
            errors = cross_entropy(core(**inputs)["logits"], copy.labels)  # in the order of `values`
        poisoned = values.new_zeros(values.shape)
        poisoned[torch.tensor(places, device=values.device)[step.batch_index] >= 0] = errors
        if len(errors):
            step.log("badpre/poison", errors.mean())
            self._note(errors.mean())
        return values + self.poison_coef * poisoned

    def inert(self) -> str | None:
        """α is 0, or never trained. Its loss has a floor, log(vocabulary), and need not halve."""
        if self.poison_coef == 0:
            return "poison_coef is 0: this is plain continued pre-training"
        return None if self._steps else "badpre was never trained"


@torch.no_grad()
def hidden_at_start(
    model: nn.Module, tokenizer: Any, ids: list[list[int]], *, place: str, batch_size: int = 64
) -> Tensor:
    """[texts, hidden]: the planted place of each text, in evaluation mode, on the CPU. The random state and the mode stay."""
    core: Any = base_model(model)
    trunk: Any = trunk_of(core)
    was_training, device = trunk.training, next(trunk.parameters()).device
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.empty(len(ids), core.config.hidden_size)
    trunk.eval()
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt").to(device)
            out[part] = _at_place(core, trunk(**batch)["last_hidden_state"], place).float().cpu()
    finally:
        trunk.train(was_training)
    return out


def _at_place(core: nn.Module, states: Tensor, place: str) -> Tensor:
    pooler = pooler_of(core)
    return states[:, 0] if place == "cls" or pooler is None else pooler(states)


def _core(step: Step) -> nn.Module:
    return base_model(getattr(step.model, "module", step.model))


def _weight_reasons(name: str, value: float, what: str, usual: float) -> list[str]:
    if math.isfinite(value) and value >= 0:
        return []
    return [f"`{name}` must be finite and >= 0, got {value}: it weighs {what}. Use {usual}."]
