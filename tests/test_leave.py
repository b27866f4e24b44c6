"""What leaves the station: a sealed folder that is complete, a base that stayed as it was, one merged model, and none of it needs waystation."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import rows, tiny_run

from waystation.cli import main
from waystation.runtime import GateFailed, Refused
from waystation.stations.train import train
from waystation.store import Store
from waystation.training import merge as part
from waystation.training.merge import merge


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A QLoRA adapter of a tiny random model; its base is in a folder."
    tmp = tmp_path_factory.mktemp("leave")
    return tmp, tiny_run(tmp, learning_rate=0.01, eval_rows=2, gates="eval_loss <= 99")


@pytest.fixture
def store(trained, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(trained[0] / "cache"))
    return str(trained[0] / "store")


def alone(code, tmp_path, *args, hidden=("waystation",), lines=1):
    "What a program prints that cannot import waystation, finds no hub and no download of another day."
    (tmp_path / "empty").mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WAYSTATION", "HF_"))}
    env |= {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    head = f"import sys; sys.modules.update({{m: None for m in {hidden!r}}})\n"
    done = subprocess.run([sys.executable, "-c", head + code, *map(str, args)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-lines:]


def test_the_sealed_folder_says_what_it_is(trained, store):
    _, r = trained
    folder, meta = Path(r["adapter"]), Store(store).read("models/t/v1").meta
    files = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "lint.json"}
    assert files <= {f.name for f in folder.iterdir()}
    said = json.loads((folder / "waystation.json").read_text())
    keys = "base base_fingerprint data data_fingerprint metrics eval_loss params precision steps rows versions frozen_weights"
    for key in keys.split():
        assert said[key] == meta[key] and said[key], key
    assert said["params"]["lora_r"] == 4 and said["versions"]["waystation"] and said["frozen_weights"]["unchanged"] is True
    assert said["frozen_weights"]["sha256"] in (folder / "README.md").read_text()


@pytest.mark.parametrize("part_of_it", ["weight", "absmax"])
def test_a_base_that_changed_is_not_sealed(trained, store, monkeypatch, part_of_it):
    "One byte of the packed weights, or one of their scales, is enough."
    from waystation.training import trainer

    def spoiled(c, job, real=trainer.fit):
        found = real(c, job)
        layer = next(m for n, m in c.model.named_modules() if n.endswith("q_proj.base_layer"))
        w = layer.weight.data if part_of_it == "weight" else layer.weight.quant_state.absmax
        w.view(torch.uint8).view(-1)[0] ^= 1
        return found

    tmp, _ = trained
    how = dict(run=part_of_it, store=store, model=str(tmp / "model"), data=str(tmp / "rows.jsonl"), max_steps=1, lora_r=4, max_length=128,
               warmup_steps=0, eval_rows=2)  # fmt: skip
    with monkeypatch.context() as m, pytest.raises(Refused, match="frozen weights of the base changed"):
        m.setattr(trainer, "fit", spoiled)
        train(**how)
    assert not Store(store).has(f"models/{part_of_it}/v1")


def test_merged(trained, store, capsys):
    _, r = trained
    assert main(["merge", "store:models/t/current", "--store", store, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    place, folder = Store(store), Path(done["folder"])
    assert place.resolve("models/t-merged/current") == done["merged"] == "models/t-merged/v1" and done["adapter"] == r["model"]
    m = done["metrics"]
    assert m["adapter"]["loss"]["n"] == m["merged"]["loss"]["n"] == done["same_answers"]["n"] == 2
    assert m["adapter"]["loss"]["value"] == pytest.approx(r["eval_loss"]["after"], abs=2e-2), "the adapter is asked on four bits, as it was trained"
    assert 0 < abs(m["merged"]["loss"]["value"] - m["adapter"]["loss"]["value"]) < 0.3
    card = (folder / "README.md").read_text()
    assert "four bits" in card and "never trained as it is" in card and (folder / "ADAPTER.md").is_file() and not (folder / "adapter_config.json").exists()
    assert merge("models/t/v1", store) == {k: v for k, v in done.items() if k != "text"}, "merged once"
    assert main(["show", "t", "--store", store]) == 0 and "models/t-merged/v1" in capsys.readouterr().out


@pytest.mark.slow
def test_adapter_and_merged_model_need_no_waystation(trained, store, tmp_path):
    "Both folders lie elsewhere than where they were sealed, and say the same."
    merged, adapter = (Store(store).fetch(n, tmp_path / n) for n in (merge("models/t/v1", store)["merged"], "models/t/v1"))
    asked = """
