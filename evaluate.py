"""Models side by side: who is preferred to whom, by how much, and which mixture of them nobody beats.

Every model answers the same held-out prompts, every judge compares all pairs of answers in both orders, and
the preferences become the papers' table p(row ≻ column) with intervals over prompts, a ranking, the Nash
equilibrium of the pool and how much each model can be exploited in it (arXiv 2312.00886 and 2403.08635 report
such tables, the Nash mixture of a pool is that of arXiv 1806.02643 without its entropy).

What is worth knowing:
 1. p(row ≻ column) is the mean of the judge's p over prompts, one sampled reply a side, ½ [p(a ≻ b) + 1 − p(b
    ≻ a)] for judges without a scalar. `win_rate` beside it counts 1[p > ½] + ½ · 1[p = ½], as the scripts'
    summary does.
 2. Models draw independently of each other: a model's seed is made of its weights. The scripts' own final
    comparison draws both its sides from the same uniform numbers, so its figures are another draw.
 3. Answers and verdicts are kept in --cache: what was sampled or asked once is read the next time.
 4. MT-Bench compares first answers only; second turns, whose question depends on the first answer, are
    written for FastChat's judge.

Examples:
    python evaluate.py runs/a runs/b smollm2-135m --judge sentiment --judge polarity
    python evaluate.py gpt4.jsonl llama.jsonl --judge hf:ID            # files of answers: prompt and response
    python evaluate.py runs/a --benchmark alpaca_eval --dataset alpaca_eval.json
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers.utils.hub import cached_file

import common
from cleanalign.benchmarks import (
    MODEL_ANSWERS,
    QUESTIONS,
    alpaca_annotations,
    alpaca_outputs,
    alpaca_rows,
    length_controlled_win_rate,
    mt_bench_line,
    mt_bench_questions,
    mt_bench_temperature,
)
from cleanalign.comparison import pool
from cleanalign.comparison_page import page
from cleanalign.comparison_text import length_controlled, markdown, printed
from cleanalign.data import Row, bare, load_file, load_rows, prompt_text, report_dropped
from cleanalign.embedded import EMBEDDED_MODEL
from cleanalign.errors import UserError, near, require
from cleanalign.judge_templates import load_template
from cleanalign.kept import Kept, content_of, digest, fingerprint
from cleanalign.models import (
    HUB_MODELS,
    choose_attention,
    choose_sample_rows,
    end_tokens,
    hub_errors,
    load_model,
    load_tokenizer,
    model_source,
    resolve_device,
    resolve_dtype,
)
from cleanalign.openai_judge import JudgeSettings
from cleanalign.reporting import environment
from experiment import sampling_settings
from judges import Judge, judge_candidates, load_judge

AT_ONCE = (
    128  # replies, or questions to a judge, after which they are kept: what a killed process loses at most
)
FILES = (".jsonl", ".jsonl.gz", ".parquet", ".json")


@dataclass
class Args:
    """Models and files of answers side by side, in the view of one or several judges.

    python evaluate.py runs/a runs/b smollm2-135m --judge sentiment --judge polarity

    python evaluate.py gpt4.jsonl llama.jsonl --judge hf:ID

    --benchmark NAME also sets the lengths and the temperature that it is usually run with, shown as the
    defaults below; flags given by hand win.
    """

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, model folders, recipe names, hub ids, or files of answers (.jsonl, .jsonl.gz or .parquet
    with prompt and response, or AlpacaEval's .json). NAME=MODEL gives one another name."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Who prefers what, once for each judge: sentiment, polarity, cycle, hf:ID, pairrm, pairwise:ID or
    openai:MODEL or FILE.py:FUNCTION; see docs/judges.md. None given: sentiment."""
    judge_template: str = "alpaca-eval"
    """What --judge openai:MODEL is asked: alpaca-eval, tldr, or a file with {prompt}, {a} and {b} in it."""
    judge_max_requests: int | None = None
    """Requests that the judges openai:MODEL may send together before this stops. None: any number."""
    judge_concurrency: int = 8
    """Requests to a judge openai:MODEL that are under way at once."""

    # run
    seed: int = 0
    """Which draw of the models' replies to take."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto is cuda, else mps, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the models; auto is bfloat16 where the hardware is fast at it."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention backend; auto is sdpa, or eager for short rows on a CPU, where it is faster."""
    decoding: Literal["auto", "eager", "graphs", "compiled"] = "auto"
    """How a token's kernels are launched: one by one, as CUDA graphs, or fused by torch.compile and then as
    graphs; auto is graphs on CUDA."""
    run_dir: str = "runs"
    """Folder that holds the run folders."""
    run_name: str | None = None
    """Name of this comparison's folder, which must not exist; None makes one of the time."""
    cache: str | None = None
    """File in which answers and verdicts are kept for the next call; None is RUN_DIR/answers.sqlite."""

    # prompts
    dataset: str | None = None
    """Held-out prompts of a data set (chitchat, ultrafeedback, …, a hub id or a file); with --benchmark the
    file of its questions. None: the prompts of the files of answers, or without such files chitchat."""
    eval_prompts: int = 128
    """Held-out prompts of --dataset; files of answers without it, and benchmarks, are taken whole."""
    max_prompt_length: int = 64
    """Longest prompt in tokens, chat template included;
    longer ones are dropped for all models and counted."""
    common_prompts: bool = False
    """Compare on the prompts that all files of answers have, instead of refusing files that lack some."""
    benchmark: Literal["none", "alpaca_eval", "mt_bench"] = "none"
    """Also write the answers as AlpacaEval or FastChat reads them. With one model, nothing is compared."""
    length_controlled: bool = False
    """With --benchmark alpaca_eval: the length-controlled win rate of each model against the first one, by
    the code of the package alpaca_eval."""

    # sampling
    max_new_tokens: int = 24
    """Longest reply, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. MT-Bench's categories have their own, which hold."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    sample_rows: int = 0
    """Replies decoded at once; 0 chooses: on a GPU what its free memory holds, elsewhere 64."""


BENCHMARKS = {  # --benchmark: what it sets besides
    "none": Args(),
    "alpaca_eval": Args(
        benchmark="alpaca_eval", max_prompt_length=1024, max_new_tokens=1024, temperature=0.7
    ),
    "mt_bench": Args(benchmark="mt_bench", max_prompt_length=4096, max_new_tokens=1024),
}


def check_args(args: Args) -> None:
    """Refuse values that cannot work. Raises `UserError` naming flag and value."""
    for name in ("eval_prompts", "max_prompt_length", "max_new_tokens"):
        value = getattr(args, name)
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    for name in ("temperature", "sample_rows"):
        value = getattr(args, name)
        require(value >= 0, f"--{name.replace('_', '-')} must not be negative, got {value}.")
    require(0 < args.top_p <= 1, f"--top-p must lie in (0, 1], got {args.top_p}.")
    judges, source = Counter(args.judge), QUESTIONS.get(args.benchmark)
    require(not judges or max(judges.values()) == 1, f"--judge {judges.most_common(1)}: given twice.")
    require(
        bool(args.models), "no model given: name run folders, model folders, hub ids or files of answers."
    )
    require(
        len(args.models) > 1 or args.benchmark != "none",
        f"one model only ({args.models[0]}): there is nothing to compare it with. Give at least two.",
    )
    require(
        args.benchmark == "none" or args.dataset is not None,
        f"--benchmark {args.benchmark} needs --dataset FILE with its questions: {source}.",
    )
    require(
        not args.length_controlled or (args.benchmark == "alpaca_eval" and len(args.models) > 1),
        "--length-controlled needs --benchmark alpaca_eval and at least two models.",
    )


# ---------------------------------------------------------------------------------------------
# who is compared
# ---------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """A model that answers, or the answers of one."""

    name: str
    source: str  # a folder, recipe name or hub id; or the file of answers
    answers: dict[str, str] | None = None  # of a file: {prompt as `bare` writes it: response}
    order: list[Row] = field(default_factory=list)  # of a file: its rows
    tokenizer: object = None  # of a model
    identity: str = ""  # of a model: a fingerprint of its weights


def contender(spec: str) -> Contender:
    """The contender that a word of the command line names. Raises `UserError` if it is none."""
    given, _, rest = spec.partition("=")
    renamed = bool(rest) and not Path(spec).exists()
    path = Path(rest if renamed else spec)
    if path.name.endswith(FILES):
        made = Contender(re.sub(r"(\.jsonl|\.json|\.jsonl\.gz|\.parquet)$", "", path.name), str(path))
        # without a column that must be there: a reply of no words is dropped from training, but it is an
        # answer
        made.order = alpaca_rows(path) if path.suffix == ".json" else load_file(str(path), (), "answers")
        made.answers = {}
        for row in made.order:
            prompt = bare(row.prompt)
            require(row.response is not None, f"{row.id}: no response, so this is no file of answers.")
            require(
                prompt not in made.answers,
                f"{path}: {row.id}: the prompt {short(prompt)} stands there twice.",
            )
            made.answers[prompt] = row.response
    elif (path / "args.json").is_file():
        require(
            (path / "model" / "config.json").is_file(),
            f"{path}: a run folder without model/: its run has not ended. Continue it with --resume {path}.",
        )
        made = Contender(path.resolve().name, str(path / "model"))
    elif path.exists():
        require(
            (path / "config.json").is_file(),
            f"{path}: neither a run folder (no args.json), nor a Hugging Face model folder (no config.json), "
            f"nor a file of answers ({', '.join(FILES)}).",
        )
        folder = path.resolve()
        of_run = folder.name == "model" and (folder.parent / "args.json").is_file()
        made = Contender(folder.parent.name if of_run else folder.name, str(path))
    else:
        known = [EMBEDDED_MODEL, *HUB_MODELS]
        looks_like_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
        require(
            str(path) in known or looks_like_id,
            f"{path}: no such run folder, model folder, recipe or file of answers. {near(str(path), known)}",
        )
        made = Contender(path.name, str(path))
    if renamed:
        made.name = given
    return made


def contenders_of(args: Args) -> list[Contender]:
    """All contenders, with names that differ. Raises `UserError` as `contender` does."""
    made = [contender(spec) for spec in args.models]
    seen: dict[str, str] = {}
    for one, spec in zip(made, args.models, strict=True):
        key = slug(one.name)
        require(
            key not in seen,
            f"{seen.get(key)} and {spec}: two models of one name, {one.name}. Name one by NAME={spec}.",
        )
        seen[key] = spec
    require(
        args.benchmark != "mt_bench" or all(one.answers is None for one in made),
        "--benchmark mt_bench has two turns, which a file of answers has not: give models.",
    )
    return made


def slug(name: str) -> str:
    """A name as a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def short(text: str) -> str:
    """A text's beginning, quoted, on one line."""
    return repr(text if len(text) <= 60 else text[:59] + "…")


