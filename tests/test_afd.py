"""afd.py: its losses on tabular problems, the Best-of-N estimators, whole runs that learn, stages reused,
resume, bad input."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from running import metrics_of, resumed_equals_uninterrupted, sealed_passes, start, summary_of

import afd
import experiment
import rewards
from cleanalign import data, statistics
from judges import load_judge

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import afd_divergences

HH = Path(__file__).parent.parent.parent / "shared/data/hh_rlhf_harmless_base_test.jsonl.gz"


@pytest.fixture
def flags(flags, world):
    """The tiny world's flags for afd: demonstrations full of good words, a scalar judge that counts them."""
    kept = [f for f in flags if not f.startswith(("--judge", "--dataset"))]
    return [
        *kept,
        f"--dataset={world}/demonstrations.jsonl",
        f"--judge={world}/judges.py:goodness",
        "--min-demonstration-score=None",
        "--num-prompts=None",
        "--dev-prompts=8",
        "--reward-prompts=40",
        "--max-n=4",
        "--samples-per-prompt=4",
        "--learning-rate=0.01",
        "--reward-learning-rate=0.01",
        "--policy-learning-rate=0.003",
    ]


# --- losses ------------------------------------------------------------------------------------


def test_discriminator_loss_by_hand():
    positive, negative = torch.tensor([1.5, -0.3, 0.0]), torch.tensor([-2.0, 0.4, 0.7])
    D = lambda s: 1 / (1 + torch.exp(-s))  # noqa: E731
    classification = -0.5 * (D(positive).log().mean() + (1 - D(negative)).log().mean())
    torch.testing.assert_close(afd.discriminator_loss(positive, negative), classification)
    wins = positive.exp() / (positive.exp() + negative.exp())
    torch.testing.assert_close(
        afd.discriminator_loss(positive, negative, "bradley-terry"), -wins.log().mean()
    )


DEMO = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64)
POLICY = torch.tensor([0.1, 0.2, 0.4, 0.25, 0.05], dtype=torch.float64)


def fitted_scores(kind: str) -> torch.Tensor:
    """Scores of five replies that minimise the discriminator's loss on samples with exactly the frequencies
    DEMO and POLICY."""
    of_demo, of_policy = ((p * 20).round().long() for p in (DEMO, POLICY))
    positive, negative = (torch.arange(5).repeat_interleave(n) for n in (of_demo, of_policy))  # (20,) each
    if kind == "bradley-terry":  # every demonstration against every sample
        positive, negative = (x.flatten() for x in torch.meshgrid(positive, negative, indexing="ij"))
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = afd.discriminator_loss(scores[positive], scores[negative], kind)
        loss.backward()
        return loss

    optimizer.step(closure)
    return scores.detach()


def test_optimal_discriminator_is_the_log_density_ratio():
    torch.testing.assert_close(fitted_scores("classification"), (DEMO / POLICY).log(), atol=1e-5, rtol=0)


def test_bradley_terry_leaves_a_constant_free():
    """Its optimum is the log density ratio up to a constant, which its gradient never moves: it ranks alike,
    but is no density ratio."""
    ratio, scores = (DEMO / POLICY).log(), fitted_scores("bradley-terry")
    torch.testing.assert_close(scores - scores.mean(), ratio - ratio.mean(), atol=1e-5, rtol=0)
    assert scores.sum().abs() < 1e-9 and ratio.sum().abs() > 0.1


