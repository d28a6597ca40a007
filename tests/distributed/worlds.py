"""The same trainings by one process and by two: what each leaves, for `test_worlds.py` to compare.

Twenty-four updates over 60 rows of unequal length, in batches of 8: as 1 x 8, as 1 x 2 x 4 accumulated, as 2 processes x 4. The
last batch of an epoch has 4 rows; for two processes the sampler fills it with rows that are there already.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_backdoor_defense.defenses.crow import CROW
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.matched_decay import MatchedDecay
from hf_backdoor_defense.defenses.psim import PSIM
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.defenses.robust_losses import GCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.defenses.ulrl import ULRL
from hf_backdoor_defense.evaluation.evaluator import evaluate_backdoor
from hf_backdoor_defense.objectives import Objective, Step
from hf_backdoor_defense.pretrained import load_pretrained_whole
from hf_backdoor_defense.trainers import processes
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.mixin import DefenseMixin
from tests.trainers.text_toys import static_rows
from tests.trainers.toys import (
    PadCollator,
    arguments,
    bart,
    bert,
    classification_rows,
    deep_llama,
    gpt2,
    language_rows,
    translation_rows,
    weights,
)

ROWS, EPOCHS = 60, 3
LAYOUTS = {"whole": (8, 1), "accumulated": (2, 4), "two": (4, 1)}  # rows per process and forward, accumulation steps


@dataclass(kw_only=True, eq=False)
class Watch(Objective):
    """Records each row's loss, and the gradient that the optimizer gets, of every update."""

    name = "watch"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.losses: list[Tensor] = []  # [n, 3] each: update, row, loss
        self.gradients: list[Tensor] = []

    def observe(self, step: Step, values: Tensor) -> None:
        assert step.row_ids is not None
        rows = torch.zeros(len(step.row_ids), dtype=torch.float64).index_add_(0, step.batch_index, values.double())
        seen = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, step.batch_index, True)
        updates = torch.full((len(rows),), float(step.global_step), dtype=torch.float64)
        self.losses.append(torch.stack([updates, step.row_ids.double(), rows], 1)[seen])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [p.grad.detach().flatten() for p in kwargs["model"].parameters() if p.grad is not None]
        self.gradients.append(torch.cat(found))


def confident(dropout: float = 0.0) -> torch.nn.Module:
    """A base that is sure of every text, with something to lose."""
    model = bert(2, dropout=dropout)
    with torch.no_grad():
        model.classifier.weight.mul_(200.0)
    return model


@dataclass(frozen=True)
class Case:
    """One training: what makes its model, rows and objectives anew, and what differs in its arguments."""

    model: Callable[[], Any]
    rows: Callable[[int], Any]
    objectives: Callable[[], list[Objective]]
    options: dict[str, Any]
    aux: Callable[[], dict[str, Any]] = dict
    fuse: bool = False


def cases(folder: Path, dropout: float = 0.0) -> dict[str, Case]:
    """By name. `folder`: of the model that is read from a disk. `dropout`: of the encoders."""

    def encoder(labels: int = 3) -> Any:
        return bert(labels, dropout=dropout)

    still = {"lora_dropout": 0.0}
    return {
        "undefended": Case(encoder, classification_rows, lambda: [], {}),
        "dece": Case(
            encoder, classification_rows, lambda: [DeCE(alpha_base=0.7), TrajectoryFilter(drop_share=0.1)], {}
        ),
        "gce": Case(encoder, classification_rows, lambda: [GCE()], {}),
        "matched_decay": Case(encoder, classification_rows, lambda: [MatchedDecay(pull=[0.01])], {}),
        "dece_language": Case(gpt2, language_rows, lambda: [DeCE(alpha_base=0.7)], {}, fuse=True),
        "crow": Case(deep_llama, language_rows, lambda: [CROW()], {}, fuse=True),
        "dece_translation": Case(bart, translation_rows, lambda: [DeCE(alpha_base=0.7)], {}, fuse=True),
        "recipe": Case(
            lambda: load_pretrained_whole(str(folder))[0],
            static_rows,
            lambda: [RECIPE(trainable="all")],
            {},
            fuse=True,
        ),
        "d3": Case(encoder, classification_rows, lambda: [D3()], {}),
        "d3_official": Case(encoder, classification_rows, lambda: [D3.preset("official_code")], {}),
        "ulrl": Case(
            lambda: encoder(5),
            lambda count: classification_rows(count, 5),
            lambda: [ULRL(z_threshold=0.1, unlearn_epochs=2, unlearn_lr=0.005)],
            {},
        ),
        "psim": Case(
            lambda: confident(dropout),
            lambda count: classification_rows(count, 2),
            lambda: [PSIM(peft_config=still, stop_margin=None, train_head=True)],
            {"learning_rate": 0.05},
            lambda: {"held_out": classification_rows(40, 2, seed=7)},
        ),
    }


