"""Online-IPO and IPO-MD, with online DPO and online SLiC on the same stream. arXiv 2403.08635.

The idea: IPO's loss on pairs that the policy itself samples has the regularised Nash equilibrium of the
preference game as its stationary point; IPO-MD samples them from a geometric mixture of policy and reference,
as Nash-MD does.

Departures from the paper:
 1. The mixture is taken per token, π^(1−β) π_ref^β renormalised at every token, as the paper's runs do; its
    theory is for whole sequences. The two agree at β = 0, at β = 1 and for one-token replies (docs/theory.md
    shows how far apart they are).
 2. Labels are the judge's soft p (default), Bernoulli(p) draws, or argmax; argmax solves another game, that
    of 1[p > ½].
 3. The loss is (h − 1/(2τ))²; the paper's code is reported to multiply it by τ, so its learning rates carry
    over at τ = 1 only.
 4. DPO and SLiC get the same soft weighting, p f(h) + (1 − p) f(−h).
 5. AdamW in place of Adafactor.
 6. On one GPU the 8B recipe trains a LoRA adapter; --lora-rank 0 trains all weights, at a thirtieth of the
    learning rate. Both rates are ours, and unmeasured (docs/selm.md says why thirty).
 7. The smollm2-135m recipe is ours, chosen for two CPU cores.
 8. The pythia-1b-tldr recipe asks a scalar judge (the paper: a pairwise preference model) about TL;DR posts
    (the paper: XSum articles), and has τ = 1 for every --loss (the paper: 5 for DPO, 10 for SLiC).

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
from cleanalign.errors import require
from cleanalign.optimization import learning_rate_at, make_optimiser
from experiment import Experiment, Holds, RunArgs, check_common, command_line, set_up
from judges import judge_candidates


@dataclass
class Args(RunArgs):
    """Online-IPO, IPO-MD, online DPO and online SLiC (arXiv 2403.08635).

    python ipo_md.py     learns on a laptop in minutes, needs no GPU and no model hub

    python ipo_md.py --model pythia-1b-tldr --judge hf:ID   summarisation, the paper's task, on one GPU

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
    num_prompts: int | None = 360
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
    loss: Literal["ipo", "dpo", "slic"] = "ipo"
    """ipo is the paper's; dpo and slic are its siblings on the same samples."""
    tau: float = 0.03
    """Strength of the tie to the reference, τ."""
    beta: float = 0.125
    """Share of the reference in the mixture that both replies are sampled from; 0 is online-IPO, 1 samples
    the reference."""
    labels: Literal["soft", "bernoulli", "argmax"] = "soft"
    """What the judge's p becomes: itself, a coin flip of that
    chance, or 1[p > 1/2] (another game; ties stay 1/2)."""
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
        """Beside the policy: the reference. A row of training holds a prompt's two replies."""
        pairs = 2 * self.batch_size
        return Holds(completions=2, replies=2, sampled=(pairs, pairs if 0 < self.beta < 1 else 0))

    def for_all_weights(self) -> Args:
        """A recipe of an adapter with --lora-rank 0: a thirtieth of its learning rate (docs/selm.md)."""
        return replace(self, lora_rank=0, learning_rate=1e-6)


TLDR = Args(  # the paper's summarisation task, for a hub policy of one billion weights
    model="pythia-1b-tldr",
    dataset="tldr",
    num_prompts=None,
    max_prompt_length=512,
    max_new_tokens=64,
    judge="hf:cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
    eval_judge="hf:OpenAssistant/reward-model-deberta-v3-large-v2",
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
        learning_rate=3e-5,  # the adapter's
        micro_batch_tokens=8192,
        gradient_checkpointing=True,
    ),
}
CURVES = (
    "score",
    "loss",
    "preference",
    "rewards/accuracy",
    "kl",
    "length",
    "entropy",
    "mixture_agreement",
    "grad_norm",
)


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    require(args.tau > 0, f"--tau must be above 0, got {args.tau}.")
    require(
        0 <= args.beta <= 1,
        f"--beta must lie in [0, 1], got {args.beta}: it is the reference's share in the mixture.",
    )
    require(args.epochs >= 1, f"--epochs must be at least 1, got {args.epochs}.")
    require(args.learning_rate > 0, f"--learning-rate must be above 0, got {args.learning_rate}.")
    require(
        args.temperature > 0 or args.offline,
        "--temperature 0 (greedy) gives both replies the same text: nothing to compare.",
    )


