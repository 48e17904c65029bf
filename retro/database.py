r"""The key-value database: from a chunk's embedding to the chunks that are nearest to it.

The training documents are cut into chunks $N$ of `chunk_len` tokens. The *key* of a chunk is its
embedding $\text{BERT}(N)$; its *value* is the pair $[N, F]$ of the chunk and its continuation $F$,
the `chunk_len` tokens that follow it in the same document (section 2.2 of arXiv:2112.04426). Only
the keys are stored, in files and in a FAISS index, each under the offset of its chunk; the value is
read from the corpus at that offset. Chunks do not overlap.

The index trades memory and time for accuracy, and a FAISS factory string names the bargain. For $n$ keys
of $d$ features:

* `Flat` keeps every key whole, in $4d$ bytes (1536 for $d = 384$), and compares the query with all $n$: exact.
* `IVF256,PQ64` (the tutorial's) sorts the keys into 256 lists by nearest centroid (IVF, an inverted file)
  and searches the `n_probe` lists nearest to the query, 8 of them: $n/32$ keys instead of $n$. What is
  lost are neighbors in lists that are not searched. Product quantization (PQ) cuts a key into 64 parts of 6
  features and stores for each part the number of the nearest of 256 centroids: 64 bytes instead of
  1536. What is lost is the order of neighbors that are almost equally far; so four times as many as are
  wanted are found by their codes, and those whose keys are nearest are taken. The keys stay on disk.
* `OPQ64_256,IVF65536_HNSW32,PQ64` first rotates the keys so that PQ loses less, and finds the lists
  through a graph (HNSW), because comparing with 65,536 centroids would itself take long.

What the bargain costs is measured when the database is built: *recall*, the share of the true
nearest neighbors that the index finds, on a sample of keys, against brute force.

Where this differs from the tutorial: there are documents, so a continuation ends with its own; the
held-out ones are not in the database; and what a query must not find is left out inside the search, so
that $k$ neighbors come back wherever $k$ exist. The tutorial fetches a few more than it needs and
filters them (`RetroIndex.filter_neighbors`), which can leave none, and takes them in the order of their
codes. The paper searches $2 \cdot 10^{12}$ tokens with SCaNN, in 10 ms a query (section 2.2).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from retro.commands import database_command

    raise SystemExit(database_command())

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from labml import monit

from retro import distributed
from retro.artifacts import (
    FORMAT_VERSION,
    Fields,
    package_versions,
    read_json,
    require_match,
    write_json,
)
from retro.bert_embeddings import PACKAGED, BERTChunkEmbeddings
from retro.corpus import NO_TOKEN, REPAIR, Corpus
from retro.faiss_index import (
    KEYS_PER_LIST,
    LISTS_FILE,
    Truth,
    build_index,
    choose_index,
    choose_n_probe,
    ivf_of,
    n_lists_of,
    nearest,
    read_index,
    set_n_probe,
    settle,
    take_place,
    write_index,
)
from retro.keys import Keys, chunk_offsets

MANIFEST_FILE = "retro.index.json"
KEYS_FOLDER = "keys"
PARTS_FOLDER = "index.parts"  # of an unfinished index
N_SPARE = 8  # neighbors fetched beyond those wanted, in case some are excluded
MANIFEST_FIELDS: Fields = {
    "chunk_len": int,
    "index": str,
    "index_wanted": str,
    "note": str,
    "n_chunks": int,
    "n_probe": int,
    "d_emb": int,
    "trim": bool,
    "precision": ("fp32", "bf16"),
    "embedder": str,
    "embedder_sha256": str,
    "corpus_sha256": str,
    "database_sha256": str,
    "index_sha256": str,
    "lists_sha256": str,
    "recall": dict,
    "seed": int,
    "search": float,
    "additions": list,
    "removed": dict,
}


def read_manifest(data_path: Path, repair: str = REPAIR) -> dict[str, Any]:
    """The manifest of the database in a folder. Raises if it is missing or damaged, with the repairing command."""
    path = data_path / MANIFEST_FILE
    manifest = read_json(path, repair, MANIFEST_FIELDS)
    for name in ("chunk_len", "n_probe", "d_emb"):
        if manifest[name] < 1:
            raise ValueError(f"{path} has {name}={manifest[name]}, but at least 1 is wanted. Rebuild it: {repair}")
    return manifest


def open_corpus(data_path: str | Path) -> Corpus:
    """The corpus of a data folder; else the tutorial's text, `tiny_shakespeare.txt`, if it lies there."""
    data_path = Path(data_path)
    if (data_path / "corpus" / "manifest.json").exists():
        return Corpus.load(data_path / "corpus")
    from labml_helpers.datasets.text import TextFileDataset

    file = data_path / "tiny_shakespeare.txt"
    if not file.exists():
        raise FileNotFoundError(f"{data_path / 'corpus'} does not exist. Make it: {REPAIR}")
    return Corpus.of(TextFileDataset(file, list))


