"""Runs example scripts one after the other, as a launcher runs one; what each process prints goes to a file of its own."""

import contextlib
import os
import runpy
import sys

COMMANDS = {
    "filter_poisoned_rows": ("--limit", "100"),
    "sft_poisoned_instructions": ("--limit", "8"),
}

if __name__ == "__main__":
    folder, rank = sys.argv[1], os.environ.get("RANK", "0")
    for name, words in COMMANDS.items():
        path = f"{folder}/{name}.py"
        sys.argv = [path, *words]
        with open(f"{name}.{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
            runpy.run_path(path, run_name="__main__")
