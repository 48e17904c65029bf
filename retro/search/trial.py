"""An index is tried before anything is embedded: all that a database does with one, on a few keys.

FAISS builds many an index that cannot be filled under ids of our choice, cannot pass over some of its keys, or crashes.
So each string is tried in a process of its own, which may well end badly.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import faiss
import numpy as np

from retro.errors import InvalidOption
from retro.search.factory import (
    ivf_of,
    new_index,
    parameters_for,
    prepare_training,
    set_n_probe,
    taking_our_ids,
)
from retro.search.index_file import MAPPED, failure_of, merge_lists, write_lists

MOST_BYTES, MOST_SECONDS = 4 << 30, 60  # of a trial; one of OPQ64_256,IVF65536_HNSW32,PQ64 takes 0.5 GB and a second
LEAST_KEYS = 400  # of a trial: more than the 256 centroids of a code
N_LISTS, N_BITS = 4, 8  # at most, in place of more lists and longer codes, which need more keys
N_QUERIES, N_NEIGHBORS = 100, 44  # as many neighbors as an index of codes is asked for
LEAST_FOUND = 0.2  # share of keys that find themselves; by chance 0.11 do, or half as many


@functools.cache
def require_working_index(factory: str, d_emb: int) -> None:
    """Try an index, which takes about a second; raises `InvalidOption` if a database cannot be made with it."""
    if factory == "Flat":
        return
    code = "import sys; from retro.search.trial import try_index; try_index(sys.argv[1], int(sys.argv[2]))"
    if failure := failure_of(code, factory, d_emb, most_bytes=MOST_BYTES, seconds=MOST_SECONDS):
        raise InvalidOption("index", factory, f"cannot be the index of a database: {failure}")


def try_index(factory: str, d_emb: int) -> None:
    """Do with a small index like this one all that a database does. Raises what FAISS raises, or crashes as it does."""
    try:
        new_index(d_emb, factory)  # is there memory for its lists?
    except InvalidOption as error:
        raise RuntimeError(error.reason) from None
    index = new_index(d_emb, small(factory))
    keys = np.random.default_rng(0).standard_normal((max(LEAST_KEYS, 2 * d_emb, _prepare(index)), d_emb), np.float32)
    ids, half = np.arange(len(keys)) * 16, len(keys) // 2
    if not index.is_trained:
        index.train(keys)
    index = taking_our_ids(index)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "index")
        if ivf_of(index) is None:
            index.add_with_ids(keys[:half], ids[:half])
            index.add_with_ids(keys[half:], ids[half:])
        else:  # in shards
            faiss.write_index(index, file)
            for some in (slice(half), slice(half, None)):
                shard = faiss.read_index(file)
                shard.add_with_ids(keys[some], ids[some])
                write_lists(shard, Path(folder) / "lists")
                merge_lists(index, Path(folder) / "lists")
        found = _search(index, keys, ids)
        faiss.write_index(index, file)
        again = _search(faiss.read_index(file, MAPPED), keys, ids)
    if not np.array_equal(found, again):
        raise RuntimeError("once written and read, it finds something else")


def small(factory: str) -> str:
    """A factory string with few lists and short codes: an index of it learns from few keys."""
    factory = re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), N_LISTS)}", factory)
    return re.sub(r"(PQ\d+x|IMI2x)(\d+)", lambda found: f"{found[1]}{min(int(found[2]), N_BITS)}", factory)


def _prepare(index: faiss.Index) -> int:
    """As `prepare_training`, and a rotation is learnt in one round."""
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            rotation = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(rotation, faiss.OPQMatrix):
                rotation.niter = rotation.niter_pq = rotation.niter_pq_0 = 1
    return prepare_training(index)


def _search(index: faiss.Index, keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What is nearest to some keys, once with half of all barred. Raises if they do not find themselves."""
    set_n_probe(index, N_LISTS)
    some, barred = np.arange(0, len(keys), len(keys) // N_QUERIES), len(keys) // 2
    selector = faiss.IDSelectorNot(faiss.IDSelectorRange(0, int(ids[barred])))
    _, found = index.search(keys[some], N_NEIGHBORS)
    _, outside = index.search(keys[some], N_NEIGHBORS, params=parameters_for(index, selector))
    if not np.isin(found, [-1, *ids]).all() or np.isin(outside, ids[:barred]).any():
        raise RuntimeError("it finds what it should not")
    finds_itself = [(rows == ids[some, None]).any(axis=1) for rows in (found, outside)]
    if min(finds_itself[0].mean(), finds_itself[1][some >= barred].mean()) < LEAST_FOUND:
        raise RuntimeError("keys do not find themselves")
    return np.stack([found, outside])
