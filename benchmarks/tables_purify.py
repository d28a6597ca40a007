"""The tables of purification and what they say of its goals, rendered from results/purify.jsonl, purifier_step and purify_search.

A record's setting is "CELL" or "CELL: clean model": the same methods where there is nothing to purify. A figure over the floor,
and an accuracy that is lost, are differences of one seed, then means over seeds.
"""

import dataclasses
from collections.abc import Callable, Iterable

from benchmarks.grid import RESULTS
from benchmarks.tables_filters import by_seed, grid, interval, mean, measured_at, pick
from hf_backdoor_defense.reporting.results import Record, read_records

NOT_RUN = "Not run yet: `make {}`."
ARMS = {
    "clean_reference": "never poisoned (the floor)",
    "undefended": "as it came",
    "fine_tuning": "fine-tuning (the control)",
    "ft_sam": "FT-SAM",
    "fine_pruning": "fine-pruning",
    "d3": "D3",
    "ulrl": "ULRL",
    "d3 from W0": "D3 from W0, lam 2 (beside the default)",
    "retrained": "a fresh model, from the clean rows alone",
}
METHODS = tuple(ARMS)[2:]
CLEAN = ": clean model"
EXTENDED = ("digits wanet", "digits patch 10 %", "digits patch 5 %", "sst2 insent", "ag_news badnets")
ATTACK, CONTROL = 0.98, 0.90  # ASR that an attack must have, and keep through plain fine-tuning
# method -> the most ASR over the floor (of texts: TEXT_OVER), the most accuracy lost, the least R-Acc (None: reported).
GOALS: dict[str, tuple[float, float, float | None]] = {"ulrl": (0.01, 0.02, 0.8), "d3": (0.02, 0.05, None)}
TEXT_OVER, CLEAN_LOST = 0.02, 0.02
PEERS = {
    "fine_tuning": "plain fine-tuning",
    "fine_tuning_again": "the same once more (what noise does)",
    "d3_head": "D3, head",
    "d3_all_linear": "D3, all linear layers",
    "ulrl": "ULRL, relearning",
    "ft_sam": "FT-SAM",
}
STEP_TIME, STEP_BYTES = 1.05, 2.1
_ROUNDING = 1e-9  # 0.98 - 0.96 is a little more than 0.02


def purify_records() -> list[Record]:
    """All there are; none before the benchmark has run. A further setting ("CELL: d3 from W0") is an arm of its cell."""
    found = []
    for record in _read("purify"):
        cell, _, rest = record.setting.partition(": ")
        found.append(dataclasses.replace(record, setting=cell, defense=rest) if rest in ARMS else record)
    return found


def cells(records: Iterable[Record]) -> list[str]:
    """Names of cells, in the order of the file."""
    return list(dict.fromkeys(r.setting.removesuffix(CLEAN) for r in records))


def state_of(records: list[Record], cell: str) -> str:
    """Whether a cell tests a defense: "tests", "control removed it" or "attack not valid"; "" without these arms."""
    attacked, tuned = (_values(records, cell, arm, "asr") for arm in ("undefended", "fine_tuning"))
    if not attacked or not tuned:
        return ""
    if _mean(attacked) < ATTACK - _ROUNDING:
        return "attack not valid"
    return "control removed it" if _mean(tuned) < CONTROL - _ROUNDING else "tests"


def over_floor(records: list[Record], cell: str, arm: str) -> dict[int, float]:
    """ASR minus the clean reference's rate, by seed."""
    return _minus(_values(records, cell, arm, "asr"), _values(records, cell, "clean_reference", "ftr"))


def lost(records: list[Record], cell: str, arm: str, *, clean: bool = False) -> dict[int, float]:
    """Accuracy that a method costs, by seed, against the model it was given."""
    given = "clean_reference" if clean else "undefended"
    before = _values(records, cell, given, "ca")
    return _minus(before, _values(records, cell + CLEAN * clean, arm, "ca"))


