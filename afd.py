"""AfD, alignment from demonstrations: SFT, adversarial imitation, rewards by inverse RL, SPIN. arXiv 2405.15624 v2.

The idea: demonstrations carry more than SFT takes from them. The pair (a sample of the starting model, a sample of the model
fine-tuned on the demonstrations) says which way the demonstrator lies, and both sides come from one model family: a reward learned
from such pairs (`init-sft`) ranks new samples, where one learned from (sample, demonstration) pairs only learns who wrote them.

Departures from the paper:
 1. Best-of-N is distilled into the policy (--extrapolate distil): DPO on the reward's best against its worst of each prompt's samples.
 2. A reward model reads replies without their end-of-sequence token, both of a pair cut to the length of the shorter one
    (--hide-end, --match-lengths): otherwise it learns lengths only.
 3. The closed form log π_SFT(y|x) − log π_0(y|x), which the reward model of `init-sft` approximates, is reported beside it, and can
    be the reward itself (--reward log-ratio, as on the default task).
 4. Reward models train all weights but the embeddings, or a LoRA adapter; the author's are LoRA.
 5. --objective spin is Self-Play Fine-Tuning, arXiv 2401.01335, started at π_SFT.
 6. The paper's demonstrations are GPT-4's: give them with --demonstrations FILE. The gpt2 and gemma-2b recipes take `chosen`.
 7. The smollm2-135m recipe is ours, chosen for two CPU cores.

Examples:
    python afd.py                                                    # rewards from upbeat human replies; minutes on a laptop
    python afd.py --model gemma-2b --demonstrations gpt4.jsonl       # the paper's task, on one GPU
"""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import common
import optimization
from best_of_n import compare_rankers, write_report
from common import require
from experiment import Run, check_common, command_line, evaluate, write_model
from judges import Judge, load_judge, preference_matrix

Pairs = Literal["init-sft", "init-demo", "sft-demo", "preference"]


@dataclass
class Args:
    """Alignment from demonstrations, AfD (arXiv 2405.15624), with SPIN (arXiv 2401.01335).

    python afd.py                                                learns on a laptop in minutes, needs no GPU and no model hub

    python afd.py --model gemma-2b --demonstrations gpt4.jsonl   the paper's task, on one GPU

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
    save_every: int = 50
    """Optimiser steps between checkpoints; 0 writes none within a stage. A finished stage is always kept."""
    track: bool = False
    """Also log to Weights & Biases (needs the package wandb)."""
    dry_run: bool = False
    """Rehearse one step of SFT at the greatest lengths on random weights in this model's shapes, and report memory and speed by phase."""

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
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention backend; auto is sdpa, or eager for short sequences on a CPU, where it is faster."""
    dataset: str = "chitchat"
    """Prompts: a name (chitchat, hh-harmless, hh-helpful), hub id, or .jsonl, .jsonl.gz or .parquet file."""
    demonstrations: str = "response"
    """Column of the data set that holds the demonstrations, or a file of rows with prompt and response."""
    min_demonstration_score: float | None = 0.8
    """Keep demonstrations that the judge scores at least this (the default task: upbeat human replies); None keeps all."""
    num_prompts: int | None = 480
    """Demonstrations, one a prompt; None is all of them."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included; longer ones are dropped and counted."""
    judge: str = "sentiment"
    """The golden judge: sentiment, polarity, cycle, hf:ID, pairrm, pairwise:ID or FILE.py:FUNCTION. It scores; no training path may ask it."""
    eval_judge: str | None = "polarity"
    """A second judge, for the final comparison; None for none."""
    eval_prompts: int = 128
    """Held-out prompts of the Best-of-N report and of the final comparison with the starting model."""
    dev_prompts: int = 32
    """Demonstrations set aside: on them a reward model's separability is measured and the reward to report is chosen."""

    # algorithm
    objective: Literal["forward-kl", "reverse-kl", "js", "irl", "spin"] = "irl"
    """forward-kl: SFT. reverse-kl, js: adversarial imitation from π_SFT on. irl: a reward model, then extrapolation. spin: DPO of
    demonstrations against own samples."""
    pairs: tuple[Pairs, ...] = ("init-sft",)
    """Reward models to train, by their pairs, negative first; all are compared on the same samples. --reward reward-model distils the first."""
    preferences: Literal["data", "judge"] = "judge"
    """Where --pairs preference takes its pairs: the data set's chosen and rejected, or the judge's verdict on π_SFT's samples (an
    oracle, for reference only)."""
    reward_loss: Literal["classification", "bradley-terry"] = "classification"
    """classification: the logit is an estimate of the log density ratio, comparable across prompts. bradley-terry: pairs."""
    reward: Literal["reward-model", "log-ratio"] = "log-ratio"
    """What distil extrapolates: the first reward model, or the closed form log π_SFT(y|x) − log π_0(y|x), which needs none (on the default
    task's development prompts it ranks better)."""
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
    """best-of-n: report only, the policy is π_SFT. distil: train it on the reward's best against its worst sample."""
    samples_per_prompt: int = 6
    """Samples that distil chooses from, of spin's and the adversarial objectives' own samples."""
    beta: float = 0.1
    """Strength of the tie to π_SFT in distil, to the previous iterate in spin: DPO's β."""
    iterations: int = 2
    """spin: iterations, each on all demonstrations against new samples of the last iterate."""
    kl: float = 0.02
    """reverse-kl, js: weight of the KL to π_SFT in the policy's reward (with --whiten, against advantages of standard deviation 1)."""
    policy_steps: int = 40
    """reverse-kl, js: policy updates."""
    discriminator_updates: int = 1
    """reverse-kl, js: discriminator updates before each policy update."""
    whiten: bool = True
    """reverse-kl, js: divide advantages by the batch's standard deviation, as the discriminator's scale drifts."""
    replay: float = 0.0
    """reverse-kl, js: share of the discriminator's negatives taken from earlier steps' samples."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most in each stage; None takes all. The schedule shortens with it."""
    learning_rate: float = 5e-5
    """Peak learning rate of SFT."""
    policy_learning_rate: float = 4e-5
    """Peak learning rate of the policy after SFT: distil, spin, reverse-kl, js."""
    reward_learning_rate: float = 5e-5
    """Peak learning rate of reward models and discriminators."""
    batch_size: int = 16
    """Demonstrations, or prompts, in one optimiser step."""
    epochs: int = 2
    """Passes of SFT over the demonstrations."""
    reward_epochs: int = 1
    """Passes of a reward model over its pairs."""
    policy_epochs: int = 2
    """Passes of distil, and of each iteration of spin, over their pairs."""
    warmup_ratio: float = 0.1
    """Share of a stage's steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after the warm-up, within a stage."""
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
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling mass; below 1 the losses, which ignore it, are no longer exact."""
    sample_rows: int = 128
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice stands in args.json."""
    decoding: Literal["auto", "eager", "graphs", "compiled"] = "auto"
    """How a token's kernels are launched: one by one, as CUDA graphs, or fused by torch.compile and then as graphs; auto is graphs on CUDA."""


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
    eval_judge=None,
    eval_prompts=256,
    dev_prompts=256,
    reward="reward-model",
    reward_prompts=8192,
    samples_per_prompt=8,
    policy_learning_rate=1e-5,
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
        HH, model="llama3-8b", dataset="hh-helpful", judge="hf:weqweasdas/RM-Gemma-7B", gradient_checkpointing=True, micro_batch_tokens=8192
    ),
}


