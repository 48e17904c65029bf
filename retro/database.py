r"""The key-value database: from a chunk's embedding to the chunks that are nearest to it.

The training documents are cut into chunks $N$ of `chunk_len` tokens. The *key* of a chunk is its embedding
$\text{BERT}(N)$; its *value* is the pair $[N, F]$ of the chunk and its continuation $F$, the `chunk_len` tokens that
follow it in the same document (section 2.2 of arXiv:2112.04426). The neighbors of a chunk $C$ are the $k$ chunks with
the least

$$d(C, N) = \lVert \text{BERT}(C) - \text{BERT}(N) \rVert_2^2$$

Only keys are stored, each under the *offset* of its chunk; the value is read from the corpus at that offset. Chunks do
not overlap.

Where this differs from the tutorial: there are documents, so a continuation ends with its own; the held-out ones are
not in the database; and what a query must not find is left out inside the search, so that $k$ neighbors come back
wherever $k$ exist. The tutorial fetches a few more than it needs and filters them (`RetroIndex.filter_neighbors`),
which can leave none. How good the index is, is measured when it is built (`retro.search.recall`). The paper searches
$2 \cdot 10^{12}$ tokens with SCaNN, in 10 ms a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro.config import NEIGHBOR_SPAN, OWN, DatabaseConfig, with_given
from retro.errors import InvalidOption
from retro.search.building import build, open_manifest, open_retriever
from retro.search.chunks import Chunks
from retro.search.keys import chunk_offsets
from retro.search.retrievers import Dense, Retriever, nearest_outside
from retro.search.sentences import Embedder
from retro.text.corpus import NO_TOKEN, Corpus, open_corpus


def build_database(
    chunk_len: int | None = None,
    batch_size: int | None = None,
    d_emb: int | None = None,
    n_centeroids: int | None = None,
    code_size: int | None = None,
    n_probe: int | None = None,
    n_train: int | None = None,
    *,
    config: DatabaseConfig | None = None,
    corpus: Any = None,
    data_path: str | Path = "data",
    bert: Embedder | None = None,
    device: str = "cpu",
    retriever: Retriever | None = None,
) -> dict[str, Any]:
    """Build the database of a corpus' training documents; the first arguments are the tutorial's.

    * `chunk_len` is the length of a chunk, in tokens
    * `batch_size` is the most chunks in one call of BERT
    * `d_emb` is the number of features of an embedding; left out, what the BERT gives
    * `n_centeroids`, `code_size` describe the index `IVF{n_centeroids},PQ{code_size}` (lists, bytes a key), unless
      `config.index` names another
    * `n_probe` is the number of lists to search
    * `n_train` is the number of keys to train the index on
    * `config` has all of these, with the tutorial's defaults, and more; what is given beside it goes before it
    * `corpus` is a `Corpus` or a labml `TextDataset`; left out, the one in `data_path`
    * `bert` embeds the chunks; left out, the config's, on `device`
    * `retriever` is one of your own, which takes the place of BERT and FAISS; left out, the config's

    Writes index, keys and a manifest into `data_path`, and returns the manifest. Keys that are there already are not
    computed again: another index over them needs no embedding. Raises `InvalidOption` for what no index can be.
    """
    given = {
        "chunk_len": chunk_len, "embed_batch_size": batch_size, "n_centeroids": n_centeroids, "code_size": code_size,
        "n_probe": n_probe, "n_train": n_train, "retriever": f"{OWN}:{retriever.name}" if retriever else None,
    }  # fmt: skip
    config = with_given(config or DatabaseConfig(), given)
    corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
    return build(corpus, config, Path(data_path), bert, d_emb, retriever, device)


class RetroIndex:
    """Retrieves nearest neighbors from the database in `data_path`; the first arguments are the tutorial's.

    * `chunk_len` is the chunk length; it must be the database's
    * `n_probe` is the number of lists to search; left out, the database's
    * `n_neighbors` is the number of neighbors to retrieve
    * `n_extra` is the number of extra neighbors that a call with offsets fetches before it filters
    * `exclude_neighbor_span` is the extra length to avoid when checking for overlaps
    * `corpus` is what the database was built from; left out, the one in `data_path`
    * `bert` embeds the queries; left out, the database's BERT is loaded onto `device`
    * `retriever` is one of your own, if the database was built with it

    `retriever` finds neighbors; if it has keys, there are `index`, `keys` and `bert`. Raises `MissingArtifact`,
    `DamagedFile` or `StaleArtifact` when the database is missing, damaged, or was built from something else.
    """

    def __init__(
        self,
        chunk_len: int | None = None,
        n_probe: int | None = None,
        n_neighbors: int = 2,
        n_extra: int = 2,
        exclude_neighbor_span: int = NEIGHBOR_SPAN,
        *,
        data_path: str | Path = "data",
        corpus: Any = None,
        bert: Embedder | None = None,
        device: Any = "cpu",
        retriever: Retriever | None = None,
    ) -> None:
        self.corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
        self.data_path = Path(data_path)
        self.manifest = open_manifest(self.data_path, self.corpus, chunk_len)
        self.chunk_len: int = self.manifest["chunk_len"]
        self.n_probe: int = n_probe or self.manifest["n_probe"]
        self.n_neighbors, self.n_extra, self.exclude_neighbor_span = n_neighbors, n_extra, exclude_neighbor_span
        self._given = {"corpus": self.corpus, "device": device, "bert": bert, "retriever": retriever}
        opened = open_retriever(self.data_path, self.corpus, self.manifest, self.n_probe, device, bert, retriever)
        self.retriever, self._dense = opened

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent, which opens the database itself."""
        names = ("chunk_len", "n_probe", "n_neighbors", "n_extra", "exclude_neighbor_span", "data_path")
        return self._given | {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def dense(self) -> Dense:
        """What finds neighbors by keys. Raises `InvalidOption` where none does."""
        if self._dense is None:
            raise InvalidOption("retriever", self.manifest["retriever"], "has no keys; ask for the nearest to a text")
        return self._dense

    @property
    def index(self) -> Any:
        """The FAISS index."""
        return self.dense.index

    @property
    def keys(self) -> Any:
        """What is in the index, and where it is from."""
        return self.dense.keys

    @property
    def bert(self) -> Embedder:
        """What embeds chunks."""
        return self.dense.embedder

    def filter_neighbors(self, offset: int, neighbor_offsets: Sequence[int]) -> list[int]:
        """The tutorial's filter: neighbors that do not overlap the query chunk at `offset`.

        It keeps neighbors that contain what comes soon after the query, so it lets a model see what
        it has yet to predict; `search` with `exclude` is the remedy.
        """
        span = self.chunk_len + self.exclude_neighbor_span
        return [n for n in neighbor_offsets if n < offset - span or n > offset + span]

    def __call__(self, query_chunks: Sequence[str], offsets: Sequence[int] | None) -> list[list[int]]:
        """Offsets of the nearest neighbors of each chunk, as in the tutorial.

        * `query_chunks` are texts
        * `offsets` are where they come from, to leave out neighbors that overlap them; or None

        A neighbor's value is the chunk at its offset and an equal length of text after it:
        `corpus.values(offset, 2 * chunk_len)`.
        """
        _, found = self.nearest(query_chunks, self.n_neighbors + self.n_extra)
        rows = [[n for n in row if n >= 0] for row in found.tolist()]
        if offsets is not None:
            rows = [self.filter_neighbors(off, row) for off, row in zip(offsets, rows, strict=True)]
        return [row[: self.n_neighbors] for row in rows]

    def nearest(
        self, query_chunks: Sequence[str], n_neighbors: int, exclude: np.ndarray | tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and offsets of the nearest chunks of each text; arguments and results are those of `search`."""
        return nearest_outside(self.retriever, Chunks(self.corpus, texts=query_chunks), n_neighbors, exclude)

    def nearest_at(
        self, offsets: np.ndarray, n_neighbors: int, exclude: np.ndarray | None = None, corpus: Corpus | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`, of the chunks at `offsets` (n) of this corpus, or of another with the same tokenizer."""
        chunks = Chunks(corpus or self.corpus, offsets, self.chunk_len)
        return nearest_outside(self.retriever, chunks, n_neighbors, exclude)

    def embed(self, query_chunks: Sequence[str]) -> np.ndarray:
        """Queries of shape `[len(query_chunks), d_emb]`."""
        return self.bert(query_chunks).cpu().numpy()

    def search(
        self, queries: np.ndarray, n_neighbors: int, exclude: np.ndarray | tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nearest keys of each query, outside of ranges of offsets.

        * `queries` are embeddings of shape `[n, d_emb]`
        * `exclude` are ranges `(first, end)` of offsets whose chunks must not be found, of shape `[n, r, 2]` or
          `[n, 2]`; or one range for all queries

        Returns squared L2 distances and offsets, both of shape `[n, n_neighbors]`, nearest first; -1 is
        the offset where there are fewer. All `n_neighbors` come back whenever the searched lists hold
        that many outside of the ranges.
        """
        return self.dense.search(queries, n_neighbors, exclude)

    def values(self, offsets: np.ndarray) -> np.ndarray:
        """Values of offsets of any shape `[...]`: tokens of shape `[..., 2 * chunk_len]`, `NO_TOKEN` where none."""
        return self.corpus.values(offsets, 2 * self.chunk_len)


__all__ = ["NO_TOKEN", "RetroIndex", "build_database", "chunk_offsets", "open_corpus"]

if __name__ == "__main__":
    from retro.cli import script

    script("database")
