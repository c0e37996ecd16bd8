"""A judge of your own: a reward model or a pairwise preference model, from comparisons. arXiv 2312.00886.

The idea: alignment maximises what a judge prefers, and somebody has to teach the judge. It learns from pairs
of replies of which one was preferred, and its folder is a judge at once:

    --kind reward      a scalar for each reply, p(a ≻ b) = σ(r(a) − r(b)), the Bradley-Terry model; cannot
                       express a cycle                                        --judge hf:RUN/model
    --kind pairwise    reads the prompt and both replies and answers A or B, p(a ≻ b) = σ(logit A − logit B);
                       can express a cycle                                    --judge pairwise:RUN/model

The paper's pipeline begins with a preference model, conditioned on the prompt and *two* replies and fitted to
human choices by cross-entropy, and then looks for its Nash equilibrium (nash_md.py). A reward model is the
special case that RLHF maximises. Either is trained here on the very tokens that it will read as a judge, and
measured as the judge it is.

Departures from the paper, whose preference model is a T5X encoder-decoder trained on TL;DR comparisons:
 1. A causal language model, asked in RLHFlow's words (arXiv 2405.07863), which --judge pairwise:ID reads.
 2. Every pair is learnt in both orders in the same step, so the place of a reply tells nothing. The answer to
    one order is not antisymmetric by construction, which would take two passes each time it is asked: a
    judge may ask once, and how often both orders agree (order_agreement) says what that costs. Averaged over
    both, as the scripts ask, it is antisymmetric exactly.
 3. The cross-entropy is that of the two answers alone, not of the whole vocabulary: σ(logit A − logit B) is
    all that is ever read.
 4. Sampled replies to a prompt are compared two by two, and a reward model reads each of them once (as in
    arXiv 2203.02155).
 5. A target may be a probability (--labels soft, or a column p), and ties are ½; neither is dropped.
 6. Embeddings stay as they are: a few thousand comparisons contain few of the words.
 7. The smollm2-135m recipe is ours, chosen for two CPU cores: a sentiment lexicon's verdicts.

Examples:
    python preference_model.py                                     # a lexicon's verdicts; minutes on a laptop
    python preference_model.py --kind pairwise --dataset pairs.jsonl   # rows with prompt, chosen and rejected
    python selm.py --judge hf:runs/NAME/model                      # align with what was learnt
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
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
from cleanalign.storage import write_text, writing
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
    """Comparisons: rows with prompt, chosen and rejected, or with prompt, a, b and p. Where a set has none,
    the model itself answers its prompts, and --judge prefers."""
    eval_dataset: str | None = None
    """File of comparisons to measure on; None holds out --eval-prompts prompts of --dataset."""
    num_prompts: int | None = 560
    """Prompts to train on, in an order fixed by the seed; None is all of them."""
    pairs_per_prompt: int | None = 2
    """Pairs of one prompt to learn from at most, or of a data set's to measure on; None is all. A reward
    model reads sampled replies together and learns from all their pairs in any case."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included; pairs with longer ones are dropped and counted."""
    judge: str = "sentiment"
    """Whom to learn from where the data set has no pairs: sentiment, polarity, cycle, hf:ID, pairrm,
    pairwise:ID or FILE.py:FUNCTION."""
    eval_judge: str | None = "polarity"
    """A second judge, to compare verdicts with on the held-out pairs; None for none."""
    eval_prompts: int = 128
    """Held-out prompts to measure on, with all their pairs."""
    triple_prompts: int = 64
    """Held-out prompts of which --kind pairwise compares three replies with each other, to count cycles."""

    # algorithm
    kind: Literal["reward", "pairwise"] = "reward"
    """What to train: a scalar reward of a reply, or a model that reads two replies and answers A or B."""
    labels: Literal["hard", "soft"] = "soft"
    """What to learn of a probability, a judge's or a column
    p: hard learns which reply is preferred, soft how much."""

    # optimisation
    max_steps: int | None = None
    """Optimiser steps at most; None takes all. The schedule shortens with it."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    batch_size: int = 8
    """Examples in one optimiser step: pairs, or a prompt with its samples."""
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
    samples_per_prompt: int = 3
    """Replies to each training prompt where the data set has no pairs; every two of them are a pair."""
    max_new_tokens: int = 16
    """Longest reply, in tokens: sampled ones end there, a data
    set's pairs with a longer one are dropped and counted."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    sample_rows: int = 128
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64. The choice
    stands in args.json."""

    def holds(self) -> Holds:
        """Nothing beside the model in training. A row holds a prompt's replies, or a question in both
        orders, of two replies each."""
        return Holds(reference=False, completions=self.samples_per_prompt if self.kind == "reward" else 4)

    def for_all_weights(self) -> Args:
        """A recipe of an adapter with --lora-rank 0: a learning rate for all weights (docs/selm.md)."""
        return replace(self, lora_rank=0, learning_rate=2e-6)


HUB = Args(
    model="llama3-8b",
    dataset="ultrafeedback",
    num_prompts=None,
    pairs_per_prompt=None,
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
CURVES = ("train/loss", "train/accuracy", "train/confidence", "train/grad_norm")
SHOWN = 3  # replies sampled for a held-out prompt: all their pairs are measured, and they make a triple


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    check_common(args)
    require(args.epochs >= 1, f"--epochs must be at least 1, got {args.epochs}.")
    require(args.learning_rate > 0, f"--learning-rate must be above 0, got {args.learning_rate}.")
    require(args.triple_prompts >= 0, f"--triple-prompts must not be negative, got {args.triple_prompts}.")
    require(
        args.samples_per_prompt >= 2,
        f"--samples-per-prompt must be at least 2 to make a pair, got {args.samples_per_prompt}.",
    )
    limit = args.pairs_per_prompt
    require(limit is None or limit >= 1, f"--pairs-per-prompt must be at least 1, got {limit}.")


def comparison_loss(log_odds: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the preferred reply, a scalar to minimise: −p log σ(z) − (1 − p) log σ(−z), in nats.

    Args:
        log_odds: (B, O) z, the model's log-odds of a ≻ b. Of a reward model z = r(a) − r(b), which makes this
            the Bradley-Terry likelihood, with a column for each pair of a prompt's replies; of a pairwise
            model with a column for each order that it was asked in.
        preference: (B, O) or (B, 1) the target p(a ≻ b): 1 or 0 for a choice, ½ for a tie.
    """
    return -(preference * F.logsigmoid(log_odds) + (1 - preference) * F.logsigmoid(-log_odds)).mean()


