"""Copy, sync and mirror, against real servers, kill -9, a bad network, and a crash at every single call.

Short here; WAYSTATION_PROVE=1 makes the rounds many.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from proxy import proxy

from waystation.place import Folder, Place
from waystation.remotes import open_place
from waystation.runtime import Refused
from waystation.store import Store
from waystation.transfer import copy, sync

LONG = os.environ.get("WAYSTATION_PROVE") == "1"
KINDS = ["gcs", "s3", "rclone_remote"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def far(server, tmp_path):
    "`far('gcs')`: the URL of an empty folder on a server that this process can use."
    with contextlib.ExitStack() as stack:

        def use(kind):
            place = stack.enter_context(server(kind).environ())
            return f"{place.url}/{tmp_path.name}"

        yield use


def fill(folder: Path, files: int = 3, size: int = 200_000, seed: int = 0) -> dict[str, bytes]:
    "Files as people name them, one of them empty, one longer than a chunk when asked."
    rng, content = random.Random(seed), {"größe 三/naïve & co.parquet": b"x", "empty.jsonl": b"", "a/b/c/deep file.txt": b"deep"}
    content |= {f"part {n}/rows-{n}.bin": rng.randbytes(size) for n in range(files)}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return content


def tree(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# -- plain files


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_there_and_come_back(far, tmp_path, kind):
    url, content = far(kind), fill(tmp_path / "data")
    (tmp_path / "data/large.bin").write_bytes(content.setdefault("large.bin", random.Random(9).randbytes(9_000_000)))
    assert copy(tmp_path / "data", url)["copied"] == len(content)
    assert copy(tmp_path / "data", url)["there"] == len(content)
    copy(url, tmp_path / "back")
    assert tree(tmp_path / "back") == content
    assert tree(tmp_path / "data") == content
    assert copy(url, tmp_path / "back")["copied"] == 0
    copy(f"{url}/part 1/rows-1.bin", tmp_path / "one")
    assert tree(tmp_path / "one") == {"rows-1.bin": content["part 1/rows-1.bin"]}
    copy(tmp_path / "data/large.bin", f"{url}/renamed.bin")
    assert open_place(url).size("renamed.bin") == 9_000_000


def test_bucket_to_bucket_and_to_a_remote(far, tmp_path):
    content = fill(tmp_path / "data", files=2)
    a, b, c = (far(k) for k in KINDS)
    for src, dst in ((tmp_path / "data", a), (a, b), (b, c), (c, tmp_path / "back")):
        assert copy(src, dst)["copied"] == len(content)
        assert copy(src, dst)["copied"] == 0
    assert tree(tmp_path / "back") == content
    assert [f for f in (tmp_path / "cache/transfer").iterdir() if not f.name.startswith("known")] == []


@pytest.mark.parametrize("kind", ["folder", *KINDS])
def test_what_is_there_is_compared_by_content(far, tmp_path, kind):
    url = far(kind) if kind != "folder" else str(tmp_path / "there")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.bin").write_bytes(b"abcdef" * 1000)
    (tmp_path / "data/other.bin").write_bytes(b"other")
    copy(tmp_path / "data", url)

    def put(name, data):
        (tmp_path / "thing.bin").write_bytes(data)
        copy(tmp_path / "thing.bin", f"{url}/{name}", overwrite=True)

    put("rows.bin", b"abcdef" * 10)  # torn: mended
    done = copy(tmp_path / "data", url)
    assert (done["mended"], done["copied"]) == (1, 1)
    put("rows.bin", b"abcdef" * 999 + b"abcdeX")  # same size, one byte: found, named, and nothing else is touched
    with pytest.raises(Refused, match=r"'rows.bin' has 6000 bytes there and 6000 here.*--overwrite"):
        copy(tmp_path / "data", url)
    (tmp_path / "data/new.bin").write_bytes(b"new")
    with pytest.raises(Refused, match="nothing was copied"):
        copy(tmp_path / "data", url)
    assert copy(tmp_path / "data", url, overwrite=True)["copied"] == 2
    copy(url, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "data")
    (tmp_path / "data/rows.bin").write_bytes(b"changed between two runs")
    with pytest.raises(Refused, match="6000 bytes there and 24 here"):
        copy(tmp_path / "data", url)


COPIER = """
import sys
from waystation.transfer import copy
copy(sys.argv[1], sys.argv[2], tick=lambda done, total: print(done, flush=True))
"""


@pytest.mark.parametrize("kind", ["folder", "gcs", "rclone_remote", *(["s3"] if LONG else [])])
def test_a_killed_copy_goes_on(far, tmp_path, kind):
    "kill -9 in the middle: what has its name is whole, and the next run does the rest."
    url = far(kind) if kind != "folder" else str(tmp_path / "there")
    content, rng, killed = fill(tmp_path / "data", files=10, size=1_000_000), random.Random(kind), 0
    for _ in range(20 if LONG else 2):
        p = subprocess.Popen([sys.executable, "-c", COPIER, str(tmp_path / "data"), url], stdout=subprocess.PIPE, text=True)
        for _ in range(rng.randrange(2, 5)):
            p.stdout.readline()
        time.sleep(rng.random() * 0.05)
        p.send_signal(signal.SIGKILL)
        killed += p.wait() == -signal.SIGKILL
        p.stdout.close()
        place = Folder(url) if kind == "folder" else open_place(url)
        for e in place.entries(""):
            if not e.key.startswith((".tmp", ".waystation-parts")):
                assert hashlib.sha256(place.read(e.key)).digest() == hashlib.sha256(content[e.key]).digest()
    assert killed, "no kill fell into a copy: the test proves nothing"
    done = copy(tmp_path / "data", url)
    assert done["there"] > 0
    copy(url, tmp_path / "back")
    assert {k: v for k, v in tree(tmp_path / "back").items() if not k.startswith(".tmp")} == content
    assert not (tmp_path / "there/.waystation-parts").exists()


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_a_bad_network(server, tmp_path, kind):
    "15% of the requests fail, some of them after they took effect."
    content, target = fill(tmp_path / "data", files=10), server(kind)
    with proxy(target.host_port, faults=0.15) as p, target.through(p).environ() as bad:
        url = f"{bad.url}/{tmp_path.name}"
        copy(tmp_path / "data", url)
        copy(url, tmp_path / "back")
        assert p.stats()["faults"]
        stores = two_stores(tmp_path / "a", f"{url}-store", tmp_path)
        assert [m.conflicts + m.wrong for m in stores[0].sync(stores[1])] == [[], []]
        assert_equal(*stores)
    assert tree(tmp_path / "back") == content


def test_names_that_lead_out_write_nothing(tmp_path):
    bucket = open_place("memory://hostile/x")
    for key in ("a/../../out", "a//b"):
        bucket.fs.pipe_file(f"/hostile/x/{key}", b"x")
        with pytest.raises(Refused, match="no plain path"):
            copy("memory://hostile/x", tmp_path / "to")
        bucket.fs.store.clear()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sub").symlink_to("/etc")
    with pytest.raises(Refused, match="link to a folder"):
        copy(tmp_path / "data", tmp_path / "to")
    (tmp_path / "data/sub").unlink()
    fill(tmp_path / "data", files=1)
    (tmp_path / "to").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to/part 0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="symbolic link"):
        copy(tmp_path / "data", tmp_path / "to")
    assert not list((tmp_path / "elsewhere").iterdir())
    with pytest.raises(Refused, match="lies in"):
        copy(tmp_path / "data", tmp_path / "data/a")


# -- two stores


def two_stores(a, b, tmp_path: Path) -> tuple[Store, Store]:
    "Each has what the other lacks, and both have something: small files, packs, and a file that is shared."
    stores, rng = (Store(a), Store(b)), random.Random(1)
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)

    def seal(store, name, *data, meta=None):
        for old in work.iterdir():
            old.unlink()
        for n, d in enumerate(data):
            (work / f"f{n}").write_bytes(d)
        store.seal(work, name, meta)

    shared = rng.randbytes(1_100_000)
    seal(stores[0], "models/a/v1", shared, rng.randbytes(70_000), b"small", rng.randbytes(75_000))
    assert "pack" in stores[0].read("models/a/v1").files["f3"]
    seal(stores[0], "runs/x/train/1/checkpoints/10", shared, rng.randbytes(80_000))
    seal(stores[1], "models/b/v1", shared)
    seal(stores[1], "models/b/v2", rng.randbytes(90_000), meta={"loss": 1.5})
    stores[0].refer("models/a/current", "models/a/v1")
    stores[0].refer("models/a/current", "runs/x/train/1/checkpoints/10")
    stores[1].refer("models/b/current", "models/b/v2")
    return stores


def assert_equal(a: Store, b: Store):
    assert a.list() == b.list()
    assert a.refs() == b.refs()
    for store in (a, b):
        assert [w for n in store.list() for w in store.verify(n, read_data=True)] == []
    for folder in ("seals", "refs"):
        keys = sorted(a.place.keys(folder))
        assert keys == sorted(b.place.keys(folder))
        assert [json.loads(a.place.read(k)) for k in keys] == [json.loads(b.place.read(k)) for k in keys]


@pytest.mark.parametrize("kind", ["folder", *KINDS])
def test_sync_makes_two_stores_equal(far, tmp_path, kind):
    a, b = two_stores(tmp_path / "a", far(kind) if kind != "folder" else tmp_path / "b", tmp_path)
    to_b, to_a = a.sync(b)
    assert (len(to_b.seals), len(to_a.seals), to_b.refs, to_a.refs) == (2, 2, ["models/a/current"], ["models/b/current"])
    assert to_b.blobs == 2, "the shared blob was there"
    assert to_b.conflicts + to_b.wrong + to_a.wrong == []
    assert_equal(a, b)
    to_b, to_a = a.sync(b)
    assert (to_b.seals, to_a.seals, to_b.bytes, to_a.bytes, to_b.refs, to_a.refs) == ([], [], 0, 0, [], [])
    a.seal(None, "models/a/v2", {"n": 2})
    a.refer("models/a/current", "models/a/v2")
    b.sync(a)
    assert b.resolve("models/a/current") == "models/a/v2"


def test_rclone_finds_a_synced_store_equal(server, tmp_path):
    remote = server("rclone_remote")
    with remote.environ():
        a, b = two_stores(tmp_path / "a", f"{remote.url}/{tmp_path.name}-check", tmp_path)
        a.sync(b)
        done = subprocess.run(["rclone", "check", tmp_path / "a", b.url.removeprefix("rclone:"), "--exclude", "/.tmp/**", "--download"],
                              env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 differences found" in done.stderr


def test_a_prefix_takes_along_what_its_refs_name(tmp_path):
    a, b = two_stores(tmp_path / "a", tmp_path / "b", tmp_path)
    a.sync(b, "models/a")
    assert b.list() == ["models/a/v1", "models/b/v1", "models/b/v2", "runs/x/train/1/checkpoints/10"]
    assert a.list("models/b") == []
    assert b.resolve("models/a/current") == "runs/x/train/1/checkpoints/10"


def test_conflicts_are_named_and_touch_nothing(tmp_path):
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    for n, s in enumerate((a, b)):
        s.seal(None, "models/a/v1", {"who": n})
        s.seal(None, f"models/only/{n}", {})
        s.seal(None, "same", {"x": 1})  # made apart, with the same content: no conflict
        s.refer("cur", f"models/only/{n}")  # moved on both sides
        s.refer("to-torn", "models/a/v1")
    a.refer("to-torn", "same")
    a.refer("to-torn", "models/a/v1")
    a.refer("mixed", "same")
    b.seal(None, "mixed", {})
    before = [tree(s.place.root) for s in (a, b)]
    to_b, to_a = a.sync(b)
    told = "\n".join(to_b.conflicts)
    assert "seal 'models/a/v1' has one content" in told and "ref 'cur' was moved on both sides" in told and "'mixed' is a seal in one" in told
    assert "ref 'to-torn' names 'models/a/v1', which is not the same" in told
    assert len(to_b.conflicts) == 4
    assert (to_b.seals, to_a.seals, to_b.refs, to_a.refs) == (["models/only/0"], ["models/only/1"], [], [])
    for s, old in zip((a, b), before, strict=True):
        assert old.items() <= tree(s.place.root).items()


def test_a_damaged_source_is_named_and_not_spread(tmp_path):
    a, b = two_stores(tmp_path / "a", tmp_path / "b", tmp_path)
    blob = next(d for d in a.read("models/a/v1").blobs if d not in a.read("runs/x/train/1/checkpoints/10").blobs)
    path = a.place.path(f"blobs/{blob[:2]}/{blob}")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    manifest = tmp_path / "b/seals/models/b/v2.json"
    manifest.write_text(manifest.read_text().replace("1.5", "0.5"))
    to_b, to_a = a.sync(b)
    assert len(to_b.wrong) == 1 and "does not have the bytes that were sealed" in to_b.wrong[0]
    assert "damaged manifest" in to_a.wrong[0] and "models/b/current" in to_a.wrong[1]
    assert (to_b.seals, to_a.seals) == (["runs/x/train/1/checkpoints/10"], ["models/b/v1"])


class Stop(BaseException):
    pass


class Counting(Place):
    "A place that dies at the n-th call of the two that share `state`, before or after it took effect."
    workers = 1

    def __init__(self, place, state):
        self.place, self.state, self.url, self.checked = place, state, place.url, place.checked

    def _call(self, name, *args):
        self.state["calls"] += 1
        mine = self.state["calls"] == self.state["die"]
        if mine and not self.state["after"]:
            raise Stop
        result = getattr(self.place, name)(*args)
        if name in ("chunks", "entries"):
            result = list(result)
        if mine:
            raise Stop
        return result


for _name in ("create", "put", "read", "chunks", "size", "entries", "delete", "has", "tag"):
    setattr(Counting, _name, lambda self, *args, _name=_name: self._call(_name, *args))


def test_a_crash_at_every_call_of_sync(tmp_path):
    "Enumerated, before and after each call: both stores stay whole, and the next sync makes them equal."
    calls, die = 1, 0
    while die < calls:
        die += 1
        for after in (False, True) if LONG else (False,):  # to die after call n is to die before n + 1
            root = tmp_path / f"{die}-{after}"
            a, b = two_stores(root / "a", "memory://" + str(root)[1:], tmp_path)
            state = {"calls": 0, "die": die, "after": after}
            with contextlib.suppress(Stop):
                sync(Counting(a.place, state), Counting(b.place, state))
                calls = 0  # came through: this was the last
            calls = max(calls, die + 1) if calls else 0
            for s in (a, b):
                assert [w for n in s.list() for w in s.verify(n, read_data=True)] == []
                assert all(s.has(n) for n in s.refs().values())
            assert [m.conflicts + m.wrong for m in a.sync(b)] == [[], []]
            assert_equal(a, b)
    assert die > 40


# -- a mirror


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    assert what()


@pytest.mark.parametrize("kind", ["folder", "gcs"])
def test_a_mirror_follows(far, tmp_path, kind):
    url = far(kind) if kind != "folder" else str(tmp_path / "mirror")
    store = Store(tmp_path / "store", mirror=url)
    (tmp_path / "work").mkdir()
    for n in range(5):
        (tmp_path / "work/f").write_bytes(random.Random(n).randbytes(100_000))
        store.seal(tmp_path / "work", f"models/a/v{n}")
        store.refer("models/a/current", f"models/a/v{n}")
    assert store.drain(20) == "ok"
    assert_equal(store, Store(url))


def test_a_mirror_that_is_away_stops_nothing_and_is_caught_up(server, tmp_path, caplog, monkeypatch):
    target = server("gcs")
    monkeypatch.setattr("waystation.place.Patience.tries", 2)
    with proxy(target.host_port) as p, target.through(p).environ() as t:
        url = f"{t.url}/{tmp_path.name}"
        p.set(down=True)
        store = Store(tmp_path / "store", mirror=url)
        began = time.monotonic()
        for n in range(3):
            store.seal(None, f"models/a/v{n}", {"n": n})
        store.refer("models/a/current", "models/a/v2")
        assert time.monotonic() - began < 2
        until(lambda: store.mirror_failures)
        assert "is behind" in store.drain(5) and "waystation store sync" in store.drain(5)
        assert store.list() == ["models/a/v0", "models/a/v1", "models/a/v2"]
        assert len([r for r in caplog.records if "does not follow" in r.message]) == 1
        p.set(down=False)
        again = Store(tmp_path / "store", mirror=url)  # the next process, which has nothing new
        assert again.drain(20) == "ok"
        assert_equal(again, Store(url))


def test_a_mirror_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "store", mirror=str(tmp_path / "file/mirror"))
    store.seal(None, "a", {})
    until(lambda: store.mirror_failures)
    assert "not writable" in store.drain()
    assert "is the store itself" in Store(tmp_path / "store", mirror=str(tmp_path / "store")).drain()


MIRRORED = """
import sys
from pathlib import Path
import random
from waystation.store import Store
root = Path(sys.argv[1])
store = Store(root / "store", mirror=str(root / "mirror"))
start = len(store.list())
for n in range(start, start + 1000):
    (root / "work").mkdir(exist_ok=True)
    (root / "work/f").write_bytes(random.randbytes(400_000))
    store.seal(root / "work", f"runs/a/train/1/checkpoints/{n}")
    store.refer("cur", f"runs/a/train/1/checkpoints/{n}")
    print(n, flush=True)
