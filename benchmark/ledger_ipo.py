"""The rows of online-IPO and IPO-MD: see ledger.py."""

from __future__ import annotations

from statistics import fmean as mean

from ledger import (
    CONTRADICTED,
    IN_SHAPE,
    NOT_SEEN,
    REPRODUCED,
    STYLES,
    TABULAR,
    at_rest,
    by_variant,
    cycle_said,
    cycle_studies,
    cycle_value,
    exact,
    listed,
    point,
    rows,
    study,
    tiny,
)

ROWS, claim = rows("ipo")


@claim(
    "equivalence theorem",
    "ipo_md.py:preference_loss tests/test_theory.py:test_online_ipo_is_stationary_at_the_nash_and_only_there"
    " tests/test_theory.py:test_gradient_descent_on_online_ipo_reaches_the_nash",
    study("ipo_theorem"),
)
def ipo_rests_at_nash(results):
    """Online-IPO's stationary point is the Nash equilibrium of the regularised game."""
    found = results.study("ipo_theorem")
    text = f"{found['games']} games: gradient there {tiny(found['gradient_at_nash'])}, elsewhere at least "
    text += f"{point(found['least_gradient_elsewhere'])}; descent ends within "
    text += f"{tiny(found['distance_after_descent'])}"
    return exact(found["gradient_at_nash"], found["distance_after_descent"]), text


@claim(
    "abstract; equivalence theorem",
    "ipo_md.py:preference_loss nash_md.py:nash_md_loss"
    " tests/test_theory.py:test_online_ipo_follows_self_plays_gradient_times_four_over_tau",
    study("ipo_theorem"),
)
def ipo_is_self_play(results):
    """Optimising IPO on the policy's own answers is self-play in the preference game."""
    found = results.study("ipo_theorem")["self_play_times_4_over_tau"]
    text = "expected gradient against self-play's times 4/τ, away from rest: relative difference "
    return exact(found), text + tiny(found)


@claim(
    "offline and online data",
    "ipo_md.py:preference_loss"
    " tests/test_theory.py:test_offline_ipo_moves_with_its_data_while_online_ipo_has_none",
    study("ipo_data"),
)
def ipo_offline_depends_on_data(results):
    """Offline, the optimum depends on who wrote the data; online it does not."""
    found = results.study("ipo_data")
    text = f"20 data distributions move offline optima by at least {point(found['offline_least_spread'])} "
    text += "in each "
    text += f"of {found['games']} games, online ends by {tiny(found['online_largest_spread'])}; data drawn "
    text += "from the "
    text += f"Nash teach the Nash ({tiny(found['data_from_nash'])})"
    moved, stays = found["offline_least_spread"] > 0.01, found["online_largest_spread"] < 1e-6
    return (REPRODUCED if moved and stays else CONTRADICTED), text


@claim(
    "IPO-MD, theory",
    "ipo_md.py:preference_loss tests/test_theory.py:test_the_mixture_at_ipo_mds_fixed_point_is_a_nash",
    study("ipo_mixture"),
)
def ipo_md_mixture_is_a_nash(results):
    """IPO-MD rests where its mixture is the Nash at temperature τ/(1 − β)."""
    found = results.study("ipo_mixture")
    text = "β = 0 to .9, four games: gradient at that point " + tiny(found["gradient_at_rest"])
    text += f", mixture less Nash {tiny(found['mixture_minus_nash'])}"
    return exact(found["gradient_at_rest"], found["mixture_minus_nash"]), text


@claim(
    "IPO-MD, theory",
    "ipo_md.py:preference_loss nash_md.py:nash_md_loss"
    " tests/test_theory.py:test_self_play_reaches_the_nash_and_the_mixture_opponent_its_biased_fixed_point",
    study("ipo_mixture"),
)
def ipo_md_shares_nash_mds_point(results):
    """IPO-MD and Nash-MD-PG with the same mixture have one fixed point."""
    found = results.study("ipo_mixture")
    text = f"descent on both scripts' losses, β = .125: ends apart by {tiny(found['two_scripts_apart'])}; "
    text += f"rock-paper-scissors ({', '.join(point(x, 4) for x in found['rock_paper_scissors'])})"
    return exact(found["two_scripts_apart"]), text


