"""Memory, foreseen: what a run will hold, reckoned from its model's sizes, and one rehearsed step on random
weights (`--dry-run`)."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import transformers

from cleanalign import distributed, models, optimization, packed, synthetic
from cleanalign.errors import UserError, require
from cleanalign.storage import write_json

GIB = 2**30


@dataclass
class Holds:
    """What a script's run keeps beside its policy: it says so itself, by `args.holds()`."""

    reference: bool = True  # a second model, while it trains (with LoRA it is the policy's own weights)
    average: bool = False  # a moving average of the trained weights
    completions: int = 1  # of a prompt, side by side in a row of training
    replies: int = 1  # to a prompt that are decoded together, at least: it is read once for them
    models: int = 1  # that it writes to its run folder
    # replies decoded together in a step: by the policy, and by the reference for a mixture; None: as many as
    # there is room for, by the policy
    sampled: tuple[int, int] | None = None


def prepare(args):
    """The rehearsal of `args`: random weights in the model's shapes, random prompts of the greatest length, a
    random judge, one step.

    Replies never end, so they too are as long as can be. For `--processes` other than those that run there is
    nothing to rehearse: what each of them will hold is printed, and None returned. Raises `UserError` when
    the sizes are not known, and when what is certain to be held (weights, optimiser, caches) does not fit
    into what is free.
    """
    name = sizes_of(args.model)
    require(
        name is not None,
        f"--dry-run: the sizes of --model {args.model} are not in the code. Known: "
        f"{', '.join(synthetic.CONFIGS)}; or give a folder with a config.json.",
    )
    device = models.resolve_device(args.device)
    needs = foreseen(args, device)
    free = free_memory(device)
    count = args.processes or distributed.world()
    each = f", each of {count} processes" if count > 1 else ""
    if count != distributed.world():
        print(f"foreseen for {name}, dtype {dtype_name(args, device)}{each}:\n{table(needs)}", flush=True)
        return None
    if device.type == "cpu" and free is not None:
        free //= distributed.processes_here()
    certain = max(together({what: n for what, n in needs.items() if what not in ESTIMATES}).values())
    if free is not None and certain > free:
        raise UserError(
            f"--dry-run: {args.model} needs {certain / GIB:.1f} GiB without any activations, and "
            f"{device.type} has {free / GIB:.1f} GiB free.\n"
            f"{table(needs)}\n{advice(args, device)}"
        )
    print(
        f"foreseen for {name} on {device.type}, dtype {dtype_name(args, device)}{each}:\n{table(needs)}",
        flush=True,
    )
    prompts = max(args.batch_size, count)
    rows = prompts + 1 + 5 * args.eval_prompts  # one to be set aside; at most a fifth is held out
    changed = dict(
        model=synthetic.PREFIX + name,
        dataset=f"{synthetic.PREFIX}{rows}:{args.max_prompt_length}:{args.max_new_tokens}",
        num_prompts=prompts,
        judge="random",
        eval_judge=None,
        max_steps=1,
        iterations=1,
        epochs=1,
        offline_warmup=False,
        save_every=0,
        demonstrations="response",
        min_demonstration_score=None,
        dev_prompts=1,
        sft_model=None,
    )
    return replace(args, **{f.name: changed[f.name] for f in fields(args) if f.name in changed})


def dtype_name(args, device: torch.device) -> str:
    """The precision of the weights, in a word."""
    return str(models.resolve_dtype(args.dtype, device)).removeprefix("torch.")


def require_room(args, device: torch.device) -> None:
    """Refuse a model that a process cannot sample from: all its weights, and caches of a few replies, must
    fit into its GPU. A model whose sizes are not known is let through."""
    free = models.free_memory(device)
    if free is None or sizes_of(args.model) is None:
        return
    rows = min(args.sample_rows or FEWEST_ROWS, FEWEST_ROWS)
    held = foreseen(replace(args, sample_rows=rows), device)
    names = ("policy's weights", "LoRA adapter", "reference's weights", CACHES)
    needs = {what: n for what, n in held.items() if what in names}
    if sum(needs.values()) <= free:
        return
    each = " in each process" if distributed.world() > 1 else ""
    help = ["a smaller --model", "a GPU with more memory"]
    if "reference's weights" in needs:
        help.insert(0, "--lora-rank 32, where the reference is the policy without its adapter")
    raise UserError(
        f"--model {args.model} cannot be sampled from{each}: {device.type} has {free / GIB:.1f} GiB free, "
        "and this "
        f"must be held ({rows} replies at once):\n{table(needs)}\nMore processes do not help: each samples "
        "with "
        f"whole weights. What would: {', '.join(help)}."
    )


FEWEST_ROWS = 8  # replies decoded at once, at the least, by what --sample-rows 0 chooses


