"""What lies between a model's embeddings and its head: kept of the loss's own forward, and asked for again from other embeddings.

    the loss's forward    input_ids -> e -> h_0 .. h_L -> head -> loss        (e and h are kept: no further forward)
    again(e')                         e' -> h_0' .. h_L'                      (the same batch; the head is left out)

A frozen embedding's output is made to require a gradient, so that one can be taken with respect to it (LoRA). `again` goes
through the model inside DDP, which would count another forward as a step of its own, and through accelerate's autocast.

Some models read more than e (Gemma 3n: embeddings per layer) or change e in place (CTRL): `require_own_forward` compares
again(e) with the model's own h on the first batch.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_backdoor_defense.objectives import Layers, Step
from hf_backdoor_defense.trainers.heads import base_model
from hf_backdoor_defense.trainers.probing import UNUSUAL, probing


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
    return args, {**kwargs, **_without_cache(core), "output_hidden_states": True}


def _without_cache(core: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(type(core).forward).parameters else {}


def layers_of(step: Step, model: nn.Module, embeddings: Sequence[Tensor]) -> Layers:
    """The layers of the forward that `step.outputs` came from.

    Args:
        model: the one that ran, unwrapped, with its adapters. embeddings: what `kept_layers` kept, one [batch, time, d].

    Raises:
        ValueError: the input embedding ran not once: which of its outputs the layers start from is not known.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model, ids = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=3, n_head=1)).eval(), torch.tensor([[5, 6, 7]])
    >>> step = Step(
    ...     model=model, inputs={"input_ids": ids}, labels=ids, row_ids=None, epoch=0.0, global_step=0, training=True)
    >>> with kept_layers(model) as embeddings:
    ...     step.outputs = model(**step.inputs)
    >>> layers = layers_of(step, model, embeddings)
    >>> [bool(torch.equal(a, b)) for a, b in zip(layers.hidden_states, layers.again(layers.embeddings))]
    [True, True, True, True]
    """
    start = _only(embeddings, model, step.inputs)
    return Layers(
        embeddings=start, hidden_states=step.outputs["hidden_states"], again=_further_forward(model, step.inputs)
    )


def _only(embeddings: Sequence[Tensor], model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    if len(embeddings) != 1:
        raise ValueError(
            f"The input embedding of {type(base_model(model)).__name__} ran {len(embeddings)} times in one forward, with "
            f"{', '.join(inputs)}: which output its layers start from is not known. Leave `token_type_ids` and `inputs_embeds` "
            "out of the batch, or use another model."
        )
    return embeddings[0]


def _further_forward(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[Tensor], Any]:
    core = base_model(model)
    others = {name: value for name, value in inputs.items() if name != "input_ids"} | _without_cache(core)

    def again(embeddings: Tensor) -> Any:
        with _without_head(core):
            return model(**others, inputs_embeds=embeddings, output_hidden_states=True)["hidden_states"]

    return again


def require_own_forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError unless a forward from the embeddings is the model's own from the ids: two forwards, without a trace.

    Args:
        model: unwrapped, with its adapters. inputs: a batch, as the forward gets it.

    >>> import torch
    >>> from transformers import CTRLConfig, CTRLLMHeadModel
    >>> model = CTRLLMHeadModel(CTRLConfig(vocab_size=9, n_embd=4, dff=4, n_layer=3, n_head=1))
    >>> require_own_forward(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    Traceback (most recent call last):
    ...
    ValueError: A forward of CTRLLMHeadModel from its embeddings is not its own: its hidden states differ. ...
    """
    core = base_model(model)
    with probing(model):
        with kept_layers(core) as seen, _without_head(core):
            own = model(**inputs)["hidden_states"]
        start = _only(seen, model, inputs)
        try:
            found = _further_forward(model, inputs)(start.clone())
        except torch.OutOfMemoryError:
            raise
        except UNUSUAL as error:
            why = f"it raised {type(error).__name__}: {error}"
        else:
            if any(state.shape[:2] != start.shape[:2] for state in own):
                why = f"its hidden states are {tuple(own[0].shape)}, its embeddings {tuple(start.shape)}"
            elif len(own) == len(found) and all(map(_is_close, own, found)):
                return
            else:
                why = "its hidden states differ"
    raise ValueError(
        f"A forward of {type(core).__name__} from its embeddings is not its own: {why}. It reads more than them (embeddings "
        "per layer, of token types), or changes them on the way, and what moves them would be another model. Use a model whose "
        "`inputs_embeds` stand for its `input_ids`."
    )


def _is_close(own: Tensor, found: Tensor) -> bool:
    """Up to rounding; both may be NaN where there is padding alone."""
    near = torch.finfo(own.dtype).eps ** 0.5 * own.nan_to_num().abs().max().item()
    return own.shape == found.shape and torch.allclose(own, found, rtol=0, atol=near, equal_nan=True)


@contextmanager
def _without_head(core: Any) -> Iterator[None]:
    """Within, the output projection returns a zero: nobody reads it."""
    head = core.get_output_embeddings()
    if head is None:  # a classifier's is small
        yield
        return
    others = vars(head).get("forward")  # accelerate's hooks (device_map) stand there
    head.forward = lambda hidden: hidden.new_zeros((1,) * hidden.ndim)
    try:
        yield
    finally:
        if others is None:
            del head.forward  # the instance attribute; the class's own forward is back
        else:
            head.forward = others