@claim("IPO-MD, ends of β", f"ipo_md.py:collect {TABULAR}:ipo_mixture", study("ipo_mixture"))
def ipo_md_interpolates(results):
    """β leads from online-IPO (0) to IPO on data of the reference (1)."""
    found = results.study("ipo_mixture")["gradient_at_best_response"]
    text = "at β = 1 both losses rest at offline IPO's optimum on μ, the best response to it: gradient "
    return exact(found), text + f"{tiny(found)}; at β = 0 they are the rows above"


@claim(
    "losses compared",
    "ipo_md.py:preference_loss tests/test_theory.py:test_online_dpo_is_not_stationary_at_the_nash",
    study("online_dpo"),
)
def dpo_rests_elsewhere(results):
    """Online DPO, on the same samples, has another solution than the Nash."""
    found = results.study("online_dpo")
    text = (
        f"four games, one τ: gradient at the Nash at least {point(found['least_gradient_at_nash'])}, descent "
    )
    text += (
        f"ends at least {point(found['least_distance_from_nash'])} from it (near p = ½ DPO at 4τ is IPO at τ)"
    )
    return (REPRODUCED if found["least_distance_from_nash"] > 0.01 else CONTRADICTED), text


@claim(
    "losses compared",
    "ipo_md.py:preference_loss tests/test_theory.py:"
    "test_under_bradley_terry_online_dpo_rests_at_the_rlhf_solution_and_online_ipo_does_not",
    study("online_dpo"),
)
def dpo_rests_at_rlhf(results):
    """Where preferences are Bradley-Terry's, online DPO solves RLHF's problem."""
    found = results.study("online_dpo")["gradient_at_rlhf"]
    return exact(found), f"five random rewards: gradient at μ exp(r/τ) {tiny(found)}"


@claim("regularised game", f"ipo_md.py:preference_loss {TABULAR}:sweep", study("sweep"))
def tau_trades_kl_for_exploitability(results):
    """τ is the price of leaving the reference: less of it, farther away and harder to exploit."""
    cells = results.study("sweep")["cells"]
    taus = {key.split(",")[0]: cell for key, cell in cells.items() if key.endswith(", 0")}
    kls, gaps = ([cell[key] for cell in taus.values()] for key in ("kl", "exploitability"))
    text = f"rock-paper-scissors, τ = {' / '.join(taus)}: KL {listed(kls)}, exploitability {listed(gaps)}"
    falls = all(a > b for a, b in zip(kls, kls[1:])) and gaps[0] == min(gaps)
    monotone = all(a < b for a, b in zip(gaps, gaps[1:]))
    text += (
        ""
        if monotone
        else ". Not monotone: between, the point is easier to exploit than at the strongest tie"
    )
    return (REPRODUCED if falls and monotone else IN_SHAPE if falls else CONTRADICTED), text


@claim("abstract, 'regularised sampling'", f"ipo_md.py:collect {TABULAR}:sweep", study("sweep"))
def beta_regularises_sampling(results):
    """IPO-MD's sampling is regularised: with β what is sampled stays nearer to the reference."""
    cells = results.study("sweep")["cells"]
    row = {key.split(", ")[1]: cell for key, cell in cells.items() if key.startswith("0.1,")}
    mixture, policy, gaps = ([x[key] for x in row.values()] for key in ("mixture_kl", "kl", "exploitability"))
    text = f"rock-paper-scissors, τ = .1, β = {' / '.join(row)}: KL of the mixture {listed(mixture)}; of the "
    text += f"policy, its best response, {listed(policy)}, exploitability {listed(gaps)}"
    return (REPRODUCED if all(a > b for a, b in zip(mixture, mixture[1:])) else CONTRADICTED), text


