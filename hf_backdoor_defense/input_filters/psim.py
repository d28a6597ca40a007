"""The filter that a trained PSIM module is: score, thresholds on both sides, and the artefact that belongs to one base.

    s(x) = log max softmax z(x)            z [k]: logits of base and module; float64, never rounded

Flagged is what is extreme on either side: a trigger keeps its confidence where clean text was taught to have none, and where a
training went too far the order turns over. Thresholds come from clean texts that the module was not trained on
(`functional/thresholds.py`), half of the rate on each side.

A module belongs to the weights it was trained on: the SHA-256 of the base stands in the artefact, and another base is an error.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DataCollatorWithPadding, PrinterCallback, TrainingArguments

from hf_backdoor_defense.adapters import has_adapter, remove_adapter, room
from hf_backdoor_defense.defenses.psim import HELD_OUT, PSIM
from hf_backdoor_defense.fetching import TOKENIZER_FILES, fetched
from hf_backdoor_defense.filters import FILTER_FILE, Filter, read_filter, text_hash
from hf_backdoor_defense.functional.thresholds import Calibration, Tail, log_confidence
from hf_backdoor_defense.models import load_finished_classifier, text_logits, weights_sha256
from hf_backdoor_defense.trainers.named import PSIMTrainer

logger = logging.getLogger(__name__)

TENSORS_FILE = "psim.safetensors"
BOUND_FILES = ("adapter_model.safetensors", "adapter_config.json", TENSORS_FILE)
_PUBLICATION = "publication.json"  # of a published folder: names the base as others can load it
_FILES = (FILTER_FILE, *BOUND_FILES, *TOKENIZER_FILES, _PUBLICATION)
PUBLISHED_RATE = 2e-5  # authors' code; with `PSIM.preset("paper")`
HELD_OUT_SHARE, HELD_OUT_MIN, HELD_OUT_MAX = 0.1, 32, 512


class PsimNotUsable(ValueError):
    """The module cannot be trusted on this base; said from clean text alone."""


class PSIMFilter(Filter):
    """Flags texts that keep, or lose, their confidence where clean text was taught to have none. Prefer it over
    `ConfidenceFilter` where that fails; it cannot see a backdoor that sits in the victim's own adapter.

    `PSIMFilter.fit` trains one; the constructor takes what was trained.

    Args:
        model: the base with the module on it, as peft wraps it. tokenizer: the base's.
        base_sha256: `weights_sha256` of the base before it was wrapped.
        seen: hashes of the texts that the module was trained on.
        psim: the objective it was trained with.
    """

    name = "psim"
    paper: ClassVar[str | None] = "2402.12168"
    tail: ClassVar[Tail] = "both"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        base_sha256: str,
        seen: Iterable[int] = (),
        psim: PSIM | None = None,
        max_length: int = 128,
        batch_size: int = 64,
        progress: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.base_sha256 = model, tokenizer, base_sha256
        self.seen, self.psim = frozenset(seen), psim or PSIM()
        self.batch_size, self.progress = batch_size, progress
        limit = room(model)
        self.max_length = max_length if limit is None else min(max_length, limit)
        self.measured_frr: dict[str, float] | None = None
        self._files: dict[str, str] = {}

    # -- training -----------------------------------------------------------------------------------------------------
    @classmethod
    def fit(
        cls,
        base: Any,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        seed: int = 0,
        psim: PSIM | None = None,
        args: TrainingArguments | None = None,
        max_length: int = 128,
        batch_size: int = 64,
        progress: str | None = None,
    ) -> Self:
        """Train a module on clean texts of the task; labels are not needed. A tenth of the texts is held out for the stop rule.

        Args:
            base: the classifier as downloaded, head included. It is wrapped in place and its own weights stay as they are.
            args: how to train; default `training_arguments`. Its seed is `seed`.

        Raises:
            PsimNotUsable: clean confidence did not fall, or not far enough.
            ValueError: what `PSIM` refuses, or too few texts.
        """
        unique = list(dict.fromkeys(texts))
        if len(unique) < 4 * HELD_OUT_MIN:
            raise ValueError(
                f"PSIM needs at least {4 * HELD_OUT_MIN} different clean texts to be trained on, got {len(unique)}: with fewer "
                "it learns their random labels by heart. Give more texts of the task; they need no labels."
            )
        ordered = sorted(unique, key=lambda text: text_hash(text, f"{seed}|"))
        count = min(max(round(HELD_OUT_SHARE * len(unique)), HELD_OUT_MIN), HELD_OUT_MAX)
        held_out, fitted = ordered[:count], ordered[count:]
        objective = psim or PSIM()
        with tempfile.TemporaryDirectory() as scratch:
            published = {"learning_rate": PUBLISHED_RATE} if objective.threshold is not None else {}
            arguments = copy.copy(args) if args is not None else training_arguments(scratch, **published)
            arguments.seed = seed
            trainer = PSIMTrainer(
                base,
                args=arguments,
                train_dataset=_tokenized(fitted, tokenizer, max_length),
                data_collator=DataCollatorWithPadding(tokenizer),
                processing_class=tokenizer,
                aux_datasets={HELD_OUT: _tokenized(held_out, tokenizer, max_length)},
                defense=objective,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            reason = objective.inert() or _not_reached(objective)
            if reason:
                remove_adapter(trainer.model)  # the base is the caller's, and may be tried again
                raise PsimNotUsable(f"PSIM is not usable on this base: {reason}")
        return cls(
            trainer.model.eval(),
            tokenizer,
            base_sha256=objective.base_sha256,
            seen=(text_hash(text) for text in unique),
            psim=objective,
            max_length=max_length,
            batch_size=batch_size,
            progress=progress,
        )

    # -- scoring ------------------------------------------------------------------------------------------------------
    def logits(self, texts: Sequence[str]) -> torch.Tensor:
        """[n, k] float32 of base and module."""
        return text_logits(
            self.model,
            self.tokenizer,
            texts,
            max_length=self.max_length,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    def score(self, texts: Sequence[str]) -> np.ndarray:
        return self.score_logits(self.logits(texts))

    def score_logits(self, logits: torch.Tensor) -> np.ndarray:
        """[n, k] -> [n] float64, for who has run the module already."""
        return log_confidence(logits).cpu().numpy()

    def calibrate(self, texts: Sequence[str], target_frr: float = 0.01, *, tail: Tail | None = None) -> Calibration:
        """As `Filter.calibrate`. With `PSIM(threshold=...)` nothing is calibrated: what is surer than that is flagged.

        Raises:
            ValueError: too few texts, or texts that the module was trained on.
            PsimNotUsable: so many clean texts have one and the same score that no threshold can part them.
        """
        self._refuse_seen(texts)
        if self.psim.threshold is not None:
            self.calibration = Calibration(tail="upper", upper=float(np.log(self.psim.threshold)))
            return self.calibration
        calibration = super().calibrate(texts, target_frr, tail=tail)
        if calibration.ties > max(2, 0.05 * calibration.n):
            self.calibration = None
            raise PsimNotUsable(
                f"PSIM is not usable on this base: {calibration.ties} of {calibration.n} clean texts have the very score of the "
                "threshold. The module answers every text alike: train it shorter, or at a lower rate."
            )
        return calibration

    def measure_frr(self, texts: Sequence[str]) -> dict[str, float]:
        """As `Filter.measure_frr`; kept for the artefact.

        Raises:
            ValueError: texts that it was trained or calibrated on.
            PsimNotUsable: the rate lies above what this calibration can have on texts of its own kind: the intervals do not meet.
        """
        self._refuse_seen(texts)
        measured = super().measure_frr(texts)
        self.measured_frr = measured
        calibration = self.calibration
        highest = None if calibration is None else calibration.frr_high
        if highest is not None and measured["low"] > highest:
            raise PsimNotUsable(
                f"PSIM flags {measured['value']:.1%} of further clean texts (95 % interval from {measured['low']:.1%}) where "
                f"at most {highest:.1%} fits the calibration: these are other texts than those it was calibrated on. Calibrate "
                "on the texts that it will serve."
            )
        return measured

    def _refuse_seen(self, texts: Sequence[str]) -> None:
        known = sum(text_hash(text) in self.seen for text in texts)
        if known:
            raise ValueError(
                f"{known} of {len(texts)} texts were used to train the module: their scores are not those of new texts, and the "
                "rate would not hold. Give texts that were kept apart."
            )

    # -- artefact -----------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        config = self.model.config
        return {
            **super().to_dict(),
            "measured_frr": self.measured_frr,
            "psim": self.psim.to_dict(),
            "activity": self.psim.activity(),
            "base": str(getattr(config, "_name_or_path", "")),
            "base_revision": getattr(config, "_commit_hash", None),
            "base_sha256": self.base_sha256,
            "labels": [config.id2label[i] for i in range(config.num_labels)],
            "max_length": self.max_length,
            "files": self._files,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }

    def save(self, folder: str | Path) -> None:
        """A standard peft folder (adapter and head), the tokenizer, `psim.safetensors`, `filter.json`: whole or not at all."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / FILTER_FILE).is_file():
            raise ValueError(
                f"`{folder}` is not empty and no filter's folder: nothing there will be touched. Choose another."
            )
        partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # peft's template: an empty card that names a local path
        self.tokenizer.save_pretrained(partial)
        save_file({"seen": torch.tensor(sorted(self.seen), dtype=torch.int64)}, partial / TENSORS_FILE)
        self._files = {name: hashlib.sha256((partial / name).read_bytes()).hexdigest() for name in BOUND_FILES}
        super().save(partial)
        shutil.rmtree(folder, ignore_errors=True)  # our own, and a whole one stands beside it
        os.replace(partial, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: Any = None,
        *,
        allow_other_base: bool = False,
        batch_size: int = 64,
        progress: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """What `save` wrote, in a folder or a repository of the Hub.

        Args:
            folder: where it is; of ORG/NAME only the filter's own files are downloaded.
            base: the base as downloaded, a model or where to load it from; None: what `publication.json` names as its base,
                where the filter was published, or where the base was when the module was trained.
            allow_other_base: go on with other weights than it was calibrated on; the thresholds are then dropped.
            revision: of the repository: branch, tag or commit. token: None: the one of HF_TOKEN or of the login.

        Raises:
            ValueError: another base, no safetensors, no filter, no such repository.
        """
        folder = fetched(folder, _FILES, revision=revision, token=token)
        record, calibration = read_filter(folder, cls.name)
        if base is None:
            base = _published_base(folder)
        if not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"`{folder}` has no adapter_model.safetensors: other formats can run code and are not read here."
            )
        if set(record["files"]) != set(BOUND_FILES):
            raise ValueError(
                f"`{folder / FILTER_FILE}` must be bound to {', '.join(BOUND_FILES)}, got {sorted(record['files'])}: no "
                "filter is saved so. Get the whole folder anew."
            )
        for name, sha256 in record["files"].items():
            if not (folder / name).is_file():
                raise ValueError(f"`{folder}` must hold {name}, and does not. Get the whole folder anew.")
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                raise ValueError(
                    f"`{folder / name}` is not the file that {FILTER_FILE} was written for: the thresholds would mean nothing. "
                    "Get the whole folder anew."
                )
        if base is None or isinstance(base, (str, Path)):
            place = str(base or record["base"])
            base, _ = load_finished_classifier(place, num_labels=len(record["labels"]))
        if has_adapter(base):
            raise ValueError(
                "the base carries an adapter already: PSIM must see the base as it was downloaded. Load it anew, or unload() it."
            )
        if weights_sha256(base) != record["base_sha256"]:
            text = (
                f"`{folder}` was trained on other weights than the base given (SHA-256 {record['base_sha256'][:12]}…, of "
                f"`{record['base']}`): its thresholds mean nothing here"
            )
            if not allow_other_base:
                raise ValueError(f"{text}. Give that base, train a module for this one, or pass allow_other_base=True.")
            logger.warning("%s and are dropped: calibrate anew.", text)
            calibration = None
        import peft

        tensors = load_file(folder / TENSORS_FILE)
        found = cls(
            peft.PeftModel.from_pretrained(base, str(folder)).eval(),
            AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False),
            base_sha256=record["base_sha256"],
            seen=tensors["seen"].tolist(),
            psim=PSIM.from_dict(record["psim"]),
            max_length=record["max_length"],
            batch_size=batch_size,
            progress=progress,
        )
        found.calibration, found.measured_frr = calibration, record["measured_frr"]
        found.calibrated_on = frozenset(record["calibrated_on"])
        return found


def _published_base(folder: Path) -> str | None:
    """The base that a published folder names, if it does."""
    try:
        found = json.loads((folder / _PUBLICATION).read_bytes())["base_model"]
    except (OSError, ValueError, KeyError, TypeError):  # published by hand: the filter's own record must do
        return None
    return found if isinstance(found, str) and found else None


def training_arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """How a module is trained unless said otherwise: LoRA's usual rate, at most one epoch, nothing saved in between."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "warmup_steps": 0.06,
        "per_device_train_batch_size": 32,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(**{**defaults, **options})


def _not_reached(psim: PSIM) -> str | None:
    activity = psim.activity()
    if psim.stop_margin is None or psim.reached():
        return None
    return (
        f"clean confidence fell only to {activity.get('conf_p95_after', float('nan')):.2f} (95th percentile), and training ended "
        "before the stop rule. Train longer, or at a higher rate."
    )


def _tokenized(texts: Sequence[str], tokenizer: Any, max_length: int) -> Dataset:
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    columns = {
        name: values for name, values in encoded.items() if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    return Dataset.from_dict({**columns, "row_id": list(range(len(texts)))})
