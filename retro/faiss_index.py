r"""The FAISS index: chosen, trained, filled in parts, searched, and read without trust.

An index learns from a sample of the keys (centroids of lists, codes), is filled, and is then searched. Indexes
with inverted lists are filled in parts, which several processes can make; the parts are merged, in memory or,
where the index would take more than `ON_DISK_ABOVE` of it, in a file that is searched where it lies.

Recall tells how good the bargain is, and how many lists to search for it:

$$\text{recall@}k = \frac{\lvert \text{found}_k \cap \text{true}_k \rvert}{k}$$
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search
from faiss.contrib.ondisk import merge_ondisk
from labml import monit
from tqdm import tqdm

from retro import distributed
from retro.artifacts import require_match, sha256_of_file, written_errors, written_whole
from retro.keys import Keys
from retro.shards import Shards

INDEX_FILE, LISTS_FILE = "retro.index", "retro.ivfdata"
FILES = {LISTS_FILE: "lists_sha256", INDEX_FILE: "index_sha256"}  # and their hashes in the manifest
NEW = ".new"  # how the names of files end that wait for their manifest
N_RECALL_QUERIES = 256
MANY_QUERIES_PER_LIST = 64  # from here on, decoding a list's keys pays
KMEANS_ITERATIONS = 10  # FAISS does 25; recall at 10 was no lower after 10, in half the time
ROTATION_KEYS = 1 << 14  # that OPQ learns its rotation from; FAISS takes four times as many, in four times the time
GRAPH_BREADTH = 64  # of the walk from list to list; FAISS' 16 puts 5% of the keys into a list that is not the nearest
EXACT_UP_TO = 50_000  # chunks; brute force over these takes no longer than embedding the queries
CANDIDATES, LEAST_WANTED = 4, 11  # times as many as are wanted, of at least so many; twice as many find 3% more
PAIRS_AT_ONCE = 1 << 18  # of a query and a candidate
KEYS_PER_LIST = 32  # to learn a list's centroid from
KEYS_PER_PART = 1 << 20  # of an index that is filled in parts
ON_DISK_ABOVE = 0.25  # of the machine's memory
# An index is mapped from its file; lists on disk are opened beside it, and nowhere else.
MAPPED = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_ONDISK_SAME_DIR
LISTS_BESIDE = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR


def choose_index(n_chunks: int, d_emb: int) -> str:
    """A FAISS factory string for a number of chunks: exact while that is cheap, then compressed."""
    if n_chunks <= EXACT_UP_TO:
        return "Flat"
    # About 4 sqrt(n) lists, as FAISS' guidelines have it, as a power of two.
    n_lists = 1 << min(20, round(math.log2(4 * math.sqrt(n_chunks))))
    code_size = max(m for m in range(1, 65) if d_emb % m == 0)
    if n_chunks <= 5_000_000:
        return f"IVF{n_lists},PQ{code_size}"
    return f"OPQ{code_size},IVF{n_lists}_HNSW32,PQ{code_size}"


def n_lists_of(factory: str) -> int:
    """Lists of the index that a factory string describes; 0 if it has none."""
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def settle(factory: str, d_emb: int, n_train: int) -> tuple[str, str]:
    """The factory string to use, and a note: with fewer keys than centroids to learn, exact search takes its place."""
    if (needed := centroids_of(new_index(d_emb, factory))) <= n_train:
        return factory, ""
    note = f"{factory} has {needed} centroids to learn, but there are {n_train} keys: the index is exact instead"
    return "Flat", note


def build_index(factory: str, keys: Keys, n_train: int, seed: int, folder: Path) -> faiss.Index | None:
    """An index of all living keys, each under the offset of its chunk; in the first process, None in others.

    * `n_train` keys, drawn with `seed`, are what it learns from
    * `folder` takes what is finished while there is more to do
    """
    if ivf_of(new_index(keys.d_emb, factory)) is None:  # cannot be merged of parts
        return distributed.first(lambda: _add(_trained(factory, keys, n_train, seed), keys, range(len(keys.pieces))))
    of_part = np.cumsum([len(piece) for piece in keys.pieces]) // KEYS_PER_PART
    groups = [range(*np.searchsorted(of_part, [part, part + 1])) for part in range(of_part[-1] + 1)]
    made_with = {
        "keys": keys.shards.made_with,
        "labels": keys.shards.labels,
        "removed": sorted(keys.corpus.removed),
        "index": factory,
        "n_train": n_train,
        "seed": seed,
    }
    parts = Shards(folder, made_with, ["trained", *(f"{g.start}-{g.stop}" for g in groups)], ".index")

    def prepare() -> None:
        parts.open()
        if 0 in parts.missing(mine=False):
            with parts.written(0) as temporary:
                write_faiss(_trained(factory, keys, n_train, seed), temporary)

    distributed.first(prepare)
    for number in parts.missing():
        index = faiss.read_index(str(parts.path(0)))
        with parts.written(number) as temporary:
            write_faiss(_add(index, keys, groups[number - 1]), temporary)
    distributed.wait()
    return distributed.first(lambda: _merged(parts))


def _trained(factory: str, keys: Keys, n_train: int, seed: int) -> faiss.Index:
    """An empty index that takes ids of our choice and has learnt what it has to learn."""
    living = np.flatnonzero(keys.living)
    index = new_index(keys.d_emb, factory)
    centroids_of(index)
    if not index.is_trained:
        drawn = np.random.default_rng(seed).choice(len(living), size=n_train, replace=False)
        with monit.section(f"Train {factory}"):
            index.train(keys.rows(living[np.sort(drawn)]))
    set_n_probe(index, 1)
    if ivf_of(index) is None and not isinstance(index, faiss.IndexIDMap2):
        index = faiss.IndexIDMap2(index)
    return index


def _add(index: faiss.Index, keys: Keys, shards: range) -> faiss.Index:
    """Add the living keys of some shards."""
    for number in tqdm(shards, desc="Add keys"):
        numbers = slice(keys.firsts[number], keys.firsts[number + 1])
        living = keys.living[numbers]
        index.add_with_ids(np.ascontiguousarray(keys.block(number)[living]), keys.offsets[numbers][living])
    return index


def _merged(parts: Shards) -> faiss.Index:
    """The parts as one index, in memory, or with its lists in a file beside the parts."""
    files = [str(parts.path(number)) for number in range(1, len(parts))]
    index = faiss.read_index(str(parts.path(0)))
    if sum(os.path.getsize(file) for file in files) > ON_DISK_ABOVE * memory_of_machine():
        lists = parts.folder / LISTS_FILE
        lists.unlink(missing_ok=True)
        with written_errors(lists), contextlib.redirect_stdout(io.StringIO()):
            merge_ondisk(index, files, str(lists))
        return index
    for file in tqdm(files, desc="Merge"):
        faiss.merge_into(index, faiss.read_index(file), False)
    return index


def add_rows(index: faiss.Index, rows: np.ndarray, ids: np.ndarray) -> None:
    """Add keys to an index that is full already. Lists on disk are copied, with what comes to each, into a new file.

    (FAISS' own way to add to lists on disk that were read from a file gives wrong ids: 1.15.1.)
    """
    ivf = ivf_of(index)
    old = faiss.downcast_InvertedLists(ivf.invlists) if ivf is not None else None
    if ivf is None or not isinstance(old, faiss.OnDiskInvertedLists):
        index.add_with_ids(rows, ids)
        return
    ivf.own_invlists = False
    new = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(new, False)
    index.add_with_ids(rows, ids)
    grown = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, f"{old.filename}.grown")
    both = faiss.InvertedListsPtrVector()
    both.push_back(old)
    both.push_back(new)
    grown.merge_from_multiple(both.data(), both.size(), False)
    ivf.replace_invlists(grown, True)
    grown.this.disown()


def memory_of_machine() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write_faiss(index: faiss.Index, path: Path) -> None:
    """`faiss.write_index`, which reports a full disk as `RuntimeError`: here it is `OSError`."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).rpartition("write error")[2] or str(error)) from error


def write_index(index: faiss.Index, data_path: Path) -> dict[str, str]:
    """Write an index, and its lists if they are on disk, beside those of a data folder; returns their hashes.

    When the manifest with these hashes is written, `take_place` puts them in the place of the old ones.
    """
    ivf = ivf_of(index)
    lists = faiss.downcast_InvertedLists(ivf.invlists) if ivf is not None else None
    hashes, source = {"index_sha256": "", "lists_sha256": ""}, None
    if isinstance(lists, faiss.OnDiskInvertedLists):
        source = Path(lists.filename)
        hashes["lists_sha256"] = sha256_of_file(source)
        lists.filename = LISTS_FILE  # found beside the index, wherever that is moved
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, data_path / f"{LISTS_FILE}{NEW}")
    with written_whole(data_path / f"{INDEX_FILE}{NEW}") as temporary:
        write_faiss(index, temporary)
        hashes["index_sha256"] = sha256_of_file(temporary)
    _TRUSTED.add(hashes["index_sha256"])
    return hashes


