"""Runs that survive: kills, failing disks, broken inputs, signals, double starts; and what saving costs.

    python benchmark/survive.py                     # all of it
    python benchmark/survive.py --parts kills --count 10

Whole runs of every script on a tiny random model, each in a process of its own, forked from one that has
imported everything. Times are in the results for orientation; what counts is that nothing was lost. Results
are merged into benchmark/results/survive.json, a part at a time.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs are forked here: a pool of threads that loads weights finds torch's own threads gone in the new process.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

import matplotlib.pyplot  # noqa: F401  imported once here, so that no forked run spends its time on it
import peft  # noqa: F401
import record
import torch
import tyro
from tensorboard.compat.proto import event_pb2  # noqa: F401
from tqdm import tqdm

sys.path.insert(0, str(record.ROOT / "tests"))

import tiny

import afd
import ipo_md
import nash_md
import selm
import spin
from cleanalign.checkpoint import Checkpoints, read
from cleanalign.command_line import command_line
from cleanalign.signals import STOPPED

tqdm.set_lock(threading.RLock())  # not the one that processes share: a killed one would keep it
PARTS = ("kills", "writes", "fuzz", "signals", "starts", "saving")
COUNTS = {"kills": 100, "writes": 200, "fuzz": 1000, "signals": 20, "starts": 50, "saving": 1}

SHORT = ["--num-prompts=32", "--max-steps=6", "--save-every=1"]
DEMONSTRATIONS = [
    "--dataset=demonstrations.jsonl",
    "--min-demonstration-score=None",
    "--num-prompts=24",
    "--judge=judges.py:goodness",
    "--learning-rate=1e-3",
    "--save-every=1",
    "--max-steps=3",
]
AFD = [*DEMONSTRATIONS, "--dev-prompts=8", "--reward-prompts=12", "--max-n=3", "--samples-per-prompt=3"]
RUNS = {  # name: (script, flags)
    "selm": (selm, SHORT),
    "selm-xpo": (selm, [*SHORT, "--exploration=xpo"]),
    "ipo": (ipo_md, SHORT),
    "ipo-lora": (ipo_md, [*SHORT, "--lora-rank=4"]),
    "nash-ema": (nash_md, [*SHORT, "--opponent=ema"]),
    "nash-bfloat16": (nash_md, [*SHORT, "--dtype=bfloat16", "--optimizer-states=bfloat16"]),
    "nash-background": (nash_md, [*SHORT, "--save-async=on"]),
    "afd-irl": (afd, [*AFD, "--pairs", "init-sft", "preference"]),
    "afd-js": (afd, [*AFD, "--objective=js", "--replay=.5"]),
    "spin": (spin, DEMONSTRATIONS),
}
COMMON = [
    "--model=model",
    "--dataset=prompts.jsonl",
    "--judge=judges.py:more_good",
    "--eval-judge=None",
    "--device=cpu",
    "--dtype=float32",
    "--max-new-tokens=6",
    "--eval-prompts=8",
    "--batch-size=8",
    "--micro-batch-tokens=4096",
]


# --- one run in a process of its own ---


@dataclass
class Child:
    """A run in a forked process; its output goes to a file."""

    pid: int
    output: Path
    started: float

    def wait(self, seconds: float = 120.0) -> int | None:
        """Its exit code (minus the signal that ended it), or None where it was still there and had to be
        killed."""
        while time.perf_counter() - self.started < seconds:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return None

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace")


def launch(world: Path, script, flags: list[str], prepare=None) -> Child:
    """Start `script` in `world` with `flags`; `prepare()` is called in the new process before."""
    output = world / f".output-{random.getrandbits(48):x}"
    output.touch()
    started = time.perf_counter()
    pid = os.fork()
    if pid:
        return Child(pid, output, started)
    code = 1
    try:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(world)
        tqdm.set_lock(threading.RLock())
        sys.argv = [f"{script.__name__}.py", *flags]
        if prepare:
            prepare()
        command_line(script.main, script.RECIPES, flags)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def make_world(root: Path) -> Path:
    """Tiny model, prompts, demonstrations and judges."""
    root.mkdir(parents=True)
    tiny.folder(root / "model")
    tiny.prompts_file(root / "prompts.jsonl", rows=60)
    tiny.prompts_file(root / "pairs.jsonl", rows=60, pairs=True)
    tiny.prompts_file(root / "demonstrations.jsonl", rows=60, responses=True)
    tiny.judge_file(root / "judges.py")
    return root


def outcome(folder: Path) -> dict:
    """What must not depend on how often a run was interrupted: metrics, samples, weights, summary."""
    clock = ("tokens_per_second", "seconds", "phase_", "peak_memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(clock)} for row in lines]
    summary = json.loads((folder / "summary.json").read_text())
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    kept = {k: v for k, v in summary.items() if not k.startswith(clock)}
    samples = (folder / "samples.jsonl").read_text()
    return {"metrics": rows, "summary": kept, "samples": samples, "weights": weights}


def uninterrupted(world: Path, name: str) -> tuple[dict, float]:
    """Outcome and seconds of the run `name`, left alone."""
    script, flags = RUNS[name]
    child = launch(world, script, [*COMMON, *flags, "--run-dir=whole", f"--run-name={name}"])
    code = child.wait()
    seconds = time.perf_counter() - child.started
    if code != 0:
        sys.exit(f"the uninterrupted run {name} ended with {code}:\n{child.text()}")
    return outcome(world / "whole" / name), seconds


def resume(world: Path, name: str, run_name: str) -> tuple[int | None, str]:
    """Go on with a run until its end, by the command that a job script would hold."""
    script, flags = RUNS[name]
    again = [f"--run-dir={world / 'runs'}", f"--run-name={run_name}", "--resume=auto"]
    child = launch(world, script, [*COMMON, *flags, *again])
    return child.wait(), child.text()


def verdict(world: Path, name: str, run_name: str, whole: dict) -> str:
    """'same', or what a resumed run ended with instead of the uninterrupted one's outcome."""
    code, text = resume(world, name, run_name)
    if code != 0:
        return f"resumed run ended with {code}: {text[-600:]}"
    differ = [key for key, value in outcome(world / "runs" / run_name).items() if value != whole[key]]
    return f"{', '.join(differ)} differ" if differ else "same"


