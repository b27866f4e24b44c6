"""Lint: each rule fires on a file made wrong on purpose, and none on the good file; what `train` does with it."""

import inspect
import json
import logging
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from waystation.cli import lint, main
from waystation.recipe import Job
from waystation.runtime import Refused
from waystation.stations.train import train
from waystation.store import Store
from waystation.training.lint import NEAR, copies, leaks, near, shingles

WORDS = "account bank card deposit fee gold limit loan mortgage month number paper rate saving silver term transfer travel week year".split()


def sentence(i, n=24):
    "Words that no other number has in this order."
    return " ".join(WORDS[(i * k * k + k * 7 + i) % 20] + str((i * 31 + k * 17) % 97) for k in range(1, n))


def made(n=40, **change):
    "Good rows; keyword arguments replace row 7's values."
    rows = [{"id": f"r{i}", "prompt": sentence(i), "completion": f"It is {i}: {sentence(i + 500, 6)}."} for i in range(n)]
    rows[7] |= change
    return rows


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def look(tmp_path, monkeypatch, model):
    "Lint some rows as the command does; rules by name."
    monkeypatch.setenv("WAYSTATION_STORE", str(tmp_path / "store"))

    def run(rows, **how):
        said = lint(**dict(data=write(tmp_path / "rows.jsonl", rows), model=model, max_length=512) | how)
        json.dumps(said, allow_nan=False)
        assert said["exit"] == (2 if any(f["level"] == "error" for f in said["findings"]) else 0)
        return {f["rule"]: f for f in said["findings"]}, said

    return run


def test_the_good_file_is_silent(look, tmp_path):
    rules, said = look(made())
    assert rules == {} and said["rows"] + sum(said["held_out"].values()) == 40
    assert sum(c for *_, c in said["tokens"]["bars"]) == 40 and "nothing found" in said["text"]
    pq.write_table(pa.Table.from_pylist(made()), tmp_path / "rows.parquet")
    assert look([], data=str(tmp_path / "rows.parquet"))[1]["tokens"] == said["tokens"]


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"completion": "[Generated answer for question 8]"}, "placeholder"),
        ({"completion": " \n"}, "empty"),
        ({"prompt": None}, "empty"),
        ({"prompt": [{"role": "boss", "content": "Do it"}]}, "role"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "empty"),
        ({"messages": [{"role": "user", "content": "Hello"}, {"role": "user", "content": "Hello"}]}, "role"),
        ({"prompt": "\ud83d"}, "content"),
        ({"prompt": [{"role": "user", "content": 7}]}, "content"),
        ({"prompt": 7}, "content"),
        ({"messages": 7, "prompt": None}, "empty"),
    ],
)
def test_bad_rows(look, change, rule):
    rules, said = look(made(**change))
    assert rules.keys() == {rule} and rules[rule]["level"] == "error" and rules[rule]["count"] == 1
    assert "rows.jsonl, line 8" in rules[rule]["first"][0] and said["rows"] + sum(said["held_out"].values()) == 39


def test_all_that_is_wrong_is_told_at_once(look, tmp_path):
    rows = [*made(), *[{"prompt": f"{i}?", "completion": "TODO"} for i in range(5)], "{not json", "[1]", '{"prompt": "x"}']
    rules, _ = look(rows, eval_data=write(tmp_path / "held.jsonl", [{"prompt": "New?", "completion": "null"}]), eval_steps=99, warmup_steps=50)
    assert {k: f["count"] for k, f in rules.items() if k != "placeholder"} == {"json": 2, "empty": 1, "evaluation": 1, "warm-up": 1}
    assert rules["placeholder"]["first"] == ["held.jsonl, line 1 has the placeholder 'null' as its answer; put the real one there"]  # of two files the last


