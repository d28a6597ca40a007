"""The embedding scan on a checkpoint's files, and a copy of the checkpoint with the outlying rows reset.

Weights are read from safetensors, one matrix at a time; no model is built from them, and nothing of the checkpoint is run. Where
the input embedding is stored follows from the configuration: the architecture, built without memory, says what its input
embedding is called, under all its names where it is tied, and a stored tensor is that embedding if its name ends so
(`bert.embeddings.word_embeddings.weight`). Only where a checkpoint uses other names is it loaded, and recognized by its bytes.

A copy differs from its original in the bytes of the reset rows alone, wherever they are stored (tied matrices may be stored
twice): the files are copied and patched in place, so heads, pooler and metadata cannot change. It is written under another
name beside its destination and then renamed: it is there whole or not at all.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_backdoor_defense.models import OFFLINE_MODEL, resolve
from hf_backdoor_defense.scan.embedding_rows import THRESHOLD, RowScan, new_rows, scan_embedding_rows

SILENCE = (
    "Silence is no evidence of cleanliness: only rows scaled out of proportion are seen. Attacks that train them by ordinary "
    "steps (POR, NeuBA without scaling, BadPre) are not found."
)
COPIED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")  # nothing that can run code when it is loaded
SHOWN = 20  # outlying rows in the text; the JSON has all
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")

Place = tuple[Path, str]  # a safetensors file and the name of a tensor in it


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointScan:
    """What `scan_checkpoint` found.

    `name`: as given. `folder`: where the files are. `places`: where the embedding is stored, copies included. `shape`: its
    rows and width. `padding`: its padding row. `tokens`: of the rows in the text and the JSON, where there is a tokenizer.
    """

    name: str
    folder: Path
    places: tuple[Place, ...]
    shape: tuple[int, int]
    scan: RowScan
    padding: int | None
    tokens: dict[int, str] = field(default_factory=dict)

    def text(self) -> str:
        """For people."""
        scan, (rows, width) = self.scan, self.shape
        lines = [
            f"{self.name}: input embedding {self.places[0][1]!r}, {rows:,} rows of {width}",
            f"median norm {scan.median:.4g}, largest norm {scan.max_over_median:.4g} x median, largest |z| "
            f"{abs(float(scan.z[scan.largest])):.4g}: row {self._named(scan.largest)}",
        ]
        if scan.zeros:
            lines.append(f"rows of zeros (padding, never used), not judged: {scan.zeros:,}")
        if not scan.rows:
            lines.append(f"\nNo row is outlying (|z| > {scan.threshold:g}, or not finite).")
        else:
            count = "1 row is" if len(scan.rows) == 1 else f"{len(scan.rows):,} rows are"
            lines.append(f"\n{count} outlying (|z| > {scan.threshold:g}, or not finite):")
            for row in scan.rows[:SHOWN]:
                lines.append(f"  norm {scan.norms[row]:<10.4g} z {scan.z[row]:<10.4g} row {self._named(row)}")
            if len(scan.rows) > SHOWN:
                lines.append(f"  and {len(scan.rows) - SHOWN:,} more (all in the file of --output)")
        return "\n".join([*lines, "", SILENCE])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        scan = self.scan
        return {
            "schema": 1,
            "model": self.name,
            "embedding": sorted({tensor for _, tensor in self.places}),
            "rows": self.shape[0],
            "width": self.shape[1],
            "median": scan.median,
            "scale": scan.scale,
            "threshold": scan.threshold,
            "max_over_median": _finite(scan.max_over_median),
            "zeros": scan.zeros,
            "largest": self._record(scan.largest),
            "outlying": [self._record(row) for row in scan.rows],
            "note": SILENCE,
        }

    def _record(self, row: int) -> dict[str, Any]:
        norm, z = float(self.scan.norms[row]), float(self.scan.z[row])
        return {"row": row, "token": self.tokens.get(row), "norm": _finite(norm), "z": _finite(z)}

    def _named(self, row: int) -> str:
        # What a checkpoint calls things is printed escaped: it may hold commands for the terminal.
        return f"{row} {self.tokens[row]!r}" if row in self.tokens else str(row)


def scan_checkpoint(name: str, *, threshold: float = THRESHOLD) -> CheckpointScan:
    """Scan the input embedding of a checkpoint.

    Args:
        name: folder, Hub id, or "offline:minilm". threshold: as `scan_embedding_rows`.

    Raises:
        ValueError: no such checkpoint, no safetensors, no configuration or one that transformers does not know, no token
            embedding (a vision model, an adapter), an embedding stored twice in two versions, and as `scan_embedding_rows`.

    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1))
    >>> model.wte.weight.data[7] *= 1e8
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(f"{folder}/model")
    ...     found = scan_checkpoint(f"{folder}/model")
    ...     left_out = reset_checkpoint(found, f"{folder}/clean")
    ...     found.scan.rows, scan_checkpoint(f"{folder}/clean").scan.rows
    ((7,), ())
    """
    folder = _fetch(name)
    files = _weight_files(name, folder)
    names, padding = _embedding_names(name, folder)
    found = [(path, key) for path in files for key in _keys(path) if any(f".{key}".endswith(f".{n}") for n in names)]
    weight = _tensor(found[0]) if found else _loaded(name, folder)
    differing = [key for path, key in found if not _same(_tensor((path, key)), weight)]
    if differing:
        raise ValueError(
            f"`{name}` holds its input embedding as {found[0][1]!r} and as {differing[0]!r}, which differ: which of them is "
            "used depends on who loads it. Load the model, look at it, and save it again with save_pretrained()."
        )
    scan = scan_embedding_rows(weight, threshold=threshold)
    # Tied output matrices, and files that are not loaded because others come first, may hold the same matrix again.
    everywhere = [path for path in _inside(folder) if path.suffix == ".safetensors" and _is_copied(path, folder)]
    copies = [(path, key) for path in everywhere for key in _keys(path, like=weight) if (path, key) not in found]
    places = [*found, *(place for place in copies if _same(_tensor(place), weight))]
    if not places:
        raise ValueError(
            f"`{name}` stores its input embedding in a form of its own, which only loading turns into rows. Load the model, "
            "save it with save_pretrained() and scan that folder."
        )
    return CheckpointScan(
        name=name,
        folder=folder,
        places=tuple(places),
        shape=(weight.shape[0], weight.shape[1]),
        scan=scan,
        padding=padding,
        tokens=_tokens(folder, {*scan.rows, scan.largest}),
    )


def reset_checkpoint(found: CheckpointScan, output: str | Path) -> list[str]:
    """Copy the checkpoint to the new folder `output` with the outlying rows reset (`new_rows` says to what).

    Returns:
        The files that were not copied: other formats may run code, and earlier checkpoints may hold the rows that were
        found.

    Raises:
        ValueError: `output` exists and is not an empty folder, or nothing is outlying.

    Example: see `scan_checkpoint`.
    """
    output = check_new_folder(output)
    if not found.scan.rows:
        raise ValueError(f"`{found.name}` has no outlying row: there is nothing to reset. Use it as it is.")
    values = new_rows(_tensor(found.places[0]), found.scan.rows, padding=found.padding)
    inside = _inside(found.folder)
    copied = [path for path in inside if _is_copied(path, found.folder)]
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for path in copied:
            target = partial / path.relative_to(found.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for path, key in found.places:
            _patch(partial / path.relative_to(found.folder), key, values)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [str(path.relative_to(found.folder)) for path in inside if path not in copied]


def check_new_folder(output: str | Path) -> Path:
    """`output` as a path, if a new folder can be made there.

    >>> check_new_folder(".")
    Traceback (most recent call last):
    ...
    ValueError: `.` must be a new or an empty folder, but holds files: nothing is overwritten. Name another.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`{output}` must be a new or an empty folder, but is a file. Name another.")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"`{output}` must be a new or an empty folder, but holds files: nothing is overwritten. Name another."
        )
    return output


