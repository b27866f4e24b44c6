"""One writer a run, on every kind of place: two tabs, a holder that died, one that was only slow, clocks that lie, replies that are lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from proxy import proxy

import waystation.lease
from waystation.cli import store_ls, store_verify
from waystation.lease import Lease, stopwatch
from waystation.place import Folder, _fuse
from waystation.remotes import open_place
from waystation.runtime import Interrupted, Refused, process
from waystation.store import Store

LONG = os.environ.get("WAYSTATION_PROVE") == "1"
KINDS = ["folder", "no_links", "memory", "gcs", "s3", *(["rclone_s3"] if LONG else [])]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    "Short times, and the sentences about places are said again in each test."
    monkeypatch.setattr(Lease, "ttl", 2.0)
    monkeypatch.setattr(Lease, "patience", 0.05)
    monkeypatch.setattr(Lease, "settle", 0.3)
    monkeypatch.setattr(waystation.lease, "_warned", set())


@pytest.fixture
def make(server, tmp_path, monkeypatch, request):
    "`make(kind)`: the URL of an empty place; each Store or place opened from it is another client."
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60]
    with contextlib.ExitStack() as stack:

        def url(kind):
            if kind == "memory":
                return f"memory://lease/{name}{time.time_ns()}"
            if kind in ("folder", "no_links"):
                if kind == "no_links":
                    monkeypatch.setattr(os, "link", no_link)
                return str(tmp_path / "store")
            s = server(kind)
            stack.enter_context(s.environ())
            return f"{s.url}/{name}"

        yield url


def no_link(*_):
    raise OSError(95, "Operation not supported")


@contextlib.contextmanager
def elsewhere(monkeypatch, who="colab-7f/0a1b/42/1"):
    "Leases taken in this block are those of a process on another machine."
    with monkeypatch.context() as m:
        m.setattr(waystation.lease, "process", lambda: who)
        yield


class Crash(BaseException):
    "The process ends here."


class Hooked:
    "A place that calls `hook(method, moment, key)` before and after each call of `inner`."

    CALLS = ("create", "put", "has", "read", "chunks", "size", "entries", "keys", "delete", "exclusive")

    def __init__(self, inner, hook):
        self.inner, self.hook = inner, hook

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if name not in self.CALLS:
            return value

        def call(*args):
            key = args[0] if args else ""
            self.hook(name, "before", key)
            answer = value(*args)
            self.hook(name, "after", key)
            return answer

        return call


def gone(lease):
    "As if its process had ended: nothing renews it any more."
    lease._stop.set()
    lease._thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_two_tabs(make, kind):
    url = make(kind)
    first = Lease(open_place(url), "a")
    with pytest.raises(Refused, match=r"run 'a' is being written by .* of this machine.*was alive \d s ago.*--take-over"):
        Lease(open_place(url), "a")
    Lease(open_place(url), "b").release()
    second = Lease(open_place(url), "a", take_over=True)
    with pytest.raises(Refused, match=r"taken over by .*stops before it seals anything more"):
        first.check()
    second.check()
    first.release()
    second.check()
    second.release()
    second.release()
    third = Lease(open_place(url), "a")
    third.check()
    third.release()
    assert len(open_place(url).keys("leases/a")) == 2
    assert not open_place(url).keys("probes")


@pytest.mark.parametrize("kind", KINDS)
def test_renewals_keep_it_and_leave_two_files(make, kind):
    url = make(kind)
    lease = Lease(open_place(url), "a")
    until = time.time() + 1.5 * Lease.ttl
    while time.time() < until:
        lease.check()
        time.sleep(0.1)
    assert lease.number >= 4
    assert len(open_place(url).keys("leases/a")) <= 3  # a renewal may be between creating and trimming
    lease.release()
    assert len(open_place(url).keys("leases/a")) == 2


def at_once(many, url, run):
    "So many ask for one run's lease at the same moment: the leases that were given, and what the others were told."
    barrier = threading.Barrier(many)

    def ask(_):
        place = open_place(url)
        barrier.wait()
        try:
            return Lease(place, run)
        except Refused as e:
            return str(e)

    with ThreadPoolExecutor(many) as pool:
        got = list(pool.map(ask, range(many)))
    return [x for x in got if isinstance(x, Lease)], [x for x in got if isinstance(x, str)]


@pytest.mark.parametrize("kind", ["folder", "gcs", "s3"])
def test_one_of_many_gets_it(make, kind):
    url = make(kind)
    for round in range(10 if LONG else 2):
        won, refused = at_once(6, url, f"r{round}")
        assert len(won) == 1 and all("is being written by" in x for x in refused)
        won[0].check()
        won[0].release()


@pytest.mark.parametrize("kind", ["no_links", *(["rclone_s3"] if LONG else [])])
def test_without_exclusive_create_the_user_is_told_once_and_one_stays(make, kind, caplog):
    url = make(kind)
    for round in range(6 if LONG else 2):
        won, _ = at_once(4, url, f"r{round}")
        holding = []
        for lease in won:
            with contextlib.suppress(Refused):
                lease.check()
                holding.append(lease)
        assert len(holding) == 1
        for lease in won:
            lease.release()
    assert [r.message for r in caplog.records if "only one process" in r.message][1:] == []
    assert "cannot keep two writers apart" in caplog.text


def test_places_that_promise_are_not_probed(make):
    for kind, probes in (("memory", 0), ("gcs", 0), ("s3", 1), ("folder", 1)):
        asked = []
        Lease(Hooked(open_place(make(kind)), lambda name, moment, _, asked=asked: asked.append((name, moment))), "a").release()
        assert asked.count(("exclusive", "before")) == probes, kind


# -- a holder in a process of its own, on what the leases take for another machine

HOLDER = """
import os, signal, sys, time
import waystation.lease
from waystation.lease import Lease
from waystation.runtime import Refused
from waystation.store import Store
url, ttl, skew, stop = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
waystation.lease.process = lambda: f"colab-7f/0a1b/{os.getpid()}/1"
wall = time.time
time.time = lambda: wall() + skew
Lease.ttl = ttl
store = Store(url)
lease = Lease(store.place, "a")
create = store.place.create
def stopping(key, data):
    if key.startswith("seals/") and stop: os.kill(os.getpid(), signal.SIGSTOP)
    made = create(key, data)
    if key.startswith("seals/") and stop == "then killed": os._exit(137)
    return made
