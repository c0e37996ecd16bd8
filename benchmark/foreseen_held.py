"""Memory that `--dry-run` foresees against memory that it then holds, on a CPU, by phase.

    python benchmark/foreseen_held.py            # minutes; writes results/foreseen_held.json

Each shape runs in a process of its own. Held is the peak resident set of a phase minus what the process took
when a tiny model had been rehearsed in it: modules and kernels are loaded by then. Foreseen is the table's
sum for that phase. Their ratio says how far the table is off.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import record
import tyro

from cleanalign import command_line, dry_run
from cleanalign.phases import give_back_freed_memory, peak_memory, reset_peak_memory

sys.path.insert(0, str(record.ROOT / "tests"))
import tiny

SMALL = ["--sample-rows=32", "--eval-prompts=16", "--batch-size=8", "--device=cpu"]
SHAPES = {
    "selm, all weights": ("selm", "smollm2-135m", ["--dtype=bfloat16"]),
    "selm, all weights, float32": ("selm", "smollm2-135m", ["--dtype=float32"]),
    "selm, LoRA, checkpointed": (
        "selm",
        "smollm2-135m",
        ["--dtype=bfloat16", "--lora-rank=16", "--gradient-checkpointing"]
        + ["--micro-batch-tokens=2048", "--max-prompt-length=256", "--max-new-tokens=32"],
    ),
    "ipo_md, long rows, bfloat16 states": (
        "ipo_md",
        "smollm2-135m",
        ["--dtype=bfloat16", "--optimizer-states=bfloat16"]
        + ["--micro-batch-tokens=1024", "--max-prompt-length=256", "--max-new-tokens=32"],
    ),
    "nash_md, GPT-2": ("nash_md", "gpt2", ["--dtype=float32", "--micro-batch-tokens=512"]),
}


def main(
    only: str = "", shape: str | None = None, out: str = str(record.RESULTS / "foreseen_held.json")
) -> None:
    """Measure and write.

    Args:
        only: shapes whose name has this in it.
        shape: measure this one in this process (what the others are started with).
        out: JSON file to write.
    """
    if shape is not None:
        print(json.dumps(measure(shape)), flush=True)
        return
    result = {**record.origin(), "shapes": {}}
    for name in SHAPES:
        if only in name:
            command = [sys.executable, __file__, "--shape", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result["shapes"][name] = json.loads(done.stdout.splitlines()[-1])
            record.write(out, result)
            print(name, json.dumps(result["shapes"][name]["ratio"]), flush=True)


def measure(name: str) -> dict:
    """Bytes foreseen and held by phase, and foreseen over held."""
    script, model, flags = SHAPES[name]
    dry_run.matmul_peak = lambda *_: 1e12  # not asked for here, and it takes a while
    with tempfile.TemporaryDirectory() as folder:
        small = tiny.folder(Path(folder) / "model")
        rehearse(script, [f"--model={small}", *flags], Path(folder) / "small")
        give_back_freed_memory()
        reset_peak_memory()
        before = peak_memory()
        flags = [f"--model={model}", *flags]
        written = rehearse(script, flags, Path(folder) / "x")
    lines = written["foreseen_bytes"]
    foreseen = dry_run.together(lines)
    held = {phase: written["phases"][phase]["peak_memory_bytes"] - before for phase in foreseen}
    return {
        "flags": [script, *SMALL, *flags],
        "before_bytes": before,
        "foreseen": foreseen,
        "held": held,
        "ratio": {phase: round(foreseen[phase] / held[phase], 3) for phase in foreseen},
        "lines": lines,
    }


def rehearse(script: str, flags: list[str], folder: Path) -> dict:
    """What `--dry-run` writes."""
    module = importlib.import_module(script)
    where = [f"--run-dir={folder.parent}", f"--run-name={folder.name}"]
    command_line.command_line(module.main, module.RECIPES, [*SMALL, *flags, "--dry-run", *where])
    return json.loads((folder / "dry_run.json").read_text())


if __name__ == "__main__":
    tyro.cli(main)
