"""What `pip install` would do to a Colab image: it may add, never replace.

`tests/colab/*.txt` hold what the images of August 2026 bring. The extras are resolved for real, by pip on Python 3.13,
with those versions as constraints: a solution means that everything the image has can stay as it is.
"""

import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# `s3` is not here for the images with fsspec 2025.3: every aiobotocore that s3fs 2025.3 takes wants wrapt < 2, they have wrapt 2.
IMAGES = {
    "gpu": ["train", "export", "monitor", "notebook", "demo", "cloud", "registry"],
    "tpu": ["embed", "export", "monitor", "notebook", "demo", "cloud", "s3", "registry"],
    "plain": ["embed", "export", "demo", "cloud", "registry"],
}
# A running kernel may have loaded these: replaced under it, they mean "restart the runtime". And fsspec, which gcsfs pins to its own
# release: on the TPU image, which has no gcsfs, pip would else take the newest one and replace the fsspec that datasets came with.
PROTECTED = {"torch", "torchvision", "torch-xla", "jax", "jaxlib", "libtpu", "flax", "numpy", "pandas", "pyarrow", "fsspec", "ipykernel"}
STATIONS = {"1_setup": ("gguf", "train,demo"), "2_train": ("trl", "train"), "3_embed": ("flax", "embed,demo"), "4_export": ("lancedb", "export,embed")}

# The one bootstrap cell, as every station has it. Outside Colab and Kaggle its first test ends it.
BOOTSTRAP = r"""#| slow
# On Colab and Kaggle: install what the image lacks, and never replace what its kernel may have loaded. Elsewhere: nothing.
!test ! -d /content -a ! -d /kaggle || python -c "import waystation, MODULE" 2>/dev/null || ( \
  pip list --format=freeze | grep -E "^(torch|jax|libtpu|flax|numpy|pandas|pyarrow|fsspec|ipykernel)" > /tmp/keep.txt; \
  pip install -q -c /tmp/keep.txt "waystation[EXTRA,cloud,monitor] @ git+REPOSITORY" )"""