def log_odds(model, data: common.Batch, letters: tuple[int, int] | None) -> torch.Tensor:
    """(G, O) log-odds of a ≻ b, float32, differentiable, of examples as `Example` lays them out.

    Without `letters` the model is a reward model: r(a) − r(b) for each pair of a prompt's K replies, O =
    K (K − 1) / 2. With the ids of A and B, O = 2: logit A − logit B where a stands first, and the negative
    of that where b does.
    """
    states = last_states(model, data)  # (G, K, D)
    if letters is None:
        scores = base_model(model).score(states)[..., 0]  # (G, K)
        i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)  # `pairs_of`
        return scores[:, i] - scores[:, j]
    weight, bias, softcap = head(model)
    ids = common.upload(torch.tensor(letters), weight.device)  # (2,)
    bias = None if bias is None else bias[ids].float()
    logits = head_logits(states, weight[ids].float(), bias, softcap)  # (G, 2, 2)
    first, second = (logits[..., 0] - logits[..., 1]).unbind(1)  # (G,)
    return torch.stack([first, -second], 1)


def pairs_of(K: int) -> tuple[list[int], list[int]]:
    """All pairs i < j of K replies, as two lists of indices."""
    i, j = torch.triu_indices(K, K, 1).tolist()
    return i, j


# --- comparisons ---------------------------------------------------------------------------------


