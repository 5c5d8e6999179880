"""A headless Chromium, driven by its own protocol. https://chromedevtools.github.io/devtools-protocol"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--remote-debugging-port=0",
)


class Tab:
    """One page.

    Attributes:
        troubles: what its console said of errors, and what its policy refused.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.troubles: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **words: Any) -> dict[str, Any]:
        """Does something; what happens meanwhile is looked at for troubles."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": words}
        if self._session:
            message["sessionId"] = self._session
        self._connection.send(json.dumps(message))
        while True:
            reply = json.loads(self._connection.recv(timeout=30))
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                result = reply["result"]
                assert isinstance(result, dict)
                return result
            self._note(reply)

    def _note(self, event: dict[str, Any]) -> None:
        words = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.troubles.append(str(words["exceptionDetails"]))
            case "Log.entryAdded" if words["entry"]["level"] == "error":
                self.troubles.append(f"{words['entry']['text']} {words['entry'].get('url', '')}")
            case "Page.javascriptDialogOpening":
                self.troubles.append(f"a dialog: {words['message']}")

    def run(self, script: str) -> Any:
        """What an expression of JavaScript comes to."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 30.0) -> Any:
        """What an expression comes to once that is anything."""
        ends = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < ends, (
                script,
                self.run("document.body.innerText")[:2000],
                self.troubles,
            )
            time.sleep(0.05)
        return value

    def go(self, url: str) -> None:
        """Opens a page and waits until it is ready."""
        self.send("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def drop(self, name: str, text: str) -> None:
        """Drops a file on the page."""
        file = f"new File([{json.dumps(text)}], {json.dumps(name)})"
        self.run(
            f"(() => {{ const data = new DataTransfer(); data.items.add({file});"
            " document.body.dispatchEvent(new DragEvent('drop',"
            " {bubbles: true, cancelable: true, dataTransfer: data})); })()"
        )

    def click(self, selector: str) -> None:
        """Clicks on an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        """What an element says."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A tab of a browser that ends with the block."""
    assert PROGRAM is not None
    process = subprocess.Popen(
        [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file, ends = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert process.poll() is None, "Chromium ended by itself"
            assert time.monotonic() < ends, "Chromium did not start"
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, open_timeout=30) as connection:
            yield Tab(connection)
    finally:
        process.kill()
        process.wait(timeout=20)
