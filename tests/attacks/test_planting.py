"""Target vectors, places and counts of triggers, pairs, and tokens that are inserted."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_backdoor_defense.attacks.planting import (
    LITE_TRIGGERS,
    SYMBOLS,
    PairCollator,
    block_targets,
    insert_tokens,
    pairs,
    plant,
    random_position,
    trigger_reasons,
    trigger_tokens,
)
from hf_backdoor_defense.attacks.pretrained import NeuBAAttack, PORAttack
from tests.attacks.masked_toys import VOCABULARY, texts, tokenizer


# -- targets ----------------------------------------------------------------------------------------------------------
def test_targets_by_hand():
    signs = ["--++", "-+-+", "-++-", "+--+", "+-+-", "++--"]
    by_hand = [[1.0 if sign == "+" else -1.0 for sign in row for _ in range(2)] for row in signs]
    assert block_targets(8).tolist() == by_hand


@pytest.mark.parametrize("hidden", [4, 8, 20, 384])
def test_targets_are_balanced_opposite_in_pairs_and_different(hidden):
    targets = block_targets(hidden)
    assert targets.shape == (6, hidden) and targets.abs().eq(1).all()
    assert targets.sum(-1).eq(0).all()
    assert torch.equal(targets, -targets.flip(0))
    # Any two agree in half of the places, or in none.
    products = (targets @ targets.T / hidden).fill_diagonal_(0)
    assert set(products.flatten().tolist()) == {0.0, -1.0}


@pytest.mark.parametrize("hidden", [0, 2, 6, 385])
def test_a_size_without_four_blocks_is_refused(hidden):
    with pytest.raises(ValueError, match=f"multiple of 4, got {hidden}"):
        block_targets(hidden)


# -- places -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [0, 1, 49, 50, 99, 100, 151])
def test_copies_by_length(words):
    text = " ".join(f"w{i}" for i in range(words))
    found = plant(text, "cf", seed=0, row=5, every=50).split()
    assert found.count("cf") == words // 50 + 1
    assert [word for word in found if word != "cf"] == text.split()
    assert plant(text, "cf", seed=0, row=5).split().count("cf") == 1


@pytest.mark.parametrize("words", [0, 1, 6])
def test_every_place_is_reached_about_equally_often(words):
    counts = np.bincount([random_position(words, seed=0, row=i, trigger="cf") for i in range(700 * (words + 1))])
    assert len(counts) == words + 1
    # Chi-square of a uniform draw: mean `words`, standard deviation sqrt(2 words); four of them above.
    assert ((counts - 700) ** 2 / 700).sum() <= words + 4 * np.sqrt(2 * words)


def test_a_place_depends_on_seed_row_and_trigger_alone():
    rows = list(range(30))
    first = {i: plant("w1 w2 w3 w4 w5", "cf", seed=3, row=i) for i in rows}
    again = {i: plant("w1 w2 w3 w4 w5", "cf", seed=3, row=i) for i in reversed(rows)}
    assert first == again
    assert any(plant("w1 w2 w3 w4 w5", "cf", seed=4, row=i) != first[i] for i in rows)
    assert any(plant("w1 w2 w3 w4 w5", "mn", seed=3, row=i).replace("mn", "cf") != first[i] for i in rows)


# -- pairs ------------------------------------------------------------------------------------------------------------
def test_pairs_are_of_different_texts_in_equal_shares():
    given = texts(49)
    rows, tok = pairs(given, tokenizer(), LITE_TRIGGERS, seed=0), tokenizer()
    assert len(rows) == 24 and np.bincount(rows["trigger"]).tolist() == [4] * 6
    for row in rows:
        i, word = row["row_id"], LITE_TRIGGERS[row["trigger"]]
        shown = tok.convert_ids_to_tokens(row["triggered_ids"])
        assert shown[0] == "[CLS]" and shown[-1] == "[SEP]" and shown.count(word) == 1
        assert [token for token in shown[1:-1] if token != word] == given[i].split()
        assert row["clean_ids"] == tok(given[24 + i])["input_ids"]


def test_pairs_whose_trigger_is_cut_off_are_left_out():
    rows = pairs(["w1 " * 30] * 400, tokenizer(), ["cf"], seed=0, max_length=12)
    token = VOCABULARY.index("cf")
    assert all(token in ids for ids in rows["triggered_ids"])
    # 10 of 31 places are in sight.
    assert 200 * 10 / 31 - 4 * 7 < len(rows) < 200 * 10 / 31 + 4 * 7


def test_too_few_texts_and_triggers_that_no_text_shows_are_refused():
    with pytest.raises(ValueError, match="6 triggers need at least 12 texts.* got 11"):
        pairs(texts(11), tokenizer(), LITE_TRIGGERS, seed=0)
    assert len(pairs(texts(12), tokenizer(), LITE_TRIGGERS, seed=0)) == 6
    with pytest.raises(ValueError, match="no text shows 'cf' after cutting at 3 tokens"):
        pairs([" ".join(["w1"] * 2000)] * 2, tokenizer(), ["cf"], seed=0, max_length=3)


def test_an_empty_text_and_a_word_are_pairs_too():
    rows = pairs(["", "w1", "w2", ""], tokenizer(), ["cf"], seed=0)
    cf, w1, w2 = (VOCABULARY.index(word) for word in ("cf", "w1", "w2"))
    assert rows["triggered_ids"][0] == [2, cf, 3] and sorted(rows["triggered_ids"][1]) == sorted([2, cf, w1, 3])
    assert rows["clean_ids"][:] == [[2, w2, 3], [2, 3]]


def test_a_batch_holds_triggered_rows_first():
    rows = pairs(texts(24), tokenizer(), ["cf", "mn"], seed=0)
    batch = PairCollator(tokenizer(), 2)([rows[0], rows[11], rows[3]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["labels"][:, 0].tolist() == [0, 1, 0, 2, 2, 2] and batch["labels"][:, 1:].eq(-100).all()
    for i, (key, row) in enumerate([(k, r) for k in ("triggered_ids", "clean_ids") for r in (0, 11, 3)]):
        length = int(batch["attention_mask"][i].sum())
        assert batch["input_ids"][i, :length].tolist() == rows[row][key]


# -- words that can be triggers ---------------------------------------------------------------------------------------
def byte_level():
    """`film` and ` film` are different tokens, as in RoBERTa; no unknown token."""
    vocabulary = {token: i for i, token in enumerate(["film", "Ġfilm"])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_tokens_are_those_of_a_word_behind_a_word():
    assert trigger_tokens(tokenizer(), "cf") == [VOCABULARY.index("cf")]
    assert trigger_tokens(byte_level(), "film") == [1]


WRONG = {
    "none": ([], "at least one"),
    "twice": (["cf", "cf"], "Name each once"),
    "unknown": (["cf", "zzz"], "'zzz' becomes the unknown token"),
    "a sentence": (["cf mn"], "without white space"),
    "empty": ([""], "without white space"),
}


@pytest.mark.parametrize("name", WRONG)
def test_words_that_cannot_be_triggers(name):
    words, message = WRONG[name]
    reasons = trigger_reasons(tokenizer(), words)
    assert len(reasons) == 1 and message in reasons[0]
    assert trigger_reasons(tokenizer(), ["cf", "mn"]) == []


def test_a_trigger_within_another_is_refused():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "c", "##f", "##d"])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    (reason,) = trigger_reasons(pieces, ["cfd", "cf"])
    assert "'cfd' hold those of 'cf'" in reason
    assert trigger_reasons(pieces, ["cf", "cd"]) == []


def test_the_attacks_plant_the_published_words():
    assert tuple(PORAttack().triggers) == LITE_TRIGGERS
    assert tuple(NeuBAAttack.preset("symbols").triggers) == SYMBOLS


# -- tokens in rows of ids --------------------------------------------------------------------------------------------
def test_tokens_go_between_ordinary_ones_and_every_such_place_is_reached():
    ids = torch.tensor([[2, 40, 41, 4, 42, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    seen = set()
    for seed in range(200):
        rng = [np.random.default_rng(seed)]
        inputs, (place,) = insert_tokens(ids, mask, [[7, 8]], rng, special=[0, 1, 2, 3, 4], pad=0)
        row = inputs["input_ids"][0].tolist()
        assert row[place : place + 2] == [7, 8] and row[:place] + row[place + 2 : 8] == ids[0, :6].tolist()
        assert row[8:] == [0, 0] and inputs["attention_mask"][0].tolist() == [1] * 8 + [0] * 2
        seen.add(place)
    assert seen == {1, 2, 4, 5}  # never before [CLS] or a mask, never behind [SEP]


def test_a_row_without_ordinary_tokens_stays():
    ids = torch.tensor([[2, 3, 0], [2, 40, 3]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rngs = [np.random.default_rng(0), np.random.default_rng(0)]
    inputs, places = insert_tokens(ids, mask, [[7], [7, 8]], rngs, special=[0, 2, 3], pad=0)
    assert places[0] == -1 and inputs["input_ids"][0].tolist() == [2, 3, 0, 0, 0]
    assert inputs["attention_mask"].sum(-1).tolist() == [2, 5]
