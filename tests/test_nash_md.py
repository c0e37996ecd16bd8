"""nash_md.py: whole runs that learn, opponents, baselines, EMA, resume, bad input. (The loss's theory is in test_theory.py.)"""

import re

import pytest
import tiny
import torch
from running import metrics_of, resumed_equals_uninterrupted, start, summary_of

import common
import nash_md
import optimization


def test_loss_counts_masked_tokens_only_and_is_a_mean():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-3 * torch.rand(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (torch.arange(5) < torch.tensor([[5], [3], [1], [4]])).double()
    preference = torch.rand(4, generator=generator, dtype=torch.float64)
    value = nash_md.nash_md_loss(policy, reference, mask, preference, 0.1)
    rubbish = torch.where(mask.bool(), policy, torch.tensor(-77.0, dtype=torch.float64))
    assert nash_md.nash_md_loss(rubbish, reference, mask, preference, 0.1) == value
    by_hand = 0.0
    for b in range(4):
        length = int(mask[b].sum())
        for n in range(length):
            to_go = sum(float(policy[b, m] - reference[b, m]) for m in range(n, length))
            by_hand -= float(policy[b, n]) * (float(preference[b]) - 0.5 - 0.1 * to_go) / 4
    assert value.item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    "extra",
    [
        ["--opponent=mixture", "--samples-per-prompt=1"],
        ["--opponent=mixture", "--baseline=leave-one-out"],
        ["--opponent=ema", "--ema-decay=0.9"],
        ["--opponent=self"],
        ["--opponent=self", "--samples-per-prompt=1"],
        ["--opponent=reference"],
    ],
    ids=" ".join,
)
def test_it_learns(flags, tmp_path, extra):
    start(nash_md, *flags, *extra, "--run-name=x", "--num-prompts=None", "--epochs=5", "--learning-rate=0.01")
    summary, rows = summary_of(tmp_path / "x"), metrics_of(tmp_path / "x")
    assert summary["win_rate"] > 0.75 and summary["kl"] > 0.5 and rows[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_rlhf_learns_a_scalar_reward(world, flags, tmp_path):
    """On a reward model: a classifier's score of the policy's own samples rises."""
    import transformers

    words = tiny.tokenizer(chat=False)
    words.save_pretrained(tmp_path / "reward")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1, pad_token_id=0, initializer_range=1.0
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    flags = [f"--judge=hf:{tmp_path}/reward" if f.startswith("--judge") else f for f in flags]
    start(nash_md, *flags, "--objective=rlhf", "--run-name=x", "--num-prompts=None", "--epochs=5", "--learning-rate=0.01")
    summary = summary_of(tmp_path / "x")
    assert summary["score_after"] > summary["score_before"] + 1 and summary["win_rate"] > 0.6


@pytest.mark.parametrize("opponent", ["mixture", "ema"])
def test_resume_after_kill_continues_with_the_very_metrics(flags, tmp_path, opponent):
    flags += ["--num-prompts=None", "--epochs=2", "--learning-rate=0.003", "--save-every=3", f"--opponent={opponent}", "--ema-decay=0.9"]
    resumed_equals_uninterrupted(nash_md, flags, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_follows_its_recursion_in_float32_and_leaves_the_policy_alone(dtype):
    policy = tiny.model(24, seed=0).to(dtype).requires_grad_(True)
    optimiser = optimization.MasterAdamW(policy, 0.0)
    ema = nash_md.EMA(optimiser, 0.9)
    expected = [m.clone() for m in optimiser.masters]
    batch = common.collate([[5, 6, 7]], [[[4, 5, 3]]], "cpu")
    for _ in range(5):
        common.completion_logprobs(policy, batch).sum().backward()
        optimiser.step(1e-3, 1.0)
        ema.update()
        expected = [0.9 * e + 0.1 * m for e, m in zip(expected, optimiser.masters, strict=True)]
    for ours, theirs in zip(ema.weights, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    before = [p.detach().clone() for p in policy.parameters()]
    with ema.in_place_of_policy():
        assert all(torch.equal(p, average.to(dtype)) for p, average in zip(optimiser.weights, ema.weights, strict=True))
    assert all(torch.equal(p, kept) for p, kept in zip(policy.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--objective=rlhf"], "needs a scalar reward, and the judge .*more_good has none"),
        (["--beta=-0.1"], r"--beta must lie in \[0, 1\]"),
        (["--tau=-1"], "--tau must not be negative"),
        (["--opponent=self", "--baseline=leave-one-out"], "drawn independently"),
        (["--samples-per-prompt=1", "--baseline=leave-one-out"], "at least 2"),
        (["--temperature=0"], "greedy"),
        (["--ema-decay=2"], "--ema-decay must lie in"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_message(flags, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as stop:
        start(nash_md, *flags, *extra, "--run-name=x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "x").exists()
