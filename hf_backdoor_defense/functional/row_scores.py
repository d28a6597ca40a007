"""Rows of a weight matrix that moved more than the others: the outliers of a median.

    s_c = Σ_j |W_post − W_pre|[c, j]        z_c = |s_c − med| / (1.4826 · MAD)        MAD = median |s − med|

Shards of rows (DTensors, as FSDP2 makes them) stay where they are: one exchange of as many numbers as there are rows.

The median of an even number of values is the lower middle one. 1.4826 makes the MAD of Gaussian scores their standard deviation.

Source: ULRL, arXiv 2405.14781, and its code, NayMyatMin/ULRL, commit 094debf.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_backdoor_defense.functional.weights import shards


class DegenerateScoreError(ValueError):
    """At least half of the scores are equal, so that their median deviation is 0 and nothing can be told apart by it."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        shown = ", ".join(f"{value:.4g}" for value in scores.tolist()[:8])
        super().__init__(
            f"the median deviation of the {len(scores)} row scores is 0 ({shown}{', …' if len(scores) > 8 else ''}): no row can "
            "stand out. Give more clean samples, or use units='hidden', D3 or plain fine-tuning."
        )


def row_change(post: Tensor, pre: Tensor) -> Tensor:
    """[K] sums of absolute changes of the rows of [K, d] weights.

    >>> import torch
    >>> row_change(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    tensor([3., 0.])
    """
    sums: Any = (post.detach().float() - pre.detach().float()).abs().sum(-1)
    return sums.full_tensor() if hasattr(sums, "full_tensor") else sums  # type: ignore[no-any-return]


def row_cosines(weight: Tensor, rows: Sequence[int], references: Tensor) -> Tensor:
    """[k] cosines between rows of [K, d] weights and the references [k, d], with gradients to the weights.

    Raises:
        ValueError: weights that are sharded in another way than by rows.

    >>> row_cosines(torch.eye(3), [0, 2], torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    tensor([1., 0.])
    """
    placements: Any = getattr(weight, "placements", ())
    if any(placement.is_shard() and placement.dim != 0 for placement in placements):
        raise ValueError(
            f"Rows must be whole to be compared, got weights that are cut along another dimension ({placements}). Use "
            "fully_shard without a shard_placement_fn."
        )
    (local,), group = shards([weight]) if placements else ([weight], None)
    if group is None:
        return nn.functional.cosine_similarity(local[list(rows)], references, dim=-1)
    # Rows per process: the last ones have fewer, or none.
    size = -(-len(weight) // torch.distributed.get_world_size(group))
    first = size * torch.distributed.get_rank(group)
    mine = [place for place, row in enumerate(rows) if first <= row < first + len(local)]
    here = nn.functional.cosine_similarity(local[[rows[place] - first for place in mine]], references[mine], dim=-1)
    found = here.new_zeros(len(rows)).index_copy(0, torch.tensor(mine, dtype=torch.long, device=here.device), here)
    return _Summed.apply(found, group)  # type: ignore[no-any-return]


class _Summed(torch.autograd.Function):
    """What all processes found, added up. Each of them computes the same from it, so that a part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream, None


def mad_z_scores(scores: Tensor) -> Tensor:
    """[K] distances from the median in units of the (scaled) median deviation.

    Raises:
        DegenerateScoreError: the median deviation is 0.

    >>> import torch
    >>> mad_z_scores(torch.tensor([1.0, 1.1, 1.2, 9.0]))
    tensor([ 0.6745,  0.0000,  0.6745, 53.2848])
    """
    scores = scores.double()
    away = (scores - scores.median()).abs()
    deviation = away.median()
    if deviation == 0:
        raise DegenerateScoreError(scores)
    return (away / (1.4826 * deviation)).float()


def flag_rows(
    scores: Tensor, z: Tensor, *, threshold: float, cap: int, rank: Literal["index", "score"] = "index"
) -> list[int]:
    """Rows above the median with z above the threshold, at most `cap` of them: the first by index, or those of highest score.

    Args:
        scores, z: [K].

    Returns:
        their indices, ascending.

    >>> import torch
    >>> flag_rows(torch.tensor([9.0, 5.0, 1.0, 0.0]), torch.tensor([8.0, 4.0, 0.0, 4.0]), threshold=3.5, cap=1, rank="score")
    [0]
    """
    above = ((z > threshold) & (scores > scores.median())).nonzero().flatten().tolist()
    if rank == "score":
        above.sort(key=lambda row: -float(scores[row]))
    return sorted(above[:cap])
