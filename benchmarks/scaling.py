"""What a defense costs with one process and with two: samples per second, and the share of time that it adds.

    python -m benchmarks.scaling                    # MiniLM; about six minutes on two idle cores, one thread a process
    python -m benchmarks.scaling --worlds 1 2 4 8   # where there are as many GPUs

Every process takes the same number of rows a forward, so that two do twice the work of one. In a world, peers train in turn, in
an order drawn anew in each round, from the same weights on the same random rows; a training's time is the median of its updates
on the first process, without the first ones. `time_ratio`: the median over rounds of the ratio to plain training in the same one.
A defense scales when its ratio is the same in every world (goal: within .02). `docs/distributed.md` has the table.

| peer | beside |
|---|---|
| `dece`, `d3`, `ulrl` (relearning) | a classifier by plain cross-entropy |
| `undefended_again` | the same, with no defense: what noise does |
| `recipe` | the same encoder by plain masked language modeling |
"""

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import PrinterCallback, TrainingArguments  # noqa: E402
from transformers import logging as transformers_logging  # noqa: E402

from benchmarks.grid import RESULTS  # noqa: E402
from benchmarks.purifier_step import Relearning, _Clock  # noqa: E402
from hf_backdoor_defense.defenses.d3 import D3  # noqa: E402
from hf_backdoor_defense.defenses.dece import DeCE  # noqa: E402
from hf_backdoor_defense.defenses.recipe import RECIPE  # noqa: E402
from hf_backdoor_defense.models import load_classifier  # noqa: E402
from hf_backdoor_defense.pretrained import load_pretrained_whole, mark_head_trained  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402
from hf_backdoor_defense.trainers.hosts import DefendedTrainer  # noqa: E402

BATCH, TOKENS, UPDATES, SKIP, LABELS = 16, 32, 6, 2, 4  # of a forward; of a training, after the first SKIP
PLAIN = {"classifier": "undefended", "masked": "undefended_masked"}
PEERS: dict[str, tuple[str, Any]] = {
    "undefended": ("classifier", lambda: None),
    "undefended_again": ("classifier", lambda: None),
    "dece": ("classifier", DeCE),
    "d3": ("classifier", D3),
    "ulrl": ("classifier", Relearning),
    "undefended_masked": ("masked", lambda: None),
    "recipe": ("masked", lambda: RECIPE(trainable="all")),
}


def rows(kind: str, world: int) -> Dataset:
    """Random tokens with a class, or with every eighth of them masked."""
    count = BATCH * world * (UPDATES + SKIP)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (count, TOKENS), generator=generator)
    found: dict[str, Any] = {"input_ids": ids.tolist(), "attention_mask": [[1] * TOKENS] * count}
    if kind == "classifier":
        return Dataset.from_dict({**found, "label": [i % LABELS for i in range(count)]})
    labels = ids.masked_fill(torch.arange(TOKENS) % 8 != 3, -100)
    return Dataset.from_dict({**found, "labels": labels.tolist()})


def model(kind: str) -> Any:
    """The embedded encoder with a class head, or with a masked-LM head."""
    if kind == "classifier":
        return load_classifier("offline:minilm", num_labels=LABELS)[0]
    network = load_pretrained_whole("offline:minilm")[0]
    mark_head_trained(network)  # it was drawn at random, which RECIPE refuses: here only its seconds count
    return network


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Equal lengths: nothing to pad."""
    names = {name: "labels" if name == "label" else name for name in batch[0]}
    return {new: torch.tensor([row[name] for row in batch]) for name, new in names.items()}


def train(network: Any, peer: str, world: int) -> float:
    """Median seconds of an update on this process."""
    kind, make = PEERS[peer]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DefendedTrainer(
            network,
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-6, max_grad_norm=0,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows(kind, world),
            data_collator=collate,
            defense=make(),
            callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        assert trainer.accelerator.num_processes == world
        trainer.train()
    return statistics.median(clock.seconds[SKIP:])


def inside(world: int, rounds: int) -> None:
    """One world's trainings; the first process prints the seconds of every peer and round as JSON."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_backdoor_defense").setLevel(
        logging.ERROR
    )  # so low a rate does nothing, and each training says so
    networks = {kind: model(kind) for kind in PLAIN}
    starts = {kind: {k: v.clone() for k, v in m.state_dict().items()} for kind, m in networks.items()}
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    order = random.Random(0)
    for number in range(rounds):
        for peer in order.sample(list(PEERS), len(PEERS)):
            kind = PEERS[peer][0]
            networks[kind].load_state_dict(starts[kind])
            seconds[peer].append(train(networks[kind], peer, world))
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"world {world}, round {number + 1}: {peer:18} {seconds[peer][-1]:.4f} s",
                    file=sys.stderr,
                    flush=True,
                )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(seconds), flush=True)


def command(world: int, rounds: int) -> list[str]:
    """What starts `inside` on so many processes. One beside several GPUs is launched too: it would take them all."""
    own = ["-m", "benchmarks.scaling", "--inside", str(world), "--rounds", str(rounds)]
    launched = world > 1 or torch.cuda.device_count() > 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if launched else []
    return [sys.executable, *launcher, *own]


def launch(world: int, rounds: int) -> dict[str, list[float]]:
    """`inside` on so many processes, one thread each on CPUs."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environ["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command(world, rounds), env=environ, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[float]] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def records_of(world: int, seconds: dict[str, list[float]]) -> list[Record]:
    """Seconds of an update and the ratio to plain training, per peer."""
    found = []
    env = {**environment(), "world_size": world}
    setting = f"{world} process{'es' if world > 1 else ''}, batch {BATCH} each, {TOKENS} tokens"
    for peer, values in seconds.items():
        plain = seconds[PLAIN[PEERS[peer][0]]]
        ratios = [value / other for value, other in zip(values, plain, strict=True)]
        for metric, numbers in (("seconds", values), ("time_ratio", ratios)):
            found.append(
                Record("scaling", "random", "minilm", "none", peer, setting, 0, metric, statistics.median(numbers),
                       n=len(numbers), env=env)
            )  # fmt: skip
    return found


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of every peer")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.jsonl")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside, args.rounds)
        return
    for world in args.worlds:
        found = records_of(world, launch(world, args.rounds))
        append_records(args.output, found)
        for record in found:
            each = f"  {world * BATCH / record.value:8.1f} samples/s" if record.metric == "seconds" else ""
            print(f"{world} {record.defense:18} {record.metric:11} {record.value:.4f}{each}")


if __name__ == "__main__":
    main()
