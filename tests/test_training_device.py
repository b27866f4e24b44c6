"""What the device decides in training: less memory and the same result, and what happens when memory runs out."""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from proving import PROVE
from test_train import go  # noqa: F401  the fixture

from torch.distributed.tensor import DTensor
from waystation import recipe
from waystation.runtime import Interrupted, Refused
from waystation.stations.train import train
from waystation.store import Store
from waystation.training import device, trainer
from waystation.training.checkpoints import SealCallback, missing

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


@pytest.fixture
def card(monkeypatch):
    "`card(rows, since=STEP)`: from that step on, more rows at once than that do not fit. Gives the list of what was tried."
    scored, tried = trainer.Tuner.scored, []

    def small(rows, since=0, error=FULL, evaluating=False):
        def full(self, model, inputs):
            n = len(inputs["lengths" if "lengths" in inputs else "input_ids"])  # rows that are laid end to end say how long each is
            if model.training != evaluating and self.state.global_step >= since and n > rows:
                tried.append((self.state.global_step, n))
                kept = scored(self, model, inputs)  # what a frame of the traceback holds on to: all activations
                raise type(error)(*error.args) if kept is not None else None
            return scored(self, model, inputs)

        monkeypatch.setattr(trainer.Tuner, "scored", full)
        return tried

    return small


HOW = dict(lora_dropout=0.0, eval_steps=0)


