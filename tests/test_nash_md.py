"""nash_md.py: whole runs that learn, opponents, baselines, EMA, resume, bad input. (The loss's theory is in
test_theory.py.)"""

import contextlib
import math
import re

import pytest
import tiny
import torch
from running import metrics_of, resumed_equals_uninterrupted, start, summary_of

import common
import nash_md
from cleanalign.data import Row
from cleanalign.optimization import MasterAdamW
from cleanalign.run import Run
from experiment import Experiment
from judges import Judge


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


def chance(prompt, a, b):
    """Some p(a ≻ b) without a scalar, and with a position bias: p(a ≻ b) + p(b ≻ a) is not 1."""
    return common.derive_seed(prompt, a, b) / 2**48


PROMPTS, SAMPLES, RIVALS = ["p", "q"], [["a", "b", "c"], ["d", "e", "f"]], ["x", "y"]


@pytest.mark.parametrize("average", [True, False])
def test_play_asks_for_each_sample_against_its_prompts_opponent(average):
    asked = []

    def preference(prompts, a, b):
        asked.extend(zip(prompts, a, b, strict=True))
        return torch.tensor([chance(*pair) for pair in zip(prompts, a, b, strict=True)])

    judge = Judge("chance", preference)

    def once(prompt, a, b):
        return (chance(prompt, a, b) + 1 - chance(prompt, b, a)) / 2 if average else chance(prompt, a, b)

    p, scores = nash_md.play(judge, PROMPTS, SAMPLES, RIVALS, average)
    assert scores is None and len(asked) == len(set(asked)) == 6 * (1 + average)
    for g, prompt in enumerate(PROMPTS):
        assert p[g].tolist() == pytest.approx([once(prompt, sample, RIVALS[g]) for sample in SAMPLES[g]])

    asked.clear()
    p, _ = nash_md.play(judge, PROMPTS, SAMPLES, None, average)  # each other's opponents
    assert len(asked) == len(set(asked)) == 6 * (1 + average)  # three pairs of each prompt
    for g, (prompt, (a, b, c)) in enumerate(zip(PROMPTS, SAMPLES, strict=True)):
        ab, ac, bc = once(prompt, a, b), once(prompt, a, c), once(prompt, b, c)
        assert p[g].tolist() == pytest.approx([(ab + ac) / 2, (1 - ab + bc) / 2, (1 - ac + 1 - bc) / 2])
    # why check_args refuses it here: it scales the advantage by K / (K − 1)
    leave_one_out = (p.sum(1, keepdim=True) - p) / 2
    torch.testing.assert_close(p - leave_one_out, 1.5 * (p - 0.5))


def test_play_scores_each_text_once_where_there_is_a_scalar():
    scored = []

    def score(prompts, replies):
        scored.extend(zip(prompts, replies, strict=True))
        return torch.tensor(
            [chance(prompt, reply, "") for prompt, reply in zip(prompts, replies, strict=True)]
        )

    judge = Judge("scalar", None, score, scale=3.0)  # its preference is never needed
    r = lambda prompt, reply: chance(prompt, reply, "")  # noqa: E731
    sigmoid = lambda x: torch.tensor(3.0 * x).sigmoid().item()  # noqa: E731
    p, scores = nash_md.play(judge, PROMPTS, SAMPLES, RIVALS, True)
    assert len(scored) == len(set(scored)) == 8
    for g, prompt in enumerate(PROMPTS):
        assert scores[g].tolist() == pytest.approx([r(prompt, sample) for sample in SAMPLES[g]])
        assert p[g].tolist() == pytest.approx(
            [sigmoid(r(prompt, sample) - r(prompt, RIVALS[g])) for sample in SAMPLES[g]]
        )
    p, _ = nash_md.play(judge, PROMPTS, SAMPLES, None, True)
    a, b, c = (r("p", sample) for sample in SAMPLES[0])
    assert p[0].tolist() == pytest.approx(
        [
            (sigmoid(a - b) + sigmoid(a - c)) / 2,
            (sigmoid(b - a) + sigmoid(b - c)) / 2,
            (sigmoid(c - a) + sigmoid(c - b)) / 2,
        ]
    )


