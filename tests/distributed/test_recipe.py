"""RECIPE on two gloo processes: DDP makes the update of one, and under FSDP2 a shard's gradient is a slice of the whole."""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from hf_backdoor_defense.defenses.recipe import RECIPE, PenaltyOnly
from hf_backdoor_defense.functional.weights import frobenius_norms
from hf_backdoor_defense.pretrained import load_pretrained_whole
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.pretraining import language_collator
from tests.trainers.text_toys import saved_whole, static_rows, tokenizer
from tests.trainers.toys import arguments, same

# Fields, and settings of the training: per process, half of what one process takes.
CASES = {
    "recipe": (RECIPE, {"trainable": "all"}, 1),
    "accumulated": (RECIPE, {"coef": 0.5}, 2),
    "penalty_only": (PenaltyOnly, {"trainable": "all"}, 1),
}


def before(folder: Path) -> None:
    """The model that all trainings start from, for each process its own."""
    saved_whole(folder / f"source{os.environ.get('RANK', '')}")


def both(folder: Path) -> None:
    """On each of two processes."""
    assert run(folder, batch_size=2) == 2
    sharded(folder)


def run(folder: Path, batch_size: int) -> int:
    world, source = 1, folder / f"source{os.environ.get('RANK', '')}"
    for name, (kind, fields, accumulation) in CASES.items():
        model, rows = load_pretrained_whole(str(source))[0], static_rows(40).select(range(16))
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
    whole, split = (load_pretrained_whole(str(source))[0] for _ in range(2))
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


def test_two_processes_equal_one_and_shards_are_slices(tmp_path, two):
    places = {"one": tmp_path, "two": two("test_recipe")}
    before(tmp_path)
    assert run(tmp_path, batch_size=4) == 1
    start = load_file(tmp_path / "source" / "model.safetensors")
    for name in CASES:
        one, two = (load_file(places[where] / name / "final" / "model.safetensors") for where in ("one", "two"))
        assert same(one, two, atol=2e-6), name
        assert not same(one, start, atol=1e-4)
