"""The undefended model as a stranger's checkpoint: filters stand before it, calibrated on clean texts that it never saw.

| rows | are for |
|---|---|
| of the task, that no model of the run is trained on nor any figure about (`clean_rows.py`) | fitting (a third), calibrating |
| of the reported split, clean and triggered | the figures (`evaluation/filtering.py`) |

This is another threat than that of the arms. There the data is untrusted and the training is one's own; here the weights are
untrusted and the texts are one's own. The filter alone learns something; it flags inputs, and the model stays what it is.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.evaluation.filtering import filtered_scores
from hf_backdoor_defense.experiment.attack_models import device, silent
from hf_backdoor_defense.experiment.clean_rows import split
from hf_backdoor_defense.experiment.filters import FITTED, NEEDS_LABELS, build_filter
from hf_backdoor_defense.models import load_finished_classifier, text_logits
from hf_backdoor_defense.reporting.histograms import count_rows
from hf_backdoor_defense.reporting.results import Record, write_json
from hf_backdoor_defense.reporting.tables import render_terminal

COLUMNS = ("ca", "coverage", "asr", "frr", "far", "auroc", "passes")
SCORES = "filter_scores"
"""Name of a filter's histogram in `results.json`."""
Behind = dict[int, dict[str, dict[str, Any]]]  # seed -> filter -> result.json


def stand_before(plan: Any, seed: int, *, name: str, base: Path, folder: Path, title: str) -> dict[str, Any]:
    """One filter before one saved model, or what an earlier call measured.

    Returns:
        `usable`; if False the `reason`; else `estimates` by metric, `passes`, `seconds` (fitting, calibrating and scoring),
        `calibration`, `activity`, and per row `clean` and `triggered`: scores and flags.
    """
    done = folder / "result.json"
    if done.is_file():
        print(f"{title}: finished before, kept")
        return json.loads(done.read_text())
    print(title, flush=True)
    from hf_backdoor_defense.input_filters.psim import PsimNotUsable

    run = plan.run
    judged = plan.data[run.eval_split]
    triggered = trigger_dataset(judged, run.get_trigger(), target=run.target, seed=seed)
    with silent():
        model, tokenizer = load_finished_classifier(str(base), num_labels=judged.features["label"].num_classes)
    model.to(device())  # type: ignore[arg-type]
    predicted = [
        text_logits(model, tokenizer, list(rows["text"]), max_length=run.max_length).argmax(-1).numpy()
        for rows in (judged, triggered)
    ]
    fit, calibrate = split(plan.own, seed)
    start = time.perf_counter()
    result: dict[str, Any] = {"usable": True, "seed": seed, "rows": {"fit": len(fit), "calibrate": len(calibrate)}}
    try:
        detector = build_filter(
            name,
            model,
            tokenizer,
            texts=list(fit["text"]) if name in FITTED else (),
            labels=list(fit["label"]) if name == NEEDS_LABELS else None,
            seed=seed,
            max_length=run.max_length,
        )
        detector.calibrate(list(calibrate["text"]), run.target_frr)
    except PsimNotUsable as error:
        result |= {"usable": False, "reason": str(error)}
        write_json(done, result)
        return result
    scores = [detector.score(list(rows["text"])) for rows in (judged, triggered)]
    flags = [detector.flags(of_rows) for of_rows in scores]
    estimates = filtered_scores(
        predicted[0],
        judged["label"],
        flags[0],
        predicted[1],
        triggered["label"],
        flags[1],
        target=run.target,
        clean_scores=scores[0],
        triggered_scores=scores[1],
        tail=detector.tail,
    )
    psim = getattr(detector, "psim", None)
    result |= {
        "seconds": time.perf_counter() - start,
        "passes": float(detector.passes),
        "calibration": None if detector.calibration is None else detector.calibration.to_dict(),
        "activity": {} if psim is None else psim.activity(),
        "estimates": {metric: asdict(estimate) for metric, estimate in estimates.items()},
        **{
            part: {"scores": of_rows.tolist(), "flagged": marked.tolist()}
            for part, of_rows, marked in zip(("clean", "triggered"), scores, flags, strict=True)
        },
    }
    write_json(done, result)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def filter_records(behind: Behind, common: dict[str, Any]) -> list[Record]:
    """A record per figure; a filter that could not be used has none. `common`: the fields that all records of a run share."""
    records = []
    for seed, filters in behind.items():
        for name, result in filters.items():
            if not result["usable"]:
                continue
            of_filter: dict[str, Any] = {"seed": seed, "defense": name, **common}
            records += [Record(metric=metric, **values, **of_filter) for metric, values in result["estimates"].items()]
            records += [Record(metric=metric, value=result[metric], **of_filter) for metric in ("passes", "seconds")]
    return records


def filter_failures(behind: Behind) -> list[str]:
    """Why a filter could not be used: it did nothing, and a run with it is not passed."""
    return [
        f"INERT: {name}, seed {seed}: {result['reason']}"
        for seed, filters in behind.items()
        for name, result in filters.items()
        if not result["usable"]
    ]


def filter_table(records: list[Record], filters: list[str]) -> str:
    """The filters beside the model without one."""
    plain = [r for r in records if r.defense == "undefended" and r.metric in ("ca", "asr")]
    found = [r for r in records if r.defense in filters]
    if not found:
        return ""
    return "Filters before the undefended model (its weights are not trusted):\n" + render_terminal(
        [*plain, *found], columns=COLUMNS
    )


def filter_verdict(behind: Behind) -> str:
    """A sentence about the other threat; empty where no filter could be used."""
    parts = []
    for name in next(iter(behind.values()), {}):
        found = [filters[name]["estimates"] for filters in behind.values() if filters[name]["usable"]]
        if found:
            caught, lost, asr = (
                float(np.mean([values[metric]["value"] for values in found])) for metric in ("far", "frr", "asr")
            )
            parts.append(f"{name} rejects {1 - caught:.0%} of triggered and {lost:.1%} of clean texts (ASR {asr:.2f})")
    if not parts:
        return ""
    return (
        "Another threat is weights of a stranger, with clean texts of one's own: before the undefended model, taken as such a "
        f"checkpoint, {'; '.join(parts)}."
    )


def filter_histograms(behind: Behind) -> list[dict[str, Any]]:
    """Scores of clean and triggered rows as counts, with what was flagged of each."""
    found = []
    for name in next(iter(behind.values()), {}):
        usable = {seed: filters[name] for seed, filters in behind.items() if filters[name]["usable"]}
        n = {seed: len(result["clean"]["scores"]) for seed, result in usable.items()}
        both = {seed: [(r["clean"], 0), (r["triggered"], n[seed])] for seed, r in usable.items()}
        counts = count_rows(
            {
                seed: (
                    [first + i for part, first in parts for i in range(len(part["scores"]))],
                    [score for part, _ in parts for score in part["scores"]],
                )
                for seed, parts in both.items()
            },
            planted={seed: range(n[seed], n[seed] + len(parts[1][0]["scores"])) for seed, parts in both.items()},
            dropped={
                seed: [first + i for part, first in parts for i, flag in enumerate(part["flagged"]) if flag]
                for seed, parts in both.items()
            },
        )
        if counts is not None:
            found.append({"arm": name, "name": SCORES, **counts})
    return found


def brief(behind: Behind) -> dict[str, dict[str, dict[str, Any]]]:
    """For `results.json`: without what is known of every row, which stays in the filter's folder."""
    return {
        str(seed): {
            name: {key: value for key, value in result.items() if key not in ("clean", "triggered")}
            for name, result in filters.items()
        }
        for seed, filters in behind.items()
    }
