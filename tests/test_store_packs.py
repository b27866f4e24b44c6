"""Small files that travel in packs: stored once, sent again only where something changed, and each checked by its own hash."""

import hashlib
import os
import random
import tempfile
import time
from pathlib import Path

import pytest
from proving import serving

from waystation import seal as seals
from waystation.place import Folder
from waystation.runtime import Refused
from waystation.seal import PACK, PACKED, blob_key, cut_packs, sort_out
from waystation.store import Store
from waystation.transfer import Mirror


def fill(folder: Path, count=80, size=100_000, seed=0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"part{n:03}").write_bytes(random.Random(f"{seed}/{n}").randbytes(size))
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Watched(Folder):
    "A folder that counts what is sent to it."

    def __init__(self, root):
        super().__init__(root)
        self.sent: list[int] = []

    def put(self, key, path, digest):
        self.sent.append(Path(path).stat().st_size)
        super().put(key, path, digest)


def test_unchanged_files_cost_nothing_and_a_changed_one_its_pack(tmp_path):
    work, place = fill(tmp_path / "work"), Watched(tmp_path / "store")
    store = Store(place)
    first = store.seal(work, "a/1")
    assert sorted(place.sent) == sorted(first.blobs.values()) and sum(place.sent) == 8_000_000
    assert 3 <= len(place.sent) <= 8 and max(place.sent) <= 3 * PACK
    for again in (store, Store(place)):
        place.sent.clear()
        again.seal(work, f"a/{time.time_ns()}")
        assert place.sent == []
    (work / "part041").write_bytes(b"changed" * 15_000)
    second = store.seal(work, "a/2")
    assert place.sent == [second.blobs[second.files["part041"]["pack"]]]
    (work / "a first one").write_bytes(random.Random("new").randbytes(90_000))
    place.sent.clear()
    store.seal(work, "a/3")
    assert 0 < sum(place.sent) <= 2 * 3 * PACK, "a file more at the beginning sends its neighbours again, and not all that follow"
    assert contents(store.fetch("a/1", tmp_path / "out")) == contents(fill(tmp_path / "same"))


@pytest.mark.parametrize("seed", range(20))
def test_packs_of_any_sizes(seed):
    rng = random.Random(seed)
    sizes = {f"{rng.random()}": rng.choice([0, 1, 70_000, 500_000, PACKED - 1, rng.randrange(PACKED)]) for _ in range(rng.choice([0, 1, 2, 300]))}
    packs = cut_packs(sizes)
    assert [rel for p in packs for rel in p] == sorted(sizes) and all(packs)
    filled = [sum(sizes[r] for r in p) for p in packs]
    assert max(filled, default=0) <= 3 * PACK and all(n >= PACK for n in filled[:-1])
    inside, packed, alone = sort_out(sizes | {"huge": 5 << 30, "just": PACKED})
    assert sorted(inside + packed + alone) == sorted([*sizes, "huge", "just"]) and alone == ["just", "huge"]


def test_what_is_equal_or_empty_or_has_other_letters(tmp_path):
    work, data = tmp_path / "work", [random.Random(n).randbytes(90_000) for n in range(3)]
    files = {"a": data[0], "größe/三 & co": data[1], "sub/twin of a": data[0], "z": data[2], "empty": b"", "sub/empty too": b"", "small": b"s"}
    for name, content in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    store = Store(tmp_path / "store")
    seal = store.seal(work, "a/1")
    assert seal.blobs == {hashlib.sha256(b"".join(data)).hexdigest(): 270_000}
    assert [e.size for e in store.place.entries("blobs")] == [270_000]
    assert seal.files["a"] == seal.files["sub/twin of a"] and "data" in seal.files["empty"]
    assert contents(store.fetch("a/1", tmp_path / "out")) == files
    assert store.verify("a/1", read_data=True) == []


