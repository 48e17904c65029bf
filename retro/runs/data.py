"""The data of a run: its datasets, and the order of their samples.

The order is a function of the seed and the step, so that a run can go on anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler as TorchSampler

from retro import parallel
from retro.config import TrainConfig
from retro.dataset import DATASET_FILE, IGNORED_TARGET, Dataset, stretch_lengths
from retro.errors import require_match
from retro.search.index_file import read_database_manifest
from retro.storage.sample_file import retriever_of
from retro.text.corpus import NO_TOKEN, open_corpus


class TrainingData:
    """Corpus and datasets in a folder. Raises what opening them raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.corpus = open_corpus(path)
        self.datasets = {split: Dataset(path / file, self.corpus) for split, file in DATASET_FILE.items()}
        self.header: dict[str, Any] = self.datasets["train"].header
        self.manifest = {name: value for name, value in self.header.items() if name != "versions"}
        self.chunk_len: int = self.header["chunk_len"]
        self.tokens_per_sample: int = self.chunk_len * self.header["chunks_per_sample"]

    def require_current(self) -> None:
        """Raise `StaleArtifact` if the neighbors were retrieved from another index than there is now."""
        database = read_database_manifest(self.path)
        now = {"index_sha256": database["index_sha256"], "retriever": retriever_of(database)}
        require_match(self.datasets["train"].path, self.header, now)

    def n_batches(self, split: str, batch_size: int) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.datasets[split]) / batch_size)

    def n_samples_before(self, step: int, batch_size: int) -> int:
        """Training samples of the steps before a step; an epoch's last batch may be smaller."""
        epochs, i = divmod(step, self.n_batches("train", batch_size))
        n = len(self.datasets["train"])
        return epochs * n + min(n, i * batch_size)

    def bits_per_nat(self, split: str, config: TrainConfig, start: int, stop: int) -> float:
        """Bits per byte of a mean loss of one nat per token that the steps from `start` to `stop` predict."""
        dataset, n_tokens, n_bytes = self.datasets[split], 0, 0.0
        for batch in Batches(len(dataset), config.batch_size, config.seed, start, stop).of_all_processes():
            for offset in (offset for idx in batch for offset in dataset.line(idx)["offsets"]):
                n = int(stretch_lengths(self.corpus, offset, self.tokens_per_sample))
                n_tokens += n
                n_bytes += self.corpus.n_bytes_of(offset + 1, offset + 1 + n)
        return n_tokens / (math.log(2) * max(1.0, n_bytes))

    def batches(self, split: str, config: TrainConfig, start: int, stop: int, pin_memory: bool) -> DataLoader[Any]:
        """Batches `(src, tgt, neighbors)` of the steps from `start` to `stop`."""
        dataset, m, C, K = (
            self.datasets[split],
            self.chunk_len,
            self.header["chunks_per_sample"],
            self.header["n_neighbors"],
        )
        blank = (
            torch.zeros(C * m, dtype=torch.long),
            torch.full((C * m,), IGNORED_TARGET),
            torch.full((C, K, 2 * m), NO_TOKEN),
        )
        order = Batches(len(dataset), config.batch_size, config.seed, start, stop)
        items: Any = dataset
        if split == "train" and (config.missing_neighbors or config.random_neighbors):
            items, order.counts_on = VariedNeighbors(dataset, config), True
        # A DataLoader draws a number when it starts: from a generator of its own, so that torch's is left alone.
        own = torch.Generator().manual_seed(config.seed)
        collating = partial(collate, blank=blank)
        return DataLoader(items, batch_sampler=order, pin_memory=pin_memory, collate_fn=collating, generator=own)


class Batches(TorchSampler):
    """Numbers of the samples of each step, from `start` to `stop`; each epoch is a new seeded permutation.

    Of several processes each gets its share of each step's samples, which may be none.
    """

    counts_on = False  # whether the samples of an epoch are numbered behind those of the epoch before

    def __init__(self, n_samples: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.n_samples, self.batch_size, self.seed, self.start, self.stop = n_samples, batch_size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = math.ceil(self.n_samples / self.batch_size)
        for step, batch in enumerate(self.of_all_processes(), start=self.start):
            before = step // per_epoch * self.n_samples if self.counts_on else 0
            yield [before + idx for idx in batch[parallel.rank() :: parallel.n_processes()]]

    def of_all_processes(self) -> Iterator[list[int]]:
        """The whole batches."""
        per_epoch, drawn = math.ceil(self.n_samples / self.batch_size), -1
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, per_epoch)
            if epoch != drawn:
                order, drawn = np.random.default_rng([self.seed, epoch]).permutation(self.n_samples).tolist(), epoch
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


class VariedNeighbors(TorchDataset):
    """Training samples that lack some of their neighbors, and have another text's for some chunks.

    A model that learns from them can read any number of neighbors, and learns when to read nothing. What is drawn is a
    function of seed, epoch and sample, not of how they are batched.

    * `dataset` are the samples; item i of epoch e has the number e * len(dataset) + i
    * `config` has the shares
    """

    def __init__(self, dataset: Dataset, config: TrainConfig) -> None:
        self.dataset, self.config = dataset, config

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        epoch, idx = divmod(number, len(self.dataset))
        src, tgt, neighbors = self.dataset[idx]
        corpus, (C, K, R) = self.dataset.corpus, neighbors.shape
        rng = np.random.default_rng([self.config.seed, epoch, idx])
        others = rng.integers(0, corpus.n_train_tokens, size=(C, K))
        # None of the sample's own documents or their near-duplicates, which may tell what it is to predict.
        own = corpus.groups[corpus.document_of(np.array(self.dataset.line(idx)["offsets"]))]
        others[np.isin(corpus.groups[corpus.document_of(others)], own)] = -1
        replaced = (rng.random((C, 1)) < self.config.random_neighbors) & (neighbors >= 0).any(dim=-1).numpy()
        values = torch.from_numpy(corpus.values(np.where(replaced, others, -1), R))
        neighbors = torch.where(torch.from_numpy(replaced)[..., None], values, neighbors)
        kept_back = torch.from_numpy(rng.random((C, K)) < self.config.missing_neighbors)
        return src, tgt, neighbors.masked_fill(kept_back[..., None], NO_TOKEN)


def collate(items: list[tuple[torch.Tensor, ...]], blank: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """A batch of samples; of none, the `blank` one, in which there is nothing to predict."""
    return default_collate(items or [blank])


def split_stretches(src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens `src` (B, T) in which -1 stands between two stretches -> tokens, and the number of each one's stretch.

    The latter is None where no sample has more than one, as most have.
    """
    absent = src < 0
    if not absent.any():
        return src, None
    return src.clamp(min=0), 2 * absent.cumsum(dim=1) - absent.long()  # odd where no token is
