"""Before a chip is rented: the arithmetic, the estimate, what is refused, and the TPU's own compiler where it is installed."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import psutil
import pytest

from waystation.assets import resolve
from waystation.chips import CHIPS, SLICES
from waystation.embedding import preflight as part
from waystation.embedding.models import PRESETS, operations, read_config
from waystation.embedding.tokens import read_tokenizer
from waystation.runtime import Refused
from waystation.stations.embed import embed
from waystation.store import Store


@pytest.fixture
def tpu_compiler():
    if find_spec("libtpu") is None:
        pytest.skip("NOT CHECKED: libtpu is not installed; pip install 'waystation[tpu]'")


@pytest.fixture
def no_tpu_compiler(monkeypatch):
    monkeypatch.setattr(part, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def nt():
    return PRESETS["nt-2.5b"]


@pytest.fixture(scope="module")
def tiny():
    return dataclasses.replace(PRESETS["minilm"], vocab=1000, dim=128, layers=2, heads=2, hidden=256)


def test_flops_of_a_known_model(nt):
    assert round(part.flops(nt, 1024, 1024) / 1e12, 2) == 5.50
    assert part.flops(nt, 2048, 1024) == 2 * part.flops(nt, 1024, 1024)


def test_one_text_a_row_costs_as_much_as_the_formula_says(nt):
    w = part.work(nt, [1000], 5000, 1000, "cpu", batch=8)
    assert (w.width, w.batch, w.tokens) == (1008, 8, 5_000_000)
    assert w.slots == 5000 * 1008 and w.flops == part.flops(nt, w.slots, 1008)  # 1024 rows a shard divide by 8
    assert w.padded == part.flops(nt, 5_000_000, 1000)


def test_work_grows_with_rows_and_not_with_the_sample(tiny):
    lengths = np.random.default_rng(1).integers(5, 200, 20_000)
    a, b, few = (part.work(tiny, lengths, n, 256, "tpu") for n in (10_000, 1_000_000, 300))
    assert b.slots == pytest.approx(100 * a.slots, rel=1e-6) and b.tokens == pytest.approx(lengths.mean() * 1e6, rel=0.03)
    assert few.rows == 300 and few.slots >= few.tokens
    assert part.work(tiny, [300] * 10, 10, 256, "tpu").tokens == 2560  # over the limit: cut, as embed does


def test_a_batch_is_a_multiple_of_the_devices(tiny):
    assert part.work(tiny, [100], 10_000, 512, "tpu", batch=13, devices=8).batch == 16


def test_it_counts_the_batches_that_the_engine_lays_out():
    import jax

    from waystation.assets import resolve
    from waystation.embedding.backend import open_model

    folder = resolve("asset:kmer-random", "model").path
    model, c = open_model(folder), part.read_config(folder)
    lengths = np.random.default_rng(2).integers(3, model.recipe.max_tokens, 500)
    laid = model.lay([np.full(n, 5, np.int32) for n in lengths], model.recipe.max_tokens)
    w = part.work(c, lengths, 500, model.recipe.max_tokens, jax.default_backend(), devices=len(jax.devices()))
    assert (w.slots, w.tokens, (w.batch, w.width)) == (laid.slots, lengths.sum(), laid.batches[0][0].shape)


def test_the_program_is_the_one_that_embed_runs():
    "Lowered by both to the same text, on the devices of this process."
    import jax

    from waystation.assets import resolve
    from waystation.embedding.devices import spread
    from waystation.embedding.backend import open_model

    folder = resolve("asset:minilm", "model").path
    run = open_model(folder).program
    ours, arguments = part.program(part.read_config(folder), 8, 64, jax.devices())
    theirs = spread(run.chips, run.f, 8).lower(run.weights, *arguments[1:])
    assert ours.lower(*arguments).as_text() == theirs.as_text()


def test_the_program_is_that_of_embed_when_chips_share_the_weights():
    "Eight devices in a process of their own: lowered to the same text as by the engine, and where each weight lies is part of it."
    code = """if True:
        import jax, waystation.embedding.preflight as part
        from waystation.assets import resolve
        from waystation.embedding.backend import open_model
        from waystation.embedding.devices import spread
        folder = resolve("asset:minilm", "model").path
        for tensor in (1, 2):
            run = open_model(folder, tensor=tensor).program
            ours, arguments = part.program(part.read_config(folder), 8, 64, jax.devices(), tensor)
            assert ours.lower(*arguments).as_text() == spread(run.chips, run.f, 8).lower(run.weights, *arguments[1:]).as_text(), tensor"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_slice_has_its_chip():
    for s in SLICES.values():
        assert s.chip in CHIPS if s.chip else s.name == "cpu"
        assert bool(s.topology) == s.name.startswith("v")
    assert sum(s.memory_gb * s.devices for s in [SLICES["v3-8"], SLICES["v4-8"]]) == 256


