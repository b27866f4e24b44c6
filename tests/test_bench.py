"""The guides show the figures that were measured: their tables are made from the JSON files in benchmarks/, and from nothing else."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from figures import show, shown

ROOT = Path(__file__).resolve().parent.parent


def result(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["store", "embed", "train"])
def test_a_guide_shows_what_was_measured(name):
    b = import_module(name)
    told = b.tables(result(name)).strip()
    assert told and shown(b.GUIDE, b.BEGIN) == told, f"run `python benchmarks/{name}.py --table`, which writes it, and `make build`"


def test_the_guide_on_tables_shows_what_was_measured():
    b = import_module("export")
    told = b.tables(result("export"))
    assert set(told) == set(b.PARTS)
    for part, text in told.items():
        assert shown(b.GUIDE, b.begin(part)) == text.strip(), "run `python benchmarks/export.py --table` and `make build`"


def test_a_table_goes_between_its_marks_and_nowhere_else(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\nkept\n<!-- end -->\nthree\n")
    for _ in range(2):  # again is the same
        show(guide, "<!-- a -->\n", "new\n")
        assert guide.read_text() == "one\n<!-- a -->\n\nnew\n\n<!-- end -->\ntwo\n<!-- b -->\nkept\n<!-- end -->\nthree\n"
    with pytest.raises(ValueError):
        show(guide, "<!-- c -->\n", "lost")


def test_every_figure_has_enough_rounds():
    store = result("store")
    assert all(way["seconds"]["n"] >= 5 for shape in store["upload"].values() for way in shape.values())
    assert store.get("training", {}).get("Sealer / no upload", {"n": 7})["n"] >= 7


def test_ways_to_embed_that_were_compared_computed_the_same():
    for s in result("embed")["sets"].values():
        for name, way in s["ways"].items():
            assert way["cpu"]["n"] >= 3 and way["cosine"] >= (0.9999 if name.endswith("OpenVINO") else 0.99999)  # bfloat16 where the CPU has it


def test_training_is_as_fast_as_it_says_and_learns_as_much():
    b = import_module("train")
    for dtype in ("bfloat16", "float32"):
        ours, trl, recipe = (result("train")["ways"][f"{way}, {dtype}"] for way in (b.OURS, b.TRL, b.RECIPE))
        assert ours["cpu"]["n"] >= 3 and trl["slower"]["median"] >= 1.5 and recipe["slower"]["median"] >= 2
        assert all(ours["loss"] <= 1.01 * way["loss"] and ours["peak"]["max"] <= way["peak"]["max"] for way in (trl, recipe))


@pytest.mark.slow
def test_the_benchmarks_of_embedding_still_run():
    "In a fiftieth of their size: their own checks hold, and they follow the package."
    b = import_module("embed")
    found = b.measure("16S", *b.collections(0.02)["16S"], 1, "")
    assert found["oracle"] == b.PAD and all(way["cosine"] >= 0.99999 for way in found["ways"].values())
    assert [n for n, _ in found["growth"]] == [2, 5, 10]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/levers.py", "--scale", "0.02", "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and "attention by hand: " in done.stdout, done.stderr[-3000:]
