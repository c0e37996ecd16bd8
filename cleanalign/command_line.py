"""The command line: recipes behind `--model`, `--resume`, ends without tracebacks."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from cleanalign import distributed, dry_run, synthetic
from cleanalign.errors import UserError, near, require
from cleanalign.models import HUB_MODELS, resolve_device
from cleanalign.phases import keep_freed_memory
from cleanalign.run import Run, default_name
from cleanalign.signals import Stopped, signals
from cleanalign.storage import read_json

SCRIPTS = ("selm", "ipo_md", "nash_md", "afd", "spin", "preference_model", "evaluate")


def command_line(main: Callable, recipes: dict, argv: list[str] | None = None) -> None:
    """Parse `argv` over the recipe that `--model` names and run `main(args)`. A user's mistake ends with one
    message and exit code 2, a signal with a checkpoint and the codes that `cleanalign.signals` lists. Several
    processes end together."""
    argv = sys.argv[1:] if argv is None else argv
    with signals.listening(), distributed.ending_together():
        try:
            distributed.join()
            args = distributed.attempt(lambda: parse(recipes, argv))
            require_same_everywhere(args)
            if args is not None:
                keep_freed_memory()
                with advice_when_out_of_memory(args):
                    args = dry_run.prepare(args) if args.dry_run else args
                    if args is not None:
                        main(args)
                if Run.current:
                    Run.current.close()  # here: a checkpoint in the background may yet find the disk full
        except UserError as error:
            end(error, f"error: {error}", 2)
        except Stopped as error:
            end(error, f"stopped by {error}", error.exit_code)
        finally:
            if Run.current:
                Run.current.close()


def end(error: BaseException, message: str, code: int) -> typing.NoReturn:
    """End the program: save what can be saved, say what happened and where the run stands."""
    signals.busy = True  # a second signal may end it at once, a first one not cut the save short
    lines = [message]
    if Run.current:
        try:
            lines.append(Run.current.save_before_the_end(error))
            Run.current.close()
        except UserError as another:
            lines.append(f"error: {another}")
    code = distributed.fail(code)
    print("\n".join(lines), file=sys.stderr)
    sys.exit(code)


def require_same_everywhere(args) -> None:
    """Raise `UserError` unless every process was given the same arguments."""
    given = distributed.gather(args and dataclasses.asdict(args))
    for rank, other in enumerate(given):
        if other == given[0]:
            continue
        require(
            bool(other and given[0]), f"process {rank} and process 0 were given different runs to resume."
        )
        differ = [name for name in other if other[name] != given[0].get(name)]
        told = ", ".join(f"--{n.replace('_', '-')} {other[n]} (process 0: {given[0].get(n)})" for n in differ)
        raise UserError(f"process {rank} of {len(given)} was given other arguments: {told}. Start all alike.")


def parse(recipes: dict, argv: list[str]):
    """Args from flags over a recipe's values, or over a run folder's when `--resume` is given. None: with
    `--resume auto` there is nothing left to do.

    Raises `UserError` for an unknown model, and for a resumed run whose flags differ from its own.
    """
    default = next(iter(recipes.values()))
    model, resume = flag_value(argv, "--model"), flag_value(argv, "--resume")
    if resume == "auto":
        folder = newest_run(parse(recipes, with_resume(argv, None)))
        if folder is not None and (folder / "summary.json").exists():
            print(f"--resume auto: {folder} is finished; give another --run-name for a new run")
            return None
        resume, argv = folder, with_resume(argv, folder)
    if resume is not None:
        default = saved_args(type(default), Path(resume))
    elif model is not None:
        all_weights = flag_value(argv, "--lora-rank") == "0"
        default = recipe_of(recipes, model, all_weights, dry="--dry-run" in argv)
    args = tyro.cli(type(default), default=default, args=argv)
    if resume is not None:
        require_same(args, default)
    return args


def recipe_of(recipes: dict, model: str, all_weights: bool, dry: bool):
    """The recipe that a `--model` value names, as it is without its adapter if `all_weights`; or the first
    one's values with that model."""
    by_hub_id = {hub_id: name for name, hub_id in HUB_MODELS.items()}
    recipe = recipes.get(model) or recipes.get(by_hub_id.get(model)) or next(iter(recipes.values()))
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    known = model in recipes or Path(model).is_dir() or looks_like_id or (dry and model in synthetic.CONFIGS)
    require(known, f"--model {model}: no such recipe or folder. {near(model, recipes)}")
    if all_weights and recipe.lora_rank > 0:
        recipe = recipe.for_all_weights()
    return dataclasses.replace(recipe, model=model)


