"""`waystation view`: the page answers like `search`, whatever is sent to it; only who may look does; nothing is asked of another host."""

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, browser
from conftest import WAYSTATION

pytest.importorskip("dash")
pytest.importorskip("lance")

from waystation.runtime import Refused
from waystation.vectors import view as viewing
from waystation.vectors.ask import find_table
from waystation.vectors.table import build_table
from waystation.vectors.view import SHOWN, condition, draw, find, guard, is_loopback, listen, look, page

ROWS, DIM = 400, 8
EVIL = "<img src=http://evil.example/x.png onerror=fetch('http://evil.example')>"
HOSTILE = [
    "", " ", "'", "''", "\"", "`", "\\", "\\'", "'; DROP TABLE t; --", "') OR ('1'='1", "x' OR 'a'='a", "%", "_", "/* */", "--", "$1", "?", "\n", "\t", "\x00",
    "a\x00b", "größe 💥", "\u202e", "NULL", "null", "None", "true", "<b>x</b>", "=1+1", "{}",
    "x" * 3000, EVIL]
ODD = ["select", "my col", "a'b", 'x"y', "größe"]
RNG = np.random.default_rng(0)
VECTORS = (np.eye(4, DIM)[np.arange(ROWS) % 4] * 4 + RNG.normal(size=(ROWS, DIM))).astype(np.float32)


def make(to, vectors=VECTORS, about=None, **columns):
    "A finished table, as a folder."
    n = len(vectors)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    (to / "shard").mkdir(parents=True)
    pq.write_table(pa.table(dict(id=[f"r{i}" for i in range(n)], **columns, vector=vector)), to / "shard/vectors.parquet")
    build_table([("shards/0", to / "shard")], to / "table.lance", index="none", about=about or dict(model="asset:eight", run="none"))
    shutil.rmtree(to / "shard")
    return to


def encode(texts):
    "The heap that a text names by its last digit."
    return np.eye(4, DIM, dtype=np.float32)[[int(t[-1]) for t in texts]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("table"),
        text=[f"row {i} of heap {i % 4}, {EVIL}" for i in range(ROWS)],
        kind=[None if i % 40 == 39 else HOSTILE[i % len(HOSTILE)] for i in range(ROWS)],
        depth=list(range(ROWS)), big=[2**62 + i for i in range(ROWS)], small=pa.array([i % 3 for i in range(ROWS)], pa.uint8()),
        ph=pa.array([float("nan") if i == 5 else float("inf") if i == 6 else None if i == 7 else i / 10 for i in range(ROWS)], pa.float32()),
        **{name: [i % 2 == 0 for i in range(ROWS)] for name in ODD},
    )


@pytest.fixture(scope="module")
def view(folder):
    return look(find_table(str(folder)), encode, "eight")


def picked(view, **choices):
    "Nothing is narrowed, but for the columns that are named."
    return [choices.get(o.column, [] if o.values else [None, None]) for o in view.offered]


def test_what_is_offered_comes_from_the_columns(view):
    kinds = {o.column: ("menu" if o.values else "range") for o in view.offered}
    assert kinds == dict(kind="menu", small="menu", depth="range", big="range", ph="range", **dict.fromkeys(ODD, "menu"))
    kind = next(o for o in view.offered if o.column == "kind")
    assert set(kind.values) == {None, *HOSTILE} and sum(kind.counts) == ROWS
    ph = next(o for o in view.offered if o.column == "ph")
    assert (ph.low, round(ph.high, 4)) == (0, 39.9), "NaN and infinity are no ends of a range"


def test_a_menu_gives_the_rows_of_its_value_whatever_the_value_is(view):
    rows = view.table.ds.to_table(columns=["id", "kind", *ODD]).to_pylist()
    for offer in (o for o in view.offered if o.column in ("kind", *ODD)):
        for i, value in enumerate(offer.values):
            got = view.table.ds.to_table(columns=["id"], filter=condition(view.offered, picked(view, **{offer.column: [i]})))["id"].to_pylist()
            assert got == [r["id"] for r in rows if r[offer.column] == value], (offer.column, value)


