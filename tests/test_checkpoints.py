"""Background seals with a plain Trainer that knows nothing of our stations: kills, SIGTERM, damage, fences, full disks."""

import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from waystation.runtime import Interrupted, Refused
from waystation.seal import blob_key
from waystation.sealer import Sealer
from waystation.store import Store
from waystation.training import checkpoints
from waystation.training.checkpoints import SealCallback, Sigterm, latest_good

BASE = "runs/x/train/1/checkpoints"

# A user's own script: transformers' Trainer, the callback, and exit code 3 when it was asked to stop.
SCRIPT = """
import sys, os, signal, hashlib, time
from transformers import Trainer, TrainingArguments, TrainerCallback, AutoModelForCausalLM, set_seed
from waystation.runtime import Interrupted
from waystation.store import Store
from waystation.training.checkpoints import SealCallback, latest_good

model, place, work, how = sys.argv[1:5]
class At(TrainerCallback):
    def on_step_begin(self, args, state, control, **kw):
        if how == 'term' and state.global_step == 2: os.kill(os.getpid(), signal.SIGTERM)
        if how == 'kill' and state.global_step == 5:
            while keep.sealer.pending: time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
set_seed(1)
store = Store(place)
step, folder, notes = latest_good(store, 'runs/x/train/1/checkpoints', work + '/resume')
args = TrainingArguments(output_dir=work + '/out', max_steps=6, per_device_train_batch_size=2, save_strategy='no', report_to=[], use_cpu=True, seed=1,
                         logging_steps=1, disable_tqdm=True, learning_rate=1e-3, gradient_accumulation_steps=2)
data = [dict(input_ids=[i % 90 + 3]*8, labels=[(i + 1) % 90 + 3]*8) for i in range(40)]
m = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.1)
trainer = Trainer(m, args, train_dataset=data)
keep = SealCallback(store, 'runs/x/train/1/checkpoints', every_steps=0 if how == 'term' else 2)
trainer.add_callback(keep); trainer.add_callback(At())
try: trainer.train(resume_from_checkpoint=str(folder) if folder else None)
except Interrupted as e: print(e); sys.exit(3)
h = hashlib.sha256()
for _, w in sorted(m.state_dict().items()): h.update(w.numpy().tobytes())
print(step, h.hexdigest(), [x['loss'] for x in trainer.state.log_history if 'loss' in x])
"""


