r"""How good the bargain of an index is, measured: recall, against brute force.

For a sample of keys as queries, and their $k$ nearest other keys,

$$\text{recall@}k = \frac{\lvert \text{found}_k \cap \text{true}_k \rvert}{k}$$
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from retro.search.factory import ivf_of, set_n_probe
from retro.search.keys import Keys
from retro.search.querying import search_and_rerank

N_RECALL_QUERIES = 256


@dataclass(frozen=True)
class ExactNeighbors:
    """Queries drawn from the keys, and how far their nearest keys are by brute force."""

    numbers: np.ndarray  # (q) of the keys that are the queries
    queries: np.ndarray  # (q, d_emb)
    distances: np.ndarray  # (q, 10) to the nearest others, ascending; inf where there are fewer

    @staticmethod
    def of(keys: Keys, seed: int) -> ExactNeighbors:
        """Keys drawn with `seed`, compared with all keys; each one's own chunk does not count."""
        candidates = np.flatnonzero(keys.in_database)
        rng = np.random.default_rng([seed, 1])
        drawn = np.sort(rng.choice(len(candidates), size=min(N_RECALL_QUERIES, len(candidates)), replace=False))
        queries = keys.rows(candidates[drawn])

        def blocks() -> Iterator[np.ndarray]:
            for start, rows in keys.each_shard():
                yield rows[keys.in_database[start : start + len(rows)]]

        k = min(11, len(candidates))  # one more than 10: the query itself
        distances, found = knn_ground_truth(queries, (b for b in blocks() if len(b)), k, ngpu=0)
        others = np.where(drawn[:, None] == found, np.inf, distances)
        others = np.pad(others, ((0, 0), (0, 11 - k)), constant_values=np.inf)
        return ExactNeighbors(candidates[drawn], queries, np.sort(others, axis=1)[:, :10])

    def recall(self, index: faiss.Index, keys: Keys) -> dict[str, float]:
        """Share of the true nearest neighbors that the index finds, at 1, 2 and 10.

        Chunks of equal text have equal distances, so any neighbor counts as true that is no farther than the k-th
        true one.
        """
        distances, found = search_and_rerank(index, keys, self.queries, 11)
        others = (found >= 0) & (found != keys.offsets[self.numbers, None])
        recall: dict[str, list[float]] = {}
        for near, true in zip(map(np.extract, others, distances), self.distances, strict=True):
            n_true = int(np.isfinite(true).sum())
            for k in {min(k, n_true) for k in (1, 2, 10)} - {0}:
                # The two distances are computed in different ways: allow for float32 rounding.
                hits = near[:k] <= true[k - 1] * (1 + 1e-4) + 1e-4  # of the first k that come back
                recall.setdefault(f"@{k}", []).append(float(hits.sum()) / k)
        return {k: round(float(np.mean(v)), 4) for k, v in sorted(recall.items(), key=lambda item: int(item[0][1:]))}


def choose_n_probe(index: faiss.Index, keys: Keys, exact: ExactNeighbors, target: float) -> tuple[int, str]:
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
        recall_at[n_probe] = max(exact.recall(index, keys).items(), key=lambda item: int(item[0][1:]))[1]
        if recall_at[n_probe] >= target:
            return n_probe, ""
        # The ceiling: four times as many lists have brought next to nothing.
        if n_probe == ivf.nlist or recall_at[n_probe] - recall_at.get(n_probe // 4, 0.0) < 0.002:
            break
        n_probe = min(2 * n_probe, ivf.nlist)
    ceiling = recall_at[n_probe]
    chosen = min(n for n, recall in recall_at.items() if recall >= 0.99 * ceiling)
    return chosen, f"no number of lists gives recall {target:.0%} @10 with these codes, which end at {ceiling:.1%}"
