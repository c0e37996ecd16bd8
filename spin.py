"""SPIN, self-play fine-tuning: DPO of demonstrations against the last iterate's own samples. arXiv
2401.01335.

The idea: a model that can tell its own answers from a demonstrator's has something left to learn. Each
iteration raises the demonstration and lowers the answer that the previous iterate gave, until the two cannot
be told apart.

Departures from the paper:
 1. It starts at π_SFT, fine-tuned here on the same demonstrations (--sft-model gives a finished one).
 2. Samples of an iteration come from the last iterate alone; the paper also keeps those of the iteration
    before.
 3. AdamW in place of RMSProp.
 4. The paper's UltraChat demonstrations are not a named set here: give them with --demonstrations FILE.
 5. The smollm2-135m recipe is ours, chosen for two CPU cores.

Examples:
    python spin.py                                                 # upbeat human replies; minutes on a laptop
    python spin.py --model gemma-2b --demonstrations gpt4.jsonl    # on one GPU
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F

import common
from cleanalign.errors import require
from cleanalign.models import check_folder, save_model
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
    set_up_stages,
    stage_steps,
    train_stage,
    with_reference,
)


@dataclass
class Args(RunArgs):
    """SPIN: Self-Play Fine-Tuning (arXiv 2401.01335).

    python spin.py     learns on a laptop in minutes, needs no GPU and no model hub

    python spin.py --model gemma-2b --demonstrations gpt4.jsonl   on one GPU

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
    """Held-out prompts of the final comparison with the starting model."""

    # algorithm
    beta: float = 0.1
    """Strength of the tie to the previous iterate, in Eq. 4.7's λ."""
    iterations: int = 2
    """Iterations, each on all demonstrations against new samples of the last iterate."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most in each stage; None takes all. The schedule shortens with it."""
    learning_rate: float = 5e-5
    """Peak learning rate of SFT."""
    policy_learning_rate: float = 4e-5
    """Peak learning rate of SPIN's iterations."""
    batch_size: int = 16
    """Demonstrations, or prompts, in one optimiser step."""
    epochs: int = 2
    """Passes of SFT over the demonstrations."""
    policy_epochs: int = 2
    """Passes of each iteration over its pairs."""
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
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice
    stands in args.json."""

    def holds(self) -> Holds:
        """Beside the policy nothing: the reference's log-probs are taken before an iteration trains. A row
        holds two replies."""
        return Holds(reference=False, completions=2, models=self.iterations + 2)

    def for_all_weights(self) -> Args:
        """A recipe of an adapter with --lora-rank 0: learning rates for all weights, the paper's of SPIN."""
        return replace(self, lora_rank=0, learning_rate=1e-5, policy_learning_rate=5e-7)


HH = Args(  # the task of afd.py's recipes: Anthropic's HH-RLHF
    model="gemma-2b",
    dataset="hh-harmless",
    demonstrations="chosen",
    min_demonstration_score=None,
    num_prompts=None,
    max_prompt_length=512,
    max_new_tokens=128,
    top_p=0.95,
    judge="hf:Ray2333/gpt2-large-harmless-reward_model",
    eval_judge="hf:OpenAssistant/reward-model-deberta-v3-large-v2",
    eval_prompts=256,
    policy_learning_rate=1.5e-5,
    lora_rank=32,
    learning_rate=5e-5,
    micro_batch_tokens=16_384,
    save_every=500,
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
    for name in ("epochs", "policy_epochs", "iterations"):
        require(
            getattr(args, name) >= 1,
            f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.",
        )
    for name in ("learning_rate", "policy_learning_rate", "beta"):
        require(
            getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}."
        )
    require(args.temperature > 0, "--temperature 0 (greedy): SPIN plays against samples of the last iterate.")
    check_folder("--sft-model", args.sft_model, "ForCausalLM", "LMHeadModel")


def spin_loss(policy_demonstration, policy_sample, reference_demonstration, reference_sample, beta: float):
    """SPIN's loss, Eq. 4.7 of arXiv 2401.01335 with the logistic loss ℓ(t) = log(1 + e^−t), a scalar to
    minimise.

    (B,) summed log-probs in nats of the demonstration and of the previous iterate's sample, under the policy
    and that iterate.
    """
    margin = (policy_demonstration - reference_demonstration) - (policy_sample - reference_sample)  # (B,)
    return -F.logsigmoid(beta * margin).mean()


