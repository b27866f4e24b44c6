"""The torch engine and the choice between engines: parity, odd texts, bits over kills, and what a switch of engines may do.

Oracles: sentence-transformers for MiniLM (cosine >= 0.999999 each), transformers' BertModel with random weights and sizes, and the JAX engine.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_embed import changed, dna, kmer, matrix, minilm, oracle, sealed, sequences  # noqa: F401
from test_kill import kill_after

from waystation.embedding import backend, choice, flat
from waystation.embedding.backend import open_model
from waystation.embedding.engine import Cut, flow, prepare
from waystation.recipe import Job
from waystation.runtime import Refused
from waystation.stations.embed import embed
from waystation.store import Store

torch = pytest.importorskip("torch")
SMALL = dict(model="asset:kmer-random", text="sequence", shard_rows=5)


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")


def embedded(folder, texts, by="torch", cut=None, **options) -> np.ndarray:
    "Vectors of texts by one engine; every text must have one."
    model = open_model(folder, engine=by, **options)
    (shard, y), = flow(model, [prepare(model, 0, 0, pa.record_batch(dict(id=[str(i) for i in range(len(texts))], text=texts)), cut or Cut(), {})])
    assert not shard.aside
    return y


# --- parity --------------------------------------------------------------------------------------------------------


def test_banking_texts_agree_with_sentence_transformers_and_jax(minilm, oracle):  # noqa: F811
    from waystation.assets import resolve
    docs = pq.read_table(resolve("asset:banking", "source").path)["text"].to_pylist()[::20]
    texts = docs + [line for d in docs[:12] for line in d.split("\n") if line.strip()]
    y = embedded(minilm, texts)
    want = oracle.encode(texts, normalize_embeddings=True)
    assert (y * want).sum(1).min() >= 0.999999 and len(texts) > 150
    np.testing.assert_allclose(y, embedded(minilm, texts, "jax"), atol=2e-6)


def test_odd_texts(minilm, oracle, tmp_path):  # noqa: F811
    texts = ["a", "?", "\U0001f600", "東", "[MASK]", "A" * 300, "word " * 400, "é" * 50, "  lead and trail  ", "line\nbreak\ttab", "a", "[SEP] ﬁ Å é\u0301 \x00 b"]
    y = embedded(minilm, texts)
    assert (y * oracle.encode(texts, normalize_embeddings=True)).sum(1).min() >= 0.999999
    np.testing.assert_array_equal(y[0], y[10])  # equal texts lie in one group
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(dict(id=str(i), text=t)) + "\n" for i, t in enumerate(["", None, " \n", "\u200b", "fine", "\U0001f600"])))
    report = embed(run="odd", store=str(tmp_path / "store"), source=str(path), engine="torch")
    assert (report["rows"], report["quarantine_reasons"]) == (2, {"empty text": 2, "null text": 1, "no tokens": 1})
    assert (report["engine"], report["fill"], report["engine_why"]) == ("torch", 1.0, "asked for")


@pytest.mark.parametrize("seed", range(6))
def test_random_berts_agree_with_transformers(tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    heads, layers, positions = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(9, 60))
    config = transformers.BertConfig(vocab_size=99, hidden_size=heads * int(rng.choice([4, 12, 16])), num_hidden_layers=layers, num_attention_heads=heads,
                                     intermediate_size=int(rng.integers(8, 90)), max_position_embeddings=positions, type_vocab_size=int(rng.integers(1, 3)),
                                     layer_norm_eps=float(rng.choice([1e-12, 1e-5])))
    torch.manual_seed(seed)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "bert", safe_serialization=True)
    texts = [rng.integers(1, 99, n).astype(np.int32) for n in (positions, 1, 1, *rng.integers(1, positions + 1, 20))]
    encoder = flat.load(tmp_path / "bert", "cpu")
    found, place = flat.batches(texts, int(rng.integers(1, 200)))
    for pooling in ("mean", "cls"):
        ours = torch.cat([encoder.vectors(b, pooling, False) for b in found])[place].numpy()
        for got, ids in zip(ours, texts, strict=True):
            with torch.no_grad():
                states = model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0].numpy()
            np.testing.assert_allclose(got, states.mean(0) if pooling == "mean" else states[0], atol=1e-5)


def test_windows_and_chunks_agree_with_jax(kmer):  # noqa: F811
    texts = [dna(n) for n in (6, 9000, 60, 700, 60, 3100)]
    for cut in (Cut(on_long="window"), Cut(chunk_tokens=40, chunk_overlap=8)):
        a, b = embedded(kmer, texts, "torch", cut, max_tokens=100), embedded(kmer, texts, "jax", cut, max_tokens=100)
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_every_text_is_in_one_batch_whole():
    rng = np.random.default_rng(0)
    for _ in range(50):
        texts = [rng.integers(0, 9, n) for n in rng.integers(1, 70, int(rng.integers(0, 60)))]
        found, place = flat.batches(texts, int(rng.integers(1, 300)))
        back = []
        for b in found:
            assert sum(k * n for k, n in b.groups) == len(b.tokens) == len(b.positions)
            back += np.split(b.tokens, np.cumsum([n for k, n in b.groups for _ in range(k)])[:-1])
        assert len(back) == len(texts) and all((back[p] == t).all() for p, t in zip(place, texts, strict=True))


# --- choice --------------------------------------------------------------------------------------------------------


def absent(monkeypatch):
    "A machine without torch."
    real = importlib.util.find_spec

    def find_spec(name, *a):
        return None if name == "torch" else real(name, *a)
    for module in (choice, backend):
        monkeypatch.setattr(module, "find_spec", find_spec)


def test_a_forced_engine_that_is_absent_names_what_to_install(sequences, tmp_path, monkeypatch):  # noqa: F811
    absent(monkeypatch)
    backend.open_model.cache_clear()
    with pytest.raises(Refused, match=r"engine='torch'.*pip install torch.*waystation\[train\].*engine='jax'"):
        embed(run="r", store=str(tmp_path / "s"), source=str(sequences), engine="torch", **SMALL)
    report = embed(run="r", store=str(tmp_path / "s"), source=str(sequences), **SMALL)  # auto
    assert (report["engine"], report["engine_why"]) == ("jax", "torch is not installed")


def test_without_jax_the_extra_is_named():
    code = ("import sys; sys.modules['flax'] = None\nfrom waystation.stations.embed import embed\nfrom waystation.runtime import Refused\n"
            "try: embed()\nexcept Refused as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "embed needs flax; pip install 'waystation[embed]'"


def stop_after(monkeypatch, shards):
    "The next runs stop when so many shards are sealed."
    real = Job.seal

    def seal(self, folder, kind, number=None, meta=None):
        if kind == "shards" and len(self.names("shards")) == shards:
            raise OSError(28, "No space left on device")
        return real(self, folder, kind, number, meta)
    monkeypatch.setattr(Job, "seal", seal)
    return lambda: monkeypatch.setattr(Job, "seal", real)


def test_auto_measures_once_and_a_resumed_run_keeps_its_engine(tmp_path, monkeypatch, capsys):
    source, rng = tmp_path / "rows.parquet", np.random.default_rng(0)
    pq.write_table(pa.table(dict(id=[str(i) for i in range(90)], sequence=[dna(int(n)) for n in rng.integers(6, 900, 90)])), source)
    params = dict(run="auto", store=str(tmp_path / "store"), source=str(source), **{**SMALL, "shard_rows": 30})
    rates = iter([dict(jax=2000.0, torch=1000.0, onednn=900.0), dict(jax=1.0, torch=2.0, onednn=1.0)])
    monkeypatch.setattr(choice, "measure", lambda *a, **k: next(rates))
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(OSError):
        embed(**params)
    go_on()
    report = embed(**params)
    assert (report["engine"], report["shards_found"], report["shards_computed"]) == ("jax", 1, 2)
    assert report["engine_why"] == "tokens a CPU second on the first 90 rows: jax 2,000, torch 1,000, onednn 900"
    assert report["engine_why"] in capsys.readouterr().err
    assert next(rates)["torch"] == 2.0, "the resumed run measured again"


@pytest.mark.parametrize("engine", ["torch", "onednn"])
def test_it_goes_on_bit_for_bit(sequences, tmp_path, monkeypatch, engine):  # noqa: F811
    params = dict(source=str(sequences), engine=engine, **SMALL)
    want = sealed(embed(run="calm", store=str(tmp_path / "calm"), **params))
    go_on = stop_after(monkeypatch, 2)
    with pytest.raises(OSError):
        embed(run="cut", store=str(tmp_path / "cut"), **params)
    go_on()
    report = embed(run="cut", store=str(tmp_path / "cut"), **params)
    assert (report["shards_found"], report["shards_computed"]) == (2, 2)
    got = sealed(report)
    assert got["id"].to_pylist() == want["id"].to_pylist() and matrix(got).tobytes() == matrix(want).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_next_machine_without_torch(sequences, tmp_path, monkeypatch, dtype):  # noqa: F811
    params = dict(run="r", store=str(tmp_path / "store"), source=str(sequences), dtype=dtype, **SMALL)
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(OSError):
        embed(**params)  # few rows: torch
    go_on()
    absent(monkeypatch)
    monkeypatch.setattr(choice, "NEAR", 1.1)  # nothing agrees so well
    with pytest.raises(Refused, match=r"shard 0, made by torch on .* in .* and computed again by jax .*pip install torch.*--restart"):
        embed(**params)
    assert len(Store(params["store"]).list("runs/r/embed/1/shards")) == 1
    monkeypatch.setattr(choice, "NEAR", 0.99999)
    report = embed(**params)
    assert report["engine"] == "torch; jax" and "torch is not installed here; shard 0, made by torch" in report["engine_why"]
    assert (report["shards_found"], report["shards_computed"]) == (1, 3)


def test_another_model_is_not_mixed_in(sequences, tmp_path, monkeypatch):  # noqa: F811
    params = dict(run="r", store=str(tmp_path / "store"), source=str(sequences), **SMALL)
    go_on = stop_after(monkeypatch, 1)
    with pytest.raises(OSError):
        embed(**params)
    go_on()
    absent(monkeypatch)
    real = backend.ENGINES["jax"]

    def wrong(*a):
        made = real(*a)
        return made | dict(run=lambda *b: np.roll(np.asarray(made["run"](*b)), 1, axis=-1))
    monkeypatch.setitem(backend.ENGINES, "jax", wrong)
    backend.open_model.cache_clear()
    with pytest.raises(Refused, match="one and the same run"):
        embed(**params)
    backend.open_model.cache_clear()


def test_kill_9_in_torch_and_go_on(cli, env, tmp_path):
    pq.write_table(pa.table(dict(id=[str(i) for i in range(120)], sequence=[dna(300 + 13 * i) for i in range(120)])), tmp_path / "rows.parquet")
    args = ["embed", "--run", "k", "--source", str(tmp_path / "rows.parquet"), "--text", "sequence", "--model", "asset:kmer-random",
            "--engine", "torch", "--shard-rows", "2"]
    other = str(tmp_path / "undisturbed")
    whole = cli(*args, "--json", WAYSTATION_STORE=other)
    found = kill_after(args, env, tmp_path, "shards", 3)
    resumed = cli(*args, "--json")
    assert (resumed["shards"], resumed["shards_found"], resumed["shards_computed"]) == (60, len(found), 60 - len(found))
    a, b = (sealed(dict(r, params=dict(r["params"], store=s))) for r, s in ((resumed, env["WAYSTATION_STORE"]), (whole, other)))
    assert a["id"].to_pylist() == b["id"].to_pylist() and matrix(a).tobytes() == matrix(b).tobytes()
