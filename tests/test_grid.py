"""A grid in shards is the single run's grid: the same records in the same order, and the same tables."""

import dataclasses
import sys

import pytest

from benchmarks.grid import Cell, run_grid, shard
from benchmarks.tables import every_cell
from hf_backdoor_defense.reporting.results import Record, append_records, cell_key, read_records

CELLS = [Cell("b"), Cell("a"), Cell("c"), Cell("rare", extended=True)]
SEEDS = (3, 1)
ORDER = [(name, seed) for seed in SEEDS for name in "bac"]


class Stub:
    """A `run` whose figures depend on cell and seed alone; it notes what it ran, and is killed at `dies_at`."""

    def __init__(self, dies_at=None):
        self.ran, self.dies_at = [], dies_at

    def __call__(self, cell, seed, folder):
        if (cell.setting, seed) == self.dies_at:
            raise KeyboardInterrupt
        self.ran.append((cell.setting, seed))
        return [
            Record(
                "stub",
                "task",
                "model",
                "badnets",
                arm,
                where,
                seed,
                metric,
                (len(arm) + seed + ord(cell.setting[0])) % 97 / 97,
            )
            for arm in ("undefended", "dece")
            for where, metric in ((cell.setting, "ca"), (cell.setting, "asr"), (f"{cell.setting}: variant", "ca"))
        ], f"{cell.setting} {seed}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command line of a benchmark, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words, stub=None):
        stub = Stub() if stub is None else stub
        monkeypatch.setattr(sys, "argv", ["benchmarks.grid_test", *map(str, words)])
        run_grid("grid_test", CELLS, SEEDS, run=stub)
        return stub.ran

    return run


def table(path):
    return every_cell(read_records(path))


def test_a_shard_is_every_nth_item_and_shards_share_nothing():
    for n in range(1, 9):
        parts = [ORDER[shard(f"{i}/{n}")] for i in range(1, n + 1)]
        assert sorted(sum(parts, [])) == sorted(ORDER)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "a/b", "1/0", "2", "", "1/2/3", "-1/2", "1.5/2", " 1/2"])
def test_a_bad_shard_is_told_and_nothing_runs(run, capsys, tmp_path, text):
    with pytest.raises(SystemExit) as stop:
        run(f"--shard={text}")
    assert stop.value.code == 2
    assert f"must be i/n with 1 <= i <= n, got {text!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [2, 4])
def test_shards_put_together_are_the_single_run(run, tmp_path, count):
    assert run("--output", "whole.jsonl") == ORDER
    ran = [run("--shard", f"{i}/{count}", "--output", f"shard.{i}.jsonl") for i in range(1, count + 1)]
    assert sorted(sum(ran, [])) == sorted(ORDER)
    files = sorted(tmp_path.glob("shard.*.jsonl"), reverse=True)  # the order of the files says nothing
    assert run("--merge", *files, "--output", "merged.jsonl") == []
    whole, merged = tmp_path / "whole.jsonl", tmp_path / "merged.jsonl"
    assert merged.read_bytes() == whole.read_bytes()
    assert table(merged) == table(whole)
    # A later merge, say of a third shard that came late, adds nothing twice.
    run("--merge", *files, "--output", "merged.jsonl")
    assert merged.read_bytes() == whole.read_bytes()


def test_the_files_one_behind_the_other_would_have_given_other_tables(run, tmp_path):
    """Why there is `--merge`: cells stand in a table as they first appear."""
    run("--output", "whole.jsonl")
    for i in (1, 2):
        run("--shard", f"{i}/2", "--output", f"shard.{i}.jsonl")
    (tmp_path / "cat.jsonl").write_bytes(b"".join((tmp_path / f"shard.{i}.jsonl").read_bytes() for i in (1, 2)))
    assert sorted(map(repr, read_records(tmp_path / "cat.jsonl"))) == sorted(
        map(repr, read_records(tmp_path / "whole.jsonl"))
    )
    assert table(tmp_path / "cat.jsonl") != table(tmp_path / "whole.jsonl")


