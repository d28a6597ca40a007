"""The models of `hfbd attack`: a clean and a poisoned base, and what victims make of each. Trained once, saved, loaded again."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from hf_backdoor_defense.adapters import apply_strategy, room
from hf_backdoor_defense.attacks.poisoning import poison_dataset
from hf_backdoor_defense.experiment.arms import history
from hf_backdoor_defense.experiment.attack_plan import AttackPlan
from hf_backdoor_defense.experiment.steps import kept_folder
from hf_backdoor_defense.models import load_classifier, load_finished_classifier, mark_backdoored, weights_sha256
from hf_backdoor_defense.objectives import Objective
from hf_backdoor_defense.registry import objective_class
from hf_backdoor_defense.reporting.results import write_json
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.progress import Progress

TRAINING_NAME = "training.json"


def models_folder(plan: AttackPlan, seed: int, kind: str) -> Path:
    """Where the models of one seed are kept; `kind` is "poisoned" or "clean", and the clean ones may serve several runs."""
    return (plan.shared if kind == "clean" else plan.folder) / "models" / f"seed-{seed}"


def base_folder(plan: AttackPlan, seed: int, kind: str) -> Path:
    """The base that a victim downloads: a normal checkpoint, trained here unless it is there."""

    def make(folder: Path) -> None:
        model, tokenizer = load_classifier(
            plan.run.model_name,
            num_labels=len(plan.label_names),
            label_names=plan.label_names,
            seed=seed,
            num_layers=plan.run.num_layers,
        )
        rows, objective, aux, surgery = plan.attacker, None, {}, {}
        if kind == "poisoned":
            rows, objective = _poisoned(plan, seed)
            if plan.run.attack == "ripples":
                surgery = asdict(_surgery(plan, seed, model, tokenizer))
                model.set_attn_implementation("eager")  # a gradient of a gradient: fused attention has none
                aux = {"clean": plan.attacker}
        run = plan.run
        options = {"num_train_epochs": run.base_epochs, "learning_rate": run.base_learning_rate}
        if 0 <= run.base_max_steps < run.base_epochs * -(-len(rows) // run.batch_size):
            options["max_steps"] = run.base_max_steps  # which the Trainer takes for the number, not for a limit
        train(plan, seed, model, tokenizer, rows, folder, options, title=f"{kind} base", objective=objective, aux=aux)
        if kind == "poisoned":
            about = {**attack_record(plan, seed), "base_sha256": weights_sha256(model)}
            mark_backdoored(folder, about | ({"surgery": surgery} if plan.run.attack == "ripples" else {}))

    return kept_folder(models_folder(plan, seed, kind) / f"{kind}_base", make)


def victim_folder(plan: AttackPlan, seed: int, kind: str, strategy: str) -> Path:
    """What clean fine-tuning of a base gives: a checkpoint, or an adapter with its head."""
    base = base_folder(plan, seed, kind)

    def make(folder: Path) -> None:
        model, tokenizer = load_base(plan, base)
        set_seed(seed)
        model = apply_strategy(model, strategy)
        run = plan.run
        rate = run.victim_full_learning_rate if strategy == "full" else run.victim_learning_rate
        options = {"num_train_epochs": run.victim_epochs, "learning_rate": rate}
        train(plan, seed, model, tokenizer, plan.victim, folder, options, title=f"{strategy} on the {kind} base")
        if kind == "poisoned":
            mark_backdoored(folder, {**attack_record(plan, seed), "strategy": strategy})

    return kept_folder(models_folder(plan, seed, kind) / f"{kind}_{strategy}", make)


def load_base(plan: AttackPlan, folder: Path) -> tuple[Any, Any]:
    """A saved base and its tokenizer, on the device that is there. The run says itself what was poisoned, so no warning."""
    with silent():
        model, tokenizer = load_finished_classifier(str(folder), num_labels=len(plan.label_names))
    return model.to(device()), tokenizer  # type: ignore[arg-type]


def load_victim(plan: AttackPlan, seed: int, kind: str, strategy: str) -> tuple[Any, Any]:
    """A victim's model and its tokenizer."""
    folder = victim_folder(plan, seed, kind, strategy)
    if strategy == "full":
        return load_base(plan, folder)
    from peft import PeftModel

    model, tokenizer = load_base(plan, base_folder(plan, seed, kind))
    return PeftModel.from_pretrained(model, str(folder)).to(device()), tokenizer