def take_place(data_path: Path, manifest: Mapping[str, Any]) -> None:
    """Put new files, if they are those that the manifest speaks of, in the place of the old ones.

    The manifest is what counts: killed before it is written, there is the old index, and after it the new one, which
    whoever comes next puts in its place.
    """
    for name, key in FILES.items():
        new = data_path / f"{name}{NEW}"
        with contextlib.suppress(FileNotFoundError):  # another process did it
            if new.exists() and sha256_of_file(new) == manifest[key]:
                os.replace(new, data_path / name)


_TRUSTED: set[str] = set()  # hashes of index files that this process wrote, or that a trial has read

# What a trial does with an index: read it and search it, in a process of its own that may well crash.
_TRIAL = """
import resource, sys
import faiss, numpy as np
path, flags, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
except (ValueError, OSError):
    pass  # not every system has the limit
index = faiss.read_index(path, flags)
index.search(np.zeros((1, index.d), dtype=np.float32), 4)
"""


def read_index(data_path: Path, manifest: Mapping[str, Any], repair: str, writable: bool = False) -> faiss.Index:
    """The index of a data folder, mapped from its file; in memory if it is to be `writable`.

    FAISS trusts what it reads, and a crafted file crashes it. So the hash is compared first, and an index
    that is new to this process is first read by another. Raises `ValueError` for a file that is damaged or
    cannot be read, or holds other keys than its manifest says.
    """
    path = data_path / INDEX_FILE
    verify_index(data_path, manifest, repair)
    sha256, flags = str(manifest["index_sha256"]), LISTS_BESIDE if manifest["lists_sha256"] else MAPPED
    if sha256 not in _TRUSTED:
        most = 3 * sum(f.stat().st_size for f in (path, data_path / LISTS_FILE) if f.exists()) + (8 << 30)
        trial = [sys.executable, "-P", "-c", _TRIAL, str(path), str(flags), str(most)]
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        if (result := subprocess.run(trial, capture_output=True, env=environment)).returncode:
            said = result.stderr.decode(errors="replace").strip().splitlines() or [f"status {result.returncode}"]
            raise ValueError(f"{path} cannot be read: FAISS failed on it ({said[-1][:160]}). Rebuild it: {repair}")
        _TRUSTED.add(sha256)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR if writable else flags)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read ({str(error)[-160:]}). Rebuild it: {repair}") from None
    wanted = {name: manifest[name] for name in ("d_emb", "n_chunks")}
    require_match(path, {"d_emb": index.d, "n_chunks": index.ntotal}, wanted, repair)
    return index


