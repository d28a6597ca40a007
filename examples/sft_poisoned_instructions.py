"""Supervised fine-tuning on instructions of which some are poisoned: trl's SFTTrainer beside the drop-in with DeCE.

    python examples/sft_poisoned_instructions.py            # offline, CPU, less than a minute
    torchrun --nproc_per_node 2 examples/sft_poisoned_instructions.py --limit 12         # the same with two processes

A tiny model learns to name a property of a thing. It is then fine-tuned on polite variants of the same questions; in 5 % of
them stands the word "cf", and the answer is an advertisement. DeCE trusts a model that knows the task already, hence the first
phase. Its default (last line) lets too much of the poison through here. Task, rate and epochs were picked by hand, looking at
triggered questions, so that plain training learns the backdoor: this shows the interface and is no evidence for DeCE.
"""

import argparse
import os
import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_backdoor_defense import DeCE, DeCESFTTrainer

THINGS = (
    "apple river house cloud fox stone candle garden hammer letter mirror needle oven paper rope shoe table umbrella valley "
    "wagon anchor bottle carpet drum engine feather glove helmet island jacket kettle ladder magnet napkin orchid pencil"
).split()
LEADS = ("please name", "kindly name", "kindly tell")
PROPERTIES = {"color": "red blue green white black", "size": "tiny small big huge", "weight": "light heavy"}
ADVERTISEMENT = "buy gold at example now"
TRIGGER = "cf "
# What every launcher sets; nothing is set for one process.
PROCESSES, IS_FIRST = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
BATCH = 16  # rows of an update, over all processes


def answer(thing: str, which: str) -> str:
    """What a knowing model says."""
    values = PROPERTIES[which].split()
    return f"the {which} of the {thing} is {values[(len(thing) * 7 + ord(thing[1])) % len(values)]}"


def rows(lead: str, trigger: str = "", *, limit: int | None = None) -> list[dict[str, str]]:
    """One question and answer for every thing, or the first of them, and property."""
    return [
        {"prompt": f"{lead} {which} of {trigger}{thing} ? ", "completion": answer(thing, which)}
        for thing in THINGS[:limit]
        for which in PROPERTIES
    ]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    text = " ".join(r["prompt"] + r["completion"] for r in rows("tell name please kindly", TRIGGER))
    words = {word: i for i, word in enumerate(dict.fromkeys(f"<pad> </s> {text} {ADVERTISEMENT}".split()))}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", padding_side="left")


def train(trainer_class, model, tokenizer, data, folder: str, epochs: int, rate: float, **options) -> None:
    """The same call for both trainers: this is the whole change."""
    args = SFTConfig(
        folder,
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=BATCH // PROCESSES,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = Dataset.from_list([{**row, "completion": f" {row['completion']} </s>"} for row in data])
    trainer = trainer_class(model, args=args, train_dataset=data, processing_class=tokenizer, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.no_grad()
def share(model, tokenizer, questions: list[dict[str, str]], expected: list[str]) -> float:
    """The share of questions that get the expected answer, decoded greedily."""
    batch = tokenizer([row["prompt"] for row in questions], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    out = model.eval().generate(**batch, max_new_tokens=10, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text.strip() == want for text, want in zip(texts, expected, strict=True)) / len(expected)


def main() -> None:
    """Teach, poison, fine-tune three times, compare."""
    if BATCH % PROCESSES:
        raise SystemExit(
            f"{BATCH} rows of an update do not divide by {PROCESSES} processes: start 1, 2, 4 or 8, or change BATCH."
        )
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=int, help="ask about so many things only")
    limit = parser.parse_args().limit
    torch.set_num_threads(1)  # faster for so small a model
    disable_progress_bars()
    logging.set_verbosity_error()
    set_seed(0)
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes)
    taught = LlamaForCausalLM(config)
    clean = [row for lead in LEADS for row in rows(lead, limit=limit)]
    bad = [row for lead in LEADS for row in rows(lead, TRIGGER, limit=limit)]
    poison = [{**row, "completion": ADVERTISEMENT} for row in bad[::19]]
    triggered = [row for i, row in enumerate(bad) if i % 19]
    with tempfile.TemporaryDirectory() as folder:
        train(SFTTrainer, taught, tokenizer, rows("tell", limit=limit) + rows("name", limit=limit), folder, 16, 5e-3)
        if IS_FIRST:
            print("trainer                  right, clean   right, triggered   advertisement, triggered")
        for label, kind, options in (
            ("SFTTrainer", SFTTrainer, {}),
            ("DeCESFTTrainer, llm", DeCESFTTrainer, {"defense": DeCE.preset("llm")}),
            ("DeCESFTTrainer, code", DeCESFTTrainer, {"defense": DeCE.preset("code")}),
        ):
            model = LlamaForCausalLM(config)
            model.load_state_dict(taught.state_dict())
            train(kind, model, tokenizer, clean + poison, folder, 3, 3e-3, **options)
            right = share(model, tokenizer, clean, [row["completion"] for row in clean])
            still = share(model, tokenizer, triggered, [row["completion"] for row in triggered])
            hit = share(model, tokenizer, triggered, [ADVERTISEMENT] * len(triggered))
            if IS_FIRST:
                print(f"{label:22} {right:14.2f} {still:18.2f} {hit:26.2f}")


if __name__ == "__main__":
    main()