def test_ranges_take_every_number_that_a_page_can_send(view):
    def n(**choices): return find(view, "", "vector", "", picked(view, **choices))[1]
    assert n(depth=[10, 19]) == n(depth=[9.5, 19.9]) == 10
    assert n(ph=[None, 39]) == 388 and n(ph=[0, None]) == ROWS - 3, "NaN, infinity and null have no place in a range"
    assert n(big=[2**62 + 399, None]) == 1
    assert n(depth=[1e300, None]) == n(depth=[5, 4]) == 0
    assert find(view, "heap 1", "vector", "", picked(view, depth=[5, 4])) == find(view, "row", "text", "", picked(view, ph=[1e-9, 2e-9])) == ([], 0)


@pytest.mark.parametrize("bad", [None, {}, [], "1=1", [["kind'"]], [[0]] * 99, [[], [], [], [], []]])
def test_choices_that_no_page_has_are_refused(view, bad):
    with pytest.raises(Refused, match="load the page again"):
        condition(view.offered, bad)


@pytest.mark.parametrize("where", ["depth = 1) OR (1 = 1", "depth = 1; DROP TABLE t", "depth = 1 --", "colour = 3", "id IN (SELECT id FROM t)"])
def test_a_typed_condition_is_looked_at_alone(view, where):
    "`(depth = 1) OR (1 = 1)` would be right once it is put into brackets and joined."
    for choices in (picked(view), picked(view, depth=[1, 2])):
        with pytest.raises(Refused, match="cannot be understood"):
            find(view, "", "vector", where, choices)


def test_the_page_finds_what_search_finds(view):
    from waystation.vectors.search import search

    rows, left = find(view, "heap 2", "vector", "depth < 100", picked(view, small=[0]))
    small = next(o for o in view.offered if o.column == "small").values[0]
    want = search(view.table.ds, encode(["2"])[0], SHOWN, f"depth < 100 AND small = {small}", ["id"])
    assert [r["id"] for r in rows] == want["id"].to_pylist() and left >= len(rows)
    assert {r["id"] for r in find(view, "17", "text", "", picked(view))[0]} == {"r17"}
    assert find(view, "zebra", "text", "", picked(view))[0] == []
    assert "_relevance" in find(view, "row 3", "hybrid", "", picked(view))[0][0]


def test_without_a_model_words_still_work_and_the_page_says_why(view):
    alone = viewing.View(view.table, view.offered, view.map, why="the model is on another machine")
    assert alone.modes == ["text"]
    with pytest.raises(Refused, match="on another machine"):
        find(alone, "heap 2", "vector", "", picked(view))
    assert len(find(alone, "17", "text", "", picked(view))[0]) == 1


def test_the_map_is_the_same_in_parts_and_as_a_whole(tmp_path):
    "9,000 rows are projected in three parts; directions that were learnt on all of them are those of plain PCA."
    from waystation.vectors.search import pca

    vectors = (RNG.normal(size=(9000, 6)) * [5, 3, 1, 1, 1, 1] + 7).astype(np.float16)
    ds = find_table(str(make(tmp_path, vectors))).ds
    whole, kept = pca(vectors.astype(np.float32))
    drawn = draw(ds)
    np.testing.assert_allclose(drawn.points, whole, atol=1e-3)
    assert abs(drawn.kept - kept) < 1e-6
    part = draw(ds, 100)
    np.testing.assert_allclose(part.points, drawn.points[part.rows])


def test_a_table_of_one_row_has_a_page(tmp_path):
    one = look(find_table(str(make(tmp_path, VECTORS[:1]))))
    assert one.offered == [] and one.modes == [] and len(find(one, "", "vector", "", [])[0]) == 1
    assert page(one).server.test_client().get("/_dash-layout").status_code == 200


# What the page's scripts send, sent by hand.


