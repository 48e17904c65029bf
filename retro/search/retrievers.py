r"""Retrievers: what finds the chunks that are near to a chunk, and the contract that they keep.

Four ship. `bert` is the tutorial's: embeddings of a frozen BERT in a FAISS index. The name of a model of
sentence-transformers puts its embeddings in the place of BERT's. `bm25` compares tokens (`retro.search.bm25`). `hybrid`
asks two, and merges what they find by *reciprocal rank* (Cormack, Clarke and Büttcher, 2009), which needs no common
measure of distance:

$$d(C, N) = -\sum_{r} \frac{1}{60 + \text{rank}_r(N)}$$

Each can be asked for more than is wanted, of which those are taken that share the longest run of tokens with the query,
or that a second model likes best (`Reranked`). A retriever of one's own is a class with what `Retriever` names, handed
to `build_database` and `RetroIndex`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np

from retro import parallel
from retro.config import OWN
from retro.errors import InvalidOption, MissingArtifact, require_match
from retro.search.bm25 import BM25
from retro.search.chunks import NO_DISTANCE, Chunks, common_runs, is_barred, ranges_of_each
from retro.search.index_file import read_database_manifest
from retro.search.keys import Keys, chunk_offsets
from retro.search.querying import search_outside
from retro.storage.manifests import read_manifest, sha256_of_json, write_manifest
from retro.text.corpus import Corpus

FOLDER = "retriever"  # in a data folder: what retrievers other than FAISS' indexes have written
CANDIDATES = 50  # of each of two, whose neighbors are merged
SMOOTHING = 60  # of reciprocal ranks, as in the article


class Finds(Protocol):
    """What a search asks for."""

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Distances and offsets of the `k` nearest chunks of each query, of shape `[q, k]`, nearest first.

        * `excluded` are ranges `(first, end)` of offsets that each query may not find, of shape `[q, r, 2]`

        Where there are fewer, the offset is -1, and the distance the largest of float32. Distances are whatever is less
        for a nearer chunk.
        """
        ...


class Retriever(Finds, Protocol):
    """What can take the place of the tutorial's BERT and FAISS."""

    name: str  # how the database's manifest calls it
    made_with: Mapping[str, Any]  # JSON-safe options; with others it is built anew

    def build(self, chunks: Chunks, folder: Path) -> None:
        """Make the database's `chunks` searchable: write into `folder` what `open` needs, if it is not there yet.

        Under torchrun each process calls it.
        """
        ...

    def open(self, chunks: Chunks, folder: Path) -> None:
        """Get ready to search the same `chunks`."""
        ...


