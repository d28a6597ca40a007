"""Cells x seeds of `hfbd train` (or another verb: `run`), written to results/NAME.jsonl as they come.

What is there is skipped; what was stopped goes on. `--shard i/n` runs every n-th cell and seed, for several processes or
machines: each appends to a file of its own (`--output`), and `--merge FILE ...` puts the files together in the order of a single
run, so that tables cannot tell the difference (docs/distributed.md).
"""

import argparse
import dataclasses
import os
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
from hf_backdoor_defense.reporting.results import Record, append_records, cell_key, read_records

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


def shard(text: str) -> slice:
    """What `i/n` leaves of a list: every n-th item, from the i-th on. For argparse.

    >>> list("abcdefg")[shard("2/3")]
    ['b', 'e']
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"must be i/n with 1 <= i <= n, got {text!r}: the n shards of a grid are 1/n to n/n. For all of it leave it out."
        )
    return slice(int(index) - 1, None, int(count))


def from_files(paths: list[Path]) -> Callable[[Cell, int, Path], tuple[list[Record], str]]:
    """A `run` that finds the records of a cell and seed in files that shards wrote.

    Raises:
        ValueError: two files hold the same measurement.
    """
    records = [record for path in paths for record in read_records(path)]
    keys = [cell_key(record) for record in records]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} is there twice in {', '.join(map(str, paths))}: name each shard's file once.")

    def run(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
        found = [r for r in records if (r.setting.partition(":")[0], r.seed) == (cell.setting, seed)]
        return found, f"{cell.setting}, seed {seed}: {len(found) or 'no'} records"

    return run


def settle(path: Path, records: list[Record], *, replace: bool) -> None:
    """Before a merge: of cells that `path` holds with other figures than `records` do, put the new ones in the old ones' place.

    Raises:
        ValueError: there is such a cell, and `replace` is False. The file is as it was.
    """
    there, new = _by_cell(read_records(path) if path.exists() else []), _by_cell(records)
    stale = [c for c in new if c in there and sorted(map(repr, new[c])) != sorted(map(repr, there[c]))]
    if stale and not replace:
        shown = "; ".join(f"{setting}, seed {seed}" for setting, seed in stale)
        raise ValueError(
            f"{path} has other records of {shown}: a merge would keep those and drop the new ones. Add --replace to take the new "
            "ones, or merge into another file (--output)."
        )
    if stale:
        partial = path.with_name(f".{path.stem}.partial.jsonl")
        partial.unlink(missing_ok=True)
        kept = [record for c, old in there.items() for record in (new[c] if c in stale else old)]
        os.replace(append_records(partial, kept), path)


def require_same_model(path: Path, facts: dict[str, Any]) -> None:
    """Raises SystemExit where `path` holds figures of another pretrained model than `facts` tell of: a table must not mix two."""
    told = [r.env.get("pretraining") for r in read_records(path)] if path.exists() else []
    others = [other for other in told if other != facts]
    if others:
        raise SystemExit(
            f"{path} must hold figures of one pretrained model, got {len(others)} of {len(told)} records of another than the one "
            "here: a table would mix the two. Write to a file of its own (--output FILE), or move that one away."
        )


def _by_cell(records: list[Record]) -> dict[tuple[str, int], list[Record]]:
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        found.setdefault((record.setting.partition(":")[0], record.seed), []).append(record)
    return found


def run_grid(
    name: str,
    cells: list[Cell],
    seeds: tuple[int, ...],
    *,
    run: Callable[[Cell, int, Path], tuple[list[Record], str]] = train_cell,
    pretrained: dict[str, Any] | None = None,
) -> None:
    """The command line of a benchmark. The setting of a cell's records is its own, or begins with it and a colon.

    `pretrained`: what the pretrained model of all cells says of itself, where the records keep that (`env["pretraining"]`).
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}")
    parser.add_argument("--only", choices=[cell.setting for cell in cells], help="run one cell")
    parser.add_argument("--extended", action="store_true", help="run the extended cells too")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="run these seeds")
    parser.add_argument(
        "--shard", type=shard, default=shard("1/1"), help="i/n: every n-th cell and seed, from the i-th on"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.jsonl", help="where the records go")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="run nothing: take the records from these files of shards"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="with --merge: what the file holds of these cells gives way to what the shards hold",
    )
    args = parser.parse_args()
    if args.replace and not args.merge:
        parser.error("--replace belongs to --merge: a grid runs what is not there. Remove the lines to measure again.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    path = args.output
    if pretrained is not None and not args.merge:
        require_same_model(path, pretrained)
    chosen = [c for c in cells if (args.only == c.setting if args.only else args.extended or not c.extended)]
    # Seeds outside: a stopped grid has every cell once before any twice.
    todo = [(cell, seed) for seed in args.seeds for cell in chosen][args.shard]
    if args.merge:
        run = from_files(args.merge)
        found = [record for cell, seed in todo for record in run(cell, seed, path)[0]]
        settle(path, [dataclasses.replace(record, benchmark=name) for record in found], replace=args.replace)
    for cell, seed in todo:
        if not args.merge and cell.needs is not None and not cell.needs.exists():
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
