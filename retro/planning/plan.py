r"""What a database of any size takes, told before it is built: bytes, memory and time.

The rates of this machine, and of this text with this tokenizer, are measured on a sample (`retro.planning.rates`). The
rest is counting. For $n$ chunks in $L$ lists, with $d$ features a key, learning from $t$ keys, the products that a
stage computes are

$$\underbrace{10 \, t L d}_{\text{k-means}} \qquad \underbrace{10 \cdot 256 \min(t, 65536) \, d}_{\text{codes}}
\qquad \underbrace{n L d}_{\text{add}} \qquad \underbrace{256 \, n d}_{\text{recall}}$$

where an HNSW graph over the lists makes the third $\sim n \log L$. Products over products a second give seconds.
Embedding is counted in chunks, everything that is written or hashed in bytes. Of $N$ processes each embeds and adds
its share; the first one alone does the rest. Bytes need no measuring: FAISS' files are added up field by field.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import faiss

from retro.config import DatabaseConfig
from retro.errors import InvalidOption
from retro.planning.rates import N_CODE_TRAIN, Rates, plannable_index
from retro.search.factory import (
    KEYS_PER_LIST,
    KMEANS_ITERATIONS,
    ROTATION_KEYS,
    choose_index,
    fall_back_to_flat,
    ivf_of,
    n_lists_of,
)
from retro.search.filling import KEYS_PER_SHARD, ON_DISK_ABOVE, memory_of_machine
from retro.search.recall import N_RECALL_QUERIES
from retro.storage.shards import TOKENS_PER_SHARD
from retro.text.build import LEARNT_FROM
from retro.text.copies import N_ORDERS

LEAST_TOKENS, MOST_TOKENS = 1e5, 1e13
OPQ_ROUNDS, OPQ_ITERATIONS = 50, 40 + 49 * 4  # of k-means, in all rounds of learning a rotation
BYTES_PER_CHUNK = 9  # of memory, while building: whether it is in the database, and a number at training
# Of memory while its entry and signature are made, compared and written; none of it stays. Seen: 3,300.
BYTES_PER_DOCUMENT = 3500
# Memory that embedding takes beyond its sample: for a whole shard, and more whenever there are twice as many, because a
# CPU's kernels are kept for each shape of a batch. Seen: 0.15 GB after one shard, 0.29 after 4, 0.45 after 15.
BYTES_OF_SHARDS, MOST_DOUBLINGS = (1.5e8, 0.7e8), 6
START_SECONDS = 1.0  # of a process that loads no model
MOST_TABLE_BYTES = 1 << 31  # FAISS makes a table of distances between centroids and codes, unless it takes more
GROWTH = 1.5  # room that a list takes for its keys: it doubles when it is full


def index_bytes(factory: str, n: int, d: int) -> int:
    """Bytes of the file of an index of `n` keys of `d` features, lists on disk included; all but its header.

    Raises `InvalidOption` for an index that is not planned.
    """
    index = plannable_index(factory, d)
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
    """Raise `InvalidOption` for a size that is not planned."""
    if not LEAST_TOKENS <= n_tokens <= MOST_TOKENS:
        raise InvalidOption("n_tokens", n_tokens, f"is not between {LEAST_TOKENS:g} and {MOST_TOKENS:g}")
    if n_processes < 1:
        raise InvalidOption("n_processes", n_processes, "is not at least 1")


def plan(
    n_tokens: float,
    rates: Rates,
    index: str = "auto",
    n_processes: int = 1,
    n_train: int = DatabaseConfig.n_train,
    key_bits: int = DatabaseConfig.key_bits,
) -> Plan:
    """What a database of a text of `n_tokens` takes, if each of `n_processes` has what this one has.

    * `index`, `n_train`, `key_bits` are those of `DatabaseConfig`

    Raises `InvalidOption` for sizes and indexes that are not planned.
    """
    check_size(n_tokens, n_processes)
    n, d = max(1, round(n_tokens * (1 - rates.valid_fraction) / rates.tokens_per_chunk)), rates.d_emb
    if not d:
        return Plan(rates, n_tokens, n_processes, n, "", "", 0, key_bits)
    factory = choose_index(n, d) if index == "auto" else index
    if index == "auto":
        n_train = max(n_train, KEYS_PER_LIST * n_lists_of(factory))
    factory, note = fall_back_to_flat(factory, d, min(n_train, n))
    n_train = min(n_train, n) if n_lists_of(factory) else 0
    plannable_index(factory, d)
    return Plan(rates, n_tokens, n_processes, n, factory, note, n_train, key_bits)


@dataclass(frozen=True)
class Plan:
    """What a database takes: bytes, and seconds of each stage with `n_processes`."""

    rates: Rates
    n_tokens: float
    n_processes: int
    n_chunks: int
    index: str  # empty where nothing is embedded
    note: str  # why it is not the index that was asked for
    n_train: int  # keys that the index learns from
    key_bits: int  # of each feature of a key

    @property
    def n_documents(self) -> float:
        """Documents of the text."""
        return self.n_tokens / self.rates.tokens_per_document

    @property
    def n_key_shards(self) -> int:
        """Shards of keys, or of the index of tokens."""
        return math.ceil(self.n_chunks / max(1, TOKENS_PER_SHARD // self.rates.chunk_len))

    @property
    def n_index_shards(self) -> int:
        """Shards of the index while it is filled; 0 for an index without lists."""
        return math.ceil(self.n_chunks / KEYS_PER_SHARD) if n_lists_of(self.index) else 0

    @cached_property
    def learnt_bytes(self) -> int:
        """Bytes of the index before anything is in it."""
        return index_bytes(self.index, 0, self.rates.d_emb) if self.index else 0

    @cached_property
    def files(self) -> dict[str, float]:
        """Bytes of all files: the text, what stays, and the shards of the index, which do not."""
        r = self.rates
        whole = index_bytes(self.index, self.n_chunks, r.d_emb) if self.index else 0
        lexical = self.n_chunks * r.lexical_bytes + self.n_key_shards * 4 * r.n_kinds
        return {
            "text": self.n_tokens * r.bytes_per_token,
            "tokens": self.n_tokens * r.token_bytes,
            "documents": self.n_documents * r.document_bytes,
            "signatures": self.n_documents * 4.0 * N_ORDERS,
            "keys": self.n_chunks * r.d_emb * self.key_bits / 8.0,
            "shards": whole if self.n_index_shards else 0,
            "index": whole,
            "bm25": lexical if r.lexical_bytes else 0,
        }

    @property
    def disk(self) -> dict[str, float]:
        """Bytes while the database is built, and after; without the text itself."""
        building = sum(size for name, size in self.files.items() if name != "text")
        return {"building": building, "after": building - self.files["shards"]}

    @property
    def on_disk(self) -> bool:
        """Whether the lists of the index are searched in a file."""
        return self.files["shards"] - self.learnt_bytes > ON_DISK_ABOVE * memory_of_machine()

    @property
    def memory(self) -> dict[str, float]:
        """The most bytes in memory at one time, while the database is built and while it is searched.

        Pages of mapped files, which the system takes back when it needs them, do not count.
        """
        d, rotated, codes = self.rates.d_emb, "OPQ" in self.index, self.files["index"] - self.learnt_bytes
        code = re.search(r",PQ(\d+)$", self.index)
        table = 4.0 * 256 * int(code[1]) * n_lists_of(self.index) if code else 0.0
        learnt = self.learnt_bytes + (table if table <= MOST_TABLE_BYTES else 0.0)
        # The sample of keys, rotated too; the residuals that codes, and twice those that a rotation, are learnt from.
        n_rotation = min(self.n_train, ROTATION_KEYS) * rotated
        training = 4 * d * (self.n_train * (1 + rotated) + min(self.n_train, N_CODE_TRAIN) + 2 * n_rotation)
        shard = codes / max(1, self.n_index_shards)
        merging = (
            learnt + (shard if self.on_disk else shard + GROWTH * codes) if self.n_index_shards else GROWTH * codes
        )
        doublings = min(MOST_DOUBLINGS, math.log2(self.n_key_shards))
        embedding = BYTES_OF_SHARDS[0] + BYTES_OF_SHARDS[1] * doublings if self.index else 0.0
        chunks, documents = self.n_chunks * BYTES_PER_CHUNK, self.n_documents * BYTES_PER_DOCUMENT
        base, searched = self.rates.base_memory, learnt + (0 if self.on_disk else codes)
        return {
            "building": base + embedding + chunks + documents + learnt + max(training, merging),
            "serving": base + searched,
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage."""
        r, n, lists = self.rates, self.n_chunks, n_lists_of(self.index)
        text = self.files["text"]
        corpus = text * r.corpus_seconds + min(text, LEARNT_FROM) * r.learn_seconds
        lexical = n * r.lexical_seconds * self._share(self.n_key_shards)
        if not self.index:
            return {"start": START_SECONDS, "corpus": corpus, "bm25": lexical}
        d, keys, shards = r.d_emb, self.files["keys"] / r.file_bytes, self.files["shards"] / r.file_bytes
        depth = math.log2(lists) if "HNSW" in self.index else 0.0
        coded = "PQ" in self.index.rpartition(",")[2]
        a_key = (depth * r.walk_seconds if depth else lists * d / r.assign_products) + coded * r.encode_seconds
        brute_force = N_RECALL_QUERIES * n * d / r.recall_products
        return {
            "start": r.start_seconds,
            "corpus": corpus,
            "bm25": lexical,
            "embed": (n * r.embed_seconds + keys) * self._share(self.n_key_shards),
            "train": self._learning(coded) + lists * depth * r.link_seconds + self.learnt_bytes / r.file_bytes,
            "add": (n * a_key + keys + shards) * self._share(self.n_index_shards),
            "merge": shards + self.files["index"] / r.file_bytes,
            "recall": brute_force * (1 if lists else 2) + keys,  # an exact index does the same again
        }

    def _learning(self, coded: bool) -> float:
        """Seconds to learn centroids, codes and a rotation."""
        r, n_lists, d = self.rates, n_lists_of(self.index), self.rates.d_emb
        n_codes = min(self.n_train, N_CODE_TRAIN) * coded
        n_rotation = min(self.n_train, ROTATION_KEYS) * ("OPQ" in self.index)
        centroids = self.n_train * n_lists * d * KMEANS_ITERATIONS / r.kmeans_products
        codes = (n_codes * KMEANS_ITERATIONS + n_rotation * OPQ_ITERATIONS) * 256 * d / r.code_products
        return centroids + codes + n_rotation * OPQ_ROUNDS * r.encode_seconds

    def _share(self, n_shards: int) -> float:
        """Of work in so many shards, what the busiest process has."""
        return math.ceil(n_shards / self.n_processes) / n_shards if n_shards else 1.0


