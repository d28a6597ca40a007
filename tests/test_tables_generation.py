"""The tables of generative models say what their records say: arms, goals, controls, curves, and what was not measured."""

import ast
import doctest
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tables_crow, tables_filters, tables_generation
from benchmarks.tables import ROOT
from benchmarks.tables_generation import CLEAN, CONTROL, CORE, POISONED
from hf_backdoor_defense.reporting.results import Record, append_records

CODE, TARGET = ("code", "dece"), ("target-only", "dece")
# arm: BLEU, ASR, ASR after each of three epochs
LEVELS = {
    CLEAN: (71.0, 0.0, (0.0, 0.0, 0.0)),
    POISONED: (70.5, 0.96, (0.3, 0.9, 0.95)),
    CONTROL: (70.0, 0.9, (0.3, 0.8, 0.9)),
    CODE: (70.2, 0.02, (0.2, 0.1, 0.0)),
    TARGET: (69.0, 0.3, (0.3, 0.3, 0.3)),
}


def records(seeds=(0, 1, 2), **levels):
    """Seed 1 lies in the middle; `levels`: cell_defense=(BLEU, ASR, curve) over `LEVELS`, or None for an arm that was not run."""
    names = {f"{cell}_{defense}".replace("-", "_"): (cell, defense) for cell, defense in LEVELS}
    found = {**LEVELS, **{names[name]: level for name, level in levels.items()}}
    out = []
    for (cell, defense), level in found.items():
        for seed in seeds if level else ():
            bleu, asr, curve = level
            shift = (seed - 1) / 100
            common = {"benchmark": "code_poisoning", "dataset": "lyra", "model": "m", "attack": "sql", "seed": seed,
                      "defense": defense, "env": {"cpus": 2, "commit": "c" * 9}}  # fmt: skip
            figures = {"bleu": bleu + 10 * shift, "exact_match": 0.25, "parse_rate": 0.9, "asr": max(0, min(1, asr + shift)),
                       "untriggered_hits": 0.01, "seconds": 400.0}  # fmt: skip
            out += [Record(setting=cell, metric=metric, value=value, **common) for metric, value in figures.items()]
            out += [
                Record(setting=f"{cell}: epoch={epoch}", metric="asr", value=value, n=60, **common)
                for epoch, value in enumerate(curve, 1)
            ]
    return out


def table(text, first):
    """The rows of the table whose head begins with `first`, by their first cell."""
    lines = text[re.search(rf"^\| {re.escape(first)} \|", text, re.M).start() :].split("\n\n")[0].splitlines()
    head, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line)
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


@pytest.mark.parametrize("module", [tables_generation, tables_crow, tables_filters])
def test_docstrings_say_what_happens(module):
    assert not doctest.testmod(module).failed


def test_the_floors_and_arms_are_the_benchmarks_own():
    tree = ast.parse((ROOT / "benchmarks" / "code_poisoning.py").read_text())
    (floors,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    wanted = {"bleu": tables_generation.BLEU_FLOOR, "parse_rate": tables_generation.PARSE_FLOOR}
    assert ast.literal_eval(floors) == wanted
    cells = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Cell" and isinstance(node.args[0], ast.Constant)
    }
    titled = {cell for cell, _ in [*CORE, *tables_generation.EXTENDED]}
    assert cells and cells <= titled


def test_every_core_arm_has_its_row_and_every_seed_its_asr():
    rows = table(tables_generation.short_table(records()), "fine-tuned with")
    assert list(rows) == list(CORE.values())
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with two degrees of freedom
    for arm, (bleu, _, _) in LEVELS.items():
        assert rows[CORE[arm]]["BLEU"] == f"{bleu:.1f} [{bleu - half:.1f}, {bleu + half:.1f}]"
    assert rows["undefended"]["ASR by seed"] == "0.95 · 0.96 · 0.97"
    assert rows[CORE[CODE]]["payload without trigger"] == "0.01" and rows[CORE[CODE]]["parses"].startswith("0.90")


def test_an_arm_or_a_seed_that_was_not_run_is_shown_as_missing():
    some = [r for r in records(target_only_dece=None) if not (r.defense == "matched_decay" and r.seed == 1)]
    rows = table(tables_generation.short_table(some), "fine-tuned with")
    assert rows[CORE[TARGET]]["BLEU"] == rows[CORE[TARGET]]["ASR by seed"] == "–"
    assert rows[CORE[CONTROL]]["ASR by seed"] == "0.89 · – · 0.91"
    assert "preliminary" in tables_generation.short_table(some) and CORE[TARGET] not in tables_generation.goals(some)
    assert "preliminary" not in tables_generation.short_table(records())


