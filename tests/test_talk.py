"""`waystation chat`: one question for a script, a pipe, a base beside its adapter, and a terminal in which Ctrl-C stops an answer."""

import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from conftest import WAYSTATION
from test_train import tiny_model, tiny_run



@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "An adapter of a tiny random model."
    tmp = tmp_path_factory.mktemp("talk")
    return tmp, tiny_run(tmp, lora_r=8, method="lora", learning_rate=0.02, eval_rows=1)["adapter"]


def test_one_question(trained, run, monkeypatch, capsys):
    tmp, adapter = trained
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp / "cache"))
    few = ("--max-new", 12, "--store", tmp / "store")
    tuned = run("chat", "store:models/t/current", "--once", "Say 3.", *few)
    assert tuned["text"] == tuned["turns"][-1]["content"] and [m["role"] for m in tuned["turns"]] == ["user", "assistant"] and tuned["tokens"] <= 12
    assert run("chat", adapter, "--once", "Say 3.", *few)["text"] == tuned["text"]
    base = run("chat", adapter, "--once", "Say 3.", "--base", *few)["text"]
    assert base != tuned["text"] and base == run("chat", tmp / "model", "--once", "Say 3.", *few)["text"], "the base is asked with the adapter off"
    loud = run("chat", adapter, "--once", "Say 3.", "--system", "Be loud.", *few)
    assert loud["text"] != tuned["text"]
    taught = shutil.copytree(adapter, tmp / "taught")
    said = json.loads((taught / "waystation.json").read_text())
    (taught / "waystation.json").write_text(json.dumps(said | {"system": "Be loud."}))
    assert run("chat", taught, "--once", "Say 3.", *few)["text"] == loud["text"], "the system message of its training"
    warm = [run("chat", adapter, "--once", "Say 3.", "--temperature", 2, "--seed", s, *few)["text"] for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    monkeypatch.setattr("sys.stdin", io.StringIO("Say 3.\n"))
    assert run("chat", adapter, *few)["text"] == tuned["text"], "a question may come through a pipe"


def test_the_precision_of_the_store_in_use(trained, monkeypatch, tmp_path):
    from waystation.stations.setup import survey
    from waystation.store import Store
    from waystation.training.talk import open_talk

    tmp, _ = trained
    monkeypatch.delenv("WAYSTATION_PRECISION", raising=False)
    monkeypatch.setenv("WAYSTATION_STORE", str(tmp_path / "another"))
    for asked in ("bfloat16", "float32"):
        store = Store(tmp_path / asked)
        (tmp_path / asked / "settings.ini").write_text(f"[DEFAULT]\nprecision = {asked}\n")
        assert str(open_talk(str(tmp / "model"), store).model.dtype) == f"torch.{asked}" and survey(store.url)["precision"] == asked


def test_refused(trained, run, monkeypatch, tmp_path):
    tmp, adapter = trained
    (tmp_path / "labels.json").write_text("{}")
    bare = tmp_path / "bare"
    tiny_model(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    once = ("--once", "Who?")
    for args, says in (((tmp / "model", *once, "--base"), "has no base under it"), ((tmp_path, *once), "is a classifier"), ((bare, *once), "no chat template"),
                       ((adapter,), "nothing was asked"), ((adapter, *once, "--temperature", "-1"), "temperature=-1"),
                       ((adapter, *once, "--max-new", 0), "max_new=0"), ((adapter, *once, "--max-new", 600), "more than the 512 positions")):  # fmt: skip
        assert says in run("chat", *args, code=2)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_conversation(env, tmp_path):
    "In a terminal of its own, with a model that would go on for 50,000 tokens."
    model = Path(tiny_model(tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (model / "config.json").write_text(json.dumps(config))
    ours, theirs = pty.openpty()
    command = [WAYSTATION, "chat", str(model), "--max-new", "50000"]

    def terminal():
        "Signals come from the new terminal, and SIGINT is not ignored, as it is in what a script has put into the background."
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    p = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "dumb"}, start_new_session=True, preexec_fn=terminal)
    os.close(theirs)
    seen = ""

    def until(text, seconds=240):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, seen[-2000:]
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        seen = seen.split(text, 1)[1]

    try:
        until("> ")
        os.write(ours, b"Tell me all\n")
        time.sleep(3)
        assert p.poll() is None
        os.write(ours, b"\x03")  # the terminal makes SIGINT of it
        until("[stopped]")
        until("> ")
        os.write(ours, b"/nonsense\n")
        until("/nonsense is unknown")
        os.write(ours, b"/quit\n")
        assert p.wait(60) == 0
    finally:
        p.kill()
        p.wait()
        os.close(ours)


@pytest.mark.parametrize("n, says", [(0, "0 answers"), (1, "1 answer"), (2, "2 answers")])
def test_how_many_answers_a_conversation_had(monkeypatch, n, says):
    from types import SimpleNamespace

    from waystation.cli import chat
    from waystation.training import talk

    had = SimpleNamespace(turns=[{"content": ""}] * (1 + 2 * n), tokens=0, seconds=0, system="", set=lambda *a: had)
    monkeypatch.setattr(talk, "open_talk", lambda *a: had)
    monkeypatch.setattr(talk, "converse", lambda *a: None)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert chat("any")["text"] == says
