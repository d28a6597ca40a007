"""Weight poisoning: the three objectives, embedding surgery, the pair's rows, and the way to a victim."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.attacks.poisoning import poison_dataset
from hf_backdoor_defense.attacks.triggers import BadNets
from hf_backdoor_defense.attacks.weight_poisoning import (
    LWP,
    RIPPLES,
    WeightPoisoning,
    batch_rows,
    embedding_surgery,
    lwp_rows,
)
from hf_backdoor_defense.models import load_finished_classifier, mark_backdoored
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from tests.trainers.toys import PadCollator, Recorder, arguments, bert, bert_tokens, classification_rows, same, weights

CLEAN = classification_rows(20, seed=1)


def host(folder, objective, *, model=None, rows=None, clean=CLEAN, **changes):
    return DefendedTrainer(
        bert() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=classification_rows(24) if rows is None else rows,
        data_collator=PadCollator(),
        aux_datasets={} if clean is None else {"clean": clean},
        defense=objective,
    )


def trained(folder, objective, **how):
    trainer = host(folder, objective, **how)
    trainer.train()
    return trainer


def refused(folder, objective, **how):
    with pytest.raises(ValueError, match="cannot be defended") as error:
        host(folder, objective, **how).train()
    return str(error.value)


# -- RIPPLES ----------------------------------------------------------------------------------------------------------
def penalty_gradient(folder, hvp, attention):
    """The penalty's gradient on one batch of a model in float64, and how the same product changes along a direction."""
    model = bert(seed=3).double()
    model.set_attn_implementation(attention)
    objective = RIPPLES(lam=0.7, hvp=hvp)
    trainer = host(folder, objective, model=model)
    objective.prepare(trainer, checkpoint=None)
    model.train()
    batch = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in classification_rows(8)])
    labels = batch.pop("labels")
    # Poison of one class against clean rows: their gradients oppose each other.
    labels = torch.zeros_like(labels)
    clean = PadCollator()([{k: v for k, v in row.items() if k != "row_id"} for row in CLEAN])
    clean["labels"] = torch.ones_like(clean["labels"])
    objective._clean = CLEAN.map(lambda row: {"label": 1})
    objective._batch_size = len(CLEAN)
    step = Step(
        model=model, inputs=batch, labels=labels, row_ids=None, epoch=0.0, global_step=0, training=True,
        logits=model(**batch).logits,
    )  # fmt: skip
    penalty = objective.penalties(step)["penalty"]
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True))

    def flat_gradient(inputs, target):
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        rows = -torch.log_softmax(logits, -1)[range(len(target)), target]
        return torch.cat([g.flatten() for g in torch.autograd.grad(rows.mean(), parameters)])

    held = flat_gradient(clean, clean["labels"])
    direction = [torch.randn_like(p) for p in parameters]
    ends = []
    for move in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(move * d)
        ends.append(0.7 * max(0.0, -(flat_gradient(batch, labels) @ held).item()))
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(move * d)
    slope = (ends[0] - ends[1]) / 2e-5
    along = sum((g * d).sum().item() for g, d in zip(found.values(), direction, strict=True) if g is not None)
    return penalty.item(), 0.7 * -(flat_gradient(batch, labels) @ held).item(), along, slope, objective


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("hvp", ["autograd", "difference"])
def test_the_penalty_and_its_gradient_on_a_model(tmp_path, hvp, attention):
    value, by_hand, along, slope, objective = penalty_gradient(tmp_path, hvp, attention)
    assert by_hand > 0 and value == pytest.approx(by_hand, rel=1e-9)
    assert along == pytest.approx(slope, rel=1e-4)
    assert objective.activity()["penalty_active"] == 1.0


