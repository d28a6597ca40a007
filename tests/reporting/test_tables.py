"""Tables against numbers computed by hand (numpy, scipy.stats) and read back from the text."""

import re

import numpy as np
import pytest
from scipy import stats

from hf_backdoor_defense.evaluation.metrics import Estimate
from hf_backdoor_defense.reporting.results import Record
from hf_backdoor_defense.reporting.tables import (
    COLUMNS,
    Row,
    format_estimate,
    render_markdown,
    render_terminal,
    replace_block,
    seeds_note,
    summarize,
)

ARMS = ("trajectory", "fine_tuning", "dece", "undefended", "tfidf", "clean_reference", "majority", "matched_decay")


def record(defense: str, metric: str, value: float, seed: int = 0, **changed: object) -> Record:
    base = dict(benchmark="trajectory", dataset="sst2", model="minilm", attack="badnets", setting="")
    return Record(**{**base, **changed}, defense=defense, metric=metric, value=value, seed=seed)


def comparison(seeds: int, rng_seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(rng_seed)
    out = []
    for arm in ARMS:
        for seed in range(seeds):
            shares = ("ca", "ftr" if arm == "clean_reference" else "asr", "r_acc")
            values = {metric: float(rng.random()) for metric in shares}
            values |= {"time_ratio": float(rng.uniform(0.5, 3)), "peak_bytes": float(rng.integers(1, 2**34))}
            for metric, value in values.items():
                interval = dict(n=100, low=0.9 * value, high=1.1 * value)
                out.append(record(arm, metric, value, seed, **interval))
    return out


def parse(cell: str) -> list[float]:
    return [float(x.replace("−", "-")) for x in re.findall(r"−?\d+(?:\.\d+)?", cell)]


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_means_and_intervals_equal_those_of_scipy(seeds: int) -> None:
    records = comparison(seeds)
    for row in summarize(records):
        for metric, estimate in row.estimates.items():
            values = [r.value for r in records if (r.defense, r.metric) == (row.defense, metric)]
            low, high = stats.t.interval(0.95, seeds - 1, loc=np.mean(values), scale=stats.sem(values))
            assert (estimate.value, estimate.low, estimate.high) == pytest.approx((np.mean(values), low, high))
            assert (estimate.n, row.seeds[metric]) == (seeds, seeds)


def test_one_seed_shows_its_own_interval() -> None:
    rows = summarize([record("dece", "ca", 0.8, n=50, low=0.7, high=0.9), record("dece", "time_ratio", 1.5)])
    assert rows == [
        Row(
            "dece",
            "dece",
            {"ca": Estimate(0.8, 50, 0.7, 0.9), "time_ratio": Estimate(1.5, 1, None, None)},
            {"ca": 1, "time_ratio": 1},
        )
    ]


def test_arms_stand_in_the_order_of_the_comparison() -> None:
    fixed = ["majority", "tfidf", "clean_reference", "undefended", "matched_decay", "fine_tuning"]
    assert [row.arm for row in summarize(comparison(1))] == [*fixed, "trajectory", "dece"]
    assert [row.arm for row in summarize(comparison(1)[::-1])] == [*fixed, "dece", "trajectory"]


def test_only_seeds_are_averaged() -> None:
    records = [
        record("dece", "ca", 0.2, 0, setting="alpha=0.9"),
        record("dece", "ca", 0.4, 1, setting="alpha=0.9"),
        record("dece", "ca", 0.9, 0),
        record("undefended", "ca", 0.8, 0, setting="anything"),
    ]
    found = {row.arm: row.estimates["ca"].value for row in summarize(records)}
    assert found == pytest.approx({"undefended": 0.8, "dece (alpha=0.9)": 0.3, "dece (default)": 0.9})
    # Another attack or model is named in every arm, even where each arm has only one: they cannot be compared unseen.
    mixed = [record("dece", "ca", 0.2, attack="insent"), record("undefended", "ca", 0.9)]
    assert [row.arm for row in summarize(mixed)] == ["undefended (badnets)", "dece (insent)"]
    assert len(summarize([record("dece", "ca", 0.2), record("dece", "ca", 0.4, model="other")])) == 2


def test_a_measurement_twice_and_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="once"):
        summarize([record("dece", "ca", 0.2), record("dece", "ca", 0.3)])
    assert len(summarize([record("dece", "ca", 0.2), record("dece", "ca", 0.3, seed=1)])) == 1
    for render in (summarize, render_terminal, lambda r: render_markdown(r, ["ca"])):
        with pytest.raises(ValueError, match="at least one"):
            render([])


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_numbers_in_both_tables_are_those_of_the_records(seeds: int) -> None:
    records = comparison(seeds, rng_seed=seeds)
    text = render_terminal(records).splitlines()
    starts = [text[0].index(title) for title in ("arm", "CA", "ASR", "FTR", "R-Acc", "time ×", "peak memory (MiB)")]
    markdown = [line.strip("| ").split(" | ") for line in render_markdown(records, COLUMNS).splitlines()]
    assert len(text) == len(ARMS) + 2
    for number, line in enumerate(text[1:-1]):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells == markdown[number + 2]  # below the title and the rule
        for metric, cell in zip(COLUMNS, cells[1:], strict=True):
            values = np.array([r.value for r in records if (r.defense, r.metric) == (cells[0], metric)])
            if not values.size:
                assert cell == "–"
                continue
            scale, tolerance = (2**20, 0.5) if metric == "peak_bytes" else (1, 0.005)
            if seeds == 1:
                expected = values[0] * np.array([1.0, 0.9, 1.1])
            else:
                half = stats.t.ppf(0.975, seeds - 1) * values.std(ddof=1) / np.sqrt(seeds)
                expected = values.mean() + half * np.array([0, -1, 1])
            assert parse(cell) == pytest.approx(expected / scale, abs=tolerance * 1.001, rel=0)
            assert re.fullmatch(r"−?[\d.]+ \[−?[\d.]+, −?[\d.]+\]", cell)