def test_bytes_that_are_no_text(look, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(made()[0]).encode() + b'\n{"prompt": "Caf\xe9", "completion": "Oui"}\n')
    rules, _ = look([], data=str(tmp_path / "latin.jsonl"))
    assert "latin.jsonl, line 2 is not JSON in UTF-8" in rules["json"]["first"][0]
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Refused, match="not Parquet"):
        look([], data=str(tmp_path / "torn.parquet"))


def test_duplicates_exact_and_near(look, tmp_path):
    held = write(tmp_path / "held.jsonl", [{"prompt": sentence(900 + i), "completion": "It is new."} for i in range(3)])
    twin = dict(made()[3], id="twin")
    close = dict(made()[4], id="close", completion=made()[4]["completion"] + " Really.")
    rules, _ = look([*made(), twin, close], eval_data=held)
    assert {k: (f["level"], f["count"]) for k, f in rules.items()} == {"duplicate": ("warning", 1), "near-duplicate": ("warning", 1)}
    assert rules["duplicate"]["first"][0].startswith("rows.jsonl, line 41 as rows.jsonl, line 4")
    assert rules["near-duplicate"]["first"][0].startswith("rows.jsonl, line 42 as rows.jsonl, line 5")


def test_leaks_exact_and_near(look, tmp_path):
    new = [{"prompt": sentence(900 + i), "completion": "It is new."} for i in range(3)]
    same = dict(made()[5], completion="Another answer.")
    close = dict(made()[6], prompt=made()[6]["prompt"].upper() + "?!")
    rules, said = look(made(), eval_data=write(tmp_path / "held.jsonl", [*new, same]))
    assert rules["leak"]["level"] == "error" and rules["leak"]["count"] == 1 and said["exit"] == 2
    assert rules["leak"]["first"][0].startswith("held.jsonl, line 4 as rows.jsonl, line 6")
    rules, said = look(made(), eval_data=write(tmp_path / "held.jsonl", [*new, close]))
    assert rules.keys() == {"near-leak"} and said["exit"] == 0 and rules["near-leak"]["count"] == 1


def test_truncation(look):
    long = made(completion="word " * 200)
    rules, said = look(long)
    assert rules.keys() == {"cut"} and rules["cut"]["count"] == 1 and "1 of 40 rows" in rules["cut"]["says"] and "x" in said["text"]
    rules, _ = look(made(prompt="word " * 200))
    assert rules.keys() == {"lost"} and rules["lost"]["level"] == "error" and rules["lost"]["first"] == ["rows.jsonl, line 8"]


def test_settings_that_never_happen(look):
    assert look(made(), max_steps=10, eval_steps=10, warmup_steps=9)[0] == {}
    assert look(made(), max_steps=10, eval_steps=11)[0]["evaluation"]["level"] == "error"
    assert look(made(), max_steps=10, warmup_steps=10)[0]["warm-up"]["level"] == "warning"
    assert "warm-up" in look(made(), max_steps=0, epochs=2, batch_size=10, grad_accum=2, warmup_steps=4)[0]
    with pytest.raises(Refused, match="make no step"):
        look(made(), max_steps=0, epochs=0)


