"""Cross-entropy of the positions that carry a label, and the alignment that every loss of this package shares.

Formula: CE = -log p_t, p = softmax(z), one value per position whose label is not `IGNORE_INDEX`.

| symbol | variable | shape |
|---|---|---|
| z | `logits` | [..., classes] |
| t | `labels` | [...], integers, -100 where there is nothing to learn |
| CE | result | [n_valid], in the order of the flattened labels |

Nothing here divides by a number of tokens: losses come back unreduced and are reduced in one place, the trainer.
Ignored positions are dropped instead of being given a zero, so that no mean can count them by accident.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def shift_labels(labels: Tensor) -> Tensor:
    """Next-token labels of the same shape, so that a causal model's logits need not be cut and copied.

    Args:
        labels: [batch, time], integers.

    Returns:
        [batch, time]: column t holds `labels[:, t + 1]`, the last column `IGNORE_INDEX`.

    For causal language models only; encoder-decoders and classifiers have aligned labels already.

    >>> shift_labels(torch.tensor([[5, 6, 7], [8, 9, -100]]))
    tensor([[   6,    7, -100],
            [   9, -100, -100]])
    """
    if labels.ndim != 2:
        raise ValueError(
            f"`labels` must be [batch, time], got shape {list(labels.shape)}: next-token labels move along time. "
            "Add the missing dimension, or do not shift labels that are aligned already."
        )
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def valid(labels: Tensor) -> Tensor:
    """Where there is something to learn: a boolean tensor of the shape of `labels`, False at `IGNORE_INDEX`.

    >>> valid(torch.tensor([3, -100, 0]))
    tensor([ True, False,  True])
    """
    return labels != IGNORE_INDEX


def valid_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check that logits and labels fit, flatten both, and say which rows count, without copying the logits.

    Args:
        logits: [..., classes], floating point. Sliced logits cannot be flattened in place and are copied: shift the
            labels (`shift_labels`) rather than the logits.
        labels: [...], integers in [0, classes) or `IGNORE_INDEX`.

    Returns:
        logits [n, classes]; targets [n_valid], int64; rows [n_valid], int64, or None where every row counts.

    >>> flat, targets, rows = valid_rows(torch.zeros(1, 3, 4), torch.tensor([[2, -100, 0]]))
    >>> flat.shape, targets, rows
    (torch.Size([3, 4]), tensor([2, 0]), tensor([0, 2]))
    """
    if not logits.is_floating_point():
        raise ValueError(
            f"`logits` must be floating point, got {logits.dtype}: they are scores. Are logits and labels swapped?"
        )
    if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"`labels` must have the shape of `logits` without its last dimension, got logits {list(logits.shape)} and "
            f"labels {list(labels.shape)}: each label needs its own row of scores. Align them before the loss."
        )
    targets, rows = valid_targets(labels, logits.shape[-1])
    return logits.reshape(-1, logits.shape[-1]), targets, rows


def valid_targets(labels: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
    """The labels that count and where they are, once it is sure that the model has such classes.

    Args:
        labels: [...], integers in [0, classes) or `IGNORE_INDEX`.

    Returns:
        targets [n_valid], int64; rows [n_valid], int64, of the flattened labels, or None where every row counts.

    >>> valid_targets(torch.tensor([[2, -100, 0]]), 4)
    (tensor([2, 0]), tensor([0, 2]))
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must be integers, got {labels.dtype}: they are class numbers. Convert them with .long(); "
            "soft and multi-label targets are not supported."
        )
    if classes < 2:
        raise ValueError(
            f"`logits` must score at least 2 classes, got {classes}: with one class there is nothing to tell apart. "
            "Is this a regression head?"
        )
    flat = labels.reshape(-1)
    rows = valid(flat).nonzero().squeeze(1)
    targets = flat[rows].long()
    outside = targets[(targets < 0) | (targets >= classes)]
    if outside.numel():
        raise ValueError(
            f"`labels` must be in [0, {classes}) or {IGNORE_INDEX}, got {int(outside[0])}: there is no such class. "
            f"Mark positions without a label by {IGNORE_INDEX}, and check that model and tokenizer belong together."
        )
    return targets, None if rows.numel() == flat.numel() else rows


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else: losses are never computed in half precision.

    >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Unreduced cross-entropy of the rows that carry a label.

    Args:
        logits: [..., classes], already aligned with the labels.
        labels: [...], integers, `IGNORE_INDEX` where there is nothing to learn.
        label_smoothing: torch's convention: every class, the target included, gets `label_smoothing / classes`.

    Returns:
        [n_valid], float32 (float64 for float64 logits). Where all labels are ignored it is empty and still has a graph:
        its sum is 0 and its backward gives zero gradients.

    Prefer `dece_loss` where part of the labels may be poisoned.

    >>> logits = torch.tensor([[0.0, 0.0], [3.0, 1.0], [9.0, 9.0]])
    >>> cross_entropy(logits, torch.tensor([0, 1, -100]))
    tensor([0.6931, 2.1269])
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"`label_smoothing` must be in [0, 1], got {label_smoothing}: it is a share of the label's probability. "
            "Set 0.0 for plain cross-entropy."
        )
    flat, targets, rows = valid_rows(logits, labels)
    if rows is not None:
        # Before the cast and the softmax: an ignored row costs nothing, and its inf or nan cannot reach a gradient.
        flat = flat.index_select(0, rows)
    return F.cross_entropy(flat.to(working_dtype(flat)), targets, reduction="none", label_smoothing=label_smoothing)


@torch.no_grad()
def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """[n_valid], bool: whether the label's score is the highest of its row (a tie counts), for token accuracy.

    Args:
        logits, labels: as in `cross_entropy`.

    >>> top1(torch.tensor([[0.0, 0.0], [3.0, 1.0], [9.0, 9.0]]), torch.tensor([0, 1, -100]))
    tensor([ True, False])
    """
    flat, targets, rows = valid_rows(logits, labels)
    flat = flat if rows is None else flat.index_select(0, rows)
    return flat.gather(1, targets.unsqueeze(1)).squeeze(1) == flat.amax(-1)