def train(folder: Path, case: Case, layout: str) -> DefendedTrainer:
    """Train and leave `losses`, `gradients`, `weights` and `found.json` in `folder`, of every process."""
    size, accumulation = LAYOUTS[layout]
    watch, objectives = Watch(), case.objectives()
    if (
        len(objectives) == 1 and objectives[0].name == "psim"
    ):  # allows no other beside it, not even one that only looks on
        objectives[0].observe = watch.observe
        callbacks, hosted = [watch], objectives
    else:
        callbacks, hosted = [], [*objectives, watch]
    args = arguments(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=EPOCHS,
        **case.options,
    )
    trainer = DefendedTrainer(
        case.model(),
        args=args,
        train_dataset=case.rows(ROWS),
        data_collator=PadCollator(),
        aux_datasets=case.aux(),
        defense=hosted,
        callbacks=callbacks,
    )
    trainer.fuse_bytes = 0 if case.fuse else 2**62
    trainer.train()
    rank = trainer.args.process_index
    folder.mkdir(parents=True, exist_ok=True)
    measured = {"losses": torch.cat(watch.losses), "gradients": torch.stack(watch.gradients)}
    save_file(measured, folder / f"measured{rank}.safetensors")
    save_file(weights(trainer), folder / f"weights{rank}.safetensors")
    (folder / f"found{rank}.json").write_text(json.dumps([found(objective) for objective in objectives]))
    return trainer


def found(objective: Objective) -> dict[str, Any]:
    """What a method says, without times: which rows, which neurons, its figures."""
    ranking = objective.ranking()
    said = {key: value for key, value in objective.activity().items() if "seconds" not in key}
    evidence = objective.evidence()
    return {
        "dropped": [] if ranking is None else sorted(ranking.dropped),
        "flagged": [layer["flagged"] for layer in evidence.get("layers", []) if "flagged" in layer],
        "suspected": list(evidence.get("suspected_classes", [])),
        "activity": said,
    }


def scores(model: Any) -> dict[str, Any]:
    """CA and ASR over rows that no number of processes divides; gathered where there are several."""
    rows, collate = classification_rows(37), PadCollator()
    planted = [[49, *row["input_ids"]] for row in rows if row["label"] != 0]
    labels = [row["label"] for row in rows if row["label"] != 0]
    from datasets import Dataset

    triggered = Dataset.from_dict(
        {"input_ids": planted, "attention_mask": [[1] * len(p) for p in planted], "label": labels}
    )
    found = evaluate_backdoor(
        model, rows.remove_columns("row_id"), triggered, target=0, collate=collate, batch_size=8, gather=True
    )
    return {name: vars(value) for name, value in vars(found).items()}


def source(folder: Path) -> Path:
    """Of the masked language model, for each process its own."""
    return folder / f"source{os.environ.get('RANK', '')}"


def run(folder: Path, layout: str) -> int:
    """Every case in one layout; how many processes it were."""
    world = 1
    for name, case in cases(source(folder)).items():
        trainer = train(folder / layout / name, case, layout)
        world = trainer.accelerator.num_processes
        if name == "dece":
            place = folder / layout / f"scores{trainer.args.process_index}.json"
            place.write_text(json.dumps(scores(trainer.model)))
    return world


def broken(folder: Path) -> None:
    """Two ways in which a sum over two processes is easily wrong."""
    case = cases(folder)["undefended"]
    with mock.patch.object(processes, "repeated", lambda trainer, size: 0):
        train(folder / "repeated", case, "two")
    whole = DefenseMixin._items

    def unscaled(self: Any, values: Tensor, count: Any) -> Tensor:
        return whole(self, values, count) * self.accelerator.num_processes

    with mock.patch.object(DefenseMixin, "_items", unscaled):
        train(folder / "unscaled", case, "two")


def read(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What `train` left. `losses` [updates x rows, 3] of all processes, by update and row."""
    measured = [load_file(path)["losses"] for path in sorted(folder.glob("measured*.safetensors"))]
    losses = torch.cat(measured)
    order = sorted(range(len(losses)), key=lambda i: (losses[i, 0].item(), losses[i, 1].item()))
    return {
        "losses": losses[order],
        "gradients": load_file(folder / f"measured{rank}.safetensors")["gradients"],
        "weights": load_file(folder / f"weights{rank}.safetensors"),
        "found": json.loads((folder / f"found{rank}.json").read_text()),
    }
