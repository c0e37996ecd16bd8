"""Online-IPO and IPO-MD, with online DPO and online SLiC on the same stream. arXiv 2403.08635.

The idea: IPO's loss on pairs that the policy itself samples has the regularised Nash equilibrium of the preference game as its
stationary point; IPO-MD samples them from a geometric mixture of policy and reference, as Nash-MD does.

Departures from the paper:
 1. The mixture is taken per token, π^(1−β) π_ref^β renormalised at every token, as the paper's runs do; its theory is for whole
    sequences. The two agree at β = 0, at β = 1 and for one-token replies (docs/theory.md shows how far apart they are).
 2. Labels are the judge's soft p (default), Bernoulli(p) draws, or argmax; argmax solves another game, that of 1[p > ½].
 3. The loss is (h − 1/(2τ))²; the paper's code is reported to multiply it by τ, so its learning rates carry over at τ = 1 only.
 4. DPO and SLiC get the same soft weighting, p f(h) + (1 − p) f(−h).
 5. AdamW in place of Adafactor.
 6. On one GPU the 8B recipe trains a LoRA adapter; --lora-rank 0 trains all weights.
 7. The smollm2-135m recipe is ours, chosen for two CPU cores.

Examples:
    python ipo_md.py                                     # IPO-MD on SmolLM2-135M; minutes on a laptop
    python ipo_md.py --model pythia-1b-tldr --judge hf:ID   # summarisation, the paper's task, on one GPU
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

import common
import optimization
from common import require
from experiment import Run, check_common, command_line, evaluate, write_model
from judges import judge_candidates, load_judge


@dataclass
class Args:
    """Online-IPO, IPO-MD, online DPO and online SLiC (arXiv 2403.08635).

    python ipo_md.py                                        learns on a laptop in minutes, needs no GPU and no model hub

    python ipo_md.py --model pythia-1b-tldr --judge hf:ID   summarisation, the paper's task, on one GPU

    --model NAME also sets the recipe's other values, shown as the defaults below; flags given by hand win.
    """

    # run
    seed: int = 1
    """Seed of everything random; a run is a function of its arguments."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto is cuda, else mps, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the computation; auto is bfloat16 where the hardware is fast at it. What the optimiser keeps: --optimizer-states."""
    run_dir: str = "runs"
    """Folder that holds the run folders."""
    run_name: str | None = None
    """Name of this run's folder, which must not exist; None makes one of script, model, seed and time."""
    resume: str | None = None
    """Run folder to continue from its last checkpoint, with the arguments it had."""
    save_every: int = 20
    """Optimiser steps between checkpoints; 0 writes none."""
    track: bool = False
    """Also log to Weights & Biases (needs the package wandb)."""
    dry_run: bool = False
    """Rehearse one step at the greatest lengths on random weights in this model's shapes, and report memory and speed by phase."""

    # model and data
    model: str = "smollm2-135m"
    """Recipe name, hub id or folder of the starting model."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on every linear layer; 0 trains all weights."""
    lora_alpha: int = 64
    """LoRA's scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention backend; auto is sdpa, or eager for short sequences on a CPU, where it is faster."""
    dataset: str = "chitchat"
    """Prompts: a name (chitchat, ultrafeedback, tldr), hub id, or .jsonl, .jsonl.gz or .parquet file."""
    num_prompts: int | None = 360
    """Training prompts, each used once an epoch; None is the whole data set."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included; longer ones are dropped and counted."""
    judge: str = "sentiment"
    """Who prefers what: sentiment, polarity, cycle, hf:ID (a reward model), pairrm, pairwise:ID (a model that answers A or B)
    or FILE.py:FUNCTION; see docs/judges.md."""
    eval_judge: str | None = "polarity"
    """A second judge that is never trained on; None for none."""
    eval_prompts: int = 128
    """Held-out prompts of the final comparison with the starting model."""

    # algorithm
    loss: Literal["ipo", "dpo", "slic"] = "ipo"
    """ipo is the paper's; dpo and slic are its siblings on the same samples."""
    tau: float = 0.03
    """Strength of the tie to the reference, τ."""
    beta: float = 0.125
    """Share of the reference in the mixture that both replies are sampled from; 0 is online-IPO, 1 samples the reference."""
    labels: Literal["soft", "bernoulli", "argmax"] = "soft"
    """What the judge's p becomes: itself, a coin flip of that chance, or 1[p > 1/2] (another game; ties stay 1/2)."""
    length_normalize: bool = False
    """Divide each reply's log-probs by its length, as TRL's offline trainer does; the paper sums."""
    offline: bool = False
    """No sampling: the same loss on the data set's chosen and rejected responses, with label 1."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most; None takes every prompt. The schedule shortens with it."""
    learning_rate: float = 6e-5
    """Peak learning rate."""
    batch_size: int = 12
    """Prompts in one optimiser step."""
    epochs: int = 1
    """Passes over the prompts; each samples anew."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """Learning rate after the warm-up."""
    optimizer_states: Literal["float32", "bfloat16"] = "float32"
    """What AdamW keeps for each bfloat16 weight: float32 master and moments, 12 bytes; or bfloat16 moments and the master's 16 low bits, 6."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0 never clips."""
    micro_batch_tokens: int = 192
    """Tokens, padding included, in one forward and backward pass; the gradient is summed over passes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute for far less memory."""

    # sampling
    max_new_tokens: int = 24
    """Longest reply, in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling mass; below 1 the losses, which ignore it, are no longer exact."""
    sample_rows: int = 64
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice stands in args.json."""
    decoding: Literal["auto", "eager", "graphs", "compiled"] = "auto"
    """How a token's kernels are launched: one by one, as CUDA graphs, or fused by torch.compile and then as graphs; auto is graphs on CUDA."""


