"""Which implementation computes a loss over a vocabulary, and the seam that lets it see behind the output projection.

    hidden states and projection  where  labels x vocabulary x 4 bytes >= fuse_bytes  and  vocabulary >= SMALL_VOCABULARY
    full logits                   elsewhere

For one forward of the wrapped model the head's own `forward` is replaced by the loss: it receives the hidden states and
returns a placeholder, so that full logits never exist, and DDP sees an ordinary forward. Labels are withheld from the
model, hence nothing else reads the placeholder.

| what the model does after its projection | handled as |
|---|---|
| soft-cap (`final_logit_softcapping`), scale (`logit_scale`, `logits_scaling`) | fields of `Projection` |
| a bias of the model's own (`final_logits_bias`: BART and its kin) | the head's bias |
| anything else | found by `follows_configuration` on the first batch; full logits, with a warning |
| before it (T5 scales its hidden states) | nothing to do: the head receives the result |
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_backdoor_defense.objectives import Objective, Projection, Step, overrides
from hf_backdoor_defense.trainers.heads import base_model, pad_labels, scores_vocabulary
from hf_backdoor_defense.trainers.probing import UNUSUAL, probing

logger = logging.getLogger(__name__)

SMALL_VOCABULARY = (
    1024  # below it (bytes, characters) the row of scores is hardly longer than the hidden state it comes from
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Fusing:
    """A host's choice between full logits and hidden states: made for every micro-batch, said once per reason.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> step = Step(
    ...     model=model, inputs={"input_ids": ids}, labels=ids, row_ids=None, epoch=0.0, global_step=0, training=True)
    >>> Fusing().chooses(step, model), Fusing().chooses(step, model, fuse_bytes=0)
    (False, True)
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._follows: bool | None = None

    def chooses(
        self, step: Step, model: nn.Module, *, objectives: Sequence[Objective] = (), fuse_bytes: int = 2**26
    ) -> bool:
        """Whether this training micro-batch goes without full logits.

        Args:
            step: the micro-batch before its forward; `step.model` is the model as the Trainer wrapped it.
            model: the same model unwrapped, with its adapters.
            fuse_bytes: the least size of float32 logits that is fused; 0 fuses everything that can be.
            objectives: those with a `loss`, `penalties` or `observe` of their own get logits unless they say `takes_hidden`.
        """
        core = base_model(model)
        if not scores_vocabulary(core):
            return False  # a classifier: no such choice, nothing to say
        needing = [o.name for o in objectives if not o.takes_hidden and any(overrides(o, m) for m in _READS)]
        if needing:
            return self._logits("needing", logging.INFO, f"{', '.join(needing)} takes nothing else")
        head = output_head(core)
        config: Any = core.config
        vocabulary = getattr(head, "out_features", None) or getattr(config.get_text_config(), "vocab_size", None)
        size = step.labels.numel() * vocabulary * 4 if vocabulary else 0
        if vocabulary and vocabulary < SMALL_VOCABULARY and fuse_bytes > 0:
            return self._logits("vocabulary", logging.INFO, f"a vocabulary of {vocabulary} is never fused")
        # Processes that share a sharded model make the same forwards: its one question is asked with the first batch,
        # whatever each one's size is.
        asks = self._follows is None and _is_sharded(step.model)
        is_small, small = vocabulary and size < fuse_bytes, f"{size} bytes are less than fuse_bytes={fuse_bytes}"
        if is_small and not asks:
            return self._logits("small", logging.INFO, small)
        reason = obstacle(step, core, head)
        if reason is not None:
            return self._logits(reason, logging.WARNING, reason)
        if self._follows is None:
            self._follows = follows_configuration(model, step.inputs)
        if is_small:
            return self._logits("small", logging.INFO, small)
        if not self._follows:
            reason = (
                f"{type(core).__name__} does something to its logits after the output projection that its configuration does "
                "not tell (known: bias, scale, soft-cap), or cannot run with a placeholder for them"
            )
            return self._logits(reason, logging.WARNING, reason)
        self._say(
            "fused", logging.INFO, "loss and output projection are fused (%d bytes of logits per batch saved)", size
        )
        return True

    def _logits(self, key: str, level: int, reason: str) -> bool:
        self._say(key, level, "The loss is computed from full logits: %s.", reason)
        return False

    def _say(self, key: str, level: int, *message: Any) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.log(level, *message)


_AFTER_THE_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")
_READS = ("loss", "penalties", "observe")


