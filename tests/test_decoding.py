"""The decode step as a GPU runs it, checked without one: recorded once, then replayed with every number of
the host frozen."""

import contextlib
import copy
import functools
import json
import weakref

import pytest
import tiny
import torch
import transformers
from running import start
from test_sampling import END, PROMPTS, V, numbers, replay
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import afd
import common
import experiment
import nash_md
import selm
from cleanalign import decoding
from cleanalign.command_line import saved_args
from cleanalign.errors import UserError
from cleanalign.models import (
    PREFILL_TOKENS,
    LoraReference,
    base_model,
    choose_sample_rows,
    load_model,
    make_trainable,
)
from cleanalign.run import Run

# these wait for the device, or copy from the host
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal"}
WAITS |= {"_unique2"}


class Recorder(TorchDispatchMode):
    """Records every kernel with the tensors it worked on; refuses those for which a GPU's host would wait."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        assert kernel.overloadpacket.__name__ not in WAITS, f"{kernel} waits for the device"
        if kernel.overloadpacket.__name__.startswith("index"):
            assert not any(
                x.dtype == torch.bool
                for x in torch.utils._pytree.tree_leaves(args[1:])
                if isinstance(x, torch.Tensor) and x.ndim
            )
        out = kernel(*args, **(kwargs or {}))
        self.calls.append((kernel, args, kwargs or {}, out))
        return out

    def replay(self):
        """The same kernels again, on the same tensors; intermediate results are computed anew."""
        now = {}
        for kernel, args, kwargs, out in self.calls:
            new = lambda x: now.get(id(x), x)  # noqa: E731
            result = kernel(
                *tree_map_only(torch.Tensor, new, args), **tree_map_only(torch.Tensor, new, kwargs)
            )
            for old, fresh in zip(*(torch.utils._pytree.tree_leaves(x) for x in (out, result)), strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = fresh


@pytest.fixture
def graphs(monkeypatch):
    """Decoding by recorded steps, and the list of what was recorded."""
    recorders = []

    def capture(self, step):
        state = [
            self.row,
            self.token,
            self.position,
            self.finished,
            self.mask,
            self.place,
            self.t,
            self.tokens,
            self.agreement,
        ]
        state += [buffer for cache in self.caches for layer in cache.layers for buffer in layer.buffers]
        before = [x.clone() for x in state]
        recorders.append(Recorder())
        with recorders[-1]:
            step()
        for x, kept in zip(state, before, strict=True):
            x.copy_(kept)  # capturing does not run the step
        return recorders[-1].replay

    monkeypatch.setattr(decoding.Decoder, "_capture", capture)
    for module in (common, decoding):  # the sampler asks, and the decoder
        monkeypatch.setattr(module, "resolve_decoding", lambda way, device: "eager" if way == "auto" else way)
    return recorders


@pytest.mark.parametrize("ask", [torch.Tensor.item, float, bool, torch.nonzero], ids=lambda f: f.__name__)
def test_a_recorder_sees_every_way_to_ask(ask):
    """Under inference mode `.item()` arrives as another kernel than without."""
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), pytest.raises(AssertionError, match="waits for the device"), Recorder():
            ask(torch.ones(1))


@pytest.fixture(scope="module")
def models():
    return tiny.model(V, seed=1), tiny.model(V, seed=2)


def lora_pair(world):
    """A LoRA policy whose adapter has moved, and its reference."""
    policy = make_trainable(load_model(f"{world}/model", torch.float32, torch.device("cpu")), 4, 8, False)
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return policy, LoraReference(policy)


@pytest.mark.parametrize("every", [1, 4, 100])
@pytest.mark.parametrize(
    "case",
    [
        "one model",
        "mixture",
        "mixture beside unmixed",
        "lora mixture",
        "greedy",
        "greedy mixture",
        "top-p",
        "top-p mixture",
    ],
)
def test_recorded_steps_draw_the_same_tokens(models, world, graphs, monkeypatch, case, every):
    policy, reference = lora_pair(world) if "lora" in case else models
    settings = dict(completions=5, max_new_tokens=30, seed=5, max_rows=25)
    if "mixture" in case:
        settings["mixture"] = (reference, 0.3)
    special = {
        "mixture beside unmixed": {"unmixed": 2},
        "greedy": {"temperature": 0},
        "top-p": {"top_p": 0.8},
    }
    settings |= special.get(case.removesuffix(" mixture"), {})
    prompts = [*PROMPTS, [6, 6, 6, 6, 6, 7, 8], [11], [12, 4, 5]]
    plain, ours = {}, {}
    expected = common.sample(policy, prompts, [END, 7], stats=plain, **settings)
    assert ("mixture" in case) == ("draft_acceptance" in plain)
    plain.pop("draft_acceptance", None)
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", every)
    assert common.sample(policy, prompts, [END, 7], stats=ours, decoding="graphs", **settings) == expected
    assert graphs and sum(len(recorder.calls) for recorder in graphs) > 100
    assert plain.pop("warmup_seconds") == plain.pop("warmup_steps") == 0 < ours.pop("warmup_seconds")
    assert ours.pop("warmup_steps") >= len(graphs)
    assert ours == plain


def test_a_compiled_step_is_one_graph_and_draws_the_same_tokens(models, graphs, monkeypatch):
    """Without a code generator, which tests need not have: what `torch.compile` makes of Python is what could
    go wrong here."""
    compile_step = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_step)
    monkeypatch.setattr(decoding.Decoder, "_capture", lambda self, step: step)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = dict(completions=5, max_new_tokens=8, seed=5, mixture=(models[1], 0.3), unmixed=2)
    expected = common.sample(models[0], PROMPTS, [END, 7], **settings)
    assert common.sample(models[0], PROMPTS, [END, 7], decoding="compiled", **settings) == expected
    # for both models and every batch shape
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def near(model, scale):
    """A copy of `model` whose weights are a little off."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * weight.std().nan_to_num(), alpha=scale)
    return other


