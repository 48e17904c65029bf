r"""What a database of any size takes, told before it is built: bytes, memory and time.

A sample of the text is taken through every stage for a few seconds each: what is learnt are *rates* of this
machine, and of this text with this tokenizer. The rest is counting. For $n$ chunks in $L$ lists, with $d$ features
a key, learning from $t$ keys, the products that a stage computes are

$$\underbrace{10 \, t L d}_{\text{k-means}} \qquad \underbrace{10 \cdot 256 \min(t, 65536) \, d}_{\text{codes}}
\qquad \underbrace{n L d}_{\text{add}} \qquad \underbrace{256 \, n d}_{\text{recall}}$$

where an HNSW graph over the lists makes the third $\sim n \log L$. Products over products a second give seconds.
Embedding is counted in chunks, everything that is written or hashed in bytes. Of $N$ processes each embeds and adds
its share; the first one alone does the rest. Bytes need no measuring: FAISS' files are added up field by field.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import faiss
import numpy as np
import torch

from retro.bert_embeddings import PACKAGED, TOKENS_PER_BATCH, BERTChunkEmbeddings
from retro.corpus import Corpus, build_corpus, find_texts, plan_corpus, read_documents
from retro.faiss_index import (
    EXACT_UP_TO,
    GRAPH_BREADTH,
    KEYS_PER_LIST,
    KEYS_PER_PART,
    KMEANS_ITERATIONS,
    N_RECALL_QUERIES,
    ON_DISK_ABOVE,
    ROTATION_KEYS,
    choose_index,
    ivf_of,
    memory_of_machine,
    n_lists_of,
    new_index,
    settle,
)
from retro.keys import TOKENS_PER_PIECE, chunk_offsets
from retro.shards import Shards

T = TypeVar("T")
LEAST_TOKENS, MOST_TOKENS = 1e5, 1e13
SAMPLE_CHARS = 4_000_000  # of text that is read
EMBED_SECONDS = 5.0
N_SAMPLE_KEYS = 1 << 14
N_TRAIN = 50_000  # `build_database`'s default
N_CODE_TRAIN = 1 << 16  # keys that FAISS learns codes from, at most
OPQ_ROUNDS, OPQ_ITERATIONS = 50, 40 + 49 * 4  # of k-means, in all rounds of learning a rotation
BYTES_PER_CHUNK = 35  # of memory: its offset twice, the document it is in, whether it is living, a number at training
BYTES_PER_DOCUMENT = 1000  # of memory: its entry, a third, and again as text while the manifest is written
# Memory that embedding takes beyond its sample: for a whole shard, and more whenever there are twice as many, because a
# CPU's kernels are kept for each shape of a batch. Seen: 0.15 GB after one shard, 0.29 after 4, 0.45 after 15.
BYTES_OF_SHARDS, MOST_DOUBLINGS = (1.5e8, 0.7e8), 6
MOST_TABLE_BYTES = 1 << 31  # FAISS makes a table of distances between centroids and codes, unless it takes more
GROWTH = 1.5  # room that a list takes for its keys: it doubles when it is full


@dataclass(frozen=True)
class Rates:
    """What a sample of the text gives, and how fast this machine is. Bytes, seconds, or products a second."""

    chunk_len: int
    valid_fraction: float  # of the text that is held out of the database
    d_emb: int
    bytes_per_token: float  # of text, in UTF-8
    token_bytes: int  # of a token in tokens.bin
    tokens_per_chunk: float  # not `chunk_len`: documents end anywhere
    tokens_per_document: float
    manifest_bytes: float  # of the corpus, for a document
    base_memory: int  # of a process that has embedded
    start_seconds: float  # to load and hash BERT
    corpus_seconds: float  # for a byte of text: read, tokenized, written, read again
    embed_seconds: float  # for a chunk, equal ones of a shard counted
    file_bytes: float  # written and hashed in a second
    kmeans_products: float
    code_products: float  # of k-means on the parts of keys
    encode_seconds: float  # for a key
    assign_products: float  # a key to its list, by comparing it with all
    link_seconds: float  # to put a centroid in the graph, for each of log2 of the lists
    walk_seconds: float  # a key to its list, through the graph, for each of log2 of the lists
    recall_products: float


@dataclass(frozen=True)
class Plan:
    """What a database takes: bytes and seconds, the latter of each stage with `n_processes`."""

    n_tokens: float
    chunk_len: int
    n_processes: int
    n_chunks: int
    n_documents: float
    index: str
    note: str
    n_train: int  # keys that the index learns from
    n_shards: int  # of keys
    n_parts: int  # of the index while it is filled
    on_disk: bool  # whether its lists are searched in a file
    learnt_bytes: int  # of the index before anything is in it
    files: dict[str, float]
    memory: dict[str, float]
    seconds: dict[str, float]

    @property
    def disk(self) -> dict[str, float]:
        """Bytes while the database is built, and after; without the text itself."""
        building = sum(size for name, size in self.files.items() if name != "text")
        return {"building": building, "after": building - self.files["parts"]}


def index_bytes(factory: str, n: int, d: int) -> int:
    """Bytes of the file of an index of `n` keys of `d` features, lists on disk included; all but its header.

    Raises `ValueError` for an index that is neither `Flat` nor lists of whole keys or codes.
    """
    index = new_index(d, factory)
    if not re.fullmatch(r"Flat|(OPQ\d+(_\d+)?,)?IVF\d+(_HNSW\d+)?,(Flat|PQ\d+)", factory):
        raise ValueError(f"--index {factory} cannot be planned, only Flat and [OPQm,]IVFn[_HNSWm],PQm can")
    if (ivf := ivf_of(index)) is None:
        return n * (4 * d + 8)
    n_bytes = ivf.nlist * (4 * ivf.d + 8)  # centroids, and the lengths of the lists
    if factory.startswith("OPQ"):
        n_bytes += 4 * d * ivf.d
    if "PQ" in factory.rpartition(",")[2]:
        n_bytes += 4 * ivf.pq.centroids.size()
    if "HNSW" in factory:
        m = faiss.downcast_index(ivf.quantizer).hnsw.nb_neighbors(1)
        # Each centroid has 2m links; a share of 1/m has m more, of 1/m^2 2m more, ... Besides: its level, an offset.
        n_bytes += round(ivf.nlist * (4 * (2 * m + m / (m - 1)) + 12))
    return n_bytes + n * (ivf.code_size + 8)


def check_size(n_tokens: float, n_processes: int) -> None:
    """Raise `ValueError` for a size that is not planned."""
    if not LEAST_TOKENS <= n_tokens <= MOST_TOKENS:
        raise ValueError(f"--n-tokens {n_tokens:g} is not between {LEAST_TOKENS:g} and {MOST_TOKENS:g}")
    if n_processes < 1:
        raise ValueError(f"--n-processes {n_processes} is not at least 1")


def plan(n_tokens: float, rates: Rates, index: str = "auto", n_processes: int = 1, n_train: int = N_TRAIN) -> Plan:
    """What a database of a text of `n_tokens` takes, if each of `n_processes` has what this one has.

    * `index`, `n_train` are those of `build_database`

    Raises `ValueError` for sizes and indexes that are not planned.
    """
    check_size(n_tokens, n_processes)
    n, d = max(1, round(n_tokens * (1 - rates.valid_fraction) / rates.tokens_per_chunk)), rates.d_emb
    factory = choose_index(n, d) if index == "auto" else index
    if index == "auto":
        n_train = max(n_train, KEYS_PER_LIST * n_lists_of(factory))
    factory, note = settle(factory, d, min(n_train, n))
    learnt, whole = index_bytes(factory, 0, d), index_bytes(factory, n, d)
    n_parts = math.ceil(n / KEYS_PER_PART) if n_lists_of(factory) else 0
    n_documents = n_tokens / rates.tokens_per_document
    filled = whole - learnt + n_parts * learnt  # each part holds what was learnt, too
    files = {
        "text": n_tokens * rates.bytes_per_token,
        "tokens": n_tokens * rates.token_bytes,
        "manifest": n_documents * rates.manifest_bytes,
        "keys": n * d * 4.0,
        "parts": learnt + filled if n_parts else 0,
        "index": whole,
    }
    counted = Plan(
        n_tokens=n_tokens,
        chunk_len=rates.chunk_len,
        n_processes=n_processes,
        n_chunks=n,
        n_documents=n_documents,
        index=factory,
        note=note,
        n_train=min(n_train, n) if n_parts else 0,
        n_shards=math.ceil(n / max(1, TOKENS_PER_PIECE // rates.chunk_len)),
        n_parts=n_parts,
        on_disk=n_parts > 0 and filled > ON_DISK_ABOVE * memory_of_machine(),
        learnt_bytes=learnt,
        files=files,
        memory={},
        seconds={},
    )
    return replace(counted, memory=_memory(counted, rates), seconds=_seconds(counted, rates))


def _memory(p: Plan, rates: Rates) -> dict[str, float]:
    """The most bytes in memory at one time, while the database is built and while it is searched.

    Pages of mapped files, which the system takes back when it needs them, do not count.
    """
    d, rotated, codes = rates.d_emb, "OPQ" in p.index, p.files["index"] - p.learnt_bytes
    code = re.search(r",PQ(\d+)$", p.index)
    table = 4.0 * 256 * int(code[1]) * n_lists_of(p.index) if code else 0.0
    learnt = p.learnt_bytes + (table if table <= MOST_TABLE_BYTES else 0.0)
    # The sample of keys, rotated too; the residuals that codes, and twice those that a rotation, are learnt from.
    n_rotation = min(p.n_train, ROTATION_KEYS) * rotated
    training = 4 * d * (p.n_train * (1 + rotated) + min(p.n_train, N_CODE_TRAIN) + 2 * n_rotation)
    part = codes / max(1, p.n_parts)
    merging = learnt + (part if p.on_disk else part + GROWTH * codes) if p.n_parts else GROWTH * codes
    embedding = BYTES_OF_SHARDS[0] + BYTES_OF_SHARDS[1] * min(MOST_DOUBLINGS, math.log2(p.n_shards))
    tables = p.n_chunks * BYTES_PER_CHUNK + p.n_documents * BYTES_PER_DOCUMENT
    return {
        "building": rates.base_memory + embedding + tables + learnt + max(training, merging),
        "serving": rates.base_memory
        + p.n_documents * BYTES_PER_DOCUMENT / 3
        + p.n_chunks * BYTES_PER_CHUNK / 2  # where the chunks are
        + learnt
        + (0 if p.on_disk else codes),
    }


def _seconds(p: Plan, rates: Rates) -> dict[str, float]:
    """Seconds of each stage."""
    r, n, d, lists, keys = rates, p.n_chunks, rates.d_emb, n_lists_of(p.index), p.files["keys"] / rates.file_bytes
    rotated, coded, graph = "OPQ" in p.index, "PQ" in p.index, "HNSW" in p.index

    def share(pieces: int) -> float:
        """Of the work, that the busiest process has."""
        return math.ceil(pieces / p.n_processes) / pieces if pieces else 1.0

    n_codes = min(p.n_train, N_CODE_TRAIN) * coded  # keys that codes are learnt from
    n_rotation = min(p.n_train, ROTATION_KEYS) * rotated
    learning = p.n_train * lists * d * KMEANS_ITERATIONS / r.kmeans_products
    learning += (n_codes * KMEANS_ITERATIONS + n_rotation * OPQ_ITERATIONS) * 256 * d / r.code_products
    learning += n_rotation * OPQ_ROUNDS * r.encode_seconds
    depth = math.log2(lists) if graph else 0.0
    a_key = (depth * r.walk_seconds if graph else lists * d / r.assign_products) + coded * r.encode_seconds
    brute_force = N_RECALL_QUERIES * n * d / r.recall_products
    return {
        "start": r.start_seconds,
        "corpus": p.files["text"] * r.corpus_seconds,
        "embed": (n * r.embed_seconds + keys) * share(p.n_shards),
        "train": learning + lists * depth * r.link_seconds + p.learnt_bytes / r.file_bytes,
        "add": (n * a_key + keys + p.files["parts"] / r.file_bytes) * share(p.n_parts),
        "merge": (p.files["parts"] + p.files["index"]) / r.file_bytes,
        "recall": brute_force * (1 if lists else 2) + keys,  # an exact index does the same again
    }


def describe(plan: Plan) -> str:
    """A plan as a table."""
    p = plan
    lines = [
        f"text: {p.n_tokens:.3g} tokens, {_bytes(p.files['text'])}; {p.n_chunks:,} chunks of {p.chunk_len} tokens",
        f"index: {p.index}"
        + (f", learnt from {p.n_train:,} keys" if p.n_train else "")
        + (", its lists in a file" if p.on_disk else ""),
    ]
    lines += [f"note: {p.note}"] * bool(p.note)
    building, after = p.disk["building"], p.disk["after"]
    lines += ["", f"{'disk':<10}{_bytes(building):>10} while building, {_bytes(after)} after"]
    lines += [f"  {name:<8}{_bytes(size):>10}" for name, size in p.files.items() if name != "text" and size]
    building, serving = p.memory["building"], p.memory["serving"]
    lines += ["", f"{'memory':<10}{_bytes(building):>10} while building, {_bytes(serving)} serving"]
    if building > (have := memory_of_machine()):
        lines.append(f"  {'':<8}{'':>10} more than the {_bytes(have)} of this machine")
    processes = "1 process" if p.n_processes == 1 else f"{p.n_processes} processes, each with what this one has"
    lines += ["", f"{'time':<10}{_duration(sum(p.seconds.values())):>10} in {processes}"]
    split = " (split)" if p.n_processes > 1 else ""
    for name, seconds in p.seconds.items():
        if seconds:
            lines.append(f"  {name:<8}{_duration(seconds):>10}{split if name in ('embed', 'add') else ''}")
    return "\n".join(lines)


def _bytes(n: float) -> str:
    power = min(5, int(math.log(max(n, 1), 1000)))
    return f"{n / 1000**power:.3g} {['B', 'kB', 'MB', 'GB', 'TB', 'PB'][power]}"


def _duration(seconds: float) -> str:
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.2g} s"


def measure(
    texts: Sequence[str | Path],
    tokenizer: str,
    chunk_len: int,
    embedder: str = PACKAGED,
    device: torch.device | str = "cpu",
    index: str = "auto",
    valid_fraction: float = 0.1,
) -> Rates:
    """Rates of this machine on a sample drawn from the files of `texts`; takes some 20 s on two cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = _write_sample(texts, folder / "texts")

        def make_corpus() -> Corpus:
            plan_corpus(find_texts([sample]), valid_fraction)  # what a command does: look, build, load
            build_corpus([sample], folder / "corpus", tokenizer, valid_fraction)
            return Corpus.load(folder / "corpus")

        corpus_seconds, corpus = _timed(make_corpus)
        trim = corpus.tokenizer.kind == "char"
        start_seconds, bert = _timed(lambda: BERTChunkEmbeddings(device, embedder, trim))
        start_seconds += _timed(lambda: bert.sha256)[0]
        if index != "auto":
            index_bytes(index, 0, bert.d_emb)  # refused before anything takes long
        n_bytes = sum(document.n_bytes for document in corpus.documents)
        lengths = np.diff(corpus.starts)
        embed_seconds, keys = _embedding(corpus, chunk_len, bert)
        base_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Rates(
            chunk_len=chunk_len,
            valid_fraction=valid_fraction,
            d_emb=bert.d_emb,
            bytes_per_token=n_bytes / len(corpus.tokens),
            token_bytes=corpus.tokens.itemsize,
            tokens_per_chunk=len(corpus.tokens) / np.maximum(1, lengths // chunk_len).sum(),
            tokens_per_document=len(corpus.tokens) / len(lengths),
            manifest_bytes=(folder / "corpus" / "manifest.json").stat().st_size / len(lengths),
            base_memory=base_memory,
            start_seconds=start_seconds,
            corpus_seconds=corpus_seconds / n_bytes,
            embed_seconds=embed_seconds,
            file_bytes=_writing(folder / "shards"),
            **_products(keys, index),
        )


def _write_sample(texts: Sequence[str | Path], folder: Path) -> Path:
    """A folder with documents of randomly drawn files, `SAMPLE_CHARS` in all or what there is."""
    found, n_chars = find_texts(texts), 0
    drawn = np.random.default_rng(0).permutation(len(found))
    folder.mkdir()
    for number, document in enumerate(read_documents(found[i] for i in drawn)):
        text = document.text[: SAMPLE_CHARS - n_chars]
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        n_chars += len(text)
        if n_chars >= SAMPLE_CHARS:
            break
    return folder


def _embedding(corpus: Corpus, chunk_len: int, bert: BERTChunkEmbeddings) -> tuple[float, np.ndarray]:
    """Seconds to embed a chunk, and keys. Equal chunks of a shard are embedded once: how many are, is counted."""
    offsets = chunk_offsets(corpus, chunk_len)[: max(1, TOKENS_PER_PIECE // chunk_len)]
    decoding, texts = _timed(lambda: corpus.texts(offsets, chunk_len))
    distinct = dict(zip(bert.tokens_of(texts), texts, strict=True))
    lengths = np.array([len(row) for row in distinct])
    drawn = np.random.default_rng(0).permutation(np.unique(lengths))  # whole lengths, because batches have about one
    totals = np.cumsum([lengths[lengths == length].sum() for length in drawn])
    bert(texts[:64])  # the first call takes longer
    n_tokens = TOKENS_PER_BATCH
    while True:  # until it takes long enough
        chosen = np.isin(lengths, drawn[: int(np.searchsorted(totals, n_tokens)) + 1])
        some = [text for text, take in zip(distinct.values(), chosen, strict=True) if take]
        seconds, keys = _timed(lambda: bert(some, 4096).cpu().numpy())  # noqa: B023
        if chosen.all() or seconds >= EMBED_SECONDS / 2:
            return (decoding + seconds * lengths.sum() / max(1, lengths[chosen].sum())) / len(texts), keys
        n_tokens *= 2


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
    recall, _ = _timed(lambda: faiss.knn(x[:N_RECALL_QUERIES], x, 11))
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
