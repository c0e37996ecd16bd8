"""Log-probs against a plain float64 computation: ragged, chunked, shared prompts, gradients, memory."""

import copy
import math

import blocks
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers

import common
from cleanalign.errors import UserError
from cleanalign.models import (
    attend_densely,
    attention_mask,
    backbone,
    checkpointing,
    choose_attention,
    load_model,
    make_trainable,
)

V, END = 24, 3
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
COMPLETIONS = [
    [[4, 5, END], [6, 6, 6, 6, 6], [END]],
    [[7, END], [9], [4, 4, 4]],
    [[5, 6, 7, 8, END], [10, END], [11, 12, 13]],
]


def plain(model, prompt, completion, temperature=1.0):
    """Per-token log-probs of one completion: one row, no padding, whole softmax."""
    logits = model(torch.tensor([prompt + completion])).logits[0]
    steps = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)
    return steps[range(len(completion)), completion]


@pytest.fixture(scope="module")
def model():
    return tiny.model(V, seed=1).double()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocks"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_plain_float64(model, attention, temperature):
    model.set_attn_implementation(attention)
    batch = common.collate(PROMPTS, COMPLETIONS, "cpu")
    logprobs, entropy = common.completion_logprobs(model, batch, temperature, entropy=True)
    T = logprobs.shape[2]
    assert logprobs.shape[:2] == (3, 3) and T >= 5
    for g, prompt in enumerate(PROMPTS):
        for k, completion in enumerate(COMPLETIONS[g]):
            n = len(completion)
            torch.testing.assert_close(
                logprobs[g, k, :n].double(),
                plain(model, prompt, completion, temperature),
                atol=2e-6,
                rtol=1e-6,
            )
            assert (logprobs[g, k, n:] == 0).all() and (entropy[g, k, n:] == 0).all()
            # the end-of-sequence token counts, once
            assert batch.mask[g, k].tolist() == [1.0] * n + [0.0] * (T - n)
    p = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature, -1)
    assert entropy[0, 0, 0].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def long_rows():
    """Prompts and replies over several blocks of 128 positions, ragged, one reply missing."""
    draw = torch.Generator().manual_seed(0)
    tokens = lambda n: torch.randint(4, V, (n,), generator=draw).tolist()  # noqa: E731
    replies = [[tokens(n) for n in row] for row in ((150, 20, 131), (1, 7), (60, 160, 90))]
    return [tokens(n) for n in (140, 5, 130)], replies


