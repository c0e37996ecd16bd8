"""Peak bytes of a phase at a size that no test could hold: the code runs on meta tensors, which have shapes and
no memory, and the storages that are alive are added up.

    with weighed.weighing() as scales:
        model = weighed.model("llama3-8b", scales)
        …
    scales.peak                        # bytes; scales.start() begins anew

A meta tensor that is asked for a number says 1. Attention holds what a fused kernel holds: its output and one
number for each row of scores. Blocks are rounded up to 512 bytes, as CUDA's allocator does; what that wastes
between them is not in the sum.
"""

from __future__ import annotations

import contextlib
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cleanalign import synthetic

GIB = 2**30


class Scales(TorchDispatchMode):
    """Adds up what is alive."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def start(self) -> int:
        """Forget the peak; returns the bytes that are held now."""
        self.peak = self.now
        return self.now

    def put(self, *values) -> None:
        """Count the storages of all tensors in `values`, once each."""
        for x in tree_leaves(values):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                storage = x.untyped_storage()
                key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
                if key not in self.alive:
                    self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self.take(key, size))
                    self.now += size
                    self.peak = max(self.peak, self.now)

    def take(self, key: int, size: int) -> None:
        """A storage is gone."""
        del self.alive[key]
        self.now -= size

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        name = kernel.overloadpacket.__name__
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.device.type == "meta":
            if name in ("item", "_local_scalar_dense"):
                return 1
            if name == "is_nonzero":
                return True
        out = kernel(*args, **(kwargs or {}))
        self.put(out)
        return out


class FusedAttention(torch.autograd.Function):
    """Shapes in, shapes out, and what the kernel saves for its backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(
            query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextlib.contextmanager
def weighing():
    """Context in which meta tensors are weighed; yields the `Scales`."""

    def attention(query, key, value, attn_mask=None, **_):
        return FusedAttention.apply(query, key, value, attn_mask)

    with mock.patch.object(F, "scaled_dot_product_attention", attention), Scales() as scales:
        yield scales


def model(name: str, scales: Scales):
    """A frozen bfloat16 model in the shapes of `name`, on the scales."""
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            synthetic.config(name), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    scales.put(*made.parameters(), *made.buffers())
    return made.eval().requires_grad_(False)
