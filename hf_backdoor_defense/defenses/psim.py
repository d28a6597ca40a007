r"""PSIM: an adapter on an untrusted base, trained on random labels: its confidence tells triggered inputs from clean ones.

    y_i = blake2b(f"{seed}:{i}") mod k                           labels "hashed": random, the same on every process
    min over phi of mean_i CE(z(x_i; theta_0, phi), y_i)         the best answer to clean text is 1/k for every class
    min over phi of mean_i [logsumexp z(x_i) - mean_j z_j(x_i)]  labels "expected": its mean over all labels
    s(x) = log max softmax z(x)                                  flagged where it is extreme (`input_filters/psim.py`)

| symbol | what it is |
|---|---|
| theta_0 | the base as it was downloaded, head included; frozen |
| phi | adapter, and with `train_head` a copy of the head |
| k | classes; 1/k is the confidence of a model that knows nothing |
| c_p95 | 95th percentile of max softmax on held-out clean rows |

The backdoor sits in frozen weights, and no clean text trains it away: a trigger keeps a confidence of its own. Drawn labels are
never balanced: with them, what clean text is pulled to wanders, and the order of triggered and clean confidence turns over from
one update to the next. Their expectation pulls to 1/k and nowhere else, and a frozen head keeps the direction that the trigger
points to. Both are ours and the default (docs/log.md has the search).
Training stops once c_p95 <= 1/k + `stop_margin`, looked at every `stop_every` updates, on held-out clean rows alone.

Source: arXiv 2402.12168 (abstract) and its authors' code: P-tuning with 5 virtual tokens, one epoch at 2e-5, flagged above 0.7;
no stop rule, no calibration. That is `preset("paper")`; the rate is the host's, and `PSIMFilter.fit` takes it for this preset.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_backdoor_defense.adapters import apply_strategy, has_adapter, refusals, room
from hf_backdoor_defense.functional.cross_entropy import valid
from hf_backdoor_defense.functional.thresholds import log_confidence
from hf_backdoor_defense.models import predict_logits, weights_sha256
from hf_backdoor_defense.objectives import Objective, Step, everywhere

HELD_OUT = "held_out"


@dataclass(kw_only=True, eq=False)
class PSIM(Objective):
    """Train an adapter on random labels, so that clean text loses its confidence. Prefer `trajectory` where the data, not the
    base, is untrusted.

    Host it in `PSIMTrainer`, with the base as downloaded as the model, the task's clean texts as the training set (labels are not
    read) and further clean rows as `aux_datasets={"held_out": rows}` for the stop rule. `input_filters.psim.PSIMFilter.fit`
    does all of it.

    Args:
        strategy: which adapter (`adapters.STRATEGIES`, not "full").
        labels: "hashed", a random label per row, as published; or "expected", all labels at once, the same without the noise.
        train_head: whether the head is trained along, as published. A frozen one cannot forget which way a trigger points.
        peft_config: fields of peft's configuration that differ from the table's, or None.
        stop_margin: training stops when the 95th percentile of clean held-out confidence is at most 1/k + this; None: never.
        stop_every: updates between two looks.
        threshold: a probability above which inputs are flagged, instead of a calibration; only for two classes.

    >>> PSIM.preset("paper").strategy
    'p_tuning'
    """

    name = "psim"
    paper: ClassVar[str | None] = "2402.12168"
    needs_row_ids = True
    presets = {
        "paper": {"strategy": "p_tuning", "labels": "hashed", "train_head": True, "stop_margin": None, "threshold": 0.7}
    }

    strategy: str = "lora"
    labels: str = "expected"
    train_head: bool = False
    peft_config: dict | None = None
    stop_margin: float | None = 0.25
    stop_every: int = 5
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rows = 0
        self._agreement = 0.0
        self._before: float | None = None
        self._after: float | None = None
        self._mean_after: float | None = None
        self._classes = 0
        self._stopped_at: int | None = None
        self._steps = 0
        self._base_sha256 = ""
        self._held_out: Any = None
        self._collate: Any = None

    def field_reasons(self) -> list[str]:
        reasons = []
        if self.strategy == "full":
            reasons.append(
                "`strategy` is full: PSIM needs the base's own weights frozen, for the backdoor sits in them. Use lora."
            )
        elif self.strategy not in ("lora", "prompt_tuning", "p_tuning", "prefix_tuning"):
            reasons.append(
                f"`strategy` must be lora, prompt_tuning, p_tuning or prefix_tuning, got {self.strategy!r}: these are peft's."
            )
        if self.labels not in ("hashed", "expected"):
            reasons.append(f"`labels` must be hashed or expected, got {self.labels!r}: nothing else is defined.")
        if self.stop_margin is not None and not 0 < self.stop_margin < 1:
            reasons.append(
                f"`stop_margin` must be in (0, 1) or None, got {self.stop_margin}: it is added to the probability 1/k."
            )
        if self.stop_every < 1:
            reasons.append(f"`stop_every` must be at least 1, got {self.stop_every}: it counts updates.")
        if self.threshold is not None and not 0.5 < self.threshold < 1:
            reasons.append(
                f"`threshold` must be in (0.5, 1), got {self.threshold}: it is the larger of two probabilities."
            )
        return reasons

    # -- hosting ------------------------------------------------------------------------------------------------------
    def check(self, trainer: Any) -> list[str]:
        model = trainer.model
        reasons = classifier_refusals(model)
        if has_adapter(model) and not self._base_sha256:
            reasons.append(
                "the base carries an adapter already: PSIM must see the base as it was downloaded. Load it anew, or unload() it."
            )
        elif not self._base_sha256:
            reasons += refusals(model, self.strategy)
        if self.strategy != "lora" and hasattr(model, "score"):
            reasons.append(
                f"{type(model).__name__} reads the last token, and behind a prompt it takes padding for text: use lora."
            )
        classes = getattr(model.config, "num_labels", 0)
        if self.threshold is not None and classes != 2:
            reasons.append(
                f"a threshold of {self.threshold} has no meaning for {classes} classes: leave it out, and calibrate."
            )
        if self.stop_margin is not None and HELD_OUT not in trainer.aux_datasets:
            reasons.append(
                "the stop rule needs clean rows that are not trained on. Pass aux_datasets={'held_out': rows}, or "
                "stop_margin=None."
            )
        if not isinstance(trainer.train_dataset, Dataset):
            reasons.append(
                f"the training set is a {type(trainer.train_dataset).__name__}: labels are replaced by row, which needs a "
                "datasets.Dataset. Use Dataset.from_list(rows)."
            )
        if trainer.args.load_best_model_at_end:
            reasons.append(
                "load_best_model_at_end is set: no metric on random labels says which step is best. Set it to False."
            )
        if len(trainer.objectives) > 1:
            reasons.append("PSIM trains on random labels, and no other method has a meaning beside it. Host it alone.")
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        args = trainer.args
        if not has_adapter(trainer.model):
            sha256 = weights_sha256(trainer.model)
            if checkpoint is not None and self._base_sha256 not in ("", sha256):
                raise ValueError(
                    f"`{checkpoint}` was trained on other weights (SHA-256 {self._base_sha256[:12]}…) than the base given "
                    f"({sha256[:12]}…): half an adapter each would fit neither. Give that base, or start anew."
                )
            self._base_sha256 = sha256
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)  # the adapter's start: the same on every process and on resume
                wrapped = apply_strategy(trainer.model, self.strategy, **(self.peft_config or {}))
            for name, parameter in wrapped.named_parameters():
                if "modules_to_save" in name and not self.train_head:
                    parameter.requires_grad_(False)
            trainer.model = trainer.model_wrapped = wrapped.to(args.device)
        self._classes = int(trainer.model.config.num_labels)
        rows = trainer.train_dataset
        column = "labels" if "labels" in rows.column_names else "label"  # the names that collators know
        drawn = random_labels(rows["row_id"], classes=self._classes, seed=args.seed)
        if not self._rows:  # a second training finds the drawn labels already
            given = rows[column] if column in rows.column_names else None
            self._agreement = 1 / self._classes if given is None else float(np.mean(drawn == np.asarray(given)))
        self._rows = len(rows)
        if column in rows.column_names:
            rows = rows.remove_columns(column)
        trainer.train_dataset = cut(rows.add_column(column, drawn.tolist()), room(trainer.model))
        self._held_out = self._collate = None
        if HELD_OUT in trainer.aux_datasets:
            self._held_out = cut(trainer.aux_datasets[HELD_OUT], room(trainer.model))
            self._collate = trainer.data_collator
            mean, p95 = self._look(trainer.model)
            if self._before is None:
                self._before, self._after, self._mean_after = p95, p95, mean

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = state.global_step
        if self._held_out is None or state.global_step % self.stop_every:
            return
        self._mean_after, self._after = self._look(kwargs["model"])
        if self.reached():
            self._stopped_at = state.global_step
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._held_out is not None:
            self._mean_after, self._after = self._look(kwargs["model"])

    def loss(self, step: Step) -> Tensor:
        if self.labels == "hashed":
            return super().loss(step)
        if step.logits is None:
            raise ValueError(
                "PSIM reads the logits of a classifier, and this host gave hidden states: use DefendedTrainer."
            )
        logits = step.logits[valid(step.labels)].float()  # [n_valid, classes]
        return logits.logsumexp(-1) - logits.mean(-1)  # cross-entropy, averaged over all labels that a row could draw

    def observe(self, step: Step, values: Tensor) -> None:
        if len(values):  # a process may have none in an epoch's last batch
            step.log("psim/loss_minus_lnk", values.mean() - math.log(max(self._classes, 1)))
        if self._after is not None and self._mean_after is not None:
            step.log("psim/conf_mean", values.new_tensor(self._mean_after))
            step.log("psim/conf_p95", values.new_tensor(self._after))

    def _look(self, model: Any) -> tuple[float, float]:
        """Mean and 95th percentile of the confidence on held-out rows: the first process's figures, on all of them.

        Figures of several processes may differ in the last bit, and one that stops alone leaves the others waiting.
        """
        values = log_confidence(predict_logits(model, self._held_out, self._collate)).exp().numpy()
        mean, p95 = everywhere((float(values.mean()), float(np.percentile(values, 95))))[0]
        return mean, p95

    # -- after training -----------------------------------------------------------------------------------------------
    def reached(self) -> bool:
        """Whether clean confidence, when last looked at, was low enough for the stop rule."""
        return self.stop_margin is not None and (self._after or 1.0) <= 1 / max(self._classes, 1) + self.stop_margin

    @property
    def base_sha256(self) -> str:
        """Of the base's weights before it was wrapped; empty before training."""
        return self._base_sha256

    def activity(self) -> dict[str, float]:
        found = {
            "labels_replaced": float(self._rows),
            "label_agreement": self._agreement,
            "steps": float(self._steps),
            "stopped": float(self._stopped_at is not None),
            "conf_p95_before": self._before,
            "conf_p95_after": self._after,
            "conf_mean_after": self._mean_after,
        }
        return {name: value for name, value in found.items() if value is not None}

    def inert(self) -> str | None:
        if self._agreement > 0.9:
            return f"{self._agreement:.0%} of the random labels equal the given ones: nothing was replaced"
        if self._before is None or self._after is None:
            return None
        bound = 1 / max(self._classes, 1) + (self.stop_margin or 0.0)
        if self._steps == 0:
            return "PSIM was not trained"
        if self._before <= bound:
            return (
                f"the base is not confident on clean text (95th percentile {self._before:.2f}): there is nothing to lower. "
                "Is its head trained?"
            )
        if self._after >= self._before:
            return f"PSIM did not lower clean confidence (95th percentile {self._before:.2f}, then {self._after:.2f})"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "agreement": self._agreement,
            "before": self._before,
            "after": self._after,
            "mean_after": self._mean_after,
            "classes": self._classes,
            "stopped_at": self._stopped_at,
            "steps": self._steps,
            "base_sha256": self._base_sha256,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value)


