"""Renders every table of README and docs from results/*.jsonl. `--check` only compares and exits 1 when one is stale."""

import sys
from pathlib import Path

from benchmarks import (
    tables_crow,
    tables_filters,
    tables_generation,
    tables_hub,
    tables_purify,
    tables_recipe,
    tables_scaling,
)
from benchmarks.grid import RESULTS
from benchmarks.tables_filters import grid, measured_at
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
    seeds = len({record.seed for record in records})
    versions = records[0].env
    where = f"{seeds} seeds; Python {versions.get('python')}, torch {versions.get('torch')}, {versions.get('cpus')} CPU cores."
    demo = render_markdown(of_setting(records, "demo"), METRICS)
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
        ("README.md", "dece"): side_by_side(),
        ("README.md", "cost"): cost(),
        ("docs/choosing.md", "dece_classification"): every_cell(
            read_records(RESULTS / "dece_classification.jsonl"), without=("time_ratio",)
        ),
        ("docs/choosing.md", "dece_loss"): losses(),
        ("docs/choosing.md", "sft_step"): sft_steps(),
        ("README.md", "trajectory"): f"{demo}\n\n{where} From `benchmarks/results/trajectory.jsonl`.",
        ("docs/choosing.md", "trajectory"): every_cell(records),
        ("README.md", "weight_poisoning"): tables_filters.weight_poisoning_core(),
        ("docs/choosing.md", "weight_poisoning"): tables_filters.weight_poisoning_full(),
        ("docs/choosing.md", "filters"): tables_filters.filters(),
        ("docs/choosing.md", "onion_lm"): tables_filters.language_model(),
        ("docs/log.md", "psim_search"): tables_filters.psim_search(),
        ("README.md", "recipe"): tables_recipe.short_table(tables_recipe.recipe_records()),
        ("docs/choosing.md", "recipe"): tables_recipe.full_tables(tables_recipe.recipe_records()),
        ("docs/choosing.md", "recipe_step"): tables_recipe.step_table(),
        ("docs/log.md", "recipe_search"): tables_recipe.search_table(),
        ("README.md", "purify"): tables_purify.short_table(tables_purify.purify_records()),
        ("docs/choosing.md", "purify"): tables_purify.full_tables(tables_purify.purify_records()),
        ("docs/choosing.md", "purifier_step"): tables_purify.step_table(),
        ("docs/log.md", "purify_search"): tables_purify.search_table(),
        ("README.md", "code_poisoning"): tables_generation.short_table(tables_generation.code_records()),
        ("docs/choosing.md", "code_poisoning"): tables_generation.full_tables(tables_generation.code_records()),
        ("docs/choosing.md", "code_lm"): tables_generation.language_model(),
        ("docs/log.md", "code_search"): tables_generation.search_table(),
        ("README.md", "crow"): tables_crow.short_table(tables_crow.crow_records()),
        ("docs/choosing.md", "crow"): tables_crow.full_tables(tables_crow.crow_records()),
        ("docs/choosing.md", "crow_step"): tables_crow.step_table(),
        ("docs/publishing.md", "hub"): tables_hub.table(),
        ("docs/distributed.md", "scaling"): tables_scaling.table(tables_scaling.scaling_records()),
    }


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
        rows.append(
            [
                *cell,
                str(len({r.seed for r in found if (r.dataset, r.attack) == cell})),
                _two(asr),
                *map(_two, of_choice),
            ]
        )
    return grid(["task", "attack", "seeds", "ASR", *choices], rows)


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


def every_cell(records: list[Record], *, without: tuple[str, ...] = ()) -> str:
    """Each cell of a benchmark under a heading of its own, and where it was measured."""
    parts = []
    for setting in dict.fromkeys(r.setting for r in records):
        found = of_setting(records, setting)
        columns = [m for m in METRICS if m not in without and any(r.metric == m for r in found)]
        parts.append(f"### {setting}\n\n{render_markdown(found, columns)}\n\n{measured_at(found)}")
    return "\n\n".join(parts)


def side_by_side(left: str = "AG News, 5 %", right: str = "SST-2, 2 %") -> str:
    """Two cells beside each other: mean CA, and the ASR of every seed, because a mean hides that a seed decides."""
    records = read_records(RESULTS / "dece_classification.jsonl")
    cells = {name: of_setting(records, name) for name in (left, right)}
    arms = ("clean_reference", "undefended", "matched_decay", "dece", "gce", "smoothed", "trajectory")
    rows = []
    for arm in arms:
        line = [arm + (" (its FTR: the floor)" if arm == "clean_reference" else "")]
        for found in cells.values():
            of_arm = [r for r in found if r.defense == arm]
            values = sorted((r.seed, r.value) for r in of_arm if r.metric in ("asr", "ftr"))
            ca = _mean([r for r in of_arm if r.metric == "ca"])
            line += ["–" if ca is None else f"{ca:.3f}", " · ".join(_two(value) for _, value in values)]
        rows.append(line)
    seeds = sorted({r.seed for r in records})
    table = grid(["arm", f"{left}: CA", "ASR by seed", f"{right}: CA", "ASR by seed"], rows)
    about = f"Seeds {', '.join(map(str, seeds))}; test rows; three layers of MiniLM. From `results/dece_classification.jsonl`"
    return f"{table}\n\n{about}; {measured_at([r for found in cells.values() for r in found])}"


