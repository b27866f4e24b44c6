"""What zstd would save in a store: ratio and speed on the kinds of files that seals hold.

    python benchmarks/compression.py [FILE ...]      # needs zstandard, torch, transformers, safetensors; further files are measured too

One thread, seconds of processor time; each file compressed and decompressed in pieces of 8 MB, as the store reads it.
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from safetensors.torch import save_file

from waystation.assets import resolve

CHUNK = 8 << 20


def lora(folder, steps=300, dim=512, rank=16, layers=6):
    "A LoRA adapter and its Adam state after `steps` real optimizer steps on a task with noise; B begins at zero, as in PEFT."
    torch.manual_seed(0)
    state, opt = {}, []
    for n in range(layers):
        base, goal = torch.randn(dim, dim) / dim**0.5, torch.randn(dim, dim) / dim**0.5
        a, b = torch.nn.Parameter(torch.empty(rank, dim)), torch.nn.Parameter(torch.zeros(dim, rank))
        torch.nn.init.kaiming_uniform_(a, a=5**0.5)
        adam = torch.optim.AdamW([a, b], lr=1e-3)
        for _ in range(steps):
            x = torch.randn(32, dim)
            loss = ((x @ (base + b @ a).T - x @ goal.T + 0.1 * torch.randn(32, dim)) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        state |= {f"layers.{n}.lora_A.weight": a.detach(), f"layers.{n}.lora_B.weight": b.detach()}
        opt.append(adam.state_dict())
    save_file(state, folder / "adapter, float32")
    save_file({k: v.bfloat16() for k, v in state.items()}, folder / "adapter, bfloat16")
    save_file({k: v.half() for k, v in state.items()}, folder / "adapter, float16")
    torch.save(opt, folder / "optimizer.pt, Adam")


def vectors(folder, texts):
    "MiniLM's vectors of real texts as a shard holds them, float32, and the same rounded to float16."
    from transformers import AutoModel, AutoTokenizer

    path = resolve("asset:minilm", "model").path
    tok, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    rows = []
    with torch.no_grad():
        for at in range(0, len(texts), 64):
            batch = tok(texts[at : at + 64], padding=True, truncation=True, max_length=64, return_tensors="pt")
            mask = batch["attention_mask"][..., None].float()
            pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(pooled).numpy())
    made = np.concatenate(rows)
    for kind in ("float32", "float16"):
        flat = pa.array(made.astype(kind).reshape(-1))
        table = pa.table({"id": [f"r{n}" for n in range(len(made))], "vector": pa.FixedSizeListArray.from_arrays(flat, made.shape[1])})
        pq.write_table(table, folder / f"vectors.parquet, {kind}")


def measure(path, level):
    data = path.read_bytes()
    pieces, times = [data[n : n + CHUNK] for n in range(0, len(data), CHUNK)], max(1, CHUNK // len(data))  # a small file many times, for the clock
    began = time.process_time()
    for _ in range(times):
        c = zstandard.ZstdCompressor(level=level).compressobj(size=len(data))
        out = b"".join([c.compress(p) for p in pieces] + [c.flush()])
    up, began = time.process_time() - began, time.process_time()
    for _ in range(times):
        assert zstandard.ZstdDecompressor().decompressobj().decompress(out) == data
    down = time.process_time() - began
    return len(data) / len(out), times * len(data) / up / 1e6, times * len(data) / down / 1e6


def main(more):
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        lora(folder)
        source = resolve("asset:banking", "source").path
        columns = [[str(v) for v in c.to_pylist()] for c in pq.read_table(source).columns]
        texts = max(columns, key=lambda c: sum(map(len, c)))  # the column that holds the text
        vectors(folder, texts[:400])
        (folder / "rows.jsonl").write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts)))
        (folder / "tokenizer.json").write_bytes((resolve("asset:minilm", "model").path / "tokenizer.json").read_bytes())
        print(f"{platform.processor() or platform.machine()}, zstandard {zstandard.__version__}, one thread")
        print(f"{'file':<28}{'MB':>8}   {'level 1: ratio':>14}{'saved':>7}{'MB/s':>7}{'back':>7}   {'level 3: ratio':>14}{'saved':>7}{'MB/s':>7}{'back':>7}")
        for f in [*sorted(folder.iterdir()), *map(Path, more)]:
            cells = []
            for level in (1, 3):
                ratio, up, down = measure(f, level)
                cells.append(f"{ratio:>14.2f}{1 - 1 / ratio:>7.0%}{up:>7.0f}{down:>7.0f}")
            print(f"{f.name:<28}{f.stat().st_size / 1e6:>8.2f}   {'   '.join(cells)}")


if __name__ == "__main__":
    main(sys.argv[1:])