def logprobs_and_gradients(model, batch, attention, checkpointed) -> list[torch.Tensor]:
    """Of a copy of `model` that attends by `attention`."""
    policy = make_trainable(copy.deepcopy(model), 0, 0, gradient_checkpointing=checkpointed)
    policy.set_attn_implementation(attention)
    logprobs = common.completion_logprobs(policy, batch, 0.7)
    (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    return [logprobs, *(weight.grad for weight in policy.parameters())]


@pytest.mark.parametrize("kernel", ["by blocks", "torch's"])
def test_flex_is_sdpa(monkeypatch, kernel):
    """Log-probs and gradients by FlexAttention are those under the dense mask, to rounding: with the blocks that
    are listed, and by torch's own operator as it is without a compiler."""
    if kernel == "by blocks":
        monkeypatch.setattr(blocks.KERNEL, blocks.attention)
    else:  # which refuses a gradient on a CPU, as its compiled kernel has none
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
        plain = torch.nn.attention.flex_attention.flex_attention
        monkeypatch.setattr(blocks.KERNEL, lambda *a, training, **named: plain(*a, **named))
    model = tiny.model(V, seed=1).double()
    batch = common.collate(*long_rows(), "cpu")
    results = [logprobs_and_gradients(model, batch, attention, True) for attention in ("flex", "sdpa")]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("replies", ["long", "of one token"])
def test_blocks_are_eager(replies, checkpointed):
    """Log-probs and gradients by two blocks are those of whole rows, to rounding, in a model whose query heads
    share keys."""
    prompts, completions = long_rows()
    if replies == "of one token":  # nothing is fed after a prompt
        completions = [[[4], [5]] for _ in prompts]
    model = tiny.model(V, seed=1).double()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    batch, ways = common.collate(prompts, completions, "cpu"), ("blocks", "eager")
    results = [logprobs_and_gradients(model, batch, attention, checkpointed) for attention in ways]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_blocks_never_hold_what_siblings_do_not_see(monkeypatch):
    """No scores between a reply and its sibling are computed; scores are capped where a model caps them."""
    shapes, whole = [], torch.nn.functional.softmax
    monkeypatch.setattr(F, "softmax", lambda x, *a, **k: shapes.append(tuple(x.shape)) or whole(x, *a, **k))
    model = tiny.model(V, seed=1)
    model.set_attn_implementation("blocks")
    batch = common.collate([[5] * 32], [[[6] * 9] * 5], "cpu")
    common.completion_logprobs(model, batch)
    assert {shape[-2:] for shape in shapes} == {(32, 32), (8, 40)}
    query, key, value = (torch.randn(1, 2, 3, 4) for _ in range(3))
    scores = 0.5 * torch.tanh(query @ key.transpose(2, 3) / 0.5)
    capped = attend_densely(query, key, value, torch.zeros(1, 1, 3, 3), 1.0, softcap=0.5)
    torch.testing.assert_close(capped, scores.softmax(-1) @ value)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Falcon"])
def test_blocks_are_for_architectures_that_take_them(tmp_path, family):
    """Falcon chooses among classes of its own: it is loaded all the same, and computes the same."""
    sizes = {
        "Llama": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
        "GPT2": dict(n_embd=32, n_layer=2, n_head=4),
        "Falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    }[family]
    made = getattr(transformers, f"{family}Config")(vocab_size=V, **sizes)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    how = (str(tmp_path), torch.float32, torch.device("cpu"))
    batch = common.collate(PROMPTS, COMPLETIONS, "cpu")
    blockwise = load_model(*how, "blocks")
    assert (backbone(blockwise).config._attn_implementation == "blocks") == (family != "Falcon")
    ours = common.completion_logprobs(blockwise, batch)
    torch.testing.assert_close(
        ours, common.completion_logprobs(load_model(*how, "eager"), batch), atol=1e-5, rtol=1e-5
    )


def test_attention_is_chosen_for_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_attention("auto", cpu, n) for n in (256, 257)] == ["eager", "blocks"]
    assert choose_attention("auto", gpu, 4096) == "sdpa" and choose_attention("sdpa", cpu, 9) == "sdpa"


def test_flex_visits_the_blocks_that_are_needed():
    """Every position that is allowed and no other; of 512 prompt and 2 × 1,024 reply tokens 146 of 400 blocks."""
    policy = tiny.model(V)
    policy.set_attn_implementation("flex")
    batch = common.collate(*long_rows(), "cpu")
    sizes = batch.mask.shape[1], batch.mask.shape[2] - 1
    assert torch.equal(
        blocks.visible(attention_mask(backbone(policy), batch.allowed, sizes))[:, 0], batch.allowed
    )
    batch = common.collate([[5] * 512], [[[6] * 1025, [7] * 1025]], "cpu")
    mask = attention_mask(backbone(policy), batch.allowed, (2, 1024))
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).sum() == 146 and mask.kv_indices.numel() == 400


@pytest.mark.parametrize("attention", ["flex", "blocks"])
def test_prompts_are_read_by_sdpa(model, attention):
    """Under no mask of blocks."""
    expected = common.sample(model, PROMPTS, [END], max_new_tokens=6, seed=1)
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    assert common.sample(other, PROMPTS, [END], max_new_tokens=6, seed=1) == expected


def test_flex_needs_cuda():
    """torch trains by FlexAttention there alone."""
    assert choose_attention("flex", torch.device("cuda"), 4096) == "flex"
    with pytest.raises(UserError, match="--attention flex needs a CUDA device"):
        choose_attention("flex", torch.device("cpu"), 4096)


def test_temperature_per_completion(model):
    heat = torch.tensor([[1.0, 0.5, 2.0]] * 3)
    logprobs = common.completion_logprobs(model, common.collate(PROMPTS, COMPLETIONS, "cpu"), heat)
    for k in range(3):
        expected = plain(model, PROMPTS[2], COMPLETIONS[2][k], float(heat[0, k]))
        torch.testing.assert_close(logprobs[2, k, : len(expected)].double(), expected, atol=2e-6, rtol=1e-6)


