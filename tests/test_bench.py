"""The guides show the figures that were measured: their tables are made from benchmarks/store.json and embed.json, and from nothing else."""

import importlib.util
import json
from pathlib import Path

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


def test_ways_to_embed_that_were_compared_computed_the_same():
    for s in json.loads(bench("embed").RESULT.read_text())["sets"].values():
        assert all(way["cosine"] >= 0.99999 and way["cpu"]["n"] >= 3 for way in s["ways"].values())
