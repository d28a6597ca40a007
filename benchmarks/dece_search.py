"""Where does DeCE lower attack success in classification? Every setting tried, on validation rows and seeds of its own.

A regime is a task with an attack and a way of training; in each, every setting of `SETTINGS` is trained beside its controls: the
clean reference (the floor), the undefended model and, where DeCE lowers ASR, matched decay (plain cross-entropy with DeCE's mean
pull per epoch as a factor on the learning rate). Test rows are never read. `--shard i/n` runs every n-th cell, for several
processes or machines; a shard that runs beside others appends to a file of its own (`--output`).
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from benchmarks.grid import RESULTS, Cell, plan_of, shard
from benchmarks.many_topics import write_task
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.matched_decay import MatchedDecay
from hf_backdoor_defense.experiment.arms import SeedData, train_arm
from hf_backdoor_defense.experiment.run import seed_data
from hf_backdoor_defense.reporting.results import Record, append_records, environment, read_records

SHARED = Path(__file__).parents[2] / "shared" / "data"
MANY = Path("runs") / "tasks" / "many-topics"
SEEDS = (100, 101)
WORTH_A_CONTROL = 0.05  # where DeCE lowers ASR by less there is no gain that an early stop could explain

# Three layers of MiniLM with frozen embeddings, batch 32, linear decay after 6 % warm-up, as the benchmark trains.
SHAPE: dict[str, Any] = {"num_layers": 3, "frozen_layers": 0, "max_length": 48, "num_train_epochs": 4, "limit": 3000}
SST2 = {**SHAPE, "task": str(SHARED / "sst2"), "target": 1, "learning_rate": 2e-4}
AG_NEWS = {**SHAPE, "task": str(SHARED / "ag_news"), "target": 0, "learning_rate": 2e-4}
MANY_TOPICS = {**SHAPE, "task": str(MANY), "target": 0, "learning_rate": 3e-4, "max_length": 32, "num_train_epochs": 8}
REGIMES: dict[str, dict[str, Any]] = {
    "SST-2, 2 %": {**SST2, "poison_rate": 0.02},
    "SST-2, 5 %": {**SST2, "poison_rate": 0.05},
    "SST-2, 1 %": {**SST2, "poison_rate": 0.01},
    "SST-2, 2 %, rate 5e-5, 8 epochs": {**SST2, "poison_rate": 0.02, "learning_rate": 5e-5, "num_train_epochs": 8},
    "AG News, 2 %": {**AG_NEWS, "poison_rate": 0.02},
    "AG News, 1 %": {**AG_NEWS, "poison_rate": 0.01},
    "many topics, 2 %": {**MANY_TOPICS, "poison_rate": 0.02},
    "many topics, 1 %": {**MANY_TOPICS, "poison_rate": 0.01},
    "many topics, 2 %, all layers": {**MANY_TOPICS, "poison_rate": 0.02, "num_layers": None, "frozen_layers": 2},
}
# The second round: what the first one pointed to, an attack that is learned after the first epoch, in which DeCE still waits.
LATE: dict[str, dict[str, Any]] = {
    "SST-2, 2 %, rate 5e-4": {**SST2, "poison_rate": 0.02, "learning_rate": 5e-4},
    "SST-2, 5 %": REGIMES["SST-2, 5 %"],
    "AG News, 5 %": {**AG_NEWS, "poison_rate": 0.05},
    "SST-2, 2 %, rate 3e-4": {**SST2, "poison_rate": 0.02, "learning_rate": 3e-4},
    "SST-2, 2 %, rate 1e-3": {**SST2, "poison_rate": 0.02, "learning_rate": 1e-3},
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"alpha_base": 0.8},
    {"alpha_base": 0.6},
    {"alpha_base": 0.8, "warmup_epochs": 1},
    {"alpha_base": 0.6, "warmup_epochs": 1},
    {"alpha_base": 0.9},
    {"alpha_base": 0.7},
    {"alpha_base": 0.4, "warmup_epochs": 1},
]
LATE_SETTINGS: list[dict[str, Any]] = [
    {},
    {"alpha_base": 0.4, "warmup_epochs": 1},
    {"alpha_base": 0.2, "warmup_epochs": 1},
    {"alpha_base": 0.3, "warmup_epochs": 1},
    {"alpha_base": 0.1, "warmup_epochs": 1},
    {"alpha_base": 0.5, "warmup_epochs": 1},
    {"alpha_base": 0.3, "warmup_epochs": 1, "label_smoothing": 0.0},
    {"alpha_base": 0.4, "warmup_epochs": 1, "schedule": "fractional"},
]
TOOK = 0.9  # in the second round, an undefended ASR below this leaves nothing to defend against


def describe(fields: dict[str, Any]) -> str:
    """A setting in words, "default" for the method's own."""
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "default"


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(prog="benchmarks.dece_search", description=__doc__)
    parser.add_argument(
        "--shard", type=shard, default=shard("1/1"), help="i/n: every n-th regime and seed, from the i-th on"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "dece_search.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--round", type=int, choices=(1, 2), nargs="+", default=[1, 2])
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not (MANY / "test.jsonl").is_file():
        write_task(MANY)
    rounds = {1: (REGIMES, SETTINGS, 0.0), 2: (LATE, LATE_SETTINGS, TOOK)}
    cells = [(n, regime, seed) for n in args.round for seed in args.seeds for regime in rounds[n][0]]
    for n, regime, seed in cells[args.shard]:
        regimes, settings, least = rounds[n]
        if not Path(regimes[regime]["task"]).exists():
            print(f"{regime}: skipped, its data is not here (it is not part of the package)")
            continue
        search(regime, regimes[regime], settings, seed, args.output, least_asr=least)


