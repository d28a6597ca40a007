"""`hfbd push`"""

import argparse
import sys


def push(argv: list[str]) -> int:
    """Publish one model of a finished run with its card and evidence, or show what would be. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="hfbd push",
        description="Publish a model of a finished run to the Hub: safetensors, card, results, report, plots and checksums, "
        "in one commit. A run whose report says INERT or whose gate failed is refused. The token is HF_TOKEN or the login's.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository; made where it is missing")
    parser.add_argument("--arm", help="which model, where the run left several")
    parser.add_argument("--seed", type=int, help="of that model")
    parser.add_argument("--license", metavar="ID", help="as the Hub spells it; default: the base's")
    parser.add_argument(
        "--base_model", "--base-model", metavar="ORG/NAME", help="the base, where the run names a folder"
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="ORG/NAME", help="data sets on the Hub that it was trained with"
    )
    parser.add_argument("--language", nargs="+", metavar="CODE", help="of its texts, for example: en")
    parser.add_argument(
        "--private",
        type=_truth,
        nargs="?",
        const=True,
        metavar="true|false",
        help="who sees a new repository; one that exists must be so already",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="made where it is missing; default: main")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="show files and card; ask the Hub nothing, publish nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="in spite of INERT or a failed gate; the card says so first"
    )
    parser.add_argument(
        "--attacked", action="store_true", help="weights that were attacked on purpose, into a private repository"
    )
    args = parser.parse_args(argv)
    import huggingface_hub.utils

    from hf_backdoor_defense.hub.publish import publish

    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    done = publish(
        args.run,
        args.repo,
        arm=args.arm,
        seed=args.seed,
        license=args.license,
        base_model=args.base_model,
        datasets=args.datasets,
        language=args.language,
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
        force=args.force,
        attacked=args.attacked,
        commit_message=args.message,
    )
    if args.dry_run:
        print(f"{done.repo_id} would hold:\n\n{_listing(done.files)}\n")
    elif done.changed:
        print(f"Published {len(done.files)} files, {_size(sum(done.files.values()))}, in one commit.")
    else:
        print("Nothing to do: the repository holds exactly this already.")
    for name, why in done.left_out.items():
        print(f"left out: {name!r} ({why})")
    for name in done.deleted:
        print(f"deleted there: {name} (of the publication before)")
    for note in done.notes:
        print(note)
    if args.dry_run:
        print(
            f"\n--- README.md ---\n{done.card}\n--- end of README.md ---\n\nNothing was sent. Leave out --dry_run to publish."
        )
        return 0
    at = f" --revision {args.revision}" if args.revision else ""
    print(f"\n{done.url}\ncommit {done.commit}\nverify it: hfbd verify {done.repo_id}{at}")
    return 0


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {word!r}")
    return word.lower() == "true"


def _listing(files: dict[str, int]) -> str:
    width = max(map(len, files))
    return "\n".join(f"  {name:{width}}  {_size(size):>9}" for name, size in files.items())


def _size(count: int) -> str:
    """
    >>> [_size(n) for n in (7, 91_000_000)]
    ['7 B', '91.0 MB']
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
