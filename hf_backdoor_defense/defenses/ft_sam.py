"""FT-SAM: fine-tuning whose every update is computed at the worst point nearby.

    g  = gradient of the clean loss at theta
    e  = rho · theta² ⊙ g / ‖ |theta| ⊙ g ‖        (adaptive;  else  rho · g / ‖g‖)
    g' = gradient at theta + e, on the same rows;   theta <- theta − step(g')

| symbol | what it is | shape |
|---|---|---|
| theta | all weights that train; the norms run over all of them together | [P] |
| e | the perturbation, taken back before the step | [P] |

Two passes per update. Normalization statistics do not move in the second one. A control beside D3 and ULRL.

Source: as in BackdoorBench, commit f02e353 (its configuration for PreAct-ResNet18; the paper was not read).
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.functional.cross_entropy import valid
from hf_backdoor_defense.models import unwrapped
from hf_backdoor_defense.objectives import Objective, Step, overrides
from hf_backdoor_defense.pretrained import float32_reasons

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class FTSAM(Objective):
    """Fine-tune on clean rows with sharpness-aware updates: a control. Prefer `ULRL` or `D3`.

    One batch per update on one process; `max_grad_norm=0`, since the second gradient is not clipped.

    Args:
        rho: radius of the perturbation; 2 suits the adaptive form on small networks. 0 is plain fine-tuning.
        adaptive: scale the perturbation with the weights.
        label_smoothing: of the cross-entropy, as torch defines it.

    >>> FTSAM(rho=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: ft_sam: `rho` must be finite and >= 0, got -1.0: it is a radius. Use 2.0.
    """

    name = "ft_sam"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    rho: float = 2.0
    adaptive: bool = True
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batch: tuple[dict[str, Any], Tensor] | None = None
        self._norm = torch.zeros(())
        self._perturbed = 0
        self._autocast: torch.dtype | None = None

    def field_reasons(self) -> list[str]:
        """A radius and a share."""
        reasons = []
        if not (math.isfinite(self.rho) and self.rho >= 0):
            reasons.append(f"`rho` must be finite and >= 0, got {self.rho}: it is a radius. Use 2.0.")
        if not 0 <= self.label_smoothing < 1:
            reasons.append(f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}: it is a share. Use 0.1.")
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """One batch and one process per update: the perturbation is not additive."""
        args, model = trainer.args, unwrapped(trainer.model)
        reasons = []
        if getattr(model, "loss_type", None) not in ("ForSequenceClassification", "ForImageClassification"):
            reasons.append(
                f"{type(model).__name__} is no sequence or image classifier: its second pass takes one label per row. Use "
                "RECIPE."
            )
        if args.gradient_accumulation_steps > 1 or args.world_size > 1:
            reasons.append(
                f"{args.gradient_accumulation_steps} accumulation steps and {args.world_size} processes: the perturbation is "
                "computed from the whole update's gradient. Use one batch per update on one process."
            )
        if getattr(getattr(trainer.accelerator, "state", None), "deepspeed_plugin", None) is not None:
            reasons.append("DeepSpeed steps inside backward, before the second pass. Use one plain process.")
        others = [o.name for o in trainer.objectives if o is not self and _adds_gradients(o)]
        if others:
            reasons.append(
                f"{', '.join(others)} adds to the gradients, and FT-SAM replaces them all by those at the worst point. Host it "
                "alone."
            )
        if args.fp16:
            reasons.append("fp16 scales the loss, and the second gradient would not be. Use bf16=True, or float32.")
        if has_adapter(model):
            reasons.append(f"{type(model).__name__} carries an adapter: merge it first, model.merge_and_unload().")
        reasons += float32_reasons(model)
        if args.max_grad_norm and not reasons:
            logger.warning(
                "ft_sam: max_grad_norm=%g does not reach the second gradient. Set it to 0.", args.max_grad_norm
            )
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Remember how the host computes."""
        self._autocast = torch.bfloat16 if trainer.args.bf16 else None

    def loss(self, step: Step) -> Tensor:
        """Label-smoothed cross-entropy, row by row."""
        assert step.logits is not None  # a classifier's
        self._batch = (dict(step.inputs), step.labels)
        return self._values(step.logits, step.labels)

    def _values(self, logits: Tensor, labels: Tensor) -> Tensor:
        keep = valid(labels)
        return nn.functional.cross_entropy(
            logits[keep].float(), labels[keep], reduction="none", label_smoothing=self.label_smoothing
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Replace the gradients by those at theta + e."""
        batch, self._batch = self._batch, None
        weights = [p for p in model.parameters() if p.grad is not None]
        if batch is None or not weights:
            return
        with torch.no_grad():
            moves = perturbation([w.detach() for w in weights], [w.grad for w in weights], self.rho, self.adaptive)  # type: ignore[misc]
            self._norm = torch.stack([torch.linalg.vector_norm(e) for e in moves]).norm()
            before = [w.detach().clone() for w in weights]
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
                weight.grad = None
        try:
            with _frozen_statistics(model), torch.enable_grad(), self._precision(weights[0].device):
                inputs, labels = batch
                self._values(model(**inputs)["logits"], labels).mean().backward()
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)
        self._perturbed += bool(self._norm > 0)

    def _precision(self, device: torch.device) -> Any:
        return contextlib.nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast)

    def activity(self) -> dict[str, float]:
        """`ft_sam_perturbation`: ‖e‖ of the last update; `ft_sam_updates`: how many were perturbed."""
        return {"ft_sam_perturbation": float(self._norm), "ft_sam_updates": float(self._perturbed)}

    def inert(self) -> str | None:
        """Or: nothing was ever perturbed."""
        if self.rho == 0:
            return "rho is 0: this is plain fine-tuning"
        return None if self._perturbed else "no update was perturbed"

    def state_dict(self) -> dict[str, Any]:
        return {"norm": float(self._norm), "perturbed": self._perturbed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norm, self._perturbed = torch.tensor(float(state["norm"])), int(state["perturbed"])


def perturbation(weights: list[Tensor], gradients: list[Tensor], rho: float, adaptive: bool) -> list[Tensor]:
    """The step to the worst point nearby, tensor by tensor; the norm runs over all of them.

    >>> perturbation([torch.tensor([2.0, 0.0])], [torch.tensor([3.0, 5.0])], rho=1.0, adaptive=True)
    [tensor([2., 0.])]
    """
    scaled = [w.abs() * g if adaptive else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([torch.linalg.vector_norm(s) for s in scaled]).norm() + 1e-12
    return [(w.abs() * s if adaptive else s) * (rho / norm) for w, s in zip(weights, scaled, strict=True)]


def _adds_gradients(objective: Objective) -> bool:
    return overrides(objective, "penalties") or overrides(objective, "on_pre_optimizer_step")


@contextlib.contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Running statistics of normalization layers keep their values, though these layers go on normalizing by the batch."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    kept = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in layers]
    for module in layers:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, (momentum, tracked) in zip(layers, kept, strict=True):
            module.momentum = momentum
            if tracked is not None and module.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(tracked)
