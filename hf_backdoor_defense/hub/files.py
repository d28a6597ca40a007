"""What a published model may hold, decided by name before anything is read, and by content afterwards.

| file | in a run's model folder | in a repository |
|---|---|---|
| weights in safetensors, configurations, tokenizers, processors, ours | published | read |
| what a Trainer leaves beside them, hidden files, others' cards, anything unknown | left out, and named | refused |
| weights in formats that can run code when loaded (pickle and its kin) | refused | refused |
| code, libraries, archives | refused | refused |
| links that leave the folder | refused | refused |

An allow-list: what no rule knows is never uploaded and never downloaded. One table serves both directions, so that `hfbd verify`
accepts what `hfbd push` publishes.
"""

import json
import pickletools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hf_backdoor_defense.filters import FILTER_FILE

CARD, REPORT = "README.md", "report.html"

_MODEL = re.compile(
    r"""
      (model|adapter_model)[\w.-]*\.safetensors | (model|adapter_model)[\w.-]*\.safetensors\.index\.json
    | (defense|psim|rap)\.safetensors
    | (config|generation_config|adapter_config)\.json
    | (tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|normalizer|chat_template)\.json
    | (preprocessor|processor|image_processor|video_preprocessor)_?(config)?\.json
    | (vocab|merges|vocab\.bpe|bpe)\.(txt|codes|bpe) | [\w.-]+\.(model|spm) | chat_template\.jinja
    | additional_chat_templates/[\w.-]+\.jinja
    | (defense|formatter|filter|training|backdoored|warm_up|purification)\.json
    | (LICENSE|NOTICE)(\.txt|\.md)?
    """,
    re.X,
)
_EVIDENCE = re.compile(
    r"""
      README\.md | (results|publication|checksums)\.json | report\.html | [\w.-]+\.png
    | \.eval_results/[\w.-]+\.yaml
    """,
    re.X,
)
_OF_THE_HUB = {".gitattributes"}
_LEFT_BY_A_TRAINER = re.compile(
    r"training_args\.bin | optimizer(_\d+)?\.(pt|bin) | scheduler\.pt | scaler\.pt | rng_state(_\d+)?\.pth | trainer_state\.json"
    r"| (all|train|eval|test|predict)_results\.json | .*\.log | events\.out\..*",
    re.X,
)
_LEFT_FOLDERS = re.compile(r"checkpoint-\d+|runs|logs?|wandb|__pycache__")
_CAN_RUN_CODE = (
    ".bin .pt .pth .ckpt .pkl .pickle .joblib .dill .h5 .hdf5 .keras .msgpack .npy .npz .pb .pt2 .ptl .nemo .mar .th .t7 .onnx"
).split()
_CODE = ".py .pyc .pyd .so .dll .dylib .exe .sh .bat .ps1 .js .ipynb .jar .whl .zip .tar .gz .tgz .bz2 .xz .7z .rar .egg".split()
_BEGINNINGS = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\x89HDF": "HDF5",
    b"\x1f\x8b": "a gzip archive",
    b"\x93NUMPY": "a NumPy array, which may hold objects",
}
_KERNELS = r"_?(attn|attention|experts|moe)_implementation\w*|kernel_config|hub_kernel\w*"
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Publishable:
    """What `publishable` found in a model's folder: `files` to publish, and `left_out` with why; relative, with `/`."""

    files: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def refused_names(paths: Iterable[str]) -> dict[str, str]:
    """The paths of a repository, or of a published folder, that must not be there, with why. Nothing is read.

    >>> refused_names(["model.safetensors", "config.json", ".gitattributes", "pytorch_model.bin", "../model.safetensors"])
    {'pytorch_model.bin': 'can run code when it is loaded', '../model.safetensors': 'leaves the folder'}
    """
    found = {}
    for path in paths:
        reason = _dangerous(path)
        if reason is None and not (path in _OF_THE_HUB or _MODEL.fullmatch(path) or _EVIDENCE.fullmatch(path)):
            reason = "not known as a file of a model"
        if reason is not None:
            found[path] = reason
    return found


