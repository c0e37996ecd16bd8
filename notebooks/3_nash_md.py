# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Nash-MD, self-play and RLHF: one policy gradient
#
# Third of four. [Online-IPO](2_ipo_md.py) compares two answers; a policy gradient needs one, and an
# opponent. Who that is decides where the policy goes.
#
# Read beside it: [nash_md.py](../nash_md.py), [its page](../docs/nash_md.md), and sections 9 to 11 of [the
# theory](../docs/theory.md).

# %%
import lab  # first: it finds the scripts

import nash_md
import play
import theory
import torch

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The loss in ten lines
#
# Each token's log-prob is multiplied by what the answer earned, p − ½, less τ times the log-ratios still to
# come.


# %%
def by_hand(logprobs, ref_logprobs, mask, p, tau):
    total = 0
    for i in range(len(p)):
        for n in range(mask.shape[1]):
            to_come = ((logprobs[i, n:] - ref_logprobs[i, n:]) * mask[i, n:]).sum()
            coefficient = (p[i] - 0.5 - tau * to_come).detach()  # no gradient flows through it
            total = total - mask[i, n] * coefficient * logprobs[i, n]
    return total / len(p)


logprobs, reference = -3 * torch.rand(2, 4, 5, dtype=torch.float64)
logprobs.requires_grad_()
mask = (torch.arange(5) < torch.tensor([[5], [3], [1], [4]])).double()  # four answers of 5, 3, 1 and 4 tokens
p = torch.rand(4, dtype=torch.float64)
mine = torch.autograd.grad(by_hand(logprobs, reference, mask, p, 0.1), logprobs)[0]
scripts = torch.autograd.grad(nash_md.nash_md_loss(logprobs, reference, mask, p, 0.1), logprobs)[0]
assert torch.allclose(mine, scripts)
print(scripts)

# %% [markdown]
# The value of the loss means nothing, only its gradient does: so the gradients are compared. Padding has
# none.
#
# ## A game solved
#
# Rock-paper-scissors three times: against itself, against a mixture with the reference, and RLHF with the
# scalar reward fitted to the same judge.

# %%
game = next(game for game in play.all_games() if game.key == "rps")
nash = theory.regularised_nash(game.preference, game.reference, 0.1)
paths = {
    "self-play": lab.walk("nash", "rps", (0.1, 0.0), start=2),
    "mixture, β = .5": lab.walk("nash", "rps", (0.1, 0.5), start=2),
    "RLHF": lab.walk("rlhf", "rps", (0.1,), start=2),
}
lab.triangle(paths, {"Nash": nash, "reference": game.reference})
for name, path in paths.items():
    excess = play.exploitability(game.preference, path[-1]).item()
    shares = [round(share, 3) for share in path[-1].tolist()]
    print(f"{name:16} ends at {shares}, exploitability {excess:.3f}")
print("the reward that RLHF was given:", game.reward().tolist())

# %% [markdown]
# RLHF does what it is told: its scalar puts paper first and scissors last, so scissors die out. But scissors
# are what beats paper.
#
# ## SmolLM2 before and after

# %%
run = lab.short_run(nash_md, max_steps=4, num_prompts=48)

# %%
lab.show(run)

# %% [markdown]
# ## Exercises
#
# **1.** The KL is reward-to-go. An answer of three tokens has log-ratios .5, −.2 and .1. With p = .8 and τ
# = .1, what is the coefficient of its second token?

# %%
answer_1 = ...
lab.check(
    1, answer_1, lambda x: abs(x - (0.8 - 0.5 - 0.1 * (-0.2 + 0.1))) < 1e-6, "Tokens two and three count."
)

# %% [markdown]
# **2.** At which β does Nash-MD learn the best response to the reference?

# %%
answer_2 = ...
lab.check(2, answer_2, lambda beta: beta == 1, "Its opponent is π^(1−β) μ^β.")

# %% [markdown]
# **3.** Give a policy over rock, scissors, paper that no policy beats if KL costs nothing (a tensor of
# three shares).

# %%
answer_3 = ...
lab.check(3, answer_3, lambda policy: play.exploitability(game.preference, policy).item() < 1e-3,
          "Its exploitability is 0: whatever one plays against it, nobody gains.")  # fmt: skip