@dataclass
class Answers:
    """Replies to a prompt, and for each pair i < j of them (`pairs_of`) how often i is preferred: 1 or 0 for
    a choice, ½ for a tie."""

    row_id: str
    asked: Prompt
    replies: list[str]
    preferences: list[float]

    def pairs(self) -> list[Answers]:
        """Each pair of the replies apart."""
        if len(self.replies) == 2:
            return [self]
        places = zip(*pairs_of(len(self.replies)), self.preferences, strict=True)
        return [
            Answers(f"{self.row_id}:{i}:{j}", self.asked, [self.replies[i], self.replies[j]], [p])
            for i, j, p in places
        ]


@dataclass
class Example:
    """`Answers` in tokens, as the judge reads them: rows that begin alike and are cut where they part.

    Of a reward model, the prompt with each reply; of a pairwise one, the question with a first, and with b
    first. `common.collate` lays them side by side, their beginning computed once.
    """

    row_id: str
    prompt: list[int]  # the common beginning
    completions: list[list[int]]  # the rest of each
    preferences: list[float]


def example_of(tokenizer, answers: Answers, args: Args) -> Example:
    """The token rows that the finished judge would read."""
    asked, replies = answers.asked, answers.replies
    if args.kind == "reward":
        rows = [reward_ids(tokenizer, asked, reply) for reply in replies]
    elif tokenizer.chat_template:
        rows = [question_ids(tokenizer, asked, *order) for order in (replies, replies[::-1])]
    else:  # a dry run's stand-in, which has no A and B: the lengths are what it is after
        rows = [reward_ids(tokenizer, asked, " ".join(order)) for order in (replies, replies[::-1])]
    alike = 0
    while alike < min(map(len, rows)) and len({row[alike] for row in rows}) == 1:
        alike += 1
    return Example(answers.row_id, rows[0][:alike], [row[alike:] for row in rows], answers.preferences)


def reward_ids(tokenizer, prompt: Prompt, reply: str) -> list[int]:
    """The token ids of `reward_text`, up to the last one that is not padding: there its reward is read."""
    texts = reward_text(tokenizer, prompt, reply)
    ids = tokenizer(*texts, add_special_tokens=not tokenizer.chat_template).input_ids
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    return ids


def load_answers(exp: StagedExperiment) -> tuple[list[Answers], list[Answers]]:
    """What to learn from and what to measure on, with disjoint prompts; begins the run.

    The data set's own pairs, or where it has none the model's answers and the judge's verdicts. Raises
    `UserError` where only a part of the rows has both replies, or a prompt stands on both sides.
    """
    args = exp.args
    train_rows, test_rows = load_rows(args.dataset, (), args.eval_prompts)
    given = sum(row.chosen is not None and row.rejected is not None for row in train_rows)
    require(
        given in (0, len(train_rows)),
        f"--dataset {args.dataset}: {given} of {len(train_rows)} rows have both chosen and rejected (or a "
        "and b); all must, or none.",
    )
    if args.eval_dataset:
        require(given > 0, f"--eval-dataset needs pairs in --dataset too, and {args.dataset} has none.")
        train_rows += test_rows
        test_rows = load_file(args.eval_dataset, ("chosen", "rejected"), "--eval-dataset")
        require_no_leak(f"--dataset {args.dataset}", train_rows, test_rows)
    if given:
        print(f"{args.dataset}: pairs of the data set; --judge is not asked")
        learnt = to_learn(args, given_answers(exp, train_rows, args.num_prompts, args.seed))
        held_out = given_answers(exp, test_rows, args.eval_prompts, 0)
        exp.begin(stage_steps(args, len(learnt), args.epochs))
        return learnt, held_out

    print(f"{args.dataset}: no pairs; {args.model} answers, and the judge {args.judge} prefers")
    encode = partial(common.encode_rows, exp.tokenizer, max_prompt_length=args.max_prompt_length)
    asked = encode(train_rows, count=args.num_prompts, seed=args.seed, what="training prompts")
    aside = encode(test_rows, count=args.eval_prompts, seed=0, what="held-out prompts")
    exp.begin(stage_steps(args, len(asked[1]) * examples_of_prompt(args), args.epochs))
    learnt = to_learn(args, judged_answers(exp, "train", asked, args.samples_per_prompt))
    return learnt, judged_answers(exp, "held-out", aside, SHOWN)


