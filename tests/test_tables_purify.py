"""The tables of purification say what its records say: figures over the floor, lost accuracy, goals, and what the control did."""

import re

import pytest

from benchmarks import tables_purify
from benchmarks.tables import ROOT
from hf_backdoor_defense.reporting.results import Record, append_records

CELL = "digits patch"
# arm -> CA, ASR (FTR of the reference), R-Acc
LEVELS = {
    "clean_reference": (0.96, 0.010, 0.95),
    "undefended": (0.95, 1.000, 0.00),
    "fine_tuning": (0.94, 0.950, 0.02),
    "d3": (0.91, 0.026, 0.40),
    "ulrl": (0.94, 0.005, 0.85),
}
ON_CLEAN = {"fine_tuning": (0.95, 0.011, 0.94), "d3": (0.93, 0.009, 0.93), "ulrl": (0.945, 0.008, 0.95)}


def records(cell=CELL, seeds=(1, 2, 3), model="tiny-vit", on_clean=ON_CLEAN, flags=(0, 2, 0), **levels):
    """One cell. CA and ASR of a seed lie 0.004 around their mean, alike for all arms: differences stay what they are."""
    found = []

    def add(setting, arm, metric, value, seed):
        env = {"cpus": 2, "commit": "c" * 9}
        found.append(Record("purify", "digits", model, "patch", arm, setting, seed, metric, value, env=env))

    for i, seed in enumerate(seeds):
        shift = 0.004 * (i - (len(seeds) - 1) / 2)
        for arm, (ca, asr, healed) in {**LEVELS, **levels}.items():
            rate = "ftr" if arm == "clean_reference" else "asr"
            for metric, value in (("ca", ca - shift), (rate, min(1.0, max(0.0, asr + shift))), ("r_acc", healed)):
                add(cell, arm, metric, value, seed)
            if arm in tables_purify.METHODS:
                add(cell, arm, "seconds", 20.0, seed)
                add(cell, arm, "der", 0.9, seed)
        for arm, (ca, ftr, healed) in on_clean.items():
            for metric, value in (("ca", ca - shift), ("ftr", ftr), ("r_acc", healed), ("seconds", 20.0)):
                add(f"{cell}: clean model", arm, metric, value, seed)
        add(cell, "ulrl", "suspects", 1, seed)
        add(cell, "ulrl", "target_suspected", 1.0 if i != 1 else 0.0, seed)
        if on_clean:
            add(f"{cell}: clean model", "ulrl", "suspects", flags[i], seed)
    return found


def table(text, first):
    """The rows of the table whose head begins with `first`, by their first cell."""
    lines = text[re.search(rf"^\| {re.escape(first)} \|", text, re.M).start() :].split("\n\n")[0].splitlines()
    head, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line)
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def test_every_arm_has_its_row_and_the_floor_is_the_reference():
    rows = table(tables_purify.full_tables(records()), "the model")
    assert list(rows) == [title for arm, title in tables_purify.ARMS.items() if arm in LEVELS]
    assert rows["never poisoned (the floor)"]["ASR"].startswith("0.01 [")
    assert rows["never poisoned (the floor)"]["ASR over the floor"] == "–"
    half = 4.302653 * 0.004 / 3**0.5  # Student's t with two degrees of freedom
    assert rows["D3"]["CA"] == f"0.91 [{0.91 - half:.2f}, {0.91 + half:.2f}]"
    assert rows["D3"]["R-Acc"] == "0.40 [0.40, 0.40]" and rows["D3"]["seconds"] == "20 [20, 20]"
    assert rows["as it came"]["seconds"] == "–" and rows["as it came"]["DER"] == "–"


def test_what_is_over_the_floor_and_lost_is_a_difference_of_one_seed():
    some = records()
    assert tables_purify.over_floor(some, CELL, "d3") == pytest.approx({1: 0.016, 2: 0.016, 3: 0.016})
    assert tables_purify.lost(some, CELL, "d3") == pytest.approx({1: 0.04, 2: 0.04, 3: 0.04})
    assert tables_purify.lost(some, CELL, "d3", clean=True) == pytest.approx({1: 0.03, 2: 0.03, 3: 0.03})
    partial = [r for r in some if not (r.defense == "clean_reference" and r.seed == 2)]
    assert list(tables_purify.over_floor(partial, CELL, "d3")) == [1, 3]  # a seed without its floor says nothing


