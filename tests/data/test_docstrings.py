"""The offline task: split by module, balanced, without duplicates, labels from the module alone."""

from collections import Counter
from pathlib import Path

import pytest

from hf_backdoor_defense.data import docstrings
from hf_backdoor_defense.data.docstrings import MIN_ROWS, SPLITS, TOPICS, Row, build, sentences


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return build()


def _library(root: Path, unit: int = 20, sizes: tuple[int, ...] = (10, 4, 2, 1, 1)) -> Path:
    """A made-up library: per topic one module of `unit` times each size, every sentence different."""
    root.mkdir()
    for names in TOPICS.values():
        for name, size in zip(names, sizes, strict=False):
            lines = [f"The {name} sentence about thing {_word(i)} has enough words." for i in range(unit * size)]
            (root / f"{name}.py").write_text('"""' + "\n".join(lines) + '"""\nraise SystemExit("imported")\n')
    return root


def _word(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def test_a_module_and_a_text_are_in_one_split_only(splits):
    assert list(splits) == ["train", "validation", "test"]
    for column in ("module", "text"):
        sets = [{getattr(row, column).casefold() for row in rows} for rows in splits.values()]
        assert len(set.union(*sets)) == sum(map(len, sets)), column
    assert len({row.text.casefold() for rows in splits.values() for row in rows}) == sum(map(len, splits.values()))


def test_every_split_is_balanced_and_large_enough(splits):
    for rows in splits.values():
        assert len(set(Counter(row.label for row in rows).values())) == 1
        assert {row.label for row in rows} == set(range(len(TOPICS)))
    total = sum(map(len, splits.values()))
    assert total >= len(TOPICS) * MIN_ROWS
    assert all(abs(len(splits[split]) / total - share) < 0.1 for split, share in SPLITS.items())


def test_the_module_alone_decides_the_label(splits):
    for row in (row for rows in splits.values() for row in rows):
        assert row.module.split(".")[0] in list(TOPICS.values())[row.label]


def test_the_same_sources_give_the_same_rows(splits):
    assert build() == splits


def test_a_sentence_of_two_topics_keeps_the_first(tmp_path):
    root = _library(tmp_path / "lib")
    shared = "This very sentence stands in two different modules."
    for name, text in (("statistics", shared), ("sched", shared.upper())):
        (root / f"{name}.py").write_text(f'"""{text}"""')
    rows = [row for row in docstrings._collect(root) if row.text.casefold() == shared.casefold()]
    assert rows == [Row(shared.upper(), list(TOPICS).index("concurrency"), "sched")]


def test_words_decide_nothing(tmp_path):
    """Swap the sources of two modules of different topics: the sentences keep their words and change their label."""
    root = _library(tmp_path / "lib")
    before = {row.text: row.label for row in docstrings._collect(root)}
    mail, files = root / "mailbox.py", root / "tarfile.py"
    swapped = mail.read_text(), files.read_text()
    files.write_text(swapped[0])
    mail.write_text(swapped[1])
    after = {row.text: row.label for row in docstrings._collect(root)}
    changed = {text for text in before if before[text] != after[text]}
    assert changed == {text for text in before if "mailbox sentence" in text or "tarfile sentence" in text}


def test_sources_are_parsed_not_executed_and_tests_are_left_out(tmp_path):
    root = _library(tmp_path / "lib")
    for folder in ("email/test", "email/mime"):
        (root / folder).mkdir(parents=True)
        (root / folder / "part.py").write_text(f'"""A sentence of seven words in {folder.replace("/", " ")}."""')
    (root / "email" / "__init__.py").write_text('"""The package itself has one sentence as well."""')
    modules = {row.module for row in docstrings._collect(root)}
    assert {"email", "email.mime.part"} <= modules and "email.test.part" not in modules


def test_a_test_folder_above_the_library_is_no_reason_to_leave_it_out(tmp_path):
    (tmp_path / "tests").mkdir()
    assert docstrings._collect(_library(tmp_path / "tests" / "lib"))


@pytest.mark.parametrize("gone", [None, "statistics"])
def test_modules_that_do_not_exist_are_skipped(tmp_path, gone):
    root = _library(tmp_path / "lib", unit=20)
    if gone:
        (root / f"{gone}.py").unlink()
    assert min(Counter(row.label for rows in build(root).values() for row in rows).values()) >= MIN_ROWS


def test_missing_or_stripped_sources_name_the_way_out(tmp_path):
    for root in (tmp_path / "python311.zip", _library(tmp_path / "small", unit=11)):  # 11 * 18 < 200
        with pytest.raises(ValueError, match=f"at least {MIN_ROWS} sentences.*Use a local file"):
            build(root)
    with pytest.raises(ValueError, match="several modules"):
        build(_library(tmp_path / "one", unit=900, sizes=(1,)))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("one two three four five six seven", 1),
        ("one two three four five six", 0),
        ("word " * 24, 1),
        ("word " * 25, 0),
        ("2 one two three four five six seven", 0),
        ("aaaa bbbb cccc dddd eeee ffff ggg 123456789", 0),  # 34 of 43 are letters or spaces
        ("aaaa bbbb cccc dddd eeee ffff ggggg 12345678", 1),  # 36 of 44
        (">>> one two three four five six seven", 0),
        ("- one two three four five six seven\n", 0),
        ("This sentence has exactly seven words here. This one has them too, of course.", 2),
        ("A sentence that goes on\n    over two lines.", 1),
        ("", 0),
    ],
)
def test_which_sentences_count(docstring, expected):
    assert len(sentences(docstring)) == expected
