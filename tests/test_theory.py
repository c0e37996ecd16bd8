"""What docs/theory.md claims, checked: exact expectations over finite games, through the losses that train
language models.

The sections carry the page's numbers. Nothing is sampled; everything is float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import theory
from theory import RAGGED, gradient, one_token, two_tokens, vector

from ipo_md import preference_loss
from nash_md import nash_md_loss

MU, TAU, BETA = vector(0.6, 0.3, 0.1), 0.1, 0.125
UNIFORM = vector(1, 1, 1) / 3
RPS = theory.rock_paper_scissors()

# name: (preference, reference, temperature, step size at which gradient descent on online-IPO is stable)
GAMES = {
    "rock-paper-scissors": (RPS, MU, TAU, 0.1),
    **{f"random {seed}": (*theory.random_game(5, seed), TAU, 0.3) for seed in (0, 3, 4)},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A second thread has nothing to do on tensors of a few entries, and waiting for it on a busy machine
    takes a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def random_policy(n, seed):
    return torch.softmax(
        torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 0
    )


# --- 1. the IPO loss is a squared distance -----------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_ipo_is_a_squared_distance_to_the_scaled_preference(tau):
    h, p = (
        x.flatten()
        for x in torch.meshgrid(
            torch.linspace(-8, 8, 33, dtype=torch.float64),
            torch.linspace(0, 1, 11, dtype=torch.float64),
            indexing="ij",
        )
    )
    zero = torch.zeros_like(h)
    expected = ((h - (p - 0.5) / tau) ** 2 + (1 - (2 * p - 1) ** 2) / (4 * tau**2)).mean()
    # h enters through one of the four log-probs, so that each sign is seen.
    for arguments in (
        (h, zero, zero, zero),
        (zero, -h, zero, zero),
        (zero, zero, -h, zero),
        (zero, zero, zero, h),
    ):
        torch.testing.assert_close(preference_loss(*arguments, p, tau), expected, rtol=1e-12, atol=0)
        for i in range(0, len(h), 7):  # and for every pair alone, not only on average
            alone = preference_loss(*(x[i : i + 1] for x in (*arguments, p)), tau)
            torch.testing.assert_close(
                alone,
                (h[i] - (p[i] - 0.5) / tau) ** 2 + (1 - (2 * p[i] - 1) ** 2) / (4 * tau**2),
                rtol=1e-12,
                atol=1e-12,
            )


def test_the_siblings_aim_at_other_log_ratios():
    p, tau, zero = 0.7, 0.25, torch.zeros(1, dtype=torch.float64)
    for kind, s in (
        ("ipo", p - 0.5),
        ("dpo", torch.logit(torch.tensor(p, dtype=torch.float64)).item()),
        ("slic", 1.0),
    ):
        around = [
            preference_loss(zero + x / tau, zero, zero, zero, zero + p, tau, kind)
            for x in (s - 0.01, s, s + 0.01)
        ]
        assert around[1] < min(around[0], around[2])
        if kind == "ipo":
            continue
        by_hand = (
            torch.nn.functional.softplus(torch.tensor([-s, s], dtype=torch.float64))
            if kind == "dpo"
            else vector(1 - s, 1 + s)
        )
        assert_close(around[1], p * by_hand[0] + (1 - p) * by_hand[1], 1e-12)


# --- 2. the regularised Nash equilibrium -------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
def test_regularised_nash_is_a_fixed_point_and_its_own_best_response(name):
    preference, reference, tau, _ = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    assert_close(nash, theory.normalise(reference.log() + preference @ nash / tau), 1e-10)

    def payoff(policy):  # P_τ(π ≻ nash), without the opponent's constant
        return policy @ preference @ nash - tau * theory.kl(policy, reference)

    for seed in range(20):
        other = random_policy(len(nash), seed)
        # Strongly concave: moving to π costs exactly τ KL(π‖nash), which proves uniqueness of the best
        # response as well.
        assert_close(payoff(nash) - payoff(other), tau * theory.kl(other, nash), 1e-9)


@pytest.mark.parametrize(("tau", "digits"), [(1.0, 0.549834), (0.1, 0.880797)])
def test_two_actions_have_a_closed_form(tau, digits):
    nash = theory.regularised_nash(theory.two_actions(0.7), vector(0.5, 0.5), tau)
    assert_close(nash[0], torch.sigmoid(torch.tensor((0.7 - 0.5) / tau, dtype=torch.float64)), 1e-12)
    assert_close(nash[0].item(), digits, 5e-7)


def test_rock_paper_scissors_nash():
    assert_close(theory.regularised_nash(RPS, MU, TAU), vector(0.432065, 0.230329, 0.337605), 1e-6)


def test_the_plain_iteration_does_not_find_the_nash_which_is_why_newton_does():
    nash = theory.regularised_nash(RPS, MU, TAU)
    plain = damped = MU
    for _ in range(300):
        plain = theory.normalise(MU.log() + RPS @ plain / TAU)
        damped = theory.normalise(0.9 * damped.log() + 0.1 * (MU.log() + RPS @ damped / TAU))
    assert (plain - nash).abs().max() > 0.1
    assert_close(damped, nash, 1e-6)


# --- 3. online-IPO finds the Nash --------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
def test_online_ipo_is_stationary_at_the_nash_and_only_there(name):
    preference, reference, tau, _ = GAMES[name]
    loss = theory.online_preference_loss(preference, reference, tau)
    nash = theory.regularised_nash(preference, reference, tau)
    assert gradient(loss, nash.log()).norm() < 1e-9
    for seed in range(5):
        assert gradient(loss, random_policy(len(nash), seed).log()).norm() > 1e-2


@pytest.mark.parametrize("name", GAMES)
def test_gradient_descent_on_online_ipo_reaches_the_nash(name):
    preference, reference, tau, step_size = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    for start in (reference, random_policy(len(nash), 7)):
        path = theory.descend(
            theory.online_preference_loss(preference, reference, tau), start.log(), step_size, 600
        )
        assert (path[0].softmax(-1) - nash).abs().max() > 0.05
        assert_close(path[-1].softmax(-1), nash, 1e-6)


def test_the_step_has_to_be_small_because_the_field_turns():
    nash, loss = theory.regularised_nash(RPS, MU, TAU), theory.online_preference_loss(RPS, MU, TAU)
    assert (theory.descend(loss, MU.log(), 0.2, 600)[-100:].softmax(-1) - nash).abs().amax(-1).min() > 0.01
    # Not the gradient of any function: a Hessian would be symmetric, this Jacobian is not.
    logits = nash.log()
    jacobian = torch.stack(
        [
            (gradient(loss, logits + 1e-5 * e) - gradient(loss, logits - 1e-5 * e)) / 2e-5
            for e in torch.eye(3, dtype=torch.float64)
        ],
        1,
    )
    assert (jacobian - jacobian.T).abs().max() > 0.5
    assert torch.linalg.eigvals(jacobian).imag.abs().max() > 0.5


# --- 4. offline IPO finds something that depends on the data -----------------------------------


def test_offline_ipo_on_the_dice():
    dice = theory.dice_game()
    assert_close(dice, torch.tensor([[4.5, 5, 4], [4, 4.5, 5], [5, 4, 4.5]], dtype=torch.float64) / 9, 1e-12)
    optimum = theory.offline_ipo_optimum(dice, UNIFORM, MU, TAU)
    assert_close(optimum, vector(0.3656, 0.2478, 0.3865), 5e-5)
    path = theory.descend(theory.offline_preference_loss(dice, UNIFORM, MU, TAU), UNIFORM.log(), 0.5, 300)
    assert_close(path[-1].softmax(-1), optimum, 1e-9)


@pytest.mark.parametrize("name", GAMES)
def test_offline_ipo_moves_with_its_data_while_online_ipo_has_none(name):
    preference, reference, tau, _ = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    optima = []
    for seed in range(3):
        data = random_policy(len(nash), seed)
        optima.append(theory.offline_ipo_optimum(preference, reference, data, tau))
        offline = theory.offline_preference_loss(preference, reference, data, tau)
        assert gradient(offline, optima[-1].log()).norm() < 1e-9
        assert gradient(offline, nash.log()).norm() > 1e-2
    assert min((a - b).abs().max() for a in optima for b in optima if a is not b) > 0.01
    # Offline on data that happens to be drawn from the Nash is the one case in which both agree.
    assert_close(theory.offline_ipo_optimum(preference, reference, nash, tau), nash, 1e-10)


def test_offline_ipo_forgets_its_data_only_if_preferences_are_differences_of_utilities():
    utilities = vector(0.0, 0.1, 0.3, 0.15, 0.4)
    linear = 0.5 + utilities[:, None] - utilities[None, :]
    for game, same in ((linear, True), (theory.bradley_terry(4 * utilities), False)):
        one, other = (
            theory.offline_ipo_optimum(game, random_policy(5, 0), random_policy(5, seed), TAU)
            for seed in (1, 2)
        )
        for data, optimum in ((1, one), (2, other)):
            loss = theory.offline_preference_loss(game, random_policy(5, 0), random_policy(5, data), TAU)
            assert gradient(loss, optimum.log()).norm() < 1e-9
        assert same == bool((one - other).abs().max() < 1e-9)


# --- 5. online-DPO does not find the Nash ------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
def test_online_dpo_is_not_stationary_at_the_nash(name):
    preference, reference, tau, _ = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    # DPO's gradient carries a factor τ that IPO's does not.
    assert (
        gradient(theory.online_preference_loss(preference, reference, tau, "dpo"), nash.log()).norm() / tau
        > 1e-2
    )


def test_a_symmetric_cycle_with_a_uniform_reference_is_an_exception():
    for game in (RPS, theory.dice_game()):
        assert (
            gradient(theory.online_preference_loss(game, UNIFORM, TAU, "dpo"), UNIFORM.log()).norm() < 1e-12
        )


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("p", [0.1, 0.4, 0.5, 0.6, 0.7, 0.95])
def test_two_actions_agree_for_dpo_and_nash_only_at_one_half(p, tau):
    reference = vector(0.3, 0.7)
    game = theory.two_actions(p)
    nash = theory.regularised_nash(game, reference, tau)
    dpo = theory.online_preference_loss(game, reference, tau, "dpo")
    at_nash = gradient(dpo, nash.log()).norm() / (tau * nash.prod())
    if p == 0.5:
        assert at_nash < 1e-12
    else:
        assert at_nash > 0.1
    # DPO rests where σ(τh) = p.
    stationary = theory.normalise(reference.log() + torch.tensor([p, 1 - p], dtype=torch.float64).log() / tau)
    assert gradient(dpo, stationary.log()).norm() < 1e-12


def test_under_bradley_terry_online_dpo_rests_at_the_rlhf_solution_and_online_ipo_does_not():
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rewards = torch.randn(5, generator=generator, dtype=torch.float64)
        reference = random_policy(5, seed)
        game = theory.bradley_terry(rewards)
        for tau in (0.3, 1.0):
            solution = theory.rlhf_optimum(rewards, reference, tau)
            assert (
                gradient(theory.online_preference_loss(game, reference, tau, "dpo"), solution.log()).norm()
                < 1e-12
            )
            assert (
                gradient(theory.online_preference_loss(game, reference, tau, "ipo"), solution.log()).norm()
                > 1e-2
            )


def test_near_one_half_online_dpo_at_four_tau_comes_close_to_the_nash_at_tau():
    game, nash = theory.dice_game(), theory.regularised_nash(theory.dice_game(), MU, TAU)
    same, four = (
        theory.descend(theory.online_preference_loss(game, MU, tau, "dpo"), MU.log(), 2 / tau, 600)[
            -1
        ].softmax(-1)
        for tau in (TAU, 4 * TAU)
    )
    assert (same - nash).abs().max() > 0.1
    assert (four - nash).abs().max() < 1e-3


# --- 6. labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ipo", "dpo", "slic"])
@pytest.mark.parametrize("name", GAMES)
def test_bernoulli_labels_are_unbiased(name, kind):
    preference, reference, tau, _ = GAMES[name]
    soft, bernoulli = (
        theory.online_preference_loss(preference, reference, tau, kind, labels)
        for labels in ("soft", "bernoulli")
    )
    for seed in range(5):
        logits = 3 * random_policy(len(reference), seed).log()
        torch.testing.assert_close(bernoulli(logits), soft(logits), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradient(bernoulli, logits), gradient(soft, logits), rtol=1e-10, atol=1e-12
        )


def test_argmax_labels_solve_another_game_on_the_dice():
    dice = theory.dice_game()
    soft_nash, argmax_nash = (
        theory.regularised_nash(dice, MU, TAU),
        theory.regularised_nash(theory.argmax_game(dice), MU, TAU),
    )
    assert_close(theory.argmax_game(dice), RPS, 0)
    assert (soft_nash - argmax_nash).abs().max() > 0.1
    for labels, mine, other in (("soft", soft_nash, argmax_nash), ("argmax", argmax_nash, soft_nash)):
        loss = theory.online_preference_loss(dice, MU, TAU, labels=labels)
        assert gradient(loss, mine.log()).norm() < 1e-9
        assert gradient(loss, other.log()).norm() > 0.1
        assert_close(theory.descend(loss, MU.log(), 0.1, 600)[-1].softmax(-1), mine, 1e-6)


@pytest.mark.parametrize("kind", ["ipo", "dpo", "slic"])
def test_argmax_and_soft_labels_agree_where_every_judgement_is_certain_or_a_tie(kind):
    sharp = theory.argmax_game(theory.random_game(5, 0)[0])
    sharp[0, 1] = sharp[1, 0] = 0.5
    for game, reference in ((RPS, MU), (sharp, random_policy(5, 0))):
        logits = random_policy(len(reference), 1).log()
        soft, argmax = (
            theory.online_preference_loss(game, reference, TAU, kind, labels) for labels in ("soft", "argmax")
        )
        assert_close(gradient(argmax, logits), gradient(soft, logits), 0)


# --- 7. IPO-MD ---------------------------------------------------------------------------------


def test_ipo_md_on_rock_paper_scissors():
    assert_close(theory.ipo_md_fixed_point(RPS, MU, TAU, BETA), vector(0.415937, 0.203261, 0.380802), 1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5, 0.9])
@pytest.mark.parametrize("name", GAMES)
def test_the_mixture_at_ipo_mds_fixed_point_is_a_nash(name, beta):
    preference, reference, tau, _ = GAMES[name]
    fixed_point = theory.ipo_md_fixed_point(preference, reference, tau, beta)
    assert (
        gradient(
            theory.online_preference_loss(preference, reference, tau, beta=beta), fixed_point.log()
        ).norm()
        < 1e-9
    )
    mixture = theory.geometric_mixture(fixed_point, reference, beta)
    assert_close(mixture, theory.regularised_nash(preference, reference, tau / (1 - beta)), 1e-10)
    nash = theory.regularised_nash(preference, reference, tau)
    assert (beta == 0) == bool((fixed_point - nash).abs().max() < 1e-3)


@pytest.mark.parametrize("name", GAMES)
def test_gradient_descent_on_ipo_md_reaches_its_fixed_point(name):
    preference, reference, tau, step_size = GAMES[name]
    path = theory.descend(
        theory.online_preference_loss(preference, reference, tau, beta=BETA), reference.log(), step_size, 600
    )
    assert_close(path[-1].softmax(-1), theory.ipo_md_fixed_point(preference, reference, tau, BETA), 1e-6)


# --- 8. per-token and sequence-level mixtures --------------------------------------------------


@pytest.mark.parametrize("completions", [two_tokens(3), RAGGED[5]], ids=["two tokens", "ragged"])
def test_mixing_tokens_is_not_mixing_sequences(completions):
    policy, reference = completions.random_logits(0), completions.random_logits(1)
    # They disagree about what follows token 1: mixed sequence by sequence, that prefix loses weight; token by
    # token, nothing tells the first token.
    policy[completions.prefixes.index((1,)), :2] = vector(2, -2)
    reference[completions.prefixes.index((1,)), :2] = vector(-2, 2)
    sequence_policy, sequence_reference = (
        completions.logprobs(policy).exp(),
        completions.logprobs(reference).exp(),
    )
    for beta in (0.0, 0.125, 0.5, 0.875, 1.0):
        per_token = theory.per_token_mixture(completions, policy, reference, beta)
        per_sequence = theory.geometric_mixture(sequence_policy, sequence_reference, beta)
        assert_close(per_token.sum().item(), 1.0, 1e-12)
        difference = (per_token - per_sequence).abs().sum() / 2
        assert difference < 1e-12 if beta in (0, 1) else difference > 0.02


def test_mixed_token_by_token_a_disagreement_about_the_second_token_costs_its_prefix_nothing():
    completions, policy, reference = theory.disagreeing_policies()
    begins_with_b = torch.tensor([y[0] == 1 for y in completions.tokens])
    per_token = theory.per_token_mixture(completions, policy, reference, 0.5)
    per_sequence = theory.geometric_mixture(
        completions.logprobs(policy).exp(), completions.logprobs(reference).exp(), 0.5
    )
    overlap = 2 * (0.95 * 0.05) ** 0.5  # Σ_v √(π(v|b) μ(v|b)), e^C(b) in the page's words
    assert_close(per_token[begins_with_b].sum().item(), 0.5, 1e-12)
    assert_close(per_sequence[begins_with_b].sum().item(), overlap / (1 + overlap), 1e-12)


def test_they_agree_on_completions_of_one_token():
    policy, reference = one_token(5).random_logits(0), one_token(5).random_logits(1)
    for beta in (0.0, 0.125, 0.5, 0.875, 1.0):
        per_token = theory.per_token_mixture(one_token(5), policy, reference, beta)
        assert_close(
            per_token, theory.geometric_mixture(policy.softmax(-1)[0], reference.softmax(-1)[0], beta), 1e-12
        )


# --- 9. Nash-MD-PG -----------------------------------------------------------------------------


@pytest.mark.parametrize("opponent", ["self", "mixture", "reference"])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", GAMES)
def test_expected_policy_gradient_is_the_gradient_of_the_regularised_preference(name, tokens, opponent):
    preference, reference, tau, _ = GAMES[name]
    completions = one_token(len(reference)) if tokens == 1 else RAGGED[len(reference)]
    reference_logits = completions.logits_of(reference)
    for seed in range(3):
        logits = completions.random_logits(seed)
        policy = completions.logprobs(logits).exp()
        other = theory.geometric_mixture(
            policy, reference, {"self": 0.0, "mixture": BETA, "reference": 1.0}[opponent]
        )
        arguments = (reference_logits, other, preference, tau)
        # functools.partial cannot fill the middle of a signature.
        ascent = -gradient(
            lambda x, a=arguments, c=completions: theory.expected_nash_md_loss(c, x, *a), logits
        )
        differentiated = gradient(
            lambda x, a=arguments, c=completions: theory.nash_md_objective(c, x, *a), logits
        )
        assert ascent.norm() > 1e-2
        assert_close(ascent, theory.nash_md_gradient(completions, logits, *arguments), 1e-12)
        assert_close(ascent, differentiated, 1e-12)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", GAMES)
def test_online_ipo_follows_self_plays_gradient_times_four_over_tau(name, tokens):
    """Through both scripts' losses, away from any resting point, for whole sequences as for single tokens."""
    preference, reference, tau, _ = GAMES[name]
    completions = one_token(len(reference)) if tokens == 1 else RAGGED[len(reference)]
    self_play = theory.online_nash_md_loss(completions, preference, reference, tau)

    def online_ipo(logits):
        log_policy = completions.logprobs(logits)
        drawn = theory.pairs(log_policy.detach().exp())
        return theory.expected_preference_loss(log_policy, reference.log(), drawn, preference, tau)

    for seed in range(3):
        logits = completions.random_logits(seed)
        expected = 4 / tau * gradient(self_play, logits)
        assert expected.norm() > 1e-2
        assert_close(gradient(online_ipo, logits), expected, 1e-11)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", GAMES)
