"""`purify` and whole runs of `hfbd clean --method d3|ulrl|…` on tiny models: what changes, what does not, stopped runs, leaks."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification, default_data_collator

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.data.images import load_images
from hf_backdoor_defense.experiment.purify import purify
from hf_backdoor_defense.experiment.purify_arguments import PurifyArguments
from hf_backdoor_defense.experiment.purify_plan import resolve, split_samples
from hf_backdoor_defense.experiment.purify_run import execute
from hf_backdoor_defense.experiment.purify_training import METHODS, build_purifier, purify_settings
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.registry import PURIFIERS
from hf_backdoor_defense.reporting.results import read_records
from hf_backdoor_defense.vision import new_digits_vit
from tests.experiment.named import named
from tests.experiment.tiny import WORDS

ROOT = Path(__file__).parents[2]


def write_texts(path, count, start=0):
    rows = [
        {"text": f"{WORDS[i % 3][i % 20]} {WORDS[i % 3][i // 20 % 20]} the", "label": i % 3}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(classifier, tmp_path):
    return PurifyArguments(
        method="d3",
        model_name=str(shutil.copytree(classifier, tmp_path / "model")),
        clean=str(write_texts(tmp_path / "clean.jsonl", 40)),
        max_length=8,
        epochs=2,
        batch_size=16,
        output_dir=str(tmp_path / "run"),
        disable_tqdm=True,
    )


def run(arguments, **fields):
    plan = resolve(arguments, build_purifier(arguments.method, fields))
    return plan, execute(plan)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


# -- one call ---------------------------------------------------------------------------------------------------------
def rows_of(path):
    return Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()])


def test_the_callers_model_stays_and_the_report_holds_what_was_done(arguments, tmp_path):
    model = BertForSequenceClassification.from_pretrained(arguments.model_name)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name)
    before, rows = weights_sha256(model), rows_of(arguments.clean)
    result = purify(
        model,
        rows,
        processor=tokenizer,
        validation=rows.select(range(10)),
        epochs=2,
        batch_size=16,
        max_length=8,
        show_progress=False,
    )
    report = json.loads(json.dumps(result.report))
    assert weights_sha256(model) == before == report["sha256"]["before"]
    assert report["sha256"]["after"] == weights_sha256(result.model) != before
    assert (report["method"], report["rows"], report["steps"], report["kind"]) == ("d3", 40, 6, "text")
    assert report["class_counts"] == {"class 0": 14, "class 1": 13, "class 2": 13} and report["inert"] is None
    linear = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert report["activity"]["d3_updates"] == 6
    assert [layer["name"] for layer in report["evidence"]["layers"]] == linear
    assert report["clean_accuracy"]["before"]["n"] == 10 and len(report["history"]) == 6
    folder = result.save(tmp_path / "out")
    assert (
        same(weights(folder), result.model.state_dict())
        and json.loads((folder / "purification.json").read_text()) == report
    )
    assert json.loads((folder / "defense.json").read_text())["objectives"][0]["config"]["name"] == "d3"
    with pytest.raises(ValueError, match="not empty"):
        result.save(folder)


def test_the_control_is_sgd_with_momentum_and_a_cosine(arguments):
    """Against a loop of its own: full batches, no dropout."""
    model = BertForSequenceClassification.from_pretrained(
        arguments.model_name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    ids = torch.tensor([[2, 5 + i, 3] for i in range(12)])
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "label": [i % 3 for i in range(12)]})
    result = purify(
        model,
        rows,
        defense=None,
        collate=default_data_collator,
        learning_rate=0.05,
        epochs=4,
        batch_size=12,
        show_progress=False,
    )
    labels, velocity = torch.tensor(rows["label"][:]), {}
    for step in range(4):
        rate = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 4))) / 2
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits, labels).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.grad is not None:
                    velocity[name] = 0.9 * velocity.get(name, 0) + p.grad
                    p -= rate * velocity[name]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_lora_model_is_merged_in_the_copy(arguments):
    model = apply_strategy(BertForSequenceClassification.from_pretrained(arguments.model_name), "lora")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name)
    result = purify(
        model,
        rows_of(arguments.clean),
        defense="fine_tuning",
        processor=tokenizer,
        epochs=1,
        max_length=8,
        show_progress=False,
    )
    assert not any("lora" in name for name, _ in result.model.named_parameters()) and hasattr(model, "peft_config")
    assert "merged" in result.report["notes"][0]


def test_what_purify_refuses(arguments, tmp_path):
    def refused(message, rows=None, **options):
        with pytest.raises(ValueError, match=message):
            purify(arguments.model_name, rows or rows_of(arguments.clean), max_length=8, show_progress=False, **options)

    texts = [f"a{i}" for i in range(12)]
    refused("at least 10", Dataset.from_dict({"text": ["a1"] * 6, "label": [0] * 6}))
    refused(r"in 0\.\.2, got 7", Dataset.from_dict({"text": texts, "label": [0, 7] * 6}))
    refused("column `label`", Dataset.from_dict({"text": texts}))
    refused("no purifier `d33`: did you mean `d3`", defense="d33")
    refused("`epochs` must be finite and above 0", epochs=0)
    refused("cannot be purified:\n- d3: .*nowhere", defense=build_purifier("d3", {"targets": ["nowhere"]}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refused("is not empty and no run folder", output_dir=tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


def test_no_purifier_has_a_place_for_triggered_or_test_rows():
    callables = [purify, build_purifier, purify_settings]
    for name in PURIFIERS:
        kind = type(build_purifier(name))
        callables += [kind.__init__, kind.prepare, kind.check]
    words = ("trigger", "poison", "attack", "target_class", "test", "asr")
    for function in callables:
        names = inspect.signature(function).parameters
        assert not [name for name in names if any(word in name for word in words)], function


# -- whole runs -------------------------------------------------------------------------------------------------------
def test_every_arm_sees_the_same_and_the_input_is_left_alone(arguments, tmp_path):
    mark_backdoored(arguments.model_name, {"attack": "badnets", "seed": 3})
    given = contents(arguments.model_name)
    plan, outcome = run(
        replace(
            arguments,
            test=str(write_texts(tmp_path / "test.jsonl", 12, start=60)),
            simulate="badnets",
            target="class 1",
            clean_reference=arguments.model_name,
        )
    )
    assert contents(arguments.model_name) == given and outcome.exit_code == 0
    found = {(record.defense, record.metric): record for record in read_records(plan.folder / "results.json")}
    trained = {(arm, metric) for arm in ("d3", "fine_tuning") for metric in ("ca", "asr", "r_acc", "der", "seconds")}
    measured = {("undefended", metric) for metric in ("ca", "asr", "r_acc")}
    assert set(found) == trained | measured | {("clean_reference", metric) for metric in ("ca", "ftr", "r_acc")}
    assert found["clean_reference", "ftr"].value == found["undefended", "asr"].value  # it is the same model
    assert {found[key].n for key in found if key[1] == "asr"} == {8} and found["d3", "ca"].n == 12
    payload = json.loads((plan.folder / "results.json").read_text())
    one, other = (payload["arms"][arm] for arm in ("d3", "fine_tuning"))
    assert (one["rows"], one["steps"]) == (other["rows"], other["steps"]) == (40, 6)
    assert one["sha256"]["before"] == other["sha256"]["before"] and one["sha256"]["after"] != other["sha256"]["after"]
    assert (
        weights_sha256(BertForSequenceClassification.from_pretrained(plan.folder / "model")) == one["sha256"]["after"]
    )
    record = json.loads((plan.folder / "model" / "backdoored.json").read_text())
    assert record["attack"] == "badnets" and record["cleaned"] == {"method": "d3"}
    page = (plan.folder / "report.html").read_text()
    assert "Distance of each weight" in page and "fine_tuning" in page and "http" not in page.replace("http-equiv", "")
    assert "plain fine-tuning" in outcome.verdict and outcome.verdict in (plan.folder / "table.txt").read_text()
    names = {path.name for path in plan.folder.iterdir()}
    assert names == {
        "model",
        "arms",
        "plan.json",
        "results.json",
        "checksums.json",
        "table.txt",
        "report.html",
        "backdoored.json",
    }
    assert not [path for path in plan.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth")]
    evidence = named(plan.folder, "purify")["model"]
    entry = evidence.entry
    assert (entry.arm, entry.role, entry.weights_sha256) == ("d3", "purified", one["sha256"]["after"])
    assert entry.controls == ["undefended", "fine_tuning", "clean_reference"] and entry.attacked == record
    assert entry.method == {**plan.objective.to_dict()} and entry.activity == one["activity"]
    assert "-> class 1 (1)" in entry.data["trigger"] and entry.data["measured on"].startswith("12 rows")


def test_ulrl_shows_its_scores_and_no_suspect_is_no_failure(arguments):
    plan, outcome = run(replace(arguments, method="ulrl", control=False), z_threshold=1000.0, unlearn_epochs=2)
    assert outcome.exit_code == 0 and "No suspect was found" in outcome.verdict
    assert "Units of bert.pooler.dense" in (plan.folder / "report.html").read_text()
    assert not (plan.folder / "arms" / "fine_tuning").exists()
    held_out = named(plan.folder, "purify")["model"].entry  # without --test the rows come from --clean
    assert held_out.measurement["held_out"] == 0.2 and held_out.controls == ["undefended"]


def test_a_diverged_unlearning_leaves_nothing(arguments):
    with pytest.raises(FloatingPointError, match="diverged"):
        run(replace(arguments, method="ulrl"), unlearn_lr=1e30, unlearn_clip=1e30)
    assert not Path(arguments.output_dir).exists()


def test_images_run_alike(tmp_path):
    model, processor = new_digits_vit()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")
    arguments = PurifyArguments(
        method="fine_tuning", model_name=str(tmp_path / "vit"), clean="offline:digits", limit=40, test="offline:digits",
        simulate="patch", target="0", epochs=1, output_dir=str(tmp_path / "run"), disable_tqdm=True,
    )  # fmt: skip
    plan, outcome = run(arguments)
    assert plan.classifier.kind == "image" and set(plan.clean["label"]) == set(range(10))
    found = {(record.defense, record.metric): record.n for record in outcome.records}
    assert (
        found["fine_tuning", "ca"] == 450 and found["undefended", "asr"] == 405
    )  # ten equal classes but for the target's 45
    assert len(load_images("offline:digits")["test"]) == 450


KILLED = """
import os, signal, sys
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.cli.main import main

