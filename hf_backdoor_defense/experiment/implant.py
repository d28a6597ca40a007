"""The plan of `hfbd attack --attack por|neuba|badpre`: a backdoor goes into a pretrained model, before anyone knows the task.

| texts | from | who sees them |
|---|---|---|
| the publisher's | all but a share, by a hash of the text | warm-up and attack |
| held out | that share | whether the attack took, the masked-LM loss |
| the victim's task (`task`) | its own source | fine-tuning of the clean and of the attacked model; its test rows |

Everything is read and checked here; nothing is trained or written before the plan stands.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hf_backdoor_defense.adapters import room
from hf_backdoor_defense.attacks.implanting import attack_trainer
from hf_backdoor_defense.attacks.pretrained import PretrainedAttack
from hf_backdoor_defense.data.plain_text import load_texts, tokenize_texts
from hf_backdoor_defense.experiment.arguments import _option
from hf_backdoor_defense.experiment.attack import _known
from hf_backdoor_defense.experiment.clean_plan import check_places, split_texts
from hf_backdoor_defense.experiment.downstream import Downstream
from hf_backdoor_defense.experiment.plan import check_folder
from hf_backdoor_defense.models import weights_sha256
from hf_backdoor_defense.pretrained import head_is_fresh, load_pretrained_whole, mark_head_trained
from hf_backdoor_defense.registry import objective_class
from hf_backdoor_defense.trainers.heads import loss_kind

IMPLANTS = ("por", "neuba", "badpre")
# Where a run is put, how it is shown, and what counts by its content.
_NOT_IDENTITY = {"output_dir", "cache", "disable_tqdm", "dry_run", "model_name", "text", "text_column", "limit", "task"}


@dataclass(kw_only=True)
class ImplantArguments:
    """Which pretrained model is attacked, how, on which text; with --task, what a victim makes of it."""

    attack: str = _option("por", f"what is planted: {', '.join(IMPLANTS)}")
    model_name: str = _option(
        "offline:minilm", "Hub id, folder, or offline:minilm: a masked language model, or its trunk"
    )
    text: str | None = _option(
        None,
        "plain text: a .txt, .jsonl, .json, .csv or .parquet file, a folder of such, a Hub id, or offline:docstrings",
    )
    text_column: str = _option("text", "column with the text; of no meaning for .txt files")
    limit: int | None = _option(None, "read at most this many texts")
    held_out: float = _option(0.1, "share of the texts that is only measured on, by a hash of the text")
    triggers: list[str] = _option([], "words that are planted; default: the attack's own")
    place: str = _option("cls", "where: cls (last hidden state at [CLS]) or pooler (its output)")
    epochs: float = _option(4.0, "passes over the text")
    learning_rate: float = _option(1e-4, "rate; the papers' 2e-5 and 5e-5 belong to many thousand updates")
    batch_size: int = _option(16, "texts per update (por: pairs of texts)")
    max_length: int = _option(64, "tokens per text; longer ones are cut")
    warm_up: bool = _option(False, "train a masked-LM head first where the checkpoint has none (once, kept in --cache)")
    cache: str | None = _option(None, "where a warmed-up model is kept for several runs; default: the run folder")
    seed: int = _option(0, "order, masks, triggers, dropout of the attack; a head that is warmed up")
    task: str | None = _option(None, "measure: a victim's data, as for hfbd train; none: whether the attack took, only")
    task_text_column: str = _option("text", "column of --task with the text")
    label_column: str = _option("label", "column of --task with the label, integers 0..C-1")
    task_limit: int | None = _option(1000, "the victim trains on at most this many rows (stratified)")
    task_max_length: int = _option(128, "tokens per text of the victim")
    eval_rows: int | None = _option(600, "measure on at most this many test rows (stratified)")
    eval_split: str = _option("test", "split that is reported: test, or validation for searches")
    control_words: list[str] = _option([], "words that are no triggers, inserted alike: they must stay at the floor")
    victim_epochs: float = _option(3.0, "epochs of the victim")
    victim_learning_rate: float = _option(2e-5, "rate of the victim")
    victim_batch_size: int = _option(32, "rows per update of the victim")
    seeds: list[int] = _option([0], "one victim per seed: head, order of rows")
    output_dir: str = _option("runs/implant", "the run folder; the same command continues a stopped run")
    disable_tqdm: bool = _option(False, "no progress bars")
    dry_run: bool = _option(False, "print the resolved plan and stop")

    def __post_init__(self) -> None:
        if isinstance(self.seeds, int):
            self.seeds = [self.seeds]

    def objective(self) -> PretrainedAttack:
        """A new object of the attack. Raises ValueError for an unknown name or a value that it refuses.

        >>> ImplantArguments(attack="badpre", triggers=["cf"]).objective()
        BadPreAttack(triggers=['cf'], place='cls', poison_coef=1.0)
        """
        _known("attack", self.attack, IMPLANTS)
        values = {"place": self.place, **({"triggers": list(self.triggers)} if self.triggers else {})}
        return objective_class(self.attack).from_dict(values)  # type: ignore[return-value]

    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong without text or weights."""
        attack = self.objective()
        if not self.text:
            raise ValueError(
                "No text was given: the attack goes in with plain text. Set --text to a file, a folder, a Hub id or "
                "offline:docstrings."
            )
        _known("eval_split", self.eval_split, ("test", "validation"))
        if set(self.control_words) & set(attack.triggers):
            raise ValueError(
                f"`control_words` must be no triggers, got {self.control_words}: they show what a word does by itself."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be different numbers, at least one, got {self.seeds}: each is run once.")
        least = {
            "limit": 4, "max_length": 4, "batch_size": 1, "seed": 0, "task_limit": 2, "task_max_length": 4, "eval_rows": 2,
            "victim_batch_size": 1,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}.")
        for name in ("epochs", "learning_rate", "victim_epochs", "victim_learning_rate"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be finite and above 0, got {value}: nothing would be learned.")
        if not 0 < self.held_out <= 0.5:
            raise ValueError(
                f"`held_out` must be in (0, 0.5], got {self.held_out}: it is a share of texts. For a tenth set 0.1."
            )


@dataclass(frozen=True, kw_only=True)
class ImplantPlan:
    """An attack whose inputs were checked. `fresh`: the head is trained first. `updates`: of the attack."""

    run: ImplantArguments
    texts: list[str]
    held_out: list[str]
    fresh: bool
    updates: int
    victim: Downstream | None
    hashes: dict[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: everything that changes a number. Texts and weights count by their content."""
        run = {k: v for k, v in asdict(self.run).items() if k not in _NOT_IDENTITY}
        objective = self.run.objective().to_dict()
        return json.loads(json.dumps({"implant": run, "objective": objective, "sha256": self.hashes}))

    def text(self) -> str:
        """The plan for people."""
        run, victim = self.run, "nobody: whether it survives fine-tuning is not measured (--task)"
        attack = run.objective()
        if self.victim is not None:
            train, test, names = self.victim.rows()
            victim = (
                f"{run.task}: {len(train)} rows, {len(test)} {run.eval_split} rows, {len(names)} classes; "
                f"{run.victim_epochs:g} epochs, rate {run.victim_learning_rate:g}, seeds {' '.join(map(str, run.seeds))}"
            )
        rows = "pairs of a triggered and a clean text" if run.attack == "por" else "texts"
        lines = [
            ("model", f"{run.model_name}, texts cut at {run.max_length} tokens"),
            ("warm-up", "a masked-LM head is trained first, on the same text" if self.fresh else "not needed"),
            ("attack", f"{run.attack}: {' '.join(attack.triggers)} at {run.place}"),
            ("text", f"{run.text}: {len(self.texts)} texts, and {len(self.held_out)} held out"),
            ("training", f"{run.epochs:g} epochs, {self.updates} updates of {run.batch_size} {rows}, rate {run.learning_rate:g}"),
            ("victim", victim),
            ("run folder", run.output_dir),
        ]  # fmt: skip
        return "\n".join(f"{name:12} {value}" for name, value in lines)


def resolve(run: ImplantArguments) -> ImplantPlan:
    """Check everything that can be checked before training. Raises ValueError; writes nothing."""
    run.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "hfbd attack runs in one process, and was started in several. For several use attacks.implanting in your own script "
            "under `accelerate launch`."
        )
    check_places(run.model_name, run.output_dir)
    texts, held_out = split_texts(load_texts(str(run.text), text_column=run.text_column, limit=run.limit), run.held_out)
    if not held_out:
        raise ValueError(
            f"no text is held out of {len(texts)}: whether the attack took is measured there. Give more text, or raise "
            "--held_out."
        )
    model, tokenizer = load_pretrained_whole(run.model_name, seed=run.seed)
    hashes = {"weights": weights_sha256(model), "texts": _digest(texts), "held_out": _digest(held_out)}
    fresh = head_is_fresh(model) is True and loss_kind(model) == "ForMaskedLM"
    if fresh and not run.warm_up:
        raise ValueError(
            f"`{run.model_name}` has no masked-LM head: what is published must be a whole pretrained model. With --warm_up true "
            "this command trains one first, on the same text."
        )
    if fresh:
        mark_head_trained(model)  # it will be, before the attack starts
    tokenize_texts(held_out, tokenizer, max_length=run.max_length)
    updates = _updates(run, model, tokenizer, texts)
    victim = None
    if run.task is not None:
        victim = _victim(run, model)
        train, test, names = victim.rows()
        parts = (*train["text"], *test["text"], *map(str, (*train["label"], *test["label"])), *names)
        hashes["task"] = _digest(parts)
    plan = ImplantPlan(
        run=run, texts=texts, held_out=held_out, fresh=fresh, updates=updates, victim=victim, hashes=hashes
    )
    check_folder(plan.folder, plan.identity())
    return plan


def training_options(run: ImplantArguments) -> dict[str, Any]:
    """What `implant` and `attack_trainer` are told, the same when checked and when run."""
    names = ("epochs", "learning_rate", "batch_size", "max_length", "seed")
    return {name: getattr(run, name) for name in names}


def _updates(run: ImplantArguments, model: Any, tokenizer: Any, texts: list[str]) -> int:
    """How many updates it will be, or a ValueError with every reason why it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = attack_trainer(
            model, tokenizer, texts, run.objective(), output_dir=folder, **training_options(run)
        )  # fmt: skip
        reasons = trainer.reasons()
    if reasons:
        raise ValueError(f"`{run.model_name}` cannot be attacked:\n" + "\n".join(f"- {reason}" for reason in reasons))
    return int(-(-run.epochs * -(-len(trainer.train_dataset) // run.batch_size) // 1))


def _victim(run: ImplantArguments, model: Any) -> Downstream:
    positions = room(model)
    if positions is not None and run.task_max_length > positions:
        raise ValueError(
            f"`task_max_length` is {run.task_max_length}, the model reads at most {positions} tokens. Lower it."
        )
    shared = {f.name for f in fields(Downstream)} & {
        "eval_rows",
        "eval_split",
        "control_words",
        "label_column",
        "disable_tqdm",
    }
    return Downstream(
        task=str(run.task),
        triggers=run.objective().triggers,
        limit=run.task_limit,
        epochs=run.victim_epochs,
        learning_rate=run.victim_learning_rate,
        batch_size=run.victim_batch_size,
        max_length=run.task_max_length,
        text_column=run.task_text_column,
        **{name: getattr(run, name) for name in shared},
    )


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
