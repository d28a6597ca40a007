"""Output projection and loss, forward and backward: the fused DeCE beside what else there is, in one run.

    python -m benchmarks.dece_loss            N=2048, V=32,000, H=256, fp32, one CPU thread
    python -m benchmarks.dece_loss --cuda     N=8192, V=151,936, H=2048, bf16, one GPU

Time: every round runs every peer once, in an order drawn anew; `seconds` is the median with minimum and maximum as its
interval. `time_ratio` is a ratio of medians, its interval holds the ratio of minima too: to cross-entropy on the CPU, to
the three bare matrix products on the GPU. Memory: the peak above what the inputs take, in a process of its own on the CPU
(resident pages, large blocks given back at once) and as the allocator counts it on the GPU; `memory_ratio` is to
cross-entropy. The fused losses run at their default budget; other budgets have settings of their own.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_backdoor_defense.functional.dece import dece_loss, dece_loss_reference
from hf_backdoor_defense.functional.linear_dece import linear_dece_loss
from hf_backdoor_defense.reporting.results import Record, append_records, environment

RESULTS = Path(__file__).parent / "results" / "dece_loss.jsonl"
FIELDS = {"log_alpha": -0.015113637810048184, "label_smoothing": 0.05}  # alpha = 0.985
PLAIN = {"log_alpha": 0.0, "label_smoothing": 0.0}
OTHERS = {"torch_fused", "trl_fused", "liger", "cut_cross_entropy"}
BUDGETS = {"cpu": (2**23, 2**27), "cuda": (2**28, 2**30)}


@dataclass(frozen=True)
class Shape:
    """The problem: hidden [n, d] and weight [classes, d] of one dtype on one device."""

    n: int
    classes: int
    d: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def setting(self) -> str:
        return f"N={self.n}, " + ("bf16, 1 GPU" if self.device == "cuda" else "fp32, 1 thread")


SHAPES = {
    ("cpu", False): Shape(2048, 32_000, 256, "cpu"),
    ("cpu", True): Shape(64, 1_000, 32, "cpu"),
    ("cuda", False): Shape(8192, 151_936, 2048, "cuda"),
    ("cuda", True): Shape(256, 4_096, 128, "cuda"),
}


class Inputs:
    """Hidden states, weights and labels, the same for every peer; a head that is learned or frozen."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator(shape.device).manual_seed(0)
        options = {"generator": generator, "device": shape.device, "dtype": shape.dtype}
        self.hidden = torch.randn(shape.n, shape.d, **options).requires_grad_()
        self.weight = torch.randn(shape.classes, shape.d, **options).mul_(shape.d**-0.5 * 3).requires_grad_()
        self.labels = torch.randint(0, shape.classes, (shape.n,), generator=generator, device=shape.device)
        self.shape = shape

    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.hidden.grad = self.weight.grad = None


def cross_entropy(x: Inputs) -> None:
    """Full logits. On the GPU as Hugging Face models do it: cast to float32, no smoothing."""
    if x.shape.device == "cuda":
        x.backward(F.cross_entropy(x.logits().float(), x.labels))
    else:
        x.backward(F.cross_entropy(x.logits(), x.labels, label_smoothing=FIELDS["label_smoothing"]))


def dece_unfused(x: Inputs) -> None:
    """The formula with autograd's gradient, on full logits."""
    x.backward(dece_loss_reference(x.logits(), x.labels, **FIELDS).sum() / x.shape.n)


def dece_chunked(x: Inputs) -> None:
    """Full logits, loss and gradient in blocks."""
    x.backward(dece_loss(x.logits(), x.labels, **FIELDS).sum() / x.shape.n)


def dece_fused(x: Inputs, chunk_bytes: int | None = None) -> None:
    """The loss that this package trains with."""
    values = linear_dece_loss(x.hidden, x.weight, x.labels, **FIELDS, chunk_bytes=chunk_bytes)
    x.backward(values.sum() / x.shape.n)


def dece_fused_frozen(x: Inputs) -> None:
    """The same for a frozen head: no gradient of the weight."""
    values = linear_dece_loss(x.hidden, x.weight.detach(), x.labels, **FIELDS)
    x.backward(values.sum() / x.shape.n)


def cross_entropy_fused(x: Inputs) -> None:
    """Cross-entropy through the same function."""
    x.backward(linear_dece_loss(x.hidden, x.weight, x.labels, **PLAIN).sum() / x.shape.n)


def matmuls(x: Inputs) -> None:
    """The three products alone: scores, gradient of the hidden states, gradient of the weight."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    scores = hidden @ weight.t()
    scores @ weight, scores.t() @ hidden


def torch_fused(x: Inputs) -> None:
    """torch's chunked linear cross-entropy. It smooths on full logits only, hence without."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    x.backward(F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options))


def trl_fused(x: Inputs) -> None:
    """trl's log-probabilities, cross-entropy without smoothing: the head that its SFTTrainer trains with."""
    from trl.kernels import ChunkedLogProbFunction

    try:
        parts = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.labels, 1.0, 32768, None, 1.0, ())
    except TypeError as error:
        raise ImportError(f"trl's function is called otherwise in this version: {error}") from error
    x.backward(-parts[0].sum() / x.shape.n)


def liger(x: Inputs) -> None:
    """Liger's fused linear cross-entropy, without smoothing."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    x.backward(LigerFusedLinearCrossEntropyLoss()(x.weight, x.hidden, x.labels))


def cut_cross_entropy(x: Inputs) -> None:
    """Apple's cut cross-entropy, without smoothing, at its defaults (it filters small gradients)."""
    from cut_cross_entropy import linear_cross_entropy

    x.backward(linear_cross_entropy(x.hidden, x.weight, x.labels))


