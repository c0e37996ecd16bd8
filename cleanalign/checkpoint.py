"""Checkpoints: written whole or not at all, checked when they are read, the last few kept.

checkpoint/NNNN-step-S/ holds state.pt, metrics.jsonl as it stood then, and manifest.json with every file's
size and SHA-256. It appears by one rename. A damaged one is passed over, saying so, for the one before it.

Of several processes each writes its shards (what has "offsets": where its part of every weight begins) into a
file of its own, state-1.pt and so on; the first writes the rest and renames when all are there. Any number of
processes can read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import torch

from cleanalign import distributed
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
        """Write a checkpoint of `state` (tensors, numbers, text in lists and dictionaries) and of
        metrics.jsonl.

        Raises `UserError` when the disk refuses; the checkpoints before it stay.
        """
        self.wait()
        if distributed.rank() == 0:
            self._begin()
        else:
            state = {name: value for name, value in state.items() if is_shard(value)}
        distributed.barrier()
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

    def _begin(self) -> None:
        """An empty folder to write the checkpoint into."""
        with writing(self.folder):
            shutil.rmtree(self.folder / ".new", ignore_errors=True)
            (self.folder / ".new").mkdir(parents=True)

    def _write(self, step: int, state: dict, metrics: str) -> None:
        rank, new = distributed.rank(), self.folder / ".new"
        number = 1 + max((n for n, _ in self.found()), default=0)
        final = self.folder / f"{number:04d}-step-{step}"
        with writing(final):
            try:
                files = {state_file(rank): write_hashed(new / state_file(rank), state)}
                if rank == 0:
                    files["metrics.jsonl"] = write_hashed(new / "metrics.jsonl", metrics)
                    files |= self._of_others(new)
                manifest = {"step": step, "files": files}
                name = "manifest.json" if rank == 0 else f"part-{rank}.json"
                (new / f".{name}").write_text(json.dumps(manifest, indent=1) + "\n")
                sync(new / f".{name}")
                (new / f".{name}").rename(new / name)
                if rank != 0:
                    return
                new.rename(final)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            sync(self.folder)
        for _, old in self.found()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _of_others(self, new: Path) -> dict[str, dict]:
        """What the other processes have written, once they have: no message of theirs could come in between
        what the processes say to each other while training goes on."""
        files = {}
        for rank in range(1, distributed.world()):
            part = new / f"part-{rank}.json"
            while not part.exists():
                require(not distributed.alone(), f"process {rank} did not write its part of the checkpoint.")
                time.sleep(0.01)
            files |= json.loads(part.read_text())["files"]
            part.unlink()
        return files

    def found(self) -> list[tuple[int, Path]]:
        """(number, folder) of every checkpoint, oldest first."""
        named = [(re.fullmatch(r"(\d+)-step-\d+", path.name), path) for path in self.folder.glob("*-step-*")]
        return sorted((int(match[1]), path) for match, path in named if match)

    def load(self) -> tuple[dict, str] | None:
        """State and metrics.jsonl of the newest checkpoint that is whole; None if there is none at all.

        Raises `UserError` if there are some and all are damaged.
        """
        damaged = []
        for path in distributed.from_first([path for _, path in reversed(self.found())]):
            error = next(filter(None, distributed.gather(damage(path))), None)
            if error is not None:
                damaged.append(path)
                print(f"{path}: damaged ({error}); trying the one before it", flush=True)
                continue
            return read(path), (path / "metrics.jsonl").read_text(encoding="utf-8")
        require(
            not damaged,
            f"--resume: none of the checkpoints in {self.folder} is whole ({len(damaged)} damaged). Restore "
            "one from a "
            "backup, or move that folder away to begin from the first step.",
        )
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's folder, or None. Of
    several processes each looks at some of its files."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in distributed.mine(sorted(manifest["files"])):
            expected, file = manifest["files"][name], path / name
            require(
                file.stat().st_size == expected["bytes"], f"{name} has another size than when it was written"
            )
            require(digest(file) == expected["sha256"], f"{name} has other bytes than when it was written")
        read(path)
    except Exception as error:  # whatever is wrong with it: a wrong size, other bytes, a pickle that is none
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def read(path: Path) -> dict:
    """The state in a checkpoint's folder, its shards as lists with one of each process that wrote it. Only
    tensors and plain values are read (`weights_only`): nothing in it can run."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    require("state.pt" in manifest["files"] and "metrics.jsonl" in manifest["files"], "files are missing")
    parts = []
    while (name := state_file(len(parts))) in manifest["files"]:
        part = torch.load(path / name, map_location="cpu", weights_only=True, mmap=True)
        require(isinstance(part, dict), f"{name} holds no state")
        parts.append(part)
    state = dict(parts[0])
    for name, value in state.items():
        if is_shard(value):
            state[name] = [part[name] for part in parts]
    return state


def state_file(rank: int) -> str:
    """Name of a process's file in a checkpoint."""
    return f"state-{rank}.pt" if rank else "state.pt"


def is_shard(value) -> bool:
    """Whether a value of a state is a process's part of something: of an optimiser's state, of an average."""
    return isinstance(value, dict) and "offsets" in value


def write_hashed(path: Path, value: dict | str) -> dict:
    """Write a state or a text, through to the disk; returns its size and SHA-256."""
    with open(path, "wb") as file:
        hashing = Hashing(file)
        if isinstance(value, str):
            hashing.write(value.encode())
        else:
            torch.save(value, hashing)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}


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
