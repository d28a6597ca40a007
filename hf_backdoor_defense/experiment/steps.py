"""Steps of a run that leave their result in a folder and are never done twice."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_backdoor_defense.reporting.results import write_bytes, write_json

RESULT_NAME = "result.json"
ARRAYS_NAME = "arrays.npz"
Result = tuple[dict[str, Any], dict[str, np.ndarray]]


class Steps:
    """Counts and names the steps of a run while they are done.

    >>> import tempfile
    >>> steps = Steps(1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = steps.kept(Path(folder), "measure", lambda: ({"n": 2}, {"x": np.arange(2)}))
    ...     record, arrays = steps.kept(Path(folder), "measure", lambda: 1 / 0)
    [1/1] measure
    >>> record["n"], arrays["x"]
    (2, array([0, 1]))
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0

    def kept(self, folder: Path, title: str, make: Callable[[], Result]) -> Result:
        """A step's JSON values and arrays: read from `folder` where they are there, else made and written, JSON last."""
        self.number += 1
        if (folder / RESULT_NAME).is_file():
            record = json.loads((folder / RESULT_NAME).read_text())
            with np.load(folder / ARRAYS_NAME, allow_pickle=False) as file:
                return record, dict(file)
        print(f"[{min(self.number, self.total)}/{self.total}] {title}", flush=True)
        record, arrays = make()
        write_arrays(folder / ARRAYS_NAME, arrays)
        write_json(folder / RESULT_NAME, record)
        return record, arrays


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An `.npz`, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def kept_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` where it is not there yet. It appears whole or not at all, also with two processes at it."""
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        make(partial)
        try:
            os.replace(partial, folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