class Client:
    "A browser without a screen: callbacks by their first output."

    def __init__(self, app):
        self.http = app.server.test_client()
        self.dependencies = self.http.get("/_dash-dependencies", headers={"Host": "localhost"}).json

    def send(self, output, changed, **values):
        "Call the callback whose outputs begin with `output`; the status, and what it would change."
        d = next(d for d in self.dependencies if d["output"].lstrip(".").startswith(output) and any(changed in i["id"] for i in d["inputs"]))

        def given(x):
            key = next(iter(json.loads(x["id"]))) if x["id"].startswith("{") else x["id"]
            value = values.get(key)
            if x["id"].startswith("{"):
                return [dict(id={key: i}, property=x["property"], value=v) for i, v in enumerate(value or [])]
            return dict(id=x["id"], property=x["property"], value=value)

        outputs = [dict(zip(("id", "property"), o.rsplit(".", 1), strict=True)) for o in d["output"].strip(".").split("...")]
        body = dict(output=d["output"], outputs=outputs if len(outputs) > 1 else outputs[0], inputs=[given(x) for x in d["inputs"]],
                    state=[given(x) for x in d["state"]], changedPropIds=[f"{changed}.{next(i['property'] for i in d['inputs'] if changed in i['id'])}"])
        answer = self.http.post("/_dash-update-component", json=body, headers={"Host": "localhost"})
        merged = {}
        for part in ((answer.json or {}).get("response") or {}, (answer.json or {}).get("sideUpdate") or {}):
            for k, v in part.items():
                merged.setdefault(k.split("@")[0], {}).update(v)
        return answer.status_code, merged

    def ask(self, view, question="", mode="vector", where="", selected=((), 0), changed="go", **choices):
        p = picked(view, **choices)
        menus = [x for o, x in zip(view.offered, p, strict=True) if o.values]
        ends = [x for o, x in zip(view.offered, p, strict=True) if not o.values]
        return self.send("rows.children", changed, question=question, mode=mode, where=where, selected=[list(selected[0]), selected[1]], menu=menus,
                         **{"from": [x[0] for x in ends], "to": [x[1] for x in ends]})


@pytest.fixture
def client(view):
    app = page(view)
    guard(app, "127.0.0.1")
    return Client(app)


def text(children):
    "All the words in a component."
    if isinstance(children, dict):
        return text(children.get("props", {}).get("children"))
    return " ".join(map(text, children)) if isinstance(children, list) else "" if children is None else str(children)


def test_a_question_by_http(client, view):
    code, got = client.ask(view, "heap 2")
    assert code == 200 and got["status"]["children"] == f"The {SHOWN} best of {ROWS} rows" and got["trouble"]["children"] == ""
    assert len(got["spots"]["data"]) == len(got["rows"]["children"]) == SHOWN and "distance" in text(got["rows"]["children"][0])
    assert client.ask(view, where="depth < 0")[1]["status"]["children"] == "No row fits these filters."
    assert client.ask(view, "zebra", "text")[1]["status"]["children"] == f"No row has these words, of the {ROWS} that fit the filters."


def test_selected_points_are_listed(client, view):
    _, got = client.ask(view, selected=([3, 5], 4000), changed="selected")
    assert got["status"]["children"] == "4,000 points selected, the first 2" and text(got["rows"]["children"]).split()[1:2] == ["r3"]
    assert len(client.ask(view, selected=(["x", -1, 10**9, None, 1.5, True], 6), changed="selected")[1]["rows"]["children"]) <= 1


def test_points_get_the_colours_of_a_column(client):
    _, got = client.send("map.figure", "color", color="small")
    assert [re.sub(r"\s+", " ", text(x)).strip() for x in got["legend"]["children"]] == ["0 134", "1 133", "2 133"]
    assert client.send("map.figure", "color", color="kind'; --")[1]["legend"]["children"] == []


