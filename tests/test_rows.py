"""Rows from every format and place: buckets, memory, the cost of starting in the middle, what changed, and what a cell cannot hold."""

import contextlib
import datetime as dt
import gzip
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from waystation import formats, rows
from waystation.assets import resolve
from waystation.recipe import Job
from waystation.remotes import Bucket, open_place
from waystation.rows import Ids, Rows, Scan, changes, content_hashes, find_files
from waystation.runtime import Refused
from waystation.stations.embed import embed
from waystation.store import Store


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")


def whole(r: Rows, *args, **kw) -> list[dict]:
    return pa.Table.from_batches(r.batches(*args, **kw), r.schema).to_pylist()


def some(n, start=0):
    return [dict(id=f"r{i}", text=f"text {i} " + "x" * (i % 50), n=i) for i in range(start, start + n)]


def jsonl(path, data):
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    return path


# -- places


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_a_bucket_gives_the_same_rows_as_a_folder(server, kind, tmp_path):
    s, name = server(kind), uuid.uuid4().hex
    for k in (10, 9, 1):
        pq.write_table(pa.Table.from_pylist(some(20, k * 100)), tmp_path / f"p{k}.parquet", row_group_size=6)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "z.jsonl", some(30)).read_bytes()))
    with s.environ():
        there = open_place(f"{s.url}/{name}")
        for f in tmp_path.iterdir():
            there.create(f"in/{f.name}", f.read_bytes())
        local = Rows(f"{tmp_path}/p*.parquet", keep=["n"])
        for source in (f"{s.url}/{name}/in/*.parquet", f"{s.url}/{name}/**/p*.parquet"):
            far = Rows(source, keep=["n"])
            assert far.scan().n_rows == 60
            assert whole(far) == whole(local) and whole(far, 13, 41, size=4) == whole(local)[13:41]
            assert [b["n"].type for b in far.batches(0, 1)] == [pa.int64()]
        one = Rows(f"{s.url}/{name}/in/z.jsonl.gz", keep=["n"])
        assert one.scan().n_rows == 30 and whole(one) == some(30)
        with pytest.raises(Refused, match=r"mixes jsonl, parquet"):
            Rows(f"{s.url}/{name}/in")
        with pytest.raises(Refused, match=r"holds no rows"):
            Rows(f"{s.url}/{name}/in/nothing.parquet")
        source = f"{s.url}/{name}/in/*.parquet"
        far = Rows(source)
        seen, found = far.scan(), resolve(source, "source")
        assert found.fingerprint == seen.fingerprint and found.rows == source and changes(seen.files, source) == ""
        there.delete(["in/p9.parquet"])
        there.create("in/p9.parquet", (tmp_path / "p1.parquet").read_bytes())
        there.create("in/p11.parquet", (tmp_path / "p1.parquet").read_bytes())
        told = changes(seen.files, source)
        assert "p9.parquet changed (" in told and "p11.parquet was added" in told and "p10" not in told
        assert resolve(source, "source").fingerprint != seen.fingerprint
        with pytest.raises(Refused, match=r"changed while it was read"):
            whole(far)


def test_embed_reads_from_a_bucket(server, tmp_path):
    s, name = server("gcs"), uuid.uuid4().hex
    data = [dict(id=str(i), sequence="ACGT" * (9 + i)) for i in range(7)]
    with s.environ():
        open_place(f"{s.url}/{name}").create("d.jsonl", jsonl(tmp_path / "d.jsonl", data).read_bytes())
        report = embed(run="far", store=str(tmp_path / "store"), source=f"{s.url}/{name}/d.jsonl", model="asset:kmer-random", text="sequence", shard_rows=3)
    assert (report["rows"], report["shards"]) == (7, 3)


# -- going on


