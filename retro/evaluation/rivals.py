r"""Rivals: what else could be done with what was retrieved, or with as much computing, measured on the same tokens.

* `in-context` puts the neighbors of a chunk before the text, and the same model goes on, with retrieval switched off
  (arXiv:2302.00083). As a chunk's neighbors are read by the next one in RETRO, they are put before that one here, anew
  for each chunk, the nearest last.
* `longer-context` is a control for its computing: in the place of neighbors there are as many more tokens of the
  document itself, from before the window.
* `both` is retrieval, with the neighbors before the text besides.
* `knn-lm` lets the states of the database's tokens vote for the next one (`retro.evaluation.knn_lm`).

None reads more than the model was made for: its own limit, or a window where it has none; the oldest text goes first.

A generated token costs a pass of its own, and for each chunk what has to be read anew: with neighbors before the text
all that is behind them too, because it stands elsewhere now, while chunked cross-attention encodes the neighbors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from retro.database import RetroIndex
from retro.errors import InvalidOption
from retro.evaluation.knn_lm import knn_lm_losses, require_halves
from retro.evaluation.windows import Window, chunk_offsets, losses
from retro.in_context import put_before
from retro.retrofit import Model
from retro.text.corpus import Corpus

IN_CONTEXT, LONGER, BOTH, KNN_LM = RIVALS = ("in-context", "longer-context", "both", "knn-lm")


class Piece(NamedTuple):
    """A window that scores tokens of one chunk, with tokens put before it."""

    window: Window
    before: np.ndarray


def pieces(
    rival: str, corpus: Corpus, index: RetroIndex, neighbors: np.ndarray, cut: Sequence[Window], most: int
) -> list[Piece]:
    """Windows, each cut into one for each chunk, with what a rival reads besides.

    * `neighbors` (c, K) are offsets in the index's corpus of what each chunk retrieved
    * `cut` are the windows
    * `most` is how many tokens the model reads
    """
    m, offsets, found = index.chunk_len, chunk_offsets(corpus, index.chunk_len), []
    n_more = 2 * m * neighbors.shape[1]
    for start, end, scored in cut:
        first = int(np.searchsorted(offsets, start))
        for nth in range((scored - start) // m, (end - start) // m + 1):
            first_target, last = max(scored, start + nth * m), min(end, start + (nth + 1) * m - 1)
            before, begins = np.zeros(0, dtype=np.int64), start
            if nth and rival == LONGER:
                begins = max(int(corpus.starts[corpus.document_of(start)]), start - n_more)
            elif nth:
                before = put_before(index.values(neighbors[first + nth - 1]), m)
            dropped = -(-max(0, last - begins + len(before) - most) // m) * m
            found.append(Piece((min(begins + dropped, start + nth * m), last, first_target), before))
    return found


def room(model: Model, chunk_len: int, window: int) -> int:
    """How many tokens a model reads: as many as it was pretrained on, or as in the evaluation."""
    return window if model.max_chunks is None else model.max_chunks * chunk_len


def require_room(rival: str, model: Model, corpus: Corpus, index: RetroIndex, n_neighbors: int, window: int) -> None:
    """Raise `InvalidOption` for a rival that there is not, or one that would have next to no text of its own."""
    if rival not in RIVALS:
        raise InvalidOption("against", rival, f"is not one of {', '.join(RIVALS)}")
    if rival == KNN_LM:
        require_halves(corpus)
        return
    n_more, most = 2 * index.chunk_len * n_neighbors, room(model, index.chunk_len, window)
    if most < n_more + window // 2:
        reason = f"would leave {most - n_more:,} of the {most:,} tokens that the model reads to the text; --window"
        raise InvalidOption("against", rival, reason)


def rival_losses(
    rival: str,
    model: Model,
    corpus: Corpus,
    index: RetroIndex,
    neighbors: np.ndarray,
    alone: np.ndarray,
    cut: Sequence[Window],
    window: int,
    stride: int,
    batch_size: int,
    device: torch.device | str,
) -> np.ndarray:
    """Cross entropy (n) of each token of the validation documents, in nats, as `losses` gives it for a model alone.

    * `alone` (n) are those of the model without what a rival reads
    * `cut` are windows of at most `window` tokens, `stride` apart
    """
    if rival == KNN_LM:
        return knn_lm_losses(model, corpus, index, alone, cut, window, stride, batch_size, device)
    most = room(model, index.chunk_len, window)
    found = pieces(rival, corpus, index, neighbors, cut, most)
    read = neighbors if rival == BOTH else None
    return losses(
        model, corpus, index, read, [p.window for p in found], batch_size, device, rival, [p.before for p in found]
    )
