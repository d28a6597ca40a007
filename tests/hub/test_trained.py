"""What a hosted training says of itself: its results, its name on the Hub, what its card takes."""

import json
import math

import pytest
from transformers import TrainingArguments

from hf_backdoor_defense.attacks.weight_poisoning import WeightPoisoning
from hf_backdoor_defense.defenses.d3 import D3
from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.defenses.psim import PSIM
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.hub.evidence import read_evidence
from hf_backdoor_defense.hub.trained import card_options, repository, write_card
from hf_backdoor_defense.hub.training_results import write_trained
from hf_backdoor_defense.reporting.sealed import check_sealed
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.trainers.toys import PadCollator, Recorder, arguments, bert, bert_mlm, classification_rows, masked_rows


@pytest.fixture
def trainer(tmp_path):
    def make(defense, train=True, **args):
        found = DefendedTrainer(
            bert(),
            args=arguments(tmp_path / "out", **args),
            train_dataset=classification_rows(8),
            data_collator=PadCollator(),
            defense=defense,
        )
        if train:
            found.train()
        found.save_model()
        return found

    return make


def entry(folder):
    return read_evidence(folder).entry


def test_several_methods_are_all_named_and_the_loss_comes_first(trainer):
    folder = write_trained(trainer([Recorder(), DeCE(alpha_base=0.7)]))
    about = entry(folder)
    assert about.arm == "dece+recorder" and about.method["name"] == "dece"
    assert [other["name"] for other in about.method["together with"]] == ["recorder"]
    assert about.activity and all("/" in name for name in about.activity)
    payload = json.loads((folder / "results.json").read_text())
    assert set(payload["arms"]["0"]["dece+recorder"]["objectives"]) == {"dece", "recorder"}
    assert payload["plan"]["settings"]["learning_rate"] == 0.01 and payload["plan"]["settings"]["optim"] == "sgd"


def test_plain_training_claims_no_defense(trainer):
    folder = write_trained(trainer(None))
    about, payload = entry(folder), json.loads((folder / "results.json").read_text())
    assert (about.arm, about.method, about.role, about.base_model) == ("undefended", {}, "fine_tuned", "")
    assert payload["failures"] == [] and "Nothing was measured about triggers." in payload["verdict"]


def test_the_same_training_gives_the_same_bytes_and_a_seal_that_holds(trainer):
    host = trainer(DeCE(alpha_base=0.7))
    folder = write_trained(host)
    write_card(host, "owner/model", license="mit")
    before = {path: path.read_bytes() for path in folder.glob("*")}
    write_trained(host)
    write_card(host, "owner/model", license="mit")
    assert before == {path: path.read_bytes() for path in folder.glob("*")}
    assert {"model.safetensors", "defense.json", "results.json"} <= set(check_sealed(folder))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors .changed."):
        check_sealed(folder)


def test_evaluations_are_kept_as_they_are_named_and_only_numbers(trainer):
    host = trainer(DeCE(alpha_base=0.7))
    host.state.log_history += [
        {"eval_loss": 2.0, "eval_f1": 0.1, "step": 1},
        {
            "eval_loss": 1.5,
            "eval_f1": math.nan,
            "eval_runtime": 3.0,
            "eval_steps_per_second": 9.0,
            "eval_on": True,
            "step": 1,
        },
        {"eval_loss": 0.5, "eval_f2": 0.5, "step": 2},
    ]
    assert host.state.global_step == 1
    evidence = read_evidence(write_trained(host))
    assert evidence.payload["evaluation"] == {"eval_loss": 1.5, "eval_f1": 0.1} and "loss" not in evidence.figures


def test_the_loss_of_a_language_model_is_a_figure(tmp_path):
    rows = masked_rows(8)
    host = DefendedTrainer(
        bert_mlm(), args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows, data_collator=PadCollator()
    )
    host.train()
    host.save_model()
    loss = host.evaluate()["eval_loss"]
    evidence = read_evidence(write_trained(host))
    assert evidence.entry.pipeline_tag == "fill-mask" and evidence.figures["loss"].value == loss


