r"""Audit: does a neighbor hold what its sample has yet to predict?

By offsets: the neighbors of chunk $u$ of a stretch are first read by its last token, to predict the token after it; so
their values may not overlap the stretch's tokens from the end of chunk $u$ on. And by content, since a copy of a text
has other offsets: a chunk *can be copied* if a neighbor holds 8 of the $m$ tokens after it in a row (all of them, if
$m < 8$). Where documents are excluded, no such neighbor may be of the chunk's own document or a near-duplicate of it.
From elsewhere it is lawful, and what retrieval is for: text repeats itself.

Both counts use the written file and the text, and not the search that found the neighbors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from retro.dataset import Dataset, chunks_of_stretches, stretch_lengths
from retro.text.corpus import NO_TOKEN

COPIED = 8  # tokens in a row
CHUNKS_AT_ONCE = 1 << 12  # read and compared at a time: what bounds memory


def audit(dataset: Dataset) -> dict[str, int]:
    """Count samples, chunks and neighbors, those that leak, and the chunks that can be copied.

    * `leaking_neighbors`, `leaking_samples`: overlap text that is still to be predicted
    * `copied_from_own`, `copied_from_elsewhere`: chunks that can be copied from a neighbor of the same group of
      near-duplicates, or of another
    """
    n = max(1, CHUNKS_AT_ONCE // dataset.header["chunks_per_sample"])  # samples
    counts: Counter[str] = Counter()
    for first in range(0, len(dataset), n):
        counts.update(_audit(dataset, [dataset.line(idx) for idx in range(first, min(first + n, len(dataset)))]))
    return dict(counts)


def _audit(dataset: Dataset, lines: list[dict[str, Any]]) -> dict[str, int]:
    """The counts of some samples."""
    chunks, ends = _chunks_of(dataset, lines)
    samples = np.repeat(np.arange(len(lines)), [len(line["neighbors"]) for line in lines])
    corpus, m, K = dataset.corpus, dataset.header["chunk_len"], dataset.header["n_neighbors"]
    rows = (row for line in lines for row in line["neighbors"])
    starts = np.array([row + [-1] * (K - len(row)) for row in rows], dtype=np.int64).reshape(-1, K)
    there, document_of = starts >= 0, corpus.document_of(np.maximum(starts, 0))
    value_ends = np.minimum(starts + 2 * m, corpus.starts[document_of + 1])
    leaking = there & (starts < ends[:, None]) & (value_ends > chunks[:, None] + m)
    positions = chunks[:, None] + m + np.arange(m)
    next_tokens = corpus.tokens[np.minimum(positions, len(corpus.tokens) - 1)].astype(np.int64)
    next_tokens[positions >= ends[:, None]] = NO_TOKEN
    copied = can_be_copied(next_tokens, corpus.values(starts, 2 * m))
    own = corpus.groups[document_of] == corpus.groups[corpus.document_of(chunks)][:, None]
    return {
        "samples": len(lines),
        "leaking_samples": len(np.unique(samples[leaking.any(axis=1)])),
        "chunks": len(chunks),
        "neighbors": int(there.sum()),
        "leaking_neighbors": int(leaking.sum()),
        "copied_from_own": int((copied & own).any(axis=1).sum()),
        "copied_from_elsewhere": int((copied & ~own).any(axis=1).sum()),
    }


def _chunks_of(dataset: Dataset, lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Where the whole chunks of all samples start, and where what their stretches predict ends."""
    corpus, m, C = dataset.corpus, dataset.header["chunk_len"], dataset.header["chunks_per_sample"]
    stretches = np.array([offset for line in lines for offset in line["offsets"]], dtype=np.int64)
    lengths = stretch_lengths(corpus, stretches, C * m)
    chunks, n_chunks = chunks_of_stretches(corpus, stretches, m, C)
    return chunks, np.repeat(stretches + lengths + 1, n_chunks)


def can_be_copied(chunks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether a value holds `COPIED` tokens of a chunk in a row, of shape `[n, K]`.

    * `chunks` (n, m) are tokens, `values` (n, K, R) are those of neighbors; negative where there is none
    """
    n = min(COPIED, chunks.shape[-1])
    ours, theirs = _runs(chunks, n)[:, None, :, None], _runs(values, n)[:, :, None]
    return ((ours == theirs) & (ours != 0)).any(axis=(-1, -2))


def _runs(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of each `n` tokens in a row: (..., L) -> (..., L - n + 1); 0 where one is missing."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=-1)
    factors = np.random.default_rng(0).integers(1, 1 << 62, size=n, dtype=np.uint64) | np.uint64(1)
    hashes = (windows.astype(np.uint64) * factors).sum(axis=-1, dtype=np.uint64)
    return np.where((windows < 0).any(axis=-1), np.uint64(0), hashes)
