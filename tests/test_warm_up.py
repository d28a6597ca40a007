"""Held-out losses against whole forwards; what a warm-up trains, says, refuses and keeps."""

import json
import math

import pytest
import torch

from hf_backdoor_defense import warm_up
from hf_backdoor_defense.data.plain_text import mask_once, tokenize_texts
from hf_backdoor_defense.pretrained import MISSING_KEYS, head_is_fresh, load_pretrained_whole
from hf_backdoor_defense.warm_up import (
    MaskedLoss,
    gate_reasons,
    held_out_loss,
    token_frequencies,
    warm_up_mlm_head,
    warmed_up,
)
from tests.trainers.text_toys import VOCABULARY, WORDS, causal_lm, masked_lm, saved_trunk, texts, tokenizer
from tests.trainers.toys import bert, weights

HELD_OUT = [text for text in dict.fromkeys(texts(80, seed=9)) if " " in text and text not in set(texts(300))]
# A word tells what its neighbors are: something that a head learns in seconds.
ECHOES = {n: [" ".join([word] * n) for word in WORDS] for n in (3, 4, 5, 6, 8, 9)}


def fresh(folder):
    return load_pretrained_whole(str(saved_trunk(folder)))


def test_a_masked_models_loss_is_that_of_whole_forwards(tmp_path):
    model, tokens = masked_lm(tmp_path, dropout=0.5).train(), tokenizer()
    rows = mask_once(tokenize_texts(HELD_OUT, tokens, max_length=12), tokens, seed=4, max_length=12)
    model.eval()
    total, right, count = 0.0, 0, 0
    for row in rows:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]])
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=mask).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != -100:
                total, count = total - scores[position, label].item(), count + 1
                right += int(scores[position].argmax() == label)
    model.train()
    state = torch.random.get_rng_state()
    for batch_size in (64, 7):
        found = held_out_loss(model, tokens, HELD_OUT, seed=4, max_length=12, batch_size=batch_size)
        assert found.loss == pytest.approx(total / count, rel=1e-5) and found.n == count
        assert found.accuracy == pytest.approx(right / count) and found.unigram is None
    assert model.training and torch.equal(torch.random.get_rng_state(), state) and not model.bert._forward_hooks


def test_a_causal_models_loss_is_its_own(tmp_path):
    model, tokens = causal_lm(tmp_path), tokenizer()
    total = count = 0.0
    for text in HELD_OUT:
        ids = torch.tensor([tokens(text)["input_ids"]])
        n = ids.shape[1] - 1
        total, count = total + model.eval()(input_ids=ids, labels=ids).loss.item() * n, count + n
    found = held_out_loss(model, tokens, HELD_OUT, batch_size=5)
    assert found.loss == pytest.approx(total / count, rel=1e-5) and found.n == count


def test_the_unigram_predictor(tmp_path):
    model, tokens = masked_lm(tmp_path), tokenizer()
    frequencies = token_frequencies(["a0 a0 a1", "b2"], tokens, len(VOCABULARY))
    counts = [1 + {"a0": 2, "a1": 1, "b2": 1}.get(word, 0) for word in VOCABULARY]
    assert frequencies.tolist() == pytest.approx([c / sum(counts) for c in counts])
    found = held_out_loss(model, tokens, ["a0 a0", "a1 a1 a1"], frequencies=frequencies, seed=0)
    rows = mask_once(tokenize_texts(["a0 a0", "a1 a1 a1"], tokens, max_length=64), tokens, seed=0, max_length=64)
    labels = [label for row in rows for label in row["labels"] if label != -100]
    expected = -sum(math.log(counts[label] / sum(counts)) for label in labels) / len(labels)
    assert found.unigram == pytest.approx(expected, rel=1e-5)


