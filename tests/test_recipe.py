"""Runs and recipes: a typo binds nobody, a changed parameter never mixes, a taken-over writer stops."""

from pathlib import Path

import pytest

from waystation.recipe import Shards, begin, load_recipe, run_recipe, station_parameters
from waystation.registry import show_run
from waystation.runtime import Refused
from waystation.seal import seal_key
from waystation.store import Store


@pytest.fixture
def params(tmp_path):
    return dict(run="a", store=str(tmp_path / "store"), restart=False, take_over=False, step="embed", seed=0)


def test_a_refused_first_try_leaves_nothing(params):
    with pytest.raises(Refused), begin("embed", params):
        raise Refused("a wrong column")
    assert Store(params["store"]).list() == []
    with begin("embed", params | dict(seed=7)) as job:  # the corrected command is not a changed one
        job.note("report", {})


def test_a_finished_restart_begins_anew_and_a_killed_one_goes_on(params):
    with begin("embed", params) as job:
        job.finish({})
    for expected in (2, 2):  # the first is killed after one seal
        with begin("embed", params | dict(restart=True)) as job:
            assert job.attempt == expected
            job.seal(None, "shards", 0, {})
    with begin("embed", params | dict(restart=True)) as job:
        job.finish({})
    with begin("embed", params | dict(restart=True)) as job:
        assert job.attempt == 3


def test_a_restart_that_was_killed_goes_on_even_when_it_is_the_first_attempt(params):
    for _ in range(2):
        with begin("embed", params | dict(restart=True)) as job:
            assert job.attempt == 1
            job.seal(None, "shards", 0, {})


def test_a_kill_between_the_first_seal_and_its_ref(params, monkeypatch):
    "The attempt is there, the ref is not: the next try finds it, and other parameters are refused as ever."
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Store, "refer", killed)
        with pytest.raises(KeyboardInterrupt), begin("embed", params) as job:
            job.seal(None, "shards", 0, {})
    with pytest.raises(Refused, match="seed was 0, is 1"), begin("embed", params | dict(seed=1)):
        pass
    with begin("embed", params | dict(take_over=True)) as job:
        assert job.attempt == 1
        job.seal(None, "shards", 0, {})
    assert Store(params["store"]).resolve("runs/a/embed") == "runs/a/embed/1/begun"


def test_a_run_named_by_a_number(params):
    with begin("embed", params | dict(run=2024)) as job:
        assert job.base == "runs/2024/embed/1"


def test_a_writer_that_was_taken_over_cannot_seal(params):
    with begin("embed", params) as old:
        with begin("embed", params | dict(take_over=True)) as new:
            new.seal(None, "shards", 0, {})
            with pytest.raises(Refused, match="was taken over by"):
                old.seal(None, "shards", 1, {})
        assert old.names("shards") == [f"{old.base}/shards/0"]


@pytest.mark.parametrize("name", ["a/b", "", "..", "a b", "ä" * 3])
def test_run_names_that_no_store_can_hold(params, name):
    with pytest.raises(Refused, match="slash"), begin("embed", params | dict(run=name)):
        pass


def test_the_packaged_recipe_loads():
    assert [s["step"] for s in load_recipe("demo")] == ["setup", "train", "embed", "embed-16s", "export", "export-16s"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [{station: embed, sorce: x}]", "unknown key 'sorce'; embed has .*source"),
        ("steps: [{station: embd}]", "'embd' is not a station; there are setup, train, embed, export"),
        ("steps: [{station: embed}, {station: embed}]", "two steps named 'embed'"),
        ("steps: [{station: embed, shard_rows: many}]", "must be a whole number"),
        ("steps: [{station: embed, run: x}]", "unknown key 'run'"),
        ("steps: [embed]", "has the step 'embed'"),
        ("steps: [{station: embed, step: a b}]", "each word between slashes"),
        ("steps: [{station: embed, shard_rows: .inf}]", "must be a whole number"),
        ("stages: []", "no list `steps`"),
        ("steps: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(Refused, match=said):
        run_recipe(tmp_path / "r.yaml", "a", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_set_changes_one_parameter_in_its_type(tmp_path):
    (tmp_path / "r.yaml").write_text("steps: [{station: embed}]")
    steps = load_recipe(tmp_path / "r.yaml", ("embed.shard_rows=16", "embed.restart=true"))
    assert steps == [dict(station="embed", step="embed", shard_rows=16, restart=True)]
    with pytest.raises(Refused, match="the steps are embed"):
        load_recipe(tmp_path / "r.yaml", ("train.seed=1",))


def test_every_station_has_the_names_that_scripts_rely_on():
    shared = {"run", "store", "seed", "restart"}
    own = {
        "setup": "model data cache",
        "train": "task model data eval_data method epochs max_steps learning_rate warmup_steps lora_r lora_alpha lora_dropout "
        "target_modules batch_size grad_accum max_length eval_steps seal_steps seal_minutes",
        "embed": "source text id keep limit model pooling max_tokens on_long on_duplicate shard_rows dtype engine",
        "export": "shards table index metric metadata",
    }
    for station, names in own.items():
        assert shared | set(names.split()) <= set(station_parameters(station)), station


def test_files_of_a_report_are_fetched_where_it_is_read(params, tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/weights").write_text("1")
    for machine in ("a", "b"):  # the second has an empty cache
        monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / machine))
        with begin("embed", params) as job:
            if not job.report:
                job.publish(tmp_path / "made", "models/a/v1")
                job.finish({}, files={"adapter": ("models/a/v1", "weights")})
            path = Path(job.report["adapter"])
        assert path.is_relative_to(tmp_path / machine) and path.read_text() == "1"
    assert show_run(Store(params["store"]), "a")["steps"][0]["report"]["adapter"] == "store:models/a/v1"


def test_show_tells_what_a_run_did(params):
    with begin("embed", params) as job:
        job.seal(None, "shards", 0, {})
        job.finish(dict(rows=5))
    shown = show_run(Store(params["store"]), "a")["steps"][0]
    assert (shown["seals"], shown["report"]["rows"], shown["params"]["seed"]) == (dict(begun=1, report=1, shards=1), 5, 0)


def test_a_shard_that_the_report_counts_must_be_there(params):
    "A writer that had lost the run may take one back that a later one had counted: rows would be missing without a word."
    with begin("embed", params) as job:
        names = [job.seal(None, "shards", n, {"rows": 3}) for n in range(3)]
        job.finish({"rows": 9, "shards": 3})
    store = Store(params["store"])
    assert Shards("store:runs/a/embed", store).names == names
    store.place.delete([seal_key(names[1])])
    with pytest.raises(Refused, match=r"counts 3 shards and the store has 2.*--restart"):
        Shards("store:runs/a/embed", store)
