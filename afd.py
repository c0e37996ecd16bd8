"""AfD, alignment from demonstrations: SFT, adversarial imitation, rewards by inverse RL. arXiv 2405.15624 v2.

The idea: demonstrations carry more than SFT takes from them. The pair (a sample of the starting model, a
sample of the model fine-tuned on the demonstrations) says which way the demonstrator lies, and both sides
come from one model family: a reward learned from such pairs (`init-sft`) ranks new samples, where one learned
from (sample, demonstration) pairs only learns who wrote them.

Departures from the paper:
 1. Best-of-N is distilled into the policy (--extrapolate distil): DPO on the reward's best against its worst
    of each prompt's samples.
 2. A reward model reads replies without their end-of-sequence token, both of a pair cut to the length of the
    shorter one (--hide-end, --match-lengths): otherwise it learns lengths only. The discriminators of
    reverse-kl and js read whole replies, and learn alone for --discriminator-warmup steps first.
 3. The closed form log π_SFT(y|x) − log π_0(y|x), which the reward model of `init-sft` approximates, is
    reported beside it, and can be the reward itself (--reward log-ratio, as on the default task).
 4. Reward models train all weights but the embeddings, or a LoRA adapter; the author's are LoRA.
 5. The paper's demonstrations are GPT-4's: give them with --demonstrations FILE. The gpt2 and gemma-2b
    recipes take `chosen`.
 6. The smollm2-135m recipe is ours, chosen for two CPU cores.

Examples:
    python afd.py                                                 # upbeat human replies; minutes on a laptop
    python afd.py --model gemma-2b --demonstrations gpt4.jsonl    # the paper's task, on one GPU
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F

import common
from cleanalign.best_of_n import best_of_n_summary, compare_rankers, write_report
from cleanalign.errors import require
from cleanalign.models import check_folder, save_model, starting_model
from cleanalign.optimization import learning_rate_at, make_optimiser
from experiment import (
    Example,
    Holds,
    RunArgs,
    Split,
    Stage,
    StagedExperiment,
    check_common,
    command_line,
    load_demonstrations,
    sealed,
    set_up_stages,
    stage_steps,
    train_stage,
    with_reference,
)
from judges import golden_of, preference_matrix
from rewards import (
    Reward,
    accuracy,
    collate_read,
    data_set_preferences,
    new_reward_model,
    pair_as_read,
    preference_examples,
    reward_scores,
    rewards_of,
    scorer,
    share_right,
    train_on_pairs,
)

Pairs = Literal["init-sft", "init-demo", "sft-demo", "preference"]


@dataclass
class Args(RunArgs):
    """Alignment from demonstrations, AfD (arXiv 2405.15624).

    python afd.py     learns on a laptop in minutes, needs no GPU and no model hub

    python afd.py --model gemma-2b --demonstrations gpt4.jsonl   the paper's task, on one GPU

    --model NAME also sets the recipe's other values, shown as the defaults below; flags given by hand win.
    """

    # run
    save_every: int = 50
    """Optimiser steps between checkpoints; 0: only when a
    stage is finished, at a signal, and when a judge fails."""

    # model and data
    model: str = "smollm2-135m"
    """Recipe name, hub id or folder of the starting model π_0."""
    sft_model: str | None = None
    """Folder or hub id of a finished π_SFT (an earlier run's sft/), instead of training one."""
    reward_model: str | None = None
    """Folder of a finished reward model (an earlier run's reward-*/), instead of training one."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on every linear layer, in every stage; 0 trains all weights."""
    lora_alpha: int = 64
    """LoRA's scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    dataset: str = "chitchat"
    """Prompts: a name (chitchat, hh-harmless, hh-helpful), hub id, or .jsonl, .jsonl.gz or .parquet file."""
    demonstrations: str = "response"
    """Column of the data set that holds the demonstrations, or a file of rows with prompt and response."""
    min_demonstration_score: float | None = 0.8
    """Keep demonstrations that the judge scores at least this (the default task: upbeat human replies); None
    keeps all."""
    num_prompts: int | None = 480
    """Demonstrations, one a prompt; None is all of them."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included; longer ones are dropped and counted."""
    judge: str = "sentiment"
    """The golden judge: sentiment, polarity, cycle, hf:ID, pairrm, pairwise:ID or FILE.py:FUNCTION. It
    scores; no training path may ask it."""
    eval_judge: str | None = "polarity"
    """A second judge, for the final comparison; None for none."""
    eval_prompts: int = 128
    """Held-out prompts of the Best-of-N report and of the final comparison with the starting model."""
    dev_prompts: int = 32
    """Demonstrations set aside: on them a reward model's
    separability is measured and the reward to report is chosen."""

    # algorithm
    objective: Literal["forward-kl", "reverse-kl", "js", "irl"] = "irl"
    """forward-kl: SFT. reverse-kl, js: adversarial imitation
    from π_SFT on. irl: a reward model, then extrapolation."""
    pairs: tuple[Pairs, ...] = ("init-sft",)
    """Reward models to train, by their pairs, negative first; all are compared on the same samples. --reward
    reward-model distils the first."""
    preferences: Literal["data", "judge"] = "judge"
    """Where --pairs preference takes its pairs: the data set's chosen and rejected, or the judge's verdict on
    π_SFT's samples (an oracle, for reference only)."""
    reward_loss: Literal["classification", "bradley-terry"] = "classification"
    """classification: the logit is an estimate of the log density ratio, comparable across prompts.
    bradley-terry: pairs."""
    reward: Literal["reward-model", "log-ratio"] = "log-ratio"
    """What distil extrapolates: the first reward model, or the closed form log π_SFT(y|x) − log π_0(y|x),
    which needs none (on the default task's development prompts it ranks better)."""
    reward_init: Literal["start", "sft"] = "start"
    """Weights that a reward model or discriminator starts from: π_0's or π_SFT's."""
    hide_end: bool = True
    """Reward models read replies without the end-of-sequence token."""
    match_lengths: bool = True
    """Reward models are trained on pairs cut to the length of the shorter reply."""
    reward_prompts: int = 128
    """Training prompts on which reward models are trained and Best-of-N is distilled."""
    reward_samples: int = 2
    """Samples of π_0 and of π_SFT for each of these prompts: pairs of a reward model."""
    max_n: int = 16
    """Largest N of the Best-of-N report."""
    extrapolate: Literal["best-of-n", "distil"] = "distil"
    """best-of-n: report only, the policy is π_SFT. distil:
    train it on the reward's best against its worst sample."""
    samples_per_prompt: int = 6
    """Samples that distil chooses from; of the adversarial objectives, own samples."""
    beta: float = 0.1
    """Strength of the tie to π_SFT in distil: DPO's β."""
    kl: float = 0.02
    """reverse-kl, js: weight of the KL to π_SFT in the policy's reward (with --whiten, against advantages of
    standard deviation 1)."""
    policy_steps: int = 40
    """reverse-kl, js: policy updates."""
    discriminator_updates: int = 1
    """reverse-kl, js: discriminator updates before each policy update."""
    discriminator_reads: Literal["whole", "cut"] = "whole"
    """reverse-kl, js: what the discriminator learns from. whole: the replies that it scores, or what is
    minimised is not the divergence; cut: as --hide-end and --match-lengths say."""
    discriminator_warmup: int = 10
    """reverse-kl, js: steps that update the discriminator alone, before the first policy update."""
    whiten: bool = True
    """reverse-kl, js: divide advantages by the batch's
    standard deviation, as the discriminator's scale drifts."""
    replay: float = 0.0
    """reverse-kl, js: share of the discriminator's negatives taken from earlier steps' samples."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most in each stage; None takes all. The schedule shortens with it."""
    learning_rate: float = 5e-5
    """Peak learning rate of SFT."""
    policy_learning_rate: float = 4e-5
    """Peak learning rate of the policy after SFT: distil, reverse-kl, js."""
    reward_learning_rate: float = 5e-5
    """Peak learning rate of reward models and discriminators."""
    batch_size: int = 16
    """Demonstrations, or prompts, in one optimiser step."""
    epochs: int = 2
    """Passes of SFT over the demonstrations."""
    reward_epochs: int = 1
    """Passes of a reward model over its pairs."""
    policy_epochs: int = 2
    """Passes of distil over its pairs."""
    warmup_ratio: float = 0.1
    """Share of a stage's steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after the warm-up, within a stage."""
    optimizer_states: Literal["float32", "bfloat16"] = "float32"
    """What AdamW keeps for each bfloat16 weight: float32 master and moments, 12 bytes; or bfloat16 moments
    and the master's 16 low bits, 6."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0 never clips."""
    micro_batch_tokens: int = 384
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
    sample_rows: int = 128
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice
    stands in args.json."""

    def holds(self) -> Holds:
        """Beside the policy: the model it is tied to. A row of
        training holds a demonstration, or a prompt's samples."""
        completions = 1 if self.objective == "forward-kl" else self.samples_per_prompt
        return Holds(completions=completions, models=2 + len(self.pairs))

    def for_all_weights(self) -> Args:
        """A recipe of an adapter with --lora-rank 0: learning rates for all weights (docs/selm.md)."""
        return replace(
            self, lora_rank=0, learning_rate=1e-5, policy_learning_rate=5e-7, reward_learning_rate=2e-6
        )


HH = Args(  # the paper's task: Anthropic's HH-RLHF
    model="gemma-2b",
    dataset="hh-harmless",
    demonstrations="chosen",
    min_demonstration_score=None,
    preferences="data",
    num_prompts=None,
    max_prompt_length=512,
    max_new_tokens=128,
    top_p=0.95,
    judge="hf:Ray2333/gpt2-large-harmless-reward_model",
    eval_judge="hf:OpenAssistant/reward-model-deberta-v3-large-v2",
    eval_prompts=256,
    dev_prompts=256,
    reward="reward-model",
    reward_prompts=8192,
    samples_per_prompt=8,
    policy_learning_rate=1.5e-5,
    reward_learning_rate=2e-5,
    max_n=50,
    lora_rank=32,
    learning_rate=5e-5,
    micro_batch_tokens=16_384,
    save_every=500,
    policy_steps=1000,
    sample_rows=0,
)
RECIPES = {
    "smollm2-135m": Args(),
    "gpt2": replace(HH, model="gpt2"),
    "gemma-2b": HH,
    "llama3-8b": replace(
        HH,
        model="llama3-8b",
        dataset="hh-helpful",
        judge="hf:weqweasdas/RM-Gemma-7B",
        gradient_checkpointing=True,
        micro_batch_tokens=8192,
    ),
}


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    for name in (
        "epochs",
        "reward_epochs",
        "policy_epochs",
        "reward_prompts",
        "reward_samples",
        "max_n",
        "dev_prompts",
    ):
        require(
            getattr(args, name) >= 1,
            f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.",
        )
    for name in ("policy_steps", "discriminator_updates", "samples_per_prompt"):
        require(
            getattr(args, name) >= 1,
            f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.",
        )
    for name in ("learning_rate", "policy_learning_rate", "reward_learning_rate", "beta"):
        require(
            getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}."
        )
    require(
        args.temperature > 0, "--temperature 0 (greedy): every sample of a prompt would be the same text."
    )
    require(0 <= args.replay < 1, f"--replay must lie in [0, 1), got {args.replay}.")
    require(args.kl >= 0, f"--kl must not be negative, got {args.kl}.")
    alone = args.discriminator_warmup
    require(alone >= 0, f"--discriminator-warmup must not be negative, got {alone}.")
    require(
        len(set(args.pairs)) == len(args.pairs), f"--pairs {' '.join(args.pairs)}: each construction once."
    )
    if args.objective == "irl":
        least = 2 if args.extrapolate == "distil" else 1
        require(
            args.samples_per_prompt >= least,
            "--samples-per-prompt must be at least 2: distil needs a best and a worst.",
        )
        require(
            args.pairs or args.reward_model or args.reward == "log-ratio",
            "--pairs names no reward model to train: give one, or --reward log-ratio.",
        )
    require(
        args.objective != "js" or args.reward_loss == "classification",
        "--objective js needs --reward-loss classification: its reward −log(1 − D) is no density ratio's "
        "when a constant per prompt is free.",
    )
    if args.reward_model and args.objective == "irl" and args.extrapolate == "distil":
        require(
            args.reward == "reward-model",
            f"--reward-model {args.reward_model} is given, but --reward {args.reward} is what distil "
            "extrapolates. Add --reward reward-model, "
            "or --extrapolate best-of-n to compare only.",
        )
    if args.objective in ("reverse-kl", "js"):
        require(
            args.batch_size * args.samples_per_prompt > 1,
            "--batch-size 1 with --samples-per-prompt 1 leaves no other sample for a baseline.",
        )
    check_folder("--sft-model", args.sft_model, "ForCausalLM", "LMHeadModel")
    check_folder("--reward-model", args.reward_model, "ForSequenceClassification")


