"""The five ways to fine-tune a checkpoint, through peft's own configurations. The head is always trained.

| strategy | peft configuration | ours |
|---|---|---|
| `full` | none | every weight |
| `lora` | `LoraConfig` | r 8, alpha 16, dropout 0.1, on query and value |
| `prompt_tuning` | `PromptTuningConfig` | 5 virtual tokens, random start |
| `p_tuning` | `PromptEncoderConfig` | 5 virtual tokens from an MLP of width 128 |
| `prefix_tuning` | `PrefixTuningConfig` | 5 virtual tokens in every layer, no projection |

Values: arXiv 2402.12168's authors' code (virtual tokens and widths), peft and LoRA's defaults for the rest. Virtual tokens
take positions: a text may be `room(model)` tokens long. They stand before the text: an encoder pads on the right, a decoder
on the left (padded on the right, it reads its answer off a pad).

What peft does not know by itself is passed to it: LoRA's targets in DistilBERT, ALBERT, MPNet and ModernBERT, the sizes
that a configuration calls by names of its own (DistilBERT), and the width of the word embeddings where the layers are
wider (ELECTRA, ALBERT).
"""

import difflib
import inspect
from typing import Any

from torch import nn

STRATEGIES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "full": (None, {}),
    "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 128}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 5, "prefix_projection": False}),
}
"""Strategy -> peft's class by name (peft takes seconds to import) and the fields that differ from its defaults."""

# Query and value, as architectures that peft has no targets for call them; the last one projects query, key and value at once.
_QUERY_AND_VALUE = (("q_lin", "v_lin"), ("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("Wqkv",))
_TRAINED_HEADS = ("classifier", "score")  # peft's own list for task_type SEQ_CLS


def apply_strategy(model: Any, name: str, **overrides: Any) -> Any:
    """The model made ready for one strategy: wrapped by peft with only adapter and head trainable, or as it is for "full".

    Args:
        model: a sequence classifier without an adapter. Under every strategy but "full" its own weights stay as they are.
        overrides: fields of peft's configuration, over the table's.

    Raises:
        ValueError: unknown strategy or field, a model that is no sequence classifier or carries an adapter already, an
            architecture that the strategy cannot handle (prefix-tuning needs attention that takes cached keys and values).

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> model = apply_strategy(BertForSequenceClassification(config), "lora", r=2)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # query and value: 2 x (4 + 4) each; head: 10
    42
    """
    reasons = refusals(model, name)
    if reasons:
        raise ValueError("\n".join(reasons))
    kind, fields = STRATEGIES[name]
    if kind is None:
        if overrides:
            raise ValueError(
                f"`full` takes no fields, got {', '.join(overrides)}: it trains every weight. Leave them out."
            )
        return model
    import peft

    config_class = getattr(peft, kind)
    known = config_class.__dataclass_fields__
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "see peft's documentation."
            raise ValueError(f"`{name}` has no field `{key}` (peft's {kind}): {hint}")
    config = config_class(**{"task_type": "SEQ_CLS", **fields, **_sizes(model, name), **overrides})
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:  # for example a model whose attention layers peft has no names for
        raise ValueError(f"peft cannot put `{name}` on {type(model).__name__}: {error}") from error


def refusals(model: Any, name: str) -> list[str]:
    """Why a strategy cannot be applied to a model: one sentence each, or nothing."""
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        return [f"There is no strategy `{name}`: {hint}Known: {', '.join(STRATEGIES)}."]
    reasons = []
    if has_adapter(model):
        reasons.append(
            f"{type(model).__name__} carries an adapter already: a second one would be trained on top of it unseen. "
            "Call merge_and_unload() (LoRA) or unload(), or load the base model anew."
        )
    elif name == "full":
        return []
    elif not any(kind.__name__.endswith("ForSequenceClassification") for kind in type(model).__mro__):
        reasons.append(
            f"{name} is for sequence classifiers, got {type(model).__name__}: labels per row decide what its head is. Use a "
            "...ForSequenceClassification class, or put an adapter on the model with peft itself."
        )
    elif not any(part in child for child, _ in model.named_children() for part in _TRAINED_HEADS):
        heads = ", ".join(child for child, _ in model.named_children() if child != model.base_model_prefix)
        reasons.append(
            f"peft trains a head called {' or '.join(_TRAINED_HEADS)}, and {type(model).__name__} has {heads or 'none'}: it "
            "would keep its random start. Use full, or an architecture with such a head."
        )
    elif name == "prefix_tuning" and not _takes_cache(model):
        reasons.append(
            f"prefix_tuning puts keys and values before every layer, and {type(model).__name__} takes none "
            "(no past_key_values). Use lora, prompt_tuning or p_tuning."
        )
    return reasons


def remove_adapter(model: Any) -> Any:
    """Undo `apply_strategy` in place: the base as it was before, head included, all of it trainable. Returns it.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> base = BertForSequenceClassification(config)
    >>> remove_adapter(apply_strategy(base, "lora")) is base, has_adapter(base)
    (True, False)
    """
    if not hasattr(model, "get_base_model"):
        return model
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        original = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if original is not None:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, original)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(base):
            delattr(base, attribute)
    return base.requires_grad_(True)


def has_adapter(model: Any) -> bool:
    """Whether a model is wrapped by peft, or carries an adapter that was loaded into it (also a merged one)."""
    if hasattr(model, "peft_config"):
        return True
    return bool(getattr(model, "_hf_peft_config_loaded", False)) or any(
        type(module).__module__.startswith("peft.") for module in model.modules()
    )


def virtual_tokens(model: Any) -> int:
    """Positions that the active adapter takes before the text: 0 for LoRA and for a model without adapter."""
    config = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", None) or 0)


def room(model: Any) -> int | None:
    """How many tokens a text may have, special tokens included; None where the architecture has no limit.

    RoBERTa-like embeddings begin counting after the padding index, and so have fewer positions than they say.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> room(apply_strategy(BertForSequenceClassification(config), "p_tuning"))
    507
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = next(
        (m for n, m in base.named_modules() if n.endswith("position_embeddings") and hasattr(m, "padding_idx")), None
    )
    offset = 0 if positions is None or positions.padding_idx is None else positions.padding_idx + 1
    return int(limit) - offset - virtual_tokens(model)


def _takes_cache(model: Any) -> bool:
    """Whether a model's attention can be given keys and values that stand before the text."""
    return "past_key_values" in inspect.signature(type(model.base_model).forward).parameters


def _sizes(model: Any, name: str) -> dict[str, Any]:
    """Fields that peft would look up by one architecture's names, read off this model."""
    if name == "lora":
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

        linear = {n.rpartition(".")[2] for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear)}
        found = next((names for names in _QUERY_AND_VALUE if linear.issuperset(names)), None)
        return {} if found is None or model.config.model_type in known else {"target_modules": list(found)}
    # Prompts stand among the word embeddings, prefixes inside the layers: some architectures widen in between.
    width = model.config.hidden_size if name == "prefix_tuning" else model.get_input_embeddings().weight.shape[1]
    return {
        "token_dim": width,
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
    }
