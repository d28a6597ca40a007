"""What an update costs while a classifier is purified: forward, backward and step, beside plain fine-tuning in the same host.

    python -m benchmarks.purifier_step                  # tiny ViT and MiniLM; about four minutes on two cores
    python -m benchmarks.purifier_step --sizes vit-base

| peer | what it does |
|---|---|
| `fine_tuning`, `fine_tuning_again` | no defense, twice: their ratio is what noise does |
| `d3_head`, `d3_all_linear` | the hinge, the distance of the selected weights from where they were, the projection |
| `ulrl` | relearning, as many units flagged as may be; unlearning runs once before and is left out |
| `ft_sam` | two passes per update |

Peers train in turn, in an order drawn anew in each round, from the same weights on the same random rows. `seconds` are the median
over rounds of a round's median update, without the first ones; `time_ratio` is the median over rounds of the ratio to
`fine_tuning` in the same round, so that a machine that slows down slows both. `bytes_per_weight`: bytes of all tensors that a
method holds after training, per weight that it selected (ULRL: per weight of the flagged units). `peak_bytes`: high-water mark of
a process that trains this peer alone, over what it held before the training; `memory_ratio` to `fine_tuning`.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.grid import RESULTS  # noqa: E402
from hf_backdoor_defense.classifiers import Classifier, Kind  # noqa: E402
from hf_backdoor_defense.defenses.d3 import D3, select_weights  # noqa: E402
from hf_backdoor_defense.defenses.ft_sam import FTSAM  # noqa: E402
from hf_backdoor_defense.defenses.ulrl import ULRL  # noqa: E402
from hf_backdoor_defense.experiment.purify_training import PurifySettings, purifying_trainer  # noqa: E402
from hf_backdoor_defense.models import load_classifier, unwrapped  # noqa: E402
from hf_backdoor_defense.objectives import Objective  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402
from hf_backdoor_defense.targets import feeding_layer, output_layer  # noqa: E402
from hf_backdoor_defense.vision import new_digits_vit  # noqa: E402

SKIP = 3
TOKENS = 48


@dataclass(frozen=True)
class Size:
    """A model and its batch; `updates` of a round, after the first `SKIP`."""

    kind: Kind
    batch: int
    updates: int
    labels: int
    image: int = 0

    def model(self) -> Any:
        """The model, with random weights where it is not embedded."""
        if self.kind == "text":
            return load_classifier("offline:minilm", num_labels=self.labels)[0]
        if self.image == 8:
            return new_digits_vit(self.labels)[0]
        return ViTForImageClassification(ViTConfig(image_size=self.image, num_labels=self.labels))

    def rows(self) -> Dataset:
        """One batch's rows: only their labels count, `collate` draws the rest."""
        return Dataset.from_dict({"label": [i % self.labels for i in range(self.batch * (self.updates + SKIP))]})

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The same random inputs for every batch, so that no peer pays for reading."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.tensor([row["label"] for row in rows])
        if self.kind == "text":
            ids = torch.randint(1000, 20000, (len(rows), TOKENS), generator=generator)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        channels = 1 if self.image == 8 else 3
        return {
            "pixel_values": torch.randn(len(rows), channels, self.image, self.image, generator=generator),
            "labels": labels,
        }

    def setting(self) -> str:
        """For the records."""
        shape = f"{TOKENS} tokens" if self.kind == "text" else f"{self.image} x {self.image} pixels"
        return f"batch {self.batch}, {shape}, {torch.get_num_threads()} threads"


SIZES = {
    "tiny-vit": Size("image", batch=64, updates=40, labels=10, image=8),
    "minilm": Size("text", batch=32, updates=8, labels=4),
    "vit-base": Size("image", batch=4, updates=4, labels=10, image=224),
}


class Relearning(ULRL):
    """ULRL after its first phase, with as many suspects as may be: what is left to pay in every update."""

    def prepare(self, trainer: Any, *, checkpoint: str | None) -> None:
        """As on resume, with units that no score has chosen."""
        model = unwrapped(trainer.model)
        found = (feeding_layer if self._kind(model) == "hidden" else output_layer)(model, self.head)
        assert found is not None
        name, layer = found
        rows = self._kind(model) == "rows"
        count = self.max_rows if rows else max(1, int(self.hidden_share * layer.out_features))
        scores = torch.zeros(layer.out_features)
        self.load_state_dict(
            {
                **self.state_dict(),
                "old": layer.weight.detach()[:count].clone(), "scores": scores, "z": scores.clone(), "cosine": torch.zeros(()),
                "flagged": list(range(count)), "accuracies": [0.0], "unlearned": 1, "layer": name,
                "units": "rows" if rows else "hidden",
            }
        )  # fmt: skip
        super().prepare(trainer, checkpoint="")


