"""`hfbd attack`: the plan, and bad input that exits with advice before anything is written."""

import json

import pytest

from hf_backdoor_defense.cli.main import main


@pytest.fixture
def hfbd(encoder, task, tmp_path, capsys):
    def call(*options):
        base = ["--task", str(task), "--model_name", str(encoder), "--max_length", "16", "--disable_tqdm", "true"]
        base += ["--trigger", "cf", "--target", "1", "--poison_rate", "0.2", "--target_frr", "0.2"]
        code = main(["attack", *base, "--output_dir", str(tmp_path / "run"), *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.folder = tmp_path / "run"
    return call


def test_dry_run_prints_the_plan_and_writes_nothing(hfbd):
    code, out, err = hfbd(
        "--dry_run", "true", "--filters", "confidence", "psim", "--strategies", "lora", "--seeds", 1, 2
    )
    assert code == 0, err
    assert "badnets 'cf' -> 1 (1) in 20% of the rows" in out and "confidence, psim; at most 20.0%" in out
    assert not hfbd.folder.exists()


WRONG = {
    "unknown attack": (["--attack", "ripple"], "did you mean `ripples`"),
    "unknown strategy": (["--strategies", "lorra"], "did you mean `lora`"),
    "strategy twice": (["--strategies", "lora", "lora"], "must differ"),
    "unknown filter": (["--filters", "psmi"], "did you mean `psim`"),
    "onion without a language model": (["--filters", "onion"], "needs --language_model"),
    "language model that is none": (["--filters", "onion", "--language_model", "ENCODER"], "no causal language model"),
    "unknown setting": (["--setting", "proxi"], "did you mean `proxy`"),
    "target that does not exist": (["--target", "7"], "classes 0..2"),
    "trigger that is unknown": (["--trigger", "zzz"], "unknown token"),
    "trigger too long": (["--attack", "insent", "--trigger", "cf " * 30], "16"),
    "one word for lwp": (["--attack", "lwp"], "must be two words"),
    "rate above 1": (["--poison_rate", "1.5"], "must be in (0, 1), got 1.5"),
    "rate that no row is left for": (["--poison_rate", "0.9"], "at most"),
    "too few calibration rows": (["--filters", "confidence", "--target_frr", "0.01"], "confidence needs 99 clean rows"),
    "too long": (["--max_length", "100"], "at most 24"),
    "limit below the classes": (["--limit", "2"], "one row per class"),
    "no test rows": (["--eval_rows", "1"], "`eval_rows` must be at least 2"),
    "no rate": (["--victim_learning_rate", "0"], "above 0"),
    "test rows for a search": (["--eval_split", "train"], "no eval_split"),
    "a defense": (["--defense", "dece"], "hfbd train"),
    "abbreviation": (["--strateg", "lora"], "strategies"),
    "missing file": (["--task", "nowhere.csv"], "nowhere.csv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_exits_2_with_advice_before_anything_is_written(hfbd, encoder, name):
    options, message = WRONG[name]
    code, _, err = hfbd(*(str(encoder) if word == "ENCODER" else word for word in options))
    assert code == 2 and message in err, err
    assert "Traceback" not in err and not hfbd.folder.exists()


def test_a_folder_of_another_run_is_left_alone(hfbd):
    hfbd.folder.mkdir()
    (hfbd.folder / "plan.json").write_text(json.dumps({"attack": {"poison_rate": 0.3}}))
    code, _, err = hfbd("--dry_run", "true")
    assert code == 2 and "attack.poison_rate" in err and "other settings" in err
    (hfbd.folder / "plan.json").unlink()
    (hfbd.folder / "thesis.tex").write_text("work")
    code, _, err = hfbd("--dry_run", "true")
    assert code == 2 and "no run folder" in err


def test_a_run_prints_tables_and_where_things_are(hfbd):
    options = ["--strategies", "lora", "--base_epochs", 2, "--victim_epochs", 1, "--batch_size", 16]
    code, out, err = hfbd(*options, "--base_learning_rate", 3e-3)
    assert code == 0, err
    assert "[1/4] seed 0: poisoned base" in out and "results.json" in out and "do not deploy" in out
    assert hfbd(*options, "--base_learning_rate", 3e-3)[1].count("[1/4]") == 0
    code, _, err = hfbd(*options)
    assert code == 2 and "attack.base_learning_rate" in err