store.place.create = stopping
print("holds", flush=True)
for n, line in enumerate(sys.stdin):
    try: print("sealed", store.seal(None, f"runs/a/train/1/checkpoints/{n}", {"by": "holder"}, lease.check).name, flush=True)
    except Refused as e: print("refused", e, flush=True)
"""


@contextlib.contextmanager
def holder(url, ttl=2.0, skew=0.0, stop=""):
    p = subprocess.Popen([sys.executable, "-c", HOLDER, url, str(ttl), str(skew), stop], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == "holds\n"
        yield p
    finally:
        p.kill()
        p.communicate()


def say(p):
    p.stdin.write("\n")
    p.stdin.flush()


def stopped(p, within=20):
    "Wait until the process stands still."
    until = time.time() + within
    while Path(f"/proc/{p.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.time() < until and p.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["folder", "gcs"])
def test_a_holder_that_was_only_slow_never_commits(make, kind, monkeypatch):
    monkeypatch.setattr(Lease, "ttl", 5.0)  # long against the moments for which a busy machine forgets a process
    url = make(kind)
    with holder(url, ttl=5.0) as p:
        say(p)
        assert p.stdout.readline() == "sealed runs/a/train/1/checkpoints/0\n"
        os.kill(p.pid, signal.SIGSTOP)
        began = stopwatch()
        with pytest.raises(Refused, match="written by colab-7f"):
            Lease(open_place(url), "a")
        time.sleep(Lease.ttl * 1.1)
        mine = Lease(open_place(url), "a")  # no --take-over: it gave no sign of life
        assert stopwatch() - began < 2 * Lease.ttl + 5
        os.kill(p.pid, signal.SIGCONT)
        for _ in range(3):
            say(p)
            assert p.stdout.readline().startswith("refused run 'a' was taken over by ")
        store = Store(url)
        assert store.list("runs") == ["runs/a/train/1/checkpoints/0"]
        store.seal(None, "runs/a/train/1/checkpoints/1", {"by": "me"}, mine.check)
        mine.release()


@pytest.mark.parametrize("kind", ["folder", "gcs", "no_links"])
def test_stopped_between_the_fence_and_the_commit(make, kind):
    "It wakes up in the middle of committing: what it created is taken back, and the new holder's readers do not keep it."
    url = make(kind)
    with holder(url, stop="between") as p:
        say(p)
        stopped(p)
        time.sleep(Lease.ttl * 0.6)
        mine = Lease(open_place(url), "a")
        os.kill(p.pid, signal.SIGCONT)
        assert p.stdout.readline().startswith("refused run 'a' was taken over by ")
        store = Store(url)
        assert store.list("runs") == []
        assert store.latest("runs/a/train/1/checkpoints") is None
        assert store.seal(None, "runs/a/train/1/checkpoints/0", {"by": "me"}, mine.check).meta == {"by": "me"}
        mine.release()


@pytest.mark.parametrize("kind", ["folder", "gcs"])
def test_what_is_left_a_seal_that_came_too_late(make, kind):
    "Stopped before the commit, and killed right after it: its seal stays. It is whole, and the new holder is told before anything is mixed."
    url = make(kind)
    with holder(url, stop="then killed") as p:
        say(p)
        stopped(p)
        time.sleep(Lease.ttl * 0.6)
        mine, store = Lease(open_place(url), "a"), Store(url)
        assert store.list("runs") == []
        os.kill(p.pid, signal.SIGCONT)
        assert p.wait(20) == 137
        late = "runs/a/train/1/checkpoints/0"
        assert store.list("runs") == [late] and store.verify(late, read_data=True) == []
        with pytest.raises(Refused, match="exists with other content"):
            store.seal(None, late, {"by": "me"}, mine.check)
        assert store.seal(None, late, {"by": "holder"}, mine.check).meta == {"by": "holder"}  # the same content is no conflict
        store.seal(None, "runs/a/train/1/checkpoints/1", {"by": "me"}, mine.check)
        mine.release()


def test_what_is_left_a_seal_in_time_that_is_taken_back(make):
    "Committed before the run was taken over, looked at after it: the new holder has seen what is gone a moment later."
    url, seen = make("memory"), []
    store = Store(url)

    def hook(name, moment, key):
        if (name, moment) == ("create", "after") and key.startswith("seals/"):
            other.append(Lease(open_place(url), "a", take_over=True))
            seen.extend(Store(url).list())

    other, lease = [], Lease(store.place, "a")
    store.place = Hooked(store.place, hook)
    with pytest.raises(Refused, match="was taken over by"):
        store.seal(None, "runs/a/x", {}, lease.check)
    assert (seen, Store(url).list()) == (["runs/a/x"], [])
    lease.release()
    other[0].release()


def test_stopped_and_nobody_came(make):
    "Its lease ran out, but the run was not taken: it renews and goes on."
    url = make("folder")
    with holder(url, stop="between") as p:
        say(p)
        stopped(p)
        time.sleep(Lease.ttl * 1.2)
        os.kill(p.pid, signal.SIGCONT)
        assert p.stdout.readline().startswith("sealed ")


@pytest.mark.parametrize("skew", [-3600.0, 3600.0, -1.5] if LONG else [-3600.0])
def test_a_living_holder_with_a_wrong_clock_is_not_robbed(make, skew):
    url = make("folder")
    with holder(url, skew=skew) as p:
        for _ in range(2):
            with pytest.raises(Refused, match=r"written by colab-7f.*(gave a sign of life just now|was alive)"):
                Lease(open_place(url), "a")
        say(p)
        assert p.stdout.readline().startswith("sealed ")


@pytest.mark.parametrize("skew", [-3600.0, 3600.0, 0.0] if LONG else [3600.0])
def test_a_dead_holder_with_a_wrong_clock_is_replaced(make, skew):
    url = make("folder")
    with holder(url, skew=skew):
        pass
    time.sleep(Lease.ttl / 2)
    began = stopwatch()
    Lease(open_place(url), "a").release()
    assert stopwatch() - began <= Lease.ttl / 2 + 5


def test_watching_is_said(make, monkeypatch, caplog):
    place = open_place(make("folder"))
    place.create("leases/a/7.json", json.dumps(dict(holder="colab-7f/0a1b/42/1/1", at=time.time() - 600, released=False)).encode())
    place.create("leases/a/desktop.ini", b"")
    Lease(place, "a").release()
    assert "colab-7f/0a1b (process 42) gave its last sign of life 600 s ago; watching for another one, for 1 s" in caplog.text


def test_an_entry_that_cannot_be_read_is_watched(make):
    place = open_place(make("folder"))
    for n, data in enumerate((b"", b"[]", b'{"holder": "x", "at": 1, "released": true}', b"\xff"), 1):
        place.create(f"leases/r{n}/1.json", data)
        began = stopwatch()
        Lease(place, f"r{n}").release()
        assert stopwatch() - began >= Lease.ttl / 2


# -- faults


def test_renewing_survives_errors_and_says_so(make, caplog):
    down = threading.Event()

    def hook(name, moment, key):
        if down.is_set():
            raise Interrupted("cannot be reached")

    lease = Lease(Hooked(open_place(make("memory")), hook), "a")
    down.set()
    time.sleep(Lease.ttl)
    with pytest.raises(Interrupted):
        lease.check()
    down.clear()
    number = lease.number
    time.sleep(Lease.ttl / 2)
    assert lease.number > number
    lease.check()
    lease.release()
    assert "could not be renewed (cannot be reached); trying again" in caplog.text


def test_an_old_renewal_is_not_trusted(make, monkeypatch):
    "A virtual machine that was suspended: no thread ran, and the first to run may be the one that commits."
    lease = Lease(open_place(make("memory")), "a")
    number = lease.number
    lease.check()
    assert lease.number == number
    later = stopwatch() + Lease.ttl * 2
    monkeypatch.setattr(waystation.lease, "stopwatch", lambda: later)
    lease.check()
    assert lease.number == number + 1
    monkeypatch.undo()
    lease.release()


def test_a_lost_reply_is_not_another_writer(server, monkeypatch):
    "The service has the entry, the client never heard: taking and renewing go on as if it had."
    monkeypatch.setattr(Lease, "ttl", 3.0)
    g = server("gcs")
    with proxy(g.host_port) as p, g.through(p).environ():
        p.next("reset", when="after", match="POST .*upload")
        lease = Lease(open_place(f"{g.url}/lost"), "a")
        lease.check()
        assert p.stats()["lost"] == 1
        p.next("reset", when="after", match="POST .*upload")
        number = lease.number
        time.sleep(Lease.ttl / 2)
        lease.check()
        assert lease.number > number and p.stats()["lost"] == 2
        lease.release()


def test_a_process_with_a_lease_ends_at_once(make):
    "Nothing is released, the place hangs in the middle of a renewal: the process ends all the same."
    code = """
