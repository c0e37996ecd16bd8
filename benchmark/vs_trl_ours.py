"""Our side of vs_trl.py: `nash_md.py`'s or `ipo_md.py`'s own collect and train_step, one optimiser step for each line on standard input.

Argument: a JSON object with `algorithm` (nash, ipo), `model`, `batch_size`, `new_tokens` (the most that will be asked for) and `micro_batch_tokens`.
Each input line is {"new_tokens": N, "batch": which prompts, "seed": of the samples}; each output line what that step took.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import experiment
import ipo_md
import nash_md
import optimization
from judges import load_judge

ALGORITHMS = {  # values that TRL's defaults have a counterpart of are TRL's; the rest is the recipe's
    "nash": (nash_md, dict(samples_per_prompt=1, opponent="mixture", beta=0.5, tau=0.1)),
    "ipo": (ipo_md, dict(loss="ipo", beta=0.0, tau=0.1, labels="argmax")),
}
NEVER = [-1]  # no token ends a reply: every reply has all its tokens


def prompts_of(args, model: str) -> tuple[list, list[list[int]], object]:
    """The training rows of the default run, their prompts' token ids, and the tokenizer."""
    tokenizer = common.load_tokenizer(model)
    train_rows, _ = common.load_rows(args.dataset, held_out=args.eval_prompts)
    return *common.encode_rows(
        tokenizer, train_rows, args.max_prompt_length, args.num_prompts, args.seed, "prompts"
    ), tokenizer


def serve(settings: dict, requests: Iterable[str]) -> Iterator[dict]:
    """Load once and say what was loaded; then one optimiser step for each request, and what it took."""
    script, values = ALGORITHMS[settings["algorithm"]]
    B, N = settings["batch_size"], settings["new_tokens"]
    args = replace(
        script.RECIPES["smollm2-135m"],
        batch_size=B,
        max_new_tokens=N,
        temperature=0.9,
        learning_rate=5e-7,
        **values,
    )
    if settings["micro_batch_tokens"]:
        args.micro_batch_tokens = settings["micro_batch_tokens"]
    experiment.keep_freed_memory(args.micro_batch_tokens)
    device = common.resolve_device("cpu")
    dtype = common.resolve_dtype("auto", device)
    judge = load_judge(args.judge, device)
    rows, prompts, tokenizer = prompts_of(args, settings["model"])
    replies = 2 if script is ipo_md else args.samples_per_prompt
    attention = common.choose_attention("auto", device, args.max_prompt_length + replies * N)
    policy = common.make_trainable(
        common.load_model(settings["model"], dtype, device, attention), 0, 0, False
    )
    reference = common.load_model(settings["model"], dtype, device, attention)
    optimiser = optimization.make_optimiser(policy, args.optimizer_states, args.weight_decay)
    run = experiment.Run("benchmark", args, 0)  # its clock; create() is not called, so nothing is written
    opponent = [None] if script is nash_md else []  # no EMA
    yield dict(
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        weights=f"{dtype}, masters and moments torch.float32",
        attention=attention,
        micro_batch_tokens=args.micro_batch_tokens,
        threads=torch.get_num_threads(),
    )
    for line in requests:
        request = json.loads(line)
        indices = list(range(request["batch"] * B, (request["batch"] + 1) * B))
        sampling = dict(
            ends=NEVER,
            max_new_tokens=request["new_tokens"],
            temperature=args.temperature,
            top_p=args.top_p,
            max_rows=args.sample_rows,
            decoding="eager",
        )
        run.phases.clear()
        start = time.perf_counter()
        batch, _ = script.collect(
            args,
            indices,
            request["seed"],
            rows,
            prompts,
            policy,
            reference,
            *opponent,
            tokenizer,
            sampling,
            judge,
            run,
        )
        with run.phase("training"):
            script.train_step(
                args, policy, reference, optimiser, batch, args.learning_rate, NEVER, device, run, 1
            )
        yield dict(
            seconds=time.perf_counter() - start,
            **{name: phase["seconds"] for name, phase in run.phases.items()},
            peak_memory_bytes=experiment.peak_memory(),
            prompt_tokens=sum(len(prompts[i]) for i in indices),
            new_tokens=run.phases["sampling"]["tokens"],
        )


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    for answer in serve(json.loads(sys.argv[1]), sys.stdin):
        print(json.dumps(answer), file=answers, flush=True)
