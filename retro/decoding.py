"""Decoders: a model over one growing text, token by token, each state computed once.

Positions read the same neighbors from the last token of a chunk up to the next chunk's last but one. A decoder takes
tokens of one such stretch at a time, and gives the logits that the whole text would give.

Shapes as in `retro.model`; n are the tokens of a call, `length` all tokens so far.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from retro.in_context import InContext, put_before
from retro.model import RetroModel, RotaryPositionalEmbeddings
from retro.retrofit import Decoding, Model, Retrofit


def decoder_of(model: Model | InContext, reads: bool = True) -> Decoder:
    """What runs a model over a growing text; any that is called with tokens and neighbors will do.

    * `reads`: it is given neighbors, if the model has layers to read them
    """
    reads = reads and bool(model.ca_layers)
    if isinstance(model, RetroModel):
        return CachedDecoder(model, reads)
    if isinstance(model, InContext):
        return InContextDecoder(model, reads)
    return RetrofitDecoder(model, reads) if isinstance(model, Retrofit) else RecomputingDecoder(model, reads)


def completes_chunk(length: int, chunk_len: int) -> bool:
    """Whether the token after `length` tokens is the last of a chunk, so that its neighbors are due."""
    return (length + 1) % chunk_len == 0


def n_next(length: int, chunk_len: int) -> int:
    """How many tokens after `length` tokens read the same neighbors, so that one call can take them."""
    return chunk_len if completes_chunk(length, chunk_len) else chunk_len - 1 - length % chunk_len


class Decoder(ABC):
    """A model over one growing text.

    * `chunk_len` is the model's
    * `reads`: it is given neighbors; otherwise stretches are as long as anyone likes
    """

    length = 0

    def __init__(self, chunk_len: int, reads: bool = True) -> None:
        self.chunk_len, self.reads = chunk_len, reads

    @abstractmethod
    def restart(self) -> None:
        """Forget all tokens; the next one is the first of a text."""

    @property
    def completes_chunk(self) -> bool:
        """Whether the next token is the last of a chunk, so that its neighbors are due."""
        return completes_chunk(self.length, self.chunk_len)

    def n_next(self) -> int:
        """How many tokens the next call of `feed` can take."""
        return n_next(self.length, self.chunk_len) if self.reads else sys.maxsize

    @abstractmethod
    def kept(self) -> Iterable[Tensor]:
        """What is kept of the text, and of the neighbors it reads."""

    @abstractmethod
    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        """Take in tokens (n); returns the logits (n_vocab) for the token after them.

        * `ret` (K, R) are the neighbors of the chunk that the first token completes; None to read nothing
        """


class RecomputingDecoder(Decoder):
    """A decoder of whatever model is called with tokens and neighbors: it computes everything anew for each token."""

    def __init__(self, model: Any, reads: bool = True) -> None:
        super().__init__(model.chunk_len, reads)
        self.model = model
        self.restart()

    def restart(self) -> None:
        self.length = 0
        self.tokens: list[Tensor] = []
        self.ret: list[Tensor | None] = []  # of each whole chunk

    def kept(self) -> Iterable[Tensor]:
        return self.tokens

    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        if self.reads and self.completes_chunk:
            self.ret.append(ret)
        self.tokens.append(tokens)
        self.length += len(tokens)
        return self.model(torch.cat(self.tokens)[None], self._neighbors())[0, -1]

    def _neighbors(self) -> Tensor | None:
        """Neighbors (1, C, K, R) of the whole chunks; those that are missing are -1."""
        if not (given := [ret for ret in self.ret if ret is not None]):
            return None
        return torch.stack([torch.full_like(given[0], -1) if ret is None else ret for ret in self.ret])[None]


class RetrofitDecoder(Decoder):
    """A decoder of a pretrained model, with the cache that transformers makes for it."""

    def __init__(self, model: Retrofit, reads: bool = True) -> None:
        super().__init__(model.chunk_len, reads)
        self.model, self.last_only = model, _last_only(model.base)
        self.restart()

    def restart(self) -> None:
        base = self.model.base
        self.length = 0
        self.cache = DynamicCache(config=base.config)
        self.decoding = Decoding(self.model, torch.zeros(1, dtype=torch.long, device=base.device))

    def kept(self) -> Iterable[Tensor]:
        yield from _states_of(self.cache)
        for pair in self.decoding.contexts.values():
            yield from pair

    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        n = len(tokens)
        assert 0 < n <= self.n_next(), "tokens of two stretches in one call"
        if self.completes_chunk and ret is None:  # what was read before is read no more
            self.decoding.forget()
        with self.decoding.goes_on(n, ret if ret is None else ret[None]) if self.reads else nullcontext():
            output = self.model.base(
                input_ids=tokens[None], past_key_values=self.cache, use_cache=True, **self.last_only
            )
        self.length += n
        return output.logits[0, -1]


class InContextDecoder(Decoder):
    """A decoder of a pretrained model that has the neighbors before the text; behind others it reads the text anew."""

    def __init__(self, model: InContext, reads: bool = True) -> None:
        super().__init__(model.chunk_len, reads)
        self.model, self.last_only = model, _last_only(model.base)
        self.restart()

    def restart(self) -> None:
        self.length = 0
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.model.base.device)
        self.before = np.zeros(0, dtype=np.int64)
        self.cache = DynamicCache(config=self.model.base.config)

    def kept(self) -> Iterable[Tensor]:
        return _states_of(self.cache)

    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        m, unread = self.chunk_len, tokens
        self.tokens = torch.cat([self.tokens, tokens])
        if self.reads and self.completes_chunk:
            before = self.before[:0] if ret is None else put_before(ret.cpu().numpy(), m)
            n_most = (self.model.max_chunks or sys.maxsize) * m
            if len(before) + self.length + m > n_most or not np.array_equal(before, self.before):
                n_left_out = -(-max(0, len(before) + self.length + m - n_most) // m) * m  # the oldest of the text
                self.before, self.cache = before, DynamicCache(config=self.model.base.config)
                unread = torch.cat([torch.from_numpy(before).to(tokens), self.tokens[n_left_out:]])
        self.length += len(tokens)
        output = self.model.base(input_ids=unread[None], past_key_values=self.cache, use_cache=True, **self.last_only)
        return output.logits[0, -1]


def _last_only(base: Any) -> dict[str, int]:
    """What tells a base that of many tokens only the last one's logits are wanted, if it can leave out the others."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


