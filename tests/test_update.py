"""Embedding a source that changed: what still holds is taken over bit for bit, and the model sees the rest alone."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WAYSTATION

from waystation.embedding import backend, engine
from waystation.runtime import Refused
from waystation.stations.embed import embed
from waystation.stations.export import export
from waystation.store import Store


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")


def dna(n, seed=0):
    return "".join(np.random.default_rng([seed, n]).choice(list("ACGT"), n))


def sealed(report) -> pa.Table:
    "All rows of a finished step, in the order of the source."
    store = Store(report["params"]["store"])
    places = [store.fetch(n, f"{store.url}/../read/{n}") for n in store.list(report["shards_at"])]
    return pa.concat_tables(pq.read_table(p / "vectors.parquet") for p in places)


def by_id(report) -> dict[str, bytes]:
    table = sealed(report)
    ids = table["id"].to_pylist()
    assert len(ids) == len(set(ids)) == report["rows"]
    return dict(zip(ids, (v.values.to_numpy().tobytes() for v in table["vector"]), strict=True))


class Bench:
    "A source that the test rewrites, and a station that counts the texts given to the model."

    def __init__(self, tmp_path, monkeypatch):
        self.path, self.given = tmp_path / "rows.parquet", []
        self.args = dict(run="u", store=str(tmp_path / "store"), source=str(self.path), keep="n", model="asset:kmer-random", shard_rows=5, engine="jax",
                         device="cpu")
        real = engine.pieces

        def pieces(model, ids, *a):
            self.given.append(len(ids))
            return real(model, ids, *a)

        monkeypatch.setattr(engine, "pieces", pieces)

    def write(self, rows: dict[str, str | None], n=0):
        pq.write_table(pa.table(dict(id=pa.array(rows, pa.string()), text=pa.array(rows.values(), pa.string()), n=[n] * len(rows))), self.path)

    def __call__(self, **how):
        self.given.clear()
        return embed(**self.args | how)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


ROWS = {f"s{i}": dna(60 + 7 * i) for i in range(17)}


def counts(report):
    return [report[f"rows_{k}"] for k in ("reused", "computed", "changed", "vanished")]


def test_new_changed_and_vanished_rows(bench):
    bench.write(ROWS)
    first = bench()
    assert counts(first) == [0, 17, 0, 0]
    before = by_id(first)
    # two new rows in front, so that every row moves into another place; one mended, two gone
    now = {"new": dna(99, 1), "too": dna(98, 1)} | {k: v for k, v in ROWS.items() if k not in ("s3", "s16")} | {"s7": dna(109, 2)}
    bench.write(now, n=1)
    with pytest.raises(Refused, match="pass --update to do only what"):
        bench()
    report = bench(update=True)
    assert counts(report) == [14, 3, 1, 2] and sum(bench.given) == 3
    assert (report["rows"], report["vectors_reused"], report["attempt"]) == (17, 14, 2)
    after = by_id(report)
    assert list(after) == list(now)  # in the order of the source
    assert {k: after[k] for k in now if now[k] == ROWS.get(k)} == {k: before[k] for k in now if now[k] == ROWS.get(k)}
    assert after["s7"] != before["s7"]
    assert set(sealed(report)["n"].to_pylist()) == {1}
    bench.write(now, n=1)  # the same bytes
    assert bench(update=True) == report and not bench.given
    # back again: the rows of before are not those of the attempt that is current now
    bench.write(ROWS)
    third = bench(update=True)
    assert counts(third) == [14, 3, 1, 2]
    assert (third["attempt"], list(by_id(third))) == (3, list(ROWS))


def test_a_fresh_run_would_have_sealed_the_same(bench, tmp_path):
    "Whole shards that are taken over have the same bytes, so the store keeps them once; computed ones agree up to rounding."
    bench.write({k: ROWS[k] for k in list(ROWS)[:10]})
    bench()
    bench.write({k: ROWS[k] for k in list(ROWS)[:15]})
    report = bench(update=True)
    store = Store(report["params"]["store"])
    files = [[store.read(f"runs/u/embed/{a}/shards/{k}").files["vectors.parquet"] for k in (0, 1)] for a in (1, 2)]
    assert [f["sha256"] for f in files[0]] == [f["sha256"] for f in files[1]]
    fresh = bench(run="fresh", store=str(tmp_path / "other"))
    a, b = (np.stack([np.frombuffer(v, np.float32) for v in by_id(r).values()]) for r in (report, fresh))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert sealed(report).drop_columns("vector").equals(sealed(fresh).drop_columns("vector"))


def test_a_kept_column_alone(bench):
    bench.write(ROWS)
    before = by_id(bench())
    bench.write(ROWS, n=5)
    report = bench(update=True)
    assert counts(report) == [17, 0, 0, 0] and sum(bench.given) == 0
    assert by_id(report) == before and set(sealed(report)["n"].to_pylist()) == {5}


def test_only_the_rows_may_differ(bench):
    bench.write(ROWS)
    bench()
    bench.write(ROWS, n=5)
    for how in (dict(pooling="cls"), dict(max_tokens=64), dict(chunk_tokens=30, chunk_overlap=5), dict(dtype="float16"), dict(on_long="window"), dict(keep=""),
                dict(shard_rows=6), dict(engine="auto"), dict(text="id")):
        with pytest.raises(Refused, match=rf"(?s){next(iter(how))} was.*only the rows may differ.*--restart"):
            bench(update=True, **how)
    with pytest.raises(Refused, match="pass one of them"):
        bench(update=True, restart=True)
    assert counts(bench(update=True, limit=3)) == [3, 0, 0, 14]


def test_rows_that_were_set_aside_are_tried_again(bench):
    bench.write(ROWS | {"s4": None, "s9": "?"})
    first = bench()
    assert first["quarantine_reasons"] == {"null text": 1, "no tokens": 1}
    # the same source: those two alone, and one of them gets as far as the tokenizer
    again = bench(update=True)
    assert counts(again) == [15, 1, 0, 0] and again["attempt"] == 2 and again["quarantined"] == 2 and sum(bench.given) == 0
    bench.write(ROWS | {"s9": "?"})
    mended = bench(update=True)
    assert counts(mended) == [15, 2, 0, 0] and mended["quarantine_reasons"] == {"no tokens": 1}
    bench.write(ROWS | {"s4": "  "})  # had a vector, and now has nothing to embed
    worse = bench(update=True)
    assert counts(worse) == [15, 1, 1, 0] and worse["quarantine_reasons"] == {"empty text": 1}
    assert "s4" not in by_id(worse)


@pytest.mark.parametrize("how", [{}, dict(chunk_tokens=20, chunk_overlap=5)])
def test_a_tokenizer_that_fails_once(bench, monkeypatch, how):
    "The text that it cannot read is set aside alone; an update of the same source tries that one again, and nothing else."
    bench.write(ROWS)
    real, bad = backend.read_tokenizer, ROWS["s7"]

    def read_tokenizer(folder):
        tokenizer = real(folder)

        def encode(texts):
            if bad in texts:
                raise UnicodeDecodeError("utf-8", b"x", 0, 1, "not this one")
            return tokenizer.encode(texts)

        return backend.Tokenizer(encode, tokenizer.prefix, tokenizer.suffix, tokenizer.top)

    backend.open_model.cache_clear()
    monkeypatch.setattr(backend, "read_tokenizer", read_tokenizer)
    first = bench(**how)
    monkeypatch.setattr(backend, "read_tokenizer", real)
    backend.open_model.cache_clear()
    assert first["quarantine_reasons"] == {"cannot be tokenised": 1}
    store = Store(first["params"]["store"])
    (aside,) = [json.loads(x) for x in (store.fetch(f"{first['shards_at']}/1", bench.path.parent / "q") / "quarantine.jsonl").read_text().splitlines()]
    assert (aside["row"], aside["id"]) == (7, "s7") and aside["reason"].startswith("cannot be tokenised: 'utf-8' codec")
    before = by_id(first)
    assert {i.split("#")[0] for i in before} == {*ROWS} - {"s7"}
    report = bench(update=True, **how)
    assert counts(report) == [16, 1, 0, 0] and report["quarantined"] == 0 and sum(bench.given) == report["rows"] - first["rows"] > 0
    assert {i: v for i, v in by_id(report).items() if i in before} == before
    assert bench(update=True, **how) == report


def test_chunks_of_a_document_go_together(bench):
    how = dict(chunk_tokens=20, chunk_overlap=5)
    rows = {f"d#{i}": dna(200 + 40 * i) for i in range(7)}  # ids that look like those of chunks
    bench.write(rows)
    first = bench(**how)
    before = by_id(first)
    bench.write(rows | {"d#2": rows["d#2"][:-150], "d#9": dna(300, 3)})
    report = bench(update=True, **how)
    assert counts(report) == [6, 2, 1, 0]
    table, after = sealed(report), by_id(report)
    assert table["doc_id"].to_pylist() == sorted(table["doc_id"].to_pylist())
    mended = [i for i, d in zip(table["id"].to_pylist(), table["doc_id"].to_pylist(), strict=True) if d == "d#2"]
    assert mended == [f"d#2#{k}" for k in range(len(mended))] and len(mended) < sum(k.startswith("d#2#") for k in before)
    same = [k for k in before if not k.startswith("d#2#")]
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    assert sum(bench.given) == len(after) - len(same)


def test_duplicates(bench):
    ids = ["a", "b", "a", "c", "b", "d"]

    def write(texts):
        pq.write_table(pa.table(dict(id=ids, text=texts, n=list(range(6)))), bench.path)

    how = dict(on_duplicate="first", shard_rows=2)
    texts = [dna(50 + i) for i in range(6)]
    write(texts)
    assert counts(bench(**how)) == [0, 4, 0, 0]
    write([*texts[:2], dna(77), dna(78), *texts[4:]])  # a later row of `a`, which has no vector, and `c`
    report = bench(update=True, **how)
    assert counts(report) == [3, 1, 1, 0] and report["quarantine_reasons"] == {"duplicate id": 2}
    assert dict(zip(*(sealed(report)[c].to_pylist() for c in ("id", "n")), strict=True)) == dict(a=0, b=1, c=3, d=5)


def test_vectors_of_an_unfinished_attempt_and_of_the_one_below(bench, monkeypatch):
    bench.write(ROWS)
    bench()
    bench.write(ROWS | {"s1": dna(70, 4)}, n=1)
    real = engine.write_shard

    def write_shard(folder, shard, *a):
        if shard.number == 2:
            raise OSError(28, "No space left on device")
        return real(folder, shard, *a)

    monkeypatch.setattr(engine, "write_shard", write_shard)
    with pytest.raises(OSError):
        bench(update=True)
    monkeypatch.setattr(engine, "write_shard", real)
    bench.write(ROWS | {"s1": dna(70, 4), "s2": dna(71, 4)}, n=2)
    report = bench(update=True)
    assert counts(report) == [16, 1, 1, 0] and report["attempt"] == 3


def test_a_restart_takes_nothing_over(bench):
    bench.write(ROWS)
    bench()
    bench.write(ROWS, n=1)
    assert counts(bench(restart=True)) == [0, 17, 0, 0]


def test_the_table_has_what_the_source_has(bench):
    import lance

    bench.write(ROWS)
    bench()
    first = export(run="u", store=bench.args["store"])
    bench.write({k: v for k, v in ROWS.items() if k != "s5"} | {"s6": dna(60, 5), "late": dna(61, 5)})
    report = bench(update=True)
    second = export(run="u", store=bench.args["store"], update=True)
    assert (first["rows"], second["rows"]) == (17, 17)
    table = lance.dataset(second["table"]).to_table()
    assert set(table["id"].to_pylist()) == {*ROWS, "late"} - {"s5"}
    assert "hash" not in table.column_names
    want = by_id(report)
    assert {i: v.values.to_numpy().tobytes() for i, v in zip(table["id"].to_pylist(), table["vector"], strict=True)} == want


def test_int8_to_the_table(bench, tmp_path):
    "A quarter of the bytes, its error told, taken over by an update, and nearly the same neighbours in the table."
    import lance

    rows = {f"s{i}": dna(60 + i) for i in range(200)}
    bench.write(rows)
    exact = bench(shard_rows=64, run="exact")
    bench(shard_rows=64, dtype="int8")
    bench.write(rows | {"s3": dna(500)})
    report = bench(shard_rows=64, dtype="int8", update=True)
    assert counts(report) == [199, 1, 1, 0]
    assert exact["storage_error"] < 1e-12 < report["storage_error"] < 1e-3
    store = Store(report["params"]["store"])
    assert report["storage_error"] == max(store.read(n).meta["storage_error"] for n in store.list(report["shards_at"])) > 0
    table = sealed(report)
    assert table.schema.field("vector").type == pa.list_(pa.int8(), 128) and table.schema.field("scale").type == pa.float32()
    made = [lance.dataset(export(run=r, store=bench.args["store"])["table"]).to_table() for r in ("exact", "u")]
    assert made[1].schema.equals(made[0].schema)
    a, b = (np.stack(t["vector"].to_numpy(zero_copy_only=False)) for t in made)
    others = np.arange(200) != 3
    a, b = a[others], b[others]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    assert (a * b).sum(1).min() > 0.999
    near = [np.argsort(-(x @ x.T), axis=1)[:, 1:11] for x in (a, b)]
    assert np.mean([len({*p} & {*q}) / 10 for p, q in zip(*near, strict=True)]) > 0.8


def test_short_vectors_and_prompts_reach_the_questions(bench, tmp_path):
    "A question is cut like the rows, and has the words before it that the model was trained with."
    from waystation.assets import resolve
    from waystation.embedding.engine import embed_texts

    folder = tmp_path / "model"
    folder.mkdir()
    for f in resolve("asset:kmer-random", "model").path.iterdir():
        (folder / f.name).write_bytes(f.read_bytes())
    prompts = dict(prompts=dict(query="ACGTAC ", passage="TTTTTT "), default_prompt_name="passage")
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    bench.write(ROWS)
    report = bench(model=str(folder), dimensions=32)
    assert (report["dim"], report["dimensions"], report["prompt"]) == (32, 32, "TTTTTT ")
    want = embed_texts(folder, list(ROWS.values()), dimensions=32, prompt="passage")
    np.testing.assert_allclose(np.stack([np.frombuffer(v, np.float32) for v in by_id(report).values()]), want, atol=1e-5)
    question = dna(75, 9)
    told = export(run="u", store=bench.args["store"], ask=question)["answers"]
    q = embed_texts(folder, [question], dimensions=32, prompt="query")[0]
    cosine = want @ q / np.linalg.norm(want, axis=1) / np.linalg.norm(q)
    np.testing.assert_allclose(sorted(a["distance"] for a in told), np.sort(1 - cosine)[: len(told)], atol=2e-3)
    with pytest.raises(Refused, match="it has 'query', 'passage'"):
        bench(model=str(folder), run="other", prompt="question")
    with pytest.raises(Refused, match="dimensions=129"):
        bench(model=str(folder), run="other", dimensions=129)


@pytest.mark.slow
def test_killed_twice(bench, env, cli, tmp_path):
    "kill -9 in the middle of an update, and of its second try: the third ends where an undisturbed one does."
    rows = {f"s{i}": dna(2500 + i) for i in range(120)}
    args = ["embed", "--run", "u", "--source", bench.path, "--keep", "n", "--model", "asset:kmer-random", "--shard-rows", "6", "--engine", "jax"]
    calm = {"WAYSTATION_STORE": str(tmp_path / "calm")}
    bench.write(rows)
    cli(*args)
    cli(*args, **calm)
    now = {"first": dna(999, 7)} | {k: dna(2600 + i, 7) if i % 2 else v for i, (k, v) in enumerate(rows.items()) if i != 50}
    bench.write(now, n=1)
    want = cli(*args, "--update", "--json", **calm)
    store = Store(env["WAYSTATION_STORE"])
    for least in (3, 8):
        p = subprocess.Popen([WAYSTATION, *map(str, args), "--update"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        until = time.time() + 300
        while len(store.list("runs/u/embed/2/shards")) < least:
            assert p.poll() is None and time.time() < until, p.stderr.read()[-2000:]
            time.sleep(0.01)
        os.killpg(p.pid, signal.SIGKILL)
        p.communicate()
        assert not store.has("runs/u/embed/2/report")
    found = len(store.list("runs/u/embed/2/shards"))
    report = cli(*args, "--update", "--json")
    assert (report["attempt"], report["shards_found"], report["shards"]) == (2, found, 20)
    assert counts(report) == counts(want) == [59, 61, 60, 1]
    assert by_id(report) == by_id(want) and list(by_id(report)) == list(now)
    quarantine = store.fetch("runs/u/embed/2/shards/0", tmp_path / "q") / "quarantine.jsonl"
    assert [json.loads(line) for line in quarantine.read_text().splitlines()] == []
