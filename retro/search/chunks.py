"""Chunks as retrievers take them, to search for or to be found: text and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from retro.text.corpus import NO_TOKEN, Corpus

NO_DISTANCE = np.finfo(np.float32).max  # of a neighbor that is missing
TOKENS_AT_ONCE = 1 << 17  # of values that are compared with chunks: few enough for a processor's cache
AT_ONCE = 4096  # chunks whose comparisons with something are in memory together


class Chunks:
    """Chunks of texts, or of a corpus.

    * `corpus` has the tokenizer; the chunks are its own if `offsets` are given
    * `offsets` (n) are where they start, `chunk_len` is how many tokens each has, unless its document ends before
    * `texts` are chunks from elsewhere, in place of offsets
    """

    def __init__(
        self, corpus: Corpus, offsets: np.ndarray | None = None, chunk_len: int = 0, texts: Sequence[str] | None = None
    ) -> None:
        self.corpus, self.offsets, self.chunk_len, self._texts = corpus, offsets, chunk_len, texts

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.offsets if self.offsets is not None else self._texts or ())

    def __getitem__(self, part: slice) -> Chunks:
        """Some of them."""
        if self.offsets is not None:
            return Chunks(self.corpus, self.offsets[part], self.chunk_len)
        return Chunks(self.corpus, texts=(self._texts or ())[part])

    def parts(self) -> Iterator[tuple[slice, Chunks]]:
        """All of them in order, so many that what is compared with each fits in memory, and where these are."""
        for start in range(0, len(self), AT_ONCE):
            part = slice(start, min(start + AT_ONCE, len(self)))
            yield part, self[part]

    @cached_property
    def texts(self) -> Sequence[str]:
        """The text of each."""
        return self._texts or [] if self.offsets is None else self.corpus.texts(self.offsets, self.chunk_len)

    @cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of each, of shape `[n, chunk_len]`; -1 after the last.

        Those of texts may be fewer or more; characters that are not in the vocabulary are none.
        """
        if self.offsets is not None:
            return self.corpus.values(self.offsets, self.chunk_len)
        texts, tokenizer = self.texts, self.corpus.tokenizer
        if tokenizer.kind == "char":
            texts = ["".join(c for c in text if c in self.corpus.stoi) for text in texts]
        ids = [tokenizer.encode(text) for text in texts]
        tokens = np.full((len(ids), max(map(len, ids), default=0)), NO_TOKEN, dtype=np.int64)
        for row, of_text in zip(tokens, ids, strict=True):
            row[: len(of_text)] = of_text
        return tokens


def nothing(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and offsets (n, k) of no neighbors."""
    return np.full((n, k), NO_DISTANCE, dtype=np.float32), np.full((n, k), -1, dtype=np.int64)


def how_far(distance: float) -> str:
    """A distance in words; where retrievers have scores, minus one of these."""
    return f"distance {distance:.2f}" if distance >= 0 else f"score {-distance:.3g}"


def ranges_of_each(excluded: Any, n: int) -> np.ndarray:
    """Ranges `(first, end)` for each of `n` queries (n, r, 2): of such, of one for each (n, 2), or of one for all."""
    ranges = np.asarray(excluded)
    return ranges if ranges.ndim == 3 else np.broadcast_to(ranges, (n, 2))[:, None]


def is_barred(offsets: np.ndarray, excluded: np.ndarray | None) -> np.ndarray:
    """Which of `offsets` (n), or (q, n), each query may not find, of shape `[q, n]`; `[1, n]` if nothing is excluded.

    * `excluded` are ranges `(first, end)` of offsets, of shape `[q, r, 2]`
    """
    barred = np.zeros((1, offsets.shape[-1]), dtype=bool)
    for first, end in () if excluded is None else np.moveaxis(excluded, 0, -1)[..., None]:  # of each of r, (q, 1)
        barred = barred | ((offsets >= first) & (offsets < end))
    return barred


def common_runs(chunks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Length (N, K) of the longest run of tokens of `chunks` (N, m) in each of `values` (N, K, R); -1 equals nothing.

    At step i, `run` is the length of the common run that ends at token i of the chunk and at each token of a value:
    one more than it was a token earlier in both.
    """
    (n, K, R), m = values.shape, chunks.shape[1]
    tokens, longest = np.where(chunks < 0, NO_TOKEN - 1, chunks).astype(np.int32), np.zeros((n, K), dtype=np.int64)
    at_once = max(1, TOKENS_AT_ONCE // max(1, K * R))
    for rows in (slice(start, start + at_once) for start in range(0, n, at_once)):
        # Chunks go along the last axis, where numpy is quick, in numbers as small as runs can be.
        of_values = np.ascontiguousarray(values[rows].transpose(2, 1, 0), dtype=np.int32)  # (R, K, N)
        run = np.zeros((R + 1, *of_values.shape[1:]), dtype=np.min_scalar_type(m))
        most = run[1:].copy()
        for token in tokens[rows].T:
            run[1:] = (run[:-1] + 1) * (of_values == token)
            np.maximum(most, run[1:], out=most)
        longest[rows] = most.max(axis=0, initial=0).T
    return longest
