"""task="classify" on a tiny random encoder: labels that stay, ranks that are missing, kills that change nothing, what others can load."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from waystation.runtime import GateFailed, Refused
from waystation.stations.train import train
from waystation.store import Store
from waystation.questions import in_held_out
from waystation.training.lint import WATCHED
from waystation.training.scoring import calibration_error, macro_f1
from waystation.training.taxonomy import Labels, consistent, make_labels, read_levels

# The hash of Gae is among those that held_out="genus" takes.
TREE = {"K": ["Pa", "Pb"], "Pa": ["Ga", "Gb"], "Pb": ["Gc", "Gae"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_encoder(tmp_path_factory.mktemp("model"))


def random_encoder(folder):
    "A random BERT of two layers over 6-mers, without a pooler's weights, as published encoders are."
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=4105, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    BertModel(BertConfig(**sizes, pad_token_id=1, type_vocab_size=1), add_pooling_layer=False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tokenizer": "kmer6", "weights": "seeded random: never trained"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def rows(path, n=120, **change):
    "Sequences whose genus decides which bases are frequent; every seventh genus is unknown. Keyword arguments replace row 0's values."
    rng, made = random.Random(0), []
    weights = {"Ga": [9, 1, 1, 1], "Gb": [6, 6, 1, 1], "Gc": [1, 1, 9, 1], "Gae": [1, 1, 6, 6]}
    parent = {g: p for p in ("Pa", "Pb") for g in TREE[p]}
    for i in range(n):
        genus = list(weights)[i % 4]
        made.append(dict(sequence="".join(rng.choices("ACGT", weights[genus], k=60)), kingdom="K", phylum=parent[genus], genus=None if i % 7 == 3 else genus))
        made[-1]["depth"] = None if i % 5 == 2 else (-50.0 if parent[genus] == "Pa" else -400.0) + rng.random()
    made[0] |= change
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


@pytest.fixture
def few(model, tmp_path):
    "Parameters of a small run."
    return dict(
        run="t", store=str(tmp_path / "store"), task="classify", model=model, data=rows(tmp_path / "rows.jsonl"), text="sequence", labels="kingdom,phylum,genus",
        max_steps=6, batch_size=8, lora_r=4, lora_dropout=0.1, eval_steps=3, seal_steps=2, max_length=32, warmup_steps=1,
    )  # fmt: skip


@pytest.fixture
def go(few, tmp_path, monkeypatch):
    "Train a little; keyword arguments are the station's."
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    return lambda **change: train(**few | change)


def test_result(go, tmp_path):
    from waystation.stations.embed import embed

    how = dict(max_steps=40, learning_rate=0.01, held_out="genus", seal_steps=20, lora_dropout=0.0, target_modules="query,key,value,dense,word_embeddings")
    r = go(data=rows(tmp_path / "more.jsonl", 240), **how)
    assert r["levels"] == ["kingdom", "phylum", "genus"] and set(r["metrics"]) == {"rows", "unseen genus"}
    assert r["eval_loss"]["after"] < r["eval_loss"]["before"]
    seen = r["metrics"]["rows"]
    assert set(seen) == {"majority", "base", "neighbour", "tuned", "tuned_path"}
    assert seen["tuned"]["accuracy"]["phylum"]["hits"] > seen["majority"]["accuracy"]["phylum"]["hits"]
    assert seen["tuned_path"]["path"]["hits"] == seen["tuned_path"]["path"]["n"] == r["sets"]["rows"]["rows"]
    assert seen["tuned"]["accuracy"]["genus"]["n"] < seen["tuned"]["accuracy"]["phylum"]["n"], "a row without a genus has no part in the genus' figure"
    unseen = r["metrics"]["unseen genus"]["tuned"]
    assert "genus" not in unseen["accuracy"], "a genus that was never shown cannot be named"
    assert r["sets"]["unseen genus"]["not_in_training"]["genus"] == r["sets"]["unseen genus"]["rows"]
    json.dumps(r, allow_nan=False)
    assert go(data=str(tmp_path / "more.jsonl"), **how) == r, "a finished run is not computed again"

    with open(f"{r['adapter']}/labels.json", "rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == r["labels_sha256"]
    labels = Labels.load(f"{r['adapter']}/labels.json")
    assert list(labels.levels.values()) == [2.0, 1.8, 0.8] and labels.names[:2] == [["K"], ["Pa", "Pb"]]
    card, said = (Path(r["adapter"], n).read_text() for n in ("README.md", "waystation.json"))
    assert "nearest training row" in card and json.loads(said)["frozen_weights"]["sha256"] in card
    assert {"params", "metrics", "data_fingerprint", "versions"} <= json.loads(said).keys() and Path(r["adapter"], "lint.json").is_file()

    done = embed(run="t", store=str(tmp_path / "store"), source=str(tmp_path / "few.jsonl"), text="sequence", id="sequence", engine="torch",
                 model="store:models/t-encoder/current") if rows(tmp_path / "few.jsonl", 8) else {}  # fmt: skip
    assert (done["rows"], done["dim"], done["pooling"], done["weights"]) == (8, 32, "cls", f"{r['params']['model']} tuned by run 't'")


def test_the_encoder_that_is_sealed_is_the_tuned_one(go, model):
    "Merged weights give the hidden states that base and adapter give."
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForSequenceClassification

    r = go(learning_rate=0.02)
    labels = Labels.load(f"{r['adapter']}/labels.json")
    both = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(model, num_labels=sum(labels.sizes)), r["adapter"]).eval()
    ids = torch.arange(3, 23)[None]
    want = both.base_model.model.bert(ids).last_hidden_state
    torch.testing.assert_close(AutoModel.from_pretrained(r["encoder_folder"]).eval()(ids).last_hidden_state, want, atol=1e-5, rtol=1e-4)
    assert (AutoModel.from_pretrained(model).eval()(ids).last_hidden_state - want).abs().max() > 1e-3, "and it is not the base"


def card(report, base):
    "The lines with which a model's card loads it."
    from test_leave import snippet

    return snippet(Path(report["adapter"], "README.md").read_text(), report["adapter"], base)


def test_a_packaged_base_is_named_as_it_is_anywhere(go):
    from peft import AutoPeftModelForSequenceClassification as Auto
    from test_leave import paths_in

    from waystation.assets import fetch_asset
    from waystation.runtime import cache

    r = go(model="asset:kmer-random", max_steps=1, eval_steps=0)
    folder = Path(r["adapter"])
    assert json.loads((folder / "waystation.json").read_text())["base"] == "asset:kmer-random"
    assert "fetch_asset('kmer-random')" in (folder / "README.md").read_text() and paths_in(folder, cache()) == ["adapter_config.json"]
    exec(card(r, fetch_asset("kmer-random")), loaded := {})
    here = Auto.from_pretrained(folder, num_labels=loaded["model"].config.num_labels)  # PEFT's own way, where the folder is
    assert here.peft_config["default"].r == loaded["model"].peft_config["default"].r == 4


def test_an_encoder_that_did_not_arrive_whole_is_refused(go, model, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = Path(shutil.copytree(model, tmp_path / "spoilt"), "model.safetensors")
    kept = load_file(weights)
    save_file({k: w for k, w in kept.items() if "layer.1.output.dense" not in k}, weights, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"its weights cannot be read \(2 of its weights missing, such as bert.encoder.layer.1.output.dense.bias\)"):
        go(model=str(tmp_path / "spoilt"))
    weights.write_bytes(b"")
    with pytest.raises(Refused, match="its weights cannot be read"):
        go(model=str(tmp_path / "spoilt"))
    assert Store(str(tmp_path / "store")).list() == []


def test_one_flat_label_from_csv(go, model, tmp_path):
    "Saved so that transformers and PEFT load it, by the lines of its card, and answer with the same logits as here."
    from waystation.training import classifier

    lines = ["text,intent", *(f"{'ACGGTC' * (i % 5 + 1)}{'ACGT'[i % 4] * 9},{['pay', 'ask', 'close'][i % 3]}" for i in range(60))]
    (tmp_path / "intents.csv").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    kept = {}
    answers = classifier.answers

    def spy(model, data, labels, tick):
        with torch.inference_mode():
            batch = classifier.collate(data, 1)
            kept["logits"], kept["batch"] = model.eval()(**batch).logits, batch
        return answers(model, data, labels, tick)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(classifier, "answers", spy)
        r = go(data=str(tmp_path / "intents.csv"), text="text", labels="intent", held_out="", learning_rate=0.02)
    assert r["levels"] == ["intent"] and "path" not in r["metrics"]["rows"]["tuned"] and "tuned_path" not in r["metrics"]["rows"]
    exec(card(r, model), shown := {})
    found = shown["model"].eval()
    with torch.inference_mode():
        torch.testing.assert_close(found(**kept["batch"]).logits, kept["logits"], atol=1e-5, rtol=1e-4)


def test_a_protein_model(go, tmp_path):
    "ESM has rotary positions, a vocabulary of letters and no pooler; LoRA, heads and the sealed encoder are the same."
    from transformers import EsmConfig, EsmModel

    from waystation.embedding.engine import embed_texts

    torch.manual_seed(0)
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    EsmModel(EsmConfig(vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=66,
                       pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", token_dropout=True),
             add_pooling_layer=False).save_pretrained(tmp_path / "esm")  # fmt: skip
    (tmp_path / "esm/vocab.txt").write_text("\n".join(letters))
    made = [dict(text="".join(random.Random(i).choices("LAGVSE" if i % 2 else "KRTDNQ", k=20)), family="ab"[i % 2]) for i in range(60)]
    for name, some in (("data", made[:48]), ("eval_data", made[48:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    files = {k: str(tmp_path / f"{k}.jsonl") for k in ("data", "eval_data")}
    r = go(model=str(tmp_path / "esm"), text="text", labels="family", max_steps=20, learning_rate=0.02, eval_steps=0, **files)
    assert (r["n_train"], r["sets"]["rows"]["rows"]) == (48, 12)
    assert r["metrics"]["rows"]["tuned"]["accuracy"]["family"]["hits"] == r["sets"]["rows"]["rows"], "two alphabets that share no letter"
    assert embed_texts(r["encoder_folder"], ["LAGV", "KRTD"], "", 0, 0, "").shape == (2, 32)


@pytest.mark.parametrize("stop_at, features", [(2, "depth"), (6, "")])
def test_a_kill_changes_nothing(go, tmp_path, power_goes, stop_at, features):
    whole = go(store=str(tmp_path / "undisturbed"), features=features)
    power_goes(stop_at, lambda: go(features=features))
    resumed = go(features=features)
    assert resumed["resumed_from"] == stop_at
    for key in ("adapter_sha256", "labels_sha256", "loss", "evals", "metrics", "eval_loss", "samples"):
        assert resumed[key] == whole[key], key


@pytest.mark.parametrize("features", ["", "depth"])
def test_halved_rows_learn_the_same(go, features):
    "Every seventh genus is unknown, so that the halves of a step know it unequally often; and held-out rows are not a multiple of what is taken at once."
    how = dict(features=features, lora_dropout=0.0, max_steps=4, eval_steps=2, learning_rate=0.02)
    whole, fewer = go(run="whole", **how), go(run="fewer", batch_size=2, grad_accum=4, **how)
    for key in ("loss", "evals"):
        for (s, a), (t, b) in zip(whole[key], fewer[key], strict=True):
            assert s == t and a == pytest.approx(b, rel=1e-4), key
    assert whole["eval_loss"]["before"] == pytest.approx(fewer["eval_loss"]["before"], rel=1e-5)


def test_features_beside_the_sequence(go, model, tmp_path):
    "What depth tells is learnt by a branch that is saved, and whoever does not know of it loads the rest."
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    r = go(features="depth", labels="phylum,genus", max_steps=30, learning_rate=0.02, lora_dropout=0.0)
    seen = r["metrics"]["rows"]
    assert {"tuned_text", "tuned_features"} <= set(seen)
    n = seen["tuned_features"]["accuracy"]["phylum"]
    assert n["hits"] >= 0.75 * n["n"], "four of five samples have a depth, and it decides"
    assert json.loads(Path(r["adapter"], "features.json").read_text())["columns"] == ["depth"]
    sizes = Labels.load(f"{r['adapter']}/labels.json").sizes
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=sum(sizes))
    found = PeftModel.from_pretrained(base, r["adapter"]).eval()
    logits = found(torch.arange(3, 23)[None]).logits
    assert logits.shape == (1, sum(sizes))
    exec(card(r, model), shown := {})
    torch.testing.assert_close(shown["model"].eval()(torch.arange(3, 23)[None]).logits, logits)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"labels": "kingdom,phyllum"}, r"labels: .* has no column 'phyllum'; its columns are sequence, kingdom, phylum, genus, depth"),
        ({"labels": ""}, "labels='' names nothing"),
        ({"labels": "phylum,phylum"}, "'phylum' twice"),
        ({"labels": "phylum=heavy"}, "'phylum=heavy' is not a level"),
        ({"labels": "kingdom"}, r"every training row has the same kingdom \(K\)"),
        ({"text": "seq"}, "text: .* has no column 'seq'"),
        ({"held_out": "family"}, "held_out: .* has no column 'family'"),
        ({"held_out": "kingdom"}, "held_out"),
        ({"data": "nothing.csv"}, "data='nothing.csv' does not exist"),
        ({"features": "deepness"}, "features: .* has no column 'deepness'"),
        ({"features": "genus"}, "features: genus='G[a-z]+' is not a number"),
        ({"method": "qlora"}, "method='qlora'"),
        ({"target_modules": "query,q_proj"}, "no q_proj; its linear modules are dense, key, query, value, word_embeddings"),
        ({"max_length": 65}, "beyond the model's 64 positions"),
        ({"eval_steps": 7}, "eval_steps=7 never fires: there are 6 steps"),
        ({"task": "sort"}, "task='sort'"),
    ],
)
def test_refused(go, tmp_path, change, says):
    with pytest.raises(Refused, match=says):
        go(**change)
    assert Store(str(tmp_path / "store")).list() == []


def held_file(few, path):
    "The rows of a small run that are held out, as a file."
    lines = Path(few["data"]).read_text().splitlines()
    path.write_text("\n".join(x for x in lines if in_held_out(hashlib.sha256(json.loads(x)["sequence"].encode()).hexdigest(), 0.1)))
    return str(path)


@pytest.mark.parametrize("features", ["", "depth"])
def test_evaluate(go, few, tmp_path, capsys, features):
    "The command finds what the step's own report says, on the same rows; with a branch too, which outvotes the text here."
    from waystation.cli import main

    r = go(run="e", max_steps=20 if features else 4, eval_steps=0, features=features, learning_rate=0.02)
    assert json.loads(Path(r["adapter"], "waystation.json").read_text())["base"] == few["model"]
    file = held_file(few, tmp_path / "held.jsonl")
    assert main(["evaluate", "store:models/e/current", file, "--store", few["store"], "--text", "sequence", "--json"]) == 0
    out = capsys.readouterr()
    said = json.loads(out.out)
    assert said["levels"] == ["kingdom", "phylum", "genus"] and said["rows"] == r["sets"]["rows"]["rows"] and said["unknown"]["genus"] == 0
    names = {"tuned": "tuned"} | ({"tuned_text": "tuned, text alone", "tuned_features": "tuned, features alone"} if features else {})
    assert set(said["metrics"]) == {"base", *names.values()} and "evaluate" in out.err
    for who, name in names.items():
        for level in said["levels"]:
            assert said["metrics"][name][f"accuracy {level}"] == r["metrics"]["rows"][who]["accuracy"][level], (name, level)
    assert {"macro_f1 genus", "calibration phylum", "path"} <= said["metrics"]["base"].keys()
    if features:
        assert said["metrics"]["tuned"] != said["metrics"]["tuned, text alone"]
        assert "waystation evaluate` asks both" in " ".join(Path(r["adapter"], "README.md").read_text().split())


def test_evaluate_on_strange_labels(go, few, tmp_path, capsys):
    "Rows that count in no figure are counted; where there are no others, the classifier's classes are named."
    from waystation.cli import main

    go(run="e", max_steps=1, eval_steps=0)
    made = [json.loads(line) for line in Path(held_file(few, tmp_path / "held.jsonl")).read_text().splitlines()]
    file = tmp_path / "new.jsonl"
    ask = ["evaluate", "store:models/e/current", str(file), "--store", few["store"], "--text", "sequence"]
    file.write_text("".join(json.dumps(r | dict(genus="Gnew", sequence=r["sequence"] if i else None)) + "\n" for i, r in enumerate(made)))
    assert main(ask) == 0
    told = capsys.readouterr().out
    assert f"genus: {len(made) - 1} of {len(made) - 1} rows have a label that is no class of it" in told and "left out: 1 row with no text" in told
    file.write_text("".join(json.dumps(r | dict(kingdom="0", phylum="1", genus="2")) + "\n" for r in made))
    assert main(ask) == 2
    assert f"none of its {len(made)} rows has a label that this classifier knows (kingdom: 'K'; phylum: 'Pa', 'Pb'; genus: 'Ga" in capsys.readouterr().err


def test_early_stop(go, few):
    "Rows of the training side choose the checkpoint; the held-out figures are those of the checkpoint that was chosen."
    r = go(run="stopped", max_steps=20, eval_steps=2, early_stop=2, learning_rate=0.5, seal_steps=0, keep_last=1)
    losses = dict(map(tuple, r["evals"]))
    assert r["best_step"] == min(losses, key=losses.get) and r["steps"] == min(20, r["best_step"] + 4) and r["n_validation"] > 0
    store = Store(few["store"])
    best = store.read(f"runs/stopped/train/1/checkpoints/{r['best_step']}")
    assert best.files["adapter_model.safetensors"]["sha256"] == r["adapter_sha256"] and best.meta["eval_loss"] == pytest.approx(losses[r["best_step"]], abs=1e-4)
    plain = go(run="plain", max_steps=1, eval_steps=0)
    assert plain["n_train"] == r["n_train"] + r["n_validation"] and plain["eval_loss"]["before"] == pytest.approx(r["eval_loss"]["before"], abs=1e-5)


def test_gates_on_levels(go, few):
    "Both names stay where they were, or both move; the names of the figures are known before training."
    small, store = dict(run="c", max_steps=1, eval_steps=0, held_out="genus"), Store(few["store"])
    with pytest.raises(GateFailed, match=r"eval_loss <= 0: failed.*models/c-encoder/current is not made"):
        go(**small, gates="eval_loss <= 0")
    assert store.refs("models") == {}
    with pytest.raises(Refused, match=r"'accuracy.species >= 0.5' names no figure .* accuracy.kingdom, accuracy.phylum, accuracy.genus, macro_f1.kingdom") as e:
        go(**small | dict(run="d"), gates="accuracy.species >= 0.5")
    r = go(**small, gates="path >= 0, unseen_genus.accuracy.phylum >= 0")
    assert set(r["figures"]) == set(str(e.value).split("figures are ")[1].split(", "))
    assert store.refs("models") == {"models/c/current": "models/c/v1", "models/c-encoder/current": "models/c-encoder/v1"}


def labelled(path, name, seed, n=40):
    "A file of rows without two alike; `name` gives the i-th text, in the order of hashes as held-out rows have it, its label."
    rng = random.Random(seed)
    texts = sorted(("".join(rng.choices("ACGT", k=40)) for _ in range(n)), key=lambda x: hashlib.sha256(x.encode()).hexdigest())
    path.write_text("text,label\n" + "".join(f"{text},{name(i, text)}\n" for i, text in enumerate(texts)))
    return str(path)


def test_nothing_to_measure_is_refused(go, few, tmp_path, capsys):
    "Of held-out rows: all, the few that eval_rows leaves, those to stop by, and those whose one known level weighs nothing. A loss of 0 passed each gate here."
    from waystation.cli import main

    how = dict(text="text", labels="label", gates="eval_loss <= 0.3")
    once = labelled(tmp_path / "once.csv", lambda i, text: f"c{i}", 3)
    data, held = labelled(tmp_path / "data.csv", lambda i, text: "ab"[i % 2], 1), labelled(tmp_path / "held.csv", lambda i, text: "xab"[min(i, 2)], 2, 8)
    watched = labelled(tmp_path / "watched.csv", lambda i, text: f"w{i}" if in_held_out("validation " + text, WATCHED) else "ab"[i % 2], 1)
    for change, says in ((dict(data=once), r"no row of the held-out set 'rows' \(of \d\) has a label that a training row has, so there is nothing to measure"),
                         (dict(data=data, eval_data=held, eval_rows=1), r"\(of 1\) has a label"),
                         (dict(data=watched, eval_data=held, early_stop=1), "no row of the held-out set 'to stop by'")):  # fmt: skip
        with pytest.raises(Refused, match=says):
            go(**how | change)
    some = [json.loads(line) | dict(sequence="A" * i) for i, line in enumerate(Path(few["data"]).read_text().splitlines()[:9], 1)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(r | dict(genus=None)) + "\n" for r in some))
    with pytest.raises(Refused, match="has a genus that a training row has"):
        go(labels="phylum=0,genus", eval_data=str(tmp_path / "bare.jsonl"))
    assert Store(few["store"]).list() == []
    assert main(["lint", once, "--task", "classify", "--labels", "label", "--model", few["model"]]) == 2
    assert "error   unseen-labels" in capsys.readouterr().out


def test_rows_of_labels_that_training_never_saw(go, few, tmp_path, capsys):
    "They leave the figures, and whoever reads any of lint, log, report, gate or card is told how many did."
    from waystation.cli import headline, main

    data = labelled(tmp_path / "data.csv", lambda i, text: "ab"[i % 2], 1)
    held = labelled(tmp_path / "held.csv", lambda i, text: "abx"[min(i, 2)], 2, 17)
    r = go(data=data, eval_data=held, text="text", labels="label", max_steps=1, eval_steps=0, warmup_steps=0, gates="eval_loss <= 9")
    assert r["sets"]["rows"] == dict(rows=17, not_in_training=dict(label=15)) and r["metrics"]["rows"]["tuned"]["accuracy"]["label"]["n"] == 2
    assert r["figures"]["eval_loss"]["n"] == r["gates"][0]["n"] == 2 and "passed with" in dict(headline(r))["gate"]
    assert dict(headline(r))["rows, unseen"].startswith("label 15 of 17 ") and "1 warning: unseen-labels 15" in dict(headline(r))["lint"]
    assert "occurs in the training rows (of rows, label 15 of 17 do not)" in " ".join(Path(r["adapter"], "README.md").read_text().split())
    assert main(["lint", data, "--eval-data", held, "--task", "classify", "--labels", "label", "--model", few["model"]]) == 0
    assert "15 of 17 held-out rows have a label that training never saw (label 15)" in capsys.readouterr().out


def test_a_level_that_no_held_out_row_has_is_not_measured():
    "It has no loss of 0, which would make that of the others look smaller."
    from transformers import EvalPrediction

    from waystation.training.classifier import Sorter

    sorter = Sorter.__new__(Sorter)
    sorter.labels = Labels({"a": 3.0, "b": 1.0}, [["x", "y"], ["p", "q"]], [[], []])
    one, both = (sorter.all_rows(EvalPrediction(np.array(loss), np.array(label)))["loss"] for loss, label in (
        ([[0.5, 0], [0.7, 0]], [[0, -1], [1, -1]]), ([[0.5, 0], [0.7, 1]], [[0, -1], [1, 0]])))  # fmt: skip
    assert one == pytest.approx(0.6) and both == pytest.approx((3 * 0.6 + 1) / 4)


def test_held_out_rows_that_were_learnt_are_refused(go, tmp_path):
    with pytest.raises(Refused, match="texts stand both in the training rows"):
        go(eval_data=rows(tmp_path / "same.jsonl", 20))


def test_a_class_that_was_seen_once(go, tmp_path):
    "It has a place in the map and a row in the head, whatever side of the split it fell on."
    r = go(data=rows(tmp_path / "once.jsonl", genus="Once", phylum="Alone", sequence="ACGTGCA" * 8), eval_steps=0)
    labels = Labels.load(f"{r['adapter']}/labels.json")
    held = r["sets"]["rows"]["not_in_training"]
    assert ("Once" in labels.names[2]) == ("Alone" in labels.names[1]) == (held["genus"] == 0)
    if "Once" in labels.names[2]:
        assert (labels.names[1].index("Alone"), labels.names[2].index("Once")) in labels.pairs[2]


def test_label_maps_are_the_same_in_every_process(tmp_path):
    "Whatever the seed of `hash` and the order of rows."
    data = [dict(a=f"c{i % 7}", b=f"é{i % 29}") for i in range(500)]
    make_labels(read_levels("a,b"), data).save(tmp_path / "here")
    code = "import sys; from waystation.training.taxonomy import *; make_labels(read_levels('a,b'), eval(sys.argv[1])[::-1]).save(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, repr(data), tmp_path / "there"], env=os.environ | {"PYTHONHASHSEED": "1"}, check=True)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_a_missing_rank_teaches_nothing(go, tmp_path):
    "A run in which a column is empty but for two rows trains that level on these two; the others move no weight of its head."
    data = [json.loads(line) for line in Path(rows(tmp_path / "a.jsonl")).read_text().splitlines()]
    from waystation.training.taxonomy import level_losses, over_levels

    labels = make_labels(read_levels("phylum,genus"), data)
    numbers = torch.tensor(labels.numbers(data))
    assert 0 < (numbers[:, 1] < 0).sum() < len(data)
    logits = torch.randn(len(data), sum(labels.sizes), requires_grad=True)
    over_levels(level_losses(logits, numbers, labels.sizes).sum(0), (numbers >= 0).sum(0), [1.8, 0.8]).backward()
    genus = logits.grad[:, labels.sizes[0]:].abs().sum(1)
    assert ((genus > 0) == (numbers[:, 1] >= 0)).all() and (logits.grad[:, :labels.sizes[0]].abs().sum(1) > 0).all()


def test_figures_agree_with_scikit_learn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    for n in (1, 5, 200):
        t, s = rng.integers(0, 9, n), rng.integers(0, 12, n)
        assert macro_f1(t, s) == pytest.approx(f1_score(t, s, average="macro", zero_division=0))
    sure = rng.random(1000)
    assert calibration_error(sure, rng.random(1000) < sure) < 0.06 < 0.2 < calibration_error(sure, np.zeros(1000, bool))


def test_a_path_of_heads_that_disagree():
    labels = Labels({"a": 1.0, "b": 1.0}, [["x", "y"], ["p", "q"]], [[], [(0, 0), (1, 1)]])
    assert consistent(np.array([[0, 0], [0, 1], [1, 1]]), labels).tolist() == [True, False, True]
