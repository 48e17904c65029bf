"""Windows: held-out text as a model reads it, and what each token of it costs.

Shapes: n evaluated tokens, c chunks of them, K neighbors. Offsets count tokens of the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from retro.database import RetroIndex
from retro.dataset import IGNORED_TARGET
from retro.progress import each
from retro.retrofit import Model
from retro.text.corpus import Corpus

# On a CPU; eight windows of 1,024 tokens of 49,152 kinds took 16.4 s at once, 12.8 s by two and 11.7 s one by one.
LOGITS_ON_A_CPU = 2**26
Window = tuple[int, int, int]  # (start, end, scored): reads tokens `start:end`, scores tokens `scored` to `end`


def documents(corpus: Corpus) -> Iterator[tuple[int, int]]:
    """First offset and end of each validation document."""
    for number in corpus.split("valid"):
        yield int(corpus.starts[number]), int(corpus.starts[number + 1])


def chunk_offsets(corpus: Corpus, chunk_len: int) -> np.ndarray:
    """Where the chunks of the validation documents start (c); a document's last may be shorter."""
    return np.concatenate([np.arange(start, end, chunk_len) for start, end in documents(corpus)])


def predicted_bytes(corpus: Corpus) -> np.ndarray:
    """UTF-8 bytes (n) of each predicted token of the validation documents; 0 for a document's first.

    A token counts what it adds to the text before it. If a tokenizer does not keep a text exactly, they are scaled to
    sum to the document's own number of bytes.
    """
    base = corpus.n_train_tokens
    n_bytes = np.zeros(corpus.end_of_valid - base)
    for number, (start, end) in zip(corpus.split("valid"), documents(corpus), strict=True):
        part = n_bytes[start - base : end - base]
        part[:] = corpus.tokenizer.n_bytes_of(corpus.tokens[start:end])
        if part.sum():
            part *= corpus.documents[number].n_bytes / part.sum()
        part[:1] = 0
    return n_bytes