def sizes_of(model: str) -> str | None:
    """The name under which `synthetic` knows a `--model` value, or None."""
    model = model.removeprefix(synthetic.PREFIX)
    name = {hub_id: name for name, hub_id in models.HUB_MODELS.items()}.get(model, model)
    return name if synthetic.known(name) else None


CACHES = "key-value caches of a step's replies"
READING = "prompts read, or next tokens drawn (about)"
EVALUATION_READING = "the same in the evaluation (about)"
EXCHANGE = "gradients on their way to their owners"
ACTIVATIONS = "activations of one micro-batch (about)"
EVALUATED = "key-value caches of the evaluation's replies"
PACKED = "policy's weights once more, rearranged for few rows"
EVALUATION_PACKED = "the same for the evaluation"
ESTIMATES = (READING, EVALUATION_READING, ACTIVATIONS)
# what is there in one phase only; the rest is held all the time, but in the evaluation there is no optimiser
TRANSIENT = {
    "sampling": (CACHES, PACKED, READING),
    "training": (EXCHANGE, ACTIVATIONS),
    "evaluation": (EVALUATED, EVALUATION_PACKED, EVALUATION_READING),
}


def together(needs: dict[str, int]) -> dict[str, int]:
    """Bytes held in each phase, of those in `foreseen`."""
    sums = {}
    for phase, own in TRANSIENT.items():
        others = {what for names in TRANSIENT.values() for what in names} - {*own}
        gone = ("optimiser", "moving average") if phase == "evaluation" else ()
        sums[phase] = sum(n for what, n in needs.items() if what not in others and not what.startswith(gone))
    return sums


