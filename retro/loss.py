"""The loss, without all of the logits at once.

The logits of 16 samples of 2,048 tokens and a vocabulary of 128,000 are 17 GB in float32, and cross entropy keeps
several tensors of that size. Of as many tokens as fit a bound the loss is plain; of more it is a sum over pieces of
them, whose logits are computed once more in the backward pass rather than kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**26  # 268 MB in float32


def cross_entropy_in_pieces(logits_of: Callable[[Tensor], Tensor], h: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Sum of the cross entropies of `targets` (B, T), in nats; those of -100 are passed over.

    * `logits_of` turns states (n, D) into logits (n, n_vocab)
    * `h` (B, T, D) are the states
    """

    def nats(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(h).float(), targets, reduction="sum")

    h, targets, size = h.flatten(0, 1), targets.flatten(), max(1, LOGITS_AT_ONCE // n_vocab)
    if len(h) <= size:
        return nats(h, targets)
    pieces = zip(h.split(size), targets.split(size), strict=True)
    return sum((checkpoint(nats, *piece, use_reentrant=False) for piece in pieces), h.new_zeros(()))
