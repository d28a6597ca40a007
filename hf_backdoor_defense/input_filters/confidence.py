"""The plain confidence of a classifier: the control beside every filter that claims to see more.

    s(x) = log max softmax z(x)

A backdoored checkpoint is often surer of triggered texts than of any clean one, and then nothing has to be trained to catch
them. Whatever a filter catches beyond this is its own.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from hf_backdoor_defense.functional.thresholds import Tail, log_confidence
from hf_backdoor_defense.input_filters.bound import BoundFilter


class ConfidenceFilter(BoundFilter):
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
        super().__init__(model, tokenizer, max_length=max_length, batch_size=batch_size, progress=progress)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        return log_confidence(self.logits(texts)).numpy()