class Average:
    """Stands for an EMA: says whether its weights are in the policy's place."""

    playing = False

    @contextlib.contextmanager
    def in_place_of_policy(self):
        self.playing = True
        yield
        self.playing = False


@pytest.mark.parametrize(
    "opponent,K,baseline,expected",  # of each call: (who, whether averaged, samples of its own, mixture's β)
    [
        ("mixture", 2, "half", [("policy", False, 2, 0.3)]),
        ("mixture", 2, "leave-one-out", [("policy", False, 2, 0.3)]),
        ("self", 1, "half", [("policy", False, 1, 0.0)]),
        ("self", 2, "half", [("policy", False, 2, None)]),
        ("ema", 2, "half", [("policy", False, 2, None), ("policy", True, 1, None)]),
        ("reference", 2, "leave-one-out", [("policy", False, 2, None), ("reference", False, 1, None)]),
    ],
)
def test_collect_samples_the_opponent_that_was_asked_for(monkeypatch, opponent, K, baseline, expected):
    average, calls = Average() if opponent == "ema" else None, []

    def sample(model, prompts, ends, *, completions=1, mixture=None, unmixed=0, seed, stats, **settings):
        assert mixture is None or mixture[0] == "reference"
        calls.append(
            (
                model,
                bool(average and average.playing),
                unmixed if mixture else completions,
                mixture and mixture[1],
            )
        )
        stats |= {"tokens": 0, "warmup_seconds": 0.0}
        return [[[100 * len(calls) + 10 * g + k] for k in range(completions)] for g in range(len(prompts))]

    monkeypatch.setattr(common, "sample", sample)
    monkeypatch.setattr(common, "decode", lambda tokenizer, completion: str(completion[0]))
    args = nash_md.Args(opponent=opponent, beta=0.3, samples_per_prompt=K, baseline=baseline)
    rows = [Row(str(i), f"prompt {i}") for i in range(4)]
    judge = Judge(
        "chance",
        lambda prompts, a, b: torch.tensor([chance(*pair) for pair in zip(prompts, a, b, strict=True)]),
        symmetric=True,
    )
    exp = Experiment("test", args, torch.device("cpu"), torch.float32, "eager", None, [], judge, None)
    exp.rows, exp.prompts = rows, [[i] for i in range(4)]
    exp.policy, exp.reference, exp.run = "policy", "reference", Run("test", args, 1)
    batch, metrics = nash_md.collect(exp, [3, 1], 0, average)
    assert calls == expected
    for g, (group, i) in enumerate(zip(batch, [3, 1], strict=True)):
        assert (group.row_id, group.prompt) == (str(i), [i]) and group.completions == [
            [100 + 10 * g + k] for k in range(K)
        ]
        own = [str(100 + 10 * g + k) for k in range(K)]
        if len(calls) == 2:
            p = [chance(f"prompt {i}", y, str(200 + 10 * g)) for y in own]
        elif calls[0][3] is not None:
            p = [chance(f"prompt {i}", y, str(100 + 10 * g + K)) for y in own]
        else:
            first = chance(f"prompt {i}", *own)
            p = [first, 1 - first]
        assert group.preference == pytest.approx(p)
        assert group.baseline == pytest.approx([0.5] * K if baseline == "half" else p[::-1])
    assert metrics["preference"] == pytest.approx(sum(sum(group.preference) for group in batch) / (2 * K))


@pytest.mark.parametrize(
    "extra",
    [
        ["--judge=cycle"],
        ["--lora-rank=4", "--lora-alpha=8"],
        ["--opponent=ema", "--optimizer-states=bfloat16", "--dtype=bfloat16"],
        ["--opponent=self", "--batch-size=1", "--samples-per-prompt=1"],
    ],
    ids=" ".join,
)
def test_short_runs_log_finite_numbers(flags, tmp_path, extra):
    start(
        nash_md,
        *[f for f in flags if f.split("=")[0] not in " ".join(extra)],
        *extra,
        "--run-name=x",
        "--max-steps=2",
    )
    rows = metrics_of(tmp_path / "x")
    assert len(rows) == 2 and all(
        math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float)
    )
    assert "--judge=cycle" not in extra or "exploitability" in rows[0]


