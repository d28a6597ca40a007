"""`hfbd clean`: the plan, bad input that exits with advice before anything is written, a run and its repetition."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from tests.experiment import tiny_mlm


@pytest.fixture
def hfbd(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    tiny_mlm.save(tmp_path / "model")
    tiny_mlm.write_text(tmp_path / "text.txt")

    def call(*options, fill=True):
        base = ["--model_name", tmp_path / "model", "--text", tmp_path / "text.txt", "--output_dir", tmp_path / "run"]
        base += ["--max_length", 16, "--batch_size", 16, "--epochs", 1, "--disable_tqdm", "true"]
        given = [str(option).replace("TMP", str(tmp_path)) for option in options]
        code = main(["clean", *(map(str, base) if fill else ()), *given])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.home = tmp_path
    return call


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_dry_run_prints_the_plan_and_writes_nothing(hfbd):
    code, out, err = hfbd("--dry_run", "true")
    assert code == 0, err
    assert "2: 2 x bert.encoder.layer.*.intermediate.dense.weight" in out
    assert "first      bert.encoder.layer.0.intermediate.dense.weight" in out
    assert "1,024 of 6,207 parameters" in out  # 2 x 32 x 16
    assert "6 updates of 16 texts" in out and "for a dose of 1.25" in out and "dose 1.46" in out  # 1.25 · 7/6
    assert not (hfbd.home / "run").exists()


def test_the_paper_preset_and_what_overrides_it(hfbd):
    code, out, err = hfbd("--preset", "paper", "--dry_run", "true")
    assert code == 0, err
    assert (
        "rate 2e-05, linear" in out and "masks drawn once, padded" in out and "targets=bert, trainable=targets" in out
    )
    config = hfbd.home / "run.yaml"
    config.write_text("method: pretraining\nlearning_rate: 0.001\ndefense: {dose: 0.5}\n")
    code, out, err = hfbd("--config", config, "--defense.trainable", "all", "--dry_run", "true")
    assert code == 0, err
    assert "pretraining (coef=0.0, targets=auto, trainable=all, dose=0.5" in out and "rate 0.001, linear" in out
    assert "the control" in out


def no_head(folder: Path) -> None:
    BertModel(tiny_mlm.config()).save_pretrained(folder)


def classifier(folder: Path) -> None:
    BertForSequenceClassification(tiny_mlm.config()).save_pretrained(folder)


def bf16(folder: Path) -> None:
    save_pretrained_whole(tiny_mlm.model().to(torch.bfloat16), tiny_mlm.tokenizer(), folder)


def fp16(folder: Path) -> None:
    save_pretrained_whole(tiny_mlm.model().to(torch.float16), tiny_mlm.tokenizer(), folder)


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def maskless(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tiny_mlm.tokenizer(mask=False).save_pretrained(folder)


def text(content: bytes):
    return lambda folder: (folder.parent / "text.txt").write_bytes(content)


def nothing(folder: Path) -> None: ...


WRONG = {
    "no masked-LM head": (no_head, [], "has no pre-training head"),
    "and its way out": (no_head, [], "--warm_up true"),
    "a classifier": (classifier, [], "has no pre-training head"),
    "zero matrices": (nothing, ["--defense.targets", "[nothing]"], "no parameter matches"),
    "a pattern that is none": (nothing, ["--defense.targets", "['(']"], "no regular expression"),
    "another architecture's matrices": (nothing, ["--defense.targets", "gpt2"], "no parameter matches"),
    "bf16": (bf16, [], "the weights are bfloat16"),
    "fp16": (fp16, [], "save_pretrained_whole(model.float()"),
    "quantized": (quantized, [], "quantized weights"),
    "adapter": (adapter, [], "Merge it first"),
    "pickle": (pickled, [], "no safetensors"),
    "no mask token": (maskless, [], "no mask token"),
    "empty text": (text(b""), [], "empty file"),
    "blank text": (text(b"\n \n\n"), [], "at least 2 texts"),
    "binary text": (text(b"\x89PNG\x00\xff\n\xfe"), [], "plain text in UTF-8"),
    "one-word texts": (text(b"".join(b"w%d\n" % i for i in range(40)) * 5), [], "2 ordinary tokens"),
    "too little text": (nothing, ["--limit", "20"], "at least 32 texts"),
    "no such text": (nothing, ["--text", "nowhere.csv"], "nowhere.csv"),
    "no text": (nothing, ["--text", ""], "Set --text"),
    "no model": (nothing, ["--model_name", ""], "Set --model_name"),
    "no such model": (nothing, ["--model_name", "TMP/nowhere"], "nowhere"),
    "output is input": (nothing, ["--output_dir", "TMP/model"], "is the folder of the model"),
    "output inside input": (nothing, ["--output_dir", "TMP/model/clean"], "lies in the folder of the model"),
    "output around input": (nothing, ["--output_dir", "TMP"], "holds the folder of the model"),
    "output around input, written otherwise": (
        nothing,
        ["--output_dir", "TMP/run/.."],
        "holds the folder of the model",
    ),
    "unknown method": (nothing, ["--method", "recip"], "did you mean `recipe`"),
    "a defense": (nothing, ["--defense", "dece"], "--method"),
    "unknown field": (nothing, ["--defense.coeff", "1"], "did you mean `coef`"),
    "a control with a penalty": (nothing, ["--method", "pretraining", "--defense.coef", "1"], "Use --method recipe"),
    "a method without one": (nothing, ["--defense.coef", "0"], "Use --method pretraining"),
    "unknown key": (nothing, ["--epoch", "2"], "Did you mean `epochs`"),
    "unknown preset": (nothing, ["--preset", "papr"], "Presets: paper"),
    "too long": (nothing, ["--max_length", "64"], "at most 20 tokens"),
    "no rate": (nothing, ["--learning_rate", "0"], "above 0"),
    "no epochs": (nothing, ["--epochs", "0"], "above 0"),
    "all held out": (nothing, ["--held_out", "1"], "(0, 0.5]"),
    "no seed": (nothing, ["--seed", "-1"], "`seed` must be at least 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_exits_2_with_advice_before_anything_is_written(hfbd, name):
    spoil, options, message = WRONG[name]
    spoil(hfbd.home / "model")
    before = contents(hfbd.home)
    code, _, err = hfbd(*options)
    assert code == 2 and message in err, err
    assert "Traceback" not in err and contents(hfbd.home) == before


def test_all_reasons_come_together(hfbd):
    bf16(hfbd.home / "model")
    maskless(hfbd.home / "model")
    code, _, err = hfbd("--max_length", "30", "--defense.targets", "[nothing]")
    assert code == 2
    for message in ("bfloat16", "no mask token", "at most 20 tokens", "no parameter matches"):
        assert message in err, err


def test_the_advice_for_coarse_weights_works(hfbd):
    bf16(hfbd.home / "model")
    model, tokenizer = load_pretrained_whole(str(hfbd.home / "model"))
    save_pretrained_whole(model.float(), tokenizer, hfbd.home / "copy")
    code, _, err = hfbd("--model_name", "TMP/copy", "--dry_run", "true")
    assert code == 0, err


def test_a_run_says_what_it_did_and_no_more_and_its_repetition_changes_nothing(hfbd):
    given = contents(hfbd.home / "model")
    code, out, err = hfbd()
    assert code == 0, err
    assert "recipe (before)" in out and "recipe (after)" in out
    assert "After a dose of 1.46" in out and "says nothing about triggers" in out
    assert contents(hfbd.home / "model") == given
    left = contents(hfbd.home / "run")
    again, out_again, _ = hfbd("--text", hfbd.home / "text.txt")
    assert again == 0 and "finished before: nothing was changed" in out_again and contents(hfbd.home / "run") == left
    assert (
        out_again.partition("\n\n")[2].split("changed\n")[1] == out.partition("nats\n")[2]
    )  # table, verdict and places
    code, _, err = hfbd("--epochs", 2)
    assert code == 2 and "clean.epochs" in err and "other settings" in err and contents(hfbd.home / "run") == left


def test_too_small_a_dose_exits_1_and_names_the_rate(hfbd):
    code, out, err = hfbd("--learning_rate", "1e-6")
    assert code == 1, err
    assert "INERT: recipe: the norms are 100.0% of what they were" in out and "--learning_rate 0.00" in out
    assert hfbd("--learning_rate", "1e-6")[0] == 1  # read again
    assert hfbd("--learning_rate", "1e-6", "--method", "pretraining", "--output_dir", "TMP/control")[0] == 0