def publishable(folder: str | Path) -> Publishable:
    """What of a run's model folder is published. Names and links are judged here, contents by `check_contents`.

    Raises:
        ValueError: no folder, no weights in safetensors, weights that can run code, code, links that leave the folder; all named.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("model.safetensors", "config.json", "training_args.bin", "notes.docx"):
        ...         pathlib.Path(folder, name).touch()
        ...     publishable(folder)
        Publishable(files=['config.json', 'model.safetensors'], left_out={'notes.docx': 'not known as a file of a model', \
'training_args.bin': 'left by a Trainer'})
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` must be the folder of a model, and is no folder. Run again, or name another run.")
    files: list[str] = []
    left_out: dict[str, str] = {}
    refused: dict[str, str] = {}
    for path in _listed(folder):
        name = path.relative_to(folder).as_posix()
        dangerous = _dangerous(name)
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            refused[name] = "a link that leaves the folder"
        elif _left_by_a_trainer(name):
            left_out[name] = "left by a Trainer"
        elif dangerous is not None:
            refused[name] = dangerous
        elif name == CARD:
            left_out[name] = "our card takes its place"
        elif _MODEL.fullmatch(name):
            files.append(name)
        elif not _EVIDENCE.fullmatch(name):  # of a run whose model lies in its own folder; added with the evidence
            hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
            left_out[name] = "hidden" if hidden else "not known as a file of a model"
    _raise_refused(folder, refused)
    weights = [name for name in files if name.endswith(".safetensors") and name.startswith(("model", "adapter_model"))]
    if not weights and FILTER_FILE not in files:  # a filter may be a rule without weights
        raise ValueError(
            f"`{folder}` must hold weights in safetensors, got {', '.join(files) or 'no file of a model'}: nothing else is "
            "published. Save the model with save_pretrained()."
        )
    return Publishable(files=files, left_out=left_out)


def check_contents(folder: str | Path, names: Iterable[str]) -> None:
    """That files are what their names say, read without running anything; a link must not leave the folder.

    Raises:
        ValueError: a file that begins like a pickle, an archive or a program, safetensors without their header, JSON
            or text that is none, a configuration that names code, an index that names shards which are not there; all named.
    """
    folder, names = Path(folder), list(names)
    wrong: dict[str, str] = {}
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            wrong[name] = "a link that leaves the folder"
        elif not path.is_file():
            wrong[name] = "missing"
        elif (reason := _wrong_content(path, set(names))) is not None:
            wrong[name] = reason
    _raise_refused(folder, wrong)


def check_folder(folder: str | Path) -> list[str]:
    """The files of a published folder, all of them allowed by name and by content; the cache of a download is passed over.

    Raises:
        ValueError: anything else in it, all of it named.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in _listed(folder)]
    names = [
        name for name in names if not name.startswith(".cache/huggingface/")
    ]  # of `snapshot_download(local_dir=…)`
    _raise_refused(folder, refused_names(names))
    check_contents(folder, names)
    return names


def _listed(folder: Path) -> list[Path]:
    """Files and links, sorted; links to folders are listed and never entered."""
    found: list[Path] = []
    left = [folder]
    while left:
        for path in left.pop().iterdir():
            (left if path.is_dir() and not path.is_symlink() else found).append(path)
    return sorted(found)


def _left_by_a_trainer(name: str) -> bool:
    *folders, last = PurePosixPath(name).parts
    return bool(_LEFT_BY_A_TRAINER.fullmatch(last)) or any(_LEFT_FOLDERS.fullmatch(part) for part in folders)


def _dangerous(name: str) -> str | None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name or name != name.strip():
        return "leaves the folder" if ".." in pure.parts or pure.is_absolute() else "no plain name"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "no plain name"
    suffix = pure.suffix.lower()
    if suffix in _CAN_RUN_CODE or ".bin.index" in name.lower():
        return "can run code when it is loaded"
    return "code or an archive" if suffix in _CODE else None


