"""`hfbd detect`, run: fit, calibrate, score, account. The same call continues a stopped one."""

import json
import math
import time
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.experiment.command import verb_command
from hf_backdoor_defense.experiment.detect import LOG_CONFIDENCE, DetectPlan
from hf_backdoor_defense.experiment.entries import filter_entries
from hf_backdoor_defense.experiment.filters import NEEDS_LABELS, build_filter, load_filter
from hf_backdoor_defense.experiment.plan import PLAN_NAME
from hf_backdoor_defense.experiment.rows import append_lines, blocks, read_rows, whole_lines
from hf_backdoor_defense.experiment.summary import Outcome
from hf_backdoor_defense.filters import Filter
from hf_backdoor_defense.reporting.plain import write_plain
from hf_backdoor_defense.reporting.results import Record, environment, write_bytes, write_json
from hf_backdoor_defense.reporting.sealed import write_results

_BATCHES_PER_BLOCK = 16  # enough texts to sort by length, few enough to lose when stopped


def execute(plan: DetectPlan) -> Outcome:
    """Fit, calibrate, score and account, from where an earlier call stopped."""
    from hf_backdoor_defense.input_filters.psim import PsimNotUsable

    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / PLAN_NAME, plan.identity())
    plan.model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        detector, frr, fitted = _calibrated(plan)
    except PsimNotUsable as error:
        reason = f"psim cannot be used here: {error}"
        return _written(plan, Outcome([], "", "Nothing was scored.", [reason]), {})
    flagged, seconds = _score(plan, detector)
    records = _records(plan, frr, flagged, seconds, float(detector.passes))
    failures = []
    if plan.args.max_flagged is not None and flagged > plan.args.max_flagged * plan.rows:
        failures.append(
            f"GATE: {flagged / plan.rows:.3f} of the texts are flagged, allowed is {plan.args.max_flagged:g}"
        )
    calibration = None if detector.calibration is None else detector.calibration.to_dict()
    table = _table(plan, detector, frr, flagged, seconds)
    outcome = Outcome(records, table, _verdict(plan, frr, flagged), failures)
    return _written(
        plan, outcome, {"calibration": calibration, "frr": frr, "rows": plan.rows, "flagged": flagged}, fitted
    )


def _calibrated(plan: DetectPlan) -> tuple[Filter, dict[str, Any] | None, dict[str, Any]]:
    """The filter, its rate on clean texts that it has not seen, and method and activity of a trained one (PSIM); all kept from an
    earlier call where they are there."""
    args, done, saved = plan.args, plan.folder / "fitted.json", plan.folder / "filter"
    texts = {part: [row[args.text_column] for row in rows] for part, rows in plan.clean.items()}
    options: dict[str, Any] = {"batch_size": args.batch_size}
    if done.is_file() and not args.filter_dir:
        detector = load_filter(saved, plan.name, plan.model, plan.tokenizer, **options)
        kept = json.loads(done.read_text())
        return detector, kept["frr"], kept.get("fitted", {})
    if args.filter_dir:
        options |= {"allow_other_base": True} if args.allow_other_base else {}
        detector = load_filter(args.filter_dir, plan.name, plan.model, plan.tokenizer, **options)
    else:
        if "fit" in texts:
            print(f"fitting {plan.name} on {len(texts['fit'])} clean texts", flush=True)
        detector = build_filter(
            plan.name,
            plan.model,
            plan.tokenizer,
            texts=texts.get("fit", ()),
            labels=[int(row[args.label_column]) for row in plan.clean["fit"]] if plan.name == NEEDS_LABELS else None,
            seed=args.seed,
            max_length=plan.max_length,
            batch_size=args.batch_size,
        )
    if "calibrate" in texts:
        print(f"calibrating on {len(texts['calibrate'])} clean texts", flush=True)
        detector.calibrate(texts["calibrate"], args.target_frr)
    if done.is_file():
        return detector, json.loads(done.read_text())["frr"], {}
    frr = None
    if "check" in texts:
        print(f"measuring the rate on {len(texts['check'])} further clean texts", flush=True)
        frr = detector.measure_frr(texts["check"])
    if not args.filter_dir:
        detector.save(saved)
    psim = getattr(detector, "psim", None)
    fitted = {} if psim is None or args.filter_dir else {"method": psim.to_dict(), "activity": psim.activity()}
    write_json(done, {"frr": frr, "fitted": fitted})
    return detector, frr, fitted


