"""Training's speed against the machine's matrix peak, its memory with a large vocabulary, and what the low-memory optimiser loses.

    python benchmark/training.py utilisation    # under a minute on two cores: share of the matmul peak, and where the time goes
    python benchmark/training.py memory         # under a minute: peak memory of 4 × 1,024 tokens with a vocabulary of 128,256
    python benchmark/training.py states         # three short runs at learning rate 5e-7: float32 masters, --optimizer-states bfloat16, plain bfloat16
    python benchmark/training.py foreseen       # seconds: what selm.py's recipes will hold, by method, as a table

Each writes its part of benchmark/results/training.json. Random weights and tokens in the model's shapes; `states` trains the real SmolLM2-135M.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from step_cost import make_pairs  # noqa: E402

import common  # noqa: E402
import dry_run  # noqa: E402
import experiment  # noqa: E402
import optimization  # noqa: E402
import selm  # noqa: E402
import synthetic  # noqa: E402


def main(
    part: tyro.conf.Positional[Literal["utilisation", "memory", "states", "foreseen"]],
    rounds: int = 8,
    device: str = "auto",
) -> None:
    """Measure one part and write it.

    Args:
        part: utilisation, memory, states or foreseen.
        rounds: training steps timed (utilisation).
        device: auto, cpu, cuda or mps.
    """
    where = common.resolve_device(device)
    result = {
        "utilisation": lambda: utilisation(where, rounds),
        "memory": memory,
        "states": lambda: states(where),
        "foreseen": recipes_foreseen,
    }[part]()
    file = ROOT / "benchmark/results/training.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[part] = {"command": " ".join(["python", *sys.argv]), **experiment.environment(), **result}
    file.write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps(kept[part], indent=2))


def policy_and_args(model: str, device: torch.device):
    """The default selm task's arguments, and a trainable policy on its attention backend."""
    args = selm.RECIPES["smollm2-135m"]
    dtype = common.resolve_dtype("auto", device)
    attention = common.choose_attention(
        args.attention, device, args.max_prompt_length + 3 * args.max_new_tokens
    )
    return common.make_trainable(common.load_model(model, dtype, device, attention), 0, 0, False), args


