"""What each lever of the flat engine is worth: EXPERIMENTS.md has the lines that this prints.

    python benchmarks/levers.py            # all; three minutes on a quiet machine
    python benchmarks/levers.py --compile  # torch.compile as well, which needs a C++ compiler and minutes

Each round runs every lever once, in another order, on the skewed texts of embed.py, tokenised beforehand; `gain` is the baseline's CPU time
over the lever's, the median over rounds.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import embed as bench  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from waystation.embedding import flat  # noqa: E402
from waystation.embedding.encoder import read_recipe, read_tokenizer  # noqa: E402

BUDGET = 1024


def block(linear=F.linear, attend=flat.attend, up=None, add=torch.Tensor.add_):
    "flat.block with one of its parts exchanged."
    def run(x, w, groups, heads, eps):
        a = linear(attend(linear(x, *w.qkv), groups, heads), *w.out)
        x = F.layer_norm(add(a, x), x.shape[1:], *w.norm1, eps)
        h = up(x, *w.up) if up else F.gelu(linear(x, *w.up))
        return F.layer_norm(add(linear(h, *w.down), x), x.shape[1:], *w.norm2, eps)
    return run


def apart(x, w, groups, heads, eps):
    "Query, key and value as three multiplies, each dense in memory."
    qkv, out, at = [F.linear(x, m, b) for m, b in zip(w.qkv[0].chunk(3), w.qkv[1].chunk(3), strict=True)], [], 0
    for texts, n in groups:
        to = at + texts * n
        q, k, v = (t[at:to].view(texts, n, heads, -1).transpose(1, 2) for t in qkv)
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(to - at, -1))
        at = to
    x = F.layer_norm(F.linear(torch.cat(out), *w.out).add_(x), x.shape[1:], *w.norm1, eps)
    return F.layer_norm(F.linear(F.gelu(F.linear(x, *w.up)), *w.down).add_(x), x.shape[1:], *w.norm2, eps)


TURNED, PACKED = {}, {}


def turned(x, weight, bias):
    "The weight kept [in, out]."
    w = TURNED.setdefault(weight.data_ptr(), None)
    if w is None:
        w = TURNED[weight.data_ptr()] = weight.T.contiguous()
    return torch.addmm(bias, x, w)


def packed(x, weight, bias, attr="none", algorithm=""):
    "oneDNN with a weight in its own layout: private operators of torch."
    w = PACKED.get(weight.data_ptr())
    if w is None:
        w = PACKED[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, BUDGET)
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, attr, [], algorithm)


def by_hand(qkv, groups, heads):
    "Attention written out, so that the scores go through memory."
    out, a = [], 0
    for texts, n in groups:
        b = a + texts * n
        q, k, v = qkv[a:b].view(texts, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        s = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1]**-0.5, -1)
        out.append((s @ v).transpose(1, 2).reshape(b - a, -1))
        a = b
    return torch.cat(out)


def masked(qkv, groups, heads):
    "All texts of a batch in one call, padded to the longest, with a mask."
    lengths = torch.tensor([n for k, n in groups for _ in range(k)])
    here = torch.arange(int(lengths.max())) < lengths[:, None]
    x = qkv.new_zeros(*here.shape, qkv.shape[1])
    x[here] = qkv
    q, k, v = x.view(*here.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=here[:, None, None, :])
    return y.transpose(1, 2).reshape(*here.shape, -1)[here]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--set", choices=["skewed", "chunks"], default="skewed")
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder, texts = bench.collections(args.scale)[args.set]
    tok, room = read_tokenizer(folder), read_recipe(folder).max_tokens
    ids = [tok.wrap(x[:room - tok.extra]) for x, _, _ in tok.encode(texts)]
    encoder, shuffled = flat.load(folder, "cpu"), random.Random(0).sample(ids, len(ids))
    levers = {f"{n} tokens a batch": (flat.block, flat.batches(ids, n)[0]) for n in (256, 512, 2048, 4096, 8192)}
    base = flat.batches(ids, BUDGET)[0]
    # Equal lengths side by side within a batch only: texts come in the order of the file.
    windows = [b for k in range(0, len(shuffled), 32) for b in flat.batches(shuffled[k:k + 32], BUDGET)[0]]
    levers |= {"sorted within 32 texts only": (flat.block, windows), "query, key, value apart": (apart, base),
               "sums in a new array": (block(add=torch.add), base), "weights as [in, out]": (block(turned), base),
               "oneDNN prepacked (private)": (block(packed), base),
               "oneDNN prepacked, gelu fused (private)": (block(packed, up=lambda x, w, b: packed(x, w, b, "gelu", "none")), base),
               "attention by hand": (block(attend=by_hand), base), "attention padded and masked": (block(attend=masked), base)}
    if args.compile:
        levers["torch.compile of a block, dynamic"] = (torch.compile(flat.block, dynamic=True), base)
        levers["torch.compile of linear and gelu"] = (block(up=torch.compile(lambda x, w, b: F.gelu(F.linear(x, w, b)), dynamic=True)), base)
    levers, times = {"baseline": (flat.block, base), **levers}, {}
    original = flat.block
    for r in range(args.rounds + 1):
        for name in random.Random(r).sample(list(levers), len(levers)):
            flat.block, batches = levers[name]
            since = time.process_time()
            try:
                for b in batches[:2] if r == 0 else batches:  # round 0 warms up
                    encoder.vectors(b, "mean", True)
            except Exception as e:
                print(f"{name}: fails with {type(e).__name__}: {str(e).splitlines()[0][:120]}")
                levers.pop(name)
                continue
            finally:
                flat.block = original
            if r:
                times.setdefault(name, []).append(time.process_time() - since)
    for name in levers:
        gains = [a / b for a, b in zip(times["baseline"], times[name], strict=True)]
        print(f"{name}: {statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})")
    print(f"baseline: {statistics.median(times['baseline']):.2f} CPU s for {sum(map(len, ids)):,} tokens of {len(ids)} texts, {args.rounds} rounds, "
          f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
