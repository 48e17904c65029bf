r"""The key-value database: from a chunk's embedding to the chunks that are nearest to it.

The training documents are cut into chunks $N$ of `chunk_len` tokens. The *key* of a chunk is its
embedding $\text{BERT}(N)$; its *value* is the pair $[N, F]$ of the chunk and its continuation $F$,
the `chunk_len` tokens that follow it in the same document (section 2.2 of arXiv:2112.04426). Only
the keys are stored, in a FAISS index, each under the offset of its chunk; the value is read from
the corpus at that offset. Chunks do not overlap.

The index trades memory and time for accuracy, and a FAISS factory string names the bargain. For $n$ keys
of $d$ features:

* `Flat` keeps every key whole, in $4d$ bytes (1536 for $d = 384$), and compares the query with all $n$: exact.
* `IVF256,PQ64` (the tutorial's) sorts the keys into 256 lists by nearest centroid (IVF, an inverted file)
  and searches the `n_probe` lists nearest to the query, 8 of them: $n/32$ keys instead of $n$. What is
  lost are neighbors in lists that are not searched. Product quantization (PQ) cuts a key into 64 parts of 6
  features and stores for each part the number of the nearest of 256 centroids: 64 bytes instead of
  1536. What is lost is the order of neighbors that are almost equally far.
* `OPQ64_256,IVF65536_HNSW32,PQ64` first rotates the keys so that PQ loses less, and finds the lists
  through a graph (HNSW), because comparing with 65,536 centroids would itself take long.

What the bargain costs is measured when the database is built: *recall*, the share of the true
nearest neighbors that the index finds, on a sample of keys, against brute force.

Where this differs from the tutorial: there are documents, so a continuation ends with its own; the
held-out ones are not in the database; and what a query must not find is left out inside the search, so
that $k$ neighbors come back wherever $k$ exist. The tutorial fetches a few more than it needs and
filters them (`RetroIndex.filter_neighbors`), which can leave none. The paper searches $2 \cdot 10^{12}$ tokens with
SCaNN, in 10 ms a query (section 2.2).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from retro.commands import database_command

    raise SystemExit(database_command())

import contextlib
import io
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.big_batch_search import big_batch_search
from labml import monit
from tqdm import tqdm

from retro.artifacts import (
    FORMAT_VERSION,
    differences,
    package_versions,
    read_json,
    require_match,
    sha256_of_file,
    write_json,
    written_whole,
)
from retro.bert_embeddings import PACKAGED, BERTChunkEmbeddings
from retro.corpus import NO_TOKEN, REPAIR, Corpus

INDEX_FILE, MANIFEST_FILE = "retro.index", "retro.index.json"
TOKENS_PER_PIECE = 1 << 19  # of text: the work that an interruption can lose, and that shares its duplicates
N_RECALL_QUERIES = 256
N_SPARE = 8  # neighbors fetched beyond those wanted, in case some are excluded
MANY_QUERIES_PER_LIST = 64  # from here on, decoding a list's keys pays
KMEANS_ITERATIONS = 10  # FAISS does 25; recall at 10 was no lower after 10, in half the time
EXACT_UP_TO = 50_000  # chunks; brute force over these takes no longer than embedding the queries


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
    n_probe: int = 8,
    n_train: int = 50_000,
    *,
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
    * `n_probe` is the number of lists to search
    * `n_train` is the number of keys to train the index on, drawn with `seed`
    * `corpus` is a `Corpus` or a labml `TextDataset`; left out, the one in `data_path`
    * `bert` embeds the chunks; left out, `BERTChunkEmbeddings(device, embedder)`

    Writes `retro.index` and its manifest into `data_path` and returns the manifest. The keys are
    kept in `data_path/keys`, in shards: an interrupted build continues after the last one, and
    another index over the same keys needs no embedding. Memory holds a shard and the index.
    """
    data_path = Path(data_path)
    corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
    bert = bert or BERTChunkEmbeddings(device, embedder, trim=corpus.tokenizer.kind == "char")
    if d_emb is not None and d_emb != bert.d_emb:
        raise ValueError(
            f"d_emb={d_emb}, but {bert.embedder} gives embeddings of {bert.d_emb} features; leave d_emb out"
        )
    offsets = chunk_offsets(corpus, chunk_len)
    wanted = index or f"IVF{n_centeroids},PQ{code_size}"
    factory = choose_index(len(offsets), bert.d_emb) if wanted == "auto" else wanted

    keys = Keys(data_path / "keys", corpus, chunk_len, offsets, bert)
    keys.compute(batch_size)
    trained, factory, note = train_index(factory, keys, min(n_train, len(offsets)), seed)
    for start, block in tqdm(keys.blocks(), desc="Add keys", total=keys.n_shards):
        trained.add_with_ids(block, offsets[start : start + len(block)])
    set_n_probe(trained, n_probe)
    recall = measure_recall(trained, keys, seed)

    path = data_path / INDEX_FILE
    with written_whole(path) as temporary:
        try:
            faiss.write_index(trained, str(temporary))
        except RuntimeError as error:  # how FAISS reports a full disk
            raise OSError(str(error).rpartition("write error")[2] or str(error)) from error
        manifest = {
            "format_version": FORMAT_VERSION,
            **wanted_database(corpus, chunk_len, wanted, embedder=bert.embedder, seed=seed),
            "index": factory,
            "note": note,
            "n_chunks": len(offsets),
            "n_probe": n_probe,
            "n_train": min(n_train, len(offsets)),
            "d_emb": bert.d_emb,
            "trim": bert.trim,
            "precision": bert.precision,
            "embedder_sha256": bert.sha256,
            "recall": recall,
            "index_sha256": sha256_of_file(temporary),
            "versions": package_versions(),
        }
        write_json(data_path / MANIFEST_FILE, manifest)
    return manifest


