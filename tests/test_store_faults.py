"""The store's promise when the place, the network, the disk, the clock or the files fail it; tests/crashing.py and tests/proxy.py do the failing."""

import contextlib
import errno
import http.server
import itertools
import json
import os
import shutil
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
from crashing import everywhere
from proving import PROVE, SERVERS, Clock, note, serving, size
from proxy import proxy

from waystation import seal as seals
from waystation.place import Folder, Patience
from waystation.remotes import open_place
from waystation.runtime import Interrupted, Refused
from waystation.seal import hash_file
from waystation.store import Store


@pytest.fixture
def work(tmp_path, monkeypatch):
    "A folder with what a checkpoint has: files in the manifest, in packs and on their own, two of them equal."
    monkeypatch.setattr(seals, "PACKED", 250_000)
    monkeypatch.setattr(seals, "PACK", 100_000)  # more than one
    folder = tmp_path / "work"
    (folder / "sub").mkdir(parents=True)
    (folder / "small").write_bytes(b"small")
    (folder / "empty").write_bytes(b"")
    (folder / "large").write_bytes(os.urandom(100_000))
    (folder / "sub/larger").write_bytes(os.urandom(200_000))
    shutil.copy(folder / "large", folder / "sub/twin")
    for n in range(3):
        (folder / f"sub/part {n}").write_bytes(os.urandom(70_000))
    (folder / "alone").write_bytes(os.urandom(300_000))
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- a crash at every single call


def seal(store, work):
    return store.seal(work, "models/a/v9", {"loss": 1.5})


def publish(store, work):
    return store.publish(work, "models/a", {"loss": 1.5})


def refer(store, work):
    return store.refer("models/a/current", "models/a/v2")


@pytest.mark.parametrize("act", [seal, publish, refer])
@pytest.mark.parametrize("kind", ["file", "memory", *(["gs", "s3", "rclone"] if PROVE else [])])
def test_a_crash_at_every_call_leaves_all_or_nothing(kind, act, work, server, tmp_path):
    "Enumerated: at each call to the place, before and after it took effect, the process is gone."
    numbers = itertools.count()

    def fresh():
        place = open_place(f"{url}/{next(numbers)}")
        store = Store(place)
        store.seal(None, "models/a/v1", {"first": True})
        store.seal(None, "models/a/v2", {"second": True})
        store.refer("models/a/current", "models/a/v1")
        return place

    with serving(kind, server, tmp_path) if kind != "memory" else memory() as (url, _):
        quiet = fresh()
        act(Store(quiet), work)
        undisturbed, crashes = state(Store(quiet)), 0
        before = state(Store(fresh()))
        for dead in everywhere(fresh, lambda place: act(Store(place), work)):
            crashes += 1
            store = Store(dead.inner)  # as the next process finds it
            found = state(store)
            assert found in (before, undisturbed), f"{dead} left something between nothing and all"
            assert [w for n in store.list() for w in store.verify(n, read_data=True)] == [], dead
            made = act(store, work)  # the same command again
            if act is publish and found == undisturbed:
                assert made.name == "models/a/v4"  # what was published without an answer stays; the next number is no gap
            else:
                assert state(store) == undisturbed, dead
            if made:
                assert contents(store.fetch(made.name, tmp_path / f"out{crashes}")) == contents(work)
    assert crashes >= 8
    note(f"crash at every call of {act.__name__}", kind, crashes=crashes, torn=0)


def memory():
    return contextlib.nullcontext((f"memory://{uuid.uuid4().hex}", {}))


def state(store):
    "What readers see."
    return {n: (store.read(n).content, store.read(n).meta) for n in store.list()}, store.refs()


def test_a_fetch_that_dies_leaves_no_file_that_is_not_whole(work, tmp_path):
    store = Store(tmp_path / "store")
    store.seal(work, "models/a/v1")
    numbers = itertools.count()

    def fetch(place):
        Store(place).fetch("models/a/v1", tmp_path / f"out{next(numbers)}")

    for n, dead in enumerate(everywhere(lambda: store.place, fetch)):
        out, whole = tmp_path / f"out{n}", contents(work)
        found = {k: v for k, v in contents(out).items() if not k.endswith(".part")} if out.exists() else {}
        assert found.items() <= whole.items(), dead
        assert contents(store.fetch("models/a/v1", out)).items() >= whole.items()


