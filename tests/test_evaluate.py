"""`waystation evaluate`: the figures of a model and its base, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import rows, tiny_run

from waystation.cli import main
from waystation.runtime import Refused
from waystation.store import Store
from waystation.training.chat import code_rows, read_rows
from waystation.training.report import base_of, calibrate, known_pairs, overlap, report_answers, unanswerable


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "An adapter of a tiny random model, whose base lies in a folder."
    tmp = tmp_path_factory.mktemp("evaluate")
    return tmp, tiny_run(tmp, method="lora")


def grounded(path, n=12):
    made = []
    for i in range(n):
        passages = [{"label": f"D{j}", "text": f"Card {j}. Annual fee: ${j}1.00 [D{j}]"} for j in (i, i + 1)]
        text = "\n".join(p["text"] for p in passages) + f"\nWhat is the fee of card {i}?"
        made.append(dict(id=f"r{i}", prompt=text, completion=f"The annual fee of card {i} is ${i}1.00. [D{i}]", answer=f"${i}1.00", cite=f"D{i}", passages=passages))
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return path


def test_the_command_agrees_with_the_report_of_the_training(trained, tmp_path, monkeypatch, capsys):
    tmp, r = trained
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp / "cache"))
    held = {json.dumps(x["question"]) for x in r["samples"]}
    file = tmp_path / "held.jsonl"
    lines = (tmp / "rows.jsonl").read_text().splitlines()
    file.write_text("\n".join(x for x in lines if json.dumps(json.loads(x)["prompt"]) in held))
    assert r["n_eval"] == len(held) < 5
    assert main(["evaluate", "store:models/t/current", str(file), "--store", str(tmp / "store"), "--max-new", "16", "--form", r"It is \d+!", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    for who, when in (("base", "before"), ("tuned", "after")):
        m = said["metrics"][who]
        assert m["loss"]["value"] == pytest.approx(r["eval_loss"][when], abs=2e-2) and m["loss"]["low"] < m["loss"]["value"] < m["loss"]["high"]
        assert (m["exact"]["n"], m["form"]["n"], m["seconds an answer"]["n"]) == (len(held),) * 3
    assert said["metrics"]["base"]["loss"]["value"] > said["metrics"]["tuned"]["loss"]["value"]
    assert main(["evaluate", str(tmp / "model"), str(file), "--max-new", "4", "--rows", "1"]) == 0
    told = capsys.readouterr().out
    assert told.split()[0] == "model" and "perplexity" in told and "tuned" not in told


@pytest.mark.parametrize("max_length, precision", [(128, "float32"), (80, "float32"), (128, "bfloat16")])
def test_one_loss_everywhere(tmp_path, monkeypatch, max_length, precision):
    "Rows of two words and of twenty-two, in batches of two: what a token weighs depends neither on its batch nor on who asks. `merge` cuts rows as training did."
    from waystation.training import report, trainer
    from waystation.training.merge import merge

    monkeypatch.setenv("WAYSTATION_PRECISION", precision)
    for part in (report, trainer):
        monkeypatch.setattr(part, "generate_answers", lambda model, tokenizer, rows, **kw: [""] * len(rows))
    held = [{"prompt": f"Spell {i}.", "completion": "so " * n + "it is."} for i, n in enumerate((1, 20, 0, 5, 2))]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    r = tiny_run(tmp_path, method="lora", batch_size=2, max_steps=2, max_length=max_length, eval_data=str(tmp_path / "held.jsonl"))
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "store"))
    merged = merge("models/t/v1", str(tmp_path / "store"))["metrics"]
    assert merged["adapter"]["loss"]["value"] == pytest.approx(r["eval_loss"]["after"], rel=5e-5) and r["cut_rows"] == (max_length == 80)
    found = report_answers(Path(r["adapter"]), read_rows(tmp_path / "held.jsonl"), store, max_new=1)["metrics"]
    for who, when in (("base", "before"), ("tuned", "after")):
        assert (found[who]["loss"]["value"] == pytest.approx(r["eval_loss"][when], rel=5e-5)) == (max_length == 128)


def test_grounded_rows(trained, tmp_path, monkeypatch):
    tmp, _ = trained
    asked = read_rows(grounded(tmp_path / "g.jsonl"))
    bare = unanswerable(asked)
    assert len(bare) == 12 and all(r["answer"] not in r["prompt"][-1]["content"] for r in bare)
    right, wrong = known_pairs(asked)
    assert min(overlap(right)) > max(overlap(wrong)) == 0
    made = calibrate(asked)
    assert made["missed"]["hits"] == made["fooled"]["hits"] == 0 and made["fooled"]["n"] == 12

    from waystation.training import report

    def scripted(model, tokenizer, rows, max_new, **kw):
        "Answers as expected where the passage is there, and a refusal where it is not."
        return [r["completion"][0]["content"] if r["answer"] in r["prompt"][-1]["content"] else "The passages do not say." for r in rows]

    monkeypatch.setattr(report, "generate_answers", scripted)
    m = report_answers(tmp / "model", asked, Store(str(tmp / "store")))["metrics"]
    share = {who: {k: x["hits"] / x["n"] for k, x in m[who].items() if "hits" in x} for who in m}
    whole = dict.fromkeys(("format", "citation", "answer", "both", "sentences that cite", "sentences supported", "refused, unanswerable"), 1)
    assert share["model"] == whole | {"refused, answerable": 0}
    assert share["word overlap"]["refused, unanswerable"] == 0 and share["word overlap"]["sentences that cite"] == 1
    few = report_answers(tmp / "model", asked, Store(str(tmp / "store")), limit=2)
    assert few["metrics"]["model"]["both"]["n"] == 2 and few["grounding"] == made, "two rows are asked about; what the measure is worth needs no model"
    constant = report_answers(tmp / "model", asked, Store(str(tmp / "store")), support=lambda pairs: [0.5] * len(pairs))["grounding"]
    assert constant["missed"]["hits"] == constant["missed"]["n"] or constant["fooled"]["hits"] == constant["fooled"]["n"], "a measure that tells nothing says so"


def test_rows_of_merge_are_not_below_zero(tmp_path):
    from waystation.training.merge import merge

    with pytest.raises(Refused, match="rows=-3 must not be below 0"):
        merge("models/t/v1", str(tmp_path), rows=-3)


def test_figures_for_a_person():
    from waystation.training.report import report_table

    made = [dict(value=x, n=3, low=x / 2, high=2 * x) for x in (0.01234, 12.345, 999.6, 1886.4, 1e30)]
    said = [line[1] for line in report_table({"model": {str(i): m for i, m in enumerate(made)}})[1:]]
    assert said == ["0.0123 n=3 [0.00617, 0.0247]", "12.3 n=3 [6.17, 24.7]", "1,000 n=3 [500, 1,999]", "1,886 n=3 [943, 3,773]", "1e+30 n=3 [5e+29, 2e+30]"]


def test_the_bar_ends_full(trained, tmp_path, monkeypatch):
    from waystation.training import report

    tmp, _ = trained
    told = []
    monkeypatch.setattr(report, "progress", lambda total, desc: (told.append(total), SimpleNamespace(update=lambda n: told.append(-n), close=lambda: None))[1])
    report_answers(tmp / "model", read_rows(grounded(tmp_path / "g.jsonl", 7)), Store(str(tmp / "store")), max_new=1)
    assert told[0] == 7 + 7 + 5 + 7 and sum(told) == 0 and len(told) > 4, "rows for the loss, answers, some of them alone, and without their passage"


def test_another_base_is_refused(trained, tmp_path, monkeypatch):
    tmp, r = trained
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp / "cache"))
    folder, store = Path(r["adapter"]), Store(str(tmp / "store"))
    assert base_of(folder, store) == tmp / "model"
    weights = tmp / "model/model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(Refused, match=r"was trained on .* with another content"):
            base_of(folder, store)
    finally:
        weights.write_bytes(kept)


def test_bad_input(trained, tmp_path, capsys):
    tmp, _ = trained
    file = rows(tmp_path / "rows.jsonl")
    for args, says in (((str(tmp / "no"), file), "does not exist"), ((str(tmp / "model"), file, "--form", "["), "not a regular expression"),
                       ((str(tmp / "model"), str(tmp / "no.jsonl")), "does not exist"), ((str(tmp / "cache"), file), "not a causal language model"),
                       ((str(tmp / "model"), file, "--refusal", "("), "refusal='('"), ((str(tmp / "model"), file, "--max-new", "0"), "max_new=0"),
                       (("nothing", file, "--rows", "-3"), "rows=-3 must not be below 0")):  # fmt: skip
        assert main(["evaluate", *args]) == 2
        assert says in capsys.readouterr().err


def test_row_losses_do_not_depend_on_their_company(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from waystation.training.report import row_losses
    from waystation.training.trainer import encode

    tmp, _ = trained
    tok = AutoTokenizer.from_pretrained(tmp / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp / "model").eval()
    data = encode(code_rows(read_rows(tmp / "rows.jsonl")[:10], tok), 128)[0]
    sums, counts = row_losses(model, data, 1)
    for i in (0, 9):
        ids = torch.tensor([data[i]["input_ids"]])
        labels = ids.masked_fill(torch.tensor([data[i]["completion_mask"]]) == 0, -100)
        assert counts[i] == sum(data[i]["completion_mask"])
        assert sums[i] / counts[i] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
