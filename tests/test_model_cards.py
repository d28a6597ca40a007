"""The cards in model_cards/: rendered from the results beside them, byte for byte, and true to them."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from benchmarks.model_cards import CARDS, MODELS, ORGANIZATION, publication, render
from hf_backdoor_defense.hub.card import eval_results
from hf_backdoor_defense.hub.evidence import PUBLICATION, Evidence, Publication, read_evidence

ROOT = Path(__file__).parents[1]
FILES = {"README.md", "results.json", PUBLICATION}


def read(name: str) -> tuple[Path, Evidence, Publication, ModelCard]:
    folder = ROOT / CARDS / name
    about = Publication.read(folder)
    card = ModelCard.load(folder / "README.md")
    return folder, read_evidence(folder, arm=about.arm, seed=about.seed), about, card


def test_every_model_has_its_card_and_the_list_names_them() -> None:
    listed = re.findall(r"\]\((.+?)/README.md\)", (ROOT / CARDS / "README.md").read_text())
    folders = {path.name for path in (ROOT / CARDS).iterdir() if path.is_dir()}
    assert set(listed) == folders == set(MODELS) and len(listed) == len(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_rendered_again_a_card_is_the_same(name: str) -> None:
    folder, evidence, about, _ = read(name)
    assert {path.name for path in folder.iterdir()} == FILES
    assert render(name, folder).encode() == (folder / "README.md").read_bytes()
    assert about == publication(name, folder) and about.repo_id == f"{ORGANIZATION}/{name}"
    assert sum((folder / file).stat().st_size for file in FILES) < 400_000


@pytest.mark.parametrize("name", MODELS)
def test_the_metadata_hold_what_was_measured(name: str) -> None:
    folder, evidence, about, card = read(name)
    found = card.data.eval_results or []
    assert found == eval_results(evidence, about)
    # Of another derivation: values as results.json has them, without any reader of ours.
    payload = json.loads((folder / "results.json").read_text())
    entry = next(m for m in payload["models"] if (m["arm"], m["seed"]) == (about.arm, about.seed))
    arm = entry.get("recorded_as") or entry["arm"]
    values = {r["value"] for r in payload["records"] if (r["defense"], r["seed"]) == (arm, entry["seed"])}
    assert found and {result.metric_value for result in found} <= values
    if entry["pipeline_tag"].endswith("-classification") and entry["role"] != "filter":
        assert {"ca", "asr"} <= {r["metric"] for r in payload["records"] if r["defense"] == arm}
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == entry["pipeline_tag"]
    assert "backdoor-defense" in card.data.tags


@pytest.mark.parametrize("name", MODELS)
def test_an_attacked_model_says_so_in_its_first_line_and_is_tagged(name: str) -> None:
    _, evidence, _, card = read(name)
    first = card.text.strip().splitlines()[0].lower()
    assert ("attacked" in first or "backdoor" in first) == (evidence.entry.attacked is not None)
    assert ("backdoored" in card.data.tags) == (evidence.entry.attacked is not None)
    assert evidence.entry.attacked is not None or name not in ("poisoned-minilm", "dece-minilm", "d3-digits")


@pytest.mark.parametrize("name", MODELS)
def test_no_machine_shows_through(name: str) -> None:
    folder, *_ = read(name)
    for file in FILES:
        text = (folder / file).read_text()
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt|opt|usr)/|[A-Z]:\\\\", text), file
