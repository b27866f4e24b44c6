"""Retention, against what breaks it: random rules on random stores, a crash at every call, writers that come in between, refs that move.

`Memory` is a place with a clock that the test turns; everything else about it is what every place promises.
"""

import hashlib
import itertools
import os
import random
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from waystation import bill, retention, transfer
from waystation import seal as seals
from waystation.place import Entry, Folder, Place
from waystation.remotes import COLD, WARM, Bucket, _when
from waystation.retention import prune, retire
from waystation.runtime import Refused
from waystation.seal import SMALL, blob_key
from waystation.store import Store
from waystation.transfer import sync

DAY, PROVE = 86_400.0, os.environ.get("WAYSTATION_PROVE") == "1"
SIZE = SMALL + 1000  # of a file that becomes a blob


class Crash(BaseException):
    "The process is gone; nothing catches it."


class Memory(Place):
    url, workers = "memory:", 1

    def __init__(self, files=None):
        self.files: dict[str, tuple[bytes, float]] = dict(files or {})
        self.now = 1_000_000.0
        self.calls = 0
        self.die_at: int | None = None
        self.before: dict = {}  # name of a method -> called once before it

    def _call(self, name):
        if hook := self.before.pop(name, None):
            hook()
        self.now += 0.001
        self.calls += 1
        if self.calls == self.die_at:
            raise Crash

    def create(self, key, data):
        self._call("create")
        if key in self.files:
            return self.files[key][0] == data
        self.files[key] = data, self.now
        return True

    def put(self, key, path, digest):
        self._call("put")
        data = Path(path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        self.files[key] = data, self.now

    def read(self, key):
        self._call("read")
        if key not in self.files:
            raise FileNotFoundError(key)
        return self.files[key][0]

    def chunks(self, key, size):
        return [self.read(key)]

    def size(self, key):
        self._call("size")
        return len(self.files[key][0]) if key in self.files else None

    def entries(self, prefix):
        self._call("entries")
        return [Entry(k, len(d), at) for k, (d, at) in self.files.items() if not prefix or k.startswith(prefix + "/")]

    def delete(self, keys):
        for key in keys:  # each is a request of its own, and may be the last
            self._call("delete")
            self.files.pop(key, None)

    def later(self, seconds):
        self.now += seconds


@pytest.fixture(autouse=True)
def packed(request, monkeypatch):
    "Whether files travel together; where a test does not ask, each is a blob of its own, so that seals share some of their blobs."
    together = getattr(request, "param", False)
    if not together:
        monkeypatch.setattr(seals, "PACKED", 0)
    return together


both_ways = pytest.mark.parametrize("packed", [False, True], indirect=True, ids=["alone", "packed"])


@pytest.fixture
def folder(tmp_path):
    "Make a folder of files, each from a number: equal numbers, equal bytes."
    count = iter(range(10**6))

    def make(*numbers):
        path = tmp_path / f"folder{next(count)}"
        path.mkdir()
        for i, n in enumerate(numbers):
            (path / f"f{i}").write_bytes(random.Random(n).randbytes(SIZE))
        return path

    return make


def age(place, seconds, *prefixes):
    "Make what lies in a place older."
    if isinstance(place, Memory):
        place.files = {k: (d, at - seconds if k.startswith(prefixes) else at) for k, (d, at) in place.files.items()}
        return
    if isinstance(place, Folder):
        for e in place.entries(""):
            if e.key.startswith(prefixes):
                os.utime(place.path(e.key), (e.modified - seconds, e.modified - seconds))
        return
    for path, f in place.fs.store.items():
        if path.startswith(tuple(place.path(p) for p in prefixes)):
            import datetime

            f.created -= datetime.timedelta(seconds=seconds)


def du(place):
    return sum(e.size for e in place.entries("") if not e.key.startswith("verified/"))  # `whole` writes those


def whole(store):
    return [w for n in store.list() for w in store.verify(n, read_data=True)]


PLACES = {"clock": lambda t: Memory(), "folder": lambda t: Folder(t / "store"), "memory": lambda t: Bucket(f"memory://{t.name}-{random.random()}/x")}


@both_ways
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("seed", range(40 if PROVE else 4))
def test_random_stores(kind, seed, tmp_path, folder):
    "Whatever the rules: every seal left is whole, what must stay is there, and exactly the bytes of the dry run return."
    rng = random.Random(seed)
    store = Store(PLACES[kind](tmp_path))
    files = [folder(*rng.sample(range(8), rng.randint(1, 3))) for _ in range(6)]
    prefix, loss, reported = "runs/a/train/1/checkpoints", {}, []
    for round in range(3):
        for n in rng.sample(range(100), 5):
            name = f"{prefix}/{round * 1000 + n}"
            loss[name] = rng.random()
            store.seal(rng.choice(files), name, {"eval_loss": loss[name]})
        store.publish(rng.choice(files), "models/a")
        store.refer("models/a/current", named := rng.choice(store.list(prefix)))
        reported.append(rng.choice(store.list(prefix)))
        store.seal(None, f"runs/a/train/{round + 1}/report", {"files": {"adapter": [reported[-1], "f0"]}})
        store.seal(folder(2000 + round), "killed")  # what an upload leaves that was killed before its manifest
        store.place.delete(["seals/killed.json"])
        damaged = f"{prefix}/{round * 1000 + 990}"
        if torn := rng.random() < 0.5:  # the newest and best lost a blob
            newest = store.seal(folder(1000 + round), damaged, {"eval_loss": rng.choice([-1, 2])})
            store.place.delete([blob_key(d) for d in newest.blobs])
        names = store.list(prefix)
        good = [n for n in names if n != damaged]
        last, top, every = rng.randint(0, 3), rng.randint(0, 2), rng.choice([0, 2, 7])
        last, best = last or not (top or every), rng.choice(["min", "max"])
        rules = {"keep_last": int(last), "keep_best": top, "best": best, "keep_every": every, "grace": 0}
        age(store.place, 10, "blobs")
        would, before = prune(store.place, prefix, **rules, dry_run=True), du(store.place)
        did, left = store.prune(prefix, **rules), store.list(prefix)
        assert set(names) - set(left) == set(would["goes"]) == set(did["goes"])
        assert before - du(store.place) == would["bytes"] > 0
        ranked = sorted(good, key=lambda n: loss[n], reverse=best == "max")
        must = {named, *reported, good[-1], *good[len(good) - last :], *ranked[:top], *(n for n in good if every and int(n.split("/")[-1]) % every == 0)}
        assert set(left) - {damaged} == must
        assert all(damaged in w for w in whole(store)) and bool(whole(store)) == torn
        assert {k.split("/")[0] for k in store.place.keys("")} <= {"seals", "blobs", "refs", "verified"}
        assert {k.split("/", 1)[1] for k in store.place.keys("verified")} <= {k.split("/", 1)[1] for k in store.place.keys("seals")}
        store.place.delete([f"seals/{damaged}.json"])
    assert store.list("models") == ["models/a/v1", "models/a/v2", "models/a/v3"]


def test_best_in_both_directions(folder):
    for best, kept in ("min", 2), ("max", 3):
        store = Store(Memory())
        for n, loss in (1, 0.5), (2, 0.1), (3, 0.9), (4, 0.5), (5, 0.3):
            store.seal(folder(n), f"c/{n}", {"eval": {"loss": loss}})
        assert retire(store, "c", keep_best=1, metric="eval.loss", best=best) == [f"c/{n}" for n in (1, 2, 3, 4) if n != kept]
        assert store.list("c") == [f"c/{kept}", "c/5"]
    with pytest.raises(Refused, match="metric='acc' is in the meta of none"):
        prune(store.place, "c", keep_best=1, metric="acc")
    assert retire(store, "c", keep_best=1, metric="acc") == []
    with pytest.raises(Refused, match="no direction"):
        retire(store, "c", keep_best=1, best="up")
    with pytest.raises(Refused, match="holds shards"):
        prune(store.place, "runs/a/embed/1/shards", keep_last=1)


def stay(place, times=3):
    "Let days pass, with a prune on each."
    for _ in range(times):
        place.later(3 * DAY)
        prune(place, "c", keep_last=2)
    return {k for k in place.files if not k.startswith("verified/")}


@both_ways
def test_a_crash_at_every_call_leaves_everything_readable(folder, packed):
    "Every call that a prune makes is the last one once; then all is whole, and running it again ends where the first would have."
    start = Store(Memory())
    for n in range(1, 7):
        start.seal(folder(0, n), f"c/{n}", {"eval_loss": n})
    start.refer("models/x/current", "c/2")
    start.place.later(DAY)
    prune(start.place, "c", keep_last=4)  # leaves a note, whose time is up in the next prune
    start.seal(folder(77), "x")
    start.place.delete(["seals/x.json"])
    start.place.later(2 * DAY)

    def copy():
        place = Memory(start.place.files)
        place.now = start.place.now
        return place

    done = copy()
    prune(done, "c", keep_last=2)
    calls, end = done.calls, stay(done)
    assert calls > 25 and len([k for k in end if k.startswith("blobs/")]) == (3 if packed else 4)  # three seals share a file, which packs do not
    for die_at in range(1, calls + 1):
        place = copy()
        place.die_at = die_at
        with pytest.raises(Crash):
            prune(place, "c", keep_last=2)
        place.die_at = None
        store = Store(place)
        assert whole(store) == [] and {"c/2", "c/5", "c/6"} <= set(store.list()), die_at
        prune(place, "c", keep_last=2)
        assert whole(store) == [] and store.list() == ["c/2", "c/5", "c/6"], die_at
        assert stay(place) == end, die_at


def left_behind(folder, expired):
    "A store with a blob that no seal names; with `expired`, one prune has condemned it, and the next one that comes deletes it."
    store = Store(Memory())
    store.seal(folder(1), "c/1")
    store.place.delete(["seals/c/1.json"])
    store.place.later(2 * DAY)
    if expired:
        prune(store.place, grace=retention.GRACE)
        store.place.later(2 * DAY)
    return store


@pytest.mark.parametrize("hold", [0, 0.5, 1.9])
def test_a_writer_that_deduplicates_at_any_moment_of_a_prune(folder, hold):
    """A writer has seen a blob and commits up to two hours later; the prune that condemns, or the one that deletes, comes at any moment of it.

    With the default grace its seal is whole each time; with no grace some are torn, which shows that this test can find it.
    """
    for grace, safe in (retention.GRACE, True), (0.0, False):
        torn = 0
        for at in range(1, 40):
            for expired in (False, True):
                store = left_behind(folder, expired)
                place = store.place
                writer, work, commit = Store(place), folder(1), []

                def upload(writer=writer, work=work, commit=commit):
                    commit.append(writer._upload(work))

                calls, original = place.calls, place._call

                def step(name, place=place, calls=calls, original=original, upload=upload, commit=commit, at=at):
                    if place.calls == calls + at and not commit:
                        commit.append(None)
                        commit.clear()
                        place._call = original
                        upload()
                        place.later(hold * 3600)
                    original(name)

                place._call = step
                retention.LOOK, look = 0.01, retention.LOOK
                try:
                    try:
                        prune(place, grace=grace)
                    except Refused:
                        torn += 1
                        continue
                    finally:
                        retention.LOOK = look
                    place._call = original
                    if not commit:
                        break
                    writer._commit("c/2", commit[0], {}, None)
                finally:
                    retention.LOOK = look
                torn += bool(writer.verify("c/2"))
                place.later(hold * 3600)
                for _ in range(3):
                    prune(place)
                    place.later(2 * DAY)
                assert not safe or writer.verify("c/2") == []
        assert (torn == 0) == safe, (torn, grace)


@pytest.mark.parametrize("hold", [0, 1.9])
def test_a_sync_at_any_moment_of_a_prune_of_its_target(folder, hold, monkeypatch, tmp_path):
    """A sync looks at its target, and creates the manifest up to two hours later; the prune that condemns, or the one that deletes, comes at any moment.

    With the default grace the seal is whole as soon as it is visible; with no grace some are torn, which shows that this test can find it.
    """
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retention, "LOOK", 0.01)
    source = Store(Memory())
    source.place.url = "memory:source"
    source.seal(folder(1), "c/2")
    for grace, safe in (retention.GRACE, True), (0.0, False):
        torn = rounds = 0
        for at, expired in itertools.product(range(1, 60), (False, True)):
            store = left_behind(folder, expired)
            place = store.place
            start, original, create, begun = place.calls, place._call, place.create, []
            ready, go = threading.Event(), threading.Event()

            def waiting(key, data, create=create, ready=ready, go=go):
                if key.startswith("seals/"):
                    ready.set()
                    assert go.wait(20)
                return create(key, data)

            def step(name, place=place, start=start, original=original, begun=begun, at=at, ready=ready):
                # a deletion that hangs on its way for longer than LOOK is the gap that retention names
                if place.calls >= start + at and name != "delete" and not begun:
                    place._call = original
                    begun.append(threading.Thread(target=sync, args=(source.place, place)))
                    begun[0].start()
                    assert ready.wait(20)  # all has been sent, and the manifest is about to be
                    place.later(hold * 3600)
                original(name)

            place._call, place.create = step, waiting
            try:
                prune(place, grace=grace)
            except Refused:
                torn += 1
            place._call, place.create = original, create
            go.set()
            if not begun:
                continue
            begun[0].join()
            rounds += 1
            assert not safe or store.verify("c/2") == [], (at, expired)
            torn += bool(store.verify("c/2"))
            for _ in range(3):
                place.later(hold * 3600 or 2 * DAY)
                prune(place)
            assert not safe or store.verify("c/2") == [], (at, expired)
        assert rounds > 10 and (torn == 0) == safe, (torn, grace)


