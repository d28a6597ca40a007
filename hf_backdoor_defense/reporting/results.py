"""The one schema and the one writer of results: one `Record` per measurement.

| file | written by | holds |
|---|---|---|
| a run's `results.json` | `write_json` (whole or not at all) | an object; its key `records` is a list of records |
| `benchmarks/results/NAME.jsonl` | `append_records` (line by line) | one record per line |

`read_records` reads both. A process that is killed while it appends leaves half a line: readers ignore it with a
warning, the next append removes it. Importing this module loads neither torch nor transformers.
"""

import dataclasses
import difflib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from hf_backdoor_defense.evaluation.metrics import Estimate

SHARES = frozenset(
    "precision recall ca selective_ca asr ftr r_acc der aasr masr aasr_floor masr_floor control_asr frr far auroc coverage "
    "exact_match parse_rate reference_parse_rate target_suspected untriggered_hits empty empty_triggered cut_off "
    "cut_off_triggered repetitive repetitive_triggered share_of_loss inert suppressed suppressed_payload".split()
)
METRICS = tuple(
    "precision recall ca selective_ca asr ftr r_acc der aasr masr aasr_floor masr_floor aasr_over_floor masr_over_floor "
    "control_asr frr far auroc coverage bleu exact_match parse_rate perplexity loss norm_ratio dose seconds peak_bytes "
    "time_ratio memory_ratio passes target_pull suspects target_suspected bytes_per_weight bits_per_byte sentence_bleu "
    "untriggered_hits empty empty_triggered cut_off cut_off_triggered repetitive repetitive_triggered "
    "reference_parse_rate gap relative_step share_of_loss inert suppressed suppressed_payload".split()
)
_SIGNED = frozenset({"target_pull", "aasr_over_floor", "masr_over_floor", "gap"})  # every other metric is >= 0


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}: tables take means of it. Rerun the cell.")
    return float(value)


def _count(name: str, value: Any) -> int:
    least = 1 if name == "n" else 0
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}: it counts or numbers. Pass an int.")
    return int(value)


