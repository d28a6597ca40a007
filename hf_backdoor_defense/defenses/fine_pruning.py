"""Fine-pruning: units that clean inputs hardly use are cut, then the model is fine-tuned. Of a pretrained encoder
(`prune_dormant_units`) and of a trained classifier (`FinePruning`).

For an encoder, the feed-forward units that plain text hardly uses:

    a_u = mean over tokens of |activation of unit u|,  over all layers together
    cut the units of lowest a_u, step by step, while the held-out pre-training loss rises by at most `tolerance` of itself

| symbol | what it is | shape |
|---|---|---|
| u | a unit of some block's up-projection | [blocks · intermediate] |
| W_u, b_u | its row and its bias, set to 0 to cut it | [hidden], scalar |

A unit that is cut is 0 for every input, as the activation function of 0 is (GELU, ReLU). Fine-tuning may grow it again. The idea
is that a backdoor hides in units that clean inputs leave asleep.

For a classifier, the inputs of its head:

    a_j = mean over clean rows of |input j of the head|      cut the columns of lowest a_j, `step` of them at a time, while
    (accuracy before − accuracy) / accuracy before < tolerance, on clean validation rows; then fine-tune, columns held at 0

Published for feature maps behind a ReLU, where |·| changes nothing.

Source: fine-pruning, arXiv 1805.12185, as in BackdoorBench, commit f02e353; for pretrained encoders, pruned over all layers by
mean activation, a baseline of doi 10.1162/tacl_a_00622. Which share that paper cuts is not known; here held-out text decides,
never a trigger.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.models import predict_logits, unwrapped
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.pretrained import float32_reasons
from hf_backdoor_defense.targets import output_layer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What was cut: `share` of all units, `losses` by share as tried (the last one may be the first that was too high)."""

    share: float
    units: int
    losses: dict[float, float]


def prune_dormant_units(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    loss: Callable[[], float],
    *,
    step: float = 0.05,
    tolerance: float = 0.1,
) -> Pruned:
    """Cut the units of least mean activation in place, as many as the loss allows. Prefer `RECIPE`, which it stands beside.

    Args:
        model: an encoder of the BERT family.
        batches: inputs of plain text (`input_ids`, `attention_mask`), to measure activations on.
        loss: measures the model as it is, on held-out text.
        step: share of units cut at a time. tolerance: relative rise of the loss that is still accepted.

    Raises:
        ValueError: no feed-forward blocks of the BERT family; no batches; a step or tolerance that is no share.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    >>> prune_dormant_units(BertModel(config), [batch], loss=lambda: 2.0, step=0.25)
    Pruned(share=0.75, units=6, losses={0.0: 2.0, 0.25: 2.0, 0.5: 2.0, 0.75: 2.0})
    """
    if not 0 < step < 1 or not 0 <= tolerance:
        raise ValueError(
            f"`step` must be in (0, 1) and `tolerance` at least 0, got {step} and {tolerance}: they are shares of the units and "
            "of the loss. Use 0.05 and 0.1."
        )
    blocks: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(".intermediate") and isinstance(getattr(module, "dense", None), nn.Linear)
    }
    if not blocks or not batches:
        raise ValueError(
            f"Fine-pruning needs feed-forward blocks of the BERT family (`intermediate.dense`) and batches of text, got "
            f"{len(blocks)} blocks in {type(model).__name__} and {len(batches)} batches. Use another baseline for this model."
        )
    activations = _mean_activations(model, blocks, batches)
    order = torch.argsort(torch.cat(list(activations.values())))
    whole = {name: [p.detach().clone() for p in block.dense.parameters()] for name, block in blocks.items()}
    losses, kept = {0.0: loss()}, 0.0
    for share in (round(step * i, 6) for i in range(1, math.ceil(1 / step))):
        _cut(blocks, whole, order[: int(share * len(order))])
        losses[share] = loss()
        if not losses[share] <= losses[0.0] * (1 + tolerance):  # NaN is no loss that is low enough
            break
        kept = share
    units = int(kept * len(order))
    _cut(blocks, whole, order[:units])
    return Pruned(kept, units, losses)