def gradient_of_policy(logits: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Expected gradient of `policy_gradient_loss` with kl 0 over one-token replies, by enumeration."""
    logits = logits.clone().requires_grad_(True)
    logprobs = logits.log_softmax(-1)
    weights = logprobs.detach().exp()
    total = 0.0
    for y in range(len(logits)):
        row = logprobs[y].view(1, 1)
        total = total + weights[y] * afd.policy_gradient_loss(
            row, row.detach(), torch.ones(1, 1), reward[y].view(1), 0.0
        )
    return torch.autograd.grad(total, logits)[0]


def test_adversarial_rewards_descend_their_divergences():
    """With the optimal discriminator, reward logit descends KL(π ‖ demo), and −log(1 − D) descends 2 JS."""
    logits = POLICY.log().clone().requires_grad_(True)
    logit = (DEMO / POLICY).log()  # of the optimal discriminator
    pi = logits.softmax(-1)
    mean = (pi + DEMO) / 2
    reverse_kl = (pi * (pi / DEMO).log()).sum()
    js = 0.5 * (pi * (pi / mean).log()).sum() + 0.5 * (DEMO * (DEMO / mean).log()).sum()
    for reward, divergence in ((logit, reverse_kl), (torch.nn.functional.softplus(logit), 2 * js)):
        expected = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient_of_policy(logits.detach(), reward), expected, atol=1e-12, rtol=0)


def test_forward_kl_covers_and_reverse_kl_seeks_a_mode():
    """Demonstrations with two modes, a policy that has one: SFT matches both moments, the reverse KL takes
    the heavier mode."""
    grid = afd_divergences.GRID

    def moments(probabilities):
        mean = (probabilities * grid).sum()
        return mean.item(), ((probabilities * (grid - mean) ** 2).sum().sqrt()).item()

    covering = moments(afd_divergences.demonstrator())
    assert moments(afd_divergences.gaussian(*afd_divergences.fit("forward-kl")).exp()) == pytest.approx(
        covering, abs=0.005
    )
    assert afd_divergences.fit("reverse-kl") == pytest.approx((-2.0, 0.5), abs=0.05)
    # JS has an optimum of either kind
    assert afd_divergences.fit("js")[1] == pytest.approx(covering[1], abs=0.1)
    assert afd_divergences.fit("js", -1.5, 0.7) == pytest.approx((-2.0, 0.5), abs=0.05)


# --- Best-of-N ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_against_enumeration(ties):
    generator = torch.Generator().manual_seed(0)
    G, M = 3, 5
    for _ in range(4):
        rewards = torch.rand(G, M, generator=generator)
        if ties:
            rewards = (rewards * 3).floor()
        golden, preference = torch.rand(G, M, generator=generator), torch.rand(G, M, M, generator=generator)
        preference = torch.where(preference > 0.8, 0.5, preference)
        won = (preference > 0.5).double() + 0.5 * (preference == 0.5).double()
        for n, g in itertools.product(range(1, M), range(G)):
            scores, duels = [], []
            for subset in itertools.combinations(range(M), n):
                best = [i for i in subset if rewards[g, i] == rewards[g, list(subset)].max()]
                scores.append(golden[g, best].double().mean())
                duels += [won[g, best, opponent].mean() for opponent in set(range(M)) - set(subset)]
            assert statistics.best_of_n_score(rewards, golden, [n])[g, 0] == pytest.approx(
                torch.stack(scores).mean().item(), abs=1e-9
            )
            assert statistics.best_of_n_win_rate(rewards, preference, [n])[g, 0] == pytest.approx(
                torch.stack(duels).mean().item(), abs=1e-9
            )


def test_best_of_many_does_not_overflow():
    """C(101, 50) is beyond 64 bits."""
    golden = torch.rand(2, 101, generator=torch.Generator().manual_seed(0))
    preference = (golden[:, :, None] > golden[:, None, :]).double()
    rates = statistics.best_of_n_win_rate(golden, preference, [50, 100])
    torch.testing.assert_close(rates, torch.tensor([[50 / 51, 100 / 101]] * 2, dtype=torch.float64))


def test_best_of_one_is_even_and_a_useless_reward_stays_even():
    golden = torch.rand(200, 9, generator=torch.Generator().manual_seed(0))
    preference = (golden[:, :, None] > golden[:, None, :]).double()
    ns = [1, 4, 8]
    rates = statistics.best_of_n_win_rate(torch.zeros(200, 9), preference, ns).mean(0)
    assert rates.tolist() == pytest.approx([0.5] * 3, abs=1e-9)  # opponents inside the subset would bias this
    oracle = statistics.best_of_n_win_rate(golden, preference, ns).mean(0)
    # the best of n + 1 lies among the n
    assert oracle.tolist() == pytest.approx([n / (n + 1) for n in ns], abs=1e-9)


# --- reward models -----------------------------------------------------------------------------


def small_reward_model(world, seed=0):
    model = rewards.load_reward_model(f"{world}/model", True, torch.float32, torch.device("cpu"), "eager")
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    return model


def test_reward_is_the_classifier_s_at_the_last_token(world):
    """Side by side with others, padded: the scalar equals transformers' own classifier on the single text."""
    model = small_reward_model(world)
    prompts, groups = [[5, 6, 7], [8, 9]], [[[4, 5, 6], [7]], [[], [10, 11]]]
    scores = rewards.reward_scores(model, rewards.collate_read(prompts, groups, "cpu"))
    for g, k in itertools.product(range(2), range(2)):
        ids = torch.tensor([[*prompts[g], *groups[g][k]]])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        assert scores[g, k].item() == pytest.approx((hidden @ model.score.weight[0]).item(), abs=1e-5)


def test_pairs_are_read_without_their_end_and_at_equal_lengths():
    def pair(positive, **flags):
        return rewards.pair_as_read(positive, [5, 6, 3], afd.as_read_by(afd.Args(**flags)), [3])

    assert pair([7, 8, 9, 3]) == [[7, 8], [5, 6]]
    assert pair([7, 8, 9], match_lengths=False) == [[7, 8, 9], [5, 6]]
    assert pair([7, 3], hide_end=False) == [[7, 3], [5, 6]]
    # a discriminator learns from what it scores: whole replies, or it is no divergence's
    for objective in ("reverse-kl", "js"):
        assert pair([7, 8, 9, 3], objective=objective) == [[7, 8, 9, 3], [5, 6, 3]]
        assert pair([7, 8, 9, 3], objective=objective, discriminator_reads="cut") == [[7, 8], [5, 6]]


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        ["--objective=forward-kl", "--epochs=6"],
        ["--objective=reverse-kl", "--epochs=1", "--policy-steps=30", "--replay=0.25"],
        ["--objective=js", "--epochs=1", "--policy-steps=30", "--discriminator-updates=2"],
        ["--objective=irl", "--epochs=3", "--policy-epochs=3", "--reward=reward-model"],
        ["--objective=irl", "--epochs=3", "--reward=log-ratio", "--pairs", "--policy-epochs=3"],
    ],
    ids=" ".join,
)
def test_it_learns(flags, tmp_path, extra):
    start(afd, *flags, *extra, "--run-name=x")
    summary = summary_of(tmp_path / "x")
    assert summary["win_rate"] > 0.8 and summary["score_after"] > summary["score_before"] + 0.7
    assert (tmp_path / "x" / "sft" / "config.json").exists() and (
        tmp_path / "x" / "model" / "config.json"
    ).exists()


