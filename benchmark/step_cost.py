"""What SELM's exploration term costs. Ratios within one run, on the default model.

    python benchmark/step_cost.py    # about two minutes on two cores; writes benchmark/results/step_cost.json

Times are medians over rounds in which the variants take turns, so that a slow minute of the machine hits all
of them.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from dataclasses import replace

import record
import torch
import tyro

import selm
from cleanalign.models import choose_attention, load_model, make_trainable, resolve_device, resolve_dtype
from cleanalign.optimization import MasterAdamW
from cleanalign.phases import keep_freed_memory
from experiment import Experiment, Run


def in_turn(variants: dict, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each callable, called in turn `rounds` times after `warmup` rounds that do not
    count."""
    times = {name: [] for name in variants}
    for i in range(warmup + rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def random_tokens(rng: random.Random, count: int) -> list[int]:
    """Token ids, none of them special."""
    return [rng.randrange(5, 40_000) for _ in range(count)]


def make_pairs(rng: random.Random, count: int, alpha: float, third: float = 0.0) -> list[selm.Pair]:
    """Synthetic pairs of the default task's size: 50 prompt tokens, 24 completion tokens; a share `third`
    needs y_s apart."""
    pairs = []
    for i in range(count):
        apart = alpha > 0 and i < third * count
        completions = [random_tokens(rng, 24) for _ in range(3 if apart else 2)]
        prompt, ones = random_tokens(rng, 50), [1.0] * len(completions)
        weights = [0.0, 0.0]
        if alpha > 0:
            weights = [0.0, 0.0, 1.0] if apart else [0.5, 0.5]
        reference = [-60.0] * len(completions)
        pairs.append(selm.Pair(str(i), prompt, completions, ones, weights, reference))
    return pairs


def bare_experiment(args: selm.Args) -> Experiment:
    """What selm's `train_step` needs and no more: no data, tokenizer or judge; its run is a clock that writes
    nothing."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    attention = choose_attention(args.attention, device, args.max_prompt_length + 3 * args.max_new_tokens)
    policy = make_trainable(load_model(args.model, dtype, device, attention), 0, 0, False)
    exp = Experiment("selm", args, device, dtype, attention, None, [-1], None, None)
    exp.policy, exp.run = policy, Run("selm", args, 1)
    return exp


def main(
    rounds: int = 5,
    model: str = "smollm2-135m",
    device: str = "auto",
    out: str = str(record.RESULTS / "step_cost.json"),
) -> None:
    """Measure and write the ratios.

    Args:
        rounds: times every variant is timed.
        model: recipe, hub id or folder.
        device: auto, cpu, cuda or mps.
        out: JSON file to write.
    """
    args = replace(selm.RECIPES["smollm2-135m"], model=model, device=device, batch_size=16)
    keep_freed_memory()
    exp = bare_experiment(args)
    optimiser = MasterAdamW(exp.policy)

    def step(alpha: float, third: float = 0.0):
        pairs = make_pairs(random.Random(0), args.batch_size, alpha, third)
        variant = replace(exp, args=replace(args, alpha=alpha))
        return lambda: selm.train_step(variant, optimiser, pairs, 1, 1e-12)

    variants = {
        "alpha 0": step(0.0),
        "alpha > 0, K = 2": step(0.001),
        "alpha > 0, a third of y_s apart": step(0.001, 1 / 3),
    }
    steps = in_turn(variants, rounds)
    result = {
        **record.origin(),
        "train_step_seconds": steps,
        "train_step_ratio_K2": steps["alpha > 0, K = 2"] / steps["alpha 0"],
        "train_step_ratio_third_apart": steps["alpha > 0, a third of y_s apart"] / steps["alpha 0"],
    }
    record.write(out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
