"""Losses and the trajectory filter against data poisoning in classification: which helps where.

SST-2, 3,000 rows, three layers of MiniLM with frozen embeddings, four epochs, BadNets at 2 %; extended: other rates and attacks,
four classes, the full model. Learning rate and batch are the attacker's side of the setting: at 2e-4 and batch 32 the undefended
model did not take the backdoor (dece_search.jsonl), at batch 16 it did on validation rows of seed 101. `FOUND` is the setting of
DeCE that did best on validation rows in the second round of that search; the cells named "as published" have its defaults.
"""

from typing import Any

from benchmarks.dece_search import AG_NEWS, SHARED, SST2
from benchmarks.grid import Cell, run_grid

FOUND = {"name": "dece", "alpha_base": 0.4, "warmup_epochs": 1}
LOSSES: tuple[Any, ...] = ("smoothed", "gce", FOUND, "trajectory")
ALL: tuple[Any, ...] = ("smoothed", "gce", "in_trust", "focal", FOUND, "trajectory")
TAKES = {**SST2, "simulate": "badnets", "poison_rate": 0.02, "learning_rate": 2e-4, "per_device_train_batch_size": 16}
NEWS = {**AG_NEWS, "simulate": "badnets", "poison_rate": 0.05}


def cell(setting: str, options: dict[str, Any], defense: tuple[Any, ...] = LOSSES, *, extended: bool = True) -> Cell:
    """A cell whose data may be missing."""
    return Cell(setting, options, defense=defense, extended=extended, needs=SHARED / "sst2")


CELLS = [
    cell("SST-2, 2 %", TAKES, extended=False),
    cell("AG News, 5 %", NEWS),
    cell("SST-2, 5 %", {**TAKES, "poison_rate": 0.05}, ALL),
    cell("SST-2, 2 %, InSent", {**TAKES, "simulate": "insent"}),
    cell("AG News, 2 %, InSent", {**NEWS, "simulate": "insent", "poison_rate": 0.02}),
    cell("SST-2, 2 %, DeCE as published", TAKES, ("dece",)),
    cell("AG News, 5 %, DeCE as published", NEWS, ("dece",)),
    cell("SST-2, 1 %", {**TAKES, "poison_rate": 0.01}),
    cell("SST-2, 0.5 %", {**TAKES, "poison_rate": 0.005}),
    cell("SST-2, 5 %, clean-label", {**TAKES, "poison_rate": 0.05, "clean_label": True}),
    cell("SST-2, 2 %, full model", {**TAKES, "num_layers": None}),
    cell("SST-2, no poison", {**TAKES, "simulate": None, "max_ca_drop": 1.0}, ("gce", FOUND, "trajectory")),
    cell("AG News, no poison", {**NEWS, "simulate": None, "max_ca_drop": 1.0}, ("gce", FOUND, "trajectory")),
]

if __name__ == "__main__":
    run_grid("dece_classification", CELLS, seeds=(1, 2, 3))
