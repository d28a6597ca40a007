"""What lies between a model's embeddings and its head: kept of the loss's own forward, and asked for again from other embeddings.

    the loss's forward    input_ids -> e -> h_0 .. h_L -> head -> loss        (e and h are kept: no further forward)
    again(e')                         e' -> h_0' .. h_L'                      (the same batch; the head is left out)

A frozen embedding's output is made to require a gradient, so that one can be taken with respect to it (LoRA). `again` goes
through the model inside DDP, which would count another forward as a step of its own, and through accelerate's autocast.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_backdoor_defense.objectives import Layers, Step
from hf_backdoor_defense.trainers.heads import base_model


@contextmanager
def kept_layers(core: nn.Module) -> Iterator[list[Tensor]]:
    """Within, forwards of `core` return their hidden states; the embeddings that they start from are appended to the list.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=3, n_head=1)).eval()
    >>> with kept_layers(model) as embeddings:
    ...     outputs = model(input_ids=torch.tensor([[5, 6, 7]]))
    >>> embeddings[0].shape, len(outputs.hidden_states)
    (torch.Size([1, 3, 4]), 4)
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        seen.append(output)

    handles = [
        core.get_input_embeddings().register_forward_hook(note),  # type: ignore[operator]
        core.register_forward_pre_hook(_with_hidden_states, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _with_hidden_states(core: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "output_hidden_states": True}


def layers_of(step: Step, model: nn.Module, embeddings: Tensor) -> Layers:
    """The layers of the forward that `step.outputs` came from.

    Args:
        model: the one that ran, unwrapped, with its adapters. embeddings: [batch, time, d], what `kept_layers` kept.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model, ids = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=3, n_head=1)).eval(), torch.tensor([[5, 6, 7]])
    >>> step = Step(
    ...     model=model, inputs={"input_ids": ids}, labels=ids, row_ids=None, epoch=0.0, global_step=0, training=True)
    >>> with kept_layers(model) as embeddings:
    ...     step.outputs = model(**step.inputs)
    >>> layers = layers_of(step, model, embeddings[-1])
    >>> [bool(torch.equal(a, b)) for a, b in zip(layers.hidden_states, layers.again(layers.embeddings))]
    [True, True, True, True]
    """
    core: Any = base_model(model)
    inputs = {name: value for name, value in step.inputs.items() if name != "input_ids"}
    if "use_cache" in inspect.signature(type(core).forward).parameters:
        inputs["use_cache"] = False

    def again(other: Tensor) -> Any:
        with _without_head(core):
            return model(**inputs, inputs_embeds=other, output_hidden_states=True)["hidden_states"]

    return Layers(embeddings=embeddings, hidden_states=step.outputs["hidden_states"], again=again)


@contextmanager
def _without_head(core: Any) -> Iterator[None]:
    """Within, the output projection returns a zero: nobody reads it."""
    head = core.get_output_embeddings()
    if head is None:  # a classifier's is small
        yield
        return
    head.forward = lambda hidden: hidden.new_zeros((1,) * hidden.ndim)
    try:
        yield
    finally:
        del head.forward  # the instance attribute; the class's own forward is back