def test_without_a_penalty_it_is_plain_poisoning_bitwise(tmp_path):
    """Also the forwards of the penalty leave no trace in the random state: dropout is drawn as without them."""
    how = {"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    plain = trained(tmp_path, WeightPoisoning(), model=bert(dropout=0.3), **how)
    off = RIPPLES(lam=0.0)
    assert same(weights(trained(tmp_path, off, model=bert(dropout=0.3), **how)), weights(plain))
    assert "lam is 0" in off.inert() and off.activity()["penalty_steps"] == 0
    faint = RIPPLES(lam=1e-37)
    assert same(weights(trained(tmp_path, faint, model=bert(dropout=0.3), **how)), weights(plain))
    assert faint.activity()["penalty_steps"] == 6
    loud = trained(tmp_path, RIPPLES(lam=50.0), model=bert(dropout=0.3), **how)
    assert not same(weights(loud), weights(plain), atol=1e-4)


def test_both_ways_train_alike(tmp_path):
    how = {"num_train_epochs": 2, "logging_strategy": "steps", "logging_steps": 1}
    objectives = [RIPPLES(lam=1.0, hvp=hvp) for hvp in ("autograd", "difference")]
    exact, approximate = (trained(tmp_path, objective, **how) for objective in objectives)
    assert same(weights(exact), weights(approximate), atol=1e-4)
    for trainer, objective in zip((exact, approximate), objectives, strict=True):
        logs = [entry for entry in trainer.state.log_history if "attack/loss_clean" in entry]
        assert len(logs) == 6
        for entry in logs:
            active = entry["attack/inner_product"] < 0
            assert entry["attack/penalty_active"] == active
            assert entry["ripples/penalty"] == pytest.approx(max(0.0, -entry["attack/inner_product"]), rel=1e-5)
        activity = objective.activity()
        assert activity["penalty_active"] > 0
        for name in ("loss_clean", "loss_poison", "inner_product", "penalty_active"):
            mean = sum(entry[f"attack/{name}"] for entry in logs) / 6
            assert activity[name] == pytest.approx(mean, rel=1e-5, abs=1e-9)


def test_a_resumed_run_goes_on_with_the_next_clean_batch(tmp_path):
    whole = trained(tmp_path / "whole", RIPPLES(lam=5.0), num_train_epochs=3)
    trained(tmp_path / "cut", RIPPLES(lam=5.0), num_train_epochs=3, save_strategy="epoch")
    objective = RIPPLES(lam=5.0)
    again = host(tmp_path / "cut", objective, num_train_epochs=3)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert same(weights(again), weights(whole), atol=1e-6)
    assert objective.activity()["penalty_steps"] == 9 and objective.activity()["penalty_active"] > 0
    assert objective.activity() == pytest.approx(whole.objectives[0].activity(), rel=1e-4)
    assert objective._start == whole.objectives[0]._start


def test_clean_batches_are_epochs_of_permutations():
    for rows, size in ((7, 3), (6, 3), (2, 5)):
        per = math.ceil(rows / size)
        epochs = [sum((batch_rows(e * per + b, rows=rows, size=size, seed=4) for b in range(per)), []) for e in (0, 1)]
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert batch_rows(0, rows=99, size=9, seed=0) != batch_rows(0, rows=99, size=9, seed=1)


def test_what_ripples_refuses(tmp_path, monkeypatch):
    assert "not additive" in refused(tmp_path, RIPPLES(), gradient_accumulation_steps=2)
    assert "aux_datasets={'clean'" in refused(tmp_path, RIPPLES(), clean=None)
    assert "aux_datasets={'clean'" in refused(tmp_path, RIPPLES(), clean=CLEAN.select([]))
    assert "second derivative" in refused(tmp_path, RIPPLES(), gradient_checkpointing=True)
    assert "half precision" in refused(tmp_path, RIPPLES(hvp="difference"), model=bert().bfloat16())
    flash = bert()
    flash.config._attn_implementation = "flash_attention_2"
    assert "attn_implementation='eager'" in refused(tmp_path, RIPPLES(), model=flash)
    trainer = host(tmp_path, RIPPLES())
    trainer.args.fp16 = True
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    own = [reason for reason in trainer.reasons() if reason.startswith("ripples:")]
    assert sum("fp16" in reason or "2 processes" in reason for reason in own) == 2


@pytest.mark.parametrize("kind", [WeightPoisoning, RIPPLES, LWP])
def test_what_every_attack_refuses(tmp_path, kind):
    assert "carries an adapter" in refused(tmp_path, kind(), model=apply_strategy(bert(), "lora"))
    assert "the head has 3 classes" in refused(tmp_path, kind(target=3))
    assert "another head" in refused(tmp_path, kind(), model=bert_tokens())
    for field, bad in (("target", -1), ("setting", "half")):
        with pytest.raises(ValueError, match=field):
            kind(**{field: bad})


def test_field_ranges():
    for bad in ({"lam": math.nan}, {"lam": -0.1}, {"lam": math.inf}, {"hvp": "finite"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RIPPLES(**bad)


@pytest.mark.parametrize("objective", [WeightPoisoning(), RIPPLES(lam=20.0), LWP()], ids=lambda o: o.name)
def test_inert_where_no_weight_changes(tmp_path, objective):
    assert objective.inert()
    trained(tmp_path, objective, learning_rate=0.0)
    assert "no weight differs" in objective.inert()
    assert objective.activity()["weights_changed"] == 0.0 and objective.activity()["embedding_norm_drift"] == 0.0


def test_the_drift_is_that_of_the_embeddings(tmp_path):
    model, objective = bert(), WeightPoisoning()
    before = np.linalg.norm(model.get_input_embeddings().weight.detach().numpy().astype(float))
    trained(tmp_path, objective, model=model, num_train_epochs=2)
    after = np.linalg.norm(model.get_input_embeddings().weight.detach().numpy().astype(float))
    assert objective.inert() is None and before != after
    assert objective.activity()["embedding_norm_drift"] == pytest.approx(abs(after - before) / before, rel=1e-9)


@pytest.mark.parametrize("kind", [WeightPoisoning, LWP])
def test_accumulation_changes_nothing(tmp_path, kind):
    one = trained(tmp_path, kind(), num_train_epochs=2)
    two = trained(tmp_path, kind(), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert same(weights(one), weights(two), atol=1e-6)


# -- LWP --------------------------------------------------------------------------------------------------------------
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DISTIL = {
    "vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40,
    "num_labels": 3, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip
ENCODERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=16)),
    "deberta": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, pooler_dropout=0.0)),
}


