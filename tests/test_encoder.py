"""Every family of encoder against transformers' own model with random weights, packed, under strict promotion.

Hypothesis draws sizes, lengths and eps, in the same order every time; the torch engine is held against the same model. Nucleotide Transformer v2 exists only as code
that travels with the model; its reference is here, written from the published formula (rotary positions, a feed-forward layer
silu(a) * b without biases, https://github.com/instadeepai/nucleotide-transformer/blob/main/docs/nucleotide_transformer.md).
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from waystation.assets import resolve
from waystation.embedding import flat
from waystation.embedding.encoder import attend, buckets, flash, load, vectors
from waystation.embedding.backend import open_model
from waystation.embedding.engine import Cut, embed_texts
from waystation.embedding.models import Checkpoint, read_config, read_recipe, read_weights
from waystation.embedding.packing import lay, pack
from waystation.embedding.tokens import KMERS, letters, prompted, read_tokenizer
from waystation.runtime import Refused

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
TEXT = ["bert", "roberta", "xlm-roberta", "mpnet"]
ESM = [(position, before, dropout) for position in ("absolute", "rotary") for before in (False, True) for dropout in (False, True)]
FAMILIES = [*TEXT, *(("esm", *e) for e in ESM), "nt-v2"]
SIZES = st.builds(
    lambda heads, half, **other: dict(other, num_attention_heads=heads, hidden_size=heads * 2 * half), heads=st.integers(1, 4), half=st.integers(2, 9),
    vocab_size=st.integers(30, 119), num_hidden_layers=st.integers(1, 4), intermediate_size=st.integers(5, 89),
    max_position_embeddings=st.integers(40, 199), layer_norm_eps=st.sampled_from([1e-12, 1e-5]))
MEDIUM = dict(num_attention_heads=3, hidden_size=36, vocab_size=80, num_hidden_layers=3, intermediate_size=50, max_position_embeddings=120, layer_norm_eps=1e-5)


@pytest.fixture(autouse=True)
def _strict():
    "Nothing is promoted or broadcast that is not said to be."
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def shaken(model, seed, size=0.1):
    "Random biases and norms as well: as they are initialised, they would hide what is left out."
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * size)
    return model.eval()


def made(family, folder, s=MEDIUM, seed=0):
    "A random model of a family, saved by transformers; the same model as the oracle."
    if family == "nt-v2":
        return nt_v2(s, folder, seed)
    if family[0] == "esm":
        _, position, before, dropout = family
        config = transformers.EsmConfig(**s, pad_token_id=1, mask_token_id=4, position_embedding_type=position, emb_layer_norm_before=before, token_dropout=dropout)
        model = transformers.EsmModel(config)
    else:
        classes = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "mpnet": "MPNet"}
        pads = dict(bert=0).get(family, 1)
        config = getattr(transformers, classes[family] + "Config")(**s, pad_token_id=pads)
        model = getattr(transformers, classes[family] + "Model")(config)
    model = shaken(model, seed)
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


def texts_for(c, shares, rng):
    "Token ids of texts of every length, among them the longest that fits; in some, masked tokens."
    longest = min(c.limit, 96)
    lengths = [longest, 1, 2, *(1 + round(x * (longest - 1)) for x in shares)]
    texts = [rng.integers(4 if c.mask >= 0 else 5, c.vocab, n).astype(np.int32) for n in lengths]
    for t in texts:  # if all tokens were masked, the published formula would divide by zero
        if c.mask >= 0 and (t == c.mask).all():
            t[0] = 5
    return texts


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f if isinstance(f, str) else "-".join(map(str, f)))
@settings(max_examples=20 if os.environ.get("WAYSTATION_PROVE") else 2, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, shares=st.lists(st.floats(0, 1), min_size=2, max_size=8), seed=st.integers(0, 2**31))
def test_agrees_with_transformers_packed_and_flat(family, tmp_path_factory, sizes, shares, seed):
    folder = tmp_path_factory.mktemp("model") / "model"
    oracle = made(family, folder, sizes, seed)
    c = read_config(folder)
    texts = texts_for(c, shares, np.random.default_rng(seed))
    p = pack([len(t) for t in texts], 128, 8)
    states = np.asarray(jax.jit(load(folder).__call__)(*lay(p, texts, c.pad)))
    batches, place = flat.batches(texts, 64)
    by_torch = flat.load(folder, "cpu")
    loose = np.concatenate([by_torch.states(b).numpy() for b in batches])
    ends = np.cumsum([n for b in batches for k, n in b.groups for _ in range(k)])
    assert np.isfinite(states).all()
    for i, (ids, r, s) in enumerate(zip(texts, p.row, p.start, strict=True)):
        with torch.no_grad():
            want = oracle(torch.tensor(ids[None].astype(np.int64)))[0].numpy()
        near = 1e-5 * max(1, np.abs(want).max())
        np.testing.assert_allclose(states[r, s:s + len(ids)], want, atol=near)
        np.testing.assert_allclose(loose[ends[place[i]] - len(ids):ends[place[i]]], want, atol=near)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert", "mpnet", ("esm", "rotary", True, True), "nt-v2"])
def test_sixteen_bits_stay_near(family, dtype, tmp_path):
    made(family, tmp_path / "model")
    c = read_config(tmp_path / "model")
    texts = [t for t in texts_for(c, (0.1, 0.3, 0.5), np.random.default_rng(0)) if len(t) > 3]
    p = pack([len(t) for t in texts], 128, 8)
    full, half = (np.asarray(vectors(load(tmp_path / "model", d), *lay(p, texts, c.pad), 8, "mean", True))[p.row, p.segment] for d in ("float32", dtype))
    assert half.dtype == np.float32 and (full * half).sum(1).min() > (0.998 if dtype == "bfloat16" else 0.9999)


# --- pieces that a whole model would not show ------------------------------------------------------------------------


def test_distances_fall_into_the_buckets_of_transformers():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distance = np.arange(-3000, 3001)
    want = MPNetEncoder.relative_position_bucket(torch.tensor(distance)).numpy()
    np.testing.assert_array_equal(buckets(distance), want)


@pytest.mark.parametrize("width, head", [(128, 32), (384, 64), (512, 128), (96, 64), (128, 160)])
def test_flash_agrees_with_plain_attention(width, head):
    "In the interpreter: the kernel's arithmetic without a TPU. The last two shapes are left to the plain form."
    from jax.experimental.pallas import tpu as pltpu
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, width, head)), jnp.bfloat16) for _ in range(3))
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, width)), axis=1), jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), pltpu.force_tpu_interpret_mode():  # JAX's own kernel promotes
        ours = flash(q, k, v, segments)
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(attend(q, k, v, segments), np.float32), atol=0.03)
    assert ours.dtype == jnp.bfloat16


# --- tokens ----------------------------------------------------------------------------------------------------------

ESM_VOCAB = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


def esm_folder(tmp_path, vocab, **tokenizer):
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="esm")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path


def test_proteins_and_dna_agree_with_transformers(tmp_path):
    rng = np.random.default_rng(0)
    letters_of = {"esm": "LAGVSERTIDPKQNFYMHWCXBUZO.-*? \n", "nt": "AAAAACCCCCGGGGGTTTTTNR- "}
    for name, vocab, eos in (("esm", ESM_VOCAB, "<eos>"), ("nt", list(KMERS), None), ("nt2", [*list(KMERS), "<eos>", "<bos>"], None)):
        (tmp_path / name).mkdir()
        ours = read_tokenizer(esm_folder(tmp_path / name, vocab, eos_token=eos))
        theirs = transformers.EsmTokenizer(str(tmp_path / name / "vocab.txt"), eos_token=eos)
        texts = ["".join(rng.choice(list(letters_of[name[:3].rstrip("2")]), n)) for n in rng.integers(1, 90, 60)]
        texts += ["A", "<mask>", "AC<mask>GT" * 3, "ACGTAC" * 20 + "A"]
        for text, (ids, spans, _) in zip(texts, ours.encode(texts), strict=True):
            if len(ids):  # a text without one known letter is set aside
                assert ours.wrap(ids).tolist() == theirs(text)["input_ids"], text
                assert (spans[1:, 0] >= spans[:-1, 1]).all() and spans[-1, 1] <= len(text)
        assert ours.top == len(vocab) - 1


def fast(kind, tmp_path):
    "A small tokenizer of a family, trained here."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    some = ["query: what is the fee", "passage: the fee for a returned card", "where is my card"] * 20
    if kind == "bytes":  # RoBERTa
        tok, pre, trainer = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False), trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:  # XLM-R
        tok, pre, trainer = Tokenizer(models.Unigram()), pre_tokenizers.Metaspace(), trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tok.pre_tokenizer = pre
    tok.train_from_iterator(some, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tok.decoder = decoders.ByteLevel()
    tok.save(str(tmp_path / "tokenizer.json"))
    return tok


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_a_prompt_has_the_tokens_it_would_have_in_the_text(kind, tmp_path):
    tok = fast(kind, tmp_path)
    ours = prompted(read_tokenizer(tmp_path), "query: ")
    for text in ("what is the fee", "x", "  card", "é fee", "queryquery: fee"):
        (ids, spans, _), = ours.encode([text])
        assert ours.wrap(ids).tolist() == tok.encode("query: " + text).ids
        assert spans.min() >= 0 and spans.max() <= len(text)


# --- sentence-transformers -------------------------------------------------------------------------------------------


def copied(folder, new, **docs):
    "A copy of a model folder by links, with other JSON files: name with / and . as __ and _dot_."
    for f in folder.rglob("*"):
        if f.is_file():
            (new / f.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (new / f.relative_to(folder)).symlink_to(f)
    for name, doc in docs.items():
        path = new / (name.replace("__", "/") + ".json")
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(doc))
    return new


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "weightedmean", "lasttoken"])
def test_poolings_and_prompts_agree_with_sentence_transformers(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    st = pytest.importorskip("sentence_transformers")
    folder = copied(resolve("asset:minilm", "model").path, tmp_path / "m", **{
        "1_Pooling__config": dict(embedding_dimension=384, pooling_mode=mode),
        "config_sentence_transformers": dict(prompts={"query": "query: ", "passage": "passage: "}, default_prompt_name="passage")})
    texts = ["the fee", "What is the fee for a returned check?", "word " * 400, "x"]
    with jax.numpy_dtype_promotion("standard"):
        model = st.SentenceTransformer(str(folder), device="cpu")
        for prompt in ("", "query"):
            want = model.encode(texts, **(dict(prompt_name=prompt) if prompt else {}))
            assert (embed_texts(folder, texts, prompt=prompt) * want).sum(1).min() > 0.99999
    short = embed_texts(folder, texts, dimensions=64, prompt="query")
    np.testing.assert_allclose(short, want[:, :64] / np.linalg.norm(want[:, :64], axis=1, keepdims=True), atol=1e-5)
    assert open_model(folder, dimensions=64).about["dim"] == 64


def test_what_sentence_transformers_folders_ask_for_and_is_not_there(tmp_path):
    minilm = resolve("asset:minilm", "model").path
    both = copied(minilm, tmp_path / "both", **{"1_Pooling__config": dict(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True)})
    with pytest.raises(Refused, match="asks for pooling"):
        read_recipe(both)
    assert read_recipe(both, "max").pooling == "max"
    without = copied(minilm, tmp_path / "without", **{"1_Pooling__config": dict(pooling_mode="mean", include_prompt=False), "config_sentence_transformers": dict(
        prompts={"query": "query: "})})
    assert read_recipe(without).prompt == ""
    with pytest.raises(Refused, match="include_prompt=False"):
        read_recipe(without, prompt="query")
    with pytest.raises(Refused, match="prompt='passage'"):
        read_recipe(without, prompt="passage")
    with pytest.raises(Refused, match="dimensions=385"):
        read_recipe(minilm, dimensions=385)
    short = copied(minilm, tmp_path / "short", tokenizer_config=dict(model_max_length=100))
    assert read_recipe(short).max_tokens == 100


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, fields", [
    ("bert", dict(position_embedding_type="rotary")), ("roberta", dict(hidden_act="relu")), ("xlm-roberta", dict(is_decoder=True)),
    ("mpnet", dict(relative_attention_num_buckets=64)), ("esm", dict(position_embedding_type="relative_key")), ("esm", dict(is_folding_model=True)),
    ("esm", dict(auto_map={"AutoModel": "x.Y"})), ("bert", dict(quantization_config={"bits": 8})), ("bert", dict(pruned_heads={"0": [1]})),
    ("esm", dict(pad_token_id=None)), ("esm", dict(token_dropout=True)), ("bert", dict(model_type="deberta-v2"))])
def test_what_a_family_lacks_is_refused_by_field(kind, fields, tmp_path):
    sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=9, pad_token_id=1)
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": kind}))
    assert read_config(tmp_path).limit == (9 if kind == "bert" else 7)
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": kind, **fields}))
    with pytest.raises(Refused, match="mask_token_id" if "token_dropout" in fields else next(iter(fields))):
        read_config(tmp_path)


def test_checkpoints_in_parts_and_of_old(tmp_path):
    from safetensors.numpy import save_file
    made(("esm", "rotary", True, True), tmp_path / "esm")
    c = read_config(tmp_path / "esm")
    good = dict(Checkpoint(tmp_path / "esm"))
    want = read_weights(c, good)
    # as transformers 4 saved it: frequencies in each layer, a table of positions that nothing reads
    old = {f"esm.{k}": v for k, v in good.items() if not k.endswith("inv_freq")}
    old |= {f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq": want["inv_freq"] * np.float32(1.01) for i in range(c.layers)}
    old |= {"esm.embeddings.position_embeddings.weight": np.zeros((3, 3)), "lm_head.bias": np.zeros(2)}
    got = read_weights(c, old)
    np.testing.assert_allclose(got["inv_freq"], want["inv_freq"] * 1.01, rtol=1e-6)  # the stored ones count
    half = read_weights(c, old, jnp.bfloat16)
    assert half["up"].dtype == jnp.bfloat16 and half["norm1_scale"].dtype == half["inv_freq"].dtype == np.float32
    if c.layers > 1:
        key = "esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq"
        with pytest.raises(Refused, match="differs from layer to layer"):
            read_weights(c, old | {key: old[key] * 2})
    # in two files
    names, parts = sorted(good), tmp_path / "parts"
    parts.mkdir()
    for k in range(2):
        save_file({n: good[n] for n in names[k::2]}, parts / f"model-{k}.safetensors")
    (parts / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)})))
    (parts / "config.json").write_text((tmp_path / "esm" / "config.json").read_text())
    np.testing.assert_array_equal(load(parts).qkv[...], want["qkv"])
    (parts / "model-1.safetensors").unlink()
    with pytest.raises(Refused, match=r"has no model-1\.safetensors"):
        load(parts)
    # BERT of 2018: gamma and beta
    made("bert", tmp_path / "bert")
    b, now = read_config(tmp_path / "bert"), dict(Checkpoint(tmp_path / "bert"))
    then = {"bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in now.items()}
    np.testing.assert_array_equal(read_weights(b, then)["norm2_bias"], read_weights(b, now)["norm2_bias"])


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    made(("esm", "rotary", False, True), tmp_path / "model")

    vocab = read_config(tmp_path / "model").vocab
    (tmp_path / "model" / "vocab.txt").write_text("\n".join([*ESM_VOCAB, *(f"<null_{i}>" for i in range(2, 2 + vocab))]))
    with pytest.raises(Refused, match=rf"token ids up to .*vocab_size={vocab}"):
        open_model(tmp_path / "model")


def test_a_protein_folder_goes_through_the_engine(tmp_path):
    "vocab.txt, ESM positions, a limit below the table: from text to vector, against transformers."
    config = transformers.EsmConfig(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=1,
                                    mask_token_id=32, max_position_embeddings=66, emb_layer_norm_before=False, token_dropout=True)
    model = shaken(transformers.EsmModel(config), 0)
    model.save_pretrained(tmp_path, safe_serialization=True)
    (tmp_path / "vocab.txt").write_text("\n".join(ESM_VOCAB))
    m = open_model(tmp_path)
    assert (m.recipe.max_tokens, m.room) == (64, 62)
    with pytest.raises(Refused, match="use at most 64"):
        open_model(tmp_path, max_tokens=65)
    Cut(chunk_tokens=62).check(m)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), n)) for n in (62, 200, 5, 31)]
    tok = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    for text, y in zip(texts, embed_texts(tmp_path, texts), strict=True):
        with torch.no_grad():
            want = model(**tok(text[:62], return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(y, want, atol=1e-5 * max(1, np.abs(want).max()))


def test_an_unknown_vocabulary_is_refused(tmp_path):
    with pytest.raises(Refused, match="not all k-mers of one length"):
        read_tokenizer(esm_folder(tmp_path, ["<unk>", "<cls>", "ACG", "AC", "A"]))
    assert letters({"<unk>": 0, "A": 1, "C": 2}, [], []).encode(["AC"])[0][0].tolist() == [1, 2]
