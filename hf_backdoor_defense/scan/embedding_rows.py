r"""Rows of an input embedding whose norm is outlying, and their reset.

    n_i = ||E_i||_2          z_i = (n_i - m) / s          m = median n,   s = max(1.4826 median |n - m|, eps m)
    row i is outlying iff |z_i| > threshold or E_i is not finite

| symbol | variable | shape |
|---|---|---|
| E | `weight` | [rows, d] |
| n, z | `RowScan.norms`, `RowScan.z` | [rows] float64 |
| m, s | `RowScan.median`, `RowScan.scale` | numbers |
| eps | rounding of E's own float type | number |

1.4826 times the median deviation is the standard deviation of normally distributed norms, and outliers do not move it.
`eps m` is as finely as the weights can tell norms apart: where most norms are equal, any row that visibly differs is outlying.
Rows of zeros (padding, never used) are not judged, nor do they count in m and s: they carry nothing.

What it is for: an attack that makes trigger words irresistible by scaling their rows (arXiv 2101.06969, whose released code
multiplies them by 1e8). What it cannot see: an attack that trains the rows by ordinary steps (POR, NeuBA without the scaling,
BadPre). **Silence is no evidence of cleanliness.** A low norm is as outlying as a high one: tokens that no training ever touched
may show up as well, so read the tokens before a reset.

The threshold is ours: on a clean MiniLM the largest |z| is 4.6 (`[MASK]`, a short row).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

THRESHOLD = 8.0
_CHUNK = 8192  # rows that are float64 at a time: a large vocabulary is never copied whole


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScan:
    """What `scan_embedding_rows` saw.

    `norms`, `z`: [rows] float64; both are inf where a row holds NaN or infinity. `rows`: the outlying ones, the most
    outlying first. `median`, `scale`: m and s of the module's formula.
    """

    norms: Tensor
    z: Tensor
    rows: tuple[int, ...]
    median: float
    scale: float
    threshold: float

    @property
    def max_over_median(self) -> float:
        """Largest norm over the median norm; inf where a row is not finite."""
        return float(self.norms.max()) / self.median

    @property
    def largest(self) -> int:
        """The row with the largest |z| among those that are judged."""
        return int(self.z.abs().where(self.norms > 0, -torch.inf).argmax())

    @property
    def zeros(self) -> int:
        """How many rows are all zeros and so not judged."""
        return int((self.norms == 0).sum())


def scan_embedding_rows(weight: Tensor, *, threshold: float = THRESHOLD) -> RowScan:
    """Find the rows of an input embedding whose norm is outlying.

    Args:
        weight: [rows, d] of any float type; read once, never changed.
        threshold: |z| above which a row is outlying, > 0.

    Raises:
        ValueError: not a matrix of floats, no row that is finite and not zero, a threshold that is not positive.

    >>> weight = torch.nn.functional.one_hot(torch.arange(6)).float()
    >>> weight[4] *= 1e8
    >>> scan_embedding_rows(weight).rows
    (4,)
    """
    if not 0 < threshold < float("inf"):
        raise ValueError(
            f"`threshold` must be a positive number, got {threshold}: |z| is compared with it. Pass {THRESHOLD:g}."
        )
    norms = _norms(weight)
    judged = norms[norms.isfinite() & (norms > 0)]
    if not len(judged):
        raise ValueError(
            f"`weight` must have rows that are finite and not zero, got none among {len(weight)}: there is no norm to "
            "compare with. The file is broken, or this is not the embedding."
        )
    median = _median(judged)
    scale = max(1.4826 * _median((judged - median).abs()), torch.finfo(weight.dtype).eps * median)
    z = (norms - median) / scale
    suspicion = z.abs().where(norms > 0, 0.0)
    order = suspicion.argsort(descending=True, stable=True)
    rows = tuple(order[: int((suspicion > threshold).sum())].tolist())
    return RowScan(norms=norms, z=z, rows=rows, median=median, scale=scale, threshold=float(threshold))


def ordinary_row(weight: Tensor, rows: Iterable[int] = ()) -> Tensor:
    """What a reset row becomes: the mean of the inlying rows, scaled to their median norm.

    The mean is the embedding that says nothing about which word stands there. It is shorter than the rows it comes from (in a
    random embedding it nearly vanishes), and a short row would be outlying itself and would let the position decide what the
    next layer norm sees: hence the scaling.

    Args:
        weight: [rows, d]. rows: left out of the mean, beside zeros and whatever the scan finds at its default.

    Returns:
        [d] float64.

    Raises:
        ValueError: as `scan_embedding_rows`; also when no row is left.

    >>> ordinary_row(torch.tensor([[2.0, 0.0], [0.0, 2.0], [9e9, 9e9]]), [2]).tolist()
    [1.414213562373095, 1.414213562373095]
    """
    scan = scan_embedding_rows(weight)
    keep = (scan.norms > 0) & (scan.z.abs() <= scan.threshold)
    keep[list(rows)] = False
    if not keep.any():
        raise ValueError(
            f"`rows` must leave rows to take a mean of, got all of the {len(weight)}. Pass only the outlying ones."
        )
    parts = zip(weight.detach().split(_CHUNK), keep.split(_CHUNK), strict=True)
    mean = torch.stack([part[kept].double().sum(0) for part, kept in parts]).sum(0) / keep.sum()
    norm = mean.norm()
    return mean * (_median(scan.norms[keep]) / norm) if norm > 0 else mean


def reset_rows(model: nn.Module, rows: Sequence[int]) -> None:
    """Overwrite rows of the model's input embedding, in place, with `ordinary_row`.

    Tokens whose rows are reset can no longer be told apart. A tied output matrix is the same tensor and follows; an untied
    one is left alone. The padding row never gets the mean, which would give padding a meaning: it becomes zeros, as in a new
    `nn.Embedding`. (It is no safe place otherwise: tokenizers read a literal "[PAD]" in a text as this row, unmasked.)

    Args:
        model: anything with `get_input_embeddings()`. rows: indices, for example `scan_embedding_rows(weight).rows`.

    Raises:
        ValueError: no embedding, an index outside it, and as `ordinary_row`.

    >>> class Model(nn.Module):
    ...     embedding = nn.Embedding.from_pretrained(torch.tensor([[2.0, 0.0], [2.0, 0.0], [9e9, 9e9]]))
    ...     def get_input_embeddings(self):
    ...         return self.embedding
    >>> model = Model()
    >>> reset_rows(model, [2])
    >>> model.embedding.weight[2].tolist()
    [2.0, 0.0]
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"`model` must have an input embedding with a weight, got {type(model).__name__}: there are no token rows to "
            "reset. Pass a language model."
        )
    with torch.no_grad():
        for row, value in new_rows(weight, rows, padding=getattr(embedding, "padding_idx", None)).items():
            weight[row] = value