def test_a_file_without_neighbours_is_a_blob_as_any_other(tmp_path):
    (tmp_path / "work").mkdir()
    for name in ("one", "its twin"):
        (tmp_path / "work" / name).write_bytes(b"x" * 100_000)
    seal = Store(tmp_path / "store").seal(tmp_path / "work", "a/1")
    assert seal.files == {name: {"sha256": hashlib.sha256(b"x" * 100_000).hexdigest(), "size": 100_000} for name in ("its twin", "one")}


def test_a_damaged_pack_names_the_files_that_suffer_and_is_mended(tmp_path):
    work, store = fill(tmp_path / "work", count=10), Store(tmp_path / "store")
    seal = store.seal(work, "a/1")
    (pack,) = seal.blobs
    path = store.place.path(blob_key(pack))
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:350_000] + bytes(1) + good[350_001:399_999] + bytes(200_000) + good[599_999:])
    assert store.verify("a/1") == []
    assert [w.split(": ")[1].split()[0] for w in store.verify("a/1", read_data=True)] == ["part003", "part004", "part005"]
    with pytest.raises(Refused, match=r"part003 \(and 2 more in its pack\) does not have the bytes"):
        store.fetch("a/1", tmp_path / "out")
    assert contents(tmp_path / "out").items() <= contents(work).items()
    path.write_bytes(good[:-1])
    assert len(store.verify("a/1")) == 10
    with pytest.raises(Refused, match=r"part000 \(and 9 more in its pack\) lies in a pack that has 999999 bytes instead of 1000000"):
        store.fetch("a/1", tmp_path / "out")
    path.unlink()
    with pytest.raises(Refused, match="lies in a pack that is missing"):
        store.fetch("a/1", tmp_path / "out")
    path.write_bytes(bytes(1_000_000))
    store.seal(work, "a/2")
    assert store.verify("a/1", read_data=True) == []
    assert contents(store.fetch("a/1", tmp_path / "out")) == contents(work)


def test_prune_keeps_what_a_seal_names(tmp_path):
    store = Store(tmp_path / "store")
    for n in range(3):
        store.seal(fill(tmp_path / "work", count=15, seed=n % 2), f"c/{n}")  # 0 and 2 have the same packs
    store.refer("kept", "c/0")
    for e in store.place.entries("blobs"):
        os.utime(store.place.path(e.key), (e.modified - 10,) * 2)
    would = store.prune("c", keep_last=1, grace=0, dry_run=True)
    did = store.prune("c", keep_last=1, grace=0)
    assert did["goes"] == ["c/1"] and did["deleted_bytes"] == 1_500_000 < would["bytes"] < 1_510_000
    assert [w for n in ("c/0", "c/2") for w in store.verify(n, read_data=True)] == []
    store.place.delete([f"refs/kept/{1}.json", "seals/c/0.json", "seals/c/2.json"])
    assert store.prune(grace=0)["deleted_bytes"] == 1_500_000


