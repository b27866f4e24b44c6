"""A table that travels: packed, damaged, killed, moved by strangers' tools, and imported where nothing but the extra `export` is installed.

Short here; WAYSTATION_PROVE=1 makes the kills many.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path, PureWindowsPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WAYSTATION
from proving import note, size
from test_export import chunks, place  # noqa: F401  the fixture of a finished embed step

from waystation.runtime import Refused
from waystation.seal import new_manifest
from waystation.store import Store
from waystation.transfer import sync
from waystation.vectors import house
from waystation.vectors.ask import ask, find_table
from waystation.vectors.house import Archive, check, model_key, pack, read_copy, unpack

pytest.importorskip("lance")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))


def build(folder: Path, n: int, seed: int) -> dict:
    from waystation.vectors.table import build_table

    v = np.random.default_rng(seed).normal(size=(n, 16)).astype(np.float32)
    cols = dict(id=[f"ä{i}" for i in range(n)], text=[f"a note on {i}" for i in range(n)], kind=[f"k{i % 3}" for i in range(n)])
    (folder / "shard").mkdir(parents=True)
    pq.write_table(pa.table(cols | dict(vector=pa.FixedSizeListArray.from_arrays(pa.array(v.ravel()), 16))), folder / "shard/vectors.parquet")
    return build_table([("0", folder / "shard")], folder / "made/table.lance", index="ivf_rq", filters=["kind"],
                       about=dict(model="asset:axes", model_fingerprint="f1"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    "Two tables of one name, with their cards."
    root = tmp_path_factory.mktemp("tables")
    return [(root / str(n) / "made", build(root / str(n), 400, n)) for n in (0, 1)]


@pytest.fixture
def ours(tables, tmp_path):
    "The first table in a store: its seal and its folder."
    folder, card = tables[0]
    return Store(tmp_path / "ours").seal(folder, "vectors/notes/v1", card), folder


def tree(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def sha256sum(folder: Path) -> int:
    return subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True).returncode


def nothing_in(store: Store) -> bool:
    return store.list() == [] and store.refs() == {}


def test_a_copy_is_plain_files(ours, tmp_path):
    seal, folder = ours
    done = pack(seal, folder, str(tmp_path / "stick/notes"))
    files = tree(tmp_path / "stick/notes")
    assert set(files) == {"waystation.json", "README.txt", "SHA256SUMS", *seal.files} and done["files"] == len(files)
    assert sha256sum(tmp_path / "stick/notes") == 0 and files["README.txt"].isascii() and len(files["SHA256SUMS"].splitlines()) == len(files) - 1
    import lancedb

    assert lancedb.connect(tmp_path / "stick/notes").open_table("table").count_rows() == 400
    assert json.loads(files["waystation.json"])["body"]["meta"]["table"]["rows"] == 400


@pytest.mark.parametrize("to", ["stick/notes", "stick/notes.tar.zst"])
def test_the_same_answers_elsewhere(ours, tmp_path, to):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / to))
    store = Store(tmp_path / "theirs")
    done = unpack(str(tmp_path / to), store)
    there = store.read("vectors/notes/current")
    assert (there.name, there.content, there.meta) == ("vectors/notes/v1", seal.content, seal.meta) and done["rows"] == 400 and done["new"]
    assert store.verify("vectors/notes/v1", read_data=True) == []
    q = np.random.default_rng(9).normal(size=16).astype(np.float32)
    for how in (dict(question=q), dict(question=q, where="kind = 'k1'"), dict(question="note 17", mode="text")):
        a, b = (ask(find_table("vectors/notes/v1", str(tmp_path / s)), k=5, **how)[0] for s in ("ours", "theirs"))
        assert a == b and len(a) == 5


@pytest.mark.parametrize("to", ["stick/notes", "stick/notes.tar.zst"])
def test_importing_twice_changes_nothing(ours, tmp_path, to):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / to))
    store = Store(tmp_path / "theirs")
    unpack(str(tmp_path / to), store)
    before = tree(tmp_path / "theirs"), tree(tmp_path / "cache/sealed")
    assert unpack(str(tmp_path / to), store) | dict(new=True) == unpack(str(tmp_path / to), Store(tmp_path / "third"))
    assert (tree(tmp_path / "theirs"), tree(tmp_path / "cache/sealed")) == before


def test_another_table_of_the_name_is_the_next_version(ours, tables, tmp_path):
    seal, folder = ours
    other = Store(tmp_path / "others").seal(tables[1][0], "vectors/notes/v1", tables[1][1])
    pack(seal, folder, str(tmp_path / "a"))
    pack(other, tables[1][0], str(tmp_path / "b"))
    store = Store(tmp_path / "theirs")
    assert [unpack(str(tmp_path / x), store)["seal"] for x in "abab"] == ["vectors/notes/v1", "vectors/notes/v2"] * 2
    assert store.resolve("vectors/notes/current") == "vectors/notes/v2"  # the older one again did not move it back
    assert store.read("vectors/notes/v1").content == seal.content and store.read("vectors/notes/v2").content == other.content


# -- damage


DATA = "table.lance/data/*.lance"
DAMAGE = {"flipped": lambda f: f.write_bytes(f.read_bytes()[:-9] + bytes([f.read_bytes()[-9] ^ 1]) + f.read_bytes()[-8:]),
          "truncated": lambda f: os.truncate(f, f.stat().st_size - 5), "longer": lambda f: f.write_bytes(f.read_bytes() + b"x"), "missing": lambda f: f.unlink()}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("file", [DATA, "table.lance/_refs/tags/complete.json", "README.txt", "SHA256SUMS", "waystation.json"])
def test_a_damaged_copy_is_refused_by_file_name_and_mended(ours, tmp_path, what, file):
    seal, folder = ours
    to, store = tmp_path / "stick", Store(tmp_path / "theirs")
    pack(seal, folder, str(to))
    good = tree(to)
    (hit,) = to.glob(file)
    DAMAGE[what](hit)
    with pytest.raises(Refused, match="(?s)" + hit.name.replace(".", r"\.")):
        unpack(str(to), store)
    assert nothing_in(store) and not list((tmp_path / "cache").glob("transfer/*"))
    if file == "waystation.json" and what == "missing":  # then nothing says whose folder this is
        with pytest.raises(Refused, match="is no copy of a table"):
            pack(seal, folder, str(to))
        return
    times = {f: (to / f).stat().st_mtime_ns for f in good if (to / f).exists()}
    done = pack(seal, folder, str(to))
    now = tree(to)
    assert sha256sum(to) == 0 and now.keys() == good.keys() and done["copied"] == (hit.name not in ("SHA256SUMS", "waystation.json"))
    assert all((to / f).stat().st_mtime_ns == times[f] for f in now if f not in ("SHA256SUMS", "waystation.json") and to / f != hit)
    assert unpack(str(to), store)["new"]


def test_a_damaged_archive(ours, tmp_path):
    "Cut anywhere, flipped anywhere, or cut where one file ends and the next begins: refused, and packed again."
    seal, folder = ours
    to, store = tmp_path / "notes.tar.zst", Store(tmp_path / "theirs")
    pack(seal, folder, str(to))
    good, rng = to.read_bytes(), random.Random(0)
    for cut in (0, 3, 100, *(rng.randrange(len(good)) for _ in range(8)), len(good) - 1):
        to.write_bytes(good[:cut])
        with pytest.raises(Refused, match=r"copy it again"):
            unpack(str(to), store)
    flips = 0
    for at in (rng.randrange(len(good)) for _ in range(12)):
        to.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1:])
        try:
            unpack(str(to), Store(tmp_path / f"other{at}"))
        except Refused:
            flips += 1
            assert nothing_in(Store(tmp_path / f"other{at}"))
        else:  # a byte that says nothing: padding, or a field of tar that nobody reads
            assert Store(tmp_path / f"other{at}").read("vectors/notes/v1").content == seal.content
    assert flips > 6 and nothing_in(store)
    to.write_bytes(good[: len(good) // 2])
    with pytest.raises(Refused, match="remove it, or name another file"):  # too little to tell whose it was
        pack(seal, folder, str(to))


def test_a_torn_archive_is_written_again(tables, tmp_path):
    shutil.copytree(tables[0][0], tmp_path / "big")
    for n in range(3):
        (tmp_path / f"big/table.lance/data/pad{n}.bin").write_bytes(random.Random(n).randbytes(1_500_000))
    seal, to = Store(tmp_path / "ours").seal(tmp_path / "big", "vectors/big/v1", tables[0][1]), tmp_path / "big.tar.zst"
    pack(seal, tmp_path / "big", str(to))
    good = to.read_bytes()
    for bad in (good[:-1_000_000], good[:3_000_000] + b"x" + good[3_000_001:]):
        to.write_bytes(bad)
        assert pack(seal, tmp_path / "big", str(to))["copied"] == len(seal.files) + 1 and to.read_bytes() == good
    assert pack(seal, tmp_path / "big", str(to))["copied"] == 0 and [p.name for p in tmp_path.glob("*zst*")] == ["big.tar.zst"]
    assert unpack(str(to), Store(tmp_path / "theirs"))["new"]


def test_an_archive_is_a_folder_to_others(ours, tmp_path):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / "notes.tar.zst"))
    pack(seal, folder, str(tmp_path / "plain"))
    with open(tmp_path / "notes.tar", "wb") as f, pa.input_stream(str(tmp_path / "notes.tar.zst"), compression="zstd") as z:
        shutil.copyfileobj(z, f)
    subprocess.run(["tar", "-xf", "notes.tar"], cwd=tmp_path, check=True)
    assert sha256sum(tmp_path / "notes-v1") == 0 and tree(tmp_path / "notes-v1").keys() == tree(tmp_path / "plain").keys()
    assert unpack(str(tmp_path / "notes-v1"), Store(tmp_path / "theirs"))["seal"] == "vectors/notes/v1"


def test_what_is_not_of_the_table_is_left_out(ours, tmp_path):
    seal, folder = ours
    to = tmp_path / "stick"
    pack(seal, folder, str(to))
    for name in ("a note 😀.txt", "table.lance/data/extra.lance", ".DS_Store", "System Volume Information/x"):
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_bytes(b"mine")
    done = unpack(str(to), Store(tmp_path / "theirs"))
    assert done["left_out"] == ["System Volume Information/x", "a note 😀.txt", "table.lance/data/extra.lance"]
    assert Store(tmp_path / "theirs").read("vectors/notes/v1").content == seal.content
    assert pack(seal, folder, str(to))["copied"] == 0 and (to / "a note 😀.txt").read_bytes() == b"mine"


def test_somebody_elses_folder_is_not_touched(ours, tables, tmp_path):
    seal, folder = ours
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick/README.txt").write_text("my photos")
    with pytest.raises(Refused, match=r"has files \(README.txt\) and is no copy"):
        pack(seal, folder, str(tmp_path / "stick"))
    assert tree(tmp_path / "stick") == {"README.txt": b"my photos"}
    pack(seal, folder, str(tmp_path / "a"))
    before = tree(tmp_path / "a")
    other = Store(tmp_path / "others").seal(tables[1][0], "vectors/notes/v1", tables[1][1])
    with pytest.raises(Refused, match=r"is a copy of vectors/notes/v1, made .* with other content"):
        pack(other, tables[1][0], str(tmp_path / "a"))
    assert tree(tmp_path / "a") == before
    (tmp_path / "x.tar.zst").write_text("mine")
    with pytest.raises(Refused, match="remove it, or name another file"):
        pack(seal, folder, str(tmp_path / "x.tar.zst"))
    assert (tmp_path / "x.tar.zst").read_text() == "mine"


def test_a_source_that_changed_does_not_travel(ours, tmp_path):
    seal, folder = ours
    shutil.copytree(folder, tmp_path / "local")
    (hit,) = (tmp_path / "local").glob(DATA)
    DAMAGE["flipped"](hit)
    for to in ("a", "b.tar.zst"):
        with pytest.raises(Refused, match="does not have the bytes that were sealed"):
            pack(seal, tmp_path / "local", str(tmp_path / to))
    assert not (tmp_path / "a/SHA256SUMS").exists() and not (tmp_path / "b.tar.zst").exists()


HOSTILE = [
    (dict(name="models/x/v1"), "no name of a table"),
    (dict(name="vectors/../v1"), "has '..'"),
    (dict(files={"../../x": dict(sha256="0" * 64, size=1)}), "does not lie plainly"),
    (dict(files={"table.lance/nul": dict(sha256="0" * 64, size=1)}), "does not lie plainly"),
    (dict(files={"SHA256sums": dict(sha256="1" * 64, size=1)}), "one name"),
    (dict(meta=dict(format=2)), "format 2"),
    (dict(meta=dict(parts={"README.txt": [dict(sha256="0" * 64, size=1)]})), "are not the whole"),
    (dict(meta=dict(parts=[])), "damaged"),
    (dict(meta=dict(model=dict(said="x", key="../../x"))), "no key"),
    (dict(meta=dict(table=[])), "must be objects"),
]


@pytest.mark.parametrize("change, match", HOSTILE, ids=[m for _, m in HOSTILE])
def test_a_manifest_is_believed_after_a_look(ours, change, match):
    seal, _ = ours
    files = {k: dict(sha256=f["sha256"], size=f["size"]) for k, f in seal.files.items()} | {"README.txt": dict(sha256="0" * 64, size=9)}
    meta = dict(format=1, table=seal.meta, parts={}, model=dict(said="", key=""))
    read_copy(new_manifest(seal.name, files, meta, ""), "here")
    with pytest.raises(Refused, match=match):
        read_copy(new_manifest(change.get("name", seal.name), files | change.get("files", {}), meta | change.get("meta", {}), ""), "here")


# -- sticks


def test_parts_for_fat32(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(house, "FAT32", 5000)
    seal, folder = ours
    to = tmp_path / "stick"
    pack(seal, folder, str(to))
    done = pack(seal, folder, str(to), fat32=True)  # the same folder, after the first try did not fit
    files = tree(to)
    assert max(map(len, files.values())) <= 5000 or max((len(v), k) for k, v in files.items())[1] == "waystation.json"
    large = {k for k, f in seal.files.items() if f["size"] > 5000}
    assert large and not large & files.keys() and all(f"{k}.part1" in files for k in large) and sha256sum(to) == 0
    assert done["copied"] == sum(".part" in k for k in files) + 1  # and the README, which speaks of parts
    assert unpack(str(to), Store(tmp_path / "theirs"))["new"]
    assert Store(tmp_path / "theirs").read("vectors/notes/v1").content == seal.content
    hit = to / f"{min(large)}.part2"
    DAMAGE["flipped"](hit)
    with pytest.raises(Refused, match=rf"{hit.name} does not have the bytes"):
        unpack(str(to), Store(tmp_path / "third"))
    assert pack(seal, folder, str(to), fat32=True)["copied"] == 1
    for k in large:  # by hand, as the README says
        parts = sorted(to.glob(f"{k}.part*"), key=lambda p: int(p.name.rpartition("part")[2]))
        (to / k).write_bytes(b"".join(p.read_bytes() for p in parts))
    import lancedb

    assert lancedb.connect(to).open_table("table").count_rows() == 400
    assert "cat NAME.part1 NAME.part2 > NAME" in files["README.txt"].decode() and "copy /b" in files["README.txt"].decode()
    for k in large:
        (to / k).unlink()
    pack(seal, folder, str(to))  # and back
    assert not list(to.rglob("*.part*")) and sha256sum(to) == 0


@pytest.mark.parametrize("name, fine", [("what?.txt", False), ('a"b', False), ("😀" * 60, True), ("notes 😀.txt", True)])
def test_names_that_fat32_cannot_have(tables, tmp_path, name, fine):
    shutil.copytree(tables[0][0], tmp_path / "odd")
    (tmp_path / "odd" / name).write_bytes(b"x")
    seal = Store(tmp_path / "ours").seal(tmp_path / "odd", "vectors/odd/v1", tables[0][1])
    pack(seal, tmp_path / "odd", str(tmp_path / "a"))
    with contextlib.nullcontext() if fine else pytest.raises(Refused, match="FAT32 cannot hold"):
        pack(seal, tmp_path / "odd", str(tmp_path / "b"), fat32=True)
    for to in ("x.tar.zst", "memory://fat/x"):
        with pytest.raises(Refused, match="parts are made in a folder"):
            pack(seal, tmp_path / "odd", to, fat32=True)


@pytest.mark.parametrize("to", ["stick", "stick.tar.zst"])
def test_a_name_with_an_emoji_arrives(tables, tmp_path, to):
    shutil.copytree(tables[0][0], tmp_path / "odd")
    (tmp_path / "odd/notes 😀 größe.txt").write_bytes(b"x")
    seal = Store(tmp_path / "ours").seal(tmp_path / "odd", "vectors/odd/v1", tables[0][1])
    pack(seal, tmp_path / "odd", str(tmp_path / to))
    assert to.endswith("zst") or sha256sum(tmp_path / to) == 0
    assert unpack(str(tmp_path / to), Store(tmp_path / "theirs"))["new"]
    assert Store(tmp_path / "theirs").fetch("vectors/odd/v1", tmp_path / "out").joinpath("notes 😀 größe.txt").read_bytes() == b"x"


def test_windows_can_have_every_name(ours, tmp_path):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / "stick"), fat32=True, model={"1_Pooling/config.json": folder.parent / "shard/vectors.parquet"})
    manifest, lines = (tmp_path / "stick/waystation.json").read_bytes(), (tmp_path / "stick/SHA256SUMS").read_bytes().decode()
    keys = [p.key for p in house.pieces(read_copy(manifest, ""))]
    assert "\\" not in lines and "\r" not in lines and [line[66:] for line in lines.splitlines()] == ["waystation.json", *keys]
    for key in keys:
        p = PureWindowsPath(key)
        assert p.as_posix() == key and p.parts == tuple(key.split("/")) and not (p.drive or p.root or p.is_reserved() or ".." in p.parts)
    assert len({str(PureWindowsPath(k)).lower() for k in keys}) == len(keys) and "model/1_Pooling/config.json" in keys


def test_a_stick_that_is_too_small(ours, tmp_path, monkeypatch, mounted):
    seal, folder = ours
    need = sum(f["size"] for f in seal.files.values())
    with mounted(tmp_path / "stick", f"size={need // 2 // 4096 * 4096}") as stick:
        for to in (stick / "a", stick / "b.tar.zst"):
            with pytest.raises(Refused, match=r"has room for 0 MB|is full|no room"):
                pack(seal, folder, str(to))
        with pytest.MonkeyPatch.context() as m:  # what `room` says may be wrong by the time
            m.setattr(house.Files, "room", lambda self: None)
            with pytest.raises(Refused, match="is full"):
                pack(seal, folder, str(stick / "a"))
        assert not (stick / "a/SHA256SUMS").exists() and not list(stick.rglob(".waystation-parts")) and not list(stick.glob("*.zst*"))
        subprocess.run(["mount", "-o", "remount,size=64m", stick], check=True)  # room was made
        assert 0 < pack(seal, folder, str(stick / "a"))["copied"] < len(seal.files) + 1 and sha256sum(stick / "a") == 0
        assert pack(seal, folder, str(stick / "b.tar.zst"))["copied"]


@pytest.mark.parametrize("small", ["cache", "theirs"])
def test_a_machine_that_is_too_small(ours, tmp_path, small, monkeypatch, mounted):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / "stick"))
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "disk/cache" if small == "cache" else tmp_path / "cache"))
    with mounted(tmp_path / "disk", f"size={sum(f['size'] for f in seal.files.values()) // 2 // 4096 * 4096}") as disk:
        store = Store(disk / "theirs" if small == "theirs" else tmp_path / "theirs")
        with pytest.raises(Refused, match="is full"):
            unpack(str(tmp_path / "stick"), store)
        assert nothing_in(store)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert unpack(str(tmp_path / "stick"), store)["new"] and store.verify("vectors/notes/v1", read_data=True) == []


def test_a_stick_that_cannot_be_written(ours, tmp_path, mounted):
    seal, folder = ours
    with mounted(tmp_path / "stick", "size=64m") as stick:
        pack(seal, folder, str(stick / "a"))
        (stick / "a/README.txt").write_bytes(b"torn")
        subprocess.run(["mount", "-o", "remount,ro", stick], check=True)
        for to in ("a", "b", "c.tar.zst"):
            with pytest.raises(Refused, match=r"cannot be written .*name another folder|does not permit"):
                pack(seal, folder, str(stick / to))
        subprocess.run(["mount", "-o", "remount,rw", stick], check=True)
        pack(seal, folder, str(stick / "a"))
        subprocess.run(["mount", "-o", "remount,ro", stick], check=True)
        assert unpack(str(stick / "a"), Store(tmp_path / "theirs"))["new"]  # reading asks for no more than that


def test_a_file_that_the_stick_cannot_hold(ours, tmp_path):
    "The limit of this process stands in for FAT32's: the kernel says EFBIG to both."
    seal, folder = ours
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(f["size"] for f in seal.files.values()) - 1, hard))
    try:
        with pytest.raises(Refused, match="pass --fat32"):
            pack(seal, folder, str(tmp_path / "stick"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert pack(seal, folder, str(tmp_path / "stick"))["copied"] < len(seal.files) + 1


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODEV])
def test_a_stick_that_was_pulled_out(ours, tmp_path, monkeypatch, error):
    from waystation.runtime import Interrupted

    seal, folder = ours
    fsync, calls = os.fsync, []

    def gone(fd):
        calls.append(fd)
        if len(calls) > 12:
            raise OSError(error, os.strerror(error))
        fsync(fd)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", gone)
        with pytest.raises(Interrupted, match="went away"):
            pack(seal, folder, str(tmp_path / "stick"))
    assert 0 < pack(seal, folder, str(tmp_path / "stick"))["copied"] < len(seal.files) + 1 and sha256sum(tmp_path / "stick") == 0
    real = house.Files.chunks

    def torn(self, key, size):
        yield from real(self, key, size)
        if key.endswith(".lance"):
            raise OSError(error, os.strerror(error))

    with monkeypatch.context() as m:
        m.setattr(house.Files, "chunks", torn)
        with pytest.raises(Refused, match=r"\.lance cannot be read to its end"):
            unpack(str(tmp_path / "stick"), Store(tmp_path / "theirs"))
    assert nothing_in(Store(tmp_path / "theirs"))


# -- kill -9


SEND = """
import sys; from waystation.store import Store; from waystation.vectors.house import pack; print(flush=True)
s = Store(sys.argv[1]); pack(s.read('vectors/big/v1'), sys.argv[2], sys.argv[3])
"""
BRING = "import sys; from waystation.store import Store; from waystation.vectors.house import unpack; print(flush=True); unpack(sys.argv[2], Store(sys.argv[1]))"


def run(program: str, *args, after: float | None = None) -> tuple[float, bool]:
    "Run it, or kill it so many seconds after its imports; how long it took, and whether it was killed."
    with subprocess.Popen([sys.executable, "-c", program, *map(str, args)], stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(300 if after is None else after)
        if p.poll() is None:
            os.kill(p.pid, signal.SIGKILL)
        p.wait(300)
    assert p.returncode in ((0,) if after is None else (0, -signal.SIGKILL))
    return time.monotonic() - began, p.returncode != 0


def look_at_copy(to: Path, seal, form: str) -> str:
    "How far a killed `pack` got; what is there is whole."
    if form != "stick":
        return "whole" if to.exists() else "nothing"
    there = {k: v for k, v in tree(to).items() if not k.startswith(".")} if to.exists() else {}
    assert all(hashlib.sha256(v).hexdigest() == seal.files[k]["sha256"] for k, v in there.items() if k in seal.files)
    assert "SHA256SUMS" not in there or sha256sum(to) == 0
    return "whole" if "SHA256SUMS" in there else "half" if there else "nothing"


def look_at_store(store: Path) -> str:
    "How far a killed `import` got; what is visible is whole."
    s = Store(store)
    assert s.list() in ([], ["vectors/big/v1"]) and [w for n in s.list() for w in s.verify(n, read_data=True)] == []
    return "whole" if s.list() else "half" if s.place.keys("blobs") else "nothing"


@pytest.fixture
def big(tables, tmp_path):
    "A table of 17 MB, which takes long enough to be killed in."
    folder, rng = tmp_path / "big", random.Random(0)
    shutil.copytree(tables[0][0], folder)
    for n in range(24):
        (folder / f"table.lance/data/pad{n:02}.bin").write_bytes(rng.randbytes(700_000))
    return Store(tmp_path / "ours").seal(folder, "vectors/big/v1", tables[0][1]), folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stick", "stick.tar.zst"])
def test_kill_while_packing(big, tmp_path, form):
    (seal, folder), rng, kills, at, to = big, random.Random(form), 0, Counter(), tmp_path / form
    calm, _ = run(SEND, tmp_path / "ours", folder, to)
    want = {k: v for k, v in tree(to).items() if k not in ("waystation.json", "SHA256SUMS")} if to.is_dir() else {}  # these say when
    while kills < size(3, 30):
        shutil.rmtree(to) if to.is_dir() else to.unlink(missing_ok=True)
        kills += run(SEND, tmp_path / "ours", folder, to, after=rng.uniform(0, calm))[1]
        at[look_at_copy(to, seal, form)] += 1
        run(SEND, tmp_path / "ours", folder, to)  # the same command
        if form == "stick":
            assert sha256sum(to) == 0 and {k: v for k, v in tree(to).items() if k not in ("waystation.json", "SHA256SUMS")} == want
        else:
            with contextlib.closing(Archive(to)) as a:
                data = a.read("waystation.json")
                assert check(a, read_copy(data, ""), data) and [f.name for f in tmp_path.glob("*stick*")] == [form]
    note("kill -9 while moving house", f"packing, {form}", kills=kills, found=at, damaged=0)
    print(kills, at)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stick", "stick.tar.zst"])
def test_kill_while_importing(big, tmp_path, form):
    (seal, folder), rng, kills, at, store = big, random.Random(form), 0, Counter(), tmp_path / "theirs"
    pack(seal, folder, str(tmp_path / form))
    calm, _ = run(BRING, store, tmp_path / form)
    while kills < size(3, 30):
        shutil.rmtree(store)
        shutil.rmtree(tmp_path / "cache/sealed")
        kills += run(BRING, store, tmp_path / form, after=rng.uniform(0, calm))[1]
        at[look_at_store(store)] += 1
        run(BRING, store, tmp_path / form)  # the same command
        assert look_at_store(store) == "whole" and Store(store).read("vectors/big/current").content == seal.content
        assert not list((tmp_path / "cache").glob("transfer/*")) and not list((tmp_path / "cache/sealed").rglob("*.part"))
    note("kill -9 while moving house", f"importing, {form}", kills=kills, found=at, damaged=0)
    print(kills, at)


@pytest.mark.slow
def test_memory_is_bounded(tables, tmp_path):
    "A file of 300 MB goes in and out of an archive in a process whose memory grows by less than 100 MB."
    shutil.copytree(tables[0][0], tmp_path / "big")
    with open(tmp_path / "big/table.lance/data/pad.bin", "wb") as f:
        for n in range(30):
            f.write(random.Random(n).randbytes(1000) * 10_000)
    Store(tmp_path / "ours").seal(tmp_path / "big", "vectors/big/v1", tables[0][1])
    peak = "import resource; rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
    for program, args in ((SEND, (tmp_path / "ours", tmp_path / "big", tmp_path / "x.tar.zst")), (BRING, (tmp_path / "theirs", tmp_path / "x.tar.zst"))):
        code = peak + program.replace("print(flush=True)", "before = rss()") + "\nprint(rss() - before)"
        done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 100, f"{done.stdout} MB more"


# -- other places


def test_a_bucket(ours, tmp_path):
    seal, folder = ours
    url = f"memory://house/{tmp_path.name}"
    assert pack(seal, folder, url)["copied"] == len(seal.files) + 1 and pack(seal, folder, url)["copied"] == 0
    assert unpack(url, Store(tmp_path / "theirs"))["seal"] == "vectors/notes/v1"
    with pytest.raises(Refused, match="waystation store copy"):
        pack(seal, folder, f"{url}.tar.zst")
    with pytest.raises(Refused, match="waystation store copy"):
        unpack(f"{url}.tar.zst", Store(tmp_path / "theirs"))


def test_a_table_in_s3_opens_where_it_lies(ours, server, tmp_path):
    "Plain files under their own names: a bucket with a copy is a table for Lance, and a copy to import for everyone else."
    import lance

    seal, folder = ours
    s3 = server("s3")
    with s3.environ():
        url = f"{s3.url}/{tmp_path.name}"
        assert pack(seal, folder, url)["copied"] == len(seal.files) + 1
        there = lance.dataset(f"{url}/table.lance", version="complete",
                              storage_options={"aws_endpoint": s3.endpoint, "allow_http": "true", "aws_access_key_id": "testing", "aws_secret_access_key": "testing",
                                               "aws_region": "us-east-1"})
        here = lance.dataset(str(folder / "table.lance"), version="complete")
        assert there.to_table() == here.to_table()
        near = dict(column="vector", q=np.asarray(here.take([7], columns=["vector"])["vector"][0].as_py(), np.float32), k=5)
        assert there.to_table(columns=["id"], nearest=near)["id"].to_pylist() == here.to_table(columns=["id"], nearest=near)["id"].to_pylist()
        assert unpack(url, Store(tmp_path / "theirs"))["seal"] == "vectors/notes/v1"


def test_rclone_finds_the_copy_and_the_synced_table_equal(ours, server, tmp_path):
    seal, folder = ours
    remote = server("rclone_remote")
    with remote.environ():
        url = f"{remote.url}/{tmp_path.name}"
        pack(seal, folder, str(tmp_path / "stick"))
        pack(seal, folder, f"{url}/copy")
        assert pack(seal, folder, f"{url}/copy")["copied"] == 0
        (tmp_path / "stick/waystation.json").unlink(), (tmp_path / "stick/SHA256SUMS").unlink()  # these say when they were made

        def equal(a, b, *more):
            done = subprocess.run(["rclone", "check", a, b.removeprefix("rclone:"), "--download", *more], capture_output=True, text=True)
            assert done.returncode == 0 and "0 differences found" in done.stderr, done.stderr

        equal(tmp_path / "stick", f"{url}/copy", "--exclude", "/waystation.json", "--exclude", "/SHA256SUMS")
        theirs = Store(tmp_path / "theirs")
        unpack(f"{url}/copy", theirs)
        far = Store(f"{url}/store")
        sync(theirs.place, far.place)
        equal(tmp_path / "theirs", far.url, "--exclude", "/.tmp/**")
        assert far.read("vectors/notes/current").content == seal.content


EDGE = """
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        gone = ('torch', 'jax', 'jaxlib', 'flax', 'transformers', 'tokenizers', 'safetensors', 'datasets', 'peft', 'trl', 'wandb', 'papermill', 'pandas')
        return None if name.partition('.')[0] in gone else super().find_spec(name, *more)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
