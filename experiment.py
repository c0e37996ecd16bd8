"""One run, from its command line to its summary: the mechanism around an algorithm, and no algorithm.

Sections:

    command line    recipes behind `--model`, `--resume`, errors without tracebacks
    run folder      args.json, metrics.jsonl, TensorBoard events, progress bar, curves.png, opt-in wandb
    checkpoint      atomic save; resume continues with the very metrics of an uninterrupted run
    evaluation      policy against the starting model on held-out prompts; samples.jsonl, summary.json, model card
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import common
import dry_run
import synthetic
from common import UserError, require
from judges import Judge, both_orders

# ---------------------------------------------------------------------------------------------
# command line
# ---------------------------------------------------------------------------------------------


def command_line(main: Callable, recipes: dict, argv: list[str] | None = None) -> None:
    """Parse `argv` over the recipe that `--model` names, run `main(args)`, and end a user's mistake with one message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        single_process()
        args = parse(recipes, argv)
        keep_freed_memory(args.micro_batch_tokens)
        with advice_when_out_of_memory(args):
            main(dry_run.prepare(args) if args.dry_run else args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume RUN_FOLDER continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def parse(recipes: dict, argv: list[str]):
    """Args from flags over a recipe's values, or over a run folder's when `--resume` is given.

    Raises `UserError` for an unknown model, and for a resumed run whose flags differ from its own.
    """
    default = next(iter(recipes.values()))
    resume = flag_value(argv, "--resume")
    model = flag_value(argv, "--model")
    if resume is not None:
        default = saved_args(type(default), Path(resume))
    elif model is not None:
        by_hub_id = {hub_id: name for name, hub_id in common.HUB_MODELS.items()}
        default = recipes.get(model) or recipes.get(by_hub_id.get(model)) or default
        known = model in recipes or Path(model).is_dir() or (model.count("/") == 1 and not model.startswith((".", "/", "~")))
        known |= "--dry-run" in argv and model in synthetic.CONFIGS
        require(known, f"--model {model}: no such recipe or folder. {common.near(model, recipes)}")
        default = dataclasses.replace(default, model=model)
    args = tyro.cli(type(default), default=default, args=argv)
    if resume is not None:
        may_differ = {"resume", "track"}
        differ = [
            f.name for f in dataclasses.fields(args) if f.name not in may_differ and getattr(args, f.name) != getattr(default, f.name)
        ]
        told = ", ".join(f"--{n.replace('_', '-')} {getattr(args, n)} (was {getattr(default, n)})" for n in differ)
        require(not differ, f"--resume {resume}: its run had other arguments: {told}. Leave these flags out, or start a new run.")
    return args


def flag_value(argv: list[str], flag: str) -> str | None:
    """The value of `--flag value` or `--flag=value` in `argv`."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
    return None


def saved_args(kind: type, folder: Path):
    """The Args of a run folder, as they were, with `resume` set to it."""
    require(folder.is_dir(), f"--resume {folder}: no such run folder.")
    file = folder / "args.json"
    require(file.is_file(), f"--resume {folder}: no args.json in it, so it is not a run folder.")
    saved = json.loads(file.read_text())
    script = Path(sys.argv[0]).stem
    require(saved.get("script") in (None, script) or script not in SCRIPTS, f"--resume {folder}: this is a run of {saved['script']}.py.")
    names = {f.name for f in dataclasses.fields(kind)}
    require(
        names <= set(saved["args"]),
        f"--resume {folder}: its args.json lacks {', '.join(sorted(names - set(saved['args'])))}; it was written by another version.",
    )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["args"].items() if k in names}
    return kind(**{**values, "resume": str(folder)})


SCRIPTS = ("selm", "ipo_md", "nash_md", "afd")


def single_process() -> None:
    """Refuse to start as one of several processes.

    The one home of rank and world size: when several GPUs come, this function learns them and `Run` writes on rank 0.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    require(
        world.isdigit() and int(world) <= 1,
        f"WORLD_SIZE={world}: several processes are not supported yet. Start one process: unset WORLD_SIZE, and python instead of torchrun.",
    )


def _glibc():
    """glibc, or None elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    return None


SMALL_MICRO_BATCH = 256  # tokens; micro-batches up to this size, the default runs', say that little memory matters more than speed


def keep_freed_memory(micro_batch_tokens: int) -> None:
    """Tell glibc to keep freed memory: giving activations back and faulting them in again costs a large part of a CPU step.

    Blocks above M_MMAP_THRESHOLD always go back. With small micro-batches gradients of the vocabulary do, which costs time.
    """
    if glibc := _glibc():
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        glibc.mallopt(-3, 40 * 2**20 if micro_batch_tokens <= SMALL_MICRO_BATCH else 2**29)  # M_MMAP_THRESHOLD; chunks of logits are 32 MB


def give_back_freed_memory() -> None:
    """Hand back what `keep_freed_memory` kept."""
    if glibc := _glibc():
        glibc.malloc_trim(0)


@contextlib.contextmanager
def advice_when_out_of_memory(args):
    """Out of memory, on a GPU or a CPU, becomes advice: which flags need less, and about how much less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        on_cpu = re.search("can't allocate memory|not enough memory", first)  # torch has no class of its own for this
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not on_cpu:
            raise
        raise UserError(
            f"out of memory: {first}\n{dry_run.advice(args, common.resolve_device(args.device))}\n"
            "What a recipe needs at its greatest lengths: the same command with --dry-run."
        ) from error


def check_common(args) -> None:
    """The checks every script shares. Raises `UserError` naming flag and value."""
    positive = ("batch_size", "max_new_tokens", "max_prompt_length", "eval_prompts", "micro_batch_tokens")
    for name in positive:
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    for name in ("temperature", "weight_decay", "max_grad_norm", "lora_rank", "save_every", "sample_rows"):
        require(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}.")
    require(0 < args.top_p <= 1, f"--top-p must lie in (0, 1], got {args.top_p}.")
    require(0 <= args.warmup_ratio <= 1, f"--warmup-ratio must lie in [0, 1], got {args.warmup_ratio}.")
    require(args.max_steps is None or args.max_steps >= 1, f"--max-steps must be at least 1, got {args.max_steps}.")


# ---------------------------------------------------------------------------------------------
# run folder
# ---------------------------------------------------------------------------------------------


class Run:
    """The run folder and everything written to it while training.

    A new folder is made on construction (an existing one is refused: nothing is ever written over); with `args.resume` the
    folder is continued. Use: `log(step, metrics)` once a step, `phase(name)` around timed work, `save`/`restore` for
    checkpoints, `finish(summary)` at the end.
    """

    def __init__(self, script: str, args, steps: int):
        self.script, self.args, self.steps = script, args, steps
        if args.resume:
            self.folder = Path(args.resume)
        else:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            model = re.sub(r"[^\w.-]+", "-", Path(args.model).name)
            self.folder = Path(args.run_dir) / (args.run_name or f"{script}-{model}-seed{args.seed}-{stamp}")
        self.metrics: list[dict] = []
        self.seconds_before = 0.0
        self.started = time.perf_counter()
        self.phases: dict[str, Counter] = defaultdict(Counter)  # seconds, tokens, scored, peak_memory_bytes
        self.open_phases: list[str] = []
        self.phase_mark = 0.0  # when the innermost open phase began, or went on
        self.peak_memory_bytes = 0
        self.padding = Counter()  # of the batches since the last log: places, tokens
        self.bar: tqdm | None = None
        self.writer = self.wandb = None

    def create(self) -> None:
        """Make the folder and write args.json. Call once the arguments, model and data are known to be good."""
        if not self.args.resume:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:
                raise UserError(
                    f"{self.folder} exists already. Choose another --run-name, or continue it with --resume {self.folder}."
                ) from None
            except OSError as error:
                raise UserError(f"--run-dir {self.args.run_dir}: cannot be written: {error}") from error
            text = json.dumps({"script": self.script, "args": dataclasses.asdict(self.args), **environment()}, indent=2)
            (self.folder / "args.json").write_text(text + "\n")
        print(f"run folder: {self.folder}", flush=True)
        if self.args.max_steps and self.steps < self.args.max_steps:
            print(
                f"--max-steps {self.args.max_steps}: the data are used up after {self.steps} steps, or another flag ends the run there",
                flush=True,
            )
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))
        if self.args.track:
            wandb = common.optional_import("wandb", "'cleanalign[track]'")
            self.wandb = wandb.init(project="cleanalign", name=self.folder.name, config=dataclasses.asdict(self.args), dir=str(self.folder))

    @contextlib.contextmanager
    def phase(self, name: str):
        """Time a part of the work and note its peak memory. Phases may be nested: seconds and peak of an inner one are its own alone."""
        if not self.open_phases and self.args.micro_batch_tokens <= SMALL_MICRO_BATCH:
            give_back_freed_memory()  # a phase's buffers differ in size from the last one's: their peaks would add up
        self._close_measurement()
        self.open_phases.append(name)
        yield
        self._close_measurement()
        self.open_phases.pop()

    def _close_measurement(self) -> None:
        """Book what happened since the last call on the innermost open phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, peak = time.perf_counter(), peak_memory()
        if self.open_phases:
            phase = self.phases[self.open_phases[-1]]
            phase["seconds"] += now - self.phase_mark
            phase["peak_memory_bytes"] = max(phase["peak_memory_bytes"], peak)
        self.phase_mark, self.peak_memory_bytes = now, max(self.peak_memory_bytes, peak)
        reset_peak_memory()

    def add_tokens(self, name: str, tokens: int, scored: int = 0) -> None:
        """Count tokens of a phase: those sampled, or those a forward pass computed and, of the completions', scored."""
        self.phases[name] += Counter(tokens=tokens, scored=scored)

    def add_batch(self, name: str, batch: common.Batch) -> None:
        """Count a batch's tokens in a phase, and how much of it was padding."""
        self.add_tokens(name, batch.tokens, batch.scored)
        self.padding += Counter(places=batch.input_ids.numel(), tokens=batch.tokens)

    def set_apart(self, name: str, part: str, seconds: float) -> None:
        """Count `seconds` of phase `name` as a phase of their own: what is paid once must not blur tokens per second."""
        if seconds:
            self.phases[name]["seconds"] -= seconds
            self.phases[part]["seconds"] += seconds

    def throughput(self) -> dict[str, float]:
        """Tokens per second by phase, since the start (or the resume)."""
        return {f"tokens_per_second/{n}": p["tokens"] / p["seconds"] for n, p in self.phases.items() if p["seconds"] > 0 and p["tokens"]}

    def fewer_steps(self, by: int) -> None:
        """Shorten the run's planned steps, for the progress bar's time left."""
        self.steps -= by
        if self.bar:
            self.bar.total = self.steps
            self.bar.refresh()

    def log(self, step: int, metrics: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Write one step's metrics everywhere; `show` names those beside the progress bar."""
        row = {"step": step, **{k: (v.item() if isinstance(v, torch.Tensor) else v) for k, v in metrics.items()}}
        if self.padding:
            row["padding_fraction"] = 1 - self.padding["tokens"] / self.padding["places"]
            self.padding.clear()
        self.metrics.append(row)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if self.writer and isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)
        if self.bar is None:
            self.bar = tqdm(total=self.steps, initial=step - 1, desc=self.script, unit="step")
        self.bar.update(1)
        self.bar.set_postfix({k: f"{row[k]:.3g}" for k in show if k in row})

    def stop_unless_finite(self, step: int, loss: float, row_ids: list[str]) -> None:
        """A NaN or infinite loss ends the run, naming step and rows, before it can reach the weights."""
        if not math.isfinite(loss):
            kept = self.folder / "checkpoint"
            where = f"The checkpoint before it is kept: {kept}" if kept.exists() else "No checkpoint had been written yet"
            raise UserError(
                f"step {step}: the loss is {loss}. Rows of this batch: {', '.join(row_ids)}. {where}. Lower the learning rate, or look at these rows."
            )

    # --- checkpoint ---

    def save(self, state: dict) -> None:
        """Write checkpoint/ atomically: the old one stays whole until the new one is complete."""
        state = {**state, "metrics": len(self.metrics), "seconds": self.seconds()}
        new, old, current = (self.folder / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint"))
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            with open(new / "state.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise UserError(f"{new}: the checkpoint could not be written ({error}). The one before it is kept.") from error
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> dict | None:
        """The last checkpoint's state when resuming, else None; metrics.jsonl is cut back to its step."""
        if not self.args.resume:
            return None
        require(not (self.folder / "summary.json").exists(), f"--resume {self.folder}: this run is finished; see its summary.json.")
        file = next((f for f in (self.folder / "checkpoint/state.pt", self.folder / "checkpoint.old/state.pt") if f.exists()), None)
        log = self.folder / "metrics.jsonl"
        if file is None:  # stopped before its first checkpoint: the same run from the beginning
            print(f"{self.folder}: no checkpoint yet, so the run starts from its first step", flush=True)
            log.unlink(missing_ok=True)
            return None
        state = torch.load(file, map_location="cpu", weights_only=True)
        lines = log.read_text().splitlines()[: state["metrics"]] if log.exists() else []
        self.metrics = [json.loads(line) for line in lines]
        temporary = log.with_suffix(".new")
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.replace(log)
        self.seconds_before = state["seconds"]
        return state

    # --- the end ---

    def seconds(self) -> float:
        """Wall-clock seconds of this run, resumed parts included."""
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self, summary: dict, curves: tuple[str, ...]) -> None:
        """Write summary.json and curves.png, close the logs and print the result."""
        if self.bar:
            self.bar.close()
        summary = {
            **summary,
            "steps": len(self.metrics),
            "seconds": round(self.seconds(), 1),
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory()),
        }
        for name, value in self.throughput().items():
            summary[name] = round(value, 1)
        summary["phase_seconds"] = {name: round(phase["seconds"], 1) for name, phase in self.phases.items()}
        summary["phase_peak_memory_bytes"] = {name: phase["peak_memory_bytes"] for name, phase in self.phases.items()}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_curves(self.metrics, curves, self.folder / "curves.png", self.folder.name)
        for name in ("win_rate", "eval_judge_win_rate"):
            if self.writer and summary.get(name) is not None:
                self.writer.add_scalar(f"eval/{name}", summary[name], len(self.metrics))
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        print(summary_text(summary, self.folder))

    def finish_dry_run(self, policy) -> None:
        """End a `--dry-run` after its step: write dry_run.json and print what each phase took. Nothing is evaluated or saved."""
        if self.bar:
            self.bar.close()
        if self.writer:
            self.writer.close()
        dry_run.write(dry_run.report(self.args, policy, self.phases, environment()), self.folder)


