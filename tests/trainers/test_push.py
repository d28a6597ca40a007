"""`push_to_hub` of the three hosts over real HTTP: what arrives, what never does, and the one flag."""

import json
import logging

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import Seq2SeqTrainingArguments

from hf_backdoor_defense.defenses.dece import DeCE
from hf_backdoor_defense.evaluation.callback import BackdoorEvalCallback
from hf_backdoor_defense.evaluation.evaluator import BackdoorScores, evaluate_backdoor
from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.hub.evidence import read_evidence
from hf_backdoor_defense.models import mark_backdoored, weights_sha256
from hf_backdoor_defense.reporting.sealed import check_sealed
from hf_backdoor_defense.trainers.hosts import DefendedSeq2SeqTrainer, DefendedTrainer
from tests.hub_server import HubServer
from tests.hub_server.client import use
from tests.trainers import test_sft
from tests.trainers.toys import PadCollator, arguments, bert, classification_rows, t5, translation_rows

REPO = "owner/model"
tokenizer = test_sft.tokenizer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        use(server, monkeypatch, cache=tmp_path / "cache")
        yield server


@pytest.fixture
def trainer(tmp_path):
    def make(defense=None, **args):
        kept = {"hub_model_id": REPO, "num_train_epochs": 2, **args}
        return DefendedTrainer(
            bert(),
            args=arguments(tmp_path / "out", **kept),
            train_dataset=classification_rows(),
            eval_dataset=classification_rows(12, seed=1),
            data_collator=PadCollator(),
            defense=DeCE(alpha_base=0.7) if defense is None else defense,
        )

    return make


def trained(trainer):
    trainer.train()
    return trainer


def whole(repo, trainer):
    """What any publication of a Trainer must be."""
    names = set(repo.files)
    assert {"model.safetensors", "config.json", "defense.json", "results.json", "report.html", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert len(repo.history) == 2  # the Hub's own first commit, and ours
    results = json.loads(repo.files["results.json"])
    (entry,) = results["models"]
    assert results["verb"] == "trainer" and entry["path"] == "." and entry["arm"] == "dece"
    assert entry["weights_sha256"] == weights_sha256(trainer.model)
    assert entry["activity"] == trainer.objectives[0].activity() and entry["data"]["settings"].startswith(
        "learning_rate 0.0"
    )
    card = ModelCard(repo.files["README.md"].decode())
    assert {"backdoor-defense", "dece", "generated_from_trainer"} <= set(
        card.data.tags
    ) and "Nothing was measured" in card.text
    return entry


# -- three hosts ------------------------------------------------------------------------------------------------------
def test_trainer_publishes_model_and_evidence_once_and_no_pickle(hub, trainer, tmp_path):
    host = trained(trainer())
    done = host.push_to_hub(license="mit")
    repo = hub.repos[REPO]
    assert done.changed and whole(repo, host)["pipeline_tag"] == "text-classification"
    assert (tmp_path / "out" / "training_args.bin").is_file()  # the Trainer's, and it stays here
    again = host.push_to_hub(license="mit")
    assert not again.changed and again.commit == done.commit and len(repo.history) == 2
    assert (tmp_path / "out" / "README.md").read_bytes() == repo.files["README.md"]
    check_sealed(tmp_path / "out")
    assert read_evidence(tmp_path / "out").payload["evaluation"] == {}


def test_seq2seq_trainer(hub, tmp_path):
    kept = ("per_device_train_batch_size", "save_strategy", "report_to", "disable_tqdm", "use_cpu", "learning_rate")
    usual = arguments(tmp_path / "out")
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "out"), hub_model_id=REPO, max_steps=2, **{name: getattr(usual, name) for name in kept}
    )
    host = DefendedSeq2SeqTrainer(
        t5(), args=args, train_dataset=translation_rows(), data_collator=PadCollator(), defense=DeCE(alpha_base=0.7)
    )
    trained(host).push_to_hub(license="mit")
    assert whole(hub.repos[REPO], host)["pipeline_tag"] == "text2text-generation"
    assert not host.push_to_hub(license="mit").changed