def counted(monkeypatch):
    "Bytes asked of buckets."
    asked, real = [], Bucket.part

    def part(self, key, start, stop):
        asked.append(stop - start)
        return real(self, key, start, stop)
    monkeypatch.setattr(Bucket, "part", part)
    return asked


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_last_rows_cost_the_same_at_three_sizes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", 1 << 16)
    monkeypatch.setattr(formats.File.open, "__defaults__", (1 << 16,))
    cost = []
    for n in (5_000, 20_000, 80_000):
        path = tmp_path / f"{n}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(some(n)), path, row_group_size=1000)
        else:
            jsonl(path, some(n))
        url = f"memory://{uuid.uuid4().hex}"
        open_place(url).create(path.name, path.read_bytes())
        r = Rows(f"{url}/{path.name}")
        r.scan()
        asked = counted(monkeypatch)
        assert whole(r, n - 10) == [dict(id=x["id"], text=x["text"]) for x in some(10, n - 10)]
        cost.append(sum(asked))
        monkeypatch.undo()
        monkeypatch.setattr(formats.File.open, "__defaults__", (1 << 16,))
    footers = 300_000 if kind == "parquet" else 0  # a footer grows by some 200 bytes a row group and column
    assert max(cost) < 250_000 + footers, cost  # a thousand rows and a buffer, or a row group, of 7 MB
    assert max(cost) < os.path.getsize(path) / 5, (cost, os.path.getsize(path))


def test_marks_stay_few_and_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, "marks", 8)
    path = jsonl(tmp_path / "a.jsonl", some(30_000))
    r = Rows(path, keep=["n"])
    scan = r.scan()
    assert 3 <= len(scan.marks["a.jsonl"]) <= 9
    for start in (0, 1, 1023, 1024, 1025, 17_777, 29_999):
        assert [x["n"] for x in whole(r, start, start + 3)] == list(range(start, min(start + 3, 30_000)))
    scan.save(tmp_path / "seen")
    again = Rows(path, keep=["n"])
    assert again.scan(known=Scan.load(tmp_path / "seen")) == Scan(30_000, scan.fingerprint, again.scan("first").duplicates, scan.files, scan.types, scan.marks)
    assert again.schema == r.schema


SMALL = dict(model="asset:kmer-random", text="sequence", shard_rows=4)


def cut_off(monkeypatch, tmp_path, source, **more):
    "A run that stops after its first shard."
    real = Job.seal

    def seal(self, folder, kind, number=None, meta=None):
        if kind == "shards" and number == 1:
            raise OSError(28, "No space left on device")
        return real(self, folder, kind, number, meta)
    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(Job, "seal", seal)
        embed(run="cut", store=str(tmp_path / "store"), source=str(source), **SMALL, **more)


