"""The `evaluate.Metric` wrappers: same numbers as metrics.py, no network, no files, imported lazily."""

import doctest
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_backdoor_defense.evaluation import hf_metrics, metrics

NAMES = ["AttackSuccessRate", "CleanAccuracy", "RecoveredAccuracy"]
RNG = np.random.default_rng(0)
PREDICTIONS, LABELS = RNG.integers(0, 3, 41), RNG.integers(0, 3, 41)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory and no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def metric(name: str, tmp_path: Path):
    return getattr(hf_metrics, name)(cache_dir=str(tmp_path / "cache"))


def expected(name: str) -> tuple[str, metrics.Estimate, dict]:
    if name == "CleanAccuracy":
        return "ca", metrics.accuracy(PREDICTIONS, LABELS), {}
    if name == "AttackSuccessRate":
        return "asr", metrics.attack_success_rate(PREDICTIONS, LABELS, target=2), {"target": 2}
    return "r_acc", metrics.recovered_accuracy(PREDICTIONS, LABELS, target=2), {"target": 2}


@pytest.mark.parametrize("kind", [list, np.asarray])
@pytest.mark.parametrize("name", NAMES)
def test_all_ways_to_feed_it_give_the_same_record(name: str, kind, tmp_path: Path, alone: Path) -> None:
    key, e, kwargs = expected(name)
    record = {key: e.value, f"{key}_n": e.n, f"{key}_low": e.low, f"{key}_high": e.high}
    m = metric(name, tmp_path)
    assert m.compute(predictions=kind(PREDICTIONS), references=kind(LABELS), **kwargs) == record
    for at in (0, 20, 30):  # uneven batches, on the used instance
        stop = {0: 20, 20: 30, 30: 41}[at]
        m.add_batch(predictions=kind(PREDICTIONS[at:stop]), references=kind(LABELS[at:stop]))
    assert m.compute(**kwargs) == record
    for p, y in zip(PREDICTIONS, LABELS, strict=True):
        m.add(prediction=p, reference=y)
    assert m.compute(**kwargs) == record
    assert not list(alone.iterdir())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_results_do_not_leak_into_the_next_one(tmp_path: Path) -> None:
    m = metric("CleanAccuracy", tmp_path)
    assert m.compute(predictions=[1], references=[1])["ca"] == 1
    assert m.compute(predictions=[0, 0], references=[1, 1])["ca_n"] == 2
    with pytest.raises(ValueError, match="got neither"):
        m.compute()


@pytest.mark.parametrize("name", ["AttackSuccessRate", "RecoveredAccuracy"])
def test_target_is_needed(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`target` must be the attacker's class id, got None.*compute\(target"):
        metric(name, tmp_path).compute(predictions=[0], references=[0])
    metric(name, tmp_path).compute(predictions=[0], references=[0], target=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "must both be given, got neither.*add_batch"),
        ({"predictions": [1]}, "got only one of them"),
        ({"references": [1]}, "got only one of them"),
        ({"predictions": [], "references": []}, "non-empty vector"),
        ({"predictions": [0.9], "references": [1]}, "class ids, got 0.9"),
        ({"predictions": [[0.1, 0.9]], "references": [1]}, "don't match the expected format"),
        ({"predictions": [1, 0], "references": [1]}, "Mismatch in the number"),
    ],
)
def test_refused_inputs(inputs: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        metric("CleanAccuracy", tmp_path).compute(**inputs)


def test_several_processes_meet_in_files(tmp_path: Path) -> None:
    cls = hf_metrics.CleanAccuracy
    assert cls(cache_dir=str(tmp_path)).keep_in_memory
    assert not cls(cache_dir=str(tmp_path), num_process=2, process_id=1).keep_in_memory


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_found_and_documented(name: str) -> None:
    cls = getattr(hf_metrics, name)
    assert getattr(hf_metrics, name) is cls  # made once
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert name in dir(hf_metrics)
    tests = doctest.DocTestFinder(recurse=False).find(cls, name, globs={name: cls})
    assert tests[0].examples
    assert doctest.DocTestRunner().run(tests[0]).failed == 0


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Accuracy'"):
        _ = hf_metrics.Accuracy


def test_importing_the_module_does_not_import_evaluate() -> None:
    code = "import sys; import hf_backdoor_defense.evaluation.hf_metrics as m; assert 'evaluate' not in sys.modules"
    root = Path(hf_metrics.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