@pytest.mark.parametrize("longest", [1, 2, 16])
@pytest.mark.parametrize("scale", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("ends", [[END], [END, 7, 8, 9]])
def test_drafts_end_in_the_tokens_of_one_token_at_a_time(models, graphs, monkeypatch, scale, longest, ends):
    """References near and far, so that drafts stand, fall at once, or fall half-way; the decoder of graphs
    does not draft."""
    reference = near(models[0], scale)
    settings = dict(completions=5, max_new_tokens=40, seed=5, mixture=(reference, 0.4), unmixed=2)
    plain, ours = {}, {}
    expected = common.sample(models[0], PROMPTS, ends, stats=plain, decoding="graphs", **settings)
    monkeypatch.setattr(decoding, "LONGEST_DRAFT", longest)
    assert common.sample(models[0], PROMPTS, ends, stats=ours, **settings) == expected
    assert ours["agreement"] == plain["agreement"] and ours["tokens"] == plain["tokens"]
    assert (ours["draft_acceptance"] == 1.0) == (scale == 0)


def test_drafts_save_passes_of_the_reference(models):
    """49 tokens drawn after the first: one pass of a like-minded reference for up to 16, and no more passes
    than tokens of a stranger."""
    passes = []

    def counted(model):
        other = copy.deepcopy(model)
        other.model.register_forward_hook(
            lambda module, args, kwargs, out: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        return other

    settings = dict(max_new_tokens=50, seed=5)
    replies = common.sample(models[0], PROMPTS, [], mixture=(counted(models[0]), 0.4), **settings)
    assert all(len(reply) == 50 for (reply,) in replies)
    assert sum(passes[1:]) == 49 and len(passes) <= 8  # the first is the prompt's
    passes.clear()
    common.sample(models[0], PROMPTS, [], mixture=(counted(tiny.model(V, seed=9)), 1 - 1e-6), **settings)
    assert 49 / 4 < len(passes) - 1 <= 49


def test_rows_that_finished_leave_the_batch(models, graphs, monkeypatch):
    """Batches get smaller down the ladder, and a batch of which every row has finished stops."""
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", 2)
    shapes = []
    step = decoding.Decoder._step
    monkeypatch.setattr(
        decoding.Decoder,
        "_step",
        lambda self, sizes, length: (shapes.append(sum(sizes)), step(self, sizes, length))[1],
    )
    prompts = [[5, 6, 7]] * 64
    replies = common.sample(
        models[0], prompts, [END, 7, 8, 9, 10, 11], max_new_tokens=200, seed=0, decoding="graphs"
    )
    longest = max(len(group[0]) for group in replies)
    assert longest < 60  # so that 200 was not needed
    assert shapes[0] == 64 and shapes[-1] <= 8 and set(shapes) <= {64, 48, 32, 24, 16, 12, 8, 4}


def test_prompts_prefilled_in_parts(models, monkeypatch):
    settings = dict(completions=3, max_new_tokens=8, seed=5, mixture=(models[1], 0.4))
    whole = common.sample(models[0], PROMPTS, [END], **settings)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 8)
    assert common.sample(models[0], PROMPTS, [END], **settings) == whole


@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing_does_not_cost_the_cache(world, rank):
    """transformers drops the cache in training mode with checkpointing on, and would see no prompt."""
    device = torch.device("cpu")
    plain = load_model(f"{world}/model", torch.float32, device)
    expected = common.sample(plain, PROMPTS, [END], max_new_tokens=8, seed=1)
    policy = make_trainable(
        load_model(f"{world}/model", torch.float32, device), rank, 8, gradient_checkpointing=True
    )
    assert common.sample(policy, PROMPTS, [END], max_new_tokens=8, seed=1) == expected
    # `completion_logprobs` alone enters training mode, where a gradient is wanted
    assert not base_model(policy).training


SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
)
FAMILIES = {
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=14)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SHAPE,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=14,
            attn_logit_softcapping=1.0,
            query_pre_attn_scalar=8,
        )
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=16)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SHAPE, num_key_value_heads=4, sliding_window=14)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHAPE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16)
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_against_no_cache(graphs, family, implementation):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # sharp attention, distributions far from uniform
            sharp = any(
                part in name
                for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value", "embed", "lm_head")
            )
            weight.mul_(25 if sharp else 4)
    with contextlib.suppress(ValueError):  # a family without sdpa keeps eager
        model.set_attn_implementation(implementation)
    uniforms = numbers(5, len(PROMPTS), 2, 8)
    expected = [
        [replay(model, prompt, uniforms[i, k], 8) for k in range(2)] for i, prompt in enumerate(PROMPTS)
    ]
    for way in ("eager", "graphs"):
        assert (
            common.sample(model, PROMPTS, [END], completions=2, max_new_tokens=8, seed=5, decoding=way)
            == expected
        )
    assert model.config._attn_implementation in ("sdpa", "eager")  # as before