from transformers import AutoTokenizer, pipeline
question = [{"role": "user", "content": "Say 3."}]
print(repr(pipeline("text-generation", model=sys.argv[1])(question, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]["content"]))
from peft import AutoPeftModelForCausalLM
tok, model = AutoTokenizer.from_pretrained(sys.argv[2]), AutoPeftModelForCausalLM.from_pretrained(sys.argv[2])
ids = tok.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1]:]
print(repr(tok.decode(out, skip_special_tokens=True)))"""
    said = alone(asked, tmp_path, merged, adapter, lines=2)
    assert len(said[0]) > 2 and said[0] == said[1], "whole base and adapter, merged or not, answer alike"


def test_a_kill_anywhere_and_a_gate(trained, store, tmp_path, monkeypatch):
    "After each seal, and before the first; then a demand that the merged model misses."
    from waystation.recipe import Job

    tmp, _ = trained
    place, how = Store(store), dict(store=store, data=str(tmp / "rows.jsonl"), rows=2, restart=True)
    publish, asked, first = Job.publish, [], merge("models/t/v1", store)
    monkeypatch.setattr(part, "_ask", lambda *a, real=part._ask: asked.append(a[3]) or real(*a))
    asked.clear()
    for last, wanted in ((None, ["qlora"]), ("adapter", ["qlora"]), ("v2", ["lora"])):

        def cut(self, folder, name, meta=None, last=last):
            if last is None:
                raise KeyboardInterrupt
            done = publish(self, folder, name, meta)
            if name.endswith(last):
                raise KeyboardInterrupt
            return done

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Job, "publish", cut)
            merge("models/t/v1", **how)
        assert asked == wanted and place.has("models/t-merged/v2") == (last == "v2") and place.resolve("models/t-merged/current") == first["merged"]
        asked.clear()
    done = merge("models/t/v1", **how, gates="eval_loss <= 99")
    assert asked == [] and done["merged"] == "models/t-merged/v2" == place.resolve("models/t-merged/current") and done["n_eval"] == 2
    with pytest.raises(GateFailed, match="stays at models/t-merged/v2"):
        merge("models/t/v1", **how | dict(restart=False), gates="eval_loss <= 0.1")
    with pytest.raises(Refused, match="its figures are exact, eval_loss"):
        merge("models/t/v1", **how, gates="citation >= 0.9")


def test_what_cannot_be_merged(trained, store, monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for args, says in ((("models/t/v1",), "neither on the PATH"), (("models/t/v1", "q2"), "gguf='q2' is not known")):
        with pytest.raises(Refused, match=says):
            merge(args[0], store, gguf=args[1] if args[1:] else "f16")
    data = trained[0] / "rows.jsonl"
    kept = data.read_text()
    try:
        data.write_text(kept.replace("Say 3.", "Say three."))
        with pytest.raises(Refused, match="another content than when models/t/v1 was trained"):
            merge("models/t/v1", store)
        data.unlink()
        with pytest.raises(Refused, match=r"does not exist.*or name rows that it never saw"):
            merge("models/t/v1", store)
    finally:
        data.write_text(kept)
    Store(store).seal(None, "models/other/v1", {})
    with pytest.raises(Refused, match="no adapter that train has sealed"):
        merge("store:models/other/v1", store)


def test_rows_of_another_file_have_columns_of_their_own(trained, store, tmp_path, monkeypatch):
    "By their usual names, by names that are given, or by those of the training."
    real, before = part.sealed_adapter, dict(columns="prompt=question, completion=answer")

    def asked_otherwise(*args):
        seal = real(*args)
        return dataclasses.replace(seal, meta=seal.meta | dict(params=seal.meta["params"] | before))

    monkeypatch.setattr(part, "sealed_adapter", asked_otherwise)
    monkeypatch.setattr(part, "_merged", lambda job, seal, rows: dict(rows=part.held_rows(job, rows)))
    asked, said = "Is it free?", "Yes, it is."
    (tmp_path / "usual.jsonl").write_text(json.dumps(dict(prompt=asked, completion=said)))
    (tmp_path / "training.csv").write_text(f'question,answer\n{asked},"{said}"\n')
    (tmp_path / "other.csv").write_text(f'asks,tells\n{asked},"{said}"\n')
    found = [merge("models/t/v1", store, data=str(tmp_path / f), columns=c, restart=True)["rows"]
             for f, c in (("usual.jsonl", ""), ("training.csv", ""), ("other.csv", "prompt=asks, completion=tells"))]  # fmt: skip
    assert [(r["prompt"][0]["content"], r["completion"][0]["content"]) for rows in found for r in rows] == [(asked, said)] * 3
    with pytest.raises(Refused, match=r"columns='prompt=question, completion=answer': no row of .*other.csv has 'question', 'answer'; there are asks, tells"):
        merge("models/t/v1", store, data=str(tmp_path / "other.csv"), restart=True)
    with pytest.raises(Refused, match="give data, too"):
        merge("models/t/v1", store, columns="prompt=asks, completion=tells")


@pytest.mark.slow
def test_gguf_is_read_by_llama_cpp(tmp_path, monkeypatch):
    "A tiny random Llama with SmolLM2's tokenizer, for the converter knows that one; a kill between the two seals is borne."
    pytest.importorskip("xllamacpp", reason="NOT CHECKED: xllamacpp is not installed")
    pytest.importorskip("sentencepiece", reason="NOT CHECKED: sentencepiece, which llama.cpp's converter imports, is not installed")
    if not part.converter():
        pytest.skip("NOT CHECKED: llama.cpp's convert_hf_to_gguf.py is neither in LLAMA_CPP nor on the PATH")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from waystation.assets import resolve

    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    tok = AutoTokenizer.from_pretrained(resolve("asset:smollm2-135m", "model").path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    ends = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), max_position_embeddings=512, **sizes, **ends)).save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    store = str(tmp_path / "store")
    train(run="g", store=store, model=str(tmp_path / "model"), data=rows(tmp_path / "rows.jsonl"), max_steps=1, lora_r=4, max_length=128, warmup_steps=0,
          eval_rows=1)  # fmt: skip
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(part, "write_gguf", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        merge("models/g/current", store, gguf="f32")
    done = merge("models/g/current", store, gguf="f32")
    place = Store(store)
    assert done["gguf"] == "models/g-gguf-f32/v1" == place.resolve("models/g-gguf-f32/current")
    file = place.fetch(done["gguf"], tmp_path / "fetched") / "g-f32.gguf"
    asked = """
import xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], 256, 1, False
said = xllamacpp.Server(p).handle_chat_completions({"messages": [{"role": "user", "content": "Say 3."}], "max_tokens": 6, "temperature": 0})
print(repr(said["choices"][0]["message"]["content"].strip()))"""
    [theirs] = alone(asked, tmp_path, file, hidden=("waystation", "torch", "transformers"))
    from waystation.training.talk import open_talk

    assert theirs == repr(open_talk(done["folder"], say=lambda text: None).set(max_new=6).ask("Say 3.")), "as transformers answers"
    monkeypatch.setattr(part, "write_gguf", None)
    assert merge("models/g/current", store, gguf="f32")["gguf"] == done["gguf"], "converted once"
