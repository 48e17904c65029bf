r"""Near-duplicates: which documents are copies of each other, or nearly.

Two documents are near if the sets of their 13-grams $A$, $B$ have a Jaccard similarity of at least 0.8 (section 2.1 of
arXiv:2112.04426):

$$J(A, B) = \frac{\lvert A \cap B \rvert}{\lvert A \cup B \rvert} \ge 0.8$$

A gram is 13 words in a row, in lower case, whatever stands between them; a document of fewer words is one gram. $J$ is
estimated by MinHash: for each of 128 random orders of all grams a document keeps the number of its first one, and two
documents agree in a share of about $J$ of these (give or take 0.035). The 128 numbers are its *signature*. Documents
that agree in all 6 numbers of any of 20 bands are compared (at $J = 0.8$ that is 99.8% of the pairs), so the work grows
with the number of documents, not of pairs (but for thousands of versions of one text). Documents that are near, and
those near to these, are a *group*.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from datasketch import MinHash
from loky import cpu_count, get_reusable_executor
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

T = TypeVar("T")
U = TypeVar("U")
NEAR = 0.8  # Jaccard similarity from which on two documents are near
GRAM = 13  # words
N_ORDERS = 128  # numbers of a signature
BANDS = (20, 6)  # bands, numbers of each
SCHEME = "affine32"  # of datasketch's orders: what signatures on disk are made with
GRAMS_AT_ONCE, PAIRS_AT_ONCE = 1 << 12, 1 << 16  # what stays in the processor's cache, and what bounds memory
# Scripts without blanks: Thai and Lao, Burmese, Khmer, Japanese and Chinese. Each letter is taken for a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_PART_OF_A_WORD = re.compile(rf"[^\W{_UNSPACED}]")
WORD = re.compile(rf"[{_UNSPACED}]|{_PART_OF_A_WORD.pattern}+")
# The bytes of UTF-8, those of ASCII that are in no word as blanks.
_WORDS = bytes(byte if byte >= 128 or chr(byte).isalnum() or chr(byte) == "_" else ord(" ") for byte in range(256))
_FEW = 100  # different letters beyond ASCII, up to which it pays to look at each of them
# An order is that of a h + b modulo 2**32, by a mixed hash h.
_FACTORS, _SUMMANDS = (numbers[:, None] for numbers in MinHash(N_ORDERS, scheme=SCHEME).permutations)


def signature(text: str) -> np.ndarray:
    """The signature of a text: uint32, of shape `[128]`, as datasketch computes it."""
    grams = _mixed(grams_of(text))
    parts = (grams[start : start + GRAMS_AT_ONCE] for start in range(0, len(grams), GRAMS_AT_ONCE))
    return np.min([(part * _FACTORS + _SUMMANDS).min(axis=1) for part in parts], axis=0)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Hashes of 32 bits, mixed by the end of MurmurHash3, in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashes ^= hashes >> shift
        hashes *= np.uint32(factor)
    return hashes


def grams_of(text: str) -> np.ndarray:
    """Hashes of the grams of a text, in their order: uint32."""
    words = _words_of(text)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    n = max(1, len(words) - GRAM + 1)
    grams = np.zeros(n, dtype=np.uint64)
    for k in range(min(GRAM, len(words))):  # a polynomial of the words' hashes, modulo 2**64
        grams += hashes[k : k + n]
        grams *= np.uint64(0x9E3779B97F4A7C15)
    return (grams >> np.uint64(32)).astype(np.uint32)


def _words_of(text: str) -> list[bytes]:
    """What `WORD` finds in a text, in lower case, as UTF-8; the text itself where it finds nothing."""
    lower = text.lower()
    others = [] if lower.isascii() else [letter for letter in set(lower) if not letter.isascii()]
    if len(others) <= _FEW:  # as below, in a fifth of the time
        for letter in others:
            if not _PART_OF_A_WORD.match(letter):
                lower = lower.replace(letter, f" {letter} " if WORD.match(letter) else " ")
        words = lower.encode("utf-8", "surrogatepass").translate(_WORDS).split()
    else:
        words = [word.encode("utf-8", "surrogatepass") for word in WORD.findall(lower)]
    return words or [text.strip().encode("utf-8", "surrogatepass")]


def signatures_of(texts: Iterable[str]) -> np.ndarray:
    """The signatures of texts, of shape `[n, 128]`."""
    return np.array([signature(text) for text in texts], dtype=np.uint32).reshape(-1, N_ORDERS)


def by_processes(
    work: Callable[[list[U]], T], batches: Iterable[list[U]], n_processes: int | None = None
) -> Iterator[T]:
    """What `work` gives for each batch, in their order; where there are several, several processes do it.

    * `n_processes` is how many; left out, as many as there are cores
    """
    batches, n = iter(batches), n_processes or cpu_count()
    first = [*islice(batches, 2)]
    if n == 1 or len(first) < 2:
        yield from map(work, chain(first, batches))
        return
    executor, waiting = get_reusable_executor(n), deque[Future[T]]()
    for batch in chain(first, batches):
        waiting.append(executor.submit(work, batch))
        if len(waiting) > 2 * n:  # no more is held in memory
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def are_near(signatures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether documents are near, each to the other one, by signatures of shape `[..., 128]`; of shape `[...]`."""
    return (signatures == others).mean(axis=-1) >= NEAR


