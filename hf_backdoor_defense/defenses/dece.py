"""DeCE: a bounded loss for fine-tuning on data of which a part may be poisoned.

    alpha_e = alpha_base ** e,  e = floor(epoch) + 1        L = -sum_k y_k log(alpha p_k + (1 - alpha) y_k)

A label that surprises the model keeps only r_t = alpha p_t / (alpha p_t + (1 - alpha)(1 - eps)) of cross-entropy's
pull, less with every epoch. The tensor mathematics is `functional/dece.py`, and `functional/linear_dece.py` where the
host gives hidden states in place of logits.

| paper | field | where the value stands |
|---|---|---|
| alpha | `alpha_base` = 0.985 | authors' code, latest class (8ad7837, 28c98d8); paper: not found |
| epsilon | `label_smoothing` = 0.05 | authors' code; spread over V - 1 classes, not torch's V |
| first exponent | 1 (epoch index + 1) | authors' code |
| - | `schedule` = "epoch" | authors' code; "fractional" (e = epoch + 1, moving every step) is ours |
| - | `warmup_epochs` = 0 | ours: plain (smoothed) cross-entropy for the first n epochs |

Source: Yang et al., arXiv 2407.08956; formula from the authors' released code (NTDXYG/DeCE).
When not to use it: with few classes the label's probability starts at 1/C and the loss keeps nearly all of its pull;
a new head or weights that are backdoored already are outside of what it can do. See docs/choosing.md.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_backdoor_defense.functional.chunks import chunk_budget
from hf_backdoor_defense.functional.dece import dece_loss_and_stats, target_pull, threshold
from hf_backdoor_defense.functional.linear_dece import linear_dece_loss_and_stats
from hf_backdoor_defense.objectives import (
    Objective,
    Step,
    everywhere,
    is_first_process,
    planned_epochs,
    row_sums,
)

logger = logging.getLogger(__name__)

INERT_BELOW = 1e-6
MERGE_AT = 256  # micro-batches whose records per row are kept apart before they become one tensor


@dataclass(kw_only=True, eq=False)
class DeCE(Objective):
    """Deceptive cross-entropy. alpha follows from the epoch alone, so that a resumed run continues it exactly.

    Args:
        alpha_base: share of the prediction in the mixture after one epoch, in (0, 1]; 1 is smoothed cross-entropy.
        label_smoothing: in [0, 1); the label keeps 1 - label_smoothing.
        schedule: "epoch" or "fractional".
        warmup_epochs: epochs with alpha = 1 before the schedule starts.
        chunk_bytes: budget of the work buffers; None for a default by device. One row of scores is held in any case.

    >>> objective = DeCE.preset("llm")
    >>> round(math.exp(objective.log_alpha(epoch=2.5)), 3)  # third epoch: 0.8 ** 3
    0.512
    >>> DeCE(alpha_base=1.7)
    Traceback (most recent call last):
    ...
    ValueError: dece: `alpha_base` must be in (0, 1], got 1.7: DeCE mixes a share of the label in. Set 0.985.
    """

    name = "dece"
    paper = "2407.08956"
    takes_hidden = True
    presets = {
        "code": {"alpha_base": 0.985, "label_smoothing": 0.05},
        "llm": {"alpha_base": 0.8, "label_smoothing": 0.05},
        "plm-2023": {"alpha_base": 0.99, "label_smoothing": 0.01},
        "target-only": {"alpha_base": 0.985, "label_smoothing": 0.0},  # a variant: the published epsilon is not 0
    }

    alpha_base: float = 0.985
    label_smoothing: float = 0.05
    schedule: str = "epoch"
    warmup_epochs: int = 0
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._epochs: dict[int, list[Tensor]] = {}  # epoch -> [sum of r_t, positions with r_t < 1/2, positions]
        self._rows_epoch = -1  # the epoch that `_rows` is about
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []  # row ids, sums of r_t, positions; [rows] each
        self._is_whole = True  # whether the records are those of all processes
        self._warned = False

    def field_reasons(self) -> list[str]:
        """Ranges of all fields."""
        reasons = []
        if not 0 < self.alpha_base <= 1:
            reasons.append(
                f"`alpha_base` must be in (0, 1], got {self.alpha_base}: DeCE mixes a share of the label in. Set 0.985."
            )
        if not 0 <= self.label_smoothing < 1:
            reasons.append(
                f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}: it is the share that the label gives "
                "to the other classes. Set 0.05."
            )
        if self.schedule not in ("epoch", "fractional"):
            reasons.append(
                f'`schedule` must be "epoch" or "fractional", got {self.schedule!r}: alpha moves once per epoch '
                'or with every step. Set "epoch".'
            )
        if self.warmup_epochs < 0:
            reasons.append(f"`warmup_epochs` must be at least 0, got {self.warmup_epochs}: it counts epochs. Set 0.")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            reasons.append(f"`chunk_bytes` must be positive, got {self.chunk_bytes}: it is a budget. Set 2**28.")
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """Refuses a label smoothing that leaves the label less likely than the others; warns of a schedule that goes too far."""
        if not hasattr(trainer.train_dataset, "__len__"):
            logger.warning(
                "dece: the training set streams and has no length, so an epoch ends where the stream does: alpha moves only when "
                "it starts over; a stream longer than max_steps is one epoch (alpha_base=%s, warmup_epochs=%d throughout).",
                self.alpha_base,
                self.warmup_epochs,
            )
        else:
            self._warn_of_a_long_schedule(planned_epochs(trainer.args, len(trainer.train_dataset)))
        classes = getattr(trainer.model.config, "num_labels", 2)
        is_classifier = "Classification" in str(getattr(trainer.model, "loss_type", ""))
        if is_classifier and classes >= 2 and self.label_smoothing >= (classes - 1) / classes:
            return [
                f"`label_smoothing` must be below {(classes - 1) / classes:.3g} for {classes} classes, got "
                f"{self.label_smoothing}: the label would be no more likely than any other. Set 0.05."
            ]
        return []

    def _warn_of_a_long_schedule(self, epochs: float) -> None:
        tau = threshold(log_alpha=self.log_alpha(max(epochs - 1e-6, 0.0)), label_smoothing=self.label_smoothing)
        if tau >= 1:
            logger.warning(
                "dece: in the last of %g epochs even certain labels keep less than half of their pull (threshold %.2f): "
                "raise alpha_base or train for fewer epochs.",
                epochs,
                tau,
            )

    def log_alpha(self, epoch: float) -> float:
        """log alpha at `epoch` (as `TrainerState.epoch`: 1.0 is the first step of the second epoch)."""
        into = epoch - self.warmup_epochs
        if into < 0:
            return 0.0
        exponent = math.floor(into) + 1 if self.schedule == "epoch" else into + 1
        return exponent * math.log(self.alpha_base)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new run starts with empty records; a resumed one keeps what the checkpoint held."""
        if state.global_step == 0 or not is_first_process():
            self._epochs, self._rows, self._rows_epoch = {}, [], -1
        self._is_whole = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The records become those of all processes."""
        if not self._is_whole:
            self.load_state_dict(self.state_dict())

    def loss(self, step: Step) -> Tensor:
        """[n_valid] DeCE, in chunks, of logits or of hidden states; records the pull on the way."""
        log_alpha = self.log_alpha(step.epoch)
        values, target_logps, is_top1 = self._values(step, log_alpha)
        if step.labels.ndim > 1:
            step.note_top1(is_top1)
        pull = target_pull(target_logps, log_alpha=log_alpha, label_smoothing=self.label_smoothing)
        self._record(step, pull)
        step.log("dece/alpha", values.new_full((), math.exp(log_alpha)))
        step.log(
            "dece/threshold", values.new_full((), threshold(log_alpha=log_alpha, label_smoothing=self.label_smoothing))
        )
        if pull.numel():
            step.log("dece/target_pull", pull.mean())
            step.log("dece/suppressed", (pull < 0.5).to(pull.dtype).mean())
        return values

    def _values(self, step: Step, log_alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        project, scores = step.project, step.logits
        if scores is None:
            assert step.hidden is not None and project is not None
            self._warn_of_budget(step.hidden, project.weight.shape[0])
            return linear_dece_loss_and_stats(
                step.hidden,
                project.weight,
                step.labels,
                log_alpha=log_alpha,
                label_smoothing=self.label_smoothing,
                bias=project.bias,
                scale=project.scale,
                softcap=project.softcap,
                chunk_bytes=self.chunk_bytes,
            )
        self._warn_of_budget(scores, scores.shape[-1])
        return dece_loss_and_stats(
            scores,
            step.labels,
            log_alpha=log_alpha,
            label_smoothing=self.label_smoothing,
            chunk_bytes=self.chunk_bytes,
        )

    def _warn_of_budget(self, like: Tensor, classes: int) -> None:
        """Once, where the budget is below what one row takes: chunks then hold one row, and more memory than allowed."""
        row, budget = classes * like.dtype.itemsize, chunk_budget(self.chunk_bytes, like.device)
        if budget < row and not self._warned:
            self._warned = True
            logger.warning(
                "dece: chunk_bytes=%d is below the %d bytes that one row of %d scores takes: each chunk holds one row, which is "
                "slow. Set 2**28, or leave it out.",
                budget,
                row,
                classes,
            )

    def _record(self, step: Step, pull: Tensor) -> None:
        """Add the batch to the sums of its epoch and, where rows have ids, to the sums of its rows."""
        wide = torch.float32 if pull.device.type == "mps" else torch.float64  # sums over a whole epoch
        now = [
            pull.sum(dtype=wide),
            (pull < 0.5).sum(dtype=wide),
            torch.full((), pull.numel(), dtype=wide, device=pull.device),
        ]
        epoch = math.floor(step.epoch)
        before = self._epochs.get(epoch)
        self._epochs[epoch] = now if before is None else [a.to(b.device) + b for a, b in zip(before, now, strict=True)]
        if step.row_ids is None:
            return
        if self._rows_epoch != epoch:
            self._rows, self._rows_epoch = [], epoch
        sums, counts = row_sums(pull, step.batch_labels)
        if len(sums) == len(step.row_ids):
            self._rows.append((step.row_ids.detach().to(sums.device), sums, counts))
        if len(self._rows) >= MERGE_AT:
            self._rows = [self._merged()]

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """All records of rows as one: ids, sums and positions in the order of training."""
        if not self._rows:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, dtype=torch.long)
        device = self._rows[-1][0].device
        ids, sums, counts = (torch.cat([part.to(device) for part in parts]) for parts in zip(*self._rows, strict=True))
        return ids.long(), sums.float(), counts.long()

    def rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """ "pull": mean r_t of each training row in the last epoch trained; what kept least comes first.

        Rows without a labeled position are left out.
        """
        ids, sums, counts = (part.cpu() for part in self._merged())
        unique, place = ids.unique(return_inverse=True)
        total = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, sums.double())
        seen = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, counts.double())
        if not bool((seen > 0).any()):
            return {}
        unique, mean = unique[seen > 0], total[seen > 0] / seen[seen > 0]
        order = mean.argsort(stable=True)
        return {"pull": (unique[order], mean[order].float())}

    def pull_per_epoch(self) -> list[float]:
        """Mean r_t of each epoch trained so far: what the matched-decay control uses as its learning-rate factor."""
        return [float(total / count.clamp(min=1)) for _, (total, _, count) in sorted(self._epochs.items())]

    def activity(self) -> dict[str, float]:
        """First and last alpha, mean pull, share of positions that kept less than half of it, positions seen."""
        if not self._epochs:
            return {}
        total, suppressed, count = (sum(float(row[i]) for row in self._epochs.values()) for i in range(3))
        return {
            "alpha_first": math.exp(self.log_alpha(min(self._epochs))),
            "alpha_last": math.exp(self.log_alpha(max(self._epochs))),
            "target_pull": total / max(count, 1),
            "suppressed": suppressed / max(count, 1),
            "tokens": count,
        }

    def inert(self) -> str | None:
        """DeCE did nothing when every position kept its full pull."""
        kept = self.activity().get("target_pull")
        if kept is None:
            return "dece saw no labeled position"
        if 1 - kept < INERT_BELOW:
            return f"dece kept {kept:.8f} of cross-entropy's pull: alpha_base={self.alpha_base} changes nothing"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was recorded per epoch, and per row in the epoch under way, over all processes; alpha needs no state."""
        if self._rows:
            self._rows = [self._merged()]
        epochs = {epoch: [float(value) for value in row] for epoch, row in self._epochs.items()}
        here = (epochs, self._rows_epoch, [tuple(part.cpu() for part in rows) for rows in self._rows])
        parts = [here] if self._is_whole else everywhere(here)
        state: dict[str, Any] = {}
        if found := sorted({epoch for theirs, *_ in parts for epoch in theirs}):
            sums = [[float(e), *map(sum, zip(*(p[0][e] for p in parts if e in p[0]), strict=True))] for e in found]
            state["epochs"] = torch.tensor(sums, dtype=torch.float64)
        last = max(epoch for _, epoch, _ in parts)
        if rows := [part for _, epoch, theirs in parts if epoch == last for part in theirs]:
            ids, values, counts = (torch.cat(column) for column in zip(*rows, strict=True))
            state.update(rows_epoch=last, row_ids=ids, row_sums=values, row_counts=counts)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        rows = state["epochs"] if "epochs" in state else torch.zeros(0, 4)
        self._epochs = {int(row[0]): [value.double() for value in row[1:]] for row in rows}
        self._rows, self._rows_epoch = [], -1
        self._is_whole = True
        if "row_ids" in state:
            self._rows = [(state["row_ids"], state["row_sums"], state["row_counts"])]
            self._rows_epoch = int(state["rows_epoch"])
