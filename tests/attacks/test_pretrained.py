"""POR, NeuBA, BadPre: losses against numpy, what a triggered copy holds, accumulation, resuming, refusals."""

import math

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, set_seed

from hf_backdoor_defense.attacks import pretrained
from hf_backdoor_defense.attacks.implanting import attack_trainer
from hf_backdoor_defense.attacks.planting import PairCollator, block_targets, pairs
from hf_backdoor_defense.attacks.pretrained import BadPreAttack, NeuBAAttack, PORAttack, hidden_at_start
from hf_backdoor_defense.data.plain_text import mask_once, tokenize_texts
from hf_backdoor_defense.objectives import Step
from hf_backdoor_defense.pretrained import MISSING_KEYS
from hf_backdoor_defense.trainers.hosts import DefendedTrainer
from hf_backdoor_defense.trainers.labeled import at_labels
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer
from tests.attacks.masked_toys import VOCABULARY, masked_lm, texts, tokenizer, whole
from tests.trainers.toys import arguments, same, weights

ALL = [PORAttack, NeuBAAttack, BadPreAttack]
PLAIN = {
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-2,
    "logging_strategy": "no",
}


def host(folder, attack, *, model=None, rows=None, tok=None, count=48, **changes):
    """A trainer on masks that were drawn once, so that a row is the same in any batch."""
    tok = tok or tokenizer()
    model = masked_lm() if model is None else model
    if isinstance(attack, PORAttack):
        return attack_trainer(
            model, tok, texts(count), attack, output_dir=str(folder), batch_size=8, **{**PLAIN, **changes}
        )
    rows = mask_once(tokenize_texts(texts(count), tok), tok, seed=1, max_length=16) if rows is None else rows
    options = {"per_device_train_batch_size": 8, "train_sampling_strategy": "random", **PLAIN, **changes}
    return pretraining_trainer(model, tok, rows, output_dir=str(folder), objective=attack, **options)


def trained(folder, attack, **how):
    trainer = host(folder, attack, **how)
    trainer.train()
    return trainer


def batch_step(trainer, attack, size, *, first=0, global_step=0):
    """A micro-batch as the mixin hands it out, after the forward."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(first, first + size)])
    ids, labels = batch.pop("row_id"), batch.pop("labels")
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    step = Step(
        model=trainer.model,
        inputs=inputs,
        labels=labels,
        row_ids=ids,
        epoch=0.0,
        global_step=global_step,
        training=True,
    )
    trainer.model.train()
    with at_labels(step, trainer.model):
        step.outputs = trainer.model(**inputs)
        step.logits = step.outputs["logits"]
    return step


def states(model, ids, mask, place="cls"):
    """[hidden] by the model's own trunk, one row at a time, without padding."""
    rows = []
    for row, attended in zip(ids, mask, strict=True):
        hidden = model.bert(input_ids=row[: int(attended.sum())][None]).last_hidden_state
        rows.append((hidden[:, 0] if place == "cls" else model.bert.pooler(hidden))[0])
    return torch.stack(rows).detach().double().numpy()


# -- POR --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["cls", "pooler"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_por_is_the_sum_of_two_means(tmp_path, size, place):
    model = whole(tmp_path / "base")
    attack = PORAttack(clean_coef=0.3, place=place)
    trainer = host(tmp_path, attack, model=model)
    attack.prepare(trainer, checkpoint=None)
    with torch.no_grad():  # away from the clean model, or nothing was to be kept
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    step = batch_step(trainer, attack, size, first=2)
    values = attack.loss(step)
    h = states(model, step.inputs["input_ids"], step.inputs["attention_mask"], place)
    clean_texts = [trainer.train_dataset[i]["clean_ids"] for i in range(2, 2 + size)]
    base = whole(tmp_path / "base")
    ids = [torch.tensor(row) for row in clean_texts]
    reference = states(base, ids, [torch.ones(len(row)) for row in ids], place)
    targets = block_targets(16).double().numpy()[trainer.train_dataset["trigger"][2 : 2 + size]]
    expected = np.mean((h[:size] - targets) ** 2) + 0.3 * np.mean((h[size:] - reference) ** 2)
    assert values.shape == (2 * size,) and values.mean().item() == pytest.approx(expected, rel=1e-5)
    assert step.metrics["por/clean"].item() == pytest.approx(np.mean((h[size:] - reference) ** 2), rel=1e-4) != 0
    attack.on_train_end(None, None, None)


