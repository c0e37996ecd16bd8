"""SELM, self-exploring language models: iterative DPO plus one term of optimism. arXiv 2405.19332 v3.

The idea: preference learning never hears about replies the policy does not sample. SELM therefore lowers the likelihood of
what its reference already says, so that mass moves to replies not yet judged. α = 0 is iterative DPO.

Departures from the paper:
 1. α is multiplied by β, as in Eq. 4.2 and the official code; the paper's Algorithms 1 and 2 print α alone.
 2. Reference log-probs are taken once for each pair before an iteration's first update (π_ref = π_t is the policy then), so no
    reference model is held in memory.
 3. Where y_s is a member of its pair, its log-probs are reused: no forward pass of its own.
 4. With prompts only (no data set responses) the K samples are the candidates, and y_s is one of them, uniformly and
    whatever its rank; for K = 2 it is both, averaged.
 5. On one GPU the 7-8B recipes train a LoRA adapter; --lora-rank 0 gives the paper's training of all weights.
 6. Sampled replies (--temperature above 0) get log-probs of logits divided by the temperature; the paper's greedy ones and
    the data set's responses get them at 1.
 7. The smollm2-135m recipe is ours, chosen for two CPU cores.
 8. Any judge's candidates are ranked by mean preference; the paper's code ranks by PairRM's mean logit.

Examples:
    python selm.py                                   # SmolLM2-135M learns to answer cheerfully; minutes on a laptop
    python selm.py --model llama3-8b                 # the paper's Llama recipe on one GPU
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
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
    """SELM: Self-Exploring Language Models (arXiv 2405.19332), with iterative DPO as its alpha 0.

    python selm.py                                  learns on a laptop in minutes, needs no GPU and no model hub

    python selm.py --model llama3-8b                the paper's Llama recipe on one GPU

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
    save_every: int = 8
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
    """Prompts: a name (chitchat, ultrafeedback), hub id, or .jsonl, .jsonl.gz or .parquet file."""
    num_prompts: int | None = 192
    """Training prompts of all iterations together; None is the whole data set."""
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
    iterations: int = 3
    """Iterations: each samples from the current policy, which becomes the reference, on a slice of the prompts of its own."""
    beta: float = 0.1
    """Strength of the tie to the reference, in Eq. 4.2's β."""
    alpha: float = 0.001
    """Strength of the exploration term, in Eq. 4.2's α; 0 is iterative DPO."""
    exploration: Literal["selm", "xpo"] = "selm"
    """selm: the paper's term. xpo: arXiv 2405.21046's, α Σ log π(y_s) with y_s from a fixed reference, each pair one answer
    of the policy and one of the reference, sampled anew at every step."""
    samples_per_prompt: int = 4
    """K, the policy's own answers to each prompt."""
    offline_responses: bool = False
    """Also rank the data set's chosen and rejected responses as candidates (the paper's recipe, with K = 1)."""
    offline_warmup: bool = False
    """Before the iterations, one epoch of DPO on the data set's own pairs, on one slice more (the Zephyr recipe)."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most, split evenly over the iterations; None takes every prompt. The schedule shortens with it."""
    learning_rate: tuple[float, ...] = (4e-5,)
    """Peak learning rate of each iteration; the last one given holds for the rest."""
    batch_size: int = 8
    """Pairs in one optimiser step."""
    epochs: int = 1
    """Passes over each iteration's pairs."""
    warmup_ratio: float = 0.1
    """Share of an iteration's steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """Learning rate after the warm-up, within an iteration."""
    optimizer_states: Literal["float32", "bfloat16"] = "float32"
    """What AdamW keeps for each bfloat16 weight: float32 master and moments, 12 bytes; or bfloat16 moments and the master's 16 low bits, 6."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0 never clips."""
    micro_batch_tokens: int = 256
    """Tokens, padding included, in one forward and backward pass; the gradient is summed over passes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute for far less memory."""

    # sampling
    max_new_tokens: int = 24
    """Longest reply, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy (needs --offline-responses, as K greedy answers are one and the same)."""
    top_p: float = 1.0
    """Nucleus sampling mass; below 1 the losses, which ignore it, are no longer exact."""
    sample_rows: int = 128
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice stands in args.json."""
    decoding: Literal["auto", "eager", "graphs", "compiled"] = "auto"
    """How a token's kernels are launched: one by one, as CUDA graphs, or fused by torch.compile and then as graphs; auto is graphs on CUDA."""


