"""How PSIM is trained, when it stops, and which score flags: every choice, on validation rows and seeds reported nowhere else.

Bases are poisoned with seeds from 100 up. A module is trained for 63 updates without any stop rule, and its logits on clean and
triggered rows are recorded every few updates (`runs/psim_search`), so that stop rules and scores are compared on the same
trainings. The rows are of validation; in the demo's task calibration rows are training rows that its base left out. Triggers are
simulated here to choose defaults; no figure of the benchmark itself comes from these rows or seeds.

    python -m benchmarks.psim_search [--shard i/n]      record
    python -m benchmarks.psim_search --judge            judge every choice on what was recorded
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks.grid import RESULTS, shard
from hf_backdoor_defense.attacks.poisoning import poison_dataset, trigger_dataset
from hf_backdoor_defense.attacks.triggers import BadNets, InSent
from hf_backdoor_defense.data.sources import load
from hf_backdoor_defense.defenses.psim import PSIM
from hf_backdoor_defense.evaluation.metrics import auroc, wilson
from hf_backdoor_defense.functional.thresholds import conformal_threshold
from hf_backdoor_defense.models import load_classifier, load_finished_classifier, mark_backdoored, text_logits
from hf_backdoor_defense.reporting.results import Record, append_records, environment
from hf_backdoor_defense.trainers.hosts import DefendedTrainer

SST2 = Path(__file__).parents[2] / "shared" / "data" / "sst2"
RUNS = Path("runs/psim_search")
TRIGGERS = {"badnets": BadNets(words=("mn",)), "insent": InSent(), "topics": BadNets(words=("cf",))}
TARGET = 1
BASES = [(attack, seed) for seed in (100, 101) for attack in TRIGGERS]
TOPICS = "topics"  # the demo's base: four classes of docstrings, 4 % `cf`, and few texts to train a module on
PSIMS: dict[str, tuple[PSIM, float]] = {  # name -> module and rate; every one is in the results, the discarded ones too
    "LoRA, expected, head frozen": (PSIM(stop_margin=None), 1e-3),
    "LoRA, hashed, head trained": (PSIM(stop_margin=None, labels="hashed", train_head=True), 1e-3),
    "LoRA, expected, head trained": (PSIM(stop_margin=None, train_head=True), 1e-3),
    "P-tuning, hashed, head trained (published)": (PSIM.preset("paper"), 2e-5),
    "LoRA, hashed, head frozen": (PSIM(stop_margin=None, labels="hashed"), 1e-3),
    "P-tuning, expected, head trained": (PSIM(stop_margin=None, strategy="p_tuning", train_head=True), 1e-2),
}
EVERY = 9
STEPS = 63  # one epoch of 2,000 rows
STOPS = (0.3, 0.25, 0.2, 0.1, 0.05, None)  # over 1/k; None: the whole epoch


def _arguments(folder: Path, seed: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=32, train_sampling_strategy="group_by_length", warmup_steps=0.06,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=seed, **options,
    )  # fmt: skip


def _tokenized(rows: Any, tokenizer: Any) -> Any:
    keep = ("label", "row_id")
    return rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=128),
        batched=True,
        remove_columns=[name for name in rows.column_names if name not in keep],
    )


def base(attack: str, seed: int) -> Path:
    """A poisoned checkpoint: full fine-tuning on 2,000 rows, 10 % of them poisoned."""
    folder = RUNS / f"{attack}-{seed}"
    if (folder / "model.safetensors").is_file():
        return folder
    if attack == TOPICS:
        rows = load("offline:docstrings", limit=1000)["train"]
        model, tokenizer = load_classifier("offline:minilm", num_labels=4, seed=seed, frozen_layers=4)
        options: dict[str, Any] = {"num_train_epochs": 2, "learning_rate": 3e-4}
    else:
        rows = load(str(SST2), limit=2000, seed=seed)["train"]
        model, tokenizer = load_classifier("offline:minilm", num_labels=2, seed=seed, num_layers=4)
        options = {"num_train_epochs": 3, "learning_rate": 1e-4}
    rate = 0.04 if attack == TOPICS else 0.1
    poisoned = poison_dataset(rows, TRIGGERS[attack], target=TARGET, rate=rate, seed=seed)
    trainer = DefendedTrainer(
        model,
        args=_arguments(folder, seed, **options),
        train_dataset=_tokenized(poisoned.dataset, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    mark_backdoored(folder, {"attack": attack, "trigger": TRIGGERS[attack].to_dict(), "target": TARGET, "seed": seed})
    trainer.save_model(str(folder))
    return folder


class _Recorder(TrainerCallback):
    """Logits on the three sets of texts, every few updates."""

    def __init__(self, tokenizer: Any, texts: dict[str, list[str]]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.found: dict[str, np.ndarray] = {}

    def look(self, model: Any, step: int) -> None:
        for name, of_name in self.texts.items():
            self.found[f"{step}/{name}"] = text_logits(model, self.tokenizer, of_name).numpy()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.look(model, state.global_step)


def _sentiment(attack: str, seed: int) -> tuple[Any, dict[str, list[str]]]:
    """What a module is trained on, and the texts it is looked at with."""
    validation = load(str(SST2))["validation"].shuffle(seed=0)
    triggered = trigger_dataset(validation.select(range(600, 872)), TRIGGERS[attack], target=TARGET, seed=seed)
    texts = {
        "calibration": validation["text"][:300],
        "clean": validation["text"][300:600],
        "triggered": triggered["text"],
    }
    return load(str(SST2), limit=2000, seed=seed)["train"], texts


def _topics(seed: int) -> tuple[Any, dict[str, list[str]]]:
    """The same for the demo's task: rows that its base was not trained on, and the validation split."""
    whole, used = load("offline:docstrings"), set(load("offline:docstrings", limit=1000)["train"]["text"])
    own = whole["train"].filter(lambda text: text not in used, input_columns="text").shuffle(seed=0)
    triggered = trigger_dataset(whole["validation"], TRIGGERS[TOPICS], target=TARGET, seed=seed)
    third = len(own) // 3
    texts = {
        "calibration": own["text"][third:],
        "clean": whole["validation"]["text"][:],
        "triggered": triggered["text"][:],
    }
    return own.select(range(third)), texts


