"""Several processes against one: what is equal, what falls, what it costs, what happens when one is killed.

    python benchmark/processes.py matrix [NAME …]     1, 2 and 3 processes: equal samples, metrics within 1e-5
    python benchmark/processes.py kills [COUNT]       kill -9 of one of 2 at random moments; resume with 1 and 3
    python benchmark/processes.py memory              peak memory of a process against their number
    python benchmark/processes.py bytes               bytes on the wire, by the kernel, against the formula
    python benchmark/processes.py default             the default selm.py: 2 processes against 1 with 2 threads
    python benchmark/processes.py unchanged COMMIT    one process: to the bit what COMMIT computes, and as fast

Each writes its part of benchmark/results/processes.json. All on a CPU, by gloo.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results/processes.json"
sys.path[:0] = [str(ROOT), os.environ.get("TINY", str(ROOT / "tests"))]

# Whole runs in the tiny world of the tests: name: (script, data, judge, flags).
LEARN = ["--learning-rate=0.003"]
SELM = [*LEARN, "--iterations=3", "--num-prompts=42", "--alpha=0.1", "--save-every=4"]
XPO = ["--exploration=xpo", "--samples-per-prompt=1", "--num-prompts=42", "--max-steps=5", "--alpha=0.01"]
MD = [*LEARN, "--num-prompts=42", "--max-steps=5"]
AFD = ["--num-prompts=44", "--dev-prompts=5", "--reward-prompts=21", "--max-n=3", "--learning-rate=0.003"]
AFD += ["--min-demonstration-score=None", "--policy-learning-rate=0.003", "--reward-learning-rate=0.003"]
AFD += ["--epochs=1", "--policy-epochs=1", "--samples-per-prompt=3"]
ADVERSARIAL = [*AFD, "--policy-steps=3", "--replay=0.3"]
SPIN = ["--num-prompts=44", "--min-demonstration-score=None", "--learning-rate=0.003", "--epochs=1"]
SPIN += ["--policy-learning-rate=0.003", "--policy-epochs=1", "--iterations=2"]
GOOD, REWARD = "judges.py:more_good", "judges.py:goodness"
RUNS = {
    "selm": ("selm", "prompts", GOOD, SELM),
    "xpo": ("selm", "prompts", GOOD, [*LEARN, *XPO]),
    "ipo_md": ("ipo_md", "prompts", GOOD, [*MD, "--beta=0.3"]),
    "nash_md mixture": ("nash_md", "prompts", GOOD, [*MD, "--opponent=mixture", "--beta=0.3"]),
    "nash_md ema": ("nash_md", "prompts", GOOD, [*MD, "--opponent=ema", "--ema-decay=0.5"]),
    "nash_md self": ("nash_md", "prompts", GOOD, [*MD, "--opponent=self", "--samples-per-prompt=3"]),
    "afd irl": (
        "afd",
        "demonstrations",
        REWARD,
        [*AFD, "--reward=reward-model", "--pairs", "init-sft", "sft-demo"],
    ),
    "afd reverse-kl": ("afd", "demonstrations", REWARD, [*ADVERSARIAL, "--objective=reverse-kl"]),
    "spin": ("spin", "demonstrations", REWARD, SPIN),
}
WEIGHTS = {
    "all weights": [],
    "LoRA": ["--lora-rank=4"],
    "bfloat16 states": ["--optimizer-states=bfloat16"],
    "LoRA, bfloat16 states": ["--lora-rank=4", "--optimizer-states=bfloat16"],
}
# of the machine, not of the run
CLOCK = ("tokens_per_second", "padding_fraction")


def world(folder: Path) -> Path:
    """The tests' tiny model, data and judges, in `folder`."""
    import tiny

    tiny.folder(folder / "model")
    tiny.prompts_file(folder / "prompts.jsonl")
    tiny.prompts_file(folder / "demonstrations.jsonl", responses=True)
    tiny.judge_file(folder / "judges.py")
    return folder


