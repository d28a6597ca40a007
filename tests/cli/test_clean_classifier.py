"""`hfbd clean --method d3|ulrl|…`: the plan, bad input that exits with advice before anything is written, which help is whose."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.vision import new_digits_vit
from tests.experiment.test_purify import contents, write_texts


@pytest.fixture
def hfbd(classifier, tmp_path, capsys):
    shutil.copytree(classifier, tmp_path / "model")
    write_texts(tmp_path / "clean.jsonl", 40)
    write_texts(tmp_path / "test.jsonl", 12, start=60)
    model, processor = new_digits_vit()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vit")

    def call(*options, method="d3"):
        words = [
            "clean",
            "--method",
            method,
            "--model_name",
            "TMP/model",
            "--clean",
            "TMP/clean.jsonl",
            "--max_length",
            "8",
        ]
        words += ["--output_dir", "TMP/run", "--disable_tqdm", "true", *map(str, options)]
        code = main([word.replace("TMP", str(tmp_path)) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.home = tmp_path
    return call


def test_dry_run_prints_the_plan_and_writes_nothing(hfbd):
    before = contents(hfbd.home)
    code, out, err = hfbd("--dry_run", "true", "--epochs", 3, "--batch_size", 8)
    assert code == 0, err
    for words in (
        "BertForSequenceClassification", "3 classes", "14 weights driven away: bert.encoder.layer.0", "30 texts, cut at 8 tokens",
        "10 rows that are never trained on, held out", "none simulated: whether a backdoor is gone will not be measured",
        "3 epochs, 12 updates of 8 rows; SGD, momentum 0.9, rate 0.005, cosine to 0", "plain fine-tuning, same settings",
        "fewer than 20 clean rows of",
    ):  # fmt: skip
        assert words in out, out
    assert contents(hfbd.home) == before
    code, out, _ = hfbd(
        "--dry_run", "true", "--test", "TMP/test.jsonl", "--simulate", "badnets", "--target", 1, method="ulrl"
    )
    assert code == 0 and "badnets (words=['cf'], count=1) -> class 1 (1), on 8 rows of other classes" in out
    assert "hidden units of bert.pooler.dense" in out and "40 texts" in out


def test_each_help_names_the_other(capsys):
    assert main(["clean", "--help"]) == 0
    out = capsys.readouterr().out
    assert "hfbd clean --method d3 --help" in out and "--static_masks" in out and "--simulate" not in out
    assert main(["clean", "--method", "ulrl", "--help"]) == 0
    out = capsys.readouterr().out
    assert "hfbd clean --method recipe --help" in out and "--simulate" in out and "--static_masks" not in out


def spoil_config(**changes):
    def spoil(home):
        path = home / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def encoder(home):
    BertModel.from_pretrained(home / "model").save_pretrained(home / "model")


def rows(*lines):
    return lambda home: (home / "clean.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def colored(home):
    np.savez(
        home / "a.npz",
        image=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8),
        label=np.arange(40) % 10,
    )


def large(home):
    np.savez(
        home / "a.npz",
        image=np.arange(30 * 144, dtype=np.uint32).astype(np.uint8).reshape(30, 12, 12),
        label=np.arange(30) % 10,
    )


def occupied(home):
    (home / "run").mkdir()
    (home / "run" / "mine.txt").write_text("keep")


def nothing(home): ...


VIT = ["--model_name", "TMP/vit", "--clean", "TMP/a.npz"]
SIMULATED = ["--test", "TMP/test.jsonl", "--simulate", "badnets", "--target", "1"]
WRONG = {
    "no head": (encoder, [], "no classification head"),
    "regression": (spoil_config(problem_type="regression"), [], "one class per row"),
    "quantized": (spoil_config(quantization_config={"quant_method": "gptq"}), [], "quantized weights"),
    "too few rows": (rows(*[{"text": f"a{i}", "label": 0} for i in range(15)]), [], "at least 10"),
    "fewer than are held out": (rows(*[{"text": f"a{i}", "label": 0} for i in range(8)]), [], "none would be left"),
    "an unknown label": (rows(*[{"text": f"a{i}", "label": i} for i in range(5)]), [], "got 2 rows with 3, 4"),
    "an empty text": (rows({"text": "", "label": 0}), [], "not be empty"),
    "a column that is not there": (nothing, ["--text_column", "body"], "`text_column` must be a column"),
    "no rows": (rows(), [], "at least one row"),
    "no clean rows": (nothing, ["--clean", ""], "Set --clean"),
    "no such clean rows": (nothing, ["--clean", "TMP/nowhere.jsonl"], "no such path"),
    "no model": (nothing, ["--model_name", ""], "Set --model_name"),
    "no such model": (nothing, ["--model_name", "TMP/nowhere"], "nowhere"),
    "an empty selection": (nothing, ["--defense.targets", "[nothing]"], "nothing"),
    "two head rows too few": (nothing, ["--method", "ulrl", "--defense.units", "rows"], "units='hidden'"),
    "too long": (nothing, ["--max_length", "64"], "at most 24 tokens"),
    "images of another size": (large, VIT, "images must be 8 x 8 pixels, got 12 x 12"),
    "images in color": (colored, VIT, "takes gray images, got RGB"),
    "texts for a model of images": (nothing, ["--model_name", "TMP/vit"], ".npz file or a folder"),
    "an image trigger for texts": (nothing, [*SIMULATED, "--simulate", "patch"], "trigger of texts"),
    "no target": (nothing, ["--test", "TMP/test.jsonl", "--simulate", "badnets"], "needs --target"),
    "an unknown target": (nothing, [*SIMULATED, "--target", "9"], "`target` must be a class of the model"),
    "a trigger without test": (nothing, ["--simulate", "badnets", "--target", "1"], "needs --test"),
    "a target without a trigger": (nothing, ["--target", "1"], "belongs to a simulated trigger"),
    "test is clean": (nothing, ["--test", "TMP/clean.jsonl"], "same source"),
    "a reference of another task": (nothing, [*SIMULATED, "--clean_reference", "TMP/vit"], "one of images with 10"),
    "output is input": (nothing, ["--output_dir", "TMP/model"], "is the folder of the model"),
    "output inside input": (nothing, ["--output_dir", "TMP/model/clean"], "lies in the folder of the model"),
    "a folder that is in use": (occupied, [], "is not empty and no run folder"),
    "unknown method": (nothing, ["--method", "ulr"], "did you mean `ulrl`"),
    "unknown field": (nothing, ["--defense.epss", "1"], "did you mean `eps`"),
    "unknown preset": (nothing, ["--preset", "papr"], "Presets: "),
    "a preset that needs more": (nothing, ["--preset", "paper"], "warm_up"),
    "a defense": (nothing, ["--defense", "d3"], "--method"),
    "plain text": (nothing, ["--text", "TMP/clean.jsonl"], "labeled rows, --clean"),
    "fields of the control": (nothing, ["--method", "fine_tuning", "--defense.eps", "1"], "has no fields"),
    "unknown key": (nothing, ["--epoch", "2"], "Did you mean `epochs`"),
    "no epochs": (nothing, ["--epochs", "0"], "above 0"),
    "all held out": (nothing, ["--held_out", "1"], "(0, 0.5]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_exits_2_with_advice_before_anything_is_written(hfbd, name):
    spoil, options, message = WRONG[name]
    spoil(hfbd.home)
    before = contents(hfbd.home)
    options = list(options)
    method = options.pop(options.index("--method") + 1) if "--method" in options else "d3"
    options = [word for word in options if word != "--method"]
    while options.count("--simulate") > 1 or options.count("--target") > 1:  # the last one counts
        key = "--simulate" if options.count("--simulate") > 1 else "--target"
        del options[options.index(key) : options.index(key) + 2]
    code, _, err = hfbd(*options, method=method)
    assert code == 2 and message in err, err
    assert "Traceback" not in err and contents(hfbd.home) == before


def test_half_precision_is_loaded_as_float32_and_that_is_said(hfbd):
    model = BertForSequenceClassification.from_pretrained(hfbd.home / "model").to(torch.bfloat16)
    model.save_pretrained(hfbd.home / "model")
    code, out, err = hfbd("--dry_run", "true")
    assert code == 0 and "the weights were bfloat16 and are float32 now" in out, err


def test_a_method_that_did_nothing_exits_1(hfbd):
    code, out, err = hfbd(
        "--epochs", 1, "--learning_rate", "1e-12", "--control", "false", "--preset", "", "--defense.warm_up", "near"
    )
    assert code == 1, err
    assert "INERT: d3: " in out and "INERT: d3: " in (hfbd.home / "run" / "report.html").read_text()
