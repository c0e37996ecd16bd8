"""Text to tokens to samples to log-probs: what every algorithm here shares, and no algorithm.

Sections, in the order data flows:

    tokenization    prompts and responses become token ids
    sampling        replies of one model or of a per-token mixture of two (the loop: cleanalign/decoding.py)
    log-probs       per-token log-probabilities of completions, never a whole (tokens, vocabulary) matrix
    micro-batches   a step's prompts in parts that fit; the means of what was measured on them

Conventions. A completion is the list of its token ids, up to and including the first end-of-sequence
token; a mask is 1 exactly on those. The log-prob of a completion is the *sum* over them.
Shapes: G prompts, K completions of each, P prompt tokens, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cleanalign import distributed
from cleanalign.data import Prompt, Row, load_rows, prompt_text, report_dropped, write_dialogue
from cleanalign.decoding import Decoder, Decoders, DraftingDecoder, left_pad, resolve_decoding, round_up
from cleanalign.errors import UserError
from cleanalign.models import (
    adapter_switch,
    attention_mask,
    backbone,
    checkpointing,
    choose_attention,
    chunk_rows,
    end_tokens,
    head,
    head_logits,
    load_model,
    load_tokenizer,
    make_trainable,
    require_full_attention,
    resolve_device,
    resolve_dtype,
    save_model,
    starting_model,
    upload,
)
from cleanalign.packed import packed

# For a notebook one import does: what it needs to load a model and data stands beside what works on text.
__all__ = [
    "Batch",
    "Means",
    "Prompt",
    "Row",
    "UserError",
    "choose_attention",
    "collate",
    "completion_hidden",
    "completion_logprobs",
    "count_tokens",
    "decode",
    "derive_seed",
    "encode_prompt",
    "encode_response",
    "encode_rows",
    "end_tokens",
    "left_pad",
    "load_model",
    "load_rows",
    "load_tokenizer",
    "make_trainable",
    "micro_batches",
    "pad_logprobs",
    "pad_rows",
    "prompt_text",
    "resolve_device",
    "resolve_dtype",
    "sample",
    "save_model",
    "sequence_logprobs",
    "shares",
    "starting_model",
    "token_logprobs",
    "tokens_without_gradient",
    "turn_end",
    "upload",
]


def derive_seed(*parts: int | str) -> int:
    """A seed that is a function of its parts alone, so that a resumed run draws what the uninterrupted one
    would have."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


# --- tokenization ---


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the assistant's turn: chat template where there is one, plain text
    where there is none."""
    if tokenizer.chat_template:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False).input_ids
    text = prompt if isinstance(prompt, str) else write_dialogue(prompt) + "\n\nAssistant:"
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_response(tokenizer, prompt: Prompt, response: str, end: int, max_tokens: int) -> list[int]:
    """Token ids of a data set's response, closed by the id
    `end`; cut (and then left open) at `max_tokens`."""
    if not tokenizer.chat_template and isinstance(prompt, list):
        response = " " + response  # after "\n\nAssistant:"
    ids = tokenizer(response, add_special_tokens=False).input_ids
    return (ids + [end])[:max_tokens]


def turn_end(tokenizer, ends: list[int]) -> int:
    """The id that closes an assistant's turn: the first of `ends` that the chat template writes after one,
    else the tokenizer's."""
    if tokenizer.chat_template:
        prompt = [{"role": "user", "content": "a"}]
        opening = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        closed = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": "b"}], tokenize=False
        )
        after = closed[len(opening) :] if closed.startswith(opening) else ""
        for token in tokenizer(after, add_special_tokens=False).input_ids:
            if token in ends:
                return token
    return tokenizer.eos_token_id


