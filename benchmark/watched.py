"""A script's run, watched by a second judge: every few steps the policy answers held-out prompts, and is
scored by the judge it is trained on (the proxy) and by one that no step asks (the gold).

    python benchmark/watched.py selm --gold sentiment --judge hf:RUN/model     # and selm.py's other flags

Adds watched.jsonl to the run folder, a line for step 0 and every --every steps:

    kl             mean over the policy's replies of log π(y) − log π_start(y), nats a reply
    proxy, gold    mean log-odds of p(policy's reply ≻ starting model's reply to the same prompt), in nats
    *_win_rate     the share of prompts on which that is above 0, ties ½
    length, distinct_2    of the policy's replies: tokens, and distinct bigrams over all bigrams

The scripts know nothing of it: their samples are functions of their seeds, so watching changes none of them.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable

import record
import torch

sys.path.insert(0, str(record.ROOT))

import common
from cleanalign.command_line import command_line
from cleanalign.models import load_model
from cleanalign.statistics import distinct_n, win_rate_interval
from experiment import Experiment, sampling_settings
from judges import Judge, both_orders, load_judge

PROMPTS = 96  # of the held-out ones


def main() -> None:
    """Run the script that the first argument names, watched."""
    name, argv = sys.argv[1], sys.argv[2:]
    gold, argv = taken(argv, "--gold", "sentiment")
    every, argv = taken(argv, "--every", "8")
    script = importlib.import_module(name)
    plain = script.set_up

    def set_up(*words):
        exp = plain(*words)
        watch(exp, load_judge(gold, exp.device, "--gold"), int(every))
        return exp

    script.set_up = set_up
    command_line(script.main, script.RECIPES, argv)


def taken(argv: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of `flag` in `argv`, and the words without it."""
    if flag not in argv:
        return default, argv
    i = argv.index(flag)
    return argv[i + 1], [*argv[:i], *argv[i + 2 :]]


def watch(exp: Experiment, gold: Judge, every: int) -> None:
    """Have `exp` measured when it begins, and whenever it logs a step that `every` divides."""
    begin = exp.begin

    def begin_watched(*how) -> None:
        begin(*how)
        start = load_model(exp.args.model, exp.dtype, exp.device, exp.attention)
        beside = [group[0] for group in exp.texts(answers(exp, start))]
        judges = {"proxy": against(exp.judge, exp, beside), "gold": against(gold, exp, beside)}
        log = exp.run.log

        def log_watched(step: int, metrics: dict, **more) -> None:
            log(step, metrics, **more)
            if step % every == 0:
                measure(exp, start, judges, step)

        exp.run.log = log_watched
        measure(exp, start, judges, 0)

    exp.begin = begin_watched


def answers(exp: Experiment, model, draw: int = 0) -> list[list[list[int]]]:
    """One reply of `model` to each watched prompt."""
    seed = common.derive_seed("watched", draw)
    return common.sample(
        model, exp.eval_prompts[:PROMPTS], exp.ends, seed=seed, **sampling_settings(exp.args)
    )


@torch.no_grad()
def measure(exp: Experiment, start, judges: dict[str, Callable], step: int) -> None:
    """Append one line to watched.jsonl."""
    args, prompts = exp.args, exp.eval_prompts[:PROMPTS]
    with exp.run.phase("watching"):
        replies = answers(exp, exp.policy, 1)
        texts = [group[0] for group in exp.texts(replies)]
        of_policy, of_start = (
            common.sequence_logprobs(
                model, prompts, replies, args.temperature, exp.device, args.micro_batch_tokens
            )
            for model in (exp.policy, start)
        )
        kl = sum(a[0] - b[0] for a, b in zip(of_policy, of_start, strict=True)) / len(prompts)
        row = {"step": step, "kl": kl}
        for name, log_odds in judges.items():
            odds = log_odds(texts)
            row[name] = odds.mean().item()
            row[f"{name}_win_rate"] = win_rate_interval(odds.sigmoid().tolist(), resamples=1)[0]
        row["length"] = sum(len(group[0]) for group in replies) / len(prompts)
        row["distinct_2"] = distinct_n(texts, 2)
    with open(exp.run.folder / "watched.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def against(judge: Judge, exp: Experiment, beside: list[str]) -> Callable[[list[str]], torch.Tensor]:
    """log_odds(replies) of p(reply ≻ the starting model's), (B,): of a scalar judge the scaled difference of
    scores, exactly; those of `beside` are asked once."""
    asked = [row.prompt for row in exp.eval_rows[:PROMPTS]]
    if judge.score is None:
        return lambda replies: torch.logit(both_orders(judge, asked, replies, beside), eps=1e-6)
    theirs = judge.score(asked, beside)
    return lambda replies: judge.scale * (judge.score(asked, replies) - theirs)


if __name__ == "__main__":
    main()