def output_head(model: nn.Module) -> nn.Module | None:
    """The output projection of a language model; None for classifiers and for models of another make."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def obstacle(step: Step, core: nn.Module, head: nn.Module | None) -> str | None:
    """Why a loss cannot take the place of this head, in words; None where it can.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> core = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    >>> step = Step(
    ...     model=core, inputs={}, labels=torch.zeros(1, 2), row_ids=None, epoch=0.0, global_step=0, training=True)
    >>> obstacle(step, core, core.lm_head)
    >>> obstacle(step, core, nn.Bilinear(4, 4, 9))
    'its output projection is a torch.nn.modules.linear.Bilinear (adapters, quantized and wrapped layers hide their weights)'
    """
    name = type(core).__name__
    if head is None:
        return f"{name} has no output projection that can be read (get_output_embeddings() gives None)"
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        return f"its output projection is a {kind} (adapters, quantized and wrapped layers hide their weights)"
    for which, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is None:
            continue
        # FSDP2 makes whole, for the forward, what the model's outermost module owns; parts with hooks of their own see below.
        is_whole = type(tensor) in (Tensor, nn.Parameter) or (
            hasattr(tensor, "device_mesh") and _is_sharded(step.model)
        )
        if not is_whole or tensor.dtype not in _FLOATS:
            return f"the {which} of its output projection is a {type(tensor).__name__} of {tensor.dtype}, sharded or quantized"
        if tensor.is_meta or tensor.numel() == 0:
            return f"the {which} of its output projection is not in memory"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "hooks of another library stand around its output projection"
    if "labels" in step.inputs:
        return f"{name} derives its decoder inputs from labels inside its forward, and computes a loss there"
    config: Any = core.config
    for field in _AFTER_THE_HEAD:
        value = getattr(config.get_text_config(), field, None)
        if value is not None and (not isinstance(value, (int, float)) or value <= 0):
            return f"{field}={value!r} in the configuration of {name} is no positive number"
    if getattr(step.model, "static_graph", False):
        return "DDP with a static graph (ddp_static_graph) synchronizes only what goes through the model's outputs"
    if any(_is_compiled(part) for part in (step.model, getattr(step.model, "module", None), core)):
        return "the model is compiled, and a compiled forward does not see a replaced output projection"
    return None


def _is_compiled(model: nn.Module | None) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) was applied to a model."""
    return hasattr(model, "unshard")


def forward_with_hidden(step: Step, core: nn.Module, loss: Callable[[Step], Tensor]) -> tuple[Tensor, Any]:
    """One forward of `step.model` in which the loss takes the place of the output projection of `core`.

    Returns:
        the values [n_valid], and the model's outputs, whose logits are a placeholder without meaning.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> step = Step(
    ...     model=model, inputs={"input_ids": ids}, labels=ids, row_ids=None, epoch=0.0, global_step=0, training=True)
    >>> values, outputs = forward_with_hidden(step, model, Objective().loss)
    >>> values.shape, step.hidden.shape, outputs.logits.shape
    (torch.Size([3]), torch.Size([1, 3, 4]), torch.Size([1, 1, 1]))
    """
    head = output_head(core)
    if head is None:
        raise ValueError(f"{type(core).__name__} has no output projection: its loss can only be computed from logits.")
    kept: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        step.hidden, step.project = hidden, projection(core, head)
        pad_labels(step, hidden)
        values = loss(step)
        kept.append(values)
        # One number per dimension: a bias that is added to it stays small. It hangs on the loss, because DDP looks for
        # unused parameters behind the outputs.
        return (values.sum() * 0).to(hidden.dtype).view((1,) * hidden.ndim)

    head.forward = forward  # type: ignore[method-assign]
    try:
        outputs = step.model(**step.inputs)
    finally:
        del head.forward  # the instance attribute; the class's own forward is back
    step.outputs = outputs
    values = kept[0]
    if _is_sharded(step.model):
        # FSDP2 makes the weights whole again when a gradient reaches the model's outputs. The placeholder hangs on the values,
        # so that their own backward, which reads the weights, waits for it.
        placeholder = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        values = values + 0 * placeholder.sum().to(values.dtype)
    return values, outputs


def projection(core: nn.Module, head: nn.Module) -> Projection:
    """The head's weights and what the model does to its scores afterwards (bias, soft-cap, scale)."""
    config: Any = core.config
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    own, after = getattr(head, "bias", None), _bias_after(core)
    return Projection(
        weight=head.weight,  # type: ignore[arg-type]
        bias=own if after is None else after if own is None else own + after,
        scale=scale / divisor,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _bias_after(core: nn.Module) -> Tensor | None:
    """[vocab]: what BART and its kin add to the scores of the head."""
    bias = getattr(core, "final_logits_bias", None)
    return bias.reshape(-1) if isinstance(bias, Tensor) else None


def follows_configuration(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether `projection` tells all that a model does to its scores. One forward, no gradients, no random numbers drawn.

    In place of the head stand known scores, few and large, so that a soft-cap shows whatever the weights are.
    """
    core = base_model(model)
    head = output_head(core)
    if head is None:
        return False
    project, after, shown = projection(core, head), _bias_after(core), []
    generator = torch.Generator().manual_seed(0)

    def forward(hidden: Tensor) -> Tensor:
        shape = (*(min(size, 2) for size in hidden.shape[:-1]), project.weight.shape[0])
        shown.append(torch.randn(shape, generator=generator) * 30)
        return shown[-1].to(hidden.device)

    head.forward = forward  # type: ignore[method-assign]
    try:
        with probing(model):
            outputs = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    except torch.OutOfMemoryError:
        raise
    except UNUSUAL:
        return (
            False  # it reads its scores in a way that a placeholder would not stand; full logits show any other error
        )
    finally:
        del head.forward
    if len(shown) != 1 or logits.shape != shown[0].shape:
        return False
    scores = shown[0].reshape(-1, shown[0].shape[-1]).double()  # [rows, vocab]
    # The same formula as in training, in float64: the scores come out of a projection of unit vectors.
    known = dataclasses.replace(project, weight=scores.T, bias=None if after is None else after.detach().cpu().double())
    expected = known(torch.eye(len(scores), dtype=torch.float64))
    return bool((logits.reshape(expected.shape).cpu() - expected).abs().max() <= 1e-3 * expected.abs().max())
