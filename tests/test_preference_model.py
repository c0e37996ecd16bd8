"""preference_model.py: its loss, the tokens it learns from, its folder as a judge, cycles, splits, resume,
bad input; the estimators it reports."""

import json
import math
import re
from itertools import combinations, permutations

import pytest
import tiny
import torch
import transformers
from running import metrics_of, resumed_equals_uninterrupted, start, summary_of

import preference_model
from cleanalign import statistics
from cleanalign.data import load_rows, parse_row
from cleanalign.errors import UserError
from cleanalign.models import load_tokenizer
from judges import both_orders, load_judge

KINDS = ("reward", "pairwise")
CYCLE = ("cat", "dog", "sun")  # each beats the next, and the last the first


@pytest.fixture(scope="session")
def answering(tmp_path_factory):
    """A tiny model whose tokenizer has the words of a pairwise question, A and B among them."""
    path = tmp_path_factory.mktemp("answering")
    words = tiny.tokenizer(extra=("A", "B", "[CONTEXT]", "[RESPONSE", "A]", "B]", "<turn>"))
    words.save_pretrained(path)
    tiny.model(len(words)).save_pretrained(path)
    return path


@pytest.fixture
def flags(flags, world, answering):
    """The tiny world's flags for preference_model: pairs of which the good one is preferred."""
    kept = [f for f in flags if not f.startswith(("--model", "--dataset"))]
    return [
        *kept,
        f"--model={answering}",
        f"--dataset={world}/pairs.jsonl",
        "--pairs-per-prompt=None",
        "--learning-rate=0.01",
        "--epochs=4",
    ]


def write_rows(path, rows) -> str:
    """Rows as a JSONL file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def cycle_file(path) -> str:
    """Every prompt with all three pairs of `CYCLE`, each in an order of its own."""
    rows = []
    for i, (x, y) in enumerate(permutations(tiny.WORDS[:12], 2)):
        for j, (a, b) in enumerate(((0, 1), (1, 2), (2, 0))):
            a, b, p = (CYCLE[a], CYCLE[b], 1.0) if (i + j) % 2 else (CYCLE[b], CYCLE[a], 0.0)
            rows.append({"prompt": f"{x} {y}", "a": a, "b": b, "p": p})
    return write_rows(path, rows)


def predictions_of(folder) -> list[dict]:
    """The rows of a run's predictions.jsonl."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def judge_of(folder):
    """The judge that a run's summary says how to load."""
    return load_judge(summary_of(folder)["judge"])


# --- the loss ----------------------------------------------------------------------------------


def test_loss_of_a_reward_model_is_bradley_terry():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    p = torch.tensor([1, 0, 1, 0.5, 0.3, 0, 1], dtype=torch.float64)
    wins = a.exp() / (a.exp() + b.exp())
    expected = -(p * wins.log() + (1 - p) * (1 - wins).log()).mean()
    torch.testing.assert_close(preference_model.comparison_loss((a - b)[:, None], p[:, None]), expected)
    z = (a - b)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: preference_model.comparison_loss(z, p[:, None]), z)


def test_loss_asks_both_orders_and_a_tie_pulls_to_a_half():
    p = torch.tensor([[0.8]], dtype=torch.float64)
    first, second = 0.7, -1.1  # log-odds of a ≻ b with a first, and with b first
    sigma = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    one = -0.8 * math.log(sigma(first)) - 0.2 * math.log(sigma(-first))
    other = -0.8 * math.log(sigma(second)) - 0.2 * math.log(sigma(-second))
    z = torch.tensor([[first, second]], dtype=torch.float64)
    assert preference_model.comparison_loss(z, p).item() == pytest.approx((one + other) / 2, rel=1e-12)
    for target, log_odds in ((0.5, 0.0), (0.8, math.log(4))):  # the least loss is at the target
        z = torch.tensor([[log_odds]], dtype=torch.float64, requires_grad=True)
        preference_model.comparison_loss(z, torch.tensor([[target]], dtype=torch.float64)).backward()
        assert z.grad.item() == pytest.approx(0, abs=1e-12)


# --- what it reads -----------------------------------------------------------------------------