def test_missing_completions_are_empty(model):
    batch = common.collate(PROMPTS[:2], [COMPLETIONS[0], COMPLETIONS[1][:2]], "cpu")
    sums = common.completion_logprobs(model, batch).sum(-1)
    assert sums[1, 2] == 0 and sums[1, 0].item() == pytest.approx(
        plain(model, PROMPTS[1], COMPLETIONS[1][0]).sum().item(), abs=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_gradient_and_chunk_sizes(model, monkeypatch, chunk):
    """The chunked head's gradients, for every weight, equal those of plain autograd through a softmax."""
    monkeypatch.setattr(common, "chunk_rows", lambda *_: chunk)
    ours, theirs = copy.deepcopy(model).requires_grad_(True), copy.deepcopy(model).requires_grad_(True)
    weights = torch.linspace(-1, 2, 9).view(3, 3)
    (
        common.completion_logprobs(ours, common.collate(PROMPTS, COMPLETIONS, "cpu"), 0.8).sum(-1) * weights
    ).sum().backward()
    total = sum(
        weights[g, k] * plain(theirs, PROMPTS[g], COMPLETIONS[g][k], 0.8).sum()
        for g in range(3)
        for k in range(3)
    )
    total.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, atol=3e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_soft_capped_logits_match_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6), (11, 6))
    )
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, heat = torch.tensor([0, 3, 10, 3, 7]), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7])

    def ours(h, w, b):
        return common._TokenLogprobs.apply(h, w, b, targets, heat[:, None], 3.0, False)[0].double()

    def whole(h, w, b):
        return torch.log_softmax(3.0 * torch.tanh((h @ w.T + b) / 3.0) / heat[:, None], -1)[range(5), targets]

    torch.testing.assert_close(ours(hidden, weight, bias), whole(hidden, weight, bias), atol=1e-5, rtol=1e-5)
    direction = torch.arange(1.0, 6.0, dtype=torch.float64)
    mine = torch.autograd.grad((ours(hidden, weight, bias) * direction).sum(), (hidden, weight, bias))
    exact = torch.autograd.grad((whole(hidden, weight, bias) * direction).sum(), (hidden, weight, bias))
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_micro_batches_sum_to_the_whole_batch(model):
    whole, parts = copy.deepcopy(model).requires_grad_(True), copy.deepcopy(model).requires_grad_(True)
    common.completion_logprobs(whole, common.collate(PROMPTS, COMPLETIONS, "cpu")).sum().backward()
    split = common.micro_batches(PROMPTS, COMPLETIONS, 20)
    assert len(split) > 1 and sorted(i for part in split for i in part) == [0, 1, 2]
    for part in split:
        common.completion_logprobs(
            parts, common.collate([PROMPTS[i] for i in part], [COMPLETIONS[i] for i in part], "cpu")
        ).sum().backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=3e-5, rtol=1e-4)


def test_sequence_logprobs(model):
    sums = common.sequence_logprobs(model, PROMPTS, COMPLETIONS, 1.0, "cpu", micro_batch_tokens=16)
    for g, prompt in enumerate(PROMPTS):
        assert sums[g] == pytest.approx(
            [plain(model, prompt, c).sum().item() for c in COMPLETIONS[g]], abs=1e-5
        )


def test_sampled_tokens_have_the_probability_they_were_drawn_with(model):
    """Sampling and log-probs agree on one convention: frequencies of replies match exp(summed log-prob)."""
    replies = common.sample(
        model, [PROMPTS[0]] * 4000, [END], max_new_tokens=2, seed=0, temperature=0.6, max_rows=4000
    )
    seen = {}
    for (reply,) in replies:
        seen[tuple(reply)] = seen.get(tuple(reply), 0) + 1 / 4000
    top = sorted(seen, key=seen.get, reverse=True)[:5]
    sums = common.sequence_logprobs(model, [PROMPTS[0]], [[list(r) for r in top]], 0.6, "cpu", 1000)[0]
    for reply, logprob in zip(top, sums, strict=True):
        assert seen[reply] == pytest.approx(torch.tensor(logprob).exp().item(), abs=0.025)


def test_gradient_checkpointing_gives_the_same_gradient_from_less_memory(model):
    """And the checkpointed policy still samples: with its caches, the very replies of the plain one."""
    kept = {}
    plain = make_trainable(copy.deepcopy(model), 0, 0, gradient_checkpointing=False)
    saving = make_trainable(copy.deepcopy(model), 0, 0, gradient_checkpointing=True)
    for name, policy in (("plain", plain), ("saving", saving)):
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        seen = {}

        def pack(x, weights=weights, seen=seen):
            if x.untyped_storage().data_ptr() not in weights:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = common.completion_logprobs(policy, common.collate(PROMPTS, COMPLETIONS, "cpu")).sum()
        kept[name] = sum(seen.values())
        result.backward()
    assert kept["saving"] < 0.6 * kept["plain"]
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-12)
    replies = [
        common.sample(policy, PROMPTS, [END], completions=2, max_new_tokens=6, seed=1)
        for policy in (plain, saving)
    ]
    assert replies[0] == replies[1]