def verify_index(data_path: Path, manifest: Mapping[str, Any], repair: str) -> None:
    """Raise `ValueError` if a file of the index is missing, or has not the bytes that its manifest speaks of."""
    take_place(data_path, manifest)
    for name, key in FILES.items():
        path = data_path / name
        if manifest[key] or name == INDEX_FILE:
            found = sha256_of_file(path) if path.exists() else "no file"
            require_match(path, {"sha256": found}, {"sha256": manifest[key]}, repair)


def new_index(d_emb: int, factory: str) -> faiss.Index:
    """An empty index. Raises `ValueError` if FAISS knows no such string."""
    try:
        return faiss.index_factory(d_emb, factory)
    except RuntimeError as error:
        raise ValueError(
            f"--index {factory!r} is no FAISS index for keys of {d_emb} features: "
            f"{str(error).splitlines()[0].rpartition('Error: ')[2]}"
        ) from None


def ivf_of(index: faiss.Index) -> faiss.IndexIVF | None:
    """The inverted lists inside an index, if it has any."""
    try:
        return faiss.downcast_index(faiss.extract_index_ivf(index))
    except RuntimeError:
        return None


def centroids_of(index: faiss.Index) -> int:
    """The most centroids that a part of the index learns from its training keys; sets how it learns them."""
    needed = [0]
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            rotation = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(rotation, faiss.OPQMatrix):
                rotation.max_train_points = ROTATION_KEYS
    if (ivf := ivf_of(index)) is not None:
        needed.append(ivf.nlist)
        _set_clustering(ivf.cp)
        if isinstance(ivf, faiss.IndexIVFPQ):
            # Reorders the codes for a filter that is not used here, at ten times the cost of the rest.
            ivf.do_polysemous_training = False
    # `index` stays, because it owns what `ivf` points to.
    if (pq := getattr(index if ivf is None else ivf, "pq", None)) is not None:
        needed.append(pq.ksub)
        _set_clustering(pq.cp)
    return max(needed)


