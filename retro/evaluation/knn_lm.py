r"""kNN-LM: a rival that remembers each token by the state that led to it (arXiv:1911.00172).

The model, with retrieval switched off, reads the database once. For each token $x_{i+1}$ in it, the state
$f(x_{\le i})$ from which the logits are read off is kept, with the token that came next. Where text is evaluated, the
$k$ nearest states vote for their tokens:

$$p_{kNN}(y \mid x) \propto \sum_{(k_i, v_i) \in N} \mathbb{1}[y = v_i] \, e^{-\lVert k_i - f(x) \rVert^2 / T}, \qquad
p(y \mid x) = \lambda \, p_{kNN}(y \mid x) + (1 - \lambda) \, p_{LM}(y \mid x)$$

There is nothing to train, but $\lambda$ and $T$ have to be chosen. They are, for each half of the held-out documents,
those that serve the other half best, so no document has a say in its own.

The article found the input of the last feed-forward layer to be a better key than the output of the model, which is
taken here because every model has it; and it let 1,024 states vote. So this is a plain kNN-LM, not the best one.

It keeps $4 D$ bytes for each token, where RETRO keeps a key for each chunk, and looks up each token, not each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import faiss
import numpy as np
import torch

from retro.database import RetroIndex
from retro.errors import InvalidOption
from retro.evaluation.windows import Window, windows_of
from retro.progress import bar, each
from retro.retrofit import Model, Retrofit
from retro.search.filling import memory_of_machine
from retro.text.corpus import Corpus

N_VOTES = 64  # k: 1,024 in the article, of 100 million states; here one in a thousand of a small text's
SHARES = tuple(step / 20 for step in range(19))  # λ to choose from; 0 is the model alone
TEMPERATURES = tuple(2.0**step for step in range(-7, 3))  # T to choose from, times the mean distance of neighbors
MOST_MEMORY = 0.5  # of the machine's


def states(
    model: Model, corpus: Corpus, cut: Sequence[Window], batch_size: int, device: torch.device | str, what: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Offsets (n) of tokens that windows score, and the states (n, D) that predict them, a batch at a time."""
    captured: list[torch.Tensor] = []
    if isinstance(model, Retrofit):  # what goes into the head
        head = model.base.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    else:  # what comes out of the norm before it, or of nothing in its place
        hook = model.norm.register_forward_hook(lambda _, inputs, output: captured.append(output))
    try:
        ordered = sorted(cut, key=lambda w: w[0] - w[1])
        batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        for batch in each(batches, what, "batch"):
            src = torch.zeros(len(batch), max(end - start for start, end, _ in batch), dtype=torch.long)
            for row, (start, end, _) in enumerate(batch):
                src[row, : end - start] = torch.from_numpy(corpus.tokens[start:end].astype(np.int64))
            captured.clear()
            with torch.inference_mode():
                model(src.to(device), None)
            found = captured[-1].float().cpu().numpy().reshape(len(batch), src.shape[1], -1)
            for row, (start, end, scored) in enumerate(batch):
                yield np.arange(scored, end + 1), found[row, scored - 1 - start : end - start]
    finally:
        hook.remove()