from waystation.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_edge_machine_needs_no_framework(ours, env, tmp_path):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / "stick"))
    np.save(tmp_path / "q.npy", np.eye(16, dtype=np.float32)[0])

    def edge(*args):
        done = subprocess.run([sys.executable, "-c", EDGE, *map(str, args), "--json"], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert "every byte checked" in edge("import", "stick")["text"]
    near = edge("search", "vectors/notes/current", "q.npy", "--where", "kind = 'k2'", "-k", "3")["rows"]
    assert len(near) == 3 and {r["kind"] for r in near} == {"k2"}
    assert edge("search", "vectors/notes/current", "note 17", "--mode", "text")["rows"][0]["id"] == "ä17"
    assert edge("sql", "vectors/notes/current", "SELECT count(*) FROM vectors")["rows"] == [[400]]


def test_the_commands_refuse_in_a_sentence(cli, ours, tmp_path):
    seal, folder = ours
    pack(seal, folder, str(tmp_path / "stick"))
    DAMAGE["flipped"](next((tmp_path / "stick").glob(DATA)))
    assert ".lance does not have the bytes that were packed; copy it again" in cli("import", "stick", code=2)
    for bad, why in (("nowhere", "no folder here"), ("stick/table.lance", "no waystation.json"), ("x.tar.zst", "no file here")):
        assert why in cli("import", bad, code=2)
    assert "name its place by to" in cli("export", "--fat32", code=2)


# -- the station


def test_export_writes_the_copy_and_writes_it_later(place, tmp_path):  # noqa: F811
    from waystation.stations.export import export

    store = place(dict(ids=chunks(0, 50)))
    first = export(store=store, to=str(tmp_path / "a"))
    assert first["copy"]["to"] == str(tmp_path / "a") and sha256sum(tmp_path / "a") == 0
    seals = Store(store).list()
    later = export(store=store, to=str(tmp_path / "b.tar.zst"))  # another place, after it was finished: no other run
    assert later["copy"]["copied"] and later["seal"] == first["seal"] and Store(store).list() == seals
    assert export(store=store, to=str(tmp_path / "a"))["copy"]["copied"] == 0
    assert export(store=store)["copy"]["to"] == str(tmp_path / "a")  # where the run itself put it
    assert unpack(str(tmp_path / "b.tar.zst"), Store(tmp_path / "theirs"))["seal"] == "vectors/demo/v1"


def test_a_stick_that_fails_does_not_cost_the_table(place, tmp_path, monkeypatch):  # noqa: F811
    from waystation.stations.export import export

    store = place(dict(ids=chunks(0, 50)))
    (tmp_path / "stick").write_text("a file")
    for to in ("stick/x", "stick"):
        with pytest.raises(Refused, match="cannot be written"):
            export(store=store, to=str(tmp_path / to))
    assert (tmp_path / "stick").read_text() == "a file"
    monkeypatch.setattr("waystation.stations.export.build", None)  # the table is there
    assert export(store=store)["rows"] == 50


def test_a_recipe_writes_the_copy_of_a_finished_step(place, tmp_path, monkeypatch):  # noqa: F811
    from waystation.recipe import run_recipe
    from waystation.stations.export import export

    store = place(dict(ids=chunks(0, 50)))
    export(store=store)
    Store(store).seal(None, "runs/demo/export/1/notebooks/1", {})
    (tmp_path / "r.yaml").write_text("steps: [{station: export}]")
    done = []
    monkeypatch.setattr("waystation.recipe._execute", lambda station, params, _: done.append(params["to"]) or export(**params))
    run_recipe(tmp_path / "r.yaml", "demo", store)
    assert done == []
    run_recipe(tmp_path / "r.yaml", "demo", store, (f"export.to={tmp_path / 'a'}",))
    assert done == [str(tmp_path / "a")] and sha256sum(tmp_path / "a") == 0


def test_what_cannot_be_written_is_refused_before_the_build(place, tmp_path, monkeypatch):  # noqa: F811
    from waystation.stations.export import export

    store = place(dict(ids=chunks(0, 50)))
    shutil.rmtree(tmp_path / "model")
    for how, why in ((dict(to="gs://b/x", fat32=True), "parts are made in a folder"), (dict(to="gs://b/x.tar.zst"), "is written on a disk"),
                     (dict(to=str(tmp_path / "a"), with_model=True), "does not exist"), (dict(with_model=True), "name its place by to")):
        with pytest.raises(Refused, match=why):
            export(store=store, **how)
    assert Store(store).list("vectors") == []


def test_the_model_travels(place, tmp_path):  # noqa: F811
    "Found by the card where it was imported, though the place that the card names is not there; and only what an encoder reads."
    from waystation.stations.export import export, maker
    from waystation.vectors.table import card

    store = place(dict(ids=chunks(0, 50)))
    (tmp_path / "model/pytorch_model.h5").write_bytes(b"x")
    report = export(store=store, to=str(tmp_path / "a"), with_model=True)
    assert {k for k in tree(tmp_path / "a") if k.startswith("model/")} == {"model/config.json"}
    shutil.move(tmp_path / "model", tmp_path / "gone")
    theirs = Store(tmp_path / "theirs")
    done = unpack(str(tmp_path / "a"), theirs)
    about = card(find_table(report["seal"], str(tmp_path / "theirs")).ds)
    found = maker(about, theirs)
    assert done["model"] == f"encoders/{model_key(about)}" and tree(found.path) == {"config.json": b"{}"} and found.fingerprint == about.get("model_fingerprint", "")
    with pytest.raises(Refused, match="does not exist"):
        maker(about, Store(store))


def test_a_model_is_whole_without_what_nobody_reads(tmp_path):
    from waystation.assets import fetch_asset
    from waystation.embedding.models import Checkpoint, needed, read_config, read_recipe
    from waystation.embedding.tokens import read_tokenizer

    folder = fetch_asset("minilm")
    for rel, path in needed(folder).items():
        (tmp_path / "few" / rel).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "few" / rel)
    few = tmp_path / "few"
    assert read_config(few) == read_config(folder) and read_recipe(few) == read_recipe(folder) and set(Checkpoint(few)) == set(Checkpoint(folder))
    (got,), (want,) = (read_tokenizer(f).encode(["a größe of 3 😀"]) for f in (few, folder))
    assert len(want[0]) > 5 and all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.slow
