"""The table of scaling says what its records say: samples of all processes, added time, difference and goal."""

import pytest
import torch

from benchmarks import scaling
from benchmarks.tables_scaling import table
from hf_backdoor_defense.reporting.results import Record


def records(world, gpu=None, **ratios):
    """An update of a second, and defenses that take so many times as long."""
    setting = f"{world} process{'es' if world > 1 else ''}, batch 16 each, 32 tokens"
    env = {"world_size": world, "cpus": 2, "commit": "c" * 9, "gpu": gpu}
    peers = {"undefended": 1.0, "undefended_masked": 1.0, **ratios}
    return [
        Record("scaling", "random", "minilm", "none", peer, setting, 0, metric, ratio, n=5, env=env)
        for peer, ratio in peers.items()
        for metric in ("seconds", "time_ratio")
    ]


def cells(text, title):
    return [
        cell.strip()
        for cell in next(line for line in text.splitlines() if line.startswith(f"| {title} |")).split("|")[2:-1]
    ]


def test_samples_count_all_processes_and_shares_are_compared():
    text = table(records(1, dece=1.0, d3=1.25, recipe=1.1) + records(2, dece=1.0, d3=2.0, recipe=1.09))
    assert cells(text, "plain cross-entropy") == ["16.0", "–", "32.0", "–", "–"]
    assert cells(text, "D3") == ["12.8", "+25.0 %", "16.0", "+100.0 %", "+75.0"]
    assert cells(text, "RECIPE")[1::2] == ["+10.0 %", "+9.0 %"] and cells(text, "RECIPE")[-1] == "−1.0"
    assert "between 1 process and 2 processes: missed by D3." in text
    assert "ULRL" not in text  # not measured, not shown


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.019, "met by all"), (0.981, "met by all"), (1.021, "missed by DeCE"), (0.979, "missed by DeCE")],
)
def test_the_goal_is_two_points_either_way(ratio, said):
    assert said in table(records(1, dece=1.0) + records(2, dece=ratio))


def test_noise_is_told_and_misses_no_goal():
    text = table(records(1, undefended_again=1.0, dece=1.0) + records(2, undefended_again=1.05, dece=1.0))
    assert "met by all. Noise alone made 5.0 points." in text


def test_what_was_measured_again_counts_and_machines_stand_apart():
    text = table(records(1, dece=3.0) + records(1, dece=1.5) + records(2, dece=1.5) + records(1, gpu="A", dece=1.25))
    assert cells(text, "DeCE")[1] == "+50.0 %"
    assert text.count("| trained with |") == 2 and "nothing to compare" in text


def test_before_the_benchmark_the_table_says_how_to_run_it():
    assert table([]) == "Not run yet: `make bench-scaling`."


@pytest.mark.parametrize(
    "world, gpus, launched", [(1, 0, False), (1, 1, False), (1, 4, True), (2, 0, True), (2, 4, True)]
)
def test_a_single_process_beside_several_gpus_is_launched_too(monkeypatch, world, gpus, launched):
    """Without the launcher the Trainer would spread one process over all of them, which a defense refuses."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    words = scaling.command(world, 3)
    assert ("torch.distributed.run" in words) == launched
    assert words[-4:] == ["--inside", str(world), "--rounds", "3"]
    assert not launched or words[words.index("--nproc_per_node") + 1] == str(world)