def test_irl_compares_every_construction_on_the_same_samples_and_its_stages_can_be_reused(flags, tmp_path):
    pairs = ["--pairs", "init-sft", "init-demo", "sft-demo", "preference"]
    start(afd, *flags, *pairs, "--run-name=x", "--epochs=2", "--extrapolate=best-of-n")
    report = json.loads((tmp_path / "x" / "best_of_n.json").read_text())
    names = [*(f"reward model, {kind}" for kind in pairs[1:-1]), "reward model, preference (oracle)"]
    names += ["log-ratio", "length", "random", "judge (oracle)"]
    assert list(report["rankers"]) == names and (tmp_path / "x" / "best_of_n.png").exists()
    for curve in report["rankers"].values():
        assert len(curve["score"]) == len(curve["win_rate"]) == 4 and curve["win_rate"][0] == pytest.approx(
            0.5
        )
        assert curve["score"][0] == pytest.approx(report["rankers"]["random"]["score"][0])  # the same samples
    oracle = report["rankers"]["judge (oracle)"]
    assert oracle["score"] == sorted(oracle["score"]) and oracle["score"][-1] > oracle["score"][0]
    assert report["rankers"]["reward model, sft-demo"]["separability"] is not None
    summary = summary_of(tmp_path / "x")
    assert (
        summary["best_of_n"]["favoured_on_dev"] in names[:5]
        and "preference" not in summary["best_of_n"]["favoured_on_dev"]
    )

    reused = [f"--sft-model={tmp_path}/x/sft", f"--reward-model={tmp_path}/x/reward-init-sft"]
    start(afd, *flags, *reused, "--run-name=y", "--extrapolate=best-of-n")
    again = json.loads((tmp_path / "y" / "best_of_n.json").read_text())["rankers"]
    assert (
        again["reward model, given (init-sft)"]["score"]
        == report["rankers"]["reward model, init-sft"]["score"]
    )
    assert not (tmp_path / "y" / "sft").exists() and not (tmp_path / "y" / "metrics.jsonl").exists()


