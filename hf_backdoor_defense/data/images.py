"""Where images come from: one `load_images` for scikit-learn's digits, an .npz, a folder or a Hub id.

| task | splits |
|---|---|
| `"offline:digits"` | 1,797 real scans of digits, 8 x 8, gray: 1,197 train, 150 validation, 450 test, whatever the seed |
| `"signs.npz"` with `image`, `label` | cut by seed, stratified: 80 % train, 10 % validation, 10 % test |
| `"signs.npz"` with `train_image`, `train_label`, `test_image`, … | its arrays; what is missing is cut from train |
| `"folder"` of `CLASS/*.png` | cut as a file is |
| `"folder"` of `train/CLASS/*.png`, `test/CLASS/*.png`, … | its folders; what is missing is cut from train |
| `"owner/name"`, `"name"`, `"name:config"` | those of the Hub dataset; what is missing is cut from train |

Arrays are uint8 [n, H, W] or [n, H, W, C], C = 1 or 3. A cut from train takes 10 % for validation and 20 % for test.
Digits v in 0..16 become round(255 v / 16). Classes of folders are numbered by name, or by value where all names are
the numbers 0..C-1. Everything else is as in `sources.py`: row ids, hashes, refusals. No code from the Hub is run.
"""

import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from hf_backdoor_defense.data.pixels import pixels, png
from hf_backdoor_defense.data.sources import read_hub, require_column
from hf_backdoor_defense.data.splits import SPLIT_NAMES, Part, check_labels, check_options, hand_out
from hf_backdoor_defense.data.summary import about

OFFLINE_IMAGES = "offline:digits"
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_WAYS_OUT = f"Use a local .npz file, a folder of images by class, or {OFFLINE_IMAGES!r}, which need no network."
_DIGITS_SHARES = {"test": 450 / 1797, "validation": 150 / 1797}


def _rows(images: list[Any], labels: list[Any], names: list[str] | None = None) -> Dataset:
    dataset = Dataset.from_dict({"image": images}, features=Features(image=Image()))
    return dataset.add_column("label", labels, feature=ClassLabel(names=names) if names else None)


@functools.cache
def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    return _rows([png(image) for image in gray], digits.target.tolist(), [str(digit) for digit in range(10)])


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} must be a readable .npz of plain arrays, got {type(error).__name__}: {str(error)[:200]}. "
            "Python objects are not read, for they can run code. Save it with numpy.savez_compressed(image=..., label=...)."
        ) from error


def _check_arrays(where: str, image: np.ndarray, label: np.ndarray) -> None:
    if image.dtype != np.uint8:
        number = " with NaN" if image.dtype.kind == "f" and np.isnan(image).any() else ""
        raise ValueError(
            f"{where} must hold uint8 pixels (0..255), got {image.dtype}{number}: how its values map to pixels is yours to "
            "say. For values in 0..1: numpy.round(255 * image).astype(numpy.uint8)."
        )
    channels_first = image.ndim == 4 and image.shape[1] in (1, 3) and image.shape[3] not in (1, 3)
    if image.ndim not in (3, 4) or (image.ndim == 4 and image.shape[3] not in (1, 3)) or 0 in image.shape:
        remedy = "Use image.transpose(0, 2, 3, 1)." if channels_first else "Drop transparency, or reshape the array."
        raise ValueError(
            f"{where} must have the shape [n, H, W] or [n, H, W, C] with C = 1 or 3 and at least one row, got "
            f"{list(image.shape)}: an image is gray or RGB, channels last. {remedy}"
        )
    if label.shape != image.shape[:1]:
        raise ValueError(
            f"{where} must have one label per image, got {list(label.shape)} for {len(image)} images. Save class ids, [n]."
        )


