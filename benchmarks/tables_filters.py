"""The tables of weight poisoning, of filters and of the search for PSIM's defaults, rendered from results/*.jsonl."""

from collections.abc import Iterable

from benchmarks.grid import RESULTS
from hf_backdoor_defense.evaluation.metrics import mean_over_seeds
from hf_backdoor_defense.reporting.results import Record, read_records

FILTERS = ("confidence", "psim", "strip", "onion", "rap")
STRATEGIES = {
    "full": "full",
    "lora": "LoRA",
    "p_tuning": "P-tuning",
    "prompt_tuning": "prompt-tuning",
    "prefix_tuning": "prefix-tuning",
}
ATTACKS = {"badnets": "BadNets", "insent": "InSent", "ripples": "RIPPLES", "lwp": "LWP"}
PEERS = {
    "undefended": "the victim alone (LoRA)",
    "undefended_merged": "the victim alone, LoRA merged",
    "psim": "PSIM, two models",
    "psim_mixed": "PSIM, one base with two adapters (as shipped)",
    "psim_one_batch": "PSIM, always one mixed batch",
    "rap": "RAP",
    "strip": "STRIP, 10 copies",
    "onion": "ONION, language model of the victim's size",
}


def grid(head: list[str], rows: Iterable[list[str]]) -> str:
    """A GitHub table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def pick(records: list[Record], **wanted: object) -> list[Record]:
    """The records whose fields are these."""
    return [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]


def mean(records: list[Record], digits: int = 3) -> str:
    """Mean over seeds, without an interval."""
    return f"{sum(r.value for r in records) / len(records):.{digits}f}" if records else "–"


def interval(records: list[Record], digits: int = 2) -> str:
    """Mean and 95 % interval over seeds; one seed stands alone."""
    if not records:
        return "–"
    found = mean_over_seeds([r.value for r in records])
    text = f"{found.value:.{digits}f}"
    return text if found.low is None else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]".replace("-", "−")


def by_seed(records: list[Record], seeds: Iterable[int], digits: int = 2) -> str:
    """Every seed's value, for a mean hides that a seed decides; "n/u" (not usable) where a filter gave none."""
    of_seed = {r.seed: f"{r.value:.{digits}f}" for r in records}
    return " · ".join(of_seed.get(seed, "n/u") for seed in sorted(seeds))


def measured_at(records: list[Record]) -> str:
    """Machines, each with the commits that ran there.

    >>> from functools import partial
    >>> env = {"cpus": 2, "torch": "2.13.0", "python": "3.11.7"}
    >>> of = partial(Record, "b", "d", "m", "none", "dece", "", 0, "bleu")
    >>> measured_at([of(1.0, env={**env, "commit": "a" * 40}), of(2.0, env={**env, "commit": "b" * 40, "dirty": True})])
    '2 CPU cores, torch 2.13.0, Python 3.11.7, commits aaaaaaa, bbbbbbb with local changes.'
    """
    places: dict[str, dict[str, None]] = {}
    for env in [record.env for record in records]:
        machine = env.get("gpu") or f"{env.get('cpus')} CPU cores"
        commit = f"{str(env.get('commit'))[:7]}{' with local changes' if env.get('dirty') else ''}"
        commits = places.setdefault(f"{machine}, torch {env.get('torch')}, Python {env.get('python')}", {})
        commits[commit] = None
    return "; ".join(f"{place}, commit{'s' * (len(c) > 1)} {', '.join(c)}" for place, c in places.items()) + "."


def weight_poisoning_core() -> str:
    """README: attack x strategy, ASR of every seed without and behind each filter, and what each filter costs clean texts."""
    records = read_records(RESULTS / "weight_poisoning.jsonl")
    rows = []
    for attack in ("badnets", "insent"):
        for strategy in ("full", "lora", "p_tuning"):
            cell = pick(records, setting=f"{attack}: {strategy}")
            seeds = {r.seed for r in cell}
            line = [ATTACKS[attack], STRATEGIES[strategy]]
            line.append(mean(pick(cell, defense="clean_reference", metric="ftr"), 2))
            line.append(by_seed(pick(cell, defense="undefended", metric="asr"), seeds))
            for name in FILTERS[:4]:
                line.append(by_seed(pick(cell, defense=name, metric="asr"), seeds))
            rows.append(line)
    head = ["attack", "victim", "floor", "ASR, no filter", *(f"{name}" for name in FILTERS[:4])]
    rates = []
    for name in FILTERS[:4]:
        of_filter = [r for r in records if r.defense == name and r.setting.split(": ")[-1] in STRATEGIES]
        core = [r for r in of_filter if r.setting.split(": ")[0] in ("badnets", "insent")]
        what = "edits" if name == "onion" else "flags"
        rates.append(f"{name} {what} {mean([r for r in core if r.metric == 'frr'])} of clean texts")
    core = [r for r in records if r.setting.split(": ")[0] in ("badnets", "insent")]
    seeds = " · ".join(map(str, sorted({r.seed for r in core})))
    return (
        f"{grid(head, rows)}\n\nASR by seed ({seeds}), test rows; floor: what the same victim on a clean base gives to the "
        f"target. At a stated rate of 0.01 {'; '.join(rates)}. n/u: not usable, no bar of ONION's kept the victim's accuracy "
        "within a point. "
        f"{measured_at(core)}"
    )


