"""Comparators: losses for noisy labels, hosted like a defense, so that DeCE has something to be better than.

    gce       (1 - p_t^q) / q                             in_trust  a CE - b sum_k p_k log(d p_k + (1 - d) y_k)
    focal     (1 - p_t)^gamma CE                          smoothed  CE on (1 - e) onehot + e / classes

| method | field | where the value stands |
|---|---|---|
| `gce` | `q` = 0.5 | DeCE authors' code (f34241a); the tensor mathematics of the first three is `functional/robust_losses.py` |
| `in_trust` | `alpha` = 0.2, `beta` = 0.8, `delta` = 0.5, `label_floor` = 1e-4 | likewise |
| `focal` | `gamma` = 2.0 | ours: the value in common use |
| `smoothed` | `label_smoothing` = 0.1 | ours: the value in common use; torch's convention, DeCE's is another |

None of them is annealed: what they let go of, they let go of from the first step on. Focal loss does the opposite (it lets
go of what is learned already) and is a negative control.
When not to use them: as the defense. They are here to be compared with, at the same rate, steps and data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_backdoor_defense.functional.cross_entropy import cross_entropy, top1
from hf_backdoor_defense.functional.robust_losses import (
    distrust,
    focal_loss_from_logps,
    focal_pull,
    gce_loss_from_logps,
    gce_pull,
)
from hf_backdoor_defense.objectives import Objective, Step, everywhere, is_first_process

INERT_BELOW = 1e-6


@dataclass(kw_only=True, eq=False)
class Comparator(Objective):
    """Base of the comparators: sums per-position figures over a run, on the device, and reports their means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sums: dict[str, Tensor] = {}
        self._is_whole = True  # whether the sums are those of all processes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new run starts with empty records; a resumed one keeps what the checkpoint held."""
        if state.global_step == 0 or not is_first_process():
            self._sums = {}
        self._is_whole = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The sums become those of all processes."""
        self._sums, self._is_whole = dict(self.state_dict()), True

    @torch.no_grad()
    def record(self, step: Step, **figures: Tensor) -> None:
        """Add [n_valid] figures to the sums, log their means, and note the accuracy where positions are tokens."""
        assert step.logits is not None
        if step.labels.ndim > 1:
            step.note_top1(top1(step.logits, step.labels))
        for name, values in figures.items():
            wide = torch.float32 if values.device.type == "mps" else torch.float64  # sums over a whole run
            now = torch.stack([values.sum(dtype=wide), torch.full_like(values, 1.0, dtype=wide).sum()])
            before = self._sums.get(name)
            self._sums[name] = now if before is None else before.to(now.device) + now
            if values.numel():
                step.log(f"{self.name}/{name}", values.to(torch.float32).mean())

    def activity(self) -> dict[str, float]:
        """The mean of each figure over all labeled positions of the run, and how many positions there were."""
        sums = {name: pair.tolist() for name, pair in self._sums.items()}
        means = {name: total / max(count, 1.0) for name, (total, count) in sums.items()}
        return {**means, "positions": max(count for _, count in sums.values())} if sums else {}

    def inert(self) -> str | None:
        """A run without a labeled position; what else makes a loss plain cross-entropy is told by each class."""
        return None if self.activity().get("positions") else f"{self.name} saw no labeled position"

    def state_dict(self) -> dict[str, Any]:
        """[sum, positions] of each figure, over all processes."""
        here = {name: pair.to("cpu", torch.float64) for name, pair in self._sums.items()}
        if self._is_whole:
            return here
        whole: dict[str, Any] = {}
        for part in everywhere(here):
            for name, pair in part.items():
                whole[name] = pair + whole.get(name, 0)
        return whole

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums = dict(state)


@dataclass(kw_only=True, eq=False)
class GCE(Comparator):
    """Generalized cross-entropy: a label of probability p keeps p^q of its pull, in every epoch alike.

    Args:
        q: in [0, 1]; 0 is cross-entropy, 1 the mean absolute error.

    >>> GCE(q=2)
    Traceback (most recent call last):
    ...
    ValueError: gce: `q` must be in [0, 1], got 2: it lies between cross-entropy and the absolute error. Set 0.5.
    """

    name = "gce"
    paper = "1805.07836"

    q: float = 0.5

    def field_reasons(self) -> list[str]:
        """The range of `q`."""
        if not 0 <= self.q <= 1:
            return [
                f"`q` must be in [0, 1], got {self.q}: it lies between cross-entropy and the absolute error. Set 0.5."
            ]
        return []

    def loss(self, step: Step) -> Tensor:
        """[n_valid] GCE; records the pull."""
        assert step.logits is not None
        logps = -cross_entropy(step.logits, step.labels)
        pull = gce_pull(logps.detach(), q=self.q)
        self.record(step, target_pull=pull, suppressed=pull < 0.5)
        return gce_loss_from_logps(logps, q=self.q)

    def inert(self) -> str | None:
        """Every position kept its full pull."""
        kept = self.activity().get("target_pull", 0.0)
        if 1 - kept < INERT_BELOW:
            return f"gce kept {kept:.8f} of cross-entropy's pull: q={self.q} changes nothing"
        return super().inert()


@dataclass(kw_only=True, eq=False)
class InTrust(Comparator):
    """In-trust loss: cross-entropy plus a term that trusts the prediction as much as the label.

    Args:
        alpha: weight of cross-entropy, at least 0.
        beta: weight of the second term, at least 0.
        delta: the prediction's share inside the second term, in [0, 1].
        label_floor: what a label gives to each other class inside the second term, in (0, 1).

    >>> InTrust(alpha=0.0, beta=0.0)
    Traceback (most recent call last):
    ...
    ValueError: in_trust: `alpha` and `beta` are both 0: nothing would be learned. Set 0.2 and 0.8.
    """

    name = "in_trust"

    alpha: float = 0.2
    beta: float = 0.8
    delta: float = 0.5
    label_floor: float = 1e-4

    def field_reasons(self) -> list[str]:
        """Ranges of all fields."""
        reasons = []
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < float("inf"):
                reasons.append(
                    f"`{name}` must be finite and at least 0, got {value}: it weighs a loss. Set 0.2 and 0.8."
                )
        if self.alpha == self.beta == 0:
            reasons.append("`alpha` and `beta` are both 0: nothing would be learned. Set 0.2 and 0.8.")
        if not 0 <= self.delta <= 1:
            reasons.append(
                f"`delta` must be in [0, 1], got {self.delta}: it is the prediction's share of a mixture. Set 0.5."
            )
        if not 0 < self.label_floor < 1:
            reasons.append(
                f"`label_floor` must be in (0, 1), got {self.label_floor}: it keeps a logarithm finite. Set 1e-4."
            )
        return reasons

    def loss(self, step: Step) -> Tensor:
        """[n_valid] in-trust loss; records what each term contributes."""
        assert step.logits is not None
        first = self.alpha * cross_entropy(step.logits, step.labels)
        second = self.beta * distrust(step.logits, step.labels, delta=self.delta, label_floor=self.label_floor)
        self.record(step, first_term=first, second_term=second)
        return first + second

    def inert(self) -> str | None:
        """Without the second term the loss is cross-entropy times a constant."""
        if self.beta == 0:
            return f"in_trust with beta=0 is cross-entropy times {self.alpha}: its second term is off"
        return super().inert()


@dataclass(kw_only=True, eq=False)
class Focal(Comparator):
    """Focal loss, the negative control: it lets go of what is learned and keeps hold of what surprises.

    Args:
        gamma: at least 0; 0 is cross-entropy.

    >>> Focal(gamma=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: focal: `gamma` must be finite and at least 0, got -1.0: below 0 certain labels would pull most. Set 2.0.
    """

    name = "focal"
    paper = "1708.02002"

    gamma: float = 2.0

    def field_reasons(self) -> list[str]:
        """The range of `gamma`."""
        if not 0 <= self.gamma < float("inf"):
            return [
                f"`gamma` must be finite and at least 0, got {self.gamma}: below 0 certain labels would pull most. "
                "Set 2.0."
            ]
        return []

    def loss(self, step: Step) -> Tensor:
        """[n_valid] focal loss; records the pull."""
        assert step.logits is not None
        logps = -cross_entropy(step.logits, step.labels)
        pull = focal_pull(logps.detach(), gamma=self.gamma)
        self.record(step, target_pull=pull, suppressed=pull < 0.5)
        return focal_loss_from_logps(logps, gamma=self.gamma)

    def inert(self) -> str | None:
        """Only the exponent tells: the mean pull may be 1 by chance, as it lies above 1 for some labels."""
        if self.gamma < INERT_BELOW:
            return f"focal with gamma={self.gamma} is cross-entropy"
        return super().inert()


@dataclass(kw_only=True, eq=False)
class Smoothed(Comparator):
    """Label-smoothed cross-entropy, torch's convention: every class, the label's included, gets e / classes.

    Args:
        label_smoothing: in [0, 1); 0 is cross-entropy.

    >>> Smoothed(label_smoothing=1.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: smoothed: `label_smoothing` must be in [0, 1), got 1.0: at 1 the label says nothing. Set 0.1.
    """

    name = "smoothed"
    paper = "1512.00567"

    label_smoothing: float = 0.1

    def field_reasons(self) -> list[str]:
        """The range of `label_smoothing`."""
        if not 0 <= self.label_smoothing < 1:
            return [
                f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}: at 1 the label says nothing. Set 0.1."
            ]
        return []

    def loss(self, step: Step) -> Tensor:
        """[n_valid] smoothed cross-entropy; records the mass given away and where the label is pushed down."""
        assert step.logits is not None
        values = cross_entropy(step.logits, step.labels, label_smoothing=self.label_smoothing)
        classes = step.logits.shape[-1]
        mass = self.label_smoothing * (classes - 1) / classes
        with torch.no_grad():
            # dL/dz_t = p_t - (1 - mass): beyond that certainty the loss pulls away from the label.
            beyond = -torch.expm1(-cross_entropy(step.logits, step.labels)) < mass
        self.record(step, smoothing_mass=torch.full_like(values, mass), pushed_down=beyond)
        return values

    def inert(self) -> str | None:
        """Nothing was given away."""
        if self.label_smoothing < INERT_BELOW:
            return f"smoothed with label_smoothing={self.label_smoothing} is cross-entropy"
        return super().inert()
