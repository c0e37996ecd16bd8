"""Every figure that needs a GPU: decoding, transformers' own generation, training, three scripts. Started by
gpu.sh.

    benchmark/gpu.sh             # on a CUDA machine, under nine minutes; writes benchmark/results/<gpu>.json
    benchmark/gpu.sh --smoke     # the same code with tiny models, on a CPU too; its figures mean nothing
    python benchmark/gpu.py --parts decode

Each part runs in a process and a time limit of its own and writes each figure as it comes, so that one that
fails or is late loses nothing else. The bound that decoding is held against, in bytes for one step that draws
a token for each of R rows:

    weights, all but the embedding table, once  +  R · (P + T / 2) · 2 · layers · H_kv · D · element size

with prompts of P and replies of T tokens (the cache is T / 2 tokens into the replies on average), over the
bandwidth that a copy reaches in the same run. It leaves out arithmetic, which at 256 rows is of the same
order.
"""

from __future__ import annotations

import json
import operator
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch
import torch.nn.functional as F
import transformers
import tyro

import common
from cleanalign.embedded import embedded_model_folder
from cleanalign.errors import UserError, near, require
from cleanalign.models import choose_sample_rows, key_value_numbers, resolve_device
from cleanalign.synthetic import CONFIGS

LLAMA3_8B = CONFIGS["llama3-8b"][1]
TINY = LLAMA3_8B | dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
)
# each part's limit, in the order they run
SECONDS = {"decode": 170, "train": 150, "scripts": 110, "generate": 95}


class Figures:
    """A part's figures: written to its file, and printed, one by one."""

    def __init__(self, file: Path):
        self.file, self.values = file, {}

    def __setitem__(self, name: str, value) -> None:
        self.values[name] = value
        self.file.write_text(json.dumps(self.values))
        print(f"{name}: {json.dumps(value)}", flush=True)

    def attempt(self, name: str, measure) -> None:
        """`measure()` as the figure `name`, or why there is none."""
        try:
            self[name] = measure()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self[name] = f"not available: {type(error).__name__}: {first[:300]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call, repeats: int = 1, warmup: int = 0) -> float:
    """Mean seconds of `call()`, device included."""
    for _ in range(warmup):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def ceilings(device, smoke: bool) -> dict:
    """What this machine reaches: bytes a second (read and written) of a copy, and bf16 multiply-adds as FLOP
    a second."""
    source = torch.empty(2**22 if smoke else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 256 if smoke else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * source.numel() / seconds(lambda: target.copy_(source), 10, 3),
        "bf16_flops_per_second": 2 * n**3 / seconds(lambda: a @ b, 10, 3),
    }


