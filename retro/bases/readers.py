"""What reads neighbors in a layer of a pretrained model: a copy of its own attention, or the paper's, made anew.

Shapes: N rows of readers, each of L tokens that read the same S tokens; H heads, H_kv of keys and values; d_k features
of a head.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from retro.errors import InvalidOption
from retro.model import ChunkedCrossAttention

READS = "retro_neighbors"  # what `read_neighbors` is called among the attention functions of transformers


def read_neighbors(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    neighbors: dict[str, Any],
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: queries (N, H, L, d_k) read the keys and values that `neighbors` has.

    * `neighbors` has keys and values (N, H_kv, S, d_k), a mask (N, 1, 1, S) or None, gates and sinks (H), and shares: a
      list to which the attention (N, H, L, S) is appended, or None
    * `key` and `value` are of the readers themselves, and are not read

    Returns what is read (N, L, H, d_k).
    """
    keys, values, (N, H, L, d) = neighbors["keys"], neighbors["values"], query.shape
    H_kv = keys.shape[1]
    # The heads of a group share keys and values, so their queries are rows of one product.
    grouped = query.reshape(N, H_kv, -1, d)  # (N, H_kv, H/H_kv*L, d_k)
    scores = (grouped @ keys.to(query.dtype).mT).reshape(N, H, L, -1).float()
    scores = scores * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if neighbors["mask"] is not None:
        scores = scores.masked_fill(~neighbors["mask"], -torch.inf)
    sinks = neighbors["sink"].float().view(1, H, 1, 1).expand(N, H, L, 1)
    weights = torch.cat([sinks, scores], dim=-1).softmax(dim=-1)[..., 1:]  # (N, H, L, S)
    if neighbors["shares"] is not None:
        neighbors["shares"].append(weights.detach())
    read = weights.to(query.dtype).reshape(N, H_kv, -1, weights.shape[-1]) @ values.to(query.dtype)
    read = read.reshape(N, H, L, -1) * neighbors["gate"].to(query.dtype).view(1, H, 1, 1)
    return read.transpose(1, 2), None


AttentionInterface.register(READS, read_neighbors)


class CopiedReader(nn.Module):
    """Chunked cross-attention that begins as a copy of a layer's self-attention.

    * `attention` is the self-attention of a layer of the base
    * `n_heads` is the number of its heads
    * `arguments` are those of a call of it with 3m tokens, of which the last m have the positions of readers
    * `example` are keys and values of some token, (1, H_kv, 1, d_k) each

    Raises `InvalidOption` for an attention that does not ask transformers for its attention function.
    """

    def __init__(
        self, attention: nn.Module, n_heads: int, arguments: dict[str, Any], example: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        h = arguments["hidden_states"]
        m = h.shape[1] // 3
        self.gate = nn.Parameter(torch.zeros(n_heads, device=h.device))
        self.sink = nn.Parameter(torch.zeros(n_heads, device=h.device))
        # In full precision, whatever the base has: what a step of training adds is small.
        hooks, attention._forward_hooks = attention._forward_hooks, OrderedDict()  # of other readers of this base
        try:
            self.copy = copy.deepcopy(attention).float().eval().requires_grad_(True)
        finally:
            attention._forward_hooks = hooks
        self.copy.config = copy.copy(attention.config)
        self.copy.config._attn_implementation = READS  # type: ignore[union-attr]
        cos, sin = arguments.get("position_embeddings") or (None, None)  # without them, positions are in the states
        self.register_buffer("cos", None if cos is None else cos[0, -m:].clone(), persistent=False)  # (m, d)
        self.register_buffer("sin", None if sin is None else sin[0, -m:].clone(), persistent=False)
        try:
            self._leave_out_keys_and_values(attention, h[:, -m:], example)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # it takes no such argument, never asked
            kind = type(attention).__name__
            raise InvalidOption("base", kind, f"cannot be told what to read ({error}); use encoder='new'") from None

    def _leave_out_keys_and_values(self, attention: nn.Module, h: Tensor, example: tuple[Tensor, Tensor]) -> None:
        """Train what makes queries and outputs, and use the base's own modules for what the copy makes in vain.

        A gradient tells which is which. While gates are closed, only the bias of the output projection has one that is
        not zero; it is taken out, because where nothing is read nothing may be added.
        """
        with torch.enable_grad(), in_precision_of(h):
            read = self(h, torch.arange(h.shape[1], device=h.device)[None], *example, None)
            read.float().sum().backward()
        if self.sink.grad is None:
            raise TypeError("its attention function was not asked for")
        for weight in [*self.copy.parameters()]:
            if weight.grad is None:
                weight.requires_grad_(False)
            elif weight.grad.any():
                weight.data.zero_()
                weight.requires_grad_(False)
        for name, module in [*self.copy.named_modules()]:
            own = [*module.parameters(recurse=False)]
            if name and own and all(weight.grad is None for weight in own):
                self.copy.set_submodule(name, attention.get_submodule(name))
        for weight in self.parameters():
            weight.grad = None

    def forward(
        self,
        h: Tensor,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        shares: list[Tensor] | None = None,
    ) -> Tensor:
        """Readers `h` (N, L, D), as the layer's self-attention gets them, read keys and values (N, H_kv, S, d_k).

        * `rows` (N or 1, L) are the readers' places among the m that read the same
        * `mask` (N, 1, 1, S), if given, is true where there is a token to read
        * `shares`, if given, gets the attention of each head to each token, (N, H, L, S)

        Returns (N, L, D).
        """
        turned = {} if self.cos is None else {"position_embeddings": (self.cos[rows], self.sin[rows])}  # type: ignore[index]
        neighbors = {
            "keys": keys,
            "values": values,
            "mask": mask,
            "gate": self.gate,
            "sink": self.sink,
            "shares": shares,
        }
        return self.copy(hidden_states=h, attention_mask=None, **turned, neighbors=neighbors)[0]


class NewReader(ChunkedCrossAttention):
    """The paper's chunked cross-attention, which begins with an output projection of zero; called as `CopiedReader`."""

    def __init__(self, d_model: int, n_heads: int, d_k: int, chunk_len: int) -> None:
        super().__init__(d_model, n_heads, d_k, chunk_len)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        shares: list[Tensor] | None = None,
    ) -> Tensor:
        """States `h` (N, L, D) read keys and values (N, H, S, d_k) -> (N, L, D), in units of the size of `h`.

        * `rows` are not needed, as there are no positions; `mask` and `shares` are as in `CopiedReader`
        """
        queries = self.queries(h)
        if shares is not None:
            scores = queries.transpose(1, 2).float() @ keys.float().mT * self.d_k**-0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            shares.append(scores.softmax(dim=-1).detach())
        return self.attend(queries, keys, values, mask) * size_of(h)


def size_of(h: Tensor) -> Tensor:
    """The root mean square (..., 1) of states (..., D)."""
    return h.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6).type_as(h)


def in_precision_of(h: Tensor) -> Any:
    """Compute in the half precision of some states, if they have it: the weights of readers have the full one."""
    half = h.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(h.device.type, h.dtype) if half else nullcontext()