def given_answers(exp: StagedExperiment, rows: list, prompts: int | None, seed: int) -> list[Answers]:
    """The data set's own pairs to up to `prompts` prompts, in an order fixed by `seed`. A row without p was a
    choice.

    Pairs that are longer than the flags say, or twice the same reply, are dropped and counted. Raises
    `UserError` if none is left.
    """
    args, tokenizer = exp.args, exp.tokenizer
    order, by_prompt, dropped = list(rows), defaultdict(list), Counter()
    random.Random(seed).shuffle(order)
    for row in order:
        key, texts = prompt_text(row.prompt), [row.chosen, row.rejected]
        have = len(by_prompt.get(key, ()))
        if have == args.pairs_per_prompt or (have == 0 and len(by_prompt) == prompts):
            continue
        if row.chosen == row.rejected:
            dropped["with twice the same reply"] += 1
        elif len(common.encode_prompt(tokenizer, row.prompt)) > args.max_prompt_length:
            dropped[f"with a prompt longer than --max-prompt-length {args.max_prompt_length}"] += 1
        elif any(len(tokenizer(x, add_special_tokens=False).input_ids) > args.max_new_tokens for x in texts):
            dropped[f"with a reply longer than --max-new-tokens {args.max_new_tokens}"] += 1
        else:
            p = target(1.0 if row.preference is None else row.preference, args)
            by_prompt[key].append(Answers(row.id, row.prompt, texts, [p]))
    kept = [answers for group in by_prompt.values() for answers in group]
    report_dropped("pairs", len(kept) + dropped.total(), dropped)
    return kept


def judged_answers(exp: StagedExperiment, name: str, split: tuple, completions: int) -> list[Answers]:
    """`completions` replies of the starting model to each prompt of `split` (rows, token ids), which the run
    folder keeps, and the judge's verdicts on all their pairs."""
    args, (rows, prompts) = exp.args, split
    done = (exp.run.folder / "replies" / f"{name}.json").exists()
    model = None if done else exp.load(args.model)
    replies = exp.kept_samples(name, model, prompts, completions)
    texts, read = exp.texts(replies), exp.texts(replies, exp.judge)
    with exp.run.phase("judging"):
        matrices = preference_matrix(exp.judge, [row.prompt for row in rows], read)  # (K, K) each
    result = []
    for row, group, matrix in zip(rows, texts, matrices, strict=True):
        preferences = [target(p, args) for p in matrix[pairs_of(completions)].tolist()]
        result.append(Answers(row.id, row.prompt, group, preferences))
    return result


def target(p: float, args: Args) -> float:
    """What is learnt of a preference: itself (--labels soft), or which reply it is for."""
    return p if args.labels == "soft" else verdict(p)


def verdict(p: float) -> float:
    """Which reply a preference is for: 1 the first, 0 the second, ½ neither."""
    return 0.5 if p == 0.5 else float(p > 0.5)


def to_learn(args: Args, answers: list[Answers]) -> list[Answers]:
    """What one training example holds: for a reward model all replies to a prompt together, for a pairwise
    one a pair, of which each prompt gives --pairs-per-prompt."""
    if args.kind == "reward":
        return answers
    chance, result = random.Random(args.seed), []
    for group in answers:
        pairs = group.pairs()
        chance.shuffle(pairs)
        result += pairs[: args.pairs_per_prompt]
    return result


def examples_of_prompt(args: Args) -> int:
    """Training examples that `to_learn` makes of a prompt's samples."""
    pairs = len(pairs_of(args.samples_per_prompt)[0])
    return 1 if args.kind == "reward" else min(pairs, args.pairs_per_prompt or pairs)


# --- training and measuring ---------------------------------------------------------------------