def test_going_on_does_not_look_again_and_a_changed_source_is_told(tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    parts.mkdir()
    for k in (1, 2, 10):
        jsonl(parts / f"p{k}.jsonl", [dict(id=f"{k}-{i}", sequence="ACGT" * 9, when=None if i else {"y": 2024}) for i in range(4)])
    cut_off(monkeypatch, tmp_path, parts, keep="when")
    kept = (parts / "p2.jsonl").read_text()
    jsonl(parts / "p2.jsonl", [dict(id="new", sequence="ACGT" * 9, more=1)])
    (parts / "p10.jsonl").rename(parts / "p3.jsonl")
    with pytest.raises(Refused) as e:
        embed(run="cut", store=str(tmp_path / "store"), source=str(parts), keep="when", **SMALL)
    for words in ("p2.jsonl changed (", "4 -> 1 rows", "lost columns when", "new columns more", "p3.jsonl was added", "p10.jsonl was removed", "--restart"):
        assert words in str(e.value), e.value
    assert "p1.jsonl" not in str(e.value)
    (parts / "p2.jsonl").write_text(kept)
    (parts / "p3.jsonl").rename(parts / "p10.jsonl")  # the same bytes at another time are the same source
    monkeypatch.setattr(Rows, "_look", lambda *a: pytest.fail("looked at all ids again"))
    report = embed(run="cut", store=str(tmp_path / "store"), source=str(parts), keep="when", **SMALL)
    assert (report["rows"], report["shards_found"], report["shards_computed"]) == (12, 1, 2)
    store = Store(tmp_path / "store")
    shards = [pq.read_table(store.fetch(n, tmp_path / "read" / str(k)) / "vectors.parquet") for k, n in enumerate(store.list(report["shards_at"]))]
    table = pa.concat_tables(shards)
    assert table["when"].to_pylist()[:5] == [{"y": 2024}, None, None, None, {"y": 2024}]
    assert table["doc_id"].to_pylist()[4:] == [f"{k}-{i}" for k in (2, 10) for i in range(4)]


# -- formats


def test_types_pass_through(tmp_path):
    table = pa.table(dict(
        id=pa.array([1, 2], pa.int32()), text=["a", "b"], day=pa.array([dt.date(2024, 2, 29), None]),
        at=pa.array([None, dt.datetime(2024, 1, 1, 12)], pa.timestamp("ns")),
        nested=[{"a": [1, None], "b": {"c": 1.5}}, None], price=pa.array([None, 3], pa.decimal128(9, 2)),
        word=pa.array(["x", "x"]).dictionary_encode(), none=[None, None]))
    pq.write_table(table, tmp_path / "t.parquet")
    keep = table.column_names[2:]
    r = Rows(tmp_path / "t.parquet", keep=keep)
    got = pa.Table.from_batches(r.batches())
    plain = table.set_column(6, "word", table["word"].cast(pa.string())) if table.column_names[6] == "word" else table
    assert got.select(keep).to_pylist() == plain.select(keep).to_pylist()
    assert [got.schema.field(k).type for k in keep] == [pa.string() if k == "word" else table.schema.field(k).type for k in keep]
    assert got["id"].to_pylist() == ["1", "2"]


def test_jsonl_has_the_types_of_all_its_rows(tmp_path):
    data = [dict(id=i, text="x", i=i, f=i if i else 0.5, mixed=i if i < 2000 else "n/a", late=None if i < 2000 else [i],
                 deep={"a": i} if i % 2 else {"b": None}) for i in range(3000)]
    r = Rows(jsonl(tmp_path / "j.jsonl", data), keep=["i", "f", "mixed", "late", "deep"])
    assert list(r.scan().types) == r.keep and [r.schema.field(k).type for k in r.keep] == [
        pa.int64(), pa.float64(), pa.string(), pa.list_(pa.int64()), pa.struct([("b", pa.string()), ("a", pa.int64())])]
    got = whole(r)
    assert got[0]["f"] == 0.5 and got[1]["mixed"] == "1" and got[2500]["mixed"] == "n/a" and got[2500]["late"] == [2500] and got[1]["deep"] == {"a": 1, "b": None}
    assert whole(Rows(tmp_path / "j.jsonl", keep=["mixed"]))[7]["mixed"] == "7"  # without a scan as well
    first = content_hashes(next(r.batches(0, 10)))
    few = Rows(jsonl(tmp_path / "few.jsonl", data[:10]), keep=r.keep)
    assert [few.schema.field(k).type for k in ("mixed", "f")] == [pa.int64(), pa.float64()]
    assert content_hashes(next(few.batches())) == first  # other rows changed the types, not what these say


def test_a_data_set_that_datasets_saved(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(some(2500))
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    r = Rows(tmp_path / "saved", keep=["n"])
    scan = r.scan()
    assert scan.n_rows == 2500 and whole(r) == some(2500) and whole(r, 2100, 2103) == some(3, 2100)
    assert scan.marks  # batches of Arrow are found again by their byte
    cut = tmp_path / "saved" / r.files[1].name
    cut.write_bytes(cut.read_bytes()[:-300])
    with pytest.raises(Refused, match=r"cannot be read as Arrow"):
        Rows(tmp_path / "saved").scan()
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "both")
    with pytest.raises(Refused, match=r"splits train, test; name one: .*train"):
        Rows(tmp_path / "both")
    assert Rows(tmp_path / "both" / "test").scan().n_rows == 2500
    # the hub itself is not reached: what `datasets` would stream comes from here
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision, streaming: data.to_iterable_dataset() if (name, split, revision, streaming) == (
        "owner/name", "train", "c0ffee", True) else pytest.fail("asked for something else"))
    far = Rows("hub:owner/name@c0ffee:train", keep=["n"])
    assert far.scan().n_rows == 2500 and whole(far, 1030, 1033) == some(3, 1030)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "fastq", "fasta"])
def test_no_row_and_one_row(kind, tmp_path):
    one = dict(parquet=None, jsonl='{"id": "ü", "text": "x"}', csv="id,text\nü,x\n", fasta=">ü\nACGT", fastq="@ü\nACGT\n+\nIIII")[kind]
    none = dict(parquet=None, jsonl="\n", csv="id,text\n", fasta="\n", fastq="\n")[kind]
    path, text = tmp_path / f"x.{kind}", "sequence" if kind.startswith("fast") else "text"
    for data, n in ((none, 0), (one, 1)):
        if kind == "parquet":
            pq.write_table(pa.table(dict(id=pa.array(["ü"] * n, pa.string()), text=pa.array(["x"] * n, pa.string()))), path)
        else:
            path.write_text(data)
        if n:
            r = Rows(path, text=text)
            assert r.scan().n_rows == 1 and whole(r)[0]["id"] == "ü"
        else:
            with pytest.raises(Refused, match=r"has no rows"):
                Rows(path, text=text).scan()