def _set_clustering(parameters: faiss.ClusteringParameters) -> None:
    parameters.niter = KMEANS_ITERATIONS
    # FAISS asks for 39 keys a centroid and warns below that; it is silenced, recall tells.
    parameters.min_points_per_centroid = 1


def set_n_probe(index: faiss.Index, n_probe: int) -> None:
    """Search `n_probe` lists, where the index has lists; a graph over them is walked broadly enough to find these."""
    if (ivf := ivf_of(index)) is not None:
        ivf.nprobe = min(n_probe, ivf.nlist)
        if isinstance(graph := faiss.downcast_index(ivf.quantizer), faiss.IndexHNSW):
            graph.hnsw.efSearch = max(GRAPH_BREADTH, 2 * ivf.nprobe)


@dataclass(frozen=True)
class Truth:
    """Queries drawn from the keys, and how far their nearest keys are by brute force."""

    numbers: np.ndarray  # (q) of the keys that are the queries
    queries: np.ndarray  # (q, d_emb)
    distances: np.ndarray  # (q, 10) to the nearest others, ascending; inf where there are fewer

    @staticmethod
    def of(keys: Keys, seed: int) -> Truth:
        """Keys drawn with `seed`, compared with all keys; each one's own chunk does not count."""
        living = np.flatnonzero(keys.living)
        rng = np.random.default_rng([seed, 1])
        numbers = living[np.sort(rng.choice(len(living), size=min(N_RECALL_QUERIES, len(living)), replace=False))]
        queries = keys.rows(numbers)
        exact = faiss.ResultHeap(len(queries), 11)  # one more than 10: the query itself
        for start, block in keys.blocks():
            in_block = np.flatnonzero(keys.living[start : start + len(block)])
            if len(in_block):
                distances, ids = faiss.knn(queries, block[in_block], min(11, len(in_block)))
                exact.add_result(distances, in_block[ids] + start)
        exact.finalize()
        others = np.where((numbers[:, None] == exact.I) | (exact.I < 0), np.inf, exact.D)
        return Truth(numbers, queries, np.sort(others, axis=1)[:, :10])

    def recall(self, index: faiss.Index, keys: Keys) -> dict[str, float]:
        """Share of the true nearest neighbors that the index finds, at 1, 2 and 10.

        Chunks of equal text have equal distances, so a neighbor is true if it is no farther than the k-th
        true one, whichever of the equals it is.
        """
        distances, found = nearest(index, keys, self.queries, 11)
        others = (found >= 0) & (found != keys.offsets[self.numbers, None])
        recall: dict[str, list[float]] = {}
        for near, true in zip(map(np.extract, others, distances), self.distances, strict=True):
            n_true = int(np.isfinite(true).sum())
            for k in {min(k, n_true) for k in (1, 2, 10)} - {0}:
                # The two distances are computed in different ways: allow for float32 rounding.
                hits = near[:k] <= true[k - 1] * (1 + 1e-4) + 1e-4  # of the first k that come back
                recall.setdefault(f"@{k}", []).append(float(hits.sum()) / k)
        return {k: round(float(np.mean(v)), 4) for k, v in sorted(recall.items(), key=lambda item: int(item[0][1:]))}


