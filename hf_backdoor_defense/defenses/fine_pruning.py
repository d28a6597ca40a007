"""Fine-pruning of a pretrained encoder: the feed-forward units that plain text hardly uses are cut before fine-tuning.

    a_u = mean over tokens of |activation of unit u|,  over all layers together
    cut the units of lowest a_u, step by step, while the held-out pre-training loss rises by at most `tolerance` of itself

| symbol | what it is | shape |
|---|---|---|
| u | a unit of some block's up-projection | [blocks · intermediate] |
| W_u, b_u | its row and its bias, set to 0 to cut it | [hidden], scalar |

A unit that is cut is 0 for every input, as the activation function of 0 is (GELU, ReLU). Fine-tuning may grow it again. The idea
is that a backdoor hides in units that clean inputs leave asleep.

Source: fine-pruning, arXiv 1805.12185; for pretrained encoders, pruned over all layers by mean activation, a baseline of
doi 10.1162/tacl_a_00622. Which share that paper cuts is not known; here held-out text decides, never a trigger.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