def discriminator_loss(
    positive_scores: torch.Tensor,
    negative_scores: torch.Tensor,
    kind: Literal["classification", "bradley-terry"] = "classification",
) -> torch.Tensor:
    """Loss of a discriminator or reward model on pairs, as a scalar to minimise (mean over the batch).

    `classification` is minus half of E_D[log D] + E_π[log(1 − D)], D = σ(score): its optimum's score is the
    log density ratio log d_positive(y|x) − log d_negative(y|x). `bradley-terry` is −log σ(positive −
    negative): a constant per prompt stays free. arXiv 2405.15624 v2, Sections 3 and 4.

    Args:
        positive_scores, negative_scores: (B,) logits. For bradley-terry the i-th two belong to one prompt.
    """
    if kind == "bradley-terry":
        return -F.logsigmoid(positive_scores - negative_scores).mean()
    return 0.5 * (-F.logsigmoid(positive_scores).mean() - F.logsigmoid(-negative_scores).mean())


def dpo_loss(
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float
) -> torch.Tensor:
    """DPO's loss, Eq. 7 of arXiv 2305.18290, a scalar to minimise. (B,) summed log-probs each.

    Stands in selm.py (α = 0) and spin.py too, on purpose: scripts import no script."""
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    return -F.logsigmoid(beta * margin).mean()


