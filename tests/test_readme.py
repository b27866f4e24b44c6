"""What README.md tells people to type works as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from waystation.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
SHELL = [line.split("#")[0].strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]


def test_every_command_is_known():
    "Nothing stands in the README that the tests below, or the Makefile's own targets, do not cover."
    assert {line.split()[0] for line in SHELL} == {"git", "make", "waystation", "papermill"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {line.split()[1] for line in SHELL if line.startswith("make ")} <= targets


@pytest.mark.slow
def test_the_readme_commands_run(env, tmp_path, monkeypatch, capsys):
    "Those of waystation in this process, which loads torch and jax once; tests/test_demo.py starts the program itself."
    pq.write_table(pa.table({"key": ["a", "b", "c"], "body": ["one text", "another text", "a third"]}), tmp_path / "rows.parquet")
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.chdir(tmp_path)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    commands = [line for line in SHELL if line.startswith(("waystation ", "papermill "))]
    python = [text for kind, text in BLOCKS if kind == "py"]
    assert len(commands) >= 2 and len(python) == 1
    for program, *args in [*map(shlex.split, commands), [sys.executable, "-c", python[0]]]:
        if program == "waystation":
            code, said = main(args), capsys.readouterr().err
        else:
            done = subprocess.run([Path(sys.executable).parent / program, *args], capture_output=True, text=True)
            code, said = done.returncode, done.stderr
        assert code == 0, f"{program} {shlex.join(args)}\n{said[-3000:]}"


def test_every_link_to_a_file_of_the_repository_leads_somewhere():
    links = [x for x in re.findall(r"\]\(([^)#\s]+)\)", README) if "://" not in x]
    assert links and [x for x in links if not (ROOT / x).exists()] == []
