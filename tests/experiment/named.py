"""What every run folder must show of its models: a seal that holds, entries that are true, figures that come again."""

import json
import math
from pathlib import Path

from safetensors import safe_open

from hf_backdoor_defense.experiment.remeasure import remeasure
from hf_backdoor_defense.hub.evidence import Evidence, entries, read_evidence
from hf_backdoor_defense.pretrained import saved_sha256
from hf_backdoor_defense.reporting.sealed import check_sealed


def named(folder: Path, verb: str, *, again: bool = True) -> dict[str, Evidence]:
    """By path, the evidence of each model of a run, after all that can be checked of any run.

    Args:
        again: also measure every model again where its entry says how, and `load_trained` can load it.
    """
    payload = json.loads((folder / "results.json").read_text())
    assert payload["verb"] == verb and payload["command"][0] == "hfbd" and payload["schema"] == 1
    sealed = set(check_sealed(folder))
    assert "results.json" in sealed
    found = {}
    for entry in entries(payload):
        evidence = read_evidence(folder, arm=entry.arm, seed=entry.seed)
        assert evidence.entry == entry and evidence.payload == payload
        place = folder / entry.path
        weights = "adapter_model" if entry.library == "peft" else "model"
        assert f"{entry.path}/{weights}.safetensors" in sealed
        assert entry.role == "filter" or entry.weights_sha256 == saved_sha256(place)
        mark = place / "backdoored.json"
        assert entry.attacked == (json.loads(mark.read_text()) if mark.is_file() else None)
        assert evidence.figures and set(evidence.controls) == set(entry.controls)
        assert all(math.isfinite(value) for value in entry.activity.values()) and all(entry.data.values())
        with safe_open(place / f"{weights}.safetensors", framework="np") as tensors:
            head = [name for name in tensors.keys() if name.endswith(("classifier.weight", "score.weight"))]
            sizes = [tensors.get_slice(name).get_shape()[0] for name in head]
        assert entry.role == "filter" or sizes == [len(entry.labels)] * len(sizes)
        if again and entry.measurement:
            agrees(place, evidence)
        found[entry.path] = evidence
    return found


def agrees(place: Path, evidence: Evidence) -> None:
    """The saved weights on the rows that the entry names give the figures of the records, exactly."""
    measured = remeasure(place, **evidence.entry.measurement)
    assert measured.same_rows
    for metric, estimate in vars(measured.scores).items():
        figures = evidence.figures
        record = figures.get("ftr" if metric == "asr" and "ftr" in figures else metric)
        assert (estimate is None) == (record is None) or metric == "r_acc", metric  # not recorded of a clean reference
        if record is not None and estimate is not None:
            assert (record.value, record.n, record.low, record.high) == (
                estimate.value,
                estimate.n,
                estimate.low,
                estimate.high,
            )
