"""Seconds of one optimiser step, ours and TRL's, on this machine's CPU, with the same model, prompts and
lengths.

    python benchmark/vs_trl.py nash --micro-batch-tokens 512 --steps 1 --our-steps 4    # 2 min
    python benchmark/vs_trl.py nash --micro-batch-tokens 512 --steps 1 --our-steps 4 --new-tokens 128  # 7 min
    python benchmark/vs_trl.py ipo             # ipo_md.py --beta 0, online-IPO
    python benchmark/vs_trl.py nash --smoke    # a tiny random model, in seconds: does it work?

Against TRL 1.13.0's NashMDTrainer, and TRL 1.16.0's OnlineDPOTrainer with loss_type="ipo". TRL lives in an
environment of its own; where it is missing, the error says how to make it. A step is sampling, judging,
log-probs, backward and update. Each side is a process that loads once and steps on request; the sides take
turns, so that a slow minute of the machine hits all of them. Replies cannot end early, so every side samples
and trains on the same number of tokens; that is checked, as are the prompts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import record
import tyro
import vs_trl_ours
from tqdm import tqdm

import common
from cleanalign.data import load_rows
from cleanalign.embedded import cache_folder
from cleanalign.errors import UserError, require
from cleanalign.models import load_tokenizer, model_source

HERE = Path(__file__).parent
TRL = {"nash": "1.13.0", "ipo": "1.16.0"}  # the last release with NashMDTrainer; and a current one
PINS = "torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 tokenizers==0.23.3 vaderSentiment==3.3.2"
TRL_SIDES = {
    "TRL, its defaults": True,
    "TRL, no gradient checkpointing": False,
}  # side: its gradient_checkpointing
OURS = "ours"


class Side:
    """A process that does one optimiser step for each request."""

    def __init__(self, name: str, command: list[str], log: Path):
        self.name, self.command, self.log = name, command, log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        self.about = self._answer()

    def step(self, **request) -> dict:
        """What one optimiser step took. Raises `UserError` with the last lines it printed if the process
        died."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise UserError(
                f"{self.name} ended with {self.process.returncode}:\n"
                + "\n".join(self.log.read_text().splitlines()[-15:])
            )
        return json.loads(line)


def main(
    algorithm: tyro.conf.Positional[Literal["nash", "ipo"]],
    new_tokens: int = 32,
    batch_size: int = 8,
    steps: int = 2,
    our_steps: int = 3,
    warmup_tokens: int = 8,
    checkpointing: Literal["both", "on", "off"] = "both",
    micro_batch_tokens: int = 0,
    model: str = "smollm2-135m",
    trl_env: str | None = None,
    smoke: bool = False,
    out: str | None = None,
) -> None:
    """Time the sides and write the result.

    Args:
        algorithm: nash or ipo.
        new_tokens: tokens of every reply.
        batch_size: prompts in one step; each gets two replies.
        steps: measured steps of each side of TRL's, on prompts of their own.
        our_steps: our steps for each of these, on the same prompts.
        warmup_tokens: length of the replies in the one step before, which does not count.
        checkpointing: TRL with gradient checkpointing (its default), without, or both; one of them halves the
            time this takes.
        micro_batch_tokens: ours; 0 is the recipe's. TRL computes the batch at once.
        model: recipe or folder.
        trl_env: TRL's virtual environment: a folder, or a name in the cache folder; None is trl-VERSION
            there.
        smoke: a tiny random model and 6 new tokens, nothing written unless --out is given.
        out: JSON file to write; None is benchmark/results/vs_trl_ALGORITHM_NEW-TOKENS.json.
    """
    environment = cache_folder() / (trl_env or f"trl-{TRL[algorithm]}")  # a whole path stays what it is
    check_environment(environment, TRL[algorithm])
    with tempfile.TemporaryDirectory() as scratch:
        if smoke:
            model, new_tokens, warmup_tokens = tiny_model(Path(scratch) / "tiny"), 6, 4
        wanted = (True, False) if checkpointing == "both" else (checkpointing == "on",)
        theirs = {name: on for name, on in TRL_SIDES.items() if on in wanted}
        settings = {
            "algorithm": algorithm,
            "model": model,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            "micro_batch_tokens": micro_batch_tokens,
        }
        prompts = Path(scratch) / "prompts.jsonl"
        write_prompts(prompts, settings)
        commands = commands_of(settings, theirs, environment, prompts)
        rounds = [(warmup_tokens, 1)] + [(new_tokens, our_steps)] * steps
        sides = measure(commands, rounds, batch_size, Path(scratch))
    result = {
        **record.origin(),
        "cpu": cpu_name(),
        "algorithm": algorithm,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "sides": sides,
        "ratio": {name: sides[name]["median_seconds"] / sides[OURS]["median_seconds"] for name in theirs},
    }
    if out or not smoke:
        path = Path(out) if out else record.RESULTS / f"vs_trl_{algorithm}_{new_tokens}.json"
        record.write(path, result)
        print(f"written: {path}")
    print(table(result))