def policy_gradient_loss(logprobs, reference_logprobs, mask, advantage, kl: float) -> torch.Tensor:
    """Surrogate of the policy gradient of E[r(y)] − kl · KL(π ‖ π_SFT), the KL as reward-to-go; a scalar to
    minimise.

    (B, T) per-token log-probs and mask; (B,) advantage r(y) − baseline. As in nash_md.py, where Eq. 13
    explains it; twice on purpose.
    """
    log_ratio = ((logprobs - reference_logprobs) * mask).detach()  # (B, T)
    to_go = log_ratio.flip(-1).cumsum(-1).flip(-1)  # (B, T) Σ_{m ≥ n} log π/π_SFT
    return -(logprobs * mask * (advantage[:, None] - kl * to_go).detach()).sum(-1).mean()


# --- data ----------------------------------------------------------------------------------------


@dataclass
class Data:
    """Demonstrations to train on and to choose with, held-out prompts, and the data set's own preferences
    where they are wanted."""

    train: Split
    dev: Split
    test: Split
    preferences: list[Example]


def load_data(exp: StagedExperiment) -> Data:
    """All splits. Raises `UserError` where demonstrations or preferences are missing, or a held-out prompt is
    among them."""
    args = exp.args
    dev, train, rows = load_demonstrations(exp, args.dev_prompts)
    learns_preferences = args.objective == "irl" and not args.reward_model and "preference" in args.pairs
    preferences = []
    if learns_preferences and args.preferences == "data":
        preferences = data_set_preferences(exp, rows, dev)
    return Data(train, dev, Split(exp.eval_rows, exp.eval_prompts), preferences)


