"""What a defended step of supervised fine-tuning costs: seconds per optimizer step and peak memory, beside trl's own.

    python -m benchmarks.sft_step            # CPU: 4 x 256 tokens, V = 32,000, float32
    python -m benchmarks.sft_step --cuda     # GPU: 8 x 1024 tokens, V = 151,936, about 0.5 billion parameters, bf16 autocast

| peer | what runs |
|---|---|
| `stock` | trl's SFTTrainer: cross-entropy in its fused head |
| `undefended` | DefendedSFTTrainer(defense=None) |
| `dece` | DefendedSFTTrainer(defense=DeCE()) |
| `dece_compute_loss_func` | DeCE on logits as `compute_loss_func` of trl's SFTTrainer, which adds a forward of its own |

Every round trains each peer anew for a few steps, in an order drawn anew, so that a drift of the machine's load meets all
of them. A step is the time between the ends of two optimizer steps; on a GPU between two events, nothing is synchronized.
`seconds` is the minimum and the median over all steps of all rounds; `time_ratio` is to `stock`, of the same figure.
`peak_bytes` is what a training adds to what stood before it, optimizer included: on a CPU the high-water mark of a process of its
own, with large blocks given back to the system at once; on a GPU what the allocator counted. Random weights, random tokens.

On a CPU trl's head runs without its Triton kernels, so a ratio below 1 there says little about a GPU.
"""

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from hf_backdoor_defense.defenses.dece import DeCE  # noqa: E402
from hf_backdoor_defense.functional.cross_entropy import shift_labels  # noqa: E402
from hf_backdoor_defense.functional.dece import dece_loss  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402
from hf_backdoor_defense.trainers.sft import DefendedSFTTrainer  # noqa: E402

PEERS = ("stock", "undefended", "dece", "dece_compute_loss_func")
SIZES = {  # vocabulary, hidden, layers, heads, batch, tokens
    "small": (2000, 32, 2, 2, 4, 32),
    "cpu": (32_000, 256, 4, 4, 4, 256),
    "cuda": (151_936, 1024, 16, 16, 8, 1024),
}


class Marks(TrainerCallback):
    """A mark at the end of every optimizer step; `seconds` between them, the first `skip` steps left out."""

    def __init__(self, skip: int) -> None:
        self.skip, self.marks = skip, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        kept = self.marks[self.skip - 1 :]
        if not isinstance(kept[0], float):
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(kept, kept[1:], strict=False)]
        return [b - a for a, b in zip(kept, kept[1:], strict=False)]


def dece_on_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """What a user would pass as `compute_loss_func`, with the fields of the first epoch of DeCE()."""
    defense = DeCE()
    smoothing = defense.label_smoothing
    values = dece_loss(
        outputs.logits, shift_labels(labels), log_alpha=defense.log_alpha(0.0), label_smoothing=smoothing
    )
    return values.sum() / (values.numel() if num_items_in_batch is None else num_items_in_batch)