def identity_of(source: str, kept: Kept) -> str:
    """A fingerprint of a model's weights and tokenizer: of a folder its content, of a hub id the commit that
    is in the hub's cache."""
    resolved = model_source(source)
    if Path(resolved).is_dir():
        return content_of(Path(resolved), kept)
    with hub_errors("model", resolved):
        return fingerprint(resolved, Path(cached_file(resolved, "config.json")).parent.name)


def differences(one: Contender, args: Args) -> list[str]:
    """Flags that a run was trained with and that differ
    here: a warning, as its answers are other ones then."""
    file = Path(one.source).parent / "args.json"
    if one.answers is not None or not file.is_file():
        return []
    trained = json.loads(file.read_text()).get("args", {})
    names = [name for name in ("max_new_tokens", "temperature", "top_p") if name in trained]
    told = [name for name in names if trained[name] != getattr(args, name)]
    return [f"--{name.replace('_', '-')} {trained[name]} (here {getattr(args, name)})" for name in told]


# ---------------------------------------------------------------------------------------------
# prompts
# ---------------------------------------------------------------------------------------------


def rows_of(args: Args, contenders: list[Contender]) -> list[Row]:
    """The prompts that are to be answered, in their order.
    Raises `UserError` for one that a file of answers lacks."""
    files = [one for one in contenders if one.answers is not None]
    if args.benchmark == "alpaca_eval":
        rows = (
            alpaca_rows(Path(args.dataset)) if args.dataset.endswith(".json") else question_rows(args.dataset)
        )
    elif args.dataset is None and files:
        rows = fitting(unique(row for one in files for row in one.order), args, contenders, None)
    else:
        _, rows = load_rows(args.dataset or "chitchat", (), held_out=args.eval_prompts)
        random.Random(0).shuffle(rows)  # the scripts' order
        rows = fitting(unique(rows), args, contenders, args.eval_prompts)
    missing = {one.name: [row for row in rows if bare(row.prompt) not in one.answers] for one in files}
    lacking = {name: without for name, without in missing.items() if without}
    if args.common_prompts and lacking:
        absent = {bare(row.prompt) for without in lacking.values() for row in without}
        kept = [row for row in rows if bare(row.prompt) not in absent]
        report_dropped(
            "prompts", len(rows), Counter({"missing from a file of answers": len(rows) - len(kept)})
        )
        rows, lacking = kept, {}
    for name, without in lacking.items():
        raise UserError(
            f"{name}: {len(without)} of {len(rows)} prompts are missing from its answers, such as "
            f"{short(bare(without[0].prompt))}. Compare on those that all files have: --common-prompts."
        )
    return rows


