"""`checksums.json`: which bytes belong together, so that edited numbers and exchanged weights are noticed.

    {"schema": 1, "files": {"results.json": {"sha256": "…", "bytes": 1234}, "model/model.safetensors": …}}

Paths are relative to the folder of the file, with `/`. A run's covers its `results.json`, all files of its models, and the report
and plots that it drew of the results; a published folder's covers every file but itself. It tells accidents and edits; who edits
both files on purpose is not stopped by it: only measuring again is (`hfbd verify`).
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_backdoor_defense.reporting.results import Record, _json, write_bytes, write_json

CHECKSUMS, RESULTS, REPORT = "checksums.json", "results.json", "report.html"
_BESIDE = (CHECKSUMS, RESULTS, "README.md", REPORT)
SCHEMA = 1


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_results(folder: str | Path, payload: Mapping[str, Any]) -> Path:
    """Write `results.json`, and before it the checksums of it and of the models that it names under `models`.

    Each file appears whole or not at all; a folder with results has their checksums.

    Args:
        payload: what `write_json` takes. `models`: entries (`ModelEntry.to_dict`), whose folders are there.

    Raises:
        ValueError: the payload is not JSON, or names a model whose folder is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_results(folder, {"schema": 1, "records": [], "models": []})
        ...     list(check_sealed(folder))
        ['results.json']
    """
    folder, payload = Path(folder), with_local_places(payload)
    data = _json(payload, indent=2)
    files = {RESULTS: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    for entry in payload.get("models", []):
        place = folder / entry["path"]
        if not place.is_dir():
            raise ValueError(f"`{place}` must hold the model that the results name, and is no folder. Run again.")
        files.update(_listed(folder, _own_files(place)))
    write_json(folder / CHECKSUMS, {"schema": SCHEMA, "files": files})
    return write_bytes(folder / RESULTS, data)


def seal_more(folder: str | Path, names: Iterable[str]) -> Path:
    """Add files of a run's own to its checksums, or bring them up to date: what was drawn of the results after they were written.

    Args:
        names: relative to `folder`.

    Raises:
        ValueError: no checksums. OSError: no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_results(folder, {"schema": 1, "records": [], "models": []})
        ...     _ = Path(folder, "plot.png").write_bytes(b"")
        ...     _ = seal_more(folder, ["plot.png"])
        ...     list(check_sealed(folder))
        ['results.json', 'plot.png']
    """
    folder = Path(folder)
    files = read_checksums(folder) | _listed(folder, [folder / name for name in names])
    return write_json(folder / CHECKSUMS, {"schema": SCHEMA, "files": files})


def seal_report(folder: str | Path, page: Path) -> Path:
    """`page`, sealed where it is the report of the run in `folder` and that run is sealed. Raises ValueError, OSError."""
    folder = Path(folder)
    if page.resolve() == (folder / REPORT).resolve() and (folder / CHECKSUMS).is_file():
        seal_more(folder, [REPORT])
    return page


def with_local_places(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The payload with `./` before each model and data set in it that is a relative path here: elsewhere, and later, `a/b` would
    be taken for a name on the Hub.

    >>> with_local_places({"models": [{"base_model": "owner/name"}], "records": []})
    {'models': [{'base_model': 'owner/name'}], 'records': []}
    """
    models = [
        {
            **entry,
            **{key: local_place(entry[key]) for key in ("base_model",) if key in entry},
            **(
                {"measurement": {**entry["measurement"], "task": local_place(entry["measurement"]["task"])}}
                if entry.get("measurement", {}).get("task")
                else {}
            ),
        }
        for entry in payload.get("models", [])
    ]
    records = [
        replace(record, dataset=local_place(record.dataset), model=local_place(record.model))
        if isinstance(record, Record)
        else record
        for record in payload.get("records", [])
    ]
    return {**payload, **{key: value for key, value in (("models", models), ("records", records)) if key in payload}}


def local_place(name: str) -> str:
    """`./name` where that is a relative path that is there, else `name`.

    >>> local_place("owner/name"), local_place("../data"), local_place("")
    ('owner/name', '../data', '')
    """
    if not name or name.startswith((".", "/", "~", "offline:")):
        return name
    try:
        return f"./{name}" if Path(name).exists() else name
    except (OSError, ValueError):  # no name that a file can have
        return name


def check_sealed(folder: str | Path, *, only: Container[str] | None = None) -> dict[str, dict[str, Any]]:
    """The files that the folder's checksums name, when all are there and unchanged.

    Args:
        only: of these paths; None for all. A run may hold the weights of many models.

    Returns:
        by path: `sha256` and `bytes`.

    Raises:
        ValueError: no checksums, or files that are missing or differ, all of them named.
    """
    folder = Path(folder)
    files = {name: about for name, about in read_checksums(folder).items() if only is None or name in only}
    wrong = []
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} (missing)")
        elif path.stat().st_size != about["bytes"] or file_sha256(path) != about["sha256"]:
            wrong.append(f"{name} (changed)")
    if wrong:
        raise ValueError(
            f"`{folder}` must be as it was written, but differs from its {CHECKSUMS}: {', '.join(wrong)}. Figures and weights "
            "belong together only as a run wrote them. Restore the files, or run again in another folder."
        )
    return files


def read_checksums(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder's checksums, unchecked. Raises ValueError where there are none, or not ours."""
    path = Path(folder) / CHECKSUMS
    if not path.is_file():
        raise ValueError(
            f"`{folder}` must hold {CHECKSUMS}, and does not: nothing says that its figures and weights belong together. An "
            "earlier version of this package wrote none; run again in another folder."
        )
    try:
        payload = json.loads(path.read_bytes())
        if payload["schema"] != SCHEMA:
            raise ValueError(f"schema {payload['schema']!r}")
        for name, about in payload["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(about["bytes"], int):
                raise ValueError(f"entry {name!r}")
            if not isinstance(about["sha256"], str) or len(about["sha256"]) != 64:
                raise ValueError(f"entry {name!r}")
        return dict(payload["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{path}` must be what this package writes, got something else ({error}). Restore it, or run again."
        ) from error


def _own_files(folder: Path) -> list[Path]:
    """All files of a model's folder but what a run keeps beside it: results and checksums (a Trainer's output folder is both),
    checkpoints, and what is made from the results."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    own = []
    for path in found:
        parts = path.relative_to(folder).parts
        if path.name not in _BESIDE and not parts[0].startswith((".", "checkpoint-", "runs")):
            own.append(path)
    return own


def _listed(root: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    # Links are not followed to a name of their own: whether they may be published is judged when they would be.
    return {
        path.relative_to(root).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in paths
    }
