"""`hfbd scan`"""

import argparse
from pathlib import Path


def scan(argv: list[str]) -> int:
    """Look for outlying rows in a checkpoint's input embedding, reset them in a copy on request. Returns the exit code."""
    from transformers.utils import logging

    from hf_backdoor_defense.reporting.results import write_json
    from hf_backdoor_defense.scan.checkpoint import check_new_folder, reset_checkpoint, scan_checkpoint
    from hf_backdoor_defense.scan.embedding_rows import THRESHOLD

    parser = argparse.ArgumentParser(
        prog="hfbd scan",
        description="Find rows of outlying norm in a checkpoint's input embedding. Exit code 1 says that there are some; 0 "
        "says nothing about other attacks.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id, or offline:minilm; safetensors only")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="|z| above which a row is outlying; default: %(default)g"
    )
    parser.add_argument(
        "--reset", metavar="FOLDER", help="write a copy with the outlying rows reset to this new folder"
    )
    parser.add_argument("--output", metavar="FILE", help="write what was found to this JSON file")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.reset is not None:
        check_new_folder(args.reset)
    found = scan_checkpoint(args.model, threshold=args.threshold)
    for place in filter(None, (args.reset, args.output)):
        if found.folder.resolve() in Path(place).resolve().parents:
            raise ValueError(f"`{place}` lies in the folder of the model, which is left alone. Write it elsewhere.")
    print(found.text())
    written = args.reset is not None and bool(found.scan.rows)
    if written:
        left_out = reset_checkpoint(found, args.reset)
        print(f"\nA copy with these rows reset is in {args.reset}; every other weight is the same to the bit.")
        if left_out:
            more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
            print(f"Not copied (earlier checkpoints, formats that can run code): {', '.join(left_out[:10])}{more}.")
        print("The exit code is 1 all the same: it speaks of the model that was scanned.")
    elif args.reset is not None:
        print("\nThere is nothing to reset: no copy was written.")
    if args.output is not None:
        write_json(args.output, {**found.to_dict(), "reset": args.reset if written else None})
    return 1 if found.scan.rows else 0
