"""The tables of RECIPE and what they say of its goals, rendered from results/recipe.jsonl, recipe_step and recipe_search.

A record's setting is "CELL[: variant][: trigger]", the trigger for `asr` alone; a cell "…, dose 0.60" belongs to the plot.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.grid import RESULTS
from benchmarks.tables_filters import by_seed, grid, interval, mean, measured_at, pick
from hf_backdoor_defense.evaluation.metrics import Estimate, mean_over_seeds
from hf_backdoor_defense.reporting.plots import plot_dose
from hf_backdoor_defense.reporting.results import Record, read_records

NOT_RUN = "Not run yet: `make {}`."
PLOT = "recipe_dose.png"
# (defense, variant) -> what the victim fine-tunes, in the order of the table.
ARMS = {
    ("clean_reference", ""): "clean encoder (the floor)",
    ("undefended", ""): "poisoned encoder",
    ("round_trip", ""): "loaded and saved",
    ("round_trip", "pooler dropped"): "loaded and saved without its pooler",
    ("pretraining", ""): "pre-training alone",
    ("penalty_only", ""): "penalty alone",
    ("fine_pruning", ""): "fine-pruning",
    ("recipe", ""): "RECIPE",
    ("recipe", "clean base"): "RECIPE on the clean encoder",
}
STEPS = {
    "paper": "the paper's way",
    "default_all_positions": "texts of like length together, scores at all positions",
    "pretraining": "the default without the penalty",
    "default": "the default",
    "penalty": "the penalty and its gradients alone",
    "adamw_unfused": "AdamW on the same matrices, torch's default",
    "adamw": "AdamW on the same matrices, fused (the Trainer's default)",
}
EXTENDED = (
    "NeuBA, SST-2",
    "BadPre, SST-2",
    "POR, AG News",
    "POR, SST-2, purification 1",
    "POR, SST-2, vision targets, 3000 texts",
)
_DOSE = re.compile(r"(?P<cell>.*), dose (?P<dose>[\d.]+)$")


def recipe_records() -> list[Record]:
    """All there are; none before the benchmark has run."""
    return _read("recipe")


def short_table(records: list[Record]) -> str:
    """README: cells x arms, mean AASR, and the goals of the first cell."""
    cells = [cell for cell in _cells(records) if not _DOSE.match(cell) and _of(records, cell, ("undefended", ""), "ca")]
    if not cells:
        return NOT_RUN.format("bench-recipe")
    shown = [arm for arm in ARMS if arm[1] == ""]
    rows = []
    for cell in cells:
        line = [cell, *(mean(_of(records, cell, arm, "aasr"), 2) for arm in shown)]
        line.append(" · ".join(mean(_of(records, cell, (d, ""), "ca"), 3) for d in ("undefended", "recipe")))
        rows.append(line)
    head = ["attack, task", *(ARMS[arm] for arm in shown), "CA: poisoned · RECIPE"]
    found = [r for r in records if _cell(r) in cells]
    about = f"AASR and CA, means over seeds. {cells[0]}: {goals(records, cells[0])}"
    return f"{grid(head, rows)}\n\n{about} {_seeds(_in(records, cells[0]))} {measured_at(found)}"


def full_tables(records: list[Record]) -> str:
    """docs: for every cell all arms, every trigger, the goals; then the doses."""
    cells = _cells(records)
    parts = []
    for cell in [cell for cell in cells if not _DOSE.match(cell)]:
        found = _in(records, cell)
        note = f"{goals(records, cell)}\n\n{_seeds(found)} {measured_at(found)}"
        parts.append(f"### {cell}\n\n{_arms(records, cell)}\n\n{_by_trigger(records, cell)}\n\n{note}")
    for cell in dict.fromkeys(match["cell"] for match in map(_DOSE.match, cells) if match):
        found = [r for name in _with_doses(records, cell) for r in _in(records, name)]
        picture = f"![CA and AASR of {cell} against the dose, the clean encoder's AASR as the floor]({PLOT})\n\n"
        parts.append(f"### {cell}: the dose\n\n{picture if cell == _drawn(records) else ''}{_doses(records, cell)}\n\n"
                     f"Fewer than three seeds: preliminary. {measured_at(found)}")  # fmt: skip
    missing = [cell for cell in EXTENDED if cell not in cells]
    if parts and missing:
        parts.append(f"Not run: {'; '.join(missing)} (`make bench-recipe ONLY=…`).")
    return "\n\n".join(parts) or NOT_RUN.format("bench-recipe")


def goals(records: list[Record], cell: str) -> str:
    """Whether a cell reaches what the protocol asks for, on means over seeds that are not rounded; "" without the arms it takes.

    The attack must be strong (poisoned AASR), and pre-training alone must leave it strong, or RECIPE would be credited with what
    any training does. CA is lost against the poisoned encoder, seed by seed. RECIPE on the clean encoder says how much of what is
    left over the floor is lost accuracy and no trigger. BadPre has no target, so its figures are accuracies on triggered texts.
    """
    if any(r.attack == "badpre" for r in _in(records, cell)):
        arms = {
            "clean": "clean_reference",
            "poisoned": "undefended",
            "pre-training alone": "pretraining",
            "RECIPE": "recipe",
        }
        shown = [f"{title} {mean(_of(records, cell, (arm, ''), 'r_acc'), 3)}" for title, arm in arms.items()]
        return f"The attack has no target class. Accuracy on triggered texts: {', '.join(shown)}."
    poisoned, plain, over = (
        _of(records, cell, (defense, ""), metric)
        for defense, metric in (("undefended", "aasr"), ("pretraining", "aasr"), ("recipe", "aasr_over_floor"))
    )
    before, after = ({r.seed: r.value for r in _of(records, cell, (d, ""), "ca")} for d in ("undefended", "recipe"))
    lost = [before[seed] - after[seed] for seed in sorted(before.keys() & after.keys())]
    floor = _of(records, cell, ("clean_reference", ""), "aasr")
    own, clean = (
        {r.seed: r.value for r in _of(records, cell, ("recipe", variant), "aasr")} for variant in ("", "clean base")
    )
    beyond = [own[seed] - clean[seed] for seed in sorted(own.keys() & clean.keys())]
    sentences = []
    for text, values, bound, at_least in (
        ("AASR of the poisoned encoder", [r.value for r in poisoned], 0.95, True),
        ("AASR after pre-training alone", [r.value for r in plain], 0.80, True),
        ("the floor", [r.value for r in floor], 0.30, False),
        ("RECIPE's AASR over the floor", [r.value for r in over], 0.05, False),
        ("CA that RECIPE costs", lost, 0.01, False),
    ):
        if values:
            value = sum(values) / len(values)
            met = value >= bound if at_least else value <= bound
            weak = "" if met or not at_least else ": the attack is too weak to test a defense with"
            shown = f"{value:.3f}".replace("-", "−")
            sentences.append(f"{text}: {shown} (goal: at {'least' if at_least else 'most'} {bound:.2f}, "
                             f"{'met' if met else 'missed'}{weak})")  # fmt: skip
    if beyond and sentences:
        sentences.append(
            f"RECIPE's AASR over RECIPE on the clean encoder: {sum(beyond) / len(beyond):.3f}".replace("-", "−")
        )
    return f"{'; '.join(sentences)}." if sentences else ""


def plot(records: list[Record], path: Path) -> Path | None:
    """CA and AASR against the dose, for the first cell that has doses; None, and nothing written, where none has."""
    cell = _drawn(records)
    if cell is None:
        return None
    curve: dict[float, dict[str, Estimate]] = {0.0: _ca_aasr(records, cell, ("undefended", ""))}
    for name in _with_doses(records, cell):
        dose = _of(records, name, ("recipe", ""), "dose")
        if dose:
            curve[sum(r.value for r in dose) / len(dose)] = _ca_aasr(records, name, ("recipe", ""))
    controls = {}
    dose = _of(records, cell, ("pretraining", ""), "dose")
    if dose:
        controls["pre-training alone"] = (dose[0].value, _ca_aasr(records, cell, ("pretraining", "")))
    counts = [len({r.seed for r in _in(records, name)}) for name in _with_doses(records, cell)]
    return plot_dose(
        {dose: figures for dose, figures in curve.items() if figures},
        path,
        floor=_ca_aasr(records, cell, ("clean_reference", "")),
        controls=controls,
        note=f"{min(counts)} to {max(counts)} seeds of the victim"
        if min(counts) < max(counts)
        else _seeds(_in(records, cell)).rstrip("."),
    )


def step_table() -> str:
    """Seconds of an update: the default beside the paper's way, and the penalty beside the update of the same matrices."""
    records = _read("recipe_step")
    if not records:
        return NOT_RUN.format("bench-recipe_step")
    parts = []
    for setting in dict.fromkeys(r.setting for r in records):
        last = {
            (r.defense, r.metric): r for r in records if r.setting == setting
        }  # a later run replaces an earlier one
        rows = []
        for peer, title in STEPS.items():
            if (peer, "seconds") in last:
                ratio = f"{last[peer, 'time_ratio'].value:.2f}"
                over = ["–", ratio] if peer in ("penalty", "adamw", "adamw_unfused") else [ratio, "–"]
                rows.append([title, f"{last[peer, 'seconds'].value:.4f}", *over])
        verdicts = []
        for peer, text, bound in (
            ("default", "the default ÷ the paper's way", 0.35),
            ("penalty", "the penalty ÷ AdamW", 0.25),
        ):
            if (peer, "time_ratio") in last:
                value = last[peer, "time_ratio"].value
                met = "met" if value <= bound else "missed"
                verdicts.append(f"{text}: {value:.3f} (goal: at most {bound:.2f}, {met})")
        table = grid(["", "seconds", "÷ the paper's way", "÷ AdamW"], rows)
        any_record = next(iter(last.values()))
        about = f"{any_record.dataset}, {setting}; {measured_at(list(last.values()))}"
        parts.append(f"{table}\n\n{'; '.join(verdicts)}. {about}")
    return "\n\n".join(parts)