def discriminator_loss(
    positive_scores: torch.Tensor, negative_scores: torch.Tensor, kind: Literal["classification", "bradley-terry"] = "classification"
) -> torch.Tensor:
    """Loss of a discriminator or reward model on pairs, as a scalar to minimise (mean over the batch).

    `classification` is minus half of E_D[log D] + E_π[log(1 − D)], D = σ(score): its optimum's score is the log density ratio
    log d_positive(y|x) − log d_negative(y|x). `bradley-terry` is −log σ(positive − negative): a constant per prompt stays free.
    arXiv 2405.15624 v2, Sections 3 and 4.

    Args:
        positive_scores, negative_scores: (B,) logits. For bradley-terry the i-th two belong to one prompt.
    """
    if kind == "bradley-terry":
        return -F.logsigmoid(positive_scores - negative_scores).mean()
    return 0.5 * (-F.logsigmoid(positive_scores).mean() - F.logsigmoid(-negative_scores).mean())


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float) -> torch.Tensor:
    """DPO's loss, Eq. 7 of arXiv 2305.18290, a scalar to minimise; SPIN's is the same with the demonstration chosen (arXiv 2401.01335,
    Eq. 4.7 with the logistic loss). (B,) summed log-probs each. Stands in selm.py too (α = 0), on purpose: scripts import no script."""
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)  # (B,)
    return -F.logsigmoid(beta * margin).mean()


def policy_gradient_loss(logprobs, reference_logprobs, mask, advantage, kl: float) -> torch.Tensor:
    """Surrogate of the policy gradient of E[r(y)] − kl · KL(π ‖ π_SFT), the KL as reward-to-go; a scalar to minimise.

    (B, T) per-token log-probs and mask; (B,) advantage r(y) − baseline. As in nash_md.py, where Eq. 13 explains it; twice on purpose.
    """
    log_ratio = ((logprobs - reference_logprobs) * mask).detach()  # (B, T)
    to_go = log_ratio.flip(-1).cumsum(-1).flip(-1)  # (B, T) Σ_{m ≥ n} log π/π_SFT
    return -(logprobs * mask * (advantage[:, None] - kl * to_go).detach()).sum(-1).mean()


@dataclass
class Example:
    """One prompt's training example: [demonstration] for SFT, [positive, negative] for a reward model, [chosen, rejected] for DPO."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # lists of token ids
    temperature: list[float]  # of each completion: the sampling temperature for own ones, 1 for demonstrations
    reference: list[float] | None = None  # summed reference log-prob of each completion


@dataclass
class Split:
    """Prompts of one part of the data, with a demonstration each where there is one."""

    rows: list[common.Row]
    prompts: list[list[int]]  # token ids
    demonstrations: list[list[int]] | None = None  # token ids


@dataclass
class Context:
    """What every stage needs: arguments, tokenizer, judge, the run, and where a resumed one stopped."""

    args: Args
    device: torch.device
    dtype: torch.dtype
    attention: str
    tokenizer: object
    ends: list[int]
    judge: Judge
    run: Run
    state: dict | None  # the checkpoint, until the stage it belongs to has taken it

    def __post_init__(self):
        self.done: list[str] = list(self.state["done"]) if self.state else []

    def load(self, name: str, attention: str | None = None):
        """A frozen causal language model."""
        return common.load_model(str(name), self.dtype, self.device, attention or self.attention)

    def load_trainable(self, name: str):
        """A policy that starts at `name`."""
        return common.make_trainable(self.load(name), self.args.lora_rank, self.args.lora_alpha, self.args.gradient_checkpointing)

    def sample(self, name: str, model, split: Split, completions: int) -> list[list[list[int]]]:
        """Samples [prompt][completion] of `model`, kept in the run folder under `name`: a resumed run reads them."""
        file = self.run.folder / "replies" / f"{name}.json"
        if not file.exists():
            replies = self.draw(model, split.prompts, completions, common.derive_seed(self.args.seed, name), f"sampling: {name}")
            keep(file, replies)
        return json.loads(file.read_text())

    def draw(self, model, prompts, completions: int, seed: int, progress: str | None = None) -> list[list[list[int]]]:
        """Samples [prompt][completion] of `model`."""
        args, stats = self.args, {}
        with self.run.phase("sampling"):
            replies = common.sample(
                model,
                prompts,
                self.ends,
                completions=completions,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                seed=seed,
                max_rows=args.sample_rows,
                decoding=common.resolve_decoding(args.decoding, self.device),
                stats=stats,
                progress=progress,
            )
        self.run.set_apart("sampling", "decoder warm-up", stats["warmup_seconds"])
        self.run.add_tokens("sampling", stats["tokens"])
        return replies

    def save(self, stage: str, step: int, optimisers: dict, **more) -> None:
        """Checkpoint within a stage."""
        self.run.save({"done": self.done, "stage": stage, "step": step, **{k: v.state_dict() for k, v in optimisers.items()}, **more})

    def restore(self, stage: str, optimisers: dict) -> int:
        """Steps of `stage` already done; its optimisers as they were."""
        if self.state is None or self.state["stage"] != stage:
            return 0
        for key, optimiser in optimisers.items():
            optimiser.load_state_dict(self.state[key])
        step, self.state = self.state["step"], None
        return step

    def finish(self, stage: str) -> None:
        """Mark a stage as done: a resumed run takes its result from the run folder."""
        self.done.append(stage)
        self.state = None
        self.run.save({"done": self.done, "stage": None, "step": 0})


def keep(file: Path, value) -> None:
    """Write `value` as JSON; the file appears whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".new").write_text(json.dumps(value))
    file.with_suffix(".new").replace(file)


