# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Online-IPO and IPO-MD
#
# Second of four. [SELM](1_selm.py) took the judge's verdict as certain. Here the loss sees how sure the
# judge is, and so it can find an equilibrium where no answer is best.
#
# Read beside it: [ipo_md.py](../ipo_md.py), [its page](../docs/ipo_md.md), and sections 1 to 7 of [the
# theory](../docs/theory.md).

# %%
import lab  # first: it finds the scripts

import ipo_md
import theory
import torch

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The loss in ten lines
#
# Two answers of the policy, a and b, and p = p(a ≻ b). The log-ratio h of a over b is pulled to (p − ½)/τ.


# %%
def by_hand(a, b, ref_a, ref_b, p, tau):
    h = (a - ref_a) - (b - ref_b)
    as_if_a_won = (h - 1 / (2 * tau)) ** 2
    as_if_b_won = (-h - 1 / (2 * tau)) ** 2
    return (p * as_if_a_won + (1 - p) * as_if_b_won).mean()


logprobs, p = -20 * torch.rand(4, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
mine, scripts = by_hand(*logprobs, p, 0.5), ipo_md.preference_loss(*logprobs, p, 0.5)
print(mine.item(), scripts.item())
assert torch.allclose(mine, scripts)

# %% [markdown]
# It is a square with a floor: the policy can close the distance to (p − ½)/τ, and nobody can remove the
# label's noise. That is why a logged IPO loss does not go to zero.

# %%
h = (logprobs[0] - logprobs[2]) - (logprobs[1] - logprobs[3])
square, floor = (h - (p - 0.5) / 0.5) ** 2, (1 - (2 * p - 1) ** 2) / (4 * 0.5**2)
assert torch.allclose((square + floor).mean(), scripts)

# %% [markdown]
# ## A game solved
#
# Rock-paper-scissors, and a reference that likes rock. No scalar reward explains this judge. The
# regularised Nash equilibrium is the policy that nobody beats once each pays τ for every nat of KL.

# %%
rps, mu = theory.rock_paper_scissors(), theory.MU
nash = theory.regularised_nash(rps, mu, 0.1)
path = lab.walk("ipo", "rps", (0.1, 0.0), start=2)
lab.triangle({"online-IPO": path}, {"Nash": nash, "reference": mu})
print("the walk ends at ", path[-1])
print("the Nash lies at ", nash)

# %% [markdown]
# The path winds because sampling is not differentiated: the update is the gradient of no function. Now the
# sibling loss of the same script, on the same answers.

# %%
dpo = lab.walk("dpo", "rps", (0.3,), start=2)
lab.triangle({"online-IPO": lab.walk("ipo", "rps", (0.3, 0.0), start=2), "online DPO": dpo},
             {"Nash": theory.regularised_nash(rps, mu, 0.3)})  # fmt: skip

# %% [markdown]
# ## SmolLM2 before and after

# %%
run = lab.short_run(ipo_md, max_steps=4, num_prompts=48)

# %%
lab.show(run)

# %% [markdown]
# ## Exercises
#
# **1.** Two answers, uniform reference, p = .7, τ = .1. What share of the first answer does online-IPO rest
# at?

# %%
answer_1 = ...
lab.check(1, answer_1, lambda share: abs(share - 0.880797) < 5e-4, "π₁ = σ((p − ½)/τ)")

# %% [markdown]
# **2.** IPO-MD samples from π^(1−β) μ^β and rests at another policy. Give the mixture of that policy and μ
# at β = .5, τ = .1 on rock-paper-scissors, as a tensor of three shares: the Nash of which temperature is
# it?

# %%
answer_2 = ...
resting = theory.ipo_md_fixed_point(rps, mu, 0.1, 0.5)
lab.check(2, answer_2, lambda m: torch.allclose(m, theory.geometric_mixture(resting, mu, 0.5), atol=1e-4),
          "Section 7 of the theory: it is a Nash at another temperature; theory.regularised_nash.")  # fmt: skip

# %% [markdown]
# **3.** A judge who says 5/9 is rounded to 1. Solve the dice with rounded labels: give the policy that
# online-IPO rests at, τ = .1, reference `mu`.

# %%
answer_3 = ...
rounded = theory.regularised_nash(theory.argmax_game(theory.dice_game()), mu, 0.1)
lab.check(3, answer_3, lambda policy: torch.allclose(policy, rounded, atol=1e-3),
          "Rounded, the dice are rock-paper-scissors: theory.argmax_game.")  # fmt: skip
