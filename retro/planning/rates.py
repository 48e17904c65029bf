"""Rates: what a sample of the text gives, and how fast this machine is.

A sample is taken through every stage for a few seconds each. What is measured holds for any amount of such text: bytes
of a token, tokens of a chunk, seconds for a chunk, products of two numbers in a second. `retro.planning.plan` counts
with it.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np
import torch

from retro.bert_embeddings import TOKENS_PER_BATCH
from retro.config import BERT, PACKAGED, CorpusConfig, DatabaseConfig, retriever_parts
from retro.errors import InvalidOption
from retro.search.bm25 import BM25
from retro.search.chunks import Chunks
from retro.search.factory import EXACT_UP_TO, GRAPH_BREADTH, KMEANS_ITERATIONS, choose_index, ivf_of, new_index
from retro.search.keys import chunk_offsets
from retro.search.recall import N_RECALL_QUERIES, nearest_distances
from retro.search.sentences import Embedder, load_embedder
from retro.storage.shards import TOKENS_PER_SHARD, Shards
from retro.text.build import build_corpus
from retro.text.corpus import Corpus
from retro.text.documents import find_texts, read_documents
from retro.text.records import PLAIN, Columns
from retro.text.table import Documents

T = TypeVar("T")
SAMPLE_CHARS = 4_000_000  # of text that is read
EMBED_SECONDS = 5.0
N_SAMPLE_KEYS = 1 << 14
N_CODE_TRAIN = 1 << 16  # keys that FAISS learns codes from, at most


OF_KEYS = (  # rates
    "d_emb", "start_seconds", "embed_seconds", "kmeans_products", "code_products", "encode_seconds", "assign_products",
    "link_seconds", "walk_seconds", "recall_products",
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What a sample of the text gives, and how fast this machine is. Bytes, seconds, or products a second."""

    chunk_len: int
    valid_fraction: float  # of the text that is held out of the database
    d_emb: int  # 0 where nothing is embedded
    n_kinds: int  # of tokens
    bytes_per_token: float  # of text, in UTF-8
    token_bytes: int  # of a token in tokens.bin
    tokens_per_chunk: float  # not `chunk_len`: documents end anywhere
    tokens_per_document: float
    document_bytes: float  # of the table of documents, for one
    base_memory: int  # of a process that has embedded
    start_seconds: float  # to load and hash what embeds
    corpus_seconds: float  # for a byte of text: read, tokenized, written, read again
    learn_seconds: float  # for a byte of the text that the vocabulary is learnt from
    embed_seconds: float  # for a chunk; equal chunks of a shard count, though they are embedded once
    file_bytes: float  # written and hashed in a second
    kmeans_products: float
    code_products: float  # of k-means on the parts of keys
    encode_seconds: float  # for a key
    assign_products: float  # a key to its list, by comparing it with all
    link_seconds: float  # to put a centroid in the graph, divided by log2 of the number of lists
    walk_seconds: float  # a key to its list through the graph, divided by log2 of the number of lists
    recall_products: float
    lexical_seconds: float  # for a chunk in the index of tokens; 0 where there is none
    lexical_bytes: float  # of it, for a chunk