_PEERS = {
    "dece_fused": "DeCE, fused (ours)",
    "dece_fused_frozen": "DeCE, fused, frozen head (LoRA)",
    "cross_entropy_fused": "cross-entropy, fused (ours)",
    "dece_chunked": "DeCE on logits, chunked (ours)",
    "dece_unfused": "DeCE, the formula on logits",
    "cross_entropy": "`F.cross_entropy` on full logits",
    "matmuls": "the three matrix products alone",
    "torch_fused": "torch's chunked linear cross-entropy",
    "trl_fused": "trl's fused log-probabilities",
    "liger": "Liger's fused linear cross-entropy",
    "cut_cross_entropy": "Apple's cut cross-entropy",
}


def _figure(records: list[Record], defense: str, metric: str, setting: str) -> str:
    found = [r for r in records if (r.defense, r.metric, r.setting) == (defense, metric, setting)]
    return f"{found[0].value:.2f}" if found else "–"


def losses() -> str:
    """Output projection and loss, forward and backward: every peer, on a CPU core and on a GPU."""
    records = read_records(RESULTS / "dece_loss.jsonl")
    cpu, gpu = (
        next(r.setting for r in records if r.defense == "matmuls" and word in r.setting) for word in ("thread", "GPU")
    )
    rows = []
    additions = dict.fromkeys(
        r.setting.removeprefix(where) for where in (cpu, gpu) for r in records if r.setting.startswith(where)
    )
    for defense, title in _PEERS.items():
        for addition in additions:
            found = [r for r in records if r.defense == defense and r.setting in (cpu + addition, gpu + addition)]
            if found:
                cells = [
                    _figure(records, defense, metric, where + addition)
                    for where in (cpu, gpu)
                    for metric in ("time_ratio", "memory_ratio")
                ]
                rows.append([title + addition, *cells])
    head = [
        "peer",
        "CPU: time ÷ cross-entropy",
        "memory ÷ cross-entropy",
        "GPU: time ÷ products alone",
        "memory ÷ cross-entropy",
    ]
    models = {where: next(r for r in records if r.setting == where) for where in (cpu, gpu)}
    notes = [f"{where}, {record.model}: {measured_at([record])}" for where, record in models.items()]
    return "\n\n".join([grid(head, rows), *notes])


def sft_steps() -> str:
    """A step of supervised fine-tuning: every peer beside trl's own, on a CPU and on a GPU."""
    records = read_records(RESULTS / "sft_step.jsonl")
    settings = dict.fromkeys(r.setting for r in records if r.metric == "peak_bytes")
    head, rows = ["trainer"], [[name] for name in ("stock", "undefended", "dece", "dece_compute_loss_func")]
    for setting in settings:
        head += [f"{setting}: time ÷ stock (median)", "(minimum)", "memory ÷ stock"]
        for row in rows:
            row += [_figure(records, row[0], "time_ratio", f"{setting}, {kind}") for kind in ("median", "minimum")]
            row.append(_figure(records, row[0], "memory_ratio", setting))
    return f"{grid(head, rows)}\n\n{measured_at(records)}"


def cost() -> str:
    """The few figures that README shows of both."""
    loss, sft = read_records(RESULTS / "dece_loss.jsonl"), read_records(RESULTS / "sft_step.jsonl")
    rows = []
    for defense in ("cross_entropy", "dece_unfused", "dece_fused", "dece_fused_frozen", "liger", "cut_cross_entropy"):
        line = [_PEERS[defense]]
        for word in ("thread", "GPU"):
            where = next(r.setting for r in loss if r.defense == "matmuls" and word in r.setting)
            base = next(
                r.value for r in loss if (r.defense, r.metric, r.setting) == ("cross_entropy", "seconds", where)
            )
            found = [r.value for r in loss if (r.defense, r.metric, r.setting) == (defense, "seconds", where)]
            line += [f"{found[0] / base:.2f}" if found else "–", _figure(loss, defense, "memory_ratio", where)]
        rows.append(line)
    table = grid(["head and loss, forward and backward", "CPU: time", "memory", "GPU: time", "memory"], rows)
    gpu = next(r.setting for r in sft if r.metric == "peak_bytes" and "GPU" in r.setting)
    step, peer = (_figure(sft, name, "time_ratio", f"{gpu}, median") for name in ("dece", "dece_compute_loss_func"))
    return (
        f"{table}\n\nAll relative to cross-entropy on full logits. A whole step of `DefendedSFTTrainer` with DeCE on a GPU "
        f"takes {step} × trl's own; DeCE passed as `compute_loss_func` takes {peer} ×. "
        "[docs/choosing.md](docs/choosing.md#dece) has shapes and machines."
    )


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
        tables_recipe.plot(tables_recipe.recipe_records(), ROOT / "docs" / tables_recipe.PLOT)
        tables_generation.plot(tables_generation.code_records(), ROOT / "docs" / tables_generation.PLOT)
    for entry in stale:
        print(f"{'stale' if check else 'rendered'}: {entry}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
