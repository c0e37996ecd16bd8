"""Training's speed against the machine's matrix peak, its memory with a large vocabulary, and what the
low-memory optimiser loses.

    python benchmark/training.py utilisation    # share of the matmul peak, and where the time goes
    python benchmark/training.py memory         # peak of 4 × 1,024 tokens with a vocabulary of 128,256
    python benchmark/training.py states         # float32, --optimizer-states bfloat16, plain bfloat16
    python benchmark/training.py logits         # what log-probs lose to logits rounded to bfloat16
    python benchmark/training.py foreseen       # what selm.py's recipes will hold, by method, as a table

Each writes its part of benchmark/results/training.json. On two cores `utilisation` and `memory` take under a
minute, `foreseen` seconds. Random weights and tokens in the model's shapes; `states` trains the real
SmolLM2-135M, three short runs at learning rate 5e-7.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import record
import torch
import tyro
from step_cost import bare_experiment, make_pairs

import common
import selm
from cleanalign import dry_run, synthetic
from cleanalign.models import head, load_model
from cleanalign.optimization import MasterAdamW, SplitAdamW, make_optimiser
from cleanalign.phases import keep_freed_memory


def main(
    part: tyro.conf.Positional[Literal["utilisation", "memory", "states", "logits", "foreseen"]],
    rounds: int = 8,
    steps: int = 24,
    device: str = "auto",
    out: str = str(record.RESULTS / "training.json"),
) -> None:
    """Measure one part and write it.

    Args:
        part: utilisation, memory, states, logits or foreseen.
        rounds: training steps timed (utilisation).
        steps: training steps of each optimiser (states).
        device: auto, cpu, cuda or mps.
        out: JSON file to write into.
    """
    result = {
        "utilisation": lambda: utilisation(device, rounds),
        "memory": memory,
        "states": lambda: states(device, steps),
        "logits": logits,
        "foreseen": recipes_foreseen,
    }[part]()
    file = Path(out)
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[part] = {**record.origin(), **result}
    record.write(file, kept)
    print(json.dumps(kept[part], indent=2))


def utilisation(device: str, rounds: int) -> dict:
    """Default selm steps: 8 pairs of 50 prompt and 2 × 24 completion tokens, in one micro-batch."""
    keep_freed_memory()
    args = replace(
        selm.RECIPES["smollm2-135m"], model="random:smollm2-135m", device=device, micro_batch_tokens=1024
    )
    exp = bare_experiment(args)
    policy, run = exp.policy, exp.run
    optimiser = make_optimiser(policy, "float32", 0.0)
    weight = head(policy)[0]
    pairs = make_pairs(random.Random(0), args.batch_size, args.alpha)
    tokens, scored = common.count_tokens([p.prompt for p in pairs], [p.completions for p in pairs])
    peaks, steps = [dry_run.matmul_peak(exp.device, weight.dtype)], []
    for i in range(2 + rounds):  # two to warm up
        if i == 2:
            run.phases.clear()
        start = time.perf_counter()
        with run.phase("training"):
            selm.train_step(exp, optimiser, pairs, 1, 1e-12)
        steps.append(time.perf_counter() - start)
    phases = {name: phase["seconds"] / rounds for name, phase in run.phases.items()}
    peaks.append(dry_run.matmul_peak(exp.device, weight.dtype))
    with torch.profiler.profile() as profile:
        selm.train_step(exp, optimiser, pairs, 1, 1e-12)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    operators = sorted(times, key=times.get, reverse=True)
    flops, seconds = dry_run.model_flops(policy, tokens, scored, 6), statistics.median(steps[2:])
    return {
        "dtype": str(weight.dtype),
        "matmul_peak_flops_per_second": max(peaks),
        "step_seconds_median": seconds,
        "step_seconds_by_part_mean": phases,
        "share_of_cpu_time_by_operator": {
            name: round(times[name] / sum(times.values()), 3) for name in operators[:10]
        },
        "tokens": tokens,
        "scored": scored,
        "model_flops": flops,
        "tokens_per_second": tokens / seconds,
        "share_of_peak": flops / seconds / max(peaks),
        "share_of_peak_without_update": flops / phases["training"] / max(peaks),
    }


# --- memory -------------------------------------------------------------------------------------

PROBE = """
import sys
sys.path.insert(0, {root!r})
import torch, transformers
import common
from cleanalign.models import make_trainable
from cleanalign.phases import give_back_freed_memory, keep_freed_memory, peak_memory, reset_peak_memory
way = sys.argv[1]
config = transformers.LlamaConfig(
    vocab_size=128256, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, attn_implementation="sdpa"
)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model = make_trainable(model, 0, 0, False)
for p in model.parameters():
    p.grad = torch.zeros_like(p)  # gradients are counted with the weights
