"""Sampling: caches, batches, seeds, end of sequence, and the mixture's distribution by brute force."""

import pytest
import tiny
import torch

import common
from cleanalign.decoding import accept_or_redraw

V, END = 24, 3
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [4, 4]]


@pytest.fixture(scope="module")
def models():
    return tiny.model(V, seed=1), tiny.model(V, seed=2)


def next_logprobs(model, prefix, temperature=1.0):
    """Next-token log-probs without cache, batch or padding, in float64."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prefix])).logits[0, -1].double() / temperature, -1)


def first_above(masses, u):
    """The token at which the running sum of `masses` passes u times their total."""
    return min(int(torch.searchsorted(masses.cumsum(-1), u.double() * masses.sum(), right=True)), V - 1)


def replay(model, prompt, uniforms, steps, temperature=1.0, mixture=None):
    """One row decoded without cache or batch, from the same uniform numbers (steps, 1 or 3)."""
    reply = []
    for t in range(steps):
        logprobs = next_logprobs(model, prompt + reply, temperature)
        probs = logprobs.exp()
        token = first_above(probs, uniforms[t, 0])
        if mixture:
            target = (
                (1 - mixture[1]) * logprobs
                + mixture[1] * next_logprobs(mixture[0], prompt + reply, temperature)
            ).softmax(-1)
            if uniforms[t, 1] >= target[token] / probs[token]:
                token = first_above((target - probs).clamp(min=0), uniforms[t, 2])
        reply.append(token)
        if reply[-1] == END:
            break
    return reply


def numbers(seed, *shape, mixture=False):
    """The uniform numbers of `common.sample`, (prompts, completions, tokens, 1 or 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(shape, generator=generator) for _ in range(3 if mixture else 1)], -1)


def test_redrawn_tokens_have_the_target_distribution_and_differ_as_rarely_as_can_be():
    torch.manual_seed(0)
    n = 200_000
    source, target = (torch.randn(2, 8) * 1.5).softmax(-1)
    draft = torch.multinomial(source, n, replacement=True)
    given = (draft, source.expand(n, 8), target.expand(n, 8), torch.rand(n), torch.rand(n))
    token = accept_or_redraw(*given)
    assert torch.equal(token, accept_or_redraw(*given, waits=False))
    assert torch.bincount(token, minlength=8) / n == pytest.approx(target, abs=5e-3)
    assert (token != draft).double().mean() == pytest.approx(
        float((source - target).abs().sum() / 2), abs=5e-3
    )
    assert torch.equal(
        accept_or_redraw(draft, source.expand(n, 8), source.expand(n, 8), torch.rand(n), torch.rand(n)), draft
    )


@pytest.mark.parametrize("mixture", [None, 0.125, 0.6])
def test_cache_and_ragged_batch_equal_single_rows_without_cache(models, mixture):
    policy, reference = models
    pair = (reference, mixture) if mixture else None
    replies = common.sample(policy, PROMPTS, [END], completions=3, max_new_tokens=8, seed=5, mixture=pair)
    uniforms = numbers(5, len(PROMPTS), 3, 8, mixture=mixture is not None)
    for i, prompt in enumerate(PROMPTS):
        for k in range(3):
            assert replies[i][k] == replay(policy, prompt, uniforms[i, k], 8, mixture=pair)


def test_greedy_is_deterministic_and_equals_transformers(models):
    policy, _ = models
    replies = common.sample(policy, PROMPTS, [END], max_new_tokens=8, temperature=0, seed=0)
    assert replies == common.sample(policy, PROMPTS, [END], max_new_tokens=8, temperature=0, seed=99)
    for prompt, (reply,) in zip(PROMPTS, replies, strict=True):
        expected = policy.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=END, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert reply == expected


def test_seeds_reproduce_and_differ(models):
    def draw(seed, rows=64):
        settings = dict(completions=4, max_new_tokens=8, max_rows=rows)
        return common.sample(models[0], PROMPTS, [END], seed=seed, **settings)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1) == draw(1, rows=4)  # whatever else is in the batch