class Memory:
    """The states of a model over some `documents` of a corpus, each with the token that follows it.

    * `window`, `stride` are as in the evaluation

    Raises `InvalidOption` where they do not fit into half of the machine's memory.
    """

    def __init__(
        self,
        model: Model,
        corpus: Corpus,
        documents: Sequence[int],
        window: int,
        stride: int,
        batch_size: int,
        device: torch.device | str,
    ) -> None:
        ranges = [(int(corpus.starts[i]), int(corpus.starts[i + 1])) for i in documents]
        n, d = sum(max(0, end - start - 1) for start, end in ranges), model.d_model
        if (n_bytes := 4 * n * d) > MOST_MEMORY * memory_of_machine():
            reason = f"has to keep {n:,} states of {4 * d:,} bytes, {n_bytes / 1e9:.2g} GB; name a smaller --database"
            raise InvalidOption("against", "knn-lm", reason)
        self.index, tokens = faiss.IndexFlatL2(d), []
        model.eval()
        cut = windows_of(ranges, window, stride)
        for offsets, of_text in states(model, corpus, cut, batch_size, device, "Remember"):
            self.index.add(np.ascontiguousarray(of_text))
            tokens.append(corpus.tokens[offsets].astype(np.int64))
        self.tokens = np.concatenate(tokens)

    def votes(self, queries: np.ndarray, targets: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared L2 distances (n, k) of the nearest states, and which of them were followed by each target (n, k)."""
        distances, found = self.index.search(np.ascontiguousarray(queries), min(k, self.index.ntotal))
        return distances, self.tokens[found] == targets[:, None]


def to_remember(corpus: Corpus, database: Corpus) -> list[int]:
    """The documents of a database that may be remembered where those held out of `corpus` are evaluated."""
    if corpus.sha256 != database.sha256:
        return [*database.in_database]
    near = {int(database.groups[i]) for i in corpus.split("valid")}  # may be kept, but retrieval does not find them
    return [i for i in database.in_database if int(database.groups[i]) not in near]


def knn_probability(distances: np.ndarray, agrees: np.ndarray, temperature: float) -> np.ndarray:
    """What neighbors (n, k) say of the token that came (n)."""
    weights = np.exp(-(distances - distances[:, :1]) / temperature)  # the nearest first: no overflow
    return (weights * agrees).sum(axis=1) / weights.sum(axis=1)


def require_halves(corpus: Corpus) -> None:
    """Raise `InvalidOption` where there are no other documents to choose on."""
    if len(corpus.split("valid")) < 2:
        raise InvalidOption("against", "knn-lm", "needs two held-out documents: what serves one is chosen on others")


def knn_lm_losses(
    model: Model,
    corpus: Corpus,
    index: RetroIndex,
    alone: np.ndarray,
    cut: Sequence[Window],
    window: int,
    stride: int,
    batch_size: int,
    device: torch.device | str,
) -> np.ndarray:
    """Cross entropy (n) of each token of the validation documents, in nats; 0 where none is scored.

    * `alone` (n) is the model's own, with retrieval switched off
    """
    memory = Memory(model, index.corpus, to_remember(corpus, index.corpus), window, stride, batch_size, device)
    base, k = corpus.n_train_tokens, min(N_VOTES, memory.index.ntotal)
    distances, agrees = np.zeros((len(alone), k), dtype=np.float32), np.zeros((len(alone), k), dtype=bool)
    scored = np.zeros(len(alone), dtype=bool)
    with bar("Look up", "token", sum(end + 1 - first for _, end, first in cut)) as progress:
        for offsets, queries in states(model, corpus, cut, batch_size, device, "Evaluate (knn-lm)"):
            found = memory.votes(queries, corpus.tokens[offsets].astype(np.int64), k)
            distances[offsets - base], agrees[offsets - base] = found
            scored[offsets - base] = True
            progress.update(len(offsets))
    half = corpus.document_of(np.arange(base, base + len(alone))) % 2 == corpus.split("valid").start % 2
    nats = np.zeros(len(alone))
    for mine in (half & scored, ~half & scored):
        others = ~mine & scored
        share, temperature = chosen(alone[others], distances[others], agrees[others])
        nats[mine] = mixed(alone[mine], knn_probability(distances[mine], agrees[mine], temperature), share)
    return nats


def mixed(alone: np.ndarray, votes: np.ndarray, share: float) -> np.ndarray:
    """Nats (n) of the mixture, of which `votes` (n) have a `share`; with none it is the model's own, bit for bit."""
    return alone if not share else -np.log(share * votes + (1 - share) * np.exp(-alone))


def chosen(alone: np.ndarray, distances: np.ndarray, agrees: np.ndarray) -> tuple[float, float]:
    """The share and the temperature with which a text costs least."""
    mean = float(distances.mean()) or 1.0
    best = (np.inf, 0.0, mean)
    for temperature in (mean * times for times in TEMPERATURES):
        votes = knn_probability(distances, agrees, temperature)
        best = min(best, *((float(mixed(alone, votes, share).sum()), share, temperature) for share in SHARES))
    return best[1:]