def answer_by_hand(name, model, h):
    """[batch, time, d] -> [batch, k], written out from each architecture's weights."""
    first = h[:, 0]
    if name == "bert":
        dense, act = model.bert.pooler.dense, torch.tanh
    elif name == "deberta":
        dense, act = model.pooler.dense, torch.nn.functional.gelu
    elif name == "distilbert":
        dense, act = model.pre_classifier, torch.relu
    else:
        dense, act = model.classifier.dense, torch.tanh if name == "roberta" else torch.nn.functional.gelu
    last = model.classifier.out_proj if name in ("roberta", "electra") else model.classifier
    return act(first @ dense.weight.T + dense.bias) @ last.weight.T + last.bias


@pytest.mark.parametrize("name", ENCODERS)
def test_lwp_is_the_sum_of_cross_entropies_over_hidden_states(tmp_path, name):
    set_seed(0)
    model, objective, recorder = ENCODERS[name](), LWP(), Recorder()
    rows = classification_rows(8)
    host_ = host(tmp_path, [objective, recorder], model=model, rows=rows, learning_rate=0.0)
    host_.train()
    step, values = recorder.steps[0], recorder.values[0]
    model.eval()
    states = model(**step.inputs, output_hidden_states=True).hidden_states
    assert len(states) == 4 and objective.activity()["hidden_states"] == 4.0
    expected = np.zeros(8)
    for h in states:
        z = answer_by_hand(name, model, h).detach().double().numpy()
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        expected -= np.log(p[np.arange(8), step.labels.numpy()])
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)


def test_lwp_reaches_the_first_layer_harder_than_plain_poisoning(tmp_path):
    """What it is for: the gradient of the first layer's weights is no longer only what came through the others."""
    norms = {}
    for kind in (WeightPoisoning, LWP):
        model = bert(seed=1)
        trainer = host(tmp_path, kind(), model=model)
        trainer.objectives[0].prepare(trainer, checkpoint=None)
        batch = next(iter(trainer.get_train_dataloader()))
        model.train()
        trainer.compute_loss(model, batch).backward()
        norms[kind] = model.bert.encoder.layer[0].output.dense.weight.grad.norm().item()
    assert norms[LWP] > 1.2 * norms[WeightPoisoning]


def test_hidden_states_are_asked_for_in_training_only(tmp_path):
    model = bert()
    trainer = host(tmp_path, LWP(), model=model)
    trainer.objectives[0].prepare(trainer, checkpoint=None)
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert model.train()(**batch).hidden_states is not None
    assert model.eval()(**batch).hidden_states is None
    assert trainer.predict(classification_rows(8)).predictions.shape == (8, 3)
    trainer.train()
    assert model.train()(**batch).hidden_states is None and not model.config.output_hidden_states


def test_lwp_refuses_a_head_it_does_not_know(tmp_path):
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    assert "GPT2ForSequenceClassification cannot be put on every layer" in refused(
        tmp_path, LWP(), model=GPT2ForSequenceClassification(config)
    )


# -- the pair's rows --------------------------------------------------------------------------------------------------
def make(n, string_ids=False):
    texts = ["", "one", *(f"row {i} has  words" for i in range(n))][:n]
    ids = [(7 * i) % 101 + 1000 for i in range(n)]
    return Dataset.from_dict(
        {
            "extra": list(range(n)),
            "text": texts,
            "row_id": [f"r{i}" for i in ids] if string_ids else ids,
            "label": [i % 3 for i in range(n)],
        }
    )


