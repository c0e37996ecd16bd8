"""What a LoRA adapter costs while replies are drawn, and what merging it would lose.

    python benchmark/lora_decoding.py cost        # a CPU, about four minutes: a step with and without it
    python benchmark/lora_decoding.py rounding    # about ten minutes: the log-probs of merged bfloat16 weights

Each writes its part of results/lora_decoding.json. `cost`: SmolLM2-135M's shapes with random weights; models
take turns, the least time counts. At rank 4 the adapter's share of the matrices' numbers is that of rank 32 in
Llama-3-8B, 1.2 %.

`rounding`: SmolLM2-135M, rank 32, selm.py's steps at the 8B recipe's rate on 8 pairs. A number of the adapter's
product is lost where it is below half of bfloat16's spacing at the weight it is added to. Compared are log-probs
of the pairs' tokens under the adapted and the merged weights, both as they change from the start's. They are
computed in float32, so that nothing else is rounded.
"""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Literal

import record
import torch
import tyro
from step_cost import bare_experiment, make_pairs

import common
import selm
from cleanalign import synthetic
from cleanalign.models import load_model, make_trainable, resolve_device, resolve_dtype
from cleanalign.optimization import make_optimiser

TOKENS = 33  # of a reply, the first drawn from the prompt


def main(
    part: tyro.conf.Positional[Literal["cost", "rounding"]],
    rounds: int = 3,
    device: str = "auto",
    out: str = str(record.RESULTS / "lora_decoding.json"),
) -> None:
    """Measure one part and write it.

    Args:
        part: cost or rounding.
        rounds: times every variant is timed (cost).
        device: auto, cpu, cuda or mps.
        out: JSON file to write into.
    """
    result = cost(device, rounds) if part == "cost" else rounding(device)
    file = Path(out)
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[part] = {**record.origin(), **result}
    record.write(file, kept)
    print(json.dumps(result, indent=1))


def cost(device: str, rounds: int) -> dict:
    """Milliseconds of a decode step without an adapter and with one of two ranks, by rows, and their ratio."""
    where = resolve_device(device)
    dtype = resolve_dtype("auto", where)
    # of one thread on a CPU that others use too, its own time
    clock = time.process_time if where.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    models = {}
    for name, rank in (("without", 0), ("rank 4", 4), ("rank 32", 32)):
        model = synthetic.model("smollm2-135m", dtype, where, "sdpa").eval().requires_grad_(False)
        models[name] = make_trainable(model, rank, 2 * rank, False) if rank else model
    result = {"dtype": str(dtype), "milliseconds": {}, "ratio": {}}
    for rows in (16, 64):
        rng = random.Random(0)
        prompts = [[rng.randrange(5, 40_000) for _ in range(40)] for _ in range(rows)]
        taken = {(name, n): [] for name in models for n in (1, TOKENS)}
        for i in range(1 + rounds):
            for name, n in taken:
                start = clock()
                common.sample(models[name], prompts, [-1], max_new_tokens=n, seed=i)
                taken[name, n].append(clock() - start)
        best = {key: min(times[1:]) for key, times in taken.items()}
        steps = {name: 1e3 * (best[name, TOKENS] - best[name, 1]) / (TOKENS - 1) for name in models}
        result["milliseconds"][rows] = steps
        result["ratio"][rows] = {name: step / steps["without"] for name, step in steps.items()}
    return result


def rounding(device: str) -> dict:
    """After so many steps: how much of the adapter's change of the log-probs merged bfloat16 weights keep."""
    args = selm.RECIPES["llama3-8b"]
    args = selm.Args(device=device, dtype="bfloat16", lora_rank=args.lora_rank, lora_alpha=args.lora_alpha)
    rate = selm.RECIPES["llama3-8b"].learning_rate[0]
    exp = bare_experiment(args)
    policy = load_model(args.model, torch.bfloat16, exp.device, exp.attention)
    exp.policy = make_trainable(policy, args.lora_rank, args.lora_alpha, False)
    pairs = make_pairs(random.Random(0), args.batch_size, args.alpha)
    prompts, completions = [p.prompt for p in pairs], [p.completions for p in pairs]
    sums = common.sequence_logprobs(exp.policy, prompts, completions, 1.0, exp.device, 4096)
    for pair, row in zip(pairs, sums, strict=True):
        pair.reference = row
    optimiser = make_optimiser(exp.policy, "float32", 0.0)
    batch = common.collate(prompts, completions, exp.device)
    result, step = {"learning_rate": rate, "steps": {}}, 0
    for steps in (1, 4, 16, 64):
        while step < steps:
            step += 1
            selm.train_step(exp, optimiser, pairs, step, rate)
        logprobs = {}
        with torch.no_grad():
            adapted = copy.deepcopy(exp.policy).float()
            logprobs["policy"] = common.completion_logprobs(adapted, batch)
            with adapted.disable_adapter():
                logprobs["start"] = common.completion_logprobs(adapted, batch)
            merged = copy.deepcopy(exp.policy).merge_and_unload().float()
            logprobs["merged"] = common.completion_logprobs(merged, batch)
        wanted, got = (logprobs[name] - logprobs["start"] for name in ("policy", "merged"))
        result["steps"][step] = {
            "change, nats a token": wanted.abs().sum().item() / batch.mask.sum().item(),
            "kept of it": ((got * wanted).sum() / (wanted * wanted).sum()).item(),
            "error over change": ((got - wanted).norm() / wanted.norm()).item(),
        }
        print(step, result["steps"][step], flush=True)
    return result


if __name__ == "__main__":
    tyro.cli(main)
