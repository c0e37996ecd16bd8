"""The game of a pool: two players each send a model, and
whose reply is preferred wins. Its equilibrium, exactly."""

from __future__ import annotations

from fractions import Fraction

UNIT = (
    10**9
)  # preferences are means over prompts: what lies beyond nine decimals is rounding, and breaks no tie


def nash(preference: list[list[float]]) -> tuple[list[float], bool]:
    """A mixture that no model of the pool is preferred to, and whether it is the only one.

    `preference` is (M, M), p(row ≻ column); above its diagonal it is read, below it taken as 1 − p. Linear
    programming by the simplex method in whole numbers, so that the answer has no tolerance. Where several
    mixtures are in equilibrium, it is the mean over the models of one that gives that model the largest share
    it can have; as equilibria form a convex set, this is one too. Models that nothing tells apart get equal
    shares.
    """
    payoffs = _payoffs(preference)
    alike: dict[tuple[int, ...], list[int]] = {}
    for model, row in enumerate(payoffs):
        alike.setdefault(tuple(row), []).append(model)
    groups = list(alike.values())
    game = _Simplex([[payoffs[group[0]][other[0]] for other in groups] for group in groups])
    game.maximise(game.total)
    game.freeze()
    extremes = [game.largest(column) for column in range(len(groups))]
    mixture, unique = [0.0] * len(preference), all(extreme == extremes[0] for extreme in extremes)
    for column, group in enumerate(groups):
        share = sum(extreme[column] for extreme in extremes) / len(groups)
        unique = unique and not (share and len(group) > 1)
        for model in group:
            mixture[model] = float(share / len(group))
    return mixture, unique


def exploitability(preference: list[list[float]]) -> list[float]:
    """For each model what its best response in the pool wins beyond a tie: max of p(other ≻ model) − ½; 0 is
    the least, as a model ties with itself."""
    return [max(column) - 0.5 for column in zip(*preference, strict=True)]


def mixture_exploitability(preference: list[list[float]], mixture: list[float]) -> float:
    """The same of a mixture: max over the pool of p(other ≻ a draw of the mixture) − ½."""
    against = [sum(p * share for p, share in zip(row, mixture, strict=True)) for row in preference]
    return max(against) - 0.5


def _payoffs(preference: list[list[float]]) -> list[list[int]]:
    """1 + p(row ≻ column) in billionths: above 0, so that the value of the game, 1½, is too."""
    models = range(len(preference))
    payoffs = [[3 * UNIT // 2 for _ in models] for _ in models]
    for row in models:
        for column in models[row + 1 :]:
            p = round(preference[row][column] * UNIT)
            payoffs[row][column], payoffs[column][row] = UNIT + p, 2 * UNIT - p
    return payoffs


class _Simplex:
    """The column player's program: maximise Σ y where payoffs · y ≤ 1 and y ≥ 0; the mixture is y / Σ y. As
    the game is symmetric, what is best for this player is for the other.

    A tableau of whole numbers over one denominator (Edmonds' pivots, in which the division is exact). Its
    rows are the basic variables, its columns y, slacks and right-hand side; an objective is a row of what a
    unit of each variable gains.
    """

    def __init__(self, payoffs: list[list[int]]):
        self.models, self.denominator = len(payoffs), 1
        self.rows = []
        for i, row in enumerate(payoffs):
            slacks = [int(i == j) for j in range(self.models)]
            self.rows.append([*row, *slacks, 1])
        self.basis = list(range(self.models, 2 * self.models))
        self.total = [1] * self.models + [0] * (self.models + 1)
        self.allowed = list(range(2 * self.models))

    def maximise(self, objective: list[int]) -> None:
        """Pivot until no allowed variable gains. Bland's rule, the first that gains for the first that
        blocks, cannot go round in circles."""
        while gaining := [column for column in self.allowed if objective[column] > 0]:
            column = gaining[0]
            blocking = [i for i, row in enumerate(self.rows) if row[column] > 0]
            leaving = min(blocking, key=lambda i: (self.bound(i, column), self.basis[i]))
            self.pivot(leaving, column, objective)

    def bound(self, i: int, column: int) -> Fraction:
        """How much of `column` the basic variable of row `i` lets in."""
        return Fraction(self.rows[i][-1], self.rows[i][column])

    def pivot(self, leaving: int, column: int, objective: list[int]) -> None:
        """`column` takes the place of the basic variable of row `leaving`, in all rows and the objective."""
        chosen = self.rows[leaving]
        pivot, before = chosen[column], self.denominator
        for row in (*self.rows, objective):
            if row is not chosen:
                factor = row[column]
                row[:] = [(value * pivot - factor * own) // before for value, own in zip(row, chosen)]
        self.basis[leaving], self.denominator = column, pivot

    def freeze(self) -> None:
        """From now on Σ y stays at its maximum: the variables that would lower it stay 0."""
        self.allowed = [column for column in self.allowed if self.total[column] == 0]

    def largest(self, model: int) -> list[Fraction]:
        """Of the solutions left, one with the largest share of `model`, as a mixture."""
        objective = [self.denominator * (column == model) for column in range(2 * self.models + 1)]
        if model in self.basis:  # an objective is written in the variables outside the basis
            own = self.rows[self.basis.index(model)]
            objective = [value - part for value, part in zip(objective, own, strict=True)]
        self.maximise(objective)
        y = [0] * self.models
        for row, column in zip(self.rows, self.basis, strict=True):
            if column < self.models:
                y[column] = row[-1]
        return [Fraction(value, sum(y)) for value in y]
