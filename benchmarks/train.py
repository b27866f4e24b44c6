"""What a training step costs on a CPU: the station beside TRL's defaults and the recipe that is copied most.

    python benchmarks/train.py                # every way, 20 minutes of CPU; writes train.json beside this file and the guide's table
    python benchmarks/train.py --rounds 1 --way "waystation, bfloat16"   # a quick look at one; writes nothing
    python benchmarks/train.py --table        # put the table of train.json into the guide; runs nothing

Each way is a process of its own, on one core, that takes as many steps of eight rows over the same rows: one epoch, so that all have seen the same
at its end. Rounds are interleaved. `cpu` is process CPU time from the first step to the last, without loading; `peak` the process's largest
resident size (VmHWM). Each adapter is then laid over the same four-bit weights and scored by one function, on rows that nobody trained on.
"""

import argparse
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import memory, one_core, show, spread, taken

if __name__ == "__main__":
    one_core()
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RESULT, GUIDE = HERE / "train.json", HERE.parent / "lit" / "guides" / "training-speed.md"
BEGIN = "<!-- from benchmarks/train.json -->\n"
OURS, TRL, RECIPE = "waystation", "TRL's defaults", "the recipe"
WAYS = tuple(f"{way}, {dtype}" for dtype in ("bfloat16", "float32") for way in (OURS, TRL, RECIPE))
EIGHT, MODEL = 8, "asset:smollm2-135m"
SAME = dict(learning_rate=1e-3, warmup_steps=0, lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0, seed=0, use_cpu=True, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True)  # fmt: skip
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules="all-linear")


def lines(path):
    return [json.loads(x) for x in Path(path).read_text().splitlines()]


def measured(run):
    "CPU and wall seconds of a call, and the process's largest size so far, in MB."
    c, w = time.process_time(), time.perf_counter()
    run()
    return dict(cpu=time.process_time() - c, wall=time.perf_counter() - w, peak=memory()[0])


def frozen(dtype):
    "The model in four bits, as the station has it."
    from waystation.assets import resolve
    from waystation.training.trainer import load_model
    return load_model(resolve(MODEL, "model").path, "qlora", dtype)


def ours(folder: Path, steps: int, dtype: str):
    "The station's own steps, checkpoints included; rows in, adapter out."
    from waystation.recipe import begin
    from waystation.stations.train import train
    from waystation.training.trainer import fit, prepare
    os.environ["WAYSTATION_PRECISION"] = dtype
    params = {k: p.default for k, p in inspect.signature(train).parameters.items()}
    params |= dict(run="bench", store=str(folder / "store"), data=str(folder / "rows.jsonl"), eval_data=str(folder / "held.jsonl"), max_steps=steps,
                   learning_rate=SAME["learning_rate"], warmup_steps=SAME["warmup_steps"])  # fmt: skip
    with begin("train", params) as job:
        course = prepare(job)
        assert course.precision == dtype
        return measured(lambda: fit(course, job)), course.model


def trl(folder: Path, steps: int, dtype: str):
    "SFTTrainer as it comes, with the same adapter and schedule; rows of prompt and completion, so that it scores completions only."
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from waystation.assets import resolve
    rows = Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in lines(folder / "rows.jsonl")])
    args = SFTConfig(str(folder / "out"), max_steps=steps, per_device_train_batch_size=EIGHT, bf16=dtype == "bfloat16", dataloader_pin_memory=False, **SAME)
    transformers.set_seed(0)
    trainer = SFTTrainer(frozen(dtype), args=args, train_dataset=rows, peft_config=LoraConfig(**LORA),
                         processing_class=transformers.AutoTokenizer.from_pretrained(resolve(MODEL, "model").path))  # fmt: skip
    if dtype == "float32":  # it would have the adapter in bfloat16, which costs speed and quality where the rest is not
        for w in trainer.model.parameters():
            if w.requires_grad:
                w.data = w.data.to(torch.float32)
    return measured(trainer.train), trainer.model


def recipe(folder: Path, steps: int, dtype: str):
    "transformers' Trainer: one row at a time, eight of them a step, padded to the limit, a loss over every token, the template's own system message."
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from waystation.assets import resolve
    tok = transformers.AutoTokenizer.from_pretrained(resolve(MODEL, "model").path)
    texts = [tok.apply_chat_template([m for m in r["prompt"] + r["completion"] if m["role"] != "system"], tokenize=False) for r in lines(folder / "rows.jsonl")]
    rows = Dataset.from_list([dict(tok(t, truncation=True, max_length=512, padding="max_length")) for t in texts])
    args = transformers.TrainingArguments(str(folder / "out"), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=EIGHT,
                                          bf16=dtype == "bfloat16", dataloader_pin_memory=False, **SAME)  # fmt: skip
    transformers.set_seed(0)
    model = get_peft_model(frozen(dtype), LoraConfig(**LORA))
    trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=transformers.DataCollatorForLanguageModeling(tok, mlm=False))
    return measured(trainer.train), model


def worker(way: str, folder: Path, steps: int) -> None:
    import torch
    torch.set_num_threads(1)
    from waystation.training.trainer import quiet
    quiet()
    name, dtype = way.split(", ")
    figures, model = {OURS: ours, TRL: trl, RECIPE: recipe}[name](folder, steps, dtype)
    model.save_pretrained(folder / "adapter")
    (folder / "figures.json").write_text(json.dumps(figures))