def judged(records: list[Record], cell: str, method: str) -> list[tuple[str, float, float, bool]]:
    """(what, value, bound, met) for every goal of a method that the cell has the records for."""
    over, most_lost, least = GOALS[method]
    bound = TEXT_OVER if _is_text(records, cell) else over
    found = []
    for what, values, limit in (
        ("ASR over the floor", over_floor(records, cell, method), bound),
        ("CA lost", lost(records, cell, method), most_lost),
        ("CA lost on the clean model", lost(records, cell, method, clean=True), CLEAN_LOST),
    ):
        if values:
            found.append((what, _mean(values), limit, _mean(values) <= limit + _ROUNDING))
    healed = _values(records, cell, method, "r_acc")
    if healed and least is not None:
        found.append(("R-Acc", _mean(healed), least, _mean(healed) >= least - _ROUNDING))
    return found


def goals(records: list[Record], cell: str) -> str:
    """The goals of one cell in sentences, on means over seeds that are not rounded; "" without the arms they take."""
    sentences = []
    for text, arm, bound, if_missed in (
        ("ASR as it came", "undefended", ATTACK, "the attack is not valid"),
        ("ASR after fine-tuning", "fine_tuning", CONTROL, "the control removed it, no defense is credited here"),
    ):
        if values := _values(records, cell, arm, "asr"):
            met = _mean(values) >= bound - _ROUNDING
            verdict = "met" if met else f"missed: {if_missed}"
            sentences.append(f"{text}: {_signed(_mean(values))} (at least {bound:.2f}: {verdict})")
    for method in GOALS:
        of_method = [
            f"{what} {_signed(value)} (at {'least' if what == 'R-Acc' else 'most'} {bound:.2f}: {'met' if met else 'missed'})"
            for what, value, bound, met in judged(records, cell, method)
        ]
        if of_method:
            sentences.append(f"{ARMS[method]}: {', '.join(of_method)}")
    return f"{'; '.join(sentences)}." if sentences else ""


def summary(records: list[Record]) -> str:
    """Cells x goals: met, missed, and what was found; then in how many cells the control did it."""
    rows = []
    for cell in cells(records):
        line = [_titled(records, cell), {"tests": "yes", "": "–"}.get(state := state_of(records, cell), f"no: {state}")]
        for method in GOALS:
            found = {what: (value, met) for what, value, _, met in judged(records, cell, method)}
            for what in ("ASR over the floor", "CA lost", "R-Acc", "CA lost on the clean model"):
                if what == "R-Acc" and GOALS[method][2] is None:
                    continue
                value, met = found.get(what, (None, False))
                line.append("–" if value is None else f"{_signed(value)} {'met' if met else '**missed**'}")
        rows.append(line)
    head = ["cell", "tests a defense"]
    for method, (over, most, least) in GOALS.items():
        name = ARMS[method]
        head += [f"{name}: ASR over the floor ≤ {over:g}", f"CA lost ≤ {most:g}"]
        head += [] if least is None else [f"R-Acc ≥ {least:g}"]
        head += [f"clean model: CA lost ≤ {CLEAN_LOST:g}"]
    states = [state for cell in cells(records) if (state := state_of(records, cell))]
    count = sum(state == "control removed it" for state in states)
    said = f"The control removed the backdoor in {count} of {len(states)} cells. Of texts the bound on ASR is {TEXT_OVER:g}."
    return f"{grid(head, rows)}\n\n{said}"


def full_tables(records: list[Record]) -> str:
    """docs: the goals of all cells; then for every cell all arms, the clean model, whom ULRL suspected."""
    if not records:
        return NOT_RUN.format("bench-purify")
    parts = [summary(records)]
    for cell in cells(records):
        found = [r for r in records if r.setting.removesuffix(CLEAN) == cell]
        parts.append(f"### {_titled(records, cell)}\n\n{_arms(records, cell)}")
        if clean := _on_clean(records, cell):
            parts.append(clean)
        parts += [text for text in (goals(records, cell), suspicion(records, cell)) if text]
        parts.append(f"{_seeds(found)} {measured_at(found)}")
    if missing := [cell for cell in EXTENDED if cell not in cells(records)]:
        parts.append(f"Not run: {'; '.join(missing)} (`make bench-purify ONLY=…`).")
    return "\n\n".join(parts)