def search(
    regime: str, how: dict[str, Any], settings: list[dict[str, Any]], seed: int, path: Path, *, least_asr: float
) -> None:
    """One regime with one seed: the controls once, then each setting, with its matched decay where ASR fell."""
    done = {r.setting for r in read_records(path) if r.seed == seed} if path.exists() else set()
    folder = Path("runs") / "dece-search" / regime.replace(" ", "-").replace(",", "") / str(seed)
    options = {**how, "eval_split": "validation", "disable_tqdm": True, "save_strategy": "no"}
    plan = plan_of(Cell(regime, {"simulate": "badnets", **options}, defense=()), seed, folder)
    data = seed_data(plan, seed)

    def measure(defense: str, setting: str, **how: Any) -> tuple[list[Record], list[Any]]:
        title = f"{setting}, seed {seed}: {defense}"
        result, objectives = train_arm(
            plan.run, plan.training, data, arm=defense, title=title, folder=folder / "arm", **how
        )
        shutil.rmtree(folder / "arm")
        return _records(result, data, plan, defense, setting, seed), objectives

    if regime not in done:
        clean, _ = measure("clean_reference", regime, clean=True)
        append_records(path, clean + measure("undefended", regime)[0])
    undefended = [r for r in read_records(path) if (r.setting, r.seed, r.defense) == (regime, seed, "undefended")]
    if _value(undefended, "asr") < least_asr:
        print(f"{regime}, seed {seed}: the attack did not take")
        return
    for fields in settings:
        setting = f"{regime}; {describe(fields)}"
        if setting in done:
            continue
        records, (objective,) = measure("dece", setting, objectives=[DeCE(**fields)])
        if _value(records, "asr") < _value(undefended, "asr") - WORTH_A_CONTROL:
            pull = [max(value, 1e-6) for value in objective.pull_per_epoch()]
            records += measure("matched_decay", setting, objectives=[MatchedDecay(pull=pull)])[0]
        append_records(path, records)


def _value(records: list[Record], metric: str) -> float:
    return next(record.value for record in records if record.metric == metric)


def _records(result: dict[str, Any], data: SeedData, plan: Any, defense: str, setting: str, seed: int) -> list[Record]:
    common = Record(
        benchmark="dece_search",
        dataset=Path(str(plan.run.task)).name,
        model=f"{plan.run.model_name}, {plan.run.num_layers or 'all'} layers",
        attack=str(plan.run.simulate),
        defense=defense,
        setting=setting,
        seed=seed,
        metric="ca",
        value=0.0,
        env=environment(),
    )
    asr = "ftr" if defense == "clean_reference" else "asr"
    records = [
        dataclasses.replace(common, metric=metric, **result[key])
        for metric, key in (("ca", "ca"), (asr, "asr"), ("r_acc", "r_acc"))
    ]
    for account in result["objectives"].values():
        if "target_pull" in account["activity"]:
            pull = account["activity"]["target_pull"]
            records.append(dataclasses.replace(common, metric="target_pull", value=pull))
    return records


if __name__ == "__main__":
    main()
