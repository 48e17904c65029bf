r"""What a generated token costs, by each way of using what was retrieved: operations, seconds, bytes.

All ways write the same $m$ tokens, of held-out text, behind the same $T$ tokens before them (or fewer, where the model
has no room for these and what a way puts before them), and what that costs is divided by $m$. $T$ is three quarters of
a window, because a text that fills its window goes on with half of it. States of the $T$ tokens are kept, as in
sampling, and were computed before, if the way can use them again:

* `off`, `baseline`: $m$ passes, each over one token;
* `on`: the same, and the neighbors of the last chunk of the $T$ tokens are looked up and encoded;
* `in-context`: they are looked up, and neighbors and text are read anew before the first token is written, because the
  text stands elsewhere now;
* `both`: the same by a model that reads neighbors, those of the text's other chunks encoded anew too;
* `longer-context`: as `off`, with as many more tokens kept as `in-context` has neighbors;
* `knn-lm`: as `off`, with an exact search among all $n$ remembered states for each token.

Operations are those of the products of matrices in the networks, counted as they run
(`torch.utils.flop_counter`; a multiplication and an addition are two), and those of kNN-LM's search, a product of a
state and all $n$: $2nD$ a token. Attention counts in full, also what causal attention could leave out. What embeds a
chunk to look for others counts too; the search itself, among chunks and once for each, counts in seconds only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable
from typing import TypedDict

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retro.database import RetroIndex
from retro.decoding import decoder_of
from retro.errors import InvalidOption
from retro.evaluation.knn_lm import N_VOTES, to_remember
from retro.evaluation.rivals import BOTH, IN_CONTEXT, KNN_LM, LONGER, RIVALS, put_before, require_room, room
from retro.retrofit import Model
from retro.search.index_file import INDEX_FILE, LISTS_FILE
from retro.search.retrievers import FOLDER
from retro.text.corpus import Corpus

ROUNDS = 5  # in turns, of which the median counts; the first warms up


class Cost(TypedDict):
    """What a token costs, on average over a chunk."""

    operations: float
    seconds: float
    weights: int  # bytes of the model
    kept: int  # bytes of what is kept of one text
    searched: int  # bytes of what is looked up in


def costs(
    variants: Collection[str],
    model: Model,
    corpus: Corpus,
    index: RetroIndex,
    *,
    n_neighbors: int,
    window: int,
    baseline: Model | None = None,
    n_rounds: int = ROUNDS,
) -> dict[str, Cost]:
    """The cost of a token for each of the variants of an evaluation; random neighbors cost as `on`, and are left out.

    * `corpus` and `index` are those of the evaluation, whose text is written: its first validation document and on
    * `n_neighbors` and `window` are K, and what $T$ is three quarters of
    * `baseline` goes without retrieval in place of `model`, and so do rivals with it, if there is one

    Seconds are those of the machine and the device where the models are, with whatever else runs there. Raises
    `InvalidOption` for a variant that there is not, or a rival that would have next to no text of its own.
    """
    known = ("on", "off", "random", *RIVALS, *(["baseline"] if baseline is not None else []))
    for variant in variants:
        if variant not in known:
            raise InvalidOption("variants", variant, f"is not one of {', '.join(known)}")
    ways = {
        variant: _Way(variant, model, corpus, index, n_neighbors, window, baseline)
        for variant in variants
        if variant != "random"
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in ways}
    with torch.inference_mode():
        for _ in range(n_rounds):
            for variant, way in ways.items():
                write = way.ready()
                started = time.perf_counter()
                write()
                seconds[variant].append((time.perf_counter() - started) / index.chunk_len)
        return {
            variant: Cost(
                operations=way.operations() / index.chunk_len,
                seconds=statistics.median(seconds[variant][1:] or seconds[variant]),
                weights=n_bytes(way.net.parameters()),
                kept=n_bytes(way.decoder.kept()),
                searched=way.searched(),
            )
            for variant, way in ways.items()
        }


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Way:
    """One way of writing a chunk of the held-out text."""

    def __init__(
        self,
        variant: str,
        model: Model,
        corpus: Corpus,
        index: RetroIndex,
        n_neighbors: int,
        window: int,
        baseline: Model | None,
    ) -> None:
        self.variant, self.index, self.n_neighbors = variant, index, n_neighbors
        self.net = model if baseline is None or variant in ("on", "off", BOTH) else baseline
        self.net.eval()
        self.device = next(self.net.parameters()).device
        self.decoder = decoder_of(self.net, reads=variant in ("on", BOTH))
        m, n_more = index.chunk_len, 0
        n_text = 3 * window // 4 // m * m  # T
        if variant in (IN_CONTEXT, LONGER, BOTH):
            require_room(variant, self.net, corpus, index, n_neighbors, window)
            n_more = 2 * m * self.n_neighbors
            n_text = min(n_text, (room(self.net, m, window) - n_more) // m * m - m)
        n_text += n_more if variant == LONGER else 0
        held_out = corpus.tokens[corpus.n_train_tokens : corpus.end_of_valid].astype(np.int64)
        self.text, self.written = torch.from_numpy(np.resize(held_out, n_text + m)).to(self.device).split([n_text, m])
        self.query = corpus.tokenizer.decode(self.text[-m:].tolist())
        self.memory = self._memory(corpus) if variant == KNN_LM else None

    def _memory(self, corpus: Corpus) -> faiss.Index:
        """As many states as kNN-LM remembers. A flat search takes as long among any, and nobody reads what is found."""
        database, d = self.index.corpus, self.net.d_model
        memory, rng = faiss.IndexFlatL2(d), np.random.default_rng(0)
        for i in to_remember(corpus, database):
            n = int(database.starts[i + 1] - database.starts[i]) - 1
            memory.add(rng.standard_normal((max(0, n), d), dtype=np.float32))
        return memory

    def ready(self) -> Callable[[], None]:
        """Read what was read before; what is returned writes."""
        self.decoder.restart()
        if self.variant in (IN_CONTEXT, BOTH):
            return self._write_behind_neighbors
        self._read(self.text[:-1])
        return self._write

    def _write(self) -> None:
        """Passes over the text's last token, which completes a chunk, and over all that are written but the last."""
        neighbors = self._look_up() if self.decoder.reads else None
        for token in torch.cat([self.text[-1:], self.written[:-1]]).split(1):
            int(self.decoder.feed(token, neighbors).argmax())  # the next one is chosen before it is read
            neighbors = None
            if self.memory is not None:
                query = np.zeros((1, self.net.d_model), dtype=np.float32)
                self.memory.search(query, min(N_VOTES, self.memory.ntotal))

    def _write_behind_neighbors(self) -> None:
        neighbors = self._look_up()
        before = torch.from_numpy(put_before(neighbors.cpu().numpy(), self.index.chunk_len)).to(self.device)
        self._read(torch.cat([before, self.text]), neighbors, len(before))
        for token in self.written[:-1].split(1):
            int(self.decoder.feed(token).argmax())

    def _look_up(self) -> Tensor:
        """Tokens (K, 2m) of the neighbors of the text's last chunk."""
        _, offsets = self.index.nearest([self.query], self.n_neighbors)
        return torch.from_numpy(self.index.values(offsets[0])).to(self.device)

    def _read(self, tokens: Tensor, neighbors: Tensor | None = None, n_before: int = 0) -> None:
        """Read tokens, as many at once as it goes.

        * `neighbors` are those of each chunk, if it reads any, behind the first `n_before` tokens
        """
        while len(tokens):
            due = self.decoder.reads and self.decoder.completes_chunk and self.decoder.length >= n_before
            now, tokens = tokens[: (n := self.decoder.n_next())], tokens[n:]
            logits = self.decoder.feed(now, neighbors if due else None)
        int(logits.argmax())  # until it is there: a device computes on while nobody asks

    def operations(self) -> int:
        """Of the networks and of the search among states, for the chunk."""
        write = self.ready()
        # With attention written out, because the counter does not know that of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            write()
        n_states = 0 if self.memory is None else int(self.memory.ntotal)
        return int(counter.get_total_flops()) + len(self.written) * 2 * n_states * self.net.d_model

    def searched(self) -> int:
        """Bytes of the states that vote, or of the database: what was built to search it, and its chunks' tokens."""
        if self.memory is not None:
            return int(self.memory.ntotal) * (4 * self.net.d_model + self.index.corpus.tokens.itemsize)
        if self.variant not in ("on", IN_CONTEXT, BOTH):
            return 0
        folder = self.index.data_path
        files = [folder / INDEX_FILE, folder / LISTS_FILE, *(folder / FOLDER).rglob("*")]
        tokens = self.index.corpus.tokens.itemsize * self.index.manifest["n_chunks"] * self.index.chunk_len
        return int(tokens + sum(file.stat().st_size for file in files if file.is_file()))
