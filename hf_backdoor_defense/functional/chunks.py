"""Chunks of scores on their way through the row function: how large, in which buffers, compiled or not, added up how.

| device | chunk | row function |
|---|---|---|
| CPU | few rows: peak memory | eager, on blocks of rows that stay in the second-level cache |
| CUDA | many rows: every chunk reads and writes the whole gradient of the projection | one compiled kernel per chunk |
"""

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_backdoor_defense.functional.cross_entropy import working_dtype
from hf_backdoor_defense.functional.dece_rows import Case, Numbers, case_and_numbers, row_values_and_gradient

logger = logging.getLogger(__name__)

CACHE_BYTES = {"cpu": 2**19}  # of one eager buffer: three of them fit a core's second-level cache
CACHE_BYTES_ELSEWHERE = 2**26
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    """The default budget of work buffers, by device, where None is given.

    On a CPU small chunks keep the peak low and cost nothing; on a GPU each chunk reads and writes the whole gradient of the
    projection, so that few large ones are faster.

    >>> chunk_budget(None, torch.device("cpu")) == 2**25
    True
    """
    if chunk_bytes is None:
        return CHUNK_BYTES.get(device.type, 2**28)
    if chunk_bytes < 1:
        raise ValueError(f"`chunk_bytes` must be positive, got {chunk_bytes}: chunks hold one row at least. Set 2**28.")
    return chunk_bytes


