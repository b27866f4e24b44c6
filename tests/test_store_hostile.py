"""Manifests, refs and keys that somebody hostile has put into a store: nothing is written outside the target, and one sentence says why."""

import json
import os
import unicodedata

import pytest
from proving import serving

from waystation.runtime import Refused
from waystation.seal import _json, _sha256
from waystation.store import Store


def plant(store, name, files, key=None, **changes):
    "Put a manifest into the store that hashes to what it says of itself."
    body = dict(name=name, files=files, meta={}, created="2026-01-01T00:00:00+00:00", writer="m", checked="") | changes
    data = _json(dict(sha256=_sha256(_json(body)), body=body))
    assert store.place.create(key or f"seals/{name}.json", data)
    return data


def blob(store, data, tmp_path):
    digest = _sha256(data)
    (tmp_path / "blob").write_bytes(data)
    store.place.put(f"blobs/{digest[:2]}/{digest}", tmp_path / "blob", digest)
    return {"sha256": digest, "size": len(data)}


@pytest.fixture
def ground(tmp_path):
    "Everything below a folder of its own, so that whatever is written anywhere in it is seen."
    (tmp_path / "away").mkdir()
    (tmp_path / "away/kept").write_text("kept")
    return tmp_path


def outside(ground):
    return {str(p.relative_to(ground)): p.read_bytes() for p in ground.rglob("*")
            if p.is_file() and p.relative_to(ground).parts[0] not in ("store", "out", "blob")}


PATHS = {
    "parent": ["../../x"], "parent inside": ["a/../../x"], "absolute": ["/tmp/waystation-hostile"], "home": ["~/../x\x00"], "empty": [""], "slash": ["a/"],
    "dot": ["./x"], "drive": ["C:/x"], "backslash": ["..\\x"], "stream": ["x:y"], "device": ["sub/NUL"], "device with ending": ["com1.txt"],
    "trailing dot": ["x."], "trailing space": ["x "], "newline": ["a\nb"], "right to left": ["a\u202egpj.exe"], "zero width": ["a\u200bb"],
    "twins by normal form": [unicodedata.normalize("NFC", "ü"), unicodedata.normalize("NFD", "ü")], "twins by case": ["Model", "model"],
    "file and folder": ["a", "a/b"], "lone surrogate": ["a\ud800"],
}


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
def test_a_path_that_leads_elsewhere_is_refused_and_writes_nothing(paths, ground):
    store = Store(ground / "store")
    entry = blob(store, b"evil" * 30_000, ground)
    try:
        plant(store, "models/evil/v1", dict.fromkeys(paths, entry))
    except UnicodeEncodeError:  # such a manifest cannot even be hashed by its author; written as an escape it can be tried
        body = json.dumps({"sha256": "0" * 64, "body": {"name": "models/evil/v1", "files": {paths[0]: entry}}})
        store.place.create("seals/models/evil/v1.json", body.encode())
    before = outside(ground)
    for act in (store.read, store.verify, lambda n: store.fetch(n, ground / "out")):
        with pytest.raises(Refused, match="damaged manifest"):
            act("models/evil/v1")
    assert store.list() == ["models/evil/v1"]
    assert outside(ground) == before and not os.path.exists("/tmp/waystation-hostile") and not list((ground / "out").rglob("*"))


@pytest.mark.parametrize("link", ["sub", "sub/x"])
def test_a_link_inside_the_target_is_not_followed(link, ground):
    store = Store(ground / "store")
    plant(store, "models/evil/v1", {"sub/x": blob(store, b"evil" * 30_000, ground)})
    (ground / "out" / link).parent.mkdir(parents=True)
    (ground / "out" / link).symlink_to(ground / "away" if link == "sub" else ground / "away/kept")
    before = outside(ground)
    with pytest.raises(Refused, match="is a symbolic link"):
        store.fetch("models/evil/v1", ground / "out")
    assert outside(ground) == before