def unique(rows: Iterable[Row]) -> list[Row]:
    """The first row of each prompt."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(bare(row.prompt), row)
    return list(first.values())


def fitting(rows: list[Row], args: Args, contenders: list[Contender], count: int | None) -> list[Row]:
    """The first `count` rows (None: all) whose prompt is short enough for every model; the others are
    counted."""
    tokenizers = [one.tokenizer for one in contenders if one.tokenizer is not None]
    kept, dropped = [], Counter()
    for row in rows:
        if len(kept) == count:
            break
        if all(len(common.encode_prompt(t, row.prompt)) <= args.max_prompt_length for t in tokenizers):
            kept.append(row)
        else:
            dropped[f"longer than --max-prompt-length {args.max_prompt_length}"] += 1
    report_dropped("held-out prompts", len(kept) + dropped.total(), dropped)
    return kept


# ---------------------------------------------------------------------------------------------
# answers
# ---------------------------------------------------------------------------------------------


@dataclass
class Answering:
    """What sampling needs: the flags, where and in what
    precision, what is kept, and a count of replies sampled."""

    args: Args
    kept: Kept
    device: torch.device
    dtype: torch.dtype
    sampled: Counter = field(default_factory=Counter)  # by model
    loaded: tuple | None = None  # (contender's name, model, ids that end a reply)


def answer(now: Answering, one: Contender, prompts: list, temperature: float) -> list[str]:
    """A contender's reply to each prompt, from what is kept or sampled now.

    Prompts go in parts of `AT_ONCE`, each drawn by a seed of its own, which depends on the weights:
    contenders draw independently of each other.
    """
    if one.answers is not None:
        return [one.answers[bare(prompt)] for prompt in prompts]
    args = now.args
    settings = {"temperature": temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
    tokens = [common.encode_prompt(one.tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, tokens))
    require(
        longest <= args.max_prompt_length,
        f"{one.name}: a prompt has {longest} tokens, more than --max-prompt-length {args.max_prompt_length}.",
    )
    replies = []
    for start in range(0, len(tokens), AT_ONCE):
        part = tokens[start : start + AT_ONCE]
        seed = common.derive_seed("evaluation", args.seed, one.identity, start)
        key = fingerprint("replies", one.identity, str(now.dtype), settings, seed, part)
        (known,) = now.kept.read([key])
        if known is None:
            known = sample_part(now, one, part, {"seed": seed, "temperature": temperature})
            now.kept.write({key: known})
            now.sampled[one.name] += len(part)
        replies += known
    return replies


def sample_part(now: Answering, one: Contender, tokens: list[list[int]], more: dict) -> list[str]:
    """One reply to each prompt by the model, which is loaded
    if it is not there yet; the one before is let go."""
    args = now.args
    if now.loaded is None or now.loaded[0] != one.name:
        now.loaded = None
        gc.collect()
        attention = choose_attention(args.attention, now.device, args.max_prompt_length + args.max_new_tokens)
        model = load_model(one.source, now.dtype, now.device, attention)
        now.loaded = (one.name, model, end_tokens(model, one.tokenizer))
    _, model, ends = now.loaded
    longest = args.max_prompt_length + args.max_new_tokens
    rows = choose_sample_rows(args.sample_rows, [model], longest, 0)
    settings = {**sampling_settings(replace(args, sample_rows=rows)), **more}
    replies = common.sample(model, tokens, ends, progress=f"sampling: {one.name}", **settings)
    return [common.decode(one.tokenizer, reply) for (reply,) in replies]


# ---------------------------------------------------------------------------------------------
# verdicts
# ---------------------------------------------------------------------------------------------


def kept_judge(judge: Judge, identity: str, kept: Kept, asked: Counter) -> Judge:
    """The same judge, asked only what it was not asked before. `asked` counts what it was, by its name."""

    def through(kind: str, ask: Callable, columns: tuple[list, ...]) -> torch.Tensor:
        keys = [fingerprint(kind, identity, *question) for question in zip(*columns, strict=True)]
        known = dict(zip(keys, kept.read(keys), strict=True))
        places = {key: i for i, key in enumerate(keys)}
        missing = [place for key, place in places.items() if known[key] is None]
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            told = ask(*([column[i] for i in part] for column in columns)).tolist()
            new = {keys[i]: value for i, value in zip(part, told, strict=True)}
            kept.write(new)
            known |= new
            asked[judge.name] += len(part)
        return torch.tensor([known[key] for key in keys])

    def closed(replies: list[str]) -> list[str]:  # an answer in a file does not say whether it was cut
        return [reply + judge.end for reply in replies]

    def preference(prompts, a, b):
        return through("preference", judge.preference, (prompts, closed(a), closed(b)))

    def score(prompts, replies):
        return through("score", judge.score, (prompts, closed(replies)))

    return replace(judge, preference=preference, score=score if judge.score else None)


def judge_identity(spec: str, template: str, kept: Kept) -> str:
    """A fingerprint of a judge: its name, and where that names a folder or a file here, the content; of one
    behind an endpoint also the endpoint and what it is asked."""
    kind, _, rest = spec.partition(":")
    path = Path(rest) if kind in ("hf", "pairwise", "pairrm") else Path(spec.rpartition(":")[0])
    if rest and path.is_dir():
        return fingerprint(kind, content_of(path, kept))
    if ".py:" in spec and path.is_file():
        return fingerprint(spec.rpartition(":")[2], digest(path, kept))
    if kind == "openai":
        return fingerprint(spec, os.environ.get("OPENAI_BASE_URL", ""), repr(load_template(template)))
    return fingerprint(spec)


# ---------------------------------------------------------------------------------------------
# benchmarks
# ---------------------------------------------------------------------------------------------


def question_rows(path: str) -> list[Row]:
    """All questions of a file, in their order."""
    return unique(load_file(path, (), "--dataset"))


def mt_bench(now: Answering, one: Contender, questions: list[dict]) -> list[dict]:
    """A model's answers as FastChat's model_answer files hold them: both turns, by category's temperature."""
    turns: dict[int, list[str]] = {}
    for temperature in sorted({mt_bench_temperature(question) for question in questions}):
        group = [question for question in questions if mt_bench_temperature(question) == temperature]
        talks: list[list[dict]] = [[] for _ in group]
        for turn in range(2):
            for talk, question in zip(talks, group, strict=True):
                talk.append({"role": "user", "content": question["turns"][turn]})
            replies = answer(now, one, [list(talk) for talk in talks], temperature)
            for talk, question, reply in zip(talks, group, replies, strict=True):
                talk.append({"role": "assistant", "content": reply})
                turns.setdefault(question["question_id"], []).append(reply)
    return [mt_bench_line(one.name, question, turns[question["question_id"]]) for question in questions]


