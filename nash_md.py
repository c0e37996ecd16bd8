"""Nash-MD-PG and Nash-EMA-PG, with self-play, best response and regularised policy gradient (RLHF). arXiv
2312.00886 v4.

The idea: preferences need not come from any scalar reward, so aim at the Nash equilibrium of the preference
game itself. The policy plays against an opponent close to itself (a geometric mixture with the reference, or
its own moving average) and ascends its win rate.

Departures from the paper:
 1. The mixture is taken per token, π^(1−β) π_ref^β renormalised at every token, as the paper's runs do; its
    theory is for whole sequences (docs/theory.md).
 2. The EMA is θ̄ ← d θ̄ + (1 − d) θ from θ̄_0 = θ_0, with d = --ema-decay; secondary sources print the
    recursion with θ_0.
 3. K > 1 policy samples for each prompt are an option, with a leave-one-out baseline beside the paper's ½.
 4. With --opponent self and K > 1 the samples of a prompt are each other's opponents (never their own), and
    all are trained on.
 5. Learning rate, batch size and optimiser are not reported; ours are AdamW and the recipes' values.
 6. On one GPU the 8B recipe trains a LoRA adapter; --lora-rank 0 trains all weights, at a thirtieth of the
    learning rate. Both rates are unmeasured (docs/selm.md says why thirty).
 7. The smollm2-135m recipe is ours, chosen for two CPU cores.
 8. The pythia-1b-tldr recipe asks a scalar judge; the paper's is a pairwise preference model.

Examples:
    python nash_md.py                                        # Nash-MD-PG on SmolLM2-135M; minutes on a laptop
    python nash_md.py --model pythia-1b-tldr --judge hf:ID   # summarisation, the paper's task, on one GPU
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch

import common
from cleanalign.errors import require
from cleanalign.optimization import MasterAdamW, SplitAdamW, learning_rate_at, make_optimiser
from experiment import Experiment, Holds, RunArgs, check_common, command_line, set_up
from judges import Judge, both_orders, judge_candidates


@dataclass
class Args(RunArgs):
    """Nash-MD-PG, Nash-EMA-PG, self-play, best response and RLHF policy gradient (arXiv 2312.00886).

    python nash_md.py     learns on a laptop in minutes, needs no GPU and no model hub

    python nash_md.py --model pythia-1b-tldr --judge hf:ID   summarisation, the paper's task, on one GPU

    --model NAME also sets the recipe's other values, shown as the defaults below; flags given by hand win.
    """

    # run
    save_every: int = 20
    """Optimiser steps between checkpoints; 0: only at a signal, when a judge fails, and at the end."""

    # model and data
    model: str = "smollm2-135m"
    """Recipe name, hub id or folder of the starting model."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on every linear layer; 0 trains all weights."""
    lora_alpha: int = 64
    """LoRA's scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    dataset: str = "chitchat"
    """Prompts: a name (chitchat, ultrafeedback, tldr), hub id, or .jsonl, .jsonl.gz or .parquet file."""
    num_prompts: int | None = 288
    """Training prompts, each used once an epoch; None is the whole data set."""
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
    objective: Literal["nash", "rlhf"] = "nash"
    """nash: the win rate against the opponent. rlhf: a scalar
    judge's score, the papers' baseline (no opponent)."""
    opponent: Literal["mixture", "ema", "self", "reference"] = "mixture"
    """Who the policy plays: mixture (Nash-MD), ema (Nash-EMA),
    self (self-play), reference (best response to it)."""
    tau: float = 0.008
    """Strength of the tie to the reference, τ: the weight of the KL."""
    beta: float = 0.125
    """Share of the reference in the mixture opponent."""
    ema_decay: float = 0.9
    """--opponent ema: share d of the average that stays, θ̄ ← d θ̄ + (1 − d) θ: it trails some 1/(1 − d)
    steps behind. The paper's .999, the large recipes', is the starting model for the first hundreds."""
    samples_per_prompt: int = 2
    """K, the policy's own samples for each prompt, all trained on; the paper's is 1."""
    baseline: Literal["half", "leave-one-out"] = "half"
    """half is the paper's ½. leave-one-out: the mean preference of the prompt's other samples against the
    same opponent. With --objective rlhf the baseline is the mean reward of the batch's other samples."""
    both_orders: bool = True
    """Ask a judge without a scalar in both orders and average, which removes its position bias."""

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
    """What AdamW keeps for each bfloat16 weight: float32 master and moments, 12 bytes; or bfloat16 moments
    and the master's 16 low bits, 6."""
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
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice
    stands in args.json."""

    def holds(self) -> Holds:
        """Beside the policy: the reference, and the EMA opponent.
        A row of training holds a prompt's K replies."""
        average = self.opponent == "ema" and self.objective == "nash"  # RLHF has no opponent
        K, mixture = self.samples_per_prompt, self.opponent == "mixture" and self.objective == "nash"
        sampled = (self.batch_size * (K + 1), self.batch_size * mixture)
        return Holds(average=average, completions=K, replies=K, sampled=sampled)

    def for_all_weights(self) -> Args:
        """A recipe of an adapter with --lora-rank 0: a thirtieth of its learning rate (docs/selm.md)."""
        return replace(self, lora_rank=0, learning_rate=1e-6)


