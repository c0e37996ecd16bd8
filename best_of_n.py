"""How good is a reward? Best-of-N by it, judged by another: estimators, report and plot. Knows no algorithm.

`best_of_n.json` holds for every ranker its curves over N on the test prompts and on the development prompts: the judge's mean score of
the reply the ranker likes best among N, and that reply's win rate against one more sample, each with a 95 % bootstrap band over prompts.
All rankers rank the same samples.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from judges import Judge, judge_candidates

BASELINES = ("length", "random", "judge (oracle)")


def best_of_n_score(rewards: torch.Tensor, golden: torch.Tensor, ns: list[int]) -> torch.Tensor:
    """Expected golden score of the reply with the highest reward among N: exact mean over all subsets of size N, ties averaged.

    (G, M) rewards and golden scores of M samples to each of G prompts, N ≤ M; returns (G, len(ns)).
    """
    M = rewards.shape[1]
    # the reply of rank i (0 the lowest) is the best of C(i, N − 1) of the C(M, N) subsets
    weights = torch.tensor([[math.comb(i, n - 1) / math.comb(M, n) for n in ns] for i in range(M)], dtype=torch.float64)
    return (golden.double()[:, :, None] * (rank_probabilities(rewards) @ weights)).sum(1)


def best_of_n_win_rate(rewards: torch.Tensor, preference: torch.Tensor, ns: list[int]) -> torch.Tensor:
    """Win rate of the best of N against one more sample: exact mean over all subsets of size N and opponents *outside* them, ties averaged.

    (G, M) rewards and (G, M, M) judge's p(i ≻ j), N < M; returns (G, len(ns)). A win counts 1, a tie ½.
    """
    M = rewards.shape[1]
    wins = (preference > 0.5).double() + 0.5 * (preference == 0.5).double()  # (G, M, M)
    ranks = rank_probabilities(rewards)  # (G, M, M)
    same = rewards[:, :, None] == rewards[:, None, :]  # (G, M, M)
    size = same.sum(2, keepdim=True).double()
    # two replies of one tied block never share a rank, which the product of their probabilities does not know
    wins = wins * torch.where(same, size / (size - 1).clamp(min=1), 1.0) * (1 - torch.eye(M, dtype=torch.float64))
    result = []
    for n in ns:  # subsets with the best at rank i and the opponent, at rank j, outside: C(i, n − 1), or C(i − 1, n − 1) for j below i
        subsets = [[0 if i == j else math.comb(i - (j < i), n - 1) if i else int(n == 1) for j in range(M)] for i in range(M)]
        weights = torch.tensor(subsets, dtype=torch.float64) / float(math.comb(M, n) * (M - n))
        result.append((wins * (ranks @ weights @ ranks.transpose(1, 2))).sum((1, 2)))
    return torch.stack(result, 1)


def rank_probabilities(rewards: torch.Tensor) -> torch.Tensor:
    """(G, M) rewards to (G, M, M) float64: the probability that sample s has rank r, 0 the lowest, equal rewards ordered at random."""
    same = (rewards[:, :, None] == rewards[:, None, :]).double()
    one_hot = F.one_hot(rewards.argsort(-1).argsort(-1), rewards.shape[1]).double()
    return same @ one_hot / same.sum(2, keepdim=True)


def bootstrap(values: torch.Tensor, resamples: int = 2000) -> tuple[list[float], list[float], list[float]]:
    """Mean and 95 % percentile interval over prompts (fixed seed) of (G, C) values: three lists of length C."""
    draw = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draw].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return values.mean(0).tolist(), low.tolist(), high.tolist()


def golden_of(judge: Judge, prompts: list, texts: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The judge's score (G, M) and preferences (G, M, M) of M replies to each prompt; without a scalar, the mean preference is the score."""
    scores, matrices = judge_candidates(judge, prompts, texts)
    preference = torch.stack(matrices)
    return preference.mean(2) if scores is None else torch.stack(scores), preference


