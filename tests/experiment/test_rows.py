"""Files of texts: what is read is what was written, what cannot be read names its line, what was cut off is made again."""

import csv
import json

import pytest

from hf_backdoor_defense.experiment.rows import append_lines, blocks, check_rows, read_rows, whole_lines

TEXTS = ["plain", "", "one", 'quotes " and, commas', "two\nlines", "ünïcödé 日本", " \t ", "x" * 200_000]


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.CSV"])
def test_every_row_comes_back_in_order(tmp_path, name):
    rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
    path = tmp_path / name
    write(path.with_suffix(path.suffix.lower()), rows).rename(path)
    assert list(read_rows(path)) == rows
    assert check_rows(path).rows == len(rows)


def test_a_byte_order_mark_and_a_missing_last_newline_change_nothing(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}')
    assert [row["text"] for row in read_rows(path)] == ["a", "b"]


def test_reading_holds_one_row_at_a_time(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\nnot json\n')
    rows = read_rows(path)
    assert next(rows) == {"text": "a"}  # the second line has not been looked at
    with pytest.raises(ValueError, match="line 2"):
        next(rows)


BAD = {
    "no text": ("in.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2 has no column 'text'.*perhaps --text_column txt"),
    "a number": ("in.jsonl", '{"text": "a"}\n\n{"text": 3}\n', "line 3 must have a string.*got 3"),
    "null": ("in.jsonl", '{"text": null}\n', "line 1 must have a string.*None"),
    "a list": ("in.jsonl", '["text"]\n', "line 1 must be a JSON object, got list"),
    "torn": ("in.jsonl", '{"text": "a"}\n{"text": "b', "line 2 must be a JSON object"),
    "half a pair": ("in.jsonl", '{"text": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
    "a column too few": ("in.csv", "id,text\n1,a\n2\n", "line 3 must have 2 fields"),
    "a column too many": ("in.csv", "id,text\n1,a,b\n", "line 2 must have 2 fields"),
    "one name twice": ("in.csv", "text,text\na,b\n", "names a column twice"),
    "an open quote": ("in.csv", 'text\n"a\n', "is no CSV"),
    "nothing": ("in.jsonl", "\n \n", "holds no rows"),
    "only a header": ("in.csv", "text\n", "holds no rows"),
    "another format": ("in.tsv", "text\na\n", "must end in .jsonl or .csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_named_with_its_line(tmp_path, name):
    file, content, match = BAD[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=match):
        check_rows(tmp_path / file)


def test_other_bytes_than_utf8_and_a_missing_file(tmp_path):
    (tmp_path / "in.csv").write_bytes("text\nä\n".encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8"):
        check_rows(tmp_path / "in.csv")
    with pytest.raises(ValueError, match="There is no file"):
        check_rows(tmp_path / "gone.jsonl")


def test_a_column_that_would_be_overwritten_is_refused(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b", "score": 1}])
    assert check_rows(path).rows == 2
    with pytest.raises(ValueError, match="row 2 has the column score"):
        check_rows(path, taken=("score", "flagged"))


def test_the_hash_is_of_the_content(tmp_path):
    first, second = (write(tmp_path / name, [{"text": "a"}]) for name in ("1.jsonl", "2.jsonl"))
    assert check_rows(first).sha256 == check_rows(second).sha256
    append_lines(second, [{"text": "b"}])
    assert check_rows(first).sha256 != check_rows(second).sha256


@pytest.mark.parametrize(("n", "size"), [(0, 3), (1, 3), (6, 3), (7, 3)])
def test_blocks_are_the_rows_cut(n, size):
    found = list(blocks(({"i": i} for i in range(n)), size))
    assert [row["i"] for block in found for row in block] == list(range(n))
    assert all(len(block) == size for block in found[:-1]) and len(found) == -(-n // size)


@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_a_torn_last_line_is_removed_and_the_others_stay(tmp_path, cut):
    path = tmp_path / "scores.jsonl"
    assert whole_lines(path) == 0
    append_lines(path, [{"index": 0, "text": "日本"}, {"index": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 2'[:cut])
    assert whole_lines(path) == 2 and path.read_bytes() == whole


def test_answers_out_of_place_are_refused_and_not_touched(tmp_path):
    path = tmp_path / "scores.jsonl"
    append_lines(path, [{"index": 0}, {"index": 2}])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2 is not the answer to row 1"):
        whole_lines(path)
    assert path.read_bytes() == before