# -- a network that fails


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_every_seal_succeeds_though_15_percent_of_requests_fail(kind, server, tmp_path):
    "503, 429, resets and Retry-After, and of those 40% after the request took effect: its reply is lost."
    seals = size(15, 100)
    with proxy(server(SERVERS[kind]).host_port, faults=0.15, seed=1) as p:
        with serving(kind, server, tmp_path, through=p) as (url, _), Clock() as clock:
            store = Store(url)

            def one(n):
                (tmp_path / str(n)).mkdir()
                (tmp_path / str(n) / "a").write_bytes(os.urandom(70_000))
                store.seal(tmp_path / str(n), f"runs/a/{n}", {"n": n})
                store.refer("runs/a/current", f"runs/a/{n}")

            with ThreadPoolExecutor(3) as pool:
                list(pool.map(one, range(seals)))
            store.seal(tmp_path / "0", "runs/a/0", {"n": 0})  # again is fine
            versions = [store.publish(None, "models/a", {"n": n}).name for n in range(size(5, 20))]
            p.set(faults=0.0)
            assert len([n for n in store.list("runs/a") if store.verify(n, read_data=True) == []]) == seals
            assert versions == [f"models/a/v{n + 1}" for n in range(len(versions))] == store.list("models/a")
            stats = p.stats()
    assert stats["faults"] and stats["lost"]
    note("15% of requests fail", kind, seals=seals, succeeded=seals, requests=stats["requests"], faults=stats["faults"], replies_lost=stats["lost"],
         seconds=clock.seconds)


@contextlib.contextmanager
def stub(kind, answer):
    "A service whose answers the test gives: `answer(n, method, path)` -> (status, headers, body). Yields the URL of a store and its log."
    log = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            log.append((time.monotonic(), self.command, self.path))
            status, headers, body = answer(len(log), self.command, self.path)
            self.send_response(status)
            for k, v in (headers | {"Content-Length": str(len(body)), "Connection": "close"}).items():
                self.send_header(k, v)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = reply

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    endpoint = f"http://127.0.0.1:{httpd.server_port}"
    like = servers._s3_like("s3", endpoint, "waystation", None, None)
    if kind == "gs":
        env = {"STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_CLOUD_PROJECT": "test", **servers.LOOPBACK}
        like = servers.Server("gs", endpoint[7:], "gs://waystation", endpoint, "waystation", env)
    try:
        with like.environ():
            yield like.url + "/x", log
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


S3_ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"


def says(kind, status, code, text="no"):
    body = S3_ERROR.format(code, text) if kind == "s3" else f'{{"error": {{"code": {status}, "message": "{text}", "errors": [{{"reason": "{code}"}}]}}}}'
    return status, {"Content-Type": "application/xml" if kind == "s3" else "application/json"}, body.encode()


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_server_that_asks_for_two_seconds_gets_them(kind):
    def answer(n, method, path):
        status, headers, body = says(kind, *((503, "SlowDown") if n == 1 else (404, "NoSuchKey")))
        return status, headers | ({"Retry-After": "2"} if n == 1 else {}), body

    with stub(kind, answer) as (url, log):
        assert open_place(url).size("seals/a.json") is None
    asked = [at for at, _, path in log if path == log[0][2]]  # gcsfs looks for a folder of that name at the same time
    assert len(asked) == 2 and asked[1] - asked[0] >= 2.0


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_server_that_always_fails_ends_in_bounded_time(kind, work, monkeypatch):
    monkeypatch.setattr(Patience, "tries", 4)
    monkeypatch.setattr(Patience, "longest", 0.1)
    with stub(kind, lambda *_: says(kind, 503, "SlowDown")) as (url, log), Clock() as clock:
        with pytest.raises(Interrupted, match="cannot be reached"):
            Store(url).seal(work, "models/a/v1")
        asked = Counter(path for _, _, path in log)  # what begins at once: a ref of that name, the condemned, some blobs
        assert len(asked) > 2 and set(asked.values()) == {4}  # not the tries of an inner layer times those of an outer one
        log.clear()
        place = open_place(url)
        with pytest.raises(Interrupted, match="the same command goes on"):
            place.put("blobs/aa/aa", work / "large", hash_file(work / "large"))
        assert len(log) == 4
        with pytest.raises(Interrupted):
            place.create("seals/a.json", b"1")
        assert len(log) <= 9
    assert clock.seconds < 20


@pytest.mark.parametrize("status, code, match", [(403, "AccessDenied", "does not permit"), (401, "InvalidAccessKeyId", "does not permit"),
                                                 (507, "InsufficientStorage", "full or over its quota"), (403, "QuotaExceeded", "full or over its quota")])
@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_what_does_not_get_better_is_not_asked_again(kind, status, code, match, work):
    "A place that says no, or is full, refuses at once; nothing is created after it."
    text = "quota exceeded" if "Quota" in code else "not for you"
    with stub(kind, lambda *_: says(kind, status, code, text)) as (url, log), Clock() as clock:
        with pytest.raises(Refused, match=match):
            open_place(url).create("seals/a.json", b"1")
        assert len(log) <= 2
        with pytest.raises(Refused, match=match):
            Store(url).seal(work, "models/a/v1")
        assert not [path for _, method, path in log[2:] if method in ("PUT", "POST") and "seals" in path]
    assert clock.seconds < 15


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_bucket_that_does_not_exist_is_named_at_once(kind, work, server, tmp_path):
    with serving(kind, server, tmp_path) as (url, _), Clock() as clock:
        with pytest.raises(Refused, match="bucket does not exist"):
            Store(url.replace("://waystation/", "://nowhere/")).seal(work, "models/a/v1")
    assert clock.seconds < 10


