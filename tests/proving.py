"""What the proofs share: how long they run, the places they run on, and the file that their figures go to.

`pytest` runs them in seconds; `make prove` sets WAYSTATION_PROVE=1, which runs them in the size that the documentation speaks of
and writes runs/prove.json, which it then copies to where the documentation reads it.
"""

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROVE = os.environ.get("WAYSTATION_PROVE") == "1"
FIGURES = ROOT / "runs" / "prove.json"
SERVERS = {"gs": "gcs", "s3": "s3", "rclone": "rclone_remote"}
NUMBERS = itertools.count()


def size(short: int, long: int) -> int:
    return long if PROVE else short


def note(proof: str, place: str, **figures) -> None:
    "Keep what a proof measured; only the long form is worth keeping."
    if PROVE:
        FIGURES.parent.mkdir(exist_ok=True)
        kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        kept.setdefault(proof, {})[place] = figures
        FIGURES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def serving(kind: str, server, tmp_path: Path, through=None) -> Iterator[tuple[str, dict]]:
    "A store's URL of its own on a kind of place and the environment of a child process; this process has it meanwhile as well."
    name = f"{uuid.uuid4().hex[:8]}-{next(NUMBERS)}"
    if kind == "file":
        yield str(tmp_path / name), dict(os.environ)
        return
    there = server(SERVERS[kind])
    if through is not None:
        there = there.through(through)
    with there.environ():
        url = f"{there.url}/{name}"
        if kind == "rclone":
            from waystation.remotes import open_place
            from waystation.runtime import Refused
            try:
                open_place(url)
            except Refused as e:
                if "is not known" in str(e):
                    pytest.skip("rclone: is no place yet")
                raise
        yield url, dict(os.environ)


class Clock:
    def __enter__(self):
        self.began = time.monotonic()
        return self

    def __exit__(self, *_):
        self.seconds = round(time.monotonic() - self.began, 1)
