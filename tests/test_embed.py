"""Embedding against sentence-transformers and transformers, under strict promotion, on bad input, and over kills.

Oracles: sentence-transformers for MiniLM's text vectors (cosine >= 0.99999 each), transformers' BertModel with random
weights for what MiniLM does not show (biases, cls pooling, another eps).
"""

import json
import os

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from waystation.assets import resolve
from waystation.embedding import engine
from waystation.embedding.encoder import load, vectors
from waystation.embedding.backend import open_model
from waystation.embedding.engine import Cut, embed_texts, flow, prepare, read_shards
from waystation.embedding.models import read_config, read_recipe
from waystation.embedding.packing import lay, pack
from waystation.embedding.tokens import read_tokenizer
from waystation.recipe import Job
from waystation.rows import Rows
from waystation.runtime import Refused
from waystation.stations.embed import embed
from waystation.store import Store

SMALL = dict(model="asset:kmer-random", text="sequence", keep="", chunk_tokens=0, shard_rows=5, engine="jax")


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def minilm():
    return resolve("asset:minilm", "model").path


@pytest.fixture(scope="session")
def kmer():
    return resolve("asset:kmer-random", "model").path


@pytest.fixture(scope="session")
def oracle(minilm):
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(minilm), device="cpu")


def sealed(report) -> pa.Table:
    "All vectors of a finished step."
    store = Store(report["params"]["store"])
    places = [store.fetch(n, f"{store.url}/../read/{n}") for n in store.list(report["shards_at"])]
    return pa.concat_tables(pq.read_table(p / "vectors.parquet") for p in places)


def matrix(table) -> np.ndarray:
    return np.stack(table["vector"].to_numpy(zero_copy_only=False))


def dna(n, seed=0):
    return "".join(np.random.default_rng([seed, n]).choice(list("ACGT"), n))


@pytest.fixture
def sequences(tmp_path):
    "17 sequences of skewed lengths; two of them cannot be embedded."
    texts = [dna(n) for n in (1, 5, 6, 7, 600, 1463, 3061, 3066, 3067, 40, 41, 42, 43, 44, 45)]
    texts[3:3] = [None, " \n"]
    path = tmp_path / "seqs.parquet"
    pq.write_table(pa.table(dict(id=[f"s{i}" for i in range(17)], sequence=texts, n=list(range(17)))), path, row_group_size=4)
    return path


# --- parity --------------------------------------------------------------------------------------------------------


def test_banking_chunks_agree_with_sentence_transformers(tmp_path, oracle):
    docs = pq.read_table(resolve("asset:banking", "source").path)
    pq.write_table(docs.take(list(range(0, docs.num_rows, 8))), tmp_path / "docs.parquet")  # every category, every length
    report = embed(run="parity", store=str(tmp_path / "store"), source=str(tmp_path / "docs.parquet"), keep="title,category",
                   chunk_tokens=200, chunk_overlap=40, shard_rows=64, engine="jax")
    table = sealed(report)
    assert report["rows"] == table.num_rows > 100 and report["quarantined"] == report["truncated"] == 0
    assert len(set(table["id"].to_pylist())) == table.num_rows
    want = oracle.encode(table["text"].to_pylist(), normalize_embeddings=True)
    cosine = (matrix(table) * want).sum(1)
    assert cosine.min() >= 0.99999
    whole = dict(zip(docs["id"].to_pylist(), docs["text"].to_pylist(), strict=True))
    for doc, text in zip(table["doc_id"].to_pylist(), table["text"].to_pylist(), strict=True):
        assert text in whole[doc]  # verbatim
    assert set(table["doc_id"].to_pylist()) == set(docs["id"].to_pylist()[::8])
    assert max(table["n_tokens"].to_pylist()) <= 200


def test_odd_texts_agree_with_sentence_transformers(minilm, oracle):
    rng = np.random.default_rng(0)
    some = "the card bank fee café naïve Zürich 東京 日本語 مرحبا привет 👩‍👩‍👧 😀 a1b2 $5.00 x_y [SEP] ﬁ Å é\u0301 \x00 \u200b".split(" ")
    texts = ["a", "?", "😀", "東", "[MASK]", "A" * 300, "word " * 400, "é" * 50, "  lead and trail  ", "line\nbreak\ttab"]
    texts += [" ".join(rng.choice(some, n)) for n in np.clip(rng.lognormal(2.5, 1.2, 200).astype(int), 1, 400)]
    texts = [t for t in texts if len(read_tokenizer(minilm).encode([t])[0][0])]  # nothing left: set aside, see below
    assert len(texts) > 190
    want = oracle.encode(texts, normalize_embeddings=True)
    cosine = (embed_texts(minilm, texts) * want).sum(1)
    assert cosine.min() >= 0.99999


