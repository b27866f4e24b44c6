"""A headless Chromium, driven by its own protocol over a websocket: what a page asks for, shows and says."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    "One page. `requests` are the addresses that it asked for, `said` what came to its console."

    def __init__(self, socket):
        self.socket, self.n, self.requests, self.said, self.bytes = socket, 0, [], [], 0

    async def send(self, method, **params):
        self.n += 1
        await self.socket.send_json(dict(id=self.n, method=method, params=params))
        while True:
            message = json.loads((await asyncio.wait_for(self.socket.receive(), 60)).data)
            self._heard(message)
            if message.get("id") == self.n:
                assert "error" not in message, (method, message)
                return message["result"]

    def _heard(self, message):
        p = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(p["request"]["url"])
        elif message.get("method") == "Network.loadingFinished":
            self.bytes += p["encodedDataLength"]
        elif message.get("method") == "Log.entryAdded":
            self.said.append(f"{p['entry']['level']}: {p['entry']['text']}")
        elif message.get("method") == "Runtime.exceptionThrown":
            self.said.append(f"exception: {p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text'])}")

    async def js(self, code):
        "The value of an expression on the page."
        got = await self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, (code, got)
        return got["result"].get("value")

    async def until(self, code, seconds=60):
        "Wait until an expression is true on the page; its value."
        end = time.monotonic() + seconds
        while not (got := await self.js(code)):
            assert time.monotonic() < end, f"never true: {code}\n{self.said}\n{await self.js('document.body.innerText')}"
            await asyncio.sleep(0.05)
        return got

    async def open(self, url, width=1300, height=900, dark=False):
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.send(f"{domain}.enable")
        await self.size(width, height)
        await self.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
        await self.send("Page.navigate", url=url)

    async def size(self, width, height):
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    async def mouse(self, kind, x, y, **more):
        await self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    async def drag(self, points):
        "Press at the first point, go along the others, and let go at the last."
        await self.mouse("Pressed", *points[0], button="left", buttons=1, clickCount=1)
        for x, y in points[1:]:
            await self.mouse("Moved", x, y, button="left", buttons=1)
        await self.mouse("Released", *points[-1], button="left", clickCount=1)

    async def type(self, text):
        await self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r" if kind == "keyDown" else "", windowsVirtualKeyCode=13)

    async def picture(self, to):
        Path(to).write_bytes(base64.b64decode((await self.send("Page.captureScreenshot", format="png"))["data"]))


@contextlib.asynccontextmanager
async def browser(*flags):
    "A page in a Chromium of its own, which knows nobody but this machine."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--remote-debugging-port=0",
                   f"--user-data-dir={home}", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost", *flags, "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            said = Path(home, "DevToolsActivePort")
            end = time.monotonic() + 60
            while not (said.exists() and said.read_text().count("\n")):
                assert process.poll() is None and time.monotonic() < end, "Chromium does not start"
                await asyncio.sleep(0.1)
            port = said.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                pages = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
                address = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.terminate()
            process.wait(30)