@claim(
    "both papers: theory for sequences, runs by token",
    "common.py:sample tests/test_theory.py:test_mixing_tokens_is_not_mixing_sequences",
    study("token_mixture"),
)
def tokens_stand_for_sequences(results):
    """Mixing next-token distributions stands in for the mixture of whole replies."""
    found = results.study("token_mixture")
    near = found["random"]["0.125"]
    text = f"two tokens of three, 50 random pairs: total variation {point(near['mean'])}, at most "
    text += (
        f"{point(near['largest'])} at β = .125; {point(found['quarrel'])} for a pair made to quarrel at β = ½"
    )
    return (IN_SHAPE if near["largest"] < 0.1 else CONTRADICTED), text


@claim(
    "experiments",
    "ipo_md.py:main benchmark/compare.py:STUDIES",
    'python benchmark/compare.py ipo --seeds 2 "--flags=--max-steps 12"',
)
def online_losses_learn(results):
    """IPO-MD, online-IPO, online DPO and online SLiC all improve on the model they start from."""
    lows = [run["summary"]["eval_judge_win_rate_interval"][0] for run in results["ipo"]["runs"]]
    rates = by_variant(results["ipo"]["runs"], "eval_judge_win_rate")
    text = "SmolLM2, 12 steps, win rate by a judge not trained on: "
    text += "; ".join(f"{name} {listed(values)}" for name, values in rates.items())
    return (IN_SHAPE if min(lows) > 0.5 else NOT_SEEN), text


@claim(
    "experiments, side-by-side table",
    "ipo_md.py:main benchmark/compare.py:STUDIES",
    'python benchmark/compare.py ipo --seeds 2 "--flags=--max-steps 12"',
)
def ipo_is_ahead(results):
    """IPO and IPO-MD are ahead of DPO and SLiC."""
    rates = by_variant(results["ipo"]["runs"], "eval_judge_win_rate")
    ours = [min(values) for name, values in rates.items() if "IPO" in name]
    others = [max(values) for name, values in rates.items() if "IPO" not in name]
    text = "on that run: lowest seed of IPO and IPO-MD "
    text += f"{point(min(ours))}, highest of DPO and SLiC {point(max(others))}; not side by side, 12 steps"
    return (IN_SHAPE if min(ours) > max(others) else NOT_SEEN), text


def distance(shares: list[float], others: list[float]) -> float:
    """Total variation."""
    return sum(abs(a - b) for a, b in zip(shares, others, strict=True)) / 2


def from_rest(runs: list[dict], points: dict, variant: str) -> tuple[float, float]:
    """Total variation of a variant's mean style shares from its resting point, before and after."""
    mine = [run for run in runs if run["variant"] == variant]
    before = [mean([run["summary"][f"style/{style}_before"] for run in mine]) for style in STYLES]
    after = [mean([cycle_value(run, f"style/{style}") for run in mine]) for style in STYLES]
    return distance(before, points[variant]), distance(after, points[variant])


@claim(
    "IPO-MD and Nash-MD on text",
    "ipo_md.py:main nash_md.py:main benchmark/resting_points.py:resting_points",
    "python benchmark/compare.py cycle --seeds 5",
)
def text_nears_the_common_point(results):
    """On text, too, IPO-MD and Nash-MD with a mixture move to their common resting point."""
    said, nearer = [], []
    for name, runs in cycle_studies(results).items():
        points, text = at_rest(results, name)["points"], []
        for variant in ("IPO-MD", "Nash-MD, mixture"):
            before, after = from_rest(runs, points, variant)
            nearer.append(after < before / 2)
            text.append(f"{variant} {point(before)} → {point(after)}")
        said.append(cycle_said(name, runs) + "; ".join(text))
    text = "cycle judge, total variation of the mean style shares from it. " + ". ".join(said)
    return (IN_SHAPE if all(nearer) else NOT_SEEN), text
