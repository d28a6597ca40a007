"""Random labels by hash, a frozen base, a stop rule on clean rows, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2ForSequenceClassification, set_seed

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.defenses.psim import PSIM, cut, random_labels
from hf_backdoor_defense.models import weights_sha256
from hf_backdoor_defense.trainers.named import PSIMTrainer
from tests.trainers.toys import PadCollator, arguments, bert, bert_tokens, classification_rows

PLAIN = {"lora_dropout": 0.0}


def confident(labels=2, scale=200.0):
    """A base that is sure of every text."""
    model = bert(labels)
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
    return model


def trainer(folder, psim=None, *, model=None, rows=None, held_out="default", **options):
    return PSIMTrainer(
        confident() if model is None else model,
        args=arguments(folder, **{"learning_rate": 0.05, "num_train_epochs": 3, **options}),
        train_dataset=classification_rows(40, 2) if rows is None else rows,
        data_collator=PadCollator(),
        aux_datasets={} if held_out is None else {"held_out": classification_rows(40, 2, seed=7)},
        defense=psim,
    )


# -- labels ---------------------------------------------------------------------------------------------------------------
def test_labels_are_a_function_of_seed_and_row_id_alone():
    ids = list(range(500))
    whole = random_labels(ids, classes=3, seed=4)
    shards = [random_labels(ids[i::2], classes=3, seed=4) for i in (0, 1)]
    assert np.array_equal(np.stack(shards, 1).reshape(-1), whole)  # two processes see what one sees
    assert not np.array_equal(whole, random_labels(ids, classes=3, seed=5))
    assert abs(np.mean(whole == random_labels(ids, classes=3, seed=5)) - 1 / 3) < 0.08


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_labels_are_uniform(classes):
    counts = np.bincount(random_labels(range(7000), classes=classes, seed=0), minlength=classes)
    assert chisquare(counts).pvalue > 1e-3


def test_the_trainer_sees_the_hash_whatever_the_given_labels_are(tmp_path):
    rows = classification_rows(40, 2)
    flipped = rows.remove_columns("label").add_column("label", [1 - label for label in rows["label"]])
    unlabeled = rows.remove_columns("label")
    seen = []
    for i, given in enumerate((rows, flipped, unlabeled)):
        host = trainer(tmp_path / str(i), PSIM(), rows=given, max_steps=1)
        host.train()
        seen.append(dict(zip(host.train_dataset["row_id"], host.train_dataset["label"], strict=True)))
    assert seen[0] == seen[1] == seen[2]
    ids = list(seen[0])
    assert list(seen[0].values()) == random_labels(ids, classes=2, seed=0).tolist()
    agreements = [np.mean(np.array(given["label"]) == list(seen[0].values())) for given in (rows, flipped)]
    assert sum(agreements) == pytest.approx(1.0) and max(agreements) < 0.9


# -- training -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", ["hashed", "expected"])
def test_five_steps_equal_a_loop_written_by_hand(tmp_path, labels):
    psim = PSIM(peft_config=PLAIN, stop_margin=None, labels=labels, train_head=True)
    options = {"max_steps": 5, "train_sampling_strategy": "sequential", "learning_rate": 0.1}
    host = trainer(tmp_path, psim, model=confident(scale=20), held_out=None, **options)
    host.train()

    model = confident(scale=20)
    set_seed(0)
    model = apply_strategy(model, "lora", lora_dropout=0.0).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = classification_rows(40, 2)
    for step in range(5):
        batch = rows.select(range(8 * step, 8 * step + 8))
        width = max(map(len, batch["input_ids"]))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch["input_ids"]])
        mask = torch.tensor([row + [0] * (width - len(row)) for row in batch["attention_mask"]])
        drawn = torch.tensor(random_labels(batch["row_id"], classes=2, seed=0))
        logits = model(input_ids=ids, attention_mask=mask)["logits"]
        losses = torch.stack([cross_entropy(logits, torch.full((8,), j), reduction="none") for j in (0, 1)])  # [2, 8]
        loss = (losses[drawn, torch.arange(8)] if labels == "hashed" else losses.mean(0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs = dict(host.model.named_parameters())
    for name, mine in model.named_parameters():
        torch.testing.assert_close(theirs[name], mine, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_the_base_is_unchanged_bit_for_bit(tmp_path, strategy):
    base = confident()
    before, sha = {n: t.clone() for n, t in base.state_dict().items()}, weights_sha256(base)
    host = trainer(tmp_path, PSIM(strategy=strategy, stop_margin=None, train_head=True), model=base)
    host.train()
    assert host.objectives[0].base_sha256 == sha
    moved = 0
    for name, tensor in host.model.get_base_model().state_dict().items():
        if "lora_" in name or "modules_to_save" in name:
            moved += 1
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        assert torch.equal(tensor, before[plain]), name
    assert moved > 0


def test_the_head_is_trained_only_when_asked(tmp_path):
    for train_head in (False, True):
        host = trainer(tmp_path / str(train_head), PSIM(stop_margin=None, train_head=train_head), max_steps=3)
        host.train()
        head = next(p for n, p in host.model.named_parameters() if n.endswith("modules_to_save.default.weight"))
        assert torch.equal(head, confident().classifier.weight) != train_head


def test_it_stops_as_soon_as_clean_confidence_has_fallen(tmp_path):
    options = {"num_train_epochs": 8, "learning_rate": 3e-2, "optim": "adamw_torch"}
    full = trainer(
        tmp_path / "a", PSIM(stop_margin=None, stop_every=1, train_head=True), model=confident(scale=40), **options
    )
    full.train()
    psim = PSIM(stop_margin=0.1, stop_every=1, train_head=True)
    stopped = trainer(tmp_path / "b", psim, model=confident(scale=40), **options)
    stopped.train()
    activity = psim.activity()
    assert activity["stopped"] == 1.0 and activity["steps"] < full.state.global_step == 40
    assert activity["conf_p95_after"] <= 0.6 < activity["conf_p95_before"]
    assert psim.inert() is None
    assert full.objectives[0].activity()["stopped"] == 0.0


@pytest.mark.parametrize("first, steps", [(0.5, 1), (1.0, 5)])
def test_the_first_process_decides_for_all_when_to_stop(tmp_path, monkeypatch, first, steps):
    """This one, the second of two, would have gone on, or stopped: one that stops alone leaves the others waiting."""
    monkeypatch.setattr("hf_backdoor_defense.defenses.psim.everywhere", lambda mine: [(first, first), mine])
    psim = PSIM(stop_margin=0.1, stop_every=1)
    host = trainer(tmp_path, psim, model=confident(scale=200 if first == 0.5 else 0.0), num_train_epochs=1)
    host.train()
    assert host.state.global_step == steps and psim.activity()["stopped"] == (first == 0.5)
    assert psim.activity()["conf_p95_after"] == first


def test_looking_changes_no_step(tmp_path):
    hosts = []
    for every in (1, 1000):
        hosts.append(trainer(tmp_path / str(every), PSIM(stop_margin=None, stop_every=every)))
        hosts[-1].train()
    for (name, one), other in zip(hosts[0].model.named_parameters(), hosts[1].model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_run_that_was_stopped_goes_on_to_the_same_module(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = trainer(tmp_path / "whole", PSIM(peft_config=PLAIN, stop_margin=None), **options)
    whole.train()
    again = trainer(tmp_path / "whole", PSIM(peft_config=PLAIN, stop_margin=None), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)
    assert again.objectives[0].activity() == pytest.approx(whole.objectives[0].activity())


def test_logs_say_how_far_confidence_has_fallen(tmp_path):
    host = trainer(
        tmp_path, PSIM(stop_margin=None, stop_every=1), logging_strategy="steps", logging_steps=1, max_steps=3
    )
    host.train()
    logs = [entry for entry in host.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["psim/loss_minus_lnk"] == pytest.approx(entry["loss"] - np.log(2), abs=1e-4)
        assert 0.5 <= entry["psim/conf_mean"] <= entry["psim/conf_p95"] <= 1.0


# -- what did nothing, and what is refused ----------------------------------------------------------------------------------
def test_inert_when_confidence_does_not_fall_or_never_was(tmp_path):
    still = trainer(tmp_path / "a", PSIM(), learning_rate=0.0)
    still.train()
    assert "did not lower" in still.objectives[0].inert()
    unsure = trainer(tmp_path / "b", PSIM(), model=bert(2))
    unsure.train()
    assert "not confident on clean text" in unsure.objectives[0].inert()
    assert PSIM().inert() is None  # not trained: nothing to say


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": bert_tokens()}, "no classifier of whole texts"),
        ({"model": apply_strategy(bert(2), "lora")}, "carries an adapter already"),
        ({"held_out": None}, "held_out"),
        ({"rows": [{"input_ids": [1], "labels": 0}] * 8}, "datasets.Dataset"),
        ({"psim": PSIM.preset("paper"), "model": bert(4)}, "no meaning for 4 classes"),
    ],
)
def test_refused_before_anything_is_trained(tmp_path, change, message):
    host = trainer(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        host.train()
    assert host.state.global_step == 0


def test_regression_and_several_labels_per_row_are_refused_by_name(tmp_path):
    for kind, labels in (("regression", 1), ("multi_label_classification", 3)):
        model = bert(labels)
        model.config.problem_type = kind
        with pytest.raises(ValueError, match=f"BertForSequenceClassification has a head for {kind}"):
            trainer(tmp_path, model=model).train()


def test_a_prompt_on_a_decoder_is_refused_and_lora_runs(tmp_path):
    def decoder():
        set_seed(0)
        config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=2, pad_token_id=0,
                            bos_token_id=1, eos_token_id=1)  # fmt: skip
        return GPT2ForSequenceClassification(config)

    with pytest.raises(ValueError, match="takes padding for text"):
        trainer(tmp_path, PSIM(strategy="p_tuning"), model=decoder()).train()
    host = trainer(tmp_path, PSIM(stop_margin=None), model=decoder(), max_steps=2)
    host.train()
    assert host.state.global_step == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "full"}, "frozen"),
        ({"strategy": "lorra"}, "lorra"),
        ({"stop_margin": 0.0}, "stop_margin"),
        ({"stop_every": 0}, "stop_every"),
        ({"labels": "soft"}, "labels"),
        ({"threshold": 0.5}, "threshold"),
    ],
)
def test_fields_are_checked_where_they_are_written(fields, message):
    with pytest.raises(ValueError, match=message):
        PSIM(**fields)


def test_long_rows_are_cut_and_keep_their_last_token():
    rows = Dataset.from_list([{"input_ids": [*range(9), 99], "attention_mask": [1] * 10, "row_id": 5}] * 2)
    short = cut(rows, 4)
    assert (
        short["input_ids"][:] == [[0, 1, 2, 99]] * 2
        and short["attention_mask"][:] == [[1] * 4] * 2
        and short["row_id"][:] == [5, 5]
    )
    assert cut(rows, 10) is rows and cut(rows, None) is rows


def test_resume_on_another_base_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, PSIM(stop_margin=None), **options).train()
    other = confident(scale=3)
    with pytest.raises(ValueError, match="trained on other weights"):
        trainer(tmp_path, PSIM(stop_margin=None), model=other, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-5")
        )


def test_a_second_training_keeps_what_it_knows_of_the_given_labels(tmp_path):
    host = trainer(tmp_path, PSIM(stop_margin=None, train_head=True))
    host.train()
    first = host.objectives[0].activity()["label_agreement"]
    host.train()
    assert host.objectives[0].activity()["label_agreement"] == first < 0.9
    assert host.objectives[0].inert() is None