PAPER = Args(  # what the three recipes of the paper's code share
    dataset="ultrafeedback",
    num_prompts=None,
    lora_rank=32,
    max_prompt_length=512,
    max_new_tokens=1024,
    judge="pairrm",
    eval_judge=None,
    eval_prompts=256,
    seed=42,
    beta=0.01,
    samples_per_prompt=1,
    offline_responses=True,
    temperature=0.0,
    schedule="cosine",
    batch_size=128,
    micro_batch_tokens=8192,
    gradient_checkpointing=True,
    save_every=50,
    sample_rows=0,
)
RECIPES = {
    "smollm2-135m": Args(),
    "llama3-8b": replace(PAPER, model="llama3-8b", alpha=1e-4, learning_rate=(5e-7, 3e-7, 1e-7)),
    "zephyr-7b": replace(PAPER, model="zephyr-7b", alpha=1e-3, learning_rate=(5e-7, 5e-7, 1e-7), batch_size=256, offline_warmup=True),
    "phi3-mini": replace(PAPER, model="phi3-mini", alpha=1e-3, learning_rate=(5e-7, 3e-7, 1e-7)),
}
CURVES = ("score", "loss", "rewards/margin", "rewards/accuracy", "kl", "length", "entropy", "exploration_loss", "grad_norm")


def selm_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    policy_self: torch.Tensor,
    reference_self: torch.Tensor,
    beta: float,
    alpha: float,
) -> torch.Tensor:
    """SELM's loss, Eq. 4.2 of arXiv 2405.19332 v3, as a scalar to minimise (mean over the batch).

    Args:
        policy_chosen, policy_rejected: (B,) log π of the preferred and the other response, summed over tokens, in nats.
        reference_chosen, reference_rejected: (B,) the same under π_ref.
        policy_self, reference_self: (B,) log-probs of y_s, a response π_ref itself sampled. (For XPO, arXiv 2405.21046,
            reference_self is 0 and alpha is its α divided by β.)
        beta: tie to the reference. alpha: exploration; 0 gives DPO (arXiv 2305.18290, Eq. 7).
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    preference_loss = -F.logsigmoid(beta * margin)  # Eq. 4.2, first term
    exploration_loss = alpha * beta * (policy_self - reference_self)  # Eq. 4.2, second term: lowers log π(y_s)
    return (preference_loss + exploration_loss).mean()


@dataclass
class Pair:
    """One prompt's training example. Its completions are [chosen, rejected], and y_s third where it is neither."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # 2 or 3 lists of token ids
    temperature: list[float]  # of each completion: the sampling temperature for own ones, 1 for the data set's
    self_weights: list[float]  # which completions are y_s: (.5, .5), (1, 0), (0, 1), (0, 0, 1), or zeros at α = 0
    reference: list[float] | None = None  # summed reference log-prob of each completion
    score: float | None = None  # mean judge's score of the policy's own answers, where the judge has a scalar