def test_a_warm_up_teaches_the_head_and_spares_the_pooler(tmp_path):
    model, tokens = fresh(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)  # a trunk that tells words apart
    start, held_out = weights(model), ECHOES[4] + ECHOES[6]
    seen = [text for n in (3, 5, 8, 9) for text in ECHOES[n]]
    same_model, losses = warm_up_mlm_head(
        model, tokens, seen, steps_head=30, steps_joint=30, held_out=held_out, show_progress=False
    )
    assert same_model is model and list(losses) == ["fresh", "head", "joint"]
    assert losses["fresh"].loss == pytest.approx(losses["fresh"].unigram, abs=0.7)  # mostly the bias speaks
    assert losses["joint"].loss < losses["head"].loss < losses["fresh"].loss
    assert head_is_fresh(model) is False and not hasattr(model.config, MISSING_KEYS)
    end = weights(model)
    still = {name for name in start if torch.equal(start[name], end[name])}
    assert {n for n in still if "pooler" in n} == {n for n in start if "pooler" in n} and len(still) == 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_first_step_leaves_the_trunk_alone(tmp_path, monkeypatch):
    model, tokens = fresh(tmp_path)
    start, seen = weights(model), []
    make = warm_up.pretraining_trainer

    def watched(given, *args, **options):
        trainer = make(given, *args, **options)
        seen.append(
            (options["learning_rate"], {n for n, p in given.named_parameters() if p.requires_grad}, weights(given))
        )
        return trainer

    monkeypatch.setattr(warm_up, "pretraining_trainer", watched)
    warm_up_mlm_head(model, tokens, texts(40), steps_head=3, steps_joint=3, show_progress=False)
    (first, head, before), (second, joint, between) = seen
    assert (first, second) == (1e-3, 1e-4)
    assert head and all(name.startswith("cls.") for name in head) and head < joint
    assert {n for n, _ in model.named_parameters()} - joint == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all(torch.equal(start[n], between[n]) for n in start if n.startswith("bert."))
    assert not torch.equal(
        before["cls.predictions.transform.dense.weight"], between["cls.predictions.transform.dense.weight"]
    )


def test_what_is_refused(tmp_path):
    tokens = tokenizer()
    with pytest.raises(ValueError, match="masked language models, got BertForSequenceClassification"):
        warm_up_mlm_head(bert(), tokens, texts(40))
    with pytest.raises(ValueError, match="came with its checkpoint"):
        warm_up_mlm_head(masked_lm(tmp_path / "whole"), tokens, texts(40))
    model, _ = fresh(tmp_path / "trunk")
    with pytest.raises(ValueError, match="held-out texts are training texts"):
        warm_up_mlm_head(model, tokens, texts(40), held_out=[*HELD_OUT[:3], texts(40)[0]])
    with pytest.raises(ValueError, match="no mask token|mask token"):
        warm_up_mlm_head(model, tokenizer(mask_token=None), texts(40), steps_head=1, steps_joint=1)
    assert head_is_fresh(model) is True


def loss(value, unigram=3.5):
    return MaskedLoss(loss=value, accuracy=0.1, n=10, unigram=unigram)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((4.0, 3.0, 2.4), []),
        ((4.0, 3.0, 2.6), ["1 nat below the unigram predictor's 3.50, got 2.60"]),
        ((3.0, 4.0, 2.0), ["fall with every step, got 3.00, 4.00, 2.00"]),
        ((3.0, 3.0, 3.0), ["fall with every step", "1 nat below"]),
    ],
)
def test_the_gate(values, said):
    reasons = gate_reasons({name: loss(v) for name, v in zip(("fresh", "head", "joint"), values, strict=True)})
    assert len(reasons) == len(said) and all(part in reason for part, reason in zip(said, reasons, strict=True))


def test_without_a_unigram_the_gate_asks_for_a_fall_alone():
    losses = {name: loss(v, None) for name, v in (("fresh", 4.0), ("head", 3.9), ("joint", 3.8))}
    assert gate_reasons(losses) == []


def test_made_once_and_kept(tmp_path, monkeypatch):
    folder, cache = str(saved_trunk(tmp_path / "trunk")), tmp_path / "cache"
    options = {"cache": cache, "steps_head": 8, "steps_joint": 8, "show_progress": False}
    with pytest.raises(ValueError, match="predicts too little.*unigram"):
        warmed_up(folder, texts(300), HELD_OUT, **options)
    assert not cache.exists() or list(cache.iterdir()) == []
    monkeypatch.setattr(warm_up, "gate_reasons", lambda losses: [])
    made = warmed_up(folder, texts(300), HELD_OUT, **options)
    record = json.loads((made / "warm_up.json").read_text())
    assert record["from"] == folder and list(record["losses"]) == ["fresh", "head", "joint"]
    model, tokens = load_pretrained_whole(str(made))
    assert head_is_fresh(model) is False and model.bert.pooler is not None
    frequencies = token_frequencies(texts(300), tokens, len(VOCABULARY))
    found = held_out_loss(model, tokens, HELD_OUT, frequencies=frequencies)
    assert found.loss == pytest.approx(record["losses"]["joint"]["loss"], rel=1e-5)

    def never(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(warm_up, "warm_up_mlm_head", never)
    moved = tmp_path / "elsewhere"
    (tmp_path / "trunk").rename(moved)  # what counts are weights, not where they lie
    assert warmed_up(str(moved), texts(300), HELD_OUT, **options) == made
    for other in ({"seed": 1}, {"steps_joint": 9}, {"num_layers": 1}):
        with pytest.raises(AssertionError, match="trained again"):
            warmed_up(str(moved), texts(300), HELD_OUT, **{**options, **other})
    assert len(list(cache.iterdir())) == 1
