"""Filters before the undefended model: whose rows they see, what is counted, and what a run says when one cannot be used."""

import json

import numpy as np
import pytest

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.attacks.triggers import BadNets
from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.experiment import behind as behind_module
from hf_backdoor_defense.experiment.arguments import RunArguments
from hf_backdoor_defense.experiment.behind import filter_histograms, filter_table, filter_verdict
from hf_backdoor_defense.experiment.clean_rows import check_enough, own_rows, split
from hf_backdoor_defense.input_filters import psim
from hf_backdoor_defense.models import load_finished_classifier
from hf_backdoor_defense.reporting.results import read_records
from tests.experiment.tiny import WORDS

ATTACK = ["--simulate", "badnets", "--poison_rate", "0.2", "--target", "1", "--target_frr", "0.1"]


@pytest.fixture(scope="module")
def large_task(tmp_path_factory):
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("large") / "task.jsonl"
    lines = []
    for i in range(900):
        words = [*rng.choice(WORDS[i % 3], rng.integers(3, 8)), "the"]
        lines.append(json.dumps({"text": " ".join(words), "label": i % 3}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def hfbd(encoder, large_task, tmp_path, capsys):
    def call(*options, folder="run"):
        base = [
            "train",
            "--task",
            str(large_task),
            "--model_name",
            str(encoder),
            "--max_length",
            "16",
            "--limit",
            "240",
        ]
        base += ["--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--num_train_epochs", "6"]
        base += [
            "--disable_tqdm",
            "true",
            "--use_cpu",
            "true",
            "--baselines",
            "false",
            "--output_dir",
            str(tmp_path / folder),
        ]
        code = main([*base, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.folder = tmp_path / "run"
    return call


@pytest.fixture
def quick(monkeypatch):
    # So small a model needs a higher rate and more epochs than PSIM's own until the stop rule is met.
    usual = psim.training_arguments
    monkeypatch.setattr(
        psim,
        "training_arguments",
        lambda folder, **options: usual(folder, **{**options, "learning_rate": 0.02, "num_train_epochs": 30}),
    )


def test_the_defenders_rows_are_nobodys(large_task):
    run = RunArguments(task=str(large_task), limit=240)
    data = load(str(large_task), limit=240)
    own = own_rows(run, data)
    whole = load(str(large_task))
    seen = {text for split in ("train", "test") for text in data[split]["text"]} | set(whole["test"]["text"])
    assert not set(own["text"]) & seen
    expected = [t for split in ("train", "validation") for t in whole[split]["text"] if t not in seen]
    assert list(own["text"]) == expected and len(own) > 500
    judged = RunArguments(task=str(large_task), limit=240, eval_split="validation")
    assert not set(own_rows(judged, data)["text"]) & set(whole["validation"]["text"])


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_the_split_parts_the_rows_and_do_not_depend_on_their_order(large_task, n):
    rows = load(str(large_task))["train"].select(range(n))
    fit, calibrate = split(rows, seed=0)
    assert sorted([*fit["row_id"], *calibrate["row_id"]]) == list(rows["row_id"])
    assert len(fit) == n // 3
    turned, _ = split(rows.select(range(n - 1, -1, -1)), seed=0)
    assert set(turned["row_id"]) == set(fit["row_id"])


def test_equal_texts_lie_on_one_side(large_task):
    rows = load(str(large_task))["train"].select([0, 0, 0, 0, 1])
    fit, calibrate = split(rows, seed=0)
    assert not set(fit["text"]) & set(calibrate["text"]) and len(fit) + len(calibrate) == 5


def test_too_few_rows_are_said_with_what_is_needed(large_task):
    rows = load(str(large_task))["train"]
    check_enough(RunArguments(filters=["confidence"], target_frr=0.01), rows.select(range(149)))
    with pytest.raises(ValueError, match="`confidence` needs 149 clean rows.*got 148"):
        check_enough(RunArguments(filters=["confidence"], target_frr=0.01), rows.select(range(148)))
    with pytest.raises(ValueError, match="`psim` needs 384"):  # to learn from, whatever the rate
        check_enough(RunArguments(filters=["psim"], target_frr=0.5), rows.select(range(383)))
    with pytest.raises(ValueError, match="`psim` needs 599"):
        check_enough(RunArguments(filters=["psim"], target_frr=0.005), rows.select(range(500)))


def test_a_run_with_filters_measures_and_shows_them(hfbd, quick, large_task):
    code, out, err = hfbd(*ATTACK, "--filters", "confidence", "psim", "--save_models", "true")
    assert code == 0, out + err
    folder, arm = hfbd.folder, hfbd.folder / "arms" / "seed-0" / "undefended"
    results = json.loads((folder / "results.json").read_text())
    records = {(r.defense, r.metric): r for r in read_records(folder / "results.json")}
    for name in ("confidence", "psim"):
        assert {"ca", "asr", "frr", "far", "coverage", "auroc", "passes", "seconds"} <= {
            metric for defense, metric in records if defense == name
        }
    # Oracle: the saved model, asked one text at a time, and the thresholds that were written down.
    model, tokenizer = load_finished_classifier(str(folder / "models" / "seed-0" / "undefended"), num_labels=3)
    test = load(str(large_task), limit=240)["test"]
    triggered = trigger_dataset(test, BadNets(), target=1, seed=0)

    def asked(text):
        logits = model(**tokenizer([text], truncation=True, max_length=16, return_tensors="pt")).logits[0].detach()
        return int(logits.argmax()), float(logits.double().log_softmax(-1).max())

    upper = results["filters"]["0"]["confidence"]["calibration"]["upper"]
    clean, attacked = [asked(text) for text in test["text"]], [asked(text) for text in triggered["text"]]
    right = sum(p == y and s <= upper for (p, s), y in zip(clean, test["label"], strict=True))
    assert records["confidence", "ca"].value == pytest.approx(right / len(test))
    assert records["confidence", "frr"].value == pytest.approx(sum(s > upper for _, s in clean) / len(test))
    assert records["confidence", "asr"].value == pytest.approx(
        sum(p == 1 and s <= upper for p, s in attacked) / len(attacked)
    )
    assert records["confidence", "far"].value == pytest.approx(sum(s <= upper for _, s in attacked) / len(attacked))
    # What is shown: a table of its own, a sentence about another threat, a section; nothing per row in the results.
    head, _, below = out.partition("Filters before the undefended model")
    assert "\npsim " not in head and "psim" in below and "FRR" in below and "Another threat" in results["verdict"]
    assert "clean" not in results["filters"]["0"]["psim"] and results["filters"]["0"]["psim"]["rows"]["fit"] > 128
    page = (folder / "report.html").read_text()
    assert "the weights are untrusted, the data clean" in page and "psim: score of each reported row" in page
    histogram = next(h for h in results["histograms"] if h["arm"] == "psim")
    entry = histogram["seeds"]["0"]
    assert histogram["name"] == "filter_scores"
    assert sum(entry["other"]) == len(test) and sum(entry["planted"]) == len(triggered)
    assert entry["other_dropped"] == round(records["psim", "frr"].value * len(test))
    # The same command again asks no filter twice.
    assert json.loads((arm / "psim" / "result.json").read_text())["usable"]
    code, out, _ = hfbd(*ATTACK, "--filters", "confidence", "psim", "--save_models", "true")
    assert code == 0 and "[4/4] psim before undefended, seed 0: finished before, kept" in out


def test_without_save_models_no_model_stays_and_a_stopped_run_goes_on(hfbd, monkeypatch):
    original = behind_module.build_filter

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_backdoor_defense.experiment.behind.build_filter", stop)
    code, _, err = hfbd(*ATTACK, "--filters", "confidence")
    assert code == 2 and "continues the run" in err
    model = hfbd.folder / "arms" / "seed-0" / "undefended" / "model"
    assert json.loads((model / "backdoored.json").read_text())["backdoored"]
    monkeypatch.setattr("hf_backdoor_defense.experiment.behind.build_filter", original)
    code, out, _ = hfbd(*ATTACK, "--filters", "confidence")
    assert code == 0 and "undefended, seed 0: finished before, kept" in out
    assert not model.exists() and not (hfbd.folder / "models").exists()


def test_a_filter_that_cannot_be_used_is_said_and_the_run_is_not_passed(hfbd, monkeypatch):
    def unusable(*args, **kwargs):
        raise psim.PsimNotUsable("clean confidence did not fall")

    monkeypatch.setattr("hf_backdoor_defense.experiment.behind.build_filter", unusable)
    code, out, _ = hfbd(*ATTACK, "--filters", "psim")
    assert code == 1 and "INERT: psim, seed 0: clean confidence did not fall" in out
    assert "Filters before" not in out and "Another threat" not in out
    assert not any(r.defense == "psim" for r in read_records(hfbd.folder / "results.json"))
    page = (hfbd.folder / "report.html").read_text()
    assert "psim, seed 0: not used. clean confidence did not fall" in page


BAD = {
    "an unknown filter": ([*ATTACK, "--filters", "psmi"], "did you mean `psim`"),
    "onion": ([*ATTACK, "--filters", "onion"], "hfbd attack --filters onion"),
    "twice": ([*ATTACK, "--filters", "psim", "psim"], "given twice"),
    "no attack": (["--filters", "psim"], "Add --simulate badnets"),
    "too few rows": ([*ATTACK, "--filters", "psim", "--target_frr", 0.001], "`psim` needs 2999 clean rows"),
    "a rate of 0": ([*ATTACK, "--filters", "psim", "--target_frr", 0], "`target_frr` must be in (0, 1)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_before_anything_is_trained(hfbd, name):
    options, says = BAD[name]
    code, _, err = hfbd(*options)
    assert code == 2 and says in err, err
    assert not hfbd.folder.exists()


def test_a_run_without_filters_belongs_to_a_folder_from_before_there_were_any(hfbd):
    assert hfbd(*ATTACK, "--max_steps", 2)[0] == 0
    plan = json.loads((hfbd.folder / "plan.json").read_text())
    assert not {"filters", "target_frr"} & set(plan["run"]) and "own" not in plan["data"]


def test_the_sentence_means_over_seeds_and_over_what_could_be_used():
    def result(far, frr, asr):
        values = {"far": far, "frr": frr, "asr": asr}
        return {"usable": True, "estimates": {metric: {"value": value} for metric, value in values.items()}}

    unusable = {"usable": False, "reason": "no"}
    said = filter_verdict({0: {"psim": result(0.0, 0.02, 0.0)}, 1: {"psim": result(0.2, 0.0, 0.1)}})
    assert "psim rejects 90% of triggered and 1.0% of clean texts (ASR 0.05)" in said
    assert filter_verdict({0: {"psim": unusable}}) == "" and filter_verdict({}) == ""
    assert filter_histograms({0: {"psim": unusable}}) == [] and filter_table([], ["psim"]) == ""
