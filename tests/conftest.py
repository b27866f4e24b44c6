"""What the tests share: commands as a user types them, in a store and a working folder of their own."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import servers

# A CPU with instructions for it trains in bfloat16; a test that compares figures should not depend on the CPU.
os.environ.setdefault("WAYSTATION_PRECISION", "float32")
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


@pytest.fixture
def run(capsys):
    "`waystation …` in this process: its JSON, or with `code=2` the sentence that refused."
    from waystation.cli import main

    def go(*args, code=0):
        got = main([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert got == code, err
        said = json.loads(out)
        if code:
            assert "\n" not in said["message"] and "Traceback" not in err
        return said["message"] if code else said

    return go


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A random Llama of two layers with a byte tokenizer; a test of another kind of model has a fixture of its own."
    from test_train import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mounted():
    "`with mounted(at, 'size=2m')`: a small disk; the test is skipped where none can be mounted."

    @contextlib.contextmanager
    def mount(at, options):
        at.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", at], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NOT CHECKED: no file system can be mounted here ({done.stderr.strip()})")
        try:
            yield at
        finally:
            subprocess.run(["umount", at], check=True)

    return mount


@pytest.fixture
def power_goes():
    "`power_goes(number, go)`: run `go`, in which the power goes right after the seal of that checkpoint."
    from waystation.recipe import Job

    def cut_short(number, go):
        def cut(self, folder, kind, n=None, meta=None):
            name = real(self, folder, kind, n, meta)
            if (kind, n) == ("checkpoints", number):
                raise KeyboardInterrupt
            return name

        real = Job.seal
        with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Job, "seal", cut)
            go()

    return cut_short


@pytest.fixture(scope="session")
def server():
    """`server("gcs")`: one of servers.ALL, started at its first use and shared until the tests end; use names of your own in it.

    Where its program is missing, the test is skipped and says so; with WAYSTATION_REQUIRE_SERVERS=1, as .ci/run has it, it fails.
    """
    started = {}
    with contextlib.ExitStack() as stack:

        def start(kind, **options):
            key = kind, *sorted(options.items())
            if key not in started:
                try:
                    started[key] = stack.enter_context(servers.ALL[kind](**options))
                except servers.Missing as e:
                    required = os.environ.get("WAYSTATION_REQUIRE_SERVERS") == "1"
                    (pytest.fail if required else pytest.skip)(f"NOT CHECKED: {e}")
            return started[key]

        yield start