@pytest.mark.parametrize("ids, told", [
    ([1, 2, 1], "id '1' stands in row 0 and in row 2 .*line 1; .*line 3"), ([1, "1"], "id '1' stands in row 0 and in row 1"),
    (["a", ""], "row 1 .*line 2.* has no id"),
    (["a", None], "row 1 .* has no id"), (["a", ["b"]], "line 2: id is "), (["é", "e\u0301"], "")])
def test_ids(ids, told, tmp_path):
    r = Rows(jsonl(tmp_path / "i.jsonl", [dict(id=i, text="x") for i in ids]))
    with pytest.raises(Refused, match=told) if told else contextlib.nullcontext():
        assert r.scan().n_rows == len(ids)


def test_integer_ids_and_an_empty_id_in_parquet(tmp_path):
    pq.write_table(pa.table(dict(id=[7, 8, 7], text=["a", "b", "c"])), tmp_path / "a.parquet")
    with pytest.raises(Refused, match=r"id '7' stands in row 0 and in row 2 .*a.parquet, row 0; a.parquet, row 2"):
        Rows(tmp_path / "a.parquet").scan()
    assert dict(Rows(tmp_path / "a.parquet").scan("first").duplicates) == {2: 0}
    pq.write_table(pa.table(dict(id=[7, None], text=["a", "b"])), tmp_path / "a.parquet")
    with pytest.raises(Refused, match=r"row 1 .*has no id"):
        Rows(tmp_path / "a.parquet").scan()