def build_database(
    chunk_len: int = 16,
    batch_size: int = 4096,
    d_emb: int | None = None,
    n_centeroids: int = 256,
    code_size: int = 64,
    n_probe: int | None = 8,
    n_train: int = 50_000,
    *,
    recall: float = 0.9,
    corpus: Any = None,
    data_path: str | Path = "data",
    index: str | None = None,
    embedder: str = PACKAGED,
    bert: BERTChunkEmbeddings | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Build the database of a corpus' training documents; the first arguments are the tutorial's.

    * `chunk_len` is the length of a chunk, in tokens
    * `batch_size` is the largest number of chunks in one call of BERT
    * `d_emb` is the number of features of an embedding; left out, what the BERT gives
    * `n_centeroids`, `code_size` describe the index `IVF{n_centeroids},PQ{code_size}` (lists, bytes a
      key), unless `index` gives a FAISS factory string, or `auto` to choose one by the number of chunks
    * `n_probe` is the number of lists to search; None chooses it for a recall at 10 of at least `recall`
    * `n_train` is the number of keys to train the index on, drawn with `seed`; more where `auto` chose many lists
    * `corpus` is a `Corpus` or a labml `TextDataset`; left out, the one in `data_path`
    * `bert` embeds the chunks; left out, `BERTChunkEmbeddings(device, embedder)`

    Writes `retro.index` and its manifest into `data_path` and returns the manifest. The keys are
    kept in `data_path/keys`, in shards: an interrupted build continues after the last one, and
    another index over the same keys needs no embedding. Memory holds a shard and the index; above a
    quarter of the machine's memory, its lists lie in `retro.ivfdata`. Under `torchrun` the work is split.
    """
    data_path = Path(data_path)
    corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
    bert = bert or BERTChunkEmbeddings(device, embedder, trim=corpus.tokenizer.kind == "char")
    if d_emb is not None and d_emb != bert.d_emb:
        raise ValueError(
            f"d_emb={d_emb}, but {bert.embedder} gives embeddings of {bert.d_emb} features; leave d_emb out"
        )
    keys = Keys(data_path / KEYS_FOLDER, corpus, chunk_len, bert.made_with)
    n_chunks = int(keys.living.sum())
    if not n_chunks:
        raise ValueError("every document was removed from the database; add one: python -m retro.database --add TEXT")
    wanted = index or f"IVF{n_centeroids},PQ{code_size}"
    factory = wanted
    if wanted == "auto":
        factory = choose_index(n_chunks, bert.d_emb)
        n_train = max(n_train, KEYS_PER_LIST * n_lists_of(factory))
    n_train = min(n_train, n_chunks)
    factory, note = settle(factory, bert.d_emb, n_train)

    with distributed.only_writer(data_path):
        keys.compute(bert, batch_size)
        filled = build_index(factory, keys, n_train, seed, data_path / PARTS_FOLDER)
        if filled is not None:  # in the first process
            truth, remark, chosen = Truth.of(keys, seed), "", n_probe
            if chosen is None:
                chosen, remark = choose_n_probe(filled, keys, truth, recall)
            set_n_probe(filled, chosen)
            manifest = {
                "format_version": FORMAT_VERSION,
                **wanted_database(corpus, chunk_len, wanted, n_probe or recall, embedder=bert.embedder, seed=seed),
                **state_of_database(corpus),
                "index": factory,
                "note": "; ".join(filter(None, (note, remark))),
                "n_chunks": n_chunks,
                "n_probe": chosen,
                "n_train": n_train,
                **bert.made_with,
                "recall": truth.recall(filled, keys),
                **write_index(filled, data_path),
                "versions": package_versions(),
            }
            write_json(data_path / MANIFEST_FILE, manifest)
            take_place(data_path, manifest)
            if not manifest["lists_sha256"]:
                (data_path / LISTS_FILE).unlink(missing_ok=True)
            for folder in (data_path / PARTS_FOLDER, *keys.others):
                shutil.rmtree(folder, ignore_errors=True)
        distributed.wait()
    return read_manifest(data_path)


def keys_of(data_path: Path, corpus: Corpus, manifest: Mapping[str, Any], repair: str = REPAIR) -> Keys:
    """The keys of the database that a manifest speaks of."""
    return Keys(data_path / KEYS_FOLDER, corpus, manifest["chunk_len"], manifest, repair)


def mend_keys(keys: Keys, data_path: Path, manifest: Mapping[str, Any], device: torch.device | str) -> None:
    """Embed again the chunks of those shards that are missing or damaged; the index stays as it is."""
    bert = BERTChunkEmbeddings(device, manifest["embedder"], manifest["trim"], manifest["precision"])
    with distributed.only_writer(data_path):
        keys.compute(bert)


def state_of_database(corpus: Corpus) -> dict[str, Any]:
    """The part of a database's manifest that tells which documents were added and removed since it was built."""
    return {
        "database_sha256": corpus.database_sha256,
        "additions": list(corpus.additions),
        "removed": {str(number): corpus.documents[number].name for number in sorted(corpus.removed)},
    }


def wanted_database(
    corpus: Corpus, chunk_len: int, index: str, search: float, embedder: str, seed: int
) -> dict[str, Any]:
    """The part of a database's manifest that tells whether it has to be built again.

    `search` is the number of lists to search, or below 1 the recall to choose it for.
    """
    return {
        "chunk_len": chunk_len,
        "index_wanted": index,
        "search": search,
        "embedder": embedder,
        "seed": seed,
        "corpus_sha256": corpus.sha256,
        "database_sha256": corpus.database_sha256,
    }


def _distinct(rows: np.ndarray) -> tuple[list[int], list[int]]:
    """Where each distinct row is first, and the number of the distinct row that each row equals."""
    number_of: dict[bytes, int] = {}
    first: list[int] = []
    numbers: list[int] = []
    for i, row in enumerate(rows):
        number = number_of.setdefault(row.tobytes(), len(first))
        if number == len(first):
            first.append(i)
        numbers.append(number)
    return first, numbers


class RetroIndex:
    """Retrieves nearest neighbors from the database in `data_path`; the first arguments are the tutorial's.

    * `chunk_len` is the chunk length; it must be the database's
    * `n_probe` is the number of lists to search; left out, the database's
    * `n_neighbors` is the number of neighbors to retrieve
    * `n_extra` is the number of extra neighbors that a call with offsets fetches before it filters
    * `exclude_neighbor_span` is the extra length to avoid when checking for overlaps
    * `corpus` is what the database was built from; left out, the one in `data_path`
    * `bert` embeds the queries; left out, the database's BERT is loaded onto `device`

    Raises `ValueError` or `FileNotFoundError` when the database is missing, damaged, or was built from
    something else, with the command that rebuilds it.
    """

    def __init__(
        self,
        chunk_len: int | None = None,
        n_probe: int | None = None,
        n_neighbors: int = 2,
        n_extra: int = 2,
        exclude_neighbor_span: int = 8,
        *,
        data_path: str | Path = "data",
        corpus: Any = None,
        bert: BERTChunkEmbeddings | None = None,
        embedder: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        data_path = Path(data_path)
        path = data_path / MANIFEST_FILE
        self.corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
        self.made_with = made_with = read_manifest(data_path)
        wanted: dict[str, Any] = {"corpus_sha256": self.corpus.sha256}
        if chunk_len is not None:
            wanted["chunk_len"] = chunk_len
        repair = f"{REPAIR} --chunk-len {chunk_len or made_with['chunk_len']} --data-path {data_path}"
        require_match(path, made_with, wanted, repair)
        found, now = made_with["database_sha256"], self.corpus.database_sha256
        if found != now:
            raise ValueError(
                f"{path} has database_sha256={found[:12]}, but the corpus has {now[:12]}: documents were added or "
                f"removed, and the index does not follow yet. Give the same command again: "
                f"python -m retro.database --add TEXT ... (or --remove NAME ...) --data-path {data_path}"
            )
        self.chunk_len: int = made_with["chunk_len"]
        self.n_neighbors, self.n_extra, self.exclude_neighbor_span = n_neighbors, n_extra, exclude_neighbor_span
        with monit.section("Load index"):
            self.index = read_index(data_path, made_with, repair)
        again = f"python -m retro.database --data-path {data_path} --chunk-len {self.chunk_len}"
        again += f" --index {made_with['index_wanted']} --embedder {made_with['embedder']} --seed {made_with['seed']}"
        search = made_with["search"]
        again += f" --n-probe {search}" if search >= 1 else f" --recall {search}"
        self.keys = keys_of(data_path, self.corpus, made_with, again)
        self.n_probe = n_probe or made_with["n_probe"]
        set_n_probe(self.index, self.n_probe)

        self.bert = bert or BERTChunkEmbeddings(
            device, embedder or made_with["embedder"], made_with["trim"], made_with["precision"]
        )
        require_match(
            path,
            made_with,
            {name: self.bert.made_with[name] for name in self.keys.embedder},
            f"{REPAIR} --embedder {self.bert.embedder}",
        )

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
        n_fetched = self.n_neighbors + self.n_extra
        _, found = self.search(self.embed(query_chunks), n_fetched)
        rows = [[n for n in row if n >= 0] for row in found.tolist()]
        if offsets is not None:
            rows = [self.filter_neighbors(off, row) for off, row in zip(offsets, rows, strict=True)]
        return [row[: self.n_neighbors] for row in rows]

    def embed(self, query_chunks: Sequence[str]) -> np.ndarray:
        """Queries of shape `[len(query_chunks), d_emb]`."""
        return self.bert(query_chunks).cpu().numpy()

    def search(
        self, queries: np.ndarray, n_neighbors: int, exclude: np.ndarray | tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nearest chunks of each query, outside a range of offsets.

        * `queries` are embeddings of shape `[n, d_emb]`
        * `exclude` are ranges `(first, end)` of offsets whose chunks must not be found, of shape `[n, 2]`;
          or one range for all queries

        Returns squared L2 distances and offsets, both of shape `[n, n_neighbors]`, nearest first; -1 is
        the offset where there are fewer. All `n_neighbors` come back whenever the searched lists hold
        that many outside the range.
        """
        first, row_of = _distinct(queries)
        if exclude is None:
            distances, found = nearest(self.index, self.keys, queries[first], n_neighbors)
            return distances[row_of], self._checked(found)[row_of]
        # In one go for all ranges, a few neighbors more than wanted, without those in the range.
        distances, found = (x[row_of] for x in nearest(self.index, self.keys, queries[first], n_neighbors + N_SPARE))
        ranges = np.broadcast_to(np.asarray(exclude), (len(queries), 2))
        barred = (found < 0) | ((found >= ranges[:, :1]) & (found < ranges[:, 1:]))
        order = np.argsort(barred, axis=1, kind="stable")[:, :n_neighbors]
        missing = np.take_along_axis(barred, order, axis=1)
        # Where too many were in the range, but there are more: the search itself passes over it.
        again = np.flatnonzero(missing.any(axis=1) & (found[:, -1] >= 0))
        distances = np.where(missing, np.finfo(np.float32).max, np.take_along_axis(distances, order, axis=1))
        found = np.where(missing, -1, np.take_along_axis(found, order, axis=1))
        for span in np.unique(ranges[again], axis=0):
            rows = again[(ranges[again] == span).all(axis=1)]
            distances[rows], found[rows] = self._search_outside(queries[rows], n_neighbors, span)
        return distances, self._checked(found)

    def _checked(self, found: np.ndarray) -> np.ndarray:
        """Offsets as they are. Raises `ValueError` if one lies outside of the text."""
        if found.size and not -1 <= found.min() <= found.max() < len(self.corpus.tokens):
            raise ValueError(
                f"the index holds offset {found.max()}, but the text has {len(self.corpus.tokens)} tokens. "
                f"Rebuild it: {REPAIR}"
            )
        return found

    def _search_outside(
        self, queries: np.ndarray, n_neighbors: int, span: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, one range for all; slower for each query than a search without."""
        selector = faiss.IDSelectorNot(faiss.IDSelectorRange(int(span[0]), int(span[1])))
        if (ivf := ivf_of(self.index)) is not None:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=ivf.nprobe)
        elif "HNSW" in self.made_with["index"]:
            parameters = faiss.SearchParametersHNSW(sel=selector)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        try:
            return nearest(self.index, self.keys, queries, n_neighbors, parameters)
        except RuntimeError as error:
            raise ValueError(
                f"the index {self.made_with['index']} cannot leave documents out of a search ({str(error)[-80:]}). "
                f"Rebuild it with lists: {REPAIR} --index IVF256,{self.made_with['index']}"
            ) from None

    def values(self, offsets: np.ndarray) -> np.ndarray:
        """Values of offsets of any shape `[...]`: tokens of shape `[..., 2 * chunk_len]`, `NO_TOKEN` where none."""
        return self.corpus.values(offsets, 2 * self.chunk_len)


__all__ = ["NO_TOKEN", "RetroIndex", "build_database", "chunk_offsets", "open_corpus"]
