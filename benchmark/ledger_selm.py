"""The rows of SELM: see ledger.py."""

from __future__ import annotations

import math
from statistics import fmean as mean

from ledger import (
    CONTRADICTED,
    IN_SHAPE,
    NOT_SEEN,
    REPRODUCED,
    TABULAR,
    Results,
    by_variant,
    error,
    exact,
    listed,
    point,
    rows,
    share,
    spread,
    study,
    tiny,
    told,
)

ROWS, claim = rows("selm")


@claim("Section 4, Eq. 4.2", f"selm.py:selm_loss {TABULAR}:selm_identities", study("selm_identities"))
def selm_closed_form(results):
    """The bilevel objective, a reward fitted with optimism about its best policy, becomes one loss of the
    policy: DPO plus αβ E[log π(y) − log π_ref(y)], y ~ π_ref."""
    found = results.study("selm_identities")
    text = f"inner maximum found numerically against that term, {found['problems']} random problems: "
    return exact(found["closed_form"]), text + f"difference {tiny(found['closed_form'])}"


@claim(
    "Section 4; Algorithm 1",
    "selm.py:selm_loss tests/test_selm_loss.py:test_alpha_zero_is_dpo_and_zero_margin_is_log_two"
    " tests/test_runs.py:test_alpha_zero_has_the_metrics_of_a_dpo_run_written_apart",
    study("selm_identities"),
)
def selm_is_dpo_at_zero(results):
    """With α = 0 SELM is iterative DPO, its baseline."""
    found = results.study("selm_identities")["is_dpo"]
    text = f"against `ipo_md.preference_loss`, kind dpo: difference {tiny(found)}; a run's metrics are tested"
    return exact(found), text


@claim(
    "Section 5",
    f"selm.py:selm_loss {TABULAR}:selm_identities"
    " tests/test_selm_loss.py:test_exploration_lowers_what_the_reference_says",
    study("selm_identities"),
)
def selm_gradient(results):
    """The exploration term's gradient is αβ E_π[exp(−r̂/β) ∇log π]: it lowers most what the implicit
    reward r̂ holds for bad."""
    found = results.study("selm_identities")
    text = f"difference {tiny(found['gradient'])}. Where π = π_ref, as every iteration begins, it is "
    return exact(found["gradient"]), text + f"{tiny(found['at_reference'])}: in expectation nothing"


@claim(
    "arXiv 2405.21046, beside Eq. 4.2",
    "selm.py:selm_loss tests/test_selm_loss.py:test_xpo_through_selm_loss",
    study("selm_identities"),
)
def xpo_is_the_same_force(results):
    """XPO's optimism, α Σ log π(y), is the same term without β and without the reference."""
    found = results.study("selm_identities")["xpo"]
    return exact(found), f"gradient against SELM's at αβ, one fixed reference: difference {tiny(found)}"


@claim("Section 5, Algorithm 2", "selm.py:selm_loss benchmark/bandit.py:optimistic", study("bandit"))
def selm_theory_explores(results):
    """Optimism is sample-efficient: with all data kept and the objective minimised, it finds what the
    reference hardly ever says."""
    found = results.study("bandit")
    way = found["ways"]["optimistic"]
    best = min(way, key=lambda alpha: way[alpha]["late"][0])
    late, gain = way[best]["late_minus_dpo"]
    text = (
        f"best arm at π_ref = {point(found['reference_of_best'])}, {found['seeds']} seeds: it is found in "
        f"{share(way['0']['found'])} at α = 0, {share(way[best]['found'])} at α = {best}; late regret "
        f"{spread(way['0']['late'])} and {spread(way[best]['late'])}"
    )
    return told(-late, gain), text


@claim("experiments, ablation of α", "benchmark/bandit.py:optimistic", study("bandit"))
def selm_alpha_has_an_optimum(results):
    """α trades exploration for exploitation: too little finds nothing new, too much spoils what is known."""
    way = results.study("bandit")["ways"]["optimistic"]
    late = {alpha: row["late"] for alpha, row in way.items()}
    best, most = min(late, key=lambda alpha: late[alpha][0]), list(late)[-1]
    apart = [
        late[end][0] - late[best][0] - 2 * math.hypot(late[end][1], late[best][1]) for end in ("0", most)
    ]
    text = "late regret over α, theory's loop: " + ", ".join(
        f"{point(value[0], 2)} at {alpha}" for alpha, value in late.items()
    )
    return (IN_SHAPE if min(apart) > 0 else NOT_SEEN), text


@claim("Algorithm 1", "selm.py:selm_loss selm.py:collect benchmark/bandit.py:practice", study("bandit"))
def selm_practice_explores(results):
    """Algorithm 1, as it is run, reaches replies outside the reference's support that iterative DPO does
    not."""
    return practice_row(results, "iterative")