def train(exp: StagedExperiment, model, examples: list[Example], letters: tuple[int, int] | None) -> None:
    """Minimise `comparison_loss` over the examples."""

    def loss_of(examples, data):
        targets = [example.preferences for example in examples]
        preferences = common.upload(
            torch.tensor(targets), exp.device
        )  # (G, O); (G, 1) for both orders of one pair
        z = log_odds(model, data, letters)  # (G, O)
        p = z.detach().sigmoid()
        agrees = ((p > 0.5) == (preferences > 0.5)) & (p != 0.5)
        decided = (preferences != 0.5).expand_as(z)
        accuracy = torch.where(decided, agrees.float(), 0.5).mean()  # a tie says nothing of who is right
        confidence = torch.maximum(p, 1 - p).mean()
        return comparison_loss(z, preferences), {"accuracy": accuracy, "confidence": confidence}

    stage = Stage("train", exp.args.epochs, exp.args.learning_rate, collate_read)
    train_stage(exp, stage, model, examples, loss_of)


def measure(exp: StagedExperiment, judge: Judge, held_out: list[Answers]) -> dict:
    """How good the judge's probabilities are on held-out pairs; writes predictions.jsonl and reliability.png.
    docs/preference_model.md explains each figure."""
    pairs = [pair for answers in held_out for pair in answers.pairs()]
    asked, keys = [pair.asked for pair in pairs], [prompt_text(pair.asked) for pair in pairs]
    a, b = ([pair.replies[i] for pair in pairs] for i in (0, 1))
    truth = [pair.preferences[0] for pair in pairs]
    swapped = None
    if judge.score is None:
        first, swapped = judge.preference(asked, a, b), judge.preference(asked, b, a)  # (N,)
        predicted = 0.5 * (first + 1 - swapped)  # as `both_orders` asks
    else:  # a reply that stands in several pairs is read once
        replies = [answers.replies for answers in held_out]
        matrices = preference_matrix(judge, [answers.asked for answers in held_out], replies)
        first = predicted = torch.cat([matrix[pairs_of(len(matrix))] for matrix in matrices])
    p = predicted.tolist()
    write_predictions(exp, pairs, p, first.tolist())
    table = reliability(p, truth)
    picture = exp.run.folder / "reliability.png"
    with writing(picture):
        plot_reliability(table, picture, exp.run.folder.name)

    decided = [i for i, q in enumerate(truth) if q != 0.5]
    right = judged_right(p, truth)
    longer = [length_preference(a[i], b[i]) for i in decided]
    of_length = judged_right(longer, [truth[i] for i in decided])
    against = [x for x, by_length in zip(right, of_length, strict=True) if by_length == 0]
    result = {
        "accuracy": mean(right),
        "accuracy_interval": clustered_interval(right, [keys[i] for i in decided]),
        "accuracy_shorter_preferred": mean(against),
        "pairs_shorter_preferred": len(against),
        "accuracy_of_length": mean(of_length),
        "log_loss": log_loss(p, truth),
        "log_loss_floor": log_loss(truth, truth),
        "calibration_error": calibration_error(table),
        "reliability": table,
        "order_agreement": None,
        "cyclic_triples": None,
        "eval_judge_agreement": None,
        "eval_pairs": len(pairs),
        "eval_ties": len(pairs) - len(decided),
        "eval_prompts": len(set(keys)),
    }
    if swapped is not None:
        result["order_agreement"] = ((first > 0.5) == (swapped < 0.5)).double().mean().item()
        result |= count_cycles(exp, judge, pairs)
    if exp.eval_judge:
        other = both_orders(exp.eval_judge, asked, a, b).tolist()
        result["eval_judge_agreement"] = mean(judged_right(other, [verdict(x) for x in p]))
    return result


def length_preference(a: str, b: str) -> float:
    """Whom a judge of length prefers, in characters: 1 if a is longer, 0 if b is, else ½."""
    return verdict(0.5 + 0.1 * ((len(a) > len(b)) - (len(a) < len(b))))