def score(adapters: dict, held: Path) -> dict:
    "Held-out loss a token of completion: of the untouched model, and of each adapter over the same weights."
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from waystation.assets import resolve
    from waystation.training.chat import code_rows, normalise
    tok = AutoTokenizer.from_pretrained(resolve(MODEL, "model").path)
    rows = code_rows([normalise(r) for r in lines(held)], tok)

    @torch.inference_mode()
    def loss(model):
        total = count = 0
        for row in rows:
            n, ids = row.before, row.ids
            logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=len(ids) - n + 1).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[n:]), reduction="sum"))
            count += len(ids) - n
        return total / count
    base = frozen("float32").eval()
    found = {"the untouched model": loss(base)}
    for way, folder in adapters.items():
        model = PeftModel.from_pretrained(base, folder).eval()
        found[way] = loss(model)
        base = model.unload()
    return found


def rows(folder: Path, steps: int) -> dict:
    "The rows of all ways, by length of every kind, and what there is in them."
    from transformers import AutoTokenizer

    from waystation.assets import resolve
    from waystation.training.chat import code_rows, normalise
    taken = random.Random(0).sample(lines(resolve("asset:banking", "data").path), EIGHT * steps)
    held = lines(resolve("asset:banking", "eval_data").path)[:12]
    for name, some in (("rows", taken), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    coded = code_rows([normalise(r) for r in taken], AutoTokenizer.from_pretrained(resolve(MODEL, "model").path))
    n = [len(row.ids) for row in coded]
    return dict(rows=len(n), held=len(held), tokens=sum(n), completion=sum(len(row.ids) - row.before for row in coded), shortest=min(n),
                median=int(statistics.median(n)), longest=max(n), limit=512)  # fmt: skip


def measure(ways: list[str], steps: int, rounds: int, work: Path) -> dict:
    found, adapters, about = {w: [] for w in ways}, {}, rows(work, steps)
    for r in range(rounds):
        for way in ways[::-1] if r % 2 else ways:
            folder = work / f"{r}-{WAYS.index(way)}"
            folder.mkdir(exist_ok=True)
            if not (folder / "figures.json").exists():
                for name in ("rows.jsonl", "held.jsonl"):
                    (folder / name).write_text((work / name).read_text())
                done = subprocess.run([sys.executable, __file__, "--worker", way, str(folder), "--steps", str(steps)], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
            found[way].append(json.loads((folder / "figures.json").read_text()))
            adapters[way] = folder / "adapter"
            print(r, way, {k: round(v, 1) for k, v in found[way][-1].items()}, file=sys.stderr, flush=True)
    losses = score(adapters, work / "held.jsonl")
    def beside(way):  # by rounds, at the same precision
        first = found.get(f"{OURS}, {way.split(', ')[1]}")
        return spread(x["cpu"] / f["cpu"] for x, f in zip(found[way], first, strict=True)) if first else None
    result = {w: dict(cpu=spread(x["cpu"] for x in f), wall=spread(x["wall"] for x in f), peak=spread(x["peak"] for x in f), loss=round(losses[w], 4),
                      tokens=spread(about["completion"] / x["cpu"] for x in f), slower=beside(w)) for w, f in found.items()}  # fmt: skip
    return dict(about=about | dict(steps=steps), before=round(losses["the untouched model"], 4), ways=result)


def tables(result: dict) -> str:
    a = result["about"]
    out = [f"{a['steps']} steps of {EIGHT} rows: {a['rows']} rows of the banking questions, {a['tokens']:,} tokens, of which {a['completion']:,} are completions; "
           f"lengths {a['shortest']} to {a['longest']}, median {a['median']}. Held-out loss of the untouched model {result['before']:.3f}.", "",
           "| | completion tokens a CPU second | CPU s | CPU time beside waystation at that precision | peak MB | held-out loss |",
           "|---|---|---|---|---|---|"]  # fmt: skip
    for way, w in result["ways"].items():
        s, b = w["slower"], "**" if way.startswith(OURS) else ""
        beside = "1" if b else f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"
        out.append(f"| {b}{way}{b} | {w['tokens']['median']:.1f} | {w['cpu']['median']:.1f} | {beside} | {w['peak']['max']:,.0f} | {w['loss']:.3f} |")
    ours, ways = f"{OURS}, {result['chosen']}", result["ways"]
    def best(name):  # its fastest precision, beside ours: by rounds where it is the same
        way = min((w for w in ways if w.startswith(name)), key=lambda w: ways[w]["cpu"]["median"])
        kind, took = way.split(", ")[1], ways[way]["cpu"]["median"] / ways[ours]["cpu"]["median"]
        return f"{ways[way]['slower']['median'] if kind == result['chosen'] else took:.2f} times as long ({kind})"
    n, v = ways[ours]["cpu"]["n"], result["versions"]
    out += ["", f"`train` chooses {result['chosen']} on this CPU. Beside that, at the precision in which each is fastest, TRL's defaults take "
                f"{best(TRL)}, and the recipe {best(RECIPE)}."]  # fmt: skip
    return "\n".join([*out, f"Taken {result['date']} on one core of {result['machine']}, {n} round{'s' if n > 1 else ''}; "
                      + ", ".join(f"{k} {x}" for k, x in v.items()) + "."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, action="append", help="only these; prints, and writes nothing")
    parser.add_argument("--work", type=Path, help="a folder for what is measured: what it holds already is not run again")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], Path(args.worker[1]), args.steps)
    if args.table:
        return show(GUIDE, BEGIN, tables(json.loads(RESULT.read_text())))
    from waystation.runtime import precision
    with tempfile.TemporaryDirectory() as tmp:
        work = args.work or Path(tmp)
        work.mkdir(exist_ok=True)
        result = measure(args.way or list(WAYS), args.steps, args.rounds, work)
    if args.way:
        return print(json.dumps(result, indent=1))
    result |= dict(chosen=precision()[0]) | taken("torch", "transformers", "trl", "peft", "bitsandbytes")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    show(GUIDE, BEGIN, tables(result))


if __name__ == "__main__":
    main()