def test_a_sliding_window_that_would_bind_is_refused(models):
    model = FAMILIES["mistral"]()
    with pytest.raises(UserError, match="15 tokens are longer than its attention's sliding window of 14"):
        common.sample(model, PROMPTS, [END], max_new_tokens=9, seed=0)
    with pytest.raises(UserError, match="sliding window"):
        choose_sample_rows(8, [model], 15)
    models[0].config.layer_types = ["full_attention", "linear_attention"]
    try:
        with pytest.raises(UserError, match="layers of type linear_attention"):
            common.sample(models[0], PROMPTS, [END], max_new_tokens=4, seed=0)
    finally:
        models[0].config.layer_types = None


def test_graphs_need_cuda(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(selm, *flags, "--decoding=graphs", "--run-name=x")
    assert stop.value.code == 2 and "--decoding graphs needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_rows_at_once_fill_the_free_memory(models, monkeypatch):
    """The formula's bytes for a row are those of the caches and logits that a row has."""
    policy, reference = models
    assert choose_sample_rows(0, [policy], 40) == 64 and choose_sample_rows(5, [policy], 40) == 5
    layers, heads, width = 2, 2, 8
    row = 2 * (2 * layers * heads * width * 40 * 4 + 24 * V)
    fixed = PREFILL_TOKENS * (4 * (32 + 64) + 2 * layers * heads * width) * 4
    monkeypatch.setattr("cleanalign.models.free_memory", lambda device: (fixed + 100 * row) / 0.85 + 1)
    policy.requires_grad_(False)
    # room for 100 rows; 96 is a multiple of 8
    assert choose_sample_rows(0, [policy, reference], 40) == 96
    decoder = decoding.Decoder([policy, reference], 0.5, 0, 4, 1, 33, 8, [END], 1.0, 1.0, "eager")
    decoder.decode(PROMPTS, torch.zeros(4, 1, 8, 3))
    buffers = [b for cache in decoder.caches for layer in cache.layers for b in layer.buffers]
    places = buffers[0].shape[2]
    assert sum(b.numel() * 4 for b in buffers) == 4 * (row - 2 * 24 * V) * places // 40
    policy.requires_grad_(True)
    assert choose_sample_rows(0, [policy, reference], 40) < 96  # room for the optimiser


def test_the_prefill_holds_one_part_at_a_time(models, monkeypatch):
    """A part's cache and hidden states are gone when the next part runs."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 8)
    alive, most = [], []
    plain = transformers.LlamaModel.forward

    def forward(self, *args, **kwargs):
        if not isinstance(kwargs["past_key_values"].layers, list) or kwargs["input_ids"].shape[1] > 1:
            most.append(sum(ref() is not None for ref in alive))
        out = plain(self, *args, **kwargs)
        alive.append(weakref.ref(out.last_hidden_state.untyped_storage()))
        alive.append(weakref.ref(kwargs["past_key_values"]))
        return out

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    common.sample(models[0], PROMPTS, [END], max_new_tokens=1, seed=5)
    assert len(most) > 1 and max(most) == 0


@pytest.mark.parametrize("rank", [0, 4])
def test_stages_count_the_optimiser(world, flags, monkeypatch, rank):
    """afd.py's and spin.py's rows are chosen beside what their optimiser will hold."""
    counted = []
    monkeypatch.setattr(
        "experiment.choose_sample_rows",
        lambda rows, members, *_: counted.append(sum(p.requires_grad for p in members[0].parameters())) or 64,
    )
    args = afd.Args(model=f"{world}/model", judge=f"{world}/judges.py:goodness", device="cpu", lora_rank=rank)
    experiment.set_up_stages("afd", args)
    assert counted[0] > 0


def test_the_choice_is_stored_and_kept(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("cleanalign.models.free_memory", lambda device: 400e6)
    chosen = []
    plain = choose_sample_rows
    monkeypatch.setattr("experiment.choose_sample_rows", lambda *a: (chosen.append(plain(*a)), chosen[-1])[1])
    start(selm, *flags, "--sample-rows=0", "--num-prompts=8", "--iterations=1", "--run-name=x")
    assert json.loads((tmp_path / "x" / "args.json").read_text())["args"]["sample_rows"] == chosen[0] > 64
    monkeypatch.setattr("cleanalign.models.free_memory", lambda device: 1)
    assert saved_args(selm.Args, tmp_path / "x").sample_rows == chosen[0]


def test_warmup_does_not_blur_tokens_per_second():
    run = Run("selm", selm.Args(), 1)
    run.phases["sampling"]["seconds"] = 3.0
    run.add_tokens("sampling", 100)
    run.set_apart("sampling", "decoder warm-up", 1.0)
    assert (
        run.throughput() == {"tokens_per_second/sampling": 50.0}
        and run.phases["decoder warm-up"]["seconds"] == 1.0
    )


def test_rows_are_chosen_for_a_config_without_inner_width(monkeypatch):
    """GPT-2's: the recipe of that name decodes on a GPU too."""
    monkeypatch.setattr("cleanalign.models.free_memory", lambda device: 400e6)
    config = transformers.GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert choose_sample_rows(0, [transformers.GPT2LMHeadModel(config)], 40) >= 8


@pytest.mark.parametrize("way", ["eager", "graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_decoders_draw_the_same_tokens(graphs, dtype, way):
    """Call after call, bit for bit, with weights that change in between; buffers and graphs are made once."""
    policy, reference = tiny.model(V, seed=1).to(dtype), tiny.model(V, seed=2).to(dtype)
    decoders = decoding.Decoders(longest=9)
    batches = [PROMPTS, [[6, 7, 8], [5], [9], [10, 11, 4, 4, 4, 4, 4, 4, 4]], [[5, 4], [7], [8, 4], [9]]]
    made = []
    for seed, prompts in enumerate(batches):
        for settings in (dict(mixture=(reference, 0.3), unmixed=1, completions=3), dict(completions=2)):
            settings |= dict(max_new_tokens=30, seed=seed, decoding=way, max_rows=64)
            plain, ours = {}, {}
            expected = common.sample(policy, prompts, [END, 7], stats=plain, **settings)
            assert (
                common.sample(policy, prompts, [END, 7], stats=ours, decoders=decoders, **settings)
                == expected
            )
            for stats in (plain, ours):
                del stats["warmup_seconds"], stats["warmup_steps"]
            assert ours == plain
        made.append([id(decoder) for _, decoder in decoders.kept.values()])
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.01)
    assert len(made[0]) == 2 and made[0] == made[1] == made[2]
    assert decoders.bytes() > 0
    common.sample(policy, PROMPTS[:2], [END], max_new_tokens=30, completions=2, seed=0, decoders=decoders)
    assert len(decoders.kept) == 2  # another shape took its place
    decoders.clear()
    assert decoders.bytes() == 0


@pytest.mark.parametrize("free,kept", [(2**40, True), (2**10, False)])
def test_decoders_are_given_back_where_training_has_no_room(flags, monkeypatch, capsys, tmp_path, free, kept):
    """The log says which, once; the run's numbers do not depend on it."""
    monkeypatch.setattr("experiment.free_memory", lambda device: free)
    sizes = []
    step = nash_md.train_step
    monkeypatch.setattr(
        nash_md, "train_step", lambda exp, *a: sizes.append(exp.decoders.bytes()) or step(exp, *a)
    )
    start(nash_md, *flags, "--run-name=x", "--num-prompts=24")
    said = "kept while the policy trains" if kept else "given back before the policy trains"
    assert capsys.readouterr().out.count(said) == 1
    assert all((size > 0) == kept for size in sizes) and len(sizes) == 3