def image(kind: str) -> dict[str, str]:
    "name -> version of what the image brings."
    lines = (ROOT / "tests" / "colab" / f"{kind}.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements(extras: list[str]) -> list[Requirement]:
    "What the core and `extras` ask for."
    optional = PROJECT["optional-dependencies"]
    return [Requirement(r) for r in PROJECT["dependencies"] + [r for e in extras for r in optional[e]]]


def stub(folder: Path, name: str, version: str) -> None:
    "A wheel without contents: pip takes its name and version for the image's own build, which no index has."
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="session")
def python313() -> str:
    found = subprocess.run([ROOT / "tools" / "python313"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("NOT CHECKED: no Python 3.13 here, so nothing was resolved against Colab's images; "
                    "install one or set WAYSTATION_PYTHON313 to its path")
    return found.stdout.strip()


@pytest.mark.parametrize("kind", IMAGES)
def test_lower_bounds_are_met_by_the_image(kind):
    "Whatever the image has satisfies our own bounds: the quick half of the check, without a network."
    have = image(kind)
    behind = [f"{r} (the image has {have[n]})" for r in requirements(IMAGES[kind])
              if (n := canonicalize_name(r.name)) in have and Version(have[n]) not in r.specifier]
    assert not behind, f"would be replaced on Colab's {kind} image: {', '.join(behind)}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMAGES)
def test_extras_resolve_without_replacing_anything(kind, python313, tmp_path):
    have = image(kind)
    constraints = tmp_path / "image.txt"
    lines = []
    for name, version in have.items():
        if name.startswith("torch"):  # builds with a local version: CUDA, CPU or XLA
            version += "+image"
            stub(tmp_path, name.replace("-", "_"), version)
        lines.append(f"{name}=={version}")
    constraints.write_text("\n".join(lines) + "\n")
    wanted = [str(r) for r in requirements(IMAGES[kind])]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [python313, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report,
         "--find-links", tmp_path, "-c", constraints, *wanted], capture_output=True, text=True)
    conflict = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
    assert done.returncode == 0, f"Colab's {kind} image would have to change:\n{conflict}"

    chosen = {canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(report.read_text())["install"]}
    replaced = {n: f"{have[n]} -> {v}" for n, v in chosen.items() if n in have and v.split("+")[0] != have[n]}
    assert not replaced, f"would be replaced on Colab's {kind} image: {replaced}"
    added = {n: v for n, v in chosen.items() if n not in have}
    assert not PROTECTED & added.keys() - {"torch"}, f"would be added beside what the kernel has: {added}"
    print(f"Colab {kind}: {len(chosen) - len(added)} stay as they are, added:", ", ".join(f"{n} {v}" for n, v in sorted(added.items())))


@pytest.mark.parametrize("station", STATIONS)
def test_the_bootstrap_cell_is_the_same_everywhere(station):
    module, extra = STATIONS[station]
    want = BOOTSTRAP.replace("MODULE", module).replace("EXTRA", extra).replace("REPOSITORY", PROJECT["urls"]["Repository"])
    nb = nbformat.read(ROOT / "nbs" / "stations" / f"{station}.ipynb", as_version=4)
    cells = [c for c in nb.cells if "bootstrap" in c.metadata.get("tags", [])]
    assert [c.source for c in cells] == [want], f"{station}: the cell tagged `bootstrap` differs from BOOTSTRAP in {Path(__file__).name}"


@pytest.mark.parametrize("station", STATIONS)
def test_what_the_cell_installs_is_resolved_against_an_image(station):
    asked = set(re.search(r"waystation\[([\w,]+)\]", BOOTSTRAP.replace("EXTRA", STATIONS[station][1]))[1].split(","))
    assert "cloud" in asked and any(asked <= set(extras) for extras in IMAGES.values()), f"{station} installs {sorted(asked)}, which no image is asked for"


@pytest.mark.parametrize("station", STATIONS)
def test_the_badge_opens_this_notebook(station):
    "In a cell of its own (in the title's cell the site would lose it), with the repository's address from pyproject."
    repo = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    url = f"https://colab.research.google.com/github/{repo}/blob/main/nbs/stations/{station}.ipynb"
    nb = nbformat.read(ROOT / "nbs" / "stations" / f"{station}.ipynb", as_version=4)
    badges = [c for c in nb.cells if "colab-badge.svg" in c.source]
    assert len(badges) == 1 and badges[0].source.startswith("[![") and f"({url})" in badges[0].source
    assert re.fullmatch(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)", badges[0].source.strip()), "the badge's cell holds nothing else"


def test_bootstrap_does_nothing_outside_colab(tmp_path):
    "The cell's own shell line, on a machine without /content: it ends at once, with success and in silence."
    if Path("/content").exists() or Path("/kaggle").exists():
        pytest.skip("this is Colab or Kaggle")
    line = BOOTSTRAP.split("\n!")[1]
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bootstrap_keeps_what_is_there(tmp_path):
    "On a stand-in for Colab: pip is asked to install under constraints that name what the image has."
    tools = tmp_path / "bin"
    tools.mkdir()
    has = "numpy==2.1.3\ntorch==2.11.0+cu128\nrequests==2.32.4\njaxlib==0.7.2\nfsspec==2026.2.0\n"
    (tools / "pip").write_text(f"#!/bin/sh\nif [ $1 = list ]; then printf '{has}'; else echo \"$@\"; fi\n")
    (tools / "python").write_text("#!/bin/sh\nexit 1\n")  # waystation does not import yet
    for tool in tools.iterdir():
        tool.chmod(0o755)
    line = BOOTSTRAP.split("\n!")[1].replace("/content", str(tmp_path)).replace("/tmp/keep.txt", str(tmp_path / "keep.txt"))
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={"PATH": f"{tools}:/usr/bin:/bin"})
    assert done.stdout.startswith(f"install -q -c {tmp_path}/keep.txt waystation[EXTRA,cloud,monitor] @ git+")
    assert (tmp_path / "keep.txt").read_text().split() == ["numpy==2.1.3", "torch==2.11.0+cu128", "jaxlib==0.7.2", "fsspec==2026.2.0"]


def test_freeze_files_are_plain_pins():
    for kind in IMAGES:
        assert {"torch", "jax", "flax", "numpy", "pandas", "pyarrow"} <= image(kind).keys()
        assert not [v for v in image(kind).values() if "+" in v or "@" in v]


def test_protected_names_are_in_the_cell():
    "Every name of PROTECTED begins with one that the cell's grep keeps."
    kept = re.search(r"\^\((.*?)\)", BOOTSTRAP)[1].split("|")
    assert all(any(name.startswith(k) for k in kept) for name in PROTECTED)
