"""A published folder of a real purification in miniature, the rows it was measured on, and ways to spoil copies of it."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_backdoor_defense.experiment.purify_arguments import PurifyArguments
from hf_backdoor_defense.experiment.purify_plan import resolve
from hf_backdoor_defense.experiment.purify_run import execute
from hf_backdoor_defense.experiment.purify_training import build_purifier
from hf_backdoor_defense.hub.card import eval_files, render_card
from hf_backdoor_defense.hub.evidence import Publication, read_evidence
from hf_backdoor_defense.hub.staging import stage
from tests.experiment.tiny import WORDS


@dataclass
class Made:
    """`run`: the run's folder. `folder`: as published. `test`: what it was measured on. `classes`: of words."""

    run: Path
    folder: Path
    test: Path

    def copy(self, to):
        return Path(shutil.copytree(self.folder, to))


def write_texts(path, count, start=0):
    """Rows of three classes, told apart by their words."""
    rows = [
        {"text": f"{WORDS[i % 3][i % 20]} {WORDS[i % 3][i // 20 % 20]} the", "label": i % 3}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def made(classifier, tmp_path_factory):
    place = tmp_path_factory.mktemp("published")
    test = write_texts(place / "test.jsonl", 90, 200)
    arguments = PurifyArguments(
        method="d3", model_name=str(classifier), clean=str(write_texts(place / "clean.jsonl", 120)), test=str(test),
        simulate="badnets", target="1", max_length=8, epochs=2, batch_size=16, output_dir=str(place / "run"),
        disable_tqdm=True,
    )  # fmt: skip
    execute(resolve(arguments, build_purifier("d3")))
    staged = stage(place / "run", "owner/model", license="mit")
    return Made(place / "run", staged.write(place / "folder"), test)


def seal(folder):
    """Write the checksums anew, as whoever edits files on purpose would."""
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != "checksums.json"
    }
    (folder / "checksums.json").write_text(json.dumps({"schema": 1, "files": files}))


def edit(folder, change, *, name="results.json"):
    """Apply `change` to the object in a JSON file."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def forge(folder, change):
    """Edit the results and make card and checksums of them: consistent, and false."""
    edit(folder, change)
    publication = Publication.read(folder)
    evidence = read_evidence(folder, arm=publication.arm, seed=publication.seed)
    (folder / "README.md").write_text(str(render_card(evidence, publication)))
    for name, content in eval_files(evidence, publication).items():
        (folder / name).write_bytes(content)
    seal(folder)
