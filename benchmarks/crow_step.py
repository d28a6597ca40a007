"""What a step of CROW costs: seconds per optimizer step, beside plain fine-tuning by the same host.

    python -m benchmarks.crow_step            # four layers of 256 and 4,096 tokens, 8 x 128 of them, float32, CPU

| peer | what runs |
|---|---|
| `undefended` | DefendedTrainer(defense=None): one forward, one backward |
| `undefended_again` | the same once more: what noise does to a ratio |
| `crow` | DefendedTrainer(defense=CROW()): that, the gradient of C in the embeddings, and a forward without the head |

Both for all weights (`full`) and for a LoRA adapter on every linear layer (`lora`). Every round trains each of the six anew
for a few steps, in an order drawn anew, so that a drift of the machine's load meets all of them. `seconds` is the minimum and
the median over all steps of all rounds; `time_ratio` is to `undefended` of the same weights, of the same figure. Random weights,
random tokens.

What to expect, with F the cost of a forward, F of a backward to the embeddings and F of one to the weights: plain 3 F (LoRA
2 F), CROW 4 F (LoRA 3 F) more, hence 2.33 and 2.5 times. The head's share of these 4 F (3 F) is spared.
"""

import argparse
import gc
import os
import random
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging  # noqa: E402

from benchmarks.sft_step import Marks  # noqa: E402
from hf_backdoor_defense.defenses.crow import CROW  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402
from hf_backdoor_defense.trainers.hosts import DefendedTrainer  # noqa: E402

WEIGHTS, PEERS = ("full", "lora"), ("undefended", "undefended_again", "crow")
SIZES = {  # vocabulary, hidden, intermediate, layers, heads, batch, tokens
    "small": (64, 16, 32, 3, 2, 2, 8),
    "cpu": (4096, 256, 688, 4, 4, 8, 128),
}


def model(size: str, weights: str) -> PreTrainedModel:
    """Random weights. A step of 0.1 is several times their embeddings (deviation 0.02), which no cost depends on."""
    vocabulary, hidden, intermediate, layers, heads, _, length = SIZES[size]
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    made: PreTrainedModel = LlamaForCausalLM(config)
    if weights == "full":
        return made
    from peft import LoraConfig, get_peft_model

    return get_peft_model(made, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def run(weights: str, peer: str, size: str, steps: int, skip: int) -> list[float]:
    """Seconds of each step behind the first `skip`."""
    vocabulary, *_, batch, length = SIZES[size]
    ids = torch.randint(
        2, vocabulary, (batch * (steps + skip), length), generator=torch.Generator().manual_seed(1)
    ).tolist()
    rows = {"input_ids": ids, "attention_mask": [[1] * length] * len(ids), "labels": ids}
    with tempfile.TemporaryDirectory() as folder:
        marks = Marks(skip)
        args = TrainingArguments(
            folder,
            max_steps=steps + skip,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        )
        trainer = DefendedTrainer(
            model(size, weights),
            args=args,
            train_dataset=Dataset.from_dict(rows),
            data_collator=default_data_collator,
            defense=CROW() if peer == "crow" else None,
            callbacks=[marks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return marks.seconds()


def records(seconds: Mapping[tuple[str, str], list[float]], size: str, threads: int) -> list[Record]:
    """Minimum and median seconds, and their ratios to `undefended` of the same weights."""
    vocabulary, hidden, _, layers, _, batch, length = SIZES[size]
    name, env, made = f"llama, V={vocabulary}, H={hidden}, {layers} layers", environment(), []
    for note, figure in (("minimum", min), ("median", statistics.median)):
        for (weights, peer), values in seconds.items():
            setting = f"{weights}, {batch} x {length} tokens, float32, {threads} threads, {note}"
            value = figure(values)
            found = {"seconds": value, "time_ratio": value / figure(seconds[weights, "undefended"])}
            made += [
                Record("crow_step", "random", name, "none", peer, setting, 0, metric, number, len(values), env=env)
                for metric, number in found.items()
            ]
    return made


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.crow_step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a smoke run: its figures mean nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per peer and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "crow_step.jsonl")
    args = parser.parse_args(argv)
    size = "small" if args.small else "cpu"
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    cells = [(weights, peer) for weights in WEIGHTS for peer in PEERS]
    seconds: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}
    for turn in range(args.rounds):
        for cell in random.Random(turn).sample(cells, len(cells)):
            seconds[cell] += run(*cell, size, args.steps, skip=2)
            gc.collect()
    made = records(seconds, size, args.threads)
    for record in made:
        print(f"{record.defense:12} {record.metric:11} {record.value:10.4f}  {record.setting}")
    append_records(args.output, made)


if __name__ == "__main__":
    main()
