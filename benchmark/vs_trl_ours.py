"""Our side of vs_trl.py: `nash_md.py`'s or `ipo_md.py`'s own collect and train_step, one optimiser step for
each line on standard input.

Argument: a JSON object with `algorithm` (nash, ipo), `model`, `batch_size`, `new_tokens` (the most that will
be asked for) and `micro_batch_tokens`. Each input line is {"new_tokens": N, "batch": which prompts, "seed":
of the samples}; each output line what that step took.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import record  # noqa: F401  puts the checkout on the path
import torch

import ipo_md
import nash_md
from cleanalign.optimization import make_optimiser
from cleanalign.phases import keep_freed_memory
from experiment import Experiment, Run, set_up

ALGORITHMS = {  # values that TRL's defaults have a counterpart of are TRL's; the rest is the recipe's
    "nash": (nash_md, dict(samples_per_prompt=1, opponent="mixture", beta=0.5, tau=0.1)),
    "ipo": (ipo_md, dict(loss="ipo", beta=0.0, tau=0.1, labels="argmax")),
}
NEVER = [-1]  # no token ends a reply: every reply has all its tokens


def arguments(settings: dict):
    """The script, and its arguments."""
    script, values = ALGORITHMS[settings["algorithm"]]
    args = replace(
        script.RECIPES["smollm2-135m"],
        model=settings["model"],
        device="cpu",
        eval_judge=None,
        batch_size=settings["batch_size"],
        max_new_tokens=settings["new_tokens"],
        temperature=0.9,
        learning_rate=5e-7,
        **values,
    )
    if settings["micro_batch_tokens"]:
        args.micro_batch_tokens = settings["micro_batch_tokens"]
    return script, args


def serve(settings: dict, requests: Iterable[str]) -> Iterator[dict]:
    """Load once and say what was loaded; then one optimiser step for each request, and what it took."""
    script, args = arguments(settings)
    keep_freed_memory()
    exp = set_up("vs_trl", args)
    exp.ends = NEVER
    exp.run = Run("vs_trl", args, 0)  # a run's clock; create() is not called, so nothing is written
    optimiser = make_optimiser(exp.policy, args.optimizer_states, args.weight_decay)
    yield dict(
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        weights=f"{exp.dtype}, masters and moments torch.float32",
        attention=exp.attention,
        micro_batch_tokens=args.micro_batch_tokens,
        threads=torch.get_num_threads(),
    )
    for line in requests:
        yield one_step(script, exp, optimiser, json.loads(line))


def one_step(script, exp: Experiment, optimiser, request: dict) -> dict:
    """One optimiser step of the script on one batch of prompts: what it took."""
    args = exp.args = replace(exp.args, max_new_tokens=request["new_tokens"])
    before = {name: dict(phase) for name, phase in exp.run.phases.items()}
    exp.run.peak_memory_bytes = 0
    start = request["batch"] * args.batch_size
    indices = list(range(start, start + args.batch_size))
    started = time.perf_counter()
    batch, _ = script.collect(exp, indices, request["seed"])
    with exp.run.phase("training"):
        script.train_step(exp, optimiser, batch, 1, args.learning_rate)
    seconds = time.perf_counter() - started

    def spent(name: str, what: str) -> float:
        return exp.run.phases[name][what] - before.get(name, {}).get(what, 0)

    return dict(
        seconds=seconds,
        **{name: spent(name, "seconds") for name in exp.run.phases},
        peak_memory_bytes=exp.run.peak_memory_bytes,
        prompt_tokens=sum(len(exp.prompts[i]) for i in indices),
        new_tokens=spent("sampling", "tokens"),
    )


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    for answer in serve(json.loads(sys.argv[1]), sys.stdin):
        print(json.dumps(answer), file=answers, flush=True)
