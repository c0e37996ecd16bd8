"""Nothing that was trained is lost: checkpoints, locks, signals, failing disks and judges, hostile
folders."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, metrics_of, start, summary_of

import experiment
import ipo_md
import nash_md
import spin
from cleanalign import storage
from cleanalign.checkpoint import Checkpoints, read
from cleanalign.errors import JudgeFailure, UserError
from cleanalign.lock import Lock
from cleanalign.run import Run
from cleanalign.signals import STOPPED, signals
from judges import load_judge

SHORT = ["--num-prompts=32", "--max-steps=4", "--save-every=2"]


@pytest.mark.parametrize(
    "part,count", [("kills", 10), ("writes", 10), ("signals", 5), ("starts", 4), ("fuzz", 60)]
)
def test_survives(part, count, tmp_path):
    """The benchmark's own parts, smaller: whole runs of every script in processes of their own."""
    command = [
        sys.executable,
        "benchmark/survive.py",
        "--parts",
        part,
        f"--count={count}",
        f"--out={tmp_path}/x.json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "x.json").read_text())[part]["wrong"] == []


# --- checkpoints ---


def state(step: int) -> dict:
    return {"step": step, "weights": [torch.full((64,), float(step))], "done": ["sft"]}


@pytest.mark.parametrize("background", [False, True])
def test_the_last_checkpoints_stay(tmp_path, background):
    kept = Checkpoints(tmp_path / "checkpoint", 2, background)
    live = state(0)
    for step in (1, 2, 3):
        live["weights"][0].fill_(step)
        kept.save(step, live, f"row {step}\n")
        live["weights"][0].fill_(-1)  # training goes on: what was saved is a copy
        kept.wait()
    assert [path.name for _, path in kept.found()] == ["0002-step-2", "0003-step-3"]
    restored, rows = kept.load()
    assert restored["done"] == ["sft"] and rows == "row 3\n"
    if background:
        assert restored["weights"][0].tolist() == [3.0] * 64


@pytest.mark.parametrize("file", ["state.pt", "metrics.jsonl", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, how, capsys):
    kept = Checkpoints(tmp_path / "checkpoint", 2, False)
    for step in (1, 2):
        kept.save(step, state(step), f"row {step}\n")
    path = kept.found()[-1][1] / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    changed = {
        "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "cut": whole[:middle],
    }
    path.unlink() if how == "gone" else path.write_bytes(changed[how])
    assert kept.load()[0]["step"] == 1
    assert "damaged" in capsys.readouterr().out
    for _, folder in kept.found():
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        kept.load()


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoint", 2, False)
    kept.save(1, state(1), "")
    Evil.mark = tmp_path / "owned"
    folder = kept.found()[0][1]
    for data in (pickle.dumps(Evil()), None):
        if data is None:
            torch.save({"x": Evil()}, folder / "state.pt")
        else:
            (folder / "state.pt").write_bytes(data)
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = (folder / "state.pt").read_bytes()
        manifest["files"]["state.pt"] = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(Exception, match=r"(?i)weights_only|mmap can only|pickle"):
            read(folder)
    assert not Evil.mark.exists()


def test_code_in_a_model_folder_does_not_run(world, flags, tmp_path, capsys):
    import shutil

    shutil.copytree(world / "model", tmp_path / "evil")
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    config = json.loads((tmp_path / "evil" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *flags, *SHORT, f"--model={tmp_path}/evil")
    assert stop.value.code == 2 and "evil" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0]['content'] * 10 ** 8 }}",
    ],
)
def test_a_template_can_neither_hang_nor_touch(world, flags, tmp_path, monkeypatch, capsys, template):
    import shutil

    from cleanalign import models

    shutil.copytree(world / "model", tmp_path / "evil")
    (tmp_path / "evil" / "chat_template.jinja").write_text(template.replace("OWNED", str(tmp_path / "owned")))
    monkeypatch.setattr(models.try_template, "__defaults__", (1,))
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *flags, *SHORT, f"--model={tmp_path}/evil")
    assert stop.value.code == 2 and "chat template" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


# --- lock, signals, --resume auto ---


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = (
        "from cleanalign.lock import Lock; from pathlib import Path; "
        f"lock = Lock(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on .* since 20"):
        Lock(tmp_path)
    process.kill()
    process.wait()
    Lock(tmp_path).release()


def test_a_signal_ends_the_run_after_its_step(world, flags, tmp_path, monkeypatch, capsys):
    start(ipo_md, *flags, *SHORT, "--run-name=whole")
    keep = Run.keep

    def at_step_three(run, step, state):
        if step == 3:
            assert signals.busy  # between the update and here nothing may be cut short
            os.kill(os.getpid(), __import__("signal").SIGTERM)
        keep(run, step, state)

    monkeypatch.setattr(Run, "keep", at_step_three)
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *flags, *SHORT, "--save-every=0", "--run-name=x")
    assert stop.value.code == STOPPED
    assert "continue with --resume" in capsys.readouterr().err
    monkeypatch.setattr(Run, "keep", keep)
    assert len(metrics_of(tmp_path / "x")) == 3
    start(ipo_md, *flags, *SHORT, "--save-every=0", "--run-name=x", "--resume=auto")
    assert metrics_of(tmp_path / "x") == metrics_of(tmp_path / "whole")