def bert_folder(tmp_path, prefix=""):
    "A BERT with random weights and biases, saved by transformers."
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = transformers.BertConfig(vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=80,
                                     max_position_embeddings=40, layer_norm_eps=1e-5)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "bert", safe_serialization=True)
    return tmp_path / "bert", model


def test_every_bias_and_norm_agrees_with_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    folder, model = bert_folder(tmp_path)
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, 99, n).astype(np.int32) for n in (40, 1, 7, 33, 12, 2)]
    p = pack([len(t) for t in texts], 64, 8)
    rows = lay(p, texts, pad=0)
    with jax.numpy_dtype_promotion("strict"):
        encoder = load(folder)
        for pooling in ("mean", "cls"):
            ours = np.asarray(vectors(encoder, *rows, 8, pooling, False))[p.row, p.segment]
            for got, ids in zip(ours, texts, strict=True):
                with torch.no_grad():
                    states = model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0].numpy()
                np.testing.assert_allclose(got, states.mean(0) if pooling == "mean" else states[0], atol=5e-6)
        half = vectors(load(folder, jax.numpy.bfloat16), *rows, 8, "mean", True)
    assert half.dtype == jax.numpy.float32


def test_a_text_does_not_notice_its_neighbours(minilm):
    text = "What is the fee for a returned check?"
    alone = embed_texts(minilm, [text])[0]
    for n in (1, 5, 60):
        crowd = embed_texts(minilm, [f"{'neighbour ' * (k % 17)}{k}" for k in range(n)] + [text])[-1]
        np.testing.assert_allclose(crowd, alone, atol=1e-6)


# --- model folders -------------------------------------------------------------------------------------------------


def changed(folder, tmp_path, name, **fields):
    "A copy of a model folder with other fields in one of its JSON files."
    new = tmp_path / "changed"
    new.mkdir()
    for f in folder.iterdir():
        (new / f.name).symlink_to(f)
    doc = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (new / name).unlink(missing_ok=True)
    (new / name).write_text(json.dumps({**doc, **fields}))
    return new


@pytest.mark.parametrize("fields", [dict(hidden_act="gelu_new"), dict(position_embedding_type="relative_key"), dict(model_type="t5"), dict(is_decoder=True)])
def test_what_is_not_implemented_is_refused_by_name(kmer, tmp_path, fields):
    with pytest.raises(Refused, match=next(iter(fields))):
        read_config(changed(kmer, tmp_path, "config.json", **fields))


def test_sentence_transformers_settings(minilm, kmer, tmp_path):
    r = read_recipe(minilm)
    assert (r.pooling, r.normalize, r.max_tokens) == ("mean", True, 256)
    assert read_recipe(minilm, "cls", 512).normalize
    with pytest.raises(Refused, match="table of 512 positions"):
        read_recipe(minilm, max_tokens=513)
    with pytest.raises(Refused, match="do_lower_case"):
        read_recipe(changed(minilm, tmp_path, "sentence_bert_config.json", do_lower_case=True))
    with pytest.raises(Refused, match="pooling='sum'"):
        read_recipe(kmer, "sum")


