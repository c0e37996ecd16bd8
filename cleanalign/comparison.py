"""What preferences say: of one model against another, and of a whole pool. Pure functions; who was asked, and
how, is another room's."""

from __future__ import annotations

import torch

from cleanalign.games import exploitability, mixture_exploitability, nash
from cleanalign.statistics import win_rate_interval

RESAMPLES = 2000  # of the prompts, for the intervals of a pool's table
# for those of its mixture, up to so many models: each is a linear program
NASH_RESAMPLES, NASH_MODELS = 500, 12


def versus(preferences: list[float]) -> dict:
    """One model against another: win rate, mean of 1[p > ½] + ½ · 1[p = ½], its 95 % bootstrap interval over
    prompts, share of ties, and mean p. `preferences` holds p(it ≻ the other) for each prompt."""
    win_rate, interval = win_rate_interval(preferences)
    return {
        "win_rate": win_rate,
        "win_rate_interval": interval,
        "tie_rate": sum(p == 0.5 for p in preferences) / len(preferences),
        "mean_preference": sum(preferences) / len(preferences),
    }


def pool(models: list[str], preferences: torch.Tensor) -> dict:
    """A pool's table, ranking and equilibrium from (N, M, M) p(row ≻ column) of N prompts and M models.

    Intervals are 95 % percentiles of a bootstrap over prompts with a fixed seed: all figures of a resample
    come from the same prompts. Keys, aligned with `models` where they are lists: `preference` (mean p),
    `interval`, `win_rate`, `tie_rate`: matrices; `score`, the mean preference against the others, and
    `score_interval`; `ranking`, names by score; `nash`, `nash_unique`, `nash_interval` (None beyond
    `NASH_MODELS` models), `nash_exploitability`; `exploitability` and `best_response`, who exploits most.
    """
    values = preferences.double()
    N, M, _ = values.shape
    table = symmetric(values.mean(0))
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(N, (RESAMPLES, N), generator=generator)
    counts = torch.zeros(RESAMPLES, N, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(draws.shape).double()
    )
    tables = symmetric((counts @ values.reshape(N, M * M) / N).view(RESAMPLES, M, M))  # (R, M, M)
    scores, score = others(tables), others(table)  # (R, M), (M,)
    mixture, unique = nash(table.tolist())
    mixtures = None
    if M <= NASH_MODELS:
        mixtures = torch.tensor([nash(resampled)[0] for resampled in tables[:NASH_RESAMPLES].tolist()])
    wins = (values > 0.5).double() + 0.5 * (values == 0.5).double()
    ranking = sorted(range(M), key=lambda model: (-score[model].item(), model))
    against = [max(range(M), key=lambda row: table[row, column].item()) for column in range(M)]
    return {
        "preference": table.tolist(),
        "interval": interval(tables),
        "win_rate": symmetric(wins.mean(0)).tolist(),
        "tie_rate": (values == 0.5).double().mean(0).tolist(),
        "score": score.tolist(),
        "score_interval": interval(scores),
        "ranking": [models[model] for model in ranking],
        "nash": mixture,
        "nash_unique": unique,
        "nash_interval": None if mixtures is None else interval(mixtures.double()),
        "nash_exploitability": max(0.0, mixture_exploitability(table.tolist(), mixture)),
        "exploitability": exploitability(table.tolist()),
        "best_response": [models[row] for row in against],
    }


def symmetric(tables: torch.Tensor) -> torch.Tensor:
    """(…, M, M) with p(row ≻ column) + p(column ≻ row) = 1 to the last bit and ½ on the diagonal: the upper
    triangle is kept."""
    upper = torch.triu(tables, 1)
    below = torch.tril(1 - upper.transpose(-1, -2), -1)
    return upper + below + 0.5 * torch.eye(tables.shape[-1], dtype=tables.dtype)


def others(tables: torch.Tensor) -> torch.Tensor:
    """(…, M) mean preference of each model against the other ones."""
    return (tables.sum(-1) - 0.5) / (tables.shape[-1] - 1)


def interval(resampled: torch.Tensor) -> list:
    """95 % percentile interval over the first axis: nested lists of [low, high]."""
    levels = torch.tensor([0.025, 0.975], dtype=resampled.dtype)
    return resampled.quantile(levels, dim=0).movedim(0, -1).tolist()
