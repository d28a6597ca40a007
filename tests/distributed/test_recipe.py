"""RECIPE on two gloo processes: DDP makes the update of one, and under FSDP2 a shard's gradient is a slice of the whole."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from hf_backdoor_defense.defenses.recipe import RECIPE, PenaltyOnly
from hf_backdoor_defense.functional.weights import frobenius_norms
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator
from tests.trainers.text_toys import masked_lm, static_rows, tokenizer
from tests.trainers.toys import arguments, same

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tests.distributed.test_recipe import run, sharded
folder = Path(sys.argv[1])
assert run(folder, batch_size=2) == 2
sharded(folder)
"""
# Fields, and settings of the training: per process, half of what one process takes.
CASES = {
    "recipe": (RECIPE, {"trainable": "all"}, 1),
    "accumulated": (RECIPE, {"coef": 0.5}, 2),
    "penalty_only": (PenaltyOnly, {"trainable": "all"}, 1),
}


def run(folder: Path, batch_size: int) -> int:
    world = 1
    for name, (kind, fields, accumulation) in CASES.items():
        model, rows = masked_lm(folder / f"source{os.environ.get('RANK', '')}"), static_rows(40).select(range(16))
        args = arguments(
            folder / name,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
        )
        collate = language_collator(model, tokenizer(), rows)
        trainer = DefendedTrainer(model, args=args, train_dataset=rows, data_collator=collate, defense=kind(**fields))
        trainer.train()
        trainer.save_model(folder / name / "final")
        world = trainer.accelerator.num_processes
    return world


def sharded(folder: Path) -> None:
    """Loss and penalty of a fully sharded model against those of a whole one, with the same rows on every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, source = torch.distributed.get_rank(), folder / f"source{os.environ['RANK']}"
    batch = {k: torch.tensor(v) for k, v in static_rows()[:4].items() if k != "row_id"}
    labels = batch.pop("labels")
    whole, split = masked_lm(source), masked_lm(source)
    mesh = init_device_mesh("cpu", (2,))
    for layer in split.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(split, mesh=mesh)
    norms = []
    for model in (whole, split):
        objective = RECIPE(coef=0.7, trainable="targets")
        objective._names = [n for n, _ in whole.named_parameters() if n.endswith("intermediate.dense.weight")]
        objective._start = [1.0, 1.0]
        loss = torch.nn.functional.cross_entropy(model(**batch).logits.transpose(1, 2), labels)
        penalty = objective.penalties(SimpleNamespace(model=model, log=lambda name, value, latest=False: None))["norm"]
        (loss + penalty).backward()
        norms.append(objective._now)
    assert torch.allclose(*norms, atol=1e-6), norms
    whole_weights, compared = dict(whole.named_parameters()), 0
    for name, parameter in split.named_parameters():
        if parameter.grad is None:
            continue
        expected = whole_weights[name].grad
        assert torch.allclose(parameter.grad.full_tensor(), expected, atol=1e-6), name
        slice_ = expected.chunk(2)[rank] if len(expected) > 1 else expected
        assert torch.allclose(parameter.grad.to_local(), slice_, atol=1e-6), name
        compared += 1
    assert compared > 20
    targets = [p.detach().clone().requires_grad_() for n, p in split.named_parameters() if n in objective._names]
    frobenius_norms(targets).sum().backward()
    for name, shard in zip(objective._names, targets, strict=True):
        weight = whole_weights[name].detach()
        assert torch.allclose(shard.grad.to_local(), shard.detach().to_local() / weight.norm(), atol=1e-7)


def test_two_processes_equal_one_and_shards_are_slices(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), str(script), str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(tmp_path / "one", batch_size=4) == 1
    start = load_file(tmp_path / "one" / "source" / "model.safetensors")
    for name in CASES:
        one, two = (load_file(tmp_path / where / name / "final" / "model.safetensors") for where in ("one", "two"))
        assert same(one, two, atol=2e-6), name
        assert not same(one, start, atol=1e-4)
