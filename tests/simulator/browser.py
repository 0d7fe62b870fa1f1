"""Headless Chromium through its driver, without a library: opens a page, runs script in it, takes its picture."""

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

REASON: Final = "needs chromium and chromedriver on the PATH"
START_S_MAX: Final = 60
_READY: Final = "ChromeDriver was started successfully on port "


def is_available() -> bool:
    """Whether this machine has the browser and its driver."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """A browser with one window."""

    def __init__(self, url: str, session: str) -> None:
        self._url = f"{url}/session/{session}"

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        """A browser that ends with the block."""
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
            subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver,
        ):
            try:
                assert driver.stdout is not None
                ready = next(line for line in driver.stdout if line.startswith(_READY))
                url = f"http://127.0.0.1:{ready.removeprefix(_READY).strip().rstrip('.')}"
                wanted = {
                    "goog:loggingPrefs": {"browser": "ALL"},
                    "goog:chromeOptions": {"args": [*arguments, f"--user-data-dir={profile}"]},
                }
                answer = _call(f"{url}/session", {"capabilities": {"alwaysMatch": wanted}})
                browser = cls(url, answer["sessionId"])
                try:
                    yield browser
                finally:
                    browser.close()
            finally:
                driver.terminate()

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, calm: bool = False
    ) -> None:
        """Open a file in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
        ]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})
        _call(f"{self._url}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: object) -> Any:
        """What a script returns; one that returns a promise is waited for."""
        return _call(f"{self._url}/execute/sync", {"script": script, "args": list(arguments)})

    def messages(self) -> list[str]:
        """What has been written on the console since the last call."""
        return [entry["message"] for entry in _call(f"{self._url}/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        """Save a picture of the whole page."""
        size = self.run(
            "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        answer = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """End the browser."""
        _call(self._url, None, method="DELETE")

    def _devtools(self, command: str, parameters: Mapping[str, object]) -> Any:
        return _call(f"{self._url}/goog/cdp/execute", {"cmd": command, "params": parameters})


def _call(url: str, body: object, *, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=START_S_MAX) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