def nearest_outside(
    finds: Finds, queries: Chunks, k: int, exclude: np.ndarray | tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `finds` gives, with ranges of the shapes that `RetroIndex.search` takes.

    Raises `InvalidOption` for a retriever that has found what a query may not.
    """
    if exclude is None:
        return finds.nearest(queries, k, None)
    ranges = ranges_of_each(exclude, len(queries))
    distances, found = finds.nearest(queries, k, ranges)
    if len(leaking := np.argwhere(is_barred(found, ranges) & (found >= 0))):
        row, column = leaking[0]
        asked = f"chunk {queries.offsets[row]}" if queries.offsets is not None else f"query {row}"
        reason = f"may not be found for {asked}: it is of its document, or a near-duplicate"
        raise InvalidOption("neighbors", int(found[row, column]), reason)
    return distances, found


class Dense:
    """Nearest keys in a FAISS index."""

    def __init__(self, index: faiss.Index, keys: Keys, embedder: Any) -> None:
        self.index, self.keys, self.embedder = index, keys, embedder

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As of `Finds`; distances are squared L2. What is in the database is not embedded again."""
        return self.search(self.embedded(queries), k, excluded)

    def search(
        self, queries: np.ndarray, k: int, excluded: np.ndarray | tuple[int, int] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`, of embeddings of shape `[q, d_emb]`; there may be one range for all queries."""
        distances, found = search_outside(self.index, self.keys, queries, k, excluded)
        return distances, self.keys.checked(found)

    def embedded(self, queries: Chunks) -> np.ndarray:
        """Embeddings of shape `[q, d_emb]`."""
        is_own = queries.offsets is not None and queries.corpus.sha256 == self.keys.corpus.sha256
        if not is_own or not getattr(self.embedder, "is_symmetric", True):
            return self.embedder(queries.texts).cpu().numpy()
        assert queries.offsets is not None
        stored, keys = self.keys.stored(queries.offsets)
        vectors = np.empty((len(queries), self.keys.d_emb), dtype=np.float32)
        vectors[stored] = keys
        others = Chunks(queries.corpus, queries.offsets[~stored], queries.chunk_len)
        vectors[~stored] = self.embedder(others.texts).cpu().numpy()
        return vectors


class Merged:
    """What two retrievers find, by reciprocal rank."""

    def __init__(self, one: Finds, other: Finds) -> None:
        self.both = one, other

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As of `Finds`."""
        n = max(k, CANDIDATES)
        found = np.concatenate([finds.nearest(queries, n, excluded)[1] for finds in self.both], axis=1)  # (q, 2n)
        ranks = np.tile(np.arange(1, n + 1), 2)
        gains = np.where(found >= 0, 1 / (SMOOTHING + ranks), 0.0)
        by_offset = np.argsort(found, axis=1, kind="stable")
        found, gains = np.take_along_axis(found, by_offset, axis=1), np.take_along_axis(gains, by_offset, axis=1)
        # A chunk that both have found stands there twice: the first takes the gain of the second.
        twice = found[:, 1:] == found[:, :-1]
        gains[:, :-1] += np.where(twice, gains[:, 1:], 0)
        gains[:, 1:][twice] = 0
        return _first(-gains, np.where(gains > 0, found, -1), k)


class Judge(Protocol):
    """What looks at neighbors a second time."""

    def __call__(self, queries: Chunks, found: np.ndarray, corpus: Corpus, chunk_len: int) -> np.ndarray:
        """How good each chunk `found` (q, n) in the corpus is for its query, of shape `[q, n]`; for -1 any number."""
        ...


def common_runs_of(queries: Chunks, found: np.ndarray, corpus: Corpus, chunk_len: int) -> np.ndarray:
    """A `Judge`: the length of the longest run of tokens in common."""
    return common_runs(queries.tokens, corpus.values(found, chunk_len))


class Reranked:
    """Of the first `n` that a retriever finds, those that a judge likes best."""

    def __init__(self, finds: Finds, n: int, judge: Judge, corpus: Corpus, chunk_len: int) -> None:
        self.finds, self.n, self.judge, self.corpus, self.chunk_len = finds, n, judge, corpus, chunk_len

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As of `Finds`; the distance is minus what the judge says, and of equal ones the nearer goes first."""
        _, found = self.finds.nearest(queries, max(k, self.n), excluded)
        said = np.zeros(found.shape, dtype=np.float32)
        for part, some in queries.parts():
            said[part, : self.n] = self.judge(some, found[part, : self.n], self.corpus, self.chunk_len)
        # Those behind the first n keep their order behind these.
        said[:, self.n :] = said[:, : self.n].min(initial=0) - 1
        return _first(-said, found, k)


def _first(distances: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` of the least distances of each row, of equal ones those that stand first; what is missing last."""
    distances = np.where(found >= 0, distances, NO_DISTANCE).astype(np.float32)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(found, order, axis=1)


class Given:
    """Neighbors that someone has found, for the chunks of a dataset: a `Retriever` of no other queries.

    * `offsets` (n) are the chunks', `neighbors` (n, K) where theirs start, nearest first, -1 for none
    """

    name = "given"

    def __init__(self, offsets: np.ndarray, neighbors: np.ndarray) -> None:
        order = np.argsort(offsets, kind="stable")
        self.offsets, self.neighbors = np.asarray(offsets)[order], np.asarray(neighbors, dtype=np.int64)[order]
        if self.neighbors.shape[:1] != self.offsets.shape or self.neighbors.ndim != 2:
            reason = f"are not neighbors (n, K) of {len(self.offsets)} chunks"
            raise InvalidOption("neighbors", [*self.neighbors.shape], reason)
        digest = hashlib.sha256(self.offsets.astype(np.int64).tobytes() + self.neighbors.tobytes())
        self.made_with: Mapping[str, Any] = {"sha256": digest.hexdigest()}

    def chunk_len_in(self, data_path: str | Path, chunk_len: int | None) -> int | None:
        """`chunk_len`, or that of such neighbors which are there. Raises `InvalidOption` for any other database."""
        try:
            manifest = read_database_manifest(data_path)
        except MissingArtifact:
            return chunk_len
        if (found := manifest["retriever"]) != f"{OWN}:{self.name}":
            reason = f"would take the place of the database in {data_path}, by {found}; name another --data-path"
            raise InvalidOption("neighbors", "of your own", reason)
        return chunk_len or int(manifest["chunk_len"])

    def build(self, chunks: Chunks, folder: Path) -> None:
        """Nothing: who has found them keeps them."""

    def open(self, chunks: Chunks, folder: Path) -> None:
        """Raises `InvalidOption` where a neighbor is no chunk of the database."""
        assert chunks.offsets is not None
        if len(unknown := np.setdiff1d(self.neighbors, [*chunks.offsets.tolist(), -1])):
            raise InvalidOption("neighbors", int(unknown[0]), "is where no chunk of the database starts")

    def nearest(self, queries: Chunks, k: int, excluded: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As of `Finds`; distances are ranks. Raises `InvalidOption` for a chunk that has no row."""
        if queries.offsets is None:
            raise InvalidOption("retriever", self.name, "knows the neighbors of a dataset's chunks only")
        rows = np.minimum(np.searchsorted(self.offsets, queries.offsets), len(self.offsets) - 1)
        if len(missing := np.flatnonzero(self.offsets[rows] != queries.offsets)):
            raise InvalidOption("neighbors", f"of chunk {queries.offsets[missing[0]]}", "are not given")
        found = self.neighbors[rows][:, :k]
        found = np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)
        return _first(np.broadcast_to(np.arange(k), found.shape), found, k)


class Files:
    """What a retriever that is no FAISS index has written of a database, in a folder for all that it depends on."""

    def __init__(self, retriever: Retriever, data_path: Path, corpus: Corpus, chunk_len: int) -> None:
        self.retriever = retriever
        offsets = chunk_offsets(corpus, chunk_len)
        in_database = ~np.isin(corpus.document_of(offsets), list(corpus.removed))
        self.chunks = Chunks(corpus, offsets[in_database], chunk_len)
        self.manifest = {
            "retriever": retriever.name,
            "made_with": dict(retriever.made_with),
            "chunk_len": chunk_len,
            "corpus_sha256": corpus.sha256,
            "database_sha256": corpus.database_sha256,
        }
        self.folder = data_path / FOLDER / sha256_of_json(self.manifest)[:8]

    @property
    def done(self) -> Path:
        """The file that says that all is written."""
        return self.folder.with_suffix(".json")

    def build(self) -> None:
        """Let the retriever build what is not there yet."""
        parallel.on_rank_zero(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self.retriever.build(self.chunks, self.folder)
        parallel.on_rank_zero(lambda: write_manifest(self.done, self.manifest))

    def open(self) -> Retriever:
        """The retriever, ready to search. Raises `MissingArtifact` where nothing was built, or not to its end."""
        if not self.done.exists():
            raise MissingArtifact(self.folder, f"{self.retriever.name} was not built, or not to its end: {self.folder}")
        require_match(self.done, read_manifest(self.done), self.manifest)
        self.retriever.open(self.chunks, self.folder)
        return self.retriever

    def remove_others(self) -> None:
        """Delete what was written of other databases, or by other retrievers."""
        for path in sorted(self.folder.parent.iterdir(), key=Path.is_dir):  # what says that all is there goes first
            if path not in (self.folder, self.done):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def shipped(name: str) -> Retriever:
    """A retriever that is no FAISS index, by its name. Raises `InvalidOption` for one of someone's own."""
    if name == BM25.name:
        return BM25()
    raise InvalidOption("retriever", name, "is none of those that ship; hand it over: RetroIndex(retriever=...)")
