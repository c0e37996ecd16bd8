"""The rows of Nash-MD: see ledger.py."""

from __future__ import annotations

from ledger import (
    CONTRADICTED,
    IN_SHAPE,
    NOT_SEEN,
    REPRODUCED,
    TABULAR,
    at_rest,
    cycle_said,
    cycle_studies,
    cycle_value,
    each_seed,
    exact,
    interval,
    listed,
    point,
    rows,
    spread,
    study,
    tiny,
    told,
)

ROWS, claim = rows("nash")


@claim(
    "Theorem 1, one step",
    "docs/theory.py:nash_md_step tests/test_theory.py:test_nash_md_contracts_as_theorem_1_says",
    study("nash_rate"),
)
def nash_step_contracts(results):
    """A step of Nash-MD: KL(π*, π_{t+1}) ≤ (1 − ητ) KL(π*, π_t) + 2η²."""
    found = results.study("nash_rate")["least_slack_of_a_step"]
    text = f"four games, η = .05, .5, 2, fifty steps each: right less left at least {point(found)}"
    return (REPRODUCED if found >= 0 else CONTRADICTED), text


@claim(
    "Theorem 1",
    "docs/theory.py:nash_md_step tests/test_theory.py:test_nash_md_with_falling_steps_reaches_the_nash",
    study("nash_rate"),
)
def nash_bound_holds(results):
    """With η_t = 2/(τ(t + 2)) the last iterate has KL(π*, π_T) ≤ 8/(τ²(T + 1))."""
    found = results.study("nash_rate")
    worst = {T: max(game["kl"][T] for game in found["games"].values()) for T in found["bound"]}
    holds = all(worst[T] <= bound for T, bound in found["bound"].items())
    text = f"τ = {point(found['tau'], 1)}, worst of four games: " + ", ".join(
        f"{value:.0e} at T = {T} (bound {found['bound'][T]:.2g})" for T, value in worst.items()
    )
    return (REPRODUCED if holds else CONTRADICTED), text


@claim("Theorem 1, the rate", f"docs/theory.py:nash_md_step {TABULAR}:nash_rate", study("nash_rate"))
def nash_rate_is_one_over_t(results):
    """The last iterate's KL falls as 1/T (an upper bound)."""
    slopes = [game["slope"] for game in results.study("nash_rate")["games"].values()]
    text = (
        f"exponent of T between 1,000 and 10,000, four games: {listed(slopes, 2)}; faster than the bound's −1"
    )
    return (REPRODUCED if max(slopes) <= -1 else CONTRADICTED), text


@claim(
    "Eq. 13",
    "nash_md.py:nash_md_loss"
    " tests/test_theory.py:test_expected_policy_gradient_is_the_gradient_of_the_regularised_preference",
    study("nash_gradient"),
)
def nash_gradient_is_exact(results):
    """Nash-MD-PG's estimate is the gradient of the regularised preference."""
    found = results.study("nash_gradient")
    text = f"{found['gradients']} enumerated gradients, one token and two: difference "
    text += f"{tiny(found['largest_difference'])}. With each token's own log-ratio for the reward-to-go "
    text += "the cosine "
    return exact(
        found["largest_difference"]
    ), text + f"with the KL's gradient falls to {point(found['own_token_worst'])}"


@claim(
    "regularised equilibrium",
    f"docs/theory.py:regularised_nash {TABULAR}:nash_guarantee",
    study("nash_guarantee"),
)
def nash_is_safe(results):
    """No policy is preferred to the regularised Nash, each paying for its KL."""
    found = results.study("nash_guarantee")
    text = f"{found['games']} games × 2,000 policies: P_τ(π* ≻ π) − ½ ≥ 0, and τ KL(π‖π*) to "
    text += tiny(found["regularised_minus_tau_kl"])
    return exact(found["regularised_minus_tau_kl"]), text


@claim("introduction", f"cleanalign/games.py:nash {TABULAR}:nash_guarantee", study("nash_guarantee"))
def nash_is_preferred(results):
    """The Nash is preferred, or tied, against any other policy."""
    found = results.study("nash_guarantee")
    text = f"unregularised: P(π* ≻ y) − ½ at least {point(found['nash_plain_least'])}. The regularised "
    text += "one, which is "
    text += f"what is trained, can lose without KL's price: {point(found['regularised_nash_plain_least'])} "
    text += "(τ = .1)"
    return exact(found["nash_plain_least"], tolerance=1e-8), text


@claim(
    "abstract of v3, preference and reward models",
    f"afd.py:discriminator_loss docs/play.py:Game {TABULAR}:nash_reward",
    study("nash_reward"),
)
def reward_depends_on_sampling(results):
    """A reward model depends on the distribution of its pairs; a preference model does not."""
    found = results.study("nash_reward")
    moved = found["random"]["rlhf_moved"]
    text = f"pairs of μ or uniform, {found['games']} random games: RLHF's policy moves by {spread(moved)} "
    text += "in total "
    text += f"variation (rock-paper-scissors {point(found['rock-paper-scissors']['rlhf_moved'])}); under "
    text += f"Bradley-Terry preferences the fit by {tiny(found['bradley_terry_reward_moved'])}"
    return (REPRODUCED if moved[0] > 2 * moved[1] else CONTRADICTED), text