def describe(plan: Plan) -> str:
    """A plan as a table."""
    p, disk, memory = plan, plan.disk, plan.memory
    lines = [
        f"text: {p.n_tokens:.3g} tokens, {_bytes(p.files['text'])}; "
        f"{p.n_chunks:,} chunks of {p.rates.chunk_len} tokens",
        f"index: {p.index or 'tokens in common'}"
        + (f", learnt from {p.n_train:,} keys" if p.n_train else "")
        + (", its lists in a file" if p.on_disk else ""),
    ]
    lines += [f"note: {p.note}"] * bool(p.note)
    lines += ["", f"{'disk':<10}{_bytes(disk['building']):>10} while building, {_bytes(disk['after'])} after"]
    lines += [f"  {name:<8}{_bytes(size):>10}" for name, size in p.files.items() if name != "text" and size]
    building, serving = memory["building"], memory["serving"]
    lines += ["", f"{'memory':<10}{_bytes(building):>10} while building, {_bytes(serving)} serving"]
    if building > (have := memory_of_machine()):
        lines.append(f"  {'':<8}{'':>10} more than the {_bytes(have)} of this machine")
    processes = "1 process" if p.n_processes == 1 else f"{p.n_processes} processes, each with what this one has"
    lines += ["", f"{'time':<10}{_duration(sum(p.seconds.values())):>10} in {processes}"]
    split = " (split)" if p.n_processes > 1 else ""
    for name, seconds in p.seconds.items():
        if seconds:
            lines.append(f"  {name:<8}{_duration(seconds):>10}{split if name in ('embed', 'add', 'bm25') else ''}")
    return "\n".join(lines)


def _bytes(n: float) -> str:
    power = min(5, int(math.log(max(n, 1), 1000)))
    return f"{n / 1000**power:.3g} {['B', 'kB', 'MB', 'GB', 'TB', 'PB'][power]}"


def _duration(seconds: float) -> str:
    for unit, length in (("years", 31_557_600), ("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.2g} s"
