"""Find poisoned rows in labeled texts without knowing the trigger, and train again without them.

    python examples/filter_poisoned_rows.py            # the built-in task, poisoned on purpose; about two minutes on 2 cores
    torchrun --nproc_per_node 2 examples/filter_poisoned_rows.py        # the same with two processes (accelerate/README.md)

The steps of `hfbd train --defense trajectory`, in a script of your own.
"""

import argparse
import os

import torch
from datasets import disable_progress_bars
from transformers import DataCollatorWithPadding, TrainingArguments
from transformers.utils import logging

from hf_backdoor_defense import BadNets, DefendedTrainer, TrajectoryFilter, load, poison_dataset
from hf_backdoor_defense.models import load_classifier

# What every launcher sets; nothing is set for one process.
PROCESSES, IS_FIRST = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
BATCH = 32  # rows of an update, over all processes


def main() -> None:
    """Train, rank, show, refit."""
    if BATCH % PROCESSES:
        raise SystemExit(
            f"{BATCH} rows of an update do not divide by {PROCESSES} processes: start 1, 2, 4 or 8, or change BATCH."
        )
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, default=1000, help="rows to train on")
    limit = parser.parse_args().limit
    if not IS_FIRST:
        disable_progress_bars()
        logging.disable_progress_bar()
    data = load("offline:docstrings", limit=limit)
    poisoned = poison_dataset(data["train"], BadNets(words=("cf",)), target=0, rate=0.04, seed=0)
    names = data["train"].features["label"].names
    args = TrainingArguments(
        "runs/example",
        num_train_epochs=2,
        learning_rate=3e-4,
        per_device_train_batch_size=BATCH // PROCESSES,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )

    def trainer(rows, defense, aux=None) -> DefendedTrainer:
        model, tokenizer = load_classifier("offline:minilm", num_labels=4, label_names=names, frozen_layers=4)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0  # every process would draw its own: without it, one and several train the same model
        tokens = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=32), batched=True)
        return DefendedTrainer(
            model,
            args=args,
            train_dataset=tokens,
            data_collator=DataCollatorWithPadding(tokenizer),
            defense=defense,
            aux_datasets=aux,
        )

    first = TrajectoryFilter(rerank=False)
    trainer(poisoned.dataset, first).train()
    ranking = first.ranking()  # of all rows, on every process
    text = dict(zip(poisoned.dataset["row_id"], poisoned.dataset["text"], strict=True))
    for row_id, score in zip(ranking.row_ids[: 10 * IS_FIRST].tolist(), ranking.scores.tolist(), strict=False):
        print(f"{score:5.1f}  {text[row_id][:100]}")
    kept = poisoned.dataset.filter(lambda row: row["row_id"] not in ranking.dropped)
    refit = trainer(kept, None)
    refit.train()
    refit.save_model(
        "runs/example/model"
    )  # the first process writes; where weights are sharded, all of them give theirs
    if IS_FIRST:
        print(
            f"dropped {len(ranking.dropped)} of {len(poisoned.dataset)} rows; the refit model is in runs/example/model"
        )


if __name__ == "__main__":
    main()