def newest_run(args) -> Path | None:
    """The run folder that `--resume auto` goes on with: that of --run-name, or else the newest that such a
    command started without one. None if there is none yet."""
    folder = Path(args.run_dir)
    if args.run_name:
        return folder / args.run_name if (folder / args.run_name).exists() else None
    return max(
        folder.glob(default_name(Path(sys.argv[0]).stem, args) + "*-*"), default=None
    )  # named by their time


def with_resume(argv: list[str], folder: Path | None) -> list[str]:
    """`argv` with `folder` as the value of its --resume; None takes the flag out."""
    kept, words = [], iter(argv)
    for word in words:
        if word == "--resume":
            next(words, None)
        elif not word.startswith("--resume="):
            kept.append(word)
    return kept if folder is None else [*kept, f"--resume={folder}"]


MAY_DIFFER = {
    "resume",
    "track",
    "save_async",
    "keep_checkpoints",
    "judge_max_requests",
    "judge_concurrency",
}  # flags that a resumed run may be given anew


def require_same(args, saved) -> None:
    """Raise `UserError` if a flag of a resumed run is not what its run had."""
    names = [f.name for f in dataclasses.fields(args) if f.name not in MAY_DIFFER]
    differ = [name for name in names if getattr(args, name) != getattr(saved, name)]
    told = ", ".join(
        f"--{name.replace('_', '-')} {getattr(args, name)} (was {getattr(saved, name)})" for name in differ
    )
    require(
        not differ,
        f"--resume {args.resume}: its run had other arguments: {told}. Leave these flags out, or start a "
        "new run.",
    )


def flag_value(argv: list[str], flag: str) -> str | None:
    """The value of `--flag value` or `--flag=value` in `argv`."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :]
    return None


def saved_args(kind: type, folder: Path):
    """The Args of a run folder, as they were, with `resume`
    set to it. Raises `UserError` for a file that is none."""
    what = f"--resume {folder}"
    require(folder.is_dir(), f"{what}: no such run folder.")
    require((folder / "args.json").is_file(), f"{what}: no args.json in it, so it is not a run folder.")
    saved = read_json(folder / "args.json", what)
    whole = isinstance(saved, dict) and isinstance(saved.get("args"), dict)
    require(whole, f"{what}: its args.json is not what a run writes: an object with 'args'.")
    script = Path(sys.argv[0]).stem
    require(
        saved.get("script") in (None, script) or script not in SCRIPTS,
        f"{what}: this is a run of {saved.get('script')}.py.",
    )
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    missing = sorted(names - set(saved["args"]))
    require(
        not missing, f"{what}: its args.json lacks {', '.join(missing)}; it was written by another version."
    )
    values = {}
    for name in names:
        value = saved["args"][name]
        values[name] = tuple(value) if isinstance(value, list) else value
        require(
            fits(values[name], hints[name]), f"{what}: its args.json has {name}: {value!r}, which cannot be."
        )
    return kind(**{**values, "resume": str(folder)})


def fits(value, hint) -> bool:
    """Whether a value out of a JSON file is of an argument's
    type: a plain one, Literal, tuple or a union of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, inner[0]) for one in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


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
