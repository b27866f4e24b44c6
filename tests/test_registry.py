"""The registry is an index: whatever happened to the store, it says what the manifests say, and is equal to one that is made anew."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from unittest.mock import patch

import pytest

from waystation.registry import TABLES, NoRegistry, Registry, collect, show_run, show_runs, store_index, store_sql
from waystation.runtime import Refused
from waystation.seal import new_manifest, seal_key
from waystation.store import Store

pytest.importorskip("sqlmodel", reason="NOT CHECKED: the registry; pip install 'waystation[registry]'")
LONG = os.environ.get("WAYSTATION_PROVE") == "1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WAYSTATION_REGISTRY", raising=False)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    return str(tmp_path / "r.sqlite") if request.param == "sqlite" else request.getfixturevalue("server")("postgres").url


def put(store, name, meta=None, size=0):
    "A seal without its blobs: quick, and all that the registry looks at."
    files = {"a.bin": dict(sha256="0" * 64, size=size)} if size else {}
    path = store.place.path(seal_key(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_bytes(new_manifest(name, files, meta or {}, ""))
    path.with_suffix(".part").rename(path)


def everything(facts):
    return {t: facts.rows(t) for t in TABLES}


def kept(registry, **how):
    with registry.facts(**how) as facts:
        return everything(facts)


def history(store, rnd, steps):
    "A random life of a store: seals, versions, refs, restarts, prunes, seals of a pruned name, damage."
    for _ in range(steps):
        run, step, attempt = rnd.choice(["a", "b", "c"]), rnd.choice(["train", "embed"]), rnd.randint(1, 3)
        base = f"runs/{run}/{step}/{attempt}"
        what = rnd.choice(["begun", "report", "checkpoints", "checkpoints", "model", "ref", "prune", "again", "damage", "mend"])
        names = store.list()
        if what in ("begun", "report") and not store.has(f"{base}/{what}"):
            put(store, f"{base}/{what}", dict(station=step, params=dict(seed=rnd.random(), text="ü\u0000\u202e"), version="1", seconds=rnd.random()))
        elif what == "checkpoints":
            n = rnd.randrange(10**6)
            if not store.has(f"{base}/checkpoints/{n}"):
                put(store, f"{base}/checkpoints/{n}", dict(step=n, loss=rnd.random(), deep=dict(er=dict(x=-1e-300)), big=10**400, on=True), rnd.randrange(10**9))
        elif what == "model":
            store.publish(None, f"models/{run}", dict(run=run, step=step, metrics=dict(exact=rnd.random())))
        elif names and what == "ref":
            store.place.create(f"refs/models/{run}/current/{rnd.randrange(1, 10**6)}.json", json.dumps(dict(name=rnd.choice(names))).encode())
        elif names and what == "prune":
            store.place.delete([seal_key(n) for n in rnd.sample(names, min(len(names), 3))])
        elif names and what == "again":
            name = rnd.choice(names)
            store.place.delete([seal_key(name)])
            put(store, name, dict(loss=rnd.random()), rnd.randrange(10**9))
        elif names and what == "damage":
            path = store.place.path(seal_key(rnd.choice(names)))
            path.write_bytes(path.read_bytes()[:-20])
        elif what == "mend":
            for bad in [r for r in collect(store).rows("seals", but=dict(damaged=""))]:
                store.place.delete([seal_key(bad["name"])])
                put(store, bad["name"], dict(mended=1))


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_kept_up_to_date_is_equal_to_made_anew(store, url, seed, tmp_path):
    rnd, registry = random.Random(seed), Registry(store, url)
    for _ in range(8):
        history(store, rnd, rnd.randint(0, 25))
        assert kept(registry) == everything(collect(store))
    before = kept(registry)
    assert before["seals"] and before["metrics"] and before["attempts"]
    assert kept(registry, anew=True) == before
    assert kept(Registry(store, str(tmp_path / "other.sqlite"))) == before


def test_two_stores_in_one_database(store, url, tmp_path):
    other = Store(tmp_path / "other")
    put(store, "runs/a/train/1/begun")
    put(other, "runs/a/train/1/begun")
    put(other, "runs/a/train/1/checkpoints/1", dict(loss=1))
    first, second = Registry(store, url), Registry(other, url)
    assert [len(kept(r)["seals"]) for r in (first, second, first)] == [1, 2, 1]
    kept(first, anew=True)
    assert len(kept(second)["metrics"]) == 1


def test_only_new_manifests_are_read(store, url):
    for n in range(30):
        put(store, f"runs/a/train/1/checkpoints/{n}", dict(loss=n))
    registry = Registry(store, url)
    kept(registry)
    put(store, "runs/a/train/1/checkpoints/30", dict(loss=30))
    with patch.object(type(store.place), "read", autospec=True, side_effect=type(store.place).read) as read:
        assert len(kept(registry)["metrics"]) == 31
    assert [c.args[1] for c in read.call_args_list] == ["seals/runs/a/train/1/checkpoints/30.json"]


UPDATER = """
import sys
from waystation.registry import Registry
from waystation.store import Store
store, url, rounds = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for _ in range(rounds):
    with Registry(store, url).facts() as f: f.rows('seals')
