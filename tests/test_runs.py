"""Whole runs of selm.py in a tiny world: it learns, it resumes after kill -9, at α = 0 it is DPO, and its
folder is complete."""

import itertools
import json
import random
import re

import pytest
import torch
import transformers
from running import metrics_of, resumed_equals_uninterrupted, summary_of
from running import start as start_script

import common
import selm
from cleanalign.data import load_rows
from cleanalign.models import load_tokenizer
from cleanalign.optimization import MasterAdamW
from cleanalign.run import Run
from cleanalign.statistics import win_rate_interval
from judges import load_judge


def start(*argv):
    """Run selm.py in this process."""
    start_script(selm, *argv)


def test_it_learns_and_the_run_folder_is_complete(flags, tmp_path, capsys):
    """A synthetic preference (more "good" is better): the win rate against the starting model rises well
    above a half."""
    start(
        *flags,
        "--run-name=x",
        "--iterations=3",
        "--num-prompts=None",
        "--learning-rate=0.01",
        "--epochs=4",
        "--samples-per-prompt=4",
        "--beta=0.1",
    )
    folder = tmp_path / "x"
    summary = summary_of(folder)
    assert summary["win_rate"] > 0.75 and summary["win_rate_interval"][0] > 0.6
    assert summary["kl"] > 0.1 and summary["score_before"] is None and summary["eval_judge_win_rate"] is None
    for name in (
        "args.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "curves.png",
        "model/README.md",
    ):
        assert (folder / name).exists(), name
    assert list(folder.glob("events.*")) and list(folder.glob("checkpoint/*/state.pt"))
    saved = json.loads((folder / "args.json").read_text())
    assert saved["args"]["learning_rate"] == [0.01] and saved["versions"]["torch"] == torch.__version__
    # whoever doubts the win rate can recompute it
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rate, interval = win_rate_interval([s["preference"] for s in samples])
    assert (rate, interval) == (summary["win_rate"], summary["win_rate_interval"]) and len(samples) == 16
    # and the model loads with transformers alone
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "good cat"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert "win rate" in capsys.readouterr().out


def test_alpha_zero_has_the_metrics_of_a_dpo_run_written_apart(world, flags, tmp_path):
    start(
        *flags,
        "--run-name=x",
        "--iterations=1",
        "--num-prompts=40",
        "--learning-rate=0.003",
        "--alpha=0",
        "--samples-per-prompt=2",
        "--beta=0.2",
        "--warmup-ratio=0",
        "--seed=7",
    )
    ours = metrics_of(tmp_path / "x")

    # The same prompts and samples; everything after them written anew, with transformers and torch alone.
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model").requires_grad_(True)
    tokenizer = load_tokenizer(f"{world}/model")
    rows, prompts = common.encode_rows(
        tokenizer, load_rows(f"{world}/prompts.jsonl", held_out=16)[0], 64, 40, 7, "prompts"
    )
    samples = common.sample(
        model, prompts, [3], completions=2, max_new_tokens=6, seed=common.derive_seed(7, 1, 0)
    )
    judge = load_judge(f"{world}/judges.py:more_good")
    pairs = []
    for row, prompt, (a, b) in zip(rows, prompts, samples, strict=True):
        p = judge.preference(
            [row.prompt], [common.decode(tokenizer, a)], [common.decode(tokenizer, b)]
        ).item()
        if p != 0.5:
            pairs.append((prompt, a, b) if p > 0.5 else (prompt, b, a))

    def logprob(prompt, reply):
        logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(reply)), reply].sum()

    with torch.no_grad():
        reference = [[logprob(p, w), logprob(p, l)] for p, w, l in pairs]
    order = list(range(len(pairs)))
    random.Random(common.derive_seed(7, "order", 1, 0, 0)).shuffle(order)
    adam = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0)
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    assert len(batches) == len(ours) >= 3
    for batch, row in zip(batches, ours, strict=True):
        policy = torch.stack(
            [
                torch.stack([logprob(pairs[i][0], pairs[i][1]), logprob(pairs[i][0], pairs[i][2])])
                for i in batch
            ]
        )
        rewards = 0.2 * (policy - torch.tensor([reference[i] for i in batch]))
        margin = rewards[:, 0] - rewards[:, 1]
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        expected = {
            "loss": loss.detach(),
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/margin": margin.mean(),
            "rewards/accuracy": (margin > 0).float().mean(),
            "logps/chosen": policy[:, 0].mean(),
            "logps/rejected": policy[:, 1].mean(),
            "grad_norm": norm,
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value.item(), abs=2e-4, rel=2e-3), (row["step"], name)


