"""Seconds of one optimiser step, ours and TRL's, on the same model, prompts and lengths, on this machine's CPU.

    python benchmark/vs_trl.py nash --micro-batch-tokens 768 --steps 1 --our-steps 4      # against TRL 1.13.0's NashMDTrainer, 32 new tokens; 2 minutes
    python benchmark/vs_trl.py nash --micro-batch-tokens 768 --steps 1 --our-steps 4 --new-tokens 128    # 7 minutes
    python benchmark/vs_trl.py ipo                       # ipo_md.py --beta 0 against TRL 1.16's OnlineDPOTrainer, loss_type="ipo"
    python benchmark/vs_trl.py nash --smoke              # the same on a tiny random model, in seconds: does it work?

TRL lives in an environment of its own; where it is missing, the error says how to make it. A step is sampling, judging, log-probs, backward
and update. Each side is a process that loads once and steps on request; the sides take turns, so that a slow minute of the machine hits
all of them. Replies cannot end early, so every side samples and trains on the same number of tokens; that is checked, as are the prompts.
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

import tyro
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import vs_trl_ours  # noqa: E402

import common  # noqa: E402
import experiment  # noqa: E402
from common import UserError, require  # noqa: E402

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
        """What one optimiser step took. Raises `UserError` with the last lines it printed if the process died."""
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
        checkpointing: TRL with gradient checkpointing (its default), without, or both; one of them halves the time this takes.
        micro_batch_tokens: ours; 0 is the recipe's. TRL computes the batch at once.
        model: recipe or folder.
        trl_env: folder of TRL's virtual environment; None is CACHE/trl-VERSION.
        smoke: a tiny random model and 6 new tokens, nothing written unless --out is given.
        out: JSON file to write; None is benchmark/results/vs_trl_ALGORITHM_NEW-TOKENS.json.
    """
    environment = Path(trl_env) if trl_env else common.cache_folder() / f"trl-{TRL[algorithm]}"
    check_environment(environment, TRL[algorithm])
    with tempfile.TemporaryDirectory() as scratch:
        if smoke:
            model, new_tokens, warmup_tokens = tiny_model(Path(scratch) / "tiny"), 6, 4
        theirs = {
            name: on
            for name, on in TRL_SIDES.items()
            if checkpointing == "both" or on == (checkpointing == "on")
        }
        settings = {
            "algorithm": algorithm,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            "micro_batch_tokens": micro_batch_tokens,
        }
        lengths = [(warmup_tokens, 1)] + [(new_tokens, our_steps)] * steps
        sides = measure(settings, lengths, model, theirs, environment, Path(scratch))
    result = {
        "command": " ".join(["python", *sys.argv]),
        **experiment.environment(),
        "cpu": cpu_name(),
        "algorithm": algorithm,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "sides": sides,
        "ratio": {name: sides[name]["median_seconds"] / sides[OURS]["median_seconds"] for name in theirs},
    }
    if out or not smoke:
        path = Path(out) if out else HERE / "results" / f"vs_trl_{algorithm}_{new_tokens}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")
    print(table(result))


def check_environment(folder: Path, version: str) -> None:
    """Raises `UserError` with the commands that make TRL's environment, unless it is there with this version of TRL."""
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

    tokenizer = common.load_tokenizer("smollm2-135m")
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


def measure(
    settings: dict,
    rounds: list[tuple[int, int]],
    model: str,
    theirs: dict[str, bool],
    environment: Path,
    scratch: Path,
) -> dict:
    """What each side says of itself, every step it did and their median seconds.

    Args:
        settings: what both workers take; see vs_trl_ours.py.
        rounds: for each, the replies' length and how often our side steps; the first is the warm-up.
        theirs: TRL's sides, their gradient checkpointing by name.
        environment: TRL's virtual environment.
        scratch: folder for the prompts and the sides' logs.
    """
    script, _ = vs_trl_ours.ALGORITHMS[settings["algorithm"]]
    rows, _, _ = vs_trl_ours.prompts_of(script.RECIPES["smollm2-135m"], model)
    prompts = scratch / "prompts.jsonl"
    conversation = lambda prompt: (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    )  # noqa: E731
    prompts.write_text("".join(json.dumps({"prompt": conversation(row.prompt)}) + "\n" for row in rows))

    commands = {
        OURS: [sys.executable, str(HERE / "vs_trl_ours.py"), json.dumps({**settings, "model": model})]
    }
    for name, on in theirs.items():
        extra = {"model": common.model_source(model), "prompts": str(prompts), "gradient_checkpointing": on}
        commands[name] = [
            str(environment / "bin" / "python"),
            str(HERE / "vs_trl_theirs.py"),
            json.dumps({**settings, **extra}),
        ]

    bar = tqdm(total=sum(repeats + len(theirs) for _, repeats in rounds), unit="step")
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
                    check_step(
                        side.name,
                        step,
                        2 * settings["batch_size"] * length,
                        done[OURS][-1] if side.name != OURS else step,
                    )
                    done[side.name].append(step)
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


def check_step(name: str, step: dict, new_tokens: int, ours: dict) -> None:
    """Raises `UserError` unless a step sampled as many tokens as it should, after prompts of the same total length as ours."""
    require(
        step["new_tokens"] == new_tokens,
        f"{name}: {step['new_tokens']} tokens were sampled, not {new_tokens}: the work is not equal.",
    )
    same = step["prompt_tokens"] == ours["prompt_tokens"]
    require(
        same,
        f"{name}: its prompts have {step['prompt_tokens']} tokens, ours {ours['prompt_tokens']}: they are not the same.",
    )


def cpu_name() -> str:
    """The processor's name and the number of cores this process may use."""
    names = []
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    return f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


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