def test_damaged_files_are_named(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table(dict(id=["1", "2"], text=bad)), tmp_path / "utf8.parquet")
    with pytest.raises(Refused, match=r"utf8.parquet has a value that is not what its column says"):
        whole(Rows(tmp_path / "utf8.parquet"))
    pq.write_table(pa.table(dict(id=[f"{i}" for i in range(9999)], text=["x" * 50] * 9999)), tmp_path / "cut.parquet", row_group_size=3000, compression="zstd")
    data = bytearray((tmp_path / "cut.parquet").read_bytes())
    data[len(data) // 2: len(data) // 2 + 2000] = b"\0" * 2000
    (tmp_path / "cut.parquet").write_bytes(data)
    with pytest.raises(Refused, match=r"cut.parquet cannot be read as Parquet, in row group \d after row \d+"):
        whole(Rows(tmp_path / "cut.parquet"))
    parts = tmp_path / "parts"
    parts.mkdir()
    pq.write_table(pa.table(dict(id=["1"], text=["x"], n=[1])), parts / "1.parquet")
    pq.write_table(pa.table(dict(id=["2"], text=["x"], n=[{"a": 1}])), parts / "2.parquet")
    with pytest.raises(Refused, match=r"keep='n' is int64 in .*1.parquet and struct<a: int64> in .*2.parquet"):
        Rows(parts, keep=["n"])


# -- memory

# Not ru_maxrss: a child inherits that of the process that started it.
PEAK = """
import re
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
CHILD = PEAK + """
import json, sys
from waystation.rows import Rows
base = peak()
r = Rows(sys.argv[1], text=sys.argv[2])
n = r.scan().n_rows
assert n == sum(b.num_rows for b in r.batches())
print(json.dumps(dict(n=n, base=base/1024, peak=peak()/1024)))
"""


def peak(path, text="text") -> dict:
    "Peak memory in MB of a process that scans a source and reads all of it."
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), text], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def write(path: Path, n: int, length: int = 60):
    if path.suffix == ".parquet":
        schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        pq.write_table(pa.table(dict(id=[f"row-{i}" for i in range(n)], text=[f"{i} " * (length // 7) for i in range(n)]), schema), path, row_group_size=n)
        return
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else open(path, "w") as f:
        for i in range(n):
            text = f"{i} " * (length // 7)
            f.write(f">row-{i}\n{text}\n{text}\n" if ".fa" in path.name else json.dumps(dict(id=f"row-{i}", text=text)) + "\n")


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.jsonl.gz", "rows.fa"])
def test_memory_does_not_grow_with_rows(name, tmp_path):
    "One row group, one file: 10^6 rows take no more than 10^5, and hardly more than 10^4, of which pages are not full."
    found = {}
    for n in (10_000, 100_000, 1_000_000):
        write(tmp_path / name, n)
        found[n] = peak(tmp_path / name, "sequence" if name.endswith("fa") else "text")
        assert found[n]["n"] == n
    assert found[1_000_000]["peak"] < 1.10 * found[100_000]["peak"], found
    assert found[1_000_000]["peak"] < 1.15 * found[10_000]["peak"], found


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["long.jsonl", "long.parquet"])
def test_memory_does_not_grow_with_long_rows(name, tmp_path):
    "Texts of 100,000 characters. A page of Parquet cannot be read in part, and pyarrow writes 1,024 rows a page: 100 MB here."
    found = {}
    for n in (2_000, 8_000):
        write(tmp_path / name, n, 100_000)
        found[n] = peak(tmp_path / name)
    assert found[8_000]["peak"] < 1.10 * found[2_000]["peak"], found
    assert found[8_000]["peak"] - found[8_000]["base"] < (600 if name.endswith("parquet") else 200), found


IDS = PEAK + """
import json, sys, tempfile
from pathlib import Path
from waystation.rows import Ids
with tempfile.TemporaryDirectory() as tmp:
    ids, n = Ids(Path(tmp)), int(sys.argv[1])
    ids.add(["warm"] * 70_000)
    before = peak()
    for k in range(0, n, 8192): ids.add([f"row-{i}" for i in range(k, min(k + 8192, n))])
    again = ids.duplicates()
    disk = sum(f.stat().st_size for f in Path(tmp).iterdir())
    print(json.dumps(dict(duplicates=len(again), grew_mb=(peak() - before)/1024, disk=disk/(n + 70_000))))
"""


@needs_proc
@pytest.mark.slow
def test_ten_million_ids_in_bounded_memory():
    found = {}
    for n in (1_000_000, 10_000_000):
        done = subprocess.run([sys.executable, "-c", IDS, str(n)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[n] = json.loads(done.stdout)
    assert all(f["duplicates"] == 69_999 and f["disk"] == 24 for f in found.values()), found
    assert found[10_000_000]["grew_mb"] < 25, found


def test_ids_on_disk_find_what_a_dictionary_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(Ids, "some", 500)
    names = [f"{x}" for x in np.random.default_rng(0).integers(0, 4000, 6000)]
    ids, seen, want = Ids(tmp_path), {}, {}
    for k in range(0, 6000, 77):
        ids.add(names[k:k + 77])
    for i, x in enumerate(names):
        if seen.setdefault(x, i) != i:
            want[i] = seen[x]
    assert dict(ids.duplicates()) == want and len(list(tmp_path.glob("*.ids"))) == 256


# -- content


def test_content_hashes_are_fixed(tmp_path):
    "A figure that stands in somebody's store: it may not change with versions or machines."
    batch = pa.record_batch(dict(id=["a"], text=["x"], n=[1], deep=[{"b": [1.0, None], "a": "é"}], day=[dt.date(2024, 2, 29)]))
    assert content_hashes(batch)[0].as_py().hex() == "c7ad3cf97077dfcd0cca8cf41be4e811"
    us, ns = (pa.record_batch(dict(text=["x"], t=pa.array([dt.datetime(2024, 1, 1, 12, 0, 0, 500)], pa.timestamp(u)))) for u in ("us", "ns"))
    assert content_hashes(us) == content_hashes(ns)
    for a, b in [(dict(text=["a"], k=["b"]), dict(text=["ab"], k=[""])), (dict(text=["a"], k=[None]), dict(text=["a"], k=[""])),
                 (dict(text=["a"]), dict(text=["b"]))]:
        one, two = (content_hashes(pa.table({n: pa.array(v, pa.string()) for n, v in x.items()})) for x in (a, b))
        assert one != two
    assert rows.fingerprint(find_files(jsonl(tmp_path / "a.jsonl", some(3)))) == Rows(tmp_path / "a.jsonl").scan().fingerprint