def _fetch(name: str) -> Path:
    """The checkpoint's folder; a Hub id is downloaded without anything that can run code."""
    path = Path(resolve(name))
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"`{name}` must be the folder of a model, but is a file. Give the folder it is in.")
    from huggingface_hub import snapshot_download

    try:
        weights = ["model*.safetensors", "*/model*.safetensors"]  # not the same weights again under other names
        return Path(snapshot_download(name, allow_patterns=[*weights, *(f"*{suffix}" for suffix in COPIED[1:])]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{name}` is neither a folder with a model nor reachable on the Hub ({str(error).splitlines()[0]}). Check the "
            f"path, or try the embedded model: hfbd scan {OFFLINE_MODEL}."
        ) from error


def _inside(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _is_copied(path: Path, folder: Path) -> bool:
    """Subfolders belong to the model (`2_Dense` of a sentence encoder), except for a Trainer's earlier checkpoints."""
    earlier = path.relative_to(folder).parts[0].startswith("checkpoint-")
    return not earlier and (path.suffix in COPIED or path.stem == "LICENSE")


def _weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files that loading would read."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            files = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{index}` is no index of weights: {error!r}. Download it again.") from error
        missing = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
        if missing:
            raise ValueError(f"`{name}` lacks files that its index names: {missing}. Download it again.")
        return [folder / file for file in files]
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"`{name}` is an adapter and has no embedding of its own. Scan the base model it belongs to.")
    raise ValueError(
        f"`{name}` has no safetensors weights: other formats can run code while loading and are not read here. Convert it "
        "with a tool you trust, in a sandbox, and save it with save_pretrained()."
    )


def _embedding_names(name: str, folder: Path) -> tuple[list[str], int | None]:
    """What the architecture calls its input embedding, and that embedding's padding row."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None  # the architecture has several, or none
    except Exception as error:  # a stranger's configuration can be wrong in every way, and each has its own exception
        raise ValueError(
            f"`{name}` does not say which model it is, or needs code of its own, which is not run here "
            f"({' '.join(str(error).split())[:200]}). For a tensor of yours: scan.embedding_rows.scan_embedding_rows(weight)."
        ) from error
    if not isinstance(embedding, torch.nn.Embedding):
        raise ValueError(f"`{name}` ({config.model_type}) has no token embedding to scan. Give a language model.")
    parameters = model.named_parameters(remove_duplicate=False)
    return [key for key, value in parameters if value is embedding.weight], embedding.padding_idx


def _loaded(name: str, folder: Path) -> Tensor:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, dtype="auto")
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.get_input_embeddings().weight.detach()


def _keys(path: Path, like: Tensor | None = None) -> list[str]:
    """Names of the tensors in a file, or of those with the shape of `like`."""
    try:
        with safe_open(path, framework="pt") as file:
            return [k for k in file.keys() if like is None or file.get_slice(k).get_shape() == list(like.shape)]
    except SafetensorError as error:
        raise ValueError(f"`{path}` is no whole safetensors file ({error}). Download it again.") from error


def _tensor(place: Place) -> Tensor:
    with safe_open(place[0], framework="pt") as file:
        return file.get_tensor(place[1])


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _patch(path: Path, key: str, values: dict[int, Tensor]) -> None:
    """Overwrite rows of one tensor in a safetensors file: 8 bytes with the header's length, the header in JSON, the data."""
    with open(path, "r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        start = 8 + header + json.loads(file.read(header))[key]["data_offsets"][0]
        for row, value in values.items():
            data = value.contiguous().view(torch.uint8).numpy().tobytes()
            file.seek(start + row * len(data))
            file.write(data)


def _tokens(folder: Path, rows: Iterable[int]) -> dict[int, str]:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return {}  # transformers would make an empty tokenizer, whose tokens are not the model's
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokens = {row: tokenizer.convert_ids_to_tokens(row) for row in rows}
    except (
        Exception
    ):  # a tokenizer that cannot be read, of any kind: the tokens are a courtesy, the rows are what counts
        return {}
    return {row: str(token) for row, token in tokens.items() if token is not None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