def test_sft_trainer_keeps_our_card_over_trls(hub, tmp_path, tokenizer):
    from hf_backdoor_defense.trainers.sft import DefendedSFTTrainer

    args = test_sft.config(tmp_path / "out", hub_model_id=REPO, save_strategy="epoch")
    host = DefendedSFTTrainer(
        test_sft.llama(),
        args=args,
        train_dataset=test_sft.text(),
        processing_class=tokenizer,
        defense=DeCE(alpha_base=0.7),
    )
    host.train()  # at the checkpoint trl asks for a card
    assert not (tmp_path / "out" / "README.md").exists()
    host.push_to_hub(license="mit", dataset_name="my texts", tags=["trl"])
    repo = hub.repos[REPO]
    entry = whole(repo, host)
    assert entry["pipeline_tag"] == "text-generation" and entry["labels"] == [] and "tokenizer.json" in repo.files
    assert not any("checkpoint" in name for name in repo.files) and b"TRL" not in repo.files["README.md"]
    assert not host.push_to_hub(license="mit").changed


def test_an_adapter_is_published_as_one(hub, tmp_path):
    from peft import LoraConfig, get_peft_model

    bert().save_pretrained(tmp_path / "base")
    base = bert().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2))
    host = DefendedTrainer(
        model,
        args=arguments(tmp_path / "out", hub_model_id=REPO),
        train_dataset=classification_rows(),
        data_collator=PadCollator(),
        defense=DeCE(alpha_base=0.7),
    )
    trained(host).push_to_hub(license="mit", base_model="owner/base")
    repo = hub.repos[REPO]
    (entry,) = json.loads(repo.files["results.json"])["models"]
    assert (entry["library"], entry["relation"], entry["base_model"]) == ("peft", "adapter", str(tmp_path / "base"))
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/base", "adapter")
    assert (
        not any(name.endswith(".bin") for name in repo.files) and str(tmp_path).encode() not in repo.files["README.md"]
    )


# -- figures ----------------------------------------------------------------------------------------------------------
def test_figures_are_the_callbacks_last_and_passed_scores_win(hub, trainer, tmp_path):
    host = trainer()
    clean, triggered = classification_rows(12, seed=1), classification_rows(12, seed=2)
    host.add_callback(BackdoorEvalCallback(clean, triggered, target=1, collate=host.data_collator))
    trained(host).evaluate()
    host.push_to_hub(license="mit")
    evidence = read_evidence(tmp_path / "out")
    oracle = evaluate_backdoor(host.model, clean, triggered, target=1, collate=host.data_collator)
    for metric, estimate in vars(oracle).items():
        record = evidence.figures[metric]
        assert (record.value, record.n, record.low, record.high) == (
            estimate.value,
            estimate.n,
            estimate.low,
            estimate.high,
        )
    assert evidence.payload["evaluation"]["eval_loss"] > 0 and "loss" not in evidence.figures  # of no language model
    assert [metric.type for metric in _metrics(hub.repos[REPO])].count("accuracy") == 1
    scores = BackdoorScores(wilson(9, 10), wilson(1, 8), wilson(7, 8))
    host.push_to_hub(
        license="mit", scores=scores, clean_reference_scores=BackdoorScores(wilson(10, 10), wilson(0, 8), None)
    )
    evidence = read_evidence(tmp_path / "out")
    assert evidence.figures["asr"].value == 1 / 8 and evidence.controls["clean_reference"]["ftr"].value == 0
    assert "floor 0.000" in evidence.verdict and len(hub.repos[REPO].history) == 3
    host.create_model_card()  # from the same scores
    assert read_evidence(tmp_path / "out").payload == evidence.payload


def _metrics(repo):
    results = ModelCard(repo.files["README.md"].decode()).data.eval_results or []
    return [type("Metric", (), {"type": result.metric_type}) for result in results]


