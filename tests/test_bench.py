"""The guide shows the figures that were measured: its table is made from benchmarks/store.json, and from nothing else."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def bench():
    spec = importlib.util.spec_from_file_location("bench_store", ROOT / "benchmarks" / "store.py")
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
