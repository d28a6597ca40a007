"""What a model does with clean and with triggered rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hf_backdoor_defense.evaluation.metrics import Estimate, accuracy, attack_success_rate, recovered_accuracy
from hf_backdoor_defense.models import dealt, gathered, predict_logits


@dataclass(frozen=True)
class BackdoorScores:
    """`ca`: accuracy on clean rows; `asr`, `r_acc`: share of triggered non-target rows predicted as the target, and as
    their true label. The `asr` of a clean reference model is the false-trigger rate, the floor of every other one.
    """

    ca: Estimate | None
    asr: Estimate | None
    r_acc: Estimate | None


def evaluate_backdoor(
    model: nn.Module,
    clean: Any,
    triggered: Any = None,
    *,
    target: int | None = None,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int = 64,
    progress: bool = False,
    gather: bool = False,
) -> BackdoorScores:
    """Clean accuracy, attack success rate and recovered accuracy with Wilson intervals.

    Args:
        clean: tokenized rows with `label` (or `labels`), untouched.
        triggered: tokenized rows that carry the trigger, with their *true* label; None measures only clean accuracy.
        target: the attacker's class.
        gather: deal the rows out to all processes and gather their predictions. Call it on every process then.

    Raises:
        ValueError: no rows, or triggered rows without a target.
    """
    if triggered is not None and target is None:
        raise ValueError(
            "Triggered rows were given without `target`: which class does the attacker want? Pass target=…."
        )
    title = "evaluating {}" if progress else None

    def predict(rows: Any, name: str) -> np.ndarray:
        bar = title.format(name) if title else None
        few = dealt(len(rows)) if gather and len(rows) else None
        found = predict_logits(model, rows, collate, indices=few, batch_size=batch_size, progress=bar).argmax(-1)
        if few is not None:
            found = gathered(found, len(rows), device=next(model.parameters()).device)
        return found.numpy()

    ca = accuracy(predict(clean, "clean rows"), true_labels(clean))
    if triggered is None or target is None:
        return BackdoorScores(ca, None, None)
    predicted, labels = predict(triggered, "triggered rows"), true_labels(triggered)
    return BackdoorScores(
        ca,
        attack_success_rate(predicted, labels, target=target),
        recovered_accuracy(predicted, labels, target=target),
    )


def true_labels(rows: Any) -> np.ndarray:
    """The label column of a data set, under either of its names."""
    return np.asarray(rows["label" if "label" in rows.column_names else "labels"])
