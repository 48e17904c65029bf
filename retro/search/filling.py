"""The FAISS index learns from a sample of the keys, and is filled with all of them.

Indexes with inverted lists are filled in shards, which several processes can make. The shards are merged, in memory or,
where the index would take more than `ON_DISK_ABOVE` of it, in a file that is searched where it lies.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import faiss
import numpy as np

from retro import parallel
from retro.errors import InvalidOption
from retro.progress import each, note
from retro.search.factory import ivf_of, new_index, prepare_training, reason_of, set_n_probe, taking_our_ids
from retro.search.index_file import LISTS_FILE, merge_lists, read_lists, write_faiss, write_lists
from retro.search.keys import Keys
from retro.storage.files import naming_what_cannot_be_written
from retro.storage.shards import Shards

KEYS_PER_SHARD = 1 << 20  # of the index
ON_DISK_ABOVE = 0.25  # of the machine's memory


def fill_index(factory: str, keys: Keys, n_train: int, seed: int, folder: Path) -> faiss.Index | None:
    """An index of all keys in the database, each under the offset of its chunk; on rank 0, None on others.

    * `n_train` keys, drawn with `seed`, are what it learns from
    * `folder` takes what is finished while there is more to do
    """
    if ivf_of(new_index(keys.d_emb, factory)) is None:  # cannot be merged of shards
        every = range(keys.n_shards)
        with _all_cores():
            return parallel.on_rank_zero(lambda: _add(_train(factory, keys, n_train, seed), keys, every))
    # A shard of the index takes several shards of keys; shard 0 is what was learnt.
    shard_of = keys.firsts[1:] // KEYS_PER_SHARD
    groups = [range(*np.searchsorted(shard_of, [shard, shard + 1])) for shard in range(shard_of[-1] + 1)]
    manifest = {
        "keys": keys.shards.manifest,
        "inputs": keys.shards.inputs,
        "removed": sorted(keys.corpus.removed),
        "index": factory,
        "n_train": n_train,
        "seed": seed,
        "parts": "lists",
    }
    shards = Shards(folder, manifest, ["trained", *(f"{g.start}-{g.stop}" for g in groups)], ".index")

    def prepare() -> None:
        shards.open()
        if 0 in shards.missing(all_processes=True):
            with shards.written(0) as temporary, _all_cores():
                write_faiss(_train(factory, keys, n_train, seed), temporary)

    parallel.on_rank_zero(prepare)
    for number in shards.missing():
        index = faiss.read_index(str(shards.path(0)))
        with shards.written(number) as temporary:
            write_lists(_add(index, keys, groups[number - 1]), temporary)
    parallel.wait_for_everyone()
    return parallel.on_rank_zero(lambda: _merge(shards))


def _train(factory: str, keys: Keys, n_train: int, seed: int) -> faiss.Index:
    """An empty index that takes ids of our choice and has learnt what it has to learn."""
    index = new_index(keys.d_emb, factory)
    prepare_training(index)
    if not index.is_trained:
        candidates = np.flatnonzero(keys.in_database)
        drawn = np.random.default_rng(seed).choice(len(candidates), size=n_train, replace=False)
        note(f"{factory} learns from {n_train:,} keys")
        if (ivf := ivf_of(index)) is not None and getattr(faiss, "get_num_gpus", int)():  # in a build with GPUs only
            # The nearest centroid of each key is found on the GPUs. Searches stay here, since they leave chunks out.
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
        try:
            index.train(keys.rows(candidates[np.sort(drawn)]))
        except RuntimeError as error:  # as codes of residuals that need more keys than there are
            reason = f"cannot learn from {n_train} keys of {keys.d_emb} features: {reason_of(str(error))}"
            raise InvalidOption("index", factory, reason) from None
    set_n_probe(index, 1)
    return taking_our_ids(index)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Inside, FAISS works with all cores of this process, while others wait: `torchrun` gives each a single thread."""
    before = faiss.omp_get_max_threads()
    if parallel.n_processes() > 1:
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _add(index: faiss.Index, keys: Keys, shards: range) -> faiss.Index:
    """Add the keys of some shards that are in the database."""
    for number in each(shards, "Add keys", "shard"):
        numbers = slice(keys.firsts[number], keys.firsts[number + 1])
        chosen = keys.in_database[numbers]
        index.add_with_ids(np.ascontiguousarray(keys.of_shard(number)[chosen]), keys.offsets[numbers][chosen])
    return index


def _merge(shards: Shards) -> faiss.Index:
    """The shards as one index, in memory, or with its lists in a file beside the shards."""
    files = [shards.path(number) for number in range(1, len(shards))]
    index = faiss.read_index(str(shards.path(0)))
    if sum(file.stat().st_size for file in files) > ON_DISK_ABOVE * memory_of_machine():
        lists = shards.folder / LISTS_FILE
        lists.unlink(missing_ok=True)
        with naming_what_cannot_be_written(lists):
            _put_on_disk(index, lists, [read_lists(file, faiss.IO_FLAG_MMAP) for file in files])
    else:
        for file in each(files, "Merge", "shard"):
            merge_lists(index, file)
    return index


def _put_on_disk(index: faiss.Index, file: str | Path, parts: Iterable[faiss.InvertedLists]) -> None:
    """Give an index, in the place of its lists, what is in several ones, in a file."""
    ivf: Any = ivf_of(index)
    pointers = faiss.InvertedListsPtrVector()
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(file))
    for part in parts:
        pointers.push_back(part)
    with contextlib.redirect_stdout(io.StringIO()):
        index.ntotal = ivf.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    ivf.replace_invlists(lists, True)
    lists.this.disown()


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
    _put_on_disk(index, f"{old.filename}.grown", [old, new])


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may have: the machine's, or what a container or a job is limited to.

    * `root` is where the system's files are

    Limits are those of the process' control groups (cgroups, version 1 or 2) and of all groups around these.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups, own = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        for inner in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # in a container, groups have other names; no limit is "max"
                limits.append(int((top / str(inner).lstrip("/") / name).read_text()))
    return min(limits)