def check_environment(folder: Path, version: str) -> None:
    """Raises `UserError` with the commands that make TRL's environment, unless it is there with this version
    of TRL."""
    make = f"Make it:\n  python -m venv {folder}\n  {folder}/bin/pip install trl=={version} {PINS}"
    python = folder / "bin" / "python"
    require(python.exists(), f"--trl-env {folder}: no virtual environment there. {make}")
    ask = "import importlib.metadata as m; print(m.version('trl'), m.version('vaderSentiment'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"--trl-env {folder}: trl or vaderSentiment is missing there. {make}")
    found = done.stdout.split()[0]
    require(
        found == version, f"--trl-env {folder}: TRL {found} is there, this comparison needs {version}. {make}"
    )


def tiny_model(folder: Path) -> str:
    """A folder with two random layers and the default model's tokenizer."""
    import transformers

    tokenizer = load_tokenizer("smollm2-135m")
    shape = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ends = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ends)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def commands_of(settings: dict, theirs: dict[str, bool], environment: Path, prompts: Path) -> dict[str, list]:
    """Each side's command.

    Args:
        settings: what both workers take; see vs_trl_ours.py.
        theirs: TRL's sides, their gradient checkpointing by name.
        environment: TRL's virtual environment.
        prompts: file of the prompts, for TRL's sides.
    """
    commands = {OURS: [sys.executable, str(HERE / "vs_trl_ours.py"), json.dumps(settings)]}
    for name, on in theirs.items():
        extra = {"prompts": str(prompts), "gradient_checkpointing": on}
        extra["model"] = model_source(settings["model"])
        python, script = environment / "bin" / "python", HERE / "vs_trl_theirs.py"
        commands[name] = [str(python), str(script), json.dumps({**settings, **extra})]
    return commands


def measure(
    commands: dict[str, list], rounds: list[tuple[int, int]], batch_size: int, scratch: Path
) -> dict[str, dict]:
    """What each side says of itself, every step it did and their median seconds.

    Args:
        commands: each side's.
        rounds: for each, the replies' length and how often our side steps; the first is the warm-up.
        batch_size: prompts in one step.
        scratch: folder for the sides' logs.
    """
    bar = tqdm(total=sum(repeats + len(commands) - 1 for _, repeats in rounds), unit="step")
    sides, done = [], {name: [] for name in commands}
    try:
        for name, command in commands.items():
            bar.set_description(f"{name}: loading")
            sides.append(Side(name, command, scratch / f"{len(sides)}.log"))
        for batch, (length, repeats) in enumerate(rounds):
            for side in sides:
                for repeat in range(repeats if side.name == OURS else 1):
                    bar.set_description(f"{side.name}: {length} new tokens")
                    step = side.step(new_tokens=length, batch=batch, seed=repeat)
                    done[side.name].append(step)
                    check_step(side.name, step, 2 * batch_size * length, done[OURS][-1])
                    bar.update()
    finally:
        for side in sides:
            side.close()
        bar.close()
    results = {}
    for side in sides:
        warmup, *measured = done[side.name]
        median = statistics.median(step["seconds"] for step in measured)
        results[side.name] = {**side.about, "median_seconds": median, "warmup": warmup, "steps": measured}
    return results


def write_prompts(file: Path, settings: dict) -> None:
    """The training prompts of our side, in its order, as TRL's side reads them."""
    _, args = vs_trl_ours.arguments(settings)
    rows, _ = load_rows(args.dataset, held_out=args.eval_prompts)
    tokenizer = load_tokenizer(args.model)
    rows, _ = common.encode_rows(
        tokenizer, rows, args.max_prompt_length, args.num_prompts, args.seed, "training prompts"
    )
    with open(file, "w") as lines:
        for row in rows:
            single = [{"role": "user", "content": row.prompt}]
            prompt = row.prompt if isinstance(row.prompt, list) else single
            lines.write(json.dumps({"prompt": prompt}) + "\n")


def check_step(name: str, step: dict, new_tokens: int, ours: dict) -> None:
    """Raises `UserError` unless a step sampled as many tokens as it should, after prompts of the same total
    length as ours."""
    require(
        step["new_tokens"] == new_tokens,
        f"{name}: {step['new_tokens']} tokens were sampled, not {new_tokens}: the work is not equal.",
    )
    same = step["prompt_tokens"] == ours["prompt_tokens"]
    require(
        same,
        f"{name}: its prompts have {step['prompt_tokens']} tokens, ours {ours['prompt_tokens']}: "
        "they are not the same.",
    )


def cpu_name() -> str:
    """The processor's name and the number of cores this process may use."""
    info, name = Path("/proc/cpuinfo"), "unknown CPU"
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def table(result: dict) -> str:
    """Markdown: one line a side."""
    lines = [
        "| side | seconds a step | of it sampling | peak memory | ratio to ours |",
        "|---|---|---|---|---|",
    ]
    for name, side in result["sides"].items():
        sampling = statistics.median(step["sampling"] for step in side["steps"])
        memory = max(step["peak_memory_bytes"] for step in side["steps"]) / 1e9
        ratio = f"{result['ratio'][name]:.1f}" if name in result["ratio"] else ""
        lines.append(
            f"| {name} | {side['median_seconds']:.2f} | {sampling:.2f} | {memory:.1f} GB | {ratio} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(f"error: {error}")
