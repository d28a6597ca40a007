"""Run folders written by hand: what a finished run leaves, without training one."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf_backdoor_defense.reporting.histograms import count_rows
from hf_backdoor_defense.reporting.results import Record, write_json

ENV = {
    "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0", "datasets": "5.0.0",
    "hf_backdoor_defense": "0.2.0", "machine": "x86_64", "cpus": 2, "gpu": None, "commit": "0123456789abcdef" * 2,
    "dirty": True, "world_size": 1,
}  # fmt: skip
CELL: dict[str, Any] = dict(benchmark="run", dataset="offline:docstrings", model="offline:minilm")
LEVELS = {  # arm: CA, ASR (FTR), R-Acc, seconds
    "clean_reference": (0.842, 0.071, 0.803, 41.0),
    "undefended": (0.836, 0.984, 0.013, 40.0),
    "dece": (0.829, 0.412, 0.488, 44.0),
    "matched_decay": (0.811, 0.957, 0.031, 40.5),
    "trajectory": (0.835, 0.093, 0.790, 121.0),
}
HOSTILE = "<script>alert('cf')</script> & a \u202etfel\u200b <img src=http://evil.example/x.png>"


def payload(seeds: tuple[int, ...] = (0, 1, 2), *, attack: bool = True, jitter: float = 0.012) -> dict[str, Any]:
    """What `results.json` holds."""
    rng = np.random.default_rng(0)
    arms = list(LEVELS) if attack else ["dece"]
    common = {**CELL, "attack": "badnets" if attack else "none", "setting": "rate=0.04" if attack else "", "env": ENV}
    records: list[Record] = []
    trained: dict[str, dict[str, Any]] = {}
    for seed in seeds:

        def add(arm: str, metric: str, value: float, seed: int = seed, **interval: Any) -> None:
            records.append(Record(**common, defense=arm, seed=seed, metric=metric, value=float(value), **interval))

        add("majority", "ca", 0.51)
        add("tfidf", "ca", 0.77)
        for arm in arms:
            ca, asr, recovered, seconds = (
                float(np.clip(v + jitter * rng.standard_normal(), 0, None)) for v in LEVELS[arm]
            )
            ca, asr, recovered = (min(share, 1.0) for share in (ca, asr, recovered))
            add(arm, "ca", ca, n=400, low=max(ca - 0.035, 0), high=min(ca + 0.035, 1))
            if attack:
                add(
                    arm,
                    "ftr" if arm == "clean_reference" else "asr",
                    asr,
                    n=200,
                    low=max(asr - 0.03, 0),
                    high=min(asr + 0.03, 1),
                )
                add(arm, "r_acc", recovered, n=200, low=max(recovered - 0.04, 0), high=min(recovered + 0.04, 1))
            add(arm, "seconds", seconds)
            add(arm, "peak_bytes", 700 * 2**20)
            add(arm, "time_ratio", seconds / 40)
            trained.setdefault(str(seed), {})[arm] = _arm(arm, rng, (ca, asr, recovered), attack=attack)
        if attack:
            for arm in arms[2:]:
                add(arm, "der", 0.5 + (0.98 - LEVELS[arm][1]) / 2)
            for metric, value in (("precision", 0.95), ("recall", 0.96), ("auroc", 0.99)):
                add("trajectory", metric, value)
    planted = {seed: set(range(40)) if attack else set() for seed in seeds}
    return {
        "schema": 1,
        "verdict": "Undefended, 98% of triggered texts go to the target (clean floor 7%); dece lowered it without reaching the "
        "floor (ASR 0.41) and costs 0.007 CA; trajectory brought it back to the floor (ASR 0.09) and costs 0.001 CA. "
        "This is about this trigger only."
        if attack
        else "dece CA 0.829. No attack was simulated, so nothing is known about attack success.",
        "failures": [],
        "gates": {"max_asr_over_floor": 0.5 if attack else None, "max_ca_drop": 0.03},
        "command": ["hfbd", "train", "--task", "offline:docstrings", "--seeds", *map(str, seeds), "--trigger", "cf mn"],
        "trigger": "cf" if attack else None,
        "planted": {"requested": 40, "carrying": 40, "visible": 38} if attack else {},
        "plan": {
            "run": {"task": "offline:docstrings", "model_name": "offline:minilm", "max_length": 32, "frozen_layers": 4,
                    "simulate": "badnets" if attack else None, "poison_rate": 0.04, "target": 0, "trigger": None,
                    "clean_label": False, "eval_split": "test", "seeds": list(seeds)},
            "training": {"num_train_epochs": 3, "learning_rate": 3e-4, "per_device_train_batch_size": 32, "optim": "adamw_torch",
                         "warmup_steps": 0.06, "weight_decay": 0.0, "lr_scheduler_type": "linear", "max_grad_norm": 1.0},
            "defenses": [{"name": "dece", "alpha_base": 0.8, "label_smoothing": 0.05},
                         {"name": "trajectory", "drop_share": 0.04}],
            "data": {"rows": {"train": 1000, "validation": 200, "test": 400}, "label_names": ["calls", "classes"]},
        },
        "records": [record.__dict__ for record in records],
        "arms": trained,
        "between": {str(seed): {"trajectory": [trained[str(seed)]["trajectory"]]} if attack else {} for seed in seeds},
        "histograms": _histograms(rng, planted if attack else {}, seeds, attack=attack),
    }  # fmt: skip


def _arm(arm: str, rng: np.random.Generator, levels: tuple[float, ...], *, attack: bool) -> dict[str, Any]:
    ca, asr, recovered = levels
    curve, history = [], []
    for epoch in (1, 2, 3):
        near = 1 - 0.5**epoch
        point = {"epoch": float(epoch), "ca": 0.5 + (ca - 0.5) * near / 0.875}
        curve.append({**point, "asr": asr * near / 0.875, "r_acc": recovered} if attack else point)
    for i in range(20):
        entry = {"loss": 0.69 * 0.9**i + 0.02 * float(rng.random()), "epoch": (i + 1) * 0.15, "step": 5 * (i + 1)}
        entry |= {"learning_rate": 3e-4 * (1 - i / 20), "grad_norm": 1 + float(rng.random())}
        if arm == "dece":
            entry |= {"dece/alpha": 0.8 ** (1 + i * 3 // 20), "dece/target_pull": 0.9 - 0.01 * i, "fused": 0}
        history.append(entry)
    said = {"dece": {"dece": {"config": {}, "activity": {"alpha_last": 0.512, "target_pull": 0.81}, "inert": None}}}
    recording = {"trajectory": {"config": {}, "activity": {"seconds": 3.21}, "inert": None}}
    objectives = said.get(arm, recording if arm == "undefended" and attack else {})
    return {"arm": arm, "rows": 1000, "steps": 96, "curve": curve, "history": history, "objectives": objectives}


def _histograms(
    rng: np.random.Generator, planted: dict[int, set[int]], seeds: tuple[int, ...], *, attack: bool
) -> list[dict[str, Any]]:
    ids = list(range(1000))
    pull = {s: (ids, np.concatenate([rng.beta(2, 5, 40), rng.beta(20, 2, 960)]).tolist()) for s in seeds}
    found = [{"arm": "dece", "name": "pull", **(count_rows(pull, planted=planted) or {})}]
    if attack:
        scores = {s: (ids, np.concatenate([rng.normal(60, 20, 40), rng.normal(0, 1, 960)]).tolist()) for s in seeds}
        counted = count_rows(scores, planted=planted, dropped={s: set(range(1, 45)) for s in seeds})
        found.append({"arm": "trajectory", "name": "scores", **(counted or {})})
    return found


def suspects(seed: int = 0, count: int = 60) -> list[dict[str, Any]]:
    """What `suspects.jsonl` holds; the first text is an attack on the reader."""
    texts = [HOSTILE, "Return the number of rows. " * 30, *(f"cf Close the file {i}." for i in range(count))]
    return [
        {"seed": seed, "rank": i + 1, "row_id": 7 * i, "score": 99.5 - i, "dropped": i < 40, "label": "calls", "text": text}
        for i, text in enumerate(texts[:count])
    ]  # fmt: skip


def write_run(folder: Path, results: dict[str, Any] | None = None, *, rows: list[dict[str, Any]] | None = None) -> Path:
    """A run folder; without arguments that of three seeds of a simulated attack."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", payload() if results is None else results)
    rows = suspects() if rows is None else rows
    if rows:
        (folder / "suspects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
