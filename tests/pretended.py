"""A GPU that is not there: every tensor lies in host memory, computes there, and carries the device it would
be on.

    with pretended.cuda() as gpu:      # torch.device("cuda") works, x.device says cuda:0
        …
    gpu.waits                          # {(file:line, what, …): how often the host waited for the device there}

What a real one refuses is refused: tensors of two devices in one kernel, a GPU's tensor as a numpy array,
waiting while a graph is captured. A captured step runs nothing; a replay is the same kernels on the same
tensors, with every number of the host frozen. What it cannot show: speed, memory, and what a GPU's kernels
round otherwise.

The mark belongs to a tensor's storage, so that views share it. `Calls` sees what Python calls and answers
with devices; `Kernels` sees what reaches torch's dispatcher, the backward pass included, and hands marks on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = str(Path(__file__).resolve().parent.parent)
HERE = {__file__, str(Path(__file__).with_name("test_pretended.py"))}
# kernels that ask the device something: a size, a number, whether
ASKS = {
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}
ASKS |= {"repeat_interleave", "masked_scatter_backward"}
COPIES = {"copy_", "_to_copy", "set_", "set_data"}  # may have a tensor of either device
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Refused(RuntimeError):
    """What CUDA would not do."""


def marks(x: torch.Tensor) -> dict:
    """The marks of a tensor's storage: "gpu", "pinned"."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # within a vmap
        x = torch._C._functorch.get_unwrapped(x)
    storage = x.untyped_storage()
    if not hasattr(storage, "marks"):
        storage.marks = {}
    return storage.marks


def on_gpu(x: torch.Tensor) -> bool:
    """Whether a tensor is taken to be on the GPU."""
    return marks(x).get("gpu", False)


def tensors(*values) -> list[torch.Tensor]:
    """All tensors in nested values."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def line() -> str:
    """The innermost line of the project that is being run, file:line."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and name not in HERE:
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Gpu:
    """What was seen."""

    def __init__(self):
        self.waits: Counter = Counter()  # (file:line, what, while doing what)
        self.doing = lambda: None  # what the program is at, as a test knows it
        self.graph: Graph | None = None  # that is being captured
        self.graphs: list[Graph] = []
        self.products = 0  # of bfloat16 matrices, with float32 sums handed out

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        if self.graph is not None:
            raise Refused(f"operation not permitted when stream is capturing: {what}, {line()}")
        self.waits[line(), what, self.doing()] += 1

    def waits_while(self, doing) -> dict[str, int]:
        """Waits by "file:line what", of those while the program did that."""
        return {f"{where} {what}": n for (where, what, at), n in self.waits.items() if at == doing}


class Graph:
    """A captured step: kernels and the tensors they worked on."""

    def __init__(self, *_, **__):
        self.calls, self.before = [], {}

    def pool(self) -> str:
        """Memory to share with another graph: there is none."""
        return "pool"

    def about_to(self, kernel, args, kwargs) -> None:
        """Keep what a kernel will write to: capturing runs nothing."""
        names = [argument.name for argument in kernel._schema.arguments]
        values = dict(zip(names, args, strict=False)) | kwargs
        for argument in kernel._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(values.get(argument.name)):
                    storage = x.untyped_storage()
                    self.before.setdefault(storage._cdata, (storage, storage.clone()))

    def undo(self) -> None:
        """Everything as it was before the capture."""
        for storage, kept in self.before.values():
            storage.copy_(kept)
        self.before = {}

    def replay(self) -> None:
        """The same kernels on the same tensors; intermediate results are computed anew."""
        now: dict[int, torch.Tensor] = {}
        with torch._C.DisableTorchFunction():
            for kernel, args, kwargs, out in self.calls:
                args, kwargs = tree_map_only(torch.Tensor, lambda x: now.get(id(x), x), (args, kwargs))
                for old, new in zip(tensors(out), tensors(kernel(*args, **kwargs)), strict=True):
                    now[id(old)] = new


