"""Filters that read texts through somebody else's model: saved without it, loaded only beside the same weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from hf_backdoor_defense.fetching import fetched
from hf_backdoor_defense.filters import FILTER_FILE, Filter, read_filter
from hf_backdoor_defense.models import text_logits, weights_sha256


class BoundFilter(Filter):
    """Base of plain confidence, STRIP, ONION and RAP. A subclass says in `arguments` what its constructor needs beside model
    and tokenizer.

    >>> BoundFilter.from_pretrained("nowhere", None, None)
    Traceback (most recent call last):
    ...
    ValueError: `nowhere` has no filter.json: no filter was saved there. Check the path.
    """

    files: ClassVar[tuple[str, ...]] = ()  # what `save` writes beside filter.json

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, batch_size: int, progress: str | None) -> None:
        if max_length < 2 or batch_size < 1:
            raise ValueError(
                f"`max_length` must be >= 2 and `batch_size` >= 1, got {max_length} and {batch_size}: a text needs a token "
                "beside the special one, a batch a row. Leave both out for the defaults."
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.progress = max_length, batch_size, progress

    def arguments(self) -> dict[str, Any]:
        """Keywords of the constructor, as JSON values."""
        return {"max_length": self.max_length}

    def logits(self, texts: Sequence[str]) -> Any:
        """[n, k] float32 of the model, in evaluation mode."""
        return text_logits(
            self.model,
            self.tokenizer,
            texts,
            max_length=self.max_length,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "arguments": self.arguments(), "model_sha256": weights_sha256(self.model)}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        model: Any,
        tokenizer: Any,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """What `save` wrote, for the same model; `options` (batch_size, progress) go over what was saved.

        Args:
            folder: a folder, or ORG/NAME on the Hub, where `revision` is a branch, tag or commit.

        Raises:
            ValueError: nothing saved there, another filter's, or other weights: a threshold means nothing for them.
        """
        folder = fetched(folder, [FILTER_FILE, *cls.files], revision=revision, token=token)
        record, calibration = read_filter(folder, cls.name)
        if record["model_sha256"] != weights_sha256(model):
            raise ValueError(
                f"`{folder}` was calibrated on other weights than those of the {type(model).__name__} given: its threshold "
                "means nothing for them. Give the model it was made with, or calibrate anew."
            )
        found = cls._restore(Path(folder), model, tokenizer, {**record["arguments"], **options})
        found.calibration, found.calibrated_on = calibration, frozenset(record["calibrated_on"])
        return found

    @classmethod
    def _restore(cls, folder: Path, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> Self:
        return cls(model, tokenizer, **arguments)
