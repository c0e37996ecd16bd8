"""The finite games of docs/theory.md: what each loss must find, worked out exactly, and its figures.

    python docs/theory.py            # writes docs/figures/theory_*.png, about a minute on one core

A prompt has n possible completions, a judge is an (n, n) matrix P with P[i, j] = p(i ≻ j), and a policy is a
table of logits. Every expectation is a sum over all completions or pairs, so nothing is sampled and nothing
is estimated, and every loss is the one that trains language models: `ipo_md.preference_loss` and
`nash_md.nash_md_loss`, called through their modules. All tensors are float64. tests/test_theory.py checks
with these helpers what the page claims.

Shapes: n completions, T tokens of the longest, S prefixes, V vocabulary. μ is the reference, π_ref elsewhere.
"""

from __future__ import annotations

import colorsys
import io
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ipo_md
import nash_md

# ---------------------------------------------------------------------------------------------
# games: who beats whom
# ---------------------------------------------------------------------------------------------

# Three dice of which each beats the next with probability 5/9, the last the first: no scalar reward explains
# them.
DICE = ((2, 4, 9), (1, 6, 8), (3, 5, 7))


def vector(*values: float) -> torch.Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def two_actions(p: float) -> torch.Tensor:
    """(2, 2) the game in which the first completion is preferred with probability p."""
    return torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)


def rock_paper_scissors() -> torch.Tensor:
    """(3, 3) 1 ≻ 2 ≻ 3 ≻ 1, always: read rock, scissors, paper."""
    return torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], dtype=torch.float64)


def dice_game(dice: tuple[tuple[int, ...], ...] = DICE) -> torch.Tensor:
    """(n, n) p(i ≻ j): the chance that die i shows more than die j, ties split."""
    faces = torch.tensor(dice, dtype=torch.float64)  # (n, F)
    difference = faces[:, None, :, None] - faces[None, :, None, :]  # (n, n, F, F)
    return (0.5 + 0.5 * torch.sign(difference)).mean((-1, -2))


