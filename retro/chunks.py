"""Where the readers of neighbors stand in a sequence, as drawn in `retro.model`.

Shapes: as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunks_of_readers(h: Tensor, C: int, m: int) -> Tensor:
    r"""States `h` (B, T, D) -> for each of C chunks the states (B*C, m, D) that read its neighbors.

    Row 0 becomes the last token of $C_1$, the first that may know $\text{RET}(C_1)$. What exceeds the last chunk's m
    readers is cut off, what is short of them is filled up.
    """
    B, T, D = h.shape
    return F.pad(h, (0, 0, -(m - 1), C * m - (T - (m - 1)))).reshape(B * C, m, D)


def back_in_place(read: Tensor, h: Tensor) -> Tensor:
    """What was read (B*C, m, D), each row where its state stands in `h` (B, T, D); zeros for those who read nothing."""
    (_, m, D), (B, T, _) = read.shape, h.shape
    read = read.reshape(B, -1, D)  # (B, C*m, D)
    return F.pad(read, (0, 0, m - 1, T - (m - 1) - read.shape[1]))


def require_whole_chunks(x: Tensor, ret: Tensor, chunk_len: int) -> None:
    """Raise `ValueError` where neighbors `ret` (B, C, K, R) are not of whole chunks of the texts `x` (B, T)."""
    if len(ret) != len(x):
        raise ValueError(f"there are neighbors for {len(ret)} texts, but tokens of {len(x)}; give each text its own")
    if ret.shape[1] * chunk_len > x.shape[1]:
        raise ValueError(
            f"there are neighbors for {ret.shape[1]} chunks of {chunk_len} tokens, "
            f"but the sequence has {x.shape[1]} tokens; drop the neighbors of incomplete chunks"
        )


def begun_at(h: Tensor, starts: Tensor | None) -> Tensor:
    """States `h` (B, T, D) moved to the left by `starts` (B), or to the right where these are negative."""
    if starts is None:
        return h
    T = h.shape[1]
    places = torch.arange(T, device=h.device) + starts[:, None]  # (B, T)
    moved = h.gather(1, places.clamp(0, T - 1)[..., None].expand_as(h))
    return moved.masked_fill(~((places >= 0) & (places < T))[..., None], 0.0)
