"""What a RECIPE step costs: the default way beside the paper's way, on the same texts with the same masked tokens, on the CPU.

    python -m benchmarks.recipe_step        # about three minutes on two cores

| peer | what it does |
|---|---|
| `paper` | texts padded to 64 tokens, scores at all positions, norms by one torch call per matrix |
| `default` | texts of like length together, padded to the longest; scores at masked positions; norms as here |
| `default_all_positions` | the default, but scores at all positions: what padding alone saves |
| `pretraining` | the default without the penalty |

Both train the up-projections alone. Masks are drawn once, so that an epoch of either way holds the same masked tokens. `seconds`
are per update, the median over rounds of an epoch's mean; peers run in turn, in an order drawn anew in each round. `penalty`:
norms and their gradients added to gradients that are there; `adamw`: the update of the same matrices, fused as the Trainer's
default; `adamw_unfused`: as torch does it by default. `time_ratio` is to `paper`, or to `adamw_unfused`.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.grid import RESULTS  # noqa: E402
from hf_backdoor_defense.data.plain_text import mask_once, tokenize_texts  # noqa: E402
from hf_backdoor_defense.defenses.recipe import RECIPE  # noqa: E402
from hf_backdoor_defense.functional.weights import frobenius_norms  # noqa: E402
from hf_backdoor_defense.objectives import Objective, Step  # noqa: E402
from hf_backdoor_defense.pretrained import load_pretrained_whole, mark_head_trained  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer  # noqa: E402

BATCHES, LENGTH, SKIP = 20, 64, 2
PEERS = ("paper", "default", "default_all_positions", "pretraining")
DATA = Path(__file__).parents[2] / "shared" / "data" / "wikitext2"


class _PlainNorms(RECIPE):
    """The penalty as one would write it down."""

    def penalties(self, step: Step) -> dict[str, torch.Tensor]:
        """{"norm": coef · Σ‖W‖}."""
        inside = dict(step.model.named_parameters())
        return {"norm": self.coef * sum(torch.norm(inside[name]) for name in self._names)}  # type: ignore[dict-item]


class _Clock(TrainerCallback):
    """Seconds of each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def texts() -> list[str]:
    """Sentences, from the package where the shared data are absent."""
    from hf_backdoor_defense.data.plain_text import load_texts

    source = str(DATA) if DATA.is_dir() else "offline:docstrings"
    return load_texts(source, limit=32 * (BATCHES + SKIP))


def epoch(peer: str, model: Any, tokenizer: Any, padded: Any) -> float:
    """Mean seconds of an update over one epoch, without the first two."""
    rows, options = padded, {"train_sampling_strategy": "random"}
    if peer != "paper":
        options = {"train_sampling_strategy": "group_by_length"}
        rows = padded.map(_trimmed, load_from_cache_file=False, keep_in_memory=True).remove_columns("attention_mask")
    objective: Objective = _PlainNorms() if peer == "paper" else RECIPE(coef=0.0 if peer == "pretraining" else 1.0)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pretraining_trainer(
            model, tokenizer, rows, output_dir=folder, objective=objective, callbacks=[clock], num_train_epochs=1,
            learning_rate=1e-9, logging_strategy="no", **options,
        )  # fmt: skip
        trainer.labeled_only = peer in ("default", "pretraining")
        if peer in ("paper", "default_all_positions"):
            trainer.fuse_bytes = 2**60  # scores as the stock Trainer has them
        trainer.train()
    return statistics.mean(clock.seconds[SKIP:])


def _trimmed(row: dict[str, Any]) -> dict[str, Any]:
    length = sum(row["attention_mask"])
    return {"input_ids": row["input_ids"][:length], "labels": row["labels"][:length]}


def penalty_and_adamw(model: Any, rounds: int) -> dict[str, float]:
    """Seconds of the norms with their gradients, and of AdamW on the same matrices, both ways: medians."""
    weights = [
        torch.nn.Parameter(p.detach().clone())
        for n, p in model.named_parameters()
        if n.endswith("intermediate.dense.weight")
    ]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    fused, plain = (
        torch.optim.AdamW(weights, lr=1e-9, weight_decay=0.0, fused=fused or None) for fused in (True, False)
    )
    parts = {
        "penalty": lambda: frobenius_norms(weights).sum().backward(),
        "adamw": fused.step,
        "adamw_unfused": plain.step,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 3):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(prog="benchmarks.recipe_step")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of every peer; 0 measures the penalty alone")
    parser.add_argument("--output", type=Path, default=RESULTS / "recipe_step.jsonl")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, tokenizer = load_pretrained_whole("offline:minilm")
    mark_head_trained(model)  # it is not: its loss is meaningless, its cost is not
    rows = tokenize_texts(texts(), tokenizer, max_length=LENGTH)
    padded = mask_once(rows, tokenizer, seed=0, max_length=LENGTH)
    found: dict[str, list[float]] = {peer: [] for peer in PEERS}
    order = random.Random(0)
    for number in range(args.rounds):
        for peer in order.sample(PEERS, len(PEERS)):
            found[peer].append(epoch(peer, model, tokenizer, padded))
            print(f"round {number + 1}: {peer:24} {found[peer][-1]:.3f} s per update", flush=True)
    seconds = {peer: statistics.median(values) for peer, values in found.items() if values}
    seconds |= penalty_and_adamw(model, 50)
    base = dict.fromkeys(("penalty", "adamw", "adamw_unfused"), "adamw_unfused")
    records = []
    for peer, value in seconds.items():
        for metric, number in (("seconds", value), ("time_ratio", value / seconds[base.get(peer, "paper")])):
            records.append(
                Record("recipe_step", "wikitext2" if DATA.is_dir() else "docstrings", "minilm", "none", peer,
                       f"batch 32, {torch.get_num_threads()} threads", 0, metric, number, env=environment())
            )  # fmt: skip
        print(f"{peer:24} {value:.4f} s  {value / seconds[base.get(peer, 'paper')]:.2f}")
    append_records(args.output, records)


if __name__ == "__main__":
    main()
