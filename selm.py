"""SELM, self-exploring language models: iterative DPO plus one term of optimism. arXiv 2405.19332 v3.

The idea: preference learning never hears about replies the policy does not sample. SELM therefore lowers the
likelihood of what its reference already says, so that mass moves to replies not yet judged. α = 0 is
iterative DPO.

Departures from the paper:
 1. α is multiplied by β, as in Eq. 4.2 and the official code; the paper's Algorithms 1 and 2 print α alone.
 2. Reference log-probs are taken once for each pair before an iteration's first update (π_ref = π_t is the
    policy then), so no reference model is held in memory.
 3. Where y_s is a member of its pair, its log-probs are reused: no forward pass of its own.
 4. With prompts only (no data set responses) the K samples are the candidates, and y_s is one of them,
    uniformly and whatever its rank; for K = 2 it is both, averaged.
 5. On one GPU the 7-8B recipes train a LoRA adapter, at 30 times the paper's learning rates: at one rate it
    hardly moves (docs/selm.md). --lora-rank 0 gives the paper's
    training of all weights, at the paper's rates.
 6. Sampled replies (--temperature above 0) get log-probs of logits divided by the temperature; the paper's
    greedy ones and the data set's responses get them at 1.
 7. The smollm2-135m recipe is ours, chosen for two CPU cores.
 8. Any judge's candidates are ranked by mean preference; the paper's code ranks by PairRM's mean logit.
 9. Prompts longer than --max-prompt-length are dropped, and own replies may have --max-new-tokens; the
    paper's code holds prompt and reply together within 1,024 tokens, and where they are longer keeps the
    last 512 of the prompt and the first 512 of the reply.

Examples:
    python selm.py                      # SmolLM2-135M learns to answer cheerfully; minutes on a laptop
    python selm.py --model llama3-8b    # the paper's Llama recipe on one GPU
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

import common
from cleanalign import distributed
from cleanalign.errors import require
from cleanalign.optimization import learning_rate_at, make_optimiser
from experiment import Experiment, Holds, RunArgs, check_common, command_line, set_up
from judges import judge_candidates


@dataclass
class Args(RunArgs):
    """SELM: Self-Exploring Language Models (arXiv 2405.19332), with iterative DPO as its alpha 0.

    python selm.py     learns on a laptop in minutes, needs no GPU and no model hub

    python selm.py --model llama3-8b                the paper's Llama recipe on one GPU

    --model NAME also sets the recipe's other values, shown as the defaults below; flags given by hand win.
    """

    # run
    save_every: int = 8
    """Optimiser steps between checkpoints; 0: only at a signal, when a judge fails, and at the end."""

    # model and data
    model: str = "smollm2-135m"
    """Recipe name, hub id or folder of the starting model."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on every linear layer; 0 trains all weights."""
    lora_alpha: int = 64
    """LoRA's scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    dataset: str = "chitchat"
    """Prompts: a name (chitchat, ultrafeedback), hub id, or .jsonl, .jsonl.gz or .parquet file."""
    num_prompts: int | None = 192
    """Training prompts of all iterations together; None is the whole data set."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included; longer ones are dropped and counted."""
    judge: str = "sentiment"
    """Who prefers what: sentiment, polarity, cycle, hf:ID (a reward model), pairrm, pairwise:ID (a model that
    answers A or B) or FILE.py:FUNCTION; see docs/judges.md."""
    eval_judge: str | None = "polarity"
    """A second judge that is never trained on; None for none."""
    eval_prompts: int = 128
    """Held-out prompts of the final comparison with the starting model."""

    # algorithm
    iterations: int = 3
    """Iterations: each samples from the current policy, which becomes the reference, on a slice of the
    prompts of its own."""
    beta: float = 0.1
    """Strength of the tie to the reference, in Eq. 4.2's β."""
    alpha: float = 0.001
    """Strength of the exploration term, in Eq. 4.2's α; 0 is iterative DPO."""
    exploration: Literal["selm", "xpo"] = "selm"
    """selm: the paper's term. xpo: arXiv 2405.21046's, α Σ log π(y_s) with y_s from a fixed reference, each
    pair one answer of the policy and one of the reference, sampled anew at every step."""
    samples_per_prompt: int = 4
    """K, the policy's own answers to each prompt."""
    offline_responses: bool = False
    """Also rank the data set's chosen and rejected responses
    as candidates (the paper's recipe, with K = 1)."""
    offline_warmup: bool = False
    """Before the iterations, one epoch of DPO on the data
    set's own pairs, on one slice more (the Zephyr recipe)."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most, split evenly over the iterations; None takes every prompt. The schedule
    shortens with it."""
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
    """What AdamW keeps for each bfloat16 weight: float32 master and moments, 12 bytes; or bfloat16 moments
    and the master's 16 low bits, 6."""
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
    """Sampling temperature; 0 is greedy (needs --offline-responses,
    as K greedy answers are one and the same)."""
    top_p: float = 1.0
    """Nucleus sampling mass; below 1 the losses, which ignore it, are no longer exact."""
    sample_rows: int = 128
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice
    stands in args.json."""

    def holds(self) -> Holds:
        """Beside the policy nothing: π_ref = π_t gives its log-probs before it trains. XPO's reference stays
        fixed. A row of training holds chosen, rejected and perhaps y_s."""
        xpo = self.exploration == "xpo"
        sampled, replies = ((self.batch_size, 0), 1) if xpo else (None, self.samples_per_prompt)
        return Holds(reference=xpo, completions=3, replies=replies, sampled=sampled)

    def for_all_weights(self) -> Args:
        """A recipe of the paper with --lora-rank 0: the paper's learning rates."""
        return replace(self, lora_rank=0, learning_rate=PAPER_RATES[self.model])