def compare_rankers(
    rankers: dict[str, dict], prompts: dict[str, list], texts: dict[str, list[list[str]]], lengths: dict[str, torch.Tensor], judge: Judge
) -> dict:
    """The report: every ranker's Best-of-N curves on the same samples, beside length, random and the judge itself.

    Args:
        rankers: name: {split: (G, M) rewards}; any other entry of a ranker is kept as it is.
        prompts, texts, lengths: for the splits `test` and `dev`, prompts, M replies to each, and their (G, M) lengths in tokens.
        judge: the golden judge. N runs from 1 to M − 1: the opponent of the win rate lies outside the N.
    """
    golden = {split: golden_of(judge, prompts[split], texts[split]) for split in texts}
    scores = {split: value for split, (value, _) in golden.items()}
    noise = {split: torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) for split, value in scores.items()}
    G, M = scores["test"].shape
    ns = list(range(1, M))
    report = {"n": ns, "judge": judge.name, "prompts": G, "dev_prompts": len(scores["dev"]), "samples_per_prompt": M, "rankers": {}}
    for name, ranker in {**rankers, **dict(zip(BASELINES, (lengths, noise, scores), strict=True))}.items():
        curves = {}
        for split, (score, preference) in golden.items():
            curves[split] = {}
            measures = {"score": best_of_n_score(ranker[split], score, ns), "win_rate": best_of_n_win_rate(ranker[split], preference, ns)}
            for key, values in measures.items():
                mean, low, high = bootstrap(values)
                curves[split] |= {key: mean, f"{key}_low": low, f"{key}_high": high}
        more = {key: value for key, value in ranker.items() if key not in golden}
        report["rankers"][name] = {**curves["test"], **more, "dev": curves["dev"]}
    return report


def report_text(report: dict) -> str:
    """The report as a table."""
    width = max(map(len, report["rankers"]))
    preferences = any(curve.get("preference_accuracy") is not None for curve in report["rankers"].values())
    lines = [
        f"Best-of-{report['n'][-1]} among samples of π_SFT, {report['prompts']} held-out prompts, by the judge {report['judge']}",
        f"  {'':<{width}}   {'':16}  {'':23}     accuracy on held-out" + preferences * "    on held-out",
        f"  {'ranked by':<{width}}   score, N = 1 → {report['n'][-1]:<4}  win rate against N = 1     pairs of its kind"
        + preferences * "       preferences",
    ]
    for name, curve in report["rankers"].items():
        band = f"[{curve['win_rate_low'][-1]:.3f}, {curve['win_rate_high'][-1]:.3f}]"
        separability, preference = (
            "" if curve.get(key) is None else f"{curve[key]:.3f}" for key in ("separability", "preference_accuracy")
        )
        lines.append(
            f"  {name:<{width}}   {curve['score'][0]:.3f} → {curve['score'][-1]:.3f}       {curve['win_rate'][-1]:.3f}  {band}      "
            f"{separability:<22}  {preference}".rstrip()
        )
    return "\n".join(lines)


def plot_report(report: dict, path: Path) -> None:
    """Judge's score and win rate over N, a line a ranker with its 95 % band. Without matplotlib nothing is drawn."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    titles = {"score": f"score of the judge {report['judge']}", "win_rate": "win rate against N = 1"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, curve in report["rankers"].items():
            style = {"linestyle": "--", "linewidth": 1.2} if name in BASELINES else {"linewidth": 1.8}
            (line,) = axis.plot(report["n"], curve[key], label=name, **style)
            axis.fill_between(report["n"], curve[f"{key}_low"], curve[f"{key}_high"], color=line.get_color(), alpha=0.12)
        axis.set_xlabel("N, samples the best is chosen from")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[1].axhline(0.5, color="black", linewidth=0.8)
    axes[0].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))
    figure.suptitle(f"Best-of-N among samples of π_SFT, {report['prompts']} held-out prompts", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(report: dict, folder: Path) -> None:
    """best_of_n.json and best_of_n.png in `folder`, and the table on the terminal."""
    (folder / "best_of_n.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_report(report, folder / "best_of_n.png")
    print("\n" + report_text(report) + "\n", flush=True)
