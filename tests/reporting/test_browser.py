"""Reports in a real browser: no network, no complaints, nothing cut off, readable on a phone and on a desk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_backdoor_defense.reporting.pages import make_report
from tests.reporting.browser import CHROMIUM, NAMES, Browser, View
from tests.reporting.run_folders import payload, write_run
from tests.reporting.verb_folders import VERBS, write_verb

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is installed")
WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def check(view: View, page: Path, width: int, pictures: int) -> None:
    assert view.errors == []
    assert view.requests[0] == page.as_uri() and all(url.startswith("data:image/") for url in view.requests[1:])
    assert view.width <= view.inner == width and view.outside == []
    assert view.smallest >= 12 and view.small == []
    assert len(view.images) == pictures and all(natural > 0 for natural, _ in view.images)
    # Figures are drawn with letters of 12 CSS pixels: shrunk by more than a fifth they are too small.
    assert all(shown >= 0.8 * natural for natural, shown in view.images)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_full_report_of_a_training_run(browser: Browser, tmp_path: Path, width: int) -> None:
    page = make_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    picture = tmp_path / "report.png"
    check(browser.open(page, width=width, picture=picture), page, width, 13)
    assert picture.read_bytes()[16:20] == width.to_bytes(4, "big")  # what a person looks at is as wide as the screen


@pytest.mark.parametrize("width", WIDTHS)
def test_several_runs_on_one_page(browser: Browser, tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path / f"{i}-{'name' * 9}", payload((i,)), rows=[]) for i in range(2)]
    page = make_report(runs, tmp_path / "report.html")
    check(browser.open(page, width=width, dark=True), page, width, 26)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("verb", "pictures"), zip(VERBS, (2, 0, 4, 0, 6), strict=True))
def test_the_report_of_every_other_verb(browser: Browser, tmp_path: Path, verb: str, pictures: int, width: int) -> None:
    page = make_report([write_verb(tmp_path / "run", verb)], tmp_path / "report.html")
    check(browser.open(page, width=width), page, width, pictures)


def test_the_browser_notices_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!DOCTYPE html><title>x</title><body style='width: 900px'><p style='font-size: 9px'>tiny</p>"
        "<img src='https://nobody.invalid/x.png'><script>console.error('no'); undefined.x</script>"
    )
    view = browser.open(page, width=360)
    assert len(view.errors) >= 2 and "https://nobody.invalid/x.png" in view.requests
    assert view.width > 360 and view.small == ["p: tiny"] and view.images == [(0, view.images[0][1])]