def test_a_link_in_the_way_of_the_half_written_file_is_not_followed(ground):
    store = Store(ground / "store")
    plant(store, "models/evil/v1", {"x": blob(store, b"evil" * 30_000, ground)})
    (ground / "out").mkdir()
    (ground / "out/x.part").symlink_to(ground / "away/kept")
    before = outside(ground)
    try:
        store.fetch("models/evil/v1", ground / "out")
    except Refused:
        pass
    assert outside(ground) == before


@pytest.mark.parametrize("kind", ["file", "gs", "s3"])
def test_claims_that_the_bytes_do_not_bear_out(kind, ground, server):
    with serving(kind, server, ground / "store") as (url, _):
        store = Store(url)
        (ground / "blob").write_bytes(b"")
        small, n = blob(store, b"little", ground), 0
        for files, match in (({"x": small | {"size": 10 << 30}}, "bytes instead of|has room for"),
                             ({"x": {"sha256": "0" * 64, "size": 6}}, "is missing")):
            n += 1
            plant(store, f"models/evil/v{n}", files)
            assert len(store.verify(f"models/evil/v{n}")) == 1
            with pytest.raises(Refused, match=match):
                store.fetch(f"models/evil/v{n}", ground / "out")
        other = _sha256(b"other!")
        (ground / "blob").write_bytes(b"little")
        if kind == "file":  # a blob under another hash than its own
            store.place.create(f"blobs/{other[:2]}/{other}", b"little")
            plant(store, "models/evil/v9", {"x": {"sha256": other, "size": 6}})
            assert len(store.verify("models/evil/v9", read_data=True)) == 1
            with pytest.raises(Refused, match="does not have the bytes"):
                store.fetch("models/evil/v9", ground / "out")
        assert not list((ground / "out").rglob("*"))


GOOD = {"sha256": "0" * 64, "size": 1}
PACK = "a" * 64


def lying(*where):
    "Files in a pack: (at, size) each, with a hash of their own."
    return dict(files={f"f{n}": {"sha256": f"{n}" * 64, "size": size, "pack": PACK, "at": at} for n, (at, size) in enumerate(where)})


BODIES = {
    "files is a list": dict(files=[]), "files is null": dict(files=None), "a file is a number": dict(files={"a": 1}),
    "no size": dict(files={"a": {"sha256": "0" * 64}}),
    "size is true": dict(files={"a": GOOD | {"size": True}}), "size is a float": dict(files={"a": GOOD | {"size": 1.0}}),
    "size below zero": dict(files={"a": GOOD | {"size": -1}}),
    "size is text": dict(files={"a": GOOD | {"size": "1"}}), "hash leads elsewhere": dict(files={"a": GOOD | {"sha256": "../../../../etc/passwd"}}),
    "hash is a number": dict(files={"a": GOOD | {"sha256": 5}}), "hash is in capitals": dict(files={"a": GOOD | {"sha256": "A" * 64}}),
    "data is another file's": dict(files={"a": GOOD | {"data": "QQ=="}}), "data is no base64": dict(files={"a": GOOD | {"data": "§"}}),
    "data is a number": dict(files={"a": GOOD | {"data": 7}}), "huge data": dict(files={"a": GOOD | {"data": "QUFB" * 3_000_000}}),
    "meta is a list": dict(meta=[]), "another name": dict(name="models/other/v1"), "name is a list": dict(name=["models/evil/v1"]),
    "a pack leads elsewhere": dict(files={"a": GOOD | {"pack": "../../../../etc/passwd", "at": 0}}),
    "a pack's hash is a number": dict(files={"a": GOOD | {"pack": 5, "at": 0}}), "a pack is null": dict(files={"a": GOOD | {"pack": None, "at": 0}}),
    "a pack's hash is in capitals": dict(files={"a": GOOD | {"pack": "A" * 64, "at": 0}}), "a pack without at": dict(files={"a": GOOD | {"pack": PACK}}),
    "at without a pack": dict(files={"a": GOOD | {"at": 0}}), "at is true": dict(files={"a": GOOD | {"pack": PACK, "at": False}}),
    "at is text": dict(files={"a": GOOD | {"pack": PACK, "at": "0"}}), "at is a float": lying((0.0, 1)), "at below zero": lying((-1, 1), (0, 5)),
    "at is huge": lying((10**30, 1)), "a pack and data": dict(files={"a": GOOD | {"pack": PACK, "at": 0, "data": "QQ=="}}),
    "a pack begins late": lying((1, 5)), "a gap in a pack": lying((0, 5), (6, 5)), "files overlap": lying((0, 5), (4, 5)), "a file in a file": lying((0, 9), (2, 3)),
    "two files in one place": lying((0, 5), (0, 5)), "a huge file in a pack": lying((0, 5), (5, 10 << 30)),
    "a huge pack": lying(*((n << 20, 1 << 20) for n in range(9))),
    "a blob of two sizes": dict(files={"a": GOOD, "b": GOOD | {"size": 2}}),
    "a pack that is a file of another size": dict(files={"a": {"sha256": PACK, "size": 3}, **lying((0, 5))["files"]}),
    "created is a number": dict(created=5), "writer is a list": dict(writer=[]), "checked is null": dict(checked=None),
}


