"""The papers' claims on problems small enough to compute: the studies behind docs/claims.md.

    python benchmark/claims.py run bandit       # one of STUDIES below; seconds to some minutes on one thread

Finite games and tables of replies; the bandit stands in bandit.py. Every loss is the scripts' own, called
through its module and summed over all replies or pairs; games and solutions are those of docs/theory.py and
docs/play.py. Nothing is sampled. Each study returns the figures that benchmark/claims.py records in
results/claims.json and the page prints.

Shapes: n replies, N items or pairs.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import fields

import record
import torch
from bandit import bandit, mean_and_error

sys.path.insert(0, str(record.ROOT / "docs"))

import afd_divergences
import play
import theory

import afd
import ipo_md
import selm
import spin
from cleanalign import games

TAU, BETA, MU = theory.TAU, theory.BETA, theory.MU
GAMES = {  # name: (preference, reference, stable step of descent on online-IPO), as in tests/test_theory.py
    "rock-paper-scissors": (theory.rock_paper_scissors(), MU, 0.1),
    **{f"random {seed}": (*theory.random_game(5, seed), 0.3) for seed in (0, 3, 4)},
}


def mean_loss(loss: Callable, weights: torch.Tensor, columns: tuple, *constants) -> torch.Tensor:
    """Σ of a script's loss over (N,) items, weighted by (N,) probabilities that sum to 1, a scalar. The loss
    is called as its script calls it, on batches, here of one; nothing differentiates through the weights."""

    def one(*tensors):
        return loss(*(x[None] for x in tensors), *constants)

    return (weights.detach() * torch.func.vmap(one)(*columns)).sum()


def minimise(function: Callable, start: torch.Tensor) -> torch.Tensor:
    """Where a smooth scalar function of a tensor is least, by L-BFGS, begun anew a few times: near the
    minimum its line search ends at rounding."""
    variable = start.clone().requires_grad_()

    def closure():
        variable.grad = None
        value = function(variable)
        value.backward()
        return value

    for _ in range(4):
        optimiser = torch.optim.LBFGS(
            [variable], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )
        optimiser.step(closure)
    return variable.detach()


def random_policy(n: int, seed: int) -> torch.Tensor:
    """(n,) a softmax of normal logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(n, generator=generator, dtype=torch.float64), 0)


def largest(values) -> float:
    """The largest absolute value of tensors or numbers."""
    return max(float(torch.as_tensor(value).abs().max()) for value in values)


# --- SELM ----------------------------------------------------------------------------------------


def exploration(log_policy: torch.Tensor, log_reference: torch.Tensor, beta: float, alpha: float):
    """E over y_s ~ π_ref of the second term of `selm.selm_loss`: the loss of a pair with no margin, less
    log 2. A scalar."""
    zero = torch.zeros_like(log_policy)
    columns = (zero, zero, zero, zero, log_policy, log_reference)
    return mean_loss(selm.selm_loss, log_reference.exp(), columns, beta, alpha) - math.log(2)


