r"""BM25: chunks found by the tokens that they share with a query.

The score of a chunk $N$ for a query $C$ is a sum over the query's tokens, each as often as it is there:

$$s(C, N) = \sum_{t \in C} \text{idf}(t) \, \frac{f_t(N)}{f_t(N) + k_1 (1 - b + b\,|N| / \overline{|N|})}, \qquad
\text{idf}(t) = \ln\left(1 + \frac{n - n_t + 0.5}{n_t + 0.5}\right)$$

with $f_t(N)$ the number of times that $t$ is in $N$, and $n_t$ the number of the $n$ chunks that have it. This is
Lucene's variant (`bm25s`, which tests compare with, calls it so: arXiv:2407.03618). Tokens are those of the model. For
RETRO, retrieval by tokens gave a lower perplexity than by embeddings (arXiv:2305.16243).

Everything but $f_t(C)$ is known when the index is built. So it holds each chunk's summand for each of its tokens, in
shards, which are mapped and not read whole; a search is a product of matrices, one of them sparse. All chunks are
compared: there is nothing to lose, and the time of a search grows with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from scipy.sparse import csr_array

from retro import parallel
from retro.config import LEXICAL
from retro.errors import DamagedFile
from retro.search.chunks import NO_DISTANCE, Chunks, is_barred, nothing
from retro.storage.files import mapped_array
from retro.storage.shards import MOST_OPEN, TOKENS_PER_SHARD, Shards

K1, B = 1.5, 0.75  # of the formula: the defaults of Lucene are 1.2 and 0.75, of most others these
SCORES_AT_ONCE = 1 << 19  # of a query and a chunk, in each thread: 2 MB, which its cache may hold


class BM25:
    """Finds chunks by the tokens that they share with a query; a `Retriever`. A chunk that shares none is not found."""

    name = LEXICAL
    recall = 1.0  # every chunk is compared

    def __init__(self) -> None:
        self.made_with: Mapping[str, Any] = {"k1": K1, "b": B}

    def open(self, chunks: Chunks, folder: Path) -> None:
        """Search what `build` has written of `chunks` into `folder`.

        Raises `MissingArtifact` if a shard is missing, or has not the bytes that its name speaks of.
        """
        self._cut(chunks, folder)
        for number in range(len(self.parts)):
            self._scores(number)

    def _cut(self, chunks: Chunks, folder: Path) -> None:
        self.chunks, self._opened = chunks, dict[int, csr_array]()
        per_shard = max(1, TOKENS_PER_SHARD // chunks.chunk_len)
        self.parts = [slice(i, i + per_shard) for i in range(0, len(chunks), per_shard)]
        self.shards = Shards(folder, {**self.made_with, "n_chunks": len(chunks)}, [""] * len(self.parts), ".npy")

    def build(self, chunks: Chunks, folder: Path) -> None:
        """Write the index of `chunks`; what is finished in `folder` stays."""
        self._cut(chunks, folder)
        parallel.on_rank_zero(self.shards.open)
        idf, mean = self._statistics() if self.shards.missing() else (np.zeros(0), 0.0)

        def make(number: int, _: Any, path: Path, done: Callable[[int], Any]) -> None:
            part = chunks[self.parts[number]]
            terms, rows, counts = _counted(part.tokens)
            n_of_chunk = (part.tokens >= 0).sum(axis=1)
            lengths = 1 - B + B * n_of_chunk / mean
            scores = idf[terms] * counts / (counts + K1 * lengths[rows])
            ends = np.cumsum(np.bincount(terms, minlength=chunks.corpus.n_tokens))
            arrays = [[0], ends, rows, scores.astype(np.float32).view(np.int32)]
            with open(path, "wb") as file:
                np.save(file, np.concatenate(arrays).astype(np.int32), allow_pickle=False)
            done(len(part))

        self.shards.make_missing("Index tokens", "chunk", [len(chunks[part]) for part in self.parts], make)

    def _statistics(self) -> tuple[np.ndarray, float]:
        """The idf of each token, and how many tokens a chunk has on average."""
        n_with, n_tokens = np.zeros(self.chunks.corpus.n_tokens, dtype=np.int64), 0  # chunks that have each token
        for part in self.parts:
            tokens = self.chunks[part].tokens
            n_with += np.bincount(_counted(tokens)[0], minlength=len(n_with))
            n_tokens += int((tokens >= 0).sum())
        return np.log1p((len(self.chunks) - n_with + 0.5) / (n_with + 0.5)), n_tokens / len(self.chunks)

    def is_whole(self) -> bool:
        """True. Raises `MissingArtifact` or `DamagedFile` if a shard is missing, or not as it was written."""
        for number in range(len(self.parts)):
            self._scores(number)
        return True

    def _scores(self, number: int) -> csr_array:
        """What each token adds to the score of each chunk of a shard, mapped from its file; of shape `[V, chunks]`."""
        if number in self._opened:
            return self._opened[number]
        n_tokens, part, file = self.chunks.corpus.n_tokens, self.chunks[self.parts[number]], self.shards.path(number)
        stored = mapped_array(file)
        indptr, rest = stored[: n_tokens + 1], stored[n_tokens + 1 :]
        rows, scores = rest[: len(rest) // 2], rest[len(rest) // 2 :].view(np.float32)
        # Products of sparse matrices trust what they are given.
        fits = stored.dtype == np.int32 and stored.ndim == 1 and len(indptr) == n_tokens + 1 and indptr[0] == 0
        fits = fits and (np.diff(indptr) >= 0).all() and len(rest) == 2 * indptr[-1]
        if not fits or (len(rows) and not 0 <= rows.min() <= rows.max() < len(part)):
            raise DamagedFile(file, f"is no index of {len(part)} chunks of {n_tokens} kinds of tokens")
        found = csr_array((scores, rows, indptr), shape=(n_tokens, len(part)), copy=False)
        if len(self._opened) < MOST_OPEN:
            self._opened[number] = found
        return found

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` chunks of the highest scores: minus these, and offsets, of shape `[q, k]`."""
        distances, found = nothing(len(queries), k)
        terms, rows, counts = _counted(queries.tokens)
        wanted = csr_array(
            (counts.astype(np.float32), (rows, terms)), shape=(len(queries), self.chunks.corpus.n_tokens)
        )
        at_once = max(1, SCORES_AT_ONCE // len(self.chunks[self.parts[0]]))
        with ThreadPoolExecutor(faiss.omp_get_max_threads()) as threads:  # scipy's products let others work
            for number, part in enumerate(self.parts):
                scores, offsets = self._scores(number), self.chunks[part].offsets
                assert offsets is not None

                def look(start: int, scores: csr_array = scores, offsets: np.ndarray = offsets) -> None:
                    some = slice(start, start + at_once)
                    asked = wanted[some]
                    kinds = np.unique(asked.indices)
                    # With a dense matrix of the few queries, which is faster than with a sparse one; the same sums.
                    of_some = np.ascontiguousarray((scores[kinds].T @ asked[:, kinds].toarray().T).T)
                    if excluded is not None:
                        of_some[is_barred(offsets, excluded[some])] = 0
                    best, columns = _best(of_some, k)
                    both = np.concatenate([distances[some], np.where(columns < 0, NO_DISTANCE, -best)], axis=1)
                    ids = np.concatenate([found[some], np.where(columns < 0, -1, offsets[columns])], axis=1)
                    order = np.lexsort((ids, both), axis=1)[:, :k]
                    distances[some] = np.take_along_axis(both, order, axis=1)
                    found[some] = np.take_along_axis(ids, order, axis=1)

                list(threads.map(look, range(0, len(queries), at_once)))
        return distances, found


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` highest scores above 0 of each row, and their columns, of shape `[n, k]`; of equal ones the first.

    * `scores` are of shape `[n, c]`

    Where there are fewer, scores are 0 and columns -1.
    """
    least = max(0, scores.shape[1] - k)
    kth = np.partition(scores, least, axis=1)[:, least, None]
    high = scores >= np.maximum(kth, np.finfo(np.float32).tiny)
    rows, columns = np.divmod(np.flatnonzero(high), scores.shape[1])
    order = np.lexsort((columns, -scores[rows, columns], rows))
    rows, columns = rows[order], columns[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    rows, columns, place = (of[place < k] for of in (rows, columns, place))
    best, of_best = np.zeros((len(scores), k), np.float32), np.full((len(scores), k), -1)
    best[rows, place], of_best[rows, place] = scores[rows, columns], columns
    return best, of_best


def _counted(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each token of each row of `tokens` (n, m), rows, and how often it is there; by token, then by row."""
    rows, columns = np.nonzero(tokens >= 0)
    pairs, counts = np.unique(tokens[rows, columns].astype(np.int64) * len(tokens) + rows, return_counts=True)
    return pairs // len(tokens), pairs % len(tokens), counts