def peers(device: str) -> dict[tuple[str, str], Callable[[Inputs], None]]:
    """(name, addition to the setting) -> one forward and backward."""
    only = (liger, cut_cross_entropy) if device == "cuda" else (trl_fused,)
    every = (matmuls, cross_entropy, dece_unfused, dece_chunked, dece_fused, dece_fused_frozen, cross_entropy_fused)
    found: dict[tuple[str, str], Callable[[Inputs], None]] = {(f.__name__, ""): f for f in (*every, torch_fused, *only)}
    for budget in BUDGETS[device]:
        addition = f", chunk_bytes=2**{budget.bit_length() - 1}"
        found["dece_fused", addition] = lambda x, budget=budget: dece_fused(x, budget)
    return found


def seconds(step: Callable[[Inputs], None], x: Inputs) -> float:
    """Of one step, by the GPU's clock where there is one."""
    if x.shape.device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(x)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    before = time.perf_counter()
    step(x)
    return time.perf_counter() - before


def cuda_peak(step: Callable[[Inputs], None], x: Inputs) -> int:
    """Bytes above what was allocated before, in one step after the warm-up."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident(field: str) -> int:
    """Bytes, from the kernel's table of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_here(key: tuple[str, str], shape: Shape) -> int:
    """Of one step in this process, which does nothing else."""
    torch.set_num_threads(1)
    step = peers(shape.device)[key]
    step(Inputs(SHAPES["cpu", True]))  # libraries load and reserve what they need
    x = Inputs(shape)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    step(x)
    return resident("VmHWM") - before


def peak_apart(key: tuple[str, str], small: bool) -> int:
    """`peak_here` in a process of its own, with a malloc that gives every large block back."""
    command = [sys.executable, "-m", "benchmarks.dece_loss", "--peak_of", json.dumps(key), *["--small"] * small]
    extra = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **extra}, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def measure(shape: Shape, *, warmups: int, repeats: int, small: bool) -> list[Record]:
    """All peers; what cannot run here is named with the reason and left out."""
    x, running = Inputs(shape), peers(shape.device)
    for key, step in list(running.items()):
        try:
            for _ in range(warmups):
                step(x)
        except Exception as error:
            if key[0] not in OTHERS and not isinstance(error, torch.OutOfMemoryError):
                raise  # ours must run
            print(f"{''.join(key)}: left out: {type(error).__name__}: {str(error)[:200]}", flush=True)
            del running[key]
            x.hidden.grad = x.weight.grad = None
            torch.cuda.empty_cache()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in running}
    order = random.Random(0)
    for _ in range(repeats):
        for key in order.sample(list(running), len(running)):
            times[key].append(seconds(running[key], x))
    peaks = {}
    for key, step in running.items():
        peaks[key] = cuda_peak(step, x) if shape.device == "cuda" else peak_apart(key, small)
    return list(records(shape, times, peaks))


def records(shape: Shape, times: dict[tuple[str, str], list[float]], peaks: dict[tuple[str, str], int]) -> list[Record]:
    """One record per metric and peer, and a line on the screen."""
    yardstick = times["matmuls" if shape.device == "cuda" else "cross_entropy", ""]
    env, found = environment(), []
    print(f"{shape.setting}, V={shape.classes}, H={shape.d}; {torch.get_num_threads()} threads; {env['gpu'] or 'CPU'}")
    for (name, addition), series in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        median, least = statistics.median(series), min(series)
        ratios = median / statistics.median(yardstick), least / min(yardstick)
        peak = max(peaks[name, addition], 0)
        memory = peak / peaks["cross_entropy", ""]
        print(
            f"{name + addition:38} median {median * 1e3:9.2f} ms  min {least * 1e3:9.2f} ms  x{ratios[0]:.3f} (min "
            f"x{ratios[1]:.3f})  peak {peak / 2**20:9.1f} MiB  x{memory:.3f}",
            flush=True,
        )
        for metric, value, low, high in (
            ("seconds", median, least, max(series)),
            ("time_ratio", ratios[0], min(ratios), max(ratios)),
            ("peak_bytes", peak, None, None),
            ("memory_ratio", memory, None, None),
        ):
            found.append(
                Record(
                    benchmark="dece_loss",
                    dataset="random",
                    model=f"V={shape.classes},H={shape.d}",
                    attack="none",
                    defense=name,
                    setting=shape.setting + addition,
                    seed=0,
                    metric=metric,
                    value=value,
                    n=len(series) if metric in ("seconds", "time_ratio") else 1,
                    low=low,
                    high=high,
                    env=env,
                )
            )
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.dece_loss")
    parser.add_argument("--cuda", action="store_true", help="the large bf16 problem on a GPU")
    parser.add_argument("--small", action="store_true", help="a tiny problem, to see that it runs")
    parser.add_argument("--repeats", type=int, help="rounds (20 on a GPU, else 7)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the records go")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES["cuda" if args.cuda else "cpu", args.small]
    if args.peak_of:
        name, addition = json.loads(args.peak_of)
        print(peak_here((name, addition), shape))
        return
    if args.cuda and not torch.cuda.is_available():
        sys.exit("--cuda needs a GPU, and torch sees none: run it without, for the CPU problem.")
    torch.set_num_threads(1)
    repeats = args.repeats or (20 if args.cuda else 7)
    append_records(args.output, measure(shape, warmups=5 if args.cuda else 1, repeats=repeats, small=args.small))


if __name__ == "__main__":
    main()