def alike(folder, count):
    "A folder of files that a prune deletes in one go: their hashes begin with the same two digits."
    path, n = folder(), itertools.count()
    while len(list(path.iterdir())) < count:
        data = next(n).to_bytes(8, "big") + b"-" * SIZE
        if hashlib.sha256(data).hexdigest().startswith("a7"):
            (path / f"f{len(list(path.iterdir()))}").write_bytes(data)
    return path


def test_a_sync_beside_a_prune_that_is_deleting(folder, monkeypatch, tmp_path):
    "What the collector is about to delete was stored again a moment ago; the manifest comes when it has been outwaited."
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retention, "LOOK", 1.0)
    source, store, work = Store(Memory()), Store(Memory()), alike(folder, 7)
    source.place.url = "memory:source"
    source.seal(work, "c/2")
    place = store.place
    store.seal(work, "c/1")
    place.delete(["seals/c/1.json"])
    for deleting in False, True:
        place.later(2 * DAY)
        begun, original = threading.Event(), place._call

        def slow(name, begun=begun, original=original):
            original(name)
            if name == "delete" and threading.current_thread().name == "prune":
                begun.set()
                time.sleep(0.03)

        pruning = threading.Thread(target=prune, args=(place,), name="prune")
        place._call = slow
        pruning.start()
        if deleting:
            assert begun.wait(20)
            time.sleep(0.05)  # at its blobs
            sync(source.place, place)
        pruning.join()
        place._call = original
    assert store.list() == ["c/2"] and whole(store) == []


