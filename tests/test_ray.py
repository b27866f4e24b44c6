"""Workers of a Ray cluster: the same vectors, a worker killed in mid-shard, the driver killed, two drivers at once.

The cluster is one of this machine. Its workers are processes like those of another machine, and find the run by its store alone.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WAYSTATION

from waystation.runtime import Refused
from waystation.stations.embed import embed
from waystation.store import Store

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="NOT CHECKED: ray is not installed; pip install 'waystation[ray]'")
HEAD = """
import ray, sys
ray.init(address='local', num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "The environment of a cluster of four CPUs, which is two workers; it ends with the tests."
    folder = tmp_path_factory.mktemp("ray")
    env = os.environ | dict(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", WAYSTATION_WANDB_MODE="disabled",
                            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    env.pop("RAY_ADDRESS", None)
    with open(folder / "said", "w+") as said, subprocess.Popen([sys.executable, "-c", HEAD], env=env, cwd=folder, stdin=subprocess.PIPE,
                                                               stdout=subprocess.PIPE, stderr=said, text=True) as head:
        address = head.stdout.readline().strip()
        said.seek(0)
        assert address, said.read()
        yield env | dict(RAY_ADDRESS=address)
        head.stdin.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "400 sequences; a shard of 20 takes a few tenths of a second."
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("rows") / "rows.parquet"
    texts = ["".join(rng.choice(list("ACGT"), int(n))) for n in rng.integers(6, 6000, 400)]
    pq.write_table(pa.table(dict(id=[str(i) for i in range(400)], sequence=texts)), path)
    return path


def command(source, *more):
    return [WAYSTATION, "embed", "--run", "r", "--source", str(source), "--text", "sequence", "--model", "asset:kmer-random", "--engine", "torch",
            "--shard-rows", "20", "--json", *more]


def start(source, env, store, *more):
    return subprocess.Popen(command(source, "--workers", "ray", *more), env=env | dict(WAYSTATION_STORE=str(store)), cwd=store.parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(p):
    "The report of a command that has ended well."
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err[-3000:]
    return json.loads(out), err


@pytest.fixture(scope="module")
def calm(source, cluster, tmp_path_factory):
    "id -> vector of an undisturbed run without workers."
    store = tmp_path_factory.mktemp("calm") / "store"
    env = {k: v for k, v in cluster.items() if k != "RAY_ADDRESS"} | dict(WAYSTATION_STORE=str(store))
    subprocess.run(command(source), env=env, cwd=store.parent, check=True, capture_output=True)
    return dict(vectors(store))


def vectors(store):
    "Every (id, vector) that is sealed, in no order."
    store, found = Store(store), []
    for name in store.list("runs/r/embed/1/shards"):
        table = pq.read_table(store.fetch(name, store_cache(store, name)) / "vectors.parquet")
        found += zip(table["id"].to_pylist(), (v.values.to_numpy().tobytes() for v in table["vector"]), strict=True)
    return found


def store_cache(store, name):
    import tempfile
    return tempfile.mkdtemp(prefix=name.replace("/", "-"))


def assert_whole(store, calm):
    got = vectors(store)
    assert len(got) == len(dict(got)) == 400
    assert dict(got) == calm, "vectors differ from those of a run without workers"


def workers(env):
    "Processes of this cluster that are at work."
    mine = env["RAY_AUTH_TOKEN"]
    found = []
    for p in psutil.process_iter():
        try:
            if p.name().startswith("ray::Worker") and p.environ().get("RAY_AUTH_TOKEN") == mine:
                found.append((p, (p.cmdline() or [""])[0]))
        except psutil.Error:
            continue
    return found


def wait_for(what, p, seconds=120):
    until = time.time() + seconds
    while not (got := what()):
        assert p.poll() is None, f"ended with {p.returncode}: {p.stderr.read()[-3000:]}"
        assert time.time() < until, "waited in vain"
        time.sleep(0.02)
    return got


def in_mid_shard(env):
    return [p for p, title in workers(env) if "shards" in title]


@needs_ray
@pytest.mark.slow
def test_a_worker_killed_in_mid_shard_costs_its_shard(source, cluster, calm, tmp_path):
    store = tmp_path / "store"
    p = start(source, cluster, store)
    wait_for(lambda: Store(store).list("runs/r/embed/1/shards"), p)
    both = wait_for(lambda: len(w := in_mid_shard(cluster)) == 2 and w, p)
    before = set(Store(store).list("runs/r/embed/1/shards"))
    assert len(before) < 18, "nearly done before the kill"
    os.kill(both[0].pid, signal.SIGKILL)
    report, err = end(p)
    assert "a worker died with shard" in err and "another one goes on" in err
    assert (report["rows"], report["shards"], report["shards_computed"]) == (400, 20, 20)
    assert report["engine_why"] == "asked for" and "with 1 x cpu" in report["chips"]
    assert_whole(store, calm)


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_leaves_no_orphans_and_the_same_command_goes_on(source, cluster, calm, tmp_path):
    store = tmp_path / "store"
    p = start(source, cluster, store)
    wait_for(lambda: len(Store(store).list("runs/r/embed/1/shards")) >= 2, p)
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    until = time.time() + 60
    while workers(cluster):
        assert time.time() < until, "workers outlive their driver"
        time.sleep(0.1)
    found = Store(store).list("runs/r/embed/1/shards")
    assert 2 <= len(found) < 20
    before = {n: Store(store).read(n).created for n in found}
    report, _ = end(start(source, cluster, store))
    assert (report["shards_found"], report["shards_computed"]) == (len(found), 20 - len(found))
    assert {n: Store(store).read(n).created for n in found} == before
    assert_whole(store, calm)


@needs_ray
@pytest.mark.slow
def test_of_two_drivers_one_computes(source, cluster, calm, tmp_path):
    "The second is refused with the holder's name; with --take-over it goes on, and the first and its workers are fenced off."
    store = tmp_path / "store"
    first = start(source, cluster, store)
    wait_for(lambda: Store(store).list("runs/r/embed/1/shards"), first)
    second = start(source, cluster, store)
    third = start(source, cluster, store, "--take-over")
    _, refused = second.communicate(timeout=120)
    assert second.returncode == 2 and "a run has one writer" in refused, refused
    _, fenced = first.communicate(timeout=120)
    assert first.returncode == 2 and "was taken over by" in fenced and "Traceback" not in fenced, fenced
    report, _ = end(third)
    assert report["rows"] == 400 and report["shards_found"] + report["shards_computed"] == 20
    assert_whole(store, calm)


@needs_ray
@pytest.mark.slow
def test_sigterm_ends_cleanly_and_a_run_goes_on_without_ray(source, cluster, calm, tmp_path):
    store = tmp_path / "store"
    p = start(source, cluster, store)
    wait_for(lambda: Store(store).list("runs/r/embed/1/shards"), p)
    p.terminate()
    _, err = p.communicate(timeout=60)
    assert p.returncode == 3, err
    done = subprocess.run(command(source), env=cluster | dict(WAYSTATION_STORE=str(store)), cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["shards_found"] >= 1
    assert_whole(store, calm)


@needs_ray
@pytest.mark.slow
def test_what_a_worker_refuses_the_driver_says(source, cluster, tmp_path):
    "No RayTaskError, and the mistyped first try binds nobody."
    p = start(source, cluster, tmp_path / "store", "--max-tokens", "600")
    _, err = p.communicate(timeout=120)
    assert p.returncode == 2 and "max_tokens=600" in err and "Traceback" not in err and "RayTaskError" not in err, err
    assert not Store(tmp_path / "store").list("runs")


def test_wrong_workers_and_an_absent_ray_are_refused(monkeypatch, tmp_path, source):
    with pytest.raises(Refused, match=r"workers='dask'; use 'local'"):
        embed(workers="dask")
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setattr("waystation.embedding.workers.find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install 'waystation\[ray\]'"):
        embed(run="r", store=str(tmp_path / "store"), source=str(source), text="sequence", model="asset:kmer-random", workers="ray")
    assert not Store(tmp_path / "store").list("runs")