def test_rows_that_early_stop_sets_aside(look, tmp_path, model):
    "An epoch has fewer steps then, in lint as in train and in its preflight; an evaluation at the last step of before would never come."
    from waystation.training.fit import preflight

    how = dict(max_steps=0, batch_size=2, warmup_steps=0)
    plain = look(made(100), **how)[1]
    rules, said = look(made(100), **how, early_stop=1, eval_steps=1)
    assert rules == {} and said["set_aside"] > 2 and said["rows"] + said["set_aside"] == plain["rows"]
    assert said["steps"] == -(-said["rows"] // 2) < plain["steps"] and f"{said['set_aside']} to stop by" in said["text"]
    assert look(made(100), **how, eval_steps=plain["steps"])[0] == {}
    assert look(made(100), **how, eval_steps=plain["steps"], early_stop=1)[0].keys() == {"evaluation"}
    assert look(made(100), **how, early_stop=1)[0].keys() == {"early-stop"}
    labelled = dict(how, task="classify", labels="kind", model="asset:kmer-random", early_stop=1, eval_steps=1)
    labels = look([{"text": sentence(i), "kind": "ab"[i % 2]} for i in range(100)], **labelled)[1]
    assert labels["set_aside"] > 2 and labels["rows"] + labels["set_aside"] + sum(labels["held_out"].values()) == 100
    defaults = {k: v.default for k, v in inspect.signature(train).parameters.items()} | how | dict(model=model, data=write(tmp_path / "rows.jsonl", made(100)))
    assert [preflight(defaults | dict(early_stop=n, eval_steps=n), "t4")["steps"] for n in (0, 1)] == [plain["steps"], said["steps"]]


def test_edges(look, tmp_path):
    with pytest.raises(Refused, match="has no rows"):
        look([])
    assert look(made()[:1])[0].keys() == {"held-out"}
    odd = [("Ist das Öl? 🐢", "Ja. 漢字"), ("\u202eabc", "\U0001f422"), ("?!", "!!"), ("a\u0000b", "\u0301"), ("同じ質問です。", "はい。")]
    assert look([*made(), *({"prompt": p, "completion": c} for p, c in odd)])[0] == {}
    japanese = "このカードは本当に無料ですか。{}はい、そうです。それは無料です。"  # no blank between the words
    assert len(near([japanese.format("教えてください。"), japanese.format("教えて下さい。")])) == 1
    began = time.process_time()
    rules, _ = look([*made(), {"prompt": "x", "completion": "{{ [answer " * 9_000}], model=str(tmp_path / "nowhere"))
    assert rules == {} and time.process_time() - began < 20
    assert look([*made(), {"prompt": "Why?", "completion": "so " * 33_334}])[0].keys() == {"cut"}


def test_a_model_that_is_not_at_hand_is_said(look, tmp_path):
    _, said = look(made(), model=str(tmp_path / "nowhere"))
    assert said["tokens"] == {} and "does not exist" in said["no_tokens"] and "truncation was not either" in said["text"]


def test_labels(look, tmp_path):
    rows = [{"text": sentence(i), "kind": "ab"[i % 2], "all": "x"} for i in range(60)]
    how = dict(task="classify", labels="all,kind", model="asset:kmer-random")
    rules, said = look(rows, **how)
    assert rules.keys() == {"one-class"} and said["labels"]["kind"]["classes"] == 2 and said["labels"]["kind"]["once"] == 0
    assert look(rows, **how | dict(labels="kind"))[0] == {}
    more = [*rows, {"text": "", "kind": "a"}, {"text": "lonely words of mine", "kind": ""}, rows[0], dict(rows[1], text=rows[1]["text"] + " yes")]
    rules, said = look(more, **how | dict(labels="kind"), max_length=16)
    assert rules["empty"]["first"] == ["rows.jsonl, row 62"] and rules["duplicate"]["count"] == 1  # of two reasons the last
    assert rules["cut"]["count"] > 50 and rules.keys() & {"near-duplicate", "near-leak"}
    once = [*rows, {"text": "the only one of its kind", "kind": "c", "all": "x"}]
    assert look(once, **how | dict(labels="kind"))[1]["labels"]["kind"]["once"] == 1
    rules, said = look(rows, **how | dict(labels="kind", eval_data=write(tmp_path / "held.jsonl", rows[:3])))
    assert rules["leak"]["count"] == 3 and said["exit"] == 2
    assert look(rows, **how | dict(labels="all"))[0]["labels"]["level"] == "error"
    with pytest.raises(Refused, match="labels='' names nothing"):
        look(rows, task="classify")
    for other in (dict(columns="prompt=a, completion=b"), dict(system="Be brief.")):
        said = set()
        for ask in (lambda **p: look(rows, **p), lambda **p: train(data=str(tmp_path / "rows.jsonl"), **p)):
            with pytest.raises(Refused, match="are for questions and answers; classify names its columns by text, labels and features") as e:
                ask(**how | other)
            said.add(str(e.value))
        assert len(said) == 1, "in the same words"


def test_near_is_exact_about_what_it_tells():
    texts = [sentence(i) for i in range(300)]
    texts += [t.rsplit(" ", 2)[0] for t in texts[:100]] + [" ".join(t.split()[::-1]) for t in texts[100:200]]

    def share(a, b):
        a, b = (set(shingles([t])[0].tolist()) for t in (a, b))
        return len(a & b) / len(a | b)

    found = near(texts)
    assert all(share(texts[i], texts[j]) >= NEAR and abs(share(texts[i], texts[j]) - s) < 1e-3 and j < i for i, j, s in found)
    assert {i for i, *_ in found} == set(range(300, 400))
    assert near(texts) == found and near([]) == [] and near(["x"]) == []


def test_a_thousand_alike_make_no_million_pairs():
    row = {"prompt": [{"role": "user", "content": sentence(1, 60)}], "completion": [{"role": "assistant", "content": ""}]}
    rows = [dict(row, completion=[{"role": "assistant", "content": str(i)}]) for i in range(3000)]
    began = time.process_time()
    (found,) = copies(rows, {}, "sft")
    assert (found.rule, found.count) == ("near-duplicate", 2999) and time.process_time() - began < 10
    assert leaks(rows, {}, "sft") == []


def test_the_command(tmp_path, monkeypatch, model, capsys):
    monkeypatch.setenv("WAYSTATION_STORE", str(tmp_path / "store"))
    file = write(tmp_path / "rows.jsonl", made())
    assert main(["lint", file, "--model", model]) == 0 and "nothing found" in capsys.readouterr().out
    assert main(["lint", file, "--model", model, "--warmup-steps", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["rule"] == "warm-up"
    assert main(["lint", file, "--model", model, "--eval-steps", "500", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["exit"] == 2 and said["findings"][0]["level"] == "error"
    assert main(["lint", str(tmp_path / "none.jsonl")]) == 2 and "does not exist" in capsys.readouterr().err


def test_options_are_those_of_train():
    ours, trains = (inspect.signature(f).parameters for f in (lint, train))
    assert set(ours) <= set(trains)
    assert {k: p.default for k, p in ours.items() if k != "data"} == {k: trains[k].default for k in ours if k != "data"}


def test_train_seals_warnings_once_and_stops_at_errors(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    rows = [*made(), dict(made()[3], id="r3")]
    few = dict(run="t", store=str(tmp_path / "store"), model=model, data=write(tmp_path / "rows.jsonl", rows), max_steps=2, batch_size=4, lora_r=2,
               seal_steps=1, max_length=512, warmup_steps=2, eval_rows=2)  # fmt: skip
    store = Store(few["store"])
    with pytest.raises(Refused, match="eval_steps=3 never fires"):
        train(**few | dict(eval_steps=3))
    assert store.list() == []

    seal = Job.seal

    def cut(self, folder, kind, number=None, meta=None):
        name = seal(self, folder, kind, number, meta)
        if kind == "checkpoints":
            raise KeyboardInterrupt  # the power goes
        return name

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "waystation"):
        m.setattr(Job, "seal", cut)
        train(**few)
    assert "lint: 2 warnings: warm-up 1, duplicate 1" in caplog.text
    sealed = store.read("runs/t/train/1/lint").meta
    assert [f["rule"] for f in sealed["findings"]] == ["warm-up", "duplicate"]
    from waystation.training import trainer

    with monkeypatch.context() as m:
        m.setattr(trainer, "lint", lambda *_: pytest.fail("a resumed run lints again"))
        report = train(**few)
    assert report["resumed_from"] == 1 and report["lint"] == "2 warnings: warm-up 1, duplicate 1"
    with open(f"{report['adapter']}/lint.json") as f:
        assert json.load(f) == sealed
    with open(f"{report['adapter']}/README.md") as f:
        assert "Before the first step: 2 warnings" in f.read()
