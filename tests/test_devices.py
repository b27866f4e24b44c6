"""Chips: one, four and eight of them by the same code, memory that is not enough, and programs that travel with the store.

A process has one number of CPU devices, so each case is a child with its own; the child's vectors come back as a file.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from waystation.assets import resolve
from waystation.cli import store_ls
from waystation.embedding import devices
from waystation.embedding.devices import Kept, Limit, out_of_memory
from waystation.embedding.backend import open_model
from waystation.embedding.engine import Cut, flow, prepare
from waystation.recipe import begin
from waystation.runtime import Interrupted, Refused
from waystation.stations.embed import embed
from waystation.store import Store

COLLECTIVE = re.compile(r"all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast")

CHILD = """if True:
    import json, sys
    import jax, numpy as np
    from waystation.embedding.backend import open_model
    from waystation.embedding.engine import Cut, flow, prepare
    import pyarrow as pa
    folder, texts, tensor, out = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3]), sys.argv[4]
    model = open_model(folder, tensor=tensor)
    batch = pa.record_batch(dict(id=[str(i) for i in range(len(texts))], text=texts))
    (shard, y), = flow(model, [prepare(model, 0, 0, batch, Cut(), {})])
    np.save(out, y)
    p = model.program
    up = jax.tree.leaves(p.weights['up'])[0]
    print(json.dumps(dict(about=p.chips.about, data=p.chips.data, hlo=[c.as_text() for c in p.compiled.values()], shapes=p.shapes, at=p.kept.name,
                          rows=[len(b[0]) for b in shard.pieces.laid.batches], up=[s.data.shape for s in up.addressable_shards])))
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def kmer():
    return resolve("asset:kmer-random", "model").path


def dna(n):
    return "".join(np.random.default_rng(n).choice(list("ACGT"), n))


@pytest.fixture
def rows(tmp_path, kmer):
    "Parameters of `embed` for 40 short sequences; nothing of them lies in the cache."
    pq.write_table(pa.table(dict(id=[str(i) for i in range(40)], text=[dna(90 + 30 * i) for i in range(40)])), tmp_path / "rows.parquet")
    return dict(store=str(tmp_path / "store"), source=str(tmp_path / "rows.parquet"), model=str(kmer), shard_rows=20, engine="jax")


def environment(n: int, **more: str) -> dict[str, str]:
    "Of a child with `n` CPU devices."
    return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={n}", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="session")
