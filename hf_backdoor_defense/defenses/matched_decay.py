"""A control, not a defense: cross-entropy whose learning rate falls as much as DeCE's pull did.

    rate of a step in epoch e = scheduled rate x pull[e]

DeCE's pull shrinks from epoch to epoch, which is an early stop as well. This control takes from DeCE nothing but that: the mean
pull of each epoch (`DeCE.pull_per_epoch`), as a factor on the learning rate, because Adam undoes a factor on the loss.
What DeCE achieves beyond this control is due to *which* rows it lets go of.
"""

from dataclasses import dataclass, field
from typing import Any

from hf_backdoor_defense.objectives import Objective


@dataclass(kw_only=True, eq=False)
class MatchedDecay(Objective):
    """Plain cross-entropy, learning rate times `pull[epoch]`; the last value holds for later epochs.

    >>> MatchedDecay(pull=[0.9, 0.5]).factor(epoch=1.25)
    0.5
    >>> MatchedDecay(pull=[])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: matched_decay: `pull` must hold a factor in (0, 1] per epoch, got []: run DeCE first and pass its ...
    """

    name = "matched_decay"

    pull: list[float] = field(default_factory=lambda: [1.0])

    def field_reasons(self) -> list[str]:
        """At least one factor, each in (0, 1]."""
        if not self.pull or not all(0 < value <= 1 for value in self.pull):
            return [
                f"`pull` must hold a factor in (0, 1] per epoch, got {self.pull}: run DeCE first and pass its "
                "pull_per_epoch()."
            ]
        return []

    def factor(self, epoch: float) -> float:
        """The factor in force at `epoch`."""
        return self.pull[min(int(epoch), len(self.pull) - 1)]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the rates of this one step; the scheduler sets them anew from its own base after it."""
        self._rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
            group["lr"] = rate * self.factor(state.epoch or 0.0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the scheduled rates back, so that nothing compounds whatever the scheduler does."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=True):
            group["lr"] = rate

    def activity(self) -> dict[str, float]:
        """Smallest and largest factor."""
        return {"factor_min": min(self.pull), "factor_max": max(self.pull)}

    def inert(self) -> str | None:
        """All factors are 1: plain fine-tuning."""
        return "matched_decay has only factors of 1: it is plain fine-tuning" if min(self.pull) == 1 else None