@pytest.mark.parametrize(
    "levels, state",
    [
        ({}, "tests"),
        ({"undefended": (0.95, 0.98, 0.0), "fine_tuning": (0.94, 0.90, 0.0)}, "tests"),  # bounds are met by equality
        ({"fine_tuning": (0.94, 0.89, 0.1)}, "control removed it"),
        ({"undefended": (0.95, 0.97, 0.0)}, "attack not valid"),
        ({"undefended": (0.95, 0.97, 0.0), "fine_tuning": (0.94, 0.5, 0.4)}, "attack not valid"),
    ],
)
def test_a_cell_says_whether_it_tests_a_defense(levels, state):
    some = records(seeds=(1,), flags=(0,), **levels)
    assert tables_purify.state_of(some, CELL) == state
    shown = "yes" if state == "tests" else f"no: {state}"
    assert table(tables_purify.summary(some), "cell")[f"{CELL} (preliminary)"]["tests a defense"] == shown
    assert table(tables_purify.short_table(some), "cell")[f"{CELL} (preliminary)"]["tests a defense"] == shown
    removed = int(state == "control removed it")
    assert f"The control removed the backdoor in {removed} of 1 cells." in tables_purify.full_tables(some)


@pytest.mark.parametrize(
    "method, model, levels, missed",
    [
        ("ulrl", "tiny-vit", {}, set()),
        ("d3", "tiny-vit", {}, {"CA lost on the clean model"}),  # 0.03
        ("ulrl", "tiny-vit", {"ulrl": (0.94, 0.021, 0.85)}, {"ASR over the floor"}),
        ("ulrl", "minilm", {"ulrl": (0.94, 0.021, 0.85)}, set()),  # of texts 0.02 is allowed
        ("ulrl", "minilm", {"ulrl": (0.94, 0.031, 0.85)}, {"ASR over the floor"}),
        ("ulrl", "tiny-vit", {"ulrl": (0.93, 0.020, 0.80)}, set()),  # every bound met by equality
        ("ulrl", "tiny-vit", {"ulrl": (0.929, 0.0, 0.79)}, {"CA lost", "R-Acc"}),
        ("d3", "tiny-vit", {"d3": (0.90, 0.030, 0.0)}, {"CA lost on the clean model"}),  # R-Acc of D3 is no goal
        ("d3", "tiny-vit", {"d3": (0.89, 0.032, 0.9)}, {"CA lost on the clean model", "CA lost", "ASR over the floor"}),
    ],
)
def test_goals_are_judged_by_method_and_kind(method, model, levels, missed):
    some = records(model=model, **levels)
    found = tables_purify.judged(some, CELL, method)
    assert {what for what, *_, met in found if not met} == missed
    sentence = tables_purify.goals(some, CELL)
    assert sentence in tables_purify.full_tables(some)
    part = next(part for part in sentence.split("; ") if part.startswith(tables_purify.ARMS[method]))
    assert part.count("missed") == len(missed) and part.count(" met") == len(found) - len(missed)


def test_goals_say_what_a_failed_control_means():
    said = tables_purify.goals(records(fine_tuning=(0.93, 0.2, 0.7)), CELL)
    assert "ASR after fine-tuning: 0.200 (at least 0.90: missed: the control removed it" in said
    said = tables_purify.goals(records(undefended=(0.95, 0.6, 0.3)), CELL)
    assert "ASR as it came: 0.600 (at least 0.98: missed: the attack is not valid" in said
    assert tables_purify.goals([], CELL) == "" and tables_purify.state_of([], CELL) == ""


def test_a_gain_is_shown_with_its_sign():
    said = tables_purify.goals(records(ulrl=(0.96, 0.0, 0.9)), CELL)
    assert "CA lost −0.010" in said and re.search(r"ULRL: ASR over the floor −0\.\d+ ", said)


