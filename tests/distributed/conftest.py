"""One launch of two processes for all tests here."""

from pathlib import Path

import pytest

from tests.distributed.launch import DONE, launched, parts


@pytest.fixture(scope="session")
def two(request, tmp_path_factory):
    """By part, the folder that two processes left; only the parts of the tests that were chosen were run."""
    folder = tmp_path_factory.mktemp("two")
    chosen = {item.module.__name__.rpartition(".")[2] for item in request.session.items if "two" in item.fixturenames}
    script = str(Path(__file__).with_name("launch.py"))
    done = launched([script, str(folder), *[name for name in parts() if name in chosen]])

    def part(name: str) -> Path:
        place = folder / name
        told = "\n".join(path.read_text() for path in place.glob("failed*"))
        assert all((place / f"{DONE}{rank}").is_file() for rank in range(2)), told or done.stderr[-3000:]
        return place

    return part
