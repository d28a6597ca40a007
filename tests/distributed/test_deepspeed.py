"""DeCE under DeepSpeed's ZeRO-1 and 2: two processes make the updates of one, from logits and from hidden states.

accelerate starts DeepSpeed on accelerators only (with `ACCELERATE_USE_CPU` it trains by plain DDP), so here the engine is driven
by hand, on gloo. The Trainer under ZeRO-2 is `test_the_trainer_under_zero_2`, on GPUs. Both run where DeepSpeed can be imported.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers.fusing import forward_with_hidden
from hf_backdoor_defense.trainers.heads import align, shift_labels
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.distributed.launch import launched
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, gpt2, language_rows, weights

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

UPDATES, BATCH, RATE = 3, 8, 0.1
CASES = {"logits": (bert, classification_rows), "hidden": (gpt2, language_rows)}


def values_of(model: torch.nn.Module, core: torch.nn.Module, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """[n_valid] DeCE of the second epoch, as the host computes it."""
    labels = batch["labels"] if kind == "logits" else shift_labels(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    step = Step(
        model=model, inputs=inputs, labels=labels, row_ids=None, epoch=1.0, global_step=0, training=True
    )  # fmt: skip
    objective = DeCE(alpha_base=0.7)
    if kind == "hidden":
        return forward_with_hidden(step, core, objective.loss)[0]
    align(step, model(**inputs))
    return objective.loss(step)


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    rows = CASES[kind][1](UPDATES * BATCH)
    rows = [{name: row[name] for name in row if name != "row_id"} for row in rows]
    return [PadCollator()(rows[first : first + BATCH]) for first in range(0, len(rows), BATCH)]


def alone(kind: str) -> dict[str, torch.Tensor]:
    model = CASES[kind][0]()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for batch in batches(kind):
        optimizer.zero_grad()
        values_of(model, model, batch, kind).mean().backward()
        optimizer.step()
    return weights(model)


def engine(folder: Path, kind: str, stage: int) -> None:
    """On each of two processes: half of the rows of every batch."""
    import deepspeed

    model = CASES[kind][0]()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for batch in batches(kind):
        mine = {name: values[rank * BATCH // world : (rank + 1) * BATCH // world] for name, values in batch.items()}
        values = values_of(wrapped, model, mine, kind)
        count = torch.tensor(float(values.numel()))
        torch.distributed.all_reduce(count)
        wrapped.backward(values.sum() * world / count)  # the engine averages over processes
        wrapped.step()
    assert wrapped.zero_optimization_stage() == stage and world == 2
    save_file(weights(model), folder / f"{kind}{stage}-{rank}.safetensors")


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for kind in CASES:
        for stage in (1, 2):
            engine(folder, kind, stage)


def test_two_processes_make_the_updates_of_one(tmp_path):
    done = launched([str(Path(__file__)), str(tmp_path)], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, (make, _) in CASES.items():
        expected, start = alone(kind), weights(make())
        for stage in (1, 2):
            for rank in range(2):
                found = load_file(tmp_path / f"{kind}{stage}-{rank}.safetensors")
                for name, value in found.items():
                    assert torch.allclose(value, expected[name], atol=2e-6), (kind, stage, rank, name)
        assert any(not torch.allclose(value, expected[name], atol=1e-4) for name, value in start.items())


def trained(folder: Path) -> None:
    """On each of two processes with a GPU: the Trainer, by `--deepspeed`-style arguments."""
    config = {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    args = arguments(
        folder, use_cpu=False, deepspeed=config, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer = DefendedTrainer(
        bert(),
        args=args,
        train_dataset=classification_rows(),
        data_collator=PadCollator(),
        defense=DeCE(alpha_base=0.7),
    )
    trainer.train()
    save_file(
        {name: value.cpu() for name, value in weights(trainer).items()},
        folder / f"rank{args.process_index}.safetensors",
    )
    (folder / f"rank{args.process_index}.json").write_text(json.dumps(str(trainer.accelerator.distributed_type)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_trainer_under_zero_2(tmp_path):
    done = launched(
        [str(Path(__file__)), str(tmp_path), "trainer"], remove=("ACCELERATE_USE_CPU",), ACCELERATE_USE_DEEPSPEED="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    args = arguments(tmp_path / "one", per_device_train_batch_size=16)
    one = DefendedTrainer(
        bert(),
        args=args,
        train_dataset=classification_rows(),
        data_collator=PadCollator(),
        defense=DeCE(alpha_base=0.7),
    )
    one.train()
    for rank in range(2):
        assert "DEEPSPEED" in (tmp_path / f"rank{rank}.json").read_text()
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        assert all(torch.allclose(value, found[name], atol=1e-4) for name, value in weights(one).items())


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    trained(Path(sys.argv[1])) if sys.argv[2:] == ["trainer"] else main(Path(sys.argv[1]))
