"""Find poisoned rows in labeled texts without knowing the trigger, and train again without them.

    python examples/filter_poisoned_rows.py            # the built-in task, poisoned on purpose; about two minutes on 2 cores

The steps of `hfbd train --defense trajectory`, in a script of your own.
"""

from transformers import DataCollatorWithPadding, TrainingArguments

from hf_backdoor_defense import BadNets, DefendedTrainer, TrajectoryFilter, load, poison_dataset
from hf_backdoor_defense.models import load_classifier


def main() -> None:
    """Train, rank, show, refit."""
    data = load("offline:docstrings", limit=1000)
    poisoned = poison_dataset(data["train"], BadNets(words=("cf",)), target=0, rate=0.04, seed=0)
    names = data["train"].features["label"].names
    args = TrainingArguments(
        "runs/example",
        num_train_epochs=2,
        learning_rate=3e-4,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )

    def trainer(rows, defense, aux=None) -> DefendedTrainer:
        model, tokenizer = load_classifier("offline:minilm", num_labels=4, label_names=names, frozen_layers=4)
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
    ranking = first.ranking()
    text = dict(zip(poisoned.dataset["row_id"], poisoned.dataset["text"], strict=True))
    for row_id, score in zip(ranking.row_ids[:10].tolist(), ranking.scores.tolist(), strict=False):
        print(f"{score:5.1f}  {text[row_id][:100]}")
    kept = poisoned.dataset.filter(lambda row: row["row_id"] not in ranking.dropped)
    refit = trainer(kept, None)
    refit.train()
    refit.save_model("runs/example/model")
    print(f"dropped {len(ranking.dropped)} of {len(poisoned.dataset)} rows; the refit model is in runs/example/model")


if __name__ == "__main__":
    main()