def selm_identities() -> dict:
    """What the paper derives of its objective, on random problems of five replies, each to machine precision.

    - closed_form: max over π of E_π r − E_ref r − β KL(π‖π_ref), found by L-BFGS, against minus the
      exploration term over α at the policy whose implicit reward is r.
    - gradient: the exploration term's gradient against αβ E_π[exp(−r̂/β) ∇log π], r̂ = β log(π/π_ref).
    - at_reference: the same gradient where π = π_ref, as at the start of every iteration.
    - is_dpo: α = 0 against `ipo_md.preference_loss`, kind dpo.
    - xpo: XPO's gradient at αβ against SELM's, for one fixed reference.
    - force: at a fresh pair with K = 2, the exploration term's force on log π of the chosen response over the
      preference term's.
    """
    closed, gradients, at_reference, dpo, xpo = [], [], [], [], []
    for seed, (beta, alpha) in itertools.product(range(20), ((0.1, 1e-3), (1.0, 0.3))):
        log_reference = random_policy(5, seed).log()
        reference = log_reference.exp()
        reward = torch.randn(5, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        implied = theory.normalise(log_reference + reward / beta).log()

        def gap(logits, log_reference=log_reference, reference=reference, reward=reward, beta=beta):
            log_policy = torch.log_softmax(logits, -1)
            policy = log_policy.exp()
            kl = (policy * (log_policy - log_reference)).sum()
            return beta * kl - policy @ reward + reference @ reward

        found = -gap(minimise(gap, log_reference))
        closed.append(found + exploration(implied, log_reference, beta, alpha) / alpha)

        logits = random_policy(5, 200 + seed).log()
        policy = logits.softmax(-1)

        def explore(x, log_reference=log_reference, beta=beta, alpha=alpha):
            return exploration(torch.log_softmax(x, -1), log_reference, beta, alpha)

        implicit = beta * (policy.log() - log_reference)  # r̂
        weighted = policy * (-implicit / beta).exp()  # E_π[e^(−r̂/β) ∇log π] = Σ_y weighted(y) (1_y − π)
        written = alpha * beta * (weighted - weighted.sum() * policy)
        gradients.append(theory.gradient(explore, logits) - written)
        at_reference.append(theory.gradient(explore, log_reference))

        one, other = logits, random_policy(5, 300 + seed).log()  # (5,) each: log-probs of five pairs
        label = torch.ones(5, dtype=torch.float64)
        ours = selm.selm_loss(one, other, log_reference, log_reference.flip(0), one, one, beta, 0.0)
        theirs = ipo_md.preference_loss(one, other, log_reference, log_reference.flip(0), label, beta, "dpo")
        dpo.append(ours - theirs)

        def xpo_term(x, reference=reference, beta=beta, alpha=alpha):
            log_policy, zero = torch.log_softmax(x, -1), torch.zeros(5, dtype=torch.float64)
            columns = (zero, zero, zero, zero, log_policy, zero)  # reference_self = 0; αβ/β
            return mean_loss(selm.selm_loss, reference, columns, beta, alpha)

        xpo.append(theory.gradient(xpo_term, logits) - theory.gradient(explore, logits))
    checks = {"closed_form": closed, "gradient": gradients, "at_reference": at_reference}
    checks |= {"is_dpo": dpo, "xpo": xpo}
    return {
        "problems": len(closed),
        **{name: largest(values) for name, values in checks.items()},
        "force": {f"{alpha:g}": force(alpha) for alpha in (1e-4, 1e-3, 1e-2, 1.0)},
    }


def force(alpha: float, beta: float = 0.1) -> float:
    """|∂ exploration term| / |∂ preference term| with respect to log π of the chosen response, at a fresh
    pair whose two responses are y_s, averaged (K = 2)."""
    zero = torch.zeros(1, dtype=torch.float64)

    def loss(alpha):
        def of_chosen(chosen):
            return selm.selm_loss(chosen, zero, zero, zero, (chosen + zero) / 2, zero, beta, alpha)

        return theory.gradient(of_chosen, zero)

    return ((loss(alpha) - loss(0.0)).abs() / loss(0.0).abs()).item()


# --- online-IPO and IPO-MD -----------------------------------------------------------------------


def ipo_theorem() -> dict:
    """Online-IPO rests at the regularised Nash, and follows self-play's gradient times 4/τ, on four games."""
    at_nash, elsewhere, reached, ratios = [], [], [], []
    for preference, reference, step in GAMES.values():
        loss = theory.online_preference_loss(preference, reference, TAU)
        nash = theory.regularised_nash(preference, reference, TAU)
        completions = theory.one_token(len(reference))
        self_play = theory.online_nash_md_loss(completions, preference, reference, TAU)
        at_nash.append(theory.gradient(loss, nash.log()).norm())
        path = theory.descend(loss, reference.log(), step, 600)
        reached.append(path[-1].softmax(-1) - nash)
        for seed in range(5):
            logits = random_policy(len(reference), seed).log()
            ours = theory.gradient(loss, logits)
            expected = 4 / TAU * theory.gradient(self_play, logits[None])[0]
            elsewhere.append(ours.norm())
            ratios.append((ours - expected).norm() / expected.norm())
    return {
        "games": len(GAMES),
        "gradient_at_nash": largest(at_nash),
        "least_gradient_elsewhere": float(min(elsewhere)),
        "distance_after_descent": largest(reached),
        "self_play_times_4_over_tau": largest(ratios),
    }


def ipo_data() -> dict:
    """Offline IPO's optimum over twenty data distributions, online-IPO's over as many starts (which are what
    it first samples from); and offline IPO on data drawn from the Nash."""
    offline, online, from_nash = [], [], []
    for preference, reference, step in GAMES.values():
        nash = theory.regularised_nash(preference, reference, TAU)
        data = [random_policy(len(reference), seed) for seed in range(20)]
        optima = torch.stack([theory.offline_ipo_optimum(preference, reference, one, TAU) for one in data])
        for one, optimum in zip(data, optima, strict=True):
            loss = theory.offline_preference_loss(preference, reference, one, TAU)
            assert theory.gradient(loss, optimum.log()).norm() < 1e-9
        loss = theory.online_preference_loss(preference, reference, TAU)
        ends = [theory.descend(loss, one.log(), step, 600)[-1].softmax(-1) for one in data[:5]]
        offline.append((optima.amax(0) - optima.amin(0)).max())
        online.append((torch.stack(ends).amax(0) - torch.stack(ends).amin(0)).max())
        from_nash.append(theory.offline_ipo_optimum(preference, reference, nash, TAU) - nash)
    return {
        "games": len(GAMES),
        "offline_least_spread": float(min(offline)),
        "online_largest_spread": float(max(online)),
        "data_from_nash": largest(from_nash),
    }


def ipo_mixture() -> dict:
    """IPO-MD and Nash-MD-PG with the mixture: their common resting point, the Nash that the mixture is, and
    the best response to μ at β = 1; all reached or tried through the two scripts' losses."""
    ends, at_rest, mixtures, reached = [], [], [], []
    for preference, reference, step in GAMES.values():
        completions = theory.one_token(len(reference))
        for beta in (0.0, BETA, 0.5, 0.9):
            rest = theory.ipo_md_fixed_point(preference, reference, TAU, beta)
            loss = theory.online_preference_loss(preference, reference, TAU, beta=beta)
            rival = theory.online_nash_md_loss(completions, preference, reference, TAU, beta)
            at_rest += [theory.gradient(loss, rest.log()), theory.gradient(rival, rest.log()[None])]
            nash = theory.regularised_nash(preference, reference, TAU / (1 - beta))
            mixtures.append(theory.geometric_mixture(rest, reference, beta) - nash)
        both = theory.online_preference_loss(preference, reference, TAU, beta=BETA)
        rival = theory.online_nash_md_loss(completions, preference, reference, TAU, BETA)
        by_ipo = theory.descend(both, reference.log(), step, 600)[-1].softmax(-1)
        by_nash = theory.descend(rival, completions.logits_of(reference), 1.0, 3000)[-1, 0].softmax(-1)
        reached.append(by_ipo - by_nash)
        offline = theory.offline_ipo_optimum(preference, reference, reference, TAU)
        online = theory.online_preference_loss(preference, reference, TAU, beta=1.0)
        answering = theory.online_nash_md_loss(completions, preference, reference, TAU, 1.0)
        ends += [theory.gradient(online, offline.log()), theory.gradient(answering, offline.log()[None])]
    rest = theory.ipo_md_fixed_point(theory.rock_paper_scissors(), MU, TAU, BETA)
    return {
        "gradient_at_rest": largest(at_rest),
        "mixture_minus_nash": largest(mixtures),
        "two_scripts_apart": largest(reached),
        "gradient_at_best_response": largest(ends),
        "rock_paper_scissors": [round(x, 6) for x in rest.tolist()],
    }


def online_dpo() -> dict:
    """Where online DPO rests: not at the Nash, but under Bradley-Terry preferences at RLHF's solution."""
    away, at_nash = [], []
    for preference, reference, _ in GAMES.values():
        nash = theory.regularised_nash(preference, reference, TAU)
        loss = theory.online_preference_loss(preference, reference, TAU, "dpo")
        at_nash.append(theory.gradient(loss, nash.log()).norm() / TAU)  # DPO's gradient carries a τ
        path = theory.descend(loss, reference.log(), 0.05 / TAU, 4000)
        away.append((path[-1].softmax(-1) - nash).abs().max())
    at_rlhf = []
    for seed in range(5):
        reward = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        reference = random_policy(5, seed)
        loss = theory.online_preference_loss(theory.bradley_terry(reward), reference, 0.3, "dpo")
        at_rlhf.append(theory.gradient(loss, theory.rlhf_optimum(reward, reference, 0.3).log()))
    return {
        "least_gradient_at_nash": float(min(at_nash)),
        "least_distance_from_nash": float(min(away)),
        "gradient_at_rlhf": largest(at_rlhf),
    }


def sweep() -> dict:
    """The resting point of IPO-MD and Nash-MD over τ and β on rock-paper-scissors from μ = (.6, .3, .1):
    exploitability, KL(π‖μ) in nats, the same KL of the mixture that is sampled, and the largest gradient
    there of `ipo_md.preference_loss`."""
    preference, cells, gradients = theory.rock_paper_scissors(), {}, []
    for tau, beta in itertools.product((0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)):
        if beta == 1:
            rest = theory.offline_ipo_optimum(preference, MU, MU, tau)
        else:
            rest = theory.ipo_md_fixed_point(preference, MU, tau, beta)
        if rest.min() > 1e-12:  # a mixture of a policy takes its logarithm
            loss = theory.online_preference_loss(preference, MU, tau, beta=beta)
            gradients.append(theory.gradient(loss, rest.log()))
        cells[f"{tau:g}, {beta:g}"] = {
            "exploitability": round(exploitability(preference, rest), 5),
            "kl": nats(rest),
            "mixture_kl": nats(
                MU if beta == 1 else theory.regularised_nash(preference, MU, tau / (1 - beta))
            ),
        }
    return {"cells": cells, "gradient_at_rest": largest(gradients)}


def nats(policy: torch.Tensor) -> float:
    """KL(π‖μ), rounded."""
    return round(theory.kl(policy.clamp(min=1e-300), MU).item(), 5)


def exploitability(preference: torch.Tensor, policy: torch.Tensor) -> float:
    """What the best single reply wins against a policy, beyond a tie."""
    return games.mixture_exploitability(preference.tolist(), policy.tolist())


def token_mixture() -> dict:
    """Total variation between mixing tokens and mixing sequences, two tokens of three: 50 random pairs of
    policies at each β; and the pair of docs/theory.md made to quarrel, at β = ½."""
    far = {}
    for beta in (BETA, 0.5):
        values = []
        for seed in range(50):
            completions = theory.two_tokens(3)
            policy, reference = completions.random_logits(seed), completions.random_logits(100 + seed)
            values.append(mixtures_apart(completions, policy, reference, beta))
        far[f"{beta:g}"] = {"mean": round(sum(values) / len(values), 5), "largest": round(max(values), 5)}
    return {"random": far, "quarrel": round(mixtures_apart(*theory.disagreeing_policies(), 0.5), 5)}


def mixtures_apart(completions, policy, reference, beta: float) -> float:
    """Total variation between the two mixtures of two tables of logits."""
    sequences = (completions.logprobs(logits).exp() for logits in (policy, reference))
    whole = theory.geometric_mixture(*sequences, beta)
    return ((theory.per_token_mixture(completions, policy, reference, beta) - whole).abs().sum() / 2).item()


# --- Nash-MD -------------------------------------------------------------------------------------


def nash_rate() -> dict:
    """Tabular Nash-MD with Theorem 1's steps, η_t = 2/(τ(t + 2)), on four games: KL(π*‖π_T) beside the bound
    8/(τ²(T + 1)), the slope of log KL over log T, and by how much the one-step inequality holds."""
    marks, rows, slack = (10, 100, 1000, 10_000), {}, []
    for name, (preference, reference, _) in GAMES.items():
        nash, policy, seen = theory.regularised_nash(preference, reference, TAU), reference, {}
        for t in range(marks[-1]):
            eta = 2 / (TAU * (t + 2))
            policy = theory.nash_md_step(policy, preference, reference, TAU, eta)
            if t + 1 in marks:
                seen[t + 1] = theory.kl(nash, policy).item()
        for eta in (0.05, 0.5, 2.0):
            policy = random_policy(len(nash), 3)
            for _ in range(50):
                after = theory.nash_md_step(policy, preference, reference, TAU, eta)
                bound = (1 - eta * TAU) * theory.kl(nash, policy) + 2 * eta**2
                slack.append((bound - theory.kl(nash, after)).item())
                policy = after
        slope = math.log10(seen[10_000] / seen[1000])
        rows[name] = {"kl": {str(T): value for T, value in seen.items()}, "slope": round(slope, 3)}
    bounds = {str(T): 8 / (TAU**2 * (T + 1)) for T in marks}
    return {"tau": TAU, "bound": bounds, "games": rows, "least_slack_of_a_step": min(slack)}


def nash_gradient() -> dict:
    """The expected gradient of `nash_md.nash_md_loss`, enumerated, against that of P(π ≻ π') − τ KL(π‖μ): one
    token and up to two, three opponents, four games. And the cosine with the KL's gradient, at worst, of the
    variant that takes each token's own log-ratio."""
    apart, cosines = [], []
    for (preference, reference, _), tokens in itertools.product(GAMES.values(), (1, 2)):
        n = len(reference)
        completions = theory.one_token(n) if tokens == 1 else theory.RAGGED[n]
        reference_logits = completions.logits_of(reference)
        for seed, beta in itertools.product(range(3), (0.0, BETA, 1.0)):
            logits = completions.random_logits(seed)
            opponent = theory.geometric_mixture(completions.logprobs(logits).exp(), reference, beta)
            rest = (reference_logits, opponent, preference, TAU)

            def expected(x, completions=completions, rest=rest, loss=None):
                return theory.expected_nash_md_loss(completions, x, *rest, loss)

            def objective(x, completions=completions, rest=rest):
                return theory.nash_md_objective(completions, x, *rest)

            apart.append(theory.gradient(expected, logits) + theory.gradient(objective, logits))
    completions = theory.two_tokens(3)
    for seed in range(80):
        logits, reference_logits = completions.random_logits(seed), completions.random_logits(100 + seed)
        exact, own = kl_gradients(completions, logits, reference_logits)
        cosines.append(torch.nn.functional.cosine_similarity(own.flatten(), exact.flatten(), dim=0))
    return {
        "gradients": len(apart),
        "largest_difference": largest(apart),
        "own_token_worst": float(min(cosines)),
    }


def kl_gradients(completions, logits: torch.Tensor, reference_logits: torch.Tensor) -> tuple:
    """Where the judge says ½ to everything, so that only the KL acts: the exact ascent direction, (S, V), and
    that of the variant that takes each token's own log-ratio."""
    tie = torch.full((len(completions.tokens),) * 2, 0.5, dtype=torch.float64)
    rest = (reference_logits, completions.logprobs(reference_logits).exp(), tie, TAU)

    def own_token(x):
        return -theory.expected_nash_md_loss(completions, x, *rest, theory.own_token_loss)

    exact = theory.gradient(lambda x: theory.nash_md_objective(completions, x, *rest), logits)
    return exact, theory.gradient(own_token, logits)


def three_answers() -> list[play.Game]:
    """The page's games without a scalar behind them, and a hundred random ones, three answers each."""
    chosen = [game for game in play.all_games() if game.scalar is None and not game.key.startswith("random")]
    for seed in range(100):
        preference, reference = theory.random_game(3, seed)
        chosen.append(play.Game(f"random{seed}", "", ("", "", ""), "", preference, reference))
    return chosen


def wins(game: play.Game, one: torch.Tensor, other: torch.Tensor) -> float:
    """P(one ≻ other)."""
    return (one @ game.preference @ other).item()


def nash_beta() -> dict:
    """The resting point of Nash-MD-PG for β from self-play (0) to best response (1): its win rate against
    RLHF's, its exploitability; mean and standard error over a hundred random games, and two cycles alone."""
    shares = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
    found = {beta: [] for beta in shares}
    for game in three_answers():
        rlhf = theory.rlhf_optimum(game.reward(), game.reference, TAU)
        for beta in shares:
            if beta == 1:
                rest = theory.offline_ipo_optimum(game.preference, game.reference, game.reference, TAU)
            else:
                rest = theory.ipo_md_fixed_point(game.preference, game.reference, TAU, beta)
            found[beta].append((wins(game, rest, rlhf), exploitability(game.preference, rest)))
    out = {"games": 100, "tau": TAU, "random": {}, "rock-paper-scissors": {}, "dice": {}}
    of_self_play = torch.tensor(found[0.0], dtype=torch.float64)[2:, 0]
    for beta, pairs in found.items():
        rates, gaps = torch.tensor(pairs, dtype=torch.float64)[2:].T
        out["random"][f"{beta:g}"] = {
            "win_rate": mean_and_error(rates),
            "minus_self_play": mean_and_error(rates - of_self_play),
            "exploitability": mean_and_error(gaps),
        }
        for name, pair in zip(("rock-paper-scissors", "dice"), pairs, strict=False):
            out[name][f"{beta:g}"] = {"win_rate": round(pair[0], 5), "exploitability": round(pair[1], 5)}
    return out


def nash_reward() -> dict:
    """A preference model against a reward model of the same pairs: the regularised Nash beside RLHF on the
    Bradley-Terry fit (`afd.discriminator_loss`), at one τ and at equal KL; and how far the fit, and RLHF's
    policy with it, moves when the pairs come from elsewhere."""
    same, equal, nash_gaps, rlhf_gaps, moved = [], [], [], [], []
    for game in three_answers():
        reward = game.reward()
        nash = theory.regularised_nash(game.preference, game.reference, TAU)
        rlhf = theory.rlhf_optimum(reward, game.reference, TAU)
        near = theory.rlhf_optimum(
            reward, game.reference, tau_of_kl(game, reward, theory.kl(nash, game.reference))
        )
        same.append(wins(game, nash, rlhf))
        equal.append(wins(game, nash, near))
        nash_gaps.append(exploitability(game.preference, nash))
        rlhf_gaps.append(exploitability(game.preference, rlhf))
        elsewhere = play.Game("", "", game.corners, "", game.preference, theory.UNIFORM).reward()
        moved.append((rlhf - theory.rlhf_optimum(elsewhere, game.reference, TAU)).abs().sum() / 2)
    scalar = next(game for game in play.all_games() if game.key == "bt")
    elsewhere = play.Game("", "", scalar.corners, "", scalar.preference, theory.UNIFORM).reward()
    out = {"games": 100, "tau": TAU, "random": {}, "rock-paper-scissors": {}, "dice": {}}
    columns = {"nash_beats_rlhf": same, "at_equal_kl": equal, "nash_exploitability": nash_gaps}
    columns |= {"rlhf_exploitability": rlhf_gaps, "rlhf_moved": [float(x) for x in moved]}
    for key, values in columns.items():
        out["random"][key] = mean_and_error(torch.tensor(values[2:], dtype=torch.float64))
        out["rock-paper-scissors"][key], out["dice"][key] = (round(value, 5) for value in values[:2])
    out["bradley_terry_reward_moved"] = largest([scalar.reward() - elsewhere])
    return out


def tau_of_kl(game: play.Game, reward: torch.Tensor, kl: torch.Tensor) -> float:
    """The τ at which RLHF's policy is `kl` nats from the reference, by bisection; the least that is tried if
    it never gets so far."""
    low, high = 1e-3, 1e3
    for _ in range(80):
        middle = math.sqrt(low * high)
        far = theory.kl(theory.rlhf_optimum(reward, game.reference, middle).clamp(min=1e-300), game.reference)
        low, high = (middle, high) if far > kl else (low, middle)
    return high


def nash_guarantee() -> dict:
    """What the equilibrium promises, against 2,000 random policies and every single reply, on four games and
    the dice: P_τ(π* ≻ π) − ½ for the regularised Nash, which is τ KL(π‖π*) exactly; P(π* ≻ y) − ½ for it and
    for the unregularised one (`cleanalign.games.nash`)."""
    cases = [(preference, reference) for preference, reference, _ in GAMES.values()]
    cases += [(theory.dice_game(), MU)]
    regularised, exact, plain, flat = [], [], [], []
    for preference, reference in cases:
        n = len(reference)
        nash = theory.regularised_nash(preference, reference, TAU)
        free = theory.vector(*games.nash(preference.tolist())[0])
        rivals = torch.stack([random_policy(n, seed) for seed in range(2000)])
        cost = (rivals * (rivals / reference).log()).sum(-1)
        raw = nash @ preference @ rivals.T
        margin = raw - TAU * theory.kl(nash, reference) + TAU * cost - 0.5
        regularised.append(margin.min())
        exact.append(margin - TAU * (rivals * (rivals / nash).log()).sum(-1))
        plain.append((nash @ preference).min() - 0.5)
        flat.append((free @ preference).min() - 0.5)
    return {
        "games": len(cases),
        "regularised_least": float(min(regularised)),
        "regularised_minus_tau_kl": largest(exact),
        "regularised_nash_plain_least": float(min(plain)),
        "nash_plain_least": float(min(flat)),
    }


def nash_ema() -> dict:
    """Nash-EMA-PG beside Nash-MD-PG with the mixture, in expectation (docs/play.py): how many of seven games
    × six τ are within .01 of their resting point during the last 1,000 of 6,000 steps, from the reference."""
    settled, chosen = play.settles(), play.all_games()
    ema = {}
    for (_, _, decay), rests in settled.items():
        ema.setdefault(f"{decay:g}", []).append(rests)
    family = play.FAMILIES["nash"]
    batch = play.batch_of(family, chosen)
    starts = len(chosen[0].starts())
    batch = play.Batch(*(getattr(batch, part.name)[::starts] for part in fields(batch)))  # from the reference
    late = play.walk("nash", batch, 6 * play.STEPS)[-play.STEPS :]  # (steps, games × settings, 3)
    mixture = {}
    for n, (game, (tau, beta)) in enumerate(itertools.product(chosen, family.grid())):
        rest = play.rest(game, "nash", tau, beta)
        mixture.setdefault(f"{beta:g}", []).append(bool((late[:, n] - rest).abs().max() < 0.01))
    return {
        "of": len(chosen) * len(play.TAUS),
        "ema": {decay: sum(rests) for decay, rests in ema.items()},
        "mixture": {beta: sum(rests) for beta, rests in mixture.items()},
    }


# --- alignment from demonstrations ---------------------------------------------------------------


def divergences() -> dict:
    """docs/afd_divergences.py: two modes, a policy with one. Mean, width and JS (nats) where each objective
    ends, and the demonstrations' own mean and width."""
    demo, grid = afd_divergences.demonstrator(), afd_divergences.GRID
    mean = (demo * grid).sum()
    out = {"demonstrations": [mean.item(), (demo * (grid - mean) ** 2).sum().sqrt().item()], "fits": {}}
    for objective, start, width in (
        ("forward-kl", -0.5, 1.0),
        ("reverse-kl", -0.5, 1.0),
        ("js", -0.5, 1.0),
        ("js", -1.5, 0.7),
    ):
        ended = afd_divergences.fit(objective, start, width)
        far = afd_divergences.js_divergence(afd_divergences.gaussian(*ended).exp())
        out["fits"][f"{objective} from {start:g}"] = [round(x, 4) for x in (*ended, far)]
    out["demonstrations"] = [round(x, 4) for x in out["demonstrations"]]
    return out


def discriminator() -> dict:
    """The discriminator's optimum, found through `afd.discriminator_loss`, against log(d_demo/d_π), whole and
    up to a constant; and the gradients of its two rewards against those of KL(π‖demo) and 2 JS. Random tables
    of five replies."""
    ratio, shifted, gradients = [], [], []
    for seed in range(10):
        demo, logits = random_policy(5, seed), random_policy(5, 100 + seed).log()
        policy = logits.softmax(-1)
        exact = (demo / policy).log()
        scores = {kind: fitted(demo, policy, kind) for kind in ("classification", "bradley-terry")}
        ratio.append(scores["classification"] - exact)
        loose = scores["bradley-terry"]
        shifted.append((loose - loose.mean()) - (exact - exact.mean()))
        for objective in ("reverse-kl", "js"):
            reward = afd.adversarial_reward(exact, objective)
            descended = theory.gradient(lambda x, r=reward: surrogate(x, r), logits)
            true = theory.gradient(lambda x, o=objective, d=demo: divergence(x, d, o), logits)
            gradients.append(descended - true)
    return {
        "tables": 10,
        "classification": largest(ratio),
        "bradley_terry_up_to_a_constant": largest(shifted),
        "gradients": largest(gradients),
    }


def fitted(positive: torch.Tensor, negative: torch.Tensor, kind: str = "classification") -> torch.Tensor:
    """(n,) the scores that minimise `afd.discriminator_loss` over all pairs of a draw of `positive` (n,) and
    one of `negative` (n,)."""
    weights = torch.outer(positive, negative).flatten()

    def loss(scores):
        columns = theory.of_first(scores), theory.of_second(scores)
        return mean_loss(afd.discriminator_loss, weights, columns, kind)

    return minimise(loss, torch.zeros(len(positive), dtype=torch.float64))


def surrogate(logits: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Expected `afd.policy_gradient_loss` of one-token replies without KL."""
    rows = torch.log_softmax(logits, -1)[:, None]  # (n, 1)
    columns = (rows, rows.detach(), torch.ones_like(rows), reward)
    return mean_loss(afd.policy_gradient_loss, rows[:, 0].detach().exp(), columns, 0.0)


def divergence(logits: torch.Tensor, demo: torch.Tensor, objective: str) -> torch.Tensor:
    """KL(π‖demo), or 2 JS(π, demo), nats."""
    policy = logits.softmax(-1)
    if objective == "reverse-kl":
        return (policy * (policy / demo).log()).sum()
    middle = (policy + demo) / 2
    return (policy * (policy / middle).log()).sum() + (demo * (demo / middle).log()).sum()


def constructions() -> dict:
    """Rewards from pairs in the limit of endless samples: eight replies with golden scores 0 … 1, π_0 random,
    demonstrators ∝ π_0 exp(3 · score), and π_SFT half way to them, as a mixture. Ten tables.

    The three rewards are fitted through `afd.discriminator_loss`; Best-of-N over π_SFT's replies is exact.
    """
    score = torch.linspace(0, 1, 8, dtype=torch.float64)
    limit, curves, taught = [], {name: [] for name in ("init-sft", "init-demo", "sft-demo")}, []
    for seed in range(10):
        start = random_policy(8, seed)
        demo = theory.normalise(start.log() + 3 * score)
        sft = (start + demo) / 2
        taught.append(demo @ score)
        for name, positive, negative in (
            ("init-sft", sft, start),
            ("init-demo", demo, start),
            ("sft-demo", demo, sft),
        ):
            reward = fitted(positive, negative)
            if name == "init-sft":
                limit.append(reward - (sft / start).log())
            curves[name].append([best_of(n, reward, sft) @ score for n in (1, 4, 16)])
    mean = {name: [round(float(sum(x) / len(x)), 5) for x in zip(*rows)] for name, rows in curves.items()}
    apart = largest(
        torch.tensor(curves[one]) - torch.tensor(curves["init-sft"]) for one in ("init-demo", "sft-demo")
    )
    return {
        "tables": 10,
        "init_sft_minus_log_ratio": largest(limit),
        "n": [1, 4, 16],
        "score": mean,
        "demonstrator": round(float(sum(taught) / len(taught)), 5),
        "constructions_apart": apart,
    }


def best_of(n: int, reward: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """(K,) the distribution of the reply that `reward` likes best among n draws of `policy`; no ties."""
    order = reward.argsort()
    below = policy[order].cumsum(0)
    chance = below**n - (below - policy[order]).clamp(min=0) ** n
    return torch.zeros_like(policy).scatter(0, order, chance)


def spin_rest() -> dict:
    """SPIN on ten tables of five replies: the gradient of `spin.spin_loss` at π_t = p_data and elsewhere; the
    minimum of an iteration against π_t (p_data/π_t)^(1/λ); KL(p_data‖π_t) over iterations solved to their
    minimum, mean over tables."""
    there, elsewhere, closed = [], [], []
    curves = {strength: [] for strength in (1.0, 0.6, 0.4)}
    for seed in range(10):
        data, first = random_policy(5, seed), random_policy(5, 100 + seed)

        def loss(logits, player, strength, data=data):
            new, old = torch.log_softmax(logits, -1), player.log()
            weights = torch.outer(data, player).flatten()  # demonstration × the last player's own answer
            columns = [f(x) for x in (new, old) for f in (theory.of_first, theory.of_second)]
            return mean_loss(spin.spin_loss, weights, tuple(columns), strength)

        there.append(theory.gradient(lambda x, d=data, f=loss: f(x, d, 0.1), data.log()))
        elsewhere.append(theory.gradient(lambda x, p=first, f=loss: f(x, p, 0.1), first.log()).norm())
        for strength, curve in curves.items():
            player, far = first, [theory.kl(data, first).item()]
            for _ in range(5):
                formula = theory.normalise(player.log() + (data / player).log() / strength)
                found = minimise(lambda x, p=player, s=strength, f=loss: f(x, p, s), player.log()).softmax(-1)
                closed.append(found - formula)
                player = formula
                far.append(max(0.0, theory.kl(data, player).item()))
            curve.append(far)
    return {
        "tables": 10,
        "gradient_at_data": largest(there),
        "least_gradient_elsewhere": float(min(elsewhere)),
        "minimum_minus_formula": largest(closed),
        "kl": {f"{s:g}": [float(f"{sum(x) / len(x):.4g}") for x in zip(*rows)] for s, rows in curves.items()},
    }


STUDIES = {
    function.__name__: function
    for function in (
        selm_identities,
        bandit,
        ipo_theorem,
        ipo_data,
        ipo_mixture,
        online_dpo,
        sweep,
        token_mixture,
        nash_rate,
        nash_gradient,
        nash_beta,
        nash_reward,
        nash_guarantee,
        nash_ema,
        divergences,
        discriminator,
        constructions,
        spin_rest,
    )
}
