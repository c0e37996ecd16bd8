"""A scalar reward for a judge that has none: Bradley-Terry fitted to the cycle judge on pairs of the starting
model's replies.

    python benchmark/cycle_reward.py --model runs/NAME/model    # samples, asks the judge, fits, writes
    python nash_md.py --objective rlhf --judge benchmark/cycle_reward.py:reward --eval-judge cycle

The judge sees nothing of a reply but its style, so the best scalar is one number a style: the
maximum-likelihood r of p(a ≻ b) = σ(r(a) − r(b)), summed over the pairs. This is what RLHF does to
preferences, without a reward model's own errors.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as a judge this file is loaded by its path

import record
import torch

import common
from cleanalign.data import load_rows
from cleanalign.models import end_tokens, load_model, load_tokenizer, resolve_dtype
from judges import STYLES, cycle_measure, cycle_preference, style


@cache
def _rewards(name: str) -> list[float]:
    return list(json.loads((record.RESULTS / f"{name}.json").read_text())["reward"].values())


def reward(prompts: list[str], replies: list[str]) -> list[float]:
    """The scalar of each reply's style, fitted to replies of SmolLM2 that was taught human ones."""
    return [_rewards("cycle_reward")[style(reply)] for reply in replies]


def small_reward(prompts: list[str], replies: list[str]) -> list[float]:
    """The same, fitted to replies of the small model that `benchmark/compare.py cycle` starts from."""
    return [_rewards("cycle_small_reward")[style(reply)] for reply in replies]


# the run's log shows style shares and exploitability, as under the judge itself
reward.measure = small_reward.measure = cycle_measure


def fit(first: list[str], second: list[str]) -> torch.Tensor:
    """(3,) maximum-likelihood Bradley-Terry rewards of the styles, mean 0, for pairs of replies and the cycle
    judge's p."""
    a, b = (torch.tensor([style(reply) for reply in side]) for side in (first, second))
    p = cycle_preference([""] * len(first), first, second)
    r = torch.zeros(len(STYLES), requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(r[a] - r[b], p)
        value.backward()
        return value

    optimizer.step(loss)
    return (r - r.mean()).detach()


def main(model: str, name: str = "cycle_reward", prompts: int = 512) -> None:
    """Sample two replies to each of `prompts` training prompts of chitchat from `model`, fit, write to
    results/`name`.json."""
    device = torch.device("cpu")
    policy = load_model(model, resolve_dtype("auto", device), device, "eager")
    tokenizer = load_tokenizer(model)
    rows, _ = load_rows("chitchat")
    _, tokens = common.encode_rows(tokenizer, rows, 64, prompts, 0, "prompts")
    pairs = common.sample(
        policy,
        tokens,
        end_tokens(policy, tokenizer),
        completions=2,
        max_new_tokens=24,
        seed=0,
        progress="sampling",
    )
    first, second = ([common.decode(tokenizer, pair[i]) for pair in pairs] for i in (0, 1))
    fitted = fit(first, second)
    result = {
        **record.origin(),
        "model": model,
        "pairs": len(pairs),
        "shares": cycle_measure([*first, *second]),
        "reward": dict(zip(STYLES, fitted.tolist(), strict=True)),
    }
    record.write(record.RESULTS / f"{name}.json", result)
    print(json.dumps({key: result[key] for key in ("pairs", "shares", "reward")}, indent=1))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