def test_self_play_reaches_the_nash_and_the_mixture_opponent_its_biased_fixed_point(name, tokens):
    preference, reference, tau, _ = GAMES[name]
    completions = one_token(len(reference)) if tokens == 1 else RAGGED[len(reference)]
    nash, biased = (
        theory.regularised_nash(preference, reference, tau),
        theory.ipo_md_fixed_point(preference, reference, tau, BETA),
    )
    reached = []
    for beta in (0.0, BETA):
        loss = theory.online_nash_md_loss(completions, preference, reference, tau, beta)
        path = theory.descend(loss, completions.logits_of(reference), 1.0, 1200)
        reached.append(completions.logprobs(path[-1]).exp())
    assert_close(reached[0], nash, 1e-4)
    assert_close(reached[1], biased, 1e-4)
    # The bias is there, and larger than the tolerance by far: it is the opponent's, not the optimiser's.
    assert (reached[1] - nash).abs().max() > 5e-3
    if name == "rock-paper-scissors":
        assert_close(reached[0], vector(0.432065, 0.230329, 0.337605), 1e-4)
        assert_close(reached[1], vector(0.415937, 0.203261, 0.380802), 1e-4)


def test_with_two_tokens_a_per_token_mixture_opponent_has_another_fixed_point():
    preference, reference, tau, _ = GAMES["random 0"]
    completions = RAGGED[5]
    fixed_point = theory.ipo_md_fixed_point(preference, reference, tau, BETA)
    reference_logits, logits = completions.logits_of(reference), completions.logits_of(fixed_point)
    per_sequence = theory.geometric_mixture(fixed_point, reference, BETA)
    per_token = theory.per_token_mixture(completions, logits, reference_logits, BETA)
    at_sequence, at_token = (
        gradient(
            lambda x, o=opponent: theory.expected_nash_md_loss(
                completions, x, reference_logits, o, preference, tau
            ),
            logits,
        ).norm()
        for opponent in (per_sequence, per_token)
    )
    assert at_sequence < 1e-12
    assert at_token > 1e-4


