"""Tables of records, for a terminal and for README and docs: arms in rows, metrics in columns.

An arm is a defense or a control. Several seeds of an arm give the mean with its 95 % t-interval; a single seed gives
the run's own value and interval. Cells that were not measured are "–". What differs in more than the seed is never
averaged: it becomes a row of its own, and its name says in what it differs.

FTR is the floor of ASR: the share of triggered samples that the clean reference, which was never poisoned, gives to the
target. It stands in the row of `clean_reference`; the other arms have ASR in its place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_backdoor_defense.evaluation.metrics import Estimate, mean_over_seeds
from hf_backdoor_defense.reporting.results import METRICS, Record, cell_key

BASELINES = ("majority", "tfidf", "pixels")  # deterministic: one seed is all there is
ORDER = (*BASELINES, "clean_reference", "undefended", "matched_decay", "fine_tuning")
COLUMNS = ("ca", "asr", "ftr", "r_acc", "time_ratio", "peak_bytes")
MISSING = "–"
_TITLES = {
    **{name: name.upper() for name in ("ca", "asr", "ftr", "der", "aasr", "masr", "frr", "far", "auroc", "bleu")},
    "selective_ca": "CA of accepted",
    **{"r_acc": "R-Acc", "time_ratio": "time ×", "memory_ratio": "memory ×", "peak_bytes": "peak memory (MiB)"},
}


@dataclass(frozen=True)
class Row:
    """One arm of a table.

    Args:
        arm: what to print: the defense, and in brackets in what it differs from other rows of the same defense.
        defense: the name in the records.
        estimates: by metric. Over seeds `n` counts seeds; for one seed it is the record's own n (1 where it has none).
        seeds: by metric, how many seeds are behind the estimate.
    """

    arm: str
    defense: str
    estimates: dict[str, Estimate]
    seeds: dict[str, int]


def _estimate(records: Sequence[Record]) -> Estimate:
    if len(records) > 1:
        return mean_over_seeds([record.value for record in records])
    only = records[0]
    return Estimate(only.value, only.n or 1, only.low, only.high)


def _arm(record: Record, all_of_it: Sequence[Record], everything: Sequence[Record]) -> str:
    differs = [f for f in ("benchmark", "dataset", "model", "attack") if len({getattr(r, f) for r in everything}) > 1]
    differs += ["setting"] if len({r.setting for r in all_of_it}) > 1 else []
    words = ", ".join(getattr(record, name) or "default" for name in differs)
    return f"{record.defense} ({words})" if words else record.defense


def summarize(records: Iterable[Record]) -> list[Row]:
    """One row per arm: `ORDER` first, then the other defenses as they first appear.

    Args:
        records: of one comparison; at least one.

    Raises:
        ValueError: no records, or the same measurement (`cell_key`) twice.

    Example:
        >>> def record(defense, seed, value):
        ...     return Record("trajectory", "sst2", "minilm", "badnets", defense, "", seed, "asr", value)
        >>> rows = summarize([record("trajectory", 0, 0.1), record("trajectory", 1, 0.2), record("undefended", 0, 1.0)])
        >>> [(row.arm, round(row.estimates["asr"].value, 2), row.seeds["asr"]) for row in rows]
        [('undefended', 1.0, 1), ('trajectory', 0.15, 2)]
    """
    everything = list(records)
    if not everything:
        raise ValueError("`records` must hold at least one record, got none: there is nothing to show. Measure first.")
    seen: set[tuple[object, ...]] = set()
    groups: dict[str, dict[tuple[object, ...], dict[str, list[Record]]]] = {}
    for record in everything:
        key = cell_key(record)
        if key in seen:
            raise ValueError(
                f"`records` must hold a measurement once, got {key} again: its mean would count a seed twice. "
                "Drop the older one."
            )
        seen.add(key)
        groups.setdefault(record.defense, {}).setdefault(key[:-2], {}).setdefault(record.metric, []).append(record)
    first = [name for name in ORDER if name in groups]
    rows = []
    for defense in [*first, *(name for name in groups if name not in first)]:
        all_of_it = [record for record in everything if record.defense == defense]
        for metrics in groups[defense].values():
            arm = _arm(next(iter(metrics.values()))[0], all_of_it, everything)
            estimates = {metric: _estimate(of_metric) for metric, of_metric in metrics.items()}
            rows.append(Row(arm, defense, estimates, {metric: len(found) for metric, found in metrics.items()}))
    return rows


def format_estimate(estimate: Estimate | None, metric: str) -> str:
    """A cell: "0.78 [0.75, 0.81]", the value alone without an interval, "–" for None; bytes in whole MiB.

    Example:
        >>> format_estimate(Estimate(0.78, 500, 0.7499, 0.81), "ca"), format_estimate(None, "ca")
        ('0.78 [0.75, 0.81]', '–')
    """
    if estimate is None:
        return MISSING
    scale, digits = (2**20, 0) if metric == "peak_bytes" else (1, 2)

    def number(value: float) -> str:
        rounded = round(value / scale, digits)
        return f"{'−' if rounded < 0 else ''}{abs(rounded):.{digits}f}"

    text = number(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]"


def seeds_note(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """What the brackets are and how many seeds there are; *preliminary* below three. Baselines do not count.

    Example:
        >>> seeds_note([Row("dece", "dece", {"ca": Estimate(0.8, 9, 0.7, 0.9)}, {"ca": 1})], ["ca"])
        '(preliminary: 1 seed; claims need three)'
    """
    trained = [row for row in rows if row.defense not in BASELINES] or rows
    counts = [row.seeds[metric] for row in trained for metric in metrics if metric in row.seeds]
    seeds = min(counts, default=0)
    if seeds < 3:
        return f"(preliminary: {seeds} seed{'' if seeds == 1 else 's'}; claims need three)"
    return f"(mean and 95 % interval over {seeds if seeds == max(counts) else f'{seeds} to {max(counts)}'} seeds)"


def cells(rows: Sequence[Row], metrics: Sequence[str]) -> list[list[str]]:
    """A table as text: a line of titles, then one line per row.

    Example:
        >>> cells([Row("dece", "dece", {"ca": Estimate(0.8, 9, 0.7, 0.9)}, {"ca": 1})], ["ca", "asr"])
        [['arm', 'CA', 'ASR'], ['dece', '0.80 [0.70, 0.90]', '–']]
    """
    head = ["arm", *(_TITLES.get(metric, metric.replace("_", " ")) for metric in metrics)]
    return [head, *([row.arm, *(format_estimate(row.estimates.get(m), m) for m in metrics)] for row in rows)]


def render_terminal(records: Iterable[Record], *, planted: int | None = None, columns: Sequence[str] = COLUMNS) -> str:
    """The table of a run in plain text.

    Args:
        records: of one comparison.
        planted: how many poisoned rows the simulated attack put into the training set, where that is known; adds a
            line with the precision and recall of each arm that dropped rows.
        columns: names of `METRICS`.

    Raises:
        ValueError: as `summarize`; `planted` below 0.

    Example:
        >>> def record(defense, metric, value, low, high):
        ...     return Record("run", "sst2", "minilm", "badnets", defense, "", 0, metric, value, 400, low, high)
        >>> print(render_terminal([record("undefended", "ca", 0.83, 0.79, 0.86),
        ...                        record("undefended", "asr", 1.0, 0.99, 1.0)]))
        arm         CA                 ASR                FTR  R-Acc  time ×  peak memory (MiB)
        undefended  0.83 [0.79, 0.86]  1.00 [0.99, 1.00]  –    –      –       –
        (preliminary: 1 seed; claims need three)
    """
    if planted is not None and planted < 0:
        raise ValueError(f"`planted` must be >= 0, got {planted}: it counts rows. Pass None where it is not known.")
    rows = summarize(records)
    table = cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append(seeds_note(rows, columns))
    if planted is not None:
        lines.append(f"poisoned rows planted: {planted}")
        for row in rows:
            words = {
                "precision": "precision at n (of its {n} most suspicious rows)",
                "recall": "share of them it dropped",
            }
            found = [
                f"{text.format(n=planted)} {format_estimate(row.estimates[m], m)}"
                for m, text in words.items()
                if m in row.estimates
            ]
            lines += [f"  {row.arm}: {'; '.join(found)}"] if found else []
    return "\n".join(lines)


def render_markdown(records: Iterable[Record], metrics: Sequence[str]) -> str:
    """A GitHub table with the numbers of `render_terminal`, for `replace_block`.

    Args:
        records: of one comparison. metrics: the columns, names of `METRICS`.

    Raises:
        ValueError: as `summarize`; no or an unknown metric.

    Example:
        >>> print(render_markdown([Record("run", "sst2", "minilm", "none", "dece", "", 0, "ca", 0.8)], ["ca"]))
        | arm | CA |
        |---|---|
        | dece | 0.80 |
        <BLANKLINE>
        (preliminary: 1 seed; claims need three)
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(
            f"`metrics` must be among {', '.join(METRICS)}, got {list(metrics)}: they are the columns. Fix it."
        )
    rows = summarize(records)
    head, *body = ([cell.replace("|", "\\|") for cell in line] for line in cells(rows, metrics))
    lines = [head, *body]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([table[0], "|" + "---|" * len(head), *table[1:], "", seeds_note(rows, metrics)])


def replace_block(text: str, name: str, body: str) -> str:
    """The text with `body` between its lines `<!-- begin:NAME -->` and `<!-- end:NAME -->`, and all else as it was.

    Args:
        text: of a document. name: of the block. body: what is to stand there; applying it twice changes nothing more.

    Raises:
        ValueError: a marker is absent, there twice, or the end comes first.

    Example:
        >>> replace_block("a <!-- begin:t -->old<!-- end:t --> b", "t", "new")
        'a <!-- begin:t -->\\nnew\\n<!-- end:t --> b'
    """
    begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
    found = text.count(begin), text.count(end)
    if found != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(
            f"The text must hold `{begin}` and then `{end}` once each, got {found[0]} and {found[1]} of them"
            f"{' in the wrong order' if found == (1, 1) else ''}: the table goes between. Add or fix the markers."
        )
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return "\n".join([before + begin, body.strip("\n"), end + after])
