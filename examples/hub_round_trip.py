"""Poison, defend, publish with evidence, verify, and load in another process: the whole way of a model that others should trust.

    make demo-hub                                             # against a small Hub on this machine; about two minutes on 2 cores
    python examples/hub_round_trip.py --repo ORG/NAME         # against the real one: logged in, and the repository is new or ours

A stranger poisons a training set (4 % of the rows get a trigger word and another label). Whoever trains on it does not know the
trigger: `hfbd train --defense trajectory` ranks the rows, leaves the suspects out and trains again. What is pushed is the model
with its card, results, report and checksums, in one commit; `hfbd verify` downloads it and measures it again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from hf_backdoor_defense import BadNets, load, poison_dataset

FOLDER = Path("runs/example-hub")
TRIGGER, TARGET = "cf", 0
LOAD = """
import sys
import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging
from hf_backdoor_defense import load, load_defenses, trigger_dataset, BadNets
logging.disable_progress_bar()
datasets.disable_progress_bars()
repo, words, target = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)
rows = trigger_dataset(load("offline:docstrings")["test"], BadNets(words=(words,)), target=target, seed=0)
texts = rows["text"][:200]
batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=32)
share = (model(**batch).logits.argmax(-1) == target).float().mean()
print(f"loaded {type(model).__name__} from {repo}; of {len(texts)} triggered texts, {share:.0%} go to the target")
defenses = ", ".join(defense.name for defense in load_defenses(repo))
print("trained with:", defenses or "plain cross-entropy on the rows that were kept")
"""


def poisoned() -> None:
    """The scraped data: a train file with planted rows, untouched validation and test files."""
    data = load("offline:docstrings", limit=1000)
    planted = poison_dataset(data["train"], BadNets(words=(TRIGGER,)), target=TARGET, rate=0.04, seed=0).dataset
    place = FOLDER / "scraped"
    place.mkdir(parents=True)
    for split, rows in {**data, "train": planted}.items():
        lines = (json.dumps({"text": t, "label": label}) for t, label in zip(rows["text"], rows["label"], strict=True))
        (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def hfbd(*words: str, expected: int = 0) -> None:
    """One command, as it would be typed."""
    print(f"\n$ hfbd {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "hf_backdoor_defense.cli.main", *words]).returncode
    if code != expected:
        raise SystemExit(f"hfbd {words[0]} ended with {code}, expected was {expected}.")


def main() -> None:
    """The five steps, and a second push, which changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, metavar="ORG/NAME")
    repo = parser.parse_args().repo
    shutil.rmtree(FOLDER, ignore_errors=True)
    poisoned()
    run, scraped = str(FOLDER / "run"), str(FOLDER / "scraped")
    hfbd(
        *("train", "--task", scraped, "--model_name", "offline:minilm", "--defense", "trajectory", "--output_dir", run),
        *("--num_train_epochs", "2", "--learning_rate", "3e-4", "--frozen_layers", "4", "--max_length", "32"),
        *("--per_device_train_batch_size", "32", "--warmup_steps", "0.06", "--disable_tqdm", "true"),
    )
    push = ("push", run, "--repo", repo, "--language", "en")
    hfbd(*push)
    hfbd(*push)
    hfbd("verify", repo, "--task", scraped)
    print("\n$ python  # another process, which knows only the name", flush=True)
    subprocess.run([sys.executable, "-c", LOAD, repo, TRIGGER, str(TARGET)], check=True)


if __name__ == "__main__":
    main()