TLDR = Args(  # the paper's task, for a hub policy of one billion weights
    model="pythia-1b-tldr",
    dataset="tldr",
    num_prompts=None,
    max_prompt_length=512,
    max_new_tokens=64,
    judge="hf:cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
    eval_judge="hf:OpenAssistant/reward-model-deberta-v3-large-v2",
    eval_prompts=256,
    samples_per_prompt=1,
    ema_decay=0.999,
    epochs=3,  # of some 117,000 prompts: enough for the steps
    max_steps=10_000,
    learning_rate=1e-5,
    batch_size=32,
    micro_batch_tokens=16_384,
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
        learning_rate=3e-5,  # the adapter's
        micro_batch_tokens=8192,
        gradient_checkpointing=True,
    ),
}
CURVES = (
    "score",
    "preference",
    "exploitability",
    "kl",
    "length",
    "entropy",
    "mixture_agreement",
    "advantage_std",
    "grad_norm",
)


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    require(args.tau >= 0, f"--tau must not be negative, got {args.tau}.")
    require(
        0 <= args.beta <= 1,
        f"--beta must lie in [0, 1], got {args.beta}: it is the reference's share in the mixture.",
    )
    require(0 <= args.ema_decay <= 1, f"--ema-decay must lie in [0, 1], got {args.ema_decay}.")
    require(args.epochs >= 1, f"--epochs must be at least 1, got {args.epochs}.")
    require(args.learning_rate > 0, f"--learning-rate must be above 0, got {args.learning_rate}.")
    require(
        args.temperature > 0,
        "--temperature 0 (greedy): a policy gradient needs samples, not the one most likely reply.",
    )
    require(
        args.samples_per_prompt >= 1,
        f"--samples-per-prompt must be at least 1, got {args.samples_per_prompt}.",
    )
    if args.baseline == "leave-one-out":
        require(
            args.objective == "nash",
            "--baseline leave-one-out is for --objective nash; rlhf always takes the mean reward of the "
            "batch's other samples.",
        )
        require(
            args.samples_per_prompt >= 2, "--baseline leave-one-out needs --samples-per-prompt of at least 2."
        )
        require(
            args.opponent != "self",
            "--baseline leave-one-out needs opponents drawn independently of the samples; with --opponent "
            "self they are each other's. Keep --baseline half.",
        )