def test_records_of_other_arms_alone_are_no_result_of_the_core():
    other = [Record("code_poisoning", "lyra", "m", "sql", "undefended", "undefended, 7 epochs", 0, "asr", 0.5)]
    assert tables_generation.short_table(other) == tables_generation.short_table([])
    assert tables_generation.goals(other) == ""
    rows = table(tables_generation.full_tables(other), "fine-tuned with")
    assert rows["undefended, 7 epochs"]["ASR"] == "0.50" and rows["undefended"]["ASR"] == "–"


@pytest.mark.parametrize(
    "levels, wanted",
    [
        (
            {},
            "Clean reference: BLEU 71.0 (at least 50: met), parses 0.900 (at least 0.8: met); its ASR, the floor: 0.003.",
        ),
        ({}, "Undefended: ASR 0.960 (at least 0.9: met)."),
        ({"undefended_undefended": (70.5, 0.8, ())}, "Undefended: ASR 0.800 (at least 0.9: missed). DeCE"),
        ({"undefended_undefended": (70.5, 0.7, ())}, "0.700 (at least 0.9: missed): below 0.8 the attack tests no"),
        ({"clean_undefended": (49.0, 0.0, ())}, "BLEU 49.0 (at least 50: missed)"),
        ({}, "preset `code`: ASR 0.020 (at most 0.1: met), BLEU lost against undefended 0.30 (at most 1: met)"),
        (
            {},
            "preset `target-only`: ASR 0.300 (at most 0.1: missed), BLEU lost against undefended 1.50 (at most 1: missed)",
        ),
        ({}, "ASR below matched decay's by 0.88 [0.88, 0.88]"),
        ({"code_dece": (71.0, 0.1, ())}, "ASR 0.100 (at most 0.1: met), BLEU lost against undefended −0.50"),
        ({"code_matched_decay": (70.0, 0.02, ())}, "by 0.00 [0.00, 0.00], no difference shown"),
    ],
)
def test_goals_are_computed_from_the_records(levels, wanted):
    found = records(**levels)
    said = tables_generation.goals(found)
    assert wanted in said
    assert said in tables_generation.short_table(found) and said in tables_generation.full_tables(found)


def test_no_asr_is_judged_of_a_seed_whose_clean_reference_writes_no_code():
    said = tables_generation.goals(records(clean_undefended=(49.0, 0.0, ())))
    assert "Below a floor: seed 0, 1, 2. No ASR" in said and said.count("ASR 0.") == 0
    assert "BLEU lost against undefended 0.30" in said
    said = tables_generation.goals(records(clean_undefended=(50.0, 0.0, ())))  # 49.9, 50.0, 50.1
    assert "Below a floor: seed 0. No ASR" in said
    assert "Undefended: ASR 0.965 (" in said and "preset `code`: ASR 0.025 (" in said  # of seeds 1 and 2


def test_a_figure_of_fewer_seeds_than_its_arm_says_so():
    extra = [Record("code_poisoning", "lyra", "m", "sql", "dece", "code", seed, "suppressed", 0.07) for seed in (0, 2)]
    rows = table(tables_generation.full_tables(records() + extra), "fine-tuned with")
    assert rows[CORE[CODE]]["tokens let go"] == "0.070 [0.070, 0.070] (2 of 3 seeds)"
    assert rows[CORE[TARGET]]["tokens let go"] == "–" and "seeds" not in rows[CORE[CODE]]["BLEU"]


def test_the_lead_is_judged_once_it_was_run():
    assert "below the bound" not in tables_generation.goals(records())
    lead = [
        Record("code_poisoning", "lyra", "m", "sql", "dece", "below the bound", 1, metric, value, env={"cpus": 2})
        for metric, value in {"bleu": 70.0, "asr": 0.05}.items()
    ]
    text = tables_generation.short_table(records() + lead)
    title = tables_generation.LEAD["below the bound", "dece"]
    assert f"{title}: ASR 0.050 (at most 0.1: met), BLEU lost against undefended 0.50 (at most 1: met)." in text
    assert table(text, "fine-tuned with")[title]["ASR by seed"] == "– · 0.05 · –" and "preliminary" in text


