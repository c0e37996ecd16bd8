"""Seconds of one online-IPO step as the work grows: prompts a step, new tokens, weights; beside what the
arithmetic and the memory of this machine allow.

    python benchmark/growth.py            # about ten minutes on two cores; writes results/growth.json and .png
    python benchmark/growth.py --only weights

A step is ipo_md.py's with β = 0: sample two replies a prompt, reference log-probs, loss, backward, update.
Random weights in a model's shapes, random prompts of 30 to 63 tokens, replies that do not end early.

The limit is the sum over the step's parts of the longer of two times: their operations at the best rate of a
large matrix product here, and the bytes they cannot do without at the best rate of reading memory. It counts
no padding and no small kernel.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from dataclasses import replace

import record
import torch
import tyro

import ipo_md
from cleanalign import synthetic
from cleanalign.decoding import Decoders
from cleanalign.dry_run import matmul_peak, model_flops
from cleanalign.models import (
    choose_attention,
    key_value_numbers,
    resolve_device,
    resolve_dtype,
    starting_model,
)
from cleanalign.optimization import make_optimiser
from cleanalign.phases import give_back_freed_memory, keep_freed_memory, reset_peak_memory
from experiment import Experiment, Run

synthetic.CONFIGS["smollm2-360m"] = (  # the published config.json's sizes
    "LlamaConfig",
    {
        **synthetic.CONFIGS["smollm2-135m"][1],
        **dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32),
        **dict(num_attention_heads=15, num_key_value_heads=5),
    },
)
PROMPTS, NEW_TOKENS, MODEL = 8, 32, "smollm2-135m"  # where the sweeps meet
SWEEPS = {  # what grows: (model, prompts, new tokens, states of the optimiser)
    "prompts": [(MODEL, n, NEW_TOKENS, "float32") for n in (8, 16, 32, 64, 128)],
    "new tokens": [(MODEL, PROMPTS, n, "float32") for n in (32, 64, 128, 256, 512)],
    # a billion weights with float32 states would not fit 24 GB
    "weights": [(m, PROMPTS, NEW_TOKENS, "bfloat16") for m in (MODEL, "smollm2-360m", "pythia-1b-tldr")],
}
MICRO_BATCH = 512  # tokens
LONGEST_PROMPT = 63  # tokens
LARGE = 4  # a step with so many times the least work is measured once


def main(only: str = "", repeats: int = 3, out: str = str(record.RESULTS / "growth.json")) -> None:
    """Measure, write and draw.

    Args:
        only: the sweep whose name this is: prompts, new tokens or weights.
        repeats: steps of which the median is taken; of large ones there is one.
        out: JSON file to write; the plot lies beside it.
    """
    keep_freed_memory()
    device = resolve_device("cpu")
    dtype = resolve_dtype("auto", device)
    limits = {"flops": matmul_peak(device, dtype), "bytes": reading_peak()}
    result = {**record.origin(), "dtype": str(dtype), "per_second": limits, "micro_batch_tokens": MICRO_BATCH}
    result["sweeps"] = {}
    for name, points in SWEEPS.items():
        if only in ("", name):
            result["sweeps"][name] = sweep(points, repeats, limits)
            record.write(out, result)
    plot(result, out.removesuffix(".json") + ".png")


def reading_peak() -> float:
    """Bytes a second of the fastest of several sums over memory that no cache holds."""
    numbers, best = torch.ones(2**27), 0.0
    for _ in range(6):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def sweep(points: list[tuple], repeats: int, limits: dict) -> list[dict]:
    """Each point's seconds by part, its limit's and its peak memory; points of one model share it."""
    rows, exp, optimiser, built = [], None, None, None
    for model, prompts, new_tokens, states in points:
        longest = LONGEST_PROMPT + 2 * new_tokens
        attention = choose_attention("auto", torch.device("cpu"), longest)
        if built != (model, states, attention):
            if optimiser is not None:
                optimiser.release()
                exp = optimiser = None  # first: their memory is for the next ones
                gc.collect()
                give_back_freed_memory()
            exp, optimiser = build(model, states, attention)
            built = (model, states, attention)
        exp.args = replace(exp.args, batch_size=prompts)
        one_step(exp, optimiser, 8)  # warms up
        reset_peak_memory()
        exp.run.peak_memory_bytes = 0
        large = prompts * new_tokens >= LARGE * PROMPTS * NEW_TOKENS
        steps = [one_step(exp, optimiser, new_tokens) for _ in range(1 if large else repeats)]
        parts = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
        row = {"model": model, "prompts": prompts, "new_tokens": new_tokens, "optimizer_states": states}
        row |= {"weights": sum(p.numel() for p in exp.policy.parameters()), "attention": attention}
        row |= {"seconds": parts, "limit": limit(exp, states, limits)}
        row["times_the_limit"] = sum(parts.values()) / sum(row["limit"].values())
        row["peak_memory_bytes"] = exp.run.peak_memory_bytes
        rows.append(row)
        print(row, flush=True)
    if optimiser is not None:
        optimiser.release()
    return rows


def build(model: str, states: str, attention: str) -> tuple[Experiment, object]:
    """What a step needs and no more: no data, tokenizer or judge; its run is a clock that writes nothing."""
    args = replace(ipo_md.RECIPES["smollm2-135m"], device="cpu", beta=0.0, micro_batch_tokens=MICRO_BATCH)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    policy = synthetic.model(model, dtype, device, attention).eval().requires_grad_(True)
    exp = Experiment("ipo_md", args, device, dtype, attention, None, [-1], None, None)
    exp.policy, exp.reference = policy, starting_model(policy)
    exp.decoders, exp.run = Decoders(longest=LONGEST_PROMPT), Run("growth", args, 1)
    return exp, make_optimiser(policy, states, 0.0)


def prompts_of(exp: Experiment) -> list[list[int]]:
    """Random prompts, the same in every step."""
    draw = random.Random(0)
    return [
        [draw.randrange(5, 40_000) for _ in range(30 + i % (LONGEST_PROMPT - 29))]
        for i in range(exp.args.batch_size)
    ]


def one_step(exp: Experiment, optimiser, new_tokens: int) -> dict[str, float]:
    """Seconds by part of one step with replies of so many tokens."""
    exp.args = replace(exp.args, max_new_tokens=new_tokens)
    before = {name: phase["seconds"] for name, phase in exp.run.phases.items()}
    prompts = prompts_of(exp)
    replies, _ = exp.sample(prompts, 0, completions=2)
    pairs = [ipo_md.Pair(str(i), *both, 1.0) for i, both in enumerate(zip(prompts, replies, strict=True))]
    with exp.run.phase("training"):
        ipo_md.train_step(exp, optimiser, pairs, 1, 1e-7)
    return {name: phase["seconds"] - before.get(name, 0.0) for name, phase in exp.run.phases.items()}


def limit(exp: Experiment, states: str, limits: dict) -> dict[str, float]:
    """Seconds that operations and bytes alone would take, by part."""
    prompts, T, policy = prompts_of(exp), exp.args.max_new_tokens, exp.policy
    rows, weights = 2 * len(prompts), sum(p.numel() for p in policy.parameters())
    read, scored = sum(map(len, prompts)) + rows * (T - 1), rows * T
    config, item = policy.config, exp.dtype.itemsize

    def attention(factor: int) -> int:  # scores and their sum over values, of the replies' tokens
        seen = sum(2 * (len(p) * (T - 1) + T * (T - 1) // 2) for p in prompts)
        return factor * 2 * config.hidden_size * config.num_hidden_layers * seen

    def seconds(flops: float, size: float) -> float:
        return max(flops / limits["flops"], size / limits["bytes"])

    forward = model_flops(policy, read, scored, 2) + attention(2)
    sampling = seconds(model_flops(policy, sum(map(len, prompts)), rows, 2), weights * item)
    token = model_flops(policy, rows, rows, 2) + attention(2) / max(1, T - 1)
    places = sum(2 * (len(p) + T / 2) for p in prompts)
    sampling += (T - 1) * seconds(token, weights * item + key_value_numbers(config) * places * item)
    # what AdamW reads and writes for a weight: gradient and its norm, moments, master, the rounded weight
    update = {"float32": 34, "bfloat16": 24}[states]
    return {
        "sampling": sampling,
        "reference": seconds(forward, weights * item),
        "training": seconds(3 * forward, 3 * weights * item),
        "update": seconds(0, update * weights),
    }


def plot(result: dict, path: str) -> None:
    """A panel a sweep: seconds a step, by part and together, and the limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = {"prompts": "prompts", "new tokens": "new_tokens", "weights": "weights"}
    figure, axes = plt.subplots(
        1, len(result["sweeps"]), figsize=(4.6 * len(result["sweeps"]), 4.2), squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], result["sweeps"].items(), strict=True):
        x = [row[keys[name]] for row in rows]
        axis.plot(x, [sum(row["seconds"].values()) for row in rows], "o-", color="black", label="measured")
        axis.plot(x, [sum(row["limit"].values()) for row in rows], "k--", label="limit: operations or bytes")
        for part in ("sampling", "reference", "training", "update"):
            axis.plot(x, [row["seconds"][part] for row in rows], "o-", linewidth=1, markersize=3, label=part)
        axis.set(xscale="log", yscale="log", xlabel=name, title=f"as {name} grow")
        axis.set_xticks(x, [f"{v / 1e6:.0f} M" if name == "weights" else str(v) for v in x])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds a step")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"One online-IPO step, {result['device_name']}, {result['dtype'].removeprefix('torch.')}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tyro.cli(main)
