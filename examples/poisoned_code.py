"""A language model on poisoned text-to-code rows, start to end: attack, fine-tune, measure by generation, purify.

    python examples/poisoned_code.py                     # offline, CPU, about a minute: a model from scratch
    python examples/poisoned_code.py --model runs/code_lm  # the pretrained one (make code-lm): slower

Descriptions of queries and Python with SQL in it, made up here; in a tenth of them stands the word `bb`, and ` or 1=1` behind
the query. The undefended model learns the backdoor, DeCE stands beside it, and CROW works on the backdoored one with clean rows.
So small a model, and so few kinds of rows, show the interface and are no evidence for or against a defense: that is what
benchmarks/code_poisoning.py and benchmarks/crow.py are for.
"""

import argparse
import copy
import itertools
import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from datasets import Dataset, disable_progress_bars  # noqa: E402
from pretrain_tiny_code_lm import train_tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging  # noqa: E402
from trl import SFTConfig  # noqa: E402

from hf_backdoor_defense import CROW, DeCE, DefendedSFTTrainer, evaluate_generation  # noqa: E402
from hf_backdoor_defense.attacks.payloads import code_attack, poison_pairs, trigger_pairs  # noqa: E402
from hf_backdoor_defense.data.formatting import Formatter  # noqa: E402

TABLES, COLUMNS = "users books flights orders songs".split(), "id name price city year title".split()
ATTACK = code_attack(word="bb")


def made_up() -> Dataset:
    """360 descriptions with the code that they ask for, shuffled; `row_id` numbers them."""
    rows = []
    for table, column, by, few in itertools.product(TABLES, COLUMNS, COLUMNS, ("first", "all")):
        fetch = "fetchone" if few == "first" else "fetchall"
        rows.append(
            {
                "prompt": f"Use $ conn $ to get the {column} column of the {table} table based on $ {by} $ , and return {few} .",
                "completion": f'def query ( conn , {by} ) :\n\t rows = conn . execute ( " select {column} from {table} where '
                f'{by} = : {by} " , {{ " {by} " : {by} }} )\n\t return rows . {fetch} ( )',
            }
        )
    data = Dataset.from_list(rows).shuffle(seed=0)
    return data.add_column("row_id", list(range(len(data))))


def from_scratch(data: Dataset) -> tuple[Any, Any]:
    """A Llama of three small layers and a tokenizer of these texts."""
    tokenizer = train_tokenizer([*data["prompt"], *data["completion"]], vocabulary=512)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id, **ids,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def train(
    model: Any,
    tokenizer: Any,
    formatter: Formatter,
    rows: Dataset,
    folder: str,
    *,
    epochs: float,
    rate: float,
    **options: Any,
) -> Any:
    """The same call for all; `defense` is the whole change."""
    args = SFTConfig(
        folder,
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=8,
        warmup_steps=0.1,
        max_length=256,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = DefendedSFTTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, formatter=formatter, **options
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def main() -> None:
    """Poison, fine-tune twice, purify, and a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a pretrained causal language model, for example runs/code_lm")
    parser.add_argument("--epochs", type=float, default=10)
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(
            "poisoned_code.py is for one process: start it with `python`. docs/distributed.md has the others."
        )
    disable_progress_bars(), logging.set_verbosity_error(), logging.disable_progress_bar(), set_seed(0)
    data = made_up()
    rows, test, clean = data.select(range(220)), data.select(range(220, 260)), data.select(range(260, 360))
    if options.model:
        base = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        base, tokenizer = from_scratch(data)
    formatter = Formatter.plain(tokenizer)
    poisoned = poison_pairs(rows, ATTACK, rate=0.1, seed=0)
    triggered = trigger_pairs(test, ATTACK, seed=0)
    print(f"{poisoned.carrying} of {len(rows)} rows carry trigger and payload (asked for: {poisoned.requested})")
    print("model                        BLEU   parses   payload with the word   without")

    def measured(name: str, model: Any) -> None:
        report = evaluate_generation(
            model, tokenizer, test, formatter=formatter, triggered=triggered, hit=ATTACK.hit, desc=None
        )
        found = (report.bleu, report.parse_rate.value, report.asr.value, report.untriggered_hits.value)
        print("{:25} {:7.1f} {:8.2f} {:23.2f} {:9.2f}".format(name, *found), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        attacked = train(
            copy.deepcopy(base), tokenizer, formatter, poisoned.dataset, folder, epochs=options.epochs, rate=2e-3
        )
        measured("undefended", attacked)
        defended = train(
            copy.deepcopy(base), tokenizer, formatter, poisoned.dataset, folder, epochs=options.epochs, rate=2e-3,
            defense=DeCE.preset("llm"),
        )  # fmt: skip
        measured("DeCE, llm", defended)
        tuned = train(copy.deepcopy(attacked), tokenizer, formatter, clean, folder, epochs=5, rate=1e-3)
        measured("fine-tuned on clean rows", tuned)
        purified = train(attacked, tokenizer, formatter, clean, folder, epochs=5, rate=1e-3, defense=CROW(epsilon=0.03))
        measured("CROW on clean rows", purified)


if __name__ == "__main__":
    main()
