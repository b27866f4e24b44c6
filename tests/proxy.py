"""A bad network on loopback: an HTTP/1.1 proxy in a process of its own that is slow, fails, and loses replies.

    with gcs() as g, proxy(g.host_port, latency=0.04, bytes_per_second=25e6, faults=0.15) as p:
        run(env=os.environ | g.through(p).env)
        p.set(down=True)                                   # from now on 503 for everything
        p.next("reset", when="after", match="PUT .*seals") # lose the reply to one request: it took effect, the client cannot know
        p.stats()["faults"], p.stats()["lost"]

A fault strikes before the target has heard of the request, or after it has done what it was asked (`lost` of the faults): then
the reply is thrown away. `raw=True` forwards bytes of any protocol (PostgreSQL, Redis): a fault is a reset connection there.

Run as a script it is the proxy's process; it ends when its parent is gone.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator

HERE = "127.0.0.1"
KINDS = ("503", "429", "reset", "retry-after")  # "cut" besides: reset in the middle of the body, which half arrives
STATUS = {"503": b"503 Service Unavailable", "429": b"429 Too Many Requests", "retry-after": b"503 Service Unavailable"}
CHUNK = 65536
SCRIPT = os.path.abspath(__file__)  # now: the test may change its folder later


# -- in the client's process


class Proxy:
    "The running proxy, as the test holds it. Safe to use from several threads."

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port = process, port
        self.host_port, self.endpoint = f"{HERE}:{port}", f"http://{HERE}:{port}"
        self._lock = threading.Lock()

    def _ask(self, what: str, **values):
        with self._lock:
            self.process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the proxy has ended with {self.process.poll()}; its error is above")
            return json.loads(answer)

    def stats(self, clear: bool = False) -> dict:
        """What happened so far: requests, forwarded (to the target), faults, lost (faults after the target had acted),
        kinds ({'reset-after': 2}), methods, statuses (seen by the client), bytes_up, bytes_down (bodies), connections,
        in_flight, max_in_flight, broken (the target or the client went away)."""
        return self._ask("stats", clear=clear)

    def set(self, **changes) -> None:
        "Change at run time: latency, bytes_per_second, faults, fault_kinds, lost, down (503 for all; raw: reset)."
        if unknown := changes.keys() - {"latency", "bytes_per_second", "faults", "fault_kinds", "lost", "down"}:
            raise TypeError(f"{sorted(unknown)} cannot be changed at run time")
        self._ask("set", changes=changes)

    def next(self, kind: str, when: str = "before", match: str = "", times: int = 1) -> None:
        "The next `times` requests whose 'METHOD /path' matches get this fault; `faults` does not matter for them."
        if kind not in (*KINDS, "cut") or when not in ("before", "after"):
            raise ValueError(f"no fault {kind!r} {when!r}; kinds are {', '.join(KINDS)} and cut, before or after the target has acted")
        when = "during" if kind == "cut" else when
        self._ask("next", plan=[kind, when, match], times=times)


@contextlib.contextmanager
def proxy(
    target_host_port,                 # "127.0.0.1:4443", an http:// address or (host, port)
    *,
    latency: float = 0.0,             # seconds added to each request
    bytes_per_second: float | None = None,  # cap of each connection, up and down apart
    faults: float = 0.0,              # share of requests that fail
    fault_kinds: tuple = KINDS,       # which faults, each as likely
    lost: float = 0.4,                # share of the faults that strike after the target has acted
    seed: int = 0,                    # of the faults' sequence; with several connections the order of requests varies
    log: str | os.PathLike | None = None,   # file for one JSON line a request
    raw: bool = False,                # bytes of any protocol instead of HTTP
    port: int = 0,                    # 0: any that is free
) -> Iterator[Proxy]:
    "Start a proxy in front of `target_host_port`; it ends with the block or with this process."
    target = target_host_port if not isinstance(target_host_port, str) else re.sub(r"^\w+://|/.*$", "", target_host_port).rsplit(":", 1)
    settings = {"target": [target[0], int(target[1])], "latency": latency, "bytes_per_second": bytes_per_second, "faults": faults,
                "fault_kinds": list(fault_kinds), "lost": lost, "seed": seed, "log": os.fspath(log) if log else None, "raw": raw, "port": port,
                "parent": os.getpid()}
    process = subprocess.Popen([sys.executable, "-IS", SCRIPT, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    try:
        first = process.stdout.readline()
        if not first:
            raise RuntimeError(f"the proxy ended with {process.wait()} before it listened; its error is above")
        yield Proxy(process, int(first))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# -- in the proxy's process


class Gone(Exception):
    "The other side closed the connection."


class Pace:
    "Holds one direction of one connection to `bytes_per_second`."

    def __init__(self, state: dict):
        self.state, self.due = state, 0.0

    @property
    def chunk(self) -> int:
        rate = self.state["bytes_per_second"]
        return CHUNK if not rate else max(1, min(CHUNK, int(rate / 20)))

    async def __call__(self, n: int) -> None:
        if rate := self.state["bytes_per_second"]:
            now = time.monotonic()
            self.due = max(self.due, now - 0.05) + n / rate  # a sleep that took too long is made good, by 50 ms at most
            if self.due > now:
                await asyncio.sleep(self.due - now)


async def head(reader) -> bytes:
    "A message's first line and headers, b'' when the other side has closed in peace."
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as e:
        if e.partial:
            raise Gone from e
        return b""


def headers(raw: bytes) -> dict[bytes, bytes]:
    pairs = (line.partition(b":") for line in raw.split(b"\r\n")[1:] if line)
    return {k.strip().lower(): v.strip() for k, _, v in pairs}


def edit(raw: bytes, change) -> bytes:
    "The head with each header line replaced by `change(name, line)`; None drops it."
    first, *lines = raw[:-4].split(b"\r\n")
    kept = [new for line in lines if (new := change(line.partition(b":")[0].strip().lower(), line)) is not None]
    return b"\r\n".join([first, *kept]) + b"\r\n\r\n"


async def exactly(reader, n: int, pace: Pace):
    while n:
        data = await reader.read(min(n, pace.chunk))
        if not data:
            raise Gone
        n -= len(data)
        yield data


async def body(reader, fields: dict, pace: Pace, to_the_end: bool = False):
    "The body's bytes as they stand on the wire, chunk marks included, in pieces of at most CHUNK."
    if b"chunked" in fields.get(b"transfer-encoding", b"").lower():
        while True:
            mark = await reader.readline()
            if not mark.endswith(b"\n"):
                raise Gone
            yield mark
            size = int(mark.split(b";")[0], 16)
            if not size:
                break
            async for data in exactly(reader, size + 2, pace):  # the line's end is part of it
                yield data
        while True:  # trailers
            line = await reader.readline()
            yield line
            if line in (b"\r\n", b"\n", b""):
                return
    elif b"content-length" in fields:
        async for data in exactly(reader, int(fields[b"content-length"]), pace):
            yield data
    elif to_the_end:
        while data := await reader.read(pace.chunk):
            yield data


def cut_off(writer) -> None:
    "Reset, not end: what was still on its way is gone too."
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Client:
    "One client's connection and the one to the target that goes with it."

    def __init__(self, network: "Network", reader, writer):
        self.network, self.state, self.count = network, network.state, network.count
        self.reader, self.writer = reader, writer
        self.up: tuple | None = None
        self.pace_up, self.pace_down = Pace(self.state), Pace(self.state)
        self.target = "{}:{}".format(*self.state["target"]).encode()
        self.own = "{}:{}".format(*writer.get_extra_info("sockname")).encode()

    async def serve(self):
        self.count["connections"] += 1
        try:
            if self.state["raw"]:
                return await self.bytes()
            while request := await head(self.reader):
                self.count["in_flight"] += 1
                self.count["max_in_flight"] = max(self.count["max_in_flight"], self.count["in_flight"])
                try:
                    await self.request(request)
                finally:
                    self.count["in_flight"] -= 1
                if self.writer.transport.is_closing():
                    break
        except (Gone, OSError, asyncio.LimitOverrunError, asyncio.IncompleteReadError, ValueError):
            self.count["broken"] += 1
            cut_off(self.writer)
        finally:
            self.hang_up()
            self.writer.close()

    def hang_up(self):
        if self.up:
            self.up[1].close()
        self.up = None

    async def request(self, raw):
        "One request: its fate, its reply, its line in the log."
        at = time.time()
        method, path = (part.decode(errors="replace") for part in raw.split(b" ", 2)[:2])
        self.count["requests"] += 1
        self.network.methods[method] += 1
        fate = self.network.fate(f"{method} {path}")
        if fate:
            self.network.strike(*fate)
        self.status, self.sent, self.got = 0, 0, 0
        try:
            await self.meet(raw, method, *(fate or ("", "")))
        finally:
            self.network.statuses[str(self.status or "reset")] += 1
            self.count["bytes_up"] += self.sent
            self.count["bytes_down"] += self.got
            if self.network.log:
                line = {"at": round(at, 4), "seconds": round(time.time() - at, 4), "request": f"{method} {path}", "up": self.sent, "down": self.got,
                        "status": self.status, "fault": "-".join(fate) if fate else None}
                self.network.log.write(json.dumps(line) + "\n")

    async def meet(self, raw, method, kind, when):
        await asyncio.sleep(self.state["latency"])
        if (kind, when) == ("reset", "before"):
            return cut_off(self.writer)
        fields = headers(raw)
        if b"100-continue" in fields.get(b"expect", b"").lower():
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if when in ("before", "down"):
            async for data in body(self.reader, fields, self.pace_up):
                self.sent += len(data)
                await self.pace_up(len(data))
            return await self.refuse(kind)
        if not await self.forward(raw, fields, kind):
            return cut_off(self.writer)
        if not await self.reply(method, kind, lost=when == "after"):
            return cut_off(self.writer)
        if when == "after":
            return cut_off(self.writer) if kind == "reset" else await self.refuse(kind)
        if b"close" in fields.get(b"connection", b"").lower():
            self.writer.close()

    async def forward(self, raw, fields, kind) -> bool:
        "Pass the request on; False: cut in its middle."
        if self.up is None or self.up[0].at_eof() or self.up[0].exception() or self.up[1].is_closing():
            self.hang_up()
            self.up = await asyncio.open_connection(*self.state["target"], limit=CHUNK)
        to_target, total, refused = self.up[1], int(fields.get(b"content-length", 0)), False
        to_target.write(edit(raw, lambda k, line: b"Host: " + self.target if k == b"host" else None if k == b"expect" else line))
        self.count["forwarded"] += 1
        async for data in body(self.reader, fields, self.pace_up):
            self.sent += len(data)
            if not refused:
                try:
                    to_target.write(data)
                    await to_target.drain()
                except OSError:  # the target has closed: its answer, if it gave one, can still be read
                    refused = True
            await self.pace_up(len(data))
            if kind == "cut" and self.sent >= total / 2:
                return False
        return True

    async def reply(self, method, kind, lost) -> bool:
        "Pass the target's reply back, or only read it when it is to be lost; False: cut in its middle."
        from_target = self.up[0]
        while True:
            first = await head(from_target)
            if not first:
                raise Gone
            self.status = int(first.split(b" ", 2)[1])
            if self.status >= 200:
                break
        fields = headers(first)
        if not lost:
            self.writer.write(edit(first, lambda k, line: line.replace(self.target, self.own) if k == b"location" else line))
        endless = False
        if method != "HEAD" and self.status not in (204, 304):
            total = int(fields.get(b"content-length", 0))
            endless = b"content-length" not in fields and b"chunked" not in fields.get(b"transfer-encoding", b"").lower()
            async for data in body(from_target, fields, self.pace_down, to_the_end=True):
                if lost:
                    continue
                self.got += len(data)
                self.writer.write(data)
                await self.writer.drain()
                await self.pace_down(len(data))
                if kind == "cut" and self.got >= total / 2:
                    break
        if endless or first.startswith(b"HTTP/1.0") or b"close" in fields.get(b"connection", b"").lower():
            self.hang_up()
            if not lost and kind != "cut":
                self.writer.close()
        if lost or kind == "cut":
            self.status = 0
        return kind != "cut"

    async def refuse(self, kind):
        "The proxy's own answer."
        text = STATUS[kind]
        wait = b"Retry-After: 1\r\n" if kind == "retry-after" else b""
        self.writer.write(b"HTTP/1.1 " + text + b"\r\n" + wait + b"Content-Type: text/plain\r\nContent-Length: 15\r\n\r\nfault injected\n")
        await self.writer.drain()
        self.status = int(text[:3])

    async def bytes(self):
        "Any protocol: both directions until one side closes."
        self.count["requests"] += 1
        if fate := self.network.fate("CONNECT raw"):
            self.network.strike("reset", "down" if fate[1] == "down" else "before")
            return cut_off(self.writer)
        await asyncio.sleep(self.state["latency"])
        self.up = await asyncio.open_connection(*self.state["target"], limit=CHUNK)
        self.count["forwarded"] += 1

        async def pump(source, sink, pace, name):
            with contextlib.suppress(OSError):
                while data := await source.read(pace.chunk):
                    if self.state["down"]:
                        self.network.strike("reset", "down")
                        return cut_off(self.writer)
                    if name == "bytes_up":
                        await asyncio.sleep(self.state["latency"])
                    sink.write(data)
                    await sink.drain()
                    self.count[name] += len(data)
                    await pace(len(data))
            sink.close()

        await asyncio.gather(pump(self.reader, self.up[1], self.pace_up, "bytes_up"), pump(self.up[0], self.writer, self.pace_down, "bytes_down"))


class Network:
    "What all connections share: the settings, the dice, the counts, the line to the test."

    def __init__(self, state: dict):
        self.state = {**state, "down": False}
        self.random, self.plans = random.Random(state["seed"]), []
        self.log = open(state["log"], "a", buffering=1) if state["log"] else None
        self.count, self.kinds, self.methods, self.statuses = Counter(), Counter(), Counter(), Counter()

    def stats(self, clear=False):
        names = ["requests", "forwarded", "faults", "lost", "bytes_up", "bytes_down", "connections", "in_flight", "max_in_flight", "broken"]
        found = {n: self.count[n] for n in names} | {k: dict(getattr(self, k)) for k in ("kinds", "methods", "statuses")}
        if clear:
            for counter in (self.count, self.kinds, self.methods, self.statuses):
                counter.clear()
            self.count["in_flight"] = found["in_flight"]
        return found

    def fate(self, request: str) -> tuple[str, str] | None:
        "Which fault meets this request: (kind, when), or None."
        for plan in self.plans:
            if re.search(plan[2], request):
                self.plans.remove(plan)
                return plan[0], plan[1]
        if self.state["down"]:
            return "503", "down"
        if self.random.random() >= self.state["faults"]:
            return None
        kind, late = self.random.choice(self.state["fault_kinds"]), self.random.random() < self.state["lost"]
        return kind, "during" if kind == "cut" else "after" if late else "before"

    def strike(self, kind, when):
        self.kinds[f"{kind}-{when}"] += 1
        self.count["faults"] += 1
        self.count["lost"] += when == "after"

    async def control(self):
        "Commands of the test, one JSON line each, until its process is gone."
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        while line := await lines.readline():
            ask = json.loads(line)
            reply = None
            if ask["do"] == "stats":
                reply = self.stats(ask["clear"])
            elif ask["do"] == "set":
                self.state |= ask["changes"]
            elif ask["do"] == "next":
                self.plans += [ask["plan"]] * ask["times"]
            print(json.dumps(reply), flush=True)

    async def watch(self):
        "A fork of the test's process may hold our stdin open after its death."
        while os.getppid() == self.state["parent"]:
            await asyncio.sleep(0.2)

    async def serve(self):
        # TCP by name: asyncio asks for it before it switches Nagle's delay off, which else adds 40 ms of its own to most replies
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # small, so that the kernel's buffers do not hide the cap: an upload must not look finished that has only been buffered
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * CHUNK)
        listening.bind((HERE, self.state["port"]))
        await asyncio.start_server(lambda r, w: Client(self, r, w).serve(), sock=listening, limit=CHUNK, backlog=512)
        print(listening.getsockname()[1], flush=True)
        await asyncio.wait([asyncio.create_task(self.control()), asyncio.create_task(self.watch())], return_when=asyncio.FIRST_COMPLETED)
        os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(Network(json.loads(sys.argv[1])).serve())
