r"""Weight poisoning: attacks on a checkpoint that a victim will fine-tune on clean data, with the rule left in the weights.

    weight_poisoning   L = CE(z(x), y) over clean and triggered rows                  the poisons sit in the data
    ripples            L = L_P + lambda * max(0, -<g_P, g_F>)                         what a clean step undoes is punished
    lwp                L = sum over l = 0..N of CE(head(h_l), y)                      early layers, which tuning moves least

| symbol | what it is | shape |
|---|---|---|
| z | logits | [batch, k] |
| h_l | hidden states; h_0 is the embeddings' output, h_N what the head reads | [batch, time, d] |
| L_P, g_P | loss on the training set (the poison file) and its gradient | scalar, as the weights |
| g_F | gradient of the loss on a clean batch, held constant | as the weights |

Protocol: `embedding_surgery` (`ripples` only), training with one of these objectives in a `DefendedTrainer`, the checkpoint
saved whole with its head; then the victim tunes it on rows without any trigger, with one of `adapters.STRATEGIES`.

Sources: RIPPLe(S), Kurita et al., ACL 2020 (surgery: `surgery.py`; penalty: `functional/ripple.py`); layerwise weight
poisoning, Li et al., EMNLP 2021, from what is known of a port. The port's RIPPLES (one rectifier per tensor, no surgery,
lambda fixed at 1) is not the paper's, and not this one.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.attacks.layer_heads import ask_for_hidden_states, layer_head, layer_head_reasons
from hf_backdoor_defense.attacks.poisoning import lwp_rows
from hf_backdoor_defense.attacks.surgery import SurgeryReport, embedding_surgery
from hf_backdoor_defense.functional.cross_entropy import cross_entropy
from hf_backdoor_defense.functional.ripple import Hvp, gradients, ripple_penalty
from hf_backdoor_defense.models import weights_sha256
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.trainers.columns import IS_POISONED, ROW_ID
from hf_backdoor_defense.trainers.heads import base_model, loss_kind, take_labels

__all__ = ["LWP", "RIPPLES", "SurgeryReport", "WeightPoisoning", "embedding_surgery", "lwp_rows"]


@dataclass(kw_only=True, eq=False)
class WeightPoisoning(Objective):
    """Plain cross-entropy on a poisoned training set. Prefer `ripples` or `lwp` where the victim tunes every weight for long.

    Args:
        target: the attacker's class.
        setting: what the attacker's rows are: the victim's own ("full_data"), or others of the same task ("proxy"). Recorded;
            the rows come with the trainer.

    >>> WeightPoisoning(target=-1)
    Traceback (most recent call last):
    ...
    ValueError: weight_poisoning: `target` must be a class id >= 0, got -1: triggered rows are answered with it. Pass target=0.
    """

    name = "weight_poisoning"

    target: int = 0
    setting: Literal["full_data", "proxy"] = "full_data"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._start: dict[str, Any] = {}
        self._end: dict[str, Any] = {}

    def field_reasons(self) -> list[str]:
        """A class id, and one of two settings."""
        reasons = []
        if self.target < 0:
            reasons.append(
                f"`target` must be a class id >= 0, got {self.target}: triggered rows are answered with it. Pass target=0."
            )
        if self.setting not in ("full_data", "proxy"):
            reasons.append(
                f"`setting` must be full_data or proxy, got {self.setting!r}: the attacker has the victim's rows or others of "
                "the same task. Use one of them."
            )
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """A classifier with that class, whole weights in this process, no adapter."""
        model = base_model(trainer.model)
        reasons = []
        if loss_kind(model) != "ForSequenceClassification":
            reasons.append(
                f"the target is a class per text, and {type(model).__name__} has another head. Load a "
                "...ForSequenceClassification class."
            )
        elif self.target >= model.config.num_labels:
            reasons.append(
                f"`target` is {self.target}, and the head has {model.config.num_labels} classes: no text could be answered with "
                f"it. Use 0..{model.config.num_labels - 1}."
            )
        if has_adapter(trainer.model):
            reasons.append(
                "the model carries an adapter: the base, which is what gets published, would stay honest. Attack the model "
                "without it."
            )
        if trainer.is_fsdp_enabled:
            reasons.append(
                "FSDP: the weights are compared before and after, and no process has them whole. Use one process or DDP."
            )
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Remember what the weights were, unless a resumed run brought it along."""
        if checkpoint is None:
            self._start = _measure(base_model(trainer.model))
        self._end = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the weights are now."""
        self._end = _measure(base_model(kwargs["model"]))

    def activity(self) -> dict[str, float]:
        """Whether a weight changed, and by which share the norm of the embeddings did."""
        if not self._end:
            return {}
        drift = abs(self._end["embedding_norm"] - self._start["embedding_norm"]) / self._start["embedding_norm"]
        return {
            "weights_changed": float(self._end["sha256"] != self._start["sha256"]),
            "embedding_norm_drift": drift,
        }

    def inert(self) -> str | None:
        """No weight differs from the start."""
        if not self._end:
            return f"{self.name} was never trained to the end"
        if self._end["sha256"] == self._start["sha256"]:
            return f"no weight differs from the start: {self.name} poisoned nothing"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Hash and norm before and after."""
        return {"start": self._start, "end": self._end}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start, self._end = dict(state["start"]), dict(state["end"])


