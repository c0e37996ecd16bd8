"""Five trained policies in one pool: who beats whom under a judge that no scalar can express, and what
mixture of them nobody beats.

    python benchmark/pool.py        # trains SELM, IPO-MD, Nash-MD, online DPO and RLHF, then evaluates them

The task is that of `benchmark/compare.py cycle`, with SmolLM2 taught human replies as the start, and fewer
steps. RLHF learns from the scalar in results/cycle_reward.json, fitted to the judge on that start. Runs go
to --run-dir, --jobs at a time with one thread each, and are reused if finished there and resumed if begun;
benchmark/results/pool.json keeps each run's command, commit, seed and versions and the whole comparison,
pool.md the tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import record
import tyro

BATCH_SIZE = 8  # prompts (SELM: pairs) in a step
CYCLE = (
    "--model {run_dir}/cycle-sft/model --judge cycle --eval-judge None --eval-prompts 64 --tau 0.1"
    " --learning-rate 6e-5 --epochs 8 --micro-batch-tokens 768"
)
PREPARE = (
    "afd.py --objective forward-kl --min-demonstration-score None --num-prompts 640 --epochs 1"
    " --micro-batch-tokens 768 --eval-prompts 64 --save-every 0 --run-dir {run_dir} --run-name cycle-sft"
)
TITLES = {"pool": "Five policies", "pool-and-start": "With the starting model"}
START = "cycle-sft"  # the name of the run that makes the starting model
SCALAR = CYCLE.replace("--judge cycle", "--judge benchmark/cycle_reward.py:reward")
POLICIES = {  # run name: its command. SELM has no --tau; its β stays at the script's .1
    "ipo-md": f"ipo_md.py {CYCLE}",
    "nash-md": f"nash_md.py {CYCLE}",
    "selm": f"selm.py {CYCLE.replace(' --tau 0.1', '')} --num-prompts 288",
    "online-dpo": f"ipo_md.py {CYCLE} --loss dpo --beta 0",
    "rlhf": f"nash_md.py {SCALAR} --objective rlhf",
}


def main(
    steps: int = 24, prompts: int = 256, jobs: int = 2, run_dir: str = "runs/pool", train_only: bool = False
) -> None:
    """Train the pool, compare it, write results/pool.json and pool.md.

    Args:
        steps: optimiser steps of each policy.
        prompts: held-out prompts of the comparison.
        jobs: runs at once, each with one thread.
        run_dir: where the run folders go; finished ones are reused.
        train_only: end before the comparison.
    """
    folder = Path(run_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / START / "model").exists():
        start(PREPARE.format(run_dir=folder), folder / f"{START}.log")

    def train(name: str) -> None:
        if (folder / name / "summary.json").exists():
            return
        words = POLICIES[name].format(run_dir=folder)
        # of a flag given twice the last holds; their own evaluation is small, as the comparison follows
        words += f" --max-steps {steps} --batch-size {BATCH_SIZE} --eval-prompts 32 --seed 1 --save-every 6"
        words += f" --run-dir {folder} --run-name {name}"
        if (folder / name).exists():  # begun and killed
            words = f"{words.split()[0]} --resume {folder / name}"
        start(words, folder / f"{name}.log")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, POLICIES))
    if train_only:
        return

    comparisons = {}
    for name, members in {"pool": list(POLICIES), "pool-and-start": [*POLICIES, START]}.items():
        if not (folder / name / "comparison.json").exists():
            words = " ".join(str(folder / member) for member in members)
            flags = f"--judge cycle --dataset chitchat --eval-prompts {prompts}"
            start(f"evaluate.py {words} {flags} --run-dir {folder} --run-name {name}", folder / f"{name}.log")
        comparisons[name] = json.loads((folder / name / "comparison.json").read_text())
    runs = [of_run(folder / name) for name in (START, *POLICIES)]
    evaluated = record.where_from(folder / "pool")
    result = {"command": record.command(), "runs": runs, "evaluated": evaluated, **comparisons}
    record.write(record.RESULTS / "pool.json", result)
    text = "".join(
        f"# {TITLES[name]}\n\n{tables(folder / name, comparisons[name])}\n" for name in comparisons
    )
    (record.RESULTS / "pool.md").write_text(text)
    print(text)


def of_run(folder: Path) -> dict:
    """Where a policy came from: its command's values that matter, commit, seed, and its own summary."""
    origin = record.of_run(folder)
    summary = json.loads((folder / "summary.json").read_text())
    kept = {key: summary.get(key) for key in ("win_rate", "win_rate_interval", "kl", "steps", "seconds")}
    return {
        "name": folder.name,
        "script": origin["script"],
        "args": origin["args"],
        **record.where_from(folder),
        "summary": kept,
    }


def tables(folder: Path, comparison: dict) -> str:
    """A comparison's Markdown, and the styles of its models' replies, of which the judge sees nothing
    else."""
    measured = comparison["judges"]["cycle"]["measured"]
    names = list(next(iter(measured.values())))
    lines = ["| share of replies | " + " | ".join(name.removeprefix("style/") for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for model, values in measured.items():
        lines.append(f"| {model} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |")
    return (folder / "comparison.md").read_text() + "\n" + "\n".join(lines) + "\n"


def start(command: str, log: Path) -> None:
    """Run one of the scripts on one thread; its output goes to `log`. Ends the program if it fails."""
    began = time.perf_counter()
    with open(log, "a") as lines:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, *command.split()]
        done = subprocess.run(
            words, cwd=record.ROOT, stdout=lines, stderr=lines, env=environment, check=False
        )
    if done.returncode:
        sys.exit(f"failed: {command}; see {log}")
    print(f"{time.perf_counter() - began:6.0f} s  {command}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
