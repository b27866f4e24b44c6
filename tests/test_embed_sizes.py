"""Memory and the CPU time of a shard do not grow with the number of rows: `embed` of a tiny encoder over two sizes, each in a process of its own.

`make prove` takes three: 10,000, 100,000 and 1,000,000 rows.
"""

import json
import os
import statistics
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from proving import PROVE, note

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if PROVE else 900)]
SIZES = (10_000, 100_000, 1_000_000) if PROVE else (10_000, 40_000)
CHILD = """if True:
    import json, re, sys, time
    from waystation.stations.embed import embed
    from waystation.store import Store
    stamps, seal = [], Store.seal
    def stamped(store, folder, name, *more, **named):
        if "/shards/" in name: stamps.append(time.process_time())  # of all threads
        return seal(store, folder, name, *more, **named)
    Store.seal = stamped
    report = embed(run="r", store=sys.argv[2], source=sys.argv[1], model="asset:kmer-random", engine=sys.argv[3], shard_rows=1000)
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MB; ru_maxrss would have the parent's in it
    print(json.dumps(dict(rows=report["rows"], peak=peak, seconds=[b - a for a, b in zip(stamps, stamps[1:])], torch="torch" in sys.modules)))
"""


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_memory_and_time_a_shard_stay_flat(engine, tmp_path):
    found, rng = {}, np.random.default_rng(0)
    for n in SIZES:
        source = tmp_path / f"{n}.parquet"
        with pq.ParquetWriter(source, pa.schema(dict(id=pa.string(), text=pa.string()))) as out:
            for a in range(0, n, 100_000):
                m = min(100_000, n - a)
                letters = rng.choice(np.frombuffer(b"ACGT", np.uint8), (m, 60)).tobytes().decode()
                texts = [letters[60 * i:60 * i + 12 + (a + i) % 48] for i in range(m)]
                out.write_table(pa.table(dict(id=[str(a + i) for i in range(m)], text=texts)), row_group_size=m)
        # One arena: how much the C library keeps for each thread depends on who freed what when, by 50 MB from run to run.
        env = os.environ | {"WAYSTATION_WANDB_MODE": "disabled", "WAYSTATION_CACHE": str(tmp_path / f"cache{n}"), "OMP_NUM_THREADS": "1",
                            "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run([sys.executable, "-c", CHILD, source, tmp_path / f"store{n}", engine], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found[n] = json.loads(done.stdout)
        assert found[n]["rows"] == n
        assert found[n]["torch"] == (engine == "torch"), "JAX needs no torch, which would be 100 MB more"
    peaks = [f["peak"] for f in found.values()]
    last = found[SIZES[-1]]["seconds"]  # of CPU time, which other programs hardly change
    assert len(last) == SIZES[-1] // 1000 - 1
    third = len(last) // 3
    growth = statistics.median(last[-third:]) / statistics.median(last[:third])
    note("memory and time of embed", engine, rows=list(SIZES), peak_mb=[round(p) for p in peaks], last_third_over_first=round(growth, 2))
    print(peaks, growth)
    assert peaks[-1] <= 1.15 * peaks[0], peaks  # the same run takes 5% more or less
    assert growth < 1.5