def planned_steps(args: Args, data: Data) -> int:
    """Optimiser steps of all stages, for the progress bar."""
    n = len(data.train.prompts)
    steps = 0 if args.sft_model else stage_steps(args, n, args.epochs)
    if args.objective in ("reverse-kl", "js"):
        steps += sum(adversarial_steps(args))
    elif args.objective == "irl":
        part = min(n, args.reward_prompts)
        if not args.reward_model:
            steps += len(args.pairs) * stage_steps(args, part * args.reward_samples, args.reward_epochs)
        if args.extrapolate == "distil":
            steps += stage_steps(args, part, args.policy_epochs)
    return steps


# --- forward KL ------------------------------------------------------------------------------------


def train_sft(exp: StagedExperiment, policy, train: Split) -> None:
    """Forward KL: minus the demonstration's log-prob, answer tokens only, in nats per reply. Stands in
    spin.py too."""
    columns = zip(train.rows, train.prompts, train.demonstrations, strict=True)
    examples = [Example(row.id, prompt, [demonstration], [1.0]) for row, prompt, demonstration in columns]

    def loss_of(examples, data):
        logprobs = common.completion_logprobs(policy, data)  # (G, 1, T)
        loss = -logprobs.sum((1, 2)).mean()
        return loss, {"loss_per_token": (-logprobs.detach().sum(), data.mask.sum())}

    stage = Stage("sft", exp.args.epochs, exp.args.learning_rate)
    train_stage(exp, stage, policy, examples, loss_of)


# --- reverse KL and JS: adversarial imitation ------------------------------------------------------


