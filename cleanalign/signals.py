"""What a scheduler sends before it kills: SIGTERM and SIGUSR1 end a run after its step, with a checkpoint.

Ctrl-C does the same. A second SIGTERM or Ctrl-C ends at once. Exit codes, for job scripts:

    0     finished
    2     a mistake to mend; the message says which
    75    stopped by SIGTERM or SIGUSR1: start the same command with --resume auto and it goes on
    130   stopped by Ctrl-C; goes on likewise
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again


class Stopped(BaseException):
    """A signal asked the program to end; no `except Exception` of a judge's code shall keep it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 130 if number == signal.SIGINT else STOPPED


class StopSignals:
    """Signals received while `listening`. `busy` says that weights or files are in flux: the signal then waits for
    `check`, else it ends the program where it stands."""

    def __init__(self):
        self.received: int | None = None
        self.busy = False

    @contextlib.contextmanager
    def listening(self):
        """Context in which the signals are caught; only the main thread can."""
        self.received, self.busy = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = [name for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
        before = {name: signal.signal(getattr(signal, name), self._receive) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def _receive(self, number: int, frame) -> None:
        if self.received == number and number != getattr(signal, "SIGUSR1", None):
            os._exit(128 + number)  # the second time
        if self.received is None:
            self.received = number
        if self.busy:
            print(f"\n{signal.Signals(number).name}: ends after this step, with a checkpoint", flush=True)
        else:
            raise Stopped(number)

    def check(self) -> None:
        """Nothing is in flux here: end the program if a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)


signals = StopSignals()