def others_drawn(retrieves: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each chunk that retrieves (c), another whose neighbors it gets at random (c), of another document; else -1.

    * `documents` (c) are the numbers of the chunks' documents, in order

    Never a later chunk of the same document: its neighbors were retrieved with text that is still to be predicted when
    they are read, so that they would tell of it, those of the next chunk most. An earlier chunk's tell nothing new, but
    may be nearly as good as its own; they are drawn only if there is no other document, and the first chunk that
    retrieves then gets none.
    """
    chunks, drawn = np.flatnonzero(retrieves), np.full(len(retrieves), -1)
    first = np.searchsorted(documents[chunks], documents[chunks])  # place in `chunks` of the document's first chunk
    of_same = np.searchsorted(documents[chunks], documents[chunks], side="right") - first
    if (of_same < len(chunks)).all():
        places = rng.integers(0, len(chunks) - of_same)
        drawn[chunks] = chunks[places + np.where(places < first, 0, of_same)]
    else:
        drawn[chunks[1:]] = chunks[rng.integers(0, np.arange(1, len(chunks)))]
    return drawn


def of_others(neighbors: np.ndarray, drawn: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each chunk that has neighbors (c, K) those of the chunk that was drawn for it (c); -1 for none.

    * `documents` (c) are as for `others_drawn`. Where the one that was drawn found nothing, another one that did is
      drawn in its place
    """
    has = np.asarray((neighbors >= 0).any(axis=1))
    drawn = np.where((drawn >= 0) & ~has[drawn], others_drawn(has, documents, rng), drawn)
    return np.where((has & (drawn >= 0))[:, None], neighbors[drawn], -1)


def are_asked_for(offsets: np.ndarray, cut: Sequence[Window], drawn: Sequence[np.ndarray]) -> np.ndarray:
    """Whether anybody needs to know what each chunk (c) retrieves.

    * `offsets` (c) are where chunks start. Those in windows count, with the token that is predicted at last
    * `drawn` are the chunks (c) whose neighbors these get at random, once for each shuffle
    """
    in_windows = np.zeros(len(offsets), dtype=bool)
    for start, end, _ in cut:
        first, last = np.searchsorted(offsets, (start, end), side="right") - 1
        in_windows[first : last + 1] = True
    asked = in_windows.copy()
    for numbers in drawn:
        asked[numbers[in_windows & (numbers >= 0)]] = True
    return asked


def windows(corpus: Corpus, window: int, stride: int, n_windows: int | None = None) -> list[Window]:
    """The validation documents, cut into windows of at most `window` tokens, `stride` apart.

    * `n_windows` is the most of each document, from the middles of as many parts of it; left out, all

    Token `end` itself is predicted, but not read. Each token is scored by the first window that predicts it.
    """
    return windows_of(documents(corpus), window, stride, n_windows)


def windows_of(
    ranges: Iterable[tuple[int, int]], window: int, stride: int, n_windows: int | None = None
) -> list[Window]:
    """As `windows`, of the texts in some ranges of offsets."""
    found: list[Window] = []
    for first, end_of_document in ranges:
        scored, start, of_document = first + 1, first, list[Window]()
        while scored < end_of_document:
            end = min(start + window, end_of_document - 1)
            of_document.append((start, end, scored))
            scored, start = end + 1, start + stride
        n = len(of_document)
        if n_windows is not None and n_windows < n:
            of_document = [of_document[(2 * i + 1) * n // (2 * n_windows)] for i in range(n_windows)]
        found += of_document
    return found


def is_scored(corpus: Corpus, cut: Sequence[Window]) -> np.ndarray:
    """Whether windows score each token (n) of the validation documents."""
    base = corpus.n_train_tokens
    scored = np.zeros(corpus.end_of_valid - base, dtype=bool)
    for _, end, first in cut:
        scored[first - base : end + 1 - base] = True
    return scored


@torch.inference_mode()
def losses(
    model: Model,
    corpus: Corpus,
    index: RetroIndex,
    neighbors: np.ndarray | None,
    cut: Sequence[Window],
    batch_size: int,
    device: torch.device | str,
    name: str,
    before: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Cross entropy (n) of each token of the validation documents, in nats; 0 for a document's first.

    * `neighbors` (c, K) are offsets in the index's corpus of what each chunk retrieved, or None
    * `cut` are the windows, of which up to `batch_size` are evaluated at once
    * `name` stands beside the progress bar
    * `before` are tokens that stand before each window, which no one predicts; whole chunks, if there are neighbors
    """
    model.eval()
    m, base, offsets = model.chunk_len, corpus.n_train_tokens, chunk_offsets(corpus, model.chunk_len)
    nats = np.zeros(corpus.end_of_valid - base)
    n_before = [0] * len(cut) if before is None else [len(tokens) for tokens in before]
    # Long ones first: those of a batch have about the same length.
    order = sorted(range(len(cut)), key=lambda i: cut[i][0] - cut[i][1] - n_before[i])
    if torch.device(device).type == "cpu" and order:
        longest = cut[order[0]][1] - cut[order[0]][0] + n_before[order[0]]
        batch_size = max(1, min(batch_size, LOGITS_ON_A_CPU // (longest * corpus.n_tokens)))
    for batch in each(
        [order[i : i + batch_size] for i in range(0, len(order), batch_size)], f"Evaluate ({name})", "batch"
    ):
        n_chunks = math.ceil((n_before[batch[0]] + cut[batch[0]][1] - cut[batch[0]][0]) / m)
        src = torch.zeros(len(batch), n_chunks * m, dtype=torch.long)  # (B, T)
        tgt = torch.full_like(src, IGNORED_TARGET)
        ret = np.full((len(batch), n_chunks, 1 if neighbors is None else neighbors.shape[1]), -1)  # (B, C, K)
        for row, i in enumerate(batch):
            (start, end, _), n = cut[i], n_before[i]
            tokens = torch.from_numpy(corpus.tokens[start : end + 1].astype(np.int64))
            if before is not None:
                tokens = torch.cat([torch.from_numpy(before[i]), tokens])
            src[row, : len(tokens) - 1], tgt[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            if neighbors is not None:
                first, n_whole = int(np.searchsorted(offsets, start)), (end - start) // m
                ret[row, n // m : n // m + n_whole] = neighbors[first : first + n_whole]
        values = None if neighbors is None else torch.from_numpy(index.values(ret)).to(device)
        logits = model(src.to(device), values)
        for row, i in enumerate(batch):  # one by one: a copy in float32 takes vocabulary x window
            start, end, scored = cut[i]
            of_window = slice(n_before[i] + scored - 1 - start, n_before[i] + end - start)
            predicted = logits[row, of_window].float()
            loss = F.cross_entropy(predicted, tgt[row, of_window].to(device), reduction="none")
            nats[scored - base : end + 1 - base] = loss.cpu().numpy()
    return nats