def test_a_sync_that_takes_longer_than_a_blob_is_condemned(folder, monkeypatch, tmp_path):
    "Hours lie between the seals of one sync: each is whole from the moment when it is visible."
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "BATCH", 1)
    monkeypatch.setattr(retention, "FRESH", 1.0)
    monkeypatch.setattr(retention, "LOOK", 0.01)
    source, store = Store(Memory()), Store(Memory())
    source.place.url = "memory:source"
    for n in 1, 2:
        source.seal(folder(n), f"c/{n}")
    place, seen = store.place, []
    store.seal(folder(2), "c/0")
    place.delete(["seals/c/0.json"])
    place.later(DAY)
    create = place.create

    def pruned(key, data):
        if key.startswith("seals/"):
            prune(place)  # before the first it condemns, before the second it would delete
            place.later(2 * DAY)
            if not seen:
                time.sleep(1.1)
            made = create(key, data)
            seen.append(whole(store))
            return made
        return create(key, data)

    place.create = pruned
    sync(source.place, place)
    assert seen == [[], []] and store.list() == ["c/1", "c/2"]


def test_a_ref_that_comes_while_its_seal_goes(folder):
    "Either the ref is refused, or the seal is put back: never does a ref name nothing."
    for at in range(1, 60):
        store = Store(Memory())
        for n in 1, 2:
            store.seal(folder(n), f"c/{n}")
        place, refused, original = store.place, [], store.place._call

        def step(name, place=place, start=store.place.calls, original=original, refused=refused, at=at, store=store):
            if place.calls == start + at:
                place._call = original
                try:
                    store.refer("keep", "c/1")
                except Refused:
                    refused.append(True)
            original(name)

        place._call = step
        prune(place, "c", keep_last=1)
        if place._call == step:
            assert at > 15  # the prune has had fewer calls
            break
        assert store.has("c/1") or refused, at


