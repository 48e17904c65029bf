"""Text from the model, with live retrieval.

Whenever a chunk is complete, its neighbors are retrieved from the database and encoded, once; from
the chunk's last token on, the decoder reads them. Each decoder state is computed once as well: the
keys and values of self-attention are kept for all positions, those of chunked cross-attention for
the last chunk's neighbors (`retro.decoding`). What comes out is the same as recomputing everything for each token.

A model has learnt positions up to the length of a training sample. A text that grows beyond it is read
through a window of at most `max_chunks` chunks: when the next token does not fit, the oldest chunks are
dropped, half of the window at once, and the others are read anew, with the neighbors they have, from
position 0 on. Half at once, because then as many tokens are new as are read anew.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro.config import DatasetConfig, SampleConfig
from retro.database import RetroIndex
from retro.dataset import DATASET_FILE
from retro.decoding import BatchDecoder, Decoder, decoder_of
from retro.errors import InvalidOption, differences
from retro.in_context import InContext
from retro.model import RetroModel
from retro.retrofit import Model
from retro.runs.models import require_tokenizer
from retro.runs.run import read_run
from retro.search.index_file import read_database_manifest
from retro.storage.sample_file import read_header
from retro.text.base_model import load_base, widened
from retro.text.corpus import Corpus, open_corpus


@dataclass(frozen=True)
class Neighbor:
    """A retrieved neighbor: where it comes from, and its text with the continuation."""

    document: str
    offset: int  # tokens from the start of the document
    distance: float  # squared L2 distance of the embeddings, or minus a score
    text: str
    corpus_offset: int  # tokens from the start of the corpus


def start_of_window(n_tokens: int, chunk_len: int, max_chunks: int | None) -> int:
    """Where the window starts through which a text of `n_tokens` is read; None for no limit.

    It depends on the length alone, so a text goes on in the same way whether its end was given or sampled.
    """
    if max_chunks is None:
        return 0
    dropped = max(1, max_chunks // 2) * chunk_len  # tokens at one time
    return dropped * max(0, math.ceil((n_tokens - max_chunks * chunk_len) / dropped))


class Sampler:
    """Samples from a model; the first arguments are the tutorial's.

    * `device` is the device of the model
    * `model` is the model
    * `tds` is the corpus, or a labml `TextDataset`, that the database was built from
    * `chunk_len` is the length of a chunk; it must be the model's
    * `index` retrieves; left out, the database in `data_path` does, opened when the first chunk is complete
    * `data_path` is the folder of the data
    * `n_neighbors` is the number of neighbors of a chunk; left out, the index's, or, without an `index`, as many as in
      the dataset, if there is one
    * `max_chunks` is the most chunks that the model reads at once; left out, as many as it was pretrained on, else as a
      sample of the dataset has, or without a dataset any number

    The dataset is the one beside the database, if it is of the same text and `chunk_len`. A model without `ca_layers`
    reads no neighbors, so nothing is retrieved for it.

    After (and during) sampling, `tokens` are those of prompt and sample, and `neighbors` holds what each complete chunk
    of them retrieved; nothing for the chunks of a prompt that begins before the model's window. `values` has the tokens
    (K, 2m) of these neighbors, by the number of the chunk.

    Raises `ValueError` where model, corpus, `chunk_len` and index do not fit together.
    """

    def __init__(
        self,
        device: torch.device | str,
        model: Model | InContext,
        tds: Any,
        chunk_len: int,
        *,
        index: RetroIndex | None = None,
        data_path: str | Path = "data",
        n_neighbors: int | None = None,
        max_chunks: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model
        self.corpus = Corpus.of(tds)
        self.chunk_len = chunk_len
        for name, number in (("n_neighbors", n_neighbors), ("max_chunks", max_chunks)):
            if number is not None and number < 1:
                raise InvalidOption(name, number, "is not at least 1")
        _require_fit(model, self.corpus, chunk_len, index)
        folder = Path(data_path) if index is None else index.data_path
        trained_with = partial(_field_of_dataset, folder, self.corpus, chunk_len)
        self.n_neighbors: int = (
            n_neighbors
            or (trained_with("n_neighbors") if index is None else index.n_neighbors)
            or DatasetConfig.n_neighbors
        )
        self.max_chunks: int | None = max_chunks or model.max_chunks or trained_with("chunks_per_sample")
        self._index, self.data_path = index, folder
        self.tokens: list[int] = []
        self.neighbors: list[list[Neighbor]] = []
        self.values: dict[int, Tensor] = {}
        self.neighbors_of: list[list[list[Neighbor]]] = []

    @cached_property
    def index(self) -> RetroIndex:
        """What retrieves; opened when the first chunk is complete."""
        return self._index or RetroIndex(
            self.chunk_len,
            n_neighbors=self.n_neighbors,
            corpus=self.corpus,
            data_path=self.data_path,
            device=self.device,
        )

    def retrieve_nearest_neighbours(self, chunk: str) -> list[str]:
        """Texts of the nearest neighbors of a chunk, each with its continuation."""
        return [neighbor.text for neighbor in self.retrieve([chunk])[0][0]]

    def retrieve(self, chunks: list[str], n_neighbors: int | None = None) -> list[tuple[list[Neighbor], np.ndarray]]:
        """For each chunk, its neighbors as text and as tokens (K, 2m); as many as the model reads, or `n_neighbors`."""
        distances, offsets = self.index.nearest(chunks, n_neighbors or self.n_neighbors)
        values = self.index.values(offsets)  # (chunks, K, 2m)
        documents = self.corpus.document_of(np.maximum(offsets, 0))
        return [
            (
                [
                    Neighbor(
                        document=self.corpus.documents[documents[u, k]].name,
                        offset=int(offsets[u, k] - self.corpus.starts[documents[u, k]]),
                        distance=float(distances[u, k]),
                        text=self.corpus.text(int(offsets[u, k]), int((values[u, k] >= 0).sum())),
                        corpus_offset=int(offsets[u, k]),
                    )
                    for k in np.flatnonzero(offsets[u] >= 0)
                ],
                values[u],
            )
            for u in range(len(chunks))
        ]

    def sample(self, prompt: str, sample_len: int, config: SampleConfig | None = None) -> str:
        """Text of `sample_len` tokens that continue `prompt`, as it stands after the prompt.

        * `config` says how to draw; left out, always the likeliest token is taken, as the tutorial does

        Raises `ValueError` for an empty prompt, or a character that is not in the vocabulary.
        """
        return "".join(self.stream(prompt, sample_len, config))

    def stream(self, prompt: str, sample_len: int, config: SampleConfig | None = None) -> Iterator[str]:
        """As `sample`, but yields the text as it is written, a few characters at a time."""
        if sample_len < 1:
            raise InvalidOption("length", sample_len, "is not at least 1")
        return self._write(self._tokens_of(prompt), sample_len, config or SampleConfig())

    @torch.inference_mode()
    def sample_many(self, prompts: Sequence[str], sample_len: int, config: SampleConfig | None = None) -> list[str]:
        """What `sample` gives for each of several prompts; a `RetroModel` computes a token of each at a time.

        Afterwards `neighbors_of` has for each prompt what `neighbors` would have.
        """
        config, m = config or SampleConfig(), self.chunk_len
        texts, self.neighbors_of = [self._tokens_of(prompt) for prompt in prompts], []
        if not isinstance(self.model, RetroModel) or sample_len < 1 or not texts:
            samples = []
            for prompt in prompts:
                samples.append(self.sample(prompt, sample_len, config))
                self.neighbors_of.append(self.neighbors)
            return samples
        self.model.eval()
        generators = [torch.Generator().manual_seed(config.seed) for _ in texts]
        ends = [len(ids) + sample_len for ids in texts]
        room = min(max(ends), (self.max_chunks or max(ends)) * m)
        batch, values = BatchDecoder(self.model, len(texts), room), [dict[int, Tensor]() for _ in texts]
        starts = [start_of_window(len(ids), m, self.max_chunks) for ids in texts]
        self.neighbors_of = [[[] for _ in range(start // m)] for start in starts]
        chunks_of_prompts = [(row, u) for row, ids in enumerate(texts) for u in range(starts[row] // m, len(ids) // m)]
        self._look_up(chunks_of_prompts, texts, values)
        while unfinished := [row for row, ids in enumerate(texts) if len(ids) < ends[row]]:
            for row in unfinished:
                if (moved := start_of_window(len(texts[row]), m, self.max_chunks)) > starts[row]:
                    starts[row] = moved
                    batch.restart(row)
            unread = {row: len(texts[row]) - starts[row] - batch.lengths[row] for row in unfinished}  # tokens
            n_tokens = {row: min(batch.n_next(row), n) for row, n in unread.items()}
            L = max(n_tokens.values())
            # First what is known is read, in calls as long as they may be. Then who comes to the end of a chunk waits
            # for the others, so that neighbors are looked up and encoded together.
            going = [row for row in unfinished if n_tokens[row] == L]
            completing = [row for row in going if batch.completes_chunk(row)]
            going = [row for row in going if row not in completing] or completing
            at = {row: starts[row] + batch.lengths[row] for row in going}
            chunk = {row: i // m for row, i in at.items() if batch.completes_chunk(row)}
            self._look_up([(row, u) for row, u in chunk.items() if u not in values[row]], texts, values)
            neighbors = {row: values[row][u] for row, u in chunk.items() if u in values[row]}
            tokens = torch.tensor([texts[row][i : i + L] for row, i in at.items()], device=self.device)
            logits = batch.feed(going, tokens, neighbors).float().cpu()
            for row, of_row in zip(going, logits, strict=True):
                if unread[row] == L:  # all of the text is read
                    texts[row].append(choose(of_row, config, generators[row]))
        return [self._text(ids, end - sample_len, end) for ids, end in zip(texts, ends, strict=True)]

    def _look_up(self, chunks: list[tuple[int, int]], texts: list[list[int]], values: list[dict[int, Tensor]]) -> None:
        """Retrieve the neighbors of chunks, each given by the number of its text and its own, at once."""
        if not chunks or not self.model.ca_layers:
            return
        m = self.chunk_len
        found = self.retrieve([self._text(texts[row], u * m, u * m + m) for row, u in chunks])
        for (row, u), (neighbors, tokens) in zip(chunks, found, strict=True):
            self.neighbors_of[row].append(neighbors)
            values[row][u] = torch.from_numpy(tokens).to(self.device)

    def _tokens_of(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the prompt is {prompt[error.start]!r}, a lone surrogate, which no text "
                "can hold; leave it out"
            ) from None
        if not (ids := self.corpus.tokenizer.encode(prompt)):
            raise ValueError("the prompt is empty; give at least one token to continue")
        return ids

    @torch.inference_mode()
    def _write(self, ids: list[int], sample_len: int, config: SampleConfig) -> Iterator[str]:
        """Sample tokens behind `ids`, and yield their text as it is settled."""
        generator = torch.Generator().manual_seed(config.seed)
        self.model.eval()
        m, n_written = self.chunk_len, len(ids)
        decoder, start = decoder_of(self.model), start_of_window(len(ids), m, self.max_chunks)
        self.tokens, self.neighbors = ids, [[] for _ in range(start // m)]
        values = self.values = {}
        for n_left in reversed(range(sample_len)):
            if (moved := start_of_window(len(ids), m, self.max_chunks)) > start:
                start = moved
                decoder.restart()
            logits = self._read(decoder, ids, start, values)
            ids.append(choose(logits.float().cpu(), config, generator))
            text = self._text(ids, n_written, len(ids))
            # A subword may end inside a character; wait for the rest of it.
            if text and (not n_left or not text.endswith("\ufffd")):
                yield text
                n_written = len(ids)

    def text(self, start: int, end: int) -> str:
        """The text of some of the `tokens` of prompt and sample."""
        return self._text(self.tokens, start, end)

    def _text(self, ids: list[int], start: int, end: int) -> str:
        """What the tokens from `start` to `end` add to the text of those before them, of which a few are enough."""
        tokenizer = self.corpus.tokenizer
        return tokenizer.decode_after(ids[max(0, start - tokenizer.context) : start], ids[start:end])

    def _read(self, decoder: Decoder, ids: list[int], start: int, values: dict[int, Tensor]) -> Tensor:
        """Logits (n_vocab) for the token after `ids`, of which the window from `start` on is read.

        The decoder takes in what it does not have yet; `values` has what was retrieved, and gets what is missing.
        """
        m = self.chunk_len
        while True:
            at, ret = start + decoder.length, None
            if self.model.ca_layers and decoder.completes_chunk:
                if (u := at // m) not in values:
                    # The chunks of a prompt are all known: they are retrieved for at once.
                    whole = [self._text(ids, i, i + m) for i in range(u * m, len(ids) - m + 1, m)]
                    for number, (neighbors, tokens) in enumerate(self.retrieve(whole), start=u):
                        self.neighbors.append(neighbors)
                        values[number] = torch.from_numpy(tokens).to(self.device)
                ret = values[u]  # (K, 2m)
            logits = decoder.feed(torch.tensor(ids[at : at + decoder.n_next()], device=self.device), ret)
            if start + decoder.length == len(ids):
                return logits


def sampler_of(run: Path, model: Model, data_path: Path, corpus: Corpus, device: Any) -> Sampler:
    """What writes with a run's model.

    * `corpus` is the one in `data_path`; the database there is opened only if the model reads neighbors
    """
    dataset = read_run(run)["dataset"]
    m, K, index = dataset["chunk_len"], dataset["n_neighbors"], None
    if model.ca_layers:
        index = RetroIndex(m, corpus=corpus, data_path=data_path, device=device)
    max_chunks = model.max_chunks or dataset["chunks_per_sample"]
    return Sampler(device, model, corpus, m, index=index, data_path=data_path, n_neighbors=K, max_chunks=max_chunks)


def base_in_context(base: str, data_path: Path, device: torch.device | str) -> InContext:
    """A pretrained model that is to have neighbors from a database in its context, untrained.

    * `base` is a folder of transformers, a name on the hub, or the packaged one

    Raises `InvalidOption` for a base that is not there, or has another tokenizer than the database.
    """
    corpus, m = open_corpus(data_path), read_database_manifest(data_path)["chunk_len"]
    model = InContext(widened(load_base(base, device=device), device), m)
    require_tokenizer(base, model.n_vocab, corpus, m)
    return model


def sampler_in_context(model: InContext, data_path: Path) -> Sampler:
    """What writes with a base that has neighbors from the database in a folder in its context.

    Raises `InvalidOption` where these would leave too little of it to the text.
    """
    device, m, corpus = model.base.device, model.chunk_len, open_corpus(data_path)
    index = RetroIndex(m, corpus=corpus, data_path=data_path, device=device)
    model.require_room(index.n_neighbors)
    max_chunks = min(model.max_chunks or sys.maxsize, DatasetConfig.chunks_per_sample)
    return Sampler(device, model, corpus, m, index=index, max_chunks=max_chunks)


def _require_fit(model: Model | InContext, corpus: Corpus, chunk_len: int, index: RetroIndex | None) -> None:
    """Raise `ValueError` for what a model would read as something else than it was trained on."""
    n_vocab = model.n_vocab
    # The embeddings of a pretrained model may be more than its tokenizer has tokens, for the hardware's sake.
    if corpus.n_tokens > n_vocab or (corpus.n_tokens < n_vocab and isinstance(model, RetroModel)):
        raise ValueError(
            f"the model has a vocabulary of {n_vocab} tokens, but the corpus has {corpus.n_tokens}; open the corpus "
            "that it was trained on"
        )
    if chunk_len != model.chunk_len:
        raise InvalidOption("chunk_len", chunk_len, f"is not the model's, which is {model.chunk_len}")
    if index is None:
        return
    if index.chunk_len != chunk_len:
        raise ValueError(
            f"the database has chunk_len={index.chunk_len}, but the model reads chunk_len={chunk_len}; build one for it"
        )
    if (found := index.corpus.database_sha256) != (wanted := corpus.database_sha256):
        raise ValueError(
            f"the database was built from another corpus (sha256 {found[:12]}) than is given ({wanted[:12]}); give the "
            "corpus of the index"
        )


def _field_of_dataset(folder: Path, corpus: Corpus, chunk_len: int, name: str) -> int | None:
    """A number that the dataset in a folder was made with; None if there is no dataset of this text and `chunk_len`."""
    if not (path := folder / DATASET_FILE["train"]).exists():
        return None
    header = read_header(path)
    return None if differences(header, {"corpus_sha256": corpus.sha256, "chunk_len": chunk_len}) else header[name]


def choose(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """A token drawn from logits (n_vocab)."""
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k is not None:
        # Of tokens that are equally likely, the first ones stay.
        logits[logits.sort(descending=True, stable=True).indices[config.top_k :]] = -torch.inf
    if config.top_p is not None:
        ordered, tokens = logits.softmax(dim=-1).sort(descending=True, stable=True)
        # Leave out tokens before which the mass is already there; the likeliest always stays.
        beyond = ordered.cumsum(dim=-1) - ordered >= config.top_p
        logits[tokens[beyond]] = -torch.inf
    return int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))


if __name__ == "__main__":
    from retro.cli import script

    script("sample")
