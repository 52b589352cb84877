"""A headless Chromium, driven over its DevTools protocol: what a test needs to look at a page, without a package of its
own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. ``faults`` collects what its console, its script and its log complained about; ``requests`` all that it
    asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._answers, self._number = socket, {}, 0
        self._loaded = asyncio.Event()
        self.faults: list[str] = []
        self.requests: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
                continue
            values = event["params"]
            if event["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.faults.append(str(values["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                self.faults.append(str(values["args"]))
            elif event["method"] == "Log.entryAdded":
                self.faults.append(values["entry"]["text"])

    async def call(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": values})
        found = await asyncio.wait_for(answer, 30)
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    async def open(self, path: Path, *, width: int, height: int = 900, phone: bool = False, dark: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = "dark" if dark else "light"
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._loaded.clear()
        await self.call("Page.navigate", url=path.absolute().as_uri())
        await asyncio.wait_for(self._loaded.wait(), 30)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def screenshot(self, path: Path) -> None:
        """The whole page as it is laid out now."""
        box = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": min(box["height"], 14_000), "scale": 1}
        image = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))


@contextlib.asynccontextmanager
async def browser_page(browser: str, folder: Path) -> AsyncIterator[Page]:
    """Start ``browser`` with its profile in ``folder`` and give its first tab; it is ended afterwards."""
    # As root it has no sandbox; in containers /dev/shm is small.
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder}",
        "--remote-debugging-port=0",
    ]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        browser, *flags, "about:blank", stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        announced = folder / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (announced.exists() and "\n" in announced.read_text()):
                assert process.returncode is None, f"{browser} ended with status {process.returncode}"
                await asyncio.sleep(0.1)
        port = announced.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tab = next(page for page in await answer.json() if page["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                listener = asyncio.create_task(page.listen())
                for domain in ("Page", "Network", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                try:
                    yield page
                finally:
                    listener.cancel()
    finally:
        # Its helpers are of its session; those left over would write into the folder that is about to go.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