def test_a_damaged_manifest_stops_collection(folder):
    store = Store(Folder(folder() / "store"))
    for n in 1, 2, 3:
        store.seal(folder(n), f"c/{n}")
    path = store.place.path("seals/c/1.json")
    path.write_bytes(path.read_bytes().replace(b'"size"', b'"siza"'))
    before = store.place.keys("blobs")
    with pytest.raises(Refused, match=r"'c/1'.*damaged manifest, so nobody knows which blobs"):
        prune(store.place, "c", keep_last=1, grace=0)
    assert store.place.keys("blobs") == before and store.list("c") == ["c/1", "c/2", "c/3"]
    assert retire(store, "c", keep_last=1) == ["c/2"]  # what retire removes are manifests that it has read
    note = store.place.path("condemned/1.json")
    note.parent.mkdir()
    note.write_bytes(b"{")
    path.unlink()
    with pytest.raises(Refused, match=r"condemned/1.json .* is damaged"):
        prune(store.place)


@pytest.mark.parametrize("expired", [False, True])
def test_what_is_condemned_is_stored_again(folder, monkeypatch, expired):
    "Once, for one LIST an hour; twice if its time was over, when a collector may be at work on it this moment."
    monkeypatch.setattr(retention, "LOOK", 0.01)
    place = Memory()
    place.now = time.time() - 2 * DAY
    store, work = Store(place), folder(1, 2)
    store.seal(work, "c/1")
    place.delete(["seals/c/1.json"])
    place.now = time.time() - (1.5 * DAY if expired else 0)
    assert prune(place)["condemned"] == 2
    asked = []
    monkeypatch.setattr(place, "_call", asked.append)
    other = Store(place)
    other.seal(work, "c/2")
    other.seal(work, "c/3")
    assert asked.count("put") == (4 if expired else 2)
    assert asked.count("entries") == 3  # one for each of the names, whether it is a ref, and one for the condemned


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_prune_on_a_server(server, folder, kind):
    with server(kind).environ() as s:
        store = Store(f"{s.url.rstrip('/')}/prune")
        for n in 1, 2, 3:
            store.seal(folder(0, n), f"c/{n}", {"eval_loss": n})
        store.refer("keep", "c/1")
        time.sleep(1.1)  # S3 has whole seconds
        would, before = store.prune("c", keep_last=1, grace=0, dry_run=True), du(store.place)
        assert store.prune("c", keep_last=1, grace=0)["goes"] == ["c/2"]
        assert before - du(store.place) == would["bytes"] > SIZE
        assert Store(store.url).list() == ["c/1", "c/3"] and whole(store) == []
        Store(store.url).seal(folder(2), "c/4")
        assert whole(store) == []


