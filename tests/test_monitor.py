"Metrics and alerts: each step once however often a run is killed, read by W&B's own reader; and alerts that cost a run nothing."

import contextlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from test_train import rows

from waystation import monitor
from waystation.monitor import Monitor, announce, last_kept, post
from waystation.runtime import GateFailed, Refused
from waystation.stations.train import train
from waystation.store import Store


@pytest.fixture
def go(model, tmp_path, monkeypatch):
    "Train a little with W&B offline; keyword arguments are the station's."
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "offline")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    few = dict(run="t", store=str(tmp_path / "store"), model=model, data=rows(tmp_path / "rows.jsonl"), max_steps=8, batch_size=4, lora_r=4, method="lora",
               eval_steps=4, seal_steps=2, max_length=128, warmup_steps=1, eval_rows=2)  # fmt: skip
    return lambda **change: train(**few | change)


def records(cache):
    "Of each process, oldest first: id, history and alerts, as `wandb leet inspect` reads them."
    out = []
    for file in sorted((cache / "wandb/wandb").glob("offline-run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime_ns):
        said = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", file], capture_output=True, text=True, check=True).stdout
        kinds = {}
        for line in said.splitlines():
            r = json.loads(line)
            kinds.setdefault(r["type"], []).append(r[r["type"]])
        out.append((kinds["run"][0]["run_id"] if "run" in kinds else "", [h["item"] for h in kinds.get("history", [])], kinds.get("alert", [])))
    return out


@pytest.mark.slow
def test_each_step_is_there_once(go, power_goes, tmp_path):
    "Cut short twice; of the second process W&B's file is left as kill -9 leaves it: without what was in memory."
    cache = tmp_path / "cache"
    power_goes(4, go)
    kept = {f for f in (cache / "wandb/wandb").glob("offline-run-*") if not f.is_symlink()}
    time.sleep(1)  # W&B names its folders by the second
    power_goes(6, go)
    lost, = {f for f in (cache / "wandb/wandb").glob("offline-run-*") if not f.is_symlink()} - kept
    file, = lost.glob("*.wandb")
    file.write_bytes(file.read_bytes()[:7])
    time.sleep(1)
    report = go()
    assert report["resumed_from"] == 6 and report["resume_notes"] == []
    found = records(cache)
    assert {id for id, *_ in found} == {"t-train-1", ""}, "one id; and the file that was lost"
    steps = [[x for x in history if "loss" in x] for _, history, _ in found]
    at = [[x["at"] for x in some] for some in steps]
    assert at == [[1, 2], [], [3, 4, 5, 6, 7, 8]]
    assert [round(x["loss"], 5) for some in steps for x in some] == [loss for _, loss in report["loss"]]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "host/rss_gb", "host/peak_gb"} <= set(steps[0][0]) & set(steps[2][-1])
    assert [x["at"] for some in steps for x in some if "eval_loss" in x] == [4, 8]
    last = found[-1][1][-1]
    assert last["at"] == 8 and last["held_out/eval_loss"] == report["eval_loss"]["after"]
    assert [a["title"] for a in found[-1][2]] == ["t-train-1: finished"]


@pytest.mark.slow
def test_a_machine_without_the_files_sends_nothing_twice(go, power_goes, tmp_path):
    "The folder that has the checkpoint's steps is on the machine that is gone."
    power_goes(4, go)
    (tmp_path / "gone/wandb").mkdir(parents=True)
    shutil.move(tmp_path / "cache/wandb/wandb", tmp_path / "gone/wandb/wandb")
    go()
    there, here = ([x["at"] for _, history, _ in records(tmp_path / where) for x in history if "loss" in x] for where in ("gone", "cache"))
    assert (there, here) == ([1, 2], [5, 6, 7, 8])


def test_a_reader_that_is_not_there(tmp_path, monkeypatch):
    "An older W&B: rather a gap than a step twice."
    folder = tmp_path / "offline-run-20260101_000000-a-train-1"
    folder.mkdir()
    assert last_kept(tmp_path, "a-train-1") == 0
    (folder / "run-a-train-1.wandb").write_bytes(b"")
    monkeypatch.setattr(monitor.sys, "executable", "/bin/false")
    assert last_kept(tmp_path, "a-train-1") == float("inf")
    assert last_kept(tmp_path, "train-1") == 0, "another run's name ends like this one's"


class Hook(http.server.BaseHTTPRequestHandler):
    "What the test wants: `server.how` is a list of 'ok', '500' or 'slow'."

    def do_POST(self):
        how = self.server.how.pop(0) if self.server.how else "ok"
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if how == "slow":
            for _ in range(60):  # a byte now and then, so that no read of a socket runs into its timeout
                with contextlib.suppress(OSError):
                    self.wfile.write(b"H")
                time.sleep(0.05)
            return
        self.send_response(500 if how == "500" else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hook(monkeypatch):
    "A webhook on this machine."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as s:
        s.how, s.got, s.daemon_threads = [], [], True
        s.url = f"http://127.0.0.1:{s.server_port}/hook/s3cr3t-s3cr3t"
        monkeypatch.setenv("WAYSTATION_ALERT_URL", s.url)
        monkeypatch.setattr(monitor, "ALERT_S", 0.3)
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


def test_a_webhook_is_told(hook, caplog):
    announce("a-train-1", "nan", "loss is nan at https://ann:s3cr3tpass@host")
    assert hook.got == [dict(run="a-train-1", event="nan", title="a-train-1: nan", text="loss is nan at https://***@host")] and caplog.text == ""


@pytest.mark.parametrize("how, tries, why", [(["500"], 2, ""), (["500", "500"], 2, "HTTP 500"), (["slow", "slow"], 1, "no answer in time")])
def test_a_webhook_that_fails(hook, caplog, how, tries, why):
    hook.how, began = how, time.monotonic()
    announce("a-train-1", "finished", "done")
    assert time.monotonic() - began < 5 and len(hook.got) == tries
    assert (f"took no alert of 'finished' ({why})" in caplog.text) == bool(why)
    assert "s3cr3t" not in caplog.text


def test_a_webhook_that_is_not_there(hook, caplog):
    hook.shutdown()
    hook.server_close()
    announce("a-train-1", "finished", "done")
    assert "took no alert of 'finished' (URLError)" in caplog.text and "s3cr3t" not in caplog.text and "hook" not in caplog.text.replace("webhook", "")
    assert post("http://[s3cr3t", {}) == "ValueError"
    from waystation.runtime import redact

    assert hook.url not in redact(f"POST {hook.url} failed")


def test_finished_and_a_gate_that_failed(go, hook, monkeypatch, caplog):
    "Through both ways, once; a step that is judged again is not told again. The address is in nothing that was sealed."
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    with pytest.raises(GateFailed):
        go(max_steps=2, eval_steps=0, gates="eval_loss <= 0")
    with pytest.raises(GateFailed):
        go(max_steps=2, eval_steps=0, gates="eval_loss <= 0")
    go(max_steps=2, eval_steps=0)
    assert [(x["run"], x["event"]) for x in hook.got] == [("t-train-1", "gate failed")]
    assert "eval_loss <= 0: failed" in hook.got[0]["text"]


def test_nan_is_told_and_stops(go, hook, monkeypatch, tmp_path):
    "The alert is in W&B's file; the steps that were not sealed are not."
    from waystation.training import trainer

    real = trainer.Tuner.compute_loss

    def bad(self, model, *args, **kw):
        loss = real(self, model, *args, **kw)
        return loss * float("nan") if model.training and self.state.global_step == 3 else loss

    monkeypatch.setattr(trainer.Tuner, "compute_loss", bad)
    with pytest.raises(Refused, match="loss is nan at step 4"):
        go(eval_steps=0)
    assert [x["event"] for x in hook.got] == ["nan"]
    (_, history, alerts), = records(tmp_path / "cache")
    assert [x["at"] for x in history] == [1, 2] and [(a["title"], a["level"]) for a in alerts] == [("t-train-1: nan", "ERROR")]
    assert Store(str(tmp_path / "store")).list("runs/t/train/1/checkpoints") == ["runs/t/train/1/checkpoints/2"]


def test_a_step_that_hangs_is_told(go, hook, monkeypatch):
    "A long evaluation is no standstill; a step that takes longer than the limit is one."
    from waystation.training import trainer

    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_STALLED_MINUTES", str(2 / 60))
    real = trainer.Tuner.compute_loss

    def slow(self, model, *args, **kw):
        if model.training and self.state.global_step == 1:
            time.sleep(3)
        return real(self, model, *args, **kw)

    monkeypatch.setattr(trainer.Tuner, "compute_loss", slow)
    go(max_steps=2, eval_steps=0)
    events = [x["event"] for x in hook.got]
    assert "stalled" in events and events[-1] == "finished" and "nothing has moved for" in hook.got[0]["text"]


def test_settings_that_are_no_number(monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    for bad in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("WAYSTATION_STALLED_MINUTES", bad)
        with pytest.raises(Refused, match="stalled_minutes='" + bad):
            Monitor(SimpleNamespace(id="a"), {})
    monkeypatch.setenv("WAYSTATION_STALLED_MINUTES", "0")
    mon = Monitor(SimpleNamespace(id="a"), {})
    mon.watch.alive()
    assert mon.watch._thread is None, "0 is never"