# --- the parts ---


def kills(world: Path, count: int) -> dict:
    """`kill -9` at uniformly random moments of whole runs, each resumed to its end."""
    draw, wrong, during = random.Random(0), [], {}
    whole = {name: uninterrupted(world, name) for name in RUNS}
    for i in tqdm(range(count), desc="kills"):
        name = list(RUNS)[i % len(RUNS)]
        script, flags = RUNS[name]
        run_name = f"{name}-killed-{i}"
        child = launch(
            world, script, [*COMMON, *flags, f"--run-dir={world / 'runs'}", f"--run-name={run_name}"]
        )
        time.sleep(draw.uniform(0, whole[name][1]))
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        state = stage_of(world / "runs" / run_name)
        during[state] = during.get(state, 0) + 1
        result = verdict(world, name, run_name, whole[name][0])
        if result != "same":
            wrong.append(f"{run_name} (killed {state}): {result}")
        shutil.rmtree(world / "runs" / run_name, ignore_errors=True)
    return {"kills": count, "same_as_uninterrupted": count - len(wrong), "wrong": wrong, "killed": during}


def stage_of(folder: Path) -> str:
    """Where a killed run stood, by what it left."""
    if not folder.exists():
        return "before its folder was there"
    if (folder / "summary.json").exists():
        return "after its end"
    if (folder / "checkpoint" / ".new").exists():
        return "inside a checkpoint's write"
    if (folder / ".model.new").exists():
        return "while the model was saved"
    if (folder / "model").exists():
        return "in the evaluation"
    return "while training" if (folder / "metrics.jsonl").exists() else "before its first step"