def main(args: Args) -> None:
    """Run AfD: see the numbered steps, which docs/afd.md explains."""
    check_args(args)

    # 1. Judge, data, starting model.
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    judge = load_judge(args.judge, device)
    eval_judge = load_judge(args.eval_judge, device, "--eval-judge") if args.eval_judge else None
    tokenizer = common.load_tokenizer(args.model)
    longest = args.max_prompt_length + (1 if args.objective == "forward-kl" else args.samples_per_prompt) * args.max_new_tokens
    attention = common.choose_attention(args.attention, device, longest)
    start = common.load_model(args.model, dtype, device, attention)
    rows_at_once = common.choose_sample_rows(args.sample_rows, [start, start], args.max_prompt_length + args.max_new_tokens)
    args = replace(args, sample_rows=rows_at_once)
    ends = common.end_tokens(start, tokenizer)
    del start  # every stage loads what it needs: a second's work, and a model less in memory while another trains
    train, dev, test, preferences = load_data(args, tokenizer, ends, judge)
    run = Run("afd", args, planned_steps(args, train, preferences))
    run.create()
    ctx = Context(args, device, dtype, attention, tokenizer, ends, judge, run, run.restore())

    # 2. SFT: the forward KL.
    sft_source = args.sft_model or run.folder / "sft"
    if not args.sft_model and "sft" not in ctx.done:
        policy = ctx.load_trainable(args.model)
        train_sft(ctx, policy, train)
        if args.dry_run:
            ctx.draw(policy, train.prompts[: args.batch_size], args.samples_per_prompt, args.seed)
            return run.finish_dry_run(policy)
        common.save_model(policy, tokenizer, sft_source)
        ctx.finish("sft")
        del policy
    summary = {"objective": args.objective}

    # 3. The objective: leaves the policy.
    if args.objective == "forward-kl":
        policy = ctx.load(sft_source)
    elif args.objective == "spin":
        policy = train_spin(ctx, sft_source, train)
    elif args.objective in ("reverse-kl", "js"):
        policy = train_adversarial(ctx, sft_source, train)
    else:
        policy, report = inverse_rl(ctx, sft_source, train, dev, test, preferences)
        summary |= report

    # 4. Compare with the starting model on held-out prompts; save.
    start = ctx.load(args.model)
    with run.phase("evaluation"):
        summary |= evaluate(run, policy, start, tokenizer, ends, test.rows, test.prompts, judge, eval_judge)
    write_model(run, policy, tokenizer, summary)
    curves = [name for row in run.metrics for name in row if name.endswith(("loss", "accuracy", "score", "kl", "length"))]
    run.finish(summary, tuple(dict.fromkeys(curves)))


# --- reward models -----------------------------------------------------------------------------


def load_reward_model(source: str, fresh: bool, dtype, device, attention: str):
    """A sequence classifier with one label and no dropout; `fresh` puts a zero head on a causal language model's weights.

    The head is in float32: in bfloat16 the rewards of a prompt's samples would tie. A finished one is a Hugging Face folder.
    """
    folder = common.model_source(source)
    level = transformers.logging.get_verbosity()
    with common.hub_errors("--model" if fresh else "--reward-model", source):
        config = common.without_dropout(folder)
        config.num_labels = 1
        transformers.logging.set_verbosity_error()  # no report that the new head is not in the checkpoint
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation=attention
            )
        finally:
            transformers.logging.set_verbosity(level)
    model.score.float()
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model.to(device).eval().requires_grad_(False)


def trainable_reward_model(model, args):
    """All weights but the embeddings trainable, or a LoRA adapter and the head."""
    if args.lora_rank == 0:
        model = common.make_trainable(model, 0, 0, args.gradient_checkpointing)
        model.get_input_embeddings().requires_grad_(False)
        return model
    return common.make_trainable(model, args.lora_rank, args.lora_alpha, args.gradient_checkpointing, task="SEQ_CLS")


def reward_scores(model, data: common.Batch) -> torch.Tensor:
    """(G, K) scalars, float32, differentiable, of replies as `collate_read` lays them out."""
    hidden = common.completion_hidden(model, data)  # (G, K, T, D)
    last = (data.mask.sum(-1).long() - 1).clamp(min=0)  # (G, K): this position has seen every token but the placeholder
    states = hidden.gather(2, last[:, :, None, None].expand(-1, -1, 1, hidden.shape[-1]))[:, :, 0]  # (G, K, D)
    return common.base_model(model).score(states.float())[..., 0]


def as_read(completion: list[int], ends: list[int], hide_end: bool) -> list[int]:
    """A completion as a reward model reads it: without its end, if hidden."""
    return completion[:-1] if hide_end and completion and completion[-1] in ends else completion


def pair_as_read(positive: list[int], negative: list[int], args, ends: list[int]) -> list[list[int]]:
    """[positive, negative] as a reward model is trained on them; with --match-lengths both at the length of the shorter."""
    pair = [as_read(completion, ends, args.hide_end) for completion in (positive, negative)]
    return [completion[: min(map(len, pair))] for completion in pair] if args.match_lengths else pair


def collate_read(prompts: list[list[int]], groups: list[list[list[int]]], device) -> common.Batch:
    """`common.collate` of completions closed by a placeholder, which is never fed: the position that predicts it has read all else."""
    return common.collate(prompts, [[[*completion, 0] for completion in group] for group in groups], device)


