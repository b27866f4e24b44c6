"""The table: the same rows to the bit however often its build was killed or updated, read alike by other programs, and hostile columns in it."""

import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from proving import Clock, note, size

pytest.importorskip("lance")

import lance
from waystation.lease import Lease
from waystation.recipe import begin
from waystation.runtime import Refused
from waystation.stations.export import export
from waystation.store import Store
from waystation.vectors import table as tables
from waystation.vectors.search import search, sql
from waystation.vectors.table import build_table, card, join, open_table, written

DIM = 16


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")


def vector(seed: str, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(list(seed.encode())).normal(size=dim).astype(np.float32)


def shard(to: Path, rows: dict[str, str], dim: int = DIM, aside=(), **more) -> Path:
    "Rows are id -> text; the vector follows from both."
    flat = np.concatenate([np.empty(0, np.float32), *(vector(i + t, dim) for i, t in rows.items())])
    ids = pa.array(rows, pa.string())
    columns = dict(id=ids, doc_id=ids, text=pa.array(rows.values(), pa.string()), vector=pa.FixedSizeListArray.from_arrays(pa.array(flat), dim), **more)
    to.mkdir(parents=True)
    pq.write_table(pa.table(columns), to / "vectors.parquet")
    (to / "quarantine.jsonl").write_text("".join(json.dumps(dict(row=0, id="x", reason=r)) + "\n" for r in aside))
    return to


def embed(tmp_path: Path, *shards: dict, aside=(), **how) -> str:
    "Seal shards as an embed step does; the store."
    params = dict(run="u", store=str(tmp_path / "store"), seed=0, restart=False, update=False, take_over=False, step="embed", source="", limit=len(shards)) | how
    shutil.rmtree(tmp_path / "made", ignore_errors=True)
    with begin("embed", params) as job:
        for k, rows in enumerate(shards):
            reasons = aside if k == 0 else []
            job.seal(shard(tmp_path / f"made/{k}", rows, aside=reasons), "shards", k, dict(reasons={r: 1 for r in reasons}))
        job.finish(dict(model="asset:minilm", dim=DIM, shards=len(shards), shards_at=f"{job.base}/shards"))
    return params["store"]


def rows_of(path) -> dict[str, tuple]:
    "All that a table holds, by id; vectors as bytes."
    t = open_table(path).to_table()
    assert len(set(t["id"].to_pylist())) == len(t)
    flat = t["vector"].combine_chunks().flatten().to_numpy().reshape(len(t), -1)
    rest = t.drop_columns("vector").to_pylist()
    return {r["id"]: (sorted(r.items()), v.tobytes()) for r, v in zip(rest, flat, strict=True)}


def some(a: int, b: int, text: str = "one") -> dict[str, str]:
    return {f"ä'{i}": text for i in range(a, b)}


# -- updates


def test_an_update_is_equal_to_a_rebuild(tmp_path, monkeypatch):
    "Changed, new and vanished rows; metadata joined again; only what differs is read and stored."
    pq.write_table(pa.table(dict(id=[f"ä'{i}" for i in range(60)], year=range(60))), tmp_path / "meta.parquet")
    how = dict(run="u", metadata=str(tmp_path / "meta.parquet"), color="year")
    store = embed(tmp_path, some(0, 10), some(10, 20), some(20, 30), some(30, 40), some(50, 60), aside=["empty text"])
    first = export(store=store, **how)
    after = [some(0, 10), some(10, 20) | some(12, 14, "two"), some(20, 30), some(30, 36), some(50, 60), some(40, 50)]
    embed(tmp_path, *after, aside=["empty text"], update=True)
    with pytest.raises(Refused, match="pass --update"):
        export(store=store, **how)
    read = []
    real = tables._batches
    monkeypatch.setattr(tables, "_batches", lambda name, *a: read.append(name) or real(name, *a))
    second = export(store=store, update=True, **how)
    assert read == [f"runs/u/embed/2/shards/{k}" for k in (1, 3, 5)]
    assert (second["seal"], second["rows"], second["set_aside"]) == ("vectors/u/v2", 56, {"empty text": 1})
    monkeypatch.setattr(tables, "_batches", real)
    rebuilt = export(store=store, step="again", shards="embed", **{k: v for k, v in how.items()})
    assert rows_of(second["table"]) == rows_of(rebuilt["table"]) and len(rows_of(first["table"])) == 50
    a, b = (card(open_table(r["table"])) for r in (second, rebuilt))
    assert {k for k in a if a[k] != b[k]} <= {"updates", "step", "attempt", "joined"} and a["updates"] == 1
    blobs = [{f["sha256"] for name, f in Store(store).read(f"vectors/u/v{k}").files.items() if "/data/" in name} for k in (1, 2)]
    assert blobs[0] & blobs[1], "rows that stay are not stored twice"
    assert export(store=store, update=True, **how) == second, "with nothing changed, an update does nothing"
    assert lance.dataset(second["table"]).tags.list().keys() == {"complete"}
    q = vector("ä'12two")
    assert [search(open_table(r["table"]), q, 1)["id"].to_pylist() for r in (second, rebuilt)] == [["ä'12"]] * 2


def test_updates_of_updates(tmp_path):
    "Three in a row, one of them with most shards changed, which is built from nothing."
    store = embed(tmp_path, some(0, 10), some(10, 20), some(20, 30), some(30, 40))
    made = [export(run="u", store=store)]
    for k, text in enumerate(["two", "three", "four"]):
        many = some(0, 10, text), *(some(a, a + 10, text if k == 1 else "one") for a in (10, 20)), some(30, 40)
        embed(tmp_path, *many, update=True, limit=10 + k)
        made.append(export(run="u", store=store, update=True))
    assert [card(open_table(r["table"]))["updates"] for r in made] == [0, 1, 0, 0]
    assert {r[0][-1][1] for r in rows_of(made[-1]["table"]).values()} == {"one", "four"} and len(rows_of(made[-1]["table"])) == 40


def test_a_kill_after_any_shard_costs_that_shard(tmp_path, monkeypatch):
    "Committed shards are not read again, whether the build was killed among them, in a join or after an index."
    monkeypatch.setattr(tables, "GROUP", 1)
    shards = [(f"s{k}", shard(tmp_path / f"s{k}", some(10 * k, 10 * k + 10), aside=["no tokens"])) for k in range(4)]
    pq.write_table(pa.table(dict(id=[f"ä'{i}" for i in range(60)], year=range(60))), tmp_path / "meta.parquet")
    whole, torn = tmp_path / "whole/table.lance", tmp_path / "torn/table.lance"
    build_table(shards, whole, metadata=tmp_path / "meta.parquet", index="ivf_rq", filters=["year"])
    read = []

    def until(n):
        for name, folder in shards:
            if name in written(torn):
                continue
            if n == 0:
                raise KeyboardInterrupt
            n -= 1
            read.append(name)
            yield name, folder
    for n in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            build_table(until(n), torn)
        with pytest.raises(Refused, match=r"no folder|never finished|cannot be read"):
            open_table(torn)
    for name in ("check_unique", "index_vectors", "index_text", "complete"):
        with monkeypatch.context() as m:
            m.setattr(tables, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                build_table(until(9), torn, metadata=tmp_path / "meta.parquet", index="ivf_rq", filters=["year"])
        with pytest.raises(Refused, match="never finished"):
            open_table(torn)
    build_table(until(9), torn, metadata=tmp_path / "meta.parquet", index="ivf_rq", filters=["year"])
    assert read == ["s0", "s1", "s2", "s3"] and rows_of(torn) == rows_of(whole)
    assert card(open_table(torn))["quarantined"] == {"no tokens": 4} and written(torn) is None
    assert {i.name for i in open_table(torn).describe_indices()} == {i.name for i in open_table(whole).describe_indices()}


def test_another_try_with_other_parameters_begins_anew(tmp_path):
    "Nothing was sealed, so nothing binds: what was written as float32 must not end up in a table of float16."
    store = embed(tmp_path, some(0, 10))
    with pytest.raises(Refused, match="no column"):
        export(run="u", store=store, color="genus")
    told = export(run="u", store=store, storage="float16")
    assert open_table(told["table"]).schema.field("vector").type.value_type == pa.float16()
    assert told["kept"] == dict(storage="float16", recall=1.0, rows=10) == card(open_table(told["table"]))["kept"]


# -- other programs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A table with an index, and what its shards hold."
    tmp = tmp_path_factory.mktemp("clients")
    shards = [(f"s{k}", shard(tmp / f"s{k}", {f"id{i}": "ü🦠" for i in range(300 * k, 300 * k + 300)})) for k in range(2)]
    build_table(shards, tmp / "table.lance", index="ivf_rq")
    t = pa.concat_tables(pq.read_table(f / "vectors.parquet") for _, f in shards)
    vectors = t["vector"].combine_chunks().flatten().to_numpy().reshape(len(t), -1)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    q = vector("a question")
    near = [t["id"][int(i)].as_py() for i in np.argsort(-(unit @ q), kind="stable")[:5]]
    assert search(open_table(tmp / "table.lance"), q, 5)["id"].to_pylist() == near
    return tmp, dict(zip(t["id"].to_pylist(), (v.tobytes() for v in vectors), strict=True)), q, near


def held(t: pa.Table) -> dict[str, bytes]:
    flat = t["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return dict(zip(t["id"].to_pylist(), (v.tobytes() for v in flat.reshape(len(t), -1)), strict=True))


def test_pylance_and_lancedb(made):
    import lancedb

    tmp, want, q, near = made
    ds = lance.dataset(str(tmp / "table.lance"))
    assert held(ds.to_table()) == want
    assert ds.to_table(columns=["id", "_distance"], nearest=dict(column="vector", q=q, k=5, metric="cosine", refine_factor=20))["id"].to_pylist() == near
    table = lancedb.connect(tmp).open_table("table")
    assert held(table.to_arrow()) == want and table.count_rows() == 600
    assert [r["id"] for r in table.search(q).distance_type("cosine").refine_factor(20).limit(5).to_list()] == near


def test_duckdb(made):
    import duckdb

    tmp, want, q, near = made
    ds = lance.dataset(str(tmp / "table.lance"))
    with duckdb.connect() as con:
        con.register("t", ds)
        assert held(con.sql("SELECT id, vector FROM t").to_arrow_table()) == want
        order = f"array_cosine_distance(vector::FLOAT[{DIM}], {q.tolist()}::FLOAT[{DIM}])"
        assert [i for (i,) in con.execute(f"SELECT id FROM t ORDER BY {order} LIMIT 5").fetchall()] == near


def test_polars(made):
    pl = pytest.importorskip("polars")
    tmp, want, q, near = made
    frame = pl.scan_pyarrow_dataset(lance.dataset(str(tmp / "table.lance"))).select("id", "vector").collect()
    vectors = frame["vector"].to_numpy()
    assert dict(zip(frame["id"], (v.tobytes() for v in vectors), strict=True)) == want and vectors.dtype == np.float32
    distance = pl.Series(1 - vectors @ q / np.linalg.norm(vectors, axis=1))
    assert frame.with_columns(d=distance).sort("d").head(5)["id"].to_list() == near


NODE = """
const lancedb = require("@lancedb/lancedb");
(async () => {
  const [where, q] = JSON.parse(process.argv[2]);
  const table = await (await lancedb.connect(where)).openTable("table");
  const near = await table.vectorSearch(q).distanceType("cosine").refineFactor(20).limit(5).toArray();
  const rows = (await table.query().select(["id", "vector"]).limit(10000).toArray()).map(r => [r.id, Array.from(r.vector)]);
  console.log(JSON.stringify({count: await table.countRows(), near: near.map(r => r.id), rows}));
})();
"""


@pytest.mark.slow
def test_the_npm_client(made, tmp_path):
    tmp, want, q, near = made
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("NOT CHECKED: node or npm is missing")
    got = subprocess.run(["npm", "i", "--no-audit", "--no-fund", "@lancedb/lancedb"], cwd=tmp_path, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"NOT CHECKED: npm cannot bring @lancedb/lancedb: {got.stderr[-300:]}")
    (tmp_path / "ask.js").write_text(NODE)
    said = subprocess.run(["node", "ask.js", json.dumps([str(tmp), q.tolist()])], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    told = json.loads(said.stdout)
    assert (told["count"], told["near"]) == (600, near)
    assert {i: np.array(v, np.float32).tobytes() for i, v in told["rows"]} == want


# -- hostile contents

COLUMNS = {
    "nothing at all": pa.nulls(3),
    "some null": pa.array([None, "x", None]),
    "dates": pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)]),
    "moments": pa.array([datetime.datetime(2026, 11, 27, tzinfo=datetime.UTC)] * 3, pa.timestamp("us", "UTC")),
    "nested": pa.array([dict(a=dict(b=[1, 2], c="ü")), None, dict(a=None)], pa.struct([("a", pa.struct([("b", pa.list_(pa.int64())), ("c", pa.string())]))])),
    "lists": pa.array([["a", None], [], None]),
    "🦠 größe\n": pa.array(["👩🏽‍🔬", "\u202e right to left", "\x00 null"]),
    "select \"id\" from t; --": pa.array([1, 2, 3]),
    "long": pa.array(["x" * 100_000, "", "ü" * 100_000]),
    "nan": pa.array([float("nan"), float("inf"), None]),
    "unsigned": pa.array([0, 2**64 - 1, None], pa.uint64()),
    "true": pa.array([True, None, False]),
    "bytes": pa.array([b"\x00\xff", None, b""]),
}


def test_hostile_columns(tmp_path):
    "What goes in comes out, and questions about it are answered."
    more = COLUMNS | {f"column {i}": pa.array([i, None, -i]) for i in range(500)}
    rows = {"a'; DROP TABLE t": "x", "🦠": "y", "c": "z"}
    folder = shard(tmp_path / "s", rows, **more)
    made = build_table([("s", folder)], tmp_path / "table.lance", filters=["🦠 größe\n"])
    ds, want = open_table(tmp_path / "table.lance"), pq.read_table(folder / "vectors.parquet")
    got = ds.to_table().select(want.schema.names)
    for name in want.schema.names:
        same = pc.is_nan(want[name]).to_pylist() == pc.is_nan(got[name]).to_pylist() if name == "nan" else got[name].to_pylist() == want[name].to_pylist()
        assert same and got[name].type == want[name].type, name
    assert made["rows"] == 3 and made["filters"] == {"🦠 größe\n": "bitmap"}
    found = search(ds, vector("🦠y"), 1, where="unsigned > 5", columns=["id", "nested"])
    assert found["id"].to_pylist() == ["🦠"]
    assert sql('SELECT count(*) AS n, sum("column 499") AS s FROM t', t=ds).to_pylist() == [dict(n=3, s=0)]


def test_a_column_named_vector_in_the_metadata(tmp_path):
    "Whatever metadata calls a vector, the table's own stays."
    build_table([("s", shard(tmp_path / "s", some(0, 3)))], tmp_path / "t.lance")
    before = rows_of(tmp_path / "t.lance")
    pq.write_table(pa.table({"id": ["ä'0", "ä'1", "ä'2"], "vector": [1, 2, 3], "Text": ["q"] * 3, "year": [1, 2, 3]}), tmp_path / "meta.parquet")
    told = join(lance.dataset(str(tmp_path / "t.lance")), tmp_path / "meta.parquet")
    assert (told["columns"], told["left_out"]) == (["year"], ["vector", "Text"]) and rows_of(tmp_path / "t.lance") == before


@pytest.mark.parametrize("shards, message", [
    ([{}], "every row was set aside"),
    ([{"a": "x"}, ({"b": "y"}, 8)], r"b does not fit the first shard \(vector: .*\[8\] instead of .*\[16\]"),
    ([{"a": "x"}, {"a": "y"}], r"a \(2 times\)"),
])
def test_refused(tmp_path, shards, message):
    pairs = [(f"{k}{'ab'[k]}", shard(tmp_path / str(k), *(s if isinstance(s, tuple) else (s,)))) for k, s in enumerate(shards)]
    with pytest.raises(Refused, match=message):
        build_table(pairs, tmp_path / "t.lance")


@pytest.mark.parametrize("name", ["", "a.b", "a`b", "_distance", "_rowid"])
def test_names_that_a_table_cannot_have(tmp_path, name):
    with pytest.raises(Refused, match="rename the column and embed again"):
        build_table([("s", shard(tmp_path / "s", some(0, 3), **{name: pa.array([1, 2, 3])}))], tmp_path / "t.lance")
    if not name:
        return  # DuckDB, which reads metadata, gives it a name
    build_table([("s", shard(tmp_path / "ok", some(0, 3)))], tmp_path / "t.lance")
    pq.write_table(pa.table({"id": ["ä'0"], name: [1]}), tmp_path / "meta.parquet")
    with pytest.raises(Refused, match="rename the column and export again"):
        join(lance.dataset(str(tmp_path / "t.lance")), tmp_path / "meta.parquet")


def test_one_row(tmp_path):
    build_table([("s", shard(tmp_path / "s", {"only": "x"}))], tmp_path / "t.lance")
    assert search(open_table(tmp_path / "t.lance"), vector("q"), 10)["id"].to_pylist() == ["only"]


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_storage(tmp_path, storage):
    "Half the bytes, the same neighbours but for rounding; what float16 cannot hold is refused."
    folder = shard(tmp_path / "s", some(0, 500))
    build_table([("s", folder)], tmp_path / "t.lance", storage=storage)
    ds, want = open_table(tmp_path / "t.lance"), pq.read_table(folder / "vectors.parquet")["vector"].combine_chunks().flatten().to_numpy()
    got = ds.to_table()["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    assert got.dtype == storage and (got == want.astype(storage)).all()
    big = pq.read_table(folder / "vectors.parquet").slice(0, 1)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.full(DIM, 1e6, np.float32)), DIM)
    pq.write_table(big.set_column(3, "vector", flat), folder / "vectors.parquet")
    if storage == "float16":
        with pytest.raises(Refused, match="65504"):
            build_table([("s", folder)], tmp_path / "big.lance", storage=storage)


