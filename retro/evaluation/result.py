"""The result of an evaluation: losses and overlaps, from which every figure is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro.database import RetroIndex
from retro.evaluation.intervals import Interval, ratio, ratio_of_sums
from retro.storage.manifests import package_versions
from retro.text.corpus import Corpus

# What is measured, by the name it has in code and in JSON, with the name to show.
VARIANTS = {
    "on": "retrieval on",
    "off": "retrieval off",
    "random": "random neighbors",
    "baseline": "trained without retrieval",
}
ALPHAS = tuple(step / 8 for step in range(1, 9))  # 12.5% to 100%, as in figure 6 of the paper
COPY_LENGTHS = (4, 8, 16)  # tokens in a row that could be copied; a whole chunk is added
DATABASE_FIELDS = ("n_chunks", "chunk_len", "index", "n_probe", "recall", "embedder", "index_sha256")


@dataclass(frozen=True)
class Evaluation:
    """Losses of held-out text, token by token, and what its chunks retrieved.

    n are the evaluated tokens, from `start` on in `corpus`; c are their chunks, where the last of each document may
    be shorter than `chunk_len`.
    """

    corpus: Corpus  # its validation documents are evaluated
    index: RetroIndex
    n_neighbors: int  # K
    window: int
    stride: int
    nats: dict[str, np.ndarray]  # (n) loss of each token, for each variant; 0 for a document's first, never predicted
    n_bytes: np.ndarray  # (n) of each predicted token
    offsets: np.ndarray  # (c) where the chunks start in `corpus`
    neighbors: np.ndarray  # (c, at least 10) offsets in `index.corpus`, nearest first; -1 for none
    distances: np.ndarray  # (c, at least 10) squared L2 distances
    overlap: np.ndarray  # (c) r(C)
    copyable_tokens: np.ndarray  # (c) in the longest run that a chunk shares with the neighbors it reads

    @property
    def start(self) -> int:
        """Offset in `corpus` of the first evaluated token."""
        return int(self.offsets[0])

    def of_chunks(self, per_token: np.ndarray) -> np.ndarray:
        """Sums (c) over the tokens of each chunk of an array (n)."""
        return np.add.reduceat(per_token, self.offsets - self.start)

    def _by_document(self, per_token: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """Sums over each document's chunks, or over the `chosen` ones (c)."""
        sums = self.of_chunks(per_token)
        if chosen is not None:
            sums = np.where(chosen, sums, 0.0)
        first = self.corpus.split("valid").start
        return np.bincount(self.corpus.document_of(self.offsets) - first, sums, len(self.corpus.split("valid")))

    def bits_per_byte(self, variant: str, chosen: np.ndarray | None = None) -> Interval:
        """Bits per byte of a variant, over all chunks or the `chosen` ones (c)."""
        bits = self.nats[variant] / math.log(2)
        return ratio_of_sums(self._by_document(bits, chosen), self._by_document(self.n_bytes, chosen))

    def gain(self, over: str, chosen: np.ndarray | None = None) -> Interval:
        """Bits per byte that retrieval saves over a variant. Its interval is that of the paired difference."""
        bits = (self.nats[over] - self.nats["on"]) / math.log(2)
        return ratio_of_sums(self._by_document(bits, chosen), self._by_document(self.n_bytes, chosen))

    def summary(self) -> dict[str, Any]:
        """Everything as numbers, JSON-safe."""
        database, others = self.index.manifest, [variant for variant in self.nats if variant != "on"]
        return {
            "documents": [self.corpus.documents[i].name for i in self.corpus.split("valid")],
            "n_tokens": len(self.n_bytes),
            "n_bytes": float(self.n_bytes.sum()),
            "n_chunks": len(self.offsets),
            "n_neighbors": self.n_neighbors,
            "window": self.window,
            "stride": self.stride,
            "database": {name: database[name] for name in DATABASE_FIELDS}
            | {"n_documents": len(self.index.corpus.in_database)},
            "bits_per_byte": {variant: self.bits_per_byte(variant) for variant in self.nats},
            # Sums of each document, with which two evaluations of the same documents can be compared in pairs.
            "by_document": {v: (self._by_document(nats) / math.log(2)).tolist() for v, nats in self.nats.items()}
            | {"bytes": self._by_document(self.n_bytes).tolist()},
            "gain": {f"over {variant}": self.gain(variant) for variant in others},
            "filtered": [self._filtered(alpha, others) for alpha in ALPHAS],
            "copyable_tokens": self._copyable(),
            "versions": package_versions(),
        }

    def _filtered(self, alpha: float, others: Sequence[str]) -> dict[str, Any]:
        """The figures of the chunks with r(C) up to `alpha`."""
        chosen, n_bytes = self.overlap <= alpha, self.of_chunks(self.n_bytes)
        bits = {variant: self.of_chunks(nats)[chosen] / math.log(2) for variant, nats in self.nats.items()}
        return {
            "alpha": alpha,
            "n_chunks": int(chosen.sum()),
            "share_of_bytes": float(n_bytes[chosen].sum() / n_bytes.sum()),
            "bits_per_byte": {variant: ratio(bits[variant], n_bytes[chosen]) for variant in self.nats},
            "gain": {f"over {variant}": self.gain(variant, chosen) for variant in others},
        }

    def _copyable(self) -> dict[str, float]:
        """Of the chunks that have a chunk before them, the share that could copy this many tokens in a row."""
        reads = self.offsets > self.corpus.starts[self.corpus.document_of(self.offsets)]
        counts = [k for k in (*COPY_LENGTHS, self.index.chunk_len) if k <= self.index.chunk_len]
        return {f"{k} tokens": float((self.copyable_tokens[reads] >= k).mean()) for k in counts} if reads.any() else {}
