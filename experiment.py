"""One run: what its steps share, how it is set up, its final comparison. It knows no algorithm.

Sections:

    arguments     the machine's flags, which every script inherits; the checks that every script shares
    experiment    the record that a step reads and writes, and the calls that make it
    stages        scripts in several stages (fine-tuning, a reward model, …); finished ones stay finished
    evaluation    policy against the starting model on held-out prompts; samples.jsonl, model/
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import common
from cleanalign import distributed
from cleanalign.command_line import command_line, parse
from cleanalign.comparison import versus
from cleanalign.data import Row, load_file, load_rows, prompt_text, require_no_leak, select_by_score
from cleanalign.decoding import Decoders, resolve_decoding
from cleanalign.dry_run import GIB, Holds, free_memory, require_room, training_bytes
from cleanalign.errors import require
from cleanalign.models import (
    base_model,
    choose_attention,
    choose_sample_rows,
    end_tokens,
    load_model,
    load_tokenizer,
    make_trainable,
    resolve_device,
    resolve_dtype,
    save_model,
    starting_model,
)
from cleanalign.openai_judge import CHARACTERS_PER_TOKEN, JudgeSettings
from cleanalign.optimization import bytes_per_weight, learning_rate_at, make_optimiser
from cleanalign.reporting import model_card
from cleanalign.run import Run, kept
from cleanalign.signals import signals
from cleanalign.statistics import distinct_n
from cleanalign.storage import require_space, write_text
from judges import Judge, both_orders, load_judge

__all__ = [
    "Example",
    "Experiment",
    "Holds",
    "Run",
    "RunArgs",
    "Split",
    "Stage",
    "StagedExperiment",
    "check_common",
    "command_line",
    "evaluate",
    "load_demonstrations",
    "load_judges",
    "parse",
    "set_up",
    "set_up_stages",
    "stage_steps",
    "train_stage",
    "with_reference",
]

# ---------------------------------------------------------------------------------------------
# arguments
# ---------------------------------------------------------------------------------------------


@dataclass
class RunArgs:
    """The machine's flags: what they say changes where and how fast a run computes, and `seed` which of its
    draws it takes."""

    # run
    seed: int = 1
    """Seed of everything random; a run is a function of its arguments."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto is cuda, else mps, else cpu."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the computation; auto is bfloat16 where the hardware is fast at it. What the optimiser
    keeps: --optimizer-states."""
    attention: Literal["auto", "sdpa", "eager", "blocks", "flex"] = "auto"
    """Attention backend; auto is sdpa, on a CPU eager, and blocks for rows of more than 256 tokens. blocks
    and flex pass over what replies to one prompt do not see of each other; flex (FlexAttention) needs
    CUDA."""
    decoding: Literal["auto", "eager", "graphs", "compiled"] = "auto"
    """How a token's kernels are launched: one by one, as CUDA graphs, or fused by torch.compile and then as
    graphs; auto is graphs on CUDA."""
    run_dir: str = "runs"
    """Folder that holds the run folders."""
    run_name: str | None = None
    """Name of this run's folder, which must not exist; None makes one of script, model, seed and time."""
    resume: str | None = None
    """Run folder to continue from its last checkpoint, with the arguments it had."""
    judge_template: str = "alpaca-eval"
    """What --judge openai:MODEL is asked: alpaca-eval, tldr, or a file with {prompt}, {a} and {b} in it."""
    judge_max_requests: int | None = None
    """Requests that the judges openai:MODEL may send together before the run stops; a resumed run counts
    anew. None: any number."""
    judge_concurrency: int = 8
    """Requests to a judge openai:MODEL that are under way at once."""
    keep_checkpoints: int = 2
    """Checkpoints that stay in the run folder, the newest ones: a damaged one is passed over for the one
    before it."""
    save_async: Literal["auto", "on", "off"] = "auto"
    """Copy a checkpoint to host memory and write it while training goes on: it costs that memory. auto is on
    with a GPU."""
    track: bool = False
    """Also log to Weights & Biases (needs the package wandb)."""
    dry_run: bool = False
    """Rehearse one step at the greatest lengths on random weights in this model's shapes, and report memory
    and speed by phase."""
    processes: int | None = None
    """With --dry-run: foresee the memory of each of so many processes, without having them. (A run has those
    that torchrun starts.)"""