def test_a_training_path_that_asks_the_judge_is_an_error(world):
    judge = load_judge(f"{world}/judges.py:goodness")
    with experiment.sealed(judge), pytest.raises(AssertionError, match="training path"):
        judge.score(["a"], ["good"])
    assert judge.score(["a"], ["good"]).tolist() == [1.0]


@pytest.mark.parametrize("objective", ["irl", "js"])
def test_training_is_sealed_off_from_the_judge(flags, tmp_path, monkeypatch, objective):
    extra = ["--policy-steps=2", "--reward=reward-model", "--max-steps=2", f"--objective={objective}"]
    passes = sealed_passes(afd, [*flags, *extra], monkeypatch)
    assert passes >= 6  # SFT, and two stages more


@pytest.mark.parametrize(
    "objective",
    [["--objective=irl", "--lora-rank=4"], ["--objective=reverse-kl", "--policy-steps=8", "--replay=0.5"]],
    ids=" ".join,
)
def test_resume_after_kill_continues_with_the_very_metrics(flags, tmp_path, objective):
    resumed_equals_uninterrupted(afd, [*flags, *objective, "--epochs=1", "--save-every=3"], tmp_path)


def test_with_lora_every_stage_runs(flags, tmp_path):
    start(afd, *flags, "--lora-rank=4", "--run-name=x", "--epochs=3", "--policy-epochs=2")
    assert summary_of(tmp_path / "x")["score_after"] > summary_of(tmp_path / "x")["score_before"] + 0.5


def test_the_discriminator_learns_alone_first(flags, tmp_path):
    """During --discriminator-warmup nothing of the policy changes: its steps log none of its metrics, its KL
    to π_SFT begins at 0, and replies are scored by one that has learnt."""
    alone = ["--objective=js", "--epochs=1", "--discriminator-warmup=3", "--policy-steps=2"]
    start(afd, *flags, *alone, "--run-name=alone")
    rows = [row for row in metrics_of(tmp_path / "alone") if "adversarial/reward" in row]
    assert ["adversarial/kl" in row for row in rows] == [False, False, False, True, True]
    assert rows[0]["adversarial/discriminator_loss"] > rows[3]["adversarial/discriminator_loss"]
    assert rows[3]["adversarial/kl"] == pytest.approx(0, abs=1e-5) and rows[4]["adversarial/kl"] != 0


# --- data and mistakes -------------------------------------------------------------------------


def test_only_demonstrations_the_judge_likes_are_kept(flags, tmp_path, capsys):
    flags = [f for f in flags if not f.startswith("--min-demo")]
    start(
        afd,
        *flags,
        "--min-demonstration-score=4",
        "--dev-prompts=4",
        "--objective=forward-kl",
        "--max-steps=1",
        "--run-name=x",
    )
    assert re.search(r"demonstrations: \d+ of 64 score at least 4", capsys.readouterr().out)


