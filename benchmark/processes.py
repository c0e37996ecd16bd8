"""Several processes against one: what is equal, what falls, what it costs, what happens when one is killed.

    python benchmark/processes.py matrix [NAME …]     1, 2 and 3 processes: equal samples, metrics within 1e-5
    python benchmark/processes.py kills [COUNT]       kill -9 of one of 2 at random moments; resume
    python benchmark/processes.py memory              peak memory of a process against their number
    python benchmark/processes.py bytes               bytes on the wire, by the kernel, against the formula
    python benchmark/processes.py default [SEED …]    the default selm.py: 2 processes, or 1 with 2 threads
    python benchmark/processes.py unchanged COMMIT    one process: to the bit what COMMIT computes
    python benchmark/processes.py speed COMMIT [THREADS]    and as fast

Each writes its part of benchmark/results/processes.json. All on a CPU, by gloo.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import record
from record import ROOT

RESULTS = record.RESULTS / "processes.json"
sys.path.insert(0, str(ROOT / "tests"))

# Whole runs in the tiny world of the tests: name: (script, data, judge, flags).
LEARN = ["--learning-rate=0.0003"]
SELM = [*LEARN, "--iterations=3", "--num-prompts=42", "--alpha=0.1", "--save-every=4"]
XPO = ["--exploration=xpo", "--samples-per-prompt=1", "--num-prompts=42", "--max-steps=5", "--alpha=0.01"]
MD = [*LEARN, "--num-prompts=42", "--max-steps=5"]
AFD = ["--num-prompts=44", "--dev-prompts=5", "--reward-prompts=21", "--max-n=3", "--learning-rate=0.0003"]
AFD += ["--min-demonstration-score=None", "--policy-learning-rate=0.0003", "--reward-learning-rate=0.0003"]
AFD += ["--epochs=1", "--policy-epochs=1", "--samples-per-prompt=3"]
ADVERSARIAL = [*AFD, "--policy-steps=3", "--replay=0.3"]
SPIN = ["--num-prompts=44", "--min-demonstration-score=None", "--learning-rate=0.0003", "--epochs=1"]
SPIN += ["--policy-learning-rate=0.0003", "--policy-epochs=1", "--iterations=2"]
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
    "LoRA": ["--lora-rank=4", "--lora-alpha=4"],
    "bfloat16 states": ["--optimizer-states=bfloat16"],
    "LoRA, bfloat16 states": ["--lora-rank=4", "--lora-alpha=4", "--optimizer-states=bfloat16"],
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


class Nursery:
    """A process that has imported everything and forks the processes of runs: each then starts in no time."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        env |= {"TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "nursery"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=-1, stdout=-1)

    def ask(self, **request):
        """Have it do something; returns its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argvs: list[list[str]], folder: Path, **env) -> list[int]:
        """Process ids of a run's processes, one for each of `argvs` (script and flags), their output in
        `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        port, pids = free_port(), []
        for rank, argv in enumerate(argvs):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(argvs),
                "LOCAL_WORLD_SIZE": len(argvs),
            }
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place = place if len(argvs) > 1 else {}
            place = {key: str(value) for key, value in {**place, **env}.items() if value is not None}
            pids.append(
                self.ask(
                    argv=argv, env=place, out=str(folder / f"out-{rank}"), err=str(folder / f"err-{rank}")
                )
            )
        return pids

    def wait(self, pids: list[int], seconds: float = 600) -> list[int | None]:
        """Their exit codes (minus the signal that ended one), None for those still there after so long."""
        return self.ask(wait=pids, seconds=seconds)

    def run(self, count: int, script: str, argv: list[str], folder: Path) -> None:
        """A whole run on `count` processes, which must end well."""
        pids = self.start([[script, *argv]] * count, folder)
        codes = self.wait(pids)
        errors = "\n".join((folder / f"err-{rank}").read_text()[-2000:] for rank in range(count))
        assert codes == [0] * count, f"{script} {argv}: {codes}\n{errors}"

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def nursery() -> None:
    """The nursery's own side: fork what standard input asks for."""
    import matplotlib.pyplot
    import peft
    import torch
    from tensorboard.compat.proto import event_pb2  # noqa: F401

    assert matplotlib and peft
    torch.set_num_threads(1)
    for script in ("selm", "ipo_md", "nash_md", "afd", "spin"):
        importlib.import_module(script)
    over: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            deadline, left = time.monotonic() + request["seconds"], set(request["wait"])
            while (left := left - set(over)) and time.monotonic() < deadline:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid:
                    over[pid] = os.waitstatus_to_exitcode(status)
                else:
                    time.sleep(0.005)
            answer = [over.get(pid) for pid in request["wait"]]
        else:
            answer = os.fork()
            if answer == 0:
                born(**request)
        print(json.dumps(answer), flush=True)


def born(argv: list[str], env: dict, out: str, err: str) -> None:
    """What a forked process does, until it ends."""
    import selm
    from cleanalign.command_line import command_line
    from cleanalign.errors import require
    from cleanalign.run import Run

    os.environ.update(env)
    for descriptor, name in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    code, sys.argv = 0, [f"{argv[0]}.py", *argv[1:]]
    try:
        if env.get("BLIND") and env.get("RANK") == "1":  # a machine whose disk is not the others'
            Run._see_folder = lambda run: require(False, f"{run.folder} cannot be seen")
        if env.get("BROKEN") and env.get("RANK") == "1":
            whole = selm.selm_loss
            selm.selm_loss = lambda *args, **more: whole(*args, **more) * float("nan")
        if argv[0] == "measured":
            measured(*argv[1:])
        else:
            module = importlib.import_module(argv[0])
            command_line(module.main, module.RECIPES, argv[1:])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def write(part: str, value: dict) -> None:
    """Write one part of the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = {**record.origin(), **value}
    record.write(RESULTS, results)


# --- matrix ---------------------------------------------------------------------------------------


def matrix(names: list[str]) -> None:
    """Every run of `RUNS` with every way of training of `WEIGHTS`, on 1, 2 and 3 processes."""
    nursery, table = Nursery(), {}
    with tempfile.TemporaryDirectory() as scratch:
        here = world(Path(scratch))
        for name in names or RUNS:
            for weights in WEIGHTS:
                run = f"{name} {weights}".replace(" ", "-")
                for count in (1, 2, 3):
                    runs = here / f"runs-{count}"
                    nursery.run(
                        count, *flags(here, name, weights, runs, run), here / "output" / f"{run}-{count}"
                    )
                # a yardstick: one process whose sums are rounded otherwise, as its micro-batches are smaller
                script, argv = flags(here, name, weights, here / "runs-other", run)
                nursery.run(1, script, [*argv, "--micro-batch-tokens=90"], here / "output" / f"{run}-other")
                for count in (2, 3, "other"):
                    found = difference(here / "runs-1" / run, here / f"runs-{count}" / run)
                    what = "1 process, smaller micro-batches" if count == "other" else f"{count} processes"
                    table[f"{name}, {weights}, {what}"] = found
                    print(f"{name}, {weights}, {what}: {found}", flush=True)
    nursery.close()
    worst = max(found["apart"] for found in table.values())
    print(
        f"greatest difference {worst:.1e}, samples the same: {all(f['same_samples'] for f in table.values())}"
    )
    write("matrix", {"greatest_difference": worst, "runs": table})


# --- kills ----------------------------------------------------------------------------------------

LONG = ["--epochs=4", "--save-every=1"]  # of the run that is killed: a third of it is saving


def killed(nursery: Nursery, here: Path, name: str, after: float, victim: int) -> dict:
    """Start a run on 2 processes, kill -9 one of them so long after its folder appeared; how the other one
    ended."""
    script, argv = flags(here, "selm", "all weights", here / "runs", name)
    pids = nursery.start([[script, *argv, *LONG]] * 2, here / "output" / name)
    while not (here / "runs" / name / "args.json").exists():
        time.sleep(0.001)
    time.sleep(after)
    over = nursery.wait(pids[victim : victim + 1], 0) != [None]
    began = time.monotonic()
    if not over:
        os.kill(pids[victim], signal.SIGKILL)
    code = nursery.wait(pids, 120)[1 - victim]
    seconds = round(time.monotonic() - began, 2)
    over = over or (here / "runs" / name / "summary.json").exists()  # at its very end: nothing to resume
    last = (here / "output" / name / f"err-{1 - victim}").read_text().splitlines()
    last = [line for line in last if line.startswith("error: ")] or [""]
    found = {
        "victim": victim,
        "after": round(after, 3),
        "over": over,
        "code": code,
        "message": last[-1][:200],
    }
    found["saved"] = sorted(p.name for p in (here / "runs" / name / "checkpoint").glob("*-step-*"))
    found["within_a_save"] = (here / "runs" / name / "checkpoint/.new").exists()
    return {**found, "seconds_until_all_ended": seconds}


def resumed(nursery: Nursery, here: Path, name: str, counts: tuple[int, ...] = (1, 3)) -> dict:
    """Resume copies of a killed run with so many processes; how far they end from the whole run."""
    found = {}
    for count in counts:
        copy = here / f"runs-{count}" / name
        shutil.copytree(here / "runs" / name, copy)
        nursery.run(count, "selm", [f"--resume={copy}"], here / "output" / f"{name}-{count}")
        found[f"resumed with {count}"] = difference(here / "runs/whole", copy)
    return found


def kills(count: int) -> None:
    """kill -9 of one of 2 processes at `count` random moments of a run, then --resume with 1 and with 3."""
    rng, nursery, table = random.Random(16), Nursery(), []
    with tempfile.TemporaryDirectory() as scratch:
        here = world(Path(scratch))
        script, argv = flags(here, "selm", "all weights", here / "runs", "whole")
        nursery.run(2, script, [*argv, *LONG], here / "output/whole")
        span = json.loads((here / "runs/whole/summary.json").read_text())["seconds"]
        for attempt in itertools.count():
            found = killed(nursery, here, f"killed-{attempt}", rng.uniform(0, span), rng.randrange(2))
            if not found.pop("over"):
                table.append({**found, **resumed(nursery, here, f"killed-{attempt}")})
                print(table[-1], flush=True)
            if len(table) == count:
                break
    nursery.close()
    worst = max(found[f"resumed with {many}"]["apart"] for found in table for many in (1, 3))
    slowest = max(found["seconds_until_all_ended"] for found in table)
    print(f"{count} kills: greatest difference after resuming {worst:.1e}; all ended within {slowest} s")
    write("kills", {"greatest_difference": worst, "slowest_end_seconds": slowest, "kills": table})


# --- memory and bytes -------------------------------------------------------------------------------


def llama(width: int, layers: int, vocabulary: int, dtype):
    """A Llama with random weights, the same in every process."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def train_a_little(model, states: str, steps: int, passes: int) -> None:
    """`steps` optimiser steps on random replies, in `passes` passes a process."""
    import common
    from cleanalign import distributed
    from cleanalign.optimization import make_optimiser

    prompts = [[5, 6, 7]] * (passes * distributed.world())
    completions = [[[8, 9, 10, 11]]] * len(prompts)
    optimiser = make_optimiser(model.requires_grad_(True), states, 0.0)
    for _ in range(steps):
        for part in optimiser.passes(common.shares(prompts, completions, 1)):
            data = common.collate([prompts[i] for i in part], [completions[i] for i in part], "cpu")
            (-common.completion_logprobs(model, data).sum() / len(prompts)).backward()
        optimiser.step(1e-4, 1.0)


def measured(kind: str, states: str) -> None:
    """A process of `memory` or `bytes`; the first prints what it measured as JSON."""
    import torch

    from cleanalign import distributed
    from cleanalign.phases import peak_memory, reset_peak_memory

    torch.set_num_threads(1)
    distributed.join()
    size = (512, 12, 4096, torch.bfloat16) if kind == "memory" else (64, 4, 512, torch.float32)
    model = llama(*size)
    weights = sum(p.numel() for p in model.parameters())
    steps, passes = (1, 2) if kind == "memory" else (3, 2)
    train_a_little(llama(16, 1, 64, size[3]), states, 1, 1)  # connections, threads, kernels
    reset_peak_memory()
    before, wire = peak_memory(), bytes_on_the_wire()
    distributed.sent.clear()
    train_a_little(model, states, steps, passes)
    count = distributed.world()
    found = {
        "processes": count,
        "weights": weights,
        "peak_above_the_model": peak_memory() - before,
        "counted": sum(distributed.sent[name] for name in ("gradients", "weights")),
        "on_the_wire": bytes_on_the_wire() - wire,
        "formula": steps * (passes + 1) * weights * size[3].itemsize * (count - 1) // count,
    }
    if distributed.rank() == 0:
        print(json.dumps(found))
    distributed.leave()


def bytes_on_the_wire() -> int:
    """Bytes that this process has sent over TCP, as the kernel counts them (tcpi_bytes_sent of every open
    socket)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 200)[0] if len(info) >= 208 else 0
        except OSError:
            continue
    return total


def measure(nursery: Nursery, kind: str, states: str, count: int) -> dict:
    """What the first of `count` processes measures."""
    with tempfile.TemporaryDirectory() as scratch:
        nursery.run(count, "measured", [kind, states], Path(scratch))
        return json.loads((Path(scratch) / "out-0").read_text().splitlines()[-1])


def memory() -> None:
    """Peak memory of a process above its model, 1, 2 and 4 processes, both optimiser states."""
    table, nursery = {}, Nursery()
    for states, each in (("float32", 16), ("bfloat16", 10)):
        rows = [measure(nursery, "memory", states, count) for count in (1, 2, 4)]
        for row in rows:
            kept = {key: row[key] for key in ("processes", "weights", "peak_above_the_model")}
            kept["formula"] = each * row["weights"] // row["processes"]
            kept["fallen_by"] = rows[0]["peak_above_the_model"] - row["peak_above_the_model"]
            kept["fallen_by_formula"] = each * row["weights"] - kept["formula"]
            table[f"{states} states, {row['processes']} processes"] = kept
            print(states, kept, flush=True)
    write("memory", {"dtype": "bfloat16", "runs": table})


def count_bytes() -> None:
    """Bytes that a process sends while it trains: counted here, counted by the kernel, by the formula."""
    nursery = Nursery()
    rows = [measure(nursery, "bytes", "float32", count) for count in (2, 3)]
    for row in rows:
        print(row)
    write("bytes", {"runs": rows})


# --- the default run, and one process as before --------------------------------------------------------


def timed(command: list[str], rooted: Path, threads: int) -> float:
    """Seconds of a command in a tree of this project."""
    more = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(rooted)}
    began = time.monotonic()
    subprocess.run(command, cwd=rooted, env={**os.environ, **more}, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def default(*seeds: str) -> None:
    """The default selm.py on 2 processes of one thread, and on one process of two threads."""
    table = {}
    several = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2"]
    starts = (("2 processes", several, 1), ("1 process", [sys.executable], 2))
    with tempfile.TemporaryDirectory() as scratch:
        for seed, (name, start_by, threads) in itertools.product(seeds or ("1",), starts):
            run = f"{threads}-{seed}"
            command = [*start_by, "selm.py", f"--run-dir={scratch}", f"--run-name={run}", f"--seed={seed}"]
            seconds = timed(command, ROOT, threads)
            summary = json.loads((Path(scratch) / f"{run}/summary.json").read_text())
            keys = ("win_rate", "win_rate_interval", "seconds", "phase_seconds", "peak_memory_bytes", "kl")
            row = {"wall_seconds": round(seconds, 1), **{key: summary[key] for key in keys}}
            row["bytes_sent"] = summary.get("bytes_sent_by_first_process")
            table.setdefault(f"seed {seed}", {})[name] = row
            print(seed, name, row, flush=True)
    write("default", {"runs": table})


@contextlib.contextmanager
def tree_of(commit: str):
    """Context with the project as `commit` has it, in a folder, beside a tiny world: (folder, world)."""
    with tempfile.TemporaryDirectory() as scratch:
        here, before = world(Path(scratch)), Path(scratch) / "before"
        before.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", str(before)], input=archive.stdout, check=True)
        yield before, here


def unchanged(commit: str) -> None:
    """One process: whole runs to the bit as `commit` has them."""
    same, nursery = {}, Nursery()
    cases = [
        *((name, "all weights") for name in RUNS),
        *(("nash_md ema", weights) for weights in list(WEIGHTS)[1:]),
    ]
    with tree_of(commit) as (before, here):
        for name, weights in cases:
            run = f"{name} {weights}".replace(" ", "-")
            script, argv = flags(here, name, weights, here / "runs-before", run)
            timed([sys.executable, f"{script}.py", *argv], before, 1)
            nursery.run(1, *flags(here, name, weights, here / "runs", run), here / "output" / run)
            same[f"{name}, {weights}"] = unlike(here / "runs-before" / run, here / "runs" / run)
            print(name, weights, same[f"{name}, {weights}"] or "the same", flush=True)
    nursery.close()
    write("unchanged", {"against": commit, "not_the_same": same})


def speed(commit: str, threads: int = 2) -> None:
    """One process: seconds of some steps of the default run, `commit` and now in turn."""
    seconds: dict[str, list] = {"before": [], "now": []}
    few = ["--max-steps=6", "--num-prompts=48", "--eval-prompts=16"]
    with tree_of(commit) as (before, here):
        for turn in range(3):
            for when, tree in (("before", before), ("now", ROOT)):
                command = [sys.executable, "selm.py", *few, f"--run-dir={here}", f"--run-name={when}-{turn}"]
                timed(command, tree, threads)
                summary = json.loads((here / f"{when}-{turn}/summary.json").read_text())
                seconds[when].append(summary["seconds"])
    ratio = min(seconds["before"]) / min(seconds["now"])
    print(f"speed now over before: {ratio:.3f} {seconds}")
    write("speed", {"against": commit, "seconds": seconds, "ratio_of_the_least": ratio})


def unlike(a: Path, b: Path) -> list[str]:
    """What two runs do not have in common to the bit: names of metrics, of files."""
    rows = zip(metrics_of(a), metrics_of(b), strict=True)
    names = {name for x, y in rows for name in {*x, *y} if x.get(name) != y.get(name)}
    for file in ("samples.jsonl", "model/model.safetensors"):
        if (a / file).read_bytes() != (b / file).read_bytes():
            names.add(file)
    return sorted(names)


COMMANDS = {
    "matrix": lambda rest: matrix(rest),
    "kills": lambda rest: kills(int(rest[0]) if rest else 20),
    "memory": lambda rest: memory(),
    "bytes": lambda rest: count_bytes(),
    "default": lambda rest: default(*rest),
    "unchanged": lambda rest: unchanged(rest[0]),
    "speed": lambda rest: speed(rest[0], *map(int, rest[1:])),
    "nursery": lambda rest: nursery(),
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](sys.argv[2:])
