"""Answers that were paid for, kept on disk: found again by every later run, added to and never changed."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from pathlib import Path

from cleanalign.errors import JudgeFailure

BUSY_SECONDS = 60  # how long another process's write is waited for


class Answers:
    """A table of answers by key in one SQLite file, for many threads and processes at once.

    Every answer is a transaction of its own, on the disk before `put` returns: what ends the process loses
    none. SQLite's rollback journal is used, not its write-ahead log, which fails on network file systems.
    """

    def __init__(self, file: Path):
        self.file = file
        self.lock = threading.Lock()
        with self._explained():
            file.parent.mkdir(parents=True, exist_ok=True)
            # the lock above keeps the threads apart
            self.connection = sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False)
            self.connection.execute("PRAGMA synchronous = FULL")
            with self.connection:
                self.connection.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY,"
                    " endpoint TEXT, model TEXT, template TEXT, time REAL, answer TEXT)"
                )

    def get(self, key: str) -> dict | None:
        """The answer kept under `key`, or None."""
        with self._explained(), self.lock:
            row = self.connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            return json.loads(row[0]) if row else None

    def put(self, key: str, source: tuple[str, str, str], answer: dict) -> None:
        """Keep `answer`, of `source` = (endpoint, model, template). The first one under a key stays."""
        row = (key, *source, time.time(), json.dumps(answer, ensure_ascii=False))
        with self._explained(), self.lock, self.connection:
            self.connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    @contextlib.contextmanager
    def _explained(self):
        """A file that cannot be read or written is said to be so: a full disk, missing rights, damage."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise JudgeFailure(
                f"{self.file}: the judge's answers cannot be kept there: {error}. Free some space, set "
                "CLEANALIGN_CACHE to another folder, or, if the file is damaged, move it away."
            ) from error
