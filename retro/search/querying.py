"""Searching an index: many queries at once, whole keys deciding, and some documents left out.

FAISS' own `IndexRefineFlat` re-ranks too, but holds every key in memory; here the keys stay on disk, and only those of
candidates are read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from functools import reduce

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from retro.errors import InvalidOption
from retro.search.chunks import is_barred, ranges_of_each
from retro.search.factory import inside_of, parameters_for
from retro.search.keys import Keys

MANY_QUERIES_PER_LIST = 64  # from here on, decoding a list's keys pays
CANDIDATES, LEAST_WANTED = 4, 11  # times as many as are wanted, of at least so many; twice as many find 3% more
PAIRS_AT_ONCE = 1 << 18  # of a query and a candidate
N_SPARE = 8  # neighbors fetched beyond those wanted, in case some are excluded


def search_outside(
    index: faiss.Index, keys: Keys, queries: np.ndarray, k: int, excluded: np.ndarray | Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` nearest chunks of each query that begin outside of ranges of offsets, for `RetroIndex.search`.

    * `queries` are of shape `[q, d_emb]`
    * `excluded` are ranges `(first, end)` of shape `[q, r, 2]` or `[q, 2]`, or one for all queries, or None
    """
    first, row_of = _distinct(queries)
    if excluded is None:
        distances, found = search_and_rerank(index, keys, queries[first], k)
        return distances[row_of], found[row_of]
    # In one go for all ranges, a few neighbors more than wanted, without those in the range.
    distances, found = (x[row_of] for x in search_and_rerank(index, keys, queries[first], k + N_SPARE))
    ranges = ranges_of_each(excluded, len(queries))
    barred = (found < 0) | is_barred(found, ranges)
    order = np.argsort(barred, axis=1, kind="stable")[:, :k]
    missing = np.take_along_axis(barred, order, axis=1)
    # Where too many were in the range, but there are more: the search itself passes over it.
    again = np.flatnonzero(missing.any(axis=1) & (found[:, -1] >= 0))
    distances = np.where(missing, np.finfo(np.float32).max, np.take_along_axis(distances, order, axis=1))
    found = np.where(missing, -1, np.take_along_axis(found, order, axis=1))
    spans, span_of = np.unique(ranges[again], axis=0, return_inverse=True)
    for number, span in enumerate(spans):
        rows = again[span_of.ravel() == number]
        distances[rows], found[rows] = _search_with_selector(index, keys, queries[rows], k, span)
    return distances, found


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


def _search_with_selector(
    index: faiss.Index, keys: Keys, queries: np.ndarray, k: int, span: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `search_outside`, the same ranges `span` (r, 2) for all; slower for each query than a search without."""
    barred = [faiss.IDSelectorRange(first, end) for first, end in span.tolist()]
    selector = faiss.IDSelectorNot(reduce(faiss.IDSelectorOr, barred))
    parameters = parameters_for(index, selector)
    try:
        return search_and_rerank(index, keys, queries, k, parameters)
    except RuntimeError as error:
        reason = f"cannot leave documents out of a search ({str(error)[-80:]}); an index with lists can, as IVF256,PQ64"
        raise InvalidOption("index", type(inside_of(index)).__name__, reason) from None


def holds_keys(index: faiss.Index) -> bool:
    """Whether an index keeps whole keys, and not codes of them that only tell about how far they are."""
    return isinstance(inside_of(index), (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat))


def search_and_rerank(
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
