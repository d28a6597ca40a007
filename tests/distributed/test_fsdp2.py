"""The whole Trainer on a model that is cut up: the same weights and findings as one process with the whole one.

accelerate has FSDP2 on accelerators only. On CPUs the model is cut (`fully_shard`) where accelerate would do it, between
`prepare` and the first step; with two GPUs the Trainer is told to (`fsdp=True`), and does it itself.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.distributed import worlds
from tests.distributed.launch import launched
from tests.distributed.test_purifiers import shard, whole
from tests.trainers.text_toys import saved_whole
from tests.trainers.toys import PadCollator, arguments

NAMES = ["undefended", "dece", "matched_decay", "dece_language", "crow", "dece_translation", "recipe", "d3", "ulrl"]
CLOSE = 1e-5  # of the largest weight


class Cut(DefendedTrainer):
    """Cuts its model before the optimizer looks at its parameters."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        shard(self.model, reshard_after_forward=True)
        return super().create_optimizer(*args, **kwargs)


def train(folder: Path, name: str, *, size: int, kind: type[DefendedTrainer] = DefendedTrainer, **options: Any) -> None:
    """One case of worlds.py; leaves whole weights and what the methods found, of every process."""
    case = worlds.cases(worlds.source(folder))[name]
    objectives = case.objectives()
    trainer = kind(
        case.model(),
        args=arguments(
            folder / name,
            per_device_train_batch_size=size,
            num_train_epochs=worlds.EPOCHS,
            **{**case.options, **options},
        ),
        train_dataset=case.rows(worlds.ROWS),
        data_collator=PadCollator(),
        defense=objectives,
    )
    trainer.fuse_bytes = 0 if case.fuse else 2**62
    trainer.train()
    assert trainer.state.global_step > 20
    model = trainer.accelerator.unwrap_model(trainer.model)
    # One after the other on every process: each gathers the same.
    weights = {key: whole(value.detach()).cpu().contiguous() for key, value in model.named_parameters()}
    fused = [key for key in trainer._fusing._said if key == "fused"]
    said = {"found": [worlds.found(o) for o in objectives], "fused": bool(fused)}
    said["sharded"] = all(hasattr(p, "full_tensor") for p in model.parameters())
    (folder / name).mkdir(parents=True, exist_ok=True)
    rank = trainer.args.process_index
    save_file(weights, folder / name / f"weights{rank}.safetensors")
    (folder / name / f"said{rank}.json").write_text(json.dumps(said))


def before(folder: Path) -> None:
    """For each process its own model to start from."""
    saved_whole(worlds.source(folder))


def both(folder: Path) -> None:
    """On each of two processes."""
    with mock.patch.object(Accelerator, "prepare_model", lambda self, model, *args, **kwargs: model):
        for name in NAMES:
            train(folder, name, size=4, kind=Cut)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    before(folder)
    for name in NAMES:
        train(folder, name, size=8)
    return folder


def compare(one: Path, other: Path, name: str, close: float) -> None:
    mine, here = load_file(one / name / "weights0.safetensors"), json.loads((one / name / "said0.json").read_text())
    largest = max(float(value.abs().max()) for value in mine.values())
    for rank in range(2):
        theirs = load_file(other / name / f"weights{rank}.safetensors")
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert float((value - theirs[key]).abs().max()) <= close * largest, (rank, key)
        there = json.loads((other / name / f"said{rank}.json").read_text())
        assert there["sharded"] and not here["sharded"] and there["fused"] == here["fused"]
        for first, second in zip(here["found"], there["found"], strict=True):
            assert first.pop("activity") == pytest.approx(second.pop("activity"), rel=1e-4, abs=1e-6)
            assert first == second
        here = json.loads((one / name / "said0.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_pieces_is_trained_as_a_whole_one(one, two, name):
    compare(one, two("test_fsdp2"), name, CLOSE)


def test_heads_are_fused_in_pieces_too(one):
    said = {name: json.loads((one / name / "said0.json").read_text())["fused"] for name in NAMES}
    assert said["dece_language"] and said["dece_translation"] and said["recipe"] and not said["dece"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: accelerate has FSDP2 on accelerators only")
def test_the_trainer_under_fsdp2(one, tmp_path):
    done = launched([str(Path(__file__)), str(tmp_path)], remove=("ACCELERATE_USE_CPU",))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in NAMES:
        compare(one, tmp_path, name, 1e-3)  # a GPU sums in another order than a CPU, over 24 updates


if __name__ == "__main__":
    before(Path(sys.argv[1]))
    for chosen in NAMES:
        train(
            Path(sys.argv[1]),
            chosen,
            size=4,
            use_cpu=False,
            fsdp=True,
            fsdp_config={"version": 2, "reshard_after_forward": True},
        )
