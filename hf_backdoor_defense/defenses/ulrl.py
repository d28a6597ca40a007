"""ULRL: unlearn clean data to see which units carry the backdoor, restore the model, and relearn these units away from it.

    1. unlearn    ascend the clean loss (SGD, gradient clipped) until the accuracy is low; only localizes, then all is undone
    2. localize   s_c = Σ_j |ΔW[c, j]|; flagged are rows with a modified z-score above the threshold (`functional/row_scores.py`)
    3. reset      W[c] ~ U(−a, a), a = sqrt(2/d); bias[c] = 0
    4. relearn    CE + alpha · Σ_c cos(W[c], V_c)

| symbol | what it is | shape |
|---|---|---|
| W | weight of the class scores ("rows"), or of the layer that feeds them ("hidden") | [K, d] |
| V_c | the old row of a flagged unit; the cosine drives W[c] to its opposite | [d] |

With less than four classes the rows of the head have no usable median deviation (with two they move alike): there `hidden`, the
units of the layer that feeds the head, is our extension, with alpha times the *mean* cosine and at most a share of the units. No
publication tried it.

Source: arXiv 2405.14781; authors' code NayMyatMin/ULRL, commit 094debf (older than the paper's second version).
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.defenses.unlearning import from_first, seed_dropout, untouched
from hf_backdoor_defense.functional.cross_entropy import cross_entropy
from hf_backdoor_defense.functional.row_scores import flag_rows, mad_z_scores, row_change, row_cosines
from hf_backdoor_defense.models import unwrapped
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.pretrained import float32_reasons
from hf_backdoor_defense.targets import feeding_layer, input_embeddings, output_layer

logger = logging.getLogger(__name__)

FEWEST_CLASSES = 4  # below, the median deviation of the head's rows says nothing
FEW_PER_CLASS = 20  # clean rows; below, the flags were wrong on digits
_COLLAPSED = 1.1
_UNBALANCED = 0.9  # a bound this high is met by a model that unlearned nothing
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(kw_only=True, eq=False)
class ULRL(Objective):
    """Purify a trained classifier with few clean rows, by unlearning and relearning. Prefer `D3` where no class is suspected.

    The training set *is* the clean set. SGD with momentum, no weight decay, `max_grad_norm=0`.

    Args:
        unlearn_lr, unlearn_momentum, unlearn_weight_decay, unlearn_epochs, unlearn_batch_size, unlearn_milestones, unlearn_clip:
            the ascent: rate (times 0.1 at each milestone, an epoch), SGD, at most so many epochs, global norm of its gradients.
        stop_accuracy: the ascent ends after an epoch in which no more than this share was right, or (ours) 1.1 times the share of
            the largest class: a model that has collapsed to one class is right that often.
        z_threshold, max_rows, rank: which rows are flagged; "score" keeps those that moved most, "index" (the code) the first.
        alpha: weight of the cosine.
        units: "rows" of the head, "hidden" units before it, "auto": hidden for less than four classes.
        head: dotted name of the head, where it is not found by itself.
        hidden_share: at most this share of hidden units.

    >>> ULRL(max_rows=0)
    Traceback (most recent call last):
    ...
    ValueError: ulrl: `max_rows` must be at least 1, got 0: nothing could be flagged. Use 2.
    """

    name = "ulrl"
    paper = "2405.14781"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "official_code": {"unlearn_lr": 0.01, "alpha": 0.7, "rank": "index"},
        "many_classes": {
            "unlearn_lr": 0.01,
            "alpha": 0.001,
            "rank": "index",
        },  # CIFAR-100, GTSRB and Tiny-ImageNet in the code
    }

    unlearn_lr: float = 0.01
    unlearn_momentum: float = 0.9
    unlearn_weight_decay: float = 5e-4
    unlearn_epochs: int = 20
    unlearn_batch_size: int = 128
    unlearn_milestones: list[int] = field(default_factory=lambda: [10])
    unlearn_clip: float = 20.0
    stop_accuracy: float = 0.2
    z_threshold: float = 3.5
    max_rows: int = 2
    rank: Literal["index", "score"] = "index"
    alpha: float = 0.7
    units: Literal["auto", "rows", "hidden"] = "auto"
    head: str | None = None
    hidden_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._layer, self._units = "", ""
        self._scores, self._z = torch.zeros(0), torch.zeros(0)
        self._flagged: list[int] = []
        self._old = torch.zeros(0)
        self._accuracies: list[float] = []
        self._unlearned = 0  # updates of the ascent
        self._stop = self.stop_accuracy
        self._cosine = torch.zeros(())

    @classmethod
    def many_classes(cls, **overrides: Any) -> "ULRL":
        """The authors' settings for 43 classes and more."""
        return cls.preset("many_classes", **overrides)

    def field_reasons(self) -> list[str]:
        """Numbers that an ascent and a threshold can have."""
        reasons = []
        for name, least, usual in (("unlearn_epochs", 0, 20), ("unlearn_batch_size", 1, 128), ("max_rows", 1, 2)):
            value = getattr(self, name)
            if value < least:
                reasons.append(
                    f"`{name}` must be at least {least}, got {value}: nothing could be flagged. Use {usual}."
                )
        for name, default in (("unlearn_lr", "0.01"), ("unlearn_clip", "20"), ("z_threshold", "3.5")):
            if not 0 < getattr(self, name) < math.inf:
                reasons.append(f"`{name}` must be finite and above 0, got {getattr(self, name)}. Use {default}.")
        for name in ("unlearn_momentum", "unlearn_weight_decay", "stop_accuracy"):
            if not 0 <= getattr(self, name) < 1:
                reasons.append(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if not 0 < self.hidden_share <= 0.5:
            reasons.append(
                f"`hidden_share` must be in (0, 0.5], got {self.hidden_share}: more would be no outliers. Use 0.1."
            )
        if not math.isfinite(self.alpha) or self.alpha < 0:
            reasons.append(f"`alpha` must be finite and >= 0, got {self.alpha}: it weighs the cosine. Use 0.7.")
        return reasons

    # -- hosting ------------------------------------------------------------------------------------------------------
    def check(self, trainer: Any) -> list[str]:
        """A classifier whose every weight can be raised against its data, on a clean set that says enough."""
        model, args = unwrapped(trainer.model), trainer.args
        config: Any = getattr(model, "config", None)
        reasons = []
        if getattr(model, "loss_type", None) not in _CLASSIFIERS:
            reasons.append(
                f"{type(model).__name__} is no sequence or image classifier: outliers are looked for among its classes. Use CROW "
                "or RECIPE for language models."
            )
        if has_adapter(model):
            reasons.append(
                f"{type(model).__name__} carries an adapter: merge first (model.merge_and_unload()), since the ascent trains all "
                "weights."
            )
        elif frozen := [name for name, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()]:
            reasons.append(
                f"{len(frozen)} parameters are frozen ({frozen[0]}): the ascent trains all weights. Unfreeze them, "
                "model.requires_grad_(True)."
            )
        reasons += float32_reasons(model)
        layer = self._find(model, reasons)
        if (
            layer is not None
            and config is not None
            and self._kind(model) == "rows"
            and layer[1].out_features < FEWEST_CLASSES
        ):
            reasons.append(
                f"units='rows' with {layer[1].out_features} classes: head rows of a K-class head, K < {FEWEST_CLASSES}, have no "
                "usable median deviation; use units='hidden', D3 or RECIPE."
            )
        if args.load_best_model_at_end:
            reasons.append(
                "load_best_model_at_end keeps the checkpoint of lowest clean loss, the least changed one. Set it to False."
            )
        state = getattr(trainer.accelerator, "state", None)
        if getattr(getattr(state, "fsdp_plugin", None), "cpu_ram_efficient_loading", False):
            reasons.append(
                "fsdp_cpu_ram_efficient_loading leaves ranks without weights, and every rank resets rows. Set it to False."
            )
        if layer is not None:
            reasons += self._rivals(trainer, layer[0])
        rows = trainer.train_dataset
        if rows is None or not hasattr(rows, "__len__") or not len(rows):
            reasons.append(
                "the clean set is a stream or empty: the ascent passes over it several times. Use a Dataset."
            )
        elif not reasons and len(rows) < FEW_PER_CLASS * config.num_labels:
            logger.warning(
                "ulrl: %d clean rows for %d classes: with fewer than %d per class the wrong rows may be flagged.",
                len(rows), config.num_labels, FEW_PER_CLASS,
            )  # fmt: skip
        return reasons

    def _rivals(self, trainer: Any, name: str) -> list[str]:
        """D3 moves the same weights, and would undo the reset or be undone by it."""
        select = [o for o in trainer.objectives if o.name == "d3"]
        if not select:
            return []
        from hf_backdoor_defense.defenses.d3 import select_weights

        try:
            claimed = select_weights(unwrapped(trainer.model), select[0].targets)
        except ValueError:
            return []  # D3 says so itself
        if f"{name}.weight" not in claimed:
            return []
        return [f"d3 is hosted too and moves {name}.weight, which is reset here. Run them one after the other."]

    def _kind(self, model: nn.Module) -> str:
        if self.units != "auto":
            return self.units
        output = output_layer(model, self.head)
        return "hidden" if output is None or output[1].out_features < FEWEST_CLASSES else "rows"

    def _find(self, model: nn.Module, reasons: list[str]) -> tuple[str, nn.Linear] | None:
        """The layer whose units are scored; a reason where there is none."""
        output = output_layer(model, self.head)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if output is None:
            reasons.append(
                f"no Linear head was found{f' at head={self.head!r}' if self.head else ''} (Linear modules here: "
                f"{', '.join(linears[-4:]) or 'none'}). Name it by `head`, dots allowed."
            )
            return None
        embeddings = input_embeddings(model)
        if embeddings is not None and output[1].weight is embeddings:
            reasons.append(
                f"the head {output[0]} is tied to the input embeddings: resetting its rows would reset words."
            )
        if self._kind(model) == "rows":
            return output
        found = feeding_layer(model, self.head)
        if found is None:
            reasons.append(
                f"no layer feeds the head of {type(model).__name__} whose units could be scored. Use units='rows' with "
                "four classes or more, or D3."
            )
        return found

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Unlearn, localize, restore, reset. On resume nothing: the state says which rows, and the checkpoint holds them."""
        model = unwrapped(trainer.model)
        found = self._find(model, [])
        assert found is not None  # `check` refused otherwise
        self._layer, layer = found
        self._units = self._kind(model)
        if checkpoint is not None:
            return
        main = trainer.args.process_index == 0
        trouble: Exception | None = None
        scores, epochs = torch.zeros(layer.out_features), []
        if main:
            try:
                with untouched(model, trainer.args.device):
                    before = layer.weight.detach().clone()
                    epochs = self._unlearn(model, trainer)
                    scores = row_change(layer.weight, before).cpu()
            except Exception as error:  # told to the others first, who wait for the scores
                trouble = error
        if trainer.args.world_size > 1:
            figures = [self._stop, float(self._unlearned), *epochs]
            room = self.unlearn_epochs + 2
            scores, figures = from_first(scores, figures, trouble is not None, trainer.args.device, room)
            self._stop, self._unlearned, epochs = figures[0], int(figures[1]), figures[2:]
        if trouble is not None:
            raise trouble
        self._accuracies = epochs
        self._scores, self._z = scores, torch.zeros_like(scores)
        self._flagged = []
        if self._unlearned or epochs:
            self._z = mad_z_scores(scores)
            share = max(1, int(self.hidden_share * layer.out_features))
            cap, rank = (self.max_rows, self.rank) if self._units == "rows" else (share, "score")
            self._flagged = flag_rows(scores, self._z, threshold=self.z_threshold, cap=cap, rank=rank)  # type: ignore[arg-type]
        self._old = layer.weight.detach()[self._flagged].clone()
        self._reset(layer, trainer.args.seed)
        self._say(model)

    def _unlearn(self, model: nn.Module, trainer: Any) -> list[float]:
        """Ascend the clean loss. Returns the accuracy of each epoch, counted before each update."""
        args = trainer.args
        rows = DataLoader(
            trainer.train_dataset, batch_size=self.unlearn_batch_size, shuffle=True, collate_fn=trainer.data_collator,
            generator=torch.Generator().manual_seed(args.seed),
        )  # fmt: skip
        device = next(model.parameters()).device
        optimizer = torch.optim.SGD(
            model.parameters(), self.unlearn_lr, self.unlearn_momentum, weight_decay=self.unlearn_weight_decay
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.unlearn_milestones, gamma=0.1)
        seed_dropout(args.seed, device)
        accuracies: list[float] = []
        bar = tqdm(range(self.unlearn_epochs), desc="unlearning", disable=args.disable_tqdm, leave=False, delay=2)
        self._unlearned = 0
        for epoch in bar:
            right = seen = 0
            classes: Counter[int] = Counter()
            for batch in rows:
                inputs = {key: value.to(device) for key, value in batch.items() if key != "row_id"}
                labels = inputs.pop("labels")
                logits = model(**inputs)["logits"]
                loss = cross_entropy(logits, labels).mean()
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"ulrl: the unlearning phase diverged (loss {loss.item()} in epoch {epoch + 1}, update "
                        f"{self._unlearned + 1}): its scores would mean nothing, and nothing was changed. Lower `unlearn_lr` "
                        f"(now {self.unlearn_lr:g}), or stop earlier, with a higher `stop_accuracy` or fewer `unlearn_epochs`."
                    )
                right += int((logits.argmax(-1) == labels).sum())
                seen += len(labels)
                classes.update(labels.tolist())
                optimizer.zero_grad()
                (-loss).backward()
                nn.utils.clip_grad_norm_(model.parameters(), self.unlearn_clip)
                optimizer.step()
                self._unlearned += 1
            schedule.step()
            accuracies.append(right / seen)
            largest = max(classes.values()) / seen
            self._stop = max(self.stop_accuracy, min(_COLLAPSED * largest, (1 + largest) / 2))
            if accuracies[-1] <= self._stop:
                break
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise FloatingPointError(
                f"ulrl: the unlearning phase diverged (weights are not finite after epoch {len(accuracies)}): nothing was "
                f"changed. Lower `unlearn_lr` (now {self.unlearn_lr:g})."
            )
        return accuracies

    @torch.no_grad()
    def _reset(self, layer: nn.Linear, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(2 / layer.in_features)
        for row in self._flagged:
            drawn = (2 * torch.rand(layer.in_features, generator=generator) - 1) * bound
            layer.weight[row] = drawn.to(layer.weight)
            if layer.bias is not None:
                layer.bias[row] = 0

    def _say(self, model: nn.Module) -> None:
        if not self._flagged:
            logger.warning("ulrl: no suspect was found in %s: what follows is plain fine-tuning.", self._layer)
        elif self._units == "rows":
            names = getattr(model.config, "id2label", None) or {}
            named = [f"{names.get(row, row)} (z {self._z[row]:.1f})" for row in self._flagged]
            logger.warning("ulrl: suspected target classes: %s.", ", ".join(named))
        else:
            logger.warning(
                "ulrl: %d of %d units of %s are relearned.", len(self._flagged), len(self._scores), self._layer
            )
        if self._accuracies and not self._reliable():
            logger.warning(
                "ulrl: after %d epochs of unlearning %.0f %% of the clean rows are still right (wanted: %.0f %%): the scores are "
                "unreliable. Raise unlearn_lr or unlearn_epochs.",
                len(self._accuracies), 100 * self._accuracies[-1], 100 * self._stop,
            )  # fmt: skip

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """{"cosine": alpha · Σ cos} (hidden units: · mean); {} without a suspect."""
        if not self._flagged:
            return {}
        weight: Any = dict(unwrapped(step.model).named_parameters())[f"{self._layer}.weight"]
        old = self._old = self._old.to(weight.device)
        cosines = row_cosines(weight, self._flagged, old)
        self._cosine = cosines.detach().mean()
        step.log("ulrl/cosine_mean", self._cosine, latest=True)
        if self.alpha == 0:
            return {}
        return {"cosine": self.alpha * (cosines.sum() if self._units == "rows" else cosines.mean())}

    # -- reporting ----------------------------------------------------------------------------------------------------
    def activity(self) -> dict[str, float]:
        """`ulrl_cosine_mean`: 1 is the old direction, −1 its opposite."""
        return {
            "ulrl_flagged": float(len(self._flagged)),
            "ulrl_max_z": float(self._z.max()) if len(self._z) else 0.0,
            "ulrl_unlearn_epochs": float(len(self._accuracies)),
            "ulrl_unlearn_accuracy": self._accuracies[-1] if self._accuracies else 1.0,
            "ulrl_cosine_mean": float(self._cosine),
        }

    def evidence(self) -> dict[str, Any]:
        """Scores, z and what was flagged; flagged rows of a head are suspected target classes."""
        median = float(self._scores.median()) if len(self._scores) else 0.0
        layer = {
            "name": self._layer, "scores": self._scores.tolist(), "z": self._z.tolist(), "flagged": list(self._flagged),
            "median": median, "mad": float((self._scores - median).abs().median()) if len(self._scores) else 0.0,
        }  # fmt: skip
        return {
            "units": self._units,
            "threshold": self.z_threshold,
            "unlearn": {"epochs": len(self._accuracies), "accuracy": list(self._accuracies), "stop": self._stop},
            "layers": [layer],
            "suspected_classes": list(self._flagged) if self._units == "rows" else [],
            "reliable": self._reliable(),
        }

    def _reliable(self) -> bool:
        """Whether the ascent came down to its bound, and the clean set was balanced enough for that to mean something."""
        return bool(self._accuracies) and self._accuracies[-1] <= self._stop < _UNBALANCED

    def inert(self) -> str | None:
        """Or: nothing was unlearned. A model without suspects is a finding, not a failure."""
        return None if self._unlearned else "the unlearning phase made no update, so nothing was looked for"

    def state_dict(self) -> dict[str, Any]:
        return {
            "old": self._old, "scores": self._scores, "z": self._z, "cosine": self._cosine, "flagged": list(self._flagged),
            "accuracies": list(self._accuracies), "unlearned": self._unlearned, "stop": self._stop, "layer": self._layer,
            "units": self._units,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._old, self._scores, self._z, self._cosine = (state[key] for key in ("old", "scores", "z", "cosine"))
        self._flagged, self._accuracies = list(state["flagged"]), list(state["accuracies"])
        self._unlearned, self._stop = int(state["unlearned"]), float(state["stop"])
        self._layer, self._units = state["layer"], state["units"]
