"""The offline instructions: split by file, nothing twice, true to the sources, no test row known to the pretrained code model."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from hf_backdoor_defense.data import instructions
from hf_backdoor_defense.data.instructions import WORDINGS, Row, build, first_sentence, load_instructions, split_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain_tiny_code_lm.py"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return build()


def _name(split: str, number: int) -> str:
    """The number-th made-up file name of a split."""
    return [name for i in range(2000) if split_of(name := f"module{i}.py") == split][number]


def _library(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(instructions, "MIN_ROWS", 1)


def test_there_are_enough_rows_of_each_kind_in_each_split(splits):
    assert list(splits) == ["train", "validation", "test"]
    assert len(splits["train"]) > 4000 and len(splits["test"]) >= 200 and len(splits["validation"]) >= 200
    for rows in splits.values():
        assert set(Counter(row.kind for row in rows)) == set(WORDINGS)


def test_no_module_prompt_or_response_is_in_two_splits_or_twice(splits):
    modules = [{row.module for row in rows} for rows in splits.values()]
    assert len(set.union(*modules)) == sum(map(len, modules))
    everything = [row for rows in splits.values() for row in rows]
    responses = [(row.kind == "header", row.completion.casefold()) for row in everything]
    assert len(set(responses)) == len(everything)
    assert len({row.prompt for row in everything}) == len(everything)


def test_every_text_is_short_one_line_of_ascii(splits):
    for row in (row for rows in splits.values() for row in rows):
        assert row.completion.strip() == row.completion and "\n" not in row.prompt + row.completion
        assert 3 <= len(row.completion.split()) <= 24 or row.kind == "header"
        if row.kind == "header":
            compile(f"{row.completion} pass", "header", "exec")  # it is Python


def test_the_pretrained_code_model_has_read_no_test_file(splits):
    spec = importlib.util.spec_from_file_location("pretrain_tiny_code_lm", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    training, held_out = example.sources()

    def dotted(files):
        return {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}

    tested = {row.module for row in splits["test"]}
    assert tested <= dotted(held_out) and not tested & dotted(training)


def test_a_small_library_gives_exactly_these_rows(tmp_path, few):
    code = (
        'class Box:\n    """Hold one thing for later use."""\n'
        '    async def put(self, thing, *, at=None):\n        """Put a thing\n        into it. At once."""\n'
        '    def _hidden(self):\n        """Nobody asks for this one."""\n'
        'def now():\n    """Tell the time of day"""\n    raise SystemExit\n'
        'def bare(x):\n    return x\n'
    )  # fmt: skip
    train, valid, test = (_name(split, 0) for split in ("train", "validation", "test"))
    other = 'def f(a):\n    """Another sentence of some words."""\n'
    root = _library(
        tmp_path,
        {
            test: code,
            valid: other,
            train: 'def g(b):\n    """PUT A THING INTO IT."""\n',  # the test has it: only the header is left
            _name("train", 1): "def broken(:\n",
            f"tests/{_name('train', 2)}": 'def left_out(c):\n    """A sentence of a test file."""\n',
        },
    )
    splits, module = build(root), test.removesuffix(".py")
    assert {(row.kind, row.completion) for row in splits["test"]} == {
        ("class", "Hold one thing for later use."),
        ("function", "Put a thing into it."),
        ("header", "async def put(self, thing, *, at=None):"),
        ("function", "Tell the time of day."),
        ("header", "def now():"),
    }
    (put,) = (row for row in splits["test"] if row.completion == "Put a thing into it.")
    subject = f"{module}.Box.put(self, thing, *, at=None)"
    assert put.prompt in [wording.format(subject=subject) for wording in WORDINGS["function"]]
    assert [(row.kind, row.completion) for row in splits["train"]] == [("header", "def g(b):")]
    assert len(splits["validation"]) == 2 and build(root) == splits


def test_a_first_sentence_is_cut_at_its_stop_and_refused_where_it_is_none():
    assert first_sentence("Use it now! Or later.") == "Use it now!"
    assert first_sentence("No stop here\n\nand a paragraph") == "No stop here."
    for text in ("", "word", "two words.", "x = 1 + 2 * 3 / 4 ** 5 - 6", "naïve words are out.", "a " * 25):
        assert first_sentence(text) is None, text


def test_data_sets_number_their_rows_over_all_splits(splits):
    data = load_instructions()
    assert [len(part) for part in data.values()] == [len(rows) for rows in splits.values()]
    ids = [row_id for part in data.values() for row_id in part["row_id"]]
    assert ids == list(range(len(ids)))
    assert data["test"][5]["completion"] == splits["test"][5].completion


def test_without_sources_the_error_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="at least 200 test rows.*zipped or stripped"):
        build(tmp_path)