@dataclass(frozen=True)
class Record:
    """One measured value and everything that says what it belongs to.

    Args:
        benchmark, dataset, model, attack, defense: names, not empty. `defense` is a registry name or a control.
        setting: what else identifies the cell, in short ("rate=0.03"); may be empty.
        seed: of the run. metric: one of `METRICS`.
        value: finite; in 0..1 for `SHARES`, >= 0 for the others except `target_pull`, `gap` and the two `_over_floor`.
        n: samples or seeds behind the value, >= 1, or None.
        low, high: the interval, both or neither. It may leave 0..1: a t-interval does.
        env: what `environment` returned; not part of the identity.

    Raises:
        ValueError: anything else.

    Example:
        >>> record = Record("trajectory", "sst2", "minilm", "badnets", "undefended", "", 0, "asr", 0.97, n=400)
        >>> record.value, record.low
        (0.97, None)
    """

    benchmark: str
    dataset: str
    model: str
    attack: str
    defense: str
    setting: str
    seed: int
    metric: str
    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None
    env: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("benchmark", "dataset", "model", "attack", "defense", "setting"):
            text = getattr(self, name)
            if not isinstance(text, str) or (not text and name != "setting"):
                raise ValueError(f"`{name}` must be a name, got {text!r}: it identifies the cell. Pass a string.")
        if self.metric not in METRICS:
            near = difflib.get_close_matches(str(self.metric), METRICS, n=1)
            do = f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(METRICS)}."
            raise ValueError(f"`metric` must be a known metric, got {self.metric!r}: tables know no other. {do}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"`low`, `high` must be one interval, got {self.low}, {self.high}. Pass both or neither.")
        for name, convert in (("seed", _count), ("value", _number), ("n", _count), ("low", _number), ("high", _number)):
            given = getattr(self, name)
            if given is not None or name in ("seed", "value"):
                object.__setattr__(self, name, convert(name, given))
        if self.metric in SHARES and not 0 <= self.value <= 1:
            raise ValueError(f"`{self.metric}` must be in 0..1, got {self.value}: a share. Divide percent by 100.")
        if self.metric not in _SIGNED and self.value < 0:
            raise ValueError(f"`{self.metric}` must be >= 0, got {self.value}: it is an amount. Measure it again.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"`low` must be <= `high`, got {self.low} and {self.high}: an interval. Swap them.")
        if not isinstance(self.env, dict):
            raise ValueError(f"`env` must be a dict, got {self.env!r}: it is written as JSON. Pass `environment()`.")

    @classmethod
    def from_estimate(cls, estimate: Estimate, **identity: Any) -> Self:
        """A record of a measured estimate; `identity` holds the other fields (`benchmark` … `metric`, `env`).

        Raises:
            ValueError: as `Record`. TypeError: a field of the identity is missing or unknown.

        Example:
            >>> cell = dict(benchmark="b", dataset="d", model="m", attack="none", defense="dece", setting="", seed=1)
            >>> Record.from_estimate(Estimate(0.5, 10, 0.2, 0.8), metric="ca", **cell).n
            10
        """
        return cls(value=estimate.value, n=estimate.n, low=estimate.low, high=estimate.high, **identity)


_FIELDS = tuple(f.name for f in dataclasses.fields(Record))
_START = f'{{"{_FIELDS[0]}": "'.encode()  # how every line of ours begins


def cell_key(record: Record) -> tuple[str, str, str, str, str, str, int, str]:
    """What a record measures, without what came out: two records with one key are the same measurement made twice.

    Example:
        >>> cell_key(Record("b", "d", "m", "none", "dece", "", 1, "ca", 0.5))
        ('b', 'd', 'm', 'none', 'dece', '', 1, 'ca')
    """
    r = record
    return r.benchmark, r.dataset, r.model, r.attack, r.defense, r.setting, r.seed, r.metric


def _version(distribution: str) -> str | None:
    found = importlib.metadata.distributions(name=distribution)
    return next((d.version for d in found), None)


def _checkout() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    git = ["git", "--no-optional-locks", "-C", str(root)]
    # Code only: a benchmark that adds lines to its results file does not change what it measures.
    changes = ["status", "--porcelain", "-uall", "--", "hf_backdoor_defense/*.py", "benchmarks/*.py"]
    try:
        head, changed = (
            subprocess.check_output(git + command, stderr=subprocess.DEVNULL, text=True).strip()
            for command in (["rev-parse", "HEAD"], changes)
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head, bool(changed)


def environment() -> dict[str, Any]:
    """Where a number was measured: versions, machine, commit, world size. Imports nothing; asks torch only if loaded.

    Returns:
        python, torch, transformers, accelerate, datasets, hf_backdoor_defense: versions, or None where not installed.
        machine, cpus: the processor family and how many. gpu: its name, or None without one (or without torch loaded).
        commit, dirty: of the checkout this package lies in and whether its Python files differ from it; else None.
        world_size: processes of this run.

    Example:
        >>> sorted(environment())[:4]
        ['accelerate', 'commit', 'cpus', 'datasets']
    """
    torch = sys.modules.get("torch")
    gpu, world_size = None, int(os.environ.get("WORLD_SIZE") or 1)
    if torch is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world_size = torch.distributed.get_world_size()
    commit, dirty = _checkout()
    package = sys.modules[__name__.partition(".")[0]]
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "hf_backdoor_defense": _version("hf-backdoor-defense") or getattr(package, "__version__", None),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "commit": commit,
        "dirty": dirty,
        "world_size": world_size,
    }


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes a file whole or not at all, for this package's other writers; missing folders are made.

    Raises:
        OSError: the folder cannot be written; what stood at `path` is then as before.

    Example: see `write_json`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _json(payload: Any, indent: int | None = None) -> bytes:
    try:
        text = json.dumps(payload, indent=indent, allow_nan=False, default=dataclasses.asdict)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The payload must be JSON without NaN, got something else ({error}): others must be able to read it. "
            "Convert arrays with .tolist() and drop what is not finite."
        ) from error
    return text.encode() + b"\n"


def write_json(path: str | Path, payload: Any) -> Path:
    """Writes JSON whole or not at all; records and other dataclasses become objects.

    Args:
        path: the file, replaced if it exists. payload: JSON values, without NaN and infinities.

    Raises:
        ValueError: the payload is not JSON; an existing file stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(f"{folder}/results.json", {"records": []}).read_text()
        '{\\n  "records": []\\n}\\n'
    """
    return write_bytes(path, _json(payload, indent=2))


def _torn(data: bytes) -> bytes:
    """The half line that a killed `append_records` leaves at the end, else nothing."""
    tail = data[data.rfind(b"\n") + 1 :]
    if not tail.startswith(_START) and not _START.startswith(tail):
        return b""  # not ours to drop
    try:
        json.loads(tail)
    except ValueError:
        return tail
    return b""


def append_records(path: str | Path, records: Iterable[Record]) -> Path:
    """Appends one line per record and waits until the disk has them; a half line of a killed process goes first.

    Args:
        path: a `.jsonl` file, made if missing. records: any number. One process writes to a file at a time.

    Raises:
        ValueError: not a `.jsonl` path, or an `env` that is not JSON; nothing is written then.

    Example: see `read_records`.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"`path` must end in .jsonl, got {path}: records are appended as JSON lines. Rename it.")
    payload = b"".join(_json(dataclasses.asdict(record)) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        data = file.read()
        torn = _torn(data)
        if torn:
            file.truncate(len(data) - len(torn))
        elif data and not data.endswith(b"\n"):
            payload = b"\n" + payload
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    return path


def _record(item: Any, where: str) -> Record:
    if not isinstance(item, dict) or set(item) != set(_FIELDS):
        keys = set(item) if isinstance(item, dict) else set()
        raise ValueError(
            f"{where} must be an object with the keys {', '.join(_FIELDS)}, got unknown {sorted(keys - set(_FIELDS))} "
            f"and missing {sorted(set(_FIELDS) - keys)}: all results share one schema. Write it with this module."
        )
    try:
        return Record(**item)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON, got {text[:40]!r}: {error}. Repair or delete it.") from error


def read_records(path: str | Path) -> list[Record]:
    """The records of a `.jsonl` file, or of any other JSON file under its key `records`, in the order of the file.

    Args:
        path: what `append_records` or `write_json` wrote.

    Raises:
        ValueError: not JSON, unknown or missing keys, values that no `Record` has; names the file and the line.
        FileNotFoundError: no such file.

    Example:
        >>> import tempfile
        >>> record = Record("b", "d", "m", "none", "dece", "", 1, "ca", 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_records(append_records(f"{folder}/b.jsonl", [record])) == [record]
        True
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix != ".jsonl":
        payload = _parse(data, str(path))
        if not isinstance(payload, dict) or not isinstance(payload.get("records"), list):
            raise ValueError(f"{path} must be an object with a list `records`, got none: tables read it. Run again.")
        return [_record(item, f"{path}, record {i}") for i, item in enumerate(payload["records"], 1)]
    torn = _torn(data)
    if torn:
        warnings.warn(
            f"{path}: the last line is cut off ({len(torn)} bytes) and ignored: its writer was killed. "
            "The next append removes it.",
            stacklevel=2,
        )
    lines = enumerate(data[: len(data) - len(torn)].split(b"\n"), 1)
    return [_record(_parse(line, f"{path}, line {i}"), f"{path}, line {i}") for i, line in lines if line.strip()]