def mean(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def count_cycles(exp: StagedExperiment, judge: Judge, pairs: list[Answers]) -> dict:
    """Share of cycles a ≻ b ≻ c ≻ a among three replies each to up to --triple-prompts held-out prompts."""
    replies, prompts = defaultdict(dict), {}
    for pair in pairs:
        key = prompt_text(pair.asked)
        prompts[key] = pair.asked
        replies[key] |= dict.fromkeys(pair.replies)  # a set that keeps its order
    keys = [key for key, group in replies.items() if len(group) >= 3][: exp.args.triple_prompts]
    if not keys:
        return {"triples": 0}
    asked, groups = [prompts[key] for key in keys], [list(replies[key])[:3] for key in keys]
    matrices = torch.stack(preference_matrix(judge, asked, groups))  # (T, 3, 3)
    return {"cyclic_triples": cyclic_share(matrices), "triples": len(keys)}


def write_predictions(
    exp: StagedExperiment, pairs: list[Answers], p: list[float], first: list[float]
) -> None:
    """predictions.jsonl: every held-out pair with what was preferred and what the judge answered (`first`:
    asked with a first), so that anybody can count again."""
    lines = []
    for pair, prediction, one_order in zip(pairs, p, first, strict=True):
        row = {
            "id": pair.row_id,
            "prompt": prompt_text(pair.asked),
            "a": pair.replies[0],
            "b": pair.replies[1],
        }
        row |= {"preference": pair.preferences[0], "prediction": prediction, "first": one_order}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(exp.run.folder / "predictions.jsonl", "".join(lines))


def new_model(exp: StagedExperiment):
    """The model to train: a reward model, or the language model itself.

    A reward head begins at random, as in arXiv 2009.01325: while it is 0 no gradient passes it, and the
    layers below would wait until it has grown.
    """
    args = exp.args
    if args.kind == "pairwise" or args.dry_run:
        model = exp.load(args.model, trainable=True)
        if args.lora_rank == 0:
            model.get_input_embeddings().requires_grad_(False)
        return model
    model = new_reward_model(exp, args.model)
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "score" in name and weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return model


def require_readable(exp: StagedExperiment, examples: list[Example]) -> None:
    """Raise `UserError` if the judge would cut an example: it would read other tokens than it learnt from."""
    config = without_dropout(model_source(exp.args.model))
    limit = getattr(config, "max_position_embeddings", 8192)
    if exp.args.kind == "reward":
        limit = reward_limit(exp.tokenizer, config)
    longest = max(len(example.prompt) + max(map(len, example.completions)) for example in examples)
    require(
        longest <= limit,
        f"the judge would have to read {longest} tokens, and {exp.args.model} can read {limit}. Lower "
        "--max-prompt-length or --max-new-tokens.",
    )


def main(args: Args) -> None:
    """Train a judge: see the numbered steps, which docs/preference_model.md explains."""
    check_args(args)

    # 1. Judge and tokenizer; the pairs, for which the model may have to answer; the run folder.
    exp = set_up_stages("preference_model", args)
    args, letters = exp.args, None
    if args.dry_run:
        letters = (0, 1)
    elif args.kind == "pairwise":
        letters = answer_tokens(exp.tokenizer, f"--model {args.model}")
    learnt, held_out = load_answers(exp)
    told = [p for answers in held_out for p in answers.preferences if p != 0.5]
    require(bool(told), "every held-out pair is a tie: nothing to measure. Raise --eval-prompts.")

    # 2. Train on what the judge will read.
    folder = exp.run.folder / "model"
    if "train" not in exp.done:
        examples = [example_of(exp.tokenizer, answers, args) for answers in learnt]
        model = new_model(exp)
        if not args.dry_run:
            require_readable(exp, examples)
        train(exp, model, examples, letters)
        if args.dry_run:
            return exp.run.finish_dry_run(model)
        # transformers takes a classifier's reward at the last token that is not this one
        base_model(model).config.pad_token_id = exp.tokenizer.pad_token_id
        save_model(model, exp.tokenizer, folder)
        exp.finish_stage("train")
        del model

    # 3. Measure the folder as the judge it is.
    spec = f"{'hf' if args.kind == 'reward' else 'pairwise'}:{folder}"
    pairs = sum(len(answers.preferences) for answers in learnt)
    with exp.run.phase("evaluation"):
        summary = measure(exp, load_judge(spec, exp.device), held_out)
    summary = {"kind": args.kind, "judge": spec, "train_pairs": pairs, **summary}
    write_text(folder / "README.md", judge_card(exp.run.folder.name, args, summary))
    exp.run.finish(summary, CURVES, report_text)


if __name__ == "__main__":
    command_line(main, RECIPES)
