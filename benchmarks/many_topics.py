"""A task with many classes, made on the spot: which package of Python's standard library is a sentence from?

The sentences are those of `data.docstrings`; a package is a class, rows are split by a hash of their text. It is a search's
task and no part of the product: what matters is the number of classes.
"""

import hashlib
import json
import sysconfig
from pathlib import Path

from hf_backdoor_defense.data import docstrings

PACKAGES = (
    "tkinter email asyncio distutils logging importlib xml _pydecimal unittest http turtle typing urllib _pyio multiprocessing "
    "ipaddress doctest inspect difflib threading statistics tarfile configparser pdb pydoc xmlrpc codecs wsgiref shutil bdb"
).split()
PER_CLASS = 100


def write_task(folder: Path) -> Path:
    """Writes train, validation and test (70, 10 and 20 %) as JSON lines, returns the folder; missing packages are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, list[str]] = {split: [] for split in docstrings.SPLITS}
    seen: set[str] = set()
    label = 0
    for package in PACKAGES:
        texts = []
        for _, path in docstrings._sources(root, package):
            for docstring in docstrings._docstrings(path):
                for text in docstrings.sentences(docstring):
                    if text.casefold() not in seen:
                        seen.add(text.casefold())
                        texts.append(text)
        texts = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:PER_CLASS]
        if len(texts) < PER_CLASS // 2:
            continue
        for i, text in enumerate(texts):
            share = i / len(texts)
            split = "train" if share < 0.7 else "validation" if share < 0.8 else "test"
            rows[split].append(json.dumps({"text": text, "label": label}))
        label += 1
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