def condemned_in(store, folder, monkeypatch):
    "A store with a seal that a ref names, and a blob that was condemned."
    store.seal(folder(1), "models/a/v1")
    store.refer("models/a/current", "models/a/v1")
    loose = store.seal(folder(2), "c/1")
    store.place.delete(["seals/c/1.json"])
    monkeypatch.setattr(retention, "FRESH", 0)
    time.sleep(1.1)  # S3 has whole seconds
    prune(store.place, grace=1000)
    monkeypatch.undo()
    return blob_key(next(iter(loose.blobs)))


def test_a_lifecycle_rule_of_s3_reaches_condemned_blobs_alone(server, folder, monkeypatch):
    with server("s3").environ() as s3:
        store = Store(f"{s3.url.rstrip('/')}/lifecycle")
        loose = condemned_in(store, folder, monkeypatch)
        place, bucket = store.place, store.place.root.split("/")[0]

        def tags(key):
            return place.fs.call_s3("get_object_tagging", Bucket=bucket, Key=place.path(key).partition("/")[2])["TagSet"]

        other = {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}
        place.fs.call_s3("put_bucket_lifecycle_configuration", Bucket=bucket, LifecycleConfiguration={"Rules": [other]})
        assert bill.lifecycle(store, 30, yes=True)["marks"] == 0  # its grace is not over
        shown = bill.lifecycle(store, 30, grace=0)
        assert shown["marks"] == 1 and not tags(loose)
        for _ in range(2):
            bill.lifecycle(store, 30, yes=True, grace=0)
        rules = place.fs.call_s3("get_bucket_lifecycle_configuration", Bucket=bucket)["Rules"]
        assert [r["ID"] for r in rules] == ["logs", "waystation-condemned:lifecycle", "waystation-condemned-parts:lifecycle"]
        assert rules[1]["Filter"]["And"] == {"Prefix": "lifecycle/blobs/", "Tags": [{"Key": "waystation", "Value": "condemned"}]}
        marked = [k for k in place.keys("blobs") if tags(k)]
        assert marked == [loose]
        monkeypatch.setattr(retention, "LOOK", 0.01)
        Store(store.url).seal(folder(2), "c/2")  # the same bytes again: stored anew, and no longer marked
        assert [k for k in place.keys("blobs") if tags(k)] == []


