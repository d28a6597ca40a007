"""When to take the early snapshot: every choice from the same runs, on seeds that are reported nowhere else.

One undefended training per attack and seed records snapshots at many fractions; each choice of fractions then ranks the same
training rows. Planted rows are known here and judge the rankings; no test row is read. Appends to
results/trajectory_search.jsonl.
"""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from benchmarks.grid import RESULTS, Cell, plan_of
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.evaluation.metrics import auroc, precision_at, recall_at
from hf_backdoor_defense.experiment.arms import train_arm
from hf_backdoor_defense.experiment.run import seed_data
from hf_backdoor_defense.reporting.results import Record, append_records, environment, read_records

FRACTIONS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5]
CHOICES = [[f] for f in FRACTIONS] + [[0.0, 0.5], [0.25, 0.5, 0.75], [0.5, 1.0]]

ATTACKS: dict[str, dict[str, Any]] = {
    "BadNets, rate 0.04": {"simulate": "badnets"},
    "InSent, rate 0.04": {"simulate": "insent"},
}
SEEDS = (100, 101)


def main() -> None:
    """Run what is not there yet."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    path = RESULTS / "trajectory_search.jsonl"
    for attack, options in ATTACKS.items():
        for seed in SEEDS:
            done = {(r.attack, r.seed) for r in read_records(path)} if path.exists() else set()
            if (attack, seed) in done:
                print(f"{attack}, seed {seed}: there already")
                continue
            folder = Path("runs") / "search-trajectory" / attack.replace(" ", "-") / str(seed)
            plan = plan_of(Cell(attack, {**options, "eval_split": "validation"}, defense=()), seed, folder)
            data = seed_data(plan, seed)
            assert data.poisoned is not None
            rows = data.poisoned.dataset
            planted = {i for i, bad in zip(rows["row_id"], rows["is_poisoned"], strict=True) if bad}
            recorder = TrajectoryFilter(fractions=FRACTIONS)
            result, (recorder,) = train_arm(
                plan.run, plan.training, data, arm="undefended", title=f"{attack}, seed {seed}", folder=folder,
                objectives=[recorder],
            )  # fmt: skip
            state = recorder.state_dict()
            records = []
            for choice in CHOICES:
                method = TrajectoryFilter(fractions=choice)
                method.load_state_dict(state)
                records += _records(method, planted, attack, f"fractions={choice}", seed)
            asr = result["asr"]
            records.append(_record("undefended", attack, "validation rows", seed, "asr", asr["value"], asr["n"]))
            append_records(path, records)


def _records(method: TrajectoryFilter, planted: set[int], attack: str, setting: str, seed: int) -> list[Record]:
    ranking = method.ranking()
    assert ranking is not None
    hits = [row_id in planted for row_id in ranking.row_ids.tolist()]
    ten = round(0.1 * len(hits))
    found = {
        "precision": precision_at(hits, len(planted)),
        "recall": recall_at(hits, ten),
        "auroc": auroc(np.asarray(ranking.scores), hits),
    }
    return [_record("trajectory", attack, setting, seed, metric, value) for metric, value in found.items()]


def _record(
    defense: str, attack: str, setting: str, seed: int, metric: str, value: float, n: int | None = None
) -> Record:
    record = Record(
        benchmark="trajectory_search",
        dataset="offline:docstrings",
        model="offline:minilm",
        attack=attack,
        defense=defense,
        setting=setting,
        seed=seed,
        metric=metric,
        value=value,
        env=environment(),
    )
    return dataclasses.replace(record, n=n)


if __name__ == "__main__":
    main()
