"""FlexAttention's kernel as plain matrix products, for a CPU, which has no backward pass of it: of the blocks of
its mask it visits those that are listed, and no other."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

KERNEL = "transformers.integrations.flex_attention.compile_friendly_flex_attention"


def numbers(x: torch.Tensor, n: int) -> torch.Tensor:
    """0 … n − 1, made from `x`, so that they are where it is on a pretended GPU too."""
    return x.new_ones(n, dtype=torch.long).cumsum(0) - 1


def visible(block_mask) -> torch.Tensor:
    """(G, 1, L, L) bool: the positions that the kernel lets a position attend to."""

    def listed(count, indices):  # (G, 1, n), (G, 1, n, n) to (G, 1, n, n): which blocks stand in the list
        n = numbers(indices, indices.shape[-1])
        return ((indices[..., None] == n) & (n < count[..., None])[..., None]).any(-2)

    def positions(blocks):  # each block as its 128 × 128 positions
        size = block_mask.BLOCK_SIZE[0]
        wide = blocks[:, :, :, None, :, None].expand(-1, -1, -1, size, -1, size)
        return wide.flatten(4, 5).flatten(2, 3)[:, :, :L, :L]

    G, _, L, _ = block_mask.shape
    partial = positions(listed(block_mask.kv_num_blocks, block_mask.kv_indices))
    full = positions(listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    g, place = numbers(partial, G), numbers(partial, L)
    asked = block_mask.mask_mod(g[:, None, None], None, place[:, None], place)[:, None]
    return full | (partial & asked)


def attention(query, key, value, *, block_mask, enable_gqa, scale, return_aux, **_):
    """In the kernel's place. The logarithms of the rows' sums, which a GPU's hands out too, nobody uses."""
    mask = visible(block_mask)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )
    return out if return_aux is None else (out, SimpleNamespace(lse=out[..., 0]))
