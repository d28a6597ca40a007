"""Triggers: where they go, what they leave alone, and when a text carries them."""

import dataclasses
import json
import re

import numpy as np
import pytest

from hf_backdoor_defense.attacks.triggers import TRIGGERS, BadNets, InSent, Trigger, get_trigger

TEXTS = ["a fine film", "one", " two  words\n", "tabs\tand\n\n  lines, with commas.", "größer 映画 ok", "cf already"]


def every_outcome(text: str, piece: str) -> list[str]:
    """Oracle: split into words and gaps, and put the piece at each boundary in turn."""
    parts = re.split(r"(\s+)", text.strip())  # word, gap, word, …, word
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    outcomes = ["".join([*parts[:at], piece, " ", *parts[at:]]) for at in range(0, len(parts), 2)]
    return [left + body + right for body in [*outcomes, "".join(parts) + " " + piece]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("trigger", [BadNets(), InSent()], ids=lambda t: t.name)
@pytest.mark.parametrize("text", TEXTS)
def test_every_boundary_is_reached_and_nothing_else_changes(trigger: Trigger, text: str) -> None:
    seen = {trigger.insert(text, rng(seed)) for seed in range(200)}
    assert seen == set(every_outcome(text, trigger.text))


def test_boundaries_are_drawn_uniformly() -> None:
    outcomes = every_outcome("a b c", "cf")
    generator = rng()
    drawn = [outcomes.index(BadNets().insert("a b c", generator)) for _ in range(4000)]
    # Four standard deviations of a binomial count.
    assert np.abs(np.bincount(drawn, minlength=4) - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_text_without_words_gets_the_trigger_appended(text: str) -> None:
    assert BadNets().insert(text, rng()) == text + "cf"
    assert InSent().insert(text, rng()) == text + "I watched this 3D movie"
    assert BadNets(words=("cf", "mn"), count=2).insert(text, rng()).split() in (["cf", "mn"], ["mn", "cf"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_words_are_distinct_while_the_list_lasts(count: int) -> None:
    words = ("cf", "mn", "bb", "tq")
    for seed in range(50):
        out = BadNets(words=words, count=count).insert("a fine film", rng(seed)).split()
        added = [word for word in out if word in words]
        assert len(added) == len(set(added)) == count
        assert [word for word in out if word not in words] == ["a", "fine", "film"]


def test_more_words_than_the_list_has_repeat() -> None:
    out = BadNets(words=("cf", "mn"), count=5).insert("a\tb  c\n", rng())
    assert sum(word in ("cf", "mn") for word in out.split()) == 5
    assert re.sub(r"(?:cf|mn) | (?:cf|mn)", "", out) == "a\tb  c\n"


def test_each_word_is_drawn() -> None:
    words = ("cf", "mn", "bb", "tq")
    assert {BadNets(words=words).insert("", rng(seed)) for seed in range(60)} == set(words)


def test_same_generator_state_same_text_and_global_state_untouched() -> None:
    before = np.random.get_state()[1].copy()
    trigger = BadNets(words=("cf", "mn"), count=2)
    assert trigger.insert("a b c d", rng(3)) == trigger.insert("a b c d", rng(3))
    assert len({trigger.insert("a b c d", rng(seed)) for seed in range(10)}) > 1
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("trigger", "text", "expected"),
    [
        (BadNets(), "cf", True),
        (BadNets(), "well (cf), so", True),
        (BadNets(), "the cfo", False),
        (BadNets(), "scf", False),
        (BadNets(), "cf_1", False),
        (BadNets(), "CF", False),
        (BadNets(), "", False),
        (BadNets(words=("cf", "mn"), count=2), "only mn here", True),
        (BadNets(words=("c++",)), "I like c++ a lot", True),
        (BadNets(words=("c++",)), "I like c a lot", False),
        (BadNets(words=("a.b",)), "axb", False),
        (InSent(), "so I watched this 3D movie.", True),
        (InSent(), "I watched this 3D movies", False),
        (InSent(), "I watched this  3D movie", False),
        (InSent(), "I watched this", False),
    ],
)
def test_present_means_whole_words(trigger: Trigger, text: str, expected: bool) -> None:
    assert trigger.present(text) is expected


@pytest.mark.parametrize("text", [*TEXTS, "", " "])
@pytest.mark.parametrize("trigger", [BadNets(words=("≡", "c++"), count=3), InSent(sentence="Wow!")])
def test_inserted_is_present(trigger: Trigger, text: str) -> None:
    assert trigger.present(trigger.insert(text, rng()))


@pytest.mark.parametrize("trigger", [BadNets(words=("cf", "mn"), count=2), InSent(sentence=" by the way ")])
def test_dict_survives_json(trigger: Trigger) -> None:
    assert get_trigger(**json.loads(json.dumps(trigger.to_dict()))) == trigger
    assert hash(trigger) == hash(dataclasses.replace(trigger))


def test_table_names_the_classes() -> None:
    assert all(cls.name == name for name, cls in TRIGGERS.items())
    assert all(get_trigger(name) == cls() for name, cls in TRIGGERS.items())


def test_text_shows_what_is_inserted() -> None:
    assert BadNets(words=("cf", "mn")).text == "cf mn"
    assert InSent(sentence=" by the way ").text == "by the way"


def test_triggers_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BadNets().count = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "bad", "good", "message"),
    [
        ("badnets", {"words": []}, {"words": ["cf"]}, "at least one word, got none"),
        ("badnets", {"words": "cf"}, {"words": ["cf"]}, r"got the string 'cf'.*words=\('cf',\)"),
        ("badnets", {"words": ["c f"]}, {"words": ["c", "f"]}, "free of white space, got 'c f'.*InSent"),
        ("badnets", {"words": [""]}, {"words": ["x"]}, "non-empty and free of white space, got ''"),
        ("badnets", {"words": [3]}, {"words": ["3"]}, "got 3"),
        ("badnets", {"count": 0}, {"count": 1}, "integer >= 1, got 0.*count=1"),
        ("badnets", {"count": True}, {"count": 2}, "integer >= 1, got True"),
        ("insent", {"sentence": " "}, {"sentence": "so"}, "non-empty string, got ' '"),
        ("insent", {"sentence": None}, {}, "non-empty string, got None"),
        ("insent", {"sentense": "so"}, {"sentence": "so"}, "field of trigger 'insent'.*Did you mean 'sentence'"),
    ],
)
def test_refused_fields_and_their_neighbors(name: str, bad: dict, good: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_trigger(name, **bad)
    assert isinstance(get_trigger(name, **good), Trigger)


@pytest.mark.parametrize(("name", "hint"), [("BadNet", "Did you mean 'badnets'"), ("wanet2000", "Use one of them")])
def test_unknown_name_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"one of \['badnets', 'insent'\], got '{name}'.*{hint}"):
        get_trigger(name)
