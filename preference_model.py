"""A judge of your own: a reward model or a pairwise preference model, trained on comparisons. arXiv 2312.00886.

The idea: alignment maximises what a judge prefers, and somebody has to teach the judge. It learns from pairs of
replies of which one was preferred, and its folder is a judge at once:

    --kind reward      a scalar for each reply, p(a ≻ b) = σ(r(a) − r(b)), the Bradley-Terry model; cannot
                       express a cycle                                          --judge hf:RUN/model
    --kind pairwise    reads the prompt and both replies, answers A or B, p(a ≻ b) = σ(logit A − logit B); can
                       express a cycle                                          --judge pairwise:RUN/model

The paper learns a preference model, which is conditioned on the prompt and two replies, by cross-entropy on human
choices, and looks for its Nash equilibrium; a Bradley-Terry reward is the special case that RLHF maximises.

It is trained on the very tokens that the judge will read, and measured through that judge.

Departures from the paper, whose preference model is a T5X encoder-decoder trained on TL;DR comparisons:
 1. A causal language model, asked in RLHFlow's words (arXiv 2405.07863): that is what --judge pairwise:ID reads.
 2. Every pair is learnt in both orders, in the same step, so that the place of a reply tells nothing. The answer is
    not antisymmetric by construction: one order is one forward pass, a judge may ask one or both, and how often the
    two agree says how well it has learnt (order_agreement). Averaged over both orders, as the scripts ask, it is
    antisymmetric exactly.
 3. The cross-entropy is that of the two answers alone, not of the whole vocabulary: σ(logit A − logit B) is all that
    is ever read.
 4. A target may be a probability (--labels soft, or a column p). Ties are ½, not dropped.
 5. Embeddings stay as they are: a few thousand comparisons contain few of the words.
 6. The smollm2-135m recipe is ours, chosen for two CPU cores: the verdicts of a sentiment lexicon.

Examples:
    python preference_model.py                                     # a lexicon's verdicts; minutes on a laptop
    python preference_model.py --kind pairwise --dataset pairs.jsonl     # rows with prompt, chosen, rejected
    python selm.py --judge hf:runs/NAME/model                      # align with what was learnt
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

import common
from cleanalign.data import Prompt, load_file, load_rows, prompt_text, report_dropped, require_no_leak
from cleanalign.errors import require
from cleanalign.models import base_model, head, head_logits, model_source, save_model, without_dropout
from cleanalign.preference_report import judge_card, plot_reliability, report_text
from cleanalign.statistics import (
    calibration_error,
    clustered_interval,
    cyclic_share,
    judged_right,
    log_loss,
    reliability,
)
from experiment import (
    Holds,
    RunArgs,
    Stage,
    StagedExperiment,
    check_common,
    command_line,
    set_up_stages,
    stage_steps,
    train_stage,
)
from judges import (
    Judge,
    answer_tokens,
    both_orders,
    load_judge,
    preference_matrix,
    question_ids,
    reward_limit,
    reward_text,
)
from rewards import collate_read, last_states, new_reward_model


@dataclass
class Args(RunArgs):
    """A judge from comparisons: a reward model or a pairwise preference model (arXiv 2312.00886).

    python preference_model.py     learns on a laptop in minutes, needs no GPU and no model hub

    python preference_model.py --model llama3-8b --kind pairwise --dataset ultrafeedback   on one GPU

    --model NAME also sets the recipe's other values, shown as the defaults below; flags given by hand win.
    """

    # run
    save_every: int = 50
    """Optimiser steps between checkpoints; 0 writes none while it trains."""

    # model and data
    model: str = "smollm2-135m"
    """Recipe name, hub id or folder of the causal language model that becomes the judge."""
    lora_rank: int = 0
    """Rank of a LoRA adapter on every linear layer; 0 trains all weights but the embeddings."""
    lora_alpha: int = 64
    """LoRA's scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    dataset: str = "chitchat"
    """Comparisons: rows with prompt, chosen and rejected, or with prompt, a, b and p. Of a set without replies
    the model itself answers each prompt twice, and --judge prefers one."""
    eval_dataset: str | None = None
    """File of comparisons to measure on; None holds out --eval-prompts prompts of --dataset."""
    num_prompts: int | None = 1536
    """Prompts to train on, in an order fixed by the seed; None is all of them."""
    pairs_per_prompt: int | None = None
    """Of a data set with several pairs for a prompt, so many of them at most; None is all."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included; pairs with longer ones are dropped and counted."""
    judge: str = "sentiment"
    """Whom to learn from where the data set has no pairs: sentiment, polarity, cycle, hf:ID, pairrm,
    pairwise:ID or FILE.py:FUNCTION."""
    eval_judge: str | None = "polarity"
    """A second judge, to compare verdicts with on the held-out pairs; None for none."""
    eval_prompts: int = 192
    """Held-out prompts to measure on, with all their pairs."""
    triple_prompts: int = 64
    """Held-out prompts of which --kind pairwise compares three replies with each other, to count cycles."""

    # algorithm
    kind: Literal["reward", "pairwise"] = "reward"
    """What to train: a scalar reward of a reply, or a model that reads two replies and answers A or B."""
    labels: Literal["hard", "soft"] = "hard"
    """What to learn of a probability, be it a judge's or a column p: hard learns which reply is preferred, soft
    how much."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most; None takes all. The schedule shortens with it."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    batch_size: int = 16
    """Pairs in one optimiser step."""
    epochs: int = 1
    """Passes over the pairs."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Learning rate after the warm-up."""
    optimizer_states: Literal["float32", "bfloat16"] = "float32"
    """What AdamW keeps for each bfloat16 weight: float32 master and moments, 12 bytes; or bfloat16 moments
    and the master's 16 low bits, 6."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0 never clips."""
    micro_batch_tokens: int = 1024
    """Tokens, padding included, in one forward and backward pass; the gradient is summed over passes."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute for far less memory."""

    # sampling
    max_new_tokens: int = 24
    """Longest reply, in tokens: sampled ones end there, a data set's pairs with a longer one are dropped and
    counted."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    sample_rows: int = 128
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice
    stands in args.json."""

    def holds(self) -> Holds:
        """Nothing beside the model in training. A row holds two replies, or the question in both orders."""
        return Holds(reference=False, completions=2 if self.kind == "reward" else 4)


