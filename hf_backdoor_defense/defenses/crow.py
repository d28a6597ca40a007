"""CROW: takes a backdoor out of a language model by making its layers agree, on clean rows, under a perturbation of the input.

    δ = ε · sign(∂C(h(e))/∂e) · m        L = L_LM + α · C(h(e + δ))        C: functional/consistency.py

On triggered input a backdoored model's hidden states jump from layer to layer where on clean input they change smoothly. Two
forwards per micro-batch: C(h(e)) is read off the loss's own, and the perturbed one leaves out the head. The inner gradient is
taken with respect to e alone; δ is held constant, and a trainable embedding still gets its gradient through e.

| paper | field | where the value stands |
|---|---|---|
| ε | `epsilon` = 0.1 | authors' code; the paper names 0.3 and 1.0 in an ablation (second-hand) |
| α | `weight` = 5.5 | authors' code; 11 for refusal (paper, second-hand): the preset "refusal" |
| l | `include_last` = False | authors' code: pairs 1 .. L-2; the paper, second-hand, takes the last state in |
| learning rate 1e-3, 5 epochs, batch 8, cosine, warm-up 0.1 | TrainingArguments | authors' code; not set here |

Source: Min et al., ICML 2025, arXiv 2411.12768; formula from the authors' released code (NayMyatMin/CROW). Unlike it: padding
neither attends nor counts, accumulated gradients survive, and no parameter gets a gradient of the inner pass. The
authors' inner pass is a forward of its own; with dropout that draws other masks, without it there is no difference.
When not to use it: where the rows are poisoned, too. Much of the published effect may be the hot learning rate's: compare with
plain fine-tuning (`defense=None`) at the same rate, steps and rows. See docs/choosing.md.
"""

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_backdoor_defense.functional.consistency import fgsm_sign, layer_inconsistency
from hf_backdoor_defense.objectives import Objective, Step, everywhere, is_first_process

logger = logging.getLogger(__name__)

ADVISED_ROWS = 100  # what the authors use
HOT_RATE = 5e-4
MOSTLY_ZERO = 0.99
_SUMS = ("rows", "clean", "adversarial", "positions", "zero_sign", "square", "tokens", "loss")