def random_model(shape: dict, device, seed: int = 0):
    """A Llama of that shape with random weights, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**shape), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    return torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


def decode(figures: Figures, device, smoke: bool) -> None:
    """Tokens a second and share of the bandwidth bound: one model, the mixture, other ways to launch, and
    where the time goes."""
    shape = TINY if smoke else LLAMA3_8B
    P, T, sizes = (32, 16, (4, 8)) if smoke else (512, 512, (64, 256))
    figures["ceilings"] = limits = ceilings(device, smoke)
    model, reference = random_model(shape, device, 0), random_model(shape, device, 1)
    # 256 rows of a mixture of two such models need 64 GiB of caches: on an 80 GB card fewer
    most = choose_sample_rows(0 if device.type == "cuda" else sizes[1], [model, reference], P + T, 0)
    sizes = (sizes[0], min(sizes[1], most))
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    cache = 2 * key_value_numbers(transformers.LlamaConfig(**shape))
    graphs = "graphs" if device.type == "cuda" else "eager"
    steps = {}

    def measure(rows, length=T, decoding=graphs, **mixture):
        prompts = random_prompts(rows, P, shape["vocab_size"])
        settings = dict(seed=0, max_rows=rows, decoding=decoding, **mixture)
        prefill = seconds(lambda: common.sample(model, prompts, [-1], max_new_tokens=1, **settings), warmup=1)
        stats = {}
        whole = seconds(
            lambda: common.sample(model, prompts, [-1], max_new_tokens=length, stats=stats, **settings)
        )
        assert stats["tokens"] == rows * length
        step = (whole - stats["warmup_seconds"] - prefill) / (length - 1 - stats["warmup_steps"])
        bound = (weights + rows * (P + length / 2) * cache) / limits["copy_bytes_per_second"]
        rate = rows * length / (prefill + (length - 1) * step)  # prefill included, warm-up not
        return {
            "tokens_per_second": rate,
            "milliseconds_per_step": 1e3 * step,
            "bound_milliseconds": 1e3 * bound,
            "share_of_bound": bound / step,
            "prefill_seconds": prefill,
            "warmup_seconds": stats["warmup_seconds"],
        }

    for rows in sizes:
        figures.attempt(f"{graphs}, {rows} rows", lambda rows=rows: steps.setdefault(rows, measure(rows)))
        figures.attempt(
            f"mixture, {rows} rows",
            lambda rows=rows: steps.setdefault(-rows, measure(rows, mixture=(reference, 0.125))),
        )
        if rows in steps and -rows in steps:
            single, mixed = (steps[key]["milliseconds_per_step"] for key in (rows, -rows))
            figures[f"mixture ratio, {rows} rows"] = mixed / single
    figures.attempt(
        f"attention alone, {sizes[-1]} rows", lambda: attention_alone(shape, sizes[-1], P + T // 2, device)
    )
    figures.attempt(
        f"one kernel at a time, {sizes[0]} rows",
        lambda: measure(sizes[0], length=min(T, 64), decoding="eager"),
    )
    figures.attempt(
        f"where eager steps spend the device's time, {sizes[0]} rows",
        lambda: profile(model, sizes[0], P, shape, device),
    )
    if device.type == "cuda":
        figures.attempt(f"compiled, {sizes[0]} rows", lambda: measure(sizes[0], decoding="compiled"))
        figures.attempt(f"compiled, {sizes[-1]} rows", lambda: measure(sizes[-1], decoding="compiled"))


def attention_alone(shape: dict, rows: int, length: int, device) -> dict:
    """Microseconds of one layer's attention of one token a row over its cache, by implementation."""
    H, H_kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    D = shape["hidden_size"] // H
    make = lambda *sizes: torch.randn(*sizes, device=device, dtype=torch.bfloat16)  # noqa: E731
    query, key, value = make(rows, H, 1, D), make(rows, H_kv, length, D), make(rows, H_kv, length, D)
    mask = torch.zeros(rows, 1, 1, length, device=device, dtype=torch.bfloat16)
    grouped = query.view(rows, H_kv, H // H_kv, D)
    repeat = lambda x: x.repeat_interleave(H // H_kv, 1)  # noqa: E731

    def by_matmul():
        scores = grouped @ key.transpose(2, 3) * D**-0.5 + mask
        return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value

    def by_backend(backend):
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)

    ways = {
        "transformers' repeated keys": lambda: F.scaled_dot_product_attention(
            query, repeat(key), repeat(value), attn_mask=mask
        ),
        "grouped sdpa": lambda: F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask),
        "grouped matmul": by_matmul,
    }
    for backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        ways[f"grouped sdpa, {backend}"] = lambda backend=backend: by_backend(
            getattr(torch.nn.attention.SDPBackend, backend)
        )
    result = {"bytes": 2 * key.nbytes}
    for name, way in ways.items():
        try:
            result[name] = 1e6 * seconds(way, 20, 3)
        except RuntimeError as error:
            result[name] = f"not available: {str(error).splitlines()[0][:120]}"
    return result


