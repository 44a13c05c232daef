"""A headless browser for tests: Chromium over its debugging pipe, without any package. Not collected: pages are opened by the tests."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Chromium reads commands from file descriptor 3 and writes to 4. They are put there in a process of their own: in this one they are taken.
_LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"


def executable() -> str | None:
    """The browser on PATH, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. `problems`: what the console and the network complained about since the last `open`."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self.process, self.commands, self.answers = process, commands, answers
        self.rest = b""
        self.number, self.replies = 0, dict[int, dict[str, Any]]()
        self.session: str | None = None
        self.problems: list[str] = []
        self.events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a page and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        for address in ("about:blank", url):  # an address that differs behind the # only would not load anew
            self.problems, self.events = [], []
            self.call("Page.navigate", url=address)
            self.wait(lambda: "Page.loadEventFired" in self.events)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key, as from a keyboard: the browser does whatever it does with it, in what has the focus."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, " ": 32}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=code)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """A mouse event at a place in the window: mouseMoved, mousePressed or mouseReleased."""
        button = "none" if kind == "mouseMoved" else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=int(kind != "mouseMoved"))

    def picture(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def wait(self, condition: Any, seconds: float = 60.0) -> None:
        """Until something is so; AssertionError if it never is."""
        last = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < last, f"the browser did not get there in {seconds} s"
            self.listen(0.05)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": arguments}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        self.wait(lambda: self.number in self.replies)
        reply = self.replies.pop(self.number)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def listen(self, seconds: float) -> None:
        """Take in what the browser has to say, for so long at most."""
        if not select.select([self.answers], [], [], seconds)[0]:
            assert self.process.poll() is None, f"the browser ended with {self.process.returncode}"
            return
        received = os.read(self.answers, 1 << 20)
        *whole, self.rest = (self.rest + received).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self.replies[message["id"]] = message
            else:
                self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, content = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            details = content["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.problems.append(f"console: {[one.get('value') for one in content['args']]}")
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.problems.append(content["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not content["request"]["url"].startswith(
            ("file:", "about:", "data:", "http://127.0.0.1")
        ):
            self.problems.append(f"a request to {content['request']['url']}")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running browser; its profile goes into an empty folder. Its window is never shown."""
    program = executable()
    assert program is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
    options += ["--disable-component-update", "--disable-background-networking", "--disable-sync"]  # it has no business with the network
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    ends = [high for pair in (os.pipe(), os.pipe()) for high in map(_high, pair)]
    read_commands, write_commands, read_answers, write_answers = ends
    launch = [sys.executable, "-S", "-c", _LAUNCH, str(read_commands), str(write_answers), program, *options]
    process = subprocess.Popen(launch, pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Browser(process, write_commands, read_answers)
    finally:
        os.close(write_commands)  # Chromium ends when its pipe does
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(read_answers)


def _high(end: int) -> int:
    """The same pipe end under a number well above 4."""
    high = fcntl.fcntl(end, fcntl.F_DUPFD, 64)
    os.close(end)
    return high
