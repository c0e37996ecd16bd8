"""The optimisers: small steps survive bfloat16 weights, in full and in less memory; resume is bit-exact; the
bytes are what is said."""

import copy

import pytest
import tiny
import torch

import common
from cleanalign import optimization

STEPS, RATE = 200, 5e-7


def batch_at(step: int) -> common.Batch:
    """Another tiny batch at every step, the same for every optimiser."""
    tokens = torch.randint(4, 24, (2, 2, 4), generator=torch.Generator().manual_seed(step)).tolist()
    return common.collate([[5, 6, 7], [8, 9]], tokens, "cpu")


def fresh(dtype):
    return tiny.model(24, seed=0).to(dtype).requires_grad_(True)


def train(model, optimiser, steps=range(STEPS), rate=RATE):
    for step in steps:
        common.completion_logprobs(model, batch_at(step)).sum().backward()
        optimiser.step(rate, 1.0)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().float().flatten() for t in tensors])


def displacement(dtype, kind) -> torch.Tensor:
    """How far the (master) weights went in `STEPS` steps of `RATE`."""
    model = fresh(dtype)
    start = flat(model.parameters())
    optimiser = kind(model)
    train(model, optimiser)
    return flat(optimiser.masters) - start


class PlainAdamW:
    """What one gets without masters: torch's AdamW on the bfloat16 weights themselves."""

    def __init__(self, model):
        self.masters = list(model.parameters())
        self.inner = torch.optim.AdamW(self.masters, lr=RATE, weight_decay=0.0)

    def step(self, rate, max_grad_norm):
        torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        self.inner.step()
        self.inner.zero_grad()


def test_small_steps_survive_bfloat16_and_plain_bfloat16_weights_stand_still():
    """Displacement after 200 steps of 5e-7, against float32 masters on the same bfloat16 model: the split
    optimiser follows, plain weights do not."""
    exact = displacement(torch.bfloat16, optimization.MasterAdamW)
    assert exact.abs().median() > 1e-5  # the masters went somewhere
    assert torch.cosine_similarity(exact, displacement(torch.float32, optimization.MasterAdamW), dim=0) > 0.9
    split = displacement(torch.bfloat16, optimization.SplitAdamW)
    assert (split - exact).norm() / exact.norm() < 0.05 and torch.cosine_similarity(
        split, exact, dim=0
    ) > 0.999
    plain = displacement(torch.bfloat16, PlainAdamW)
    assert (plain - exact).norm() / exact.norm() > 0.9 and (plain == 0).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_adamw_is_adamw(dtype):
    """With its moments held in float32 (nothing rounded), every master is bit for bit that of a formula
    written apart, weight decay included."""
    model = fresh(dtype)
    optimiser = optimization.SplitAdamW(model, weight_decay=0.1)
    optimiser.part = 100  # several parts a tensor
    optimiser.means, optimiser.squares = ([torch.zeros_like(g) for g in optimiser.grads] for _ in range(2))
    rounding = optimization.round_at_random
    optimization.round_at_random = lambda x, generator: x
    try:
        masters = [m.clone() for m in optimiser.masters]
        adam = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1)
        for step in range(5):
            common.completion_logprobs(model, batch_at(step)).sum().backward()
            for master, grad in zip(masters, optimiser.grads, strict=True):
                master.grad = grad.clone()
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimiser.step(1e-3, 1.0)
            adam.step()
    finally:
        optimization.round_at_random = rounding
    for ours, weight, expected in zip(optimiser.masters, model.parameters(), masters, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-6)
        spacing = 2**-9 if dtype == torch.bfloat16 else 0
        assert (weight.float() - ours).abs().max() <= spacing * 2  # rounded to nearest


def test_split_loses_nothing():
    """Every finite float32 comes back bit for bit, halfway cases and denormals included; the bfloat16 part is
    the nearest one."""
    bits = (
        torch.randint(-(2**31), 2**31, (300_000,), generator=torch.Generator().manual_seed(0))
        .int()
        .view(torch.float32)
    )
    x = torch.cat(
        [bits[bits.abs() < 3e38], torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 0.0, -0.0, 1e-40])]
    )
    weight, low = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x), dtype=torch.int16)
    optimization.split_bits(x, weight, low)
    assert torch.equal(optimization.join_bits(weight, low).view(torch.int32), x.view(torch.int32))
    assert torch.equal((weight.double() - x.double()).abs(), (x.bfloat16().double() - x.double()).abs())


def test_random_rounding_has_the_right_mean():
    x = torch.tensor([1.0017, -0.3331, 3e-9]).repeat_interleave(200_000)
    rounded = optimization.round_at_random(x, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(
        rounded.view(3, -1).double().mean(1), x.view(3, -1)[:, 0].double(), atol=0, rtol=3e-5
    )


def test_second_moment_decays_though_each_step_is_below_bfloat16s_spacing():
    """A gradient of 1, then none: the second moment falls by a thousandth a step, which rounding to nearest
    would swallow."""
    model = torch.nn.Linear(50, 20, bias=False).bfloat16()
    optimiser = optimization.SplitAdamW(model)
    for step in range(300):
        (model.weight.sum() * (step == 0)).backward()
        optimiser.step(0.0, 0.0)
    assert optimiser.squares[0].double().mean().item() == pytest.approx(0.001 * 0.999**299, rel=0.01)


@pytest.mark.parametrize("kind", [optimization.MasterAdamW, optimization.SplitAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(kind, dtype, tmp_path):
    whole = fresh(dtype)
    optimiser = kind(whole, weight_decay=0.01)
    train(whole, optimiser, range(6), 1e-4)
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    train(whole, optimiser, range(6, 12), 1e-4)
    resumed = fresh(dtype)
    again = kind(resumed, weight_decay=0.01)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, again, range(6, 12), 1e-4)
    assert torch.equal(flat(whole.parameters()), flat(resumed.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(optimiser.masters, again.masters, strict=True))


@pytest.mark.parametrize("states", optimization.STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_weight_are_what_is_said(states, dtype):
    """Storages the optimiser holds after a step, those of the model's weights aside, against
    `BYTES_PER_WEIGHT`."""
    model = fresh(dtype)
    optimiser = optimization.make_optimiser(model, states, 0.0)
    train(model, optimiser, range(1))
    held = {}

    def visit(x):
        if isinstance(x, torch.Tensor) and x.numel() > 1:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            [visit(v) for v in x.values()]
        elif isinstance(x, (list, tuple)):
            [visit(v) for v in x]

    visit([optimiser.state_dict(), optimiser.grads])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = sum(p.numel() for p in model.parameters())
    assert sum(n for pointer, n in held.items() if pointer not in own) == weights * sum(
        optimization.bytes_per_weight(states, dtype).values()
    )


def test_released_optimiser_leaves_the_gradient_alone():
    model = fresh(torch.bfloat16)
    optimization.SplitAdamW(model).release()
    common.completion_logprobs(model, batch_at(0)).sum().backward()
    assert all(p.grad is not None for p in copy.copy(model).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_gradients_add_up_in_parts(dtype):
    size = 2 * optimization.ADD_AT_ONCE + 3
    total, grad = torch.randn(size), torch.randn(size).to(dtype)
    expected = total + grad.float()
    optimization.add_in_place(total, grad)
    assert torch.equal(total, expected)