# -- disks, files and clocks that fail


@pytest.mark.parametrize("kind", ["file", "gs", "s3"])
@pytest.mark.parametrize("how", ["changed", "truncated", "deleted"])
@pytest.mark.parametrize("megabytes", [0.1, 9])
def test_a_file_that_does_not_stand_still_is_not_sealed(kind, how, megabytes, server, tmp_path, monkeypatch):
    "Between its hash and its upload: in one request and in parts."
    import waystation.store as module

    (tmp_path / "moving").mkdir()
    file, describe = tmp_path / "moving/a", module.describe
    file.write_bytes(os.urandom(int(megabytes * 1e6)))

    def then_change(path):
        found = describe(path)
        if how == "changed":
            with open(path, "r+b") as f:
                f.seek(-1, 2)
                f.write(b"?!")
        elif how == "truncated":
            os.truncate(path, found["size"] - 1000)
        else:
            path.unlink()
        return found

    with serving(kind, server, tmp_path) as (url, _):
        store = Store(url)
        with monkeypatch.context() as m:
            m.setattr(module, "describe", then_change)
            with pytest.raises(Refused, match="changed while it was being sealed"):
                store.seal(tmp_path / "moving", "models/a/v1")
        assert store.list() == [] and store.place.keys("blobs") == []


class Full(Folder):
    "A folder over its quota, or one whose permissions were taken away in the middle."

    error = errno.EDQUOT

    def put(self, key, path, digest):
        with self._temporary():
            raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error, match", [(errno.EDQUOT, "is full"), (errno.ENOSPC, "is full"), (errno.EACCES, "does not permit")])
def test_quota_and_permission_lost_in_the_middle(error, match, work, tmp_path):
    place = Full(tmp_path / "store")
    place.error = error
    Store(place).seal(None, "models/a/v1", {})
    with pytest.raises(Refused, match=match):
        Store(place).seal(work, "models/a/v2")
    assert Store(place).list() == ["models/a/v1"] and not list((tmp_path / "store/.tmp").iterdir())


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_changes_nothing(days, work, tmp_path, monkeypatch):
    store, now = Store(tmp_path / "store"), time.time
    store.seal(work, "models/a/v1")
    store.refer("models/a/current", "models/a/v1")
    monkeypatch.setattr(time, "time", lambda: now() + days * 86_400)
    store.seal(work, "models/a/v2")
    store.refer("models/a/current", "models/a/v2")
    assert store.resolve("models/a/current") == "models/a/v2" and store.publish(work, "models/a").name == "models/a/v3"
    assert [w for n in store.list() for w in store.verify(n, read_data=True)] == []


# -- secrets


def test_no_secret_is_written_anywhere(work, tmp_path, monkeypatch, caplog):
    "Planted in the environment, the URL, an exception, the words of a seal and an executed notebook; searched for in all that was written."
    from waystation.place import explain
    from waystation.recipe import _tidy

    secret = 'planted-"quoted\\-5ecret'
    monkeypatch.setenv("HF_TOKEN", secret)
    url = "https://ann:pa55word@host/x?X-Amz-Signature=ab12cd34"
    store = Store(tmp_path / "written/store")
    with pytest.raises(Refused) as refused:
        open_place(f"s3://AKIA:{secret}@bucket/x")
    told = explain(ConnectionResetError(104, f"GET {url} with {secret}"), "gs://x")
    meta = {"said": f"token {secret}", "deep": [{"url": url}], "a": "http://host:80", "z": "me@x", secret: 1}
    seal = store.seal(work, "models/a/v1", meta)
    assert seal.meta["a"] == "http://host:80" and seal.meta["z"] == "me@x"  # nothing else went with them
    notebook = tmp_path / "written/executed.ipynb"
    notebook.write_text(json.dumps({"cells": [{"source": [f"login({secret!r})"], "outputs": [
        {"name": "stdout", "text": [secret]}, {"output_type": "error", "evalue": url, "traceback": [url, secret]}]}]}))
    _tidy(notebook, failed=True)
    written = "".join(p.read_text(errors="replace") for p in (tmp_path / "written").rglob("*") if p.is_file())
    written += str(refused.value) + str(told) + caplog.text
    for hidden in (secret, json.dumps(secret)[1:-1], "pa55word", "ab12cd34"):
        assert hidden not in written


# -- names and sizes


def test_names_and_empty_files_come_back(tmp_path):
    names = ["with space", "größe.三", "x" * 200, ".hidden", "sub/.also/deep", "-dash", "%41", "a?b*c", "quote'\""]
    for n in names:
        (tmp_path / "work" / n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / n).write_bytes(b"" if n.startswith("x") else n.encode() * 20_000)
    (tmp_path / "work/nothing").mkdir()
    store = Store(tmp_path / "store")
    store.seal(tmp_path / "work", "data/a")
    out = store.fetch("data/a", tmp_path / "out")
    assert contents(out) == contents(tmp_path / "work")
    assert not (out / "nothing").exists()  # a seal holds files; an empty folder is none
