"""Where each algorithm of the cycle study would come to rest, by exact computation with the scripts' losses.

    python benchmark/resting_points.py

The game: a question beats an exclamation, an exclamation a statement, a statement a question, always; the
reference is the study's starting model, of which only the styles' shares count. A policy over three styles has
no other limits, so a run of a language model need not end here; but where it is after few steps and where its
loss would send it are different things. Writes benchmark/results/resting_points.json, of the study and of its
forerunner with SmolLM2; `benchmark/compare.py cycle` draws the points as lines.
"""

from __future__ import annotations

import json
import sys

import record
import torch
import tyro

sys.path.insert(0, str(record.ROOT / "docs"))

import theory

from cleanalign.games import mixture_exploitability
from judges import STYLES

GAME = theory.rock_paper_scissors()  # p(row's style ≻ column's), in the order of STYLES
BETA = 0.125  # of IPO-MD and Nash-MD's mixture, over whole replies
STEP, STEPS = 0.05, 40_000
STUDIES = {"cycle": "cycle_small_reward", "cycle_smollm2": "cycle_reward"}  # and the scalar RLHF was given


def main(tau: float = 0.1) -> None:
    """Print and record the tables.

    Args:
        tau: strength of the tie to the reference, the studies'.
    """
    result = {"tau": tau, "beta": BETA}
    for study, reward in STUDIES.items():
        reference = reference_shares(study)
        points = resting_points(reference, fitted_rewards(reward), tau)
        print(f"{study}, from {[round(share, 3) for share in reference]}\n{table(points)}\n")
        exploitability = {
            name: mixture_exploitability(GAME.tolist(), shares) for name, shares in points.items()
        }
        result[study] = {"reference": reference, "points": points, "exploitability": exploitability}
    record.write(record.RESULTS / "resting_points.json", {**record.origin(), **result})


def reference_shares(study: str) -> list[float]:
    """Shares of the starting model's styles on the study's held-out prompts: the mean over its runs, whose
    samples of that model differ."""
    runs = json.loads((record.RESULTS / f"{study}.json").read_text())["runs"]
    shares = [[run["summary"][f"style/{style}_before"] for style in STYLES] for run in runs]
    return [sum(values) / len(values) for values in zip(*shares, strict=True)]


def resting_points(reference: list[float], rewards: list[float], tau: float) -> dict[str, list[float]]:
    """Shares of the three styles at which each algorithm rests."""
    mu = torch.tensor(reference, dtype=torch.float64)
    mu, rewards = mu / mu.sum(), torch.tensor(rewards, dtype=torch.float64)
    points = {
        "Nash-MD, self": theory.regularised_nash(GAME, mu, tau),
        "Nash-MD, mixture": theory.ipo_md_fixed_point(GAME, mu, tau, BETA),
        "IPO-MD": theory.ipo_md_fixed_point(GAME, mu, tau, BETA),
        "online DPO": dpo_rest(mu, tau),
        "online DPO, 4τ": dpo_rest(mu, 4 * tau),
        "RLHF": theory.normalise(mu.log() + rewards / tau),
    }
    return {name: point.tolist() for name, point in points.items()}


def dpo_rest(reference: torch.Tensor, tau: float) -> torch.Tensor:
    """Where gradient descent on online DPO's expected loss ends, from the reference. Raises `AssertionError`
    if the gradient there is not 0."""
    loss = theory.online_preference_loss(GAME, reference, tau, kind="dpo")
    logits = reference.log()
    for _ in range(STEPS):
        logits = logits - STEP / tau * theory.gradient(loss, logits)
    assert theory.gradient(loss, logits).abs().max() < 1e-9
    return theory.normalise(logits)


def fitted_rewards(name: str) -> list[float]:
    """The scalar that RLHF is given, a style's (benchmark/cycle_reward.py)."""
    fitted = json.loads((record.RESULTS / f"{name}.json").read_text())["reward"]
    return [fitted[style] for style in STYLES]


def table(points: dict[str, list[float]]) -> str:
    """Markdown."""
    lines = [
        "| resting point | exploitability | questions | exclamations | statements |",
        "|---|---|---|---|---|",
    ]
    for name, shares in points.items():
        cells = [f"{value:.3f}" for value in (mixture_exploitability(GAME.tolist(), shares), *shares)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
