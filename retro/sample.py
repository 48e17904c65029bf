"""Text from the model, with live retrieval.

Whenever a chunk is complete, its neighbors are retrieved from the database and encoded, once; from
the chunk's last token on, the decoder reads them. Each decoder state is computed once as well: the
keys and values of self-attention are kept for all positions, those of chunked cross-attention for
the last chunk's neighbors. What comes out is the same as recomputing everything for each token.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from retro.commands import sample_command

    raise SystemExit(sample_command())

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro.corpus import Corpus
from retro.database import RetroIndex
from retro.model import KeyValueCache, RetroModel, readable


@dataclass(frozen=True)
class Neighbor:
    """A retrieved neighbor: where it comes from, and its text with the continuation."""

    document: str
    offset: int  # tokens from the start of the document
    distance: float  # squared L2 distance of the embeddings
    text: str


class CachedDecoder:
    """Runs a model over a growing sequence, computing each state once.

    Positions read the same neighbors from the last token of a chunk up to the next chunk's last but
    one. `feed` takes tokens of one such stretch at a time.
    """

    def __init__(self, model: RetroModel) -> None:
        self.model = model
        self.position = 0
        self.caches = [KeyValueCache() for _ in model.attn]
        self.chunk: list[Tensor] = []  # states (B, n, D) of the unfinished chunk, where the encoder reads them
        self.contexts: list[tuple[Tensor, Tensor]] = []  # keys and values of the neighbors, for each CCA layer
        self.mask: Tensor | None = None
        self.has_neighbor: Tensor | None = None

    @property
    def completes_chunk(self) -> bool:
        """Whether the next token is the last of a chunk, so that its neighbors are due."""
        return (self.position + 1) % self.model.chunk_len == 0

    def n_next(self) -> int:
        """How many tokens the next call of `feed` can take."""
        m = self.model.chunk_len
        return m if self.completes_chunk else m - 1 - self.position % m

    def feed(self, tokens: Tensor, ret: Tensor | None = None) -> Tensor:
        """Take in tokens (B, n); returns the logits (B, n_vocab) for the token after them.

        * `ret` (B, K, R) are the neighbors of the chunk that the first token completes; None to
          read nothing
        """
        assert 0 < tokens.shape[1] <= self.n_next(), "tokens of two stretches in one call"
        model = self.model
        h = model.emb(tokens)
        for p, (attn, ffw) in enumerate(zip(model.attn, model.ffw, strict=True)):
            h = attn(h, cache=self.caches[p])
            if p in model.ca_layers:
                if p == model.ca_layers[0]:
                    self._take_up(h, ret)
                if self.contexts:
                    cca: Any = model.cca[model.ca_layers.index(p)]
                    keys, values = self.contexts[model.ca_layers.index(p)]
                    read = cca.read(h, keys, values, self.mask)
                    h = h + torch.where(self.has_neighbor[:, None, None], read, 0.0)  # type: ignore[index]
            h = ffw(h)
        self.position += tokens.shape[1]
        return model.read(h[:, -1])

    def _take_up(self, h: Tensor, ret: Tensor | None) -> None:
        """Keep the states of the current chunk; if the first one completes it, encode its neighbors."""
        if not self.completes_chunk:
            self.chunk.append(h)
            return
        chunk = torch.cat([*self.chunk, h[:, :1]], dim=1)  # (B, m, D)
        self.chunk = [h[:, 1:]]
        self.contexts = []
        if ret is not None:
            present = ret >= 0
            e = self.model.encode(ret[:, None], chunk, present[:, None])  # (B, 1, K, R, D)
            self.mask, self.has_neighbor = readable(present.flatten(1))
            layers: Any = self.model.cca
            self.contexts = [cca.keys_values(e.flatten(1, 3)) for cca in layers]


class Sampler:
    """Samples from a model; the first arguments are the tutorial's.

    * `device` is the device of the model
    * `model` is the model
    * `tds` is the corpus, or a labml `TextDataset`, that the database was built from
    * `chunk_len` is the length of a chunk
    * `index` retrieves; left out, the database in `data_path`

    After (and during) sampling, `neighbors` holds what each complete chunk of prompt and sample
    retrieved.
    """

    def __init__(
        self,
        device: torch.device | str,
        model: RetroModel,
        tds: Any,
        chunk_len: int,
        *,
        index: RetroIndex | None = None,
        data_path: str | Path = "data",
    ) -> None:
        self.device = torch.device(device)
        self.model = model
        self.corpus = Corpus.of(tds)
        self.chunk_len = chunk_len
        self.index = index or RetroIndex(chunk_len, corpus=self.corpus, data_path=data_path, device=device)
        self.neighbors: list[list[Neighbor]] = []

    def retrieve_nearest_neighbours(self, chunk: str) -> list[str]:
        """Texts of the nearest neighbors of a chunk, each with its continuation."""
        return [neighbor.text for neighbor in self._retrieve([chunk])[0][0]]

    def _retrieve(self, chunks: list[str]) -> list[tuple[list[Neighbor], np.ndarray]]:
        """For each chunk, its neighbors as text and as tokens (K, 2m)."""
        distances, offsets = self.index.search(self.index.embed(chunks), self.index.n_neighbors)
        values = self.index.values(offsets)  # (chunks, K, 2m)
        documents = self.corpus.document_of(np.maximum(offsets, 0))
        return [
            (
                [
                    Neighbor(
                        document=self.corpus.documents[documents[u, k]].name,
                        offset=int(offsets[u, k] - self.corpus.starts[documents[u, k]]),
                        distance=float(distances[u, k]),
                        text=self.corpus.tokenizer.decode(values[u, k][values[u, k] >= 0].tolist()),
                    )
                    for k in np.flatnonzero(offsets[u] >= 0)
                ],
                values[u],
            )
            for u in range(len(chunks))
        ]

    def sample(
        self,
        prompt: str,
        sample_len: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Text of `sample_len` tokens that continue `prompt`.

        * `temperature` divides the logits; 0 always takes the likeliest token, as the tutorial does
        * `top_k` keeps the k likeliest tokens
        * `top_p` keeps the likeliest tokens that together have at least this probability
        * `seed` starts the drawing; one seed gives one text

        Raises `ValueError` for an empty prompt, a character that is not in the vocabulary, or an
        option out of its range.
        """
        return "".join(self.stream(prompt, sample_len, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed))

    @torch.inference_mode()
    def stream(
        self,
        prompt: str,
        sample_len: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """As `sample`, but yields the text piece by piece as it is written."""
        _check_options(sample_len, temperature, top_k, top_p)
        ids = self.corpus.tokenizer.encode(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token to continue")
        generator = torch.Generator().manual_seed(seed)
        self.neighbors = []
        self.model.eval()
        decoder = CachedDecoder(self.model)
        # The prompt's chunks are known already: retrieve for all of them at once.
        m = self.chunk_len
        whole = [self.corpus.tokenizer.decode(ids[i : i + m]) for i in range(0, len(ids) // m * m, m)]
        retrieved = self._retrieve(whole) if whole else []

        n_prompt, written = len(ids), 0
        while True:
            ret = None
            if decoder.completes_chunk:
                u = decoder.position // m
                if u == len(retrieved):
                    retrieved += self._retrieve([self.corpus.tokenizer.decode(ids[u * m : (u + 1) * m])])
                neighbors, values = retrieved[u]
                self.neighbors.append(neighbors)
                ret = torch.from_numpy(values)[None].to(self.device)  # (1, K, 2m)
            tokens = ids[decoder.position : decoder.position + decoder.n_next()]
            logits = decoder.feed(torch.tensor([tokens], device=self.device), ret)
            if decoder.position < len(ids):
                continue  # still in the prompt
            ids.append(choose(logits[0].float().cpu(), temperature, top_k, top_p, generator))
            last = len(ids) - n_prompt == sample_len
            text = self.corpus.tokenizer.decode(ids[n_prompt:])
            # A subword may end inside a character; wait for the rest of it.
            if last or not text.endswith("\ufffd"):
                yield text[written:]
                written = len(text)
            if last:
                return


def _check_options(sample_len: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if sample_len < 1:
        raise ValueError(f"length {sample_len} is not at least 1")
    if temperature < 0:
        raise ValueError(
            f"temperature {temperature} is negative; 0 takes the likeliest token, 1 draws as the model says"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is not at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]")


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """A token drawn from logits (n_vocab)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered, tokens = logits.softmax(dim=-1).sort(descending=True)
        # Leave out tokens before which the mass is already there; the likeliest always stays.
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        logits[tokens[beyond]] = float("-inf")
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))