def new_rows(weight: Tensor, rows: Sequence[int], *, padding: int | None) -> dict[int, Tensor]:
    """What each of `rows` becomes, [d] in the type of `weight`. Arguments and errors as `reset_rows`.

    >>> new_rows(torch.tensor([[3.0], [5.0]]), [0], padding=0)
    {0: tensor([0.])}
    """
    outside = [row for row in rows if not 0 <= row < len(weight)]
    if outside:
        raise ValueError(
            f"`rows` must be in 0..{len(weight) - 1}, got {outside}: the embedding has no such rows. Scan this model."
        )
    if not rows:
        return {}
    ordinary = ordinary_row(weight, rows).to(weight.dtype)
    return {row: torch.zeros_like(ordinary) if row == padding else ordinary for row in rows}


def _norms(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point() or not len(weight):
        raise ValueError(
            f"`weight` must be a matrix of floats with one row per token, got shape {tuple(weight.shape)} and "
            f"{weight.dtype}. Pass model.get_input_embeddings().weight of a model that is not quantized."
        )
    norms = torch.cat([part.double().norm(dim=1) for part in weight.detach().split(_CHUNK)])
    return norms.where(norms.isfinite(), torch.inf)


def _median(values: Tensor) -> float:
    return float(values.quantile(0.5))  # unlike Tensor.median, the mean of the middle two
