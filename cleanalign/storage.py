"""Files that are whole or not there: atomic writes, and one sentence for what the disk refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import safetensors

from cleanalign.errors import UserError, require

MB = 1e6


@contextlib.contextmanager
def writing(path: Path):
    """Context in which `path` is written. What the system refuses (a full disk, a quota, a folder that is
    read-only) becomes a `UserError` that names the file, the reason and the free space.

    A `RuntimeError` counts too: it is what torch makes of a write that failed.
    """
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cause = (
            error.__context__ if isinstance(error.__context__, OSError) else error
        )  # torch hides the system's
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise UserError(
            f"{path}: could not be written: {reason}. {free_space(path)}Nothing that was whole is lost: mend "
            "that, then continue the run with --resume."
        ) from error


def free_space(path: Path) -> str:
    """'N MB are free there. ' of the file system that holds `path`, or nothing where that cannot be asked."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free / MB:,.0f} MB are free there. "
    return ""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` unless the file system of `folder` has `needed` bytes free for `what`."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        require(
            free >= needed,
            f"{folder}: {what} need about {needed / MB:,.0f} MB, and {free / MB:,.0f} MB are free there. "
            "Free some "
            "space, choose another --run-dir, or write less: --save-every 0, --keep-checkpoints 1.",
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all. Raises `UserError` as `writing` does."""
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def write_json(path: Path, value, indent: int | None = None) -> None:
    """`write_text` of `value` as JSON; its folder is made."""
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextlib.contextmanager
def replacing(folder: Path):
    """Context with an empty folder to fill, which takes the
    place of `folder` by a rename when it is whole."""
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    with writing(folder):
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        for file in new.rglob("*"):
            sync(file)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries,
    to the disk. Where folders cannot be opened, not."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path, what: str):
    """The value in a JSON file. Raises `UserError`, which begins with `what`, for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: {path} cannot be read as JSON: {error}") from error
