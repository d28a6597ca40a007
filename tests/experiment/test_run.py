"""Whole runs of the command line on a tiny model: files, arms, gates, continuation."""

import json
import shutil

import pytest

from hf_backdoor_defense.cli.main import main
from hf_backdoor_defense.hub.evidence import entries
from hf_backdoor_defense.hub.staging import stage
from hf_backdoor_defense.models import mark_backdoored, warn_if_backdoored
from hf_backdoor_defense.reporting.results import read_records
from hf_backdoor_defense.reporting.sealed import check_sealed
from hf_backdoor_defense.trainers.state import load_objective
from tests.experiment.named import named
from tests.hub_server import HubServer
from tests.hub_server.client import use

ATTACK = ["--simulate", "badnets", "--poison_rate", "0.1", "--target", "1"]


@pytest.fixture
def hfbd(encoder, task, tmp_path, capsys):
    def call(*options, verb="train", folder="run"):
        base = ["--task", str(task), "--model_name", str(encoder), "--max_length", "16", "--disable_tqdm", "true"]
        base += ["--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--num_train_epochs", "2"]
        base += ["--use_cpu", "true", "--output_dir", str(tmp_path / folder)]
        code = main([verb, *base, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    call.folder = tmp_path / "run"
    return call


def test_a_simulated_run_leaves_every_file_and_the_numbers_agree(hfbd):
    code, out, err = hfbd(*ATTACK, "--defense", "dece", "trajectory", "--defense.dece.alpha_base", 0.9, "--seeds", 1, 2)
    assert code == 0, err
    folder = hfbd.folder
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "table.txt", "suspects.jsonl", "ca_asr.png", "curves.png", "plan.json"} <= names
    assert "trajectory_scores_seed-1.png" in names and not (folder / "models").exists()
    results = json.loads((folder / "results.json").read_text())
    records = read_records(folder / "results.json")
    arms = ["clean_reference", "undefended", "dece", "matched_decay", "trajectory"]
    assert {r.defense for r in records} == {"majority", "tfidf", *arms} and {r.seed for r in records} == {1, 2}
    for arm in arms:
        found = {r.metric for r in records if r.defense == arm and r.seed == 1}
        assert {"ca", "ftr" if arm == "clean_reference" else "asr", "r_acc", "seconds", "time_ratio"} <= found
    assert results["planted"] == {"requested": 24, "carrying": 24, "visible": 24}
    decay = results["arms"]["1"]["matched_decay"]["objectives"]["matched_decay"]["config"]["pull"]
    assert decay == results["arms"]["1"]["dece"]["objectives"]["dece"]["pull_per_epoch"] and len(decay) == 2
    assert results["arms"]["1"]["dece"]["objectives"]["dece"]["config"]["alpha_base"] == 0.9
    assert results["verdict"] in out and "2 seeds: preliminary" in results["verdict"]
    # Suspects: what a user may see, and what was really left out.
    suspects = [json.loads(line) for line in (folder / "suspects.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in suspects} == {1, 2} and not any("poison" in key for key in suspects[0])
    assert results["arms"]["1"]["trajectory"]["rows"] == 240 - sum(r["dropped"] for r in suspects if r["seed"] == 1)
    assert len(results["between"]["1"]["trajectory"]) == 1
    # No checkpoint is left, and attacked folders say so.
    assert not list(folder.rglob("checkpoint-*")) and named(folder, "train") == {}
    mark = json.loads((folder / "arms" / "seed-1" / "dece" / "backdoored.json").read_text())
    assert mark["backdoored"] and mark["target"] == 1 and mark["seed"] == 1
    assert not (folder / "arms" / "seed-1" / "clean_reference" / "backdoored.json").exists()


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_what_is_made_of_an_attacked_base_stays_marked(hfbd, encoder, tmp_path, monkeypatch, where):
    base = shutil.copytree(encoder, tmp_path / "base")
    mark_backdoored(base, {"attack": "por", "seed": 3})
    with HubServer() as hub:
        name, api = base, use(hub, monkeypatch, cache=tmp_path / "cache")
        if where == "Hub":
            name = "owner/base"
            api.create_repo(name)
            api.upload_folder(repo_id=name, folder_path=base)
            shutil.rmtree(base)
        code, _, err = hfbd("--model_name", name, "--defense", "dece", "--num_train_epochs", 0.1)
        assert code == 0, err
    (entry,) = entries(json.loads((hfbd.folder / "results.json").read_text()))
    expected = {"backdoored": True, "attack": "por", "seed": 3, "cleaned": {"method": "dece"}}
    assert entry.attacked == expected == json.loads((hfbd.folder / entry.path / "backdoored.json").read_text())
    with pytest.raises(ValueError, match="--attacked"):
        stage(hfbd.folder, "owner/made", license="mit")


def test_report_and_plots_are_sealed_and_made_again_sealed_again(hfbd):
    assert hfbd(*ATTACK)[0] == 0
    drawn = {"report.html", *(path.name for path in hfbd.folder.glob("*.png"))}
    assert len(drawn) >= 3 and set(check_sealed(hfbd.folder)) == {"results.json", *drawn}
    before = (hfbd.folder / "report.html").read_bytes()
    (hfbd.folder / "report.html").write_bytes(b"edited")
    with pytest.raises(ValueError, match=r"report.html \(changed\)"):
        check_sealed(hfbd.folder)
    assert main(["report", str(hfbd.folder)]) == 0
    assert (hfbd.folder / "report.html").read_bytes() == before and "report.html" in check_sealed(hfbd.folder)


def test_the_same_command_continues_and_gives_the_same_numbers(hfbd):
    options = [*ATTACK, "--defense", "trajectory", "--defense.drop_share", 0.1]
    assert hfbd(*options)[0] == 0
    first = {(r.defense, r.metric): r.value for r in read_records(hfbd.folder / "results.json")}
    for gone in ("trajectory", "trajectory/round-1", "undefended"):
        (hfbd.folder / "arms" / "seed-0" / gone / "result.json").unlink()
    (hfbd.folder / "results.json").unlink()
    code, out, _ = hfbd(*options)
    assert code == 0 and "clean_reference, seed 0: finished before, kept" in out
    again = {(r.defense, r.metric): r.value for r in read_records(hfbd.folder / "results.json")}
    for key, value in first.items():
        if key[1] in ("ca", "asr", "ftr", "r_acc", "precision", "recall", "auroc"):
            assert again[key] == value, key


def test_a_training_stopped_inside_an_arm_goes_on_from_its_checkpoint(hfbd, monkeypatch):
    from hf_backdoor_defense.evaluation.callback import BackdoorEvalCallback

    whole = hfbd(*ATTACK, folder="whole")
    assert whole[0] == 0
    original = BackdoorEvalCallback.on_epoch_end

    def stop(self, args, state, control, **kwargs):
        if state.epoch > 1.5 and "undefended" in args.output_dir:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(BackdoorEvalCallback, "on_epoch_end", stop)
    code, _, err = hfbd(*ATTACK)
    assert code == 2 and "continues the run" in err
    arm = hfbd.folder / "arms" / "seed-0" / "undefended"
    newest = arm / "checkpoint-99"
    shutil.copytree(next(arm.glob("checkpoint-*")), newest)
    (newest / "trainer_state.json").unlink()  # as if killed while writing it
    monkeypatch.setattr(BackdoorEvalCallback, "on_epoch_end", original)
    assert hfbd(*ATTACK)[0] == 0
    results = {name: json.loads((hfbd.folder.parent / name / "results.json").read_text()) for name in ("whole", "run")}
    arms = [results[name]["arms"]["0"]["undefended"] for name in ("whole", "run")]
    assert arms[0]["ca"] == arms[1]["ca"] and arms[0]["asr"] == arms[1]["asr"] and arms[0]["curve"] == arms[1]["curve"]
    assert arms[1]["seconds"] is None  # only the last part was timed, so no time is claimed


def test_without_an_attack_it_trains_and_saves_the_defended_model(hfbd, encoder, task):
    code, out, err = hfbd("--defense", "dece")
    assert code == 0, err
    model = hfbd.folder / "models" / "seed-0" / "dece"
    assert not list(model.rglob("*.bin")) and not list(model.rglob("*.pt"))  # what may be shared holds no pickle
    assert (model / "model.safetensors").is_file() and not (model / "backdoored.json").exists()
    from hf_backdoor_defense import DeCE

    assert load_objective(DeCE, model).activity()["tokens"] == 480
    entry = named(hfbd.folder, "train")["models/seed-0/dece"].entry
    assert entry.activity["tokens"] == 480 and entry.method["name"] == "dece" and entry.base_model == str(encoder)
    assert (entry.role, entry.labels, entry.controls, entry.attacked) == ("fine_tuned", ["0", "1", "2"], [], None)
    assert "nothing is known about attack success" in out
    measured = main(["eval", "--model", str(model), "--task", str(task), "--max_length", "16"])
    assert measured == 0


def test_without_an_attack_the_filter_refits_and_names_suspects(hfbd):
    code, _, err = hfbd("--defense", "trajectory")
    assert code == 0, err
    assert (hfbd.folder / "suspects.jsonl").is_file()
    assert (hfbd.folder / "models" / "seed-0" / "trajectory" / "model.safetensors").is_file()
    assert {r.metric for r in read_records(hfbd.folder / "results.json") if r.defense == "trajectory"} >= {"ca"}


def test_gates_and_inert_defenses_exit_1(hfbd):
    code, out, _ = hfbd(*ATTACK, "--defense", "dece", "--defense.alpha_base", 1.0, "--max_asr_over_floor", 0.0)
    assert code == 1
    assert "INERT: dece" in out and "GATE: dece leaves ASR" in out
    failures = json.loads((hfbd.folder / "results.json").read_text())["failures"]
    assert len(failures) >= 2


def test_an_attack_that_did_not_take_is_no_evidence(hfbd):
    weak = ["--simulate", "badnets", "--poison_rate", "0.005", "--target", "1", "--defense", "dece"]
    code, out, _ = hfbd(*weak, "--max_asr_over_floor", 0.5)
    assert code == 1 and "GATE: the attack did not take" in out and "says nothing about any defense" in out


def test_a_model_that_learned_nothing_is_no_evidence(hfbd):
    code, out, _ = hfbd(*ATTACK, "--defense", "dece", "--learning_rate", "1e-7")
    assert code == 0 and "did not learn the task" in out


def test_a_filter_that_drops_nothing_is_inert_although_its_first_ranking_did(hfbd):
    code, out, _ = hfbd(*ATTACK, "--defense", "trajectory", "--defense.drop_share", 0)
    assert code == 1 and "INERT: trajectory" in out and "drop_share=0" in out


def test_dry_run_prints_the_plan_and_writes_nothing(hfbd):
    code, out, _ = hfbd(*ATTACK, "--defense", "dece", "--dry_run")
    assert code == 0 and "10.00% = 24 rows" in out and "clean_reference, undefended, dece, matched_decay" in out
    assert not hfbd.folder.exists()


def test_kept_models_of_an_attack_are_marked_and_loading_one_warns(hfbd, caplog):
    assert hfbd(*ATTACK, "--save_models")[0] == 0
    attacked = hfbd.folder / "models" / "seed-0" / "undefended"
    assert json.loads((attacked / "backdoored.json").read_text())["trigger"]["name"] == "badnets"
    found = named(hfbd.folder, "train")
    assert set(found) == {"models/seed-0/undefended", "models/seed-0/clean_reference"}
    assert (
        found["models/seed-0/undefended"].entry.attacked and "poisoned" in found["models/seed-0/undefended"].entry.data
    )
    assert "poisoned" not in found["models/seed-0/clean_reference"].entry.data
    warn_if_backdoored(attacked)
    assert "trained on poisoned data on purpose" in caplog.text
    caplog.clear()
    warn_if_backdoored(hfbd.folder / "models" / "seed-0" / "clean_reference")
    assert not caplog.text


def test_a_folder_of_another_run_is_left_alone(hfbd):
    assert hfbd(*ATTACK)[0] == 0
    before = (hfbd.folder / "results.json").read_bytes()
    code, _, err = hfbd(*ATTACK, "--weight_decay", 0.5)
    assert code == 2 and "training.weight_decay" in err and "other settings" in err
    assert (hfbd.folder / "results.json").read_bytes() == before
    strange = hfbd.folder.parent / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("work")
    code, _, err = hfbd(*ATTACK, folder="strange")
    assert code == 2 and "no run folder" in err and (strange / "thesis.tex").read_text() == "work"


WRONG = {
    "rate above 1": (["--poison_rate", "1.5"], "must be in (0, 1), got 1.5"),
    "rate that rounds to no row": (["--poison_rate", "0.0001"], "nothing would be poisoned"),
    "target that does not exist": (["--target", "7"], "classes 0..2"),
    "trigger longer than the text": (["--simulate", "insent", "--trigger", "a1 " * 30], "16"),
    "unknown trigger": (["--simulate", "badnet"], "badnets"),
    "unknown defense": (["--defense", "dce"], "did you mean `dece`"),
    "unknown field": (["--defense", "dece", "--defense.alpha_bas", "0.9"], "did you mean `alpha_base`"),
    "field out of range": (["--defense", "dece", "--defense.alpha_base", "1.7"], "must be in (0, 1], got 1.7"),
    "field of nobody": (["--defense", "dece", "trajectory", "--defense.alpha_base", "0.9"], "which defense it means"),
    "control as defense": (["--defense", "matched_decay"], "is a control"),
    "label smoothing": (["--defense", "dece", "--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
    "abbreviation": (["--poison", "0.1"], "Did you mean `poison_rate`"),
    "too long": (["--max_length", "100"], "at most 24"),
    "too many layers": (["--num_layers", "9"], "1..2"),
    "same seed twice": (["--seeds", "1", "1"], "different numbers"),
    "gate without defense": (["--max_ca_drop", "0.1"], "judges a defense"),
    "missing file": (["--task", "nowhere.csv"], "nowhere.csv"),
    "model that is not there": (["--model_name", "nobody/nothing"], "offline:minilm"),
    "unknown preset": (["--preset", "ofline"], "no preset"),
    "publishing": (["--push_to_hub", "true"], "publishes none"),
    "evaluation of its own": (["--eval_strategy", "epoch"], "picks no checkpoint"),
    "seed instead of seeds": (["--seed", "7"], "--seeds 7"),
    "smoothing beyond the classes": (["--defense", "dece", "--defense.label_smoothing", "0.7"], "below 0.667"),
    "snapshot after the end": (
        ["--defense", "trajectory", "--defense.fractions", "[5.0]"],
        "before the end of training",
    ),
    "column that is not there": (["--text_column", "txt"], "text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_exits_2_with_advice_before_anything_is_written(hfbd, name):
    options, message = WRONG[name]
    code, _, err = hfbd(*ATTACK, *options)
    assert code == 2 and message in err, err
    assert "Traceback" not in err and not hfbd.folder.exists()


def test_regression_heads_and_pickles_are_refused(hfbd, encoder, tmp_path):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(encoder, num_labels=1)
    bad = tmp_path / "regression"
    shutil.copytree(encoder, bad)
    model.save_pretrained(bad)
    code, _, err = hfbd("--defense", "dece", "--model_name", bad)
    assert code == 2 and "regression" in err
    pickled = tmp_path / "pickled"
    shutil.copytree(encoder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code, _, err = hfbd("--defense", "dece", "--model_name", pickled)
    assert code == 2 and "safetensors" in err and not hfbd.folder.exists()


def test_config_file_has_the_same_keys_and_flags_win(hfbd, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "poison_rate: 0.2\nsimulate: badnets\nseeds: [4]\ndefense:\n- {name: dece, alpha_base: 9e-1}\n- trajectory\n"
    )
    code, out, err = hfbd("--config", config, "--poison_rate", 0.1, "--dry_run")
    assert code == 0, err
    assert "10.00% = 24 rows" in out and "alpha_base=0.9" in out and "seeds        4" in out and "trajectory" in out
    config.write_text("poison_rat: 0.2\n")
    code, _, err = hfbd("--config", config, "--dry_run")
    assert code == 2 and "Did you mean `poison_rate`" in err


def test_eval_gates_against_a_clean_reference(hfbd, task, capsys, tmp_path):
    assert hfbd(*ATTACK, "--save_models", "--num_train_epochs", 6)[0] == 0
    models = hfbd.folder / "models" / "seed-0"
    base = ["eval", "--task", str(task), "--max_length", "16", "--simulate", "badnets", "--target", "1"]
    reference = ["--clean_reference", str(models / "clean_reference"), "--max_asr_over_floor", "0.1"]
    output = tmp_path / "eval.json"
    attacked = main([*base, "--model", str(models / "undefended"), *reference, "--output", str(output)])
    out = capsys.readouterr().out
    assert attacked == 1 and "GATE: ASR" in out
    values = {(r.defense, r.metric): r.value for r in read_records(output)}
    undefended = json.loads((hfbd.folder / "results.json").read_text())["arms"]["0"]["undefended"]
    assert values["model", "asr"] == undefended["asr"]["value"] and values["model", "ca"] == undefended["ca"]["value"]
    assert main([*base, "--model", str(models / "clean_reference"), *reference]) == 0
    capsys.readouterr()
    assert main([*base, "--model", str(models / "undefended"), "--max_asr_over_floor", "0.1"]) == 2
    assert "--clean_reference" in capsys.readouterr().err


def test_eval_refuses_a_model_without_a_head(encoder, task, capsys):
    assert main(["eval", "--model", str(encoder), "--task", str(task)]) == 2
    assert "no classification head" in capsys.readouterr().err


def test_verbs_and_help(capsys):
    assert main([]) == 2 and main(["trian"]) == 2 and main(["--version"]) == 0 and main(["train", "--help"]) == 0
    assert "--poison_rate" in capsys.readouterr().out