def preference_loss(
    policy_a: torch.Tensor,
    policy_b: torch.Tensor,
    reference_a: torch.Tensor,
    reference_b: torch.Tensor,
    preference: torch.Tensor,
    tau: float,
    kind: Literal["ipo", "dpo", "slic"] = "ipo",
) -> torch.Tensor:
    """Online-IPO's loss, or its sibling's, on two sampled completions; a scalar to minimise (mean over the
    batch).

    Args:
        policy_a, policy_b: (B,) log π(y) and log π(y'), summed over tokens, in nats.
        reference_a, reference_b: (B,) the same under π_ref.
        preference: (B,) p(a ≻ b) in [0, 1]; hard labels are 0 and 1.
        tau: strength of the tie to the reference.
        kind: ipo, arXiv 2403.08635, Eq. 7; dpo, arXiv 2305.18290, Eq. 7; slic, arXiv 2305.10425, as a hinge
            on τh.

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


def plan_batches(args: Args, prompts: int) -> list[list[int]]:
    """Prompt indices of every optimiser step: each epoch in an order of its own, `--max-steps` at most."""
    batches = []
    for epoch in range(args.epochs):
        order = list(range(prompts))
        random.Random(common.derive_seed(args.seed, "order", epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, prompts, args.batch_size)]
    return batches[: args.max_steps]


def collect(exp: Experiment, indices: list[int], step: int) -> tuple[list[Pair], dict]:
    """Two replies to each prompt, drawn from the mixture, and the label p(a ≻ b); metrics of the sampling."""
    args, seed = exp.args, common.derive_seed(exp.args.seed, step)
    rows, prompts = [exp.rows[i] for i in indices], [exp.prompts[i] for i in indices]
    if args.offline:
        return offline_pairs(exp, rows, prompts), {}
    mixture = (exp.reference, args.beta) if args.beta > 0 else None
    replies, stats = exp.sample(prompts, seed, completions=2, mixture=mixture)
    with exp.run.phase("judging"):
        texts = exp.texts(replies, exp.judge)
        scores, matrices = judge_candidates(exp.judge, [row.prompt for row in rows], texts)
        preferences = [matrix[0, 1].item() for matrix in matrices]  # p(a ≻ b)

    # how decided the judge is: ½ to 1
    metrics = {"preference": sum(max(p, 1 - p) for p in preferences) / len(preferences)}
    if "agreement" in stats:
        metrics["mixture_agreement"] = stats["agreement"]
    if scores is not None:
        metrics["score"] = torch.cat(scores).mean().item()
    if exp.judge.measure is not None:
        metrics |= exp.judge.measure([text for pair in texts for text in pair])
    coin = random.Random(seed)
    labels = [label_of(args.labels, p, coin) for p in preferences]
    columns = zip(rows, prompts, replies, labels, strict=True)
    return [Pair(row.id, prompt, pair, label) for row, prompt, pair, label in columns], metrics


def label_of(kind: Literal["soft", "bernoulli", "argmax"], p: float, coin: random.Random) -> float:
    """What the judge's p(a ≻ b) becomes in the loss: itself,
    a draw with that chance, or 1[p > ½] (ties stay ½)."""
    if kind == "soft" or (kind == "argmax" and p == 0.5):
        return p
    return float(coin.random() < p) if kind == "bernoulli" else float(p > 0.5)


def offline_pairs(exp: Experiment, rows: list, prompts: list[list[int]]) -> list[Pair]:
    """The data set's (chosen, rejected), with label 1."""
    end, pairs = common.turn_end(exp.tokenizer, exp.ends), []
    for row, prompt in zip(rows, prompts, strict=True):
        replies = [
            common.encode_response(exp.tokenizer, row.prompt, text, end, exp.args.max_new_tokens)
            for text in (row.chosen, row.rejected)
        ]
        pairs.append(Pair(row.id, prompt, replies, 1.0))
    return pairs


