"""The loss, without keeping more of the logits than it has to.

The logits of 16 samples of 2,048 tokens and a vocabulary of 128,000 are 17 GB in float32, and torch's cross entropy
keeps several tensors of that size. Here a few rows at a time are in float32, and what is kept is the gradient of the
logits, in their own precision. Where even these are too many, they are computed for a part of the tokens at a time, and
once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**27  # that are kept: 268 MB in bfloat16
ROWS_AT_ONCE = 2**21  # logits of some rows in float32: 8 MB, which a processor's cache may hold
MORE_ON_A_GPU = 32  # times as many, since it has to start a kernel for each


def cross_entropy_in_parts(logits_of: Callable[[Tensor], Tensor], h: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Sum of the cross entropies of `targets` (B, T), in nats; those of -100 are passed over.

    * `logits_of` turns states (n, D) into logits (n, n_vocab)
    * `h` (B, T, D) are the states
    """

    def nats(h: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits_of(h), targets)

    h, targets, size = h.flatten(0, 1), targets.flatten(), max(1, LOGITS_AT_ONCE // n_vocab)
    if len(h) <= size:
        return nats(h, targets)
    parts = zip(h.split(size), targets.split(size), strict=True)
    return sum((checkpoint(nats, *part, use_reentrant=False) for part in parts), h.new_zeros(()))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of `targets` (n), of their `logits` (n, n_vocab); those of -100 are passed over."""
    most = ROWS_AT_ONCE * (1 if logits.device.type == "cpu" else MORE_ON_A_GPU)
    if logits.numel() <= most or torch.compiler.is_compiling():  # which makes one loop of it
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return _CrossEntropy.apply(logits, targets, max(1, most // logits.shape[1]))


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy whose gradient is made with it, from the same probabilities, while these are at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: int) -> Tensor:
        ctx.gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        for start in range(0, len(logits), rows):
            log_p, of = logits[start : start + rows].float().log_softmax(dim=-1), targets[start : start + rows]
            total += F.nll_loss(log_p, of, reduction="sum")
            if ctx.gradient is not None:  # p, less 1 for the target
                p, predicted = log_p.exp_(), (of >= 0)[:, None]
                p.scatter_add_(1, of.clamp(min=0)[:, None], -p.new_ones(len(of), 1))
                torch.mul(p, predicted, out=p)
                ctx.gradient[start : start + rows] = p
        return total

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of this loss was used up by the backward pass before")
        return gradient.mul_(of_outputs[0]), None, None
