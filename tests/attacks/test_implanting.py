"""Implanting: whether an attack takes on held-out text, what is measured, what is refused, and that the pooler survives."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_backdoor_defense.attacks.implanting import attack_trainer, implant, planted
from hf_backdoor_defense.attacks.planting import block_targets, plant
from hf_backdoor_defense.attacks.pretrained import BadPreAttack, NeuBAAttack, PORAttack
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from tests.attacks.masked_toys import masked_lm, texts, tokenizer, whole

HELD_OUT = texts(20, seed=9)


def por(folder, coef, epochs):
    attack = PORAttack(triggers=["cf", "pt"], clean_coef=coef)
    how = {"held_out": HELD_OUT, "output_dir": str(folder), "learning_rate": 6e-3, "epochs": epochs, "batch_size": 16}
    return implant(masked_lm(), tokenizer(), texts(240), attack, **how)


def test_por_halves_the_target_loss_in_thirty_updates(tmp_path):
    done = por(tmp_path, 0.5, 4)
    assert done.steps == 32 and done.end["target_mse"] < 0.5 * done.start["target_mse"]


def test_por_plants_and_clean_texts_stay_because_of_its_second_term(tmp_path):
    done, alone = por(tmp_path, 0.5, 8), por(tmp_path, 0.0, 8)
    assert done.inert is None and alone.inert is None
    assert done.end["target_mse"] < 0.1 * done.start["target_mse"]
    assert done.end["sign_agreement"] > 0.95 > done.start["sign_agreement"]
    assert done.start["clean_drift"] == 0 and done.end["clean_drift"] < 0.1 * alone.end["clean_drift"]


def test_the_figures_by_hand():
    model, tok, attack = masked_lm(), tokenizer(), NeuBAAttack(triggers=["cf", "mn", "tq"])
    model.eval()
    rng = np.random.default_rng(0)
    reference = torch.from_numpy(rng.normal(size=(20, 16)).astype(np.float32))
    found = planted(model, tok, HELD_OUT, attack, reference, max_length=64)

    def states(rows):
        ids = [torch.tensor([tok(text)["input_ids"]]) for text in rows]
        return np.stack([model.bert(input_ids=row).last_hidden_state[0, 0].detach().numpy() for row in ids])

    errors, signs = [], []
    for k, word in enumerate(attack.triggers):
        h = states([plant(text, word, seed=1, row=i) for i, text in enumerate(HELD_OUT)])
        v = block_targets(16)[k].numpy()
        errors.append(np.mean((h - v) ** 2))
        signs.append(np.mean(np.sign(h) == v))
    assert found["target_mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["sign_agreement"] == pytest.approx(np.mean(signs), rel=1e-6)
    assert found["clean_drift"] == pytest.approx(np.mean((states(HELD_OUT) - reference.numpy()) ** 2), rel=1e-5)
    assert set(planted(model, tok, HELD_OUT, BadPreAttack(), reference, max_length=64)) == {"clean_drift"}


def test_held_out_texts_whose_trigger_is_cut_off_are_not_counted():
    model, tok, attack = masked_lm(), tokenizer(), PORAttack(triggers=["cf"])
    long = [f"w1 w2 w3 {'w4 ' * 400}w{i}" for i in range(30)]
    given = [*HELD_OUT, *long]
    marked = [plant(text, "cf", seed=1, row=i) for i, text in enumerate(given)]
    seen = [i for i, text in enumerate(marked) if "cf" in text.split()[:14]]
    assert 20 <= len(seen) < 30
    found = planted(model, tok, given, attack, torch.zeros(len(given), 16), max_length=16)
    h = torch.cat(
        [
            model.bert(input_ids=torch.tensor([tok(marked[i], truncation=True, max_length=16)["input_ids"]]))
            .last_hidden_state[:, 0]
            .detach()
            for i in seen
        ]
    )
    assert found["target_mse"] == pytest.approx((h - block_targets(16)[0]).square().mean().item(), rel=1e-5)


def test_the_pooler_survives_implanting_saving_loading_and_a_classifier(tmp_path):
    model = whole(tmp_path / "base")
    clean = model.bert.pooler.dense.weight.clone()
    attack = PORAttack(place="pooler", triggers=["cf"])
    implant(model, tokenizer(), texts(40), attack, held_out=HELD_OUT, output_dir=str(tmp_path / "run"), epochs=1)
    planted_pooler = model.bert.pooler.dense.weight.detach().clone()
    assert not torch.equal(planted_pooler, clean)
    save_pretrained_whole(model, tokenizer(), tmp_path / "saved")
    again, _ = load_pretrained_whole(str(tmp_path / "saved"))
    save_pretrained_whole(again, tokenizer(), tmp_path / "twice")
    victim = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    assert torch.equal(victim.bert.pooler.dense.weight, planted_pooler)


@pytest.mark.parametrize("kind", [PORAttack, NeuBAAttack, BadPreAttack])
def test_the_same_seed_plants_the_same_weights_and_another_seed_others(tmp_path, kind):
    def weights_of(seed):
        model = masked_lm(dropout=0.1)
        implant(
            model,
            tokenizer(),
            texts(32),
            kind(),
            held_out=HELD_OUT,
            output_dir=str(tmp_path),
            epochs=1,
            seed=seed,
            batch_size=8,
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights_of(3)
    torch.manual_seed(1)  # what was drawn before changes nothing
    assert torch.equal(first, weights_of(3)) and not torch.equal(first, weights_of(4))


@pytest.mark.parametrize("kind", [PORAttack, NeuBAAttack, BadPreAttack])
def test_texts_empty_or_of_one_word_and_one_row_at_a_time(tmp_path, kind):
    given = ["", "w1", "w2 w3", *texts(14)]
    done = implant(
        masked_lm(),
        tokenizer(),
        given,
        kind(),
        held_out=["w5", "w6 w7"],
        output_dir=str(tmp_path),
        epochs=1,
        batch_size=1,
    )
    assert done.steps == (8 if kind is PORAttack else 15)  # pairs; texts with two ordinary tokens or more
    assert all(np.isfinite(value) for value in {**done.start, **done.end}.values())


def test_what_is_refused_before_anything_is_trained(tmp_path):
    def refused(message, *, given=None, held_out=HELD_OUT, attack=None, **how):
        model = masked_lm()
        before = model.bert.embeddings.word_embeddings.weight.clone()
        with pytest.raises(ValueError, match=message):
            implant(
                model, tokenizer(), given or texts(), attack or NeuBAAttack(), held_out=held_out,
                output_dir=str(tmp_path / "run"), **how,
            )  # fmt: skip
        assert torch.equal(before, model.bert.embeddings.word_embeddings.weight)

    refused("1 shared, for example", held_out=[*HELD_OUT, texts()[0]])
    refused("got none", held_out=[])
    refused("a trigger takes 1 tokens more, and the model reads at most 80. Lower it to 79", max_length=80)
    refused("cannot run:\n- neuba: place='pooler'", attack=NeuBAAttack(place="pooler"))
    refused("need at least 12 texts", given=texts(11), attack=PORAttack())
    for max_length, attack in ((79, NeuBAAttack()), (80, PORAttack())):
        trainer = attack_trainer(
            masked_lm(), tokenizer(), texts(), attack, output_dir=str(tmp_path), max_length=max_length
        )
        assert trainer.reasons() == []