@dataclass
class Group:
    """One prompt's training example of the policy: its K
    own samples and what each earned beyond its baseline."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # K lists of token ids
    advantage: list[float]  # (K,)


def train_adversarial(exp: StagedExperiment, sft_source, train: Split) -> None:
    """Discriminator on (demonstration, own sample) and policy gradient on its reward, in turn; leaves the
    policy in `exp`."""
    args, run = exp.args, exp.run
    exp.policy = exp.load(sft_source, trainable=True)
    exp.reference = starting_model(exp.policy)
    discriminator = new_reward_model(exp, args.model if args.reward_init == "start" else str(sft_source))
    of_policy, of_discriminator = (
        make_optimiser(model, args.optimizer_states, args.weight_decay)
        for model in (exp.policy, discriminator)
    )
    optimisers = {"policy": of_policy, "discriminator": of_discriminator}
    resumed = exp.state and exp.state["stage"] == "adversarial"
    earlier: list[tuple[int, list[list[int]]]] = exp.state["replay"] if resumed else []
    alone, steps = adversarial_steps(args)
    for index in range(exp.restore_within("adversarial", optimisers), alone + steps):
        seed, step = common.derive_seed(args.seed, "adversarial", index), len(run.metrics) + 1
        rng = random.Random(seed)
        chosen = rng.sample(range(len(train.prompts)), min(args.batch_size, len(train.prompts)))
        prompts = [train.prompts[i] for i in chosen]
        own, _ = exp.sample(prompts, seed, args.samples_per_prompt)  # [G][K]
        share = learning_rate_at(index, alone + steps, 1.0, args.warmup_ratio, args.schedule)
        metrics = {}
        if exp.judge.score is not None:  # to look at; nothing learns from it
            asked = [train.rows[i].prompt for i in chosen for _ in range(args.samples_per_prompt)]
            texts = [text for group in exp.texts(own, exp.judge) for text in group]
            metrics["score"] = exp.judge.score(asked, texts).mean().item()
        with run.phase("training"), sealed(exp.judge):
            # Discriminator: maximise E_D[log D] + E_π[log(1 − D)], some of the negatives from earlier
            # policies.
            current = list(zip(chosen, own, strict=True))
            for _ in range(args.discriminator_updates):
                old = rng.sample(earlier, min(len(earlier), round(args.replay * len(current))))
                batch = against_demonstrations(exp, train, current[len(old) :] + old)
                rate = args.reward_learning_rate * share
                metrics |= discriminator_step(exp, discriminator, of_discriminator, batch, (step, rate))
            earlier = (earlier + current)[-32 * args.batch_size :] if args.replay else []

            # Policy: its reward is the discriminator's.
            # (G, K)
            reward = adversarial_reward(rewards_of(exp, discriminator, prompts, own), args.objective)
            if index >= alone:
                advantage = advantage_of(reward, args.whiten).tolist()  # (G, K)
                columns = zip(chosen, prompts, own, advantage, strict=True)
                groups = [Group(train.rows[i].id, *example) for i, *example in columns]
                rate = learning_rate_at(
                    index - alone, steps, args.policy_learning_rate, args.warmup_ratio, args.schedule
                )
                metrics |= train_step(exp, of_policy, groups, step, rate)
        spread = reward.std(1).mean().item() if args.samples_per_prompt > 1 else 0.0
        metrics |= {"reward": reward.mean().item(), "reward_std": spread}
        row = {f"adversarial/{name}": value for name, value in metrics.items()} | run.throughput()
        run.log(step, row, show=("adversarial/score", "adversarial/kl"))
        exp.keep_within("adversarial", index + 1, optimisers, replay=earlier)
    for optimiser in optimisers.values():
        optimiser.release()
    exp.reference = None  # it was π_SFT; the final comparison is with π_0


def adversarial_steps(args: Args) -> tuple[int, int]:
    """Steps of the discriminator alone, and of both."""
    return args.discriminator_warmup, min(args.policy_steps, args.max_steps or args.policy_steps)


def adversarial_reward(logits: torch.Tensor, objective: Literal["reverse-kl", "js"]) -> torch.Tensor:
    """The policy's reward from the discriminator's logit, the estimated log density ratio: that itself for
    the reverse KL, −log(1 − D), its softplus, for JS (GAIL's)."""
    return F.softplus(logits) if objective == "js" else logits


def advantage_of(reward: torch.Tensor, whiten: bool) -> torch.Tensor:
    """(G, K) rewards minus the mean of the prompt's other samples, or for K = 1 of the batch's; at unit
    variance if `whiten`."""
    others = reward if reward.shape[1] > 1 else reward.expand(-1, len(reward)).T
    advantage = reward - (others.sum(1, keepdim=True) - reward) / max(1, others.shape[1] - 1)
    return advantage / (advantage.std() + 1e-6) if whiten else advantage


def against_demonstrations(
    exp: StagedExperiment, train: Split, groups: list[tuple[int, list]]
) -> list[Example]:
    """(prompt index, own samples) as the discriminator reads them: the demonstration before each sample."""
    examples = []
    for i, own in groups:
        pairs = [pair_as_read(train.demonstrations[i], y, exp.args, exp.ends) for y in own]
        completions = [side for pair in pairs for side in pair]
        examples.append(Example(train.rows[i].id, train.prompts[i], completions, [1.0] * len(completions)))
    return examples


def discriminator_step(
    exp: StagedExperiment, discriminator, optimiser, batch: list[Example], at: tuple[int, float]
) -> dict:
    """One update on the batch's pairs, (step, learning rate) `at` hand; returns its metrics."""
    args, (step, learning_rate) = exp.args, at
    prompts, completions = [e.prompt for e in batch], [e.completions for e in batch]
    means = common.Means(len(batch))
    for part in optimiser.passes(common.shares(prompts, completions, args.micro_batch_tokens)):
        data = collate_read([prompts[i] for i in part], [completions[i] for i in part], exp.device)
        scores = reward_scores(discriminator, data)  # (G, 2K)
        positive, negative = scores[:, ::2].flatten(), scores[:, 1::2].flatten()  # (G*K,)
        loss = discriminator_loss(positive, negative, args.reward_loss)
        (loss * len(part) / len(batch)).backward()
        measured = {"loss": loss, "accuracy": share_right(positive, negative)}
        means.add([batch[i].row_id for i in part], measured)
    total = means.read()
    exp.run.stop_unless_finite(step, total["loss"], means.not_finite())
    optimiser.step(learning_rate, args.max_grad_norm)
    return {f"discriminator_{name}": value for name, value in total.items()}


def train_step(exp: StagedExperiment, optimiser, batch: list[Group], step: int, learning_rate: float) -> dict:
    """One policy-gradient update on G prompts' K samples, in micro-batches; returns its metrics."""
    args, run, policy, reference = exp.args, exp.run, exp.policy, exp.reference
    prompts, completions = [g.prompt for g in batch], [g.completions for g in batch]
    temperature, means = args.temperature, common.Means(len(batch))
    of_reference = common.token_logprobs(
        reference, prompts, completions, temperature, exp.device, args.micro_batch_tokens
    )
    for part in optimiser.passes(common.shares(prompts, completions, args.micro_batch_tokens)):
        groups = [batch[i] for i in part]
        data = common.collate([g.prompt for g in groups], [g.completions for g in groups], exp.device)
        advantage = common.pad_rows([g.advantage for g in groups], 0.0, exp.device).flatten()  # (G*K,)
        reference_logprobs = common.pad_logprobs([of_reference[i] for i in part], data)  # (G, K, T)
        logprobs, entropy = common.completion_logprobs(policy, data, temperature, entropy=True)  # (G, K, T)
        # (G*K, T)
        policy_rows, reference_rows, mask = (
            x.flatten(0, 1) for x in (logprobs, reference_logprobs, data.mask)
        )
        loss = policy_gradient_loss(policy_rows, reference_rows, mask, advantage, args.kl)
        (loss * len(groups) / len(batch)).backward()
        run.add_batch("training", data)
        measured = {
            "loss": loss,
            # at top-p 1 an unbiased estimate of KL(π ‖ π_SFT), nats per reply
            "kl": (logprobs.detach() - reference_logprobs).sum(-1).mean(),
            "entropy": (entropy.sum(), data.mask.sum()),
            "length": data.mask.sum(-1).mean(),
        }
        means.add([g.row_id for g in groups], measured)
    total = means.read()
    run.stop_unless_finite(step, total.pop("loss"), means.not_finite())  # a surrogate's value means nothing
    total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
    return total


# --- inverse RL ----------------------------------------------------------------------------------


@dataclass
class Samples:
    """[prompt][sample] token ids, drawn once: to learn from and to distil (training prompts), to choose with,
    to report."""

    learn_from: list  # π_SFT's
    distil_from: list  # π_SFT's, too
    init: list | None  # π_0's, on the same prompts
    by_split: dict[str, list]  # π_SFT's on test and development prompts
    dev_init: list  # π_0's on development prompts


def inverse_rl(exp: StagedExperiment, sft_source, data: Data) -> dict:
    """Reward models from pairs, their Best-of-N report, and the policy that extrapolates, left in `exp`.
    Returns the summary's part."""
    args = exp.args
    part = slice(args.reward_prompts)
    train = Split(data.train.rows[part], data.train.prompts[part], data.train.demonstrations[part])
    data = replace(data, train=train)

    # 3a. Samples.
    samples = draw_samples(exp, sft_source, data)
    # 3b. Reward models.
    rewards = train_rewards(exp, sft_source, data, samples)
    # 3c. Every reward scores the same samples; the judge tells how good its choices are.
    report, to_distil = compare_rewards(exp, sft_source, data, samples, rewards)
    summary = best_of_n_summary(report)
    # 3d. Extrapolate: at serving time by Best-of-N, or now, by DPO of the reward's best against its worst.
    if args.extrapolate == "best-of-n":
        exp.policy = exp.load(sft_source)
        return summary
    label, scores = to_distil
    distil(exp, sft_source, data.train, samples.distil_from, scores)
    # what Best-of-N gets with as many samples as distil chose from
    equal = min(args.samples_per_prompt, args.max_n)
    at_equal = report["rankers"][label]["score"][equal - 1]
    summary["distil"] = {
        "reward": label,
        "samples_per_prompt": args.samples_per_prompt,
        f"best_of_{equal}_score": at_equal,
    }
    return summary


def draw_samples(exp: StagedExperiment, sft_source, data: Data) -> Samples:
    """Everything that rewards learn from and are measured on. The judge's preferences, an oracle, also see
    what distil chooses from."""
    args = exp.args
    M = args.max_n + 1  # one more than the largest subset: the opponent outside it
    kinds = () if args.reward_model else args.pairs
    oracle = "preference" in kinds and args.preferences == "judge"
    extra = args.samples_per_prompt if args.extrapolate == "distil" or oracle else 0
    start, sft = exp.load(args.model), exp.load(sft_source)
    prompts, few = data.train.prompts, args.reward_samples
    own = exp.kept_samples("train-sft", sft, prompts, few + extra)
    return Samples(
        learn_from=[group[:few] for group in own],
        distil_from=[group[few:] for group in own],
        init=exp.kept_samples("train-init", start, prompts, few) if kinds else None,
        by_split={
            "test": exp.kept_samples("test-sft", sft, data.test.prompts, M),
            "dev": exp.kept_samples("dev-sft", sft, data.dev.prompts, M),
        },
        dev_init=exp.kept_samples("dev-init", start, data.dev.prompts, few),
    )


def train_rewards(exp: StagedExperiment, sft_source, data: Data, samples: Samples) -> list[Reward]:
    """A reward model for each of --pairs, or the given one; finished ones stay in the run folder."""
    args = exp.args
    if args.reward_model:
        pairs = Path(args.reward_model).name.removeprefix("reward-")
        return [Reward(f"reward model, given ({pairs})", pairs, Path(args.reward_model))]
    rewards = []
    for kind in args.pairs:
        oracle = kind == "preference" and args.preferences == "judge"
        stage = f"reward-{kind}"
        label = f"reward model, {kind}" + oracle * " (oracle)"
        rewards.append(Reward(label, kind, exp.run.folder / stage, oracle))
        if stage in exp.done:
            continue
        if kind == "preference" and not oracle:
            pairs = data.preferences
        else:
            own = samples.learn_from
            if oracle:
                own = [[*a, *b] for a, b in zip(samples.learn_from, samples.distil_from, strict=True)]
            pairs = reward_pairs(exp, kind, data.train, own, samples.init)
        model = new_reward_model(exp, args.model if args.reward_init == "start" else str(sft_source))
        pair_loss = partial(discriminator_loss, kind=args.reward_loss)
        foreseen = len(data.train.prompts) * args.reward_samples
        steps = [stage_steps(args, count, args.reward_epochs) for count in (foreseen, len(pairs))]
        exp.run.fewer_steps(steps[0] - steps[1])
        train_on_pairs(exp, stage, model, pairs, pair_loss)
        save_model(model, exp.tokenizer, exp.run.folder / stage)
        exp.finish_stage(stage)
        del model
    return rewards


def reward_pairs(
    exp: StagedExperiment, kind: Pairs, split: Split, own: list, init: list | None
) -> list[Example]:
    """[positive, negative] pairs as a reward model reads them: `own` and `init` are π_SFT's and π_0's
    samples, [prompt][sample]."""
    pairs = []  # (prompt's index, positive, negative)
    if kind == "preference":  # the judge's own verdict on π_SFT's samples: an oracle
        asked = [row.prompt for row in split.rows]
        for i, matrix in enumerate(preference_matrix(exp.judge, asked, exp.texts(own, exp.judge))):
            wins = matrix.sum(1)  # (M,)
            if wins.max() > wins.min():
                pairs.append((i, own[i][int(wins.argmax())], own[i][int(wins.argmin())]))
    else:
        negative_side, positive_side = kind.split("-")
        for i, demonstration in enumerate(split.demonstrations):
            sides = {"init": init[i], "sft": own[i], "demo": [demonstration] * len(init[i])}
            drawn = zip(sides[positive_side], sides[negative_side], strict=False)
            pairs += [(i, positive, negative) for positive, negative in drawn]
    examples = []
    for i, positive, negative in pairs:
        read = pair_as_read(positive, negative, exp.args, exp.ends)
        if read[0] != read[1]:
            examples.append(Example(split.rows[i].id, split.prompts[i], read, [1.0, 1.0]))
    return examples


def compare_rewards(
    exp: StagedExperiment, sft_source, data: Data, samples: Samples, rewards: list[Reward]
) -> tuple[dict, tuple | None]:
    """The Best-of-N report, written to the run folder; and of the reward to distil its label and its scores
    of the training samples."""
    args, rankers, to_distil = exp.args, {}, None
    splits = {"test": data.test, "dev": data.dev}
    held_out = preference_examples(exp, data.test)
    for reward in [*rewards, Reward("log-ratio", "init-sft", None)]:
        with exp.run.phase("scoring"):
            score = scorer(exp, sft_source, reward)
            ranker = {}
            for split, replies in samples.by_split.items():
                ranker[split] = score(splits[split].prompts, replies, progress=f"{reward.label}: {split}")
            if reward.pairs == "preference" and args.preferences == "data":
                ranker["separability"] = accuracy(score, held_out)
            elif reward.pairs in get_args(Pairs):
                own, init = samples.by_split["dev"], samples.dev_init
                ranker["separability"] = accuracy(score, reward_pairs(exp, reward.pairs, data.dev, own, init))
            ranker["preference_accuracy"] = accuracy(score, held_out)
            wanted = (args.reward == "reward-model") == (reward.folder is not None)
            if args.extrapolate == "distil" and to_distil is None and wanted:
                progress = f"{reward.label}: training prompts"
                to_distil = reward.label, score(data.train.prompts, samples.distil_from, progress=progress)
            rankers[reward.label] = ranker
            del score
    reports = []
    for judge in [exp.judge, exp.eval_judge] if exp.eval_judge else [exp.judge]:
        golden, lengths = {}, {}
        for split, replies in samples.by_split.items():
            asked = [row.prompt for row in splits[split].rows]
            golden[split] = golden_of(judge, asked, exp.texts(replies, judge))
            lengths[split] = torch.tensor([[float(len(y)) for y in group] for group in replies])
        reports.append(compare_rankers(rankers, golden, lengths, judge.name))
    report = reports[0]
    if exp.eval_judge:  # which neither selected the demonstrations nor picks the reward to report
        report["eval_judge"] = {key: reports[1][key] for key in ("judge", "rankers")}
    # Preferences are more than demonstrations: of the rewards learned without them, the one the development
    # prompts favour is reported.
    own_rewards = [label for label in rankers if "preference" not in label]
    report["favoured_on_dev"] = max(
        own_rewards, key=lambda label: report["rankers"][label]["dev"]["win_rate"][-1]
    )
    write_report(report, exp.run.folder)
    return report, to_distil


def distil(exp: StagedExperiment, sft_source, train: Split, samples: list, scores: torch.Tensor) -> None:
    """DPO of the sample that (G, M) `scores` like best against
    the one they like least; leaves the policy in `exp`."""
    args, examples = exp.args, []
    best, worst = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    for i, group in enumerate(samples):
        pair = [group[best[i]], group[worst[i]]]
        if pair[0] != pair[1]:
            examples.append(Example(train.rows[i].id, train.prompts[i], pair, [args.temperature] * 2))
    require(
        bool(examples),
        f"distil: every sample of a prompt is the same, on all {len(train.prompts)} prompts. Nothing to "
        "learn from.",
    )
    steps = [stage_steps(args, count, args.policy_epochs) for count in (len(train.prompts), len(examples))]
    exp.run.fewer_steps(steps[0] - steps[1])
    exp.policy = exp.load(sft_source, trainable=True)
    train_dpo(exp, Stage("distil", args.policy_epochs, args.policy_learning_rate), exp.policy, examples)


def train_dpo(exp: StagedExperiment, stage: Stage, policy, examples: list[Example]) -> None:
    """DPO on [chosen, rejected], the reference being the policy as it is when this begins (or began, if
    resumed). In spin.py too."""
    examples = with_reference(exp, stage.name, policy, examples)
    beta = exp.args.beta

    def loss_of(examples, data):
        temperature = common.pad_rows([e.temperature for e in examples], 1.0, "cpu")  # (G, 2)
        reference = common.pad_rows([e.reference for e in examples], 0.0, exp.device)  # (G, 2)
        sums = common.completion_logprobs(policy, data, temperature).sum(-1)  # (G, 2)
        loss = dpo_loss(sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1], beta)
        chosen, rejected = (sums - reference).detach().unbind(1)  # (G,) log π/π_ref
        return loss, {
            "accuracy": (chosen > rejected).float().mean(),
            "margin": beta * (chosen - rejected).mean(),
        }

    train_stage(exp, stage, policy, examples, loss_of)


