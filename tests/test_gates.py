"""A gate that fails: exit code 4, `current` stays, nothing is trained twice; in a recipe as well as by command and function."""

import json

import nbformat
import pytest
from test_train import rows

from waystation.cli import _headline_train, main
from waystation.recipe import Job, load_recipe, run_recipe
from waystation.runtime import GateFailed, Refused
from waystation.stations.train import train
from waystation.store import Store
from waystation.training import trainer


@pytest.fixture
def few(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WAYSTATION_WANDB_MODE", "disabled")
    monkeypatch.setenv("WAYSTATION_CACHE", str(tmp_path / "cache"))
    return dict(run="t", store=str(tmp_path / "store"), model=model, data=rows(tmp_path / "rows.jsonl"), max_steps=2, lora_r=4, max_length=128,
                warmup_steps=1, eval_rows=3)  # fmt: skip


@pytest.fixture
def untrained(monkeypatch):
    "From its call on, training is an error."

    def forbid():
        def fit(*_):
            raise AssertionError("trained again")

        monkeypatch.setattr(trainer, "fit", fit)

    return forbid


def test_current_stays_until_the_demand_is_met(few, untrained):
    store = Store(few["store"])
    train(**few)
    assert store.resolve("models/t/current") == "models/t/v1"
    hard = few | dict(restart=True, seed=1, gates="exact >= 0.5, eval_loss <= 99")
    with pytest.raises(GateFailed, match=r"exact >= 0.5: failed with 0 of n=3, 95% interval 0.00 to 0.56\. models/t/current stays at models/t/v1") as e:
        train(**hard)
    assert store.resolve("models/t/current") == "models/t/v1" and store.has("models/t/v2")
    assert [g["passed"] for g in e.value.report["gates"]] == [False, True]
    untrained()
    again = hard | dict(restart=False)
    with pytest.raises(GateFailed, match=r"exact >= 0.5: failed"):
        train(**again)
    with pytest.raises(Refused, match=r"'exat >= 0.5' names no figure of this step; its figures are .*exact"):
        train(**again | dict(gates="exat >= 0.5"))
    assert store.resolve("models/t/current") == "models/t/v1"
    eased = train(**again | dict(gates="exact >= 0"))
    assert store.resolve("models/t/current") == "models/t/v2" and eased["gates"][0]["passed"]

    # Who goes back by hand is not overruled by running a step again that has passed; a harder demand fails and moves nothing.
    store.refer("models/t/current", "models/t/v1")
    assert train(**again | dict(gates="exact >= 0"))["gates"] == eased["gates"]
    with pytest.raises(GateFailed, match="stays at models/t/v1"):
        train(**again)
    assert store.resolve("models/t/current") == "models/t/v1"


def test_a_kill_around_the_report(few, untrained, monkeypatch):
    "Between the model's seal, the move of `current` and the report: the same command ends as if nothing had happened."

    def killed(*_):
        raise KeyboardInterrupt

    store = Store(few["store"])
    for gates, kill in (("eval_loss <= 99", (Store, "refer")), ("eval_loss <= 99", (Job, "judged"))):
        with monkeypatch.context() as m:
            if kill[0] is Store:  # the first move of a ref is that of the run itself
                refer = Store.refer
                m.setattr(Store, "refer", lambda s, ref, name, refer=refer: killed() if ref.startswith("models/") else refer(s, ref, name))
            else:
                judged = Job.judged
                m.setattr(Job, "judged", lambda s, judged=judged: killed() if s.report else judged(s))
            with pytest.raises(KeyboardInterrupt):
                train(**few | dict(gates=gates))
        assert store.has("models/t/v1") and bool(store.refs("models/t/current")) == store.has("runs/t/train/1/report")
    untrained()
    assert train(**few | dict(gates="eval_loss <= 99"))["gates"][0]["passed"] and store.resolve("models/t/current") == "models/t/v1"


def test_refused_before_training(few, untrained, tmp_path):
    untrained()
    for gates, says in (("exact", "'exact' is not a demand"), ("exact > 1", "is not a demand"), ("citation >= 0.9", "its figures are exact, eval_loss"),
                        ("exact >= 90", "between 0 and 1; write 90% as 0.9")):  # fmt: skip
        with pytest.raises(Refused, match=says):
            train(**few | dict(gates=gates))
    assert Store(few["store"]).list() == []
    (tmp_path / "r.yaml").write_text("steps: [{station: train, gates: [exact >= 0.9, loss < 1]}]")
    with pytest.raises(Refused, match="'loss < 1' is not a demand"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.slow
def test_a_recipe_fails_and_passes_when_the_demand_is_lowered(few, tmp_path):
    "Through papermill: the notebook of the failed try is kept, the tables in it too; the second failure starts no kernel."
    recipe, store = tmp_path / "r.yaml", Store(few["store"])
    step = {"station": "train", "gates": ["exact >= 0.9", "eval_loss <= 99"], **{k: v for k, v in few.items() if k not in ("run", "store")}}
    recipe.write_text(json.dumps({"steps": [step]}))
    for _ in range(2):
        with pytest.raises(GateFailed, match=r"exact >= 0.9: failed with 0 of n=3.*models/t/current is not made; what was made is sealed as models/t/v1"):
            run_recipe(recipe, "t", few["store"])
    assert store.list("runs/t/train/1/failed") == ["runs/t/train/1/failed/1"] and not store.list("runs/t/train/1/notebooks")
    nb = nbformat.read(store.fetch("runs/t/train/1/failed/1", tmp_path / "nb") / "2_train.ipynb", as_version=4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs) and outputs[-1].ename == "GateFailed"
    done = run_recipe(recipe, "t", few["store"], ("train.gates=exact >= 0",))
    assert done["steps"][0]["resumed_from"] == 0 and len(store.list("runs/t/train/1/checkpoints")) == 1
    assert store.resolve("models/t/current") == "models/t/v1" and done["notebooks"]["train"] == "runs/t/train/1/notebooks/1"


def test_the_command_ends_with_4(few, capsys):
    args = [x for k, v in few.items() for x in ("--" + k.replace("_", "-"), str(v))]
    assert main(["train", *args, "--gates", "exact >= 0.9", "--json"]) == 4
    said = json.loads(capsys.readouterr().out)
    assert (said["error"], said["exit"]) == ("gate failed", 4) and "exact >= 0.9: failed with 0 of n=3" in said["message"]
    assert said["report"]["figures"]["exact"]["n"] == 3 and not said["report"]["gates"][0]["passed"]
    assert main(["show", "t", "--store", few["store"]]) == 0
    assert "exact >= 0.9: failed with 0 of n=3" in capsys.readouterr().out


def test_early_stop_takes_the_best_checkpoint_and_a_kill_changes_nothing(few, tmp_path, monkeypatch):
    "Too high a rate makes the validation loss rise; the held-out rows are looked at twice, and the patience survives a kill at any seal."
    looked = []
    evaluate = trainer.Tuner.evaluate

    def watched(self, *args, **kw):
        found = evaluate(self, *args, **kw)
        looked.append("test" if "test_loss" in found else "validation")
        return found

    how = few | dict(max_steps=20, batch_size=4, eval_steps=2, early_stop=3, seal_steps=5, learning_rate=1.0, warmup_steps=4, eval_rows=1, keep_last=2)
    with monkeypatch.context() as m:
        m.setattr(trainer.Tuner, "evaluate", watched)
        whole = train(**how | dict(run="whole"))
    assert looked == ["test", *["validation"] * len(whole["evals"]), "test"]
    losses = dict(map(tuple, whole["evals"]))
    best = min(losses, key=losses.get)
    assert whole["best_step"] == best and whole["steps"] == best + 3 * 2 < 20, whole["evals"]
    store = Store(few["store"])
    sealed = store.read(f"runs/whole/train/1/checkpoints/{best}").files["adapter_model.safetensors"]["sha256"]
    assert _headline_train(whole)[0][1] == f"{whole['steps']}, the best one {whole['best_step']} by {whole['n_validation']} validation rows"
    assert sealed == whole["adapter_sha256"] and whole["n_validation"] + whole["n_train"] == train(**few | dict(run="plain", max_steps=1))["n_train"]

    seal = Job.seal
    kept = {int(n.rsplit("/", 1)[1]) for n in store.list("runs/whole/train/1/checkpoints")}
    assert {best, whole["steps"]} <= kept and len(kept) <= 3, "the two newest, and the best"
    for stop in (max(kept - {whole["steps"]}), whole["steps"]):  # the best is sealed, and a later one; the last, after which nothing is left to train

        def cut(self, folder, kind, number=None, meta=None, stop=stop):
            name = seal(self, folder, kind, number, meta)
            if kind == "checkpoints" and number == stop:
                raise KeyboardInterrupt
            return name

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Job, "seal", cut)
            train(**how | dict(run=f"cut{stop}"))
        again = train(**how | dict(run=f"cut{stop}"))
        for key in ("adapter_sha256", "evals", "eval_loss", "steps", "best_step", "samples"):
            assert again[key] == whole[key], (stop, key)


def test_early_stop_that_cannot_work(few, tmp_path):
    with pytest.raises(Refused, match="eval_steps=0 makes none"):
        train(**few | dict(early_stop=1))
    with pytest.raises(Refused, match="leave early_stop out"):
        train(**few | dict(early_stop=1, eval_steps=1, data=rows(tmp_path / "few.jsonl", 12), eval_rows=0, batch_size=1))
    assert Store(few["store"]).list() == []