def encode_rows(
    tokenizer, rows: list[Row], max_prompt_length: int, count: int | None, seed: int, what: str
) -> tuple[list[Row], list[list[int]]]:
    """Up to `count` rows (None = all) in an order fixed by `seed`, one per distinct prompt, and their
    prompts' token ids.

    Prompts longer than `max_prompt_length` tokens are dropped and counted. Raises `UserError` if none is
    left.
    """
    order = list(rows)
    random.Random(seed).shuffle(order)
    kept, tokens, seen, dropped = [], [], set(), Counter()
    for row in order:
        if count is not None and len(kept) == count:
            break
        text = prompt_text(row.prompt)
        if text in seen:
            continue
        seen.add(text)
        try:
            ids = encode_prompt(tokenizer, row.prompt)
        except (
            Exception
        ) as error:  # a chat template can refuse anything: two turns of one speaker, an unknown role
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{row.id}: the model's chat template does not take this prompt: {first}"
            ) from error
        if len(ids) > max_prompt_length:
            dropped[f"longer than --max-prompt-length {max_prompt_length}"] += 1
            continue
        kept.append(row)
        tokens.append(ids)
    report_dropped(what, len(kept) + dropped.total(), dropped)
    return kept, tokens


def decode(tokenizer, completion: list[int]) -> str:
    """A completion's text without special tokens."""
    return tokenizer.decode(completion, skip_special_tokens=True).strip()


# --- sampling ---


