"""Curves while training: clean accuracy and attack success rate after every epoch."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.evaluation.metrics import wilson

_SHARES = ("backdoor_ca", "backdoor_asr", "backdoor_r_acc")


class BackdoorEvalCallback(TrainerCallback):
    """Evaluates at the end of every epoch and writes `backdoor_ca`, `backdoor_asr`, `backdoor_r_acc` into the Trainer's log
    history, which is saved with every checkpoint: a resumed run continues the curve.

    It only reports. Nothing it measures may choose a checkpoint or a hyper-parameter.

    With several processes it is collective: each measures its part of the rows, and all exchange the counts. Add it on every
    process, with the same rows; on the first alone it would wait for the others forever.

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
            gather=True,  # every process is here
        )
        assert scores.ca is not None
        entry = {"epoch": round(state.epoch or 0.0, 4), "step": state.global_step, "backdoor_ca": scores.ca.value}
        if scores.asr is not None and scores.r_acc is not None:
            entry |= {"backdoor_asr": scores.asr.value, "backdoor_r_acc": scores.r_acc.value}
        entry |= {f"backdoor_{name}_n": value.n for name, value in vars(scores).items() if value is not None}
        state.log_history.append(entry)


def curve(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The recorded points of a run, oldest first: epoch, ca and (where measured) asr and r_acc.

    >>> curve([{"loss": 1.0}, {"epoch": 1.0, "step": 4, "backdoor_ca": 0.5, "backdoor_asr": 0.9, "backdoor_r_acc": 0.1}])
    [{'epoch': 1.0, 'ca': 0.5, 'asr': 0.9, 'r_acc': 0.1}]
    """
    return [
        {key.removeprefix("backdoor_"): float(entry[key]) for key in ("epoch", *_SHARES) if key in entry}
        for entry in log_history
        if "backdoor_ca" in entry
    ]


def last_scores(log_history: list[dict[str, Any]], *, step: int) -> BackdoorScores | None:
    """The point that was recorded at a step, the last one usually, with its intervals; None where there is none.

    >>> last_scores([{"backdoor_ca": 0.9, "backdoor_ca_n": 10, "epoch": 1.0, "step": 3}], step=3).ca.n
    10
    """
    entry = next((e for e in reversed(log_history) if "backdoor_ca_n" in e and e["step"] == step), None)
    if entry is None:
        return None
    found = {
        name.removeprefix("backdoor_"): wilson(round(entry[name] * entry[f"{name}_n"]), entry[f"{name}_n"])
        if name in entry
        else None
        for name in _SHARES
    }
    return BackdoorScores(**found)
