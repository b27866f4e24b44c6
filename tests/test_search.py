"""Questions to a table by `waystation search` and `waystation sql`: the right rows, nothing but reading, and the same answer with, without and after a Redis."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import servers

pytest.importorskip("lance")

from waystation import cache, cli
from waystation.assets import resolve
from waystation.store import Store
from waystation.vectors import ask as asking
from waystation.vectors import search as searching
from waystation.vectors.ask import ask, find_table, search_text
from waystation.vectors.search import search, sql
from waystation.vectors.table import build_table, card, write_table

ROWS, DIM = 600, 64
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(ROWS, DIM)).astype(np.float32)
PHYLA = ["Proteobacteria", "O'Brien; DROP", "größe 💥"]
WORDS = ["river", "mountain", "Märkte", "deep sea", "soil"]


def make(to: Path, vectors: np.ndarray = VECTORS, about: dict | None = None, **columns) -> Path:
    "A finished table `to`/table.lance of these vectors."
    n = len(vectors)
    columns = dict(
        id=[f"r{i}" for i in range(n)],
        text=[f"row {i} of the {WORDS[i % 5]}" for i in range(n)],
        depth=list(range(n)),
        phylum=[PHYLA[i % 3] for i in range(n)],
        größe=[float(i) for i in range(n)],
    ) | columns
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    (to / "shard").mkdir(parents=True)
    pq.write_table(pa.table(dict(columns, vector=vector)), to / "shard/vectors.parquet")
    build_table([("shards/0", to / "shard")], to / "table.lance", about=about or dict(model="asset:minilm"))
    shutil.rmtree(to / "shard")
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("table"))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "Its own store, cache of tables and no Redis, as a process that has just begun."
    monkeypatch.setenv("WAYSTATION_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("WAYSTATION_REDIS", raising=False)
    monkeypatch.setattr(cache, "_shared", {})


@pytest.fixture
def sealed(made, tmp_path, monkeypatch):
    "The table in a store, under a ref; `models` stay where they are."
    home = Path(cache.settings()["cache"])
    (tmp_path / "cache").mkdir()
    if (home / "assets").is_dir():
        (tmp_path / "cache/assets").symlink_to(home / "assets")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    store = Store(tmp_path / "store")
    store.seal(made, "vectors/demo/v1")
    store.refer("vectors/demo/current", "vectors/demo/v1")
    return store


@pytest.fixture
def question(tmp_path):
    np.save(tmp_path / "q.npy", VECTORS[7] + RNG.normal(size=DIM).astype(np.float32) / 10)
    return tmp_path / "q.npy"


def state(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.md5(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


# ---- the right rows


def test_words_a_vector_and_search_agree_on_packaged_data(run, tmp_path):
    "MiniLM and titles of the banking documents: the command encodes as the table was encoded, wherever the question comes from."
    from waystation.embedding.engine import embed_texts

    rows = pq.read_table(resolve("asset:banking", "source").path).slice(0, 48)
    model = resolve("asset:minilm", "model")
    about = dict(model="asset:minilm", model_fingerprint=model.fingerprint, pooling="mean", max_tokens=64, dimensions=0)
    vectors = embed_texts(model.path, rows["title"].to_pylist(), "mean", 64)
    table = make(tmp_path / "banking", vectors, about, id=rows["id"].to_pylist(), text=rows["title"].to_pylist(), category=rows["category"].to_pylist())
    words, where = "how do I close an account?", "category LIKE 'bank%' AND depth < 40"
    q = embed_texts(model.path, [words], "mean", 64)[0]
    np.save(tmp_path / "words.npy", q)
    for args in ((), ("--where", where), ("-k", 100)):
        want = search(find_table(str(table)).ds, q, dict(zip(args[::2], args[1::2], strict=True)).get("-k", 10), where if "--where" in args else "")
        for asked in (words, tmp_path / "words.npy"):
            got = run("search", table, asked, *args)["rows"]
            assert [r["id"] for r in got] == want["id"].to_pylist() and got == want.to_pylist()
    assert "close" in got[0]["text"].lower() or "clos" in got[1]["text"].lower()
    both = run("search", table, words, "--mode", "hybrid", "-k", 5, "--columns", "id,category")["rows"]
    assert list(both[0]) == ["id", "category", "_relevance"] and len(both) == 5
    assert "model='asset:kmer-random' is not the model that made these vectors; that is 'asset:minilm'" in run(
        "search", table, words, "--model", "asset:kmer-random", code=2)
    assert "that is 'asset:minilm'" in run("search", table, tmp_path / "words.npy", "--model", "asset:kmer-random", code=2)
    changed = make(tmp_path / "changed", vectors, about | dict(model_fingerprint="another"))
    assert "model='asset:minilm' has changed since it made these vectors" in run("search", changed, words, code=2)


def test_a_sequence_goes_through_the_tables_encoder(run, tmp_path):
    from waystation.embedding.engine import embed_texts

    model = resolve("asset:kmer-random", "model")
    letters = np.random.default_rng(1).integers(0, 4, (12, 60))
    sequences = ["".join("ACGT"[x] for x in row) for row in letters]
    about = dict(model="asset:kmer-random", model_fingerprint=model.fingerprint, pooling="mean", max_tokens=32)
    table = make(tmp_path / "t", embed_texts(model.path, sequences, "mean", 32), about, text=sequences)
    found = run("search", table, sequences[5], "-k", 1)["rows"][0]
    assert found["id"] == "r5" and abs(found["_distance"]) < 1e-5


@pytest.mark.parametrize("where", ["", "depth BETWEEN 100 AND 300 AND phylum = 'Proteobacteria'", "größe < 50", "text LIKE '%💥%' OR depth IN (3, 7, 599)"])
def test_modes_against_brute_force(made, where):
    "Distances by numpy, and reciprocal ranks by hand."
    ds, q = find_table(str(made)).ds, VECTORS[7]
    keep = sql(f"SELECT depth FROM t{' WHERE ' + where if where else ''}", t=ds)["depth"].to_pylist()
    distance = {i: 1 - float(VECTORS[i] @ q / np.linalg.norm(VECTORS[i]) / np.linalg.norm(q)) for i in keep}
    near = sorted(keep, key=lambda i: distance[i])
    got = search(ds, q, 20, where, exact=True)
    assert got["depth"].to_pylist() == near[:20] and np.allclose(got["_distance"], [distance[i] for i in near[:20]], atol=1e-5)
    words = search_text(ds, "sea soil", ROWS, where)["depth"].to_pylist()
    assert set(words) == {i for i in keep if i % 5 in (3, 4)}
    ranked = search_text(ds, "sea soil", 100, where)["depth"].to_pylist()
    want = {i: sum(1 / (61 + r.index(i)) for r in (near[:100], ranked) if i in r) for i in {*near[:100], *ranked}}
    both = asking.search_both(ds, q, "sea soil", 30, where, ["depth"])
    assert np.allclose(both["_relevance"], sorted(want.values(), reverse=True)[:30])
    assert all(abs(want[i] - x) < 1e-12 for i, x in zip(both["depth"].to_pylist(), both["_relevance"].to_pylist(), strict=True))


def test_no_row_and_more_than_all_rows(run, made, question):
    assert run("search", made, question, "--where", "depth < 0")["rows"] == []
    assert run("search", made, "zebra", "--mode", "text")["rows"] == []
    nothing = run("sql", made, "SELECT id FROM vectors WHERE depth < 0")
    assert nothing["rows"] == [] and nothing["text"] == "no row"
    assert len(run("search", made, question, "-k", 10**7)["rows"]) == ROWS
    assert len(run("search", made, "river", "--mode", "text", "-k", 10**15)["rows"]) == ROWS / 5


def test_unicode_in_and_out(run, made, question):
    rows = run("search", made, question, "--where", "phylum = 'größe 💥' AND größe > 3", "--columns", "größe,phylum,größe")["rows"]
    assert {r["phylum"] for r in rows} == {"größe 💥"} and list(rows[0]) == ["größe", "phylum", "_distance"]
    assert run("search", made, "MÄRKTE", "--mode", "text", "-k", 3)["rows"][0]["text"].endswith("Märkte")
    assert run("sql", made, "SELECT max(größe) AS \"größte 💥\" FROM vectors WHERE phylum LIKE 'größe%'")["columns"] == ["größte 💥"]
    for args in (("\ud800",), (question, "--where", "phylum = '\ud800'")):
        assert "half of a surrogate pair" in run("search", made, *args, "--mode", "text" if len(args) == 1 else "vector", code=2)


def test_a_person_sees_a_table(made, question, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert cli.main(["search", str(made), str(question), "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["_distance", "id"] and len(lines) == 4 and max(map(len, lines)) <= 70
    assert cli.main(["sql", str(made), "SELECT * FROM vectors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == ROWS + 1 and max(map(len, lines)) <= 70


# ---- nothing but reading

WHERE = [
    "depth < 3; DROP TABLE vectors", "depth < 3) OR (1 = 1", "1 = 1); DROP TABLE vectors; --", "depth < 3 -- AND more", "depth < 3 /* x", "depth < 3 LIMIT 1",
    "id IN (SELECT id FROM vectors)", "read_csv('/etc/passwd')", "depth", "'", "colour = 'red'", "depth = 'x'", "$1", "?", "(" * 9999, "depth < 3 depth", "💥",
    "\"phylum\" = 'x'",
]


@pytest.mark.parametrize("where", WHERE, ids=[w[:20] for w in WHERE])
def test_where_is_one_condition_or_refused(run, made, question, where):
    "Lance alone takes the first of these as `depth < 3` without a word, and `$1` makes it panic."
    before = state(made)
    for mode in (("vector", question), ("text", "river")):
        said = run("search", made, mode[1], "--mode", mode[0], "--where", where, code=2)
        assert said.startswith("where=") and "it is one SQL condition over id, text, depth" in said and len(said) < 1000
    assert state(made) == before


def test_where_that_fails_on_a_row_is_not_called_a_damaged_table(run, made, question):
    assert "cannot be answered for every row" in run("search", made, question, "--where", "1 / depth = 1", code=2)


OUTSIDE = [  # what the settings of the connection shut by themselves
    "INSERT INTO vectors VALUES (1)", "UPDATE vectors SET id = 'x'", "DELETE FROM vectors", "COPY vectors TO '{here}/out.csv'",
    "COPY (SELECT 1) TO '{here}/out.csv'",
    "EXPORT DATABASE '{here}/out'", "ATTACH '{here}/out.db' AS x", "INSTALL httpfs", "LOAD httpfs", "SET enable_external_access = true",
    "SET temp_directory = '{here}'", "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM read_text('/etc/passwd')", "SELECT * FROM glob('/*')",
    "SELECT * FROM read_parquet('{here}/secret.parquet')", "SELECT * FROM '{here}/secret.csv'", "SELECT * FROM secret", "DESCRIBE '{here}/secret.csv'",
    "(WITH \"{here}/secret.csv\" AS (SELECT 1 AS a) SELECT a FROM \"{here}/secret.csv\") UNION ALL SELECT a FROM '{here}/secret.csv'",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
]
INSIDE = [  # what only touches a connection in memory that is thrown away, and has no business in a question
    "CREATE TABLE x AS SELECT 1", "DROP VIEW vectors", "PRAGMA enable_profiling", "SELECT 1; DROP VIEW vectors", "CALL pragma_version()",
    "SELECT * FROM duckdb_settings()", "SELECT * FROM query('SELECT 1')", "SELECT * FROM information_schema.tables", "", ";",
    "SELECT * FROM arrow_scan(1, 2, 3)", "SELECT * FROM arrow_scan(1::POINTER, 2::POINTER, 3::POINTER)", "SELECT * FROM pandas_scan(1)",
]


@pytest.mark.parametrize("query, settings_alone", [*((q, x) for q in OUTSIDE for x in (False, True)), *((q, False) for q in INSIDE)])
def test_sql_reads_what_was_named_and_nothing_else(run, made, tmp_path, monkeypatch, query, settings_alone):
    "Two locks: the question is parsed, and the connection is shut; each is tried without the other where it can be."
    secret = pa.table(dict(a=[42]))  # a variable that DuckDB would find by its name
    pyarrow.csv.write_csv(secret, tmp_path / "secret.csv")
    pq.write_table(secret, tmp_path / "secret.parquet")
    if settings_alone:
        monkeypatch.setattr(searching, "check_select", lambda *_: set())
    before = state(made), state(tmp_path)
    said = run("sql", made, query.format(here=tmp_path), code=2)
    assert said.startswith("sql ") and "vectors" in said and "root:" not in said and "42" not in said
    assert (state(made), state(tmp_path)) == before


def test_vectors_are_read_when_they_are_named(run, tmp_path):
    "2,000 vectors of 256 numbers are 2 MB; ids and depths are some kB."
    table = make(tmp_path / "wide", np.random.default_rng(0).normal(size=(2000, 256)).astype(np.float32))
    size = 2000 * 256 * 4
    for query in (
        "SELECT count(*) AS n FROM vectors WHERE depth < 500", "SELECT id FROM vectors WHERE phylum = 'Proteobacteria'",
        "SELECT phylum, avg(depth) FROM vectors GROUP BY 1", "WITH t AS (SELECT * FROM vectors) SELECT max(id) FROM t",
    ):
        assert 0 < run("sql", table, query)["bytes_read"] < size / 20, query
    assert run("sql", table, "SELECT id, vector[1] AS x FROM vectors")["bytes_read"] >= size
    few = run("sql", table, "SELECT vector FROM vectors WHERE depth = 1999")
    assert len(few["rows"]) == 1 and len(few["rows"][0][0]) == 256


ODD = dict(
    u8=pa.array(range(8), pa.uint8()), u64=pa.array(range(8), pa.uint64()), i8=pa.array(range(8), pa.int8()), f=pa.array([None, *range(7)], pa.float32()),
    yes=pa.array([True, False] * 4), large=pa.array("abcdefgh", pa.large_string()), day=pa.array(range(8), pa.date32()),
    moment=pa.array(range(8), pa.timestamp("us", "UTC")),
    money=pa.array(range(8), pa.int32()).cast(pa.decimal128(12, 2)), kind=pa.array("abcdefgh").dictionary_encode(), raw=pa.array([b"a"] * 8),
    nested=pa.array([{"x": i} for i in range(8)]),
)
CONDITIONS = [
    "u8 = 3", "u8 > 3 AND id < 'r6'", "u64 IN (1, 2)", "i8 = 3", "f > 3", "f IS NULL", "yes", "large = 'c'", "day > DATE '1970-01-03'",
    "moment = TIMESTAMPTZ '1970-01-01 00:00:00+00'",
    "money = 3", "kind = 'c'", "raw = 'a'::BLOB", "nested.x = 3", "id = 'r3'", "depth = (SELECT max(depth) FROM vectors)", "id LIKE '%3' OR u8 = 7",
    "depth < 2 UNION ALL SELECT id FROM vectors WHERE u8 > 5", "id IN (SELECT id FROM vectors WHERE u8 = 2)",
]


@pytest.mark.parametrize("odd", [[], ["kind"], ["nested"], ["money"], list(ODD)], ids=str)
def test_sql_conditions_on_every_type(tmp_path, odd):
    "Lance takes no condition at all while the table has a dictionary, a struct, …; the answers are DuckDB's over the same rows in memory."
    import duckdb

    columns = {k: v for k, v in ODD.items() if k in odd or k == "u8"}
    vectors = find_table(str(make(tmp_path / "t", VECTORS[:8], phylum=["x"] * 8, **columns))).ds
    rows = vectors.to_table()
    for where in CONDITIONS:
        if any(k in where.replace("'", " ").replace(".", " ").split() for k in ODD.keys() - columns.keys()):
            continue
        query = f"SELECT id FROM vectors WHERE {where}"
        with duckdb.connect() as con:
            con.register("vectors", rows)
            assert sorted(sql(query, vectors=vectors)["id"].to_pylist()) == sorted(x for (x,) in con.execute(query).fetchall()), where


def test_half_precision_has_sql_without_its_vectors(run, tmp_path):
    table = make(tmp_path / "half", VECTORS.astype(np.float16))
    assert run("sql", table, "SELECT count(*) FROM vectors WHERE depth > 9")["rows"] == [[ROWS - 10]]
    assert "there are vectors(id, text, depth, phylum, größe)" in run("sql", table, "SELECT vector FROM vectors", code=2)
    np.save(tmp_path / "q.npy", VECTORS[7])
    assert run("search", table, tmp_path / "q.npy", "-k", 1)["rows"][0]["id"] == "r7"


def test_parquet_beside_the_table_and_parquet_that_is_named(run, made, tmp_path):
    home = tmp_path / "copy"
    shutil.copytree(made, home)
    pq.write_table(pa.table(dict(depth=[1, 2], ruler=["Ada", None])), home / "rulers.parquet")
    pq.write_table(pa.table(dict(depth=[5])), home / "query.parquet")
    pq.write_table(pa.table(dict(depth=[5])), home / "Vectors.parquet")
    (home / "broken.parquet").write_text("no Parquet")
    pq.write_table(pa.table(dict(depth=[2], year=[1999])), tmp_path / "years of it.parquet")
    pq.write_table(pa.table(dict(x=[1])), tmp_path / "vectors.parquet")
    joined = 'SELECT id, ruler, year FROM vectors JOIN rulers USING (depth) LEFT JOIN "years of it" USING (depth) ORDER BY id'
    assert run("sql", home, joined, "--also", tmp_path / "years of it.parquet")["rows"] == [["r1", "Ada", None], ["r2", None, 1999]]
    assert "reads from years of it; it is one SELECT over vectors, rulers" in run("sql", home, joined, code=2)
    assert run("sql", home, "SELECT id FROM vectors JOIN query USING (depth)")["rows"] == [["r5"]]
    assert "broken.parquet' cannot be read as Parquet" in run("sql", home, "SELECT * FROM broken", code=2)
    assert "has the name of the table itself" in run("sql", home, "SELECT 1", "--also", tmp_path / "vectors.parquet", code=2)
    assert "nothing.parquet' cannot be read" in run("sql", home, "SELECT 1", "--also", "nothing.parquet", code=2)


def test_answers_in_files(run, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = "SELECT id, vector, text, depth FROM vectors ORDER BY depth"
    want = find_table(str(made)).ds.to_table(columns=["id", "vector", "text", "depth"])
    for name in ("a.parquet", "a.arrow", "a.csv"):
        assert run("sql", made, query, "--to", name)["rows"] == ROWS
    assert pq.read_table("a.parquet").to_pylist() == want.to_pylist() == pa.ipc.open_file("a.arrow").read_all().to_pylist()
    read = pyarrow.csv.read_csv("a.csv")
    assert np.allclose([json.loads(x) for x in read["vector"].to_pylist()], VECTORS) and read["text"].to_pylist() == want["text"].to_pylist()
    assert run("sql", made, "SELECT id FROM vectors WHERE false", "--to", "none.csv")["rows"] == 0 and Path("none.csv").read_text() == '"id"\n'
    assert "ends in none of .csv" in run("sql", made, query, "--to", "a.xlsx", code=2)
    assert "make the folder" in run("sql", made, query, "--to", "no/folder/a.csv", code=2)
    before = sorted(os.listdir())
    run("sql", made, "SELECT CAST(if(depth = 599, text, '1') AS INT) FROM vectors", "--to", "late.csv", code=2)
    assert sorted(os.listdir()) == before, "half an answer is no answer"


def test_a_long_answer_is_cut_on_the_screen(run, made):
    said = run("sql", made, "SELECT a.depth FROM vectors a, vectors b, vectors c")  # 216 million rows
    assert len(said["rows"]) == 1000 and said["more"] and said["text"].endswith("--to FILE writes all")
    odd = "SELECT 'nan'::FLOAT, 1e999::DOUBLE, DATE '2026-11-27', 170141183460469231731687303715884105727::HUGEINT, 'x'::BLOB, {'a': [1.5]}, true, NULL"
    assert run("sql", made, odd)["rows"] == [[None, None, "2026-11-27", 2**127 - 1, "78", {"a": [1.5]}, True, None]]


# ---- what is no table, and what is no question


def test_tables_that_cannot_be_opened(run, made, sealed, question, tmp_path):
    copy = lambda name: shutil.copytree(made, tmp_path / name)  # noqa: E731
    write_table([("s", shard_of(tmp_path / "raw"))], tmp_path / "torso/table.lance")
    assert "was never finished" in run("search", tmp_path / "torso", question, code=2)
    (tmp_path / "empty").mkdir()
    assert "is no Lance table that can be read" in run("search", tmp_path / "empty", question, code=2)
    assert "is no folder here, and in the store: no seal or ref 'vectors/nobody/v1'" in run("search", "vectors/nobody/v1", question, code=2)
    assert "is no folder here" in run("sql", "/no/such folder", "SELECT 1", code=2)
    sealed.seal(tmp_path / "raw", "models/x/v1")
    assert "is the seal models/x/v1, which holds no table" in run("sql", "models/x/v1", "SELECT 1", code=2)
    dead = copy("dead")
    for f in (dead / "table.lance/data").iterdir():
        f.unlink()
    assert "cannot be read" in run("search", dead, question, code=2) and "cannot be answered" in run("sql", dead, "SELECT id FROM vectors", code=2)
    cut = copy("cut")
    for f in (cut / "table.lance/data").iterdir():
        os.truncate(f, f.stat().st_size // 2)
    assert "damaged or gone" in run("search", cut, question, code=2)
    found = find_table("vectors/demo/current")
    for f in (found.folder / "table.lance/data").iterdir():
        f.unlink()
    assert run("search", "store:vectors/demo/current", question, "-k", 1)["rows"][0]["id"] == "r7"  # fetched again
    for f in (found.folder / "table.lance/data").iterdir():
        f.write_bytes(bytes(f.stat().st_size))
    assert f"remove {found.folder}, and it is fetched anew" in run("search", "vectors/demo/current", question, code=2)


def test_a_table_that_another_process_fetches_meanwhile_is_left_alone(sealed, monkeypatch):
    "Two first questions at once: the one that comes second must not pull the table away from under the first."
    fetch, inodes = Store.fetch, []

    def slow(self, name, to):
        got = fetch(self, name, to)
        if not inodes:
            inodes.append(0)
            inodes[0] = (find_table("vectors/demo/current").folder / "table.lance").stat().st_ino
        return got

    monkeypatch.setattr(Store, "fetch", slow)
    assert (find_table("vectors/demo/current").folder / "table.lance").stat().st_ino == inodes[0] != 0


def shard_of(to: Path) -> Path:
    to.mkdir()
    pq.write_table(pa.table(dict(id=["a"], vector=pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0], pa.float32()), 2))), to / "vectors.parquet")
    return to


def test_questions_that_are_none(run, made, tmp_path, question):
    def saved(value, **how):
        np.save(tmp_path / "bad.npy", value, **how)
        return tmp_path / "bad.npy"

    said = run("search", made, saved(VECTORS[0, :3]), code=2)
    assert "has the shape (3,), the table's vectors have (64,)" in said and "asset:minilm" in said
    bad = [VECTORS[:2], np.zeros(DIM), np.array([1, np.nan] * 32), np.array([]), np.array(["x"] * DIM), np.float32(3)]
    assert all("is not one vector of finite numbers" in run("search", made, saved(x), code=2) for x in bad)
    assert "cannot be read as a vector" in run("search", made, saved(np.array([print]), allow_pickle=True), code=2)
    (tmp_path / "text.npy").write_text("no numbers")
    assert "cannot be read as a vector" in run("search", made, tmp_path / "text.npy", code=2)
    assert "cannot be read as a vector" in run("search", made, "nothing.npy", code=2)
    assert "question='' is empty" in run("search", made, "  ", code=2)
    assert "k=0" in run("search", made, question, "-k", 0, code=2) and "-k='many' must be a whole number" in run("search", made, question, "-k", "many", code=2)
    assert "one of vector, text, hybrid" in run("search", made, question, "--mode", "fuzzy", code=2)
    assert "mode=hybrid needs words" in run("search", made, question, "--mode", "hybrid", code=2)
    assert "columns=colour are not in the table" in run("search", made, question, "--columns", "id,colour", code=2)
    nobody = make(tmp_path / "nobody", about=dict(pooling="mean"))
    assert "nothing names it" in run("search", nobody, "in words", code=2)


def test_a_table_without_texts(run, tmp_path):
    build_table([("s", shard_of(tmp_path / "s"))], tmp_path / "t/table.lance")
    assert card(find_table(str(tmp_path / "t")).ds)["text_index"] == ""
    assert "no full-text index" in run("search", tmp_path / "t", "words", "--mode", "text", code=2)


# ---- with a Redis, without, and with one that lies or dies


@pytest.fixture
def redis_url(server, monkeypatch):
    import redis

    url = server("redis").url
    with redis.Redis.from_url(url) as r:
        r.flushdb()
    monkeypatch.setenv("WAYSTATION_REDIS", url)
    return url


def keys(url: str) -> list[bytes]:
    import redis

    with redis.Redis.from_url(url) as r:
        found = list(r.scan_iter("waystation:answer:*"))
        assert all(0 < r.ttl(k) <= 86400 for k in found)
        return found


def axis(words: list[str]) -> np.ndarray:
    return VECTORS[[len(w) for w in words]]


def test_an_answer_is_kept_once_for_each_question(sealed, redis_url, monkeypatch):
    table, calls = find_table("vectors/demo/current"), []

    def encode(words):
        calls.append(words)
        return axis(words)

    questions = [
        dict(question="a river"), dict(question="a rive"), dict(question="a river", k=3), dict(question="a river", where="depth > 5"),
        dict(question="a river", columns=["id"]), dict(question="a river", columns=["text", "id"]), dict(question="a river", model="another"),
        dict(question="a river", mode="text"), dict(question="a river", mode="hybrid"), dict(question=VECTORS[7]), dict(question=VECTORS[8]),
        dict(question="a river", columns=["id", "vector"]), dict(question="a river", where="depth < 0"),
    ]
    first = [ask(table, encode=encode, **q) for q in questions]
    assert not any(kept for _, kept in first) and len(keys(redis_url)) == len(questions)
    assert first[0][0] != first[1][0] and first[-1][0].num_rows == 0
    done = len(calls)
    again = [ask(table, encode=encode, **q) for q in questions]
    assert all(kept for _, kept in again) and len(calls) == done, "a kept answer needs no model"
    monkeypatch.setenv("WAYSTATION_REDIS", "")
    without = [ask(table, encode=encode, **q) for q in questions]
    assert not any(kept for _, kept in without)
    for (a, _), (b, _), (c, _) in zip(first, again, without, strict=True):
        assert a == b == c and a.schema == b.schema == c.schema


def test_a_new_version_never_gets_an_old_answer(run, sealed, redis_url, question, tmp_path):
    old = run("search", "vectors/demo/current", question)
    assert run("search", "vectors/demo/current", question) == old | dict(kept=True)
    make(tmp_path / "new", VECTORS[::-1].copy())
    sealed.seal(tmp_path / "new", "vectors/demo/v2")
    sealed.refer("vectors/demo/current", "vectors/demo/v2")
    new = run("search", "vectors/demo/current", question)
    assert not new["kept"] and new["rows"][0]["id"] == f"r{ROWS - 8}" != old["rows"][0]["id"]
    assert run("search", "vectors/demo/v1", question) == old | dict(kept=True, table="vectors/demo/v1")
    for _ in range(2):  # a folder can be changed by anybody: its answers are not kept
        assert not run("search", tmp_path / "new", question)["kept"]


def test_a_lie_of_another_shape_is_not_believed(sealed, redis_url):
    import redis

    table = find_table("vectors/demo/current")
    true, _ = ask(table, VECTORS[7], 5)
    (key,) = keys(redis_url)
    lies = [
        b"", b"\xff" * 100, b"{}", pa.py_buffer(asking._as_bytes(true)).to_pybytes()[:-30],
        *map(asking._as_bytes, (
            true.take(list(range(4, -1, -1))), true.drop_columns("text"), pa.concat_tables([true, true.slice(4)]), true.rename_columns([*"abcdef"]),
            true.set_column(true.num_columns - 1, "_distance", pa.array([None] * 5, pa.float32())),
            true.set_column(true.num_columns - 1, "_distance", pa.array([np.nan] * 5, pa.float32())),
            true.set_column(0, "id", pa.array([1, 2, 3, 4, 5])),
        )),
    ]
    flipped = bytearray(asking._as_bytes(true))
    with redis.Redis.from_url(redis_url) as r:
        for lie in lies:
            r.set(key, lie)
            assert ask(table, VECTORS[7], 5) == (true, False)
            assert ask(table, VECTORS[7], 5) == (true, True)  # the lie is written over
        rng = np.random.default_rng(0)
        for _ in range(60):  # whatever a damaged value says, it is an answer of this shape, or none
            at = rng.integers(len(flipped))
            r.set(key, bytes(flipped[:at]) + bytes([flipped[at] ^ 1 << rng.integers(8)]) + bytes(flipped[at + 1:]))
            got, _ = ask(table, VECTORS[7], 5)
            assert got.schema == true.schema and len(got) <= 5
        r.delete(key)
        r.lpush(key, "a list")
        assert ask(table, VECTORS[7], 5) == (true, False)


def test_a_redis_that_dies_is_told_once_and_changes_nothing(sealed, monkeypatch, caplog):
    table, got = find_table("vectors/demo/current"), []
    with contextlib.ExitStack() as stack:
        try:
            s = stack.enter_context(servers.redis())
        except servers.Missing as e:
            pytest.skip(f"NOT CHECKED: {e}")
        monkeypatch.setenv("WAYSTATION_REDIS", s.url)
        for n in range(6):
            if n == 3:
                os.kill(s.pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    while True:  # until nobody is there
                        socket.create_connection(tuple(s.host_port.split(":")), 5).close()
            got.append(ask(table, VECTORS[7], 5))
    assert [kept for _, kept in got] == [False, True, True, False, False, False] and all(t == got[0][0] for t, _ in got)
    assert caplog.text.count("all goes on without it") == 1
