"""The store's promise, against what breaks stores: racing writers, a full disk, places that cannot be written; test_store_kill.py has the kills."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waystation.runtime import Refused
from waystation.lease import Lease
from waystation.store import Store

def _race(root, barrier, who, out):
    store = Store(root)
    barrier.wait()
    try:
        store.seal(None, "models/a/v1", {"who": who})
        out.put(who)
    except Refused as e:
        assert "exists with other content" in str(e)


def test_one_of_four_writers_wins_a_name(tmp_path):
    context = multiprocessing.get_context("spawn")
    for round in range(3):
        barrier, out = context.Barrier(4), context.Queue()
        racers = [context.Process(target=_race, args=(tmp_path / str(round), barrier, who, out)) for who in range(4)]
        for r in racers:
            r.start()
        for r in racers:
            r.join()
        assert [r.exitcode for r in racers] == [0] * 4
        winner = out.get(timeout=5)
        assert out.empty()
        assert Store(tmp_path / str(round)).read("models/a/v1").meta == {"who": winner}


def test_a_full_disk_is_refused_and_what_was_sealed_stays(tmp_path, mounted):
    with mounted(tmp_path / "small", "size=2m") as mount:
        (tmp_path / "work").mkdir()
        (tmp_path / "work/a").write_bytes(os.urandom(1_000_000))
        store = Store(mount / "store")
        store.seal(tmp_path / "work", "models/a/v1")
        (tmp_path / "work/a").write_bytes(os.urandom(1_500_000))
        with pytest.raises(Refused, match=r"is full .*make room or name another store"):
            store.seal(tmp_path / "work", "models/a/v2")
        assert store.list() == ["models/a/v1"]
        assert store.verify("models/a/v1", read_data=True) == []
        assert not list((mount / "store/.tmp").iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is not writable"):
        Store(tmp_path / "file" / "store")
    with pytest.raises(Refused, match="ftp: is not known"):
        Store("ftp://host/store")


def test_a_place_without_hard_links(tmp_path, monkeypatch):
    "Drive's mount refuses links: names are still given at once, and an existing name still stands."
    def no_link(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    store = Store(tmp_path)
    store.seal(None, "models/a/v1", {"a": 1})
    with pytest.raises(Refused, match="exists with other content"):
        store.seal(None, "models/a/v1", {"a": 2})
    assert store.read("models/a/v1").meta == {"a": 1}


def test_a_damaged_manifest_is_named(tmp_path):
    store = Store(tmp_path)
    store.seal(None, "models/a/v1", {"loss": 1.5})
    manifest = tmp_path / "seals/models/a/v1.json"
    manifest.write_text(manifest.read_text().replace("1.5", "0.5"))
    with pytest.raises(Refused, match="damaged manifest"):
        store.read("models/a/v1")


def test_sealing_over_a_torn_blob_mends_it(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/a").write_bytes(b"x" * 100_000)
    store = Store(tmp_path / "store")
    store.seal(tmp_path / "work", "models/a/v1")
    blob = tmp_path / "store" / store.place.keys("blobs")[0]
    for damaged in (b"x" * 500, b"y" * 100_000):
        blob.write_bytes(damaged)
        assert len(store.verify("models/a/v1", read_data=True)) == 1
        store.seal(tmp_path / "work", f"models/a/v{len(damaged)}")
        assert store.verify("models/a/v1", read_data=True) == []


def test_unicode_and_subfolders_come_back(tmp_path):
    work = tmp_path / "work"
    (work / "größe/三").mkdir(parents=True)
    (work / "größe/三/ü.txt").write_text("ñ", encoding="utf-8")
    (work / "empty").write_bytes(b"")
    store = Store(tmp_path / "store")
    store.seal(work, "data/a")
    out = store.fetch("data/a", tmp_path / "out")
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == ["empty", "größe/三/ü.txt"]


def test_names_that_would_escape_are_refused(tmp_path):
    store = Store(tmp_path)
    for name in ("../x", "a//b", "/a", "a/..", "", "a b", "a\n", "ä", "x" * 201):
        with pytest.raises(Refused, match="each word between slashes"):
            store.seal(None, name, {})


HOLDER = """
import sys, time
from waystation.lease import Lease
from waystation.place import Folder
Lease(Folder(sys.argv[1]), "a")
print(1, flush=True)
time.sleep(99)
"""


def test_a_dead_writer_is_replaced_at_once_and_a_living_one_is_not(tmp_path, monkeypatch):
    "A process that was killed on this machine needs no waiting; one of another machine is believed until its time is up."
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    place = Store(tmp_path).place
    with pytest.raises(Refused, match="a run has one writer"):
        Lease(place, "a")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    Lease(place, "a").release()

    far = '{"at": %f, "holder": "colab-1/aaaaaaaa/5/1/1", "released": false}'
    log = Path(tmp_path / "leases/a")
    last = max(int(p.stem) for p in log.iterdir())
    (log / f"{last + 1}.json").write_text(far % time.time())
    with pytest.raises(Refused, match="written by colab-1/aaaaaaaa"):
        Lease(place, "a")
    monkeypatch.setattr(Lease, "ttl", 2.0)  # it is watched for half of that
    (log / f"{last + 2}.json").write_text(far % (time.time() - Lease.ttl - 1))
    Lease(place, "a").release()
