"""The default run of a script at two commits, in turn on one machine: wall time, seconds and tokens a second
by phase, and their ratio; and how many of its steps have the very same metrics.

    python benchmark/before_after.py 71232f4 HEAD                   # about eight minutes on two cores
    python benchmark/before_after.py 71232f4 HEAD --flags="--max-steps 6 --eval-prompts 16"

Each commit gets a git worktree of its own in a scratch folder, removed at the end. Writes
benchmark/results/before_after_SCRIPT.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import tyro


def main(
    before: tyro.conf.Positional[str],
    after: tyro.conf.Positional[str],
    script: str = "selm.py",
    flags: str = "",
    out: str = "",
) -> None:
    """Run both and write the ratios.

    Args:
        before: commit that is compared against.
        after: commit that should be faster.
        script: which script to run.
        flags: its flags in one string, given as --flags="…".
        out: JSON file to write; empty is benchmark/results/before_after_SCRIPT.json.
    """
    with worktrees(before, after) as (scratch, trees):
        result = {side: one_run(tree, script, flags, scratch) for side, tree in trees.items()}
        before_rows, after_rows = (metrics(scratch / f"run-{side}") for side in trees)
    ratio = {"wall_seconds": result["before"]["wall_seconds"] / result["after"]["wall_seconds"]}
    for name, seconds in grouped(result["before"]["phase_seconds"]).items():
        ratio[name] = seconds / grouped(result["after"]["phase_seconds"])[name]
    same = sum(a == b for a, b in zip(before_rows, after_rows, strict=True))
    result = {"command": record.command(), **result, "times_as_fast": ratio}
    result["logged_rows"] = {"all": len(before_rows), "same_metrics": same}
    record.write(out or record.RESULTS / f"before_after_{Path(script).stem}.json", result)
    for side in ("before", "after"):
        run = result[side]
        rates = {name.split("/")[1]: rate for name, rate in run["tokens_per_second"].items()}
        print(
            f"{side:<7} {run['git_commit'][:7]}: {run['wall_seconds']:.1f} s; "
            f"by phase {listed(run['phase_seconds'])}; tokens/s {listed(rates)}; "
            f"win rate {run['win_rate']:.3f}"
        )
    print(f"{same} of {len(before_rows)} logged rows have the very same metrics")
    print("times as fast: " + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items()))


@contextlib.contextmanager
def worktrees(before: str, after: str):
    """Context with a scratch folder and, in it, the working trees {"before": …, "after": …} of two commits."""
    worktree = ["git", "-C", str(record.ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="before_after-") as scratch:
        trees = {side: Path(scratch) / side for side in ("before", "after")}
        try:
            for tree, commit in zip(trees.values(), (before, after), strict=True):
                subprocess.run([*worktree, "add", "--detach", "-q", str(tree), commit], check=True)
            yield Path(scratch), trees
        finally:
            for tree in trees.values():
                subprocess.run([*worktree, "remove", "--force", str(tree)], check=False)


def listed(figures: dict[str, float]) -> str:
    """Named figures as text."""
    return ", ".join(f"{name} {value:.0f}" for name, value in figures.items())


def one_run(tree: Path, script: str, flags: str, scratch: Path) -> dict:
    """Wall seconds of `python SCRIPT FLAGS` in `tree`, start-up included, and what its summary says."""
    where = ["--run-dir", str(scratch), "--run-name", f"run-{tree.name}"]
    words = [sys.executable, script, *where, *flags.split()]
    start = time.perf_counter()
    subprocess.run(words, cwd=tree, check=True, env={**os.environ, "PYTHONPATH": str(tree)})
    seconds = time.perf_counter() - start
    folder = scratch / f"run-{tree.name}"
    summary, origin = json.loads((folder / "summary.json").read_text()), record.of_run(folder)
    rates = {name: value for name, value in summary.items() if name.startswith("tokens_per_second/")}
    return {
        "wall_seconds": seconds,
        "phase_seconds": summary["phase_seconds"],
        "tokens_per_second": rates,
        **{name: summary[name] for name in ("steps", "win_rate", "kl", "peak_memory_bytes")},
        **{name: origin[name] for name in ("git_commit", "versions", "device_name")},
    }


def metrics(folder: Path) -> list[dict]:
    """What a run logged at each step, but for how fast it was."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("tokens_per_second")}
        for line in lines
    ]


def grouped(phases: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, in groups that every commit has: the optimiser's update was once a part of
    `training`."""
    groups = {
        "sampling": ("sampling",),
        "training": ("training", "update"),
        "reference": ("reference",),
        "evaluation": ("evaluation",),
    }
    there = {group: [phases[name] for name in names if name in phases] for group, names in groups.items()}
    return {group: sum(seconds) for group, seconds in there.items() if seconds}


if __name__ == "__main__":
    tyro.cli(main)
