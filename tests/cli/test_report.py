"""`hfbd report`: paths, refusals, and a report made again from what a real run left."""

import json
import shutil
from pathlib import Path

import pytest

from hf_backdoor_defense.cli.main import main
from tests.reporting.run_folders import payload, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", payload((0,), attack=False), rows=[])


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["report", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_run_gets_its_report_and_several_share_one(run, tmp_path, capsys, monkeypatch):
    code, out, err = call(capsys, run)
    assert (code, out.strip(), err) == (0, str(run / "report.html"), "")
    other = write_run(tmp_path / "other", payload((1,), attack=False), rows=[])
    monkeypatch.chdir(tmp_path)
    assert call(capsys, run, other)[:2] == (0, "report.html\n")
    assert "Comparison of 2 runs" in (tmp_path / "report.html").read_text()
    assert not (other / "report.html").exists()
    assert call(capsys, run, "--output", "here.html")[:2] == (0, "here.html\n")
    assert (tmp_path / "here.html").read_bytes() == (run / "report.html").read_bytes()


def test_refusals_say_what_to_do_and_write_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "taken.html").mkdir()
    results = payload((0,), attack=False)
    edited = write_run(tmp_path / "edited", {**results, "schema": 7}, rows=[])
    broken = write_run(tmp_path / "broken", results, rows=[])
    text = (broken / "results.json").read_text().replace('"value": 0.51', '"value": 51')
    (broken / "results.json").write_text(text)
    before = (run / "results.json").read_bytes()
    for words, message in [
        ((), "required: RUN"),
        (("nowhere",), "`nowhere` must be the folder of a run, but does not exist"),
        ((empty,), "Finish the run"),
        ((run / "results.json",), "is a file"),
        ((edited,), "must have `schema` 1, got 7"),
        ((broken,), "broken/results.json, record 1: `ca` must be in 0..1, got 51"),
        ((run, "nowhere"), "`nowhere`"),
        ((run, run), "given twice"),
        ((run, "--output", "missing/report.html"), "folder that does not exist"),
        ((run, "--output", run / "results.json"), "must end in .html"),
        ((run, "--output", "taken.html"), "is a folder"),
        ((run, "--out", "x.html"), "unrecognized arguments"),
    ]:
        code, out, err = call(capsys, *words)
        assert code == 2 and message in err and not out and "Traceback" not in err, (words, err)
    assert not list(tmp_path.rglob("report.html")) and (run / "results.json").read_bytes() == before
    assert main(["report", "--help"]) == 0


def test_a_real_run_leaves_a_report_that_can_be_made_again_without_its_arms(encoder, task, tmp_path, capsys):
    words = ["train", "--task", str(task), "--model_name", str(encoder), "--max_length", "16", "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--num_train_epochs", "2"]
    words += ["--simulate", "badnets", "--poison_rate", "0.1", "--target", "1", "--use_cpu", "true"]
    words += ["--defense", "dece", "trajectory", "--output_dir", str(tmp_path / "run")]
    assert main(words) == 0
    folder = tmp_path / "run"
    first = (folder / "report.html").read_bytes()
    arm = json.loads((folder / "arms" / "seed-0" / "dece" / "result.json").read_text())
    assert [point["step"] for point in arm["history"]] == list(range(2, 31, 2))  # about twenty points of 30 steps
    assert {"epoch", "step", "loss", "learning_rate", "dece/alpha", "dece/target_pull"} <= set(arm["history"][0])
    record = arm["objectives"]["dece"]["rows"]["pull"]
    assert len(set(record["row_ids"])) == len(record["values"]) == 240 and 0 < min(record["values"])
    results = json.loads((folder / "results.json").read_text())
    assert "rows" not in results["arms"]["0"]["dece"]["objectives"]["dece"] and results["schema"] == 1
    for histogram, expected in zip(results["histograms"], [("dece", "pull"), ("trajectory", "scores")], strict=True):
        assert (histogram["arm"], histogram["name"]) == expected
        entry = histogram["seeds"]["0"]
        assert sum(entry["planted"]) == 24 and sum(entry["other"]) == 216
    assert results["trigger"] == "cf" or "cf" in results["trigger"]
    assert "trained on poisoned data" in first.decode()
    shutil.copytree(folder, tmp_path / "before")
    shutil.rmtree(folder / "arms")
    capsys.readouterr()
    assert call(capsys, folder)[0] == 0
    assert (folder / "report.html").read_bytes() == first
    # Arms that an earlier version finished lack the newer keys; the run is continued and its report leaves them out.
    shutil.copytree(tmp_path / "before" / "arms", folder / "arms")
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        del result["history"]
        for account in result["objectives"].values():
            del account["rows"]
        path.write_text(json.dumps(result))
    assert main(words) == 0
    again = (folder / "report.html").read_text()
    assert "Loss and its terms" not in again and "allowed to pull" not in again and "Suspicious rows" in again
