"""The equilibrium of a pool: known games, random ones, ties, and what exploitability means in them."""

import random

import pytest

from cleanalign.games import exploitability, mixture_exploitability, nash

ROCK_PAPER_SCISSORS = [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]


def dice(*players: tuple[int, ...]) -> list[list[float]]:
    """p(row's throw is above column's), a tie counting half."""

    def beats(a, b):
        return sum((x > y) + (x == y) / 2 for x in a for y in b) / (len(a) * len(b))

    return [[beats(a, b) for b in players] for a in players]


def random_game(size: int, rng: random.Random, digits: int = 6) -> list[list[float]]:
    game = [[0.5] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1, size):
            game[i][j] = round(rng.random(), digits)
            game[j][i] = 1 - game[i][j]
    return game


def test_rock_paper_scissors():
    mixture, unique = nash(ROCK_PAPER_SCISSORS)
    assert mixture == pytest.approx([1 / 3] * 3, abs=0) and unique
    assert exploitability(ROCK_PAPER_SCISSORS) == [0.5] * 3


def test_nontransitive_dice():
    """Each die of {2,4,9}, {1,6,8}, {3,5,7} beats the next at 5/9: a third each; one die alone loses 1/18."""
    game = dice((2, 4, 9), (1, 6, 8), (3, 5, 7))
    assert game[0][1] == game[1][2] == game[2][0] == pytest.approx(5 / 9)
    mixture, unique = nash(game)
    assert mixture == pytest.approx([1 / 3] * 3, abs=1e-8) and unique
    assert exploitability(game) == pytest.approx([1 / 18] * 3)


def test_a_biased_cycle_has_the_mixture_of_the_textbook():
    """With margins a (0 over 1), b (1 over 2), c (2 over 0) the equilibrium is (b, c, a) / (a + b + c)."""
    a, b, c = 0.1, 0.2, 0.4
    game = [[0.5, 0.5 + a, 0.5 - c], [0.5 - a, 0.5, 0.5 + b], [0.5 + c, 0.5 - b, 0.5]]
    mixture, unique = nash(game)
    assert mixture == pytest.approx([b / 0.7, c / 0.7, a / 0.7], abs=1e-8) and unique


def test_a_model_that_beats_all_is_the_mixture():
    game = [[0.5, 0.4, 0.45], [0.6, 0.5, 0.51], [0.55, 0.49, 0.5]]
    assert nash(game) == ([0.0, 1.0, 0.0], True)
    assert exploitability(game) == pytest.approx([0.1, 0.0, 0.01])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12])
def test_random_games_have_no_profitable_answer(size):
    """What defines an equilibrium, and that who is worse than it against it has no share."""
    rng = random.Random(size)
    for _ in range(20):
        game = random_game(size, rng)
        mixture, _ = nash(game)
        assert sum(mixture) == pytest.approx(1) and min(mixture) >= 0
        assert mixture_exploitability(game, mixture) <= 1e-8
        against = [sum(p * share for p, share in zip(row, mixture)) for row in game]
        assert all(share == 0 or p == pytest.approx(0.5, abs=1e-8) for share, p in zip(mixture, against))


def test_coarse_games_full_of_ties_end_and_are_solved():
    """Degenerate programs are where a simplex method goes round in circles."""
    rng = random.Random(0)
    for size in (3, 5, 8):
        for _ in range(40):
            game = random_game(size, rng, digits=1)
            mixture, _ = nash(game)
            assert mixture_exploitability(game, mixture) <= 1e-8


def test_equal_models_share_equally_and_that_is_told():
    everybody_ties = [[0.5] * 4 for _ in range(4)]
    assert nash(everybody_ties) == ([0.25] * 4, False)
    rock_twice = [[0.5, 0.5, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0], [1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.5]]
    mixture, unique = nash(rock_twice)
    assert mixture == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3]) and not unique
    copies_that_lose = [[0.5, 0.9, 0.9], [0.1, 0.5, 0.5], [0.1, 0.5, 0.5]]
    assert nash(copies_that_lose) == ([1.0, 0.0, 0.0], True)


def test_several_equilibria_are_told():
    """0 and 1 tie and both beat 2, by different margins: any mixture of them will do."""
    mixture, unique = nash([[0.5, 0.5, 0.7], [0.5, 0.5, 0.6], [0.3, 0.4, 0.5]])
    assert not unique and mixture[2] == 0 and min(mixture[:2]) > 0


def test_rounding_does_not_break_a_tie():
    """Means of the same numbers, added up in another order, differ in the last bit."""
    a, b = 0.1 + 0.2, 0.3
    assert a != b
    assert nash([[0.5, 0.5, a], [0.5, 0.5, b], [1 - a, 1 - b, 0.5]])[0][2] == 1.0


def test_against_scipy():
    """The value of maximising one share over the equilibria is scipy's, where scipy is installed."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = random.Random(1)
    for size in (2, 4, 6, 9):
        for _ in range(10):
            game = random_game(size, rng)
            columns = [[0.5 - p for p in row] for row in game]  # Σ_j p_ij x_j ≤ ½
            bounds = dict(A_ub=[[-c for c in row] for row in columns], b_ub=[0.5 - 0.5] * size)
            solved = optimize.linprog([0] * size, A_eq=[[1] * size], b_eq=[1], bounds=(0, 1), **bounds)
            assert solved.success
            assert nash(game)[0] == pytest.approx(solved.x, abs=1e-6)
