"""STRIP: exact entropies of known victims, mixtures against the rule in words, and independence of neighbors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_backdoor_defense.input_filters.strip import STRIP, top_words
from tests.input_filters.models import VOCABULARY, classifier, sentences, tokenizer  # noqa: F401

POOL = ["b1 b2 b3", "c1 c2 c2 c3 c4", "d1", ""]


class Answers(nn.Module):
    """Class probabilities by how many words of `letter` a text has."""

    def __init__(self, by_count, letter="a"):
        super().__init__()
        self.register_parameter("anything", nn.Parameter(torch.zeros(1)))
        self.by_count = torch.tensor(by_count)
        self.ids = torch.tensor([i for i, word in enumerate(VOCABULARY) if word[0] == letter and len(word) == 2])

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        count = torch.isin(input_ids, self.ids).sum(1).clamp(max=len(self.by_count) - 1)
        return {"logits": self.by_count[count].log()}


@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.25, 0.25, 0.25, 0.25], [0.9, 0.1], [1.0, 0.0, 0.0]])
def test_a_constant_victim_gives_its_exact_entropy(tokenizer, probabilities):  # noqa: F811
    strip = STRIP(Answers([probabilities]), tokenizer, clean_texts=POOL, copies=3)
    expected = -sum(p * math.log2(p) for p in probabilities if p)
    assert np.allclose(strip.score(["a1 a2 a3 a4", "b1", ""]), expected, atol=1e-6)


def test_the_mean_is_over_the_copies_of_one_text(tokenizer):  # noqa: F811
    # No `a` is certain, any `a` is one bit: a text of `a` words differs from one of `b` words, mixed or not.
    strip = STRIP(Answers([[1.0, 0.0], [0.5, 0.5]]), tokenizer, clean_texts=POOL, copies=7)
    texts = ["a1 a2 a3 a4", "b1 b2 b3 b4 b5", "a1 a1", "d1", "a1", ""]
    assert strip.score(texts).tolist() == [1, 0, 1, 0, 1, 0]


def test_scores_equal_a_loop_in_numpy(tokenizer):  # noqa: F811
    model, texts = classifier(), sentences(12)
    strip = STRIP(model, tokenizer, clean_texts=POOL, copies=4)
    for text, score in zip(texts, strip.score(texts), strict=True):
        entropies = []
        for copy in strip.mixtures(text):
            ids = torch.tensor([tokenizer(copy)["input_ids"]])
            with torch.no_grad():
                z = model(input_ids=ids).logits[0].double().numpy()
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            entropies.append(sum(-q * math.log2(q) for q in p if q > 0))
        assert np.isclose(score, np.mean(entropies), atol=1e-5)


def test_top_words_follow_the_formula_of_tf_idf():
    texts = ["c1 c2 c2 c3 c4", "c4 b1 c4 c1", "b1 b2"]
    for text, ranked in zip(texts, top_words(texts), strict=True):
        words = text.split()
        idf = {word: math.log((1 + 3) / (1 + sum(word in t.split() for t in texts))) + 1 for word in words}
        assert ranked == sorted(set(words), key=lambda word: (-words.count(word) * idf[word], word))


def test_mixtures_overwrite_half_of_the_positions_at_most_with_the_top_words_of_one_text():
    strip = STRIP(None, None, clean_texts=POOL, copies=200)
    text = "x0 x1 x2 x3 x4 x5 x6"
    donors = {tuple(words[:3]) for words in top_words(POOL[:3])}
    counts, used = [], set()
    for copy in strip.mixtures(text):
        changed = [(i, word) for i, word in enumerate(copy.split()) if word != f"x{i}"]
        assert len(copy.split()) == 7 and 1 <= len(changed) <= 3
        fitting = {donor for donor in donors if {word for _, word in changed} <= set(donor)}
        assert len(fitting) == 1  # the pool's texts share no word
        used |= fitting
        counts += [i for i, _ in changed]
    assert used == donors and set(counts) == set(range(7))


def test_later_draws_overwrite_earlier_ones():
    strip = STRIP(None, None, clean_texts=["b1 b2"], copies=50, swap=1.0)
    copies = {copy for copy in strip.mixtures("x y")}
    # Both words on one place leave the second of them.
    assert copies == {"b1 b2", "b2 b1", "b2 y", "x b2"}


def test_a_text_scores_the_same_alone_in_any_order_and_batch(tokenizer):  # noqa: F811
    model, texts = classifier(), sentences(20)
    strip = STRIP(model, tokenizer, clean_texts=POOL, copies=5)
    scores = strip.score(texts)
    small = STRIP(model, tokenizer, clean_texts=POOL, copies=5, batch_size=3)
    assert np.allclose(scores, small.score(texts), atol=1e-5)
    assert np.allclose(scores, strip.score(texts[::-1])[::-1], atol=1e-5)
    assert np.allclose(scores, [strip.score([text])[0] for text in texts], atol=1e-5)
    assert strip.mixtures("a1 a2 a3 a4") != STRIP(None, None, clean_texts=POOL, copies=5, seed=1).mixtures(
        "a1 a2 a3 a4"
    )


def test_low_entropy_is_flagged(tokenizer):  # noqa: F811
    strip = STRIP(Answers([[1.0, 0.0], [0.5, 0.5]]), tokenizer, clean_texts=POOL, copies=2)
    strip.calibrate(["a1 a2", "a3"] * 10, target_frr=0.1)
    assert strip.flag(["b1 b2", "a1 a2"]).tolist() == [True, False] and strip.passes == 2


def test_bad_input_is_named():
    for options, words in (
        ({"copies": 0}, "copies"),
        ({"swap": 0.0}, "swap"),
        ({"swap": 1.5}, "swap"),
        ({"clean_texts": ["", " "]}, "2 texts without any"),
        ({"max_length": 1}, "max_length"),
    ):
        with pytest.raises(ValueError, match=words):
            STRIP(None, None, **{"clean_texts": POOL, **options})


def test_saved_and_loaded_with_the_same_weights_only(tokenizer, tmp_path):  # noqa: F811
    model, texts = classifier(), sentences(30, seed=1)
    strip = STRIP(model, tokenizer, clean_texts=POOL, copies=2, swap=0.3, seed=4, max_length=20)
    strip.calibrate(texts, target_frr=0.1)
    strip.save(tmp_path)
    again = STRIP.from_pretrained(tmp_path, model, tokenizer)
    assert again.to_dict() == strip.to_dict()
    assert np.array_equal(again.score(texts), strip.score(texts)) and (again.flag(texts) == strip.flag(texts)).all()
    with pytest.raises(ValueError, match="other weights"):
        STRIP.from_pretrained(tmp_path, classifier(seed=1), tokenizer)
