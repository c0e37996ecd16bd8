"""The rows of alignment from demonstrations and of SPIN: see ledger.py."""

from __future__ import annotations

import math
from statistics import fmean as mean

from ledger import (
    CONTRADICTED,
    IN_SHAPE,
    NOT_SEEN,
    NOT_TESTED,
    REPRODUCED,
    TABULAR,
    Results,
    error,
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

AFD, afd = rows("afd")
SPIN, spin = rows("spin")


@afd(
    "Section 3",
    "afd.py:train_sft docs/afd_divergences.py:fit"
    " tests/test_afd.py:test_forward_kl_covers_and_reverse_kl_seeks_a_mode",
    study("divergences"),
)
def forward_kl_covers(results):
    """SFT minimises the forward KL and covers every mode."""
    found = results.study("divergences")
    centre, width, _ = found["fits"]["forward-kl from -0.5"]
    text = f"two modes, a policy with one: ends at mean {point(centre, 2)}, width {point(width, 2)}; the "
    text += f"demonstrations' own {listed(found['demonstrations'], 2)}"
    near = max(abs(centre - found["demonstrations"][0]), abs(width - found["demonstrations"][1])) < 0.1
    return (REPRODUCED if near else CONTRADICTED), text


@afd(
    "Section 3",
    "afd.py:adversarial_reward docs/afd_divergences.py:fit"
    " tests/test_afd.py:test_forward_kl_covers_and_reverse_kl_seeks_a_mode",
    study("divergences"),
)
def reverse_kl_seeks(results):
    """Adversarial imitation on the discriminator's logit minimises the reverse KL and seeks a mode; JS stands
    between."""
    fits = results.study("divergences")["fits"]
    text = "; ".join(
        f"{name}: mean {point(fit[0], 2)}, width {point(fit[1], 2)}" for name, fit in list(fits.items())[1:]
    )
    reverse, wide, narrow = (
        fits[f"{name}"] for name in ("reverse-kl from -0.5", "js from -0.5", "js from -1.5")
    )
    seeks = max(abs(reverse[0] + 2), abs(reverse[1] - 0.5)) < 0.05 and wide[1] > 1 > narrow[1]
    return (REPRODUCED if seeks else CONTRADICTED), text + " (modes: −2 and 2, width .5)"


@afd(
    "Section 3",
    "afd.py:discriminator_loss tests/test_afd.py:test_optimal_discriminator_is_the_log_density_ratio",
    study("discriminator"),
)
def discriminator_is_the_ratio(results):
    """The optimal discriminator's logit is log d_demo − log d_π."""
    found = results.study("discriminator")
    text = f"minimum found through the loss, {found['tables']} tables: difference "
    text += f"{tiny(found['classification'])}; "
    text += f"Bradley-Terry's up to a constant {tiny(found['bradley_terry_up_to_a_constant'])}"
    return exact(found["classification"], found["bradley_terry_up_to_a_constant"]), text


@afd(
    "Section 3",
    "afd.py:policy_gradient_loss tests/test_afd.py:test_adversarial_rewards_descend_their_divergences",
    study("discriminator"),
)
def rewards_descend_divergences(results):
    """The policy gradient on the logit descends KL(π‖demo), that on −log(1 − D) the JS divergence."""
    found = results.study("discriminator")["gradients"]
    return exact(found), f"against the gradients of KL(π‖demo) and 2 JS: difference {tiny(found)}"


@afd(
    "Section 4",
    f"afd.py:discriminator_loss rewards.py:log_ratios {TABULAR}:constructions",
    study("constructions"),
)
def init_sft_is_a_log_ratio(results):
    """The `init-sft` reward is what the demonstrations changed, log π_SFT − log π_0 (its limit; the
    closed form is ours)."""
    found = results.study("constructions")
    text = f"minimum found through the loss, {found['tables']} tables: difference "
    return exact(found["init_sft_minus_log_ratio"]), text + tiny(found["init_sft_minus_log_ratio"])


@afd("Section 4", f"{TABULAR}:best_of", study("constructions"))
def init_sft_extrapolates(results):
    """Ranking π_SFT's samples by it goes beyond SFT, and beyond the demonstrators."""
    found = results.study("constructions")
    scores = found["score"]["init-sft"]
    text = (
        f"endless samples: golden score of Best-of-{', '.join(map(str, found['n']))} {listed(scores)}; the "
    )
    text += f"demonstrators' {point(found['demonstrator'])}. By construction: they differ from π_0 in the "
    text += "score alone"
    return (REPRODUCED if scores[-1] > found["demonstrator"] > scores[0] else CONTRADICTED), text


@afd("Section 4, experiments", f"{TABULAR}:constructions", study("constructions"))
def pairs_decide(results):
    """Which pairs the reward is learned from decides what it is worth."""
    found = results.study("constructions")
    apart = found["constructions_apart"]
    text = "endless samples, π_SFT between π_0 and demonstrators: all three rank alike (apart by "
    text += f"{tiny(apart)}). A gap "
    text += "needs what a table lacks: demonstrators outside the family, a reward model's limits, few pairs"
    return (REPRODUCED if apart > 0.01 else NOT_SEEN), text


def best_of_sixteen(results: Results, ranker: str) -> list[dict]:
    """A ranker's curves in the studies of constructions: two seeds, and one with three times the data."""
    runs = results["constructions"]["runs"] + results["scale"]["runs"]
    return [run["rankers"][ranker] for run in runs if ranker in run["rankers"]]


def rates_at_sixteen(curves: list[dict]) -> str:
    """Win rates at N = 16 against N = 1 with their intervals."""
    return " / ".join(
        f"{point(curve['win_rate'][-1])} {interval(curve['win_rate_low'][-1], curve['win_rate_high'][-1])}"
        for curve in curves
    )


FOUR = "afd.py:reward_pairs afd.py:compare_rewards benchmark/constructions.py:main"
FOUR_RUN = "python benchmark/constructions.py runs/con1 runs/con2"


@afd("experiments, Best-of-N", FOUR, FOUR_RUN)
def init_sft_beats_sft_on_text(results):
    """Best-of-N by the `init-sft` reward model beats one sample (.72 to .82 harmless, .57 to .65 helpful
    in the paper)."""
    curves = best_of_sixteen(results, "reward model, init-sft")
    clear = [curve["win_rate_low"][-1] > 0.5 for curve in curves]
    text = f"N = 16 against 1, two seeds and three times the data: {rates_at_sixteen(curves)}"
    above = all(curve["win_rate"][-1] > 0.5 for curve in curves) and sum(clear) > len(clear) / 2
    return (IN_SHAPE if above else NOT_SEEN), text


@afd("experiments, Best-of-N", "rewards.py:log_ratios cleanalign/best_of_n.py:compare_rankers", FOUR_RUN)
def closed_form_grows_with_n(results):
    """The win rate rises with N (here of the closed form, which is ours)."""
    curves = best_of_sixteen(results, "log-ratio")
    grows = all(a < b for curve in curves for a, b in zip(curve["score"], curve["score"][1:]))
    clear = all(curve["win_rate_low"][-1] > 0.5 for curve in curves)
    text = f"at 16: {rates_at_sixteen(curves)}; the score rises at {'every' if grows else 'not every'} N "
    text += "from 1 to 16"
    return (IN_SHAPE if grows and clear else NOT_SEEN), text


@afd("experiments, heterogeneous pairs", FOUR, FOUR_RUN)
def init_demo_is_hacked(results):
    """Pairs of model and demonstrator are told apart almost perfectly, and the reward ranks below chance
    (.20 to .40, harmless; above it, helpful)."""
    curves = best_of_sixteen(results, "reward model, init-demo")
    told_apart = listed([curve["separability"] for curve in curves])
    text = f"`init-demo` at 16: {rates_at_sixteen(curves)}; pairs told apart {told_apart}. Ours hides "
    text += "lengths and ends, "
    text += "and these demonstrations were chosen for what is scored"
    below = all(curve["win_rate_high"][-1] < 0.5 for curve in curves)
    above = all(curve["win_rate_low"][-1] > 0.5 for curve in curves)
    return (IN_SHAPE if below else CONTRADICTED if above else NOT_SEEN), text


@afd("experiments, heterogeneous pairs", FOUR, FOUR_RUN)
def sft_demo_is_no_use(results):
    """So do pairs of π_SFT and demonstrator (.17 to .34 harmless; .52 to .59 helpful)."""
    curves = best_of_sixteen(results, "reward model, sft-demo")
    text = f"`sft-demo` at 16: {rates_at_sixteen(curves)}: chance"
    below = all(curve["win_rate_high"][-1] < 0.5 for curve in curves)
    above = all(curve["win_rate_low"][-1] > 0.5 for curve in curves)
    return (IN_SHAPE if below else CONTRADICTED if above else NOT_SEEN), text


@afd("experiments, preference reward model", FOUR, FOUR_RUN)
def init_sft_matches_preferences(results):
    """Without preferences, `init-sft` is as good as a reward model of preferences, or better (harmless)."""
    ours, theirs = (
        best_of_sixteen(results, f"reward model, {name}") for name in ("init-sft", "preference (oracle)")
    )
    gaps = [a["win_rate"][-1] - b["win_rate"][-1] for a, b in zip(ours, theirs, strict=False)]
    text = f"`preference` at 16: {rates_at_sixteen(theirs)}; `init-sft` less it {listed(gaps)}: too few "
    text += "pairs for either"
    return told(mean(gaps), error(gaps)), text


@afd(
    "Section 3, adversarial imitation",
    "afd.py:train_adversarial benchmark/adversarial.py:main",
    "python benchmark/adversarial.py --seeds 3",
)
def adversarial_improves_on_sft(results):
    """Adversarial imitation improves on SFT."""
    said, clear = [], []
    for name in results.recorded("adversarial", "adversarial_small"):
        runs, text = results[name]["runs"], []
        for objective in dict.fromkeys(run["summary"]["objective"] for run in runs):
            mine = [run["curves"]["score"] for run in runs if run["summary"]["objective"] == objective]
            rise, of_mean = mean([risen(curve)[0] for curve in mine]), risen_error(mine)
            if len(mine) > 1:  # one run's scatter over its updates says nothing of another seed
                clear.append(told(rise, of_mean))
            text.append(f"{objective} {spread([rise, of_mean])} ({len(mine)} run{'s' * (len(mine) > 1)})")
        model = "a small model" if name.endswith("small") else "SmolLM2"
        said.append(f"{model}, {len(mine[0])} steps: " + "; ".join(text))
    verdict = CONTRADICTED if CONTRADICTED in clear else IN_SHAPE if set(clear) == {IN_SHAPE} else NOT_SEEN
    return (
        verdict,
        "judge's score, last less first quarter of the steps from π_SFT (one run alone decides nothing). "
        + ". ".join(said),
    )


def risen(curve: list[float]) -> tuple[float, float]:
    """The last quarter of a curve less the first, and its standard error from their scatter."""
    quarter = len(curve) // 4
    first, last = curve[:quarter], curve[-quarter:]
    return mean(last) - mean(first), math.hypot(error(first), error(last))


def risen_error(curves: list[list[float]]) -> float:
    """Standard error of the mean rise: of three or more seeds from theirs, of fewer from the curves' scatter."""
    if len(curves) > 2:
        return error([risen(curve)[0] for curve in curves])
    return math.sqrt(sum(risen(curve)[1] ** 2 for curve in curves)) / len(curves)


@afd(
    "experiments, harmless",
    "afd.py:compare_rewards benchmark/default_runs.py:RUNS",
    "python benchmark/default_runs.py hh-harmless",
)
def demonstrations_predict_preferences(results):
    """On HH-RLHF harmless a reward learned without preferences is as good as one learned from them."""
    if "hh-harmless" not in results["default_runs"]:
        return (
            NOT_TESTED,
            "not recorded in default_runs.json: minutes on two cores, of which little is to be seen",
        )
    rankers = results["default_runs"]["hh-harmless"]["best_of_n"]["rankers"]
    known = {name: curve.get("preference_accuracy") for name, curve in rankers.items()}
    known = {name: value for name, value in known.items() if value is not None}
    ours, theirs = (
        next(value for name, value in known.items() if kind in name) for kind in ("init-sft", "preference")
    )
    text = "accuracy on held-out preferences: "
    text += "; ".join(f"{name} {point(value)}" for name, value in known.items())
    learnt = theirs > 0.62  # two standard errors of some seventy pairs above ½: else it has learnt nothing
    return (IN_SHAPE if learnt and ours >= theirs - 0.1 else NOT_SEEN), text


@afd("beyond the paper: no Best-of-N when serving", "afd.py:distil", "python benchmark/default_runs.py afd")
def distil_is_best_of_n(results):
    """(Ours.) Distilled into the policy, the reward gives with one sample what Best-of-N gives with N."""
    summary = results.default_run("afd")
    if summary is None:
        return NOT_TESTED, "the default run is not recorded in default_runs.json: 11 minutes on two cores"
    samples = summary["distil"]["samples_per_prompt"]
    ranked, one, sft = (
        summary["distil"][f"best_of_{samples}_score"],
        summary["score_after"],
        summary["sft_score"],
    )
    text = f"held-out score: π_SFT {point(sft)}, Best-of-{samples} {point(ranked)}, distilled with one "
    text += f"sample {point(one)}"
    return (IN_SHAPE if one - sft > 0.75 * (ranked - sft) > 0 else NOT_SEEN), text


# --- SPIN ----------------------------------------------------------------------------------------


@spin("abstract; the theorem on the optimum", f"spin.py:spin_loss {TABULAR}:spin_rest", study("spin_rest"))
def spin_rests_at_data(results):
    """SPIN is at its optimum only where the policy is the data's distribution."""
    found = results.study("spin_rest")
    text = f"{found['tables']} tables: gradient at π_t = p_data {tiny(found['gradient_at_data'])}, "
    text += "elsewhere at least "
    text += point(found["least_gradient_elsewhere"])
    only = exact(found["gradient_at_data"]) == REPRODUCED and found["least_gradient_elsewhere"] > 1e-3
    return (REPRODUCED if only else CONTRADICTED), text


@spin("theory, the logistic loss", f"spin.py:spin_loss {TABULAR}:spin_rest", study("spin_rest"))
def spin_step_has_a_closed_form(results):
    """An iteration's minimum is π_t (p_data/π_t)^(1/λ), normalised."""
    found = results.study("spin_rest")["minimum_minus_formula"]
    return exact(found, tolerance=1e-4), f"minimum found through the loss: difference {tiny(found)}"


@spin("theory and iterations", f"spin.py:spin_loss {TABULAR}:spin_rest", study("spin_rest"))
def spin_iterations_converge(results):
    """Iterated, SPIN converges to the data's distribution."""
    curves = results.study("spin_rest")["kl"]
    text = "each iteration solved to its minimum, KL(p_data‖π_t) over 0 … 5: " + "; ".join(
        f"λ = {strength}: " + " ".join(f"{value:.2g}" if value > 1e-9 else "0" for value in curve)
        for strength, curve in curves.items()
    )
    ends = [curve[-1] < curve[0] for curve in curves.values()]
    text += ". log(p_data/π) is multiplied by 1 − 1/λ: below λ = ½ it needs stopping early"
    return (REPRODUCED if all(ends) else IN_SHAPE if any(ends) else CONTRADICTED), text


@spin("experiments", "spin.py:main", "python benchmark/default_runs.py spin")
def spin_goes_beyond_sft(results):
    """SPIN goes beyond SFT on the same demonstrations."""
    summary = results.default_run("spin")
    if summary is None:
        return NOT_TESTED, "the default run is not recorded in default_runs.json: minutes on two cores"
    text = f"default run, score {point(summary['score_before'])} → {point(summary['score_after'])}, win rate "
    text += f"{point(summary['win_rate'])} {interval(*summary['win_rate_interval'])} against π_0, which "
    text += "SFT moved "
    return NOT_SEEN, text + "too; of π_SFT no score is recorded to compare with"