def weight_poisoning_full() -> str:
    """docs: every cell of the benchmark, mean and 95 % interval over seeds."""
    records = read_records(RESULTS / "weight_poisoning.jsonl")
    parts = []
    metrics = ["ca", "selective_ca", "coverage", "asr", "frr", "far", "auroc", "passes"]
    for cell in dict.fromkeys(r.setting.partition(": ")[0] for r in records):
        of_cell = [r for r in records if r.setting.partition(": ")[0] == cell]
        seeds = len({r.seed for r in of_cell})
        rows = []
        for setting in dict.fromkeys(r.setting for r in of_cell):
            found = pick(of_cell, setting=setting)
            for defense in ("clean_reference", "undefended", *FILTERS):
                of_arm = pick(found, defense=defense)
                if not of_arm:
                    continue
                line = [STRATEGIES.get(setting.partition(": ")[2], setting.partition(": ")[2]), defense]
                for metric in metrics:
                    name = "ftr" if (metric, defense) == ("asr", "clean_reference") else metric
                    digits = 3 if metric in ("frr", "auroc") else 1 if metric == "passes" else 2
                    of_metric = pick(of_arm, metric=name)
                    if (
                        metric == "auroc" and of_metric
                    ):  # of a two-sided filter 0 is as good as 1, and a mean would hide it
                        line.append(by_seed(of_metric, {r.seed for r in of_cell}, digits))
                    elif metric == "passes":
                        line.append(mean(of_metric, 1))
                    else:
                        few = "" if len(of_metric) in (0, seeds) else f" ({len(of_metric)} of {seeds} seeds)"
                        line.append(interval(of_metric, digits) + few)
                rows.append(line)
        head = [
            "victim",
            "arm",
            "CA (strict)",
            "selective CA",
            "coverage",
            "ASR (or FTR)",
            "FRR",
            "FAR",
            "AUROC",
            "passes",
        ]
        note = f"{seeds} seed{'s' if seeds > 1 else ''}{'' if seeds > 2 else ': preliminary'}. {measured_at(of_cell)}"
        parts.append(f"### {cell}\n\n{grid(head, rows)}\n\n{note}")
    return "\n\n".join(parts)


def filters() -> str:
    """What a filter costs before a victim: time over the victim's own, and passes."""
    records = read_records(RESULTS / "filters.jsonl")
    settings = list(dict.fromkeys(r.setting for r in records if r.metric == "time_ratio"))
    rows = []
    for defense, title in PEERS.items():
        line = [title]
        for setting in settings:
            line.append(mean(pick(records, defense=defense, setting=setting, metric="time_ratio"), 2))
        if any(cell != "–" for cell in line[1:]):
            rows.append(line)
    table = grid(["before every answer", *settings], rows)
    return f"{table}\n\nTime over the victim's own. {measured_at(records)}"


def psim_search() -> str:
    """Modules x stop rules: share of triggered rows that pass (FAR), base by base."""
    records = read_records(RESULTS / "psim_search.jsonl")
    bases = sorted({(r.attack, r.seed) for r in records})
    parts = []
    for score in dict.fromkeys(r.setting.split("; ")[2] for r in records):
        found = [r for r in records if r.setting.split("; ")[2] == score and r.metric == "far"]
        stops = list(dict.fromkeys(r.setting.split("; ")[1].partition(" (")[0] for r in found))
        rows = []
        for name in dict.fromkeys(r.setting.split("; ")[0] for r in found):
            line = [name]
            for stop in stops:
                of_stop = {(r.attack, r.seed): r.value for r in found if r.setting.startswith(f"{name}; {stop} (")}
                line.append(" ".join(f"{of_stop[base]:.2f}" if base in of_stop else "–" for base in bases))
            rows.append(line)
        rate = mean([r for r in records if r.setting.split("; ")[2] == score and r.metric == "frr"])
        parts.append(f"**{score}** (mean FRR {rate})\n\n{grid(['module', *stops], rows)}")
    order = ", ".join(f"{attack} {seed}" for attack, seed in bases)
    note = f"In each cell: {order}; – where the rule was never reached, or the training was not run. {measured_at(records)}"
    return "\n\n".join([*parts, note])


def language_model() -> str:
    """What ONION's language model is worth."""
    facts = {r.metric: r for r in read_records(RESULTS / "onion_lm.jsonl")}
    perplexity, area = facts["perplexity"], facts["auroc"]
    return (
        f"ONION's language model ({perplexity.model}, from scratch, the victim's vocabulary): perplexity "
        f"{perplexity.value:.0f} on SST-2 validation texts; AUROC of its largest suspicion {area.value:.2f} on {area.n} "
        "validation texts, half of them with `mn` inserted."
    )
