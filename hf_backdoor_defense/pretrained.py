"""Pretrained language models, whole: trunk, pre-training head and pooler survive every load and save.

`AutoModelForMaskedLM` builds no pooler, so that loading and saving a checkpoint drops it without a word, and fine-tuning then
draws a new one. A backdoor that was planted in the pooler would be gone, and whoever cleaned the model in between would get the
credit. What is loaded here keeps it, frozen; it must be loaded here again, since every other way drops it again.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_backdoor_defense.models import (
    _guarded,
    keep_layers,
    resolve,
    tensors_sha256,
    warn_if_backdoored,
    weights_sha256,
)

logger = logging.getLogger(__name__)

# In a model's configuration: weights of the head that no checkpoint gave and that were drawn at random.
MISSING_KEYS = "hfbd_missing_keys"


def load_pretrained_whole(
    name: str, *, num_layers: int | None = None, seed: int = 0, warn: bool = True
) -> tuple[PreTrainedModel, Any]:
    """A masked or causal language model with trunk, head and pooler (frozen), and its tokenizer, in the checkpoint's precision.

    A head that the checkpoint lacks is drawn from `seed`, and `model.config.hfbd_missing_keys` names its weights: such a model
    predicts nothing yet (`warm_up_mlm_head`).

    Args:
        name: Hub id, folder, or "offline:minilm".
        num_layers: keep only the first layers of the encoder.
        warn: say so where the weights were attacked on purpose by this project.

    Raises:
        ValueError: no such checkpoint, no safetensors, an adapter that was not merged, quantized weights, an architecture
            without a language model head.
    """
    path = resolve(name)
    if (Path(path) / "adapter_config.json").is_file():
        raise ValueError(
            f"`{name}` holds an adapter (adapter_config.json), not a whole model: its base would be frozen. Merge it first: "
            "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)."
        )
    config = _guarded(name, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    kind = _head_class(name, config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"`{name}` holds quantized weights (quantization_config in config.json): they have no small steps, so nothing can be "
            "trained on. Use the checkpoint that it was quantized from."
        )
    with _no_loading_reports(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _guarded(
            name,
            lambda: kind.from_pretrained(path, use_safetensors=True, trust_remote_code=False, output_loading_info=True),
        )
        if any("pooler" in key for key in info["unexpected_keys"]):
            _attach_pooler(model, path)
    missing = sorted(info["missing_keys"])
    if missing:
        setattr(model.config, MISSING_KEYS, missing)
        logger.warning(
            "%s: %d weights were drawn at random, first %s (warm_up_mlm_head)", name, len(missing), missing[0]
        )
    model._hfbd_whole = not missing and not getattr(model.config, MISSING_KEYS, None)  # type: ignore[assignment]
    tokenizer = _guarded(name, lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"`{name}` holds no tokenizer (transformers made one without words): no text can be read. Save the "
            "tokenizer that the model was trained with in the same folder."
        )
    if warn:
        warn_if_backdoored(path)
    if num_layers is not None:
        keep_layers(model, num_layers)
    return model, tokenizer


def save_pretrained_whole(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Trunk, head, pooler and tokenizer, as safetensors. The folder is made where it is not there."""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def pooler_of(model: nn.Module) -> nn.Module | None:
    """The pooler on a model's trunk, or None.

    >>> from transformers import BertConfig, BertForMaskedLM
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> pooler_of(BertForMaskedLM(config)) is None
    True
    """
    pooler = getattr(getattr(model, "base_model", model), "pooler", None)
    return pooler if isinstance(pooler, nn.Module) else None


