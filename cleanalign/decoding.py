"""How a batch of replies is decoded, token by token: the inside of `common.sample`.

    Decoder           all rows stand at the same token; a step can be captured as a CUDA graph
    DraftingDecoder   a mixture where kernels are launched one by one: the policy draws ahead, the
                      reference reads several tokens at once

Both draw row r's token t from the same uniform numbers, and so draw the same tokens, up to rounding.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers

from cleanalign.errors import UserError, require
from cleanalign.models import PREFILL_TOKENS, adapter_switch, backbone, head, head_logits, upload


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `n`, and at least 0."""
    return max(0, -(-n // multiple) * multiple)


def left_pad(prompts: list[list[int]], device, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both (G, P), prompts flush right, P a multiple of `multiple`. The padding id is 0:
    the mask keeps it from mattering."""
    P = round_up(max(map(len, prompts)), multiple)
    ids = torch.zeros(len(prompts), P, dtype=torch.long)
    mask = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, P - len(prompt) :] = torch.tensor(prompt)
        mask[i, P - len(prompt) :] = 1
    return upload(ids, device), upload(mask, device)


def resolve_decoding(decoding: str, device: torch.device) -> str:
    """`auto` is `graphs` on CUDA, else `eager`. Raises `UserError` for graphs elsewhere.

    eager launches the step's kernels one by one; graphs captures them once and launches them together;
    compiled also fuses them with `torch.compile` first, at the price of about a minute of compilation for a
    large model.
    """
    if decoding == "auto":
        return "graphs" if device.type == "cuda" else "eager"
    require(
        decoding == "eager" or device.type == "cuda",
        f"--decoding {decoding} needs a CUDA device, this is {device.type}. Leave it at auto.",
    )
    return decoding


def _grouped_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention of c tokens a row, (R, H, c, D), over its cache, (R, H_kv, L, D); returns (R, c, H, D).

    The query heads that share a key head become its queries, so that the cache is read once, not repeated H /
    H_kv times.
    """
    R, H, c, D = query.shape
    shared = H // key.shape[1]
    if c > 1:
        attention_mask = attention_mask.repeat(1, 1, shared, 1)  # (R, 1, shared · c, L)
    out = F.scaled_dot_product_attention(
        query.reshape(R, -1, shared * c, D), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(R, H, c, -1).transpose(1, 2), None


transformers.AttentionInterface.register("grouped", _grouped_attention)


@contextlib.contextmanager
def _attention_to_the_cache(model):
    """Context in which `model` attends by `_grouped_attention`,
    unless it caps its attention's scores (Gemma-2)."""
    config = backbone(model).config
    own = config._attn_implementation
    if getattr(config, "attn_logit_softcapping", None) is None:
        config._attn_implementation = "grouped"
    try:
        yield
    finally:
        config._attn_implementation = own


class StaticLayer(transformers.cache_utils.DynamicLayer):
    """One layer's keys and values in buffers that stay where
    they are; the new token's place in them is a tensor."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor):
        super().__init__()
        self.buffers, self.place, self.is_initialized = (keys, values), place, True

    def look_at(self, rows: int, length: int) -> None:
        """Work on the first `rows` rows and `length` places."""
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self.buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


# tokens between two looks at which rows finished; elsewhere 16, as each look waits for the device
CHECK_EVERY = {"cpu": 1}
# batch sizes worth a graph, as shares of the full one
LADDER = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)


class Decoder:
    """Decodes batch after batch in buffers of one size.

    A step feeds each row's last token and draws its next one. It reads and writes device tensors that stay
    where they are and asks the device nothing, so that the host runs ahead, and the step can be captured as a
    CUDA graph. Rows stand completion by completion, (K, G), the mixed ones first: a prompt's cache then
    reaches its rows by broadcasting, and the reference's are the first.
    """

    # kind of cache; places in it beyond prompt and reply; may a step ask the device?
    layer, spare, waits = (StaticLayer, 0, False)

    def __init__(self, members, beta, unmixed, G, K, longest_prompt, T, ends, temperature, top_p, decoding):
        self.members, self.beta, self.temperature, self.top_p = members, beta, temperature, top_p
        device = head(members[0])[0].device
        self.decoding = resolve_decoding(decoding, device)
        self.check_every = CHECK_EVERY.get(device.type, 16)
        # the cache is read up to a multiple of so many places
        self.granule = 16 if self.decoding == "eager" else 128
        self.forwards = [
            torch.compile(backbone(m), dynamic=True) if self.decoding == "compiled" else backbone(m)
            for m in members
        ]
        # completions with and without the mixture
        self.kinds = (K - unmixed, unmixed) if len(members) == 2 else (0, K)
        self.full = tuple(G * k for k in self.kinds)  # and rows
        self.caches: list = [None for _ in members]  # made by the first prefill, which knows their shapes
        R, self.L = G * K, round_up(longest_prompt + T - 1 + self.spare, self.granule)

        def integers(*shape):
            return torch.zeros(*shape, dtype=torch.long, device=device)

        # of each row: its output row, its last token, that token's position, whether it has ended
        self.row, self.token, self.position = integers(R), integers(R), integers(R)
        self.finished = torch.zeros(R, dtype=torch.bool, device=device)
        dtype = head(members[0])[0].dtype
        # added to the attention's scores
        self.mask = torch.zeros(R, 1, 1, self.L, dtype=dtype, device=device)
        # what moves when rows leave the batch
        self.by_row = [self.row, self.token, self.position, self.finished, self.mask]
        # the next token's place in the cache; how many were drawn
        self.place, self.t = (integers(1), integers(1))
        # by output row
        self.tokens = integers(R, T)
        self.uniforms = torch.zeros(R, T, 2 * len(members) - 1, device=device)
        self.ends = torch.tensor(ends, device=device)
        self.agreement = integers(2)  # tokens at which both models' favourites agree; all tokens
        self.seen, self.graphs, self.pool = set(), {}, None
        self.begin()

    def begin(self) -> None:
        """Count anew: what a call of `common.sample` reports is its own."""
        self.agreement.zero_()
        self.warmup_seconds, self.met = 0.0, len(self.seen)

    def bytes(self) -> int:
        """Bytes of its caches and masks."""
        buffers = [b for cache in self.caches if cache for layer in cache.layers for b in layer.buffers]
        return sum(x.nbytes for x in [*buffers, self.mask])

    def decode(self, prompts: list[list[int]], uniforms: torch.Tensor) -> list[list[list[int]]]:
        """Replies to G prompts, [prompt][completion][token]; uniforms (G, K, T, 1), or for a mixture (G, K,
        T, 3)."""
        G, K, T, _ = uniforms.shape
        order = [*range(K - self.kinds[0], K), *range(K - self.kinds[0])]  # of the completions
        device = self.token.device
        self.uniforms[: G * K] = upload(uniforms[:, order].transpose(0, 1).flatten(0, 1), device)
        self.tokens.fill_(-1)
        self.row[: G * K] = torch.arange(G * K, device=device)
        self.finished.zero_()
        self.t.zero_()
        sizes = tuple(G * k for k in self.kinds)
        self._continue(sizes, self._prefill(prompts, sizes), T)
        replies = [[i for i in reply if i >= 0] for reply in self.tokens[: G * K].tolist()]
        return [[replies[order.index(k) * G + g] for k in range(K)] for g in range(G)]

    def _continue(self, sizes, P: int, T: int) -> None:
        """From each row's first token to its last: all rows stand at the same token."""
        for t in range(1, T):
            if t % self.check_every == 0:
                left = self._left(sizes)
                if not any(left):
                    break
                sizes = self._shrink(sizes, left, P + t)
            self._advance(sizes, round_up(P + t, self.granule))

    def _left(self, sizes) -> tuple[int, int]:
        """How many rows of either kind have not finished; waits for the device."""
        finished = self.finished[: sum(sizes)].tolist()
        return finished[: sizes[0]].count(False), finished[sizes[0] :].count(False)

    def _prefill(self, prompts, sizes) -> int:
        """Run each prompt once, copy its cache to its rows, draw the first tokens; returns the padded
        prompts' length P."""
        ids, mask = left_pad(prompts, self.token.device)  # (G, P)
        G, P = ids.shape
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        last = []
        for i, member in enumerate(self.members):
            K = sum(sizes) // G if i == 0 else self.kinds[0]
            hidden = []
            for start in range(0, G, max(1, PREFILL_TOKENS // P)):
                part = slice(start, start + max(1, PREFILL_TOKENS // P))
                cache = transformers.DynamicCache()
                with adapter_switch(member):
                    out = backbone(member)(
                        input_ids=ids[part],
                        attention_mask=mask[part],
                        position_ids=positions[part],
                        past_key_values=cache,
                        use_cache=True,
                    )
                hidden.append(out.last_hidden_state[:, -1].clone())  # a view would keep all of them
                if self.caches[i] is None:
                    self.caches[i] = self._new_cache(cache, rows=sum(self.full) if i == 0 else self.full[0])
                for static, layer in zip(self.caches[i].layers, cache.layers, strict=True):
                    for buffer, new in zip(static.buffers, (layer.keys, layer.values), strict=True):
                        buffer[: K * G].unflatten(0, (K, G))[:, part, :, :P] = new
                del cache, out, layer, new  # before the next part makes its own
            last.append(torch.cat(hidden).repeat(K, 1))  # (K·G, D)
        blocked = torch.finfo(self.mask.dtype).min
        self.mask.fill_(blocked)
        K = sum(sizes) // G
        self.mask[: K * G].view(K, G, self.L)[:, :, :P] = (1 - mask).to(self.mask.dtype) * blocked
        self.position[: K * G] = mask.sum(1).repeat(K)
        self.place.fill_(P)
        self._draw(sizes, last)
        return P

    def _new_cache(self, like: transformers.DynamicCache, rows: int) -> transformers.Cache:
        """An empty cache for `rows` rows, with the heads that a prefill's cache has."""
        layers = []
        for old in like.layers:
            buffers = [x.new_zeros(rows, x.shape[1], self.L, x.shape[3]) for x in (old.keys, old.values)]
            layers.append(self.layer(*buffers, self.place))
        return transformers.Cache(layers=layers)

    def _advance(self, sizes, length: int) -> None:
        """One step: a shape of the batch runs as it is when first met, which warms it up, and from the second
        time on as a graph."""
        shape = (*sizes, length)
        if self.decoding == "eager":
            self._step(sizes, length)
        elif shape in self.graphs:
            self.graphs[shape]()
        else:
            self._wait()
            start = time.perf_counter()
            if shape not in self.seen:
                self.seen.add(shape)
                self._step(sizes, length)
                self._wait()
            else:
                self.graphs[shape] = self._capture(lambda: self._step(sizes, length))
            self.warmup_seconds += time.perf_counter() - start
            if shape in self.graphs:
                self.graphs[shape]()

    def _wait(self) -> None:
        if self.token.device.type == "cuda":
            torch.cuda.synchronize()

    def _capture(self, step: Callable) -> Callable:
        """Record `step`, without running it, as a CUDA graph; returns what replays it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"this model's decode step cannot be captured as a CUDA graph ({error}). Use --decoding "
                "eager."
            ) from error
        # graphs run one after the other: they share the memory of their intermediate results
        self.pool = graph.pool()
        return graph.replay

    def _step(self, sizes, length: int) -> None:
        """Feed every row's last token and draw its next: only kernels on tensors that stay where they are."""
        rows = (sum(sizes), sizes[0])
        self.mask[: rows[0]].index_fill_(3, self.place, 0.0)
        last = []
        for member, forward, cache, n in zip(self.members, self.forwards, self.caches, rows, strict=False):
            if n == 0:  # every row of the mixture has finished
                break
            for layer in cache.layers:
                layer.look_at(n, length)
            with adapter_switch(member), _attention_to_the_cache(member):
                out = forward(
                    input_ids=self.token[:n, None],
                    attention_mask=self.mask[:n, :, :, :length],
                    position_ids=self.position[:n, None],
                    past_key_values=cache,
                    use_cache=True,
                )
            last.append(out.last_hidden_state[:, -1])
        self.place += 1
        self.position += 1
        self._draw(sizes, last)

    def _draw(self, sizes, last: list[torch.Tensor]) -> None:
        """Each row's next token from the members' last hidden
        states, (R, D) and, of the mixed rows, (M, D)."""
        R, M = sum(sizes), sizes[0]
        row, active = self.row[:R], ~self.finished[:R]
        logits = next_logits(self.members[0], last[0], self.temperature)  # (R, V)
        uniforms = self.uniforms[row, self.t]  # (R, 1 or 3)
        token = self._choose(logits, uniforms[:, 0])
        if M:
            token[:M], agree = self._correct(token[:M], logits[:M], last[1], uniforms[:M])
            self.agreement += torch.stack([(agree & active[:M]).sum(), active[:M].sum()])
        self.tokens[row, self.t] = token.masked_fill(~active, -1)
        self.token[:R] = token
        self.finished[:R] |= (token[:, None] == self.ends).any(1)
        self.t += 1

    def _choose(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Tokens (R,) from logits (R, V) and uniform numbers (R,)."""
        return (
            logits.argmax(-1) if self.temperature == 0 else inverse_cdf(nucleus(logits, self.top_p), uniforms)
        )

    def _correct(self, token, of_policy, last, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixture's tokens (M,), from the policy's `token` (M,) and logits (M, V), the reference's last
        hidden states (M, D) and uniforms (M, 3); and where both models favour the same token, (M,)."""
        of_reference = next_logits(self.members[1], last, self.temperature)
        agree = of_policy.argmax(-1) == of_reference.argmax(-1)
        mixed = of_policy.lerp(of_reference, self.beta)  # up to a constant, the log of π^(1−β) π_ref^β
        if self.temperature == 0:
            return mixed.argmax(-1), agree
        source, target = nucleus(of_policy, self.top_p), nucleus(mixed, self.top_p)
        return accept_or_redraw(token, source, target, uniforms[:, 1], uniforms[:, 2], self.waits), agree

    def _shrink(self, sizes, left, used: int) -> tuple[int, int]:
        """Drop finished rows, all of them or, with graphs, down
        to a size worth one; returns the sizes that remain."""
        smaller = left
        if self.decoding != "eager":
            share = min(
                s for s in LADDER if all(math.ceil(f * s) >= n for f, n in zip(self.full, left, strict=True))
            )
            smaller = tuple(min(n, math.ceil(f * share)) for f, n in zip(self.full, sizes, strict=True))
        if sum(smaller) > 0.9 * sum(sizes):  # copying the caches costs; a few idle rows cost less
            return sizes
        M, n = sizes[0], sum(sizes)

        def unfinished(finished, count):  # the first so many, in their order
            return finished.byte().argsort(stable=True)[:count]

        keep = torch.cat(
            [unfinished(self.finished[:M], smaller[0]), M + unfinished(self.finished[M:n], smaller[1])]
        )
        for state in self.by_row:
            state[: len(keep)] = state[keep]
        for cache, rows in zip(self.caches, (keep, keep[: smaller[0]]), strict=False):
            for buffer in (buffer for layer in cache.layers for buffer in layer.buffers):
                buffer[: len(rows), :, :used] = buffer[rows, :, :used]
        return smaller


class RaggedLayer(StaticLayer):
    """One layer's keys and values, where each row's new tokens have places of their own."""

    def look_at(self, rows: int, length: int, places: torch.Tensor) -> None:
        """Work on the first `rows` rows and `length` places; the new tokens' are `places`, (rows, c)."""
        super().look_at(rows, length)
        self.place = torch.arange(rows, device=places.device)[:, None], slice(None), places

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[self.place] = key_states.transpose(1, 2)
        self.values[self.place] = value_states.transpose(1, 2)
        return self.keys, self.values


LONGEST_DRAFT = 16  # tokens


class DraftingDecoder(Decoder):
    """Decodes a mixture with few forward passes of the reference, where these cost more than their arithmetic
    (a CPU reads all weights in each).

    The policy drafts c tokens of every row; the reference reads the mixed rows' drafts in one pass; a mixed
    row keeps them up to the first that `accept_or_redraw` changes. This is speculative decoding (arXiv
    2211.17192) where the target is the mixture and the draft model is part of it, and the tokens are those of
    `Decoder`. If a share a of the drafts stands, a row gains (1 − aᶜ) / (1 − a) tokens in c + 1 passes, most
    at about c = √(2 / (1 − a)); a batch waits for its slowest row, hence c = √(1 / (1 − a)). Rows come to
    stand at different tokens.
    """

    layer, spare, waits = RaggedLayer, LONGEST_DRAFT, True

    def __init__(self, members, *args):
        super().__init__(members, *args)
        self.drawn = torch.ones_like(self.row)  # tokens that the row has
        self.by_row.append(self.drawn)

    def begin(self) -> None:
        super().begin()
        self.accepted, self.compared = 0, 0  # drafts of mixed rows

    def _continue(self, sizes, P: int, T: int) -> None:
        self.drawn.fill_(1)
        self.finished |= self.drawn == T  # a reply of one token is whole
        while any(left := self._left(sizes)):
            n = sum(sizes)
            sizes = self._shrink(sizes, left, P + int(self.drawn[:n].max()))
            remaining = T - int(self.drawn[: sum(sizes)].masked_fill(self.finished[: sum(sizes)], T).min())
            # 1 / (1 − a), taken for 30 to begin with
            certainty = (30 + self.compared) // (1 + self.compared - self.accepted)
            c = min(LONGEST_DRAFT, remaining, math.isqrt(certainty))
            self._round((sizes[0] if left[0] else 0, sum(sizes)), c, P, T)

    def _round(self, rows: tuple[int, int], c: int, P: int, T: int) -> None:
        """Draft up to c tokens of all R rows, of which the first
        M are mixed, correct those, and keep what stands."""
        M, R = rows
        row, drawn, active = self.row[:R, None], self.drawn[:R, None], ~self.finished[:R, None]
        # (R, c, 3)
        uniforms = self.uniforms[row, (drawn + torch.arange(c, device=row.device)).clamp(max=T - 1)]
        fed, hidden = [self.token[:R]], []
        ended = self.finished[:R]
        for j in range(c):
            hidden.append(self._feed(0, fed[-1][:, None], drawn - 1 + j, P))  # (R, 1, D)
            logits = next_logits(self.members[0], hidden[-1][:, 0], self.temperature)  # (R, V)
            fed.append(self._choose(logits, uniforms[:, j, 0]))
            ended = ended | torch.isin(fed[-1], self.ends) | (drawn[:, 0] + j + 1 >= T)
            if ended.all():
                break
        c = len(hidden)
        draft, k = torch.stack(fed[1:], 1), torch.arange(c, device=row.device)  # (R, c)
        right, agree = torch.ones_like(draft, dtype=torch.bool), torch.zeros_like(draft[:M], dtype=torch.bool)
        if M:
            of_reference = self._feed(1, torch.stack(fed[:-1], 1)[:M], drawn[:M] - 1 + k, P)  # (M, c, D)
            of_policy = torch.cat(hidden, 1)[:M]  # (M, c, D)
            corrected, agree = self._correct_drafts(
                draft[:M], of_policy, of_reference, uniforms[:M, :c], max(64, R)
            )
            right[:M] = corrected == draft[:M]
            draft[:M] = corrected

        def before(x):  # how many at earlier tokens of the row
            return x.cumsum(1) - x.long()

        ends = torch.isin(draft, self.ends)
        # a prefix of the row, (R, c)
        keep = active & (before(~right) == 0) & (before(ends) == 0) & (drawn + k < T)
        self.tokens[row.expand(R, c)[keep], (drawn + k)[keep]] = draft[keep]
        self.agreement += torch.stack([(agree & keep[:M]).sum(), keep[:M].sum()])
        self.accepted += int((right & keep)[:M].sum())
        self.compared += int(keep[:M].sum())
        kept = keep.sum(1)
        self.token[:R] = draft.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        self.drawn[:R] += kept
        self.finished[:R] |= (ends & keep).any(1) | (self.drawn[:R] >= T)

    def _correct_drafts(self, draft, of_policy, of_reference, uniforms, most: int):
        """`_correct` of (M, c) drafts from hidden states (M, c, D) and uniforms (M, c, 3), the logits of at
        most so many tokens at a time; returns tokens and agreement, (M, c) each."""
        columns = [x.flatten(0, 1).split(most) for x in (draft, of_policy, of_reference, uniforms)]
        tokens, agree = [], []
        for drafted, policy, reference, numbers in zip(*columns, strict=True):
            logits = next_logits(self.members[0], policy, self.temperature)
            corrected, same = self._correct(drafted, logits, reference, numbers)
            tokens.append(corrected)
            agree.append(same)
        return torch.cat(tokens).view_as(draft), torch.cat(agree).view_as(draft)

    def _feed(self, i: int, ids: torch.Tensor, t: torch.Tensor, P: int) -> torch.Tensor:
        """Last hidden states (R, c, D) of member i, fed with every row's tokens (R, c) number t (R, c),
        behind P places of the prompt."""
        R, member = len(ids), self.members[i]
        places, length = P + t, round_up(P + int(t.max()) + 1, self.granule)
        new = torch.arange(length, device=ids.device)
        visible = (new >= P) & (new <= places[:, None, :, None])  # (R, 1, c, L)
        for layer in self.caches[i].layers:
            layer.look_at(R, length, places)
        with adapter_switch(member), _attention_to_the_cache(member):
            out = self.forwards[i](
                input_ids=ids,
                attention_mask=self.mask[:R, :, :, :length].masked_fill(visible, 0.0),
                position_ids=self.position[:R, None]
                + t.clamp(max=self.tokens.shape[1] - 2),  # a draft may go on behind the reply's end
                past_key_values=self.caches[i],
                use_cache=True,
            )
        return out.last_hidden_state


class Decoders:
    """Decoders that outlive a call of `common.sample`: a step that samples as the last one did finds their
    caches and captured graphs ready. One for each way to sample; another shape takes its place.

    `longest` tokens have the prompts to come, at the most: caches are made for them.
    """

    def __init__(self, longest: int = 0):
        self.longest = longest
        self.kept: dict[tuple, tuple[tuple, Decoder]] = {}

    def get(self, kind: type[Decoder], members: list, completions: tuple[int, int], *shape) -> Decoder:
        """The decoder of this kind for these models, (mixed, all) `completions` and other arguments."""
        way, rest = (kind, *map(id, members), completions), tuple(map(str, shape))
        kept, decoder = self.kept.pop(way, (None, None))
        if kept != rest:
            decoder = None  # first: its memory is for the new one
            beta, unmixed, G, K, *others = shape
            decoder = kind(members, beta, unmixed, G, K, *others)
        decoder.begin()
        self.kept[way] = rest, decoder
        return decoder

    def bytes(self) -> int:
        """Bytes of all caches that are kept."""
        return sum(decoder.bytes() for _, decoder in self.kept.values())

    def clear(self) -> None:
        """Give them back."""
        self.kept.clear()


def next_logits(model, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """Next-token logits (R, V), float32, divided by the temperature, of last hidden states (R, D)."""
    return head_logits(hidden, *head(model)).float().div_(temperature or 1.0)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities (R, V), normalised, of the smallest set of tokens that holds top_p; all of them at 1."""
    probs = logits.softmax(-1)
    if top_p == 1.0:
        return probs
    ordered, index = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # a token stays if the mass before it is below top_p
    probs = torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(outside, 0.0))
    return probs / probs.sum(-1, keepdim=True)


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw: (R, V) probabilities, up to a
    factor, and (R,) uniforms in [0, 1) to (R,) token ids."""
    cdf = probs.cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms[:, None] * cdf[:, -1:]), right=True)[:, 0]
    return token.clamp(max=probs.shape[-1] - 1)


def accept_or_redraw(
    draft: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    accept: torch.Tensor,
    redraw: torch.Tensor,
    waits: bool = True,
) -> torch.Tensor:
    """Turn draws from one distribution into draws from another that differ as rarely as can be: with
    probability ½ Σ |target − source|.

    A draft stands with probability min(1, target / source); else it is redrawn from the part of target above
    source. This is the test of speculative decoding (arXiv 2211.17192, Algorithm 1 and Theorem 3.5).

    Args:
        draft: (R,) token ids drawn from `source`.
        source, target: (R, V) probabilities.
        accept, redraw: (R,) uniform numbers in [0, 1), independent of each other and of the draft.
        waits: ask the device which rows to redraw; False computes all, which a CUDA graph can do.

    Returns: (R,) token ids, distributed as `target`.
    """
    of_source, of_target = (probs.gather(-1, draft[:, None])[:, 0] for probs in (source, target))  # (R,)
    stands = accept * of_source < of_target
    rows = (~stands).nonzero()[:, 0] if waits else slice(None)
    drawn = draft.clone()
    drawn[rows] = inverse_cdf((target[rows] - source[rows]).clamp(min=0), redraw[rows])
    return torch.where(stands, draft, drawn)