@torch.no_grad()
def rewards_of(ctx: Context, model, prompts: list[list[int]], groups: list[list[list[int]]], progress: str | None = None) -> torch.Tensor:
    """(G, M) rewards of M completions to each of G prompts."""
    read = [[as_read(completion, ctx.ends, ctx.args.hide_end) for completion in group] for group in groups]
    result = torch.zeros(len(prompts), len(groups[0]))
    parts = common.micro_batches(prompts, read, 4 * ctx.args.micro_batch_tokens)
    for part in tqdm(parts, desc=progress, leave=False, disable=progress is None):
        data = collate_read([prompts[i] for i in part], [read[i] for i in part], ctx.device)
        result[part] = reward_scores(model, data).cpu()
    return result


def log_ratios(ctx: Context, sft, start, prompts, groups, progress: str | None = None) -> torch.Tensor:
    """(G, M) log π_SFT(y|x) − log π_0(y|x), at the sampling temperature."""
    sums = [
        common.sequence_logprobs(model, prompts, groups, ctx.args.temperature, ctx.device, 4 * ctx.args.micro_batch_tokens, progress)
        for model in (sft, start)
    ]
    return torch.tensor(sums[0]) - torch.tensor(sums[1])


# --- stages --------------------------------------------------------------------------------------


@contextlib.contextmanager
def sealed(judge: Judge):
    """Context in which asking the judge is an error: no training path may learn from it."""

    def refuse(*_):
        raise AssertionError("a training path asked the judge")

    kept = judge.preference, judge.score
    judge.preference, judge.score = refuse, refuse
    try:
        yield
    finally:
        judge.preference, judge.score = kept


def train_stage(
    ctx: Context, stage: str, model, examples: list[Example], epochs: int, learning_rate: float, loss_of, collate=common.collate
) -> None:
    """Train `model` on `examples`: loss_of(groups, batch) gives each micro-batch's mean loss and what else to log."""
    args, run = ctx.args, ctx.run
    optimiser = optimization.make_optimiser(model, args.optimizer_states, args.weight_decay)
    batches = plan_batches(args, stage, len(examples), epochs)
    for index in range(ctx.restore(stage, {"optimiser": optimiser}), len(batches)):
        batch, step, total = [examples[i] for i in batches[index]], len(run.metrics) + 1, {}
        now = optimization.learning_rate_at(index, len(batches), learning_rate, args.warmup_ratio, args.schedule)
        with run.phase("training"), sealed(ctx.judge):
            for part in common.micro_batches([e.prompt for e in batch], [e.completions for e in batch], args.micro_batch_tokens):
                groups = [batch[i] for i in part]
                data = collate([e.prompt for e in groups], [e.completions for e in groups], ctx.device)
                loss, measured = loss_of(groups, data)
                run.stop_unless_finite(step, loss.item(), [e.row_id for e in groups])
                (loss * len(groups) / len(batch)).backward()
                run.add_batch("training", data)
                for name, value in {"loss": loss.detach(), **measured}.items():
                    total[name] = total.get(name, 0.0) + float(value) * len(groups) / len(batch)
        with run.phase("update"):  # not within the other: memory freed by the pass is handed back here
            total["grad_norm"] = optimiser.step(now, args.max_grad_norm)
        row = {f"{stage}/{name}": value for name, value in total.items()} | {f"{stage}/learning_rate": now, **run.throughput()}
        run.log(step, row, show=(f"{stage}/loss", f"{stage}/accuracy"))
        if args.save_every and step % args.save_every == 0 and index + 1 < len(batches):
            ctx.save(stage, index + 1, {"optimiser": optimiser})
    optimiser.release()


def plan_batches(args: Args, stage: str, examples: int, epochs: int) -> list[list[int]]:
    """Indices of every optimiser step of a stage: each epoch in an order of its own, `--max-steps` at most."""
    batches = []
    for epoch in range(epochs):
        order = list(range(examples))
        random.Random(common.derive_seed(args.seed, "order", stage, epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, examples, args.batch_size)]
    return batches[: args.max_steps]


def train_sft(ctx: Context, policy, train: Split) -> None:
    """Forward KL: minus the demonstration's log-prob, answer tokens only, in nats per reply."""
    examples = [Example(r.id, p, [d], [1.0]) for r, p, d in zip(train.rows, train.prompts, train.demonstrations, strict=True)]

    def loss_of(groups, data):
        logprobs = common.completion_logprobs(policy, data)  # (G, 1, T)
        return -logprobs.sum((1, 2)).mean(), {"loss_per_token": -logprobs.detach().sum() / data.mask.sum()}

    train_stage(ctx, "sft", policy, examples, ctx.args.epochs, ctx.args.learning_rate, loss_of)


def train_dpo(ctx: Context, stage: str, policy, examples: list[Example], epochs: int) -> None:
    """DPO on [chosen, rejected], the reference being the policy as it is when this begins (or began, if resumed)."""
    args = ctx.args
    file = ctx.run.folder / "replies" / f"{stage}-pairs.json"
    if not file.exists():
        with ctx.run.phase("reference"):
            columns = [[e.prompt for e in examples], [e.completions for e in examples], [e.temperature for e in examples]]
            sums = common.sequence_logprobs(policy, *columns, ctx.device, 4 * args.micro_batch_tokens, f"{stage}: reference log-probs")
        keep(file, [asdict(replace(example, reference=row)) for example, row in zip(examples, sums, strict=True)])
    examples = [Example(**fields) for fields in json.loads(file.read_text())]  # a resumed run trains on the very same pairs

    def loss_of(groups, data):
        heat = common.pad_rows([e.temperature for e in groups], 1.0, ctx.device)  # (G, 2)
        reference = common.pad_rows([e.reference for e in groups], 0.0, ctx.device)  # (G, 2)
        sums = common.completion_logprobs(policy, data, heat).sum(-1)  # (G, 2)
        loss = dpo_loss(sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1], args.beta)
        ratio = (sums - reference).detach()
        return loss, {"accuracy": (ratio[:, 0] > ratio[:, 1]).float().mean(), "margin": args.beta * (ratio[:, 0] - ratio[:, 1]).mean()}

    train_stage(ctx, stage, policy, examples, epochs, args.policy_learning_rate, loss_of)


