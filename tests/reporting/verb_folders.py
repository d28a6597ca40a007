"""Results of every verb but `hfbd train`, written by hand; `HOSTILE` stands wherever somebody else chooses the words."""

from pathlib import Path
from typing import Any

from hf_backdoor_defense.evaluation.metrics import Estimate, wilson
from hf_backdoor_defense.reporting.entries import ModelEntry
from hf_backdoor_defense.reporting.results import Record, write_json
from tests.reporting.run_folders import ENV, HOSTILE

VERBS = ("clean", "detect", "attack", "implant", "purify")
HASH = "0123456789abcdef" * 4


def results(verb: str) -> dict[str, Any]:
    """What `results.json` of a verb holds."""
    arm = {"clean": "recipe", "detect": "psim", "purify": "ulrl"}.get(verb, "undefended")
    common: dict[str, Any] = {
        "benchmark": verb, "dataset": "offline:docstrings", "model": HOSTILE, "attack": "por", "seed": 0, "env": ENV,
    }  # fmt: skip

    def record(defense: str, setting: str, metric: str, value: float | Estimate) -> Record:
        estimate = value if isinstance(value, Estimate) else Estimate(value, 1, None, None)
        return Record.from_estimate(estimate, defense=defense, setting=setting, metric=metric, **common)

    records = {
        "clean": [
            record("recipe", "before", "loss", 2.5),
            record("recipe", "after", "loss", 3.25),
            record("recipe", "after", "dose", 1.5),
        ],
        "detect": [record("psim", HOSTILE, "frr", wilson(3, 140)), record("psim", HOSTILE, "passes", 2.0)],
        "attack": [
            record(name, setting, metric, wilson(count, 200))
            for setting in ("release", "lora")
            for name, metric, count in (("undefended", "ca", 170), ("undefended", "asr", 199), ("clean_reference", "ftr", 9))
        ],
        "implant": [
            record(name, "fine-tuned", "aasr", wilson(count, 90))
            for name, count in (("undefended", 80), ("clean_reference", 30))
        ],
        "purify": [
            record(name, "", metric, wilson(count, 300))
            for name, counts in {"undefended": (280, 290, 3), "fine_tuning": (281, 250, 20), "ulrl": (270, 21, 260)}.items()
            for metric, count in zip(("ca", "asr", "r_acc"), counts, strict=True)
        ],
    }[verb]  # fmt: skip
    entry = ModelEntry(
        path="model", arm=arm, seed=0, role="cleaned", pipeline_tag="fill-mask", base_model=HOSTILE, weights_sha256=HASH,
        method={"name": arm, "triggers": ["cf", HOSTILE]}, activity={"norm_ratio": 0.625}, data={"trained on": HOSTILE},
        attacked={"attack": "por", "seed": 0} if verb == "implant" else None,
    )  # fmt: skip
    payload: dict[str, Any] = {
        "schema": 1, "verb": verb, "plan": {"run": {"text": HOSTILE}}, "verdict": f"It was done. {HOSTILE}",
        "failures": [f"INERT: {arm}: nothing moved."], "notes": [HOSTILE], "command": ["hfbd", verb, "--text", HOSTILE],
        "models": [entry.to_dict()], "records": [record.__dict__ for record in records],
    }  # fmt: skip
    history = [{"epoch": i / 4, "step": i, "loss": 3 - i / 9, "recipe/norm": 0.9**i} for i in range(1, 9)]
    held_out = {when: {"loss": loss, "accuracy": 0.4, "n": 700} for when, loss in (("before", 2.5), ("after", 3.25))}
    shares = {"cf": [0.1, 0.9], "mn": [0.6, 0.4]}
    return payload | {
        "clean": {
            "model": "offline:minilm", "text": "notes.txt", "attacked": {"attack": "por"}, "facts": {"trainable": 3538944},
            "training": {"held_out": held_out, "history": history, "method": {"config": {"name": "recipe"}}},
        },
        "detect": {
            "gates": {"max_flagged": 0.05},
            "filter": {
                "name": "psim", "rows": 500, "flagged": 7, "frr": {"value": 0.02}, "calibration": {"lower": -0.7, "n": 300},
            },
        },
        "attack": {"trigger": "cf"},
        "implant": {
            "training": {"start": {"target_mse": 1.5}, "end": {"target_mse": 0.25}, "held_out": held_out},
            "fine_tuned": {"0": {"undefended": {"asr_by_class": shares, "accuracy_with_trigger": {"cf": 0.55}}}},
        },
        "purify": _purified(history),
    }[verb]  # fmt: skip


def _purified(history: list[dict[str, Any]]) -> dict[str, Any]:
    names = ["zero", "one", HOSTILE]
    layers = [
        {"name": "layer.0.weight", "ratio": 1.25, "radius": 4.0, "distance": 5.0},
        {"name": "head.weight", "z": [5.5, 0.25, -0.75], "scores": [0.9, 0.25, 0.125], "flagged": [0]},
    ]
    own = {
        "evidence": {"layers": layers, "threshold": 3.0, "units": "rows", "unlearn": {"accuracy": [0.5, 0.25]}},
        "activity": {"ulrl_flagged": 1.0}, "scores": {"asr": {"value": 0.07}}, "history": history, "suspected_classes": ["zero"],
    }  # fmt: skip
    return {
        "model": HOSTILE, "method": "ulrl", "labels": names, "attacked": {"attack": "patch"}, "facts": {"Clean rows": HOSTILE},
        "arms": {"undefended": {"scores": {}}, "ulrl": own, "fine_tuning": {"history": history}},
    }  # fmt: skip


def write_verb(folder: Path, verb: str, /, **changes: Any) -> Path:
    """A run folder of that verb; `changes`: other values of its results, or None for a key that is not there."""
    folder.mkdir(parents=True)
    payload = {**results(verb), **changes}
    write_json(folder / "results.json", {key: value for key, value in payload.items() if value is not None})
    return folder
