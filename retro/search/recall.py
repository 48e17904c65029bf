r"""How good the bargain of an index is, measured: recall, against brute force.

Queries are those of training: chunks that begin anywhere in a training document, with what their samples may not
retrieve barred. Of the $k$ nearest keys that are left to a query, its share among the first $k$ that come back is

$$\text{recall@}k = \frac{\lvert \text{found}_k \cap \text{true}_k \rvert}{\min(k, \lvert \text{true} \rvert)}$$

and the mean over queries is what the manifest has. (Keys as queries of their own index would do better: a key lies
where the index was fitted, and its nearest neighbors are often of its own document, which no sample retrieves.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np

from retro.search.factory import ivf_of, set_n_probe
from retro.search.keys import Keys
from retro.search.querying import search_outside
from retro.search.sentences import Embedder
from retro.text.corpus import Corpus

N_RECALL_QUERIES = 256
N_NEAREST = 10  # neighbors of a query that are looked for
KEYS_AT_ONCE = 1 << 14  # that all queries are compared with
DOUBLINGS = 4  # of the number of lists, before recall may be thought to have ended


def query_offsets(corpus: Corpus, chunk_len: int, seed: int) -> np.ndarray:
    """Where the chunks begin that are the queries, ascending, of shape `[q]`.

    Any token of a training document is as likely, if a chunk and the token after it follow; of a shorter document, its
    beginning is. Removed documents are among them: they stay in the dataset.
    """
    starts = corpus.starts[: corpus.n_train + 1]
    counts = np.maximum(1, np.diff(starts) - chunk_len)  # of such beginnings in each document
    ends = np.cumsum(counts)
    drawn = np.random.default_rng([seed, 1]).choice(ends[-1], size=min(N_RECALL_QUERIES, ends[-1]), replace=False)
    document = np.searchsorted(ends, drawn, side="right")
    return np.sort(starts[document] + drawn - (ends - counts)[document])


def barred_in_training(corpus: Corpus, offsets: np.ndarray, chunk_len: int) -> np.ndarray:
    """Ranges `(first, end)` of offsets that the chunks at `offsets` may not retrieve, of shape `[q, r, 2]`.

    Where one document trains, these are the chunks whose values overlap the sample. Which sample a chunk will be in is
    not known here, so its own tokens, and the one after them, stand for it.
    """
    if corpus.n_train > 1:
        return corpus.barred_ranges(offsets)
    return np.stack([offsets - 2 * chunk_len + 1, offsets + chunk_len + 1], axis=-1)[:, None]


def nearest_distances(
    queries: np.ndarray, barred: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Squared L2 distances of the `N_NEAREST` nearest keys, by brute force, ascending; inf where there are fewer.

    * `queries` are of shape `[q, d_emb]`
    * `barred` are ranges of offsets that do not count, of shape `[q, r, 2]`
    * `blocks` are offsets `[n]`, ascending, and keys `[n, d_emb]`

    Returns shape `[q, N_NEAREST]`.
    """
    nearest = np.full((len(queries), N_NEAREST), np.inf, dtype=np.float32)
    for offsets, rows in blocks:
        distances = faiss.pairwise_distances(queries, np.ascontiguousarray(rows))
        edges = np.searchsorted(offsets, barred)  # (q, r, 2) of the block's columns
        for query, span in np.argwhere(edges[..., 0] < edges[..., 1]):
            distances[query, slice(*edges[query, span])] = np.inf
        both = np.concatenate([nearest, distances], axis=1)
        nearest = np.partition(both, N_NEAREST - 1, axis=1)[:, :N_NEAREST]
    return np.sort(nearest, axis=1)


@dataclass(frozen=True)
class ExactNeighbors:
    """Queries like those of training, and how far their nearest keys are by brute force."""

    queries: np.ndarray  # (q, d_emb)
    barred: np.ndarray  # (q, r, 2), ranges of offsets that each may not find
    distances: np.ndarray  # (q, 10) to the nearest of the others, ascending; inf where there are fewer

    @staticmethod
    def of(keys: Keys, bert: Embedder, seed: int) -> ExactNeighbors:
        """Chunks drawn with `seed`, embedded by the keys' `bert`, and compared with all keys."""
        corpus, m = keys.corpus, keys.chunk_len
        offsets = query_offsets(corpus, m, seed)
        queries, barred = bert(corpus.texts(offsets, m)).cpu().numpy(), barred_in_training(corpus, offsets, m)

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first, shard in keys.each_shard():
                for start in range(0, len(shard), KEYS_AT_ONCE):
                    rows = shard[start : start + KEYS_AT_ONCE]
                    numbers = slice(first + start, first + start + len(rows))
                    kept = keys.in_database[numbers]
                    yield keys.offsets[numbers][kept], rows[kept]

        return ExactNeighbors(queries, barred, nearest_distances(queries, barred, blocks()))

    def recall(self, index: faiss.Index, keys: Keys) -> dict[str, float]:
        """Share of the true nearest neighbors that the index finds, at 1, 2 and 10; of those there are, if fewer.

        Chunks of equal text have equal distances, so any neighbor counts as true that is no farther than the k-th
        true one. Empty where no query has a neighbor.
        """
        recall, n_true = {}, np.isfinite(self.distances).sum(axis=1)
        some = np.flatnonzero(n_true)
        for k in (1, 2, N_NEAREST) if len(some) else ():
            # As they will be asked for: of codes, more candidates are looked at where more are wanted.
            found, _ = search_outside(index, keys, self.queries[some], k, self.barred[some])
            wanted = np.minimum(k, n_true[some])
            # The two distances are computed in different ways: allow for float32 rounding.
            farthest = self.distances[some, wanted - 1] * (1 + 1e-4) + 1e-4
            recall[f"@{k}"] = round(float(np.mean((found <= farthest[:, None]).sum(axis=1) / wanted)), 4)
        return recall


def choose_n_probe(index: faiss.Index, keys: Keys, exact: ExactNeighbors, target: float) -> tuple[int, str]:
    """The least number of lists, a power of two, with which recall at 10 reaches `target`; and a note, if none does.

    Codes have a ceiling that no number of lists lifts: where `target` is above it, 99% of the ceiling is taken for it.
    """
    if (ivf := ivf_of(index)) is None:
        return 1, ""
    recall_at: dict[int, float] = {}
    n_probe = 1
    while True:
        set_n_probe(index, n_probe)
        if not (recall := exact.recall(index, keys)):
            return ivf.nlist, "no query has a neighbor to measure recall with: all lists are searched"
        recall_at[n_probe] = recall[f"@{N_NEAREST}"]
        if recall_at[n_probe] >= target:
            return n_probe, ""
        # The ceiling: four times as many lists have brought next to nothing. Few lists may find nothing as yet.
        ended = n_probe >= 1 << DOUBLINGS and 0 < recall_at[n_probe] < recall_at[n_probe // 4] + 0.002
        if n_probe == ivf.nlist or ended:
            break
        n_probe = min(2 * n_probe, ivf.nlist)
    chosen = min(n for n, recall in recall_at.items() if recall >= 0.99 * recall_at[n_probe])
    return chosen, (
        f"recall {target:.1%} @{N_NEAREST} is out of reach: {n_probe} of {ivf.nlist} lists give "
        f"{recall_at[n_probe]:.1%}, and the {chosen} that are searched {recall_at[chosen]:.1%}"
    )
