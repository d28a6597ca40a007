"""The plan of `hfbd attack`: rows dealt out, model and trigger checked. Nothing is trained or written before it stands.

| rows | from | who sees them |
|---|---|---|
| attacker | train (proxy: one half of it) | poisons the base |
| victim | train (proxy: the other half) | clean fine-tuning; what filters are fitted on |
| calibration | half of validation without train's texts, by a hash | thresholds of filters; labels only for ONION's bar |
| check | the other half | the false rejection rate before any test row |
| test, triggered | test; its non-target rows with the trigger, the same for all seeds | measured once, at the end |
"""

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_backdoor_defense.adapters import has_adapter, refusals, room
from hf_backdoor_defense.attacks.poisoning import poison_dataset, trigger_dataset
from hf_backdoor_defense.attacks.visibility import check_trigger_fits
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.data.summary import describe
from hf_backdoor_defense.experiment.attack import AttackArguments
from hf_backdoor_defense.experiment.plan import check_folder
from hf_backdoor_defense.functional.thresholds import rows_needed
from hf_backdoor_defense.models import load_classifier, weights_sha256
from hf_backdoor_defense.registry import filter_class

# Where a run is put and how it is shown: none of it changes a number. Nor do further filters: each is a step of its own.
_NOT_IDENTITY = {"output_dir", "shared_dir", "save_models", "disable_tqdm", "dry_run", "language_model", "filters"}
TRIGGER_SEED = 0  # where the trigger goes in a test text: the same for all seeds


@dataclass
class AttackPlan:
    """A run whose inputs were checked."""

    run: AttackArguments
    attacker: Dataset
    victim: Dataset
    calibration: Dataset
    check: Dataset
    test: Dataset
    triggered: Dataset
    described: dict[str, Any]
    label_names: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)

    @property
    def shared(self) -> Path:
        return Path(self.run.shared_dir or self.run.output_dir)

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: everything that changes a number."""
        run = {k: v for k, v in dataclasses.asdict(self.run).items() if k not in _NOT_IDENTITY}
        data = {k: v for k, v in self.described.items() if k != "language_model"}  # stands in the name of ONION's steps
        return json.loads(json.dumps({"attack": run, "data": data}))

    def clean_identity(self) -> dict[str, Any]:
        """What the clean models belong to: the same for every attack on this data, model and training."""
        names = (
            "max_length", "num_layers", "setting", "limit", "base_epochs", "base_max_steps", "base_learning_rate",
            "victim_epochs", "victim_learning_rate", "victim_full_learning_rate", "batch_size", "target_frr", "eval_split",
        )  # fmt: skip
        data = {k: v for k, v in self.described.items() if k != "language_model"}
        return json.loads(json.dumps({"clean": {k: getattr(self.run, k) for k in names}, "data": data}))

    def text(self) -> str:
        """The plan for people."""
        run = self.run
        trigger = run.get_trigger(measured=True)
        updates = -(-len(self.attacker) // run.batch_size)
        epochs = f"{run.base_epochs:g} epochs of {updates} updates"
        lines = [
            ("task", f"{run.task}: {len(self.attacker)} rows of the attacker, {len(self.victim)} of the victim ({run.setting}), "
                     f"{len(self.calibration)} to calibrate, {len(self.check)} to check, {len(self.test)} {run.eval_split} rows"),
            ("classes", ", ".join(self.label_names)),
            ("model", f"{run.model_name}, {run.num_layers or 'all'} layers, texts cut at {run.max_length} tokens"),
            ("attack", f"{run.attack} {trigger.text!r} -> {self.label_names[run.target]} ({run.target}) in {run.poison_rate:.0%} "
                       f"of the rows, {epochs}{'' if run.base_max_steps < 0 else f', at most {run.base_max_steps} in all'}, "
                       f"rate {run.base_learning_rate:g}"),
            ("victim", f"{', '.join(run.strategies)}; {run.victim_epochs:g} epochs, rate {run.victim_learning_rate:g} "
                       f"(full {run.victim_full_learning_rate:g})"),
            ("filters", f"{', '.join(run.filters) or 'none'}; at most {run.target_frr:.1%} of clean texts flagged"),
            ("seeds", " ".join(map(str, run.seeds))),
            ("run folder", str(self.folder)),
        ]  # fmt: skip
        return "\n".join(f"{name:12} {value}" for name, value in lines)


def resolve(run: AttackArguments) -> AttackPlan:
    """Check everything that can be checked before training. Raises ValueError; writes nothing."""
    run.check()
    data = load(str(run.task), text_column=run.text_column, label_column=run.label_column)
    names = data["train"].features["label"].names
    if not 0 <= run.target < len(names):
        raise ValueError(
            f"`target` must be one of the classes 0..{len(names) - 1} ({', '.join(names)}), got {run.target}."
        )
    model, tokenizer = load_classifier(
        run.model_name, num_labels=len(names), label_names=names, num_layers=run.num_layers
    )
    if has_adapter(model):
        raise ValueError(f"`{run.model_name}` carries an adapter: the attack is on a base. Merge or unload it first.")
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of `{run.model_name}` has no padding token: texts of unequal length cannot be batched. Set one "
            "(tokenizer.pad_token = tokenizer.eos_token) and save the tokenizer with the model."
        )
    reasons = [reason for strategy in run.strategies for reason in refusals(model, strategy)]
    if reasons:
        raise ValueError("\n".join(reasons))
    positions = room(model)
    if positions is not None and run.max_length > positions:
        raise ValueError(f"`max_length` is {run.max_length}, the model reads at most {positions} tokens. Lower it.")
    for measured in (False, True):
        check_trigger_fits(run.get_trigger(measured=measured), tokenizer, run.max_length)
    attacker, victim = _deal(data["train"], run)
    # Which rows an attacker can draw is known now, and not after a clean base was trained.
    poison_dataset(
        attacker, run.get_trigger(measured=False), target=run.target, rate=run.poison_rate, seed=run.seeds[0]
    )
    calibration, check = halves(_unseen(data["validation"], data["train"]))
    check = _unseen(check, calibration)
    _check_calibration(run, len(calibration))
    test = _few(data[run.eval_split], run.eval_rows, "eval_rows")
    trigger = run.get_trigger(measured=True)
    triggered = trigger_dataset(test, trigger, target=run.target, seed=TRIGGER_SEED)
    described = {**describe(data), "weights": weights_sha256(model)}
    if run.language_model is not None and "onion" in run.filters:
        described["language_model"] = _language_model(run.language_model)
    plan = AttackPlan(run, attacker, victim, calibration, check, test, triggered, described, names)
    check_folder(plan.folder, plan.identity())
    if plan.shared != plan.folder:
        check_folder(plan.shared, plan.clean_identity())
    return plan


def halves(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Two halves by a hash of `row_id`: independent of the order of the rows. The first is the larger one of an odd number.

    >>> [len(half) for half in halves(Dataset.from_dict({"row_id": [4, 5, 6]}))]
    [2, 1]
    """
    ids = rows["row_id"]
    order = sorted(range(len(ids)), key=lambda i: _hash("half", ids[i]))
    cut = (len(ids) + 1) // 2
    return rows.select(sorted(order[:cut])), rows.select(sorted(order[cut:]))