def test_the_estimate_grows_where_it_should(tiny):
    large = PRESETS["bge-large"]
    small, more, wide = (part.estimate(large, *shape, 2) for shape in ((8, 128), (16, 128), (4, 2048)))
    assert small["weights"] == more["weights"] and more["widest_layer"] == 2 * small["widest_layer"]
    assert "attention_scores" in wide and "widest_layer" not in wide
    n = part.estimated(large, SLICES["t4"], 128, 8)["largest_batch"]
    assert part.estimated(large, SLICES["t4"], 128, n)["fits"] and not part.estimated(large, SLICES["t4"], 128, n + 1)["fits"]


def test_exit_codes_and_json(cli):
    assert "chip='v7' is not known" in cli("preflight", "--rows", "10", "--chip", "v7", code=2)
    asked = ("preflight", "--model", "bge-large", "--chip", "t4", "--rows", "1000000", "--lengths", "300", "--json")
    good, bad = cli(*asked), cli(*asked, "--batch", "4096", code=4)
    assert (good["fits"], bad["fits"], good["cost"]) == (True, False, None)
    assert "estimate" in good["how"] and "assumed" in good["text"] and "set `t4 = …`" in good["text"]
    assert good["hours"] == pytest.approx(good["flops"] / (65e12 * 0.4) / 3600)
    assert good["sessions"] == 1 and good["hours_if_padded"] > good["hours"]