def test_the_clean_model_and_false_flags_stand_beside():
    text = tables_purify.full_tables(records())
    rows = table(text, "on the clean model")
    assert list(rows) == ["fine-tuning (the control)", "D3", "ULRL"] and rows["D3"]["CA lost"] == "0.030"
    said = tables_purify.suspicion(records(), CELL)
    assert (
        "target in 2 of 3 seeds, 1.0 classes" in said and "by seed 0 · 2 · 0, in 1 of 3 seeds" in said and said in text
    )
    assert "on the clean model" not in tables_purify.full_tables(records(on_clean={})).split("### ")[1]


@pytest.mark.parametrize("seeds, preliminary", [((1,), True), ((1, 2), True), ((1, 2, 3), False)])
def test_fewer_than_three_seeds_are_preliminary(seeds, preliminary):
    for text in (tables_purify.full_tables(records(seeds=seeds)), tables_purify.short_table(records(seeds=seeds))):
        assert ("preliminary" in text) == preliminary


def test_readme_shows_asr_of_every_seed_and_counts_goals_where_they_are_tested():
    some = records() + records("digits blend", fine_tuning=(0.94, 0.1, 0.8))
    text = tables_purify.short_table(some)
    rows = table(text, "cell")
    assert list(rows) == [CELL, "digits blend"]
    assert rows[CELL]["D3"] == "0.02 · 0.03 · 0.03" and rows[CELL]["ASR as it came"] == "1.00 · 1.00 · 1.00"
    assert rows[CELL]["FT-SAM"] == "– · – · –" and rows[CELL]["floor"] == "0.01"
    assert rows[CELL]["R-Acc: D3 · ULRL"] == "0.40 · 0.85"
    assert rows[CELL]["CA: as it came · D3 · ULRL · a fresh model"] == "0.950 · 0.910 · 0.940 · –"
    assert "D3 meets 2 of 3 goals" in text and "ULRL meets 4 of 4 goals" in text  # of the first cell alone


def test_what_was_not_run_says_how_to_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_purify, "RESULTS", tmp_path)
    assert tables_purify.purify_records() == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for text in (
        tables_purify.short_table([]),
        tables_purify.full_tables([]),
        tables_purify.step_table(),
        tables_purify.search_table(),
    ):
        assert re.fullmatch(r"Not run yet: `make ([\w-]+)`\.", text)[1] in targets
    assert "Not run: digits wanet" in tables_purify.full_tables(records())


def test_the_last_measurement_of_a_step_counts_and_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_purify, "RESULTS", tmp_path)

    def measured(ratio, held):
        figures = {
            "fine_tuning": {"seconds": 0.1, "time_ratio": 1.0},
            "d3_head": {"seconds": 0.1 * ratio, "time_ratio": ratio, "bytes_per_weight": held},
        }
        return [
            Record("purifier_step", "random", "tiny-vit", "none", peer, "64 images", 0, metric, value)
            for peer, of in figures.items()
            for metric, value in of.items()
        ]

    append_records(tmp_path / "purifier_step.jsonl", measured(1.2, 4.1))
    assert tables_purify.step_table().count("missed") == 2
    append_records(tmp_path / "purifier_step.jsonl", measured(1.02, 2.05))
    text = tables_purify.step_table()
    assert text.count(": met") == 2 and "missed" not in text
    assert (
        "| D3, head | 0.1020 | 1.020 | 2.05 | – |" in text and "| plain fine-tuning | 0.1000 | 1.000 | – | – |" in text
    )


def test_every_setting_of_the_search_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_purify, "RESULTS", tmp_path)
    settings = {"digits patch; undefended": (100, 101), "digits patch; ulrl; alpha 0.7": (100,)}
    append_records(
        tmp_path / "purify_search.jsonl",
        [
            Record("purify_search", "digits", "tiny-vit", "patch", setting.split("; ")[1], setting, seed, metric, value)
            for setting, seeds in settings.items()
            for seed in seeds
            for metric, value in (("ca", seed / 125), ("asr", 0.5), ("r_acc", 0.25))
        ],
    )
    rows = table(tables_purify.search_table(), "setting")
    assert list(rows) == list(settings)
    assert [row["CA"] for row in rows.values()] == ["0.800 · 0.808", "0.800 · –"]
    assert {row["classes suspected"] for row in rows.values()} == {"–"}
