"""A page as a browser without a screen shows it: headless Chromium, spoken to in its own protocol over two pipes.

    with Browser(folder) as browser:
        view = browser.open(page, width=360)      # what it asked for, complained of, and how it lies on the screen

Messages are JSON objects that end with a zero byte (`--remote-debugging-pipe`): no port is opened and no package needed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
SECONDS = 60.0  # an answer that takes longer does not come
_LOOK = """(() => {
  const shown = e => e.checkVisibility() && e.getClientRects().length > 0;
  const said = [...document.querySelectorAll('body *')].filter(
    e => shown(e) && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const size = e => parseFloat(getComputedStyle(e).fontSize);
  const inner = innerWidth, scrolls = e => e.closest('.scroll');
  const name = e => e.tagName.toLowerCase() + ': ' + e.textContent.trim().slice(0, 40);
  return {
    inner, width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    smallest: Math.min(...said.map(size)), small: said.filter(e => size(e) < 12).map(name),
    outside: said.filter(e => !scrolls(e) && e.getBoundingClientRect().right > inner + 0.5).map(name),
    images: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]),
  };
})()"""


@dataclass(frozen=True, kw_only=True)
class View:
    """One look at a page: addresses it asked for, errors it reported, and its measures in CSS pixels.

    `outside`: texts beyond the right edge that no box scrolls to. `images`: natural and shown width of each.
    """

    requests: list[str]
    errors: list[str]
    inner: int
    width: int
    height: int
    smallest: float
    small: list[str]
    outside: list[str]
    images: list[tuple[float, float]]


class Browser:
    """Chromium with a profile in `folder`, which is to be thrown away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._left, self._count = folder, b"", 0

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        theirs, self._write = (_high(end) for end in os.pipe())
        self._read, answers = (_high(end) for end in os.pipe())
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--hide-scrollbars", f"--user-data-dir={self.folder}", "--remote-debugging-pipe"]  # fmt: skip
        self._pid = os.posix_spawn(
            CHROMIUM,
            words,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        os.close(theirs)
        os.close(answers)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)

    def open(
        self, page: Path, *, width: int, height: int = 800, dark: bool = False, picture: Path | None = None
    ) -> View:
        """Load the page in a new tab of that width, wait until it stands, and look at it; `picture`: a PNG of all of it."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", tab)
        size = {"width": width, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", tab, height=height, **size)
        if dark:
            wish = [{"name": "prefers-color-scheme", "value": "dark"}]
            self._call("Emulation.setEmulatedMedia", tab, features=wish)
        self._events: list[dict[str, Any]] = []
        self._call("Page.navigate", tab, url=page.resolve().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")
        found = self._call("Runtime.evaluate", tab, expression=_LOOK, returnByValue=True)["result"]["value"]
        if picture is not None:
            clip = {"x": 0, "y": 0, "width": width, "height": min(found["height"], 16000), "scale": 1}
            shot = self._call("Page.captureScreenshot", tab, clip=clip, captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        self._call("Target.closeTarget", targetId=target)
        events = [(event.get("method"), event.get("params", {})) for event in self._events]
        requests = [said["request"]["url"] for method, said in events if method == "Network.requestWillBeSent"]
        errors = [
            json.dumps(said)
            for method, said in events
            if (method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"))
            or (method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"))
            or method == "Runtime.exceptionThrown"
        ]
        found["images"] = [tuple(image) for image in found["images"]]
        return View(requests=requests, errors=errors, **found)

    def _call(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _until(self, wanted: Any) -> dict[str, Any]:
        """The first message that is wanted; what comes before it is kept as an event."""
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" not in self._left:
                if not select.select([self._read], [], [], max(end - time.monotonic(), 0))[0]:
                    raise TimeoutError(f"Chromium did not answer within {SECONDS:g} seconds")
                data = os.read(self._read, 1 << 16)
                if not data:
                    raise RuntimeError("Chromium ended")
                self._left += data
            line, _, self._left = self._left.partition(b"\0")
            message = json.loads(line)
            getattr(self, "_events", []).append(message)
            if wanted(message):
                return dict(message)


def _high(end: int) -> int:
    """The same pipe at a number above those that Chromium reads from and writes to."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved
