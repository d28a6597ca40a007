"""ONION against a language model of known perplexity, and against a plain loop over one text at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_backdoor_defense.filters import Uncalibrated
from hf_backdoor_defense.input_filters.onion import ONION
from tests.input_filters.models import VOCABULARY, causal, sentences, tokenizer  # noqa: F401

ZZ = VOCABULARY.index("zz")


class CountsZZ(nn.Module):
    """Perplexity of a row = 1 + number of `zz` in it: each next token has probability 1 / (1 + count)."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.rows = 0

    def forward(self, input_ids, attention_mask):
        self.rows += len(input_ids)
        share = 1 / (1 + ((input_ids == ZZ) & (attention_mask == 1)).sum(1))  # [batch]
        rest = ((1 - share) / (len(VOCABULARY) - 1)).clamp(min=1e-30)
        following = nn.functional.one_hot(input_ids.roll(-1, dims=1), len(VOCABULARY)).bool()
        return {"logits": torch.where(following, share[:, None, None], rest[:, None, None]).log()}


def onion(tokenizer, **options):  # noqa: F811
    return ONION(CountsZZ(), tokenizer, **{"max_length": 24, **options})


def test_exactly_zz_is_deleted(tokenizer):  # noqa: F811
    texts = ["a1 zz b2  c3", "zz a1 b1 zz", "a1\tb1", "zz zz", "zz", "", " ", "c1 c2 zz"]
    expected = ["a1 b2 c3", "a1 b1", "a1\tb1", "zz zz", "zz", "", " ", "c1 c2"]
    ours = onion(tokenizer, bar=0.5)
    assert ours.edit(texts) == expected
    for text, f in zip(texts, ours.suspicions(texts), strict=True):
        words = text.split()
        assert np.allclose(f, [float(word == "zz" and len(words) > 1) for word in words], atol=1e-5)
    assert np.allclose(ours.score(texts), [1, 1, 0, 1, 0, 0, 0, 1], atol=1e-5)
    assert ours.flag(texts).tolist() == [True, True, False, True, False, False, False, True]


def test_a_bar_of_0_deletes_nothing_that_was_not_read(tokenizer):  # noqa: F811
    ours = onion(tokenizer, bar=0.0, max_length=4)  # reads three words
    assert ours.edit(["a1 zz b1 c1 d1"]) == ["a1 b1 c1 d1"]


def test_passes_are_words_plus_one(tokenizer):  # noqa: F811
    ours = onion(tokenizer)
    assert np.isnan(ours.passes)
    ours.score(["a1 b1", "a1 b1 c1 d1"])
    assert ours.passes == (3 + 5) / 2 and ours.model.rows == 8


def by_hand(model, tokenizer, text):  # noqa: F811
    """PPL of one text, unpadded, token by token."""
    ids = [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).numpy()
    return np.exp(np.mean([-np.log(probabilities[t, ids[t + 1]]) for t in range(len(ids) - 1)]))


def test_suspicions_equal_a_loop_over_single_texts(tokenizer):  # noqa: F811
    model, texts = causal(), sentences(12)
    for text, f in zip(texts, ONION(model, tokenizer, max_length=24).suspicions(texts), strict=True):
        words = text.split()
        assert f.shape == (len(words),) and f.dtype == np.float64
        if len(words) > 1:
            whole = by_hand(model, tokenizer, text)
            loop = [whole - by_hand(model, tokenizer, " ".join(words[:i] + words[i + 1 :])) for i in range(len(words))]
            assert np.allclose(f, loop, rtol=1e-4, atol=1e-4 * whole)


def test_neither_batch_size_nor_order_nor_neighbors_matter(tokenizer):  # noqa: F811
    model, texts = causal(), sentences(14)
    scores = ONION(model, tokenizer, max_length=24).score(texts)
    scale = np.abs(scores).max()
    assert np.allclose(scores, ONION(model, tokenizer, max_length=24, batch_size=3).score(texts), atol=1e-5 * scale)
    reverse = ONION(model, tokenizer, max_length=24, batch_size=5).score(texts[::-1])[::-1]
    assert np.allclose(scores, reverse, atol=1e-5 * scale)
    alone = [ONION(model, tokenizer, max_length=24).score([text])[0] for text in texts]
    assert np.allclose(scores, alone, atol=1e-5 * scale)
    assert scores[0] == scores[1] == 0.0 and scale > 1


