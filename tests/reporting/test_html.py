"""The page: it loads nothing, hides nothing, shows every number, and is the same for the same results."""

import base64
import json
import os
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from scipy.stats import t as student

from hf_backdoor_defense.reporting.histograms import count_rows
from hf_backdoor_defense.reporting.html import cut, render, visible, write_report
from hf_backdoor_defense.reporting.runs import read_run
from tests.reporting.run_folders import HOSTILE, payload, suspects, write_run

VOID = {"meta", "img", "br"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction", "xlink:href"}


class Page(HTMLParser):
    """Tags in order, what each table says, and the text; fails on tags that do not close in order."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.parents: list[list[tuple[str, dict[str, str | None]]]] = []
        self.words: list[tuple[str, str]] = []  # the innermost tag, its text
        self.feed(html.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.parents.append(list(self.open))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1][0] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, *tags: str) -> str:
        words = [data for tag, data in self.words if (tag in tags if tags else tag not in ("style",))]
        return re.sub(r"\s+", " ", " ".join(words))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write_run(tmp_path / "three")


def page_of(*folders: Path) -> Page:
    return Page(render([read_run(folder) for folder in folders]))


def changed(folder: Path, **changes: Any) -> Path:
    return write_run(folder, {**payload(), **changes})


def test_it_loads_nothing_and_runs_nothing(three: Path) -> None:
    page = page_of(three)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base", "video", "audio")
        for name in LOADS & set(attrs):
            assert str(attrs[name]).startswith(("data:image/svg+xml;base64,", "#")), (tag, attrs[name])
        assert not any(name.startswith("on") for name in attrs)
    policy = next(str(m["content"]) for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")
    style = page.text("style")
    assert "url(" not in style and "@import" not in style
    assert len(render([read_run(three)])) < 1.5e6


def test_pictures_have_words_and_refer_to_nothing_outside(three: Path) -> None:
    images = page_of(three).all("img")
    assert len(images) == 3 + 3 + 5 + 2  # bars, curves, terms that moved, rows
    for image in images:
        assert len(str(image["alt"])) > 20
        svg = base64.b64decode(str(image["src"]).partition(",")[2])
        for element in ElementTree.fromstring(svg).iter():
            assert element.tag.rpartition("}")[2] not in ("image", "script", "foreignObject")
            for name, value in element.attrib.items():
                if name.rpartition("}")[2] == "href":
                    assert value.startswith("#")
        assert not re.search(rb"url\((?!#)", svg)


def test_it_is_a_document(three: Path, tmp_path: Path) -> None:
    for page in (page_of(three), page_of(three, write_run(tmp_path / "b", payload((4,), attack=False), rows=[]))):
        assert page.all("html") == [{"lang": "en"}] and page.text("title").strip() and len(page.all("main")) == 1
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(set(ids)) == len(ids)
        assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)
        for (tag, _), parents in zip(page.tags, page.parents, strict=True):
            if tag == "table":
                assert parents[-1][1]["class"] == "scroll" and parents[-1][1]["tabindex"] == "0"


def test_every_number_of_the_table_is_there(three: Path) -> None:
    results = json.loads((three / "results.json").read_text())
    values: dict[tuple[str, str], list[float]] = {}
    for record in results["records"]:
        values.setdefault((record["defense"], record["metric"]), []).append(record["value"])
    text = page_of(three).text()
    for (arm, metric), found in values.items():
        if metric in ("ca", "asr", "ftr", "r_acc", "der", "time_ratio", "precision", "recall", "seconds"):
            mean, half = statistics.mean(found), student.ppf(0.975, 2) * statistics.stdev(found) / 3**0.5
            expected = [f"{round(x, 2) + 0.0:.2f}".replace("-", "−") for x in (mean, mean - half, mean + half)]
            assert f"{expected[0]} [{expected[1]}, {expected[2]}]" in text, (arm, metric)
    assert "mean and 95 % interval over 3 seeds" in text and results["verdict"] in text
    assert "hfbd train --task offline:docstrings --seeds 0 1 2 --trigger 'cf mn'" in text
    assert "4 % of the training rows poisoned" in text and "commit 0123456789ab with local changes" in text
    assert "117 dropped" in " ".join(str(image["alt"]) for image in page_of(three).all("img"))


def test_texts_of_suspects_are_only_text(tmp_path: Path) -> None:
    rows = suspects()
    rows[2]["text"], rows[3]["label"] = "a\ud800\x00b\u2029", "<b>" * 200
    page = page_of(write_run(tmp_path / "run", rows=rows))
    shown = [data for tag, data in page.words if tag == "bdi"]
    assert shown[0] == HOSTILE.replace("\u202e", "⟨U+202E⟩").replace("\u200b", "⟨U+200B⟩")
    assert shown[2 * 2] == "a⟨U+D800⟩⟨U+0000⟩b⟨U+2029⟩"
    assert len(shown) == 2 * 20 and all(len(text) <= 200 for text in shown[1:])
    assert not page.all("script") and not page.all("b") and len(page.all("img")) == 13
    assert "evil.example" not in " ".join(str(v) for _, attrs in page.tags for v in attrs.values())


def test_everything_else_that_a_run_says_is_only_text_too(tmp_path: Path) -> None:
    results = json.loads(json.dumps(payload((0,)), default=vars).replace("offline:docstrings", "<i>x</i>\\u202e"))
    results["failures"], results["verdict"] = ["INERT: <u>dece</u>"], "<s>fine</s>"
    results["trigger"] = '"><script>1</script>'
    page = page_of(write_run(tmp_path / "<em>run", results))
    assert not {"i", "u", "s", "em", "script"} & {tag for tag, _ in page.tags}
    assert "<i>x</i>⟨U+202E⟩" in page.text("h1") and "INERT: <u>dece</u>" in page.text("li")


def test_the_same_results_give_the_same_bytes(three: Path, tmp_path: Path) -> None:
    first = write_report([three], three / "report.html").read_bytes()
    assert write_report([three], tmp_path / "again.html").read_bytes() == first
    assert b"tmp" not in first.replace(b"attempt", b"")  # no path of this machine


def test_what_failed_stands_before_the_numbers(tmp_path: Path) -> None:
    page = page_of(
        changed(tmp_path / "bad", failures=["INERT: dece, seed 0: alpha_base=1", "GATE: dece leaves ASR +0.3"])
    )
    text = page.text()
    assert text.index("INERT: dece") < text.index("GATE: dece") < text.index("One row per arm")
    assert "Gates met" not in text
    good = page_of(changed(tmp_path / "good")).text()
    ungated = page_of(changed(tmp_path / "ungated", gates={"max_asr_over_floor": None, "max_ca_drop": None})).text()
    assert "No gate was set. No defense was inert." in ungated and "Gates met" not in ungated
    assert "Gates met: attack success at most 0.5 above the floor; clean accuracy at most 0.03 lower." in good


def test_an_attack_is_said_first_and_a_plain_run_claims_nothing(three: Path, tmp_path: Path) -> None:
    attacked = page_of(three).text()
    assert "trained on poisoned data" in attacked and attacked.index("Attacked on purpose") < attacked.index(
        "What was run"
    )
    page = page_of(write_run(tmp_path / "plain", payload((0,), attack=False), rows=[]))
    text = page.text()
    assert "Attacked on purpose" not in text and "nothing is known about attack success" in text
    assert "preliminary: 1 seed" in text and "Suspicious rows" not in text
    assert "ASR" not in page.text("caption", "th", "figcaption")
    assert any(
        "1000 rows, mean" in str(image["alt"]) for image in page.all("img")
    )  # one histogram: nothing was planted
    assert "No figure here certifies the absence of a trigger" in text and "No figure here" in attacked


def test_results_of_an_earlier_version_leave_parts_out(tmp_path: Path) -> None:
    results = payload()
    for key in ("histograms", "command", "gates", "trigger", "between", "planted"):
        del results[key]
    for arms in results["arms"].values():
        for arm in arms.values():
            del arm["history"]
    page = page_of(write_run(tmp_path / "old", results, rows=[]))
    headings = page.text("h2", "h3")
    assert "Results" in headings and "While training" in headings and "How to repeat it" in headings
    assert not any(part in headings for part in ("Loss and its terms", "allowed to pull", "Suspicious rows"))
    assert len(page.all("img")) == 6
    records_only = {"schema": 1, "records": [r for r in results["records"] if r["metric"] == "ca"]}
    assert "clean_reference" in page_of(write_run(tmp_path / "bare", records_only, rows=[])).text("th")


def test_several_runs_share_a_table_and_keep_apart(three: Path, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", payload((5,), attack=False), rows=[])
    single = write_run(tmp_path / "single", payload((9,)), rows=[])
    page = page_of(three, plain, single)
    assert [str(a["href"]) for a in page.all("a")] == ["#run-1", "#run-2", "#run-3"]
    assert page.text("h1").strip() == "Comparison of 3 runs" and len(page.all("article")) == 3
    text = page.text()
    assert "mean and 95 % interval over 3 seeds" in text and text.count("preliminary: 1 seed") >= 4
    assert text.count("How to read this") == 1 and len(page.all("img")) > len(page_of(three).all("img"))
    assert page.text("caption").startswith("One row per arm; nothing is averaged over runs")


def filtered(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """A run with two filters before the undefended model, the second of which failed for the last seed."""
    results = payload(seeds)
    undefended = next(r for r in results["records"] if r["defense"] == "undefended")
    levels = {"confidence": (0.82, 0.98, 0.013, 0.99, 0.83), "psim": (0.825, 0.09, 0.006, 0.101, 0.993)}
    results["filters"] = {}
    for seed in seeds:
        for name, values in levels.items():
            bad = name == "psim" and seed == seeds[-1] and len(seeds) > 1
            of_filter = {"usable": not bad, "rows": {"fit": 209, "calibrate": 419}, "activity": {}}
            results["filters"].setdefault(str(seed), {})[name] = of_filter
            if bad:
                of_filter["reason"] = "clean confidence fell only to 0.94 <b>"
                continue
            of_filter |= {
                "calibration": {"upper": -0.5, "lower": None},
                "activity": {"steps": 40.0} if name == "psim" else {},
            }
            for metric, value in zip(("ca", "asr", "frr", "far", "auroc"), values, strict=True):
                results["records"].append(
                    {
                        **undefended,
                        "seed": seed,
                        "defense": name,
                        "metric": metric,
                        "value": value,
                        "low": None,
                        "high": None,
                    }
                )
    for name in levels:
        scores = {seed: (list(range(30)), [-i / 10 for i in range(30)]) for seed in seeds}
        counted = count_rows(scores, planted={s: range(20, 30) for s in seeds}, dropped={s: range(5) for s in seeds})
        results["histograms"].append({"arm": name, "name": "filter_scores", **(counted or {})})
    return results


def test_filters_have_a_section_of_their_own_that_names_the_threat(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", filtered()))
    text = page.text()
    assert "This is a different threat: the weights are untrusted, the data clean." in text
    assert "psim, seed 0: learned from 209 clean texts, calibrated on 419 others (steps 40)." in text
    assert "confidence, seed 1: calibrated on 419 clean texts." in text
    assert "psim, seed 2: not used. clean confidence fell only to 0.94 <b>" in text
    captions = page.text("caption")
    assert "The undefended model alone, and behind each filter" in captions
    # Their rows stand in that table and in no other: the arms have other columns.
    rows = [data for tag, data in page.words if tag == "th"]
    assert rows.count("psim") == rows.count("confidence") == 1
    titles = page.text("figcaption")
    assert "psim: score of each reported row" in titles and "psim: filter_scores" not in titles
    alts = " ".join(str(image["alt"]) for image in page.all("img"))
    assert "triggered rows" in alts and "15 flagged" in alts


def test_a_run_without_filters_says_nothing_of_them(three: Path) -> None:
    text = page_of(three).text()
    assert "Behind a filter" not in text and "different threat" not in text


def test_filters_do_not_stand_in_the_table_of_several_runs(three: Path, tmp_path: Path) -> None:
    page = page_of(three, write_run(tmp_path / "b", filtered((0,))))
    common = page.text().partition("Attacked on purpose")[0]
    assert "psim" not in common and "psim" in page.text()


def test_many_terms_are_cut_and_named(tmp_path: Path) -> None:
    results = payload((0,), attack=False)
    for i, point in enumerate(results["arms"]["0"]["dece"]["history"]):
        point.update({f"dece/t{n:02}": i + n for n in range(20)})
    page = page_of(write_run(tmp_path / "many", results, rows=[]))
    assert "not drawn: dece/t10" in page.text() and "learning_rate" in page.text() and "fused was 0" in page.text()
    assert sum("over the epochs" in str(image["alt"]) for image in page.all("img")) == 1 + 12


def test_a_failed_write_leaves_the_old_report(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = three / "report.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report([three], path)
    assert path.read_text() == "old" and {p.name for p in three.iterdir()} == {
        "report.html",
        "results.json",
        "suspects.jsonl",
    }


def test_cut_and_visible() -> None:
    assert cut("x" * 200) == "x" * 200 and len(cut("x" * 201)) == 200
    assert visible("ü\n\tİ 漢字") == "ü\n\tİ 漢字"
    with pytest.raises(ValueError, match="at least one run"):
        render([])
