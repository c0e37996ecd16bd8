"""Token-level reward models: load, read, score, train on pairs. Which loss the pairs get is an argument: this
file knows no algorithm.

A reward model is a sequence classifier with one label. It reads a prompt with its replies as `common.collate`
lays them out, so that a prompt is computed once for all its replies, and takes the hidden state at each
reply's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import common
from cleanalign import distributed
from cleanalign.data import bare
from cleanalign.errors import require
from cleanalign.models import (
    LOADED_WITH,
    base_model,
    choose_attention,
    hub_errors,
    make_trainable,
    model_source,
    set_attention,
    without_dropout,
)
from experiment import Example, Split, Stage, StagedExperiment, train_stage


def load_reward_model(source: str, fresh: bool, dtype, device, attention: str):
    """A sequence classifier with one label and no dropout; `fresh` puts a zero head on a causal language
    model's weights.

    The head is in float32: in bfloat16 the rewards of a prompt's samples would tie. A finished one is a
    Hugging Face folder.
    """
    folder = model_source(source)
    level = transformers.logging.get_verbosity()
    with hub_errors("--model" if fresh else "--reward-model", source):
        config = without_dropout(folder)
        config.num_labels = 1
        transformers.logging.set_verbosity_error()  # no report that the new head is not in the checkpoint
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                trust_remote_code=False,
                config=config,
                dtype=dtype,
                attn_implementation=LOADED_WITH.get(attention, attention),
            )
        finally:
            transformers.logging.set_verbosity(level)
    set_attention(model, attention)
    model.score.float()
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model.to(device).eval().requires_grad_(False)


def new_reward_model(exp: StagedExperiment, source: str):
    """A reward model to train, from the weights of `source`: all but the embeddings, or a LoRA adapter and
    the head."""
    args = exp.args
    model = load_reward_model(source, True, exp.dtype, exp.device, exp.attention)
    task = "CAUSAL_LM" if args.lora_rank == 0 else "SEQ_CLS"
    model = make_trainable(model, args.lora_rank, args.lora_alpha, args.gradient_checkpointing, task)
    if args.lora_rank == 0:
        model.get_input_embeddings().requires_grad_(False)
    return model


def last_states(model, data: common.Batch) -> torch.Tensor:
    """(G, K, D) hidden states, float32, differentiable, that have read all of a row laid out by
    `collate_read`."""
    hidden = common.completion_hidden(model, data)  # (G, K, T, D)
    last = (data.mask.sum(-1).long() - 1).clamp(min=0)  # (G, K): has seen every token but the placeholder
    index = last[:, :, None, None].expand(-1, -1, 1, hidden.shape[-1])
    return hidden.gather(2, index)[:, :, 0].float()


def reward_scores(model, data: common.Batch) -> torch.Tensor:
    """(G, K) scalars, float32, differentiable, of replies as `collate_read` lays them out."""
    return base_model(model).score(last_states(model, data))[..., 0]


def as_read(completion: list[int], ends: list[int], hide_end: bool) -> list[int]:
    """A completion as a reward model reads it: without its end, if hidden."""
    return completion[:-1] if hide_end and completion and completion[-1] in ends else completion


def pair_as_read(positive: list[int], negative: list[int], args, ends: list[int]) -> list[list[int]]:
    """[positive, negative] as a reward model is trained on them; with --match-lengths both at the length of
    the shorter."""
    pair = [as_read(completion, ends, args.hide_end) for completion in (positive, negative)]
    return [completion[: min(map(len, pair))] for completion in pair] if args.match_lengths else pair


def collate_read(prompts: list[list[int]], groups: list[list[list[int]]], device) -> common.Batch:
    """`common.collate` of completions closed by a placeholder, which is never fed: the position that predicts
    it has read all else."""
    return common.collate(prompts, [[[*completion, 0] for completion in group] for group in groups], device)


@torch.no_grad()
def rewards_of(
    exp: StagedExperiment,
    model,
    prompts: list[list[int]],
    groups: list[list[list[int]]],
    progress: str | None = None,
) -> torch.Tensor:
    """(G, M) rewards of M completions to each of G prompts, read from the device together."""
    hide = exp.args.hide_end
    read = [[as_read(completion, exp.ends, hide) for completion in group] for group in groups]
    result: list = [None] * len(prompts)
    scores = []
    tokens = common.tokens_without_gradient(exp.args.micro_batch_tokens, exp.device)
    parts = common.shares(prompts, read, tokens)[distributed.rank()]
    for part in tqdm(parts, desc=progress, leave=False, disable=progress is None):
        data = collate_read([prompts[i] for i in part], [read[i] for i in part], exp.device)
        scores.append(reward_scores(model, data))  # (g, M)
    order = [i for part in parts for i in part]
    for i, row in zip(order, torch.cat(scores).tolist() if scores else [], strict=True):
        result[i] = row
    return torch.tensor(distributed.merge(result))


def train_on_pairs(
    exp: StagedExperiment, stage: str, model, pairs: list[Example], pair_loss: Callable
) -> None:
    """Train `model` on [positive, negative] pairs.

    `pair_loss(positive_scores, negative_scores)`, (G,) each, gives the scalar to minimise.
    """
    args = exp.args
    require(
        bool(pairs), f"{stage}: no pair to learn from: both sides read the same, or the judge ties them all."
    )

    def loss_of(examples, data):
        positive, negative = reward_scores(model, data).unbind(1)  # (G,)
        return pair_loss(positive, negative), {"accuracy": share_right(positive, negative)}

    settings = Stage(stage, args.reward_epochs, args.reward_learning_rate, collate_read)
    train_stage(exp, settings, model, pairs, loss_of)


def accuracy(score: Callable, pairs: list[Example]) -> float | None:
    """Share of held-out pairs whose positive scores higher; None without pairs. score(prompts, completions)
    gives (B, 2) rewards."""
    if not pairs:
        return None
    scores = score([e.prompt for e in pairs], [e.completions for e in pairs])
    return share_right(scores[:, 0], scores[:, 1]).item()


def share_right(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Share of pairs whose positive scores higher, ties ½."""
    return ((positive > negative).float() + 0.5 * (positive == negative).float()).mean()