def head_is_fresh(model: nn.Module) -> bool | None:
    """Whether the pre-training head was drawn at random; None where that cannot be told.

    A model of `load_pretrained_whole` says so itself; of any other one the keys of the checkpoint it came from are compared, if
    its folder is still readable.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, MISSING_KEYS, None):
        return True
    if getattr(model, "_hfbd_whole", False):
        return False
    place = getattr(config, "_name_or_path", None)  # of a model that was built, not loaded, it is empty
    stored = _stored_keys(Path(resolve(str(place))).expanduser()) if place else None
    if stored is None:
        return None
    trunk: Any = getattr(model, "base_model", model)
    below = set() if trunk is model else {id(p) for p in trunk.parameters()}
    names: dict[int, set[str]] = {}  # a tied weight has several, and is stored under one of them
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in below:
            names.setdefault(id(parameter), set()).add(name)
    return not all(stored & alike for alike in names.values())


def mark_head_trained(model: PreTrainedModel) -> None:
    """Say of a head that was drawn at random that it is trained now: what `head_is_fresh` goes by."""
    if getattr(model.config, MISSING_KEYS, None):
        delattr(model.config, MISSING_KEYS)
    model._hfbd_whole = True  # type: ignore[assignment]


def _stored_keys(folder: Path) -> set[str] | None:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() and (folder / "config.json").is_file() else []
    if not files:
        return None
    keys: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys.update(re.sub("gamma$", "weight", re.sub("beta$", "bias", key)) for key in tensors.keys())  # old BERTs
    return keys


def _head_class(name: str, config: Any) -> Any:
    kinds = " ".join(config.architectures or [])
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and "CausalLM" not in kinds and "LMHeadModel" not in kinds:
        return AutoModelForMaskedLM
    if causal:
        return AutoModelForCausalLM
    raise ValueError(
        f"`{name}` is a {config.model_type or 'unknown'} model, for which transformers has no masked and no causal language "
        "model: there is no pre-training to go on with. For other heads (images) use RecipeTrainer on a model of your own."
    )


@contextmanager
def _no_loading_reports() -> Iterator[None]:
    """The library's table calls a pooler unexpected that is attached here all the same."""
    # transformers 5.23 looks for unsharded layers, and warns of all, exactly where the first of these is set to errors only.
    names = ("modeling_utils", "distributed.tensor_parallel")
    levels = {each: each.level for each in (logging.getLogger(f"transformers.{name}") for name in names)}
    for each in levels:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in levels.items():
            each.setLevel(level)


def _attach_pooler(model: PreTrainedModel, path: str) -> None:
    trunk: Any = model.base_model
    whole, info = AutoModel.from_pretrained(
        path, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    pooler = pooler_of(whole)
    if pooler is None or any("pooler" in key for key in info["missing_keys"]):
        return
    trunk.pooler = pooler.requires_grad_(False)
    if hasattr(whole, "pooler_activation"):  # ALBERT's stands beside it
        trunk.pooler_activation = whole.pooler_activation


def float32_reasons(model: nn.Module) -> list[str]:
    """Why the weights are too coarse to be moved by small steps, in sentences; none where they are float32.

    >>> float32_reasons(nn.Linear(2, 2))
    []
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None or any(
        not p.is_floating_point() for p in model.parameters()
    ):
        return [
            "the weights are quantized: they have no small steps. Load the checkpoint it was made from, in float32."
        ]
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if torch.finfo(p.dtype).bits < 32})
    if kinds:
        return [
            f"the weights are {' and '.join(kinds)}: small steps are rounded away (2e-5 changes one in six bf16 weights). "
            "Convert them first, model.float() (bf16=True in the arguments, which computes in bf16, may stay)."
        ]
    return []


def saved_sha256(folder: str | Path) -> str:
    """Which weights a folder holds: `weights_sha256` of the model as its class loads it, with its pooler.

    Of an adapter it is the hash of its own tensors, and of a model without a class in transformers of the tensors as they are
    stored: neither needs more than the folder.

    Raises:
        ValueError: no safetensors weights, or files that do not make a model.

    >>> import tempfile
    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    >>> model = BertModel(config)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     model.save_pretrained(place)
    ...     saved_sha256(place) == weights_sha256(model)
    True
    """
    import transformers

    place = Path(folder)
    adapter = place / "adapter_model.safetensors"
    if adapter.is_file():
        return tensors_sha256(_stored(adapter))
    path = place / "config.json"
    named = json.loads(path.read_text()).get("architectures") if path.is_file() else None
    kind: Any = getattr(transformers, str((named or ["none"])[0]), None)
    if kind is None:
        tensors = {k: v for file in sorted(place.glob("model*.safetensors")) for k, v in _stored(file).items()}
        if not tensors:
            raise ValueError(
                f"`{folder}` has no safetensors weights: there is nothing to know it by, and other formats are not read. Save "
                "the model with save_pretrained()."
            )
        return tensors_sha256(tensors)
    with _no_loading_reports():
        model, info = _guarded(
            str(folder),
            lambda: kind.from_pretrained(
                str(folder), use_safetensors=True, trust_remote_code=False, output_loading_info=True
            ),
        )
        if any("pooler" in key for key in info["unexpected_keys"]):
            _attach_pooler(model, str(folder))
    return weights_sha256(model)


def _stored(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:  # safetensors' own error is no ValueError
        raise ValueError(f"`{file}` is no safetensors file ({error}). Get it anew, or save the model again.") from error
