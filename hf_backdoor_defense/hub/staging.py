"""From a run's folder to what its repository will hold, byte for byte, before anything is asked of the Hub.

    RUN/MODEL/*  (safetensors, text)  ┐
    RUN/results.json, report.html, *.png ├─>  files of the repository, and checksums.json over all of them
    card, publication.json, .eval_results ┘

The same run and options give the same bytes. Nothing of the run is changed: weights stay where they are, and are read once, by
the check of the run's seal; everything else is read into memory here, so that what is sent is what was checked.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_backdoor_defense.filters import FILTER_FILE
from hf_backdoor_defense.hub.bases import ON_HUB, base_on_hub, is_hub_id
from hf_backdoor_defense.hub.card import eval_files, render_card
from hf_backdoor_defense.hub.evidence import PUBLICATION, Evidence, Publication, read_evidence
from hf_backdoor_defense.hub.files import CARD, REPORT, Publishable, check_contents, publishable, refused_names
from hf_backdoor_defense.hub.licenses import check_license, inherited_license
from hf_backdoor_defense.models import BACKDOOR_FILE
from hf_backdoor_defense.reporting.results import _json
from hf_backdoor_defense.reporting.sealed import (
    CHECKSUMS,
    RESULTS,
    SCHEMA,
    check_sealed,
    read_checksums,
)

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What a repository will hold.

    Args:
        files: by path in the repository: a local file, or bytes.
        checksums: of each but `checksums.json`: `sha256` and `bytes`.
        left_out: what of the model's folder is not published, and why.
        attacked: the repository must be private.
        notes: what publishing will decide, and a dry run could not.
    """

    evidence: Evidence
    publication: Publication
    card: ModelCard
    files: dict[str, Path | bytes]
    checksums: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    attacked: bool
    notes: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def write(self, folder: str | Path) -> Path:
        """The same content as a local folder, which `hfbd verify` takes too. Raises ValueError: the folder is not empty."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"`{folder}` must be new or empty: nothing there will be touched. Choose another.")
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        return folder


def stage(
    folder: str | Path,
    repo_id: str,
    *,
    arm: str | None = None,
    seed: int | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    language: Sequence[str] | None = None,
    force: bool = False,
    attacked: bool = False,
    dry_run: bool = False,
    api: HfApi | None = None,
) -> Staged:
    """All that would be published of one model of a run; the arguments are `publish`'s.

    The Hub is asked for one thing at most: the license of a base that is there. A dry run does not ask.

    Raises:
        ValueError: whatever must not be published, as `publish` says.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    evidence = read_evidence(folder, arm=arm, seed=seed)
    entry = evidence.entry
    place = folder / entry.path
    if not place.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"`{folder}` names a model outside of it ({entry.path!r}): no run writes that. Run again.")
    is_attacked = entry.role == "attacked" or entry.attacked is not None
    if is_attacked and not attacked:
        raise ValueError(
            f"`{place}` must not be published by mistake: it was attacked on purpose, or its base was ({BACKDOOR_FILE}), and "
            "whoever loads it may get the backdoor. Say --attacked (attacked=True) to publish it into a private repository whose "
            "card says so first."
        )
    reasons = [*evidence.failures, *([f"INERT: {entry.inert}"] if entry.inert else [])]
    if reasons and not force:
        raise ValueError(
            f"`{folder}` must have a report without failures, got: {'; '.join(dict.fromkeys(reasons))}. Others would take the "
            "model for defended. Run again with other settings, or say --force (force=True): then the card says so first."
        )
    found = publishable(place)
    left_out = dict(found.left_out)
    shown = _shown(folder, left_out)
    sealed = _check_seal(folder, place, found, shown)
    check_contents(place, found.files)
    check_contents(folder, shown)
    base = base_model or (base_on_hub(entry.base_model) if entry.base_model else None)
    license_id, notes = _license(license, base_model or entry.base_model, dry_run=dry_run, api=api)
    publication = Publication(
        repo_id=repo_id,
        arm=entry.arm,
        seed=entry.seed,
        license=license_id,
        base_model=base,
        datasets=_datasets(evidence) if datasets is None else list(datasets),
        language=list(language or []),
        forced=bool(reasons),
    )
    card = render_card(evidence, publication)
    files = {name: _read(place / name, sealed) for name in found.files}
    if entry.attacked is not None and BACKDOOR_FILE not in files:  # it may stand above; loaders look beside the weights
        files[BACKDOOR_FILE] = _json({"backdoored": True, **entry.attacked}, indent=2)
    if ADAPTER_FILE in files:
        files[ADAPTER_FILE] = _with_base(place / ADAPTER_FILE, base)
        if FILTER_FILE in files:
            files[FILTER_FILE] = _bound_again(place / FILTER_FILE, base, bytes(files[ADAPTER_FILE]))
    files.update({name: _read(folder / name, sealed) for name in (*shown, RESULTS)})
    files[CARD] = str(card).encode()
    files[PUBLICATION] = _json(publication.to_dict(), indent=2)
    files.update(eval_files(evidence, publication))
    checksums = {
        name: _about(content) if isinstance(content, bytes) else sealed[content]
        for name, content in sorted(files.items())
    }
    files[CHECKSUMS] = _json({"schema": SCHEMA, "files": checksums}, indent=2)
    return Staged(
        evidence=evidence,
        publication=publication,
        card=card,
        files=dict(sorted(files.items())),
        checksums=checksums,
        left_out=left_out,
        attacked=is_attacked,
        notes=notes,
    )


