"""What the trajectory filter should compare and how much it should drop: every choice from the same trainings.

One undefended training per task, attack and seed records snapshots at many fractions, a second one leaves the default's first
suspects out. Each choice then ranks the same rows, and each rule for the share says what it would drop. Planted rows are known
here and judge the choices; no test row is read, and the seeds are reported nowhere else. What was recorded stays in
`runs/search-trajectory`; records are appended to results/trajectory_search.jsonl. `--shard i/n` as everywhere.

| metric | of |
|---|---|
| precision, recall, auroc | a first ranking: at n (as many rows as were planted), within the first 10 %, over all rows |
| recall, frr | a rule for the share, after the second ranking: planted rows that it drops, clean rows that it drops |
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers.utils import logging

from benchmarks.dece_search import AG_NEWS, SST2
from benchmarks.grid import RESULTS, Cell, plan_of, shard
from hf_backdoor_defense.defenses.trajectory import END, REFIT, TrajectoryFilter
from hf_backdoor_defense.evaluation.metrics import auroc, precision_at, recall_at
from hf_backdoor_defense.experiment.arms import train_arm
from hf_backdoor_defense.experiment.run import seed_data
from hf_backdoor_defense.reporting.results import Record, append_records, environment, read_records

FRACTIONS = [0.0, 0.1, 0.2, 0.33, 0.5, 0.75, 1.0, 1.5]
CHOICES: list[list[float]] = [[f] for f in FRACTIONS] + [[0.0, 0.5], [0.0, 1.0], [0.5, 1.0]]
RULES: list[dict[str, Any]] = [
    {"min_rise": None},
    {"min_rise": None, "drop_share": 0.05},
    {"min_rise": 0.0},
    {"min_rise": 3.0},
    {"min_rise": 4.0},
]
TASKS: dict[str, dict[str, Any]] = {"offline:docstrings": {}, "sst2": SST2, "ag_news": AG_NEWS}
ATTACKS: dict[str, dict[str, Any]] = {
    "BadNets, rate 0.05": {"simulate": "badnets", "poison_rate": 0.05},
    "BadNets, rate 0.04": {"simulate": "badnets", "poison_rate": 0.04},
    "BadNets, rate 0.02": {"simulate": "badnets", "poison_rate": 0.02},
    "BadNets, rate 0.01": {"simulate": "badnets", "poison_rate": 0.01},
    "BadNets, rate 0.005": {"simulate": "badnets", "poison_rate": 0.005},
    "BadNets, rate 0.02, clean-label": {"simulate": "badnets", "poison_rate": 0.02, "clean_label": True},
    "BadNets, rate 0.1, clean-label": {"simulate": "badnets", "poison_rate": 0.1, "clean_label": True},
    "InSent, rate 0.02": {"simulate": "insent", "poison_rate": 0.02},
    "InSent, rate 0.005": {"simulate": "insent", "poison_rate": 0.005},
    "none": {"simulate": None},
}
SEEDS = (100, 101)
FOLDER = Path("runs") / "search-trajectory"


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(prog="benchmarks.trajectory_search", description=__doc__)
    parser.add_argument("--shard", type=shard, default=shard("1/1"), help="i/n: every n-th cell, from the i-th on")
    parser.add_argument("--output", type=Path, default=RESULTS / "trajectory_search.jsonl")
    parser.add_argument("--recorded", action="store_true", help="train nothing: only what lies in the runs folder")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    cells = [(task, attack, seed) for seed in SEEDS for task in TASKS for attack in ATTACKS]
    for task, attack, seed in cells[args.shard]:
        path = FOLDER / f"{task.partition(':')[2] or task}, {attack}, {seed}.npz"
        if not path.is_file():
            if args.recorded:
                continue
            if not Path(TASKS[task].get("task", ".")).exists():
                print(f"{task}: skipped, its data is not here (it is not part of the package)")
                continue
            record(task, attack, seed, path)
        before = read_records(args.output) if args.output.exists() else []
        done = {(r.dataset, r.attack, r.seed) for r in before if r.setting.startswith("second")}
        if (task, attack, seed) not in done:
            append_records(args.output, records_of(path, task, attack, seed))
            print(f"{task}, {attack}, seed {seed}", flush=True)


def record(task: str, attack: str, seed: int, path: Path) -> None:
    """Both trainings of a cell: log-odds by snapshot, which rows were planted, what the models' attack success was."""
    folder = FOLDER / "run"
    options = {
        **TASKS[task],
        **ATTACKS[attack],
        "eval_split": "validation",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    plan = plan_of(Cell(attack, options, defense=()), seed, folder)
    data = seed_data(plan, seed)
    epochs = float(plan.training.num_train_epochs)
    recorder = TrajectoryFilter(fractions=[f for f in FRACTIONS if f < epochs])
    result, (recorder,) = train_arm(
        plan.run, plan.training, data, arm="undefended", title=attack, folder=folder / "first", objectives=[recorder]
    )
    state = recorder.state_dict()
    default = TrajectoryFilter()
    default.load_state_dict(state)
    ranking, follow = default.ranking(), default.refit()
    assert ranking is not None and follow is not None
    _, (follow,) = train_arm(
        plan.run, plan.training, data, arm="again", title=f"{attack}, again", folder=folder / "second", objectives=[follow],
        without=ranking.dropped, aux={"rows": data.train}, evaluate=False,
    )  # fmt: skip
    again = follow.state_dict()
    planted = set()
    if data.poisoned is not None:
        rows = data.poisoned.dataset
        planted = {i for i, bad in zip(rows["row_id"], rows["is_poisoned"], strict=True) if bad}
    arrays = {key: value.numpy() for key, value in state.items() if key.startswith("snapshot_")}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        **arrays,
        row_ids=state["row_ids"].numpy(),
        labels=state["labels"].numpy(),
        planted=np.array([int(i) in planted for i in state["row_ids"]]),
        second_end=again[f"snapshot_{END}"].numpy(),
        second_refit=again[f"snapshot_{REFIT}"].numpy(),
        asr=np.array(np.nan if result["asr"] is None else result["asr"]["value"]),
        env=np.array(json.dumps(environment())),
    )
    shutil.rmtree(folder)