def check_common(args) -> None:
    """The checks every script shares. Raises `UserError` naming flag and value."""
    positive = ["batch_size", "max_new_tokens", "max_prompt_length", "eval_prompts", "micro_batch_tokens"]
    for name in [*positive, "keep_checkpoints"]:
        require(getattr(args, name) >= 1, f"{flag(name)} must be at least 1, got {getattr(args, name)}.")
    for name in ("temperature", "weight_decay", "max_grad_norm", "lora_rank", "save_every", "sample_rows"):
        require(getattr(args, name) >= 0, f"{flag(name)} must not be negative, got {getattr(args, name)}.")
    for name in ("num_prompts", "max_steps"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"{flag(name)} must be at least 1, got {value}.")
    require(
        args.processes is None or args.dry_run, "--processes goes with --dry-run; torchrun starts processes."
    )
    require(0 < args.top_p <= 1, f"--top-p must lie in (0, 1], got {args.top_p}.")
    require(0 <= args.warmup_ratio <= 1, f"--warmup-ratio must lie in [0, 1], got {args.warmup_ratio}.")


def flag(name: str) -> str:
    """A field's flag: `max_steps` is `--max-steps`."""
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------------
# experiment
# ---------------------------------------------------------------------------------------------


@dataclass
class Experiment:
    """What the steps of a run share. `rows` and `prompts` are index-aligned, and so are `eval_rows` and
    `eval_prompts`."""

    script: str
    args: RunArgs
    device: torch.device
    dtype: torch.dtype
    attention: str
    tokenizer: object
    ends: list[int]  # ids that end a reply
    judge: Judge
    eval_judge: Judge | None  # never trained on
    rows: list[Row] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)  # token ids
    eval_rows: list[Row] = field(default_factory=list)
    eval_prompts: list[list[int]] = field(default_factory=list)
    policy: torch.nn.Module | None = None
    reference: object = None  # the frozen starting model; None while no step needs it
    weights: int = 0  # numbers of weights: of the starting model, and of what is trained
    trained_weights: int = 0
    run: Run | None = None
    state: dict | None = None  # the checkpoint that a resumed run goes on from
    decoders: Decoders = field(default_factory=Decoders)

    def begin(self, steps: int, comparisons: int = 0) -> None:
        """Make the run folder, or go on in it. Call it once arguments, data and model are known to be good.

        Args:
            comparisons: what training asks the judge, for the estimate of a judge that costs money.
        """
        count = distributed.world()
        require(
            count == 1 or self.device.type != "mps",
            "several processes need CUDA or a CPU: give --device cpu.",
        )
        require(
            count == 1 or len(self.rows) >= count,
            f"{count} processes and {len(self.rows)} training prompts: some would never have any. Start "
            "fewer.",
        )
        announce_costs(self, comparisons)
        self.run = Run(self.script, self.args, steps)
        self.run.create()
        require_space(self.run.folder, disk_bytes(self), "checkpoints and model of this run")
        self.state = self.run.restore()

    @property
    def trained(self) -> bool:
        """Whether this is a resumed run whose training is over: it goes straight to `finish`."""
        return self.state is not None and self.state.get("trained", False)

    def sample(self, prompts: list[list[int]], seed: int, completions: int = 1, model=None, **more):
        """Replies [prompt][completion] of `model` (None: the policy), and `common.sample`'s stats; `more` are
        its other arguments. A rehearsal first decodes as many rows as the run will: the prompts again, whose
        replies are dropped."""
        asked, stats = len(prompts), {}
        if self.args.dry_run and "sampling" not in self.run.phases and self.args.holds().sampled is None:
            fill = self.args.sample_rows // completions * distributed.world()
            prompts = [prompts[i % asked] for i in range(max(fill, asked))]
        settings = {**sampling_settings(self.args), **more}
        with self.run.phase("sampling"):
            chosen = self.policy if model is None else model
            settings |= dict(completions=completions, seed=seed, stats=stats, decoders=self.decoders)
            replies = common.sample(chosen, prompts, self.ends, **settings)
        keep_decoders(self)
        self.run.set_apart("sampling", "decoder warm-up", stats["warmup_seconds"])
        self.run.add_tokens("sampling", stats["tokens"])
        return replies[:asked], stats

    def texts(self, replies: list[list[list[int]]], judge: Judge | None = None) -> list[list[str]]:
        """[prompt][completion] token ids as text; with a judge as it reads them, perhaps with an end token
        behind those that are finished."""

        def text(reply: list[int]) -> str:
            closed = judge is not None and bool(reply) and reply[-1] in self.ends
            return common.decode(self.tokenizer, reply) + (judge.end if closed else "")

        return [[text(reply) for reply in group] for group in replies]

    def finish(self, curves: tuple[str, ...], more: dict | None = None) -> None:
        """Save the policy; then compare it with the starting model on held-out prompts; write summary (with
        `more` in it) and curves. What is compared is what was saved: with LoRA the merged weights."""
        self.decoders.clear()
        if self.args.dry_run:
            self.run.unsaved = None  # the optimiser's state, which a run has saved by now
            with self.run.phase("evaluation"):
                common.sample(
                    self.policy, self.eval_prompts, self.ends, seed=0, **sampling_settings(self.args)
                )
            return self.run.finish_dry_run(self.policy)
        folder = self.run.folder / "model"
        if self.trained:
            more = self.state["more"]
            self.policy = load_model(str(folder), self.dtype, self.device, self.attention)
        else:
            self.policy = save_model(self.policy, self.tokenizer, folder)
            self.run.save({"trained": True, "more": more or {}})
        signals.busy = False
        signals.check()
        if self.args.lora_rank > 0:
            self.reference = None  # it was the policy's own weights
        with self.run.phase("evaluation"):
            summary = {**(more or {}), **evaluate(self), **judge_costs(self)}
        if distributed.rank() == 0:
            write_text(
                folder / "README.md", model_card(self.script, self.run.folder.name, self.args, summary)
            )
        self.run.finish(summary, curves)


