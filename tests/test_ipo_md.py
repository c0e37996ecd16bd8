"""ipo_md.py: its loss, whole runs that learn, the mixture's reference under LoRA, resume, bad input."""

import copy
import math
import re

import pytest
import tiny
import torch
from running import metrics_of, resumed_equals_uninterrupted, start, summary_of

import common
import ipo_md
from cleanalign import models
from judges import cycle_measure, load_judge


@pytest.mark.parametrize("kind", ["ipo", "dpo", "slic"])
def test_loss_against_the_formula_and_finite_differences(kind):
    generator = torch.Generator().manual_seed(0)
    x = [-20 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    p, tau = torch.rand(6, generator=generator, dtype=torch.float64), 0.3
    f = {
        "ipo": lambda h: (h - 1 / (2 * tau)) ** 2,
        "dpo": lambda h: math.log(1 + math.exp(-tau * h)),
        "slic": lambda h: max(0.0, 1 - tau * h),
    }[kind]
    expected = 0.0
    for a, b, ra, rb, q in zip(*(v.tolist() for v in (*x, p)), strict=True):
        h = (a - ra) - (b - rb)
        expected += (q * f(h) + (1 - q) * f(-h)) / 6
    assert ipo_md.preference_loss(*x, p, tau, kind).item() == pytest.approx(expected, rel=1e-12)
    free = [x[0].requires_grad_(), x[1].requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: ipo_md.preference_loss(a, b, x[2], x[3], p, tau, kind), free)


@pytest.mark.parametrize(
    "extra",
    [
        ["--beta=0.125"],
        ["--beta=0"],
        ["--loss=dpo", "--beta=0"],
        ["--loss=slic", "--labels=bernoulli"],
        ["--labels=argmax", "--length-normalize"],
    ],
    ids=" ".join,
)
def test_it_learns(flags, tmp_path, extra):
    start(ipo_md, *flags, *extra, "--run-name=x", "--num-prompts=None", "--epochs=5", "--learning-rate=0.01")
    summary, rows = summary_of(tmp_path / "x"), metrics_of(tmp_path / "x")
    assert summary["win_rate"] > 0.75 and summary["kl"] > 0.5
    assert ("mixture_agreement" in rows[0]) == ("--beta=0" not in extra)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 0.3


def test_offline_learns_the_data_sets_pairs(world, flags, tmp_path):
    flags = [f"--dataset={world}/pairs.jsonl" if f.startswith("--dataset") else f for f in flags]
    start(
        ipo_md,
        *flags,
        "--offline",
        "--run-name=x",
        "--num-prompts=None",
        "--epochs=5",
        "--learning-rate=0.003",
    )
    rows = metrics_of(tmp_path / "x")
    assert (
        rows[-1]["rewards/accuracy"] > 0.9
        and rows[-1]["loss"] < rows[0]["loss"]
        and "preference" not in rows[0]
    )


def test_resume_after_kill_continues_with_the_very_metrics(flags, tmp_path):
    flags += ["--num-prompts=None", "--epochs=2", "--learning-rate=0.003", "--save-every=3"]
    resumed_equals_uninterrupted(ipo_md, flags, tmp_path)


def test_with_lora_the_mixture_holds_the_unadapted_model(world):
    """After the adapter has moved, mixture sampling equals that of two separate models, and differs from the
    adapted one mixed with itself."""
    device, ends = torch.device("cpu"), [3]
    torch.manual_seed(0)
    policy = models.make_trainable(models.load_model(f"{world}/model", torch.float32, device), 4, 8, False)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    reference = models.starting_model(policy)
    merged = copy.deepcopy(policy).merge_and_unload()
    original = models.load_model(f"{world}/model", torch.float32, device)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    settings = dict(completions=4, max_new_tokens=6, seed=0)

    def draw(model, other):
        return common.sample(model, prompts, ends, mixture=(other, 0.5), **settings)

    def alone(model):
        return common.sample(model, prompts, ends, **settings)

    right = draw(merged, original)
    assert draw(policy, reference) == right
    assert draw(policy, policy) != right
    assert alone(policy) == alone(merged) != alone(original) == alone(reference)
    replies = [[r for r in group] for group in right]
    for ours, theirs in ((reference, original), (policy, merged)):
        a, b = (common.sequence_logprobs(m, prompts, replies, 1.0, device, 200) for m in (ours, theirs))
        assert [x for row in a for x in row] == pytest.approx([x for row in b for x in row], abs=1e-3)


def test_mixture_beside_unmixed_samples(world):
    """`unmixed`: the policy's own rows and the mixture's, in shared passes, are those of separate calls."""
    policy, reference = tiny.model(24, seed=1), tiny.model(24, seed=2)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]

    def draw(**mixture):
        settings = dict(completions=3, max_new_tokens=8, seed=0)
        return common.sample(policy, prompts, [3], **settings, **mixture)

    together, mixed, alone = draw(mixture=(reference, 0.5), unmixed=2), draw(mixture=(reference, 0.5)), draw()
    for g in range(3):
        assert together[g] == [*alone[g][:2], mixed[g][2]]


def test_cycle_judge():
    judge = load_judge("cycle")
    question, exclamation, statement = "Who are you?", "What a day! Great!", "It rains."
    assert judge.preference(
        ["x"] * 3, [question, exclamation, statement], [exclamation, statement, question]
    ).tolist() == [1, 1, 1]
    assert judge.preference(
        ["x"] * 3, [exclamation, statement, question], [question, exclamation, statement]
    ).tolist() == [0, 0, 0]
    assert judge.preference(["x"], ["Really? Yes!"], ["Wow!"]).item() == 0.5  # the last mark decides
    assert judge.score is None
    measured = cycle_measure([statement] * 6 + [question] * 3 + [exclamation])
    # exclamations beat the statements
    assert measured["exploitability"] == pytest.approx(0.6 + 0.5 * 0.1 - 0.5)
    assert cycle_measure([question, exclamation, statement])["exploitability"] == pytest.approx(0)


def test_cycle_run_logs_styles(flags, tmp_path):
    flags = [f for f in flags if not f.startswith("--judge")]
    start(ipo_md, *flags, "--judge=cycle", "--run-name=x", "--max-steps=2")
    assert {"exploitability", "style/question"} <= set(metrics_of(tmp_path / "x")[0])
    assert "exploitability_after" in summary_of(tmp_path / "x")


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--beta=1.5"], r"--beta must lie in \[0, 1\], got 1\.5"),
        (["--tau=0"], "--tau must be above 0, got 0"),
        (["--offline"], "no column 'chosen'"),
        (["--temperature=0"], "greedy"),
        (["--learning-rate=-1"], "--learning-rate must be above 0"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_message(flags, tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as stop:
        start(ipo_md, *flags, *extra, "--run-name=x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and "Traceback" not in error
    assert not (tmp_path / "x").exists()
