"""Whole runs of `hfbd clean` on a tiny model: what changes and what does not, stopped runs, marks, warm-up, the control."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertModel

from hf_backdoor_defense import warm_up
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.experiment import clean_run
from hf_backdoor_defense.experiment.clean import CleanArguments, build_method
from hf_backdoor_defense.experiment.clean_plan import resolve, split_texts, training_rows
from hf_backdoor_defense.experiment.clean_run import execute
from hf_backdoor_defense.models import mark_backdoored
from hf_backdoor_defense.pretrained import head_is_fresh, load_pretrained_whole
from hf_backdoor_defense.reporting.results import read_records
from hf_backdoor_defense.trainers.state import load_objective
from hf_backdoor_defense.warm_up import held_out_loss
from tests.experiment import tiny_mlm
from tests.experiment.named import named

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "model").mkdir()
    return CleanArguments(
        model_name=str(tiny_mlm.save(tmp_path / "model")),
        text=str(tiny_mlm.write_text(tmp_path / "text.txt")),
        max_length=16,
        epochs=3,
        batch_size=16,
        output_dir=str(tmp_path / "run"),
        disable_tqdm=True,
    )


def run(arguments, **fields):
    plan = resolve(arguments, build_method(arguments.method, fields))
    return plan, execute(plan)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_matrices_shrink_and_nothing_else_changes(arguments):
    plan, outcome = run(arguments)
    before, after = weights(arguments.model_name), weights(plan.folder / "model")
    assert before.keys() == after.keys() and any("pooler" in name for name in after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in (0, 1)}
    ratio = sum((after[name].norm() / before[name].norm()).item() for name in changed) / 2
    training = json.loads((plan.folder / "model" / "training.json").read_text())
    activity = training["method"]["activity"]
    assert activity["norm_ratio"] == pytest.approx(ratio, rel=1e-4) and ratio < 0.5
    assert activity["dose"] == pytest.approx(plan.facts.dose, rel=1e-9)  # said before, reached after
    assert training["steps"] == plan.facts.steps == 3 * 6
    assert [entry["step"] for entry in training["history"]] == list(range(1, 19))
    assert outcome.exit_code == 0
    assert {path.name for path in plan.folder.iterdir()} == {
        "model",
        "plan.json",
        "results.json",
        "checksums.json",
        "table.txt",
        "report.html",
    }
    assert not list(plan.folder.rglob("*.bin")) and not list(plan.folder.rglob("*.pt"))


def test_what_is_written_is_what_was_measured(arguments):
    plan, outcome = run(arguments)
    records = read_records(plan.folder / "results.json")
    assert records == outcome.records
    found = {(record.setting, record.metric): record for record in records}
    assert set(found) == {
        ("before", "loss"),
        *(("after", metric) for metric in ("loss", "norm_ratio", "dose", "seconds")),
    }
    taken = json.loads((plan.folder / "model" / "training.json").read_text())["seconds"]
    assert found["after", "seconds"].value == taken > 0
    for setting, folder in (("before", arguments.model_name), ("after", plan.folder / "model")):
        model, tokenizer = load_pretrained_whole(str(folder))
        loss = held_out_loss(model, tokenizer, plan.held_out, max_length=16)
        record = found[setting, "loss"]
        assert (record.value, record.n) == (pytest.approx(loss.loss, rel=1e-6), loss.n)
    objective = load_objective(RECIPE, plan.folder / "model")
    assert objective == plan.method and objective.activity()["norm_ratio"] == found["after", "norm_ratio"].value
    entry = named(plan.folder, "clean")["model"].entry
    training = json.loads((plan.folder / "model" / "training.json").read_text())
    assert entry.weights_sha256 == training["sha256"]["after"] and entry.pipeline_tag == "fill-mask"
    assert (entry.role, entry.measurement, entry.labels) == ("cleaned", {}, []) and entry.method["name"] == "recipe"
    table = (plan.folder / "table.txt").read_text()
    assert outcome.table in table and outcome.verdict in table and "says nothing about triggers" in outcome.verdict


def test_the_pooler_reaches_a_classifier(arguments):
    plan, _ = run(arguments)
    model = AutoModelForSequenceClassification.from_pretrained(plan.folder / "model", num_labels=2)
    given = weights(arguments.model_name)["bert.pooler.dense.weight"]
    assert torch.equal(model.bert.pooler.dense.weight.detach(), given)


def test_the_control_is_the_same_training_without_the_norms(arguments):
    plan, _ = run(arguments)
    control, outcome = run(replace(arguments, method="pretraining", output_dir=arguments.output_dir + "-control"))
    assert (control.facts.steps, control.facts.learning_rate) == (plan.facts.steps, plan.facts.learning_rate)
    assert outcome.exit_code == 0 and "the control" in outcome.verdict
    found = {record.metric: record.value for record in outcome.records if record.setting == "after"}
    assert found["norm_ratio"] > 0.9 and found["dose"] == pytest.approx(plan.facts.dose)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    before, after = weights(arguments.model_name)[name], weights(control.folder / "model")[name]
    assert not torch.equal(before, after)  # it trains


KILLED = """
import os, signal, sys
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.cli.main import main