def _read_npz(path: Path, image_column: str, label_column: str) -> dict[str, Dataset]:
    arrays = _arrays(path)
    keys = {"train": (image_column, label_column)} if image_column in arrays else {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if split not in keys and f"{name}_{image_column}" in arrays:
                keys[split] = (f"{name}_{image_column}", f"{name}_{label_column}")
    missing = sorted({key for pair in keys.values() for key in pair} - set(arrays))
    if "train" not in keys or missing:
        raise ValueError(
            f"{str(path)!r} must hold the arrays {image_column!r} and {label_column!r}, or 'train_{image_column}' and "
            f"'train_{label_column}' (and so on for validation and test), got {sorted(arrays)[:20]}"
            + (f" without {missing}" if missing else "")
            + ". Rename them, or set `image_column` and `label_column`."
        )
    shapes = {}
    for split, (image_key, label_key) in keys.items():
        _check_arrays(f"{image_key!r} of {str(path)!r}", arrays[image_key], arrays[label_key])
        shapes[split] = arrays[image_key].shape[1:]
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the images of {str(path)!r} must have one size, got {shapes}: a model takes one. Resize them, or save a folder."
        )
    return {
        split: _rows([png(image if image.ndim == 3 else image[..., None]) for image in arrays[i]], arrays[k].tolist())
        for split, (i, k) in keys.items()
    }


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The images below each class folder, by class name in the order of their numbers."""
    found = {
        child.name: sorted(p for p in child.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        for child in sorted(folder.iterdir())
        if child.is_dir() and child.name[0] != "."
    }
    if not found or not all(found.values()):
        empty = [name for name, paths in found.items() if not paths][:10]
        raise ValueError(
            f"folder {str(folder)!r} must hold one folder of images per class (CLASS/*.png, .jpg, ...), got "
            + (f"no image in {empty}" if found else f"no folder among {sorted(os.listdir(folder))[:10]}")
            + ": the folder's name is the label. Sort the images into folders by class."
        )
    if sorted(found) == sorted(str(number) for number in range(len(found))):
        found = {str(number): found[str(number)] for number in range(len(found))}
    return found


def _read_folder(folder: Path) -> dict[str, Dataset]:
    kinds = {
        split: [folder / name for name in names if (folder / name).is_dir()] for split, names in SPLIT_NAMES.items()
    }
    if several := [path.name for paths in kinds.values() if len(paths) > 1 for path in paths]:
        raise ValueError(f"folder {str(folder)!r} must hold one folder per split, got {several}. Keep one of them.")
    # a class may be called "test", but only where there are no splits
    splits = {split: paths[0] for split, paths in kinds.items() if paths} if kinds["train"] else {"train": folder}
    by_class = {split: _classes(path) for split, path in splits.items()}
    names = list(by_class["train"])
    found = {}
    for split, paths in by_class.items():
        if unknown := [name for name in paths if name not in names][:10]:
            raise ValueError(
                f"the classes of {str(splits[split])!r} must occur in train, got {unknown} beside {names[:20]}: no model "
                "could predict them. Use splits of the same task."
            )
        files = [(path, names.index(name)) for name in paths for path in paths[name]]
        images = [png(pixels({"path": str(path), "bytes": None}, str(path))) for path, _ in files]
        found[split] = _rows(images, [label for _, label in files], names)
    return found


def _read_columns(dataset: Dataset, where: str, image_column: str, label_column: str) -> Dataset:
    require_column(dataset, where, image_column, option="image_column")
    require_column(dataset, where, label_column, option="label_column")
    feature = dataset.features[image_column]
    if not isinstance(feature, Image):
        raise ValueError(
            f"`image_column` must be a column of images in {where}, got {image_column!r}, which holds {feature}. Set "
            "`image_column`, or cast it: dataset.cast_column(name, datasets.Image())."
        )
    raw = dataset.with_format(None).cast_column(image_column, Image(decode=False))
    images = [png(pixels(cell, f"row {i} of {where}")) for i, cell in enumerate(raw[image_column])]
    rows = Dataset.from_dict({"image": images}, features=Features(image=Image()))
    return rows.add_column("label", raw[label_column][:], feature=raw.features[label_column])


def read_images(
    task: str, *, image_column: str = "image", label_column: str = "label", option: str = "task"
) -> dict[str, Dataset]:
    """The splits that a source has, train always, whole and uncut: `image` (PNG) and `label` as the source gives it.

    Args:
        task: see the module's table. A path that exists wins.
        image_column, label_column: columns of a Hub dataset, or arrays of an .npz.
        option: what the caller's user wrote `task` into, for errors.

    Raises:
        ValueError: no such path or Hub dataset, a broken image (by name), arrays that are not uint8 or have another shape.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.npz")
        ...     np.savez(path, image=np.zeros((4, 8, 8), np.uint8), label=np.array(["b", "a", "b", "a"]))
        ...     read_images(str(path))["train"]["label"][:]
        ['b', 'a', 'b', 'a']
    """
    path = Path(os.path.expanduser(task))
    if task == OFFLINE_IMAGES:
        return {"train": _digits()}
    if task and path.is_dir():
        return _read_folder(path)
    if task and path.is_file():
        if path.suffix.lower() != ".npz":
            raise ValueError(
                f"`{option}` must name an .npz file or a folder of images by class, got {str(path)!r}: no other file is read. "
                "Save the arrays with numpy.savez_compressed(image=..., label=...), or sort images into folders by class."
            )
        return _read_npz(path, image_column, label_column)
    if Path(task).suffix.lower() in SUFFIXES:
        raise ValueError(
            f"`{option}` must name an .npz file, a folder or a Hub id that exists, got {task!r}. {_WAYS_OUT}"
        )
    found = read_hub(task, option=option, offline=OFFLINE_IMAGES, ways_out=_WAYS_OUT)
    return {
        split: _read_columns(dataset, f"{task} ({split})", image_column, label_column)
        for split, dataset in found.items()
    }


def _shares(task: str, found: Mapping[str, Dataset]) -> dict[str, float]:
    """Which shares of train are cut: all of it is there, or it is one heap, or splits are missing."""
    if task == OFFLINE_IMAGES:
        return _DIGITS_SHARES
    path = Path(os.path.expanduser(task))
    heap = len(found) == 1 and path.exists() and not (path / "train").is_dir()
    share = {"test": 0.1 if heap else 0.2, "validation": 0.1}
    return {split: share[split] for split in ("test", "validation") if split not in found}


def load_images(
    task: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    limit: int | None = None,
    seed: int = 0,
    num_labels: int | None = None,
) -> DatasetDict:
    """Load an image classification task and refuse data that no honest result can come from.

    Args:
        task: "offline:digits", an .npz, a folder or a Hub id; see the module's table. A path that exists wins.
        image_column, label_column: columns of a Hub dataset, or arrays of an .npz; labels are classes 0..C-1.
        limit: keep this many training rows, stratified by class, and the same share of validation and test, but of
            those at least 50 rows or what exists.
        seed: decides cuts and `limit`, and nothing else; the cut of "offline:digits" is always the same.
        num_labels: number of classes, if known; default: the largest label + 1.

    Returns:
        Splits train, validation, test with columns image (PNG), label (ClassLabel), row_id (int64, unique over all
        splits: the position in the source).

    Raises:
        ValueError: as `read_images`; labels that are not 0..C-1, a class without training rows, less than two classes.

    Example:
        >>> digits = load_images("offline:digits")
        >>> digits.num_rows, digits["train"][0]["image"].size
        ({'train': 1197, 'validation': 150, 'test': 450}, (8, 8))
    """
    check_options(limit, num_labels)
    found = read_images(task, image_column=image_column, label_column=label_column)
    parts: dict[str, Part] = {}
    first_id = 0
    for split, dataset in found.items():
        where = task if len(found) == 1 else f"{task} ({split})"
        if not len(dataset):
            raise ValueError(f"{where} must hold rows, got none: there is nothing to learn or to measure. Add rows.")
        rows = dataset.cast_column("image", Image(decode=False))[:]
        labels = check_labels(rows["label"], where, label_column, num_labels)
        parts[split] = Part({"image": rows["image"]}, labels, list(range(first_id, first_id + len(dataset))))
        first_id += len(dataset)
    return hand_out(
        parts,
        {"image": Image()},
        source=task,
        names={tuple(f.names) for d in found.values() if isinstance(f := d.features["label"], ClassLabel)},
        shares=_shares(task, found),
        limit=limit,
        seed=seed,
        cut_seed=0 if task == OFFLINE_IMAGES else None,
        num_labels=num_labels,
    )


def describe_images(dataset_dict: DatasetDict) -> dict[str, Any]:
    """What was loaded, for the report of a run: as `summary.describe`, with `shared_images` and a fingerprint over pixels.

    Returns:
        JSON values: `rows`, `class_counts` and `majority_share` per split; `label_names`; `shared_images`, the number of
        different images that are in both train and test; `fingerprint`: equal fingerprints are equal pixels, labels, ids.

    Example:
        >>> facts = describe_images(load_images("offline:digits"))
        >>> facts["class_counts"]["validation"]["0"], facts["shared_images"]
        (15, 0)
    """
    contents = {}
    for split, dataset in dataset_dict.items():
        cells = dataset.with_format(None).cast_column("image", Image(decode=False))["image"]
        arrays = (pixels(cell) for cell in cells)
        contents[split] = [hashlib.sha256(f"{a.shape}".encode() + a.tobytes()).hexdigest() for a in arrays]
    return about(dataset_dict, contents, shared="shared_images")
