"""Rows of a weight matrix that moved more than the others: the outliers of a median.

    s_c = Σ_j |W_post − W_pre|[c, j]        z_c = |s_c − med| / (1.4826 · MAD)        MAD = median |s − med|

The median of an even number of values is the lower middle one. 1.4826 makes the MAD of Gaussian scores their standard deviation.

Source: ULRL, arXiv 2405.14781, and its code, NayMyatMin/ULRL, commit 094debf.
"""

from typing import Literal

from torch import Tensor


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
    return (post.detach().float() - pre.detach().float()).abs().sum(-1)


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
