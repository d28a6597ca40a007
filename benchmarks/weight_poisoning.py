"""Weight poisoning through five ways of fine-tuning, and the filters before it: what a trigger still does, what is caught.

Core: MiniLM's first four layers, 2,000 rows of SST-2 for attacker and victim, three epochs each; full, LoRA and P-tuning,
each with BadNets (`mn`) and InSent in 10 % of the attacker's rows, three seeds; before it plain confidence, PSIM, STRIP and
ONION. Clean bases and the victims on them do not depend on the attack and are made once per seed; ONION scores each text
once. Extended: the other strategies, RIPPLES, layerwise poisoning, a proxy of the victim's data, four classes, RAP.

With `--shard i/n`, cells of one seed that run at the same time each make the clean models that they share.
"""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.grid import Cell, run_grid
from hf_backdoor_defense.experiment.attack import AttackArguments
from hf_backdoor_defense.experiment.attack_plan import resolve
from hf_backdoor_defense.experiment.attack_run import execute
from hf_backdoor_defense.reporting.results import Record

SHARED = Path(__file__).parents[2] / "shared" / "data"
RUNS = Path("runs/bench-weight_poisoning")
LANGUAGE_MODEL = Path("runs/onion_lm")
SST2: dict[str, Any] = {
    "task": str(SHARED / "sst2"),
    "num_layers": 4,
    "limit": 2000,
    "eval_rows": 900,
    "strip_rows": 300,
    "target": 1,
    "filters": ["confidence", "psim", "strip", "onion"],
    "strategies": ["full", "lora", "p_tuning"],
}
QUICK = {**SST2, "filters": ["confidence", "psim"]}
AG_NEWS = {**QUICK, "task": str(SHARED / "ag_news"), "limit": 2000, "max_length": 96}


def cell(setting: str, options: dict[str, Any], *, extended: bool = True) -> Cell:
    """A cell whose data may be missing."""
    return Cell(setting, options, extended=extended, needs=Path(options["task"]))


CELLS = [
    cell("badnets", {**SST2, "attack": "badnets"}, extended=False),
    cell("insent", {**SST2, "attack": "insent"}, extended=False),
    cell("ripples", {**QUICK, "attack": "ripples", "poison_rate": 0.4}),
    cell("lwp", {**QUICK, "attack": "lwp"}),
    cell("badnets, prompts", {**QUICK, "attack": "badnets", "strategies": ["prompt_tuning", "prefix_tuning"]}),
    cell("badnets, proxy", {**QUICK, "attack": "badnets", "setting": "proxy"}),
    cell("insent, proxy", {**QUICK, "attack": "insent", "setting": "proxy"}),
    cell("badnets, RAP", {**QUICK, "attack": "badnets", "strategies": ["lora"], "filters": ["strip", "rap"]}),
    cell("AG News, badnets", {**AG_NEWS, "attack": "badnets"}),
    cell("AG News, insent", {**AG_NEWS, "attack": "insent"}),
]


def attack_cell(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
    """Run `hfbd attack` on one cell and seed. Poisoned models are not kept; predictions and scores are."""
    options = dict(cell.options)
    if "onion" in options["filters"]:
        from benchmarks.onion_lm import language_model

        options["language_model"] = str(language_model(LANGUAGE_MODEL))
    shared = RUNS / "shared" / f"{Path(options['task']).name}-{options.get('setting', 'full_data')}"
    run = AttackArguments(
        **options,
        seeds=[seed],
        output_dir=str(folder),
        shared_dir=str(shared),
        save_models=False,
    )
    outcome = execute(resolve(run))
    # Without the path: where the data lay is nobody's concern.
    named = {"dataset": Path(options["task"]).name}
    records = [dataclasses.replace(r, setting=f"{cell.setting}: {r.setting}", **named) for r in outcome.records]
    return records, "\n".join([outcome.table, "", outcome.verdict, *outcome.notes])


if __name__ == "__main__":
    run_grid("weight_poisoning", CELLS, seeds=(1, 2, 3), run=attack_cell)
