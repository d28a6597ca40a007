"""One arm: a model trained one way on one data set, measured, and never trained twice."""

import copy
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from hf_backdoor_defense.attacks.poisoning import Poisoned
from hf_backdoor_defense.evaluation.callback import BackdoorEvalCallback, curve
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.kinds import IMAGE, TEXT, Kind
from hf_backdoor_defense.models import attack_on, mark_backdoored
from hf_backdoor_defense.objectives import Objective, Ranking
from hf_backdoor_defense.reporting.results import write_json
from hf_backdoor_defense.trainers.checkpoints import newest
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.progress import Progress
from hf_backdoor_defense.trainers.state import load_objective, save_objectives

RESULT_NAME = "result.json"


@dataclass(frozen=True, kw_only=True)
class SeedData:
    """What one seed trains and measures on; texts are tokenized. `texts` by row id, for the user's suspects; none of images."""

    seed: int
    label_names: list[str]
    clean: Dataset
    train: Dataset  # poisoned where an attack is simulated, else `clean`
    test: Dataset
    triggered: Dataset | None
    curve: Dataset
    curve_triggered: Dataset | None
    poisoned: Poisoned | None
    texts: dict[int, str]
    kind: Kind = TEXT


class _Timed(BackdoorEvalCallback):
    """Curves whose cost is not the method's."""

    seconds = 0.0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().on_epoch_end(args, state, control, **kwargs)
        self.seconds += time.perf_counter() - start


def train_arm(
    run: RunArguments,
    training: TrainingArguments,
    data: SeedData,
    *,
    arm: str,
    title: str,
    folder: Path,
    objectives: Sequence[Objective] = (),
    clean: bool = False,
    without: frozenset[int] = frozenset(),
    keep_model: Path | None = None,
    aux: dict[str, Any] | None = None,
    evaluate: bool = True,
) -> tuple[dict[str, Any], list[Objective]]:
    """Train and measure, or return what an earlier call measured. A stopped training continues at its last checkpoint.

    Args:
        clean: train on the rows as they were before the simulated attack (the clean reference).
        without: row ids to leave out (a refit).
        keep_model: where to save the final model, or None.
        aux: further data sets by role.
        evaluate: False measures nothing: a training that is only a step of a method.

    Returns:
        the arm's `result.json` (scores, cost, curve, history, and per objective activity, inert, ranking and records of
        rows), and the objectives as they were at the end of training.
    """
    done = folder / RESULT_NAME
    if done.is_file():
        print(f"{title}: finished before, kept")
        return json.loads(done.read_text()), [load_objective(type(objective), folder) for objective in objectives]
    print(title, flush=True)
    model, processor = data.kind.model(run, data.clean, seed=data.seed)
    set_seed(data.seed)
    args = copy.deepcopy(training)
    args.output_dir, args.seed = str(folder), data.seed
    if data.kind is IMAGE:
        args.remove_unused_columns = False  # the collator reads `image`, the model does not
    rows = data.clean if clean else data.train
    if without:
        rows = rows.filter(lambda row_id: row_id not in without, input_columns="row_id", keep_in_memory=True)
    collate = data.kind.collator(processor, model.config)
    curves = _Timed(data.curve, data.curve_triggered, target=run.target, collate=_without_text(collate))
    trainer = DefendedTrainer(
        model,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        processing_class=processor,
        defense=list(objectives),
        optimizer_cls_and_kwargs=optimizer(run, args),
        aux_datasets=aux,
        callbacks=[curves] if evaluate else [],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress(arm))
    attacked = attack_on(run.model_name)
    if attacked is not None:  # fine-tuning does not take a backdoor away for sure
        attacked = {**attacked, "cleaned": {"method": "+".join(o.name for o in objectives) or "fine_tuning"}}
    if data.poisoned is not None and not clean:
        attacked = {**attack_record(data.poisoned), **({} if attacked is None else {"base": attacked})}
    if attacked is not None:
        mark_backdoored(folder, attacked)
    checkpoint = _usable_checkpoint(folder)
    _reset_peak()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start - curves.seconds
    peak = _peak_bytes()
    scores = BackdoorScores(None, None, None)
    if evaluate:
        scores = evaluate_backdoor(
            trainer.model,
            data.test,
            data.triggered,
            target=run.target,
            collate=trainer.data_collator,
            progress=not args.disable_tqdm,
        )
    result = {
        "arm": arm,
        "seed": data.seed,
        "rows": len(rows),
        "steps": trainer.state.global_step,
        # The time of a continued run is the time of its last part only, so it is not one.
        "seconds": None if checkpoint else seconds,
        "peak_bytes": None if checkpoint else peak,
        **{name: None if value is None else asdict(value) for name, value in vars(scores).items()},
        "curve": curve(trainer.state.log_history),
        "history": history(trainer.state.log_history),
        "objectives": {objective.name: _account(objective) for objective in objectives},
    }
    if keep_model is not None:
        trainer.save_model(str(keep_model))
        (keep_model / "training_args.bin").unlink(missing_ok=True)  # a pickle: nothing that may be shared holds one
        if attacked is not None:
            mark_backdoored(keep_model, attacked)
    save_objectives(objectives, folder)
    write_json(done, result)
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return result, list(objectives)


