"""kill -9 at any moment of training: the same command ends with the adapter of an undisturbed run, bit for bit.

A process loads the libraries once and forks another for each command, so that a round costs what it trains and not what it imports. The
child stirs all random states before it begins, and says in a file what it is doing; another process kills it at a random one of these
things, each as likely as any other. `make prove` does thirty-five kills, and its undisturbed runs come from another such process;
tests/test_kill.py kills whole commands on a real model.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from proving import PROVE, Clock, note, size
from test_classify import model as encoder  # noqa: F401  # a fixture
from test_classify import rows as labelled
from test_train import rows, tiny_model

from waystation.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(size(600, 3600))]

# What is trained; a new way to train is one more line. Rows are laid end to end in all but one.
CASES = {
    "sft, NF4": dict(method="qlora", lora_dropout=0.1),
    "sft, NF4, bfloat16": dict(method="qlora", lora_dropout=0.1),
    "sft, float32": dict(method="lora", eval_steps=4, keep_last=2),
    "sft, float32, padded": dict(method="lora", lora_dropout=0.1),
    "sft, float32, early stop": dict(method="lora", eval_steps=2, early_stop=3, learning_rate=0.02),
    "classify, float32": dict(task="classify", text="sequence", labels="kingdom,phylum,genus", max_length=32, eval_steps=4, lora_dropout=0.1),
    "grpo, float32": dict(task="grpo", method="lora", rewards="length", generations=4),
}
SHORT = ("sft, NF4, bfloat16", "classify, float32")

# Two slots of 32 bytes in a file: how often something was said and what; and what the thread that seals does.
MOTHER = """
import json, os, random, sys, traceback

answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries say things as they are loaded

import numpy, torch
from transformers import Trainer
from waystation.recipe import Job
from waystation.stations.train import train
from waystation.training import classifier, trainer
if os.environ.get("WAYSTATION_PROVE") == "1":
    from waystation.training import rewards

slots, names, said = None, None, 0

def say(text):
    global said
    said += 1
    os.pwrite(slots, f"{said} {text}".ljust(32).encode(), 0)
    os.write(names, f"{text}\\n".encode())

def around(owner, name, before, after=""):
    real = getattr(owner, name)
    def wrapped(self, *args, **kw):
        say(before)
        try: return real(self, *args, **kw)
        finally:
            if after: say(after)
    setattr(owner, name, wrapped)

Keeper = trainer.Keeper
around(Keeper, "on_step_begin", "first batch")
around(Keeper, "on_substep_end", "second batch")
Keeper.on_pre_optimizer_step = lambda self, *args, **kw: say("optimizer")
around(Keeper, "on_step_end", "end of a step")
around(Trainer, "evaluate", "evaluation", "evaluated")
around(Trainer, "_save_checkpoint", "writing a checkpoint", "handing it over")
around(Keeper, "on_train_end", "last seals", "examination")
around(Job, "finish", "report")
for where, name in ((trainer, "conclude"), (classifier, "seal_classifier")):
    def named(real):
        def wrapped(*args):
            say("sealing the model")
            return real(*args)
        return wrapped
    setattr(where, name, named(getattr(where, name)))
seal = Job.seal

def slow(self, folder, kind, *args, **kw):
    if kind == "checkpoints": os.pwrite(slots, b"sealing".ljust(32), 32)
    try: return seal(self, folder, kind, *args, **kw)
    finally: os.pwrite(slots, b"".ljust(32), 32)

