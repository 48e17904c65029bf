"""Attention as plain products, for where torch's fused attention is slower.

Shapes: N rows of queries, H heads, L queries and S keys of d_k features.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128  # of a block of causal attention


def is_faster_written_out(queries: Tensor, keys: Tensor) -> bool:
    """Whether torch's fused attention is the slower way.

    It is made for long sequences. On a CPU it loses a third against plain products over the
    encoder's many short ones, and in bfloat16 its backward pass takes ten times as long.
    """
    return queries.device.type == "cpu" and (keys.shape[2] <= 128 or keys.dtype == torch.bfloat16)


def written_out_attention(
    queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What `scaled_dot_product_attention` computes, as batched products.

    * `queries` (N, H, L, d_k), `keys` and `values` (N, H, S, d_k)
    * `attn_mask` (N, 1, 1, S) or (N, 1, L, S) is true where a key may be read; or
    * `is_causal`: row i reads keys 0..i (L = S); computed in blocks of rows, without most of what is barred

    Returns (N, H, L, d_k).
    """
    N, H, L, d = queries.shape
    q, k, v = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    if not is_causal:
        barred = q.new_zeros(1, 1, 1)
        if attn_mask is not None:
            barred = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf).expand(N, H, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(barred, q, k.mT, alpha=d**-0.5).softmax(dim=-1)  # (N*H, L, S)
        return torch.bmm(weights, v).unflatten(0, (N, H))
    rows = []
    for start in range(0, L, ROWS):
        block = q[:, start : start + ROWS]
        end = start + block.shape[1]
        barred = q.new_full((block.shape[1], end), -torch.inf).triu(1 + start)
        weights = torch.baddbmm(barred, block, k[:, :end].mT, alpha=d**-0.5).softmax(dim=-1)  # (N*H, <=ROWS, end)
        rows.append(torch.bmm(weights, v[:, :end]))
    return torch.cat(rows, dim=1).unflatten(0, (N, H))
