"""The plan of `hfbd clean`: text read and dealt out, model and method checked. Nothing is trained or written before it stands.

    rate = 2·dose·std(W) / steps        dose = Σ lr / std(W) = rate·(steps + 1) / (2·std(W))        linear decay to 0

| texts | from | who sees them |
|---|---|---|
| training | all but a share, by a hash of the text | warm-up and cleaning |
| held out | that share; equal texts lie on one side | the loss before and after, nothing else |
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_backdoor_defense.adapters import room
from hf_backdoor_defense.data.plain_text import load_texts, mask_once, tokenize_texts
from hf_backdoor_defense.defenses.recipe import LITTLE, RECIPE
from hf_backdoor_defense.experiment.clean import CleanArguments
from hf_backdoor_defense.experiment.plan import check_folder
from hf_backdoor_defense.functional.weights import predicted_norm_ratio
from hf_backdoor_defense.models import attack_on, weights_sha256
from hf_backdoor_defense.models import resolve as resolve_name
from hf_backdoor_defense.pretrained import (
    float32_reasons,
    head_is_fresh,
    load_pretrained_whole,
    mark_head_trained,
    pooler_of,
)
from hf_backdoor_defense.targets import target_weights
from hf_backdoor_defense.trainers.heads import loss_kind
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator, pretraining_trainer

# Where a run is put, how it is shown, and what counts by its content.
_NOT_IDENTITY = {"output_dir", "disable_tqdm", "dry_run", "model_name", "text", "text_column", "limit", "warm_up"}
FEWEST_TEXTS = 32
FEW_TEXTS = 1000  # the fewest that the paper cleaned with
FEW_UPDATES = 100  # below, the rate that reaches a dose moves a weight by several percent of std(W) at once


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a training before it starts. `matrices`: how many by name, layers left open; `trainable`: of `parameters`,
    those that change."""

    architecture: str
    parameters: int
    trainable: int
    has_pooler: bool
    matrices: dict[str, int]
    first: list[str]
    steps: int
    learning_rate: float
    dose: float
    norm_ratio: float


