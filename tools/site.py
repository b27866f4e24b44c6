"""The documentation site, from the notebooks with their saved outputs: nothing is run.

    python tools/site.py            # stage nbs/ in _proc/, render with smalldocs to _site/, check every internal link
    python tools/site.py --stage    # stage only, for Quarto: `quarto render _proc --no-execute`

Code is shown where it is explained, so exported cells stay on the page; cells marked `#| hide` and the directives go.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, STAGED, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_site"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# `](target)` of a Markdown link or picture; a colon (https:, mailto:) or a leading # is none of ours
LINK = re.compile(r"\]\((?!#|[a-z][a-z0-9+.-]*:)([^)\s#]+)(#[^)\s]*)?\)")


def relink(text: str, page: Path) -> str:
    "Links of `page` (relative to nbs/): README's own lose `nbs/`, files outside nbs/ go to the repository."

    def target(m: re.Match[str]) -> str:
        path, anchor = unquote(m[1]), m[2] or ""
        base = ROOT if page == Path("index.ipynb") else (NBS / page).parent  # index.ipynb is README.md, at the root
        for found in ((base / path).resolve(), (NBS / page.parent / path).resolve()):
            if found.exists() and found.is_relative_to(NBS) and found.is_file():
                up = "../" * len(page.parent.parts)
                return f"]({up}{found.relative_to(NBS).as_posix()}{anchor})"
            if found.exists() and found.is_relative_to(ROOT):
                kind = "tree" if found.is_dir() else "blob"
                return f"]({PROJECT}/{kind}/main/{found.relative_to(ROOT).as_posix()}{anchor})"
        return m[0]  # leads nowhere: smalldocs will say so

    return LINK.sub(target, text)


def front(source: str, page: Path) -> tuple[dict, str]:
    "The title cell's `# Title` and `> promise` as front matter, and what else stands in it."
    m = re.match(r"# (.+)\n*(?:((?:> ?.*\n?)+))?", source)
    if not m:
        raise SystemExit(f"nbs/{page}: the first Markdown cell must open with `# Title`; it has {source[:40]!r}")
    promise = " ".join(line.removeprefix(">").strip() for line in (m[2] or "").splitlines()).strip()
    matter = {"title": m[1].strip()} | ({"description": promise} if promise else {})
    return matter, source[m.end():].strip()


def stage_notebook(path: Path) -> nbformat.NotebookNode:
    "What a reader gets to see of the notebook at `path`."
    page, nb = path.relative_to(NBS), nbformat.read(path, as_version=4)
    cells, matter = [], None
    for cell in nb.cells:
        directives = re.findall(r"^#\|\s*(\w+)", cell.source, re.M) if cell.cell_type == "code" else []
        if "hide" in directives or "default_exp" in directives or "bootstrap" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "code":  # quarto's own options (`#| fig-cap: …`) have a colon, nbdev's have not
            cell.source = re.sub(r"\A(#\|(?![^\n:]*:)[^\n]*\n?)+", "", cell.source)
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        elif matter is None:
            matter, cell.source = front(cell.source, page)
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source, page)
        if cell.source.strip():
            cells.append(cell)
    text = yaml.safe_dump(matter or {"title": path.stem}, allow_unicode=True, sort_keys=False, width=1000)
    nb.cells = [nbformat.v4.new_raw_cell(f"---\n{text}---"), *cells]
    return nb


def stage() -> None:
    shutil.rmtree(STAGED, ignore_errors=True)
    for path in sorted(NBS.rglob("*")):
        out = STAGED / path.relative_to(NBS)
        if not path.is_file() or any(p[0] == "." for p in path.relative_to(NBS).parts):
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            nbformat.write(stage_notebook(path), out)
        else:
            shutil.copy(path, out)  # follows the link to _quarto.yml


def unlisted() -> list[str]:
    "Notebooks that the sidebar does not name: nobody would find their pages."
    listed = set(re.findall(r"[\w/.-]+\.ipynb", (ROOT / "_quarto.yml").read_text()))
    return sorted({p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if "/." not in p.as_posix()} - listed)


class Page(HTMLParser):
    "The ids of a page, and what it links to."

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if value and (tag, name) in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")):
                self.links.append(value)


def broken() -> list[str]:
    "Internal links of the finished pages that lead nowhere, anchors included."
    pages = {p: Page(p) for p in sorted(SITE.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc or link.startswith("data:"):
                continue
            to = (path.parent / unquote(url.path)).resolve() if url.path else path
            to = to / "index.html" if to.is_dir() else to
            if not to.exists():
                found.append(f"{path.relative_to(SITE)}: {link} (no such file)")
            elif url.fragment and to in pages and unquote(url.fragment) not in pages[to].ids and url.fragment != "top":
                found.append(f"{path.relative_to(SITE)}: {link} (no such section)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="store_true", help="stage in _proc/ only")
    if names := unlisted():
        sys.exit(f"_quarto.yml's sidebar does not list {', '.join(names)}")
    stage()
    if parser.parse_args().stage:
        return
    if done := subprocess.run([Path(sys.executable).parent / "smalldocs", "render", "--strict", STAGED]).returncode:
        sys.exit(done)
    if links := broken():
        sys.exit("broken links in _site/:\n  " + "\n  ".join(links))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
