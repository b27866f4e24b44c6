"""The demo recipe in a reduced size, through papermill, twice: every station, the page, the table; the second time nothing is computed."""

import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, WAYSTATION

from waystation.assets import fetch_asset
from waystation.recipe import station_notebook
from waystation.registry import show_run
from waystation.store import Store

pytestmark = pytest.mark.slow

SMALL = ["train.max_steps=2", "train.eval_rows=2", "train.seal_steps=1", "train.eval_steps=1", "train.warmup_steps=1", "train.batch_size=2",
         "embed.limit=40", "embed.shard_rows=32", "embed-16s.limit=200", "embed-16s.shard_rows=64", "export-16s.index=none", "export.index=none"]


def test_the_journey_and_again(cli, env, tmp_path):
    args = ["run", ROOT / "recipes/demo.yaml", "--run", "small", "--page", tmp_path / "page.html", *(x for s in SMALL for x in ("--set", s))]
    first = cli(*args, "--json")
    assert [s["step"] for s in first["steps"]] == ["setup", "train", "embed", "embed-16s", "export", "export-16s"]
    _, train, embed, tree, export, _ = first["steps"]
    assert train["steps"] == 2 and train["metrics"]["tuned"]["both"]["n"] == 2
    assert embed["rows"] > 40 and embed["source_rows"] == 40 and embed["shards"] > 1 and tree["rows"] == 200
    assert export["rows"] == embed["rows"]
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert "<script" not in page and not re.findall(r"""(?:src|@import|<link[^>]*href)=?["' (]*https?:""", page), "the page asks for something from elsewhere"

    start = time.time()
    again = cli(*args, "--json")
    assert again["steps"][1:] == first["steps"][1:]
    assert {k: v for k, v in again["notebooks"].items() if k != "setup"} == {k: v for k, v in first["notebooks"].items() if k != "setup"}
    assert time.time() - start < 60

    table = cli(*args)
    assert "held-out loss" in table and f"{embed['rows']:,} vectors" in table

    # Every executed notebook is sealed with the run, ran to its end, and shows no error.
    store = Store(env["WAYSTATION_STORE"])
    for step, name in first["notebooks"].items():
        station = next(s["station"] for s in first["steps"] if s["step"] == step)
        nb = nbformat.read(store.fetch(name, tmp_path / step) / station_notebook(station).name, as_version=4)
        assert all(o.output_type != "error" for c in nb.cells if c.cell_type == "code" for o in c.outputs)

    assert "store:vectors/small/v1" in cli("show", "small") and "finished" in cli("show")
    shown = cli("show", "small", "--json")
    assert [s["station"] for s in shown["steps"]] == ["setup", "train", "embed", "embed", "export", "export"]
    assert all(s["report"] for s in shown["steps"])

    # PEFT loads the adapter, and Lance the table, without waystation.
    probe = (
        "import sys, lance; from peft import PeftModel; from transformers import AutoModelForCausalLM as Base; assert 'waystation' not in sys.modules;"
        f"m = PeftModel.from_pretrained(Base.from_pretrained({str(fetch_asset('smollm2-135m'))!r}), {train['adapter']!r}); t = lance.dataset({export['table']!r});"
        "assert 'waystation' not in sys.modules; print(m.peft_config['default'].r, t.count_rows(), t.schema.names)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    r, rows, *names = done.stdout.split()
    assert (int(r), int(rows)) == (16, export["rows"])
    assert "'id'," in names[0] + names[1] and "vector" in done.stdout

    changed = cli(*args, "--set", "embed.seed=1", code=2)
    assert "seed was 0, is 1" in changed and "--restart" in changed


def test_stations_by_plain_papermill(env, tmp_path):
    "`papermill nbs/stations/3_embed.ipynb out.ipynb -p …`, as the README says, with parameters that are not the defaults; the recipe above runs train so."
    changed = {
        "1_setup": dict(model="asset:minilm", data="asset:banking"),
        "3_embed": dict(source="asset:banking", limit=20, shard_rows=5),
        "4_export": dict(index="none", table="pm", ask="What is the annual fee?"),
    }
    for station, params in changed.items():
        pairs = [x for k, v in dict(params, run="pm", store=env["WAYSTATION_STORE"]).items() for x in ("-p", k, str(v))]
        command = [Path(WAYSTATION).with_name("papermill"), ROOT / f"nbs/stations/{station}.ipynb", tmp_path / "out.ipynb", *pairs, "-k", "python3"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    shown = {s["step"]: s for s in show_run(Store(env["WAYSTATION_STORE"]), "pm")["steps"]}
    assert list(shown["setup"]["report"]["inputs"]) == ["asset:banking", "asset:minilm"]
    assert (shown["embed"]["seals"]["shards"], shown["embed"]["report"]["rows"]) == (4, 20)
    assert (shown["export"]["report"]["rows"], len(shown["export"]["report"]["answers"])) == (20, 3)
