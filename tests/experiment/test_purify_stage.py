"""The undefended model, purified: whose rows, what is counted, what stands beside it, and what a run says of a failure."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.attacks.triggers import BadNets
from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.experiment.purified import purify_failures, purify_verdict
from hf_backdoor_defense.experiment.purify_stage import Purification
from hf_backdoor_defense.experiment.purify_training import purify_settings
from hf_backdoor_defense.models import load_finished_classifier
from hf_backdoor_defense.reporting.results import read_records
from tests.experiment.tiny import WORDS

ATTACK = ["--simulate", "badnets", "--poison_rate", "0.2", "--target", "1"]
RUN_TRAINING = "hf_backdoor_defense.experiment.purified.run_training"


@pytest.fixture(scope="module")
def large_task(tmp_path_factory):
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("large") / "task.jsonl"
    lines = []
    for i in range(600):
        words = [*rng.choice(WORDS[i % 3], rng.integers(3, 8)), "the"]
        lines.append(json.dumps({"text": " ".join(words), "label": i % 3}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def hfbd(encoder, large_task, tmp_path, capsys):
    def call(*options):
        base = ["train", "--task", large_task, "--model_name", encoder, "--max_length", 16, "--limit", 240]
        base += [
            "--per_device_train_batch_size",
            16,
            "--learning_rate",
            "3e-3",
            "--num_train_epochs",
            5,
            "--baselines",
            "false",
        ]
        base += ["--disable_tqdm", "true", "--use_cpu", "true", "--output_dir", tmp_path / "run", "--purify_rows", 90]
        code = main([*map(str, base), "--purify_epochs", "2", "--purify_learning_rate", "0.05", *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.folder = tmp_path / "run"
    return call


def test_a_run_purifies_beside_the_control_and_shows_it(hfbd, large_task):
    options = [*ATTACK, "--purify", "d3", "--save_models", "true"]
    code, out, err = hfbd(*options)
    assert code == 0, out + err
    results = json.loads((hfbd.folder / "results.json").read_text())
    records = {(r.defense, r.metric): r.value for r in read_records(hfbd.folder / "results.json")}
    # Oracle: the saved models, asked one text at a time.
    test = load(str(large_task), limit=240)["test"]
    triggered = trigger_dataset(test, BadNets(), target=1, seed=0)
    for name in ("fine_tuning", "d3"):
        place = hfbd.folder / "models" / "seed-0" / name
        mark = json.loads((place / "backdoored.json").read_text())
        assert mark["backdoored"] and mark["cleaned"] == {"method": name}
        model, tokenizer = load_finished_classifier(str(place), num_labels=3)

        def asked(text, model=model, tokenizer=tokenizer):
            return (
                model(**tokenizer([text], truncation=True, max_length=16, return_tensors="pt")).logits.argmax().item()
            )

        said = np.array([asked(text) for text in triggered["text"]])
        ca = np.mean([asked(text) == label for text, label in zip(test["text"], test["label"], strict=True)])
        assert records[name, "ca"] == pytest.approx(ca) and records[name, "asr"] == pytest.approx(np.mean(said == 1))
        assert records[name, "r_acc"] == pytest.approx(np.mean(said == np.array(triggered["label"])))
        fell = [max(0.0, records["undefended", m] - records[name, m]) for m in ("asr", "ca")]
        assert records[name, "der"] == pytest.approx((fell[0] - fell[1] + 1) / 2)
        assert records[name, "seconds"] > 0 and (name, "time_ratio") not in records
    # What is shown: rows of the same table, a sentence, a section.
    table = out.partition("preliminary")[0]
    assert "\nfine_tuning " in table and "\nd3 " in table
    assert (
        "purified with 90 clean rows of one's own" in results["verdict"]
        and "no defense was trained" in results["verdict"]
    )
    assert results["purified"]["0"]["d3"]["evidence"]["layers"][0]["ratio"] > 0
    page = (hfbd.folder / "report.html").read_text()
    assert "the weights are untrusted, the rows clean" in page and "d3: Distance of each weight" in page
    # The same command again trains nothing.
    code, out, _ = hfbd(*options)
    assert code == 0 and "[4/4] d3 on undefended, seed 0: finished before, kept" in out


def test_a_stopped_run_goes_on_from_the_kept_model_which_is_gone_at_the_end(hfbd, monkeypatch):
    from hf_backdoor_defense.experiment import purified

    original = purified.run_training

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(RUN_TRAINING, stop)
    code, _, err = hfbd(*ATTACK, "--purify", "ulrl")
    assert code == 2 and "continues the run" in err
    base = hfbd.folder / "arms" / "seed-0" / "undefended" / "model"
    assert json.loads((base / "backdoored.json").read_text())["backdoored"]

    def trained(trainer, folder):  # the method itself has tests of its own
        return {**original(trainer, folder), "inert": None}

    monkeypatch.setattr(RUN_TRAINING, trained)
    code, out, err = hfbd(*ATTACK, "--purify", "ulrl")
    assert code == 0, out + err
    assert "undefended, seed 0: finished before, kept" in out and not base.exists()
    assert {"fine_tuning", "ulrl"} <= {r.defense for r in read_records(hfbd.folder / "results.json")}


def test_a_method_that_diverges_is_said_and_the_run_is_not_passed(hfbd, monkeypatch):
    from hf_backdoor_defense.experiment import purified

    original = purified.run_training

    def diverges(trainer, folder):
        if trainer.objectives:
            raise FloatingPointError("the loss is nan")
        return original(trainer, folder)

    monkeypatch.setattr(RUN_TRAINING, diverges)
    code, out, _ = hfbd(*ATTACK, "--purify", "d3")
    assert code == 1 and "FAILED: d3, seed 0: the loss is nan" in out
    assert not any(r.defense == "d3" for r in read_records(hfbd.folder / "results.json"))
    assert "d3, seed 0: INERT. the loss is nan" in (hfbd.folder / "report.html").read_text()


BAD = {
    "an unknown purifier": ([*ATTACK, "--purify", "url"], "did you mean `ulrl`"),
    "twice": ([*ATTACK, "--purify", "d3", "d3"], "given twice"),
    "no attack": (["--purify", "d3"], "hfbd clean --method"),
    "as a defense": ([*ATTACK, "--defense", "d3"], "--purify d3"),
    "too few rows": ([*ATTACK, "--purify", "d3", "--purify_rows", 9], "at least 10"),
    "no rows": ([*ATTACK, "--purify", "d3", "--purify_rows", 0], "`purify_rows` must be at least 1, got 0"),
    "no epochs": ([*ATTACK, "--purify", "d3", "--purify_epochs", 0], "`epochs` must be finite and above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_before_anything_is_trained(hfbd, name):
    options, says = BAD[name]
    code, _, err = hfbd(*options)
    assert code == 2 and says in err, err
    assert not hfbd.folder.exists()


def test_a_folder_from_before_there_were_purifiers_stays_valid(encoder, task, tmp_path, capsys):
    base = ["train", "--task", str(task), "--model_name", str(encoder), "--max_length", "16", "--max_steps", "1"]
    base += [
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
        "--output_dir",
        str(tmp_path / "run"),
        "--baselines",
        "false",
    ]
    assert main(base) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert set(plan) == {"run", "training", "defenses", "data"}
    assert set(plan["run"]) == {
        "task", "model_name", "text_column", "label_column", "limit", "max_length", "num_layers", "frozen_layers", "simulate",
        "trigger", "poison_rate", "target", "clean_label", "seeds", "eval_split", "save_models",
    }  # fmt: skip
    capsys.readouterr()


@pytest.mark.parametrize(("n", "count"), [(1, 1), (7, 3), (50, 50)])
def test_the_clean_rows_depend_on_the_seed_and_not_on_their_order(n, count):
    features = Features(text=Value("string"), label=ClassLabel(names=["a", "b"]), row_id=Value("int64"))
    own = Dataset.from_dict(
        {"text": [f"t{i}" for i in range(n)], "label": [i % 2 for i in range(n)], "row_id": list(range(n))}, features
    )

    def ids(rows, seed):
        stage = Purification(methods=["d3"], settings=purify_settings("text"), count=count, own=rows, notes=[])
        return list(stage.rows(seed)["row_id"])

    found = ids(own, 0)
    assert len(set(found)) == count and set(ids(own.select(range(n - 1, -1, -1)), 0)) == set(found)
    assert count in (1, n) or any(ids(own, seed) != found for seed in range(1, 5))


def result(asr, ca=0.9, r_acc=0.8, **more):
    return {
        "usable": True,
        "rows": 200,
        "inert": None,
        **{m: {"value": v} for m, v in [("asr", asr), ("ca", ca), ("r_acc", r_acc)]},
        **more,
    }


def test_the_sentence_gives_no_method_what_plain_fine_tuning_does():
    failed = {"usable": False, "reason": "no"}

    def said(methods, *, attacked=1.0, floor=0.02):
        return purify_verdict(methods, attacked=attacked, floor=floor)

    helped = said(
        {0: {"fine_tuning": result(0.9), "d3": result(0.1)}, 1: {"fine_tuning": result(1.0), "d3": result(0.3)}}
    )
    assert (
        "fine_tuning ASR 0.95, CA 0.90" in helped
        and "d3 ASR 0.20" in helped
        and "Plain" not in helped
        and "no more" not in helped
    )
    assert "Plain fine-tuning removed the backdoor as well" in said(
        {0: {"fine_tuning": result(0.04), "d3": result(0.0)}}
    )
    assert "ulrl did no more than plain fine-tuning" in said(
        {0: {"fine_tuning": result(0.5), "ulrl": result(0.49), "d3": result(0.1)}}
    )
    assert said({0: {"fine_tuning": failed}}) == "" and said({}) == ""
    assert purify_failures(
        {0: {"ulrl": result(0.5, inert="nothing was flagged"), "d3": failed, "fine_tuning": result(1.0)}}
    ) == [
        "INERT: ulrl, seed 0: nothing was flagged",
        "FAILED: d3, seed 0: no",
    ]
