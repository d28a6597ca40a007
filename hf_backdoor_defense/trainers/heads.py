"""What the mixin must know about a model's head: which labels it takes, and which hosts cannot be hosted."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.training_args import ParallelMode

from hf_backdoor_defense.functional.cross_entropy import IGNORE_INDEX, shift_labels
from hf_backdoor_defense.objectives import Step, overrides

# transformers names the loss a head was made for; these score every label position by one row of logits.
CLASSIFIERS = frozenset({"ForSequenceClassification", "ForImageClassification", "ForTokenClassification"})
LANGUAGE = frozenset({"ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"})  # the last: encoder-decoders only
HOSTED = CLASSIFIERS | LANGUAGE


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper or behind torch.compile, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def loss_kind(model: nn.Module) -> str | None:
    """For which kind of labels the head was made, in the words of transformers ("ForCausalLM", …).

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> loss_kind(BertForSequenceClassification(config))
    'ForSequenceClassification'
    """
    kind = getattr(model, "loss_type", None)
    # A model that FSDP2 cut up has another class on top of its own.
    names = {cls.__name__ for cls in type(model).__mro__}
    if kind is None and names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return "ForCausalLM"  # GPT2LMHeadModel and other names without "ForCausalLM"
    if kind is None and names & set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()):
        return "ForConditionalGeneration"  # MarianMTModel, EncoderDecoderModel
    return kind


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the decoder has inputs of its own, derived from the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Whether position t is scored against the label at t + 1."""
    return loss_kind(model) == "ForCausalLM" and not is_encoder_decoder(model)


def scores_vocabulary(model: nn.Module) -> bool:
    """Whether a row of scores is as long as the vocabulary: then a loss may be worth fusing with the output projection."""
    return loss_kind(model) in LANGUAGE


