"""Optimisation: AdamW whose small steps survive bfloat16
weights, in full and in less memory; learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from cleanalign import distributed
from cleanalign.phases import give_back_freed_memory

STATES = ("float32", "bfloat16")  # values of --optimizer-states
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names


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
    """What both optimisers share: gradients summed in float32 over micro-batches and processes, their
    clipping.

    Of several processes each keeps gradients, moments and masters of its own part of every weight only. A
    pass's gradients travel to their owners during the backward pass, in an order that is the same everywhere;
    after the update the owners spread the weights.
    """

    def __init__(self, model):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.parts = [distributed.own_part(p) for p in self.weights]
        self.offsets = [distributed.offset(p) for p in self.weights]
        # Kept from step to step: allocated amid activations they would break up the heap.
        self.grads = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.parts]
        # gradients that hold a part of this step's sum, and not the last step's
        self._summed: set[int] = set()
        # of several processes: gradients whose turn has not come; whose turn is next; the one that travels
        self._ready: dict[int, torch.Tensor] = {}
        self._next = len(self.weights) - 1
        self._travelling: tuple[int, Callable] | None = None
        collect = self._collect if distributed.world() == 1 else self._collect_to_send
        self._hooks = [p.register_post_accumulate_grad_hook(collect(i)) for i, p in enumerate(self.weights)]

    def passes(self, shares: list[list[list[int]]]) -> Iterator[list[int]]:
        """This process's micro-batches, one by one, of every process's `shares` (`common.shares`). Use it as
        the
        loop around forward and backward: a process that has fewer than others takes part with no gradient."""
        own = shares[distributed.rank()]
        for i in range(max(map(len, shares))):
            if i < len(own):
                yield own[i]
            if distributed.world() > 1:
                self._send_rest()

    def _collect(self, i: int) -> Callable:
        def hook(weight):
            self._add(i, weight.grad)
            weight.grad = None

        return hook

    def _add(self, i: int, grad: torch.Tensor) -> None:
        if i in self._summed:
            add_in_place(self.grads[i], grad)
        else:
            self.grads[i].copy_(grad)
            self._summed.add(i)

    def _collect_to_send(self, i: int) -> Callable:
        def hook(weight):
            self._ready[i], weight.grad = weight.grad, None
            while self._next in self._ready:  # the last weights' gradients come first
                self._send(self._ready.pop(self._next))

        return hook

    def _send(self, grad: torch.Tensor) -> None:
        """Send the next weight's gradient; take in the one that was sent before, while this one travels."""
        finish = distributed.exchange(grad)
        self._take_in()
        self._travelling = self._next, finish
        self._next -= 1

    def _take_in(self) -> None:
        if self._travelling is not None:
            i, finish = self._travelling
            self._add(i, finish())
            self._travelling = None

    def _send_rest(self) -> None:
        """After a backward pass: weights that got no gradient send zeros, and the next pass begins anew."""
        while self._next >= 0:
            grad = self._ready.pop(self._next, None)
            self._send(torch.zeros_like(self.weights[self._next]) if grad is None else grad)
        self._take_in()
        self._next = len(self.weights) - 1

    def _clip(self, max_grad_norm: float) -> float:
        """Scale the summed gradients down to `max_grad_norm`; returns their norm before. The next backward
        pass begins a new sum."""
        for i in set(range(len(self.grads))) - self._summed:
            self.grads[i].zero_()
        self._summed.clear()
        norm = distributed.norm(self.grads)
        if 0 < max_grad_norm < norm:
            torch._foreach_mul_(self.grads, max_grad_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def write(self, values: list[torch.Tensor]) -> None:
        """Write `values`, of the own parts, into the model's weights, on every process."""
        for part, value in zip(self.parts, values, strict=True):
            if part.data_ptr() != value.data_ptr():
                part.copy_(value)
        distributed.spread(self.weights)

    def read(self, shards: list[dict], name: str, tensors: list[torch.Tensor | None]) -> None:
        """Fill `tensors`, of the own parts, with what any number
        of processes have kept under `name` in their `shards`."""
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                pieces = [(shard[name][i], shard["offsets"][i]) for shard in shards]
                copy_overlap(tensor, self.offsets[i], pieces)

    def release(self) -> None:
        """Detach from the model: hooks gone, gradients free to be collected, and their memory given back."""
        for handle in self._hooks:
            handle.remove()
        self.weights, self.parts, self.grads = [], [], []
        give_back_freed_memory()  # the next optimiser's tensors may not fit where these were


ADD_AT_ONCE = 2**19  # numbers


def add_in_place(total: torch.Tensor, grad: torch.Tensor) -> None:
    """total += grad. On a CPU torch first widens a low-precision `grad`: a vocabulary's copy is over 100 MB,
    faulted in and given back each time. So it is added in parts."""
    large = total.numel() > 2 * ADD_AT_ONCE and total.is_contiguous()
    if total.device.type != "cpu" or not large:
        total += grad
        return
    parts, more = total.view(-1).split(ADD_AT_ONCE), grad.reshape(-1).split(ADD_AT_ONCE)
    for part, of_grad in zip(parts, more, strict=True):
        part += of_grad


def copy_overlap(part: torch.Tensor, start: int, pieces: list[tuple[torch.Tensor, int]]) -> None:
    """Fill a part that begins at `start` of its flat weight from pieces that begin elsewhere in it."""
    flat, end = part.view(-1), start + part.numel()
    for piece, first in pieces:
        low, high = max(start, first), min(end, first + piece.numel())
        if low < high:
            flat[low - start : high - start].copy_(piece.reshape(-1)[low - first : high - first])


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
        self.masters = [p if p.dtype == torch.float32 else p.float() for p in self.parts]
        fused = self.weights[0].device.type in ("cpu", "cuda")
        self.inner = torch.optim.AdamW(
            self.masters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )
        # AdamW would make its moments in the first step: made here, a first step holds what every step holds
        for master in self.masters:
            moments = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
            steps = torch.zeros((), device=master.device if fused else "cpu")
            self.inner.state[master] = {"step": steps, **moments}

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
        for master in self.masters:
            master.grad = None
        self.write(self.masters)
        return norm

    def state_dict(self) -> dict:
        """Masters and moments: all that a resumed run needs to continue as if never stopped. Of several
        processes each gives its part, and where in its weight it begins."""
        return {"masters": self.masters, "inner": self.inner.state_dict(), "offsets": self.offsets}

    @torch.no_grad()
    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Restore `state_dict()`, or those of any number of
        processes, and round the masters into the model's weights."""
        shards = state if isinstance(state, list) else [state]
        self.read(shards, "masters", self.masters)
        self.write(self.masters)
        inner = shards[0]["inner"]
        moments = {i: {"step": kept["step"]} for i, kept in inner["state"].items()}
        for name in MOMENTS if moments else ():
            own = [torch.zeros_like(master) for master in self.masters]
            kept = [
                {"offsets": s["offsets"], name: [m[name] for m in in_order(s["inner"]["state"])]}
                for s in shards
            ]
            self.read(kept, name, own)
            for i, tensor in enumerate(own):
                moments[i][name] = tensor
        self.inner.load_state_dict({"state": moments, "param_groups": inner["param_groups"]})

    def release(self) -> None:
        """Detach from the model: hooks gone, masters and moments free to be collected."""
        self.masters, self.inner = [], None
        super().release()


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
            for p in self.parts
        ]
        self.means = [torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False) for p in self.parts]
        self.squares = [torch.zeros_like(mean) for mean in self.means]

    @property
    def masters(self) -> Iterator[torch.Tensor]:
        """The float32 masters, made one at a time."""
        return (join_bits(part, low) for part, low in zip(self.parts, self.low, strict=True))

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip the accumulated gradient to `max_grad_norm` (0 = no clipping), step, split into weights and
        low bits; returns its norm."""
        norm = self._clip(max_grad_norm)
        self.steps += 1
        generator = torch.Generator(self.weights[0].device).manual_seed(self.steps)
        columns = zip(self.parts, self.low, self.means, self.squares, self.grads, strict=True)
        for weight, first, column in zip(self.weights, self.offsets, columns, strict=True):
            flat = [t if t is None else t.view(-1) for t in column]
            for start in range(
                0, weight.numel(), self.part
            ):  # of the whole weight: each number has its own chance
                size = min(self.part, weight.numel() - start)
                low, high = (min(max(x - first, 0), len(flat[0])) for x in (start, start + size))
                chances = generator
                if high - low < size:
                    noise = torch.empty(size, dtype=torch.int32, device=weight.device)
                    noise.random_(0, 2**16, generator=generator)
                    chances = noise[low + first - start : high + first - start]
                if low < high:
                    own = slice(low, high)
                    self._update(*(t if t is None else t[own] for t in flat), learning_rate, chances)
        distributed.spread(self.weights)
        return norm

    def _update(self, weight, low, mean, square, grad, learning_rate, chances) -> None:
        """AdamW (arXiv 1711.05101, Algorithm 2) on one flat part, in float32."""
        beta1, beta2 = self.betas
        master = join_bits(weight, low).mul_(1 - learning_rate * self.weight_decay)
        new_mean = mean.float().lerp_(grad, 1 - beta1)
        new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = new_square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(self.eps)
        master.addcdiv_(new_mean, spread, value=-learning_rate / (1 - beta1**self.steps))
        mean.copy_(new_mean)
        square.copy_(round_at_random(new_square, chances))
        if low is not None:
            split_bits(master, weight, low)

    def state_dict(self) -> dict:
        """Weights, their low bits, moments and step count: all that a resumed run needs to continue as if
        never stopped. Of several processes each gives its part, and where in its weight it begins."""
        return {
            "weights": self.parts,
            "low": self.low,
            "means": self.means,
            "squares": self.squares,
            "steps": self.steps,
            "offsets": self.offsets,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Restore `state_dict()`, or those of any number of processes, the model's weights included."""
        shards = state if isinstance(state, list) else [state]
        self.read(shards, "weights", self.parts)
        for name in ("low", "means", "squares"):
            self.read(shards, name, getattr(self, name))
        self.steps = shards[0]["steps"]
        distributed.spread(self.weights)

    def release(self) -> None:
        """Detach from the model: hooks gone, low bits and moments free to be collected."""
        self.low, self.means, self.squares = [], [], []
        super().release()


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


def round_at_random(x: torch.Tensor, chances: torch.Generator | torch.Tensor) -> torch.Tensor:
    """Float32 `x` with its low 16 bits cleared, after a uniform number below 2¹⁶ was added to them: a
    bfloat16 value with mean x. `chances` are these numbers, int32, or who draws them."""
    bits = x.view(torch.int32)
    if isinstance(chances, torch.Generator):
        chances = torch.empty_like(bits).random_(0, 2**16, generator=chances)
    return chances.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)


def in_order(state: dict[int, dict]) -> list[dict]:
    """AdamW's state of each weight, in the order of the weights."""
    return [state[i] for i in range(len(state))]


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