def test_resume_after_kill_continues_with_the_very_metrics(flags, tmp_path):
    """kill -9 in the middle, somewhere in iteration 2; then --resume."""
    flags += [
        "--iterations=3",
        "--num-prompts=48",
        "--learning-rate=0.003",
        "--epochs=3",
        "--save-every=4",
        "--alpha=0.1",
    ]
    resumed_equals_uninterrupted(selm, flags, tmp_path)


def test_resume_refuses_other_arguments(flags, tmp_path, capsys):
    start(*flags, "--run-name=x", "--max-steps=2", "--save-every=1", "--num-prompts=30")
    with pytest.raises(SystemExit) as stop:
        start(f"--resume={tmp_path}/x", "--beta=0.7")
    assert stop.value.code == 2 and "--beta 0.7 (was 0.1)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(f"--resume={tmp_path}/x")
    assert "this run is finished" in capsys.readouterr().err


def test_a_run_that_goes_on_with_other_threads_says_so(flags, tmp_path, capsys, monkeypatch):
    """Two threads add a sum in another order than one, so the last digits may differ."""
    short = ["--max-steps=3", "--save-every=1", "--num-prompts=30"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(Run, "finish", interrupt)
        start(*flags, *short, "--run-name=x")
    torch.set_num_threads(2)
    try:
        start(f"--resume={tmp_path}/x")
    finally:
        torch.set_num_threads(1)
    assert "began on cpu, 1 threads and goes on on cpu, 2 threads" in capsys.readouterr().out


def test_offline_responses_middle_rank_and_warmup(world, flags, tmp_path):
    """The paper's recipe in small: one greedy answer beside the data set's two, after an offline epoch."""
    flags = [f"--dataset={world}/pairs.jsonl" if f.startswith("--dataset") else f for f in flags]
    flags += [
        "--offline-responses",
        "--offline-warmup",
        "--samples-per-prompt=1",
        "--temperature=0",
        "--num-prompts=None",
        "--learning-rate",
        "0.003",
        "0.001",
        "--alpha=0.1",
    ]
    start(*flags, "--run-name=x")
    rows = metrics_of(tmp_path / "x")
    assert {row["iteration"] for row in rows} == {0, 1, 2, 3}
    assert all(row["exploration_loss"] == 0 for row in rows if row["iteration"] == 0)
    assert max(row["learning_rate"] for row in rows if row["iteration"] == 2) == 0.001
    assert 0 <= rows[-1]["extra_forward"] <= 1


def test_own_answer_in_a_pair_costs_no_forward_pass(world, flags, monkeypatch, tmp_path):
    """K = 2: at α > 0 the model sees exactly the tokens it sees at α = 0."""
    seen = {}

    def tokens_at(alpha):
        count = []
        original = common.completion_logprobs
        monkeypatch.setattr(
            common,
            "completion_logprobs",
            lambda model, batch, *a, **k: (
                count.append(batch.input_ids.numel()) or original(model, batch, *a, **k)
            ),
        )
        start(
            *flags,
            f"--run-name=a{alpha}",
            "--max-steps=3",
            "--num-prompts=48",
            f"--alpha={alpha}",
            "--samples-per-prompt=2",
            "--learning-rate=1e-12",
        )
        monkeypatch.setattr(common, "completion_logprobs", original)
        seen[alpha] = sum(count)

    tokens_at(0.0)
    tokens_at(0.1)
    assert seen[0.0] == seen[0.1]


def test_xpo_and_lora_and_plain_text(world, flags, tmp_path):
    start(
        *flags,
        "--run-name=xpo",
        "--exploration=xpo",
        "--samples-per-prompt=1",
        "--max-steps=3",
        "--alpha=0.01",
        "--save-every=2",
    )
    assert len(metrics_of(tmp_path / "xpo")) == 3
    flags = [f"--model={world}/plain" if f.startswith("--model") else f for f in flags]
    start(
        *flags,
        "--run-name=lora",
        "--lora-rank=4",
        "--max-steps=3",
        "--num-prompts=48",
        "--learning-rate=0.01",
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "model").state_dict()
    before = transformers.AutoModelForCausalLM.from_pretrained(world / "plain").state_dict()
    assert set(merged) == set(before) and any((merged[k] != before[k]).any() for k in merged)


def test_nan_loss_stops_with_step_and_rows(world, flags, tmp_path, capsys, monkeypatch):
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == 4 else 1.0)

    original = selm.selm_loss
    monkeypatch.setattr(selm, "selm_loss", broken)
    with pytest.raises(SystemExit) as stop:
        start(*flags, "--run-name=x", "--save-every=2", "--num-prompts=60", "--iterations=1", "--alpha=0")
    message = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and "step 4: the loss is nan. Rows of this batch: prompts.jsonl:" in message
        and "Traceback" not in message
    )
    [kept] = (tmp_path / "x" / "checkpoint").iterdir()
    assert torch.load(kept / "state.pt", weights_only=True)["step"] == 2