def take_labels(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The labels aligned with the scores, and the inputs as the forward is to see them.

    Labels are withheld: in the forward they would only cost a loss of the model's own. An encoder-decoder gets what it
    would have made of them, its decoder's inputs (BART without either trains, silently, on its own input). One that cannot
    derive them apart keeps the labels.

    Returns:
        labels [...], shifted for causal models; the inputs.

    Raises:
        ValueError: there are no labels.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    >>> take_labels(model, {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])})
    (tensor([[   6,    7, -100]]), {'input_ids': tensor([[5, 6, 7]])})
    """
    inputs = dict(inputs)
    decodes = is_encoder_decoder(model)
    has_decoder_inputs = decodes and any(inputs.get(name) is not None for name in _DECODER_INPUTS)
    labels = inputs.pop("labels", None)
    if labels is None and has_decoder_inputs:
        raise ValueError(
            f"The batch has decoder inputs but no `labels` (it has: {', '.join(inputs)}): they say what the decoder reads, "
            "not what it should predict. Let the collator keep `labels`, for example DataCollatorForSeq2Seq."
        )
    if labels is None and decodes:
        raise ValueError(
            f"The batch has neither `labels` nor decoder inputs (it has: {', '.join(inputs)}): an encoder-decoder would be "
            "trained on a copy of its own input. Tokenize the targets with tokenizer(text_target=...), or fix the collator."
        )
    if labels is None:
        raise ValueError(
            f"The batch has no `labels` (it has: {', '.join(inputs)}): there is nothing to compute a loss from. "
            "Name the column `label` or `labels`, or fix the collator."
        )
    if decodes and not has_decoder_inputs:
        derive: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if derive is None:
            inputs["labels"] = labels
        else:
            inputs["decoder_input_ids"] = derive(labels=labels)
    return (shift_labels(labels) if is_causal(model) else labels), inputs


_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def align(step: Step, outputs: Any) -> None:
    """Give the step its outputs and logits. Raises ValueError where the model returned none."""
    step.outputs = outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor):
        names = ", ".join(outputs) if isinstance(outputs, Mapping) else type(logits).__name__
        raise ValueError(
            f"{type(base_model(step.model)).__name__} returned no `logits` (it returned: {names}): there is nothing to "
            "compute a loss from. Load the class with the head (AutoModelFor...), and undo what replaced its forward."
        )
    step.logits = logits
    pad_labels(step, logits)


def pad_labels(step: Step, scores: Tensor) -> None:
    """Virtual tokens of a prompt (peft) have scores but no labels: these are made as long as those, from the left.

    `scores`: logits or hidden states, [batch, time, ...].
    """
    missing = scores.shape[1] - step.labels.shape[1] if step.labels.ndim == 2 and scores.ndim == 3 else 0
    if missing > 0:
        step.labels = nn.functional.pad(step.labels, (missing, 0), value=IGNORE_INDEX)


def refusals(trainer: Any) -> list[str]:
    """Why the trainer cannot be hosted, whatever the objectives (sentences; empty when it can)."""
    return [*_head_reasons(trainer), *_parallel_reasons(trainer), *_objective_reasons(trainer)]


def _head_reasons(trainer: Any) -> list[str]:
    reasons = []
    model = base_model(trainer.model)
    kind = loss_kind(model)
    config = getattr(model, "config", None)
    if kind not in HOSTED or (kind == "ForConditionalGeneration" and not is_encoder_decoder(model)):
        reasons.append(
            f"{type(model).__name__} has a head for {kind or 'an unknown task'}: hosted are "
            f"{', '.join(sorted(HOSTED))} (ForConditionalGeneration of encoder-decoders only). Use one of these heads."
        )
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification") or (
        kind in CLASSIFIERS and getattr(config, "num_labels", 2) < 2
    ):
        reasons.append(
            f"problem_type is {problem!r} with num_labels={getattr(config, 'num_labels', None)}: the losses need one "
            "class per row. Use a head with num_labels >= 2 and problem_type 'single_label_classification'."
        )
    forward = getattr(model.forward, "__func__", model.forward)
    is_liger = str(getattr(forward, "__module__", "")).startswith("liger_kernel")
    if getattr(trainer.args, "use_liger_kernel", False) or is_liger:
        reasons.append(
            "the model's forward is Liger's (use_liger_kernel, or apply_liger_kernel_to_...), which joins the head with a "
            "loss of its own. Set use_liger_kernel=False and load the model without it: the fused loss here spares the same "
            "logits."
        )
    return reasons


def _parallel_reasons(trainer: Any) -> list[str]:
    reasons = []
    args, state = trainer.args, getattr(trainer.accelerator, "state", None)
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        reasons.append(
            f"{args.n_gpu} GPUs in one process (nn.DataParallel): its replicas lose what an objective records. "
            "Set CUDA_VISIBLE_DEVICES to one GPU, or start a script of your own with `accelerate launch`."
        )
    config = getattr(args, "parallelism_config", None) or getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {f"{kind}_size": getattr(config, f"{kind}_size", None) or 1 for kind in ("cp", "sp", "tp")}
    sizes["tp_size"] = max(sizes["tp_size"], getattr(trainer.model, "_tp_size", None) or 1)
    split = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    if split:
        reasons.append(
            f"{split}: context, sequence and tensor parallelism give each process a part of the sequence or of the "
            "vocabulary, and a loss here needs whole rows. Use data parallelism (DDP, FSDP2) and set these sizes to 1."
        )
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if getattr(deepspeed, "zero_stage", 0) == 3:
        reasons.append(
            "DeepSpeed ZeRO-3 cuts the weights into pieces that an objective cannot read. Use ZeRO-1 or ZeRO-2, or FSDP2."
        )
    fsdp = getattr(state, "fsdp_plugin", None)
    if getattr(trainer, "is_fsdp_enabled", False) and getattr(fsdp, "fsdp_version", 2) == 1:
        reasons.append(
            "FSDP1 flattens the weights into vectors that an objective cannot read. Set fsdp_config={'version': 2}."
        )
    kept_as = str(getattr(fsdp, "state_dict_type", None) or "FULL_STATE_DICT")
    if getattr(trainer, "is_fsdp_enabled", False) and "FULL_STATE_DICT" not in kept_as and args.save_strategy != "no":
        reasons.append(
            f"FSDP would save {kept_as.rpartition('.')[2]}: checkpoints without safetensors weights, which nothing here reads or "
            "resumes. Set fsdp_state_dict_type: FULL_STATE_DICT (accelerate's file), or save_strategy='no'."
        )
    return reasons


def _objective_reasons(trainer: Any) -> list[str]:
    reasons = []
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