keep_freed_memory()

def step(completions):
    prompts = [[i % 1000 + 5 for i in range(16)] for _ in completions]
    if way == "ours":
        batch = common.collate(prompts, [[c] for c in completions], "cpu")
        common.completion_logprobs(model, batch).sum().backward()
    else:
        ids = torch.tensor([p + c for p, c in zip(prompts, completions)])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[:, 15:-1].float(), -1)
        logprobs.gather(-1, ids[:, 16:, None]).sum().backward()

step([[7] * 9])  # kernels and buffers that come with the first call
give_back_freed_memory()
reset_peak_memory()
before = peak_memory()
draw = torch.Generator().manual_seed(0)
step(torch.randint(5, 128256, (4, 1008), generator=draw).tolist())
print(peak_memory() - before)
"""


def memory() -> dict:
    """Peak resident memory above weights and gradients of log-probs, forward and backward, of 4 rows of 1,024
    tokens; V = 128,256."""
    grown = {}
    for way in ("ours", "naive"):
        command = [sys.executable, "-c", PROBE.format(root=str(record.ROOT)), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[way] = int(done.stdout.split()[-1])
    return {
        "shape": "4 rows, 16 prompt and 1,008 completion tokens each, V = 128,256; "
        "Llama of 4 layers, width 256, bfloat16",
        "bytes_above_weights_and_gradients": grown,
        "ratio": grown["naive"] / grown["ours"],
    }


# --- optimiser states ---------------------------------------------------------------------------


class PlainAdamW:
    """torch's AdamW on the bfloat16 weights themselves: what the others are there to avoid."""

    def __init__(self, model):
        self.masters = [p for p in model.parameters() if p.requires_grad]
        self.inner = torch.optim.AdamW(self.masters, weight_decay=0.0)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, step, forget the gradient; returns its norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        self.inner.param_groups[0]["lr"] = learning_rate
        self.inner.step()
        self.inner.zero_grad()
        return float(norm)


