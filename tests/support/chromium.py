"""Headless Chromium driven over its debugging pipe: pages, keys and pictures of them, with nothing to install."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

PATH = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
# Chromium reads commands from descriptor 3 and answers at 4.
_EXEC = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
_KEYS = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""), "ArrowDown": ("ArrowDown", 40, ""),
    "Home": ("Home", 36, ""), "End": ("End", 35, ""), "/": ("Slash", 191, "/"), " ": ("Space", 32, " "),
}  # fmt: skip


class Browser:
    """One process; `page` opens a page of its own. Use as a context."""

    def __init__(self):
        self._number, self._events = 0, []

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chromium_", ignore_cleanup_errors=True))
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Above 4, so that neither is overwritten while they are moved.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        os.close(theirs_in), os.close(theirs_out)
        command = [
            PATH, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", f"--user-data-dir={profile}",
            "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _EXEC, *map(str, theirs), *command], pass_fds=theirs, stderr=subprocess.DEVNULL
        )
        for fd in theirs:
            os.close(fd)
        self._buffer = b""
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.call("Browser.close", timeout=10)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out), os.close(self._in)
        self._stack.close()

    def call(self, method, params=None, session=None, timeout=60):
        """The result of a command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._read(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._events.append(answer)

    def _read(self, until):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def events(self, method):
        """Parameters of the events with this name that came so far."""
        return [event["params"] for event in self._events if event.get("method") == method]

    def page(self, address, width=1280, height=900, dark=False, reduced=True):
        """A new page at `address`, as wide as a phone where that is asked for."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce" if reduced else ""}
        page.call("Emulation.setEmulatedMedia", {"features": [{"name": k, "value": v} for k, v in features.items()]})
        page.go(address)
        return page


class Page:
    """A page: scripts, keys, pictures."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def call(self, method, params=None, timeout=60):
        return self.browser.call(method, params, self.session, timeout)

    def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", metrics)

    def go(self, address):
        self.call("Page.navigate", {"url": address})
        self.wait("document.readyState === 'complete'")

    def eval(self, script):
        """The value of an expression, awaited where it is a promise."""
        params = {"expression": script, "awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", params)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script, timeout=40):
        """Waits until an expression is true, and returns it."""
        until = time.monotonic() + timeout
        while not (value := self.eval(script)):
            if time.monotonic() > until:
                raise AssertionError(f"never true: {script}; the page says {self.eval('document.body.innerText')!r}")
            time.sleep(0.02)
        return value

    def type(self, text):
        """Writes where the focus is."""
        self.call("Input.insertText", {"text": text})

    def press(self, key, shift=False):
        """Presses and releases a key."""
        code, number, text = _KEYS[key]
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", {"type": "keyDown", **({"text": text} if text else {}), **common})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **common})

    def choose(self, selector, *files):
        """Chooses files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", {"nodeId": root, "selector": selector})["nodeId"]
        self.call("DOM.setFileInputFiles", {"nodeId": node, "files": [str(file) for file in files]})

    def picture(self, whole=False):
        """PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})["data"])

    def problems(self):
        """What the console and the network reported as errors, of every page so far."""
        said = [e["entry"]["text"] for e in self.browser.events("Log.entryAdded") if e["entry"]["level"] == "error"]
        thrown = [e["exceptionDetails"]["text"] for e in self.browser.events("Runtime.exceptionThrown")]
        return said + thrown

    def requested(self):
        """Addresses that were asked for, by every page so far."""
        return [e["request"]["url"] for e in self.browser.events("Network.requestWillBeSent")]
