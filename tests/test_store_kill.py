"""kill -9 while sealing, on every kind of place: what is visible is whole, what was acknowledged is there, what is not visible succeeds again.

The writer reports each phase before it enters it, so the last report that came through its pipe is the phase that the kill hit.
The moment is random and a process of its own kills. The network is slow (tests/proxy.py) and the writer stands still for 10 ms at
each report, so that short phases are hit as well as long ones.
"""

import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
from proving import PROVE, Clock, note, serving, size
from proxy import proxy

from waystation.store import Store

PHASES = ("look", "hash", "upload 0", "upload 1", "upload 2", "before commit", "commit", "committed", "acknowledged")
WRITER = """
import itertools, os, sys, time
from pathlib import Path
import waystation.store as w

url, work, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def say(text):
    os.write(1, (text + "\\n").encode())
    time.sleep(0.01)

store, done = w.Store(url), itertools.count(1)
place = store.place
put, create, find = place.put, place.create, w.find_files

def slow_find(folder):
    say("hash")
    return find(folder)

def slow_put(key, path, digest):
    put(key, path, digest)
    n = next(done)
    say(f"upload {n}" if n < 3 else "before commit")

def slow_create(key, data):
    say("commit")
    made = create(key, data)
    say("committed")
    return made

w.find_files, place.put, place.create, place.workers = slow_find, slow_put, slow_create, 2
describe = w.describe

def slow_describe(path):
    found = describe(path)
    if path.name == "part2":
        say("upload 0")
    return found

w.describe = slow_describe
say("ready")
time.sleep(0.02)
for n in range(first, first + len(list(work.iterdir()))):
    done = itertools.count(1)
    say(f"look {n}")
    store.seal(work / str(n), f"runs/a/train/1/checkpoints/{n}", {"n": n})
    say(f"acknowledged {n}")
"""


def make(work, first, count, bytes_):
    "`count` checkpoints of three files, one of which stays the same."
    for n in range(first, first + count):
        (work / str(n)).mkdir(parents=True)
        rng = random.Random(n)
        for k in range(3):
            (work / str(n) / f"part{k}").write_bytes(rng.randbytes(bytes_))
        (work / str(n) / "config").write_bytes(b"the same")


def write(url, work, first, env, delay):
    "Run the writer and kill it after `delay` seconds; its reports."
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url, str(work), str(first)], stdout=subprocess.PIPE, text=True, env=env)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        if delay is not None:
            subprocess.run(["sh", "-c", f"sleep {delay:.3f}; kill -9 {writer.pid}"], capture_output=True)
        said = writer.stdout.read().splitlines()
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    return said


@pytest.mark.parametrize("kind", ["file", "gs", "s3", "rclone"])
def test_kill_at_a_random_moment(kind, server, tmp_path):
    rounds, rng, count = size(8, 60), random.Random(kind), 4
    bytes_ = 4_000_000 if kind == "file" else 150_000
    with contextlib.ExitStack() as stack:
        slow = None
        if kind in ("gs", "s3"):
            slow = stack.enter_context(proxy(server({"gs": "gcs", "s3": "s3"}[kind]).host_port, latency=0.03, bytes_per_second=3e6))
        url, here = stack.enter_context(serving(kind, server, tmp_path))  # this process looks past the slow network
        env = here | (server({"gs": "gcs", "s3": "s3"}[kind]).through(slow).env if slow else {})
        store, clock = Store(url), stack.enter_context(Clock())

        make(tmp_path / "calm", 0, count, bytes_)
        began = time.monotonic()
        assert f"acknowledged {count - 1}" in write(url, tmp_path / "calm", 0, env, None)
        one = (time.monotonic() - began) / (count + 1)  # seconds a seal, or a little more

        hits, torn, late, visible, acknowledged, again = Counter(), [], 0, 0, 0, 0
        for round in range(1, rounds + 1):
            first, work = round * count, tmp_path / f"work{round}"
            make(work, first, count, bytes_)
            said = write(url, work, first, env, rng.random() * one * 2)
            hit = next((s for s in reversed(said) if s), "ready")
            hits[" ".join(w for w in hit.split() if not (w.isdigit() and int(w) >= count))] += 1
            names = {int(n.split("/")[-1]) for n in store.list("runs") if int(n.split("/")[-1]) >= first}
            told = {int(s.split()[1]) for s in said if s.startswith("acknowledged")}
            assert told <= names, f"round {round}: {told - names} were acknowledged and are missing; the kill hit {hit!r}"
            late += len(names - told)
            acknowledged, visible = acknowledged + len(told), visible + len(names)
            torn += [w for n in names for w in store.verify(f"runs/a/train/1/checkpoints/{n}", read_data=True)]
            begun = [int(s.split()[1]) for s in said if s.startswith("look")]
            for n in set(begun) - names:  # what the kill made invisible
                store.seal(work / str(n), f"runs/a/train/1/checkpoints/{n}", {"n": n})
                assert store.verify(f"runs/a/train/1/checkpoints/{n}", read_data=True) == []
                again += 1
            shutil.rmtree(work)
        assert torn == []
        assert [w for n in store.list() for w in store.verify(n, read_data=True)] == []
    figures = dict(kills=rounds, visible=visible, torn=0, acknowledged=acknowledged, missing=0, committed_unacknowledged=late, again=again,
                   phases={p: hits[p] for p in (*PHASES, *sorted(set(hits) - set(PHASES)))}, seconds=clock.seconds)
    print(figures)
    note("kill -9 at a random moment", kind, **figures)
    # Of eight kills all may fall into the longest phase, of sixty not.
    assert again and visible and len(hits) >= (2 if PROVE else 1), f"the kills fell into {dict(hits)}: they prove little"


RACER = """
import sys
from waystation.store import Store

store = Store(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    print(store.publish(None, line.strip(), {"who": int(sys.argv[2])}).name, flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "gs", "s3"])
def test_eight_processes_race_for_one_version_name(kind, server, tmp_path):
    "One winner a number: no gap, no number given twice, and everybody is told the number that is really theirs."
    rounds = size(2, 25)
    with serving(kind, server, tmp_path) as (url, env), Clock() as clock:
        racers = [subprocess.Popen([sys.executable, "-c", RACER, url, str(who)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
                  for who in range(8)]
        try:
            assert [r.stdout.readline() for r in racers] == ["ready\n"] * 8
            for round in range(rounds):
                for r in racers:
                    r.stdin.write(f"models/m{round}\n")
                    r.stdin.flush()
                got = [r.stdout.readline().strip() for r in racers]
                assert sorted(got) == [f"models/m{round}/v{n}" for n in range(1, 9)]
                assert [Store(url).read(name).meta["who"] for name in got] == list(range(8))
        finally:
            for r in racers:
                r.stdin.close()
                r.stdout.close()
                r.kill()
                r.wait()
    note("eight processes race for a version", kind, rounds=rounds, published=8 * rounds, twice=0, gaps=0, seconds=clock.seconds)
