"""One process writes a run folder: a lock that the system releases when its holder dies."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from pathlib import Path

from cleanalign.errors import UserError
from cleanalign.storage import writing


class Lock:
    """An advisory lock on a folder, held by an open file in it. `flock`, which Linux carries over NFS too.

    The file says who holds it: host, process, since when. It stays when the run ends, and means nothing then.
    """

    def __init__(self, folder: Path):
        """Take the lock. Raises `UserError`, saying who has it, when another process does."""
        path = folder / "lock"
        with writing(path):
            self.file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held open: closing it gives it up
        try:
            import fcntl  # POSIX systems only
        except ImportError:
            print(f"{folder}: cannot be locked on this system; start it once only", flush=True)
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(
                f"{folder} is in use by {holder}. Two processes in one folder would write into each other: wait "
                "for it, end it, or start a run with another --run-name."
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{folder}: cannot be locked ({error}); start it once only", flush=True)
        since = datetime.datetime.now().isoformat(timespec="seconds")
        with writing(path):
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            self.file.flush()

    def release(self) -> None:
        """Give the lock up."""
        with contextlib.suppress(OSError):
            self.file.close()