@dataclass(frozen=True, kw_only=True)
class CleanPlan:
    """A cleaning whose inputs were checked. `attacked`: what the input's backdoored.json says, or None. `fresh`: its head is
    not trained yet."""

    run: CleanArguments
    method: RECIPE
    texts: list[str]
    held_out: list[str]
    facts: Facts
    fresh: bool
    attacked: dict[str, Any] | None
    hashes: dict[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: everything that changes a number. Text and weights count by their content."""
        run = {k: v for k, v in asdict(self.run).items() if k not in _NOT_IDENTITY}
        return json.loads(json.dumps({"clean": run, "method": self.method.to_dict(), "sha256": self.hashes}))

    def text(self) -> str:
        """The plan for people."""
        run, facts, method = self.run, self.facts, self.method
        fields = ", ".join(f"{k}={v}" for k, v in method.to_dict().items() if k != "name")
        suggested = "" if run.learning_rate else f", for a dose of {method.dose:g} over many updates"
        few = f"; few: the paper took {FEW_TEXTS:,} to 20,000" if len(self.texts) < FEW_TEXTS else ""
        masks = "masks drawn once, padded" if run.static_masks else "masks drawn anew"
        hurried = (
            "; few updates at a high rate: more text or --epochs"
            if facts.steps < FEW_UPDATES and facts.dose > LITTLE
            else ""
        )
        penalty = (
            f"the norms alone would go to {facts.norm_ratio:.2f} of what they are"
            if method.coef
            else "no penalty: plain continued pre-training, the control"
        )
        lines = [
            ("model", f"{run.model_name}: {facts.architecture}, {'with' if facts.has_pooler else 'without'} pooler"
                      f"{', attacked on purpose' if self.attacked else ''}"),
            ("warm-up", "a masked-LM head is trained first, on the same text" if self.fresh else "not needed"),
            ("method", f"{run.method} ({fields})"),
            ("matrices", f"{sum(facts.matrices.values())}: " + ", ".join(f"{n} x {k}" for k, n in facts.matrices.items())),
            ("  first", ", ".join(facts.first)),
            ("trainable", f"{facts.trainable:,} of {facts.parameters:,} parameters"),
            ("text", f"{run.text}: {len(self.texts)} texts to train on, {len(self.held_out)} held out, cut at {run.max_length} "
                     f"tokens{few}"),
            ("training", f"{run.epochs:g} epochs, {facts.steps} updates of {run.batch_size} texts, {masks}; rate "
                         f"{facts.learning_rate:.3g}{suggested}, linear to 0{hurried}"),
            ("expected", f"dose {facts.dose:.2f}; {penalty}"),
            ("run folder", run.output_dir),
        ]  # fmt: skip
        return "\n".join(f"{name:12} {value}" for name, value in lines)


def resolve(run: CleanArguments, method: RECIPE) -> CleanPlan:
    """Check everything that can be checked before training. Raises ValueError with all reasons; writes nothing."""
    run.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "hfbd clean runs in one process, and was started in several. For several use `pretraining_trainer` in your own "
            "script under `accelerate launch`."
        )
    check_places(str(run.model_name), run.output_dir)
    texts, held_out = split_texts(load_texts(str(run.text), text_column=run.text_column, limit=run.limit), run.held_out)
    if len(texts) < FEWEST_TEXTS or not held_out:
        raise ValueError(
            f"`text` must leave at least {FEWEST_TEXTS} texts to train on and one held out, got {len(texts)} and "
            f"{len(held_out)}: a model would learn them by heart. Give more text (the paper took 1,000 to 20,000)"
            f"{'' if held_out else ', or raise --held_out'}."
        )
    model, tokenizer = load_pretrained_whole(str(run.model_name), seed=run.seed)
    hashes = {"weights": weights_sha256(model), "texts": _digest(texts), "held_out": _digest(held_out)}
    fresh = head_is_fresh(model) is True
    facts = _facts(run, method, model, tokenizer, texts, held_out, fresh)
    attacked = attack_on(str(run.model_name))
    plan = CleanPlan(
        run=run, method=method, texts=texts, held_out=held_out, facts=facts, fresh=fresh, attacked=attacked, hashes=hashes
    )  # fmt: skip
    check_folder(plan.folder, plan.identity())
    return plan


def split_texts(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """Texts to train on, and about `share` of them held out, each in their order; equal texts lie on one side.

    >>> [len(part) for part in split_texts([str(i) for i in range(1000)], 0.1)]
    [902, 98]
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        place = int.from_bytes(hashlib.blake2b(f"held out|{text}".encode(), digest_size=8).digest(), "big") / 2**64
        parts[place < share].append(text)
    return parts


def training_rows(run: CleanArguments, tokenizer: Any, texts: list[str]) -> Dataset:
    """Tokenized texts, with masks where these are drawn once. Raises ValueError as `tokenize_texts` and `mask_once`."""
    rows = tokenize_texts(texts, tokenizer, max_length=run.max_length)
    return mask_once(rows, tokenizer, seed=run.seed, max_length=run.max_length) if run.static_masks else rows


def trainer_of(
    run: CleanArguments, method: RECIPE, model: Any, tokenizer: Any, rows: Dataset, *, folder: str, **options: Any
) -> DefendedTrainer:
    """The Trainer of a run: one checkpoint at the end of each epoch, from where a stopped training goes on exactly."""
    return pretraining_trainer(
        model,
        tokenizer,
        rows,
        output_dir=folder,
        objective=method,
        seed=run.seed,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        save_strategy="epoch",
        save_total_limit=1,
        **options,
    )


def check_places(model_name: str, output_dir: str) -> None:
    """The input is never written to, nor into a folder around it. Raises ValueError."""
    source, target = Path(resolve_name(model_name)).expanduser(), Path(output_dir)
    if target.exists() and not target.is_dir():
        raise ValueError(
            f"`output_dir` must be a folder, got the file {output_dir!r}: a run is a folder. Choose another --output_dir."
        )
    if not source.is_dir():
        return  # a Hub id
    source, target = source.resolve(), target.resolve()
    how = (
        "is"
        if source == target
        else "lies in"
        if source in target.parents
        else "holds"
        if target in source.parents
        else ""
    )
    if how:
        raise ValueError(
            f"`output_dir` ({output_dir}) {how} the folder of the model ({model_name}), which is left as it is. Choose "
            "another --output_dir."
        )


def _facts(
    run: CleanArguments, method: RECIPE, model: Any, tokenizer: Any, texts: list[str], held_out: list[str], fresh: bool
) -> Facts:
    """What the training will be, or a ValueError with every reason why it cannot be."""
    masked = loss_kind(model) == "ForMaskedLM"
    coarse = bool(float32_reasons(model))
    if fresh and run.warm_up and masked:
        mark_head_trained(model)  # it will be, before the cleaning starts
    reasons: list[str] = []
    positions = room(model)
    if positions is not None and run.max_length > positions:
        reasons.append(f"`max_length` is {run.max_length}, the model reads at most {positions} tokens. Lower it.")
    if run.static_masks and not masked:
        reasons.append("`static_masks` is set, and the model predicts next tokens: there are no masks. Leave it out.")
    rows = _collected(reasons, lambda: training_rows(run, tokenizer, texts))
    _collected(reasons, lambda: tokenize_texts(held_out, tokenizer, max_length=run.max_length))
    rows = Dataset.from_dict({"input_ids": [[0]], "row_id": [0]}) if rows is None else rows
    collator = _collected(reasons, lambda: language_collator(model, tokenizer, rows)) or list
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, replace(method), model, tokenizer, rows, folder=folder, collator=collator)
        reasons += [reason for reason in trainer.reasons() if reason not in reasons]
    if fresh and not run.warm_up and masked:
        reasons.append("with --warm_up true this command trains the missing head first, on the same text.")
    if coarse:
        reasons.append(
            "for a float32 copy: model, tokenizer = load_pretrained_whole(NAME); save_pretrained_whole(model.float(), tokenizer, "
            "FOLDER)."
        )
    if reasons:
        raise ValueError(f"`{run.model_name}` cannot be cleaned:\n" + "\n".join(f"- {reason}" for reason in reasons))
    weights = target_weights(model, method.targets)
    steps = math.ceil(run.epochs * math.ceil(len(rows) / run.batch_size))
    suggested = method.suggest_learning_rate(model, steps)
    rate = suggested if run.learning_rate is None else run.learning_rate
    sum_lr = rate * (steps + 1) / 2
    with _quiet():
        trainer.objectives[0].prepare(trainer, checkpoint=None)
    return Facts(
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        has_pooler=pooler_of(model) is not None,
        matrices=dict(Counter(re.sub(r"\.\d+\.", ".*.", name) for name in weights)),
        first=list(weights)[:2],
        steps=steps,
        learning_rate=rate,
        dose=method.dose * rate / suggested * (steps + 1) / steps,
        norm_ratio=sum(predicted_norm_ratio(w, sum_lr) for w in weights.values()) / len(weights),
    )


def _collected(reasons: list[str], make: Callable[[], Any]) -> Any:
    """What `make` returns; where it raises ValueError, None, and its message goes to the reasons."""
    try:
        return make()
    except ValueError as error:
        if str(error) not in reasons:
            reasons.append(str(error))
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Preparing to count is no training: its notes come when it starts."""
    logger = logging.getLogger(RECIPE.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
