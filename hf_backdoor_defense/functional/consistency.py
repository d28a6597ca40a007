"""Whether a network's layers agree with each other, and the embeddings' change that makes them agree less.

    c_lbt = 1 - cos(h_lbt, h_(l+1)bt)         l = 1 .. L-2
    C_b   = mean over l of (Σ_t m_bt c_lbt / Σ_t m_bt)
    δ     = ε · sign(∂C/∂e) · m

| symbol | variable | shape |
|---|---|---|
| h_0 .. h_L | `hidden_states`: embeddings' output, layers 1 .. L, the last behind the final norm | L + 1 of [batch, time, d] |
| m | `mask`: 1 where there is a token | [batch, time] |
| e | `embeddings`: what the first layer is given | [batch, time, d] |
| ε | `epsilon` | scalar |

The embeddings' output and the last state are left out (`include_last` takes the last one in): L - 2 pairs, in float32 (float64
for float64 states), because ∂c/∂h grows as 1/|h| where a state is small. A mean per sequence makes C additive over rows,
however they are batched and padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

UNDERFLOW = 1024.0  # C is multiplied by it for its gradient: the sign stays, and float16 does not lose it
_SMALLEST_NORM = 1e-8


def layer_inconsistency(
    hidden_states: Sequence[Tensor], mask: Tensor | None = None, *, include_last: bool = False
) -> Tensor:
    """[batch]: by how much neighboring layers disagree, 0 (all states parallel) to 2 (each opposite to the next).

    Args:
        hidden_states: L + 1 of [batch, time, d], L >= 3 (2 with `include_last`). mask: [batch, time]; None counts every
            position. A row without a position is 0.

    >>> states = [torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[3.0, 0.0]]]), torch.ones(1, 1, 2)]
    >>> layer_inconsistency(states)
    tensor([1.])
    """
    inner = hidden_states[1:] if include_last else hidden_states[1:-1]
    if len(inner) < 2:
        raise ValueError(
            f"Layers are compared in pairs, and {len(hidden_states)} hidden states leave {len(inner)} to compare: the first "
            f"{'is' if include_last else 'and the last are'} left out. Use a model of at least {2 if include_last else 3} layers."
        )
    wide = torch.float64 if inner[0].dtype == torch.float64 else torch.float32
    states = [state.to(wide) for state in inner]
    total = states[0].new_zeros(states[0].shape[:2])  # [batch, time]
    for lower, upper in zip(states, states[1:], strict=False):
        total = total + (1 - torch.cosine_similarity(lower, upper, dim=-1, eps=_SMALLEST_NORM))
    mean = total / (len(states) - 1)
    if mask is None:
        return mean.mean(-1)
    kept = mask.to(wide)
    return (mean * kept).sum(-1) / kept.sum(-1).clamp(min=1)


def fgsm_sign(inconsistency: Tensor, embeddings: Tensor, *, epsilon: float, mask: Tensor | None = None) -> Tensor:
    """[batch, time, d], detached: ±ε along the gradient's sign, 0 where it is 0 and where there is no token.

    One step, no projection. No parameter gets a gradient, and the graph stays for the backward of the loss. A gradient that is
    NaN (float16 overflowed) has no sign: 0 there, and infinity has one.

    Args:
        inconsistency: scalar, or [batch] (summed: rows do not depend on each other). embeddings: [batch, time, d], in its graph.

    >>> e = torch.tensor([[[2.0, -1.0, 0.0]]], requires_grad=True)
    >>> fgsm_sign(e.square().sum(), e, epsilon=0.5)
    tensor([[[ 0.5000, -0.5000,  0.0000]]])
    """
    (gradient,) = torch.autograd.grad(UNDERFLOW * inconsistency.sum(), embeddings, retain_graph=True)
    step = epsilon * gradient.nan_to_num().sign()
    return step if mask is None else step * mask.to(step.dtype)[..., None]