pull = D3.on_pre_optimizer_step

def die(self, args, state, control, **kwargs):
    if state.global_step == 3:  # after the first epoch of two updates, in the middle of the second
        os.kill(os.getpid(), signal.SIGKILL)
    pull(self, args, state, control, **kwargs)

D3.on_pre_optimizer_step = die
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_with_the_weights_of_an_uninterrupted_one(arguments):
    arguments = replace(arguments, epochs=3, control=False)
    whole, outcome = run(replace(arguments, output_dir=arguments.output_dir + "-whole"))
    assert whole.steps == 6
    words = ["clean"]
    for key in (
        "method",
        "model_name",
        "clean",
        "max_length",
        "epochs",
        "batch_size",
        "control",
        "output_dir",
        "disable_tqdm",
    ):
        words += [f"--{key}", str(getattr(arguments, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = Path(arguments.output_dir)
    assert [path.name for path in (folder / "checkpoints" / "d3").iterdir()] == ["checkpoint-2"]
    assert not (folder / "model").exists() and not (folder / "results.json").exists()
    plan, again = run(arguments)
    assert same(weights(plan.folder / "model"), weights(whole.folder / "model")) and again.verdict == outcome.verdict
    one, other = (json.loads((p.folder / "results.json").read_text())["arms"]["d3"] for p in (whole, plan))
    assert one["evidence"] == other["evidence"] and one["scores"] == other["scores"] and other["seconds"] is None
    before = contents(folder)
    assert execute(plan).verdict == again.verdict and contents(folder) == before


def test_a_folder_belongs_to_content_and_settings_and_not_to_names(arguments, tmp_path):
    plan = resolve(arguments, build_purifier("d3"))
    renamed = replace(
        arguments,
        model_name=str(shutil.copytree(arguments.model_name, tmp_path / "copy")),
        clean=str(shutil.copy(arguments.clean, tmp_path / "copy.jsonl")),
    )
    assert resolve(renamed, build_purifier("d3")).identity() == plan.identity()
    write_texts(Path(renamed.clean), 41)
    assert resolve(renamed, build_purifier("d3")).identity() != plan.identity()
    assert resolve(arguments, build_purifier("d3", {"eps": 0.2})).identity() != plan.identity()


def test_equal_rows_lie_on_one_side_and_a_larger_share_holds_a_smaller_one():
    rows = Dataset.from_dict({"text": [str(i // 2) for i in range(200)]})
    clean, held_out = split_samples(rows, 0.2)
    assert not set(clean["text"]) & set(held_out["text"]) and len(clean) + len(held_out) == 200
    assert set(held_out["text"]) <= set(split_samples(rows, 0.3)[1]["text"])
    assert len(split_samples(rows.select(range(40)), 0.01)[1]) in (10, 11)
    with pytest.raises(ValueError, match="none would be left"):
        split_samples(Dataset.from_dict({"text": ["same"] * 50}), 0.2)


def test_methods_are_the_purifiers_and_the_control():
    assert (*PURIFIERS, "fine_tuning") == METHODS
    with pytest.raises(ValueError, match="has no fields, got rho"):
        build_purifier("fine_tuning", {"rho": 1.0})