def train_spin(ctx: Context, sft_source, train: Split):
    """SPIN: in each iteration DPO of demonstrations against the last iterate's samples. Returns the policy."""
    args, source = ctx.args, sft_source
    for iteration in range(1, args.iterations + 1):
        stage, folder = f"spin-{iteration}", ctx.run.folder / f"spin-{iteration}"
        if stage not in ctx.done:
            policy = ctx.load_trainable(source)
            own = ctx.sample(stage, policy, train, 1)
            columns = zip(train.rows, train.prompts, train.demonstrations, own, strict=True)
            examples = [Example(row.id, p, [d, y[0]], [1.0, args.temperature]) for row, p, d, y in columns]
            train_dpo(ctx, stage, policy, examples, args.policy_epochs)
            common.save_model(policy, ctx.tokenizer, folder)
            ctx.finish(stage)
            del policy
        source = folder
    return ctx.load(source)


def train_adversarial(ctx: Context, sft_source, train: Split):
    """Reverse KL and JS: discriminator on (demonstration, own sample) and policy gradient on its reward, in turn. Returns the policy."""
    args, run, judge = ctx.args, ctx.run, ctx.judge
    policy = ctx.load_trainable(sft_source)
    reference = common.starting_model(policy, str(sft_source), ctx.dtype, ctx.device, ctx.attention)
    source = args.model if args.reward_init == "start" else str(sft_source)
    discriminator = trainable_reward_model(load_reward_model(source, True, ctx.dtype, ctx.device, ctx.attention), args)
    optimisers = {
        name: optimization.make_optimiser(model, args.optimizer_states, args.weight_decay)
        for name, model in (("policy", policy), ("discriminator", discriminator))
    }
    earlier: list[tuple[int, list[list[int]]]] = ctx.state["replay"] if ctx.state and ctx.state["stage"] == "adversarial" else []
    steps = min(args.policy_steps, args.max_steps or args.policy_steps)
    for index in range(ctx.restore("adversarial", optimisers), steps):
        seed, step, K = common.derive_seed(args.seed, "adversarial", index), len(run.metrics) + 1, args.samples_per_prompt
        rng = random.Random(seed)
        chosen = rng.sample(range(len(train.prompts)), min(args.batch_size, len(train.prompts)))
        prompts = [train.prompts[i] for i in chosen]
        own = ctx.draw(policy, prompts, K, seed)  # [G][K]
        share = optimization.learning_rate_at(index, steps, 1.0, args.warmup_ratio, args.schedule)
        with run.phase("training"), sealed(judge):
            # Discriminator: maximise E_D[log D] + E_π[log(1 − D)], some of the negatives from earlier policies.
            current = list(zip(chosen, own, strict=True))
            metrics = {}
            for _ in range(args.discriminator_updates):
                old = rng.sample(earlier, min(len(earlier), round(args.replay * len(current))))
                metrics |= update_discriminator(
                    ctx, discriminator, optimisers["discriminator"], current[len(old) :] + old, train, share, step
                )
            earlier = (earlier + current)[-32 * args.batch_size :] if args.replay else []

            # Its logit is the estimated log density ratio: the reverse KL's reward; −log(1 − D), the JS's, is its softplus.
            logits = rewards_of(ctx, discriminator, prompts, own)  # (G, K)
            reward = F.softplus(logits) if args.objective == "js" else logits
            others = reward if K > 1 else reward.expand(-1, len(prompts)).T  # baseline: the prompt's other samples, or the batch's
            advantage = reward - (others.sum(1, keepdim=True) - reward) / max(1, others.shape[1] - 1)
            if args.whiten:
                advantage = advantage / (advantage.std() + 1e-6)
            metrics |= update_policy(ctx, policy, reference, optimisers["policy"], train, chosen, own, advantage, share, step)
        metrics |= {"reward": reward.mean().item(), "reward_std": reward.std(1).mean().item() if K > 1 else 0.0}
        if judge.score is not None:  # to look at; nothing learns from it
            texts = [common.decode(ctx.tokenizer, y) for group in own for y in group]
            metrics["score"] = judge.score([train.rows[i].prompt for i in chosen for _ in range(K)], texts).mean().item()
        run.log(step, {f"adversarial/{k}": v for k, v in metrics.items()} | run.throughput(), show=("adversarial/score", "adversarial/kl"))
        if args.save_every and step % args.save_every == 0 and index + 1 < steps:
            ctx.save("adversarial", index + 1, optimisers, replay=earlier)
    for optimiser in optimisers.values():
        optimiser.release()
    return policy


def update_discriminator(
    ctx, discriminator, optimiser, groups: list[tuple[int, list[list[int]]]], train: Split, share: float, step: int
) -> dict:
    """One update on (prompt index, own samples) groups: each sample against the prompt's demonstration."""
    args, total = ctx.args, {}
    prompts = [train.prompts[i] for i, _ in groups]
    read = [[c for y in own for c in pair_as_read(train.demonstrations[i], y, args, ctx.ends)] for i, own in groups]
    for part in common.micro_batches(prompts, read, args.micro_batch_tokens):
        data = collate_read([prompts[i] for i in part], [read[i] for i in part], ctx.device)
        scores = reward_scores(discriminator, data)  # (G, 2K)
        positive, negative = scores[:, ::2].flatten(), scores[:, 1::2].flatten()
        loss = discriminator_loss(positive, negative, args.reward_loss)
        ctx.run.stop_unless_finite(step, loss.item(), [train.rows[groups[i][0]].id for i in part])
        (loss * len(part) / len(groups)).backward()
        for name, value in {"discriminator_loss": loss.detach(), "discriminator_accuracy": share_right(positive, negative)}.items():
            total[name] = total.get(name, 0.0) + float(value) * len(part) / len(groups)
    optimiser.step(args.reward_learning_rate * share, args.max_grad_norm)
    return total


