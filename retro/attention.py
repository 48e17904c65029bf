"""Parts of attention: masks, scores of distances, and plain products, for where torch's fused attention is slower.

Shapes: N rows of queries, H heads, L queries and S keys of d_k features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 128  # of a block of causal attention


def dot_product_attention(
    queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What `scaled_dot_product_attention` computes, in the faster way; arguments are as in `written_out_attention`.

    Torch's fused attention is made for long sequences. On a CPU it loses a third against plain products over the
    encoder's many short ones, and in bfloat16 its backward pass takes ten times as long.
    """
    is_long = keys.shape[2] > 128 and keys.dtype != torch.bfloat16
    attention = F.scaled_dot_product_attention if queries.device.type != "cpu" or is_long else written_out_attention
    return attention(queries, keys, values, attn_mask=attn_mask, is_causal=is_causal)


def written_out_attention(
    queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What `scaled_dot_product_attention` computes, as batched products.

    * `queries` (N, H, L, d_k), `keys` and `values` (N, H, S, d_k)
    * `attn_mask` (N, 1, 1, S) or (N, 1, L, S) is true where a key may be read, or (N, H, L, S) is added to scores; or
    * `is_causal`: row i reads keys 0..i (L = S); computed in blocks of rows, without most of what is barred

    Returns (N, H, L, d_k).
    """
    N, H, L, d = queries.shape
    q, k, v = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    if not is_causal:
        barred = q.new_zeros(1, 1, 1)
        if attn_mask is not None:
            added = attn_mask
            if attn_mask.dtype == torch.bool:
                added = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
            barred = added.expand(N, H, -1, -1).flatten(0, 1)
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


def padding_mask(present: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask (N, 1, 1, S) for rows of tokens `present` (N, S), and which rows have any (N).

    A row without any is opened whole, because a softmax over nothing is not a number; what
    it reads is for the caller to throw away.
    """
    if present is None:
        return None, None
    has_any = present.any(dim=-1)
    return (present | ~has_any[:, None])[:, None, None], has_any


class RelativePositions(nn.Module):
    r"""What the distance of query and key adds to their score (appendix B.1.2 of arXiv:2112.04426).

    $$\frac{q \cdot W c(d)}{\sqrt{d_k}} \qquad c(d)_{2i} = \sin \frac{d}{10000^{2i/D}}, \quad
    c(d)_{2i+1} = \cos \frac{d}{10000^{2i/D}}$$

    for the distance $d$, as in Transformer-XL (arXiv:1901.02860); $W$ is learnt.

    * `d_model` is D, the number of features of $c$
    * `most` is the largest distance; larger ones are taken for it
    """

    cosines: Tensor

    def __init__(self, d_model: int, n_heads: int, d_k: int, most: int) -> None:
        super().__init__()
        self.n_heads, self.most = n_heads, most
        self.project = nn.Linear(d_model, n_heads * d_k, bias=False)
        angles = torch.outer(torch.arange(-most, most + 1).float(), 10_000 ** -(torch.arange(0, d_model, 2) / d_model))
        cosines = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d_model]
        self.register_buffer("cosines", cosines, persistent=False)

    def keys(self) -> Tensor:
        """$W c(d)$ for each distance from -`most` to `most`: (2 * most + 1, H, d_k)."""
        return self.project(self.cosines).unflatten(-1, (self.n_heads, -1))

    def forward(self, queries: Tensor, distances: Tensor, mask: Tensor | None, keys: Tensor | None = None) -> Tensor:
        """What to add to the scores of queries (N, L, H, d_k) at `distances` (L, S) from keys -> (N, H, L, S).

        * `mask` (N, 1, 1, S), if given, is true where there is something to read; elsewhere it is minus infinity
        * `keys` are what `keys` gives, if it was called before
        """
        keys = self.keys() if keys is None else keys
        scores = torch.einsum("nlhd,phd->nhlp", queries, keys) * queries.shape[-1] ** -0.5
        places = (distances.clamp(-self.most, self.most) + self.most).expand(*scores.shape[:2], -1, -1)
        scores = scores.gather(-1, places)
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def fused_linear(*layers: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear layers over one input, as of a single wider layer: one product in place of several."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
