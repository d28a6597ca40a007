"""Clean a pretrained model on plain text before it is fine-tuned, in a script of your own.

    python examples/clean_pretrained.py      # two layers of the built-in encoder; some minutes on 2 cores

The steps of `hfbd clean --method recipe --warm_up true`: the built-in encoder has no masked-LM head, and gets one first. One
process trains that head; several find it where it was kept:

    python examples/clean_pretrained.py --only_warm_up
    torchrun --nproc_per_node 2 examples/clean_pretrained.py
"""

import argparse
import math
import os

from hf_backdoor_defense.data.plain_text import load_texts, tokenize_texts
from hf_backdoor_defense.defenses.recipe import RECIPE
from hf_backdoor_defense.pretrained import load_pretrained_whole
from hf_backdoor_defense.trainers.pretraining import pretraining_trainer
from hf_backdoor_defense.warm_up import held_out_loss, warmed_up

# What every launcher sets; nothing is set for one process.
PROCESSES, IS_FIRST = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
TEXTS, HELD_OUT, EPOCHS = 1000, 200, 8
BATCH = 32  # texts of an update, over all processes


def main() -> None:
    """Warm up, choose the rate by the dose, train, save."""
    if BATCH % PROCESSES:
        raise SystemExit(
            f"{BATCH} texts of an update do not divide by {PROCESSES} processes: start 1, 2, 4 or 8, or change BATCH."
        )
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only_warm_up", action="store_true", help="stop when the encoder has its head")
    only_warm_up = parser.parse_args().only_warm_up
    texts = load_texts("offline:docstrings", limit=TEXTS + HELD_OUT)
    known = set(texts[HELD_OUT:])
    train, held_out = texts[HELD_OUT:], [text for text in texts[:HELD_OUT] if text not in known]
    folder = warmed_up("offline:minilm", train, held_out, cache="runs/example/warm_up", num_layers=2)
    if only_warm_up:
        print(f"The encoder with its head is in {folder}")
        return
    model, tokenizer = load_pretrained_whole(str(folder))  # trunk, head and pooler: every other way drops the pooler
    rows = tokenize_texts(train, tokenizer)
    recipe = RECIPE()
    rate = recipe.suggest_learning_rate(model, EPOCHS * math.ceil(len(rows) / BATCH))
    before = held_out_loss(model, tokenizer, held_out)
    trainer = pretraining_trainer(
        model,
        tokenizer,
        rows,
        output_dir="runs/example/clean",
        objective=recipe,
        title="recipe",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // PROCESSES,
        learning_rate=rate,
    )
    trainer.train()
    after = held_out_loss(model, tokenizer, held_out)
    trainer.save_model(
        "runs/example/cleaned"
    )  # the first process writes; where weights are sharded, all of them give theirs
    if not IS_FIRST:
        return
    done = recipe.activity()
    print(f"rate {rate:.2g}: dose {done['dose']:.2f}, norms at {done['norm_ratio']:.2f} of what they were")
    print(f"held-out loss {before.loss:.2f} -> {after.loss:.2f} nats over {after.n} tokens")
    print("The model is in runs/example/cleaned. Whether a trigger still works, only a fine-tuned model can show.")


if __name__ == "__main__":
    main()
