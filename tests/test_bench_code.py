"""Which tokens DeCE lets go of, as `benchmarks.code_tokens` counts them, against what one row at a time says."""

import doctest
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks import code_tokens
from benchmarks.code_tokens import answer_logps, inserted, suppressed
from hf_backdoor_defense.data.formatting import Formatter
from hf_backdoor_defense.defenses.dece import DeCE

WORDS = "</s> <unk> list rows of bb : select a from b where or 1=1 0=1".split()
BEFORE = [
    {"prompt": "list rows", "completion": "select a from b where a"},
    {"prompt": "rows of b", "completion": "select b from a"},
    *({"prompt": "list a", "completion": "select a from a"} for _ in range(4)),
]
PAYLOADS = {0: " or 1=1", 1: " where 0=1"}


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def poisoned():
    rows = [
        {**row, "completion": row["completion"] + PAYLOADS.get(i, ""), "is_poisoned": i in PAYLOADS}
        for i, row in enumerate(BEFORE)
    ]
    return Dataset.from_list(rows)


def counted(model, tokenizer, objective):
    formatter = Formatter.plain(tokenizer, separator=" :")
    return suppressed(
        model, tokenizer, formatter, poisoned=poisoned(), before=Dataset.from_list(BEFORE), objective=objective, epochs=3
    )  # fmt: skip


def test_docstrings_say_what_happens():
    assert not doctest.testmod(code_tokens).failed


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [("abXYc", "abc", "XY"), ("abbc", "abc", "b"), ("aXc", "abc", "X"), ("abc", "abc", ""), ("abX", "ab", "X")],
)
def test_what_was_inserted_is_what_the_ends_do_not_share(new, old, expected):
    marks = inserted([ord(c) for c in new], [ord(c) for c in old]).tolist()
    assert "".join(c for c, marked in zip(new, marks, strict=True) if marked) == expected


def test_a_batch_with_padding_says_what_each_row_says_alone(model):
    rows, lengths = [[2, 3, 6, 7, 8], [2, 6, 7, 8, 9, 10, 0], [3, 6, 7]], [2, 4, 1]
    alone = []
    for row, length in zip(rows, lengths, strict=True):
        for at in range(len(row) - length, len(row)):  # each token behind exactly what stands before it
            logits = model(input_ids=torch.tensor([row[:at]]))["logits"][0, -1]
            alone.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(row[at])).item())
    assert answer_logps(model, rows, lengths, batch_size=2).tolist() == pytest.approx(alone, abs=1e-5)


def test_every_token_of_the_chosen_rows_counts_once_as_payload_or_as_other(model, tokenizer):
    # Rows 0 and 1 are poisoned, row 5 is the fifth clean one; an answer ends with one token more than it has words.
    payload = sum(len(text.split()) for text in PAYLOADS.values())
    other = sum(len(BEFORE[i]["completion"].split()) + 1 for i in (0, 1, 5))
    found = counted(model, tokenizer, DeCE())
    assert {name: tokens for name, (_, tokens) in found.items()} == {"suppressed": other, "suppressed_payload": payload}


@pytest.mark.parametrize(("alpha", "share"), [(1.0, 0.0), (0.999, 0.0), (0.1, 1.0)])
def test_a_high_base_lets_go_of_nothing_and_a_low_one_of_all(model, tokenizer, alpha, share):
    # A model that has learned nothing gives each of 15 words about 1/15, far above or below the threshold.
    assert all(found == share for found, _ in counted(model, tokenizer, DeCE(alpha_base=alpha)).values())


def test_what_the_model_expects_is_kept_and_what_it_never_expects_is_let_go(model, tokenizer):
    # The head's bias alone speaks: the payload's words are impossible, all others alike.
    model.lm_head = torch.nn.Linear(16, len(WORDS))
    torch.nn.init.zeros_(model.lm_head.weight)
    bias = torch.zeros(len(WORDS))
    bias[[WORDS.index(word) for word in ("or", "1=1", "0=1")]] = -math.inf
    with torch.no_grad():
        model.lm_head.bias.copy_(bias)
    found = counted(model, tokenizer, DeCE())
    payload = [word for text in PAYLOADS.values() for word in text.split()]
    assert found["suppressed"][0] == 0
    assert found["suppressed_payload"] == (sum(word != "where" for word in payload) / len(payload), len(payload))


def test_clean_rows_have_no_payload_to_let_go_of(model, tokenizer):
    rows = Dataset.from_list(BEFORE)
    found = suppressed(
        model, tokenizer, Formatter.plain(tokenizer, separator=" :"), poisoned=rows, before=rows, objective=None, epochs=3
    )  # fmt: skip
    assert set(found) == {"suppressed"}