def main(args: Args) -> None:
    """Run AfD: see the numbered steps, which docs/afd.md explains."""
    check_args(args)

    # 1. Judge, data, what the starting model tells; the run folder.
    exp = set_up_stages("afd", as_read_by(args))
    args = exp.args
    data = load_data(exp)
    exp.begin(planned_steps(args, data))
    if exp.trained:
        return exp.finish(curves_of(exp.run.metrics))

    # 2. SFT: the forward KL.
    sft_source = args.sft_model or exp.run.folder / "sft"
    if not args.sft_model and "sft" not in exp.done:
        exp.policy = exp.load(args.model, trainable=True)
        train_sft(exp, exp.policy, data.train)
        if args.dry_run:
            exp.sample(data.train.prompts[: args.batch_size], args.seed, args.samples_per_prompt)
            return exp.finish(())
        save_model(exp.policy, exp.tokenizer, sft_source)
        exp.finish_stage("sft")
        exp.policy = None  # every stage loads what it needs: a model less in memory while another trains
    summary = {"objective": args.objective}

    # 3. The objective: leaves the policy.
    if args.objective == "forward-kl":
        exp.policy = exp.load(sft_source)
    elif args.objective in ("reverse-kl", "js"):
        train_adversarial(exp, sft_source, data.train)
    else:
        summary |= inverse_rl(exp, sft_source, data)

    # 4. Save; compare with the starting model on held-out prompts.
    exp.finish(curves_of(exp.run.metrics), summary)


def as_read_by(args: Args) -> Args:
    """The same; a discriminator that reads whole replies neither hides an end nor matches lengths."""
    if args.objective in ("reverse-kl", "js") and args.discriminator_reads == "whole":
        return replace(args, hide_end=False, match_lengths=False)
    return args


def curves_of(metrics: list[dict]) -> tuple[str, ...]:
    """The logged metrics worth a plot, in their order."""
    endings = ("loss", "accuracy", "score", "kl", "length")
    return tuple(dict.fromkeys(name for row in metrics for name in row if name.endswith(endings)))


if __name__ == "__main__":
    command_line(main, RECIPES)