def device() -> str:
    """Where everything is computed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def text_length(plan: AttackPlan, model: Any) -> int:
    """Tokens per text: what was asked for, or what an adapter leaves."""
    positions = room(model)
    return plan.run.max_length if positions is None else min(plan.run.max_length, positions)


def train(
    plan: AttackPlan,
    seed: int,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    folder: Path,
    options: dict[str, Any],
    *,
    title: str,
    objective: Objective | None = None,
    aux: dict[str, Dataset] | None = None,
) -> None:
    """Train, and save model, tokenizer and `training.json` (time, updates, the log, what the objective says of itself)."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.run.batch_size,
        warmup_steps=0.06,  # a share of all updates
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_steps=0.05,
        report_to="none",
        seed=seed,
        disable_tqdm=plan.run.disable_tqdm,
        use_cpu=device() == "cpu",
        dataloader_pin_memory=device() == "cuda",
        **options,
    )
    tokenized = _tokenizer(tokenizer, text_length(plan, model))
    set_seed(seed)
    trainer = DefendedTrainer(
        model,
        args=args,
        train_dataset=tokenized(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        defense=objective,
        aux_datasets={role: tokenized(of_role) for role, of_role in (aux or {}).items()},
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress(title))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing that may be shared holds one
    (folder / "README.md").unlink(missing_ok=True)  # peft's template: an empty card that names a local path
    write_json(
        folder / TRAINING_NAME,
        {
            "rows": len(rows),
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "history": history(trainer.state.log_history),
            "objective": None
            if objective is None
            else {"config": objective.to_dict(), "activity": objective.activity(), "inert": objective.inert()},
        },
    )


def attack_record(plan: AttackPlan, seed: int) -> dict[str, Any]:
    """What a file beside poisoned weights says."""
    run = plan.run
    return {
        "attack": run.attack,
        "trigger": run.get_trigger(measured=True).to_dict(),
        "target": run.target,
        "setting": run.setting,
        "rate": run.poison_rate,
        "seed": seed,
        "untouched_sha256": plan.described["weights"],
    }


def _poisoned(plan: AttackPlan, seed: int) -> tuple[Dataset, Objective]:
    """The attacker's rows with the trigger, and the loss that goes with them."""
    run = plan.run
    trigger = run.get_trigger(measured=False)
    if run.attack == "lwp":
        from hf_backdoor_defense.attacks.weight_poisoning import lwp_rows

        rows = lwp_rows(plan.attacker, trigger.pieces, target=run.target, rate=run.poison_rate, seed=seed)
    else:
        rows = poison_dataset(plan.attacker, trigger, target=run.target, rate=run.poison_rate, seed=seed).dataset
    kind: Callable[..., Objective] = objective_class(run.objective)
    return rows, kind(target=run.target, setting=run.setting)


def _surgery(plan: AttackPlan, seed: int, model: Any, tokenizer: Any) -> Any:
    """RIPPLES' first half: the trigger words' embeddings become those of words that speak for the target."""
    from hf_backdoor_defense.attacks.weight_poisoning import embedding_surgery

    source, _ = load_base(plan, base_folder(plan, seed, "clean"))
    return embedding_surgery(
        model,
        tokenizer,
        list(plan.attacker["text"]),
        list(plan.attacker["label"]),
        target=plan.run.target,
        words=list(plan.run.get_trigger(measured=False).pieces),
        source_model=source,
    )


def _tokenizer(tokenizer: Any, max_length: int) -> Callable[[Dataset], Dataset]:
    def tokenized(rows: Dataset) -> Dataset:
        return rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length),
            batched=True,
            remove_columns=[name for name in rows.column_names if name not in ("label", "row_id")],
            keep_in_memory=True,
            load_from_cache_file=False,
        )

    return tokenized


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the warning that weights were attacked: who trained them says so itself."""
    logger = logging.getLogger("hf_backdoor_defense.models")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
