"""Renders every table of README and docs from results/*.jsonl. `--check` only compares and exits 1 when one is stale."""

import sys
from pathlib import Path

from benchmarks.grid import RESULTS
from hf_backdoor_defense.reporting.plots import plot_ca_asr
from hf_backdoor_defense.reporting.results import Record, read_records, write_bytes
from hf_backdoor_defense.reporting.tables import render_markdown, replace_block

ROOT = Path(__file__).parents[1]
METRICS = ["ca", "asr", "ftr", "r_acc", "der", "precision", "recall", "time_ratio"]


def of_setting(records: list[Record], setting: str) -> list[Record]:
    """The records of one cell."""
    return [record for record in records if record.setting == setting]


def blocks() -> dict[tuple[str, str], str]:
    """(file, block) -> body."""
    path = RESULTS / "trajectory.jsonl"
    records = read_records(path)
    settings = list(dict.fromkeys(record.setting for record in records))
    seeds = len({record.seed for record in records})
    versions = records[0].env
    where = f"{seeds} seeds; Python {versions.get('python')}, torch {versions.get('torch')}, 2 CPU cores."
    demo = render_markdown(of_setting(records, "demo"), METRICS)
    every = []
    for setting in settings:
        found = of_setting(records, setting)
        columns = [metric for metric in METRICS if any(r.metric == metric for r in found)]
        every.append(f"### {setting}\n\n{render_markdown(found, columns)}")
    search = read_records(RESULTS / "trajectory_search.jsonl")
    choices = []
    for attack in dict.fromkeys(record.attack for record in search):
        found = [record for record in search if record.attack == attack and record.defense == "trajectory"]
        choices.append(f"{attack}\n\n{render_markdown(found, ['precision', 'recall', 'auroc'])}")
    return {
        ("docs/log.md", "trajectory_search"): "\n\n".join(choices),
        ("README.md", "trajectory"): f"{demo}\n\n{where} From `benchmarks/results/trajectory.jsonl`.",
        ("docs/choosing.md", "trajectory"): "\n\n".join(every),
    }


def main(check: bool) -> int:
    """Write, or compare."""
    stale = []
    for (name, block), body in blocks().items():
        path = ROOT / name
        text = path.read_text()
        rendered = replace_block(text, block, body)
        if rendered != text:
            stale.append(f"{name}: {block}")
            if not check:
                write_bytes(path, rendered.encode())
    if not check:
        plot_ca_asr(of_setting(read_records(RESULTS / "trajectory.jsonl"), "demo"), ROOT / "docs" / "trajectory.png")
    for entry in stale:
        print(f"{'stale' if check else 'rendered'}: {entry}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
