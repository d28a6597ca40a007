"""What the mixin must know about a model's head: which labels it takes, and how to see behind it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.training_args import ParallelMode

from hf_backdoor_defense.objectives import Projection, Step, overrides

# transformers names the loss a head was made for; these score every label position by one row of logits.
HOSTED = frozenset({"ForSequenceClassification", "ForImageClassification", "ForCausalLM"})


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def loss_kind(model: nn.Module) -> str | None:
    """For which kind of labels the head was made, in the words of transformers ("ForCausalLM", …).

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> loss_kind(BertForSequenceClassification(config))
    'ForSequenceClassification'
    """
    kind = getattr(model, "loss_type", None)
    if kind is None and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "ForCausalLM"  # GPT2LMHeadModel and other names without "ForCausalLM"
    return kind


def is_causal(model: nn.Module) -> bool:
    """Whether position t is scored against the label at t + 1."""
    return loss_kind(model) == "ForCausalLM" and not getattr(model.config, "is_encoder_decoder", False)


def keeps_labels(model: nn.Module) -> bool:
    """Encoder-decoders derive the decoder's inputs from the labels; everywhere else they would only cost a loss."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refusals(trainer: Any) -> list[str]:
    """Why the trainer cannot be hosted, whatever the objectives (sentences; empty when it can)."""
    reasons = []
    model = base_model(trainer.model)
    kind = loss_kind(model)
    config = getattr(model, "config", None)
    if trainer.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and trainer.args.n_gpu > 1:
        reasons.append(
            f"{trainer.args.n_gpu} GPUs in one process (nn.DataParallel): its replicas lose what an objective records. "
            "Set CUDA_VISIBLE_DEVICES to one GPU, or start a script of your own with `accelerate launch`."
        )
    if kind not in HOSTED:
        reasons.append(
            f"{type(model).__name__} has a head for {kind or 'an unknown task'}: hosted are "
            f"{', '.join(sorted(HOSTED))}. Use one of these heads."
        )
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification") or (
        kind in ("ForSequenceClassification", "ForImageClassification") and getattr(config, "num_labels", 2) < 2
    ):
        reasons.append(
            f"problem_type is {problem!r} with num_labels={getattr(config, 'num_labels', None)}: the losses need one "
            "class per row. Use a head with num_labels >= 2 and problem_type 'single_label_classification'."
        )
    preparing = [o.name for o in trainer.objectives if overrides(o, "prepare")]
    if trainer.model_init is not None and preparing:
        reasons.append(
            f"`model_init` builds the model anew after {', '.join(preparing)} prepared it. Pass the model itself."
        )
    nameless = [o.name for o in trainer.objectives if o.needs_row_ids]
    columns = getattr(trainer.train_dataset, "column_names", None)
    if nameless and (columns is None or "row_id" not in columns):
        reasons.append(
            f"{', '.join(nameless)} tells rows apart by a `row_id` column, and the training set has none. Use data.load, "
            "or a datasets.Dataset, which gets one by itself."
        )
    return reasons


def output_head(model: nn.Module) -> nn.Module | None:
    """The output projection of a language model; None for classifiers and for models of another make."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def forward_with_hidden(step: Step, model: nn.Module, loss: Callable[[Step], Tensor]) -> tuple[Tensor, Any]:
    """One forward of the wrapped model in which the loss takes the place of the output projection.

    For its duration the head's `forward` computes `loss(step)` with `step.hidden` and `step.project` and returns a
    placeholder of shape [..., 1], so that the full logits never exist and DDP and FSDP2 see an ordinary forward.

    Returns:
        the values [n_valid], and the model's outputs (with placeholder logits).
    """
    head = output_head(model)
    if head is None:
        step.outputs = step.model(**step.inputs)
        step.logits = step.outputs["logits"]
        return loss(step), step.outputs
    kept: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        step.hidden, step.project = hidden, projection(model, head)
        kept.append(loss(step))
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    head.forward = forward
    try:
        outputs = step.model(**step.inputs)
    finally:
        del head.forward  # the instance attribute; the class's own forward is back
    step.outputs = outputs
    return kept[0], outputs


def projection(model: PreTrainedModel, head: nn.Module) -> Projection:
    """The head's weights and what the model does to its scores afterwards (soft-cap, scale), from its configuration."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return Projection(
        weight=head.weight,
        bias=getattr(head, "bias", None),
        scale=scale / divisor,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def hidden_matches_logits(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether projecting the hidden states gives the model's own logits: False where a head does something unknown."""
    core = base_model(model)
    seen: list[Tensor] = []

    def project(step: Step) -> Tensor:
        assert step.hidden is not None and step.project is not None
        seen.append(step.project(step.hidden))
        return seen[0].sum()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            full = model(**inputs)["logits"]
            step = Step(
                model=model,
                inputs=inputs,
                labels=inputs["input_ids"],
                row_ids=None,
                epoch=0,
                global_step=0,
                training=False,
            )
            forward_with_hidden(step, core, project)
    finally:
        model.train(was_training)
    return (
        bool(seen)
        and seen[0].shape == full.shape
        and torch.allclose(seen[0].float(), full.float(), atol=1e-4, rtol=1e-3)
    )