def update_policy(ctx, policy, reference, optimiser, train: Split, chosen, own, advantage: torch.Tensor, share: float, step: int) -> dict:
    """One policy-gradient update on G prompts' K samples and their (G, K) advantages."""
    args, total = ctx.args, {}
    prompts = [train.prompts[i] for i in chosen]
    for part in common.micro_batches(prompts, own, args.micro_batch_tokens):
        data = common.collate([prompts[i] for i in part], [own[i] for i in part], ctx.device)
        with torch.no_grad():
            reference_logprobs = common.completion_logprobs(reference, data, args.temperature)  # (G, K, T)
        logprobs, entropy = common.completion_logprobs(policy, data, args.temperature, entropy=True)  # (G, K, T)
        rows = [x.flatten(0, 1) for x in (logprobs, reference_logprobs, data.mask, advantage[part].to(ctx.device))]  # (G*K, …)
        loss = policy_gradient_loss(*rows, args.kl)
        ctx.run.stop_unless_finite(step, loss.item(), [train.rows[chosen[i]].id for i in part])
        (loss * len(part) / len(chosen)).backward()
        ctx.run.add_batch("training", data)
        measured = {
            "kl": (logprobs.detach() - reference_logprobs).sum(-1).mean(),  # unbiased estimate of KL(π ‖ π_SFT), nats per reply
            "entropy": entropy.sum() / data.mask.sum(),
            "length": data.mask.sum(-1).mean(),
        }
        for name, value in measured.items():
            total[name] = total.get(name, 0.0) + float(value) * len(part) / len(chosen)
    total["grad_norm"] = optimiser.step(args.policy_learning_rate * share, args.max_grad_norm)
    return total


# --- inverse RL ----------------------------------------------------------------------------------


def inverse_rl(ctx: Context, sft_source, train: Split, dev: Split, test: Split, preferences: list[Example]):
    """Reward models from pairs, their Best-of-N report, and the policy that extrapolates. Returns policy and what to add to the summary."""
    args, run = ctx.args, ctx.run
    part = Split(*(column[: args.reward_prompts] for column in (train.rows, train.prompts, train.demonstrations)))
    M = args.max_n + 1  # one more than the largest subset: the opponent outside it
    kinds = () if args.reward_model else args.pairs
    oracle = "preference" in kinds and args.preferences == "judge"

    # 3a. Samples: to learn from and distil (training prompts), to choose with (development), to report (test).
    splits = {"test": test, "dev": dev}
    start, sft = ctx.load(args.model), ctx.load(sft_source)
    extra = args.samples_per_prompt if args.extrapolate == "distil" or oracle else 0
    own = ctx.sample("train-sft", sft, part, args.reward_samples + extra)
    learn_from = [group[: args.reward_samples] for group in own]
    distil_from = [group[args.reward_samples :] for group in own]  # only the oracle's training has seen these
    init = ctx.sample("train-init", start, part, args.reward_samples) if kinds else None
    samples = {name: ctx.sample(f"{name}-sft", sft, split, M) for name, split in splits.items()}
    dev_init = ctx.sample("dev-init", start, dev, args.reward_samples)
    del start, sft

    # 3b. Reward models.
    rewards = {}  # name: (folder, how its pairs were built)
    if args.reward_model:
        kind = Path(args.reward_model).name.removeprefix("reward-")
        rewards[f"reward model, given ({kind})"] = (args.reward_model, kind)
    for kind in kinds:
        stage = f"reward-{kind}"
        rewards[f"reward model, {kind}" + (" (oracle)" if oracle and kind == "preference" else "")] = (run.folder / stage, kind)
        if stage not in ctx.done:
            if kind == "preference" and args.preferences == "data":
                pairs = preferences
            else:
                pairs = reward_pairs(ctx, kind, part, own if kind == "preference" else learn_from, init)
            source = args.model if args.reward_init == "start" else str(sft_source)
            model = trainable_reward_model(load_reward_model(source, True, ctx.dtype, ctx.device, ctx.attention), args)
            train_reward_model(ctx, stage, model, pairs, len(part.prompts) * args.reward_samples)
            common.save_model(model, ctx.tokenizer, run.folder / stage)
            ctx.finish(stage)
            del model

    # 3c. Every reward scores the same samples; the judge tells how good its choices are.
    rankers, to_distil = {}, None
    held_out = preference_examples(args, ctx.tokenizer, ctx.ends, test)
    longest = args.max_prompt_length + M * args.max_new_tokens  # a prompt with all its replies is one row
    attention = common.choose_attention(args.attention, ctx.device, longest)
    for name, (folder, kind) in {**rewards, "log-ratio": (None, "init-sft")}.items():
        with run.phase("scoring"):
            if folder is None:
                score = partial(log_ratios, ctx, ctx.load(sft_source, attention), ctx.load(args.model, attention))
            else:
                score = partial(rewards_of, ctx, load_reward_model(str(folder), False, ctx.dtype, ctx.device, attention))
            ranker = {split: score(splits[split].prompts, replies, progress=f"{name}: {split}") for split, replies in samples.items()}
            if kind == "preference" and args.preferences == "data":
                ranker["separability"] = accuracy(score, held_out)
            elif kind in get_args(Pairs):
                ranker["separability"] = accuracy(score, reward_pairs(ctx, kind, dev, samples["dev"], dev_init))
            ranker["preference_accuracy"] = accuracy(score, held_out)
            if args.extrapolate == "distil" and to_distil is None and (args.reward == "reward-model") == (folder is not None):
                to_distil, distilled = score(part.prompts, distil_from, progress=f"{name}: training prompts"), name
            rankers[name] = ranker
            del score
    texts = {name: [[common.decode(ctx.tokenizer, y) for y in group] for group in replies] for name, replies in samples.items()}
    lengths = {name: torch.tensor([[float(len(y)) for y in group] for group in replies]) for name, replies in samples.items()}
    report = compare_rankers(
        rankers, {name: [row.prompt for row in split.rows] for name, split in splits.items()}, texts, lengths, ctx.judge
    )
    # Preferences are more than demonstrations: of the rewards learned without them, the one the development prompts favour is reported.
    own_rewards = {name: report["rankers"][name] for name in rankers if "preference" not in name}
    favoured = max(own_rewards, key=lambda name: own_rewards[name]["dev"]["win_rate"][-1])
    write_report(report | {"favoured_on_dev": favoured}, run.folder)
    best = own_rewards[favoured]
    summary = {
        "sft_score": best["score"][0],
        "best_of_n": {
            "n": args.max_n,
            "favoured_on_dev": favoured,
            "score": best["score"][-1],
            "win_rate": best["win_rate"][-1],
            "win_rate_interval": [best["win_rate_low"][-1], best["win_rate_high"][-1]],
        },
    }

    # 3d. Extrapolate: at serving time by Best-of-N, or now, by DPO of the reward's best against its worst.
    if args.extrapolate == "best-of-n":
        return ctx.load(sft_source), summary
    policy = ctx.load_trainable(sft_source)
    best, worst = to_distil.argmax(1).tolist(), to_distil.argmin(1).tolist()
    examples = [
        Example(row.id, prompt, [group[b], group[w]], [args.temperature] * 2)
        for row, prompt, group, b, w in zip(part.rows, part.prompts, distil_from, best, worst, strict=True)
        if group[b] != group[w]
    ]
    require(bool(examples), f"distil: every sample of a prompt is the same, on all {len(part.prompts)} prompts. Nothing to learn from.")
    run.fewer_steps(stage_steps(args, len(part.prompts), args.policy_epochs) - stage_steps(args, len(examples), args.policy_epochs))
    train_dpo(ctx, "distil", policy, examples, args.policy_epochs)
    equal = min(args.samples_per_prompt, args.max_n)  # what Best-of-N gets with as many samples as distil chose from
    curve = report["rankers"][distilled]["score"]
    summary["distil"] = {"reward": distilled, "samples_per_prompt": args.samples_per_prompt, f"best_of_{equal}_score": curve[equal - 1]}
    return policy, summary


