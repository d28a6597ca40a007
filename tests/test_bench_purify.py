"""The protocol of benchmarks/purify.py: who gets which rows, what becomes a record, and that nothing is done twice."""

import numpy as np
import pytest

from benchmarks import purify, tables_purify
from benchmarks.grid import Cell
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores
from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.vision import new_digits_vit


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """Ninety images of three classes; models are kept in `tmp_path`."""
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "toy.npz", image=draw.integers(0, 256, (90, 8, 8), dtype=np.uint8), label=np.arange(90) % 3)
    monkeypatch.setattr(purify, "RUNS", tmp_path / "runs")
    return purify.Problem(str(tmp_path / "toy.npz"), "image", {"name": "patch"}, rate=0.2)


def test_the_defender_gets_rows_as_they_were_and_nobody_gets_what_is_judged(problem):
    rows = purify.rows_of(problem, 1)
    given = {row["row_id"]: row for row in rows.train}
    assert len(rows.clean) == round(0.2 * len(rows.train)) and set(rows.clean["row_id"]) <= set(given)
    for row in rows.clean:
        assert row["label"] == given[row["row_id"]]["label"]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(given[row["row_id"]]["image"]))
    assert not set(rows.judged["row_id"]) & set(given)
    assert set(rows.judged["row_id"]) >= set(rows.triggered["row_id"])
    assert purify.TARGET not in rows.triggered["label"]
    changed = [p["row_id"] for p, t in zip(rows.poisoned, rows.train, strict=True) if p["label"] != t["label"]]
    assert len(changed) == pytest.approx(0.2 * len(rows.train), abs=1) and len(rows.poisoned) == len(rows.train)


def test_the_clean_rows_depend_on_the_seed_alone_and_may_be_a_number(problem):
    drawn = [set(purify.rows_of(problem, seed).clean["row_id"]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    ten = purify.dataclasses.replace(problem, clean=10)
    assert len(purify.rows_of(ten, 1).clean) == 10


def test_a_search_trains_on_no_row_that_it_judges(problem):
    search, final = (purify.rows_of(problem, 1, judged=split) for split in ("validation", "test"))
    assert not set(search.judged["row_id"]) & set(search.train["row_id"])
    assert not set(search.judged["row_id"]) & set(final.judged["row_id"])  # no test row is read
    assert set(search.judged["row_id"]) <= set(final.train["row_id"])


def estimates(ca, asr, healed):
    return BackdoorScores(
        ca=Estimate(ca, 10, 0.0, 1.0), asr=Estimate(asr, 10, 0.0, 1.0), r_acc=Estimate(healed, 10, 0.0, 1.0)
    )


def test_every_arm_becomes_records_once_and_they_fill_the_tables(problem, tmp_path, monkeypatch):
    calls = []

    def trained(problem, train, seed, folder, *, mark=None, **more):
        model, processor = new_digits_vit(3, seed=seed + bool(mark))
        model.save_pretrained(str(folder))
        processor.save_pretrained(str(folder))
        return folder

    def purified(problem, folder, rows, defense, seed, **settings):
        calls.append((folder.name, defense))
        found = estimates(0.9, 0.95 if defense == "fine_tuning" else 0.02, 0.8)
        evidence = {"units": "rows", "suspected_classes": [0, 2]} if defense == "ulrl" else {}
        return found, {"seconds": 1.5, "evidence": evidence}

    monkeypatch.setattr(purify, "trained", trained)
    monkeypatch.setattr(purify, "purified", purified)
    cell = Cell("toy patch")
    records, _ = purify.run_cell(problem, purify.METHODS, cell, 1, tmp_path / "cell")
    value = {(r.defense, r.setting, r.metric): r.value for r in records}
    assert len(value) == len(records) and len(calls) == 2 * len(purify.METHODS)
    for method in purify.METHODS:
        asr = 0.95 if method == "fine_tuning" else 0.02
        assert value[method, "toy patch", "asr"] == asr and value[method, "toy patch: clean model", "ftr"] == asr
        assert value[method, "toy patch", "seconds"] == 1.5
        assert (method, "toy patch: clean model", "der") not in value  # nothing was attacked there
        before = {name: value["undefended", "toy patch", name] for name in ("ca", "asr")}
        wanted = (max(0, before["asr"] - asr) - max(0, before["ca"] - 0.9) + 1) / 2
        assert value[method, "toy patch", "der"] == pytest.approx(wanted)
    assert value["ulrl", "toy patch", "suspects"] == 2 and value["ulrl", "toy patch", "target_suspected"] == 1.0
    assert ("d3", "toy patch", "suspects") not in value
    assert {m for d, _, m in value if d == "clean_reference"} == {"ca", "ftr", "r_acc"}
    text = tables_purify.full_tables(records)
    assert all(f"| {tables_purify.ARMS[arm]} |" in text for arm in ("clean_reference", "undefended", *purify.METHODS))
    assert "false flags in a clean model" in text and "toy patch (preliminary)" in text

    again, _ = purify.run_cell(problem, purify.METHODS, cell, 1, tmp_path / "cell")
    assert len(calls) == 2 * len(purify.METHODS) and [r.value for r in again] == [r.value for r in records]


def test_where_units_are_hidden_no_class_is_suspected(problem):
    common = {"benchmark": "purify", "dataset": "d", "model": "m", "attack": "a", "seed": 1, "env": {}}
    report = {"seconds": 1.0, "evidence": {"units": "hidden", "suspected_classes": []}}
    before, after = estimates(0.9, 1.0, 0.0), estimates(0.9, 0.0, 0.9)
    found = {r.metric: r.value for r in purify._costs(after, before, report, "ulrl", "c", common)}
    assert found == {"seconds": 1.0, "der": 1.0}


def test_cells_of_the_core_exist_and_the_clean_models_of_digits_are_purified_too():
    assert set(purify.CORE) <= set(purify.PROBLEMS) and set(purify.ONE_SEED) <= set(purify.CORE)
    assert set(tables_purify.EXTENDED) == set(purify.PROBLEMS) - set(purify.CORE)
    images = {p.task for name, p in purify.PROBLEMS.items() if name in purify.CORE and p.kind == "image"}
    assert {p.task for p in purify.PROBLEMS.values() if p.on_clean} == {"offline:digits"} < images
    for problem in purify.PROBLEMS.values():
        assert problem.get_trigger().name == problem.trigger["name"]