def _wrong_content(path: Path, names: set[str]) -> str | None:
    with open(path, "rb") as file:
        start = file.read(8)
    for beginning, what in _BEGINNINGS.items():
        # A header of safetensors begins with its length, which may be any number.
        if start.startswith(beginning) and path.suffix != ".safetensors":
            return f"begins like {what}"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            return f"no safetensors ({error})"
        return None
    if path.suffix == ".png":
        return None if start == _PNG else "no PNG"
    data = path.read_bytes()
    if _runs_as_pickle(data):
        return "a pickle in plain letters, which runs code when it is loaded"
    if path.suffix in (".model", ".spm"):  # SentencePiece: protocol buffers, read by a parser that runs nothing
        return None
    try:
        text = data.decode("utf-8")
        return _names_code(path.name, json.loads(text), names) if path.suffix == ".json" else None
    except UnicodeDecodeError:
        return "no text"
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"


def _runs_as_pickle(data: bytes) -> bool:
    """Whether a loader of pickles, handed these bytes, would call something: the old protocols are plain letters without a mark
    at their beginning. The commands are listed, and none is followed.

    >>> _runs_as_pickle(b"cbuiltins\\nprint\\n(S'x'\\ntR."), _runs_as_pickle(b"cat\\ndog\\n(\\n")
    (True, False)
    """
    seen: set[str] = set()
    try:
        for command, _, _ in pickletools.genops(data):
            seen.add(command.name)
            arguments = {"TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"} & seen
            if command.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX") and arguments and "GLOBAL" in seen:
                return True
            if command.name in ("INST", "OBJ") and "MARK" in seen:
                return True
    except (ValueError, UnicodeError, OverflowError):  # no command any more: a loader stops here as well
        pass
    return False


def _names_code(name: str, values: Any, names: set[str]) -> str | None:
    """What in a JSON file would have code run or imported, or reads files that are not there."""
    if name.endswith(".index.json"):
        shards = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(shards, dict):
            return "no index of shards"
        missing = sorted({str(shard) for shard in shards.values()} - {PurePosixPath(n).name for n in names})
        return f"names shards that are not there: {', '.join(missing)}" if missing else None
    if not isinstance(values, dict):
        return None
    if name.endswith(("config.json", "processor.json")) and (found := _named_code(values)) is not None:
        return found
    mapping = values.get("auto_mapping") if name == "adapter_config.json" else None
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if library is not None and str(library).partition(".")[0] != "transformers":
        return f"`auto_mapping` imports {library!r}"
    return None


def _named_code(values: Any) -> str | None:
    """The first key, at any depth, that makes transformers import code, or load a kernel from the Hub.

    >>> _named_code({"text_config": [{"attn_implementation": {"": "owner/kernel"}}]})
    "`attn_implementation` names a kernel, 'owner/kernel', which is code from the Hub"
    >>> _named_code({"attn_implementation": "sdpa", "auto_map": {}})
    """
    if isinstance(values, list):
        return next((found for value in values if (found := _named_code(value)) is not None), None)
    if not isinstance(values, dict):
        return None
    for key, value in values.items():
        if key in ("auto_map", "custom_pipelines") and value:
            return f"`{key}` names code of its own"
        if re.fullmatch(_KERNELS, key) and (kernel := next((t for t in _texts(value) if "/" in t), None)) is not None:
            return f"`{key}` names a kernel, {kernel!r}, which is code from the Hub"
    return _named_code(list(values.values()))


def _texts(values: Any) -> list[str]:
    if isinstance(values, dict | list):
        return [text for value in (values.values() if isinstance(values, dict) else values) for text in _texts(value)]
    return [values] if isinstance(values, str) else []


def _raise_refused(folder: Path, refused: dict[str, str]) -> None:
    if not refused:
        return
    named = ", ".join(f"{name!r} ({reason})" for name, reason in sorted(refused.items()))
    raise ValueError(
        f"`{folder}` must hold only safetensors and known text files, got {named}: whoever loads such a file may run "
        "what is in it. Save the weights with save_pretrained(), take the files away, and run again."
    )