@dataclass(kw_only=True, eq=False)
class CROW(Objective):
    """Internal consistency regularization. `train_dataset` are the clean rows; the model, or its LoRA adapter, is not trusted.

    Prefer `DeCE` where the rows are not trusted but the weights are; [DeCE(), CROW()] is for neither being trusted, and then the
    rows are not the clean ones that the method asks for.

    Args:
        epsilon: how far each coordinate of the embeddings is moved, > 0.
        weight: of the penalty, >= 0; 0 is plain fine-tuning.
        include_last: whether the last state, behind the final norm, is compared too.

    >>> CROW.preset("refusal")
    CROW(epsilon=0.1, weight=11.0, include_last=False)
    >>> CROW(epsilon=0.0)
    Traceback (most recent call last):
    ...
    ValueError: crow: `epsilon` must be finite and > 0, got 0.0: it is how far the embeddings are moved. Set 0.1.
    """

    name = "crow"
    paper = "2411.12768"
    takes_hidden = True
    takes_layers = True
    presets = {"default": {"epsilon": 0.1, "weight": 5.5}, "refusal": {"epsilon": 0.1, "weight": 11.0}}

    epsilon: float = 0.1
    weight: float = 5.5
    include_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64)
        self._is_whole = True  # whether the sums are those of all processes
        self._has_reached = False  # whether the penalty was seen to hang on a trained weight

    def field_reasons(self) -> list[str]:
        """A step that is one, and a penalty that is one."""
        reasons = []
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            reasons.append(
                f"`epsilon` must be finite and > 0, got {self.epsilon}: it is how far the embeddings are moved. Set 0.1."
            )
        if not (math.isfinite(self.weight) and self.weight >= 0):
            reasons.append(f"`weight` must be finite and >= 0, got {self.weight}: it weighs a penalty. Set 5.5.")
        return reasons

    def check(self, trainer: Any) -> list[str]:
        """A decoder whose embeddings and layers are within reach, rows one by one, something to train; warns of few rows."""
        reasons = _model_reasons(trainer.model, least=2 if self.include_last else 3) + _run_reasons(trainer)
        core = _core(trainer.model)
        if getattr(core, "loss_type", None) not in (None, "ForCausalLM"):  # None: GPT2LMHeadModel and its kin
            logger.warning(
                "crow: %s is no decoder of text: its authors tuned these, and measured nothing else. Compare with defense=None.",
                type(core).__name__,
            )
        rows = trainer.train_dataset
        if hasattr(rows, "__len__") and len(rows) < ADVISED_ROWS:
            logger.warning("crow: %d clean rows; its authors use %d. Add rows.", len(rows), ADVISED_ROWS)
        if trainer.args.learning_rate >= HOT_RATE:
            logger.warning(
                "crow: at a learning rate of %g plain fine-tuning forgets much by itself. Train with defense=None at the same "
                "rate, steps and rows, and say what CROW does beyond it.",
                trainer.args.learning_rate,
            )
        return reasons

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new run starts with empty records; a resumed one keeps what the checkpoint held."""
        if state.global_step == 0 or not is_first_process():
            self._sums = torch.zeros_like(self._sums)
        self._is_whole = self._has_reached = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The sums become those of all processes."""
        self.load_state_dict(self.state_dict())

    def observe(self, step: Step, values: Tensor) -> None:
        """What the loss is without the penalty."""
        self._add(loss=values.sum(), tokens=torch.full_like(values, 1.0).sum())

    def penalties(self, step: Step) -> dict[str, Tensor]:
        """[batch] weighted inconsistency of the layers at the perturbed embeddings.

        Raises ValueError on the first batch where no trained weight lies before the states that are compared.
        """
        if self.weight == 0:  # plain fine-tuning, and its very trajectory
            return {}
        layers, mask = step.layers, _mask(step.inputs)
        assert layers is not None
        clean = layer_inconsistency(layers.hidden_states, mask, include_last=self.include_last)
        delta = fgsm_sign(clean, layers.embeddings, epsilon=self.epsilon, mask=mask)
        states = layers.again(layers.embeddings + delta)
        adversarial = layer_inconsistency(states, mask, include_last=self.include_last)
        if not self._has_reached:
            self._require_reach(adversarial)
        self._record(step, clean, adversarial, delta, mask)
        return {"penalty": self.weight * adversarial}

    def _require_reach(self, penalty: Tensor) -> None:
        if not _hangs_on_parameter(penalty):
            raise ValueError(
                "crow: no trained weight lies before the states that are compared (layers 1 to "
                f"{'L' if self.include_last else 'L - 1'}): the penalty changes nothing where only a head or a last layer is "
                "trained. Train earlier layers, too (LoRA: leave out `layers_to_transform`)."
            )
        self._has_reached = True

    @torch.no_grad()
    def _record(self, step: Step, clean: Tensor, adversarial: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        assert step.layers is not None
        learned = step.labeled_rows.to(clean.dtype)
        real = learned[:, None] * (torch.ones_like(delta[..., 0]) if mask is None else mask).to(clean.dtype)
        zero = (real * (delta == 0).all(-1)).sum()
        square = (real * step.layers.embeddings.to(clean.dtype).square().mean(-1)).sum()
        rows, positions = learned.sum(), real.sum()
        sums = {"clean": (learned * clean).sum(), "adversarial": (learned * adversarial).sum()}
        self._add(rows=rows, positions=positions, zero_sign=zero, square=square, **sums)
        for name, total in sums.items():
            step.log(f"crow/{name}", total / rows.clamp(min=1))
        step.log("crow/gap", (sums["adversarial"] - sums["clean"]) / rows.clamp(min=1))
        step.log("crow/zero_sign", zero / positions.clamp(min=1))

    def _add(self, **figures: Tensor) -> None:
        device = next(iter(figures.values())).device
        wide = torch.float32 if device.type == "mps" else torch.float64  # sums over a whole run
        now = self._sums.to(device, wide)
        for name, value in figures.items():
            now[_SUMS.index(name)] += value.detach()
        self._sums = now

    def activity(self) -> dict[str, float]:
        """Means over the rows: C before and at δ, their gap, the penalty, its share of the loss; tokens without a sign.

        `relative_step` is ε over the root mean square of an embedding's coordinates: above 1 the step outweighs the text.
        """
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        if not sums["tokens"]:
            return {}
        rows = max(sums["rows"], 1.0)
        penalty, loss = self.weight * sums["adversarial"] / rows, sums["loss"] / sums["tokens"]
        return {
            "clean": sums["clean"] / rows,
            "adversarial": sums["adversarial"] / rows,
            "gap": (sums["adversarial"] - sums["clean"]) / rows,
            "penalty": penalty,
            "share_of_loss": penalty / max(penalty + loss, 1e-12),
            "zero_sign": sums["zero_sign"] / max(sums["positions"], 1.0),
            "relative_step": self.epsilon * (sums["positions"] / max(sums["square"], 1e-30)) ** 0.5,
            "rows": sums["rows"],
        }

    def inert(self) -> str | None:
        """No weight, no row, a gradient without signs, or embeddings whose change made nothing worse."""
        if self.weight == 0:
            return "crow with weight=0 is plain fine-tuning"
        found = self.activity()
        if not found.get("rows"):
            return "crow saw no row with a label"
        if found["zero_sign"] > MOSTLY_ZERO:
            return f"crow's inner gradient was zero at {found['zero_sign']:.1%} of the tokens: the embeddings were hardly moved"
        if found["gap"] <= 0:
            return (
                f"crow's perturbation made the layers disagree no more than before (gap {found['gap']:.2g}): it is "
                f"{found['relative_step']:.2g} times the embeddings themselves. Set a smaller epsilon."
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was summed over the rows, over all processes."""
        here = self._sums.to("cpu", torch.float64)
        return {"sums": here if self._is_whole else torch.stack(everywhere(here)).sum(0)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums, self._is_whole = state["sums"].double(), True


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """[batch, time], 1 where there is a token; None where every position is one. Raises ValueError for joined rows."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"crow: `attention_mask` must be [batch, time], got {tuple(mask.shape)}: it says which positions count. Let the "
            "collator leave a mask of tokens."
        )
    positions = inputs.get("position_ids")
    if positions is None:
        return mask
    restarts = positions.diff() <= 0
    if mask is not None:  # what positions padding has is nobody's business
        restarts = restarts & mask.bool()[:, 1:] & mask.bool()[:, :-1]
    if bool(restarts.any()):
        raise ValueError(
            "crow: the batch joins several rows into one sequence (position ids start over), and each row counts by itself. "
            "Use a collator that pads."
        )
    return mask


def _hangs_on_parameter(value: Tensor) -> bool:
    """Whether a parameter is among the leaves of the graph of `value`.

    >>> weight, e = nn.Parameter(torch.ones(1)), torch.ones(1, requires_grad=True)
    >>> _hangs_on_parameter(e * weight), _hangs_on_parameter(e * weight.detach())
    (True, False)
    """
    todo, seen = [value.grad_fn], {None}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        todo += [before for before, _ in node.next_functions]  # type: ignore[union-attr]
    return False


def _model_reasons(model: Any, *, least: int) -> list[str]:
    core = _core(model)
    config, name = core.config, type(core).__name__
    reasons = []
    takes = {parameter for kind in type(core).__mro__ if hasattr(kind, "forward") for parameter in _parameters(kind)}
    if not {"input_ids", "inputs_embeds"} <= takes or any(hasattr(config, f"{k}_config") for k in ("vision", "audio")):
        reasons.append(
            f"{name} does not start from `input_ids` or cannot start from `inputs_embeds`: its embeddings cannot be moved. Use a "
            "language model of text."
        )
    if getattr(config, "is_encoder_decoder", False):
        reasons.append(
            f"{name} is an encoder-decoder: which of its states should agree is not known. Use a decoder (AutoModelForCausalLM)."
        )
    if getattr(config.get_text_config(), "num_attention_heads", None) is None:
        reasons.append(
            f"{name} has no attention (a state-space model?): its hidden states are counted otherwise, from behind the first "
            "layer. Use a transformer."
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and layers < least:
        reasons.append(
            f"needs at least one inner pair of layers, got L = {layers}. Use a model of at least {least} layers."
        )
    prompts: Any = getattr(model, "active_peft_config", None)
    if getattr(prompts, "is_prompt_learning", False):
        reasons.append(
            f"{prompts.peft_type.value} puts virtual tokens between embeddings and layers, out of reach. Use LoRA, or no adapter."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        reasons.append("every parameter is frozen: nothing would change. Unfreeze some, or add a LoRA adapter.")
    return reasons


def _core(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _run_reasons(trainer: Any) -> list[str]:
    args, reasons = trainer.args, []
    if _is_reentrant(trainer):
        reasons.append(
            "reentrant gradient checkpointing has no gradient with respect to the embeddings: autograd.grad needs "
            'use_reentrant=False. Set gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    joins = [
        option
        for option in ("packing", "padding_free")
        if getattr(args, option, False) or getattr(trainer, option, False)
    ]
    if joins:
        reasons.append(
            f"{' and '.join(joins)}: rows are joined into one sequence, and each row counts by itself. Set "
            f"{' and '.join(f'{option}=False' for option in joins)}."
        )
    compiled = [m for m in trainer.model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    if args.torch_compile or hasattr(trainer.model, "_orig_mod") or compiled:
        reasons.append(
            "a compiled forward does not show its embeddings. Set torch_compile=False, and leave out model.compile()."
        )
    ddp = getattr(trainer.accelerator, "ddp_handler", None)
    if getattr(args, "ddp_static_graph", None) or getattr(ddp, "static_graph", False):
        reasons.append(
            "DDP with a static graph counts the inner gradient as a step: processes would train different models. Leave "
            "`ddp_static_graph` (accelerate: `static_graph`) out."
        )
    return reasons


def _is_reentrant(trainer: Any) -> bool:
    """Whether reentrant checkpointing is on: by the arguments, which come before what the model itself was told."""
    kinds = ("gradient", "activation")  # one option, by its older and its newer name
    if any(getattr(trainer.args, f"{kind}_checkpointing", None) for kind in kinds):
        options = [getattr(trainer.args, f"{kind}_checkpointing_kwargs", None) or {} for kind in kinds]
        return any(option.get("use_reentrant") for option in options)
    told = [
        getattr(m, "_gradient_checkpointing_func", None)
        for m in trainer.model.modules()
        if getattr(m, "gradient_checkpointing", False)
    ]
    return any((getattr(function, "keywords", None) or {}).get("use_reentrant") for function in told)
