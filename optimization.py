"""Optimisation: AdamW on float32 master weights; learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


class MasterAdamW:
    """AdamW on float32 master weights, with gradients accumulated in float32.

    A step of 5e-7 is below half of bfloat16's spacing for every weight above 1e-4 or so, and rounds to nothing. The
    masters keep it; the weights the model computes with are the masters rounded. Float32 weights are their own
    masters. Each backward pass adds into `grads`, and the low-precision gradient is freed at once.

    Memory beyond the model's own weights, per weight: 4 (master, if bfloat16) + 8 (moments) + 4 (gradient) bytes.
    """

    def __init__(self, model, learning_rate: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in self.weights]
        self.grads = [torch.zeros_like(master) for master in self.masters]  # kept: allocated amid activations they would break up the heap
        fused = self.weights[0].device.type in ("cpu", "cuda")
        self.inner = torch.optim.AdamW(self.masters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        self._hooks = [p.register_post_accumulate_grad_hook(self._collect(i)) for i, p in enumerate(self.weights)]

    def _collect(self, i: int) -> Callable:
        def hook(weight):
            self.grads[i] += weight.grad
            weight.grad = None

        return hook

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip the accumulated gradient to `max_grad_norm` (0 = no clipping), step, round into the weights; returns its norm."""
        norm = torch.nn.utils.get_total_norm(self.grads)
        if max_grad_norm > 0:
            torch._foreach_mul_(self.grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        torch._foreach_zero_(self.grads)
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master)
        return float(norm)

    def state_dict(self) -> dict:
        """Masters and moments: all that a resumed run needs to continue as if never stopped."""
        return {"masters": self.masters, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict()` and round the masters into the model's weights."""
        with torch.no_grad():
            for weight, master, saved in zip(self.weights, self.masters, state["masters"], strict=True):
                master.copy_(saved)
                weight.copy_(saved)
        self.inner.load_state_dict(state["inner"])

    def release(self) -> None:
        """Detach from the model: hooks gone, masters and moments free to be collected."""
        for handle in self._hooks:
            handle.remove()
        self.masters, self.grads, self.inner = [], [], None


def learning_rate_at(step: int, steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of optimiser step `step` in 0..steps−1: linear warm-up over `warmup_ratio` of the steps, then `cosine`, `linear` or `constant`."""
    warmup = max(1, math.ceil(warmup_ratio * steps)) if warmup_ratio > 0 else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
