"""Headless Chromium for tests, over DevTools' pipe (descriptors 3 and 4, JSON ended by NUL): no package needed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-extensions",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--no-proxy-server", "--mute-audio",
)  # fmt: skip


def find_chromium() -> str | None:
    """The program, or None."""
    return os.environ.get("QAP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page, and what it said and asked for.

    Attributes:
        requested: URLs of all its requests.
        complaints: exceptions, console errors, and what the browser logged (a violated policy, a failed request).
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._left, self._last = reading, writing, b"", 0
        self.requested: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> Any:
        """A command to the page."""
        return self._call(method, params, {"sessionId": self._session})

    def _call(self, method: str, params: dict[str, Any], more: dict[str, Any] | None = None) -> Any:
        self._last += 1
        os.write(
            self._writing, json.dumps({"id": self._last, "method": method, "params": params, **(more or {})}).encode()
        )
        os.write(self._writing, b"\0")
        until = time.monotonic() + 60
        while True:
            message = self._next(until - time.monotonic())
            if message.get("id") == self._last:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._reading], [], [], max(0.0, seconds))[0], "the browser does not answer"
            block = os.read(self._reading, 1 << 16)
            assert block, "the browser ended"
            self._left += block
        line, self._left = self._left.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The value as soon as it is true."""
        until = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < until, (script, self.run("document.body.innerText"), self.complaints)
            time.sleep(0.05)
        return found

    def go(self, url: str, width: int = 1280, height: int = 900, *, phone: bool = False, dark: bool = False) -> None:
        """Load a page in a window of this size."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.do("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def press(self, key: str, code: int) -> None:
        """A key, as from the keyboard."""
        for kind in ("rawKeyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def picture(self, path: Path, scale: float = 1) -> None:
        """Save the whole page as PNG."""
        size = self.run("({width: innerWidth, height: document.documentElement.scrollHeight})")
        clip = {"x": 0, "y": 0, **size, "scale": scale}
        shot = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing(program: str) -> Iterator[Tab]:
    """A tab of a browser of its own, with an empty profile."""
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = (to_browser[0], from_browser[1])
    with tempfile.TemporaryDirectory(prefix="qap-browser-", ignore_cleanup_errors=True) as folder:
        words = [program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]

        def to_three_and_four() -> None:
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends]
            for place, end in zip((3, 4), high, strict=True):
                os.dup2(end, place)

        process = subprocess.Popen(
            words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=to_three_and_four,  # noqa: PLW1509 - system calls only
        )
        for end in ends:
            os.close(end)
        try:
            yield Tab(from_browser[0], to_browser[1])
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(to_browser[1])
            os.close(from_browser[0])