def test_the_requests_of_a_lifecycle_rule_of_gcs(server, folder, monkeypatch):
    "The emulator drops lifecycle rules, so that what would be sent is looked at."
    with server("gcs").environ() as gcs:
        store = Store(f"{gcs.url.rstrip('/')}/lifecycle")
        loose = condemned_in(store, folder, monkeypatch)
        place, bucket, sent = store.place, store.place.root.split("/")[0], []
        other = {"action": {"type": "Delete"}, "condition": {"age": 3, "matchesPrefix": ["logs/"]}}

        def call(method, path, *args, **more):
            sent.append((method, path.format(*args), more.get("json")))
            return {"lifecycle": {"rule": [other]}} if method == "GET" else {}

        monkeypatch.setattr(place.fs, "call", call, raising=False)
        time.sleep(0.1)
        assert bill.lifecycle(store, 30, grace=0)["marks"] == 1 and len(sent) == 1
        bill.lifecycle(store, 30, yes=True, grace=0)
    assert sent[2][:2] == ("PATCH", f"b/{bucket}/o/lifecycle/{loose}") and list(sent[2][2]) == ["customTime"]
    rule = {"action": {"type": "Delete"}, "condition": {"daysSinceCustomTime": 30, "matchesPrefix": ["lifecycle/blobs/"]}}
    assert sent[3:] == [("PATCH", f"b/{bucket}", {"lifecycle": {"rule": [other, rule]}})]


def cooling(url, folder):
    "A store with a seal that a ref names, one that a report names, and an old one that shares a blob with the first."
    store = Store(f"{url.rstrip('/')}/cold-{time.time_ns()}")
    store.seal(folder(1, 2), "c/2")
    store.refer("models/a/current", "c/2")
    store.seal(folder(3), "c/3")
    store.seal(None, "runs/r/train/1/report", {"files": {"adapter": ["c/3", "f3"]}})
    old = store.seal(folder(1, 4, 5), "c/1")
    kept = {blob_key(d) for n in ("c/2", "c/3") for d in store.read(n).blobs}
    return store, {blob_key(d) for d in old.blobs} - kept


def tags_of(place):
    bucket = place.root.split("/")[0]

    def tags(key):
        return [t["Value"] for t in place.fs.call_s3("get_object_tagging", Bucket=bucket, Key=place.path(key).partition("/")[2])["TagSet"]]

    return {k: t for k in place.keys("blobs") if (t := tags(k))}