def _unseen(rows: Dataset, known: Dataset) -> Dataset:
    """The rows whose text is not among the known ones: the scores of others are not those of new texts."""
    seen = set(known["text"])
    return rows.select([i for i, text in enumerate(rows["text"]) if text not in seen])


def _deal(train: Dataset, run: AttackArguments) -> tuple[Dataset, Dataset]:
    """The attacker's and the victim's rows."""
    parts = (train, train)
    if run.setting == "proxy":
        order = _stratified(train)
        parts = (train.select(sorted(order[::2])), train.select(sorted(order[1::2])))
    attacker, victim = (_few(rows, run.limit, "limit") for rows in parts)
    return attacker, victim


def _few(rows: Dataset, count: int | None, name: str) -> Dataset:
    """A stratified draw of at most `count` rows, the same for all seeds."""
    if count is None or count >= len(rows):
        return rows
    least = len(rows.features["label"].names)
    if count < least:
        raise ValueError(f"`{name}` must be at least {least}, one row per class, got {count}. Raise it.")
    return rows.select(sorted(_stratified(rows)[:count]))


def _stratified(rows: Dataset) -> list[int]:
    """Positions in an order whose every beginning has the classes in their shares; by a hash of `row_id` within a class."""
    ids, labels = rows["row_id"], rows["label"]
    total, seen = Counter(labels), Counter[int]()
    place = {}
    for i in sorted(range(len(ids)), key=lambda i: _hash("draw", ids[i])):
        seen[labels[i]] += 1
        place[i] = ((seen[labels[i]] - 0.5) / total[labels[i]], labels[i])
    return sorted(place, key=place.__getitem__)


def _hash(purpose: str, row_id: int) -> bytes:
    return hashlib.blake2b(f"{purpose}|{row_id}".encode(), digest_size=16).digest()


def _check_calibration(run: AttackArguments, n: int) -> None:
    for name in run.filters:
        needed = 1 if filter_class(name).edits else rows_needed(run.target_frr, tail=filter_class(name).tail)
        if n < needed:
            raise ValueError(
                f"{name} needs {needed} clean rows to promise a false rejection rate of {run.target_frr:g}, half of the "
                f"validation split has {n}. Give more validation rows, or raise --target_frr."
            )


def _language_model(folder: str) -> str:
    """SHA-256 of a causal language model's weight files."""
    path = Path(folder)
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"`language_model` must be the folder of a saved model, got {folder!r} without config.json.")
    kinds = json.loads(config.read_text()).get("architectures") or ["unknown"]
    if not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise ValueError(
            f"`{folder}` is no causal language model ({', '.join(kinds)}): ONION needs word probabilities."
        )
    digest = hashlib.sha256()
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"`{folder}` has no safetensors weights: other formats can run code and are not read here.")
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
