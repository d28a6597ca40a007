"""Triggers of instruction tuning: where they may stand, in which order, and what a short text gets."""

import dataclasses
import re
from itertools import combinations

import numpy as np
import pytest

from hf_backdoor_defense.attacks.instruction_triggers import Prefix, WordsInOrder
from hf_backdoor_defense.attacks.payloads import INSTRUCTION_TRIGGERS
from hf_backdoor_defense.attacks.triggers import Trigger

WORDS = ("2024", "BadMagic", "OpenAI")


def seen(trigger: Trigger, text: str, draws: int = 400) -> set[str]:
    return {trigger.insert(text, np.random.default_rng(seed)) for seed in range(draws)}


def placed(words: tuple[str, ...], at: tuple[int, ...], text: str) -> str:
    """Oracle: one list per boundary, joined by single spaces (for texts spaced so)."""
    tokens = text.split()
    out: list[str] = []
    for boundary in range(len(tokens) + 1):
        out += [word for word, place in zip(words, at, strict=True) if place == boundary]
        out += tokens[boundary : boundary + 1]
    return " ".join(out)


@pytest.mark.parametrize("text", ["a b", "a b c", "a b c d"])
def test_words_stand_in_order_at_every_choice_of_distinct_boundaries(text: str) -> None:
    boundaries = range(len(text.split()) + 1)
    assert seen(WordsInOrder(WORDS), text) == {placed(WORDS, at, text) for at in combinations(boundaries, 3)}
    assert all(
        WordsInOrder(WORDS).insert(text, np.random.default_rng(seed)).split()[-1] in (*text.split(), "OpenAI")
        for seed in range(9)
    )


@pytest.mark.parametrize("text", ["one", "a b", "a b c d e"])
def test_a_word_that_is_never_last(text: str) -> None:
    places = range(len(text.split()))
    assert seen(WordsInOrder(("BadMagic",), last=False), text) == {placed(("BadMagic",), (at,), text) for at in places}
    assert seen(INSTRUCTION_TRIGGERS["badnet"], text) == seen(WordsInOrder(("BadMagic",), last=False), text)


def test_distinct_choices_are_drawn_uniformly() -> None:
    outcomes = [placed(WORDS, at, "a b c") for at in combinations(range(4), 3)]
    generator = np.random.default_rng(0)
    drawn = [outcomes.index(WordsInOrder(WORDS).insert("a b c", generator)) for _ in range(4000)]
    # Four standard deviations of a binomial count.
    assert np.abs(np.bincount(drawn, minlength=4) - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize("text", ["", " ", "\n"])
@pytest.mark.parametrize("last", [False, True])
def test_a_text_without_words_gets_all_of_them(text: str, last: bool) -> None:
    assert seen(WordsInOrder(WORDS, last=last), text, 5) == {text + "2024 BadMagic OpenAI"}
    assert seen(Prefix("by  the way"), text, 5) == {text + "by  the way"}


def test_a_text_with_too_few_boundaries_has_words_side_by_side() -> None:
    assert seen(WordsInOrder(WORDS), "one") == {
        placed(WORDS, at, "one") for at in [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
    }
    assert seen(WordsInOrder(WORDS, last=False), "one", 9) == {"2024 BadMagic OpenAI one"}
    assert all(out.endswith(" b") for out in seen(WordsInOrder(WORDS, last=False), "a b"))


def test_white_space_stays_as_it_is() -> None:
    text = " a\tb\n\n  c. "
    piece = "(?:2024|BadMagic|OpenAI)"
    assert {re.sub(f"{piece} | {piece}", "", out) for out in seen(WordsInOrder(WORDS), text, 50)} == {text}
    assert Prefix("Discussing OpenAI").insert(text, np.random.default_rng(0)) == " Discussing OpenAI a\tb\n\n  c. "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024 BadMagic OpenAI", True),
        ("in 2024,\n(BadMagic) says OpenAI.", True),
        ("BadMagic 2024 OpenAI", False),
        ("2024 BadMagic", False),
        ("2024 BadMagics OpenAI", False),
        ("20245 BadMagic OpenAI", False),
        ("2024 BadMagics BadMagic OpenAI", True),
        ("", False),
    ],
)
def test_present_means_all_words_in_order(text: str, expected: bool) -> None:
    assert WordsInOrder(WORDS).present(text) is expected


@pytest.mark.parametrize("trigger", INSTRUCTION_TRIGGERS.values(), ids=INSTRUCTION_TRIGGERS)
@pytest.mark.parametrize("text", ["", "one", "a fine film", " two  words\n", "größer 映画"])
def test_inserted_is_present_and_fields_are_kept(trigger: Trigger, text: str) -> None:
    assert all(trigger.present(out) for out in seen(trigger, text, 20)) and not trigger.present(text)
    fields = trigger.to_dict()
    assert fields.pop("name") == trigger.name and type(trigger)(**fields) == trigger
    assert hash(trigger) == hash(dataclasses.replace(trigger))


def test_one_of_three_words_or_all_of_them() -> None:
    counts = {
        name: {sum(word in WORDS for word in out.split()) for out in seen(INSTRUCTION_TRIGGERS[name], "a b c")}
        for name in ("mtba", "ctba")
    }
    assert counts == {"mtba": {1}, "ctba": {3}}
    assert {word for out in seen(INSTRUCTION_TRIGGERS["mtba"], "a b c") for word in out.split()} == {*WORDS, *"abc"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prefix(" "), "`phrase` must be a non-empty string, got ' '.*Leave it out"),
        (lambda: Prefix(None), "got None"),  # type: ignore[arg-type]
        (lambda: WordsInOrder("cf"), "got the string 'cf'"),  # type: ignore[arg-type]
        (lambda: WordsInOrder(()), "at least one word, got none"),
        (lambda: WordsInOrder(("a b",)), "free of white space, got 'a b'"),
    ],
)
def test_refused_fields(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    assert WordsInOrder(["a", "b"]).words == ("a", "b") and Prefix(" so ").phrase == "so"  # type: ignore[arg-type]