def random_game(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random intransitive judge (n, n), entries in (0, 1), and a random full reference (n,)."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    preference = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(n, dtype=torch.float64)
    reference = torch.softmax(torch.randn(n, generator=generator, dtype=torch.float64), 0)
    return preference, reference


def bradley_terry(rewards: torch.Tensor) -> torch.Tensor:
    """(n, n) p(i ≻ j) = σ(r_i − r_j): the judges that a scalar reward model can express."""
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


def argmax_game(preference: torch.Tensor) -> torch.Tensor:
    """(n, n) 1[p > ½], ties ½: the game that is played when labels are rounded."""
    return 0.5 + 0.5 * torch.sign(preference - 0.5)


# ---------------------------------------------------------------------------------------------
# solutions: what each algorithm should find
# ---------------------------------------------------------------------------------------------


def normalise(log_weights: torch.Tensor) -> torch.Tensor:
    """(n,) the distribution ∝ exp(log_weights)."""
    return torch.softmax(log_weights, -1)


def regularised_nash(preference: torch.Tensor, reference: torch.Tensor, tau: float) -> torch.Tensor:
    """The Nash equilibrium π (n,) of P(π ≻ π') − τ KL(π‖μ) + τ KL(π'‖μ), arXiv 2312.00886: π ∝ μ exp(Pπ/τ).

    Damped Newton on u = log(π/μ), F(u) = u − Pπ/τ. The Jacobian is I − PC/τ, C the covariance of one draw
    from π. P is ½ plus an antisymmetric A, and AC has imaginary eigenvalues only: the Jacobian's are 1 + iλ,
    so it is never singular. The plain iteration π ← μ exp(Pπ/τ) spirals outwards at small τ, hence Newton.
    """
    log_reference = reference.log()
    u = torch.zeros_like(reference)

    def residual(u):
        return u - preference @ normalise(log_reference + u) / tau

    for _ in range(200):
        value = residual(u)
        if value.abs().max() < 1e-13 / tau:
            break
        policy = normalise(log_reference + u)
        covariance = torch.diag(policy) - torch.outer(policy, policy)
        step = torch.linalg.solve(torch.eye(len(u), dtype=u.dtype) - preference @ covariance / tau, value)
        damping = 1.0
        while damping > 1e-6 and residual(u - damping * step).norm() > value.norm():
            damping /= 2
        u = u - damping * step
    return normalise(log_reference + u)


def geometric_mixture(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """(n,) π^(1−β) μ^β over whole completions, renormalised; arXiv 2312.00886 and 2403.08635."""
    return normalise((1 - beta) * policy.log() + beta * reference.log())


def ipo_md_fixed_point(
    preference: torch.Tensor, reference: torch.Tensor, tau: float, beta: float
) -> torch.Tensor:
    """(n,) π*_β, at which IPO-MD and Nash-MD-PG with the mixture opponent both rest; arXiv 2403.08635.

    Both ask τ log(π/μ) = P m + constant, with m = π^(1−β) μ^β. Raised to 1 − β and multiplied by μ^β this
    says that m is the Nash at temperature τ/(1−β); π follows from m.
    """
    mixture = regularised_nash(preference, reference, tau / (1 - beta))
    return normalise(reference.log() + preference @ mixture / tau)


def offline_ipo_optimum(
    preference: torch.Tensor, reference: torch.Tensor, data: torch.Tensor, tau: float
) -> torch.Tensor:
    """(n,) μ exp(E_{y' ~ data} p(y ≻ y')/τ), the optimum of IPO on fixed pairs drawn from `data`;
    arXiv 2310.12036."""
    return normalise(reference.log() + preference @ data / tau)


def rlhf_optimum(rewards: torch.Tensor, reference: torch.Tensor, tau: float) -> torch.Tensor:
    """(n,) μ exp(r/τ), the maximiser of E r − τ KL(π‖μ)."""
    return normalise(reference.log() + rewards / tau)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) in nats, a scalar."""
    return (p * (p.log() - q.log())).sum()


def nash_md_step(
    policy: torch.Tensor, preference: torch.Tensor, reference: torch.Tensor, tau: float, eta: float
) -> torch.Tensor:
    """One step of tabular Nash-MD, arXiv 2312.00886: mix towards μ, then improve against the mixture; (n,).

    π^μ ∝ π^(1−ητ) μ^(ητ), then π ← π^μ exp(η P(· ≻ π^μ)), renormalised. Needs ητ ≤ 1.
    """
    mixture = geometric_mixture(policy, reference, eta * tau)
    return normalise(mixture.log() + eta * preference @ mixture)


# ---------------------------------------------------------------------------------------------
# policies: tables of logits over completions of one token or of several
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Completions:
    """All completions of one prompt, as the leaves of a prefix tree; lengths may differ, as after an end of
    sequence.

    A policy over them is a table of logits (S, V), one row for each prefix that has to be continued.
    """

    tokens: tuple[tuple[int, ...], ...]
    prefixes: tuple[tuple[int, ...], ...] = field(init=False)
    allowed: torch.Tensor = field(init=False)  # (S, V) which tokens may follow a prefix
    rows: torch.Tensor = field(init=False)  # (n, T) the prefix of each token, 0 where padded
    columns: torch.Tensor = field(init=False)  # (n, T) the token, a legal one where padded
    mask: torch.Tensor = field(init=False)  # (n, T) 1 on tokens, 0 on padding

    def __post_init__(self):
        prefixes = sorted({y[:t] for y in self.tokens for t in range(len(y))}, key=lambda s: (len(s), s))
        longest = max(map(len, self.tokens))
        allowed = torch.zeros(len(prefixes), 1 + max(max(y) for y in self.tokens), dtype=torch.bool)
        rows = torch.zeros(len(self.tokens), longest, dtype=torch.long)
        columns = torch.full_like(rows, self.tokens[0][0])
        mask = torch.zeros_like(rows, dtype=torch.float64)
        for i, y in enumerate(self.tokens):
            for t, token in enumerate(y):
                rows[i, t], columns[i, t], mask[i, t] = prefixes.index(y[:t]), token, 1
                allowed[rows[i, t], token] = True
        # Frozen, so that nothing else writes these.
        for name, value in (
            ("prefixes", tuple(prefixes)),
            ("allowed", allowed),
            ("rows", rows),
            ("columns", columns),
            ("mask", mask),
        ):
            object.__setattr__(self, name, value)

    def next_token_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """(S, V) logits to (S, V) log-probs, −inf on tokens that may not follow."""
        return torch.log_softmax(logits.masked_fill(~self.allowed, -torch.inf), -1)

    def token_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """(S, V) logits to (n, T) log-probs of each completion's tokens.

        The padding holds the log-prob of some token, not 0, as a padded batch of a language model does:
        whoever forgets the mask is seen.
        """
        flat = (
            self.next_token_logprobs(logits)
            .flatten()
            .index_select(0, (self.rows * self.allowed.shape[1] + self.columns).flatten())
        )
        return flat.view(self.rows.shape)

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """(S, V) logits to (n,) log π(y), summed over tokens."""
        return (self.token_logprobs(logits) * self.mask).sum(-1)

    def logits_of(self, policy: torch.Tensor) -> torch.Tensor:
        """(S, V) logits at which the completions have the probabilities `policy` (n,): subtrees' sums."""
        weights = torch.zeros(self.allowed.shape, dtype=torch.float64)
        for y, p in zip(self.tokens, policy.tolist(), strict=True):
            for t, token in enumerate(y):
                weights[self.prefixes.index(y[:t]), token] += p
        return torch.where(self.allowed, weights, 1.0).log()

    def random_logits(self, seed: int, scale: float = 1.0) -> torch.Tensor:
        """(S, V) normal logits."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.allowed.shape, generator=generator, dtype=torch.float64)


def one_token(n: int) -> Completions:
    """n completions of one token each: a tabular softmax policy."""
    return Completions(tuple((i,) for i in range(n)))


def two_tokens(vocabulary: int) -> Completions:
    """All vocabulary² completions of two tokens."""
    return Completions(tuple((i, j) for i in range(vocabulary) for j in range(vocabulary)))


# Token 0 ends the sequence at once; the others are followed by one more token. As many leaves as the games
# here have completions.
RAGGED = {3: Completions(((0,), (1, 0), (1, 1))), 5: Completions(((0,), (1, 0), (1, 1), (2, 0), (2, 1)))}


def per_token_mixture(
    completions: Completions, policy: torch.Tensor, reference: torch.Tensor, beta: float
) -> torch.Tensor:
    """(n,) what one samples by mixing next-token distributions, π(·|s)^(1−β) μ(·|s)^β renormalised at every
    prefix s.

    Args:
        policy, reference: logits (S, V), mixed as they are: they differ from log-probs by a constant in each
            row, which drops out.
    """
    return completions.logprobs((1 - beta) * policy + beta * reference).exp()


# ---------------------------------------------------------------------------------------------
# losses in expectation: the scripts' own functions, summed over every completion or pair
# ---------------------------------------------------------------------------------------------


def of_first(x: torch.Tensor) -> torch.Tensor:
    """(n, ...) to (n², ...): the values of y in every pair (y, y'), as a flattened (n, n) matrix has them."""
    return x[:, None].expand(len(x), len(x), *x.shape[1:]).flatten(0, 1)


def of_second(x: torch.Tensor) -> torch.Tensor:
    """(n, ...) to (n², ...): the values of y' in every pair."""
    return x[None].expand(len(x), len(x), *x.shape[1:]).flatten(0, 1)


def expected_preference_loss(
    log_policy: torch.Tensor,
    log_reference: torch.Tensor,
    pair_weights: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
    kind: str = "ipo",
    labels: str = "soft",
) -> torch.Tensor:
    """E over pairs of `ipo_md.preference_loss`, a scalar with a gradient in log_policy only.

    Args:
        log_policy, log_reference: (n,) log-probs of whole completions.
        pair_weights: (n, n) the probability that (y, y') is sampled. Detached: nothing differentiates through
            sampling.
        preference: (n, n) P.
        labels: soft (p itself), bernoulli (the mean over a drawn 0 or 1), argmax (1[p > ½]).
    """
    logprobs = (
        of_first(log_policy),
        of_second(log_policy),
        of_first(log_reference),
        of_second(log_reference),
    )  # (n²,) each

    def each_pair(
        p,
    ):  # (n²,) judgements to (n²,) losses: one call of the real function a pair, batched by vmap
        def one(*tensors):
            return ipo_md.preference_loss(*(t[None] for t in tensors), tau, kind)

        return torch.func.vmap(one)(*logprobs, p)

    p = preference.flatten()
    if labels == "bernoulli":
        losses = p * each_pair(torch.ones_like(p)) + (1 - p) * each_pair(torch.zeros_like(p))
    else:
        losses = each_pair(argmax_game(p) if labels == "argmax" else p)
    return (pair_weights.detach().flatten() * losses).sum()


def expected_nash_md_loss(
    completions: Completions,
    logits: torch.Tensor,
    reference_logits: torch.Tensor,
    opponent: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
    loss: Callable | None = None,
) -> torch.Tensor:
    """E over y ~ sg[π], y' ~ sg[opponent] of `nash_md.nash_md_loss`, a scalar; minus its gradient is the
    expected policy gradient.

    Args:
        logits, reference_logits: (S, V).
        opponent: (n,) the distribution of y'.
        preference: (n, n) P.
        loss: another loss in its place, for showing what goes wrong without the original's details.
    """
    loss = loss or nash_md.nash_md_loss
    policy_tokens, reference_tokens = (
        completions.token_logprobs(logits),
        completions.token_logprobs(reference_logits),
    )  # (n, T)
    weights = torch.outer(completions.logprobs(logits).exp(), opponent).flatten()  # (n²,)

    def one(*tensors):
        return loss(*(t[None] for t in tensors), tau)

    losses = torch.func.vmap(one)(
        of_first(policy_tokens), of_first(reference_tokens), of_first(completions.mask), preference.flatten()
    )
    return (weights.detach() * losses).sum()


def nash_md_objective(
    completions: Completions,
    logits: torch.Tensor,
    reference_logits: torch.Tensor,
    opponent: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
) -> torch.Tensor:
    """P(π ≻ sg[π']) − τ KL(π‖μ), what Nash-MD-PG ascends, in closed form; autograd differentiates through the
    sampling too."""
    log_policy, log_reference = completions.logprobs(logits), completions.logprobs(reference_logits)  # (n,)
    policy = log_policy.exp()
    return policy @ preference @ opponent.detach() - tau * (policy * (log_policy - log_reference)).sum()


def nash_md_gradient(
    completions: Completions,
    logits: torch.Tensor,
    reference_logits: torch.Tensor,
    opponent: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
) -> torch.Tensor:
    """(S, V) the gradient of `nash_md_objective` written out, without autograd: π(s) π(v|s) [Q(s, v) − V(s)]
    (policy gradient theorem).

    Q(s, v) is the mean of (Pπ')(y) − τ log[π(y)/μ(y)] over the completions y that pass through prefix s and
    token v.
    """
    log_policy, log_reference = completions.logprobs(logits), completions.logprobs(reference_logits)
    value = preference @ opponent - tau * (log_policy - log_reference)  # (n,)
    reach = torch.zeros(completions.allowed.shape, dtype=torch.float64)  # (S, V) π(s) π(v|s)
    total = torch.zeros_like(reach)  # (S, V) π(s) π(v|s) Q(s, v)
    for i, y in enumerate(completions.tokens):
        for t, token in enumerate(y):
            s = completions.prefixes.index(y[:t])
            reach[s, token] += log_policy[i].exp()
            total[s, token] += log_policy[i].exp() * value[i]
    mean = total.sum(-1, keepdim=True) / reach.sum(-1, keepdim=True)  # (S, 1) V(s)
    return total - reach * mean


def own_token_loss(policy_logprobs, reference_logprobs, mask, preference, tau, baseline=0.5):
    """`nash_md_loss` as TRL had it: each token's score multiplies its own log-ratio, not those still to come.
    Wrong on purpose."""
    log_ratio = ((policy_logprobs - reference_logprobs) * mask).detach()  # (B, T)
    coefficient = (preference - baseline)[:, None] - tau * log_ratio
    return -(policy_logprobs * mask * coefficient).sum(-1).mean()


def gradient(function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """The gradient of a scalar function at `logits`, of the same shape."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def descend(
    function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, step_size: float, steps: int
) -> torch.Tensor:
    """Plain gradient descent; the logits at every step, (steps + 1, ...)."""
    path = [logits]
    for _ in range(steps):
        path.append(path[-1] - step_size * gradient(function, path[-1]))
    return torch.stack(path)


def pairs(policy: torch.Tensor) -> torch.Tensor:
    """(n, n) the weights of pairs whose two completions are drawn independently from `policy`."""
    return torch.outer(policy, policy)


def online_preference_loss(
    preference: torch.Tensor,
    reference: torch.Tensor,
    tau: float,
    kind: str = "ipo",
    labels: str = "soft",
    beta: float = 0.0,
):
    """The expected loss as a function of logits (n,), pairs sampled from sg[π^(1−β) μ^β]: online-IPO at
    β = 0, IPO-MD above."""

    def loss(logits):
        log_policy = torch.log_softmax(logits, -1)
        sampler = geometric_mixture(log_policy.detach().exp(), reference, beta)
        return expected_preference_loss(
            log_policy, reference.log(), pairs(sampler), preference, tau, kind, labels
        )

    return loss


def offline_preference_loss(
    preference: torch.Tensor, reference: torch.Tensor, data: torch.Tensor, tau: float
):
    """The expected IPO loss as a function of logits (n,), on a fixed data set: pairs from data ⊗ data, hard
    labels drawn by the judge."""

    def loss(logits):
        return expected_preference_loss(
            torch.log_softmax(logits, -1), reference.log(), pairs(data), preference, tau, labels="bernoulli"
        )

    return loss


def online_nash_md_loss(
    completions: Completions, preference: torch.Tensor, reference: torch.Tensor, tau: float, beta: float = 0.0
):
    """The expected Nash-MD-PG loss as a function of logits (S, V); the opponent is sg[π^(1−β) μ^β] over whole
    completions."""
    reference_logits = completions.logits_of(reference)

    def loss(logits):
        opponent = geometric_mixture(completions.logprobs(logits.detach()).exp(), reference, beta)
        return expected_nash_md_loss(completions, logits, reference_logits, opponent, preference, tau)

    return loss


# ---------------------------------------------------------------------------------------------
# figures
# ---------------------------------------------------------------------------------------------

FIGURES = Path(__file__).resolve().parent / "figures"
# Told apart by colour-blind readers, and by lightness in print.
BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#1f5fa8", "#dd6b20", "#2f9e77", "#8250a8", "#8d949e", "#1d2229"
HALO = {"markeredgecolor": "white", "markeredgewidth": 1.0}
RPS_CORNERS = ("1  rock", "2  scissors", "3  paper")
DICE_CORNERS = ("1  {2, 4, 9}", "2  {1, 6, 8}", "3  {3, 5, 7}")
MU, TAU, BETA = vector(0.6, 0.3, 0.1), 0.1, 0.125
UNIFORM = vector(1, 1, 1) / 3


def place(policies: torch.Tensor):
    """(..., 3) policies to (..., 2) points: 1 in the left corner, 2 in the right one, 3 on top."""
    return (policies @ torch.tensor([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)).numpy()


def simplex(
    axes, corners: tuple[str, str, str], window: tuple[float, float, float, float] | None = None
) -> None:
    """The triangle of all policies over three completions, with lines at every fifth; `window`
    (x0, x1, y0, y1) enlarges a part."""
    axes.set_aspect("equal")
    axes.axis("off")
    lines = 10 if window else 5
    for k in range(lines):
        for i in range(3):
            ends = torch.zeros(2, 3, dtype=torch.float64)
            ends[:, i] = k / lines
            ends[0, (i + 1) % 3] = ends[1, (i + 2) % 3] = 1 - k / lines
            axes.plot(
                *place(ends).T,
                color=INK if k == 0 else GREY,
                lw=1.0 if k == 0 else 0.4,
                alpha=1 if k == 0 else 0.4,
                zorder=1,
            )
    if window:
        axes.set(xlim=window[:2], ylim=window[2:])
        return
    axes.text(-0.02, -0.03, corners[0], ha="left", va="top", color=INK)
    axes.text(1.02, -0.03, corners[1], ha="right", va="top", color=INK)
    axes.text(0.5, math.sqrt(3) / 2 + 0.025, corners[2], ha="center", va="bottom", color=INK)
    axes.set(xlim=(-0.06, 1.06), ylim=(-0.1, 0.95))


def trajectory(axes, policies: torch.Tensor, color, width: float = 1.2, alpha: float = 0.85) -> None:
    """A path on the simplex, from a small dot; one arrow head where half of its length is behind it."""
    points = place(policies)
    axes.plot(*points.T, color=color, lw=width, alpha=alpha, zorder=3, solid_capstyle="round")
    axes.plot(*points[0], "o", color=color, ms=3.2, zorder=3)
    lengths = ((points[1:] - points[:-1]) ** 2).sum(-1) ** 0.5
    k = int((lengths.cumsum() < 0.4 * lengths.sum()).sum())
    if 0 < k < len(points) - 1:
        axes.annotate(
            "",
            points[k + 1],
            points[k],
            arrowprops={"arrowstyle": "-|>", "color": color, "lw": 0, "mutation_scale": 9},
            zorder=4,
        )


def star(
    axes,
    policy: torch.Tensor,
    color,
    label: str = "",
    offset: tuple[float, float] = (9, 5),
    marker: str = "*",
    size: float = 15,
    **text,
) -> None:
    """A marked policy with a label beside it."""
    x, y = place(policy)
    axes.plot(x, y, marker, color=color, ms=size, zorder=6, **HALO)
    if label:
        note(axes, label, (x, y), offset, color, **text)


def note(axes, label: str, point, offset: tuple[float, float], color, **text) -> None:
    """Text beside a point, on a white ground that keeps it legible over lines."""
    ground = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}
    axes.annotate(
        label, point, offset, textcoords="offset points", color=color, bbox=ground, zorder=7, **text
    )


def starts_on_the_rim(count: int, margin: float = 0.06) -> torch.Tensor:
    """(count, 3) policies spread evenly along the simplex's edges, a little inside."""
    corners = torch.eye(3, dtype=torch.float64)
    rim = []
    for k in range(count):
        side, along = divmod(3 * k / count, 1)
        rim.append((1 - along) * corners[int(side)] + along * corners[(int(side) + 1) % 3])
    return (1 - 3 * margin) * torch.stack(rim) + margin


def draw_identity(plt):
    """Section 1: the parabola, and the minima of the three losses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.7))
    tau, h = 1.0, torch.linspace(-1.4, 2.0, 120, dtype=torch.float64)

    def loss(h, p, tau, kind="ipo"):
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.stack(
            [ipo_md.preference_loss(x[None], zero, zero, zero, zero + p, tau, kind) for x in h]
        )

    for p, color in ((0.5, GREY), (0.7, BLUE), (0.9, PURPLE), (1.0, ORANGE)):
        bottom, floor = (p - 0.5) / tau, (1 - (2 * p - 1) ** 2) / (4 * tau**2)
        left.plot(h, (h - bottom) ** 2 + floor, color=color, lw=1.5)
        left.plot(h[::8], loss(h[::8], p, tau), "o", color=color, ms=3.6)
        left.plot(bottom, floor, "*", color=color, ms=13, zorder=5, **HALO)
        left.annotate(
            f"p = {p:g}",
            (h[-1], (h[-1] - bottom) ** 2 + floor),
            (5, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )
    left.plot(h, 1 / (4 * tau**2) - h**2, ":", color=INK, lw=1)
    left.text(-0.9, -0.3, "minima: ¼ − h²", ha="right", va="center", fontsize=8.5)
    left.set(
        xlim=(-2.5, 2.6),
        ylim=(-0.6, 4.5),
        xlabel="$h(y, y')$",
        ylabel="L at $\\tau = 1$",
        title="dots: preference_loss   lines: the square",
    )
    p, s = 0.7, torch.linspace(-1, 3, 161, dtype=torch.float64)
    for kind, color, bottom in (
        ("ipo", BLUE, p - 0.5),
        ("dpo", ORANGE, math.log(p / (1 - p))),
        ("slic", GREEN, 1.0),
    ):
        values = loss(s, p, 1.0, kind)
        at_bottom = loss(torch.tensor([bottom], dtype=torch.float64), p, 1.0, kind)[0]
        right.plot(s, values - at_bottom, color=color, lw=1.6)
        right.plot(bottom, 0, "*", color=color, ms=13, zorder=5, **HALO)
    right.text(1.02, 0.86, "ipo", color=BLUE, ha="right")
    right.text(2.75, 0.16, "dpo", color=ORANGE, ha="right")
    right.text(-0.62, 0.78, "slic", color=GREEN, ha="left")
    right.set(
        xlabel="$s = \\tau h$",
        ylabel="L − min L",
        ylim=(-0.08, 1.2),
        xlim=(-1, 3),
        title="p = 0.7: the siblings aim at other log-ratios",
    )
    return figure


def draw_nash(plt):
    """Section 2: the closed form for two completions; the path of the Nash as τ falls."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.9), width_ratios=(1, 1.05))
    taus = torch.logspace(-2, 1, 200, dtype=torch.float64)
    for p, color in ((0.55, GREY), (0.7, BLUE), (0.9, ORANGE)):
        left.plot(taus, torch.sigmoid((p - 0.5) / taus), color=color, lw=1.6)
        solved = [regularised_nash(two_actions(p), vector(0.5, 0.5), t.item())[0] for t in taus[5::16]]
        left.plot(taus[5::16], solved, "o", color=color, ms=4)
    for label, place_at, color in (
        ("p = .9", (0.36, 0.83), ORANGE),
        ("p = .7", (0.135, 0.745), BLUE),
        ("p = .55", (0.03, 0.7), GREY),
    ):
        left.text(*place_at, label, color=color, ha="left" if color == ORANGE else "right")
    for tau in (0.1, 1.0):
        value = regularised_nash(two_actions(0.7), vector(0.5, 0.5), tau)[0]
        left.plot(tau, value, "*", color=BLUE, ms=14, zorder=5, **HALO)
        far = (
            {"xytext": (-9, -4), "ha": "right"}
            if tau < 1
            else {"xytext": (24, 34), "arrowprops": {"arrowstyle": "-", "lw": 0.6, "color": BLUE}}
        )
        left.annotate(f"{value:.6f}", (tau, value), textcoords="offset points", color=BLUE, **far)
    left.set(
        xscale="log",
        xlabel="$\\tau$",
        ylabel="$\\pi_1$ at the Nash",
        title="two completions: $\\sigma((p - ½)/\\tau)$, uniform $\\mu$",
        ylim=(0.48, 1.02),
    )
    simplex(right, RPS_CORNERS)
    right.set_title("rock-paper-scissors: the Nash as $\\tau$ falls")
    for mu, color, beside in (
        (MU, BLUE, (7, -4)),
        (vector(0.08, 0.12, 0.8), GREEN, (-16, -4)),
        (vector(0.12, 0.83, 0.05), ORANGE, (7, -4)),
    ):
        path = torch.stack(
            [regularised_nash(rock_paper_scissors(), mu, t) for t in torch.logspace(2, -3, 160).tolist()]
        )
        trajectory(right, path, color, 1.6)
        for tau in (1.0, 0.3, 0.1, 0.03):
            right.plot(
                *place(regularised_nash(rock_paper_scissors(), mu, tau)),
                "o",
                color=color,
                ms=4.2,
                zorder=5,
                **HALO,
            )
        star(right, mu, color, "$\\mu$", beside, "s", 6.5)
    star(right, regularised_nash(rock_paper_scissors(), MU, TAU), BLUE, "$\\tau = .1$", (-40, -2), "*", 13)
    star(right, UNIFORM, INK, "$\\tau \\to 0$", (4, -16), "o", 6)
    return figure


def draw_online_ipo(plt):
    """Section 3: online-IPO's descent from the rim, and its error in four games."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.9), width_ratios=(1.05, 1))
    game = rock_paper_scissors()
    nash = regularised_nash(game, MU, TAU)
    simplex(left, RPS_CORNERS)
    left.set_title("from everywhere to the Nash")
    for start in starts_on_the_rim(9, 0.04):
        trajectory(
            left,
            descend(online_preference_loss(game, MU, TAU), start.log(), 0.025, 600).softmax(-1),
            BLUE,
            1.1,
            0.75,
        )
    star(left, MU, GREY, "$\\mu$", (-15, -3), "s", 6.5)
    star(left, nash, ORANGE, "Nash", (-36, 4))
    games = [("rock-paper-scissors", game, MU, 0.1, BLUE)]
    games += [
        (f"random, n = 5, seed {seed}", *random_game(5, seed), 0.3, color)
        for seed, color in ((0, ORANGE), (3, GREEN), (4, PURPLE))
    ]
    for name, preference, reference, step_size, color in games:
        path = descend(
            online_preference_loss(preference, reference, TAU), reference.log(), step_size, 600
        ).softmax(-1)
        right.plot(
            (path - regularised_nash(preference, reference, TAU)).abs().amax(-1),
            color=color,
            lw=1.5,
            label=name,
        )
    right.set_xlim(-10, 610)
    right.axhline(1e-6, color=GREY, lw=0.8, ls=":")
    right.text(600, 1.4e-6, "tolerance of the test", color=GREY, ha="right", va="bottom")
    right.set(
        yscale="log",
        xlabel="steps of gradient descent",
        ylabel="largest error of any $\\pi_y$",
        title="how close it comes",
        ylim=(1e-15, 1),
    )
    right.legend(frameon=False, loc="upper right", fontsize=8.5)
    return figure


def draw_offline_ipo(plt):
    """Section 4: the dice from eighteen data distributions, offline and online."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4.1))
    game, starts = dice_game(), starts_on_the_rim(18, 0.05)
    for axes, title in (
        (left, "offline: pairs from fixed data"),
        (right, "online: pairs from the policy itself"),
    ):
        simplex(axes, DICE_CORNERS)
        axes.set_title(title)
    colors = [colorsys.hls_to_rgb(0.55 + k / len(starts), 0.42, 0.5) for k in range(len(starts))]
    for start, color in zip(starts, colors, strict=True):
        trajectory(
            left,
            descend(offline_preference_loss(game, UNIFORM, start, TAU), start.log(), 0.1, 400).softmax(-1),
            color,
            1.0,
        )
        left.plot(
            *place(offline_ipo_optimum(game, UNIFORM, start, TAU)), "o", color=color, ms=5.5, zorder=5, **HALO
        )
        trajectory(
            right,
            descend(online_preference_loss(game, UNIFORM, TAU), start.log(), 0.1, 400).softmax(-1),
            color,
            1.0,
        )
    path = descend(offline_preference_loss(game, UNIFORM, MU, TAU), MU.log(), 0.1, 600).softmax(-1)
    trajectory(left, path, INK, 2.2, 1)
    star(left, MU, INK, "data (.6, .3, .1)", (-8, -17), "s", 6.5)
    star(left, path[-1], INK)
    thin = {"arrowstyle": "-", "lw": 0.7, "color": INK, "shrinkB": 5}
    left.annotate("(.3656, .2478, .3865)", place(path[-1]), (-0.06, 0.64), arrowprops=thin, zorder=7)
    star(right, UNIFORM, INK, "Nash (⅓, ⅓, ⅓)", (10, -32))
    return figure


def draw_online_dpo(plt):
    """Section 5: IPO's and DPO's targets; where both rest in a cycle and under Bradley-Terry."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.8, 3.8), width_ratios=(0.9, 1, 1))
    p = torch.linspace(0.02, 0.98, 193, dtype=torch.float64)
    left.plot(p, p - 0.5, color=BLUE, lw=1.8)
    left.plot(p, torch.logit(p), color=ORANGE, lw=1.8)
    left.plot(p, 4 * (p - 0.5), ":", color=ORANGE, lw=1)
    left.plot(0.5, 0, "o", color=INK, ms=5, zorder=5, **HALO)
    left.text(0.97, 0.12, "Nash: $p - ½$", color=BLUE, ha="right", va="top")
    left.text(0.83, 2.1, "DPO: logit $p$", color=ORANGE, ha="right", va="top")
    left.text(0.2, -2.0, "its slope\nat ½ is 4", color=ORANGE, ha="left", va="top", fontsize=8.5)
    left.set(xlabel="p", ylabel="$\\tau h$ at rest", title="two completions", ylim=(-3, 3))
    game, tau = rock_paper_scissors(), 0.3
    simplex(middle, RPS_CORNERS)
    middle.set_title("rock-paper-scissors, $\\tau = .3$")
    for start in starts_on_the_rim(3, 0.08):
        trajectory(
            middle,
            descend(online_preference_loss(game, MU, tau), start.log(), 0.05, 400).softmax(-1),
            BLUE,
            1.1,
            0.8,
        )
        trajectory(
            middle,
            descend(online_preference_loss(game, MU, tau, "dpo"), start.log(), 0.8, 1200).softmax(-1),
            ORANGE,
            1.0,
            0.6,
        )
    rest = descend(online_preference_loss(game, MU, tau, "dpo"), MU.log(), 1.0, 2000)[-1].softmax(-1)
    star(middle, regularised_nash(game, MU, tau), BLUE, "Nash", (-36, -2))
    star(middle, rest, ORANGE, "online-DPO", (12, 2))
    star(middle, MU, GREY, "$\\mu$", (8, -4), "s", 6)
    rewards, tau = vector(0.0, 1.0, 2.0), 0.6
    game, mu = bradley_terry(rewards), vector(0.5, 0.35, 0.15)
    simplex(right, ("1  r = 0", "2  r = 1", "3  r = 2"))
    right.set_title("Bradley-Terry, $\\tau = .6$")
    for start in starts_on_the_rim(6, 0.05):
        trajectory(
            right,
            descend(online_preference_loss(game, mu, tau), start.log(), 0.1, 300).softmax(-1),
            BLUE,
            1.0,
            0.6,
        )
        trajectory(
            right,
            descend(online_preference_loss(game, mu, tau, "dpo"), start.log(), 1.0, 1000).softmax(-1),
            ORANGE,
            1.0,
            0.6,
        )
    star(right, regularised_nash(game, mu, tau), BLUE, "Nash", (-38, 4))
    star(right, rlhf_optimum(rewards, mu, tau), ORANGE, "RLHF", (10, 4))
    star(right, mu, GREY, "$\\mu$", (-16, -4), "s", 6)
    return figure


def draw_labels(plt):
    """Section 6: soft, drawn and rounded labels on the dice."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4.0), width_ratios=(1.05, 1))
    game, steps = dice_game(), 400
    soft_nash, argmax_nash = regularised_nash(game, MU, TAU), regularised_nash(argmax_game(game), MU, TAU)
    simplex(left, DICE_CORNERS)
    left.set_title("the dice: soft and rounded labels")
    paths = {}
    for labels, color in (("soft", BLUE), ("argmax", ORANGE)):
        for start in starts_on_the_rim(6, 0.05):
            path = descend(
                online_preference_loss(game, MU, TAU, labels=labels), start.log(), 0.05, steps
            ).softmax(-1)
            trajectory(left, path, color, 1.0, 0.6)
        paths[labels] = descend(
            online_preference_loss(game, MU, TAU, labels=labels), UNIFORM.log(), 0.05, steps
        ).softmax(-1)
    generator, logits, sampled = torch.Generator().manual_seed(0), UNIFORM.log(), [UNIFORM]
    for step in range(steps):  # as in training: pairs are sampled, each label is one throw of the dice
        y = torch.multinomial(sampled[-1], 512, replacement=True, generator=generator).view(2, 256)
        label = torch.bernoulli(game[y[0], y[1]], generator=generator)

        def loss(x, y=y, label=label):
            log_policy, log_reference = torch.log_softmax(x, -1), MU.log()
            return ipo_md.preference_loss(
                log_policy[y[0]], log_policy[y[1]], log_reference[y[0]], log_reference[y[1]], label, TAU
            )

        logits = logits - 0.05 / (1 + step / 50) * gradient(loss, logits)
        sampled.append(logits.softmax(-1))
    paths["bernoulli, sampled"] = torch.stack(sampled)
    trajectory(left, paths["bernoulli, sampled"], GREEN, 1.3)
    star(left, soft_nash, BLUE, "Nash of p", (-60, 8))
    star(left, argmax_nash, ORANGE, "Nash of 1[p > ½]", (14, 10))
    star(left, MU, GREY, "$\\mu$", (8, -6), "s", 6)
    for (labels, path), color in zip(paths.items(), (BLUE, ORANGE, GREEN), strict=True):
        right.plot((path - soft_nash).abs().amax(-1), color=color, lw=1.5, label=labels)
    right.set(
        yscale="log",
        ylim=(1e-6, 1),
        xlabel="steps",
        ylabel="largest error against the Nash of p",
        title="from the uniform policy",
    )
    right.legend(frameon=False, loc="lower left")
    return figure


def draw_ipo_md(plt):
    """Section 7: resting points and mixtures for all β; the mixture against the Nash at τ/(1−β)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.9), width_ratios=(1.05, 1))
    game, betas = rock_paper_scissors(), torch.linspace(0, 0.97, 98).tolist()
    simplex(left, RPS_CORNERS, (0.08, 0.68, 0.04, 0.58))
    left.set_title("rock-paper-scissors (enlarged)")
    rests = torch.stack([ipo_md_fixed_point(game, MU, TAU, b) for b in betas])
    mixtures = torch.stack([geometric_mixture(rest, MU, b) for rest, b in zip(rests, betas, strict=True)])
    left.plot(*place(rests).T, color=BLUE, lw=1.8, zorder=3)
    left.plot(*place(mixtures).T, color=ORANGE, lw=1.8, zorder=3)
    for beta in (0.125, 0.25, 0.5, 0.75, 0.9):
        rest = ipo_md_fixed_point(game, MU, TAU, beta)
        ends = torch.stack([rest, geometric_mixture(rest, MU, beta)])
        left.plot(*place(ends).T, color=GREY, lw=0.8, zorder=2)
        left.plot(*place(ends[0]), "o", color=BLUE, ms=5.5, zorder=4, **HALO)
        left.plot(*place(ends[1]), "o", color=ORANGE, ms=5.5, zorder=4, **HALO)
        note(
            left,
            f"β = {beta:g}".replace("0.", "."),
            place(ends[0]),
            (9, -3) if beta < 0.9 else (-48, 2),
            BLUE,
            fontsize=8.5,
        )
    star(left, MU, GREY, "$\\mu$", (9, -4), "s", 6)
    star(left, regularised_nash(game, MU, TAU), INK, "Nash, β = 0", (12, -8), "*", 14)
    note(left, "where it rests: π*$_β$", (0.44, 0.435), (0, 0), BLUE)
    note(left, "what it samples: the mixture", (0.33, 0.15), (0, 0), ORANGE)
    for y, color in enumerate((BLUE, ORANGE, GREEN)):
        right.plot(
            betas,
            [regularised_nash(game, MU, TAU / (1 - b))[y] for b in betas],
            color=color,
            lw=1.6,
            label=RPS_CORNERS[y],
        )
    for beta in (0.0, 0.125, 0.25, 0.5, 0.75, 0.9):
        reached = descend(online_preference_loss(game, MU, TAU, beta=beta), MU.log(), 0.1, 500)[-1].softmax(
            -1
        )
        for y, color in enumerate((BLUE, ORANGE, GREEN)):
            right.plot(beta, geometric_mixture(reached, MU, beta)[y], "o", color=color, ms=5, **HALO)
    right.set(
        xlabel="β",
        ylabel="probability",
        title="dots: π$^{1-β}$μ$^{β}$ after descent   lines: Nash at τ/(1−β)",
        ylim=(0, 0.7),
    )
    right.legend(frameon=False, loc="upper left", ncols=3, fontsize=8.5)
    return figure


def disagreeing_policies() -> tuple[Completions, torch.Tensor, torch.Tensor]:
    """Two tokens of {a, b}; policy and reference agree on all but what follows b. Completions, policy logits,
    reference logits."""
    completions = two_tokens(2)
    policy = torch.zeros(3, 2, dtype=torch.float64)
    policy[completions.prefixes.index((1,))] = vector(0.95, 0.05).log()
    reference = torch.zeros(3, 2, dtype=torch.float64)
    reference[completions.prefixes.index((1,))] = vector(0.05, 0.95).log()
    return completions, policy, reference


def draw_mixture(plt):
    """Section 8: one pair of policies mixed both ways; the distance for all β."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.6))
    completions, policy, reference = disagreeing_policies()
    rows = (
        ("policy", completions.logprobs(policy).exp(), GREY),
        ("reference", completions.logprobs(reference).exp(), "#c9ced6"),
        ("mixed token by token", per_token_mixture(completions, policy, reference, 0.5), BLUE),
        (
            "mixed as sequences",
            geometric_mixture(completions.logprobs(policy).exp(), completions.logprobs(reference).exp(), 0.5),
            ORANGE,
        ),
    )
    for k, (label, values, color) in enumerate(rows):
        left.bar([i + 0.2 * (k - 1.5) for i in range(4)], values, 0.19, color=color, label=label)
    left.set_xticks(range(4), ("a a", "a b", "b a", "b b"))
    left.set(ylabel="probability", title="β = ½", ylim=(0, 0.68))
    left.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2)
    betas = torch.linspace(0, 1, 81).tolist()

    def distance(completions, policy, reference):
        sequences = completions.logprobs(policy).exp(), completions.logprobs(reference).exp()
        return [
            (per_token_mixture(completions, policy, reference, b) - geometric_mixture(*sequences, b))
            .abs()
            .sum()
            / 2
            for b in betas
        ]

    right.plot(betas, distance(completions, policy, reference), color=BLUE, lw=1.8)
    right.plot([], [], color=BLUE, label="the pair on the left")
    for seed in range(6):
        tables = two_tokens(3)
        right.plot(
            betas,
            distance(tables, 2 * tables.random_logits(seed), 2 * tables.random_logits(100 + seed)),
            color=ORANGE,
            lw=1,
            alpha=0.7,
        )
    right.plot([], [], color=ORANGE, lw=1, label="random pairs, two tokens out of three")
    right.plot(
        betas,
        distance(one_token(5), one_token(5).random_logits(0), one_token(5).random_logits(1)),
        color=GREEN,
        lw=2,
    )
    right.plot([], [], color=GREEN, label="completions of one token")
    right.legend(frameon=False, loc="upper left", fontsize=8.5)
    right.set(
        xlabel="β", ylabel="total variation", title="distance between the two mixtures", ylim=(-0.01, 0.4)
    )
    return figure


def draw_nash_md_pg(plt):
    """Section 9: the enumerated against the closed gradient; where two opponents lead."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4.0), width_ratios=(1, 1.05))
    rps = rock_paper_scissors()
    for game, mu in ((rps, MU), *(random_game(5, seed) for seed in (0, 3, 4))):
        for completions, color, marker, size in (
            (one_token(len(mu)), BLUE, "o", 5.5),
            (RAGGED[len(mu)], ORANGE, "x", 4),
        ):
            for seed in range(4):
                logits, reference_logits = completions.random_logits(seed), completions.logits_of(mu)
                opponent = geometric_mixture(completions.logprobs(logits).exp(), mu, BETA)
                rest = (reference_logits, opponent, game, TAU)
                enumerated = -gradient(
                    lambda x, c=completions, r=rest: expected_nash_md_loss(c, x, *r), logits
                )
                closed = nash_md_gradient(completions, logits, *rest)
                used = completions.allowed
                left.plot(
                    closed[used],
                    enumerated[used],
                    marker,
                    color=color,
                    ms=size,
                    alpha=0.6,
                    mew=1.2 if marker == "x" else 0,
                )
    left.axline((0, 0), slope=1, color=INK, lw=0.7, zorder=0)
    left.set(
        xlabel="∂/∂logit of $P(\\pi \\succ \\pi') - \\tau\\,$KL, closed form",
        ylabel="− expected gradient of nash_md_loss",
        title="every component, four games",
    )
    left.plot([], [], "o", color=BLUE, label="one token")
    left.plot([], [], "x", color=ORANGE, label="up to two tokens")
    left.legend(frameon=False, loc="upper left")
    left.locator_params(nbins=5)
    window = (0.16, 0.74, 0.1, 0.5)
    simplex(right, RPS_CORNERS, window)
    right.set_title("rock-paper-scissors (enlarged): the opponent decides")
    for start in (vector(0.46, 0.36, 0.18), vector(0.6, 0.12, 0.28)):
        for beta, color in ((0.0, BLUE), (BETA, ORANGE)):
            path = descend(
                online_nash_md_loss(one_token(3), rps, MU, TAU, beta),
                one_token(3).logits_of(start),
                0.3,
                1000,
            )
            trajectory(right, path[:, 0].softmax(-1), color, 1.1, 0.7)
    star(
        right,
        regularised_nash(rps, MU, TAU),
        BLUE,
        "self: the Nash\n(.4321, .2303, .3376)",
        (48, -30),
        fontsize=9,
    )
    star(
        right,
        ipo_md_fixed_point(rps, MU, TAU, BETA),
        ORANGE,
        "mixture, β = .125\n(.4159, .2033, .3808)",
        (52, 26),
        fontsize=9,
    )
    return figure


def draw_kl_to_go(plt):
    """Section 10: cosines with the exact KL gradient; which log-ratios each coefficient holds."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.4, 3.5), width_ratios=(1.5, 1, 1))
    completions, tie, cosines = two_tokens(3), torch.full((9, 9), 0.5, dtype=torch.float64), []
    for seed in range(80):
        logits, reference_logits = completions.random_logits(seed), completions.random_logits(100 + seed)
        rest = (reference_logits, completions.logprobs(reference_logits).exp(), tie, TAU)
        exact = gradient(lambda x, r=rest: nash_md_objective(completions, x, *r), logits).flatten()
        pair = [
            -gradient(
                lambda x, r=rest, f=loss: expected_nash_md_loss(completions, x, *r, f), logits
            ).flatten()
            for loss in (None, own_token_loss)
        ]
        cosines.append([torch.nn.functional.cosine_similarity(g, exact, dim=0).item() for g in pair])
    cosines.sort(key=lambda pair: pair[1])
    left.plot([pair[0] for pair in cosines], color=BLUE, lw=2)
    left.plot([pair[1] for pair in cosines], "o", color=ORANGE, ms=4)
    left.text(79, 1.03, "reward-to-go: 1.000 each time", color=BLUE, ha="right", va="bottom")
    left.text(14, 0.78, "own token only", color=ORANGE)
    left.set(
        xlabel="80 random policies, sorted",
        ylabel="cosine with the exact KL gradient",
        title="two tokens, no preference: only the KL acts",
        ylim=(min(c[1] for c in cosines) - 0.08, 1.15),
    )
    length = 5

    def dependence(loss):
        """(T, T) how token n's coefficient answers to the log-ratio of token m, read off the gradient of the
        loss."""

        def coefficients(reference):
            policy = torch.zeros(1, length, dtype=torch.float64, requires_grad=True)
            ones = torch.ones(1, length, dtype=torch.float64)
            return -torch.autograd.grad(loss(policy, reference[None], ones, vector(0.5), 1.0), policy)[0][0]

        return torch.stack([-coefficients(-unit) for unit in torch.eye(length, dtype=torch.float64)], 1)

    for axes, loss, title in (
        (middle, nash_md.nash_md_loss, "nash_md_loss"),
        (right, own_token_loss, "own token only (wrong)"),
    ):
        axes.imshow(dependence(loss), cmap="Blues" if axes is middle else "Oranges", vmin=0, vmax=2.6)
        for n in range(length):
            for m in range(length):
                value = dependence(loss)[n, m].item()
                axes.text(
                    m,
                    n,
                    "−τ" if value > 0.5 else "·",
                    ha="center",
                    va="center",
                    color=INK if value > 0.5 else GREY,
                )
        axes.set_xticks(range(length), [str(i + 1) for i in range(length)])
        axes.set_yticks(range(length), [str(i + 1) for i in range(length)])
        axes.set(xlabel="log-ratio of token m", ylabel="coefficient of token n", title=title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def draw_nash_md(plt):
    """Section 11: KL to the Nash by step, with Theorem 1's bound; resting points of constant steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 4.0))
    game, steps = rock_paper_scissors(), 3000
    nash = regularised_nash(game, MU, TAU)
    start = vector(0.05, 0.9, 0.05)

    def run(eta, steps=steps, start=start):
        path = [start]
        for t in range(steps):
            path.append(nash_md_step(path[-1], game, MU, TAU, eta(t)))
        return torch.stack(path)

    def divergence(path):
        return (nash * (nash.log() - path.log())).sum(-1)

    t = torch.arange(1, steps + 1)
    falling = run(lambda t: 2 / (TAU * (t + 2)))
    left.plot(t, 8 / (TAU**2 * (t + 1)), "--", color=INK, lw=1.1)
    left.text(4, 330, "Theorem 1:  8/(τ²(T+1))", color=INK)
    left.plot(t, divergence(falling)[1:], color=BLUE, lw=1.8)
    left.text(1400, 2.2e-8, "η$_t$ = 2/(τ(t+2))", color=BLUE, ha="right")
    for eta, color in ((2.0, ORANGE), (0.5, PURPLE), (0.1, GREEN)):
        path = run(lambda t, e=eta: e)
        left.plot(t, divergence(path)[1:], color=color, lw=1.4)
        left.text(steps * 1.15, divergence(path)[-1], f"η = {eta:g}", color=color, va="center")
    left.set(
        xscale="log",
        yscale="log",
        xlabel="T",
        ylabel="KL(π*, π$_T$)",
        title="falling steps converge, constant ones stop short",
        ylim=(1e-8, 2e3),
    )
    window = (0.28, 0.62, 0.2, 0.53)
    simplex(right, RPS_CORNERS, window)
    right.set_title("where constant steps rest (enlarged)")
    etas = torch.linspace(1e-3, 4, 80).tolist()
    rests = torch.stack([ipo_md_fixed_point(game, MU, TAU, eta * TAU) for eta in etas])
    right.plot(*place(rests).T, color=GREY, lw=1.6, zorder=2)
    for eta, color in ((4.0, INK), (2.0, ORANGE), (0.5, PURPLE)):
        path = run(lambda t, e=eta: e, 1500, vector(0.4, 0.35, 0.25))
        if eta < 4:
            trajectory(right, path, color, 0.9, 0.6)
        star(right, path[-1], color, f"η = {eta:g}", (9, -3), "o", 6.5)
    star(right, nash, BLUE, "Nash", (-36, -4))
    return figure


def main() -> None:
    """Draw every figure of docs/theory.md."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    torch.set_num_threads(1)  # tensors of a few entries: a second thread only waits
    plt.rcParams.update(
        {
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.labelcolor": INK,
            "text.color": INK,
            "axes.edgecolor": GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e8eaee",
            "xtick.color": INK,
            "ytick.color": INK,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.08,
        }
    )
    FIGURES.mkdir(exist_ok=True)
    drawings = {
        name.removeprefix("draw_"): function
        for name, function in globals().items()
        if name.startswith("draw_")
    }
    for name in sys.argv[1:] or drawings:
        figure = drawings[name](plt)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=140)
        plt.close(figure)
        # 128 colours are enough for lines on white, and keep each picture below 100 kB.
        target = FIGURES / f"theory_{name}.png"
        Image.open(buffer).convert("RGB").quantize(128).save(target, optimize=True)
        print(f"{target.relative_to(FIGURES.parents[1])}  {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