def test_checkpointing_ends_when_its_body_raises(model):
    policy = make_trainable(copy.deepcopy(model), 0, 0, gradient_checkpointing=True)
    with pytest.raises(ZeroDivisionError), checkpointing(policy):
        assert policy.training
        1 / 0  # noqa: B018
    assert not policy.training  # in training mode it would ignore its caches
    with torch.no_grad(), checkpointing(policy):
        assert not policy.training


def test_means_are_weighted_by_prompts_and_read_once(monkeypatch):
    reads = []
    for name in ("tolist", "item", "__float__", "__bool__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, plain=plain: reads.append(1) or plain(x))
    weight = torch.tensor(2.0, requires_grad=True)
    means = common.Means(4)
    means.add(["a", "b", "c"], {"loss": weight * 0.1, "kl": torch.tensor(3.0, dtype=torch.bfloat16)})
    means.add(["d"], {"loss": weight * 0.3, "kl": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert not reads
    total = means.read()
    assert len(reads) == 1 and all(isinstance(value, float) for value in total.values())
    assert total == {"loss": pytest.approx(0.3, rel=1e-6), "kl": 2.5} and means.not_finite() == []
    kept = [x for _, measured in means.parts for pair in measured.values() for x in pair]
    assert not any(x.requires_grad for x in kept)


def test_means_over_tokens_do_not_depend_on_the_split():
    """A pair is a sum and its divisor; a single micro-batch logs the very quotient in float32."""
    whole, halves = common.Means(2), (common.Means(2), torch.tensor([1.7, 2.6]), torch.tensor([3.0, 5.0]))
    whole.add(["a", "b"], {"loss": torch.tensor(0.0), "entropy": (halves[1].sum(), halves[2].sum())})
    for i, row in enumerate("ab"):
        halves[0].add([row], {"loss": torch.tensor(0.0), "entropy": (halves[1][i], halves[2][i])})
    assert whole.read()["entropy"] == (halves[1].sum() / halves[2].sum()).item()
    assert halves[0].read()["entropy"] == pytest.approx(4.3 / 8, rel=1e-6)


def test_means_name_the_rows_whose_loss_is_not_finite():
    means = common.Means(7)
    parts = {"a b": 1.0, "c": math.nan, "d e f": 2.0, "g": -math.inf}
    for rows, loss in parts.items():
        means.add(rows.split(), {"kl": torch.tensor(math.nan), "loss": torch.tensor(loss)})
    assert math.isnan(means.read()["loss"]) and means.not_finite() == ["c", "g"]


def test_padding_is_counted():
    batch = common.collate(PROMPTS, COMPLETIONS, "cpu")
    fed = batch.tokens
    assert fed == 3 + 1 + 6 + (2 + 4 + 0) + (1 + 0 + 2) + (4 + 1 + 2) and batch.scored == 9 + 6 + 10
    assert batch.input_ids.numel() == 3 * (16 + 3 * 8) > fed


def test_sequence_logprobs_do_not_depend_on_how_they_are_split(model, monkeypatch):
    sums = {}
    for times in (1, 1000):
        monkeypatch.setattr(common, "WITHOUT_GRADIENT", times)
        sums[times] = common.sequence_logprobs(model, PROMPTS, COMPLETIONS, 0.7, "cpu", 1)
    expected = [
        [plain(model, p, y, 0.7).sum().item() for y in group]
        for p, group in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    for measured in sums.values():
        for got, wanted in zip(measured, expected, strict=True):
            assert got == pytest.approx(wanted, abs=1e-5)


def test_token_logprobs_are_those_of_any_batch(model):
    rows = common.token_logprobs(model, PROMPTS, COMPLETIONS, 0.7, "cpu", 1000)
    assert sorted(rows) == [0, 1, 2]
    for part in ([1], [2, 0]):
        batch = common.collate([PROMPTS[i] for i in part], [COMPLETIONS[i] for i in part], "cpu")
        with torch.no_grad():
            expected = common.completion_logprobs(model, batch, 0.7)
        torch.testing.assert_close(common.pad_logprobs([rows[i] for i in part], batch), expected)