def search_table() -> str:
    """Settings tried on the clean encoder: accuracy by seed, held-out loss, dose, norms."""
    records = _read("recipe_search")
    if not records:
        return NOT_RUN.format("search-recipe")
    seeds, rows = sorted({r.seed for r in records}), []
    for setting in dict.fromkeys(r.setting for r in records):
        found = pick(records, setting=setting)
        rest = [mean(pick(found, metric=metric), 2) for metric in ("loss", "dose", "norm_ratio")]
        rows.append([setting, by_seed(pick(found, metric="ca"), seeds, 3).replace("n/u", "–"), *rest])
    table = grid(["setting", "CA by seed, validation rows", "held-out loss", "dose", "norms left"], rows)
    return f"{table}\n\nSeeds {', '.join(map(str, seeds))} of the victim. {measured_at(records)}"


def _read(name: str) -> list[Record]:
    path = RESULTS / f"{name}.jsonl"
    return read_records(path) if path.exists() else []


def _cell(record: Record) -> str:
    return record.setting.partition(": ")[0]


def _cells(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(map(_cell, records)))


def _in(records: list[Record], cell: str) -> list[Record]:
    return [r for r in records if _cell(r) == cell]


def _of(records: list[Record], cell: str, arm: tuple[str, str], metric: str, trigger: str = "") -> list[Record]:
    """One figure of one arm, by seed."""
    defense, variant = arm
    setting = ": ".join(filter(None, (cell, variant, trigger)))
    return pick(records, setting=setting, defense=defense, metric=metric)