# ---------------------------------------------------------------------------------------------
# the comparison
# ---------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Compare: see the numbered steps, which docs/evaluation.md explains."""
    check_args(args)
    began = time.perf_counter()
    folder = Path(args.run_dir) / (args.run_name or f"evaluate-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    require(not folder.exists(), f"{folder} exists already. Choose another --run-name.")

    # 1. Who is compared, by whom, on what.
    contenders = contenders_of(args)
    device = resolve_device(args.device)
    specs = args.judge or ("sentiment",)
    compared = len(contenders) > 1
    settings = JudgeSettings(args.judge_template, args.judge_max_requests, args.judge_concurrency)
    judges = [load_judge(spec, device, settings=settings) for spec in specs] if compared else []
    for one in contenders:
        if one.answers is None:
            one.tokenizer = load_tokenizer(one.source)
            for told in differences(one, args):
                print(f"{one.name} was trained with {told}")
    questions = mt_bench_questions(Path(args.dataset)) if args.benchmark == "mt_bench" else None
    rows = rows_of(args, contenders) if questions is None else mt_bench_rows(questions)

    # 2. Each model answers, one in memory at a time; what is kept is read.
    kept = Kept(args.cache or Path(args.run_dir) / "answers.sqlite")
    now = Answering(args, kept, device, resolve_dtype(args.dtype, device))
    replies, turns = {}, {}
    for one in contenders:
        if one.answers is None:
            one.identity = identity_of(one.source, kept)
        if questions is None:
            replies[one.name] = answer(now, one, [row.prompt for row in rows], args.temperature)
        else:
            turns[one.name] = mt_bench(now, one, questions)
            replies[one.name] = [line["choices"][0]["turns"][0] for line in turns[one.name]]
    now.loaded = None

    # 3. The judges compare all pairs, in both orders.
    asked: Counter = Counter()
    groups = [[replies[one.name][i] for one in contenders] for i in range(len(rows))]
    verdicts: dict[str, torch.Tensor] = {}  # judge: (N, M, M)
    measured: dict[str, dict] = {}  # judge: {model: {name: value}}, of judges with a measure of their own
    for judge, spec in zip(judges, specs, strict=False):
        careful = kept_judge(judge, judge_identity(spec, args.judge_template, kept), kept, asked)
        matrices = judge_candidates(careful, [row.prompt for row in rows], groups)[1]
        verdicts[spec] = torch.stack(matrices)
        if judge.measure:
            measured[spec] = {name: judge.measure(texts) for name, texts in replies.items()}
    kept.close()

    # 4. The table, the mixture; all of it into the run folder.
    result = Result(args, [one.name for one in contenders], rows, replies, verdicts, measured)
    result.write(folder, turns)
    work = {
        "replies_sampled": dict(now.sampled),
        "judge_asked": {spec: asked[j.name] for spec, j in zip(specs, judges)},
    }
    result.finish(folder, {**work, "seconds": round(time.perf_counter() - began, 1)})


def mt_bench_rows(questions: list[dict]) -> list[Row]:
    """First turns, which the judges compare."""
    return [Row(f"mt_bench:{q['question_id']}", q["turns"][0]) for q in questions]


@dataclass
class Result:
    """A comparison and what is written of it."""

    args: Args
    models: list[str]
    rows: list[Row]
    replies: dict[str, list[str]]  # model: a reply a prompt
    verdicts: dict[str, torch.Tensor]  # judge: (N, M, M) p(row ≻ column)
    measured: dict[str, dict]  # judge: what its own measure says of each model's replies

    def write(self, folder: Path, turns: dict[str, list[dict]]) -> None:
        """Answers, preferences, benchmark files. `turns` are MT-Bench's, for each model."""
        origin = {"script": "evaluate", "args": dataclasses.asdict(self.args), **environment()}
        write(folder / "args.json", json.dumps(origin, indent=2))
        for name in self.models:
            pairs = zip(self.rows, self.replies[name], strict=True)
            lines = [{"prompt": row.prompt, "response": reply} for row, reply in pairs]
            write_lines(folder / "answers" / f"{slug(name)}.jsonl", lines)
            if self.args.benchmark == "alpaca_eval":
                outputs = alpaca_outputs(name, self.rows, self.replies[name])
                write(folder / "alpaca_eval" / f"{slug(name)}.json", json.dumps(outputs, indent=1))
            if name in turns:
                write_lines(folder / MODEL_ANSWERS / f"{slug(name)}.jsonl", turns[name])
        tables = {spec: values.tolist() for spec, values in self.verdicts.items()}
        lines = [
            {
                "id": row.id,
                "prompt": prompt_text(row.prompt),
                "replies": {name: self.replies[name][i] for name in self.models},
                "preference": {spec: table[i] for spec, table in tables.items()},
            }
            for i, row in enumerate(self.rows)
        ]
        write_lines(folder / "comparisons.jsonl", lines)
        if turns:
            write(
                folder / MODEL_ANSWERS.parent / "question.jsonl", Path(self.args.dataset).read_text("utf-8")
            )

    def finish(self, folder: Path, work: dict) -> None:
        """comparison.json, comparison.md, report.html, and the tables on the screen."""
        judges = {spec: pool(self.models, values) for spec, values in self.verdicts.items()}
        for spec, told in self.measured.items():
            judges[spec]["measured"] = told
        self.write_tables(folder, judges, work)
        if judges:
            samples = [[self.replies[name][i] for name in self.models] for i in range(len(self.rows))]
            prompts = [prompt_text(row.prompt) for row in self.rows]
            tables = {spec: values.tolist() for spec, values in self.verdicts.items()}
            write(folder / "report.html", page(self.models, judges, (prompts, samples, tables)))
            print(printed(self.models, judges, len(self.rows)))
        sampled, asked = sum(work["replies_sampled"].values()), sum(work["judge_asked"].values())
        print(f"\n{sampled} replies sampled, {asked} questions asked; the rest was kept. {work['seconds']} s")
        print(f"all of it in {folder}/" + (" (open report.html)" if judges else ""), flush=True)
        if self.args.benchmark == "alpaca_eval" and judges:  # last: another package, which may want the hub
            for spec, values in self.verdicts.items():
                judges[spec]["length_controlled"] = self.against_first(folder, spec, values)
            self.write_tables(folder, judges, work)

    def write_tables(self, folder: Path, judges: dict[str, dict], work: dict) -> None:
        """comparison.json, in which the first judge's figures stand at the top too, and comparison.md."""
        first = next(iter(judges), None)
        facts = {"models": self.models, "judge": first, "prompts": len(self.rows)}
        comparison = {**facts, **judges.get(first, {}), "judges": judges, **work}
        write(folder / "comparison.json", json.dumps(comparison, indent=1))
        if judges:
            write(folder / "comparison.md", markdown(self.models, judges, len(self.rows)))

    def against_first(self, folder: Path, spec: str, values: torch.Tensor) -> dict[str, dict]:
        """AlpacaEval's annotations of each model against the first one, written; and what its own code makes
        of them, if that was asked for."""
        told = {}
        for column, name in enumerate(self.models[1:], 1):
            names = (self.models[0], name)
            sides = (self.replies[names[0]], self.replies[name])
            annotations = alpaca_annotations(names, self.rows, sides, values[:, column, 0].tolist(), spec)
            file = folder / "alpaca_eval" / "annotations" / slug(spec) / f"{slug(name)}.json"
            write(file, json.dumps(annotations, indent=1))
            if self.args.length_controlled:
                told[name] = length_controlled_win_rate(annotations)
                print(f"{length_controlled(names, told[name])}, judge {spec}", flush=True)
        return told


def write(file: Path, text: str) -> None:
    """Write a text file that appears whole or not at all; its folder is made. A lone surrogate, which JSON
    allows and UTF-8 does not, becomes its escape."""
    new = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes((text.rstrip("\n") + "\n").encode("utf-8", "backslashreplace"))
        new.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}. What was sampled and asked is kept.") from error


