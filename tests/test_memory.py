"""What the large recipes hold, weighed on meta tensors: does the default 8B run fit an 80 GB card, and is it
what --dry-run says?"""

from dataclasses import replace

import pytest
import tiny
import torch
import transformers
import weighed
from torch.utils._python_dispatch import _disable_current_modes
from weighed import GIB

import afd
import common
import ipo_md
import nash_md
import selm
from cleanalign import decoding, dry_run, models, synthetic
from cleanalign.models import LoraReference, choose_sample_rows, make_trainable
from cleanalign.optimization import make_optimiser

# An 80 GB card has 79.6 GiB; a CUDA context takes most of one.
CARD = 78.5 * GIB
JUDGE = 4 * GIB  # PairRM's weights in float32 are 1.6 GiB, and it reads its rows in batches


@pytest.fixture
def card(monkeypatch):
    """Scales that stand for an 80 GB card: what is free is what they do not hold."""
    with weighed.weighing() as scales:
        monkeypatch.setattr(models, "free_memory", lambda device: CARD - scales.now)
        yield scales


def sampled(scales, members, sizes, args) -> int:
    """Peak bytes of a batch of `sizes` (mixed, unmixed rows): its prompts read, and one token drawn."""
    scales.start()
    G = max(sizes) if sizes[0] else sizes[1]
    K = sum(sizes) // G
    with torch.inference_mode():
        unmixed = sizes[1] // G if len(members) == 2 else 0
        lengths = (args.max_prompt_length, args.max_new_tokens)
        decoder = decoding.Decoder(members, 0.1, unmixed, G, K, *lengths, [1], 1.0, 1.0, "eager")
        decoder._prefill([[5] * lengths[0]] * (G - 1) + [[5] * (lengths[0] - 1)], decoder.full)
        decoder._step(decoder.full, decoder.L)
    return scales.peak


def test_the_default_8b_recipe_fits_80_gb(card):
    """Sampling with the rows that --sample-rows 0 chooses, and a training step, with room for the judge; and
    what --dry-run foresees is what is held."""
    args = selm.RECIPES["llama3-8b"]
    with _disable_current_modes():  # it counts a model's weights by making a meta model, which is not held
        foreseen = dry_run.together(dry_run.foreseen(replace(args, dtype="bfloat16"), torch.device("cuda")))
    policy = make_trainable(weighed.model("llama3-8b", card), args.lora_rank, args.lora_alpha, True)
    card.put(*policy.parameters())
    longest = args.max_prompt_length + args.max_new_tokens
    rows = choose_sample_rows(0, [policy], longest, 16)
    assert rows >= 200
    peak = sampled(card, [policy], (0, rows), args)
    assert 0.8 * CARD < peak < CARD - JUDGE
    print(f"sampling {rows} rows: {peak / GIB:.2f} GiB, foreseen {foreseen['sampling'] / GIB:.2f}")
    assert peak == pytest.approx(foreseen["sampling"], rel=0.1)

    optimiser = make_optimiser(policy, args.optimizer_states, 0.0)
    card.put(optimiser.masters, [torch.empty_like(p) for p in optimiser.masters for _ in range(2)])
    card.start()
    reply = [5] * args.max_new_tokens
    G = args.micro_batch_tokens // (args.max_prompt_length + 2 * args.max_new_tokens)
    batch = common.collate([[5] * args.max_prompt_length] * G, [[reply, reply]] * G, "meta")
    logprobs, _ = common.completion_logprobs(policy, batch, entropy=True)
    logprobs.sum().backward()
    print(f"training: {card.peak / GIB:.2f} GiB, foreseen {foreseen['training'] / GIB:.2f}")
    assert card.peak < CARD - JUDGE
    assert card.peak == pytest.approx(foreseen["training"], rel=0.1)


@pytest.mark.parametrize("script", [ipo_md, nash_md], ids=lambda s: s.__name__)
def test_a_step_of_the_8b_mixtures_fits_80_gb(card, script):
    """The rows of a step's mixture, of the policy and of what it is without its adapter."""
    args = script.RECIPES["llama3-8b"]
    policy = make_trainable(weighed.model("llama3-8b", card), args.lora_rank, args.lora_alpha, True)
    card.put(*policy.parameters())
    members = [policy, LoraReference(policy)]
    rows = choose_sample_rows(0, members, args.max_prompt_length + args.max_new_tokens, 16)
    total, mixed = args.holds().sampled
    assert rows >= total  # the whole step at once
    assert sampled(card, members, (mixed, total - mixed), args) < CARD - JUDGE


def test_the_benchmark_s_mixture_fits_80_gb():
    """benchmark/gpu.py: two 8B models, prompts of 512 and 512 new tokens."""
    config = synthetic.config("llama3-8b")
    weights = 2 * 2 * sum(p.numel() for p in synthetic.meta_model("llama3-8b").parameters())
    free = CARD - weights
    rows = models.rows_that_fit([config, config], 2, 1024, models.SAMPLING_SHARE * free)
    assert 64 < rows < 256
    assert weights + rows * 2 * models.row_bytes(config, 2, 1024) < CARD


def test_the_optimiser_of_stages_is_counted(card):
    """All weights of Gemma-2B: 16 bytes a trained weight are 37 GiB less for rows."""
    args = replace(afd.RECIPES["gemma-2b"], lora_rank=0)
    model = weighed.model("gemma-2b", card)
    longest = args.max_prompt_length + args.max_new_tokens
    frozen = choose_sample_rows(0, [model, model], longest, 16)
    model.requires_grad_(True)
    assert choose_sample_rows(0, [model, model], longest, 16) < frozen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "blocks"])
def test_long_rows_hold_what_is_foreseen(attention, dtype):
    """One row of two long replies: activations, and by blocks a layer's maps."""
    config = tiny.ordinary_config(attention)
    P, T = 256, 128
    with weighed.weighing() as scales:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(dtype)
        scales.put(*model.parameters(), *model.buffers())
        make_trainable(model.eval(), 0, 0, False)
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        batch = common.collate([[5] * P], [[[6] * (T + 1)] * 2], "meta")
        before = scales.start()
        common.completion_logprobs(model, batch).sum().backward()
        held = scales.peak - before
    foreseen = (P + 2 * T) * dry_run.activation_bytes(config, dtype.itemsize, False, attention)
    if attention == "blocks":
        foreseen += dry_run.map_bytes(config, dtype.itemsize, P, T, 2)
    assert foreseen == pytest.approx(held, rel=0.15)