def nash_md_loss(
    policy_logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    mask: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
    baseline: float | torch.Tensor = 0.5,
) -> torch.Tensor:
    """Surrogate whose gradient is minus Nash-MD-PG's policy gradient, Eq. 13 of arXiv 2312.00886 v4; a scalar
    to minimise.

    ĝ = Σ_n ∇ log π(y_n) · ( p(y ≻ y') − baseline − τ Σ_{m ≥ n} log[π(y_m) / π_ref(y_m)] ), averaged over the
    batch.

    Args:
        policy_logprobs, reference_logprobs: (B, T) per-token log-probs of the policy's own samples y, in
            nats.
        mask: (B, T), 1 on the tokens that count.
        preference: (B,) p(y ≻ y') against the opponent's sample; for RLHF the scalar reward r(y).
        tau: weight of the KL to the reference.
        baseline: ½, or (B,) values that do not depend on y.

    The value itself means nothing: only its gradient does. No gradient flows through the coefficient.
    """
    log_ratio = ((policy_logprobs - reference_logprobs) * mask).detach()  # (B, T)
    to_go = log_ratio.flip(-1).cumsum(-1).flip(-1)  # (B, T) Σ_{m ≥ n} log π/π_ref
    coefficient = (preference - baseline)[:, None] - tau * to_go  # (B, T) Eq. 13
    return -(policy_logprobs * mask * coefficient.detach()).sum(-1).mean()


class EMA:
    """The exponential moving average of a policy's trained weights, in float32: 4 bytes a weight, and the
    weight's own while it plays."""

    def __init__(self, optimiser: MasterAdamW | SplitAdamW, decay: float):
        self.optimiser, self.decay = optimiser, decay
        self.weights = [master.clone() for master in optimiser.masters]

    def state_dict(self) -> dict:
        """The average, or of several processes this one's part of it."""
        return {"weights": self.weights, "offsets": self.optimiser.offsets}

    def load_state_dict(self, shards: list[dict]) -> None:
        """Restore the average from what any number of processes have kept of it."""
        self.optimiser.read(shards, "weights", self.weights)

    def update(self) -> None:
        """θ̄ ← d θ̄ + (1 − d) θ, with θ the float32 masters."""
        for average, master in zip(self.weights, self.optimiser.masters, strict=True):
            average.lerp_(master, 1 - self.decay)

    @contextlib.contextmanager
    def in_place_of_policy(self):
        """Context in which the policy computes with the averaged weights; its own are kept aside."""
        kept = [part.clone() for part in self.optimiser.parts]
        self.optimiser.write(self.weights)
        try:
            yield
        finally:
            self.optimiser.write(kept)


@dataclass
class Group:
    """One prompt's training example: the policy's K samples, what each earned, and its baseline."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # K lists of token ids
    preference: list[float]  # (K,) p(y ≻ y'), or r(y) for RLHF
    baseline: list[float]  # (K,)


def plan_batches(args: Args, prompts: int) -> list[list[int]]:
    """Prompt indices of every optimiser step: each epoch in an order of its own, `--max-steps` at most."""
    batches = []
    for epoch in range(args.epochs):
        order = list(range(prompts))
        random.Random(common.derive_seed(args.seed, "order", epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, prompts, args.batch_size)]
    return batches[: args.max_steps]


def comparisons(args: Args, batches: list[list[int]]) -> int:
    """Pairs that the judge sees in training: a sample against the opponent's, or the prompt's others."""
    K = args.samples_per_prompt
    each_other = args.opponent == "self" and K > 1
    games = K * (K - 1) // 2 if each_other else K
    return games * sum(map(len, batches))


def collect(
    exp: Experiment, indices: list[int], step: int, ema: EMA | None = None
) -> tuple[list[Group], dict]:
    """The policy's K samples for each prompt and their preferences
    against the opponent's; metrics of the sampling."""
    args, seed = exp.args, common.derive_seed(exp.args.seed, step)
    rows, prompts = [exp.rows[i] for i in indices], [exp.prompts[i] for i in indices]
    own, rivals, stats = answer(exp, prompts, seed, ema)
    with exp.run.phase("judging"):
        asked, texts = [row.prompt for row in rows], exp.texts(own, exp.judge)
        if args.objective == "rlhf":
            # (G, K) the reward r(y)
            preference = scores = torch.stack(judge_candidates(exp.judge, asked, texts)[0])
            others = max(1, preference.numel() - 1)
            baseline = (preference.sum() - preference) / others  # mean of the batch's other rewards, if any
        else:
            rival_texts = rivals and [group[0] for group in exp.texts(rivals, exp.judge)]
            # (G, K) p(y ≻ y')
            preference, scores = play(exp.judge, asked, texts, rival_texts, args.both_orders)
            baseline = torch.full_like(preference, 0.5)
            if args.baseline == "leave-one-out":
                baseline = (preference.sum(1, keepdim=True) - preference) / (args.samples_per_prompt - 1)

    advantage = preference - baseline  # (G, K)
    metrics = {"preference": preference.mean().item(), "advantage_std": advantage.std(correction=0).item()}
    if "agreement" in stats:
        metrics["mixture_agreement"] = stats["agreement"]
    if scores is not None:
        metrics["score"] = scores.mean().item()
    if exp.judge.measure is not None:
        metrics |= exp.judge.measure([text for group in texts for text in group])
    columns = zip(rows, prompts, own, preference.tolist(), baseline.tolist(), strict=True)
    return [Group(row.id, *example) for row, *example in columns], metrics