@claim("arXiv 2405.21046", "selm.py:answers benchmark/bandit.py:practice", study("bandit"))
def xpo_practice_explores(results):
    """XPO with one step of fresh pairs at a time (`--exploration xpo`) reaches them."""
    return practice_row(results, "xpo")


def practice_row(results: Results, way: str) -> tuple[str, str]:
    """Whether any α of the bandit's loops lowers late regret, and what is found."""
    found = results.study("bandit")["ways"][way]
    rest = {alpha: row["late_minus_dpo"] for alpha, row in found.items() if alpha != "0"}
    lowest = min(rest, key=lambda alpha: rest[alpha][0])
    most = max(row["found"] for row in found.values())
    paper = max(abs(rest[alpha][0]) for alpha in ("0.0001", "0.001"))
    text = (
        f"the best arm is found in {f'at most {share(most)} of seeds' if most else 'no seed'} at any α; late "
        "regret less that of α = 0: "
        f"at most {point(paper)} either way at the paper's α, {spread(rest[lowest])} at its best ({lowest}), "
        f"{spread(rest['1'])} at 1"
    )
    seen = told(-rest[lowest][0], rest[lowest][1]) == IN_SHAPE and most > found["0"]["found"]
    return (IN_SHAPE if seen else NOT_SEEN), text


@claim("recipes of the code", "selm.py:RECIPES benchmark/tabular.py:force", study("selm_identities"))
def selm_small_alpha_matters(results):
    """An α of 1e-4 to 1e-3 is enough to matter."""
    forces = results.study("selm_identities")["force"]
    late = results.study("bandit")["ways"]["iterative"]["0.001"]["late_minus_dpo"]
    text = (
        f"at a fresh pair the term's force on the chosen reply is {forces['0.001']:.1e} of DPO's (α = 1e-3), "
        f"and grows beside it only as margins do; bandit, late regret less that of α = 0: {spread(late)}"
    )
    return told(-late[0], late[1]), text


@claim(
    "experiments, SELM against iterative DPO",
    "selm.py:main benchmark/compare.py:STUDIES",
    "python benchmark/compare.py selm --seeds 3",
)
def selm_beats_dpo_on_text(results):
    """SELM beats iterative DPO."""
    rates = by_variant(results["selm"]["runs"], "win_rate")
    ours, dpo = (next(rates[name] for name in rates if name.startswith(start)) for start in ("SELM", "iter"))
    gaps = [a - b for a, b in zip(ours, dpo, strict=True)]
    text = f"SmolLM2, win rate against the start, seeds in order: {listed(ours)}; DPO {listed(dpo)}; "
    text += "differences "
    text += f"{spread([mean(gaps), error(gaps)])}. Seen with how many seeds: [below](#how-many-seeds)"
    return told(mean(gaps), error(gaps)), text


@claim(
    "experiments, reward distributions over iterations",
    "selm.py:train_step benchmark/compare.py:STUDIES",
    "python benchmark/compare.py selm --seeds 3",
)
def selm_scores_rise(results):
    """The rewards of sampled replies rise over iterations, and higher with the exploration term than
    without."""
    runs = results["selm"]["runs"]
    by_iteration = {}
    for run in runs:
        third = len(run["score"]) // 3
        parts = [mean(run["score"][i * third : (i + 1) * third]) for i in range(3)]
        by_iteration.setdefault(run["variant"], []).append(parts)
    ours, dpo = by_iteration.values()
    gaps = [a[-1] - b[-1] for a, b in zip(ours, dpo, strict=True)]
    rises = all(a[0] < a[1] < a[2] for a in (*ours, *dpo))
    text = "judge's score by iteration, mean of seeds: SELM " + listed([mean(x) for x in zip(*ours)])
    text += "; DPO " + listed([mean(x) for x in zip(*dpo)])
    text += f". {'Both rise in every seed' if rises else 'Not every seed rises'}; third iteration, SELM "
    text += "less DPO: "
    text += f"{spread([mean(gaps), error(gaps)])}. Their spread was not recorded"
    return (told(mean(gaps), error(gaps)) if rises else NOT_SEEN), text


@claim(
    "abstract, 'straightforward objective'",
    "selm.py:train_step benchmark/step_cost.py:main"
    " tests/test_runs.py:test_own_answer_in_a_pair_costs_no_forward_pass",
    "python benchmark/step_cost.py --rounds 7",
)
def selm_costs_little(results):
    """The term is simple to add and costs next to nothing."""
    found = results["step_cost"]
    pair, apart = found["train_step_ratio_K2"], found["train_step_ratio_third_apart"]
    text = f"seconds of a training step over those at α = 0: {point(pair)} where y_s is in its pair, "
    return (REPRODUCED if apart < 1.2 else CONTRADICTED), text + f"{point(apart)} where a third is not"