@pytest.fixture
def script(model, tmp_path, monkeypatch):
    "Run SCRIPT; its last line, when it ends with `code`."
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))

    def run(store, how="", code=0):
        done = subprocess.run([sys.executable, "-c", SCRIPT, model, str(tmp_path / store), str(tmp_path / f"work-{time.time_ns()}"), how],
                              capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
        return (done.stdout.splitlines() or [""])[-1]

    return run


@pytest.mark.slow
def test_a_plain_trainer_goes_on_bit_for_bit(script, tmp_path):
    "kill -9 after step 5; a new machine with an empty disk goes on from step 4. SIGTERM seals at once, and exits with 3."
    whole = script("whole")
    script("killed", "kill", code=-signal.SIGKILL)
    assert Store(tmp_path / "killed").list(BASE) == [f"{BASE}/2", f"{BASE}/4"]
    assert script("killed") == whole.replace("0", "4", 1)
    assert "sealed at step 3" in script("termed", "term", code=3)
    assert script("termed", "again") == whole.replace("0", "3", 1)
    meta = Store(tmp_path / "killed").read(f"{BASE}/6").meta
    assert {"step", "epoch", "loss", "learning_rate", "device", "precision", "seconds", "versions"} <= meta.keys()
    assert not list((tmp_path / "cache/staging").iterdir()), "copies of the killed process are swept"


def checkpoint(folder, step=1):
    "A folder as Trainer writes it."
    import random

    import numpy as np
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((50_000,), float(step))}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": {0: torch.ones(2) * step}}, folder / name)
    torch.save(dict(python=random.getstate(), numpy=np.random.get_state(), cpu=torch.random.get_rng_state()), folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    made = Store(tmp_path / "store")
    for step in (9, 10, 11):
        made.seal(checkpoint(tmp_path / f"checkpoint-{step}", step), f"{BASE}/{step}", dict(what="full", step=step))
    return made


def spoil(store, name, file="adapter_model.safetensors"):
    entry = store.read(name).files[file]
    path = store.place.path(blob_key(entry.get("pack", entry["sha256"])))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[entry.get("at", 0) + entry["size"] - 1] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_passed_over_and_sealed_anew(store, tmp_path):
    spoil(store, f"{BASE}/11")
    step, folder, notes = latest_good(store, BASE, tmp_path / "to")
    assert (step, folder.name) == (10, "checkpoint-10") and "does not have the bytes that were sealed" in notes[0] and f"{BASE}/11" in notes[0]
    with SealCallback(store, BASE, progress=False) as keep:
        keep._passed = {f"{BASE}/11"}
        keep.seal(checkpoint(tmp_path / "again", 11), 11, dict(what="full", again=True))
    assert store.read(f"{BASE}/11").meta["again"] and latest_good(store, BASE, tmp_path / "to2")[0] == 11
    for n in (9, 10, 11):
        spoil(store, f"{BASE}/{n}")
    with pytest.raises(Refused, match=r"no checkpoint below .*checkpoints/11.*checkpoints/10.*checkpoints/9"):
        latest_good(store, BASE, tmp_path / "to3")


def test_a_full_disk_is_not_taken_for_a_damaged_checkpoint(store, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), dict(free=10)))
    with pytest.raises(Refused, match="has room for"):
        latest_good(store, BASE, tmp_path / "to")


@pytest.mark.parametrize("file", ["rng_state.pth", "optimizer.pt", "training_args.bin", "pytorch_model.bin"])
def test_a_planted_pickle_is_not_run(store, tmp_path, file):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    evil = checkpoint(tmp_path / "evil", 12)
    torch.save(Evil(), evil / file)
    (evil / "other.pkl").write_bytes(pickle.dumps(Evil()))
    store.seal(evil, f"{BASE}/12")
    step, folder, _ = latest_good(store, BASE, tmp_path / "to")
    assert not (tmp_path / "pwned").exists()
    assert step == (11 if file in ("rng_state.pth", "optimizer.pt") else 12)
    assert not (folder / "other.pkl").exists() and (step == 11 or not (folder / file).exists())


def test_weights_alone_offer_no_resume(store, tmp_path):
    with SealCallback(store, "runs/w", what="adapter", progress=False) as keep:
        keep.seal(tmp_path / "checkpoint-9", 9, dict(what="adapter"))
    assert list(store.read("runs/w/9").files) == ["adapter_model.safetensors"]
    with pytest.raises(Refused, match="weights alone"):
        latest_good(store, "runs/w", tmp_path / "to")


def test_errors_of_the_background_surface(store, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    sealer = Sealer(store)
    monkeypatch.setattr("waystation.place._publish", full)
    sealer.submit(tmp_path / "checkpoint-9", "runs/y/1")
    while sealer.pending:
        time.sleep(0.01)
    for again in (lambda: sealer.submit(tmp_path / "checkpoint-9", "runs/y/2"), sealer.drain):
        with pytest.raises(Refused, match="is full"):
            again()
    assert store.list("runs/y") == [] and not list((tmp_path / "cache/staging").iterdir())


def test_a_full_staging_disk(store, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), dict(free=10)))
    with pytest.raises(Refused, match="no room to stage"):
        Sealer(store).submit(tmp_path / "checkpoint-9", "runs/y/1")


def test_a_writer_that_was_fenced_off_never_commits(store, tmp_path):
    "Taken over while the first seal is on its way: neither it nor the one that waits becomes visible."
    gone, go = threading.Event(), threading.Event()

    def fence():
        go.wait(10)
        if gone.is_set():
            raise Refused("the run was taken over")

    sealer = Sealer(store, fence)
    for n in (1, 2):
        sealer.submit(tmp_path / "checkpoint-9", f"runs/y/{n}")
    gone.set()
    go.set()
    with pytest.raises(Refused, match="taken over"):
        sealer.drain()
    assert store.list("runs/y") == []