class Kernels(TorchDispatchMode):
    """Every kernel: are its tensors on one device, does it wait, where are its results."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.run(kernel, kernel.overloadpacket.__name__, args, kwargs or {})

    def run(self, kernel, name: str, args: tuple, kwargs: dict):
        """Check, run and mark."""
        gpu, given = self.gpu, tensors(args, kwargs)
        there = [on_gpu(x) for x in given]
        if name in INDEXING:
            if there[0] and any(x.dtype == torch.bool for x in tensors(args[1])):
                gpu.wait("boolean index")
            if not there[0] and any(there):
                raise Refused(f"{kernel}: an index on the GPU into a tensor of the host, {line()}")
            if there[0] and any(x.ndim and not here for x, here in zip(given, there, strict=True)):
                gpu.wait("index from the host")
        elif any(there) and name not in COPIES:
            for x, here in zip(given, there, strict=True):
                if not here and x.ndim:
                    raise Refused(f"{kernel}: tensors of two devices, {line()}")
        if name in ASKS and any(there):
            gpu.wait(name)
        if name == "copy_" and there[0] != there[1]:
            gpu.wait("copy between devices")
        if gpu.graph is not None:
            gpu.graph.about_to(kernel, args, kwargs)
        out = kernel(*args, **kwargs)
        if any(there) and (name not in COPIES or there[0]):
            for x in tensors(out):
                marks(x)["gpu"] = True
        if gpu.graph is not None:
            gpu.graph.calls.append((kernel, args, kwargs, out))
        return out


class Calls(TorchFunctionMode):
    """Every call from Python that names a device, or asks for one."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, call, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(call, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        here = first is not None and on_gpu(first)
        if name == "__get__" and here:
            answer = {"device": torch.device("cuda:0"), "is_cuda": True, "is_cpu": False}
            own = getattr(call.__self__, "__name__", "")
            if own in answer:
                return answer[own]
        if name == "pin_memory":
            copy = first.clone()
            marks(copy)["pinned"] = True
            return copy
        if name in ("numpy", "__array__") and here:
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, {line()}")
        if name == "tolist" and here:
            self.gpu.wait("tolist")
        if name == "mm" and "out_dtype" in kwargs:
            if not here or first.dtype != torch.bfloat16:
                raise Refused(f"mm with out_dtype, {line()}")
            self.gpu.products += 1
            return torch.mm(first.float(), args[1].float())
        generator = kwargs.get("generator")
        if generator is not None and generator.there != (here or "cuda" in str(kwargs.get("device"))):
            raise Refused(f"{name}: a generator of the other device, {line()}")
        if name in ("to", "cpu", "cuda"):
            return self.move(call, name, args, kwargs)
        if kwargs.get("device") is None:
            return call(*args, **kwargs)
        target = torch.device(kwargs["device"])
        if target.type != "cuda":
            return call(*args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray"):
            self.gpu.wait("upload")
        out = call(*args, **{**kwargs, "device": "cpu"})
        for x in tensors(out):
            marks(x)["gpu"] = True
        return out

    def move(self, call, name: str, args: tuple, kwargs: dict):
        """`x.to(…)`, `x.cpu()`, `x.cuda()`."""
        x, *rest = args
        target = torch.device(name) if name != "to" else kwargs.get("device")
        if rest and isinstance(rest[0], torch.Tensor):
            target, rest[0] = torch.device("cuda" if on_gpu(rest[0]) else "cpu"), rest[0].dtype
        elif name == "to" and rest and isinstance(rest[0], str | torch.device):
            target = rest.pop(0)
            rest = [torch.device("cpu"), *rest]
        if target is None or torch.device(target).type not in ("cpu", "cuda"):
            return call(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        there = torch.device(target).type == "cuda"
        same = x.to(*rest, **kwargs) if name == "to" else x
        if there == on_gpu(x):
            return same
        if not (there and kwargs.get("non_blocking") and marks(x).get("pinned")):
            self.gpu.wait("upload" if there else "to the host")
        return Moved.apply(same, there)


class Moved(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx, x, there):
        ctx.there = there
        copy = x.clone()
        marks(copy)["gpu"] = there
        return copy

    @staticmethod
    def backward(ctx, grad):
        copy = grad.clone()
        marks(copy)["gpu"] = not ctx.there
        return copy, None


class Clock:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        """Note the time."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: Clock) -> float:
        """Milliseconds until `end`."""
        return 1e3 * (end.at - self.at)


class Generator(torch.Generator):
    """Its numbers are the host's; a GPU draws others."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.there = torch.device(device).type == "cuda"
        return made


@contextlib.contextmanager
def cuda(free: int = 78 * 2**30):
    """Context with one GPU, of whose memory `free` bytes are free; yields what is seen, a `Gpu`."""
    gpu = Gpu()

    @contextlib.contextmanager
    def capture(graph, pool=None):
        gpu.graph = graph
        try:
            yield
        finally:
            gpu.graph = None
            gpu.graphs.append(graph)
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                graph.undo()

    nothing = lambda *_, **__: None  # noqa: E731
    answers = dict(
        is_available=lambda: True,
        is_initialized=lambda: False,
        is_bf16_supported=lambda including_emulation=True: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda *_: "pretended",
        get_device_capability=lambda *_: (9, 0),
        mem_get_info=lambda *_: (free, free),
        memory_reserved=lambda *_: 0,
        memory_allocated=lambda *_: 0,
        max_memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=nothing,
        empty_cache=nothing,
        synchronize=lambda *_: gpu.wait("synchronize"),
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=nothing,
        manual_seed=nothing,
        manual_seed_all=nothing,
        Event=Clock,
        CUDAGraph=Graph,
        graph=capture,
    )
    with contextlib.ExitStack() as stack:
        # transformers would load weights in threads, which do not know of this GPU
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(Kernels(gpu))
        stack.enter_context(Calls(gpu))
        yield gpu