PAPER = Args(  # what the three recipes of the paper's code share
    dataset="ultrafeedback",
    num_prompts=None,
    lora_rank=32,
    max_prompt_length=512,
    max_new_tokens=1024,
    judge="pairrm",
    eval_judge="hf:OpenAssistant/reward-model-deberta-v3-large-v2",
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
    "llama3-8b": replace(PAPER, model="llama3-8b", alpha=1e-4, learning_rate=(1.5e-5, 9e-6, 3e-6)),
    "zephyr-7b": replace(
        PAPER,
        model="zephyr-7b",
        alpha=1e-3,
        learning_rate=(1.5e-5, 1.5e-5, 3e-6),
        batch_size=256,
        offline_warmup=True,
    ),
    "phi3-mini": replace(PAPER, model="phi3-mini", alpha=1e-3, learning_rate=(1.5e-5, 9e-6, 3e-6)),
}
PAPER_RATES = {  # of all weights, an iteration each; an adapter's above are 30 times these: docs/selm.md
    "llama3-8b": (5e-7, 3e-7, 1e-7),
    "zephyr-7b": (5e-7, 5e-7, 1e-7),
    "phi3-mini": (5e-7, 3e-7, 1e-7),
}
CURVES = (
    "score",
    "loss",
    "rewards/margin",
    "rewards/accuracy",
    "kl",
    "length",
    "entropy",
    "exploration_loss",
    "grad_norm",
)


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
        f"--samples-per-prompt {own}: a pair needs two candidates, so at least 2 samples a prompt, or 1 "
        "with --offline-responses and a data set that has responses.",
    )
    require(
        args.temperature > 0 or (args.offline_responses and own == 1),
        "--temperature 0 (greedy) gives every sample of a prompt the same text. Use it with "
        "--offline-responses --samples-per-prompt 1.",
    )
    require(
        args.exploration != "xpo" or not (args.offline_responses or args.offline_warmup),
        "--exploration xpo pairs a policy's with a reference's sample: no --offline-responses or "
        "--offline-warmup.",
    )


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
        policy_chosen, policy_rejected: (B,) log π of the preferred and the other response, summed over
            tokens, in nats.
        reference_chosen, reference_rejected: (B,) the same under π_ref.
        policy_self, reference_self: (B,) log-probs of y_s, a response π_ref itself sampled. (For XPO, arXiv
            2405.21046, reference_self is 0 and alpha is its α divided by β.)
        beta: tie to the reference. alpha: exploration; 0 gives DPO (arXiv 2305.18290, Eq. 7).
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    preference_loss = -F.logsigmoid(beta * margin)  # Eq. 4.2, first term
    exploration_loss = alpha * beta * (policy_self - reference_self)  # Eq. 4.2, second: lowers log π(y_s)
    return (preference_loss + exploration_loss).mean()