def on(kmer, tmp_path_factory):
    "Vectors of 61 texts on n devices, and what the child says of itself."
    tmp = tmp_path_factory.mktemp("devices")
    (tmp / "texts.json").write_text(json.dumps([dna(30 + 17 * i) for i in range(61)]))
    made = {}

    def run(n, tensor=1):
        if (n, tensor) not in made:
            out = tmp / f"{n}-{tensor}.npy"
            args = [sys.executable, "-c", CHILD, kmer, tmp / "texts.json", str(tensor), out]
            done = subprocess.run(args, env=environment(n), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            made[n, tensor] = np.load(out), json.loads(done.stdout.splitlines()[-1])
        return made[n, tensor]

    return run


# --- the mesh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 8])
def test_rows_on_many_chips_are_those_of_one_and_no_chip_talks(on, n):
    one, _ = on(1)
    many, said = on(n)
    assert one.shape == many.shape == (61, 128)
    np.testing.assert_allclose(many, one, atol=1e-6)
    assert said["data"] == n and said["rows"] and not any(r % n for r in said["rows"])
    assert said["hlo"] and f"num_partitions={n}" in said["hlo"][0]  # it is the program of all of them
    assert not any(COLLECTIVE.search(text) for text in said["hlo"])


LOWER = """if True:
    import jax, jax.numpy as jnp
    from flax import nnx
    from waystation.embedding.devices import find_chips, spread
    from waystation.embedding.encoder import Encoder, apart, attention_for
    from waystation.embedding.models import Config, shapes
    c = Config(vocab=50, dim=128, layers=2, heads=2, hidden=256, positions=128, eps=1e-6, pad=0, types=2)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    for kind in ('TPU v5 lite', 'TPU v3'):
        encoder = nnx.eval_shape(lambda: Encoder(c, {n: jnp.zeros(s, jnp.bfloat16) for n, s in shapes(c).items()}, attention_for(kind)))
        f, weights = apart(encoder, 'mean', True)
        print(spread(find_chips(), f, 16).trace(weights, ids, ids, ids).lower(lowering_platforms=('tpu',)).as_text().count('tpu_custom_call'))
"""


@pytest.mark.parametrize("n", [1, 8])
def test_the_flash_kernel_is_let_through_to_a_tpus_compiler(n):
    "A kernel that is not told where its rows lie is refused there, and no CPU would notice; for that refusal no TPU is needed."
    done = subprocess.run([sys.executable, "-c", LOWER], env=environment(n), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(line) for line in done.stdout.split()] == [1, 0]  # one in the scanned layer; a v3 has the plain form


def test_weights_shared_by_four_chips_give_the_same_vectors(on):
    one, said_one = on(1)
    shared, said = on(8, 4)
    np.testing.assert_allclose(shared, one, atol=1e-5)
    assert (said["data"], said["about"]["tensor"]) == (2, 4)
    assert said_one["up"] == [[2, 128, 512]] and said["up"] == [[2, 128, 128]] * 8  # a quarter each
    assert COLLECTIVE.search(said["hlo"][0])  # the search above would have found one


def test_what_cannot_be_shared_is_refused(kmer, monkeypatch):
    with pytest.raises(Refused, match=r"tensor=3, but 1 x cpu cannot be divided into groups of 3; use one of \[1\]"):
        open_model(kmer, tensor=3)
    done = subprocess.run([sys.executable, "-c", f"from waystation.embedding.backend import open_model; open_model({str(kmer)!r}, tensor=8)"],
                          env=environment(8), capture_output=True, text=True)
    assert "tensor=8, but the model has 4 heads, which 8 chips cannot share equally; use one of [1, 2, 4]" in done.stderr


def test_weights_that_do_not_fit_are_refused_with_the_way_out(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2000000000 bytes.")

    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(Refused, match=r"the weights \(2.0 GB\) do not fit into the memory of cpu with tensor=1; use a larger tensor"):
        devices.place(devices.find_chips(), dict(up=np.broadcast_to(np.float32(0), (500_000_000,))), {})


def test_an_absent_device_is_refused_before_anything_is_read(rows, monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("NOT CHECKED: this machine has an accelerator")
    monkeypatch.setattr("waystation.rows.Rows.scan", lambda *_: pytest.fail("the rows were read"))
    with pytest.raises(Refused, match=r"device='tpu', but JAX finds none .* Use device='cpu' or ''"):
        embed(**rows | dict(device="tpu", engine="auto"))
    with pytest.raises(Refused, match="device='cuda' is no kind of device"):
        embed(device="cuda", **rows)


# --- memory --------------------------------------------------------------------------------------------------------


class Small:
    "A chip that takes so many slots; it refuses when it is asked, or when somebody looks."

    def __init__(self, model, slots, when, error):
        self.model, self.slots, self.when, self.error, self.asked = model, slots, when, error, []

    def __call__(self, tokens, *rest):
        self.asked.append(tokens.shape)
        late = tokens.size > self.slots
        if late and self.when == "dispatch":
            raise self.error
        return Later(self, self.model.run(tokens, *rest), late)


class Later:
    def __init__(self, chip, y, late):
        self.chip, self.y, self.late = chip, y, late

    def __array__(self, *_, **__):
        if self.late:
            raise self.chip.error
        return np.asarray(self.y)


OOM = [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), MemoryError()]


@pytest.mark.parametrize("when", ["dispatch", "fetch"])
@pytest.mark.parametrize("error", OOM, ids=["xla", "host"])
def test_a_batch_that_does_not_fit_is_computed_in_smaller_ones(kmer, when, error):
    model = open_model(kmer)
    batch = pa.record_batch(dict(id=[str(i) for i in range(120)], text=[dna(300 + 7 * i) for i in range(120)]))
    shards = [prepare(model, k, 0, batch.slice(40 * k, 40), Cut(), {}) for k in range(3)]
    want = {s.number: y for s, y in flow(model, shards)}
    assert sum(len(s.pieces.laid.batches) for s in shards) > 6 and min(len(s.pieces.laid.batches[0][0]) for s in shards) >= 4
    for s in shards:
        s.pieces.results.clear()
    chip = Small(model, 512, when, error)
    small = replace(model, run=chip, limit=Limit())
    got = [(s.number, y) for s, y in flow(small, shards, depth=4)]
    assert [k for k, _ in got] == [0, 1, 2]
    for k, y in got:
        np.testing.assert_allclose(y, want[k], atol=1e-6)
    widths = {s.pieces.laid.batches[0][0].shape[1] for s in shards}
    assert all(e["then"] * 2 == e["rows"] for e in small.limit.events) and {e["width"] for e in small.limit.events} <= widths
    assert all(small.limit.rows(w, 99) * w <= 512 for w in widths)
    computed = sum(r for r, w in chip.asked if r * w <= 512)
    assert computed == sum(len(b[0]) for s in shards for b in s.pieces.laid.batches)  # each row once: none lost, none doubled
    again = Small(model, 512, when, error)
    for s in shards:
        s.pieces.results.clear()
    list(flow(replace(model, run=again, limit=small.limit), shards))
    assert all(r * w <= 512 for r, w in again.asked)  # what was learned is not tried again


def test_one_row_that_does_not_fit_is_an_error_with_the_way_out(kmer):
    model = open_model(kmer)
    shard = prepare(model, 0, 0, pa.record_batch(dict(id=["a"], text=[dna(300)])), Cut(), {})
    with pytest.raises(Refused, match=r"one row of \d+ tokens a chip does not fit .*RESOURCE_EXHAUSTED.* use a smaller max_tokens"):
        list(flow(replace(model, run=Small(model, 1, "fetch", OOM[0]), limit=Limit()), [shard]))


def test_other_errors_are_not_taken_for_memory(kmer):
    model = open_model(kmer)
    shard = prepare(model, 0, 0, pa.record_batch(dict(id=["a"], text=[dna(300)])), Cut(), {})
    for error in (jax.errors.JaxRuntimeError("INTERNAL: a bug"), ValueError("RESOURCE_EXHAUSTED"), Interrupted("stop")):
        assert not out_of_memory(error)
        with pytest.raises(type(error)):
            list(flow(replace(model, run=Small(model, 1, "fetch", error), limit=Limit()), [shard]))


def test_what_did_not_fit_is_in_the_report_and_in_the_next_run(kmer, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    open_model.cache_clear()
    real = open_model(kmer)
    chip = Small(real, 512, "fetch", OOM[0])
    monkeypatch.setattr("waystation.embedding.workers.open_model", lambda *_, **__: replace(real, run=chip))
    report = embed(run="a", **rows)
    assert report["rows"] == 40 and report["out_of_memory"] and report["out_of_memory"] == real.limit.events
    metas = [Store(rows["store"]).read(n).meta for n in Store(rows["store"]).list(report["shards_at"])]
    assert sum(len(m.get("out_of_memory", [])) for m in metas) == len(report["out_of_memory"])
    # the next process, on another machine: another cache folder, the same store
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache2"))
    chip.asked, limit = [], Limit(real.limit.multiple)
    kept = Kept(real.program.kept.name, real.limit.multiple)
    fresh = replace(real, run=chip, limit=kept.limit, program=real.program)
    monkeypatch.setattr(real.program, "kept", kept)
    monkeypatch.setattr("waystation.embedding.workers.open_model", lambda *_, **__: fresh)
    assert kept.limit == limit
    report = embed(run="b", **rows)
    assert report["rows"] == 40 and report["out_of_memory"] == [] and all(r * w <= 512 for r, w in chip.asked)


# --- programs ------------------------------------------------------------------------------------------------------

EMBED = """if True:
    import json, sys
    import jax
    asked = []
    jax.monitoring.register_event_listener(lambda event, **_: asked.append(event.rsplit('/', 1)[1]))
    from waystation.stations.embed import embed
    r = embed(run=sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps(dict(r, hits=asked.count('cache_hits'), misses=asked.count('cache_misses'))))
"""


def test_a_second_machine_compiles_nothing(tmp_path, rows):
    def machine(run):
        env = environment(2, WAYSTATION_CACHE=str(tmp_path / f"cache-{run}"))
        done = subprocess.run([sys.executable, "-c", EMBED, run, json.dumps(rows)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "machine features" not in done.stderr.lower() and "SIGILL" not in done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, store = machine("a"), Store(tmp_path / "store")
    assert first["hits"] == 0 and first["misses"] == len(first["compiled"]) > 0 and not any(s["found"] for s in first["compiled"])
    assert len(first["compiled"]) == len({s["width"] for s in first["compiled"]}) <= 6  # a width is compiled once
    (name,) = store.list("caches")
    assert re.fullmatch(r"caches/xla/cpu-x2-jax-[\d.]+/[0-9a-f]{12}/v1", name)
    second = machine("b")
    assert second["misses"] == 0 and second["hits"] == len(second["compiled"]) > 0 and all(s["found"] for s in second["compiled"])
    assert [s["rows"] for s in second["compiled"]] == [s["rows"] for s in first["compiled"]]
    assert store.list("caches") == [name]  # nothing new, nothing sealed


def test_another_compiler_processor_or_model_has_another_name(monkeypatch):
    chips, weights = devices.find_chips(), dict(up=np.zeros((2, 3), np.float32))
    names = [devices.kept_name(chips, weights), devices.kept_name(chips, dict(up=weights["up"].astype(np.float16)))]
    assert devices.kept_name(chips, dict(up=weights["up"] + 1)) == names[0]  # other values, the same program
    for module, name, value in ((devices, "_processor", lambda: "another"), (jax, "__version__", "9.9.9"), (devices.jaxlib, "__version__", "9.9.9")):
        with monkeypatch.context() as m:
            m.setattr(module, name, value)
            names.append(devices.kept_name(chips, weights))
    assert len(set(names)) == 5 and "jax-9.9.9" in names[3]


def test_a_cache_that_grows_replaces_the_older_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    store, kept = Store(tmp_path / "store"), Kept("caches/xla/test/1", 1)
    for k in range(3):
        kept.fetch(store)
        (kept.folder / f"jit_embed-{k}-cache").write_bytes(b"program %d" % k)
        kept.keep(store)
        kept.keep(store)
    assert store.list() == ["caches/xla/test/1/v3"]
    store.seal(None, "models/a/v1", dict(a=1))
    text = store_ls(store=store.url)["text"]
    assert "models/a/v1" in text and "v3" not in text and "besides, 1 of compiled programs: --prefix caches" in text
    assert store_ls("caches", store.url)["text"].endswith("caches/xla/test/1/v3")
    store.place.delete(["seals/models/a/v1.json"])
    assert sorted(store.read("caches/xla/test/1/v3").files) == [*(f"jit_embed-{k}-cache" for k in range(3)), "limit.json"]
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "other"))  # a machine that has one that the store lacks
    other = Kept("caches/xla/test/1", 1)
    (other.folder / "jit_embed-9-cache").write_bytes(b"another")
    monkeypatch.setattr(Kept, "most", 3)
    other.fetch(store)
    other.keep(store)
    assert store.list() == ["caches/xla/test/1/v4"] and len(store.read("caches/xla/test/1/v4").files) == 3 + 1


def test_programs_stay_here_when_the_settings_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    store, kept = Store(tmp_path / "store"), Kept("caches/xla/test/1", 1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "jit_embed-1-cache").write_bytes(b"whoever wrote this runs here")
    store.seal(tmp_path / "foreign", "caches/xla/test/1/v1", dict(slots={}))
    monkeypatch.setenv("WAYSTATION_CARRY_PROGRAMS", "no")
    kept.fetch(store)
    assert list(kept.folder.iterdir()) == []
    (kept.folder / "jit_embed-2-cache").write_bytes(b"ours")
    kept.keep(store)
    assert store.list() == ["caches/xla/test/1/v1"]


def test_a_store_that_fails_stops_nothing_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    kept, store = Kept("caches/xla/test/1", 1), Store(tmp_path / "store")
    (kept.folder / "jit_embed-1-cache").write_bytes(b"a program")
    with monkeypatch.context() as m:
        m.setattr(Store, "publish", lambda *_: (_ for _ in ()).throw(OSError("token=abcdefgh123 no route")))
        kept.fetch(store)
        for _ in range(3):
            kept.keep(store)
    said = [r.message for r in caplog.records if "could not be sealed" in r.message]
    assert len(said) == 1 and "abcdefgh123" not in said[0] and store.list() == []
    with monkeypatch.context() as m:
        m.setattr(Store, "list", lambda *_: (_ for _ in ()).throw(Interrupted("stop")))
        with pytest.raises(Interrupted):  # who is asked to stop, stops
            kept.fetch(store)


def test_a_torn_program_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    chips, rows = devices.find_chips(), [np.ones((8, 16), np.int32)] * 3

    def program():
        return devices.Program(chips, lambda w, t, p, s, n: (w["a"] * t)[:, :n, None], dict(a=np.float32(2)), {})

    first = program()
    want = np.asarray(first(*rows, 2))
    (file,) = first.kept.folder.glob("*-cache")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="compilation cache"):
        np.testing.assert_array_equal(np.asarray((again := program())(*rows, 2)), want)
    assert not again.shapes[0]["found"]


def test_a_cache_of_the_users_own_stays_in_use(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    try:
        with devices.jax_cache(tmp_path / "ours"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with devices.jax_cache(tmp_path):
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "cache"))
    assert jax.config.jax_compilation_cache_dir == before


def test_another_chip_is_no_other_run(tmp_path, kmer):
    params = dict(run="r", store=str(tmp_path), restart=False, take_over=False, step="embed", seed=0, device="", tensor=1)
    with begin("embed", params) as job:
        job.seal(None, "shards", 0, {})
    with begin("embed", params | dict(device="cpu", tensor=2)) as job:
        assert job.attempt == 1 and len(job.names("shards")) == 1
