"""The clock of a run: seconds, tokens and peak memory by phase; what the allocator keeps between them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from pathlib import Path

import torch

from cleanalign import distributed


def _glibc():
    """glibc, or None elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        return library if library.mallopt and library.malloc_trim else None
    return None


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, and torch to ask for huge pages: giving activations back and faulting
    them in again costs a large part of a CPU step. And tell oneDNN to keep fewer compiled kernels: those of a
    batch shape take 5 MB, and it would keep a thousand. Call it before the first tensor is made."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # some thirty a shape
    if glibc := _glibc():
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        glibc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: blocks above it always go back


def give_back_freed_memory() -> None:
    """Hand back what `keep_freed_memory` kept."""
    if glibc := _glibc():
        glibc.malloc_trim(0)


def peak_memory() -> int:
    """Peak bytes since the last reset: of the CUDA allocator where there is one, else of the process's
    resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Start `peak_memory` anew where the system can: CUDA and
    Linux. Elsewhere it stays the peak since the start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


TAKING_TURNS = 3  # phases: a step's sampling, judging and training
GIVE_BACK_EVERY = 12  # phases


class Phases:
    """Seconds, tokens and peak memory of a run, by phase: sampling, judging, training, …

    Use `phase(name)` around timed work and `add_tokens` or `add_batch` for what it computed. Before a phase
    that is not one of the last few, freed memory goes back: the buffers of one stage differ in size from the
    next one's, and their peaks would add up. Phases that take turns find theirs again; only now and then
    (`GIVE_BACK_EVERY` phases) are the crumbs between them swept up.
    """

    def __init__(self):
        self.last_phases: deque[str] = deque(maxlen=TAKING_TURNS)
        self.since_given_back = 0  # phases
        self._phases: dict[str, Counter] = defaultdict(Counter)
        self.open_phases: list[str] = []
        self.phase_mark = None  # when the innermost open phase began, or went on
        self.unread: list[tuple] = []  # phase, its beginning and end on the GPU's clock
        self.peak_memory_bytes = 0
        self.padding = Counter()  # of the batches since the last log: places, tokens

    @property
    def phases(self) -> dict[str, Counter]:
        """Of each phase: seconds, tokens, scored, peak_memory_bytes. Waits for a GPU's clock."""
        if self.unread:
            torch.cuda.synchronize()
        for name, begin, end in self.unread:
            self._phases[name]["seconds"] += begin.elapsed_time(end) / 1e3
        self.unread.clear()
        return self._phases

    @contextlib.contextmanager
    def phase(self, name: str):
        """Time a part of the work and note its peak memory. Phases may be nested: seconds and peak of an
        inner one are its own alone."""
        if not self.open_phases:
            self.since_given_back += 1
            if name not in self.last_phases or self.since_given_back == GIVE_BACK_EVERY:
                give_back_freed_memory()
                self.since_given_back = 0
            self.last_phases.append(name)
        self._close_measurement()
        self.open_phases.append(name)
        try:
            yield
        finally:
            self._close_measurement()
            self.open_phases.pop()

    def _close_measurement(self) -> None:
        """Book what happened since the last call on the innermost open phase. With a GPU its clock is noted
        and read later: a training step has phases in each micro-batch, and waits for none."""
        now, peak = time.perf_counter(), peak_memory()
        if torch.cuda.is_available():
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        if self.open_phases:
            name = self.open_phases[-1]
            phase = self._phases[name]
            if isinstance(now, float):
                phase["seconds"] += now - self.phase_mark
            else:
                self.unread.append((name, self.phase_mark, now))
            phase["peak_memory_bytes"] = max(phase["peak_memory_bytes"], peak)
        self.phase_mark, self.peak_memory_bytes = now, max(self.peak_memory_bytes, peak)
        reset_peak_memory()

    def add_tokens(self, name: str, tokens: int, scored: int = 0) -> None:
        """Count this process's tokens of a phase: those sampled, or those a forward pass computed and, of the
        completions', scored."""
        self._phases[name].update(tokens=tokens, scored=scored)

    def add_batch(self, name: str, batch) -> None:
        """Count the tokens of a `common.Batch` in a phase, and how much of it was padding."""
        self.add_tokens(name, batch.tokens, batch.scored)
        self.padding += Counter(places=batch.input_ids.numel(), tokens=batch.tokens)

    def set_apart(self, name: str, part: str, seconds: float) -> None:
        """Count `seconds` of phase `name` as a phase of their
        own: what is paid once must not blur tokens per second."""
        if seconds:
            self._phases[name]["seconds"] -= seconds
            self._phases[part]["seconds"] += seconds

    def throughput(self) -> dict[str, float]:
        """Tokens per second by phase, since the start (or the
        resume): all processes' tokens, by this one's clock."""
        phases = self.phases
        tokens = distributed.total({name: phase["tokens"] for name, phase in phases.items()})
        return {
            f"tokens_per_second/{name}": tokens[name] / phase["seconds"]
            for name, phase in phases.items()
            if phase["seconds"] > 0 and tokens[name]
        }
