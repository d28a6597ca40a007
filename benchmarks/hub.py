"""What a push with evidence costs beside huggingface_hub's own, and what a card costs: MiniLM (91 MB) over loopback.

    python -m benchmarks.hub          # about one minute on two cores

| peer | what it does to a new repository |
|---|---|
| `upload_folder`, `upload_folder_again` | `create_repo` and `upload_folder` of what `publish` publishes; their ratio is noise |
| `publish` | `hub.publish.publish` of the run: seal and contents checked, card rendered, the same files in one commit |
| `render_card` | no push: the card alone, from results in memory; the first in the process and the median of later ones |

The Hub is `tests.hub_server`, in a process of its own; nothing leaves the machine, and no repository is used twice. Peers push in
turn, in an order drawn anew in each round, after one push each that does not count. `seconds` are the median over rounds,
`time_ratio` the median over rounds of the ratio to `upload_folder` in the same round.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Read once, when huggingface_hub is imported: no Xet, which the test Hub does not speak, and no offline mode.
os.environ.update(
    HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)

from huggingface_hub import HfApi  # noqa: E402
from huggingface_hub.utils import disable_progress_bars  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.grid import RESULTS  # noqa: E402
from hf_backdoor_defense.hub.card import render_card  # noqa: E402
from hf_backdoor_defense.hub.evidence import Publication, read_evidence  # noqa: E402
from hf_backdoor_defense.hub.publish import publish  # noqa: E402
from hf_backdoor_defense.hub.staging import stage  # noqa: E402
from hf_backdoor_defense.models import load_classifier  # noqa: E402
from hf_backdoor_defense.reporting.results import Record, append_records, environment  # noqa: E402
from tests.hub.small_run import small_run  # noqa: E402

TOKEN = "hf_benchmark"
REPO = "owner/minilm"
LICENSE = "apache-2.0"
BASELINE = "upload_folder"


@contextmanager
def hub() -> Iterator[HfApi]:
    """A client of a test Hub that lives as long as the block."""
    command = [sys.executable, "-m", "tests.hub_server", "--user", "owner"]
    server = subprocess.Popen(command, env={**os.environ, "HF_TOKEN": TOKEN}, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield HfApi(endpoint=server.stdout.readline().strip(), token=TOKEN)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cards(run: Path, rounds: int) -> list[float]:
    """Seconds of each card, the first of this process before all."""
    evidence = read_evidence(run)
    about = Publication(repo_id=REPO, arm=evidence.entry.arm, seed=evidence.entry.seed, license=LICENSE)
    return [seconds(lambda: render_card(evidence, about)) for _ in range(rounds)]


def pushes(api: HfApi, run: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every peer and round."""

    def upload() -> None:
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=folder)

    peers: dict[str, Callable[[], object]] = {
        BASELINE: upload,
        f"{BASELINE}_again": upload,
        "publish": lambda: publish(run, REPO, license=LICENSE, api=api),
    }
    found: dict[str, list[float]] = {peer: [] for peer in peers}
    order = random.Random(0)
    for number in range(rounds + 1):
        for peer in order.sample(list(peers), len(peers)):
            taken = seconds(peers[peer])
            api.delete_repo(REPO)
            if number:
                found[peer].append(taken)
                print(f"round {number}: {peer:20} {taken:.3f} s", flush=True)
    return found


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(prog="benchmarks.hub")
    parser.add_argument("--rounds", type=int, default=15, help="pushes of every peer, after one that does not count")
    parser.add_argument("--output", type=Path, default=RESULTS / "hub.jsonl")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    records: list[Record] = []

    def add(peer: str, setting: str, metric: str, value: float, n: int) -> None:
        records.append(Record("hub", "none", "minilm", "none", peer, setting, 0, metric, value, n=n, env=environment()))

    with tempfile.TemporaryDirectory() as place:
        run, folder = Path(place, "run"), Path(place, "folder")
        model, tokenizer = load_classifier("offline:minilm", num_labels=2)
        small_run(run, model, tokenizer, entry={"base_model": "offline:minilm"})
        first, *later = cards(run, args.rounds)
        staged = stage(run, REPO, license=LICENSE)
        staged.write(folder)
        setting = f"{sum(staged.sizes.values()) / 1e6:.0f} MB in {len(staged.files)} files"
        with hub() as api:
            found = pushes(api, run, folder, args.rounds)
    add("render_card", "first in a process", "seconds", first, 1)
    add("render_card", "later", "seconds", statistics.median(later), len(later))
    for peer, values in found.items():
        ratios = [value / plain for value, plain in zip(values, found[BASELINE], strict=True)]
        add(peer, setting, "seconds", statistics.median(values), len(values))
        add(peer, setting, "time_ratio", statistics.median(ratios), len(ratios))
    append_records(args.output, records)
    for record in records:
        print(f"{record.defense:20} {record.setting:22} {record.metric:10} {record.value:.4f}")


if __name__ == "__main__":
    main()