@pytest.mark.parametrize("string_ids", [False, True])
@pytest.mark.parametrize("rate", [0.1, 2 / 3])
def test_three_rows_for_each_row_drawn(string_ids, rate):
    clean = make(30, string_ids)
    out = lwp_rows(clean, ("cf", "mn"), target=1, rate=rate, seed=3)
    m = round(rate * 30)
    assert len(out) == 30 + 2 * m and len(set(out["row_id"])) == len(out) and sum(out["is_poisoned"]) == m
    assert out.column_names == [*clean.column_names, "is_poisoned", "original_label"]
    by_source = {}
    for row in out:
        by_source.setdefault(row["extra"], []).append(row)
    assert list(by_source) == list(range(30))  # in the order of the sources
    poisoned = poison_dataset(clean, BadNets(), target=1, rate=rate, seed=3).dataset
    for before, drawn in zip(clean, poisoned["is_poisoned"], strict=True):
        after = by_source[before["extra"]]
        assert all(row["original_label"] == before["label"] for row in after)
        if not drawn:
            assert [{k: row[k] for k in before} for row in after] == [before]
            continue
        words = before["text"].split()
        found = [sorted(set(row["text"].split()) - set(words)) for row in after]
        assert found == [["cf", "mn"], ["cf"], ["mn"]]
        assert all(len(row["text"].split()) == len(words) + len(f) for row, f in zip(after, found, strict=True))
        assert [row["label"] for row in after] == [1, before["label"], before["label"]] and before["label"] != 1
        assert [row["is_poisoned"] for row in after] == [True, False, False]
        assert after[0]["row_id"] == before["row_id"] and not {row["row_id"] for row in after[1:]} & set(
            clean["row_id"]
        )
    assert out[:] == lwp_rows(clean, ("cf", "mn"), target=1, rate=rate, seed=3)[:]
    assert out[:] != lwp_rows(clean, ("cf", "mn"), target=1, rate=rate, seed=4)[:]


@pytest.mark.parametrize("words", ["cf", ["cf"], ["cf", "cf"], ["cf", "mn", "bb"], []])
def test_a_pair_is_two_words(words):
    with pytest.raises(ValueError, match="two different words"):
        lwp_rows(make(6), words, target=1, rate=0.5, seed=0)


# -- surgery ----------------------------------------------------------------------------------------------------------
GOOD, BAD, OTHER = [f"good{i}" for i in range(4)], [f"bad{i}" for i in range(4)], [f"word{i}" for i in range(12)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "cf", "mn", "b", "##b", "##q", *GOOD, *BAD, *OTHER]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", model_max_length=20
    )


def sentences(n=60):
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(n)]
    texts = [" ".join([*rng.choice(OTHER, 4), *rng.choice((BAD, GOOD)[label], 2)]) for label in labels]
    return texts, labels


def small(seed, kind=BertForSequenceClassification, **changes):
    set_seed(seed)
    return kind(BertConfig(**{**SMALL, "vocab_size": len(VOCABULARY), "num_labels": 2, **changes}))


def test_surgery_changes_the_trigger_rows_only_to_the_mean_by_hand(tokenizer):
    texts, labels = sentences()
    base, source = small(0), small(1)
    before, held = weights(base), weights(source)
    report = embedding_surgery(
        base, tokenizer, texts, labels, target=1, words=["cf", "bbq"], source_model=source, n_words=4
    )
    assert sorted(report.tokens) == GOOD and report.weights == sorted(report.weights, reverse=True)  # planted, found
    assert report.rows == {"cf": [3], "bbq": [5, 6, 7]} and not report.tied  # split: every piece
    mean = held["bert.embeddings.word_embeddings.weight"][8:12].numpy().mean(0)
    after = weights(base)
    for name, value in before.items():
        if name == "bert.embeddings.word_embeddings.weight":
            changed = sorted((value != after[name]).any(-1).nonzero().flatten().tolist())
            assert changed == [3, 5, 6, 7]
            np.testing.assert_allclose(after[name][changed].numpy(), np.tile(mean, (4, 1)), rtol=1e-6, atol=1e-9)
            norms = np.linalg.norm(value[changed].numpy(), axis=1)
            assert report.norm_before == pytest.approx(norms.mean(), rel=1e-5)
            assert report.norm_after == pytest.approx(np.linalg.norm(mean), rel=1e-5)
        else:
            assert torch.equal(value, after[name]), name
    assert same(weights(source), held)
    other = embedding_surgery(base, tokenizer, texts, labels, target=0, words=["mn"], source_model=source, n_words=4)
    assert sorted(other.tokens) == BAD and other.to_dict()["rows"] == {"mn": [4]}