def test_it_says_when_the_data_do_not_last_for_max_steps(flags, tmp_path, capsys):
    start(nash_md, *flags, "--run-name=x", "--num-prompts=16", "--max-steps=9")
    assert "--max-steps 9: the data are used up after 2 steps" in capsys.readouterr().out
    assert len(metrics_of(tmp_path / "x")) == 2


@pytest.mark.parametrize("both,preference", [("--both-orders", 0.5), ("--no-both-orders", 1.0)])
def test_both_orders_take_out_a_position_bias(world, flags, tmp_path, both, preference):
    flags = [f.replace("more_good", "first_wins") for f in flags]
    start(nash_md, *flags, both, "--run-name=x", "--max-steps=1")
    assert metrics_of(tmp_path / "x")[0]["preference"] == preference


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
        vocab_size=len(words),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        num_labels=1,
        pad_token_id=0,
        initializer_range=1.0,
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    flags = [f"--judge=hf:{tmp_path}/reward" if f.startswith("--judge") else f for f in flags]
    start(
        nash_md,
        *flags,
        "--objective=rlhf",
        "--run-name=x",
        "--num-prompts=None",
        "--epochs=5",
        "--learning-rate=0.01",
    )
    summary = summary_of(tmp_path / "x")
    assert summary["score_after"] > summary["score_before"] + 1 and summary["win_rate"] > 0.6


@pytest.mark.parametrize("opponent", ["mixture", "ema"])
def test_resume_after_kill_continues_with_the_very_metrics(flags, tmp_path, opponent):
    flags += [
        "--num-prompts=None",
        "--epochs=2",
        "--learning-rate=0.003",
        "--save-every=3",
        f"--opponent={opponent}",
        "--ema-decay=0.9",
    ]
    resumed_equals_uninterrupted(nash_md, flags, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_follows_its_recursion_in_float32_and_leaves_the_policy_alone(dtype):
    policy = tiny.model(24, seed=0).to(dtype).requires_grad_(True)
    optimiser = MasterAdamW(policy, 0.0)
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
    restored = nash_md.EMA(optimiser, 0.9)
    own = [weight.data_ptr() for weight in restored.weights]
    restored.load_state_dict(
        [ema.state_dict()]
    )  # into its own tensors, which may be on another device than a checkpoint's
    assert own == [weight.data_ptr() for weight in restored.weights]
    assert all(torch.equal(a, b) for a, b in zip(restored.weights, ema.weights, strict=True))
    before = [p.detach().clone() for p in policy.parameters()]
    with ema.in_place_of_policy():
        assert all(
            torch.equal(p, average.to(dtype))
            for p, average in zip(optimiser.weights, ema.weights, strict=True)
        )
    assert all(torch.equal(p, kept) for p, kept in zip(policy.parameters(), before, strict=True))
    with pytest.raises(ZeroDivisionError), ema.in_place_of_policy():
        assert any((p != kept).any() for p, kept in zip(policy.parameters(), before, strict=True))
        1 / 0  # noqa: B018
    assert all(torch.equal(p, kept) for p, kept in zip(policy.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--objective=rlhf"], "needs a scalar reward, and the judge .*more_good has none"),
        (["--beta=-0.1"], r"--beta must lie in \[0, 1\]"),
        (["--tau=-1"], "--tau must not be negative"),
        (["--opponent=self", "--baseline=leave-one-out"], "drawn independently"),
        (["--samples-per-prompt=1", "--baseline=leave-one-out"], "at least 2"),
        (["--objective=rlhf", "--baseline=leave-one-out"], "leave-one-out is for --objective nash"),
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