def set_up(script: str, args, columns: tuple[str, ...] = ()) -> Experiment:
    """The experiment that `args` describe: judges, data, policy and, where `args.holds()` says so, the
    reference beside it.

    What fails cheaply fails first, and nothing is written yet: `Experiment.begin` makes the run folder.

    Args:
        columns: what each row of the data set must have beyond its prompt: "chosen", "rejected", "response".
    """
    holds = args.holds()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    resolve_decoding(args.decoding, device)  # refuses what this device cannot
    require_room(args, device)
    judge, eval_judge = load_judges(args, device)
    train_rows, test_rows = load_rows(args.dataset, columns, held_out=args.eval_prompts)
    with distributed.first_of_each_machine():
        tokenizer = load_tokenizer(args.model)
    longest = args.max_prompt_length
    train = common.encode_rows(
        tokenizer, train_rows, longest, args.num_prompts, args.seed, "training prompts"
    )
    test = common.encode_rows(tokenizer, test_rows, longest, args.eval_prompts, 0, "held-out prompts")
    del train_rows
    attention = choose_attention(args.attention, device, longest + holds.completions * args.max_new_tokens)
    policy = load_model(args.model, dtype, device, attention)
    ends = end_tokens(policy, tokenizer)
    policy = make_trainable(policy, args.lora_rank, args.lora_alpha, args.gradient_checkpointing)
    reference = None
    if holds.reference:
        reference = starting_model(policy)
    members = [policy] if reference is None else [policy, reference]
    args = replace(args, sample_rows=rows_at_once(args, members, dtype))
    models = policy, reference, *count_weights(policy)
    exp = Experiment(
        script, args, device, dtype, attention, tokenizer, ends, judge, eval_judge, *train, *test, *models
    )
    exp.decoders.longest = max(map(len, exp.prompts))
    return exp


SMALL_MICRO_BATCH = 256  # tokens


def keep_decoders(exp: Experiment) -> None:
    """After sampling: keep the decoders for the next step where training has room beside them, else give them
    back; say which when it changes. A script that samples once for many steps keeps none, nor does a CPU run
    whose micro-batches say that little memory matters more than speed."""
    held = exp.decoders.bytes()
    if exp.args.holds().sampled is None or held == 0:
        return exp.decoders.clear()
    config = base_model(exp.policy).config.get_text_config()
    needed, free = training_bytes(exp.args, config, exp.dtype.itemsize, exp.device), free_memory(exp.device)
    sparing = exp.device.type == "cpu" and exp.args.micro_batch_tokens <= SMALL_MICRO_BATCH
    room = free is not None and free > 1.5 * needed and not sparing
    if room != exp.run.keeps_decoders:
        exp.run.keeps_decoders = room
        what = "kept while the policy trains" if room else "given back before the policy trains"
        print(f"caches of the replies, {held / GIB:.2f} GiB: {what}", flush=True)
    if not room:
        exp.decoders.clear()