add_up = RECIPE.on_pre_optimizer_step

def die(self, args, state, control, **kwargs):
    if state.global_step == 9:  # in the middle of the second epoch of six updates
        os.kill(os.getpid(), signal.SIGKILL)
    add_up(self, args, state, control, **kwargs)

RECIPE.on_pre_optimizer_step = die
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_with_the_weights_of_an_uninterrupted_one(arguments):
    whole, outcome = run(replace(arguments, output_dir=arguments.output_dir + "-whole"))
    words = ["clean"]
    for key in ("model_name", "text", "max_length", "epochs", "batch_size", "output_dir", "disable_tqdm"):
        words += [f"--{key}", str(getattr(arguments, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, timeout=300)
    assert killed.returncode == -9, killed.stderr.decode()
    folder = Path(arguments.output_dir)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-6"]
    assert not (folder / "model").exists() and not (folder / "results.json").exists()
    half = folder / "checkpoints" / "checkpoint-12"  # as if it had been killed while this one was written
    half.mkdir()
    shutil.copy(folder / "checkpoints" / "checkpoint-6" / "model.safetensors", half)
    plan, again = run(arguments)
    assert same(weights(plan.folder / "model"), weights(whole.folder / "model"))
    assert not (folder / "checkpoints").exists()
    measured = [r.value for r in outcome.records if r.metric != "seconds"]  # those of a last part are not told
    assert [r.value for r in again.records] == measured and again.verdict == outcome.verdict
    one, other = (json.loads((p.folder / "results.json").read_text())["training"] for p in (whole, plan))
    assert [entry["loss"] for entry in one["history"]] == [entry["loss"] for entry in other["history"]]
    assert one["seconds"] > 0 and other["seconds"] is None


@pytest.mark.parametrize("place", ["save_pretrained_whole", "write_json", "_account"])
def test_a_run_that_stops_while_it_writes_leaves_no_half_model(arguments, monkeypatch, place):
    whole, _ = run(replace(arguments, output_dir=arguments.output_dir + "-whole"))
    with monkeypatch.context() as patch:
        usual = getattr(clean_run, place)

        def stops(*args, **kwargs):
            if place == "write_json" and args[0].name != clean_run.TRAINING_NAME:
                return usual(*args, **kwargs)
            if place == "save_pretrained_whole":
                usual(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(clean_run, place, stops)
        with pytest.raises(KeyboardInterrupt):
            run(arguments)
    folder = Path(arguments.output_dir)
    assert (folder / "model").exists() == (place == "_account") and not (folder / "results.json").exists()
    plan, outcome = run(arguments)
    assert outcome.exit_code == 0 and same(weights(plan.folder / "model"), weights(whole.folder / "model"))
    assert not list(folder.glob(".model*"))


def test_an_attacked_input_stays_marked_wherever_it_went(arguments, caplog):
    mark_backdoored(arguments.model_name, {"attack": "por", "triggers": ["cf"], "seed": 3})
    with caplog.at_level(logging.WARNING):
        plan, outcome = run(arguments)
    assert caplog.text.count("on purpose") == 1
    record = json.loads((plan.folder / "model" / "backdoored.json").read_text())
    assert record["backdoored"] is True and record["attack"] == "por" and record["triggers"] == ["cf"]
    assert record["cleaned"]["method"] == "recipe" and record["cleaned"]["dose"] == pytest.approx(plan.facts.dose)
    assert json.loads((plan.folder / "backdoored.json").read_text())["backdoored"] is True
    assert {r.attack for r in outcome.records} == {"por"}
    clean, _ = run(replace(arguments, output_dir=str(plan.folder) + "-again", model_name=str(plan.folder / "model")))
    assert json.loads((clean.folder / "model" / "backdoored.json").read_text())["attack"] == "por"


def test_a_clean_input_is_not_marked(arguments):
    plan, outcome = run(arguments)
    assert not list(plan.folder.rglob("backdoored.json")) and {r.attack for r in outcome.records} == {"none"}


def test_a_folder_belongs_to_content_and_not_to_names(arguments, tmp_path):
    plan, _ = run(arguments)
    shutil.copytree(arguments.model_name, tmp_path / "copy")
    shutil.copy(arguments.text, tmp_path / "copy.txt")
    renamed = replace(arguments, model_name=str(tmp_path / "copy"), text=str(tmp_path / "copy.txt"))
    assert resolve(renamed, build_method("recipe", {})).identity() == plan.identity()
    with Path(renamed.text).open("a") as file:
        file.write("w1 w2 w3 w4\n")
    with pytest.raises(ValueError, match=r"sha256\."):
        resolve(renamed, build_method("recipe", {}))
    with pytest.raises(ValueError, match=r"method\.dose"):
        resolve(arguments, build_method("recipe", {"dose": 1.0}))


def test_held_out_texts_are_trained_on_nowhere(arguments):
    plan = resolve(arguments, build_method("recipe", {}))
    texts = [line.strip() for line in Path(arguments.text).read_text().splitlines()]
    assert sorted(plan.texts + plan.held_out) == sorted(texts) and not set(plan.texts) & set(plan.held_out)
    reversed_parts = split_texts(texts[::-1], 0.1)
    assert [part[::-1] for part in reversed_parts] == [plan.texts, plan.held_out]
    assert split_texts(["one text"] * 50, 0.5) in (([], ["one text"] * 50), (["one text"] * 50, []))
    more = split_texts(texts, 0.3)[1]
    assert set(plan.held_out) < set(more)  # a larger share holds the smaller one


def test_masks_drawn_once_are_the_same_for_every_call_and_padded(arguments):
    arguments = replace(arguments, static_masks=True)
    _, tokenizer = load_pretrained_whole(arguments.model_name)
    texts = Path(arguments.text).read_text().splitlines()
    rows, again = (training_rows(arguments, tokenizer, texts) for _ in range(2))
    assert rows["labels"][:] == again["labels"][:] and {len(ids) for ids in rows["input_ids"]} == {16}
    plan, outcome = run(arguments)
    assert outcome.exit_code == 0 and json.loads((plan.folder / "plan.json").read_text())["clean"]["static_masks"]


def headless(arguments, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(arguments.model_name, folder)
    BertModel(tiny_mlm.config()).save_pretrained(folder)
    return replace(arguments, model_name=str(folder), warm_up=True)


def test_a_missing_head_is_warmed_up_once(arguments, tmp_path, monkeypatch, capsys):
    arguments = headless(arguments, tmp_path)
    monkeypatch.setattr(warm_up, "gate_reasons", lambda losses: [])  # 100 lines make no language model
    plan, outcome = run(arguments)
    assert plan.fresh and outcome.exit_code == 0 and "a masked-LM head is trained first" in plan.text()
    (made,) = (plan.folder / "warm_up").iterdir()
    before, after = weights(made), weights(plan.folder / "model")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"bert.encoder.layer.{i}.intermediate.dense.weight" for i in (0, 1)
    }
    model, _ = load_pretrained_whole(str(plan.folder / "model"))
    assert head_is_fresh(model) is False
    training = json.loads((plan.folder / "results.json").read_text())["training"]
    assert training["held_out"]["before"]["loss"] == pytest.approx(training["warm_up"]["joint"]["loss"], rel=1e-6)
    for name in ("model", "results.json"):  # as if it had been stopped after the warm-up
        path = plan.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(warm_up, "warm_up_mlm_head", None)
    assert run(arguments)[1].exit_code == 0


def test_a_head_that_predicts_nothing_is_refused_after_its_warm_up(arguments, tmp_path):
    arguments = headless(arguments, tmp_path)
    with pytest.raises(ValueError, match="predicts too little"):
        run(arguments)
    assert not (Path(arguments.output_dir) / "model").exists()


def test_several_processes_are_refused(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        resolve(arguments, build_method("recipe", {}))


@pytest.mark.parametrize(
    ("rate", "why"), [(0.005, "lost to the pre-training loss"), (0.1, "weights grew: lower the learning rate")]
)
def test_a_dose_that_the_loss_outweighs_is_not_called_too_small(arguments, rate, why):
    """A penalty that weighs next to nothing: the norms grow, and at a high rate over few updates they explode."""
    _, outcome = run(replace(arguments, epochs=1, learning_rate=rate), coef=1e-6)
    (failure,) = outcome.failures
    assert outcome.exit_code == 1 and why in failure and "more updates" in failure
    assert "too small" not in failure
