"""The doctor finds out which promises a place keeps, without being told what it is."""

import os
import threading
import time

import pytest

from waystation.doctor import doctor
from waystation.place import Folder, Patience
from waystation.remotes import Drive, Hub, open_place
from servers import rclone_s3
from test_places import FakeDrive, FakeHub, without_links


@pytest.mark.parametrize("kind", ["gcs", "s3", "rclone_remote"])
def test_real_servers_keep_their_promises(kind, server, monkeypatch):
    s = server(kind)
    for k, v in s.env.items():
        monkeypatch.setenv(k, v)
    place = open_place(f"{s.url}/doctor")
    found = doctor(place)
    assert (found["exit"], found["broken"]) == (0, []), found["text"]
    assert found["checks"]["exclusive create"]["result"] == ("limited" if kind == "rclone_remote" else "ok")
    assert found["mb_per_second_up"] > 0 and place.keys("probes") == []


def test_an_s3_without_conditions_is_found_out():
    "A server of its own: two writers of one key may set it spinning for good."
    with rclone_s3() as s, s.environ():
        began = time.monotonic()
        found = doctor(f"{s.url}/doctor", megabytes=1)
        assert time.monotonic() - began < 120  # each of its probes has a limit of 20 s
    assert found["exit"] == 4 and "exclusive create" in found["broken"]
    assert "broken: exclusive create" in found["text"]


def test_silence_and_errors_are_findings(tmp_path, monkeypatch):
    "A place that hangs in one call and fails in another: the rest is tried, and the doctor comes to an end."
    monkeypatch.setattr("waystation.doctor.LIMIT_S", 0.5)
    monkeypatch.setattr("waystation.doctor.SOON_S", 0.5)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-0123456789")
    hang = threading.Event()

    class Sick(Folder):
        def put(self, *_):
            hang.wait(30)

        def entries(self, prefix):
            raise ValueError("token=planted-secret-0123456789 went wrong")

    tries, began = Patience.tries, time.monotonic()
    found = doctor(Sick(tmp_path / "sick"), megabytes=1)
    hang.set()
    assert time.monotonic() - began < 20 and Patience.tries == tries
    assert found["exit"] == 4 and {"read, list, delete", "complete or invisible", "clean up"} <= set(found["broken"])
    assert found["checks"]["exclusive create"]["result"] == "ok" and found["free_bytes"] > 0
    assert "no answer within" in found["text"] and "went wrong" in found["text"] and "planted-secret" not in found["text"]


def test_folders_with_and_without_links(tmp_path, monkeypatch):
    found = doctor(tmp_path / "a")
    assert found["exit"] == 0 and found["checks"]["exclusive create"]["result"] == "ok" and found["free_bytes"] > 0
    without_links(monkeypatch)
    found = doctor(tmp_path / "b")
    assert found["exit"] == 0 and "single-writer mode" in found["checks"]["exclusive create"]["means"]
    assert not os.path.exists(tmp_path / "b/probes")


def test_hub_and_drive():
    found = doctor(Hub("hf:datasets/ann/store", FakeHub()), megabytes=1)
    assert (found["exit"], found["checks"]["exclusive create"]["result"]) == (0, "ok"), found["text"]
    found = doctor(Drive("drive:x", FakeDrive().login), megabytes=1)
    assert (found["exit"], found["checks"]["exclusive create"]["result"]) == (0, "limited"), found["text"]


def test_command(cli, tmp_path):
    assert "keeps what it promises" in cli("store", "doctor", tmp_path / "x")