def records_of(path: Path, task: str, attack: str, seed: int) -> list[Record]:
    """What every choice and every rule makes of one recorded cell."""
    cell = np.load(path)
    planted, rows = cell["planted"], len(cell["planted"])
    base = {"row_ids": torch.tensor(cell["row_ids"]), "labels": torch.tensor(cell["labels"]), "seconds": 0.0}
    found: list[tuple[str, str, str, float]] = []
    if np.isfinite(cell["asr"]):
        found.append(("undefended", "validation rows", "asr", float(cell["asr"])))
    snapshots = {key: torch.tensor(cell[key]) for key in cell.files if key.startswith("snapshot_")}
    for choice in CHOICES:
        if not planted.any() or any(f"snapshot_{f:g}" not in snapshots for f in choice):
            continue
        method = TrajectoryFilter(fractions=choice)
        method.load_state_dict({**base, **snapshots, "second": False})
        ranking = method.ranking()
        assert ranking is not None
        hits = _hits(ranking.row_ids, cell)
        setting = f"first ranking, fractions={choice}"
        found.append(("trajectory", setting, "precision", precision_at(hits, int(planted.sum()))))
        found.append(("trajectory", setting, "recall", recall_at(hits, round(0.1 * rows))))
        found.append(("trajectory", setting, "auroc", auroc(np.asarray(ranking.scores), hits)))
    if "second_refit" in cell.files:
        second = {
            "snapshot_end": torch.tensor(cell["second_end"]),
            "snapshot_refit": torch.tensor(cell["second_refit"]),
        }
        for rule in RULES:
            method = TrajectoryFilter(**rule)
            method.load_state_dict({**base, **second, "second": True})
            ranking = method.ranking()
            assert ranking is not None
            dropped = np.array([int(i) in ranking.dropped for i in cell["row_ids"]])
            setting = ", ".join(f"{name}={value}" for name, value in rule.items())
            found.append(("trajectory", f"second, {setting}", "frr", float(dropped[~planted].mean())))
            if planted.any():
                found.append(("trajectory", f"second, {setting}", "recall", float(dropped[planted].mean())))
    common = {
        "benchmark": "trajectory_search",
        "dataset": task,
        "model": "offline:minilm",
        "attack": attack,
        "seed": seed,
    }
    env = json.loads(str(cell["env"]))
    return [Record(defense=d, setting=s, metric=m, value=v, env=env, **common) for d, s, m, v in found]


def _hits(row_ids: torch.Tensor, cell: Any) -> list[bool]:
    planted = set(cell["row_ids"][cell["planted"]].tolist())
    return [int(i) in planted for i in row_ids]


if __name__ == "__main__":
    main()
