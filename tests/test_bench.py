"""The guides show the figures that were measured: their tables are made from benchmarks/store.json and embed.json, and from nothing else."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bench(name="store"):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_shows_what_was_measured():
    b = bench()
    guide = (ROOT / "lit" / "guides" / "resume.md").read_text()
    shown = guide.split(b.BEGIN)[1].split(b.END)[0]
    assert shown.strip() == b.tables(json.loads(b.RESULT.read_text())).strip(), "run `python benchmarks/store.py --table`, which writes it, and `make build`"


def test_every_figure_has_enough_rounds():
    result = json.loads(bench().RESULT.read_text())
    assert all(way["seconds"]["n"] >= 5 for shape in result["upload"].values() for way in shape.values())
    assert result.get("training", {}).get("Sealer / no upload", {"n": 7})["n"] >= 7


def test_the_guide_on_padding_shows_what_was_measured():
    b = bench("embed")
    shown = b.GUIDE.read_text().split(b.BEGIN)[1].split(b.END)[0]
    assert shown.strip() == b.tables(json.loads(b.RESULT.read_text())).strip(), "run `python benchmarks/embed.py --table`, which writes it, and `make build`"


def test_the_guide_on_tables_shows_what_was_measured():
    b = bench("export")
    shown, told = b.GUIDE.read_text(), b.tables(json.loads(b.RESULT.read_text()))
    assert set(told) == set(b.PARTS)
    for part, text in told.items():
        assert shown.split(b.begin(part))[1].split(b.END)[0].strip() == text.strip(), "run `python benchmarks/export.py --table` and `make build`"


def test_ways_to_embed_that_were_compared_computed_the_same():
    for s in json.loads(bench("embed").RESULT.read_text())["sets"].values():
        for name, way in s["ways"].items():
            assert way["cpu"]["n"] >= 3 and way["cosine"] >= (0.9999 if name.endswith("OpenVINO") else 0.99999)  # bfloat16 where the CPU has it


def test_the_table_of_training_is_the_measured_one():
    b = bench("train")
    shown = b.GUIDE.read_text().split(b.BEGIN)[1].split(b.END)[0]
    result = json.loads(b.RESULT.read_text())
    assert shown.strip() == b.tables(result).strip(), "run `python benchmarks/train.py --table`, which writes it, and `make build`"
    for dtype in ("bfloat16", "float32"):
        ours, trl, recipe = (result["ways"][f"{way}, {dtype}"] for way in (b.OURS, b.TRL, b.RECIPE))
        assert ours["cpu"]["n"] >= 3 and trl["slower"]["median"] >= 1.5 and recipe["slower"]["median"] >= 2
        assert all(ours["loss"] <= 1.01 * way["loss"] and ours["peak"]["max"] <= way["peak"]["max"] for way in (trl, recipe))


@pytest.mark.slow
def test_the_benchmarks_of_embedding_still_run():
    "In a fiftieth of their size: their own checks hold, and they follow the package."
    b = bench("embed")
    found = b.measure("16S", *b.collections(0.02)["16S"], 1, "")
    assert found["oracle"] == b.PAD and all(way["cosine"] >= 0.99999 for way in found["ways"].values())
    assert [n for n, _ in found["growth"]] == [2, 5, 10]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/levers.py", "--scale", "0.02", "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and "attention by hand: " in done.stdout, done.stderr[-3000:]