def flags(world: Path, name: str, weights: str, runs: Path, run_name: str) -> tuple[str, list[str]]:
    """Script and flags of a run of `RUNS`."""
    script, data, judge, more = RUNS[name]
    common = [f"--model={world}/model", f"--dataset={world}/{data}.jsonl", f"--judge={world}/{judge}"]
    common += [
        "--eval-judge=None",
        "--device=cpu",
        "--dtype=float32",
        "--max-new-tokens=6",
        "--eval-prompts=7",
    ]
    # 8 pairs on 3 processes, and a last step of a few: no share is even, some are empty
    common += ["--batch-size=8", "--micro-batch-tokens=160", f"--run-dir={runs}", f"--run-name={run_name}"]
    return script, [*common, *more, *WEIGHTS[weights]]


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would put into the environment of process `rank` of `count`; none for one process."""
    more = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if count > 1:
        more |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        more |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **more}


def start(count: int, command: list[str], folder: Path, rooted: Path = ROOT) -> list[subprocess.Popen]:
    """`count` processes of one Python command, their output in `folder`."""
    port, started = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(count):
        files = [open(folder / f"{what}-{rank}.txt", "w") for what in ("out", "err")]
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=rooted,
                env=environment(rank, count, port),
                stdout=files[0],
                stderr=files[1],
            )
        )
    return started


def worker(file: Path) -> None:
    """A process that does many runs, one after the other: the scripts are imported once."""
    import torch

    from cleanalign import distributed
    from cleanalign.command_line import command_line

    torch.set_num_threads(1)
    plan = json.loads(file.read_text())
    codes = []
    for script, argv, port in plan:
        os.environ["MASTER_PORT"] = str(port)
        module = importlib.import_module(script)
        distributed.sent.clear()
        try:
            command_line(module.main, module.RECIPES, argv)
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
    sys.exit(max(codes))


def run_together(count: int, plan: list[tuple[str, list[str]]], folder: Path) -> None:
    """Do the runs of `plan`, (script, flags) each, on `count` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"plan-{count}.json"
    file.write_text(json.dumps([(script, argv, free_port()) for script, argv in plan]))
    processes = start(count, [__file__, "worker", str(file)], folder / f"output-{count}")
    codes = [process.wait() for process in processes]
    errors = [(folder / f"output-{count}/err-{rank}.txt").read_text()[-2000:] for rank in range(count)]
    assert not any(codes), f"{codes}\n" + "\n".join(errors)


def metrics_of(run: Path) -> list[dict]:
    """A run's metrics, without those of the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def difference(a: Path, b: Path) -> dict:
    """How far two runs' metrics are apart, relative above 1; whether their samples are the same."""
    rows_a, rows_b = metrics_of(a), metrics_of(b)
    assert [list(row) for row in rows_a] == [list(row) for row in rows_b], f"{a} {b}: other steps or metrics"
    greatest, where = 0.0, None
    for x, y in zip(rows_a, rows_b, strict=True):
        for name in x:
            apart = abs(x[name] - y[name]) / max(1.0, abs(x[name]))
            if not apart <= greatest:
                greatest, where = apart, f"{name}, step {x['step']}"
    same = (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    return {"steps": len(rows_a), "apart": greatest, "where": where, "same_samples": same}


def record(name: str, value) -> None:
    """Write one part of the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    results[name] = {"command": " ".join(sys.argv[1:]), "commit": commit, **value}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


# --- matrix ---------------------------------------------------------------------------------------


def matrix(names: list[str]) -> None:
    """Every run of `RUNS` with every way of training of `WEIGHTS`, on 1, 2 and 3 processes."""
    with tempfile.TemporaryDirectory() as scratch:
        here, table = world(Path(scratch)), {}
        cases = [(name, weights) for name in names or RUNS for weights in WEIGHTS]
        for count in (1, 2, 3):
            plan = [
                flags(here, name, w, here / f"runs-{count}", f"{name} {w}".replace(" ", "-"))
                for name, w in cases
            ]
            run_together(count, plan, here)
        for name, weights in cases:
            run = f"{name} {weights}".replace(" ", "-")
            for count in (2, 3):
                found = difference(here / "runs-1" / run, here / f"runs-{count}" / run)
                table[f"{name}, {weights}, {count} processes"] = found
                print(f"{name}, {weights}, {count} processes: {found}", flush=True)
    worst = max(found["apart"] for found in table.values())
    print(
        f"greatest difference {worst:.1e}, samples the same: {all(f['same_samples'] for f in table.values())}"
    )
    record("matrix", {"greatest_difference": worst, "runs": table})


COMMANDS = {"matrix": lambda rest: matrix(rest), "worker": lambda rest: worker(Path(rest[0]))}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](sys.argv[2:])
