"""A defense does not change with the number of processes: losses, gradients, weights, rows, neurons and scores."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed import worlds
from tests.trainers.text_toys import saved_whole

CLOSE = 1e-5  # of the largest value
NAMES = list(worlds.cases(Path()))


def before(folder: Path) -> None:
    """For each process its own model to start from."""
    saved_whole(worlds.source(folder))


def both(folder: Path) -> None:
    """On each of two processes."""
    assert worlds.run(folder, "two") == 2
    worlds.broken(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    before(folder)
    assert worlds.run(folder, "whole") == worlds.run(folder, "accumulated") == 1
    return folder


@pytest.fixture(params=["accumulated", "two"])
def other(request, one, two):
    """A layout of one process, and of two."""
    return (one if request.param == "accumulated" else two("test_worlds")) / request.param


def difference(one, two) -> float:
    """The largest, as a share of the largest value."""
    assert one.shape == two.shape
    return float((one - two).abs().max() / one.abs().max())


def of_weights(one, two) -> float:
    assert one.keys() == two.keys()
    largest = max(w.float().abs().max() for w in one.values())
    return float(max((one[k].float() - two[k].float()).abs().max() for k in one) / largest)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_trains_the_same_model(one, other, name):
    here, there = worlds.read(one / "whole" / name), worlds.read(other / name)
    assert len(here["gradients"]) >= 20
    # Every row in every epoch once, whatever was repeated to fill the last batch.
    assert torch.equal(here["losses"][:, :2], there["losses"][:, :2])
    assert difference(here["losses"][:, 2], there["losses"][:, 2]) <= CLOSE
    assert difference(here["gradients"], there["gradients"]) <= CLOSE
    assert of_weights(here["weights"], there["weights"]) <= CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_finds_the_same(one, other, name):
    here = worlds.read(one / "whole" / name)["found"]
    for rank in range(2 if other.name == "two" else 1):
        there = worlds.read(other / name, rank)["found"]
        for mine, theirs in zip(here, there, strict=True):
            assert mine["activity"] == pytest.approx(theirs["activity"], rel=1e-4, abs=1e-6)
            assert {k: v for k, v in mine.items() if k != "activity"} == {
                k: v for k, v in theirs.items() if k != "activity"
            }


def test_something_was_found(one):
    assert worlds.read(one / "whole" / "dece")["found"][1]["dropped"]
    ulrl = worlds.read(one / "whole" / "ulrl")["found"][0]
    assert ulrl["suspected"] and any(ulrl["flagged"])


@pytest.mark.parametrize("name", ["repeated", "unscaled"])
def test_a_broken_reduction_is_seen(one, two, name):
    here, there = worlds.read(one / "whole" / "undefended"), worlds.read(two("test_worlds") / name)
    assert difference(here["gradients"], there["gradients"]) > 100 * CLOSE
    assert of_weights(here["weights"], there["weights"]) > 100 * CLOSE


def test_gathered_scores_are_those_of_one_process(one, two):
    here = json.loads((one / "whole" / "scores0.json").read_text())
    assert {name: found["n"] for name, found in here.items()}["ca"] == 37 and here["asr"]["n"] > 20
    for rank in range(2):
        assert json.loads((two("test_worlds") / "two" / f"scores{rank}.json").read_text()) == here