def answer(exp: Experiment, prompts: list[list[int]], seed: int, ema: EMA | None):
    """The policy's K samples for each prompt; its opponent's one, or None where the samples play each other
    or nobody; sampling's stats."""
    args, K = exp.args, exp.args.samples_per_prompt
    if args.objective == "rlhf" or (args.opponent == "self" and K > 1):
        own, stats = exp.sample(prompts, seed, K)
        return own, None, stats
    if args.opponent in ("mixture", "self"):  # one pass of the policy serves its own rows and the opponent's
        beta = args.beta if args.opponent == "mixture" else 0.0
        both, stats = exp.sample(prompts, seed, K + 1, mixture=(exp.reference, beta), unmixed=K)
        return [group[:K] for group in both], [group[K:] for group in both], stats
    own, stats = exp.sample(prompts, seed, K)
    with ema.in_place_of_policy() if ema else contextlib.nullcontext():
        rivals, _ = exp.sample(prompts, seed + 1, model=exp.policy if ema else exp.reference)
    return own, rivals, stats


def play(judge: Judge, prompts: list, samples: list[list[str]], rivals: list[str] | None, average: bool):
    """Each sample's p(y ≻ y') against its prompt's opponent, (G, K), and its scalar score, (G, K), or None if
    the judge has none.

    Args:
        samples: the policy's K texts for each of G prompts.
        rivals: the opponent's text for each prompt; None: the samples of a prompt (K > 1) are each other's
            opponents.
        average: ask a judge without a scalar in both orders.

    No text is scored twice, and no pair asked twice.
    """
    K = len(samples[0])
    if rivals and judge.score is None:  # of all pairs only these
        sides = (
            [x for x in prompts for _ in range(K)],
            [t for group in samples for t in group],
            [x for x in rivals for _ in range(K)],
        )
        return (both_orders(judge, *sides) if average else judge.preference(*sides)).view(-1, K), None
    candidates = (
        [[*group, rival] for group, rival in zip(samples, rivals, strict=True)] if rivals else samples
    )
    scores, matrices = judge_candidates(judge, prompts, candidates, average)
    p = torch.stack(matrices)  # (G, K, K), ½ on the diagonal, or with the rivals (G, K + 1, K + 1)
    return p[:, :K, K] if rivals else (p.sum(-1) - 0.5) / (K - 1), None if scores is None else torch.stack(
        scores
    )[:, :K]