@dataclass
class Pair:
    """One prompt's training example. Its completions are
    [chosen, rejected], and y_s third where it is neither."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # 2 or 3 lists of token ids
    # of each completion: the sampling temperature for own ones, 1 for the data set's
    temperature: list[float]
    # which completions are y_s: (.5, .5), (1, 0), (0, 1), (0, 0, 1), or zeros at α = 0
    self_weights: list[float]
    reference: list[float] | None = None  # summed reference log-prob of each completion
    score: float | None = None  # mean judge's score of the policy's own answers, where the judge has a scalar


@dataclass
class Round:
    """A slice of the prompts that is sampled at once. SELM has one round an iteration, XPO one a step."""

    iteration: int  # from 1; 0 is the offline warm-up
    prompts: range
    steps: int
    offline: bool = False


def plan_rounds(args: Args, prompts: int) -> list[Round]:
    """Disjoint slices of the prompts, one for each round, and
    their optimiser steps (`--max-steps` split evenly)."""
    if args.exploration == "xpo":
        steps = min(args.max_steps or prompts, -(-prompts // args.batch_size))
        return [
            Round(1, range(i * args.batch_size, min((i + 1) * args.batch_size, prompts)), 1)
            for i in range(steps)
        ]
    slices = args.iterations + args.offline_warmup
    require(
        prompts >= slices,
        f"{prompts} prompts cannot be split over {slices} iterations; give more data or fewer --iterations.",
    )
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


def comparisons(args: Args, rounds: list[Round]) -> int:
    """Pairs of candidates that the judge sees in training."""
    own = args.samples_per_prompt if args.exploration == "selm" else 2
    candidates = own + 2 * args.offline_responses
    judged = sum(len(this.prompts) for this in rounds if not this.offline)
    return judged * candidates * (candidates - 1) // 2


def collect(exp: Experiment, this: Round) -> tuple[list[Pair], int]:
    """Candidates for one round's prompts, ranked by the judge, as pairs; and how many prompts were dropped as
    all ties."""
    args, seed = exp.args, common.derive_seed(exp.args.seed, this.iteration, this.prompts.start)
    rows, prompts = [exp.rows[i] for i in this.prompts], [exp.prompts[i] for i in this.prompts]
    candidates = [[] for _ in rows] if this.offline else answers(exp, this, prompts, seed)
    own = len(candidates[0])  # the first so many of a prompt's candidates are its own answers
    if args.offline_responses or this.offline:
        for row, group in zip(rows, candidates, strict=True):
            group += data_set_responses(exp, row)
    if this.offline:
        scores, order = None, [(0, 1, False) for _ in candidates]
    else:
        with exp.run.phase("judging"):
            asked = [row.prompt for row in rows]
            scores, matrices = judge_candidates(exp.judge, asked, exp.texts(candidates, exp.judge))
            order = [rank(matrix) for matrix in matrices]

    pairs, rng = [], random.Random(seed)
    for i, (best, worst, tie) in enumerate(order):
        which = explored(args, own, rng)
        if tie:
            continue
        members = [best, worst]
        if args.alpha > 0 and not this.offline:
            members += [s for s in which if s not in members]
        weights = [1 / len(which) if m in which and args.alpha > 0 else 0.0 for m in members]
        temperature = [(args.temperature or 1.0) if m < own else 1.0 for m in members]
        score = None if scores is None else scores[i][:own].mean().item()
        completions = [candidates[i][m] for m in members]
        pairs.append(Pair(rows[i].id, prompts[i], completions, temperature, weights, score=score))
    dropped = len(candidates) - len(pairs)
    require(
        bool(pairs),
        f"iteration {this.iteration}: the judge {args.judge} found every candidate tied, on all {dropped} "
        "prompts: "
        "nothing to learn from.",
    )
    return pairs, dropped


def answers(exp: Experiment, this: Round, prompts: list[list[int]], seed: int) -> list[list[list[int]]]:
    """The current policy's K answers to each prompt. For XPO: one of the policy and one of the reference."""
    K = exp.args.samples_per_prompt
    if exp.args.exploration == "selm":
        return exp.sample(prompts, seed, K, progress=f"iteration {this.iteration}: sampling")[0]
    ours, _ = exp.sample(prompts, seed, K)
    theirs, _ = exp.sample(prompts, seed + 1, model=exp.reference)
    return [[group[0], *other] for group, other in zip(ours, theirs, strict=True)]


