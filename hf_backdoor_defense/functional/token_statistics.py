"""What an evaluation tells about each labeled token beside its loss: how uncertain the model is, and whether it is right.

    H = -sum_k p_k log p_k, p = softmax(z)        top1 = [z_t = max_k z_k]

| symbol | variable | shape |
|---|---|---|
| z | `logits` | [..., classes] |
| t | `labels` | [...], integers, -100 where there is nothing to learn |
| H | entropy, in nats | [n_valid] |
| top1 | `is_top1` | [n_valid], bool |

Rows are taken in blocks, so that no second copy of the logits exists. Without gradients: for logs only.
"""

import torch
from torch import Tensor

from hf_backdoor_defense.functional.cross_entropy import valid_rows, working_dtype


@torch.no_grad()
def entropy_and_top1(logits: Tensor, labels: Tensor, *, chunk_bytes: int = 2**26) -> tuple[Tensor, Tensor]:
    """Entropy of the prediction, and whether the label has the highest score, for every labeled position.

    Args:
        logits: [..., classes], already aligned with the labels.
        labels: [...], integers, -100 where there is nothing to learn.
        chunk_bytes: budget of a block of rows in working precision; at least one row is taken.

    Returns:
        entropy [n_valid], in nats, float32 (float64 for float64 logits); is_top1 [n_valid], bool. A label that shares
        the highest score counts as right.

    In training take `Step.top1` instead: the loss has it already.

    >>> entropy, top1 = entropy_and_top1(torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, -100]))
    >>> entropy, top1
    (tensor([0.6931, 0.0012]), tensor([ True, False]))
    """
    flat, targets, rows = valid_rows(logits, labels)
    dtype = working_dtype(flat)
    entropy = flat.new_empty(targets.numel(), dtype=dtype)
    top1 = torch.empty_like(targets, dtype=torch.bool)
    step = max(1, chunk_bytes // (flat.shape[-1] * dtype.itemsize))
    for start in range(0, targets.numel(), step):
        part = slice(start, start + step)
        z = (flat[part] if rows is None else flat.index_select(0, rows[part])).to(dtype)
        top1[part] = z.gather(1, targets[part, None]).squeeze(1) == z.amax(1)
        p = z.softmax(1)
        entropy[part] = -torch.special.xlogy(p, p).sum(1)  # 0 where p is 0: a score of -inf, or one that underflows
    return entropy, top1