def reward_pairs(ctx: Context, kind: Pairs, split: Split, own, init) -> list[Example]:
    """[positive, negative] pairs as a reward model reads them: `own` and `init` are π_SFT's and π_0's samples, [prompt][sample]."""
    pairs = []
    if kind == "preference":  # the judge's own verdict on π_SFT's samples: an oracle
        asked, texts = [row.prompt for row in split.rows], [[common.decode(ctx.tokenizer, y) for y in group] for group in own]
        for i, matrix in enumerate(preference_matrix(ctx.judge, asked, texts)):
            wins = matrix.sum(1)  # (M,)
            if wins.max() > wins.min():
                pairs.append((i, own[i][int(wins.argmax())], own[i][int(wins.argmin())]))
    else:
        for i, demonstration in enumerate(split.demonstrations):
            sides = {"init": init[i], "sft": own[i], "demo": [demonstration] * len(init[i])}
            negative, positive = (sides[side] for side in kind.split("-"))
            pairs += [(i, y, y_) for y, y_ in zip(positive, negative, strict=False)]
    read = [(i, pair_as_read(positive, negative, ctx.args, ctx.ends)) for i, positive, negative in pairs]
    return [Example(split.rows[i].id, split.prompts[i], pair, [1.0, 1.0]) for i, pair in read if pair[0] != pair[1]]


def train_reward_model(ctx: Context, stage: str, model, pairs: list[Example], planned: int) -> None:
    """The reward model's `discriminator_loss` on its pairs, of which the progress bar expected `planned`."""
    args = ctx.args
    require(bool(pairs), f"{stage}: no pair to learn from: both sides read the same, or the judge ties them all.")
    ctx.run.fewer_steps(stage_steps(args, planned, args.reward_epochs) - stage_steps(args, len(pairs), args.reward_epochs))

    def loss_of(groups, data):
        scores = reward_scores(model, data)  # (G, 2)
        right = share_right(scores[:, 0], scores[:, 1])
        return discriminator_loss(scores[:, 0], scores[:, 1], args.reward_loss), {"accuracy": right}

    train_stage(ctx, stage, model, pairs, args.reward_epochs, args.reward_learning_rate, loss_of, collate_read)


def accuracy(score, pairs: list[Example]) -> float | None:
    """Share of held-out pairs whose positive scores higher."""
    scores = score([e.prompt for e in pairs], [e.completions for e in pairs]) if pairs else torch.zeros(0, 2)  # (B, 2)
    return share_right(scores[:, 0], scores[:, 1]).item() if pairs else None


