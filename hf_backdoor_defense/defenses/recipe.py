"""RECIPE: go on pre-training on plain text while the norms of chosen weight matrices are pressed down.

    L = L_PT + coef · Σ_l ‖W_l‖_F            unsquared, weights only, before gradient clipping

| symbol | what it is | shape |
|---|---|---|
| L_PT | the pre-training loss (masked or next tokens; classes, for a vision transformer that was pre-trained so) | scalar |
| W_l | the matrices named by `targets`, for BERT the up-projection of each feed-forward block | [intermediate, hidden] |
| S | sum of the learning rates so far | scalar |
| dose | S / std(W) | scalar |

What clean text needs, the loss keeps; what only triggers use, nothing keeps. Adam turns the penalty into signed shrinkage: alone
it is a soft threshold at S, whatever `coef` is. So the *dose* decides, not the learning rate or the number of epochs: neither
carries over from another model, and the default, 1.25, is the dose of the authors' released run (if BERT's weights have
std 0.04). `suggest_learning_rate` gives the rate that reaches it.

Source: doi 10.1162/tacl_a_00622 (TACL 11, 2023), section 3 and appendix; code thunlp/RECIPE, commit 775fedf.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.functional.weights import frobenius_norms, gaussian_norm_ratio, norm_ratio_curve
from hf_backdoor_defense.models import unwrapped
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.pretrained import MISSING_KEYS, float32_reasons, head_is_fresh, pooler_of
from hf_backdoor_defense.targets import PUBLISHED, no_match, target_weights

logger = logging.getLogger(__name__)

_PRETRAINING = ("ForMaskedLM", "ForCausalLM", "ForConditionalGeneration", "ForImageClassification")
LITTLE = 0.3  # a dose below it is expected to do next to nothing
_GREW = 2.0  # norms that a penalty left this much larger
_GRID, _PER_STD = 65, 8  # sums of rates at which the prediction is known: 0, 1/8, …, 8 standard deviations


@dataclass(kw_only=True, eq=False)
class RECIPE(Objective):
    """Press down the norms of chosen matrices while pre-training goes on. Prefer PSIM or a purifier for a fine-tuned classifier.

    Host it on a *pretrained* model with its pre-training head, loaded by `load_pretrained_whole`, and plain text; fine-tune
    afterwards. AdamW without weight decay, clipping at 1.

    Args:
        coef: weight of the norms. It matters against the gradient of L_PT only: see the module.
        targets: "auto", the name of an architecture, or regular expressions over the names of parameters.
        trainable: "targets" freezes everything else; "all" trains all but the pooler; "auto" is "targets" for BERT (the paper's
            appendix), else "all".
        dose: what `suggest_learning_rate` aims at, and what a warning compares with. Never a schedule.
        allow_unknown_head: run although nobody can tell whether the head was trained.

    >>> RECIPE(coef=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: recipe: `coef` must be finite and >= 0, got -1.0: it weighs norms that are to shrink. Use 1.0.
    """

    name = "recipe"
    takes_hidden = True  # it reads no scores
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors' run on BERT. Static masks, texts padded to 64, rate 2e-5, 8 epochs of 20,000 texts are data and arguments.
        "paper": {"coef": 1.0, "targets": "bert", "trainable": "targets"},
    }

    coef: float = 1.0
    targets: str | list[str] = "auto"
    trainable: Literal["auto", "targets", "all"] = "auto"
    dose: float = 1.25
    allow_unknown_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._names: list[str] = []
        self._start: list[float] = []
        self._std = 0.0
        self._sum_lr = 0.0
        self._now = torch.zeros(0)  # as of the last micro-batch, and of the end
        self._left: list[float] = []  # predicted ratios, by the grid of doses
        self._pooler_kept = False
        self._trained: dict[str, bool] = {}

    @classmethod
    def paper_bert(cls, **overrides: Any) -> "RECIPE":
        """The authors' settings for BERT."""
        return cls.preset("paper", **overrides)

    def field_reasons(self) -> list[str]:
        """A coefficient and a dose that are ones."""
        reasons = []
        if not (np.isfinite(self.coef) and self.coef >= 0):
            reasons.append(
                f"`coef` must be finite and >= 0, got {self.coef}: it weighs norms that are to shrink. Use 1.0."
            )
        if not (np.isfinite(self.dose) and self.dose > 0):
            reasons.append(
                f"`dose` must be finite and above 0, got {self.dose}: the learning rate comes from it. Use 1.25."
            )
        if not self.targets:
            reasons.append("`targets` is empty: nothing would be pressed down. Use 'auto', or name matrices.")
        return reasons

    def suggest_learning_rate(self, model: nn.Module, steps: int) -> float:
        """The peak rate whose linear decay to 0 over `steps` updates adds up to the dose: 2·dose·std(W)/steps.

        Raises:
            ValueError: as `target_weights`; no matrix matches; no steps.
        """
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}: there is no rate for no updates.")
        weights = target_weights(model, self.targets)
        if not weights:
            raise ValueError(no_match(model, self.targets))
        return 2 * self.dose * _std(list(weights.values())) / steps

    # -- hosting ------------------------------------------------------------------------------------------------------
    def check(self, trainer: Any) -> list[str]:
        """Matrices that exist, can move and take part in a loss that means something."""
        model, args = unwrapped(trainer.model), trainer.args
        reasons = []
        if has_adapter(model):
            reasons.append(
                f"{type(model).__name__} carries an adapter: a frozen base cannot shrink. Merge it first, "
                "model.merge_and_unload()."
            )
        try:
            if not target_weights(model, self.targets):
                reasons.append(no_match(model, self.targets))
        except ValueError as error:
            reasons.append(str(error))
        reasons += self._head_reasons(model)
        reasons += float32_reasons(model)
        if args.gradient_checkpointing and not self._trains_all(model):
            if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False):
                reasons.append(
                    "reentrant gradient checkpointing loses the gradient behind frozen embeddings. Set "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
        if args.weight_decay and not reasons:
            logger.warning(
                "recipe: weight_decay is %g, and decay shrinks all weights by another law than the penalty. Set it to 0 "
                "to measure RECIPE alone.",
                args.weight_decay,
            )
        return reasons

    def _head_reasons(self, model: nn.Module) -> list[str]:
        kind = getattr(model, "loss_type", None) or ("ForCausalLM" if "LMHead" in type(model).__name__ else None)
        if kind not in _PRETRAINING:
            return [
                f"{type(model).__name__} has no pre-training head: RECIPE cleans a model before it is fine-tuned, "
                "with the loss it was pre-trained on. Load the checkpoint with load_pretrained_whole."
            ]
        fresh = head_is_fresh(model)
        if fresh:
            missing = getattr(model.config, MISSING_KEYS, None) or ["its head"]
            return [
                f"the checkpoint has no pre-training head (drawn at random: {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}), so its loss is noise. Train one first: "
                "warm_up_mlm_head."
            ]
        if fresh is None and not self.allow_unknown_head:
            return [
                "nobody can tell whether the pre-training head was trained: the checkpoint it came from cannot be read. Load it "
                "with load_pretrained_whole, or set allow_unknown_head=True if you know."
            ]
        return []

    def _trains_all(self, model: nn.Module) -> bool:
        if self.trainable != "auto":
            return self.trainable == "all"
        return getattr(getattr(model, "config", None), "model_type", None) != "bert"

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """What trains; where the norms start. Names are kept, never the model."""
        model = unwrapped(trainer.model)
        weights = target_weights(model, self.targets)
        everything = self._trains_all(model)
        pooler = pooler_of(model)
        frozen = set() if pooler is None else {id(p) for p in pooler.parameters()}
        targeted = {id(p) for p in weights.values()}
        self._trained = {name: p.requires_grad for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in frozen and (everything or id(parameter) in targeted))
        self._names = list(weights)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        # At the level that is shown without being asked for: what is pressed down decides what is cleaned.
        logger.warning(
            "recipe: %d matrices are pressed down, %s trains: %s", len(weights), "everything" if everything else "nothing else",
            ", ".join(weights),
        )  # fmt: skip
        if self.targets == "auto" and kind not in PUBLISHED:
            logger.warning("recipe: the targets for %s are ours; no publication tried them.", kind)
        if checkpoint is not None:
            return
        values = list(weights.values())
        self._std = _std(values)
        self._now = frobenius_norms([w.detach() for w in values])
        self._start = self._now.tolist()
        self._sum_lr = 0.0
        curves = [norm_ratio_curve(w, step=self._std / _PER_STD, count=_GRID) for w in values]
        self._left = torch.stack(curves).mean(0).tolist()

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """{"norm": coef · Σ‖W‖}."""
        norms = self._norms(step.model)
        self._now = norms.detach()  # read when someone asks: no wait for the device here
        ratio = (norms.detach() / norms.new_tensor(self._start).clamp(min=1e-30)).mean()
        step.log(f"{self.name}/norm_ratio", ratio, latest=True)  # before this update
        step.log(f"{self.name}/sum_lr", norms.new_tensor(self._sum_lr), latest=True)
        step.log(f"{self.name}/dose", norms.new_tensor(self._dose()), latest=True)
        return {} if self.coef == 0 else {"norm": self.coef * norms.sum()}

    def _norms(self, model: nn.Module) -> Tensor:
        inside = dict(unwrapped(model).named_parameters())
        return frobenius_norms([inside[name] for name in self._names])

    def observe(self, step: Step, values: Tensor) -> None:
        """The pre-training loss by itself: what is logged as `loss` holds the norms too."""
        if values.numel():
            step.log(f"{self.name}/pretraining_loss", values.detach().float().mean())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Add up the rate of the update that follows."""
        self._sum_lr += float(optimizer.param_groups[0]["lr"])

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Norms as they are left, and what trained before trains again; too small a dose is said aloud."""
        core = unwrapped(model)
        self._now = self._norms(core).detach()
        self._pooler_kept = pooler_of(core) is not None
        for name, parameter in core.named_parameters():
            parameter.requires_grad_(self._trained[name])
        dose = self._dose()
        if self.coef and dose < LITTLE:
            rate = 2 * self.dose * self._std / max(state.global_step, 1)
            logger.warning(
                "recipe: the dose was %.2f (sum of rates %.4f over std %.4f), which is expected to do next to nothing. "
                "A rate of %.1e over these %d updates would give %.2f.",
                dose, self._sum_lr, self._std, rate, state.global_step, self.dose,
            )  # fmt: skip

    # -- reporting ----------------------------------------------------------------------------------------------------
    def _dose(self) -> float:
        return self._sum_lr / self._std if self._std else 0.0

    def _ratio(self) -> float:
        pairs = [now / start for now, start in zip(self._now.tolist(), self._start, strict=True) if start]
        return float(np.mean(pairs)) if pairs else 1.0

    def activity(self) -> dict[str, float]:
        """`norm_ratio` is what is left of the norms; `predicted_norm_ratio` what the penalty alone would leave of these weights,
        `gaussian_norm_ratio` of Gaussian ones."""
        predicted = float(np.interp(_PER_STD * self._dose(), range(_GRID), self._left)) if self._left else 1.0
        return {
            "n_targets": float(len(self._names)),
            "sum_lr": self._sum_lr,
            "dose": self._dose(),
            "norm_ratio": self._ratio(),
            "predicted_norm_ratio": predicted,
            "gaussian_norm_ratio": gaussian_norm_ratio(self._dose()),
            "pooler_kept": float(self._pooler_kept),
        }

    def inert(self) -> str | None:
        """Or: no penalty, no training, norms that are what they were."""
        if self.coef == 0:
            return "coef is 0: this is plain continued pre-training"
        if not self._names:
            return "it was never trained"
        if self._ratio() > 0.995:
            why = "was too small" if self._dose() < LITTLE else "lost to the pre-training loss"
            if self._ratio() > _GREW and self._dose() >= LITTLE:
                why = "came in steps so large that the weights grew: lower the learning rate, over more updates"
            return f"the norms are {self._ratio():.1%} of what they were: the dose of {self._dose():.2f} {why}"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": self._names, "start": self._start, "now": self._now.tolist(), "std": self._std,
            "sum_lr": self._sum_lr, "left": self._left, "pooler_kept": self._pooler_kept,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names, self._start, self._now = list(state["names"]), list(state["start"]), torch.tensor(state["now"])
        self._std, self._sum_lr, self._left = float(state["std"]), float(state["sum_lr"]), list(state["left"])
        self._pooler_kept = bool(state["pooler_kept"])


@dataclass(kw_only=True, eq=False)
class PenaltyOnly(RECIPE):
    """The paper's ablation, and a control: the norms alone, no pre-training loss. It shrinks what clean text needs too.

    >>> PenaltyOnly().name
    'penalty_only'
    """

    name = "penalty_only"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def loss(self, step: Step) -> Tensor:
        """[n_valid] zeros, with gradients of zero: data parallelism waits for the gradient of every weight that trains."""
        values = super().loss(step)
        super().observe(step, values)
        return 0 * values

    def observe(self, step: Step, values: Tensor) -> None:
        """Nothing: the zeros say nothing, and the pre-training loss is logged already."""

    def inert(self) -> str | None:
        """As RECIPE, with a reason of its own for no penalty."""
        return "coef is 0: nothing is trained" if self.coef == 0 else super().inert()


def _std(weights: Sequence[Tensor]) -> float:
    """Root mean square distance from the mean of all entries together; float64."""
    count = sum(w.numel() for w in weights)
    mean = sum(w.detach().double().sum() for w in weights) / count
    return float((sum((w.detach().double() - mean).square().sum() for w in weights) / count) ** 0.5)  # type: ignore[operator, arg-type]
