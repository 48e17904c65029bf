"""Writing side by side: the same prompt continued with retrieval, without, and with random neighbors.

All start from the same seed, so they differ in what they read alone. Without retrieval and at random it is the index
that is replaced: one finds nothing, the other any chunks of the database.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from retro.config import SampleConfig
from retro.database import NO_TOKEN, RetroIndex, chunk_offsets
from retro.evaluation.attention import attention_shares
from retro.evaluation.passages import common_run, marked
from retro.in_context import InContext
from retro.sample import Neighbor, Sampler, start_of_window
from retro.search.chunks import how_far
from retro.text.corpus import Corpus

WAYS = {"on": "with retrieval", "off": "without", "random": "with random neighbors"}


class NothingFound:
    """An index of the same database that finds nothing."""

    def __init__(self, index: RetroIndex) -> None:
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def nearest(self, query_chunks: Sequence[str], n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
        """No offsets: arguments and results are those of `RetroIndex.nearest`."""
        of = (len(query_chunks), n_neighbors)
        return np.full(of, np.inf), np.full(of, -1)


class AnyFound(NothingFound):
    """An index of the same database that finds any of its chunks, the same for the same seed."""

    def __init__(self, index: RetroIndex, seed: int) -> None:
        super().__init__(index)
        offsets, corpus = chunk_offsets(index.corpus, index.chunk_len), index.corpus
        self._offsets = offsets[~np.isin(corpus.document_of(offsets), list(corpus.removed))]
        self._random = np.random.default_rng(seed)

    def nearest(self, query_chunks: Sequence[str], n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
        """Any offsets: arguments and results are those of `RetroIndex.nearest`."""
        found = self._random.choice(self._offsets, (len(query_chunks), n_neighbors))
        return np.full(found.shape, np.nan), found


@dataclass(frozen=True)
class Read:
    """A neighbor, in parts of text, each with whether it is in the run that its reader has too."""

    neighbor: Neighbor
    how_far: str
    share: float | None  # of the attention that its reader pays to all of its neighbors
    chunk: list[tuple[bool, str]]
    continuation: list[tuple[bool, str]]


@dataclass(frozen=True)
class Written:
    """A chunk of prompt and sample, and what was read while it was written: the neighbors of the chunk before it.

    * `parts` are its text in parts, each with whether it is of the prompt, and whether in a run that a neighbor has too
    """

    number: int  # from 1
    parts: list[tuple[bool, bool, str]]
    read: list[Read]


class Writer:
    """Continues a prompt in one of the `WAYS`.

    * `sampler` is what writes with retrieval
    * `way` is one of `WAYS`
    """

    def __init__(self, sampler: Sampler, way: str, config: SampleConfig) -> None:
        index: Any = sampler.index if sampler.model.ca_layers else None
        if index is not None and way != "on":
            index = NothingFound(index) if way == "off" else AnyFound(index, config.seed)
        self.way, self.config, self.n_prompt = way, config, 0
        self.sampler = Sampler(
            sampler.device,
            sampler.model,
            sampler.corpus,
            sampler.chunk_len,
            index=index,
            n_neighbors=sampler.n_neighbors,
            max_chunks=sampler.max_chunks,
        )

    def write(self, prompt: str, length: int) -> Iterator[str]:
        """`length` tokens behind the prompt, a few characters at a time.

        Raises `ValueError` for a prompt that cannot be continued.
        """
        self.n_prompt = len(self.sampler.corpus.tokenizer.encode(prompt))
        return self.sampler.stream(prompt, length, self.config)

    def chunks(self, shares: np.ndarray | None = None) -> list[Written]:
        """What is there by now, in chunks.

        * `shares` are those of `attention`
        """
        n, m = len(self.sampler.tokens), self.sampler.chunk_len
        first = start_of_window(self.n_prompt, m, self.sampler.max_chunks) // m
        return [self._chunk(u, shares) for u in range(first, math.ceil(n / m))]

    def attention(self) -> np.ndarray | None:
        """Share (C, K) of the attention that each neighbor of each chunk gets, NaN outside of the model's window.

        None where nothing is read, or not by chunked cross-attention.
        """
        s, m = self.sampler, self.sampler.chunk_len
        start = start_of_window(len(s.tokens), m, s.max_chunks) // m
        numbers = range(start, len(s.tokens) // m)
        if isinstance(s.model, InContext) or not s.values or not numbers:
            return None
        missing = torch.full_like(next(iter(s.values.values())), NO_TOKEN)
        ret = torch.stack([s.values.get(u, missing) for u in numbers])
        tokens = torch.tensor(s.tokens[start * m :], device=s.device)
        found = np.full((numbers.stop, len(missing)), np.nan)
        found[start:] = attention_shares(s.model, tokens[None], ret[None])[0]
        return found

    def _chunk(self, u: int, shares: np.ndarray | None) -> Written:
        tokens, m = self.sampler.tokens, self.sampler.chunk_len
        start, end = u * m, min(u * m + m, len(tokens))
        read, cuts, runs = [], {start, end, min(max(start, self.n_prompt), end)}, []
        if 0 < u <= len(self.sampler.neighbors):
            values = self.sampler.values.get(u - 1)
            for k, neighbor in enumerate(self.sampler.neighbors[u - 1]):
                assert values is not None
                value = values[k][values[k] >= 0].tolist()
                a, b, n = common_run(tokens[start:end], value)
                runs.append((start + a, start + a + n))
                cuts |= {*runs[-1]}
                share = None if shares is None or np.isnan(shares[u - 1, k]) else float(shares[u - 1, k])
                read.append(read_of(self.sampler.index.corpus, m, neighbor, share, (b, b + n)))
        edges = sorted(cuts)
        parts = [
            (a < self.n_prompt, any(first <= a < last for first, last in runs), self.sampler.text(a, b))
            for a, b in pairwise(edges)
        ]
        return Written(u + 1, parts, read)


def read_of(
    corpus: Corpus, chunk_len: int, neighbor: Neighbor, share: float | None = None, run: tuple[int, int] = (0, 0)
) -> Read:
    """A neighbor in parts of text.

    * `run` is what its reader has too: tokens, counted from its first
    """
    offset, m, end = neighbor.corpus_offset, chunk_len, int(corpus.ends_of(neighbor.corpus_offset))
    run = (offset + run[0], offset + run[1])
    chunk = marked(corpus, offset, min(offset + m, end), run)
    continuation = marked(corpus, offset + m, min(offset + 2 * m, end), run)
    far = "drawn at random" if math.isnan(neighbor.distance) else how_far(neighbor.distance)
    return Read(neighbor, far, share, chunk, continuation)
