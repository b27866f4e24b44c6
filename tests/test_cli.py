"""Bad input on the command line: exit code 2, one sentence with the value, the rule and the way out, and nothing sealed."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from waystation.cli import main
from waystation.store import Store


@pytest.fixture
def cli(env, tmp_path, monkeypatch, capsys):
    "As the fixture of the same name, in this process: each of these commands would else import torch or jax anew."

    def run(*args, code=0, **changes):
        for name, value in (env | changes).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        try:
            got = main([*map(str, args)])
        except SystemExit as e:  # argparse
            got = e.code or 0
        out, err = capsys.readouterr()
        assert got == code, f"exit {got}\n{out}\n{err[-4000:]}"
        return json.loads(out) if "--json" in args else err if code else out

    return run


@pytest.fixture
def source(tmp_path):
    "A small good source; the tests break it."
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["first text", "second text"]}), path)
    return path


def refused(cli, env, *args, **changes):
    "Run a command that must be refused: its sentence, in which no traceback stands."
    said = cli(*args, code=2, **changes)
    assert said.splitlines()[-1].startswith("waystation: refused: "), said
    assert "Traceback" not in said
    if os.path.isdir(env["WAYSTATION_STORE"]):
        assert Store(env["WAYSTATION_STORE"]).list() == []
    return said.splitlines()[-1]


EMBED = ("embed", "--keep", "")


def test_a_source_that_does_not_exist(cli, env):
    assert "source='nothing.parquet' does not exist" in refused(cli, env, *EMBED, "--source", "nothing.parquet")


def test_a_column_that_does_not_exist_lists_those_there_are(cli, env, source):
    said = refused(cli, env, *EMBED, "--source", source, "--text", "body")
    assert "text='body' is not a column" in said and "the columns are id, text" in said


def test_an_empty_file(cli, env, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in refused(cli, env, *EMBED, "--source", tmp_path / "empty.jsonl")


def test_duplicate_ids(cli, env, tmp_path):
    pq.write_table(pa.table({"id": ["a", "b", "a"], "text": ["x", "y", "z"]}), tmp_path / "twice.parquet")
    said = refused(cli, env, *EMBED, "--source", tmp_path / "twice.parquet")
    assert "id 'a' stands in row 0 and in row 2" in said and "--on-duplicate first" in said


def test_a_text_over_the_limit_is_refused_when_asked(cli, env, tmp_path):
    pq.write_table(pa.table({"id": ["a"], "text": ["word " * 2000]}), tmp_path / "long.parquet")
    said = refused(cli, env, *EMBED, "--source", tmp_path / "long.parquet", "--chunk-tokens", "0", "--on-long", "error")
    assert "'a'" in said and "truncate" in said


def test_a_null_text_is_set_aside_and_the_run_goes_on(cli, env, tmp_path):
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": ["x", None, ""]}), tmp_path / "holes.parquet")
    report = cli(*EMBED, "--source", tmp_path / "holes.parquet", "--json")
    assert (report["rows"], report["quarantined"]) == (1, 2)


def test_wrong_values_of_options(cli, env, source):
    assert "--shard-rows='many' must be a whole number" in refused(cli, env, *EMBED, "--source", source, "--shard-rows", "many")
    assert "on_long='cut'" in refused(cli, env, *EMBED, "--source", source, "--on-long", "cut")
    assert "engine='tpu'" in refused(cli, env, *EMBED, "--source", source, "--engine", "tpu")


def test_a_store_that_cannot_be_written(cli, env, source, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not writable" in refused(cli, env, *EMBED, "--source", source, "--store", tmp_path / "file/store")


def test_training_that_cannot_work(cli, env, tmp_path):
    said = refused(cli, env, "train", "--target-modules", "q_proj,qkv")
    assert "qkv" in said and "down_proj" in said
    assert "eval_steps=500" in refused(cli, env, "train", "--eval-steps", "500", "--max-steps", "50")
    row = {"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": "[Generated answer for Who?]"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(cli, env, "train", "--data", tmp_path / "rows.jsonl")
    assert "placeholder" in said and "1" in said


def test_an_export_without_vectors(cli, env):
    assert "no seal or ref 'runs/x/embed'" in refused(cli, env, "export", "--run", "x")


def test_a_changed_parameter_is_refused_with_both_ways_out(cli, env, source):
    args = (*EMBED, "--source", source, "--run", "a")
    cli(*args)
    said = cli(*args, "--seed", "1", code=2)
    assert "seed was 0, is 1" in said and "new run name" in said and "--restart" in said
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["first text", "another text"]}), source)
    assert "source (content) was" in cli(*args, code=2)
    assert cli(*args, "--restart", "--json")["attempt"] == 2


def test_json_says_what_was_refused(cli, env):
    said = cli("show", "nothing", "--json", code=2)
    message = f"no run 'nothing' in store {env['WAYSTATION_STORE']}; there are: none"
    assert said == {"error": "refused", "message": message, "exit": 2}


def test_inputs_that_no_library_may_answer_for(cli, env, tmp_path):
    assert "data='' names nothing" in refused(cli, env, "train", "--data", "")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a", "text": "x"}\n' * 999)[:40])
    assert "is not whole gzip" in refused(cli, env, *EMBED, "--source", tmp_path / "cut.jsonl.gz")
    pq.write_table(pa.table({"id": ["a"], "text": [["x"]]}), tmp_path / "nested.parquet")
    assert "has the type list" in refused(cli, env, *EMBED, "--source", tmp_path / "nested.parquet")
    assert "on_duplicate='last'" in refused(cli, env, *EMBED, "--source", "asset:banking", "--on-duplicate", "last")


def test_help_of_a_station_names_every_parameter(cli):
    from waystation.recipe import station_parameters

    for station in ("setup", "train", "embed", "export"):
        said = cli(station, "--help")
        if station == "train":
            assert "--task {sft,grpo,classify}" in said and said.index("with --task grpo:") < said.index("--generations INT     answers to each")
        assert all("--" + k.replace("_", "-") in said for k in station_parameters(station))


def test_help_says_percent_once(cli):
    said = cli("evaluate", "--help")
    assert "95% interval" in " ".join(said.split()) and "%%" not in said + cli("--help")
