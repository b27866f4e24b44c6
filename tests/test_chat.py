"""Rows and templates: columns by name, which tokens are learnt, what a template adds, changes or refuses; and a model that says it all."""

import importlib.util
import json
from hashlib import sha256
from pathlib import Path

import pytest
from test_train import tiny_model

from waystation.assets import ASSETS, fetch_asset
from waystation.cli import lint, main
from waystation.questions import in_held_out
from waystation.runtime import Refused, cache
from waystation.stations.train import train
from waystation.store import Store
from waystation.training.chat import code_rows, hidden_system, normalise, read_rows, sort_rows
from waystation.training.lint import find_rows

SMOL = cache() / "assets" / f"smollm2-135m-{ASSETS['smollm2-135m'].fingerprint[:12]}"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# as Qwen3's: thoughts stay in answers after the last question, and an answer without any gets empty ones
QWEN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}\n</think>\n\n{{ said }}"
    "{% elif m.role == 'assistant' %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + ASK
)


def turns(*contents, system=""):
    said = [dict(role="user" if i % 2 == 0 else "assistant", content=c) for i, c in enumerate(contents)]
    return [dict(role="system", content=system)] * bool(system) + said


def spans(tok, row):
    "What is learnt of a row, answer by answer, and whether all is."
    (c,) = code_rows([row], tok)
    assert c.ids == tok.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)["input_ids"]
    runs, last = [], 0
    for t, one in zip(c.ids, c.mask, strict=True):
        if one:
            runs = [*runs, [t]] if not last else [*runs[:-1], [*runs[-1], t]]
        last = one
    return [tok.decode(r) for r in runs], c.whole


@pytest.fixture(scope="module")
def smol():
    if not SMOL.is_dir():
        fetch_asset("smollm2-135m")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SMOL)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_template_of_a_real_model(smol, system):
    talk = turns("Free?", "Yes.", "Sure?", "\nQuite.\n\n", "Why?", "It is.", system=system)
    row = normalise({"messages": talk})
    assert spans(smol, row) == (["Yes.<|im_end|>\n", "\nQuite.\n\n<|im_end|>\n", "It is.<|im_end|>\n"], True)
    assert spans(smol, dict(row)) == (["It is.<|im_end|>\n"], True)  # a prompt that holds answers is given, not learnt
    # each answer is what the model would be asked for: the tokens before it are those of the conversation up to there
    (c,) = code_rows([row], smol)
    for k in [k for k, m in enumerate(talk) if m["role"] == "assistant"]:
        asked = smol.apply_chat_template(talk[:k], tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
        n = len(asked)
        assert c.ids[:n] == asked and (c.mask[n - 1], c.mask[n]) == (0, 1)
    assert hidden_system(smol) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_prompt_and_completion_are_coded_as_ever(smol):
    for text in ("Yes.", " Yes.", "\nYes.", "71"):
        row = normalise({"prompt": "Free?", "completion": text})
        prompt = smol.apply_chat_template(row["prompt"], tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
        both = smol.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)["input_ids"]
        n = next(i for i, (a, b) in enumerate(zip([*prompt, -1], both, strict=False)) if a != b)
        assert code_rows([row], smol) == [(both, [0] * n + [1] * (len(both) - n), True)]


def test_markers_and_comparison_agree(smol):
    smol = type(smol).from_pretrained(SMOL)
    inner = "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    outer = "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ASK
    smol.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}" + inner + outer
    talk = turns("Free?", "Yes.", "Sure?", "Quite.", system="Be brief.")
    marked = smol.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert code_rows([normalise({"messages": talk})], smol) == [(marked["input_ids"], marked["assistant_masks"], True)]


def test_a_template_that_rewrites_what_came_before(smol):
    smol = type(smol).from_pretrained(SMOL)
    smol.chat_template = QWEN
    thinking = turns("Free?", "<think>Hm.</think>Yes.", "Sure?", "<think>So.</think>Quite.")
    assert spans(smol, normalise({"messages": thinking})) == (["<think>\nSo.\n</think>\n\nQuite.<|im_end|>\n"], False)
    plain = turns("Free?", "Yes.", "Sure?", "Quite.")  # with thoughts left out, the model is still told to begin with them
    assert spans(smol, normalise({"messages": plain})) == (["<think>\n\n</think>\n\nQuite.<|im_end|>\n"], False)
    smol.chat_template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]") + ASK
    with pytest.raises(Refused, match=r"a row: the model's chat template makes .* of the completion '<think>So.</think>Quite.'"):
        code_rows([normalise({"messages": thinking})], smol)
    with pytest.raises(Refused, match=r"makes .* of the completion '<think>So.</think>'"):  # nothing of it would be left
        code_rows([normalise({"messages": [*thinking[:3], dict(role="assistant", content="<think>So.</think>")]})], smol)