@torch.no_grad()
def _mean_activations(
    model: nn.Module, blocks: dict[str, Any], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """By block, [intermediate] float64; padding does not count."""
    sums = {name: torch.zeros(block.dense.out_features, dtype=torch.float64) for name, block in blocks.items()}
    mask = torch.empty(0)

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            sums[name] += (output.abs() * mask.unsqueeze(-1)).sum((0, 1)).double().cpu()

        return hook

    hooks = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch["attention_mask"]
            model(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {name: total / tokens for name, total in sums.items()}


@torch.no_grad()
def _cut(blocks: dict[str, Any], whole: dict[str, list[Tensor]], units: Tensor) -> None:
    """The blocks as they were, without the units (numbered through all blocks)."""
    sizes = [block.dense.out_features for block in blocks.values()]
    cut = torch.zeros(sum(sizes), dtype=torch.bool)
    cut[units] = True
    for (name, block), gone in zip(blocks.items(), cut.split(sizes), strict=True):
        for parameter, original in zip(block.dense.parameters(), whole[name], strict=True):
            parameter.copy_(original)
            parameter[gone.to(parameter.device)] = 0


@dataclass(kw_only=True, eq=False)
class FinePruning(Objective):
    """Cut the inputs of a classifier's head that clean rows hardly use, then fine-tune: a control. Prefer `ULRL` or `D3`.

    The threshold comes from `aux_datasets={"validation": clean rows}`; without it, from a fifth of the clean set, by a hash of
    `row_id`, which is trained on afterwards as well.

    Args:
        step: share of columns cut at a time.
        tolerance: the relative loss of clean validation accuracy stays below it.

    >>> FinePruning(step=0.0)
    Traceback (most recent call last):
    ...
    ValueError: fine_pruning: `step` must be in (0, 1), got 0.0: it is a share of the columns. Use 0.01.
    """

    name = "fine_pruning"

    step: float = 0.01
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._head = ""
        self._cut = torch.zeros(0, dtype=torch.bool)
        self._activation = torch.zeros(0)
        self._accuracies: list[list[float]] = []  # share cut, clean validation accuracy

    def field_reasons(self) -> list[str]:
        """Shares."""
        reasons = []
        if not 0 < self.step < 1:
            reasons.append(f"`step` must be in (0, 1), got {self.step}: it is a share of the columns. Use 0.01.")
        if not 0 <= self.tolerance < 1:
            reasons.append(
                f"`tolerance` must be in [0, 1), got {self.tolerance}: it is a share of the accuracy. Use 0.1."
            )
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """A head that is a Linear, and rows to set the threshold on."""
        model = unwrapped(trainer.model)
        reasons = []
        if getattr(model, "loss_type", None) not in ("ForSequenceClassification", "ForImageClassification"):
            reasons.append(
                f"{type(model).__name__} is no sequence or image classifier: there is no head to prune. Use RECIPE."
            )
        if has_adapter(model):
            reasons.append(f"{type(model).__name__} carries an adapter: merge it first, model.merge_and_unload().")
        if getattr(trainer, "is_fsdp_enabled", False):
            reasons.append(
                "FSDP cuts the head into pieces, and columns are cut from the whole. Use DDP, or one process."
            )
        output = output_layer(model)
        if output is None:
            reasons.append(f"no Linear head was found in {type(model).__name__}. Use plain fine-tuning.")
        elif not output[1].weight.requires_grad:
            reasons.append(f"the head {output[0]} is frozen: it cannot be fine-tuned after pruning. Unfreeze it.")
        reasons += float32_reasons(model)
        if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
            reasons.append("the clean set is a stream: activations are averaged over all of it. Use a Dataset.")
        return reasons

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """Prune, judged by clean validation rows. On resume nothing: the state says what is cut."""
        if checkpoint is not None:
            return
        model = unwrapped(trainer.model)
        found = output_layer(model)
        assert found is not None  # `check` refused otherwise
        self._head, layer = found
        rows = trainer.train_dataset
        validation = trainer.aux_datasets.get("validation")
        if validation is None:
            validation = [row for i, row in enumerate(rows) if _share_of(row.get("row_id", i)) < 0.2] or list(rows)
        labels = [_label(row) for row in validation]
        self._activation = _head_inputs(model, layer, rows, trainer.data_collator)
        order = torch.argsort(self._activation)
        whole = layer.weight.detach().clone()

        def right() -> int:
            predicted = predict_logits(model, validation, trainer.data_collator).argmax(-1).tolist()
            return sum(p == y for p, y in zip(predicted, labels, strict=True))

        before, kept = right(), 0
        self._accuracies = [[0.0, before / len(labels)]]
        counts = {max(1, round(self.step * i * len(order))) for i in range(1, math.ceil(1 / self.step))}
        with torch.no_grad():
            for count in sorted(counts - {len(order)}):  # something is left to read
                layer.weight[:, order[:count].to(layer.weight.device)] = 0
                now = right()
                self._accuracies.append([count / len(order), now / len(labels)])
                # Of counts, since the quotient of two shares may fall on the wrong side of the tolerance.
                if not before or (before - now) / before >= self.tolerance:
                    break
                kept = count
            layer.weight.copy_(whole)
            self._cut = torch.zeros(len(order), dtype=torch.bool)
            self._cut[order[:kept]] = True
            layer.weight[:, self._cut.to(layer.weight.device)] = 0
        logger.warning(
            "fine_pruning: %d of %d inputs of %s are cut; clean validation accuracy %.3f -> %.3f.",
            kept, len(order), self._head, before / len(labels),
            next(accuracy for share, accuracy in self._accuracies if share == kept / len(order)),
        )  # fmt: skip

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """What was cut stays cut."""
        weight: Any = dict(unwrapped(model).named_parameters())[f"{self._head}.weight"]
        with torch.no_grad():
            weight.mul_((~self._cut).to(weight))

    def activity(self) -> dict[str, float]:
        """`fine_pruning_share`: of the head's inputs, those that were cut."""
        return {"fine_pruning_share": float(self._cut.float().mean()) if len(self._cut) else 0.0}

    def evidence(self) -> dict[str, Any]:
        """Activations of the head's inputs, what was cut, and accuracy by share."""
        return {
            "layer": self._head, "activations": self._activation.tolist(), "cut": self._cut.nonzero().flatten().tolist(),
            "accuracy_by_share": [list(pair) for pair in self._accuracies],
        }  # fmt: skip

    def inert(self) -> str | None:
        """Or: nothing was pruned."""
        if not len(self._cut):
            return "it was never prepared"
        return (
            None if bool(self._cut.any()) else "nothing could be cut within the tolerance: this was plain fine-tuning"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"cut": self._cut, "activation": self._activation, "head": self._head, "accuracies": self._accuracies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._cut, self._activation = state["cut"], state["activation"]
        self._head, self._accuracies = state["head"], [list(pair) for pair in state["accuracies"]]


def _share_of(row_id: int) -> float:
    digest = hashlib.blake2b(f"fine pruning|{int(row_id)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _label(row: Mapping[str, Any]) -> int:
    return int(row["label"] if "label" in row else row["labels"])


def _head_inputs(model: nn.Module, layer: nn.Linear, rows: Any, collate: Any) -> Tensor:
    """[d] mean absolute value of what the layer reads, over rows (and tokens or patches, where it reads several)."""
    total, count = torch.zeros(layer.in_features, dtype=torch.float64), 0

    def note(module: nn.Module, args: Any) -> None:
        nonlocal count
        read = args[0].detach().reshape(-1, layer.in_features)
        total.add_(read.abs().sum(0).double().cpu())
        count += len(read)

    hook = layer.register_forward_pre_hook(note)
    try:
        predict_logits(model, rows, collate)
    finally:
        hook.remove()
    return (total / max(count, 1)).float()