def data_set_preferences(exp: StagedExperiment, rows: list, dev: Split) -> list[Example]:
    """The data set's own [chosen, rejected] pairs, those on development prompts left out."""
    args = exp.args
    aside = {bare(row.prompt) for row in dev.rows}
    pairs = [row for row in rows if row.chosen and row.rejected and row.chosen != row.rejected]
    pairs = [row for row in pairs if bare(row.prompt) not in aside]
    require(
        bool(pairs),
        f"--pairs preference: --dataset {args.dataset} has no chosen and rejected responses. "
        "Give one that has, or --preferences judge (an oracle).",
    )
    count = args.reward_prompts * args.reward_samples
    kept = common.encode_rows(exp.tokenizer, pairs, args.max_prompt_length, count, args.seed, "preferences")
    return preference_examples(exp, Split(*kept))


def preference_examples(exp: StagedExperiment, split: Split) -> list[Example]:
    """The data set's [chosen, rejected] of every row that has both, as a reward model reads them."""
    args, end, examples = exp.args, common.turn_end(exp.tokenizer, exp.ends), []
    for row, prompt in zip(split.rows, split.prompts, strict=True):
        if row.chosen is None or row.rejected is None:
            continue
        chosen, rejected = (
            common.encode_response(exp.tokenizer, row.prompt, text, end, args.max_new_tokens)
            for text in (row.chosen, row.rejected)
        )
        read = pair_as_read(chosen, rejected, args, exp.ends)
        if read[0] != read[1]:
            examples.append(Example(row.id, prompt, read, [1.0, 1.0]))
    return examples


@dataclass
class Reward:
    """A reward that ranks samples: a reward model in a folder,
    or without one the closed form log π_SFT − log π_0."""

    label: str
    pairs: str  # how its pairs were built
    folder: Path | None
    oracle: bool = False  # it learned from the judge


def scorer(exp: StagedExperiment, sft_source, reward: Reward) -> Callable:
    """score(prompts, completions, progress) of a reward. A prompt with all its replies is one long row:
    attention is chosen for that."""
    args = exp.args
    longest = args.max_prompt_length + (args.max_n + 1) * args.max_new_tokens
    attention = choose_attention(args.attention, exp.device, longest)
    if reward.folder is None:
        return partial(log_ratios, exp, (exp.load(sft_source, attention), exp.load(args.model, attention)))
    model = load_reward_model(str(reward.folder), False, exp.dtype, exp.device, attention)
    return partial(rewards_of, exp, model)


def log_ratios(
    exp: StagedExperiment, models: tuple, prompts: list, groups: list, progress: str | None = None
) -> torch.Tensor:
    """(G, M) log π_SFT(y|x) − log π_0(y|x), at the sampling temperature; `models` are the two."""
    args = exp.args
    of_sft, of_start = (
        common.sequence_logprobs(
            model, prompts, groups, args.temperature, exp.device, args.micro_batch_tokens, progress
        )
        for model in models
    )
    return torch.tensor(of_sft) - torch.tensor(of_start)
