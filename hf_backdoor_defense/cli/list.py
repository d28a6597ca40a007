"""`hfbd list`"""

import argparse


def show(argv: list[str]) -> int:
    """Print all names by kind, or everything about some of them. Returns the exit code."""
    from hf_backdoor_defense.experiment.inventory import details, entries, find, overview

    parser = argparse.ArgumentParser(
        prog="hfbd list",
        description="What there is to choose from: defenses, controls, purifiers, triggers, presets, attacks, filters and more.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="show fields, defaults and presets of these")
    parser.add_argument("--verbose", action="store_true", help="without a NAME: show them of every name")
    args = parser.parse_args(argv)
    chosen = [entry for name in args.names for entry in find(name)] or (list(entries()) if args.verbose else [])
    print("\n\n".join(details(entry) for entry in chosen) if chosen else overview())
    return 0