def _states_of(cache: DynamicCache) -> Iterable[Tensor]:
    for layer in cache.layers:
        yield from (x for x in vars(layer).values() if isinstance(x, Tensor))


class CachedDecoder(Decoder):
    """Runs a `RetroModel` over one growing sequence, computing each state once.

    For a single token a layer's products take microseconds, so what could be done in advance is: projections joined,
    weights transposed, rotations made. Changes of the model after that are not seen.

    Shapes as in `retro.model`; n are the tokens of a call, `length` all tokens so far.
    """

    def __init__(self, model: RetroModel, reads: bool = True) -> None:
        super().__init__(model.chunk_len, reads)
        self.model = model
        attention: Any = model.attn[0]
        self.n_heads, self.d_k = attention.n_heads, attention.d_k
        self.layers = [_Layer(attn, ffw) for attn, ffw in zip(model.attn, model.ffw, strict=True)]
        readers = zip(model.ca_layers, model.cca, strict=True) if reads else ()
        self.readers = {p: _Reader(cca) for p, cca in readers}
        self.restart()
        self._reserve(256)

    def restart(self) -> None:
        """Forget all tokens; the next one is the first of a sequence."""
        self.length = 0
        self.chunk: list[Tensor] = []  # states (n, D) of the unfinished chunk, where the encoder reads them
        self.contexts: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the neighbors, by layer
        self.mask: Tensor | None = None  # of the neighbors' tokens, where some are missing
        self.neighbors = (0, 0)  # how many they are, and of how many tokens

    def kept(self) -> Iterable[Tensor]:
        yield from (layer.kept[:, :, : self.length] for layer in self.layers)
        for pair in self.contexts.values():
            yield from pair

    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        n = len(tokens)
        assert 0 < n <= self.n_next(), "tokens of two stretches in one call"
        self._reserve(self.length + n)
        h = self.model.emb(tokens)  # (n, D)
        for p, layer in enumerate(self.layers):
            h = h + self._attend(layer, h)
            if p in self.readers:
                if p == self.model.ca_layers[0]:
                    self._take_up(h, ret)
                if self.contexts:
                    reader = self.readers[p]
                    queries = reader.query(reader.norm(h)).view(n, self.n_heads, self.d_k)
                    mask = reader.with_positions(self.mask, queries, self.length, *self.neighbors)
                    h = h + reader.output(self._read(queries.transpose(0, 1), *self.contexts[p], mask))
            h = h + layer.lin2(layer.lin1(layer.norm_ffw(h)).relu_())
        self.length += n
        return self.model.logits(h[-1])

    def _attend(self, layer: _Layer, h: Tensor) -> Tensor:
        """Causal self-attention of the new states (n, D), whose keys and values are kept."""
        start, end, H, d = self.length, self.length + len(h), self.n_heads, self.d_k
        qkv = layer.project(layer.norm(h)).view(len(h), 3 * H, d)
        rotated = RotaryPositionalEmbeddings.rotate(qkv[:, : 2 * H], self.rotations[start:end]).transpose(
            0, 1
        )  # (2H, n, d_k)
        layer.kept[0, :, start:end] = rotated[H:]
        layer.kept[1, :, start:end] = qkv[:, 2 * H :].transpose(0, 1)
        mask = None
        if len(h) > 1:  # row i of the new positions reads all before them and the new ones up to itself
            mask = torch.ones(len(h), end, dtype=torch.bool, device=h.device).tril(start)
        return layer.output(self._read(rotated[:H], layer.kept[0, :, :end], layer.kept[1, :, :end], mask))

    @staticmethod
    def _read(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Queries (H, n, d_k) read keys and values (H, S, d_k) -> (n, H*d_k).

        * `mask`, if given, is true where there is something to read, or is added to the scores
        """
        scores = torch.bmm(queries, keys.mT).mul_(queries.shape[-1] ** -0.5)  # (H, n, S)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        return torch.bmm(scores.softmax(dim=-1), values).transpose(0, 1).flatten(1)

    def _take_up(self, h: Tensor, ret: Tensor | None) -> None:
        """Keep the states of the current chunk; if the first one completes it, encode its neighbors."""
        if not self.completes_chunk:
            self.chunk.append(h)
            return
        chunk = torch.cat([*self.chunk, h[:1]])  # (m, D)
        self.chunk = [h[1:]]
        self.contexts = {}
        if ret is None or not (present := ret >= 0).any():
            return
        whole = bool(present.all())
        e = self.model.encode(ret[None, None], chunk[None], None if whole else present[None, None])  # (1, 1, K, R, D)
        self.mask, self.neighbors = None if whole else present.flatten(), (ret.shape[0], ret.shape[1])
        for p, cca in zip(self.model.ca_layers, self.model.cca, strict=True):
            keys, values = cca.keys_values(e.flatten(1, 3))  # type: ignore[operator]
            self.contexts[p] = keys[0], values[0]

    def _reserve(self, length: int) -> None:
        """Make room for keys and values of `length` positions; it doubles, so that adding one costs the same always."""
        room = self.layers[0].kept.shape[2]
        if length > room:
            room = max(length, 2 * room)
            attention: Any = self.model.attn[0]
            self.rotations = attention.rotary_pe.rotations(0, room)  # (room, 1, d_k/2)
            for layer in self.layers:
                kept = layer.kept.new_empty(2, self.n_heads, room, self.d_k)
                kept[:, :, : self.length] = layer.kept[:, :, : self.length]
                layer.kept = kept


class BatchDecoder:
    """Runs a `RetroModel` over several growing texts of any lengths; a call takes in some tokens of some texts.

    * `model` is the model
    * `n_texts` is the number of texts, and `room` the most tokens of each

    Shapes as in `CachedDecoder`; n are the texts of a call, L the tokens that it takes in of each.
    """

    def __init__(self, model: RetroModel, n_texts: int, room: int) -> None:
        one, new = CachedDecoder(model), model.emb.weight.new_zeros
        self.model, self.chunk_len, self.n_heads, self.d_k = model, model.chunk_len, one.n_heads, one.d_k
        self.layers, self.readers = one.layers, one.readers
        self.rotations = model.attn[0].rotary_pe.rotations(0, room)  # type: ignore[union-attr, operator]
        self.lengths = [0] * n_texts
        self.kept = [new(2, n_texts, one.n_heads, room, one.d_k) for _ in one.layers]  # keys and values
        self.chunk = new(n_texts, model.chunk_len, model.d_model)  # states of the chunk, where the encoder reads them
        self.contexts: dict[int, Tensor] = {}  # keys and values (2, n_texts, H, S, d_k) of the neighbors, by layer
        self.mask = new(n_texts, 0, dtype=torch.bool)  # of the neighbors' tokens
        self.has_neighbor = new(n_texts, dtype=torch.bool)
        self.neighbors = (0, 0)  # how many they are, and of how many tokens

    def restart(self, row: int) -> None:
        """Forget the tokens of a text; its next one is its first."""
        self.lengths[row] = 0
        self.has_neighbor[row] = False

    def completes_chunk(self, row: int) -> bool:
        """Whether the next token of a text is the last of a chunk, so that its neighbors are due."""
        return completes_chunk(self.lengths[row], self.chunk_len)

    def n_next(self, row: int) -> int:
        """How many tokens of a text the next call of `feed` can take."""
        return n_next(self.lengths[row], self.chunk_len)

    def feed(self, rows: list[int], tokens: Tensor, neighbors: dict[int, Tensor]) -> Tensor:
        """Take in tokens (n, L) of the texts `rows`; returns the logits (n, n_vocab) for the tokens after them.

        The first tokens complete a chunk in all of these texts, or in none.

        * `neighbors` are those (K, R) of the completed chunks, by text; one that is left out reads nothing from now on
        """
        L, device = tokens.shape[1], tokens.device
        firsts = torch.tensor([self.lengths[row] for row in rows], device=device)
        places = firsts[:, None] + torch.arange(L, device=device)  # (n, L)
        at, end = torch.tensor(rows, device=device), max(self.lengths[row] for row in rows) + L
        all_rows = rows == list(range(len(self.lengths)))
        of_rows: Any = slice(None) if all_rows else at  # of all of them nothing is copied
        mask = (torch.arange(end, device=device) <= places[:, :, None])[:, None]  # (n, 1, L, end)
        h = self.model.emb(tokens)  # (n, L, D)
        for p, (layer, kept) in enumerate(zip(self.layers, self.kept, strict=True)):
            qkv = self._project(layer.project, layer.norm(h))  # (n, L, 3H, d_k)
            rotated = RotaryPositionalEmbeddings.rotate(qkv[:, :, : 2 * self.n_heads], self.rotations[places])
            queries, keys = rotated.chunk(2, dim=2)
            kept[0, at[:, None], :, places] = keys
            kept[1, at[:, None], :, places] = qkv[:, :, 2 * self.n_heads :]
            h = h + self._read(layer.output, queries, kept[:, of_rows, :, :end], mask)
            if p in self.readers:
                if p == self.model.ca_layers[0]:
                    self._take_up(rows, h, neighbors)
                if self.contexts:
                    h = h + self._read_neighbors(p, h, of_rows, places)
            h = h + self._rows(layer.lin2, self._rows(layer.lin1, layer.norm_ffw(h)).relu_())
        for row in rows:
            self.lengths[row] += L
        return self.model.logits(h[:, -1])

    @staticmethod
    def _rows(linear: _Linear, x: Tensor) -> Tensor:
        """A layer that takes rows, over `x` (n, L, ...)."""
        return linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _project(self, linear: _Linear, x: Tensor) -> Tensor:
        """`x` (n, L, D) -> heads (n, L, H, d_k), or three times as many."""
        return self._rows(linear, x).unflatten(-1, (-1, self.d_k))

    def _read(self, output: _Linear, queries: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        """Queries (n, L, H, d_k) read keys and values (2, n, H, S, d_k), as `mask` lets them -> (n, L, D)."""
        read = F.scaled_dot_product_attention(queries.transpose(1, 2), kept[0], kept[1], attn_mask=mask)
        return self._rows(output, read.transpose(1, 2).flatten(2))

    def _read_neighbors(self, p: int, h: Tensor, of_rows: Any, places: Tensor) -> Tensor:
        """What states (n, L, D) at `places` (n, L) read of the neighbors in layer `p` -> (n, L, D)."""
        reader, mask = self.readers[p], self.mask[of_rows][:, None, None]  # (n, 1, 1, S)
        queries = self._project(reader.query, reader.norm(h))
        if reader.keys is not None:
            readers = ((places + 1) % self.chunk_len)[:, None]  # (n, 1, L)
            mask = reader.cca.with_positions(mask, queries, readers, *self.neighbors, reader.keys)
        read = self._read(reader.output, queries, self.contexts[p][:, of_rows], mask)
        return torch.where(self.has_neighbor[of_rows][:, None, None], read, 0.0)

    def _take_up(self, rows: list[int], h: Tensor, neighbors: dict[int, Tensor]) -> None:
        """Keep the states (n, L, D) of the texts' chunks; those that the first tokens complete read neighbors now."""
        begun = [self.lengths[row] % self.chunk_len for row in rows]
        if self.completes_chunk(rows[0]):
            self.chunk[rows, -1] = h[:, 0]
            self._encode(rows, neighbors)
            h, begun = h[:, 1:], [0] * len(rows)
        for row, start, of_row in zip(rows, begun, h, strict=True):
            self.chunk[row, start : start + len(of_row)] = of_row

    def _encode(self, rows: list[int], neighbors: dict[int, Tensor]) -> None:
        """Keep keys and values of the neighbors of the chunks that are complete."""
        self.has_neighbor[rows] = False
        reading = [row for row in rows if row in neighbors and (neighbors[row] >= 0).any()]
        if not reading:
            return
        ret = torch.stack([neighbors[row] for row in reading])  # (n, K, R)
        present, self.neighbors = ret >= 0, (ret.shape[1], ret.shape[2])
        e = self.model.encode(ret[:, None], self.chunk[reading], None if present.all() else present[:, None])
        for p, cca in zip(self.model.ca_layers, self.model.cca, strict=True):
            read = torch.stack(cca.keys_values(e.flatten(1, 3)))  # type: ignore[operator]
            if p not in self.contexts:  # the first neighbors of all
                self.contexts[p] = read.new_zeros(2, len(self.lengths), *read.shape[2:])
                self.mask = present.new_ones(len(self.lengths), read.shape[3])
            self.contexts[p][:, reading] = read
        self.mask[reading] = present.flatten(1)
        self.has_neighbor[reading] = True


class _Linear:
    """A linear layer for few rows: its weight (in, out) lies in the order in which they read it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.t().contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class _Norm:
    """A layer that normalizes, without the overhead of a module."""

    def __init__(self, norm: Any) -> None:
        self.shape, self.weight, self.eps = norm.normalized_shape, norm.weight, norm.eps
        self.bias = getattr(norm, "bias", None)  # which RMSNorm has not

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class _Layer:
    """Self-attention and feed-forward of one layer, and the keys and values (2, H, room, d_k) kept so far."""

    def __init__(self, attn: Any, ffw: Any) -> None:
        self.norm, self.norm_ffw = _Norm(attn.norm), _Norm(ffw.norm)
        self.project = _Linear(*attn.projection())
        self.output = _Linear(attn.output.weight, attn.output.bias)
        self.lin1 = _Linear(ffw.lin1.weight, ffw.lin1.bias)
        self.lin2 = _Linear(ffw.lin2.weight, ffw.lin2.bias)
        self.kept = attn.output.weight.new_empty(2, attn.n_heads, 0, attn.d_k)


class _Reader:
    """Chunked cross-attention of one layer, on the side of the decoder."""

    def __init__(self, cca: Any) -> None:
        self.norm = _Norm(cca.norm)
        self.query = _Linear(cca.query.weight, cca.query.bias)
        self.output = _Linear(cca.output.weight, cca.output.bias)
        self.cca, self.keys = cca, None if cca.positions is None else cca.positions.keys()

    def with_positions(self, mask: Tensor | None, queries: Tensor, start: int, K: int, R: int) -> Tensor | None:
        """The mask (S) of the tokens of K neighbors, with what the places of queries (n, H, d_k), from `start`, add."""
        if self.keys is None:
            return mask
        rows = (start + 1 + torch.arange(len(queries), device=queries.device)) % self.cca.chunk_len
        return self.cca.with_positions(mask, queries[None], rows, K, R, self.keys)[0]