def test_nan_in_one_micro_batch_names_its_rows_alone_and_never_reaches_the_weights(
    flags, capsys, monkeypatch
):
    calls, seen, updates = [], [], []
    loss, micro_batches, update = selm.selm_loss, common.micro_batches, MasterAdamW.step

    def broken(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (float("nan") if len(calls) == 6 else 1.0)

    def split(prompts, completions, max_tokens):
        parts = micro_batches(prompts, completions, max_tokens)
        if torch.is_grad_enabled():  # of a training step; the reference's log-probs are split too
            seen.append(parts)
        return parts

    monkeypatch.setattr(selm, "selm_loss", broken)
    monkeypatch.setattr(common, "micro_batches", split)
    monkeypatch.setattr(MasterAdamW, "step", lambda *args: updates.append(1) or update(*args))
    flags = [f for f in flags if not f.startswith("--micro-batch-tokens")]
    with pytest.raises(SystemExit):
        start(*flags, "--micro-batch-tokens=64", "--num-prompts=60", "--iterations=1", "--run-name=x")
    ends = list(itertools.accumulate(map(len, seen)))  # calls of the loss after each step
    step = next(i for i, end in enumerate(ends, 1) if end >= 6)
    bad = [part for parts in seen for part in parts][5]
    message = capsys.readouterr().err
    named = re.search(r"Rows of this batch: (.*?)\. ", message).group(1).split(", ")
    assert f"step {step}: the loss is nan" in message and len(named) == len(set(named)) == len(bad) < 8
    assert len(seen[step - 1]) > 1 and len(updates) == step - 1


BAD = [
    (["--model=smolm2-135m"], "Did you mean smollm2-135m"),
    (["--model=no/such-model-at-all"], "could not be loaded from the hub|no such repository"),
    (["--judge=sentimant"], "Did you mean sentiment"),
    (
        ["--judge=pairrm"],
        "--judge llm-blender/PairRM-hf: could not be loaded from the hub .*or --judge sentiment",
    ),
    (["--dataset=nowhere.jsonl"], "no such file"),
    (["--beta=-1"], "--beta must be above 0, got -1"),
    (["--alpha=-1"], "--alpha must not be negative"),
    (["--temperature=-0.5"], "--temperature must not be negative"),
    (["--samples-per-prompt=1"], "at least 2 samples a prompt"),
    (["--temperature=0"], "greedy"),
    (["--top-p=0"], "--top-p must lie in"),
    (["--resume=nowhere"], "no such run folder"),
    (["--device=cuda"], "not present on this machine"),
    (["--offline-responses"], "no column 'chosen'"),
]


@pytest.mark.parametrize("extra,message", BAD, ids=[" ".join(extra) for extra, _ in BAD])
def test_bad_input_is_one_clear_message(flags, tmp_path, capsys, extra, message):
    if extra == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    kept = [f for f in flags if f.split("=")[0] not in {e.split("=")[0] for e in extra}]
    with pytest.raises(SystemExit) as stop:
        start(*kept, *extra, "--run-name=x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error), error
    assert "Traceback" not in error and len(error.strip().splitlines()) <= 3
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("recipe", ["llama3-8b", "zephyr-7b", "phi3-mini"])
def test_the_papers_recipes_reach_for_its_judge(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        start(f"--model={recipe}", "--device=cpu")
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and "--judge llm-blender/PairRM-hf: could not be loaded from the hub" in error
    ), error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "raised,message",
    [
        (
            "You are trying to access a gated repo.\nMake sure to have access",
            "gated. Accept its licence on its page, then set HF_TOKEN",
        ),
        (
            "org/x is not a local folder and is not a valid model identifier listed on the hub",
            "no such repository on the hub",
        ),
        (
            "We couldn't connect to the hub\nCheck your connection",
            "could not be loaded from the hub .*local folder, or --model smollm2-135m",
        ),
    ],
)
def test_hub_models_that_cannot_be_had(flags, monkeypatch, capsys, raised, message):
    def refuse(*_, **__):
        raise OSError(raised)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(SystemExit) as stop:
        start(*flags, "--model=org/x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error, re.S), error
    assert len(error.strip().splitlines()) <= 2


def test_existing_run_folder_is_never_written_over(flags, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        start(*flags, "--run-name=x")
    assert stop.value.code == 2 and "exists already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["precious"]


def test_all_tied_says_so(flags, world, capsys):
    with pytest.raises(SystemExit) as stop:
        start(*flags, f"--judge={world}/judges.py:always_tied", "--num-prompts=30")
    assert stop.value.code == 2 and "every candidate tied" in capsys.readouterr().err


def test_several_processes_are_refused(flags, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        start(*flags)
    assert stop.value.code == 2 and "WORLD_SIZE=2" in capsys.readouterr().err
