"""Where the defaults of D3, ULRL and their host come from: every setting that was tried, on validation rows and seeds of its own.

    python -m benchmarks.purify_search

A setting purifies the backdoored model of `benchmarks.purify` (seeds 100 and 101, reported nowhere else) and is judged on
*validation* rows, clean and triggered; no test row is read. The rate of the host is judged by the control: where plain
fine-tuning removes the backdoor, nothing can be credited to a defense.
"""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.grid import Cell, run_grid
from benchmarks.purify import (
    DATA,
    PROBLEMS,
    RUNS,
    _costs,
    _kept,
    _key,
    _line,
    _scores,
    models,
    purified,
    rows_of,
    scored,
)
from benchmarks.purify import loaded as load_model
from hf_backdoor_defense.experiment.purify_training import build_purifier
from hf_backdoor_defense.reporting.results import Record, environment

NOISE = {"targets": "all-linear", "warm_up": "noise"}
GENTLE = {"unlearn_lr": 1e-3, "rank": "score"}


def search_cell(cell: Cell, seed: int, folder: Path) -> tuple[list[Record], str]:
    """One setting on one backdoored model."""
    options = cell.options
    problem = PROBLEMS[options["problem"]]
    rows = rows_of(problem, seed, judged="validation")
    place = RUNS / "search" / options["problem"].replace(" ", "-") / str(seed)
    undefended = models(problem, rows, seed, place, clean=False)["undefended"]
    common: dict[str, Any] = {
        "benchmark": "purify_search", "dataset": _key(problem), "model": "minilm" if problem.kind == "text" else "tiny-vit",
        "attack": problem.trigger["name"], "seed": seed, "env": environment(),
    }  # fmt: skip
    name = cell.setting.replace(" ", "_").replace("/", "-").replace(":", "-")
    names = rows.train.features["label"].names
    before, _ = _kept(place / "before.json", lambda: (scored(load_model(problem, undefended, names), rows), {}))
    if options["method"] == "undefended":
        return _scores(before, "undefended", cell.setting, common), f"{cell.setting} {seed}: {_line(before)}"
    objective = build_purifier(options["method"], options["fields"])
    after, report = _kept(
        place / f"{name}.json", partial(purified, problem, undefended, rows, objective, seed, **options["host"])
    )
    records = _scores(after, options["method"], cell.setting, common)
    records += _costs(after, before, report, options["method"], cell.setting, common)
    return records, f"{cell.setting} {seed}: {_line(after)} {report['evidence'].get('suspected_classes', '')}"


def cells(problem: str, method: str, fields: dict[str, Any], hosts: list[dict[str, Any]]) -> list[Cell]:
    """One method with some fields under several hosts."""
    named = ", ".join(f"{key} {value}" for key, value in fields.items())
    found = []
    for host in hosts:
        settings = ", ".join(f"{key} {value:g}" for key, value in host.items())
        setting = "; ".join(part for part in (problem, method, named, settings) if part)
        options = {"problem": problem, "method": method, "fields": fields, "host": host}
        needs = DATA / "sst2" if "sst2" in problem else None
        found.append(Cell(setting, options, needs=needs))
    return found


def digits(problem: str) -> list[Cell]:
    """What was tried on digits."""

    def host(rate: float, epochs: int = 60) -> dict[str, Any]:
        return {"learning_rate": rate, "epochs": epochs}

    slow, mid, fast = host(1e-3), host(3e-3), host(1e-2)
    attention = {"targets": ["*.attention.*"], "warm_up": "noise"}
    last = {"targets": ["vit.layers.2.*", "classifier"], "warm_up": "random"}
    return [
        *cells(problem, "undefended", {}, [{}]),
        *cells(problem, "fine_tuning", {}, [slow, mid, fast, host(2e-2), host(1e-2, 200)]),
        *cells(problem, "d3", {"preset": "official_code"}, [mid, fast]),
        *cells(problem, "d3", {**NOISE, "lam": 2.0}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 5.0}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 10.0}, [fast, mid]),
        *cells(problem, "ulrl", {}, [slow, mid, fast]),
        *cells(problem, "d3", {**attention, "lam": 5.0}, [fast]),
        *cells(problem, "d3", {**attention, "lam": 10.0}, [fast, host(1e-2, 200)]),
        *cells(problem, "ulrl", {"max_rows": 5, "z_threshold": 1.0, "rank": "score"}, [mid]),
        *cells(problem, "ft_sam", {}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 5.0, "eps": 0.01}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 5.0}, [host(1e-2, 120)]),
        *cells(problem, "ulrl", {"alpha": 0.1}, [fast]),
        *cells(problem, "ulrl", {"unlearn_lr": 1e-3}, [slow]),
        *cells(problem, "ulrl", {"units": "hidden"}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 0.5}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 50.0}, [fast]),
        *cells(problem, "d3", {**NOISE, "lam": 10.0, "hinge": "batch", "rescale": False}, [fast]),
        *cells(problem, "d3", {**last, "lam": 0.5}, [fast]),
        *cells(problem, "d3", {**last, "warm_up": "noise", "lam": 10.0}, [fast]),
        *cells(problem, "d3", {"targets": "all-linear", "warm_up": "near", "lam": 2.0}, [fast]),
    ]


def texts(problem: str) -> list[Cell]:
    """What was tried on texts."""
    mid, fast = ({"learning_rate": rate, "epochs": 8} for rate in (5e-3, 1e-2))
    return [
        *cells(problem, "undefended", {}, [{}]),
        *cells(problem, "fine_tuning", {}, [mid, fast]),
        *cells(problem, "d3", {**NOISE, "lam": 2.0}, [mid]),
        *cells(problem, "ulrl", {}, [mid]),
        *cells(problem, "d3", {"targets": "all-linear", "warm_up": "near", "lam": 2.0}, [mid]),
        *cells(problem, "ft_sam", {}, [mid]),
        *cells(problem, "ft_sam", {"rho": 0.5}, [mid]),
    ]


CELLS = [*digits("digits patch"), *digits("digits blend"), *texts("sst2 badnets")]


if __name__ == "__main__":
    run_grid("purify_search", CELLS, seeds=(100, 101), run=search_cell)