def announce_costs(exp: Experiment, comparisons: int) -> None:
    """Say what training and the final comparison will cost, of judges that do. Replies are taken to be as
    long as they can be."""
    lengths = [len(prompt) for prompt in [*exp.prompts, *exp.eval_prompts]]
    tokens = sum(lengths) / max(1, len(lengths)) + 2 * exp.args.max_new_tokens
    for judge, training in ((exp.judge, comparisons), (exp.eval_judge, 0)):
        if judge is not None and judge.account is not None:
            judge.account.announce(training + len(exp.eval_rows), tokens * CHARACTERS_PER_TOKEN)


def judge_costs(exp: Experiment) -> dict:
    """For the summary: what each judge that costs money was asked since this process began."""
    costs = {}
    for name, judge in (("judge", exp.judge), ("eval_judge", exp.eval_judge)):
        if judge is not None and judge.account is not None:
            costs[f"{name}_account"] = judge.account.figures()
    return costs


def load_judges(args, device: torch.device) -> tuple[Judge, Judge | None]:
    """The judges of `--judge` and `--eval-judge`. Requests of both count towards `--judge-max-requests`."""
    settings = JudgeSettings(args.judge_template, args.judge_max_requests, args.judge_concurrency)
    judge = load_judge(args.judge, device, "--judge", settings)
    if not args.eval_judge:
        return judge, None
    return judge, load_judge(args.eval_judge, device, "--eval-judge", settings)


def count_weights(model) -> tuple[int, int]:
    """Numbers of weights of a model: all of them, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def disk_bytes(exp: Experiment) -> int:
    """Bytes that a run will write: its checkpoints, one more
    while that is written, the models it saves, its logs."""
    args, holds = exp.args, exp.args.holds()
    states = bytes_per_weight(args.optimizer_states, exp.dtype)
    per_weight = sum(states.values()) - states["gradient"] + 4 * holds.average
    if args.optimizer_states == "bfloat16":
        per_weight += exp.dtype.itemsize  # its masters are the weights and their low bits
    checkpoint = exp.trained_weights * per_weight
    copies = args.keep_checkpoints + 1 if args.save_every else 1
    return copies * checkpoint + holds.models * exp.weights * exp.dtype.itemsize + 2**25


def rows_at_once(args, members: list, dtype: torch.dtype) -> int:
    """`choose_sample_rows` for a run's models, beside what its optimiser and its average will hold."""
    states = sum(bytes_per_weight(args.optimizer_states, dtype).values())
    # the average, and while it plays the policy's own weights
    states += args.holds().average * (4 + dtype.itemsize)
    states = -(-states // distributed.world())  # each process has its part of these
    return choose_sample_rows(args.sample_rows, members, args.max_prompt_length + args.max_new_tokens, states)


def sampling_settings(args) -> dict:
    """What `common.sample` is told by a run's flags."""
    return dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        max_rows=args.sample_rows,
        decoding=args.decoding,
    )