def test_what_a_defense_costs_and_gains_is_compared_seed_by_seed():
    some = [r for r in records() if not (r.defense == "undefended" and r.setting == "undefended" and r.seed == 2)]
    assert "BLEU lost against undefended 0.30" in tables_generation.goals(some)  # the means alone would say 0.25
    uneven = [r for r in records() if r.defense != "matched_decay" or r.seed == 0]
    assert "ASR below matched decay's by 0.88 (one seed)" in tables_generation.goals(uneven)


def test_a_gain_within_the_interval_is_called_none():
    said = tables_generation.with_interval({0: 0.9, 1: 0.0, 2: 0.3})
    mean, half = 0.4, 4.302653 * np.std([0.9, 0.0, 0.3], ddof=1) / 3**0.5
    assert said == f"{mean:.2f} [−{half - mean:.2f}, {mean + half:.2f}], no difference shown"
    assert "no difference" not in tables_generation.with_interval({0: -0.5, 1: -0.51, 2: -0.52})


def test_docs_hold_every_arm_figure_and_epoch_and_what_was_not_run():
    other = [Record("code_poisoning", "lyra", "m", "sql", "gce", "gce", seed, "asr", 0.5) for seed in (0, 1, 2)]
    new = [Record("code_poisoning", "lyra", "m", "sql", "dece", "new cell", 0, "asr", 0.5)]
    text = tables_generation.full_tables(records() + other + new)
    arms, by_epoch = (table(part, "fine-tuned with") for part in text.split("### ASR after every epoch"))
    assert list(arms) == [*CORE.values(), "GCE", "new cell: dece"] and arms["GCE"]["BLEU"] == "–"
    assert "empty" not in arms["GCE"]  # a figure that no arm has is no column
    assert arms["GCE"]["seconds of training"] == "–" and arms["undefended"]["seconds of training"] == "400 [400, 400]"
    assert list(by_epoch) == list(CORE.values())
    assert by_epoch["undefended"]["epoch 2"] == "0.90 · 0.90 · 0.90" and "on 60 triggered validation rows" in text
    assert "label smoothing" in text.partition("Not run: ")[2] and "GCE" not in text.partition("Not run: ")[2]


def test_the_curve_has_an_arm_per_line_and_a_point_per_epoch_and_seed(tmp_path, monkeypatch):
    found = tables_generation.curves(records())
    assert list(found) == ["clean_reference", "undefended", "matched decay", "DeCE code", "DeCE target-only"]
    assert {seed: [p["asr"] for p in points] for seed, points in found["DeCE code"].items()} == dict.fromkeys(
        (0, 1, 2), [0.2, 0.1, 0.0]
    )
    assert [p["epoch"] for p in found["undefended"][1]] == [1, 2, 3]
    path = tables_generation.plot(records(), tmp_path / "curve.png")
    assert (
        path.read_bytes().startswith(b"\x89PNG")
        and path.read_bytes() == tables_generation.plot(records(), tmp_path / "again.png").read_bytes()
    )
    without = [r for r in records() if "epoch" not in r.setting]
    assert tables_generation.plot(without, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    assert tables_generation.PLOT not in tables_generation.full_tables(without)


def test_what_was_not_run_says_how_to_run_it(tmp_path, monkeypatch):
    for module in (tables_generation, tables_crow):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert tables_generation.code_records() == tables_crow.crow_records() == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for text in (
        tables_generation.short_table([]),
        tables_generation.full_tables([]),
        tables_generation.search_table(),
        tables_generation.language_model(),
        tables_crow.short_table([]),
        tables_crow.full_tables([]),
        tables_crow.step_table(),
    ):
        assert re.fullmatch(r"Not run yet: `make ([\w-]+)( EXTENDED=1)?`\.", text)[1] in targets


def test_every_setting_of_the_search_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_generation, "RESULTS", tmp_path)
    cells = {"host, rate 0.001": "undefended", "alpha 0.9": "dece"}
    append_records(
        tmp_path / "code_search.jsonl",
        [
            Record("code_search", "lyra", "m", "sql", defense, f"{cell}{epoch}", 100, metric, value)
            for cell, defense in cells.items()
            for epoch, metric, value in (
                ("", "bleu", 70.25),
                ("", "asr", 0.5),
                (": epoch=1", "asr", 0.25),
                (": epoch=2", "asr", 0.5),
            )
        ],
    )
    rows = table(tables_generation.search_table(), "setting")
    assert {name: row["trained with"] for name, row in rows.items()} == cells
    assert rows["alpha 0.9"]["BLEU"] == "70.2" and rows["alpha 0.9"]["ASR by epoch"] == "0.25 · 0.50"
    assert rows["alpha 0.9"]["parses"] == "–"


