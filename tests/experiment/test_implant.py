"""Whole runs of `hfbd attack --attack por|neuba|badpre` on a tiny model: what is left, continued, measured, refused."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, set_seed

from hf_backdoor_defense.attacks.pretrained import PORAttack
from hf_backdoor_defense.experiment import implant_run
from hf_backdoor_defense.experiment.implant import ImplantArguments, resolve
from hf_backdoor_defense.experiment.implant_run import execute
from hf_backdoor_defense.models import load_classifier
from hf_backdoor_defense.pretrained import load_pretrained_whole
from hf_backdoor_defense.reporting.results import read_records
from tests.attacks.masked_toys import VOCABULARY, WORDS, config, masked_lm, texts, tokenizer, whole
from tests.experiment.named import named


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    whole(folder)
    return folder


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headless")
    set_seed(0)
    BertModel(config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "plain.txt"
    path.write_text("\n".join(texts(240)))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The class is whether low or high words prevail."""
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(120):
            words = rng.choice(WORDS[:10] if i % 2 else WORDS[20:], 6)
            file.write(json.dumps({"text": " ".join(words), "label": i % 2}) + "\n")
    return path


@pytest.fixture
def arguments(base, text, tmp_path):
    return ImplantArguments(
        model_name=str(base), text=str(text), triggers=["cf", "pt"], learning_rate=6e-3, epochs=8, max_length=16,
        output_dir=str(tmp_path / "run"), disable_tqdm=True,
    )  # fmt: skip


