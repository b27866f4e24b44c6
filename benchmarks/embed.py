"""What an encoder costs on a CPU, side by side with the usual ways to call the same weights.

    python benchmarks/embed.py                   # every set, 20 minutes; writes embed.json beside this file and the guide's table
    python benchmarks/embed.py --scale 0.2 --rounds 3   # a quick look at fewer texts; written as well, with their number
    python benchmarks/embed.py --backends PYTHON # also sentence-transformers' ONNX and OpenVINO backends, by an interpreter that has them:
                                                 #   python -m venv V; V/bin/pip install "sentence-transformers[onnx,openvino]"; --backends V/bin/python
    python benchmarks/embed.py --table           # put the table of embed.json into the guide; runs nothing

Every way begins with texts and ends with float32 vectors, on one thread, with the same weights; each is held against sentence-transformers
(transformers for the k-mer model, whose tokenizer that library does not have). Rounds are interleaved: each runs every way once, in another
order, after a look at the machine's own matrix multiply. `cpu` is process CPU time, which other programs hardly touch; shares and ratios
are taken within a round, then the median over rounds. Padding to the limit is measured on every fifth text, and its time is multiplied by five.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import one_core, show, spread, taken

if __name__ == "__main__":
    one_core(JAX_PLATFORMS="cpu")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RESULT, GUIDE = HERE / "embed.json", HERE.parent / "lit" / "guides" / "padding.md"
BEGIN = "<!-- from benchmarks/embed.json -->\n"
ST, PAD, SORTED, FLAT, DNN, JAX = "sentence-transformers", "padded to the limit", "sorted torch loop", "waystation torch", "waystation onednn", "waystation jax"
FIFTH = 5
ONNX, OPENVINO = "sentence-transformers, ONNX", "sentence-transformers, OpenVINO"


def worker(backend: str, folder: str) -> None:
    "In an interpreter of its own: a line of texts in, a line of (CPU seconds, wall seconds, vectors or nothing) out."
    out, sys.stdout = sys.stdout, sys.stderr
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(folder, backend=backend, device="cpu")
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        c, w = time.process_time(), time.perf_counter()
        y = model.encode(task["texts"], normalize_embeddings=True, show_progress_bar=False)
        print(json.dumps([time.process_time() - c, time.perf_counter() - w, y.tolist() if task["vectors"] else None]), file=out, flush=True)


class Backend:
    "A way that runs in another interpreter."

    def __init__(self, python: str, backend: str, folder: Path):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        said = tempfile.TemporaryFile("w+")  # not a pipe: nobody reads it while the worker works
        self.p = subprocess.Popen([python, __file__, "--worker", backend, str(folder)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=said, text=True)
        if not self.p.stdout.readline():
            said.seek(0)
            raise RuntimeError(said.read()[-400:])

    def __call__(self, texts, vectors=False):
        print(json.dumps(dict(texts=texts, vectors=vectors)), file=self.p.stdin, flush=True)
        return json.loads(self.p.stdout.readline())


def collections(scale: float) -> dict:
    "Name -> (model folder, texts, tokens at which the model cuts)."
    import pyarrow as pa
    import pyarrow.parquet as pq

    from waystation.assets import resolve
    from waystation.embedding.backend import open_model
    from waystation.embedding.engine import Cut, prepare
    minilm, kmer = resolve("asset:minilm", "model").path, resolve("asset:kmer-random", "model").path
    docs = pq.read_table(resolve("asset:banking", "source").path)["text"].to_pylist()
    # Documents, their paragraphs and their lines, as somebody would search them: most are short, a few long.
    pool = docs + [p.strip() for d in docs for p in d.split("\n\n") if p.strip()] + [t.strip() for d in docs for t in d.split("\n") if t.strip()]
    shard = prepare(open_model(minilm), 0, 0, pa.record_batch(dict(id=[str(i) for i in range(len(docs))], text=docs)), Cut(200, 40), {})
    long = [t for t, n in zip(shard.texts["text"].to_pylist(), shard.texts["n_tokens"].to_pylist(), strict=True) if n >= 190]
    sequences = pq.read_table(resolve("asset:16s", "source").path)["sequence"].to_pylist()
    rng = random.Random(0)
    return {"skewed": (minilm, rng.sample(pool, int(1000 * scale))), "chunks": (minilm, rng.sample(long, int(100 * scale))),
            "16S": (kmer, sequences[:int(500 * scale)])}


def ours(engine: str, folder: Path):
    "Text to vectors as the station does it, without files."
    import pyarrow as pa

    from waystation.embedding.backend import open_model
    from waystation.embedding.engine import Cut, flow, prepare
    model = open_model(folder, engine=engine)

    def run(texts):
        (_, y), = flow(model, [prepare(model, 0, 0, pa.record_batch(dict(id=[str(i) for i in range(len(texts))], text=texts)), Cut(), {})])
        return y
    return run


def loop(folder: Path, budget: int = 0):
    "transformers' model in torch: in order and padded to the limit, 32 a batch; or sorted, with about `budget` slots a batch."
    import numpy as np
    import torch
    from transformers import BertModel

    from waystation.embedding.models import read_recipe
    from waystation.embedding.tokens import read_tokenizer
    model, recipe, tok = BertModel.from_pretrained(folder, add_pooling_layer=False).eval(), read_recipe(folder), read_tokenizer(folder)
    room = recipe.max_tokens - tok.extra

    def run(texts):
        ids = [tok.wrap(x[:room]) for x, _, _ in tok.encode(texts)]
        order, out, a = sorted(range(len(ids)), key=lambda i: len(ids[i])) if budget else range(len(ids)), [None] * len(ids), 0
        while a < len(ids):
            b = a + 1
            while b < len(ids) and ((b + 1 - a) * len(ids[order[b]]) <= budget if budget else b < a + 32):
                b += 1
            part = [ids[i] for i in order[a:b]]
            x = np.zeros((b - a, max(map(len, part)) if budget else recipe.max_tokens), np.int64)
            mask = np.zeros_like(x)
            for row, p in enumerate(part):
                x[row, :len(p)], mask[row, :len(p)] = p, 1
            with torch.inference_mode():
                m = torch.from_numpy(mask)
                y = model(input_ids=torch.from_numpy(x), attention_mask=m).last_hidden_state * m[..., None]
                y = torch.nn.functional.normalize(y.sum(1) / m.sum(1, keepdim=True), dim=1).numpy()
            for i, v in zip(order[a:b], y, strict=True):
                out[i] = v
            a = b
        return np.stack(out)
    return run


def peak() -> float:
    "GFLOP a CPU second of a matrix multiply of the model's kind, and of a large square one: the better."
    import torch
    best = 0.0
    for shape in ((1024, 384, 1536), (2048, 2048, 2048)):
        a, b = torch.ones(shape[0], shape[1]), torch.ones(shape[1], shape[2])
        torch.mm(a, b)
        n = 12 if shape[0] == 1024 else 1
        since = time.process_time()
        for _ in range(n):
            torch.mm(a, b)
        best = max(best, n * 2 * shape[0] * shape[1] * shape[2] / (time.process_time() - since) / 1e9)
    return best


def work(folder: Path, texts: list[str]) -> dict:
    "What there is to compute: tokens, and GFLOP without padding."
    import numpy as np

    from waystation.embedding.models import read_config, read_recipe
    from waystation.embedding.tokens import read_tokenizer
    c, recipe, tok = read_config(folder), read_recipe(folder), read_tokenizer(folder)
    n = np.array([min(len(x) + tok.extra, recipe.max_tokens) for x, _, _ in tok.encode(texts)], dtype=np.float64)
    gflop = c.layers * (n * (8 * c.dim**2 + 4 * c.dim * c.hidden) + 4 * c.dim * n**2).sum() / 1e9
    return dict(texts=len(texts), tokens=int(n.sum()), median=int(np.median(n)), longest=int(n.max()), limit=recipe.max_tokens, gflop=round(gflop, 1),
                padding=round(recipe.max_tokens * len(n) / n.sum(), 2), histogram=np.histogram(n, 32, (0, recipe.max_tokens))[0].tolist())


def ways(folder: Path, backends: str) -> tuple[dict, dict]:
    "Name -> texts to (CPU seconds, wall seconds, vectors); and the absent ones with the reason."
    def timed(run, every=1):
        def call(texts, vectors=False):
            c, w = time.process_time(), time.perf_counter()
            y = run(texts[::every])
            k = len(texts) / len(texts[::every])
            return (time.process_time() - c) * k, (time.perf_counter() - w) * k, y if vectors else None
        return call
    kmer = not (folder / "modules.json").exists()
    # Padded to the limit all texts take equally long, and very long: a fifth of them stands for all.
    found, absent = {PAD: timed(loop(folder), 1 if kmer else FIFTH), SORTED: timed(loop(folder, 1024)), FLAT: timed(ours("torch", folder)),
                     DNN: timed(ours("onednn", folder)), JAX: timed(ours("jax", folder))}, {}
    if kmer:
        return found, {name: "it has no k-mer tokenizer" for name in (ST, ONNX, OPENVINO)}
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(folder), device="cpu")
    found = {ST: timed(lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)), **found}
    for name, backend in ((ONNX, "onnx"), (OPENVINO, "openvino")):
        try:
            if not backends:
                raise RuntimeError("not asked for (--backends PYTHON)")
            found[name] = Backend(backends, backend, folder)
        except (RuntimeError, OSError) as e:
            absent[name] = str(e).strip().splitlines()[-1]
    return found, absent


def station(folder: Path, texts: list[str], tmp: str, run: str) -> float:
    "CPU seconds of the whole station, from a Parquet file to sealed shards."
    import pyarrow as pa
    import pyarrow.parquet as pq

    from waystation.stations.embed import embed
    pq.write_table(pa.table(dict(id=[str(i) for i in range(len(texts))], text=texts)), f"{tmp}/{run}.parquet")
    since = time.process_time()
    embed(run=run, store=f"{tmp}/store", source=f"{tmp}/{run}.parquet", model=str(folder), engine="torch")
    return time.process_time() - since


def overhead(folder: Path, texts: list[str], rounds: int) -> tuple[dict, list]:
    "The station over the bare forward pass of the same batches; and (texts, CPU seconds for 1,000 tokens) of a quarter, a half and all of them."
    import pyarrow as pa

    from waystation.embedding.backend import open_model
    from waystation.embedding.engine import Cut, prepare
    model, found = open_model(folder, engine="torch"), []
    laid = prepare(model, 0, 0, pa.record_batch(dict(id=[str(i) for i in range(len(texts))], text=texts)), Cut(), {}).pieces.laid
    sizes = {len(texts) // k: [] for k in (4, 2, 1)}
    thousands = {n: work(folder, texts[:n])["tokens"] / 1000 for n in sizes}
    with tempfile.TemporaryDirectory() as tmp:
        for r in range(rounds):
            since = time.process_time()
            for b in laid.batches:
                model.compute(b)
            bare = time.process_time() - since
            for n, took in sizes.items():
                took.append(station(folder, texts[:n], tmp, f"r{r}-{n}"))
            found.append(took[-1] / bare - 1)
    return spread(found), [[n, spread(t / thousands[n] for t in took)] for n, took in sizes.items()]


def measure(name: str, folder: Path, texts: list[str], rounds: int, backends: str) -> dict:
    import numpy as np
    found, absent = ways(folder, backends)
    oracle = ST if ST in found else PAD
    vectors = {way: np.array(run(texts, vectors=True)[2]) for way, run in found.items()}  # also warms up and compiles
    unit = {way: y / np.linalg.norm(y, axis=1, keepdims=True) for way, y in vectors.items()}  # the k-mer model does not end in a norm
    cosine = {way: float((y.astype(np.float64) * unit[oracle][::FIFTH if len(y) < len(texts) else 1]).sum(1).min()) for way, y in unit.items()}
    about, cpu, wall, peaks = work(folder, texts), {w: [] for w in found}, {w: [] for w in found}, []
    for r in range(rounds):
        peaks.append(peak())
        for way in random.Random(r).sample(list(found), len(found)):
            c, w, _ = found[way](texts)
            cpu[way].append(c)
            wall[way].append(w)
        print(name, r, {w: round(v[-1], 2) for w, v in cpu.items()}, f"peak {peaks[-1]:.0f}", file=sys.stderr, flush=True)
    rows = {way: dict(cpu=spread(cpu[way]), wall=spread(wall[way]), cosine=round(cosine[way], 7),
                      speed=spread(a / b for a, b in zip(cpu[oracle], cpu[way], strict=True)),
                      share=spread(about["gflop"] / c / p for c, p in zip(cpu[way], peaks, strict=True))) for way in found}
    saved, (more, growth) = spread(a / b for a, b in zip(cpu[PAD], cpu[FLAT], strict=True)), overhead(folder, texts, rounds)
    return dict(about=about, peak=spread(peaks), oracle=oracle, ways=rows, absent=absent, saved=saved,
                saved_of_padding=round(saved["median"] / about["padding"], 2), overhead=more, growth=growth)


def tables(result: dict) -> str:
    said = {"skewed": "documents, paragraphs and lines", "chunks": "chunks of about 200 tokens", "16S": "16S genes, k-mer model"}
    out = []
    for name, s in result["sets"].items():
        a = s["about"]
        out += [f"**{said[name].capitalize() if name != '16S' else said[name]}**: {a['texts']} texts, {a['tokens']:,} tokens, median {a['median']}, "
                f"longest {a['longest']} of at most {a['limit']}; {s['peak']['n']} rounds.", "",
                f"| | CPU s | wall s | speed beside {s['oracle']} | share of peak | 1 - cosine |", "|---|---|---|---|---|---|"]
        for way, w in s["ways"].items():
            bold = "**" if way in (FLAT, DNN) else ""
            out.append(f"| {bold}{way}{bold} | {w['cpu']['median']:.2f} | {w['wall']['median']:.2f} | {bold}{w['speed']['median']:.2f}{bold} "
                       f"({w['speed']['min']:.2f} to {w['speed']['max']:.2f}) | {w['share']['median']:.0%} | {max(1 - w['cosine'], 1e-7):.0e} |")
        out += [f"| {way} | - | - | - | - | not measured: {why} |" for way, why in s["absent"].items()]
        out += ["", f"Padding to the limit computes {a['padding']:.2f} times the tokens; it takes {s['saved']['median']:.2f} times as long as the flat engine "
                f"({s['saved_of_padding']:.0%} of that). Reading, tokenising and sealing add {s['overhead']['median']:.1%} "
                f"({s['overhead']['min']:.1%} to {s['overhead']['max']:.1%}) to the bare forward pass, and "
                + "the whole station takes " + ", ".join(f"{g['median']*1000:.0f}" for _, g in s["growth"]) + " CPU ms for 1,000 tokens of "
                + ", ".join(f"{n:,}" for n, _ in s["growth"]) + " texts. "
                f"The matrix multiply of this machine reached {s['peak']['median']:.0f} GFLOP a CPU second ({s['peak']['min']:.0f} to {s['peak']['max']:.0f}).", ""]
    v = result["versions"]
    return "\n".join([*out, f"Taken {result['date']} on one thread of {result['machine']}; "
                      + ", ".join(f"{k} {x}" for k, x in v.items()) + "."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the texts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set", choices=["skewed", "chunks", "16S"], action="append", help="only this one; the others' figures stay")
    parser.add_argument("--backends", default="", help="an interpreter with sentence-transformers[onnx,openvino]")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    if args.table:
        return show(GUIDE, BEGIN, tables(json.loads(RESULT.read_text())))
    import torch
    torch.set_num_threads(1)
    result = {"sets": {}}
    for name, (folder, texts) in collections(args.scale).items():
        if not args.set or name in args.set:
            result["sets"][name] = measure(name, folder, texts, args.rounds, args.backends)
    if args.set and RESULT.exists():
        result["sets"] = json.loads(RESULT.read_text())["sets"] | result["sets"]
    result |= taken("torch", "jax", "sentence-transformers", "transformers")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    show(GUIDE, BEGIN, tables(result))


if __name__ == "__main__":
    main()