DIALOGUE = [
    {"role": "user", "content": "why the cat"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and you"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_from_the_very_numbers_that_the_judge_gives(kind, flags, answering, tmp_path):
    """The log-odds in training, of texts that share their beginning, are the finished judge's of one text a
    row."""
    start(preference_model, *flags, f"--kind={kind}", "--max-steps=2", "--run-name=x")
    folder = tmp_path / "x" / "model"
    tokenizer, judge = load_tokenizer(str(folder)), judge_of(tmp_path / "x")
    args = preference_model.Args(kind=kind)
    asked = ["good cat", DIALOGUE, "the moon", "sea"]
    a, b = ["fine", "the dog dog dog", "yes no", "we like"], ["bad bad", "no", "yes", "we like"]
    answers = [preference_model.Answers("", x, [y, z], [1.0]) for x, y, z in zip(asked, a, b, strict=True)]
    read = [preference_model.example_of(tokenizer, group, args) for group in answers]
    data = preference_model.collate_read([e.prompt for e in read], [e.completions for e in read], "cpu")
    letters = None
    if kind == "reward":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        letters = preference_model.answer_tokens(tokenizer, "")
    z = preference_model.log_odds(model, data, letters)  # (4, 1) or (4, 2)
    torch.testing.assert_close(z[:, 0].sigmoid(), judge.preference(asked, a, b), atol=2e-6, rtol=0)
    if kind == "pairwise":
        torch.testing.assert_close(1 - z[:, 1].sigmoid(), judge.preference(asked, b, a), atol=2e-6, rtol=0)
        assert (z[:, 0] - z[:, 1]).abs().max() > 1e-3  # one order is not the other
    assert z.std() > 1e-3


def test_all_pairs_of_a_prompt_s_replies():
    """Four replies read once make six pairs, whose loss is the mean of the six."""
    answers = preference_model.Answers("x", "cat", ["a", "b", "c", "d"], [1.0, 0.0, 0.5, 1.0, 0.25, 0.0])
    pairs = answers.pairs()
    told = {(p.replies[0], p.replies[1]): p.preferences[0] for p in pairs}
    assert told == {
        ("a", "b"): 1.0,
        ("a", "c"): 0.0,
        ("a", "d"): 0.5,
        ("b", "c"): 1.0,
        ("b", "d"): 0.25,
        ("c", "d"): 0.0,
    }
    assert len({p.row_id for p in pairs}) == 6
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7])
    i, j = preference_model.pairs_of(4)
    together = preference_model.comparison_loss(
        (scores[i] - scores[j])[None], torch.tensor([answers.preferences])
    )
    apart = []
    for pair, x, y in zip(pairs, i, j, strict=True):
        z = (scores[x] - scores[y]).reshape(1, 1)
        apart.append(preference_model.comparison_loss(z, torch.tensor([pair.preferences])))
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_a_reward_model_without_chat_template_reads_what_its_judge_does(flags, world, tmp_path):
    kept = [f for f in flags if not f.startswith("--model")]
    start(preference_model, *kept, f"--model={world}/plain", "--run-name=x")
    assert summary_of(tmp_path / "x")["accuracy"] > 0.9
    tokenizer, judge = load_tokenizer(str(tmp_path / "x" / "model")), judge_of(tmp_path / "x")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "x" / "model")
    expected = []
    for reply in ("good sun", "bad bad dog"):
        ids = preference_model.reward_ids(tokenizer, "the cat", reply)
        assert tokenizer.decode(ids) == f"the cat {reply}"
        expected.append(model(torch.tensor([ids])).logits.item())
    assert judge.score(["the cat"] * 2, ["good sun", "bad bad dog"]).tolist() == pytest.approx(
        expected, abs=1e-5
    )


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_its_folder_is_the_judge_it_measured(kind, lora, flags, world, tmp_path):
    start(preference_model, *flags, f"--kind={kind}", f"--lora-rank={lora}", "--run-name=x")
    summary, rows, judge = (
        summary_of(tmp_path / "x"),
        predictions_of(tmp_path / "x"),
        judge_of(tmp_path / "x"),
    )
    assert summary["accuracy"] > 0.9 and summary["log_loss"] < 0.4
    assert (judge.score is None) == (kind == "pairwise")
    asked, a, b, predicted = ([row[key] for row in rows] for key in ("prompt", "a", "b", "prediction"))
    assert both_orders(judge, asked, a, b).tolist() == predicted
    assert len(rows) == summary["eval_pairs"] == 16
    right = [p > 0.5 for p in predicted]  # a is the preferred one
    assert summary["accuracy"] == sum(right) / 16
    assert summary["log_loss"] == pytest.approx(-sum(math.log(p) for p in predicted) / 16, abs=1e-5)
    for name in ("reliability.png", "curves.png", "model/README.md"):
        assert (tmp_path / "x" / name).exists(), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_pairs_the_model_answers_and_the_judge_prefers(kind, flags, world, tmp_path):
    kept = [f for f in flags if not f.startswith("--dataset")]
    prompts = write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": f"{x} {y}"} for x, y in permutations(tiny.WORDS[:24], 2)]
    )
    more = [f"--dataset={prompts}", f"--kind={kind}", "--num-prompts=100", "--eval-judge=polarity"]
    more += ["--samples-per-prompt=4", "--labels=hard"]
    start(preference_model, *kept, *more, "--run-name=x")
    rows, summary = predictions_of(tmp_path / "x"), summary_of(tmp_path / "x")
    teacher = load_judge(f"{world}/judges.py:more_good")
    asked, a, b = ([row[key] for row in rows] for key in ("prompt", "a", "b"))
    verdicts = [preference_model.verdict(p) for p in both_orders(teacher, asked, a, b).tolist()]
    assert [row["preference"] for row in rows] == verdicts and 0.5 in verdicts
    assert len(rows) == 48 == 3 * len(set(asked))  # three replies each, all their pairs
    assert summary["train_pairs"] == 600  # four replies each, all their pairs
    assert summary["eval_ties"] == verdicts.count(0.5) and summary["accuracy"] > 0.65
    assert 0 <= summary["eval_judge_agreement"] <= 1
    assert (summary["order_agreement"] is None) == (kind == "reward")