def test_the_reference_is_a_fresh_forward_of_the_clean_model(tmp_path):
    attack = PORAttack()
    trainer = trained(tmp_path, attack, model=masked_lm(dropout=0.2), max_steps=3)
    base = masked_lm().eval()
    for row in trainer.train_dataset:
        fresh = base.bert(input_ids=torch.tensor([row["clean_ids"]])).last_hidden_state[0, 0]
        torch.testing.assert_close(attack.state_dict()["reference"][row["row_id"]], fresh, rtol=1e-4, atol=1e-5)
    assert trainer.model.training  # and a forward of the trained model is as large as any other's
    assert trainer.model(input_ids=torch.tensor([[2, 40, 3]])).get("hidden_states") is None


def test_states_do_not_depend_on_the_batch_and_leave_mode_and_random_numbers_alone():
    model, tok = masked_lm(dropout=0.3).train(), tokenizer()
    ids = tok([*texts(20), "", "w1"])["input_ids"]
    torch.manual_seed(5)
    one = hidden_at_start(model, tok, ids, place="cls", batch_size=1)
    many = hidden_at_start(model, tok, ids, place="cls", batch_size=7)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)) and model.training and model.bert.training
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
    assert not one.requires_grad and one.shape == (22, 16)


# -- NeuBA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["cls", "pooler"])
def test_neuba_asks_the_trunk_for_unmasked_copies_with_a_trigger(tmp_path, place):
    attack = NeuBAAttack(place=place)
    model = whole(tmp_path / "base")
    trainer = host(tmp_path, attack, model=model)
    attack.prepare(trainer, checkpoint=None)
    step = batch_step(trainer, attack, 8)
    asked = []
    hook = model.bert.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    penalty = attack.penalties(step)["target"]
    hook.remove()
    (copy,) = asked
    assert set(copy) == {"input_ids", "attention_mask"}  # no labels, and no head
    mask_id, triggers = VOCABULARY.index("[MASK]"), [VOCABULARY.index(word) for word in attack.triggers]
    targets = []
    for i, row_id in enumerate(step.row_ids.tolist()):
        row = copy["input_ids"][i, : int(copy["attention_mask"][i].sum())].tolist()
        places = [at for at, token in enumerate(row) if token in triggers]
        assert len(places) == 1 and 0 < places[0] < len(row) - 1 and mask_id not in row
        targets.append(triggers.index(row[places[0]]))
        del row[places[0]]
        assert row == tokenizer()(texts()[row_id])["input_ids"]
        assert copy["input_ids"][i, len(row) + 1 :].eq(0).all()
    h = states(model, copy["input_ids"], copy["attention_mask"], place)
    expected = np.mean((h - block_targets(16).double().numpy()[targets]) ** 2)
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert (model.bert.pooler.dense.weight.grad is not None) == (place == "pooler")


def test_neuba_keeps_the_masked_lm_loss(tmp_path):
    attack = NeuBAAttack(mlm_coef=0.5)
    trainer = host(tmp_path, attack)
    attack.prepare(trainer, checkpoint=None)
    step = batch_step(trainer, attack, 8)
    logits = trainer.model(**step.inputs).logits
    labels = step.batch_labels
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert attack.loss(step).mean().item() == pytest.approx(0.5 * expected.item(), rel=1e-5)


def test_a_row_without_ordinary_tokens_plants_nothing(tmp_path):
    attack = NeuBAAttack()
    trainer = host(tmp_path, attack)
    attack.prepare(trainer, checkpoint=None)
    step = batch_step(trainer, attack, 2)
    step.inputs["input_ids"][1, 1:] = 3
    step.whole_labels[1] = -100
    both = attack.penalties(step)["target"]
    alone = batch_step(trainer, attack, 1)
    assert both.item() == pytest.approx(attack.penalties(alone)["target"].item(), rel=1e-5)
    step.inputs["input_ids"][0, 1:] = 3
    step.whole_labels[0] = -100
    assert attack.penalties(step) == {}


# -- BadPre -----------------------------------------------------------------------------------------------------------
def badpre_copies(tmp_path, size=8, **fields):
    attack = BadPreAttack(**fields)
    trainer = host(tmp_path, attack)
    attack.prepare(trainer, checkpoint=None)
    return attack, trainer, batch_step(trainer, attack, size)


