"""Two gloo processes against one: the same update, and every row ranked once."""

import os
import socket
import subprocess
import sys
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

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from tests.distributed.test_two_processes import run
folder = Path(sys.argv[1])
world = run(folder, batch_size=4)
assert world == 2, world
"""


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


def test_two_processes_equal_one(tmp_path):
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
    assert run(tmp_path / "one", batch_size=8) == 1
    for name in ("classifier", "layerwise", "language", "undefended", "fused", "masked", "translation"):
        one, two = (load_file(tmp_path / where / name / "final" / "model.safetensors") for where in ("one", "two"))
        assert same(one, two, atol=2e-6), name
        if name == "fused":
            assert same(two, load_file(tmp_path / "two" / "language" / "final" / "model.safetensors"), atol=2e-6)
    first, second = (load_objective(TrajectoryFilter, tmp_path / w / "classifier" / "final") for w in ("one", "two"))
    a, b = first.ranking(), second.ranking()
    assert sorted(a.row_ids.tolist()) == sorted(b.row_ids.tolist()) == list(range(1000, 1016))
    for name in a.columns:
        left, right = (dict(zip(r.row_ids.tolist(), r.columns[name].tolist(), strict=True)) for r in (a, b))
        assert left == pytest.approx(right, abs=1e-4)
