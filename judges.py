"""Who prefers what. Every judge answers p(a ≻ b | prompt); some also have a scalar score.

    --judge sentiment          VADER's compound score; p = σ(4 · (compound(a) − compound(b)))
    --judge polarity           TextBlob's polarity, an independent lexicon; p as above
    --judge cycle              question ≻ exclamation ≻ statement ≻ question: no scalar can express it
    --judge hf:ID              a sequence-classification reward model with its own tokenizer; p = σ(r(a) − r(b))
    --judge random             a number made of the reply's characters: for --dry-run; there is nothing to learn from it
    --judge FILE.py:FUNCTION   your own f(prompts, a, b) -> p(a ≻ b) for each; need not come from any scalar.
                               Or a reward f(prompts, replies) -> r for each; p = σ(r(a) − r(b))

Judges see text, batched. Nothing forces a judge through a scalar: ask `preference`, or `preference_matrix` for
more than two candidates; `score` is None where there is no scalar.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import synthetic
from common import Prompt, UserError, hub_errors, near, optional_import, prompt_text, require, write_dialogue

LEXICON_SCALE = 4.0  # p = σ(4 Δ): compound and polarity live in [−1, 1], so certain cases reach p = .98


@dataclass
class Judge:
    """A judge by name, with a `preference` and, where it has one, a scalar `score`.

    preference(prompts, a, b) -> (B,) float32 tensor of p(a ≻ b); score(prompts, replies) -> (B,) float32, or None.
    Where there is a score, p(a ≻ b) = σ(scale · (score(a) − score(b))). measure(replies) gives metrics of its own, to be logged.
    """

    name: str
    preference: Callable[[list[Prompt], list[str], list[str]], torch.Tensor]
    score: Callable[[list[Prompt], list[str]], torch.Tensor] | None = None
    scale: float = 1.0
    measure: Callable[[list[str]], dict[str, float]] | None = None


def load_judge(spec: str, device: torch.device | str = "cpu", flag: str = "--judge") -> Judge:
    """The judge that `spec` names (see the module's docstring). Raises `UserError` for one that is not there."""
    if spec in LEXICONS:
        return scalar_judge(spec, LEXICONS[spec](), scale=LEXICON_SCALE)
    if spec == "cycle":
        return Judge("cycle", cycle_preference, measure=cycle_measure)
    if spec == "random":
        return scalar_judge(spec, lambda prompts, replies: torch.tensor([synthetic.coin(reply) for reply in replies]))
    if spec.startswith("hf:"):
        return scalar_judge(spec, reward_model(spec[3:], device, flag))
    if ".py:" in spec:
        return function_judge(spec, flag)
    if spec == "pairrm" or spec.startswith("pairwise:"):
        raise UserError(f"{flag} {spec}: not there yet. Use {flag} hf:ID (a reward model) or {flag} sentiment.")
    raise UserError(f"{flag} {spec}: no such judge. {near(spec, [*LEXICONS, 'cycle', 'hf:ID', 'FILE.py:FUNCTION'])}")


def scalar_judge(name: str, score: Callable, scale: float = 1.0) -> Judge:
    """A judge from a scalar: p(a ≻ b) = σ(scale · (score(a) − score(b))), the Bradley-Terry model."""

    def preference(prompts, a, b):
        both = score([*prompts, *prompts], [*a, *b])
        return torch.sigmoid(scale * (both[: len(a)] - both[len(a) :]))

    return Judge(name, preference, score, scale)


# --- lexicons -------------------------------------------------------------------------------


def _vader() -> Callable:
    analyzer = optional_import("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()
    return lambda prompts, replies: torch.tensor([analyzer.polarity_scores(reply)["compound"] for reply in replies])


def _textblob() -> Callable:
    blob = optional_import("textblob", "textblob").TextBlob
    return lambda prompts, replies: torch.tensor([float(blob(reply).sentiment.polarity) for reply in replies])


LEXICONS = {"sentiment": _vader, "polarity": _textblob}

# --- an intransitive judge --------------------------------------------------------------------

STYLES = ("question", "exclamation", "statement")  # each beats the next, and the last the first


def style(reply: str) -> int:
    """Index into `STYLES`: by the last of the marks ? and ! in the text; without either it is a statement."""
    question, exclamation = reply.rfind("?"), reply.rfind("!")
    if max(question, exclamation) < 0:
        return 2
    return 0 if question > exclamation else 1


def cycle_preference(prompts, a, b) -> torch.Tensor:
    """(B,) p(a ≻ b): 1 where a's style beats b's, 0 where it loses, ½ where they are the same."""
    difference = torch.tensor([(style(y) - style(x)) % 3 for x, y in zip(a, b, strict=True)])
    return torch.tensor([0.5, 1.0, 0.0])[difference]


def cycle_measure(replies: list[str]) -> dict[str, float]:
    """Share of each style, and the exploitability of this mix: the best style's win rate against it, minus ½."""
    shares = torch.bincount(torch.tensor([style(reply) for reply in replies]), minlength=3).double() / len(replies)
    best = max((shares[(i + 1) % 3] + 0.5 * shares[i]).item() for i in range(3))
    return {**{f"style/{name}": share for name, share in zip(STYLES, shares.tolist(), strict=True)}, "exploitability": best - 0.5}


# --- reward models --------------------------------------------------------------------------


def reward_model(name: str, device, flag: str = "--judge", batch_size: int = 16) -> Callable:
    """score(prompts, replies) of a sequence-classification model, read through its own tokenizer and template.

    With a chat template the conversation goes through it. Without one, an encoder gets the pair (prompt, reply), a
    decoder HH-RLHF's "Human: … Assistant: …" text. One label is the reward; of two, the second's logit minus the
    first's. Texts longer than the model's limit lose their beginning, never the reply's end.
    """
    import transformers

    require(bool(name), f"{flag} hf:ID needs a hub id or folder after 'hf:'.")
    with hub_errors(flag, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(name, dtype="auto").to(device).eval()
    labels = model.config.num_labels
    require(labels in (1, 2), f"{flag} hf:{name}: a reward model has one or two labels, this one has {labels}.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 2048), 4096)

    def as_input(prompt: Prompt, reply: str):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        conversation = [*messages, {"role": "assistant", "content": reply}]
        if tokenizer.chat_template:
            return (tokenizer.apply_chat_template(conversation, tokenize=False),)
        if tokenizer.sep_token is not None:
            return (prompt_text(prompt), reply)
        return (write_dialogue(conversation),)

    @torch.inference_mode()
    def score(prompts, replies):
        texts = [as_input(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        scores = torch.zeros(len(texts))
        for start in tqdm(range(0, len(order), batch_size), desc="judge", leave=False, disable=len(order) < 8 * batch_size):
            part = order[start : start + batch_size]
            columns = [list(column) for column in zip(*(texts[i] for i in part), strict=True)]
            inputs = tokenizer(
                *columns,
                padding=True,
                truncation=True,
                max_length=limit,
                add_special_tokens=not tokenizer.chat_template,
                return_tensors="pt",
            )
            logits = model(**inputs.to(model.device)).logits.float().cpu()  # (b, labels)
            scores[part] = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
        return scores

    return score


# --- your own function ----------------------------------------------------------------------


def function_judge(spec: str, flag: str = "--judge") -> Judge:
    """`FILE.py:FUNCTION`, f(prompts: list[str], a: list[str], b: list[str]) -> sequence of p(a ≻ b), checked on every call.

    A function of two arguments, f(prompts, replies) -> sequence of rewards, makes a judge with a scalar. An attribute `measure` of
    the function, replies -> {name: value}, is the judge's own.
    """
    path, _, name = spec.rpartition(":")
    require(Path(path).is_file(), f"{flag} {spec}: no file {path}.")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag} {spec}: {path} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    offered = [n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    require(callable(function), f"{flag} {spec}: no function {name!r} in {path}, which has {', '.join(offered) or 'none'}.")

    scalar = len(inspect.signature(function).parameters) == 2
    kind, one = ("replies", "reward") if scalar else ("pairs", "p(a ≻ b)")

    def ask(prompts, *replies) -> list:
        texts = [prompt_text(prompt) for prompt in prompts]
        try:
            answer = list(function(texts, *map(list, replies)))
        except Exception as error:
            where = _line_in(path, error)
            raise UserError(f"{flag} {spec}: raised {type(error).__name__}: {error}{where}") from error
        require(
            len(answer) == len(texts),
            f"{flag} {spec}: returned {len(answer)} values for {len(texts)} {kind}; one {one} for each is needed.",
        )
        for i, value in enumerate(answer):
            try:
                fine = math.isfinite(value) if scalar else 0.0 <= float(value) <= 1.0
            except (TypeError, ValueError):
                fine = False
            shown = " and ".join(repr(column[i][:60]) for column in replies)
            require(
                fine,
                f"{flag} {spec}: value {i} is {value!r}; {'a reward is a number' if scalar else 'a preference lies in [0, 1]'}. For: {shown}.",
            )
        return [float(value) for value in answer]

    measure = getattr(function, "measure", None)
    if scalar:
        judge = scalar_judge(spec, lambda prompts, replies: torch.tensor(ask(prompts, replies)))
        judge.measure = measure
        return judge
    return Judge(spec, lambda prompts, a, b: torch.tensor(ask(prompts, a, b)), measure=measure)


def _line_in(path: str, error: BaseException) -> str:
    """' (FILE:LINE)' of the innermost frame of `error` inside `path`."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" ({path}:{lines[-1]})" if lines else ""


# --- both orders ----------------------------------------------------------------------------


def both_orders(judge: Judge, prompts: list[Prompt], a: list[str], b: list[str]) -> torch.Tensor:
    """(B,) p(a ≻ b) free of position bias: ½ [p(a ≻ b) + 1 − p(b ≻ a)]. A scalar judge has none and is asked once."""
    p = judge.preference(prompts, a, b)
    return p if judge.score is not None else 0.5 * (p + 1 - judge.preference(prompts, b, a))


# --- more than two candidates ---------------------------------------------------------------


def preference_matrix(judge: Judge, prompts: list[Prompt], candidates: list[list[str]]) -> list[torch.Tensor]:
    """For each prompt the (K, K) matrix of p(candidate i ≻ candidate j), ½ on the diagonal.

    A scalar judge scores each candidate once (its preferences have no position bias). Any other judge is asked about
    every pair in both orders, and the two answers are averaged: p = ½ [p(i ≻ j) + 1 − p(j ≻ i)].
    """
    if judge.score is not None:
        flat = [(prompt, reply) for prompt, group in zip(prompts, candidates, strict=True) for reply in group]
        scores = judge.score([prompt for prompt, _ in flat], [reply for _, reply in flat])
        groups = scores.split([len(group) for group in candidates])
        return [torch.sigmoid(judge.scale * (s[:, None] - s[None, :])) for s in groups]
    pairs = [(g, i, j) for g, group in enumerate(candidates) for i in range(len(group)) for j in range(i + 1, len(group))]
    asked = [prompts[g] for g, _, _ in pairs]
    first, second = [candidates[g][i] for g, i, _ in pairs], [candidates[g][j] for g, _, j in pairs]
    averaged = both_orders(judge, asked, first, second)
    matrices = [torch.full((len(group), len(group)), 0.5) for group in candidates]
    for (g, i, j), p in zip(pairs, averaged.tolist(), strict=True):
        matrices[g][i, j], matrices[g][j, i] = p, 1 - p
    return matrices