# --- 10. the KL is reward-to-go ----------------------------------------------------------------


@pytest.mark.parametrize("completions", [two_tokens(3), RAGGED[5]], ids=["two tokens", "ragged"])
def test_only_reward_to_go_gives_the_gradient_of_the_kl(completions):
    # no preference: the KL part alone is left
    tie = torch.full((len(completions.tokens),) * 2, 0.5, dtype=torch.float64)
    worst = 1.0
    for seed in range(10):
        logits, reference_logits = completions.random_logits(seed), completions.random_logits(100 + seed)
        opponent = completions.logprobs(reference_logits).exp()
        exact = gradient(
            lambda x, a=(reference_logits, opponent, tie, TAU): theory.nash_md_objective(completions, x, *a),
            logits,
        )
        to_go, own = (
            -gradient(
                lambda x, a=(reference_logits, opponent, tie, TAU, loss): theory.expected_nash_md_loss(
                    completions, x, *a
                ),
                logits,
            )
            for loss in (nash_md_loss, theory.own_token_loss)
        )
        assert_close(to_go, exact, 1e-12)
        assert cosine(to_go, exact) > 1 - 1e-9
        worst = min(worst, cosine(own, exact))
    assert worst < 0.95


def test_the_own_token_variant_is_right_for_one_token_which_is_how_it_stayed_unseen():
    completions = one_token(4)
    logits, reference_logits = completions.random_logits(0), completions.random_logits(1)
    arguments = (reference_logits, vector(1, 1, 1, 1) / 4, theory.random_game(4, 0)[0], TAU)
    real, own = (
        gradient(lambda x, f=loss: theory.expected_nash_md_loss(completions, x, *arguments, f), logits)
        for loss in (None, theory.own_token_loss)
    )
    assert_close(own, real, 1e-14)


