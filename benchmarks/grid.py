"""Cells x seeds of `hfbd train` (or another verb: `run`), written to results/NAME.jsonl as they come.

What is there is skipped; what was stopped goes on. `--shard i/n` runs every n-th cell and seed, for several processes or
machines: each appends to a file of its own (`--output`), and the files put together are the single run's.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from hf_backdoor_defense.experiment.arguments import PRESETS, RunArguments, build_defenses, defaults
from hf_backdoor_defense.experiment.plan import resolve
from hf_backdoor_defense.experiment.run import execute
from hf_backdoor_defense.reporting.results import Record, append_records, read_records

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Cell:
    """One setting: `options` go over the preset "offline"; `setting` tells its records apart."""

    setting: str
    options: dict[str, Any] = field(default_factory=dict)
    defense: tuple[Any, ...] = ("dece", "trajectory")
    extended: bool = False
    needs: Path | None = None  # data that is not part of the package


def train_cell(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
    """Records, named after the cell, and what to print."""
    outcome = execute(plan_of(cell, seed, folder))
    shutil.rmtree(folder / "arms", ignore_errors=True)
    return [
        dataclasses.replace(r, setting=cell.setting) for r in outcome.records
    ], f"{outcome.table}\n{outcome.verdict}"


def run_grid(
    name: str,
    cells: list[Cell],
    seeds: tuple[int, ...],
    *,
    run: Callable[[Cell, int, Path], tuple[list[Record], str]] = train_cell,
) -> None:
    """The command line of a benchmark. The setting of a cell's records is its own, or begins with it and a colon."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}")
    parser.add_argument("--only", choices=[cell.setting for cell in cells], help="run one cell")
    parser.add_argument("--extended", action="store_true", help="run the extended cells too")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="run these seeds")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th cell and seed, from the i-th on")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.jsonl", help="where the records go")
    args = parser.parse_args()
    index, count = (int(part) for part in args.shard.split("/"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    path = args.output
    chosen = [c for c in cells if (args.only == c.setting if args.only else args.extended or not c.extended)]
    # Seeds outside: a stopped grid has every cell once before any twice.
    for cell, seed in [(cell, seed) for seed in args.seeds for cell in chosen][index - 1 :: count]:
        if cell.needs is not None and not cell.needs.exists():
            print(f"{cell.setting}: skipped, its data is not here (it is not part of the package)")
            continue
        done = {(r.setting.partition(":")[0], r.seed) for r in read_records(path)} if path.exists() else set()
        if (cell.setting, seed) in done:
            print(f"{cell.setting}, seed {seed}: there already")
            continue
        folder = Path("runs") / f"bench-{name}" / cell.setting / str(seed)
        records, text = run(cell, seed, folder)
        print(f"{text}\n", flush=True)
        append_records(path, [dataclasses.replace(r, benchmark=name) for r in records])


def plan_of(cell: Cell, seed: int, folder: Path) -> Any:
    """The plan of one cell and seed: the preset "offline" with the cell's options over it."""
    options = {**defaults(), **PRESETS["offline"], **cell.options, "seeds": [seed], "output_dir": str(folder)}
    options.pop("defense")
    parser = HfArgumentParser([RunArguments, TrainingArguments])
    run, training = parser.parse_dict(options)
    specs = [{"name": item} if isinstance(item, str) else dict(item) for item in cell.defense]
    return resolve(run, training, build_defenses(specs))
