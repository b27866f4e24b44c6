"""Training, in a handful of steps on a tiny random Llama: what is refused, and that a kill changes nothing."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from waystation.runtime import Interrupted, Refused
from waystation.stations.train import train
from waystation.store import Store


def tiny_model(folder):
    "A random Llama of two layers with a byte tokenizer."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate(["<|im_start|>", "<|im_end|>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tok.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def tiny_run(tmp, **how):
    "The report of four steps of a tiny random model, whose base lies in a folder beside its store and cache; for fixtures that several tests share."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("WAYSTATION_WANDB_MODE", "disabled")
        m.setenv("WAYSTATION_CACHE", str(tmp / "cache"))
        few = dict(max_steps=4, lora_r=4, max_length=128, warmup_steps=1)
        return train(run="t", store=str(tmp / "store"), model=tiny_model(tmp / "model"), data=rows(tmp / "rows.jsonl"), **few | how)


def rows(path, n=40, **change):
    "A file of rows; keyword arguments replace row 7's values."
    made = [{"id": f"r{i}", "prompt": f"Say {i}.", "completion": f"It is {i}!"} for i in range(n)]
    made[7] |= change
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


@pytest.fixture
def go(model, tmp_path, monkeypatch):
    "Train a little; keyword arguments are the station's."
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    few = dict(
        run="t", store=str(tmp_path / "store"), model=model, data=rows(tmp_path / "rows.jsonl"), max_steps=6, batch_size=8, lora_r=4,
        eval_steps=3, seal_steps=2, max_length=128, warmup_steps=1, lora_dropout=0.1, eval_rows=3,
    )  # fmt: skip
    return lambda **change: train(**few | change)


def test_result(go, tmp_path):
    r = go()
    assert [s for s, _ in r["loss"]] == [1, 2, 3, 4, 5, 6] and [s for s, _ in r["evals"]] == [3, 6]
    assert r["resumed_from"] == 0 and r["metrics"]["base"]["exact"]["n"] == 3 and len(r["samples"]) == 3
    assert r["eval_loss"]["after"] < r["eval_loss"]["before"]
    store = Store(str(tmp_path / "store"))
    assert store.resolve("models/t/current") == r["model"] == "models/t/v1"
    assert store.list("runs/t/train/1/checkpoints")[-1].endswith("/6")
    json.dumps(r, allow_nan=False)
    assert go() == r, "a finished run is not computed again"

    from peft import AutoPeftModelForCausalLM

    found = AutoPeftModelForCausalLM.from_pretrained(r["adapter"])
    weights = [w for n, w in found.named_parameters() if "lora_B" in n]
    assert all(w.abs().sum() > 0 for w in weights)
    with open(f"{r['adapter']}/adapter_model.safetensors", "rb") as f:
        assert hashlib.file_digest(f, "sha256").hexdigest() == r["adapter_sha256"]
    card = Path(r["adapter"], "README.md").read_text()
    assert r["model"] in card and "3 held-out rows" in card


@pytest.mark.parametrize("method, flag", [("rslora", "use_rslora"), ("dora", "use_dora")])
def test_methods_by_name(go, method, flag):
    from peft import AutoPeftModelForCausalLM

    r = go(method=method, max_steps=2, eval_steps=0)
    said = json.loads(Path(r["adapter"], "adapter_config.json").read_text())
    assert said[flag] and r["eval_loss"]["after"] < r["eval_loss"]["before"]
    assert set(said["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "all linear layers"
    names = [n for n, _ in AutoPeftModelForCausalLM.from_pretrained(r["adapter"]).named_parameters()]
    assert any("magnitude" in n for n in names) == (method == "dora")


def test_auto_is_all_linear_layers(go, monkeypatch):
    assert go(target_modules="auto", max_steps=1, eval_steps=0)["params"]["target_modules"] == "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj"


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_a_kill_changes_nothing(go, tmp_path, power_goes, stop_at):
    how = dict(lora_dropout=0.0 if stop_at == 4 else 0.1)  # without dropout, rows have their beginning in common
    whole = go(**how, store=str(tmp_path / "undisturbed"))
    power_goes(stop_at, lambda: go(**how))
    resumed = go(**how)
    assert resumed["resumed_from"] == stop_at
    for key in ("adapter_sha256", "loss", "evals", "metrics", "eval_loss", "samples"):
        assert resumed[key] == whole[key], key


def test_a_kill_in_a_later_epoch_changes_nothing(go, tmp_path, monkeypatch):
    "40 rows, fewer without the held-out ones, are five steps of eight; the kill falls into the second epoch."
    from waystation.recipe import Job

    how, seal = dict(max_steps=9, eval_steps=0, lora_dropout=0.1), Job.seal
    whole = go(**how, store=str(tmp_path / "undisturbed"))

    def cut(self, folder, kind, number=None, meta=None):
        name = seal(self, folder, kind, number, meta)
        if (kind, number) == ("checkpoints", 8):
            raise KeyboardInterrupt
        return name

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Job, "seal", cut)
        go(**how)
    resumed = go(**how)
    assert resumed["resumed_from"] == 8 and resumed["n_train"] < 40
    for key in ("adapter_sha256", "loss", "eval_loss"):
        assert resumed[key] == whole[key], key


def test_sigterm_seals_at_once(go, tmp_path):
    whole = go(store=str(tmp_path / "undisturbed"), seal_steps=0)
    from waystation.training import trainer

    class Late(trainer.Tuner):
        def compute_loss(self, model, *args, **kw):
            if model.training and self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().compute_loss(model, *args, **kw)

    with pytest.MonkeyPatch.context() as m, pytest.raises(Interrupted, match="sealed at step 3"):
        m.setattr(trainer, "Tuner", Late)
        go(seal_steps=0)
    resumed = go(seal_steps=0)
    assert resumed["resumed_from"] == 3 and resumed["adapter_sha256"] == whole["adapter_sha256"]


def test_messages_and_parquet_train_alike(go, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = [json.loads(line) for line in Path(rows(tmp_path / "plain.jsonl")).read_text().splitlines()]
    said = [
        {"id": r["id"], "messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in plain
    ]
    pq.write_table(pa.Table.from_pylist(said), tmp_path / "said.parquet")
    a, b = go(run="a", max_steps=2, eval_steps=0), go(run="b", max_steps=2, eval_steps=0, data=str(tmp_path / "said.parquet"))
    assert a["adapter_sha256"] == b["adapter_sha256"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"task": "dpo"}, "task='dpo'"),
        ({"method": "adalora"}, "method='adalora'"),
        ({"target_modules": "q_proj,c_attn"}, "no c_attn; its linear modules are down_proj, gate_proj, k_proj"),
        ({"eval_steps": 7}, "eval_steps=7 never fires: there are 6 steps"),
        ({"max_length": 513}, "beyond the model's 512 positions"),
        ({"max_length": 20}, "their completion would be lost"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is no number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is no number"),
        ({"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
        ({"max_new": -1}, "max_new=-1 must not be below 0"),
        ({"labels": "intent"}, "labels='intent' is of task='classify' and would do nothing in task='sft'"),
    ],
)
def test_refused_parameters(go, tmp_path, change, says):
    with pytest.raises(Refused, match=says):
        go(**change)
    assert Store(str(tmp_path / "store")).list() == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"completion": "[Generated answer for question 8]"}, "line 8 has the placeholder"),
        ({"completion": "  "}, "line 8 has an empty completion"),
        ({"prompt": [{"role": "boss", "content": "Do it"}]}, "role 'boss'"),
        ({"completion": None}, "line 8 has no completion"),
            ({"completion": 37}, "line 8 has content 37"),
    ],
)
def test_refused_rows(go, tmp_path, change, says):
    with pytest.raises(Refused, match=says):
        go(data=rows(tmp_path / "bad.jsonl", **change))


def spoil(folder, how):
    "What an interrupted copy leaves of a model, or a config of another one."
    from safetensors.torch import load_file, save_file

    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "none":
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif how == "gap":
        save_file({k: w for k, w in load_file(weights).items() if "lm_head" not in k}, weights, metadata={"format": "pt"})
    elif how == "other":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    else:
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("how, says", [("none", "its weights cannot be read .*no file named model.safetensors"), ("cut", "its weights cannot be read .*incomplete"),
                                       ("gap", "1 of its weights missing, such as lm_head.weight"), ("other", "its weights cannot be read .*mismatched"),
                                       ("tokenizer", "its tokenizer cannot be read")])  # fmt: skip
def test_a_model_that_did_not_arrive_whole_is_refused(go, model, run, tmp_path, capsys, how, says):
    "By everything that opens one; transformers itself would fill in at random what is missing."
    spoil(folder := Path(shutil.copytree(model, tmp_path / "spoilt")), how)
    for method in ("qlora", "lora") if how != "other" else ("lora",):  # packed weights have no shape of their own that would not fit
        with pytest.raises(Refused, match=f"model='{folder}': .*{says}.*; give a folder"):
            go(model=str(folder), method=method)
    assert Store(str(tmp_path / "store")).list() == []
    capsys.readouterr()  # what W&B says when it is imported
    for command in (("chat", folder, "--once", "Who?"), ("evaluate", folder, tmp_path / "rows.jsonl", "--rows", 1)):
        assert re.search(says, run(*command, "--store", tmp_path / "store", code=2))


def test_an_adapter_is_no_model_to_train(go, tmp_path):
    from peft import LoraConfig

    for name, more, says in (("adapter", (), "merge it first, then give store:models/RUN-merged"), ("classifier", ("labels.json",), "store:models/RUN-encoder")):
        LoraConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path / name)
        for file in more:
            (tmp_path / name / file).write_text("{}")
        place = Store(str(tmp_path / "store"))
        place.seal(tmp_path / name, f"models/{name}/v1", {})
        for how in ({}, dict(task="classify", labels="completion", text="prompt")):
            with pytest.raises(Refused, match=f"model='store:models/{name}/v1' is an adapter, .*{says}"):
                go(model=f"store:models/{name}/v1", **how)


def test_rows_on_both_sides_are_refused(go, tmp_path):
    with pytest.raises(Refused, match="40 prompts stand both"):
        go(eval_data=rows(tmp_path / "same.jsonl"))


def test_learns_what_trl_learns(go, tmp_path, monkeypatch):
    "Our loss over completions alone gives the training that TRL's own loss gives."
    from trl import SFTTrainer

    from waystation.training import trainer

    ours = go(run="ours", lora_dropout=0.0)
    monkeypatch.setattr(trainer.Tuner, "compute_loss", SFTTrainer.compute_loss)
    monkeypatch.setattr(trainer, "lay_flat", lambda *_: False)
    trls = go(run="trls", lora_dropout=0.0)
    for (_, a), (_, b) in zip(ours["loss"], trls["loss"], strict=True):
        assert a == pytest.approx(b, rel=2e-2)


def test_another_number_of_threads_is_said(go, power_goes, caplog):
    "Once, by who finds out; the checkpoints remember it, so that the report has it however often the run is cut off afterwards."
    threads, how = torch.get_num_threads(), dict(max_steps=4, seal_steps=1, eval_steps=0)
    try:
        power_goes(1, lambda: go(**how))
        torch.set_num_threads(threads + 1)
        power_goes(3, lambda: go(**how))
        said = [r.getMessage() for r in caplog.records if "under other conditions" in r.getMessage()]
        report = go(**how)
    finally:
        torch.set_num_threads(threads)
    assert len(said) == 1 and f"after step 1 it went on under other conditions (threads was {threads}, is {threads + 1})" in said[0]
    assert report["resumed_from"] == 3 and report["resume_notes"] == said and caplog.text.count("under other conditions") == 1


def test_changed_rows_are_refused_with_the_difference(go, tmp_path, power_goes):
    "Which file, how large it was and is, and the first row that differs; the rows as they were go on."
    import pyarrow as pa
    import pyarrow.parquet as pq

    from waystation.rows import changes, facts

    file, how = tmp_path / "rows.jsonl", dict(max_steps=2, seal_steps=1, eval_steps=0)
    power_goes(1, lambda: go(**how))
    was, lines = file.read_text(), file.read_text().splitlines(keepends=True)
    changed = r"data \(content\) was .*rows.jsonl changed \([\d,]+ -> [\d,]+ bytes, .*, 40 -> {} rows, row {} is the first that differs, {}\)"
    for text, *found in (
        (was.replace("It is 7!", "It is 8!"), 40, 8, "1 rows are new or changed and 1 are gone"),
        ("".join(lines[:30] + lines[32:]), 38, 31, "0 rows are new or changed and 2 are gone"),
        ("".join(lines[::-1]), 40, 1, "the same rows in another order"),
    ):
        file.write_text(text)
        with pytest.raises(Refused, match=changed.format(*found)):
            go(data=str(file), **how)
    file.write_text(was)
    assert go(data=str(file), **how)["resumed_from"] == 1
    parquet, table = tmp_path / "rows.parquet", [json.loads(line) for line in lines]
    pq.write_table(pa.Table.from_pylist(table), parquet)
    kept = facts(parquet)
    pq.write_table(pa.Table.from_pylist([*table, table[0]]), parquet)
    assert changes(kept, parquet).endswith("40 -> 41 rows, row 41 is the first that differs, 1 rows are new or changed and 0 are gone)")


def test_rows_laid_flat_learn_what_padded_rows_learn(go, monkeypatch):
    from waystation.training import trainer

    shapes, arrange = [], trainer.arrange
    monkeypatch.setattr(trainer, "arrange", lambda batch, share: shapes.append((batch["lengths"].numel(), share)) or arrange(batch, share))
    monkeypatch.setattr(trainer, "PIECE", 150)
    flat = go(run="flat", lora_dropout=0.0, grad_accum=2, max_steps=3)
    assert {share for _, share in shapes} == {True} and min(n for n, _ in shapes) < 8, "in pieces, with their beginning in common"
    monkeypatch.setattr(trainer, "lay_flat", lambda *_: False)
    padded = go(run="padded", lora_dropout=0.0, grad_accum=2, max_steps=3)
    for key in ("loss", "evals"):
        for (_, a), (_, b) in zip(flat[key], padded[key], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    assert flat["eval_loss"]["after"] == pytest.approx(padded["eval_loss"]["after"], rel=1e-4)


def test_held_out_rows_go_in_pieces_too(go, tmp_path, monkeypatch):
    "As in training, and with as many rows at once, so that the evaluation is not what memory runs out in."
    from waystation.training import trainer

    at_once, arrange = {True: [], False: []}, trainer.arrange
    monkeypatch.setattr(trainer, "arrange", lambda batch, share: at_once[torch.is_grad_enabled()].append(int(batch["lengths"].sum())) or arrange(batch, share))
    monkeypatch.setattr(trainer, "generate_answers", lambda model, tokenizer, rows, **kw: [""] * len(rows))
    monkeypatch.setattr(trainer, "PIECE", 150)
    long = [{"prompt": f"Spell {i}: {i * 'x'}.", "completion": "so " * 20} for i in range(16)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in long))
    go(max_steps=1, eval_steps=0, batch_size=16, eval_data=str(tmp_path / "held.jsonl"), eval_rows=0)
    assert sum(at_once[False]) > 2 * 16 * 100, "all of them, before and after"
    assert max(at_once[False]) <= 150 + 128, "no more than a piece and the row that ends it"


def test_a_run_goes_on_in_the_precision_that_it_began_in(go, power_goes, monkeypatch):
    "An older version chose float32 where this one chooses bfloat16: to the bit what it would have been. Who asks for another gets it, and is told."
    how = dict(method="lora", eval_steps=0, max_steps=3)
    calm = go(run="calm", **how)
    power_goes(2, lambda: go(run="cut", **how))
    power_goes(2, lambda: go(run="asked", **how))
    monkeypatch.delenv("WAYSTATION_PRECISION")
    for part in ("runtime", "training.device"):
        monkeypatch.setattr(f"waystation.{part}.suits", lambda device: ("bfloat16", "in this test"))
    cut = go(run="cut", **how)
    assert (cut["resumed_from"], cut["precision"], cut["adapter_sha256"]) == (2, "float32", calm["adapter_sha256"])
    assert "this run began in float32" in cut["why"]
    monkeypatch.setenv("WAYSTATION_PRECISION", "bfloat16")
    asked = go(run="asked", **how)
    assert asked["precision"] == "bfloat16" and "steps up to 2 were done in float32" in asked["why"] and asked["adapter_sha256"] != calm["adapter_sha256"]


def test_a_checkpoint_of_padded_rows_goes_on_and_says_so(go, power_goes, monkeypatch):
    from waystation.training import trainer

    with monkeypatch.context() as m:
        m.setattr(trainer, "lay_flat", lambda *_: False)
        power_goes(4, go)
    r = go()
    assert r["resumed_from"] == 4 and "steps up to 4 were padded" in r["why"]
