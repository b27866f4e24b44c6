"""A file sent in one request: whole under faults and lost replies, and not at all when it changes on the way."""

import base64
import contextlib
import hashlib
import socket
import threading
import types

import pytest
from google_crc32c import Checksum
from proxy import proxy
from waystation.remotes import ONE_REQUEST, SOME, Bucket
from waystation.runtime import Refused
from waystation.store import Store

SIZE = 3_000_000


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / f"in/{i}").write_bytes(bytes([i + 1]) * (SIZE + i))
    (tmp_path / "in/small").write_bytes(b"s" * 70_000)
    return tmp_path / "in"


def test_whole_under_faults(server, folder, tmp_path):
    assert SOME < SIZE < ONE_REQUEST
    g = server("gcs")
    with proxy(g.host_port, faults=0.2, lost=0.5, seed=3, fault_kinds=("503", "429", "reset", "cut")) as p, g.through(p).environ() as s:
        store = Store(f"{s.url}/upload-faults")
        for n in range(3):
            (folder / "small").write_bytes(bytes([n]) * 70_000)
            store.seal(folder, f"c/{n}")
        p.set(faults=0)
        assert p.stats()["faults"] > 3
        assert [store.verify(f"c/{n}", read_data=True) for n in range(3)] == [[], [], []]


def test_other_bytes_than_promised_do_not_arrive(server, tmp_path):
    g, file = server("gcs"), tmp_path / "file"
    file.write_bytes(b"a" * SIZE)
    promised = hashlib.sha256(b"a" * (SIZE - 1) + b"b").hexdigest()
    with proxy(g.host_port) as p, g.through(p).environ() as s:
        place = Bucket(f"{s.url}/upload-change")
        with pytest.raises(Refused, match="changed while"):
            place.put("blobs/x", file, promised)  # found out at the last piece: the others have left by then
        assert place.size("blobs/x") is None
        file.write_bytes(b"a" * (SIZE - 1) + b"b")
        place.put("blobs/x", file, promised)
        assert place.size("blobs/x") == SIZE


def test_many_small_new_files_are_not_asked_for_one_by_one(server, tmp_path):
    g = server("gcs")
    for i in range(60):
        (tmp_path / f"{i:02}").write_bytes(bytes([i]) * 70_000)
    with proxy(g.host_port) as p, g.through(p).environ() as s:
        Store(f"{s.url}/upload-small").seal(tmp_path, "c/1")
        assert p.stats(clear=True)["requests"] <= 60 + 12  # eight questions, the ref's, the manifest, and some that overlap
        Store(f"{s.url}/upload-small").seal(tmp_path, "c/2")  # as a new process does
        assert p.stats()["bytes_up"] < 60 * 70_000 / 2  # most of them found there


@contextlib.contextmanager
def wire(target, heads):
    "An address that passes everything on to `target`; the beginnings of what clients send are put into `heads`."

    def pump(src, dst, note):
        with contextlib.suppress(OSError):
            while data := src.recv(1 << 16):
                if note:
                    heads.append(data[:5000])
                dst.sendall(data)
        with contextlib.suppress(OSError):
            dst.shutdown(socket.SHUT_WR)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                there = socket.create_connection(target.split(":"))
                for way in (client, there, True), (there, client, False):
                    threading.Thread(target=pump, args=way, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield types.SimpleNamespace(host_port=f"127.0.0.1:{listening.getsockname()[1]}")


@pytest.mark.parametrize("how, size", [("create", 1000), ("one piece", 70_000), ("streamed", SIZE), ("in blocks", ONE_REQUEST + 1_000_000)])
def test_every_upload_says_its_checksum_first(server, tmp_path, how, size):
    "The emulator does not compare it, so what is sent is looked at, on the wire."
    g, file, sent = server("gcs"), tmp_path / "file", []
    data = bytes([7]) * size
    file.write_bytes(data)
    want = base64.b64encode(Checksum(data).digest()).decode()
    with wire(g.host_port, sent) as address, g.through(address).environ() as s:
        place = Bucket(f"{s.url}/upload-checksum")
        if how == "create":
            place.create(how, data)
        else:
            place.put(how, file, hashlib.sha256(data).hexdigest())
        assert place.size(how) == size
    assert any(f'"crc32c": "{want}"'.encode() in head for head in sent)