def _score(plan: DetectPlan, detector: Filter) -> tuple[int, float | None]:
    """Answer every row that has none yet. Returns how many are flagged in all, and the time unless an earlier call had a part."""
    path, column = plan.folder / "scores.jsonl", plan.args.text_column
    done = whole_lines(path)
    rows = enumerate(read_rows(str(plan.args.input), column))
    todo = ({"index": index, **row} for index, row in rows if index >= done)
    start = time.perf_counter()
    with tqdm(total=plan.rows, initial=done, desc="scoring", unit="text", disable=plan.args.disable_tqdm) as bar:
        for block in blocks(todo, plan.args.batch_size * _BATCHES_PER_BLOCK):
            scores = detector.score([row[column] for row in block])
            for row, score, flag in zip(block, scores.tolist(), detector.flags(scores).tolist(), strict=True):
                row["score"] = score
                if plan.name in LOG_CONFIDENCE:
                    row["confidence"] = math.exp(score)
                row["flagged"] = flag
            append_lines(path, block)
            bar.update(len(block))
    seconds = time.perf_counter() - start
    with open(path, encoding="utf-8") as file:
        flagged = sum(json.loads(line)["flagged"] for line in file)
    return flagged, None if done else seconds


def _records(
    plan: DetectPlan, frr: dict[str, Any] | None, flagged: int, seconds: float | None, passes: float
) -> list[Record]:
    args = plan.args
    common: dict[str, Any] = {
        "benchmark": "detect",
        "dataset": str(args.input),
        "model": plan.looks_through,
        "attack": "unknown",
        "defense": plan.name,
        "setting": f"target_frr={args.target_frr:g}" if args.filter_dir is None else "saved filter",
        "seed": args.seed,
        "env": environment(),
    }
    records = [Record.from_estimate(wilson(plan.rows - flagged, plan.rows), metric="coverage", **common)]
    if frr is not None:
        records.append(Record(metric="frr", **frr, **common | {"dataset": str(args.clean)}))  # of its part `check`
    if math.isfinite(passes):  # ONION's depend on the texts: a call that found everything scored does not know them
        records.append(Record(metric="passes", value=passes, **common))
    if seconds is not None:
        records.append(Record(metric="seconds", value=seconds, n=plan.rows, **common))
    return records


def _table(plan: DetectPlan, detector: Filter, frr: dict[str, Any] | None, flagged: int, seconds: float | None) -> str:
    share, calibration = wilson(flagged, plan.rows), detector.calibration
    bounds = [] if calibration is None else [("below", calibration.lower), ("above", calibration.upper)]
    rate = "not measured"
    if frr is not None:
        rate = f"{frr['value']:.2%}  [{frr['low']:.2%}, {frr['high']:.2%}] of {frr['n']} clean texts"
    lines = [
        ("filter", plan.name),
        ("texts", str(plan.rows)),
        ("flagged", f"{flagged} = {share.value:.2%}  [{share.low:.2%}, {share.high:.2%}]"),
        ("false rejections", rate),
        ("flagged if", " or ".join(f"score {side} {bound:.6g}" for side, bound in bounds if bound is not None)),
        ("passes per text", f"{detector.passes:g}" if math.isfinite(detector.passes) else "counted by an earlier call"),
        ("seconds", "continued after a stop" if seconds is None else f"{seconds:.1f}"),
    ]
    return "\n".join(f"{name:17} {value}" for name, value in lines)


def _verdict(plan: DetectPlan, frr: dict[str, Any] | None, flagged: int) -> str:
    """What the figures allow to say, and no more."""
    share = wilson(flagged, plan.rows)
    beside = "how many clean ones would be was not measured"
    if frr is not None:
        beside = f"of clean texts {frr['value']:.1%} are"
        # Intervals that do not meet: the input differs from the clean texts, for whatever reason.
        more = share.low is not None and share.low > frr["high"]
        beside += ": more than clean texts explain" if more else ": no more than clean texts may"
    return (
        f"{flagged} of {plan.rows} texts ({share.value:.1%}) are flagged; {beside}. A flag says that a text is unlike the clean "
        "ones to this model; why, a look at it must tell."
    )


def _written(
    plan: DetectPlan, outcome: Outcome, details: dict[str, Any], fitted: dict[str, Any] | None = None
) -> Outcome:
    write_results(
        plan.folder,
        {
            "schema": 1,
            "verb": "detect",
            "plan": plan.identity(),
            "verdict": outcome.verdict,
            "failures": outcome.failures,
            "gates": {"max_flagged": plan.args.max_flagged},
            "command": verb_command("detect", plan.args, chosen="filter"),
            "filter": {"name": plan.name, **details},
            "models": [] if fitted is None else filter_entries(plan, fitted),
            "records": outcome.records,
        },
    )
    write_bytes(plan.folder / "table.txt", f"{outcome.table}\n\n{outcome.verdict}\n".lstrip().encode())
    write_plain(plan.folder)
    return outcome
