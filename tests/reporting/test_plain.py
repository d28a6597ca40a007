"""The report of every verb: made from results alone, complete, harmless, the same bytes each time; refusals for edited ones."""

from pathlib import Path
from typing import Any

import pytest

from hf_backdoor_defense.reporting.pages import make_report
from hf_backdoor_defense.reporting.plain import verb_of
from tests.reporting.run_folders import HOSTILE, payload, write_run
from tests.reporting.test_html import LOADS, Page
from tests.reporting.verb_folders import HASH, VERBS, results, write_verb


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_shows_its_figures_and_loads_and_hides_nothing(tmp_path: Path, verb: str) -> None:
    folder = write_verb(tmp_path / "run", verb)
    data = make_report([folder], folder / "report.html").read_bytes()
    assert data == make_report([folder], tmp_path / "again.html").read_bytes()
    page = Page(data)
    said, given = page.text(), results(verb)
    for record in given["records"]:
        assert f"{record['value']:.2f}" in said
        if record["low"] is not None:
            assert f"[{record['low']:.2f}, {record['high']:.2f}]" in said
    assert "INERT:" in said and "<script>alert('cf')</script>" in said and "⟨U+202E⟩" in said
    assert HOSTILE not in data.decode() and not page.all("script") and not page.all("link")
    loads = [value for _, attrs in page.tags for key, value in attrs.items() if key in LOADS]
    assert all(str(value).startswith("data:image/svg+xml;base64,") for value in loads)
    assert all(image["alt"] for image in page.all("img"))
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy" and "default-src 'none'" in str(policy["content"])
    assert ("Attacked on purpose." in said) == (verb != "detect")


@pytest.mark.parametrize("verb", set(VERBS) - {"purify"})
def test_models_stand_with_their_hash_method_and_activity(tmp_path: Path, verb: str) -> None:
    said = Page(make_report([write_verb(tmp_path / "run", verb)], tmp_path / "r.html").read_bytes()).text()
    assert HASH in said and "norm ratio 0.625" in said and "triggers=cf, <script>" in said


def test_what_a_verb_alone_measures_is_on_its_page(tmp_path: Path) -> None:
    said = {v: Page(make_report([write_verb(tmp_path / v, v)], tmp_path / "r.html").read_bytes()).text() for v in VERBS}
    assert "masked-LM loss 2.5 3.25" in said["clean"] and "Dose Sum of rate" in said["clean"]
    assert (
        "Flagged 7" in said["detect"]
        and "Flagged below -0.7" in said["detect"]
        and "Gate max_flagged 0.05" in said["detect"]
    )
    assert "Trigger cf" in said["attack"] and "Release" in said["attack"] and "Lora" in said["attack"]
    assert "target mse 1.5 0.25" in said["implant"] and "cf undefended 0 0.90 0.55" in said["implant"]
    assert "mn undefended 0 0.60 –" in said["implant"] and "Suspected target class: zero" in said["purify"]


@pytest.mark.parametrize("verb", VERBS)
def test_earlier_results_are_told_by_their_keys(tmp_path: Path, verb: str) -> None:
    told = {**results(verb), "verb": None, **({"steps": {}} if verb == "attack" else {})}
    assert verb_of(told) == verb
    folder = write_verb(tmp_path / "run", verb, verb=None, models=None, **({"steps": {}} if verb == "attack" else {}))
    assert "It was done." in Page(make_report([folder], folder / "report.html").read_bytes()).text()


def test_a_filter_that_could_not_be_used_has_a_page_without_figures(tmp_path: Path) -> None:
    reason = ["psim cannot be used here: it learned nothing"]
    folder = write_verb(tmp_path / "run", "detect", records=[], failures=reason, filter={"name": "psim"}, models=[])
    said = Page(make_report([folder], folder / "report.html").read_bytes()).text()
    assert reason[0] in said and "Results" not in said


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "a purification without arms": ("purify", {"arms": None}),
    "arms of another method": ("purify", {"method": "d3"}),
    "models that are words": ("clean", {"models": ["model"]}),
    "a filter that is a list": ("detect", {"filter": [1]}),
    "a history of words": ("clean", {"training": {"history": ["low"]}}),
    "shares that are words": ("implant", {"fine_tuned": {"0": {"undefended": {"asr_by_class": "all"}}}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_edited_results_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    verb, changes = BROKEN[name]
    folder = write_verb(tmp_path / "run", verb, **changes)
    with pytest.raises(ValueError, match="no run writes that|the file was edited"):
        make_report([folder], folder / "report.html")
    assert not (folder / "report.html").exists()


def test_only_runs_of_train_are_compared(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", payload((0,)), rows=[]), write_verb(tmp_path / "two", "clean")
    with pytest.raises(ValueError, match="two` was left by `clean`: only runs of hfbd train are compared"):
        make_report([one, other], tmp_path / "report.html")
    with pytest.raises(ValueError, match="must end in .html"):
        make_report([other], tmp_path / "report.txt")