def train_sft(exp: StagedExperiment, policy, train: Split) -> None:
    """π_SFT: minus the demonstration's log-prob, answer tokens only, in nats per reply. Stands in afd.py too,
    where it is the forward KL."""
    columns = zip(train.rows, train.prompts, train.demonstrations, strict=True)
    examples = [Example(row.id, prompt, [demonstration], [1.0]) for row, prompt, demonstration in columns]

    def loss_of(examples, data):
        logprobs = common.completion_logprobs(policy, data)  # (G, 1, T)
        loss = -logprobs.sum((1, 2)).mean()
        return loss, {"loss_per_token": (-logprobs.detach().sum(), data.mask.sum())}

    train_stage(exp, Stage("sft", exp.args.epochs, exp.args.learning_rate), policy, examples, loss_of)


def train_spin(exp: StagedExperiment, stage: Stage, policy, examples: list[Example]) -> None:
    """One iteration on [demonstration, sample] pairs, the reference being the policy as it is when this
    begins (or began, if resumed)."""
    examples = with_reference(exp, stage.name, policy, examples)
    beta = exp.args.beta

    def loss_of(examples, data):
        temperature = common.pad_rows([e.temperature for e in examples], 1.0, "cpu")  # (G, 2)
        reference = common.pad_rows([e.reference for e in examples], 0.0, exp.device)  # (G, 2)
        sums = common.completion_logprobs(policy, data, temperature).sum(-1)  # (G, 2)
        loss = spin_loss(sums[:, 0], sums[:, 1], reference[:, 0], reference[:, 1], beta)
        demonstration, sample = (sums - reference).detach().unbind(1)  # (G,) log π/π_t
        right = (demonstration > sample).float().mean()
        return loss, {"accuracy": right, "margin": beta * (demonstration - sample).mean()}

    train_stage(exp, stage, policy, examples, loss_of)


def main(args: Args) -> None:
    """Run SPIN: see the numbered steps, which docs/spin.md explains."""
    check_args(args)

    # 1. Judge, data, what the starting model tells; the run folder.
    exp = set_up_stages("spin", args)
    args = exp.args
    _, train, _ = load_demonstrations(exp, aside=0)
    n = len(train.prompts)
    steps = args.iterations * stage_steps(args, n, args.policy_epochs)
    exp.begin(steps + (0 if args.sft_model else stage_steps(args, n, args.epochs)))
    if exp.trained:
        return exp.finish(curves_of(args))

    # 2. SFT: the first player.
    source = args.sft_model or exp.run.folder / "sft"
    if not args.sft_model and "sft" not in exp.done:
        exp.policy = exp.load(args.model, trainable=True)
        train_sft(exp, exp.policy, train)
        if args.dry_run:
            exp.sample(train.prompts[: args.batch_size], args.seed)
            return exp.finish(())
        save_model(exp.policy, exp.tokenizer, source)
        exp.finish_stage("sft")
        exp.policy = None  # every stage loads what it needs: a model less in memory while another trains

    # 3. Each iterate answers every prompt; the next one learns to tell its answers from the demonstrations.
    for iteration in range(1, args.iterations + 1):
        stage = Stage(f"spin-{iteration}", args.policy_epochs, args.policy_learning_rate)
        folder = exp.run.folder / stage.name
        if stage.name not in exp.done:
            policy = exp.load(source, trainable=True)
            own = exp.kept_samples(stage.name, policy, train.prompts, completions=1)
            columns = zip(train.rows, train.prompts, train.demonstrations, own, strict=True)
            examples = [Example(r.id, p, [d, y[0]], [1.0, args.temperature]) for r, p, d, y in columns]
            train_spin(exp, stage, policy, examples)
            save_model(policy, exp.tokenizer, folder)
            exp.finish_stage(stage.name)
            del policy
        source = folder

    # 4. Save; compare with the starting model on held-out prompts.
    exp.policy = exp.load(source)
    exp.finish(curves_of(args))


def curves_of(args: Args) -> tuple[str, ...]:
    """The logged metrics worth a plot."""
    stages = [f"spin-{iteration}" for iteration in range(1, args.iterations + 1)]
    return ("sft/loss", *(f"{stage}/{name}" for stage in stages for name in ("loss", "accuracy")))


if __name__ == "__main__":
    command_line(main, RECIPES)