def test_the_users_own_price(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[prices]\nt4 = 0.35\n")
    monkeypatch.chdir(tmp_path)
    found = part.preflight(model="minilm", chip="t4", rows=10**9, lengths="100", session_hours=2.0)
    assert found["cost"] == pytest.approx(0.35 * found["hours"])
    assert found["sessions"] == -(-found["hours"] // 2) > 1


def test_rows_of_a_source_by_the_models_own_tokenizer(tmp_path):
    found = part.preflight(model="asset:minilm", chip="l4", rows=698, source="asset:banking")
    assert found["fits"] and 100 < found["tokens"] / 698 <= 256
    assert part.preflight(model="asset:minilm", chip="l4", source="asset:banking")["rows"] == 698
    url = str(tmp_path / "store")
    Store(url).seal(resolve("asset:minilm", "model").path, "models/mine/v1")
    asked = dict(chip="l4", rows=698, source="asset:banking", store=url)
    assert part.preflight(model="store:models/mine/v1", **asked)["tokens"] == found["tokens"]
    cut = part.preflight(model="asset:minilm", chip="l4", source="asset:banking", chunk_tokens=200, chunk_overlap=40)
    assert abs(cut["rows"] - 1265) < 15 and cut["tokens"] > found["tokens"]  # 1,265 are made; a cut waits for the end of a word


def test_an_earlier_run_says_what_a_chip_reaches(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setattr(part, "cpu_tflops", lambda: 10.0)
    monkeypatch.setattr(part, "ENOUGH", 0)
    url = str(tmp_path / "store")
    asked = dict(model="asset:kmer-random", rows=1000, chip="cpu", store=url)
    found = part.preflight(**asked)
    assert found["utilisation"] == part.ASSUMED and "assumed, not measured: the store has no run of embed on cpu" in found["text"]
    source = tmp_path / "rows.fasta"
    source.write_text("".join(f">s{i}\n{'ACGT' * (10 + i)}\n" for i in range(40)))
    report = embed(run="r", store=url, source=str(source), text="sequence", model="asset:kmer-random", engine="torch")
    n = np.array([len(x) + 1 for x, _, _ in read_tokenizer(resolve("asset:kmer-random", "model").path).encode(["ACGT" * (10 + i) for i in range(40)])])
    linear, attention = operations(read_config(resolve("asset:kmer-random", "model").path))
    store = Store(url)
    shard = store.read(store.list(report["shards_at"])[0]).meta
    assert shard["tflop"] == pytest.approx((n * (linear + n * attention)).sum() / 1e12)
    found = part.preflight(**asked)
    assert found["utilisation"] == pytest.approx(report["tflops"] / 10) and "measured by runs/r/embed/1, all its work included" in found["text"]
    assert part.preflight(**asked | dict(utilisation=0.2))["utilisation"] == 0.2
    assert part.preflight(**asked | dict(chip="t4"))["utilisation_by"].startswith("assumed, not measured")
    store.seal(None, "runs/s/embed/1/report", report | dict(tflops=11.0))  # another machine's
    assert part.preflight(**asked)["utilisation"] == found["utilisation"]
    store.seal(None, "runs/t/embed/1/report", report | dict(tflops=52.0, chips="1 x Tesla T4"))
    assert part.preflight(**asked | dict(chip="t4"))["utilisation"] == pytest.approx(52 / CHIPS["T4"].peak_tflops)
    monkeypatch.setattr(part, "ENOUGH", 60)
    assert part.preflight(**asked)["utilisation"] == part.ASSUMED  # all of them were over in seconds
    assert part.preflight(**asked | dict(store=str(tmp_path / "none")))["utilisation"] == part.ASSUMED and not (tmp_path / "none").exists()
    found = part.preflight(**asked | dict(store=str(source)))  # a file
    assert found["utilisation"] == part.ASSUMED and "earlier runs could not be read" in found["text"]


def test_a_store_that_does_not_answer_costs_no_more_than_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(part, "PATIENCE", 0.05)
    monkeypatch.setattr(part, "newest", lambda *_: time.sleep(2))
    assert part.reached(str(tmp_path), SLICES["t4"], 65.0) == (0.4, "assumed, since earlier runs could not be read (no answer within 0.05 s)")


def test_the_largest_batch_is_the_largest_or_said_to_be_more(tiny, monkeypatch):
    "A compiler that is not there: 32 GiB hold 480 rows, and then all that anybody asks for."
    def pretend(most):
        @contextlib.contextmanager
        def compiler(*_):
            yield lambda rows: dict(rows=rows, seconds=0, peak_gib=31.0 if rows <= most else 33.0, parts={}, needs_gib=None, limit_gib=None)
        monkeypatch.setattr(part, "find_spec", lambda name: True)
        monkeypatch.setattr(part, "compiler", compiler)
        found = part.compiled(tiny, SLICES["v6e-1"], 1024, 32, search=True, say=str)
        return found["largest_batch"], found["capped"]
    assert (pretend(480), pretend(9999)) == ((480, False), (512, True))


@pytest.mark.parametrize("asked, says", [
    (dict(chip="v7"), "chip='v7' is not known; there are v5e-1, v5e-8"),
    (dict(model="asset:nothing"), "asset:nothing is not a packaged asset"),
    (dict(model="bert-huge"), "preflight also knows the sizes of minilm"),
    (dict(rows=0), "rows=0; say how many"),
    (dict(batch=-1), "batch=-1; use 0"),
    (dict(utilisation=40.0), "use more than 0 and at most 1"),
    (dict(session_hours=0.0), "use the hours that a session lasts"),
    (dict(lengths="nothing.txt"), "lengths file nothing.txt cannot be read"),
    (dict(lengths="0"), "every row has at least 1 token"),
    (dict(lengths="9", source="x.csv"), "pass one of them"),
    (dict(source="x.csv"), "needs the model's tokenizer"),
    (dict(source="x.csv", chunk_tokens=20), "chunk_overlap=40 must be at least 0 and less than chunk_tokens=20"),
    (dict(max_tokens=1024), "table of 512 positions"),
    (dict(model="nt-2.5b", max_tokens=1002), "table of 1002 positions, the first at 2; use at most 1000"),
    (dict(station="export"), "station='export' has no preflight"),
    (dict(tensor=2), "tensor=2 must divide the 1 devices of t4"),
    (dict(chip="v5e-8", tensor=8), "the model's 12 heads and its 1536 feed-forward numbers; use one of [1, 2, 4]"),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_input_is_refused_by_name(asked, says):
    with pytest.raises(Refused) as e:
        part.preflight(**(dict(model="minilm", chip="t4", rows=10) | asked))
    assert says in str(e.value)


def test_without_the_compiler_it_says_what_it_cannot_answer(no_tpu_compiler):
    found = part.preflight(model="minilm", chip="v5e-1", rows=1000, lengths="100")
    assert (found["fits"], found["peak_gib"], found["exit"]) == (None, None, 4)
    assert "NOT CHECKED whether it fits" in found["text"] and "pip install 'waystation[tpu]'" in found["text"]
    assert found["hours"] > 0


def test_the_child_has_its_own_environment(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_NAME", "XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "mine")
    before = dict(os.environ)
    child = part._environment()
    assert "mine" not in child.values() and child["JAX_PLATFORMS"] == "cpu" and "TPU_NAME" not in child
    assert dict(os.environ) == before


def test_a_compiler_that_dies_is_a_sentence(tiny):
    "Killed while it starts; no compiler is needed for that."
    before = set(psutil.Process().children())
    with pytest.raises(Refused, match="the TPU compiler for v5e-1 ended with code -9 on a batch of 8 rows"):
        with part.compiler(tiny, SLICES["v5e-1"], 128) as ask:
            (child,) = set(psutil.Process().children()) - before
            child.send_signal(signal.SIGKILL)
            ask(8)
    assert set(psutil.Process().children()) == before


def test_jax_of_this_process_knows_nothing_of_a_tpu(tpu_compiler, tiny):
    import jax

    found = part.compiled(tiny, SLICES["v5e-1"], 128, 8, search=False, say=print)
    assert found["fits"] and {d.platform for d in jax.devices()} == {"cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in SLICES.items() if s.topology])
def test_every_tpu_is_compiled_for(tpu_compiler, tiny, name):
    found = part.compiled(tiny, SLICES[name], 128, 16, search=False, say=print)
    assert found["fits"] is True and len(found["compiles"]) == 1
    assert 0 < found["peak_gib"] < 0.2 and found["parts"]["weights_and_input"] > 0


@pytest.mark.slow
def test_shared_weights_are_a_part_on_each_device(tpu_compiler):
    alone, shared = (part.compiled(PRESETS["bge-large"], SLICES["v5e-8"], 128, 16, search=False, tensor=t, say=print)["parts"] for t in (1, 4))
    assert 0.25 < shared["weights_and_input"] / alone["weights_and_input"] < 0.4  # the table of words lies on each


@pytest.mark.slow
def test_the_largest_batch_is_found(tpu_compiler):
    found = part.compiled(PRESETS["bge-large"], SLICES["v5e-1"], 512, 1024, search=True, say=print)
    peaks = {a["rows"]: a["peak_gib"] for a in found["compiles"]}
    best = found["largest_batch"]
    assert peaks[best] <= 15.75 and all(p is None or p > 15.75 for rows, p in peaks.items() if rows > best)
    assert len(peaks) <= 7, peaks


@pytest.mark.slow
def test_too_large_is_refused_by_the_compiler_and_the_command_says_so(tpu_compiler, cli):
    found = cli("preflight", "--model", "bge-large", "--chip", "v5e-1", "--rows", "100000", "--batch", "4096", "--json", code=4)
    assert (found["fits"], found["peak_gib"], found["limit_gib"]) == (False, None, 15.75) and found["needs_gib"] > 15.75
    assert "does not fit" in found["text"] and len(found["compiles"]) == 1