"""


def test_processes_that_update_at_once(store, url):
    "Nothing is doubled, nobody fails, while a writer seals and prunes."
    rounds = 40 if LONG else 8
    put(store, "runs/a/train/1/begun", dict(station="train"))
    others = [subprocess.Popen([sys.executable, "-c", UPDATER, store.url, url, str(rounds)], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    rnd, n = random.Random(0), 0
    while any(p.poll() is None for p in others):
        for _ in range(3):
            put(store, f"runs/a/train/1/checkpoints/{n}", dict(loss=n))
            n += 1
        store.place.delete([seal_key(rnd.choice(store.list()))])
    for p in others:
        assert (p.wait(), p.communicate()[1]) == (0, "")
    assert kept(Registry(store, url)) == everything(collect(store))


def test_a_seal_that_goes_while_it_is_looked_for(store, url):
    for n in range(5):
        put(store, f"runs/a/train/1/checkpoints/{n}")
    read = type(store.place).read

    def gone(place, key):
        if key.endswith("/3.json"):
            place.delete([key])
        return read(place, key)

    with patch.object(type(store.place), "read", gone):
        assert [r["number"] for r in kept(Registry(store, url))["seals"]] == [0, 1, 2, 4]


def test_damaged_manifests_are_named_and_cost_nothing_else(store, url, monkeypatch):
    monkeypatch.setenv("WAYSTATION_REGISTRY", url)
    put(store, "runs/a/train/1/begun", dict(station="train", params={}))
    put(store, "runs/a/train/1/checkpoints/1", dict(loss=1))
    put(store, "runs/a/train/1/checkpoints/2", dict(loss=2))
    put(store, "runs/b/train/1/begun", dict(station="train", params={}))
    for text in ("checkpoints/2", "checkpoints/3"):
        store.place.path(seal_key(f"runs/a/train/1/{text}")).write_bytes(b"{}")
    store.place.path("seals/no name.json").write_bytes(b"{}")
    (store.place.root / "refs/models/x").mkdir(parents=True)
    (store.place.root / "refs/models/x/1.json").write_bytes(b"[")
    found = show_runs(store)
    assert [r["run"] for r in found["runs"]] == ["a", "b"]
    assert list(found["damaged"]) == ["no name", "runs/a/train/1/checkpoints/2", "runs/a/train/1/checkpoints/3", "models/x"]
    assert all(k in v for k, v in found["damaged"].items())
    assert [m["number"] for m in show_run(store, "a")["steps"][0]["metrics"]] == [1]
    assert list(show_run(store, "b")["damaged"]) == []


def test_unicode_and_what_no_database_likes(store, url):
    words = ["ü", unicodedata.normalize("NFD", "ü"), "\u0000", "\u202e", "x" * 5000, "'; DROP TABLE seals; --", "🛰"]
    put(store, "runs/" + "x" * 200 + "/train/1/report", {w: i for i, w in enumerate(words)} | dict(params={w: w for w in words}, station=words[2]))
    registry = Registry(store, url)
    assert kept(registry) == everything(collect(store)) == kept(registry, anew=True)
    assert any(r["name"] == "ü" for r in kept(registry)["metrics"])


@pytest.mark.parametrize("n", [2000])
def test_show_of_many_seals(store, n, monkeypatch):
    for i in range(n):
        put(store, f"runs/r{i // 100}/train/1/checkpoints/{i % 100}", dict(loss=1 / (i + 1)), 10**6)
    shown = show_runs(store)
    assert (len(shown["runs"]), sum(r["seals"] for r in shown["runs"])) == (n // 100, n)
    with patch("waystation.registry.read_rows") as read:
        read.side_effect = lambda store, keys: {} if not keys else pytest.fail("a known manifest is read again")
        assert show_runs(store) == shown
    with patch("waystation.registry.Registry", side_effect=ImportError):
        assert show_runs(store) == shown


# -- a database that fails

SECRET = "s3cr3t!pa55"


@pytest.mark.parametrize("bad", [
    f"postgresql://ann:{SECRET}@127.0.0.1:1/x", f"postgres://ann:{SECRET}@127.0.0.1:1/x?connect_timeout=1",
    f"postgresql://127.0.0.1:1/x?user=ann&password={SECRET}", f"postgresql://ann:{SECRET}@127.0.0.1:port/x",
    f"postgresql://ann:{SECRET}@[::1/x", f"mysql://ann:{SECRET}@127.0.0.1/x", f"postgresql://ann:{SECRET}@no.such.host.invalid/x",
])
def test_a_password_is_never_repeated(store, bad, monkeypatch, caplog, capsys):
    monkeypatch.setenv("WAYSTATION_REGISTRY", bad)
    put(store, "runs/a/train/1/begun", dict(station="train", params={}))
    for ask in (lambda: show_runs(store), lambda: show_run(store, "a"), lambda: store_index(store.url), lambda: store_sql("SELECT 1", store.url)):
        try:
            said = json.dumps(ask())
        except Refused as e:
            said = f"{e} {e.__cause__}"
        assert SECRET not in said + caplog.text + "".join(capsys.readouterr())
    try:
        assert SECRET not in repr(Registry(store))
    except Refused:
        pass


def test_a_wrong_password_is_not_repeated_and_the_manifests_answer(store, server, monkeypatch, caplog):
    url = server("postgres").url
    password = url.split(":")[2].split("@")[0]
    monkeypatch.setenv("WAYSTATION_REGISTRY", url.replace(password, SECRET))
    put(store, "runs/a/train/1/begun", dict(station="train", params={}))
    assert show_runs(store)["runs"][0]["run"] == "a"
    assert "password authentication failed" in caplog.text and SECRET not in caplog.text
    monkeypatch.setenv("WAYSTATION_REGISTRY", url.replace(f":{password}", ""))
    monkeypatch.setenv("PGPASSWORD", password)
    told = store_index(store.url)
    assert told["rows"]["seals"] == 1 and password not in json.dumps(told)
    with pytest.raises(Refused, match="one SELECT over seals") as e:
        store_sql("SELECT nothing FROM seals", store.url)
    assert password not in str(e.value)


def test_sql_reads_and_changes_nothing(store, url, monkeypatch):
    monkeypatch.setenv("WAYSTATION_REGISTRY", url)
    for n in (9, 10):
        put(store, f"runs/sql/train/1/checkpoints/{n}", dict(loss=20 / n))
    found = store_sql(f"SELECT number, value FROM metrics WHERE store = '{store.url}' AND name = 'loss' ORDER BY value", store.url)
    assert (found["columns"], found["rows"]) == (["number", "value"], [[10, 2.0], [9, 20 / 9]])
    assert found["text"].splitlines()[0] == "number  value"
    for query in ("DELETE FROM seals", "DROP TABLE metrics", "SELEC", "", "CREATE TABLE x (y int)"):
        with pytest.raises(Refused, match="one SELECT over"):
            store_sql(query, store.url)
    assert len(kept(Registry(store))["metrics"]) == 2


def test_a_database_of_somebody_else_is_left_alone(store, tmp_path, caplog, monkeypatch):
    import contextlib
    import sqlite3
    with contextlib.closing(sqlite3.connect(tmp_path / "mine.db")) as db:
        db.execute("CREATE TABLE models (x)")
        db.commit()
    before = (tmp_path / "mine.db").read_bytes()
    (tmp_path / "text.txt").write_text("not a database " * 100)
    put(store, "runs/a/train/1/begun", dict(station="train", params={}))
    for file, said in (("mine.db", "tables of somebody else"), ("text.txt", "not a database"), ("store", "cannot be used"), ("text.txt/x", "cannot be")):
        monkeypatch.setenv("WAYSTATION_REGISTRY", str(tmp_path / file))
        with pytest.raises(NoRegistry, match=said):
            store_index(store.url)
        assert show_runs(store)["runs"][0]["run"] == "a"
        assert said in caplog.text
    assert (tmp_path / "mine.db").read_bytes() == before


def test_tables_of_another_version_are_made_anew(store, url):
    registry = Registry(store, url)
    put(store, "runs/a/train/1/begun")
    before = kept(registry)
    with patch("waystation.registry._format", return_value="later"):
        assert kept(registry) == before
    assert kept(registry) == before


def test_show_as_a_user_types_it(cli, store, tmp_path):
    put(store, "runs/banking/train/1/begun", dict(station="train", params=dict(model="m" * 30, data="d" * 30, text="word " * 30), version="1"))
    for n in range(0, 400, 20):
        put(store, f"runs/banking/train/1/checkpoints/{n}", {"step": n, "eval_loss": 1.5, **{f"metrics.m{i}": i for i in range(9)}}, 10**7)
    put(store, "models/banking/v1", dict(run="banking", step="train"), 10**7)
    store.refer("models/banking/current", "models/banking/v1")
    for width, args in ((80, ()), (80, ("banking",)), (120, ("banking",))):
        said = cli("show", *args, COLUMNS=str(width))
        assert max(map(len, said.splitlines())) <= width, said
        assert "20 checkpoints" in said and "models/banking/current -> models/banking/v1" in said
    assert cli("show", "banking", "--json")["steps"][0]["metrics"][1]["eval_loss"] == 1.5
    assert "22 seals, 1 refs, 1 runs, 1 attempts" in cli("store", "index")
    assert len(list((tmp_path / "cache/registry").iterdir())) == 1
    assert cli("store", "sql", "SELECT count(*) AS n FROM seals").split() == ["n", "22"]
