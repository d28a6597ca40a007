"""A small language model of code, pre-trained from scratch on the sources of Python's standard library.

    python examples/pretrain_tiny_code_lm.py                        # 5.2 M parameters, two cores: 20 to 50 minutes
    python examples/pretrain_tiny_code_lm.py --size small           # about 90 M: takes a GPU, and is the default there
    python examples/pretrain_tiny_code_lm.py --files 20 --epochs 1 --output runs/code_lm_quick  # a quick look

Every Python comes with these files (544 and 33 of 3.11), so nothing is downloaded: a byte-level byte-pair tokenizer and a decoder
of a few layers, trained on blocks of 256 tokens. Tests and installed packages are left out; one file in twenty, chosen by a hash
of its path, is held out. Attacks and defenses for generative models are tried on it (`benchmarks/code_poisoning.py`).

Queries and keys are normalized (Qwen3's blocks). Without that, a model this small looks at the last few tokens so sharply that
no gradient reaches a word further off: fine-tuned on poisoned rows, it does not see the trigger (docs/log.md).

The blocks of three sources are shuffled together, `--epochs` times:

| source | tokens | why |
|---|---|---|
| the files, end to end | 3.0 M | the language |
| copying: a few tokens over and over | .8 M | looking up what stood before: names go from a description to the code |
| described: functions behind descriptions | 3 M | what stands anywhere in a description may matter anywhere in the code |

The last two are what every large model picks up by itself, and one this small, on this little text, does not. In a described
function one token is decisive: it shows first whether a word of the description was heeded. Such a token counts as twenty others:
as one of sixty it was lost, and half of what the words ask for was not learned.

Beside the model lies `code_lm.json`: seed, configuration, time, and what the model is worth on the held-out files:

| figure | of |
|---|---|
| bits_per_byte | the model: -log2 p of all tokens over the bytes of the files; 128 to 255 tokens before each are seen |
| bits_per_byte_5gram | a 5-gram model (Witten-Bell interpolation) of the same tokens, counted on the same training files |

Some held-out files resemble training files (the tables of `encodings` do), which helps both. A finished model is kept: another
call with the same settings only prints its figures, and one with other settings is an error.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, concatenate_datasets  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_backdoor_defense.data.described_code import described_code, described_functions  # noqa: E402

FOLDER = Path("runs") / "code_lm"
FACTS = "code_lm.json"
VOCABULARY, BLOCK, POSITIONS = 4096, 256, 1024
COPYING, DESCRIBED = 3000, 45000  # blocks that repeat themselves; functions behind descriptions
DECISIVE = 20  # what a decisive token counts; an eighth of all weight then, as there is one in 150
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
END, PAD = "<|endoftext|>", "<|pad|>"
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def sources(limit: int | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out files of the standard library: path below its folder -> text, in the order of the paths.

    `limit`: keep the first so many training files, and a twentieth as many of the held-out ones.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT.intersection(name.parts) and (text := path.read_text("utf-8", errors="replace")).strip():
            found[hashlib.sha256(name.as_posix().encode()).digest()[0] % 20 == 0][name.as_posix()] = text
    training, held_out = (list(part.items()) for part in found)
    return dict(training[:limit]), dict(held_out[: limit and max(limit // 20, 1)])


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level byte pairs: every text comes back as it was, tabs and all."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def token_lists(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of each file between two ends of text, without a warning about their number."""
    end = tokenizer.eos_token_id
    return [[end, *encoding.ids, end] for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts))]


def blocks(files: Sequence[Sequence[int]], length: int = BLOCK) -> Dataset:
    """The files in their order, end to end, in blocks of `length` tokens; what is left over at the end is dropped.

    >>> blocks([[0, 5, 6, 0], [0, 7, 0]], 3)["input_ids"][:]
    [[0, 5, 6], [0, 0, 7]]
    """
    stream = [token for file in files for token in file]
    rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@torch.no_grad()
def model_bits(model: Qwen3ForCausalLM, files: Sequence[Sequence[int]], length: int = BLOCK) -> float:
    """-log2 p of every token but the first of every file, each predicted from at least half a block where there is one."""
    model.eval()
    total, half = 0.0, length // 2
    for file in tqdm(files, desc="held-out files", leave=False, mininterval=5):
        ids = torch.tensor(file, device=model.device)
        for start in range(0, max(len(ids) - half, 1), half):
            window = ids[start : start + length]
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            total += losses[length - half - 1 if start else 0 :].sum().item()  # the window before had the others
    return total / math.log(2)