def writes(world: Path, count: int) -> dict:
    """Writes that fail at a random one of a run's calls: for good (a full disk, no rights) or once (an I/O
    error)."""
    library = Path(tempfile.gettempdir()) / f"faults-{os.getuid()}.so"
    source = Path(__file__).with_name("faults.c")
    if os.environ.get("LD_PRELOAD") != str(library):  # begin again with the shim under Python
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(library)})
    shim = ctypes.CDLL(str(library))
    draw, wrong, ended = random.Random(0), [], {}
    whole, calls = {}, {}
    for name in RUNS:
        whole[name], _ = uninterrupted(world, name)
        calls[name] = count_writes(world, name, shim)
    for i in tqdm(range(count), desc="writes"):
        name = list(RUNS)[i % len(RUNS)]
        script, flags = RUNS[name]
        run_name = f"{name}-refused-{i}"
        kind, once = draw.choice([("ENOSPC", 0), ("EACCES", 0), ("EIO", 1), ("ENOSPC", 1)])
        at = draw.randrange(1, calls[name] + 1)
        under = str(world / "runs").encode()

        def arm(under=under, at=at, kind=kind, once=once):
            shim.faults_arm(under, at, getattr(errno, kind), once)

        child = launch(
            world, script, [*COMMON, *flags, f"--run-dir={world / 'runs'}", f"--run-name={run_name}"], arm
        )
        code, text = child.wait(), child.text()
        how = {0: "finished", 2: "ended with a message"}.get(code, f"exit code {code}")
        ended[how] = ended.get(how, 0) + 1
        problems = [] if code in (0, 2) else [how]
        if "Traceback" in text:
            problems.append("traceback")
        problems += damaged_checkpoints(world / "runs" / run_name)
        result = verdict(world, name, run_name, whole[name]) if code != 0 else "same"
        if result != "same":
            problems.append(result)
        if problems:
            wrong.append(
                f"{run_name}: {kind} at call {at} of {calls[name]}: {'; '.join(problems)}: {text[-500:]}"
            )
        shutil.rmtree(world / "runs" / run_name, ignore_errors=True)
    return {
        "failures": count,
        "write_calls_of_a_run": calls,
        "ended": ended,
        "tracebacks": sum("traceback" in text for text in wrong),
        "lost_checkpoints": sum("damaged" in text for text in wrong),
        "resumed_like_uninterrupted": count - len(wrong),
        "wrong": wrong,
    }


def count_writes(world: Path, name: str, shim) -> int:
    """How many write-like calls a whole run makes under its run folder."""
    script, flags = RUNS[name]
    told = world / "calls"

    def arm():
        shim.faults_arm(str(world / "runs").encode(), 0, 0, 0)
        plain_exit = os._exit

        def tell(code):
            told.write_text(str(shim.faults_count()))
            plain_exit(code)

        os._exit = tell

    flags = [*COMMON, *flags, f"--run-dir={world / 'runs'}", f"--run-name={name}-counted"]
    launch(world, script, flags, arm).wait()
    return int(told.read_text())


def damaged_checkpoints(folder: Path) -> list[str]:
    """A run's checkpoints that are not whole, each as a sentence."""
    problems = []
    for _, path in Checkpoints(folder / "checkpoint", 2, False).found():
        try:
            read(path)
        except Exception as error:
            problems.append(f"damaged checkpoint {path.name}: {error}")
    return problems


