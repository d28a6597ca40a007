"""`hfbd detect`: a filter's answer to every text of a file, in a run folder that a stopped run goes on with.

| step | reads | leaves |
|---|---|---|
| check | both files to their end, the model | `plan.json` |
| fit, calibrate, check the rate | three parts of the clean texts (`parts`) | `filter/`, `fitted.json` |
| score | the input, block by block | `scores.jsonl`: a line per row, in order |
| account | counts | `results.json`, `table.txt`, `report.html` |

A text's part is a hash of seed and text: equal texts stay together, so no filter is judged by a text that it has seen. What is
flagged is marked and never left out.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_backdoor_defense.adapters import room
from hf_backdoor_defense.experiment.arguments import _option
from hf_backdoor_defense.experiment.filters import (
    FITTED,
    NEEDS_LABELS,
    READS_LANGUAGE,
    fit_rows_needed,
    load_for_filter,
)
from hf_backdoor_defense.experiment.plan import check_folder
from hf_backdoor_defense.experiment.rows import check_rows, read_rows
from hf_backdoor_defense.fetching import fetched
from hf_backdoor_defense.filters import FILTER_FILE
from hf_backdoor_defense.functional.thresholds import rows_needed
from hf_backdoor_defense.models import weights_sha256
from hf_backdoor_defense.registry import filter_class

WRITES = ("index", "score", "confidence", "flagged")
"""Columns of `scores.jsonl` beside a row's own."""
LOG_CONFIDENCE = ("confidence", "psim")
"""Filters whose score is the logarithm of a probability, which people read more easily."""
SHARES = {True: {"fit": 0.3, "calibrate": 0.5, "check": 0.2}, False: {"calibrate": 0.6, "check": 0.4}}
"""Whether a filter is fitted -> which share of the clean texts is for what. The threshold lies at the edge of its texts, and
needs more of them than what is learned."""
# Files and weights count by their content, and the rest changes no number.
_NOT_IDENTITY = {
    "input", "clean", "model", "language_model", "filter_dir", "batch_size", "output_dir", "max_flagged", "dry_run",
    "disable_tqdm",
}  # fmt: skip


@dataclass(kw_only=True)
class DetectArguments:
    """Which filter looks at which texts, and the clean texts that it is calibrated with."""

    filter: str | None = _option(None, "confidence, psim, strip, onion or rap")
    model: str | None = _option(None, "folder or Hub id of the classifier to look through, as it was downloaded")
    language_model: str | None = _option(
        None, "folder or Hub id of a causal language model (onion, instead of --model)"
    )
    input: str | None = _option(None, "texts to score: .jsonl or .csv")
    clean: str | None = _option(
        None, "clean texts, .jsonl or .csv: to fit, calibrate and check the filter (rap: with labels)"
    )
    filter_dir: str | None = _option(
        None, "a saved, calibrated filter, or ORG/NAME of one; --clean then only measures its rate again"
    )
    text_column: str = _option("text", "column with the text, in both files")
    label_column: str = _option("label", "column of --clean with the class 0..k-1 (rap)")
    target_frr: float = _option(0.01, "share of clean texts that may be flagged")
    max_length: int = _option(128, "tokens per text; longer ones are cut")
    batch_size: int = _option(64, "texts per forward")
    seed: int = _option(0, "parts of the clean texts, random labels, drawn words")
    allow_other_base: bool = _option(False, "psim: use a saved filter with other weights than it was calibrated on")
    max_flagged: float | None = _option(None, "gate: exit 1 when a larger share of the input is flagged")
    output_dir: str = _option("runs/detect", "the run folder; the same command continues a stopped run")
    disable_tqdm: bool = _option(False, "no progress bar")
    dry_run: bool = _option(False, "print the resolved plan and stop")

    def check(self) -> str:
        """The filter's name. Raises ValueError for what can be seen to be wrong without reading texts or weights."""
        name = _name(self)
        filter_class(name)
        if not self.input:
            raise ValueError("No texts were given: there is nothing to score. Set --input to a .jsonl or .csv file.")
        if name == READS_LANGUAGE and not self.language_model:
            raise ValueError("`onion` reads a causal language model, and none is given. Set --language_model to one.")
        if name != READS_LANGUAGE and not self.model:
            raise ValueError(
                f"`{name}` looks through a classifier, and none is given. Set --model to a folder or Hub id."
            )
        if not self.clean and not _is_calibrated(self):
            raise ValueError(
                "A threshold needs clean texts. Set --clean to a .jsonl or .csv file (labels are not read), or --filter_dir to a "
                "filter that was calibrated before."
            )
        if self.allow_other_base and (name != "psim" or self.filter_dir is None):
            raise ValueError(
                "`allow_other_base` is about a PSIM that was saved before: give it as --filter_dir, or leave it out."
            )
        if self.max_length < 4 or self.batch_size < 1:
            raise ValueError(
                f"`max_length` must be at least 4 tokens and `batch_size` at least 1 text, got {self.max_length} and "
                f"{self.batch_size}: special tokens take two, and a forward takes a text."
            )
        if self.max_flagged is not None and not 0 <= self.max_flagged <= 1:
            raise ValueError(f"`max_flagged` must be a share in 0..1, got {self.max_flagged}. For 5 % set 0.05.")
        rows_needed(self.target_frr)  # says what a rate may be
        return name


