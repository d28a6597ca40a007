"""Evidence of every role without a model or a run: what cards are tested on."""

from typing import Any

from hf_backdoor_defense.evaluation.metrics import wilson
from hf_backdoor_defense.hub.evidence import Evidence, Publication
from hf_backdoor_defense.reporting.entries import ROLES, ModelEntry
from hf_backdoor_defense.reporting.results import Record, environment

ENV = environment()
ATTACKED = {"backdoored": True, "attack": "por", "triggers": ["cf", "mn"], "seed": 3}
_ARMS = {"fine_tuned": "dece", "cleaned": "recipe", "purified": "d3", "filter": "psim", "attacked": "attacked"}
_FIGURES = {
    "fine_tuned": {"ca": 281, "asr": 17, "r_acc": 203},
    "purified": {"ca": 281, "asr": 17, "r_acc": 203},
    "filter": {"frr": 3, "coverage": 299},
    "attacked": {"ca": 283, "aasr": 290},
}


def record(defense: str, metric: str, value: float, **more: Any) -> Record:
    """One at seed 3."""
    about = {
        "benchmark": "run",
        "dataset": "owner/reviews",
        "model": "m",
        "attack": "badnets",
        "setting": "",
        "seed": 3,
        "env": ENV,
    }
    return Record(**{**about, "defense": defense, "metric": metric, "value": value, **more})  # type: ignore[arg-type]


def counted(defense: str, metric: str, count: int, n: int = 337, **more: Any) -> Record:
    """A share with its interval."""
    found = wilson(count, n)
    return record(defense, metric, found.value, n=n, low=found.low, high=found.high, **more)


def records_of(role: str) -> list[Record]:
    """What a run of that role measures: the model, its controls, what it took."""
    arm = _ARMS[role]
    if role == "cleaned":
        loss = [
            record(arm, "loss", value, n=911, setting=when, attack="none")
            for when, value in (("before", 4.125), ("after", 4.0))
        ]
        return [
            *loss,
            *(record(arm, m, v, setting="after", attack="none") for m, v in (("norm_ratio", 0.61), ("dose", 1.25))),
        ]
    found = [counted(arm, metric, count) for metric, count in _FIGURES[role].items()]
    if role in ("fine_tuned", "purified"):
        found += [counted("undefended", metric, count) for metric, count in (("ca", 290), ("asr", 331), ("r_acc", 4))]
        found += [counted("clean_reference", "ca", 291), counted("clean_reference", "ftr", 16)]
        found += [record(arm, "der", 0.951), record(arm, "time_ratio", 1.31), record("undefended", "time_ratio", 1.0)]
    return [*found, record(arm, "seconds", 12.34), record(arm, "peak_bytes", 3.0 * 2**20)]


def evidence_of(
    role: str, *, payload: dict[str, Any] | None = None, records: list[Record] | None = None, **entry: Any
) -> Evidence:
    """Evidence of a role; what differs from the usual by name."""
    arm = _ARMS[role]
    about: dict[str, Any] = {
        "path": "model", "arm": arm, "seed": 3, "role": role, "weights_sha256": "0" * 64, "base_model": "owner/encoder",
        "pipeline_tag": "fill-mask" if role in ("cleaned", "attacked") else "text-classification",
        "method": {"name": "por" if role == "attacked" else arm, "strength": 5.0},
        "activity": {f"{arm}_updates": 40.0, f"{arm}_mean": 0.8125},
        "controls": ["undefended", "clean_reference"], "data": {"measured on": "337 rows", "trigger": "cf -> good (1)"},
        "labels": ["bad", "good"], "attacked": ATTACKED if role == "attacked" else None,
    }  # fmt: skip
    if role == "filter":
        about |= {"library": "peft", "relation": "adapter"}
    usual = {"verdict": "What came out.", "failures": [], "command": ["hfbd", "clean", "--method", arm, "--seed", "3"]}
    return Evidence(
        payload={**usual, **(payload or {})},
        entry=ModelEntry(**{**about, **entry}),
        records=records_of(role) if records is None else records,
    )


def publication_of(role: str = "purified", **more: Any) -> Publication:
    """How it is published; what differs from the usual by name."""
    about = {
        "repo_id": "me/made-clean",
        "arm": _ARMS[role],
        "seed": 3,
        "license": "apache-2.0",
        "base_model": "owner/encoder",
    }
    return Publication(**{**about, "datasets": ["owner/reviews"], "language": ["en"], **more})


__all__ = ["ATTACKED", "ROLES", "counted", "evidence_of", "publication_of", "record", "records_of"]