def train_step(exp: Experiment, optimiser, batch: list[Group], step: int, learning_rate: float) -> dict:
    """One optimiser step on G prompts' samples, in micro-batches; returns its metrics."""
    args, run, policy, reference = exp.args, exp.run, exp.policy, exp.reference
    prompts, completions = [g.prompt for g in batch], [g.completions for g in batch]
    temperature, means = args.temperature, common.Means(len(batch))
    with run.phase("reference"):
        of_reference = common.token_logprobs(
            reference, prompts, completions, temperature, exp.device, args.micro_batch_tokens
        )
    for part in optimiser.passes(common.shares(prompts, completions, args.micro_batch_tokens)):
        groups = [batch[i] for i in part]
        data = common.collate([g.prompt for g in groups], [g.completions for g in groups], exp.device)
        preference = common.pad_rows([g.preference for g in groups], 0.0, exp.device).flatten()  # (G*K,)
        baseline = common.pad_rows([g.baseline for g in groups], 0.0, exp.device).flatten()  # (G*K,)
        reference_logprobs = common.pad_logprobs([of_reference[i] for i in part], data)  # (G, K, T)
        logprobs, entropy = common.completion_logprobs(policy, data, temperature, entropy=True)  # (G, K, T)
        # (G*K, T)
        policy_rows, reference_rows, mask = (
            x.flatten(0, 1) for x in (logprobs, reference_logprobs, data.mask)
        )
        loss = nash_md_loss(policy_rows, reference_rows, mask, preference, args.tau, baseline)
        (loss * len(groups) / len(batch)).backward()
        run.add_batch("training", data)
        run.add_tokens("reference", data.tokens, data.scored)

        with torch.no_grad():
            measured = {
                "loss": loss,
                "logps/policy": logprobs.sum(-1).mean(),
                "logps/reference": reference_logprobs.sum(-1).mean(),
                # at top-p 1 an unbiased estimate of KL(π ‖ π_ref), nats per reply
                "kl": (logprobs - reference_logprobs).sum(-1).mean(),
                "entropy": (entropy.sum(), data.mask.sum()),
                "length": data.mask.sum(-1).mean(),
            }
            means.add([g.row_id for g in groups], measured)
    total = means.read()
    run.stop_unless_finite(step, total["loss"], means.not_finite())
    replies = [c for group in completions for c in group]
    total["finished"] = sum(c[-1] in exp.ends for c in replies) / len(replies)
    with run.phase("update"):
        total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
    return total


def main(args: Args) -> None:
    """Run Nash-MD: see the numbered steps, which docs/nash_md.md explains."""
    check_args(args)

    # 1. Model, judge, data; the run folder.
    exp = set_up("nash_md", args)
    require(
        args.objective == "nash" or exp.judge.score is not None,
        f"--objective rlhf needs a scalar reward, and the judge {args.judge} has none. "
        "Use --judge sentiment or hf:ID, or --objective nash.",
    )
    batches = plan_batches(args, len(exp.rows))
    exp.begin(len(batches), comparisons(args, batches))
    if exp.trained:
        return exp.finish(CURVES)
    optimiser = make_optimiser(exp.policy, args.optimizer_states, args.weight_decay)
    ema = EMA(optimiser, args.ema_decay) if args.holds().average else None
    if exp.state:
        optimiser.load_state_dict(exp.state["optimiser"])
        if ema:
            ema.load_state_dict(exp.state["ema"])
    done = exp.state["step"] if exp.state else 0

    for step in range(done + 1, len(batches) + 1):
        # 2. The policy and its opponent answer each prompt; the judge says whom it prefers.
        groups, metrics = collect(exp, batches[step - 1], step, ema)

        # 3. Log-probs, policy gradient, step.
        learning_rate = learning_rate_at(
            step - 1, len(batches), args.learning_rate, args.warmup_ratio, args.schedule
        )
        with exp.run.phase("training"):
            metrics |= train_step(exp, optimiser, groups, step, learning_rate)
            if ema:
                ema.update()
        metrics |= {"learning_rate": learning_rate, **exp.run.throughput()}
        exp.run.log(step, metrics, show=("preference", "score", "exploitability", "kl"))
        average = ema.state_dict() if ema else None
        exp.run.keep(step, {"step": step, "optimiser": optimiser.state_dict(), "ema": average})

    # 4. Save; compare with the starting model on held-out prompts.
    optimiser.release()
    exp.finish(CURVES)


if __name__ == "__main__":
    command_line(main, RECIPES)
