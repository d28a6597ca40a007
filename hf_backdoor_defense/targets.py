"""Which weight matrices a method presses down, by architecture: up-projections of feed-forward blocks, and what papers add.

| architecture | matrices | source |
|---|---|---|
| BERT | up-projections | RECIPE, appendix |
| RoBERTa | and queries | likewise |
| ViT; CLIP's vision tower | both projections of each block; queries, keys, values | likewise |
| the others | up-projections (gates too, where there are gates) | ours, by analogy |
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn

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
