"""Mass-covering against mode-seeking: what each objective of afd.py makes of demonstrations with two modes.
One figure, no sampling.

    python docs/afd_divergences.py            # writes docs/figures/afd_divergences.png, seconds on one core

The demonstrator is a mixture of two Gaussians on a grid, the policy one Gaussian with a free mean and width.
Forward KL is the SFT loss; reverse KL and JS ascend `afd.policy_gradient_loss` on the reward of the *optimal*
discriminator, log d_demo − log d_π, every expectation a sum over the grid.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import afd

GRID = torch.linspace(-6, 6, 121, dtype=torch.float64)


def gaussian(mean, std) -> torch.Tensor:
    """(121,) log-probs of a Gaussian on the grid."""
    return (-0.5 * ((GRID - mean) / std) ** 2).log_softmax(-1)


def demonstrator() -> torch.Tensor:
    """(121,) probabilities: .6 of the demonstrations lie around −2, .4 around 2."""
    return 0.6 * gaussian(-2.0, 0.5).exp() + 0.4 * gaussian(2.0, 0.5).exp()


def fit(objective: str, mean: float = -0.5, std: float = 1.0, steps: int = 1500) -> tuple[float, float]:
    """Mean and width of the Gaussian policy that `objective` (forward-kl, reverse-kl, js) ends at."""
    demo = demonstrator()
    parameters = [
        torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for value in (mean, torch.tensor(std).log().item())
    ]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    one = torch.ones(len(GRID), 1)
    for _ in range(steps):
        optimizer.zero_grad()
        logprobs = gaussian(parameters[0], parameters[1].exp())
        if objective == "forward-kl":
            loss = -(demo * logprobs).sum()
        else:
            logit = (demo.log() - logprobs).detach()  # of the optimal discriminator
            reward = F.softplus(logit) if objective == "js" else logit
            rows = logprobs[:, None]  # (121, 1): one-token replies
            # the loss is a mean over replies: weigh each by its probability
            weights = logprobs.detach().exp() * len(GRID)
            loss = afd.policy_gradient_loss(rows, rows.detach(), one, reward * weights, 0.0)
        loss.backward()
        optimizer.step()
    return parameters[0].item(), parameters[1].exp().item()


def js_divergence(policy: torch.Tensor) -> float:
    """Jensen-Shannon divergence of a (121,) policy from the demonstrator, nats."""
    demo, middle = demonstrator(), (policy + demonstrator()) / 2
    return (
        0.5 * (policy * (policy / middle).log()).sum() + 0.5 * (demo * (demo / middle).log()).sum()
    ).item()


def main() -> None:
    """Fit the three and draw them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    axis.fill_between(GRID, demonstrator(), color="0.85", label="demonstrations")
    # JS has an optimum of either kind and keeps the one it starts near
    for objective, start, style in (
        ("forward-kl", -0.5, "-"),
        ("js", -0.5, "--"),
        ("js", -1.5, ":"),
        ("reverse-kl", -0.5, "-."),
    ):
        mean, std = fit(objective, mean=start, std=1.0 if start == -0.5 else 0.7)
        far = js_divergence(gaussian(mean, std).exp())
        label = f"{objective} from {start}: mean {mean:.2f}, width {std:.2f}, JS {far:.3f}"
        print(label)
        axis.plot(GRID, gaussian(mean, std).exp(), style, linewidth=1.8, label=label)
    axis.set_yticks([])
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "figures" / "afd_divergences.png", dpi=110)


if __name__ == "__main__":
    main()
