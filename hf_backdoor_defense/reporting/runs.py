"""A run folder, read and checked for the report: `results.json`, and `suspects.jsonl` where there is one.

Nothing else is read, so that a report can be made again after the arms' folders are gone. Results of an earlier version lack
keys that came later (`command`, `gates`, `trigger`, `histograms`, `filters`, `purified`, an arm's `history`): what needs them is
left out.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_backdoor_defense.reporting.results import Record, read_records
from hf_backdoor_defense.reporting.tables import summarize

SCHEMA = 1
RESULTS, SUSPECTS = "results.json", "suspects.jsonl"
TOP_SUSPECTS = 20
Points = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one training left: `curve` per epoch (ca, asr), `history` (loss and named terms), and what its methods said."""

    curve: Points
    history: Points
    objectives: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts over the training rows of one arm, as `histograms.count_rows` makes them; `name` is what was counted."""

    arm: str
    name: str
    edges: list[float]
    seeds: dict[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """One filter before the undefended model: why it could not be used (empty where it could), what it learned and was
    calibrated with (`rows`), the thresholds of its score, and what it says of itself."""

    reason: str
    rows: dict[str, float]
    bounds: list[float]
    activity: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Purified:
    """One purification of the undefended model: why there is none (empty where there is), the classes it suspects, the threshold
    of its scores, and per layer what was moved (`ratio`) or stood out (`z`, `flagged`)."""

    reason: str
    suspected: list[str]
    threshold: float
    layers: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as its folder has it. `name` is the folder's; `arms` is by seed and arm, `between` by seed and "arm, round i":
    the trainings that were only a step of a method."""

    name: str
    verdict: str
    failures: list[str]
    plan: dict[str, Any]
    planted: dict[str, int]
    trigger: str
    gates: dict[str, float] | None  # those that were set; None where the results do not say
    command: list[str]
    records: list[Record]
    arms: dict[int, dict[str, Arm]]
    between: dict[int, dict[str, Arm]]
    histograms: list[Histogram]
    suspects: list[dict[str, Any]]
    filters: dict[int, dict[str, Filtered]] = field(default_factory=dict)
    purified: dict[int, dict[str, Purified]] = field(default_factory=dict)

    @property
    def filter_names(self) -> list[str]:
        """The filters that were measured, in their order."""
        return list(dict.fromkeys(name for filters in self.filters.values() for name in filters))

    @property
    def purifiers(self) -> list[str]:
        """What the undefended model was purified with, in its order."""
        return list(dict.fromkeys(name for methods in self.purified.values() for name in methods))