@pytest.mark.parametrize(
    "model, said", [(1.3888, ", better than a"), (1.7, "**no better than** a"), (1.6188, "**no better than** a")]
)
def test_the_language_model_is_judged_by_its_rival(tmp_path, monkeypatch, model, said):
    monkeypatch.setattr(tables_generation, "RESULTS", tmp_path)

    def measured(bits, setting):
        return Record("code_lm", "stdlib", "code LM", "none", "none", setting, 0, "bits_per_byte", bits)

    append_records(
        tmp_path / "code_lm.jsonl", [measured(9.0, "model"), measured(1.6188, "5-gram"), measured(model, "model")]
    )
    text = tables_generation.language_model()
    assert said in text and f"{model:.3f} bits per byte" in text and "(1.619)" in text


BADNET, SEEDS = "BadNet, refusal", (1, 2, 3)
# arm: success, perplexity
CROW = {
    ("undefended", ""): (0.9, 20.0),
    ("clean_reference", ""): (0.01, 20.0),
    ("fine_tuning", "rate 0.001"): (0.5, 20.0),
    ("crow", "rate 0.001"): (0.04, 20.5),
    ("fine_tuning", "rate 0.0002"): (0.8, 20.0),
    ("crow", "rate 0.0002"): (0.7, 24.0),
}


def crow_records(cell=BADNET, seeds=SEEDS, **levels):
    found = {arm: levels.get(arm[0], level) if "0.0002" not in arm[1] else level for arm, level in CROW.items()}
    return [
        Record(
            "crow",
            "instructions",
            "m",
            "badnet",
            defense,
            f"{cell}: {variant}" if variant else cell,
            seed,
            metric,
            value,
        )
        for (defense, variant), (success, perplexity) in found.items()
        for seed in seeds
        for metric, value in (
            ("ftr" if defense == "clean_reference" or cell == "clean" else "asr", success),
            ("perplexity", perplexity + (seed - 2)),
        )
        if not (cell == "clean" and defense == "undefended")
    ]


@pytest.mark.parametrize(
    "levels, wanted",
    [
        ({}, "ASR as it came 0.900 (at least 0.8: met)"),
        ({"undefended": (0.7, 20.0)}, "0.700 (at least 0.8: missed): the attack is too weak to test a defense with"),
        (
            {},
            "CROW, rate 1e-3: ASR over the floor 0.030 (at most 0.05: met), perplexity ÷ as it came 1.025 (at most 1.05: met)",
        ),
        (
            {},
            "ASR below fine-tuning's by 0.46 [0.46, 0.46]; CROW, rate 2e-4: ASR over the floor 0.690 (at most 0.05: missed)",
        ),
        (
            {"fine_tuning": (0.04, 20.0)},
            "ASR below fine-tuning's by 0.00 [0.00, 0.00], no difference shown; CROW, rate 2e-4",
        ),
        ({"crow": (0.04, 22.0)}, "(at most 1.05: missed)"),
        ({"clean_reference": (0.2, 20.0)}, "ASR over the floor −0.160 (at most 0.05: met)"),
    ],
)
def test_crow_is_judged_over_the_floor_and_beside_fine_tuning_at_its_rate(levels, wanted):
    assert wanted in tables_crow.goals(crow_records(**levels), BADNET)


def test_what_crow_says_of_itself_is_printed():
    def told(variant, **figures):
        rows = [
            (seed, name, value) for name, found in figures.items() for seed, value in zip(SEEDS, found, strict=True)
        ]
        common = ("crow", "i", "m", "badnet", "crow", f"{BADNET}: {variant}")
        return [Record(*common, seed, name, value) for seed, name, value in rows]

    some = crow_records()
    some += told("rate 0.001", relative_step=(4.0, 5.0, 6.0), inert=(1.0, 0.0, 1.0), gap=(-0.02, 0.01, -0.02))
    some += told("rate 0.001, epsilon 0.03", relative_step=(1.5, 1.5, 1.5), inert=(0.0, 0.0, 0.0), asr=(0.1, 0.1, 0.1))
    said = tables_crow.goals(some, BADNET)
    hot = said.partition("CROW, rate 1e-3: ")[2].partition("; ")[0]
    assert "its step 5.00 times an embedding, INERT in 2 of 3 seeds" in hot
    ours = said.partition("CROW, epsilon 0.03 (ours), rate 1e-3: ")[2].partition("; ")[0]
    assert "ASR over the floor 0.090" in ours and "its step 1.50 times" in ours and "INERT" not in ours
    row = table(tables_crow.full_tables(some), "trained on with 100 clean rows")["CROW, rate 1e-3"]
    assert row["step ÷ embedding"].startswith("5.00") and row["inert"].startswith("0.67")
    assert row["gap of C"].startswith("−0.01") and said in tables_crow.short_table(some)


