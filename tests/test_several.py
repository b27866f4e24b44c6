"Training in two processes by gloo: a model in parts (FSDP), labels, and marks; each killed in the middle, and beside one process where the mathematics is the same."

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import test_classify
import yaml
from conftest import ROOT
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
def test_on_two_machines(cut, go, tmp_path, model):  # noqa: F811
    "Each has a disk of its own, and nothing in common but the store."
    how = FEW | dict(run="machines", lora_dropout=0.0, eval_rows=3)
    alone = go(**how | dict(run="alone"))
    how |= dict(store=str(tmp_path / "store"), model=model, data=str(tmp_path / "rows.jsonl"))
    two = cut(how, WAYSTATION_CACHE=f"{tmp_path}/disk-{{rank}}", LOCAL_RANK="0")
    assert {f.name for f in tmp_path.glob("disk-*")} == {"disk-0", "disk-1"} and apart(two, alone) < 1e-6 and two["samples"] == alone["samples"]


def launched(tmp_path, args, nodes=1, cards=1, rank=0, store="gs://bucket/w"):
    "What recipes/launch/sky.yaml runs on a machine, by the shell that SkyPilot has; `waystation` and `accelerate` only say what they were given."
    recipe = yaml.safe_load((ROOT / "recipes/launch/sky.yaml").read_text())
    for name in ("waystation", "accelerate"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run.sh").write_text(recipe["run"])
    said = {k: str(v) for k, v in recipe["envs"].items()} | {"WAYSTATION_STORE": store, "ARGS": args, "RUN": "mine"}
    said |= {f"SKYPILOT_{k}": str(v) for k, v in dict(NUM_NODES=nodes, NUM_GPUS_PER_NODE=cards, NODE_RANK=rank, NODE_IPS="10.0.0.1\n10.0.0.2").items()}
    env = os.environ | said | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-i", "run.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, start_new_session=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_what_skypilot_starts(tmp_path):
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    train_it = ["waystation", "train", "--run", "mine", "--system", "Be brief.", "--data", "rows.jsonl"]
    args = "--system 'Be brief.' --data rows.jsonl"
    assert launched(tmp_path, args)[:2] == (0, train_it)
    for nodes, cards, rank in ((1, 4, 0), (2, 1, 0), (2, 4, 1)):
        code, said, _ = launched(tmp_path, args, nodes, cards, rank)
        assert code == 0 and said[:2] == ["accelerate", "launch"]
        how = launch_command_parser().parse_args(said[2:])
        assert [how.training_script, *how.training_script_args] == train_it and how.no_python
        env = prepare_multi_gpu_env(how)
        assert (int(how.nproc_per_node), env["ACCELERATE_MIXED_PRECISION"]) == (cards, "no")
        if nodes > 1:
            assert (int(how.nnodes), int(how.node_rank), how.master_addr, int(how.master_port)) == (nodes, rank, "10.0.0.1", 29500)
    code, said, why = launched(tmp_path, args, store="")
    assert (code, said) == (2, []) and "WAYSTATION_STORE=gs://" in why, "and trains nothing on a disk that goes with the machine"


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
