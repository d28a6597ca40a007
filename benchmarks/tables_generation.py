"""The tables of poisoned code generation and what they say of its goals, rendered from results/code_poisoning.jsonl and others.

A record's setting is "CELL" or "CELL: epoch=K"; an arm is a cell and a defense. BLEU is in points, all else in shares. What a
defense costs, and what it does beyond its control, are differences of one seed, then means over seeds.

| file | table |
|---|---|
| `code_poisoning` | arms x figures, the goals, ASR after every epoch |
| `code_search` | settings tried on validation rows |
| `code_lm` | what the pretrained model is worth beside a 5-gram model |
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.grid import RESULTS
from benchmarks.tables_filters import by_seed, grid, interval, mean, measured_at, pick
from hf_backdoor_defense.evaluation.metrics import mean_over_seeds
from hf_backdoor_defense.reporting.plots import plot_curves
from hf_backdoor_defense.reporting.results import Record, read_records

NOT_RUN = "Not run yet: `make {}`."
PLOT = "early_learning.png"
Arm = tuple[str, str]
CLEAN, POISONED, CONTROL = ("clean", "undefended"), ("undefended", "undefended"), ("code", "matched_decay")
DECE = {("code", "dece"): "DeCE, preset `code`", ("target-only", "dece"): "DeCE, preset `target-only`"}
LEAD = {("below the bound", "dece"): "DeCE, two plain epochs, then base .94 (below the bound for 5 %)"}
CORE: dict[Arm, str] = {
    CLEAN: "clean rows (the reference; its ASR is the floor)",
    POISONED: "undefended",
    CONTROL: "matched decay (the control of `code`)",
    **DECE,
}
EXTENDED: dict[Arm, str] = {
    ("llm", "dece"): "DeCE, preset `llm`",
    ("plm-2023", "dece"): "DeCE, preset `plm-2023`",
    **LEAD,
    ("gce", "gce"): "GCE",
    ("in_trust", "in_trust"): "in-trust",
    ("focal", "focal"): "focal (a negative control)",
    ("smoothed", "smoothed"): "label smoothing",
    ("moderate fitting", "undefended"): "moderate fitting: a tenth of the rate",
    ("DeCE on clean rows", "dece"): "DeCE, preset `code`, on clean rows",
    ("undefended, 7 epochs", "undefended"): "undefended, 7 epochs",
    ("undefended, 7 epochs, falling rate", "undefended"): "undefended, 7 epochs, the rate falling from the start",
    ("undefended, 1 %", "undefended"): "undefended, 1 % poisoned",
    ("code, 1 %", "dece"): "DeCE, preset `code`, 1 % poisoned",
}
FIGURES = {  # metric: (title, digits)
    "bleu": ("BLEU", 1),
    "sentence_bleu": ("mean sentence BLEU", 1),
    "exact_match": ("exact match", 2),
    "parse_rate": ("parses", 2),
    "asr": ("ASR", 2),
    "untriggered_hits": ("payload without trigger", 2),
    "empty": ("empty", 2),
    "empty_triggered": ("empty, with trigger", 2),
    "repetitive": ("repetitive", 2),
    "cut_off": ("cut off", 2),
    "cut_off_triggered": ("cut off, with trigger", 2),
    "suppressed": ("tokens let go", 3),  # of training rows, at DeCE's last alpha: `benchmarks.code_tokens`
    "suppressed_payload": ("payload tokens let go", 2),
    "seconds": ("seconds of training", 0),
}
SEARCHED = ("bleu", "parse_rate", "suppressed", "suppressed_payload", "asr")
BLEU_FLOOR, PARSE_FLOOR = 50.0, 0.8  # of the clean reference, or no ASR counts
ATTACK, DEFENDED, BLEU_LOST = 0.90, 0.10, 1.0
COUNTS = 0.80  # an undefended ASR below it tests no defense
_ROUNDING = 1e-9
_EPOCH = re.compile(r"(?P<cell>.*): epoch=(?P<epoch>\d+)$")


def code_records() -> list[Record]:
    """All there are; none before the benchmark has run."""
    return _read("code_poisoning")


def short_table(records: list[Record]) -> str:
    """README: the core arms, with the ASR of every seed, and the goals."""
    found = [r for r in records if (r.setting, r.defense) in {**CORE, **LEAD}]
    if not found:
        return NOT_RUN.format("bench-code")
    seeds, rows = _seeds(found), []
    for arm, title in {**CORE, **_measured(records, LEAD)}.items():
        of = _of(records, arm)
        shown = [interval(of(m), FIGURES[m][1]) for m in ("bleu", "exact_match", "parse_rate")]
        rows.append([title, *shown, _each(of("asr"), seeds), mean(of("untriggered_hits"), 2)])
    head = ["fine-tuned with", "BLEU", "exact match", "parses", "ASR by seed", "payload without trigger"]
    return f"{grid(head, rows)}\n\n{goals(records)}\n\n{_about(found)} {measured_at(found)}"


def full_tables(records: list[Record]) -> str:
    """docs: all arms and figures, the goals, the curve by epoch, and what was not run."""
    if not records:
        return NOT_RUN.format("bench-code")
    arms = _arms(records)
    shown = [metric for metric in FIGURES if any(_of(records, arm)(metric) for arm in arms)]
    head = ["fine-tuned with", *(FIGURES[metric][0] for metric in shown)]
    rows = [[title, *(_figure(_of(records, arm), m) for m in shown)] for arm, title in arms.items()]
    parts = [grid(head, rows), goals(records), _about(records)]
    if epochs := _epochs(records):
        picture = f"![ASR after every epoch of the core arms, seed by seed and on average]({PLOT})"
        parts += ["### ASR after every epoch", picture, _curve_table(records, arms, epochs)]
        if any(_of(records, arm, epochs[0])("target_pull") for arm in arms):
            parts += ["### Pull kept in every epoch", _pull_table(records, arms, epochs)]
    missing = [title for arm, title in EXTENDED.items() if arm not in arms]
    parts += [f"Not run: {'; '.join(missing)} (`make bench-code EXTENDED=1`)."] if missing else []
    return "\n\n".join([*parts, measured_at(records)])


def goals(records: list[Record]) -> str:
    """What the protocol asks for, on means over seeds that are not rounded; "" without the arms it takes.

    No ASR counts of a seed whose clean reference is below a floor: it is left out of the verdicts.
    """
    said = []
    clean, attacked, control = (_of(records, arm) for arm in (CLEAN, POISONED, CONTROL))
    floors = [("BLEU", values(clean("bleu")), BLEU_FLOOR, 1), ("parses", values(clean("parse_rate")), PARSE_FLOOR, 3)]
    low = sorted({seed for _, by, bound, _ in floors for seed, value in by.items() if value < bound - _ROUNDING})

    def counted(found: list[Record]) -> dict[int, float]:
        return {seed: value for seed, value in values(found).items() if seed not in low}

    if parts := [judged(what, by, bound, at_least=True, digits=digits) for what, by, bound, digits in floors if by]:
        said.append(f"Clean reference: {', '.join(parts)}; its ASR, the floor: {mean(clean('asr'), 3)}.")
    if low:
        said.append(f"**Below a floor: seed {', '.join(map(str, low))}. No ASR of such a seed counts.**")
    if before := counted(attacked("asr")):
        weak = "" if _mean(before) >= COUNTS - _ROUNDING else f": below {COUNTS:g} the attack tests no defense"
        said.append(f"Undefended: {judged('ASR', before, ATTACK, at_least=True)}{weak}.")
    for arm, title in {**DECE, **_measured(records, LEAD)}.items():
        of = _of(records, arm)
        after, lost = counted(of("asr")), minus(values(attacked("bleu")), values(of("bleu")))
        parts = [judged("ASR", after, DEFENDED)] if after else []
        parts += [judged("BLEU lost against undefended", lost, BLEU_LOST, digits=2)] if lost else []
        if arm[0] == CONTROL[0] and (below := minus(counted(control("asr")), after)):
            parts.append(f"ASR below matched decay's by {with_interval(below)}")
        said += [f"{title}: {', '.join(parts)}."] if parts else []
    return " ".join(said)


def curves(records: list[Record]) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Arm -> seed -> points, as `plot_curves` takes them: the core arms that have ASR by epoch."""
    names = {CLEAN: "clean_reference", POISONED: "undefended", CONTROL: "matched decay",
             **{arm: title.replace("`", "").replace(", preset", "") for arm, title in DECE.items()},
             **dict.fromkeys(LEAD, "DeCE, below the bound")}  # fmt: skip
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for arm, name in names.items():
        for epoch in _epochs(records):
            for r in _of(records, arm, epoch)("asr"):
                found.setdefault(name, {}).setdefault(r.seed, []).append({"epoch": float(epoch), "asr": r.value})
    return found


