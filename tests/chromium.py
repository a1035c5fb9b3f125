"""A real headless Chromium, driven through the DevTools protocol over a pair of pipes: no driver and no open port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 120.0  # what only a hang reaches


def find_chromium() -> str | None:
    """The program, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one tab. Events are kept as they come, so that a test can ask what a page did."""

    def __init__(self, program: str, profile: Path) -> None:
        """Start it with a profile of its own in the new directory `profile`."""
        browser_reads, self._to_browser = os.pipe()
        self._from_browser, browser_writes = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        options += [
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # The protocol's pipes are file descriptors 3 and 4.
        redirect = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", program, *options, "about:blank"],
            pass_fds=(browser_reads, browser_writes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        self._received = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, page: Path, *, width: int, dark: bool) -> None:
        """Load a file at a width in CSS pixels, in the light or dark scheme, and forget earlier events."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", media="screen", features=scheme)
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression comes to in the page; a promise is waited for."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def requests(self) -> list[str]:
        """The addresses that the page asked for since it was opened."""
        return [event["params"]["request"]["url"] for event in self.events_of("Network.requestWillBeSent")]

    def complaints(self) -> list[Mapping[str, Any]]:
        """Errors and warnings of the console and the log, and exceptions nobody caught."""
        errors = [event["params"] for event in self.events_of("Runtime.exceptionThrown")]
        for event in self.events_of("Runtime.consoleAPICalled"):
            errors += [event["params"]] if event["params"]["type"] in ("error", "warning", "assert") else []
        errors += [event["params"]["entry"] for event in self.events_of("Log.entryAdded")]
        return errors

    def events_of(self, method: str) -> list[dict[str, Any]]:
        """The events of one kind since the page was opened."""
        return [event for event in self.events if event["method"] == method]

    def screenshot(self, to: Path) -> None:
        """Write a PNG of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self.send("Browser.close")
        self._process.wait(timeout=TIMEOUT_S)
        os.close(self._to_browser)
        os.close(self._from_browser)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            chunk = os.read(self._from_browser, 1 << 16)
            assert chunk, "the browser ended"
            self._received += chunk
        message, self._received = self._received.split(b"\0", 1)
        decoded: dict[str, Any] = json.loads(message)
        if "method" in decoded:
            self.events.append(decoded)
        return decoded