def foreseen(args, device: torch.device) -> dict[str, int]:
    """Bytes by what holds them, from the model's sizes alone; activations are an estimate
    (`activation_bytes`), the rest is exact.

    Left out: the judge, temporary buffers, the allocator's waste.
    """
    name = sizes_of(args.model)
    config, model = synthetic.config(name), synthetic.meta_model(name)
    item = models.resolve_dtype(args.dtype, device).itemsize
    weights = sum(p.numel() for p in model.parameters())
    adapter = sum(args.lora_rank * (i + o) for i, o in linear_shapes(model))
    trained = adapter or weights
    own = -(-trained // (args.processes or distributed.world()))  # what a process trains of them
    holds = args.holds()
    states = optimization.bytes_per_weight(args.optimizer_states, models.resolve_dtype(args.dtype, device))
    longest = args.max_prompt_length + args.max_new_tokens
    reference = weights * item * (holds.reference and not adapter)
    average = own * (4 + item) * holds.average
    loaded, made = (weights + adapter) * item + reference, average + own * sum(states.values())
    configs = [config] * (2 if holds.reference else 1)
    rows = args.sample_rows or rows_chosen(configs, item, longest, (loaded, made), device)
    replies, mixed = holds.sampled or (rows, 0)
    share = min(1.0, rows / replies)  # of them that are decoded at once
    replies, mixed, evaluated = int(replies * share), int(mixed * share), min(rows, args.eval_prompts)
    cache = models.key_value_numbers(config) * longest * item
    caches = (replies + mixed) * cache, evaluated * cache
    packs = packed.can_pack(device, models.resolve_dtype(args.dtype, device))
    rearranged = packs * item * sum(i * o for i, o in linear_shapes(model))
    needs = {
        "policy's weights": weights * item,
        "LoRA adapter": adapter * item,
        "reference's weights": reference,
        **{f"optimiser: {what}": own * n for what, n in states.items()},
        # and the policy's own weights, set aside while the average plays
        "moving average": average,
        # of the greatest trained weight: the gradient, and those that travel to and fro
        EXCHANGE: 3 * greatest_trained(args, model) * item * (own < trained),
        CACHES: caches[0],
        EVALUATED: caches[1],
        PACKED: rearranged * (replies <= packed.FEW),
        EVALUATION_PACKED: rearranged * (evaluated <= packed.FEW),
        READING: reading_bytes(args, config, item, (replies // holds.replies, replies), caches[0]),
        EVALUATION_READING: reading_bytes(args, config, item, (evaluated, evaluated), caches[1]),
        ACTIVATIONS: training_bytes(args, config, item, device),
    }
    return {what: n for what, n in needs.items() if n}


def rows_chosen(configs: list, item: int, longest: int, held: tuple[int, int], device: torch.device) -> int:
    """Rows that `--sample-rows 0` will choose when the models, of held[0] bytes, are loaded and before the
    optimiser, of held[1], is made; 64 where there is no GPU."""
    free = models.free_memory(device)
    if free is None:
        return 64
    room = models.SAMPLING_SHARE * (free - held[0]) - held[1]
    return models.rows_that_fit(configs, item, longest, room)


def reading_bytes(args, config, item: int, rows: tuple[int, int], caches: int) -> int:
    """About how many bytes reading prompts and drawing a token of each row takes beside the rows' `caches`;
    `rows` are numbers of prompts and of rows.

    Caches are made when the first part of the prompts has been read, whose own cache is then copied. Where
    one part is all, they never stand beside the widest place of a layer.
    """
    drawn, read = 24 * config.vocab_size * rows[1], rows[0] * args.max_prompt_length
    widest = min(models.PREFILL_TOKENS, read) * models.prefill_bytes(config, item)
    if read > models.PREFILL_TOKENS:
        return max(widest, drawn)
    return max(read * models.key_value_numbers(config) * item, widest - caches, drawn)


def greatest_trained(args, model) -> int:
    """Numbers in the greatest matrix that is trained: the model's, or of a LoRA adapter."""
    if args.lora_rank:
        return args.lora_rank * max(max(shape) for shape in linear_shapes(model))
    return max(p.numel() for p in model.parameters())


def linear_shapes(model) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix a LoRA adapter stands
    beside: all linear layers but the vocabulary projection."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, kinds) and m is not head]


def training_bytes(args, config, item: int, device: torch.device) -> int:
    """About how many bytes a micro-batch takes while it trains: its activations; a chunk of its logits, twice
    in float32; and, where all weights are trained, the gradient of the vocabulary's. (With checkpointing the
    last two are gone when the first layer is computed again.)"""
    replies = args.holds().completions * args.max_new_tokens
    longest = args.max_prompt_length + replies
    tokens = max(args.micro_batch_tokens, longest)
    attention = models.choose_attention(args.attention, device, longest)
    whole = tokens * activation_bytes(config, item, False, attention, longest)
    V, D = config.vocab_size, config.hidden_size
    scored, rows = tokens * replies // longest, models.chunk_rows(V, device)
    gradient = item if scored <= rows else 4 + 2 * item  # several chunks are summed in float32
    scoring = 8 * V * min(scored, rows) + gradient * V * D * (args.lora_rank == 0)
    if attention == "blocks":  # its maps, a layer's at a time
        row = dict(prompt=args.max_prompt_length, reply=args.max_new_tokens, replies=args.holds().completions)
        whole += tokens // longest * map_bytes(config, item, **row)
    if args.gradient_checkpointing:
        layers = config.num_hidden_layers
        return tokens * layers * item * D + max(whole // layers, scoring)
    return whole + scoring


def activation_bytes(config, item: int, checkpointing: bool, attention: str = "sdpa", row: int = 0) -> int:
    """About how many bytes of activations a token leaves for the backward pass in a Llama-like model.

    A layer of width D and inner width I keeps, with `item` bytes a number: two normalisations (float32 copy,
    normalised, scaled), the queries, keys and values as attention takes them (heads repeated, but by blocks
    and flex), attention's output twice, by blocks once, and four numbers for each unit of the inner layer.
    Eager attention keeps its output once more and its maps over `row` tokens, in float32 and, where that is
    another precision, as they multiply the values. With checkpointing a layer keeps its input only, and one
    layer at a time all of it.
    """
    D, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    one = 2 * (4 + 2 * item) * D + 5 * item * D + 4 * item * models.inner_width(config)
    if attention in ("blocks", "flex"):
        own = getattr(config, "num_key_value_heads", None) or heads
        one -= 2 * item * D * (heads - own) // heads
    if attention == "blocks":
        one -= item * D
    if attention == "eager":
        one += item * D + (4 + item * (item < 4)) * heads * row
    return layers * item * D + one if checkpointing else layers * one


def map_bytes(config, item: int, prompt: int, reply: int, replies: int) -> int:
    """About how many bytes more a layer's attention maps, by blocks, take in the backward pass than what it
    has let go by then, of a row of a prompt and its replies: the weights in float32 and as they multiply, and
    a gradient."""
    seen = prompt**2 + replies * reply * (prompt + reply)
    return (4 + 2 * item) * config.num_attention_heads * seen


def free_memory(device: torch.device) -> int | None:
    """Free bytes on `device`; None where that cannot be asked."""
    if device.type == "cuda":
        return models.free_memory(device)
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None


def table(needs: dict[str, int]) -> str:
    """`foreseen` as lines of text."""
    rows = [*needs.items(), *((f"together, {phase}", n) for phase, n in together(needs).items())]
    return "\n".join(f"  {what:<48} {n / GIB:8.2f} GiB" for what, n in rows)


def advice(args, device: torch.device) -> str:
    """Which flags need less memory and about how much less, most saving first; without figures where the
    model's sizes are not known."""
    options = {
        "--micro-batch-tokens": {"micro_batch_tokens": max(1, args.micro_batch_tokens // 2)},
        "--sample-rows": {"sample_rows": max(1, (args.sample_rows or 64) // 2)},
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--optimizer-states": {"optimizer_states": "bfloat16"},
        "--lora-rank": {"lora_rank": args.lora_rank or 32},
    }
    options = {flag: change for flag, change in options.items() if replace(args, **change) != args}
    words = {
        flag: flag if True in change.values() else f"{flag} {next(iter(change.values()))}"
        for flag, change in options.items()
    }
    if sizes_of(args.model) is None:
        return "Less memory: " + ", ".join(words.values()) + "."
    now = sum(foreseen(args, device).values())
    saved = {
        flag: now - sum(foreseen(replace(args, **change), device).values())
        for flag, change in options.items()
    }
    ranked = sorted((flag for flag in saved if saved[flag] > 0), key=saved.get, reverse=True)
    if not ranked:
        return "Less memory: a smaller model."
    return (
        "Less memory, about: "
        + ", ".join(f"{words[flag]} saves {saved[flag] / GIB:.2f} GiB" for flag in ranked)
        + "."
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several square matrix products on `device` in `dtype`: the ceiling that
    utilisation is a share of."""
    best = 0.0
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def model_flops(policy, tokens: int, scored: int, factor: int) -> int:
    """factor · (N · tokens + V · D · scored): N the weights of the layers' matrices, and the vocabulary
    projection where a token is scored.

    factor: 2 forward; 6 forward and backward; 4 with LoRA, as frozen weights have no gradient. Attention's
    own products are not counted, and recomputation (checkpointing, the projection in backward) is not either.
    """
    head = models.head(policy)[0]
    layers = sum(
        p.numel() for n, p in models.backbone(policy).named_parameters() if p.dim() > 1 and "lora_" not in n
    )
    embedding = sum(
        m.weight.numel() for m in models.backbone(policy).modules() if isinstance(m, torch.nn.Embedding)
    )
    return factor * ((layers - embedding) * tokens + head.numel() * scored)


def report(args, policy, phases: dict[str, Counter], environment: dict) -> dict:
    """What a rehearsed step took, by phase: seconds, tokens a second, peak bytes, and the share of the
    measured matmul peak."""
    weight = models.head(policy)[0]
    peak = matmul_peak(weight.device, weight.dtype)
    factors = {"training": 4 if args.lora_rank else 6, "reference": 2}
    for name, phase in phases.items():
        if phase["tokens"]:
            phase["tokens_per_second"] = phase["tokens"] / phase["seconds"]
        if name in factors:
            seconds = phase["seconds"] + (phases["update"]["seconds"] if name == "training" else 0)
            phase["model_flops"] = model_flops(policy, phase["tokens"], phase["scored"], factors[name])
            phase["model_flops_utilisation"] = phase["model_flops"] / seconds / peak
    return {
        "model": args.model,
        "matmul_peak_flops_per_second": peak,
        "foreseen_bytes": foreseen(args, weight.device),
        "phases": {name: dict(phase) for name, phase in phases.items()},
        "peak_memory_bytes": max(phase.get("peak_memory_bytes", 0) for phase in phases.values()),
        "note": "random weights, random prompts, random judge: the figures are the machine's (of several "
        "processes the "
        "first one's), nothing was learnt; a real judge's memory comes on top",
        **environment,
    }


def report_text(result: dict, folder: Path) -> str:
    """`report` as a person reads it."""
    lines = [
        "",
        f"one step of {result['model']} at the greatest lengths (a first step: warm-up of kernels included)",
    ]
    lines.append(f"  {'phase':<15} {'seconds':>9} {'tokens/s':>10} {'peak memory':>13} {'utilisation':>12}")
    for name, phase in result["phases"].items():
        rate = f"{phase['tokens_per_second']:.0f}" if "tokens_per_second" in phase else "–"
        share = f"{phase['model_flops_utilisation']:.1%}" if "model_flops_utilisation" in phase else "–"
        # what was set apart from a phase, as the decoder's warm-up, has no peak of its own
        peak = f"{phase['peak_memory_bytes'] / GIB:.2f} GiB" if "peak_memory_bytes" in phase else "–"
        lines.append(f"  {name:<15} {phase['seconds']:>9.2f} {rate:>10} {peak:>13} {share:>12}")
    lines += [
        f"  matrix products reach {result['matmul_peak_flops_per_second'] / 1e12:.2f} TFLOP/s here. "
        "Utilisation: 6 (LoRA: 4; reference: 2) FLOPs for",
        "  each weight and token that meet, attention and recomputation not counted, training with its "
        "update, over that peak.",
        f"  {result['note']}",
        f"  {folder / 'dry_run.json'}",
    ]
    return "\n".join(lines)


def write(result: dict, folder: Path) -> None:
    """Write dry_run.json into the run folder and print it as text."""
    write_json(folder / "dry_run.json", result, indent=2)
    print(report_text(result, folder))
