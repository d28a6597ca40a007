"""What a filter in front of a classifier costs: seconds per text beside the classifier alone, at batch 1 and 32, on the CPU.

    python -m benchmarks.filters            # about four minutes on two cores

| peer | what a text goes through |
|---|---|
| `undefended` | tokenizer and victim: four layers of MiniLM with a LoRA adapter |
| `undefended_merged` | the same with the adapter merged, which a victim that is served alone may be; no ratio is taken to it |
| `psim` | `PSIMClassifier`: PSIM's pass, then the victim's on what was not flagged |
| `psim_mixed` | `MixedClassifier`: both adapters on one base, up to 8 texts in one batch, more in turn |
| `psim_one_batch` | the same with every batch in one pass |
| `strip` | entropies over 10 copies, then the victim |
| `onion` | suspicions of every word, then the victim on what is left |
| `rap` | its score, which holds the victim's answer to the text |

Cost only: adapters, heads and language model are random, and thresholds are such that nothing is flagged or deleted, so that
every text takes the whole way. ONION's language model has the victim's layers, width and vocabulary; with GPT-2 itself, which its
paper uses, it would cost more. Texts are sentences of `offline:docstrings`; tokenization is included.

For every text or batch of every round the peers run one right after the other, in an order drawn anew, so that a drift of the
machine's load meets all of them. `seconds` are per text. "median" and "p99" are over all calls; "minimum" is the mean over
texts of the fastest of their calls. `time_ratio` is to `undefended`, of the same figure. `passes` are forwards of the victim's
size per text, beside the victim's own: ONION's are words + 1; in one batch PSIM's is there too.
"""

import argparse
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, set_seed  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.grid import RESULTS  # noqa: E402
from hf_backdoor_defense.adapters import apply_strategy  # noqa: E402
from hf_backdoor_defense.data.sources import load  # noqa: E402
from hf_backdoor_defense.functional.thresholds import Calibration  # noqa: E402
from hf_backdoor_defense.input_filters.mixed import MixedClassifier  # noqa: E402
from hf_backdoor_defense.input_filters.onion import ONION  # noqa: E402
from hf_backdoor_defense.input_filters.psim import PSIMFilter  # noqa: E402
from hf_backdoor_defense.input_filters.rap import RAP  # noqa: E402
from hf_backdoor_defense.input_filters.serving import PSIMClassifier  # noqa: E402
from hf_backdoor_defense.input_filters.strip import STRIP  # noqa: E402
from hf_backdoor_defense.models import load_classifier, weights_sha256  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402

MODEL, TASK, LAYERS, MAX_LENGTH, BATCH = "offline:minilm", "offline:docstrings", 4, 128, 32
Peer = Callable[[list[str]], Any]


def base() -> tuple[Any, Any]:
    """The untrusted checkpoint: each peer has one of its own, with the same weights."""
    return load_classifier(MODEL, num_labels=2, num_layers=LAYERS)


def language_model(tokenizer: Any, victim: Any) -> GPT2LMHeadModel:
    """A causal language model of the victim's layers, width and vocabulary, random."""
    config = victim.config
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    ).eval()


def peers(clean_texts: list[str], folder: str) -> tuple[dict[str, Peer], dict[str, float]]:
    """Name -> what classifies a list of texts; name -> its passes."""
    model, tokenizer = base()
    victim = apply_strategy(model, "lora").eval()
    victim.save_pretrained(folder)
    merged = apply_strategy(base()[0], "lora").merge_and_unload().eval()

    def psim() -> PSIMFilter:
        module, _ = base()
        sha256 = weights_sha256(module)
        found = PSIMFilter(apply_strategy(module, "lora").eval(), tokenizer, base_sha256=sha256, max_length=MAX_LENGTH)
        found.calibration = Calibration(tail="upper", upper=0.0)  # the logarithm of a probability is never above
        return found

    def encode(texts: list[str]) -> Any:
        return tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")

    def classes(module: Any, texts: list[str]) -> list[int]:
        with torch.no_grad():
            return module(**encode(texts)).logits.argmax(-1).tolist()

    strip = STRIP(victim, tokenizer, clean_texts=clean_texts, max_length=MAX_LENGTH)
    onion = ONION(language_model(tokenizer, model), tokenizer, bar=float("inf"))
    labels = [i % 2 for i in range(len(clean_texts))]
    rap = RAP(victim, tokenizer, clean_texts=clean_texts, clean_labels=labels, epochs=1, max_length=MAX_LENGTH)
    strip.calibration = rap.calibration = Calibration(tail="lower", lower=-1e9)
    sequential, mixed = PSIMClassifier(victim, psim(), tokenizer=tokenizer), MixedClassifier(psim(), folder)
    one_batch = MixedClassifier(psim(), folder, mix_up_to=10**6)
    runs: dict[str, Peer] = {
        "undefended": lambda texts: classes(victim, texts),
        "undefended_merged": lambda texts: classes(merged, texts),
        "psim": lambda texts: classes(sequential, texts),
        "psim_mixed": lambda texts: classes(mixed, texts),
        "psim_one_batch": lambda texts: classes(one_batch, texts),
        "strip": lambda texts: (strip.flag(texts), classes(victim, texts)),
        "onion": lambda texts: classes(victim, onion.edit(texts)),
        "rap": lambda texts: rap.flag(texts),
    }
    passes = {name: sequential.filter.passes for name in ("psim", "psim_mixed", "psim_one_batch")}
    passes |= {"strip": strip.passes, "rap": rap.passes}
    return runs, passes