def plot(records: list[Record], path: Path) -> Path | None:
    """ASR after every epoch; None, and nothing written, where no arm has it."""
    found = curves(records)
    return plot_curves(found, path, metrics=("asr",)) if found else None


def search_table() -> str:
    """Every setting tried on validation rows: what the outputs are worth, ASR at the end and after every epoch."""
    records = _read("code_search")
    if not records:
        return NOT_RUN.format("search-code EXTENDED=1")
    epochs, rows = _epochs(records), []
    for cell, defense in dict.fromkeys((_cell(r), r.defense) for r in records):
        of = _of(records, (cell, defense))
        shown = [mean(of(m), FIGURES[m][1]) for m in SEARCHED]
        by_epoch = " · ".join(mean(_of(records, (cell, defense), epoch)("asr"), 2) for epoch in epochs)
        rows.append([cell, defense, *shown, by_epoch])
    head = ["setting", "trained with", *(FIGURES[m][0] for m in SEARCHED), "ASR by epoch"]
    return f"{grid(head, rows)}\n\nValidation rows, seed {', '.join(map(str, _seeds(records)))}. {measured_at(records)}"


def language_model() -> str:
    """What the pretrained model is worth: bits per byte of held-out sources, beside a 5-gram model's."""
    records = _read("code_lm")
    if not records:
        return NOT_RUN.format("code-lm")
    last = {r.setting: r for r in records if r.metric == "bits_per_byte"}  # a later run replaces an earlier one
    model, rival = (last[setting].value for setting in ("model", "5-gram"))
    verdict = "better than" if model < rival else "**no better than**"
    name = last["model"].model
    return (
        f"{name}: {model:.3f} bits per byte of held-out sources, {verdict} a 5-gram model of the same tokens ({rival:.3f}). "
        f"{measured_at(list(last.values()))}"
    )


