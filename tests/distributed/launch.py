"""Everything that two gloo processes do in these tests, under one launch: starting them costs more than what they do.

Each part leaves its files in a folder of its own, and `DONE` when it went through; one that fails leaves its traceback there, and
the parts after it still run on both processes.
"""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
DONE, FAILED = "done", "failed"


def parts() -> dict:
    """Test modules by name. `both(folder)` runs on both processes; `before(folder)`, where there is one, before they know of each
    other: afterwards transformers lets only the first one save a model."""
    from tests.distributed import (
        test_collectives,
        test_fsdp2,
        test_generation,
        test_order,
        test_purifiers,
        test_recipe,
        test_sharded,
        test_two_processes,
        test_worlds,
    )

    return {module.__name__.rpartition(".")[2]: module for module in (
        test_two_processes, test_order, test_recipe, test_purifiers, test_sharded, test_collectives, test_fsdp2, test_worlds,
        test_generation,
    )}  # fmt: skip


def main(folder: Path, names: list[str]) -> None:
    """On each process."""
    rank, chosen = os.environ["RANK"], {name: part for name, part in parts().items() if name in names}
    for name, part in chosen.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if hasattr(part, "before"):
            part.before(folder / name)
    for name, part in chosen.items():
        place = folder / name
        try:
            part.both(place)
        except Exception:
            (place / f"{FAILED}{rank}").write_text(traceback.format_exc())
            raise  # the other process would wait for this one
        (place / f"{DONE}{rank}").touch()


def launched(
    script: list[str], *, world: int = 2, timeout: int = 280, remove: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess:
    """`script` on `world` processes, started the way that works on CPUs; `remove`: variables that they are not to have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    for name in remove:
        variables.pop(name, None)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(world),
        "--master_addr",
        "127.0.0.1",
    ]
    command += ["--master_port", str(port), *script]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