def test_s3_moves_what_no_ref_names(server, folder, tmp_path):
    with server("s3").environ() as s3:
        store, cold = cooling(s3.url, folder)
        place, name = store.place, store.place.root.partition("/")[2]
        bucket, other = place.root.split("/")[0], {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 3}}
        place.fs.call_s3("put_bucket_lifecycle_configuration", Bucket=bucket, LifecycleConfiguration={"Rules": [other]})

        def rules():
            return place.fs.call_s3("get_bucket_lifecycle_configuration", Bucket=bucket)["Rules"]

        shown = bill.lifecycle(store, cold_after=30, cold_class="standard_ia")
        assert len(cold) == 2 and shown["cold"] == 2 and shown["cold_bytes"] == 2 * SIZE and rules() == [other] and tags_of(place) == {}
        for _ in range(2):
            bill.lifecycle(store, cold_after=30, cold_class="STANDARD_IA", yes=True)
        assert [r["ID"] for r in rules()] == ["logs", f"waystation-condemned-parts:{name}", f"waystation-cold:{name}"]
        assert rules()[2]["Filter"] == {"And": {"Prefix": f"{name}/blobs/", "Tags": [{"Key": "waystation", "Value": "cold"}]}}
        assert rules()[2]["Transitions"] == [{"Days": 30, "StorageClass": "STANDARD_IA"}]
        assert tags_of(place) == {k: ["cold"] for k in cold}
        bill.lifecycle(store, 40, 90, "GLACIER_IR", yes=True)
        assert rules()[3]["Transitions"] == [{"Days": 90, "StorageClass": "GLACIER_IR"}] and len(rules()) == 4
        Store(store.url).refer("models/a/old", "c/1")
        assert tags_of(place) == {} and bill.lifecycle(store, 40, 90, "GLACIER_IR")["cold"] == 0
        bill.lifecycle(store, 40, yes=True)
        assert [r["ID"] for r in rules()] == ["logs", f"waystation-condemned:{name}", f"waystation-condemned-parts:{name}"]

        moved = sorted(cold)[0]  # as the bucket would: it is read as before, priced by its class, and not moved again
        key = place.path(moved).partition("/")[2]
        place.fs.call_s3("copy_object", Bucket=bucket, Key=key, CopySource=f"{bucket}/{key}", StorageClass="GLACIER_IR")
        bill_of = bill.cost(store, rates={"s3.standard": 0.02, "s3.glacier_ir": 0.004})
        assert bill_of["kinds"]["blobs"]["GLACIER_IR"] == {"bytes": SIZE, "files": 1, "month": SIZE / 1e9 * 0.004} and bill_of["unpriced"] == []
        store.fetch("c/1", tmp_path / "out")


def test_gcs_moves_what_no_ref_names(server, folder, monkeypatch):
    "The emulator drops lifecycle rules, so that what would be sent is looked at; the marks are real."
    with server("gcs").environ() as gcs:
        store, cold = cooling(gcs.url, folder)
        place, name = store.place, store.place.root.partition("/")[2]
        other = {"action": {"type": "SetStorageClass", "storageClass": "COLDLINE"}, "condition": {"age": 3, "matchesPrefix": ["logs/"]}}
        sent, ask = [{"rule": [other]}], place.fs.call

        def call(method, path, *args, **more):
            if path != "b/{}":
                return ask(method, path, *args, **more)
            if method == "PATCH":
                sent.append(more["json"]["lifecycle"])
            return {"lifecycle": sent[-1]}

        monkeypatch.setattr(place.fs, "call", call, raising=False)
        shown = bill.lifecycle(store, 0, 90, "nearline")
        assert shown["cold"] == 2 and len(sent) == 1 and place.custom_times() == {}
        bill.lifecycle(store, 0, 90, "nearline", yes=True)
        rule = {"action": {"type": "SetStorageClass", "storageClass": "NEARLINE"},
                "condition": {"age": 90, "customTimeBefore": "2100-01-02", "matchesPrefix": [f"{name}/blobs/"]}}
        assert sent[1:] == [{"rule": [other, rule]}] and place.custom_times() == dict.fromkeys(cold, COLD)
        assert bill.lifecycle(store, 30, 60, "ARCHIVE", yes=True)["cold"] == 0  # they are marked
        assert [r["action"]["type"] for r in sent[2]["rule"]] == ["SetStorageClass", "Delete", "SetStorageClass"] and sent[2]["rule"][0] == other
        Store(store.url).refer("models/a/old", "c/1")
        assert place.custom_times() == dict.fromkeys(cold, WARM)  # a custom time only grows; nothing counts from this one, or moves what has it
        assert bill.lifecycle(store, 0, 90, "nearline")["cold"] == 0
        for n in "c/1", "c/2":
            place.delete([f"seals/{n}.json"])
        place.delete(list(place.keys("refs")))
        monkeypatch.setattr(retention, "FRESH", 0)
        time.sleep(0.1)
        prune(place, grace=1000)
        time.sleep(0.1)
        marked = bill.lifecycle(store, 30, yes=True, grace=0)["marks"]
        assert marked == 2 and {k for k, t in place.custom_times().items() if t not in (COLD, WARM)}.isdisjoint(cold)