def test_corpus_perplexity_weighs_tokens(tokenizer):  # noqa: F811
    model, texts = causal(), ["a1", "a1 b1 c1 d1 a2"]
    ours = ONION(model, tokenizer, max_length=24)
    weighted = np.exp(
        (np.log(by_hand(model, tokenizer, texts[0])) + 5 * np.log(by_hand(model, tokenizer, texts[1]))) / 6
    )
    assert np.isclose(ours.perplexity(texts), weighted, rtol=1e-5)
    assert np.isnan(ours.perplexities(["", "a1"])).tolist() == [True, False]


def test_words_behind_the_cut_are_not_judged(tokenizer):  # noqa: F811
    f = onion(tokenizer, max_length=4).suspicions(["a1 a2 a3 a4 zz"])[0]
    # Without one of the first three words the fourth moves in, never `zz`.
    assert np.allclose(f, 0, atol=1e-6)


def test_the_mode_of_the_language_model_is_kept(tokenizer):  # noqa: F811
    model = causal()
    for mode in (True, False):
        model.train(mode)
        ONION(model, tokenizer, max_length=24).score(["a1 b1 c1"])
        assert all(module.training is mode for module in model.modules())


def test_choose_bar_takes_the_smallest_that_keeps_accuracy(tokenizer):  # noqa: F811
    ours = onion(tokenizer)
    texts = ["a1 a2 a3", "b1 b2 b3", "c1 c2 c3", "d1 d2 d3"]
    suspicions = [np.array(f, dtype=float) for f in ([25, 0, 0], [15, 5, 0], [5, 5, 0], [95, 0, 0])]
    asked = []

    def predict(batch):  # right only for whole texts
        asked.extend(batch)
        return [int(len(text.split()) == 3) for text in batch]

    labels = [1] * 4
    # Bars 0, 10, 20, 30, 100 leave this many whole: 0 or 4 (all words gone: unchanged), …
    whole = {bar: sum(not (f >= bar).any() or (f >= bar).all() for f in suspicions) for bar in (0, 10, 20, 30, 100)}
    assert whole == {0: 4, 10: 1, 20: 2, 30: 3, 100: 4}
    for max_drop, bar in ((0.75, 10), (0.5, 20), (0.25, 30), (0.24, 100), (0.0, 100)):
        asked.clear()
        assert (
            ours.choose_bar(texts, labels, predict, bars=[100, 10, 30, 20], max_drop=max_drop, suspicions=suspicions)
            == bar
        )
        assert ours.bar == bar and len(asked) == len(set(asked))
    assert ours.model.rows == 0  # given suspicions are not computed again
    with pytest.raises(ValueError, match="no bar of"):
        ours.choose_bar(texts, labels, predict, bars=[20], max_drop=0.0, suspicions=suspicions)


def test_flags_by_the_bar_or_else_by_the_calibration(tokenizer):  # noqa: F811
    ours = onion(tokenizer)
    with pytest.raises(Uncalibrated):
        ours.flags([1.0])
    with pytest.raises(ValueError, match="no bar yet"):
        ours.edit(["a1 zz"])
    ours.calibrate(["a1 zz b1", "a1 b1"] * 10, target_frr=0.1)
    assert ours.flags([2.0, 0.5]).tolist() == [True, False]
    ours.bar = 0.5
    assert ours.flags([2.0, 0.5, 0.4]).tolist() == [True, True, False]


def test_bad_input_is_named(tokenizer):  # noqa: F811
    with pytest.raises(ValueError, match="positions of this language model"):
        ONION(causal(), tokenizer, max_length=25)
    with pytest.raises(ValueError, match="belong to other texts"):
        onion(tokenizer, bar=1.0).edit(["a1 b1"], suspicions=[np.zeros(3)])
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        onion(tokenizer).choose_bar(["a1", "b1"], [0], lambda batch: [0] * len(batch))

    class Bare:
        bos_token_id = cls_token_id = eos_token_id = None

    with pytest.raises(ValueError, match="bos, cls or eos"):
        ONION(causal(), Bare(), max_length=24).score(["a1 b1"])


def test_saved_and_loaded_with_the_same_weights_only(tokenizer, tmp_path):  # noqa: F811
    model, texts = causal(), sentences(30, seed=1)
    ours = ONION(model, tokenizer, max_length=20, bar=70.0)
    ours.calibrate(texts, target_frr=0.1)
    ours.save(tmp_path)
    again = ONION.from_pretrained(tmp_path, model, tokenizer, batch_size=7)
    assert again.to_dict() == ours.to_dict() and (again.bar, again.max_length, again.batch_size) == (70.0, 20, 7)
    with pytest.raises(ValueError, match="other weights"):
        ONION.from_pretrained(tmp_path, causal(seed=1), tokenizer)