def test_the_terminal_needs_no_more_than_four_other_characters() -> None:
    text = render_terminal(comparison(2), planted=60)
    assert {c for c in text if not c.isascii()} <= set("×−±–")
    assert "\x1b" not in text and not any(line != line.rstrip() for line in text.splitlines())


def test_the_floor_stands_in_the_row_of_the_clean_reference() -> None:
    table = render_markdown(comparison(1), ["asr", "ftr"])
    for line in table.splitlines()[2:-2]:
        arm, asr, ftr = line.strip("| ").split(" | ")
        assert (asr == "–", ftr == "–") == ((True, False) if arm == "clean_reference" else (False, True))


def test_fewer_than_three_seeds_are_preliminary() -> None:
    def note(*arms: tuple[str, int]) -> str:
        records = [record(arm, "ca", 0.5 + seed / 10, seed) for arm, seeds in arms for seed in range(seeds)]
        return render_terminal(records).splitlines()[-1]

    assert note(("dece", 1)) == "(preliminary: 1 seed; claims need three)"
    assert note(("dece", 2), ("undefended", 3)) == "(preliminary: 2 seeds; claims need three)"
    assert note(("dece", 3), ("undefended", 3)) == "(mean and 95 % interval over 3 seeds)"
    assert note(("dece", 3), ("undefended", 5)) == "(mean and 95 % interval over 3 to 5 seeds)"
    assert "preliminary" not in note(("dece", 3), ("majority", 1), ("tfidf", 1))  # nothing in them is drawn
    assert "preliminary: 1 " in note(("majority", 1))
    # One metric measured once is enough: the smallest count of what is shown.
    rows = summarize([*(record("dece", "ca", 0.5, s) for s in range(3)), record("dece", "asr", 0.5)])
    assert "preliminary: 1 " in seeds_note(rows, ["ca", "asr"]) and "preliminary" not in seeds_note(rows, ["ca"])


def test_planted_rows_are_told_with_what_was_found() -> None:
    records = [
        record("trajectory", "precision", 0.4),
        record("trajectory", "recall", 1.0),
        record("undefended", "ca", 0.8),
    ]
    assert render_terminal(records, planted=60).splitlines()[-2:] == [
        "poisoned rows planted: 60",
        "  trajectory: precision at n (of its 60 most suspicious rows) 0.40; share of them it dropped 1.00",
    ]
    assert "planted" not in render_terminal(records)
    assert "planted: 0" in render_terminal(records, planted=0)
    with pytest.raises(ValueError, match="planted"):
        render_terminal(records, planted=-1)


@pytest.mark.parametrize(
    ("estimate", "metric", "text"),
    [
        (Estimate(0.785, 9, 0.7449, 0.8151), "ca", "0.79 [0.74, 0.82]"),
        (Estimate(1.0, 3, 0.98, 1.016), "asr", "1.00 [0.98, 1.02]"),
        (Estimate(0.004, 3, -0.004, 0.012), "asr", "0.00 [0.00, 0.01]"),
        (Estimate(0.0, 3, -0.02, 0.02), "asr", "0.00 [−0.02, 0.02]"),
        (Estimate(-1.5, 3, None, None), "target_pull", "−1.50"),
        (Estimate(512 * 2**20, 1, None, None), "peak_bytes", "512"),
        (Estimate(123456.789, 1, None, None), "seconds", "123456.79"),
        (None, "ca", "–"),
    ],
)
def test_cells(estimate: Estimate | None, metric: str, text: str) -> None:
    assert format_estimate(estimate, metric) == text


def test_markdown_refuses_unknown_columns_and_escapes_bars() -> None:
    for metrics in ([], ["accuracy"], ["ca", "CA"]):
        with pytest.raises(ValueError, match="metrics"):
            render_markdown([record("dece", "ca", 0.5)], metrics)
    records = [record("dece", "ca", 0.5, setting="a|b"), record("dece", "ca", 0.5, setting="c")]
    lines = render_markdown(records, ["ca"]).splitlines()
    assert lines[2] == "| dece (a\\|b) | 0.50 |"
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]}) == 1


def test_replacing_a_block_changes_nothing_else() -> None:
    text = "# T\n<!-- begin:a -->\nold\n<!-- end:a -->\nbetween\n<!-- begin:ab --><!-- end:ab -->\nend"
    once = replace_block(text, "a", "| x |\n| \\1 |\n")
    assert (
        once == "# T\n<!-- begin:a -->\n| x |\n| \\1 |\n<!-- end:a -->\nbetween\n<!-- begin:ab --><!-- end:ab -->\nend"
    )
    assert replace_block(once, "a", "| x |\n| \\1 |\n") == once
    both = replace_block(once, "ab", "y")
    assert both.endswith("<!-- begin:ab -->\ny\n<!-- end:ab -->\nend") and replace_block(both, "a", "old").startswith(
        text[:60]
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- begin:a -->",
        "<!-- end:a -->",
        "<!-- end:a --><!-- begin:a -->",
        "<!-- begin:b --><!-- end:b -->",
        "<!-- begin:a --><!-- begin:a --><!-- end:a -->",
        "<!-- begin:a --><!-- end:a --><!-- begin:a --><!-- end:a -->",
    ],
)
def test_missing_or_doubled_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="begin:a"):
        replace_block(text, "a", "x")
