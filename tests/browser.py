"""A small WebDriver client: one headless Chromium, driven through chromedriver's HTTP protocol.

https://www.w3.org/TR/webdriver2/
"""

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver's JSON
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing_browser() -> str | None:
    """Why there is no browser to test with, or None."""
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        return "neither chromium nor google-chrome is installed"
    return None if shutil.which("chromedriver") else "chromedriver is not installed"


class Browser:
    """One session with its profile in `folder`. Always `close` it: it owns two processes."""

    def __init__(self, folder: Path):
        # Chromedriver is on this machine: never go through a proxy.
        self.open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "HOME": str(folder)},
        )
        self.session = None
        try:
            self.address = f"http://127.0.0.1:{self.read_port()}/session"
            options = {
                "binary": shutil.which("chromium") or shutil.which("google-chrome"),
                "args": [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"],
            }
            capabilities = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            body = {"capabilities": {"alwaysMatch": capabilities}}
            self.session = self.call("POST", "", body)["sessionId"]
        except BaseException:
            self.close()
            raise

    def read_port(self) -> str:
        for line in self.driver.stdout:
            if match := re.search(r"started successfully on port (\d+)", line):
                return match[1]
        raise RuntimeError("chromedriver ended before it listened")

    def call(self, method: str, path: str, body: dict | None = None):
        """Send one command and return its value.

        Raises RuntimeError with WebDriver's name of the error, such as "unexpected alert open".
        """
        url = self.address + (f"/{self.session}" if self.session else "") + path
        data = json.dumps(body or {}).encode() if method == "POST" else None
        try:
            request = urllib.request.Request(url, data, method=method)
            with self.open_url(request, timeout=30) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise RuntimeError(f"{value['error']}: {value['message'].splitlines()[0]}") from None

    def go(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *args):
        """Run the body of a function of `arguments` in the page and return its value, awaited if it
        is a promise.
        """
        return self.call("POST", "/execute/sync", {"script": script, "args": args})

    def click(self, selector: str) -> None:
        self.run(
            "const e = arguments[0]; e.scrollIntoView({block: 'center'})", self.element(selector)
        )
        self.call("POST", f"/element/{self.element(selector)[ELEMENT]}/click")

    def element(self, selector: str) -> dict:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, in the element that has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call(
            "POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]}
        )

    def log(self, kind: str) -> list[dict]:
        """Entries since the last call of the console ("browser") or of the network
        ("performance").
        """
        return self.call("POST", "/se/log", {"type": kind})

    def devtools(self, command: str, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def close(self) -> None:
        try:
            if self.session:
                self.call("DELETE", "")
        finally:
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
            self.driver.stdout.close()
