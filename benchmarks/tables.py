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
    for attack in dict.fromkeys(r.attack for r in search if r.setting.startswith("fractions=")):
        found = [r for r in search if r.attack == attack and r.setting.startswith("fractions=")]
        choices.append(f"{attack}\n\n{render_markdown(found, ['precision', 'recall', 'auroc'])}")
    return {
        ("docs/log.md", "trajectory_search"): "\n\n".join(choices),
        ("docs/log.md", "trajectory_first"): first_rankings(search),
        ("docs/log.md", "trajectory_shares"): shares(search),
        ("docs/log.md", "dece_search"): dece_search(),
        ("README.md", "trajectory"): f"{demo}\n\n{where} From `benchmarks/results/trajectory.jsonl`.",
        ("docs/choosing.md", "trajectory"): "\n\n".join(every),
    }


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A GitHub table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _mean(records: list[Record]) -> float | None:
    return sum(r.value for r in records) / len(records) if records else None


def first_rankings(records: list[Record]) -> str:
    """Tasks and attacks x choices of early snapshots: recall of the planted rows in the first 10 %."""
    prefix = "first ranking, fractions="
    found = [r for r in records if r.setting.startswith(prefix) and r.metric == "recall"]
    choices = list(dict.fromkeys(r.setting.removeprefix(prefix) for r in found))
    rows = []
    for cell in sorted({(r.dataset, r.attack) for r in found}):
        of_cell = [r for r in records if (r.dataset, r.attack) == cell]
        asr = _mean([r for r in of_cell if r.metric == "asr"])
        of_choice = [
            _mean([r for r in found if (r.dataset, r.attack) == cell and r.setting == prefix + c]) for c in choices
        ]
        rows.append([*cell, _two(asr), *map(_two, of_choice)])
    return grid(["task", "attack", "ASR", *choices], rows)


def shares(records: list[Record]) -> str:
    """Tasks and attacks x rules for the share: share of the planted rows, and of the clean rows, that a rule drops."""
    found = [r for r in records if r.setting.startswith("second, ")]
    rules = list(dict.fromkeys(r.setting.removeprefix("second, ") for r in found))
    rows = []
    for cell in sorted({(r.dataset, r.attack) for r in found}):
        line = []
        for rule in rules:
            of_rule = [r for r in found if (r.dataset, r.attack) == cell and r.setting == f"second, {rule}"]
            recall, clean = (_mean([r for r in of_rule if r.metric == m]) for m in ("recall", "frr"))
            line.append(f"{_two(recall)} / {'–' if clean is None else f'{clean:.3f}'}")
        rows.append([*cell, str(len({r.seed for r in found if (r.dataset, r.attack) == cell})), *line])
    return grid(["task", "attack", "seeds", *rules], rows)


def dece_search() -> str:
    """Regimes x settings: ASR and CA of DeCE, of matched decay where it was run, of the controls."""
    records = read_records(RESULTS / "dece_search.jsonl")
    rows = []
    for regime, seed in dict.fromkeys((r.setting.partition("; ")[0], r.seed) for r in records):
        of_regime = [r for r in records if r.seed == seed and r.setting.partition("; ")[0] == regime]
        found: dict[tuple[str, str], dict[str, float]] = {}
        for r in of_regime:
            found.setdefault((r.setting.partition("; ")[2], r.defense), {})[r.metric] = r.value
        clean, attacked = found[("", "clean_reference")], found[("", "undefended")]
        rows.append([regime, str(seed), "(controls)", _two(attacked["asr"]), "–", _two(clean["ftr"]),
                     f"{_two(attacked['ca'])}; clean {_two(clean['ca'])}", "–"])  # fmt: skip
        for (setting, defense), values in found.items():
            if defense == "dece":
                decay = found.get((setting, "matched_decay"), {}).get("asr")
                rows.append([regime, str(seed), setting, _two(values["asr"]), _two(decay), _two(clean["ftr"]),
                             _two(values["ca"]), _two(values.get("target_pull"))])  # fmt: skip
    return grid(["regime", "seed", "DeCE", "ASR", "matched decay", "floor", "CA", "mean pull"], rows)


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


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
