"""Weights to begin with, as GPT-2 and most after it draw them, in place of the defaults of PyTorch's layers."""

from __future__ import annotations

import math
import zlib
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def initialized(model: Model, std: float) -> Model:
    r"""A `RetroModel`, with its weights drawn anew; returns it.

    * `std` is their standard deviation. Of the $2L$ projections that are added to the states of a decoder or encoder of
      $L$ layers it is divided by $\sqrt{2L}$, so that states do not grow with depth (section 2.3 of the GPT-2 report)

    Biases begin with 0. What is drawn for a layer depends on torch's seed and the layer's name alone, so that a decoder
    begins with the same weights whether it reads neighbors or not.
    """
    n_layers = {"encoder": len(model.encoder.ffw) if model.encoder is not None else 0}  # type: ignore[union-attr, arg-type]
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)) and not layer.weight.is_meta:
            L = n_layers.get(name.partition(".")[0], len(model.ffw))  # type: ignore[arg-type]
            is_residual = name.endswith((".output", ".lin2"))
            generator = torch.Generator().manual_seed(
                torch.initial_seed() % 2**32 * 2**31 + zlib.crc32(name.encode()) // 2
            )
            drawn = torch.randn(layer.weight.shape, generator=generator) * std
            layer.weight.copy_(drawn / math.sqrt(2 * L) if is_residual else drawn)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                layer.bias.zero_()
    return model