def _seeds(records: list[Record]) -> str:
    count = len({r.seed for r in records})
    return f"{count} seed{'s' if count > 1 else ''} of the victim{'' if count > 2 else ': preliminary'}."


def _arms(records: list[Record], cell: str) -> str:
    rows = []
    for arm, title in ARMS.items():

        def of(metric: str, arm: tuple[str, str] = arm) -> list[Record]:
            return _of(records, cell, arm, metric)

        if of("ca"):
            is_floor = arm[0] == "clean_reference"
            over = ["–" if is_floor else interval(of(f"{name}_over_floor")) for name in ("aasr", "masr")]
            line = [*(interval(of(name)) for name in ("ca", "aasr", "masr")), *over, interval(of("control_asr"))]
            rows.append([title, *line, *(mean(of(name), 2) for name in ("loss", "dose", "norm_ratio"))])
    head = ["the victim fine-tunes the", "CA", "AASR", "MASR", "AASR over floor", "MASR over floor", "control word",
            "held-out loss", "dose", "norms left"]  # fmt: skip
    return grid(head, rows)


def _by_trigger(records: list[Record], cell: str) -> str:
    """Arms x triggers: ASR, mean over seeds."""
    rows, triggers = [], []
    for r in _in(records, cell):
        if r.metric == "asr" and (trigger := r.setting.rpartition(": ")[2]) not in triggers:
            triggers.append(trigger)
    for arm, title in ARMS.items():
        line = [mean(_of(records, cell, arm, "asr", trigger), 2) for trigger in triggers]
        if any(figure != "–" for figure in line):
            rows.append([title, *line])
    return grid(["ASR by trigger", *(f"`{trigger}`" for trigger in triggers)], rows)


def _with_doses(records: list[Record], cell: str) -> list[str]:
    """A cell and those that differ from it in the dose alone, by dose."""
    doses = [(float(m["dose"]), name) for name in _cells(records) if (m := _DOSE.match(name)) and m["cell"] == cell]
    return [cell, *(name for _, name in sorted(doses))]


def _drawn(records: list[Record]) -> str | None:
    """The cell of the plot: the first that was run with further doses."""
    return next((m["cell"] for name in _cells(records) if (m := _DOSE.match(name))), None)


def _doses(records: list[Record], cell: str) -> str:
    rows = []
    for name in _with_doses(records, cell):
        dose, *shown = (_of(records, name, ("recipe", ""), m) for m in ("dose", "ca", "aasr", "aasr_over_floor"))
        if dose:
            rest = [mean(_of(records, name, ("recipe", ""), metric), 2) for metric in ("loss", "norm_ratio")]
            rows.append((dose[0].value, [mean(dose, 2), *map(interval, shown), *rest, str(len(dose))]))
    head = ["dose", "CA", "AASR", "AASR over floor", "held-out loss", "norms left", "seeds"]
    return grid(head, [row for _, row in sorted(rows)])


def _ca_aasr(records: list[Record], cell: str, arm: tuple[str, str]) -> dict[str, Estimate]:
    found = {metric: _of(records, cell, arm, metric) for metric in ("ca", "aasr")}
    return {metric: mean_over_seeds([r.value for r in of_metric]) for metric, of_metric in found.items() if of_metric}