def short_table(records: list[Record]) -> str:
    """README: cells x arms, ASR of every seed, with R-Acc and CA beside it, and what the control says."""
    if not records:
        return NOT_RUN.format("bench-purify")
    rows = []
    for cell in cells(records):
        seeds = _seeds_of(records, cell)

        def of(arm: str, metric: str, cell: str = cell) -> list[Record]:
            return pick(records, setting=cell, defense=arm, metric=metric)

        line = [_titled(records, cell), mean(of("clean_reference", "ftr"), 2)]
        for arm in ("undefended", "fine_tuning", "ft_sam", "d3", "ulrl", "retrained"):
            line.append(by_seed(of(arm, "asr"), seeds).replace("n/u", "–"))
        line.append(" · ".join(mean(of(arm, "r_acc"), 2) for arm in ("d3", "ulrl")))
        line.append(" · ".join(mean(of(arm, "ca"), 3) for arm in ("undefended", "d3", "ulrl", "retrained")))
        rows.append([*line, {"tests": "yes", "": "–"}.get(state := state_of(records, cell), f"no: {state}")])
    head = ["cell", "floor", "ASR as it came", *(ARMS[arm] for arm in ("fine_tuning", "ft_sam", "d3", "ulrl", "retrained")),
            "R-Acc: D3 · ULRL", "CA: as it came · D3 · ULRL · a fresh model", "tests a defense"]  # fmt: skip
    about = (
        f"ASR by seed; floor, R-Acc and CA: means. A cell tests a defense where the attack took (ASR at least {ATTACK}) and "
        f"plain fine-tuning left it in place (at least {CONTROL:.2f})."
    )
    verdicts = []
    for method in GOALS:
        every = [
            met for c in cells(records) if state_of(records, c) == "tests" for *_, met in judged(records, c, method)
        ]
        verdicts.append(f"{ARMS[method]} meets {sum(every)} of {len(every)} goals in the cells that test it")
    return f"{grid(head, rows)}\n\n{about} {'; '.join(verdicts)}. {measured_at(records)}"


def suspicion(records: list[Record], cell: str) -> str:
    """Whether ULRL suspected the target, and whom it suspected in a clean model; "" where it scored no classes."""
    hit = pick(records, setting=cell, defense="ulrl", metric="target_suspected")
    all_of = pick(records, setting=cell, defense="ulrl", metric="suspects")
    false = pick(records, setting=cell + CLEAN, defense="ulrl", metric="suspects")
    said = []
    if hit and all_of:
        right = sum(r.value > 0 for r in hit)
        said.append(f"ULRL suspected the target in {right} of {len(hit)} seeds, {mean(all_of, 1)} classes on average")
    if false:
        falsely = sum(r.value > 0 for r in false)
        shown = by_seed(false, [r.seed for r in false], 0)
        said.append(f"false flags in a clean model: classes by seed {shown}, in {falsely} of {len(false)} seeds")
    return f"{'; '.join(said)}." if said else ""


def step_table() -> str:
    """Seconds of an update beside the plain one, and bytes held per selected weight."""
    records = _read("purifier_step")
    if not records:
        return NOT_RUN.format("bench-purifier_step")
    last = {(r.model, r.setting, r.defense, r.metric): r for r in records}  # a later run replaces an earlier one
    rows, verdicts = [], []
    for model, setting in dict.fromkeys((r.model, r.setting) for r in records):
        for peer, title in PEERS.items():
            of_peer = {m: r.value for (*key, m), r in last.items() if key == [model, setting, peer]}
            if not of_peer:
                continue
            ratio, held, peak = (of_peer.get(m) for m in ("time_ratio", "bytes_per_weight", "memory_ratio"))
            line = [f"{model}, {setting}", title, _or_dash(of_peer.get("seconds"), 4), _or_dash(ratio, 3)]
            rows.append([*line, _or_dash(held, 2), _or_dash(peak, 3)])
            if peer in ("d3_head", "d3_all_linear", "ulrl"):
                for what, value, bound in (("time", ratio, STEP_TIME), ("bytes per selected weight", held, STEP_BYTES)):
                    if value is not None:
                        met = "met" if value <= bound + _ROUNDING else "missed"
                        verdicts.append(f"{model}, {title}: {what} {value:.3f} (at most {bound:g}: {met})")
    head = ["", "an update of", "seconds", "÷ plain", "bytes held per selected weight", "peak memory ÷ plain"]
    return f"{grid(head, rows)}\n\n{'; '.join(verdicts)}. {measured_at(list(last.values()))}"