def test_end_of_sequence_closes_a_completion(models):
    replies = common.sample(models[0], PROMPTS * 8, [END, 7], completions=4, max_new_tokens=12, seed=3)
    flat = [reply for group in replies for reply in group]
    assert all(token not in (END, 7) for reply in flat for token in reply[:-1])
    assert any(reply[-1] in (END, 7) and len(reply) < 12 for reply in flat) and any(
        len(reply) == 12 for reply in flat
    )


def test_samples_of_a_prompt_are_independent(models):
    """Joint frequencies of two samples' first tokens against the product of the exact marginals."""
    n = 4000
    replies = common.sample(
        models[0], [PROMPTS[0]] * n, [END], completions=2, max_new_tokens=1, seed=0, max_rows=8000
    )
    first, second = (torch.tensor([group[k][0] for group in replies]) for k in (0, 1))
    exact = next_logprobs(models[0], PROMPTS[0]).exp()
    joint = torch.zeros(V, V, dtype=torch.float64).index_put_(
        (first, second), torch.tensor(1.0 / n, dtype=torch.float64), accumulate=True
    )
    # sampling noise alone gives about 0.2; equal samples about 1.9
    assert (joint - exact[:, None] * exact).abs().sum() < 0.28


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_mixture_distribution_against_enumeration(models, beta):
    """All two-token replies: the per-token geometric mixture's probabilities against frequencies."""
    policy, reference = models
    n, prompt = 6000, PROMPTS[0]
    replies = common.sample(
        policy, [prompt] * n, [END], max_new_tokens=2, seed=0, mixture=(reference, beta), max_rows=6000
    )

    def mixed(prefix):
        return ((1 - beta) * next_logprobs(policy, prefix) + beta * next_logprobs(reference, prefix)).softmax(
            -1
        )

    exact, first = {}, mixed(prompt)
    for a in range(V):
        for b in range(V) if a != END else [None]:
            exact[(a,) if b is None else (a, b)] = float(first[a]) * (
                1.0 if b is None else float(second[b]) if (second := mixed([*prompt, a])) is not None else 0
            )
    assert sum(exact.values()) == pytest.approx(1)
    count = {}
    for (reply,) in replies:
        count[tuple(reply)] = count.get(tuple(reply), 0) + 1 / n
    # expected total deviation of n exact draws
    noise = sum((2 * p / (3.1416 * n)) ** 0.5 for p in exact.values())
    assert sum(abs(count.get(reply, 0) - p) for reply, p in exact.items()) < 1.15 * noise


def test_beta_zero_never_runs_the_reference_and_beta_one_never_the_policy(models):
    broken = tiny.model(V, seed=3)
    broken.model.forward = None
    alone = common.sample(models[0], PROMPTS, [END], max_new_tokens=6, seed=4)
    assert common.sample(models[0], PROMPTS, [END], max_new_tokens=6, seed=4, mixture=(broken, 0.0)) == alone
    assert common.sample(broken, PROMPTS, [END], max_new_tokens=6, seed=4, mixture=(models[0], 1.0)) == alone


def test_temperature_and_top_p(models):
    n = 3000
    replies = common.sample(
        models[0], [PROMPTS[0]] * n, [END], max_new_tokens=1, temperature=0.5, top_p=0.7, seed=0, max_rows=n
    )
    probs = next_logprobs(models[0], PROMPTS[0], temperature=0.5).exp()
    ordered, index = probs.sort(descending=True)
    kept = index[: int((ordered.cumsum(0) < 0.7).sum()) + 1]
    nucleus = torch.zeros(V, dtype=torch.float64)
    nucleus[kept] = probs[kept] / probs[kept].sum()
    frequency = torch.bincount(torch.tensor([group[0][0] for group in replies]), minlength=V) / n
    assert set(frequency.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert (frequency - nucleus).abs().sum() < 0.06


def test_stats_and_agreement(models):
    stats = {}
    replies = common.sample(
        models[0], PROMPTS, [END], max_new_tokens=6, seed=4, mixture=(models[0], 0.5), stats=stats
    )
    assert stats["tokens"] == sum(len(r) for g in replies for r in g)
    assert stats["agreement"] == 1.0  # the same model twice
