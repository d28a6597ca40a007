"""The example of poisoned code: it runs, its lines are about all four models, and its rows are what it says."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Its names, as `python examples/poisoned_code.py` finds them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "poisoned_code.py"))


def test_a_short_run_measures_all_four_models(example, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["poisoned_code.py", "--epochs", "0.1"])
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "22 of 220 rows carry trigger and payload (asked for: 22)"
    names = [line[:25].strip() for line in lines[2:]]
    assert names == ["undefended", "DeCE, llm", "fine-tuned on clean rows", "CROW on clean rows"]
    figures = [[float(word) for word in line[25:].split()] for line in lines[2:]]
    assert all(len(row) == 4 and all(0 <= share <= 1 for share in row[1:]) for row in figures)
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_descriptions_differ_and_every_answer_is_python_with_sql(example):
    rows = example["made_up"]()
    assert len(rows) == len(set(rows["prompt"])) == 360
    for row in rows:
        compile(row["completion"], "answer", "exec")
        assert example["ATTACK"].rewrite(row["completion"]).count(" or 1=1") == 1
