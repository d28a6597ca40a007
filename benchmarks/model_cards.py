"""Cards of models that runs of this package made: `--runs` makes the runs, without it the cards are rendered from kept results.

| card | run | model |
|---|---|---|
| `dece-minilm` | `hfbd train`, sentences, a planted word | fine-tuned with DeCE on the poisoned rows |
| `poisoned-minilm` | the same | fine-tuned on them without a defense |
| `psim-minilm` | `hfbd detect` | PSIM's adapter on that model |
| `recipe-minilm` | `hfbd clean --method recipe` | a pretrained encoder, treated before anyone fine-tunes it |
| `d3-digits`, `ulrl-digits` | `hfbd clean --method d3`, ulrl | a tiny ViT with a planted patch, purified |

Settings are those of the presets `offline` and `digits`, with what makes a run small; nothing was searched for, so that a card
also shows what did not work. PSIM may flag 5 % of clean texts: with so few to calibrate on, a threshold for 1 % lies at their
very edge, and none of 910 texts was flagged.

    runs/model_cards/RUN/results.json  ->  model_cards/NAME/results.json  ->  README.md, publication.json

All runs together take some minutes on two cores; a stopped one goes on. Nothing is published.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from hf_backdoor_defense.attacks.poisoning import trigger_dataset
from hf_backdoor_defense.attacks.triggers import get_trigger
from hf_backdoor_defense.cli.main import main as hfbd
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.hub.bases import base_on_hub
from hf_backdoor_defense.hub.card import render_card
from hf_backdoor_defense.hub.evidence import PUBLICATION, Publication, read_evidence
from hf_backdoor_defense.reporting.results import write_bytes, write_json
from hf_backdoor_defense.reporting.sealed import RESULTS

RUNS, CARDS = Path("runs/model_cards"), Path("model_cards")
ORGANIZATION = "hf-backdoor-defense"  # an example: nothing is there
LICENSE = "apache-2.0"
TEXTS, DIGITS = "runs/model_cards/text", "runs/model_cards/digits"
TRAINED = 1000  # sentences that the model reads; PSIM's are others

_ON_DIGITS = f"""
    --model_name {DIGITS}/models/seed-0/undefended --clean offline:digits --limit 300 --test offline:digits
    --simulate patch --target 0 --clean_reference {DIGITS}/models/seed-0/clean_reference"""
COMMANDS = {
    "text": f"""
        train --task offline:docstrings --model_name offline:minilm --defense dece --simulate badnets --poison_rate 0.04
        --target 0 --limit {TRAINED} --max_length 32 --frozen_layers 4 --num_train_epochs 3 --learning_rate 3e-4
        --warmup_steps 0.06 --per_device_train_batch_size 32 --save_models true""",
    "digits": """
        train --task offline:digits --model_name offline:digits-vit --simulate patch --poison_rate 0.1 --target 0 --limit 900
        --momentum 0.9 --num_train_epochs 140 --save_strategy no --learning_rate 0.05 --lr_scheduler_type cosine
        --warmup_steps 0.1 --per_device_train_batch_size 64 --save_models true""",
    "recipe": """
        clean --method recipe --model_name offline:minilm --text offline:docstrings --limit 600 --epochs 4 --warm_up true""",
    "psim": f"""
        detect --filter psim --model {TEXTS}/models/seed-0/undefended --clean {RUNS}/clean.jsonl --input {RUNS}/input.jsonl
        --max_length 32 --target_frr 0.05""",
    "d3": f"clean --method d3 {_ON_DIGITS}",
    "ulrl": f"clean --method ulrl {_ON_DIGITS}",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Which model of which run a card is about."""

    run: str
    arm: str
    language: tuple[str, ...] = ()


MODELS = {
    "dece-minilm": Card(run="text", arm="dece", language=("en",)),
    "poisoned-minilm": Card(run="text", arm="undefended", language=("en",)),
    "psim-minilm": Card(run="psim", arm="psim", language=("en",)),
    "recipe-minilm": Card(run="recipe", arm="recipe", language=("en",)),
    "d3-digits": Card(run="d3", arm="d3"),
    "ulrl-digits": Card(run="ulrl", arm="ulrl"),
}


def write_texts() -> None:
    """What PSIM reads: `clean.jsonl`, sentences that the model was not trained on, and `input.jsonl`, the test rows and the same
    with the planted word."""
    whole, limited = load("offline:docstrings"), load("offline:docstrings", limit=TRAINED)
    test = whole["test"]
    seen = {text for rows in (limited["train"], test) for text in rows["text"]}
    clean = [text for split in ("train", "validation") for text in whole[split]["text"] if text not in seen]
    triggered = trigger_dataset(test, get_trigger("badnets"), target=0, seed=0)
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, texts in {"clean": clean, "input": [*test["text"], *triggered["text"]]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        write_bytes(RUNS / f"{name}.jsonl", lines.encode())


def make_runs(names: list[str]) -> None:
    """Make the runs that are not finished, in order, and keep their results. Raises RuntimeError where one fails."""
    write_texts()
    for name in names:
        code = hfbd([*COMMANDS[name].split(), "--output_dir", str(RUNS / name), "--disable_tqdm", "true"])
        if code == 2:
            raise RuntimeError(f"the run `{name}` failed; what it said stands above")
    for name, card in MODELS.items():
        if card.run in names:
            (CARDS / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RUNS / card.run / RESULTS, CARDS / name / RESULTS)


def publication(name: str, folder: Path) -> Publication:
    """What `hfbd push` would decide for the model of the card `name`, whose results lie in `folder`."""
    card = MODELS[name]
    evidence = read_evidence(folder, arm=card.arm, seed=0)
    return Publication(
        repo_id=f"{ORGANIZATION}/{name}",
        arm=card.arm,
        seed=0,
        license=LICENSE,
        base_model=base_on_hub(evidence.entry.base_model),
        language=list(card.language),
        forced=bool(evidence.failures),
    )


def render(name: str, folder: Path) -> str:
    """The card of the model `name`, as Markdown, from the results and the publication in `folder`."""
    about = Publication.read(folder)
    return str(render_card(read_evidence(folder, arm=about.arm, seed=about.seed), about))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.model_cards")
    parser.add_argument(
        "--runs", nargs="*", choices=[*COMMANDS], help="make these runs first; without a name all of them"
    )
    given = parser.parse_args().runs
    if given is not None:
        make_runs(given or [*COMMANDS])
    for name in MODELS:
        folder = CARDS / name
        write_json(folder / PUBLICATION, publication(name, folder).to_dict())
        write_bytes(folder / "README.md", render(name, folder).encode())
        print(folder / "README.md")


if __name__ == "__main__":
    main()
