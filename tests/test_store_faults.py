"""The store's promise when the place, the network, the disk, the clock or the files fail it; tests/crashing.py and tests/proxy.py do the failing."""

import itertools
import os
import shutil

import pytest
from crashing import everywhere
from proving import PROVE, note, serving

from waystation.remotes import open_place
from waystation.store import Store


@pytest.fixture
def work(tmp_path):
    "A folder with what a checkpoint has: files in the manifest and files of their own, two of them equal."
    folder = tmp_path / "work"
    (folder / "sub").mkdir(parents=True)
    (folder / "small").write_bytes(b"small")
    (folder / "empty").write_bytes(b"")
    (folder / "large").write_bytes(os.urandom(100_000))
    (folder / "sub/larger").write_bytes(os.urandom(200_000))
    shutil.copy(folder / "large", folder / "sub/twin")
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
    import contextlib
    import uuid

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
