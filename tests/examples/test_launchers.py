"""The examples do the same under `python` and under `torchrun`; those for one process say so before they do anything."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.scripts import COMMANDS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(folder: Path, *launcher: str) -> Path:
    """Both scripts under one start of a launcher: importing torch twice takes longer than what they do. No variable helps."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "examples" / "scripts.py"), str(EXAMPLES)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What one process and what two left."""
    folder = tmp_path_factory.mktemp("examples")
    return launch(folder / "python"), launch(folder / "torchrun", *TORCHRUN)


def printed(folder: Path, name: str, rank: int = 0) -> list[str]:
    """Without the Trainer's own line of seconds."""
    return [line for line in (folder / f"{name}.{rank}.txt").read_text().splitlines() if not line.startswith("{'train")]


def test_the_filter_drops_the_same_rows(places):
    one, two = (printed(place, "filter_poisoned_rows") for place in places)
    assert one == two
    assert len(one) == 11 and one[-1].startswith("dropped ")


def test_instructions_are_learned_the_same(places):
    one, two = (printed(place, "sft_poisoned_instructions") for place in places)
    # trl's own trainer learns the rows that fill an epoch's last batch over two processes twice; ours does not.
    assert one[1].startswith("SFTTrainer ") and [*one[:1], *one[2:]] == [*two[:1], *two[2:]]
    assert len(one) == 4


@pytest.mark.parametrize("name", COMMANDS)
def test_only_the_first_process_prints(places, name):
    assert not (places[0] / f"{name}.1.txt").exists()
    assert printed(places[1], name, rank=1) == []


def test_two_processes_leave_the_files_of_one(places):
    one, two = (
        sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and path.suffix != ".txt")
        for place in places
    )
    assert one == two
    assert "runs/example/model/model.safetensors" in one


@pytest.mark.parametrize(
    ("name", "words", "error", "told"),
    [
        ("purify_checkpoint", (), SystemExit, "start this script once"),
        (
            "clean_pretrained",
            ("--only_warm_up",),
            ValueError,
            "The warm-up of a head runs in one process, and 2 were started",
        ),
    ],
)
def test_what_one_process_must_do_is_refused_and_nothing_is_written(tmp_path, monkeypatch, name, words, error, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(error, match=told):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["clean_pretrained", "filter_poisoned_rows", "sft_poisoned_instructions"])
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="do not divide by 3 processes: start 1, 2, 4 or 8"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert not list(tmp_path.iterdir())