def measure(runs: Mapping[str, Peer], batches: list[list[str]], rounds: int, seed: int) -> dict[str, np.ndarray]:
    """Seconds per text of every call: name -> [rounds, batches]."""
    rng = random.Random(seed)
    seconds = {name: np.zeros((rounds, len(batches))) for name in runs}
    for name in runs:  # threads, caches
        runs[name](batches[0])
    for turn in range(rounds):
        for i in rng.sample(range(len(batches)), len(batches)):
            for name in rng.sample(list(runs), len(runs)):
                start = time.perf_counter()
                runs[name](batches[i])
                seconds[name][turn, i] = (time.perf_counter() - start) / len(batches[i])
    return seconds


def figures(seconds: np.ndarray) -> dict[str, float]:
    """[rounds, batches] -> what is recorded.

    >>> figures(np.array([[1.0, 2.0], [3.0, 2.0]]))["minimum"]
    1.5
    """
    return {
        "median": float(np.median(seconds)),
        "minimum": float(seconds.min(0).mean()),
        "p99": float(np.percentile(seconds, 99)),
    }


def records(seconds: Mapping[int, Mapping[str, np.ndarray]], passes: Mapping[str, float], threads: int) -> list[Record]:
    """Batch size -> name -> seconds [rounds, batches]."""
    env, made = environment(), []
    model = f"minilm, {LAYERS} layers"

    def add(name: str, setting: str, metric: str, value: float, n: int | None = None) -> None:
        made.append(Record("filters", TASK, model, "none", name, setting, 0, metric, value, n, env=env))

    for size, by_name in seconds.items():
        plain = figures(by_name["undefended"])
        for name, values in by_name.items():
            for figure, value in figures(values).items():
                setting = f"batch {size}, {threads} threads, {figure}"
                add(name, setting, "seconds", value, values.size)
                add(name, setting, "time_ratio", value / plain[figure], values.size)
    for name, value in passes.items():
        add(name, "", "passes", value)
    return made


def report(seconds: Mapping[int, Mapping[str, np.ndarray]]) -> None:
    """Texts per second, latency, ratios, and the goals of the issue."""
    print(
        f"{'':18} {'batch 1:':>10} {'p50 ms':>8} {'p99 ms':>8} {'ratio':>6}   {f'batch {BATCH}:':>9} {'texts/s':>8} {'ratio':>6}"
    )
    one, many = ({name: figures(values) for name, values in seconds[size].items()} for size in (1, BATCH))
    for name in one:
        a, b = one[name], many[name]
        ratios = [f"{f['median'] / p['undefended']['median']:6.2f}" for f, p in ((a, one), (b, many))]
        print(
            f"{name:18} {1 / a['median']:6.0f} t/s {1e3 * a['median']:8.2f} {1e3 * a['p99']:8.2f} {ratios[0]}   "
            f"{'':9} {1 / b['median']:8.0f} {ratios[1]}"
        )
    goals = (
        ("psim_mixed", "undefended", one, "batch 1", "<= 1.9"),
        ("psim_mixed", "undefended", many, f"batch {BATCH}", "<= 2.05"),
        ("psim_one_batch", "undefended", many, f"batch {BATCH}", "<= 2.05"),
        ("onion", "psim", many, f"batch {BATCH}", ">= 10"),
    )
    for name, reference, found, where, goal in goals:
        if name in found and reference in found:
            ratio = found[name]["median"] / found[reference]["median"]
            print(f"{name} / {reference}, {where}: {ratio:.2f} (goal {goal})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.filters", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=100, help="texts that come one at a time")
    parser.add_argument("--batches", type=int, default=3, help=f"batches of {BATCH}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="peers, separated by commas; `undefended` is always there")
    parser.add_argument("--output", type=Path, default=RESULTS / "filters.jsonl")
    args = parser.parse_args()
    logging.getLogger("hf_backdoor_defense").setLevel(logging.ERROR)  # RAP says that it finds nothing on a random head
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    set_seed(0)
    data = load(TASK)
    rng = random.Random(0)
    clean = rng.sample(data["validation"]["text"][:], 64)
    texts = rng.sample(data["test"]["text"][:], max(args.texts, args.batches * BATCH))
    batches = {
        1: [[text] for text in texts[: args.texts]],
        BATCH: [texts[i * BATCH : (i + 1) * BATCH] for i in range(args.batches)],
    }
    with tempfile.TemporaryDirectory() as folder:
        runs, passes = peers(clean, folder)
    if args.only:
        wanted = {"undefended", *args.only.split(",")}
        unknown = wanted - set(runs)
        if unknown:
            parser.error(f"no peer {', '.join(sorted(unknown))}; known: {', '.join(runs)}")
        runs = {name: run for name, run in runs.items() if name in wanted}
    seconds = {size: measure(runs, parts, args.rounds, seed=size) for size, parts in batches.items()}
    counted = {name: passes[name] for name in runs if name in passes}
    if "onion" in runs:
        counted["onion"] = float(np.mean([len(text.split()) + 1 for text in texts]))
    report(seconds)
    append_records(args.output, records(seconds, counted, args.threads))


if __name__ == "__main__":
    main()
