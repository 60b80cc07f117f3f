"""A headless Chromium, driven through the pipe of its DevTools; needs nothing but the browser itself."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def find() -> str | None:
    """The browser, if this machine has one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page."""

    def __init__(self, source: int, sink: int):
        self._source, self._sink = source, sink
        self._held = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools command; what the page reports meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._sink, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = os.read(self._source, 1 << 16)
            assert part, "the browser has ended"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of a piece of JavaScript."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a piece of JavaScript is true."""
        deadline = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < deadline, f"not so after {seconds} s: {condition}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Save what the page looks like."""
        path.write_bytes(b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    @property
    def errors(self) -> list[str]:
        """What the page complained of."""
        complaints = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in complaints]

    @property
    def addresses(self) -> list[str]:
        """Everything that was asked for over the network."""
        asked = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in asked]


@contextlib.contextmanager
def browsing(browser: str, profile: Path) -> Iterator[Page]:
    """A browser while the block runs."""
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    flags = [*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,800"]
    # The browser reads from descriptor 3 and writes to 4.
    command = f'exec "$@" 3<&{to_browser} 4>&{to_us}'
    with subprocess.Popen(
        ["bash", "-c", command, "bash", browser, *flags],
        pass_fds=(to_browser, to_us),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(to_browser)
        os.close(to_us)
        try:
            yield Page(from_browser, from_us)
        finally:
            process.terminate()
            process.wait(20)
            os.close(from_us)
            os.close(from_browser)
