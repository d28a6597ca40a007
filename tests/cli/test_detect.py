"""`hfbd detect` on tiny models: one answer per text in order, the same after a stop, and an error before anything is fitted."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.experiment import detect_run
from hf_backdoor_defense.input_filters import psim
from hf_backdoor_defense.reporting.results import read_records
from tests.experiment.named import named
from tests.experiment.tiny import WORDS

EVERY = [word for words in WORDS.values() for word in words]


def texts(n, seed, low=1, high=9):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(EVERY, rng.integers(low, high))) for _ in range(n)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    clean = jsonl(tmp_path / "clean.jsonl", [{"text": text} for text in texts(700, 1)])
    odd = ["", "a1", "  ", "unknown words only", "cf " * 40]
    rows = [{"id": 100 - i, "text": text, "label": None} for i, text in enumerate([*odd, *texts(145, 2)])]
    return clean, jsonl(tmp_path / "in.jsonl", rows), rows


@pytest.fixture
def detect(classifier, files, tmp_path, capsys):
    def call(*options, model=classifier, folder="run", clean=files[0], source=files[1]):
        words = ["--input", source, "--max_length", 16, "--disable_tqdm", "true", "--output_dir", tmp_path / folder]
        words += ["--model", model] if model else []
        words += ["--clean", clean] if clean else []
        code = main(["detect", *map(str, [*words, *options])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.folder = tmp_path / "run"
    return call


def answers(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_one_answer_per_text_in_order_with_the_rows_own_columns(detect, files, classifier):
    code, out, err = detect("--filter", "confidence", "--target_frr", 0.05)
    assert code == 0, err
    found = answers(detect.folder)
    assert [{key: row[key] for key in ("id", "text", "label")} for row in found] == files[2]
    assert [row["index"] for row in found] == list(range(150))
    # Oracle: the classifier itself, row by row, softmax in double precision.
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for row in found[:12]:
        with torch.no_grad():
            logits = model(**tokenizer([row["text"]], truncation=True, max_length=16, return_tensors="pt")).logits
        confidence = float(logits.double().softmax(-1).max())
        assert row["confidence"] == pytest.approx(confidence, abs=1e-5)
        assert math.exp(row["score"]) == pytest.approx(row["confidence"])
    upper = json.loads((detect.folder / "filter" / "filter.json").read_text())["calibration"]["upper"]
    assert all(row["flagged"] == (row["score"] > upper) for row in found)


def test_the_run_folder_has_what_the_other_verbs_have(detect, files):
    code, out, _ = detect("--filter", "confidence", "--target_frr", 0.05, "--max_flagged", 1)
    assert code == 0
    names = {path.name for path in detect.folder.iterdir()}
    assert names == {
        "plan.json",
        "fitted.json",
        "filter",
        "scores.jsonl",
        "results.json",
        "checksums.json",
        "table.txt",
        "report.html",
    }
    records = {record.metric: record for record in read_records(detect.folder / "results.json")}
    flagged = sum(row["flagged"] for row in answers(detect.folder))
    assert set(records) == {"coverage", "frr", "passes", "seconds"} and records["coverage"].value == 1 - flagged / 150
    assert (records["coverage"].dataset, records["frr"].dataset) == (str(files[1]), str(files[0]))
    assert records["frr"].low <= records["frr"].value <= records["frr"].high and records["passes"].value == 1
    results = json.loads((detect.folder / "results.json").read_text())
    assert results["schema"] == 1 and results["filter"]["flagged"] == flagged and results["verdict"] in out
    assert f"{flagged} of 150" in (detect.folder / "table.txt").read_text()
    calibration, check = results["filter"]["calibration"]["n"], records["frr"].n
    assert calibration + check == 700 and 0.5 < calibration / 700 < 0.7


def test_a_stopped_run_goes_on_after_the_last_whole_line(detect, monkeypatch):
    options = ["--filter", "confidence", "--target_frr", 0.05, "--batch_size", 1]  # blocks of 16 rows
    assert detect(*options, folder="whole")[0] == 0
    calls = []
    original = detect_run.append_lines

    def stop(path, rows):
        calls.append(len(rows))
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(path, rows)

    monkeypatch.setattr(detect_run, "append_lines", stop)
    code, _, err = detect(*options)
    assert code == 2 and "continues the run" in err and calls == [16] * 4 and len(answers(detect.folder)) == 48
    with (detect.folder / "scores.jsonl").open("a") as file:
        file.write('{"index": 48, "id"')  # as if killed while writing
    monkeypatch.setattr(detect_run, "append_lines", original)
    monkeypatch.setattr(detect_run, "build_filter", None)  # what was fitted is not fitted again
    assert detect(*options)[0] == 0
    whole, again = answers(detect.folder.parent / "whole"), answers(detect.folder)
    assert [row["index"] for row in again] == list(range(150))
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in whole], abs=1e-6)
    assert [row["flagged"] for row in again] == [row["flagged"] for row in whole]
    # Only a part was timed, so no time is claimed.
    assert "seconds" not in {record.metric for record in read_records(detect.folder / "results.json")}
    scored = (detect.folder / "scores.jsonl").read_bytes()
    assert detect(*options)[0] == 0 and (detect.folder / "scores.jsonl").read_bytes() == scored


def test_another_run_keeps_its_folder(detect, files, tmp_path):
    assert detect("--filter", "confidence", "--target_frr", 0.05)[0] == 0
    code, _, err = detect("--filter", "confidence", "--target_frr", 0.1)
    assert code == 2 and "detect.target_frr differ" in err
    other = jsonl(tmp_path / "other.jsonl", files[2][:3])
    code, _, err = detect("--filter", "confidence", "--target_frr", 0.05, source=other)
    assert code == 2 and "sha256.input differ" in err
    # The same content under another name is the same run; a gate changes no number.
    same = jsonl(tmp_path / "same.jsonl", files[2])
    assert detect("--filter", "confidence", "--target_frr", 0.05, "--max_flagged", 1, source=same)[0] == 0


def test_csv_in_gives_the_same_answers(detect, files, tmp_path):
    path = tmp_path / "in.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["review", "id"])
        writer.writeheader()
        writer.writerows({"review": row["text"], "id": row["id"]} for row in files[2])
    clean = jsonl(tmp_path / "reviews.jsonl", [{"review": json.loads(line)["text"]} for line in open(files[0])])
    options = ["--filter", "confidence", "--target_frr", 0.05]
    assert detect(*options)[0] == 0
    code, _, err = detect(*options, "--text_column", "review", source=path, clean=clean, folder="csv")
    assert code == 0, err
    first, second = answers(detect.folder), answers(detect.folder.parent / "csv")
    assert [row["score"] for row in first] == [row["score"] for row in second]
    assert [row["review"] for row in second] == [row["text"] for row in files[2]]


def test_the_gate_exits_1_and_says_why(detect):
    # Calibrated on 10 % and more, some of 150 texts are flagged.
    code, out, _ = detect("--filter", "confidence", "--target_frr", 0.3, "--max_flagged", 0)
    assert code == 1 and "GATE: " in out and "allowed is 0" in out
    assert json.loads((detect.folder / "results.json").read_text())["failures"]
    assert len(answers(detect.folder)) == 150


def test_a_saved_filter_needs_no_clean_texts_and_answers_alike(detect, tmp_path):
    assert detect("--filter", "confidence", "--target_frr", 0.05)[0] == 0
    saved = detect.folder / "filter"
    code, out, err = detect("--filter_dir", saved, clean=None, folder="again")
    assert code == 0 and "not measured" in out, err
    keys = ("index", "score", "flagged")
    first, second = ([{k: row[k] for k in keys} for row in answers(detect.folder.parent / n)] for n in ("run", "again"))
    assert first == second
    records = read_records(detect.folder.parent / "again" / "results.json")
    assert (
        "frr" not in {record.metric for record in records} and not (detect.folder.parent / "again" / "filter").exists()
    )
    # With further clean texts beside it, its rate is measured on all of them; those it knows measure nothing.
    further = jsonl(tmp_path / "further.jsonl", [{"text": text} for text in texts(300, 5, low=6)])
    code, _, err = detect("--filter_dir", saved, folder="third", clean=further)
    assert code == 0, err
    (frr,) = [r for r in read_records(detect.folder.parent / "third" / "results.json") if r.metric == "frr"]
    assert frr.n == 300
    code, _, err = detect("--filter_dir", saved, folder="fourth")
    assert code == 2 and "was calibrated on" in err


def test_psim_is_fitted_calibrated_kept_and_loaded(detect, monkeypatch):
    # So small a model needs a higher rate and more epochs than PSIM's own until the stop rule is met.
    usual = psim.training_arguments
    monkeypatch.setattr(
        psim,
        "training_arguments",
        lambda folder, **options: usual(folder, **{**options, "learning_rate": 0.005, "num_train_epochs": 30}),
    )
    code, out, err = detect("--filter", "psim", "--target_frr", 0.1)
    assert code == 0 and "fitting psim on" in out, out + err
    assert (detect.folder / "filter" / "adapter_model.safetensors").is_file()
    first = answers(detect.folder)
    assert all(0 < row["confidence"] <= 1 for row in first) and len(first) == 150
    (detect.folder / "scores.jsonl").unlink()
    code, out, _ = detect("--filter", "psim", "--target_frr", 0.1)
    assert code == 0 and "fitting" not in out
    assert [row["score"] for row in answers(detect.folder)] == [row["score"] for row in first]
    evidence = named(detect.folder, "detect")["filter"]
    about = json.loads((detect.folder / "filter" / "filter.json").read_text())
    assert evidence.entry.weights_sha256 == about["base_sha256"] and evidence.entry.library == "peft"
    assert (
        evidence.entry.activity["conf_p95_after"] < evidence.entry.activity["conf_p95_before"]
    )  # kept, not measured anew
    assert evidence.entry.data["measured on"].startswith(f"{evidence.figures['frr'].n} clean texts")
    assert evidence.entry.labels == ["class 0", "class 1", "class 2"]


def test_a_psim_that_cannot_be_used_exits_1_with_the_reason(detect, tmp_path, classifier):
    # A base that knows nothing has no confidence to lose.
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(classifier, num_labels=2)
    blank = tmp_path / "blank"
    BertForSequenceClassification(config).save_pretrained(blank)
    tokenizer.save_pretrained(blank)
    code, out, err = detect("--filter", "psim", "--target_frr", 0.1, model=blank)
    assert code == 1 and "psim cannot be used here" in out, err
    results = json.loads((detect.folder / "results.json").read_text())
    assert results["failures"] and results["records"] == [] and not (detect.folder / "scores.jsonl").exists()


@pytest.mark.parametrize("name", ["strip", "rap"])
def test_filters_that_ask_the_classifier(detect, tmp_path, name):
    clean = jsonl(tmp_path / "labeled.jsonl", [{"text": t, "label": i % 3} for i, t in enumerate(texts(300, 3))])
    few = jsonl(tmp_path / "few.jsonl", [{"text": text} for text in ["", "a1", *texts(5, 4)]])
    code, out, err = detect("--filter", name, "--target_frr", 0.1, clean=clean, source=few)
    assert code == 0, err
    found = answers(detect.folder)
    assert len(found) == 7 and all(math.isfinite(row["score"]) and "confidence" not in row for row in found)
    (detect.folder / "scores.jsonl").unlink()
    assert detect("--filter", name, "--target_frr", 0.1, clean=clean, source=few)[0] == 0
    assert [row["score"] for row in answers(detect.folder)] == pytest.approx([row["score"] for row in found], abs=1e-6)


def test_onion_reads_a_language_model(detect, tmp_path, classifier):
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    torch.manual_seed(0)
    folder = tmp_path / "lm"
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64, bos_token_id=2, eos_token_id=3
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    few = jsonl(tmp_path / "few.jsonl", [{"text": text} for text in ["", "a1", *texts(5, 4)]])
    options = ["--filter", "onion", "--target_frr", 0.1]
    code, _, err = detect(*options, "--language_model", folder, model=None, source=few)
    assert code == 0, err
    found = answers(detect.folder)
    assert len(found) == 7 and found[1]["score"] == 0  # one word: nothing to compare it with
    assert detect(*options, "--language_model", folder, model=None, source=few)[0] == 0  # finished before
    assert answers(detect.folder) == found
    code, _, err = detect(*options, source=few, folder="b")
    assert code == 2 and "--language_model" in err
    code, _, err = detect(*options, "--language_model", classifier, source=few, folder="b")
    assert code == 2 and "no causal language model (BertForSequenceClassification)" in err


def test_a_dry_run_writes_nothing(detect):
    code, out, _ = detect("--filter", "confidence", "--target_frr", 0.05, "--dry_run", "true")
    assert code == 0 and "150 texts" in out and not detect.folder.exists()


BAD = {
    "an unknown filter": (["--filter", "psmi"], {}, "did you mean `psim`"),
    "no filter": ([], {}, "No filter was given"),
    "too few clean texts": (["--filter", "confidence", "--target_frr", 0.001], {}, "needs 999 clean texts, got"),
    "no clean texts": (["--filter", "confidence"], {"clean": None}, "needs clean texts"),
    "no model": (["--filter", "psim"], {"model": None}, "Set --model"),
    "a missing model": (["--filter", "confidence"], {"model": "gone"}, "neither a folder"),
    "a missing file": (["--filter", "confidence"], {"source": "gone.jsonl"}, "no file `gone.jsonl`"),
    "another column": (["--filter", "confidence", "--text_column", "txt"], {}, "perhaps --text_column text"),
    "a rate of one": (["--filter", "confidence", "--target_frr", 1], {}, "`target_frr` must be in (0, 1)"),
    "a gate in percent": (["--filter", "confidence", "--max_flagged", 5], {}, "For 5 % set 0.05"),
    "a short limit": (["--filter", "confidence", "--max_length", 2], {}, "`max_length` must be at least 4"),
    "rap without labels": (["--filter", "rap", "--target_frr", 0.1], {}, "`rap` needs a class 0..2"),
    "no saved filter": (["--filter_dir", "gone"], {}, "no filter was saved there"),
    "too few to learn from": (["--filter", "psim", "--target_frr", 0.3], {"clean": 300}, "learns from at least 128"),
    "a defense": (["--filter", "confidence", "--defense", "dece"], {}, "takes no --defense"),
    "another base for nothing": (["--filter", "psim", "--allow_other_base", "true"], {}, "give it as --filter_dir"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_before_anything_is_written(detect, tmp_path, name):
    options, given, says = BAD[name]
    if given.get("clean") == 300:
        given = {"clean": jsonl(tmp_path / "few.jsonl", [{"text": text} for text in texts(300, 1)])}
    code, _, err = detect(*options, **given)
    assert code == 2 and says in err, err
    assert not detect.folder.exists()


def test_a_row_without_text_is_named_before_anything_is_fitted(detect, tmp_path):
    bad = jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": "b"}, {"text": None}])
    code, _, err = detect("--filter", "confidence", "--target_frr", 0.05, source=bad)
    assert code == 2 and "bad.jsonl`, line 3 must have a string" in err and not detect.folder.exists()


@pytest.mark.parametrize(
    "kind", ["regression", "multi-label", "token classification", "generation", "encoder", "adapter"]
)
def test_checkpoints_without_one_class_per_text_are_refused_by_name(detect, tmp_path, classifier, encoder, kind):
    folder = tmp_path / "model"
    config = BertConfig.from_pretrained(classifier, num_labels=1 if kind == "regression" else 3)
    says = {"regression": "regression", "multi-label": "multi_label_classification", "adapter": "holds an adapter"}
    if kind == "encoder":
        folder = encoder
    elif kind == "adapter":
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "generation":
        GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    elif kind == "token classification":
        BertForTokenClassification(config).save_pretrained(folder)
    else:
        config.problem_type = "multi_label_classification" if kind == "multi-label" else "regression"
        BertForSequenceClassification(config).save_pretrained(folder)
    code, _, err = detect("--filter", "confidence", "--target_frr", 0.05, model=folder)
    assert code == 2 and says.get(kind, "no classification head") in err, err
    assert not detect.folder.exists()