HUB = Args(
    model="llama3-8b",
    dataset="ultrafeedback",
    num_prompts=None,
    max_prompt_length=1024,
    max_new_tokens=1024,
    eval_judge=None,
    eval_prompts=1000,
    learning_rate=1e-4,
    batch_size=64,
    lora_rank=32,
    micro_batch_tokens=16_384,
    gradient_checkpointing=True,
    sample_rows=0,
)
RECIPES = {
    "smollm2-135m": Args(),
    "llama3-8b": HUB,
    "gemma-2b": replace(
        HUB, model="gemma-2b", dataset="hh-harmless", max_prompt_length=512, max_new_tokens=256
    ),
    "pythia-1b-tldr": replace(HUB, model="pythia-1b-tldr", dataset="hh-helpful", max_prompt_length=512),
}
SHOWN = 3  # replies sampled for a held-out prompt: all their pairs are measured, and they make a triple


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    require(args.epochs >= 1, f"--epochs must be at least 1, got {args.epochs}.")
    require(args.learning_rate > 0, f"--learning-rate must be above 0, got {args.learning_rate}.")
    require(args.triple_prompts >= 0, f"--triple-prompts must not be negative, got {args.triple_prompts}.")
    limit = args.pairs_per_prompt
    require(limit is None or limit >= 1, f"--pairs-per-prompt must be at least 1, got {limit}.")


