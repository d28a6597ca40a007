"""Which weights train, with how much text, at RECIPE's dose: without a trigger, on the clean encoder.

    python -m benchmarks.recipe_search

Each setting cleans the clean warmed-up encoder (purification seed 100) and is judged by its held-out pre-training loss, and by
the accuracy on *validation* rows of SST-2 after fine-tuning (seeds 100 and 101). Nobody is attacked, and no test row is read.
Every setting that was tried is a cell. "raw export" is the encoder before its warm-up, which must not cost accuracy.
"""

from pathlib import Path

import numpy as np

from benchmarks.grid import Cell, run_grid
from benchmarks.recipe import DATA, RUNS, clean_encoder, of_pretraining, purified, suggested_rate
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.evaluation.metrics import accuracy
from hf_backdoor_defense.experiment.downstream import Downstream, kept_predictions
from hf_backdoor_defense.experiment.steps import Steps
from hf_backdoor_defense.models import OFFLINE_MODEL
from hf_backdoor_defense.reporting.results import Record, environment

PURIFICATION = 100


def search_cell(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
    """One setting: the cleaned clean encoder, fine-tuned with one seed."""
    options = dict(cell.options)
    victim_options = {"learning_rate": options.pop("victim_rate")} if "victim_rate" in options else {}
    victim = Downstream(task=str(DATA / "sst2"), triggers=(), eval_split="validation", **victim_options)
    checkpoint: Path | str = OFFLINE_MODEL if options.pop("raw", False) else clean_encoder()
    cleaned = bool(options)
    if cleaned:
        texts, epochs = options.pop("texts", 1000), options.pop("epochs", 8)
        objective = RECIPE(**options)
        rate = suggested_rate(Path(checkpoint), objective, texts=texts, epochs=epochs)
        name = cell.setting.replace(", ", "-").replace(" ", "_")
        checkpoint = purified(
            checkpoint, RUNS / "search" / name, objective, rate=rate, seed=PURIFICATION, texts=texts, epochs=epochs
        )
    cache = RUNS / "search" / "downstream" / str(victim.learning_rate)
    _, arrays = kept_predictions(
        checkpoint, victim, seed=seed, cache=cache, steps=Steps(1), title=f"{cell.setting}, seed {seed}"
    )
    scores = {"ca": accuracy(arrays["test"], np.asarray(victim.rows()[1]["label"]))}
    scores |= of_pretraining(Path(checkpoint)) if checkpoint != OFFLINE_MODEL else {}
    common = {
        "benchmark": "recipe_search",
        "dataset": "sst2",
        "model": "offline:minilm, warmed up",
        "attack": "none",
        "seed": seed,
    }
    records = [
        Record.from_estimate(value, defense="recipe" if cleaned else "clean_reference", setting=cell.setting, metric=metric,
                             env=environment(), **common)
        for metric, value in scores.items()
    ]  # fmt: skip
    return records, f"{cell.setting}: CA {scores['ca'].value:.3f}"


def cell(setting: str, options: dict) -> Cell:
    """A cell whose data may be missing."""
    return Cell(setting, options, needs=DATA / "sst2")


CELLS = [
    cell("raw export", {"raw": True}),
    cell("clean encoder", {}),
    cell("clean encoder, victim 2e-5", {"victim_rate": 2e-5}),
    cell("dose 1.25, targets", {"trainable": "targets"}),
    cell("dose 1.25, all", {"trainable": "all"}),
    cell("dose 2.50, targets", {"trainable": "targets", "dose": 2.5}),
    cell("dose 4.00, targets", {"trainable": "targets", "dose": 4.0}),
    cell("dose 1.25, targets, 3000 texts", {"trainable": "targets", "texts": 3000, "epochs": 8}),
]


if __name__ == "__main__":
    run_grid("recipe_search", CELLS, seeds=(100, 101), run=search_cell)
