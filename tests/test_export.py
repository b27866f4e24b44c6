"""The export station on sealed shards: complete table or clear refusal, and the same answer when run again.

The vectors are synthetic; the encoder is a stand-in that gives a word its cluster, so that what must be found is known.
tests/test_embed.py holds the real encoder to its oracle.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("lance")

from waystation.recipe import begin
from waystation.runtime import Refused
from waystation.stations.export import export
from waystation.store import Store
from waystation.assets import local_copy
from waystation.vectors.table import card, open_table

DIM = 16


def vectors(n: int, dim: int = DIM, first: int = 0) -> np.ndarray:
    "Row i lies near axis i % 8, each at its own distance."
    rng = np.random.default_rng(first)
    v = np.eye(dim)[np.arange(first, first + n) % 8] + rng.normal(size=(n, dim)) / 20
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def shard(to: Path, ids: list[str], first: int = 0, dim: int = DIM, dtype: type = np.float32, aside: int = 0) -> None:
    flat = pa.array(vectors(len(ids), dim, first).astype(dtype).ravel())
    table = {
        "id": pa.array(ids, pa.string()),
        "doc_id": pa.array([i.split("#")[0] for i in ids], pa.string()),
        "text": pa.array([f"text of {i}" for i in ids], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, dim),
        "größe": pa.array([f"g{(first + k) % 8}" for k in range(len(ids))], pa.string()),
    }
    to.mkdir(parents=True)
    pq.write_table(pa.table(table), to / "vectors.parquet")
    lines = [json.dumps({"row": k, "id": f"x{k}", "reason": "empty text"}) + "\n" for k in range(aside)]
    (to / "quarantine.jsonl").write_text("".join(lines))


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A store, and a function that seals shards as a finished embed step."
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    engine = types.ModuleType("waystation.embedding.engine")
    engine.embed_texts = lambda folder, texts, *how: np.eye(DIM, dtype=np.float32)[[int(t[-1]) for t in texts]]
    monkeypatch.setitem(sys.modules, "waystation.embedding.engine", engine)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def embed(*shards: dict, run: str = "demo", finish: bool = True) -> str:
        params = dict(run=run, store=str(tmp_path / "store"), seed=0, restart=False, take_over=False, step="embed")
        with begin("embed", params) as job:
            for k, kw in enumerate(shards):
                shard(tmp_path / f"{run}{k}", **kw)
                job.seal(tmp_path / f"{run}{k}", "shards", k)
            if finish:
                job.finish(dict(model=str(tmp_path / "model"), pooling="mean", dim=DIM, normalized=True, max_tokens=256))
        return str(tmp_path / "store")

    return embed


def chunks(start: int, stop: int) -> list[str]:
    return [f"dök_{i // 2}#{i % 2}" for i in range(start, stop)]


def test_journey(place, tmp_path):
    store = place(dict(ids=chunks(0, 300)), dict(ids=chunks(300, 500), first=300, aside=3))
    meta = {"id": [f"dök_{i}" for i in range(249)][::-1], "title": [f"On {i}" for i in range(249)][::-1], "text": ["all"] * 249}
    pq.write_table(pa.table(meta), tmp_path / "meta.parquet")
    # The first needs the 63 documents of its cluster (of which five can be found), the second one of another cluster.
    rows = [{"id": "a", "query": "about 0", "relevant": [f"dök_{4 * k}" for k in range(63)]}, {"id": "b", "query": "about 3", "relevant": ["dök_0"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    how = dict(
        store=store,
        index="ivf_rq",
        metadata=str(tmp_path / "meta.parquet"),
        questions=str(tmp_path / "q.jsonl"),
        ask="about 1 | about 2",
        color="größe",
        filters="title, größe",
    )
    report = export(**how)

    import lance

    ds = lance.dataset(report["table"])
    assert ds.count_rows() == report["rows"] == 500
    assert {"id", "vector", "größe", "title"} <= set(ds.schema.names)
    titles = ds.to_table(columns=["doc_id", "title"]).to_pylist()
    assert all(r["title"] == (None if r["doc_id"] == "dök_249" else "On " + r["doc_id"][4:]) for r in titles)
    assert {i.name for i in ds.describe_indices()} == {"vector_idx", "text_idx", "größe_idx", "title_idx"}
    assert card(ds)["metric"] == "cosine" and card(ds)["quarantined"] == {"empty text": 3} and report["quarantined"] == 3

    assert report["index_recall"]["n"] == 2 and report["index_recall"]["recall"] >= 0.95
    assert [a["question"] for a in report["answers"]] == ["about 1"] * 3 + ["about 2"] * 3
    assert {a["größe"] for a in report["answers"][:3]} == {"g1"} and report["answers"][0]["title"].startswith("On ")
    import lancedb

    assert lancedb.connect(Path(report["table"]).parent).open_table("table").count_rows() == 500
    hit, recall = report["retrieval"]["hit@5"], report["retrieval"]["recall@5"]
    assert hit["value"] == 0.5 and recall["ceiling"] == pytest.approx((5 / 63 + 1) / 2, abs=1e-4)
    assert recall["value"] == pytest.approx(5 / 63 / 2, abs=1e-4)
    assert report["joined"]["unmatched"] == 2 and report["joined"]["columns"] == ["title"] and report["joined"]["left_out"] == ["text"]
    json.dumps(report, allow_nan=False)

    seals = Store(store).list()
    again = export(**how)
    assert again == report and Store(store).list() == seals, "a finished step was done again"


def test_killed_after_the_table_was_sealed(place, monkeypatch):
    "The report was lost, the table was not: it is measured, not built again."
    store = place(dict(ids=chunks(0, 50)))
    from waystation.recipe import Job

    finish = Job.finish
    monkeypatch.setattr(Job, "finish", lambda self, *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(store=store)
    first = Store(store).read("vectors/demo/v1")
    monkeypatch.setattr(Job, "finish", finish)
    monkeypatch.setattr("waystation.stations.export.build", None)
    assert export(store=store)["rows"] == 50
    assert Store(store).read("vectors/demo/current").digest == first.digest


def test_local_copy_is_fetched_again(place):
    "A cleaned cache, or another store's table of the same name, must not be what the report points at."
    store = place(dict(ids=chunks(0, 50)))
    table = Path(export(store=store)["table"])
    next((table / "data").iterdir()).unlink()
    assert open_table(export(store=store)["table"]).to_table().num_rows == 50
    assert local_copy(Store(store), "vectors/demo/current") == table.parent


def test_half_precision(place):
    store = place(dict(ids=chunks(0, 300), dtype=np.float16))
    report = export(store=store, index="ivf_hnsw_sq", metric="l2", color="größe", ask="about 5")
    assert open_table(report["table"]).schema.field("vector").type.value_type == pa.float16()
    assert {a["größe"] for a in report["answers"]} == {"g5"} and report["index_recall"]["recall"] >= 0.95


def test_few_rows(place):
    "Fewer rows than any k, and a shard in which everything was set aside."
    store = place(dict(ids=[], aside=2), dict(ids=["ü", "b"]))
    report = export(store=store, ask="about 0")
    assert (report["rows"], report["quarantined"], report["index"], len(report["answers"])) == (2, 2, "none", 2)
    assert report["index_recall"] == {"k": 10, "n": 0, "recall": 1.0, "queries": "none: every search is exact"}


OK = dict(ids=["a", "b", "c"])
BAD = [
    ([], {}, "no shards"),
    ([dict(ids=[], aside=4)], {}, r"every row was set aside \(\{'empty text': 4\}\)"),
    ([OK, dict(ids=["d"], dim=8)], {}, r"shards/1 does not fit .*\[8\] instead of .*\[16\]"),
    ([OK, dict(ids=["c", "d"])], {}, r"c \(2 times\)"),
    ([OK], dict(index="faiss"), "index='faiss' is unknown; it is one of auto, none"),
    ([OK], dict(metric="manhattan"), "one of cosine, l2, dot"),
    ([OK], dict(index="ivf_pq"), "on 3 rows; it learns its codes from at least 256"),
    ([OK], dict(color="genus"), "column='genus' is no column of the table; it has id, doc_id, text, größe"),
    ([OK], dict(color="vector"), "is no column"),
    ([OK], dict(table="a b"), "name 'a b'"),
    ([OK], dict(table="a/b"), "slash"),
    ([OK], dict(metadata="cities.parquet"), "metadata has the columns city, n"),
    ([OK], dict(metadata="other.parquet"), "matches no row"),
    ([OK], dict(metadata="twice.parquet"), "several rows for id a"),
    ([OK], dict(metadata="missing.parquet"), "missing.parquet"),
    ([OK], dict(questions="bad.jsonl"), "line 1"),
    ([OK], dict(shards="store:runs/nobody/embed"), "nobody"),
]


@pytest.mark.parametrize("shards,how,message", BAD, ids=[m[:30] for *_, m in BAD])
def test_refused(place, tmp_path, monkeypatch, shards, how, message):
    "Value, rule, way out; and nothing half sealed."
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"city": ["x"], "n": [1]}), "cities.parquet")
    pq.write_table(pa.table({"id": ["zzz"], "n": [1]}), "other.parquet")
    pq.write_table(pa.table({"id": ["a", "a"], "n": [1, 2]}), "twice.parquet")
    Path("bad.jsonl").write_text('{"query": "x"}\n')
    store = place(*shards)
    with pytest.raises(Refused, match=message):
        export(store=store, **how)
    assert not Store(store).list("vectors") and not Store(store).refs("vectors")


def test_unfinished_embed_is_refused(place):
    store = place(OK, finish=False)
    with pytest.raises(Refused, match="runs/demo/embed/1 has no report"):
        export(store=store)


def test_a_table_belongs_to_one_run(place):
    store = place(OK)
    place(OK, run="other")
    export(store=store, table="shared")
    with pytest.raises(Refused, match="was made by run 'demo'"):
        export(store=store, run="other", table="shared")
    assert export(store=store, run="other", step="again", table="mine")["seal"] == "vectors/mine/v1"
