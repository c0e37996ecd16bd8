"""A scalar reward for a judge that has none: Bradley-Terry fitted to the cycle judge on pairs of the starting model's replies.

    python benchmark/cycle_reward.py        # samples, asks the judge, fits, writes results/cycle_reward.json
    python nash_md.py --objective rlhf --judge benchmark/cycle_reward.py:reward --eval-judge cycle

The judge sees nothing of a reply but its style, so the best scalar is one number a style: the maximum-likelihood r of
p(a ≻ b) = σ(r(a) − r(b)), summed over the pairs. This is what RLHF does to preferences, without a reward model's own errors.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import experiment  # noqa: E402
from judges import STYLES, cycle_measure, cycle_preference, style  # noqa: E402

FITTED = ROOT / "benchmark" / "results" / "cycle_reward.json"


@cache
def _rewards() -> list[float]:
    return list(json.loads(FITTED.read_text())["reward"].values())


def reward(prompts: list[str], replies: list[str]) -> list[float]:
    """The fitted scalar of each reply's style."""
    return [_rewards()[style(reply)] for reply in replies]


reward.measure = (
    cycle_measure  # the run's log shows style shares and exploitability, as under the judge itself
)


def fit(first: list[str], second: list[str]) -> torch.Tensor:
    """(3,) maximum-likelihood Bradley-Terry rewards of the styles, mean 0, for pairs of replies and the cycle judge's p."""
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


def main(model: str = "smollm2-135m", prompts: int = 512, copy: str | None = None) -> None:
    """Sample two replies to each of `prompts` training prompts of chitchat from `model`, fit, write; also to the file `copy`."""
    device = torch.device("cpu")
    policy = common.load_model(model, common.resolve_dtype("auto", device), device, "eager")
    tokenizer = common.load_tokenizer(model)
    rows, _ = common.load_rows("chitchat")
    _, tokens = common.encode_rows(tokenizer, rows, 64, prompts, 0, "prompts")
    pairs = common.sample(
        policy,
        tokens,
        common.end_tokens(policy, tokenizer),
        completions=2,
        max_new_tokens=24,
        seed=0,
        progress="sampling",
    )
    first, second = ([common.decode(tokenizer, pair[i]) for pair in pairs] for i in (0, 1))
    fitted = fit(first, second)
    result = {
        "command": "python " + " ".join(sys.argv),
        "model": model,
        "pairs": len(pairs),
        "shares": cycle_measure([*first, *second]),
        "reward": dict(zip(STYLES, fitted.tolist(), strict=True)),
        **experiment.environment(),
    }
    for path in [FITTED, *([Path(copy)] if copy else [])]:
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("pairs", "shares", "reward")}, indent=1))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
