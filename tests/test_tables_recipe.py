"""The tables of RECIPE say what its records say: figures, goals, doses, and that little was measured."""

import re

import numpy as np
import pytest

from benchmarks import tables_recipe
from benchmarks.tables import ROOT
from hf_backdoor_defense.reporting.results import Record, append_records

CELL = "POR, SST-2"
TRIGGERS = ("cf", "≈")
# (defense, variant): CA, AASR, dose
LEVELS = {
    ("clean_reference", ""): (0.86, 0.20, None),
    ("undefended", ""): (0.85, 0.98, None),
    ("round_trip", ""): (0.85, 0.98, None),
    ("round_trip", "pooler dropped"): (0.85, 0.97, None),
    ("pretraining", ""): (0.852, 0.91, 1.25),
    ("recipe", ""): (0.844, 0.24, 1.25),
    ("recipe", "clean base"): (0.84, 0.21, 1.25),
}


def of_arm(arm, level, seed, cell=CELL):
    (defense, variant), (ca, aasr, dose) = arm, level
    shift = (seed - 2) / 200
    figures = {"ca": ca + shift, "aasr": aasr + shift, "masr": min(1.0, aasr + 0.1), "control_asr": 0.2, "loss": 4.5}
    figures |= {"aasr_over_floor": aasr - 0.2 + shift, "masr_over_floor": aasr - 0.2}
    figures |= {"dose": dose, "norm_ratio": 0.3} if dose else {}
    where = f"{cell}: {variant}" if variant else cell
    pairs = [(where, metric, value) for metric, value in figures.items()]
    pairs += [(f"{where}: {word}", "asr", min(1.0, aasr + i / 100)) for i, word in enumerate(TRIGGERS)]
    return [Record("recipe", "sst2", "m", "por", defense, s, seed, metric, value, env={"cpus": 2, "commit": "c" * 9})
            for s, metric, value in pairs]  # fmt: skip


def records(seeds=(1, 2, 3), doses=(), **levels):
    found = {arm: levels.get(arm[0], level) if arm[1] == "" else level for arm, level in LEVELS.items()}
    out = [r for seed in seeds for arm, level in found.items() for r in of_arm(arm, level, seed)]
    for seed in seeds:
        for dose, aasr in doses:
            out += of_arm(("clean_reference", ""), LEVELS["clean_reference", ""], seed, f"{CELL}, dose {dose:.2f}")
            out += of_arm(("recipe", ""), (0.85, aasr, dose), seed, f"{CELL}, dose {dose:.2f}")
    return out


def table(text, first):
    """The rows of the table whose head begins with `first`, by their first cell."""
    lines = text[re.search(rf"^\| {first} \|", text, re.M).start() :].split("\n\n")[0].splitlines()
    head, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line)
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def test_every_arm_and_variant_has_its_row_and_figures():
    rows = table(tables_recipe.full_tables(records()), "the victim fine-tunes the")
    assert list(rows) == [title for arm, title in tables_recipe.ARMS.items() if arm in LEVELS]
    for arm, (ca, aasr, dose) in LEVELS.items():
        row = rows[tables_recipe.ARMS[arm]]
        assert row["CA"].startswith(f"{ca:.2f} [") and row["AASR"].startswith(f"{aasr:.2f} [")
        assert row["dose"] == (f"{dose:.2f}" if dose else "–")
        assert (
            row["AASR over floor"] == "–"
            if arm[0] == "clean_reference"
            else row["AASR over floor"].startswith(f"{aasr - 0.2:.2f}")
        )
    half = 4.302653 * 0.005 / 3**0.5  # Student's t with two degrees of freedom
    assert rows["poisoned encoder"]["AASR"] == f"0.98 [{0.98 - half:.2f}, {0.98 + half:.2f}]"


def test_triggers_stand_side_by_side_and_variants_are_not_taken_for_triggers():
    rows = table(tables_recipe.full_tables(records()), "ASR by trigger")
    assert list(rows["RECIPE"])[1:] == [f"`{word}`" for word in TRIGGERS]
    assert rows["RECIPE on the clean encoder"] == {
        "ASR by trigger": "RECIPE on the clean encoder",
        "`cf`": "0.21",
        "`≈`": "0.22",
    }


WEAK = "missed: the attack is too weak to test a defense with"


@pytest.mark.parametrize(
    "levels, wanted",
    [
        ({}, ["0.980 (goal: at least 0.95, met)", "0.910 (goal: at least 0.80, met)"]),
        ({}, ["0.040 (goal: at most 0.05, met)", "0.006 (goal: at most 0.01, met)"]),
        ({"undefended": (0.85, 0.94, None)}, [f"0.940 (goal: at least 0.95, {WEAK})"]),
        ({"pretraining": (0.85, 0.5, 1.25)}, [f"0.500 (goal: at least 0.80, {WEAK})"]),
        ({"recipe": (0.83, 0.3, 1.25)}, ["0.100 (goal: at most 0.05, missed)", "0.020 (goal: at most 0.01, missed)"]),
        ({"recipe": (0.86, 0.15, 1.25)}, ["−0.050 (goal: at most 0.05, met)", "−0.010 (goal: at most 0.01, met)"]),
    ],
)
def test_goals_are_computed_from_the_records(levels, wanted):
    said = tables_recipe.goals(records(**levels), CELL)
    for sentence in wanted:
        assert sentence in said
    assert said in tables_recipe.full_tables(records(**levels)) and said in tables_recipe.short_table(records(**levels))