# ---------------------------------------------------------------------------------------------
# stages
# ---------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One prompt's training example: [demonstration] for SFT, [positive, negative] for a reward model,
    [chosen, rejected] for DPO."""

    row_id: str
    prompt: list[int]  # (P,) token ids
    completions: list[list[int]]  # lists of token ids
    # of each completion: the sampling temperature for own ones, 1 for demonstrations
    temperature: list[float]
    reference: list[float] | None = None  # summed reference log-prob of each completion


@dataclass
class Split:
    """Prompts of one part of the data, with a demonstration each where there is one."""

    rows: list[Row]
    prompts: list[list[int]]  # token ids
    demonstrations: list[list[int]] | None = None  # token ids


@dataclass
class Stage:
    """A stage of training: its name in the logs, its passes over the examples, its peak learning rate, how a
    batch is laid out."""

    name: str
    epochs: int
    learning_rate: float
    collate: Callable = common.collate


@dataclass
class StagedExperiment(Experiment):
    """An experiment in stages. Each loads the models it needs and lets them go; its result stays in the run
    folder, so that a resumed run takes finished stages from there."""

    done: list[str] = field(default_factory=list)  # names of finished stages

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self.done = list(self.state.get("done", [])) if self.state else []

    def load(self, source, attention: str | None = None, trainable: bool = False):
        """A causal language model, frozen or as a policy that starts there."""
        args = self.args
        model = load_model(str(source), self.dtype, self.device, attention or self.attention)
        if not trainable:
            return model
        return make_trainable(model, args.lora_rank, args.lora_alpha, args.gradient_checkpointing)

    def kept_samples(self, name: str, model, prompts: list[list[int]], completions: int):
        """Samples [prompt][completion] of `model`, kept in the
        run folder under `name`: a resumed run reads them."""

        def draw():
            seed, progress = common.derive_seed(self.args.seed, name), f"sampling: {name}"
            return self.sample(prompts, seed, completions, model, progress=progress)[0]

        return kept(self.run.folder / "replies" / f"{name}.json", draw)

    def keep_within(self, stage: str, step: int, optimisers: dict, **more) -> None:
        """`Run.keep` after `step` steps of a stage."""
        states = {name: optimiser.state_dict() for name, optimiser in optimisers.items()}
        state = {"done": self.done, "stage": stage, "step": step, **states, **more}
        self.run.keep(len(self.run.metrics), state)

    def restore_within(self, stage: str, optimisers: dict) -> int:
        """Steps of `stage` already done; its optimisers as they were."""
        if self.state is None or self.state.get("stage") != stage:
            return 0
        for name, optimiser in optimisers.items():
            optimiser.load_state_dict(self.state[name])
        step, self.state = self.state["step"], None
        return step

    def finish_stage(self, stage: str) -> None:
        """Mark a stage as done."""
        self.done.append(stage)
        self.state = None
        self.run.save({"done": self.done, "stage": None, "step": 0})


def set_up_stages(script: str, args) -> StagedExperiment:
    """The experiment of a script in stages: judges, tokenizer, what ends a reply. Data and models come with
    `load_demonstrations` and the stages; the starting model is read once, for what it tells, and let go."""
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    resolve_decoding(args.decoding, device)  # refuses what this device cannot
    require_room(args, device)
    judge, eval_judge = load_judges(args, device)
    with distributed.first_of_each_machine():
        tokenizer = load_tokenizer(args.model)
    longest = args.max_prompt_length + args.holds().completions * args.max_new_tokens
    attention = choose_attention(args.attention, device, longest)
    start = load_model(args.model, dtype, device, attention)
    ends = end_tokens(start, tokenizer)
    policy = make_trainable(start, args.lora_rank, args.lora_alpha, gradient_checkpointing=False)
    args = replace(args, sample_rows=rows_at_once(args, [policy, policy], dtype))
    weights, trained = count_weights(policy)
    exp = StagedExperiment(script, args, device, dtype, attention, tokenizer, ends, judge, eval_judge)
    exp.weights, exp.trained_weights = weights, trained
    return exp


def load_demonstrations(exp: Experiment, aside: int, columns: tuple[str, ...] = ()):
    """Demonstrations set aside and to train on, as two splits, and the data set's training rows; the
    experiment gets the rest's prompts.

    Args:
        aside: how many demonstrations to set apart from training.
        columns: what each row of --dataset must have beyond its prompt and, where it holds them, the
            demonstrations.

    Raises `UserError` where demonstrations are missing, or a held-out prompt is among them.
    """
    args, name = exp.args, exp.args.demonstrations
    from_file = name.endswith((".jsonl", ".jsonl.gz", ".parquet"))
    if from_file:
        train_rows, test_rows = load_rows(args.dataset, columns, args.eval_prompts)
        rows = load_file(name, ("response",), "--demonstrations")
        require_no_leak(f"--demonstrations {name}", rows, test_rows)
    else:
        train_rows, test_rows = load_rows(args.dataset, ("response", *columns), args.eval_prompts, name)
        rows = train_rows
    count = None if args.num_prompts is None else args.num_prompts + aside
    rows = select_by_score(rows, exp.judge, args.min_demonstration_score, count, args.seed)
    longest = args.max_prompt_length
    rows, prompts = common.encode_rows(exp.tokenizer, rows, longest, count, args.seed, "demonstrations")
    require(
        len(rows) > aside, f"{len(rows)} demonstrations: --dev-prompts {aside} leaves none to learn from."
    )
    end = common.turn_end(exp.tokenizer, exp.ends)
    answers = [
        common.encode_response(exp.tokenizer, row.prompt, row.response, end, args.max_new_tokens)
        for row in rows
    ]
    dev = Split(rows[:aside], prompts[:aside], answers[:aside])
    train = Split(rows[aside:], prompts[aside:], answers[aside:])
    exp.rows, exp.prompts = train.rows, train.prompts
    exp.eval_rows, exp.eval_prompts = common.encode_rows(
        exp.tokenizer, test_rows, longest, args.eval_prompts, 0, "held-out prompts"
    )
    return dev, train, train_rows


def train_stage(
    exp: StagedExperiment, stage: Stage, model, examples: list[Example], loss_of: Callable
) -> None:
    """Train `model` on `examples`: loss_of(examples, batch) gives a micro-batch's mean loss and what else to
    log, both tensors.

    No training path may ask the judge: it is sealed meanwhile.
    """
    args, run = exp.args, exp.run
    optimiser = make_optimiser(model, args.optimizer_states, args.weight_decay)
    batches = stage_batches(args, stage, len(examples))
    for index in range(exp.restore_within(stage.name, {"optimiser": optimiser}), len(batches)):
        batch, step = [examples[i] for i in batches[index]], len(run.metrics) + 1
        learning_rate = learning_rate_at(
            index, len(batches), stage.learning_rate, args.warmup_ratio, args.schedule
        )
        prompts, completions = [e.prompt for e in batch], [e.completions for e in batch]
        means = common.Means(len(batch))
        with run.phase("training"), sealed(exp.judge):
            for part in optimiser.passes(common.shares(prompts, completions, args.micro_batch_tokens)):
                data = stage.collate([prompts[i] for i in part], [completions[i] for i in part], exp.device)
                loss, measured = loss_of([batch[i] for i in part], data)
                (loss * len(part) / len(batch)).backward()
                run.add_batch("training", data)
                means.add([batch[i].row_id for i in part], {"loss": loss, **measured})
            total = means.read()
            run.stop_unless_finite(step, total["loss"], means.not_finite())
        with run.phase("update"):  # not within the other: memory freed by the pass is handed back here
            total["grad_norm"] = optimiser.step(learning_rate, args.max_grad_norm)
        total["learning_rate"] = learning_rate
        row = {f"{stage.name}/{name}": value for name, value in total.items()} | run.throughput()
        run.log(step, row, show=(f"{stage.name}/loss", f"{stage.name}/accuracy"))
        exp.keep_within(stage.name, index + 1, {"optimiser": optimiser})
    optimiser.release()


def stage_steps(args, examples: int, epochs: int) -> int:
    """Optimiser steps of a stage."""
    steps = epochs * -(-examples // args.batch_size)
    return min(steps, args.max_steps or steps)


def stage_batches(args, stage: Stage, examples: int) -> list[list[int]]:
    """Indices of every optimiser step of a stage: each
    epoch in an order of its own, `--max-steps` at most."""
    batches = []
    for epoch in range(stage.epochs):
        order = list(range(examples))
        random.Random(common.derive_seed(args.seed, "order", stage.name, epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, examples, args.batch_size)]
    return batches[: args.max_steps]


def with_reference(exp: StagedExperiment, name: str, model, examples: list[Example]) -> list[Example]:
    """The examples with `model`'s summed log-probs as their reference, kept in the run folder: a resumed run
    trains on the very same."""

    def measure():
        columns = [
            [e.prompt for e in examples],
            [e.completions for e in examples],
            [e.temperature for e in examples],
        ]
        size, progress = exp.args.micro_batch_tokens, f"{name}: reference log-probs"
        with exp.run.phase("reference"):
            sums = common.sequence_logprobs(model, *columns, exp.device, size, progress)
        filled = [replace(example, reference=row) for example, row in zip(examples, sums, strict=True)]
        return [dataclasses.asdict(example) for example in filled]

    file = exp.run.folder / "replies" / f"{name}-pairs.json"
    return [Example(**fields) for fields in kept(file, measure)]


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


# ---------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------


def evaluate(exp: Experiment) -> dict:
    """Policy against the starting model on held-out prompts, one sampled reply a side; writes samples.jsonl.

    Returns the summary's figures. win_rate = mean of 1[p > ½] + ½ · 1[p = ½], p = p(policy ≻ start); kl =
    mean over the policy's replies of log π(y) − log π_start(y), nats per reply, an estimate of KL(policy ‖
    start): unbiased at top-p 1 and the sampling temperature. Both orders are asked of a judge without a
    scalar.
    """
    args, judge, eval_judge = exp.args, exp.judge, exp.eval_judge
    temperature, asked = args.temperature or 1.0, [row.prompt for row in exp.eval_rows]
    replies, sums = {}, {}
    # One model after the other, the policy first: then it can go.
    for name in ("policy", "start"):
        model = exp.policy if name == "policy" else starting(exp)
        seed, progress = common.derive_seed("evaluation", 0), f"evaluate: {name}"
        settings = sampling_settings(args)
        drawn = common.sample(model, exp.eval_prompts, exp.ends, seed=seed, progress=progress, **settings)
        replies[name] = drawn
        sums[name] = common.sequence_logprobs(
            model, exp.eval_prompts, replies["policy"], temperature, exp.device, args.micro_batch_tokens
        )
        exp.policy = model = None

    def read(name: str, by: Judge | None = None) -> list[str]:
        return [group[0] for group in exp.texts(replies[name], by)]

    p = both_orders(judge, asked, read("policy", judge), read("start", judge)).tolist()
    p_eval = None
    if eval_judge:
        shown = read("policy", eval_judge), read("start", eval_judge)
        p_eval = both_orders(eval_judge, asked, *shown).tolist()
    texts = {name: read(name) for name in replies}
    write_samples(exp, texts, p, p_eval)
    log_ratios = [a[0] - b[0] for a, b in zip(sums["policy"], sums["start"], strict=True)]

    by_eval_judge = versus(p_eval) if p_eval else {}
    measured = {}
    for when, name in (("before", "start"), ("after", "policy")):
        measured[f"score_{when}"] = None
        if judge.score:
            measured[f"score_{when}"] = sum(judge.score(asked, read(name, judge)).tolist()) / len(asked)
        measured[f"length_{when}"] = sum(len(group[0]) for group in replies[name]) / len(asked)
        measured[f"distinct_2_{when}"] = distinct_n(texts[name], 2)
        if judge.measure:
            measured |= {f"{key}_{when}": value for key, value in judge.measure(texts[name]).items()}
    return {
        **versus(p),
        "eval_judge_win_rate": by_eval_judge.get("win_rate"),
        "eval_judge_win_rate_interval": by_eval_judge.get("win_rate_interval"),
        "kl": sum(log_ratios) / len(log_ratios),
        **measured,
        "judge": judge.name,
        "eval_judge": eval_judge.name if eval_judge else None,
        "eval_prompts": len(asked),
    }


def starting(exp: Experiment):
    """The starting model: the reference, or read from where it came where no step needed one."""
    if exp.reference is None:
        exp.reference = load_model(exp.args.model, exp.dtype, exp.device, exp.attention)
    return exp.reference


def write_samples(
    exp: Experiment, texts: dict[str, list[str]], p: list[float], p_eval: list[float] | None
) -> None:
    """samples.jsonl: all held-out prompts, both answers and
    what the judges say, so that anybody can count again."""
    if distributed.rank() != 0:
        return
    columns = (exp.eval_rows, texts["start"], texts["policy"], p, p_eval or [None] * len(p))
    lines = []
    for row, start, policy, preference, other in zip(*columns, strict=True):
        sample = {
            "id": row.id,
            "prompt": prompt_text(row.prompt),
            "start": start,
            "policy": policy,
            "preference": preference,
            "eval_preference": other,
        }
        lines.append(json.dumps(sample, ensure_ascii=False) + "\n")
    write_text(exp.run.folder / "samples.jsonl", "".join(lines))