def states(device: str, steps: int, learning_rate: float = 5e-7) -> dict:
    """DPO on the same synthetic pairs from the same model by three optimisers: where the weights went,
    against float32 masters.

    Losses are those of the (master) weights in a float32 model on all the pairs: a bfloat16 forward pass is
    noisier than what 24 such steps gain.
    """
    keep_freed_memory()
    args = replace(selm.RECIPES["smollm2-135m"], device=device, batch_size=4, alpha=0.0)
    exp = bare_experiment(args)
    start = [p.detach().float().cpu() for p in exp.policy.parameters()]
    float32 = load_model(args.model, torch.float32, exp.device)
    # each used again and again: a loss that can fall
    batches = [make_pairs(random.Random(i), args.batch_size, 0.0) for i in range(4)]

    def logprobs(model) -> list[list[float]]:
        rows = []
        for pairs in batches:
            prompts, completions = [p.prompt for p in pairs], [p.completions for p in pairs]
            rows += common.sequence_logprobs(model, prompts, completions, 1.0, exp.device, 512)
        return rows

    def loss(masters) -> float:
        with torch.no_grad():
            for weight, master in zip(float32.parameters(), masters, strict=True):
                weight.copy_(master)
        chosen, rejected = torch.tensor(logprobs(float32)).unbind(1)
        before, rejected_before = torch.tensor(exact).unbind(1)
        values = (chosen, rejected, before, rejected_before, chosen, before)
        return selm.selm_loss(*values, args.beta, 0.0).item()

    exact = logprobs(float32)
    for pair, reference in zip(itertools.chain(*batches), logprobs(exp.policy), strict=True):
        pair.reference = reference
    went, losses = {}, {"before": loss(start)}
    for kind in (MasterAdamW, SplitAdamW, PlainAdamW):
        exp = bare_experiment(args)
        optimiser = kind(exp.policy)
        for step in range(steps):
            selm.train_step(exp, optimiser, batches[step % len(batches)], step, learning_rate)
        masters = [master.detach().float().cpu() for master in optimiser.masters]
        losses[kind.__name__] = loss(masters)
        moves = [master - first for master, first in zip(masters, start, strict=True)]
        went[kind.__name__] = torch.cat([move.flatten() for move in moves])

    exact_way = went["MasterAdamW"]
    square = dot(exact_way, exact_way)
    distance, cosine, still = {}, {}, {}
    for name, way in went.items():
        own, along = dot(way, way), dot(way, exact_way)
        distance[name] = max(0.0, (square + own - 2 * along) / square) ** 0.5
        cosine[name] = along / (square * own) ** 0.5
        still[name] = (way == 0).sum().item() / way.numel()
    return {
        "steps": steps,
        "learning_rate": learning_rate,
        "loss": losses,
        "displacement_relative_distance": distance,
        "displacement_cosine": cosine,
        "weights_that_stood_still": still,
    }


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Inner product of two long float32 vectors, summed in float64."""
    return sum(torch.dot(x.double(), y.double()).item() for x, y in zip(a.split(2**24), b.split(2**24)))


# --- logits ---------------------------------------------------------------------------------------


@torch.no_grad()
def logits() -> dict:
    """Log-probs of a real model's own tokens from the same bfloat16 hidden states and weights, once from
    float32 logits and once from logits rounded to bfloat16: nats a token, and of replies of 1,024 tokens."""
    model = load_model("smollm2-135m", torch.bfloat16, torch.device("cpu"))
    prompts = [[1, 5 + i, 17] for i in range(8)]
    ends, length = [-1], 256
    replies = common.sample(model, prompts, ends, max_new_tokens=length, seed=0, max_rows=8)
    batch = common.collate(prompts, replies, "cpu")
    hidden = common.completion_hidden(model, batch).flatten(0, 2)[batch.counted]  # (N, D)
    targets = batch.targets.flatten()[batch.counted, None]  # (N, 1)
    weight = head(model)[0]
    exact = hidden.float() @ weight.float().T  # (N, V)
    of_exact, of_rounded = (
        x.log_softmax(-1).gather(1, targets)[:, 0] for x in (exact, exact.bfloat16().float())
    )
    error = (of_rounded - of_exact).double()  # (N,)
    return {
        "tokens": len(error),
        "greatest_logit": exact.max().item(),
        "mean_greatest_logit": exact.amax(-1).mean().item(),
        "error_mean": error.mean().item(),
        "error_std": error.std().item(),
        "error_std_of_1024_tokens": error.std().item() * 1024**0.5,
    }


# --- foreseen -----------------------------------------------------------------------------------


def recipes_foreseen() -> dict:
    """GiB that each bfloat16 model holds in `selm.py --exploration xpo`, its reference included, before
    caches and activations, by method."""
    methods = {
        "LoRA, rank 32": {"lora_rank": 32},
        "all weights, float32 states": {"lora_rank": 0},
        "all weights, bfloat16 states": {"lora_rank": 0, "optimizer_states": "bfloat16"},
    }
    table, transient = {}, [what for names in dry_run.TRANSIENT.values() for what in names]
    for model in synthetic.CONFIGS:
        args = replace(selm.PAPER, model=model, dtype="bfloat16", exploration="xpo", sample_rows=128)
        for method, change in methods.items():
            needs = dry_run.foreseen(replace(args, **change), torch.device("cpu"))
            static = sum(n for what, n in needs.items() if what not in transient)
            table.setdefault(model, {})[method] = gib(static)
        table[model]["caches, 128 rows of 1,536 tokens"] = gib(needs[dry_run.CACHES])
        table[model]["activations, 8,192 tokens, checkpointed"] = gib(needs[dry_run.ACTIVATIONS])
    return {"gib": table}


def gib(count: int) -> float:
    """Bytes as GiB."""
    return round(count / dry_run.GIB, 2)


if __name__ == "__main__":
    tyro.cli(main)
