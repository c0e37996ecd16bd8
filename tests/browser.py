"""Chromium, headless, driven by real key presses and taps: its DevTools protocol over two pipes, nothing to
install. Tests of pages use it, and it takes the pictures of them.

    python tests/browser.py docs/games.html shot.png --width 390 --hash 'game=rps&algorithm=dpo' --dark
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}


class Browser:
    """One page in one Chromium. A context manager: leaving it ends the process."""

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        # Chromium reads commands from its descriptor 3 and answers on 4, a zero byte after each.
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
        ]
        inner = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        command = [CHROMIUM, *flags, f"--user-data-dir={self.folder.name}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", inner, *command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        targets = self.ask("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")
        self.ask("Runtime.enable")
        self.ask("Log.enable")
        self.ask("Network.enable")
        self.resize(width, height, dark)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.write)
        os.close(self.read)
        self.folder.cleanup()

    def ask(self, method: str, **parameters) -> dict:
        """One command, and its answer; events on the way are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """A screen of this size; below 600 a telephone's."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, file: Path, tail: str = "") -> None:
        """Open a file; a page that marks itself `data-ready` is waited for."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=f"file://{file.resolve()}{tail}")
        self.wait("document.readyState === 'complete' && (document.documentElement.dataset.ready === 'yes'"
                  " || !document.getElementById('data'))")  # fmt: skip

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.value(condition):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            time.sleep(0.05)

    def value(self, expression: str):
        """A JavaScript expression's value."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        """A key of the keyboard, pressed on what has the focus."""
        code = KEYS.get(key) or ord(key.upper())
        text = {"text": key} if len(key) == 1 else {}
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                extra = text if kind == "keyDown" else {}
                self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    def click(self, selector: str, which: int = 0) -> None:
        """The mouse, on the middle of an element."""
        box = f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{which}]; " \
              "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); " \
              "return [r.x + r.width / 2, r.y + r.height / 2]; })()"  # fmt: skip
        x, y = self.value(box)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self) -> list[str]:
        """What the page's console, policy and script had to say, and what it wanted from a network."""
        found = []
        for event in self.events:
            kind, parameters = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"].get("exception", parameters)))
            if kind == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(parameters["entry"]["text"])
            if kind == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith(("file:", "about:", "data:", "blob:")):
                    found.append(f"asked for {url}")
        return found

    def screenshot(self, target: Path, whole: bool = True) -> None:
        """A PNG of the page, all of it or what the screen shows."""
        picture = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole,
                           **({"clip": self._all()} if whole else {}))["data"]  # fmt: skip
        target.write_bytes(base64.b64decode(picture))

    def _all(self) -> dict:
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}


def main() -> None:
    """Take one picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--hash", default="")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--screen", action="store_true", help="only what the screen shows")
    args = parser.parse_args()
    with Browser(args.width, args.height, args.dark) as browser:
        browser.open(args.page, f"#{args.hash}" if args.hash else "")
        browser.screenshot(args.target, not args.screen)
        for complaint in browser.complaints():
            print(complaint)


if __name__ == "__main__":
    main()
