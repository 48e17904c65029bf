"""The result of an evaluation: losses and overlaps, from which every figure is computed.

Figures are made of sums over documents, which are in the summary too: so evaluations of the same documents can be
compared in pairs, and those by models of several seeds joined into one (`joined`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from retro.database import RetroIndex
from retro.evaluation.intervals import Interval, effective_documents, judged, ratio_of_sums
from retro.evaluation.windows import Window, is_scored, windows
from retro.storage.manifests import package_versions
from retro.text.corpus import Corpus

# What is measured, by the name it has in code and in JSON, with the name to show.
VARIANTS = {
    "on": "retrieval on",
    "off": "retrieval off",
    "random": "random neighbors",
    "baseline": "trained without retrieval",
    "in-context": "neighbors in its context",
    "longer-context": "a longer context",
    "both": "on, and in its context",
    "knn-lm": "kNN-LM",
}
ALPHAS = tuple(step / 8 for step in range(1, 9))  # 12.5% to 100%, as in figure 6 of the paper
COPY_LENGTHS = (4, 8, 16)  # tokens in a row that could be copied; a whole chunk is added
# By evaluations that are joined.
SHARED = ("documents", "window", "stride", "n_windows", "n_neighbors", "n_shuffles", "database")
DATABASE_FIELDS = (
    "n_chunks",
    "chunk_len",
    "index",
    "n_probe",
    "recall",
    "retriever",
    "rerank",
    "rerank_by",
    "rerank_sha256",
    "embedder",
    "index_sha256",
)


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
    # Of chunks that are in no window nobody asks what they retrieve: they have no neighbors, and no r(C).
    neighbors: np.ndarray  # (c, at least 10) offsets in `index.corpus`, nearest first; -1 for none
    distances: np.ndarray  # (c, at least 10) squared L2 distances; inf for none
    overlap: np.ndarray  # (c) r(C); NaN for none
    copyable_tokens: np.ndarray  # (c) in the longest run that a chunk shares with the neighbors it reads
    n_shuffles: int  # of which the losses with random neighbors are the mean
    n_windows: int | None = None  # the most of each document that were evaluated, spread over it; None for all

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
        """Everything as numbers, JSON-safe.

        A gain has its interval, a p-value corrected for the gains of its table, and a verdict. The tables are those
        under `gain` and under `filtered`.
        """
        database = self.index.manifest
        facts = {
            "documents": [self.corpus.documents[i].name for i in self.corpus.split("valid")],
            "n_effective_documents": effective_documents(self._by_document(self.n_bytes)),
            "n_tokens": self._n_tokens(),
            "n_bytes": float(self.n_bytes.sum()),
            "n_chunks": int(self._is_scored.sum()),
            "n_neighbors": self.n_neighbors,
            "n_shuffles": self.n_shuffles,
            "window": self.window,
            "stride": self.stride,
            "n_windows": self.n_windows,
            "database": {name: database[name] for name in DATABASE_FIELDS}
            | {"n_documents": len(self.index.corpus.in_database)},
            "copyable_tokens": self._copyable(),
            "versions": package_versions(),
        }
        return facts | _figures(self._sums(), [self._filtered(alpha) for alpha in ALPHAS])

    @cached_property
    def _cut(self) -> list[Window]:
        return windows(self.corpus, self.window, self.stride, self.n_windows)

    @cached_property
    def _is_scored(self) -> np.ndarray:
        """Which chunks (c) have a token that was evaluated."""
        return self.of_chunks(is_scored(self.corpus, self._cut)) > 0

    def _n_tokens(self) -> int:
        """Tokens that were evaluated, with the first one of a document where its beginning was."""
        return sum(end + 1 - (start if scored == start + 1 else scored) for start, end, scored in self._cut)

    def _sums(self, chosen: np.ndarray | None = None) -> dict[str, Any]:
        """Bits of each variant, and bytes, in each document: of all its chunks, or of the `chosen` ones (c)."""
        bits = {v: (self._by_document(nats, chosen) / math.log(2)).tolist() for v, nats in self.nats.items()}
        return bits | {"bytes": self._by_document(self.n_bytes, chosen).tolist()}

    def _filtered(self, alpha: float) -> dict[str, Any]:
        """The chunks with r(C) up to `alpha`."""
        chosen, n_bytes = (self.overlap <= alpha) & self._is_scored, self.of_chunks(self.n_bytes)
        return {
            "alpha": alpha,
            "n_chunks": int(chosen.sum()),
            "share_of_bytes": float(n_bytes[chosen].sum() / n_bytes.sum()),
            "by_document": self._sums(chosen),
        }

    def _copyable(self) -> dict[str, float]:
        """Of the chunks that have a chunk before them in a window, the share that could copy this many in a row."""
        begin = [start for start, _, scored in self._cut if scored == start + 1]
        reads = self._is_scored & ~np.isin(self.offsets, begin)
        counts = [k for k in (*COPY_LENGTHS, self.index.chunk_len) if k <= self.index.chunk_len]
        return {f"{k} tokens": float((self.copyable_tokens[reads] >= k).mean()) for k in counts} if reads.any() else {}


def joined(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary of evaluations of the same documents by models that differ in the seed of their weights.

    Each figure is the mean of the seeds, and its interval is over documents and seeds. Raises `ValueError` for
    evaluations of different documents, of different variants, or with different windows or databases.
    """
    first = summaries[0]
    for other in summaries[1:]:
        alike = [first[name] == other[name] for name in SHARED]
        alike += [first["by_document"].keys() == other["by_document"].keys()]
        alike += [first["by_document"]["bytes"] == other["by_document"]["bytes"]]
        if not all(alike):
            names = [*SHARED, "variants", "bytes"]
            differing = ", ".join(name for name, same in zip(names, alike, strict=True) if not same)
            raise ValueError(f"evaluations that differ in more than the seed cannot be joined; these: {differing}")
    rows = zip(*(summary["filtered"] for summary in summaries), strict=True)
    filtered = [row[0] | {"by_document": _stacked([part["by_document"] for part in row])} for row in rows]
    return first | _figures(_stacked([summary["by_document"] for summary in summaries]), filtered)