def test_a_pairwise_model_learns_a_cycle_and_a_reward_model_cannot(flags, tmp_path):
    kept = [f for f in flags if not f.startswith("--dataset")]
    kept += [f"--dataset={cycle_file(tmp_path / 'cycle.jsonl')}", "--epochs=6", "--learning-rate=0.005"]
    for kind in KINDS:
        start(preference_model, *kept, f"--kind={kind}", f"--run-name={kind}")
    pairwise, reward = (summary_of(tmp_path / kind) for kind in ("pairwise", "reward"))
    assert (
        pairwise["accuracy"] > 0.95 and pairwise["cyclic_triples"] > 0.9 and pairwise["order_agreement"] > 0.9
    )
    assert pairwise["triples"] == 16
    assert reward["accuracy"] < 0.7 and reward["cyclic_triples"] is None  # two thirds at most


def test_soft_labels_teach_how_much(flags, tmp_path):
    """Everybody prefers by three to one: learnt as a choice the judge is sure, as a share it is not."""
    rows = []
    for x, y in permutations(tiny.WORDS[:12], 2):
        rows.append({"prompt": f"{x} {y}", "a": f"bad {x}", "b": f"good {y}", "p": 0.25})
    kept = [f for f in flags if not f.startswith("--dataset")]
    kept.append(f"--dataset={write_rows(tmp_path / 'soft.jsonl', rows)}")
    for labels in ("soft", "hard"):
        start(preference_model, *kept, f"--labels={labels}", f"--run-name={labels}")
    soft, hard = (predictions_of(tmp_path / labels) for labels in ("soft", "hard"))
    assert all(row["a"].startswith("good") for row in soft)  # the preferred one is a
    assert {row["preference"] for row in soft} == {0.75} and {row["preference"] for row in hard} == {1.0}
    assert sum(row["prediction"] for row in soft) / len(soft) == pytest.approx(0.75, abs=0.08)
    assert sum(row["prediction"] for row in hard) / len(hard) > 0.95
    assert summary_of(tmp_path / "soft")["log_loss_floor"] == pytest.approx(0.5623, abs=1e-4)