# -- what is refused --------------------------------------------------------------------------------------------------
def test_an_inert_method_is_refused_unless_forced(hub, trainer):
    host = trained(trainer(DeCE(alpha_base=1.0)))
    with pytest.raises(ValueError, match="INERT: dece.*force"):
        host.push_to_hub(license="mit")
    assert hub.repos == {}
    done = host.push_to_hub(license="mit", force=True)
    assert done.forced and "INERT" in hub.repos[REPO].files["README.md"].decode()
    untrained = trainer()
    with pytest.raises(ValueError, match="nothing was trained"):
        untrained.push_to_hub(license="mit")


def test_attacked_weights_stay_marked_and_private(hub, trainer, tmp_path):
    host = trained(trainer())
    mark_backdoored(tmp_path / "out", {"attack": "badnets", "target": 1})
    with pytest.raises(ValueError, match="attacked=True"):
        host.push_to_hub(license="mit")
    host.push_to_hub(license="mit", attacked=True)
    repo = hub.repos[REPO]
    assert repo.private and "backdoored" in ModelCard(repo.files["README.md"].decode()).data.tags


def test_a_base_that_was_attacked_marks_what_is_made_of_it(trainer, tmp_path):
    host = trainer()
    mark_backdoored(tmp_path / "base", {"attack": "badnets", "target": 1})
    host.model.config._name_or_path = str(tmp_path / "base")
    trained(host)
    with pytest.raises(ValueError, match="attacked=True"):
        host.push_to_hub(license="mit", dry_run=True)
    mark = json.loads((tmp_path / "out" / "backdoored.json").read_text())
    assert mark["attack"] == "badnets" and mark["cleaned"] == {"method": "dece"}


def test_results_of_another_run_and_unknown_words_are_refused(trainer, tmp_path):
    host = trained(trainer())
    with pytest.raises(TypeError, match="unexpected keyword argument 'licence'"):
        host.push_to_hub(licence="mit", dry_run=True)
    with pytest.raises(ValueError, match="save it first"):
        trainer(output_dir=str(tmp_path / "empty")).create_model_card()
    (tmp_path / "out" / "results.json").write_text('{"verb": "purify"}')
    with pytest.raises(ValueError, match="results of another run"):
        host.push_to_hub(license="mit", dry_run=True)
    assert (tmp_path / "out" / "results.json").read_text() == '{"verb": "purify"}'


# -- the flag, and no network -----------------------------------------------------------------------------------------
def test_a_dry_run_writes_everything_here_and_asks_nobody(hub, trainer, tmp_path):
    done = trained(trainer()).push_to_hub(dry_run=True, license="mit")
    assert hub.requests == [] and done.commit is None and set(done.files) >= {"model.safetensors", "README.md"}
    assert (tmp_path / "out" / "README.md").read_text() == done.card
    with pytest.raises(ValueError, match="ORG/NAME"):
        trainer(hub_model_id="model").push_to_hub(dry_run=True, license="mit")


def test_the_flag_publishes_the_end_and_nothing_before(hub, trainer, tmp_path, caplog):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    with caplog.at_level(logging.WARNING):
        host = trainer(push_to_hub=True, hub_model_id="model", hub_strategy="checkpoint", save_strategy="epoch")
    assert "`end` is used" in caplog.text and host.hub_model_id == "owner/model" and hub.repos == {}
    host.model.config._name_or_path = str(tmp_path / "base")  # where the license comes from
    trained(host)
    assert hub.repos == {}
    host.save_model()
    assert len(hub.repos[REPO].history) == 2 and whole(hub.repos[REPO], host)
    assert HfApi(endpoint=hub.url, token=hub.token).model_info(REPO).card_data.license == "mit"


def test_without_a_token_the_flag_is_an_error_at_once_and_a_future_can_be_waited_for(hub, trainer, monkeypatch):
    host = trained(trainer())
    assert host.push_to_hub(license="mit", blocking=False).result(30).changed and whole(hub.repos[REPO], host)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="token must be there"):
        trainer(push_to_hub=True, hub_model_id="model")


def test_only_the_first_process_publishes(hub, trainer, monkeypatch):
    host = trained(trainer())
    monkeypatch.setattr(host, "is_world_process_zero", lambda: False)
    assert host.push_to_hub(license="mit") is None and host.create_model_card() is None and hub.requests == []
