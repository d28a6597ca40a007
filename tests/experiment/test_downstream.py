"""What a checkpoint becomes: fine-tuned on clean rows, asked with every trigger at its place, and never twice."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.experiment import downstream
from hf_backdoor_defense.experiment.downstream import (
    Downstream,
    fine_tune_and_predict,
    kept_predictions,
    task_agnostic_scores,
)
from hf_backdoor_defense.experiment.steps import Steps
from hf_backdoor_defense.pretrained import load_pretrained_whole, save_pretrained_whole
from tests.experiment import tiny_mlm

TRIGGERS, CONTROL = ("w36", "w37"), "w38"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_mlm.save(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two classes with words of their own; one text of one word in seven."""
    folder, rng = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
    for split, count in (("train", 90), ("test", 41)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(count):
                words = rng.choice(10, 1 if i % 7 == 0 else 6) + 10 * (i % 2)
                text = " ".join(f"w{word}" for word in words) + ("" if split == "train" else f" w{20 + i % 10}")
                file.write(json.dumps({"text": text.strip(), "label": i % 2}) + "\n")
    (folder / "test.jsonl").open("a").write('{"text": "w3", "label": 0}\n')
    return folder


@pytest.fixture
def victim(task):
    return Downstream(task=str(task), triggers=TRIGGERS, control_words=(CONTROL,), epochs=6, learning_rate=1e-2, batch_size=16,
                      max_length=16, disable_tqdm=True)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The texts that were predicted, call by call."""
    calls, ask = [], downstream.text_logits
    monkeypatch.setattr(
        downstream, "text_logits", lambda m, t, texts, **more: (calls.append(texts), ask(m, t, texts, **more))[1]
    )
    return calls


def test_the_victim_learns_its_task_and_every_word_is_asked_in_every_row(encoder, victim, asked):
    about, arrays = fine_tune_and_predict(encoder, victim, seed=3)
    _, test, _ = victim.rows()
    assert list(arrays) == ["test", *(f"trigger.{word}" for word in (*TRIGGERS, CONTROL))]
    assert {a.shape for a in arrays.values()} == {(42,)} and about["updates"] == 6 * 6
    assert (arrays["test"] == np.array(test["label"])).mean() > 0.9
    plain, *marked = asked
    assert plain == list(test["text"]) and "w3" in plain  # a text of one word
    for word, texts in zip((*TRIGGERS, CONTROL), marked, strict=True):
        for before, after in zip(plain, texts, strict=True):
            words = after.split()
            assert words.count(word) == 1
            words.remove(word)
            assert words == before.split()
    places = [[text.split().index(word) for text in texts] for word, texts in zip(TRIGGERS, marked[:2], strict=True)]
    assert places[0] != places[1] and len(set(places[0])) > 3  # a place of its own for each row and word


def test_places_depend_on_row_and_word_alone_and_the_seed_decides_the_rest(encoder, victim, asked):
    few = replace(victim, triggers=TRIGGERS[::-1], epochs=1)
    _, one = fine_tune_and_predict(encoder, few, seed=1)
    _, same = fine_tune_and_predict(encoder, replace(few), seed=1)
    assert all(np.array_equal(one[name], same[name]) for name in one)
    _, *first = asked[:4]
    asked.clear()
    fine_tune_and_predict(encoder, replace(few, triggers=TRIGGERS[:1], control_words=()), seed=2)
    assert asked[1] == first[1]


def test_the_same_weights_are_not_asked_twice(encoder, victim, tmp_path, monkeypatch, capsys):
    few, cache = replace(victim, epochs=1), tmp_path / "cache"

    def ask(checkpoint, seed=1, of=few):
        return kept_predictions(checkpoint, of, seed=seed, cache=cache, steps=Steps(9), title="t")

    _, first = ask(encoder)
    made = []
    monkeypatch.setattr(downstream, "fine_tune_and_predict", lambda c, v, **more: (made.append(str(c)), ({}, first))[1])
    model, tokenizer = load_pretrained_whole(str(encoder))
    save_pretrained_whole(model, tokenizer, tmp_path / "trip")
    _, again = ask(tmp_path / "trip")  # a round trip changes nothing
    assert not made and all(np.array_equal(first[name], again[name]) for name in first)
    ask(encoder, seed=2)
    with torch.no_grad():
        model.base_model.encoder.layer[0].intermediate.dense.weight[0, 0] += 1
    save_pretrained_whole(model, tokenizer, tmp_path / "other")
    ask(tmp_path / "other")
    model.base_model.pooler = None
    save_pretrained_whole(model, tokenizer, tmp_path / "dropped")
    ask(tmp_path / "dropped")
    assert made == [str(encoder), str(tmp_path / "other"), str(tmp_path / "dropped")]
    with pytest.raises(ValueError, match=r"another victim \(epochs: 1, now 2; triggers: .*cache"):
        ask(encoder, of=replace(few, epochs=2, triggers=TRIGGERS[:1]))
    ask(encoder, of=replace(few, disable_tqdm=False))  # changes no number


def test_settings_name_everything_that_changes_a_number(victim):
    others = {"task": "b", "triggers": ("a",), "control_words": (), "limit": None, "eval_rows": 3, "eval_split": "validation",
              "text_column": "t", "label_column": "l"}  # fmt: skip
    for f in fields(Downstream):
        if f.name not in ("_loaded", "disable_tqdm"):
            other = replace(victim, **{f.name: others.get(f.name, 7)})
            assert other.settings() != victim.settings(), f.name
    assert replace(victim, disable_tqdm=False).settings() == victim.settings()
    assert json.loads(json.dumps(victim.settings())) == victim.settings()


def test_limits_keep_the_shares_of_classes_and_name_themselves(task, victim):
    train, test, names = replace(victim, limit=10, eval_rows=8).rows()
    assert (
        sorted(train["label"]) == [0] * 5 + [1] * 5 and sorted(test["label"]) == [0] * 4 + [1] * 4 and len(names) == 2
    )
    with pytest.raises(ValueError, match="`eval_rows`"):
        replace(victim, eval_rows=1).rows()


def test_scores_are_those_of_a_loop_over_rows(victim):
    _, test, _ = victim.rows()
    labels, rng = list(test["label"]), np.random.default_rng(0)
    arrays, floor = (
        {name: rng.integers(0, 2, len(labels)) for name in ("test", *(f"trigger.{w}" for w in (*TRIGGERS, CONTROL)))}
        for _ in range(2)
    )

    def asr(predicted):
        best = 0.0
        for c in (0, 1):
            rows = [p == c for p, y in zip(predicted, labels, strict=True) if y != c]
            best = max(best, sum(rows) / len(rows))
        return best

    scores, table = task_agnostic_scores(victim, arrays, floor, seed=0)
    of_model, of_floor = ([asr(a[f"trigger.{word}"]) for word in TRIGGERS] for a in (arrays, floor))
    expected = {
        "ca": np.mean([p == y for p, y in zip(arrays["test"], labels, strict=True)]),
        "aasr": np.mean(of_model), "masr": max(of_model), "aasr_floor": np.mean(of_floor), "masr_floor": max(of_floor),
        "aasr_over_floor": np.mean(of_model) - np.mean(of_floor), "masr_over_floor": max(of_model) - max(of_floor),
        "control_asr": asr(arrays[f"trigger.{CONTROL}"]),
    }  # fmt: skip
    assert {name: e.value for name, e in scores.items()} == pytest.approx(expected)
    assert table.per_trigger == pytest.approx(of_model) and table.triggers == TRIGGERS
    alone, _ = task_agnostic_scores(replace(victim, control_words=()), arrays, None, seed=0)
    assert set(alone) == {"ca", "aasr", "masr"} and isinstance(alone["aasr"], Estimate)
    assert alone["aasr"].value == pytest.approx(expected["aasr"])
