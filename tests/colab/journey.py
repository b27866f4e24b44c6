"""The stations as notebooks on Colab's versions; tools/test_colab.sh makes the environment and runs this in it.

    python tests/colab/journey.py bootstrap   # print the install commands of the bootstrap cells, for this checkout
    python tests/colab/journey.py run         # setup, embed, export; compare with tests/colab/golden.npz
    python tests/colab/journey.py golden      # make golden.npz with sentence-transformers (on the development environment)
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ROWS = 20


def bootstrap(station: str) -> str:
    "The install command of a station's bootstrap cell, on this checkout instead of the repository's address."
    cells = json.loads((ROOT / "nbs" / "stations" / f"{station}.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if "bootstrap" in c["metadata"].get("tags", [])]
    line = "".join(cell["source"]).split("\n!")[1].replace("\\\n", " ")
    command = re.search(r"\|\| \((.*)\)\s*$", line)[1]
    local = re.sub(r'"waystation(\[[\w,]+\]) @ git\+[^"]*"', rf'"{ROOT}\1"', command)
    assert local != command, f"{station}: the bootstrap cell installs nothing from the repository"
    return " ".join(local.split())


def notebook(station: str, where: Path, parameters: dict) -> None:
    "Run a station that travels inside the installed package."
    import papermill
    from waystation.recipe import station_notebook

    papermill.execute_notebook(station_notebook(station), where / f"{station}.ipynb", parameters=parameters, progress_bar=False, cwd=where)


def table_of(store: str) -> tuple[dict, Path]:
    "The export report, and the folder of its table, as a script finds them: by the command's JSON."
    done = subprocess.run([Path(sys.executable).parent / "waystation", "export", "--run", "colab", "--store", store, "--table", "colab", "--json"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return report, Path(report["table"])


def run() -> None:
    import importlib.util

    import numpy as np
    assert sys.version_info[:2] == (3, 13) and importlib.util.find_spec("torch") is None
    assert all(map(importlib.util.find_spec, ("gcsfs", "googleapiclient"))), "the bootstrap cells brought nothing for a store on gs:// or drive:"
    with tempfile.TemporaryDirectory() as tmp:
        store, where = str(Path(tmp) / "store"), Path(tmp)
        common = dict(run="colab", store=store)
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
        notebook("setup", where, {**common, "model": "asset:minilm", "data": "asset:banking"})
        notebook("embed", where, {**common, "model": "asset:minilm", "source": "asset:banking", "limit": ROWS, "chunk_tokens": 0, "keep": "title,category"})
        notebook("export", where, {**common, "table": "colab"})
        import lance
        report, folder = table_of(store)
        rows = lance.dataset(folder).to_table(columns=["id", "vector", "title"]).to_pylist()
    golden = np.load(HERE / "golden.npz")
    want = dict(zip(golden["ids"].tolist(), golden["vectors"], strict=True))
    got = {r["id"]: np.asarray(r["vector"], np.float32) for r in rows}
    assert got.keys() == want.keys(), f"ids differ: {sorted(got.keys() ^ want.keys())[:6]}"
    cosines = [float(got[k] @ want[k] / np.linalg.norm(got[k]) / np.linalg.norm(want[k])) for k in want]
    assert min(cosines) >= 0.99999, f"cosine to sentence-transformers fell to {min(cosines):.7f}"
    import flax
    import jax
    print(f"{len(cosines)} vectors on jax {jax.__version__}, flax {flax.__version__}, Python 3.13: least cosine to the golden ones {min(cosines):.8f}; "
          f"the table holds {report['rows']} rows")
    print("3 passed, 0 failed")  # setup, embed and export


def golden() -> None:
    "Vectors of the first rows by the library that the model came with, each text cut at the model's limit."
    import numpy as np
    import pyarrow.parquet as pq
    from sentence_transformers import SentenceTransformer
    from waystation.assets import resolve
    from waystation.store import Store

    with tempfile.TemporaryDirectory() as tmp:
        model, source = (resolve(v, role, Store(tmp)).path for v, role in (("asset:minilm", "model"), ("asset:banking", "source")))
    file = source if source.is_file() else next(source.rglob("*.parquet"))
    rows = pq.read_table(file, columns=["id", "text"]).slice(0, ROWS)
    vectors = SentenceTransformer(str(model), device="cpu").encode(rows["text"].to_pylist(), convert_to_numpy=True)
    np.savez_compressed(HERE / "golden.npz", ids=np.array(rows["id"].to_pylist()), vectors=vectors.astype(np.float32))
    print(f"{vectors.shape} -> {HERE / 'golden.npz'}")


if __name__ == "__main__":
    verb = sys.argv[1]
    if verb == "bootstrap":
        print(bootstrap("3_embed"), bootstrap("4_export"), sep="\n")
    else:
        {"run": run, "golden": golden}[verb]()