Job.seal = slow
print("ready", file=answer, flush=True)
for line in sys.stdin:
    told = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            log = os.open(told["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            slots = os.open(told["slots"], os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            names = os.open(told["slots"] + ".names", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            say("start")
            random.seed(os.getpid()), numpy.random.seed(os.getpid()), torch.manual_seed(os.getpid())
            os.environ["WAYSTATION_PRECISION"] = told["precision"]
            train(**told["params"])
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    print(pid, file=answer, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answer, flush=True)
"""


class Mother:
    "Starts commands by forking."

    def __init__(self, folder, env):
        self.folder = folder
        self.p = subprocess.Popen([sys.executable, "-c", MOTHER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        said = self.p.stdout.readline()
        assert said == "ready\n", said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.p.kill()  # it has nothing to finish, and taking libraries down takes it seconds
        self.p.communicate()

    def start(self, params):
        (self.folder / "slots").write_bytes(b"")
        told = dict(params=params, precision=self.precision, log=str(self.folder / "log"), slots=str(self.folder / "slots"))
        print(json.dumps(told), file=self.p.stdin, flush=True)
        return int(self.p.stdout.readline())

    def ended(self):
        "The exit code of what was started."
        return int(self.p.stdout.readline())

    def doing(self):
        "How often it said something, what it said last, and whether a checkpoint is being sealed."
        text = (self.folder / "slots").read_bytes().decode()
        count, _, what = text[:32].strip().partition(" ")
        return int(count or 0), what or "start", text[32:].strip()

    def run(self, params):
        "Run to the end; what it said, and as the how many-th thing."
        self.start(params)
        assert self.ended() == 0, (self.folder / "log").read_text()[-3000:]
        found = {}
        for n, name in enumerate((self.folder / "slots.names").read_text().splitlines(), 1):
            found.setdefault(name, []).append(n)
        return found

    def kill(self, params, moment, delay, sealing):
        "Kill -9 when it has said `moment` things, or in the first seal of a checkpoint after that; what it was doing, or None when it was faster."
        pid = self.start(params)
        until = time.monotonic() + 300
        while time.monotonic() < until:
            count, _, thread = self.doing()
            if count >= moment and (thread or not sealing):
                break
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.001)
        time.sleep(delay)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = self.ended()
        assert code in (0, -signal.SIGKILL), (self.folder / "log").read_text()[-3000:]
        return self.doing()[1:] if code else None


@pytest.fixture(scope="module")
def mother(tmp_path_factory):
    "The process that forks; `apart` is another one, with another seed of `hash`, for undisturbed runs."
    folder = tmp_path_factory.mktemp("mother")
    env = os.environ | {"WAYSTATION_WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "random",
                        "WAYSTATION_CACHE": str(folder / "cache")}  # fmt: skip
    with contextlib.ExitStack() as stack:
        m = stack.enter_context(Mother(folder, env))
        m.apart = stack.enter_context(Mother(tmp_path_factory.mktemp("apart"), env)) if PROVE else m
        yield m


@pytest.mark.parametrize("case", CASES if PROVE else SHORT)
def test_kill_at_any_moment(case, mother, encoder, tmp_path):  # noqa: F811
    kills, rng, hits, seals, runs = size(1, 5), random.Random(case), Counter(), 0, 0
    params = dict(store=str(tmp_path / "store"), max_steps=8, batch_size=4, grad_accum=2, lora_r=4, seal_steps=2, eval_rows=2, max_length=128, warmup_steps=1)
    if CASES[case].get("task") == "classify":
        params |= dict(model=encoder, data=labelled(tmp_path / "rows.jsonl"))
    else:
        params |= dict(model=tiny_model(tmp_path / "model"), data=rows(tmp_path / "rows.jsonl"))
    if case.endswith("padded"):  # a window shorter than a row cannot be laid flat
        config = Path(params["model"]) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16)))
    params |= CASES[case]
    store = Store(params["store"])

    def report(run):
        found = store.read(f"runs/{run}/train/1/report").meta
        return {k: found[k] for k in ("adapter_sha256", "loss", "evals", "eval_loss", "metrics", "samples", "reward") if k in found}

    mother.precision = mother.apart.precision = "bfloat16" if case.endswith("bfloat16") else "float32"
    with Clock() as clock:
        entries = mother.apart.run(params | dict(run="calm"))
        want = report("calm")
        calm = store.read("runs/calm/train/1/report").meta
        assert calm["precision"] == mother.precision and ((calm.get("padding") or 0) > 0) >= case.endswith("padded")
        while sum(hits.values()) < kills:
            run, runs = params | dict(run=f"r{runs}"), runs + 1
            assert runs < 4 * kills, "every run was faster than its kill"
            for _ in range(rng.choice([1, 1, 2])):
                moment, sealing = rng.choice(entries[rng.choice(list(entries))]), rng.random() < 0.2
                found = mother.kill(run, moment, 0 if sealing else rng.uniform(0, 1.5 if moment == 1 else 0.02), sealing)
                if found is None:
                    break
                hits[found[0]] += 1
                seals += found[1] == "sealing"
            mother.run(run)
            assert report(run["run"]) == want
    note("kill -9 while training", case, kills=sum(hits.values()), runs=runs, other_adapters=0, at=hits, while_sealing=seals, seconds=clock.seconds)
    print(dict(case=case, kills=sum(hits.values()), runs=runs, entries=sum(map(len, entries.values())), at=dict(hits), sealing=seals, seconds=clock.seconds))
