"""Which weight matrices a method presses down, by architecture: up-projections of feed-forward blocks, and what papers add.
Where a classifier's head is, and what feeds it.

| architecture | matrices | source |
|---|---|---|
| BERT | up-projections | RECIPE, appendix |
| RoBERTa | and queries | likewise |
| ViT; CLIP's vision tower | both projections of each block; queries, keys, values | likewise |
| the others | up-projections (gates too, where there are gates) | ours, by analogy |
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Architecture -> regular expressions for names of weights.
_BERT_UP = r"\.layer\.\d+\.intermediate\.dense\.weight$"
_VISION = (
    r"layers?\.\d+\.(mlp\.)?fc[12]\.weight$",
    r"layers?\.\d+\.(self_)?attn\.[qkv]_proj\.weight$",
    r"layers?\.\d+\.attention\.[qkv]_proj\.weight$",
    r"layer\.\d+\.intermediate\.dense\.weight$",
    r"layer\.\d+\.output\.dense\.weight$",
    r"layer\.\d+\.attention\.attention\.(query|key|value)\.weight$",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "bert": (_BERT_UP,),
    "roberta": (_BERT_UP, r"\.attention\.self\.query\.weight$"),
    "xlm-roberta": (_BERT_UP, r"\.attention\.self\.query\.weight$"),
    "vit": _VISION,
    "clip": tuple(rf"vision_model.*{pattern}" for pattern in _VISION),
    "electra": (_BERT_UP,),
    "deberta": (_BERT_UP,),
    "deberta-v2": (_BERT_UP,),
    "distilbert": (r"\.ffn\.lin1\.weight$",),
    "gpt2": (r"\.mlp\.c_fc\.weight$",),
    "llama": (r"\.mlp\.(gate|up)_proj\.weight$",),
    "mistral": (r"\.mlp\.(gate|up)_proj\.weight$",),
    "qwen2": (r"\.mlp\.(gate|up)_proj\.weight$",),
    "t5": (r"\.DenseReluDense\.wi(_\d)?\.weight$",),
    "bart": (r"\.fc1\.weight$",),
    "opt": (r"\.fc1\.weight$",),
}
PUBLISHED = ("bert", "roberta", "vit", "clip")


def target_weights(model: nn.Module, targets: str | Sequence[str] = "auto") -> dict[str, Tensor]:
    """The matrices to press down, by name, in the model's order. Empty where nothing matches.

    Args:
        targets: "auto" for the architecture's preset; an architecture's name for that one; or regular expressions, searched in
            names of parameters.

    Raises:
        ValueError: no preset for the architecture; no such preset; something that is no regular expression.

    >>> from transformers import BertConfig, BertForMaskedLM
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    >>> [name for name in target_weights(BertForMaskedLM(config))]  # doctest: +NORMALIZE_WHITESPACE
    ['bert.encoder.layer.0.intermediate.dense.weight', 'bert.encoder.layer.1.intermediate.dense.weight']
    """
    patterns = _patterns(model, targets)
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and any(re.search(pattern, name) for pattern in patterns)
    }


def _patterns(model: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(targets, str):
        for pattern in targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"`targets` holds {pattern!r}, which is no regular expression: {error}. Repair it."
                ) from error
        return tuple(targets)
    kind = getattr(getattr(model, "config", None), "model_type", None) if targets == "auto" else targets
    if kind not in TARGETS:
        raise ValueError(
            f"There is no preset of `targets` for {kind or 'a model without a model_type'} (known: {', '.join(TARGETS)}). "
            "Give `targets` as a list of regular expressions over the names of its parameters, for the up-projections of its "
            'feed-forward blocks; on the command line --defense.targets \'["pattern", "pattern"]\'.'
        )
    return TARGETS[str(kind)]


def no_match(model: nn.Module, targets: str | Sequence[str]) -> str:
    """What to say where no weight matches: the first names that could have been meant.

    >>> no_match(nn.Linear(1, 1), ["fc"])
    "no parameter matches `targets`=['fc'] (first feed-forward names here: none). Give patterns that match."
    """
    names = [
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and re.search(r"(mlp|ffn|fc\d|intermediate|dense)", name)
    ]
    shown = ", ".join(names[:3]) or "none"
    return f"no parameter matches `targets`={targets!r} (first feed-forward names here: {shown}). Give patterns that match."


def input_embeddings(model: nn.Module) -> Tensor | None:
    """The weight of the word embeddings, or None for a model that has none (images).

    >>> input_embeddings(nn.Linear(1, 1)) is None
    True
    """
    try:
        return getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # transformers raises either for a model without words
        return None


HEADS = ("classifier", "score", "classification_head")
LINEAR = (nn.Linear, nn.Conv2d, Conv1D)
"""Modules with one weight matrix. GPT-2's Conv1D holds it as [in, out]."""


def classification_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a classifier's head, or None. Of a head that peft trains, the copy that is trained.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> classification_head(BertForSequenceClassification(config))[0]
    'classifier'
    """
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    prefix = "" if core is model else next(name for name, module in model.named_modules() if module is core) + "."
    for name in HEADS:
        head: Any = getattr(core, name, None)
        copies = getattr(head, "modules_to_save", None)
        if copies is not None:
            adapter = head.active_adapters[0] if hasattr(head, "active_adapters") else next(iter(copies))
            return f"{prefix}{name}.modules_to_save.{adapter}", copies[adapter]
        if isinstance(head, nn.Module):
            return f"{prefix}{name}", head
    return None


def output_layer(model: nn.Module, head: str | None = None) -> tuple[str, nn.Linear] | None:
    """Name and module of the Linear that gives the class scores: the last one of the head, or the one named; None without one.

    >>> from transformers import RobertaConfig, RobertaForSequenceClassification
    >>> config = RobertaConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> output_layer(RobertaForSequenceClassification(config))[0]
    'classifier.out_proj'
    """
    found: Any = classification_head(model) if head is None else (head, dict(model.named_modules()).get(head))
    if found is None or found[1] is None:
        return None
    named = [(name, module) for name, module in found[1].named_modules() if isinstance(module, nn.Linear)]
    if not named:
        return None
    name, module = named[-1]
    return (f"{found[0]}.{name}" if name else found[0]), module


def feeding_layer(model: nn.Module, head: str | None = None) -> tuple[str, nn.Linear] | None:
    """The last Linear before the class scores, whose units the head reads: within the head (RoBERTa), a pooler (BERT), a
    `pre_classifier` (DistilBERT), else the up-projection of the last feed-forward block (ViT). None where there is none.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> feeding_layer(BertForSequenceClassification(config))[0]
    'bert.pooler.dense'
    """
    output = output_layer(model, head)
    if output is None:
        return None
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = classification_head(model)
    within = [pair for pair in layers if found and pair[0].startswith(f"{found[0]}.") and pair[1] is not output[1]]
    if within:
        return within[-1]
    for end in ("pooler.dense", ".pooler", "pre_classifier"):
        if near := [pair for pair in layers if pair[0].endswith(end)]:
            return near[-1]
    width = getattr(getattr(model, "config", None), "intermediate_size", None)
    wide = [pair for pair in layers if pair[1].out_features == width and pair[1].in_features != width]
    return wide[-1] if wide else None