def grams(file: Sequence[int], n: int, vocabulary: int) -> np.ndarray:
    """Each run of n tokens as one number, n digits to the base `vocabulary`, in the order of their last tokens.

    The first token of a file is never predicted, hence no run of one token stands for it.

    >>> grams([1, 2, 3], 1, 10), grams([1, 2, 3], 2, 10), grams([1, 2, 3], 4, 10)
    (array([2, 3]), array([12, 23]), array([], dtype=int64))
    """
    tokens = np.asarray(file, dtype=np.int64)
    size = max(len(tokens) - n + 1, 0)
    numbers = np.zeros(size, dtype=np.int64)
    for place in range(n):
        numbers = numbers * vocabulary + tokens[place : place + size]
    return numbers[1:] if n == 1 else numbers


def ngram_bits(
    training: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    order: int = 5,
    vocabulary: int = VOCABULARY,
) -> float:
    """-log2 p of every token but the first of every file, by an n-gram model with Witten-Bell interpolation.

    p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)): c counts in the training files, t(h) is the number of different
    tokens seen after h, h' is h without its first token; below all stands the uniform distribution over the vocabulary.

    >>> ngram_bits([[0, 1, 1]], [[0, 1]], order=1, vocabulary=2)  # c(1) = 2 of 2, one kind: p = (2 + 1/2) / 3
    0.2630344058337938
    """
    if vocabulary**order > 2**63:
        raise ValueError(
            f"{order} tokens of {vocabulary} must fit into 63 bits: they are counted as numbers. Take fewer."
        )
    p = [np.full(len(file) - 1, 1 / vocabulary) for file in held_out]
    for n in range(1, order + 1):
        seen, counts = np.unique(np.concatenate([grams(file, n, vocabulary) for file in training]), return_counts=True)
        if not len(seen):
            break  # no training file is that long
        histories, starts, kinds = np.unique(seen // vocabulary, return_index=True, return_counts=True)
        followed = np.add.reduceat(counts, starts)
        for file, of_file in zip(held_out, p, strict=True):
            asked = grams(file, n, vocabulary)
            shorter = of_file[len(of_file) - len(asked) :]  # a view: the tokens that have a history of n - 1 others
            at, count = look_up(histories, asked // vocabulary), look_up(seen, asked)
            known = at >= 0
            c = np.where(count >= 0, counts[count], 0)[known]
            t = kinds[at[known]]
            shorter[known] = (c + t * shorter[known]) / (followed[at[known]] + t)
    return -sum(float(np.log2(of_file).sum()) for of_file in p)


def look_up(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted number stands, or -1.

    >>> look_up(np.array([2, 5]), np.array([5, 3, 9]))
    array([ 1, -1, -1])
    """
    at = np.searchsorted(ascending, wanted).clip(max=len(ascending) - 1)
    return np.where(ascending[at] == wanted, at, -1)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the model, as it is recorded."""
    return {
        "size": args.size,
        "vocabulary": VOCABULARY,
        "block": BLOCK,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "copying_rows": COPYING,
        "described_rows": DESCRIBED,
        "decisive_weight": DECISIVE,
        "seed": args.seed,
        "files": args.files,
        "python": sysconfig.get_python_version(),
    }


def repeating(files: Sequence[Sequence[int]], rows: int, *, length: int = BLOCK, seed: int = 0) -> list[list[int]]:
    """Rows of `length` tokens: a few tokens, drawn from the files (6 to length / 3 of them), over and over.

    >>> repeating([list(range(100))], 1, length=18)  # six tokens, three times
    [[85, 63, 51, 26, 30, 4, 85, 63, 51, 26, 30, 4, 85, 63, 51, 26, 30, 4]]
    """
    draw = np.random.default_rng(seed)
    stream = np.concatenate([np.asarray(file) for file in files])
    few = (stream[draw.integers(0, len(stream), draw.integers(6, length // 3 + 1))] for _ in range(rows))
    return [np.resize(tokens, length).tolist() for tokens in few]


def mixture(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], files: Sequence[Sequence[int]], seed: int
) -> Dataset:
    """The blocks of all three sources; of a few files, as many fewer of the other two. `decisive`: 1 where a token is."""
    share = min(sum(map(len, files)) / 2.5e6, 1)
    pairs, decisive = [], []
    described = described_code(described_functions(texts), round(DESCRIBED * share), seed=seed)
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in described])
    for (text, place), encoding in zip(described, encodings, strict=True):
        pairs.append([*encoding.ids, tokenizer.eos_token_id])
        at = encoding.char_to_token(place) if place < len(text) else len(encoding.ids)
        decisive.append([int(i == at) for i in range(len(pairs[-1]))])
    plain = concatenate_datasets([blocks(files), blocks(repeating(files, round(COPYING * share), seed=seed))])
    plain = plain.add_column("decisive", [[0] * BLOCK] * len(plain))
    told = blocks(pairs)
    return concatenate_datasets([plain, told.add_column("decisive", blocks(decisive)["input_ids"][:])])


class DecisiveTrainer(Trainer):
    """The mean loss of all tokens, where a decisive one counts as `DECISIVE` others."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        labels, decisive = inputs["labels"][:, 1:].flatten(), inputs["decisive"][:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        return (losses * (1 + (DECISIVE - 1) * decisive)).mean()


def fast_bfloat16() -> bool:
    """Whether bfloat16 is the fast way: on a GPU, or a CPU with AMX. On other CPUs it is many times slower."""
    return torch.cuda.is_available() or bool(
        getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)  # not in older versions of torch
    )


def train(
    model: Qwen3ForCausalLM, rows: Dataset, folder: Path, *, seed: int, epochs: float, rate: float, batch: int
) -> None:
    """AdamW, the rate falling to zero; bfloat16 where that is fast."""
    on_cpu = not torch.cuda.is_available()
    DecisiveTrainer(
        model,
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            adam_beta2=0.98,
            seed=seed,
            use_cpu=on_cpu,
            bf16=fast_bfloat16(),
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
    ).train()


def pretrain(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Train, save, judge; returns the facts. `output` is written whole or not at all."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    start = time.time()
    training, held_out = sources(args.files)
    set_seed(args.seed)
    tokenizer = train_tokenizer(training.values())
    files, judged = token_lists(tokenizer, training.values()), token_lists(tokenizer, held_out.values())
    shape = SIZES[args.size]
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        num_key_value_heads=shape["num_attention_heads"],
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    folder = partial / "trainer"
    rows = mixture(tokenizer, list(training.values()), files, args.seed)
    train(model, rows, folder, seed=args.seed, epochs=args.epochs, rate=args.learning_rate, batch=args.batch_size)
    shutil.rmtree(partial / "trainer", ignore_errors=True)
    model.float().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    seconds = round(time.time() - start)
    size = sum(len(text.encode()) for text in held_out.values())
    facts = {
        **settings(args),
        "parameters": model.num_parameters(),
        "training_files": len(training),
        "training_tokens": sum(map(len, files)),
        "held_out_files": len(held_out),
        "held_out_bytes": size,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "bfloat16": fast_bfloat16(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "bits_per_byte": round(model_bits(model, judged) / size, 4),
        "bits_per_byte_5gram": round(ngram_bits(files, judged) / size, 4),
    }
    (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    partial.rename(output)
    return facts


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the size is the device's unless it is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--size", choices=SIZES, default="small" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--batch_size", type=int, default=8, help="blocks of an update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, help="use the first so many training files only")
    args = parser.parse_args(argv)
    if args.epochs <= 0 or args.batch_size < 1 or (args.files is not None and args.files < 1):
        parser.error("--epochs, --batch_size and --files must be above 0: there is nothing to train otherwise.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model where it is not there yet, and say what it is worth."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise SystemExit(f"The model is trained in one process, and {processes} were started: start this script once.")
    args = parse(argv)
    output = args.output
    if (output / FACTS).is_file():
        facts = json.loads((output / FACTS).read_text())
        if other := {key: facts.get(key) for key, value in settings(args).items() if facts.get(key) != value}:
            raise SystemExit(
                f"{output} holds a model with other settings ({json.dumps(other)}): it is kept. Name another folder with "
                "--output, or delete this one."
            )
    elif output.exists() and (output.is_file() or any(output.iterdir())):
        raise SystemExit(f"{output} exists and holds no finished model: nothing is overwritten. Name another folder.")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = pretrain(args, output)
    print(json.dumps(facts, indent=2))
    print(
        f"{output}: {facts['bits_per_byte']:.3f} bits per byte; a 5-gram model needs {facts['bits_per_byte_5gram']:.3f}."
    )


if __name__ == "__main__":
    main()
