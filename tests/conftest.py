"""What the tests share: commands as a user types them, in a store and a working folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WAYSTATION = str(Path(sys.executable).parent / "waystation")


@pytest.fixture
def env(tmp_path):
    "Environment of a command: its own store, no metrics service; the cache of downloads and models is shared."
    return {**os.environ, "WAYSTATION_STORE": str(tmp_path / "store"), "WAYSTATION_WANDB_MODE": "disabled"}


@pytest.fixture
def cli(env, tmp_path):
    "Run `waystation …`; the exit code, and with --json the object that it printed."

    def run(*args, code=0, **changes):
        done = subprocess.run(
            [WAYSTATION, *map(str, args)], cwd=tmp_path, env=env | changes, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
        return json.loads(done.stdout) if "--json" in args else done.stderr if code else done.stdout

    return run
