"""A finished run folder with a tiny model, sealed as a run seals it: what a card, a push and a verification start from."""

import shutil
from pathlib import Path
from typing import Any

from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.models import weights_sha256
from hf_backdoor_defense.reporting.entries import ModelEntry
from hf_backdoor_defense.reporting.results import Record, environment, write_bytes
from hf_backdoor_defense.reporting.sealed import seal_more, write_results

ARM = "d3"
REPORT = (
    b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
    b"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'\">\n"
    b"<title>r</title>\n</head>\n<body><p>report</p></body>\n</html>\n"
)


def records(*, n: int = 200, seed: int = 0, correct: dict[str, int] | None = None) -> list[Record]:
    """CA, ASR and R-Acc of the model as it came, of plain fine-tuning, of D3 and of a clean reference, over `n` rows."""
    figures = {
        "undefended": {"ca": 180, "asr": 198, "r_acc": 2},
        "fine_tuning": {"ca": 181, "asr": 190, "r_acc": 9},
        ARM: {"ca": 174, "asr": 12, "r_acc": 150},
        "clean_reference": {"ca": 182, "ftr": 8, "r_acc": 160},
    }
    figures[ARM].update(correct or {})
    common: dict[str, Any] = {
        "benchmark": "clean", "dataset": "owner/reviews", "model": "owner/encoder", "attack": "badnets", "setting": "",
        "seed": seed, "env": environment(),
    }  # fmt: skip
    found = [
        Record.from_estimate(wilson(count, n), defense=arm, metric=metric, **common)
        for arm, counts in figures.items()
        for metric, count in counts.items()
    ]
    for arm in (ARM, "fine_tuning"):
        found.append(Record(defense=arm, metric="seconds", value=12.5, **common))
        found.append(Record(defense=arm, metric="der", value=0.9, **common))
    return found


def small_run(
    folder: Path,
    model: Any,
    *processors: Any,
    failures: list[str] | None = None,
    entry: dict[str, Any] | None = None,
    payload: dict[str, Any] | None = None,
) -> Path:
    """`folder`, with `model/` (safetensors, and what `processors` save), `report.html`, a plot, `results.json`, `checksums.json`.

    Args:
        entry, payload: what differs from the defaults, by key.
    """
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "model"
    model.save_pretrained(place)
    for processor in processors:
        processor.save_pretrained(place)
    write_bytes(folder / "report.html", REPORT)
    write_bytes(folder / "ca_asr.png", b"\x89PNG\r\n\x1a\n")
    about = ModelEntry(
        **{
            "path": "model",
            "arm": ARM,
            "seed": 0,
            "role": "purified",
            "pipeline_tag": "text-classification",
            "base_model": "owner/encoder",
            "weights_sha256": weights_sha256(model),
            "labels": ["bad", "good"],
            "method": {"name": "d3", "lam": 5.0},
            "activity": {"d3_distance_mean": 0.8, "d3_updates": 40.0},
            "controls": ["undefended", "fine_tuning", "clean_reference"],
            "data": {"clean rows": "owner/reviews: 300 texts", "measured on": "200 rows", "trigger": "cf -> good"},
            "measurement": {"task": "owner/reviews", "simulate": "badnets", "target": 1, "seed": 0, "max_length": 16},
            **(entry or {}),
        }
    )
    write_results(
        folder,
        {
            "schema": 1,
            "verb": "purify",
            "plan": {},
            "verdict": "d3: clean accuracy 0.900 -> 0.870 on 200 rows. Attack success 0.990 -> 0.060.",
            "failures": failures or [],
            "command": [
                "hfbd",
                "clean",
                "--method",
                "d3",
                "--model_name",
                "owner/encoder",
                "--output_dir",
                "runs/again",
            ],
            "models": [about.to_dict()],
            "records": records(),
            **(payload or {}),
        },
    )
    seal_more(folder, ["report.html", "ca_asr.png"])
    return folder
