"A store's own settings.ini counts wherever the store is, and one that cannot be read costs seconds and one sentence."

import logging
import socket
import threading
import time

import pytest

from waystation import runtime
from waystation.recipe import begin
from waystation.remotes import open_place
from waystation.runtime import Refused, prices, settings
from waystation.store import Store

TOLD = "[DEFAULT]\nmirror = memory://told/mirror\nwandb_mode = disabled\n[prices]\ngs.standard = 0.02\n"


@pytest.fixture(autouse=True)
def forgetful(monkeypatch, tmp_path):
    "As a process that has just begun, of a user without settings."
    monkeypatch.setattr(runtime, "_said", {})
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("WAYSTATION_STORE", raising=False)
    monkeypatch.delenv("WAYSTATION_MIRROR", raising=False)


def at(server):
    return f"{server.url.rstrip('/')}/settings-{time.time_ns()}"


@pytest.mark.parametrize("kind", ["gcs", "s3", "rclone_remote"])
def test_of_a_far_store(server, kind, monkeypatch):
    with server(kind).environ() as s:
        url = at(s)
        monkeypatch.setenv("WAYSTATION_STORE", url)
        assert settings()["mirror"] == "" and prices() == {}
        runtime._said.clear()
        place = open_place(url)
        place.create("settings.ini", TOLD.encode())
        place.settle()
        assert (settings()["mirror"], settings()["store"], prices()) == ("memory://told/mirror", url, {"gs.standard": 0.02})
        monkeypatch.setenv("WAYSTATION_MIRROR", "/elsewhere")
        assert settings()["mirror"] == "/elsewhere"  # a variable wins over all files


def test_a_command_knows_them(server, cli):
    with server("gcs").environ() as s:
        url = at(s)
        Store(url).seal(None, "a/1", dict(x=1))
        open_place(url).create("settings.ini", b"[prices]\ngs.standard = 1000\n")
        bill = cli("store", "cost", "--store", url, "--json", **s.env | dict(WAYSTATION_STORE=""))
        assert bill["unpriced"] == [] and bill["month"] == pytest.approx(bill["bytes"] / 1e6)


def test_it_travels_once(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "_far", [lambda url: (asked.append(url), TOLD)[1]])
    threads = [threading.Thread(target=settings, args=["memory://once/a"]) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert asked == ["memory://once/a"] and settings("memory://once/b/")["mirror"] and asked[1:] == ["memory://once/b"]


def test_the_settings_are_those_of_the_store_in_use(tmp_path, monkeypatch):
    "Not those of the one that would be used if none were named: its mirror would take another store's seals."
    monkeypatch.setenv("WAYSTATION_STORE", str(tmp_path / "a"))
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.ini").write_text(f"[DEFAULT]\nmirror = {tmp_path}/mirror-of-{name}\n")
    params = dict(run="r", step="embed", station="embed", store=str(tmp_path / "b"), restart=False, take_over=False)
    with begin("embed", params) as job:
        job.finish({})
    assert Store(tmp_path / "mirror-of-b").list() and not (tmp_path / "mirror-of-a").exists()


def test_a_store_that_does_not_answer(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "FAR_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-s3cr3t")
        monkeypatch.setenv("WAYSTATION_STORE", "s3://bucket/ws")
        pytest.importorskip("s3fs")
        began = time.monotonic()
        assert [settings()["mirror"] for _ in range(20)] == [""] * 20
        assert time.monotonic() - began < 5
        monkeypatch.setattr(runtime, "REST_S", 0)
        runtime._said["s3://bucket/ws"] = "", 0.0
        settings()
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "settings.ini" in r.getMessage()]
    assert len(told) == 1 and told[0].startswith("s3://bucket/ws/settings.ini cannot be read (TimeoutError: no answer within 0.3 s)")
    monkeypatch.setattr(runtime, "_far", [lambda url: TOLD])  # it is there again
    assert settings()["mirror"] == "memory://told/mirror"


def test_a_store_that_fails_is_told_without_secrets(monkeypatch, caplog):
    def fail(url):
        raise OSError("GET https://ann:s3cr3tpass@host/?X-Amz-Signature=ab12 failed")

    monkeypatch.setattr(runtime, "_far", [fail])
    assert settings("s3://bucket/ws")["mirror"] == ""
    assert "cannot be read (OSError" in caplog.text and "s3cr3tpass" not in caplog.text and "ab12" not in caplog.text


@pytest.mark.parametrize("url", ["rclone:s3,secret_access_key=s3cr3t:bucket", "s3://AKIA:s3cr3t@bucket/x", "ftp://host/x"])
def test_a_store_that_cannot_be_opened_is_refused_by_the_store_alone(url, caplog):
    settings(url)
    assert caplog.text == ""
    with pytest.raises(Refused):
        Store(settings(url)["store"])


@pytest.mark.parametrize("text", ["mirror = x\n", "[DEFAULT]\n[DEFAULT\n", "[a]\nx=1\nx=2\n"])
@pytest.mark.parametrize("far", [False, True])
def test_one_that_cannot_be_understood(text, far, tmp_path):
    url = f"memory://wrong/{time.time_ns()}" if far else str(tmp_path)
    if far:
        open_place(url).create("settings.ini", text.encode())
    else:
        (tmp_path / "settings.ini").write_text(text)
    with pytest.raises(Refused, match=r"cannot be understood .*mend it"):
        settings(url)