def test_scores_belong_to_the_weights_that_they_were_measured_on(trainer):
    host = trainer(DeCE(alpha_base=0.7))
    scores = BackdoorScores(wilson(9, 10), None, None)
    folder = write_trained(host, scores=scores)
    assert read_evidence(folder).figures["ca"].n == 10 and read_evidence(write_trained(host)).figures["ca"].n == 10
    host.train()  # as many updates again: other weights at the same step
    host.save_model()
    assert "ca" not in read_evidence(write_trained(host)).figures
    host.state.log_history.append({"backdoor_ca": 0.5, "backdoor_ca_n": 4, "step": host.state.global_step})
    assert read_evidence(write_trained(host)).figures["ca"].n == 4
    host.state.global_step += 1
    assert "ca" not in read_evidence(write_trained(host)).figures


@pytest.mark.parametrize("best", [2, 4])
def test_evaluations_are_those_of_the_weights_that_were_put_back(tmp_path, best):
    losses = {1: 3.0, 2: 1.0 if best == 2 else 2.5, 3: 2.0, 4: 1.5}

    class Host(DefendedTrainer):
        def evaluate(self, *args, **kwargs):
            values = {"eval_loss": losses[self.state.global_step]}
            self.log(dict(values))
            return values

    options = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "num_train_epochs": 4,
        "load_best_model_at_end": True,
    }
    rows = classification_rows(8)
    host = Host(
        bert(),
        args=arguments(tmp_path, **options, metric_for_best_model="eval_loss"),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PadCollator(),
    )
    host.train()
    host.save_model()
    assert (host.state.global_step, host.state.best_global_step) == (4, best)
    assert read_evidence(write_trained(host)).payload["evaluation"] == {"eval_loss": losses[best]}
    host.state.log_history = [entry for entry in host.state.log_history if entry["step"] != best]
    assert read_evidence(write_trained(host)).payload["evaluation"] == {}


def test_a_base_on_the_hub_that_was_attacked_marks_what_is_made_of_it(trainer, tmp_path, monkeypatch):
    host = trainer(DeCE(alpha_base=0.7))
    host.model.config._name_or_path = "somebody/base"
    with HubServer(user="somebody") as hub:
        api = use(hub, monkeypatch, cache=tmp_path / "cache")
        api.create_repo("somebody/base")
        write_trained(host)
        assert not (tmp_path / "out" / "backdoored.json").exists()
        api.upload_file(path_or_fileobj=b'{"attack": "x"}', path_in_repo="backdoored.json", repo_id="somebody/base")
        about = entry(write_trained(host))
    assert about.attacked == {"backdoored": True, "attack": "x", "cleaned": {"method": "dece"}}


def test_an_attack_that_was_hosted_is_marked_and_a_detector_is_no_model(trainer, tmp_path):
    host = trainer(WeightPoisoning(target=1), train=False)
    about = entry(write_trained(host))
    assert about.role == "attacked" and about.attacked["attack"] == "weight_poisoning" and about.attacked["target"] == 1
    host = trainer(D3(), train=False, output_dir=str(tmp_path / "d3"))
    assert entry(write_trained(host)).role == "purified"
    host.objectives = [PSIM()]
    with pytest.raises(ValueError, match="no model by itself.*hfbd detect"):
        write_trained(host)


def test_a_card_without_a_license_says_unknown_and_asks_nobody(trainer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = write_card(trainer(DeCE(alpha_base=0.7)), "owner/model").parent
    text = (folder / "README.md").read_text()
    assert "license: unknown" in text and "# model" in text and "learning_rate 0.01" in text


def test_a_name_is_completed_by_whose_token_it_is(monkeypatch, tmp_path):
    args = TrainingArguments(str(tmp_path / "my-model"))
    with HubServer(user="somebody") as hub:
        use(hub, monkeypatch, cache=tmp_path)
        assert repository(args) == "somebody/my-model"
        assert repository(args, token=hub.add_user("other")) == "other/my-model"
        with pytest.raises(ValueError, match="401"):
            repository(args, token="hf_wrong")
    with pytest.raises(ValueError, match="ORG/NAME, got 'my-model'"):
        repository(args, ask=False)


def test_words_of_the_trainers_card_are_taken_over_and_typing_errors_are_not():
    given = {"finetuned_from": "a/b", "language": "en", "dataset_tags": ["c/d"], "license": None, "model_name": "x"}
    assert card_options(given) == {"base_model": "a/b", "language": ["en"], "datasets": ["c/d"]}
    with pytest.raises(TypeError, match="'lisence'"):
        card_options({"lisence": "mit"})
