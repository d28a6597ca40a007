"""Masked language models are scored at their labels and nowhere else: one row of logits per masked token, not per token.

    hidden states [batch, time, d]  ->  [1, n_valid, d]  ->  head  ->  logits [1, n_valid, vocabulary]

Between trunk and head stands a hook that keeps the labeled positions. The heads of masked language models look at each
position alone, so every score is the one that the whole forward would have given; two rows are asked both ways first.
With 15 % of the tokens masked the head costs, and its logits take, about a seventh.
"""

import dataclasses
import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX, valid
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers.heads import base_model, loss_kind
from hf_backdoor_defense.trainers.probing import UNUSUAL, probing

logger = logging.getLogger(__name__)

_PROBED = 2  # rows


class LabeledOnly:
    """A host's choice between scores at all positions and at labeled ones: asked per micro-batch, decided by the first."""

    def __init__(self) -> None:
        self._same: bool | None = None

    def chooses(self, step: Step, model: nn.Module) -> bool:
        """Whether this micro-batch is scored at its labels only. `model` is the unwrapped model, with its adapters."""
        core = base_model(model)
        if (
            loss_kind(core) != "ForMaskedLM"
            or step.labels.ndim != 2
            or trunk_of(core) is None
            or "labels" in step.inputs
        ):
            return False
        parts = (step.model, getattr(step.model, "module", None), core)
        if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts):
            return False  # a compiled forward does not see the hook
        if self._same is None:
            self._same = scores_by_position(model, step)
            if not self._same:
                logger.warning(
                    "The loss is computed from scores at all positions: the head of %s does not score each position alone.",
                    type(core).__name__,
                )
        return self._same


def trunk_of(core: nn.Module) -> nn.Module | None:
    """The encoder below a head, or None where the two are one module."""
    trunk: Any = getattr(core, "base_model", None)
    return None if trunk is core else trunk


@contextmanager
def at_labels(step: Step, core: nn.Module) -> Iterator[None]:
    """Within, the first forward of `core` scores the labeled positions of `step` only; its labels become theirs, [1, n_valid].

    >>> from transformers import BertConfig, BertForMaskedLM
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> model, ids = BertForMaskedLM(config), torch.tensor([[5, 6, 7], [5, 7, 8]])
    >>> step = Step(model=model, inputs={"input_ids": ids}, labels=torch.tensor([[-100, 6, -100], [5, -100, 8]]),
    ...     row_ids=None, epoch=0.0, global_step=0, training=True)
    >>> with at_labels(step, model):
    ...     scores = model(**step.inputs).logits
    >>> scores.shape, step.labels, step.batch_index
    (torch.Size([1, 3, 9]), tensor([[6, 5, 8]]), tensor([0, 1, 1]))
    """
    with only_at(core, take_labeled(step)):
        yield


def take_labeled(step: Step) -> Tensor:
    """Leave the labels of labeled positions in `step`, [1, n_valid]. Returns which positions they are, [batch, time], bool."""
    kept = valid(step.labels)
    step.whole_labels, step.labels = step.labels, step.labels[kept][None]
    return kept


@contextmanager
def only_at(core: nn.Module, kept: Tensor) -> Iterator[None]:
    """Within, the first forward of `core` scores the positions `kept` only. A loss may ask the model again, with other inputs."""
    trunk: Any = trunk_of(core)

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        hook.remove()
        return _selected(output, kept)

    hook = trunk.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _selected(output: Any, kept: Tensor) -> Any:
    states = output["last_hidden_state"] if isinstance(output, MutableMapping) else output[0]
    missing = states.shape[1] - kept.shape[1]  # virtual tokens of a prompt (peft) stand first and have no label
    chosen = states[nn.functional.pad(kept, (missing, 0)) if missing > 0 else kept][None]
    if isinstance(output, MutableMapping):
        output["last_hidden_state"] = chosen
        return output
    return (chosen, *output[1:])


def scores_by_position(model: nn.Module, step: Step) -> bool:
    """Whether a position's scores stay what they are when its neighbors do not reach the head.

    Two rows, every other position, two forwards: as cheap for a large vocabulary, and as telling for a batch without labels.
    """
    core, labels = base_model(model), torch.zeros_like(step.labels[:_PROBED])
    labels[:, 1::2] = IGNORE_INDEX
    rows = len(step.labels)
    inputs = {
        name: value[:_PROBED] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in step.inputs.items()
    }
    probe = dataclasses.replace(step, model=model, inputs=inputs, labels=labels, training=False)
    kept = valid(labels)
    try:
        with probing(model):
            whole = model(**inputs)["logits"]
            with at_labels(probe, core):
                few = model(**inputs)["logits"]
    except torch.OutOfMemoryError:
        raise
    except UNUSUAL:
        return False  # full logits show any other error
    expected = whole[:, whole.shape[1] - kept.shape[1] :][kept]
    if few.shape != (1, *expected.shape):
        return False
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)  # under autocast a row's last bit depends on the others
    return bool((few[0] - expected).abs().max() <= tolerance * expected.abs().max())