def data_set_responses(exp: Experiment, row) -> list[list[int]]:
    """The row's chosen and rejected responses as token ids."""
    end = common.turn_end(exp.tokenizer, exp.ends)
    texts = (row.chosen, row.rejected)
    return [common.encode_response(exp.tokenizer, row.prompt, x, end, exp.args.max_new_tokens) for x in texts]


def explored(args: Args, own: int, rng: random.Random) -> list[int]:
    """Which of a prompt's own answers are y_s: one, uniformly and whatever its rank; both for K = 2; the
    reference's for XPO."""
    if args.exploration == "xpo":
        return [1]
    if own == 2:
        return [0, 1]
    return [rng.randrange(own)] if own else []


def rank(matrix: torch.Tensor) -> tuple[int, int, bool]:
    """Best and worst candidate by mean preference against the others, and whether all tie in it; (K, K)
    matrix of p(i ≻ j)."""
    wins = (matrix.sum(1) - 0.5) / (len(matrix) - 1)  # (K,)
    return int(wins.argmax()), int(wins.argmin()), bool(wins.max() == wins.min())


def take_reference(exp: Experiment, this: Round, pairs: list[Pair]) -> None:
    """Fill in the pairs' reference log-probs: π_ref = π_t is the policy as it is now. (XPO: the fixed
    starting model.)"""
    args = exp.args
    prompts, completions = [pair.prompt for pair in pairs], [pair.completions for pair in pairs]
    temperature = [pair.temperature for pair in pairs]
    progress = (
        f"iteration {this.iteration}: reference log-probs" if len(pairs) > 4 * args.batch_size else None
    )
    model = exp.policy if exp.reference is None else exp.reference
    with exp.run.phase("reference"):
        own = distributed.mine(prompts), distributed.mine(completions)
        exp.run.add_tokens("reference", *common.count_tokens(*own))
        sums = common.sequence_logprobs(
            model, prompts, completions, temperature, exp.device, args.micro_batch_tokens, progress
        )
    for pair, row in zip(pairs, sums, strict=True):
        pair.reference = row


def batches_of(pairs: list[Pair], args: Args, this: Round) -> list[list[Pair]]:
    """The round's optimiser steps: each epoch in an order of its own, cut to the planned number of steps."""
    batches = []
    for epoch in range(args.epochs):
        order = list(pairs)
        seed = common.derive_seed(args.seed, "order", this.iteration, this.prompts.start, epoch)
        random.Random(seed).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    return batches[: this.steps]


def train_step(exp: Experiment, optimiser, batch: list[Pair], step: int, learning_rate: float) -> dict:
    """One optimiser step on B pairs, in micro-batches; returns its metrics."""
    args, run, policy = exp.args, exp.run, exp.policy
    # XPO's α stands without β (arXiv 2405.21046). Pairs of the offline warm-up have self_weights of 0: no
    # exploration.
    alpha = args.alpha / args.beta if args.exploration == "xpo" else args.alpha
    prompts, completions = [p.prompt for p in batch], [p.completions for p in batch]
    means = common.Means(len(batch))
    for part in optimiser.passes(common.shares(prompts, completions, args.micro_batch_tokens)):
        pairs = [batch[i] for i in part]
        data = common.collate([p.prompt for p in pairs], [p.completions for p in pairs], exp.device)
        temperature = common.pad_rows([p.temperature for p in pairs], 1.0, "cpu")  # (G, K)
        reference = common.pad_rows([p.reference for p in pairs], 0.0, exp.device)  # (G, K)
        self_weights = common.pad_rows([p.self_weights for p in pairs], 0.0, exp.device)  # (G, K)
        logprobs, entropy = common.completion_logprobs(policy, data, temperature, entropy=True)  # (G, K, T)
        sums = logprobs.sum(-1)  # (G, K)
        chosen, rejected = sums[:, 0], sums[:, 1]  # (G,)
        reference_chosen, reference_rejected = reference[:, 0], reference[:, 1]  # (G,)
        policy_self = (sums * self_weights).sum(-1)  # (G,)
        reference_self = (reference * self_weights).sum(-1)  # (G,)
        if args.exploration == "xpo":
            reference_self = torch.zeros_like(policy_self)
        loss = selm_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            policy_self,
            reference_self,
            args.beta,
            alpha,
        )
        (loss * len(pairs) / len(batch)).backward()
        run.add_batch("training", data)

        with torch.no_grad():
            reward_chosen = args.beta * (chosen - reference_chosen)  # (G,)
            reward_rejected = args.beta * (rejected - reference_rejected)  # (G,)
            measured = {
                "loss": loss,
                "exploration_loss": alpha * args.beta * (policy_self - reference_self).mean(),
                "rewards/chosen": reward_chosen.mean(),
                "rewards/rejected": reward_rejected.mean(),
                "rewards/margin": (reward_chosen - reward_rejected).mean(),
                "rewards/accuracy": (reward_chosen > reward_rejected).float().mean(),
                "logps/chosen": chosen.mean(),
                "logps/rejected": rejected.mean(),
                # on the reference's own samples: an estimate of KL(π_ref ‖ π)
                "kl": -(sums - reference)[:, :2].mean(),
                "entropy": (entropy.sum(), data.mask.sum()),
                "length": data.mask[:, :2].sum(-1).mean(),
            }
            means.add([p.row_id for p in pairs], measured)
    total = means.read()
    run.stop_unless_finite(step, total["loss"], means.not_finite())
    total["preference_loss"] = total["loss"] - total["exploration_loss"]
    total["finished"] = sum(c[-1] in exp.ends for group in completions for c in group[:2]) / (2 * len(batch))
    # y_s that had to be computed, for each response of a pair
    total["extra_forward"] = sum(len(group) - 2 for group in completions) / (2 * len(batch))
    with run.phase("update"):
        total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
    return total


