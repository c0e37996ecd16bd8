"""Several processes (torchrun's environment, gloo): they compute what one computes, share memory and work,
and end together, whatever ends them. The larger matrix: benchmark/processes.py."""

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import processes  # noqa: E402

# What runs on how many processes: every script on 2, all that the optimiser does differently on 3.
CASES = [
    *((name, "all weights", 2) for name in processes.RUNS),
    ("selm", "LoRA", 2),
    ("spin", "bfloat16 states", 2),
    ("selm", "LoRA, bfloat16 states", 3),
    ("nash_md ema", "bfloat16 states", 3),
    ("afd reverse-kl", "all weights", 3),
]


@pytest.fixture(scope="module")
def nursery():
    """Where the processes of runs come from."""
    made = processes.Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the tiny world, and with the runs of this module."""
    return processes.world(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def by_one(nursery, here):
    """By name the folder of the run that one process makes, once."""
    made = {}

    def run(name: str, weights: str) -> Path:
        called = f"{name} {weights}".replace(" ", "-")
        if called not in made:
            script, argv = processes.flags(here, name, weights, here / "runs-1", called)
            nursery.run(1, script, argv, here / "output" / f"{called}-1")
            made[called] = here / "runs-1" / called
        return made[called]

    return run


@pytest.mark.parametrize("name,weights,count", CASES)
def test_they_compute_what_one_computes(nursery, here, by_one, name, weights, count):
    """No share is even, and some are empty: 42 prompts, 8 in a step, 7 to evaluate on."""
    one = by_one(name, weights)
    script, argv = processes.flags(here, name, weights, here / f"runs-{count}", one.name)
    nursery.run(count, script, argv, here / "output" / f"{one.name}-{count}")
    many = here / f"runs-{count}" / one.name
    found = processes.difference(one, many)
    assert found["steps"] >= 5 and found["same_samples"] and found["apart"] < 1e-5, found
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, many))
    assert a["win_rate"] == b["win_rate"] and a["kl"] == pytest.approx(b["kl"], abs=1e-4)
    assert b["processes"] == count and b["bytes_sent_by_first_process"]["gradients"] > 0
    # one voice: the others have said nothing
    for rank in range(1, count):
        for stream in ("out", "err"):
            assert (here / "output" / f"{one.name}-{count}" / f"{stream}-{rank}").read_text() == ""
    if script == "selm":
        assert {p.name for p in (many / "checkpoint").glob("*/state*.pt")} == {
            "state.pt",
            *(f"state-{rank}.pt" for rank in range(1, count)),
        }


def test_one_killed_ends_all_and_the_run_goes_on_with_any_number(nursery, here):
    script, argv = processes.flags(here, "selm", "all weights", here / "runs", "whole")
    nursery.run(2, script, [*argv, *processes.LONG], here / "output/whole")
    rows = processes.metrics_of(here / "runs/whole")
    for victim in (0, 1):
        name = f"killed-{victim}"
        script, argv = processes.flags(here, "selm", "all weights", here / "runs", name)
        pids = nursery.start([[script, *argv, *processes.LONG]] * 2, here / "output" / name)
        log, wanted = (
            here / "runs" / name / "metrics.jsonl",
            random.SystemRandom().randrange(1, len(rows) - 2),
        )
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= wanted):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(pids[victim], signal.SIGKILL)
        began = time.monotonic()
        codes = nursery.wait(pids, 60)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, codes
        assert time.monotonic() - began < 60
        error = (here / "output" / name / f"err-{1 - victim}").read_text()
        assert f"error: process {victim} of 2 (id {pids[victim]} on " in error
        assert "Traceback" not in error and "--resume" in error
        for found in processes.resumed(nursery, here, name, (1, 3)[victim : victim + 1]).values():
            assert found["steps"] == len(rows) and found["same_samples"] and found["apart"] < 1e-5, found


def test_a_signal_to_one_stops_all_after_the_same_step(nursery, here):
    script, argv = processes.flags(here, "selm", "all weights", here / "runs", "stopped")
    long = [*argv, "--epochs=40", "--save-every=0"]
    pids = nursery.start([[script, *long]] * 2, here / "output/stopped")
    log, deadline = here / "runs/stopped/metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(pids[1], signal.SIGTERM)
    assert nursery.wait(pids, 60) == [75, 75]
    said = "".join((here / f"output/stopped/err-{rank}").read_text() for rank in (0, 1))
    assert said.count("stopped by SIGTERM") == 1 and "Traceback" not in said
    assert len(list((here / "runs/stopped/checkpoint").glob("*-step-*"))) == 1


JUDGE = """
import os

