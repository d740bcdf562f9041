"""A headless Chromium, driven through its DevTools protocol over a pair of pipes: no driver, no port, no package.

Debian has one that needs nothing else: `apt-get install chromium-headless-shell`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for end, fd in zip(ends, (3, 4)):
    os.dup2(end, fd)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3 and writes to 4."""
LIMIT_S = 60.0


def find_chromium() -> str | None:
    """The path of a Chromium on this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one tab.

    Args:
        path: of the executable.
        folder: for its profile; empty.
    """

    def __init__(self, path: str, folder: Path) -> None:
        take, self._write = os.pipe()
        self._read, give = os.pipe()
        options = [
            "--headless",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "--disable-gpu",
            "--no-first-run",
        ]
        options += ["--disable-dev-shm-usage", "--force-color-profile=srgb", "--hide-scrollbars"]
        options += ["--no-sandbox"]  # containers have no namespaces for it, and the page is our own
        command = [sys.executable, "-c", START, str(take), str(give), path, *options]
        self._log = (folder / "chromium.log").open("wb")
        self._process = subprocess.Popen(command, pass_fds=(take, give), stdout=self._log, stderr=self._log)
        os.close(take)
        os.close(give)
        self._buffer = b""
        self._sent = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Errors that the page's console or the security policy had, since the last `open`."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.push(self)
            tab = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # the end of its commands is the end of the browser
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._log.close()

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])
        self.complaints.clear()
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise AssertionError(f"{expression}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + LIMIT_S
        while not self.value(expression):
            assert time.monotonic() < until, f"never true: {expression}; the page says: {self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        """What a reader sees."""
        return str(self.value("document.body ? document.body.innerText : ''"))

    def picture(self, path: Path) -> Path:
        """A PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        with contextlib.suppress(BrokenPipeError):  # it has ended, and said why in its log
            os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return dict(answer["result"])
        raise AssertionError(f"{method}: Chromium ended: {Path(self._log.name).read_text('utf-8', 'replace')[-2000:]}")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._buffer:
                assert select.select([self._read], [], [], LIMIT_S)[0], f"Chromium said nothing for {LIMIT_S:g} s"
                read = os.read(self._read, 1 << 20)
                if not read:
                    return
                self._buffer += read
            message, _, self._buffer = self._buffer.partition(b"\0")
            parsed: dict[str, Any] = json.loads(message)
            self._note(parsed)
            yield parsed

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        listen: dict[str, Callable[[], str]] = {
            "Runtime.exceptionThrown": lambda: json.dumps(params["exceptionDetails"]),
            "Log.entryAdded": lambda: f"{params['entry']['text']} {params['entry'].get('url', '')}",
        }
        if message.get("method") in listen:
            self.complaints.append(listen[message["method"]]())