def test_no_prompt_stands_on_both_sides(flags, tmp_path, monkeypatch):
    """Of prompts with three pairs each, all pairs are on one side; --pairs-per-prompt takes some."""
    learnt = []
    plain = preference_model.example_of
    monkeypatch.setattr(preference_model, "example_of", lambda t, x, a: learnt.append(x) or plain(t, x, a))
    kept = [f for f in flags if not f.startswith("--dataset")]
    kept += [f"--dataset={cycle_file(tmp_path / 'cycle.jsonl')}", "--max-steps=1", "--num-prompts=None"]
    start(preference_model, *kept, "--run-name=x")
    trained, held_out = {c.asked for c in learnt}, {row["prompt"] for row in predictions_of(tmp_path / "x")}
    assert len(trained) == 116 and len(held_out) == 16 and not trained & held_out
    assert len(learnt) == 3 * 116 and summary_of(tmp_path / "x")["eval_pairs"] == 3 * 16
    learnt.clear()
    start(preference_model, *kept, "--pairs-per-prompt=2", "--run-name=y")
    assert len(learnt) == 2 * 116 and summary_of(tmp_path / "y")["eval_pairs"] == 2 * 16


def test_measuring_on_another_file(flags, world, tmp_path):
    other = [{"prompt": f"moon {w}", "chosen": "good sea", "rejected": f"bad {w}"} for w in tiny.WORDS[:9]]
    file = write_rows(tmp_path / "other.jsonl", other)
    start(preference_model, *flags, f"--eval-dataset={file}", "--run-name=x")
    assert {row["prompt"] for row in predictions_of(tmp_path / "x")} == {row["prompt"] for row in other}
    assert summary_of(tmp_path / "x")["train_pairs"] == 80  # nothing of the first file is held out


@pytest.mark.parametrize("kind", KINDS)
def test_resume_after_kill_continues_with_the_very_metrics(kind, flags, world, tmp_path):
    kept = [f for f in flags if not f.startswith("--dataset")]
    more = [f"--dataset={world}/prompts.jsonl", f"--kind={kind}", "--save-every=3"]
    resumed_equals_uninterrupted(preference_model, [*kept, *more], tmp_path, ("accuracy", "log_loss"))
    whole, resumed = (predictions_of(tmp_path / name) for name in ("whole", "killed"))
    assert whole == resumed


