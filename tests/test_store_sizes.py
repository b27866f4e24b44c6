"""Sizes that break naive stores: ten thousand files, one file larger than memory should hold, a target with no room."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from proving import note, size

from waystation.runtime import Refused
from waystation.store import Store

CHILD = """
import json, resource, sys, time
from pathlib import Path
from waystation.store import Store
url, folder, out = sys.argv[1:]
store, took = Store(url), {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for what, do in (("seal", lambda: store.seal(folder, "data/large")), ("verify", lambda: store.verify("data/large", read_data=True)),
                 ("fetch", lambda: store.fetch("data/large", out))):
    t = time.time()
    assert do() != ["wrong"]
    took[what] = round(time.time() - t, 2)
assert store.verify("data/large", read_data=True) == []
print(json.dumps(took | dict(files=len(store.read("data/large").files), rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024),
                             grew_mb=round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024))))
"""


def measured(url, folder, out, env=None):
    "Seal, verify and fetch in a process of their own: seconds and peak memory."
    done = subprocess.run([sys.executable, "-c", CHILD, url, str(folder), str(out)], capture_output=True, text=True, env=env or dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def same(a: Path, b: Path) -> bool:
    return subprocess.run(["diff", "-rq", a, b], capture_output=True).stdout == b""


@pytest.mark.parametrize("kind", ["file", "gs"])
def test_ten_thousand_small_files(kind, server, tmp_path):
    "Those that fit travel in the manifest; the others go side by side."
    n, folder = size(2_000, 10_000), tmp_path / "many"
    for k in range(n):
        f = folder / f"{k % 100:02}" / f"datei {k} ü.txt"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes(b"%d " % k * 150)
    if kind == "file":
        found = measured(str(tmp_path / "store"), folder, tmp_path / "out")
    else:
        there = server("gcs")
        with tempfile.TemporaryDirectory() as t:
            found = measured(f"{there.url}/sizes-{Path(t).name}", folder, tmp_path / "out", os.environ | there.env)
    assert found["files"] == n and same(folder, tmp_path / "out")
    assert found["grew_mb"] < 250
    note(f"{n} small files", kind, **found)


def test_a_sparse_file_larger_than_memory_should_hold(tmp_path):
    "5 GB in the long form: read in pieces, so memory does not grow with it."
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work/large.bin", "wb") as f:
        f.truncate(size(300_000_000, 5_000_000_000))
        f.seek(200_000_000)
        f.write(b"not zero")
    found = measured(str(tmp_path / "store"), tmp_path / "work", tmp_path / "out")
    assert found["grew_mb"] < 100, found
    assert same(tmp_path / "work", tmp_path / "out")
    note("one sparse file", "file", gb=size(300_000_000, 5_000_000_000) / 1e9, **found)


def test_a_target_without_room_is_refused_before_it_is_filled(tmp_path, mounted):
    with mounted(tmp_path / "small", "size=2m") as mount:
        (tmp_path / "work").mkdir()
        (tmp_path / "work/a").write_bytes(os.urandom(3_000_000))
        store = Store(tmp_path / "store")
        store.seal(tmp_path / "work", "data/a")
        with pytest.raises(Refused, match=r"has 3 MB and .* has room for 2; make room"):
            store.fetch("data/a", mount / "out")
        assert not [p for p in mount.rglob("*") if p.is_file()]
