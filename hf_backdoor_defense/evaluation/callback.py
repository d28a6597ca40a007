"""Curves while training: clean accuracy and attack success rate after every epoch."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor


class BackdoorEvalCallback(TrainerCallback):
    """Evaluates at the end of every epoch and writes `backdoor_ca`, `backdoor_asr`, `backdoor_r_acc` into the Trainer's log
    history, which is saved with every checkpoint: a resumed run continues the curve.

    It only reports. Nothing it measures may choose a checkpoint or a hyper-parameter.

    Args: as `evaluate_backdoor`.
    """

    def __init__(
        self,
        clean: Any,
        triggered: Any = None,
        *,
        target: int | None = None,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        batch_size: int = 64,
    ) -> None:
        self.clean, self.triggered, self.target = clean, triggered, target
        self.collate, self.batch_size = collate, batch_size

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and record."""
        scores = evaluate_backdoor(
            kwargs["model"],
            self.clean,
            self.triggered,
            target=self.target,
            collate=self.collate,
            batch_size=self.batch_size,
        )
        assert scores.ca is not None
        entry = {"epoch": round(state.epoch or 0.0, 4), "step": state.global_step, "backdoor_ca": scores.ca.value}
        if scores.asr is not None and scores.r_acc is not None:
            entry |= {"backdoor_asr": scores.asr.value, "backdoor_r_acc": scores.r_acc.value}
        state.log_history.append(entry)


def curve(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The recorded points of a run, oldest first: epoch, ca and (where measured) asr.

    >>> curve([{"loss": 1.0}, {"epoch": 1.0, "step": 4, "backdoor_ca": 0.5, "backdoor_asr": 0.9, "backdoor_r_acc": 0.1}])
    [{'epoch': 1.0, 'ca': 0.5, 'asr': 0.9, 'r_acc': 0.1}]
    """
    return [
        {key.removeprefix("backdoor_"): float(value) for key, value in entry.items() if key != "step"}
        for entry in log_history
        if "backdoor_ca" in entry
    ]
