"""The benchmark of a step of CROW, at its smallest."""

import pytest

from benchmarks import crow_step
from hf_backdoor_defense.reporting.results import read_records


def test_ratios_are_to_plain_fine_tuning_of_the_same_weights(tmp_path):
    where = tmp_path / "crow_step.jsonl"
    crow_step.main(["--small", "--rounds=1", "--steps=2", "--threads=1", f"--output={where}"])
    found = {(r.setting, r.defense, r.metric): r.value for r in read_records(where)}
    assert len(found) == 2 * 3 * 2 * 2  # weights, peers, figures, metrics
    assert {defense for _, defense, _ in found} == {"undefended", "undefended_again", "crow"}
    for (setting, defense, metric), value in found.items():
        if metric == "time_ratio":
            plain = found[setting, "undefended", "seconds"]
            assert value == pytest.approx(found[setting, defense, "seconds"] / plain)


def test_figures_are_the_minimum_and_the_median():
    seconds = {
        (w, p): [3.0, 1.0, 8.0] if p == "crow" else [2.0, 4.0, 2.0] for w in ("full", "lora") for p in crow_step.PEERS
    }
    made = crow_step.records(seconds, "cpu", 2)
    ratios = {r.setting.split(", ")[-1]: r.value for r in made if (r.metric, r.defense) == ("time_ratio", "crow")}
    assert ratios == {"minimum": 0.5, "median": 1.5}
