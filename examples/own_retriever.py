"""A retriever of one's own: chunks that share the most words with the query.

build_database(32, retriever=SharedWords(), data_path="data")
index = RetroIndex(retriever=SharedWords(), data_path="data")
build_dataset(index=index, data_path="data")
"""

from pathlib import Path

import numpy as np

from retro.search.chunks import Chunks, is_barred, nothing


class SharedWords:
    """Compares the words of a query with those of every chunk."""

    name = "shared words"
    made_with = {"version": 1}  # noqa: RUF012  # raise it, and databases are built anew

    def build(self, chunks: Chunks, folder: Path) -> None:
        """Nothing is kept in `folder`: `open` is quick enough."""

    def open(self, chunks: Chunks, folder: Path) -> None:
        """Keep the words of the database's chunks."""
        self.offsets, self.words = chunks.offsets, [set(text.split()) for text in chunks.texts]

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Distances and offsets of the `k` best, of shape `[q, k]`; those of what a query may not find are -1."""
        shared = np.array([[len(set(text.split()) & words) for words in self.words] for text in queries.texts], float)
        barred = np.broadcast_to(is_barred(self.offsets, excluded), shared.shape)
        distances = np.where(barred, np.finfo(np.float32).max, -shared)
        best = np.argsort(distances, axis=1, kind="stable")[:, :k]
        near, found = nothing(len(queries), k)
        near[:, : best.shape[1]] = np.take_along_axis(distances, best, axis=1)
        found[:, : best.shape[1]] = np.where(near[:, : best.shape[1]] < 0, self.offsets[best], -1)
        return near, found