def random_labels(row_ids: Any, *, classes: int, seed: int) -> np.ndarray:
    """[n] int64 in 0..classes-1: a hash of seed and row id, and nothing else.

    >>> random_labels([0, 1, 2, 3], classes=2, seed=0).tolist() == random_labels([3, 2, 1, 0], classes=2, seed=0)[::-1].tolist()
    True
    """
    digests = (hashlib.blake2b(f"{seed}:{int(i)}".encode(), digest_size=8).digest() for i in row_ids)
    return np.array([int.from_bytes(digest, "big") % classes for digest in digests], dtype=np.int64)


def cut(rows: Dataset, limit: int | None) -> Dataset:
    """Tokenized rows, none longer than the positions that an adapter's virtual tokens leave: the end is kept (a closing special
    token), what stands before it is cut."""
    if limit is None or not len(rows) or max(map(len, rows["input_ids"])) <= limit:
        return rows
    names = [
        name
        for name in rows.column_names
        if isinstance(rows[0][name], list) and len(rows[0][name]) == len(rows[0]["input_ids"])
    ]

    def shorten(row: dict[str, Any]) -> dict[str, Any]:
        return {n: row[n] if len(row[n]) <= limit else [*row[n][: limit - 1], row[n][-1]] for n in names}

    return rows.map(shorten, keep_in_memory=True, load_from_cache_file=False)


def classifier_refusals(model: Any) -> list[str]:
    """Why a model is no single-label classifier of texts with two classes or more: one sentence each."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, config = type(base).__name__, base.config
    kind = getattr(config, "problem_type", None)
    if "ForSequenceClassification" not in name:
        return [
            f"{name} is no classifier of whole texts (token classification, generation and others are not covered)."
        ]
    if kind not in (None, "single_label_classification") or config.num_labels < 2:
        return [
            f"{name} has a head for {kind or 'regression (one label)'}: confidence needs one class per text, two classes or "
            "more. Use a single-label classifier."
        ]
    return []
