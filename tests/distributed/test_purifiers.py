"""D3 and ULRL on two gloo processes: DDP makes the updates of one, and shards (FSDP2) have the arithmetic of whole weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.ulrl import ULRL
from hf_backdoor_defense.functional.spheres import distances, project_, pull_away_
from hf_backdoor_defense.objectives import Objective, Step
from tests.trainers.image_toys import host, image_list, stack, vit
from tests.trainers.toys import same, weights

CASES = {
    "d3": lambda: D3(),
    "d3_head": lambda: D3.preset("official_code"),
    "ulrl": lambda: ULRL(z_threshold=0.1, unlearn_epochs=2, unlearn_lr=0.005),
}


def both(folder: Path) -> None:
    """On each of two processes."""
    assert run(folder, batch_size=4) == 2
    sharded()


class Start(Objective):
    """The weights that the first update finds, of every process."""

    name = "start"

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inside = getattr(model, "module", model)
        save_file(weights(inside), Path(args.output_dir) / f"start{args.process_index}.safetensors")


def run(folder: Path, batch_size: int) -> int:
    world = 1
    for name, make in CASES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        trainer = host(
            folder / name, [make(), Start()], rows=image_list(24), lr=0.01, per_device_train_batch_size=batch_size
        )
        trainer.train()
        world, rank = trainer.accelerator.num_processes, trainer.args.process_index
        save_file(weights(trainer), folder / name / f"end{rank}.safetensors")
        (folder / name / f"found{rank}.json").write_text(json.dumps(trainer.objectives[0].evidence()))
    return world


def shard(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def alike(one, two, what, atol=1e-6):
    """Values of a whole model (`one`) and of a sharded one, by name."""
    assert one.keys() == two.keys() and len(one) > 1
    for name, value in one.items():
        other = whole(two[name])
        assert torch.allclose(value, other, atol=atol), f"{what} {name} {(value - other).abs().max()}"


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def sharded() -> None:
    """Every process sees the same rows, so that the mean over processes is what one would compute."""
    shards_of_plain_functions()
    two_updates_of_d3()
    for layer, units in (("classifier", "rows"), ("intermediate", "hidden")):
        cosine_of_ulrl(layer, units)


def shards_of_plain_functions() -> None:
    found = []
    for split in (False, True):
        model = shard(vit()) if split else vit()
        matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
        references = {name: p.detach().clone().mul_(0.5).add_(0.01) for name, p in matrices.items()}
        before = pull_away_(list(matrices.values()), list(references.values()), 0.7)
        pulled = {name: p.grad for name, p in matrices.items()}
        project_([p.detach() for p in matrices.values()], 2 * torch.ones(len(matrices)))
        after = distances([p.detach() for p in matrices.values()], list(references.values()))
        found.append(({"before": before, "after": after}, pulled, parameters(model)))
    for one, two, what in zip(*found, ("distances", "pull", "projection"), strict=True):
        alike(one, two, what)
    norms = [whole(value).norm().item() for value in found[1][2].values() if value.ndim == 2]
    assert len(norms) > 4 and norms == pytest.approx([2.0] * len(norms), rel=1e-6)


def two_updates_of_d3() -> None:
    """As the Trainer does it: prepared whole, then sharded."""
    inputs, found = stack(image_list(8)), []
    labels = inputs.pop("labels")
    for split in (False, True):
        objective, model = D3(), vit()
        objective.prepare(SimpleNamespace(model=model, args=SimpleNamespace(seed=0)), checkpoint=None)
        if split:
            shard(model)
        objective.on_train_begin(None, None, None, model=model)
        assert all(hasattr(p, "full_tensor") == split for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            logits = model(**inputs).logits
            step = Step(
                model=model,
                inputs=inputs,
                labels=labels,
                row_ids=None,
                epoch=0.0,
                global_step=0,
                training=True,
                logits=logits,
            )
            objective.loss(step).mean().backward()
            objective.on_pre_optimizer_step(None, None, None, model=model)
            pulled = {name: whole(value).clone() for name, value in gradients(model).items()}
            optimizer.step()
            objective.on_optimizer_step(None, None, None, model=model)
        state = objective.state_dict()
        start = {name: value for name, value in state.items() if name.startswith("W0.")}
        objective.on_train_end(None, None, None, model=model)
        ratios = {key: torch.tensor(objective.state_dict()[key]) for key in ("radius", "distance")}
        found.append((pulled, parameters(model), start, ratios))
    if torch.distributed.get_rank():  # W0 is put together where it is written
        assert all(value.numel() == 0 for value in found[1][2].values())
        found[1] = (*found[1][:2], found[0][2], found[1][3])
    for one, two, what in zip(*found, ("gradient", "weight", "W0", "figure"), strict=True):
        alike(one, two, what)
    assert not any(hasattr(value, "full_tensor") for value in found[1][2].values())


def cosine_of_ulrl(where: str, units: str) -> None:
    inputs, found = stack(image_list(8)), []
    labels = inputs.pop("labels")
    for split in (False, True):
        model, flagged = vit(), [1, 3]
        width = model.config.intermediate_size
        layer = "classifier" if where == "classifier" else next(
            name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == width
        )  # fmt: skip
        old = dict(vit(seed=1).named_parameters())[f"{layer}.weight"].detach()
        objective, none = ULRL(alpha=5.0), torch.zeros(5)
        objective.load_state_dict({
            "old": old[flagged], "scores": none, "z": none, "cosine": torch.zeros(()), "flagged": flagged, "accuracies": [],
            "unlearned": 1, "stop": 0.2, "layer": layer, "units": units,
        })  # fmt: skip
        if split:
            shard(model)
            assert all(hasattr(p, "full_tensor") for p in model.parameters())
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        if split and units == "hidden":  # what the outermost module owns is whole between its forward and backward
            assert hasattr(dict(model.named_parameters())[f"{layer}.weight"], "full_tensor")
        step = SimpleNamespace(model=model, log=lambda name, value, latest=False: None)
        penalty = objective.penalties(step)["cosine"]
        (loss + penalty).backward()
        found.append((gradients(model), {"loss": loss.detach(), "penalty": penalty.detach()}))
    for one, two, what in zip(*found, (f"gradient at {where}", "value"), strict=True):
        alike(one, two, what)


def test_two_processes_equal_one_and_shards_are_slices(tmp_path, two):
    place = two("test_purifiers")
    assert run(tmp_path, batch_size=8) == 1
    for name in CASES:
        one, other = tmp_path / name, place / name
        start, end = (load_file(one / f"{when}0.safetensors") for when in ("start", "end"))
        evidence = json.loads((one / "found0.json").read_text())
        for rank in range(2):
            assert same(load_file(other / f"start{rank}.safetensors"), start), (name, rank)
            assert same(load_file(other / f"end{rank}.safetensors"), end, atol=1e-5), (name, rank)
            found = json.loads((other / f"found{rank}.json").read_text())
            if name == "ulrl":
                layers, expected = found.pop("layers"), evidence["layers"]
                assert found == {key: value for key, value in evidence.items() if key != "layers"}
                assert found["suspected_classes"] and len(layers) == len(expected)
                for layer, right in zip(layers, expected, strict=True):
                    assert (layer["name"], layer["flagged"]) == (right["name"], right["flagged"])
                    assert layer["scores"] == pytest.approx(right["scores"], abs=1e-5)
                    assert layer["z"] == pytest.approx(right["z"], abs=1e-5 / right["mad"])
            else:
                ratios = [[layer["ratio"] for layer in e["layers"]] for e in (found, evidence)]
                assert ratios[0] == pytest.approx(ratios[1], abs=1e-5)
        assert not same(start, vit().state_dict(), atol=1e-3) and not same(start, end, atol=1e-3)