def test_a_run_that_stopped_after_training_is_measured_when_resumed(flags, tmp_path, monkeypatch):
    start(preference_model, *flags, "--run-name=whole")
    with monkeypatch.context() as broken:
        broken.setattr(preference_model, "measure", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(SystemExit):
            start(preference_model, *flags, "--run-name=stopped")
    assert not (tmp_path / "stopped" / "summary.json").exists()
    monkeypatch.setattr(preference_model, "train", lambda *_: pytest.fail("trained again"))
    start(preference_model, f"--resume={tmp_path}/stopped")
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert summary_of(tmp_path / "stopped")["log_loss"] == summary_of(tmp_path / "whole")["log_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_rehearses_a_step(kind, tmp_path):
    """As long as can be: prompt and reply, or the question in both orders."""
    flags = ["--model=smollm2-135m", f"--kind={kind}", "--dry-run", "--device=cpu", f"--run-dir={tmp_path}"]
    start(preference_model, *flags, "--batch-size=2", "--run-name=x")
    report = json.loads((tmp_path / "x" / "dry_run.json").read_text())
    assert report["phases"]["training"]["tokens"] > 0
    assert not (tmp_path / "x" / "model").exists()


# --- bad input ---------------------------------------------------------------------------------

BAD_ROWS = {
    "half": [{"prompt": "cat", "chosen": "good", "rejected": "bad"}, *({"prompt": w} for w in tiny.WORDS)],
    "no-p": [{"prompt": w, "a": "good", "b": "bad"} for w in tiny.WORDS],
    "p-outside": [{"prompt": w, "a": "good", "b": "bad", "p": 1.5} for w in tiny.WORDS],
    "p-text": [{"prompt": w, "a": "good", "b": "bad", "p": "often"} for w in tiny.WORDS],
    "same": [{"prompt": w, "chosen": "good", "rejected": "good"} for w in tiny.WORDS],
    "ties": [{"prompt": w, "a": "good", "b": "bad", "p": 0.5} for w in tiny.WORDS],
    "long": [{"prompt": w, "chosen": "good " * 9, "rejected": "bad"} for w in tiny.WORDS],
    "leak": [{"prompt": "good good good", "chosen": "good", "rejected": "bad"}],
}


@pytest.mark.parametrize(
    "extra,message",
    [
        (
            ["--dataset=half"],
            r"1 of \d+ rows have both chosen and rejected \(or a and b\); all must, or none",
        ),
        (["--dataset=no-p"], r"no-p\.jsonl:1: columns 'a' and 'b' need a column 'p'"),
        (["--dataset=p-outside"], r"column 'p' must be a number in \[0, 1\].* not 1\.5"),
        (["--dataset=p-text"], r"p-text\.jsonl:1: column 'p' must be a number in \[0, 1\].* not 'often'"),
        (["--dataset=same"], "no usable row .*twice the same reply"),
        (["--dataset=long"], "no usable row .*with a reply longer than --max-new-tokens 6"),
        (["--dataset=missing.jsonl"], r"--dataset missing\.jsonl: no such file"),
        (["--eval-dataset=leak"], "of its prompts are held out for evaluation"),
        (["--eval-dataset=missing.jsonl"], r"--eval-dataset missing\.jsonl: no such file"),
        (["--dataset=prompts", "--eval-dataset=leak"], "--eval-dataset needs pairs in --dataset too"),
        (["--kind=pairwise", "--model=plain"], r"--model .*plain: its tokenizer has no chat template"),
        (["--kind=pairwise", "--model=model"], "--model .*model: A and B must be one token each"),
        (
            ["--max-prompt-length=999", "--max-new-tokens=999", "--dataset=endless"],
            "the judge would have to read 309 tokens, and .* can read 256",
        ),
        (["--epochs=0"], "--epochs must be at least 1, got 0"),
        (["--samples-per-prompt=1"], "--samples-per-prompt must be at least 2 to make a pair, got 1"),
        (["--pairs-per-prompt=0"], "--pairs-per-prompt must be at least 1, got 0"),
        (["--triple-prompts=-1"], "--triple-prompts must not be negative, got -1"),
        (["--learning-rate=0"], r"--learning-rate must be above 0, got 0\.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_message(flags, world, tmp_path, capsys, extra, message):
    for name, rows in BAD_ROWS.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    endless = [{"prompt": w, "chosen": "good " * 300, "rejected": "bad"} for w in tiny.WORDS]
    write_rows(tmp_path / "endless.jsonl", endless)
    extra = [re.sub(r"(dataset=)([\w-]+)$", rf"\1{tmp_path}/\2.jsonl", flag) for flag in extra]
    extra = [flag.replace(f"{tmp_path}/prompts", f"{world}/prompts") for flag in extra]
    extra = [re.sub(r"^--model=(\w+)$", rf"--model={world}/\1", flag) for flag in extra]
    replaced = {flag.split("=")[0] for flag in extra}
    kept = [flag for flag in flags if flag.split("=")[0] not in replaced]
    with pytest.raises(SystemExit) as stop:
        start(preference_model, *kept, *extra, "--run-name=x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "x" / "metrics.jsonl").exists()


def test_held_out_ties_alone_measure_nothing(flags, tmp_path, capsys):
    kept = [flag for flag in flags if not flag.startswith("--dataset")]
    with pytest.raises(SystemExit):
        file = write_rows(tmp_path / "ties.jsonl", BAD_ROWS["ties"])
        start(preference_model, *kept, f"--dataset={file}", "--max-steps=1", "--run-name=x")
    assert "every held-out pair is a tie" in capsys.readouterr().err


# --- rows --------------------------------------------------------------------------------------


def test_rows_with_a_probability_have_the_preferred_reply_first(tmp_path):
    """So that a script which reads chosen and rejected only learns the right thing."""
    row = parse_row("1", {"prompt": "x", "a": "one", "b": "two", "p": 0.2}, ("chosen", "rejected"))
    assert (row.chosen, row.rejected, row.preference) == ("two", "one", 0.8)
    row = parse_row("1", {"prompt": "x", "chosen": "one", "rejected": "two", "p": 0.9}, ())
    assert (row.chosen, row.rejected, row.preference) == ("one", "two", 0.9)
    assert parse_row("1", {"prompt": "x", "chosen": "one", "rejected": "two"}, ()).preference is None
    file = write_rows(
        tmp_path / "x.jsonl", [{"prompt": str(i), "a": "one", "b": "two", "p": 0.5} for i in range(9)]
    )
    assert {row.preference for row in load_rows(file)[0]} == {0.5}


# --- estimators --------------------------------------------------------------------------------


def test_log_loss_by_hand():
    predicted, target = [0.9, 0.2, 0.5, 0.7], [1.0, 0.0, 0.5, 0.25]
    by_hand = [math.log(0.9), math.log(0.8), math.log(0.5), 0.25 * math.log(0.7) + 0.75 * math.log(0.3)]
    assert statistics.log_loss(predicted, target) == pytest.approx(-sum(by_hand) / 4, rel=1e-12)
    assert statistics.log_loss([1.0, 0.0], [1.0, 0.0]) < 1e-6
    assert statistics.log_loss([0.0], [1.0]) == pytest.approx(-math.log(1e-7))  # sure and wrong: finite


def test_reliability_and_calibration_error_by_hand():
    predicted, target = [0.95, 0.05, 0.92, 0.62, 0.38, 0.5], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    table = statistics.reliability(predicted, target, bins=5)  # bins of width .1 from .5
    assert [row["pairs"] for row in table] == [1, 2, 3]
    confidences, frequencies = ([row[key] for row in table] for key in ("confidence", "frequency"))
    assert confidences == pytest.approx([0.5, 0.62, 0.94]) and frequencies == pytest.approx([0.5, 0.5, 2 / 3])
    expected = (2 * 0.12 + 3 * (0.94 - 2 / 3)) / 6
    assert statistics.calibration_error(table) == pytest.approx(expected)


def test_calibration_does_not_depend_on_which_reply_is_called_a():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 200, generator=generator, dtype=torch.float64).tolist()
    turned = [(1 - x, 1 - y) if i % 2 else (x, y) for i, (x, y) in enumerate(zip(p, q, strict=True))]
    error = statistics.calibration_error(statistics.reliability(p, q))
    again = statistics.calibration_error(statistics.reliability(*map(list, zip(*turned, strict=True))))
    assert error == pytest.approx(again) and error > 0.1


def test_a_calibrated_judge_has_almost_no_calibration_error_and_a_sure_one_has():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator)
    outcome = (torch.rand(20_000, generator=generator) < p).float().tolist()
    calibrated = statistics.reliability(p.tolist(), outcome)
    sure = statistics.reliability([float(x > 0.5) for x in p.tolist()], outcome)
    assert statistics.calibration_error(calibrated) < 0.02
    assert statistics.calibration_error(sure) == pytest.approx(0.25, abs=0.02)  # right at .75, and sure of it


def test_judged_right_leaves_ties_out():
    assert statistics.judged_right([0.9, 0.2, 0.5, 0.7], [0.6, 1.0, 0.0, 0.5]) == [1.0, 0.0, 0.5]


def test_cyclic_share_against_counting():
    generator = torch.Generator().manual_seed(0)
    upper = torch.rand(50, 5, 5, generator=generator).triu(1)
    upper[0, 0, 1] = 0.5  # a tie: no cycle through it
    p = upper + (1 - upper.transpose(1, 2)).tril(-1) + 0.5 * torch.eye(5)
    cycles = []
    for matrix in p.tolist():
        for triple in combinations(range(5), 3):
            wins = [sum(matrix[i][j] > 0.5 for j in triple if j != i) for i in triple]
            cycles.append(wins == [1, 1, 1] and 0.5 not in [matrix[i][j] for i, j in combinations(triple, 2)])
    assert statistics.cyclic_share(p) == pytest.approx(sum(cycles) / len(cycles), rel=1e-12)
    assert abs(statistics.cyclic_share(p) - 0.25) < 0.08  # coins
    scores = torch.randn(50, 5, generator=generator)
    assert statistics.cyclic_share(torch.sigmoid(scores[:, :, None] - scores[:, None])) == 0


def test_clustered_interval_draws_prompts():
    """A hundred copies of ten verdicts are ten verdicts; apart they are a thousand."""
    values = [1.0] * 6 + [0.0] * 4
    names = [str(i) for i in range(10)]
    low, high = statistics.clustered_interval(values * 100, names * 100)
    assert (low, high) == tuple(statistics.clustered_interval(values, names)) and high - low > 0.5
    low, high = statistics.clustered_interval(values * 100, [str(i) for i in range(1000)])
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.24 / 1000), rel=0.1)