def read_run(folder: str | Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: no such folder, no results in it, results of another schema, or values that no run writes.

    Example:
        >>> import tempfile
        >>> from hf_backdoor_defense.reporting.results import write_json
        >>> record = Record("run", "sst2", "minilm", "none", "dece", "", 0, "ca", 0.8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_json(f"{folder}/results.json", {"schema": 1, "verdict": "dece CA 0.800.", "records": [record]})
        ...     read_run(folder).records[0].value
        0.8
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"`{folder}` must be the folder of a run, but {what}: a report is made from its {RESULTS}. "
                         "Name the --output_dir of hfbd train.")  # fmt: skip
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(
            f"`{folder}` must hold {RESULTS}, and does not: a run writes it when its last arm is finished. Finish the run "
            "with the command that started it, or name the folder of a finished one."
        )
    records = read_records(path)
    check = _Checker(path)
    payload = check.mapping(json.loads(path.read_bytes(), parse_constant=check.constant), "the file")
    if payload.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} must have `schema` {SCHEMA}, got {payload.get('schema')!r}: another version of this package wrote it. "
            "Make the report with that version, or run again."
        )
    try:
        summarize(records)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Run(
        name=folder.resolve().name,
        verdict=check.text(payload.get("verdict", ""), "verdict"),
        failures=[check.text(f, "failures") for f in check.items(payload.get("failures") or [], "failures")],
        plan=check.mapping(payload.get("plan") or {}, "plan"),
        planted={k: int(v) for k, v in check.numbers(payload.get("planted") or {}, "planted").items()},
        trigger=check.text(payload.get("trigger") or "", "trigger"),
        gates=check.gates(payload["gates"]) if "gates" in payload else None,
        command=[check.text(word, "command") for word in check.items(payload.get("command") or [], "command")],
        records=records,
        arms={
            check.seed(seed, "arms"): {
                name: check.arm(arm, f"arms.{seed}.{name}") for name, arm in check.mapping(arms, f"arms.{seed}").items()
            }
            for seed, arms in check.mapping(payload.get("arms") or {}, "arms").items()
        },
        between={
            check.seed(seed, "between"): {
                f"{arm}, round {i}": check.arm(training, f"between.{seed}.{arm}")
                for arm, trainings in check.mapping(arms, f"between.{seed}").items()
                for i, training in enumerate(check.items(trainings, f"between.{seed}.{arm}"), 1)
            }
            for seed, arms in check.mapping(payload.get("between") or {}, "between").items()
        },
        histograms=[
            check.histogram(item, f"histograms[{i}]")
            for i, item in enumerate(check.items(payload.get("histograms") or [], "histograms"))
        ],
        suspects=_read_suspects(folder / SUSPECTS),
        filters={
            check.seed(seed, "filters"): {
                name: check.filtered(item, f"filters.{seed}.{name}")
                for name, item in check.mapping(filters, f"filters.{seed}").items()
            }
            for seed, filters in check.mapping(payload.get("filters") or {}, "filters").items()
        },
        purified={
            check.seed(seed, "purified"): {
                name: check.purified(item, f"purified.{seed}.{name}")
                for name, item in check.mapping(methods, f"purified.{seed}").items()
            }
            for seed, methods in check.mapping(payload.get("purified") or {}, "purified").items()
        },
    )


