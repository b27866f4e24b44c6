"""Training without padding: the same numbers as with it, for every model that is laid flat, and only for those."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from waystation.training.flat import arrange, collate, lay_flat, pieces

SIZE = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=64, pad_token_id=0, attn_implementation="sdpa")  # fmt: skip
YES = [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", dict(sliding_window=40)), ("gemma", {}), ("olmo2", {}), ("phi3", {}),
       ("opt", dict(word_embed_proj_dim=32, ffn_dim=48, dropout=0)),
       ("gpt2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))]  # fmt: skip
NONE = dict(state_size=8, num_heads=8, n_groups=1, attn_implementation=None)  # no attention at all
NO = [("mistral", dict(sliding_window=6)), ("gemma3_text", dict(sliding_window=6)), ("lfm2", dict(layer_types=["conv", "full_attention"])), ("mamba2", NONE),
      ("falcon_mamba", NONE), ("llama", dict(attn_implementation="eager"))]  # fmt: skip


def tiny(kind, change):
    torch.manual_seed(0)
    said = SIZE | change
    how = said.pop("attn_implementation")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **said), attn_implementation=how, dtype=torch.float32)


def rows():
    "Unequal rows that begin alike; the last tokens of each are scored."
    rng = torch.Generator().manual_seed(1)
    made = []
    for n, k in ((5, 2), (17, 3), (9, 1), (5, 4), (2, 1)):
        ids = [3, 4, 5, 6, *torch.randint(7, 48, (n,), generator=rng).tolist()]
        made.append(dict(input_ids=ids, labels=[-100] * (len(ids) - k) + ids[-k:]))
    return made


def summed(model, asked, labels):
    logits = model(**asked, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def gradients(model, batches):
    model.zero_grad()
    losses = [summed(model, asked, labels) for asked, labels in batches]
    sum(losses).backward()
    return float(sum(losses).detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def padded():
    def fill(key, value):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(r[key]) for r in rows()], batch_first=True, padding_value=value)
    ids = fill("input_ids", 0)
    return dict(input_ids=ids, attention_mask=(ids != 0).long()), fill("labels", -100)


@pytest.mark.parametrize("kind, change", YES, ids=[k for k, _ in YES])
def test_the_line_gives_what_padding_gives(kind, change):
    model = tiny(kind, change).train()
    loss, wanted = gradients(model, [padded()])
    assert lay_flat(model, 21) and model.training
    for share in (False, True):
        got, found = gradients(model, [arrange(p, share) for p in pieces(collate(rows()), 20)])
        assert got == pytest.approx(loss, rel=1e-5)
        for name, g in wanted.items():
            torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-5)
    padded_again, _ = gradients(model, [padded()])
    assert padded_again == pytest.approx(loss, rel=1e-6), "what is no line is computed as ever"


@pytest.mark.parametrize("kind, change", NO, ids=[f"{k}{i}" for i, (k, _) in enumerate(NO)])
def test_other_models_are_left_alone(kind, change):
    model = tiny(kind, change)
    usual = model.config._attn_implementation
    assert not lay_flat(model, 21)
    assert model.config._attn_implementation == usual
    assert torch.isfinite(summed(model, *padded()))


@pytest.mark.parametrize("kind, change, flat", [(*x, True) for x in YES] + [(*x, False) for x in NO])
def test_without_its_weights_a_model_answers_the_same(kind, change, flat):
    assert lay_flat(tiny(kind, change).to("meta"), 21) is flat


def test_a_common_beginning_keeps_what_foretells_a_completion():
    same = [dict(input_ids=[3, 4, 5, 6], labels=[-100, -100, 5, 6])] * 3
    asked, labels = arrange(collate(same), share=True)
    assert asked["rows"] == [1, 3, 3, 3] and asked["input_ids"].shape == (1, 10)
    assert (labels != -100).sum() == 6
    for ids in ([[3, 4]], [[9, 4], [3, 4]], [[3], [3, 4]]):
        asked, _ = arrange(collate([dict(input_ids=i, labels=[-100] * len(i)) for i in ids]), share=True)
        assert asked["rows"] == [0, *map(len, ids)]


def test_no_row_reads_another():
    "Another neighbour changes nothing, not by a bit, when the row stands in the same place; and a lost border does."
    model = tiny("llama", {}).eval()
    assert lay_flat(model, 21)
    a, b, c = ([dict(input_ids=ids, labels=ids)] for ids in ([5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15]))

    def second(first, **lost):
        "What the model says to the second row, behind a first one."
        return model(**arrange(collate(first + a), False)[0] | lost, use_cache=False).logits[0, 3:]
    with torch.no_grad():
        assert torch.equal(second(b), second(c))
        assert not torch.allclose(second(b, rows=[0, 8]), second(c, rows=[0, 8]), atol=1e-3)
        nothing = dict(rows=None, attention_mask=None, position_ids=None)
        assert not torch.allclose(second(b, **nothing), second(c, **nothing), atol=1e-3)
