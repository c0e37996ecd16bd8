"""What was once sampled or asked is kept: a file of keys and values that several processes may share.

    kept = Kept("runs/answers.sqlite")
    kept.read([fingerprint("reply", …), …])       # a value, or None for what is not there
    kept.write({fingerprint("reply", …): value})  # all of it or nothing, also when the process is killed

The file is an SQLite database: its journal is what makes a killed writer harmless and concurrent ones wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path

from cleanalign.errors import UserError

WAIT = 60.0  # seconds that a writer waits for another
AT_ONCE = 500  # keys in one question; SQLite's own limit was once 999
NOT_CONTENT = (
    ".md",
    ".png",
    ".jsonl",
    ".log",
    ".lock",
)  # files of a model's folder that no answer depends on


def fingerprint(*parts) -> str:
    """A key made of everything that a value depends on: SHA-256 of the parts as JSON."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Kept:
    """Keys and JSON values on disk. Raises `UserError` for a file that cannot be read or written."""

    def __init__(self, file: Path | str):
        self.file = Path(file)
        with self.errors():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None)
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
            )

    @contextlib.contextmanager
    def errors(self):
        """What SQLite or the disk refuses, as one sentence."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"--cache {self.file}: cannot be used as the file of kept answers: {error}. Give another one."
            ) from error

    def read(self, keys: list[str]) -> list:
        """The value of each key; None where there is none."""
        found = {}
        with self.errors():
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(part))
                found.update(
                    self.connection.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", part)
                )
        return [json.loads(found[key]) if key in found else None for key in keys]

    def write(self, values: dict[str, object]) -> None:
        """Keep all of `values` in one transaction; what is there
        already stays, so that whoever was first is right."""
        rows = [(key, json.dumps(value, ensure_ascii=True)) for key, value in values.items()]
        with self.errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                self.connection.executemany("INSERT OR IGNORE INTO kept VALUES (?, ?)", rows)
                self.connection.execute("COMMIT")
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()


def content_of(folder: Path, kept: Kept) -> str:
    """A fingerprint of what a model's folder holds: its files' names and content. Their digests are kept by
    path, size and time of change, so that gigabytes are read once."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in NOT_CONTENT]
    return fingerprint([(str(file.relative_to(folder)), digest(file, kept)) for file in files])


def digest(file: Path, kept: Kept) -> str:
    """SHA-256 of a file."""
    state = file.stat()
    key = fingerprint("digest", str(file.resolve()), state.st_size, state.st_mtime_ns)
    (known,) = kept.read([key])
    if known is None:
        with open(file, "rb") as stream:
            known = (
                hashlib.file_digest(stream, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else slow(stream)
            )
        kept.write({key: known})
    return known


def slow(stream) -> str:
    """`hashlib.file_digest` for Python 3.10."""
    total = hashlib.sha256()
    while block := stream.read(2**20):
        total.update(block)
    return total.hexdigest()