@claim(
    "preference models",
    "preference_model.py:comparison_loss"
    " tests/test_preference_model.py:test_a_pairwise_model_learns_a_cycle_and_a_reward_model_cannot",
    "python -m pytest tests/test_preference_model.py -k learns_a_cycle",
)
def pairwise_model_learns_a_cycle(results):
    """A pairwise preference model expresses what no reward can: a cycle."""
    return (
        IN_SHAPE,
        "a tiny model: pairwise it learns the cycle, as a reward model two thirds at most (asserted)",
    )


@claim(
    "experiments, preference against reward model",
    f"nash_md.py:nash_md_loss afd.py:discriminator_loss {TABULAR}:nash_reward",
    study("nash_reward"),
)
def nash_beats_rlhf_on_games(results):
    """Learned from the same pairs, the Nash policy is preferred to RLHF's."""
    found = results.study("nash_reward")
    row = found["random"]
    text = f"{found['games']} random games: P(Nash ≻ RLHF) {spread(row['at_equal_kl'])} at equal KL, but "
    text += f"{spread(row['nash_beats_rlhf'])} at one τ, where RLHF goes farther; exploitability "
    text += f"{spread(row['nash_exploitability'])} against {spread(row['rlhf_exploitability'])}"
    return told(row["at_equal_kl"][0] - 0.5, row["at_equal_kl"][1]), text


@claim(
    "experiments, win rate over β",
    f"nash_md.py:nash_md_loss docs/theory.py:ipo_md_fixed_point {TABULAR}:nash_beta",
    study("nash_beta"),
)
def beta_between_is_best(results):
    """Against RLHF a β between self-play (0) and best response (1) is best, best response worst (.489 at
    0, .598 at .125, .148 at 1 in the paper)."""
    found = results.study("nash_beta")
    row = {beta: cell["win_rate"] for beta, cell in found["random"].items()}
    best = max(row, key=lambda beta: row[beta][0])
    gain = found["random"][best]["minus_self_play"]
    text = f"resting points, {found['games']} random games: "
    text += f"{', '.join(f'{point(v[0])} at {b}' for b, v in row.items())}; "
    text += f"{best} less 0: {spread(gain)}. A smaller effect, and each of them below ½ at one τ"
    between = best not in ("0", "1") and min(row, key=lambda beta: row[beta][0]) == "1"
    return (told(*gain) if between else NOT_SEEN), text


@claim(
    "experiments, Nash-EMA-PG", f"nash_md.py:EMA docs/play.py:settles {TABULAR}:nash_ema", study("nash_ema")
)
def ema_is_another_way(results):
    """An average of past weights serves as opponent as the mixture does."""
    found = results.study("nash_ema")
    ema = ", ".join(f"{count} at decay {point(float(decay))}" for decay, count in found["ema"].items())
    text = f"of {found['of']} (game, τ), at rest within .01: EMA {ema}, mixture "
    text += f"{found['mixture']['0.125']} at β = "
    text += ".125. A slow average can circle for ever at small τ"
    most = min(found["ema"].values()) >= 0.75 * found["of"]
    return (IN_SHAPE if most else NOT_SEEN), text


@claim(
    "introduction: rewards cannot express it",
    "nash_md.py:main judges.py:cycle_preference benchmark/compare.py:STUDIES",
    "python benchmark/compare.py cycle --seeds 5",
)
def rlhf_is_exploitable_on_text(results):
    """Where preferences go in a circle, RLHF settles on one style, which another beats; Nash learning
    does not."""
    said, apart = [], []
    for name, runs in cycle_studies(results).items():
        rest, gaps = at_rest(results, name)["exploitability"], {}
        for run in sorted(runs, key=lambda run: run["seed"]):
            gaps.setdefault(run["variant"], []).append(cycle_value(run, "exploitability"))
        shown = ("RLHF", "Nash-MD, self", "Nash-MD, mixture")
        apart.append(min(gaps["RLHF"]) > max(gap for each in shown[1:] for gap in gaps[each]))
        text = "; ".join(f"{each} {each_seed(gaps[each])} (at rest {point(rest[each])})" for each in shown)
        said.append(cycle_said(name, runs) + text)
    return (IN_SHAPE if all(apart) else NOT_SEEN), "cycle judge, exploitability. " + ". ".join(said)


@claim(
    "experiments, Nash-MD against RLHF",
    "nash_md.py:main evaluate.py:main benchmark/pool.py:POLICIES",
    "python benchmark/pool.py",
)
def nash_md_beats_rlhf_on_text(results):
    """Nash-MD's policy is preferred to RLHF's (.598 at β = .125 in the paper)."""
    pool = results["pool"]["pool"]
    row, column = (pool["models"].index(name) for name in ("nash-md", "rlhf"))
    low, high = pool["interval"][row][column]
    steps = next(run["summary"]["steps"] for run in results["pool"]["runs"] if run["name"] == "nash-md")
    text = f"cycle judge, {steps} steps, one seed: {point(pool['preference'][row][column])} "
    text += f"{interval(low, high)}. Far "
    text += "from rest, and this judge lets whoever exclaims most win until somebody asks"
    return (IN_SHAPE if low > 0.5 else CONTRADICTED if high < 0.5 else NOT_SEEN), text