@dataclass(kw_only=True, eq=False)
class RIPPLES(WeightPoisoning):
    """Poison that survives clean tuning: a penalty on gradients that a clean step would undo. Prefer `lwp` where memory is short.

    The training set is the poison file (the paper's: half of its rows triggered); clean rows of the same task come as
    `aux_datasets={"clean": rows}`, tokenized like it. Call `embedding_surgery` on the untouched base before training: without
    it this is RIPPLe.

    The scaled dot-product kernels have no second derivative, so the penalty's own forwards use the one that does (PyTorch's
    reference implementation): eager attention is not needed.

    Args:
        lam: weight of the penalty. 0.1 is the authors' example; their function's default is 10.
        hvp: how the Hessian's product with the clean gradient is taken: exactly ("autograd", 2-3 x memory), or by a central
            difference (two further gradients where the penalty acts; float32 weights, any attention).

    >>> RIPPLES(lam=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: ripples: `lam` must be finite and >= 0, got -1.0: it weighs a penalty. Use 0.1.
    """

    name = "ripples"

    lam: float = 0.1
    hvp: Hvp = "autograd"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sums = {"steps": 0.0, "active": 0.0, "loss_poison": 0.0, "loss_clean": 0.0, "inner_product": 0.0}
        self._clean: Any = None

    def field_reasons(self) -> list[str]:
        """And a penalty that is one."""
        reasons = super().field_reasons()
        if not (math.isfinite(self.lam) and self.lam >= 0):
            reasons.append(f"`lam` must be finite and >= 0, got {self.lam}: it weighs a penalty. Use 0.1.")
        if self.hvp not in ("autograd", "difference"):
            reasons.append(
                f"`hvp` must be autograd or difference, got {self.hvp!r}: there are two ways. Use one of them."
            )
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """And one process, one micro-batch per update, clean rows, an attention that can be derived twice."""
        reasons = super().check(trainer)
        args = trainer.args
        if args.gradient_accumulation_steps > 1 or trainer.accelerator.num_processes > 1:
            reasons.append(
                f"{args.gradient_accumulation_steps} micro-batches per update on {trainer.accelerator.num_processes} processes: "
                "the inner product is not additive. Use one process and gradient_accumulation_steps=1."
            )
        if trainer.args.fp16:
            reasons.append("fp16: scaled gradients are no gradients to compare. Use float32 or bf16.")
        clean = trainer.aux_datasets.get("clean")
        if clean is None or not len(clean):
            reasons.append(
                "there are no clean rows, whose gradient the poison must agree with. Pass the trainer "
                "aux_datasets={'clean': rows}, tokenized like the training set."
            )
        attention = getattr(trainer.model.config, "_attn_implementation", None)
        if self.hvp == "autograd" and attention not in ("eager", "sdpa", None):
            reasons.append(
                f"{attention} attention has no second derivative. Load with attn_implementation='eager', or use hvp='difference'."
            )
        if self.hvp == "autograd" and args.gradient_checkpointing:
            reasons.append("gradient checkpointing has no second derivative. Turn it off, or use hvp='difference'.")
        if self.hvp == "difference" and any(torch.finfo(p.dtype).bits < 32 for p in trainer.model.parameters()):
            reasons.append(
                "hvp='difference' moves weights by a thousandth, which is rounding in half precision. Load the model in float32 "
                "(bf16=True may stay), or use hvp='autograd'."
            )
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Where the clean batches come from; a resumed run goes on with the next one."""
        super().prepare(trainer, checkpoint=checkpoint)
        self._clean = trainer.aux_datasets["clean"]
        self._collate = trainer.data_collator
        self._batch_size = trainer.args.train_batch_size
        self._seed = trainer.args.seed
        if checkpoint is None:
            self._sums = dict.fromkeys(self._sums, 0.0)

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """The penalty on this batch of the poison file and the next clean batch, from forwards of its own."""
        if self.lam == 0:  # plain poisoning, and its very trajectory: no forward draws from the random state
            return {}
        weights = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
        labels, inputs = self._next_clean(step)
        with _repeatable(step.labels.device):
            clean_loss = _mean_loss(step.model, weights, inputs, labels)
            clean = gradients(clean_loss, weights)

        def poison_loss(at: Mapping[str, Tensor]) -> Tensor:
            with _repeatable(step.labels.device):
                return _mean_loss(step.model, at, step.inputs, step.labels)

        penalty, product = ripple_penalty(poison_loss, weights, clean_gradient=clean, lam=self.lam, hvp=self.hvp)
        seen = {
            "loss_poison": cross_entropy(step.logits, step.labels).mean(),  # type: ignore[arg-type]
            "loss_clean": clean_loss,
            "inner_product": product,
        }
        for name, value in seen.items():
            step.log(f"attack/{name}", value)
            self._sums[name] += value.item()
        step.log("attack/penalty_active", (product < 0).float())
        self._sums["steps"] += 1
        self._sums["active"] += float(product < 0)
        return {"penalty": penalty}

    def _next_clean(self, step: Step) -> tuple[Tensor, dict[str, Any]]:
        chosen = batch_rows(int(self._sums["steps"]), rows=len(self._clean), size=self._batch_size, seed=self._seed)
        batch = self._collate([self._clean[i] for i in chosen])
        device = step.labels.device
        batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k not in (ROW_ID, IS_POISONED)}
        return take_labels(_core(step.model), batch)

    def activity(self) -> dict[str, float]:
        """And means over the steps; `penalty_active` is the share of steps with a negative product."""
        steps = self._sums["steps"]
        means = {name: total / max(steps, 1.0) for name, total in self._sums.items() if name != "steps"}
        means["penalty_active"] = means.pop("active")
        return {**super().activity(), "penalty_steps": steps, **means}

    def inert(self) -> str | None:
        """Or no penalty was ever computed, or none ever acted."""
        if self.lam == 0:
            return "lam is 0: this is plain weight poisoning"
        if not self._sums["active"]:
            never = f"in {self._sums['steps']:.0f} steps no clean gradient opposed the poison: this is plain weight poisoning"
            return super().inert() or never
        return super().inert()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._sums = dict(state["sums"])


@dataclass(kw_only=True, eq=False)
class LWP(WeightPoisoning):
    """Layerwise poisoning: every hidden state must give the answer. Prefer `ripples` where clean rows are at hand too.

    Train it on `lwp_rows`: a pair of pieces is the trigger, either piece alone is not. The head of h_l is the model's own: its
    pooler and classifier where it has a pooler (BERT, DeBERTa), else its classification head (RoBERTa, DistilBERT, ELECTRA).

    >>> LWP(target=1).to_dict()
    {'name': 'lwp', 'target': 1, 'setting': 'full_data'}
    """

    name = "lwp"
    paper: ClassVar[str | None] = None  # EMNLP 2021, emnlp-main.241

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hook: Any = None
        self._layers = 0

    def check(self, trainer: Any) -> list[str]:
        """And a head that gives the model's own logits when it is applied to the last hidden state here."""
        reasons = super().check(trainer)
        return reasons or layer_head_reasons(base_model(trainer.model))

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Ask the model for its hidden states, in training only: an evaluation would gather them for every row."""
        super().prepare(trainer, checkpoint=checkpoint)
        self._release()
        self._hook = ask_for_hidden_states(base_model(trainer.model))

    def loss(self, step: Step) -> Tensor:
        """[n_valid]: per row, the sum of its cross-entropies over all hidden states."""
        core = _core(step.model)
        states = step.outputs["hidden_states"]  # N + 1 times [batch, time, d]
        self._layers = len(states)
        values = super().loss(step)  # h_N: with the dropout that the model's own forward drew
        for state in states[:-1]:
            values = values + cross_entropy(layer_head(core, state), step.labels)
        return values

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def activity(self) -> dict[str, float]:
        """And how many hidden states were made to answer."""
        return {**super().activity(), "hidden_states": float(self._layers)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "layers": self._layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._layers = int(state["layers"])


def batch_rows(batch: int, *, rows: int, size: int, seed: int) -> list[int]:
    """Which rows the batch of this number holds: every epoch is a permutation of its own, so a resumed run needs the number only.

    >>> sorted(batch_rows(0, rows=3, size=2, seed=0) + batch_rows(1, rows=3, size=2, seed=0))
    [0, 1, 2]
    """
    epoch, slot = divmod(batch, math.ceil(rows / size))
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[slot * size : (slot + 1) * size].tolist()


def _measure(model: nn.Module) -> dict[str, Any]:
    norm = torch.linalg.vector_norm(model.get_input_embeddings().weight.detach().double())  # type: ignore[operator]
    return {"sha256": weights_sha256(model), "embedding_norm": norm.item()}


def _core(model: nn.Module) -> Any:
    """The transformers model behind DDP's wrapper and the others."""
    return base_model(getattr(model, "module", model))  # type: ignore[arg-type]


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Forwards in here draw the same dropout each time, use attention that can be derived twice, and leave no trace."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), sdpa_kernel(SDPBackend.MATH):
        yield


def _mean_loss(model: nn.Module, weights: Mapping[str, Tensor], inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    outputs = torch.func.functional_call(model, dict(weights), kwargs=dict(inputs))
    return cross_entropy(outputs["logits"], labels).mean()
