"""Checkpoints: written whole or not at all, checked when they are read, the last few kept.

checkpoint/NNNN-step-S/ holds state.pt, metrics.jsonl as it stood then, and manifest.json with every file's size and
SHA-256. It appears by one rename. A damaged one is passed over, saying so, for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

import torch

from cleanalign.errors import UserError, require
from cleanalign.storage import sync, writing


class Hashing:
    """A binary file that knows the SHA-256 of what was written to it."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        """Write all of `data`."""
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self.file.flush()


class Checkpoints:
    """The checkpoints of a run folder, of which the last `keep` stay.

    In the `background` a checkpoint is copied to host memory and written by a thread while training goes on.
    """

    def __init__(self, folder: Path, keep: int, background: bool):
        self.folder, self.keep, self.background = folder, keep, background
        self.thread: threading.Thread | None = None
        self.failure: UserError | None = None

    def save(self, step: int, state: dict, metrics: str) -> None:
        """Write a checkpoint of `state` (tensors, numbers, text in lists and dictionaries) and of metrics.jsonl.

        Raises `UserError` when the disk refuses; the checkpoints before it stay.
        """
        self.wait()
        if not self.background:
            return self._write(step, state, metrics)
        copy = to_host(state)
        self.thread = threading.Thread(target=self._try_write, args=(step, copy, metrics))
        self.thread.start()

    def wait(self) -> None:
        """Until the checkpoint that is being written is there. Raises the `UserError` it ended with."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def _try_write(self, *checkpoint) -> None:
        try:
            self._write(*checkpoint)
        except UserError as error:
            self.failure = error

    def _write(self, step: int, state: dict, metrics: str) -> None:
        number = 1 + max((n for n, _ in self.found()), default=0)
        final, new = self.folder / f"{number:04d}-step-{step}", self.folder / ".new"
        with writing(final):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            try:
                manifest = {"step": step, "files": {}}
                for name in ("state.pt", "metrics.jsonl"):
                    with open(new / name, "wb") as file:
                        hashing = Hashing(file)
                        if name == "state.pt":
                            torch.save(state, hashing)
                        else:
                            hashing.write(metrics.encode())
                        file.flush()
                        os.fsync(file.fileno())
                    manifest["files"][name] = {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}
                (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
                sync(new / "manifest.json")
                new.rename(final)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            sync(self.folder)
        for _, old in self.found()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def found(self) -> list[tuple[int, Path]]:
        """(number, folder) of every checkpoint, oldest first."""
        named = [(re.fullmatch(r"(\d+)-step-\d+", path.name), path) for path in self.folder.glob("*-step-*")]
        return sorted((int(match[1]), path) for match, path in named if match)

    def load(self) -> tuple[dict, str] | None:
        """State and metrics.jsonl of the newest checkpoint that is whole; None if there is none at all.

        Raises `UserError` if there are some and all are damaged.
        """
        damaged = []
        for _, path in reversed(self.found()):
            try:
                state = read(path)
            except (
                Exception
            ) as error:  # whatever is wrong with it: a wrong size, other bytes, a pickle that is none
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                damaged.append(path)
                print(f"{path}: damaged ({first}); trying the one before it", flush=True)
                continue
            return state, (path / "metrics.jsonl").read_text(encoding="utf-8")
        require(
            not damaged,
            f"--resume: none of the checkpoints in {self.folder} is whole ({len(damaged)} damaged). Restore one from a "
            "backup, or move that folder away to begin from the first step.",
        )
        return None


def read(path: Path) -> dict:
    """The state in a checkpoint's folder, once its files are what its manifest says. Only tensors and plain values
    are read (`weights_only`): nothing in it can run."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name in ("state.pt", "metrics.jsonl"):
        expected, file = manifest["files"][name], path / name
        require(file.stat().st_size == expected["bytes"], f"{name} has another size than when it was written")
        require(digest(file) == expected["sha256"], f"{name} has other bytes than when it was written")
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    require(isinstance(state, dict), "state.pt holds no state")
    return state


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(2**22):
            sha256.update(part)
    return sha256.hexdigest()


def to_host(value):
    """A copy of nested lists and dictionaries whose tensors are in host memory and nobody else's."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_host(inner) for inner in value)
    return value