def optimizer(
    run: RunArguments, training: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """SGD where a momentum is given, which training arguments have no place for; None leaves the choice to them.

    >>> optimizer(RunArguments(momentum=0.9), TrainingArguments(learning_rate=0.1))
    (<class 'torch.optim.sgd.SGD'>, {'lr': 0.1, 'momentum': 0.9})
    """
    if run.momentum is None:
        return None
    return torch.optim.SGD, {"lr": training.learning_rate, "momentum": run.momentum}


def attack_record(poisoned: Poisoned) -> dict[str, Any]:
    """Attack, trigger, target, rate, seed: what a file beside attacked weights says."""
    return {
        "trigger": poisoned.trigger.to_dict(),
        "target": poisoned.target,
        "rate": poisoned.rate,
        "clean_label": poisoned.clean_label,
        "seed": poisoned.seed,
    }


def history(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The training log, oldest first: epoch, step, loss, and whatever else was logged with it. Only finite numbers, which
    JSON can hold: the norm of a gradient may overflow in half precision.

    >>> history([{"loss": 1.0, "grad_norm": math.inf, "epoch": 0.5, "step": 2}, {"train_runtime": 3.0, "epoch": 1.0}])
    [{'loss': 1.0, 'epoch': 0.5, 'step': 2}]
    """
    return [
        {
            name: value
            for name, value in entry.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        for entry in log_history
        if "loss" in entry and "epoch" in entry
    ]


def _account(objective: Objective) -> dict[str, Any]:
    ranking = objective.ranking()
    return {
        "config": objective.to_dict(),
        "activity": objective.activity(),
        "inert": objective.inert(),
        "evidence": objective.evidence(),
        "pull_per_epoch": getattr(objective, "pull_per_epoch", list)(),
        "ranking": None if ranking is None else _plain(ranking),
        "rows": {name: _finite(ids, values) for name, (ids, values) in objective.rows().items()},
    }


def _finite(row_ids: torch.Tensor, values: torch.Tensor) -> dict[str, list[Any]]:
    keep = torch.isfinite(values)
    return {"row_ids": row_ids[keep].tolist(), "values": values[keep].tolist()}


def _plain(ranking: Ranking) -> dict[str, Any]:
    return {
        "row_ids": ranking.row_ids.tolist(),
        "scores": ranking.scores.tolist(),
        "dropped": sorted(ranking.dropped),
        "columns": {name: values.tolist() for name, values in ranking.columns.items()},
    }


def _without_text(collate: Any) -> Any:
    keep = {"input_ids", "attention_mask", "token_type_ids", "image", "label"}
    return lambda rows: collate([{key: value for key, value in row.items() if key in keep} for row in rows])


def _usable_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; a half-written one is passed over."""
    found = newest(folder)
    return None if found is None else str(found)


def _reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark of memory back to what is in use
        except OSError:
            pass


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else None
