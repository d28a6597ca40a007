"""A killed training, resumed in another process, ends with the weights of one left alone; broken checkpoints are told."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.trainers.checkpoints import checkpoints, damage, newest, obstacle
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # a minute on two idle cores
NAMES = ["dece", "dece_language", "recipe", "d3", "ulrl", "psim"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.trainers.kills", str(folder), *NAMES]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two children run beside each other
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=580)
    told = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 4]
    return folder, {name: tuple(map(int, codes)) for name, *codes in told if name in NAMES}, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_killed_inside_an_accumulation_window_it_ends_as_if_nothing_had_happened(killed, name):
    folder, codes, stderr = killed
    assert codes.get(name) == (0, signal.SIGKILL, 0), stderr[-3000:]
    place = folder / name
    whole, resumed = (load_file(place / where) for where in ("whole/whole.safetensors", "killed/resumed.safetensors"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)  # dropout's random numbers included
    ends = [load_file(place / f"{p}-model/defense.safetensors") for p in ("whole/whole", "killed/resumed")]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.allclose(value.float(), ends[1][key].float(), atol=1e-6, rtol=1e-5), key


def host(folder, **changes):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **changes}
    return DefendedTrainer(
        bert(), args=arguments(folder, **options), train_dataset=classification_rows(), data_collator=PadCollator(),
        defense=DeCE(alpha_base=0.8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    host(folder).train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    "harm, told",
    [
        (lambda p: cut(p / "model.safetensors"), "model.safetensors (cut short)"),
        (lambda p: cut(p / "defense.safetensors"), "defense.safetensors (cut short)"),
        (lambda p: cut(p / "optimizer.pt"), "optimizer.pt (cut short)"),
        (lambda p: cut(p / "trainer_state.json"), "trainer_state.json (cut short)"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors (cut short)"),
        (lambda p: (p / "rng_state.pth").unlink(), "rng_state.pth (missing)"),
        (lambda p: (p / "trainer_state.json").unlink(), "trainer_state.json (missing)"),
    ],
)
def test_a_checkpoint_cut_short_is_told_and_the_one_before_it_used(run, caplog, harm, told):
    last = run / "checkpoint-3"
    assert not damage(last) and newest(run) == last
    harm(last)
    assert told in damage(last)
    with caplog.at_level(logging.WARNING):
        trainer = host(run, max_steps=4)
        trainer.train(resume_from_checkpoint=True)
    assert f"{last} was not written to its end" in caplog.text and told in caplog.text
    assert trainer.state.global_step == 4 and not damage(run / "checkpoint-4")
    with pytest.raises(ValueError, match="was not written to its end .*Delete it"):
        cut(run / "checkpoint-1" / "model.safetensors")
        host(run).train(resume_from_checkpoint=str(run / "checkpoint-1"))


def without_the_run(checkpoint: Path) -> None:
    """As `save_only_model=True` leaves it."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()


def test_a_checkpoint_of_the_model_only_is_no_damage_and_is_not_resumed(run, tmp_path, caplog):
    host(tmp_path / "only", save_only_model=True).train()
    without_the_run(run / "checkpoint-3")
    only = tmp_path / "only" / "checkpoint-3"
    assert {path.name for path in only.iterdir()} == {path.name for path in (run / "checkpoint-3").iterdir()}
    with pytest.raises(ValueError, match="holds the model only .*save_only_model") as refused:
        host(tmp_path / "only").train(resume_from_checkpoint=str(only))
    assert "Delete it" not in str(refused.value) and not damage(only)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(ValueError, match="holds no checkpoint to go on with"):
            host(tmp_path / "only").train(resume_from_checkpoint=True)
        assert newest(run) == run / "checkpoint-2"
    told = [line for line in caplog.messages if "save_only_model" in line]
    assert len(told) == 4 and not any("Delete it" in line for line in told)


def saved_by(checkpoint: Path, ranks) -> None:
    """The random states of these processes in place of one."""
    state = (checkpoint / "rng_state.pth").read_bytes()
    (checkpoint / "rng_state.pth").unlink()
    for rank in ranks:
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(state)


@pytest.mark.parametrize(
    "before, now, can", [(1, 4, True), (2, 1, True), (2, 2, True), (4, 2, True), (2, 4, False), (3, 4, False)]
)
def test_more_processes_than_the_several_that_saved_it(run, before, now, can):
    last = run / "checkpoint-3"
    if before > 1:
        saved_by(last, range(before))
    why = obstacle(last, world_size=now)
    assert not damage(last) and (why is None) == can
    if why is not None:
        assert why.startswith(
            f"was saved by {before} processes, and {now} go on with it: the random states of the others are"
        )
        assert why.endswith(f"Start at most {before}.") and "Delete" not in why
    assert (newest(run, world_size=now) == last) == can


@pytest.mark.parametrize("ranks, missing", [((0,), 1), ((1,), 0), ((0, 2), 1)])
def test_a_process_that_did_not_get_to_save_is_told(run, ranks, missing):
    saved_by(run / "checkpoint-3", ranks)
    assert damage(run / "checkpoint-3") == [f"rng_state_{missing}.pth (missing)"]


def test_files_of_the_user_in_a_checkpoint_are_not_looked_at(run):
    last = run / "checkpoint-3"
    for name in (
        "notes.json",
        "mine.safetensors",
        "model-notes.json",
        "curve.pt",
        "old.bin",
        "mine.safetensors.index.json",
    ):
        (last / name).write_bytes(b"anything")
    assert obstacle(last) is None
    host(run, max_steps=4).train(resume_from_checkpoint=True)
    assert (run / "checkpoint-4").is_dir()


def test_a_missing_shard_is_told(run):
    last = run / "checkpoint-3"
    (last / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    assert damage(last) == ["model-00001-of-00002.safetensors (missing)"]


def test_no_whole_checkpoint_is_said_so_and_nothing_is_removed(run):
    for path in checkpoints(run):
        cut(path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no checkpoint to go on with"):
        host(run).train(resume_from_checkpoint=True)
    assert len(checkpoints(run)) == 3


def test_a_disk_that_fills_while_saving_leaves_the_earlier_checkpoint(trained, run):
    size = (run / "checkpoint-3" / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = host(run, max_steps=5, save_total_limit=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
        with pytest.raises(Exception, match="(?i)file too large|large|write"):
            trainer.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest(run) == run / "checkpoint-3"
    for name in ("model.safetensors", "defense.safetensors", "optimizer.pt"):
        assert (run / "checkpoint-3" / name).read_bytes() == (trained / "checkpoint-3" / name).read_bytes()
    again = host(run, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
