"""What workers="ray" costs on one machine: the same rows embedded in one process, and by two workers of a cluster that is there already.

    python benchmarks/workers.py            # two minutes; prints a line for each size

CPU is of the command and, with Ray, of the whole cluster while it ran: workers start for each run and load JAX, torch and the model. One thread each.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

HEAD = ("import ray, sys\nray.init(address='local', num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\nsys.stdin.read()\n")


def spent(root: psutil.Process, seen: dict) -> float:
    "CPU seconds of a process and all below it, those that ended since the last look included as far as they were seen."
    for p in [root, *root.children(recursive=True)]:
        try:
            t = p.cpu_times()
            seen[p.pid, p.create_time()] = t.user + t.system
        except psutil.NoSuchProcess:
            continue
    return sum(seen.values())


def main() -> None:
    env = os.environ | dict(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", WAYSTATION_WANDB_MODE="disabled", RAY_AUTH_MODE="token",
                            RAY_AUTH_TOKEN=secrets.token_hex(32))
    env.pop("RAY_ADDRESS", None)
    command, rng = Path(sys.executable).parent / "waystation", np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as tmp, subprocess.Popen([sys.executable, "-c", HEAD], env=env, cwd=tmp, stdin=subprocess.PIPE,
                                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as head:
        env["RAY_ADDRESS"] = head.stdout.readline().strip()
        for n in (64, 512, 2048):
            texts = ["".join(rng.choice(list("ACGT"), int(k))) for k in rng.integers(600, 3000, n)]
            pq.write_table(pa.table(dict(id=[str(i) for i in range(n)], sequence=texts)), f"{tmp}/{n}.parquet")
            for workers in ("local", "ray"):
                seen: dict = {}
                before, since = spent(psutil.Process(head.pid), {}), time.perf_counter()
                p = subprocess.Popen([command, "embed", "--run", f"{workers}{n}", "--store", f"{tmp}/store", "--source", f"{tmp}/{n}.parquet", "--text",
                                      "sequence", "--model", "asset:kmer-random", "--engine", "torch", "--shard-rows", "32", "--workers", workers],
                                     env=env, cwd=tmp, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                own, cluster = {}, seen
                while p.poll() is None:
                    spent(psutil.Process(p.pid), own)
                    spent(psutil.Process(head.pid), cluster)
                    time.sleep(0.1)
                assert p.returncode == 0, f"workers={workers}: exit {p.returncode}"
                wall, cpu = time.perf_counter() - since, sum(own.values()) + (sum(cluster.values()) - before) * (workers == "ray")
                print(f"{n} rows, {workers}: {wall:.1f} s wall, {cpu:.1f} s CPU", flush=True)
        head.stdin.close()


if __name__ == "__main__":
    main()
