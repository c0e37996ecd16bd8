"""Estimators over prompts: win rates and their intervals, repetition, Best-of-N."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def win_rate_interval(preferences: list[float], resamples: int = 10_000) -> tuple[float, list[float]]:
    """Win rate, mean of 1[p > ½] + ½ · 1[p = ½], and its 95 % percentile-bootstrap interval over prompts
    (fixed seed)."""
    wins = torch.tensor([1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in preferences])
    draw = torch.randint(len(wins), (resamples, len(wins)), generator=torch.Generator().manual_seed(0))
    low, high = wins[draw].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return wins.mean().item(), [low, high]


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct n-grams of lower-cased words over all n-grams, across all texts: 1 is never a repetition."""
    grams = [
        tuple(words[i : i + n])
        for words in (text.lower().split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / max(1, len(grams))


def best_of_n_score(rewards: torch.Tensor, golden: torch.Tensor, ns: list[int]) -> torch.Tensor:
    """Expected golden score of the reply with the highest reward among N: exact mean over all subsets of size
    N, ties averaged.

    (G, M) rewards and golden scores of M samples to each of G prompts, N ≤ M; returns (G, len(ns)).
    """
    M = rewards.shape[1]
    # the reply of rank i (0 the lowest) is the best of C(i, N − 1) of the C(M, N) subsets
    weights = torch.tensor(
        [[math.comb(i, n - 1) / math.comb(M, n) for n in ns] for i in range(M)], dtype=torch.float64
    )
    return (golden.double()[:, :, None] * (rank_probabilities(rewards) @ weights)).sum(1)


def best_of_n_win_rate(rewards: torch.Tensor, preference: torch.Tensor, ns: list[int]) -> torch.Tensor:
    """Win rate of the best of N against one more sample: exact mean over all subsets of size N and opponents
    *outside* them, ties averaged.

    (G, M) rewards and (G, M, M) judge's p(i ≻ j), N < M; returns (G, len(ns)). A win counts 1, a tie ½.
    """
    M = rewards.shape[1]
    wins = (preference > 0.5).double() + 0.5 * (preference == 0.5).double()  # (G, M, M)
    ranks = rank_probabilities(rewards)  # (G, M, M)
    same = rewards[:, :, None] == rewards[:, None, :]  # (G, M, M)
    size = same.sum(2, keepdim=True).double()
    # two replies of one tied block never share a rank, which the product of their probabilities does not know
    wins = (
        wins
        * torch.where(same, size / (size - 1).clamp(min=1), 1.0)
        * (1 - torch.eye(M, dtype=torch.float64))
    )
    result = []
    # subsets with the best at rank i and the opponent, at rank j, outside: C(i, n − 1), or C(i − 1, n − 1)
    # for j below i
    for n in ns:
        subsets = [
            [0 if i == j else math.comb(i - (j < i), n - 1) if i else int(n == 1) for j in range(M)]
            for i in range(M)
        ]
        weights = torch.tensor(subsets, dtype=torch.float64) / float(math.comb(M, n) * (M - n))
        result.append((wins * (ranks @ weights @ ranks.transpose(1, 2))).sum((1, 2)))
    return torch.stack(result, 1)


def rank_probabilities(rewards: torch.Tensor) -> torch.Tensor:
    """(G, M) rewards to (G, M, M) float64: the probability that sample s has rank r, 0 the lowest, equal
    rewards ordered at random."""
    same = (rewards[:, :, None] == rewards[:, None, :]).double()
    one_hot = F.one_hot(rewards.argsort(-1).argsort(-1), rewards.shape[1]).double()
    return same @ one_hot / same.sum(2, keepdim=True)


def bootstrap(values: torch.Tensor, resamples: int = 2000) -> tuple[list[float], list[float], list[float]]:
    """Mean and 95 % percentile interval over prompts (fixed
    seed) of (G, C) values: three lists of length C."""
    draw = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[draw].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return values.mean(0).tolist(), low.tolist(), high.tolist()