def fails_on_one(prompts, a, b):
    if os.environ.get("RANK") == "1":
        raise ValueError("no answer")
    return [0.7 for _ in a]

def nan_on_one(prompts, a, b):
    return [float("nan") if os.environ.get("RANK") == "1" else 0.7 for _ in a]
"""


@pytest.mark.parametrize(
    "what,message",
    [
        ("a judge that raises on one", "ValueError: no answer"),
        ("a judge that answers NaN on one", "value 0 is nan"),
        ("a mistake of all", "--beta must be above 0, got -1"),
        ("other flags on one", "process 1 of 2 was given other arguments: --seed 5 (process 0: 1)"),
        ("a resumed folder on one", "process 1 of 2 was given other arguments: "),
        ("a resumed folder that one does not see", "no such run folder"),
        ("more processes than prompts", "2 processes and 1 training prompts"),
        ("a run folder that one does not see", "cannot be seen"),
        ("a GPU step that is not finite on one", "the loss is nan. Rows of this batch: prompts.jsonl:"),
    ],
)
def test_bad_input_is_one_message_and_code_2_everywhere(nursery, here, by_one, what, message):
    name = what.replace(" ", "-")
    (here / "one.py").write_text(JUDGE)
    script, argv = processes.flags(here, "selm", "all weights", here / "runs", name)
    first, second, env = list(argv), list(argv), {}
    if "judge" in what:
        function = "fails_on_one" if "raises" in what else "nan_on_one"
        first = second = [*argv, f"--judge={here}/one.py:{function}"]
    elif what == "a mistake of all":
        first = second = [*argv, "--beta=-1"]
    elif what == "other flags on one":
        second = [*argv, "--seed=5"]
    elif what == "a resumed folder on one":
        second = [f"--resume={by_one('selm', 'all weights')}"]
    elif what == "a resumed folder that one does not see":
        first, second = [f"--resume={by_one('selm', 'all weights')}"], [f"--resume={here}/nowhere"]
    elif what == "more processes than prompts":
        first = second = [*argv, "--num-prompts=1", "--iterations=1"]
    elif what == "a run folder that one does not see":
        env = {"BLIND": "1"}
    else:
        env = {"BROKEN": "1"}
    pids = nursery.start([[script, *first], [script, *second]], here / "output" / name, **env)
    codes = nursery.wait(pids, 60)
    said = [(here / "output" / name / f"err-{rank}").read_text() for rank in (0, 1)]
    assert codes == [2, 2], said
    text = "".join(said)
    assert text.count("error: ") == 1 and message in text and "Traceback" not in text, text
    if "judge" in what:
        assert "process 1 of 2" in text


def test_bytes_sent_are_those_of_the_formula(nursery):
    """Counted by the code and, over TCP, by the kernel; steps · (passes + 1) · weights · bytes · (W − 1) /
    W."""
    for count in (2, 3):
        found = processes.measure(nursery, "bytes", "float32", count)
        assert found["counted"] == pytest.approx(found["formula"], rel=0.05)
        assert found["on_the_wire"] == pytest.approx(found["formula"], rel=0.05)


def test_memory_of_a_process_falls_with_their_number(nursery):
    """Masters, moments and gradients, 16 bytes a weight, are shared: of 52 million weights 2 processes save
    420 MB each."""
    rows = [processes.measure(nursery, "memory", "float32", count) for count in (1, 2)]
    saved = rows[0]["peak_above_the_model"] - rows[1]["peak_above_the_model"]
    assert saved == pytest.approx(8 * rows[0]["weights"], rel=0.2)


def test_torchrun_itself(here):
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "selm.py", "--beta=-1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.stderr.count("error: --beta must be above 0") == 1
    assert done.stderr.count("exitcode  : 2") == 2


def test_shares_are_the_whole_batch_and_one_process_has_all_of_it(monkeypatch):
    import common
    from cleanalign import distributed

    prompts = [[1] * (1 + i % 4) for i in range(7)]
    completions = [[[1] * (1 + i % 3)] * (2 + i % 2) for i in range(7)]
    assert common.shares(prompts, completions, 12) == [common.micro_batches(prompts, completions, 12)]
    monkeypatch.setattr(distributed, "world", lambda: 9)
    shares = common.shares(prompts, completions, 12)
    assert sorted(i for parts in shares for part in parts for i in part) == list(range(7))
    assert len(shares) == 9 and shares[8] == []


@pytest.mark.parametrize("states", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_read_by_any_number_of_processes(monkeypatch, states, dtype):
    """The states of 3 processes, made by hand, are read by one, by 2 and by 4."""
    from cleanalign import distributed, optimization

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1)).to(dtype)

    def place(rank, count):
        monkeypatch.setattr(distributed._Place, "rank", rank)
        monkeypatch.setattr(distributed._Place, "world", count)

    monkeypatch.setattr(distributed, "spread", lambda weights: None)
    whole = model()
    optimiser = optimization.make_optimiser(whole, states, 0.0)
    for _ in range(3):
        whole(torch.ones(2, 5, dtype=dtype)).sum().backward()
        optimiser.step(0.01, 0.0)
    state = optimiser.state_dict()

    def shards_of(count):
        made = []
        for rank in range(count):
            place(rank, count)
            part = optimization.make_optimiser(model(), states, 0.0)
            part.load_state_dict([state])
            made.append(part.state_dict())
        place(0, 1)
        return made

    again = optimization.make_optimiser(model(), states, 0.0)
    again.load_state_dict(shards_of(3))
    restored = again.state_dict()
    assert flat(restored) and all(map(torch.equal, flat(restored), flat(state)))
    for count in (2, 4):
        for rank, expected in enumerate(shards_of(count)):
            shards = shards_of(3)
            place(rank, count)
            part = optimization.make_optimiser(model(), states, 0.0)
            part.load_state_dict(shards)
            assert all(map(torch.equal, flat(part.state_dict()), flat(expected)))
            place(0, 1)


def flat(value) -> list[torch.Tensor]:
    """Every tensor in nested lists and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inner for tensor in flat(one)]


