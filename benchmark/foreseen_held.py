"""Memory that `--dry-run` foresees against memory that it then holds, on a CPU, by phase.

    python benchmark/foreseen_held.py            # minutes; writes results/foreseen_held.json

Each shape runs in a process of its own. Held is the peak resident set of a phase minus what the process took
before it made a model; foreseen is the table's sum for that phase (in sampling without the moments that a
rehearsal's only step makes afterwards). Their ratio says how far the table is off.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import record
import torch
import tyro

from cleanalign import dry_run
from cleanalign.command_line import command_line
from cleanalign.phases import give_back_freed_memory, peak_memory, reset_peak_memory

SMALL = ["--sample-rows=32", "--eval-prompts=16", "--batch-size=8", "--device=cpu"]
SHAPES = {
    "selm, all weights": ("selm", ["--model=smollm2-135m", "--dtype=bfloat16"]),
    "selm, all weights, float32": ("selm", ["--model=smollm2-135m", "--dtype=float32"]),
    "selm, LoRA, checkpointed": (
        "selm",
        ["--model=smollm2-135m", "--dtype=bfloat16", "--lora-rank=16", "--gradient-checkpointing"]
        + ["--micro-batch-tokens=2048", "--max-prompt-length=256", "--max-new-tokens=32"],
    ),
    "ipo_md, long rows, bfloat16 states": (
        "ipo_md",
        ["--model=smollm2-135m", "--dtype=bfloat16", "--optimizer-states=bfloat16"]
        + ["--micro-batch-tokens=1024", "--max-prompt-length=256", "--max-new-tokens=32"],
    ),
    "nash_md, GPT-2": ("nash_md", ["--model=gpt2", "--dtype=float32", "--micro-batch-tokens=512"]),
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
    script, flags = SHAPES[name]
    module = importlib.import_module(script)
    dry_run.matmul_peak = lambda *_: 1e12  # not asked for here, and it takes a while
    with tempfile.TemporaryDirectory() as folder:
        importlib.import_module("torch.utils.tensorboard")
        torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
        give_back_freed_memory()
        reset_peak_memory()
        before = peak_memory()
        flags = [*SMALL, *flags, "--dry-run", f"--run-dir={folder}", "--run-name=x"]
        command_line(module.main, module.RECIPES, flags)
        written = json.loads((Path(folder) / "x" / "dry_run.json").read_text())
    lines = written["foreseen_bytes"]
    foreseen = dry_run.together(lines)
    # float32 states make their moments in their first update, which a rehearsal has only once
    if "bfloat16 states" not in name:
        foreseen["sampling"] -= lines["optimiser: moments"]
    held = {phase: written["phases"][phase]["peak_memory_bytes"] - before for phase in foreseen}
    return {
        "flags": [script, *(flag for flag in flags if "run-" not in flag)],
        "before_bytes": before,
        "foreseen": foreseen,
        "held": held,
        "ratio": {phase: round(foreseen[phase] / held[phase], 3) for phase in foreseen},
        "lines": lines,
    }


if __name__ == "__main__":
    tyro.cli(main)
