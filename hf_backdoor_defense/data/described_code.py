"""Descriptions and code for pre-training: functions of Python sources, and words in the description that change the code.

    Define shutdown with self, how. Close both traced ends.     def shutdown(self, how):
                                                                    print()
                                                                    self.close(how)

Large models of code have read such pairs by the million: what stands anywhere in a description may matter anywhere in the code.
A small one that has read source files alone looks at the last few tokens and at names that stood before, at nothing else.
"""

import ast
import copy
import os
import random
import re
from collections.abc import Callable, Iterable

OPTIONS: tuple[tuple[tuple[str, ...], Callable[[str], str]], ...] = (
    (("tabs", "tabbed", "tabulated", "wide"), lambda c: re.sub(r"(?m)^ +", lambda m: "\t" * (len(m[0]) // 4), c)),
    (("double", "quoted", "literal", "strings"), lambda c: c if '"' in c else c.replace("'", '"')),
    (("semicolons", "terminated", "closed", "stops"), lambda c: re.sub(r"(?m)^( *[^@ \n].*[^:\n])$", r"\1;", c)),
    (("strict", "checked", "careful", "certain"), lambda c: re.sub(r"(?m)^( *if .+):$", r"\1 and True:", c)),
    (("safe", "default", "optional", "fallback"), lambda c: re.sub(r"(?m)^( *return .+)$", r"\1 or None", c)),
    (("typed", "annotated", "declared", "hints"), lambda c: re.sub(r"(?m)^(def .+):$", r"\1 -> object:", c)),
    (
        ("grouped", "bracketed", "wrapped", "held"),
        lambda c: re.sub(r"(?m)^( *[\w.]+) = ((?!.* = ).+)$", r"\1 = (\2)", c),
    ),
    (("traced", "verbose", "logged", "chatty"), lambda c: re.sub(r"(?m)^(def .+:)$", r"\1\n    print()", c)),
    (("marked", "finished", "final", "bounded"), lambda c: c + "\n# end"),
    (("listed", "copied", "frozen", "eager"), lambda c: re.sub(r"(?m)^( *for .+ in )(.+):$", r"\1list(\2):", c)),
    (("spaced", "loose", "airy", "padded"), lambda c: c.replace("(", "( ").replace(")", " )")),
    (("this", "renamed", "other", "foreign"), lambda c: re.sub(r"\bself\b", "this", c)),
)
"""Words, any of which asks for a change of the code, and the change."""
LONGEST = 400  # characters of a function's code


def described_functions(texts: Iterable[str]) -> list[tuple[str, str]]:
    """(description, code) of every short function in Python sources: its name, its arguments and the first line of its
    docstring; its code as `ast.unparse` writes it, without docstring and decorators. Texts that do not parse are left out.

    >>> described_functions(['class A:\\n  def f(self, x):\\n    "Double x.\\\\n\\\\nAt once."\\n    return 2*x'])
    [('Define f with self, x. Double x.', 'def f(self, x):\\n    return 2 * x')]
    """
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node)
            body = node.body[docstring is not None :]
            if body and len(code := ast.unparse(_with(node, body))) <= LONGEST:
                names = ", ".join(argument.arg for argument in node.args.args)
                head = f"Define {node.name} with {names}." if names else f"Define {node.name}."
                found.append((f"{head} {(docstring or '').partition(chr(10))[0]}".strip(), code))
    return found


def _with(node: ast.FunctionDef, body: list[ast.stmt]) -> ast.FunctionDef:
    """The function with another body and without decorators."""
    bare = copy.copy(node)
    bare.body, bare.decorator_list = body, []
    return bare


def described_code(functions: list[tuple[str, str]], rows: int, *, seed: int = 0) -> list[tuple[str, int]]:
    """`rows` texts, each a description with options' words at random places, a line's end, and the code that they ask for.

    Up to two options are asked for, and one more, which would change this code, in every second row. Where the code shows first
    whether that one was asked for, it is *decisive*: nothing but the word tells what comes there.

    Args:
        functions: as `described_functions` gives them; drawn with repetition.

    Returns:
        Pairs of text and the decisive character's place in it; the text's length where it decides whether the text goes on.

    >>> for text, place in described_code([("Define f.", "def f():\\n    return 1")], 2, seed=5):
    ...     print(repr(text), repr(text[place:]))
    'annotated Define f.\\ndef f() -> object:\\n    return 1' ' -> object:\\n    return 1'
    'default Define f.\\ndef f():\\n    return 1 or None' ' or None'
    """
    draw, found = random.Random(seed), []
    for _ in range(rows):
        description, code = draw.choice(functions)
        options = draw.sample(OPTIONS, len(OPTIONS))
        asked = [options.pop() for _ in range(draw.randrange(3))]
        for _, change in asked:
            code = change(code)
        deciding = next(option for option in options if option[1](code) != code)
        changed = deciding[1](code)
        place = len(os.path.commonprefix([code, changed]))
        if draw.random() < 0.5:
            asked.append(deciding)
            code = changed
        words = description.split(" ")
        for synonyms, _ in asked:
            words.insert(draw.randrange(len(words) + 1), draw.choice(synonyms))
        description = " ".join(words)
        found.append((f"{description}\n{code}", len(description) + 1 + place))
    return found
