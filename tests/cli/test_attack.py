"""`hfbd attack`: the plan, and bad input that exits with advice before anything is written."""

import json

import pytest

from hf_backdoor_defense.cli.main import main
from tests.attacks.masked_toys import texts, whole


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


@pytest.fixture
def implanted(tmp_path, capsys):
    whole(tmp_path / "base")
    (tmp_path / "plain.txt").write_text("\n".join(texts(60)))

    def call(*options, attack="por"):
        base = ["--model_name", str(tmp_path / "base"), "--text", str(tmp_path / "plain.txt"), "--max_length", "16"]
        base += ["--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true", "--triggers", "cf", "pt"]
        name = [] if attack is None else ["--attack", attack]
        code = main(["attack", *base, *name, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_an_attack_on_a_pretrained_model_from_flags_or_a_file(implanted, tmp_path):
    code, out, err = implanted("--dry_run", "true", "--place", "pooler")
    assert code == 0 and "por: cf pt at pooler" in out and not (tmp_path / "run").exists(), err
    (tmp_path / "run.yaml").write_text("attack: badpre\nepochs: 1\n")
    code, out, err = implanted("--config", tmp_path / "run.yaml", attack=None)
    assert code == 0, err
    assert "badpre: cf pt at cls" in out and "badpre after" in out and "do not deploy" in out
    code, out, _ = implanted("--config", tmp_path / "run.yaml", attack=None)
    assert code == 0 and "finished before" in out
    code, _, err = implanted("--config", tmp_path / "run.yaml", "--seed", 1, attack=None)
    assert code == 2 and "implant.seed" in err and "other settings" in err


def test_an_attack_that_did_not_take_exits_1(implanted):
    code, out, _ = implanted("--epochs", 1, "--learning_rate", 1e-7)
    assert code == 1 and "INERT: por" in out


PRETRAINED_WRONG = {
    "unknown attack": (["--attack", "porr"], "did you mean `por`"),
    "a flag of the other attacks": (["--attack", "por", "--poison_rate", "0.1"], "unknown key `poison_rate`"),
    "a defense": (["--attack", "por", "--defense", "dece"], "hfbd clean"),
    "no text": (["--attack", "neuba", "--text", "nowhere.txt"], "nowhere.txt"),
}


@pytest.mark.parametrize("name", PRETRAINED_WRONG)
def test_bad_input_for_an_attack_on_a_pretrained_model(implanted, tmp_path, name):
    options, message = PRETRAINED_WRONG[name]
    code, _, err = implanted(*options, attack=None)
    assert code == 2 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()
