"""The house has three storeys: ground, wings, stations. Imports point downwards only, and importing costs nothing.

Read from the source with `ast`, so that an import inside a function counts as well.
"""

import ast
import functools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "waystation"
HEAVY = ["torch", "jax", "flax", "lancedb", "lance", "transformers", "datasets", "pandas", "wandb", "papermill", "matplotlib", "duckdb", "ray", "dash"]


@functools.cache
def modules() -> dict[str, Path]:
    "Dotted name below `waystation` -> file."
    found = {}
    for path in sorted(LIB.rglob("*.py")):
        parts = path.relative_to(LIB).with_suffix("").parts
        if parts[-1] not in ("__init__", "_modidx", "__main__"):
            found[".".join(parts)] = path
    return found


@functools.cache
def numbers() -> dict[str, int]:
    "Module -> the number of its notebook."
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        number = re.match(r"(\d+)_", path.name)
        for cell in nbformat.read(path, as_version=4).cells:
            if number and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M)):
                found[m[1]] = int(number[1])
    return found


def imports(name: str, path: Path) -> set[str]:
    "Modules of waystation that `path` imports anywhere, relative imports resolved."
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["waystation", *package[:len(package) - node.level + 1]]
                base += node.module.split(".") if node.module else []
            else:
                base = (node.module or "").split(".")
            # `from waystation import store` names a module in its list, `from waystation.store import Store` does not
            targets = [".".join(base), *(".".join([*base, a.name]) for a in node.names)]
        else:
            continue
        found |= {t.removeprefix("waystation.") for t in targets if t.startswith("waystation.")}
    return found & modules().keys()


def storey(name: str) -> str:
    "'ground', 'stations', 'cli', or the name of a wing."
    return name if name == "cli" else name.split(".")[0] if "." in name else "ground"


EDGES = sorted((a, b) for a, path in modules().items() for b in imports(a, path))


def test_the_parts_are_all_here():
    assert {storey(m) for m in modules()} >= {"ground", "training", "embedding", "vectors", "stations", "cli"}
    assert EDGES, "not one import found: this test reads nothing"
    assert modules().keys() <= numbers().keys(), f"modules without a numbered notebook: {modules().keys() - numbers().keys()}"


@pytest.mark.parametrize("a, b", EDGES, ids=[f"{a}->{b}" for a, b in EDGES])
def test_imports_point_downwards(a, b):
    up, down = storey(a), storey(b)
    assert down != "cli", f"{a} imports cli: nothing stands on the commands"
    if up == "ground":
        assert down == "ground", f"{a} (ground) imports {b}: the ground knows nothing of what stands on it; let the station hand a function down"
    elif up not in ("stations", "cli"):
        assert down in ("ground", up), f"{a} imports {b}: a wing never imports another wing or a station; let the station hand a function across"
    elif up == "stations":
        assert down not in ("stations", "cli"), f"{a} imports {b}: stations know the ground and the wings, not each other"
    if up == down:
        number = numbers()
        assert number[b] < number[a], f"{a} ({number[a]:02}) imports {b} ({number[b]:02}): a part imports smaller numbers only"


@pytest.mark.parametrize("name", ["waystation", "waystation.cli", *(f"waystation.stations.{s}" for s in ("setup", "train", "embed", "export"))])
def test_import_loads_nothing_heavy(name):
    code = f"import sys, json, {name}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [], f"import {name} loads {done.stdout.strip()}"


def test_help_answers_at_once():
    "Half a second of CPU time, the best of five: the wall clock of a loaded machine says nothing."
    command = Path(sys.executable).parent / "waystation"
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([command, "--help"], capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5, f"waystation --help took {min(times):.2f} s of CPU time; look at python -X importtime -m waystation.cli --help"
    verbs = "setup train embed export run show search sql import view classify near cluster lint evaluate chat merge"
    for verb in verbs.split():
        assert verb in done.stdout
