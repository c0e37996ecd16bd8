"""Optimisation: AdamW whose small steps survive bfloat16
weights, in full and in less memory; learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

STATES = ("float32", "bfloat16")  # values of --optimizer-states


def make_optimiser(model, states: str, weight_decay: float) -> MasterAdamW | SplitAdamW:
    """AdamW over the trainable weights of `model`, its states kept in `states`: float32 (`MasterAdamW`) or
    bfloat16 (`SplitAdamW`)."""
    return {"float32": MasterAdamW, "bfloat16": SplitAdamW}[states](model, weight_decay=weight_decay)


def bytes_per_weight(states: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes for each trained weight beyond the weight itself, which is in `dtype`, by what they hold."""
    low_precision = dtype != torch.float32
    if states == "float32":
        return {"master": 4 * low_precision, "moments": 8, "gradient": 4}
    return {"low bits": 2 * low_precision, "moments": 4, "gradient": 4}


class _AdamW:
    """What both optimisers share: gradients summed in float32 over micro-batches, and their clipping."""

    def __init__(self, model):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        # Kept from step to step: allocated amid activations they would break up the heap.
        self.grads = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.weights]
        # gradients that hold a part of this step's sum, and not the last step's
        self._summed: set[int] = set()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._collect(i)) for i, p in enumerate(self.weights)
        ]

    def _collect(self, i: int) -> Callable:
        def hook(weight):
            if i in self._summed:
                self.grads[i] += weight.grad
            else:
                self.grads[i].copy_(weight.grad)
                self._summed.add(i)
            weight.grad = None

        return hook

    def _clip(self, max_grad_norm: float) -> float:
        """Scale the summed gradients down to `max_grad_norm`; returns their norm before. The next backward
        pass begins a new sum."""
        for i in set(range(len(self.grads))) - self._summed:
            self.grads[i].zero_()
        self._summed.clear()
        norm = float(torch.nn.utils.get_total_norm(self.grads))
        if 0 < max_grad_norm < norm:
            torch._foreach_mul_(self.grads, max_grad_norm / (norm + 1e-6))
        return norm

    def release(self) -> None:
        """Detach from the model: hooks gone, gradients free to be collected."""
        for handle in self._hooks:
            handle.remove()
        self.weights, self.grads = [], []


