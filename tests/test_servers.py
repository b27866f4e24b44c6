"""The ground of the tests: each server behaves as the real one does where a store depends on it, and the proxy does what it counts."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import psutil
import pytest
import servers
from proxy import proxy

HERE = Path(__file__).parent


def filesystem(s):
    return fsspec.filesystem(s.url.split("://")[0], **s.options, skip_instance_cache=True)


@pytest.fixture(autouse=True)
def no_bucket_probe(monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


# -- the servers


def create(fs, name, who):
    "Whether put-if-absent says that it was us."
    try:
        fs.pipe_file(name, b"%d" % who, mode="create")
        return True
    except FileExistsError:
        return False


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_create_succeeds_once(server, kind):
    "Eight writers of one name: one wins, and it is his bytes that stay."
    s = server(kind)
    fs, name = filesystem(s), f"{s.bucket}/{uuid.uuid4().hex}"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda who: create(fs, name, who), range(8)))
    assert won.count(True) == 1, s.tail()
    assert int(fs.cat_file(name)) == won.index(True)
    assert not create(fs, name, 9)


def test_rclone_s3_lets_everybody_win():
    "The negative example: the condition is taken and ignored, and nothing says so. The last one's bytes stay."
    with servers.rclone_s3() as s:  # a server of its own: left alone it turns in circles, on a whole core
        fs, name = filesystem(s), f"{s.bucket}/{uuid.uuid4().hex}"
        assert [create(fs, name, who) for who in range(2)] == [True, True]
        assert fs.cat_file(name) == b"1"


CHILD = """
import sys, fsspec
fs, path = fsspec.url_to_fs(sys.argv[1])
fs.pipe_file(path, b"from a child")
print(fs.find(path), fs.cat_file(path).decode())
"""


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_a_child_process_finds_the_server_through_its_environment(server, kind):
    s = server(kind)
    name = uuid.uuid4().hex
    done = subprocess.run([sys.executable, "-c", CHILD, f"{s.url}/{name}"], env=os.environ | s.env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == f"['{s.bucket}/{name}'] from a child", done.stderr
    with s.environ():
        assert fsspec.open(f"{s.url}/{name}").open().read() == b"from a child"


def test_google_cloud_storage_uses_the_same_server(server):
    "Google's own client, with a generation as the condition and a resumable upload in parts."
    storage = pytest.importorskip("google.cloud.storage")
    from google.api_core.exceptions import PreconditionFailed
    s = server("gcs")
    with s.environ():
        client = storage.Client()
    with contextlib.closing(client):
        blob = client.bucket(s.bucket).blob(uuid.uuid4().hex, chunk_size=256 * 1024)
        data = os.urandom(700_000)
        blob.upload_from_string(data, if_generation_match=0)
        assert blob.download_as_bytes() == data and blob.crc32c
        with pytest.raises(PreconditionFailed):
            blob.upload_from_string(b"other", if_generation_match=0)


def test_rclone_remote_is_a_folder_behind_a_name(server, tmp_path):
    (tmp_path / "a").write_text("hello")
    s = server("rclone_remote", folder=tmp_path / "drive")
    target = s.url.removeprefix("rclone:") + "/b/c"
    subprocess.run(["sh", "-c", f"rclone copyto {tmp_path}/a {target}"], env=os.environ | s.env, check=True)
    assert (tmp_path / "drive/sub/b/c").read_text() == "hello"


def test_postgres_answers(server):
    s = server("postgres")
    import sqlalchemy
    engine = sqlalchemy.create_engine(s.url)
    with engine.connect() as c:
        assert c.execute(sqlalchemy.text("select current_database() || ' ' || 6*7")).scalar() == "postgres 42"
    engine.dispose()
    with pytest.raises(sqlalchemy.exc.OperationalError, match="password authentication failed"):
        sqlalchemy.create_engine(s.url.replace("waystation:", "waystation:wrong"), poolclass=sqlalchemy.NullPool).connect()


def test_redis_answers(server):
    s = server("redis")
    import redis
    with redis.Redis.from_url(s.url) as r:
        name = uuid.uuid4().hex
        assert [r.set(name, 1, nx=True), r.set(name, 2, nx=True), r.get(name)] == [True, None, b"1"]


OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from proxy import proxy
from servers import redis
with redis() as s, proxy(s.host_port, raw=True) as p:
    print(s.pid, p.process.pid, s.log.parent, flush=True)
    time.sleep(60)
"""


def test_nothing_outlives_a_killed_owner(server):
    server("redis")
    with subprocess.Popen([sys.executable, "-c", OWNER, HERE], stdout=subprocess.PIPE, text=True) as owner:
        keeper, its_proxy, folder = owner.stdout.readline().split()
        family = [psutil.Process(int(its_proxy)), *(k := psutil.Process(int(keeper))).children(), k]
        assert len(family) == 3 and Path(folder).exists()
        owner.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=15)[1] == []
    assert not Path(folder).exists()