class _Checker:
    """Refuses what no run writes, and names the file and the place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, wanted: str, got: Any) -> ValueError:
        return ValueError(
            f"{self.path}: `{where}` must be {wanted}, got {str(got)[:60]!r}: no run writes that, the file was edited. "
            "Restore it, or run again."
        )

    def constant(self, name: str) -> Any:
        raise self.fail("the file", "JSON with finite numbers", name)

    def mapping(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(where, "an object", value)
        return value

    def items(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(where, "a list", value)
        return value

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self.fail(where, "text", value)
        return value

    def seed(self, value: str, where: str) -> int:
        if not value.isdecimal():
            raise self.fail(where, "by seed", value)
        return int(value)

    def number(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.fail(where, "a finite number", value)
        return value

    def numbers(self, value: Any, where: str) -> dict[str, float]:
        return {name: self.number(item, f"{where}.{name}") for name, item in self.mapping(value, where).items()}

    def gates(self, value: Any) -> dict[str, float]:
        return self.numbers({k: v for k, v in self.mapping(value, "gates").items() if v is not None}, "gates")

    def points(self, value: Any, where: str, *, shares: bool) -> Points:
        points = [self.numbers(point, where) for point in self.items(value, where)]
        for point in points:
            if "epoch" not in point or (shares and not all(0 <= v <= 1 for k, v in point.items() if k != "epoch")):
                raise self.fail(where, f"points with an epoch{' and shares in 0..1' if shares else ''}", point)
        return points

    def arm(self, value: Any, where: str) -> Arm:
        arm = self.mapping(value, where)
        objectives = self.mapping(arm.get("objectives") or {}, f"{where}.objectives")
        for name, account in objectives.items():
            self.numbers(self.mapping(account, f"{where}.{name}").get("activity") or {}, f"{where}.{name}.activity")
        return Arm(
            curve=self.points(arm.get("curve") or [], f"{where}.curve", shares=True),
            history=self.points(arm.get("history") or [], f"{where}.history", shares=False),
            objectives=objectives,
        )

    def filtered(self, value: Any, where: str) -> Filtered:
        item = self.mapping(value, where)
        calibration = self.mapping(item.get("calibration") or {}, f"{where}.calibration")
        bounds = [calibration.get(side) for side in ("lower", "upper")]
        return Filtered(
            reason=self.text(item.get("reason", ""), f"{where}.reason"),
            rows=self.numbers(item.get("rows") or {}, f"{where}.rows"),
            bounds=[self.number(bound, f"{where}.calibration") for bound in bounds if bound is not None],
            activity=self.numbers(item.get("activity") or {}, f"{where}.activity"),
        )

    def purified(self, value: Any, where: str) -> Purified:
        item = self.mapping(value, where)
        evidence = self.mapping(item.get("evidence") or {}, f"{where}.evidence")
        layers = [
            self.mapping(x, f"{where}.layers") for x in self.items(evidence.get("layers") or [], f"{where}.layers")
        ]
        layers = [layer for layer in layers if "ratio" in layer or "z" in layer]
        for layer in layers:
            self.text(layer.get("name"), f"{where}.layers.name")
            for number in [layer.get("ratio", 0.0), *layer.get("z", []), *layer.get("flagged", [])]:
                self.number(number, f"{where}.layers")
        return Purified(
            reason=self.text(item.get("reason") or item.get("inert") or "", f"{where}.reason"),
            suspected=[self.text(x, f"{where}.suspected_classes") for x in item.get("suspected_classes") or []],
            threshold=self.number(evidence.get("threshold", 0.0), f"{where}.threshold"),
            layers=layers,
        )

    def histogram(self, value: Any, where: str) -> Histogram:
        item = self.mapping(value, where)
        edges = [self.number(edge, f"{where}.edges") for edge in self.items(item.get("edges"), f"{where}.edges")]
        if len(edges) < 2 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
            raise self.fail(f"{where}.edges", "two or more ascending numbers", edges)
        seeds = {}
        for seed, entry in self.mapping(item.get("seeds"), f"{where}.seeds").items():
            for group in ("planted", "other"):
                counts = self.mapping(entry, where).get(group)
                if group == "planted" and counts is None:
                    continue
                numbers = [self.number(count, f"{where}.{group}") for count in self.items(counts, f"{where}.{group}")]
                if len(numbers) != len(edges) - 1 or any(count < 0 for count in numbers):
                    raise self.fail(f"{where}.{group}", f"{len(edges) - 1} counts", counts)
            rest = {k: v for k, v in entry.items() if k not in ("planted", "other") and v is not None}
            self.numbers(rest, where)
            seeds[self.seed(seed, f"{where}.seeds")] = entry
        if not seeds:
            raise self.fail(f"{where}.seeds", "counts by seed", seeds)
        return Histogram(
            arm=self.text(item.get("arm"), f"{where}.arm"),
            name=self.text(item.get("name"), f"{where}.name"),
            edges=edges,
            seeds=seeds,
        )


def _read_suspects(path: Path) -> list[dict[str, Any]]:
    """The first rows of the first seed: they come in the order of suspicion."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row: Any = json.loads(line)
            except ValueError:
                row = None
            wanted: dict[str, Any] = {
                "seed": int,
                "rank": int,
                "row_id": int,
                "score": (int, float),
                "label": str,
                **({"text": str} if isinstance(row, Mapping) and "text" in row else {}),  # an image has none
            }
            if not isinstance(row, Mapping) or any(not isinstance(row.get(k), kind) for k, kind in wanted.items()):
                raise ValueError(
                    f"{path}, line {number} must be an object with {', '.join(wanted)}, got {line[:40]!r}: no run writes "
                    "that. Delete the file, or restore it."
                )
            if len(found) == TOP_SUSPECTS or (found and row["seed"] != found[0]["seed"]):
                break
            found.append(dict(row))
    return found