@torch.inference_mode()
def sample(
    model,
    prompts: list[list[int]],
    ends: list[int],
    *,
    completions: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int,
    mixture: tuple[object, float] | None = None,
    unmixed: int = 0,
    max_rows: int = 64,
    decoding: str = "auto",
    stats: dict | None = None,
    progress: str | None = None,
    decoders: Decoders | None = None,
) -> list[list[list[int]]]:
    """Sample `completions` replies to every prompt; returns token ids, [prompt][completion][token].

    Args:
        model: the policy, or a reference.
        ends: ids that end a completion; the first one sampled is its last token.
        temperature: divides the logits; 0 is greedy. `top_p` < 1 keeps the smallest set of tokens with that
            mass.
        seed: row r's token t is drawn with the r,t-th of this seed's uniform numbers (inverse CDF), whatever
            else is in its batch and whichever rows finish first. Of several processes each decodes its share
            of the prompts.
        mixture: (reference, beta): sample from π^(1−β) π_ref^β, renormalised for each token; each model keeps
            a cache of its own. The token is π's own draw where `accept_or_redraw` lets it stand, so that π
            can draft ahead of π_ref. β = 0 never runs the reference, β = 1 without `unmixed` never runs
            `model`.
        unmixed: of the completions, the first so many come from `model` alone, in the same forward passes.
        max_rows: rows decoded at once. Prompts are batched by length, each prefilled once for its
            completions.
        decoding: how a step is launched, see `resolve_decoding`.
        stats: what is added to it: `tokens`, of this process's share; `warmup_seconds` and `warmup_steps`,
            first runs of a batch shape, captures and compilation. A mixture sets `agreement`, the share of
            tokens at which both models' most likely token is the same, and where it drafts
            (`DraftingDecoder`) `draft_acceptance`, the share of the policy's drafts that the mixture draws
            too.
        decoders: where buffers and graphs are kept for the next call; None: they go with this one. The tokens
            are the same.

    Raises `UserError` for an architecture that `require_full_attention` refuses.
    """
    reference, beta = mixture or (None, 0.0)
    if beta == 1 and not unmixed:
        model, reference = reference, None
    elif beta == 0:
        reference = None
    members = [model] if reference is None else [model, reference]
    order = distributed.mine(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    longest = max(map(len, prompts))
    for member in members:
        require_full_attention(member, longest + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), completions, max_new_tokens)
    # for each token: the draw; for a mixture also the test and the redraw
    numbers = 1 if reference is None else 3
    # (prompts, completions, T, numbers)
    uniforms = torch.stack([torch.rand(shape, generator=generator) for _ in range(numbers)], -1)
    replies: list = [None] * len(prompts)
    batches = max(1, -(-len(order) // max(1, max_rows // completions)))
    step = max(1, -(-len(order) // batches))  # batches of one size
    drafts = reference is not None and resolve_decoding(decoding, head(model)[0].device) == "eager"
    kind = DraftingDecoder if drafts else Decoder
    decoders = Decoders() if decoders is None else decoders
    longest = max(longest, decoders.longest)
    shape = (beta, unmixed, step, completions, longest, max_new_tokens, ends, temperature, top_p, decoding)
    decoder = decoders.get(kind, members, (completions - unmixed, completions), *shape)
    starts = range(0, len(order), step)
    # a captured step would keep weights that are rearranged for this call only
    products = max_new_tokens * len(starts) if decoder.decoding == "eager" else 0
    with packed(members[0], rows=step * completions, products=products):
        for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
            chunk = order[start : start + step]
            groups = decoder.decode([prompts[i] for i in chunk], uniforms[chunk])
            for i, group in zip(chunk, groups, strict=True):
                replies[i] = group
    own = sum(len(reply) for group in replies if group is not None for reply in group)
    replies = distributed.merge(replies)
    if stats is not None:
        stats["tokens"] = stats.get("tokens", 0) + own
        stats["warmup_seconds"] = stats.get("warmup_seconds", 0.0) + decoder.warmup_seconds
        stats["warmup_steps"] = stats.get("warmup_steps", 0) + len(decoder.seen) - decoder.met
        if reference is not None:
            agreeing, drawn = decoder.agreement.tolist()
            counts = {"agreeing": agreeing, "drawn": drawn}
            if drafts:
                counts |= {"accepted": decoder.accepted, "compared": decoder.compared}
            counts = distributed.total(counts)
            stats["agreement"] = counts["agreeing"] / counts["drawn"]
            if drafts:
                stats["draft_acceptance"] = counts["accepted"] / max(1, counts["compared"])
    return replies


# --- log-probs ---


@dataclass
class Batch:
    """G prompts with K completions each, laid out so that every prompt is computed once: see `collate`."""

    input_ids: torch.Tensor  # (G, L), L = P + K (T - 1)
    allowed: torch.Tensor  # (G, L, L) bool: which earlier positions a position attends to
    position_ids: torch.Tensor  # (G, L)
    source: torch.Tensor  # (K, T) index into L of the position that predicts each completion token
    targets: torch.Tensor  # (G, K, T) the completions' token ids
    mask: torch.Tensor  # (G, K, T) float, 1 = counts
    counted: torch.Tensor  # (scored,) index into G·K·T of the tokens that count: asking the mask would wait
    tokens: int  # of the G·L places, those that hold a token; the rest is padding
    scored: int  # completion tokens, each of which gets a log-prob


def collate(prompts: list[list[int]], completions: list[list[list[int]]], device) -> Batch:
    """Lay out G prompts and their K completions as one row each: left-padded prompt, then the K completions
    side by side.

    A completion sees its prompt and itself, not its siblings, and its positions continue the prompt's. Its
    last token is predicted but never fed, so it takes T − 1 places. Example, P = 2, K = 2, T = 3:

        places:     p0 p1 | a0 a1 | b0 b1        source of a0 a1 a2: p1 a0 a1;  of b0 b1 b2: p1 b0 b1

    Prompts with fewer than K completions are filled up with empty ones (mask 0). P is a multiple of 16 and T
    − 1 of 8: each new shape costs kernels compiled anew and scattered memory, and a few shapes cost a little
    padding.
    """
    G, K = len(prompts), max(map(len, completions))
    T = 1 + round_up(max(len(c) for group in completions for c in group) - 1, 8)
    prompt_ids, prompt_mask = left_pad(prompts, "cpu", multiple=16)  # (G, P)
    P = prompt_ids.shape[1]
    targets = torch.zeros(G, K, T, dtype=torch.long)
    mask = torch.zeros(G, K, T)
    for g, group in enumerate(completions):
        for k, completion in enumerate(group):
            targets[g, k, : len(completion)] = torch.tensor(completion, dtype=torch.long)
            mask[g, k, : len(completion)] = 1.0
    input_ids = torch.cat([prompt_ids, targets[:, :, :-1].reshape(G, -1)], 1)  # (G, L)
    own = torch.arange(T - 1).repeat(K)  # place within its completion
    position_ids = torch.cat(
        [(prompt_mask.cumsum(1) - 1).clamp(min=0), prompt_mask.sum(1, keepdim=True) + own], 1
    )
    # -1 = prompt, else which completion
    block = torch.cat([torch.full((P,), -1), torch.arange(K).repeat_interleave(T - 1)])
    order = torch.arange(len(block))
    structure = (order[:, None] >= order) & ((block == -1) | (block[:, None] == block))  # (L, L)
    real = torch.cat([prompt_mask.bool(), torch.ones(G, K * (T - 1), dtype=torch.bool)], 1)  # (G, L)
    allowed = structure & real[:, None, :]
    source = P + torch.arange(K)[:, None] * (T - 1) + torch.arange(T) - 1  # (K, T)
    source[:, 0] = P - 1
    counted = mask.flatten().nonzero()[:, 0]
    tensors = (input_ids, allowed, position_ids, source, targets, mask, counted)
    return Batch(*(upload(x, device) for x in tensors), *count_tokens(prompts, completions))


def count_tokens(prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[int, int]:
    """Tokens a forward pass over these computes, every prompt once and each completion but its last token;
    and those it scores."""
    lengths = [len(c) for group in completions for c in group]
    return sum(map(len, prompts)) + sum(max(n - 1, 0) for n in lengths), sum(lengths)


def completion_hidden(model, batch: Batch) -> torch.Tensor:
    """Last hidden states (G, K, T, D): at t, of the position that predicts token t, which has seen the prompt
    and the tokens before t."""
    transformer = backbone(model)
    K, T = batch.source.shape
    with adapter_switch(model), checkpointing(model):
        out = transformer(
            input_ids=batch.input_ids,
            attention_mask=attention_mask(transformer, batch.allowed, (K, T - 1)),
            position_ids=batch.position_ids,
            use_cache=False,
        )
    return out.last_hidden_state[:, batch.source.flatten()].unflatten(1, (K, T))


def completion_logprobs(model, batch: Batch, temperature: float | torch.Tensor = 1.0, entropy: bool = False):
    """Log-probs (G, K, T) of every completion token under `model`, 0 where the mask is 0; float32,
    differentiable.

    Args:
        temperature: divides the logits; a float, or (G, K) where completions differ (own samples at the
            sampling temperature, a data set's at 1), best on the host.
        entropy: also return the entropy in nats of each token's distribution, (G, K, T), without gradient.

    The vocabulary projection runs over counted positions only, in chunks, and again in backward, so that no
    whole (tokens, V) matrix is ever held.
    """
    G, K, T = batch.mask.shape
    weight, bias, softcap = head(model)
    hidden = completion_hidden(model, batch).flatten(0, 2)[batch.counted]  # (N, D)
    targets = batch.targets.flatten()[batch.counted]  # (N,)
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((G, K), float(temperature))
    divisor = None  # a division of (N, V) logits by 1 is a pass over memory
    if temperature.device.type != "cpu" or (temperature != 1).any():
        per_token = temperature[:, :, None].expand(G, K, T).flatten()
        divisor = upload(per_token, weight.device)[batch.counted, None]  # (N, 1)
    measured = _TokenLogprobs.apply(hidden, weight, bias, targets, divisor, softcap, entropy)

    def spread(numbers):  # (N,) to (G, K, T)
        zeros = torch.zeros(G * K * T, device=weight.device)
        return zeros.index_copy(0, batch.counted, numbers).view(G, K, T)

    return tuple(map(spread, measured)) if entropy else spread(measured[0])


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden Wᵀ / temperature)[target] for N tokens, in chunks, recomputed in backward.

    The work on (n, V) chunks is bound by memory, not arithmetic, so it is done in place and in as few passes
    as can be.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, entropy):
        N = hidden.shape[0]
        logprobs, normalizers = (torch.empty(N, device=hidden.device) for _ in range(2))
        entropies = torch.zeros(N, device=hidden.device)
        for rows in _chunks(N, weight, gradient=False):
            logits = head_logits(hidden[rows], weight, bias, softcap).float()  # (n, V)
            if temperature is not None:
                logits.div_(temperature[rows])
            greatest = logits.amax(-1, keepdim=True)
            exponentials = (logits - greatest).exp_()
            total = exponentials.sum(-1)
            normalizers[rows] = total.log() + greatest[:, 0]
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - normalizers[rows]
            if entropy:  # log Z − Σ p · logit
                entropies[rows] = normalizers[rows] - torch.linalg.vecdot(exponentials, logits) / total
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, normalizers)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, temperature, normalizers = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = grad_bias = None
        for rows in _chunks(len(hidden), weight, gradient=True):
            logits = head_logits(hidden[rows], weight, bias, ctx.softcap).float()  # (n, V)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2  # of the soft cap
            scale = grad[rows, None]
            if temperature is not None:
                logits.div_(temperature[rows])
                scale = scale / temperature[rows]
            # d log p / d logit = 1[target] − p
            delta = logits.sub_(normalizers[rows, None]).exp_().mul_(-scale)
            delta.scatter_add_(-1, targets[rows, None], scale)
            if slope is not None:
                delta.mul_(slope)
            low = delta.to(weight.dtype)
            grad_hidden[rows] = (low @ weight).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                product = low.T @ hidden[rows].to(weight.dtype)  # (V, D)
                if grad_weight is None:
                    grad_weight = product if rows.stop == len(hidden) else product.float()
                else:  # several chunks add up in float32
                    grad_weight.add_(product)
            if ctx.needs_input_grad[2]:
                grad_bias = delta.sum(0) if grad_bias is None else grad_bias.add_(delta.sum(0))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(N: int, weight: torch.Tensor, gradient: bool) -> Iterator[slice]:
    size = chunk_rows(weight.shape[0], weight.device, gradient)
    return (slice(start, min(start + size, N)) for start in range(0, N, size))


WITHOUT_GRADIENT = 4  # times the tokens of a micro-batch


def tokens_without_gradient(micro_batch_tokens: int, device) -> int:
    """Tokens of a pass without gradient, where a pass with one takes `micro_batch_tokens`: a CPU wants large
    products, a GPU has them. The numbers that come out are the same."""
    return micro_batch_tokens * (WITHOUT_GRADIENT if torch.device(device).type == "cpu" else 1)


@torch.no_grad()
def token_logprobs(
    model, prompts, completions, temperature: float, device, micro_batch_tokens: int
) -> dict[int, torch.Tensor]:
    """{index of a prompt: (K, T) per-token log-probs without gradient}, of this process's share of the
    prompts; T is at least its longest completion, `pad_logprobs` makes it a micro-batch's."""
    rows = {}
    tokens = tokens_without_gradient(micro_batch_tokens, device)
    for part in shares(prompts, completions, tokens)[distributed.rank()]:
        batch = collate([prompts[i] for i in part], [completions[i] for i in part], device)
        rows |= zip(part, completion_logprobs(model, batch, temperature), strict=True)
    return rows


def pad_logprobs(rows: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """Of G prompts what `token_logprobs` gave, as (G, K, T) of a batch of the same: zeros added or cut."""
    T = batch.mask.shape[-1]
    return torch.stack([F.pad(row, (0, T - row.shape[-1])) for row in rows])


@torch.no_grad()
def sequence_logprobs(
    model, prompts, completions, temperature, device, micro_batch_tokens: int, progress: str | None = None
) -> list[list[float]]:
    """Summed log-probs without gradient, [prompt][completion], for any number of prompts; `temperature` as in
    `completion_logprobs`, per prompt if a list of (K,) lists. They are read from the device together.
    `micro_batch_tokens` are those of a pass with gradient.
    """
    result: list = [None] * len(prompts)
    sums = []
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False)
    tokens = tokens_without_gradient(micro_batch_tokens, device)
    parts = shares(prompts, completions, tokens)[distributed.rank()]
    for part in parts:
        batch = collate([prompts[i] for i in part], [completions[i] for i in part], device)
        heat = (
            temperature
            if not isinstance(temperature, list)
            else pad_rows([temperature[i] for i in part], 1.0, "cpu")
        )
        sums.append(completion_logprobs(model, batch, heat).sum(-1).flatten())  # (G·K,)
        bar.update(len(part))
    flat = iter(torch.cat(sums).tolist() if sums else [])
    for part in parts:
        K = max(len(completions[i]) for i in part)
        for i in part:
            result[i] = [next(flat) for _ in range(K)][: len(completions[i])]
    return distributed.merge(result)


def pad_rows(rows: list[list[float]], fill: float, device) -> torch.Tensor:
    """Ragged lists of numbers as one (G, K) float32 tensor."""
    K = max(map(len, rows))
    return upload(torch.tensor([[*row, *[fill] * (K - len(row))] for row in rows]), device)


# --- micro-batches ---


def micro_batches(
    prompts: list[list[int]], completions: list[list[list[int]]], max_tokens: int
) -> list[list[int]]:
    """Split G prompts into lists of indices whose collated size, padding included, is at most `max_tokens`
    (or one prompt).

    Neighbours have the same number of completions and similar lengths, so little is padded.
    """
    parts, current = [], []
    for i in by_size(prompts, completions):
        wider = [*current, i]
        P = max(len(prompts[j]) for j in wider)
        K = max(len(completions[j]) for j in wider)
        T = max(len(c) for j in wider for c in completions[j])
        if current and (len(wider) * (P + K * (T - 1)) > max_tokens or len(completions[current[0]]) != K):
            parts.append(current)
            wider = [i]
        current = wider
    return [*parts, current] if current else parts


def by_size(prompts: list[list[int]], completions: list[list[list[int]]]) -> list[int]:
    """Indices of G prompts, by number and length of what is to be computed for each."""

    def size(i: int) -> tuple[int, int, int]:
        return len(completions[i]), len(prompts[i]), max(map(len, completions[i]))

    return sorted(range(len(prompts)), key=size)


def shares(
    prompts: list[list[int]], completions: list[list[list[int]]], max_tokens: int
) -> list[list[list[int]]]:
    """Each process's `micro_batches`: the prompts are dealt out by size, so that all have about as much to
    do. A process may be left without any."""
    order, result = by_size(prompts, completions), []
    for rank in range(distributed.world()):
        own = order[rank :: distributed.world()]
        parts = micro_batches([prompts[i] for i in own], [completions[i] for i in own], max_tokens)
        result.append([[own[i] for i in part] for part in parts])
    return result


class Means:
    """Means over a step of what its micro-batches measured, weighted by their prompts; of several processes,
    over all of theirs. Kept on the device and read from it once.

    What is measured is a mean over the micro-batch's prompts, or a pair: a sum and what it is to be divided
    by, for means over tokens. Neither kind depends on how the step is split.
    """

    def __init__(self, prompts: int):
        self.prompts = prompts  # of the whole step
        self.parts: list[tuple[list[str], dict]] = []
        self.read_parts: list[tuple[list[str], dict[str, list[float]]]] = []  # of all processes

    def add(self, row_ids: list[str], measured: dict[str, torch.Tensor | tuple]) -> None:
        """A micro-batch's rows and what was measured on them, scalars on one device; "loss" is among them."""
        kept = {}
        for name, value in measured.items():
            pair = value if isinstance(value, tuple) else (value,)
            kept[name] = [x.detach().float() for x in pair]
        self.parts.append((row_ids, kept))

    def read(self) -> dict[str, float]:
        """{name: mean over the step}, summed in float64 on the host."""
        flat = [x for _, kept in self.parts for pair in kept.values() for x in pair]
        values = iter(torch.stack(flat).tolist() if flat else [])  # the one wait for the device
        own = []
        for row_ids, kept in self.parts:
            own.append((row_ids, {name: [next(values) for _ in pair] for name, pair in kept.items()}))
        self.read_parts = [part for parts in distributed.gather(own, "metrics") for part in parts]
        result = dict.fromkeys(self.read_parts[0][1], 0.0)
        divisors = dict.fromkeys(result, 0.0)
        for row_ids, kept in self.read_parts:
            for name, (value, *divisor) in kept.items():
                result[name] += value if divisor else value * len(row_ids) / self.prompts
                divisors[name] += divisor[0] if divisor else 0.0
        for name, divisor in divisors.items():
            if divisor:  # rounded to float32, as the quotient of one micro-batch's two numbers would be
                result[name] = torch.tensor(result[name] / divisor, dtype=torch.float32).item()
        return result

    def not_finite(self) -> list[str]:
        """Rows of the micro-batches whose loss, as last read, is NaN or infinite."""
        bad = [row_ids for row_ids, kept in self.read_parts if not math.isfinite(kept["loss"][0])]
        return [row_id for row_ids in bad for row_id in row_ids]
