"""Several processes, one for each GPU (`torchrun --nproc-per-node 8 selm.py …`): who does which share, how
the shares become a whole again, and how all of them end together.

Every process runs the whole script and holds the same rows, samples, pairs and metrics. Only the expensive
calls are dealt out (decoding, log-probs, the judge, the passes of a training step), and what they return is
made whole for everybody at once. So nothing else in this code knows how many processes there are: a run is a
function of its arguments, up to the rounding of sums.

    place        rank, world
    shares       mine, merge, gather, from_first, barrier, attempt
    tensors      own_part, exchange, spread, norm: whole weights, what trains them in parts (ZeRO-2)
    life         join, fail, leave; a thread that watches the others

With one process each of these is the identity or does nothing. Bytes that this process sends to others are
counted in `sent`. docs/scale.md explains.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import transformers

from cleanalign.errors import UserError, require
from cleanalign.signals import signals

WAIT_FOR_START = timedelta(minutes=10)  # for the last process to join
WAIT_FOR_OTHERS = timedelta(hours=2)  # in one call: the longest that one may compute alone
BEAT = 5.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one after which a process of another machine counts as dead

sent: Counter = Counter()  # bytes that this process sent to others, by purpose


class Lost(Exception):
    """Another process of this run is gone."""


# --- place ---


class _Place:
    """This process among all; and while there are several, what ends them together."""

    rank, world = 0, 1
    processes: ClassVar[list[tuple[str, int]]] = []  # host and id of each
    store: dist.Store | None = None
    watcher: threading.Thread | None = None
    over = threading.Event()  # set once this process no longer minds the others
    failed = lost = False


def rank() -> int:
    """This process's number, from 0. Process 0 alone writes and speaks."""
    return _Place.rank


def world() -> int:
    """How many processes compute this run."""
    return _Place.world


def processes_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def alone() -> bool:
    """Whether there is nobody to wait for any more: this process has failed, or has lost the others."""
    return _Place.failed or _Place.lost


# --- shares ---


def mine(items: Sequence) -> Sequence:
    """This process's share: every W-th item."""
    return items[rank() :: world()]


def gather(value, purpose: str = "results") -> list:
    """Everybody's `value`, by rank. On its way goes who was asked to end: all end here, or none."""
    if world() == 1:
        return [value]
    data = torch.frombuffer(bytearray(pickle.dumps((signals.received, value))), dtype=torch.uint8)
    sizes = _all_gather(torch.tensor([len(data)])).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    whole = _all_gather(padded).view(world(), -1)
    sent[purpose] += (world() - 1) * (len(padded) + 8)
    came = [pickle.loads(whole[r, :size].numpy().tobytes()) for r, size in enumerate(sizes)]
    signals.agree([received for received, _ in came])
    return [other for _, other in came]


def merge(items: list) -> list:
    """The whole list, of which every process has filled in its share; what is not its own is None."""
    if world() == 1:
        return items
    whole: list = [None] * len(items)
    for part in gather([(i, item) for i, item in enumerate(items) if item is not None]):
        for i, item in part:
            whole[i] = item
    return whole


def from_first(value):
    """Process 0's `value`, for everybody."""
    return gather(value if rank() == 0 else None)[0]


def barrier() -> None:
    """Wait until everybody is here."""
    gather(None)


def total(counts: dict[str, float]) -> dict[str, float]:
    """Each count summed over the processes, in the order of their ranks."""
    if world() == 1:
        return counts
    sums: Counter = Counter()
    for part in gather(dict(counts)):
        for name, value in part.items():
            sums[name] += value
    return dict(sums)


def attempt(do: Callable):
    """do(), on every process; a user's mistake that one of
    them finds is raised on all, naming who found it."""
    if world() == 1:
        return do()
    result, error = None, None
    try:
        result = do()
    except UserError as mistake:
        error = mistake
    except SystemExit as stop:  # --help, or flags that cannot be read
        error = stop
    found = gather((_on(), error))
    errors = [(where, other) for where, other in found if other is not None]
    if not errors:
        return result
    if error is not None and len(errors) == world():
        raise error
    where, first = errors[0]
    if isinstance(first, SystemExit):
        first = UserError("its flags were refused: give every process the same.")
    raise type(first)(f"on {where}, but not on every process of this run: {first}") from error


@contextlib.contextmanager
def first_of_each_machine():
    """Context which one process of a machine runs through
    before the others: what it fetches is then there."""
    if int(os.environ.get("LOCAL_RANK", rank())) != 0:
        barrier()
    yield
    if int(os.environ.get("LOCAL_RANK", rank())) == 0:
        barrier()


# --- tensors ---


