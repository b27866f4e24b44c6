"""Every family of encoder against transformers' own model with random weights, packed, under strict promotion.

Sizes, lengths, eps and the fields that a family knows are drawn from a fixed seed. Nucleotide Transformer v2 exists only as code
that travels with the model; its reference is here, written from the published formula (rotary positions, a feed-forward layer
silu(a) * b without biases, https://github.com/instadeepai/nucleotide-transformer/blob/main/docs/nucleotide_transformer.md).
"""

import json

import jax
import numpy as np
import pytest

from waystation.embedding.encoder import load, vectors
from waystation.embedding.models import read_config
from waystation.embedding.packing import lay, pack

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
TEXT = ["bert", "roberta", "xlm-roberta", "mpnet"]
ESM = [(position, before, dropout) for position in ("absolute", "rotary") for before in (False, True) for dropout in (False, True)]
CASES = [(f, k) for f in [*TEXT, *(("esm", *e) for e in ESM), "nt-v2"] for k in range(3)]


@pytest.fixture(autouse=True)
def _strict():
    "Nothing is promoted or broadcast that is not said to be."
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def sizes(rng):
    heads = int(rng.integers(1, 5))
    return dict(vocab_size=int(rng.integers(30, 120)), hidden_size=heads * 2 * int(rng.integers(2, 10)), num_hidden_layers=int(rng.integers(1, 5)),
                num_attention_heads=heads, intermediate_size=int(rng.integers(5, 90)), max_position_embeddings=int(rng.integers(40, 200)),
                layer_norm_eps=float(rng.choice([1e-12, 1e-5])))


def shaken(model, seed, size=0.1):
    "Random biases and norms as well: as they are initialised, they would hide what is left out."
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * size)
    return model.eval()


def made(case, folder):
    "A random model of a family, saved by transformers; the same model as the oracle."
    family, k = case
    rng = np.random.default_rng([k, CASES.index(case)])
    s = sizes(rng)
    if family == "nt-v2":
        return nt_v2(s, folder, k)
    if family[0] == "esm":
        _, position, before, dropout = family
        config = transformers.EsmConfig(**s, pad_token_id=1, mask_token_id=4, position_embedding_type=position, emb_layer_norm_before=before, token_dropout=dropout)
        model = transformers.EsmModel(config)
    else:
        classes = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "mpnet": "MPNet"}
        pads = dict(bert=0).get(family, 1)
        config = getattr(transformers, classes[family] + "Config")(**s, pad_token_id=pads)
        model = getattr(transformers, classes[family] + "Model")(config)
    model = shaken(model, k)
    model.save_pretrained(folder, safe_serialization=True)
    return lambda ids: model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def nt_v2(s, folder, seed):
    "Rotary positions as in ESM, silu(a) * b without biases; the attention around it is transformers' ESM."
    config = transformers.EsmConfig(**s, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary", token_dropout=False)
    model = transformers.EsmModel(config)

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(s["hidden_size"], 2 * s["intermediate_size"], bias=False)

        def forward(self, x):
            a, b = self.dense(x).chunk(2, -1)
            return a * torch.sigmoid(a) * b

    for layer in model.encoder.layer:
        layer.intermediate = Gated()
        layer.output.dense = torch.nn.Linear(s["intermediate_size"], s["hidden_size"], bias=False)
    model = shaken(model, seed)
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    frequencies = state.pop("rotary_embeddings.inv_freq")  # published folders have it once a layer, and all under "esm."
    state |= {f"encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq": frequencies.clone() for i in range(s["num_hidden_layers"])}
    save_file({f"esm.{k}": v for k, v in state.items()}, folder / "model.safetensors")
    doc = {**config.to_dict(), "add_bias_fnn": False, "auto_map": {"AutoModel": "modeling_esm.EsmModel"}}
    (folder / "config.json").write_text(json.dumps(doc))
    return lambda ids: model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def texts_for(c, rng):
    "Token ids of texts of every length, among them the longest that fits; in some, masked tokens."
    longest = min(c.limit, 96)
    lengths = [longest, 1, 2, *rng.integers(1, longest + 1, 6)]
    return [rng.integers(4 if c.mask >= 0 else 5, c.vocab, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0] if isinstance(c[0], str) else '-'.join(map(str, c[0]))}/{c[1]}")
def test_agrees_with_transformers_packed(case, tmp_path):
    oracle = made(case, tmp_path / "model")
    c = read_config(tmp_path / "model")
    rng = np.random.default_rng(case[1])
    texts = texts_for(c, rng)
    for t in texts:  # if all tokens were masked, the published formula would divide by zero
        if c.mask >= 0 and (t == c.mask).all():
            t[0] = 5
    p = pack([len(t) for t in texts], 128, 8)
    states = np.asarray(jax.jit(load(tmp_path / "model").__call__)(*lay(p, texts, c.pad)))
    assert np.isfinite(states).all()
    for ids, r, s in zip(texts, p.row, p.start, strict=True):
        with torch.no_grad():
            want = oracle(torch.tensor(ids[None].astype(np.int64)))[0].numpy()
        np.testing.assert_allclose(states[r, s:s + len(ids)], want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert", "mpnet", ("esm", "rotary", True, True), "nt-v2"])
def test_sixteen_bits_stay_near(family, dtype, tmp_path):
    made((family, 0), tmp_path / "model")
    c = read_config(tmp_path / "model")
    texts = [t for t in texts_for(c, np.random.default_rng(0)) if len(t) > 3]
    p = pack([len(t) for t in texts], 128, 8)
    full, half = (np.asarray(vectors(load(tmp_path / "model", d), *lay(p, texts, c.pad), 8, "mean", True))[p.row, p.segment] for d in ("float32", dtype))
    assert half.dtype == np.float32 and (full * half).sum(1).min() > (0.998 if dtype == "bfloat16" else 0.9999)