@pytest.mark.parametrize("kind", ["file", "gs", "s3", "rclone"])
def test_sync_and_a_mirror_take_packs_along(kind, server, tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    work = fill(tmp_path / "work", count=30)
    with serving(kind, server, tmp_path) as (url, _):
        a, b = Store(tmp_path / "a"), Store(url)
        seal = a.seal(work, "models/a/v1")
        to_b, _ = a.sync(b)
        assert (to_b.blobs, to_b.bytes, to_b.wrong) == (len(seal.blobs), 3_000_000, [])
        assert a.sync(b)[0].blobs == 0 and b.verify("models/a/v1", read_data=True) == []
        assert contents(b.fetch("models/a/v1", tmp_path / "out")) == contents(work)
        mirror = Mirror(b.place, str(tmp_path / "c"))
        mirror.note("seal", "models/a/v1")
        assert mirror.drain()
        assert Store(tmp_path / "c").verify("models/a/v1", read_data=True) == []


def test_seals_that_were_made_without_packs(tmp_path, monkeypatch):
    "They are read as before, and are equal to those that have packs: to `seal` again, to `sync`, and by their content."
    work, a, b = fill(tmp_path / "work", count=12), Store(tmp_path / "a"), Store(tmp_path / "b")
    with monkeypatch.context() as m:
        m.setattr(seals, "PACKED", 0)
        old = a.seal(work, "models/a/v1", {"loss": 1})
    assert len(old.blobs) == 12 and not any("pack" in f for f in old.files.values())
    assert a.seal(work, "models/a/v1", {"loss": 1}).digest == old.digest
    with pytest.raises(Refused, match="exists with other content"):
        a.seal(work, "models/a/v1", {"loss": 2})
    assert b.seal(work, "models/a/v1", {"loss": 1}).content == old.content
    assert [m.conflicts + m.wrong for m in a.sync(b)] == [[], []]
    for store in (a, b):
        assert store.verify("models/a/v1", read_data=True) == []
        assert contents(store.fetch("models/a/v1", tmp_path / f"out{store is a}")) == contents(work)


@pytest.mark.parametrize("how", ["changed", "longer", "shorter", "gone"])
def test_a_file_that_changes_before_it_is_packed(how, tmp_path, monkeypatch):
    import waystation.store as module

    work, describe, store = fill(tmp_path / "work", count=5), module.describe, Store(tmp_path / "store")

    def then(path):
        found = describe(path)
        if path.name == "part003":
            data = path.read_bytes()
            path.write_bytes({"changed": b"?" + data[1:], "longer": data + b"?", "shorter": data[:-1], "gone": b""}[how])
            if how == "gone":
                path.unlink()
        return found

    monkeypatch.setattr(module, "describe", then)
    with pytest.raises(Refused, match="part003 changed while it was being sealed"):
        store.seal(work, "a/1")
    assert store.list() == [] and store.place.keys("blobs") == []


def test_a_yes_from_before_the_list_of_the_condemned_is_not_believed(tmp_path):
    "A collector that ends just then: the blob is seen, deleted, its note removed, and the list that comes last is empty."
    work = fill(tmp_path / "work", count=12)
    (work / "alone").write_bytes(os.urandom(1_200_000))

    class Late(Folder):
        asked = 0

        def size(self, key):
            found = super().size(key)
            self.asked += key.startswith("blobs") and found is not None
            return found

        def entries(self, prefix):
            if prefix != "condemned":
                return super().entries(prefix)
            until = time.monotonic() + 5
            while self.asked < 2 and time.monotonic() < until:  # both blobs were seen
                time.sleep(0.01)
            self.delete(self.keys("blobs"))
            return iter([])

    Store(tmp_path / "store").seal(work, "a/1")
    place = Late(tmp_path / "store")
    Store(place).seal(work, "a/2")
    assert place.asked >= 2, "nothing was asked before the list came: this test proves nothing"
    assert Store(tmp_path / "store").verify("a/2", read_data=True) == []


def test_a_list_that_cannot_be_read_stops_the_seal(tmp_path):
    class Broken(Folder):
        def entries(self, prefix):
            if prefix == "condemned":
                raise OSError("the list cannot be read")
            return super().entries(prefix)

    place = Broken(tmp_path / "store")
    with pytest.raises(OSError, match="the list cannot be read"):
        Store(place).seal(fill(tmp_path / "work", count=40), "a/1")
    assert place.keys("seals") == [] == place.keys("blobs")


def test_a_full_disk_for_packs_is_named(tmp_path, monkeypatch, mounted):
    with mounted(tmp_path / "small", "size=1m") as small:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        with pytest.raises(Refused, match=r"has no room for a pack of \d\.\d MB .* let TMPDIR name"):
            Store(tmp_path / "store").seal(fill(tmp_path / "work"), "a/1")
        assert not list(small.iterdir()) and Store(tmp_path / "store").list() == []
