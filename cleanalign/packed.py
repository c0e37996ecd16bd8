"""Weights laid out as a CPU's matrix product reads them, for as long as they do not change: while replies are
sampled.

torch hands a bfloat16 product to oneDNN, which rearranges the weights in every call. With few rows that costs
as much as the product itself; done once for a whole call of `common.sample` it hardly counts. The numbers are
those of `F.linear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from cleanalign.models import backbone, head

WORTH = 8  # products with one weight that pay for rearranging it
FEW = 48  # rows; with more the product itself takes so long that the copy is not worth its memory


@contextlib.contextmanager
def packed(model, rows: int, products: int):
    """Context in which the linear layers of `model`'s transformer compute with weights rearranged on entry,
    which must not change meanwhile. They take the memory of these weights once more.

    Does nothing where torch cannot (`can_pack`), for products of more than `FEW` rows, or where fewer than
    `WORTH` are to come.
    """
    layers, weight = [], head(model)[0]
    try:
        if rows <= FEW and products >= WORTH and can_pack(weight.device, weight.dtype):
            for layer in backbone(model).modules():
                if isinstance(layer, torch.nn.Linear) and layer.weight.dtype == weight.dtype:
                    layer.forward = product_with(layer.weight, layer.bias)
                    layers.append(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the product for such weights: bfloat16, on a CPU where oneDNN computes with it.
    The operators are those that torch.compile emits; torch has no public name for them."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.enabled:
        return False
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    there = all(hasattr(torch.ops.mkldnn, name) for name in names)
    return there and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_with(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """`F.linear` with this weight (N, K) as it is now, and this bias (N,): (…, K) to (…, N)."""
    ready = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, ready, bias, "none", [], "")
