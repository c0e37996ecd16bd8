# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Alignment from demonstrations
#
# Last of four. There is no judge: only answers that somebody gave. Which distance between the policy and
# the demonstrator is made small decides what is learned.
#
# Read beside it: [afd.py](../afd.py), [its page](../docs/afd.md), then [spin.py](../spin.py), which plays
# demonstrations against its own answers.

# %%
import lab  # first: it finds the scripts

import afd
import matplotlib.pyplot as plt
import torch

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The loss in ten lines
#
# A discriminator learns to tell demonstrations (positive) from the policy's answers (negative). At its
# optimum its score is the log density ratio, and that is the reward.


# %%
def by_hand(positive, negative):
    real = torch.log(torch.sigmoid(positive)).mean()
    own = torch.log(1 - torch.sigmoid(negative)).mean()
    return -0.5 * (real + own)


scores = torch.randn(2, 16, dtype=torch.float64)
assert torch.allclose(by_hand(*scores), afd.discriminator_loss(*scores))

demonstrator = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
policy = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
score = torch.zeros(3, dtype=torch.float64, requires_grad=True)
optimiser = torch.optim.LBFGS([score], max_iter=200, line_search_fn="strong_wolfe")


def expected_loss():  # every answer of either side, weighted by how often it is given
    optimiser.zero_grad()
    each = torch.stack(
        [afd.discriminator_loss(score[i][None], score[j][None]) for i in range(3) for j in range(3)]
    )
    loss = (torch.outer(demonstrator, policy).flatten() * each).sum()
    loss.backward()
    return loss


optimiser.step(expected_loss)
print("score    ", score.detach())
print("log ratio", (demonstrator / policy).log())
assert torch.allclose(score.detach(), (demonstrator / policy).log(), atol=1e-3)

# %% [markdown]
# ## A game solved
#
# Forty-one answers on a line. The demonstrator gives those on the left and those on the right; the policy
# is one bump, so it cannot do both. The forward KL is fine-tuning on the demonstrations; the reverse KL is
# a policy gradient (`afd.policy_gradient_loss`) on the discriminator's score, here the exact log-ratio.

# %%
x = torch.linspace(-2, 2, 41, dtype=torch.float64)
demonstrator = torch.softmax(torch.maximum(-((x + 1) ** 2), -((x - 1) ** 2) - 0.1) / 0.08, -1)


def bump(parameters):  # log-probs of a policy with a mean and a width
    return torch.log_softmax(-((x - parameters[0]) ** 2) / (2 * torch.exp(2 * parameters[1])), -1)


def learn(objective, steps=400):
    parameters = torch.tensor([0.1, 0.0], dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        log_policy = bump(parameters)
        if objective == "forward":
            loss = -(demonstrator * log_policy).sum()  # fine-tuning
        else:
            reward = (demonstrator.log() - log_policy).detach()  # the discriminator's score
            tokens, ones = log_policy[:, None], torch.ones(41, 1, dtype=torch.float64)
            each = torch.func.vmap(
                lambda t, m, r: afd.policy_gradient_loss(t[None], t[None], m[None], r[None], 0.0)
            )
            loss = (
                log_policy.exp().detach() * each(tokens, ones, reward - (log_policy.exp() * reward).sum())
            ).sum()
        gradient = torch.autograd.grad(loss, parameters)[0]
        parameters = (parameters - 0.05 * gradient).detach().requires_grad_()
    return bump(parameters).exp().detach()


forward, reverse = learn("forward"), learn("reverse")
plt.figure(figsize=(6, 3))
for values, name in (
    (demonstrator, "demonstrator"),
    (forward, "forward KL: fine-tuning"),
    (reverse, "reverse KL"),
):
    plt.plot(x, values, label=name)
plt.legend(frameon=False)
plt.show()
between = (x.abs() < 0.3).double()
print(
    "what is said between the two bumps:",
    [round((d @ between).item(), 4) for d in (demonstrator, forward, reverse)],
)

# %% [markdown]
# The forward KL covers both and says what nobody said between them; the reverse KL takes one side.
#
# ## SmolLM2 before and after
#
# The script's `main` with `--objective forward-kl`: fine-tuning on cheerful human replies. The judge only
# selects the demonstrations and scores the result.

# %%
run = lab.short_run(afd, demonstrations=True, objective="forward-kl", max_steps=8, num_prompts=128)

# %%
lab.show(run)

# %% [markdown]
# The whole script goes on from here: a reward from the demonstrations, Best-of-N, distillation. `python
# afd.py`, 11 minutes on two cores.
#
# ## Exercises
#
# **1.** An answer is given three times as often by the demonstrator as by the policy. What reward does it
# get?

# %%
answer_1 = ...
lab.check(
    1, answer_1, lambda r: abs(r - 1.0986) < 1e-3, "The discriminator's logit is the log density ratio."
)

# %% [markdown]
# **2.** Which objective, "forward" or "reverse", puts less mass between the two bumps?

# %%
answer_2 = ...
lab.check(2, answer_2, lambda name: name == "reverse", "See the last printed line of the game.")

# %% [markdown]
# **3.** For JS the reward is −log(1 − D). Write it as a function of the logit tensor
# (`afd.adversarial_reward` has it).

# %%
answer_3 = ...
lab.check(3, answer_3, lambda f: torch.allclose(f(scores[0]), afd.adversarial_reward(scores[0], "js")),
          "−log(1 − σ(x)) is the softplus.")  # fmt: skip
