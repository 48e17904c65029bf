"""Text from the model, with live retrieval.

Whenever a chunk is complete, its neighbors are retrieved from the database and encoded, once; from
the chunk's last token on, the decoder reads them. Each decoder state is computed once as well: the
keys and values of self-attention are kept for all positions, those of chunked cross-attention for
the last chunk's neighbors. What comes out is the same as recomputing everything for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retro.config import SampleConfig
from retro.database import RetroIndex
from retro.errors import InvalidOption
from retro.model import RetroModel, RotaryPositionalEmbeddings
from retro.text.corpus import Corpus


@dataclass(frozen=True)
class Neighbor:
    """A retrieved neighbor: where it comes from, and its text with the continuation."""

    document: str
    offset: int  # tokens from the start of the document
    distance: float  # squared L2 distance of the embeddings
    text: str


class CachedDecoder:
    """Runs a model over one growing sequence, computing each state once.

    Positions read the same neighbors from the last token of a chunk up to the next chunk's last but
    one. `feed` takes tokens of one such stretch at a time. For a single token a layer's products
    take microseconds, so what could be done in advance is: projections joined, weights transposed,
    rotations made. Changes of the model after that are not seen.

    Shapes as in `retro.model`; n are the tokens of a call, `length` all tokens so far.
    """

    def __init__(self, model: RetroModel) -> None:
        self.model = model
        attention: Any = model.attn[0]
        self.n_heads, self.d_k = attention.n_heads, attention.d_k
        self.layers = [_Layer(attn, ffw) for attn, ffw in zip(model.attn, model.ffw, strict=True)]
        self.readers = {p: _Reader(cca) for p, cca in zip(model.ca_layers, model.cca, strict=True)}
        self.length = 0
        self.chunk: list[Tensor] = []  # states (n, D) of the unfinished chunk, where the encoder reads them
        self.contexts: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the neighbors, by layer
        self.mask: Tensor | None = None  # of the neighbors' tokens, where some are missing
        self._reserve(256)

    @property
    def completes_chunk(self) -> bool:
        """Whether the next token is the last of a chunk, so that its neighbors are due."""
        return (self.length + 1) % self.model.chunk_len == 0

    def n_next(self) -> int:
        """How many tokens the next call of `feed` can take."""
        m = self.model.chunk_len
        return m if self.completes_chunk else m - 1 - self.length % m

    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        """Take in tokens (n); returns the logits (n_vocab) for the token after them.

        * `ret` (K, R) are the neighbors of the chunk that the first token completes; None to read nothing
        """
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
                    queries = reader.query(reader.norm(h)).view(n, self.n_heads, self.d_k).transpose(0, 1)
                    h = h + reader.output(self._read(queries, *self.contexts[p], self.mask))
            h = h + layer.lin2(layer.lin1(layer.norm_ffw(h)).relu_())
        self.length += n
        return self.model.read(h[-1])

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
        """Queries (H, n, d_k) read keys and values (H, S, d_k) -> (n, H*d_k)."""
        scores = torch.bmm(queries, keys.mT).mul_(queries.shape[-1] ** -0.5)  # (H, n, S)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
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
        self.mask = None if whole else present.flatten()
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


class _Linear:
    """A linear layer for few rows: its weight (in, out) lies in the order in which they read it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.t().contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class _Norm:
    """A layer norm, without the overhead of a module."""

    def __init__(self, norm: Any) -> None:
        self.shape, self.weight, self.bias, self.eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
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