def test_memory_is_foreseen_for_processes_that_are_not_there(monkeypatch, capsys):
    from running import start

    import selm
    from cleanalign import dry_run

    argv = ["--model=llama3-8b", "--lora-rank=0", "--dry-run", "--device=cpu", "--dtype=bfloat16"]
    start(selm, *argv, "--processes=8")
    text = capsys.readouterr().out
    assert "each of 8 processes" in text and "gradients on their way" in text
    args = {count: selm.RECIPES["llama3-8b"] for count in (1, 8)}
    args = {n: dry_run.replace(a, lora_rank=0, dtype="bfloat16", processes=n) for n, a in args.items()}
    needs = {n: dry_run.foreseen(a, torch.device("cpu")) for n, a in args.items()}
    for what in ("optimiser: master", "optimiser: moments", "optimiser: gradient"):
        assert needs[8][what] == needs[1][what] // 8
    assert needs[8]["policy's weights"] == needs[1]["policy's weights"]
    weights = needs[1]["policy's weights"] / 2**30
    assert 29.5 < weights + sum(v for k, v in needs[8].items() if k.startswith("optimiser")) / 2**30 < 31


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    import selm
    from cleanalign import dry_run, models
    from cleanalign.errors import UserError

    args = dry_run.replace(selm.RECIPES["llama3-8b"], lora_rank=0, exploration="xpo", dtype="bfloat16")
    monkeypatch.setattr(models, "free_memory", lambda device: 24 * 2**30)
    with pytest.raises(UserError, match=r"(?s)24.0 GiB free.*reference's weights.*14.96 GiB.*--lora-rank 32"):
        dry_run.require_room(args, torch.device("cpu"))
    dry_run.require_room(dry_run.replace(args, lora_rank=32), torch.device("cpu"))
