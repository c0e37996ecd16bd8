"""SELM's loss against an independent formula, finite differences, and its two limits (DPO, XPO)."""

import math

import pytest
import torch

from selm import rank, selm_loss

NAMES = (
    "policy_chosen",
    "policy_rejected",
    "reference_chosen",
    "reference_rejected",
    "policy_self",
    "reference_self",
)


def batch(size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: -30 * torch.rand(size, generator=generator, dtype=torch.float64) for name in NAMES}


def by_hand(x, beta, alpha):
    """Eq. 4.2 with Python floats, one pair at a time."""
    total = 0.0
    for i in range(len(x["policy_chosen"])):
        pc, pr, rc, rr, ps, rs = (float(x[name][i]) for name in NAMES)
        total += math.log(1 + math.exp(-beta * ((pc - rc) - (pr - rr)))) + alpha * beta * (ps - rs)
    return total / len(x["policy_chosen"])


@pytest.mark.parametrize("beta,alpha", [(0.1, 0.0), (0.1, 0.001), (0.01, 1.0), (1.0, 0.3)])
def test_against_the_formula(beta, alpha):
    x = batch()
    assert selm_loss(**x, beta=beta, alpha=alpha).item() == pytest.approx(by_hand(x, beta, alpha), rel=1e-12)


def test_gradient_against_finite_differences():
    x = {name: value.requires_grad_(name.startswith("policy")) for name, value in batch().items()}
    assert torch.autograd.gradcheck(
        lambda *values: selm_loss(*values, beta=0.3, alpha=0.2), tuple(x[name] for name in NAMES)
    )


def test_exploration_lowers_what_the_reference_says():
    x = batch()
    x["policy_self"].requires_grad_()
    selm_loss(**x, beta=0.1, alpha=0.5).backward()
    assert (x["policy_self"].grad > 0).all()  # descending the loss lowers log π(y_s)
    assert x["policy_self"].grad.sum().item() == pytest.approx(0.1 * 0.5)


def test_alpha_zero_is_dpo_and_zero_margin_is_log_two():
    x = batch()
    dpo = -torch.nn.functional.logsigmoid(
        0.1 * (x["policy_chosen"] - x["policy_rejected"] - x["reference_chosen"] + x["reference_rejected"])
    ).mean()
    assert selm_loss(**x, beta=0.1, alpha=0.0).item() == pytest.approx(dpo.item(), rel=1e-12)
    x["policy_chosen"], x["policy_rejected"] = x["reference_chosen"], x["reference_rejected"]
    assert selm_loss(**x, beta=0.1, alpha=0.0).item() == pytest.approx(math.log(2), rel=1e-12)


def test_xpo_through_selm_loss():
    """XPO's + α Σ log π(y_s), no β and no reference: alpha / beta, and a reference_self of 0."""
    x = batch() | {"reference_self": torch.zeros(5, dtype=torch.float64)}
    ours = selm_loss(**x, beta=0.1, alpha=0.7 / 0.1)
    assert ours.item() == pytest.approx(
        (selm_loss(**x, beta=0.1, alpha=0.0) + 0.7 * x["policy_self"].mean()).item(), rel=1e-12
    )


def test_rank_by_mean_preference():
    p = torch.tensor([[0.5, 0.9, 0.4], [0.1, 0.5, 0.2], [0.6, 0.8, 0.5]])
    assert rank(p) == (2, 1, False)
    assert rank(torch.full((3, 3), 0.5))[2]
    cycle = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    assert rank(cycle)[2]  # none is better on average: no best and worst to tell apart
