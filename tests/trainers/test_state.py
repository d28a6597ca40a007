"""Saving, loading and resuming."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.state import load_objective, load_renamed, load_states, save_objectives
from tests.trainers.image_toys import vit
from tests.trainers.toys import PadCollator, Recorder, arguments, bert, classification_rows, same, weights


def make(folder, defense, **args):
    return DefendedTrainer(
        bert(dropout=0.1),
        args=arguments(folder, num_train_epochs=3, optim="adamw_torch", learning_rate=1e-3, **args),
        train_dataset=classification_rows(24),
        data_collator=PadCollator(),
        defense=defense,
    )


def test_model_and_checkpoint_hold_the_defense_and_no_pickle_of_ours(tmp_path):
    trainer = make(tmp_path, DeCE(alpha_base=0.9), save_strategy="epoch")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in [tmp_path / "final", *tmp_path.glob("checkpoint-*")]:
        loaded = load_objective(DeCE, folder)
        assert loaded == DeCE(alpha_base=0.9) != DeCE()
        assert (folder / "model.safetensors").exists() and (folder / "defense.safetensors").exists()
    assert load_objective(DeCE, tmp_path / "final").activity() == trainer.objectives[0].activity()


def test_state_comes_back_tensor_for_tensor(tmp_path):
    recorder = Recorder()
    recorder.values = [torch.arange(5.0), torch.ones(2)]
    save_objectives([recorder], tmp_path)
    again = load_objective(Recorder, tmp_path)
    assert again.loaded["seen"] == 2 and torch.equal(again.loaded["losses"], torch.cat(recorder.values))


def test_another_configuration_or_method_is_refused(tmp_path):
    save_objectives([DeCE(alpha_base=0.9)], tmp_path)
    load_states([DeCE(alpha_base=0.9)], tmp_path)
    with pytest.raises(ValueError, match="resuming would mix the two"):
        load_states([DeCE(alpha_base=0.8)], tmp_path)
    with pytest.raises(ValueError, match="not trained with recorder"):
        load_objective(Recorder, tmp_path)
    with pytest.raises(ValueError, match="no defense.json"):
        load_objective(DeCE, tmp_path / "nowhere")
    record = json.loads((tmp_path / "defense.json").read_text())
    (tmp_path / "defense.json").write_text(json.dumps({**record, "version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        load_objective(DeCE, tmp_path)


def test_resume_without_checkpoint_or_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        make(tmp_path, DeCE()).train(resume_from_checkpoint=True)
    bad = tmp_path / "checkpoint-1"
    bad.mkdir()
    (bad / "pytorch_model.bin").write_bytes(b"pickle")
    save_objectives([DeCE()], bad)  # our own safetensors file is no weights
    with pytest.raises(ValueError, match=r"no safetensors weights \(found: pytorch_model.bin\)"):
        make(tmp_path, DeCE()).train(resume_from_checkpoint=str(bad))


SCRIPT = """
import sys
from tests.trainers.test_state import make
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.trajectory import TrajectoryFilter
folder = sys.argv[1]
trainer = make(folder, [DeCE(alpha_base=0.8), TrajectoryFilter()], save_strategy="steps", save_steps=4)
trainer.train(resume_from_checkpoint=folder + "/checkpoint-4")  # three steps an epoch: inside the second one
trainer.save_model(folder + "/resumed")
"""


def test_resume_in_a_new_process_inside_an_epoch_continues_exactly(tmp_path):
    whole = make(tmp_path, [DeCE(alpha_base=0.8), TrajectoryFilter()], save_strategy="steps", save_steps=4)
    whole.train()
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, cwd=root, timeout=300)
    resumed = bert()
    resumed = type(resumed).from_pretrained(tmp_path / "resumed")
    assert same(weights(whole), weights(resumed))
    for kind, index in ((DeCE, 0), (TrajectoryFilter, 1)):
        again = load_objective(kind, tmp_path / "resumed")
        here = whole.objectives[index]
        for key, value in here.activity().items():
            assert key == "seconds" or again.activity()[key] == pytest.approx(value)
        state, other = here.state_dict(), again.state_dict()
        assert state.keys() == other.keys()
        for key, value in state.items():
            if key == "seconds":  # wall time of each process's own passes
                continue
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]


def test_resume_inside_an_epoch_with_grouped_lengths_warns_that_it_is_not_exact(tmp_path, caplog):
    grouped = {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 1}
    make(tmp_path, None, **grouped).train()
    make(tmp_path, None, **grouped).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "does not repeat the order of rows" in caplog.text
    caplog.clear()
    make(tmp_path, None, **grouped).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "does not repeat" not in caplog.text


def test_resume_calls_load_before_prepare_with_the_path(tmp_path):
    first = make(tmp_path, Recorder(), save_strategy="epoch")
    first.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    order = []
    recorder = Recorder()
    recorder.load_state_dict = lambda state: order.append(("load", state["seen"]))
    recorder.prepare = lambda trainer, *, checkpoint: order.append(("prepare", checkpoint))
    make(tmp_path, recorder, save_strategy="no").train(resume_from_checkpoint=checkpoint)
    assert order == [("load", 3), ("prepare", checkpoint)]


def test_weights_saved_under_other_names_come_back(tmp_path):
    """A ViT is saved with the names of published checkpoints, a BERT with its own: that one is the Trainer's to load."""
    saved = vit()
    saved.save_pretrained(tmp_path / "vit")
    assert not set(load_file(tmp_path / "vit" / "model.safetensors")) <= set(saved.state_dict())
    fresh = vit(seed=5).eval()
    identities = [id(p) for p in fresh.parameters()]
    load_renamed(fresh, tmp_path / "vit")
    assert same(weights(fresh), weights(saved)) and not same(weights(fresh), weights(vit(seed=5)))
    assert [id(p) for p in fresh.parameters()] == identities and not fresh.training  # an optimizer may hold them
    bert(seed=0).save_pretrained(tmp_path / "bert")
    other = bert(seed=1)
    load_renamed(other, tmp_path / "bert")
    assert same(weights(other), weights(bert(seed=1)))
    layer = torch.nn.Linear(2, 2)
    before = weights(layer)
    load_renamed(layer, tmp_path / "vit")
    assert same(weights(layer), before)
