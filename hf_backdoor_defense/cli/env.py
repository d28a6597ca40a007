"""`hfbd env`"""

import argparse
import json


def env(argv: list[str]) -> int:
    """Print what this machine has and what is off because of it. Returns the exit code."""
    from hf_backdoor_defense.experiment.machine import describe, machine

    parser = argparse.ArgumentParser(
        prog="hfbd env",
        description="Versions, devices, optional packages, and what is off on this machine and why.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    args = parser.parse_args(argv)
    found = machine()
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0
