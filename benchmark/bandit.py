"""SELM, XPO and iterative DPO on a bandit whose best arm lies nearly outside the reference's support.

    python benchmark/claims.py run bandit    # some minutes on one thread; draws results/claims_bandit.png

Arms and labels are drawn, 50 seeds a value of α. The loss is `selm.selm_loss`, called on every pair.

Shapes: K arms, R rows walked at once (each value of α with each seed), N pairs of a row.
"""

from __future__ import annotations

import math

import record
import torch

import selm

# nine arms that the reference tries alike, and a far better tenth, once in a thousand.
REWARD = torch.cat(
    [torch.linspace(0, 1, 9, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)]
)  # (K,)
REFERENCE = torch.cat(
    [torch.full((9,), 0.111, dtype=torch.float64), torch.tensor([0.001], dtype=torch.float64)]
)  # (K,)
ARMS, BEST = len(REWARD), 9
ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
SEEDS, ROUNDS, PAIRS, STEPS = 50, 60, 8, 20
TIE = 0.1  # β of all ways
GREATEST = 3.0  # of the theory's class of implicit rewards, [0, 3]: the true ones lie inside


def bandit() -> dict:
    """Regret, the best arm's reward minus the policy's mean, in three ways, for every α, over 50 seeds:

    - iterative: selm.py's. Two answers of π_t a pair, the judge's certain verdict, ties dropped, y_s both;
      the reference is renewed each round, pairs are forgotten.
    - xpo: selm.py --exploration xpo's. One answer of π_t, one of the fixed reference, which is y_s.
    - optimistic: the theory's (Algorithm 2 and XPO's). Such pairs, labels drawn from Bradley-Terry, all data
      kept, and each round a minimiser over a bounded class.

    A seed draws the same uniform numbers for every α and way, so differences between α are paired.
    """
    uniform = torch.stack([
        torch.rand(ROUNDS, 3, PAIRS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(SEEDS)
    ])  # fmt: skip
    uniform = uniform.repeat(len(ALPHAS), 1, 1, 1)  # (R, rounds, 3, pairs), α slowest
    alpha = torch.tensor(ALPHAS, dtype=torch.float64).repeat_interleave(SEEDS)  # (R,)
    out = {"arms": ARMS, "reference_of_best": REFERENCE[BEST].item(), "beta": TIE, "seeds": SEEDS}
    out |= {"rounds": ROUNDS, "pairs_a_round": PAIRS, "alphas": list(ALPHAS), "ways": {}}
    for way, walk in (("iterative", practice), ("xpo", practice), ("optimistic", optimistic)):
        policies = walk(way, alpha, uniform)  # (rounds, R, K)
        regret = (REWARD.max() - policies @ REWARD).T.view(len(ALPHAS), SEEDS, ROUNDS)
        found = (policies[-1, :, BEST] > 0.5).double().view(len(ALPHAS), SEEDS)
        late, whole = regret[..., -10:].mean(-1), regret.mean(-1)  # (α, seeds)
        out["ways"][way] = {
            f"{value:g}": {
                "late": mean_and_error(late[i]),
                "late_minus_dpo": mean_and_error(late[i] - late[0]),
                "whole_minus_dpo": mean_and_error(whole[i] - whole[0]),
                "found": round(found[i].mean().item(), 4),
                "regret": [round(x, 4) for x in regret[i].mean(0).tolist()],
                "error": [round(x, 4) for x in (regret[i].std(0) / math.sqrt(SEEDS)).tolist()],
            }
            for i, value in enumerate(ALPHAS)
        }
    plot_bandit(out)
    return out


def mean_and_error(values: torch.Tensor) -> list[float]:
    """Mean and standard error of (S,) values, rounded."""
    return [round(values.mean().item(), 5), round(values.std().item() / math.sqrt(len(values)), 5)]


def each(columns: tuple, alpha: torch.Tensor) -> torch.Tensor:
    """(R, N) `selm.selm_loss` of every pair of every row, columns (R, N) each, alpha (R, N)."""

    def one(*tensors):
        return selm.selm_loss(*(x[None] for x in tensors[:6]), TIE, tensors[6])

    return torch.func.vmap(torch.func.vmap(one))(*columns, alpha)


def draw(policy: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(R, N) arms drawn from (R, K) by inverse CDF."""
    return torch.searchsorted(policy.cumsum(-1).contiguous(), uniform.contiguous()).clamp(max=ARMS - 1)


def practice(way: str, alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rounds, R, K) the policies of the script's two loops: STEPS steps of gradient descent on a round's own
    pairs, then they are forgotten."""
    fixed = REFERENCE.log().expand(len(alpha), ARMS)
    logits, policies = fixed.clone(), []
    scale = alpha[:, None] / (TIE if way == "xpo" else 1.0)  # XPO's α stands without β
    for t in range(ROUNDS):
        now = torch.log_softmax(logits, -1)
        policies.append(now.exp())
        reference = fixed if way == "xpo" else now
        first, second = draw(now.exp(), uniform[:, t, 0]), draw(reference.exp(), uniform[:, t, 1])  # (R, N)
        ahead = REWARD[first] > REWARD[second]
        chosen, rejected = torch.where(ahead, first, second), torch.where(ahead, second, first)
        kept = (REWARD[first] != REWARD[second]).double()
        weights = kept / kept.sum(-1, keepdim=True).clamp(min=1)
        old = [reference.gather(1, side) for side in (chosen, rejected)]
        for _ in range(STEPS):
            variable = logits.detach().requires_grad_()
            new = torch.log_softmax(variable, -1)
            pair = [new.gather(1, side) for side in (chosen, rejected)]
            if way == "xpo":
                own, own_old = new.gather(1, second), torch.zeros_like(pair[0])
            else:
                own, own_old = (pair[0] + pair[1]) / 2, (old[0] + old[1]) / 2
            losses = each((*pair, *old, own, own_old), scale.expand_as(own))
            gradient = torch.autograd.grad((weights * losses).sum(), variable)[0]
            logits = logits - gradient / (2 * TIE)
    return torch.stack(policies)


def optimistic(way: str, alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rounds, R, K) the policies of the theory's loop, π ∝ π_ref exp(r̂/β) with r̂ in [0, GREATEST].

    The objective is not convex in r̂, so each round descends from where it stood and from there with each arm
    in turn at GREATEST, and takes the least. Only differences of r̂ count: before a round the least of the
    arms with data is moved to 0. An arm without data stands at their mean, where descent on DPO alone would
    leave it. Pairs of one kind (chosen, rejected, which of them is y_s) have one loss, so they are counted:
    2 K² kinds.
    """
    rows, starts = len(alpha), ARMS + 1
    chosen, rejected, which = torch.cartesian_prod(torch.arange(ARMS), torch.arange(ARMS), torch.arange(2)).T
    own = torch.where(which == 0, chosen, rejected)
    compared = torch.nn.functional.one_hot(chosen, ARMS) != torch.nn.functional.one_hot(rejected, ARMS)
    counts = torch.zeros(rows, len(chosen), dtype=torch.float64)
    reference = REFERENCE.log()
    old = [reference[side].expand(rows * starts, -1) for side in (chosen, rejected, own)]
    scale = alpha[:, None].repeat_interleave(starts, 0).expand(-1, len(chosen))
    step = 1 / (0.5 + scale[:, :1] / (2 * TIE))  # one over a bound of the curvature

    def objective(implicit):  # (R · starts, K) to (R · starts,)
        new = torch.log_softmax(reference + implicit / TIE, -1)
        columns = [new[:, side] for side in (chosen, rejected, own)]
        losses = each((*columns[:2], *old[:2], columns[2], old[2]), scale)
        return (weights * losses).sum(-1)

    implicit, policies = torch.zeros(rows, ARMS, dtype=torch.float64), []
    for t in range(ROUNDS):
        policy = torch.softmax(reference + implicit / TIE, -1)
        policies.append(policy)
        first = draw(policy, uniform[:, t, 0])
        second = draw(REFERENCE.expand(rows, ARMS), uniform[:, t, 1])
        ahead = uniform[:, t, 2] < torch.sigmoid(REWARD[first] - REWARD[second])
        best, worst = torch.where(ahead, first, second), torch.where(ahead, second, first)
        kind = (
            2 * (ARMS * best + worst) + ahead.long()
        )  # y_s is the second: rejected where the first is ahead
        counts.scatter_add_(1, kind, torch.ones_like(kind, dtype=torch.float64))
        weights = (counts / counts.sum(-1, keepdim=True)).repeat_interleave(starts, 0)
        seen = counts @ compared.double() > 0  # (R, K)
        level = torch.where(seen, implicit, math.inf).amin(-1, keepdim=True)
        mean = (seen * (implicit - level)).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
        tried = torch.where(seen, implicit - level, mean)[:, None].repeat(1, starts, 1)
        for arm in range(ARMS):
            tried[:, 1 + arm, arm] = GREATEST
        tried = tried.flatten(0, 1)
        for _ in range(2 * STEPS):
            variable = tried.detach().requires_grad_()
            gradient = torch.autograd.grad(objective(variable).sum(), variable)[0]
            tried = (tried - step * gradient).clamp(0, GREATEST)
        value = objective(tried).detach().view(rows, starts)
        value[:, 0] -= 1e-9  # a tie is no reason to leave: at α = 0 an arm without data changes nothing
        implicit = tried.view(rows, starts, ARMS)[torch.arange(rows), value.argmin(-1)]
    return torch.stack(policies)


def plot_bandit(result: dict) -> None:
    """results/claims_bandit.png: regret over rounds, a panel a way, a line an α, with one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "iterative": "selm.py: reference renewed, pairs forgotten",
        "xpo": "selm.py --exploration xpo: fixed reference",
        "optimistic": "the theory: all data, minimised each round",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, (way, curves) in zip(axes, result["ways"].items(), strict=True):
        for i, (alpha, curve) in enumerate(curves.items()):
            mean, error = torch.tensor(curve["regret"]), torch.tensor(curve["error"])
            colour = "black" if alpha == "0" else plt.cm.viridis(i / len(curves))
            label = "α = 0, iterative or online DPO" if alpha == "0" else f"α = {alpha}"
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=1.6, label=label)
            axis.fill_between(range(1, len(mean) + 1), mean - error, mean + error, color=colour, alpha=0.15)
        axis.set_title(titles[way], fontsize=10)
        axis.set_xlabel(f"round of {result['pairs_a_round']} pairs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"regret, mean of {result['seeds']} seeds")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(record.RESULTS / "claims_bandit.png", dpi=110)