def share_right(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Share of pairs whose positive scores higher, ties ½."""
    return ((positive > negative).float() + 0.5 * (positive == negative).float()).mean()


# --- arguments and data --------------------------------------------------------------------------


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    for name in ("epochs", "reward_epochs", "policy_epochs", "reward_prompts", "reward_samples", "max_n", "dev_prompts", "iterations"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    for name in ("policy_steps", "discriminator_updates", "samples_per_prompt"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    for name in ("learning_rate", "policy_learning_rate", "reward_learning_rate", "beta"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}.")
    require(args.temperature > 0, "--temperature 0 (greedy): every sample of a prompt would be the same text.")
    require(0 <= args.replay < 1, f"--replay must lie in [0, 1), got {args.replay}.")
    require(args.kl >= 0, f"--kl must not be negative, got {args.kl}.")
    require(args.num_prompts is None or args.num_prompts >= 1, f"--num-prompts must be at least 1, got {args.num_prompts}.")
    require(len(set(args.pairs)) == len(args.pairs), f"--pairs {' '.join(args.pairs)}: each construction once.")
    if args.objective == "irl":
        least = 2 if args.extrapolate == "distil" else 1
        require(args.samples_per_prompt >= least, "--samples-per-prompt must be at least 2: distil needs a best and a worst.")
        require(
            args.pairs or args.reward_model or args.reward == "log-ratio",
            "--pairs names no reward model to train: give one, or --reward log-ratio.",
        )
    require(
        args.objective != "js" or args.reward_loss == "classification",
        "--objective js needs --reward-loss classification: its reward −log(1 − D) is no density ratio's when a constant per prompt is free.",
    )
    if args.reward_model and args.objective == "irl" and args.extrapolate == "distil":
        require(
            args.reward == "reward-model",
            f"--reward-model {args.reward_model} is given, but --reward {args.reward} is what distil extrapolates. Add --reward reward-model, "
            "or --extrapolate best-of-n to compare only.",
        )
    if args.objective in ("reverse-kl", "js"):
        require(
            args.batch_size * args.samples_per_prompt > 1,
            "--batch-size 1 with --samples-per-prompt 1 leaves no other sample for a baseline.",
        )
    check_folder("--sft-model", args.sft_model, "ForCausalLM", "LMHeadModel")
    check_folder("--reward-model", args.reward_model, "ForSequenceClassification")


def check_folder(flag: str, folder: str | None, *endings: str) -> None:
    """Refuse a local folder that is not a model of the kind `flag` needs. A hub id is taken as it is."""
    if folder is None or (not Path(folder).exists() and folder.count("/") == 1 and not folder.startswith((".", "/", "~"))):
        return
    file = Path(folder) / "config.json"
    require(file.is_file(), f"{flag} {folder}: no such folder, or no config.json in it.")
    made = (json.loads(file.read_text()).get("architectures") or ["unknown"])[0]
    require(made.endswith(endings), f"{flag} {folder}: holds a {made}; a model whose name ends in {' or '.join(endings)} is needed.")


def load_data(args: Args, tokenizer, ends: list[int], judge: Judge) -> tuple[Split, Split, Split, list[Example]]:
    """Training, development and test splits, and the data set's own preference pairs where --pairs asks for them.

    Raises `UserError` where demonstrations or preferences are missing, or a held-out prompt is among the demonstrations'.
    """
    from_file = args.demonstrations.endswith((".jsonl", ".jsonl.gz", ".parquet"))
    wants_preferences = args.objective == "irl" and not args.reward_model and "preference" in args.pairs and args.preferences == "data"
    columns = () if from_file else ("response",)
    train_rows, test_rows = common.load_rows(args.dataset, columns, args.eval_prompts, "response" if from_file else args.demonstrations)
    rows = common.load_file(args.demonstrations, ("response",), "--demonstrations") if from_file else train_rows
    if from_file:
        held_out = {bare(row.prompt) for row in test_rows}
        leaked = [row.id for row in rows if bare(row.prompt) in held_out]
        require(
            not leaked,
            f"--demonstrations {args.demonstrations}: {len(leaked)} of its prompts are held out for evaluation ({', '.join(leaked[:3])}). "
            f"Remove them, or hold out others with another --dataset or --eval-prompts.",
        )
    count = None if args.num_prompts is None else args.num_prompts + args.dev_prompts
    rows = select_demonstrations(args, rows, judge, count)
    rows, prompts = common.encode_rows(tokenizer, rows, args.max_prompt_length, count, args.seed, "demonstrations")
    require(len(rows) > args.dev_prompts, f"{len(rows)} demonstrations: --dev-prompts {args.dev_prompts} leaves none to learn from.")
    end = common.turn_end(tokenizer, ends)
    answers = [common.encode_response(tokenizer, row.prompt, row.response, end, args.max_new_tokens) for row in rows]
    dev, train = (Split(rows[part], prompts[part], answers[part]) for part in (slice(args.dev_prompts), slice(args.dev_prompts, None)))
    test = Split(*common.encode_rows(tokenizer, test_rows, args.max_prompt_length, args.eval_prompts, 0, "held-out prompts"))
    preferences = []
    if wants_preferences:
        aside = {bare(row.prompt) for row in dev.rows}
        pairs = [row for row in train_rows if row.chosen and row.rejected and row.chosen != row.rejected and bare(row.prompt) not in aside]
        require(
            bool(pairs),
            f"--pairs preference: --dataset {args.dataset} has no chosen and rejected responses. Give one that has, or --preferences judge (an oracle).",
        )
        pairs, pair_prompts = common.encode_rows(
            tokenizer, pairs, args.max_prompt_length, args.reward_prompts * args.reward_samples, args.seed, "preferences"
        )
        preferences = preference_examples(args, tokenizer, ends, Split(pairs, pair_prompts))
    return train, dev, test, preferences


def bare(prompt: common.Prompt) -> str:
    """A prompt's text however it is written: messages, plain text, or HH-RLHF's dialogue with or without the last "Assistant:"."""
    if isinstance(prompt, str) and prompt.startswith("\n\nHuman:"):
        prompt = [message for message in common.parse_dialogue(prompt) if message["content"]]
    return common.prompt_text(prompt).strip()


def select_demonstrations(args: Args, rows: list[common.Row], judge: Judge, count: int | None) -> list[common.Row]:
    """Rows whose demonstration the judge scores at least --min-demonstration-score, in an order fixed by the seed: a few more than `count`."""
    if args.min_demonstration_score is None:
        return rows
    require(
        judge.score is not None,
        f"--min-demonstration-score needs a judge with a scalar score; {judge.name} has none. Give None to keep all.",
    )
    rows, kept, seen = list(rows), [], 0
    random.Random(args.seed).shuffle(rows)
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        scores = judge.score([row.prompt for row in part], [row.response for row in part])
        kept += [row for row, score in zip(part, scores.tolist(), strict=True) if score >= args.min_demonstration_score]
        seen += len(part)
        if count is not None and len(kept) >= 1.25 * count + 16:  # some will be too long, or share a prompt
            break
    print(f"demonstrations: {len(kept):,} of {seen:,} score at least {args.min_demonstration_score} by the judge {judge.name}")
    require(bool(kept), f"--min-demonstration-score {args.min_demonstration_score}: no demonstration scores that much; lower it, or None.")
    return kept


def preference_examples(args: Args, tokenizer, ends: list[int], split: Split) -> list[Example]:
    """The data set's [chosen, rejected] of every row that has both, as a reward model reads them."""
    end, examples = common.turn_end(tokenizer, ends), []
    for row, prompt in zip(split.rows, split.prompts, strict=True):
        if row.chosen is not None and row.rejected is not None:
            sides = [common.encode_response(tokenizer, row.prompt, text, end, args.max_new_tokens) for text in (row.chosen, row.rejected)]
            read = pair_as_read(*sides, args, ends)
            if read[0] != read[1]:
                examples.append(Example(row.id, prompt, read, [1.0, 1.0]))
    return examples


def stage_steps(args: Args, examples: int, epochs: int) -> int:
    """Optimiser steps of a stage."""
    steps = epochs * -(-examples // args.batch_size)
    return min(steps, args.max_steps or steps)


def planned_steps(args: Args, train: Split, preferences: list[Example]) -> int:
    """Optimiser steps of all stages, for the progress bar."""
    n = len(train.prompts)
    steps = 0 if args.sft_model else stage_steps(args, n, args.epochs)
    if args.objective == "spin":
        steps += args.iterations * stage_steps(args, n, args.policy_epochs)
    elif args.objective in ("reverse-kl", "js"):
        steps += min(args.policy_steps, args.max_steps or args.policy_steps)
    elif args.objective == "irl":
        part = min(n, args.reward_prompts)
        if not args.reward_model:
            steps += len(args.pairs) * stage_steps(args, part * args.reward_samples, args.reward_epochs)
        if args.extrapolate == "distil":
            steps += stage_steps(args, part, args.policy_epochs)
    return steps


if __name__ == "__main__":
    command_line(main, RECIPES)
