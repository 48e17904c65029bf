"""Leakage: what held-out chunks retrieve, and how much of each chunk is in it word for word.

Shapes: c chunks of m tokens, K neighbors. A neighbor's value is the neighbor with its continuation, R = 2m tokens.
"""

from __future__ import annotations

import numpy as np

from retro.database import RetroIndex
from retro.progress import bar
from retro.search.chunks import common_runs
from retro.text.corpus import Corpus

N_LEAKAGE_NEIGHBORS = 10  # section 2.6 of the paper
CHUNKS_AT_ONCE = 4096  # embedded, searched and compared together: what bounds memory


def retrieve(corpus: Corpus, index: RetroIndex, offsets: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors and distances (c, k) of the chunks at `offsets` (c), nearest first.

    If the text is the database's own, nothing comes back from near-duplicates of a chunk's document.
    """
    found, is_own = [], corpus.sha256 == index.corpus.sha256
    with bar("Retrieve", "chunk", len(offsets)) as progress:
        for start in range(0, len(offsets), CHUNKS_AT_ONCE):
            part = offsets[start : start + CHUNKS_AT_ONCE]
            barred = index.corpus.barred_ranges(part) if is_own else None
            found.append(index.nearest_at(part, k, barred, corpus))
            progress.update(len(part))
    return np.concatenate([neighbors for _, neighbors in found]), np.concatenate([distances for distances, _ in found])


def overlaps(corpus: Corpus, index: RetroIndex, offsets: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """r(C) of each chunk (c): how much of it is in one of its own neighbors, as one run of tokens."""
    lengths = np.diff(np.append(offsets, corpus.end_of_valid))
    return longest_common(corpus, index, offsets, neighbors) / lengths


def copyable(corpus: Corpus, index: RetroIndex, offsets: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """Tokens (c) of the longest run that a chunk has in common with what it reads: the neighbors of the chunk before.

    * `neighbors` (c, K) are those that the chunks retrieved
    """
    before = np.roll(neighbors, 1, axis=0)
    before[np.isin(offsets, corpus.starts)] = -1  # the first chunk of a document reads none
    return longest_common(corpus, index, offsets, before)


def longest_common(corpus: Corpus, index: RetroIndex, offsets: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """Length (c) of the longest run of tokens that a chunk has in common with one of its neighbors' values.

    * `offsets` (c) are chunks of `corpus`, `neighbors` (c, K) offsets in `index.corpus`, -1 for none
    """
    longest = np.zeros(len(offsets), dtype=np.int64)
    for start in range(0, len(offsets), CHUNKS_AT_ONCE):
        part = slice(start, start + CHUNKS_AT_ONCE)
        chunks, values = corpus.values(offsets[part], index.chunk_len), index.values(neighbors[part])
        longest[part] = longest_common_run(chunks, values)  # (c, m) in (c, K, 2m)
    return longest


def longest_common_run(chunks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Length (N) of the longest run of tokens of `chunks` (N, m) in one of `values` (N, K, R); -1 equals nothing."""
    return common_runs(chunks, values).max(axis=1, initial=0)