def test_weights_match_the_table_both_ways(kmer, tmp_path):
    from safetensors.numpy import load_file, save_file
    good = load_file(kmer / "model.safetensors")
    new = changed(kmer, tmp_path, "note.json")
    (new / "model.safetensors").unlink()

    def saved(weights):
        save_file(weights, new / "model.safetensors")
        return new
    lost = {"encoder.layer.0.output.dense.bias", "embeddings.LayerNorm.weight"}
    bad = {k: v for k, v in good.items() if k not in lost} | {"encoder.layer.2.output.dense.bias": np.zeros(3, np.float32)}
    bad["encoder.layer.1.intermediate.dense.weight"] = np.zeros((128, 512), np.float32)
    with pytest.raises(Refused) as e:
        load(saved(bad))
    for key in [*lost, "encoder.layer.2.output.dense.bias", "encoder.layer.1.intermediate.dense.weight: (128, 512) instead of (512, 128)"]:
        assert key in str(e.value)
    extra = {"bert.pooler.dense.weight": np.zeros((2, 2), np.float32), "cls.predictions.bias": np.zeros(2, np.float32)}
    load(saved({f"bert.{k}": v for k, v in good.items()} | extra))
    (new / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(Refused, match="cannot be read"):
        load(new)


def test_truncation_inside_the_tokenizer_file_is_off(minilm):
    assert json.loads((minilm / "tokenizer.json").read_text())["truncation"]["max_length"] == 128
    (ids, spans, _), = read_tokenizer(minilm).encode(["bank " * 500])
    assert len(ids) == 500 and spans[-1].tolist() == [2495, 2499]


# --- rows ----------------------------------------------------------------------------------------------------------


def test_counts_and_reasons(sequences, tmp_path):
    report = embed(run="r", store=str(tmp_path / "store"), source=str(sequences), **{**SMALL, "keep": "n"})
    assert (report["source_rows"], report["rows"], report["quarantined"], report["shards"]) == (17, 15, 2, 4)
    assert report["quarantine_reasons"] == {"null text": 1, "empty text": 1}
    assert report["truncated"] == 1  # 3,066 bases are 511 six-mers, which fit beside <cls>; one more does not
    table = sealed(report)
    assert table.column_names == ["id", "doc_id", "text", "n_tokens", "vector", "hash", "n"]
    assert table["n"].to_pylist() == [i for i in range(17) if i not in (3, 4)]
    assert "random" in report["weights"]  # a model that was never trained is called so
    json.dumps(report, allow_nan=False)


def test_windows_average_and_nothing_else_changes(sequences, tmp_path):
    cut, window = (sealed(embed(run=w, store=str(tmp_path / w), source=str(sequences), on_long=w, max_tokens=400, **SMALL)) for w in ("truncate", "window"))
    long = np.array(cut["n_tokens"].to_pylist()) > 399
    assert long.sum() == 3
    np.testing.assert_allclose(matrix(cut)[~long], matrix(window)[~long], atol=1e-6)
    assert np.abs(matrix(cut)[long] - matrix(window)[long]).max() > 1e-3


def refused(tmp_path, match, **params):
    with pytest.raises(Refused, match=match):
        embed(**{**SMALL, "run": "bad", "store": str(tmp_path / "store"), **params})
    assert not list((tmp_path / "store").glob("seals/runs/bad/embed/*/shards/*"))


def test_bad_input_is_refused(sequences, tmp_path):
    s = str(sequences)
    refused(tmp_path, "does not exist", source=str(tmp_path / "none.parquet"))
    (tmp_path / "empty.parquet").write_bytes(b"")
    refused(tmp_path, "empty", source=str(tmp_path / "empty.parquet"), run="bad2")
    for run, match, params in [
        ("a", r"'body' is not a column.*id, sequence, n", dict(text="body")),
        ("b", "keep='nope'", dict(keep="nope")),
        ("c", "max_tokens=1000.*512", dict(max_tokens=1000)),
        ("d", "row 's7' has 248 tokens.*takes 199.*truncate or window", dict(max_tokens=200, on_long="error")),
        ("e", "chunk_tokens=512.*room for 511", dict(chunk_tokens=512)),
        ("f", "chunk_overlap=50", dict(chunk_tokens=50, chunk_overlap=50)),
        ("g", "on_long='cut'", dict(on_long="cut")),
        ("h", "engine='tpu'.*'auto'", dict(engine="tpu")),
        ("i", "dtype='int4'", dict(dtype="int4")),
        ("j", "shard_rows=0", dict(shard_rows=0)),
        ("k", "keep='vector'", dict(keep="vector")),
        ("l", "pooling='sum'", dict(pooling="sum")),
        ("m", "model=''", dict(model="")),
    ]:
        refused(tmp_path, match, source=s, **{**params, "run": run})


def test_duplicate_and_missing_ids(tmp_path):
    path = tmp_path / "dup.jsonl"
    path.write_text("".join(json.dumps(dict(id=i, sequence=dna(50 + k))) + "\n" for k, i in enumerate("abcadb")))
    refused(tmp_path, "id 'a' stands in row 0 and in row 3", source=str(path))
    report = embed(run="first", store=str(tmp_path / "store"), source=str(path), on_duplicate="first", **SMALL)
    assert report["quarantine_reasons"] == {"duplicate id": 2} and report["rows"] == 4
    path.write_text(json.dumps(dict(id=None, sequence="ACGT")) + "\n")
    refused(tmp_path, "row 0 .*has no id", source=str(path), run="none")


def test_nan_stops_with_the_row(kmer, sequences, tmp_path):
    from safetensors.numpy import load_file, save_file
    weights = load_file(kmer / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"].copy()
    weights["embeddings.word_embeddings.weight"][4100:4104] = np.nan  # single bases: of the first shard s0 has one
    new = changed(kmer, tmp_path, "note.json")
    (new / "model.safetensors").unlink()
    save_file(weights, new / "model.safetensors")
    refused(tmp_path, "row 's0' has NaN", source=str(sequences), model=str(new))


# --- shards --------------------------------------------------------------------------------------------------------


def test_shards_do_not_depend_on_how_files_are_cut(sequences, tmp_path):
    rows = Rows(sequences, text="sequence", keep=["n"])
    parts = tmp_path / "parts"
    parts.mkdir()
    table = pq.read_table(sequences)
    for k, (a, n) in enumerate([(0, 3), (3, 1), (4, 9), (13, 4)]):
        pq.write_table(table.slice(a, n), parts / f"{k}.parquet")
    for source in (rows, Rows(parts, text="sequence", keep=["n"])):
        got = {n: b["n"].to_pylist() for n, b in read_shards(source, [0, 2, 3], 5)}
        assert got == {0: [0, 1, 2, 3, 4], 2: [10, 11, 12, 13, 14], 3: [15, 16]}


def test_stopped_and_run_again(sequences, tmp_path, monkeypatch):
    params = dict(source=str(sequences), **SMALL)
    want = sealed(embed(run="calm", store=str(tmp_path / "calm"), **params))
    real, made = Job.seal, []

    def seal(self, folder, kind, number=None, meta=None):
        if kind == "shards":
            if len(made) == 2:
                raise OSError(28, "No space left on device")
            made.append(number)
        return real(self, folder, kind, number, meta)
    monkeypatch.setattr(Job, "seal", seal)
    with pytest.raises(OSError):
        embed(run="cut", store=str(tmp_path / "cut"), **params)
    assert made == [0, 1]
    monkeypatch.setattr(Job, "seal", real)
    prepared = []
    monkeypatch.setattr(engine, "prepare", lambda m, number, *a: prepared.append(number) or prepare(m, number, *a))
    report = embed(run="cut", store=str(tmp_path / "cut"), **params)
    assert (report["shards_found"], report["shards_computed"], prepared) == (2, 2, [2, 3])
    got = sealed(report)
    assert got["id"].to_pylist() == want["id"].to_pylist()
    assert matrix(got).tobytes() == matrix(want).tobytes()
    assert embed(run="cut", store=str(tmp_path / "cut"), **params) == report and prepared == [2, 3]


def test_float16_and_an_empty_shard(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(id=str(i), sequence=None if i < 5 else dna(90 + i))) + "\n" for i in range(10)))
    report = embed(run="h", store=str(tmp_path / "store"), source=str(path), dtype="float16", **SMALL)
    assert (report["rows"], report["quarantined"], report["shards"]) == (5, 5, 2)
    assert sealed(report).schema.field("vector").type == pa.list_(pa.float16(), 128)


def test_batches_under_way_come_back_in_order(kmer):
    model = open_model(kmer)
    batch = pa.record_batch(dict(id=[str(i) for i in range(40)], text=[dna(300 + 7 * i) for i in range(40)]))
    shards = [prepare(model, k, 0, batch.slice(4 * k, 4), Cut(), {}) for k in range(10)]
    got = {s.number: y for s, y in flow(model, shards, depth=3)}
    (_, alone), = flow(model, [prepare(model, 7, 0, batch.slice(28, 4), Cut(), {})])
    assert list(got) == list(range(10)) and got[7].tobytes() == alone.tobytes()
