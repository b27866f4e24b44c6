"""kill -9 in the middle of train and of embed, after a seal: the same command gives the result of an undisturbed run."""

import os
import signal
import subprocess
import time

import pyarrow.parquet as pq
import pytest
from conftest import WAYSTATION

from waystation.store import Store

pytestmark = pytest.mark.slow

TRAIN = ["train", "--run", "k", "--max-steps", "3", "--seal-steps", "1", "--eval-steps", "0", "--batch-size", "1", "--eval-rows", "1", "--warmup-steps", "1"]
EMBED = ["embed", "--run", "k", "--limit", "80", "--shard-rows", "4", "--chunk-tokens", "200"]


def kill_after(args, env, cwd, kind, seals):
    "Start a command, kill -9 it and its children as soon as `seals` seals of `kind` are there; the seals at that moment."
    p = subprocess.Popen([WAYSTATION, *args], cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    store, prefix = Store(env["WAYSTATION_STORE"]), f"runs/k/{args[0]}/1"
    until = time.time() + 600
    while len(store.list(f"{prefix}/{kind}")) < seals:
        assert p.poll() is None and time.time() < until, f"no kill: the command ended with {p.returncode}: {p.stderr.read()[-2000:]}"
        time.sleep(0.02)
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    found = store.list(f"{prefix}/{kind}")
    assert len(found) >= seals
    assert f"{prefix}/report" not in store.list(prefix), "the command was faster than the kill"
    return found


def test_train_goes_on_bit_for_bit(cli, env, tmp_path):
    "A real model, in processes of their own; tests/test_train_kill.py has a tiny one, at any moment."
    whole = cli(*TRAIN, "--json", WAYSTATION_STORE=str(tmp_path / "undisturbed"))
    found = kill_after(TRAIN, env, tmp_path, "checkpoints", 2)
    resumed = cli(*TRAIN, "--json")
    assert whole["resumed_from"] == 0
    assert resumed["resumed_from"] == int(found[-1].split("/")[-1]) > 0
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["loss"] == whole["loss"] and len(whole["loss"]) == 3
    assert resumed["metrics"] == whole["metrics"]


def vectors(env, cwd):
    "Every (id, vector) that the shards of the run hold."
    store, rows = Store(env["WAYSTATION_STORE"]), []
    for name in store.list("runs/k/embed/1/shards"):
        table = pq.read_table(store.fetch(name, cwd / "fetched" / name.replace("/", "-")) / "vectors.parquet")
        rows += zip(table["id"].to_pylist(), (v.values.to_numpy().tobytes() for v in table["vector"]), strict=True)
    return rows


def test_embed_does_no_shard_twice(cli, env, tmp_path):
    "Of chunks; tests/test_embed_kill.py has both engines, at random moments."
    args = [*EMBED, "--engine", "torch"]
    other = env | {"WAYSTATION_STORE": str(tmp_path / "undisturbed")}
    whole = cli(*args, "--json", WAYSTATION_STORE=other["WAYSTATION_STORE"])
    found = kill_after(args, env, tmp_path, "shards", 3)
    before = {n: Store(env["WAYSTATION_STORE"]).read(n).created for n in found}
    resumed = cli(*args, "--json")
    assert resumed["shards"] == whole["shards"] == 20
    assert resumed["shards_found"] == len(found) >= 3
    assert resumed["shards_computed"] == 20 - len(found)
    store = Store(env["WAYSTATION_STORE"])
    assert {n: store.read(n).created for n in found} == before
    killed, undisturbed = vectors(env, tmp_path / "a"), vectors(other, tmp_path / "b")
    assert len(killed) == len(set(killed)) == whole["rows"] > 80
    assert set(killed) == set(undisturbed)


def test_sigterm_ends_cleanly_and_the_same_command_goes_on(env, cli, tmp_path):
    "What spot machines send: exit code 3, and what was sealed is used."
    p = subprocess.Popen([WAYSTATION, *EMBED, "--json"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store = Store(env["WAYSTATION_STORE"])
    while not store.list("runs/k/embed/1/shards"):
        assert p.poll() is None, p.stderr
        time.sleep(0.02)
    p.terminate()
    out, err = p.communicate()
    assert p.returncode == 3, err
    assert '"error": "interrupted"' in out and "the same command goes on" in err
    assert cli(*EMBED, "--json")["shards_found"] >= 1