def wanted_database(corpus: Corpus, chunk_len: int, index: str, embedder: str, seed: int) -> dict[str, Any]:
    """The part of a database's manifest that tells whether it has to be built again."""
    return {
        "chunk_len": chunk_len,
        "index_wanted": index,
        "embedder": embedder,
        "seed": seed,
        "corpus_sha256": corpus.sha256,
    }


def chunk_offsets(corpus: Corpus, chunk_len: int) -> np.ndarray:
    """Offsets of the chunks of the training documents, ascending, int64.

    Every document is cut from its start on; what is left at its end, shorter than a chunk, is in
    the continuation of the last one. A document shorter than a chunk is a chunk.
    """
    starts = corpus.starts[: corpus.n_train + 1]
    counts = np.maximum(1, np.diff(starts) // chunk_len)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return (np.repeat(starts[:-1], counts) + within * chunk_len).astype(np.int64)


class Keys:
    """Embeddings of all chunks, in shards of float32 on disk.

    A shard is there whole or not at all, and the manifest beside the shards says what they are
    embeddings of; shards of anything else are thrown away.
    """

    def __init__(
        self, folder: Path, corpus: Corpus, chunk_len: int, offsets: np.ndarray, bert: BERTChunkEmbeddings
    ) -> None:
        self.folder, self.corpus, self.chunk_len, self.offsets, self.bert = folder, corpus, chunk_len, offsets, bert
        self.per_shard = max(1, TOKENS_PER_PIECE // chunk_len)
        self.n_shards = math.ceil(len(offsets) / self.per_shard)

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"

    def _offsets(self, number: int) -> np.ndarray:
        return self.offsets[number * self.per_shard : (number + 1) * self.per_shard]

    def compute(self, batch_size: int) -> None:
        """Embed the chunks whose shards are missing, each shard by itself, so that it has the same bytes always."""
        made_with = {
            "format_version": FORMAT_VERSION,
            "corpus_sha256": self.corpus.sha256,
            "chunk_len": self.chunk_len,
            "embedder_sha256": self.bert.sha256,
            "trim": self.bert.trim,
            "precision": self.bert.precision,
            "keys_per_shard": self.per_shard,
        }
        manifest = self.folder / "manifest.json"
        if not manifest.exists() or differences(read_json(manifest, REPAIR), made_with):
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(manifest, made_with)
        missing = [number for number in range(self.n_shards) if not self._shard(number).exists()]
        n_done = len(self.offsets) - sum(len(self._offsets(number)) for number in missing)
        with tqdm(total=len(self.offsets), initial=n_done, desc="Embed", unit="chunk", mininterval=1) as bar:
            for number in missing:
                texts = self.corpus.texts(self._offsets(number), self.chunk_len)
                rows = self.bert(texts, batch_size, bar.update).cpu().numpy()
                with written_whole(self._shard(number)) as temporary, open(temporary, "wb") as file:
                    np.save(file, rows, allow_pickle=False)

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        shards = []
        for number in range(self.n_shards):
            shard = np.load(self._shard(number), mmap_mode="r", allow_pickle=False)
            expected = (len(self._offsets(number)), self.bert.d_emb)
            if shard.shape != expected or shard.dtype != np.float32:
                raise ValueError(
                    f"{self._shard(number)} holds {shard.dtype} {shard.shape}, but float32 {expected} is wanted. "
                    f"Delete the file and run the same command again."
                )
            shards.append(shard)
        return shards

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first key, keys of shape `[n, d_emb]`) of each shard, in order."""
        for number, shard in enumerate(self._shards):
            yield number * self.per_shard, np.ascontiguousarray(shard)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The keys of these numbers, of shape `[len(numbers), d_emb]`."""
        keys = np.empty((len(numbers), self.bert.d_emb), dtype=np.float32)
        for shard in np.unique(numbers // self.per_shard):
            at = numbers // self.per_shard == shard
            keys[at] = self._shards[shard][numbers[at] % self.per_shard]
        return keys


def choose_index(n_chunks: int, d_emb: int) -> str:
    """A FAISS factory string for a number of chunks: exact while that is cheap, then compressed."""
    if n_chunks <= EXACT_UP_TO:
        return "Flat"
    # About 4 sqrt(n) lists, as FAISS' guidelines have it, as a power of two.
    n_lists = 1 << round(math.log2(4 * math.sqrt(n_chunks)))
    code_size = max(m for m in range(1, 65) if d_emb % m == 0)
    if n_chunks <= 5_000_000:
        return f"IVF{n_lists},PQ{code_size}"
    return f"OPQ{code_size},IVF{n_lists}_HNSW32,PQ{code_size}"


def train_index(factory: str, keys: Keys, n_train: int, seed: int) -> tuple[faiss.Index, str, str]:
    """Make and train an index that stores keys under ids of our choice.

    Returns the index, its factory string and a note: where there are fewer keys than the
    index has centroids to learn, an exact index takes its place, and the note says so.
    """
    d_emb, n_chunks = keys.bert.d_emb, len(keys.offsets)
    chosen = np.sort(np.random.default_rng(seed).choice(n_chunks, size=n_train, replace=False))
    try:
        index = faiss.index_factory(d_emb, factory)
    except RuntimeError as error:
        raise ValueError(
            f"--index {factory!r} is no FAISS index for keys of {d_emb} features: "
            f"{str(error).splitlines()[0].rpartition('Error: ')[2]}"
        ) from None
    note = ""
    if (needed := centroids_of(index)) > n_train:
        note = f"{factory} has {needed} centroids to learn, but there are {n_train} keys: the index is exact instead"
        index, factory = faiss.index_factory(d_emb, "Flat"), "Flat"
    if not index.is_trained:
        with monit.section(f"Train {factory}"):
            index.train(keys.rows(chosen))
    if ivf_of(index) is None and not isinstance(index, faiss.IndexIDMap2):
        index = faiss.IndexIDMap2(index)
    return index, factory, note


def ivf_of(index: faiss.Index) -> faiss.IndexIVF | None:
    """The inverted lists inside an index, if it has any."""
    try:
        return faiss.downcast_index(faiss.extract_index_ivf(index))
    except RuntimeError:
        return None


def centroids_of(index: faiss.Index) -> int:
    """The most centroids that a part of the index learns from its training keys; sets how it learns them."""
    needed = [0]
    if (ivf := ivf_of(index)) is not None:
        needed.append(ivf.nlist)
        _set_clustering(ivf.cp)
        if isinstance(ivf, faiss.IndexIVFPQ):
            # Reorders the codes for a filter that is not used here, at ten times the cost of the rest.
            ivf.do_polysemous_training = False
        index = ivf
    if (pq := getattr(index, "pq", None)) is not None:
        needed.append(pq.ksub)
        _set_clustering(pq.cp)
    return max(needed)


def _set_clustering(parameters: faiss.ClusteringParameters) -> None:
    parameters.niter = KMEANS_ITERATIONS
    # FAISS asks for 39 keys a centroid and warns below that; it is silenced, recall tells.
    parameters.min_points_per_centroid = 1


def set_n_probe(index: faiss.Index, n_probe: int) -> None:
    """Search `n_probe` lists, where the index has lists."""
    if (ivf := ivf_of(index)) is not None:
        ivf.nprobe = min(n_probe, ivf.nlist)


def measure_recall(index: faiss.Index, keys: Keys, seed: int) -> dict[str, float]:
    """Share of the true nearest neighbors that the index finds, at 1, 2 and 10.

    Keys drawn with `seed` are the queries; each one's own chunk does not count. Chunks of equal
    text have equal distances, so a neighbor is true if it is no farther than the k-th true
    one, whichever of the equals it is.
    """
    n_chunks = len(keys.offsets)
    rng = np.random.default_rng([seed, 1])
    chosen = np.sort(rng.choice(n_chunks, size=min(N_RECALL_QUERIES, n_chunks), replace=False))
    queries = keys.rows(chosen)
    n_found = min(11, n_chunks)  # one more than 10: the query itself
    exact = faiss.ResultHeap(len(queries), n_found)
    for start, block in keys.blocks():
        distances, ids = faiss.knn(queries, block, min(n_found, len(block)))
        exact.add_result(distances, ids + start)
    exact.finalize()
    _, found = search_many(index, queries, n_found)

    recall: dict[str, list[float]] = {}
    for row, own in enumerate(chosen):
        true = exact.D[row][exact.I[row] != own][: n_found - 1]
        ids = np.searchsorted(keys.offsets, found[row][(found[row] >= 0) & (found[row] != keys.offsets[own])])
        distances = np.sort(((keys.rows(ids) - queries[row]) ** 2).sum(axis=1))
        for k in {min(k, len(true)) for k in (1, 2, 10)} - {0}:
            # The two distances are computed in different ways: allow for float32 rounding.
            hits = distances[:k] <= true[k - 1] * (1 + 1e-4) + 1e-4
            recall.setdefault(f"@{k}", []).append(float(hits.sum()) / k)
    return {k: round(float(np.mean(v)), 4) for k, v in sorted(recall.items(), key=lambda item: int(item[0][1:]))}


def search_many(index: faiss.Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `index.search`; for many queries, list by list of an inverted file.

    All queries that search a list are then compared with its decoded keys in one matrix product, in place of
    a table look-up for each key and query: the same distances but for rounding, several times as fast.
    """
    index = faiss.downcast_index(index)
    known = index.__class__ in (faiss.IndexIVFPQ, faiss.IndexIVFFlat)
    if not known or len(queries) * index.nprobe < MANY_QUERIES_PER_LIST * index.nlist:
        return index.search(queries, k)
    # In parts, because the distances of a list's queries and keys are in memory at once.
    parts = [queries[i : i + 8192] for i in range(0, len(queries), 8192)]
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on every list
        results = [big_batch_search(index, part, k, method="pairwise_distances") for part in parts]
    return np.concatenate([d for d, _ in results]), np.concatenate([i for _, i in results])


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
        path, manifest = Path(data_path) / INDEX_FILE, Path(data_path) / MANIFEST_FILE
        self.corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
        self.made_with = made_with = read_json(manifest, REPAIR)
        wanted: dict[str, Any] = {"corpus_sha256": self.corpus.sha256}
        if chunk_len is not None:
            wanted["chunk_len"] = chunk_len
        require_match(path, made_with, wanted, f"{REPAIR} --chunk-len {chunk_len or made_with['chunk_len']}")
        self.chunk_len: int = made_with["chunk_len"]
        self.n_neighbors, self.n_extra, self.exclude_neighbor_span = n_neighbors, n_extra, exclude_neighbor_span

        # FAISS trusts what it reads, so the bytes are checked first.
        found = sha256_of_file(path) if path.exists() else "no file"
        require_match(path, {"sha256": found}, {"sha256": made_with["index_sha256"]}, REPAIR)
        with monit.section("Load index"):
            self.index = faiss.read_index(str(path))
        self.n_probe = n_probe or made_with["n_probe"]
        set_n_probe(self.index, self.n_probe)

        self.bert = bert or BERTChunkEmbeddings(
            device, embedder or made_with["embedder"], made_with["trim"], made_with["precision"]
        )
        require_match(
            path,
            made_with,
            {"precision": self.bert.precision, "trim": self.bert.trim, "embedder_sha256": self.bert.sha256},
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
            distances, found = search_many(self.index, queries[first], n_neighbors)
            return distances[row_of], found[row_of]
        # In one go for all ranges, a few neighbors more than wanted, without those in the range.
        distances, found = (x[row_of] for x in search_many(self.index, queries[first], n_neighbors + N_SPARE))
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
        return distances, found

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
            return self.index.search(queries, n_neighbors, params=parameters)
        except RuntimeError as error:
            raise ValueError(
                f"the index {self.made_with['index']} cannot leave documents out of a search ({str(error)[-80:]}). "
                f"Rebuild it with lists: {REPAIR} --index IVF256,{self.made_with['index']}"
            ) from None

    def values(self, offsets: np.ndarray) -> np.ndarray:
        """Values of offsets of any shape `[...]`: tokens of shape `[..., 2 * chunk_len]`, `NO_TOKEN` where none."""
        return self.corpus.values(offsets, 2 * self.chunk_len)


__all__ = ["NO_TOKEN", "Keys", "RetroIndex", "build_database", "choose_index", "chunk_offsets", "open_corpus"]
