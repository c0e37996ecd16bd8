"""Memory that `--dry-run` foresees against memory that it then holds, on a CPU, by phase.

    python benchmark/foreseen_held.py            # minutes; writes results/foreseen_held.json

Each shape runs in processes of its own. Held is the peak resident set of a phase minus what the process took
when a tiny model had been rehearsed in it: modules are loaded by then. Foreseen is the table's sum for that
phase. Their ratio says how far the table is off: `given_back`, where freed memory goes back to the system at
once, so that what is held is what is used; and `kept`, as runs do it, where it stays for the next step.
"""

from __future__ import annotations

import importlib
import json
import os
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

# of glibc: blocks of 128 kB and more are the system's as soon as they are free
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
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
    only: str = "",
    shape: str | None = None,
    kept: bool = True,
    out: str = str(record.RESULTS / "foreseen_held.json"),
) -> None:
    """Measure and write.

    Args:
        only: shapes whose name has this in it.
        shape: measure this one in this process (what the others are started with).
        kept: with that, keep freed memory.
        out: JSON file to write.
    """
    if shape is not None:
        print(json.dumps(measure(shape, kept)), flush=True)
        return
    result = {**record.origin(), "shapes": {}}
    for name in SHAPES:
        if only in name:
            run = {how: in_its_process(name, how) for how in ("given_back", "kept")}
            both = ("before_bytes", "held", "ratio")
            shared = {key: value for key, value in run["kept"].items() if key not in both}
            result["shapes"][name] = shared | {key: {how: run[how][key] for how in run} for key in both}
            record.write(out, result)
            print(name, json.dumps(result["shapes"][name]["ratio"]), flush=True)


def in_its_process(name: str, how: str) -> dict:
    """What `measure` returns, from a process of its own."""
    command = [sys.executable, __file__, "--shape", name, "--kept" if how == "kept" else "--no-kept"]
    environment = os.environ if how == "kept" else os.environ | GIVEN_BACK
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, kept: bool) -> dict:
    """Bytes foreseen and held by phase, and foreseen over held."""
    script, model, flags = SHAPES[name]
    dry_run.matmul_peak = lambda *_: 1e12  # not asked for here, and it takes a while
    if not kept:
        command_line.keep_freed_memory = lambda: None
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
