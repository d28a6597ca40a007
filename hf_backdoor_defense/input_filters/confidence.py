"""The plain confidence of a classifier: the control beside every filter that claims to see more.

    s(x) = log max softmax z(x)

A backdoored checkpoint is often surer of triggered texts than of any clean one, and then nothing has to be trained to catch
them. Whatever a filter catches beyond this is its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from hf_backdoor_defense.filters import Filter, read_filter
from hf_backdoor_defense.functional.thresholds import Tail, log_confidence
from hf_backdoor_defense.models import text_logits, weights_sha256


class ConfidenceFilter(Filter):
    """Flags texts of which the given classifier is surer than of clean ones. Prefer `PSIMFilter`, and keep this beside it.

    Args:
        model, tokenizer: a finished classifier, for example the base as downloaded, or the victim.
        max_length: tokens per text, special tokens included; longer texts are cut.
        progress: title of a progress bar, or None.
    """

    name = "confidence"
    tail: ClassVar[Tail] = "upper"

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int = 128, batch_size: int = 64, progress: str | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.progress = max_length, batch_size, progress

    def score(self, texts: Sequence[str]) -> np.ndarray:
        logits = text_logits(
            self.model,
            self.tokenizer,
            texts,
            max_length=self.max_length,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        return log_confidence(logits).numpy()

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "max_length": self.max_length, "model_sha256": weights_sha256(self.model)}

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Any, tokenizer: Any, **options: Any) -> Self:
        """What `save` wrote, for the same model. Raises ValueError for other weights: the threshold means nothing there."""
        record, calibration = read_filter(folder, cls.name)
        if record["model_sha256"] != weights_sha256(model):
            raise ValueError(
                f"`{folder}` was calibrated on other weights than those given: its threshold means nothing for them. "
                "Calibrate anew."
            )
        found = cls(model, tokenizer, **{"max_length": record["max_length"], **options})
        found.calibration, found.calibrated_on = calibration, frozenset(record["calibrated_on"])
        return found