def comparison_loss(log_odds: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the preferred reply, a scalar to minimise: −p log σ(z) − (1 − p) log σ(−z), in nats.

    Args:
        log_odds: (B, O) z, the model's log-odds of a ≻ b, from each of O orders that it was asked in. Of a reward
            model, O = 1, z = r(a) − r(b): the Bradley-Terry likelihood.
        preference: (B,) the target p(a ≻ b): 1 or 0 for a choice, ½ for a tie.
    """
    p = preference[:, None]  # (B, 1)
    return -(p * F.logsigmoid(log_odds) + (1 - p) * F.logsigmoid(-log_odds)).mean()


def log_odds(model, data: common.Batch, letters: tuple[int, int] | None) -> torch.Tensor:
    """(G, O) log-odds of a ≻ b, float32, differentiable, of pairs as `Pair` lays them out.

    Without `letters` the model is a reward model, and O = 1: r(a) − r(b). With the ids of A and B, O = 2: logit A −
    logit B where a stands first, and the negative of that where b does.
    """
    states = last_states(model, data)  # (G, 2, D)
    if letters is None:
        a, b = base_model(model).score(states)[..., 0].unbind(1)  # (G,)
        return (a - b)[:, None]
    weight, bias, softcap = head(model)
    bias = None if bias is None else bias[list(letters)].float()
    logits = head_logits(states, weight[list(letters)].float(), bias, softcap)  # (G, 2, 2)
    first, second = (logits[..., 0] - logits[..., 1]).unbind(1)  # (G,)
    return torch.stack([first, -second], 1)


# --- pairs -------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Two replies to a prompt, and how often a is preferred: 1 or 0 for a choice, ½ for a tie."""

    row_id: str
    asked: Prompt
    a: str
    b: str
    preference: float


@dataclass
class Pair:
    """A comparison in tokens: what the judge reads first and what it reads second, which begin alike.

    Of a reward model, the prompt with a, and with b; of a pairwise one, the question with a first, and with b first.
    `common.collate` lays them side by side, their beginning computed once.
    """

    row_id: str
    prompt: list[int]  # the common beginning
    completions: list[list[int]]  # the rest of either
    preference: float


def read_pair(tokenizer, comparison: Comparison, args: Args) -> Pair:
    """The two token rows that the finished judge would read, cut where they part."""
    asked, a, b = comparison.asked, comparison.a, comparison.b
    if args.kind == "reward" or args.dry_run:  # the stand-in tokenizer of a dry run has no A and B
        rows = [reward_ids(tokenizer, asked, reply) for reply in (a, b)]
    else:
        rows = [question_ids(tokenizer, asked, a, b), question_ids(tokenizer, asked, b, a)]
    same = 0
    while same < min(map(len, rows)) and rows[0][same] == rows[1][same]:
        same += 1
    return Pair(comparison.row_id, rows[0][:same], [row[same:] for row in rows], comparison.preference)


def reward_ids(tokenizer, prompt: Prompt, reply: str) -> list[int]:
    """The token ids of `reward_text`, up to the last one that is not padding: there its reward is read."""
    texts = reward_text(tokenizer, prompt, reply)
    ids = tokenizer(*texts, add_special_tokens=not tokenizer.chat_template).input_ids
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    return ids


def fitting(exp: StagedExperiment, rows: list, prompts: int | None, seed: int) -> Iterator:
    """Rows of up to `prompts` prompts, in an order fixed by `seed`, whose texts are no longer than the flags say.

    Longer ones are dropped and counted. Raises `UserError` if none is left.
    """
    args, tokenizer = exp.args, exp.tokenizer
    order, by_prompt, dropped = list(rows), defaultdict(list), Counter()
    random.Random(seed).shuffle(order)
    for row in order:
        key = prompt_text(row.prompt)
        full = prompts is not None and len(by_prompt) == prompts and key not in by_prompt
        if full or len(by_prompt[key]) == args.pairs_per_prompt:
            continue
        replies = [tokenizer(text, add_special_tokens=False).input_ids for text in (row.chosen, row.rejected)]
        if len(common.encode_prompt(tokenizer, row.prompt)) > args.max_prompt_length:
            dropped[f"with a prompt longer than --max-prompt-length {args.max_prompt_length}"] += 1
        elif max(map(len, replies)) > args.max_new_tokens:
            dropped[f"with a reply longer than --max-new-tokens {args.max_new_tokens}"] += 1
        else:
            by_prompt[key].append(row)
    kept = [row for group in by_prompt.values() for row in group]
    report_dropped("pairs", len(kept) + dropped.total(), dropped)
    return kept


def given_comparisons(exp: StagedExperiment, rows: list, prompts: int | None, seed: int) -> list[Comparison]:
    """The data set's own pairs, the preferred reply as a. A row without p was a choice."""
    soft, result = exp.args.labels == "soft", []
    for row in fitting(exp, rows, prompts, seed):
        p = 1.0 if row.preference is None else row.preference
        result.append(Comparison(row.id, row.prompt, row.chosen, row.rejected, p if soft else verdict(p)))
    return result


def judged_comparisons(
    exp: StagedExperiment, name: str, model, split: tuple, completions: int
) -> list[Comparison]:
    """All pairs of `completions` replies that `model` gives to each prompt of `split` (rows, token ids), and the
    judge's verdicts on them."""
    rows, prompts = split
    texts = exp.texts(exp.kept_samples(name, model, prompts, completions))
    with exp.run.phase("judging"):
        matrices = preference_matrix(exp.judge, [row.prompt for row in rows], texts)  # (K, K) each
    result = []
    for row, group, matrix in zip(rows, texts, matrices, strict=True):
        for i, j in torch.combinations(torch.arange(completions)).tolist():
            p = matrix[i, j].item()
            p = p if exp.args.labels == "soft" else verdict(p)
            result.append(Comparison(f"{row.id}:{i}{j}", row.prompt, group[i], group[j], p))
    return result


def verdict(p: float) -> float:
    """Which reply a probability prefers: 1 the first, 0 the second, ½ neither."""
    return 0.5 if p == 0.5 else float(p > 0.5)


def load_splits(exp: StagedExperiment) -> tuple[list, list, bool]:
    """Rows to train on and rows to measure on, with disjoint prompts; and whether they are pairs.

    Raises `UserError` where only a part of the rows has both replies, or a prompt stands on both sides.
    """
    args = exp.args
    train, test = load_rows(args.dataset, (), args.eval_prompts)
    given = sum(row.chosen is not None and row.rejected is not None for row in train)
    require(
        given in (0, len(train)),
        f"--dataset {args.dataset}: {given} of {len(train)} rows have both chosen and rejected (or a and b); all must, "
        "or none.",
    )
    if args.eval_dataset:
        require(given > 0, f"--eval-dataset needs pairs in --dataset too, and {args.dataset} has none.")
        train, test = [*train, *test], load_file(args.eval_dataset, ("chosen", "rejected"), "--eval-dataset")
        require_no_leak(f"--dataset {args.dataset}", train, test)
    if given:
        print(f"{args.dataset}: pairs of the data set; --judge is not asked")
        train, test = different(args.dataset, train), different("held out", test)
    else:
        print(f"{args.dataset}: no pairs; {args.model} answers, and the judge {args.judge} prefers")
    return train, test, given > 0


def different(what: str, rows: list) -> list:
    """Rows whose replies differ; the rest is counted. Raises `UserError` if none is left."""
    kept = [row for row in rows if row.chosen != row.rejected]
    report_dropped(
        what, len(rows), Counter({"with twice the same reply": len(rows) - len(kept)} if kept != rows else {})
    )
    return kept


# --- training and measuring ---------------------------------------------------------------------


def train(exp: StagedExperiment, model, pairs: list[Pair], letters: tuple[int, int] | None) -> None:
    """Minimise `comparison_loss` over the pairs."""

    def loss_of(examples, data):
        target = torch.tensor([pair.preference for pair in examples], device=exp.device)  # (G,)
        z = log_odds(model, data, letters)  # (G, O)
        p = z.detach().sigmoid().mean(1)  # (G,)
        right = (p > 0.5).float() + 0.5 * (p == 0.5).float()
        # a tie says nothing of who is right, and counts ½
        right = torch.where(target > 0.5, right, torch.where(target < 0.5, 1 - right, 0.5))
        confidence = torch.maximum(p, 1 - p).mean()
        return comparison_loss(z, target), {"accuracy": right.mean(), "confidence": confidence}

    train_stage(
        exp, Stage("train", exp.args.epochs, exp.args.learning_rate, collate_read), model, pairs, loss_of
    )


def measure(exp: StagedExperiment, judge: Judge, comparisons: list[Comparison]) -> dict:
    """How good the judge's probabilities are on held-out comparisons; writes predictions.jsonl and
    reliability.png. docs/preference_model.md explains each figure."""
    asked, a, b, target = zip(*((c.asked, c.a, c.b, c.preference) for c in comparisons), strict=True)
    asked, a, b, target = map(list, (asked, a, b, target))
    swapped = None
    predicted = first = judge.preference(asked, a, b)  # (N,)
    if judge.score is None:
        swapped = judge.preference(asked, b, a)
        predicted = 0.5 * (first + 1 - swapped)  # as `both_orders` asks
    p = predicted.tolist()
    write_predictions(exp, comparisons, {"prediction": p, "first": first.tolist()})

    decided = [c for c in comparisons if c.preference != 0.5]
    require(
        bool(decided), "every held-out pair is a tie: nothing to measure; hold out more with --eval-prompts."
    )
    right = judged_right(p, target)
    longer = [(len(c.a) > len(c.b)) - (len(c.a) < len(c.b)) for c in decided]  # of the texts, in characters
    prefers = [1 if c.preference > 0.5 else -1 for c in decided]
    against = [x for x, long, choice in zip(right, longer, prefers, strict=True) if long * choice < 0]
    table = reliability(p, target)
    plot_reliability(table, exp.run.folder / "reliability.png", exp.run.folder.name)
    result = {
        "accuracy": mean(right),
        "accuracy_interval": clustered_interval(right, [prompt_text(c.asked) for c in decided]),
        "log_loss": log_loss(p, target),
        "log_loss_floor": log_loss(target, target),
        "calibration_error": calibration_error(table),
        "reliability": table,
        "accuracy_shorter_preferred": mean(against),
        "pairs_shorter_preferred": len(against),
        "accuracy_of_length": mean(
            [(long * choice + 1) / 2 for long, choice in zip(longer, prefers, strict=True)]
        ),
        "order_agreement": None,
        "cyclic_triples": None,
        "eval_judge_agreement": None,
        "eval_pairs": len(comparisons),
        "eval_ties": len(comparisons) - len(decided),
        "eval_prompts": len({prompt_text(prompt) for prompt in asked}),
    }
    if swapped is not None:
        result["order_agreement"] = ((first > 0.5) == (swapped < 0.5)).double().mean().item()
        result |= count_cycles(exp, judge, comparisons)
    if exp.eval_judge:
        other = judged_right(both_orders(exp.eval_judge, asked, a, b).tolist(), [verdict(x) for x in p])
        result["eval_judge_agreement"] = mean(other)
    return result


def mean(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def count_cycles(exp: StagedExperiment, judge: Judge, comparisons: list[Comparison]) -> dict:
    """Share of cycles a ≻ b ≻ c ≻ a among three replies each of up to --triple-prompts held-out prompts."""
    replies, prompts = defaultdict(dict), {}
    for c in comparisons:
        key = prompt_text(c.asked)
        prompts[key] = c.asked
        replies[key] |= dict.fromkeys((c.a, c.b))
    keys = [key for key, group in replies.items() if len(group) >= 3][: exp.args.triple_prompts]
    if not keys:
        return {"triples": 0}
    asked, groups = [prompts[key] for key in keys], [list(replies[key])[:3] for key in keys]
    matrices = torch.stack(preference_matrix(judge, asked, groups))  # (T, 3, 3)
    return {"cyclic_triples": cyclic_share(matrices), "triples": len(keys)}


def write_predictions(exp: StagedExperiment, comparisons: list[Comparison], columns: dict) -> None:
    """predictions.jsonl: every held-out pair with its target and what the judge answered, so that anybody can
    count again."""
    with open(exp.run.folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for i, c in enumerate(comparisons):
            row = {"id": c.row_id, "prompt": prompt_text(c.asked), "a": c.a, "b": c.b, "target": c.preference}
            row |= {name: values[i] for name, values in columns.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def new_model(exp: StagedExperiment):
    """The model to train: `new_reward_model`, or the language model itself."""
    if exp.args.kind == "reward" and not exp.args.dry_run:
        return new_reward_model(exp, exp.args.model)
    model = exp.load(exp.args.model, trainable=True)
    if exp.args.lora_rank == 0:
        model.get_input_embeddings().requires_grad_(False)
    return model


def require_readable(exp: StagedExperiment, pairs: list[Pair]) -> None:
    """Raise `UserError` if the judge would cut a pair: then it would read other tokens than it learnt from."""
    config = without_dropout(model_source(exp.args.model))
    limit = getattr(config, "max_position_embeddings", 8192)
    if exp.args.kind == "reward":
        limit = reward_limit(exp.tokenizer, config)
    longest = max(len(pair.prompt) + max(map(len, pair.completions)) for pair in pairs)
    require(
        longest <= limit,
        f"a pair has {longest} tokens, and as a judge {exp.args.model} reads {limit}. Lower --max-prompt-length or "
        "--max-new-tokens.",
    )


def main(args: Args) -> None:
    """Train a judge: see the numbered steps, which docs/preference_model.md explains."""
    check_args(args)

    # 1. Judge, tokenizer, data; the run folder.
    exp = set_up_stages("preference_model", args)
    args, letters = exp.args, None
    if args.dry_run:
        letters = (0, 1)
    elif args.kind == "pairwise":
        letters = answer_tokens(exp.tokenizer, f"--model {args.model}")
    train_rows, test_rows, given = load_splits(exp)
    if given:
        learnt = given_comparisons(exp, train_rows, args.num_prompts, args.seed)
        held_out = given_comparisons(exp, test_rows, args.eval_prompts, 0)
        exp.begin(stage_steps(args, len(learnt), args.epochs))

    # 2. Where the data set has no pairs: the model answers, the judge prefers.
    else:
        encode = partial(common.encode_rows, exp.tokenizer, max_prompt_length=args.max_prompt_length)
        asked = encode(train_rows, count=args.num_prompts, seed=args.seed, what="training prompts")
        aside = encode(test_rows, count=args.eval_prompts, seed=0, what="held-out prompts")
        exp.begin(stage_steps(args, len(asked[1]), args.epochs))
        model = exp.load(args.model)
        learnt = judged_comparisons(exp, "train", model, asked, completions=2)
        held_out = judged_comparisons(exp, "held-out", model, aside, completions=SHOWN)
        del model

    # 3. Train on what the judge will read.
    if "train" not in exp.done:
        pairs = [read_pair(exp.tokenizer, comparison, args) for comparison in learnt]
        model = new_model(exp)
        if not args.dry_run:
            require_readable(exp, pairs)
        train(exp, model, pairs, letters)
        if args.dry_run:
            return exp.run.finish_dry_run(model)
        base_model(
            model
        ).config.pad_token_id = exp.tokenizer.pad_token_id  # a classifier ends at its last other token
        save_model(model, exp.tokenizer, exp.run.folder / "model")
        exp.finish_stage("train")
        del model

    # 4. Measure the folder as the judge it is.
    spec = f"{'hf' if args.kind == 'reward' else 'pairwise'}:{exp.run.folder / 'model'}"
    with exp.run.phase("evaluation"):
        summary = {"kind": args.kind, "judge": spec, "train_pairs": len(learnt)}
        summary |= measure(exp, load_judge(spec, exp.device), held_out)
    (exp.run.folder / "model" / "README.md").write_text(judge_card(exp.run.folder.name, args, summary))
    exp.run.finish(
        summary, ("train/loss", "train/accuracy", "train/confidence", "train/grad_norm"), report_text
    )


if __name__ == "__main__":
    command_line(main, RECIPES)