def main(args: Args) -> None:
    """Run SELM: see the numbered steps, which docs/selm.md explains."""
    check_args(args)

    # 1. Model, judge, data; the run folder.
    columns = ("chosen", "rejected") if args.offline_responses or args.offline_warmup else ()
    exp = set_up("selm", args, columns)
    rounds = plan_rounds(args, len(exp.rows))
    exp.begin(sum(this.steps for this in rounds), comparisons(args, rounds))
    if exp.trained:
        return exp.finish(CURVES)
    state = exp.state or {"step": 0, "round": 0}  # a resumed round also has its pairs and the optimiser
    step, optimiser = state["step"], None

    for number in range(state["round"], len(rounds)):
        this = rounds[number]
        # 2. A new iteration restarts the optimiser and its schedule. (XPO's rounds are all of iteration 1.)
        if optimiser is None or this.iteration != rounds[number - 1].iteration:
            if optimiser is not None:
                optimiser.release()
            optimiser = make_optimiser(exp.policy, args.optimizer_states, args.weight_decay)
            iteration_start = step

        # 3. The current policy answers each prompt; the judge ranks the candidates.
        # 4. Reference log-probs, once, before the first update.
        if "pairs" in state:
            optimiser.load_state_dict(state["optimiser"])
            pairs = [Pair(**pair) for pair in state["pairs"]]
            iteration_start, dropped, done = state["iteration_start"], state["dropped"], state["batch"]
        else:
            pairs, dropped = collect(exp, this)
            take_reference(exp, this, pairs)
            done = 0
        state = {}

        # 5. Train on the pairs.
        kept = {"pairs": [asdict(pair) for pair in pairs], "dropped": dropped}
        batches = batches_of(pairs, args, this)
        exp.run.fewer_steps(this.steps - len(batches))  # ties were dropped
        planned = len(rounds) if args.exploration == "xpo" else len(batches)
        peak = args.learning_rate[min(max(this.iteration, 1), len(args.learning_rate)) - 1]
        for index in range(done, len(batches)):
            step, batch = step + 1, batches[index]
            at = step - 1 - iteration_start
            learning_rate = learning_rate_at(at, planned, peak, args.warmup_ratio, args.schedule)
            with exp.run.phase("training"):
                metrics = train_step(exp, optimiser, batch, step, learning_rate)
            scores = [pair.score for pair in batch if pair.score is not None]
            if scores:
                metrics["score"] = sum(scores) / len(scores)
            metrics |= {"iteration": this.iteration, "learning_rate": learning_rate, "dropped_ties": dropped}
            exp.run.log(
                step, metrics | exp.run.throughput(), show=("loss", "score", "rewards/accuracy", "kl")
            )
            place = {"step": step, "round": number, "batch": index + 1, "iteration_start": iteration_start}
            exp.run.keep(step, {**place, **kept, "optimiser": optimiser.state_dict()})

    # 6. Save; compare with the starting model on held-out prompts.
    optimiser.release()
    exp.finish(CURVES)


if __name__ == "__main__":
    command_line(main, RECIPES)