def record(attack: str, seed: int, name: str) -> None:
    """One training, its logits kept."""
    path = RUNS / f"{attack}-{seed}-{name}.npz"
    psim, rate = PSIMS[name]
    if path.is_file():
        return
    classes = 4 if attack == TOPICS else 2
    model, tokenizer = load_finished_classifier(str(base(attack, seed)), num_labels=classes)
    rows, texts = _topics(seed) if attack == TOPICS else _sentiment(attack, seed)
    recorder = _Recorder(tokenizer, texts)
    recorder.look(model, 0)
    trainer = DefendedTrainer(
        model,
        args=_arguments(RUNS / "trainer", seed, max_steps=STEPS, learning_rate=rate),
        train_dataset=_tokenized(rows, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        defense=dataclasses.replace(psim),
        callbacks=[recorder],
    )
    trainer.train()
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **recorder.found)
    partial.replace(path)


def scores(logits: np.ndarray, center: np.ndarray) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """The candidates: name -> (score, tails worth trying)."""

    def confidence(z: np.ndarray) -> np.ndarray:
        return -np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))

    z = logits.astype(np.float64)
    found: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
        "confidence": (confidence(z), ("upper", "both")),
        "centered confidence": (confidence(z - center), ("upper", "both")),
    }
    return found | ({"signed margin": (z[:, 1] - z[:, 0], ("both",))} if z.shape[1] == 2 else {})


def judge() -> None:
    """Every stop rule x score x tail on every recording, appended to results/psim_search.jsonl."""
    path = RESULTS / "psim_search.jsonl"
    path.unlink(missing_ok=True)
    for file in sorted(RUNS.glob("*.npz")):
        attack, seed, name = file.stem.split("-", 2)
        found = np.load(file, allow_pickle=False)
        steps = sorted({int(name.partition("/")[0]) for name in found.files})
        chosen = {"0": 0}
        for stop in STOPS:
            chance = 1 / found["0/calibration"].shape[1]
            reached = [s for s in steps if s and _p95(found[f"{s}/calibration"]) <= chance + (stop or -1)]
            at = steps[-1] if stop is None else reached[0] if reached else None
            if at is not None:
                chosen["epoch" if stop is None else f"{stop:g}"] = at
        records = []
        for stop, step in chosen.items():
            of_set = {name: found[f"{step}/{name}"] for name in ("calibration", "clean", "triggered")}
            center = (of_set["calibration"] - of_set["calibration"].mean(-1, keepdims=True)).mean(0)
            of_score = {name: scores(logits, center) for name, logits in of_set.items()}
            for score, (_, tails) in of_score["clean"].items():
                values = {name: of_score[name][score][0] for name in of_set}
                area = auroc(
                    np.r_[values["clean"], values["triggered"]],
                    np.r_[np.zeros(len(values["clean"])), np.ones(len(values["triggered"]))],
                )
                for tail in tails:
                    rule = conformal_threshold(values["calibration"], 0.01, tail=tail)  # type: ignore[arg-type]
                    frr = wilson(int(rule.flags(values["clean"]).sum()), len(values["clean"]))
                    far = wilson(int((~rule.flags(values["triggered"])).sum()), len(values["triggered"]))
                    common = {
                        "benchmark": "psim_search", "dataset": "docstrings validation" if attack == TOPICS else "sst2 validation",
                        "model": "offline:minilm" if attack == TOPICS else "offline:minilm, 4 layers",
                        "attack": attack, "defense": "psim" if step else "confidence",
                        "setting": f"{name}; stop {stop} (step {step}); {score}, {tail}", "seed": int(seed),
                        "env": environment(),
                    }  # fmt: skip
                    records += [
                        Record.from_estimate(frr, metric="frr", **common),
                        Record.from_estimate(far, metric="far", **common),
                        Record(metric="auroc", value=area, **common),
                    ]
        append_records(path, records)


def _p95(logits: np.ndarray) -> float:
    gaps = logits - logits.max(-1, keepdims=True)
    return float(np.percentile(1 / np.exp(gaps).sum(-1), 95))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.psim_search")
    parser.add_argument("--shard", type=shard, default=shard("1/1"), help="i/n: every n-th training, from the i-th on")
    parser.add_argument("--only", help="bases whose attack is this one")
    parser.add_argument("--judge", action="store_true", help="judge what was recorded")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.judge:
        return judge()
    if not SST2.is_dir():
        print("skipped: the SST-2 rows are absent (benchmark data is not part of the package)")
        return None
    cells = [(*b, name) for name in PSIMS for b in BASES if args.only in (None, b[0])]
    for cell in cells[args.shard]:
        record(*cell)
        print(json.dumps(cell), flush=True)
    return None


if __name__ == "__main__":
    main()
