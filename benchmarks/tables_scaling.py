"""The table of what a defense costs with one process and with several, rendered from results/scaling.jsonl.

added = time of an update / time of the plain update beside it - 1;   difference = added (most processes) - added (one)
"""

from benchmarks.grid import RESULTS
from benchmarks.tables_filters import grid, measured_at
from hf_backdoor_defense.reporting.results import Record, read_records

GOAL = 2.0  # points of a percentage
NOISE = "undefended_again"
TITLES = {
    "undefended": "plain cross-entropy",
    NOISE: "the same again (what noise does)",
    "dece": "DeCE",
    "d3": "D3",
    "ulrl": "ULRL, relearning",
    "undefended_masked": "plain masked language modeling",
    "recipe": "RECIPE",
}
PLAIN = ("undefended", "undefended_masked")


def scaling_records() -> list[Record]:
    """All there are; none before the benchmark has run."""
    path = RESULTS / "scaling.jsonl"
    return read_records(path) if path.is_file() else []


def table(records: list[Record]) -> str:
    """docs/distributed.md: peers x numbers of processes, and whether the goal is met; one table for each kind of machine."""
    if not records:
        return "Not run yet: `make bench-scaling`."
    machines = dict.fromkeys(str(r.env.get("gpu")) for r in records)
    return "\n\n".join(_of_machine([r for r in records if str(r.env.get("gpu")) == each]) for each in machines)


def _of_machine(records: list[Record]) -> str:
    # What was measured again stands for what was measured before.
    found = {(r.env["world_size"], r.defense, r.metric): r for r in records}
    worlds = sorted({world for world, _, _ in found})
    batch = records[-1].setting.partition(", ")[2]
    head = ["trained with"]
    for world in worlds:
        head += [f"{_processes(world)}: samples/s", "adds"]
    rows, differences = [], {}
    for peer, title in TITLES.items():
        if not all((world, peer, "seconds") in found for world in worlds):
            continue
        row, added = [title], []
        for world in worlds:
            size = int(batch.split()[1]) * world
            added.append(100 * (found[world, peer, "time_ratio"].value - 1))
            row += [
                f"{size / found[world, peer, 'seconds'].value:.1f}",
                "–" if peer in PLAIN else f"{_signed(added[-1])} %",
            ]
        if peer not in PLAIN:
            differences[peer] = added[-1] - added[0]
        rows.append([*row, _signed(differences[peer]) if peer in differences else "–"])
    head.append("difference, points")
    rounds = sorted({r.n or 0 for r in found.values()})
    about = (
        f"Medians over {' or '.join(map(str, rounds))} round(s); {batch}; samples of all processes together. "
        f"{measured_at(list(found.values()))}"
    )
    return f"{grid(head, rows)}\n\n{_verdict(differences, worlds)}\n\n{about}"


def _verdict(differences: dict[str, float], worlds: list[int]) -> str:
    if len(worlds) < 2:
        return "One number of processes only: nothing to compare."
    noise = f" Noise alone made {abs(differences[NOISE]):.1f} points." if NOISE in differences else ""
    missed = [TITLES[peer] for peer, points in differences.items() if peer != NOISE and abs(points) > GOAL]
    said = f"missed by {', '.join(missed)}" if missed else "met by all"
    return (
        f"Goal: what a defense adds differs by at most {GOAL:g} points between {_processes(worlds[0])} and "
        f"{_processes(worlds[-1])}: {said}.{noise}"
    )


def _processes(world: int) -> str:
    return f"{world} process{'' if world == 1 else 'es'}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