@pytest.mark.parametrize("how", [{}, dict(task="grpo", rewards="length")])
def test_processes_look_for_left_out_weights_where_there_are_some(go, monkeypatch, how):  # noqa: F811
    seen = []
    monkeypatch.setattr(trainer, "fit", lambda c, job: seen.append((c.trainer.args.ddp_find_unused_parameters, c.model)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(max_steps=1, eval_rows=1, **how, **HOW)
    [(asked, made)] = seen
    assert asked is False
    made.config.layerdrop = 0.1
    assert trainer.leaves_out(made) is True
    made.config.layerdrop = 0.0
    made.base_model.model.experts = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    assert trainer.leaves_out(made) is True


def test_out_of_memory_takes_fewer_rows_at_once(go, tmp_path, card, power_goes, caplog):  # noqa: F811
    fewer = go(run="fewer", batch_size=4, grad_accum=2, **HOW)
    tried = card(4, since=3)
    whole = go(run="whole", **HOW)
    assert tried == [(3, 8)], "once, and not again in the same process"
    assert [r.message for r in caplog.records if "out of memory" in r.message] != []
    assert whole["resumed_from"] == 2 and (whole["plan"]["batch_size"], whole["plan"]["grad_accum"]) == (4, 2)
    assert "8 rows at once did not fit into memory in step 4" in whole["plan"]["why"]["batch_size"]
    for (s, a), (t, b) in zip(whole["loss"], fewer["loss"], strict=True):
        assert s == t and a == pytest.approx(b, rel=1e-5)
    assert whole["eval_loss"]["after"] == pytest.approx(fewer["eval_loss"]["after"], rel=1e-5)
    assert ["4 rows at once instead of 8 from here on" in x for x in whole["resume_notes"]] == [True] and fewer["resume_notes"] == []
    assert whole["params"]["batch_size"] == 8, "what was asked for stays what identifies the run"
    tried.clear()
    power_goes(4, lambda: go(run="cut", **HOW))
    resumed = go(run="cut", **HOW)
    assert tried == [(3, 8)], "a rerun begins with what was found"
    assert resumed["resumed_from"] == 4 and resumed["adapter_sha256"] == whole["adapter_sha256"] and resumed["loss"] == whole["loss"]
    assert len(Store(str(tmp_path / "store")).list("runs/cut/train/1/fits")) == 1


def test_a_host_without_memory_says_it_otherwise(go, card):  # noqa: F811
    tried = card(4, error=HOST)
    assert go(max_steps=1, **HOW)["plan"]["batch_size"] == 4 and tried == [(0, 8)]


@pytest.mark.slow
def test_memory_is_let_go_before_the_next_try(go, card, monkeypatch):  # noqa: F811
    made, dead, prepare = [], [], trainer.prepare

    def spy(*args):
        dead.append([ref() is None for ref in made])
        c = prepare(*args)
        made.extend([weakref.ref(c.model), weakref.ref(c.trainer), *(weakref.ref(w) for w in c.model.parameters() if w.requires_grad)])
        return c

    monkeypatch.setattr(trainer, "prepare", spy)
    card(2, since=1)
    go(max_steps=2, **HOW)
    assert [len(d) > 0 and all(d) for d in dead] == [False, True, True], "8, 4 and 2 at once; nothing of an earlier try lives"


@pytest.mark.slow
def test_when_one_row_does_not_fit(go, tmp_path, card):  # noqa: F811
    tried = card(0, since=2)
    with pytest.raises(Refused, match=r"out of memory on .* in step 3 with one row at once.*gradient_checkpointing=True, or a smaller model"):
        go(batch_size=2, **HOW)
    assert tried == [(2, 2), (2, 1)]
    assert Store(str(tmp_path / "store")).list("runs/t/train/1/checkpoints") == ["runs/t/train/1/checkpoints/2"]
    card(1, since=2)  # what gradient checkpointing would do
    assert go(batch_size=2, gradient_checkpointing=True, **HOW)["resumed_from"] == 2, "the way out is open in the same run"


def test_out_of_memory_while_examining(go, card):  # noqa: F811
    card(2, evaluating=True)
    assert ["while held-out rows were examined: 2 rows at once instead of 4" in x for x in go(**HOW)["resume_notes"]] == [False, True]
    card(0, evaluating=True)
    with pytest.raises(Refused, match=r"while held-out rows were examined with one row at once.*max_length.*with --restart"):
        go(run="none", **HOW)


@pytest.mark.parametrize("error", [FULL, HOST])
def test_out_of_memory_before_and_after_the_training(go, tmp_path, monkeypatch, error):  # noqa: F811
    "One sentence each. What was learnt is sealed when the last examination does not fit, and the same command goes on behind it."

    def full(*args, **kw):
        raise error

    monkeypatch.setattr(trainer, "generate_answers", lambda asked, tokenizer, rows, **kw: [""] * len(rows))
    with monkeypatch.context() as m, pytest.raises(Refused, match=r"out of memory on \S.* while the model was loaded; take method='qlora', a smaller"):
        m.setattr(trainer, "load_model", full)
        go(method="lora", **HOW)
    assert Store(str(tmp_path / "store")).list() == []
    with monkeypatch.context() as m, pytest.raises(Interrupted, match=r"out of memory on \S.* while the trained model was examined; nothing is lost"):
        m.setattr(trainer, "fit", lambda c, job, real=trainer.fit: real(c, job) | (m.setattr(trainer, "generate_answers", full) or {}))
        go(method="lora", max_steps=2, **HOW)
    assert go(method="lora", max_steps=2, **HOW)["resumed_from"] == 2


def test_other_errors_are_not_memory(go, card):  # noqa: F811
    tried = card(4, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        go(**HOW)
    assert tried == [(0, 8)]


@pytest.mark.parametrize("on", [True, False])
def test_computing_activations_again_by_the_name_that_it_has(tmp_path, monkeypatch, on):
    "transformers 5.23 warns of the name that 5.22 has, and TRL's own default is that name, too."
    from transformers import PreTrainedModel
    from trl import SFTConfig

    p = dict(batch_size=8, grad_accum=1, gradient_checkpointing=on)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = SFTConfig(str(tmp_path), **device.plan(p).arguments(p))
    assert args.gradient_checkpointing is on, "TRL reads it so"
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    assert [k for k in device.plan(p).arguments(p) if "checkpointing" in k] == ["gradient_checkpointing", "gradient_checkpointing_kwargs"]


@pytest.mark.slow
def test_small_optimizer_and_recomputed_activations_resume_exactly(go, tmp_path, power_goes):  # noqa: F811
    how = dict(optimizer="adamw_8bit", lora_r=64, eval_steps=0)  # a matrix of 4,096 numbers and more is kept in 8 bits
    whole = go(run="whole", **how)
    power_goes(4, lambda: go(run="cut", gradient_checkpointing=True, **how))
    resumed = go(run="cut", gradient_checkpointing=True, **how)
    assert resumed["resumed_from"] == 4 and resumed["plan"]["optimizer"] == "adamw_8bit"
    for key in ("adapter_sha256", "loss", "eval_loss"):
        assert resumed[key] == whole[key], key
    sealed = Store(str(tmp_path / "store")).fetch("runs/cut/train/1/checkpoints/6", tmp_path / "six")
    kept = torch.load(sealed / "optimizer.pt", weights_only=True)["state"].values()
    assert torch.uint8 in {s["__bnb_optimizer_quant_state__"]["state1"].dtype for s in kept}


def test_a_run_of_an_older_version_goes_on(go, tmp_path, power_goes, monkeypatch):  # noqa: F811
    "Its parameters did not have an optimizer; and its checkpoints did not say how the device was used."
    how, now = dict(eval_steps=0, max_steps=4), recipe.identity
    with monkeypatch.context() as m:
        m.setattr(recipe, "identity", lambda *a: {k: v for k, v in now(*a).items() if k != "optimizer"})
        power_goes(2, lambda: go(**how))
    assert go(**how)["resumed_from"] == 2
    with pytest.raises(Refused, match="optimizer was '', is 'adamw_8bit'"):
        go(optimizer="adamw_8bit", **how)


@pytest.mark.parametrize(
    "change, env, says",
    [
        ({"optimizer": "adam"}, {}, "there are adamw, adamw_8bit, paged_adamw_8bit"),
        ({"optimizer": "paged_adamw_8bit"}, {}, "on a CPU .* is one memory"),
        ({}, {"PJRT_DEVICE": "TPU"}, "does not run on a TPU .*Tunix"),
        ({}, {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}, "'qlora' under FSDP: .*take method='lora'"),
        ({"task": "grpo"}, {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}, "only 'sft' is trained with a model in parts"),
        ({}, {"WORLD_SIZE": "3", "RANK": "0"}, "8 rows a step, which 3 processes cannot share evenly"),
    ],
)
def test_refused_before_anything_is_loaded(go, tmp_path, monkeypatch, change, env, says):  # noqa: F811
    monkeypatch.setattr(trainer, "load_model", None)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Refused, match=says):
        go(**change)
    assert Store(str(tmp_path / "store")).list() == []


def test_a_scaled_loss_needs_its_scale(tmp_path):
    "With float16 the scale of the loss is state like any other: without it a resume is not exact, and nobody would notice."
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (tmp_path / name).touch()
    assert missing(tmp_path) == [] and missing(tmp_path, scaled=True) == ["scaler.pt"]
    (tmp_path / "scaler.pt").touch()
    assert missing(tmp_path, scaled=True) == []


def one_of_two(rank, port, folder, how, dies, env):
    "A process that a launcher would have started; the main one dies right after the seal of checkpoint `dies`."
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WAYSTATION_WANDB_MODE": "disabled", "WAYSTATION_CACHE": f"{folder}/cache"}
    os.environ |= {k: v.format(rank=rank) for k, v in env.items()}
    torch.set_num_threads(1)
    seal, end = recipe.Job.seal, SealCallback.on_train_end

    def cut(self, to, kind, number=None, meta=None):
        name = seal(self, to, kind, number, meta)
        if rank == 0 and (kind, number) == ("checkpoints", dies):
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    def look(self, *args, **kw):
        weights = [w.detach().numpy().tobytes() for n, w in sorted(kw["model"].named_parameters()) if w.requires_grad]
        Path(folder, f"weights-{rank}").write_text(hashlib.sha256(b"".join(weights)).hexdigest())
        frozen = [w for w in kw["model"].parameters() if not w.requires_grad]
        here = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in frozen)
        Path(folder, f"seed-{rank}").write_text(str(torch.initial_seed()))
        Path(folder, f"share-{rank}").write_text(str(here / sum(w.numel() for w in frozen)))
        return end(self, *args, **kw)

    recipe.Job.seal, SealCallback.on_train_end = cut, look
    Path(folder, f"report-{rank}").write_text(json.dumps(train(**how)))


def in_two_processes(folder, how, dies=0, **env):
    "The reports of both, and a hash of what each has learnt; the exit codes when one was to die."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # imports once for all
    context.set_forkserver_preload(["waystation.training.classifier", "waystation.training.rewards"])  # which take longest; Python 3.11 finds no test here
    both = [context.Process(target=one_of_two, args=(rank, port, str(folder), how, dies, env)) for rank in (0, 1)]
    for p in both:
        p.start()
    both[0].join(300)
    if dies:
        both[1].kill()
    both[1].join(60)
    if dies:
        return [p.exitcode for p in both]
    assert [p.exitcode for p in both] == [0, 0]
    return [json.loads((folder / f"report-{r}").read_text()) for r in (0, 1)], [(folder / f"weights-{r}").read_text() for r in (0, 1)]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(go, tmp_path, model):  # noqa: F811
    how = dict(max_steps=4, eval_steps=2, batch_size=2, grad_accum=4, lora_dropout=0.0)
    alone = go(run="alone", **how)
    how |= dict(store=str(tmp_path / "store"), model=model, data=str(tmp_path / "rows.jsonl"), lora_r=4, seal_steps=2, max_length=128)
    how |= dict(warmup_steps=1, eval_rows=3)
    main, other = in_two_processes(tmp_path, how | dict(run="cut"), dies=2)
    assert main == -signal.SIGKILL and other != 0, "killed, or stopped by itself when the main process was gone"
    (cut, other), (ours, theirs) = in_two_processes(tmp_path, how | dict(run="cut"))
    assert other == {} and ours == theirs and cut["resumed_from"] == 2
    assert (cut["plan"]["processes"], cut["plan"]["batch_size"], cut["plan"]["grad_accum"]) == (2, 2, 2), "eight rows a step, as asked"
    for (s, a), (t, b) in zip(cut["loss"], alone["loss"], strict=True):
        assert s == t and a == pytest.approx(b, rel=1e-4)
    assert cut["eval_loss"]["after"] == pytest.approx(alone["eval_loss"]["after"], rel=1e-5), "no row counts twice"
    assert len(Store(how["store"]).list("runs/cut/train/1/checkpoints")) == 2
    if PROVE:
        (calm, _), _ = in_two_processes(tmp_path, how | dict(run="calm"))
        assert cut["adapter_sha256"] == calm["adapter_sha256"] and cut["loss"] == calm["loss"]
