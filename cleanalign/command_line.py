"""The command line: recipes behind `--model`, `--resume`, errors without tracebacks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from cleanalign import dry_run, synthetic
from cleanalign.distributed import single_process
from cleanalign.errors import UserError, near, require
from cleanalign.models import HUB_MODELS, resolve_device
from cleanalign.phases import keep_freed_memory


def command_line(main: Callable, recipes: dict, argv: list[str] | None = None) -> None:
    """Parse `argv` over the recipe that `--model` names, run `main(args)`, and end a user's mistake with one
    message and exit code 2."""
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
        by_hub_id = {hub_id: name for name, hub_id in HUB_MODELS.items()}
        default = recipes.get(model) or recipes.get(by_hub_id.get(model)) or default
        known = (
            model in recipes
            or Path(model).is_dir()
            or (model.count("/") == 1 and not model.startswith((".", "/", "~")))
        )
        known |= "--dry-run" in argv and model in synthetic.CONFIGS
        require(known, f"--model {model}: no such recipe or folder. {near(model, recipes)}")
        default = dataclasses.replace(default, model=model)
    args = tyro.cli(type(default), default=default, args=argv)
    if resume is not None:
        may_differ = {"resume", "track"}
        differ = [
            f.name
            for f in dataclasses.fields(args)
            if f.name not in may_differ and getattr(args, f.name) != getattr(default, f.name)
        ]
        told = ", ".join(
            f"--{n.replace('_', '-')} {getattr(args, n)} (was {getattr(default, n)})" for n in differ
        )
        require(
            not differ,
            f"--resume {resume}: its run had other arguments: {told}. Leave these flags out, or start a new "
            "run.",
        )
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
    require(
        saved.get("script") in (None, script) or script not in SCRIPTS,
        f"--resume {folder}: this is a run of {saved['script']}.py.",
    )
    names = {f.name for f in dataclasses.fields(kind)}
    require(
        names <= set(saved["args"]),
        f"--resume {folder}: its args.json lacks {', '.join(sorted(names - set(saved['args'])))}; it was "
        "written by another version.",
    )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["args"].items() if k in names}
    return kind(**{**values, "resume": str(folder)})


SCRIPTS = ("selm", "ipo_md", "nash_md", "afd", "spin", "preference_model")


@contextlib.contextmanager
def advice_when_out_of_memory(args):
    """Out of memory, on a GPU or a CPU, becomes advice: which flags need less, and about how much less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        # torch has no class of its own for this
        on_cpu = re.search("can't allocate memory|not enough memory", first)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not on_cpu:
            raise
        raise UserError(
            f"out of memory: {first}\n{dry_run.advice(args, resolve_device(args.device))}\n"
            "What a recipe needs at its greatest lengths: the same command with --dry-run."
        ) from error
