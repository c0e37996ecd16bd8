"""Running the scripts in the tiny world."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import experiment
from cleanalign.command_line import command_line
from judges import load_judge

ROOT = Path(__file__).parent.parent


def start(script, *argv):
    """Run `script` (the module) in this process; a user's mistake raises SystemExit."""
    command_line(script.main, script.RECIPES, [str(a) for a in argv])


def metrics_of(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without the figures that depend on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("tokens_per_second")} for row in rows]


def summary_of(folder: Path) -> dict:
    """A run's summary.json."""
    return json.loads((folder / "summary.json").read_text())


def resumed_equals_uninterrupted(script, flags, tmp_path, figures=("win_rate", "kl")) -> None:
    """Run whole; run again and kill -9 at a random step; resume; assert equal metrics and `figures`."""
    start(script, *flags, "--run-name=whole")
    whole = metrics_of(tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, f"{script.__name__}.py", *flags, "--run-name=killed"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as conftest.py: sums of two threads are other sums
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.time() + 120
    wait_for = random.SystemRandom().randrange(1, len(whole) - 2)
    while not (log.exists() and len(log.read_text().splitlines()) >= wait_for):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    start(script, f"--resume={tmp_path}/killed")
    assert metrics_of(tmp_path / "killed") == whole
    before, after = summary_of(tmp_path / "whole"), summary_of(tmp_path / "killed")
    assert [before[name] for name in figures] == [after[name] for name in figures]


def sealed_passes(script, flags, monkeypatch) -> int:
    """Run `script` and ask its judge wherever hidden states are computed with a gradient, which must be an
    error; returns how often that was."""
    passes = []
    judge = load_judge(next(f for f in flags if f.startswith("--judge")).partition("=")[2])
    monkeypatch.setattr(experiment, "load_judge", lambda *_: judge)
    plain = common.completion_hidden

    def nosy(model, batch):
        if torch.is_grad_enabled():
            with pytest.raises(AssertionError, match="training path"):
                judge.score(["a"], ["good"])
            passes.append(1)
        return plain(model, batch)

    monkeypatch.setattr(common, "completion_hidden", nosy)
    start(script, *flags, "--run-name=x")
    return len(passes)
