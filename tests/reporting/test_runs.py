"""Reading a run folder: whole runs are read as they are, everything else is refused with the file and the place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_backdoor_defense.reporting.runs import read_run
from tests.reporting.run_folders import payload, suspects, write_run

Change = Callable[[dict[str, Any]], Any]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = payload()
    run = read_run(write_run(tmp_path / "mine", results))
    assert run.name == "mine" and run.trigger == "cf" and run.gates == {"max_asr_over_floor": 0.5, "max_ca_drop": 0.03}
    assert set(run.arms) == {0, 1, 2} and run.arms[1]["dece"].history == results["arms"]["1"]["dece"]["history"]
    assert list(run.between[2]) == ["trajectory, round 1"] and [h.name for h in run.histograms] == ["pull", "scores"]
    assert [row["rank"] for row in run.suspects] == list(range(1, 21))
    assert len(run.records) == len(results["records"])


def test_suspects_are_those_of_the_first_seed(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rows=[*suspects(3, 4), *suspects(1, 9)]))
    assert [(row["seed"], row["rank"]) for row in run.suspects] == [(3, i) for i in range(1, 5)]
    assert read_run(write_run(tmp_path / "none", rows=[])).suspects == []


WRONG: dict[str, tuple[Change, str]] = {
    "another schema": (lambda p: p.update(schema=2), "must have `schema` 1, got 2"),
    "no schema": (lambda p: p.pop("schema"), "must have `schema` 1, got None"),
    "no records": (lambda p: p.update(records=[]), "must hold at least one record"),
    "records that are none": (lambda p: p.update(records={}), "a list `records`"),
    "a share above one": (lambda p: p["records"][2].update(value=1.5), "record 3: `ca` must be in 0..1, got 1.5"),
    "an unknown key": (lambda p: p["records"][0].update(extra=1), "record 1 must be an object with the keys"),
    "the same record twice": (lambda p: p["records"].append(p["records"][0]), "hold a measurement once"),
    "a verdict that is a number": (lambda p: p.update(verdict=3), "`verdict` must be text"),
    "failures that are text": (lambda p: p.update(failures="none"), "`failures` must be a list"),
    "a plan that is a list": (lambda p: p.update(plan=[1]), "`plan` must be an object"),
    "arms without seeds": (lambda p: p.update(arms={"dece": {}}), "`arms` must be by seed, got 'dece'"),
    "a curve out of range": (
        lambda p: p["arms"]["0"]["dece"]["curve"][0].update(asr=3.0),
        "`arms.0.dece.curve` must be points with an epoch and shares in 0..1",
    ),
    "a history of words": (
        lambda p: p["arms"]["0"]["dece"]["history"][0].update(loss="low"),
        "`arms.0.dece.history.loss` must be a finite number, got 'low'",
    ),
    "a history without epochs": (
        lambda p: p["arms"]["1"]["dece"]["history"][0].pop("epoch"),
        "`arms.1.dece.history` must be points with an epoch",
    ),
    "activity that is not a number": (
        lambda p: p["arms"]["0"]["dece"]["objectives"]["dece"].update(activity={"a": True}),
        "`arms.0.dece.dece.activity.a` must be a finite number, got 'True'",
    ),
    "edges that fall": (lambda p: p["histograms"][0]["edges"].reverse(), "ascending"),
    "counts that are missing": (lambda p: p["histograms"][0]["seeds"]["0"]["other"].pop(), "52 counts"),
    "counts below zero": (lambda p: p["histograms"][1]["seeds"]["0"]["planted"].__setitem__(0, -1), "52 counts"),
    "a histogram of nobody": (lambda p: p["histograms"][0].pop("arm"), "`histograms[0].arm` must be text"),
    "a histogram without seeds": (lambda p: p["histograms"][0].update(seeds={}), "counts by seed"),
    "a gate that is text": (lambda p: p.update(gates={"max_ca_drop": "low"}), "`gates.max_ca_drop`"),
    "a filter without a name": (lambda p: p.update(filters={"0": [1]}), "`filters.0` must be an object"),
    "a filter's threshold that is text": (
        lambda p: p.update(filters={"0": {"psim": {"calibration": {"upper": "high"}}}}),
        "`filters.0.psim.calibration` must be a finite number, got 'high'",
    ),
    "a command that is text": (lambda p: p.update(command="hfbd"), "`command` must be a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_run_writes_is_refused(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    results = json.loads(json.dumps(payload()))
    change(results)
    folder = write_run(tmp_path / "run", results)
    with pytest.raises(ValueError) as caught:
        read_run(folder)
    assert message in str(caught.value) and str(folder / "results.json") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", '{"schema": 1, "records": [], "verdict": NaN}'])
def test_files_that_are_not_results_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json"):
        read_run(tmp_path)


def test_infinite_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "results.json").read_text().replace('"learning_rate": 0.0003', '"learning_rate": Infinity', 1)
    (folder / "results.json").write_text(text)
    with pytest.raises(ValueError, match="finite numbers, got 'Infinity'"):
        read_run(folder)


@pytest.mark.parametrize("line", ["{", "[]", '{"seed": 0}', '{"seed": "0", "rank": 1}'])
def test_suspects_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run", rows=suspects(0, 3))
    with (folder / "suspects.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="suspects.jsonl, line 4 must be an object"):
        read_run(folder)


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist.*--output_dir"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold results.json.*Finish the run"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        read_run(tmp_path / "file")
