"""A masked-language-model head for an encoder that comes without one, and how well a model predicts masked tokens.

| step | trains | rate | epochs |
|---|---|---|---|
| bias | output bias = log((count + 1) / total) of the text's tokens | - | - |
| head | the head's transform and bias; trunk and embeddings frozen, without dropout | 1e-3 | 2 |
| joint | everything but the pooler | 1e-4 | 3 |

AdamW without decay, 20 updates of warm-up, linear to 0, batches of 32, texts of 64 tokens. Without this the pre-training loss of
a sentence encoder is noise: its head would be drawn at random. The result is a pretrained model like any other.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_backdoor_defense.data.plain_text import mask_once, tokenize_texts
from hf_backdoor_defense.models import tensors_sha256, weights_sha256
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.pretrained import (
    MISSING_KEYS,
    load_pretrained_whole,
    mark_head_trained,
    save_pretrained_whole,
)
from hf_backdoor_defense.trainers.heads import loss_kind
from hf_backdoor_defense.trainers.labeled import at_labels, trunk_of
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer
from hf_backdoor_defense.trainers.processes import require_one_process

RECORD_NAME = "warm_up.json"
HELD_OUT_SEED = 1
# In nats: how far below the unigram predictor a head must come before its loss says anything.
GATE = 1.0


@dataclass(frozen=True)
class MaskedLoss:
    """Mean cross-entropy (nats) and accuracy over `n` masked tokens of held-out texts; `unigram`: the loss of the tokens'
    frequencies in the training texts, None where those are unknown."""

    loss: float
    accuracy: float
    n: int
    unigram: float | None = None


def held_out_loss(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    frequencies: Tensor | None = None,
    seed: int = HELD_OUT_SEED,
    max_length: int = 64,
    batch_size: int = 64,
) -> MaskedLoss:
    """How well a language model predicts held-out text. Masked: masks drawn once from `seed`, the same for every model asked with
    it. Causal: every next token.

    Args:
        frequencies: [vocabulary] probabilities of tokens, for the unigram predictor.

    Raises:
        ValueError: see `tokenize_texts` and `mask_once`.
    """
    rows = tokenize_texts(list(texts), tokenizer, max_length=max_length)
    masked = loss_kind(model) == "ForMaskedLM"
    if masked:
        rows = mask_once(rows, tokenizer, seed=seed, max_length=max_length)
    device, was_training = next(model.parameters()).device, model.training
    total = correct = count = 0.0
    labels_seen: list[Tensor] = []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            part = [rows[i] for i in order[start : start + batch_size]]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in part], batch_first=True)
            lengths = torch.tensor([sum(r["attention_mask"]) if masked else len(r["input_ids"]) for r in part])
            keep = int(lengths.max())
            mask = (torch.arange(keep) < lengths[:, None]).long()
            ids = ids[:, :keep]
            if masked:
                labels = torch.tensor([r["labels"][:keep] for r in part])
            else:
                labels = torch.where(mask.bool(), ids, -100)
                labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            step = Step(
                model=model,
                inputs={"input_ids": ids.to(device), "attention_mask": mask.to(device)},
                labels=labels.to(device),
                row_ids=None,
                epoch=0.0,
                global_step=0,
                training=False,
            )
            with torch.no_grad():
                if masked and trunk_of(model) is not None:
                    with at_labels(step, model):
                        logits = model(**step.inputs)["logits"]
                else:
                    logits = model(**step.inputs)["logits"]
            valid = step.labels != -100
            scores, target = logits[valid].float(), step.labels[valid]
            total += nn.functional.cross_entropy(scores, target, reduction="sum").item()
            correct += (scores.argmax(-1) == target).sum().item()
            count += target.numel()
            labels_seen.append(target.cpu())
    finally:
        model.train(was_training)
    unigram = None
    if frequencies is not None:
        unigram = -frequencies.log()[torch.cat(labels_seen)].mean().item()
    return MaskedLoss(loss=total / count, accuracy=correct / count, n=int(count), unigram=unigram)


def token_frequencies(texts: Sequence[str], tokenizer: Any, vocabulary: int, *, max_length: int = 64) -> Tensor:
    """[vocabulary]: (count + 1) / total of the ordinary tokens of texts; the counts of special tokens are left out."""
    counts = torch.ones(vocabulary)
    rows = tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for row in rows for i in row])
    counts += torch.bincount(ids, minlength=vocabulary)
    return counts / counts.sum()


def warm_up_mlm_head(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    steps_head: int | None = None,
    steps_joint: int | None = None,
    seed: int = 0,
    held_out: Sequence[str] | None = None,
    max_length: int = 64,
    show_progress: bool = True,
) -> tuple[PreTrainedModel, dict[str, MaskedLoss]]:
    """Train a masked-language-model head that was drawn at random, then head and trunk together. In place.

    Args:
        texts: plain text; at least some thousand sentences for a head that predicts anything.
        steps_head, steps_joint: updates of 32 texts; None: 2 and 3 epochs.
        held_out: texts to measure on after each step; none of them may be among `texts`.

    Returns:
        the model, and by step ("fresh", "head", "joint") the held-out loss (empty without `held_out`).

    Raises:
        ValueError: no masked language model; a head that is trained already; no updates; texts too short; held-out texts among
            the others; several processes.
    """
    require_one_process("The warm-up of a head", "Warm up in one process, save, and start several with what it saved.")
    for name, steps in (("steps_head", steps_head), ("steps_joint", steps_joint)):
        if steps is not None and steps < 1:
            raise ValueError(
                f"`{name}` must be at least 1, got {steps}: a head is trained in two steps. Leave it out for the default."
            )
    if loss_kind(model) != "ForMaskedLM":
        raise ValueError(
            f"A head is warmed up for masked language models, got {type(model).__name__}. Load it with load_pretrained_whole."
        )
    if not getattr(model.config, MISSING_KEYS, None):
        raise ValueError(
            "This model's masked-LM head came with its checkpoint: warming it up would only train it on. Use it as it is "
            "(continued pre-training: `hfbd clean --method pretraining`)."
        )
    shared = set(texts) & set(held_out or ())
    if shared:
        raise ValueError(
            f"{len(shared)} held-out texts are training texts too, for example {min(shared)[:60]!r}: the loss would be too low. "
            "Take other texts."
        )
    rows = tokenize_texts(list(texts), tokenizer, max_length=max_length)
    frequencies = token_frequencies(texts, tokenizer, model.config.vocab_size, max_length=max_length)
    losses: dict[str, MaskedLoss] = {}

    def measure(name: str) -> None:
        if held_out:
            losses[name] = held_out_loss(model, tokenizer, held_out, frequencies=frequencies, max_length=max_length)

    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.bias.copy_(frequencies.log())
    measure("fresh")
    batches = math.ceil(len(rows) / 32)
    trunk: Any = trunk_of(model)
    tied = {id(p) for p in trunk.parameters()}
    trainable = {id(p) for p in model.parameters()} - {
        id(p) for p in (getattr(trunk, "pooler", None) or nn.Module()).parameters()
    }
    schedule = {
        "head": (2 * batches if steps_head is None else steps_head, 1e-3, trainable - tied),
        "joint": (3 * batches if steps_joint is None else steps_joint, 1e-4, trainable),
    }
    for number, (name, (steps, rate, trained)) in enumerate(schedule.items()):
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        with tempfile.TemporaryDirectory() as folder, _no_dropout(trunk, when=name == "head"):
            pretraining_trainer(
                model,
                tokenizer,
                rows,
                output_dir=folder,
                title=f"warm-up: {name}" if show_progress else None,
                seed=seed + number,
                max_steps=steps,
                learning_rate=rate,
                warmup_steps=min(20, steps // 4),
            ).train()
        measure(name)
    mark_head_trained(model)
    return model, losses


def gate_reasons(losses: dict[str, MaskedLoss]) -> list[str]:
    """Why a warmed-up head is not good enough for its loss to mean anything: sentences, none where it is."""
    fresh, head, joint = (losses[name] for name in ("fresh", "head", "joint"))
    reasons = []
    if not joint.loss < head.loss < fresh.loss:
        reasons.append(
            f"the held-out loss must fall with every step, got {fresh.loss:.2f}, {head.loss:.2f}, {joint.loss:.2f} nats"
        )
    if joint.unigram is not None and joint.loss > joint.unigram - GATE:
        reasons.append(
            f"the held-out loss must end {GATE:g} nat below the unigram predictor's {joint.unigram:.2f}, got {joint.loss:.2f}"
        )
    return reasons


def warmed_up(
    name: str,
    texts: Sequence[str],
    held_out: Sequence[str],
    *,
    cache: str | Path,
    seed: int = 0,
    num_layers: int | None = None,
    steps_head: int | None = None,
    steps_joint: int | None = None,
    max_length: int = 64,
    show_progress: bool = True,
) -> Path:
    """The folder of a checkpoint's warmed-up model: made where it is not in `cache`, under a hash of the weights, the texts and
    the settings. `warm_up.json` in it holds the losses. Several processes may ask for what is there; one process makes it.

    Raises:
        ValueError: as `warm_up_mlm_head`; and a head that predicts too little (`gate_reasons`), which is not kept.
    """
    model, tokenizer = load_pretrained_whole(name, seed=seed, num_layers=num_layers)
    settings = {"seed": seed, "num_layers": num_layers, "steps_head": steps_head, "steps_joint": steps_joint}
    if max_length != 64:  # what was made before there was a choice keeps its name
        settings["max_length"] = max_length
    digest = hashlib.sha256(json.dumps(settings).encode())
    head_free = {
        k: v for k, v in model.state_dict().items() if k not in set(getattr(model.config, MISSING_KEYS, None) or ())
    }
    digest.update(tensors_sha256(head_free).encode())
    for part in (texts, held_out):
        digest.update(hashlib.sha256("\0".join(part).encode()).digest())
    folder = Path(cache) / digest.hexdigest()[:16]
    if folder.is_dir():
        return folder
    model, losses = warm_up_mlm_head(
        model, tokenizer, texts, steps_head=steps_head, steps_joint=steps_joint, seed=seed, held_out=held_out,
        max_length=max_length, show_progress=show_progress,
    )  # fmt: skip
    reasons = gate_reasons(losses)
    if reasons:
        raise ValueError(
            f"The warmed-up head of `{name}` predicts too little: {'; '.join(reasons)}. Give more text, into another folder "
            "(or, in Python, more updates: steps_joint)."
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    save_pretrained_whole(model, tokenizer, partial)
    record = {
        "from": name,
        **settings,
        "sha256": weights_sha256(model),
        "losses": {k: asdict(v) for k, v in losses.items()},
    }
    (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, folder)
    return folder


@contextmanager
def _no_dropout(module: nn.Module, *, when: bool) -> Iterator[None]:
    """Trained only in name: a frozen trunk gives the head what it gives in evaluation."""
    layers = [m for m in module.modules() if isinstance(m, nn.Dropout)] if when else []
    shares = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share