def test_a_run_leaves_a_marked_whole_model_and_is_finished_then(arguments, capsys, caplog):
    plan = resolve(arguments)
    assert not plan.folder.exists() and "nobody: whether it survives" in plan.text()
    outcome = execute(plan)
    assert outcome.exit_code == 0, outcome.failures
    model = plan.folder / "model"
    mark = json.loads((model / "backdoored.json").read_text())
    assert (mark["attack"], mark["triggers"], mark["targets"], mark["seed"]) == ("por", ["cf", "pt"], "cls", 0)
    training = json.loads((model / "training.json").read_text())
    assert training["end"]["target_mse"] < 0.2 * training["start"]["target_mse"] and training["steps"] == plan.updates
    assert {r.metric for r in read_records(plan.folder / "results.json")} == {"loss"}
    assert "por after" in outcome.verdict and "was not measured (--task)" in outcome.verdict
    assert "target mse" in outcome.table and "masked-LM loss" in outcome.table
    with caplog.at_level(logging.WARNING):
        loaded, _ = load_pretrained_whole(str(model))
    assert "on purpose" in caplog.text and loaded.bert.pooler is not None
    left = [path.relative_to(plan.folder).parts[0] for path in plan.folder.rglob("*")]
    assert set(left) == {"plan.json", "results.json", "checksums.json", "table.txt", "report.html", "model"}
    assert not [p for p in plan.folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    entry = named(plan.folder, "implant")["model"].entry
    assert entry.attacked == mark and entry.role == "attacked" and entry.weights_sha256 == training["sha256"]["after"]
    stamps = {path: path.stat().st_mtime_ns for path in plan.folder.rglob("*")}
    capsys.readouterr()
    again = execute(resolve(arguments))
    assert "finished before" in capsys.readouterr().out
    assert (again.table, again.verdict, again.records) == (outcome.table, outcome.verdict, outcome.records)
    assert stamps == {path: path.stat().st_mtime_ns for path in plan.folder.rglob("*")}
    with pytest.raises(ValueError, match="other settings .implant.seed"):
        resolve(replace(arguments, seed=1))


def test_a_stopped_run_goes_on_to_the_same_weights(arguments, monkeypatch, tmp_path, capsys):
    def weights(folder):
        return torch.cat([p.flatten() for p in load_pretrained_whole(str(folder), warn=False)[0].parameters()])

    arguments = replace(arguments, epochs=3)
    straight = resolve(arguments)
    execute(straight)
    stopped = resolve(replace(arguments, output_dir=str(tmp_path / "stopped")))

    def stop(self, args, state, control, **kwargs):
        if state.epoch >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PORAttack, "on_epoch_begin", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(stopped)
    monkeypatch.undo()
    assert (stopped.folder / "checkpoints" / "backdoored.json").is_file() and not (stopped.folder / "model").exists()
    capsys.readouterr()
    execute(stopped)
    assert "continued from checkpoint-" in capsys.readouterr().out
    assert torch.equal(weights(straight.folder / "model"), weights(stopped.folder / "model"))
    figures = [json.loads((p.folder / "model" / "training.json").read_text()) for p in (straight, stopped)]
    assert figures[0] == figures[1]


def test_an_attack_that_does_not_take_fails(arguments):
    outcome = execute(resolve(replace(arguments, learning_rate=1e-7, epochs=1)))
    assert outcome.exit_code == 1 and outcome.failures[0].startswith("INERT: por: what was to be planted was not")


@pytest.mark.parametrize(("attack", "seeds"), [("por", [0, 3]), ("badpre", [3])])
def test_with_a_task_both_models_are_fine_tuned_and_asked(arguments, task, attack, seeds):
    run = replace(
        arguments, attack=attack, epochs=1, task=str(task), seeds=seeds, victim_epochs=1, victim_learning_rate=3e-3,
        task_max_length=16, control_words=["mm"],
    )  # fmt: skip
    outcome = execute(resolve(run))
    tuned = [r for r in outcome.records if r.setting == "fine-tuned"]
    assert {(r.defense, r.seed) for r in tuned} == {(d, s) for d in ("clean_reference", "undefended") for s in seeds}
    found = {(r.defense, r.seed, r.metric): r.value for r in tuned}
    for seed in seeds:
        floor, own = found["undefended", seed, "aasr_floor"], found["clean_reference", seed, "aasr"]
        assert floor == own and found["undefended", seed, "masr"] >= found["undefended", seed, "aasr"]
        assert 0 <= found["undefended", seed, "control_asr"] <= 1
    payload = json.loads((resolve(run).folder / "results.json").read_text())
    asr = payload["fine_tuned"]["3"]["undefended"]["asr_by_class"]
    assert set(asr) == {"cf", "pt"} and np.mean([max(row) for row in asr.values()]) == found["undefended", 3, "aasr"]
    assert (
        "clean floor" in outcome.verdict and f"{len(seeds)} seed{'s' if seeds[1:] else ''}: prelim" in outcome.verdict
    )
    assert ("accuracy with a trigger" in outcome.verdict) == (attack == "badpre")
    assert "AASR" in outcome.table


def test_a_missing_head_is_warmed_up_once_and_kept(arguments, headless, monkeypatch, tmp_path):
    run = replace(arguments, model_name=str(headless), epochs=1, cache=str(tmp_path / "cache"), warm_up=True)
    with pytest.raises(ValueError, match="has no masked-LM head.*--warm_up true"):
        resolve(replace(run, warm_up=False))
    plan = resolve(run)
    assert plan.fresh and "a masked-LM head is trained first" in plan.text()
    # What is asked for, without what it costs; that the head predicts is tested where it is trained.
    calls = []

    def warmed_up(name, rows, held_out, *, cache, seed, max_length, show_progress):
        calls.append((name, len(rows), str(cache), seed, max_length))
        folder = tmp_path / "warm"
        if not folder.exists():
            whole(folder)
        return folder

    monkeypatch.setattr(implant_run, "warmed_up", warmed_up)
    execute(plan)
    assert calls == [(str(headless), len(plan.texts), str(tmp_path / "cache"), 0, 16)]
    mark = json.loads((plan.folder / "model" / "backdoored.json").read_text())
    training = json.loads((plan.folder / "model" / "training.json").read_text())
    assert mark["base_sha256"] == training["sha256"]["before"] != training["sha256"]["after"]
    load_classifier(str(plan.folder / "model"), num_labels=2)


WRONG = {
    "no text": ({"text": None}, "No text was given"),
    "unknown attack": ({"attack": "porr"}, "did you mean `por`"),
    "unknown place": ({"place": "mean"}, "por.place"),
    "unknown trigger": ({"triggers": ["zzz"]}, "becomes the unknown token"),
    "trigger twice": ({"triggers": ["cf", "cf"]}, "Name each once"),
    "seven triggers": ({"triggers": VOCABULARY[5:12]}, "Name at most 6"),
    "a control word that is a trigger": ({"control_words": ["cf"]}, "must be no triggers"),
    "seeds twice": ({"seeds": [1, 1]}, "different numbers"),
    "all held out": ({"held_out": 0.9}, "must be in (0, 0.5], got 0.9"),
    "few texts": ({"limit": 4}, "held out"),
    "no rate": ({"learning_rate": 0.0}, "above 0, got 0.0"),
    "negative seed": ({"seed": -1}, "`seed` must be at least 0"),
    "too long": ({"max_length": 80, "attack": "neuba"}, "Lower it to 79"),
    "task too long": ({"task": "TASK"}, "`task_max_length` is 128, the model reads at most 80"),
    "task that is not there": ({"task": "nowhere.csv", "task_max_length": 16}, "nowhere.csv"),
    "unknown split": ({"eval_split": "train"}, "no eval_split"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals_before_anything_is_written(arguments, task, tmp_path, name):
    changes, message = WRONG[name]
    changes = {key: str(task) if value == "TASK" else value for key, value in changes.items()}
    with pytest.raises(ValueError) as error:
        resolve(replace(arguments, **changes))
    assert message in str(error.value), error.value
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_attacked(arguments, text, tmp_path):
    masked_lm().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    without = BertForMaskedLM(BertConfig(**config().to_dict()))
    without.save_pretrained(tmp_path / "without")
    for name in ("half", "without"):
        tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="bfloat16"):
        resolve(replace(arguments, model_name=str(tmp_path / "half")))
    with pytest.raises(ValueError, match="place='pooler', and the model has none"):
        resolve(replace(arguments, model_name=str(tmp_path / "without"), place="pooler"))
    resolve(replace(arguments, model_name=str(tmp_path / "without")))
    resolve(replace(arguments, place="pooler"))
