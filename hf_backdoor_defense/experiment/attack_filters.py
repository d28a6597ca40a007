"""Filters before the models of `hfbd attack`: fitted on clean rows, calibrated on held-out ones, then asked about test rows.

| filter | looks at | fitted on | runs |
|---|---|---|---|
| `confidence`, `psim` | the base as downloaded | the victim's texts (psim) | once per base, the clean base included (a control) |
| `strip`, `rap` | a victim | the victim's rows | once per victim, on `strip_rows` rows |
| `onion` | the text | nothing; its bar on calibration rows | each text once for all seeds, edits predicted by every victim |
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_backdoor_defense.experiment.attack_models import (
    base_folder,
    device,
    load_base,
    load_victim,
    models_folder,
    text_length,
)
from hf_backdoor_defense.experiment.attack_plan import AttackPlan
from hf_backdoor_defense.experiment.filters import FITTED, build_filter
from hf_backdoor_defense.experiment.steps import Result, kept_folder, write_arrays
from hf_backdoor_defense.filters import Filter
from hf_backdoor_defense.functional.thresholds import clopper_pearson, rows_needed
from hf_backdoor_defense.models import text_logits
from hf_backdoor_defense.registry import filter_class

BASE_LEVEL = ("confidence", "psim")
SLOW = ("strip", "rap")  # many passes per text: measured on `strip_rows` rows
STRIP_CALIBRATION = 200
FITTED_ON = 500  # clean rows that STRIP draws words from and RAP builds its rows on
CACHE_BLOCK = 256  # texts between two writes of ONION's cache


def filter_step(plan: AttackPlan, seed: int, kind: str, arm: str, name: str) -> Result:
    """Scores and flags of one filter before one model.

    Returns:
        JSON: `usable`; if False the `reason`; else `calibration`, `tail`, `passes`, `frr_check` (on the check rows).
        Arrays: `NAME`, `NAME_flagged` for the rows `NAME_index` of test and triggered rows; an editing filter adds
        `NAME_predicted`, the victim's answers to the edited texts.
    """
    if filter_class(name).edits:
        return _onion_step(plan, seed, kind, arm)
    from hf_backdoor_defense.input_filters.psim import PsimNotUsable

    few = plan.run.strip_rows if name in SLOW else None
    parts = {"test": few_rows(plan.test, few), "triggered": few_rows(plan.triggered, few)}
    calibration, check = plan.calibration, plan.check
    if name in SLOW:
        least = rows_needed(plan.run.target_frr, tail=filter_class(name).tail)
        calibration = calibration.select(few_rows(calibration, max(least, STRIP_CALIBRATION)))
        check = check.select(few_rows(check, few))
    try:
        detector = _build(plan, seed, kind, arm, name)
        if detector.calibration is None:
            detector.calibrate(list(calibration["text"]), plan.run.target_frr)
        checked = detector.measure_frr(list(check["text"]))
    except PsimNotUsable as error:
        return {"usable": False, "reason": str(error)}, {}
    arrays: dict[str, np.ndarray] = {}
    for part, index in parts.items():
        rows = plan.test if part == "test" else plan.triggered
        scores = detector.score(list(rows.select(index)["text"]))
        arrays |= {part: scores, f"{part}_flagged": detector.flags(scores), f"{part}_index": np.asarray(index)}
    return _account(detector, checked), arrays


def few_rows(rows: Dataset, count: int | None) -> list[int]:
    """Positions of `count` rows (None: of all), those with the smallest hash of `row_id`: in their order."""
    if count is None or count >= len(rows):
        return list(range(len(rows)))
    ids = rows["row_id"]
    order = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(f"few|{ids[i]}".encode(), digest_size=16).digest())
    return sorted(order[:count])


def _account(detector: Filter, checked: dict[str, float]) -> dict[str, Any]:
    return {
        "usable": True,
        "calibration": None if detector.calibration is None else detector.calibration.to_dict(),
        "tail": detector.tail,
        "passes": float(detector.passes),
        "frr_check": checked,
    }


def _build(plan: AttackPlan, seed: int, kind: str, arm: str, name: str) -> Filter:
    """A filter made from clean rows; PSIM comes calibrated, from the folder it is kept in."""
    if name == "psim":
        return _psim(plan, seed, kind)
    model, tokenizer = (
        load_base(plan, base_folder(plan, seed, kind)) if arm == "base" else load_victim(plan, seed, kind, arm)
    )
    fitted = plan.victim.select(few_rows(plan.victim, FITTED_ON) if name in FITTED else [])
    return build_filter(
        name,
        model,
        tokenizer,
        texts=list(fitted["text"]),
        labels=list(fitted["label"]),
        seed=seed,
        max_length=text_length(plan, model),
        progress=_bar(plan, name),
    )


def _bar(plan: AttackPlan, title: str) -> str | None:
    return None if plan.run.disable_tqdm else title


def _psim(plan: AttackPlan, seed: int, kind: str) -> Filter:
    from hf_backdoor_defense.input_filters.psim import PSIMFilter, training_arguments

    base = base_folder(plan, seed, kind)

    def make(folder: Path) -> None:
        model, tokenizer = load_base(plan, base)
        texts = list(plan.victim["text"])
        args = training_arguments(folder, disable_tqdm=plan.run.disable_tqdm)
        detector = PSIMFilter.fit(model, tokenizer, texts, seed=seed, args=args, max_length=plan.run.max_length)
        detector.calibrate(list(plan.calibration["text"]), plan.run.target_frr)
        detector.save(folder)

    folder = kept_folder(models_folder(plan, seed, kind) / f"{kind}_psim", make)
    return PSIMFilter.from_pretrained(folder, base=load_base(plan, base)[0])


def _onion_step(plan: AttackPlan, seed: int, kind: str, arm: str) -> Result:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_backdoor_defense.input_filters.onion import ONION

    path = str(plan.run.language_model)
    language = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
    tokens = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    onion = ONION(language.to(device()), tokens, progress=_bar(plan, "onion"))
    cache = SuspicionCache(plan.shared / f"onion-{plan.described['language_model'][:16]}.npz", onion)
    model, tokenizer = load_victim(plan, seed, kind, arm)

    def predict(texts: list[str]) -> np.ndarray:
        return text_logits(model, tokenizer, texts, max_length=text_length(plan, model)).argmax(-1).numpy()

    calibration = list(plan.calibration["text"])
    suspicions = cache(calibration)
    try:
        onion.choose_bar(calibration, list(plan.calibration["label"]), predict, suspicions=suspicions)
    except ValueError as error:  # no bar keeps the victim's accuracy
        return {"usable": False, "reason": str(error)}, {}
    arrays: dict[str, np.ndarray] = {}
    for part, rows in (("test", plan.test), ("triggered", plan.triggered)):
        texts = list(rows["text"])
        suspicions = cache(texts)
        edited = onion.edit(texts, suspicions=suspicions)
        arrays |= {
            part: onion.score(texts, suspicions=suspicions),
            f"{part}_flagged": _changed(texts, edited),
            f"{part}_index": np.arange(len(rows)),
            f"{part}_predicted": predict(edited),
        }
    check = list(plan.check["text"])
    changed = _changed(check, onion.edit(check, suspicions=cache(check)))
    low, high = clopper_pearson(int(changed.sum()), len(changed))
    account = _account(onion, {"value": float(changed.mean()), "n": len(changed), "low": low, "high": high})
    words = np.mean([len(text.split()) for text in plan.test["text"]])
    return {**account, "bar": onion.bar, "passes": float(words) + 1, "edits": True}, arrays


def _changed(before: list[str], after: list[str]) -> np.ndarray:
    return np.array([one != other for one, other in zip(before, after, strict=True)])


class SuspicionCache:
    """ONION's suspicions of texts, kept in a file by the texts' hashes: w + 1 passes of a language model are paid once.

    Args:
        path: an `.npz`, read where it is there. onion: with `suspicions(texts)`, asked for what is not in the file.
    """

    def __init__(self, path: Path, onion: Any) -> None:
        self.path, self.onion = path, onion

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """One array per text, one value per word."""
        known = self._read()
        keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in known}.items())
        for start in range(0, len(missing), CACHE_BLOCK):
            block = missing[start : start + CACHE_BLOCK]
            found = self.onion.suspicions([text for _, text in block])
            known = {**self._read(), **known, **{key: f for (key, _), f in zip(block, found, strict=True)}}
            self._write(known)
        return [known[key] for key in keys]

    def _read(self) -> dict[str, np.ndarray]:
        if not self.path.is_file():
            return {}
        with np.load(self.path, allow_pickle=False) as file:
            values, lengths, keys = file["values"], file["lengths"], file["keys"]
        return dict(zip(keys.tolist(), np.split(values, np.cumsum(lengths)[:-1]), strict=True))

    def _write(self, known: dict[str, np.ndarray]) -> None:
        parts = [np.asarray(f, dtype=np.float64) for f in known.values()]
        lengths = np.array([len(part) for part in parts])
        write_arrays(self.path, {"keys": np.array(list(known)), "lengths": lengths, "values": np.concatenate(parts)})
