"""kill -9 while embedding, at random moments, on a folder and on fake-gcs-server: every id exactly once, vectors equal to an undisturbed run.

Each round kills one `waystation embed` and starts the same command again; when a run is finished, it is compared and the next one begins.
`make prove` does fifty-two rounds, thirteen on each place by each engine.
"""

import os
import random
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WAYSTATION
from proving import PROVE, Clock, note, serving, size

from waystation.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(size(900, 7200))]


def rows(path, n=240):
    "Sequences of many lengths; some rows cannot be embedded."
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGTN"), int(k), p=[0.24] * 4 + [0.04])) for k in rng.integers(1, 1500, n)]
    for i in range(0, n, 40):
        texts[i] = ["", None, "  "][i // 40 % 3]
    pq.write_table(pa.table(dict(id=[f"ä{i}" for i in range(n)], text=texts)), path)
    return n


def found(url, run, into):
    "What the sealed shards of a run hold: (id, vector) pairs, and the ids that were set aside."
    store, pairs, aside = Store(url), [], 0
    for name in store.list(f"runs/{run}/embed/1/shards"):
        table = pq.read_table(store.fetch(name, into / run / name.replace("/", "-")) / "vectors.parquet", columns=["id", "vector"])
        pairs += zip(table["id"].to_pylist(), (v.values.to_numpy().tobytes() for v in table["vector"]), strict=True)
        aside += store.read(name).meta["quarantined"]
    return pairs, aside


@pytest.mark.parametrize("kind, engine", [("file", "jax"), ("gs", "torch"), *([("file", "torch"), ("gs", "jax")] if PROVE else [])])
def test_kill_at_a_random_moment_of_embed(kind, engine, server, tmp_path):
    rounds, rng, n = size(2, 13), random.Random(f"{kind}{engine}"), rows(tmp_path / "rows.parquet")
    with serving(kind, server, tmp_path) as (url, env), Clock() as clock:
        env |= {"WAYSTATION_STORE": url, "WAYSTATION_WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}

        def start(run):
            command = [WAYSTATION, "embed", "--run", run, "--source", tmp_path / "rows.parquet", "--model", "asset:kmer-random", "--engine", engine,
                       "--shard-rows", "4"]
            return subprocess.Popen(list(map(str, command)), env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

        def finish(p, code=0):
            _, said = p.communicate(timeout=600)
            assert p.returncode in (0, code), said

        finish(start("calm"))
        want, aside = found(url, "calm", tmp_path)
        assert len(want) == len(set(want)) == n - aside == n - 6
        store, kills, runs, at = Store(url), 0, 0, Counter()

        def shards(run):
            return len(store.list(f"runs/{run}/embed/1/shards"))

        while kills < rounds:
            run, runs = f"r{runs}", runs + 1
            while kills < rounds:
                there = shards(run)
                p, moment = start(run), rng.randint(there + 1, n // 4) if rng.random() < 0.75 else 0  # kill it at so many shards, or while it starts
                time.sleep(rng.uniform(0, 4) if moment <= there else 0)
                while shards(run) < moment and p.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.05))
                if p.poll() is None:
                    os.kill(p.pid, signal.SIGKILL)
                finish(p, -signal.SIGKILL)
                if p.returncode:
                    kills += 1
                    at["while it starts" if shards(run) == there else "after the last shard" if shards(run) == n // 4 else "between shards"] += 1
                some, _ = found(url, run, tmp_path)
                assert len(some) == len({i for i, _ in some}) and set(some) <= set(want)  # what is visible is whole, and nothing stands twice
                if shards(run) == n // 4:
                    break
            finish(start(run))
            pairs, _ = found(url, run, tmp_path)
            assert sorted(pairs) == sorted(want)
    note("kill -9 while embedding", f"{kind}, {engine}", kills=kills, runs=runs, doubled=0, missing=0, other_vectors=0, at=at, seconds=clock.seconds)
    print(dict(kills=kills, runs=runs, at=at))
