"""`waystation classify`, `near` and `cluster`: known answers on made data, and tables and questions that could break them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("lance")

from waystation.runtime import Refused
from waystation.vectors import kin
from waystation.vectors.table import build_table, complete, open_table

DIM = 16
RNG = np.random.default_rng(0)
KINDS = RNG.normal(size=(40, DIM)) * 2
NAMES = [f"größe 💥 {i}, O'Brien" for i in range(40)]


def around(kinds, n: int, spread: float = 0.3) -> np.ndarray:
    return (np.repeat(kinds, n, axis=0) + RNG.normal(size=(len(kinds) * n, DIM)) * spread).astype(np.float32)


def make(to: Path, vectors: np.ndarray, metric: str = "cosine", index: str = "auto", **columns) -> Path:
    "A finished table `to`/table.lance of these vectors."
    n = len(vectors)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    (to / "shard").mkdir(parents=True)
    pq.write_table(pa.table(dict(id=[f"r{i}" for i in range(n)]) | columns | dict(vector=vector)), to / "shard/vectors.parquet")
    build_table([("shards/0", to / "shard")], to / "table.lance", index, metric, about=dict(model="asset:minilm"))
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Twenty kinds, twelve of each; every twelfth row says nothing of its kind."
    kinds = [None if i % 12 == 0 else NAMES[i // 12] for i in range(240)]
    columns = {"kind of": kinds, "number": [i // 12 for i in range(240)], "nothing": pa.nulls(240, pa.string()), "once": [f"o{i}" for i in range(240)],
               "x": [0] * 240, "text": [f"row of {'river water' if i < 120 else 'stone mountain'}" for i in range(240)]}
    return make(tmp_path_factory.mktemp("kin") / "t", around(KINDS[:20], 12), **columns)


def saved(path: Path, vectors: np.ndarray) -> Path:
    np.save(path, vectors)
    return path


# ---- classify


@pytest.mark.parametrize("metric, index", [("cosine", "none"), ("l2", "none"), ("l2", "ivf_rq"), ("dot", "none")])
def test_kin_is_named_and_strangers_are_not(run, tmp_path, metric, index):
    "Rows that the calibration never saw: kinds of the table get their name, others are novel."
    unit = kin.unit if metric == "dot" else lambda x: x  # a product says nothing of vectors of many lengths
    table = make(tmp_path / "t", unit(around(KINDS[:20], 12)), metric, index, kind=[NAMES[i // 12] for i in range(240)])
    known = run("classify", table, saved(tmp_path / "known.npy", unit(around(KINDS[:20], 3))), "--label", "kind")
    assert [r["label"] for r in known["rows"]] == [NAMES[i // 3] for i in range(60)]
    assert np.mean([r["novel"] for r in known["rows"]]) < 0.2 and all(0 < r["share"] <= 1 for r in known["rows"])
    strange = run("classify", table, saved(tmp_path / "strange.npy", unit(around(KINDS[20:], 3))), "--label", "kind")
    assert np.mean([r["novel"] for r in strange["rows"]]) > 0.9
    learnt = known["learnt"]
    assert learnt["found"]["value"] > 0.9 and learnt["auroc"] > 0.95 and learnt["named"]["value"] > 0.95 and "distances" not in learnt
    assert learnt["wrongly"]["value"] < 0.15 and learnt["wrongly"]["n"] < 240 and learnt["found"]["n"] == 240
    assert strange["threshold"] == known["threshold"] == learnt["threshold"]  # the same every time


def test_rows_without_a_label_do_not_vote_and_a_row_is_not_its_own_witness(run, made, tmp_path):
    v = pq.read_table(made / "shard/vectors.parquet")["vector"].to_pylist()
    asked = saved(tmp_path / "q.npy", np.array(v[:24:12], np.float32))  # two rows that have no label themselves
    got = run("classify", made, asked, "--label", "kind of", "-k", 5)
    assert [r["label"] for r in got["rows"]] == NAMES[:2] and all(r["nearest"] not in ("r0", "r12") and r["distance"] > 0 for r in got["rows"])
    assert got["learnt"]["rows"] == 220 and got["learnt"]["labels"] == 20
    distances = kin.calibrate(open_table(made / "table.lance"), "kind of")["distances"]
    assert all((d > 1e-4).all() for d in distances)


def test_a_threshold_of_ones_own_learns_nothing(run, made, tmp_path):
    q = saved(tmp_path / "q.npy", around(KINDS[:1], 1)[0])
    far = run("classify", made, q, "--label", "kind of", "--threshold", 1.5)
    near = run("classify", made, q, "--label", "kind of", "--threshold", 1e-6)
    assert (far["rows"][0]["novel"], near["rows"][0]["novel"], far["learnt"], far["k"]) == (False, True, {}, 3)


def test_one_labelled_row_is_found_through_an_index(run, tmp_path):
    "However far it lies from the question: the partitions near by hold no label."
    v = around(KINDS, 150)
    table = make(tmp_path / "t", v, index="ivf_rq", kind=["it" if i == 5999 else None for i in range(6000)])
    got = run("classify", table, saved(tmp_path / "q.npy", v[:2]), "--label", "kind", "--threshold", 0.5)["rows"]
    assert [(r["label"], r["nearest"], r["novel"]) for r in got] == [("it", "r5999", True)] * 2


def test_more_voters_than_rows_and_labels_that_are_numbers(run, made, tmp_path):
    q = saved(tmp_path / "q.npy", around(KINDS[3:4], 1)[0])
    got = run("classify", made, q, "--label", "number", "-k", 10**6)  # once 9 GB
    assert got["rows"][0]["label"] == "3" and got["rows"][0]["share"] < 0.5
    file = tmp_path / "a.csv"
    assert run("classify", made, q, "--label", "number", "--to", file)["rows"] == 1 and file.read_text(encoding="utf-8").count("\n") == 2


def test_what_classify_refuses(run, made, tmp_path):
    q = saved(tmp_path / "q.npy", around(KINDS[:1], 1)[0])
    assert "label='colour' is no column of the table; it has id, kind of, number" in run("classify", made, q, "--label", "colour", code=2)
    assert "label='' is no column" in run("classify", made, q, code=2)
    assert "label='vector' is no column" in run("classify", made, q, "--label", "vector", code=2)
    assert "'once' has 0 values that more than one row has" in run("classify", made, q, "--label", "once", code=2)
    assert "'nothing' has 0 values" in run("classify", made, q, "--label", "nothing", code=2)
    assert "label='nothing' is empty in every row" in run("classify", made, q, "--label", "nothing", "--threshold", 1, code=2)
    assert "k=-1" in run("classify", made, q, "--label", "number", "-k", -1, code=2)
    short = saved(tmp_path / "short.npy", np.ones((2, 3)))
    assert "have (16,); encode it with the table's model, asset:minilm" in run("classify", made, short, "--label", "number", code=2)
    for bad in (np.array([[1] * DIM, [np.nan] * DIM]), np.zeros((2, DIM)), np.ones((2, 2, 2)), np.zeros((0, DIM))):
        assert "is not vectors of finite numbers" in run("classify", made, saved(tmp_path / "bad.npy", bad), "--label", "number", code=2)
    assert "question='' is empty" in run("classify", made, " ", "--label", "number", code=2)
    assert "is not the model that made these vectors; that is 'asset:minilm'" in run(
        "classify", made, q, "--label", "number", "--model", "asset:kmer-random", code=2)
    with pytest.raises(Refused, match="question 1 is not a vector of finite numbers"):
        kin.classify(open_table(made / "table.lance"), np.array([[1.0] * DIM, [np.inf] * DIM]), "number", 3, 1.0)


def test_a_fasta_file_is_a_question(run, tmp_path):
    "Through the table's own encoder; `search` answers one sequence, `classify` all of them, under their names."
    from waystation.assets import resolve
    from waystation.embedding.engine import embed_texts

    model = resolve("asset:kmer-random", "model")
    sequences = ["".join("ACGT"[x] for x in row) for row in np.random.default_rng(1).integers(0, 4, (8, 60))]
    vectors = np.asarray(embed_texts(model.path, sequences, "mean", 32))
    table = make(tmp_path / "t", vectors, kind=[f"k{i // 2}" for i in range(8)])
    about = dict(model="asset:kmer-random", model_fingerprint=model.fingerprint, pooling="mean", max_tokens=32, metric="cosine", index="none")
    ds = open_table(table / "table.lance")
    ds.tags.delete("complete")
    complete(ds, about)
    (tmp_path / "one.fa").write_text(f">the fifth\n{sequences[5][:30]}\n{sequences[5][30:]}\n")
    (tmp_path / "two.fasta").write_text(f">a\n{sequences[2]}\n>b\n{sequences[7]}\n")
    assert run("search", table, tmp_path / "one.fa", "-k", 1)["rows"][0]["id"] == "r5"
    assert "holds 2 sequences, and a search answers one" in run("search", table, tmp_path / "two.fasta", code=2)
    assert "is no file here" in run("search", table, "nothing.fa", code=2)
    got = run("classify", table, tmp_path / "two.fasta", "--label", "kind", "--threshold", 0.01)["rows"]
    assert [(r["question"], r["label"], r["nearest"], r["novel"]) for r in got] == [("a", "k1", "r2", False), ("b", "k3", "r7", False)]


# ---- near


@pytest.mark.parametrize("rows, spread, above", [(300, 0.02, 0.9), (300, 2.0, 0.3), (2000, 0.05, 0.99), (2000, 1.0, 0.7)])
def test_near_finds_every_pair(tmp_path, monkeypatch, rows, spread, above):
    "Against all pairs: in tight clusters and in noise, in one block and through centres, and where blocks are small."
    v = around(KINDS, rows // 40, spread)
    v[7], v[rows // 2] = v[3], v[3]
    ds = open_table(make(tmp_path / "t", v, index="none") / "table.lance")
    u = kin.unit(v.astype(np.float64))
    i, j = np.nonzero(np.triu(u @ u.T >= above - 1e-6, 1))
    want = {(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True) if not {a, b} & {7, rows // 2} or (a == 3 and b in (7, rows // 2))}
    if rows > 1000:
        monkeypatch.setattr(kin, "BLOCK", 512)
        monkeypatch.setattr(kin, "SIDE", 300)
    got = kin.near_pairs(ds, above)
    pairs = [(int(a[1:]), int(b[1:])) for a, b in zip(got["id"].to_pylist(), got["other"].to_pylist(), strict=True)]
    assert len(set(pairs)) == len(pairs) and (np.diff(got["similarity"].to_numpy()) <= 0).all()
    odd = set(pairs) ^ want  # float32 and float64 may disagree on the very threshold, and nowhere else
    assert len(want) > 50 and all(abs(u[a] @ u[b] - above) < 3e-6 for a, b in odd), len(odd)
    np.testing.assert_allclose(got["similarity"], [u[a] @ u[b] for a, b in pairs], atol=1e-5)
    # groups are what the pairs connect
    root = np.arange(rows)
    for a, b in sorted(pairs):
        x, y = sorted((root[a], root[b]))
        root[root == y] = x
    groups = kin.near_groups(ds, above).to_pylist()
    assert {r["id"]: r["group"] for r in groups} == {f"r{x}": f"r{root[x]}" for x in range(rows) if (root == root[x]).sum() > 1}


def test_copies_are_pairs_with_the_first_and_one_cluster(run, tmp_path):
    "Six thousand equal rows: no more pairs than rows, one group, one cluster, and nothing that fails."
    table = make(tmp_path / "t", np.repeat(around(KINDS[:1], 1), 6000, axis=0), index="none", kind=["a", "b"] * 3000)
    pairs = run("near", table, "--to", tmp_path / "pairs.parquet")
    assert pairs["rows"] == 5999 and set(pq.read_table(tmp_path / "pairs.parquet")["id"].to_pylist()) == {"r0"}
    groups = run("near", table, "--groups", "--above", 1)
    assert len(groups["rows"]) == 1000 and groups["more"] and {(r["group"], r["rows"]) for r in groups["rows"]} == {("r0", 6000)}
    found = run("cluster", table, "--clusters", 7, "--color", "kind")["rows"]
    assert [(r["cluster"], r["rows"], r["share"]) for r in found] == [(0, 6000, 0.5)]
    learnt = kin.calibrate(open_table(table / "table.lance"), "kind")
    assert learnt["threshold"] < 1e-6 and learnt["auroc"] == pytest.approx(0.5, abs=0.5)


def test_pairs_join_the_table_in_sql(run, made, tmp_path):
    run("near", made, "--above", 0.97, "--to", tmp_path / "pairs.parquet")
    joined = run("sql", made, 'SELECT count(*), sum((a.number = b.number)::INT) FROM pairs p JOIN vectors a USING (id) JOIN vectors b ON b.id = p.other',
                 "--also", tmp_path / "pairs.parquet")["rows"]
    assert joined[0][0] == joined[0][1] > 100  # near-duplicates are of one kind here


def test_what_near_and_cluster_refuse(run, made, tmp_path, monkeypatch):
    assert all(f"above={x} is no similarity" in run("near", made, "--above", x, code=2) for x in (0, 1.5, -1, "nan"))
    assert "ends in none of .csv, .parquet, .arrow" in run("near", made, "--to", "pairs.txt", code=2)
    assert "picture='map.gif' ends in none of .png, .svg, .pdf" in run("cluster", made, "--picture", "map.gif", code=2)
    assert "clusters=241; there are 240 rows" in run("cluster", made, "--clusters", 241, code=2) and "clusters=-1" in run("cluster", made, "--clusters", -1, code=2)
    assert "color='colour' is no column" in run("cluster", made, "--color", "colour", code=2)
    assert "color='x' is what a column of the answer is called" in run("cluster", made, "--color", "x", code=2)
    monkeypatch.setattr(kin, "PAIRS", 100)
    assert "gives more than 100 pairs; ask for groups" in run("near", made, "--above", 0.2, code=2)


# ---- clusters and the map


def test_made_clusters_are_found_and_named(run, made, tmp_path):
    got = run("cluster", made, "--clusters", 20, "--color", "number", "--to", tmp_path / "c.parquet", "--picture", tmp_path / "map.png")
    rows = pq.read_table(tmp_path / "c.parquet")
    assert rows.column_names == ["id", "cluster", "similarity", "x", "y", "number"] and len(rows) == 240
    assert sorted(r["rows"] for r in got["rows"]) == [12] * 20 and sorted(int(r["number"]) for r in got["rows"]) == list(range(20))
    assert all(r["share"] == 1 and set(r["words"].split()) == ({"river", "water"} if int(r["number"]) < 10 else {"stone", "mountain"}) for r in got["rows"])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and 0 < got["variance"] < 1
    assert all(np.ptp(rows[c].to_numpy()) > 1 for c in "xy")
    again = tmp_path / "again.parquet"
    run("cluster", made, "--clusters", 20, "--color", "number", "--to", again)
    assert pq.read_table(again) == rows


def test_one_row(run, tmp_path):
    table = make(tmp_path / "t", around(KINDS[:1], 1), kind=["größe"], text=["a single row"])
    assert run("near", table)["rows"] == [] and run("near", table, "--groups")["rows"] == []
    assert [(r["rows"], r["example"]) for r in run("cluster", table)["rows"]] == [(1, "r0")]
    q = saved(tmp_path / "q.npy", KINDS[0])
    assert "learnt from two of them at least" in run("classify", table, q, "--label", "kind", code=2)
    got = run("classify", table, q, "--label", "kind", "--threshold", 0.5, "-k", 9)["rows"]
    assert [(r["label"], r["share"], r["novel"]) for r in got] == [("größe", 1, False)]


def test_no_row(run, tmp_path):
    import lance

    vector = pa.FixedSizeListArray.from_arrays(pa.array([], pa.float32()), DIM)
    ds = lance.write_dataset(pa.table(dict(id=pa.array([], pa.string()), kind=pa.array([], pa.string()), vector=vector)), str(tmp_path / "t/table.lance"))
    complete(ds, dict(metric="cosine", index="none"))
    assert run("near", tmp_path / "t")["rows"] == [] and run("near", tmp_path / "t", "--groups")["rows"] == []
    assert "has no row" in run("cluster", tmp_path / "t", code=2)
    q = saved(tmp_path / "q.npy", KINDS[0])
    assert "has 0 values" in run("classify", tmp_path / "t", q, "--label", "kind", code=2)
    assert "is empty in every row" in run("classify", tmp_path / "t", q, "--label", "kind", "--threshold", 1, code=2)


def test_half_precision(tmp_path):
    v = around(KINDS[:10], 20).astype(np.float16)
    ds = open_table(make(tmp_path / "t", v, kind=[str(i // 20) for i in range(200)]) / "table.lance")
    assert kin.calibrate(ds, "kind")["named"]["value"] == 1 and len(kin.near_pairs(ds, 0.9)) > 1000
    assert sorted(kin.summary(ds, kin.clustered(ds, 10)[0])["rows"].to_pylist()) == [20] * 10