def test_demonstrations_from_a_file(flags, world, tmp_path, capsys):
    held_out = {data.prompt_text(r.prompt) for r in data.load_rows(f"{world}/prompts.jsonl", held_out=16)[1]}
    rows = [json.loads(line) for line in (world / "demonstrations.jsonl").read_text().splitlines()]
    flags = [f for f in flags if not f.startswith("--dataset")] + [
        f"--dataset={world}/prompts.jsonl",
        "--max-steps=2",
    ]
    good = tmp_path / "demos.jsonl"
    good.write_text("\n".join(json.dumps(row) for row in rows if row["prompt"] not in held_out))
    start(afd, *flags, f"--demonstrations={good}", "--objective=forward-kl", "--run-name=x")
    leaky = tmp_path / "leaky.jsonl"
    for row in rows:  # written otherwise, still a leak
        row["prompt"] = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
    leaky.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as stop:
        start(afd, *flags, f"--demonstrations={leaky}", "--run-name=y")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(r"leaky\.jsonl: 16 of its prompts are held out", error), error


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--demonstrations=nothing"], "no column 'nothing'"),
        (["--demonstrations=missing.jsonl"], r"--demonstrations missing\.jsonl: no such file"),
        (["--pairs", "preference", "--preferences=data"], "has no chosen and rejected"),
        (["--pairs", "init-sft", "init-sft"], "each construction once"),
        (["--objective=js", "--reward-loss=bradley-terry"], "js needs --reward-loss classification"),
        (["--dev-prompts=500"], "leaves none to learn from"),
        (["--sft-model=/no/such/folder"], "--sft-model /no/such/folder: no such folder"),
        (["--temperature=0"], "greedy"),
        (
            ["--reward-model={world}/model", "--extrapolate=best-of-n"],
            "--reward-model .*holds a LlamaForCausalLM; .*ForSequenceClassification",
        ),
        (["--reward-model={world}/model"], "Add --reward reward-model"),
        (["--objective=js", "--batch-size=1", "--samples-per-prompt=1"], "leaves no other sample"),
        (["--replay=1"], r"--replay must lie in \[0, 1\)"),
        (["--samples-per-prompt=1"], "--samples-per-prompt must be at least 2"),
        (["--min-demonstration-score=99"], "no demonstration scores that much"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_message(flags, world, tmp_path, capsys, extra, message):
    extra = [e.format(world=world) for e in extra]
    with pytest.raises(SystemExit) as stop:
        start(
            afd,
            *[f for f in flags if not any(f.startswith(e.partition("=")[0] + "=") for e in extra)],
            *extra,
            "--run-name=x",
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "x").exists()


def test_empty_demonstrations_are_refused(flags, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n".join(json.dumps({"prompt": f"sun {i}", "response": " "}) for i in range(30)))
    with pytest.raises(SystemExit):
        start(afd, *flags, f"--demonstrations={empty}")
    assert "no usable row (dropped: 30 empty)" in capsys.readouterr().err


@pytest.mark.skipif(not HH.exists(), reason="the shared HH-RLHF file is not here")
def test_hh_rlhf_splits_at_the_last_assistant_turn():
    train, test = data.load_rows(str(HH), ("chosen", "rejected"), 200, "chosen")
    row = next(row for row in train if len(row.prompt) == 5)
    assert row.prompt[-1]["role"] == "user" and [m["role"] for m in row.prompt[:3]] == [
        "user",
        "assistant",
        "user",
    ]
    assert row.response == row.chosen and row.chosen != row.rejected and "\n\nAssistant:" not in row.chosen
    assert not {data.prompt_text(r.prompt) for r in train} & {data.prompt_text(r.prompt) for r in test}