def measure(
    texts: Sequence[str | Path],
    tokenizer: str,
    chunk_len: int,
    embedder: str = PACKAGED,
    device: torch.device | str = "cpu",
    index: str = "auto",
    valid_fraction: float = CorpusConfig.valid_fraction,
    columns: Columns = PLAIN,
    retriever: str = BERT,
) -> Rates:
    """Rates of this machine on a sample drawn from the files of `texts`; takes some 20 s on two cores.

    * `retriever` is what finds chunks, as in `DatabaseConfig`; `embedder` is its BERT

    Raises `InvalidOption` for an index that cannot be planned, before anything takes long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = _write_sample(texts, folder / "texts", columns)

        def make_corpus(texts: Path, place: str, tokenizer: str) -> Corpus:  # as the command does it: build, load
            build_corpus([texts], folder / place, tokenizer, valid_fraction)
            return Corpus.load(folder / place)

        first, corpus = _timed(lambda: make_corpus(sample, "corpus", tokenizer))
        # Without learning anything, all of it and a part: what both take is no matter of bytes.
        part = _write_sample([sample], folder / "part", PLAIN, SAMPLE_CHARS // 8)
        of_part, few = _timed(lambda: make_corpus(part, "few", str(folder / "corpus")))
        of_all, _ = _timed(lambda: make_corpus(sample, "again", str(folder / "corpus")))
        embeds, other = retriever_parts(retriever)
        of_keys: dict[str, Any] = dict.fromkeys(OF_KEYS, 0)
        if embeds is not None:
            trim = corpus.tokenizer.kind == "char"
            start_seconds, bert = _timed(lambda: load_embedder(embeds, embedder, device, trim))
            start_seconds += _timed(lambda: bert.manifest)[0]
            if index != "auto":
                plannable_index(index, bert.d_emb)
            embed_seconds, keys = _embedding(corpus, chunk_len, bert)
            of_keys = {"d_emb": bert.d_emb, "start_seconds": start_seconds, "embed_seconds": embed_seconds}
            of_keys |= _products(keys, index)
        lexical_seconds, lexical_bytes = _lexical(corpus, chunk_len, folder / "lexical") if other else (0.0, 0.0)
        n_tokens, lengths = len(corpus.tokens), np.diff(corpus.starts)
        assert isinstance(corpus.documents, Documents)
        n_bytes = int(corpus.documents.n_bytes.sum())
        more = n_bytes - sum(document.n_bytes for document in few.documents)
        corpus_seconds = (of_all - of_part) / more if more and of_all > of_part else of_all / n_bytes
        base_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Rates(
            chunk_len=chunk_len,
            valid_fraction=valid_fraction,
            n_kinds=corpus.n_tokens,
            bytes_per_token=n_bytes / n_tokens,
            token_bytes=corpus.tokens.itemsize,
            tokens_per_chunk=n_tokens / np.maximum(1, lengths // chunk_len).sum(),
            tokens_per_document=n_tokens / len(lengths),
            document_bytes=corpus.documents.file.stat().st_size / len(lengths),
            base_memory=base_memory,
            corpus_seconds=corpus_seconds,
            learn_seconds=max(0.0, first - of_all) / n_bytes,
            file_bytes=_writing(folder / "shards"),
            lexical_seconds=lexical_seconds,
            lexical_bytes=lexical_bytes,
            **of_keys,
        )


def plannable_index(factory: str, d: int) -> faiss.Index:
    """An empty index of keys of `d` features.

    Raises `InvalidOption` for one that FAISS does not know, or that is neither `Flat` nor lists of keys or codes.
    """
    index = new_index(d, factory)
    if not re.fullmatch(r"Flat|(OPQ{n}(_{n})?,)?IVF{n}(_HNSW{n})?,(Flat|PQ{n})".format(n=r"[1-9]\d*"), factory):
        raise InvalidOption("index", factory, "cannot be planned, only Flat and [OPQm,]IVFn[_HNSWm],PQm can")
    return index


def _write_sample(texts: Sequence[str | Path], folder: Path, columns: Columns, most: int = SAMPLE_CHARS) -> Path:
    """A folder with documents of randomly drawn files, as many characters in all or what there is."""
    found, n_chars = find_texts(texts), 0
    drawn = np.random.default_rng(0).permutation(len(found))
    folder.mkdir()
    for number, document in enumerate(read_documents((found[i] for i in drawn), columns)):
        text = document.text[: most - n_chars]
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        n_chars += len(text)
        if n_chars >= most:
            break
    return folder


def _embedding(corpus: Corpus, chunk_len: int, bert: Embedder) -> tuple[float, np.ndarray]:
    """Seconds to embed a chunk, and keys. Equal chunks of a shard are embedded once: how many are, is counted."""
    offsets = chunk_offsets(corpus, chunk_len)[: max(1, TOKENS_PER_SHARD // chunk_len)]
    decoding, texts = _timed(lambda: corpus.texts(offsets, chunk_len))
    distinct = dict(zip(bert.tokens_of(texts), texts, strict=True))
    lengths = np.array([len(row) for row in distinct])  # of the tokens, or characters, that are embedded
    drawn = np.random.default_rng(0).permutation(np.unique(lengths))  # whole lengths, because batches have about one
    totals = np.cumsum([lengths[lengths == length].sum() for length in drawn])
    bert(texts[:64])  # the first call takes longer
    n_tokens, batch_size = TOKENS_PER_BATCH, DatabaseConfig.embed_batch_size
    while True:  # until it takes long enough
        chosen = np.isin(lengths, drawn[: int(np.searchsorted(totals, n_tokens)) + 1])
        some = [text for text, take in zip(distinct.values(), chosen, strict=True) if take]
        seconds, keys = _timed(lambda: bert.of_tokens(bert.tokens_of(some), batch_size).cpu().numpy())  # noqa: B023
        if chosen.all() or seconds >= EMBED_SECONDS / 2:
            return (decoding + seconds * lengths.sum() / max(1, lengths[chosen].sum())) / len(texts), keys
        n_tokens *= 2


def _lexical(corpus: Corpus, chunk_len: int, folder: Path) -> tuple[float, float]:
    """Seconds and bytes that the index of tokens takes for a chunk; it is searched as well, which takes memory."""
    chunks, bm25 = Chunks(corpus, chunk_offsets(corpus, chunk_len), chunk_len), BM25()
    folder.mkdir()
    seconds, _ = _timed(lambda: bm25.build(chunks, folder))
    bm25.open(chunks, folder)
    bm25.nearest(chunks[:N_RECALL_QUERIES], 2, None)
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.npy")) - 4 * len(bm25.parts) * corpus.n_tokens
    return seconds / len(chunks), n_bytes / len(chunks)


def _writing(folder: Path) -> float:
    """Bytes a second that are written as a shard, hashed and on the disk."""
    shards = Shards(folder, {}, [""], ".npy")
    shards.open()
    content = np.random.default_rng(0).bytes(1 << 26)

    def write() -> None:
        with shards.written(0) as temporary:
            temporary.write_bytes(content)

    return len(content) / _timed(write)[0]


def _products(keys: np.ndarray, index: str) -> dict[str, float]:
    """How fast FAISS learns, encodes and compares keys, from keys like these."""
    d, n, k = keys.shape[1], N_SAMPLE_KEYS, N_SAMPLE_KEYS // 16
    rng = np.random.default_rng(0)
    x = keys[rng.integers(len(keys), size=n)] + keys.std(0) * rng.standard_normal((n, d), dtype=np.float32) / 2
    clustering = faiss.Clustering(d, k)
    clustering.niter, clustering.min_points_per_centroid = KMEANS_ITERATIONS, 1
    kmeans, _ = _timed(lambda: clustering.train(x, faiss.IndexFlatL2(d)))

    empty = new_index(d, index if "PQ" in index else choose_index(EXACT_UP_TO + 1, d))
    ivf = ivf_of(empty)  # a part of `empty`, which has to stay
    assert ivf is not None
    all_parts, n_parts = ivf.pq.M, min(8, ivf.pq.M)
    # Some parts of a key, as many as are learnt in a second, of all keys: the rate depends on how many these are.
    pq = faiss.ProductQuantizer(n_parts * ivf.pq.dsub, n_parts, ivf.pq.nbits)
    pq.cp.niter, pq.cp.min_points_per_centroid = KMEANS_ITERATIONS, 1
    parts = rng.standard_normal((N_CODE_TRAIN, pq.d), dtype=np.float32)
    codes, _ = _timed(lambda: pq.train(parts))
    encode, _ = _timed(lambda: pq.compute_codes(parts))

    centroids = faiss.IndexFlatL2(d)
    centroids.add(x[:k])
    assign, _ = _timed(lambda: centroids.search(x, 1))
    graph = faiss.IndexHNSWFlat(d, 32)
    graph.hnsw.efSearch = GRAPH_BREADTH
    link, _ = _timed(lambda: graph.add(x[: n // 2]))
    walk, _ = _timed(lambda: graph.search(x[n // 2 :], 1))
    queries, nothing = x[:N_RECALL_QUERIES], np.zeros((N_RECALL_QUERIES, 1, 2), dtype=np.int64)
    recall, _ = _timed(lambda: nearest_distances(queries, nothing, [(np.arange(n), x)]))
    return {
        "kmeans_products": n * k * d * KMEANS_ITERATIONS / kmeans,
        "code_products": len(parts) * pq.ksub * pq.d * KMEANS_ITERATIONS / codes,
        "encode_seconds": encode / len(parts) * all_parts / n_parts,
        "assign_products": n * k * d / assign,
        "link_seconds": link / (n // 2) / math.log2(n // 2),
        "walk_seconds": walk / (n // 2) / math.log2(n // 2),
        "recall_products": N_RECALL_QUERIES * n * d / recall,
    }


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
