"""Two gloo processes against one: the same update, and every row ranked once."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_backdoor_defense.attacks.weight_poisoning import LWP
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.state import load_objective
from tests.trainers.toys import (
    PadCollator,
    arguments,
    bart,
    bert,
    bert_mlm,
    classification_rows,
    gpt2,
    language_rows,
    masked_rows,
    same,
    translation_rows,
)


def both(folder: Path) -> None:
    """On each of two processes."""
    assert run(folder, batch_size=4) == 2


def run(folder: Path, batch_size: int) -> int:
    """Train the classifier with DeCE and the filter, language models with DeCE and without, fused or not; save them all."""
    cases = {
        "classifier": (bert, classification_rows, [DeCE(alpha_base=0.7), TrajectoryFilter()]),
        "layerwise": (bert, classification_rows, [LWP()]),
        "language": (gpt2, language_rows, [DeCE(alpha_base=0.7)]),
        "undefended": (gpt2, language_rows, None),
        "fused": (gpt2, language_rows, [DeCE(alpha_base=0.7)]),
        "masked": (bert_mlm, masked_rows, None),
        "translation": (bart, translation_rows, [DeCE(alpha_base=0.7)]),
    }
    world = 1
    for name, (model, rows, defense) in cases.items():
        args = arguments(folder / name, per_device_train_batch_size=batch_size, num_train_epochs=2)
        trainer = DefendedTrainer(
            model(), args=args, train_dataset=rows(16), data_collator=PadCollator(), defense=defense
        )
        trainer.fuse_bytes = 0 if name in ("fused", "masked", "translation") else 2**62
        trainer.train()
        trainer.save_model(folder / name / "final")
        world = trainer.accelerator.num_processes
    return world


def test_two_processes_equal_one(tmp_path, two):
    places = {"one": tmp_path, "two": two("test_two_processes")}
    assert run(tmp_path, batch_size=8) == 1
    for name in ("classifier", "layerwise", "language", "undefended", "fused", "masked", "translation"):
        one, two = (load_file(places[where] / name / "final" / "model.safetensors") for where in ("one", "two"))
        assert same(one, two, atol=2e-6), name
        if name == "fused":
            assert same(two, load_file(places["two"] / "language" / "final" / "model.safetensors"), atol=2e-6)
    first, second = (load_objective(TrajectoryFilter, places[w] / "classifier" / "final") for w in ("one", "two"))
    a, b = first.ranking(), second.ranking()
    assert sorted(a.row_ids.tolist()) == sorted(b.row_ids.tolist()) == list(range(1000, 1016))
    for name in a.columns:
        left, right = (dict(zip(r.row_ids.tolist(), r.columns[name].tolist(), strict=True)) for r in (a, b))
        assert left == pytest.approx(right, abs=1e-4)