@pytest.mark.parametrize("how", [
    dict(question=["a"]), dict(question={"a": 1}), dict(mode="fuzzy"), dict(mode=None), dict(where={"a": 1}), dict(where="\ud800"), dict(question="\ud800"),
    dict(depth=["1 OR 1=1", None]), dict(depth=[True, None]), dict(kind=["' OR 1=1"]), dict(kind=[99999]), dict(kind=[-1]), dict(kind={"a": 1})])
def test_what_no_page_sends_gets_a_sentence(client, view, how):
    code, got = client.ask(view, **({"question": "heap 1"} | how))
    said = got["trouble"]["children"]
    assert code == 200 and (said == "" or (len(said) > 20 and "Traceback" not in said)), (how, said)
    if "kind" in how or "depth" in how:
        assert got["rows"]["children"] == [] and "load the page again" in said


def test_a_table_that_goes_away_is_a_sentence(tmp_path):
    "Every way to ask, after the files are gone."
    gone = look(find_table(str(make(tmp_path / "t", text=["a text of 1"] * ROWS, kind=["a", "b"] * (ROWS // 2)))), encode)
    client = Client(page(gone))
    assert client.ask(gone, "heap 1")[0] == 200
    shutil.rmtree(tmp_path / "t")
    for how in (dict(question="heap 1"), dict(question="text", mode="text"), dict(where="kind = 'a'"), dict(selected=([300], 1), changed="selected")):
        code, got = client.ask(gone, **how)
        assert code == 200 and re.search("cannot be read", got["trouble"]["children"]) and got["rows"]["children"] == [], (how, got)
        assert "Traceback" not in json.dumps(got)


def test_nothing_that_dash_can_be_told_by_the_environment(view, monkeypatch):
    "Dash reads its switches from variables: debugging runs code that a browser sends, MCP hands the callbacks to agents."
    for name in ("DEBUG", "UI", "MCP_ENABLED", "ENABLE_MCP", "HOT_RELOAD"):
        monkeypatch.setenv(f"DASH_{name}", "true")
    app = page(view)
    http = app.server.test_client()
    assert http.get("/_mcp").status_code in (404, 405) or b"jsonrpc" not in http.get("/_mcp").data
    assert http.post("/_mcp", json=dict(jsonrpc="2.0", id=1, method="tools/list")).status_code in (404, 405)
    config = json.loads(re.search(r'_dash-config"[^>]*>(.*?)</script>', http.get("/").text, re.S)[1])
    assert not config["ui"] and config["disable_version_check"] and config["serve_locally"] and "hot_reload" not in config


def test_without_dash_the_way_out_is_named(view, monkeypatch):
    monkeypatch.setitem(sys.modules, "dash", None)
    with pytest.raises(Refused, match=re.escape("pip install 'waystation[view]'")):
        page(view)


# Who may look.

PATHS = ["/", "/_dash-layout", "/_dash-dependencies", "/_dash-component-suites/dash/deps/polyfill.min.js", "/_favicon.ico", "/nowhere"]


@pytest.fixture
def locked(view):
    app = page(view)
    guard(app, "0.0.0.0", "täglich-secret")
    return app.server


@pytest.mark.parametrize("given", ["", "?token=", "?token=wrong", "?token=t", "?token=%ff%00", "?token=secret&token=secret"])
def test_no_path_answers_without_the_token(locked, given):
    http = locked.test_client()
    http.set_cookie("waystation-localhost", "wrong")
    for path in PATHS:
        assert http.get(path + given).status_code == 401, path
    assert http.post("/_dash-update-component" + given, json={}).status_code == 401


def test_the_token_opens_once_and_leaves_the_address(locked):
    http = locked.test_client()
    first = http.get("//evil.example/?token=täglich-secret", headers={"Host": "box:8050"})
    cookie = first.headers["Set-Cookie"]
    assert first.status_code == 302 and first.headers["Location"] == "/"
    assert cookie.startswith("waystation-8050=") and "HttpOnly" in cookie and "SameSite=Lax" in cookie
    assert http.get("/", headers={"Host": "box:8050", "Cookie": cookie.split(";")[0]}).status_code == 200
    assert http.get("/", headers={"Host": "box:9999", "Cookie": cookie.split(";")[0]}).status_code == 401, "another port, another page"


def test_on_loopback_another_name_is_refused(view):
    "A site whose name was given the address 127.0.0.1 is a page of that site to the browser."
    app = page(view)
    guard(app, "127.0.0.1")
    http = app.server.test_client()
    ours, theirs = ("localhost:8050", "127.0.0.1:1", "[::1]:8050"), ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", "")
    codes = [http.get("/_dash-layout", headers={"Host": h}).status_code for h in (*ours, *theirs)]
    assert codes == [200] * 3 + [403] * 4


def test_what_is_loopback():
    assert [is_loopback(h) for h in ("127.0.0.1", "localhost", "127.1.2.3", "0.0.0.0")] == [True, True, True, False]
    with pytest.raises(Refused, match="is no address"):
        is_loopback("no.such.host.invalid")


@contextmanager
def served(app):
    "The page on a port of its own; its address."
    server = listen(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}/"
    finally:
        server.shutdown()
        thread.join()


def test_a_port_that_is_taken_is_a_sentence(view):
    app = page(view)
    with served(app) as url, pytest.raises(Refused, match="choose another port"):
        listen(app, "127.0.0.1", int(url.rstrip("/").rpartition(":")[2]))
    with pytest.raises(Refused):
        listen(app, "127.0.0.1", 10**6)
    with pytest.raises(Refused):
        listen(app, "192.0.2.1", 0)


def test_off_loopback_the_command_makes_a_token(folder, tmp_path):
    "Without it 401, with it the page; SIGTERM ends it, and it was no failure. Nothing that was asked stands in what it printed."
    env = {**os.environ, "WAYSTATION_STORE": str(tmp_path / "store")}
    command = [WAYSTATION, "view", str(folder), "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as p:
        try:
            said = next(line for line in p.stderr if "http://" in line)
            port, token = re.search(r":(\d+)/\?token=([\w-]{32})", said).groups()
            def get(path, **headers):
                c = http.client.HTTPConnection("127.0.0.1", int(port))
                c.request("GET", path, headers=headers)
                answer = c.getresponse()
                c.close()
                return answer
            assert get("/").status == get("/_dash-layout?token=x").status == 401
            opened = get(f"/?token={token}")
            assert opened.status == 302 and get("/_dash-layout", Cookie=opened.headers["Set-Cookie"].split(";")[0]).status == 200
        finally:
            p.send_signal(signal.SIGTERM)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and out.strip() == "closed" and "GET" not in err, (p.returncode, out, err)


# In a browser.


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")
def test_in_a_browser(folder, view, tmp_path):
    shutil.copytree(folder, tmp_path / "t")
    mine = look(find_table(str(tmp_path / "t")), encode, figures=[("a run", [("recall", "0.9")])])
    app = page(mine)
    guard(app, "127.0.0.1")
    rows, status = "document.querySelectorAll('#rows li').length", "document.querySelector('#status').innerText"

    async def go(url):
        async with browser() as p:
            await p.open(url)
            await p.until(f"{rows} == {SHOWN} && document.querySelectorAll('#map canvas').length > 0")
            assert await p.js("document.querySelector('#rows').innerText.includes('<img src=http://evil.example')")
            assert await p.js("document.querySelectorAll('#rows img, #rows script, #rows p *').length") == 0, "a text of the table became a part of the page"
            await p.js("document.querySelector('#question').focus()")
            await p.type("heap 2")
            await p.until(f"{status}.includes('best')")
            await p.js("document.querySelectorAll('#rows li button')[2].click()")
            await p.until("!!document.querySelector('#rows li:nth-child(3).chosen')")
            assert await p.js("document.querySelectorAll('#rows li.chosen').length") == 1
            marks = "document.querySelector('#map .js-plotly-plot')._fullLayout.annotations"
            assert await p.js(f"{marks}.length + ' ' + {marks}.filter(a => a.bgcolor == '#c1121f').map(a => a.text)") == f"{SHOWN} 3"
            x, y, w, h = await p.js("(() => { const r = document.querySelector('#map .nsewdrag').getBoundingClientRect(); return [r.x, r.y, r.width, r.height] })()")
            await p.drag([(x + w * a, y + h * b) for a, b in ((0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.5, 0.98), (0.02, 0.98), (0.02, 0.02))])
            await p.until(f"{status}.includes('selected')")
            assert await p.js(status) == f"{ROWS} points selected, the first {SHOWN}"
            await p.js("document.querySelector('#where').focus()")
            await p.type("depth < 0")
            await p.until(f"{status} == 'No row fits these filters.' && {rows} == 0")
            narrow = "document.documentElement.scrollWidth == 390"  # a phone need not scroll sideways
            await p.size(390, 800)
            await p.until(narrow, 10)
            shutil.rmtree(tmp_path / "t")
            await p.js("document.querySelector('#where').select()")
            await p.type("depth < 50")
            await p.until("document.querySelector('#trouble').innerText.includes('cannot be read')")
            await p.until(narrow, 10)  # the path of a lost file is one long word
            return p

    with served(app) as url:
        p = asyncio.run(go(url))
        assert [r for r in p.requests if not r.startswith((url, "data:", "blob:"))] == [], "the page asked another host"
        assert len(p.requests) > 10 and not [s for s in p.said if not s.startswith(("warning", "verbose", "info"))], p.said


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")
@pytest.mark.parametrize("n", [1_000, 10_000, 100_000] if os.environ.get("WAYSTATION_PROVE") else [10_000])
def test_many_points(n, tmp_path):
    "Points are two numbers each on the way, and no step holds all vectors. -rP prints what the part of the view shows."
    vectors = (RNG.normal(size=(20, 384))[np.arange(n) % 20] + RNG.normal(size=(n, 384))).astype(np.float32)
    make(tmp_path / "t", vectors, text=[f"a text of row {i}, about as long as a line" for i in range(n)], kind=[f"kind {i % 20}" for i in range(n)])
    env = {**os.environ, "WAYSTATION_STORE": str(tmp_path / "store")}
    began = time.monotonic()
    with subprocess.Popen([WAYSTATION, "view", str(tmp_path / "t"), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as p:
        try:
            url = next(re.search(r"http://\S+", line)[0] for line in p.stderr if "http://" in line)
            started = time.monotonic() - began

            async def go():
                async with browser() as page:
                    began = time.monotonic()
                    await page.open(url)
                    await page.until("document.querySelectorAll('#rows li').length > 0 && document.querySelectorAll('#map canvas').length > 0")
                    usable, sent = time.monotonic() - began, page.bytes
                    drag = "document.querySelector('#map .nsewdrag').getBoundingClientRect()"
                    x, y, w, h = await page.js(f"(() => {{ const r = {drag}; return [r.x, r.y, r.width, r.height] }})()")
                    await page.drag([(x + w * a, y + h * b) for a, b in ((0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.5, 0.98), (0.02, 0.98), (0.02, 0.02))])
                    await page.until("document.querySelector('#status').innerText.includes('selected')")
                    assert f"{n:,} points selected" in await page.js("document.querySelector('#status').innerText")
                    return usable, sent, time.monotonic() - began - usable, page.bytes - sent

            usable, sent, select, more = asyncio.run(go())
            peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{p.pid}/status").read_text())[1]) / 1e3
        finally:
            p.terminate()
        p.communicate(timeout=60)
    print(f"{n:,} points: server {started:.1f} s, page {usable:.1f} s and {sent / 1e6:.2f} MB, "
          f"all selected {select:.1f} s and {more / 1e3:.0f} kB, peak {peak:.0f} MB")
    assert sent < 7e6 + 12 * n and more < 200_000, "more than two numbers a point were sent"
    assert peak < 900, "as much as all vectors of the largest table, and then some"