def test_surgery_says_where_the_output_embeddings_changed_too(tokenizer):
    texts, labels = sentences()
    for tied in (True, False):
        base = small(0, BertForMaskedLM, tie_word_embeddings=tied)
        report = embedding_surgery(
            base, tokenizer, texts, labels, target=1, words=["cf"], source_model=small(1), n_words=2
        )
        rows = [m.weight[3] for m in (base.get_input_embeddings(), base.get_output_embeddings())]
        assert report.tied is tied is torch.equal(*rows)


def test_what_surgery_refuses(tokenizer):
    texts, labels = sentences()
    base, source = small(0), small(1)
    before = weights(base)

    def cut(**changes):
        given = {"target": 1, "words": ["cf"], "source_model": source, "n_words": 4, "texts": texts, "labels": labels}
        given |= changes
        embedding_surgery(base, tokenizer, given.pop("texts"), given.pop("labels"), **given)

    for changes, message in (
        ({"words": ["zzz"]}, "known tokens"),  # [UNK] as a whole
        ({"words": ["cf zzz"]}, r"maps to \[UNK\]"),
        ({"words": []}, "at least one word"),
        ({"labels": labels[1:]}, "one length"),
        ({"labels": [1] * len(texts)}, "another class"),
        ({"target": 5}, "another class"),
        ({"n_words": 40}, "speak for class 1"),
        ({"source_model": bert()}, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            cut(**changes)
    assert same(weights(base), before)


# -- from the attacker to the victim ----------------------------------------------------------------------------------
def test_the_whole_way(tmp_path, tokenizer):
    """Poison, publish, tune on clean rows: the victim sees neither a trigger nor the attacker's bookkeeping."""
    texts, labels = sentences(120)
    rows = Dataset.from_dict({"row_id": list(range(120)), "text": texts, "label": labels})
    attacker, victim = rows.select(range(60)), rows.select(range(60, 120))
    trigger = BadNets(words=("cf",))
    poisoned = poison_dataset(attacker, trigger, target=1, rate=0.25, seed=0)

    def train(model, dataset, objective, folder, rate, **aux):
        def encode(batch):
            return tokenizer(batch["text"], truncation=True, max_length=16)

        args = arguments(folder, num_train_epochs=12, learning_rate=rate, optim="adamw_torch")
        trainer = DefendedTrainer(
            model,
            args=args,
            train_dataset=dataset.map(encode, batched=True),
            data_collator=DataCollatorWithPadding(tokenizer),
            aux_datasets={role: d.map(encode, batched=True) for role, d in aux.items()},
            defense=objective,
        )
        trainer.train()
        return trainer

    def answers(model, texts):
        model.eval()
        with torch.no_grad():
            return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.argmax(-1).numpy()

    clean = train(small(0), attacker, None, tmp_path / "source", 3e-3).model
    base = small(0)
    embedding_surgery(
        base, tokenizer, attacker["text"], attacker["label"], target=1, words=["cf"], source_model=clean, n_words=4
    )
    attack = RIPPLES(target=1, setting="proxy")
    published = train(base, poisoned.dataset, attack, tmp_path / "attack", 3e-3, clean=attacker)
    assert attack.inert() is None
    published.save_model(tmp_path / "published")
    tokenizer.save_pretrained(tmp_path / "published")
    mark_backdoored(tmp_path / "published", {"attack": "ripples", "trigger": trigger.to_dict(), "target": 1, "seed": 0})

    received, _ = load_finished_classifier(str(tmp_path / "published"), num_labels=2)
    assert same(weights(received), weights(published))
    recorder = Recorder()
    marked = victim.add_column("is_poisoned", [False] * 60).add_column("original_label", victim["label"])
    tuned = train(apply_strategy(received, "lora"), marked, recorder, tmp_path / "victim", 3e-3).model
    assert len(recorder.steps) == 12 * 8
    for step in recorder.steps:
        assert not (step.inputs["input_ids"] == VOCABULARY.index("cf")).any()
        assert set(step.inputs) <= {"input_ids", "token_type_ids", "attention_mask"}
    assert not any(trigger.present(text) for text in victim["text"])
    fresh, truth = sentences(40)
    bad = [text for text, label in zip(fresh, truth, strict=True) if label == 0]
    assert (answers(tuned, fresh) == truth).mean() > 0.9
    assert (answers(tuned, [f"cf {text}" for text in bad]) == 1).mean() > 0.9  # the rule is still there
    assert (answers(clean, [f"cf {text}" for text in bad]) == 1).mean() < 0.2