def profile(model, rows: int, P: int, shape: dict, device) -> dict:
    """Milliseconds of device time by kernel, of one prefill and eight steps."""
    activity = torch.profiler.ProfilerActivity
    kind, total = activity.CPU, "self_cpu_time_total"
    if device.type == "cuda":
        kind, total = activity.CUDA, "self_device_time_total"
    prompts = random_prompts(rows, P, shape["vocab_size"])
    with torch.profiler.profile(activities=[kind]) as recorded:
        common.sample(model, prompts, [-1], max_new_tokens=9, seed=0, max_rows=rows, decoding="eager")
        wait()
    microseconds = operator.attrgetter(total)
    events = sorted(recorded.key_averages(), key=microseconds, reverse=True)[:16]
    return {event.key[:90]: [round(microseconds(event) / 1e3, 3), event.count] for event in events}


def generate(figures: Figures, device, smoke: bool) -> None:
    """The same prompts and lengths through `common.sample` and through transformers' two ways to generate."""
    shape = TINY if smoke else LLAMA3_8B
    P, T, rows = (32, 16, 4) if smoke else (512, 128, 64)
    model = random_model(shape, device)
    model.generation_config.eos_token_id = None
    prompts = random_prompts(rows, P, shape["vocab_size"])
    ids = torch.tensor(prompts, device=device)
    settings = dict(max_new_tokens=T, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
    ours = {}

    def sample():
        stats = {}
        ours["seconds"] = seconds(
            lambda: common.sample(model, prompts, [-1], max_new_tokens=T, seed=0, max_rows=rows, stats=stats)
        )
        # in every call of ours; theirs have it in the first call only
        ours["warmup_seconds"] = stats["warmup_seconds"]
        return ours

    def against(call):
        first = seconds(call)
        theirs = seconds(call)
        return {
            "first_call_seconds": first,
            "seconds": theirs,
            "theirs_over_ours": theirs / ours["seconds"],
            "theirs_over_ours_without_warmup": theirs / (ours["seconds"] - ours["warmup_seconds"]),
        }

    def continuous():
        small = None  # all memory
        if smoke:
            small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
        config = transformers.GenerationConfig(**settings)
        done = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        assert all(len(output.generated_tokens) == T for output in done.values()) and len(done) == rows

    def static():
        config = transformers.GenerationConfig(**settings, cache_implementation="static")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert out.shape == (rows, P + T)

    sample()  # warms up kernels
    figures.attempt("common.sample", sample)
    figures.attempt("generate_batch, continuous batching", lambda: against(continuous))
    figures.attempt("generate, static cache", lambda: against(static))


def run_script(script: str, flags: list[str]) -> subprocess.CompletedProcess:
    """One of the scripts, in a process of its own."""
    command = [sys.executable, f"{script}.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)


def last_lines(done: subprocess.CompletedProcess) -> str:
    told = [line.strip("│ ") for line in done.stderr.splitlines() if any(c.isalpha() for c in line)]
    return " / ".join(told[-3:])[:300] or f"exit status {done.returncode}"


def train(figures: Figures, device, smoke: bool) -> None:
    """One step at 1,024 tokens with the 8B recipe's shapes and random weights: memory by phase, tokens a
    second, utilisation."""
    shared = "--dry-run --max-prompt-length 512 --max-new-tokens 512 --judge sentiment".split()
    for name, rank in (("LoRA", "32"), ("all weights", "0")):
        with tempfile.TemporaryDirectory() as folder:
            model = ["--model", tiny_world(Path(folder))[0]] if smoke else ["--model", "llama3-8b"]

            flags = [*model, *shared, "--lora-rank", rank, "--run-dir", folder]

            def measure(flags=flags, folder=folder):
                done = run_script("selm", flags)
                written = sorted(Path(folder).rglob("dry_run.json"))
                if done.returncode or not written:
                    raise RuntimeError(f"selm.py --dry-run: {last_lines(done)}")
                return json.loads(written[0].read_text())

            figures.attempt(name, measure)


def tiny_world(folder: Path) -> list[str]:
    """A tiny model folder and the flags that make the scripts run on it in seconds."""
    sys.path.insert(0, str(record.ROOT / "tests"))
    import tiny

    model = tiny.folder(folder / "model")
    data, judge = tiny.prompts_file(folder / "prompts.jsonl"), tiny.judge_file(folder / "judges.py")
    what = ["--model", model, "--dataset", data, "--judge", f"{judge}:more_good"]
    size = "--max-steps 2 --num-prompts 16 --batch-size 8 --eval-prompts 8 --max-new-tokens 6".split()
    return [model, *what, *size]


def scripts(figures: Figures, device, smoke: bool) -> None:
    """Each script's default run: seconds to its win rate, where that is at least 0.82 (evaluated once, at the
    end)."""
    if not smoke:
        embedded_model_folder()  # fetched and converted beforehand
    for script in ("selm", "ipo_md", "nash_md"):
        with tempfile.TemporaryDirectory() as folder:
            flags = tiny_world(Path(folder))[1:] if smoke else []
            flags += ["--eval-judge", "None", "--save-every", "0", "--run-dir", folder, "--run-name", "run"]

            def measure(script=script, flags=flags, folder=folder):
                done = run_script(script, flags)
                if done.returncode:
                    raise RuntimeError(f"{script}.py: {last_lines(done)}")
                summary = json.loads((Path(folder) / "run/summary.json").read_text())
                reached = summary["win_rate"] >= 0.82
                kept = {name: summary.get(name) for name in KEPT}
                return {"seconds_to_win_rate_0.82": summary["seconds"] if reached else None, **kept}

            figures.attempt(script, measure)


# of a run's summary
KEPT = ("win_rate", "seconds", "steps", "phase_seconds", "peak_memory_bytes", "tokens_per_second/sampling")
PARTS = {"decode": decode, "train": train, "scripts": scripts, "generate": generate}


def main(
    parts: tuple[str, ...] = tuple(SECONDS),
    smoke: bool = False,
    out: str | None = None,
    part: str | None = None,
) -> None:
    """Measure and write the figures.

    Args:
        parts: which parts to run, in this order: decode, train, scripts, generate.
        smoke: tiny shapes, to see that everything runs.
        out: JSON file to write; by default benchmark/results/<gpu>.json, and with --smoke a temporary one.
        part: run this one part in this process (what the others are started with).
    """
    device = resolve_device("auto")
    if part is not None:
        PARTS[part](Figures(Path(out)), device, smoke)
        return
    require(
        smoke or device.type == "cuda", "these shapes need a CUDA machine; --smoke runs tiny ones anywhere."
    )
    for name in parts:
        require(name in PARTS, f"--parts {name}: {near(name, PARTS)}")
    result = {**record.origin(), "smoke": smoke, "parts": {}}
    # a machine that gets a copy of the files has no git history
    for commit in record.ROOT.glob(".gpu/*/commit"):
        result["git_commit"] = result["git_commit"] or commit.read_text().strip()
    gpu = "-".join(result["device_name"].lower().split())
    file = Path(tempfile.gettempdir()) / "gpu-smoke.json" if smoke else record.RESULTS / f"{gpu}.json"
    file = Path(out) if out else file
    for name in parts:
        start = time.perf_counter()
        with tempfile.NamedTemporaryFile(suffix=".json") as scratch:
            command = [sys.executable, __file__, "--part", name, "--out", scratch.name]
            command += ["--smoke"] if smoke else []
            process = subprocess.Popen(command, start_new_session=True)
            try:
                status = process.wait(timeout=SECONDS[name])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the scripts it started
                process.wait()
                status = f"stopped after {SECONDS[name]} s"
            figures = Path(scratch.name).read_text()
        took = round(time.perf_counter() - start, 1)
        figures = json.loads(figures) if figures else {}
        result["parts"][name] = {"status": status, "seconds": took, "figures": figures}
        record.write(file, result)
        print(f"== {name}: status {status}, {took} s; so far in {file}", flush=True)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