def _stacked(sums: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over documents of several seeds: bits (s, d) of each variant, and bytes (d), which are the same for all."""
    return {v: sums[0][v] if v == "bytes" else [part[v] for part in sums] for v in sums[0]}


def saved_bits(of: dict[str, Any], variant: str, by: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Bits (d), or (s, d), that retrieval in one evaluation saves over a variant of another, and bytes (d).

    * `of` and `by` are summaries of the same documents, or rows of what is `filtered` in them
    """
    read = by["by_document"]
    return np.array(of["by_document"][variant]) - np.array(read["on"]), np.array(read["bytes"])


def _figures(by_document: dict[str, Any], filtered: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of sums over documents, of all chunks and of the `filtered` ones."""
    variants = [variant for variant in by_document if variant != "bytes"]
    others = [variant for variant in variants if variant != "on"]
    whole = {"by_document": by_document}
    gains = judged({
        (number, variant): saved_bits(row, variant, row) for number, row in enumerate(filtered) for variant in others
    })  # fmt: skip
    return whole | {
        "n_seeds": len(np.atleast_2d(by_document["on"])),
        "bits_per_byte": _bits_per_byte(by_document, variants),
        "gain": judged({f"over {variant}": saved_bits(whole, variant, whole) for variant in others}),
        "filtered": [
            row
            | {
                "n_documents": int(np.count_nonzero(row["by_document"]["bytes"])),
                "bits_per_byte": {v: f["value"] for v, f in _bits_per_byte(row["by_document"], variants).items()},
                "gain": {f"over {variant}": gains[number, variant] for variant in others},
            }
            for number, row in enumerate(filtered)
        ],
    }


def _bits_per_byte(by_document: dict[str, Any], variants: Sequence[str]) -> dict[str, Interval]:
    n_bytes = np.array(by_document["bytes"])
    return {variant: ratio_of_sums(np.array(by_document[variant]), n_bytes) for variant in variants}