def main(args: Args) -> None:
    """Run SELM: see the numbered steps, which docs/selm.md explains."""
    check_args(args)

    # 1. Model, judge, data.
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    judge = load_judge(args.judge, device)
    eval_judge = load_judge(args.eval_judge, device, "--eval-judge") if args.eval_judge else None
    pairs_needed = args.offline_responses or args.offline_warmup
    train_rows, eval_rows = common.load_rows(args.dataset, ("chosen", "rejected") if pairs_needed else (), held_out=args.eval_prompts)
    tokenizer = common.load_tokenizer(args.model)
    rows, prompts = common.encode_rows(tokenizer, train_rows, args.max_prompt_length, args.num_prompts, args.seed, "training prompts")
    eval_rows, eval_prompts = common.encode_rows(tokenizer, eval_rows, args.max_prompt_length, args.eval_prompts, 0, "held-out prompts")
    del train_rows
    rounds = plan_rounds(args, len(rows))
    steps = sum(r.steps for r in rounds)
    attention = common.choose_attention(args.attention, device, args.max_prompt_length + 3 * args.max_new_tokens)
    policy = common.load_model(args.model, dtype, device, attention)
    ends = common.end_tokens(policy, tokenizer)
    policy = common.make_trainable(policy, args.lora_rank, args.lora_alpha, args.gradient_checkpointing)
    reference = common.starting_model(policy, args.model, dtype, device, attention) if args.exploration == "xpo" else None
    states = sum(optimization.bytes_per_weight(args.optimizer_states, dtype).values())
    rows_at_once = common.choose_sample_rows(args.sample_rows, [policy], args.max_prompt_length + args.max_new_tokens, states)
    args = replace(args, sample_rows=rows_at_once)
    sampling = dict(
        ends=ends,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        max_rows=args.sample_rows,
        decoding=common.resolve_decoding(args.decoding, device),
    )

    run = Run("selm", args, steps)
    run.create()
    state = run.restore()
    step = state["step"] if state else 0
    optimiser = None
    for number, this in enumerate(rounds):
        if state and number < state["round"]:
            continue
        resumed = state is not None and number == state["round"]

        # 2. A new iteration restarts the optimiser and its schedule. (XPO's rounds are all of iteration 1.)
        if optimiser is None or this.iteration != rounds[number - 1].iteration:
            if optimiser is not None:
                optimiser.release()
            optimiser = optimization.make_optimiser(policy, args.optimizer_states, args.weight_decay)
            iteration_steps = sum(r.steps for r in rounds if r.iteration == this.iteration)
            iteration_start = step
        if resumed:
            optimiser.load_state_dict(state["optimiser"])
            iteration_start, dropped = state["iteration_start"], state["dropped"]
            pairs = [Pair(**pair) for pair in state["pairs"]]
        else:
            # 3. The current policy answers each prompt; the judge ranks the candidates.
            pairs, dropped = collect(args, this, rows, prompts, policy, reference, tokenizer, sampling, judge, run)
            # 4. Reference log-probs, once: π_ref = π_t is the policy as it is now. (XPO: the fixed starting model.)
            with run.phase("reference"):
                tokens = [(pair.prompt, pair.completions, pair.temperature) for pair in pairs]
                run.add_tokens("reference", *common.count_tokens([pair.prompt for pair in pairs], [pair.completions for pair in pairs]))
                bar = f"iteration {this.iteration}: reference log-probs" if len(tokens) > 4 * args.batch_size else None
                sums = common.sequence_logprobs(
                    reference or policy, *map(list, zip(*tokens, strict=True)), device, args.micro_batch_tokens, bar
                )
                for pair, row in zip(pairs, sums, strict=True):
                    pair.reference = row

        # 5. Train on the pairs.
        alpha = 0.0 if this.offline else args.alpha
        batches = batches_of(pairs, args, this)
        run.fewer_steps(this.steps - len(batches))  # ties were dropped
        for index, batch in enumerate(batches):
            if resumed and index < state["batch"]:
                continue
            step += 1
            planned = iteration_steps if args.exploration == "xpo" else len(batches)
            learning_rate = optimization.learning_rate_at(
                step - 1 - iteration_start,
                planned,
                args.learning_rate[min(max(this.iteration, 1), len(args.learning_rate)) - 1],
                args.warmup_ratio,
                args.schedule,
            )
            with run.phase("training"):
                metrics = train_step(args, policy, optimiser, batch, alpha, learning_rate, ends, device, run, step)
            scores = [pair.score for pair in batch if pair.score is not None]
            if scores:
                metrics["score"] = sum(scores) / len(scores)
            metrics |= {"iteration": this.iteration, "learning_rate": learning_rate, "dropped_ties": dropped, **run.throughput()}
            run.log(step, metrics, show=("loss", "score", "rewards/accuracy", "kl"))
            if args.save_every and step % args.save_every == 0 and step < steps:
                run.save(
                    {
                        "step": step,
                        "round": number,
                        "batch": index + 1,
                        "iteration_start": iteration_start,
                        "pairs": [asdict(pair) for pair in pairs],
                        "dropped": dropped,
                        "optimiser": optimiser.state_dict(),
                    }
                )

    if args.dry_run:
        return run.finish_dry_run(policy)

    # 6. Compare with the starting model on held-out prompts; save.
    optimiser.release()
    start = reference or common.starting_model(policy, args.model, dtype, device, attention)
    with run.phase("evaluation"):
        summary = evaluate(run, policy, start, tokenizer, ends, eval_rows, eval_prompts, judge, eval_judge)
    write_model(run, policy, tokenizer, summary)
    run.finish(summary, CURVES)


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    require(args.beta > 0, f"--beta must be above 0, got {args.beta}.")
    require(args.alpha >= 0, f"--alpha must not be negative, got {args.alpha}.")
    require(args.iterations >= 1 and args.epochs >= 1, "--iterations and --epochs must be at least 1.")
    require(min(args.learning_rate) > 0, f"--learning-rate must be above 0, got {min(args.learning_rate)}.")
    own = args.samples_per_prompt
    least = 1 if args.offline_responses or args.exploration == "xpo" else 2
    require(
        own >= least,
        f"--samples-per-prompt {own}: a pair needs two candidates, so at least 2 samples a prompt, or 1 with --offline-responses and a data set that has responses.",
    )
    require(
        args.temperature > 0 or (args.offline_responses and own == 1),
        "--temperature 0 (greedy) gives every sample of a prompt the same text. Use it with --offline-responses --samples-per-prompt 1.",
    )
    require(
        args.exploration != "xpo" or not (args.offline_responses or args.offline_warmup),
        "--exploration xpo pairs a policy's with a reference's sample: no --offline-responses or --offline-warmup.",
    )
    require(args.num_prompts is None or args.num_prompts >= 1, f"--num-prompts must be at least 1, got {args.num_prompts}.")