def write_lines(file: Path, rows: list[dict]) -> None:
    """`write` JSON lines."""
    write(file, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def parse(argv: list[str]) -> Args:
    """Args from flags over what --benchmark sets."""
    chosen = [word for flag, word in zip(argv, argv[1:]) if flag == "--benchmark"]
    chosen += [word.partition("=")[2] for word in argv if word.startswith("--benchmark=")]
    default = BENCHMARKS.get(chosen[-1] if chosen else "none", Args())
    return tyro.cli(Args, default=default, args=models_first(argv))


def models_first(argv: list[str]) -> list[str]:
    """`argv` with the models in front, as tyro wants them in one place: people type `a --judge x b`."""
    switches = ["--common-prompts", "--no-common-prompts", "--length-controlled", "--no-length-controlled"]
    models, flags, words = [], [], iter(argv)
    for word in words:
        if not word.startswith("-"):
            models.append(word)
            continue
        flags.append(word)
        if "=" not in word and word not in (*switches, "--help", "-h"):
            flags += [value for value in [next(words, None)] if value is not None]
    return [*models, *flags]


def command_line(argv: list[str] | None = None) -> None:
    """Compare what `argv` says; a user's mistake ends with one message and exit code 2."""
    try:
        main(parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; what was sampled and asked is kept: the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
