"""One way to a filter by its name: what each one is built from, and how a saved one is read again.

| filter | looks at | the clean texts are for |
|---|---|---|
| `confidence` | the classifier's confidence | – |
| `psim` | the confidence of an adapter on the classifier | training the adapter on random labels |
| `strip` | the classifier's answers to mixed texts | what is mixed in |
| `rap` | the classifier's answers with a word in front | finding the word; labels are needed |
| `onion` | a language model's perplexity | – |

Calibration is the caller's, with clean texts that are not among these.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_backdoor_defense.adapters import has_adapter
from hf_backdoor_defense.filters import Filter
from hf_backdoor_defense.models import load_finished_classifier, resolve
from hf_backdoor_defense.registry import filter_class

FITTED = ("psim", "strip", "rap")
"""Filters that learn from clean texts before they are calibrated."""
READS_LANGUAGE = "onion"
"""The filter that asks a language model and no classifier."""
NEEDS_LABELS = "rap"
"""The filter whose clean texts need their classes."""

PSIM_UPDATES = 60
"""About one epoch of the 2,000 texts that PSIM's rate and stop rule were chosen with; fewer texts are seen more often."""


def build_filter(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    texts: Sequence[str] = (),
    labels: Sequence[int] | None = None,
    seed: int = 0,
    max_length: int = 128,
    batch_size: int = 64,
    **options: Any,
) -> Filter:
    """A filter, fitted where it learns, not yet calibrated.

    Args:
        model, tokenizer: the classifier to stand before; for ONION a causal language model. PSIM wraps the model.
        texts: clean texts to fit on, for `FITTED`. labels: their classes, for RAP.
        options: what else the filter's constructor takes (PSIM's `fit`).

    Raises:
        ValueError: unknown name (with the nearest one), no texts or labels where they are needed, and what the filter raises
            (`PsimNotUsable` where the module cannot be trusted).

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> build_filter("confidence", BertForSequenceClassification(config), None).tail
    'upper'
    """
    kind: Any = filter_class(name)
    if name in FITTED and not len(texts):
        raise ValueError(f"`{name}` is built from clean texts, got none. Give texts that it is not calibrated on.")
    common = {"max_length": max_length, "batch_size": batch_size, **options}
    if name == "psim":
        return _fit_psim(kind, model, tokenizer, list(texts), seed=seed, **common)
    if name == "strip":
        return kind(model, tokenizer, clean_texts=list(texts), seed=seed, **common)
    if name == "rap":
        if labels is None or len(labels) != len(texts):
            raise ValueError(
                f"`rap` needs the class of each clean text, got {'none' if labels is None else len(labels)} for {len(texts)} "
                "texts: its word is built for every class. Give labels 0..k-1."
            )
        del common["batch_size"]  # of RAP's construction as well: not ours to choose for the sake of memory
        return kind(model, tokenizer, clean_texts=list(texts), clean_labels=list(labels), seed=seed, **common)
    return kind(model, tokenizer, **common)


def _fit_psim(kind: Any, model: Any, tokenizer: Any, texts: list[str], **options: Any) -> Filter:
    from hf_backdoor_defense.input_filters.psim import training_arguments

    with tempfile.TemporaryDirectory() as scratch:
        usual = training_arguments(scratch, disable_tqdm=True)
        steps = math.ceil(len(texts) / usual.per_device_train_batch_size)
        epochs = max(usual.num_train_epochs, math.ceil(PSIM_UPDATES / steps))
        args = training_arguments(scratch, disable_tqdm=True, num_train_epochs=epochs)
        return kind.fit(model, tokenizer, texts, **{"args": args, **options})


def fit_rows_needed(name: str) -> int:
    """The fewest different clean texts that a filter can be fitted on; 0 where it learns nothing.

    >>> fit_rows_needed("confidence")
    0
    """
    if name == "psim":
        from hf_backdoor_defense.input_filters.psim import HELD_OUT_MIN

        return 4 * HELD_OUT_MIN
    return 1 if name in FITTED else 0


def load_filter(folder: str | Path, name: str, model: Any, tokenizer: Any, **options: Any) -> Filter:
    """The filter that `save` left in a folder, on the model that it was made for; `options` go to its `from_pretrained`.

    Raises:
        ValueError: no filter there or another one's, other weights than it was made for.

    >>> load_filter("nowhere", "strip", None, None)
    Traceback (most recent call last):
    ...
    ValueError: `nowhere` has no filter.json: no filter was saved there. Check the path.
    """
    kind: Any = filter_class(name)
    # PSIM brings its tokenizer along.
    through = (model,) if name == "psim" else (model, tokenizer)
    return kind.from_pretrained(folder, *through, **options)


def load_for_filter(name: str, place: str) -> tuple[Any, Any]:
    """The classifier (for ONION the causal language model) that a filter looks through, and its tokenizer.

    Raises:
        ValueError: no such checkpoint, an adapter instead of a whole model, regression, multi-label, token classification,
            generation where a classifier is needed, a tokenizer without padding.
    """
    if (Path(place) / "adapter_config.json").is_file():
        raise ValueError(
            f"`{place}` holds an adapter: a filter looks at the base as it was downloaded. Give the base's folder or Hub id, "
            "or merge the adapter (merge_and_unload) and save the whole model."
        )
    model, tokenizer = load_language_model(place) if name == READS_LANGUAGE else _load_classifier(place)
    if has_adapter(model):
        raise ValueError(
            f"`{place}` loads with an adapter on it: a filter looks at the base as it was downloaded. Merge or unload it."
        )
    return model, tokenizer


def load_language_model(place: str) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer (padded with its end token where it has no padding).

    Raises:
        ValueError: no such checkpoint, or one that is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        architectures = config.architectures or []
        # BERT has a class for this as well, whose weights the checkpoint lacks: they would be random.
        if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
            raise ValueError(
                f"it is no causal language model ({', '.join(architectures) or 'unknown'}); give a GPT-like one"
            )
        model = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the language model `{place}` cannot be loaded: {str(error).splitlines()[0]}.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _load_classifier(place: str) -> tuple[Any, Any]:
    from transformers import AutoConfig

    try:
        classes = AutoConfig.from_pretrained(resolve(place), trust_remote_code=False).num_labels
    except (OSError, ValueError):
        classes = 2  # the loader says what is wrong
    model, tokenizer = load_finished_classifier(place, num_labels=classes)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of `{place}` has no padding token: texts of unequal length cannot be batched. Set one "
            "(tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer with the model."
        )
    return model.eval(), tokenizer