class MasterAdamW(_AdamW):
    """AdamW on float32 master weights, with gradients accumulated in float32.

    A step of 5e-7 is below half of bfloat16's spacing for every weight above 1e-4 or so, and rounds to
    nothing. The masters keep it; the weights the model computes with are the masters rounded. Float32 weights
    are their own masters. Each backward pass adds into `grads`, and the low-precision gradient is freed at
    once.

    Memory beyond the model's own weights, per weight: 4 (master, if bfloat16) + 8 (moments) + 4 (gradient)
    bytes.
    """

    def __init__(
        self,
        model,
        learning_rate: float = 0.0,
        betas=(0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(model)
        self.masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in self.weights]
        fused = self.weights[0].device.type in ("cpu", "cuda")
        self.inner = torch.optim.AdamW(
            self.masters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip the accumulated gradient to `max_grad_norm` (0 = no clipping), step, round into the weights;
        returns its norm."""
        norm = self._clip(max_grad_norm)
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master)
        return norm

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
        super().release()
        self.masters, self.inner = [], None


class SplitAdamW(_AdamW):
    """AdamW in less memory: exact float32 masters at 2 bytes, moments in bfloat16 at 4. Interface as
    `MasterAdamW`.

    A float32 number is a bfloat16 number and 16 more bits. So the master needs no copy of its own: it is the
    model's weight together with its 16 low bits, kept as an int16, and joined for the update only. Nothing of
    it is lost, however small the step.

    The first moment is rounded to nearest: it moves by a tenth of the gradient at each step. The second moves
    by a thousandth of itself, less than bfloat16 can show, and would stand still; it is rounded up or down at
    random, with the chances that make the mean exact. Each step's random numbers are a function of the step,
    so a resumed run draws the same.

    Memory beyond the model's own weights, per weight: 2 (low bits, if bfloat16) + 4 (moments) + 4 (gradient)
    bytes.
    """

    part = 2**22  # weights updated at once, so that the float32 working copies stay small

    def __init__(self, model, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(model)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = 0
        self.low = [
            torch.zeros_like(p, dtype=torch.int16, requires_grad=False) if p.dtype == torch.bfloat16 else None
            for p in self.weights
        ]
        self.means = [torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False) for p in self.weights]
        self.squares = [torch.zeros_like(mean) for mean in self.means]

    @property
    def masters(self) -> Iterator[torch.Tensor]:
        """The float32 masters, made one at a time."""
        return (join_bits(weight.detach(), low) for weight, low in zip(self.weights, self.low, strict=True))

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip the accumulated gradient to `max_grad_norm` (0 = no clipping), step, split into weights and
        low bits; returns its norm."""
        norm = self._clip(max_grad_norm)
        self.steps += 1
        generator = torch.Generator(self.weights[0].device).manual_seed(self.steps)
        for weight, low, mean, square, grad in zip(
            self.weights, self.low, self.means, self.squares, self.grads, strict=True
        ):
            flat = [t if t is None else t.view(-1) for t in (weight.detach(), low, mean, square, grad)]
            for start in range(0, weight.numel(), self.part):
                part = slice(start, start + self.part)
                self._update(*(t if t is None else t[part] for t in flat), learning_rate, generator)
        return norm

    def _update(self, weight, low, mean, square, grad, learning_rate, generator) -> None:
        """AdamW (arXiv 1711.05101, Algorithm 2) on one flat part, in float32."""
        beta1, beta2 = self.betas
        master = join_bits(weight, low).mul_(1 - learning_rate * self.weight_decay)
        new_mean = mean.float().lerp_(grad, 1 - beta1)
        new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = new_square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(self.eps)
        master.addcdiv_(new_mean, spread, value=-learning_rate / (1 - beta1**self.steps))
        mean.copy_(new_mean)
        square.copy_(round_at_random(new_square, generator))
        if low is not None:
            split_bits(master, weight, low)

    def state_dict(self) -> dict:
        """Weights, their low bits, moments and step count: all that a resumed run needs to continue as if
        never stopped."""
        weights = [weight.detach() for weight in self.weights]
        return {
            "weights": weights,
            "low": self.low,
            "means": self.means,
            "squares": self.squares,
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict()`, the model's weights included."""
        for name in ("weights", "low", "means", "squares"):
            for ours, saved in zip(getattr(self, name), state[name], strict=True):
                if ours is not None:
                    ours.copy_(saved)
        self.steps = state["steps"]

    def release(self) -> None:
        """Detach from the model: hooks gone, low bits and moments free to be collected."""
        super().release()
        self.low, self.means, self.squares = [], [], []


def join_bits(weight: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """The float32 tensor that `split_bits` split; without `low`, `weight` is float32 and its own master."""
    if low is None:
        return weight
    return (weight.view(torch.int16).int().bitwise_left_shift_(16) + low).view(torch.float32)


def split_bits(master: torch.Tensor, weight: torch.Tensor, low: torch.Tensor) -> None:
    """Write float32 `master` as its nearest bfloat16 into `weight` and what is missing, in units of the last
    float32 bit, into int16 `low`.

    Halfway cases go away from zero: then the difference lies in −2¹⁵ … 2¹⁵ − 1, and fits. (To even, +2¹⁵
        would occur.)
    """
    bits = master.view(torch.int32)
    high = (bits + 2**15).bitwise_right_shift_(16)
    low.copy_(bits - (high << 16))
    weight.view(torch.int16).copy_(high)


def round_at_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Float32 `x` with its low 16 bits cleared, after a uniform number below 2¹⁶ was added to them: a
    bfloat16 value with mean x."""
    bits = x.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 2**16, generator=generator)
    return noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)


def learning_rate_at(step: int, steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Learning rate of optimiser step `step` in 0..steps−1: linear warm-up over `warmup_ratio` of the steps,
    then `cosine`, `linear` or `constant`."""
    warmup = max(1, math.ceil(warmup_ratio * steps)) if warmup_ratio > 0 else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (
        peak * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    )