SAID = {"single": turns("Free?", "Yes."), "system": turns("Free?", "Yes.", system="Be brief."), "turns": turns("Free?", "Yes.", "Sure?", "Quite."),
        "thoughts": turns("Free?", "<think>\nHm.\n</think>\n\nYes.", "Sure?", "<think>\nSo.\n</think>\n\nQuite.")}  # fmt: skip


QWEN_SAYS = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@pytest.mark.parametrize("name, end, hidden, wants", [  # $ stands for the mark at an answer's end
    ("gemma", "<end_of_turn>", "", ["Yes.$", "System role not supported", "Yes.$|Quite.$", "<think>Hm.</think>Yes.$|<think>So.</think>Quite.$"]),
    ("qwen2_5", "<|im_end|>", QWEN_SAYS, ["Yes.$", "Yes.$", "Yes.$|Quite.$", "<think>Hm.</think>Yes.$|<think>So.</think>Quite.$"]),
    # an answer gets empty thoughts, and loses them in earlier turns
    ("qwen3", "<|im_end|>", "", ["<think></think>Yes.$", "<think></think>Yes.$", "(last)<think></think>Quite.$", "(last)<think>So.</think>Quite.$"]),
    # <think> stands in what asks for an answer
    ("qwen3_6", "<|im_end|>", "", ["</think>Yes.$", "</think>Yes.$", "(last)</think>Quite.$", "(last)So.</think>Quite.$"]),
    # a conversation ends with a mark more than a turn
    ("phi3", "<|end|>", "", ["Yes.$<|im_end|>", "Yes.$<|im_end|>", "Yes.$|Quite.$<|im_end|>", "<think>Hm.</think>Yes.$|<think>So.</think>Quite.$<|im_end|>"]),
    # thoughts are cut out of every answer
    ("deepseek_r1_distill", "<\uff5cend\u2581of\u2581sentence\uff5c>", "", [">Yes.$", ">Yes.$", "(last)>Quite.$", "of the completion '<think>"]),
    # it takes pictures beside text, and no plain text
    ("llava_next", "", "", ["does not take this conversation"] * 4),
])  # fmt: skip
def test_templates_of_others(smol, name, end, hidden, wants):
    "Real templates, as TRL carries them; their marks are not special to this tokenizer, so some are several tokens."
    file = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this TRL has no {file.name}")
    smol = type(smol).from_pretrained(SMOL)
    smol.chat_template = file.read_text()
    assert hidden_system(smol) == hidden
    for kind, want in zip(SAID, wants, strict=True):
        try:
            runs, whole = spans(smol, normalise({"messages": SAID[kind]}))
            assert "(last)" * (not whole) + "|".join("".join(r.split()) for r in runs) == want.replace("$", end)
        except Refused as e:
            assert want in str(e), (kind, e)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))

    def lines(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(tmp_path / name)

    return lines


ALPACA = [dict(instruction=f"Say {i}.", input="" if i % 2 else f"Loud {i}.", output=f"It is {i}!", persona="Be brief.") for i in range(40)]


def test_columns(write, tmp_path):
    rows, bad = sort_rows(write(ALPACA), "prompt=instruction+input, completion=output, system=persona")
    assert not bad and [m["content"] for m in rows[0]["prompt"]] == ["Be brief.", "Say 0.\n\nLoud 0."]
    assert [m["content"] for m in rows[1]["prompt"]] == ["Be brief.", "Say 1."] and rows[0].keys() == {"prompt", "completion"}
    with pytest.raises(Refused, match="has 'input', 'persona'; there are instruction, output"):
        sort_rows(write([dict(instruction="Say 1.", output="1")]), "prompt=instruction+input, completion=output, system=persona")
    shared = [dict(conversations=[dict(**{"from": "system"}, value="Be brief."), dict(**{"from": "human"}, value="Free?"), dict(**{"from": "gpt"}, value="Yes.")])]
    (row,), _ = sort_rows(write(shared), "messages=conversations")
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row.turns
    for odd in (7, ["a"], {"a": 1}):  # a value that is no text is a bad row, not a crash
        for key in ("instruction", "input", "output", "persona"):
            _, ((rule, where, _),) = sort_rows(write([ALPACA[0] | {key: odd}, ALPACA[1]]), "prompt=instruction+input, completion=output, system=persona")
            assert rule in ("empty", "role", "content") and where.endswith("line 1")


@pytest.mark.parametrize("keys, would", [
    (("instruction", "input", "output"), "prompt=instruction+input, completion=output"),
    (("instruction", "context", "response", "category"), "prompt=instruction+context, completion=response"),
    (("question", "answer"), "prompt=question, completion=answer"),
    (("prompt", "response"), "prompt=prompt, completion=response"),
    (("system", "conversations"), "messages=conversations, system=system"),
    (("a", "b"), "prompt=COLUMN, completion=COLUMN"),
])  # fmt: skip
def test_the_refusal_shows_what_would_work(write, keys, would):
    value = [{"from": "human", "value": "Free?"}, {"from": "gpt", "value": "Yes."}]
    file = write([{k: value if k == "conversations" else "Yes." for k in keys}])
    _, ((rule, _, why),) = sort_rows(file)
    assert rule == "columns" and f'columns="{would}"' in why and f"has the columns {', '.join(keys)}" in why
    if "COLUMN" not in would:
        assert len(sort_rows(file, would)[0]) == 1


def test_what_is_no_text_is_said_once(write):
    bad = [dict(prompt="How many?", completion=37)] * 3 + [dict(prompt=0, completion="None."), dict(prompt="Why?", completion=None)]
    _, found = sort_rows(write(bad))
    assert [(rule, "put quotes around it" in why) for rule, _, why in found] == [("content", True)] * 4 + [("empty", False)]
    with pytest.raises(Refused, match=r"5 of 5 rows.*line 1; .*line 2; .*line 3: has content 37; ") as said:
        read_rows(write(bad))
    assert str(said.value).count("has content 37") == 1


def test_files_of_other_programs(tmp_path):
    good = [dict(prompt=f"Say {i}.", completion=f"It is {i}!") for i in range(3)]
    lines = "\n".join(json.dumps(r) for r in good)
    (tmp_path / "marked.JSONL").write_text(lines, encoding="utf-8-sig")
    assert len(read_rows(tmp_path / "marked.JSONL")) == len(read_rows(tmp_path)) == 3
    (tmp_path / "rows.json").write_text(lines)
    with pytest.raises(Refused, match=r"call it \.jsonl"):
        read_rows(tmp_path / "rows.json")
    (tmp_path / "excel.csv").write_text("prompt;completion\nSay 1.;It is 1!\n")
    with pytest.raises(Refused, match="told apart by commas, not by ';'"):
        read_rows(tmp_path / "excel.csv")


def test_answers_to_one_prompt_are_held_out_together(write):
    rows = [dict(id=f"{i}-{k}", prompt=f"Say {i}.", completion=f"It is {i}, {k}!") for i in range(80) for k in range(4)]
    train, held, found = find_rows(write(rows))
    assert len(held["a tenth of data"]) % 4 == 0 and len(train) % 4 == 0 and not found
    once = rows[::4]  # each prompt once: by its id, as ever
    assert {r["id"] for r in find_rows(write(once))[1]["a tenth of data"]} == {r["id"] for r in once if in_held_out(sha256(r["id"].encode()).hexdigest(), 0.1)}


@pytest.mark.slow
def test_what_is_given_is_trained_examined_and_told(write, tmp_path, capsys):
    polite = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are polite.<|im_end|>\n{% endif %}"
    model = tmp_path / "model"
    tiny_model(model)
    (model / "chat_template.jinja").write_text(polite + CHATML + ASK)
    how = dict(data=write([{k: v for k, v in r.items() if k != "persona"} for r in ALPACA]), model=str(model), columns="prompt=instruction+input, completion=output")
    said = lint(**how, max_length=256, max_steps=2, warmup_steps=0)
    (f,) = said["findings"]
    assert (f["rule"], f["count"]) == ("hidden-system", 40) and "'You are polite.'" in f["says"] and 'system="…"' in f["says"]
    assert lint(**how, system="Be brief.", max_length=256, max_steps=2, warmup_steps=0)["findings"] == []
    few = how | dict(store=str(tmp_path / "store"), max_steps=2, batch_size=4, lora_r=2, max_length=256, warmup_steps=0, eval_rows=2)
    r = train(run="t", **few, system="Be brief.")
    store = Store(tmp_path / "store")
    folder = store.fetch(r["model"], tmp_path / "got")
    assert "> Be brief." in (folder / "README.md").read_text() and json.loads((folder / "waystation.json").read_text())["system"] == "Be brief."
    with pytest.raises(Refused, match=r"system was 'Be brief.', is ''"):
        train(run="t", **few)
    plain = train(run="u", **few)
    assert {x["question"] for x in plain["samples"]} == {x["question"] for x in r["samples"]}  # the same rows are held out
    assert plain["lint"] == "1 warning: hidden-system 40" and r["lint"] == "nothing found"
    assert "> You are polite." in (store.fetch(plain["model"], tmp_path / "plain") / "README.md").read_text()
    held = [x for x in ALPACA if (x["instruction"] + "\n\n" + x["input"]).strip().splitlines()[-1] in {s["question"] for s in r["samples"]}]
    asked = write([{k: v for k, v in x.items() if k != "persona"} for x in held], "held.jsonl")
    capsys.readouterr()
    base = {}
    for run, before in (("t", r), ("u", plain)):  # evaluate asks as the training did, without being told
        assert main(["evaluate", f"store:models/{run}/current", asked, "--columns", how["columns"], "--max-new", "2", "--json"]) == 0
        base[run] = json.loads(capsys.readouterr().out)["metrics"]["base"]["loss"]["value"]
        assert base[run] == pytest.approx(before["eval_loss"]["before"], abs=2e-2)
    assert base["t"] != base["u"]
