"""What SELM's exploration term costs. Ratios within one run, on the default model.

    python benchmark/step_cost.py            # about two minutes on two cores; writes benchmark/results/step_cost.json

Times are medians over rounds in which the variants take turns, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import experiment  # noqa: E402
import optimization  # noqa: E402
import selm  # noqa: E402


def in_turn(variants: dict, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each callable, called in turn `rounds` times after `warmup` rounds that do not count."""
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


def make_pairs(rng, count: int, alpha: float, third: float = 0.0) -> list[selm.Pair]:
    """Synthetic pairs of the default task's size: 50 prompt tokens, 24 completion tokens; a share `third` needs y_s apart."""
    tokens = lambda n: [rng.randrange(5, 40_000) for _ in range(n)]  # noqa: E731
    pairs = []
    for i in range(count):
        extra = alpha > 0 and i < third * count
        weights = [0.0, 0.0, 1.0] if extra else [0.5, 0.5] if alpha > 0 else [0.0, 0.0]
        completions = [tokens(24) for _ in range(2 + extra)]
        pairs.append(
            selm.Pair(
                str(i),
                tokens(50),
                completions,
                [1.0] * len(completions),
                weights,
                reference=[-60.0] * len(completions),
            )
        )
    return pairs


def main(
    rounds: int = 5,
    model: str = "smollm2-135m",
    device: str = "auto",
    out: str = str(ROOT / "benchmark/results/step_cost.json"),
) -> None:
    """Measure and write the ratios.

    Args:
        rounds: times every variant is timed.
        model: recipe, hub id or folder.
        device: auto, cpu, cuda or mps.
        out: JSON file to write.
    """
    experiment.keep_freed_memory(selm.Args().micro_batch_tokens)
    where = common.resolve_device(device)
    dtype = common.resolve_dtype("auto", where)
    attention = common.choose_attention("auto", where, 128)
    args = replace(selm.RECIPES["smollm2-135m"], batch_size=16)
    policy = common.make_trainable(common.load_model(model, dtype, where, attention), 0, 0, False)
    optimiser = optimization.MasterAdamW(policy)

    def step(alpha, third=0.0):
        pairs = make_pairs(random.Random(0), args.batch_size, alpha, third)
        return lambda: selm.train_step(
            args, policy, optimiser, pairs, alpha, 1e-12, [2], where, experiment.Run("step_cost", args, 1), 1
        )

    steps = in_turn(
        {
            "alpha 0": step(0.0),
            "alpha > 0, K = 2": step(0.001),
            "alpha > 0, a third of y_s apart": step(0.001, 1 / 3),
        },
        rounds,
    )

    result = {
        "command": " ".join(["python", *sys.argv]),
        **experiment.environment(),
        "train_step_seconds": steps,
        "train_step_ratio_K2": steps["alpha > 0, K = 2"] / steps["alpha 0"],
        "train_step_ratio_third_apart": steps["alpha > 0, a third of y_s apart"] / steps["alpha 0"],
    }
    Path(out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