def signals(world: Path, count: int) -> dict:
    """SIGTERM (and now and then SIGUSR1 or Ctrl-C) at random moments; how long until the end; resumed
    exactly?"""
    draw, wrong, seconds, codes = random.Random(0), [], [], {}
    whole = {name: uninterrupted(world, name) for name in RUNS}
    for i in tqdm(range(count), desc="signals"):
        name = list(RUNS)[i % len(RUNS)]
        script, flags = RUNS[name]
        run_name = f"{name}-stopped-{i}"
        flags = ["--save-every=0" if flag.startswith("--save-every") else flag for flag in flags]
        number = draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        child = launch(
            world, script, [*COMMON, *flags, f"--run-dir={world / 'runs'}", f"--run-name={run_name}"]
        )
        time.sleep(draw.uniform(0.2, 1.0) * whole[name][1])
        sent = time.perf_counter()
        try:
            os.kill(child.pid, number)
            code = child.wait()
        except ProcessLookupError:
            code = child.wait()
        seconds.append(time.perf_counter() - sent)
        codes[str(code)] = codes.get(str(code), 0) + 1
        expected = (0, 130 if number == signal.SIGINT else STOPPED)
        result = (
            verdict_with(world, name, run_name, flags, whole[name][0]) if code in expected else f"code {code}"
        )
        if result != "same":
            wrong.append(f"{run_name}, {signal.Signals(number).name}: {result}: {child.text()[-400:]}")
        shutil.rmtree(world / "runs" / run_name, ignore_errors=True)
    ordered = sorted(seconds)
    return {
        "signals": count,
        "resumed_like_uninterrupted": count - len(wrong),
        "exit_codes": codes,
        "seconds_until_the_end": {"median": ordered[count // 2], "greatest": ordered[-1]},
        "seconds_of_a_whole_run": {name: round(value, 2) for name, (_, value) in whole.items()},
        "wrong": wrong,
    }


def verdict_with(world: Path, name: str, run_name: str, flags: list[str], whole: dict) -> str:
    """`verdict` of a run that had other `flags` than `RUNS` says."""
    script, own = RUNS[name]
    RUNS[name] = (script, flags)
    try:
        return verdict(world, name, run_name, whole)
    finally:
        RUNS[name] = (script, own)


def starts(world: Path, count: int) -> dict:
    """Two processes on one folder at once, half of them to start it, half to resume it: exactly one goes
    on."""
    wrong = []
    script, flags = RUNS["ipo"]
    whole, _ = uninterrupted(world, "ipo")
    for i in tqdm(range(count), desc="starts"):
        run_name = f"twice-{i}"
        command = [*COMMON, *flags, f"--run-dir={world / 'runs'}", f"--run-name={run_name}"]
        if i % 2:  # a run that was killed, and is then resumed twice
            child = launch(world, script, command)
            log = world / "runs" / run_name / "metrics.jsonl"
            while not log.exists() and time.perf_counter() - child.started < 60:
                time.sleep(0.002)
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            command.append("--resume=auto")
        pair = [launch(world, script, command) for _ in range(2)]
        codes = sorted(child.wait() for child in pair)
        same = codes == [0, 2] and outcome(world / "runs" / run_name) == whole
        if not same or any("Traceback" in child.text() for child in pair):
            wrong.append(f"{run_name}: {codes}: {pair[0].text()[-300:]} | {pair[1].text()[-300:]}")
        shutil.rmtree(world / "runs" / run_name, ignore_errors=True)
    return {"starts": count, "exactly_one_went_on": count - len(wrong), "wrong": wrong}


BEFORE = (
    "f3ad48f"  # the last commit whose checkpoints had no checksum and whose model was saved at the very end
)
TIMED = """
import sys, time, experiment, selm
save, spent = experiment.Run.save, []
def timed(run, state):
    start = time.perf_counter()
    save(run, state)
    spent.append(time.perf_counter() - start)
experiment.Run.save = timed
experiment.command_line(selm.main, selm.RECIPES, sys.argv[1:])
print("seconds of saving", sum(spent))
"""


def saving(world: Path, count: int) -> dict:
    """Share of a default run's seconds that go into saving, before and now: side by side, one thread each."""
    del count
    checkout = world / "before"
    subprocess.run(["git", "worktree", "add", "--detach", checkout, BEFORE], cwd=record.ROOT, check=True)
    try:
        flags = [f"--run-dir={world}", "--run-name=run-before"]
        before = subprocess.Popen(
            [sys.executable, "-c", TIMED, *flags],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            text=True,
        )
        command = [sys.executable, "selm.py", f"--run-dir={world}", "--run-name=now"]
        subprocess.run(command, cwd=record.ROOT, check=True)
        told = before.communicate()[0]
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=record.ROOT, check=True)
    summary = json.loads((world / "now" / "summary.json").read_text())
    return {
        f"before ({BEFORE})": share(world / "run-before", float(told.split()[-1])),
        "now": share(world / "now", summary["phase_seconds"]["saving"]),
    }


def share(folder: Path, spent: float) -> dict:
    """A run's seconds, those of them spent in saving, and its peak memory."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "seconds": summary["seconds"],
        "saving": round(spent, 2),
        "share": round(spent / summary["seconds"], 4),
        "peak_memory_gb": round(summary["peak_memory_bytes"] / 1e9, 2),
    }


# --- broken inputs ---


def fuzz(world: Path, count: int) -> dict:
    """Broken and hostile inputs: never a traceback, never a hang above 60 s, never a file changed that is not
    the run's."""
    import survive_fuzz

    return survive_fuzz.fuzz(world, count, launch, COMMON, ipo_md)


def table(results: dict) -> str:
    """The results as docs/runs.md shows them."""
    rows = ["| what | tried | came through | besides |", "|---|---|---|---|"]
    if found := results.get("kills"):
        where = ", ".join(f"{count} {place}" for place, count in sorted(found["killed"].items()))
        rows.append(
            f"| `kill -9` at a random moment, resumed | {found['kills']} | {found['same_as_uninterrupted']} "
            f"| {where} |"
        )
    if found := results.get("writes"):
        rows.append(
            f"| a failing write (ENOSPC, EACCES, EIO), resumed | {found['failures']} | "
            f"{found['resumed_like_uninterrupted']} "
            f"| {found['tracebacks']} tracebacks, {found['lost_checkpoints']} lost checkpoints |"
        )
    if found := results.get("signals"):
        seconds = found["seconds_until_the_end"]
        rows.append(
            f"| SIGTERM, SIGUSR1 or Ctrl-C, resumed | {found['signals']} | "
            f"{found['resumed_like_uninterrupted']} "
            f"| ended after {seconds['median']:.2f} s (median), {seconds['greatest']:.2f} s at most |"
        )
    if found := results.get("starts"):
        rows.append(
            f"| two processes on one folder: one goes on | {found['starts']} "
            f"| {found['exactly_one_went_on']} | |"
        )
    if found := results.get("fuzz"):
        rows.append(
            f"| broken and hostile inputs | {found['inputs']} | {found['inputs'] - len(found['wrong'])} | "
            f"{found['tracebacks']} "
            f"tracebacks, {found['hangs']} hangs, {found['foreign_files_changed']} foreign files changed; "
            "the slowest took "
            f"{found['slowest_seconds']} s |"
        )
    for name, found in results.get("saving", {}).items():
        if isinstance(found, dict) and "share" in found:
            rows.append(
                f"| default `selm.py`: saving, {name} | {found['seconds']} s | {found['share']:.1%} "
                f"| {found['peak_memory_gb']} GB |"
            )
    return "\n".join(rows)


def main(
    parts: tuple[Literal["kills", "writes", "fuzz", "signals", "starts", "saving"], ...] = PARTS,
    count: int | None = None,
    out: Path = record.RESULTS / "survive.json",
) -> None:
    """Run the parts and merge what they found into `out`.

    Args:
        parts: which of them.
        count: kills, failures, inputs, … of each part; the default is what docs/runs.md shows.
        out: the file of results.
    """
    torch.set_num_threads(1)
    failed = False
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            world = make_world(Path(folder).resolve() / "world")
            found = globals()[part](world, count or COUNTS[part])
            found["seconds"] = round(time.perf_counter() - began, 1)
        kept = json.loads(out.read_text()) if out.exists() else {}
        kept[part] = {**record.origin(), **record.portable(found)}
        record.write(out, kept)
        failed |= bool(found.get("wrong"))
        print(json.dumps({part: {k: v for k, v in found.items() if k != "wrong"}}, indent=1))
        print(*found.get("wrong", [])[:5], sep="\n")
        print(table(kept))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    tyro.cli(main)