def make(peer: str, size: str, steps: int, folder: str, dtype: str, callback: TrainerCallback) -> SFTTrainer:
    """A trainer of the peer over random tokens; the model is built where it is trained."""
    vocabulary, hidden, layers, heads, batch, length = SIZES[size]
    device = torch.device("cuda" if size == "cuda" else "cpu")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden if size == "cuda" else 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    with device:
        model = LlamaForCausalLM(config)
    if dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    ids = torch.randint(2, vocabulary, (batch * steps, length), generator=torch.Generator().manual_seed(1)).tolist()
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    args = SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        bf16=dtype == "autocast",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    options: dict[str, Any] = {
        "args": args,
        "train_dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>"),
        "callbacks": [callback],
    }
    if peer == "dece_compute_loss_func":
        options["compute_loss_func"] = dece_on_logits
    trainer: SFTTrainer
    if peer in ("undefended", "dece"):
        trainer = DefendedSFTTrainer(model, defense=DeCE() if peer == "dece" else None, **options)
        if size == "small":
            trainer.fuse_bytes = 0  # the sizes of a smoke run would not be fused
    else:
        trainer = SFTTrainer(model, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(peer: str, size: str, steps: int, skip: int, dtype: str) -> tuple[list[float], int]:
    """Seconds of each step behind the first `skip`, and (GPU) the bytes that training added at most."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Marks(skip)
        trainer = make(peer, size, steps, folder, dtype, marks)
        cuda = trainer.args.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        trainer.train()
        result = marks.seconds(), torch.cuda.max_memory_allocated() - before if cuda else 0
    del trainer, marks
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return result


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def peak_of_this_process(peer: str, size: str, dtype: str) -> int:
    """What two steps add to this process at most; run it in a fresh one."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(peer, size, 2, folder, dtype, Marks(1))
        gc.collect()
        before = status_bytes("VmRSS")
        trainer.train()
        return status_bytes("VmHWM") - before


def peak_in_a_process(peer: str, size: str, dtype: str, threads: int) -> int:
    """`peak_of_this_process` in a process of its own; large blocks are mapped one by one and given back when freed."""
    command = [sys.executable, "-m", "benchmarks.sft_step", "--peak-of", peer, "--dtype", dtype, f"--threads={threads}"]
    command += ["--small"] if size == "small" else []
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": str(threads)}
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    return int(out.split()[-1])


def records(
    seconds: Mapping[str, list[float]], peaks: Mapping[str, int], size: str, dtype: str, threads: int
) -> list[Record]:
    """Minimum and median seconds, peak bytes, and their ratios to `stock`."""
    vocabulary, hidden, layers, _, batch, length = SIZES[size]
    where = "GPU" if size == "cuda" else f"{threads} threads"
    setting = f"{batch} x {length} tokens, {dtype}, {where}"
    model = f"llama, V={vocabulary}, H={hidden}, {layers} layers"
    env, made = environment(), []

    def add(peer: str, metric: str, value: float, note: str, n: int | None = None) -> None:
        cell = (f"{setting}, {note}" if note else setting, 0)
        made.append(Record("sft_step", "random", model, "none", peer, *cell, metric, value, n, env=env))

    for note, figure in (("minimum", min), ("median", statistics.median)):
        for peer, values in seconds.items():
            add(peer, "seconds", figure(values), note, len(values))
            add(peer, "time_ratio", figure(values) / figure(seconds["stock"]), note, len(values))
    for peer, peak in peaks.items():
        add(peer, "peak_bytes", peak, "")
        add(peer, "memory_ratio", peak / peaks["stock"], "")
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.sft_step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="the GPU's sizes")
    parser.add_argument("--small", action="store_true", help="a smoke run: its figures mean nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed steps per peer and round (default: 4, on a GPU 10)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "autocast", "bfloat16"], help="weights and products")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sft_step.jsonl")
    parser.add_argument("--peak-of", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = "cuda" if args.cuda else "small" if args.small else "cpu"
    dtype = args.dtype or ("autocast" if args.cuda else "float32")
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of_this_process(args.peak_of, size, dtype))
        return
    timed, skip = args.steps or (10 if args.cuda else 4), 5 if args.cuda else 2
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    peaks: dict[str, int] = {}
    for turn in range(args.rounds):
        for peer in random.Random(turn).sample(PEERS, len(PEERS)):
            times, peak = run(peer, size, timed + skip, skip, dtype)
            seconds[peer] += times
            peaks[peer] = max(peak, peaks.get(peer, 0))
    if not args.cuda:
        peaks = {peer: peak_in_a_process(peer, size, dtype, args.threads) for peer in PEERS}
    made = records(seconds, peaks, size, dtype, args.threads)
    for record in made:
        print(f"{record.defense:24} {record.metric:13} {record.value:14.4f}  {record.setting}")
    append_records(args.output, made)


if __name__ == "__main__":
    main()
