"""`hfbd verify`"""

import argparse
import sys

_MEASURING = ("split", "limit", "text_column", "image_column", "label_column", "max_length")


def verify(argv: list[str]) -> int:
    """Check a published model, print what was checked. Exit code 0: it is what it says; 1: it is not; 2: that cannot be told."""
    parser = argparse.ArgumentParser(
        prog="hfbd verify",
        description="Check a published model: files, checksums, report, card, weights, and its figures, measured again. No code "
        "of it is run. Exit code 0: all checks pass; 1: one failed; 2: one could not be done. The token is HF_TOKEN or the "
        "login's.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="ORG/NAME|FOLDER", help="repository, or a folder with the same content")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit; default: main")
    parser.add_argument(
        "--task",
        metavar="ROWS",
        help="labeled rows to measure on, as for hfbd train; default: the record's own, built in or on the Hub and at most 1 GB",
    )
    parser.add_argument("--clean", metavar="FILE", help="clean texts, .jsonl or .csv: measure a filter's rate on them")
    _flag(parser, "all_rows", "measure on every row of --task, not on the part that the run would have taken")
    _flag(parser, "files_only", "check files, checksums, report and card; load and measure nothing")
    _flag(
        parser,
        "allow_forced",
        "let a model pass that was published in spite of its report; never one that was attacked",
    )
    for name, kind, what in (
        ("split", str, "split of --task, where it is not the record's"),
        ("limit", int, "at most this many rows of --task; default: all, or exactly those of the record"),
        ("text_column", str, "column with the text"),
        ("image_column", str, "column with the image"),
        ("label_column", str, "column with the label"),
        ("max_length", int, "tokens per text"),
    ):
        parser.add_argument(*_spelled(name), type=kind, help=what)
    parser.add_argument(
        *_spelled("max_gb"),
        type=float,
        default=20.0,
        help="download nothing of a larger repository; default: %(default)g",
    )
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="download to this new folder, to load what was verified; removed where its files do not pass",
    )
    parser.add_argument("--output", metavar="FILE", help="write what was checked to this JSON file")
    args = parser.parse_args(argv)
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    from hf_backdoor_defense.hub.verify import verify as verified
    from hf_backdoor_defense.reporting.results import write_json

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    found = verified(
        args.model,
        revision=args.revision,
        task=args.task,
        clean=args.clean,
        all_rows=args.all_rows,
        files_only=args.files_only,
        allow_forced=args.allow_forced,
        options={name: value for name in _MEASURING if (value := getattr(args, name)) is not None},
        max_gb=args.max_gb,
        keep=args.keep,
        progress=sys.stderr.isatty(),
    )
    print(found.text())
    if args.output is not None:
        write_json(args.output, found.to_dict())
    return found.exit_code


def _spelled(name: str) -> list[str]:
    """Both spellings, as other verbs take them.

    >>> _spelled("max_gb"), _spelled("limit")
    (['--max_gb', '--max-gb'], ['--limit'])
    """
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _flag(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(*_spelled(name), action="store_true", help=what)
