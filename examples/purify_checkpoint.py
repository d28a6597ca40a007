"""Purify a classifier that somebody else trained, with a few hundred clean rows, in a script of your own.

    python examples/purify_checkpoint.py      # digits, a small vision transformer; about two minutes on 2 cores

The model is backdoored on purpose first, so that there is something to see: a checker of 2 x 2 pixels means class 0. The methods
see clean rows alone. Plain fine-tuning with the same rows and updates stands beside them: what it removes is no method's merit.
One process, as for every call of `purify()`.
"""

import os

import torch
from transformers import TrainingArguments

from hf_backdoor_defense import DefendedTrainer, evaluate_backdoor, poison_dataset, purify, trigger_dataset
from hf_backdoor_defense.attacks.image_triggers import get_image_trigger
from hf_backdoor_defense.data.images import load_images
from hf_backdoor_defense.vision import ImageCollator, new_digits_vit

TARGET, RATE, CLEAN = 0, 0.1, 240


def main() -> None:
    """Backdoor a model, purify it three ways, measure."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("A few hundred rows are purified by one process: start this script once, with python.")
    data = load_images("offline:digits")
    clean, rest = data["train"].select(range(CLEAN)), data["train"].select(range(CLEAN, len(data["train"])))
    trigger = get_image_trigger("patch")
    model, processor = new_digits_vit()
    collate = ImageCollator(processor, model.config)
    args = TrainingArguments(
        output_dir="runs/example/backdoored", num_train_epochs=100, per_device_train_batch_size=64, learning_rate=0.05,
        lr_scheduler_type="cosine", warmup_steps=0.1, save_strategy="no", report_to="none", remove_unused_columns=False, seed=0,
    )  # fmt: skip
    # With AdamW the model would sit in a sharp minimum, and plain fine-tuning would remove the backdoor (docs/footguns.md).
    sgd = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
    poisoned = poison_dataset(rest, trigger, target=TARGET, rate=RATE, seed=0).dataset
    DefendedTrainer(
        model, args=args, train_dataset=poisoned, data_collator=collate, optimizer_cls_and_kwargs=sgd
    ).train()

    triggered = trigger_dataset(data["test"], trigger, target=TARGET, seed=0)  # reaches no method, only the measurement

    def show(name: str, network: object) -> None:
        scores = evaluate_backdoor(network, data["test"], triggered, target=TARGET, collate=collate)  # type: ignore[arg-type]
        print(f"{name:12} CA {scores.ca.value:.3f}  ASR {scores.asr.value:.3f}  R-Acc {scores.r_acc.value:.3f}")

    show("undefended", model)
    for method in ("fine_tuning", "ulrl", "d3"):
        result = purify(model, clean, defense=method, processor=processor)
        show(method, result.model)
        if found := result.report["suspected_classes"]:
            print(f"{'':12} suspected target classes: {', '.join(found)}")
    print("These figures are about one trigger. None of them shows that there is no other.")


if __name__ == "__main__":
    main()
