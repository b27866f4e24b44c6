"Training in two processes by gloo: a model in parts (FSDP), labels, and marks; each killed in the middle, and beside one process where the mathematics is the same."

import json
import shutil
import signal
from pathlib import Path

import pytest
import test_classify
from safetensors.torch import load_file
from test_train import go, rows  # noqa: F401  the fixture
from test_training_device import in_two_processes

from waystation.stations.train import train
from waystation.store import Store

FEW = dict(max_steps=4, eval_steps=2, batch_size=2, grad_accum=4, lora_r=4, seal_steps=2, max_length=128, warmup_steps=1, method="lora")


@pytest.fixture
def cut(tmp_path):
    "A run in two processes, of which the main one is killed at step 2 and the other then, too; it goes on in two. Its report; and what the second one's was."

    def run(how, **env):
        main, _ = in_two_processes(tmp_path, how, dies=2, **env)
        assert main == -signal.SIGKILL
        shutil.copytree(how["store"], tmp_path / "killed")
        (report, other), (ours, theirs) = in_two_processes(tmp_path, how, **env)
        assert other == {} and ours == theirs, "both have learnt the same, and the main one says it"
        assert report["resumed_from"] == 2 and report["plan"]["processes"] == 2
        assert len(Store(how["store"]).list(f"models/{how['run']}")) == 1
        return report

    return run


def apart(a, b):
    "The largest difference of two adapters."
    a, b = (load_file(f"{r['adapter']}/adapter_model.safetensors") for r in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.slow
def test_a_model_in_parts_learns_what_a_whole_one_does(cut, go, tmp_path, model):  # noqa: F811
    from peft import AutoPeftModelForCausalLM

    how = FEW | dict(run="parts", lora_dropout=0.0, eval_rows=3)
    alone = go(**how | dict(run="alone"))
    how |= dict(store=str(tmp_path / "store"), model=model, data=str(tmp_path / "rows.jsonl"))
    parts = cut(how, ACCELERATE_USE_FSDP="true")
    assert parts["plan"]["sharded"] and [Path(tmp_path, f"share-{r}").read_text() for r in (0, 1)] == ["0.5", "0.5"]
    later = go(**how | dict(store=str(tmp_path / "killed")))
    assert (later["resumed_from"], later["plan"]["processes"]) == (2, 1), "what two had sealed of it, one process goes on from"
    for r in (parts, later):
        assert apart(r, alone) < 1e-6
        assert r["samples"] == alone["samples"] and r["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
        for (s, a), (t, b) in zip(r["loss"], alone["loss"], strict=True):
            assert s == t and a == pytest.approx(b, rel=1e-4)
    said, one = (json.loads(Path(r["adapter"], "waystation.json").read_text())["frozen_weights"] for r in (parts, alone))
    assert said == one and said["unchanged"], "the hash of all parts together"
    AutoPeftModelForCausalLM.from_pretrained(parts["adapter"])


@pytest.mark.slow
def test_labels_in_two_processes(cut, tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    encoder = test_classify.random_encoder(tmp_path / "encoder")
    how = FEW | dict(run="two", store=str(tmp_path / "store"), task="classify", model=encoder, data=test_classify.rows(tmp_path / "rows.jsonl"), text="sequence")
    how |= dict(labels="kingdom,phylum,genus", features="depth", max_length=32, eval_rows=7)
    alone = train(**how | dict(run="alone"))
    two = cut(how)
    assert apart(two, alone) < 1e-6
    assert two["metrics"] == alone["metrics"] and two["samples"] == alone["samples"] and two["n_eval"] % 2, "so one row is taken twice, and counted once"
    assert two["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert [x for _, x in two["evals"]] == pytest.approx([x for _, x in alone["evals"]], rel=1e-4)
    for (s, a), (t, b) in zip(two["loss"], alone["loss"], strict=True):
        assert s == t and a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_marks_in_two_processes(cut, tmp_path, model):
    how = FEW | dict(run="two", store=str(tmp_path / "store"), task="grpo", model=model, data=rows(tmp_path / "rows.jsonl"), rewards="length", generations=4)
    two = cut(how | dict(warmup_steps=0, eval_rows=3))
    seeds = [Path(tmp_path, f"seed-{r}").read_text() for r in (0, 1)]
    assert seeds[0] != seeds[1], "each draws answers of its own"
    assert [s for s, _ in two["reward"]] == [1, 2, 3, 4] and all(0 <= r <= 1 for _, r in two["reward"])