def train_step(exp: Experiment, optimiser, batch: list[Pair], step: int, learning_rate: float) -> dict:
    """One optimiser step on B pairs, in micro-batches; returns its metrics."""
    args, run, policy, reference = exp.args, exp.run, exp.policy, exp.reference
    temperature = 1.0 if args.offline else args.temperature
    prompts, completions = [p.prompt for p in batch], [p.completions for p in batch]
    means = common.Means(len(batch))
    with run.phase("reference"):
        of_reference = common.token_logprobs(
            reference, prompts, completions, temperature, exp.device, args.micro_batch_tokens
        )
    for part in optimiser.passes(common.shares(prompts, completions, args.micro_batch_tokens)):
        pairs = [batch[i] for i in part]
        data = common.collate([p.prompt for p in pairs], [p.completions for p in pairs], exp.device)
        label = common.upload(torch.tensor([p.label for p in pairs]), exp.device)  # (G,)
        reference_logprobs = common.pad_logprobs([of_reference[i] for i in part], data)  # (G, 2, T)
        logprobs, entropy = common.completion_logprobs(policy, data, temperature, entropy=True)  # (G, 2, T)
        lengths = data.mask.sum(-1)  # (G, 2)
        scale = 1 / lengths if args.length_normalize else torch.ones_like(lengths)
        sums, reference_sums = logprobs.sum(-1) * scale, reference_logprobs.sum(-1) * scale  # (G, 2)
        policy_a, policy_b = sums.unbind(1)  # (G,)
        reference_a, reference_b = reference_sums.unbind(1)  # (G,)
        loss = preference_loss(policy_a, policy_b, reference_a, reference_b, label, args.tau, args.loss)
        (loss * len(pairs) / len(batch)).backward()
        run.add_batch("training", data)
        run.add_tokens("reference", data.tokens, data.scored)

        with torch.no_grad():
            h = (policy_a - reference_a) - (policy_b - reference_b)  # (G,)
            side = 2 * label - 1  # (G,) above 0 where a is preferred
            measured = {
                "loss": loss,
                "rewards/margin": args.tau * (h * side.sign()).mean(),
                "rewards/accuracy": (h * side > 0).float().mean(),
                "logps/policy": sums.mean(),
                "logps/reference": reference_sums.mean(),
                # of the sampled replies: at β = 0, and top-p 1, an unbiased estimate of KL(π ‖ π_ref)
                "kl": (logprobs - reference_logprobs).sum(-1).mean(),
                "entropy": (entropy.sum(), data.mask.sum()),
                "length": lengths.mean(),
            }
            means.add([p.row_id for p in pairs], measured)
    total = means.read()
    run.stop_unless_finite(step, total["loss"], means.not_finite())
    total["finished"] = sum(c[-1] in exp.ends for p in batch for c in p.completions) / (2 * len(batch))
    with run.phase("update"):
        total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
    return total


def main(args: Args) -> None:
    """Run IPO-MD: see the numbered steps, which docs/ipo_md.md explains."""
    check_args(args)

    # 1. Model, judge, data; the run folder.
    exp = set_up("ipo_md", args, ("chosen", "rejected") if args.offline else ())
    batches = plan_batches(args, len(exp.rows))
    exp.begin(len(batches), comparisons=0 if args.offline else sum(map(len, batches)))
    if exp.trained:
        return exp.finish(CURVES)
    optimiser = make_optimiser(exp.policy, args.optimizer_states, args.weight_decay)
    if exp.state:
        optimiser.load_state_dict(exp.state["optimiser"])
    done = exp.state["step"] if exp.state else 0

    for step in range(done + 1, len(batches) + 1):
        # 2. Two replies to each prompt from the mixture; the judge says which it prefers, and by how much.
        pairs, metrics = collect(exp, batches[step - 1], step)

        # 3. Log-probs, loss, step.
        learning_rate = learning_rate_at(
            step - 1, len(batches), args.learning_rate, args.warmup_ratio, args.schedule
        )
        with exp.run.phase("training"):
            metrics |= train_step(exp, optimiser, pairs, step, learning_rate)
        metrics |= {"learning_rate": learning_rate, **exp.run.throughput()}
        exp.run.log(step, metrics, show=("loss", "score", "rewards/accuracy", "kl"))
        exp.run.keep(step, {"step": step, "optimiser": optimiser.state_dict()})

    # 4. Save; compare with the starting model on held-out prompts.
    optimiser.release()
    exp.finish(CURVES)


if __name__ == "__main__":
    command_line(main, RECIPES)
