"""What processes say to each other within a block, and how much at a time.

Seen is what goes through torch's dispatcher: `torch.distributed.all_reduce` and its kin, what DTensors need, FSDP2's gathering
and scattering, DDP's reduction of gradients. CommDebugMode sees the same, without sizes; its module tracker stumbles over FSDP2's
hooks.
"""

from collections import Counter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """`seen`: (name, number of values of the largest tensor), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back in pieces
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").partition(".")[0]
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional") and name not in _SILENT:
            sizes = [leaf.numel() for leaf in tree_leaves((args, found)) if isinstance(leaf, torch.Tensor)]
            self.seen.append((name, max(sizes, default=0)))
        return found

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.seen)