TLDR = Args(  # the paper's summarisation task, for a hub policy of one billion weights
    model="pythia-1b-tldr",
    dataset="tldr",
    num_prompts=None,
    max_prompt_length=512,
    max_new_tokens=64,
    judge="hf:cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
    eval_judge=None,
    eval_prompts=256,
    tau=1.0,
    beta=0.125,
    epochs=9,  # of some 117,000 prompts: enough for the steps
    max_steps=30_000,
    learning_rate=1e-5,
    batch_size=32,
    micro_batch_tokens=16_384,
    schedule="constant",
    save_every=500,
    sample_rows=0,
)
RECIPES = {
    "smollm2-135m": Args(),
    "pythia-1b-tldr": TLDR,
    "llama3-8b": replace(
        TLDR,
        model="llama3-8b",
        dataset="ultrafeedback",
        judge="pairrm",
        lora_rank=32,
        max_new_tokens=1024,
        max_steps=2000,
        learning_rate=5e-6,
        micro_batch_tokens=8192,
        gradient_checkpointing=True,
    ),
}
CURVES = ("score", "loss", "preference", "rewards/accuracy", "kl", "length", "entropy", "mixture_agreement", "grad_norm")


def preference_loss(
    policy_a: torch.Tensor,
    policy_b: torch.Tensor,
    reference_a: torch.Tensor,
    reference_b: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
    kind: Literal["ipo", "dpo", "slic"] = "ipo",
) -> torch.Tensor:
    """Online-IPO's loss, or its sibling's, on two sampled completions; a scalar to minimise (mean over the batch).

    Args:
        policy_a, policy_b: (B,) log π(y) and log π(y'), summed over tokens, in nats.
        reference_a, reference_b: (B,) the same under π_ref.
        preference: (B,) p(a ≻ b) in [0, 1]; hard labels are 0 and 1.
        tau: strength of the tie to the reference.
        kind: ipo, arXiv 2403.08635, Eq. 7; dpo, arXiv 2305.18290, Eq. 7; slic, arXiv 2305.10425, as a hinge on τh.

    Each is p · f(h) + (1 − p) · f(−h), with h = log[π(a)/π_ref(a)] − log[π(b)/π_ref(b)].
    """
    h = (policy_a - reference_a) - (policy_b - reference_b)  # (B,)

    def f(h):
        if kind == "ipo":
            return (h - 1 / (2 * tau)) ** 2
        if kind == "dpo":
            return -F.logsigmoid(tau * h)
        return torch.relu(1 - tau * h)

    return (preference * f(h) + (1 - preference) * f(-h)).mean()