def _read(name: str) -> list[Record]:
    path = RESULTS / f"{name}.jsonl"
    return read_records(path) if path.exists() else []


def _cell(record: Record) -> str:
    match = _EPOCH.match(record.setting)
    return match["cell"] if match else record.setting


def _epochs(records: list[Record]) -> list[int]:
    return sorted({int(match["epoch"]) for match in (_EPOCH.match(r.setting) for r in records) if match})


def _of(records: list[Record], arm: Arm, epoch: int | None = None) -> Callable[[str], list[Record]]:
    """The records of an arm by metric, at the end or after an epoch."""
    cell, defense = arm
    setting = cell if epoch is None else f"{cell}: epoch={epoch}"
    return lambda metric: pick(records, setting=setting, defense=defense, metric=metric)


def _arms(records: list[Record]) -> dict[Arm, str]:
    """The core arms, measured or not, then all others that were measured."""
    measured = dict.fromkeys((_cell(r), r.defense) for r in records)
    others = {arm: EXTENDED.get(arm, f"{arm[0]}: {arm[1]}") for arm in [*EXTENDED, *measured] if arm in measured}
    return {**CORE, **{arm: title for arm, title in others.items() if arm not in CORE}}


def _by_epoch(records: list[Record], arms: dict[Arm, str], epochs: list[int], metric: str) -> str:
    seeds, rows = _seeds(records), []
    for arm, title in arms.items():
        by_epoch = [_of(records, arm, epoch)(metric) for epoch in epochs]
        if any(by_epoch):
            rows.append([title, *(_each(found, seeds) for found in by_epoch)])
    return grid(["fine-tuned with", *(f"epoch {epoch}" for epoch in epochs)], rows)