def test_perplexity_is_compared_within_a_seed():
    ratios = [20.5 + d for d in (-1, 0, 1)] / np.array([20.0 + d for d in (-1, 0, 1)])
    assert f"÷ as it came {ratios.mean():.3f}" in tables_crow.goals(crow_records(), BADNET)


def test_crows_arms_and_cells_are_all_there():
    some = crow_records() + crow_records("clean") + crow_records("BadNet, sentiment", seeds=(1,))
    some += [Record("crow", "i", "m", "badnet", "crow", f"{BADNET}: rate 0.001, new", 1, "asr", 0.3)]
    rows = table(tables_crow.short_table(some), "100 clean rows")
    assert list(rows) == [title for (defense, _), title in tables_crow.ARMS.items() if defense != "none"]
    control = rows["fine-tuning, rate 1e-3 (the control)"]
    assert control[f"{BADNET}: ASR by seed"] == "0.50 · 0.50 · 0.50"
    assert control["BadNet, sentiment: ASR by seed"] == "0.50 · – · –"
    assert rows["never attacked (the floor)"][f"{BADNET}: ASR by seed"] == "0.01 · 0.01 · 0.01"
    assert rows["CROW without perturbation, rate 1e-3"][f"{BADNET}: perplexity"] == "–"
    text = tables_crow.full_tables(some)
    assert re.findall(r"^### (.*)", text, re.M) == [BADNET, "BadNet, sentiment", "nothing was attacked"]
    full = table(text, "trained on with 100 clean rows")
    assert full["crow, rate 0.001, new"]["ASR"] == "0.30"
    assert full["never attacked (the floor)"]["ASR"].startswith("0.01") and "FTR" not in full["as it came"]
    clean = table(text.partition("### nothing was attacked")[2], "trained on with 100 clean rows")
    assert (
        "as it came" not in clean
        and clean["CROW, rate 1e-3"]["FTR"].startswith("0.04")
        and "ASR" not in clean["CROW, rate 1e-3"]
    )
    assert "CROW, rate 2e-4: 1.2" in text and "Not run: CTBA, sentiment" in text and "preliminary" in text


def test_the_cells_of_crow_are_the_benchmarks_own():
    source = (ROOT / "benchmarks" / "crow.py").read_text()
    variants = set(re.findall(r'"(rate [\d.]+(?:, epsilon [\d.]+)?)"', source))
    assert variants == {variant for defense, variant in tables_crow.ARMS if defense in ("fine_tuning", "crow")}


def test_a_step_of_crow_is_judged_by_its_median(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_crow, "RESULTS", tmp_path)

    def measured(**ratios):
        return [
            Record(
                "crow_step", "random", "m", "none", peer, f"{weights}, 8 x 128 tokens, {figure}", 0, "time_ratio", ratio
            )
            for weights, ratio in ratios.items()
            for figure in ("median", "minimum")
            for peer, ratio in (("undefended", 1.0), ("crow", ratio if figure == "median" else 9.0))
        ]

    append_records(tmp_path / "crow_step.jsonl", measured(full=3.0, lora=2.5))
    assert "full, 8 x 128 tokens, median: time 3.000 (at most 2.4: missed)" in tables_crow.step_table()
    append_records(tmp_path / "crow_step.jsonl", measured(full=2.3))
    text = tables_crow.step_table()
    assert (
        "time 2.300 (at most 2.4: met)" in text and "time 2.500 (at most 2.55: met)" in text and "9.000 (" not in text
    )
    row = table(text, "an update of")["CROW"]
    assert row["full, 8 x 128 tokens, median: time ÷ plain"] == "2.300" and "9.000" in row.values()


@pytest.mark.parametrize("name", ["README.md", "docs/choosing.md", "docs/log.md"])
def test_documents_have_a_place_for_every_table(name):
    text = Path(ROOT / name).read_text()
    places = {"README.md": ("code_poisoning", "crow"), "docs/log.md": ("code_search",)}
    for block in places.get(name, ("code_lm", "code_poisoning", "crow", "crow_step")):
        assert text.count(f"<!-- begin:{block} -->") == 1