@dataclass
class Pair:
    """One prompt's training example: two completions and the label p(a ≻ b)."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # a and b
    label: float


def main(args: Args) -> None:
    """Run IPO-MD: see the numbered steps, which docs/ipo_md.md explains."""
    check_args(args)

    # 1. Model, judge, data.
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    judge = load_judge(args.judge, device)
    eval_judge = load_judge(args.eval_judge, device, "--eval-judge") if args.eval_judge else None
    train_rows, eval_rows = common.load_rows(args.dataset, ("chosen", "rejected") if args.offline else (), held_out=args.eval_prompts)
    tokenizer = common.load_tokenizer(args.model)
    rows, prompts = common.encode_rows(tokenizer, train_rows, args.max_prompt_length, args.num_prompts, args.seed, "training prompts")
    eval_rows, eval_prompts = common.encode_rows(tokenizer, eval_rows, args.max_prompt_length, args.eval_prompts, 0, "held-out prompts")
    del train_rows
    batches = plan_batches(args, len(rows))
    attention = common.choose_attention(args.attention, device, args.max_prompt_length + 2 * args.max_new_tokens)
    policy = common.load_model(args.model, dtype, device, attention)
    ends = common.end_tokens(policy, tokenizer)
    policy = common.make_trainable(policy, args.lora_rank, args.lora_alpha, args.gradient_checkpointing)
    reference = common.starting_model(policy, args.model, dtype, device, attention)
    states = sum(optimization.bytes_per_weight(args.optimizer_states, dtype).values())
    rows_at_once = common.choose_sample_rows(args.sample_rows, [policy, reference], args.max_prompt_length + args.max_new_tokens, states)
    args = replace(args, sample_rows=rows_at_once)
    sampling = dict(
        ends=ends,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        max_rows=args.sample_rows,
        decoding=common.resolve_decoding(args.decoding, device),
    )

    run = Run("ipo_md", args, len(batches))
    run.create()
    state = run.restore()
    optimiser = optimization.make_optimiser(policy, args.optimizer_states, args.weight_decay)
    if state:
        optimiser.load_state_dict(state["optimiser"])
    for step in range(state["step"] + 1 if state else 1, len(batches) + 1):
        # 2. Two replies to each prompt from the mixture; the judge says which it prefers, and by how much.
        seed = common.derive_seed(args.seed, step)
        batch, metrics = collect(args, batches[step - 1], seed, rows, prompts, policy, reference, tokenizer, sampling, judge, run)

        # 3. Log-probs, loss, step.
        learning_rate = optimization.learning_rate_at(step - 1, len(batches), args.learning_rate, args.warmup_ratio, args.schedule)
        with run.phase("training"):
            metrics |= train_step(args, policy, reference, optimiser, batch, learning_rate, ends, device, run, step)
        metrics |= {"learning_rate": learning_rate, **run.throughput()}
        run.log(step, metrics, show=("loss", "score", "rewards/accuracy", "kl"))
        if args.save_every and step % args.save_every == 0 and step < len(batches):
            run.save({"step": step, "optimiser": optimiser.state_dict()})

    if args.dry_run:
        return run.finish_dry_run(policy)

    # 4. Compare with the starting model on held-out prompts; save.
    optimiser.release()
    with run.phase("evaluation"):
        summary = evaluate(run, policy, reference, tokenizer, ends, eval_rows, eval_prompts, judge, eval_judge)
    write_model(run, policy, tokenizer, summary)
    run.finish(summary, CURVES)


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    require(args.tau > 0, f"--tau must be above 0, got {args.tau}.")
    require(0 <= args.beta <= 1, f"--beta must lie in [0, 1], got {args.beta}: it is the reference's share in the mixture.")
    require(args.epochs >= 1, f"--epochs must be at least 1, got {args.epochs}.")
    require(args.learning_rate > 0, f"--learning-rate must be above 0, got {args.learning_rate}.")
    require(args.temperature > 0 or args.offline, "--temperature 0 (greedy) gives both replies the same text: nothing to compare.")
    require(args.num_prompts is None or args.num_prompts >= 1, f"--num-prompts must be at least 1, got {args.num_prompts}.")


def plan_batches(args: Args, prompts: int) -> list[list[int]]:
    """Prompt indices of every optimiser step: each epoch in an order of its own, `--max-steps` at most."""
    batches = []
    for epoch in range(args.epochs):
        order = list(range(prompts))
        random.Random(common.derive_seed(args.seed, "order", epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, prompts, args.batch_size)]
    return batches[: args.max_steps]


def collect(args, indices, seed, rows, prompts, policy, reference, tokenizer, sampling, judge, run) -> tuple[list[Pair], dict]:
    """Two completions for each prompt and the label p(a ≻ b); metrics of the sampling."""
    chosen_rows, chosen_prompts = [rows[i] for i in indices], [prompts[i] for i in indices]
    if args.offline:
        end = common.turn_end(tokenizer, sampling["ends"])
        completions = [
            [common.encode_response(tokenizer, r.prompt, text, end, args.max_new_tokens) for text in (r.chosen, r.rejected)]
            for r in chosen_rows
        ]
        return [Pair(r.id, p, c, 1.0) for r, p, c in zip(chosen_rows, chosen_prompts, completions, strict=True)], {}
    stats = {}
    with run.phase("sampling"):
        mixture = (reference, args.beta) if args.beta > 0 else None
        completions = common.sample(policy, chosen_prompts, completions=2, seed=seed, mixture=mixture, stats=stats, **sampling)
    run.set_apart("sampling", "decoder warm-up", stats["warmup_seconds"])
    run.add_tokens("sampling", stats["tokens"])
    with run.phase("judging"):
        texts = [[common.decode(tokenizer, c) for c in pair] for pair in completions]
        asked = [row.prompt for row in chosen_rows]
        scores, matrices = judge_candidates(judge, asked, texts)
        p = [matrix[0, 1].item() for matrix in matrices]
    metrics = {"preference": sum(max(x, 1 - x) for x in p) / len(p)}  # how decided the judge is: ½ to 1
    if "agreement" in stats:
        metrics["mixture_agreement"] = stats["agreement"]
    if scores is not None:
        metrics["score"] = torch.cat(scores).mean().item()
    if judge.measure is not None:
        metrics |= judge.measure([t for pair in texts for t in pair])
    coin = random.Random(seed)
    labels = {
        "soft": lambda x: x,
        "bernoulli": lambda x: float(coin.random() < x),
        "argmax": lambda x: 0.5 if x == 0.5 else float(x > 0.5),
    }[args.labels]
    return [Pair(r.id, q, c, labels(x)) for r, q, c, x in zip(chosen_rows, chosen_prompts, completions, p, strict=True)], metrics


def train_step(args, policy, reference, optimiser, batch: list[Pair], learning_rate: float, ends, device, run, step: int) -> dict:
    """One optimiser step on B pairs, in micro-batches; returns its metrics."""
    temperature = 1.0 if args.offline else args.temperature
    total = {}
    parts = common.micro_batches([p.prompt for p in batch], [p.completions for p in batch], args.micro_batch_tokens)
    for part in parts:
        pairs = [batch[i] for i in part]
        data = common.collate([p.prompt for p in pairs], [p.completions for p in pairs], device)
        label = torch.tensor([p.label for p in pairs], device=device)  # (G,)
        with torch.no_grad(), run.phase("reference"):
            reference_logprobs = common.completion_logprobs(reference, data, temperature)  # (G, 2, T)
        logprobs, entropy = common.completion_logprobs(policy, data, temperature, entropy=True)  # (G, 2, T)
        lengths = data.mask.sum(-1)  # (G, 2)
        scale = 1 / lengths if args.length_normalize else torch.ones_like(lengths)
        sums, reference_sums = logprobs.sum(-1) * scale, reference_logprobs.sum(-1) * scale  # (G, 2)
        loss = preference_loss(sums[:, 0], sums[:, 1], reference_sums[:, 0], reference_sums[:, 1], label, args.tau, args.loss)
        run.stop_unless_finite(step, loss.item(), [p.row_id for p in pairs])
        (loss * len(pairs) / len(batch)).backward()
        run.add_batch("training", data)
        run.add_tokens("reference", data.tokens, data.scored)

        with torch.no_grad():
            ratio = (logprobs - reference_logprobs).sum(-1)  # (G, 2) log π/π_ref
            h = (sums - reference_sums)[:, 0] - (sums - reference_sums)[:, 1]  # (G,)
            measured = {
                "loss": loss,
                "rewards/margin": args.tau * (h * (2 * label - 1).sign()).mean(),
                "rewards/accuracy": ((h * (2 * label - 1)) > 0).float().mean(),
                "logps/policy": sums.mean(),
                "logps/reference": reference_sums.mean(),
                "kl": ratio.mean(),  # of the sampled replies: at β = 0 an unbiased estimate of KL(π ‖ π_ref)
                "entropy": entropy.sum() / data.mask.sum(),
                "length": lengths.mean(),
            }
            for name, value in measured.items():
                total[name] = total.get(name, 0.0) + float(value) * len(pairs) / len(batch)
    total["finished"] = sum(c[-1] in ends for p in batch for c in p.completions) / (2 * len(batch))
    with run.phase("update"):
        total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
    return total


if __name__ == "__main__":
    command_line(main, RECIPES)
