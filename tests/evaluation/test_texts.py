"""BLEU against counts by hand and against sacrebleu; what parses; what repeats."""

import math
import warnings
from collections import Counter

import pytest

from hf_backdoor_defense.evaluation.texts import bleu, python_parses, repetitive, same_text

REFERENCES = ["a b c d e f g", "x = f ( a , b )", "def f ( ) :\n\t return 1", "p q r s"]
OUTPUTS = ["a b c d x f g", "x = f ( a )", "", "p q r s t u"]


def clipped(output, reference, n):
    """Matches and n-grams of one text."""
    grams = [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for words in (output.split(), reference.split())
    ]
    return sum(min(count, grams[1][gram]) for gram, count in grams[0].items()), sum(grams[0].values())


def test_bleu_is_the_papers_formula():
    precisions = []
    for n in range(1, 5):
        counts = [clipped(o, r, n) for o, r in zip(OUTPUTS, REFERENCES, strict=True)]
        precisions.append(sum(match for match, _ in counts) / sum(total for _, total in counts))
    assert min(precisions) > 0  # so that nothing is smoothed
    written, wanted = (sum(len(text.split()) for text in texts) for texts in (OUTPUTS, REFERENCES))
    brevity = min(1.0, math.exp(1 - wanted / written))
    assert brevity < 1
    expected = 100 * brevity * math.exp(sum(map(math.log, precisions)) / 4)
    assert bleu(OUTPUTS, REFERENCES).corpus == pytest.approx(expected, rel=1e-9)


def test_bleu_is_that_of_sacrebleu():
    import sacrebleu

    found = bleu(OUTPUTS, REFERENCES)
    assert found.corpus == pytest.approx(
        sacrebleu.corpus_bleu(OUTPUTS, [REFERENCES], tokenize="none", force=True).score, rel=1e-12
    )
    each = [sacrebleu.sentence_bleu(o, [r], tokenize="none").score for o, r in zip(OUTPUTS, REFERENCES, strict=True)]
    assert each[2] == 0  # nothing written is worth nothing, and stays in the mean
    assert found.sentence == pytest.approx(sum(each) / 4, rel=1e-12)
    assert {"tok:none", "nrefs:1", "smooth:exp", "case:mixed"} <= set(found.signature.split("|"))


@pytest.mark.parametrize(("outputs", "value"), [(["one"], 100.0), (["other"], 0.0), ([""], 0.0)])
def test_one_word(outputs, value):
    assert bleu(outputs, ["one"]).sentence == pytest.approx(value)


def test_a_reference_without_a_word_is_counted():
    found = bleu(["a b", "a b c d e"], ["", "a b c d e"])
    assert found.sentence == pytest.approx(50.0) and 0 < found.corpus < 100


def test_bleu_goes_over_lines_and_does_not_warn(caplog):
    assert bleu(["a\n\tb c d ."], ["a b c d ."]).corpus == pytest.approx(100)
    assert not caplog.records


@pytest.mark.parametrize(("outputs", "references"), [([], []), (["a"], ["a", "b"])])
def test_bleu_wants_pairs(outputs, references):
    with pytest.raises(ValueError, match="one by one, got"):
        bleu(outputs, references)


def test_white_space_is_all_that_may_differ():
    assert same_text(" a\t b\n", "a b") and same_text("", " \n")
    assert not same_text("a b", "ab") and not same_text("A", "a") and not same_text("", "a")


def test_python_is_parsed_and_nothing_else(tmp_path):
    fine = [
        "pass",
        "def f ( ) :\n\t \t return 1\n",
        "x = '\\d'",
        "0 is 0",
        "\n\n  # note\nx = 1",
        "# -*- coding: utf8 -*-\nx = 'ü'",
    ]
    wrong = [
        "",
        " \n\t",
        "# only a note",
        "def f(",
        " x = 1",
        "x = 1\n\t y = 2",
        "'\0'",
        "\x00",
        "a" + "\ud800",
        "print 1",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that is not silenced would be raised
        assert [python_parses(text) for text in fine + wrong] == [True] * len(fine) + [False] * len(wrong)
    place = tmp_path / "written"
    assert python_parses(f"open({str(place)!r}, 'w').write('x')") and not place.exists()


@pytest.mark.parametrize(
    "text", ["(" * 5000, "[" * 200 + "]" * 200, "-" * 100_000 + "1", "f" + "(x)" * 50_000, "x = " + "1+" * 50_000 + "1"]
)
def test_what_is_too_deep_for_the_parser_is_no_error(text):
    assert python_parses(text) in (True, False)


def test_repetitive_is_more_than_half_seen_before():
    assert not repetitive([1, 2, 3, 1, 2, 3, 1, 2, 3])  # six 4-grams, three of them different: exactly half
    assert repetitive([1, 2, 3, 1, 2, 3, 1, 2, 3, 1])
    assert repetitive([7] * 6) and not repetitive([7] * 5)
    assert not any(map(repetitive, ([], [1], [1, 1, 1, 1])))