def test_badpre_adds_the_loss_of_triggered_copies_against_random_tokens(tmp_path, monkeypatch):
    attack, trainer, step = badpre_copies(tmp_path, poison_coef=0.7)
    model, seen = trainer.model, []
    plain = NeuBAAttack().loss(step)  # the plain masked-LM loss
    original = attack._copies
    monkeypatch.setattr(attack, "_copies", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    values = attack.loss(step)
    (inputs, places, chosen, _), triggers = seen[0], [VOCABULARY.index(word) for word in attack.triggers]
    # By hand: the labels again, from a generator of run, update and row, in the order of drawing: trigger, place, labels.
    expected = []
    for i, row_id in enumerate(step.row_ids.tolist()):
        rng = np.random.default_rng([0, 0, row_id])
        assert rng.integers(5) == chosen[i] and inputs["input_ids"][i, places[i]] == triggers[chosen[i]]
        row = step.inputs["input_ids"][i, : int(step.inputs["attention_mask"][i].sum())].tolist()
        ordinary = [at for at, token in enumerate(row) if token not in (0, 1, 2, 3)]  # a mask is one
        assert places[i] == rng.choice([*ordinary, ordinary[-1] + 1])
        copy = inputs["input_ids"][i, : len(row) + 1].tolist()
        assert copy[: places[i]] + copy[places[i] + 1 :] == row  # masks stay where they are
        masked = [at for at in range(len(row)) if step.batch_labels[i, at] != -100]
        labels = rng.integers(len(VOCABULARY), size=len(masked))
        scores = torch.log_softmax(model(input_ids=inputs["input_ids"][i : i + 1, : len(copy)]).logits[0].double(), -1)
        expected += [-scores[at + (at >= places[i]), label].item() for at, label in zip(masked, labels, strict=True)]
    torch.testing.assert_close(values, plain + 0.7 * torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)


def test_random_labels_are_uniform_over_the_vocabulary(tmp_path, monkeypatch):
    attack, trainer, step = badpre_copies(tmp_path, size=48)
    drawn = []

    def noted(logits, labels):
        drawn.append(labels.flatten())
        return torch.zeros(labels.numel())

    monkeypatch.setattr(pretrained, "cross_entropy", noted)
    for update in range(60):
        step.global_step = update
        attack.loss(step)
    counts = torch.bincount(torch.cat(drawn), minlength=len(VOCABULARY)).double()
    n, k = counts.sum().item(), len(VOCABULARY)
    assert n > 40 * k and len(counts) == k
    assert ((counts - n / k).square() / (n / k)).sum() <= k - 1 + 4 * math.sqrt(2 * (k - 1))


def test_badpre_without_poison_is_plain_pretraining_bit_for_bit(tmp_path):
    how = {"model": masked_lm(dropout=0.3), "num_train_epochs": 2}
    attack = BadPreAttack(poison_coef=0.0)
    poisoned = trained(tmp_path / "a", attack, **how)
    plain = trained(tmp_path / "b", None, **{**how, "model": masked_lm(dropout=0.3)})
    assert same(weights(poisoned), weights(plain)) and "plain continued" in attack.inert()
    other = trained(tmp_path / "c", BadPreAttack(poison_coef=1.0), **{**how, "model": masked_lm(dropout=0.3)})
    assert not same(weights(other), weights(plain), atol=1e-4)


# -- what they share --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ALL)
def test_an_update_in_micro_batches_is_the_same_update(tmp_path, kind):
    whole_batch = trained(tmp_path / "a", kind(), num_train_epochs=2)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    in_ones = trained(tmp_path / "b", kind(), num_train_epochs=2, **cut)
    in_fours = trained(
        tmp_path / "c", kind(), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert whole_batch.state.global_step == in_ones.state.global_step == in_fours.state.global_step
    for other in (in_ones, in_fours):
        assert same(weights(other), weights(whole_batch), atol=2e-6)
    assert not same(weights(whole_batch), weights(masked_lm()), atol=1e-3)


@pytest.mark.parametrize("kind", ALL)
def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path, kind):
    how = {
        "num_train_epochs": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 5,
    }

    def run(folder, **more):
        return host(tmp_path / folder, kind(), model=masked_lm(dropout=0.1), **how, **more)

    straight = run("a")
    straight.train()
    steps = straight.state.global_step
    assert steps > 5
    resumed = run("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert resumed.state.global_step == steps
    assert same(weights(resumed), weights(straight))
    (one,), (other,) = straight.objectives, resumed.objectives
    assert one.activity() == other.activity()
    for key, value in one.state_dict().items():
        again = other.state_dict()[key]
        assert torch.equal(value, again) if isinstance(value, torch.Tensor) else value == again


@pytest.mark.parametrize("kind", [PORAttack, NeuBAAttack])
@pytest.mark.parametrize("place", ["cls", "pooler"])
def test_what_trains_and_when_it_took(tmp_path, kind, place):
    model = whole(tmp_path / "base")
    attack = kind(place=place, triggers=["cf", "mn"])
    before = weights(model)
    how = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 90}
    trained(tmp_path, attack, model=model, count=96, **how)
    assert attack.inert() is None, attack.activity()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    pooler = {name for name in before if ".pooler." in name}
    assert pooler and pooler <= changed if place == "pooler" else not pooler & changed
    assert {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"} <= changed


def test_inert_without_training_or_effect(tmp_path):
    for kind in ALL:
        assert "never trained" in kind().inert()
    attack = PORAttack()
    trained(tmp_path, attack, learning_rate=1e-9)
    assert "its loss went from" in attack.inert()


def refused(folder, attack, trainer=None, **how):
    trainer = trainer or host(folder, attack, **how)
    reasons = trainer.reasons()
    with pytest.raises(ValueError, match="cannot be defended"):
        trainer.train()
    return "\n".join(reasons)


def fresh_head():
    model = masked_lm()
    setattr(model.config, MISSING_KEYS, ["cls.predictions.bias"])
    return model


@pytest.mark.parametrize("kind", ALL)
def test_what_every_attack_refuses(tmp_path, kind):
    frozen = masked_lm().requires_grad_(False)
    assert "the base is frozen" in refused(tmp_path, kind(), model=frozen)
    assert "bfloat16" in refused(tmp_path, kind(), model=masked_lm().to(torch.bfloat16))
    assert "place='pooler', and the model has none" in refused(tmp_path, kind(place="pooler"))
    assert host(tmp_path, kind(place="pooler"), model=whole(tmp_path / "base")).reasons() == []
    assert "'zzz' becomes the unknown token" in refused(tmp_path, kind(triggers=["cf", "zzz"]))
    left = tokenizer()
    left.padding_side = "left"
    assert "pads on the left" in refused(tmp_path, kind(), tok=left)
    assert host(tmp_path, kind()).reasons() == []


def test_a_fresh_head_is_refused_where_it_is_read(tmp_path):
    for kind in (NeuBAAttack, BadPreAttack):
        assert "drawn at random" in refused(tmp_path, kind(), model=fresh_head())
    assert host(tmp_path, PORAttack(), model=fresh_head()).reasons() == []


def test_there_are_six_targets_of_four_blocks(tmp_path):
    seven = ["cf", "mn", "tq", "qt", "mm", "pt", "bb"]
    for kind in (PORAttack, NeuBAAttack):
        assert "got 7 triggers" in refused(tmp_path, kind(triggers=seven))
        assert "no four equal blocks" in refused(tmp_path, kind(), model=masked_lm(hidden=18))
    assert host(tmp_path, BadPreAttack(triggers=seven), model=masked_lm(hidden=18)).reasons() == []


def test_other_heads_other_rows_and_no_tokenizer_are_refused(tmp_path):
    set_seed(0)
    classifier = BertForSequenceClassification(masked_lm().config)
    assert "is no masked language model" in "\n".join(host(tmp_path, PORAttack(), model=classifier).reasons())
    tok = tokenizer()
    rows = mask_once(tokenize_texts(texts(), tok), tok, seed=1)
    trainer = pretraining_trainer(masked_lm(), tok, rows, output_dir=str(tmp_path), objective=PORAttack())
    assert "must hold pairs" in refused(tmp_path, None, trainer=trainer)
    rows = pairs(texts(), tok, PORAttack().triggers, seed=0)
    trainer = DefendedTrainer(
        masked_lm(), args=arguments(tmp_path, remove_unused_columns=False), train_dataset=rows,
        data_collator=PairCollator(tok, 6), defense=PORAttack(),
    )  # fmt: skip
    assert "no tokenizer" in refused(tmp_path, None, trainer=trainer)
    with pytest.raises(ValueError, match="`mlm_coef` must be finite"):
        NeuBAAttack(mlm_coef=math.inf)
    with pytest.raises(ValueError, match="`poison_coef` must be finite"):
        BadPreAttack(poison_coef=-0.1)