@dataclass
class DetectPlan:
    """A detection whose files, model and folder were checked; nothing is fitted or written yet."""

    args: DetectArguments
    name: str
    clean: dict[str, list[dict[str, Any]]]  # part -> rows; empty where no clean texts are given
    rows: int
    hashes: dict[str, str]  # of what decides the numbers: input, clean, weights, filter_dir
    model: Any
    tokenizer: Any
    max_length: int

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def looks_through(self) -> str:
        """The checkpoint behind the filter, as it was named."""
        return str(self.args.language_model if self.name == READS_LANGUAGE else self.args.model)

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: everything that changes a number."""
        detect = {k: v for k, v in asdict(self.args).items() if k not in _NOT_IDENTITY}
        return {"detect": {**detect, "filter": self.name, "max_length": self.max_length}, "sha256": self.hashes}

    def text(self) -> str:
        """The plan for people."""
        args = self.args
        sizes = ", ".join(f"{len(rows)} to {part}" for part, rows in self.clean.items())
        lines = [
            ("input", f"{args.input}: {self.rows} texts, cut at {self.max_length} tokens"),
            ("filter", self.name if args.filter_dir is None else f"{self.name}, as saved in {args.filter_dir}"),
            ("looks through", self.looks_through),
            ("clean texts", f"{args.clean}: {sizes}" if args.clean else "none: the rate is not measured again"),
            (
                "rate",
                f"{args.target_frr:.2%} of clean texts may be flagged" if args.filter_dir is None else "as calibrated",
            ),
            ("run folder", args.output_dir),
        ]
        return "\n".join(f"{name:13} {value}" for name, value in lines)


def resolve(args: DetectArguments) -> DetectPlan:
    """Read and check everything that a run will need. Raises ValueError; writes nothing."""
    name = args.check()
    hashes = {}
    checked = check_rows(str(args.input), args.text_column, taken=WRITES)
    hashes["input"] = checked.sha256
    clean: dict[str, list[dict[str, Any]]] = {}
    if args.clean:
        hashes["clean"] = check_rows(args.clean, args.text_column).sha256
        rows = list(read_rows(args.clean, args.text_column))
        if _is_calibrated(args):
            clean = {"check": rows}
        else:
            clean = parts(rows, args.text_column, fitted=name in FITTED and not args.filter_dir, seed=args.seed)
            _check_parts(name, clean, args.target_frr, args.text_column)
    model, tokenizer = load_for_filter(name, str(args.language_model if name == READS_LANGUAGE else args.model))
    if name == NEEDS_LABELS:
        _check_labels(clean.get("fit", []), args.label_column, int(model.config.num_labels))
    hashes["weights"] = weights_sha256(model)
    if args.filter_dir:
        hashes["filter"] = hashlib.sha256(
            (fetched(args.filter_dir, [FILTER_FILE]) / FILTER_FILE).read_bytes()
        ).hexdigest()
    length = min(args.max_length, room(model) or args.max_length)
    plan = DetectPlan(args, name, clean, checked.rows, hashes, model, tokenizer, length)
    check_folder(plan.folder, plan.identity())
    return plan


def parts(rows: list[dict[str, Any]], text_column: str, *, fitted: bool, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Clean rows by what they are for: `fit` (where a filter learns), `calibrate`, `check`; see `SHARES`.

    >>> rows = [{"text": str(i)} for i in range(1000)]
    >>> {part: len(found) for part, found in parts(rows, "text", fitted=True, seed=0).items()}
    {'fit': 291, 'calibrate': 515, 'check': 194}
    """
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in SHARES[fitted]}
    for row in rows:
        digest = hashlib.blake2b(f"{seed}:{row[text_column]}".encode(), digest_size=8).digest()
        place, bound = int.from_bytes(digest, "big") / 2**64, 0.0
        for part, share in SHARES[fitted].items():
            bound += share
            if place < bound or part == "check":
                found[part].append(row)
                break
    return found