def _slice_of(numel: int) -> tuple[int, int]:
    """Where this process's part of so many numbers begins and ends: of W equal parts, the last ones shorter
    or empty."""
    size = -(-numel // world())
    return min(numel, rank() * size), min(numel, (rank() + 1) * size)


def offset(weight: torch.Tensor) -> int:
    """Where this process's part of a weight begins in it, flat."""
    return _slice_of(weight.numel())[0]


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """The part of a contiguous weight that this process updates, a flat view; with one process all of it, in
    its shape."""
    if world() == 1:
        return weight.detach()
    start, end = _slice_of(weight.numel())
    return weight.detach().view(-1)[start:end]


def exchange(gradient: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Send each process its part of `gradient`, in the gradient's own precision. The call that is returned
    waits, and gives the float32 sum over the processes of this one's part."""
    size = -(-gradient.numel() // world())
    flat = gradient.reshape(-1)
    if flat.numel() < size * world():
        flat = torch.nn.functional.pad(flat, (0, size * world() - flat.numel()))
    received = torch.empty_like(flat)
    with _talking():
        work = dist.all_to_all_single(received, flat, async_op=True)
    sent["gradients"] += (world() - 1) * size * flat.element_size()
    start, end = _slice_of(gradient.numel())

    def finish(kept=flat) -> torch.Tensor:  # what is being sent must not be freed meanwhile
        with _talking():
            work.wait()
        return received.view(world(), size).sum(0, dtype=torch.float32)[: end - start]

    return finish


@torch.no_grad()
def spread(weights: list[torch.Tensor]) -> None:
    """Fill everybody's weights with the parts that their owners have changed."""
    if world() == 1:
        return
    for weight in weights:
        size = -(-weight.numel() // world())
        flat, part = weight.detach().view(-1), own_part(weight)
        if size * world() == flat.numel():
            _all_gather(part, flat)
        else:
            padded = torch.nn.functional.pad(part, (0, size - part.numel()))
            flat.copy_(_all_gather(padded)[: flat.numel()])
        sent["weights"] += (world() - 1) * size * weight.element_size()


def norm(parts: list[torch.Tensor]) -> float:
    """The norm of all processes' parts together."""
    own = float(torch.nn.utils.get_total_norm(parts))
    if world() == 1:
        return own
    return sum(other * other for other in gather(own)) ** 0.5


def _all_gather(part: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
    whole = part.new_empty(world() * part.numel()) if whole is None else whole
    with _talking():
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, part)  # renamed in torch 2.13
    return whole


@contextlib.contextmanager
def _talking():
    """Context in which a failed connection is `Lost`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _Place.lost = True
        raise Lost(_who_is_gone()) from error


# --- life ---


def join() -> None:
    """Become one of the processes that torchrun started, if it did; from here on a failure of one ends all.

    Raises `UserError` where the environment is torchrun's in part only, or there are more processes than
    GPUs.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    require(count.isdigit() and int(count) >= 1, f"WORLD_SIZE={count}: not a number of processes.")
    if int(count) == 1 or world() > 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    require(
        not missing,
        f"WORLD_SIZE={count}, but {', '.join(missing)} not set. Start several processes by `torchrun "
        "--nproc-per-node N SCRIPT.py …`, or one by `unset WORLD_SIZE`.",
    )
    number = os.environ["RANK"]
    require(number.isdigit() and int(number) < int(count), f"RANK={number} with WORLD_SIZE={count}.")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_RANK", number)), torch.cuda.device_count()
        require(
            here < gpus, f"process {here} of this machine has no GPU: it has {gpus}. Lower --nproc-per-node."
        )
        torch.cuda.set_device(here)
    try:
        store, place, size = next(iter(dist.rendezvous("env://", timeout=WAIT_FOR_START)))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", store),
            rank=place,
            world_size=size,
            timeout=WAIT_FOR_OTHERS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {number} of {count} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}"
        ) from error
    _Place.rank, _Place.world, signals.together = place, size, True
    _Place.store = dist.PrefixStore("cleanalign", store.clone())  # a connection of its own: the thread's
    _Place.over.clear()
    if place != 0:  # process 0 alone speaks
        sys.stdout = sys.stderr = _silence()
        transformers.logging.set_verbosity_error()
    _Place.processes = gather((_host(), os.getpid()))
    watching = dist.PrefixStore("cleanalign", store.clone())
    _Place.watcher = threading.Thread(target=_watch, args=(watching,), daemon=True)
    _Place.watcher.start()


@contextlib.contextmanager
def ending_together():
    """Context that a process of several leaves together with the others: when all are done, or when one
    fails, and then with its exit code. Whose failure is not the user's mistake shows its traceback."""
    try:
        yield
        leave()  # here too somebody may be missing
    except Exception as error:
        if world() == 1:
            raise
        code = fail(1)
        if isinstance(error, Lost):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        _end_now(code)
    except SystemExit as stop:
        if _Place.failed:
            _end_now(stop.code)
        raise
    finally:
        leave()


def _end_now(code: int) -> None:
    """End with the others after a failure. torchrun sends SIGTERM to all once one has ended: they have heard,
    and end with their own code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    leave()
    os._exit(code)


def fail(code: int) -> int:
    """Tell the others that this process ends with exit code `code`, so that they end too. Only the first to
    fail
    may speak: it gets its terminal back. Returns the code to end with, the first one's."""
    if world() == 1 or _Place.failed:
        return code
    _Place.failed = True
    _Place.over.set()
    first = True
    with contextlib.suppress(RuntimeError):  # the store is gone with its machine: whom to ask is not known
        first = _Place.store.add("failures", 1) == 1
        if first:
            _Place.store.set("code", str(code))
        else:
            code = int(_Place.store.get("code"))
    sys.stderr = sys.__stderr__ if first else _silence()
    return code


def _silence():
    return open(os.devnull, "w")  # for as long as the process lives


def leave() -> None:
    """Part from the others: after a failure once they have
    all heard of it, else when all have come to their end."""
    if world() == 1:
        return
    signals.busy = True
    if not _Place.failed:
        barrier()
    _Place.over.set()
    _Place.watcher.join(2.0)
    _part(_Place.store)
    if not _Place.failed:
        dist.destroy_process_group()
    _Place.rank, _Place.world, signals.together = 0, 1, False


def _part(store: dist.Store) -> None:
    """Say that this process leaves, and wait until all have: torchrun ends the others once one has ended, and
    whoever holds the store must be the last."""
    with contextlib.suppress(RuntimeError):
        store.add("left", 1)
        if rank() != 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return  # process 0 holds it
        deadline = time.monotonic() + BEAT
        while int(store.add("left", 0)) < world() and time.monotonic() < deadline:
            time.sleep(0.05)


def _on() -> str:
    return f"process {rank()} of {world()} ({socket.gethostname()})"


def _watch(store: dist.Store) -> None:
    """The thread that ends this process once another has failed or its neighbour is gone: what a process
    waits for in a call of NCCL or gloo, it may wait for in vain.

    Whether a neighbour on the same machine is there, the system knows. On another machine it counts as dead
    after `SILENCE` seconds without a sign of life, by the count of this thread's own looks: a machine that
    stands still, or is overloaded, does not take the others for dead.
    """
    neighbour, silent, sign, due = (rank() + 1) % world(), 0, None, 0.0
    host, pid = _Place.processes[neighbour]
    while not _Place.over.wait(0.5):
        try:
            if store.check(["code"]):
                _end(store, int(store.get("code")))
            if time.monotonic() < due:
                continue
            due = time.monotonic() + BEAT
            store.set(f"alive {rank()}", str(due))
            key = f"alive {neighbour}"
            last = store.get(key) if store.check([key]) else None
            silent, sign = (silent + 1 if last == sign else 0), last
            if not _runs(pid) if host == _host() else silent > SILENCE / BEAT:
                _end(store, 1, _who_is_gone(f"process {neighbour} of {world()} (on {host})"))
        except RuntimeError:
            if not _Place.over.wait(2.0):  # not at this process's own end
                _end(None, 1, _who_is_gone("the machine that kept the processes together"))


def _end(store: dist.Store | None, code: int, reason: str | None = None) -> None:
    """End this process from its watching thread, whatever it is waiting for."""
    if _Place.over.is_set():
        return
    speaks = reason is not None
    with contextlib.suppress(RuntimeError):
        if store is not None and reason is not None:
            speaks = store.add("failures", 1) == 1
            store.set("code", str(code))
    if speaks:
        print(f"error: {reason}", file=sys.__stderr__, flush=True)
    if store is not None:
        _part(store)
    os._exit(code)


AFTER_LOSS = (
    "The last checkpoint is kept; --resume RUN_FOLDER goes on from there, on any number of processes."
)


def _host() -> str:
    """This machine, or the part of it in which process ids mean what they mean here."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}, {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _who_is_gone(otherwise: str = "another process of this run") -> str:
    """Names the processes of this machine that are no longer there."""
    gone = []
    time.sleep(0.2)  # until the system has noted it
    for other, (host, pid) in enumerate(_Place.processes):
        if host == _host() and not _runs(pid):
            gone.append(f"process {other} of {world()} (id {pid} on {socket.gethostname()})")
    return f"{' and '.join(gone) or otherwise} is gone. {AFTER_LOSS}"


def _runs(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True
