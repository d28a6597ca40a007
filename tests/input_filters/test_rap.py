"""RAP: its gradient against finite differences, the victim untouched, and the drop against swapping the row by hand."""

import logging

import numpy as np
import pytest
import torch

from hf_backdoor_defense.adapters import apply_strategy
from hf_backdoor_defense.input_filters.rap import RAP, hinges, rare_word
from tests.input_filters.models import PLAIN, RARE, VOCABULARY, classifier, sentences, tokenizer  # noqa: F811, F401
from tests.trainers.toys import same, weights

TEXTS = sentences(36)
LABELS = [i % 3 for i in range(36)]


def rap(model, tokenizer, **options):  # noqa: F811
    return RAP(model, tokenizer, **{"clean_texts": TEXTS, "clean_labels": LABELS, "epochs": 2, **options})


def test_hinges_equal_a_loop():
    change = np.array([-0.9, -0.31, -0.3, -0.2, -0.1, -0.05, 0.4])
    loop = sum(2.5 * max(0, d + 0.1) + max(0, -0.3 - d) for d in change) / len(change)
    assert np.isclose(hinges(torch.tensor(change), lam=2.5).item(), loop)


def test_gradient_of_the_hinges_equals_finite_differences(tokenizer):  # noqa: F811
    model = classifier().double()
    ours = rap(model, tokenizer)
    texts, t, lam = TEXTS[:18], 1, 1.7
    base = ours.logits(texts).double().softmax(-1)[:, t]
    row = 3 * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = tokenizer([f"{ours.word} {text}" for text in texts], padding=True, return_tensors="pt")

    def loss(vector):  # the row written into the table of a copy, no hook
        table = model.get_input_embeddings().weight
        kept = table[ours.word_id].clone()
        with torch.no_grad():
            table[ours.word_id] = vector
            d = model(**batch).logits.softmax(-1)[:, t].numpy() - base.numpy()
            table[ours.word_id] = kept
        assert (d > -0.1).any() and (d < -0.3).any()  # both hinges act
        return lam * np.maximum(0, d + 0.1).mean() + np.maximum(0, -0.3 - d).mean()

    gradient = ours._gradient(row, t, texts, base, lam)
    step = 1e-6
    for i in range(16):
        e = torch.zeros(16, dtype=torch.float64)
        e[i] = step
        difference = (loss(row + e) - loss(row - e)) / (2 * step)
        assert np.isclose(gradient[i].item(), difference, rtol=1e-5, atol=1e-8)


def test_the_victim_is_bitwise_unchanged_and_every_row_keeps_its_norm(tokenizer):  # noqa: F811
    model = classifier().train()
    before = weights(model)
    ours = rap(model, tokenizer, rate=1.0)
    ours.score(TEXTS)
    assert same(before, weights(model))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules()) and not model.get_input_embeddings()._forward_hooks
    old = model.get_input_embeddings().weight[ours.word_id].detach()
    assert torch.allclose(ours.rows.norm(dim=1), old.norm().expand(3), rtol=1e-6)
    assert all((row - old).norm() > 1e-3 for row in ours.rows)


def test_the_drop_equals_writing_the_row_of_the_predicted_class_into_the_table(tokenizer):  # noqa: F811
    model = classifier()
    ours = rap(model, tokenizer, rate=1.0, word="qx")
    table = model.get_input_embeddings().weight
    seen = set()
    # A text that holds the word itself keeps the victim's row for it: only the one in front moves.
    texts = [text for text in TEXTS if "qx" not in text]
    for text, score in zip(texts, ours.score(texts), strict=True):
        with torch.no_grad():
            p = model(**tokenizer(text, return_tensors="pt")).logits[0].double().softmax(-1)
            t = int(p.argmax())
            kept = table[ours.word_id].clone()
            table[ours.word_id] = ours.rows[t]
            pushed = model(**tokenizer(f"qx {text}", return_tensors="pt")).logits[0].double().softmax(-1)
            table[ours.word_id] = kept
        assert np.isclose(score, float(p[t] - pushed[t]), atol=1e-5)
        seen.add(t)
    assert len(seen) > 1


def test_only_the_word_in_front_moves(tokenizer):  # noqa: F811
    model = classifier()
    ours = rap(model, tokenizer, word="qx")
    far = 5 * torch.ones(16)
    outputs = []
    with ours._in_place_of_word(far):
        handle = model.get_input_embeddings().register_forward_hook(lambda module, ids, out: outputs.append(out))
        model(**tokenizer(["qx a1 qx", "qx b1"], padding=True, return_tensors="pt"))
        handle.remove()
    changed = (outputs[0] == far).all(-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 1]]


def test_construction_lowers_the_hinges_and_seeds_repeat(tokenizer):  # noqa: F811
    model = classifier()
    start = rap(model, tokenizer, rate=1e-9, epochs=1, word="qx", lam=4.0)
    moved = rap(model, tokenizer, rate=1.0, epochs=10, word="qx", lam=4.0)
    probabilities = moved.logits(TEXTS).double().softmax(-1)

    def total(ours):
        loss = 0.0
        for t in range(3):
            own = [i for i in range(36) if LABELS[i] == t]
            change = ours._pushed([TEXTS[i] for i in own], ours.rows[t])[:, t] - probabilities[own, t]
            loss += hinges(change, lam=4.0).item()
        return loss

    assert total(moved) < 0.8 * total(start)
    again = rap(model, tokenizer, rate=1.0, epochs=10, word="qx", lam=4.0)
    assert torch.equal(moved.rows, again.rows)


