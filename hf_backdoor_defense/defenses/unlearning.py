"""A training that is undone: what it needs to leave no trace, and to be done by one process for all."""

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train all of the model on `device` inside; afterwards parameters, buffers, gradients, modes and random states are as they
    were."""
    home = next(model.parameters()).device
    state = {name: value.detach().cpu().clone() for name, value in _tensors(model).items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    others = random.getstate(), np.random.get_state()
    model.to(device)  # type: ignore[arg-type]
    model.train()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            for parameter in model.parameters():
                parameter.grad = None
            yield
    finally:
        random.setstate(others[0])
        np.random.set_state(others[1])
        with torch.no_grad():
            for name, value in _tensors(model).items():
                value.copy_(state[name])
        model.to(home)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for name, module in model.named_modules():
            module.training = modes[name]


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed dropout, where it runs: `torch.manual_seed` would seed every card, and only this one's state comes back."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those that no checkpoint holds too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def from_first(
    scores: Tensor, figures: list[float], failed: bool, device: torch.device, room: int
) -> tuple[Tensor, list[float]]:
    """The first process's scores and figures (at most `room`) on every process. Raises RuntimeError on the others if it failed.

    Args:
        scores: [K]. figures: numbers, none of them NaN.
    """
    import torch.distributed as dist

    padded = figures + [math.nan] * (room - len(figures))
    message = torch.cat([scores.double(), torch.tensor([*padded, float(failed)], dtype=torch.float64)]).to(device)
    dist.broadcast(message, src=0)
    found = message.cpu()
    if found[-1]:
        if dist.get_rank() == 0:
            return scores, figures
        raise RuntimeError("ulrl: unlearning failed on the first process, whose message says why.")
    rest = found[len(scores) : -1]
    return found[: len(scores)].float(), rest[~rest.isnan()].tolist()