def choose_n_probe(index: faiss.Index, keys: Keys, truth: Truth, target: float) -> tuple[int, str]:
    """The least number of lists, a power of two, with which recall at 10 reaches `target`.

    Codes have a ceiling that no number of lists lifts: where `target` is above it, 99% of the ceiling is taken
    for it, and the note that is returned says so.
    """
    if (ivf := ivf_of(index)) is None:
        return 1, ""
    recall_at: dict[int, float] = {}
    n_probe = 1
    while True:
        set_n_probe(index, n_probe)
        recall_at[n_probe] = max(truth.recall(index, keys).items(), key=lambda item: int(item[0][1:]))[1]
        if recall_at[n_probe] >= target:
            return n_probe, ""
        # The ceiling: four times as many lists have brought next to nothing.
        if n_probe == ivf.nlist or recall_at[n_probe] - recall_at.get(n_probe // 4, 0.0) < 0.002:
            break
        n_probe = min(2 * n_probe, ivf.nlist)
    ceiling = recall_at[n_probe]
    chosen = min(n for n, recall in recall_at.items() if recall >= 0.99 * ceiling)
    return chosen, f"no number of lists gives recall {target:.0%} @10 with these codes, which end at {ceiling:.1%}"


def holds_keys(index: faiss.Index) -> bool:
    """Whether an index keeps whole keys, and not codes of them that only tell about how far they are."""
    outer = faiss.downcast_index(index)  # `index` stays, because it owns what this one points to
    inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexIDMap2) else outer
    return isinstance(inner, (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat))


def nearest(
    index: faiss.Index, keys: Keys, queries: np.ndarray, k: int, parameters: faiss.SearchParameters | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest chunks that an index finds: squared L2 distances and offsets, of shape `[q, k]`, nearest first.

    Codes tell distances roughly. So an index of codes is asked for `CANDIDATES` times as many, and their whole
    keys decide; the best of few are the same as the first of more. -1 is the offset where there are fewer.
    """

    def search(n: int) -> tuple[np.ndarray, np.ndarray]:
        return search_many(index, queries, n) if parameters is None else index.search(queries, n, params=parameters)

    if holds_keys(index):
        return search(k)
    _, found = search(CANDIDATES * max(k, LEAST_WANTED))
    distances = np.full(found.shape, np.finfo(np.float32).max, dtype=np.float32)
    part = max(1, PAIRS_AT_ONCE // found.shape[1])
    for start in range(0, len(queries), part):
        rows, columns = np.nonzero(found[start : start + part] >= 0)
        rows += start
        distances[rows, columns] = keys.distances(queries, rows, keys.numbers_of(found[rows, columns]))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(found, order, axis=1)


def search_many(index: faiss.Index, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `index.search`; for many queries, list by list of an inverted file.

    All queries that search a list are then compared with its decoded keys in one matrix product, in place of
    a table look-up for each key and query: the same distances but for rounding, several times as fast.
    """
    lists = faiss.downcast_index(index)
    known = lists.__class__ in (faiss.IndexIVFPQ, faiss.IndexIVFFlat)
    if not known or len(queries) * lists.nprobe < MANY_QUERIES_PER_LIST * lists.nlist:
        return index.search(queries, k)
    # In parts, because the distances of a list's queries and keys are in memory at once.
    parts = [queries[i : i + 8192] for i in range(0, len(queries), 8192)]
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on every list
        results = [big_batch_search(lists, part, k, method="pairwise_distances") for part in parts]
    return np.concatenate([d for d, _ in results]), np.concatenate([i for _, i in results])
