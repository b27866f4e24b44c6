"""The literate build: lit/, nbs/ and waystation/ say the same, and what only a notebook has survives.

A house of two notebooks stands in for the whole one: `make check` compares the real one. The stations' own cells are
read from the real notebooks.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
STATIONS = ["1_setup", "2_train", "3_embed", "4_export"]

spec = importlib.util.spec_from_file_location("literate", ROOT / "tools" / "literate.py")
literate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(literate)

PART = """```python
#| default_exp part
```

# Part

> One noun.

```python
#| export
def double(
    n:int, # Rows
) -> int:  # Twice as many
    "Double `n`."
    return 2 * n
```

Why twice?

```python
assert double(2) == 4
```
"""

STATION = """```python
#| default_exp stations.train
```

# Train

> A station.

```python tags=["parameters"]
run = 'demo'  #@param {type:"string"}
seed = 0  #@param {type:"integer"}
```

```python
#| export
def train(run='demo', seed=0): return dict(run=run, seed=seed)
```

```python
#| slow
report = train(run=run, seed=seed)
```
"""


@pytest.fixture
def house(tmp_path) -> Path:
    "A project of one part and one station, built."
    root = tmp_path / "house"
    (root / "lit" / "stations").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "lit" / "00_part.md").write_text(PART)
    (root / "lit" / "stations" / "2_train.md").write_text(STATION)
    literate.build(root)
    return root


def edit(path: Path, change) -> None:
    "Apply `change` to a notebook's cells, in the file's own bytes otherwise."
    nb = nbformat.read(path, as_version=4)
    change(nb.cells)
    literate.write(path, nb)


def station(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "nbs" / "stations" / f"{name}.ipynb", as_version=4)


def tagged(nb: nbformat.NotebookNode, tag: str) -> list:
    return [c for c in nb.cells if tag in c.metadata.get("tags", [])]


def parameters(name: str) -> dict:
    "name -> value of the parameters cell; anything but `name = literal` is an error here."
    (cell,) = tagged(station(name), "parameters")
    found = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), f"{name}: `{ast.unparse(statement)}` is not `name = literal` (no annotations, no code)"
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        try:
            found[target.id] = ast.literal_eval(statement.value)
        except ValueError:
            pytest.fail(f"{name}: `{ast.unparse(statement)}` is derived; papermill injects values after this cell, so it would keep the old one")
    return found


def test_a_built_house_agrees(house):
    assert literate.check(house) == []
    assert literate.build(house) == []  # a second build finds nothing to do


def test_a_stale_module_is_named(house):
    module = house / "waystation" / "part.py"
    module.write_text(module.read_text().replace("2 * n", "3 * n"))
    assert Path("waystation/part.py") in literate.check(house)
    literate.build(house)  # and repaired, from lit/
    assert "2 * n" in module.read_text() and literate.check(house) == []


def test_an_edited_notebook_is_named(house):
    def change(cells): cells[-1].source = "assert double(2) == 5"
    edit(house / "nbs" / "00_part.ipynb", change)
    assert Path("nbs/00_part.ipynb") in literate.check(house)


def test_a_lost_parameters_tag_is_named(house):
    "Without it papermill exits with 0 and ignores every -p."
    def change(cells): [c.metadata.pop("tags") for c in cells if "tags" in c.metadata]
    edit(house / "nbs" / "stations" / "2_train.ipynb", change)
    assert Path("nbs/stations/2_train.ipynb") in literate.check(house)


def test_a_module_without_a_notebook_is_removed(house):
    (house / "lit" / "00_part.md").unlink()
    assert {Path("nbs/00_part.ipynb"), Path("waystation/part.py")} <= set(literate.check(house))


def test_clean_keeps_tag_and_colab_metadata(house):
    path = house / "nbs" / "stations" / "2_train.ipynb"
    before = path.read_bytes()
    subprocess.run([Path(sys.executable).parent / "nbdev-clean"], cwd=house, check=True)
    nb = nbformat.read(path, as_version=4)
    assert len(tagged(nb, "parameters")) == 1
    assert nb.metadata["accelerator"] == "GPU" and nb.metadata["colab"] == {"gpuType": "T4"}
    assert path.read_bytes() == before


def test_cell_ids_and_outputs_stay(house):
    "Edit one cell and insert another in the Markdown: every other cell is still the same cell."
    path, md = house / "nbs" / "00_part.ipynb", house / "lit" / "00_part.md"

    def change(cells): cells[-1].outputs = [nbformat.v4.new_output("stream", text="4\n")]
    edit(path, change)
    before = {c.source: c.id for c in nbformat.read(path, as_version=4).cells}
    md.write_text(md.read_text().replace("Why twice?", "Why not thrice?\n\n```python\ndouble(0)\n```\n\nBecause:"))
    literate.build(house)
    after = nbformat.read(path, as_version=4).cells
    assert {c.source: c.id for c in after if c.source in before} == {s: i for s, i in before.items() if s != "Why twice?"}
    assert len({c.id for c in after}) == len(after)
    assert after[-1].outputs[0].text == "4\n"


@pytest.mark.parametrize("name", STATIONS)
def test_one_parameters_cell_of_literals(name):
    found = parameters(name)
    assert {"run", "store", "seed", "restart"} <= found.keys()
    assert all(type(v) in (str, int, float, bool) for v in found.values())
    (cell,) = tagged(station(name), "parameters")
    assert "#| export" not in cell.source  # it would leak the parameters into the module's __all__


@pytest.mark.parametrize("name", STATIONS)
def test_parameters_and_signature_are_one_list(name):
    "Names, order, defaults and their types; and every one of them is passed on by the call."
    verb = name.split("_")[1]
    function = getattr(importlib.import_module(f"waystation.stations.{verb}"), verb)
    signature = {k: p.default for k, p in inspect.signature(function).parameters.items()}
    cell = parameters(name)
    assert list(cell.items()) == list(signature.items())
    assert [type(v) for v in cell.values()] == [type(v) for v in signature.values()]
    calls = [n for c in station(name).cells if c.cell_type == "code" and "#| export" not in c.source and not re.search(r"^[%!]", c.source, re.M)
             for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == verb]
    passed = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls]
    assert {k: k for k in signature} in passed, f"{name}: no cell calls {verb}({', '.join(f'{k}={k}' for k in signature)})"


@pytest.mark.parametrize("name", STATIONS)
def test_the_index_of_colab_metadata(name):
    "Train opens with a GPU, embed with a TPU; the others with what the user has."
    want = {"2_train": "GPU", "3_embed": "TPU"}.get(name)
    assert station(name).metadata.get("accelerator") == want