def test_words_are_asked_where_the_model_never_was(cli, env, tmp_path):
    "Embedded with a model in a folder, exported with it, the folder gone: the same answer from another store and an empty cache."
    from waystation.assets import fetch_asset

    shutil.copytree(fetch_asset("kmer-random"), tmp_path / "tuned")
    (tmp_path / "tuned/notes.md").write_text("nobody reads this")
    rng = random.Random(0)
    pq.write_table(pa.table(dict(id=[f"s{i}" for i in range(24)], text=["".join(rng.choices("ACGT", k=90)) for _ in range(24)])), tmp_path / "rows.parquet")
    cli("embed", "--run", "r", "--source", "rows.parquet", "--model", "tuned", "--engine", "jax")
    cli("export", "--run", "r", "--to", "stick", "--with-model")
    question = pq.read_table(tmp_path / "rows.parquet")["text"][7].as_py()
    want = cli("search", "vectors/r/current", question, "-k", "3", "--json")["rows"]
    (tmp_path / "tuned").rename(tmp_path / "gone")
    there = dict(WAYSTATION_STORE=str(tmp_path / "theirs"), WAYSTATION_CACHE=str(tmp_path / "empty"))
    assert "its model: encoders/" in cli("import", "stick", **there)
    got = cli("search", "vectors/r/current", question, "-k", "3", "--json", **there)["rows"]
    assert got == want and got[0]["id"] == "s7"
    assert "does not exist" in cli("search", "vectors/r/current", question, code=2, WAYSTATION_CACHE=str(tmp_path / "empty2"))  # without it, where it was made


def test_waystation_runs_from_a_shell(cli, ours, tmp_path):
    "Pack by one command line, import by another: exit codes and the text a person sees."
    seal, folder = ours
    pack(seal, folder, str(tmp_path / "stick.tar.zst"))
    said = subprocess.run([WAYSTATION, "import", "stick.tar.zst", "--store", "theirs"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("vectors/notes/v1: 400 rows, ")
    assert "vectors/notes/current" in json.dumps(cli("store", "ls", "--store", "theirs", "--json"))
