"""Learning from marks, in a handful of steps on a tiny random Llama: it resumes to the bit, and bad demands are refused."""

import json

import pytest

from test_train import rows
from waystation import recipe
from waystation.cli import headline, main
from waystation.runtime import GateFailed, Refused
from waystation.stations.train import train
from waystation.store import Store
from waystation.training import trainer
from waystation.training.merge import merge


@pytest.fixture
def mymarks(tmp_path, monkeypatch):
    "`mymarks(body)`: a module of that name, as a new process would import it."

    def write(body):
        (tmp_path / "mymarks.py").write_text(f"def f(completions, **columns):\n    {body}\n")
        monkeypatch.delitem(__import__("sys").modules, "mymarks", raising=False)
        __import__("importlib").invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # the file changes within a second, which its cache does not see
    yield write
    monkeypatch.delitem(__import__("sys").modules, "mymarks", raising=False)


@pytest.fixture
def go(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    few = dict(run="g", store=str(tmp_path / "store"), task="grpo", model=model, data=rows(tmp_path / "rows.jsonl"), rewards="length, exact=0.5", generations=4,
               max_steps=4, batch_size=4, grad_accum=2, lora_r=4, method="lora", eval_steps=2, seal_steps=1, max_length=128, warmup_steps=0, eval_rows=3)

    def run(**change):
        return train(**few | change)

    run.few = few
    return run


def test_a_kill_changes_nothing(go, tmp_path, power_goes):
    whole = go(store=str(tmp_path / "undisturbed"))
    assert [s for s, _ in whole["reward"]] == [1, 2, 3, 4] and [s for s, _ in whole["evals"]] == [2, 4]
    assert all(0 <= r <= 1.5 for _, r in whole["reward"]) and any(r for _, r in whole["reward"])
    power_goes(1, go)
    resumed = go()
    assert resumed["resumed_from"] == 1
    for key in ("adapter_sha256", "reward", "loss", "evals", "metrics", "eval_loss", "samples"):
        assert resumed[key] == whole[key], key


def test_marks_of_your_own_are_learnt_from(go, tmp_path, mymarks):
    mymarks("return [-c[0]['content'].lower().count('z') for c in completions]")
    r = go(rewards="mymarks:f, length=0", max_steps=1, eval_steps=0)
    assert r["reward"][0][1] <= 0 and json.loads((tmp_path / "store/seals/models/g/v1.json").read_text())


@pytest.mark.parametrize("body, said", [
    ("return [1.0]", "rewards: mymarks:f, asked for the marks of 2 answers, returned 1"),
    ("return 'ab'", "mymarks:f.*it returned a text"),
    ("return [1 / 0]", "mymarks:f.*ZeroDivisionError"),
])
def test_a_function_that_cannot_work_is_refused_before_a_model_is_loaded(go, tmp_path, mymarks, monkeypatch, body, said):
    monkeypatch.setattr(trainer, "load_model", lambda *_: pytest.fail("loaded"))
    mymarks(body)
    with pytest.raises(Refused, match=said):
        go(rewards="exact, mymarks:f")
    assert not list((tmp_path / "store").glob("seals/**/*.json"))


def test_a_step_without_a_mark_stops_the_run(go, tmp_path, mymarks):
    "Not with the report, after all steps. The examination counts no answer, which is worth no gate."
    mymarks("return [None] * len(completions)")
    with pytest.raises(Refused, match=r"reward is nan at step 1 .*mend the functions of rewards"):
        go(rewards="mymarks:f", eval_steps=0)
    store = Store(str(tmp_path / "store"))
    assert not store.list("runs/g/train/1/checkpoints") and store.read("runs/g/train/1/baseline").meta["reward"] == {"value": 0.0, "n": 0}


def test_a_changed_function_is_refused_and_an_older_run_goes_on(go, mymarks, power_goes, monkeypatch):
    mymarks("return [len(c[0]['content']) for c in completions]")
    how = dict(rewards="exact, mymarks:f=0.5", max_steps=2, eval_steps=0)
    power_goes(1, lambda: go(**how))
    with monkeypatch.context() as m:  # an older version hashed no code and had no max_new
        m.setattr(recipe, "code_of", lambda rewards: {})
        real = recipe.identity
        m.setattr(recipe, "identity", lambda *a: {k: v for k, v in real(*a).items() if k != "max_new"})
        power_goes(1, lambda: go(run="old", **how))
    assert go(run="old", **how)["resumed_from"] == 1
    mymarks("return [-len(c[0]['content']) for c in completions]")
    with pytest.raises(Refused, match=r"mymarks:f \(source\) was '\w{12}…', is '\w{12}…'\. One run never mixes two"):
        go(**how)
    mymarks("return [len(c[0]['content']) for c in completions]")
    assert go(**how)["resumed_from"] == 1


def test_the_held_out_reward_is_a_figure_and_gates_model_and_merged_model(go, tmp_path, mymarks, capsys):
    "And answers have as many tokens as `max_new` says, here more than twice the longest completion, in training as in the examination."
    body = """if columns["trainer_state"].max_steps:  # a training asks, not an examination
        with open(__file__ + ".sizes", "w") as f: print(max(map(len, columns["completion_ids"])), file=f)
    return [len(c[0]["content"]) for c in completions]"""
    mymarks(body)
    how = dict(rewards="mymarks:f, exact=0", max_steps=1, eval_steps=0, max_new=60)
    args = [x for k, v in dict(go.few, **how, gates="reward >= 999, eval_loss <= 99").items() for x in ("--" + k.replace("_", "-"), str(v))]
    assert main(["train", *args, "--json"]) == 4
    out, err = capsys.readouterr()
    failed = json.loads(out)
    r = failed["report"]
    assert failed["error"] == "gate failed" and err.count("reward >= 999: failed with") == 1, "told once"
    assert r["figures"]["reward"] == dict(value=r["eval_reward"]["after"], n=3)
    assert r["eval_reward"] == {who: pytest.approx(sum(len(x[who]) for x in r["samples"]) / 3, abs=1e-5) for who in ("before", "after")}
    card = Store(go.few["store"]).fetch("models/g/v1", tmp_path / "v1") / "README.md"
    assert f"(mymarks:f, exact=0): {r['eval_reward']['before']} before, {r['eval_reward']['after']} after." in card.read_text()
    assert dict(headline(r))["held-out reward"] == f"{r['eval_reward']['before']:.3f} before, {r['eval_reward']['after']:.3f} after, n=3"
    assert int((tmp_path / "mymarks.py.sizes").read_text()) == 60 > 2 * len("It is 39!<>")

    with pytest.raises(GateFailed, match="reward >= 999: failed"):
        merge("models/g/v1", go.few["store"])
    eased = go(**how, gates="reward >= 0.01")
    assert [g["name"] for g in eased["gates"]] == ["reward"]
    done = merge("models/g/v1", go.few["store"])
    assert [(g["name"], g["demand"], g["passed"]) for g in done["gates"]] == [("reward", 0.01, True)], "by what its training was judged last"


@pytest.mark.parametrize("change, said", [
    (dict(rewards="right"), "there are exact, format, length"),
    (dict(rewards="nowhere:f"), "cannot be imported"),
    (dict(generations=3), "a step's 8 answers are a multiple"),
    (dict(generations=1), "2 or more"),
    (dict(max_new=500), r"longest question of \d+ tokens is more than the model's 512 positions; give at most 4\d\d"),
    (dict(task="sft"), r"rewards='length, exact=0.5' is of task='grpo' and would do nothing in task='sft'"),
    (dict(feature_weight=0.1), r"feature_weight=0.1 is of task='classify'"),
    (dict(gates="exact >= 90"), "write 90% as 0.9"),
])
def test_refused_before_anything_is_sealed(go, tmp_path, change, said):
    with pytest.raises(Refused, match=said):
        go(**change)
    assert not list((tmp_path / "store").glob("seals/**/*.json"))