def block_rows(classes: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows an eager block has: at least one, and as many as fit the cache.

    >>> block_rows(2**30, torch.device("cpu"), torch.float32)
    1
    """
    size = CACHE_BYTES.get(device.type, CACHE_BYTES_ELSEWHERE)
    return max(1, size // (classes * dtype.itemsize))


def chunk_rows(count: int, most: int, *, padded: bool) -> int:
    """Rows of a chunk: as many as the budget holds, one at least, in chunks of equal size.

    With `padded` (a compiled row function, which is compiled anew for every size) there are three sizes for a budget.

    >>> chunk_rows(100, 60, padded=False), chunk_rows(100, 0, padded=False), chunk_rows(100, 1000, padded=True)
    (50, 1, 256)
    """
    most = max(1, most)
    if not padded:
        return math.ceil(count / math.ceil(count / most)) if count else 0
    if most > 128:
        most -= most % 128  # what the matrix products like
    sizes = [max(1, min(most, math.ceil(most / part / 64) * 64)) for part in (16, 4, 1)]
    return next((size for size in sizes if size >= count), most)


def add_product(into: Tensor, change: Tensor, hidden: Tensor, *, scale: float = 1.0, first: bool = False) -> None:
    """into += scale change^T hidden, summed in the dtype of `into`, also where the factors have fewer bits.

    Args:
        into: [V, d], float32 or float64. change: [m, V]. hidden: [m, d].
        first: `into` holds nothing yet and is overwritten.

    >>> into = torch.zeros(2, 1)
    >>> add_product(into, torch.ones(3, 2).bfloat16(), torch.ones(3, 1).bfloat16(), scale=0.5)
    >>> into.flatten()
    tensor([1.5000, 1.5000])
    """
    beta = 0 if first else 1
    if change.dtype == into.dtype:
        torch.addmm(into, change.t(), hidden, beta=beta, alpha=scale, out=into)
    elif change.is_cuda and _adds_in_float32(change.dtype):
        torch.addmm(into, change.t(), hidden, out_dtype=into.dtype, beta=beta, alpha=scale, out=into)
    else:
        # By columns, so that the copies stay small. On a CPU single precision is the faster product anyway.
        columns = max(1, 2**22 // max(1, change.shape[0]))
        wide = hidden if change.is_cuda else hidden.to(into.dtype)
        for start in range(0, change.shape[1], columns):
            rows, left = into[start : start + columns], change[:, start : start + columns].t()
            if not change.is_cuda:
                torch.addmm(rows, left.to(into.dtype), wide, beta=beta, alpha=scale, out=rows)
            elif first:
                rows.copy_(torch.mm(left, wide)).mul_(scale)
            else:
                rows.add_(torch.mm(left, wide), alpha=scale)


@functools.lru_cache
def _adds_in_float32(dtype: torch.dtype) -> bool:
    """Whether this CUDA device adds a product of half-precision factors to a float32 tensor, tried once."""
    try:
        ones = torch.ones(16, 16, dtype=dtype, device="cuda")
        into = torch.full((16, 16), 1 / 3, device="cuda")
        torch.addmm(into, ones.t(), ones, out_dtype=torch.float32, beta=1, alpha=1.0, out=into)
        return bool((into - (16 + 1 / 3)).abs().max() < 1e-5)
    except (RuntimeError, TypeError) as error:
        logger.warning("products are added up in %s and then in float32: %s", dtype, error)
        return False


class RowFunction:
    """`row_values_and_gradient` over the rows of one buffer, which holds the scores before and their gradient after.

    Args:
        buffer: [rows, V], the scores of one chunk after the other, in the dtype of the product.
        log_alpha, label_smoothing: as in `dece_loss`.
        softcap: of the projection. gradient: whether it is wanted.

    >>> buffer = torch.zeros(2, 4)
    >>> rows = RowFunction(buffer, math.log(0.8), 0.0, softcap=None, gradient=True)
    >>> rows(torch.tensor([3]))[1]  # log p_t of the first row; the buffer's second row is not in use
    tensor([-1.3863])
    >>> buffer[0]
    tensor([ 0.1250,  0.1250,  0.1250, -0.3750])
    """

    def __init__(
        self, buffer: Tensor, log_alpha: float, label_smoothing: float, *, softcap: float | None, gradient: bool
    ) -> None:
        self.buffer, self.softcap, self.gradient = buffer, softcap, gradient
        self.work = working_dtype(buffer)
        rows, classes = buffer.shape
        self.case, self.numbers = case_and_numbers(log_alpha, label_smoothing, classes=classes, dtype=self.work)
        self.block = min(block_rows(classes, buffer.device, self.work), rows)
        self.spare: Tensor | None = None
        self.tensors: Numbers | None = None

    def __call__(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log p_t and top-1, [m] each, of the first m = len(targets) rows of the buffer."""
        if compiles(self.buffer):
            try:
                results = self._compiled(targets)
                _state["ran"] = True
                return results
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler can fail in any way, and the same function runs without one
                if _state["ran"]:
                    raise  # it compiled and ran before: the buffer may hold gradients by now
                logger.warning("the row function of the fused loss runs uncompiled, and slower: %s", error)
                _state["compiles"] = False
        return self._eager(targets)

    def _compiled(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Always the whole buffer: the rows of the last chunk are fewer, and another shape would be compiled anew. The rows
        # beyond hold what the chunk before left there; nothing of them is read.
        count = len(targets)
        padded = targets.new_zeros(len(self.buffer))
        padded[:count] = targets
        if self.tensors is None:
            self.tensors = Numbers(*(torch.full((), float(x), device=self.buffer.device) for x in self.numbers))
        # Three cases x three sizes of a chunk are more than the compiler's usual limit of variants.
        with torch._dynamo.config.patch(recompile_limit=64):
            results = _compiled_rows()(self.buffer, padded, self.case, self.tensors, self.softcap, self.gradient)
        return tuple(result[:count] for result in results)  # type: ignore[return-value]

    def _eager(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.buffer.dtype == self.work
        if self.spare is None:
            number = 2 + (self.softcap is not None) + (not own)
            self.spare = self.buffer.new_empty((number, self.block, self.buffer.shape[1]), dtype=self.work)
        results = []
        for start in range(0, len(targets), self.block):
            stop = min(start + self.block, len(targets))
            scores, spare = self.buffer[start:stop], self.spare[:, : stop - start]
            wide = scores if own else spare[-1].copy_(scores)
            *values, change = row_values_and_gradient(
                wide,
                targets[start:stop],
                self.case,
                self.numbers,
                softcap=self.softcap,
                gradient=self.gradient,
                buffers=spare.unbind(0),
            )
            results.append(values)
            if self.gradient and not own:
                scores.copy_(change)
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))  # type: ignore[return-value]


_state = {"compiles": True, "ran": False}


def compiles(tensor: Tensor) -> bool:
    """Whether the row function of scores like these is compiled: on CUDA, unless the compiler failed before.

    >>> compiles(torch.zeros(1))
    False
    """
    return tensor.is_cuda and tensor.dtype != torch.float64 and _state["compiles"]


@functools.lru_cache
def _compiled_rows() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(rows_in_place, dynamic=False, fullgraph=True)


def rows_in_place(
    scores: Tensor, targets: Tensor, case: Case, numbers: Numbers, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The function that is compiled: [n, V] scores of any dtype in, values, log p_t and top-1 out, gradient in their place.

    >>> scores = torch.zeros(1, 4)
    >>> case, numbers = case_and_numbers(0.0, 0.0, classes=4, dtype=torch.float32)
    >>> _ = rows_in_place(scores, torch.tensor([0]), case, numbers, None, True)
    >>> scores
    tensor([[-0.7500,  0.2500,  0.2500,  0.2500]])
    """
    values, logps, is_top1, change = row_values_and_gradient(
        scores.float(), targets, case, numbers, softcap=softcap, gradient=gradient
    )
    if gradient:
        scores.copy_(change)
    return values, logps, is_top1
