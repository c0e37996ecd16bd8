"""spin.py: its loss, whole runs that learn, whose samples an iteration plays against, resume, bad input."""

import json
import math
import re

import pytest
import torch
from running import resumed_equals_uninterrupted, sealed_passes, start, summary_of

import afd
import common
import spin
from cleanalign.models import load_model


@pytest.fixture
def flags(flags, world):
    """The tiny world's flags for spin: demonstrations full of good words, a scalar judge that counts them."""
    kept = [f for f in flags if not f.startswith(("--judge", "--dataset"))]
    return [
        *kept,
        f"--dataset={world}/demonstrations.jsonl",
        f"--judge={world}/judges.py:goodness",
        "--min-demonstration-score=None",
        "--num-prompts=None",
        "--learning-rate=0.01",
        "--policy-learning-rate=0.003",
    ]


def test_loss_against_the_formula_and_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x = [-20 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    expected = 0.0
    for demonstration, sample, old_demonstration, old_sample in zip(*(v.tolist() for v in x), strict=True):
        t = 0.3 * ((demonstration - old_demonstration) - (sample - old_sample))
        expected += math.log(1 + math.exp(-t)) / 6
    assert spin.spin_loss(*x, 0.3).item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(spin.spin_loss(*x, 0.3), afd.dpo_loss(*x, 0.3))  # written twice on purpose
    free = [x[0].requires_grad_(), x[1].requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: spin.spin_loss(a, b, x[2], x[3], 0.3), free)


def test_it_learns(flags, tmp_path):
    start(spin, *flags, "--epochs=1", "--policy-epochs=3", "--run-name=x")
    summary = summary_of(tmp_path / "x")
    assert summary["win_rate"] > 0.8 and summary["score_after"] > summary["score_before"] + 0.7
    for folder in ("sft", "spin-1", "spin-2", "model"):
        assert (tmp_path / "x" / folder / "config.json").exists(), folder


def test_each_iteration_plays_against_the_last_iterate_s_own_samples(flags, tmp_path):
    """Samples and reference log-probs of an iteration, computed again with the model that was left before."""
    start(spin, *flags, "--epochs=1", "--policy-epochs=1", "--run-name=x")
    device = torch.device("cpu")
    for before, stage in (("sft", "spin-1"), ("spin-1", "spin-2")):
        model = load_model(f"{tmp_path}/x/{before}", torch.float32, device)
        replies = json.loads((tmp_path / "x" / "replies" / f"{stage}.json").read_text())
        pairs = json.loads((tmp_path / "x" / "replies" / f"{stage}-pairs.json").read_text())
        prompts, completions = ([pair[key] for pair in pairs] for key in ("prompt", "completions"))
        seed = common.derive_seed(1, stage)
        assert common.sample(model, prompts, [3], max_new_tokens=6, seed=seed) == replies
        assert [pair[1] for pair in completions] == [reply for (reply,) in replies]
        sums = common.sequence_logprobs(model, prompts, completions, 1.0, device, 4096)
        reference = [x for pair in pairs for x in pair["reference"]]
        assert reference == pytest.approx([x for row in sums for x in row], abs=1e-3)


def test_a_finished_sft_model_is_taken_as_the_first_player(flags, tmp_path):
    start(spin, *flags, "--max-steps=1", "--iterations=1", "--run-name=x")
    reused = [f"--sft-model={tmp_path}/x/sft", "--max-steps=1", "--iterations=1", "--run-name=y"]
    start(spin, *flags, *reused)
    first, second = (tmp_path / name / "replies" / "spin-1.json" for name in "xy")
    assert first.read_text() == second.read_text() and not (tmp_path / "y" / "sft").exists()


def test_training_is_sealed_off_from_the_judge(flags, monkeypatch):
    passes = sealed_passes(spin, [*flags, "--max-steps=2"], monkeypatch)
    assert passes >= 6  # SFT, and two iterations


def test_resume_after_kill_continues_with_the_very_metrics(flags, tmp_path):
    resumed_equals_uninterrupted(spin, [*flags, "--epochs=1", "--save-every=3"], tmp_path)


def test_with_lora_every_stage_runs(flags, tmp_path):
    start(spin, *flags, "--lora-rank=4", "--run-name=x", "--epochs=3", "--policy-epochs=2")
    assert summary_of(tmp_path / "x")["score_after"] > summary_of(tmp_path / "x")["score_before"] + 0.5


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--demonstrations=nothing"], "no column 'nothing'"),
        (["--demonstrations=missing.jsonl"], r"--demonstrations missing\.jsonl: no such file"),
        (["--sft-model=/no/such/folder"], "--sft-model /no/such/folder: no such folder"),
        (["--temperature=0"], "greedy"),
        (["--iterations=0"], "--iterations must be at least 1, got 0"),
        (["--beta=0"], "--beta must be above 0, got 0"),
        (["--min-demonstration-score=99"], "no demonstration scores that much"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_message(flags, tmp_path, capsys, extra, message):
    replaced = {e.split("=")[0] for e in extra}
    kept = [f for f in flags if f.split("=")[0] not in replaced]
    with pytest.raises(SystemExit) as stop:
        start(spin, *kept, *extra, "--run-name=x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "x").exists()