def test_each_tokens_coefficient_is_its_advantage_minus_the_kl_still_to_come():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    policy.requires_grad_()
    reference.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)
    preference = vector(0.9, 0.5, 0.2)
    for baseline in (0.5, vector(0.1, 0.2, 0.3)):
        loss = nash_md_loss(policy, reference, mask, preference, 0.3, baseline)
        from_policy, from_reference = torch.autograd.grad(loss, (policy, reference), allow_unused=True)
        base = torch.as_tensor(baseline, dtype=torch.float64).expand(3)
        for i in range(3):
            for n in range(4):
                to_go = sum((policy[i, m] - reference[i, m]) * mask[i, m] for m in range(n, 4))
                coefficient = mask[i, n] * (preference[i] - base[i] - 0.3 * to_go)
                # the loss is a mean over 3 rows
                assert_close(-3 * from_policy[i, n], coefficient.detach(), 1e-12)
        # The reference enters through the KL coefficient alone, so a gradient there would be one through the
        # coefficient.
        assert from_reference is None or not from_reference.any()


# --- 11. tabular Nash-MD -----------------------------------------------------------------------


@pytest.mark.parametrize("name", GAMES)
def test_nash_md_contracts_as_theorem_1_says(name):
    preference, reference, tau, _ = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    for start in (reference, random_policy(len(nash), 3)):
        for eta in (0.05, 0.5, 2.0):
            policy = start
            for _ in range(50):
                after = theory.nash_md_step(policy, preference, reference, tau, eta)
                assert theory.kl(nash, after) <= (1 - eta * tau) * theory.kl(nash, policy) + 2 * eta**2
                policy = after