def check_repo_id(repo_id: str) -> None:
    """That `repo_id` names a model on the Hub as ORG/NAME.

    Raises:
        ValueError: anything else.

    >>> check_repo_id("datasets/owner/reviews")
    Traceback (most recent call last):
    ...
    ValueError: The repository must be a model's, ORG/NAME, got 'datasets/owner/reviews': models are not published into \
datasets. Name it without `datasets/`.
    """
    kind = repo_id.partition("/")[0]
    if "://" in repo_id:
        why = "that is an address. Name the last two parts of it"
    elif kind in ("datasets", "spaces", "models", "kernels", "buckets"):
        why = f"models are not published into {kind}" if kind != "models" else "that is part of an address"
        why += f". Name it without `{kind}/`"
    elif repo_id.count("/") != 1:
        why = "the card names it in full. Name your account or organization and the model"
    else:
        try:
            validate_repo_id(repo_id)
            return
        except HFValidationError as error:
            why = f"the Hub takes no other names. {str(error).rstrip('.')}"
    raise ValueError(f"The repository must be a model's, ORG/NAME, got {repo_id!r}: {why}.")


def _datasets(evidence: Evidence) -> list[str]:
    """What the model's own figures were measured on, where that is on the Hub."""
    names = dict.fromkeys(record.dataset for record in evidence.figures.values())
    return [name for name in names if name.count("/") == 1 and is_hub_id(name)]


def _license(given: str | None, base: str, *, dry_run: bool, api: HfApi | None) -> tuple[str, list[str]]:
    if given is not None:
        return check_license(given), []
    if dry_run and base and base not in ON_HUB and is_hub_id(base):
        return "unknown", [
            f"license: shown as unknown; publishing asks the Hub for that of {base}, or takes --license ID"
        ]
    inherited = inherited_license(base, api=api) if base else None
    if inherited is None:
        why = f"the card of `{base}` does not name it" if base else "the run names no base to inherit it from"
        raise ValueError(
            f"The license must be known, and {why}: nobody may use a model without one. Look it up and pass --license ID "
            "(license=), for example apache-2.0."
        )
    return inherited, []


def _shown(folder: Path, left_out: dict[str, str]) -> list[str]:
    """Report and plots that the run drew and sealed; others of such a name are added to `left_out`."""
    sealed = read_checksums(folder)
    found = []
    for path in (folder / REPORT, *sorted(folder.glob("*.png"))):
        if not path.is_file():
            continue
        if path.name in sealed and not refused_names([path.name]):
            found.append(path.name)
        else:
            again = ": hfbd report makes it anew" if path.name == REPORT else ""
            left_out[path.name] = f"not drawn by the run, whose checksums do not name it{again}"
    return found


def _check_seal(folder: Path, place: Path, found: Publishable, shown: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """By local file, what the run's seal says of it: results, what was drawn of them, and this model's files; all unchanged."""
    prefix = "" if place.resolve() == folder.resolve() else place.relative_to(folder).as_posix() + "/"
    sealed = read_checksums(folder)
    own = {name for name in sealed if name.startswith(prefix) and name.removeprefix(prefix) not in found.left_out}
    checked = check_sealed(folder, only={RESULTS, *own, *shown})
    added = [name for name in found.files if prefix + name not in checked]
    if RESULTS not in checked or added:
        raise ValueError(
            f"`{folder}` must be as its run left it, but {CHECKSUMS} does not name {', '.join(added or [RESULTS])}: nothing says "
            "that the figures are this model's. Take what was added away, or run again in another folder."
        )
    return {folder / name: {key: about[key] for key in ("sha256", "bytes")} for name, about in checked.items()}


def _read(path: Path, sealed: Mapping[Path, dict[str, Any]]) -> Path | bytes:
    """The bytes of a file as it was sealed; of weights, which may not fit into memory, the path."""
    if path.suffix == ".safetensors":
        return path
    data = path.read_bytes()
    if _about(data) != sealed[path]:
        raise ValueError(f"`{path}` must stay as it is while it is published, and was changed meanwhile. Push again.")
    return data


def _with_base(path: Path, base: str | None) -> bytes:
    """An adapter's configuration that names the base where others find it, and no folder of this machine."""
    if base is None:
        raise ValueError(
            f"`{path.parent}` holds an adapter, and its base is on no Hub: nobody could load it. Publish the base and pass "
            "--base_model ORG/NAME (base_model=), or merge the adapter and publish the whole model."
        )
    return _json({**json.loads(path.read_bytes()), "base_model_name_or_path": base}, indent=2)


def _bound_again(path: Path, base: str | None, adapter: bytes) -> bytes:
    """A filter's record that names the base where others find it, bound to the adapter's configuration that does so too."""
    record = json.loads(path.read_bytes())
    revision = record.get("base_revision") if record.get("base") == base else None
    files = {**record["files"], ADAPTER_FILE: hashlib.sha256(adapter).hexdigest()}
    return _json({**record, "base": base, "base_revision": revision, "files": files}, indent=2)


def _about(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
