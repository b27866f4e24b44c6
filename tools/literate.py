"""The literate build: lit/ (Markdown, edited by people) -> nbs/ (notebooks) -> waystation/ (modules) and README.md.

    python tools/literate.py build            # write what is out of step, always in this direction
    python tools/literate.py check            # write nothing; exit 1 and name what is out of step
    python tools/literate.py figures FOLDER   # keep the outputs of executed station notebooks for the site

`jupytext --sync` goes by modification time, and in a fresh clone every file is equally new: it has overwritten
the wrong side. Here the direction is fixed. Cell ids and saved outputs live in nbs/ alone and survive a build,
as long as the cell that they belong to has the same source.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from fastcore.nbio import nb2str
from jupytext.config import load_jupytext_config

ROOT = Path(__file__).resolve().parent.parent
METADATA = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
# The accelerator that Colab offers when it opens a station.
COLAB = {
    "stations/2_train": {"accelerator": "GPU", "colab": {"gpuType": "T4"}},
    "stations/3_embed": {"accelerator": "TPU", "colab": {"gpuType": "V5E1"}},
}


def notebook(md: Path, root: Path) -> nbformat.NotebookNode:
    "The notebook that `md` describes, with the ids and outputs that nbs/ already has."
    name = md.relative_to(root / "lit").with_suffix("").as_posix()
    new = jupytext.read(md, config=load_jupytext_config(str(md)))
    path = root / "nbs" / f"{name}.ipynb"
    old = {}  # (type, source) -> the cells that have it, in order
    if path.exists():
        for cell in nbformat.read(path, as_version=4).cells:
            old.setdefault((cell.cell_type, cell.source), []).append(cell)
    for cell in new.cells:
        cell.metadata.pop("lines_to_next_cell", None)  # how the Markdown was spaced; nbdev-clean drops it
        same = old.get((cell.cell_type, cell.source))
        if same:
            kept = same.pop(0)
            cell.id = kept.id
            if cell.cell_type == "code":
                cell.outputs = kept.outputs
        else:
            cell.id = ""
    used = {cell.id for cell in new.cells}
    for cell in new.cells:
        if not cell.id:  # from the text, so that two people who build the same Markdown get the same notebook
            n = 0
            while (fresh := hashlib.sha256(f"{name}\0{cell.source}\0{n}".encode()).hexdigest()[:8]) in used:
                n += 1
            used.add(fresh)
            cell.id = fresh
        if cell.cell_type == "code":
            cell.execution_count = None
    new.metadata = nbformat.from_dict({**METADATA, **COLAB.get(name, {})})
    new.nbformat, new.nbformat_minor = 4, 5
    return new


def put(path: Path, text: str) -> bool:
    "Write `text` unless it is there already; whether something was written."
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return True


def write(path: Path, nb: nbformat.NotebookNode) -> bool:
    "Write `nb` in the bytes that `nbdev-clean` leaves, so that cleaning after a build changes nothing."
    return put(path, nb2str(nb))


def readme(index: nbformat.NotebookNode) -> str:
    "README.md: the prose of nbs/index.ipynb, and a line that says so."
    prose = [c.source for c in index.cells if c.cell_type == "markdown"]
    # On the site these stand beside the page, in the repository one folder down.
    prose = [re.sub(r"\]\((images|stations|guides|training|embedding|vectors)/", r"](nbs/\1/", text) for text in prose]
    return "\n\n".join(["<!-- Generated from nbs/index.ipynb by `make build`: edit lit/index.md -->", *prose]) + "\n"


def modules(root: Path) -> dict[Path, str]:
    return {p: p.read_text() for p in sorted((root / "waystation").rglob("*.py"))}


def build(root: Path) -> list[Path]:
    "Write nbs/, waystation/ and README.md from lit/; what changed."
    changed, wanted = [], set()
    for md in sorted((root / "lit").rglob("*.md")):
        path = root / "nbs" / md.relative_to(root / "lit").with_suffix(".ipynb")
        wanted.add(path)
        if write(path, notebook(md, root)):
            changed.append(path)
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if path not in wanted and not any(p[0] in "._" for p in path.relative_to(root / "nbs").parts):
            path.unlink()  # its Markdown is gone
            changed.append(path)
    before = modules(root)
    subprocess.run([Path(sys.executable).parent / "nbdev-export"], cwd=root, check=True)
    for path, text in modules(root).items():
        made_from = re.search(r"File to edit: (\S+\.ipynb)", text)
        if made_from and not (path.parent / made_from[1]).exists():
            path.unlink()  # the module of a notebook that is gone would stay importable for ever
    after = modules(root)
    changed += [p for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)]
    index = root / "nbs" / "index.ipynb"
    if index.exists() and put(root / "README.md", readme(nbformat.read(index, as_version=4))):
        changed.append(root / "README.md")
    return changed


def check(root: Path) -> list[Path]:
    "What a build, then `nbdev-clean`, would change; nothing here is written."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / root.name
        keep = ("lit", "nbs", "waystation", "pyproject.toml", "_quarto.yml", "README.md", "settings.ini")
        for name in keep:
            src = root / name
            if src.is_dir():
                shutil.copytree(src, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif src.exists():
                copy.mkdir(parents=True, exist_ok=True)
                shutil.copy(src, copy / name)
        changed = {p.relative_to(copy) for p in build(copy)}
        built = {p: p.read_bytes() for p in (copy / "nbs").rglob("*.ipynb")}
        subprocess.run([Path(sys.executable).parent / "nbdev-clean"], cwd=copy, check=True)
        changed |= {p.relative_to(copy) for p, b in built.items() if p.read_bytes() != b}
        return sorted(changed)


def figures(root: Path, executed: Path) -> list[Path]:
    "Keep the outputs of the executed notebooks in `executed` in the stations of the same name."
    changed = []
    for path in sorted((root / "nbs" / "stations").glob("*.ipynb")):
        done = executed / path.name
        if not done.exists():
            continue
        outputs = {c.id: c.outputs for c in nbformat.read(done, as_version=4).cells if c.cell_type == "code"}
        nb = nbformat.read(path, as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code" and cell.id in outputs:
                shown = json.dumps([o for o in outputs[cell.id] if o.get("name") != "stderr"])
                # Paths of the machine that ran it mean nothing to a reader.
                shown = re.sub(r"(/[\w.-]+)+/runs/store", "runs/store", shown).replace(str(Path.home()), "~")
                cell.outputs = [nbformat.from_dict(o) for o in json.loads(shown)]
                for o in cell.outputs:
                    if o.output_type == "execute_result":
                        o.execution_count = None
        if write(path, nb):
            changed.append(path)
    subprocess.run([Path(sys.executable).parent / "nbdev-clean"], cwd=root, check=True)
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["build", "check", "figures"])
    parser.add_argument("folder", nargs="?", type=Path, help="figures: where the executed notebooks are")
    args = parser.parse_args()
    if args.verb == "check":
        if stale := check(ROOT):
            print("out of step, run `make build` and commit what it writes:", *stale, sep="\n  ")
            sys.exit(1)
        print("lit/, nbs/, waystation/ and README.md agree")
    else:
        done = build(ROOT) if args.verb == "build" else figures(ROOT, args.folder)
        print(*(f"wrote {p.relative_to(ROOT)}" for p in done), sep="\n")
