"""Records: round trips, half lines at every byte, refusals with a neighbor that passes, where a number was measured."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hf_backdoor_defense.evaluation.metrics import Estimate, wilson
from hf_backdoor_defense.reporting import results
from hf_backdoor_defense.reporting.results import (
    METRICS,
    SHARES,
    Record,
    append_records,
    cell_key,
    environment,
    read_records,
    write_json,
)

CELL = dict(
    benchmark="trajectory", dataset="sst2", model="minilm", attack="badnets", defense="dece", setting="", seed=0
)


def make(**changed: object) -> Record:
    return Record(**{**CELL, "metric": "ca", "value": 0.5, **changed})


def several(seed: int, n: int) -> list[Record]:
    rng = np.random.default_rng(seed)
    names = ["plain", "naïve “quotes”", 'back\\slash "x"', "line\nbreak", "ünï 中文"]
    return [
        make(
            setting=str(rng.choice(["", *names])),
            model=str(rng.choice(names)),
            seed=int(rng.integers(0, 2**40)),
            value=float(rng.random()),
            n=None if rng.random() < 0.5 else int(rng.integers(1, 1000)),
            **({} if rng.random() < 0.5 else {"low": float(-rng.random()), "high": float(1 + rng.random())}),
            env={"torch": "2.13.0", "gpu": None, "cpus": 2, "dirty": True},
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_both_files_give_back_what_was_written(tmp_path: Path, seed: int) -> None:
    records = several(seed, 20)
    assert read_records(append_records(tmp_path / "deep" / "er" / "b.jsonl", records)) == records
    assert read_records(write_json(tmp_path / "results.json", {"records": records, "verdict": "x"})) == records
    lines = (tmp_path / "deep" / "er" / "b.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(r) for r in records]


def test_appending_in_pieces_equals_appending_at_once(tmp_path: Path) -> None:
    records = several(0, 7)
    once = append_records(tmp_path / "once.jsonl", records)
    for record in records:
        pieces = append_records(tmp_path / "pieces.jsonl", [record])
    append_records(pieces, [])
    assert pieces.read_bytes() == once.read_bytes()
    assert read_records(append_records(tmp_path / "none.jsonl", [])) == []


def test_a_line_cut_at_any_byte_is_ignored_and_then_repaired(tmp_path: Path) -> None:
    first, second, third = several(1, 3)
    path = tmp_path / "b.jsonl"
    kept = append_records(path, [first]).read_bytes()
    whole = append_records(path, [second]).read_bytes()
    expected_after = append_records(tmp_path / "c.jsonl", [first, third]).read_bytes()
    for end in range(len(kept) + 1, len(whole) - 1):  # at least one byte of the second line, not all of it
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match=r"b\.jsonl.*cut off"):
            assert read_records(path) == [first]
        if (end - len(kept)) % 16 == 1:  # waiting for the disk takes long
            append_records(path, [third])
            assert path.read_bytes() == expected_after
    # Neighbor: only the line break is missing, the record is whole.
    path.write_bytes(whole[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_records(path) == [first, second]
        assert read_records(append_records(path, [third])) == [first, second, third]


def test_a_broken_line_that_is_not_half_a_record_is_refused_and_never_removed(tmp_path: Path) -> None:
    path = append_records(tmp_path / "b.jsonl", [make()])
    path.write_bytes(path.read_bytes() + b"notes by hand")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2 must be JSON"):
        read_records(path)
    append_records(path, [make(seed=1)])
    assert path.read_bytes().splitlines()[1] == b"notes by hand"
    # A cut line that is not the last one is no torn line either.
    whole = append_records(tmp_path / "c.jsonl", [make()]).read_bytes()
    (tmp_path / "c.jsonl").write_bytes(whole[:40] + b"\n" + whole)
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1"):
        read_records(tmp_path / "c.jsonl")


def test_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = append_records(tmp_path / "b.jsonl", [make(), make(seed=1)])
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read_records(path) == [make(), make(seed=1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"epoch": 3}, r"unknown \['epoch'\] and missing \[\]"),
        (lambda d: {k: v for k, v in d.items() if k != "n"}, r"unknown \[\] and missing \['n'\]"),
        (lambda d: d | {"value": "0.5"}, "finite number"),
        (lambda d: d | {"value": float("nan")}, "finite number"),
        (lambda d: d | {"value": None}, "finite number"),
        (lambda d: d | {"seed": 0.5}, "`seed`"),
        (lambda d: d | {"metric": "accuracy"}, "`metric`"),
        (lambda d: [d], "must be an object"),
    ],
)
def test_reading_names_the_file_and_the_line(tmp_path: Path, change, message: str) -> None:
    good = dataclasses.asdict(make())
    for name, write in (
        ("b.jsonl", lambda p, items: p.write_text("".join(json.dumps(i) + "\n" for i in items))),
        ("results.json", lambda p, items: p.write_text(json.dumps({"records": items}))),
    ):
        path = tmp_path / name
        write(path, [good, good])
        assert len(read_records(path)) == 2
        write(path, [good, change(good)])
        with pytest.raises(ValueError, match=message) as error:
            read_records(path)
        assert re.search(rf"{name}, (line|record) 2\b", str(error.value))


def test_reading_refuses_other_json(tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"records": {}}', "{", ""):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json must be"):
            read_records(tmp_path / "results.json")
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "absent.jsonl")


def test_the_metrics_are_those_of_the_design() -> None:
    listed = (
        "precision, recall, ca, selective_ca, asr, ftr, r_acc, der, aasr, masr, frr, far, auroc, coverage, bleu, exact_match, "
        "parse_rate, perplexity, seconds, peak_bytes, time_ratio, memory_ratio, passes"
    )
    later = {
        "target_pull",
        "aasr_floor",
        "masr_floor",
        "aasr_over_floor",
        "masr_over_floor",
        "control_asr",
        "loss",
        "norm_ratio",
        "dose",
        "suspects",
        "target_suspected",
        "bytes_per_weight",
        *(f"{name}{rows}" for name in ("empty", "cut_off", "repetitive") for rows in ("", "_triggered")),
        *("sentence_bleu", "untriggered_hits", "reference_parse_rate", "bits_per_byte"),
        *("gap", "relative_step", "share_of_loss", "inert", "suppressed", "suppressed_payload"),
    }
    assert set(METRICS) == {*listed.split(", "), *later}
    assert len(METRICS) == len(set(METRICS)) and set(METRICS) >= SHARES
    for metric in METRICS:
        assert make(metric=metric, value=0.25).metric == metric


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"metric": "acc"}, {"metric": "ca"}),
        ({"metric": "CA"}, {"metric": "r_acc"}),
        ({"value": 78.0}, {"value": 0.78}),
        ({"value": -0.01}, {"value": 0.0}),
        ({"value": 1.0000001}, {"value": 1}),
        ({"metric": "seconds", "value": -1.0}, {"metric": "seconds", "value": 78.0}),
        ({"metric": "seconds", "value": float("inf")}, {"metric": "target_pull", "value": -3.0}),
        ({"value": float("nan")}, {"value": np.float32(0.5)}),
        ({"value": True}, {"value": 1.0}),
        ({"value": "0.5"}, {"value": 0.5}),
        ({"seed": -1}, {"seed": 0}),
        ({"seed": 1.0}, {"seed": np.int64(1)}),
        ({"seed": None}, {"seed": 2**40}),
        ({"n": 0}, {"n": 1}),
        ({"n": True}, {"n": None}),
        ({"low": 0.1}, {"low": 0.1, "high": 0.9}),
        ({"high": 0.9}, {"low": -0.3, "high": 1.4}),
        ({"low": 0.9, "high": 0.1}, {"low": 0.5, "high": 0.5}),
        ({"low": 0.1, "high": float("inf")}, {"low": 0, "high": 1}),
        ({"model": ""}, {"setting": ""}),
        ({"setting": None}, {"setting": "rate=0.03"}),
        ({"env": None}, {"env": {}}),
    ],
)
def test_records_refuse_what_is_wrong_and_take_its_neighbor(bad: dict, good: dict) -> None:
    with pytest.raises(ValueError):
        make(**bad)
    assert make(**good) == make(**good)


def test_a_near_miss_of_a_metric_is_suggested() -> None:
    with pytest.raises(ValueError, match="Did you mean `auroc`"):
        make(metric="auroc_")


def test_numbers_become_plain_python() -> None:
    record = make(value=np.float32(0.5), seed=np.int64(3), n=np.int32(4), low=np.float64(0.1), high=1)
    types = [type(getattr(record, name)) for name in ("value", "seed", "n", "low", "high")]
    assert types == [float, int, int, float, float]


def test_an_estimate_keeps_its_interval() -> None:
    estimate = wilson(7, 9)
    record = Record.from_estimate(estimate, metric="asr", env={"torch": "x"}, **CELL)
    assert Estimate(record.value, record.n, record.low, record.high) == estimate
    assert (record.metric, record.defense, record.env) == ("asr", "dece", {"torch": "x"})
    with pytest.raises(TypeError, match="metric"):
        Record.from_estimate(estimate, **CELL)


def test_the_key_is_all_but_the_outcome() -> None:
    base = make()
    outcome = dict(value=0.7, n=3, low=0.1, high=0.9, env={"gpu": "x"})
    assert cell_key(make(**outcome)) == cell_key(base)
    others = {**{name: "other" for name in CELL if name != "seed"}, "seed": 9, "metric": "asr"}
    assert {*others, *outcome} == {f.name for f in dataclasses.fields(Record)}
    assert len({cell_key(base), *(cell_key(make(**{k: v})) for k, v in others.items())}) == 1 + len(others)
    assert len({make(env={"a": 1}), make(env={"a": 1})}) == 1


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "results.json", {"a": 1})
    before = path.read_bytes()
    for payload in ({"a": float("nan")}, {"a": float("inf")}, {"a": {1, 2}}, {"a": np.ones(2)}):
        with pytest.raises(ValueError, match="must be JSON"):
            write_json(path, payload)
    with pytest.raises(ValueError, match="must be JSON"):
        append_records(tmp_path / "b.jsonl", [make(), make(env={"x": float("nan")})])

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_json(path, {"a": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    monkeypatch.undo()
    assert json.loads(write_json(path, {"a": [make()]}).read_text())["a"][0]["value"] == 0.5


def test_only_jsonl_files_are_appended_to(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text('{"benchmark": "')
    with pytest.raises(ValueError, match=r"\.jsonl"):
        append_records(tmp_path / "README.md", [make()])
    assert (tmp_path / "README.md").read_text() == '{"benchmark": "'


def test_the_environment_is_json_and_loads_nothing_heavy() -> None:
    code = (
        "import json, sys; from hf_backdoor_defense.reporting.results import environment;"
        "print(json.dumps(environment()));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'accelerate', 'matplotlib') if m in sys.modules])"
    )
    root = Path(results.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    env, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert json.loads(env)["gpu"] is None
    assert set(json.loads(env)) == {
        *("python", "torch", "transformers", "accelerate", "datasets", "hf_backdoor_defense"),
        *("machine", "cpus", "gpu", "commit", "dirty", "world_size"),
    }


def test_the_environment_asks_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "a GPU")
    distributed = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: False, get_world_size=lambda: 4)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, distributed=distributed))
    monkeypatch.setenv("WORLD_SIZE", "2")
    env = environment()
    assert (env["gpu"], env["world_size"]) == ("a GPU", 2)
    distributed.is_initialized = lambda: True
    cuda.is_available = lambda: False
    env = environment()
    assert (env["gpu"], env["world_size"]) == (None, 4)
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_commit_is_the_checkouts_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = environment()
    git = Path(results.__file__).resolve().parents[2] / ".git"
    if (git / "HEAD").is_file():  # read by hand what git says
        head = (git / "HEAD").read_text().strip()
        reference = git / head.removeprefix("ref: ")
        if reference.is_file() and env["commit"] is not None:
            assert env["commit"] == reference.read_text().strip()
    assert env["commit"] is None or re.fullmatch("[0-9a-f]{40,64}", env["commit"])
    assert (env["dirty"] is None) == (env["commit"] is None)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "site" / "package" / "reporting" / "results.py"))
    assert (environment()["commit"], environment()["dirty"]) == (None, None)