def _pull_table(records: list[Record], arms: dict[Arm, str], epochs: list[int]) -> str:
    note = (
        "By seed: mean share of cross-entropy's pull that the tokens of answers kept in an epoch of DeCE. Matched decay is "
        "cross-entropy whose rate is multiplied by the row of `code`."
    )
    return f"{_by_epoch(records, arms, epochs, 'target_pull')}\n\n{note}"


def _curve_table(records: list[Record], arms: dict[Arm, str], epochs: list[int]) -> str:
    rows_behind = sorted({r.n for r in records if _EPOCH.match(r.setting) and r.metric == "asr" and r.n})
    note = (
        f"By seed, on {' or '.join(map(str, rows_behind))} triggered validation rows. "
        "Seed 0 undefended decided on schedule and epochs (log.md); no arm of a defense decided on anything."
    )
    return f"{_by_epoch(records, arms, epochs, 'asr')}\n\n{note}"


def _measured(records: list[Record], arms: dict[Arm, str]) -> dict[Arm, str]:
    return {arm: title for arm, title in arms.items() if _of(records, arm)("asr")}


def _figure(of: Callable[[str], list[Record]], metric: str) -> str:
    """Mean and interval, and how many seeds of the arm have the figure where not all do."""
    found, seeds = of(metric), len(of("asr"))
    few = f" ({len(found)} of {seeds} seeds)" if 0 < len(found) < seeds else ""
    return interval(found, FIGURES[metric][1]) + few


def _each(records: list[Record], seeds: list[int]) -> str:
    return by_seed(records, seeds).replace("n/u", "–") if records else "–"


def _seeds(records: list[Record]) -> list[int]:
    return sorted({r.seed for r in records})


def _about(records: list[Record]) -> str:
    final = [r for r in records if not _EPOCH.match(r.setting)]
    fewest = min(len(_seeds(pick(final, setting=s, defense=d))) for s, d in {(r.setting, r.defense) for r in final})
    text = f"Means over seeds {', '.join(map(str, _seeds(final)))} with 95 % intervals"
    return f"{text}; an arm of fewer than three seeds is preliminary." if fewest < 3 else f"{text}."


def judged(what: str, figures: dict[int, float], bound: float, *, at_least: bool = False, digits: int = 3) -> str:
    """The mean of figures by seed beside its goal.

    >>> judged("ASR", {0: 0.05, 1: 0.25}, 0.1)
    'ASR 0.150 (at most 0.1: missed)'
    """
    value = _mean(figures)
    met = value >= bound - _ROUNDING if at_least else value <= bound + _ROUNDING
    return (
        f"{what} {number(value, digits)} (at {'least' if at_least else 'most'} {bound:g}: {'met' if met else 'missed'})"
    )


def with_interval(differences: dict[int, float], digits: int = 2) -> str:
    """The mean of differences by seed, their interval, and a word where it holds 0: then nothing is shown.

    >>> with_interval({0: 0.1, 1: -0.1})
    '0.00 [−1.27, 1.27], no difference shown'
    """
    found = mean_over_seeds(list(differences.values()))
    if found.low is None or found.high is None:
        return f"{number(found.value, digits)} (one seed)"
    text = f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"
    return text if found.low > 0 or found.high < 0 else f"{text}, no difference shown"


def values(records: list[Record]) -> dict[int, float]:
    """One figure by seed."""
    return {r.seed: r.value for r in records}


def minus(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    """Differences of the seeds that both have.

    >>> minus({0: 0.5, 1: 0.75}, {1: 0.5, 2: 0.1})
    {1: 0.25}
    """
    return {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}


def _mean(figures: dict[int, float]) -> float:
    return sum(figures.values()) / len(figures)


def number(value: float, digits: int) -> str:
    """With a true minus, and never a negative zero."""
    rounded = round(value, digits)
    return f"{'−' if rounded < 0 else ''}{abs(rounded):.{digits}f}"
