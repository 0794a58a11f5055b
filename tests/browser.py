"""Drives a headless Chromium over its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Page:
    """A page of a running browser. `evaluate` runs JavaScript in it and gives the value."""

    def __init__(self, write: int, read: int):
        self.write, self.read, self.number, self.session, self.rest = write, read, 0, None, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def load(self, url: str) -> None:
        """Goes there, and waits until everything is loaded."""
        self.call("Page.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        document = self.call("Page.navigate", url=url)["loaderId"]

        def loaded(event: dict[str, Any]) -> bool:
            about = event.get("params", {})
            return about.get("loaderId") == document and about.get("name") == "load"

        while not any(map(loaded, self.events)):
            self.events.append(self._message())

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.read, 1 << 16)
            assert part, "the browser has gone"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def evaluate(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")


@contextlib.contextmanager
def open_page(url: str, profile: Path, size: tuple[int, int] = (1280, 900)) -> Iterator[Page]:
    """A page at `url`, loaded; the test is skipped where there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here (.ci/run installs it)")
    to_browser, from_browser = os.pipe(), os.pipe()
    # The browser reads on descriptor 3 and writes on 4.
    wiring = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    command = ["bash", "-c", wiring, "bash", str(to_browser[0]), str(from_browser[1]), browser, "--headless"]
    command += ["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    command += [f"--window-size={size[0]},{size[1]}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        page = Page(to_browser[1], from_browser[0])
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page.load(url)
        yield page
        page.session = None
        page.call("Browser.close")
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