@pytest.mark.parametrize("how", ["refer", "a look too early"])
def test_a_ref_that_comes_while_blobs_are_marked(server, folder, monkeypatch, how):
    with server("s3").environ() as s3:
        store, cold = cooling(s3.url, folder)
        place, came = store.place, []
        mark = type(place).mark

        def marked(self, key, how_):
            mark(self, key, how_)
            if how_ == "cold" and not came:
                came.append(key)
                if how == "refer":
                    Store(store.url).refer("models/a/old", "c/1")
                else:
                    place.create("refs/models/a/old/1.json", b'{"name": "c/1"}')

        monkeypatch.setattr(type(place), "mark", marked)
        bill.lifecycle(store, cold_after=30, cold_class="GLACIER_IR", yes=True)
        assert came and tags_of(place) == {}
        assert store.refs("models") == {"models/a/current": "c/2", "models/a/old": "c/1"} and cold


def test_a_sync_brings_a_ref_to_what_was_marked(server, folder, tmp_path):
    with server("s3").environ() as s3:
        store, cold = cooling(s3.url, folder)
        other = Store(tmp_path / "other")
        other.sync(store)
        bill.lifecycle(store, cold_after=30, cold_class="GLACIER_IR", yes=True)
        assert tags_of(store.place).keys() == cold
        other.refer("models/a/old", "c/1")
        assert other.sync(store)[0].refs == ["models/a/old"] and tags_of(store.place) == {}


def test_a_mark_of_gcs_does_not_make_a_blob_younger():
    "A mark or a move to another class updates an object; it was written when it was created."
    then, now = "2026-01-01T00:00:00Z", "2026-06-01T00:00:00Z"
    when = datetime.fromisoformat
    assert _when({"timeCreated": then, "updated": now, "mtime": when(now), "ctime": when(then)}) == when(then).timestamp()


def test_what_a_lifecycle_refuses(server):
    with server("gcs").environ() as gcs:
        store = Store(f"{gcs.url.rstrip('/')}/refused")
        for how, said in (({}, "one of the two"), (dict(cold_after=3), "needs both"), (dict(cold_class="NEARLINE"), "needs both"),
                          (dict(cold_after=3, cold_class="GLACIER"), "it has NEARLINE, COLDLINE, ARCHIVE"), (dict(delete_after=-1), "from 1 on")):
            with pytest.raises(Refused, match=said):
                bill.lifecycle(store, **how)


def test_the_commands(cli, env, folder):
    store = Store(env["WAYSTATION_STORE"])
    for n in 1, 2, 3:
        store.seal(folder(0, n), f"c/{n}")
    would = cli("store", "prune", "c", "--keep-last", 1, "--grace", 0, "--dry-run", "--json")
    assert would["goes"] == ["c/1", "c/2"] and 2 * SIZE < would["bytes"] < 2 * SIZE + 2000
    time.sleep(0.1)
    before = du(store.place)
    cli("store", "prune", "c", "--keep-last", 1, "--grace", 0)
    assert before - du(store.place) == would["bytes"]
    assert "no price for folder: set `folder = " in cli("store", "cost")
    (Path(env["WAYSTATION_STORE"]) / "settings.ini").write_text("[prices]\nfolder = 1000\n")
    assert cli("store", "cost", "--json")["month"] == pytest.approx(du(store.place) / 1e6)
    cli("store", "lifecycle", "--delete-after", 30, code=2)