PEERS = {
    "fine_tuning": lambda: None,
    "fine_tuning_again": lambda: None,
    "d3_head": lambda: D3(targets="head", warm_up="random"),
    "d3_all_linear": lambda: D3(targets="all-linear", warm_up="noise"),
    "ulrl": Relearning,
    "ft_sam": FTSAM,
}


class _Clock(TrainerCallback):
    """Seconds of each update; what the method adds before and after the step is inside."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(model: Any, size: Size, peer: str) -> tuple[list[float], Objective | None]:
    """Seconds of the updates of one epoch, and the objective after it."""
    objective, clock = PEERS[peer](), _Clock()
    classifier = Classifier(model=model, processor=None, kind=size.kind, labels=[str(i) for i in range(size.labels)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = purifying_trainer(
            classifier, size.rows(), objective, settings=PurifySettings(learning_rate=1e-6, epochs=1, batch_size=size.batch),
            seed=0, folder=folder, collate=size.collate, checkpoints=False,
        )  # fmt: skip
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds[SKIP:], objective


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an attribute, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def held(objective: Objective) -> int:
    """Bytes of the tensors that a method keeps between two updates; two names for one storage count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(vars(objective))}
    return sum(storages.values())


def selected(model: Any, objective: Objective) -> int:
    """Weights that a method singles out; 0 where it takes all of them alike."""
    if isinstance(objective, D3):
        return sum(weight.numel() for weight in select_weights(model, objective.targets).values())
    if isinstance(objective, ULRL):
        width = dict(model.named_parameters())[f"{objective.evidence()['layers'][0]['name']}.weight"].shape[1]
        return len(objective.evidence()["layers"][0]["flagged"]) * int(width)
    return 0


def measure(name: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every peer and round, and bytes held per selected weight."""
    size = SIZES[name]
    model = size.model()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    kept: dict[str, float] = {}
    order = random.Random(0)
    for number in range(rounds):
        for peer in order.sample(list(PEERS), len(PEERS)):
            model.load_state_dict(start)
            times, objective = train(model, size, peer)
            seconds[peer].append(statistics.median(times))
            if objective is not None and (count := selected(model, objective)):
                kept[peer] = held(objective) / count
            print(f"{name}, round {number + 1}: {peer:18} {seconds[peer][-1]:.4f} s per update", flush=True)
    return seconds, kept


def peak_of_this_process(name: str, peer: str) -> int:
    """Bytes that a training adds, at its highest, to what stood before it."""
    size = SIZES[name]
    model = size.model()
    before = _status("VmRSS")
    train(model, size, peer)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peaks are measured on Linux only. Use --no-peaks.")


def peak_in_a_process(name: str, peer: str) -> int:
    """`peak_of_this_process` in a process of its own; large blocks are mapped one by one and given back when freed."""
    command = [sys.executable, "-m", "benchmarks.purifier_step", "--sizes", name, "--peak-of", peer,
               f"--threads={torch.get_num_threads()}"]  # fmt: skip
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1])


def records_of(
    name: str, seconds: dict[str, list[float]], kept: dict[str, float], peaks: dict[str, int]
) -> list[Record]:
    """Everything that was measured of one size."""
    found: list[Record] = []

    def add(peer: str, metric: str, value: float, n: int | None = None) -> None:
        setting = SIZES[name].setting()
        found.append(
            Record("purifier_step", "random", name, "none", peer, setting, 0, metric, value, n=n, env=environment())
        )

    for peer, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["fine_tuning"], strict=True)]
        add(peer, "seconds", statistics.median(values), len(values))
        add(peer, "time_ratio", statistics.median(ratios), len(ratios))
    for peer, value in kept.items():
        add(peer, "bytes_per_weight", value)
    for peer, peak in peaks.items():
        add(peer, "peak_bytes", peak)
        add(peer, "memory_ratio", peak / peaks["fine_tuning"])
    return found


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(prog="benchmarks.purifier_step")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny-vit", "minilm"])
    parser.add_argument("--rounds", type=int, default=9, help="trainings of every peer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peaks", action="store_true", help="leave the peak memory out")
    parser.add_argument("--output", type=Path, default=RESULTS / "purifier_step.jsonl")
    parser.add_argument("--peak-of", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.peak_of:
        print(peak_of_this_process(args.sizes[0], args.peak_of))
        return
    for name in args.sizes:
        seconds, kept = measure(name, args.rounds)
        peaks = {} if args.no_peaks else {peer: peak_in_a_process(name, peer) for peer in PEERS}
        found = records_of(name, seconds, kept, peaks)
        append_records(args.output, found)
        for record in found:
            print(f"{name:9} {record.defense:18} {record.metric:17} {record.value:.4f}")


if __name__ == "__main__":
    main()