@dataclass
class Round:
    """A slice of the prompts that is sampled at once. SELM has one round an iteration, XPO one a step."""

    iteration: int  # from 1; 0 is the offline warm-up
    prompts: range
    steps: int
    offline: bool = False


def plan_rounds(args: Args, prompts: int) -> list[Round]:
    """Disjoint slices of the prompts, one for each round, and their optimiser steps (`--max-steps` split evenly)."""
    if args.exploration == "xpo":
        steps = min(args.max_steps or prompts, -(-prompts // args.batch_size))
        return [Round(1, range(i * args.batch_size, min((i + 1) * args.batch_size, prompts)), 1) for i in range(steps)]
    slices = args.iterations + args.offline_warmup
    require(prompts >= slices, f"{prompts} prompts cannot be split over {slices} iterations; give more data or fewer --iterations.")
    rounds = []
    for i in range(slices):
        part = range(i * prompts // slices, (i + 1) * prompts // slices)
        steps = args.epochs * -(-len(part) // args.batch_size)
        if args.max_steps is not None:
            steps = min(steps, args.max_steps // slices + (i < args.max_steps % slices))
            part = part[: -(-steps // args.epochs) * args.batch_size]
        if steps:
            iteration = i + 1 - args.offline_warmup
            rounds.append(Round(iteration, part, steps, offline=iteration == 0))
    return rounds


def collect(args, this: Round, rows, prompts, policy, reference, tokenizer, sampling, judge, run) -> tuple[list[Pair], int]:
    """Candidates for one round's prompts, ranked by the judge, as pairs; and how many prompts were dropped as all ties."""
    chosen_prompts = [prompts[i] for i in this.prompts]
    chosen_rows = [rows[i] for i in this.prompts]
    ends, longest = sampling["ends"], sampling["max_new_tokens"]
    seed = common.derive_seed(args.seed, this.iteration, this.prompts.start)
    quiet, stats = args.exploration == "xpo", {}
    candidates: list[list[list[int]]] = [[] for _ in chosen_rows]
    if not this.offline:
        with run.phase("sampling"):
            bar = None if quiet else f"iteration {this.iteration}: sampling"
            candidates = common.sample(
                policy, chosen_prompts, completions=args.samples_per_prompt, seed=seed, stats=stats, progress=bar, **sampling
            )
            if args.exploration == "xpo":
                theirs = common.sample(reference, chosen_prompts, completions=1, seed=seed + 1, stats=stats, **sampling)
                candidates = [[*ours[:1], *other] for ours, other in zip(candidates, theirs, strict=True)]
        run.set_apart("sampling", "decoder warm-up", stats["warmup_seconds"])
        run.add_tokens("sampling", sum(len(c) for group in candidates for c in group))
    own = len(candidates[0])
    if args.offline_responses or this.offline:
        end = common.turn_end(tokenizer, ends)
        for row, group in zip(chosen_rows, candidates, strict=True):
            group += [common.encode_response(tokenizer, row.prompt, response, end, longest) for response in (row.chosen, row.rejected)]
    if this.offline:
        order = [(0, 1, False) for _ in candidates]
    else:
        with run.phase("judging"):
            texts = [[common.decode(tokenizer, c) for c in group] for group in candidates]
            scores, matrices = judge_candidates(judge, [row.prompt for row in chosen_rows], texts)
            order = [rank(matrix) for matrix in matrices]

    pairs = []
    rng = random.Random(seed)
    for i, (row, group, (best, worst, tie)) in enumerate(zip(chosen_rows, candidates, order, strict=True)):
        # y_s: uniform among the own answers, whatever their rank; both for K = 2; the reference's answer for XPO.
        if args.exploration == "xpo":
            which = [1]
        else:
            which = [0, 1] if own == 2 else [rng.randrange(own)] if own else []
        if tie:
            continue
        members = [best, worst]
        if args.alpha > 0 and not this.offline:
            members += [s for s in which if s not in members]
        weights = [1 / len(which) if m in which and args.alpha > 0 else 0.0 for m in members]
        heat = [(args.temperature or 1.0) if m < own else 1.0 for m in members]
        score = scores[i][:own].mean().item() if not this.offline and scores is not None else None
        pairs.append(Pair(row.id, chosen_prompts[i], [group[m] for m in members], heat, weights, score=score))
    dropped = len(candidates) - len(pairs)
    require(
        bool(pairs),
        f"iteration {this.iteration}: the judge {args.judge} found every candidate tied, on all {dropped} prompts: nothing to learn from.",
    )
    return pairs, dropped


def rank(matrix: torch.Tensor) -> tuple[int, int, bool]:
    """Best and worst candidate by mean preference against the others, and whether all tie in it; (K, K) matrix of p(i ≻ j)."""
    wins = (matrix.sum(1) - 0.5) / (len(matrix) - 1)  # (K,)
    return int(wins.argmax()), int(wins.argmin()), bool(wins.max() == wins.min())


def batches_of(pairs: list[Pair], args: Args, this: Round) -> list[list[Pair]]:
    """The round's optimiser steps: each epoch in an order of its own, cut to the planned number of steps."""
    batches = []
    for epoch in range(args.epochs):
        order = list(pairs)
        random.Random(common.derive_seed(args.seed, "order", this.iteration, this.prompts.start, epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    return batches[: this.steps]


def train_step(args, policy, optimiser, batch: list[Pair], alpha: float, learning_rate: float, ends, device, run, step: int) -> dict:
    """One optimiser step on B pairs, in micro-batches; returns its metrics."""
    if args.exploration == "xpo":
        alpha = alpha / args.beta
    total = {}
    parts = common.micro_batches([p.prompt for p in batch], [p.completions for p in batch], args.micro_batch_tokens)
    for part in parts:
        pairs = [batch[i] for i in part]
        data = common.collate([p.prompt for p in pairs], [p.completions for p in pairs], device)
        heat = common.pad_rows([p.temperature for p in pairs], 1.0, device)  # (G, K)
        reference = common.pad_rows([p.reference for p in pairs], 0.0, device)  # (G, K)
        self_weights = common.pad_rows([p.self_weights for p in pairs], 0.0, device)  # (G, K)
        logprobs, entropy = common.completion_logprobs(policy, data, heat, entropy=True)  # (G, K, T)
        sums = logprobs.sum(-1)  # (G, K)
        policy_self = (sums * self_weights).sum(-1)  # (G,)
        reference_self = (reference * self_weights).sum(-1) if args.exploration == "selm" else torch.zeros_like(policy_self)
        loss = selm_loss(sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1], policy_self, reference_self, args.beta, alpha)
        run.stop_unless_finite(step, loss.item(), [p.row_id for p in pairs])
        (loss * len(pairs) / len(batch)).backward()
        run.add_batch("training", data)

        with torch.no_grad():
            ratio = sums - reference  # (G, K) log π/π_ref
            reward_chosen, reward_rejected = args.beta * ratio[:, 0], args.beta * ratio[:, 1]
            measured = {
                "loss": loss,
                "exploration_loss": alpha * args.beta * (policy_self - reference_self).mean(),
                "rewards/chosen": reward_chosen.mean(),
                "rewards/rejected": reward_rejected.mean(),
                "rewards/margin": (reward_chosen - reward_rejected).mean(),
                "rewards/accuracy": (reward_chosen > reward_rejected).float().mean(),
                "logps/chosen": sums[:, 0].mean(),
                "logps/rejected": sums[:, 1].mean(),
                "kl": -ratio[:, :2].mean(),  # on the reference's own samples: an estimate of KL(π_ref ‖ π)
                "entropy": entropy.sum() / data.mask.sum(),
                "length": data.mask[:, :2].sum(-1).mean(),
            }
            for name, value in measured.items():
                total[name] = total.get(name, 0.0) + float(value) * len(pairs) / len(batch)
    total["preference_loss"] = total["loss"] - total["exploration_loss"]
    total["finished"] = sum(c[-1] in ends for p in batch for c in p.completions[:2]) / (2 * len(batch))
    total["extra_forward"] = sum(len(p.completions) - 2 for p in batch) / (
        2 * len(batch)
    )  # y_s that had to be computed, for each response of a pair
    with run.phase("update"):
        total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
    return total


if __name__ == "__main__":
    command_line(main, RECIPES)
