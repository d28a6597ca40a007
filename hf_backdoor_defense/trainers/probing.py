"""Forwards that ask how a model behaves and leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# What a forward may raise that is asked to do something unusual. Out of memory is another matter.
UNUSUAL = (RuntimeError, ValueError, TypeError, IndexError, KeyError)


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, no gradients, no random numbers drawn. Afterwards every module is in the mode that it was in.

    >>> layer = nn.Dropout(0.5)
    >>> with probing(layer):
    ...     layer(torch.ones(3))
    tensor([1., 1., 1.])
    >>> layer.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    model.eval()
    for module, training in modes:
        # In evaluation bitsandbytes packs 4-bit weights for a CPU's inference, for good: nothing behind them has a gradient then.
        if type(module).__module__.startswith("bitsandbytes"):
            module.training = training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