import sys, time, threading
from waystation.lease import Lease
from waystation.place import Folder
Lease.ttl = 0.3
place = Folder(sys.argv[1])
lease = Lease(place, "a")
place.keys = place.entries = lambda *_: time.sleep(60)
time.sleep(0.5)
print("ends", flush=True)
"""
    p = subprocess.Popen([sys.executable, "-c", code, make("folder")], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "ends\n"
    began = time.time()
    assert p.wait(timeout=10) == 0
    assert time.time() - began < 5
    p.stdout.close()


@pytest.mark.parametrize("kind", ["folder", "memory", "no_links"])
@pytest.mark.parametrize("error", [Crash, OSError] if LONG else [Crash])
@pytest.mark.parametrize("phase", ["acquire", "renew", "release"])
def test_a_crash_at_any_call_locks_nobody_out(make, monkeypatch, kind, error, phase):
    "Each call of the place in turn is the last one, before or after it took effect."
    monkeypatch.setattr(Lease, "ttl", 0.4)
    monkeypatch.setattr(Lease, "settle", 0.05)
    url, at, step = make(kind), 0, 1 if LONG or kind == "folder" else 3
    calls = dict(armed=False, count=0, last=0)

    def hook(name, moment, key):
        calls["count"] += calls["armed"]
        if calls["armed"] and calls["count"] == calls["last"]:
            raise error(f"{name} {moment}")

    while calls["count"] >= calls["last"]:  # until there is no call left to crash at
        at += step
        calls.update(armed=phase == "acquire", count=0, last=at)
        with elsewhere(monkeypatch), contextlib.suppress(error):
            lease = Lease(Hooked(open_place(url), hook), f"r{at}")
            gone(lease)
            calls["armed"] = True
            if phase == "renew":
                lease._hold()
            if phase == "release":
                lease.release()
        calls["armed"] = False
        began = stopwatch()
        while True:
            try:
                after = Lease(open_place(url), f"r{at}")
                break
            except Refused:  # it looks alive, for half a ttl
                assert stopwatch() - began < Lease.ttl
                time.sleep(0.05)
        assert stopwatch() - began <= Lease.ttl + 5, (phase, at)  # the rest is a busy machine's
        after.check()
        after.release()
    assert at > 3


def test_a_notebook_whose_lease_failed_can_try_again_at_once(make):
    "The process lives on, so its name in the log means nothing; that it holds the lease does."
    url, fail = make("memory"), True

    def hook(name, moment, key):
        if fail and name == "keys" and "create" in seen:
            raise OSError("the network is gone")
        seen.append(name)

    seen = []
    with pytest.raises(OSError):
        Lease(Hooked(open_place(url), hook), "a")
    assert process() in open_place(url).read("leases/a/1.json").decode()
    began = stopwatch()
    Lease(open_place(url), "a").release()
    assert stopwatch() - began < Lease.ttl / 2


def test_the_store_takes_back_what_it_committed_without_the_lease(make):
    "Taken over between the fence and the commit, in one process."
    url = make("memory")
    store, other = Store(url), []

    def hook(name, moment, key):
        if (name, moment) == ("create", "before") and key.startswith("seals/"):
            other.append(Lease(open_place(url), "a", take_over=True))

    lease = Lease(store.place, "a")
    store.place = Hooked(store.place, hook)
    with pytest.raises(Refused, match="was taken over by"):
        store.seal(None, "runs/a/x", {}, lease.check)
    assert Store(url).list() == []
    assert len(other) == 1
    lease.release()
    other[0].check()
    other[0].release()


# -- committed and verified


def test_what_a_mount_took_is_committed_until_another_one_shows_it(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/a").write_bytes(os.urandom(100_000))
    store = Store(tmp_path / "drive")
    monkeypatch.setattr(Folder, "session", lambda self: "colab-7f/0a1b/41/52")
    store.seal(tmp_path / "work", "models/a/v1")
    listed = store_ls(store=store.url)
    assert listed["states"] == {"models/a/v1": "committed"} and listed["text"].startswith("committed  models/a/v1")
    assert "0 of them verified; 1 only committed: pass --read-data" in store_verify(store=store.url)["text"]
    assert "through another mount or on another machine" in store_verify(read_data=True, store=store.url)["text"]
    monkeypatch.setattr(Folder, "session", lambda self: "colab-7f/0a1b/42/52")
    assert "1 of them verified" in store_verify(read_data=True, store=store.url)["text"]
    note = json.loads((tmp_path / "drive/verified/models/a/v1.json").read_text())
    assert note["digest"] == store.read("models/a/v1").digest and note["how"] == "read back, in another session"
    assert store_ls(store=store.url)["text"].startswith("verified   models/a/v1")

    # a new seal of the name does not inherit the old one's state
    (tmp_path / "drive/seals/models/a/v1.json").unlink()
    store.seal(tmp_path / "work", "models/a/v1", {"again": True})
    assert store.state("models/a/v1") == "committed"
    monkeypatch.setattr(Folder, "session", lambda self: "")
    assert store.verify("models/a/v1", read_data=True) == []
    assert store.state("models/a/v1") == "verified"


def test_damage_is_never_verified(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/a").write_bytes(os.urandom(100_000))
    store = Store(tmp_path / "store")
    store.seal(tmp_path / "work", "models/a/v1")
    blob = tmp_path / "store" / store.place.keys("blobs")[0]
    blob.write_bytes(b"x" * 100_000)
    assert len(store.verify("models/a/v1", read_data=True)) == 1
    assert store.state("models/a/v1") == "committed"
    store.seal(tmp_path / "work", "models/a/v2")  # mends the blob
    assert store.verify("models/a/v1", read_data=True) == []
    assert store.state("models/a/v1") == "verified"
    blob.write_bytes(b"x" * 99_000)
    assert len(store.verify("models/a/v1")) == 1
    assert store.state("models/a/v1") == "committed"
    for junk in (b"", b"[]", b'{"digest": 1}'):
        (tmp_path / "store/verified/models/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "store/verified/models/a/v1.json").write_bytes(junk)
        assert store.state("models/a/v1") == "committed"


def test_a_service_that_compares_checksums_has_verified_at_once(make, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/a").write_bytes(os.urandom(100_000))
    for kind in ("gcs", "s3"):
        store = Store(make(kind))
        assert "compared by the service" in store.seal(tmp_path / "work", "models/a/v1").checked
        assert store.state("models/a/v1") == "verified"


def test_a_mount_in_user_space_is_recognised(tmp_path):
    device = os.stat(tmp_path).st_dev
    line = f"{{}} 29 {os.major(device)}:{os.minor(device)} / /content/drive rw,nosuid - {{}} drive rw\n"
    table = tmp_path / "mountinfo"
    for kind in ("ext4", "fuseblk", "tmpfs"):
        table.write_text(line.format(41, kind))
        assert _fuse(tmp_path, table) == ""
    table.write_text("22 1 0:5 / /proc rw - proc proc rw\n" + line.format(41, "fuse.drive"))
    first = _fuse(tmp_path, table)
    table.write_text(line.format(57, "fuse.drive"))
    assert first and first != _fuse(tmp_path, table)
    assert _fuse(tmp_path, tmp_path / "none") == ""
