# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # SELM, and iterative DPO as its α = 0
#
# First of four: pairs of answers and a logistic loss. Then [online-IPO](2_ipo_md.py), where the loss
# changes, [Nash-MD](3_nash_md.py), where the opponent does, and [AfD](4_afd.py), where nobody judges.
#
# Read beside it: [selm.py](../selm.py) from top to bottom, and [its page](../docs/selm.md).

# %%
import lab  # first: it finds the scripts

import play
import selm
import theory
import torch

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The loss in ten lines
#
# For a pair (chosen, rejected) DPO raises the log-ratio of the first over that of the second. SELM adds α:
# it lowers the likelihood of y_s, an answer that the reference itself gave. Here it is by hand, beside the
# script's.


# %%
def by_hand(chosen, rejected, ref_chosen, ref_rejected, own, ref_own, beta, alpha):
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    dpo = torch.log(1 + torch.exp(-beta * margin))
    exploration = alpha * beta * (own - ref_own)
    return (dpo + exploration).mean()


logprobs = -20 * torch.rand(6, 8, dtype=torch.float64)  # eight pairs, made up
mine, scripts = by_hand(*logprobs, 0.1, 0.01), selm.selm_loss(*logprobs, 0.1, 0.01)
print(mine.item(), scripts.item())
assert torch.allclose(mine, scripts)

# %% [markdown]
# Its gradient says what it does. At the start policy and reference agree, every margin is 0, and each pair
# pulls with β/2.

# %%
policy = torch.zeros(
    3, requires_grad=True
)  # log-probs of chosen, rejected and y_s; the reference's are equal
zero = torch.zeros(1)
selm.selm_loss(*policy.unsqueeze(1)[:2], zero, zero, policy[2:], zero, 0.1, 0.01).backward()
print("gradient of chosen, rejected, y_s:", policy.grad.tolist())

# %% [markdown]
# ## A game solved
#
# A bandit: three arms with rewards 0, ½ and 2, and a reference that tries the best one once in fifty. The
# pairs are two draws of the current policy; every forty steps it becomes the reference. All expectations
# are exact.

# %%
bandit = next(game for game in play.all_games() if game.key == "bandit")
path = lab.walk("selm", "bandit", (0.3, 0.0))
lab.triangle({"iterative DPO, α = 0": path}, {"reference": bandit.reference}, bandit.corners)
print("shares after 0, 100, 200, 400 steps:")
print(path[[0, 100, 200, 400]])

# %% [markdown]
# It first moves to arm 2, as almost all pairs compare arms 1 and 2, and then finds arm 3. [The games,
# played](../docs/games.md) shows the same with every α.
#
# ## SmolLM2 before and after
#
# The script's own `main`, six steps. The judge is a sentiment lexicon: it prefers the more cheerful answer.

# %%
run = lab.short_run(selm, max_steps=6, num_prompts=48)

# %%
lab.show(run)

# %% [markdown]
# Six steps are few: look at the interval before you believe the win rate.
#
# ## Exercises
#
# Replace each `...`.
#
# **1.** In the gradient above, what is the derivative of the loss with respect to log π(y_s), as a number?

# %%
answer_1 = ...
lab.check(1, answer_1, lambda x: abs(x - 0.1 * 0.01) < 1e-9, "Eq. 4.2 has α and β before log π(y_s).")

# %% [markdown]
# **2.** Write `hinge`, a function of a margin tensor and β that is 1 − β·margin where that is positive and
# else 0: the loss of [CONTRIBUTING](../CONTRIBUTING.md)'s example.

# %%
answer_2 = ...
margins, losses = torch.tensor([0.0, 5.0, 20.0]), torch.tensor([1.0, 0.5, 0.0])
lab.check(2, answer_2, lambda f: torch.equal(f(margins, 0.1), losses), "torch.relu")

# %% [markdown]
# **3.** With α = 1 the walk on the bandit ends elsewhere. Which arm does it settle on, 1, 2 or 3? Use
# `lab.walk`.

# %%
answer_3 = ...
lab.check(3, answer_3, lambda arm: arm == 1 + lab.walk("selm", "bandit", (0.3, 1.0))[-1].argmax().item(),
          'lab.walk("selm", "bandit", (0.3, 1.0))[-1] are the shares of the three arms.')  # fmt: skip

# %% [markdown]
# Expected exactly, α pushes on in the direction that the policy already takes. What it is for, trying what
# has not been seen, needs samples.