def _name(args: DetectArguments) -> str:
    """The filter that is asked for, or the one that was saved."""
    if args.filter_dir is None:
        if args.filter is None:
            raise ValueError(
                "No filter was given. Set --filter to one of hfbd list, for example psim, or --filter_dir."
            )
        return args.filter
    saved = str(_saved(args.filter_dir)["name"])
    if args.filter not in (None, saved):
        raise ValueError(f"`{args.filter_dir}` holds the filter {saved!r}, not {args.filter!r}. Leave --filter out.")
    return saved


def _saved(folder: str) -> dict[str, Any]:
    path = fetched(folder, [FILTER_FILE]) / FILTER_FILE
    if not path.is_file():
        raise ValueError(f"`{folder}` has no {FILTER_FILE}: no filter was saved there. Check --filter_dir.")
    try:
        record = json.loads(path.read_text())
        return {"name": record["name"], "calibration": record["calibration"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` is not what a filter saves: {error}. Save the filter again.") from error


def _is_calibrated(args: DetectArguments) -> bool:
    """Whether a saved filter brings its thresholds along; on another base it has none."""
    if args.filter_dir is None or args.allow_other_base:
        return False
    return _saved(args.filter_dir)["calibration"] is not None


def _check_parts(name: str, clean: dict[str, list[dict[str, Any]]], target_frr: float, text_column: str) -> None:
    """Every part must suffice, which is known before anything is fitted."""
    tail = filter_class(name).tail
    needed, n = rows_needed(target_frr, tail=tail), len(clean["calibrate"])
    share, total = SHARES["fit" in clean]["calibrate"], sum(map(len, clean.values()))
    if n < needed:
        raise ValueError(
            f"calibrating `{name}` for a false rejection rate of {target_frr:g} needs {needed} clean texts, got {n} ({share:.0%} "
            f"of the {total} in --clean; the others are for {' and '.join(part for part in clean if part != 'calibrate')}): with "
            f"fewer no threshold can promise it. Give about {math.ceil(1.1 * needed / share)} clean texts, or ask for "
            f"--target_frr {(2 if tail == 'both' else 1) / (n + 1):.2g} or more."
        )
    least = fit_rows_needed(name) if "fit" in clean else 0
    if "fit" in clean and (different := len({row[text_column] for row in clean["fit"]})) < least:
        raise ValueError(
            f"`{name}` learns from at least {least} different clean texts, got {different} ({SHARES[True]['fit']:.0%} of the "
            f"{total} in --clean). Give about {math.ceil(1.1 * least / SHARES[True]['fit'])} clean texts."
        )
    if empty := [part for part, rows in clean.items() if not rows]:
        raise ValueError(f"the {total} texts in --clean leave none to {empty[0]}: give more of them.")


def _check_labels(rows: list[dict[str, Any]], column: str, classes: int) -> None:
    for row in rows:
        value = row.get(column)
        if str(value) not in map(str, range(classes)):
            raise ValueError(
                f"`rap` needs a class 0..{classes - 1} in the column {column!r} of --clean, got {value!r}: its word is built for "
                "every class. Set --label_column, or map the names to the classifier's numbers."
            )