def test_a_server_that_ends_shows_its_log_and_a_missing_one_its_name():
    with pytest.raises(RuntimeError, match="the end of its log:\nno such luck"):
        with servers.running("unlucky", lambda port, home: ["sh", "-c", "echo no such luck; exit 3"], servers.answers_http()):
            pass
    with pytest.raises(servers.Missing, match=r"nosuchd is not installed \(looked on PATH and in /opt\); install it"):
        servers.program("nosuchd", "it", "/opt")


def test_servers_side_by_side_have_ports_of_their_own(server):
    server("redis")
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(servers.redis()) for _ in range(4)]
        assert len({s.host_port for s in many}) == 4
        with servers.free_port() as port:  # taken between the look and the bind, by one who does not ask here
            assert f"127.0.0.1:{port}" not in {s.host_port for s in many}


# -- the proxy


class Shelf(BaseHTTPRequestHandler):
    "PUT keeps, GET gives, POST counts the bytes of a chunked body. HTTP/1.1: connections are kept."
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        self.server.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(b"", Location=f"http://{self.headers['Host']}{self.path}")

    def do_POST(self):
        n = 0
        while size := int(self.rfile.readline(), 16):
            n += len(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        self.reply(b"%d" % n)

    def do_GET(self):
        self.server.connections.add(self.client_address)
        self.reply(self.server.kept.get(self.path, b""))

    def reply(self, data, **more):
        self.send_response(200)
        for k, v in {"Content-Length": len(data), **more}.items():
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def shelf():
    with ThreadingHTTPServer(("127.0.0.1", 0), Shelf) as s:
        s.daemon_threads = True
        s.kept, s.connections, s.host_port = {}, set(), f"127.0.0.1:{s.server_port}"
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


def ask(p, method, path, data=None, connection=None, **more):
    "(status, headers, body), or ('reset', {}, b'')."
    c = connection or http.client.HTTPConnection(p.host_port, timeout=30)
    try:
        c.request(method, path, data, **more)
        r = c.getresponse()
        return r.status, dict(r.headers), r.read()
    except (ConnectionError, http.client.IncompleteRead):
        return "reset", {}, b""
    finally:
        if c is not connection:
            c.close()


def test_the_proxy_passes_on_what_it_is_given(shelf, tmp_path):
    with proxy(shelf.host_port, log=tmp_path / "log") as p:
        data = os.urandom(3_000_000)
        status, headers, _ = ask(p, "PUT", "/a", data)
        assert status == 200 and headers["Location"] == f"{p.endpoint}/a"
        assert ask(p, "PUT", "/expect", b"x" * 1000, headers={"Expect": "100-continue"})[0] == 200
        assert ask(p, "POST", "/chunked", iter([b"x" * 100_000] * 7), encode_chunked=True)[2] == b"700000"
        shelf.connections.clear()
        c = http.client.HTTPConnection(p.host_port)
        assert all(ask(p, "GET", "/a", connection=c)[2] == data for _ in range(3))
        assert len(shelf.connections) == 1, "the connection was not kept"
        c.close()
        s = p.stats()
        assert (s["requests"], s["forwarded"], s["faults"], s["broken"]) == (6, 6, 0, 0)
        assert s["methods"] == {"PUT": 2, "POST": 1, "GET": 3} and s["statuses"] == {"200": 6}
        assert s["bytes_down"] == 3 * len(data) + 6 and s["bytes_up"] > 3_701_000
        assert len((tmp_path / "log").read_text().splitlines()) == 6


def test_the_proxy_counts_the_faults_it_injects(shelf):
    "What the client sees adds up to what the proxy says, kind by kind; lost replies are of requests that took effect."
    shelf.kept.clear()
    with proxy(shelf.host_port, faults=0.5, seed=1) as p:
        seen = [ask(p, "PUT", f"/{n}", b"x") for n in range(200)]
        s = p.stats()
    statuses = [str(status) for status, _, _ in seen]
    assert {k: statuses.count(k) for k in set(statuses)} == s["statuses"] and set(statuses) == {"200", "429", "503", "reset"}
    assert s["requests"] == 200 and statuses.count("200") == 200 - s["faults"]
    assert 60 <= s["faults"] <= 140 and 0 < s["lost"] < s["faults"]
    assert set(s["kinds"]) == {f"{k}-{w}" for k in ("503", "429", "reset", "retry-after") for w in ("before", "after")}
    assert sum("Retry-After" in headers for _, headers, _ in seen) == s["kinds"]["retry-after-before"] + s["kinds"]["retry-after-after"]
    assert len(shelf.kept) == s["forwarded"] == statuses.count("200") + s["lost"]


def test_one_fault_where_the_test_wants_it(shelf):
    shelf.kept.clear()
    with proxy(shelf.host_port) as p:
        p.next("reset", when="after", match="PUT .*seals/")
        assert [ask(p, "PUT", path, b"x")[0] for path in ("/blobs/1", "/seals/1", "/seals/2")] == [200, "reset", 200]
        assert shelf.kept.keys() == {"/blobs/1", "/seals/1", "/seals/2"}
        shelf.kept["/big"] = bytes(1_000_000)
        p.next("cut", match="GET", times=2)
        assert [ask(p, "GET", "/big")[0] for _ in range(3)] == ["reset", "reset", 200]
        assert 2_000_000 <= p.stats()["bytes_down"] < 2_200_000  # half, half and all of it
        p.set(down=True)
        assert ask(p, "GET", "/seals/1")[0] == 503
        p.set(down=False)
        assert ask(p, "GET", "/seals/1")[0] == 200
        assert p.stats(clear=True)["kinds"] == {"reset-after": 1, "cut-during": 2, "503-down": 1}
        assert p.stats()["requests"] == 0
        with pytest.raises(ValueError, match="no fault 'cutt' 'before'"):
            p.next("cutt")
        with pytest.raises(TypeError, match="speed"):
            p.set(speed=1)


def test_a_lost_reply_leaves_the_object_behind(server):
    "The hard case of put-if-absent on a real server: the client must find out by reading that it was itself who won."
    s = server("gcs")
    with proxy(s.host_port) as p:
        fs, name = filesystem(s.through(p)), f"{s.bucket}/{uuid.uuid4().hex}"
        p.next("reset", when="after", match="POST /upload")
        with pytest.raises(FileExistsError):  # gcsfs tries again by itself, and is told that the object is there
            fs.pipe_file(name, b"mine", mode="create")
        assert fs.cat_file(name) == b"mine" and p.stats()["lost"] == 1


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_half_an_upload_leaves_no_object(server, kind):
    "As on the real ones: what ends before its Content-Length is not stored."
    s = server(kind)
    fs, name = filesystem(s), uuid.uuid4().hex
    path = f"/upload/storage/v1/b/{s.bucket}/o?uploadType=media&name={name}" if kind == "gcs" else f"/{s.bucket}/{name}"
    with proxy(s.host_port) as p:
        p.next("cut")
        assert ask(p, "POST" if kind == "gcs" else "PUT", path, bytes(2_000_000))[0] == "reset"
        sent = p.stats()
        assert 1_000_000 <= sent["bytes_up"] < 2_000_000 and sent["kinds"] == {"cut-during": 1}
    until = time.monotonic() + 1
    while time.monotonic() < until:
        fs.invalidate_cache()
        assert fs.find(f"{s.bucket}/{name}") == []
        time.sleep(0.2)


def test_resumable_uploads_stay_behind_the_proxy(server):
    "The server hands out an absolute address for the parts; through the proxy it is the proxy's."
    s = server("gcs")
    with proxy(s.host_port) as p:
        fs, data = filesystem(s.through(p)), os.urandom(6_000_000)
        with fs.open(f"{s.bucket}/{uuid.uuid4().hex}", "wb", block_size=2**20) as f:
            f.write(data)
        assert p.stats()["bytes_up"] >= len(data)


def test_the_proxy_is_slow(shelf):
    "Bounds with seconds to spare: a busy machine is slower still."
    shelf.kept["/1MB"] = bytes(1_000_000)
    with proxy(shelf.host_port, latency=0.1) as p:
        start = time.monotonic()
        for _ in range(3):
            ask(p, "GET", "/none")
        assert time.monotonic() - start >= 0.3
        p.set(latency=0.0, bytes_per_second=1_000_000)
        for method, data in (("GET", None), ("PUT", bytes(1_000_000))):
            start = time.monotonic()
            assert ask(p, method, "/1MB", data)[0] == 200
            assert 0.8 < time.monotonic() - start < 10
        shelf.kept["/400kB"] = bytes(400_000)
        p.set(bytes_per_second=200_000)  # of each connection: one cap for all four would need 8 s
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: ask(p, "GET", "/400kB"), range(4)))
        assert 1.5 < time.monotonic() - start < 6


def test_large_bodies_pass_in_little_memory(shelf):
    with proxy(shelf.host_port) as p:
        process = psutil.Process(p.process.pid)
        before = process.memory_info().rss
        assert ask(p, "POST", "/", (bytes(1_000_000) for _ in range(300)), encode_chunked=True)[2] == b"300000000"
        assert process.memory_info().rss - before < 30e6
        assert p.stats()["bytes_up"] >= 300e6


def test_any_protocol_passes_raw(server):
    s = server("redis")
    import redis
    with proxy(s.host_port, raw=True) as p, redis.Redis.from_url(s.through(p).url, retry=None, socket_timeout=5) as r:
        assert r.ping() and p.stats()["bytes_up"] > 0
        p.set(down=True)
        with pytest.raises(redis.ConnectionError):
            r.ping()
        p.set(down=False)
        assert r.ping()


def test_a_proxy_before_nothing_resets(shelf):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        with proxy(s.getsockname()) as p:
            assert ask(p, "GET", "/")[0] == "reset" and p.stats()["broken"] == 1