def environment() -> dict:
    """Where a run came from: git commit and dirty flag of this code, package versions, device."""
    here = Path(__file__).parent

    def git(*words):
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "tyro", "numpy", "peft", "cleanalign"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    status = None
    with contextlib.suppress(OSError):
        status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": git("rev-parse", "HEAD") if status is not None else None,
        "git_dirty": bool(status) if status is not None else None,
        "versions": versions,
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
    }


def peak_memory() -> int:
    """Peak bytes since the last reset: of the CUDA allocator where there is one, else of the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Start `peak_memory` anew where the system can: CUDA and Linux. Elsewhere it stays the peak since the start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def plot_curves(metrics: list[dict], names: tuple[str, ...], path: Path, title: str) -> None:
    """One small panel for each metric over steps. Without matplotlib nothing is drawn, and that is said."""
    try:
        import matplotlib
    except ImportError:
        print("curves.png not drawn: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = tuple(n for n in names if any(n in row for row in metrics))
    if not names:
        return
    columns = min(3, len(names))
    figure, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(4.2 * columns, 2.7 * -(-len(names) // columns)), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), (int, float))]
        axis.plot(*zip(*points, strict=True), linewidth=1.4, marker="." if len(points) < 12 else None)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# evaluation
# ---------------------------------------------------------------------------------------------


def evaluate(
    run: Run, policy, start, tokenizer, ends: list[int], rows: list, prompts: list[list[int]], judge: Judge, eval_judge: Judge | None
) -> dict:
    """Policy against the starting model on held-out prompts, one sampled reply a side; writes samples.jsonl.

    Returns the summary's figures. win_rate = mean of 1[p > ½] + ½ · 1[p = ½], p = p(policy ≻ start); kl = mean over
    the policy's replies of log π(y) − log π_start(y), nats per reply, an unbiased estimate of KL(policy ‖ start).
    Both orders are asked of a judge without a scalar.
    """
    args, device = run.args, common.head(policy)[0].device
    settings = dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        max_rows=args.sample_rows,
        decoding=args.decoding,
    )
    seed = common.derive_seed("evaluation", 0)
    replies, texts = {}, {}
    for name, model in (("start", start), ("policy", policy)):
        groups = common.sample(model, prompts, ends, seed=seed, progress=f"evaluate: {name}", **settings)
        replies[name] = [group[0] for group in groups]
        texts[name] = [common.decode(tokenizer, reply) for reply in replies[name]]
    asked = [row.prompt for row in rows]
    p = both_orders(judge, asked, texts["policy"], texts["start"]).tolist()
    heat = args.temperature or 1.0
    log_ratio = [
        a[0] - b[0]
        for a, b in zip(
            *(
                common.sequence_logprobs(m, prompts, [[r] for r in replies["policy"]], heat, device, args.micro_batch_tokens)
                for m in (policy, start)
            ),
            strict=True,
        )
    ]
    p_eval = both_orders(eval_judge, asked, texts["policy"], texts["start"]).tolist() if eval_judge else [None] * len(rows)
    with open(run.folder / "samples.jsonl", "w") as file:
        for row, before, after, preference, other in zip(rows, texts["start"], texts["policy"], p, p_eval, strict=True):
            sample = {
                "id": row.id,
                "prompt": common.prompt_text(row.prompt),
                "start": before,
                "policy": after,
                "preference": preference,
                "eval_preference": other,
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    score = {name: sum(judge.score(asked, texts[name]).tolist()) / len(rows) if judge.score else None for name in texts}
    win_rate, interval = win_rate_interval(p)
    eval_rate, eval_interval = win_rate_interval(p_eval) if eval_judge else (None, None)
    return {
        "win_rate": win_rate,
        "win_rate_interval": interval,
        "tie_rate": sum(x == 0.5 for x in p) / len(p),
        "mean_preference": sum(p) / len(p),
        "eval_judge_win_rate": eval_rate,
        "eval_judge_win_rate_interval": eval_interval,
        "score_before": score["start"],
        "score_after": score["policy"],
        "kl": sum(log_ratio) / len(log_ratio),
        "length_before": sum(map(len, replies["start"])) / len(rows),
        "length_after": sum(map(len, replies["policy"])) / len(rows),
        "distinct_2_before": distinct_n(texts["start"], 2),
        "distinct_2_after": distinct_n(texts["policy"], 2),
        **(
            {f"{k}_{when}": v for when, name in (("before", "start"), ("after", "policy")) for k, v in judge.measure(texts[name]).items()}
            if judge.measure
            else {}
        ),
        "judge": judge.name,
        "eval_judge": eval_judge.name if eval_judge else None,
        "eval_prompts": len(rows),
    }


def win_rate_interval(preferences: list[float], resamples: int = 10_000) -> tuple[float, list[float]]:
    """Win rate, mean of 1[p > ½] + ½ · 1[p = ½], and its 95 % percentile-bootstrap interval over prompts (fixed seed)."""
    wins = torch.tensor([1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in preferences])
    draw = torch.randint(len(wins), (resamples, len(wins)), generator=torch.Generator().manual_seed(0))
    low, high = wins[draw].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return wins.mean().item(), [low, high]


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct n-grams of lower-cased words over all n-grams, across all texts: 1 is never a repetition."""
    grams = [tuple(words[i : i + n]) for words in (text.lower().split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def summary_text(summary: dict, folder: Path) -> str:
    """The result as a person reads it: before and after in a table, three samples, where everything lies."""

    def rate(key):
        if summary.get(key) is None:
            return "–"
        low, high = summary[f"{key}_interval"]
        return f"{summary[key]:.3f}  [{low:.3f}, {high:.3f}]"

    def cell(key):
        return "–" if summary.get(key) is None else f"{summary[key]:.3f}"

    lines = [
        "",
        f"policy against the starting model, {summary['eval_prompts']} held-out prompts",
        f"  win rate, judge {summary['judge']:<22} {rate('win_rate')}",
        f"  win rate, judge {summary['eval_judge'] or '–':<22} {rate('eval_judge_win_rate')}   (never trained on)",
        "                                         before    after",
    ]
    for label, key in (("judge's score", "score"), ("reply length, tokens", "length"), ("distinct bigrams", "distinct_2")):
        lines.append(f"  {label:<38} {cell(key + '_before'):>6}   {cell(key + '_after'):>6}")
    lines.append(f"  KL from the starting model: {summary['kl']:.2f} nats per reply")
    with open(folder / "samples.jsonl") as file:
        samples = [json.loads(line) for line in file]
    for sample in random.Random(0).sample(samples, min(3, len(samples))):
        lines += [
            "",
            f"  prompt   {_one_line(sample['prompt'])}",
            f"  before   {_one_line(sample['start'])}",
            f"  after    {_one_line(sample['policy'])}",
        ]
    minutes = summary["seconds"] / 60
    lines += [
        "",
        f"{summary['steps']} steps, {minutes:.1f} minutes, peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB",
        f"all of it in {folder}/ (model/ loads with transformers)",
    ]
    return "\n".join(lines)


def _one_line(text: str, width: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def write_model(run: Run, policy, tokenizer, summary: dict) -> None:
    """Write model/: weights, tokenizer and a model card that says how it was made and how it scored."""
    folder = run.folder / "model"
    common.save_model(policy, tokenizer, folder)
    low, high = summary["win_rate_interval"]
    source = common.HUB_MODELS.get(run.args.model, run.args.model)
    base = f"base_model: {source}\n" if "/" in source and not Path(source).exists() else ""
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\n{base}tags: [cleanalign, {run.script}]\n---\n\n"
        f"# {run.folder.name}\n\n{run.args.model}, trained by cleanalign's `{run.script}.py` on the prompts of `{run.args.dataset}` with the judge `{run.args.judge}`.\n\n"
        f"Win rate against the starting model on {summary['eval_prompts']} held-out prompts: {summary['win_rate']:.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}), by that judge. All arguments:\n\n"
        f"```json\n{json.dumps(dataclasses.asdict(run.args), indent=2)}\n```\n"
    )