def search_table() -> str:
    """Settings x seeds on validation rows: ASR, R-Acc, CA, and how many classes ULRL suspected."""
    records = _read("purify_search")
    if not records:
        return NOT_RUN.format("search-purify")
    seeds, rows = sorted({r.seed for r in records}), []
    for setting in dict.fromkeys(r.setting for r in records):
        found = pick(records, setting=setting)
        shown = [
            by_seed(pick(found, metric=m), seeds, d) for m, d in (("asr", 3), ("r_acc", 2), ("ca", 3), ("suspects", 0))
        ]
        rows.append([setting, *("–" if set(text) <= set("n/u ·") else text.replace("n/u", "–") for text in shown)])
    table = grid(["setting", "ASR by seed", "R-Acc", "CA", "classes suspected"], rows)
    return f"{table}\n\nValidation rows, seeds {', '.join(map(str, seeds))}. {measured_at(records)}"


def _read(name: str) -> list[Record]:
    path = RESULTS / f"{name}.jsonl"
    return read_records(path) if path.exists() else []


def _values(records: list[Record], setting: str, arm: str, metric: str) -> dict[int, float]:
    return {r.seed: r.value for r in pick(records, setting=setting, defense=arm, metric=metric)}


def _minus(left: dict[int, float], right: dict[int, float]) -> dict[int, float]:
    return {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)


def _signed(value: float, digits: int = 3) -> str:
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _or_dash(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _is_text(records: list[Record], cell: str) -> bool:
    return any(r.model == "minilm" for r in records if r.setting == cell)


def _seeds_of(records: list[Record], cell: str) -> list[int]:
    return sorted({r.seed for r in records if r.setting == cell})


def _titled(records: list[Record], cell: str) -> str:
    few = len(_seeds_of(records, cell)) < 3
    return f"{cell} (preliminary)" if few else cell


def _seeds(records: list[Record]) -> str:
    count = len({r.seed for r in records})
    return f"{count} seed{'s' if count > 1 else ''}{'' if count > 2 else ': preliminary'}."


def _arms(records: list[Record], cell: str) -> str:
    """Arms x CA, ASR, R-Acc, DER, seconds: mean and interval. The never poisoned model's FTR stands in the column of ASR."""
    rows = []
    for arm, title in ARMS.items():
        of = _of(records, cell, arm)
        if of("ca"):
            asr = of("ftr") if arm == "clean_reference" else of("asr")
            over = over_floor(records, cell, arm)
            shown = [interval(found) for found in (of("ca"), asr, of("r_acc"), of("der"))]
            rows.append([title, *shown, _signed(_mean(over)) if over else "–", interval(of("seconds"), 0)])
    return grid(["the model", "CA", "ASR", "R-Acc", "DER", "ASR over the floor", "seconds"], rows)


def _on_clean(records: list[Record], cell: str) -> str:
    rows = []
    for arm in METHODS:
        of, gone = _of(records, cell + CLEAN, arm), lost(records, cell, arm, clean=True)
        if of("ca"):
            cost = _signed(_mean(gone)) if gone else "–"
            rows.append([ARMS[arm], interval(of("ca")), cost, interval(of("ftr")), interval(of("r_acc"))])
    return grid(["on the clean model", "CA", "CA lost", "FTR", "R-Acc"], rows) if rows else ""


def _of(records: list[Record], setting: str, arm: str) -> Callable[[str], list[Record]]:
    return lambda metric: pick(records, setting=setting, defense=arm, metric=metric)