@pytest.mark.parametrize("name", GAMES)
def test_nash_md_with_falling_steps_reaches_the_nash(name):
    preference, reference, tau, _ = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    policy = random_policy(len(nash), 3)
    for t in range(2000):
        policy = theory.nash_md_step(policy, preference, reference, tau, 2 / (tau * (t + 2)))
        assert theory.kl(nash, policy) <= 8 / (tau**2 * (t + 2))  # the policy after T = t + 1 steps
    # The bound allows .4 nats here (τ = .1).
    assert theory.kl(nash, policy) < 1e-5
    assert_close(policy, nash, 1e-3)


@pytest.mark.parametrize("name", GAMES)
def test_nash_md_with_a_constant_step_is_biased_by_it(name):
    preference, reference, tau, _ = GAMES[name]
    nash = theory.regularised_nash(preference, reference, tau)
    errors = []
    for eta in (0.1, 0.5, 1.0):
        policy = reference
        for _ in range(3000):
            policy = theory.nash_md_step(policy, preference, reference, tau, eta)
        assert_close(theory.nash_md_step(policy, preference, reference, tau, eta), policy, 1e-8)
        mixture = theory.geometric_mixture(policy, reference, eta * tau)
        assert_close(mixture, theory.regularised_nash(preference, reference, tau / (1 - eta * tau)), 1e-6)
        assert_close(policy, theory.ipo_md_fixed_point(preference, reference, tau, eta * tau), 1e-6)
        errors.append((policy - nash).abs().max().item())
    assert 1e-4 < errors[0] < errors[1] < errors[2]
