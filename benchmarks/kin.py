"""Kin on 26,103 16S genes: names and strangers by their neighbours, near-duplicates against all pairs, and how the time grows.

    python benchmarks/kin.py            # two minutes of one core
    python benchmarks/kin.py --near     # near-duplicates alone, half a minute
    python benchmarks/kin.py --encoder  # every fifth gene, with the demo's encoder, whose weights are random

No encoder for genes that was trained is at hand, so a gene's vector is its 6-mer counts on the 256 directions in which those of 4,000 genes are largest,
not centred; beside it stand the counts themselves, 4,096 numbers, whose nearest neighbour is the baseline that every encoder has to stand beside.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from waystation.assets import resolve  # noqa: E402
from waystation.training.scoring import profile  # noqa: E402
from waystation.vectors import kin  # noqa: E402
from waystation.vectors.search import search  # noqa: E402
from waystation.vectors.table import build_table, open_table  # noqa: E402


def directions(counts: np.ndarray, dim: int = 256) -> np.ndarray:
    "[4096, dim] the largest directions of some rows, by subspace iteration."
    some = counts[np.linspace(0, len(counts) - 1, 4000).astype(int)]
    y = some @ np.random.default_rng(0).normal(size=(counts.shape[1], dim + 32)).astype(np.float32)
    for _ in range(4):
        y, _ = np.linalg.qr(some @ (some.T @ y))
    return np.linalg.svd(y.T @ some, full_matrices=False)[2][:dim].T


def table(to: Path, rows: pa.Table, vectors: np.ndarray, index: str = "none"):
    (to / "shard").mkdir(parents=True)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pq.write_table(rows.append_column("vector", vector), to / "shard/vectors.parquet")
    build_table([("shards/0", to / "shard")], to / "table.lance", index=index)
    return open_table(to / "table.lance")


def timed(f, *args):
    wall, cpu = time.perf_counter(), time.process_time()
    return f(*args), time.process_time() - cpu, time.perf_counter() - wall


def share(s: dict) -> str:
    return f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}] of {s['n']:,}"


def names(ds, what: str, levels: list[str]) -> None:
    print(f"\n{what}\n\n| label | k | named by vote | by the nearest | threshold | known called novel | strangers found | AUROC | CPU s |\n|{'---|' * 9}")
    for level in levels:
        c, cpu, _ = timed(kin.calibrate, ds, level)
        print(f"| {level} | {c['k']} | {share(c['named'])} | {share(c['nearest'])} | {c['threshold']:.4f} | {share(c['wrongly'])} "
              f"| {share(c['found'])} | {c['auroc']:.3f} | {cpu:.1f} |")


def every(v: np.ndarray, above: float) -> int:
    "Pairs by comparing all with all, of rows with the same vector only the first; the others are a pair with it."
    u = np.unique(kin.unit(v), axis=0)
    return len(v) - len(u) + sum(int(np.triu(u[i : i + 1000] @ u[i:].T >= above - 1e-6, 1).sum()) for i in range(0, len(u), 1000))


def encoder(rows: pa.Table, small: np.ndarray, counts: np.ndarray) -> None:
    "The three kinds of vectors on the same rows."
    from waystation.embedding.engine import embed_texts

    vectors, cpu, _ = timed(embed_texts, resolve("asset:kmer-random", "model").path, rows["sequence"].to_pylist(), "mean", 256)
    rows = rows.drop_columns("sequence")
    with tempfile.TemporaryDirectory() as tmp:
        for what, v in (
            (f"asset:kmer-random, {cpu:.0f} CPU s", np.asarray(vectors)), ("6-mer counts on 256 directions", small), ("6-mer counts", counts)):
            names(table(Path(tmp) / what[:12].replace(" ", "") / str(v.shape[1]), rows, v), f"{what}; {len(rows):,} rows", ["genus", "family", "phylum"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--near", action="store_true", help="near-duplicates alone")
    p.add_argument("--encoder", action="store_true", help="every fifth gene, with the demo's encoder of random weights as well")
    p.add_argument("--rows", type=int, default=0, help="only the first so many; 0: all")
    args = p.parse_args()
    rows = pq.read_table(resolve("asset:16s", "source").path).slice(0, args.rows or None)
    counts = np.stack([profile(s) for s in rows["sequence"].to_pylist()])
    small = counts @ directions(counts)
    if args.encoder:
        return encoder(rows.take(pa.array(np.arange(0, len(rows), 5))), small[::5], counts[::5])
    rows = rows.drop_columns("sequence")
    levels = ["species", "genus", "family", "order", "class", "phylum"]
    with tempfile.TemporaryDirectory() as tmp:
        if not args.near:
            names(table(Path(tmp) / "small", rows, small), "6-mer counts on 256 directions", levels)
            names(table(Path(tmp) / "counts", rows, counts), "6-mer counts, 4,096 numbers (the baseline)", levels)
        print(f"\n| rows | above | pairs found | of all | groups | CPU s | all with all, CPU s |\n|{'---|' * 7}")
        spread = np.random.default_rng(0).permutation(len(rows))
        for n in (len(rows) // 4, len(rows) // 2, len(rows)):
            take = np.sort(spread[:n])
            part = table(Path(tmp) / f"part{n}", rows.take(pa.array(take)), small[take])
            for above in (0.98, 0.99, 0.995):
                found, cpu, _ = timed(kin.near_pairs, part, above)
                true, brute, _ = timed(every, small[take], above)
                groups = len(set(kin.near_groups(part, above)["group"].to_pylist()))
                print(f"| {n:,} | {above} | {len(found):,} | {len(found) / true:.4f} of {true:,} | {groups:,} | {cpu:.1f} | {brute:.1f} |")
        part = table(Path(tmp) / "indexed", rows, small, "ivf_rq")
        _, cpu, _ = timed(lambda: [search(part, q, 20, columns=["id"]) for q in small[:100]])
        print(f"\none row asked of the index: {cpu * 10:.1f} CPU ms")


if __name__ == "__main__":
    main()