class Sampler:
    """Samples from a model; the first arguments are the tutorial's.

    * `device` is the device of the model
    * `model` is the model
    * `tds` is the corpus, or a labml `TextDataset`, that the database was built from
    * `chunk_len` is the length of a chunk
    * `index` retrieves; left out, the database in `data_path`, `n_neighbors` for each chunk

    After (and during) sampling, `neighbors` holds what each complete chunk of prompt and sample
    retrieved.
    """

    def __init__(
        self,
        device: torch.device | str,
        model: RetroModel,
        tds: Any,
        chunk_len: int,
        *,
        index: RetroIndex | None = None,
        data_path: str | Path = "data",
        n_neighbors: int = 2,
    ) -> None:
        self.device = torch.device(device)
        self.model = model
        self.corpus = Corpus.of(tds)
        self.chunk_len = chunk_len
        self._open = lambda: (
            index
            or RetroIndex(chunk_len, n_neighbors=n_neighbors, corpus=self.corpus, data_path=data_path, device=device)
        )
        self.neighbors: list[list[Neighbor]] = []

    @cached_property
    def index(self) -> RetroIndex:
        """What retrieves; opened when the first chunk is complete."""
        return self._open()

    def retrieve_nearest_neighbours(self, chunk: str) -> list[str]:
        """Texts of the nearest neighbors of a chunk, each with its continuation."""
        return [neighbor.text for neighbor in self._retrieve([chunk])[0][0]]

    def _retrieve(self, chunks: list[str]) -> list[tuple[list[Neighbor], np.ndarray]]:
        """For each chunk, its neighbors as text and as tokens (K, 2m)."""
        distances, offsets = self.index.search(self.index.embed(chunks), self.index.n_neighbors)
        values = self.index.values(offsets)  # (chunks, K, 2m)
        documents = self.corpus.document_of(np.maximum(offsets, 0))
        return [
            (
                [
                    Neighbor(
                        document=self.corpus.documents[documents[u, k]].name,
                        offset=int(offsets[u, k] - self.corpus.starts[documents[u, k]]),
                        distance=float(distances[u, k]),
                        text=self.corpus.tokenizer.decode(values[u, k][values[u, k] >= 0].tolist()),
                    )
                    for k in np.flatnonzero(offsets[u] >= 0)
                ],
                values[u],
            )
            for u in range(len(chunks))
        ]

    def sample(self, prompt: str, sample_len: int, config: SampleConfig | None = None) -> str:
        """Text of `sample_len` tokens that continue `prompt`.

        * `config` says how to draw; left out, always the likeliest token is taken, as the tutorial does

        Raises `ValueError` for an empty prompt, or a character that is not in the vocabulary.
        """
        return "".join(self.stream(prompt, sample_len, config))

    @torch.inference_mode()
    def stream(self, prompt: str, sample_len: int, config: SampleConfig | None = None) -> Iterator[str]:
        """As `sample`, but yields the text as it is written, a few characters at a time."""
        config = config or SampleConfig()
        if sample_len < 1:
            raise InvalidOption("length", sample_len, "is not at least 1")
        ids = self.corpus.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token to continue")
        generator = torch.Generator().manual_seed(config.seed)
        self.neighbors = []
        self.model.eval()
        decoder = CachedDecoder(self.model)
        # The prompt's chunks are known already: retrieve for all of them at once.
        m = self.chunk_len
        whole = [self.corpus.tokenizer.decode(ids[i : i + m]) for i in range(0, len(ids) // m * m, m)]
        retrieved = self._retrieve(whole) if whole else []

        n_prompt, written = len(ids), 0
        while True:
            ret = None
            if decoder.completes_chunk:
                u = decoder.length // m
                if u == len(retrieved):
                    retrieved += self._retrieve([self.corpus.tokenizer.decode(ids[u * m : (u + 1) * m])])
                neighbors, values = retrieved[u]
                self.neighbors.append(neighbors)
                ret = torch.from_numpy(values).to(self.device)  # (K, 2m)
            tokens = ids[decoder.length : decoder.length + decoder.n_next()]
            logits = decoder.feed(torch.tensor(tokens, device=self.device), ret)
            if decoder.length < len(ids):
                continue  # still in the prompt
            ids.append(choose(logits.float().cpu(), config, generator))
            last = len(ids) - n_prompt == sample_len
            text = self.corpus.tokenizer.decode(ids[n_prompt:])
            # A subword may end inside a character; wait for the rest of it.
            if last or not text.endswith("\ufffd"):
                yield text[written:]
                written = len(text)
            if last:
                return


def choose(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """A token drawn from logits (n_vocab)."""
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k is not None:
        kth = logits.topk(min(config.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if config.top_p is not None:
        ordered, tokens = logits.softmax(dim=-1).sort(descending=True)
        # Leave out tokens before which the mass is already there; the likeliest always stays.
        beyond = ordered.cumsum(dim=-1) - ordered >= config.top_p
        logits[tokens[beyond]] = float("-inf")
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


if __name__ == "__main__":
    from retro.cli import script

    script("sample")