def utilisation(device: torch.device, rounds: int) -> dict:
    """Default selm steps: 8 pairs of 50 prompt and 2 × 24 completion tokens, in one micro-batch."""
    experiment.keep_freed_memory(1024)
    policy, args = policy_and_args("random:smollm2-135m", device)
    args = replace(args, micro_batch_tokens=1024)
    optimiser = optimization.make_optimiser(policy, "float32", 0.0)
    weight = common.head(policy)[0]
    pairs = make_pairs(random.Random(0), args.batch_size, args.alpha)
    tokens, scored = common.count_tokens([p.prompt for p in pairs], [p.completions for p in pairs])
    run = experiment.Run("selm", args, 1)
    peaks, steps = [dry_run.matmul_peak(device, weight.dtype)], []
    for i in range(2 + rounds):  # two to warm up
        if i == 2:
            run.phases.clear()
        start = time.perf_counter()
        with run.phase("training"):
            selm.train_step(args, policy, optimiser, pairs, args.alpha, 1e-12, [-1], device, run, 1)
        steps.append(time.perf_counter() - start)
    phases = {name: phase["seconds"] / rounds for name, phase in run.phases.items()}
    peaks.append(dry_run.matmul_peak(device, weight.dtype))
    with torch.profiler.profile() as profile:
        selm.train_step(args, policy, optimiser, pairs, args.alpha, 1e-12, [-1], device, run, 1)
    operators = sorted(profile.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    everything = sum(event.self_cpu_time_total for event in operators)
    flops, seconds = dry_run.model_flops(policy, tokens, scored, 6), statistics.median(steps[2:])
    return {
        "dtype": str(weight.dtype),
        "matmul_peak_flops_per_second": max(peaks),
        "step_seconds_median": seconds,
        "step_seconds_by_part_mean": phases,
        "share_of_cpu_time_by_operator": {
            event.key: round(event.self_cpu_time_total / everything, 3) for event in operators[:10]
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
import common, experiment
way = sys.argv[1]
config = transformers.LlamaConfig(vocab_size=128256, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, attn_implementation="sdpa")
torch.manual_seed(0)
model = common.make_trainable(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), 0, 0, False)
for p in model.parameters():
    p.grad = torch.zeros_like(p)  # gradients are counted with the weights
experiment.keep_freed_memory(1024)

def step(completions):
    prompts = [[i % 1000 + 5 for i in range(16)] for _ in completions]
    if way == "ours":
        common.completion_logprobs(model, common.collate(prompts, [[c] for c in completions], "cpu")).sum().backward()
    else:
        ids = torch.tensor([p + c for p, c in zip(prompts, completions)])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[:, 15:-1].float(), -1)
        logprobs.gather(-1, ids[:, 16:, None]).sum().backward()

step([[7] * 9])  # kernels and buffers that come with the first call
experiment.give_back_freed_memory()
experiment.reset_peak_memory()
before = experiment.peak_memory()
draw = torch.Generator().manual_seed(0)
step(torch.randint(5, 128256, (4, 1008), generator=draw).tolist())
print(experiment.peak_memory() - before)
"""


def memory() -> dict:
    """Peak resident memory above weights and gradients of log-probs, forward and backward, of 4 rows of 1,024 tokens; V = 128,256."""
    grown = {}
    for way in ("ours", "naive"):
        done = subprocess.run(
            [sys.executable, "-c", PROBE.format(root=str(ROOT)), way],
            capture_output=True,
            text=True,
            check=True,
        )
        grown[way] = int(done.stdout.split()[-1])
    return {
        "shape": "4 rows, 16 prompt and 1,008 completion tokens each, V = 128,256; Llama of 4 layers, width 256, bfloat16",
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


def states(device: torch.device, steps: int = 24, learning_rate: float = 5e-7) -> dict:
    """DPO on the same synthetic pairs from the same model by three optimisers: where the weights went, against float32 masters.

    Losses are those of the (master) weights in a float32 model on all the pairs: a bfloat16 forward pass is noisier than what 24 such steps gain.
    """
    experiment.keep_freed_memory(1024)
    policy, args = policy_and_args("smollm2-135m", device)
    args = replace(args, batch_size=4)
    start = [p.detach().float().cpu() for p in policy.parameters()]
    float32 = common.load_model("smollm2-135m", torch.float32, device)
    batches = [
        make_pairs(random.Random(i), args.batch_size, 0.0) for i in range(4)
    ]  # each used again and again: a loss that can fall

    def logprobs(model, pairs):
        return common.sequence_logprobs(
            model, [p.prompt for p in pairs], [p.completions for p in pairs], 1.0, device, 512
        )

    def loss(masters) -> float:
        with torch.no_grad():
            for weight, master in zip(float32.parameters(), masters, strict=True):
                weight.copy_(master)
        ours, theirs = (
            torch.tensor([row for rows in every for row in rows])
            for every in ([logprobs(float32, b) for b in batches], exact)
        )
        return selm.selm_loss(
            ours[:, 0], ours[:, 1], theirs[:, 0], theirs[:, 1], ours[:, 0], theirs[:, 0], args.beta, 0.0
        ).item()

    exact = [logprobs(float32, pairs) for pairs in batches]
    for pairs in batches:
        for pair, reference in zip(pairs, logprobs(policy, pairs), strict=True):
            pair.reference = reference
    went, losses = {}, {"before": loss(start)}
    for kind in (optimization.MasterAdamW, optimization.SplitAdamW, PlainAdamW):
        policy, _ = policy_and_args("smollm2-135m", device)
        optimiser, run = kind(policy), experiment.Run("selm", args, steps)
        for step in range(steps):
            selm.train_step(
                args,
                policy,
                optimiser,
                batches[step % len(batches)],
                0.0,
                learning_rate,
                [-1],
                device,
                run,
                step,
            )
        masters = [master.detach().float().cpu() for master in optimiser.masters]
        losses[kind.__name__] = loss(masters)
        went[kind.__name__] = [master - first for master, first in zip(masters, start, strict=True)]

    def dot(a, b) -> float:
        return sum(
            torch.dot(x.flatten().double(), y.flatten().double()).item()
            for x, y in zip(went[a], went[b], strict=True)
        )

    square = dot("MasterAdamW", "MasterAdamW")
    return {
        "steps": steps,
        "learning_rate": learning_rate,
        "loss": losses,
        "displacement_relative_distance": {
            name: max(0.0, (square + dot(name, name) - 2 * dot(name, "MasterAdamW")) / square) ** 0.5
            for name in went
        },
        "displacement_cosine": {
            name: dot(name, "MasterAdamW") / (square * dot(name, name)) ** 0.5 for name in went
        },
        "weights_that_stood_still": {
            name: sum((d == 0).sum().item() for d in tensors) / sum(d.numel() for d in tensors)
            for name, tensors in went.items()
        },
    }


# --- foreseen -----------------------------------------------------------------------------------


def recipes_foreseen() -> dict:
    """GiB that each bfloat16 model holds in `selm.py --exploration xpo`, its reference included, before caches and activations, by method."""
    methods = {
        "LoRA, rank 32": {"lora_rank": 32},
        "all weights, float32 states": {"lora_rank": 0},
        "all weights, bfloat16 states": {"lora_rank": 0, "optimizer_states": "bfloat16"},
    }
    table = {}
    for model in synthetic.CONFIGS:
        args = replace(selm.PAPER, model=model, dtype="bfloat16", exploration="xpo")
        for method, change in methods.items():
            needs = dry_run.foreseen(replace(args, **change), torch.device("cpu"))
            static = sum(n for what, n in needs.items() if what not in (dry_run.ACTIVATIONS, dry_run.CACHES))
            table.setdefault(model, {})[method] = round(static / dry_run.GIB, 2)
        table[model]["caches, 128 rows of 1,536 tokens"] = round(needs[dry_run.CACHES] / dry_run.GIB, 2)
        table[model]["activations, 8,192 tokens, checkpointed"] = round(
            needs[dry_run.ACTIVATIONS] / dry_run.GIB, 2
        )
    return {"gib": table}


if __name__ == "__main__":
    tyro.cli(main)