"""


def test_kill_leaves_a_mirror_whole(tmp_path):
    rng = random.Random(0)
    for _ in range(50 if LONG else 4):
        p = subprocess.Popen([sys.executable, "-c", MIRRORED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            p.stdout.readline()
        time.sleep(rng.random() * 0.2)
        p.send_signal(signal.SIGKILL)
        p.wait()
        p.stdout.close()
        mirror = Store(tmp_path / "mirror")
        assert [w for n in mirror.list() for w in mirror.verify(n, read_data=True)] == []
        assert all(mirror.has(n) for n in mirror.refs().values())
    assert mirror.list(), "nothing was mirrored: the test proves nothing"
    store = Store(tmp_path / "store", mirror=str(tmp_path / "mirror"))
    assert store.drain(60) == "ok"
    assert_equal(store, mirror)


def test_a_station_reports_its_mirror(tmp_path, monkeypatch):
    from waystation.recipe import begin

    params = {"store": str(tmp_path / "store"), "restart": False, "take_over": False, "step": "embed", "seed": 0}
    monkeypatch.setenv("WAYSTATION_MIRROR", str(tmp_path / "mirror"))
    with begin("embed", params | {"run": "a"}) as job:
        job.seal(None, "shards", 0, {"rows": 3})
        assert job.finish({"rows": 3})["mirror"] == "ok"
    assert_equal(job.store, Store(tmp_path / "mirror"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WAYSTATION_MIRROR", str(tmp_path / "file/x"))
    with begin("embed", params | {"run": "b"}) as job:
        job.seal(None, "shards", 0, {"rows": 3})
        assert "is behind" in job.finish({"rows": 3})["mirror"]


# -- commands


def test_commands(cli, tmp_path):
    content = fill(tmp_path / "data")
    assert cli("store", "copy", "data", "there", "--json")["copied"] == len(content)
    assert "0 of" in cli("store", "copy", "data", "there")
    assert tree(tmp_path / "there") == content
    Store(tmp_path / "store").seal(None, "models/a/v1", {"n": 1})
    assert cli("store", "sync", "store", "other", "--json")["to_b"]["seals"] == ["models/a/v1"]
    Store(tmp_path / "store").seal(None, "models/a/v2", {"n": 1})
    Store(tmp_path / "other").seal(None, "models/a/v2", {"n": 2})
    cli("store", "sync", "store", "other", code=4)
