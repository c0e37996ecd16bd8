"""Steps of the default run at two commits, in turn: what a machine whose speed wanders says of which is
faster. Seconds of a step by phase, medians and their ratio.

    python benchmark/steps_in_turn.py --before b065aee --after HEAD --script ipo_md    # three minutes on two cores

Each commit gets a git worktree and a process, which loads once and then does the run's steps one by one:
sampling, judging, log-probs, backward, update. Writes benchmark/results/steps_in_turn_SCRIPT.json.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal


def main(
    before: str, after: str, script: Literal["ipo_md", "nash_md"], steps: int = 10, out: str = ""
) -> None:
    """Measure and write.

    Args:
        before: commit that is compared against.
        after: commit that should be faster.
        script: whose steps.
        steps: of each side; two more warm up.
        out: JSON file to write; empty is the one named above.
    """
    import record  # here: it puts this checkout first on the path, and a worker's code is its own tree's
    from before_after import worktrees

    processes, rows, commits = {}, {"before": [], "after": []}, {}
    with worktrees(before, after) as (scratch, trees):
        try:
            for side, tree in trees.items():
                head = ["git", "-C", str(tree), "rev-parse", "HEAD"]
                commits[side] = subprocess.check_output(head, text=True).strip()
                processes[side] = start(tree, script, scratch / f"{side}.log")
            for step in range(1, 3 + steps):
                for side, process in processes.items():
                    rows[side].append(ask(process, step))
                    print(step, side, rows[side][-1], flush=True)
        except json.JSONDecodeError:
            sys.exit(f"a worker ended:\n{(scratch / f'{side}.log').read_text()[-2000:]}")
        finally:
            for process in processes.values():
                process.kill()
    medians = {side: median_of(answers[2:]) for side, answers in rows.items()}
    seconds = {side: phases["seconds"] for side, phases in medians.items()}
    ratio = {name: medians["before"][name] / medians["after"][name] for name in seconds_of(medians["after"])}
    same = sum(a["metrics"] == b["metrics"] for a, b in zip(rows["before"], rows["after"], strict=True))
    result = {**record.origin(), "commits": commits, "script": script, "median": medians}
    result |= {"times_as_fast": ratio, "steps_with_the_very_same_metrics": same, "steps": rows}
    record.write(out or record.RESULTS / f"steps_in_turn_{script}.json", result)
    print(
        f"{seconds}; times as fast {ratio}; {same} of {len(rows['after'])} steps with the very same metrics"
    )


def seconds_of(phases: dict[str, float]) -> list[str]:
    """The phases that take long enough to have a ratio."""
    return [name for name, value in phases.items() if value > 0.1]


def median_of(answers: list[dict]) -> dict[str, float]:
    """Median seconds of a step and of its phases."""
    names = [name for name in answers[0] if name != "metrics"]
    return {name: statistics.median(answer[name] for answer in answers) for name in names}


def start(tree: Path, script: str, log: Path) -> subprocess.Popen:
    """A process of `tree`'s code that does a step for each line it reads; what it prints goes to `log`."""
    command = [sys.executable, __file__, "--serve", script]
    env, pipes = {**os.environ, "PYTHONPATH": str(tree)}, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with open(log, "w") as errors:
        process = subprocess.Popen(command, cwd=tree, env=env, stderr=errors, text=True, **pipes)
    json.loads(process.stdout.readline())
    return process


def ask(process: subprocess.Popen, step: int) -> dict:
    """What a step took."""
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def serve(script: str, answers) -> None:
    """The worker: set up the default run, then one of its steps for each line."""
    phases, experiment = importlib.import_module("cleanalign.phases"), importlib.import_module("experiment")
    optimization, module = importlib.import_module("cleanalign.optimization"), importlib.import_module(script)
    args = module.RECIPES["smollm2-135m"]
    keep = phases.keep_freed_memory
    keep(*[args.micro_batch_tokens] * len(inspect.signature(keep).parameters))
    exp = experiment.set_up(script, args)
    exp.run = experiment.Run(script, args, 0)  # a run's clock; create() is not called, so nothing is written
    batches = module.plan_batches(args, len(exp.rows))
    optimiser = optimization.make_optimiser(exp.policy, args.optimizer_states, args.weight_decay)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        step = int(line)
        earlier = {name: phase["seconds"] for name, phase in exp.run.phases.items()}
        started = time.perf_counter()
        batch, _ = module.collect(exp, batches[step - 1], step)
        with exp.run.phase("training"):
            metrics = module.train_step(exp, optimiser, batch, step, args.learning_rate)
        answer = {"seconds": time.perf_counter() - started, "metrics": metrics}
        for name, phase in exp.run.phases.items():
            answer[name] = phase["seconds"] - earlier.get(name, 0.0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        answers, sys.stdout = sys.stdout, sys.stderr
        serve(sys.argv[2], answers)
    else:
        import tyro

        tyro.cli(main)
