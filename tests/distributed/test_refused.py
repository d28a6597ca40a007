"""Launches that would train something else than was asked for are refused on every process, before anything is written; one whose
worker dies leaves that worker's traceback and a checkpoint to go on from.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.robust_losses import GCE
from hf_backdoor_defense.trainers.checkpoints import checkpoints, newest
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.distributed.launch import ROOT, launched
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, same, weights

SCRIPT = str(Path(__file__))
SAVED, DEAD, UPDATES = 4, 5, 20  # five updates an epoch, the last one of 2 rows: all of it lies inside an epoch


def host(folder: Path, *, rows=None, defense=None, callbacks=(), **changes) -> DefendedTrainer:
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 4, **changes}
    return DefendedTrainer(
        bert(),
        args=arguments(folder, **options),
        train_dataset=classification_rows(34) if rows is None else rows,
        data_collator=PadCollator(),
        defense=DeCE(alpha_base=0.7) if defense is None else defense,
        callbacks=list(callbacks),
    )


class Told(TrainerCallback):
    """Leaves a file with the first step of a training that should not have begun."""

    def on_step_begin(self, args, state, control, **kwargs):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / f"trained{os.getpid()}").touch()


def refused(folder: Path, trainer: DefendedTrainer) -> str:
    """The error of a training, or that there was none."""
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# -- what is launched -------------------------------------------------------------------------------------------------
def alone(folder: Path, **changes) -> None:
    """One training; what it said goes beside its output folder."""
    name = f"{os.environ.get('RANK', '0')}.txt"
    trainer = host(folder / "output", callbacks=[Told()], use_cpu=False, save_strategy="steps", save_steps=1, **changes)
    (folder / name).write_text(refused(folder, trainer))


def pairs(folder: Path) -> None:
    """Two processes that were set up differently, one way after the other."""
    rank = int(os.environ["RANK"])
    rows = classification_rows(24)
    other = [
        ("seed", {"seed": rank}),
        ("rows", {"rows": rows if rank == 0 else rows.select(range(20))}),
        ("none", {"rows": rows if rank == 0 else Dataset.from_dict({name: [] for name in rows.column_names})}),
        ("method", {"defense": DeCE(alpha_base=0.7) if rank == 0 else GCE()}),
        ("fields", {"defense": DeCE(alpha_base=0.7 + rank / 10)}),
        ("check", {"max_steps": 3, "defense": DeCE(label_smoothing=0.9 if rank else 0.05)}),
    ]
    for name, options in other:
        trainer = host(folder / name / "output", callbacks=[Told()], save_strategy="steps", save_steps=1, **options)
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{rank}.txt").write_text(refused(folder, trainer))
        assert trainer.accelerator.num_processes == 2
    (folder / f"pairs{rank}").touch()


class Dies(TrainerCallback):
    """On the second process, when the update after the checkpoint begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == DEAD:
            raise RuntimeError("this worker has died")


def dying(folder: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": SAVED, "logging_strategy": "steps"}
    host(folder / "dying", callbacks=[Dies()], **saving).train()


def resumed(folder: Path) -> None:
    """Goes on from the newest whole checkpoint, as many processes as there are."""
    trainer = host(folder / "dying", save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    rank, world = trainer.args.process_index, trainer.accelerator.num_processes
    save_file(weights(trainer), folder / f"resumed{world}-{rank}.safetensors")
    (folder / f"resumed{world}-{rank}.json").write_text(json.dumps(trainer.state.global_step))
    whole = host(folder / "whole")
    whole.train()
    save_file(weights(whole), folder / f"whole{world}-{rank}.safetensors")


def gloo(folder: Path) -> None:
    alone(folder, ddp_backend="gloo")


# -- what comes of it -------------------------------------------------------------------------------------------------
def written(folder: Path) -> list[str]:
    """Files of a training, by name: configuration of the folder itself is none."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these launches are fine")
@pytest.mark.parametrize("what", ["alone", "gloo"])
def test_processes_that_would_not_train_together_are_refused(tmp_path, what):
    done = launched([SCRIPT, str(tmp_path), what], remove=("ACCELERATE_USE_CPU",), timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        if what == "alone":
            assert "2 processes were started and this training has 1" in said
        else:
            assert "gradients would never be summed" in said and "ddp_backend='gloo'" in said
        assert "ACCELERATE_USE_CPU=true torchrun" in said
    assert written(tmp_path) == ["0.txt", "1.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this launch is fine")
def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path):
    variables = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
    ]
    done = subprocess.run(
        [*command, "--num_machines", "1", "--dynamo_backend", "no", SCRIPT, str(tmp_path), "alone"],
        cwd=ROOT, env={**variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "asked for several processes and started one" in (tmp_path / "0.txt").read_text()
    assert written(tmp_path) == ["0.txt"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One launch: what is refused, then a worker that dies."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, launched([SCRIPT, str(folder), "pairs", "dying"], timeout=120)


@pytest.mark.parametrize(
    "name, told",
    [
        ("seed", "`seed` must be the same on every process, got 0 on process 0, 1 on process 1"),
        ("rows", "`rows` must be the same on every process, got 24 on process 0, 20 on process 1"),
        ("none", "`rows` must be the same on every process, got 24 on process 0, 0 on process 1"),
        ("method", "`defense` must be the same on every process, got"),
        ("fields", "`defense` must be the same on every process, got"),
        ("check", "`label_smoothing` must be below 0.667 for 3 classes"),
    ],
)
def test_processes_that_differ_are_refused_on_both(pair, name, told):
    folder, done = pair
    assert (folder / "pairs0").is_file() and (folder / "pairs1").is_file(), done.stderr[-2000:]
    said = [(folder / name / f"{rank}.txt").read_text() for rank in range(2)]
    assert told in said[0] and said[0] == said[1]
    assert written(folder / name) == ["0.txt", "1.txt"]


def test_a_worker_that_dies_leaves_its_traceback_and_a_checkpoint(pair, tmp_path):
    folder, done = pair
    assert done.returncode != 0
    assert "this worker has died" in done.stderr and "on_step_begin" in done.stderr and "exitcode" in done.stderr
    assert checkpoints(folder / "dying") == [folder / "dying" / f"checkpoint-{SAVED}"]
    for world in (1, 2):
        assert newest(folder / "dying", world_size=world) == folder / "dying" / f"checkpoint-{SAVED}"
    # One process goes on with it: as many rows per update, twice the batches.
    one = host(folder / "dying", save_strategy="no", per_device_train_batch_size=8)
    one.train(resume_from_checkpoint=True)
    assert one.state.global_step == UPDATES
    two = launched([SCRIPT, str(folder), "resumed"], timeout=120)
    assert two.returncode == 0, two.stderr[-2000:]
    whole = load_file(folder / "whole2-0.safetensors")
    for rank in range(2):
        assert json.loads((folder / f"resumed2-{rank}.json").read_text()) == UPDATES
        assert same(load_file(folder / f"resumed2-{rank}.safetensors"), whole)
    assert same(weights(one), whole, atol=1e-5)
    assert not same(load_file(folder / "dying" / f"checkpoint-{SAVED}" / "model.safetensors"), whole, atol=1e-4)


if __name__ == "__main__":
    for step in sys.argv[2:]:
        try:
            {"alone": alone, "gloo": gloo, "pairs": pairs, "dying": dying, "resumed": resumed}[step](Path(sys.argv[1]))
        except Exception:
            traceback.print_exc()
            raise