def test_a_killed_shard_goes_on_where_it_was(run, tmp_path):
    run("--shard", "2/2", "--output", "whole.jsonl")
    mine = ORDER[1::2]
    dying = Stub(dies_at=mine[1])
    with pytest.raises(KeyboardInterrupt):
        run("--shard", "2/2", "--output", "killed.jsonl", stub=dying)
    assert dying.ran == mine[:1]
    killed = tmp_path / "killed.jsonl"
    with open(killed, "ab") as file:
        file.write((tmp_path / "whole.jsonl").read_bytes()[:40])  # half a line, as kill -9 leaves it
    with pytest.warns(UserWarning):
        assert run("--shard", "2/2", "--output", "killed.jsonl") == mine[1:]
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run("--shard", "2/2", "--output", "killed.jsonl") == []


def test_the_other_shard_is_not_needed(run, tmp_path):
    """A cell lies in its own shard's file alone, and a merge without the other file takes what there is and says what is not."""
    run("--shard", "1/2", "--output", "one.jsonl")
    assert {(r.setting.partition(":")[0], r.seed) for r in read_records(tmp_path / "one.jsonl")} == set(ORDER[::2])


def test_a_merge_says_what_is_missing_and_what_is_there_twice(run, tmp_path, capsys):
    run("--shard", "1/2", "--output", "one.jsonl")
    capsys.readouterr()
    run("--merge", "one.jsonl", "--output", "merged.jsonl")
    told = capsys.readouterr().out
    assert all(f"{name}, seed {seed}: 6 records" in told for name, seed in ORDER[::2])
    assert all(f"{name}, seed {seed}: no records" in told for name, seed in ORDER[1::2])
    with pytest.raises(ValueError, match="is there twice in one.jsonl, one.jsonl"):
        run("--merge", "one.jsonl", "one.jsonl", "--output", "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()


def test_a_merge_drops_no_measurement_unsaid(run, tmp_path):
    """Cells that were measured again: refused by name, or put where the old ones stood."""
    run("--output", "old.jsonl")
    old = tmp_path / "old.jsonl"
    before, kept = old.read_bytes(), read_records(old)
    again = [dataclasses.replace(r, value=r.value / 2) for r in kept if (r.setting[0], r.seed) == ("a", 1)]
    append_records(tmp_path / "again.jsonl", again)
    with pytest.raises(ValueError, match="other records of a, seed 1: .* Add --replace"):
        run("--merge", "again.jsonl", "--output", "old.jsonl")
    run("--merge", "again.jsonl", "--output", "old.jsonl", "--only", "b")  # that cell was not asked for
    assert old.read_bytes() == before
    run("--merge", "again.jsonl", "--output", "old.jsonl", "--replace")
    new = {cell_key(r): r for r in again}
    assert len(new) == 6 and read_records(old) == [new.get(cell_key(r), r) for r in kept]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.jsonl", "old.jsonl"]


def test_figures_of_two_pretrained_models_do_not_meet_in_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "there.jsonl"

    def run(bits, *words):
        stub = Stub()
        monkeypatch.setattr(sys, "argv", ["benchmarks.grid_test", "--output", str(path), *words])

        def noted(cell, seed, folder):
            records, text = stub(cell, seed, folder)
            return [dataclasses.replace(record, env={"pretraining": {"bits": bits}}) for record in records], text

        run_grid("grid_test", CELLS, SEEDS, run=noted, pretrained={"bits": bits})
        return stub.ran

    assert len(run(1.0, "--shard", "1/2")) > 0
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="must hold figures of one pretrained model, got [0-9]+ of [0-9]+ records"):
        run(2.0)
    assert path.read_bytes() == before
    assert len(run(1.0)) > 0  # the rest
    path.write_text(path.read_text().replace('"pretraining": {"bits": 1.0}', '"other": 1'))  # records that tell of none
    with pytest.raises(SystemExit, match="Write to a file of its own"):
        run(1.0)


def test_replacing_belongs_to_merging(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--replace")
    assert stop.value.code == 2 and "--replace belongs to --merge" in capsys.readouterr().err


def test_extended_cells_belong_to_the_shards_when_asked_for(run):
    assert ("rare", 3) in run("--extended", "--shard", "2/2", "--output", "two.jsonl")