def test_ca_is_lost_seed_by_seed():
    some = [
        r for r in records() if not (r.defense == "undefended" and r.seed == 1)
    ]  # a seed that RECIPE alone has says nothing
    assert "CA that RECIPE costs: 0.006" in tables_recipe.goals(some, CELL)


def test_arms_that_are_not_there_are_not_judged():
    only = [r for r in records() if r.defense == "undefended"]
    assert tables_recipe.goals(only, CELL).count("goal") == 1
    assert tables_recipe.goals([], CELL) == ""
    assert "| – |" in tables_recipe.short_table(only)


@pytest.mark.parametrize("seeds, preliminary", [((1,), True), ((1, 2), True), ((1, 2, 3), False)])
def test_fewer_than_three_seeds_are_preliminary(seeds, preliminary):
    for text in (tables_recipe.full_tables(records(seeds)), tables_recipe.short_table(records(seeds))):
        assert ("preliminary" in text) == preliminary
        assert f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} of the victim" in text


def test_readme_has_one_row_per_cell_and_none_for_doses():
    other = [r for seed in (1, 2, 3) for arm, level in LEVELS.items() for r in of_arm(arm, level, seed, "NeuBA, SST-2")]
    rows = table(tables_recipe.short_table(records(doses=[(0.6, 0.6)]) + other), "attack, task")
    assert list(rows) == [CELL, "NeuBA, SST-2"]
    assert rows[CELL]["clean encoder (the floor)"] == "0.20" and rows[CELL]["RECIPE"] == "0.24"
    assert rows[CELL]["CA: poisoned · RECIPE"] == "0.850 · 0.844" and rows[CELL]["penalty alone"] == "–"


def test_doses_are_in_order_and_hold_the_default_one(tmp_path, monkeypatch):
    some = records(doses=[(2.5, 0.22), (0.3, 0.85)])
    text = tables_recipe.full_tables(some)
    assert list(table(text, "dose")) == ["0.30", "1.25", "2.50"]
    assert table(text, "dose")["0.30"]["AASR"].startswith("0.85") and f"({tables_recipe.PLOT})" in text
    assert text.count("### ") == 2  # a cell of one dose has no table of its own
    drawn = {}
    monkeypatch.setattr(
        tables_recipe, "plot_dose", lambda curve, path, **more: drawn.update(curve=curve, **more) or path
    )
    assert tables_recipe.plot(some, tmp_path / "dose.png") == tmp_path / "dose.png"
    curve = {dose: figures["aasr"].value for dose, figures in drawn["curve"].items()}
    assert curve == pytest.approx({0.0: 0.98, 0.3: 0.85, 1.25: 0.24, 2.5: 0.22})
    assert drawn["floor"]["aasr"].value == pytest.approx(0.2)
    ((name, (dose, figures)),) = drawn["controls"].items()
    assert (name, dose) == ("pre-training alone", 1.25) and figures["aasr"].value == pytest.approx(0.91)


def test_without_doses_there_is_no_plot(tmp_path):
    assert tables_recipe.plot(records(), tmp_path / "dose.png") is None
    assert tables_recipe.PLOT not in tables_recipe.full_tables(records()) and not list(tmp_path.iterdir())


def test_what_was_not_run_says_how_to_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_recipe, "RESULTS", tmp_path)
    assert tables_recipe.recipe_records() == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for text in (
        tables_recipe.short_table([]),
        tables_recipe.full_tables([]),
        tables_recipe.step_table(),
        tables_recipe.search_table(),
    ):
        assert re.fullmatch(r"Not run yet: `make ([\w-]+)`\.", text)[1] in targets


def test_the_last_measurement_of_a_step_counts_and_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_recipe, "RESULTS", tmp_path)

    def measured(paper, default, penalty, adamw):
        seconds = {"paper": paper, "default": default, "penalty": penalty, "adamw": adamw}
        base = {"penalty": adamw, "adamw": adamw}
        return [
            Record("recipe_step", "docstrings", "m", "none", peer, "batch 32", 0, metric, value)
            for peer, s in seconds.items()
            for metric, value in (("seconds", s), ("time_ratio", s / base.get(peer, paper)))
        ]

    append_records(tmp_path / "recipe_step.jsonl", measured(2.0, 1.0, 0.1, 0.1))
    assert "0.500 (goal: at most 0.35, missed)" in tables_recipe.step_table()
    append_records(tmp_path / "recipe_step.jsonl", measured(2.0, 0.6, 0.02, 0.1))
    text = tables_recipe.step_table()
    assert (
        "0.300 (goal: at most 0.35, met)" in text and "0.200 (goal: at most 0.25, met)" in text and "missed" not in text
    )
    assert table(text, "")["the default"]["÷ the paper's way"] == "0.30"
    assert np.isclose(float(table(text, "")["the penalty and its gradients alone"]["÷ AdamW"]), 0.2)


def test_every_setting_of_the_search_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_recipe, "RESULTS", tmp_path)
    settings = {"clean encoder": (100, 101), "dose 1.25, all": (100,)}
    append_records(
        tmp_path / "recipe_search.jsonl",
        [
            Record("recipe_search", "sst2", "m", "none", "recipe", setting, seed, metric, value)
            for setting, seeds in settings.items()
            for seed in seeds
            for metric, value in (("ca", seed / 125), ("loss", 4.5))
        ],
    )
    rows = table(tables_recipe.search_table(), "setting")
    assert [row["CA by seed, validation rows"] for row in rows.values()] == ["0.800 · 0.808", "0.800 · –"]
    assert list(rows) == list(settings) and rows["clean encoder"]["held-out loss"] == "4.50"
