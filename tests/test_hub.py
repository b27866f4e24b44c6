"""The hub, as a server on loopback that answers as the real one does: who may have what, and a model that is downloaded once."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from waystation.assets import keep_base, resolve
from waystation.runtime import Refused
from waystation.store import Store

COMMIT = "c0ffee" * 6 + "c0de"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"w" * 300_000, "tokenizer.json": b"{}", "pytorch_model.bin": b"b" * 900_000}


class Answer(BaseHTTPRequestHandler):
    "What huggingface_hub asks for: the repository, whether one may have it, its tree, its files."

    def log_message(self, *args):
        pass

    def say(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        entries = [dict(type="file", path=f, size=len(b), oid=hashlib.sha1(b).hexdigest()) for f, b in hub.files.items()]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "hf_wrong":
            return self.say(401, {"error": "Invalid credentials in Authorization header"}, X_Error_Message="Invalid credentials in Authorization header")
        if "/o/m" not in path:
            return self.say(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if path.endswith("/auth-check") or "/resolve/" in path:
            if hub.gated and token != "hf_granted":
                more = "Access to model o/m is restricted." + (" You are not in the authorized list." if token else " You must be authenticated.")
                return self.say(403 if token else 401, more.encode(), X_Error_Code="GatedRepo", X_Error_Message=more)
        if path.endswith("/auth-check"):
            return self.say()
        if "/tree/" in path:
            return self.say(body=entries)
        if path.startswith("/api/models/o/m"):
            if path.rpartition("/revision/")[2] in ("gone",):
                return self.say(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id: gone")
            siblings = [dict(rfilename=e["path"], size=e["size"], blobId=e["oid"]) for e in entries]
            return self.say(body=dict(id="o/m", sha=COMMIT, gated="manual" if hub.gated else False, siblings=siblings))
        name, body = path.rpartition("/")[2], hub.files.get(path.rpartition("/")[2], b"")
        if self.command == "GET":
            hub.sent.append(name)
            if name == hub.stuck:  # half of it, and then nothing more
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                hub.hanging.set()
                return hub.over.wait(60)
        self.say(body=body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub, and a machine that has downloaded nothing."
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    url = f"http://127.0.0.1:{server.server_port}"
    made = server.hub = SimpleNamespace(
        files=dict(FILES), gated=False, sent=[], stuck="", hanging=threading.Event(), over=threading.Event(), url=url, server=server
    )

    def machine(name):
        "Another one: its own caches."
        for variable in ("HF_HUB_CACHE", "WAYSTATION_CACHE"):
            monkeypatch.setenv(variable, str(tmp_path / name / variable))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / name / "HF_HUB_CACHE"))

    made.machine = machine
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    machine("a")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def mount(tmp_path):
    "A store on another disk than the downloads, as Drive is."
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system here")
    folder = tempfile.mkdtemp(dir="/dev/shm")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "value, token, says",
    [
        ("o/m", "", ["is gated: open https://huggingface.co/o/m,", "accept the licence", "set it as HF_TOKEN", "Colab", "Nothing was downloaded"]),
        ("o/m", "hf_stranger", ["account of HF_TOKEN has no access: open https://huggingface.co/o/m", "accept the licence"]),
        ("o/m", "hf_wrong", ["does not take the token", "https://huggingface.co/settings/tokens"]),
        ("o/none", "", ["neither a path here nor a repository that the hub gives out", "https://huggingface.co/o/none", "set it as HF_TOKEN"]),
        ("o/none", "hf_granted", ["the account of HF_TOKEN needs access"]),
        ("o/m@gone", "hf_granted", ["no such revision"]),
    ],
)
def test_what_the_hub_refuses_is_said_before_a_download(hub, monkeypatch, value, token, says):
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(Refused) as e:
        resolve(value, "model")
    assert all(s in str(e.value) for s in says) and f"model='{value}'" in str(e.value), e.value
    assert hub.sent == [] and "\n" not in str(e.value) and "hf_" not in str(e.value)


def test_who_was_granted_gets_it(hub, monkeypatch):
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    found = resolve("o/m", "model")
    assert found.fingerprint == f"hub:o/m@{COMMIT}" and (found.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert sorted(hub.sent) == ["config.json", "model.safetensors", "tokenizer.json"]  # not the weights in another form
    monkeypatch.delenv("HF_TOKEN")
    assert resolve("o/m", "model") == found  # what is here is here


def test_a_full_disk_is_said_before_a_download(hub, monkeypatch):
    monkeypatch.setattr("waystation.assets.shutil.disk_usage", lambda p: SimpleNamespace(free=250_000))
    with pytest.raises(Refused, match=r"is 0\.0 GB to download, and .* free: make room, or set HF_HOME"):
        resolve("o/m", "model")
    assert hub.sent == []
    monkeypatch.setattr("waystation.assets.shutil.disk_usage", lambda p: SimpleNamespace(free=310_000))  # the unused form is not counted
    assert resolve("o/m", "model").path.is_dir()


def test_an_unreachable_hub(hub):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(Refused, match="nor could the hub be asked for it"):
        resolve("o/m", "model")
    with pytest.raises(Refused, match="data='o/m' is neither a path"):
        resolve("o/m", "data")


def downloaded_once(hub, store):
    "On this machine from the hub; on another, whose hub is gone, from the store."
    found = resolve("o/m", "model", store)
    keep_base(found, store)
    assert store.read("bases/o/m/main").name == f"bases/o/m/{COMMIT}" and len(hub.sent) == 3
    keep_base(resolve("o/m", "model", store), store)
    assert resolve("o/m", "model", store).path == found.path  # here it is where it was downloaded to, and stays one copy
    hub.machine("b")
    hub.server.shutdown()
    hub.server.server_close()
    for value in ("o/m", f"o/m@{COMMIT}"):
        there = resolve(value, "model", store)
        assert there.fingerprint == found.fingerprint and there.path != found.path
    assert {f.name: f.read_bytes() for f in there.path.iterdir()} == {k: v for k, v in FILES.items() if k != "pytorch_model.bin"}
    with pytest.raises(Refused, match="hub be asked"):
        resolve("o/m@newer", "model", store)


def test_a_base_is_downloaded_once(hub, mount):
    downloaded_once(hub, Store(mount))


def test_a_bucket_keeps_a_base(hub, server):
    with server("gcs").environ() as gcs:
        downloaded_once(hub, Store(f"{gcs.url}/bases-of-hub"))


def test_what_is_not_kept_stops_nobody(hub, mount, tmp_path, monkeypatch, caplog):
    found = resolve("o/m", "model")
    same = Store(tmp_path / "store")
    keep_base(found, same)  # on the disk of the download, which lasts as long
    assert same.list() == []
    monkeypatch.setattr("waystation.assets.shutil.disk_usage", lambda p: SimpleNamespace(free=500_000))
    with caplog.at_level(logging.WARNING, "waystation"):
        keep_base(found, Store(mount))
    assert Store(mount).list() == [] and "o/m is not kept in the store" in caplog.text


def test_killed_in_mid_download(hub, tmp_path):
    hub.stuck = "model.safetensors"
    code = "from waystation.assets import resolve; resolve('o/m', 'model')"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    p = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path)
    try:
        assert hub.hanging.wait(120)
        until = time.monotonic() + 60
        while not {"config.json", "tokenizer.json"} <= {f.name for f in tmp_path.rglob("snapshots/*/*")} and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    hub.stuck, hub.sent[:] = "", []
    found = resolve("o/m", "model")
    assert hub.sent == ["model.safetensors"]  # what had arrived whole is not asked for again
    assert {f.name: f.read_bytes() for f in found.path.iterdir()} == {k: v for k, v in FILES.items() if k != "pytorch_model.bin"}


def test_an_adapter_finds_its_base_by_repository_and_commit(hub, tmp_path):
    "One of ours, one of an older version that has no commit beside the name, and PEFT's files alone; the hub is gone."
    from waystation.training.report import base_of
    from waystation.training.trainer import name_base

    found, here = resolve("o/m", "model"), {"base_model_name_or_path": "/tmp/vanished", "revision": None}
    hub.server.shutdown()
    hub.server.server_close()
    for name, base in (("ours", found.lasting), ("old", "o/m"), ("peft", "")):
        (folder := tmp_path / name).mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(here))
        if base:
            (folder / "waystation.json").write_text(json.dumps(dict(base=base, base_fingerprint=found.fingerprint)))
        if name != "old":
            name_base(folder, found)
            said = json.loads((folder / "adapter_config.json").read_text())
            assert (said["base_model_name_or_path"], said["revision"]) == ("o/m", COMMIT)
        assert base_of(folder, None) == found.path and found.path.name == COMMIT


@pytest.mark.slow
def test_another_machine_goes_on_without_the_hub(hub, mount, tmp_path, monkeypatch, power_goes):
    "A run whose machine vanished is finished by one that never reached the hub; so is what reads the adapter's base."
    from test_leave import alone, paths_in, snippet
    from test_train import rows, tiny_model

    from waystation.stations.train import train
    from waystation.training.merge import merge
    from waystation.training.report import base_of

    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    hub.files = {f.name: f.read_bytes() for f in Path(tiny_model(tmp_path / "model")).iterdir()}
    few = dict(run="t", store=str(mount), model="o/m", data=rows(mount / "rows.jsonl"), max_steps=4, batch_size=4, lora_r=2, seal_steps=2, eval_rows=2,
               max_length=128, warmup_steps=0, method="lora")  # fmt: skip
    power_goes(2, lambda: train(**few))
    assert sorted(hub.sent) == sorted(hub.files)
    hub.machine("b")
    hub.server.shutdown()
    hub.server.server_close()
    r = train(**few)
    assert r["resumed_from"] == 2 and r["steps"] == 4
    store = Store(mount)
    got = store.fetch(r["model"], tmp_path / "got")
    assert base_of(got, store).is_relative_to(tmp_path / "b")
    said, card = json.loads((got / "adapter_config.json").read_text()), (got / "README.md").read_text()
    assert (said["base_model_name_or_path"], said["revision"]) == ("o/m", COMMIT), "though the checkpoints have the path of a"
    assert json.loads((got / "waystation.json").read_text())["base"] == f"o/m@{COMMIT}" and "`o/m` on the Hugging Face hub" in card and COMMIT in card
    merged = Path(merge("models/t/v1", str(mount))["folder"])
    assert f"**o/m@{COMMIT}**" in (merged / "README.md").read_text()
    assert paths_in(got, tmp_path) == paths_in(merged, tmp_path) == [], "rows lie elsewhere"
    alone(snippet(card, got), tmp_path, HF_HUB_CACHE=str(tmp_path / "a" / "HF_HUB_CACHE"))
