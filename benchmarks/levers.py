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
from waystation.embedding.models import read_recipe  # noqa: E402
from waystation.embedding.tokens import read_tokenizer  # noqa: E402

BUDGET = 1024


def sums_apart(x, w, c, mix):
    "flat.block of a BERT, but that its sums take new arrays."
    x = F.layer_norm(w.out(mix(w.qkv(x))) + x, x.shape[1:], *w.norm1, c.eps)
    return F.layer_norm(w.down(w.up(x)) + x, x.shape[1:], *w.norm2, c.eps)


def apart(weight, bias, gelu=False):
    "Query, key and value as three multiplies."
    if len(weight) != 3 * weight.shape[1]:
        return flat.linear(weight, bias, gelu)
    parts = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
    return lambda x: torch.cat([F.linear(x, m, b) for m, b in parts], 1)


def turned(weight, bias, gelu=False):
    "The weight kept [in, out]."
    w = weight.T.contiguous()
    return lambda x: F.gelu(torch.addmm(bias, x, w)) if gelu else torch.addmm(bias, x, w)


def unfused(weight, bias, gelu=False):
    "oneDNN with a weight in its own layout, and GELU by itself."
    f = flat.prepacked(weight, bias)
    return (lambda x: F.gelu(f(x))) if gelu else f


def compiled(weight, bias, gelu=False):
    return torch.compile(flat.linear(weight, bias, gelu), dynamic=True)


def by_hand(q, k, v, groups, bias=None):
    "Attention written out, so that the scores go through memory."
    out, a = [], 0
    for texts, n in groups:
        b = a + texts * n
        qs, ks, vs = (x[a:b].view(texts, n, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        s = torch.softmax(qs @ ks.transpose(-1, -2) * q.shape[-1]**-0.5, -1)
        out.append((s @ vs).transpose(1, 2).reshape(b - a, -1))
        a = b
    return torch.cat(out)


def masked(q, k, v, groups, bias=None):
    "All texts of a batch in one call, padded to the longest, with a mask."
    lengths = torch.tensor([n for k, n in groups for _ in range(k)])
    here = torch.arange(int(lengths.max())) < lengths[:, None]

    def spread(x):
        y = x.new_zeros(*here.shape, *x.shape[1:])
        y[here] = x
        return y.transpose(1, 2)
    y = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), attn_mask=here[:, None, None, :])
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
    plain, base = (encoder, flat.block, flat.attend), flat.batches(ids, BUDGET)[0]
    levers = {"baseline": (*plain, base)} | {f"{n} tokens a batch": (*plain, flat.batches(ids, n)[0]) for n in (256, 512, 2048, 4096, 8192)}
    # Equal lengths side by side within a batch only: texts come in the order of the file.
    windows = [b for k in range(0, len(shuffled), 32) for b in flat.batches(shuffled[k:k + 32], BUDGET)[0]]
    levers["sorted within 32 texts only"] = (*plain, windows)
    makers = {"query, key, value apart": apart, "weights as [in, out]": turned, "oneDNN prepacked": unfused, "oneDNN prepacked, gelu fused": flat.prepacked}
    if args.compile:
        makers["torch.compile of linear and gelu"] = compiled
    levers |= {name: (flat.load(folder, "cpu", linear=f), *plain[1:], base) for name, f in makers.items()}
    levers |= {"sums in a new array": (encoder, sums_apart, flat.attend, base), "attention by hand": (encoder, flat.block, by_hand, base),
               "attention padded and masked": (encoder, flat.block, masked, base)}
    times, want = {}, encoder.vectors(base[0], "mean", True)
    for r in range(args.rounds + 1):
        for name in random.Random(r).sample(list(levers), len(levers)):
            changed, flat.block, flat.attend, batches = levers[name]
            since = time.process_time()
            for b in batches[:2] if r == 0 else batches:  # round 0 warms up
                changed.vectors(b, "mean", True)
            if r:
                times.setdefault(name, []).append(time.process_time() - since)
            elif batches is base and not torch.allclose(changed.vectors(base[0], "mean", True), want, atol=1e-5):
                raise SystemExit(f"{name} computes something else")
    _, flat.block, flat.attend = plain
    for name in levers:
        gains = [a / b for a, b in zip(times["baseline"], times[name], strict=True)]
        print(f"{name}: {statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})")
    print(f"baseline: {statistics.median(times['baseline']):.2f} CPU s for {sum(map(len, ids)):,} tokens of {len(ids)} texts, {args.rounds} rounds, "
          f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
