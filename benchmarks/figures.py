"""What the benchmarks share: one core to measure on, what a process takes, a figure with its spread, and the table of it in a guide."""

import os
import statistics
from pathlib import Path

END = "<!-- end -->\n"  # of a table in a guide; each benchmark has its own mark for the beginning


def one_core(**more: str) -> None:
    "Before anything that counts cores is imported: torch, XLA, ONNX and OpenVINO take a thread for each that they see."
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
                      WAYSTATION_WANDB_MODE="disabled", **more)  # fmt: skip


def memory() -> tuple[float, float]:
    "MB of this process: the most so far, and now. Not ru_maxrss, which a child inherits."
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(said[k].split()[0]) / 1024 for k in ("VmHWM", "VmRSS"))


def spread(values, digits=3) -> dict:
    values = list(values)
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits), "max": round(max(values), digits), "n": len(values)}


def taken(*packages: str) -> dict:
    "When and on what a result was taken, and with which versions."
    import platform
    from datetime import date
    from importlib.metadata import version

    from waystation.runtime import devices
    return dict(date=date.today().isoformat(), machine=f"{devices()[-1].name} ({platform.machine()}, {os.cpu_count()} threads)",
                versions={p: version(p) for p in packages})  # fmt: skip


def cell(x: dict, form: str = "{:.2f}") -> str:
    return "{} ({} to {})".format(*(form.format(x[k]) for k in ("median", "min", "max")))


def grid(*lines: list) -> list[str]:
    "A Markdown table of lists of cells, the first of them its head."
    told = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return [told[0], "|---" * len(lines[0]) + "|", *told[1:], ""]


def goal(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def shown(guide: Path, begin: str) -> str:
    "What stands in a guide between a mark and its end."
    return guide.read_text().split(begin)[1].split(END)[0].strip()


def show(guide: Path, begin: str, text: str) -> None:
    "Put a text there."
    before, after = guide.read_text().split(begin)
    guide.write_text(before + begin + "\n" + text.strip() + "\n\n" + END + after.split(END, 1)[1])
