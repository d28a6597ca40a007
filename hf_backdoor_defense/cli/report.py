"""`hfbd report`"""

import argparse
from pathlib import Path


def report(argv: list[str]) -> int:
    """Write the report of one run into its folder, or one report of several; print where it is. Returns the exit code."""
    from hf_backdoor_defense.reporting.html import REPORT_NAME
    from hf_backdoor_defense.reporting.pages import make_report

    parser = argparse.ArgumentParser(
        prog="hfbd report",
        description="Make report.html from what a run left. It opens without network.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a finished run; several of hfbd train are compared"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"where to write; default: {REPORT_NAME} in the folder of the run, for several runs in the current folder",
    )
    args = parser.parse_args(argv)
    output = args.output or (Path(args.runs[0]) / REPORT_NAME if len(args.runs) == 1 else REPORT_NAME)
    print(make_report(args.runs, output))
    return 0