def near(signatures: np.ndarray, known: np.ndarray) -> list[list[int]]:
    """For each of some documents, the numbers of the `known` ones near to it, ascending; of equal ones the first.

    * `signatures`, `known` are of shape `[n, 128]`
    """
    first = np.sort(np.unique(known, axis=0, return_index=True)[1])
    found = [set[int]() for _ in signatures]
    for rows, numbers in _in_a_common_band(signatures, known[first]):
        is_near = are_near(signatures[rows], known[first[numbers]])
        for row, number in zip(rows[is_near].tolist(), first[numbers[is_near]].tolist(), strict=True):
            found[row].add(number)
    return [sorted(numbers) for numbers in found]


def groups_of(signatures: np.ndarray, groups: Sequence[int] | np.ndarray = ()) -> np.ndarray:
    """The group of each document, as the number of the first document in it, of shape `[n]`.

    * `groups` are those of the first documents, if they are known; one that comes later can make one group of two
    """
    every = np.arange(len(signatures))
    _, first, number_of = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
    joined = _joined(every, np.arange(len(groups)), np.array(groups, dtype=np.int64))
    joined = _joined(joined, every, first[number_of])
    distinct = np.sort(first)
    new = distinct[distinct >= len(groups)]
    for rows, numbers in _in_a_common_band(signatures[new], signatures[distinct]):
        a, b = new[rows], distinct[numbers]
        apart = joined[a] != joined[b]
        a, b = a[apart], b[apart]
        is_near = are_near(signatures[a], signatures[b])
        if is_near.any():
            joined = _joined(joined, a[is_near], b[is_near])
    return first_of_equals(joined)


def _in_a_common_band(signatures: np.ndarray, known: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of documents and of `known` ones that agree in all numbers of a band, in pairs; a part at a time.

    A pair comes once for each of its bands. A few may come that do not agree.
    """
    n_bands, width = BANDS
    factors = np.random.default_rng(0).integers(1, 1 << 62, size=width, dtype=np.uint64) | np.uint64(1)
    for band in range(n_bands):
        columns = slice(band * width, (band + 1) * width)
        ours, theirs = ((part[:, columns] * factors).sum(axis=1) for part in (signatures, known))  # modulo 2**64
        order = np.argsort(theirs, kind="stable")
        first, end = (np.searchsorted(theirs[order], ours, side) for side in ("left", "right"))
        ends = np.cumsum(end - first)  # of the pairs of each document, among all pairs
        for start in range(0, int(ends[-1]) if len(ends) else 0, PAIRS_AT_ONCE):
            pairs = np.arange(start, min(start + PAIRS_AT_ONCE, ends[-1]))
            rows = np.searchsorted(ends, pairs, side="right")
            yield rows, order[end[rows] - ends[rows] + pairs]


def _joined(groups: np.ndarray, some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Numbers of the groups, once those of the documents `some` are one with those of the `others`."""
    graph = coo_array((np.ones(len(some)), (groups[some], groups[others])), shape=(len(groups), len(groups)))
    return connected_components(graph, directed=False)[1][groups]


def first_of_equals(groups: Sequence[int] | np.ndarray) -> np.ndarray:
    """For each group, where the same one comes first, of shape `[n]`."""
    _, first, number_of = np.unique(groups, return_index=True, return_inverse=True)
    return first[number_of]