def test_resume_auto_starts_then_continues_then_is_done(world, flags, tmp_path, capsys):
    command = [*flags, *SHORT, "--run-name=x", "--resume=auto"]
    start(ipo_md, *command)
    assert summary_of(tmp_path / "x")["steps"] == 4
    before = {file: file.read_bytes() for file in (tmp_path / "x").rglob("*.json*")}
    start(ipo_md, *command)
    assert "is finished" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in (tmp_path / "x").rglob("*.json*")}
    with pytest.raises(SystemExit):
        (tmp_path / "x" / "summary.json").unlink()
        start(ipo_md, *command, "--tau=0.5")
    assert "--tau 0.5" in capsys.readouterr().err


# --- judges that fail, evaluation that fails ---

FAILING = """
from pathlib import Path
import math
CALLS = Path(__file__).with_suffix(".calls")

def judge(prompts, a, b):
    calls = int(CALLS.read_text() or 0) + 1 if CALLS.exists() else 1
    CALLS.write_text(str(calls))
    if calls == AT:
        WHAT
    return [0.75 if len(x) > len(y) else 0.25 if len(x) < len(y) else 0.5 for x, y in zip(a, b)]
"""


@pytest.mark.parametrize(
    "what", ["raise OSError('gone')", "raise TimeoutError", "return [math.nan for _ in a]"]
)
@pytest.mark.parametrize("at", [5, 9])  # both orders of each step: in step 3, and in the evaluation
def test_a_judge_that_fails_costs_nothing(world, flags, tmp_path, capsys, what, at):
    """`--save-every 0`: without a checkpoint at the failure all would be lost."""
    for name, number in (("whole", 10**6), ("broken", at)):
        (tmp_path / f"{name}.py").write_text(FAILING.replace("AT", str(number)).replace("WHAT", what))
    short = [*flags, *SHORT, "--save-every=0"]
    start(ipo_md, *short, f"--judge={tmp_path}/whole.py:judge", "--run-name=whole")
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *short, f"--judge={tmp_path}/broken.py:judge", "--run-name=x")
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in told and f"step {2 if at == 5 else 4}" in told
    asked = int((tmp_path / "broken.calls").read_text())
    start(ipo_md, f"--resume={tmp_path}/x")
    assert metrics_of(tmp_path / "x") == metrics_of(tmp_path / "whole")
    assert summary_of(tmp_path / "x")["win_rate"] == summary_of(tmp_path / "whole")["win_rate"]
    assert int((tmp_path / "broken.calls").read_text()) - asked == 10 - (
        asked - 1
    )  # no step's verdicts were asked twice


def test_every_judge_is_checked(world):
    judge = load_judge(f"{world}/judges.py:not_a_number")
    with pytest.raises(JudgeFailure, match="nan"):
        judge.preference(["good"], ["a"], ["b"])


def test_the_model_is_safe_before_the_evaluation(world, flags, tmp_path, monkeypatch, capsys):
    start(nash_md, *flags, *SHORT, "--run-name=whole", "--lora-rank=2")

    def full(*_):
        raise UserError("no space")

    monkeypatch.setattr(experiment, "evaluate", full)
    with pytest.raises(SystemExit):
        start(nash_md, *flags, *SHORT, "--run-name=x", "--lora-rank=2", "--save-every=0")
    saved = (tmp_path / "x" / "model" / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(nash_md, "train_step", full)  # a resumed run trains no more
    start(nash_md, f"--resume={tmp_path}/x")
    whole, resumed = summary_of(tmp_path / "whole"), summary_of(tmp_path / "x")
    assert (whole["win_rate"], whole["kl"]) == (resumed["win_rate"], resumed["kl"])


def test_a_staged_run_goes_straight_to_its_evaluation(world, flags, tmp_path, monkeypatch):
    short = [
        *flags,
        f"--dataset={world}/demonstrations.jsonl",
        "--min-demonstration-score=None",
        "--num-prompts=16",
    ]
    start(spin, *short, "--max-steps=2", "--run-name=whole")

    def full(*_):
        raise UserError("no space")

    monkeypatch.setattr(experiment, "evaluate", full)
    with pytest.raises(SystemExit):
        start(spin, *short, "--max-steps=2", "--run-name=x")
    monkeypatch.undo()
    monkeypatch.setattr(experiment, "train_stage", full)
    start(spin, f"--resume={tmp_path}/x")
    assert summary_of(tmp_path / "whole")["kl"] == summary_of(tmp_path / "x")["kl"]


# --- disks ---


def test_space_is_checked_before_the_first_step(world, flags, tmp_path, monkeypatch, capsys):
    usage = __import__("collections").namedtuple("usage", "total used free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *flags, *SHORT, "--run-name=x")
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "need about" in told and "1 MB are free" in told
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_a_write_is_whole_or_not_there(tmp_path):
    file = tmp_path / "x.json"
    storage.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        storage.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    with pytest.raises(UserError, match="stop"), storage.replacing(tmp_path / "folder") as new:
        (new / "half").write_text("")
        raise OSError("stop")
    assert not (tmp_path / "folder").exists()


def test_saving_in_the_background_changes_nothing(world, flags, tmp_path):
    for mode in ("off", "on"):
        start(nash_md, *flags, *SHORT, f"--save-async={mode}", "--save-every=1", f"--run-name={mode}")
    assert metrics_of(tmp_path / "on") == metrics_of(tmp_path / "off")
    states = [Checkpoints(tmp_path / mode / "checkpoint", 2, False) for mode in ("off", "on")]
    one, other = (torch.load(kept.found()[0][1] / "state.pt", weights_only=True) for kept in states)
    for a, b in zip(one["optimiser"]["masters"], other["optimiser"]["masters"], strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_rights_is_one_sentence(world, flags, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *flags, *SHORT, "--run-name=x")
    assert stop.value.code == 2 and "could not be written" in capsys.readouterr().err