@pytest.mark.parametrize("changes", BODIES.values(), ids=BODIES)
def test_a_manifest_of_the_wrong_shape_is_refused(changes, ground):
    store = Store(ground / "store")
    changes = {"name": "models/evil/v1", "files": {}} | changes
    plant(store, key="seals/models/evil/v1.json", **changes)
    for act in (store.read, store.verify, lambda n: store.fetch(n, ground / "out")):
        with pytest.raises(Refused, match="damaged manifest"):
            act("models/evil/v1")
    assert not list((ground / "out").rglob("*"))


@pytest.mark.parametrize("kind", ["file", "gs"])
def test_a_pack_with_other_bytes_than_its_manifest_claims(kind, ground, server):
    with serving(kind, server, ground / "store") as (url, _):
        store = Store(url)
        pack = blob(store, b"one" * 50_000 + b"two" * 50_000, ground)
        true = {"one": {"sha256": _sha256(b"one" * 50_000), "size": 150_000, "pack": pack["sha256"], "at": 0},
                "two": {"sha256": _sha256(b"two" * 50_000), "size": 150_000, "pack": pack["sha256"], "at": 150_000}}
        plant(store, "models/good/v1", true)
        assert store.verify("models/good/v1", read_data=True) == []
        assert (store.fetch("models/good/v1", ground / "out") / "two").read_bytes() == b"two" * 50_000
        plant(store, "models/evil/v1", true | {"two": true["two"] | {"sha256": "0" * 64}})
        plant(store, "models/evil/v2", {k: v | {"size": 100_000, "at": v["at"] // 3 * 2} for k, v in true.items()})
        plant(store, "models/evil/v3", {k: v | {"pack": "0" * 64} for k, v in true.items()})
        for version, wrong, match in (1, ["two"], "two does not have the bytes"), (2, ["one", "two"], "instead of 200000"), (3, ["one", "two"], "is missing"):
            found = store.verify(f"models/evil/v{version}", read_data=True)
            assert [w.split(": ")[1].split()[0] for w in found] == wrong, found
            with pytest.raises(Refused, match=match):
                store.fetch(f"models/evil/v{version}", ground / f"out{version}")
            assert not [p for p in (ground / f"out{version}").rglob("*") if p.name != "one"]


RAW = {
    "empty": b"", "no JSON": b"\x80\x04K\x01.", "a pickle's name": b"cos\nsystem\n", "null": b"null", "a list": b"[]", "not UTF-8": b'{"sha256": "\xff"}',
    "deep": b'{"sha256":"0","body":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "NaN": b'{"sha256": "0", "body": {"size": NaN}}',
    "a huge number": b'{"sha256":"0","body":' + b"9" * 10_000 + b"}",
    "a lone surrogate": b'{"sha256": "0", "body": {"name": "\\ud800"}}', "infinite": b'{"sha256": "0", "body": {"size": 1e999}}',
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW)
def test_what_is_no_manifest_is_refused(data, ground):
    store = Store(ground / "store")
    store.place.create("seals/models/evil/v1.json", data)
    for act in (store.read, store.verify, lambda n: store.fetch(n, ground / "out")):
        with pytest.raises(Refused, match="damaged manifest"):
            act("models/evil/v1")


def test_a_key_that_stands_twice_cannot_say_two_things(ground):
    "Parsers differ in which of two equal keys counts; ours must not hash one and use the other."
    store = Store(ground / "store")
    good = plant(store, "models/evil/v1", {}, key="elsewhere")
    store.place.create("seals/models/evil/v1.json", good.replace(b'"files":{}', b'"files":{"../x":{}},"files":{}'))
    try:
        assert store.read("models/evil/v1").files == {}
    except Refused:
        pass


REFS = {"leads outside": b'{"name": "../../x"}', "absolute": b'{"name": "/etc/passwd"}', "no JSON": b"x", "no name": b"{}", "a list": b"[]",
    "a number": b'{"name": 5}',
        "null": b'{"name": null}', "deep": b"[" * 100_000, "not UTF-8": b"\xff", "a name that is not there": b'{"name": "models/nowhere"}'}


@pytest.mark.parametrize("data", REFS.values(), ids=REFS)
def test_a_ref_that_leads_elsewhere_is_refused(data, ground):
    store = Store(ground / "store")
    store.seal(None, "models/a/v1", {})
    store.place.create("refs/models/a/current/1.json", data)
    before = outside(ground)
    for act in (store.resolve, store.read, store.verify, lambda n: store.fetch(n, ground / "out")):
        with pytest.raises(Refused):
            act("models/a/current")
    try:
        store.refs()
    except Refused:
        pass
    store.verify("models/a/v1")
    assert outside(ground) == before


def test_junk_among_the_keys_is_passed_over(ground):
    store = Store(ground / "store")
    store.seal(None, "models/a/v1", {})
    store.seal(None, "runs/a/1", {})
    store.refer("models/a/current", "models/a/v1")
    for key in ("refs/models/a/current/x.json", "refs/models/a/current/-1.json", "refs/models/a/current/1.5.json", "refs/models/a/current/2.txt",
                "refs/models/a/current/\u0662.json", "refs/stray.json", "seals/stray", "seals/models/a/v2.json.part", "seals/models/a/desktop.ini",
                "seals/models/a/v\u0662.json", "seals/runs/a/\u0662.json", "seals/runs/a/\u00b2.json", "seals/models/a b/v1.json", "seals/.hidden.json",
                f"seals/runs/a/{'9' * 180}.json", "seals/models/a/.DS_Store.json"):
        store.place.create(key, b"junk")
    assert store.resolve("models/a/current") == "models/a/v1"
    assert store.refs() == {"models/a/current": "models/a/v1"}
    assert store.read("models/a/current").name == "models/a/v1"
    assert "models/a/v1" in store.list() and all(" " not in n and not n.startswith(".") for n in store.list())
    store.publish(None, "models/a", {})
    assert store.latest("runs/a") is not None


def test_a_ref_with_a_huge_number_still_moves(ground):
    store = Store(ground / "store")
    store.seal(None, "models/a/v1", {})
    store.seal(None, "models/a/v2", {})
    store.refer("models/a/current", "models/a/v1")
    store.place.create(f"refs/models/a/current/{'9' * 150}.json", b'{"name": "models/a/v1"}')
    store.refer("models/a/current", "models/a/v2")
    assert store.resolve("models/a/current") == "models/a/v2"
