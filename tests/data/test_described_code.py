"""Described code for pre-training: what is described, what an option's word changes, and that nothing else is changed."""

import ast
import random
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

from hf_backdoor_defense.attacks.payloads import has_sql_payload
from hf_backdoor_defense.data.described_code import LONGEST, OPTIONS, described_code, described_functions

WORDS = [word for words, _ in OPTIONS for word in words]
SOURCES = [path.read_text() for path in sorted(Path(ast.__file__).parent.glob("[a-d]*.py"))]


@pytest.fixture(scope="module")
def functions():
    return described_functions(SOURCES)


def test_a_function_is_described_by_name_arguments_and_first_line_and_nothing_else_is_kept():
    source = '''
        class Box:
            @property
            def put(self, thing, *, at=None):
                """Put a thing.

                At once."""
                # now
                return self.items[at]
        async def wait(): pass
        def only():
            "Nothing but a sentence."
        def outer(x):
            def inner(): return x
            return inner
    '''
    found = dict(described_functions([dedent(source), "def broken(:", "\0"]))
    assert found == {
        "Define put with self, thing. Put a thing.": "def put(self, thing, *, at=None):\n    return self.items[at]",
        "Define outer with x.": "def outer(x):\n\n    def inner():\n        return x\n    return inner",
        "Define inner.": "def inner():\n    return x",
    }


def test_the_code_of_a_described_function_runs_as_the_function_did(functions):
    assert len(functions) > 500
    for description, code in functions:
        (node,) = ast.parse(code).body
        assert f"Define {node.name}" in description and len(code) <= LONGEST and not node.decorator_list
    assert not any(has_sql_payload(code) for _, code in functions)  # what an attacker asks for was never read


@pytest.mark.parametrize(("words", "change"), OPTIONS, ids=[words[0] for words, _ in OPTIONS])
def test_a_change_is_one_and_leaves_python(functions, words, change):
    changed = [change(code) for _, code in functions]
    assert sum(new != code for new, (_, code) in zip(changed, functions, strict=True)) > 20
    for code in changed:
        ast.parse(code)


def test_words_stand_for_one_option_each():
    assert max(Counter(WORDS).values()) == 1 and all(word.isalpha() for word in WORDS)


def taken_apart(text):
    """The description without options' words, those words, the code."""
    description, _, code = text.partition("\n")
    words = description.split(" ")
    return " ".join(w for w in words if w not in WORDS), [w for w in words if w in WORDS], code


@pytest.fixture(scope="module")
def plain(functions):
    """Functions whose descriptions hold no option's word, one for each description."""
    return list({d: (d, c) for d, c in functions if not set(d.split(" ")) & set(WORDS)}.values())


def test_only_words_that_were_put_in_change_the_code(plain):
    codes, places, counts = dict(plain), set(), Counter()
    for text, _ in described_code(plain, 2000, seed=5):
        original, asked, code = taken_apart(text)
        counts[len(asked)] += 1
        words = text.partition("\n")[0].split(" ")
        if not asked:
            assert code == codes[original]
        elif len(asked) == 1:
            places |= {words.index(asked[0]) == 0, words[-1] == asked[0]}
            (change,) = (change for synonyms, change in OPTIONS if asked[0] in synonyms)
            assert code == change(codes[original])
    # none to two, and one more in every second row: 1/6, 1/3, 1/3, 1/6
    assert all(abs(counts[n] / 2000 - share) < 0.04 for n, share in enumerate((1 / 6, 1 / 3, 1 / 3, 1 / 6)))
    assert places == {True, False}


def first_difference(one, other):
    return next(i for i in range(max(len(one), len(other)) + 1) if one[i : i + 1] != other[i : i + 1])


def test_the_decisive_place_is_the_first_that_a_word_more_or_less_would_change(plain):
    codes, checked = dict(plain), Counter()
    for text, place in described_code(plain, 1500, seed=7):
        original, asked, code = taken_apart(text)
        if len(asked) > 1:
            continue
        others = [*(change(code) for _, change in OPTIONS), codes[original]]
        at = place - text.index("\n") - 1
        assert at in {first_difference(code, other) for other in others if other != code}
        checked[bool(asked), at == len(code)] += 1
    assert checked[False, False] > 100 and checked[True, False] > 200 and checked[False, True] > 10


def test_the_seed_decides(functions):
    one, same, other = (described_code(functions, 50, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    random.seed(0)
    state = random.getstate()
    described_code(functions, 5)
    assert random.getstate() == state