def test_at_most_one_on_its_way_and_one_waiting(store, tmp_path):
    go, seen = threading.Event(), []

    def slow(folder, name, meta):
        seen.append(len(list(folder.parent.iterdir())))
        go.wait(10)

    sealer = Sealer(store, seal=slow)
    took = [sealer.submit(tmp_path / "checkpoint-9", f"runs/y/{n}") for n in (1, 2)]
    threading.Timer(0.5, go.set).start()
    assert sealer.submit(tmp_path / "checkpoint-9", "runs/y/3") > 0.3 > max(took)
    sealer.drain()
    assert max(seen) <= 2 and sealer.blocked_s > 0.3


@pytest.mark.parametrize("others, at", [([False, False], None), ([False, True], 4), ([True, False], 2)])
def test_what_one_process_hears_all_do(tmp_path, monkeypatch, others, at):
    "Another process was asked to stop in the middle of step 2, or while the checkpoint of step 4 is written; or nobody was."
    said = iter([[False, others[0]], [others[0]], [False, False], [others[1]]])  # at the end of a step, and when its checkpoint is there
    monkeypatch.setattr(checkpoints, "processes", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, op: t.copy_(torch.tensor(next(said)).int() | t))
    args = SimpleNamespace(output_dir=tmp_path, save_only_model=False, bf16=False, fp16=False, device="cpu")

    def go():
        with SealCallback(Store(tmp_path / "store"), "runs/x", every_minutes=0, every_steps=4, progress=False) as keep:
            for step in (2, 4):
                state = SimpleNamespace(global_step=step, max_steps=9, epoch=0.1, log_history=[])
                keep.on_step_end(args, state, control := SimpleNamespace(should_save=False))
                if control.should_save:
                    checkpoint(tmp_path / f"checkpoint-{step}", step)
                    keep.on_save(args, state, None)
                else:
                    next(said)

    if at:
        with pytest.raises(Interrupted, match=f"sealed at step {at}"):
            go()
    else:
        go()
    assert Store(tmp_path / "store").list("runs/x")[-1] == f"runs/x/{at or 4}"


def test_a_second_sigterm_does_what_it_did_before():
    told = []
    was = signal.signal(signal.SIGTERM, lambda *_: told.append("as before"))
    try:
        before, heard = signal.getsignal(signal.SIGTERM), Sigterm()
        heard.listen()
        heard.listen()
        assert not heard.heard
        signal.raise_signal(signal.SIGTERM)
        assert heard.heard and told == []
        signal.raise_signal(signal.SIGTERM)
        assert told == ["as before"]
        heard.listen()
        heard.forget()
        heard.forget()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, was)


def test_retention_after_a_newer_seal_is_durable(store, tmp_path):
    with SealCallback(store, "runs/r", keep_last=1, keep_best=1, progress=False) as keep:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
            keep.seal(checkpoint(tmp_path / f"r{step}", step), step, dict(what="full", eval_loss=loss))
    assert store.list("runs/r") == ["runs/r/2", "runs/r/4"]


@pytest.mark.slow
def test_grpo(store, model, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, num_generations=2, max_completion_length=8,
                      save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1)
    trainer = GRPOTrainer(model, reward_funcs=lambda completions, **kw: [float(len(set(c))) for c in completions], args=args,
                          train_dataset=Dataset.from_list([dict(prompt=f"Say {i}") for i in range(8)]))
    trainer.add_callback(SealCallback(store, "runs/g", every_steps=1, progress=False))
    trainer.train()
    assert store.list("runs/g") == ["runs/g/1", "runs/g/2"]
    step, folder, _ = latest_good(store, "runs/g", tmp_path / "to")
    assert step == 2 and hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == store.read("runs/g/2").files["model.safetensors"]["sha256"]
    assert os.listdir(folder)
