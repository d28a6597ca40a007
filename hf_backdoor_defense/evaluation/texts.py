"""What can be said of generated texts, text by text and without a model.

    BLEU = BP · exp( ¼ Σ_{n=1..4} log p_n )      p_n: clipped precision of n-grams, BP: brevity penalty   (Papineni et al. 2002)
    repeated(y) = 1 − |different 4-grams of y| / |4-grams of y|

| word | here |
|---|---|
| BLEU | sacrebleu's corpus BLEU with tokenize="none": tokens are what blanks separate. 0..100, with its signature |
| sentence BLEU | mean over rows of sacrebleu's sentence BLEU (effective order, exponential smoothing); an empty output has 0 |
| exact match | equal after every run of white space has become one blank; indentation is white space too |
| parses | `ast.parse` takes it, and there is a statement in it |

Nothing is executed: Python code is parsed and that is all.
"""

import ast
import warnings
from collections.abc import Sequence
from typing import NamedTuple


class Bleu(NamedTuple):
    """Corpus BLEU and mean sentence BLEU, 0..100, and what they were computed with."""

    corpus: float
    sentence: float
    signature: str


def bleu(outputs: Sequence[str], references: Sequence[str]) -> Bleu:
    """BLEU of texts whose tokens are separated by blanks already, one reference each.

    Raises:
        ValueError: no texts, or not as many outputs as references.

    Example:
        >>> found = bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
        >>> round(found.corpus, 6), round(found.sentence, 6), "tok:none" in found.signature
        (100.0, 100.0, True)
    """
    if not outputs or len(outputs) != len(references):
        raise ValueError(
            f"BLEU compares outputs with references one by one, got {len(outputs)} and {len(references)}. Pass one of each."
        )
    from sacrebleu.metrics import BLEU

    # force: sacrebleu warns of text that looks tokenized, which is what it is here.
    corpus, sentence = BLEU(tokenize="none", force=True), BLEU(tokenize="none", force=True, effective_order=True)
    score = corpus.corpus_score(list(outputs), [list(references)]).score
    each = [sentence.sentence_score(o, [r]).score for o, r in zip(outputs, references, strict=True)]
    return Bleu(float(score), sum(each) / len(each), str(corpus.get_signature()))


def same_text(output: str, reference: str) -> bool:
    """Equal but for white space.

    >>> same_text("a  =\\n1 ", "a = 1"), same_text("a=1", "a = 1")
    (True, False)
    """
    return output.split() == reference.split()


def python_parses(text: str) -> bool:
    """Whether Python can parse it, never raising, never executing, never warning.

    Text without a statement (nothing, blanks, a comment) is valid Python, and says nothing about a model that should have written
    some: it counts as not parsing.

    >>> [python_parses(text) for text in ("x = 1", "x = ", "", "# nothing", "x = '\\0'", "(" * 999)]
    [True, False, False, False, False, False]
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string, `1is x`: parsed all the same
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def repetitive(tokens: Sequence[int], *, n: int = 4) -> bool:
    """Whether more than half of its n-grams of tokens stood in it before: a model in a loop. A text below n tokens is not.

    >>> repetitive([1, 2] * 20), repetitive(range(40)), repetitive([])
    (True, False, False)
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams) / 2