def test_a_damaged_shard_stops_with_its_name(tmp_path):
    store = embed(tmp_path, some(0, 2000), some(2000, 4000))
    blob = max((tmp_path / "store/blobs").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(Refused, match=r"runs/u/embed/1/shards/[01]"):
        export(run="u", store=store)
    assert not Store(store).list("vectors")


def test_a_second_writer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Lease, "patience", 0.1)
    store = embed(tmp_path, some(0, 3))
    with begin("export", dict(run="u", store=store, seed=0, restart=False, take_over=False, step="other")) as job:
        assert job.lease
        with pytest.raises(Refused, match=f"pid {os.getpid()}|process {os.getpid()}"):
            export(run="u", store=store)


# -- kill -9

CHILD = "import sys, waystation.vectors.table as t; t.GROUP = 1; from waystation.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.timeout(size(600, 7200))
def test_kill_at_a_random_moment_of_export(tmp_path):
    "Killed while it starts, writes, indexes or seals, in a first build and in an update; run again, it ends as if nothing had happened."
    rounds, rng, kills, at, runs = size(3, 30), random.Random(0), 0, Counter(), 0
    old = [some(300 * k, 300 * k + 300) for k in range(8)]
    new = [*old[:3], some(900, 1100, "two"), *old[4:], some(5000, 5100)]
    how = ["--index", "ivf_rq", "--color", "text"]

    def state(run):
        done = {n: Store(str(tmp_path / "store")).read(n).digest for n in Store(str(tmp_path / "store")).list(f"vectors/{run}")}
        return done, max((len(f) for p, _, f in os.walk(tmp_path / "cache/work") if p.endswith("_versions") and f"/{run}/" in p), default=0)

    def go(run, *more, kill):
        command = [sys.executable, "-c", CHILD, "export", "--run", run, "--store", str(tmp_path / "store"), *how, *more]
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kill:
            deadline, target = time.monotonic() + 120, rng.randint(0, 14)
            before, _ = state(run)
            while p.poll() is None and time.monotonic() < deadline and state(run)[1] < target and state(run)[0] == before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3) if target == 14 else rng.uniform(0, 0.03))
            if p.poll() is None:
                os.kill(p.pid, signal.SIGKILL)
        _, said = p.communicate(timeout=300)
        assert p.returncode in (0, -signal.SIGKILL if kill else 0), said[-3000:]
        return p.returncode

    with Clock() as clock:
        embed(tmp_path, *old, run="calm")
        embed(tmp_path, *new, run="calm", update=True)
        want = rows_of(export(run="calm", store=str(tmp_path / "store"), index="ivf_rq", color="text")["table"])
        while kills < rounds:
            run, runs = f"r{runs}", runs + 1
            embed(tmp_path, *old, run=run)
            if runs % 2:
                assert go(run, kill=False) == 0
            embed(tmp_path, *new, run=run, update=True)
            for _ in range(rng.randint(1, 3)):
                if go(run, "--update", kill=kills < rounds):
                    kills += 1
                    done, versions = state(run)
                    at["sealed" if f"vectors/{run}/v{1 + runs % 2}" in done else "in the build" if versions else "before the build"] += 1
                    for name in done:  # what can be seen is whole
                        seen = open_table(Store(str(tmp_path / "store")).fetch(name, tmp_path / "seen" / str(kills) / name) / "table.lance")
                        assert seen.count_rows() == card(seen)["rows"]
            assert go(run, "--update", kill=False) == 0
            name = f"vectors/{run}/current"
            assert rows_of(Store(str(tmp_path / "store")).fetch(name, tmp_path / "seen" / run) / "table.lance") == want
    note("kill -9 of export", "file", kills=kills, runs=runs, doubled=0, missing=0, other_vectors=0, at=at, seconds=clock.seconds)
    print(dict(kills=kills, runs=runs, at=at))


# -- a full disk

FULL = """
import sys, pathlib
from waystation.vectors.table import build_table
from waystation.runtime import Refused
root, to = map(pathlib.Path, sys.argv[1:])
try: build_table([(f"s{k}", root / f"s{k}") for k in range(3)], to / "table.lance")
except Refused as e: print(e); sys.exit(2)
"""


@pytest.mark.slow
def test_full_disk(tmp_path):
    "A sentence, not a traceback of Rust."
    for k in range(3):
        shard(tmp_path / f"s{k}", some(2000 * k, 2000 * k + 2000))
    (tmp_path / "small").mkdir()
    mount = f'mount -t tmpfs -o size=200k none {tmp_path}/small 2>/dev/null || exit 77; exec "$@"'
    run = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", FULL, str(tmp_path), str(tmp_path / "small")]
    done = subprocess.run(run, capture_output=True, text=True) if shutil.which("unshare") else None
    if done is None or (done.returncode in (1, 77) and "unshare" in (done.stderr + "unshare" * (done.returncode == 77))):
        pytest.skip("NOT CHECKED: a small disk of its own needs unshare and mount")
    assert done.returncode == 2 and "no space left for the table at" in done.stdout, (done.stdout + done.stderr)[-2000:]
