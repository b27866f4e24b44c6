"""Learning from marks, in a handful of steps on a tiny random Llama: it resumes to the bit, and bad demands are refused."""

import json
import sys

import pytest

from test_train import rows
from waystation.runtime import Refused
from waystation.stations.train import train



@pytest.fixture
def go(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    few = dict(run="g", store=str(tmp_path / "store"), task="grpo", model=model, data=rows(tmp_path / "rows.jsonl"), rewards="length, exact=0.5", generations=4,
               max_steps=4, batch_size=4, grad_accum=2, lora_r=4, method="lora", eval_steps=2, seal_steps=1, max_length=128, warmup_steps=0, eval_rows=3)
    return lambda **change: train(**few | change)


def test_a_kill_changes_nothing(go, tmp_path, power_goes):
    whole = go(store=str(tmp_path / "undisturbed"))
    assert [s for s, _ in whole["reward"]] == [1, 2, 3, 4] and [s for s, _ in whole["evals"]] == [2, 4]
    assert all(0 <= r <= 1.5 for _, r in whole["reward"]) and any(r for _, r in whole["reward"])
    power_goes(1, go)
    resumed = go()
    assert resumed["resumed_from"] == 1
    for key in ("adapter_sha256", "reward", "loss", "evals", "metrics", "eval_loss", "samples"):
        assert resumed[key] == whole[key], key


def test_marks_of_your_own_are_learnt_from(go, tmp_path, monkeypatch):
    (tmp_path / "mymarks.py").write_text("def few_zs(completions, **columns):\n    return [-c[0]['content'].lower().count('z') for c in completions]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    r = go(rewards="mymarks:few_zs, length=0", max_steps=1, eval_steps=0)
    assert r["reward"][0][1] <= 0 and json.loads((tmp_path / "store/seals/models/g/v1.json").read_text())
    sys.modules.pop("mymarks")


@pytest.mark.parametrize("change, said", [
    (dict(rewards="right"), "there are exact, format, length"),
    (dict(rewards="nowhere:f"), "cannot be imported"),
    (dict(generations=3), "a step's 8 answers are a multiple"),
    (dict(generations=1), "2 or more"),
])
def test_refused_before_anything_is_sealed(go, tmp_path, change, said):
    with pytest.raises(Refused, match=said):
        go(**change)
    assert not list((tmp_path / "store").glob("seals/**/*.json"))
