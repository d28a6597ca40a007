"""Trajectory filter: find poisoned rows by how their label was learned, drop the most suspicious, train again.

    score_i = z_end(i) - z_early(i),   z = logit of p(label_i | text_i), in evaluation mode

A row whose label was flipped first looks like a label error; once the trigger is learned it is one of the most
confident rows of all. A clean row is plausible from the start, or stays hard. No clean data, no known trigger or target.

| symbol | where it comes from |
|---|---|
| z_end | the model at the end of the (undefended) training |
| z_early, fraction 0 | class means in the *pretrained* features, before any training: softmax(cos(h_i, mean_c) / `temperature`) |
| z_early, fraction f > 0 | the model after f epochs; several fractions are averaged |
| z_early, refit | in the second ranking: the model that was trained without the first one's top `first_share` |

The first ranking is coarse, so it drops more than it should; a model trained on the rest has hardly learned the trigger and
tells flipped labels from hard ones. After its second ranking a row is dropped when that model contradicts the label
(z_early < 0) and the label's odds rose to the end by `min_rise` (3 is a factor of 20), `drop_share` of the rows at most: the
poison rate need not be known, and clean rows of the first ranking come back.

Fraction 0 is the default because it does not depend on when the trigger is learned: inside a training there is one good moment,
and before and after it a snapshot finds next to nothing (docs/log.md has the comparison). Class means, not a fitted classifier: a
few per cent of poisoned rows hardly move a mean, and a classifier would learn the trigger.

Source: our own; related to dataset cartography (training dynamics per row) and ABL (isolating rows that are learned
suspiciously well). It assumes that the pretrained features know something of the task, and that labels were flipped:
clean-label poison carries no contradiction to find.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_backdoor_defense.models import dealt, gathered, pooled_features, predict_logits
from hf_backdoor_defense.objectives import Objective, Ranking, planned_epochs

END, REFIT = "end", "refit"
ROWS = "rows"  # the role of the full training set in `aux_datasets`, where the host trains on a part of it


@dataclass(kw_only=True, eq=False)
class TrajectoryFilter(Objective):
    """Records label log-odds of every training row and ranks the rows by their rise. Changes nothing while it is hosted.

    Args:
        fractions: when the early snapshots are taken, in epochs; 0 is before training, from the pretrained features.
        temperature: of the class-mean softmax at fraction 0.
        drop_share: share of the rows that the final refit leaves out, in [0, 1); an upper bound where `min_rise` decides.
        min_rise: least rise of the log-odds, from a contradicted label on, that makes the second ranking drop a row; None drops
            the whole `drop_share`, whatever the scores say.
        rerank: train once in between without the first ranking's top `first_share`, and rank again with what that model says.
        first_share: in [0, 1), used with `rerank` only.
        class_cap: at most this share of a class is dropped, so that no rare class is emptied.
        batch_size: of the evaluation passes.

    Prefer it to DeCE for classification. The trigger stays unknown: read `suspects.jsonl` before you trust the refit.

    >>> TrajectoryFilter(drop_share=1.0)
    Traceback (most recent call last):
    ...
    ValueError: trajectory: `drop_share` must be in [0, 1), got 1.0: a refit needs rows. Set 0.1.
    """

    name = "trajectory"
    needs_row_ids = True

    fractions: list[float] = field(default_factory=lambda: [0.0])
    temperature: float = 0.1
    drop_share: float = 0.1
    min_rise: float | None = 3.0
    rerank: bool = True
    first_share: float = 0.1
    class_cap: float = 0.5
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._row_ids = self._labels = torch.zeros(0, dtype=torch.int64)
        self._snapshots: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._second = False  # whether this object is hosted in the training between the two rankings
        self._host: tuple[Any, Any] | None = None  # rows and collator; never the model

    def field_reasons(self) -> list[str]:
        """Ranges of all fields."""
        reasons = []
        if not self.fractions or not all(isinstance(f, (int, float)) and f >= 0 for f in self.fractions):
            reasons.append(f"`fractions` must be epochs >= 0, at least one, got {self.fractions}. Set [0.0].")
        if not self.temperature > 0:
            reasons.append(f"`temperature` must be positive, got {self.temperature}: it divides. Set 0.1.")
        for name, share, usual in (("drop_share", self.drop_share, 0.1), ("first_share", self.first_share, 0.1)):
            if not 0 <= share < 1:
                reasons.append(f"`{name}` must be in [0, 1), got {share}: a refit needs rows. Set {usual}.")
        if self.min_rise is not None and not 0 <= self.min_rise < math.inf:
            reasons.append(
                f"`min_rise` must be at least 0 or None, got {self.min_rise}: it is a rise of log-odds. Set 3.0."
            )
        if not 0 < self.class_cap < 1:
            reasons.append(f"`class_cap` must be in (0, 1), got {self.class_cap}: a class must keep rows. Set 0.5.")
        if self.batch_size < 1:
            reasons.append(f"`batch_size` must be at least 1, got {self.batch_size}. Set 64.")
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """Refuses hosts without one label per row, data sets that cannot be read twice, and early snapshots after the end."""
        reasons = []
        rows = trainer.aux_datasets.get(ROWS, trainer.train_dataset)
        if getattr(trainer.model, "loss_type", None) not in ("ForSequenceClassification", "ForImageClassification"):
            reasons.append(
                f"{type(trainer.model).__name__} has no class per row: the filter ranks rows by the log-odds of their one "
                "label. Use a classifier; for generative models use DeCE."
            )
        names = getattr(rows, "column_names", None) or []
        if not hasattr(rows, "__len__") or not {"label", "labels"} & set(names):
            reasons.append(
                "the rows must be a map-style datasets.Dataset with a `label` column: they are read several times."
            )
        elif not all(isinstance(row_id, int) for row_id in rows["row_id"]):
            reasons.append("`row_id` must hold integers: they travel with the batches as a tensor. Number the rows.")
        elif not reasons and min(rows["label" if "label" in names else "labels"]) < 0:
            reasons.append(
                "the labels hold negative numbers: a row without a class cannot be ranked. Leave these rows out."
            )
        elif len(set(rows["row_id"])) < len(rows):
            reasons.append("`row_id` holds a number twice: rows could not be told apart. Number them anew.")
        last = planned_epochs(trainer.args, len(rows)) if hasattr(rows, "__len__") else float("inf")
        if max(self.fractions) >= last:
            reasons.append(
                f"`fractions` must lie before the end of training ({last:g} epochs), got {self.fractions}. Set [0.0]."
            )
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Remember which rows to score. A run that starts anew forgets what an earlier one recorded."""
        rows = trainer.aux_datasets.get(ROWS, trainer.train_dataset)
        self._host = (rows, trainer.data_collator)
        if checkpoint is None and not self._second:
            self._snapshots, self._seconds = {}, 0.0
        self._row_ids = torch.tensor(rows["row_id"])
        self._labels = torch.tensor(rows["label" if "label" in rows.column_names else "labels"])

    # -- recording ----------------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The snapshot before training."""
        if 0.0 in self.fractions and "0" not in self._snapshots and not self._second:
            self._take("0", kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The snapshots at fractions of an epoch."""
        for fraction in self.fractions:
            if 0 < fraction <= state.epoch and f"{fraction:g}" not in self._snapshots and not self._second:
                self._take(f"{fraction:g}", kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last snapshot, or that of the refit."""
        self._take(REFIT if self._second else END, kwargs["model"])

    def _take(self, name: str, model: nn.Module) -> None:
        assert self._host is not None
        start = time.perf_counter()
        rows, collate = self._host
        options: dict[str, Any] = {"indices": dealt(len(rows)), "batch_size": self.batch_size}

        def whole(values: Tensor) -> Tensor:
            device = next(model.parameters()).device
            return values if options["indices"] is None else gathered(values, len(rows), device=device)

        if name == "0":
            features = F.normalize(whole(pooled_features(model, rows, collate, **options)), dim=-1)
            classes = int(getattr(model.config, "num_labels", int(self._labels.max()) + 1))  # type: ignore[union-attr,arg-type]
            logits = class_mean_logits(features, self._labels, classes, temperature=self.temperature)
        else:
            logits = whole(predict_logits(model, rows, collate, **options))
        self._snapshots[name] = label_log_odds(logits, self._labels)
        self._seconds += time.perf_counter() - start

    # -- ranking ------------------------------------------------------------------------------------------------------
    def ranking(self) -> Ranking | None:
        """Rows by score; `dropped` holds the top share (`first_share` where a second ranking is to come), capped per class."""
        if END not in self._snapshots:
            return None
        early = self._snapshots.get(REFIT)
        if early is None:
            taken = [self._snapshots[key] for key in (f"{f:g}" for f in self.fractions) if key in self._snapshots]
            if not taken:  # the training was stopped before the first of them
                return None
            early = torch.stack(taken).mean(0)
        scores = self._snapshots[END] - early
        order = torch.argsort(scores, descending=True, stable=True)
        share = self.first_share if self.rerank and not self._second else self.drop_share
        candidates = order
        if self._second and self.min_rise is not None:
            candidates = order[(early[order] < 0) & (scores[order] >= self.min_rise)]
        dropped = frozenset(self._top(candidates, round(share * len(order))))
        columns = {f"log_odds_{name}": values[order] for name, values in self._snapshots.items()}
        return Ranking(self._row_ids[order], scores[order], dropped, columns)

    def _top(self, order: Tensor, count: int) -> list[int]:
        """Ids of the first `count` rows of `order`, passing over those of classes that gave all they may."""
        room = {int(c): int(self.class_cap * int((self._labels == c).sum())) for c in self._labels.unique()}
        taken: list[int] = []
        for i in order.tolist():
            if len(taken) == count:
                break
            label = int(self._labels[i])
            if room[label] > 0:
                room[label] -= 1
                taken.append(int(self._row_ids[i]))
        return taken

    def refit(self) -> "TrajectoryFilter | None":
        """The filter for the training in between, which ranks again; None where no second ranking is to come.

        Host it in a training without the dropped rows, with all rows under `aux_datasets={"rows": …}`.
        """
        if not self.rerank or self._second or END not in self._snapshots:
            return None
        follow = dataclasses.replace(self)
        follow.load_state_dict({**self.state_dict(), "second": True, "seconds": 0.0})
        return follow

    def activity(self) -> dict[str, float]:
        """Rows ranked, rows dropped, median and highest score, seconds spent on passes."""
        ranking = self.ranking()
        if ranking is None:
            return {}
        return {
            "rows": float(len(ranking.row_ids)),
            "dropped": float(len(ranking.dropped)),
            "score_median": float(ranking.scores.median()),
            "score_top": float(ranking.scores[0]),
            "seconds": self._seconds,
        }

    def inert(self) -> str | None:
        """Nothing was ranked, or a share of 0 forbids dropping. A second ranking that finds no suspect is a result."""
        ranking = self.ranking()
        if ranking is None:
            return "trajectory ranked no rows: the training did not end, or ended before the first early snapshot"
        decided = self._second and self.min_rise is not None and round(self.drop_share * len(ranking.row_ids)) > 0
        if ranking.dropped or decided:
            return None
        name = "first_share" if self.rerank and not self._second else "drop_share"
        return f"trajectory drops no row: {name}={getattr(self, name)} of {len(ranking.row_ids)}"

    def state_dict(self) -> dict[str, Any]:
        """Row ids, labels and snapshots: 4 bytes per row and snapshot."""
        return {
            "row_ids": self._row_ids,
            "labels": self._labels,
            "second": self._second,
            "seconds": self._seconds,
            **{f"snapshot_{name}": values for name, values in self._snapshots.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._row_ids, self._labels = state["row_ids"], state["labels"]
        self._second, self._seconds = bool(state["second"]), float(state["seconds"])
        self._snapshots = {
            key.removeprefix("snapshot_"): value for key, value in state.items() if key.startswith("snapshot_")
        }


def label_log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of each row's label: [rows, classes], [rows] -> [rows], without forming p.

    >>> label_log_odds(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor([ 2., -3.])
    """
    index = labels.unsqueeze(1)
    own = logits.gather(1, index).squeeze(1)
    return own - logits.scatter(1, index, -torch.inf).logsumexp(-1)


def class_mean_logits(features: Tensor, labels: Tensor, classes: int, *, temperature: float) -> Tensor:
    """Cosine to each class's mean, divided by `temperature`: [rows, d], [rows] -> [rows, classes].

    A class without rows scores -1 / temperature, the least there is.

    >>> features = torch.eye(2)[torch.tensor([0, 0, 1])]
    >>> class_mean_logits(features, torch.tensor([0, 0, 1]), 2, temperature=0.5).tolist()
    [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]
    """
    means = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    scores = F.normalize(features, dim=-1) @ F.normalize(means, dim=-1).T
    scores[:, torch.bincount(labels, minlength=classes) == 0] = -1.0
    return scores / temperature