def test_lam_is_doubled_until_the_quantile_is_positive_and_then_said(tokenizer, caplog):  # noqa: F811
    class Stubborn(RAP):  # `needed`: from this lam on the clean probabilities fall
        needed = 4.0

        def _descend(self, t, texts, base, lam):
            self.last = lam
            return torch.zeros(16)

        def _pushed(self, texts, row):
            p = self.logits(texts).double().softmax(-1)
            return p - (0.2 if self.last >= self.needed else -0.2)

    with caplog.at_level(logging.WARNING):
        found = Stubborn(classifier(), tokenizer, clean_texts=TEXTS, clean_labels=LABELS)
    assert found.lams == [4.0] * 3 and not caplog.records
    Stubborn.needed = 1e9
    with caplog.at_level(logging.WARNING):
        assert Stubborn(classifier(), tokenizer, clean_texts=TEXTS, clean_labels=LABELS).lams == [16.0] * 3
    assert len(caplog.records) == 3 and "expect little of it" in caplog.text


def test_a_threshold_below_zero_is_said(tokenizer, caplog):  # noqa: F811
    ours = rap(classifier(), tokenizer, rate=1e-9)
    ours.score = lambda texts: np.linspace(-0.1, 1, len(texts))
    with caplog.at_level(logging.WARNING):
        assert ours.calibrate(TEXTS, target_frr=0.1).lower < 0
    assert "threshold is -0." in caplog.text
    assert ours.flags([-0.5, 0.5]).tolist() == [True, False] and ours.passes == 1


def test_a_text_scores_the_same_alone_in_any_order_and_batch(tokenizer):  # noqa: F811
    ours = rap(classifier(), tokenizer, rate=1.0)
    scores = ours.score(TEXTS)
    assert scores.dtype == np.float64 and np.abs(scores).max() <= 1
    assert np.allclose(scores, ours.score(TEXTS[::-1])[::-1], atol=1e-5)
    assert np.allclose(scores, [ours.score([text])[0] for text in TEXTS], atol=1e-5)
    ours.batch_size = 5
    assert np.allclose(scores, ours.score(TEXTS), atol=1e-5)


def test_the_word_is_short_unseen_and_drawn_by_seed(tokenizer):  # noqa: F811
    words = {rare_word(tokenizer, TEXTS, seed=seed) for seed in range(40)}
    assert words == {"cf", "mn", "qx", "zz"}
    assert rare_word(tokenizer, [*TEXTS, "CF mn qx"], seed=3) == "zz"
    assert rare_word(tokenizer, [*TEXTS, "cf mn qx zz"], seed=3) == "remarkable"
    with pytest.raises(ValueError, match="vocabulary"):
        rare_word(tokenizer, [*TEXTS, " ".join(RARE)])
    assert not any(word in PLAIN for word in words) and words < set(VOCABULARY)


def test_bad_input_is_named(tokenizer):  # noqa: F811
    model = classifier()
    for options, words in (
        ({"word": "a1 b1"}, "single known token"),
        ({"word": "nowhere"}, "single known token"),
        ({"clean_labels": [0] * 36}, "none of class 1"),
        ({"low": -0.1, "high": -0.3}, "low < high"),
        ({"clean_labels": [0]}, "36 texts and 1 labels"),
    ):
        with pytest.raises(ValueError, match=words):
            rap(model, tokenizer, **options)
    ours = rap(model, tokenizer)
    tokenizer.truncation_side = "left"
    try:
        ours.max_length = 4
        with pytest.raises(ValueError, match="cuts on the left"):
            ours.score(["a1 a2 a3 a4 a5"])
    finally:
        tokenizer.truncation_side = "right"
    assert not model.get_input_embeddings()._forward_hooks


def test_saved_and_loaded_with_the_same_weights_only(tokenizer, tmp_path):  # noqa: F811
    model = classifier()
    ours = rap(model, tokenizer, lam=2.0, rate=0.5, seed=3, max_length=20)
    ours.calibrate(TEXTS, target_frr=0.1)
    ours.save(tmp_path)
    again = RAP.from_pretrained(tmp_path, model, tokenizer)
    assert again.to_dict() == ours.to_dict() and torch.equal(again.rows, ours.rows)
    assert np.array_equal(again.score(TEXTS), ours.score(TEXTS))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(ValueError, match="other weights"):
        RAP.from_pretrained(tmp_path, classifier(seed=1), tokenizer)


@pytest.mark.parametrize("strategy", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_victim_with_an_adapter_is_pushed_too(tokenizer, strategy):  # noqa: F811
    model = apply_strategy(classifier(), strategy)
    before = weights(model)
    ours = rap(model, tokenizer, rate=1.0, epochs=1, max_length=14)
    assert np.isfinite(ours.score(TEXTS)).all() and same(before, weights(model))
    start = model.get_input_embeddings().weight[ours.word_id].detach()
    # Not all: a random prompt leaves a class at a probability of 1e-4, where there is no gradient.
    assert any((row - start).norm() > 1e-2 for row in ours.rows)
